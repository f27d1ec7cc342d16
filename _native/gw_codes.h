/* gw_codes.h - every reason for which an event can be refused, in one list.
 *
 * The order is the numbering of the counters in shared memory and of the verdicts that native code returns;
 * append only. 0 is not in the list: it means accepted. gateway/errors.py gives each name its HTTP status and
 * its message; a test holds the two lists together. Names are stable, they are part of the HTTP contract. */
#ifndef GW_CODES_H
#define GW_CODES_H

#define GW_CODES(X)                                     \
    X(MALFORMED_JSON, "malformed_json")                 \
    X(TOO_MANY_MEMBERS, "too_many_members")             \
    X(NOT_AN_OBJECT, "not_an_object")                   \
    X(UNKNOWN_FIELD, "unknown_field")                   \
    X(MISSING_METRICS, "missing_metrics")               \
    X(TOO_MANY_METRICS, "too_many_metrics")             \
    X(BAD_METRIC_KEY, "bad_metric_key")                 \
    X(BAD_METRIC_VALUE, "bad_metric_value")             \
    X(TOO_MANY_TAGS, "too_many_tags")                   \
    X(BAD_TAG_KEY, "bad_tag_key")                       \
    X(BAD_TAG_VALUE, "bad_tag_value")                   \
    X(BAD_TS, "bad_ts")                                 \
    X(BAD_SEQ, "bad_seq")                               \
    X(BAD_BOOT, "bad_boot")                             \
    X(PAYLOAD_TOO_DEEP, "payload_too_deep")             \
    X(DUPLICATE_KEY, "duplicate_key")                   \
    X(BAD_DEVICE_ID, "bad_device_id")                   \
    X(NOT_FOUND, "not_found")                           \
    X(METHOD_NOT_ALLOWED, "method_not_allowed")         \
    X(LENGTH_REQUIRED, "length_required")               \
    X(BODY_TOO_LARGE, "body_too_large")                 \
    X(BODY_TIMEOUT, "body_timeout")                     \
    X(UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type") \
    X(UNSUPPORTED_ENCODING, "unsupported_encoding")     \
    X(ACK_NOT_SUPPORTED, "ack_not_supported")           \
    X(UNKNOWN_ACK, "unknown_ack")                       \
    X(SEQ_CONFLICT, "seq_conflict")                     \
    X(BATCH_TOO_LARGE, "batch_too_large")               \
    X(UNAUTHORIZED, "unauthorized")                     \
    X(FORBIDDEN, "forbidden")                           \
    X(RATE_LIMITED, "rate_limited")                     \
    X(LOG_FULL, "log_full")                             \
    X(DRAINING, "draining")                             \
    X(FAILED, "failed")                                 \
    X(ACCEPTED_PENDING, "accepted_pending")             \
    X(INTERNAL, "internal")                             \
    X(BAD_REQUEST, "bad_request")                       \
    X(EMPTY_BATCH, "empty_batch")                       \
    X(BAD_ENCODING, "bad_encoding")                     \
    X(OVERLOADED, "overloaded")

#define GW_CODE_ENUM(name, text) GW_CODE_##name,
enum gw_code { GW_CODE_ACCEPTED = 0, GW_CODES(GW_CODE_ENUM) GW_CODE_COUNT };
#undef GW_CODE_ENUM

#endif
