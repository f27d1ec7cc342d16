/* gw_log_read.c - one record of the ring, believed only when marker, size, epoch and CRC agree (P3 of gw_log.h). */
#include "gw_crc32c.h"
#include "gw_log_shared.h"

static inline gw_status check(const gw_log *log, uint64_t lsn, uint64_t limit, const gw_header *header,
                              gw_record *record)
{
    const gw_shared *shared = log->shared;
    const uint8_t *rest = (const uint8_t *)gw_word(log, lsn) + sizeof *header;
    uint64_t mix = header->epoch == shared->epoch ? shared->mix : gw_mix(shared->secret, header->epoch);
    uint64_t kind = header->marker ^ mix ^ lsn;
    if (kind > GW_PAD || kind != header->kind || header->size < sizeof *header || header->size % 8 ||
        header->size > limit - lsn || !gw_epoch_ok(shared->range, shared->epochs, lsn, header->epoch))
        return GW_CORRUPT;
    if (kind != GW_PAD) {
        uint64_t used = sizeof *header + (uint64_t)header->device_id_bytes + header->body_bytes;
        if (header->size != ((used + 7) & ~7ull) || header->size > shared->record_bytes_max)
            return GW_CORRUPT;
    }
    if (header->crc != gw_record_crc(header, rest, lsn))
        return GW_CORRUPT;
    uint64_t dead = atomic_load_explicit(gw_word(log, lsn) + GW_DEAD_OFFSET / 8, memory_order_relaxed);
    *record = gw_record_of(header, rest, lsn, dead);
    return GW_OK;
}

gw_status gw_log_read_at(const gw_log *log, uint64_t lsn, uint64_t limit, gw_record *record)
{
    if (lsn >= limit)
        return GW_EMPTY;
    if (lsn % 8)
        return GW_CORRUPT;
    return check(log, lsn, limit, (const gw_header *)(const void *)gw_word(log, lsn), record);
}

gw_status gw_log_read_once(const gw_log *log, uint64_t lsn, uint64_t limit, gw_record *record)
{
    if (lsn >= limit)
        return GW_EMPTY;
    if (lsn % 8)
        return GW_CORRUPT;
    gw_header copy;
    memcpy(&copy, (const uint8_t *)gw_word(log, lsn), GW_DEAD_OFFSET);
    __asm__ volatile("" ::: "memory"); /* what is checked is what is used, not read again */
    return check(log, lsn, limit, &copy, record);
}

gw_status gw_log_read(const gw_log *log, uint64_t lsn, gw_record *record)
{
    return gw_log_read_at(log, lsn, gw_log_committed(log), record);
}

void gw_log_prefetch(const gw_log *log, uint64_t lsn)
{
    for (unsigned line = 0; line < 4; line++) /* of 64 bytes: an event of the usual size */
        __builtin_prefetch(gw_word(log, lsn) + 8 * line);
}
