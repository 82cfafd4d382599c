// Attention of a decoding step: one new token in each slot of a cache.
//
// The cache is read in units of 4 bytes: one float, or a pair of bf16 that one instruction multiplies and adds where the
// processor has it. Keys of a (slot, kv head) stand in blocks of 32 tokens, (capacity / 32, width, 32) of such units along
// the width: 16 scores grow side by side, without a horizontal sum. Values stand in (capacity, width) of units along the
// tokens. width is a multiple of 32. What lies behind the last token is never weighed, but the other half of its unit is:
// with 0, so that it must be a number.

#pragma once

#include "numbers.hpp"

constexpr int64_t BLOCK = 32;

template <class T>
constexpr int64_t UNIT = 4 / sizeof(T);

// sum += x y of 16 units; T says what a unit is
static inline lanes multiply(const float*, lanes sum, words x, uint32_t y) {
    float number;
    std::memcpy(&number, &y, 4);
    return sum + (lanes)x * number;
}
static inline lanes multiply(const bf16*, lanes sum, words x, uint32_t y) {
#ifdef __AVX512BF16__
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(int32_t(y)));
#else
    const uint32_t parts[2] = {y << 16, y & 0xffff0000u};
    float first, second;
    std::memcpy(&first, parts, 4);
    std::memcpy(&second, parts + 1, 4);
    return sum + (lanes)(x << 16) * first + (lanes)(x & 0xffff0000u) * second;
#endif
}
static inline words load(const void* place) {
    words x;
    std::memcpy(&x, place, 64);
    return x;
}

// the key (turned) and the value of token `at` into their places
template <class T>
static void keep(const T* key, const T* value, T* K, T* V, int64_t at, int64_t width) {
    constexpr int64_t P = UNIT<T>;
    T* block = K + at / BLOCK * BLOCK * width + at % BLOCK * P;
    for (int64_t u = 0; u < width / P; u++) std::memcpy(block + u * BLOCK * P, key + u * P, 4);
    T* row = V + at / P * P * width + at % P;
    if (P == 2 && at % P == 0)
        for (int64_t i = 0; i < width; i++) row[i * P] = value[i], row[i * P + 1] = T{};
    else
        for (int64_t i = 0; i < width; i++) row[i * P] = value[i];
}

// score[g][j] = q_g . key_j for the blocks that hold tokens first to at; what is read next is fetched ahead
template <class T, int G>
static void products(const T* q, const T* K, const T* V, float* score, int64_t first, int64_t at, int64_t width,
                     int64_t capacity) {
    constexpr int64_t P = UNIT<T>;
    for (int64_t j = first / BLOCK * BLOCK; j <= at; j += BLOCK) {
        lanes a[G] = {}, b[G] = {};
        const T *block = K + j * width, *ahead = j + BLOCK <= at ? block + BLOCK * width : V + first / P * P * width;
        for (int64_t i = 0; i < width; i += P, block += BLOCK * P, ahead += BLOCK * P) {
            const words x = load(block), y = load(block + 16 * P);
            __builtin_prefetch(ahead);
            __builtin_prefetch(ahead + 16 * P);
            for (int g = 0; g < G; g++) {
                const uint32_t by = unit(q + g * width + i);
                a[g] = multiply(q, a[g], x, by), b[g] = multiply(q, b[g], y, by);
            }
        }
        for (int g = 0; g < G; g++) {
            std::memcpy(score + g * capacity + j, &a[g], 64);
            std::memcpy(score + g * capacity + j + 16, &b[g], 64);
        }
    }
}

// mixed[g] = sum_j weight[g][j] value_j, over C times 16 columns
template <class T, int G, int C>
static void mix(const T* weight, const T* V, const T* next, float* mixed, int64_t first, int64_t at, int64_t width,
                int64_t capacity) {
    constexpr int64_t P = UNIT<T>;
    lanes sum[G][C] = {};
    for (int64_t j = first / P * P; j <= at; j += P) {
        const T* ahead = j + BLOCK <= at ? V + (j + BLOCK) * width : next + (j + BLOCK - at - 1) / P * P * width;
        for (int c = 0; c < C; c++) {
            const words x = load(V + j * width + 16 * P * c);
            __builtin_prefetch(ahead + 16 * P * c);
            for (int g = 0; g < G; g++) sum[g][c] = multiply(weight, sum[g][c], x, unit(weight + g * capacity + j));
        }
    }
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++) std::memcpy(mixed + g * width + 16 * c, &sum[g][c], 64);
}

// G queries of one kv head; score and weight have room for `capacity` tokens each
template <class T, int G>
static void look(const T* q, const T* K, const T* V, float* score, T* weight, float* mixed, int64_t first, int64_t at,
                 int64_t width, int64_t capacity) {
    constexpr int64_t P = UNIT<T>;
    const float scale = 1.0f / std::sqrt(float(width));
    products<T, G>(q, K, V, score, first, at, width, capacity);
    for (int g = 0; g < G; g++) {
        float* x = score + g * capacity;
        T* w = weight + g * capacity;
#pragma omp simd
        for (int64_t j = first; j <= at; j++) x[j] *= scale;
        softmax(x, first, at);
        if (P == 2) w[first / P * P] = w[at / P * P + 1] = T{};
#pragma omp simd
        for (int64_t j = first; j <= at; j++) store(w + j, x[j]);
    }
    const T* next = K + capacity * width;  // the next head's keys
    int64_t i = 0;
    for (; i + 64 <= width; i += 64) mix<T, G, 4>(weight, V + i * P, next, mixed + i, first, at, width, capacity);
    for (; i < width; i += 32) mix<T, G, 2>(weight, V + i * P, next, mixed + i, first, at, width, capacity);
}

// Called by every thread of a parallel region, which share the work. One new token in each of `slots`: its key and value
// go into the cache at place length[slot], and its queries look at everything up to it. qkv: rows of (heads + 2 kv_heads)
// x width.
template <class T>
static void attend(const T* qkv, const T* cos, const T* sin, T* keys, T* values, const int64_t* length, T* out,
                   int64_t slots, int64_t heads, int64_t kv_heads, int64_t width, int64_t capacity, int64_t window) {
    const int64_t group = heads / kv_heads, half = width / 2;
    std::vector<float> floats(4 * (capacity + width));
    std::vector<T> room(4 * (capacity + width) + width);
    float *score = floats.data(), *mixed = score + 4 * capacity;
    T *weight = room.data(), *q = weight + 4 * capacity, *k = q + 4 * width;
#pragma omp for collapse(2) schedule(static)
    for (int64_t slot = 0; slot < slots; slot++)
        for (int64_t kv = 0; kv < kv_heads; kv++) {
            const int64_t at = length[slot], first = window > 0 && at >= window ? at - window + 1 : 0;
            const T *c = cos ? cos + slot * half : nullptr, *s = sin ? sin + slot * half : nullptr;
            const T* x = qkv + slot * (heads + 2 * kv_heads) * width;
            T* K = keys + (slot * kv_heads + kv) * capacity * width;
            T* V = values + (slot * kv_heads + kv) * capacity * width;
            turn(x + (heads + kv) * width, c, s, width, 1.0f, k);
            keep(k, x + (heads + kv_heads + kv) * width, K, V, at, width);
            for (int64_t g = 0, count; g < group; g += count) {
                count = group - g < 4 ? group - g : 4;
                for (int64_t i = 0; i < count; i++) turn(x + (kv * group + g + i) * width, c, s, width, 1.0f, q + i * width);
                auto one = count == 4 ? look<T, 4> : count == 3 ? look<T, 3> : count == 2 ? look<T, 2> : look<T, 1>;
                one(q, K, V, score, weight, mixed, first, at, width, capacity);
                T* place = out + (slot * heads + kv * group + g) * width;
#pragma omp simd
                for (int64_t i = 0; i < count * width; i++) store(place + i, mixed[i]);
            }
        }
}

struct Entry {  // a prompt that goes into a slot: its first token among all, and how many there are
    int64_t start, length, slot;
};

// Called by every thread of a parallel region. Keys (turned) and values of whole prompts go into the cache. qkv as above,
// a row for each token of all prompts.
template <class T>
static void keep_prompts(const T* qkv, const T* cos, const T* sin, T* keys, T* values, const Entry* entries, int64_t count,
                         int64_t heads, int64_t kv_heads, int64_t width, int64_t capacity) {
    std::vector<T> k(width);
#pragma omp for collapse(2) schedule(static)
    for (int64_t e = 0; e < count; e++)
        for (int64_t kv = 0; kv < kv_heads; kv++) {
            const int64_t place = (entries[e].slot * kv_heads + kv) * capacity * width;
            for (int64_t at = 0; at < entries[e].length; at++) {
                const int64_t n = entries[e].start + at;
                const T *c = cos ? cos + n * width / 2 : nullptr, *s = sin ? sin + n * width / 2 : nullptr;
                const T* x = qkv + n * (heads + 2 * kv_heads) * width;
                turn(x + (heads + kv) * width, c, s, width, 1.0f, k.data());
                keep(k.data(), x + (heads + kv_heads + kv) * width, keys + place, values + place, at, width);
            }
        }
}
