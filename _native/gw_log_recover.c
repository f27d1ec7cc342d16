/* gw_log_recover.c - map, open (recovery), scan, attach.
 *
 * Recovery (docs/log.md, "Start"). c: least persisted cursor of a sink that was required then; W: persisted watermark;
 * E: end of the last whole record.
 *
 *   what stands at p                                     verdict
 *   -------------------------------------------------    ---------------------------------------------------------
 *   a whole record whose epoch fits its position         accepted, p += size
 *   anything else, a whole record further on at x        hole [p, x): below W corrupt (reported), else torn (skipped)
 *   anything else, nothing further on                    E = p; E < W: [E, W) corrupt
 *
 * "Whole" is marker, size, and CRC over position, epoch and every byte. The search for x tries every 8-byte position,
 * so that a half-written record hides nothing behind it. A former lap's record never passes: its marker and its CRC
 * carry another position. Writing goes on at S = max(E, W, every persisted position) in a new epoch: a marker that a
 * power cut left behind above E belongs to an older epoch and can never make a new claim look written.
 *
 * Below c nothing was kept for the sinks that were optional. One whose cursor X lies there stays if it is still in
 * the ring (S <= X + capacity) and whole records lead from X to c; else it moves to c, and what it missed is counted.
 * Its ordinal and that of c are exact, so the books are. Which sinks are optional from now on is said by the caller.
 *
 * Order of the writes: slots dirty, fdatasync (what was found is what stays) | PADs over holes and [E, S), [W, E)
 * dirty, slot with the new epoch, fdatasync | then the first claim. A crash between them repeats the same recovery.
 *
 * Page cache: large folios turn a 200-byte commit into a megabyte of writing. Files are filled in 4 KiB writes and read
 * by pread under POSIX_FADV_RANDOM before they are touched through the map (MADV_RANDOM), which keeps folios small. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gw_crc32c.h"
#include "gw_log_index.h"

/* ---- identity and map ----------------------------------------------------------------------------------------- */

static gw_status read_identity(int fd, gw_identity_page *identity, gw_error *error)
{
    struct stat stat;
    if (fstat(fd, &stat))
        return gw_fail(error, GW_ERRNO, errno, 0, "reading the log's size");
    /* Before the very first read: one page read without it starts a read-ahead that goes on, in ever larger folios,
     * through all that is read later. */
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
    ssize_t n = pread(fd, identity, sizeof *identity, 0);
    if (n < 0)
        return gw_fail(error, GW_ERRNO, errno, 0, "reading the log's identity page");
    if (n != sizeof *identity || identity->magic != GW_LOG_MAGIC)
        return gw_fail(error, GW_NOT_A_LOG, 0, 0, "not a gateway log (no magic at its beginning)");
    if (identity->version != GW_LOG_VERSION)
        return gw_fail(error, GW_NOT_A_LOG, 0, 0, "a gateway log of another version");
    uint32_t crc = identity->crc;
    identity->crc = 0;
    if (crc != gw_crc32c(0, identity, sizeof *identity))
        return gw_fail(error, GW_NOT_A_LOG, 0, 0, "the identity page is damaged");
    identity->crc = crc;
    uint64_t capacity = identity->capacity;
    if (capacity < GW_CAPACITY_MIN || capacity > GW_CAPACITY_MAX || (capacity & (capacity - 1)) ||
        identity->record_bytes_max != gw_record_bytes_max_of(capacity))
        return gw_fail(error, GW_NOT_A_LOG, 0, 0, "the identity page is not of this version");
    if ((uint64_t)stat.st_size != GW_RING_OFFSET + capacity)
        return gw_fail(error, GW_NOT_A_LOG, 0, 0, "the file's size is not that of its identity page (truncated?)");
    return GW_OK;
}

gw_status gw_map(gw_log *log, int fd, uint64_t capacity, uint64_t mirror, gw_error *error)
{
    int protection = log->read_only ? PROT_READ : PROT_READ | PROT_WRITE;
    uint64_t total = GW_RING_OFFSET + capacity + mirror;
    uint8_t *base = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return gw_fail(error, GW_ERRNO, errno, 0, "reserving addresses for the log");
    if (mmap(base, GW_RING_OFFSET + capacity, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED ||
        mmap(base + GW_RING_OFFSET + capacity, mirror, protection, MAP_SHARED | MAP_FIXED, fd, GW_RING_OFFSET) ==
            MAP_FAILED) {
        int why = errno;
        munmap(base, total);
        return gw_fail(error, GW_ERRNO, why, 0, "mapping the log");
    }
    madvise(base, total, MADV_RANDOM);
    madvise(base, total, MADV_DONTFORK);
    log->file = base;
    log->ring = base + GW_RING_OFFSET;
    log->mask = capacity - 1;
    return GW_OK;
}

static void unmap(gw_log *log)
{
    if (log->file)
        munmap(log->file, GW_RING_OFFSET + log->mask + 1 + gw_record_bytes_max_of(log->mask + 1));
    log->file = log->ring = NULL;
}

static gw_log *new_handle(void)
{
    gw_log *log = calloc(1, sizeof *log);
    if (log) {
        log->fd = log->fd_lock = log->fd_shared = -1;
        log->walking = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    }
    return log;
}

void gw_log_close(gw_log *log)
{
    if (!log)
        return;
    unmap(log);
    if (log->shared)
        munmap(log->shared, log->shared_bytes);
    if (log->fd_shared >= 0)
        close(log->fd_shared);
    if (log->fd >= 0)
        close(log->fd);
    if (log->fd_lock >= 0)
        close(log->fd_lock); /* after the map is gone */
    free(log);
}

/* ---- what is on disk ------------------------------------------------------------------------------------------ */

typedef struct scan {
    const gw_log *log;
    const gw_slot_page *slot;
    const uint64_t *secret;
    uint64_t record_bytes_max, limit;
    uint64_t mix[GW_EPOCHS_MAX]; /* of the slot's ranges */
    uint64_t other_epoch, other_mix;
} scan;

static uint64_t mix_of(scan *s, uint64_t epoch)
{
    for (unsigned i = s->slot->epochs; i-- > 0;)
        if (s->slot->range[i].epoch == epoch)
            return s->mix[i];
    if (s->other_epoch != epoch) {
        s->other_epoch = epoch;
        s->other_mix = gw_mix(s->secret, epoch);
    }
    return s->other_mix;
}

/* Size of the whole record at p, or 0. */
static uint64_t whole(scan *s, uint64_t p, bool *data)
{
    const gw_header *header = (const gw_header *)(const void *)gw_word(s->log, p);
    if (!header->marker || !gw_epoch_ok(s->slot->range, s->slot->epochs, p, header->epoch))
        return 0;
    uint64_t kind = header->marker ^ mix_of(s, header->epoch) ^ p, size = header->size;
    if (kind > GW_PAD || kind != header->kind || size < sizeof *header || size % 8 || size > s->limit - p)
        return 0;
    if (kind != GW_PAD) {
        uint64_t used = sizeof *header + (uint64_t)header->device_id_bytes + header->body_bytes;
        if (size != ((used + 7) & ~7ull) || size > s->record_bytes_max)
            return 0;
    }
    if (header->crc != gw_record_crc(header, (const uint8_t *)(header + 1), p))
        return 0;
    *data = kind == GW_DATA;
    return size;
}

typedef struct hole {
    uint64_t from, to;
} hole;

typedef struct holes {
    hole *list;
    size_t count, room;
} holes;

static bool hole_add(holes *h, uint64_t from, uint64_t to)
{
    if (h->count == h->room) {
        size_t room = h->room ? 2 * h->room : 16;
        hole *list = realloc(h->list, room * sizeof *list);
        if (!list)
            return false;
        h->list = list;
        h->room = room;
    }
    h->list[h->count++] = (hole){from, to};
    return true;
}

static void corrupt_add(gw_recovery *report, uint64_t from, uint64_t to)
{
    if (report->corrupt_count < GW_DAMAGE_MAX)
        report->corrupt[report->corrupt_count] = (gw_damage){from, to};
    report->corrupt_count++;
    report->corrupt_bytes += to - from;
}

/* DATA records below E: those below the least cursor, which its sink has counted, and those that were found. A sink
 * that stands further on may have counted some that are lost now: its ordinal and base step back by as many, so that
 * what it has published stays explained. */
static uint64_t end_ordinal(gw_slot_page *slot, const gw_recovery *report, const uint64_t *records_above)
{
    uint64_t least = gw_slot_kept(slot), end = report->records;
    for (unsigned i = 0; i < slot->sinks; i++)
        if (slot->sink[i].cursor.lsn == least)
            end = slot->sink[i].cursor.ordinal + report->records;
    for (unsigned i = 0; i < slot->sinks; i++) {
        if (slot->sink[i].cursor.lsn < least) /* an optional one: what it missed is no loss of the log's */
            continue;
        uint64_t lost = slot->sink[i].cursor.ordinal + records_above[i] - end;
        slot->sink[i].cursor.ordinal -= lost;
        slot->sink[i].cursor.base -= lost;
    }
    return end;
}

static scan scan_of(const gw_log *log, const gw_slot_page *slot, const uint64_t secret[2], uint64_t limit)
{
    scan s = {.log = log, .slot = slot, .secret = secret, .limit = limit};
    s.record_bytes_max = gw_record_bytes_max_of(log->mask + 1);
    for (unsigned i = 0; i < slot->epochs; i++)
        s.mix[i] = gw_mix(secret, slot->range[i].epoch);
    s.other_mix = gw_mix(secret, 0);
    return s;
}

/* Whole records lead from `from` to `to`. */
static bool leads_to(const gw_log *log, const gw_slot_page *slot, const uint64_t secret[2], uint64_t from, uint64_t to)
{
    scan s = scan_of(log, slot, secret, to);
    bool data;
    for (uint64_t p = from, size; p < to; p += size)
        if (to - p < GW_RECORD_HEADER_BYTES || !(size = whole(&s, p, &data)))
            return false;
    return true;
}

/* Optional sinks whose place is not whole any more go on where everything is. `end`: the ordinal of E. */
static void move_lapped(const gw_log *log, gw_slot_page *slot, const uint64_t secret[2], const gw_recovery *report,
                        uint64_t end)
{
    uint64_t c = gw_slot_kept(slot), ordinal = end - report->records;
    for (unsigned i = 0; i < slot->sinks; i++) {
        gw_cursor *cursor = &slot->sink[i].cursor;
        if (cursor->lsn >= c ||
            (report->start - cursor->lsn <= log->mask + 1 && leads_to(log, slot, secret, cursor->lsn, c)))
            continue;
        if (ordinal > cursor->ordinal)
            cursor->skipped += ordinal - cursor->ordinal;
        else
            cursor->base += ordinal - cursor->ordinal; /* not what a gateway writes; at least the books balance */
        cursor->lsn = c;
        cursor->ordinal = ordinal;
    }
}

/* The table above. `covered`: what an earlier recovery had found to be holes. */
static bool examine(gw_log *log, const gw_slot_page *slot, const uint64_t secret[2], gw_recovery *report, holes *found,
                    holes *covered, uint64_t *records_above)
{
    uint64_t c = gw_slot_kept(slot), w = slot->watermark;
    scan s = scan_of(log, slot, secret, c + log->mask + 1);
    *report = (gw_recovery){.watermark = w, .epoch = slot->epoch};

    uint64_t p = c, last = s.limit - GW_RECORD_HEADER_BYTES;
    while (p <= last) {
        bool data;
        uint64_t size = whole(&s, p, &data);
        if (size) {
            report->records += data;
            for (unsigned i = 0; i < slot->sinks; i++)
                records_above[i] += data && p >= slot->sink[i].cursor.lsn;
            report->bytes += data ? size : 0;
            const gw_header *header = (const gw_header *)(const void *)gw_word(log, p);
            if (header->kind == GW_PAD && header->flags && !hole_add(covered, p, p + size))
                return false;
            p += size;
            continue;
        }
        uint64_t x = p + 8;
        while (x <= last && !whole(&s, x, &data))
            x += 8;
        if (x > last)
            break;
        if (!hole_add(found, p, x))
            return false;
        if (p < w)
            corrupt_add(report, p, x < w ? x : w);
        if (x > w)
            report->torn_bytes += x - (p > w ? p : w);
        p = x;
    }
    report->end = p;
    if (p < w)
        corrupt_add(report, p, w);
    uint64_t start = p > w ? p : w;
    for (unsigned i = 0; i < slot->sinks; i++)
        if (slot->sink[i].cursor.lsn > start)
            start = slot->sink[i].cursor.lsn;
    if (slot->range[slot->epochs - 1].start > start)
        start = slot->range[slot->epochs - 1].start;
    report->start = start;
    return start == p || hole_add(found, p, start);
}

/* The whole file through the page cache in small folios (see above). */
static int read_through(int fd, uint64_t capacity)
{
    enum { CHUNK = 256 << 10 };
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
    uint8_t *buffer = malloc(CHUNK);
    if (!buffer)
        return -1;
    uint64_t total = GW_RING_OFFSET + capacity;
    for (uint64_t at = 0; at < total;) {
        ssize_t n = pread(fd, buffer, CHUNK, (off_t)at);
        if (n <= 0) {
            free(buffer);
            if (n == 0)
                errno = EIO;
            return -1;
        }
        at += (uint64_t)n;
    }
    free(buffer);
    return 0;
}

/* *unknown: how many epochs may have begun that the slot does not know. Starts and syncs write the two pages in turn:
 * when the other one is damaged, it may have been the newer one and have begun the next epoch. */
static gw_status newest_slot(const gw_log *log, gw_slot_page *slot, unsigned *unknown, gw_error *error)
{
    gw_slot_page other;
    bool a = gw_slot_read(log, 0, slot), b = gw_slot_read(log, 1, &other);
    if (!a && !b)
        return gw_fail(error, GW_NOT_A_LOG, 0, 0, "both slot pages are damaged: the cursors are lost");
    if (!a || (b && other.sequence > slot->sequence))
        *slot = other;
    *unknown = a != b && slot->sequence > 1;
    return GW_OK;
}

/* ---- shared memory -------------------------------------------------------------------------------------------- */

/* At an address where the index may lie in large pages. */
static gw_shared *map_shared(size_t bytes, int fd)
{
    uint8_t *room =
        mmap(NULL, bytes + GW_INDEX_ALIGNMENT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return MAP_FAILED;
    size_t before = (size_t)(-(uintptr_t)room & (GW_INDEX_ALIGNMENT - 1));
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void *shared = mmap(room + before, bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
    if (shared == MAP_FAILED) {
        munmap(room, bytes + GW_INDEX_ALIGNMENT);
        return MAP_FAILED;
    }
    if (before)
        munmap(room, before);
    munmap(room + before + bytes, GW_INDEX_ALIGNMENT - before); /* bytes are whole pages */
    return shared;
}

/* This process's view: the words, and behind them the index. */
static void take_shared(gw_log *log, gw_shared *shared)
{
    log->shared = shared;
    log->shared_bytes = shared->bytes;
    madvise(shared, log->shared_bytes, MADV_DONTFORK);
    if (log->shared_bytes > GW_INDEX_OFFSET) {
        shared->index_buckets = gw_index_buckets(shared->capacity);
        log->heads = (_Atomic uint64_t *)(void *)((uint8_t *)shared + GW_INDEX_OFFSET);
        log->prevs = log->heads + shared->index_buckets;
    }
}

static gw_status shared_new(gw_log *log, const gw_identity_page *identity, const gw_slot_page *slot, gw_error *error)
{
    int fd = -1;
    size_t bytes = GW_INDEX_OFFSET + (log->read_only ? 0 : gw_index_bytes(identity->capacity));
    if (!log->read_only) {
        fd = memfd_create("gateway-log", MFD_CLOEXEC);
        /* allocated now: a store into memory that is not there would be SIGBUS, in the middle of a claim */
        int full = fd < 0 || ftruncate(fd, (off_t)bytes) ? errno : posix_fallocate(fd, 0, (off_t)bytes);
        if (full) {
            if (fd >= 0)
                close(fd);
            return gw_fail(error, GW_ERRNO, full, 0,
                           "shared memory for the log (its index takes a quarter of log.capacity_bytes)");
        }
    }
    gw_shared *shared = map_shared(bytes, fd);
    if (shared == MAP_FAILED) {
        int why = errno;
        if (fd >= 0)
            close(fd);
        return gw_fail(error, GW_ERRNO, why, 0, "shared memory for the log");
    }
    log->fd_shared = fd;
    shared->magic = GW_LOG_MAGIC;
    shared->bytes = bytes;
    shared->capacity = identity->capacity;
    take_shared(log, shared);
    shared->record_bytes_max = identity->record_bytes_max;
    shared->identity = identity->identity;
    memcpy(shared->secret, identity->secret, sizeof shared->secret);
    for (unsigned i = 0; i < 2; i++) { /* one secret, three uses that must not meet */
        shared->index_key[i] = identity->secret[i] ^ 0x696e646578000000ull;
        shared->receipt_key[i] = identity->secret[i] ^ 0x7265636569707400ull;
    }
    atomic_store_explicit(&shared->high_water, identity->capacity, memory_order_relaxed);
    atomic_store_explicit(&shared->low_water, identity->capacity, memory_order_relaxed);
    shared->epoch = slot->epoch;
    shared->epochs = slot->epochs;
    shared->sinks = slot->sinks;
    shared->optional = slot->optional;
    memcpy(shared->range, slot->range, sizeof shared->range);
    memcpy(shared->lost_from, slot->lost_from, sizeof shared->lost_from);
    shared->mix = gw_mix(identity->secret, slot->epoch);
    for (unsigned i = 0; i < slot->sinks; i++) {
        memcpy(shared->sink_name[i], slot->sink[i].name, GW_SINK_NAME_BYTES);
        gw_versioned_store(&shared->cursor[i], &slot->sink[i].cursor);
    }
    atomic_store_explicit(&shared->slot_sequence, slot->sequence, memory_order_relaxed);
    return GW_OK;
}

static void shared_positions(gw_log *log, uint64_t start, uint64_t ordinal, uint64_t durable, uint64_t reclaim)
{
    gw_shared *shared = log->shared;
    gw_cursor committed = {.lsn = start, .ordinal = ordinal};
    shared->start_lsn = start;
    gw_versioned_store(&shared->committed, &committed);
    atomic_store_explicit(&shared->tail, start, memory_order_release);
    atomic_store_explicit(&shared->durable, durable, memory_order_release);
    atomic_store_explicit(&shared->reclaim, reclaim, memory_order_release);
    atomic_store_explicit(&shared->state, GW_RUNNING, memory_order_release);
}

/* ---- open ----------------------------------------------------------------------------------------------------- */

/* Positions at which a PAD must end: a cursor inside a PAD would point into nothing. */
static uint64_t next_cut(const gw_slot_page *slot, uint64_t from, uint64_t to)
{
    uint64_t cut = to;
    for (unsigned i = 0; i < slot->sinks; i++)
        if (slot->sink[i].cursor.lsn > from && slot->sink[i].cursor.lsn < cut)
            cut = slot->sink[i].cursor.lsn;
    for (unsigned i = 0; i < slot->epochs; i++)
        if (slot->range[i].start > from && slot->range[i].start < cut)
            cut = slot->range[i].start;
    if (slot->watermark > from && slot->watermark < cut)
        cut = slot->watermark;
    return cut;
}

static bool cover_holes(gw_log *log, const gw_slot_page *slot, const uint64_t secret[2], const holes *found)
{
    for (size_t i = 0; i < found->count; i++)
        for (uint64_t from = found->list[i].from, to; from < found->list[i].to; from = to) {
            to = next_cut(slot, from, found->list[i].to);
            if (to - from < GW_RECORD_HEADER_BYTES)
                return false;
            uint64_t epoch = gw_epoch_at(slot->range, slot->epochs, from);
            gw_pad_write(log, from, to, GW_PAD_LOST, epoch, gw_mix(secret, epoch));
        }
    return true;
}

/* Where events of an epoch were lost, for as long as it is known: their receipts must never say "finished". */
static void note_lost(gw_slot_page *slot, const holes *found)
{
    for (size_t i = 0; i < found->count; i++)
        for (unsigned k = 0; k < slot->epochs; k++) {
            uint64_t end = k + 1 < slot->epochs ? slot->range[k + 1].start : UINT64_MAX;
            uint64_t from = found->list[i].from > slot->range[k].start ? found->list[i].from : slot->range[k].start;
            if (from < found->list[i].to && from < end && (!slot->lost_from[k] || from < slot->lost_from[k]))
                slot->lost_from[k] = from;
        }
}

static gw_status recover(gw_log *log, const gw_identity_page *identity, const gw_sinks *sinks, bool accept_corruption,
                         gw_recovery *report, gw_error *error)
{
    gw_dirty_slots(log);
    if (fdatasync(log->fd))
        return gw_fail(error, GW_ERRNO, errno, 0, "fdatasync of the log before recovery");
    gw_slot_page slot;
    unsigned unknown;
    gw_status status = newest_slot(log, &slot, &unknown, error);
    if (status != GW_OK)
        return status;
    holes found = {0}, covered = {0};
    uint64_t records_above[GW_SINKS_MAX] = {0}; /* each sink's cursor */
    if (!examine(log, &slot, identity->secret, report, &found, &covered, records_above)) {
        free(found.list);
        free(covered.list);
        return gw_fail(error, GW_ERRNO, ENOMEM, 0, "recovery");
    }
    if (report->corrupt_count && !accept_corruption) {
        free(found.list);
        free(covered.list);
        return gw_fail(error, GW_CORRUPT, 0, report->corrupt[0].from, "damage below the durable watermark");
    }
    uint64_t ordinal = end_ordinal(&slot, report, records_above);
    move_lapped(log, &slot, identity->secret, report, ordinal);
    uint64_t durable = slot.watermark;
    status = gw_slot_take_sinks(&slot, sinks, report->start, ordinal, error);
    if (status == GW_OK && !cover_holes(log, &slot, identity->secret, &found))
        status = gw_fail(error, GW_CORRUPT, 0, report->end, "a hole too small for a record");
    note_lost(&slot, &found);
    note_lost(&slot, &covered); /* by a recovery that was cut before its slot was on the disk */
    free(found.list);
    free(covered.list);
    if (status != GW_OK)
        return status;
    gw_dirty(log, durable, report->start);
    gw_slot_open_epoch(&slot, unknown, report->start);
    report->epoch = slot.epoch;
    gw_slot_write(log, &slot, slot.sequence + 1);
    status = shared_new(log, identity, &slot, error);
    if (status != GW_OK)
        return status;
    if (fdatasync(log->fd))
        return gw_fail(error, GW_ERRNO, errno, 0, "fdatasync of the log after recovery");
    shared_positions(log, report->start, ordinal, report->start, gw_slot_kept(&slot));
    gw_index_rebuild(log, gw_slot_kept(&slot), report->start);
    return GW_OK;
}

/* Identity, page cache, map: what stands in log->fd becomes readable. */
static gw_status load(gw_log *log, gw_identity_page *identity, gw_error *error)
{
    gw_status status = read_identity(log->fd, identity, error);
    if (status != GW_OK)
        return status;
    if (read_through(log->fd, identity->capacity))
        return gw_fail(error, GW_ERRNO, errno, 0, "reading the log");
    return gw_map(log, log->fd, identity->capacity, identity->record_bytes_max, error);
}

gw_status gw_log_open(const char *path, int fd_lock, const gw_sinks *sinks, bool accept_corruption, gw_log **out,
                      gw_recovery *report, gw_error *error)
{
    if (flock(fd_lock, LOCK_EX | LOCK_NB))
        return errno == EWOULDBLOCK ? gw_fail(error, GW_LOCKED, EWOULDBLOCK, 0, "another process holds the log")
                                    : gw_fail(error, GW_ERRNO, errno, 0, "locking the log");
    struct stat locked, opened;
    gw_log *log = new_handle();
    if (!log)
        return gw_fail(error, GW_ERRNO, ENOMEM, 0, "opening the log");
    gw_identity_page identity;
    gw_status status = GW_OK;
    log->fd = open(path, O_RDWR | O_CLOEXEC);
    log->fd_lock = fcntl(fd_lock, F_DUPFD_CLOEXEC, 3); /* the lock outlives the caller's descriptor, as the map does */
    if (log->fd < 0 || log->fd_lock < 0 || fstat(log->fd, &opened) || fstat(fd_lock, &locked))
        status = gw_fail(error, GW_ERRNO, errno, 0, "opening the log");
    else if (opened.st_ino != locked.st_ino || opened.st_dev != locked.st_dev)
        status = gw_fail(error, GW_ERRNO, EINVAL, 0, "the lock's descriptor is not of this file");
    if (status == GW_OK)
        status = load(log, &identity, error);
    if (status == GW_OK)
        status = recover(log, &identity, sinks, accept_corruption, report, error);
    if (status != GW_OK) {
        gw_log_close(log);
        return status;
    }
    *out = log;
    return GW_OK;
}

gw_status gw_log_scan(const char *path, gw_log **out, gw_recovery *report, gw_error *error)
{
    gw_log *log = new_handle();
    if (!log)
        return gw_fail(error, GW_ERRNO, ENOMEM, 0, "opening the log");
    log->read_only = true;
    gw_identity_page identity;
    gw_slot_page slot;
    unsigned unknown;
    holes found = {0}, covered = {0};
    gw_status status = GW_OK;
    log->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (log->fd < 0)
        status = gw_fail(error, GW_ERRNO, errno, 0, "opening the log");
    if (status == GW_OK)
        status = load(log, &identity, error);
    if (status == GW_OK)
        status = newest_slot(log, &slot, &unknown, error);
    uint64_t ordinal = 0, records_above[GW_SINKS_MAX] = {0};
    if (status == GW_OK && !examine(log, &slot, identity.secret, report, &found, &covered, records_above))
        status = gw_fail(error, GW_ERRNO, ENOMEM, 0, "scanning the log");
    free(found.list);
    free(covered.list);
    if (status == GW_OK) {
        ordinal = end_ordinal(&slot, report, records_above);
        move_lapped(log, &slot, identity.secret, report, ordinal);
        status = shared_new(log, &identity, &slot, error);
    }
    if (status != GW_OK) {
        gw_log_close(log);
        return status;
    }
    shared_positions(log, report->end, ordinal, slot.watermark, gw_slot_kept(&slot));
    *out = log;
    return GW_OK;
}

gw_status gw_log_attach(int fd_lock, int fd_shared, gw_log **out, gw_error *error)
{
    gw_log *log = new_handle();
    if (!log)
        return gw_fail(error, GW_ERRNO, ENOMEM, 0, "attaching to the log");
    char path[64];
    struct stat stat;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd_lock);
    /* an open file description of its own: the lock's one is the witness and is synced at takeover only */
    log->fd = open(path, O_RDWR | O_CLOEXEC);
    log->fd_shared = fcntl(fd_shared, F_DUPFD_CLOEXEC, 3);
    log->fd_lock = fcntl(fd_lock, F_DUPFD_CLOEXEC, 3);
    gw_status status = GW_OK;
    if (log->fd < 0 || log->fd_lock < 0 || log->fd_shared < 0 || fstat(fd_shared, &stat))
        status = gw_fail(error, GW_ERRNO, errno, 0, "attaching to the log");
    else if ((uint64_t)stat.st_size < GW_INDEX_OFFSET)
        status = gw_fail(error, GW_NOT_A_LOG, 0, 0, "shared memory of another version");
    if (status == GW_OK) {
        gw_shared *shared = map_shared((size_t)stat.st_size, fd_shared);
        if (shared == MAP_FAILED)
            status = gw_fail(error, GW_ERRNO, errno, 0, "attaching to the log");
        else if (shared->magic != GW_LOG_MAGIC || shared->bytes != (uint64_t)stat.st_size ||
                 shared->bytes != GW_INDEX_OFFSET + gw_index_bytes(shared->capacity)) {
            munmap(shared, (size_t)stat.st_size);
            status = gw_fail(error, GW_NOT_A_LOG, 0, 0, "shared memory of another version");
        } else
            take_shared(log, shared);
    }
    gw_identity_page identity;
    if (status == GW_OK)
        status = read_identity(log->fd, &identity, error);
    if (status == GW_OK && identity.identity != log->shared->identity)
        status = gw_fail(error, GW_NOT_A_LOG, 0, 0, "shared memory of another log");
    if (status == GW_OK) {
        status = gw_map(log, log->fd, log->shared->capacity, log->shared->record_bytes_max, error);
    }
    if (status != GW_OK) {
        gw_log_close(log);
        return status;
    }
    *out = log;
    return GW_OK;
}
