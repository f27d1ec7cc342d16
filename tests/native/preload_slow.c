/* preload_slow.c - for LD_PRELOAD: each event takes GW_SLOW_US microseconds longer, as far as it asks for the time of
 * day. A gateway that is slower on purpose, for the tests of the gates. */
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long long now_ns(void)
{
    struct timespec t;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

int clock_gettime(clockid_t clock, struct timespec *time)
{
    static long long slow_ns = -1;
    if (slow_ns < 0) {
        const char *text = getenv("GW_SLOW_US");
        slow_ns = text ? atoll(text) * 1000 : 0;
    }
    if (clock == CLOCK_REALTIME && slow_ns)
        for (long long until = now_ns() + slow_ns; now_ns() < until;)
            ;
    return (int)syscall(SYS_clock_gettime, clock, time);
}
