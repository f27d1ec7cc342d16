/* preload_gate.c - for LD_PRELOAD: fdatasync as a test wants it. GW_GATE names a file:
 *
 *   not there       fdatasync as always
 *   it says "hold"  fdatasync begins once it says so no more
 *   it says "fail"  fdatasync returns EIO, as the kernel tells it */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static char said(void)
{
    const char *gate = getenv("GW_GATE");
    int fd = gate ? open(gate, O_RDONLY | O_CLOEXEC) : -1;
    char first = 0;
    if (fd >= 0) {
        if (read(fd, &first, 1) != 1)
            first = 0;
        close(fd);
    }
    return first;
}

int fdatasync(int fd)
{
    static const struct timespec moment = {0, 1000000};
    char now;
    while ((now = said()) == 'h')
        nanosleep(&moment, NULL);
    if (now == 'f') {
        errno = EIO;
        return -1;
    }
    return (int)syscall(SYS_fdatasync, fd);
}
