// A decoding step of all layers of a decoder (rotary positions or none, RMS norms, SwiGLU) in one call: between two parts
// of it threads wait for each other, and for nobody else.

#pragma once

#include "attention.hpp"
#include "product.hpp"
#include "rows.hpp"

#if HAS_PRODUCT

struct Layer {  // as cpu.py lists them
    const float *attention_norm, *feed_norm;
    const bf16 *qkv, *qkv_bias, *o, *o_bias, *gate_up, *gate_up_bias, *down, *down_bias;
};

struct Sizes {
    int64_t slots, layers, width, heads, kv_heads, head_width, feed_width, window, capacity, room;
};

// x (slots, width): the embedded tokens, written over; out: the hidden rows behind the final norm. The cache has place for
// `room` slots of `capacity` tokens in each layer. work: a row for each slot of all that stands between.
static void step(bf16* x, const bf16* cos, const bf16* sin, const int64_t* length, const Layer* layers,
                 const float* final_norm, bf16* keys, bf16* values, bf16* work, bf16* out, const Sizes* sizes, float eps) {
    const Sizes s = *sizes;
    const int64_t inner = s.heads * s.head_width, joined = inner + 2 * s.kv_heads * s.head_width;
    bf16 *normed = out, *added = work, *mixed = added + s.slots * s.width, *first = mixed + s.slots * inner;
    bf16* active = first + s.slots * (joined > 2 * s.feed_width ? joined : 2 * s.feed_width);
#pragma omp parallel
    for (int64_t l = 0; l < s.layers; l++) {
        const Layer& w = layers[l];
        const int64_t before = l * s.room * s.kv_heads * s.capacity * s.head_width;
        add_norm(x, l ? added : nullptr, w.attention_norm, normed, nullptr, s.slots, s.width, eps);
        product(normed, w.qkv, w.qkv_bias, first, s.slots, joined, s.width);
        attend(first, cos, sin, keys + before, values + before, length, mixed, s.slots, s.heads, s.kv_heads, s.head_width,
               s.capacity, s.window);
        product(mixed, w.o, w.o_bias, added, s.slots, s.width, inner);
        add_norm(x, added, w.feed_norm, normed, nullptr, s.slots, s.width, eps);
        product(normed, w.gate_up, w.gate_up_bias, first, s.slots, 2 * s.feed_width, s.width);
        swiglu(first, first + s.feed_width, active, s.slots, s.feed_width, 2 * s.feed_width);
        product(active, w.down, w.down_bias, added, s.slots, s.width, s.feed_width);
        if (l + 1 == s.layers) add_norm(x, added, final_norm, out, nullptr, s.slots, s.width, eps);
    }
}

#endif
