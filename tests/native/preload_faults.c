/* preload_faults.c - for LD_PRELOAD: the Nth call of one kind in a whole tree of processes fails.
 *
 * A tracer that injects errors counts each thread by itself; here one counter is shared by all of them, so "the Nth"
 * is the Nth of the run. Only calls on files below one folder count, and on memfds of the gateway.
 *
 *   GW_FAULT_FOLDER   the folder
 *   GW_FAULT_COUNTS   a file of 16 words, mapped by all: calls of each kind so far; the last one is what is added to
 *                     CLOCK_REALTIME, in seconds
 *   GW_FAULT_CALL     the kind that fails: a name of `kinds`
 *   GW_FAULT_FIRST    the number of the first call that fails, from 1; GW_FAULT_LAST the last one
 *   GW_FAULT_ERRNO    its errno
 *   GW_FAULT_LIES     set: it fails, and says that it did not (a caller that ignores the error)
 *   GW_FAULT_HITS     a file that gets a line for each failure: kind, CLOCK_MONOTONIC in ns, path
 *
 * A write to a memfd is of kind memfd: no disk is in it. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { FDATASYNC, FSYNC, WRITE, PWRITE, RENAME, FALLOCATE, FTRUNCATE, MMAP, OPEN, MEMFD, KINDS, STEP = 15 };
static const char *const kinds[KINDS] = {"fdatasync", "fsync",     "write", "pwrite", "rename",
                                         "fallocate", "ftruncate", "mmap",  "open",   "memfd"};
static _Atomic uint64_t *counts;
static const char *folder, *hits;
static int failing = -1, error_number, lies;
static uint64_t first, last;

__attribute__((constructor)) static void begin(void)
{
    const char *file = getenv("GW_FAULT_COUNTS"), *call = getenv("GW_FAULT_CALL");
    folder = getenv("GW_FAULT_FOLDER"), hits = getenv("GW_FAULT_HITS");
    if (!file || !folder)
        return;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    void *map = (void *)syscall(SYS_mmap, NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (map == MAP_FAILED)
        return;
    counts = map;
    for (int i = 0; call && i < KINDS; i++)
        if (!strcmp(call, kinds[i]))
            failing = i;
    if (failing >= 0) {
        first = strtoull(getenv("GW_FAULT_FIRST"), NULL, 10), last = strtoull(getenv("GW_FAULT_LAST"), NULL, 10);
        error_number = atoi(getenv("GW_FAULT_ERRNO"));
        lies = getenv("GW_FAULT_LIES") != NULL;
    }
}

static int ours(const char *path)
{
    return !strncmp(path, folder, strlen(folder)) || !strncmp(path, "/memfd:gateway", 14);
}

/* Whether this call fails. */
static int fails(int kind, const char *path)
{
    if (!counts || !ours(path))
        return 0;
    uint64_t n = atomic_fetch_add(&counts[kind], 1) + 1;
    if (kind != failing || n < first || n > last)
        return 0;
    struct timespec now;
    char line[512];
    clock_gettime(CLOCK_MONOTONIC, &now);
    int size = snprintf(line, sizeof line, "%s %lld %s\n", kinds[kind],
                        (long long)now.tv_sec * 1000000000 + now.tv_nsec, path);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, hits, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (fd >= 0) {
        syscall(SYS_write, fd, line, size < (int)sizeof line ? size : (int)sizeof line);
        syscall(SYS_close, fd);
    }
    errno = error_number;
    return 1;
}

static int fails_fd(int kind, int fd)
{
    char link[64], path[400];
    if (!counts)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0)
        return 0;
    path[n] = 0;
    return fails(kind == WRITE && !strncmp(path, "/memfd:", 7) ? MEMFD : kind, path);
}

int fdatasync(int fd)
{
    if (fails_fd(FDATASYNC, fd))
        return lies ? 0 : -1;
    return (int)syscall(SYS_fdatasync, fd);
}

int fsync(int fd)
{
    return fails_fd(FSYNC, fd) ? -1 : (int)syscall(SYS_fsync, fd);
}

ssize_t write(int fd, const void *bytes, size_t n)
{
    return fails_fd(WRITE, fd) ? -1 : syscall(SYS_write, fd, bytes, n);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (counts && clock == CLOCK_REALTIME)
        now->tv_sec += (time_t)(int64_t)atomic_load(&counts[STEP]);
    return result;
}

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at)
{
    return fails_fd(PWRITE, fd) ? -1 : syscall(SYS_pwrite64, fd, bytes, n, at);
}

ssize_t pwrite64(int fd, const void *bytes, size_t n, off64_t at)
{
    return pwrite(fd, bytes, n, at);
}

int rename(const char *from, const char *to)
{
    return fails(RENAME, to) ? -1 : (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int posix_fallocate(int fd, off_t at, off_t n)
{
    if (fails_fd(FALLOCATE, fd))
        return error_number;
    return syscall(SYS_fallocate, fd, 0, at, n) ? errno : 0;
}

int posix_fallocate64(int fd, off64_t at, off64_t n)
{
    return posix_fallocate(fd, at, n);
}

int ftruncate(int fd, off_t n)
{
    return fails_fd(FTRUNCATE, fd) ? -1 : (int)syscall(SYS_ftruncate, fd, n);
}

int ftruncate64(int fd, off64_t n)
{
    return ftruncate(fd, n);
}

void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset)
{
    if (fd >= 0 && fails_fd(MMAP, fd))
        return MAP_FAILED;
    return (void *)syscall(SYS_mmap, at, n, protection, flags, fd, offset);
}

void *mmap64(void *at, size_t n, int protection, int flags, int fd, off64_t offset)
{
    return mmap(at, n, protection, flags, fd, offset);
}

int memfd_create(const char *name, unsigned flags)
{
    char path[300];
    snprintf(path, sizeof path, "/memfd:%s", name);
    return fails(MEMFD, path) ? -1 : (int)syscall(SYS_memfd_create, name, flags);
}

static int opens(int directory, const char *path, int flags, va_list more)
{
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    return fails(OPEN, path) ? -1 : (int)syscall(SYS_openat, directory, path, flags, mode);
}

#define OPENS(name, parameters, directory)            \
    int name parameters                               \
    {                                                 \
        va_list more;                                 \
        va_start(more, flags);                        \
        int fd = opens(directory, path, flags, more); \
        va_end(more);                                 \
        return fd;                                    \
    }

OPENS(open, (const char *path, int flags, ...), AT_FDCWD)
OPENS(open64, (const char *path, int flags, ...), AT_FDCWD)
OPENS(openat, (int directory, const char *path, int flags, ...), directory)
OPENS(openat64, (int directory, const char *path, int flags, ...), directory)
