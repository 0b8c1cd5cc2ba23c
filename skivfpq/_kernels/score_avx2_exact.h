/* score_block for AVX2, exact in 32 bits: 4 columns of int16, whose products are as fast as those of int8 that must not
 * saturate. Features 0 and 2 of a unit are two int16 of a row's lane, 1 and 3 two others: columns have that order. */
#define COLUMNS 4
#define UNITS_MULTIPLE 1
#define PANEL_OFFSET(c, j) ((j) / 4 * COLUMNS * 4 + (c) * 4 + UNIT_PLACE((j) % 4))

/* Eight accumulators, four row vectors, their mask and two products are fifteen registers. In one asm statement,
 * because GCC otherwise moves accumulators to memory and back. */
#define EACH_COLUMN(DO) DO(0) DO(1) DO(2) DO(3)
#define TWO_PRODUCTS(features, rows0, rows1)                                                         \
    "vpbroadcastd " features ", %1\n\tvpmaddwd %1, " rows0 ", %0\n\tvpmaddwd %1, " rows1 ", %1\n\t"  \
    "vpaddd %0, %2, %2\n\tvpaddd %1, %3, %3\n\t"
#define ACCUMULATE(c)                                                                                \
    if (c < columns)                                                                                 \
        asm(TWO_PRODUCTS("%8", "%4", "%5") TWO_PRODUCTS("%9", "%6", "%7")                            \
            : "=&x"(product0), "=&x"(product1), "+x"(low##c), "+x"(high##c)                          \
            : "x"(even0), "x"(even1), "x"(odd0), "x"(odd1), "m"(*(const int32_t *)(panel + c * 4)),  \
              "m"(*(const int32_t *)(panel + c * 4 + 2)));
#define START(c)                                                                                     \
    __m256i low##c = _mm256_setzero_si256(), high##c = low##c;                                       \
    if (c < columns) {                                                                               \
        __m256i start = _mm256_set1_epi32(starts[c]);                                                \
        low##c = _mm256_sub_epi32(start, threshold0), high##c = _mm256_sub_epi32(start, threshold1); \
    }
#define FINISH(c)                                                                                    \
    if (c < columns) misses = _mm256_and_si256(misses, _mm256_and_si256(low##c, high##c));
#define STORE(c)                                                                                     \
    if (c < columns) {                                                                               \
        hits[c] = ~(sign_bits8(low##c) | sign_bits8(high##c) << 8) & 0xFFFF;                         \
        _mm256_store_si256((__m256i *)out[c], low##c), _mm256_store_si256((__m256i *)(out[c] + 8), high##c); \
    }

/* Compiled for panels with 1, 2 and 4 columns in use. */
static inline __attribute__((always_inline)) int score_columns(SCORE_BLOCK_ARGUMENTS) {
    const __m256i_u *thresholds_ = (const __m256i_u *)thresholds;
    __m256i threshold0 = thresholds_[0], threshold1 = thresholds_[1], low_bytes = _mm256_set1_epi16(255);
    int64_t block_size = 64 * units;
    (void)caps;
    EACH_COLUMN(START)
    for (int64_t u = 0; u < units; u++, rows += 64, panel += 4 * COLUMNS) {
        __m256i row0 = _mm256_loadu_si256((const __m256i *)rows), product0, product1;
        __m256i row1 = _mm256_loadu_si256((const __m256i *)(rows + 32));
        __m256i even0 = _mm256_and_si256(row0, low_bytes), odd0 = _mm256_srli_epi16(row0, 8);
        __m256i even1 = _mm256_and_si256(row1, low_bytes), odd1 = _mm256_srli_epi16(row1, 8);
        __builtin_prefetch(rows + block_size); /* the next block */
        EACH_COLUMN(ACCUMULATE)
    }
    __m256i misses = _mm256_set1_epi32(-1); /* its signs: rows that no column hits */
    EACH_COLUMN(FINISH)
    if (sign_bits8(misses) == 0xFF) return 0;
    EACH_COLUMN(STORE)
    return 1;
}

static int score_block(SCORE_BLOCK_ARGUMENTS) {
    if (columns > 2) return score_columns(rows, panel, starts, units, 4, thresholds, caps, out, hits);
    if (columns > 1) return score_columns(rows, panel, starts, units, 2, thresholds, caps, out, hits);
    return score_columns(rows, panel, starts, units, 1, thresholds, caps, out, hits);
}
