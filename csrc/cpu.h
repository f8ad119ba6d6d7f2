/* What this process may use of the machine. */
#ifndef FA_CPU_H
#define FA_CPU_H

/* CPUs' worth of time that the control groups of this process grant, rounded up: the least of all groups from
 * its own up to the root, of version 2 and version 1; 0 if none limits. Files are read below `root`, which is
 * "" but for tests. */
int fa_quota_cpus(const char *root);

/* How many of the threads that are asked for can run at a time. More would wait for each other: a decoding
 * step of 64 threads on one CPU took eight times as long as of one. */
int fa_runnable_threads(int num_threads);

/* For tests: as if so many CPUs were at hand, so that few of them run many threads; 0: those there are. */
void fa_assume_cpus(int cpus);

#endif
