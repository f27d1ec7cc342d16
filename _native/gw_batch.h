/* gw_batch.h - many events in one body, one call: split, validate, look for each key, claim, copy, commit.
 *
 * Contract
 *   The whole body is read before anything is committed: if it is no batch (framing), nothing of it is in. An event
 *   that is itself wrong is refused alone. Events are taken in order; when the log is full, is closed, has failed, or a
 *   key stays busy (50 ms in all), the rest was not looked at: `looked_at` is where a client goes on. Two equal keys in
 *   one batch are a duplicate (or a conflict), as they are in two requests.
 *
 *     body     [ {"seq":1,...} , {"seq":2,...} , 7 , {"seq":3,...} ]        or a line for each event
 *                |              |              | |
 *     pass 1     validate: its end is where the next one is looked for; 7 breaks a rule: only then are brackets counted
 *                |              |              | |
 *     items    offset, bytes, key, device, code of each         (scratch, kept; at most events_max of them)
 *                |    \
 *     pass 2     |     a few items ahead: hash the key, load its bucket and its place in the ring
 *              append: claim, copy, commit, one after the other            <- the log's own rules, gw_log.h
 *
 * Framing
 *   Array: `[`, values with `,` between them, `]`; the four kinds of white space around each of these, nothing behind.
 *   A value is an object or an array to the bracket that closes it, a string to its closing quote, or a run of other
 *   bytes. Brackets must match in kind to depth 64; deeper ones are counted (such an event is too deep for any rule). A
 *   backslash outside of a string belongs to nothing: nobody can say where strings begin behind it. What the validator
 *   accepts as an event is one such value, so the slow count is for refused ones only; both are linear, none recurses.
 *   Lines: `\n` ends one; white space around an event is not part of it; a line of nothing else is not counted.
 *   A body whose first byte is another than `[` is one event.
 *
 * Crash story: a batch is a loop of appends, and nobody is told anything before its end. A SIGKILL in the middle leaves
 * what was committed until then, and at most one claim to the reaper; the client hears nothing, sends all of it again,
 * and its keys tell which were in. */
#ifndef GW_BATCH_H
#define GW_BATCH_H

#include "gw_ingest.h"

/* One event as pass 1 found it. */
typedef struct gw_item {
    uint64_t seq, boot, key_hash;
    uint32_t offset, bytes; /* in the body, without the white space around it */
    uint32_t device_offset; /* in the event, if it names its device */
    uint16_t code;          /* enum gw_code: refused before it came to the log */
    uint8_t device_id_bytes, flags;
} gw_item;

typedef struct gw_batch_refusal {
    uint32_t index;
    gw_verdict verdict; /* offsets are in the event */
} gw_batch_refusal;

/* Zero at first; one thread; reused from batch to batch. */
typedef struct gw_batch {
    /* what came of it: */
    uint32_t items;     /* in the body, as far as it was read */
    uint32_t offset;    /* of what is no batch: the byte that breaks the framing */
    uint32_t looked_at; /* accepted + duplicates + refused */
    uint32_t accepted, duplicates, refused;
    uint16_t code; /* nothing is in: enum gw_code */
    uint16_t stop; /* why it ended at looked_at: LOG_FULL, DRAINING, FAILED, ACCEPTED_PENDING (a key stayed busy); 0 */
    uint8_t used_percent;
    uint64_t lsn; /* the highest of the accepted and of the originals of duplicates; 0: none */
    uint64_t accepted_bytes;
    /* scratch, grown when a batch needs it: */
    gw_item *item;
    uint64_t *lsns; /* of each item looked at, or of its original; 0: refused */
    gw_batch_refusal *refusal;
    uint32_t room;
} gw_batch;

typedef struct gw_batch_limits {
    uint32_t event_bytes_max, events_max;
} gw_batch_limits;

/* Returns batch->code: 0 (see looked_at, stop), MALFORMED_JSON, NOT_AN_OBJECT, EMPTY_BATCH, BATCH_TOO_LARGE,
 * BAD_DEVICE_ID, or INTERNAL (no memory): nothing is in. `device_id` NULL: each event names its own. Counts nothing and
 * leaves everything in `ingest` alone that another thread may use. */
int gw_ingest_batch(gw_ingest *ingest, gw_batch *batch, const uint8_t *device_id, size_t device_id_bytes,
                    const uint8_t *body, size_t body_bytes, bool lines, gw_batch_limits limits);
/* Count what came of it; whoever else counts in the same block must not do so now. An event at which the batch stopped
 * is received and refused, and so is a body that is no batch: as one. */
void gw_batch_count(const gw_ingest *ingest, const gw_batch *batch, uint64_t started_ns);
/* Give the scratch back. */
void gw_batch_free(gw_batch *batch);

/* Pass 1 alone, for tests. */
int gw_batch_split(gw_batch *batch, const uint8_t *body, size_t body_bytes, bool lines, bool names_device,
                   const uint64_t hash_key[2], gw_batch_limits limits);

#endif
