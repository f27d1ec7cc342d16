/* fuzz_log.c - any file: scan, recovery and read end in a verdict; what was readable before recovery is readable after
 * it; a recovered log is recovered again without a change, also after it was written to.
 *
 * Sources: _native/gw_crc32c.c _native/gw_log*.c
 *
 * An input describes the file, since a file has a megabyte: byte 0 are bits (see `enum`), then pieces, each laid over
 * zeros and over those before it:
 *
 *   0      1          5        7
 *   +------+----------+--------+--------
 *   | seal | offset   | bytes  | bytes...      little-endian
 *   +------+----------+--------+--------
 *
 * A piece's seal says which checksum is made right once all pieces lie there, so that changed bytes get behind it, and
 * so that inputs stay good when the format's checksums change. The last piece may be cut short.
 *
 * Files whose newest slot no gateway writes (positions that are no positions) must not crash; nothing else is asked. */
#include "gw_log_shared.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define FUZZ_MUTATOR
#include "fuzz.h"
#include "gw_crc32c.h"

enum { ONE_SINK_MORE = 1, ONE_SINK_LESS = 2, APPEND = 4 };
enum seal {
    AS_IT_IS,
    IDENTITY,
    SLOT,
    RECORD,         /* size, checksum and marker */
    RECORD_OF_SIZE, /* checksum and marker */
    FORMER_LAP,     /* the same, of a capacity earlier */
    MARKER,         /* marker only */
    SEALS
};
enum { PIECE_HEADER = 7, PIECES_MAX = 256 };
#define CAPACITY GW_CAPACITY_MIN
#define FILE_BYTES (GW_RING_OFFSET + CAPACITY)

/* ---- from an input to a file ---------------------------------------------------------------------------------- */

typedef struct piece {
    uint8_t seal;
    uint32_t offset, bytes, at; /* at: where it stands in the input */
} piece;

static unsigned pieces_of(const uint8_t *data, size_t bytes, piece *list)
{
    unsigned n = 0;
    for (size_t at = 1; at + PIECE_HEADER <= bytes && n < PIECES_MAX; n++) {
        piece p = {.seal = data[at] % SEALS, .at = (uint32_t)at};
        uint16_t length;
        memcpy(&p.offset, data + at + 1, 4);
        memcpy(&length, data + at + 5, 2);
        p.offset %= FILE_BYTES;
        at += PIECE_HEADER;
        p.bytes = length < bytes - at ? length : (uint32_t)(bytes - at);
        if (p.seal >= RECORD)
            p.offset &= ~7u;
        at += p.bytes;
        list[n] = p;
    }
    return n;
}

static void page_seal(uint8_t *page)
{
    _Static_assert(offsetof(gw_identity_page, crc) == offsetof(gw_slot_page, crc), "one place for both");
    gw_slot_page *slot = (gw_slot_page *)(void *)page;
    slot->crc = 0;
    slot->crc = gw_crc32c(0, page, GW_PAGE);
}

static bool page_is_whole(const gw_slot_page *page)
{
    gw_slot_page copy = *page;
    page_seal((uint8_t *)&copy);
    return page->magic == GW_SLOT_MAGIC && page->version == GW_LOG_VERSION && copy.crc == page->crc &&
           page->epochs >= 1 && page->epochs <= GW_EPOCHS_MAX && page->sinks <= GW_SINKS_MAX;
}

/* The slot that counts; NULL: both are damaged. */
static const gw_slot_page *newest(const uint8_t *file)
{
    const gw_slot_page *a = (const gw_slot_page *)(const void *)(file + GW_PAGE), *b = a + 1;
    const bool whole_a = page_is_whole(a), whole_b = page_is_whole(b);
    if (whole_a && whole_b)
        return b->sequence > a->sequence ? b : a;
    return whole_a ? a : whole_b ? b : NULL;
}

static uint64_t least_cursor(const gw_slot_page *slot)
{
    uint64_t least = ~0ull;
    for (unsigned i = 0; i < slot->sinks; i++)
        if (!(slot->optional >> i & 1) && slot->sink[i].cursor.lsn < least)
            least = slot->sink[i].cursor.lsn;
    return least == ~0ull ? slot->watermark : least;
}

/* The last epoch of which records can be there: a page that is damaged may have begun one that the other one, which
 * counts now, does not know. */
static uint64_t last_epoch(const uint8_t *file)
{
    const gw_slot_page *a = (const gw_slot_page *)(const void *)(file + GW_PAGE), *slot = newest(file);
    return slot ? slot->epoch + (slot->sequence > 1 && page_is_whole(a) != page_is_whole(a + 1)) : 1;
}

static void record_seal(uint8_t *file, const piece *p, uint64_t c, uint64_t epoch_max)
{
    static uint8_t whole[GW_RECORD_HEADER_BYTES + 255 + CAPACITY];
    if (p->offset < GW_RING_OFFSET)
        return;
    const uint64_t in_ring = p->offset - GW_RING_OFFSET, secret_at = offsetof(gw_identity_page, secret);
    const uint64_t lsn = c + ((in_ring - c) & (CAPACITY - 1)) - (p->seal == FORMER_LAP ? CAPACITY : 0);
    for (unsigned i = 0; i < GW_RECORD_HEADER_BYTES; i++) /* a piece may end with the file: the ring goes on */
        whole[i] = file[GW_RING_OFFSET + ((in_ring + i) & (CAPACITY - 1))];
    gw_header *header = (gw_header *)(void *)whole;
    if (header->epoch > epoch_max) /* nobody has written it */
        return;
    header->body_bytes %= CAPACITY; /* else no record could be meant */
    const uint64_t used = GW_RECORD_HEADER_BYTES + (uint64_t)header->device_id_bytes + header->body_bytes;
    for (uint64_t i = GW_RECORD_HEADER_BYTES; i < used; i++)
        whole[i] = file[GW_RING_OFFSET + ((in_ring + i) & (CAPACITY - 1))];
    if (p->seal == RECORD)
        header->size = (used + 7) & ~7ull;
    header->kind %= 4;
    if (p->seal != MARKER)
        header->crc = gw_record_crc(header, (const uint8_t *)(header + 1), lsn);
    uint64_t secret[2];
    memcpy(secret, file + secret_at, sizeof secret);
    header->marker = (lsn | header->kind) ^ gw_mix(secret, header->epoch);
    for (unsigned i = 0; i < GW_RECORD_HEADER_BYTES; i++)
        file[GW_RING_OFFSET + ((in_ring + i) & (CAPACITY - 1))] = whole[i];
}

static void expand(const uint8_t *data, size_t bytes, uint8_t *file)
{
    static piece list[PIECES_MAX];
    const unsigned n = pieces_of(data, bytes, list);
    memset(file, 0, FILE_BYTES);
    for (unsigned i = 0; i < n; i++) {
        const size_t room = FILE_BYTES - list[i].offset, first = list[i].bytes < room ? list[i].bytes : room;
        memcpy(file + list[i].offset, data + list[i].at + PIECE_HEADER, first);
        memcpy(file + GW_RING_OFFSET, data + list[i].at + PIECE_HEADER + first, list[i].bytes - first);
    }
    for (unsigned i = 0; i < n; i++)
        if (list[i].seal == IDENTITY || list[i].seal == SLOT)
            page_seal(file + (list[i].seal == IDENTITY ? 0 : list[i].offset / GW_PAGE == 2 ? 2 : 1) * GW_PAGE);
    const gw_slot_page *slot = newest(file);
    const uint64_t c = slot ? least_cursor(slot) : GW_FIRST_LSN, epoch_max = last_epoch(file);
    for (unsigned i = 0; i < n; i++)
        if (list[i].seal >= RECORD)
            record_seal(file, &list[i], c, epoch_max);
}

/* ---- what is asked of a file ---------------------------------------------------------------------------------- */

/* Positions as a gateway writes them. */
static bool is_sane(const gw_slot_page *slot)
{
    const uint64_t c = least_cursor(slot), limit = c + CAPACITY, last = slot->range[slot->epochs - 1].start;
    bool sane = c >= GW_FIRST_LSN && c % 8 == 0 && c < 1ull << 60 && slot->watermark % 8 == 0;
    sane &= slot->watermark >= GW_FIRST_LSN && slot->watermark <= limit && last <= limit;
    sane &= slot->range[slot->epochs - 1].epoch == slot->epoch && slot->epoch < 1u << 31;
    sane &= slot->sequence < 1ull << 60;
    for (unsigned i = 0; i < slot->epochs; i++) {
        sane &= slot->range[i].start % 8 == 0 && slot->range[i].epoch >= 1;
        sane &=
            !i || (slot->range[i].start > slot->range[i - 1].start && slot->range[i].epoch > slot->range[i - 1].epoch);
    }
    for (unsigned i = 0; i < slot->sinks; i++) {
        const gw_slot_cursor *s = &slot->sink[i];
        sane &= s->cursor.lsn % 8 == 0 && s->cursor.lsn <= limit && s->cursor.lsn >= GW_FIRST_LSN && s->name[0];
        for (unsigned k = 0; k < i; k++)
            sane &= strncmp(s->name, slot->sink[k].name, GW_SINK_NAME_BYTES) != 0;
    }
    const uint32_t all = (1u << slot->sinks) - 1;
    return sane && (!all || (slot->optional & all) != all);
}

/* ---- the table in gw_log_recover.c, a second time --------------------------------------------------------------- */

typedef struct found {
    uint64_t end, records, torn_bytes, corrupt_bytes;
} found;

static uint8_t at_ring(const uint8_t *file, uint64_t lsn)
{
    return file[GW_RING_OFFSET + (lsn & (CAPACITY - 1))];
}

/* Size of the whole record at p, and whether it is DATA; 0: there is none. */
static uint64_t whole_at(const uint8_t *file, const gw_slot_page *slot, uint64_t p, uint64_t limit, bool *data)
{
    static uint8_t record[CAPACITY / 8];
    gw_header h;
    memcpy(record, file + GW_RING_OFFSET + (p & (CAPACITY - 1)), 8);
    memcpy(&h.marker, record, 8);
    if (!h.marker)
        return 0;
    for (unsigned i = 8; i < GW_RECORD_HEADER_BYTES; i++)
        record[i] = at_ring(file, p + i);
    memcpy(&h, record, sizeof h);
    uint64_t epoch = 0, secret[2], used = GW_RECORD_HEADER_BYTES + (uint64_t)h.device_id_bytes + h.body_bytes;
    for (unsigned i = 0; i < slot->epochs; i++)
        if (slot->range[i].start <= p)
            epoch = slot->range[i].epoch;
    memcpy(secret, file + offsetof(gw_identity_page, secret), sizeof secret);
    const uint64_t kind = h.marker ^ gw_mix(secret, h.epoch) ^ p;
    if ((epoch ? h.epoch != epoch : h.epoch >= slot->range[0].epoch) || kind != h.kind || kind > GW_PAD)
        return 0;
    if (h.size % 8 || h.size < GW_RECORD_HEADER_BYTES || h.size > limit - p)
        return 0;
    if (kind != GW_PAD && (h.size > sizeof record || h.size < used || h.size - used >= 8))
        return 0;
    for (uint64_t i = GW_RECORD_HEADER_BYTES; kind != GW_PAD && i < used; i++)
        record[i] = at_ring(file, p + i);
    *data = kind == GW_DATA;
    return h.crc == gw_record_crc(&h, record + GW_RECORD_HEADER_BYTES, p) ? h.size : 0;
}

static found table_of(const uint8_t *file, const gw_slot_page *slot)
{
    const uint64_t c = least_cursor(slot), limit = c + CAPACITY, w = slot->watermark;
    found f = {.end = c};
    for (uint64_t p = c, size; p + GW_RECORD_HEADER_BYTES <= limit; p += size ? size : 8) {
        bool data = false;
        size = whole_at(file, slot, p, limit, &data);
        if (!size)
            continue;
        f.records += data;
        f.torn_bytes += p > w ? p - (f.end > w ? f.end : w) : 0;
        f.corrupt_bytes += f.end < w ? (p < w ? p : w) - f.end : 0;
        f.end = p + size;
    }
    f.corrupt_bytes += f.end < w ? w - f.end : 0;
    return f;
}

/* ---- what is read ------------------------------------------------------------------------------------------------ */

typedef struct content {
    uint64_t from, next;      /* what was read */
    uint64_t records, digest; /* of DATA */
    uint64_t marks; /* bit i: a record begins at persisted[i], or lies over it and was there before recovery */
} content;

/* Positions that the newest slot names: no PAD may cover one. */
static uint64_t persisted[1 + GW_SINKS_MAX + GW_EPOCHS_MAX];
static unsigned persisted_count;

static uint64_t digest(uint64_t so_far, const void *bytes, size_t n)
{
    return so_far * 0x9e3779b97f4a7c15ull + gw_crc32c((uint32_t)n, bytes, n);
}

/* Every DATA record from `from` to committed. With `holes`, what is no record is searched for the next one, as recovery
 * does it; else there is none. */
static content content_of(const gw_log *log, uint64_t from, bool holes)
{
    content c = {.from = from};
    const uint64_t committed = gw_log_committed(log);
    for (c.next = from; c.next < committed;) {
        gw_record r;
        const gw_status status = gw_log_read(log, c.next, &r);
        if (status != GW_OK) {
            MUST(holes && status == GW_CORRUPT);
            c.next += 8;
            continue;
        }
        MUST(r.lsn == c.next && r.size >= GW_RECORD_HEADER_BYTES && r.size <= committed - c.next && r.kind <= GW_PAD);
        c.next += r.size;
        for (unsigned i = 0; i < persisted_count; i++)
            if (persisted[i] == r.lsn || ((holes || r.kind != GW_PAD) && persisted[i] > r.lsn && persisted[i] < c.next))
                c.marks |= 1ull << i;
        if (r.kind != GW_DATA)
            continue;
        c.records++;
        const uint64_t words[] = {r.lsn, r.size, r.received_at_ns, r.seq, r.boot, r.epoch};
        const uint8_t small[] = {r.flags, r.splice, r.device_id_bytes, r.dead};
        c.digest = digest(digest(c.digest, words, sizeof words), small, sizeof small);
        c.digest = digest(digest(c.digest, r.device_id, r.device_id_bytes), r.body, r.body_bytes);
    }
    gw_record r;
    MUST(gw_log_read(log, committed, &r) == GW_EMPTY);
    return c;
}

static struct {
    char path[64];
    int fd;
    uint8_t *bytes;
} file;

typedef struct opened {
    gw_status status;
    gw_log *log;
    gw_recovery report;
    gw_error error;
} opened;

static uint32_t optional; /* as in the newest slot */

static opened open_file(const char *const *sinks, bool accept_corruption)
{
    opened o = {0};
    const int fd_lock = open(file.path, O_RDWR | O_CLOEXEC);
    MUST(fd_lock >= 0);
    o.status = gw_log_open(file.path, fd_lock, &(gw_sinks){.names = sinks, .optional = optional}, accept_corruption,
                           &o.log, &o.report, &o.error);
    MUST(o.status == GW_OK || o.status == GW_CORRUPT || o.status == GW_NOT_A_LOG || o.status == GW_ERRNO);
    MUST((o.status == GW_OK) == (o.log != NULL));
    close(fd_lock);
    return o;
}

/* The new run's positions: everything that was found lies below the start, and is on the disk. */
static void look_at(const opened *o)
{
    const uint64_t start = o->report.start;
    MUST(gw_log_tail(o->log) == start && gw_log_committed(o->log) == start && gw_log_durable(o->log) == start);
    MUST(gw_log_reclaim(o->log) == least_cursor(newest(file.bytes)) && gw_log_state(o->log) == GW_RUNNING);
}

static void append_one(gw_log *log, uint64_t number)
{
    gw_producer *producer;
    bool changed;
    gw_error error;
    uint64_t lsn, tail = gw_log_tail(log);
    static const uint8_t body[] = "{\"metrics\":{}}", device_id[] = "dev";
    const gw_event event = {.device_id = device_id,
                            .device_id_bytes = sizeof device_id - 1,
                            .body = body,
                            .body_bytes = sizeof body - 1,
                            .received_at_ns = number};
    MUST(gw_producer_open(log, &producer) == GW_OK);
    const gw_status status = gw_producer_append(producer, &event, &lsn);
    gw_producer_close(producer);
    const uint64_t size = (GW_RECORD_HEADER_BYTES + sizeof body - 1 + sizeof device_id - 1 + 7) & ~7ull;
    MUST(status == (tail + size > gw_log_reclaim(log) + CAPACITY ? GW_FULL : GW_OK));
    MUST(gw_log_follow(log, 0, 0) == tail + (status == GW_OK ? size : 0));
    MUST(gw_log_sync(log, &changed, &error) == GW_OK && gw_log_durable(log) == gw_log_committed(log));
}

/* `before`, read by a scan, is what recovery keeps. */
static void recover(const opened *scan, const content before, const char *const *sinks, bool append)
{
    opened first = open_file(sinks, false);
    if (scan->report.corrupt_count) {
        MUST(first.status == GW_CORRUPT && first.report.corrupt_bytes == scan->report.corrupt_bytes);
        first = open_file(sinks, true);
    }
    if (first.status == GW_CORRUPT) { /* two persisted positions nearer to each other than a record is long */
        MUST(strstr(first.error.text, "too small") != NULL);
        return;
    }
    MUST(first.status == GW_OK && first.report.records == scan->report.records);
    MUST(first.report.start == scan->report.start && first.report.torn_bytes == scan->report.torn_bytes);
    look_at(&first);
    content now = content_of(first.log, gw_log_reclaim(first.log), false);
    MUST(now.records == before.records && now.digest == before.digest && now.next == first.report.start);
    for (unsigned i = 0; i < persisted_count; i++)
        MUST(now.marks >> i & 1 || before.marks >> i & 1 || persisted[i] < before.from || persisted[i] >= now.next);
    const uint64_t ordinal = gw_log_committed_ordinal(first.log);
    int64_t unexplained[GW_SINKS_MAX];
    for (unsigned i = 0; sinks[i]; i++)
        unexplained[i] = gw_log_unexplained(first.log, i);
    gw_log_close(first.log);

    opened again = open_file(sinks, false);
    MUST(again.status == GW_OK && again.report.epoch > first.report.epoch);
    MUST(again.report.corrupt_count == 0 && again.report.torn_bytes == 0 && again.report.records == before.records);
    MUST(again.report.start == first.report.start && gw_log_committed_ordinal(again.log) == ordinal);
    look_at(&again);
    for (unsigned i = 0; sinks[i]; i++)
        MUST(gw_log_unexplained(again.log, i) == unexplained[i]);
    now = content_of(again.log, gw_log_reclaim(again.log), false);
    MUST(now.records == before.records && now.digest == before.digest);
    if (append) {
        append_one(again.log, 1);
        append_one(again.log, 2);
        now = content_of(again.log, gw_log_reclaim(again.log), false);
    }
    gw_log_close(again.log);
    if (!append)
        return;
    opened last = open_file(sinks, false);
    MUST(last.status == GW_OK && last.report.corrupt_count == 0 && last.report.torn_bytes == 0);
    const content kept = content_of(last.log, gw_log_reclaim(last.log), false);
    MUST(kept.records == now.records && kept.digest == now.digest && kept.next == now.next);
    gw_log_close(last.log);
}

/* ---- changes that know what a piece is ------------------------------------------------------------------------ */

/* Any word of any piece, or a little beside it: positions mean something where there were positions before. */
static uint64_t word_like(dice *d, const uint8_t *data, const piece *list, unsigned n)
{
    static const int64_t beside[] = {0, 0, 8, -8, 64, -64, 4096, (int64_t)CAPACITY, -(int64_t)CAPACITY};
    const piece *p = &list[roll(d, n)];
    uint64_t word = GW_FIRST_LSN;
    if (p->seal >= RECORD && roll(d, 2))
        word = p->offset - GW_RING_OFFSET + CAPACITY * roll(d, 3);
    else if (p->bytes >= 8)
        memcpy(&word, data + p->at + PIECE_HEADER + roll(d, p->bytes / 8) * 8, 8);
    return word + (uint64_t)beside[roll(d, sizeof beside / sizeof *beside)];
}

static void piece_put(uint8_t *data, uint8_t seal, uint32_t offset, uint32_t bytes)
{
    const uint16_t length = (uint16_t)bytes;
    data[0] = seal;
    memcpy(data + 1, &offset, 4);
    memcpy(data + 5, &length, 2);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t bytes, size_t bytes_max, unsigned seed)
{
    static piece list[PIECES_MAX];
    static uint8_t part[1 << 16];
    dice d = dice_of(seed);
    const unsigned n = pieces_of(data, bytes, list);
    if (!n || roll(&d, 4) == 0)
        return LLVMFuzzerMutate(data, bytes, bytes_max);
    const piece p = list[roll(&d, n)], q = list[roll(&d, n)];
    uint8_t *const head = data + p.at, *const body = head + PIECE_HEADER, *const behind = body + p.bytes;
    const size_t rest = (size_t)(data + bytes - behind);
    uint32_t offset = p.offset, cut;
    switch (roll(&d, 9)) {
    case 0: /* its bytes */
        memcpy(part, body, p.bytes);
        if (p.bytes)
            memcpy(body, part, LLVMFuzzerMutate(part, p.bytes, p.bytes));
        break;
    case 1:
    case 2: /* a word of it */
        if (p.bytes >= 8) {
            const uint64_t word = word_like(&d, data, list, n);
            memcpy(body + roll(&d, p.bytes / 8) * 8, &word, 8);
        }
        break;
    case 3:
        piece_put(head, (uint8_t)roll(&d, SEALS), offset, p.bytes);
        break;
    case 4: /* right behind another one, or a little beside itself */
        offset = roll(&d, 2) ? q.offset + ((q.bytes + 7) & ~7u) : offset + 8 * roll(&d, 32) - 128;
        piece_put(head, p.seal, offset, p.bytes);
        break;
    case 5: /* once more, behind another one */
        if (bytes + PIECE_HEADER + p.bytes <= bytes_max) {
            memcpy(data + bytes, head, PIECE_HEADER + p.bytes);
            piece_put(data + bytes, p.seal, q.offset + ((q.bytes + 7) & ~7u), p.bytes);
            bytes += PIECE_HEADER + p.bytes;
        }
        break;
    case 6: /* gone */
        memmove(head, behind, rest);
        bytes -= (size_t)(behind - head);
        break;
    case 7: /* torn */
        cut = roll(&d, p.bytes + 1);
        piece_put(head, p.seal, offset, cut);
        memmove(body + cut, behind, rest);
        bytes -= p.bytes - cut;
        break;
    default:
        data[0] = (uint8_t)roll(&d, 8);
        break;
    }
    return bytes;
}

/* ---- one input ------------------------------------------------------------------------------------------------ */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (!file.bytes) {
        file.fd = memfd_create("fuzz", MFD_CLOEXEC);
        MUST(file.fd >= 0 && ftruncate(file.fd, FILE_BYTES) == 0);
        file.bytes = mmap(NULL, FILE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd, 0);
        MUST(file.bytes != MAP_FAILED);
        snprintf(file.path, sizeof file.path, "/proc/self/fd/%d", file.fd);
    }
    if (!bytes)
        return 0;
    expand(data, bytes, file.bytes);

    opened scan = {0};
    scan.status = gw_log_scan(file.path, &scan.log, &scan.report, &scan.error);
    MUST(scan.status == GW_OK || scan.status == GW_NOT_A_LOG);
    if (scan.status == GW_NOT_A_LOG) {
        static const char *const mqtt[] = {"mqtt", NULL};
        MUST(open_file(mqtt, true).status == GW_NOT_A_LOG);
        return 0;
    }
    gw_slot_page slot = {0};
    bool sane = true;
    for (unsigned i = 0; i < 2; i++) {
        const gw_slot_page *page = (const gw_slot_page *)(const void *)(file.bytes + (1 + i) * GW_PAGE);
        sane &= !page_is_whole(page) || is_sane(page);
    }
    if (sane) {
        slot = *newest(file.bytes);
        MUST(scan.report.watermark == slot.watermark && scan.report.epoch == slot.epoch);
    }

    char name[GW_SINKS_MAX + 1][GW_SINK_NAME_BYTES + 1] = {{0}};
    const char *sinks[GW_SINKS_MAX + 2] = {NULL};
    unsigned count = 0;
    for (; count < slot.sinks; count++)
        sinks[count] = memcpy(name[count], slot.sink[count].name, GW_SINK_NAME_BYTES);
    if (!sane) {
        gw_log_close(scan.log);
        optional = 0;
        opened o = open_file(sinks, true);
        gw_log_close(o.log);
        return 0;
    }
    const found expected = table_of(file.bytes, &slot);
    MUST(scan.report.records == expected.records && scan.report.end == expected.end);
    MUST(scan.report.torn_bytes == expected.torn_bytes && scan.report.corrupt_bytes == expected.corrupt_bytes);
    MUST(gw_log_reclaim(scan.log) == least_cursor(&slot) && scan.report.start >= slot.watermark);
    persisted_count = 0;
    persisted[persisted_count++] = slot.watermark;
    for (unsigned i = 0; i < slot.sinks; i++)
        persisted[persisted_count++] = slot.sink[i].cursor.lsn;
    for (unsigned i = 0; i < slot.epochs; i++)
        persisted[persisted_count++] = slot.range[i].start;
    optional = slot.optional & ((1u << slot.sinks) - 1);
    const gw_cursor last = count ? gw_cursor_load(scan.log, count - 1) : (gw_cursor){0};
    const bool waits = last.ordinal != gw_log_committed_ordinal(scan.log);
    const content before = content_of(scan.log, gw_log_reclaim(scan.log), true);
    MUST(before.records == expected.records && before.next == expected.end);
    gw_log_close(scan.log);

    if (data[0] & ONE_SINK_LESS && count) {
        sinks[count - 1] = NULL;
        opened o = open_file(sinks, true);
        MUST(o.status == GW_OK ? count > 1 && !waits : o.status == GW_CORRUPT || o.error.error_number == EINVAL);
        if (o.status != GW_ERRNO) { /* that sink was forgotten */
            gw_log_close(o.log);
            return 0;
        }
        sinks[count - 1] = name[count - 1];
    }
    if (data[0] & ONE_SINK_MORE && count && count < GW_SINKS_MAX) /* the first one would begin behind all records */
        sinks[count] = strcpy(name[count], "fuzz");
    recover(&scan, before, sinks, data[0] & APPEND);
    return 0;
}
