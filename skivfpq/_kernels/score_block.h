/* score_block, once for each instruction set: 16 rows x COLUMNS columns of int8 products.
 *
 * A row is stored as q + 128 (uint8), 16 rows interleaved by units of four features [unit][16][4];
 * columns are int8, interleaved by panels of COLUMNS. With starts[c] = -128 sum(p_c) - h_c,
 *
 *     out[c][r] = <q_r, p_c> - h_c - thresholds[r],      hits[c] = rows r with out[c][r] >= 0.
 *
 * Returns whether there are any; without, out and hits may be left unwritten.
 *
 * The kernel for AVX2 adds modulo 2^16 unless EXACT_SCORES is defined, and a hit is 0 <= out <= caps[r] there: the caller vouches that
 * no out exceeds caps[r] < 2^16, so that no hit is ever lost. An out below caps[r] - 2^16 comes as a false
 * one, which costs the time of looking at it. The others are exact in 32 bits. */
#ifndef SKIVFPQ_SCORE_BLOCK_H
#define SKIVFPQ_SCORE_BLOCK_H

#include "interleave.h"

#include <stdint.h>

#define SCORE_BLOCK_ARGUMENTS                                                                        \
    const uint8_t *rows,        /* IN (units, 16, 4) */                                              \
        const int8_t *panel,    /* IN, feature j of column c at PANEL_OFFSET(c, j) */                \
        const int32_t *starts,  /* IN (COLUMNS,) */                                                  \
        int64_t units, int columns, /* columns: how many of the panel are in use */                  \
        const int32_t *thresholds, const int32_t *caps, /* IN (16,) */                               \
        int32_t (*out)[BLOCK], uint16_t *hits           /* OUT (COLUMNS, 16), (COLUMNS,), those in use */

#if defined(EMULATE_AMX) || (defined(__AMX_INT8__) && !defined(EMULATE_VNNI))
#define HAS_TILES
#elif defined(EMULATE_VNNI) || defined(__AVX512VNNI__)
#define HAS_VNNI
#endif

#if defined(HAS_TILES) || defined(HAS_VNNI)

/* One for each row, modulo 2^32. */
typedef uint32_t lanes16 __attribute__((vector_size(64), aligned(4), may_alias));

/* Which lanes are negative as int32. */
#ifdef __AVX512DQ__
#include <immintrin.h>
static inline uint32_t sign_bits(const lanes16 *scores) { return _mm512_movepi32_mask((__m512i)*scores); }
#else
static inline uint32_t sign_bits(const lanes16 *scores) {
    uint32_t bits = 0;
    for (int r = 0; r < BLOCK; r++) bits |= (*scores)[r] >> 31 << r;
    return bits;
}
#endif

#endif

#if defined(HAS_TILES)

#include "score_amx.h"

#elif defined(HAS_VNNI)

#include "score_vnni.h"

#elif defined(__AVX2__)

#include <immintrin.h>
#define COLUMNS 6
#define LARGEST_COLUMN 64 /* 2 * 255 * 64 fits 16 bits: vpmaddubsw never saturates */
#define UNITS_MULTIPLE 1
#define PANEL_OFFSET(c, j) ((j) / 4 * COLUMNS * 4 + (c) * 4 + (j) % 4)

#ifdef EXACT_SCORES /* pairs of products added in 32 bits: two more instructions for each column */

#define WRAPS 0
static const int16_t ONES[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
#define ADD_PRODUCTS_TO_SUMS                                                                         \
    "vpmaddwd %7, %0, %0\n\tvpmaddwd %7, %1, %1\n\tvpaddd %0, %2, %2\n\tvpaddd %1, %3, %3"
#define ONES_OPERAND , "m"(*(const __m256i_u *)ONES)
#define FIRST_SUM(start) (start)

static inline __m256i score(__m256i sums, __m256i threshold) { return _mm256_sub_epi32(sums, threshold); }
static inline __m256i is_miss(__m256i scores, __m256i cap) { return (void)cap, scores; } /* its signs */

#else

#define WRAPS 1
#define ADD_PRODUCTS_TO_SUMS "vpaddw %0, %2, %2\n\tvpaddw %1, %3, %3"
#define ONES_OPERAND
#define FIRST_SUM(start) (uint16_t)(start)

/* Adds the two halves of each row's sum, modulo 2^16. */
static inline __m256i score(__m256i sums, __m256i threshold) {
    __m256i both = _mm256_add_epi16(sums, _mm256_srli_epi32(sums, 16));
    return _mm256_and_si256(_mm256_sub_epi16(both, threshold), _mm256_set1_epi32(0xFFFF));
}
static inline __m256i is_miss(__m256i scores, __m256i cap) { return _mm256_cmpgt_epi32(scores, cap); }

#endif

static inline uint32_t sign_bits8(__m256i lanes) { return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(lanes)); }

/* Twelve accumulators, two row vectors and two products are the sixteen registers. In one asm
 * statement, because GCC otherwise moves accumulators to memory and back. */
#define EACH_COLUMN(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define ACCUMULATE(c)                                                                                \
    if (c < columns)                                                                                 \
        asm("vpbroadcastd %6, %1\n\tvpmaddubsw %1, %4, %0\n\tvpmaddubsw %1, %5, %1\n\t" ADD_PRODUCTS_TO_SUMS \
        : "=&x"(product0), "=&x"(product1), "+x"(low##c), "+x"(high##c)                              \
        : "x"(row0), "x"(row1), "m"(*(const int32_t *)(panel + c * 4)) ONES_OPERAND);
#define START(c) __m256i low##c = _mm256_set1_epi32(FIRST_SUM(starts[c])), high##c = low##c;
#define FINISH(c)                                                                                    \
    if (c < columns) {                                                                               \
    low##c = score(low##c, threshold0), high##c = score(high##c, threshold1);                        \
    all_miss = _mm256_and_si256(all_miss, _mm256_and_si256(is_miss(low##c, cap0), is_miss(high##c, cap1))); \
    }
#define STORE(c)                                                                                     \
    if (c < columns) {                                                                               \
    hits[c] = ~(sign_bits8(is_miss(low##c, cap0)) | sign_bits8(is_miss(high##c, cap1)) << 8) & 0xFFFF; \
    _mm256_store_si256((__m256i *)out[c], low##c), _mm256_store_si256((__m256i *)(out[c] + 8), high##c); \
    }

/* Compiled for panels with 2, 4 and 6 columns in use. */
static inline __attribute__((always_inline)) int score_columns(SCORE_BLOCK_ARGUMENTS) {
    int64_t block_size = 64 * units;
    EACH_COLUMN(START)
    for (int64_t u = 0; u < units; u++, rows += 64, panel += 24) {
        __m256i row0 = _mm256_loadu_si256((const __m256i *)rows), product0, product1;
        __m256i row1 = _mm256_loadu_si256((const __m256i *)(rows + 32));
        __builtin_prefetch(rows + block_size); /* the next block */
        EACH_COLUMN(ACCUMULATE)
    }
    const __m256i *thresholds_ = (const __m256i *)thresholds, *caps_ = (const __m256i *)(WRAPS ? caps : thresholds);
    __m256i threshold0 = _mm256_loadu_si256(thresholds_), threshold1 = _mm256_loadu_si256(thresholds_ + 1);
    __m256i cap0 = _mm256_loadu_si256(caps_), cap1 = _mm256_loadu_si256(caps_ + 1);
    __m256i all_miss = _mm256_set1_epi32(-1);
    EACH_COLUMN(FINISH)
    if (sign_bits8(all_miss) == 0xFF) return 0;
    for (int c = 0; c < COLUMNS; c++) hits[c] = 0;
    EACH_COLUMN(STORE)
    return 1;
}

static int score_block(SCORE_BLOCK_ARGUMENTS) {
    if (columns > 4) return score_columns(rows, panel, starts, units, 6, thresholds, caps, out, hits);
    if (columns > 2) return score_columns(rows, panel, starts, units, 4, thresholds, caps, out, hits);
    return score_columns(rows, panel, starts, units, 2, thresholds, caps, out, hits);
}

#else

#define COLUMNS 4
#define LARGEST_COLUMN 127
#define WRAPS 0
#define UNITS_MULTIPLE 1
#define PANEL_OFFSET(c, j) ((j) / 4 * COLUMNS * 4 + (c) * 4 + (j) % 4)

/* Portable, exact in int32. */
static int score_block(SCORE_BLOCK_ARGUMENTS) {
    int any = 0;
    (void)caps, (void)columns;
    for (int c = 0; c < COLUMNS; c++) {
        for (int r = 0; r < BLOCK; r++) out[c][r] = starts[c] - thresholds[r];
        for (int64_t u = 0; u < units; u++) {
            const int8_t *p = panel + (u * COLUMNS + c) * 4;
            const uint8_t *q = rows + u * 64;
            for (int r = 0; r < BLOCK; r++)
                out[c][r] += q[r * 4] * p[0] + q[r * 4 + 1] * p[1] + q[r * 4 + 2] * p[2] + q[r * 4 + 3] * p[3];
        }
        hits[c] = 0;
        for (int r = 0; r < BLOCK; r++) hits[c] |= (uint32_t)(out[c][r] >= 0) << r;
        any |= hits[c] != 0;
    }
    return any;
}

#endif

#ifndef HAS_TILES /* what a thread does before and after it calls score_block */
static inline void begin_scan(void) {}
static inline void end_scan(void) {}
#endif

/* The hits of four columns, or of as many as are in use, 16 rows each. */
#define HITS ((COLUMNS + 3) / 4 * 4)

static inline uint64_t hits_of_four(const uint16_t *hits, int columns) {
    uint64_t four = hits[0] | (uint64_t)hits[1] << 16 | (uint64_t)hits[2] << 32 | (uint64_t)hits[3] << 48;
    return columns < 4 ? four & (((uint64_t)1 << 16 * columns) - 1) : four;
}

#endif
