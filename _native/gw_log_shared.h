/* gw_log_shared.h - inside of the log: bytes on disk, words in shared memory, orderings. Not for users of gw_log.h.
 *
 * Orderings. Each label stands on exactly one line of each end.
 *   label  release end                                   acquire end
 *   M      marker store (producer, reaper)               marker load (walk, reap)
 *   T      tail CAS (producer)                           tail load (producer, reap)
 *   V      version store of a gw_versioned (its writer)  version load (readers)
 *   R      reclaim store (committer)                     reclaim load (producer)
 *   D      durable store (committer)                     durable load
 *   I      intent pos store (producer)                   intent pos load (reap); len is read after it
 *   O      owner store (supervisor: dead)                owner load (reap)
 *   S      state store                                   state load (producer, after its marker)
 *   F      seq_cst fences: producer between marker and flag, follower between flag and look
 *
 * Why a producer never stores over a living claim (P5): it claims below reclaim + capacity; reclaim is at most a
 * cursor that was synced (R); bytes below that cursor are read by nobody. */
#ifndef GW_LOG_SHARED_H
#define GW_LOG_SHARED_H

#include <pthread.h>
#include <stdatomic.h>

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
    gw_cursor cursor;
    uint64_t zero;
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
    uint32_t zero0;
    gw_epoch_range range[GW_EPOCHS_MAX];
    gw_slot_cursor sink[GW_SINKS_MAX];
    uint8_t zero[GW_PAGE - 48 - 16 * GW_EPOCHS_MAX - 64 * GW_SINKS_MAX];
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
    uint64_t zero;
} gw_header;
_Static_assert(sizeof(gw_header) == GW_RECORD_HEADER_BYTES, "record header");
_Static_assert(offsetof(gw_header, crc) == 8 && offsetof(gw_header, epoch) == 12 && offsetof(gw_header, size) == 16 &&
                   offsetof(gw_header, received_at_ns) == 24 && offsetof(gw_header, body_bytes) == 48 &&
                   offsetof(gw_header, device_id_bytes) == 52 && offsetof(gw_header, splice) == 55,
               "record header");

#define GW_CRC_FROM offsetof(gw_header, epoch)
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

typedef struct gw_shared {
    /* constant after open */
    uint64_t magic, bytes, capacity, record_bytes_max, identity, secret[2];
    uint64_t start_lsn;
    uint64_t mix; /* of the epoch in which this run writes */
    uint32_t epoch, epochs, sinks, zero;
    gw_epoch_range range[GW_EPOCHS_MAX];
    char sink_name[GW_SINKS_MAX][GW_SINK_NAME_BYTES];
    /* producers */
    _Alignas(64) _Atomic uint64_t tail; /* | GW_TAIL_CLOSED */
    /* follower */
    gw_versioned committed; /* a gw_cursor: lsn and ordinal */
    _Alignas(64) _Atomic uint32_t follower_flag;
    _Alignas(64) _Atomic uint32_t follower_word; /* anyone */
    /* committer */
    _Alignas(64) _Atomic uint64_t durable;
    _Atomic uint64_t reclaim;
    _Atomic uint64_t slot_sequence;
    _Atomic uint32_t committer_flag;
    _Atomic uint32_t committer_word; /* anyone */
    /* anyone, forward only */
    _Alignas(64) _Atomic uint32_t state;
    /* each sink's publisher */
    gw_versioned cursor[GW_SINKS_MAX];
    gw_intent intent[GW_INTENT_SLOTS];
    gw_counter_block counters[GW_BLOCK_COUNT];
} gw_shared;

struct gw_log {
    gw_shared *shared;
    uint8_t *ring; /* capacity bytes, then record_bytes_max more that are the beginning again */
    uint8_t *file; /* the first GW_RING_OFFSET bytes: identity page, slots */
    uint64_t mask;
    int fd, fd_lock, fd_shared;
    bool read_only;
    _Atomic uint32_t committer_stop; /* this process's committer: the next one must not find it set */
    /* follower only */
    uint64_t stuck_at, ticked_at_ns;
    unsigned stuck_ms, stopped_ms;
};

struct gw_producer {
    gw_log *log;
    gw_intent *intent;
};

/* ---- shared between gw_log*.c --------------------------------------------------------------------------------- */

uint64_t gw_mix(const uint64_t secret[2], uint64_t epoch);
gw_status gw_fail(gw_error *error, gw_status status, int error_number, uint64_t lsn, const char *text);
void gw_versioned_store(gw_versioned *v, const gw_cursor *value);
gw_cursor gw_versioned_load(const gw_versioned *v);
/* Words in [from, to) of the ring are stored again, so that the next sync writes their pages. */
void gw_dirty(gw_log *log, uint64_t from, uint64_t to);
void gw_dirty_slots(gw_log *log);
void gw_slot_write(gw_log *log, gw_slot_page *page, uint64_t sequence);
/* Header of a PAD over [from, to), then its marker. */
void gw_pad_write(gw_log *log, uint64_t from, uint64_t to, uint64_t epoch, uint64_t mix);
uint32_t gw_record_crc(const gw_header *header, const uint8_t *rest, uint64_t lsn);
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

static inline _Atomic uint64_t *gw_word(const gw_log *log, uint64_t lsn)
{
    return (_Atomic uint64_t *)(void *)(log->ring + (lsn & log->mask));
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
