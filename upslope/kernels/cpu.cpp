// What a decoding step and a training step do between their matrix products, each in one pass over memory, and products
// with weights that stay. T is float or bf16; sums and exponentials are in float. A row is computed by one thread, in a
// fixed order: neither the number of threads nor the rest of the batch changes a digit of it.

#include "attention.hpp"
#include "product.hpp"
#include "rows.hpp"
#include "step.hpp"
#include "training.hpp"
#include "vocabulary.hpp"

#define EXPORT(T, name)                                                                                                \
    void attend_##name(const T* qkv, const T* cos, const T* sin, T* keys, T* values, const int64_t* length, T* out,    \
                       int64_t slots, int64_t heads, int64_t kv_heads, int64_t width, int64_t capacity,                \
                       int64_t window) {                                                                               \
        _Pragma("omp parallel") attend(qkv, cos, sin, keys, values, length, out, slots, heads, kv_heads, width,        \
                                       capacity, window);                                                              \
    }                                                                                                                  \
    void keep_prompts_##name(const T* qkv, const T* cos, const T* sin, T* keys, T* values, const Entry* entries,       \
                             int64_t count, int64_t heads, int64_t kv_heads, int64_t width, int64_t capacity) {        \
        _Pragma("omp parallel") keep_prompts(qkv, cos, sin, keys, values, entries, count, heads, kv_heads, width,      \
                                             capacity);                                                                \
    }                                                                                                                  \
    void add_norm_##name(T* x, const T* y, const float* weight, T* out, float* scale, int64_t rows, int64_t width,     \
                         float eps) {                                                                                  \
        _Pragma("omp parallel") add_norm(x, y, weight, out, scale, rows, width, eps);                                  \
    }                                                                                                                  \
    void norm_backward_##name(const T* x, const T* dy, const float* weight, const float* scale, T* dx,                 \
                              float* weight_part, int64_t rows, int64_t width, int64_t parts) {                        \
        _Pragma("omp parallel") norm_backward(x, dy, weight, scale, dx, weight_part, rows, width, parts);              \
    }                                                                                                                  \
    void swiglu_##name(const T* gate, const T* up, T* out, int64_t rows, int64_t width, int64_t stride) {              \
        _Pragma("omp parallel") swiglu(gate, up, out, rows, width, stride);                                            \
    }                                                                                                                  \
    void swiglu_backward_##name(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t rows,               \
                                int64_t width) {                                                                       \
        _Pragma("omp parallel") swiglu_backward(gate, up, dy, dgate, dup, rows, width);                                \
    }                                                                                                                  \
    void token_stats_##name(const T* logits, const int64_t* target, float* logp, float* entropy, float* norm,          \
                            int64_t rows, int64_t vocabulary, float temperature) {                                     \
        token_stats(logits, target, logp, entropy, norm, rows, vocabulary, temperature);                               \
    }                                                                                                                  \
    void token_gradient_##name(T* logits, const int64_t* target, const float* entropy, const float* norm,              \
                               const float* grad_logp, const float* grad_entropy, int64_t rows, int64_t entries,       \
                               int64_t first, float temperature) {                                                     \
        token_gradient(logits, target, entropy, norm, grad_logp, grad_entropy, rows, entries, first, temperature);     \
    }                                                                                                                  \
    void pad_##name(const T* x, const T* cos, const T* sin, const Sequence* table, T* out, int64_t sequences,          \
                    int64_t heads, int64_t places, int64_t width, int64_t keys) {                                      \
        pad(x, cos, sin, table, out, sequences, heads, places, width, keys);                                           \
    }                                                                                                                  \
    void gather_##name(const T* padded, const T* cos, const T* sin, const Sequence* table, const int64_t* first_child, \
                       const int64_t* child, T* out, int64_t sequences, int64_t heads, int64_t places, int64_t width,  \
                       int64_t keys) {                                                                                 \
        gather(padded, cos, sin, table, first_child, child, out, sequences, heads, places, width, keys);               \
    }                                                                                                                  \
    void causal_softmax_##name(T* scores, const T* weights, const Sequence* table, int64_t sequences, int64_t rows,    \
                               int64_t queries, int64_t keys, int64_t window, float scale) {                           \
        causal_softmax(scores, weights, table, sequences, rows, queries, keys, window, scale);                         \
    }                                                                                                                  \
    void choose_##name(const T* logits, const float* temperature, const double* uniform, int64_t* id, float* logp,     \
                       int64_t rows, int64_t vocabulary, int64_t valid) {                                              \
        choose(logits, temperature, uniform, id, logp, rows, vocabulary, valid);                                       \
    }

extern "C" {
int64_t has_product() { return HAS_PRODUCT; }
#if HAS_PRODUCT
void product_bf16(const bf16* x, const bf16* panels, const bf16* bias, bf16* y, int64_t rows, int64_t outputs, int64_t width) {
#pragma omp parallel
    product(x, panels, bias, y, rows, outputs, width);
}
void step_bf16(bf16* x, const bf16* cos, const bf16* sin, const int64_t* length, const Layer* layers,
               const float* final_norm, bf16* keys, bf16* values, bf16* work, bf16* out, const Sizes* sizes, float eps) {
    step(x, cos, sin, length, layers, final_norm, keys, values, work, out, sizes, eps);
}
#endif
EXPORT(float, f32)
EXPORT(bf16, bf16)
void discounted_sums_f32(const float* x, const int64_t* starts, const float* tail, float* y, int64_t episodes, float decay) {
    discounted_sums(x, starts, tail, y, episodes, decay);
}
}
