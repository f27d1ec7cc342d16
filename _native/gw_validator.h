/* gw_validator.h - one pass over one telemetry event (docs/http.md has the event table).
 *
 * Contract
 *   gw_validate() reads exactly `body_bytes` bytes, never one more, builds no tree, allocates nothing, does not
 *   recurse (its stack is constant, about 40 KiB, at any nesting), and takes time linear in the input for any input:
 *   object keys are compared through a keyed hash in a fixed scratch of GW_MEMBERS_MAX entries.
 *   A body of 4 GiB or more is `body_too_large`: positions are 32 bits wide.
 *
 * Which rule is reported: the first one broken in document order. What is wrong behind that place, malformed JSON
 * included, is not looked at. One token at a time (a bracket, a string, a number, a literal), these apply in order:
 *   1. the byte that begins it must be allowed here by the grammar of JSON;                       malformed_json
 *   2. where a field wants another type, that is refused at the value's first byte, unread:       not_an_object (body,
 *      metrics, tags), bad_metric_value, bad_tag_value, bad_ts, bad_seq, bad_boot, bad_device_id
 *   3. the whole token must be JSON;                                                              malformed_json
 *   4. a key: at most GW_MEMBERS_MAX in the document (too_many_members), at most 32 in metrics and 16 in tags
 *      (too_many_...), then its own rule (unknown_field, bad_..._key), then duplicate_key;
 *      a value: its field's rule; a bracket: payload_too_deep.
 * Behind the document: only whitespace (malformed_json); then, last of all, missing_metrics, at the closing brace, and
 * there, where a device_id is wanted, bad_device_id for its want.
 *
 * `offset` is the first byte of the key (its quote) or value that broke the rule. For malformed_json it is the byte at
 * which the grammar breaks, `body_bytes` if the body ends too early; of an escape, UTF-8 sequence or literal that is
 * not allowed or cut off, and of a number in `payload` beyond the double range, the first byte.
 *
 * Readings of the rules
 *   - An escaped spelling is the same string everywhere: "\u006detrics" is metrics, "\u0061" and "a" are duplicates,
 *     lengths and the rules for keys, tags and ts hold after unescaping. `ts` stays where it is, as written.
 *   - Numbers: `seq` and `boot` are integer literals 0 ... 2^63-1 (no sign, fraction or exponent; -0 is refused). Every
 *     other number is RFC 8259 within double range, decided exactly: what rounds to a finite double is accepted,
 *     from 1.797693134862315807...e308 (the midpoint to 2^1024) on it is refused, underflow is 0. In `metrics` that is
 *     bad_metric_value, in `payload` malformed_json.
 *   - Characters: any Unicode scalar value, U+0000 and U+007F included, but no noncharacters (U+FDD0 ... U+FDEF and the
 *     last two of each plane), as UTF-8 or escaped: RFC 7493, 2.1, is stricter than RFC 8259 here.
 *   - ts: RFC 3339 date-time by its grammar, any number of fraction digits. `t` and `z` may be small, as its grammar
 *     says; a space for the T may not. Years 0000-9999, days of the Gregorian calendar, offsets to +-23:59, -00:00
 *     included. Hour 24 and second 60 are refused (no leap seconds).
 *   - null is never a way to leave out a field; `boot` without `seq` is accepted. */
#ifndef GW_VALIDATOR_H
#define GW_VALIDATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "gw_codes.h"

enum {
    GW_MEMBERS_MAX = 1024, /* object members in one document, at all depths together */
    GW_METRICS_MAX = 32,
    GW_TAGS_MAX = 16,
    GW_NAME_BYTES_MAX = 32,       /* a key of metrics or tags, after unescaping */
    GW_TAG_VALUE_BYTES_MAX = 128, /* after unescaping */
    GW_PAYLOAD_DEPTH_MAX = 32,    /* counted inside payload; a scalar is 0 */
    GW_DEVICE_ID_BYTES_MAX = 64
};

/* Which optional fields were there. */
enum { GW_EVENT_HAS_TS = 1, GW_EVENT_HAS_SEQ = 2, GW_EVENT_HAS_BOOT = 4 };

/* The rule's subject, for the error body ("field"). `GW_FIELD_NONE`: the document as a whole, as for
 * malformed_json and too_many_members everywhere. */
enum gw_field {
    GW_FIELD_NONE = 0,
    GW_FIELD_METRICS,
    GW_FIELD_TAGS,
    GW_FIELD_TS,
    GW_FIELD_SEQ,
    GW_FIELD_BOOT,
    GW_FIELD_PAYLOAD,
    GW_FIELD_UNKNOWN, /* an unknown top-level key: its bytes are at [field_offset, field_offset + field_bytes) */
    GW_FIELD_DEVICE_ID
};

typedef struct gw_verdict {
    uint16_t code;                /* enum gw_code; 0: valid */
    uint8_t field;                /* enum gw_field */
    uint8_t flags;                /* GW_EVENT_HAS_*; 0 if refused */
    uint32_t offset;              /* byte offset in the body of the first byte that broke the rule */
    uint32_t field_offset;        /* inner key the rule is about (metrics.X, tags.X, unknown field); 0: none */
    uint32_t field_bytes;         /* as written, quotes excluded */
    uint32_t object_offset;       /* of the opening brace: the publisher splices "ts" behind it */
    uint32_t ts_offset, ts_bytes; /* inside the quotes */
    uint32_t device_offset;       /* of the member device_id, inside the quotes; 0: none was asked for */
    uint64_t seq, boot;
    uint64_t device_bytes;
} gw_verdict;

/* Returns verdict->code. `hash_key` keys the duplicate detection (any 16 secret bytes of the process). */
int gw_validate(const uint8_t *body, size_t body_bytes, const uint64_t hash_key[2], gw_verdict *verdict);

/* The same for one event among others. `names_device`: it has one more member, device_id, which is required (missing:
 * bad_device_id, behind missing_metrics), a string and free of escapes; else that name is an unknown field, as above.
 * `end`, if not NULL: something may stand behind the event; *end is the first byte there, if the event is valid. */
int gw_validate_item(const uint8_t *body, size_t body_bytes, const uint64_t hash_key[2], bool names_device,
                     gw_verdict *verdict, size_t *end);

/* 1 if `id` is ^[A-Za-z0-9_-]{1,64}$ as a whole. */
int gw_device_id_ok(const uint8_t *id, size_t id_bytes);

/* The scan paths that this machine can run, for tests and benches: "portable", "sse2", "avx2", "neon".
 * gw_validator_select returns 0, or -1 if `name` cannot run here. The best one is selected at load. */
int gw_validator_select(const char *name);
const char *gw_validator_selected(void);

/* Their names, best first; NULL behind the last one. */
const char *gw_validator_path(unsigned index);

#endif
