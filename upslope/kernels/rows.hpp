// Norms and activations, row by row. Each is called by every thread of a parallel region, which share the rows.

#pragma once

#include "numbers.hpp"

// x += y (where there is one), out = x / sqrt(mean(x^2) + eps) * weight; scale keeps 1 / sqrt(...) where it is asked for
template <class T>
static void add_norm(T* x, const T* y, const float* weight, T* out, float* scale, int64_t rows, int64_t width, float eps) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        T *xr = x + r * width, *to = out + r * width;
        if (y) {
            const T* yr = y + r * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) store(xr + i, wide(xr[i]) + wide(yr[i]));
        }
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += wide(xr[i]) * wide(xr[i]);
        const float s = 1.0f / std::sqrt(sum / float(width) + eps);
        if (scale) scale[r] = s;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) store(to + i, wide(xr[i]) * s * weight[i]);
    }
}

// dx = s (g - n mean(g n)), n = x s, g = dy weight; weight_part (parts, width): sum of dy n over each part's rows
template <class T>
static void norm_backward(const T* x, const T* dy, const float* weight, const float* scale, T* dx, float* weight_part,
                          int64_t rows, int64_t width, int64_t parts) {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < parts; p++) {
        float* dw = weight_part + p * width;
        for (int64_t r = rows * p / parts; r < rows * (p + 1) / parts; r++) {
            const T *xr = x + r * width, *gr = dy + r * width;
            T* to = dx + r * width;
            const float s = scale[r];
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < width; i++) {
                const float n = wide(xr[i]) * s, g = wide(gr[i]);
                dw[i] += g * n;
                dot += g * weight[i] * n;
            }
            const float mean = dot / float(width);
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                store(to + i, s * (wide(gr[i]) * weight[i] - wide(xr[i]) * s * mean));
        }
    }
}

// out = silu(gate) up; a row of gate or up begins `stride` numbers after the one before it
template <class T>
static void swiglu(const T* gate, const T* up, T* out, int64_t rows, int64_t width, int64_t stride) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++)
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const float g = wide(gate[r * stride + i]);
            store(out + r * width + i, g / (1.0f + exponential(-g)) * wide(up[r * stride + i]));
        }
}

// dgate = dy up s (1 + gate (1 - s)), dup = dy gate s, s = sigmoid(gate)
template <class T>
static void swiglu_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t rows, int64_t width) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++)
#pragma omp simd
        for (int64_t i = r * width; i < (r + 1) * width; i++) {
            const float g = wide(gate[i]), d = wide(dy[i]), s = 1.0f / (1.0f + exponential(-g));
            store(dgate + i, d * wide(up[i]) * s * (1.0f + g * (1.0f - s)));
            store(dup + i, d * g * s);
        }
}
