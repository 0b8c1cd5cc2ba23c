/* Blocks of 16 rows for score_block. */
#ifndef SKIVFPQ_INTERLEAVE_H
#define SKIVFPQ_INTERLEAVE_H

#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define BLOCK 16

/* Interleaves what 16 rows hold, units of 4 bytes, into places (units, stride), the first 16 of each; codes into a block
 * (units, 16, 4), with a stride of 16. */
static inline void interleave(const int32_t *const codes[BLOCK], int64_t units, int64_t stride, int32_t *block) {
    int64_t u = 0;
#ifdef __AVX2__ /* 8 units of 8 rows at a time, in registers */
    for (; u + 8 <= units; u += 8)
        for (int first = 0; first < BLOCK; first += 8) {
            __m256i a[8], b[8];
            for (int r = 0; r < 8; r++) a[r] = _mm256_loadu_si256((const __m256i *)(codes[first + r] + u));
            for (int r = 0; r < 8; r += 2)
                b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]), b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
            for (int r = 0; r < 8; r += 4)
                for (int h = 0; h < 2; h++) {
                    a[r + 2 * h] = _mm256_unpacklo_epi64(b[r + h], b[r + h + 2]);
                    a[r + 2 * h + 1] = _mm256_unpackhi_epi64(b[r + h], b[r + h + 2]);
                }
            for (int j = 0; j < 4; j++) { /* half h of a[4 i + j]: unit 4 h + j of the rows 4 i to 4 i + 3 */
                int32_t *low = block + (u + j) * stride + first, *high = low + 4 * stride;
                _mm256_storeu_si256((__m256i *)low, _mm256_permute2x128_si256(a[j], a[4 + j], 0x20));
                _mm256_storeu_si256((__m256i *)high, _mm256_permute2x128_si256(a[j], a[4 + j], 0x31));
            }
        }
#endif
    for (; u < units; u++)
        for (int r = 0; r < BLOCK; r++) memcpy(block + u * stride + r, codes[r] + u, sizeof *block); /* of any type */
}

#endif
