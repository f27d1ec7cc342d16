/* gw_log_resize.c - what offline tools do that no gateway does: look at the whole ring, make the log anew with another
 * capacity.
 *
 * A position is masked where it is used, so a record keeps its lsn in a ring of any size: it only stands elsewhere in
 * the file. Resizing is therefore a copy of bytes [from, E), to the new places, and of the identity page with the new
 * capacity. Identity, secret, epochs, cursors and books stay: receipts, the dedupe window and every sink's place
 * survive. What the new file holds is exactly what recovery of the old one would have found, torn places included; the
 * old file is only read. An optional sink's cursor that lies below `from` moves when the new file is opened.
 *
 *     old ring   |~~E .. from####c#######|    c: the least required cursor; # copied: [c, E) must fit, and as much
 *     new ring   |     from####c#########E~~~~~~~~~~|      of what lies below c as does; ~ zero, or a former lap
 *
 * The new file is written whole, synced, read back from the disk and compared; only then does the caller give it the
 * log's name. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gw_crc32c.h"
#include "gw_log_shared.h"

/* ---- the whole ring ------------------------------------------------------------------------------------------- */

const char *gw_log_sink_name(const gw_log *log, unsigned sink)
{
    return sink < log->shared->sinks ? log->shared->sink_name[sink] : NULL;
}

/* `header` is a copy of what stands at p: whether a record may begin so. */
static bool plausible(const gw_log *log, const gw_header *header, uint64_t p, uint64_t end)
{
    const gw_shared *shared = log->shared;
    if (!header->marker || header->kind > GW_PAD || header->size < sizeof *header || header->size % 8 ||
        header->size > end - p || !gw_epoch_ok(shared->range, shared->epochs, p, header->epoch))
        return false;
    if (header->kind != GW_PAD) {
        uint64_t used = sizeof *header + (uint64_t)header->device_id_bytes + header->body_bytes;
        if (header->size != ((used + 7) & ~7ull) || header->size > shared->record_bytes_max)
            return false;
    }
    return (header->marker ^ gw_mix(shared->secret, header->epoch) ^ p) == header->kind;
}

gw_status gw_log_next(const gw_log *log, uint64_t lsn, uint64_t limit, uint8_t *buffer, gw_record *record)
{
    uint64_t end = gw_log_committed(log), oldest = end > log->mask + 1 ? end - (log->mask + 1) : GW_FIRST_LSN;
    if (lsn < oldest)
        lsn = oldest;
    for (uint64_t p = (lsn + 7) & ~7ull; p < limit && p + GW_RECORD_HEADER_BYTES <= end; p += 8) {
        const gw_header *header = (const gw_header *)(void *)buffer;
        const uint8_t *from = (const uint8_t *)gw_word(log, p), *rest = buffer + sizeof *header;
        memcpy(buffer, from, sizeof *header);
        if (!plausible(log, header, p, end))
            continue;
        if (header->kind != GW_PAD)
            memcpy(buffer + sizeof *header, from + sizeof *header, header->size - sizeof *header);
        if (header->crc != gw_record_crc(header, rest, p))
            continue;
        *record = gw_record_of(header, rest, p, header->dead);
        return GW_OK;
    }
    return GW_EMPTY;
}

/* ---- resize --------------------------------------------------------------------------------------------------- */

typedef struct copy {
    const gw_log *log;
    uint8_t *buffer;                                /* a record of the old log */
    uint64_t capacity, record_bytes_max, from, end; /* of the new file, and what it holds */
    int (*progress)(void *, uint64_t);
    void *context;
} copy;

static gw_status refuse(gw_error *error, gw_status status, uint64_t lsn, const char *form, uint64_t a, uint64_t b)
{
    char text[sizeof error->text];
    snprintf(text, sizeof text, form, (unsigned long long)a, (unsigned long long)b);
    return gw_fail(error, status, 0, lsn, text);
}

/* Where recovery of the new file will go on writing. */
static uint64_t start_of(const gw_log *log)
{
    const gw_shared *shared = log->shared;
    uint64_t start = gw_log_committed(log);
    if (gw_log_durable(log) > start)
        start = gw_log_durable(log);
    if (shared->range[shared->epochs - 1].start > start)
        start = shared->range[shared->epochs - 1].start;
    for (unsigned i = 0; i < shared->sinks; i++)
        if (gw_cursor_load(log, i).lsn > start)
            start = gw_cursor_load(log, i).lsn;
    return start;
}

/* Where the copy begins: at the oldest record that the new ring has room for. All that waits must fit. */
static gw_status choose(copy *c, gw_error *error)
{
    uint64_t least = gw_log_reclaim(c->log), start = start_of(c->log);
    if (start - least > c->capacity)
        return refuse(error, GW_FULL, least, "%llu bytes wait to be published, more than a capacity of %llu holds",
                      start - least, c->capacity);
    gw_record record;
    for (uint64_t p = least; gw_log_next(c->log, p, c->end, c->buffer, &record) == GW_OK; p = record.lsn + record.size)
        if (record.kind != GW_PAD && record.size > c->record_bytes_max)
            return refuse(error, GW_TOO_LARGE, record.lsn,
                          "a record that waits has %llu bytes, and with that capacity the largest has %llu",
                          record.size, c->record_bytes_max);
    uint64_t lowest = start > c->capacity ? start - c->capacity : 0;
    bool finished = gw_log_next(c->log, lowest, least, c->buffer, &record) == GW_OK;
    c->from = finished ? record.lsn : least;
    return GW_OK;
}

/* The bytes of [from, end) that stand in the page of position q: of this lap, and at the seam of the next one. */
static void ring_page(const copy *c, uint64_t q, uint8_t *page)
{
    memset(page, 0, GW_PAGE);
    for (unsigned lap = 0; lap < 2; lap++, q += c->capacity) {
        uint64_t a = q > c->from ? q : c->from, b = q + GW_PAGE < c->end ? q + GW_PAGE : c->end;
        if (a < b)
            memcpy(page + (a - q), gw_word(c->log, a), b - a); /* a is a multiple of 8; the mirror holds a page */
    }
}

static gw_slot_page slot_of(const gw_log *log)
{
    const gw_shared *shared = log->shared;
    gw_slot_page slot = {.magic = GW_SLOT_MAGIC,
                         .version = GW_LOG_VERSION,
                         .sequence = atomic_load_explicit(&shared->slot_sequence, memory_order_relaxed),
                         .watermark = gw_log_durable(log),
                         .epoch = shared->epoch,
                         .epochs = shared->epochs,
                         .sinks = shared->sinks,
                         .optional = shared->optional};
    memcpy(slot.range, shared->range, sizeof slot.range);
    for (unsigned i = 0; i < shared->sinks; i++) {
        memcpy(slot.sink[i].name, shared->sink_name[i], GW_SINK_NAME_BYTES);
        slot.sink[i].cursor = gw_cursor_load(log, i);
    }
    memcpy(slot.lost_from, shared->lost_from, sizeof slot.lost_from);
    return slot;
}

static int write_all(const copy *c, int fd)
{
    uint64_t total = GW_RING_OFFSET + c->capacity, lowest = c->from & ~(GW_PAGE - 1);
    int full = posix_fallocate(fd, 0, (off_t)total);
    if (full) {
        errno = full;
        return -1;
    }
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM); /* small folios, as in gw_log_create */
    uint8_t page[GW_PAGE] __attribute__((aligned(8))) = {0};
    for (unsigned i = 0; i < GW_RING_OFFSET / GW_PAGE; i++)
        if (gw_write_page(fd, page, i * GW_PAGE))
            return -1;
    for (uint64_t at = 0; at < c->capacity; at += GW_PAGE) {
        ring_page(c, lowest + ((at - lowest) & (c->capacity - 1)), page);
        if (gw_write_page(fd, page, GW_RING_OFFSET + at))
            return -1;
        if (c->progress && at % (8u << 20) == 0 && c->progress(c->context, at)) {
            errno = EINTR;
            return -1;
        }
    }
    /* Both slots say the same: the older one's cursor may lie below what was copied. */
    gw_slot_page slot = slot_of(c->log);
    for (unsigned i = 0; i < 2; i++, slot.sequence++) {
        slot.crc = 0;
        slot.crc = gw_crc32c(0, &slot, sizeof slot);
        if (gw_write_page(fd, &slot, (1 + slot.sequence % 2) * GW_PAGE))
            return -1;
    }
    gw_identity_page identity;
    memcpy(&identity, c->log->file, sizeof identity);
    identity.capacity = c->capacity;
    identity.record_bytes_max = c->record_bytes_max;
    identity.crc = 0;
    identity.crc = gw_crc32c(0, &identity, sizeof identity);
    if (gw_write_page(fd, &identity, 0) || fsync(fd))
        return -1;
    /* what is compared comes from the disk */
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    return 0;
}

/* The new file as recovery will see it, against the old one: the same answer, the same bytes at every position. */
static gw_status compare(const copy *c, const char *path, const gw_recovery *was, gw_error *error)
{
    gw_log *fresh;
    gw_recovery is;
    gw_status status = gw_log_scan(path, &fresh, &is, error);
    if (status != GW_OK)
        return status;
    bool same = is.start == was->start && is.watermark == was->watermark && is.end == was->end &&
                is.records == was->records && is.bytes == was->bytes && is.torn_bytes == was->torn_bytes &&
                !is.corrupt_count && is.epoch == was->epoch && gw_log_identity(fresh) == gw_log_identity(c->log) &&
                gw_log_reclaim(fresh) == gw_log_reclaim(c->log) &&
                gw_log_committed_ordinal(fresh) == gw_log_committed_ordinal(c->log);
    for (uint64_t p = c->from, to; same && p < c->end; p = to) {
        to = (p & ~(GW_PAGE - 1)) + GW_PAGE;
        if (to > c->end)
            to = c->end;
        same = memcmp(gw_word(fresh, p), gw_word(c->log, p), to - p) == 0;
    }
    gw_log_close(fresh);
    return same ? GW_OK : gw_fail(error, GW_ERRNO, EIO, c->from, "the new file does not read back as it was written");
}

gw_status gw_log_resize(const gw_log *log, const gw_recovery *found, const char *path, uint64_t capacity,
                        int (*progress)(void *, uint64_t), void *context, uint64_t *from, gw_error *error)
{
    if (capacity < GW_CAPACITY_MIN || capacity > GW_CAPACITY_MAX || (capacity & (capacity - 1)))
        return gw_fail(error, GW_ERRNO, EINVAL, 0, "capacity is not a power of two in range");
    if (found->corrupt_count)
        return gw_fail(error, GW_CORRUPT, 0, found->corrupt[0].from, "damage below the durable watermark");
    copy c = {.log = log,
              .buffer = malloc(gw_log_record_bytes_max(log)),
              .capacity = capacity,
              .record_bytes_max = gw_record_bytes_max_of(capacity),
              .end = gw_log_committed(log),
              .progress = progress,
              .context = context};
    if (!c.buffer)
        return gw_fail(error, GW_ERRNO, ENOMEM, 0, "resizing the log");
    gw_status status = choose(&c, error);
    if (status != GW_OK) {
        free(c.buffer);
        return status;
    }
    struct stat old;
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    /* it must be as readable to the gateway's user as the old one, also when root does this */
    if (fd < 0 || fstat(log->fd, &old) || fchown(fd, old.st_uid, old.st_gid) || fchmod(fd, old.st_mode & 07777) ||
        write_all(&c, fd))
        status = gw_fail(error, GW_ERRNO, errno, 0, "writing the new log");
    if (status == GW_OK)
        status = compare(&c, path, found, error);
    if (fd >= 0) {
        if (status != GW_OK)
            unlink(path);
        close(fd);
    }
    free(c.buffer);
    *from = c.from;
    return status;
}
