/* score_block, once for each instruction set: 16 rows x COLUMNS columns of int8 products.
 *
 * A row is stored as q + 128 (uint8), 16 rows interleaved by units of four features [unit][16][4];
 * columns are int8, or int16, interleaved by panels of COLUMNS. With starts[c] = -128 sum(p_c) - h_c,
 *
 *     out[c][r] = <q_r, p_c> - h_c - thresholds[r],      hits[c] = rows r with out[c][r] >= 0.
 *
 * Returns whether there are any; without, out and hits may be left unwritten.
 *
 * The kernel for AVX2 adds modulo 2^16 unless EXACT_SCORES is defined, and a hit is 0 <= out <= caps[r] there: the caller
 * vouches that no out exceeds caps[r] < 2^16, so that no hit is ever lost. An out below caps[r] - 2^16 comes as a false
 * one, which costs the time of looking at it. The others are exact in 32 bits. */
#ifndef SKIVFPQ_SCORE_BLOCK_H
#define SKIVFPQ_SCORE_BLOCK_H

#include "interleave.h"

#include <stdint.h>

#if defined(EMULATE_AMX) || (defined(__AMX_INT8__) && !defined(EMULATE_VNNI))
#define HAS_TILES
#elif defined(EMULATE_VNNI) || defined(__AVX512VNNI__)
#define HAS_VNNI
#endif

/* Columns, in levels of which so many make one of rows at most, and where the features of a unit stand in them. */
#if defined(EXACT_SCORES) && defined(__AVX2__) && !defined(HAS_TILES) && !defined(HAS_VNNI)
typedef int16_t column_level;
#define MOST_LEVELS 2
#define UNIT_PLACE(i) ((i) % 2 * 2 + (i) / 2)
#else
typedef int8_t column_level;
#define MOST_LEVELS 1
#define UNIT_PLACE(i) (i)
#endif

#define SCORE_BLOCK_ARGUMENTS                                                                        \
    const uint8_t *rows,        /* IN (units, 16, 4) */                                              \
        const column_level *panel, /* IN, feature j of column c at PANEL_OFFSET(c, j) */             \
        const int32_t *starts,  /* IN (COLUMNS,) */                                                  \
        int64_t units, int columns, /* columns: how many of the panel are in use */                  \
        const int32_t *thresholds, const int32_t *caps, /* IN (16,) */                               \
        int32_t (*out)[BLOCK], uint16_t *hits           /* OUT (COLUMNS, 16), (COLUMNS,), those in use */

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
static inline uint32_t sign_bits8(__m256i lanes) { return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(lanes)); }

#ifdef EXACT_SCORES
#include "score_avx2_exact.h"
#else
#include "score_avx2.h"
#endif

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
