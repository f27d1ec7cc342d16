#include "gw_ingest.h"

#include <string.h>
#include <time.h>

uint64_t gw_monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

_Static_assert((int)GW_EVENT_KEYED == (int)GW_EVENT_HAS_SEQ, "a seq makes a key");

/* The capacity is a power of two: no division on the way of an event. */
uint8_t gw_ingest_used_percent(const gw_log *log)
{
    return (uint8_t)(gw_log_used(log) * 100 >> __builtin_ctzll(gw_log_capacity(log)));
}

static int count(gw_ingest *ingest, unsigned code, uint64_t started_ns)
{
    gw_counter_block *counters = ingest->counters;
    gw_counter_add(counters,
                   code                ? GW_COUNTER_REFUSED + code
                   : ingest->duplicate ? GW_COUNTER_DUPLICATES
                                       : GW_COUNTER_ACCEPTED,
                   1);
    uint64_t now = gw_monotonic_ns();
    gw_histogram_observe(counters, GW_COUNTER_REQUEST_NS, now > started_ns ? now - started_ns : 0);
    return (int)code;
}

void gw_ingest_refuse(gw_ingest *ingest, unsigned code, uint64_t started_ns)
{
    ingest->verdict = (gw_verdict){.code = (uint16_t)code};
    count(ingest, code, started_ns);
}

/* What the event's key may be, before anything is known about the body: a guess costs a glance and saves the wait for
 * the index, whose lines are far away. It decides nothing; a wrong one only loads a line that nobody needs. */
static gw_event guess(const gw_ingest *ingest, const uint8_t *device_id, size_t device_id_bytes, const uint8_t *body,
                      size_t body_bytes)
{
    enum { GLANCE = 256 };
    gw_event event = {.device_id = device_id, .device_id_bytes = (uint8_t)device_id_bytes};
    const uint8_t *end = body + (body_bytes < GLANCE ? body_bytes : GLANCE), *at = body + 4;
    while (at + 2 < end && (at = memchr(at, 'q', (size_t)(end - at - 2))) && memcmp(at - 3, "\"seq\":", 6) != 0)
        at++; /* the letter is rare */
    if (at && at + 2 < end) {
        for (at += 3; at < end && *at == ' '; at++)
            ;
        for (; at < end && *at >= '0' && *at <= '9'; at++)
            event.seq = event.seq * 10 + (uint64_t)(*at - '0');
        event.flags = GW_EVENT_HAS_SEQ;
    }
    gw_producer_prefetch(ingest->producer, &event, 0);
    return event;
}

int gw_ingest_event(gw_ingest *ingest, const uint8_t *device_id, size_t device_id_bytes, const uint8_t *body,
                    size_t body_bytes, uint64_t started_ns, bool again)
{
    gw_verdict *verdict = &ingest->verdict;
    ingest->duplicate = false;
    if (!again)
        gw_counter_add(ingest->counters, GW_COUNTER_RECEIVED, 1);
    if (!gw_device_id_ok(device_id, device_id_bytes)) {
        *verdict = (gw_verdict){.code = GW_CODE_BAD_DEVICE_ID, .field = GW_FIELD_DEVICE_ID};
        return count(ingest, GW_CODE_BAD_DEVICE_ID, started_ns);
    }
    if (body_bytes > UINT32_MAX) {
        *verdict = (gw_verdict){.code = GW_CODE_BODY_TOO_LARGE};
        return count(ingest, GW_CODE_BODY_TOO_LARGE, started_ns);
    }
    const gw_event guessed = guess(ingest, device_id, device_id_bytes, body, body_bytes);
    if (gw_validate(body, body_bytes, ingest->hash_key, verdict))
        return count(ingest, verdict->code, started_ns);

    uint32_t splice = verdict->object_offset + 1;
    gw_event event = {.device_id = device_id,
                      .body = body,
                      .body_bytes = (uint32_t)body_bytes,
                      .device_id_bytes = (uint8_t)device_id_bytes,
                      .flags = verdict->flags,
                      .splice = splice < 255 ? (uint8_t)splice : 0,
                      .seq = verdict->seq,
                      .boot = verdict->boot};
    if (guessed.seq == event.seq && guessed.boot == event.boot)
        event.key_hash = guessed.key_hash;
    else
        gw_producer_prefetch(ingest->producer, &event, 0);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    event.received_at_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    gw_log *log = ingest->log;
    switch (gw_producer_append(ingest->producer, &event, &ingest->lsn)) {
    case GW_OK:
        gw_counter_add(ingest->counters, GW_COUNTER_ACCEPTED_BYTES, body_bytes);
        ingest->used_percent = gw_ingest_used_percent(log);
        return count(ingest, GW_CODE_ACCEPTED, started_ns);
    case GW_DUPLICATE:
        ingest->duplicate = true;
        ingest->used_percent = gw_ingest_used_percent(log);
        return count(ingest, GW_CODE_ACCEPTED, started_ns);
    case GW_CONFLICT:
        return count(ingest, GW_CODE_SEQ_CONFLICT, started_ns);
    case GW_BUSY:
        return GW_INGEST_BUSY;
    case GW_FULL:
        return count(ingest, GW_CODE_LOG_FULL, started_ns);
    case GW_CLOSED:
        return count(ingest, GW_CODE_DRAINING, started_ns);
    case GW_TOO_LARGE:
        return count(ingest, GW_CODE_BODY_TOO_LARGE, started_ns);
    default:
        return count(ingest, GW_CODE_FAILED, started_ns);
    }
}
