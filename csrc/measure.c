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
    double (*run)(int64_t rounds);
    int64_t rounds;
    _Atomic int64_t done;
} rounds_job;

static void run_rounds(void *argument, int thread_index)
{
    (void)thread_index;
    rounds_job *job = argument;
    atomic_fetch_add(&job->done, (int64_t)job->run(job->rounds));
}

/* What `run` does in a second. */
static double measure_rounds(double (*run)(int64_t rounds), int num_threads)
{
    rounds_job job = {.run = run, .rounds = 1000};
    for (double start = seconds(); seconds() - start < SLICE_SECONDS;)
        run(job.rounds); /* the CPU leaves its low-power states */
    double elapsed = 0;
    while (elapsed < SLICE_SECONDS) {
        double start = seconds();
        run(job.rounds);
        elapsed = seconds() - start;
        if (elapsed < SLICE_SECONDS)
            job.rounds *= 2;
    }
    num_threads = fa_runnable_threads(num_threads);
    double best = 0;
    for (int slice = 0; slice < NUM_SLICES; slice++) {
        job.done = 0;
        double start = seconds();
        fa_parallel(num_threads, run_rounds, NULL, &job);
        double rate = (double)job.done / (seconds() - start);
        if (rate > best)
            best = rate;
    }
    return best;
}

double fa_measure_peak(fa_dtype dtype, int num_threads)
{
    return measure_rounds(fa_kernel_for_dtype(dtype)->peak, num_threads);
}

bool fa_measure_limits(const char *name, bool is_decode, int num_threads, fa_limits *limits)
{
    const fa_kernel *kernel = fa_find_kernel(name);
    if (!kernel)
        return false;
    *limits = (fa_limits){
        .flops = measure_rounds(is_decode ? kernel->decode_peak : kernel->peak, num_threads),
        .scores = measure_rounds(kernel->softmax_peak, num_threads),
        .runs_side_by_side = kernel->softmax_beside_products && !is_decode,
    };
    return true;
}

typedef struct {
    const fa_kernel *kernel;
    const char *data;
    size_t bytes, share; /* of all threads; of each */
    bool prefetches;
    size_t repeats; /* of few bytes, so that the start of threads does not count */
    _Atomic size_t read;
    _Atomic uint64_t sum;
} read_job;

/* The first passes fill the caches. Every other pass prefetches: some CPUs alone have too few lines under
 * way, and others are slowed by prefetches. Passes over so much that it takes long are fewer. */
#define MAX_READ_PASSES 16
#define MIN_READ_PASSES 4
#define MAX_READ_BYTES ((size_t)1 << 32)
#define MIN_PASS_BYTES ((size_t)1 << 27)
#define MAX_REPEATS 65536

static size_t clamp(size_t x, size_t lowest, size_t highest)
{
    return x < lowest ? lowest : x > highest ? highest : x;
}

static void run_read(void *argument, int thread_index)
{
    read_job *job = argument;
    const size_t begin = (size_t)thread_index * job->share;
    if (begin >= job->bytes)
        return;
    const size_t bytes = job->bytes - begin < job->share ? job->bytes - begin : job->share;
    uint64_t sum = 0;
    for (size_t i = 0; i < job->repeats; i++)
        sum += job->kernel->read(job->data + begin, bytes, job->prefetches);
    atomic_fetch_add(&job->sum, sum);
    atomic_fetch_add(&job->read, job->repeats * bytes);
}

double fa_measure_bandwidth(const void *data, size_t bytes, int num_threads)
{
    num_threads = fa_runnable_threads(num_threads);
    const size_t threads = num_threads > 1 ? (size_t)num_threads : 1;
    const size_t passes = clamp(MAX_READ_BYTES / bytes, MIN_READ_PASSES, MAX_READ_PASSES);
    double best = 0;
    for (size_t pass = 0; pass < passes; pass++) {
        read_job job = {.kernel = fa_kernel_for_dtype(FA_FLOAT32), .data = data, .bytes = bytes};
        job.share = (bytes / threads + 64) / 64 * 64;
        job.prefetches = pass % 2 == 1;
        job.repeats = clamp(MIN_PASS_BYTES / bytes, 1, MAX_REPEATS);
        double start = seconds();
        fa_parallel(num_threads, run_read, NULL, &job);
        double rate = (double)job.read / (seconds() - start);
        if (rate > best)
            best = rate;
    }
    return best;
}
