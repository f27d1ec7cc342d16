/* gw_log_receipt.c - what became of an event, from its receipt; and dead letters' marks.
 *
 *   what stands at lsn                                            state
 *   ----------------------------------------------------------    ------------------------------------------------
 *   another log's identity, a MAC that is not ours                unknown
 *   the epoch's range does not hold lsn                           lost: a power cut took the end of that epoch
 *   tail > lsn + capacity: written over                           finished; unknown if recovery found a hole at or
 *                                                                 below lsn in that epoch, or does not know the epoch
 *   no whole DATA record of that epoch                            lost; below every cursor it was published once, and
 *                                                                 torn later: as if written over
 *   a record with a required sink's dead byte                     dead_lettered
 *   below every required cursor · below durable · else            delivered · durable · enqueued
 *
 * The cursors are read before the dead word (A), and the publisher marks before its cursor passes: a dead-lettered
 * record is never called delivered. The epoch is part of a receipt: after a power cut another record may stand at the
 * same lsn. */
#include <stdio.h>
#include <string.h>

#include "gw_hash.h"
#include "gw_log_shared.h"

static uint64_t mac(const gw_log *log, uint64_t epoch, uint64_t lsn)
{
    uint64_t words[3] = {log->shared->identity, epoch, lsn};
    return gw_siphash(log->shared->receipt_key, words, sizeof words);
}

static char *put_hex(char *to, uint64_t value, int digits)
{
    int shift = 60;
    while (digits == 0 && shift > 0 && !(value >> shift))
        shift -= 4;
    if (digits)
        shift = 4 * (digits - 1);
    for (; shift >= 0; shift -= 4)
        *to++ = "0123456789abcdef"[value >> shift & 15];
    return to;
}

static void render(const gw_log *log, uint64_t epoch, uint64_t lsn, char out[GW_RECEIPT_BYTES_MAX])
{
    char *to = put_hex(out, log->shared->identity, 16);
    *to++ = '-';
    to = put_hex(to, epoch, 0);
    *to++ = '-';
    to = put_hex(to, lsn, 0);
    *to++ = '-';
    *put_hex(to, mac(log, epoch, lsn), 16) = 0;
}

/* The epoch in which the record at lsn was accepted. Below the table of epochs only the record itself knows. */
static uint64_t epoch_of(const gw_log *log, uint64_t lsn)
{
    const gw_shared *shared = log->shared;
    if (lsn >= shared->start_lsn)
        return shared->epoch;
    uint64_t known = gw_epoch_at(shared->range, shared->epochs, lsn);
    if (lsn >= shared->range[0].start || lsn % 8)
        return known;
    uint64_t written = atomic_load_explicit(gw_word(log, lsn) + 1, memory_order_relaxed) >> 32;
    atomic_thread_fence(memory_order_acquire);
    return written <= known && gw_log_tail(log) <= lsn + log->mask + 1 ? written : known;
}

void gw_log_receipt(const gw_log *log, uint64_t lsn, char out[GW_RECEIPT_BYTES_MAX])
{
    render(log, epoch_of(log, lsn), lsn, out);
}

/* Lower-case hexadecimal of at most 16 digits, then `end`; NULL: it is not. */
static const char *get_hex(const char *from, const char *limit, char end, uint64_t *value)
{
    *value = 0;
    int digits = 0;
    for (; from < limit && *from != end; from++, digits++) {
        unsigned digit = *from >= '0' && *from <= '9'   ? (unsigned)(*from - '0')
                         : *from >= 'a' && *from <= 'f' ? (unsigned)(*from - 'a' + 10)
                                                        : 16;
        if (digit > 15 || digits == 16)
            return NULL;
        *value = *value << 4 | digit;
    }
    return digits && from < limit ? from + 1 : NULL;
}

/* Recovery found something lost in the epoch of lsn, at or below it; or nobody knows. */
static bool holes_before(const gw_shared *shared, uint64_t lsn)
{
    if (lsn < shared->range[0].start)
        return true;
    unsigned i = shared->epochs - 1;
    while (shared->range[i].start > lsn)
        i--;
    return shared->lost_from[i] && lsn >= shared->lost_from[i];
}

/* What stood there when this run began was as the disk had kept it: a marker without its body proves nothing. */
static bool is_whole(const gw_log *log, uint64_t lsn)
{
    if (lsn >= log->shared->start_lsn)
        return true;
    const gw_header *header = (const gw_header *)(const void *)gw_word(log, lsn);
    uint64_t used = sizeof *header + (uint64_t)header->device_id_bytes + header->body_bytes;
    return used <= log->shared->record_bytes_max &&
           header->crc == gw_record_crc(header, (const uint8_t *)(header + 1), lsn);
}

static enum gw_receipt_state state_of(const gw_log *log, uint64_t epoch, uint64_t lsn)
{
    const gw_shared *shared = log->shared;
    uint64_t capacity = log->mask + 1;
    if (lsn < GW_FIRST_LSN || lsn % 8)
        return GW_RECEIPT_UNKNOWN;
    if (!gw_epoch_ok(shared->range, shared->epochs, lsn, epoch))
        return GW_RECEIPT_LOST;
    uint64_t least = gw_log_least_cursor(log), durable = gw_log_durable(log);
    uint64_t tail = gw_log_tail(log);
    if (lsn >= tail)
        return GW_RECEIPT_UNKNOWN;
    const _Atomic uint64_t *at = gw_word(log, lsn);
    uint64_t marker = atomic_load_explicit(at, memory_order_acquire);                    /* M */
    uint64_t dead = atomic_load_explicit(at + GW_DEAD_OFFSET / 8, memory_order_relaxed); /* A: the cursors came first */
    uint32_t written = (uint32_t)(atomic_load_explicit(at + 1, memory_order_relaxed) >> 32);
    uint64_t mix = gw_mix(shared->secret, epoch), pad = (lsn | GW_PAD) ^ mix;
    bool whole = written == (uint32_t)epoch && marker == ((lsn | GW_DATA) ^ mix) && is_whole(log, lsn);
    atomic_thread_fence(memory_order_acquire);
    if (gw_log_tail(log) > lsn + capacity)
        return holes_before(shared, lsn) ? GW_RECEIPT_UNKNOWN : GW_RECEIPT_FINISHED;
    if (!whole && least > lsn && least != UINT64_MAX && marker != pad)
        /* what was published and not synced may be torn, also by claims of the next lap that the power cut took */
        return holes_before(shared, lsn) ? GW_RECEIPT_UNKNOWN : GW_RECEIPT_FINISHED;
    if (!whole)
        return GW_RECEIPT_LOST;
    if (gw_dead_sinks(dead) & ~shared->optional)
        return GW_RECEIPT_DEAD_LETTERED;
    return least != UINT64_MAX && least > lsn ? GW_RECEIPT_DELIVERED
           : durable > lsn                    ? GW_RECEIPT_DURABLE
                                              : GW_RECEIPT_ENQUEUED;
}

enum gw_receipt_state gw_log_receipt_state(const gw_log *log, const char *text, size_t bytes, uint64_t *lsn)
{
    const char *at = text, *limit = text + bytes;
    uint64_t identity, epoch;
    if (bytes >= GW_RECEIPT_BYTES_MAX || !(at = get_hex(at, limit, '-', &identity)) ||
        !(at = get_hex(at, limit, '-', &epoch)) || !(at = get_hex(at, limit, '-', lsn)))
        return GW_RECEIPT_UNKNOWN;
    /* a receipt has one spelling: what we would have written, the MAC included */
    char ours[GW_RECEIPT_BYTES_MAX];
    render(log, epoch, *lsn, ours);
    if (strlen(ours) != bytes)
        return GW_RECEIPT_UNKNOWN;
    unsigned different = 0; /* in constant time: a MAC must not be found digit by digit */
    for (size_t i = 0; i < bytes; i++)
        different |= (unsigned char)(ours[i] ^ text[i]);
    return different ? GW_RECEIPT_UNKNOWN : state_of(log, epoch, *lsn);
}

enum gw_receipt_state gw_log_state_of(const gw_log *log, uint64_t lsn)
{
    return state_of(log, epoch_of(log, lsn), lsn);
}

bool gw_log_mark_dead(gw_log *log, unsigned sink, uint64_t lsn, uint32_t epoch)
{
    gw_record record;
    /* What no cursor holds may be claimed at any moment; only before the first claim of a run is it still. */
    if (lsn < gw_log_reclaim(log) &&
        (gw_log_tail(log) != log->shared->start_lsn || log->shared->start_lsn > lsn + log->mask + 1))
        return false;
    if (gw_log_read(log, lsn, &record) != GW_OK || record.kind != GW_DATA || (epoch && record.epoch != epoch))
        return false;
    atomic_fetch_or_explicit(gw_word(log, lsn) + GW_DEAD_OFFSET / 8, GW_DEAD_BYTE << (8 * sink), /* A */
                             memory_order_release);
    return true;
}

gw_status gw_log_oldest(const gw_log *log, gw_record *record)
{
    const gw_shared *shared = log->shared;
    uint64_t capacity = log->mask + 1, tail = gw_log_tail(log), committed = gw_log_committed(log);
    uint64_t p = tail > capacity + GW_FIRST_LSN ? tail - capacity : GW_FIRST_LSN;
    if (p < shared->oldest_lsn) /* a log that was made larger has gigabytes of nothing below it */
        p = shared->oldest_lsn;
    while (p < committed) {
        const _Atomic uint64_t *at = gw_word(log, p);
        uint64_t marker = atomic_load_explicit(at, memory_order_acquire); /* M */
        uint32_t epoch = (uint32_t)(atomic_load_explicit(at + 1, memory_order_relaxed) >> 32);
        uint64_t size = atomic_load_explicit(at + 2, memory_order_relaxed);
        uint64_t received_at_ns = atomic_load_explicit(at + 3, memory_order_relaxed);
        atomic_thread_fence(memory_order_acquire);
        tail = gw_log_tail(log);
        if (tail > p + capacity) { /* overtaken: go on where nothing is written over yet */
            p = tail - capacity;
            continue;
        }
        bool possible = gw_epoch_ok(shared->range, shared->epochs, p, epoch) && is_whole(log, p);
        uint64_t kind = possible ? marker ^ gw_mix(shared->secret, epoch) ^ p : UINT64_MAX;
        if (kind == GW_DATA) {
            *record = (gw_record){.lsn = p, .size = size, .received_at_ns = received_at_ns, .epoch = epoch};
            return GW_OK;
        }
        p += kind <= GW_PAD && size >= GW_RECORD_HEADER_BYTES && size % 8 == 0 && size <= capacity ? size : 8;
    }
    return GW_EMPTY;
}
