/* score_block for AMX: exact in 32 bits, 64 columns as four tiles of 16, whose sums are independent: a
 * TDPBSUD takes 52 cycles, and one starts every 16.
 *
 * A tile is 16 lines of 64 bytes. One of rows is 16 units of a block, (16 units, 16 rows, 4), one of
 * columns (16 columns, 64 features), one of sums (16 columns, 16 rows) int32. With EMULATE_AMX the tiles
 * and the five primitives are plain C, for tests on machines without AMX; all else is the same. */
#define COLUMNS 64
#define LARGEST_COLUMN 127
#define WRAPS 0
#define UNITS_MULTIPLE 16
#define PANEL_OFFSET(c, j) ((j) / 64 * COLUMNS * 64 + (c) * 64 + (j) % 64)

#define TILE_LINES 16
#define TILE_BYTES (TILE_LINES * 64)

typedef struct {
    uint8_t bytes[TILE_BYTES];
} __attribute__((may_alias)) tile;

/* The operand of LDTILECFG. */
typedef struct {
    uint8_t palette, start_line, reserved[14];
    uint16_t line_bytes[16];
    uint8_t lines[16];
} tile_configuration;

#ifdef EMULATE_AMX

#include <string.h>

static _Thread_local tile tiles[8];
static _Thread_local tile_configuration configured;

/* The tile, where it has been configured; a fault where not, as in hardware. */
static inline tile *tile_of(int t) {
    if (configured.palette != 1 || configured.line_bytes[t] != 64 || configured.lines[t] != TILE_LINES)
        __builtin_trap();
    return tiles + t;
}

static inline void configure_tiles(const tile_configuration *configuration) { configured = *configuration; }
static inline void release_tiles(void) { memset(&configured, 0, sizeof configured); }
#define TILE_ZERO(t) memset(tile_of(t), 0, TILE_BYTES)
#define TILE_LOAD(t, memory) memcpy(tile_of(t), memory, TILE_BYTES)
#define TILE_STORE(t, memory) memcpy(memory, tile_of(t), TILE_BYTES)

static inline void tile_multiply(tile *sums, const tile *columns, const tile *rows) {
    uint32_t products[TILE_LINES][BLOCK];
    memcpy(products, sums, TILE_BYTES);
    for (int c = 0; c < TILE_LINES; c++)
        for (int u = 0; u < TILE_LINES; u++) {
            const int8_t *column = (const int8_t *)columns->bytes + c * 64 + u * 4;
            const uint8_t *unit = rows->bytes + u * 64;
            for (int r = 0; r < BLOCK; r++)
                products[c][r] += (uint32_t)(unit[r * 4] * column[0] + unit[r * 4 + 1] * column[1] +
                                             unit[r * 4 + 2] * column[2] + unit[r * 4 + 3] * column[3]);
        }
    memcpy(sums, products, TILE_BYTES);
}
#define TILE_MULTIPLY(sums, columns, rows) tile_multiply(tile_of(sums), tile_of(columns), tile_of(rows))

#else

/* asm statements, because GCC 12 is not told what memory its intrinsics read. */
static inline void configure_tiles(const tile_configuration *configuration) {
    asm volatile("ldtilecfg %0" : : "m"(*configuration));
}
static inline void release_tiles(void) { asm volatile("tilerelease"); }
#define TILE_ZERO(t) asm volatile("tilezero %%tmm" #t : :)
#define TILE_LOAD(t, memory)                                                                         \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(memory), "r"((int64_t)64), "m"(*(const tile *)(memory)))
#define TILE_STORE(t, memory)                                                                        \
    asm volatile("tilestored %%tmm" #t ", (%1,%2,1)" : "=m"(*(tile *)(memory)) : "r"(memory), "r"((int64_t)64))
/* sums (16 columns, 16 rows) += columns (16 columns, 64 features), signed, times rows (16 units, 16 rows, 4). */
#define TILE_MULTIPLY(sums, columns, rows)                                                           \
    asm volatile("tdpbsud %%tmm" #rows ", %%tmm" #columns ", %%tmm" #sums : :)

#endif

static inline void begin_scan(void) {
    tile_configuration configuration = {.palette = 1};
    for (int t = 0; t < 8; t++) configuration.line_bytes[t] = 64, configuration.lines[t] = TILE_LINES;
    configure_tiles(&configuration);
}

static inline void end_scan(void) { release_tiles(); }

/* Each tile of sums, the tile that its columns are loaded into, and the first of these columns; the
 * rows are in tile 7. */
#define EACH_TILE(DO) DO(0, 4, 0) DO(1, 5, 16) DO(2, 6, 32) DO(3, 4, 48)
#define START(sums, columns_tile, first)                                                             \
    if (first < columns) TILE_ZERO(sums);
#define ACCUMULATE(sums, columns_tile, first)                                                        \
    if (first < columns) {                                                                           \
        TILE_LOAD(columns_tile, panel + first * 64);                                                 \
        TILE_MULTIPLY(sums, columns_tile, 7);                                                        \
    }
#define STORE(sums, columns_tile, first)                                                             \
    if (first < columns) TILE_STORE(sums, out[first]);

/* out[c][r] = <q_r + 128, p_c>, for whole tiles of columns. */
static inline void multiply_block(const uint8_t *rows, const int8_t *panel, int64_t units, int columns,
                                  int32_t (*out)[BLOCK]) {
    int64_t block_size = 64 * units;
    EACH_TILE(START)
    for (int64_t u = 0; u < units; u += TILE_LINES, rows += TILE_BYTES, panel += COLUMNS * 64) {
        TILE_LOAD(7, rows);
        for (int line = 0; line < TILE_LINES; line++) /* the next block */
            __builtin_prefetch(rows + block_size + line * 64);
        EACH_TILE(ACCUMULATE)
    }
    EACH_TILE(STORE)
}

/* Scores of a column from its products, (16,) each. */
static inline void score(const int32_t *products, int32_t start, const int32_t *thresholds, lanes16 *scores) {
    *scores = *(const lanes16 *)products + (uint32_t)start - *(const lanes16 *)thresholds;
}

static int score_block(SCORE_BLOCK_ARGUMENTS) {
    (void)caps;
    multiply_block(rows, panel, units, columns, out);
    lanes16 scores, misses = ~(lanes16){0}; /* its signs: rows that no column hits */
    for (int c = 0; c < columns; c++) score(out[c], starts[c], thresholds, &scores), misses &= scores;
    if (sign_bits(&misses) == 0xFFFF) return 0;
    for (int c = 0; c < columns; c++) {
        score(out[c], starts[c], thresholds, &scores);
        *(lanes16 *)out[c] = scores, hits[c] = ~sign_bits(&scores) & 0xFFFF;
    }
    return 1;
}
