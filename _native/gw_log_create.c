/* gw_log_create.c - a new log file: zero-filled in 4 KiB writes (large folios: see gw_log_recover.c), synced, then its
 * identity page, all under another name until it is whole. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "gw_crc32c.h"
#include "gw_log_shared.h"

static uint64_t realtime_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int gw_write_page(int fd, const void *page, uint64_t offset)
{
    ssize_t n = pwrite(fd, page, GW_PAGE, (off_t)offset);
    if (n == (ssize_t)GW_PAGE)
        return 0;
    if (n >= 0)
        errno = ENOSPC;
    return -1;
}

static int sync_directory_of(const char *path)
{
    char directory[PATH_MAX];
    const char *slash = strrchr(path, '/');
    if (!slash)
        snprintf(directory, sizeof directory, ".");
    else
        snprintf(directory, sizeof directory, "%.*s", slash == path ? 1 : (int)(slash - path), path);
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    int result = fsync(fd);
    close(fd);
    return result;
}

static int fill(int fd, uint64_t capacity, int (*progress)(void *, uint64_t), void *context)
{
    static const uint8_t zero[GW_PAGE];
    uint64_t total = GW_RING_OFFSET + capacity;
    int full = posix_fallocate(fd, 0, (off_t)total);
    if (full) {
        errno = full;
        return -1;
    }
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
    for (uint64_t at = 0; at < total; at += GW_PAGE) {
        if (gw_write_page(fd, zero, at))
            return -1;
        if (progress && at % (8u << 20) == 0 && progress(context, at)) {
            errno = EINTR;
            return -1;
        }
    }
    if (fsync(fd))
        return -1;

    gw_identity_page identity = {.magic = GW_LOG_MAGIC,
                                 .version = GW_LOG_VERSION,
                                 .capacity = capacity,
                                 .record_bytes_max = gw_record_bytes_max_of(capacity),
                                 .created_at_ns = realtime_ns()};
    if (getrandom(identity.secret, sizeof identity.secret, 0) != sizeof identity.secret ||
        getrandom(&identity.identity, sizeof identity.identity, 0) != sizeof identity.identity)
        return -1;
    identity.crc = gw_crc32c(0, &identity, sizeof identity);
    gw_slot_page slot = {.magic = GW_SLOT_MAGIC,
                         .version = GW_LOG_VERSION,
                         .sequence = 1,
                         .watermark = GW_FIRST_LSN,
                         .epoch = 1,
                         .epochs = 1,
                         .range = {{.start = GW_FIRST_LSN, .epoch = 1}}};
    slot.crc = gw_crc32c(0, &slot, sizeof slot);
    if (gw_write_page(fd, &slot, 2 * GW_PAGE) || gw_write_page(fd, &identity, 0))
        return -1;
    return fsync(fd);
}

gw_status gw_log_create(const char *path, uint64_t capacity, int (*progress)(void *, uint64_t), void *context,
                        gw_error *error)
{
    if (capacity < GW_CAPACITY_MIN || capacity > GW_CAPACITY_MAX || (capacity & (capacity - 1)))
        return gw_fail(error, GW_ERRNO, EINVAL, 0, "capacity is not a power of two in range");
    char fresh[PATH_MAX];
    if (snprintf(fresh, sizeof fresh, "%s.new", path) >= (int)sizeof fresh)
        return gw_fail(error, GW_ERRNO, ENAMETOOLONG, 0, "creating the log");
    if (access(path, F_OK) == 0)
        return gw_fail(error, GW_ERRNO, EEXIST, 0, "creating the log");
    /* Under another name until it is whole: a crash here leaves nothing that looks like a log. */
    int fd = open(fresh, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return gw_fail(error, GW_ERRNO, errno, 0, "creating the log");
    if (fill(fd, capacity, progress, context) || rename(fresh, path) || sync_directory_of(path)) {
        int why = errno;
        unlink(fresh);
        close(fd);
        return gw_fail(error, GW_ERRNO, why, 0, "allocating and zeroing the log");
    }
    close(fd);
    return GW_OK;
}
