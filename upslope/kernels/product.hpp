// y = x W^T + bias in bf16, for a weight that is laid out once and used many times.
//
// W stands in panels of 32 of its rows: (rows / 32, width / 2, 32, 2), so that one instruction multiplies a pair of
// numbers of x with 16 pairs of W and adds both. Sums are in float, over the pairs in their order whatever the batch.
// Without that instruction, or with AMX, which is faster still, there is no such product.

#pragma once

#include "numbers.hpp"

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)
#define HAS_PRODUCT 1
#else
#define HAS_PRODUCT 0
#endif

constexpr int64_t PANEL = 32;

#if HAS_PRODUCT

static inline __m512bh pairs(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }
static inline __m512bh everywhere(const bf16* x) { return (__m512bh)_mm512_set1_epi32(int32_t(unit(x))); }
static inline void store16(bf16* place, __m512 x, int64_t count) {
    const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(x);
    if (count >= 16) _mm256_storeu_si256((__m256i*)place, narrow);
    else if (count > 0) _mm256_mask_storeu_epi16(place, __mmask16((1u << count) - 1), narrow);
}

// R rows of x by one panel; `columns` of its 32 rows are there
template <int R>
static void tile(const bf16* x, const bf16* panel, const bf16* bias, bf16* y, int64_t stride, int64_t width, int64_t columns) {
    constexpr int64_t AHEAD = 32 * 2 * PANEL;  // what comes next is fetched 4 KB ahead
    __m512 a[R], b[R];
    for (int r = 0; r < R; r++) a[r] = b[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k += 2, panel += 2 * PANEL) {
        const __m512bh first = pairs(panel), second = pairs(panel + PANEL);
        _mm_prefetch((const char*)(panel + AHEAD), _MM_HINT_T0);
        _mm_prefetch((const char*)(panel + AHEAD + PANEL), _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const __m512bh pair = everywhere(x + r * width + k);
            a[r] = _mm512_dpbf16_ps(a[r], pair, first);
            b[r] = _mm512_dpbf16_ps(b[r], pair, second);
        }
    }
    if (bias) {
        float wide_bias[PANEL] = {};
        for (int64_t i = 0; i < columns; i++) wide_bias[i] = wide(bias[i]);
        for (int r = 0; r < R; r++) a[r] += _mm512_loadu_ps(wide_bias), b[r] += _mm512_loadu_ps(wide_bias + 16);
    }
    for (int r = 0; r < R; r++) {
        store16(y + r * stride, a[r], columns);
        store16(y + r * stride + 16, b[r], columns - 16);
    }
}

static inline void tiles(const bf16* x, const bf16* panel, const bf16* bias, bf16* y, int64_t rows, int64_t stride,
                         int64_t width, int64_t columns) {
    using Tile = void (*)(const bf16*, const bf16*, const bf16*, bf16*, int64_t, int64_t, int64_t);
    static constexpr Tile OF_ROWS[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>};
    for (int64_t r = 0; r < rows; r += 8)
        OF_ROWS[(rows - r < 8 ? rows - r : 8) - 1](x + r * width, panel, bias, y + r * stride, stride, width, columns);
}

// x (rows, width), y (rows, outputs). Called by every thread of a parallel region, which share the work.
static void product(const bf16* x, const bf16* panels, const bf16* bias, bf16* y, int64_t rows, int64_t outputs,
                    int64_t width) {
    constexpr int64_t CHUNK = 64;  // rows of x that stay in a cache near the processor while the panels pass
#pragma omp for collapse(2) schedule(static)
    for (int64_t r = 0; r < rows; r += CHUNK)
        for (int64_t n = 0; n < outputs; n += PANEL) {
            const int64_t count = rows - r < CHUNK ? rows - r : CHUNK;
            const int64_t columns = outputs - n < PANEL ? outputs - n : PANEL;
            tiles(x + r * width, panels + n * width, bias ? bias + n : nullptr, y + r * outputs + n, count, outputs, width,
                  columns);
        }
}

#endif
