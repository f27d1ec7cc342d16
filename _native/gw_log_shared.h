/* gw_log_shared.h - inside of the log: bytes on disk, words in shared memory, orderings. Not for users of gw_log.h.
 *
 * Orderings. Each label stands on exactly one line of each end.
 *   label  release end                                   acquire end
 *   M      marker store (producer, reaper)               marker load (walk, reap, index)
 *   T      tail CAS (producer)                           tail load (producer, reap, index: after an acquire fence)
 *   X      head CAS (producer: its record is written)    head load (producer)
 *   A      dead word (publisher, before its cursor)      dead load (after the cursor)
 *   V      version store of a gw_versioned (its writer)  version load (readers)
 *   R      reclaim store (committer)                     reclaim load (producer)
 *   D      durable store (committer)                     durable load
 *   I      intent pos store (producer)                   intent pos load (reap); len is read after it
 *   O      owner store (supervisor: dead)                owner load (reap)
 *   S      state store                                   state load (producer, after its marker)
 *   F      seq_cst fences: producer between marker and flag, follower between flag and look; the same between each
 *          position and each sleeper's flag (gw_log_wait.c)
 *
 * Why a producer never stores over a living claim (P5): it claims below reclaim + capacity; reclaim is at most a
 * cursor that was synced (R); bytes below that cursor are read by nobody who does not look at the tail afterwards. Who
 * does (index, receipts, optional sinks): copy; acquire fence; load tail (T). A byte of a new claim that was seen is
 * stored behind that claim's release fence, so the tail that is read then lies above it: tail > lsn + capacity. */
#ifndef GW_LOG_SHARED_H
#define GW_LOG_SHARED_H

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "gw_log.h"

#define GW_PAGE 4096ull
#define GW_RING_OFFSET (4 * GW_PAGE)
#define GW_FIRST_LSN GW_PAGE
#define GW_POSITION_NONE 0ull
#define GW_TAIL_CLOSED 1ull
#define GW_OWNER_DEAD (1ull << 63)

/* ---- on disk ------------------------------------------------------------------------------------------------ */

#define GW_LOG_MAGIC 0x31474f4c57544147ull  /* "GATWLOG1" */
#define GW_SLOT_MAGIC 0x31544f4c53575447ull /* "GTWSLOT1" */
#define GW_LOG_VERSION 1u

typedef struct gw_identity_page {
    uint64_t magic;
    uint32_t version;
    uint32_t crc; /* of the whole page with this field zero */
    uint64_t capacity;
    uint64_t record_bytes_max;
    uint64_t identity;  /* random, public: client ids, receipts */
    uint64_t secret[2]; /* random, never leaves the file: markers cannot be forged */
    uint64_t created_at_ns;
    uint8_t zero[GW_PAGE - 64];
} gw_identity_page;
_Static_assert(sizeof(gw_identity_page) == GW_PAGE, "identity page");

typedef struct gw_epoch_range {
    uint64_t start;
    uint64_t epoch;
} gw_epoch_range;

typedef struct gw_slot_cursor {
    char name[GW_SINK_NAME_BYTES];
    gw_cursor cursor; /* its last word, skipped, was zero while every sink was required */
} gw_slot_cursor;
_Static_assert(sizeof(gw_slot_cursor) == 64, "slot cursor");

typedef struct gw_slot_page {
    uint64_t magic;
    uint32_t version;
    uint32_t crc; /* of the whole page with this field zero */
    uint64_t sequence;
    uint64_t watermark; /* every byte below it was covered by an earlier fdatasync that returned */
    uint32_t epoch;     /* the newest epoch */
    uint32_t epochs;    /* entries of range[], oldest first */
    uint32_t sinks;
    uint32_t optional; /* bit i: reclaim was allowed to pass sink[i]; older files have zero here */
    gw_epoch_range range[GW_EPOCHS_MAX];
    gw_slot_cursor sink[GW_SINKS_MAX];
    uint64_t lost_from[GW_EPOCHS_MAX]; /* of range[]: the first hole that recovery found in it; 0: none */
    uint8_t zero[GW_PAGE - 48 - 24 * GW_EPOCHS_MAX - 64 * GW_SINKS_MAX];
} gw_slot_page;
_Static_assert(sizeof(gw_slot_page) == GW_PAGE, "slot page");

/* The drawing in gw_log.h. */
typedef struct gw_header {
    uint64_t marker;
    uint32_t crc;
    uint32_t epoch;
    uint64_t size;
    uint64_t received_at_ns;
    uint64_t seq;
    uint64_t boot;
    uint32_t body_bytes;
    uint8_t device_id_bytes;
    uint8_t flags;
    uint8_t kind;
    uint8_t splice;
    uint64_t dead; /* byte i: GW_DEAD_BYTE when sink i has set it aside; for the checksum it is zero */
} gw_header;
_Static_assert(sizeof(gw_header) == GW_RECORD_HEADER_BYTES, "record header");
_Static_assert(offsetof(gw_header, crc) == 8 && offsetof(gw_header, epoch) == 12 && offsetof(gw_header, size) == 16 &&
                   offsetof(gw_header, received_at_ns) == 24 && offsetof(gw_header, body_bytes) == 48 &&
                   offsetof(gw_header, device_id_bytes) == 52 && offsetof(gw_header, splice) == 55,
               "record header");

#define GW_CRC_FROM offsetof(gw_header, epoch)
#define GW_PAD_LOST 1 /* flags of a PAD that recovery wrote over a hole: events may have been lost in it */
#define GW_DEAD_OFFSET offsetof(gw_header, dead)
#define GW_DEAD_BYTE 0xdeull    /* any other value means nothing: a flipped bit makes no dead letter */
#define GW_PAD_SEED 0x50414421u /* a PAD's checksum begins with this, so that no record passes for one */

/* ---- shared memory ------------------------------------------------------------------------------------------ */

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "atomics that processes share");

/* Several words with one writer, replaced as a whole; a SIGKILL of the writer leaves the old or the new ones. */
typedef struct gw_versioned {
    _Alignas(64) _Atomic uint64_t version;
    _Atomic uint64_t copy[2][sizeof(gw_cursor) / 8];
} gw_versioned;

typedef struct gw_intent {
    _Alignas(64) _Atomic uint64_t owner; /* pid, | GW_OWNER_DEAD once the supervisor has seen it dead; 0: free */
    _Atomic uint64_t pos;                /* claimed, or about to be; GW_POSITION_NONE */
    _Atomic uint64_t len;
} gw_intent;

/* Where one worker's waiting thread sleeps. */
typedef struct gw_waiter {
    _Alignas(64) _Atomic uint32_t word; /* anyone: what it sleeps on */
    _Atomic uint32_t nudges;            /* anyone */
    _Atomic uint32_t flag;              /* the sleeper: enum gw_waits, what it sleeps for; 0: awake */
    _Atomic uint64_t wanted;            /* the worker: the highest lsn that somebody waits to see delivered */
    _Atomic uint64_t wanted_durable;    /* ... to be durable */
} gw_waiter;

enum gw_waits { GW_WAITS_DURABLE = 1, GW_WAITS_SINKS = 2, GW_WAITS_COMMITTED = 4 };
/* The workers' and, last, that of a sink in the delivery process that waits for `durable`. */
enum { GW_WAITER_SINK = GW_WORKERS_MAX, GW_WAITERS };

typedef struct gw_shared {
    /* constant after open */
    uint64_t magic, bytes, capacity, record_bytes_max, identity, secret[2], index_key[2], receipt_key[2];
    uint64_t start_lsn, index_buckets;
    uint64_t oldest_lsn; /* no whole record stood below it when this run began */
    uint64_t mix;        /* of the epoch in which this run writes */
    uint32_t epoch, epochs, sinks;
    uint32_t optional; /* bit i: nothing waits for sink i */
    gw_epoch_range range[GW_EPOCHS_MAX];
    uint64_t lost_from[GW_EPOCHS_MAX];
    char sink_name[GW_SINKS_MAX][GW_SINK_NAME_BYTES];
    /* how full is full: the supervisor sets the marks at the start, any producer crosses them */
    _Alignas(64) _Atomic uint64_t high_water;
    _Atomic uint64_t low_water;
    _Atomic uint32_t shedding;
    /* producers */
    _Alignas(64) _Atomic uint64_t tail; /* | GW_TAIL_CLOSED */
    /* follower */
    gw_versioned committed;                      /* a gw_cursor: lsn and ordinal */
    _Alignas(64) _Atomic uint32_t follower_flag; /* GW_SLEEPS, GW_RESTS; 0: it walks */
    _Alignas(64) _Atomic uint32_t follower_word; /* anyone */
    /* committer */
    _Alignas(64) _Atomic uint64_t durable;
    _Atomic uint64_t reclaim;
    _Atomic uint64_t slot_sequence;
    _Atomic uint32_t committer_flag;     /* GW_SLEEPS: nothing is new; GW_RESTS: it gathers; 0: it works */
    _Atomic uint32_t committer_word;     /* anyone */
    _Atomic uint32_t sinks_want_durable; /* the supervisor, at the start */
    /* anyone, forward only */
    _Alignas(64) _Atomic uint32_t state;
    /* each sink's publisher */
    gw_versioned cursor[GW_SINKS_MAX];
    gw_intent intent[GW_INTENT_SLOTS];
    gw_waiter waiter[GW_WAITERS];
    gw_counter_block counters[GW_BLOCK_COUNT];
    /* behind it, from GW_INDEX_OFFSET on: heads and links of the index */
} gw_shared;

/* What a sleeper's flag says: wake it for anything new, or only for somebody who waits for an acknowledgement. */
enum { GW_SLEEPS = 1, GW_RESTS = 2 };

#define GW_INDEX_ALIGNMENT (2ull << 20) /* of a large page, in the file and in memory */
#define GW_INDEX_OFFSET ((sizeof(gw_shared) + GW_INDEX_ALIGNMENT - 1) / GW_INDEX_ALIGNMENT * GW_INDEX_ALIGNMENT)

struct gw_log {
    gw_shared *shared;
    uint8_t *ring; /* capacity bytes, then record_bytes_max more that are the beginning again */
    uint8_t *file; /* the first GW_RING_OFFSET bytes: identity page, slots */
    uint64_t mask;
    _Atomic uint64_t *heads, *prevs; /* the index: gw_log_index.h; NULL in a read-only view */
    size_t shared_bytes;
    int fd, fd_lock, fd_shared;
    bool read_only;
    pthread_mutex_t walking;         /* of this process's follower and committer */
    _Atomic uint32_t committer_stop; /* this process's committer: the next one must not find it set */
    /* follower only */
    uint64_t stuck_at, ticked_at_ns, rested_at;
    unsigned stuck_ms, stopped_ms;
    /* committer only */
    uint64_t rate_lsn, rate_at_ns;
    /* the thread in gw_log_wait_durable only */
    uint32_t nudged;
    bool failure_seen;
};

struct gw_producer {
    gw_log *log;
    gw_intent *intent;
    uint64_t mapped_from; /* below it this process's page table knows nothing of what was written */
};

/* ---- shared between gw_log*.c --------------------------------------------------------------------------------- */

uint64_t gw_mix(const uint64_t secret[2], uint64_t epoch);
gw_status gw_fail(gw_error *error, gw_status status, int error_number, uint64_t lsn, const char *text);
void gw_versioned_store(gw_versioned *v, const gw_cursor *value);
gw_cursor gw_versioned_load(const gw_versioned *v);
/* Words in [from, to) of the ring are stored again, so that the next sync writes their pages. */
void gw_dirty(gw_log *log, uint64_t from, uint64_t to);
void gw_dirty_slots(gw_log *log);
/* 0, or -1 with errno: a page that did not fit is ENOSPC. */
int gw_write_page(int fd, const void *page, uint64_t offset);
void gw_slot_write(gw_log *log, gw_slot_page *page, uint64_t sequence);
/* Page A or B (0, 1), if it is whole and says what a gateway writes. */
bool gw_slot_read(const gw_log *log, unsigned which, gw_slot_page *page);
/* Everything from here on was kept: the least cursor of those that reclaim had to wait for. */
uint64_t gw_slot_kept(const gw_slot_page *slot);
/* A new epoch from `start` on; `unknown`: how many others may have begun that the slot does not know. */
void gw_slot_open_epoch(gw_slot_page *slot, unsigned unknown, uint64_t start);
/* Header of a PAD over [from, to), then its marker. */
void gw_pad_write(gw_log *log, uint64_t from, uint64_t to, uint8_t flags, uint64_t epoch, uint64_t mix);
uint32_t gw_record_crc(const gw_header *header, const uint8_t *rest, uint64_t lsn);
/* The cursors of this run: known names keep their place, new ones start at the end, none may silently disappear with
 * events that wait for it. */
gw_status gw_slot_take_sinks(gw_slot_page *slot, const gw_sinks *sinks, uint64_t start, uint64_t ordinal,
                             gw_error *error);
/* A cursor with its ordinal: the least of the required sinks. */
gw_cursor gw_least_required(const gw_log *log);
/* gw_log_read, but of what ends at or below `limit`. */
gw_status gw_log_read_at(const gw_log *log, uint64_t lsn, uint64_t limit, gw_record *record);
/* Move `committed` over what is there. Delivery process only. */
bool gw_walk(gw_log *log);
/* Whether somebody waits for more than is committed, or for more than is durable. */
bool gw_waits_for_walk(const gw_log *log, uint64_t committed);
bool gw_waits_for_sync(const gw_log *log, uint64_t durable);
/* Producers are short of room, and a sync would give some back; `least` is a cursor. */
bool gw_reclaim_is_urgent(const gw_log *log, uint64_t least);
/* A position moved: wake the workers that sleep for it. */
void gw_wake_waiters(gw_log *log, unsigned waits);
int gw_futex_wait_us(_Atomic uint32_t *word, uint32_t seen, int64_t timeout_us);
int gw_futex_wait(_Atomic uint32_t *word, uint32_t seen, int timeout_ms);
void gw_futex_wake(_Atomic uint32_t *word);
uint64_t gw_now_ns(void);
gw_status gw_map(gw_log *log, int fd, uint64_t capacity, uint64_t record_bytes_max, gw_error *error);

/* Epochs older than the table lie below its first range; inside it a position belongs to exactly one. */
static inline bool gw_epoch_ok(const gw_epoch_range *range, unsigned epochs, uint64_t lsn, uint64_t epoch)
{
    if (lsn < range[0].start)
        return epoch < range[0].epoch;
    unsigned i = epochs - 1;
    while (range[i].start > lsn)
        i--;
    return range[i].epoch == epoch;
}

/* The largest record of a log of this capacity. */
static inline uint64_t gw_record_bytes_max_of(uint64_t capacity)
{
    return capacity / 8 < (1u << 20) ? capacity / 8 : 1u << 20;
}

/* The epoch whose range holds lsn; below the table any older one. */
static inline uint64_t gw_epoch_at(const gw_epoch_range *range, unsigned epochs, uint64_t lsn)
{
    if (lsn < range[0].start)
        return range[0].epoch - 1;
    unsigned i = epochs - 1;
    while (range[i].start > lsn)
        i--;
    return range[i].epoch;
}

/* Bit i: sink i has set the record aside. */
static inline uint8_t gw_dead_sinks(uint64_t dead)
{
    uint8_t sinks = 0;
    for (unsigned sink = 0; dead && sink < GW_SINKS_MAX; sink++)
        sinks |= (uint8_t)((dead >> (8 * sink) & 0xff) == GW_DEAD_BYTE) << sink;
    return sinks;
}

static inline _Atomic uint64_t *gw_word(const gw_log *log, uint64_t lsn)
{
    return (_Atomic uint64_t *)(void *)(log->ring + (lsn & log->mask));
}

static inline void gw_store_word(_Atomic uint64_t *to, const void *from)
{
    uint64_t word;
    memcpy(&word, from, 8);
    atomic_store_explicit(to, word, memory_order_relaxed);
}

/* A whole record as readers see it; `rest` is its device id and body. */
static inline gw_record gw_record_of(const gw_header *header, const uint8_t *rest, uint64_t lsn, uint64_t dead)
{
    return (gw_record){.lsn = lsn,
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
                       .splice = header->splice,
                       .dead = gw_dead_sinks(dead)};
}

/* ---- fail points: compiled in for tests only ------------------------------------------------------------------- */

#ifdef GW_FAILPOINTS
extern void (*gw_failpoint_hook)(const char *name);
#define GW_FAILPOINT(name)            \
    do {                              \
        if (gw_failpoint_hook)        \
            gw_failpoint_hook(#name); \
    } while (0)
#else
#define GW_FAILPOINT(name) ((void)0)
#endif

#endif
