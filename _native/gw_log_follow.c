/* gw_log_follow.c - the walk over what is committed, and the claims of dead and stopped producers (rules: the header of
 * gw_log.h; labels: gw_log_shared.h). One thread of the delivery process. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "gw_crc32c.h"
#include "gw_log_shared.h"

enum {
    TICK_MS = 50,          /* how long the follower sleeps at most while it is stuck */
    STOPPED_KILL_MS = 300, /* a stopped producer (state T or t) is killed after this many of the reaper's ticks */
    STUCK_KILL_MS = 10000, /* any other */
};

/* ---- the walk ------------------------------------------------------------------------------------------------- */

/* The kind of the record whose marker stands at p in this run's epoch, or -1. */
static inline int marker_kind(const gw_log *log, uint64_t p)
{
    uint64_t word = atomic_load_explicit(gw_word(log, p), memory_order_acquire); /* M */
    uint64_t kind = word ^ log->shared->mix ^ p;
    return kind <= GW_PAD ? (int)kind : -1;
}

/* Two threads walk, the follower and a committer whom somebody waits for: one at a time. */
bool gw_walk(gw_log *log)
{
    pthread_mutex_lock(&log->walking);
    gw_cursor committed = gw_versioned_load(&log->shared->committed);
    uint64_t from = committed.lsn;
    for (int kind; (kind = marker_kind(log, committed.lsn)) >= 0;) {
        uint64_t size = atomic_load_explicit(gw_word(log, committed.lsn) + 2, memory_order_relaxed);
        if (size < GW_RECORD_HEADER_BYTES || size % 8 || size > gw_log_tail(log) - committed.lsn) {
            gw_log_set_state(log, GW_STATE_FAILED); /* somebody wrote into the map; recovery will say where */
            break;
        }
        committed.ordinal += kind == GW_DATA;
        committed.lsn += size;
    }
    if (committed.lsn != from)
        gw_versioned_store(&log->shared->committed, &committed);
    pthread_mutex_unlock(&log->walking);
    if (committed.lsn == from)
        return false;
    gw_wake_waiters(log, GW_WAITS_COMMITTED);
    return true;
}

static bool walk(gw_log *log)
{
    if (!gw_walk(log))
        return false;
    /* F: gw_walk's, in gw_wake_waiters */
    uint32_t flag = atomic_load_explicit(&log->shared->committer_flag, memory_order_relaxed);
    if (flag == GW_SLEEPS ||
        (flag == GW_RESTS && gw_waits_for_sync(log, atomic_load_explicit(&log->shared->durable, memory_order_relaxed))))
        gw_futex_wake(&log->shared->committer_word);
    return true;
}

/* ---- dead and stopped producers ------------------------------------------------------------------------------- */

void gw_log_owner_died(gw_log *log, int pid)
{
    for (unsigned i = 0; i < GW_INTENT_SLOTS; i++) {
        uint64_t owner = (uint64_t)pid;
        atomic_compare_exchange_strong_explicit(&log->shared->intent[i].owner, &owner, owner | GW_OWNER_DEAD, /* O */
                                                memory_order_acq_rel, memory_order_relaxed);
    }
    gw_futex_wake(&log->shared->follower_word);
}

/* A dead owner's slot is free again when its intent cannot own the hole that the walk may still meet. */
static void free_dead_slots(gw_log *log)
{
    for (unsigned i = 0; i < GW_INTENT_SLOTS; i++) {
        gw_intent *intent = &log->shared->intent[i];
        GW_FAILPOINT(before_free);
        if (!(atomic_load_explicit(&intent->owner, memory_order_acquire) & GW_OWNER_DEAD))
            continue;
        uint64_t pos = atomic_load_explicit(&intent->pos, memory_order_acquire);
        /* the tail is read after the death: it lies above whatever the dead one had claimed */
        if (pos == GW_POSITION_NONE || pos < gw_log_committed(log) || pos >= gw_log_tail(log)) {
            atomic_store_explicit(&intent->pos, GW_POSITION_NONE, memory_order_release);
            atomic_store_explicit(&intent->owner, 0, memory_order_release);
        }
    }
}

static bool is_stopped(int pid)
{
    char path[32], line[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t got = read(fd, line, sizeof line - 1);
    close(fd);
    if (got <= 0)
        return false;
    line[got] = 0;
    const char *after_name = strrchr(line, ')');
    return after_name && after_name[1] == ' ' && (after_name[2] == 'T' || after_name[2] == 't');
}

void gw_pad_write(gw_log *log, uint64_t from, uint64_t to, uint8_t flags, uint64_t epoch, uint64_t mix)
{
    gw_header pad = {.epoch = (uint32_t)epoch, .size = to - from, .kind = GW_PAD, .flags = flags};
    pad.crc = gw_record_crc(&pad, NULL, from);
    _Atomic uint64_t *word = gw_word(log, from);
    atomic_thread_fence(memory_order_release);
    for (unsigned i = 1; i < sizeof pad / 8; i++)
        gw_store_word(&word[i], (const uint8_t *)&pad + 8ull * i);
    GW_FAILPOINT(pad_before_marker);
    atomic_store_explicit(word, (from | GW_PAD) ^ mix, memory_order_release); /* M */
}

/* The walk is stuck at p below the tail. Decide from the intent slots who owns the hole (docs/log.md, "Dead
 * producers"). S = slots that stand at p. A living member may still commit: wait for it, kill it when it is stopped.
 * All dead: the hole is as long as the smallest member whose end is a proven boundary. True: something was filled. */
static bool reap(gw_log *log)
{
    uint64_t p = gw_log_committed(log);
    uint64_t tail = atomic_load_explicit(&log->shared->tail, memory_order_acquire) & ~GW_TAIL_CLOSED; /* T */
    if (p >= tail)
        return false;
    struct {
        uint64_t owner, pos, len;
    } slot[GW_INTENT_SLOTS];
    for (unsigned i = 0; i < GW_INTENT_SLOTS; i++) {
        gw_intent *intent = &log->shared->intent[i];
        slot[i].owner = atomic_load_explicit(&intent->owner, memory_order_acquire); /* O */
        slot[i].pos = atomic_load_explicit(&intent->pos, memory_order_acquire);     /* I */
        slot[i].len = atomic_load_explicit(&intent->len, memory_order_relaxed);
    }
    if (marker_kind(log, p) >= 0)
        return true;

    /* Time is counted in looks that are a tick apart: by the clock, since a busy log wakes the follower much sooner;
     * each as one tick, since the reaper may have been stopped itself. */
    uint64_t now = gw_now_ns();
    if (log->stuck_at != p) {
        log->stuck_at = p;
        log->stuck_ms = log->stopped_ms = 0;
        log->ticked_at_ns = now;
    }
    bool ticked = now - log->ticked_at_ns >= TICK_MS * 1000000ull;
    if (ticked) {
        log->ticked_at_ns = now;
        log->stuck_ms += TICK_MS;
    }
    bool overdue = log->stuck_ms >= STUCK_KILL_MS;
    unsigned members = 0, living = 0;
    bool stopped = false;
    for (unsigned i = 0; i < GW_INTENT_SLOTS; i++) {
        if (!slot[i].owner || slot[i].pos != p)
            continue;
        members++;
        if (slot[i].owner & GW_OWNER_DEAD)
            continue;
        living++;
        int pid = (int)slot[i].owner;
        if (pid == getpid())
            continue;
        bool stopped_now = ticked && is_stopped(pid);
        stopped |= stopped_now;
        /* Its pid is still its own: the supervisor marks the slot dead before it reaps the child. */
        if ((stopped_now && log->stopped_ms + TICK_MS >= STOPPED_KILL_MS) || overdue) {
            kill(pid, SIGKILL);
            gw_counter_add(&log->shared->counters[GW_BLOCK_DELIVERY], GW_COUNTER_KILLED_STUCK, 1);
            log->stuck_ms = 0;
        }
    }
    log->stopped_ms = stopped ? log->stopped_ms + TICK_MS : (ticked ? 0 : log->stopped_ms);
    if (living)
        return false;
    if (!members) {
        /* Claimed, and no slot says by whom: cannot be, unless shared memory was overwritten. Recovery can mend it. */
        if (overdue)
            gw_log_set_state(log, GW_STATE_FAILED);
        return false;
    }

    uint64_t n = 0;
    bool one_length = true;
    for (unsigned i = 0; i < GW_INTENT_SLOTS; i++) {
        if (!slot[i].owner || slot[i].pos != p)
            continue;
        if (n && slot[i].len != n)
            one_length = false;
        if (!n || slot[i].len < n)
            n = slot[i].len;
    }
    if (!one_length) {
        uint64_t best = 0;
        for (unsigned i = 0; i < GW_INTENT_SLOTS; i++) {
            if (!slot[i].owner || slot[i].pos != p || (best && slot[i].len >= best))
                continue;
            uint64_t end = p + slot[i].len;
            bool boundary = tail == end;
            for (unsigned k = 0; k < GW_INTENT_SLOTS && !boundary; k++)
                boundary = slot[k].owner && slot[k].pos == end;
            if (boundary || (end < tail && marker_kind(log, end) >= 0))
                best = slot[i].len;
        }
        if (!best)
            return false;
        n = best;
    }
    for (uint64_t x = p + 8; x < p + n; x += 8)
        if (marker_kind(log, x) >= 0)
            n = x - p;
    gw_pad_write(log, p, p + n, 0, log->shared->epoch, log->shared->mix);
    gw_counter_add(&log->shared->counters[GW_BLOCK_DELIVERY], GW_COUNTER_PADS, 1);
    return true;
}

/* ---- the follower --------------------------------------------------------------------------------------------- */

void gw_log_wake(gw_log *log)
{
    gw_futex_wake(&log->shared->follower_word);
}

uint64_t gw_log_follow(gw_log *log, uint64_t seen, int timeout_ms)
{
    gw_shared *shared = log->shared;
    free_dead_slots(log);
    walk(log);
    uint64_t now = gw_now_ns();
    if (gw_log_committed(log) > seen)
        return gw_log_committed(log);
    uint64_t deadline = now + (uint64_t)timeout_ms * 1000000u;
    for (;;) {
        atomic_store_explicit(&shared->follower_flag, GW_SLEEPS, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst); /* F */
        uint32_t word = atomic_load_explicit(&shared->follower_word, memory_order_relaxed);
        bool progress = walk(log);
        if (!progress && reap(log))
            progress = walk(log);
        if (!progress && gw_log_committed(log) <= seen && (now = gw_now_ns()) < deadline) {
            uint64_t left_ms = (deadline - now + 999999u) / 1000000u;
            bool stuck = gw_log_tail(log) > gw_log_committed(log);
            int wait_ms = stuck && left_ms > TICK_MS ? TICK_MS : (int)left_ms;
            bool timed_out = gw_futex_wait(&shared->follower_word, word, wait_ms) == ETIMEDOUT;
            atomic_store_explicit(&shared->follower_flag, 0, memory_order_relaxed);
            free_dead_slots(log);
            progress = walk(log);
            if (!progress && timed_out)
                continue;
        }
        atomic_store_explicit(&shared->follower_flag, 0, memory_order_relaxed);
        return gw_log_committed(log);
    }
}

/* A crowd that waits is served in batches: without the first part of the rest each of its events would wake the
 * follower, which costs more than the event. A client alone comes in its second part, which it ends. */
void gw_log_rest(gw_log *log, int microseconds)
{
    enum { CROWD_BYTES = 2048, CROWD_US = 100 };
    gw_shared *shared = log->shared;
    uint64_t committed = gw_log_committed(log);
    bool crowd = committed - log->rested_at > CROWD_BYTES;
    log->rested_at = committed;
    uint32_t word = atomic_load_explicit(&shared->follower_word, memory_order_relaxed);
    if (crowd && microseconds > CROWD_US) {
        gw_futex_wait_us(&shared->follower_word, word, CROWD_US);
        microseconds -= CROWD_US;
    }
    atomic_store_explicit(&shared->follower_flag, GW_RESTS, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst); /* F */
    word = atomic_load_explicit(&shared->follower_word, memory_order_relaxed);
    if (!gw_waits_for_walk(log, committed))
        gw_futex_wait_us(&shared->follower_word, word, microseconds);
    atomic_store_explicit(&shared->follower_flag, 0, memory_order_relaxed);
}
