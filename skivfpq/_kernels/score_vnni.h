/* score_block for AVX-512 VNNI: exact in 32 bits, 16 columns. One unit of a block is one register, one
 * instruction multiplies it with a unit of a column. With EMULATE_VNNI the primitives are plain
 * C, for tests on machines without VNNI; all else is the same. */
#define COLUMNS 16
#define LARGEST_COLUMN 127
#define WRAPS 0
#define UNITS_MULTIPLE 1
#define PANEL_OFFSET(c, j) ((j) / 4 * COLUMNS * 4 + (c) * 4 + (j) % 4)

#ifdef EMULATE_VNNI

typedef const uint8_t *row_unit;
#define LOAD_UNIT(unit) (unit)

static inline void dot4(lanes16 *sums, row_unit rows, const int8_t *column) {
    for (int r = 0; r < BLOCK; r++)
        (*sums)[r] += (uint32_t)(rows[r * 4] * column[0] + rows[r * 4 + 1] * column[1] + rows[r * 4 + 2] * column[2] +
                                 rows[r * 4 + 3] * column[3]);
}
#define DOT4(sums, rows, column) dot4(&(sums), rows, column)

typedef const int8_t *panel_unit;
#define LOAD_PANEL(unit) (unit)

static inline void dot_row(lanes16 *sums, const uint8_t *row, panel_unit columns) {
    for (int c = 0; c < COLUMNS; c++)
        (*sums)[c] += (uint32_t)(row[0] * columns[c * 4] + row[1] * columns[c * 4 + 1] + row[2] * columns[c * 4 + 2] +
                                 row[3] * columns[c * 4 + 3]);
}
#define DOT_ROW(sums, row, columns) dot_row(&(sums), row, columns)

#else

typedef __m512i row_unit;
#define LOAD_UNIT(unit) _mm512_loadu_si512(unit)

/* sums[r] += <rows[r], column>. An asm statement, because GCC copies the sums around the intrinsic. */
#define DOT4(sums, rows, column)                                                                     \
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(rows), "m"(*(const int32_t *)(column)))

typedef __m512i panel_unit;
#define LOAD_PANEL(unit) _mm512_loadu_si512(unit)

/* sums[c] += <row, columns[c]>. The row is the unsigned operand, which cannot come from memory. */
#define DOT_ROW(sums, row, columns)                                                                  \
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(_mm512_set1_epi32(*(const loose_int *)(row))), "v"(columns))
typedef int32_t loose_int __attribute__((aligned(1), may_alias));

#endif

/* 16 sums and the rows are 17 of 32 registers. More would not be faster: VPDPBUSD takes 4 or 5 cycles
 * and one or two start in a cycle, so that ten sums fill the time; of 17 loads 16 are of columns. */
#define EACH_COLUMN(DO)                                                                              \
    DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15)
#define START(c)                                                                                     \
    lanes16 scores##c;                                                                               \
    if (c < columns) scores##c = (uint32_t)starts[c] - *(const lanes16 *)thresholds;
#define ACCUMULATE(c)                                                                                \
    if (c < columns) DOT4(scores##c, unit, panel + c * 4);
#define FINISH(i)                                                                                    \
    if (i < used) misses &= scores##i;
#define STORE(i)                                                                                     \
    if (i < used) *(lanes16 *)out[i] = scores##i, hits[i] = ~sign_bits(&scores##i) & 0xFFFF;

/* Writes the scores that are used, and their hits, and returns 1; or 0 where there are none: misses has the signs of lanes
 * that no score hits. */
#define RETURN_HITS(n_used)                                                                          \
    const int used = n_used;                                                                         \
    lanes16 misses = ~(lanes16){0};                                                                  \
    EACH_COLUMN(FINISH)                                                                              \
    if (sign_bits(&misses) == 0xFFFF) return 0;                                                      \
    EACH_COLUMN(STORE)                                                                               \
    return 1;

/* Compiled for panels with 4, 8, 12 and 16 columns in use. */
static inline __attribute__((always_inline)) int score_columns(SCORE_BLOCK_ARGUMENTS) {
    int64_t block_size = 64 * units;
    (void)caps;
    EACH_COLUMN(START)
    for (int64_t u = 0; u < units; u++, rows += 64, panel += COLUMNS * 4) {
        row_unit unit = LOAD_UNIT(rows);
        __builtin_prefetch(rows + block_size); /* the next block */
        EACH_COLUMN(ACCUMULATE)
    }
    RETURN_HITS(columns)
}

/* A single column: four sums of every fourth unit each fill the time that one would wait. */
static int score_column(SCORE_BLOCK_ARGUMENTS) {
    int64_t block_size = 64 * units;
    lanes16 scores0 = (uint32_t)starts[0] - *(const lanes16 *)thresholds, scores1 = {0}, scores2 = {0}, scores3 = {0};
    int64_t u = 0;
    (void)caps, (void)columns;
#define ACCUMULATE_UNIT(i)                                                                           \
    {                                                                                                \
        row_unit unit = LOAD_UNIT(rows + i * 64);                                                    \
        __builtin_prefetch(rows + i * 64 + block_size);                                              \
        DOT4(scores##i, unit, panel + i * COLUMNS * 4);                                              \
    }
    for (; u + 4 <= units; u += 4, rows += 4 * 64, panel += 4 * COLUMNS * 4) {
        ACCUMULATE_UNIT(0) ACCUMULATE_UNIT(1) ACCUMULATE_UNIT(2) ACCUMULATE_UNIT(3)
    }
    for (; u < units; u++, rows += 64, panel += COLUMNS * 4) ACCUMULATE_UNIT(0)
    *(lanes16 *)out[0] = (scores0 + scores1) + (scores2 + scores3);
    hits[0] = ~sign_bits((const lanes16 *)out[0]) & 0xFFFF;
    return hits[0] != 0;
}

static int score_block(SCORE_BLOCK_ARGUMENTS) {
    if (columns == 1) return score_column(rows, panel, starts, units, columns, thresholds, caps, out, hits);
    if (columns > 12) return score_columns(rows, panel, starts, units, 16, thresholds, caps, out, hits);
    if (columns > 8) return score_columns(rows, panel, starts, units, 12, thresholds, caps, out, hits);
    if (columns > 4) return score_columns(rows, panel, starts, units, 8, thresholds, caps, out, hits);
    return score_columns(rows, panel, starts, units, 4, thresholds, caps, out, hits);
}

/* score_block of rows that stand one by one, and a whole panel: out[r][c], hits[r] = columns c with out[r][c] >= 0. Up to
 * three rows more than n_rows are read. */
#define SCORES_ROWS
#define SCORE_ROWS_ARGUMENTS                                                                         \
    const uint8_t *rows, const int8_t *panel, /* IN (n_rows, units, 4); feature j of column c at PANEL_OFFSET(c, j) */ \
        const int32_t *starts,                /* IN (COLUMNS,) */                                    \
        int64_t units, int n_rows, const int32_t *terms, /* IN (16,) */                              \
        int32_t (*out)[COLUMNS], uint16_t *hits          /* OUT (n_rows, COLUMNS), (n_rows,) */
#define START_ROW(r)                                                                                 \
    lanes16 scores##r;                                                                               \
    if (r < n_rows) scores##r = *(const lanes16 *)starts - (uint32_t)terms[r];
#define ACCUMULATE_ROW(r)                                                                            \
    if (r < n_rows) DOT_ROW(scores##r, fours[r / 4] + r % 4 * size + 4 * u, columns);

/* Compiled for 4, 8, 12 and 16 rows. */
static inline __attribute__((always_inline)) int score_some_rows(SCORE_ROWS_ARGUMENTS) {
    int64_t size = 4 * units;
    const uint8_t *fours[4] = {rows, rows + 4 * size, rows + 8 * size, rows + 12 * size}; /* constant: registers */
    EACH_COLUMN(START_ROW)
    for (int64_t u = 0; u < units; u++, panel += COLUMNS * 4) {
        panel_unit columns = LOAD_PANEL(panel);
        __builtin_prefetch(rows + BLOCK * size + u * 64); /* the next 16 rows */
        EACH_COLUMN(ACCUMULATE_ROW)
    }
    RETURN_HITS(n_rows)
}

static inline int score_rows(SCORE_ROWS_ARGUMENTS) {
    if (n_rows > 12) return score_some_rows(rows, panel, starts, units, 16, terms, out, hits);
    if (n_rows > 8) return score_some_rows(rows, panel, starts, units, 12, terms, out, hits);
    if (n_rows > 4) return score_some_rows(rows, panel, starts, units, 8, terms, out, hits);
    return score_some_rows(rows, panel, starts, units, 4, terms, out, hits);
}
