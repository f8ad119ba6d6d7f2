/* platform.h for Windows. There are no signals to block, and there is no fork. */
#define WIN32_LEAN_AND_MEAN
#include "platform.h"

#include <malloc.h>
#include <process.h>
#include <stdlib.h>
#include <windows.h>

#define NANOSECONDS_PER_SECOND INT64_C(1000000000)
#define NANOSECONDS_PER_MILLISECOND INT64_C(1000000)

/* The counter's frequency is that of a crystal, some MHz, or 10 MHz where the counter of cycles is scaled. */
static int64_t ticks_per_second = 1;

__attribute__((constructor)) static void read_frequency(void)
{
    LARGE_INTEGER frequency;
    QueryPerformanceFrequency(&frequency);
    ticks_per_second = frequency.QuadPart;
}

int64_t fa_nanoseconds(void)
{
    LARGE_INTEGER now;
    QueryPerformanceCounter(&now);
    const int64_t seconds = now.QuadPart / ticks_per_second, rest = now.QuadPart % ticks_per_second;
    return seconds * NANOSECONDS_PER_SECOND + rest * NANOSECONDS_PER_SECOND / ticks_per_second;
}

/* A thread that is started has the affinity of the process, not that of the thread that starts it. The mask
 * is 0 for a process with threads in several groups of up to 64 CPUs. */
int fa_affinity_cpus(void)
{
    DWORD_PTR of_process = 0, of_system = 0;
    if (GetProcessAffinityMask(GetCurrentProcess(), &of_process, &of_system) && of_process)
        return __builtin_popcountll(of_process);
    const DWORD cpus = GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
    return cpus > 0 ? (int)cpus : 1;
}

/* --- the lock and the condition variables --------------------------------------------------------- */

/* Zeros are their initial state. */
static SRWLOCK lock;
static CONDITION_VARIABLE conditions[FA_MAX_THREADS];

void fa_lock_pool(void)
{
    AcquireSRWLockExclusive(&lock);
}

void fa_unlock_pool(void)
{
    ReleaseSRWLockExclusive(&lock);
}

void fa_wait(int thread_index)
{
    SleepConditionVariableSRW(&conditions[thread_index], &lock, INFINITE, 0);
}

bool fa_wait_for(int thread_index, int64_t nanoseconds)
{
    const DWORD milliseconds =
        (DWORD)((nanoseconds + NANOSECONDS_PER_MILLISECOND - 1) / NANOSECONDS_PER_MILLISECOND);
    return SleepConditionVariableSRW(&conditions[thread_index], &lock, milliseconds, 0) ||
           GetLastError() != ERROR_TIMEOUT;
}

void fa_signal(int thread_index)
{
    WakeConditionVariable(&conditions[thread_index]);
}

void fa_on_fork(void (*reset)(void))
{
    (void)reset;
}

/* --- threads -------------------------------------------------------------------------------------- */

typedef struct {
    void (*run)(int thread_index);
    int thread_index;
} thread_start;

static unsigned __stdcall start(void *argument)
{
    const thread_start mine = *(thread_start *)argument;
    free(argument);
    mine.run(mine.thread_index);
    return 0;
}

bool fa_start_thread(int thread_index, void (*run)(int thread_index))
{
    thread_start *copy = malloc(sizeof *copy);
    if (!copy)
        return false;
    *copy = (thread_start){run, thread_index};
    const uintptr_t thread = _beginthreadex(NULL, 0, start, copy, 0, NULL);
    if (thread)
        CloseHandle((HANDLE)thread);
    else
        free(copy);
    return thread != 0;
}

/* --- memory --------------------------------------------------------------------------------------- */

void *fa_allocate(size_t bytes)
{
    return _aligned_malloc(bytes, 64);
}

void fa_free(void *data)
{
    _aligned_free(data);
}

static DWORD thread_memory = FLS_OUT_OF_INDEXES;

/* Memory of a thread that ends, and of a fiber. */
static void __stdcall free_thread_memory(void *data)
{
    _aligned_free(data);
}

__attribute__((constructor)) static void create_slot(void)
{
    thread_memory = FlsAlloc(free_thread_memory);
}

void fa_free_with_thread(void *data)
{
    if (thread_memory != FLS_OUT_OF_INDEXES)
        FlsSetValue(thread_memory, data);
}
