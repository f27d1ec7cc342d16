/* gw_log_sinks.c - cursors, their books, and what an optional sink has missed.
 *
 *   ring     |....skipped....#####waits for the optional one#####=====waits for all=====|
 *            ^ its cursor    ^ tail - capacity                    ^ least required cursor = the oldest that is safe
 *
 * An optional sink may read at any place that still stands: what lies between tail - capacity and the least required
 * cursor is whole, but not safe. The order, by the only writer of the cursor: copy; gw_log_lapped: no, it was whole,
 * yes, drop the copy, confirm what is safe in the sink, gw_log_skip, read on at the cursor. The least required cursor
 * is a record's start and has its ordinal, so the number of events that were missed is exact. */
#include <string.h>

#include "gw_log_shared.h"

gw_cursor gw_cursor_load(const gw_log *log, unsigned sink)
{
    return gw_versioned_load(&log->shared->cursor[sink]);
}

bool gw_log_is_required(const gw_log *log, unsigned sink)
{
    return sink < log->shared->sinks && !(log->shared->optional >> sink & 1);
}

gw_cursor gw_least_required(const gw_log *log)
{
    gw_cursor least = {.lsn = UINT64_MAX};
    for (unsigned i = 0; i < log->shared->sinks; i++) {
        if (log->shared->optional >> i & 1)
            continue;
        gw_cursor cursor = gw_cursor_load(log, i);
        if (cursor.lsn < least.lsn)
            least = cursor;
    }
    return least;
}

uint64_t gw_log_least_cursor(const gw_log *log)
{
    return gw_least_required(log).lsn;
}

bool gw_reclaim_is_urgent(const gw_log *log, uint64_t least)
{
    uint64_t reclaim = gw_log_reclaim(log), capacity = log->mask + 1;
    return gw_log_tail(log) - reclaim > capacity / 2 && least > reclaim && least - reclaim > capacity / 4;
}

void gw_cursor_store(gw_log *log, unsigned sink, const gw_cursor *cursor)
{
    gw_shared *shared = log->shared;
    gw_versioned_store(&shared->cursor[sink], cursor);
    atomic_thread_fence(memory_order_seq_cst); /* F */
    bool required = !(shared->optional >> sink & 1);
    uint32_t flag = atomic_load_explicit(&shared->committer_flag, memory_order_relaxed);
    if (flag == GW_SLEEPS || (flag == GW_RESTS && required && gw_reclaim_is_urgent(log, cursor->lsn)))
        gw_futex_wake(&shared->committer_word);
    if (required)
        gw_wake_waiters(log, GW_WAITS_SINKS);
}

/* ---- the books ------------------------------------------------------------------------------------------------ */

int64_t gw_log_unexplained(const gw_log *log, unsigned sink)
{
    /* the cursor first: it is never above the committed position that is read after it */
    gw_cursor cursor = gw_cursor_load(log, sink), committed = gw_versioned_load(&log->shared->committed);
    uint64_t in_log = cursor.lsn == committed.lsn ? 0 : committed.ordinal - cursor.ordinal;
    return (int64_t)(committed.ordinal - cursor.base - cursor.published - cursor.dead_lettered - cursor.skipped -
                     in_log);
}

uint64_t gw_log_lag_events(const gw_log *log, unsigned sink)
{
    gw_cursor cursor = gw_cursor_load(log, sink), committed = gw_versioned_load(&log->shared->committed);
    return cursor.lsn == committed.lsn ? 0 : committed.ordinal - cursor.ordinal;
}

int gw_log_sink(const gw_log *log, const char *name)
{
    for (unsigned i = 0; i < log->shared->sinks; i++)
        if (strncmp(log->shared->sink_name[i], name, GW_SINK_NAME_BYTES) == 0)
            return (int)i;
    return -1;
}

/* ---- optional sinks ------------------------------------------------------------------------------------------- */

bool gw_log_lapped(const gw_log *log, uint64_t lsn)
{
    atomic_thread_fence(memory_order_acquire);
    uint64_t tail = atomic_load_explicit(&log->shared->tail, memory_order_acquire) & ~GW_TAIL_CLOSED; /* T */
    return tail > lsn + log->mask + 1;
}

uint64_t gw_log_skip(gw_log *log, unsigned sink)
{
    gw_cursor cursor = gw_cursor_load(log, sink), least = gw_least_required(log);
    if (gw_log_is_required(log, sink) || !gw_log_lapped(log, cursor.lsn) || least.lsn <= cursor.lsn)
        return 0;
    uint64_t missed = least.ordinal - cursor.ordinal;
    cursor.lsn = least.lsn;
    cursor.ordinal = least.ordinal;
    cursor.skipped += missed;
    gw_cursor_store(log, sink, &cursor);
    return missed;
}
