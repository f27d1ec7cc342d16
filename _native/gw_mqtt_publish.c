/* gw_mqtt_publish.c - a QoS 1 PUBLISH as the window writes it (MQTT 5 section 3.3):
 *
 *   +----+-----------+-------+---------------------------+-------+------------+---------------------------------------+
 *   | 3x | remaining | topic | prefix, device id, suffix | packet| properties | payload                               |
 *   |    | varint    | bytes |                           | id    |            |                                       |
 *   +----+-----------+-------+---------------------------+-------+------------+---------------------------------------+
 *   x = QoS 1 (0x02), and DUP (0x08) on a resumed session
 *
 *   one record   properties: none                  payload: body as sent, behind its '{' "ts":"...", if it has none
 *   pack         properties: content type          payload: events, each the body from its '{' on, and behind that
 *                (section 3.3.2.3.9)                        "device_id":"...","lsn":123,"ts":"...", as wanted
 */
#include <string.h>

#include "gw_mqtt_window.h"
#include "gw_text.h"
#include "gw_validator.h"

enum { SPLICE_TS = 6 + TS_BYTES + 2, SPLICE_DEVICE = 13 + 2, SPLICE_LSN = 6 + 20 + 1 };

/* ---- time ---------------------------------------------------------------------------------------------------- */

void gw_rfc3339_ms(uint64_t unix_ns, char *out)
{
    gw_rfc3339_seconds(unix_ns / 1000000000u, out);
    gw_put_digits(out + GW_RFC3339_SECONDS_BYTES, (unsigned)(unix_ns / 1000000u % 1000u), 3);
    out[TS_BYTES - 1] = 'Z';
}

/* ---- parts --------------------------------------------------------------------------------------------------- */

static uint8_t *put(uint8_t *to, const void *bytes, size_t n)
{
    memcpy(to, bytes, n);
    return to + n;
}

static uint8_t *put_ts(gw_window *w, uint8_t *to, uint64_t received_at_ns)
{
    uint64_t second = received_at_ns / 1000000000u;
    if (second != w->ts_second) {
        gw_rfc3339_ms(received_at_ns, w->ts);
        w->ts_second = second;
    } else {
        gw_put_digits(w->ts + GW_RFC3339_SECONDS_BYTES, (unsigned)(received_at_ns / 1000000u % 1000u), 3);
    }
    to = put(to, "\"ts\":\"", 6);
    to = put(to, w->ts, TS_BYTES);
    return put(to, "\",", 2);
}

/* A variable byte integer (section 1.5.5). */
static unsigned put_varint(uint8_t *to, uint32_t value)
{
    unsigned n = 0;
    do {
        uint8_t low = value & 0x7f;
        value >>= 7;
        to[n++] = value ? low | 0x80 : low;
    } while (value);
    return n;
}

/* Offset just behind the opening brace; 0: there is none. */
static uint32_t behind_brace(const gw_record *r)
{
    if (r->splice && r->splice <= r->body_bytes && r->body[r->splice - 1] == '{')
        return r->splice;
    for (uint32_t i = 0; i < r->body_bytes; i++) {
        uint8_t c = r->body[i];
        if (c == '{')
            return i + 1;
        if (c != ' ' && c != '\t' && c != '\n' && c != '\r')
            break;
    }
    return 0;
}

/* [A-Za-z0-9_-]{1,64}: whatever else a record may hold must not become a topic. */
static bool device_id_ok(const gw_record *r)
{
    if (r->device_id_bytes < 1 || r->device_id_bytes > GW_DEVICE_ID_BYTES_MAX)
        return false;
    for (unsigned i = 0; i < r->device_id_bytes; i++) {
        uint8_t c = r->device_id[i], lower = c | 0x20;
        if (!((lower >= 'a' && lower <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-'))
            return false;
    }
    return true;
}

/* ---- does a body name its device? ---------------------------------------------------------------------------- */

static const char DEVICE_ID[] = "\"device_id\"";
enum { DEVICE_ID_BYTES = sizeof DEVICE_ID - 1, UNDERSCORE = 7 };

static int hexadecimal(uint8_t c)
{
    return c >= '0' && c <= '9' ? c - '0' : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10 : -1;
}

/* The string [p, end) without its quotes, unescaped, is device_id. */
static bool is_device_id(const uint8_t *p, const uint8_t *end)
{
    for (unsigned i = 1; i < DEVICE_ID_BYTES - 1; i++) {
        int c;
        if (p == end)
            return false;
        c = *p++;
        if (c == '\\') {
            if (end - p < 5 || *p++ != 'u')
                return false;
            c = 0;
            for (int digit = 0; digit < 4; digit++) {
                int value = hexadecimal(*p++);
                if (value < 0)
                    return false;
                c = c * 16 + value;
            }
        }
        if (c != DEVICE_ID[i])
            return false;
    }
    return p == end;
}

/* [p, end) is what follows the opening brace of a valid event: a member of that object itself is so named. */
static bool has_member(const uint8_t *p, const uint8_t *end)
{
    for (int depth = 0; p < end; p++) {
        if (*p == '{' || *p == '[')
            depth++;
        else if (*p == '}' || *p == ']')
            depth--;
        if (*p != '"')
            continue;
        const uint8_t *const string = ++p;
        while (p < end && *p != '"')
            p += *p == '\\' ? 2 : 1;
        if (p >= end)
            return false;
        const uint8_t *behind = p + 1;
        while (behind < end && (*behind == ' ' || *behind == '\t' || *behind == '\n' || *behind == '\r'))
            behind++;
        if (depth == 0 && behind < end && *behind == ':' && is_device_id(string, p))
            return true;
    }
    return false;
}

static bool names_device(const uint8_t *p, const uint8_t *end)
{
    const uint8_t *found = p;
    while ((found = memchr(found, '_', (size_t)(end - found)))) {
        if (found - p >= UNDERSCORE && end - found >= DEVICE_ID_BYTES - UNDERSCORE &&
            memcmp(found - UNDERSCORE, DEVICE_ID, DEVICE_ID_BYTES) == 0)
            return has_member(p, end);
        found++;
    }
    return memchr(p, '\\', (size_t)(end - p)) && has_member(p, end); /* it may be escaped */
}

/* ---- events in a pack ---------------------------------------------------------------------------------------- */

uint32_t gw_mqtt_event_bytes(record *slot, const gw_record *r)
{
    const uint32_t brace = behind_brace(r);
    if (!brace || !device_id_ok(r))
        return 0;
    slot->names_device = names_device(r->body + brace, r->body + r->body_bytes);
    return r->body_bytes - (brace - 1) + (slot->names_device ? 0 : SPLICE_DEVICE + r->device_id_bytes) + 6 +
           gw_decimal_digits(r->lsn) + 1 + (r->flags & GW_EVENT_HAS_TS ? 0 : SPLICE_TS) + 1;
}

static uint8_t *put_event(gw_window *w, const record *slot, const gw_record *r, uint8_t *to)
{
    const uint32_t brace = behind_brace(r);
    *to++ = '{';
    if (!slot->names_device) {
        to = put(to, "\"device_id\":\"", 13);
        to = put(to, r->device_id, r->device_id_bytes);
        to = put(to, "\",", 2);
    }
    to = put(to, "\"lsn\":", 6);
    to = gw_put_decimal(to, r->lsn);
    *to++ = ',';
    if (!(r->flags & GW_EVENT_HAS_TS))
        to = put_ts(w, to, r->received_at_ns);
    uint8_t *const rest = to;
    to = put(to, r->body + brace, r->body_bytes - brace);
    const size_t bytes = (size_t)(to - rest);
    if (memchr(rest, '\n', bytes) || memchr(rest, '\r', bytes)) /* between tokens: strings hold none */
        for (uint8_t *p = rest; p < to; p++)
            if (*p == '\n' || *p == '\r')
                *p = ' ';
    return to;
}

/* ---- packets ------------------------------------------------------------------------------------------------- */

void gw_mqtt_set_properties(gw_window *w)
{
    static const char *const type[2][2] = {{"application/x-ndjson", "application/x-ndjson+zstd"},
                                           {"application/json", "application/json+zstd"}};
    for (int compressed = 0; compressed < 2; compressed++) {
        uint8_t *p = w->properties[compressed];
        uint32_t bytes = w->packed ? (uint32_t)strlen(type[w->pack.array][compressed]) : 0;
        p[0] = (uint8_t)(bytes ? 3 + bytes : 0);
        if (bytes) {
            p[1] = 0x03;
            p[2] = 0;
            p[3] = (uint8_t)bytes;
            memcpy(p + 4, type[w->pack.array][compressed], bytes);
        }
        w->properties_bytes[compressed] = 1 + p[0];
    }
}

size_t gw_mqtt_packet_bound(const gw_window *w)
{
    size_t payload =
        gw_log_record_bytes_max(w->log) + SPLICE_TS + SPLICE_DEVICE + GW_DEVICE_ID_BYTES_MAX + SPLICE_LSN + 2;
    if (w->packed && payload < w->pack.bytes_max)
        payload = w->pack.bytes_max;
    return 5 + 2 + GW_MQTT_TOPIC_BYTES_MAX + 2 + PROPERTIES_BYTES_MAX + payload;
}

static uint32_t topic_bytes_of(const gw_window *w, const gw_record *r)
{
    return w->prefix_bytes + (w->topic_is_fixed ? 0 : r->device_id_bytes) + w->suffix_bytes;
}

uint32_t gw_mqtt_around(const gw_window *w, const gw_record *r)
{
    return 5 + 2 + topic_bytes_of(w, r) + 2 + w->properties_bytes[w->packed && w->pack.compress];
}

/* All before the payload. Returns its bytes. */
static uint32_t put_head(const gw_window *w, const gw_record *r, uint8_t first_byte, uint16_t id, bool compressed,
                         uint32_t payload_bytes, uint8_t *to)
{
    uint8_t *const start = to;
    uint32_t topic_bytes = topic_bytes_of(w, r);
    *to++ = first_byte;
    to += put_varint(to, 2 + topic_bytes + 2 + w->properties_bytes[compressed] + payload_bytes);
    *to++ = (uint8_t)(topic_bytes >> 8);
    *to++ = (uint8_t)topic_bytes;
    to = put(to, w->prefix, w->prefix_bytes);
    if (!w->topic_is_fixed)
        to = put(to, r->device_id, r->device_id_bytes);
    to = put(to, w->suffix, w->suffix_bytes);
    *to++ = (uint8_t)(id >> 8);
    *to++ = (uint8_t)id;
    to = put(to, w->properties[compressed], w->properties_bytes[compressed]);
    return (uint32_t)(to - start);
}

static uint32_t packet_bytes_of(const gw_window *w, const gw_record *r, bool compressed, uint32_t payload_bytes)
{
    uint8_t varint[5];
    uint32_t remaining = 2 + topic_bytes_of(w, r) + 2 + w->properties_bytes[compressed] + payload_bytes;
    return 1 + put_varint(varint, remaining) + remaining;
}

static enum encoded impossible(message *m, uint8_t reason)
{
    m->reason = reason;
    return IMPOSSIBLE;
}

static enum encoded encode_event(gw_window *w, const connection *c, message *m, uint16_t id, uint8_t first_byte,
                                 const gw_record *r, uint8_t **to)
{
    uint32_t splice = 0;
    if (!(r->flags & GW_EVENT_HAS_TS)) {
        splice = behind_brace(r);
        if (!splice)
            return impossible(m, GW_REASON_PAYLOAD_INVALID);
    }
    if (!device_id_ok(r))
        return impossible(m, GW_REASON_TOPIC_INVALID);
    uint32_t payload_bytes = r->body_bytes + (splice ? SPLICE_TS : 0);
    m->packet_bytes = packet_bytes_of(w, r, false, payload_bytes);
    if (m->packet_bytes > c->packet_bytes_max)
        return impossible(m, GW_REASON_PACKET_TOO_LARGE);
    uint8_t *p = *to + put_head(w, r, first_byte, id, false, payload_bytes, *to);
    if (splice) {
        p = put(p, r->body, splice);
        p = put_ts(w, p, r->received_at_ns);
    }
    *to = put(p, r->body + splice, r->body_bytes - splice);
    return ENCODED;
}

enum { AHEAD = 3 }; /* records of a topic lie far apart in the log: so many are loaded while one is written */

/* The payload is written behind a head of the length that it most likely has, and moved if it has another. */
static enum encoded encode_pack(gw_window *w, connection *c, message *m, uint16_t id, bool repeat, uint8_t **to)
{
    const uint8_t first_byte = repeat ? PUBLISH_QOS1 | DUP : PUBLISH_QOS1;
    gw_record topic, r;
    chain left = {0};
    uint8_t *start = NULL, *p = NULL;
    uint32_t index = m->records.first, ahead = index;
    for (uint32_t n = 0; n < AHEAD && n + 1 < m->records.count; n++) {
        ahead = w->record[ahead].next;
        gw_log_prefetch(w->log, w->record[ahead].lsn);
    }
    uint64_t received_at_ns = 0;
    for (uint32_t n = m->records.count, next; n; n--, index = next) {
        next = w->record[index].next;
        if (n > AHEAD + 1) {
            ahead = w->record[ahead].next;
            gw_log_prefetch(w->log, w->record[ahead].lsn);
        }
        if (!gw_mqtt_reread(w, index, &r)) {
            if (left.count)
                w->record[left.last].next = index;
            m->records.first = left.count ? left.first : index;
            m->records.count = left.count + n;
            return CORRUPT;
        }
        if (!repeat && gw_mqtt_is_dead(w, &r)) {
            w->record[index].state = DEAD;
            continue;
        }
        if (!device_id_ok(&r) || !behind_brace(&r)) { /* it is alone in its message */
            m->reason = device_id_ok(&r) ? GW_REASON_PAYLOAD_INVALID : GW_REASON_TOPIC_INVALID;
            return IMPOSSIBLE;
        }
        if (!left.count) {
            topic = r;
            received_at_ns = r.received_at_ns;
            uint32_t bytes = (uint32_t)m->payload_bytes;
            start = p = *to + (packet_bytes_of(w, &r, false, bytes) - bytes);
            if (w->pack.array)
                *p++ = '[';
        }
        p = put_event(w, &w->record[index], &r, p);
        *p++ = w->pack.array ? ',' : '\n';
        chain_add(w, &left, index);
    }
    if (!left.count)
        return ALL_DEAD;
    m->records = left;
    m->received_at_ns = received_at_ns;
    if (w->pack.array)
        p[-1] = ']';
    uint32_t bytes = (uint32_t)(p - start);
    const uint8_t *payload = start;
    bool compressed = false;
    if (w->pack.compress) {
        size_t n = w->pack.compress(w->pack.context, start, bytes, w->compressed, bytes - 1);
        compressed = n > 0 && n < bytes;
        if (compressed) {
            bytes = (uint32_t)n;
            payload = w->compressed;
        }
    }
    m->packet_bytes = packet_bytes_of(w, &topic, compressed, bytes);
    if (m->packet_bytes > c->packet_bytes_max)
        return impossible(m, GW_REASON_PACKET_TOO_LARGE);
    const uint32_t head = m->packet_bytes - bytes;
    if (*to + head != payload)
        memmove(*to + head, payload, bytes);
    put_head(w, &topic, first_byte, id, compressed, bytes, *to);
    *to += m->packet_bytes;
    return ENCODED;
}

enum encoded gw_mqtt_encode(gw_window *w, connection *c, message *m, uint16_t id, bool repeat, const gw_record *fresh,
                            uint8_t **to)
{
    if (w->packed)
        return encode_pack(w, c, m, id, repeat, to);
    gw_record r;
    if (!fresh) {
        if (!gw_mqtt_reread(w, m->records.first, &r))
            return CORRUPT;
        fresh = &r;
    }
    if (gw_mqtt_is_dead(w, fresh)) {
        w->record[m->records.first].state = DEAD;
        return ALL_DEAD;
    }
    m->received_at_ns = fresh->received_at_ns;
    return encode_event(w, c, m, id, repeat ? PUBLISH_QOS1 | DUP : PUBLISH_QOS1, fresh, to);
}
