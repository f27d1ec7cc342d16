/* gw_log_wait.c - who waits for an acknowledgement, and who wakes whom.
 *
 *   worker                          delivery process
 *   append, want(lsn) ── durable ─▶ committer: walks, fdatasync ─────────▶ durable > lsn
 *        │          └── sink ─────▶ follower: walks ─▶ committed > lsn          │
 *   wait ◀────────── COMMITTED ─────────┘          publisher: cursor > lsn      │
 *        ◀────────── SINKS ───────────────────────────────┘                     │
 *        ◀────────── DURABLE ───────────────────────────────────────────────────┘
 *
 *   sink that reads below durable, a thread of the delivery process
 *   wait_durable ◀── DURABLE; and where there is one, who wants its sinks hurries the committer as well
 *
 * Sleepers raise a flag, fence (seq_cst), look once more, then sleep on their word; movers store the position, fence,
 * then look at the flags: one of the two sees the other. A sleeper that dies leaves its flag up: a wake-up for nobody.
 * `wanted` only hurries: who forgets it waits for log.commit_interval_ms. */
#include <errno.h>
#include <limits.h>

#include "gw_log_shared.h"

static inline uint64_t wanted(const _Atomic uint64_t *word)
{
    return atomic_load_explicit(word, memory_order_relaxed);
}

bool gw_waits_for_walk(const gw_log *log, uint64_t committed)
{
    for (unsigned i = 0; i < GW_WORKERS_MAX; i++)
        if (wanted(&log->shared->waiter[i].wanted) >= committed)
            return true;
    return false;
}

bool gw_waits_for_sync(const gw_log *log, uint64_t durable)
{
    for (unsigned i = 0; i < GW_WORKERS_MAX; i++)
        if (wanted(&log->shared->waiter[i].wanted_durable) >= durable)
            return true;
    return false;
}

void gw_wake_waiters(gw_log *log, unsigned waits)
{
    atomic_thread_fence(memory_order_seq_cst); /* F */
    for (unsigned i = 0; i < GW_WAITERS; i++) {
        gw_waiter *waiter = &log->shared->waiter[i];
        if (atomic_load_explicit(&waiter->flag, memory_order_relaxed) & waits)
            gw_futex_wake(&waiter->word);
    }
}

static void raise_to(_Atomic uint64_t *word, uint64_t lsn)
{
    if (lsn > wanted(word))
        atomic_store_explicit(word, lsn, memory_order_relaxed);
}

void gw_log_want(gw_log *log, unsigned worker, uint64_t lsn, bool sink)
{
    gw_shared *shared = log->shared;
    gw_waiter *waiter = &shared->waiter[worker];
    bool sync = !sink || gw_log_sinks_want_durable(log);
    if (sink)
        raise_to(&waiter->wanted, lsn);
    if (sync)
        raise_to(&waiter->wanted_durable, lsn);
    atomic_thread_fence(memory_order_seq_cst); /* F */
    if (sink && gw_log_committed(log) <= lsn &&
        atomic_load_explicit(&shared->follower_flag, memory_order_relaxed) == GW_RESTS)
        gw_futex_wake(&shared->follower_word);
    if (sync && atomic_load_explicit(&shared->committer_flag, memory_order_relaxed) &&
        atomic_exchange_explicit(&shared->committer_flag, 0, memory_order_relaxed)) {
        /* One wake-up does for all who come until it has a core: it looks again at everything with its flag up. */
        gw_futex_wake(&shared->committer_word);
    }
}

uint32_t gw_log_wait(gw_log *log, unsigned worker, uint32_t word, uint64_t durable_above, uint64_t sinks_above,
                     uint64_t committed_above, int timeout_ms)
{
    gw_waiter *waiter = &log->shared->waiter[worker];
    uint32_t flag = (durable_above != UINT64_MAX ? GW_WAITS_DURABLE : 0) |
                    (sinks_above != UINT64_MAX ? GW_WAITS_SINKS : 0) |
                    (committed_above != UINT64_MAX ? GW_WAITS_COMMITTED : 0);
    uint64_t now = gw_now_ns(), deadline = now + (uint64_t)timeout_ms * 1000000u;
    uint32_t nudges;
    for (;;) {
        /* the highest bit: it sleeps at all, so that a nudge and FAILED find it */
        atomic_store_explicit(&waiter->flag, flag | 1u << 31, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst); /* F */
        uint32_t seen = atomic_load_explicit(&waiter->word, memory_order_acquire);
        nudges = atomic_load_explicit(&waiter->nudges, memory_order_acquire);
        if (nudges != word || (flag && gw_log_state(log) == GW_STATE_FAILED) ||
            (durable_above != UINT64_MAX && gw_log_durable(log) > durable_above) ||
            (sinks_above != UINT64_MAX && gw_log_least_cursor(log) > sinks_above) ||
            (committed_above != UINT64_MAX && gw_log_committed(log) > committed_above) || now >= deadline)
            break;
        uint64_t left_ms = (deadline - now + 999999u) / 1000000u;
        gw_futex_wait(&waiter->word, seen, left_ms > INT_MAX ? INT_MAX : (int)left_ms);
        now = gw_now_ns();
    }
    atomic_store_explicit(&waiter->flag, 0, memory_order_relaxed);
    return nudges;
}

void gw_log_nudge(gw_log *log, unsigned worker)
{
    gw_waiter *waiter = &log->shared->waiter[worker];
    atomic_fetch_add_explicit(&waiter->nudges, 1, memory_order_acq_rel);
    atomic_thread_fence(memory_order_seq_cst); /* F */
    if (atomic_load_explicit(&waiter->flag, memory_order_relaxed))
        gw_futex_wake(&waiter->word);
}

/* ---- a sink that waits for `durable` --------------------------------------------------------------------------- */

void gw_log_set_sinks_want_durable(gw_log *log, bool wanted_now)
{
    atomic_store_explicit(&log->shared->sinks_want_durable, wanted_now, memory_order_relaxed);
}

bool gw_log_sinks_want_durable(const gw_log *log)
{
    return atomic_load_explicit(&log->shared->sinks_want_durable, memory_order_relaxed);
}

uint64_t gw_log_wait_durable(gw_log *log, uint64_t seen, int timeout_ms)
{
    /* durable of a failed log stands still: who looks in a loop must not spin */
    uint64_t above = log->failure_seen ? UINT64_MAX : seen;
    log->nudged = gw_log_wait(log, GW_WAITER_SINK, log->nudged, above, UINT64_MAX, UINT64_MAX, timeout_ms);
    log->failure_seen = gw_log_state(log) == GW_STATE_FAILED;
    return gw_log_durable(log);
}

bool gw_log_sinks_wanted(const gw_log *log, uint64_t lsn)
{
    return gw_waits_for_walk(log, lsn);
}

void gw_log_wake_durable(gw_log *log)
{
    gw_log_nudge(log, GW_WAITER_SINK);
}
