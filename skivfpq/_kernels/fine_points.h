/* Products of fine points (scan.h), exact in 32 bits: they are short enough. */
#ifndef SKIVFPQ_FINE_POINTS_H
#define SKIVFPQ_FINE_POINTS_H

#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* <q, p> of a fine point and n others, TOGETHER at most: of the rows labels (n,) of codes (k, d). */
#define TOGETHER 4

static inline __attribute__((always_inline)) void products(const int16_t *q, const int16_t *codes,
                                                           const int32_t *labels, int n, int64_t d, int32_t *dots) {
    int64_t j = 0;
    const int16_t *p[TOGETHER] = {0};
    for (int c = 0; c < n; c++) p[c] = codes + labels[c] * d, dots[c] = 0;
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    __m512i sums0 = _mm512_setzero_si512(), sums1 = sums0, sums2 = sums0, sums3 = sums0;
    /* asm: GCC copies the sums around the intrinsic. */
#define ADD_PRODUCTS(c) \
    if (n > c) asm("vpdpwssd %2, %1, %0" : "+v"(sums##c) : "v"(levels), "m"(*(const __m512i_u *)(p[c] + j)));
#define SUM_PRODUCTS(c) if (n > c) dots[c] = _mm512_reduce_add_epi32(sums##c);
    for (; j + 32 <= d; j += 32) {
        __m512i levels = _mm512_loadu_si512(q + j);
        ADD_PRODUCTS(0) ADD_PRODUCTS(1) ADD_PRODUCTS(2) ADD_PRODUCTS(3)
    }
    SUM_PRODUCTS(0) SUM_PRODUCTS(1) SUM_PRODUCTS(2) SUM_PRODUCTS(3)
#endif
    for (int c = 0; c < n && j < d; c++)
        for (int64_t l = j; l < d; l++) dots[c] += (int32_t)q[l] * p[c][l];
}

#endif
