/* The machine's limits: its peak of multiply-adds, and its read bandwidth. */
#include <stdatomic.h>

#include "cpu.h"
#include "dispatch.h"
#include "platform.h"
#include "threads.h"

static double seconds(void)
{
    return 1e-9 * (double)fa_nanoseconds();
}

/* Long enough that the microseconds in which threads start do not count, short enough that the best of some
 * slices is not interrupted by other processes. */
#define SLICE_SECONDS 2e-3
#define NUM_SLICES 8

typedef struct {
    const fa_kernel *kernel;
    int64_t rounds;
    _Atomic int64_t flops;
} peak_job;

static void run_peak(void *argument, int thread_index)
{
    (void)thread_index;
    peak_job *job = argument;
    atomic_fetch_add(&job->flops, (int64_t)job->kernel->peak(job->rounds));
}

double fa_measure_peak(fa_dtype dtype, int num_threads)
{
    peak_job job = {.kernel = fa_kernel_for_dtype(dtype), .rounds = 1000};
    for (double start = seconds(); seconds() - start < SLICE_SECONDS;)
        job.kernel->peak(job.rounds); /* the CPU leaves its low-power states */
    double elapsed = 0;
    while (elapsed < SLICE_SECONDS) {
        double start = seconds();
        job.kernel->peak(job.rounds);
        elapsed = seconds() - start;
        if (elapsed < SLICE_SECONDS)
            job.rounds *= 2;
    }
    num_threads = fa_runnable_threads(num_threads);
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
    const fa_kernel *kernel;
    const char *data;
    size_t bytes, share; /* of all threads; of each */
    bool prefetches;
    _Atomic size_t read;
    _Atomic uint64_t sum;
} read_job;

/* The first passes fill the caches. Every other pass prefetches: some CPUs alone have too few lines under
 * way, and others are slowed by prefetches. */
#define READ_PASSES 16

static void run_read(void *argument, int thread_index)
{
    read_job *job = argument;
    const size_t begin = (size_t)thread_index * job->share;
    if (begin >= job->bytes)
        return;
    const size_t bytes = job->bytes - begin < job->share ? job->bytes - begin : job->share;
    atomic_fetch_add(&job->sum, job->kernel->read(job->data + begin, bytes, job->prefetches));
    atomic_fetch_add(&job->read, bytes);
}

double fa_measure_bandwidth(const void *data, size_t bytes, int num_threads)
{
    num_threads = fa_runnable_threads(num_threads);
    const size_t threads = num_threads > 1 ? (size_t)num_threads : 1;
    double best = 0;
    for (int pass = 0; pass < READ_PASSES; pass++) {
        read_job job = {.kernel = fa_kernel_for_dtype(FA_FLOAT32), .data = data, .bytes = bytes};
        job.share = (bytes / threads + 64) / 64 * 64;
        job.prefetches = pass % 2 == 1;
        double start = seconds();
        fa_parallel(num_threads, run_read, NULL, &job);
        double rate = (double)job.read / (seconds() - start);
        if (rate > best)
            best = rate;
    }
    return best;
}
