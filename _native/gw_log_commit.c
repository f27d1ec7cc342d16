/* gw_log_commit.c - the committer: the only place that syncs a running log.
 *
 * One sync, in this order:
 *   1 cursors, then C = committed (so that no cursor lies above C)
 *   2 the older slot page: sequence + 1, W = durable as it is, the cursors, the epochs
 *   3 fdatasync
 *   4 durable = C: from here devices may be told "durable"; reclaim = the least required cursor of that slot
 * W is what an earlier sync covered, so a slot that reached the disk before its data promises nothing. One slot write a
 * sync: the other slot is always whole. Reclaim follows persisted cursors only: after a power cut the cursor points at
 * bytes that are still of its lap.
 *
 * An error is final. The kernel marks pages clean after a failed writeback, so a second fdatasync would return 0 for
 * bytes that are not on the disk. A committer that dies with the error untold is why a new one begins with takeover:
 * everything that may be unsynced is made dirty again and synced, and the witness (the lock's descriptor, open since
 * before the first store, never synced by anyone else) is asked for errors that nobody has heard of. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "gw_crc32c.h"
#include "gw_log_shared.h"

void gw_dirty(gw_log *log, uint64_t from, uint64_t to)
{
    if (to - from > log->mask + 1)
        from = to - (log->mask + 1);
    for (uint64_t p = from & ~(GW_PAGE - 1); p < to; p += GW_PAGE)
        atomic_fetch_add_explicit(gw_word(log, p), 0, memory_order_relaxed);
}

void gw_dirty_slots(gw_log *log)
{
    for (unsigned page = 1; page <= 2; page++)
        atomic_fetch_add_explicit((_Atomic uint64_t *)(void *)(log->file + page * GW_PAGE), 0, memory_order_relaxed);
}

void gw_slot_write(gw_log *log, gw_slot_page *page, uint64_t sequence)
{
    page->magic = GW_SLOT_MAGIC;
    page->version = GW_LOG_VERSION;
    page->sequence = sequence;
    page->crc = 0;
    page->crc = gw_crc32c(0, page, sizeof *page);
    uint8_t *to = log->file + (1 + sequence % 2) * GW_PAGE;
    size_t head = offsetof(gw_slot_page, sink);
    memcpy(to, page, head);
    GW_FAILPOINT(mid_slot);
    memcpy(to + head, (const uint8_t *)page + head, sizeof *page - head);
}

static gw_status failed(gw_log *log, gw_error *error, const char *text)
{
    int why = errno;
    gw_log_set_state(log, GW_STATE_FAILED);
    return gw_fail(error, GW_FAILED, why, gw_log_durable(log), text);
}

static int timed_sync(gw_log *log)
{
    gw_counter_block *counters = &log->shared->counters[GW_BLOCK_DELIVERY];
    uint64_t from = gw_now_ns();
    gw_counter_set(counters, GW_COUNTER_SYNC_SINCE_NS, from);
    int result = fdatasync(log->fd);
    gw_counter_set(counters, GW_COUNTER_SYNC_SINCE_NS, 0);
    gw_counter_add(counters, GW_COUNTER_SYNCS, 1);
    gw_counter_add(counters, GW_COUNTER_SYNC_NS, gw_now_ns() - from);
    return result;
}

gw_status gw_log_takeover(gw_log *log, gw_error *error)
{
    gw_dirty(log, gw_log_durable(log), gw_log_tail(log));
    gw_dirty_slots(log);
    if (timed_sync(log))
        return failed(log, error, "fdatasync of the log at takeover");
    if (fdatasync(log->fd_lock))
        return failed(log, error, "an earlier write error of the log that no committer has reported");
    return gw_log_state(log) == GW_STATE_FAILED ? gw_fail(error, GW_FAILED, 0, 0, "the log is in state FAILED") : GW_OK;
}

gw_status gw_log_sync(gw_log *log, bool *changed, gw_error *error)
{
    gw_shared *shared = log->shared;
    if (gw_log_state(log) == GW_STATE_FAILED)
        return gw_fail(error, GW_FAILED, 0, gw_log_durable(log), "the log is in state FAILED");
    gw_slot_page page = {.watermark = gw_log_durable(log),
                         .epoch = shared->epoch,
                         .epochs = shared->epochs,
                         .sinks = shared->sinks,
                         .optional = shared->optional};
    memcpy(page.range, shared->range, sizeof page.range);
    memcpy(page.lost_from, shared->lost_from, sizeof page.lost_from);
    uint64_t least = ~0ull;
    for (unsigned i = 0; i < shared->sinks; i++) {
        memcpy(page.sink[i].name, shared->sink_name[i], GW_SINK_NAME_BYTES);
        page.sink[i].cursor = gw_cursor_load(log, i);
        if (!(page.optional >> i & 1) && page.sink[i].cursor.lsn < least)
            least = page.sink[i].cursor.lsn;
    }
    uint64_t committed = gw_log_committed(log);
    if (!shared->sinks)
        least = page.watermark; /* where recovery would begin */
    GW_FAILPOINT(before_slot);
    uint64_t sequence = atomic_load_explicit(&shared->slot_sequence, memory_order_relaxed) + 1;
    gw_slot_write(log, &page, sequence);
    GW_FAILPOINT(after_slot);
    if (timed_sync(log))
        return failed(log, error, "fdatasync of the log");
    GW_FAILPOINT(after_sync);
    /* Only now may the other page be written: whoever dies before leaves this one to be written again. */
    atomic_store_explicit(&shared->slot_sequence, sequence, memory_order_release);
    /* Durable from here: devices that asked for it may be told yes. */
    atomic_store_explicit(&shared->durable, committed, memory_order_release); /* D */
    atomic_store_explicit(&shared->reclaim, least, memory_order_release);     /* R */
    GW_FAILPOINT(after_durable);
    gw_wake_waiters(log, GW_WAITS_DURABLE);

    *changed = page.watermark != committed || gw_log_committed(log) != committed;
    for (unsigned i = 0; i < shared->sinks && !*changed; i++)
        *changed = gw_cursor_load(log, i).lsn != page.sink[i].cursor.lsn;
    return GW_OK;
}

static bool anything_new(gw_log *log, uint64_t committed, const uint64_t *cursors)
{
    bool new_cursor = false;
    for (unsigned i = 0; i < log->shared->sinks; i++)
        new_cursor |= gw_cursor_load(log, i).lsn != cursors[i];
    return new_cursor || gw_log_committed(log) != committed;
}

/* How fast the log empties, smoothed over some seconds: a device that is refused is told to come back accordingly. */
static void measure_drain(gw_log *log)
{
    enum { SMOOTH_MS = 2000, SAMPLE_MS = 100 };
    gw_counter_block *counters = &log->shared->counters[GW_BLOCK_DELIVERY];
    uint64_t now = gw_now_ns(), reclaim = gw_log_reclaim(log);
    double elapsed_ms = (double)(now - log->rate_at_ns) / 1e6;
    if (log->rate_at_ns && elapsed_ms < SAMPLE_MS)
        return;
    if (log->rate_at_ns) {
        double rate = (double)atomic_load_explicit(&counters->word[GW_COUNTER_DRAIN_BYTES_PER_S], memory_order_relaxed);
        double sample = (double)(reclaim - log->rate_lsn) / elapsed_ms * 1e3;
        rate += (sample - rate) * elapsed_ms / (elapsed_ms + SMOOTH_MS);
        gw_counter_set(counters, GW_COUNTER_DRAIN_BYTES_PER_S, (uint64_t)rate);
    }
    log->rate_at_ns = now;
    log->rate_lsn = reclaim;
}

/* Between two syncs: until the interval is over if anything changed, else until anything does; sooner when somebody
 * waits for `durable` and there is something to sync, or when producers are short of room. */
static void gather(gw_log *log, bool changed, uint64_t committed, const uint64_t *cursors, int interval_ms)
{
    enum { IDLE_MS = 1000 }; /* a backstop for a lost wake-up, not a poll of anything */
    gw_shared *shared = log->shared;
    uint64_t now = gw_now_ns(), until = now + (uint64_t)interval_ms * 1000000u;
    for (;;) {
        atomic_store_explicit(&shared->committer_flag, changed ? GW_RESTS : GW_SLEEPS, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst); /* F */
        uint32_t word = atomic_load_explicit(&shared->committer_word, memory_order_relaxed);
        uint64_t durable = gw_log_durable(log);
        bool wanted = gw_waits_for_sync(log, durable);
        if (wanted)
            gw_walk(log); /* the follower may rest: one hand-over less for a client alone, larger groups for a crowd */
        if (atomic_load_explicit(&log->committer_stop, memory_order_acquire) || gw_log_state(log) == GW_STATE_FAILED ||
            (wanted && gw_log_committed(log) > durable) || gw_reclaim_is_urgent(log, gw_log_least_cursor(log)) ||
            (changed && now >= until))
            break;
        if (!changed && anything_new(log, committed, cursors)) {
            changed = true; /* one sync for all that comes within an interval from now on */
            until = now + (uint64_t)interval_ms * 1000000u;
            continue;
        }
        if (changed)
            gw_futex_wait_us(&shared->committer_word, word, (int64_t)((until - now) / 1000 + 1));
        else
            gw_futex_wait(&shared->committer_word, word, IDLE_MS);
        measure_drain(log);
        now = gw_now_ns();
    }
    atomic_store_explicit(&shared->committer_flag, 0, memory_order_relaxed);
}

gw_status gw_log_run_committer(gw_log *log, int interval_ms, gw_error *error)
{
    gw_shared *shared = log->shared;
    for (;;) {
        uint64_t committed = gw_log_committed(log), cursors[GW_SINKS_MAX];
        for (unsigned i = 0; i < shared->sinks; i++)
            cursors[i] = gw_cursor_load(log, i).lsn;
        bool changed, stop = atomic_load_explicit(&log->committer_stop, memory_order_acquire);
        gw_status status = gw_log_sync(log, &changed, error);
        if (status != GW_OK)
            return status;
        measure_drain(log);
        if (stop && !changed)
            return GW_OK;
        if (!stop)
            gather(log, changed, committed, cursors, interval_ms);
    }
}

void gw_log_stop_committer(gw_log *log)
{
    atomic_store_explicit(&log->committer_stop, 1, memory_order_release);
    gw_futex_wake(&log->shared->committer_word);
}
