#include "run.h"

#include "float_mode.h"
#include "threads.h"

typedef struct {
    const fa_job *job;
    void (*compute)(const void *argument, fa_worker *worker, void *scratch);
    const void *argument;
    void *caller_scratch;
    uint64_t caller_mode; /* the caller's float mode outside the kernels */
} run_state;

/* Runs Python's signal handlers, in the float mode that they expect. */
static bool is_interrupted(void *argument)
{
    const run_state *run = argument;
    if (!run->job->flushes_subnormals)
        return run->job->interrupted();
    const uint64_t mode = fa_float_mode();
    fa_restore_float_mode(run->caller_mode);
    const bool interrupted = run->job->interrupted();
    fa_restore_float_mode(mode);
    return interrupted;
}

static void compute_in_float_mode(const run_state *run, fa_worker *worker, void *scratch)
{
    if (!run->job->flushes_subnormals) {
        run->compute(run->argument, worker, scratch);
        return;
    }
    const uint64_t mode = fa_flush_subnormals();
    run->compute(run->argument, worker, scratch);
    fa_restore_float_mode(mode);
}

static void work(void *argument, fa_worker *worker)
{
    const run_state *run = argument;
    if (worker->thread_index == 0) {
        compute_in_float_mode(run, worker, run->caller_scratch);
        return;
    }
    void *scratch = fa_take_scratch(run->job->scratch_bytes);
    if (!scratch)
        return; /* the other threads steal this one's items */
    compute_in_float_mode(run, worker, scratch);
    fa_give_back_scratch(scratch);
}

fa_status fa_run(const fa_job *job, void (*compute)(const void *argument, fa_worker *worker, void *scratch),
                 const void *argument)
{
    run_state run = {
        .job = job,
        .compute = compute,
        .argument = argument,
        .caller_scratch = fa_take_scratch(job->scratch_bytes),
        .caller_mode = fa_float_mode(),
    };
    if (!run.caller_scratch)
        return FA_NO_MEMORY;
    const bool finished = fa_run_schedule(job->num_threads, job->num_items, work,
                                          job->interrupted ? is_interrupted : NULL, &run);
    fa_give_back_scratch(run.caller_scratch);
    return finished ? FA_OK : FA_INTERRUPTED;
}
