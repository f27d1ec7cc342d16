/* fake_log.h - a log in an array, for tests of what stands above the log. One per program; include it once.
 *
 * Positions start at 4096 and grow by each record's size, as in the real one. */
#ifndef FAKE_LOG_H
#define FAKE_LOG_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gw_log.h"

struct gw_log {
    gw_record record[100000];
    unsigned records, committed; /* made; of these, committed */
    uint64_t corrupt_lsn;
    uint64_t lapped; /* what stands below was written over; only an optional sink's place may be */
    bool optional;
    gw_cursor cursor;
    unsigned cursor_stores;
    gw_counter_block counters;
};

enum { FAKE_FIRST_LSN = 4096 };

static uint64_t fake_end(const gw_log *log, unsigned records)
{
    return records ? log->record[records - 1].lsn + log->record[records - 1].size : FAKE_FIRST_LSN;
}

static gw_log *fake_new(void)
{
    gw_log *log = calloc(1, sizeof *log);
    log->cursor.lsn = FAKE_FIRST_LSN;
    return log;
}

/* The strings must outlive the log. */
static uint64_t fake_add(gw_log *log, uint8_t kind, const char *device_id, const char *body, uint8_t flags)
{
    gw_record *r = &log->record[log->records];
    *r = (gw_record){.lsn = fake_end(log, log->records),
                     .size = (64 + strlen(device_id) + strlen(body) + 7) / 8 * 8,
                     .received_at_ns = 1758626321123456789u,
                     .device_id = (const uint8_t *)device_id,
                     .device_id_bytes = (uint8_t)strlen(device_id),
                     .body = (const uint8_t *)body,
                     .body_bytes = (uint32_t)strlen(body),
                     .flags = flags,
                     .kind = kind};
    log->committed = ++log->records;
    return r->lsn;
}

gw_status gw_log_read(const gw_log *log, uint64_t lsn, gw_record *record)
{
    unsigned low = 0, high = log->committed;
    if (log->corrupt_lsn && lsn == log->corrupt_lsn)
        return GW_CORRUPT;
    while (low < high) {
        unsigned middle = (low + high) / 2;
        if (log->record[middle].lsn < lsn)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == log->committed)
        return GW_EMPTY;
    if (log->record[low].lsn != lsn)
        return GW_CORRUPT;
    *record = log->record[low];
    return GW_OK;
}

gw_status gw_log_read_once(const gw_log *log, uint64_t lsn, uint64_t limit, gw_record *record)
{
    return lsn < limit ? gw_log_read(log, lsn, record) : GW_EMPTY;
}

void gw_log_prefetch(const gw_log *log, uint64_t lsn)
{
    (void)log, (void)lsn;
}

bool gw_log_is_required(const gw_log *log, unsigned sink)
{
    (void)sink;
    return !log->optional;
}

bool gw_log_lapped(const gw_log *log, uint64_t lsn)
{
    return lsn < log->lapped;
}

uint64_t gw_log_committed(const gw_log *log)
{
    return fake_end(log, log->committed);
}

uint64_t gw_log_record_bytes_max(const gw_log *log)
{
    (void)log;
    return 131072;
}

gw_counter_block *gw_log_counters(gw_log *log, unsigned block)
{
    (void)block;
    return &log->counters;
}

uint64_t gw_log_identity(const gw_log *log)
{
    (void)log;
    return 1;
}

gw_cursor gw_cursor_load(const gw_log *log, unsigned sink)
{
    (void)sink;
    return log->cursor;
}

void gw_cursor_store(gw_log *log, unsigned sink, const gw_cursor *cursor)
{
    (void)sink;
    if (cursor->lsn <= log->cursor.lsn) {
        fprintf(stderr, "the cursor was stored without moving up\n");
        abort();
    }
    log->cursor = *cursor;
    log->cursor_stores++;
}

#endif
