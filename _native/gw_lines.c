/* gw_lines.c - see gw_lines.h. */
#include "gw_lines.h"

#include <string.h>

#include "gw_log_shared.h"
#include "gw_text.h"

enum {
    FRACTION_BYTES = 9,
    ID_BYTES_MAX = 6 * UINT8_MAX, /* each byte as \u00XX */
    AROUND_BYTES = 128,           /* names, quotes, time and lsn take at most 101 */
    VECTOR_BYTES = 16,
};

typedef uint8_t vector __attribute__((vector_size(VECTOR_BYTES)));

size_t gw_lines_room(const gw_log *log, size_t bytes_max)
{
    size_t longest = gw_log_record_bytes_max(log) + ID_BYTES_MAX + AROUND_BYTES;
    return bytes_max > longest ? bytes_max : longest;
}

void gw_lines_init(gw_lines *lines, gw_log *log, unsigned sink, uint8_t *out, size_t bytes_max, bool durable)
{
    gw_cursor cursor = gw_cursor_load(log, sink);
    *lines = (gw_lines){.log = log,
                        .out = out,
                        .bytes_max = bytes_max,
                        .sink = sink,
                        .durable = durable,
                        .lsn = cursor.lsn,
                        .ordinal = cursor.ordinal,
                        .second = UINT64_MAX};
}

/* ---- a line --------------------------------------------------------------------------------------------------- */

static inline uint8_t *put(uint8_t *to, const char *text, size_t bytes)
{
    memcpy(to, text, bytes);
    return to + bytes;
}

#define PUT(to, literal) put(to, literal, sizeof(literal) - 1)

static inline bool is_plain(uint8_t c)
{
    return c >= 0x20 && c < 0x7f && c != '"' && c != '\\';
}

/* The door lets only plain ids in; a log that offline tools wrote may hold others. */
static uint8_t *put_id(uint8_t *to, const uint8_t *id, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++) {
        if (is_plain(id[i])) {
            *to++ = id[i];
            continue;
        }
        to = PUT(to, "\\u00");
        *to++ = (uint8_t) "0123456789abcdef"[id[i] >> 4];
        *to++ = (uint8_t) "0123456789abcdef"[id[i] & 15];
    }
    return to;
}

static uint8_t *put_time(gw_lines *lines, uint8_t *to, uint64_t unix_ns)
{
    uint64_t second = unix_ns / 1000000000u;
    if (second != lines->second) {
        gw_rfc3339_seconds(second, lines->text);
        lines->text[GW_RFC3339_SECONDS_BYTES + FRACTION_BYTES] = 'Z';
        lines->second = second;
    }
    gw_put_digits(lines->text + GW_RFC3339_SECONDS_BYTES, (unsigned)(unix_ns % 1000000000u), FRACTION_BYTES);
    return put(to, lines->text, GW_RFC3339_SECONDS_BYTES + FRACTION_BYTES + 1);
}

static inline uint8_t spaced(uint8_t c)
{
    return c == '\n' || c == '\r' ? ' ' : c;
}

/* Copied and cleared of line ends in one pass. */
static uint8_t *put_body(uint8_t *to, const uint8_t *body, size_t bytes)
{
    size_t i = 0;
    for (; i + VECTOR_BYTES <= bytes; i += VECTOR_BYTES) {
        vector v;
        memcpy(&v, body + i, VECTOR_BYTES);
        vector ends = (vector)((v == '\n') | (v == '\r'));
        v = (v & ~ends) | (ends & ' ');
        memcpy(to + i, &v, VECTOR_BYTES);
    }
    for (; i < bytes; i++)
        to[i] = spaced(body[i]);
    return to + bytes;
}

static uint8_t *put_line(gw_lines *lines, uint8_t *to, const gw_record *r)
{
    to = PUT(to, "{\"device_id\":\"");
    to = put_id(to, r->device_id, r->device_id_bytes);
    to = PUT(to, "\",\"received_at\":\"");
    to = put_time(lines, to, r->received_at_ns);
    to = PUT(to, "\",\"lsn\":");
    to = gw_put_decimal(to, r->lsn);
    to = PUT(to, ",\"event\":");
    to = put_body(to, r->body, r->body_bytes);
    return PUT(to, "}\n");
}

/* ---- reading -------------------------------------------------------------------------------------------------- */

/* Of what was read from `from` on. */
static bool is_lapped(const gw_lines *lines, uint64_t from)
{
    return !gw_log_is_required(lines->log, lines->sink) && gw_log_lapped(lines->log, from);
}

gw_status gw_lines_fill(gw_lines *lines, size_t *bytes)
{
    uint64_t limit = lines->durable ? gw_log_durable(lines->log) : gw_log_committed(lines->log);
    uint64_t lsn = lines->lsn, events = 0;
    uint8_t *to = lines->out;
    gw_status status = GW_EMPTY;
    *bytes = 0;
    lines->events = 0;
    while (lsn < limit) {
        gw_record r;
        status = gw_log_read_once(lines->log, lsn, limit, &r);
        if (status != GW_OK)
            break;
        if (r.kind == GW_DATA) {
            size_t used = (size_t)(to - lines->out);
            size_t most = 6u * r.device_id_bytes + r.body_bytes + AROUND_BYTES;
            if (used && used + most > lines->bytes_max)
                break;
            to = put_line(lines, to, &r);
            events++;
        }
        lsn += r.size;
    }
    if (is_lapped(lines, lines->lsn))
        return GW_LAPPED;
    if (status == GW_CORRUPT && lsn == lines->lsn)
        return GW_CORRUPT;
    lines->lsn = lsn;
    lines->ordinal += events;
    lines->events = events;
    *bytes = (size_t)(to - lines->out);
    return events ? GW_OK : status == GW_CORRUPT ? GW_CORRUPT : GW_EMPTY;
}

gw_status gw_lines_seek(gw_lines *lines, uint64_t lsn, uint64_t *at)
{
    gw_cursor cursor = gw_cursor_load(lines->log, lines->sink);
    uint64_t committed = gw_log_committed(lines->log), ordinal = cursor.ordinal;
    *at = cursor.lsn;
    if (lsn < cursor.lsn || lsn > committed)
        return GW_EMPTY;
    while (*at < lsn) {
        gw_record r;
        gw_status status = gw_log_read_once(lines->log, *at, committed, &r);
        if (is_lapped(lines, *at))
            return GW_LAPPED;
        if (status != GW_OK)
            return status;
        ordinal += r.kind == GW_DATA;
        *at += r.size;
    }
    if (*at != lsn)
        return GW_EMPTY;
    lines->lsn = lsn;
    lines->ordinal = ordinal;
    return GW_OK;
}

void gw_lines_confirm(gw_lines *lines)
{
    gw_cursor cursor = gw_cursor_load(lines->log, lines->sink);
    if (lines->lsn <= cursor.lsn)
        return;
    cursor.published += lines->ordinal - cursor.ordinal;
    cursor.lsn = lines->lsn;
    cursor.ordinal = lines->ordinal;
    gw_cursor_store(lines->log, lines->sink, &cursor);
}
