// Attention of a training step, between its products: padding, positions, causal softmax.

#pragma once

#include "numbers.hpp"

// A row of `table` is a sequence: where its own tokens begin and how many they are, where its parent's begin and how many
// of those stand in front of it. Padded tensors are (sequences, heads, places, width); a place holds one token or zeros.

struct Sequence {
    int64_t start, length, parent, prefix;
};

// x (N, heads, width) into padded places, turned by its positions where cos is there; with its parent's where keys != 0
template <class T>
static void pad(const T* x, const T* cos, const T* sin, const Sequence* table, T* out, int64_t sequences, int64_t heads,
                int64_t places, int64_t width, int64_t keys) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < sequences; b++)
        for (int64_t h = 0; h < heads; h++) {
            const Sequence q = table[b];
            const int64_t prefix = keys ? q.prefix : 0, used = prefix + q.length;
            T* to = out + (b * heads + h) * places * width;
            for (int64_t i = 0; i < used; i++) {
                const int64_t n = i < prefix ? q.parent + i : q.start + i - prefix;
                const T* from = x + (n * heads + h) * width;
                const T *c = cos ? cos + n * width / 2 : nullptr, *s = sin ? sin + n * width / 2 : nullptr;
                turn(from, c, s, width, 1.0f, to + i * width);
            }
            std::memset((void*)(to + used * width), 0, (places - used) * width * sizeof(T));
        }
}

// The other way round, and the gradient of `pad`: each token gets the sum of all places that hold it, turned back. The
// children of sequence b are child[first_child[b]] to child[first_child[b + 1] - 1].
template <class T>
static void gather(const T* padded, const T* cos, const T* sin, const Sequence* table, const int64_t* first_child,
                   const int64_t* child, T* out, int64_t sequences, int64_t heads, int64_t places, int64_t width,
                   int64_t keys) {
#pragma omp parallel
    {
        std::vector<float> sum(width);
        std::vector<T> narrow(width);
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < sequences; b++)
            for (int64_t h = 0; h < heads; h++) {
                const Sequence q = table[b];
                const int64_t prefix = keys ? q.prefix : 0;
                for (int64_t i = 0; i < q.length; i++) {
                    const T* own = padded + ((b * heads + h) * places + prefix + i) * width;
                    const T* from = own;
                    if (keys && first_child[b + 1] > first_child[b]) {
                        for (int64_t d = 0; d < width; d++) sum[d] = wide(own[d]);
                        for (int64_t c = first_child[b]; c < first_child[b + 1]; c++) {
                            const T* more = padded + ((child[c] * heads + h) * places + i) * width;
#pragma omp simd
                            for (int64_t d = 0; d < width; d++) sum[d] += wide(more[d]);
                        }
                        for (int64_t d = 0; d < width; d++) store(&narrow[d], sum[d]);
                        from = narrow.data();
                    }
                    const int64_t n = q.start + i;
                    T* to = out + (n * heads + h) * width;
                    const T *c = cos ? cos + n * width / 2 : nullptr, *s = sin ? sin + n * width / 2 : nullptr;
                    turn(from, c, s, width, -1.0f, to);
                }
            }
    }
}

// scores (sequences, rows, keys), in place: causal softmax(scale x) over what a row may see, zeros elsewhere. Row r is
// that of query r % queries.  With weights there, instead: the gradient of the scores, from that of the weights.
template <class T>
static void causal_softmax(T* scores, const T* weights, const Sequence* table, int64_t sequences, int64_t rows,
                           int64_t queries, int64_t keys, int64_t window, float scale) {
#pragma omp parallel
    {
        std::vector<float> line(keys);
        float* x = line.data();
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < sequences; b++)
            for (int64_t r = 0; r < rows; r++) {
                const int64_t query = r % queries, at = table[b].prefix + query;
                const int64_t first = window > 0 && at >= window ? at - window + 1 : 0;
                T* row = scores + (b * rows + r) * keys;
                if (query >= table[b].length) {
                    std::memset((void*)row, 0, keys * sizeof(T));
                    continue;
                }
                if (weights) {
                    const T* w = weights + (b * rows + r) * keys;
                    float dot = 0;
#pragma omp simd reduction(+ : dot)
                    for (int64_t j = first; j <= at; j++) dot += wide(row[j]) * wide(w[j]);
#pragma omp simd
                    for (int64_t j = first; j <= at; j++) store(row + j, (wide(row[j]) - dot) * wide(w[j]) * scale);
                } else {
#pragma omp simd
                    for (int64_t j = first; j <= at; j++) x[j] = wide(row[j]) * scale;
                    softmax(x, first, at);
#pragma omp simd
                    for (int64_t j = first; j <= at; j++) store(row + j, x[j]);
                }
                std::memset((void*)row, 0, first * sizeof(T));
                std::memset((void*)(row + at + 1), 0, (keys - at - 1) * sizeof(T));
            }
    }
}
