#include "run.h"

#include "dispatch.h"
#include "float_mode.h"
#include "threads.h"

typedef struct {
    const fa_problem *problem;
    void (*compute)(const void *argument, fa_worker *worker, void *scratch);
    const void *argument;
    size_t scratch_bytes;
    void *caller_scratch;
    bool flushes_subnormals;
    uint64_t caller_mode; /* the caller's float mode outside the kernels */
} call_job;

/* Runs Python's signal handlers, in the float mode that they expect. */
static bool is_interrupted(void *argument)
{
    const call_job *job = argument;
    if (!job->flushes_subnormals)
        return job->problem->interrupted();
    const uint64_t mode = fa_float_mode();
    fa_restore_float_mode(job->caller_mode);
    const bool interrupted = job->problem->interrupted();
    fa_restore_float_mode(mode);
    return interrupted;
}

static void compute_in_float_mode(const call_job *job, fa_worker *worker, void *scratch)
{
    if (!job->flushes_subnormals) {
        job->compute(job->argument, worker, scratch);
        return;
    }
    const uint64_t mode = fa_flush_subnormals();
    job->compute(job->argument, worker, scratch);
    fa_restore_float_mode(mode);
}

static void work(void *argument, fa_worker *worker)
{
    const call_job *job = argument;
    if (worker->thread_index == 0) {
        compute_in_float_mode(job, worker, job->caller_scratch);
        return;
    }
    void *scratch = fa_take_scratch(job->scratch_bytes);
    if (!scratch)
        return; /* the other threads steal this one's items */
    compute_in_float_mode(job, worker, scratch);
    fa_give_back_scratch(scratch);
}

fa_status fa_run(const fa_problem *problem, int num_threads, int64_t num_items, size_t scratch_bytes,
                 void (*compute)(const void *argument, fa_worker *worker, void *scratch),
                 const void *argument)
{
    call_job job = {
        .problem = problem,
        .compute = compute,
        .argument = argument,
        .scratch_bytes = scratch_bytes,
        .caller_scratch = fa_take_scratch(scratch_bytes),
        .flushes_subnormals = fa_kernel_for_dtype(problem->query.dtype)->flushes_subnormals,
        .caller_mode = fa_float_mode(),
    };
    if (!job.caller_scratch)
        return FA_NO_MEMORY;
    const bool finished =
        fa_run_schedule(num_threads, num_items, work, problem->interrupted ? is_interrupted : NULL, &job);
    fa_give_back_scratch(job.caller_scratch);
    return finished ? FA_OK : FA_INTERRUPTED;
}
