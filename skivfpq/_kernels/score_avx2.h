/* score_block for AVX2, modulo 2^16: 6 columns. */
#define COLUMNS 6
#define LARGEST_COLUMN 64 /* 2 * 255 * 64 fits 16 bits: vpmaddubsw never saturates */
#define WRAPS 1
#define UNITS_MULTIPLE 1
#define PANEL_OFFSET(c, j) ((j) / 4 * COLUMNS * 4 + (c) * 4 + (j) % 4)

/* Adds the two halves of each row's sum, modulo 2^16. */
static inline __m256i score(__m256i sums, __m256i threshold) {
    __m256i both = _mm256_add_epi16(sums, _mm256_srli_epi32(sums, 16));
    return _mm256_and_si256(_mm256_sub_epi16(both, threshold), _mm256_set1_epi32(0xFFFF));
}

/* Twelve accumulators, two row vectors and two products are the sixteen registers. In one asm
 * statement, because GCC otherwise moves accumulators to memory and back. */
#define EACH_COLUMN(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define ACCUMULATE(c)                                                                                \
    if (c < columns)                                                                                 \
        asm("vpbroadcastd %6, %1\n\tvpmaddubsw %1, %4, %0\n\tvpmaddubsw %1, %5, %1\n\t"              \
            "vpaddw %0, %2, %2\n\tvpaddw %1, %3, %3"                                                 \
        : "=&x"(product0), "=&x"(product1), "+x"(low##c), "+x"(high##c)                              \
        : "x"(row0), "x"(row1), "m"(*(const int32_t *)(panel + c * 4)));
#define START(c) __m256i low##c = _mm256_set1_epi32((uint16_t)starts[c]), high##c = low##c;
#define FINISH(c)                                                                                    \
    if (c < columns) {                                                                               \
    low##c = score(low##c, threshold0), high##c = score(high##c, threshold1);                        \
    all_miss = _mm256_and_si256(all_miss, _mm256_and_si256(_mm256_cmpgt_epi32(low##c, cap0),         \
                                                           _mm256_cmpgt_epi32(high##c, cap1)));      \
    }
#define STORE(c)                                                                                     \
    if (c < columns) {                                                                               \
    hits[c] = ~(sign_bits8(_mm256_cmpgt_epi32(low##c, cap0)) |                                       \
                sign_bits8(_mm256_cmpgt_epi32(high##c, cap1)) << 8) & 0xFFFF;                        \
    _mm256_store_si256((__m256i *)out[c], low##c), _mm256_store_si256((__m256i *)(out[c] + 8), high##c); \
    }

/* Compiled for panels with 2, 4 and 6 columns in use. */
static inline __attribute__((always_inline)) int score_columns(SCORE_BLOCK_ARGUMENTS) {
    int64_t block_size = 64 * units;
    EACH_COLUMN(START)
    for (int64_t u = 0; u < units; u++, rows += 64, panel += 4 * COLUMNS) {
        __m256i row0 = _mm256_loadu_si256((const __m256i *)rows), product0, product1;
        __m256i row1 = _mm256_loadu_si256((const __m256i *)(rows + 32));
        __builtin_prefetch(rows + block_size); /* the next block */
        EACH_COLUMN(ACCUMULATE)
    }
    const __m256i *thresholds_ = (const __m256i *)thresholds, *caps_ = (const __m256i *)caps;
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
