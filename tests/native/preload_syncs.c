/* preload_syncs.c - for LD_PRELOAD: when each fdatasync of a gateway.log began and returned.
 *
 *   GW_SYNC_TRACE=FILE    one line a call, appended before it returns: "BEGAN_NS RETURNED_NS RESULT", CLOCK_MONOTONIC
 *
 * The line is written before the caller learns of the sync, so whatever the caller does because of it comes later. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int trace = -1;

__attribute__((constructor)) static void open_trace(void)
{
    const char *path = getenv("GW_SYNC_TRACE");
    if (path)
        trace = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

static long long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int is_log(int fd)
{
    static const char name[] = "/gateway.log";
    char link[32], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path);
    return n >= (ssize_t)sizeof name - 1 && memcmp(path + n - (sizeof name - 1), name, sizeof name - 1) == 0;
}

int fdatasync(int fd)
{
    long long began = now_ns();
    int result = (int)syscall(SYS_fdatasync, fd), why = errno;
    if (trace >= 0 && is_log(fd)) {
        char line[80];
        int n = snprintf(line, sizeof line, "%lld %lld %d\n", began, now_ns(), result);
        if (write(trace, line, (size_t)n) != n)
            abort();
    }
    errno = why;
    return result;
}
