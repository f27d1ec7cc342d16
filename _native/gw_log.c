/* gw_log.c - small parts, claim and commit (rules: the header of gw_log.h; labels: gw_log_shared.h).
 *
 * Claim and commit of one record, by one thread with one intent slot:
 *   1 t = tail. Closed: refuse.                    5 release fence
 *   2 t + n > reclaim + capacity: full.            6 store everything but the marker
 *   3 slot.len = n; slot.pos = t.                  8 store-release the marker: the commit
 *   4 CAS tail t -> t + n. Lost: back to 1.        9 seq_cst fence; flag up: word += 1, FUTEX_WAKE
 *   7 a key: insert into the index                 10 state FAILED: no 2xx
 * An event with a key is looked up before 1; an insert that finds the key after all turns the claim into a VOID.
 * Between 4 and 8 nothing waits. Death at any step leaves slot.pos at the claim, which is how the reaper finds it. */
#include "gw_log_index.h"
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

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; an older kernel refuses it, and faults page by page */
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

#ifdef GW_FAILPOINTS
void (*gw_failpoint_hook)(const char *name);

/* GW_FAILPOINT=name:N:SIGNAL[:FILE] in the environment: the process gets SIGNAL (a number) as it passes for the Nth
 * time; with FILE only the process that removes it, so that one of a family and of its successors is hit. */
static char failpoint_name[32], failpoint_file[256];
static int failpoint_countdown, failpoint_signal;

static void failpoint_from_environment(const char *name)
{
    if (strcmp(name, failpoint_name) == 0 && --failpoint_countdown == 0 &&
        (!failpoint_file[0] || unlink(failpoint_file) == 0))
        raise(failpoint_signal); /* to this thread: a signal to the process may stop it some instructions later */
}

__attribute__((constructor)) static void failpoint_install(void)
{
    const char *text = getenv("GW_FAILPOINT");
    if (text && sscanf(text, "%31[a-z_]:%d:%d:%255s", failpoint_name, &failpoint_countdown, &failpoint_signal,
                       failpoint_file) >= 3)
        gw_failpoint_hook = failpoint_from_environment;
}
#endif

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

int gw_futex_wait_us(_Atomic uint32_t *word, uint32_t seen, int64_t timeout_us)
{
    struct timespec timeout = {timeout_us / 1000000, (timeout_us % 1000000) * 1000L};
    return syscall(SYS_futex, word, FUTEX_WAIT, seen, &timeout, NULL, 0) ? errno : 0;
}

int gw_futex_wait(_Atomic uint32_t *word, uint32_t seen, int timeout_ms)
{
    return gw_futex_wait_us(word, seen, 1000ll * timeout_ms);
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
        gw_crc32c(pad ? GW_PAD_SEED : 0, (const uint8_t *)header + GW_CRC_FROM, GW_DEAD_OFFSET - GW_CRC_FROM);
    crc = gw_crc32c_u64(crc, 0); /* dead letters are marked later */
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

uint64_t gw_log_used(const gw_log *log)
{
    uint64_t reclaim = gw_log_reclaim(log); /* first: the tail is never below it */
    return gw_log_tail(log) - reclaim;
}

void gw_log_set_water(gw_log *log, uint64_t high, uint64_t low)
{
    gw_shared *shared = log->shared;
    uint64_t least = shared->record_bytes_max; /* an empty log takes the largest record */
    high = high < least ? least : high > shared->capacity ? shared->capacity : high;
    low = low < least ? least : low > high ? high : low;
    atomic_store_explicit(&shared->high_water, high, memory_order_relaxed);
    atomic_store_explicit(&shared->low_water, low, memory_order_relaxed);
}

bool gw_log_is_full(const gw_log *log)
{
    /* only a producer takes the flag back, and none may come */
    return atomic_load_explicit(&log->shared->shedding, memory_order_relaxed) &&
           gw_log_used(log) > atomic_load_explicit(&log->shared->low_water, memory_order_relaxed);
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
    gw_wake_waiters(log, ~0u);
}

gw_counter_block *gw_log_counters(gw_log *log, unsigned block)
{
    return block < GW_BLOCK_COUNT ? &log->shared->counters[block] : NULL;
}

/* ---- producers ------------------------------------------------------------------------------------------------ */

gw_status gw_producer_open(gw_log *log, gw_producer **producer)
{
    /* The index is met at random: in large pages a look costs one miss, in small ones another for the page table. Else
     * at least no page fault on the way of an event. */
    void *index = (uint8_t *)log->shared + GW_INDEX_OFFSET;
    size_t bytes = log->shared_bytes - GW_INDEX_OFFSET;
    if (madvise(index, bytes & ~(GW_INDEX_ALIGNMENT - 1), MADV_COLLAPSE) || bytes % GW_INDEX_ALIGNMENT)
        madvise(index, bytes, MADV_POPULATE_WRITE);
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
        (*producer)->mapped_from = gw_log_tail(log);
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

/* Everything that can be computed before the claim is: a claim must be short. */
static void prepare(gw_image *image, const gw_event *event, uint32_t epoch, uint64_t size)
{
    uint8_t *head = image->head;
    *gw_image_header(image) = (gw_header){.epoch = epoch,
                                          .size = size,
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
    image->crc = gw_crc32c(crc, event->body, event->body_bytes);
    uint32_t fill = (8 - head_bytes % 8) % 8;
    if (fill > event->body_bytes)
        fill = event->body_bytes;
    memset(head + head_bytes, 0, 8);
    memcpy(head + head_bytes, event->body, fill);
    image->head_words = (head_bytes + fill + 7) / 8;
    image->rest = event->body + fill;
    image->rest_words = (event->body_bytes - fill) / 8;
    image->rest_bytes = (event->body_bytes - fill) % 8;
    image->last = 0;
    memcpy(&image->last, image->rest + image->rest_words * 8ull, image->rest_bytes);
}

/* Above the high mark nothing is taken until the low one is reached; the ring's end is a mark that nobody crosses. One
 * event that is too large for what is left is refused alone: it says nothing about those of others. */
static bool has_room(gw_shared *shared, uint64_t used, uint64_t n)
{
    bool shedding = atomic_load_explicit(&shared->shedding, memory_order_relaxed);
    uint64_t mark = atomic_load_explicit(shedding ? &shared->low_water : &shared->high_water, memory_order_relaxed);
    bool room = used + n <= mark;
    uint64_t usual = shared->record_bytes_max / 8;
    if (room ? shedding : !shedding && used + (n < usual ? n : usual) > mark)
        atomic_store_explicit(&shared->shedding, !room, memory_order_relaxed);
    return room;
}

/* Steps 1 to 4. */
static gw_status claim(gw_producer *producer, uint64_t n, uint64_t *lsn)
{
    gw_shared *shared = producer->log->shared;
    gw_intent *intent = producer->intent;
    uint64_t t = atomic_load_explicit(&shared->tail, memory_order_acquire); /* T */
    for (;;) {
        gw_status refused = GW_OK;
        GW_FAILPOINT(after_tail);
        uint64_t reclaim = atomic_load_explicit(&shared->reclaim, memory_order_acquire); /* R */
        if (t < reclaim) { /* it slept since then: everything up to there is done */
            t = atomic_load_explicit(&shared->tail, memory_order_acquire); /* T */
            continue;
        }
        if (t & GW_TAIL_CLOSED)
            refused = GW_CLOSED;
        else if (!has_room(shared, t - reclaim, n))
            refused = GW_FULL;
        if (refused != GW_OK) {
            atomic_store_explicit(&intent->pos, GW_POSITION_NONE, memory_order_release);
            return refused;
        }
        atomic_store_explicit(&intent->len, n, memory_order_relaxed);
        atomic_store_explicit(&intent->pos, t, memory_order_release); /* I */
        GW_FAILPOINT(after_intent);
        if (atomic_compare_exchange_strong_explicit(&shared->tail, &t, t + n, memory_order_acq_rel, /* T */
                                                    memory_order_acquire)) {
            *lsn = t;
            return GW_OK;
        }
    }
}

/* Step 6: everything but the marker. */
static void store(gw_log *log, gw_image *image, uint64_t t)
{
    gw_image_header(image)->crc = gw_crc32c_u64(image->crc, t);
    _Atomic uint64_t *to = gw_word(log, t);
    for (uint32_t i = 1; i < image->head_words; i++)
        gw_store_word(&to[i], image->head + 8ull * i);
    GW_FAILPOINT(mid_copy);
    to += image->head_words;
    for (uint32_t i = 0; i < image->rest_words; i++)
        gw_store_word(&to[i], image->rest + 8ull * i);
    if (image->rest_bytes)
        atomic_store_explicit(&to[image->rest_words], image->last, memory_order_relaxed);
}

/* Steps 8 and 9. */
static void commit(gw_shared *shared, gw_log *log, uint64_t t, enum gw_kind kind)
{
    /* From here the event is in the log, and devices may be told 202. */
    atomic_store_explicit(gw_word(log, t), (t | kind) ^ shared->mix, memory_order_release); /* M */
    GW_FAILPOINT(after_marker);
    atomic_thread_fence(memory_order_seq_cst); /* F */
    if (atomic_load_explicit(&shared->follower_flag, memory_order_relaxed) == GW_SLEEPS)
        gw_futex_wake(&shared->follower_word);
}

/* The claim's key is in the log already: give the place away, so that the walk goes on. */
static void commit_void(gw_log *log, gw_image *image, const gw_event *event, uint64_t t)
{
    gw_header *header = gw_image_header(image);
    header->kind = GW_VOID;
    uint32_t head_bytes = GW_RECORD_HEADER_BYTES + event->device_id_bytes;
    uint32_t crc = gw_crc32c(0, image->head + GW_CRC_FROM, head_bytes - GW_CRC_FROM);
    crc = gw_crc32c(crc, event->body, event->body_bytes);
    header->crc = gw_crc32c_u64(crc, t);
    _Atomic uint64_t *to = gw_word(log, t);
    gw_store_word(&to[1], image->head + 8);
    gw_store_word(&to[6], image->head + 48);
    GW_FAILPOINT(before_void);
    commit(log->shared, log, t, GW_VOID);
    header->kind = GW_DATA;
}

static inline bool is_keyed(const gw_event *event)
{
#ifdef GW_NO_INDEX /* benchmarks/dedupe.py: what is left is what an event costs without the index */
    (void)event;
    return false;
#else
    return event->flags & GW_EVENT_KEYED;
#endif
}

void gw_producer_prefetch(const gw_producer *producer, gw_event *event, uint64_t ahead)
{
    enum { LINE = 64, LINES = 5 };
    const gw_log *log = producer->log;
    uint64_t tail = gw_log_tail(log) + ahead;
    if (is_keyed(event)) {
        event->key_hash = gw_index_hash(log, event->device_id, event->device_id_bytes, event->boot, event->seq);
        gw_index_prefetch(log, event->key_hash, tail);
    }
    const uint8_t *place = (const uint8_t *)gw_word(log, tail);
    for (unsigned i = 0; i < LINES; i++) /* behind the ring's end comes its beginning again */
        __builtin_prefetch(place + (size_t)LINE * i, 1);
}

/* What is written is not touched again, but its pages stay in this process's page table, writable. A sync would take
 * that back page by page, each with an interrupt to the core that the producer runs on: a quarter of both cores when a
 * million events a second come in. Let go of many at once: the page cache keeps the bytes, and that they are dirty. */
static void let_go(gw_producer *producer, uint64_t end)
{
    enum { LEAST = 1 << 20 };
    gw_log *log = producer->log;
    uint64_t from = (producer->mapped_from + GW_PAGE - 1) & ~(GW_PAGE - 1), to = end & ~(GW_PAGE - 1);
    if (to < producer->mapped_from + LEAST)
        return;
    producer->mapped_from = to;
    if (to - from > log->mask)
        from = to - (log->mask + 1);
    uint64_t first = from & log->mask, bytes = to - from, room = log->mask + 1 - first;
    madvise(log->ring + first, bytes < room ? bytes : room, MADV_DONTNEED);
    if (bytes > room)
        madvise(log->ring, bytes - room, MADV_DONTNEED);
}

gw_status gw_producer_append(gw_producer *producer, const gw_event *event, uint64_t *lsn)
{
    gw_log *log = producer->log;
    gw_shared *shared = log->shared;
    uint64_t used = GW_RECORD_HEADER_BYTES + (uint64_t)event->device_id_bytes + event->body_bytes;
    uint64_t n = (used + 7) & ~7ull;
    if (n > shared->record_bytes_max)
        return GW_TOO_LARGE;
    bool keyed = is_keyed(event);
    uint64_t hash = event->key_hash, head = 0, t;
    if (keyed) {
        if (!hash)
            hash = gw_index_hash(log, event->device_id, event->device_id_bytes, event->boot, event->seq);
        head = atomic_load_explicit(gw_index_head(log, hash), memory_order_acquire); /* X */
        gw_index_prefetch_link(log, head);
    }
    gw_image image;
    prepare(&image, event, shared->epoch, n);

    for (;;) {
        if (keyed) {
            gw_found found = gw_index_walk(log, hash, head, 0, &image, lsn);
            if (found == GW_FOUND_OPEN)
                return GW_BUSY;
            if (found != GW_FOUND_NOTHING) {
                if (gw_log_state(log) == GW_STATE_FAILED)
                    return GW_FAILED;
                return found == GW_FOUND_SAME ? GW_DUPLICATE : GW_CONFLICT;
            }
        }
        GW_FAILPOINT(before_claim);
        gw_status status = claim(producer, n, &t);
        if (status != GW_OK)
            return status;
        GW_FAILPOINT(after_claim);
        atomic_thread_fence(memory_order_release);
        store(log, &image, t);
        GW_FAILPOINT(before_index);
        if (!keyed || gw_index_insert(log, hash, head, &image, t) == GW_FOUND_NOTHING)
            break;
        commit_void(log, &image, event, t);
        GW_FAILPOINT(after_void);
        head = atomic_load_explicit(gw_index_head(log, hash), memory_order_acquire); /* X */
    }
    GW_FAILPOINT(before_marker);
    commit(shared, log, t, GW_DATA);
    *lsn = t;
    let_go(producer, t);
    return atomic_load_explicit(&shared->state, memory_order_acquire) == GW_STATE_FAILED ? GW_FAILED : GW_OK; /* S */
}
