/* gw_validator.h - one pass over one telemetry event (DESIGN: HTTP, the event table).
 *
 * Contract
 *   gw_validate() reads exactly `body_bytes` bytes, never one more, builds no tree, allocates nothing, does not
 *   recurse (its stack is constant at any nesting), and takes time linear in the input for any input: object keys
 *   are compared through a keyed hash in a fixed scratch of GW_MEMBERS_MAX entries.
 *   The verdict is the first rule broken in document order; the rules that need the whole object (missing metrics)
 *   come last.
 *
 * Numbers: `seq` and `boot` are integer literals 0 ... 2^63-1 (no sign, fraction or exponent). Every other number is
 * RFC 8259 within double range (1e400 is refused, underflow is 0). */
#ifndef GW_VALIDATOR_H
#define GW_VALIDATOR_H

#include <stddef.h>
#include <stdint.h>

#include "gw_codes.h"

enum {
    GW_MEMBERS_MAX = 1024, /* object members in one document, at all depths together */
    GW_METRICS_MAX = 32,
    GW_TAGS_MAX = 16,
    GW_TAG_VALUE_BYTES_MAX = 128, /* after unescaping */
    GW_PAYLOAD_DEPTH_MAX = 32,    /* counted inside payload; a scalar is 0 */
    GW_DEVICE_ID_BYTES_MAX = 64
};

/* Which optional fields were there. */
enum { GW_EVENT_HAS_TS = 1, GW_EVENT_HAS_SEQ = 2, GW_EVENT_HAS_BOOT = 4 };

/* The rule's subject, for the error body ("field"). `GW_FIELD_NONE`: the document as a whole. */
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
    uint16_t code;         /* enum gw_code; 0: valid */
    uint8_t field;         /* enum gw_field */
    uint8_t flags;         /* GW_EVENT_HAS_* */
    uint32_t offset;       /* byte offset in the body of the first byte that broke the rule */
    uint32_t field_offset; /* inner key the rule is about (metrics.X, tags.X, unknown field); 0,0: none */
    uint32_t field_bytes;  /* as written, quotes excluded */
    uint32_t object_offset; /* of the opening brace: the publisher splices "ts" behind it */
    uint32_t ts_offset, ts_bytes; /* inside the quotes */
    uint64_t seq, boot;
} gw_verdict;

/* Returns verdict->code. `hash_key` keys the duplicate detection (any 16 secret bytes of the process). */
int gw_validate(const uint8_t *body, size_t body_bytes, const uint64_t hash_key[2], gw_verdict *verdict);

/* 1 if `id` is ^[A-Za-z0-9_-]{1,64}$ as a whole. */
int gw_device_id_ok(const uint8_t *id, size_t id_bytes);

/* The scan paths that this machine can run, for tests and benches: "portable", "sse2", "avx2", "neon".
 * gw_validator_select returns 0, or -1 if `name` cannot run here. The best one is selected at load. */
int gw_validator_select(const char *name);
const char *gw_validator_selected(void);

#endif
