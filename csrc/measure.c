/* The machine's own limits, against which speed is told. */
#include <stdatomic.h>

#include "dispatch.h"
#include "threads.h"

static double seconds(void)
{
    return 1e-9 * (double)fa_nanoseconds();
}

/* Long enough that the start of a region (microseconds) does not count, short enough that the best of
 * some slices falls between two interruptions by others. */
#define SLICE_SECONDS 2e-3
#define NUM_SLICES 8

typedef struct {
    const fa_kernel *kernel;
    int64_t rounds;
    _Atomic int64_t flops;
} peak_job;

static void run_peak(void *argument, int member)
{
    (void)member;
    peak_job *job = argument;
    atomic_fetch_add(&job->flops, (int64_t)job->kernel->peak(job->rounds));
}

double fa_measure_peak(fa_dtype dtype, int num_threads)
{
    peak_job job = {.kernel = fa_kernel_for_dtype(dtype), .rounds = 1000};
    for (double start = seconds(); seconds() - start < SLICE_SECONDS;)
        job.kernel->peak(job.rounds); /* out of any low-power state */
    double elapsed = 0;
    while (elapsed < SLICE_SECONDS) {
        double start = seconds();
        job.kernel->peak(job.rounds);
        elapsed = seconds() - start;
        if (elapsed < SLICE_SECONDS)
            job.rounds *= 2;
    }
    double best = 0;
    for (int slice = 0; slice < NUM_SLICES; slice++) {
        job.flops = 0;
        double start = seconds();
        fa_parallel(num_threads, run_peak, NULL, &job);
        double rate = (double)job.flops / (seconds() - start);
        if (rate > best)
            best = rate;
    }
    return best;
}

typedef struct {
    const char *data;
    size_t bytes;
    _Atomic size_t next;
    _Atomic uint64_t sum;
} read_job;

#define READ_CHUNK ((size_t)1 << 18)

/* Some CPUs wait for few lines at a time unless they are asked for this far ahead. */
#define READ_AHEAD 8192

/* The first passes bring what a cache can hold. */
#define READ_PASSES 8

static void run_read(void *argument, int member)
{
    (void)member;
    typedef uint64_t wide __attribute__((vector_size(64), aligned(1), may_alias));
    read_job *job = argument;
    for (;;) {
        size_t begin = atomic_fetch_add(&job->next, READ_CHUNK);
        if (begin >= job->bytes)
            return;
        size_t bytes = job->bytes - begin < READ_CHUNK ? job->bytes - begin : READ_CHUNK;
        wide sum[4] = {0};
        for (size_t i = 0; i + sizeof sum <= bytes; i += sizeof sum) {
            for (size_t j = 0; j < 4; j++) {
                const char *data = job->data + begin + i + j * sizeof(wide);
                __builtin_prefetch(data + READ_AHEAD, 0, 2);
                sum[j] += *(const wide *)data;
            }
        }
        sum[0] += sum[1] + sum[2] + sum[3];
        atomic_fetch_add(&job->sum, sum[0][0] + sum[0][7]);
    }
}

double fa_measure_bandwidth(const void *data, size_t bytes, int num_threads)
{
    double best = 0;
    for (int pass = 0; pass < READ_PASSES; pass++) {
        read_job job = {.data = data, .bytes = bytes};
        double start = seconds();
        fa_parallel(num_threads, run_read, NULL, &job);
        double rate = (double)bytes / (seconds() - start);
        if (rate > best)
            best = rate;
    }
    return best;
}
