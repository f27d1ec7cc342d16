/* gw_log.h - the log: one mmap'd, preallocated file that is ring buffer and write-ahead log at once.
 *
 * What it promises
 *   P1  A record is committed by one release store (its marker). From then on it survives SIGKILL of every process.
 *   P2  `durable` is a position such that an fdatasync that covers every byte below it has returned.
 *   P3  Only a record whose marker, size and CRC agree is ever read: nothing torn, stale or forged.
 *   P4  A producer never waits: full, draining and failed are verdicts. A dead producer's claim becomes a PAD.
 *   P5  A position is overwritten only when it lies below `reclaim`: the least cursor of a required sink, in a slot
 *       whose fdatasync has returned.
 *   P6  Of the events with one key (device id, boot, seq) at most one stands in the last `capacity` bytes claimed.
 *
 * Positions (lsn) are byte counts, multiples of 8, above 0, that only grow; masked at use. One writer each:
 *
 *     reclaim  <=  cursor of each required sink  <=  committed  <=  tail  <=  reclaim + capacity
 *     committer    the sink's writer                 follower       producers
 *                  durable <= committed     (durable: committer, which may move `committed` too, under a mutex)
 *
 * A sink that is not required (optional) holds nothing back: reclaim passes its cursor, and what producers write over
 * is skipped. Its reader copies, then asks whether the place was written over meanwhile (gw_log_lapped); if so, what it
 * copied counts for nothing, and gw_log_skip moves the cursor to the least required one.
 *
 * The file
 *     page 0   identity: written once
 *     page 1   slot A  \  written in turn, one a sync: sequence number, watermark, epochs, cursors, CRC
 *     page 2   slot B  /
 *     page 3   zero
 *     page 4   the ring, `capacity` bytes; its first `record_bytes_max` bytes are mapped again behind its end,
 *              so that a record may run over the end. Markers are always addressed through the first mapping.
 *
 * A record (little-endian; a multiple of 8 bytes; zero bytes fill the end)
 *   0        8        12       16       24               32       40       48      52 53 54 55 56      64
 *   +--------+--------+--------+--------+----------------+--------+--------+-------+--+--+--+--+-------+----
 *   | marker | crc32c | epoch  | size   | received_at_ns | seq    | boot   | body  |id|fl|ki|sp| dead  | device_id,body
 *   +--------+--------+--------+--------+----------------+--------+--------+-------+--+--+--+--+-------+----
 *   marker = (lsn | kind) XOR mix(secret, epoch). CRC32C covers every byte from `epoch` to the body's end, `dead` taken
 *   as zero, then lsn; a PAD's covers its header from `epoch` on, then lsn, with another seed. Zero: never written.
 *   dead: a byte a sink, 0xde when that sink has set the record aside (a dead letter); the only bytes that change
 *   after the commit.
 *
 * Everything else that is shared lives in a memfd (`gw_shared`) and is rebuilt by recovery; see gw_log_shared.h.
 *
 * Crash story: docs/log.md's, repeated where the code is: claim and commit in gw_log.c; walk, reap in gw_log_follow.c;
 * the index in gw_log_index.h; committer in gw_log_commit.c; recovery in gw_log_recover.c; waiting in gw_log_wait.c. */
#ifndef GW_LOG_H
#define GW_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "gw_counters.h"

typedef struct gw_log gw_log; /* one process's view of a log; thread-safe where a comment does not forbid it */
typedef struct gw_producer gw_producer; /* one claiming thread's intent slot */

typedef enum gw_status {
    GW_OK = 0,
    GW_FULL,      /* verdict: no room below reclaim + capacity */
    GW_CLOSED,    /* verdict: draining or failed, no new claims */
    GW_FAILED,    /* the log failed under this call: unknown whether the event stays, no 2xx may be sent */
    GW_EMPTY,     /* nothing committed at this position yet */
    GW_CORRUPT,   /* marker, size or CRC do not agree below a promised position */
    GW_TOO_LARGE, /* record above record_bytes_max */
    GW_NO_SLOT,   /* every intent slot has an owner */
    GW_LOCKED,    /* another process holds the log */
    GW_NOT_A_LOG, /* identity page: magic, version, CRC or size are wrong */
    GW_ERRNO,     /* a system call failed; gw_error.error_number says how */
    GW_DUPLICATE, /* verdict: the same key with the same body stands in the log at *lsn; nothing was added */
    GW_CONFLICT,  /* verdict: the same key with another body stands there; nothing was added */
    GW_BUSY,      /* verdict: another producer is writing this key at *lsn: ask again once committed > *lsn */
    GW_LAPPED     /* verdict: the place of a reader that nothing waits for was written over */
} gw_status;

/* Where and why, for statuses that are not verdicts. */
typedef struct gw_error {
    int error_number; /* errno, or 0 */
    uint64_t lsn;     /* for GW_CORRUPT */
    char text[160];   /* what was being done */
} gw_error;

enum gw_kind { GW_DATA = 0, GW_VOID = 1, GW_PAD = 2 };
enum gw_state { GW_RUNNING = 1, GW_DRAINING = 2, GW_STATE_FAILED = 3 };

enum {
    GW_SINKS_MAX = 8,
    GW_SINK_NAME_BYTES = 16,
    GW_INTENT_SLOTS = 64,
    GW_EPOCHS_MAX = 32,
    GW_RECORD_HEADER_BYTES = 64
};

/* The smallest and largest capacity_bytes; a power of two between them. */
#define GW_CAPACITY_MIN (1ull << 20)
#define GW_CAPACITY_MAX (1ull << 40)

/* Of gw_event.flags, GW_EVENT_HAS_SEQ: (device id, boot, seq) is a key. */
enum { GW_EVENT_KEYED = 2 };

/* What a producer hands in. `flags` are GW_EVENT_HAS_*; `splice` is the offset just behind the body's opening brace
 * when that is < 255 (0: unknown), where a publisher may insert "ts". */
typedef struct gw_event {
    const uint8_t *device_id, *body;
    uint32_t body_bytes;
    uint8_t device_id_bytes, flags, splice;
    uint64_t received_at_ns, seq, boot; /* unix time in ns */
    uint64_t key_hash;                  /* of gw_producer_prefetch; 0: not asked for */
} gw_event;

/* A record as read: pointers into the mapping, valid while the reader's cursor holds the position. */
typedef struct gw_record {
    uint64_t lsn, size; /* the next record stands at lsn + size */
    uint64_t received_at_ns, seq, boot;
    const uint8_t *device_id, *body;
    uint32_t body_bytes, epoch;
    uint8_t device_id_bytes, flags, kind, splice;
    uint8_t dead; /* bit i: sink i has set it aside */
} gw_record;

/* A sink's place and its books. Everything below lsn is done for the sink; ordinal counts the DATA records below lsn,
 * base those that were there before the sink was: ordinal - base = published + dead_lettered + skipped, or events are
 * unexplained. Only a sink that is, or was, optional has skipped any: they were written over before it came to them. */
typedef struct gw_cursor {
    uint64_t lsn, ordinal, published, dead_lettered, base, skipped;
} gw_cursor;

/* The sinks of a run. `names`, NULL-terminated, name the cursors; one that the file does not know starts at the end.
 * Bit k of `optional`: nothing waits for names[k]; one at least must be required (a log that never had a sink may have
 * none: then reclaim is the watermark). A sink that the file knows and that is not named is forgotten if no event waits
 * for it, or if it is `forget`; else the log is not opened (GW_ERRNO, EINVAL). */
typedef struct gw_sinks {
    const char *const *names;
    uint32_t optional;
    const char *forget; /* or NULL */
} gw_sinks;

/* ---- life of a log ------------------------------------------------------------------------------------------ */

/* A new file at `path` (which must not exist): zero-filled in 4 KiB writes, synced, then its identity page, then the
 * directory. `progress`, if not NULL, is called now and then with the bytes written; non-zero stops (GW_ERRNO,
 * EINTR) and removes the file. */
gw_status gw_log_create(const char *path, uint64_t capacity, int (*progress)(void *, uint64_t), void *context,
                        gw_error *error);

typedef struct gw_damage {
    uint64_t from, to; /* lsn range */
} gw_damage;

enum { GW_DAMAGE_MAX = 16 };

/* What recovery found. */
typedef struct gw_recovery {
    uint64_t start;          /* S: the first position of the new epoch */
    uint64_t watermark;      /* W as persisted */
    uint64_t end;            /* E: end of the last whole record */
    uint64_t records, bytes; /* DATA records in [least required cursor, E) */
    uint64_t torn_bytes;     /* holes at or above the watermark */
    uint64_t corrupt_bytes;  /* holes below it */
    uint32_t corrupt_count;  /* number of corrupt ranges; the first GW_DAMAGE_MAX are listed */
    uint32_t epoch;
    gw_damage corrupt[GW_DAMAGE_MAX];
} gw_recovery;

/* Take the exclusive lock, recover, open a new epoch. `fd_lock` is an open file description of the log that this call
 * locks; children inherit it, so the lock lives as long as anyone who maps the log (and it is the witness of write
 * errors: nobody else syncs it). Corruption below the watermark gives GW_CORRUPT with *report filled unless
 * `accept_corruption`: the caller copies the file aside and calls again. */
gw_status gw_log_open(const char *path, int fd_lock, const gw_sinks *sinks, bool accept_corruption, gw_log **log,
                      gw_recovery *report, gw_error *error);

/* A child's view: both descriptors are inherited. */
gw_status gw_log_attach(int fd_lock, int fd_shared, gw_log **log, gw_error *error);

/* Offline and read-only, no lock taken, nothing written: what recovery would find. */
gw_status gw_log_scan(const char *path, gw_log **log, gw_recovery *report, gw_error *error);

/* For offline tools, on a log that was scanned: the first whole record of any kind that begins in [lsn, limit),
 * whatever stands in between, also below the cursors. It is copied to `buffer` (record_bytes_max bytes; of a PAD only
 * the header) and checked there, so the answer is right also while a gateway writes to the file; `record` points into
 * the buffer. GW_OK or GW_EMPTY. */
gw_status gw_log_next(const gw_log *log, uint64_t lsn, uint64_t limit, uint8_t *buffer, gw_record *record);
/* The name of a sink's cursor (GW_SINK_NAME_BYTES, not always 0-terminated), or NULL: there are not so many. Empty:
 * the place of a sink that was forgotten; dead letters' bytes tell sinks apart by their places, so the others keep
 * theirs. */
const char *gw_log_sink_name(const gw_log *log, unsigned sink);

/* The same log with another capacity as a new file at `path`, synced and read back; `log` and `found` are of
 * gw_log_scan, under the lock, and nothing is written to it. It holds [*from, end): all that waits, and of what is
 * finished as much as has room. GW_FULL: what waits does not fit; GW_TOO_LARGE: a record that waits would be above
 * record_bytes_max; GW_CORRUPT: damage below the watermark; GW_ERRNO. Then there is no file at `path`. */
gw_status gw_log_resize(const gw_log *log, const gw_recovery *found, const char *path, uint64_t capacity,
                        int (*progress)(void *, uint64_t), void *context, uint64_t *from, gw_error *error);

void gw_log_close(gw_log *log);

int gw_log_fd_shared(const gw_log *log);
uint64_t gw_log_capacity(const gw_log *log);
uint64_t gw_log_record_bytes_max(const gw_log *log);
uint64_t gw_log_identity(const gw_log *log);
uint64_t gw_log_tail(const gw_log *log);
uint64_t gw_log_committed(const gw_log *log);
uint64_t gw_log_committed_ordinal(const gw_log *log); /* DATA records below committed, since the log was made */
uint64_t gw_log_durable(const gw_log *log);
uint64_t gw_log_reclaim(const gw_log *log);
enum gw_state gw_log_state(const gw_log *log);
/* RUNNING -> DRAINING or FAILED; closes the tail for new claims; FAILED is final. */
void gw_log_set_state(gw_log *log, enum gw_state state);
gw_counter_block *gw_log_counters(gw_log *log, unsigned block);
/* The gap in the books of `sink`: accepted - published - dead-lettered - skipped - still in the log. 0, or the number
 * of events that nobody can explain (negative: counted twice). When the cursor stands at committed, nothing is in the
 * log, whatever the sink has counted; a cursor that jumped shows there. */
int64_t gw_log_unexplained(const gw_log *log, unsigned sink);
/* Events that the sink has not passed yet, also those that it will have to skip. */
uint64_t gw_log_lag_events(const gw_log *log, unsigned sink);

/* ---- producers ---------------------------------------------------------------------------------------------- */

gw_status gw_producer_open(gw_log *log, gw_producer **producer);
void gw_producer_close(gw_producer *producer);
/* An event with this key will be appended, behind `ahead` bytes of other records: start loading its place in the ring
 * and its bucket. Sets key_hash. */
void gw_producer_prefetch(const gw_producer *producer, gw_event *event, uint64_t ahead);
/* GW_OK: committed. GW_FULL, GW_CLOSED, GW_TOO_LARGE: not in the log. GW_FAILED: unknown. GW_DUPLICATE, GW_CONFLICT,
 * GW_BUSY: only for events with a key, see there; they win over full and closed. One thread a producer. */
gw_status gw_producer_append(gw_producer *producer, const gw_event *event, uint64_t *lsn);

/* Refuse above `high` used bytes (tail - reclaim), until fewer than `low` are used: full is said with hysteresis, so
 * that a log at its limit does not flip for each event. high = capacity: only when there is no room. */
void gw_log_set_water(gw_log *log, uint64_t high, uint64_t low);
/* Events are refused for want of room: the high mark was met, and the low one is not reached yet. */
bool gw_log_is_full(const gw_log *log);
/* Bytes that cannot be written over yet: tail - reclaim. */
uint64_t gw_log_used(const gw_log *log);

/* The oldest whole record that still stands in the ring: how far back a repeat is recognised, and a receipt answered
 * exactly. GW_OK or GW_EMPTY. `record`'s pointers are not set (the bytes may be overwritten at any time). */
gw_status gw_log_oldest(const gw_log *log, gw_record *record);

/* ---- receipts ------------------------------------------------------------------------------------------------ */

/* "<log identity>-<epoch>-<lsn>-<mac>", hexadecimal; 0-terminated. */
enum { GW_RECEIPT_BYTES_MAX = 68 };
void gw_log_receipt(const gw_log *log, uint64_t lsn, char out[GW_RECEIPT_BYTES_MAX]);

enum gw_receipt_state {
    GW_RECEIPT_UNKNOWN = 0,   /* not one of this log's, or nobody can say any more */
    GW_RECEIPT_ENQUEUED,      /* committed */
    GW_RECEIPT_DURABLE,       /* an fdatasync covers it */
    GW_RECEIPT_DELIVERED,     /* every required sink confirmed it */
    GW_RECEIPT_DEAD_LETTERED, /* a required sink has set it aside */
    GW_RECEIPT_FINISHED,      /* written over since: it was delivered or dead-lettered before */
    GW_RECEIPT_LOST           /* a power cut took it before an fdatasync covered it */
};
enum gw_receipt_state gw_log_receipt_state(const gw_log *log, const char *text, size_t bytes, uint64_t *lsn);
/* The same for a position that this process holds a promise for: a record of this log, committed or about to be. */
enum gw_receipt_state gw_log_state_of(const gw_log *log, uint64_t lsn);

/* ---- waiting for `durable` and for sinks --------------------------------------------------------------------- */

/* Worker `worker` (0 .. GW_WORKERS_MAX - 1) will wait until `durable` lies above lsn (or, with `sink`, every required
 * cursor): the committer (or the follower) hurries. Any thread. */
void gw_log_want(gw_log *log, unsigned worker, uint64_t lsn, bool sink);
/* Sleep until durable > durable_above, or the least required cursor > sinks_above, or committed > committed_above
 * (UINT64_MAX: not waited for), or the state is FAILED, or the worker's word is no longer `word`, or timeout_ms have
 * passed. Returns the word. One thread a worker. */
uint32_t gw_log_wait(gw_log *log, unsigned worker, uint32_t word, uint64_t durable_above, uint64_t sinks_above,
                     uint64_t committed_above, int timeout_ms);
/* Change the worker's word and wake its sleeper: there is somebody new to wait for. */
void gw_log_nudge(gw_log *log, unsigned worker);
/* The least cursor of the required sinks. */
uint64_t gw_log_least_cursor(const gw_log *log);
bool gw_log_is_required(const gw_log *log, unsigned sink);
/* A sink reads below `durable` only: the committer hurries also for who waits for sinks. Set at the start of a run. */
void gw_log_set_sinks_want_durable(gw_log *log, bool wanted);
bool gw_log_sinks_want_durable(const gw_log *log);
/* Somebody waits for the sinks to pass a position at or above `lsn`: one that gathers has no time to. */
bool gw_log_sinks_wanted(const gw_log *log, uint64_t lsn);
/* Sleep until durable > seen, or gw_log_wake_durable was called since the last return, or timeout_ms have passed.
 * Returns durable. One thread of the delivery process. A log that has failed ends the sleep once, not each time. */
uint64_t gw_log_wait_durable(gw_log *log, uint64_t seen, int timeout_ms);
void gw_log_wake_durable(gw_log *log);

/* ---- the delivery process ----------------------------------------------------------------------------------- */

/* Move `committed` over what is there; wait, at most timeout_ms, until it lies above `seen`. Fills the holes of dead
 * producers and kills stopped ones. Returns committed. One thread in all processes together. */
uint64_t gw_log_follow(gw_log *log, uint64_t seen, int timeout_ms);
/* Wake a follower that sleeps (also after a child's death). Async-signal-safe. */
void gw_log_wake(gw_log *log);
/* The follower rests after progress, so that it is not woken for every event: at most `microseconds`, less when
 * somebody waits for an acknowledgement. */
void gw_log_rest(gw_log *log, int microseconds);

/* The record at `lsn`, which must be a record's start at or above a cursor that holds it. GW_OK, GW_EMPTY
 * (lsn >= committed), or GW_CORRUPT. PAD and VOID records are returned too: step over them, do not publish them. */
gw_status gw_log_read(const gw_log *log, uint64_t lsn, gw_record *record);
/* It will be read soon: start loading its first lines. */
void gw_log_prefetch(const gw_log *log, uint64_t lsn);

/* What was copied from [lsn, ...) until now may be torn: producers have claimed its place again. Only the reader of an
 * optional sink has to ask. */
bool gw_log_lapped(const gw_log *log, uint64_t lsn);
/* gw_log_read for an optional sink, of what ends at or below `limit`: written over meanwhile, the record keeps the
 * sizes that were checked. */
gw_status gw_log_read_once(const gw_log *log, uint64_t lsn, uint64_t limit, gw_record *record);

int gw_log_sink(const gw_log *log, const char *name); /* index, or -1 */
gw_cursor gw_cursor_load(const gw_log *log, unsigned sink);
/* One writer a sink; atomic towards SIGKILL and other readers. */
void gw_cursor_store(gw_log *log, unsigned sink, const gw_cursor *cursor);
/* The cursor of an optional sink whose place was written over moves to the least required cursor. Returns how many
 * events it missed (they are in its books), 0 when it need not move. By its writer only, who has confirmed before what
 * is safe. */
uint64_t gw_log_skip(gw_log *log, unsigned sink);

/* The record at `lsn`, which the sink's cursor has not passed, is set aside by this sink. Call it when the dead letter
 * is on the disk and before the cursor passes; after a start, again for every dead letter that is on file. False: no
 * record of `epoch` (0: of any) stands there. */
bool gw_log_mark_dead(gw_log *log, unsigned sink, uint64_t lsn, uint32_t epoch);

/* A child was seen dead by waitid(..., WNOWAIT), before it is reaped: its intent slots may be resolved. */
void gw_log_owner_died(gw_log *log, int pid);

/* ---- the committer ------------------------------------------------------------------------------------------ */

/* First call of a new committer: makes everything that may be unsynced dirty again, syncs, and asks the witness. */
gw_status gw_log_takeover(gw_log *log, gw_error *error);
/* One group commit: slot, fdatasync, then durable and reclaim move. *changed says whether another one would move
 * anything. An error is final: state FAILED. */
gw_status gw_log_sync(gw_log *log, bool *changed, gw_error *error);
/* Sync every interval_ms while anything changes, sleep while nothing does, sooner when the ring runs full; returns
 * after gw_log_stop_committer (with a last sync) or on an error. */
gw_status gw_log_run_committer(gw_log *log, int interval_ms, gw_error *error);
void gw_log_stop_committer(gw_log *log);

#endif
