/* The lane kernel for both float types, compiled once for each instruction set and, other than
 * kernels.c, with -ffp-contract=fast: scores may be rounded in any way that the bound covers. */
#include "lanes.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

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

#define GLUE_(a, b) a##_##b
#define GLUE(a, b) GLUE_(a, b)

#define REAL float
#define INT int32_t
#define SUFFIX f32
#define UNIT (FLT_EPSILON / 2)
#define UNDERFLOW 0x1p-100 /* more than d products below the smallest normal number can add up to */
#define OVERFLOW 0x1p60    /* rows longer than this are left to the next stage */
#include "lanes.inc"
#undef REAL
#undef INT
#undef SUFFIX
#undef UNIT
#undef UNDERFLOW
#undef OVERFLOW

#define REAL double
#define INT int64_t
#define SUFFIX f64
#define UNIT (DBL_EPSILON / 2)
#define UNDERFLOW 0x1p-900
#define OVERFLOW 0x1p500
#include "lanes.inc"
