/* The lane kernel for both float types, compiled once for each instruction set and, other than
 * kernels.c, with -ffp-contract=fast: scores may be rounded in any way that the bound covers. */
#include "lanes.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* TILE_VECTORS x TILE_CENTERS accumulators, the rows' vectors and one broadcast center fill the
 * registers: 12 + 2 + 1 of 16, and 24 + 3 + 1 of 32 with AVX-512. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define TILE_VECTORS 3
#define TILE_CENTERS 8
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define TILE_VECTORS 2
#define TILE_CENTERS 6
#else
#define VECTOR_BYTES 16
#define TILE_VECTORS 2
#define TILE_CENTERS 6
#endif

#define INDICES 8 /* the number of a center in its panel takes the place of the lowest bits of its score */

#define GLUE_(a, b) a##_##b
#define GLUE(a, b) GLUE_(a, b)

/* LESSER and GREATER of vectors, b where a is no number: one instruction each on x86, where GCC makes two
 * of a comparison and a choice. */
#if defined(__AVX512F__)
#include <immintrin.h>
#define EXTREME(which, type, a, b) ((VECTOR)_mm512_##which##_##type(a, b))
#elif defined(__AVX2__)
#include <immintrin.h>
#define EXTREME(which, type, a, b) ((VECTOR)_mm256_##which##_##type(a, b))
#elif defined(__SSE2__)
#include <immintrin.h>
#define EXTREME(which, type, a, b) ((VECTOR)_mm_##which##_##type(a, b))
#else
#define min <
#define max >
#define EXTREME(which, type, a, b) SELECT((a) which (b), a, b)
#endif

#define LESSER(a, b) EXTREME(min, ps, a, b)
#define GREATER(a, b) EXTREME(max, ps, a, b)
#define REAL float
#define INT int32_t
#define SUFFIX f32
#define UNIT (FLT_EPSILON / 2)
#define UNDERFLOW 0x1p-100 /* more than d products below the smallest normal number can add up to */
#define NEVER 0x1p126      /* score of absent centers */
#define OVERFLOW 0x1p60    /* rows longer than this are left to the next stage */
#include "lanes.inc"
#undef REAL
#undef INT
#undef SUFFIX
#undef UNIT
#undef UNDERFLOW
#undef NEVER
#undef OVERFLOW

#define LESSER(a, b) EXTREME(min, pd, a, b)
#define GREATER(a, b) EXTREME(max, pd, a, b)
#define REAL double
#define INT int64_t
#define SUFFIX f64
#define UNIT (DBL_EPSILON / 2)
#define UNDERFLOW 0x1p-900
#define NEVER 0x1p1000
#define OVERFLOW 0x1p500
#include "lanes.inc"

/* out = V axes, four rows and 16 axes at a time. */
#define PROJECTED_ROWS 4
#define PROJECTED_AXES 16
typedef float axes8 __attribute__((vector_size(32), aligned(4)));

void PROJECT(const float *V, int64_t n, int64_t d, const float *axes, int64_t n_axes, float *out, int64_t stride) {
    for (int64_t i = 0; i < n; i += PROJECTED_ROWS) {
        const float *rows[PROJECTED_ROWS];
        int n_rows = n - i < PROJECTED_ROWS ? (int)(n - i) : PROJECTED_ROWS;
        for (int r = 0; r < PROJECTED_ROWS; r++) rows[r] = V + (i + (r < n_rows ? r : 0)) * d;
        int64_t h = 0;
        for (; h + PROJECTED_AXES <= n_axes; h += PROJECTED_AXES) {
            axes8 low0 = {0}, high0 = {0}, low1 = {0}, high1 = {0}, low2 = {0}, high2 = {0}, low3 = {0}, high3 = {0};
            for (int64_t j = 0; j < d; j++) {
                axes8 low = *(const axes8 *)(axes + j * n_axes + h), high = *(const axes8 *)(axes + j * n_axes + h + 8);
                low0 += rows[0][j] * low, high0 += rows[0][j] * high;
                low1 += rows[1][j] * low, high1 += rows[1][j] * high;
                low2 += rows[2][j] * low, high2 += rows[2][j] * high;
                low3 += rows[3][j] * low, high3 += rows[3][j] * high;
            }
            axes8 sums[PROJECTED_ROWS][2] = {{low0, high0}, {low1, high1}, {low2, high2}, {low3, high3}};
            for (int r = 0; r < n_rows; r++) memcpy(out + (i + r) * stride + h, sums[r], sizeof sums[r]);
        }
        for (; h < n_axes; h++)
            for (int r = 0; r < n_rows; r++) {
                float sum = 0;
                for (int64_t j = 0; j < d; j++) sum += rows[r][j] * axes[j * n_axes + h];
                out[(i + r) * stride + h] = sum;
            }
    }
}
