/* gw_lines.h - a run of the log's records as NDJSON, for sinks that write lines. Nothing of Python in here.
 *
 *   {"device_id":"<id>","received_at":"2025-09-23T11:18:41.123456789Z","lsn":<integer>,"event":<body>}\n
 *
 * The body is as it was sent, but that the line ends between its tokens are spaces; inside of strings JSON has none.
 * Only records whose marker, size, epoch and CRC agree leave (P3 of gw_log.h). PAD and VOID are stepped over.
 *
 *      cursor          position                      durable
 *   ---|--- filled, ---|--- next fill ---------------|--- not read: a power cut may put another event there
 *      |   not confirmed
 *
 * Reading below `durable` only is what makes an lsn in a file mean one event for ever. An optional sink's run is looked
 * at again when it was copied: written over meanwhile, none of it leaves (GW_LAPPED).
 *
 * The caller is the only writer of the sink's cursor. One thread at a time. */
#ifndef GW_LINES_H
#define GW_LINES_H

#include "gw_log.h"

typedef struct gw_lines {
    gw_log *log;
    uint8_t *out; /* gw_lines_room() bytes; the caller's */
    size_t bytes_max;
    unsigned sink;
    bool durable;     /* read below durable, else below committed */
    uint64_t lsn;     /* the next record to read */
    uint64_t ordinal; /* DATA records below it */
    uint64_t events;  /* in the last fill */
    uint64_t second;  /* of `text` */
    char text[32];    /* the last time of receipt, formatted */
} gw_lines;

/* Bytes that a run of at most `bytes_max` needs: one line alone may be longer than that. */
size_t gw_lines_room(const gw_log *log, size_t bytes_max);
/* Starts at the sink's cursor. */
void gw_lines_init(gw_lines *lines, gw_log *log, unsigned sink, uint8_t *out, size_t bytes_max, bool durable);

/* Go on at `lsn`, a record's start, or the end, at or above the cursor; what lies between counts as filled. The ordinal
 * is taken from the records on the way. GW_OK; GW_EMPTY: no record starts there; GW_CORRUPT, GW_LAPPED: at *at. */
gw_status gw_lines_seek(gw_lines *lines, uint64_t lsn, uint64_t *at);

/* The next run of whole lines into `out`. GW_OK: *bytes of them, lines->events events; GW_EMPTY: nothing new;
 * GW_CORRUPT: damage at lines->lsn; GW_LAPPED (optional sinks): the place at lines->lsn was written over, `out` holds
 * nothing: gw_lines_confirm what is safe, gw_log_skip, gw_lines_seek to the cursor. */
gw_status gw_lines_fill(gw_lines *lines, size_t *bytes);

/* Everything filled so far is safe in the sink: its cursor moves. */
void gw_lines_confirm(gw_lines *lines);

#endif
