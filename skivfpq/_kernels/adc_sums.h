/* Sums of the entries that codes select from 8-bit tables, 64 rows at a time; every way to do it gives the same. */
#ifndef SKIVFPQ_ADC_SUMS_H
#define SKIVFPQ_ADC_SUMS_H

#include "search.h"

#include <string.h>

#define CHUNK 64

static inline int64_t code_bytes(const skivfpq_coded *c) { return c->n_codewords > 256 ? 2 : 1; }

/* Bits of entries whose sums fit 16 bits, and those of two codes in a byte 8 bits. */
static inline int entry_bits(int64_t n_subspaces, int64_t n_codewords) {
    int bits = n_codewords == 16 ? 7 : 8;
    while (n_subspaces * ((1 << bits) - 1) > UINT16_MAX) bits--;
    return bits;
}

#define ADC_SUMS_ARGUMENTS                                                                           \
    const skivfpq_coded *c, const uint8_t *tables, /* IN (n_subspaces, n_codewords) */               \
        const void *columns, int64_t stride,       /* IN codes of the first row; codes from one column to the next */ \
        int64_t n_rows, uint16_t *sums             /* OUT (CHUNK,), those of n_rows and maybe of more */
typedef void adc_sums(ADC_SUMS_ARGUMENTS);

#define PLAIN_SUMS(NAME, CODE)                                                                       \
    static void NAME(ADC_SUMS_ARGUMENTS) {                                                           \
        for (int first = 0; first < CHUNK && first < n_rows; first += 8) {                         \
            const CODE *codes = (const CODE *)columns + first;                                       \
            const uint8_t *table = tables;                                                           \
            uint32_t all[8] = {0};                                                                   \
            for (int64_t m = 0; m < c->n_subspaces; m++, codes += stride, table += c->n_codewords)   \
                for (int r = 0; r < 8; r++) all[r] += table[codes[r]];                               \
            for (int r = 0; r < 8; r++) sums[first + r] = (uint16_t)all[r];                          \
        }                                                                                            \
    }
PLAIN_SUMS(sums_u8, uint8_t)
PLAIN_SUMS(sums_u16, uint16_t)

/* Two codes of 4 bits in a byte: tables of 16 entries are looked up by one shuffle. */
#if defined(__AVX512BW__)
#include <immintrin.h>
typedef uint8_t bytes __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint16_t words __attribute__((vector_size(64), aligned(1), may_alias));
#define TABLE_16(table) ((bytes)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(table))))
#define LOOK_UP(table, codes) ((bytes)_mm512_shuffle_epi8((__m512i)(table), (__m512i)(codes)))
#elif defined(__AVX2__)
#include <immintrin.h>
typedef uint8_t bytes __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint16_t words __attribute__((vector_size(32), aligned(1), may_alias));
#define TABLE_16(table) ((bytes)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table))))
#define LOOK_UP(table, codes) ((bytes)_mm256_shuffle_epi8((__m256i)(table), (__m256i)(codes)))
#else
typedef uint8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t words __attribute__((vector_size(16), aligned(1), may_alias));
#define TABLE_16(table) (*(const bytes *)(table))
#define LOOK_UP(table, codes) __builtin_shuffle(table, codes)
#endif

#define WIDE ((int)sizeof(bytes))
#define VECTORS (CHUNK / WIDE)

/* A sum of bytes in lanes of 16 bits: all of them, what the upper byte adds counting 256 times, and the upper alone. */
static inline void split_sums(words all, words upper, uint16_t *sums) {
    words lower = all - (upper << 8);
    for (int i = 0; i < WIDE / 2; i++) sums[2 * i] = lower[i], sums[2 * i + 1] = upper[i];
}

static void sums_packed(ADC_SUMS_ARGUMENTS) {
    const uint8_t *codes = columns;
    words all[VECTORS] = {{0}}, upper[VECTORS] = {{0}};
    (void)n_rows;
    for (int64_t m = 0; m < c->n_columns; m++, codes += stride) {
        static const uint8_t zeros[16] = {0};
        bytes low = TABLE_16(tables + 32 * m), high = TABLE_16(2 * m + 1 < c->n_subspaces ? tables + 32 * m + 16 : zeros);
        for (int v = 0; v < VECTORS; v++) {
            bytes pair = *(const bytes *)(codes + v * WIDE);
            bytes found = LOOK_UP(low, pair & 15) + LOOK_UP(high, (bytes)((words)pair >> 4) & 15);
            all[v] += (words)found, upper[v] += (words)found >> 8;
        }
    }
    for (int v = 0; v < VECTORS; v++) split_sums(all[v], upper[v], sums + v * WIDE);
}

#if defined(__AVX512BW__)
/* Tables of 256 entries in four registers each (VBMI). */
__attribute__((target("avx512vbmi"))) static void sums_vbmi(ADC_SUMS_ARGUMENTS) {
    const uint8_t *codes = columns;
    __m512i all = _mm512_setzero_si512(), upper = all;
    (void)n_rows;
    for (int64_t m = 0; m < c->n_subspaces; m++, codes += stride, tables += 256) {
        const __m512i *table = (const __m512i *)tables, code = _mm512_loadu_si512(codes);
        __m512i below = _mm512_permutex2var_epi8(table[0], code, table[1]);
        __m512i above = _mm512_permutex2var_epi8(table[2], code, table[3]);
        __m512i found = _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), below, above);
        all = _mm512_add_epi16(all, found), upper = _mm512_add_epi16(upper, _mm512_srli_epi16(found, 8));
    }
    split_sums((words)all, (words)upper, sums);
}
#elif defined(__AVX2__)
/* Of tables of 256 entries 16 shuffles, of which the upper four bits of a code choose, bit by bit. */
static inline __m256i choose(__m256i low, __m256i high, __m256i code, const int bit) { /* by the top bit of each byte */
    return _mm256_blendv_epi8(low, high, _mm256_slli_epi16(code, 7 - bit));
}

static inline __m256i look_up_64(const uint8_t *table, __m256i code) {
    __m256i lowest = _mm256_and_si256(code, _mm256_set1_epi8(15)), found[4];
    for (int i = 0; i < 4; i++) found[i] = (__m256i)LOOK_UP(TABLE_16(table + 16 * i), lowest);
    return choose(choose(found[0], found[1], code, 4), choose(found[2], found[3], code, 4), code, 5);
}

static void sums_of_shuffles(ADC_SUMS_ARGUMENTS) {
    for (int first = 0; first < CHUNK && first < n_rows; first += WIDE) {
        const uint8_t *codes = (const uint8_t *)columns + first, *table = tables;
        words all = {0}, upper = {0};
        for (int64_t m = 0; m < c->n_subspaces; m++, codes += stride, table += 256) {
            __m256i code = _mm256_loadu_si256((const __m256i *)codes);
            __m256i below = choose(look_up_64(table, code), look_up_64(table + 64, code), code, 6);
            __m256i above = choose(look_up_64(table + 128, code), look_up_64(table + 192, code), code, 6);
            words found = (words)choose(below, above, code, 7);
            all += found, upper += found >> 8;
        }
        split_sums(all, upper, sums + first);
    }
}
#endif

static adc_sums *pick_sums(const skivfpq_coded *c) {
    if (c->n_codewords == 16) return sums_packed;
    if (c->n_codewords > 256) return sums_u16;
#if defined(__AVX512BW__)
    if (__builtin_cpu_supports("avx512vbmi")) return sums_vbmi;
#elif defined(__AVX2__)
    return sums_of_shuffles;
#endif
    return sums_u8;
}

#endif
