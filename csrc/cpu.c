#define _GNU_SOURCE
#include "cpu.h"

#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "fastattn.h"
#include "platform.h"

/* --- what the CPU can do, and prefers ------------------------------------------------------------- */

bool fa_cpu_has_baseline(void)
{
    return true;
}

#if defined(__x86_64__)
/* CPUID is read here because __builtin_cpu_supports answers 0 with some compilers' run-time libraries;
 * XGETBV, because the operating system must save the registers, too. */
static bool os_saves(unsigned long long state)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((low | (unsigned long long)high << 32) & state) == state;
}

bool fa_cpu_has_avx2(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_FMA) || !(c & bit_F16C))
        return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2) && os_saves(0x06);
}

bool fa_cpu_has_avx512(void)
{
    unsigned a, b, c, d;
    const unsigned needed = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return fa_cpu_has_avx2() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & needed) == needed &&
           os_saves(0xe6);
}

bool fa_cpu_has_avx512bf16(void)
{
    unsigned a, b, c, d;
    return fa_cpu_has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
}

/* Linux gives a process the tile registers only when it asks. */
static bool may_use_tiles(void)
{
#if defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* of asm/prctl.h, in recent kernels */
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

bool fa_cpu_has_amx(void)
{
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    unsigned a, b, c, d;
    return fa_cpu_has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) &&
           (d & AMX_TILE) && os_saves(0x600e6) && may_use_tiles();
}

#elif defined(__aarch64__)
/* Part of the architecture, and of what every operating system's binary interface takes for granted. */
bool fa_cpu_has_neon(void)
{
    return true;
}

/* Asked of the operating system: programs may not read the registers that tell. */
bool fa_cpu_has_neonbf16(void)
{
#if defined(__linux__)
    enum { HAS_BF16 = 1 << 14 }; /* HWCAP2_BF16 of asm/hwcap.h, in recent kernels' headers */
    return (getauxval(AT_HWCAP2) & HAS_BF16) != 0;
#elif defined(__APPLE__)
    int has_bf16 = 0;
    size_t size = sizeof has_bf16;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has_bf16, &size, NULL, 0) == 0 && has_bf16;
#else
    return false;
#endif
}
#endif

#if defined(__x86_64__)
static bool is_zen5(unsigned vendor)
{
    unsigned a, b, c, d;
    if (vendor != signature_AMD_ebx || !__get_cpuid(1, &a, &b, &c, &d))
        return false;
    const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff); /* base and, from 15 on, extended */
    return family == 26;
}
#endif

/* What was measured on Zen 4 serves every CPU of x86-64 that is not named here. On aarch64 nothing was
 * measured: its few prefetches at once leave fill buffers on every CPU, and rows that a CPU sees coming are
 * left to it. */
static const fa_prefetching *prefetching_of_cpu(void)
{
#if defined(__aarch64__)
    static const fa_prefetching unmeasured = {.burst = 10};
    return &unmeasured;
#else
    static const fa_prefetching zen4 = {.burst = 24};
#if defined(__x86_64__)
    static const fa_prefetching zen5 = {.to_l1 = true, .single_rows = true, .burst = 24},
                                intel = {.single_rows = true, .burst = 10};
    unsigned a, vendor, c, d;
    if (__get_cpuid(0, &a, &vendor, &c, &d)) {
        if (is_zen5(vendor))
            return &zen5;
        if (vendor == signature_INTEL_ebx)
            return &intel;
    }
#endif
    return &zen4;
#endif
}

const fa_prefetching *fa_prefetching_of_cpu(void)
{
    static _Atomic(const fa_prefetching *) answer; /* CPUID is slow where a hypervisor answers it */
    const fa_prefetching *known = atomic_load_explicit(&answer, memory_order_relaxed);
    if (!known) {
        known = prefetching_of_cpu();
        atomic_store_explicit(&answer, known, memory_order_relaxed);
    }
    return known;
}

/* --- the quota of control groups ------------------------------------------------------------------ */

#ifdef __linux__

typedef struct {
    const char *root;        /* where "/" is */
    char group_v1[PATH_MAX]; /* of the process, from the root of the hierarchy; "": none */
    char group_v2[PATH_MAX];
    int cpus; /* the smallest limit so far; 0: none */
} quota;

static FILE *open_below(const char *directory, const char *name)
{
    char path[PATH_MAX];
    int length = snprintf(path, sizeof path, "%s/%s", directory, name);
    return length < (int)sizeof path ? fopen(path, "re") : NULL;
}

static void limit_to(quota *q, int64_t time, int64_t period)
{
    if (time <= 0 || period <= 0)
        return;
    int64_t cpus = (time - 1) / period + 1;
    if (cpus < (q->cpus > 0 ? q->cpus : INT_MAX))
        q->cpus = (int)cpus;
}

static int64_t read_number(const char *directory, const char *name)
{
    FILE *file = open_below(directory, name);
    long long number;
    if (!file)
        return 0;
    if (fscanf(file, "%lld", &number) != 1)
        number = 0;
    fclose(file);
    return number;
}

static void read_limit_v1(quota *q, const char *directory)
{
    limit_to(q, read_number(directory, "cpu.cfs_quota_us"), read_number(directory, "cpu.cfs_period_us"));
}

static void read_limit_v2(quota *q, const char *directory)
{
    FILE *file = open_below(directory, "cpu.max");
    long long time, period;
    if (!file)
        return;
    if (fscanf(file, "%lld %lld", &time, &period) == 2) /* not of "max 100000": no limit */
        limit_to(q, time, period);
    fclose(file);
}

static bool list_has(const char *list, const char *word)
{
    const size_t length = strlen(word);
    for (const char *at = list; (at = strstr(at, word)); at += length)
        if ((at == list || at[-1] == ',') && (at[length] == ',' || at[length] == '\0'))
            return true;
    return false;
}

/* A group's path from the root of a mount; "", the mount itself, for a group that is not below it. */
static const char *path_within(const char *group, const char *mounted)
{
    const size_t length = strcmp(mounted, "/") == 0 ? 0 : strlen(mounted);
    const bool within =
        strncmp(group, mounted, length) == 0 && (group[length] == '/' || group[length] == '\0');
    return within && !strstr(group, "/..") ? group + length : "";
}

/* Looks at a group and at all above it, up to the root of its mount. */
static void read_limits(quota *q, const char *mounted, const char *mount_point, const char *group,
                        void (*read_limit)(quota *q, const char *directory))
{
    char directory[PATH_MAX];
    int mount_length = snprintf(directory, sizeof directory, "%s%s", q->root, mount_point);
    if (!*group || mount_length >= (int)sizeof directory)
        return;
    int length = mount_length + snprintf(directory + mount_length, sizeof directory - (size_t)mount_length,
                                         "%s", path_within(group, mounted));
    if (length >= (int)sizeof directory)
        return;
    read_limit(q, directory);
    while (length > mount_length) {
        if (directory[--length] != '/')
            continue;
        directory[length] = '\0';
        read_limit(q, directory);
    }
}

static bool is_octal(char c)
{
    return c >= '0' && c <= '7';
}

/* mountinfo writes blanks and backslashes as three octal digits. */
static void unescape(char *text)
{
    char *to = text;
    for (const char *from = text; *from; to++) {
        if (from[0] == '\\' && is_octal(from[1]) && is_octal(from[2]) && is_octal(from[3])) {
            *to = (char)((from[1] - '0') << 6 | (from[2] - '0') << 3 | (from[3] - '0'));
            from += 4;
        } else {
            *to = *from++;
        }
    }
    *to = '\0';
}

/* A line is "id parent major:minor root mount_point options [tags...] - type source options". */
static void read_mount(char *line, void *argument)
{
    quota *q = argument;
    char mounted[PATH_MAX], mount_point[PATH_MAX], type[32], options[PATH_MAX];
    const char *rest = strstr(line, " - ");
    _Static_assert(PATH_MAX >= 4096, "the widths below");
    if (!rest || sscanf(line, "%*s %*s %*s %4095s %4095s", mounted, mount_point) != 2 ||
        sscanf(rest, " - %31s %*s %4095s", type, options) != 2)
        return;
    unescape(mounted);
    unescape(mount_point);
    if (strcmp(type, "cgroup2") == 0)
        read_limits(q, mounted, mount_point, q->group_v2, read_limit_v2);
    else if (strcmp(type, "cgroup") == 0 && list_has(options, "cpu"))
        read_limits(q, mounted, mount_point, q->group_v1, read_limit_v1);
}

/* A line is "id:controllers:path"; version 2 has no controllers there. */
static void read_membership(char *line, void *argument)
{
    quota *q = argument;
    char *controllers = strchr(line, ':');
    char *path = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!path)
        return;
    *path++ = '\0';
    if (controllers[1] == '\0')
        snprintf(q->group_v2, sizeof q->group_v2, "%s", path);
    else if (list_has(controllers + 1, "cpu"))
        snprintf(q->group_v1, sizeof q->group_v1, "%s", path);
}

static void for_each_line(quota *q, const char *name, void (*read)(char *line, void *argument))
{
    FILE *file = open_below(q->root, name);
    char *line = NULL;
    size_t capacity = 0;
    if (!file)
        return;
    for (ssize_t length; (length = getline(&line, &capacity, file)) > 0;) {
        if (line[length - 1] == '\n')
            line[length - 1] = '\0';
        read(line, q);
    }
    free(line);
    fclose(file);
}

int fa_quota_cpus(const char *root)
{
    quota q = {.root = root};
    for_each_line(&q, "proc/self/cgroup", read_membership);
    for_each_line(&q, "proc/self/mountinfo", read_mount);
    return q.cpus;
}

#else

int fa_quota_cpus(const char *root)
{
    (void)root;
    return 0;
}

#endif

/* --- what this process may use --------------------------------------------------------------------- */

/* The files are read once: that takes longer than a small call. Threads that find it unread at the same time
 * all read it: a lock would be one more that a fork may leave locked. */
static int quota_of_process(void)
{
    static atomic_int known = -1;
    int cpus = atomic_load(&known);
    if (cpus < 0) {
        cpus = fa_quota_cpus("");
        atomic_store(&known, cpus);
    }
    return cpus;
}

int fa_available_cpus(void)
{
    const int cpus = fa_affinity_cpus(), granted = quota_of_process();
    return granted > 0 && granted < cpus ? granted : cpus;
}

/* How long a thread relies on the CPUs it has read. To read them in each call would slow small calls; never
 * to read them again would miss a change of affinity. */
#define AFFINITY_NANOSECONDS 100000000

static atomic_int assumed_cpus;

int fa_runnable_threads(int num_threads)
{
    static _Thread_local struct {
        int cpus;
        int64_t until;
    } known;
    if (num_threads <= 1)
        return num_threads;
    int cpus = atomic_load_explicit(&assumed_cpus, memory_order_relaxed);
    if (cpus == 0) {
        int64_t now = fa_nanoseconds();
        if (now >= known.until) {
            known.cpus = fa_available_cpus();
            known.until = now + AFFINITY_NANOSECONDS;
        }
        cpus = known.cpus;
    }
    return num_threads < cpus ? num_threads : cpus;
}

void fa_assume_cpus(int cpus)
{
    atomic_store(&assumed_cpus, cpus);
}
