#include "schedule.h"

#include "platform.h"
#include "threads.h"

#define INTERRUPT_POLL_NANOSECONDS 50000000

/* Calls of fa_should_stop between two looks at the clock: key blocks, of some 10 µs of work each at the least
 * that is worth a thread. */
#define CALLS_PER_CLOCK 16

#define CACHE_LINE 64
#define MAX_QUEUES 64

/* Indices that no thread has popped: [next, end). */
typedef struct {
    _Alignas(CACHE_LINE) _Atomic int64_t next;
    int64_t end;
} work_queue;

/* Each thread begins with a queue of its own: in the next call on the same arrays it finds there what its
 * caches hold, and a pop takes no cache line from other threads, whose cores may be far away. A thread whose
 * queue is empty steals from the others. What is written has cache lines of its own, apart from what every
 * thread reads. */
struct fa_schedule {
    _Alignas(CACHE_LINE) atomic_bool stop;
    void (*work)(void *argument, fa_worker *worker);
    bool (*interrupted)(void *argument);
    void *argument;
    int num_queues;
    work_queue queues[MAX_QUEUES];
};

bool fa_should_stop(fa_stop *stop)
{
    if (atomic_load_explicit(stop->requested, memory_order_relaxed))
        return true;
    if (!stop->interrupted || ++stop->calls % CALLS_PER_CLOCK != 0)
        return false;
    const int64_t now = fa_nanoseconds();
    if (stop->next_poll == 0) /* the first look: short calls end before they ask */
        stop->next_poll = now + INTERRUPT_POLL_NANOSECONDS;
    if (now < stop->next_poll)
        return false;
    stop->next_poll = now + INTERRUPT_POLL_NANOSECONDS;
    if (!stop->interrupted(stop->argument))
        return false;
    atomic_store(stop->requested, true);
    return true;
}

/* The caller waits for the others. It asks only once: when the threads are to stop, an exception is on its
 * way, and another one would take its place. */
static void poll_while_waiting(void *argument)
{
    fa_schedule *s = argument;
    if (s->interrupted && !atomic_load(&s->stop) && s->interrupted(s->argument))
        atomic_store(&s->stop, true);
}

/* -1: the queue is empty. */
static int64_t pop(work_queue *queue)
{
    if (atomic_load_explicit(&queue->next, memory_order_relaxed) >= queue->end)
        return -1;
    const int64_t index = atomic_fetch_add_explicit(&queue->next, 1, memory_order_relaxed);
    return index < queue->end ? index : -1;
}

/* -1: all queues are empty. */
static int64_t pop_or_steal(fa_worker *w)
{
    for (int tried = 0; tried < w->schedule->num_queues; tried++) {
        const int64_t index = pop(&w->schedule->queues[w->queue]);
        if (index >= 0)
            return index;
        w->queue = (w->queue + 1) % w->schedule->num_queues;
    }
    return -1;
}

/* While its queue has more, a thread has its next index before it works on this one, so that it can prefetch
 * for it; a queue's last index goes to the thread that is free first. */
static int64_t pop_early(fa_worker *w)
{
    const work_queue *queue = &w->schedule->queues[w->queue];
    if (atomic_load_explicit(&queue->next, memory_order_relaxed) + 2 > queue->end)
        return -1;
    return pop_or_steal(w);
}

bool fa_next_index(fa_worker *w)
{
    if (atomic_load_explicit(&w->schedule->stop, memory_order_relaxed))
        return false;
    w->index = w->next >= 0 ? w->next : pop_or_steal(w);
    w->next = w->index >= 0 ? pop_early(w) : -1;
    return w->index >= 0;
}

static void work_as_thread(void *argument, int thread_index)
{
    fa_schedule *s = argument;
    fa_worker worker = {
        .next = -1,
        .thread_index = thread_index,
        .stop = {.requested = &s->stop, .argument = s->argument},
        .schedule = s,
        .queue = thread_index % s->num_queues,
    };
    if (thread_index == 0)
        worker.stop.interrupted = s->interrupted;
    s->work(s->argument, &worker);
}

static void fill_queues(fa_schedule *s, int num_threads, int64_t num_indices)
{
    s->num_queues = num_threads < 1 ? 1 : num_threads < MAX_QUEUES ? num_threads : MAX_QUEUES;
    for (int i = 0; i < s->num_queues; i++) {
        atomic_init(&s->queues[i].next, num_indices * i / s->num_queues);
        s->queues[i].end = num_indices * (i + 1) / s->num_queues;
    }
}

bool fa_run_schedule(int num_threads, int64_t num_indices, void (*work)(void *argument, fa_worker *worker),
                     bool (*interrupted)(void *argument), void *argument)
{
    fa_schedule s; /* queues beyond num_queues are never read: to clear them all would cost a small call */
    atomic_init(&s.stop, false);
    s.work = work;
    s.interrupted = interrupted;
    s.argument = argument;
    fill_queues(&s, num_threads, num_indices);
    fa_parallel(num_threads, work_as_thread, poll_while_waiting, &s);
    return !atomic_load(&s.stop);
}
