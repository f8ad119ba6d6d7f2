/* What the tests in C share. A test program prints nothing and exits with 0, or says what is not so and
 * aborts. */
#ifndef FA_TESTS_CHECK_H
#define FA_TESTS_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* Further arguments: a format and what it prints, to tell which case it is. */
#define REQUIRE(condition, ...)                                                                              \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: not so: %s", __FILE__, __LINE__, #condition);                            \
            fprintf(stderr, "\n" __VA_ARGS__);                                                               \
            fprintf(stderr, "\n");                                                                           \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

/* xorshift: the same numbers in every run, on every machine. */
static inline uint64_t random_bits(void)
{
    static uint64_t state = 88172645463325252;
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

/* lowest <= x <= highest */
static inline int64_t random_int(int64_t lowest, int64_t highest)
{
    return lowest + (int64_t)(random_bits() % (uint64_t)(highest - lowest + 1));
}

#endif
