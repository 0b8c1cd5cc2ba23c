/* One table of kernels for each instruction set that was compiled; the CPU's flags pick one. */
#include "kernels.h"

#include <stddef.h>
#include <string.h>
#ifdef HAVE_amx
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define DECLARE(level) extern const skivfpq_kernels skivfpq_kernels_##level

typedef struct {
    const char *name;
    const skivfpq_kernels *table;
    int (*supported)(void);
    int is_emulated; /* in plain C, for tests: never picked unless it is named */
} variant;

#ifdef HAVE_v4
DECLARE(v4);
static int has_v4(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#endif
#ifdef HAVE_vnni
DECLARE(vnni);
static int has_vnni(void) { return has_v4() && __builtin_cpu_supports("avx512vnni"); }
#endif
#ifdef HAVE_amx
DECLARE(amx);

/* CPUID's AMX-TILE and AMX-INT8, by hand: GCC 12 has no names for them. */
static int cpu_has_amx(void) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx >> 24 & 1 && edx >> 25 & 1;
}

/* Whether the system keeps tiles across its switches, and lets this process use them: Linux wants to be asked,
 * once for all threads. It says no, for one, where a thread's signal stack is too small for the tiles. */
static int may_use_tiles(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned eax, ebx, ecx, edx;
    if (!(__get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx >> 27 & 1)) return 0; /* OSXSAVE: XGETBV runs */
    asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax >> 17 & 3) == 3 && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

static int has_amx(void) {
    static int known = -1; /* asked first at import */
    if (known < 0) known = has_vnni() && cpu_has_amx() && may_use_tiles();
    return known;
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
/* The emulated ones are compiled with the flags of v3 where there are any. */
#ifdef HAVE_v3
#define can_emulate has_v3
#else
#define can_emulate has_generic
#endif
#ifdef HAVE_vnni_portable
DECLARE(vnni_portable);
#endif
#ifdef HAVE_amx_portable
DECLARE(amx_portable);
#endif

static const variant VARIANTS[] = {
#ifdef HAVE_amx
    {"amx", &skivfpq_kernels_amx, has_amx, 0},
#endif
#ifdef HAVE_vnni
    {"vnni", &skivfpq_kernels_vnni, has_vnni, 0},
#endif
#ifdef HAVE_v4
    {"avx512", &skivfpq_kernels_v4, has_v4, 0},
#endif
#ifdef HAVE_v3
    {"avx2", &skivfpq_kernels_v3, has_v3, 0},
#endif
#ifdef HAVE_v2
    {"sse4", &skivfpq_kernels_v2, has_v2, 0},
#endif
#ifdef HAVE_generic
    {"generic", &skivfpq_kernels_generic, has_generic, 0},
#endif
#ifdef HAVE_vnni_portable
    {"vnni-portable", &skivfpq_kernels_vnni_portable, can_emulate, 1},
#endif
#ifdef HAVE_amx_portable
    {"amx-portable", &skivfpq_kernels_amx_portable, can_emulate, 1},
#endif
    {NULL, NULL, NULL, 0},
};

const skivfpq_kernels *skivfpq_pick(const char *name) {
    for (const variant *v = VARIANTS; v->name; v++)
        if (v->supported() && (name == NULL ? !v->is_emulated : strcmp(name, v->name) == 0)) return v->table;
    return NULL;
}

static const char *runnable(int i, int is_emulated) {
    for (const variant *v = VARIANTS; v->name; v++)
        if (v->is_emulated == is_emulated && v->supported() && i-- == 0) return v->name;
    return NULL;
}

const char *skivfpq_runnable(int i) { return runnable(i, 0); }

const char *skivfpq_emulated(int i) { return runnable(i, 1); }
