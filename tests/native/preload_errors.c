/* preload_errors.c - for LD_PRELOAD: system calls that fail, counted from the start of the process.
 *
 *   GW_FDATASYNC_FAILS=N    the Nth fdatasync, and no other: EIO, as the kernel tells it
 *   GW_FALLOCATE_FAILS=1    posix_fallocate: ENOSPC */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_int calls;

int fdatasync(int fd)
{
    const char *nth = getenv("GW_FDATASYNC_FAILS");
    if (nth && atomic_fetch_add(&calls, 1) + 1 == atoi(nth)) {
        errno = EIO;
        return -1;
    }
    return (int)syscall(SYS_fdatasync, fd);
}

int posix_fallocate(int fd, off_t offset, off_t bytes)
{
    if (getenv("GW_FALLOCATE_FAILS"))
        return ENOSPC;
    return syscall(SYS_fallocate, fd, 0, offset, bytes) ? errno : 0;
}
