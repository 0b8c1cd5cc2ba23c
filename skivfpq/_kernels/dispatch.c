/* One table of kernels for each instruction set that was compiled; the CPU's flags pick one. */
#include "kernels.h"

#include <stddef.h>
#include <string.h>

#define DECLARE(level) extern const skivfpq_kernels skivfpq_kernels_##level

typedef struct {
    const char *name;
    const skivfpq_kernels *table;
    int (*supported)(void);
} variant;

#ifdef HAVE_v4
DECLARE(v4);
static int has_v4(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#endif
#ifdef HAVE_v3
DECLARE(v3);
static int has_v3(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
#endif
#ifdef HAVE_v2
DECLARE(v2);
static int has_v2(void) {
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
}
#endif
#ifdef HAVE_generic
DECLARE(generic);
static int has_generic(void) { return 1; }
#endif

static const variant VARIANTS[] = {
#ifdef HAVE_v4
    {"avx512", &skivfpq_kernels_v4, has_v4},
#endif
#ifdef HAVE_v3
    {"avx2", &skivfpq_kernels_v3, has_v3},
#endif
#ifdef HAVE_v2
    {"sse4", &skivfpq_kernels_v2, has_v2},
#endif
#ifdef HAVE_generic
    {"generic", &skivfpq_kernels_generic, has_generic},
#endif
    {NULL, NULL, NULL},
};

const skivfpq_kernels *skivfpq_pick(const char *name) {
    for (const variant *v = VARIANTS; v->name; v++)
        if (v->supported() && (name == NULL || strcmp(name, v->name) == 0)) return v->table;
    return NULL;
}

const char *skivfpq_runnable(int i) {
    for (const variant *v = VARIANTS; v->name; v++)
        if (v->supported() && i-- == 0) return v->name;
    return NULL;
}
