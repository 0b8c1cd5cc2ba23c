/* The lane kernel for both float types, compiled once for each instruction set and, other than
 * kernels.c, with -ffp-contract=fast: scores may be rounded in any way that the bound covers. */
#include "lanes.h"
#include "interleave.h"

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

#define LINE 128 /* features of a row that are transposed together */
#define N_DOUBLES (VECTOR_BYTES / 8)

typedef double DOUBLES __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int64_t DOUBLE_MASK __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
typedef float FLOATS __attribute__((vector_size(VECTOR_BYTES / 2), aligned(4), may_alias));
typedef float SINGLES __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t SINGLE_MASK __attribute__((vector_size(VECTOR_BYTES), aligned(4)));

/* Whether float32 holds the origin and the scale, so that values of float32 are shifted with one rounding. */
static int rounds_nothing(const double *origin, double scale, int64_t width, /* IN */
                          float *origin32) {                                 /* OUT (width,) */
    int nothing = scale >= 0x1p-100 && scale <= 0x1p100;
    for (int64_t j = 0; j < width; j++) {
        origin32[j] = (float)origin[j];
        nothing &= (double)origin32[j] == origin[j];
    }
    return nothing;
}

/* FILL_LINE of lanes.inc for such; lengths are right to two roundings of float32, other sums are not rounded. */
static double fill_line_single(const float *x, const float *origin, float scale, int64_t width, double too_large, /* IN */
                               float *line) {                                                                    /* OUT */
    enum { WIDTH = 2 * N_DOUBLES };
    const float most = (float)too_large;
    DOUBLES low = {0}, high = {0};
    double sum = 0;
    int64_t j = 0;
    for (; j + WIDTH <= width; j += WIDTH) {
        SINGLES y = (*(const SINGLES *)(x + j) - *(const SINGLES *)(origin + j)) * scale;
        FLOATS halves[2];
        memcpy(halves, &y, sizeof halves);
        DOUBLES y0 = __builtin_convertvector(halves[0], DOUBLES), y1 = __builtin_convertvector(halves[1], DOUBLES);
        low += y0 * y0, high += y1 * y1;
        *(SINGLES *)(line + j) = (SINGLES)((SINGLE_MASK)-y & (y < most) & (y > -most));
    }
    for (; j < width; j++) {
        float y = (x[j] - origin[j]) * scale;
        sum += (double)y * y, line[j] = fabsf(y) < most ? -y : 0;
    }
    for (int i = 0; i < N_DOUBLES; i++) sum += low[i] + high[i];
    return sum;
}

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

/* Which lanes of a mask are set, a bit each. */
#if defined(__AVX512F__)
#define BITS(mask) ((uint64_t)_mm512_movepi32_mask((__m512i)(mask)))
#elif defined(__AVX2__)
#define BITS(mask) ((uint64_t)(unsigned)_mm256_movemask_ps((__m256)(mask)))
#elif defined(__SSE2__)
#define BITS(mask) ((uint64_t)(unsigned)_mm_movemask_ps((__m128)(mask)))
#else
static inline uint64_t BITS(mask_f32 mask) {
    uint64_t bits = 0;
    for (int lane = 0; lane < VECTOR_BYTES / 4; lane++) bits |= (uint64_t)(mask[lane] & 1) << lane;
    return bits;
}
#endif

#define POSITIVE(v) ((vector_f32)((mask_f32)(v) & ~((v) <= 0))) /* what is no number stays */

/* Candidates for k-means++: a row x may be closer to c than some distance u, in the scaled unit, if the
 * score |c|^2 / 2 - x.c is at most (u^2 - |x|^2) / 2. Rounding of the score is at most
 * SLACK(d) (|x|^2 + 3 |c|^2) / 2, by SCORE's bound and 2 |x| |c| <= |x|^2 + |c|^2: the row's part of it is
 * added to the LIMIT, the candidate's is taken off the score's start. */
#define SLACK(d) (((d) + 10) * (double)(FLT_EPSILON / 2) * 1.001) /* 2 are for lengths of rounded rows */

float LIMIT(double sq_distance, double length, int64_t d, double scale) {
    if (sq_distance == 0) return -INFINITY;
    double lost = d * 0x1p-1073 * scale * scale + 0x1p-100;
    double limit = sq_distance * scale * scale * (0.5 + 1e-9) + length * length * (SLACK(d) - 1) / 2 + lost;
    if (!(length < 0x1p60 && limit < 0x1p126)) return INFINITY;
    return (float)(limit + fabs(limit) * FLT_EPSILON);
}

void PACK_CANDIDATES(const double *candidates, int64_t k, int64_t d, const double *origin, double scale, float *panels,
                     float *starts) {
    pack_centers_f32(candidates, k, d, origin, scale, panels, starts);
    for (int64_t i = 0; i < k; i++) starts[i] = (float)(starts[i] * (1 - 3 * SLACK(d)));
}

/* Infinite scores are of candidates far beyond any finite limit. */
static inline __attribute__((always_inline)) void closer_rows(
    const float *tiles, int64_t n_tiles, int64_t d, const float *limits, const float *weights, const float *panel,
    const float *starts, int n_centers, int64_t stride, uint64_t *hits, double *gains) {
    enum { WIDTH = VECTOR_BYTES / 4, HEIGHT = TILE_VECTORS * WIDTH, FLUSHED = 16 };
    vector_f32 sums[TILE_CENTERS] = {{0}};
    for (int c = 0; c < TILE_CENTERS; c++) gains[c] = 0;
    for (int64_t t = 0; t < n_tiles; t++) {
        const loaded_f32 *limit = (const loaded_f32 *)(limits + t * HEIGHT);
        const loaded_f32 *weight = (const loaded_f32 *)(weights + t * HEIGHT);
        vector_f32 score[TILE_CENTERS][TILE_VECTORS];
        score_panel_f32(tiles + t * HEIGHT * d, d, panel, starts, n_centers, score);
        for (int c = 0; c < n_centers; c++) {
            uint64_t farther = 0;
            for (int v = 0; v < TILE_VECTORS; v++) {
                farther |= BITS(score[c][v] > limit[v]) << v * WIDTH;
                sums[c] += weight[v] * POSITIVE(limit[v] - score[c][v]);
            }
            hits[t * stride + c] = farther ^ (((uint64_t)1 << HEIGHT) - 1);
        }
        for (int c = n_centers; c < TILE_CENTERS; c++) hits[t * stride + c] = 0;
        if (t % FLUSHED < FLUSHED - 1 && t < n_tiles - 1) continue;
        for (int c = 0; c < n_centers; c++) {
            for (int lane = 0; lane < WIDTH; lane++) gains[c] += sums[c][lane];
            sums[c] = (vector_f32){0};
        }
    }
}

void CLOSER_ROWS(const float *tiles, int64_t n_tiles, int64_t d, const float *limits, const float *weights,
                 const float *panels, const float *starts, int64_t k, uint64_t *hits, double *gains) {
    int64_t stride = (k + TILE_CENTERS - 1) / TILE_CENTERS * TILE_CENTERS;
    for (int64_t c = 0; c < k; c += TILE_CENTERS)
        if (k - c > TILE_CENTERS / 2)
            closer_rows(tiles, n_tiles, d, limits, weights, panels + c * d, starts + c, TILE_CENTERS, stride, hits + c,
                        gains + c);
        else
            closer_rows(tiles, n_tiles, d, limits, weights, panels + c * d, starts + c, TILE_CENTERS / 2, stride,
                        hits + c, gains + c);
}

int PANEL_CENTERS(void) { return TILE_CENTERS; }

/* Rows on axes: so many rows by so many vectors of axes at a time, in registers. */
#if defined(__AVX512F__)
#define PROJECTED_ROWS 8
#else
#define PROJECTED_ROWS 4
#endif
#define AXIS_VECTORS 3

typedef float axes_f32 __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
enum { AXES = VECTOR_BYTES / 4 }; /* of a vector */

static inline __attribute__((always_inline)) void project_axes(
    const float *V, int64_t d, const float *axes, int64_t width, /* IN (PROJECTED_ROWS, d), (d, width) */
    int vectors, int n_rows, float *out) {                       /* vectors * AXES columns of (n_rows, width) OUT */
    vector_f32 sums[PROJECTED_ROWS][AXIS_VECTORS];
    for (int r = 0; r < PROJECTED_ROWS; r++)
        for (int v = 0; v < vectors; v++) sums[r][v] = (vector_f32){0};
    for (int64_t j = 0; j < d; j++)
        for (int v = 0; v < vectors; v++) {
            vector_f32 axis = (vector_f32)*(const axes_f32 *)(axes + j * width + v * AXES);
            for (int r = 0; r < PROJECTED_ROWS; r++) sums[r][v] += V[r * d + j] * axis;
        }
    for (int r = 0; r < n_rows; r++)
        for (int v = 0; v < vectors; v++) *(axes_f32 *)(out + r * width + v * AXES) = (axes_f32)sums[r][v];
}

static void project(const float *V, int64_t d, const float *axes, int64_t width, int n_rows, float *out) {
    int64_t h = 0;
    for (; h + AXIS_VECTORS * AXES <= width; h += AXIS_VECTORS * AXES)
        project_axes(V, d, axes + h, width, AXIS_VECTORS, n_rows, out + h);
    for (; h + AXES <= width; h += AXES) project_axes(V, d, axes + h, width, 1, n_rows, out + h);
    for (; h < width; h++)
        for (int r = 0; r < n_rows; r++) {
            float sum = 0;
            for (int64_t j = 0; j < d; j++) sum += V[r * d + j] * axes[j * width + h];
            out[r * width + h] = sum;
        }
}

void MULTIPLY(const float *V, int64_t n, int64_t d, const float *axes, int64_t width, float *out) {
    int64_t i = 0;
    for (; i + PROJECTED_ROWS <= n; i += PROJECTED_ROWS)
        project(V + i * d, d, axes, width, PROJECTED_ROWS, out + i * width);
    for (; i < n; i++) { /* rows that do not fill the registers */
        for (int64_t h = 0; h < width; h++) out[i * width + h] = 0;
        for (int64_t j = 0; j < d; j++)
            for (int64_t h = 0; h < width; h++) out[i * width + h] += V[i * d + j] * axes[j * width + h];
    }
}

/* Gram and Schmidt's, each row twice, for what rounding leaves the first time. */
typedef double doubles4 __attribute__((vector_size(32), aligned(8)));

static double dot(const double *a, const double *b, int64_t n) {
    doubles4 sums0 = {0}, sums1 = {0};
    double sum = 0;
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
        sums0 += *(const doubles4 *)(a + j) * *(const doubles4 *)(b + j);
        sums1 += *(const doubles4 *)(a + j + 4) * *(const doubles4 *)(b + j + 4);
    }
    for (; j < n; j++) sum += a[j] * b[j];
    for (int l = 0; l < 4; l++) sum += sums0[l] + sums1[l];
    return sum;
}

void ORTHONORMALIZE(double *Q, int64_t m, int64_t d) {
    for (int64_t i = 0; i < m; i++) {
        double *q = Q + i * d, before = sqrt(dot(q, q, d));
        for (int twice = 0; twice < 2; twice++)
            for (int64_t k = 0; k < i; k++) {
                const double *other = Q + k * d;
                double share = dot(q, other, d);
                for (int64_t j = 0; j < d; j++) q[j] -= share * other[j];
            }
        double length = sqrt(dot(q, q, d)), inverse = length > 1e-8 * before ? 1 / length : 0;
        for (int64_t j = 0; j < d; j++) q[j] *= inverse;
    }
}
