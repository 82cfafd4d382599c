// bf16 beside float, the exponential, vectors of 16 numbers, rotary positions and the softmax of a row.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

struct bf16 {
    uint16_t bits;
};

static inline float wide(float x) { return x; }
static inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
static inline void store(float* place, float x) { *place = x; }
static inline void store(bf16* place, float x) {  // to the nearest, ties to even; a nan stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    place->bits = uint16_t(x == x ? rounded : 0x7fc0);
}

// e^x to 2 units in the last place between -87 and 88, 0 below and e^88 above. No branch: loops over it become vector code.
static inline float exponential(float x) {
    const float low = x < -87.0f ? -87.0f : x, bound = low > 88.0f ? 88.0f : low;
    const float whole = std::nearbyintf(bound * 1.44269504f);
    const float rest = (bound - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const int32_t power = (int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return x < -87.0f ? 0.0f : sum * scale;
}

typedef float lanes __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));

static inline uint32_t unit(const void* place) {
    uint32_t bits;
    std::memcpy(&bits, place, 4);
    return bits;
}

// Rotary positions, in halves: x turned by its angle, or back where sign is -1; where there is no cos, x as it is.
template <class T>
static void turn(const T* x, const T* cos, const T* sin, int64_t width, float sign, T* out) {
    const int64_t half = width / 2;
    if (!cos) {
        std::memcpy(out, x, width * sizeof(T));
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = wide(x[i]), b = wide(x[i + half]), c = wide(cos[i]), s = sign * wide(sin[i]);
        store(out + i, a * c - b * s);
        store(out + i + half, b * c + a * s);
    }
}

static void softmax(float* x, int64_t first, int64_t at) {
    float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t j = first; j <= at; j++) top = x[j] > top ? x[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = first; j <= at; j++) sum += x[j] = exponential(x[j] - top);
    const float share = 1.0f / sum;
#pragma omp simd
    for (int64_t j = first; j <= at; j++) x[j] *= share;
}
