/* The CPU: what it can do, what it prefers, and how much of it this process may use. */
#ifndef FA_CPU_H
#define FA_CPU_H

#include <stdbool.h>

/* Whether the CPU has an instruction set, and the operating system saves its registers. */
bool fa_cpu_has_baseline(void);
#if defined(__x86_64__)
bool fa_cpu_has_avx2(void);       /* with FMA and F16C */
bool fa_cpu_has_avx512(void);     /* F, BW, DQ, VL */
bool fa_cpu_has_avx512bf16(void); /* with those of avx512 */
bool fa_cpu_has_amx(void);        /* AMX-TILE and AMX-BF16, with those of avx512bf16 */
#elif defined(__aarch64__)
bool fa_cpu_has_neon(void);
bool fa_cpu_has_neonbf16(void); /* BF16: BFDOT and BFCVT */
#endif

/* How this CPU likes lines to be prefetched. */
typedef struct {
    /* Rows of keys and values that a decode tile reads: into L1 rather than L2. So on Zen 5, where a line
     * that L2 has waits a second time for one of L1's fill buffers. Zen 4 reads a quarter to a half more for
     * four query rows by way of L2. */
    bool to_l1;
    /* Rows that serve a single query row, too. Zen 4 sees by itself where they come from, and is 8 %
     * (float32) to 24 % (bfloat16) faster without; Emerald Rapids, with keys from memory, 12 to 40 % faster
     * with. */
    bool single_rows;
    /* Lines at once in a product of a wide tile: so many that fill buffers of L1 remain for what the product
     * itself reads. Keys from memory take 12 % less time with 10 than with 24 on Emerald Rapids. */
    int burst;
} fa_prefetching;

const fa_prefetching *fa_prefetching_of_cpu(void);

/* CPUs' worth of time that the control groups of this process grant, rounded up: the minimum over all groups
 * from its own up to the root, of version 2 and version 1; 0 if none limits. Files are read below `root`,
 * which is
 * "" but for tests. */
int fa_quota_cpus(const char *root);

/* `num_threads`, or as many of them as can run at a time: more would wait for each other. */
int fa_runnable_threads(int num_threads);

/* For tests: takes `cpus` for the number of CPUs, so that many threads run on few; 0: the actual number. */
void fa_assume_cpus(int cpus);

#endif
