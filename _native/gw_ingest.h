/* gw_ingest.h - one event's way in: validate, look for its key, claim, copy, commit, count. One call, no heap, no wait.
 *
 * Nothing enters the log before its verdict is "valid"; the answer GW_CODE_ACCEPTED is given after the marker only. */
#ifndef GW_INGEST_H
#define GW_INGEST_H

#include "gw_log.h"
#include "gw_validator.h"

typedef struct gw_ingest {
    gw_log *log;
    gw_producer *producer;
    gw_counter_block *counters;
    uint64_t hash_key[2];
    uint64_t lsn;         /* of the last accepted event, or of the original that it repeats or waits for */
    uint8_t used_percent; /* of the log, when it was accepted */
    bool duplicate;       /* it was a repeat */
    gw_verdict verdict;   /* of the last event that reached the validator */
} gw_ingest;

enum { GW_INGEST_BUSY = -1 };

/* enum gw_code, or GW_INGEST_BUSY: another producer is writing this key at ingest->lsn; call again, with `again`, once
 * committed lies above it. `started_ns`: CLOCK_MONOTONIC at the request's start, for the histogram. */
int gw_ingest_event(gw_ingest *ingest, const uint8_t *device_id, size_t device_id_bytes, const uint8_t *body,
                    size_t body_bytes, uint64_t started_ns, bool again);
/* Count a refusal that was decided before the body was read. */
void gw_ingest_refuse(gw_ingest *ingest, unsigned code, uint64_t started_ns);
/* How full the log is. */
uint8_t gw_ingest_used_percent(const gw_log *log);
uint64_t gw_monotonic_ns(void);

#endif
