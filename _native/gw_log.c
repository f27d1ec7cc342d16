/* gw_log.c - claim and commit, walk, reap, read (rules: the header of gw_log.h; labels: gw_log_shared.h).
 *
 * Claim and commit of one record, by one thread with one intent slot:
 *   1 t = tail. Closed: refuse.                    5 release fence
 *   2 t + n > reclaim + capacity: full.            6 store everything but the marker
 *   3 slot.len = n; slot.pos = t.                  8 store-release the marker: the commit
 *   4 CAS tail t -> t + n. Lost: back to 1.        9 seq_cst fence; flag up: word += 1, FUTEX_WAKE
 *   (7, the index insert, comes with idempotency)  10 state FAILED: no 2xx
 * Between 4 and 8 nothing waits. Death at any step leaves slot.pos at the claim, which is how the reaper finds it. */
#include "gw_log_shared.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "gw_crc32c.h"
#include "gw_hash.h"

#ifdef GW_FAILPOINTS
void (*gw_failpoint_hook)(const char *name);

/* GW_FAILPOINT=name:N:SIGNAL in the environment: the process gets SIGNAL (a number) as it passes for the Nth time. */
static char failpoint_name[32];
static int failpoint_countdown, failpoint_signal;

static void failpoint_from_environment(const char *name)
{
    if (strcmp(name, failpoint_name) == 0 && --failpoint_countdown == 0)
        kill(getpid(), failpoint_signal);
}

__attribute__((constructor)) static void failpoint_install(void)
{
    const char *text = getenv("GW_FAILPOINT");
    if (text && sscanf(text, "%31[a-z_]:%d:%d", failpoint_name, &failpoint_countdown, &failpoint_signal) == 3)
        gw_failpoint_hook = failpoint_from_environment;
}
#endif

enum {
    TICK_MS = 50,          /* how long the follower sleeps at most while it is stuck */
    STOPPED_KILL_MS = 300, /* a stopped producer (state T or t) is killed after this many of the reaper's ticks */
    STUCK_KILL_MS = 10000, /* any other */
};

/* ---- small parts ---------------------------------------------------------------------------------------------- */

uint64_t gw_mix(const uint64_t secret[2], uint64_t epoch)
{
    return gw_siphash(secret, &epoch, sizeof epoch);
}

gw_status gw_fail(gw_error *error, gw_status status, int error_number, uint64_t lsn, const char *text)
{
    if (error) {
        error->error_number = error_number;
        error->lsn = lsn;
        snprintf(error->text, sizeof error->text, "%s", text);
    }
    return status;
}

uint64_t gw_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int gw_futex_wait(_Atomic uint32_t *word, uint32_t seen, int timeout_ms)
{
    struct timespec timeout = {timeout_ms / 1000, (timeout_ms % 1000) * 1000000L};
    return syscall(SYS_futex, word, FUTEX_WAIT, seen, &timeout, NULL, 0) ? errno : 0;
}

void gw_futex_wake(_Atomic uint32_t *word)
{
    atomic_fetch_add_explicit(word, 1, memory_order_relaxed);
    syscall(SYS_futex, word, FUTEX_WAKE, 0x7fffffff, NULL, NULL, 0);
}

void gw_versioned_store(gw_versioned *v, const gw_cursor *value)
{
    uint64_t words[sizeof *value / 8];
    memcpy(words, value, sizeof words);
    uint64_t next = atomic_load_explicit(&v->version, memory_order_relaxed) + 1;
    /* the last version is out before its predecessor's words change */
    atomic_thread_fence(memory_order_release);
    for (unsigned i = 0; i < sizeof words / 8; i++)
        atomic_store_explicit(&v->copy[next & 1][i], words[i], memory_order_relaxed);
    atomic_store_explicit(&v->version, next, memory_order_release); /* V */
}

gw_cursor gw_versioned_load(const gw_versioned *v)
{
    gw_cursor value;
    uint64_t words[sizeof value / 8], version, again;
    do {
        version = atomic_load_explicit(&v->version, memory_order_acquire); /* V */
        for (unsigned i = 0; i < sizeof words / 8; i++)
            words[i] = atomic_load_explicit(&v->copy[version & 1][i], memory_order_relaxed);
        atomic_thread_fence(memory_order_acquire);
        again = atomic_load_explicit(&v->version, memory_order_relaxed);
    } while (version != again);
    memcpy(&value, words, sizeof value);
    return value;
}

uint32_t gw_record_crc(const gw_header *header, const uint8_t *rest, uint64_t lsn)
{
    bool pad = header->kind == GW_PAD;
    uint32_t crc =
        gw_crc32c(pad ? GW_PAD_SEED : 0, (const uint8_t *)header + GW_CRC_FROM, sizeof *header - GW_CRC_FROM);
    if (!pad)
        crc = gw_crc32c(crc, rest, (size_t)header->device_id_bytes + header->body_bytes);
    return gw_crc32c_u64(crc, lsn);
}

/* ---- accessors ------------------------------------------------------------------------------------------------ */

int gw_log_fd_shared(const gw_log *log)
{
    return log->fd_shared;
}

uint64_t gw_log_capacity(const gw_log *log)
{
    return log->shared->capacity;
}

uint64_t gw_log_record_bytes_max(const gw_log *log)
{
    return log->shared->record_bytes_max;
}

uint64_t gw_log_identity(const gw_log *log)
{
    return log->shared->identity;
}

uint64_t gw_log_tail(const gw_log *log)
{
    return atomic_load_explicit(&log->shared->tail, memory_order_acquire) & ~GW_TAIL_CLOSED;
}

uint64_t gw_log_committed(const gw_log *log)
{
    return gw_versioned_load(&log->shared->committed).lsn;
}

uint64_t gw_log_committed_ordinal(const gw_log *log)
{
    return gw_versioned_load(&log->shared->committed).ordinal;
}

uint64_t gw_log_durable(const gw_log *log)
{
    return atomic_load_explicit(&log->shared->durable, memory_order_acquire); /* D */
}

uint64_t gw_log_reclaim(const gw_log *log)
{
    return atomic_load_explicit(&log->shared->reclaim, memory_order_acquire);
}

enum gw_state gw_log_state(const gw_log *log)
{
    return (enum gw_state)atomic_load_explicit(&log->shared->state, memory_order_acquire);
}

void gw_log_set_state(gw_log *log, enum gw_state state)
{
    uint32_t now = atomic_load_explicit(&log->shared->state, memory_order_acquire);
    while (now < (uint32_t)state &&
           !atomic_compare_exchange_weak_explicit(&log->shared->state, &now, (uint32_t)state, /* S */
                                                  memory_order_acq_rel, memory_order_acquire))
        ;
    if (state != GW_RUNNING)
        atomic_fetch_or_explicit(&log->shared->tail, GW_TAIL_CLOSED, memory_order_acq_rel);
    gw_futex_wake(&log->shared->follower_word);
    gw_futex_wake(&log->shared->committer_word);
}

gw_counter_block *gw_log_counters(gw_log *log, unsigned block)
{
    return block < GW_BLOCK_COUNT ? &log->shared->counters[block] : NULL;
}

int64_t gw_log_unexplained(const gw_log *log, unsigned sink)
{
    /* the cursor first: it is never above the committed position that is read after it */
    gw_cursor cursor = gw_cursor_load(log, sink), committed = gw_versioned_load(&log->shared->committed);
    uint64_t in_log = cursor.lsn == committed.lsn ? 0 : committed.ordinal - cursor.ordinal;
    return (int64_t)(committed.ordinal - cursor.base - cursor.published - cursor.dead_lettered - in_log);
}

int gw_log_sink(const gw_log *log, const char *name)
{
    for (unsigned i = 0; i < log->shared->sinks; i++)
        if (strncmp(log->shared->sink_name[i], name, GW_SINK_NAME_BYTES) == 0)
            return (int)i;
    return -1;
}

gw_cursor gw_cursor_load(const gw_log *log, unsigned sink)
{
    return gw_versioned_load(&log->shared->cursor[sink]);
}

void gw_cursor_store(gw_log *log, unsigned sink, const gw_cursor *cursor)
{
    gw_shared *shared = log->shared;
    gw_versioned_store(&shared->cursor[sink], cursor);
    /* Producers get the space back with the next sync. Hurry it when they may be short of it. */
    uint64_t reclaim = gw_log_reclaim(log);
    bool urgent = gw_log_tail(log) - reclaim > shared->capacity / 2 && cursor->lsn - reclaim > shared->capacity / 4;
    atomic_thread_fence(memory_order_seq_cst);
    if (urgent || atomic_load_explicit(&shared->committer_flag, memory_order_relaxed))
        gw_futex_wake(&shared->committer_word);
}

/* ---- producers ------------------------------------------------------------------------------------------------ */

gw_status gw_producer_open(gw_log *log, gw_producer **producer)
{
    for (unsigned i = 0; i < GW_INTENT_SLOTS; i++) {
        gw_intent *intent = &log->shared->intent[i];
        uint64_t free_slot = 0;
        if (!atomic_compare_exchange_strong_explicit(&intent->owner, &free_slot, (uint64_t)getpid(),
                                                     memory_order_acq_rel, memory_order_relaxed))
            continue;
        *producer = malloc(sizeof **producer);
        if (!*producer) {
            atomic_store_explicit(&intent->owner, 0, memory_order_release);
            return GW_ERRNO;
        }
        (*producer)->log = log;
        (*producer)->intent = intent;
        return GW_OK;
    }
    return GW_NO_SLOT;
}

void gw_producer_close(gw_producer *producer)
{
    atomic_store_explicit(&producer->intent->pos, GW_POSITION_NONE, memory_order_release);
    atomic_store_explicit(&producer->intent->owner, 0, memory_order_release);
    free(producer);
}

static inline void store_word(_Atomic uint64_t *to, const void *from)
{
    uint64_t word;
    memcpy(&word, from, 8);
    atomic_store_explicit(to, word, memory_order_relaxed);
}

gw_status gw_producer_append(gw_producer *producer, const gw_event *event, uint64_t *lsn)
{
    gw_shared *shared = producer->log->shared;
    gw_intent *intent = producer->intent;
    uint64_t used = GW_RECORD_HEADER_BYTES + (uint64_t)event->device_id_bytes + event->body_bytes;
    uint64_t n = (used + 7) & ~7ull;
    if (n > shared->record_bytes_max)
        return GW_TOO_LARGE;

    /* Header, device id and as many bytes of the body as fill a word: from there on words come straight from the
     * body. Everything that can be computed before the claim is: a claim must be short. */
    _Alignas(8) uint8_t head[GW_RECORD_HEADER_BYTES + 256 + 8];
    gw_header *header = (gw_header *)(void *)head;
    *header = (gw_header){.epoch = shared->epoch,
                          .size = n,
                          .received_at_ns = event->received_at_ns,
                          .seq = event->seq,
                          .boot = event->boot,
                          .body_bytes = event->body_bytes,
                          .device_id_bytes = event->device_id_bytes,
                          .flags = event->flags,
                          .kind = GW_DATA,
                          .splice = event->splice};
    uint32_t head_bytes = GW_RECORD_HEADER_BYTES + event->device_id_bytes;
    memcpy(head + GW_RECORD_HEADER_BYTES, event->device_id, event->device_id_bytes);
    uint32_t crc = gw_crc32c(0, head + GW_CRC_FROM, head_bytes - GW_CRC_FROM);
    crc = gw_crc32c(crc, event->body, event->body_bytes);
    uint32_t fill = (8 - head_bytes % 8) % 8;
    if (fill > event->body_bytes)
        fill = event->body_bytes;
    memset(head + head_bytes, 0, 8);
    memcpy(head + head_bytes, event->body, fill);
    uint32_t head_words = (head_bytes + fill + 7) / 8;
    const uint8_t *rest = event->body + fill;
    uint32_t rest_words = (event->body_bytes - fill) / 8, rest_bytes = (event->body_bytes - fill) % 8;
    uint64_t last = 0;
    memcpy(&last, rest + rest_words * 8ull, rest_bytes);

    GW_FAILPOINT(before_claim);
    uint64_t t = atomic_load_explicit(&shared->tail, memory_order_acquire); /* T */
    for (;;) {
        if (t & GW_TAIL_CLOSED) {
            atomic_store_explicit(&intent->pos, GW_POSITION_NONE, memory_order_release);
            return GW_CLOSED;
        }
        uint64_t reclaim = atomic_load_explicit(&shared->reclaim, memory_order_acquire); /* R */
        if (t + n > reclaim + shared->capacity) {
            atomic_store_explicit(&intent->pos, GW_POSITION_NONE, memory_order_release);
            return GW_FULL;
        }
        atomic_store_explicit(&intent->len, n, memory_order_relaxed);
        atomic_store_explicit(&intent->pos, t, memory_order_release); /* I */
        GW_FAILPOINT(after_intent);
        if (atomic_compare_exchange_strong_explicit(&shared->tail, &t, t + n, memory_order_acq_rel, /* T */
                                                    memory_order_acquire))
            break;
    }
    GW_FAILPOINT(after_claim);
    atomic_thread_fence(memory_order_release);
    header->crc = gw_crc32c_u64(crc, t);
    _Atomic uint64_t *to = gw_word(producer->log, t);
    for (uint32_t i = 1; i < head_words; i++)
        store_word(&to[i], head + 8ull * i);
    GW_FAILPOINT(mid_copy);
    to += head_words;
    for (uint32_t i = 0; i < rest_words; i++)
        store_word(&to[i], rest + 8ull * i);
    if (rest_bytes)
        atomic_store_explicit(&to[rest_words], last, memory_order_relaxed);
    GW_FAILPOINT(before_marker);
    /* The commit: from here the event is in the log, and devices may be told 202. */
    atomic_store_explicit(gw_word(producer->log, t), (t | GW_DATA) ^ shared->mix, memory_order_release); /* M */
    GW_FAILPOINT(after_marker);
    atomic_thread_fence(memory_order_seq_cst); /* F */
    if (atomic_load_explicit(&shared->follower_flag, memory_order_relaxed))
        gw_futex_wake(&shared->follower_word);
    *lsn = t;
    return atomic_load_explicit(&shared->state, memory_order_acquire) == GW_STATE_FAILED ? GW_FAILED : GW_OK; /* S */
}

/* ---- the walk ------------------------------------------------------------------------------------------------- */

/* The kind of the record whose marker stands at p in this run's epoch, or -1. */
static inline int marker_kind(const gw_log *log, uint64_t p)
{
    uint64_t word = atomic_load_explicit(gw_word(log, p), memory_order_acquire); /* M */
    uint64_t kind = word ^ log->shared->mix ^ p;
    return kind <= GW_PAD ? (int)kind : -1;
}

static bool walk(gw_log *log)
{
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
    if (committed.lsn == from)
        return false;
    gw_versioned_store(&log->shared->committed, &committed);
    log->stuck_ms = log->stopped_ms = 0;
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&log->shared->committer_flag, memory_order_relaxed))
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

void gw_pad_write(gw_log *log, uint64_t from, uint64_t to, uint64_t epoch, uint64_t mix)
{
    gw_header pad = {.epoch = (uint32_t)epoch, .size = to - from, .kind = GW_PAD};
    pad.crc = gw_record_crc(&pad, NULL, from);
    _Atomic uint64_t *word = gw_word(log, from);
    atomic_thread_fence(memory_order_release);
    for (unsigned i = 1; i < sizeof pad / 8; i++)
        store_word(&word[i], (const uint8_t *)&pad + 8ull * i);
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
    gw_pad_write(log, p, p + n, log->shared->epoch, log->shared->mix);
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
        atomic_store_explicit(&shared->follower_flag, 1, memory_order_relaxed);
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

/* ---- reading -------------------------------------------------------------------------------------------------- */

gw_status gw_log_read(const gw_log *log, uint64_t lsn, gw_record *record)
{
    const gw_shared *shared = log->shared;
    uint64_t committed = gw_log_committed(log);
    if (lsn >= committed)
        return GW_EMPTY;
    if (lsn % 8)
        return GW_CORRUPT;
    const gw_header *header = (const gw_header *)(const void *)gw_word(log, lsn);
    const uint8_t *rest = (const uint8_t *)(header + 1);
    uint64_t mix = header->epoch == shared->epoch ? shared->mix : gw_mix(shared->secret, header->epoch);
    uint64_t kind = header->marker ^ mix ^ lsn;
    if (kind > GW_PAD || kind != header->kind || header->size < sizeof *header || header->size % 8 ||
        header->size > committed - lsn || !gw_epoch_ok(shared->range, shared->epochs, lsn, header->epoch))
        return GW_CORRUPT;
    if (kind != GW_PAD) {
        uint64_t used = sizeof *header + (uint64_t)header->device_id_bytes + header->body_bytes;
        if (header->size != ((used + 7) & ~7ull) || header->size > shared->record_bytes_max)
            return GW_CORRUPT;
    }
    if (header->crc != gw_record_crc(header, rest, lsn))
        return GW_CORRUPT;
    *record = (gw_record){.lsn = lsn,
                          .size = header->size,
                          .received_at_ns = header->received_at_ns,
                          .seq = header->seq,
                          .boot = header->boot,
                          .device_id = rest,
                          .body = rest + header->device_id_bytes,
                          .body_bytes = header->body_bytes,
                          .epoch = header->epoch,
                          .device_id_bytes = header->device_id_bytes,
                          .flags = header->flags,
                          .kind = header->kind,
                          .splice = header->splice};
    return GW_OK;
}
