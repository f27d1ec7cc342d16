/* gw_mqtt.c - see gw_mqtt.h for the contract and the picture.
 *
 * A QoS 1 PUBLISH as written here (MQTT 5 section 3.3):
 *
 *   +----+-----------+-------+---------------------------+-------+---+---------------------------------------------+
 *   | 3x | remaining | topic | prefix, device id, suffix | packet| 0 | body as sent, behind its '{' "ts":"...", if |
 *   |    | varint    | bytes |                           | id    |   | the event had no ts of its own              |
 *   +----+-----------+-------+---------------------------+-------+---+---------------------------------------------+
 *   x = QoS 1 (0x02), and DUP (0x08) on a resumed session      property length
 *
 * Entry states, and who moves them:
 *
 *   (read) --fill--> SENT --PUBACK ok--> ACKED --settle--> gone, the cursor above it
 *    | |              | |
 *    | |   resumed    | '--PUBACK >= 0x80--> REFUSED --dead_letter--> DEAD --settle--> gone
 *    | |   session    v                        ^                       ^
 *    | |            OWED --fill, DUP--> SENT   |                       |
 *    | '---too large, bad topic, no object-----'                       |
 *    '---marked as dead in the log (OWED ones too)---------------------'
 */
#include "gw_mqtt.h"

#include <stdlib.h>
#include <string.h>

#include "gw_validator.h"

enum { PUBACK = 4, PUBLISH_QOS1 = 0x32, DUP = 0x08 };
enum { TS_BYTES = 24, SPLICE_BYTES = 6 + TS_BYTES + 2 }; /* "ts":"....", */
enum { SPAN_MIN = 1024, SPAN_FACTOR = 4, SPAN_MAX = 65536 };

enum entry_state { SENT = 1, OWED, ACKED, REFUSED, DEAD };

typedef struct entry {
    uint64_t lsn, end; /* the record and its end */
    uint64_t ordinal;  /* DATA records below `end` */
    uint64_t received_at_ns, sent_ns;
    uint32_t packet_bytes;
    uint8_t state, reason;
    bool by_broker;
} entry;

struct gw_window {
    gw_log *log;
    gw_counter_block *counters;
    unsigned sink;
    uint8_t *prefix, *suffix;
    uint32_t prefix_bytes, suffix_bytes;
    bool topic_is_fixed;
    uint32_t inflight_max, span_max; /* configured; entries that may be open */

    gw_cursor cursor; /* as stored */
    uint64_t read_lsn, read_ordinal;
    uint64_t head, tail, resend; /* entry numbers; [resend, tail) may hold OWED ones */
    uint64_t sent_high;          /* records below it were sent before by this process */
    uint64_t probe_lsn;          /* one at a time while the cursor is at or below it; 0: no */
    uint64_t acks, corrupt_lsn;
    uint32_t in_flight, refused;
    entry *ring;
    uint32_t mask;

    bool open;
    uint32_t limit, packet_bytes_max; /* of this connection */
    const char *error;
    uint32_t in_bytes; /* of the packet that is not whole yet */

    uint64_t ts_second; /* the second that `ts` shows */
    char ts[TS_BYTES];
    uint32_t batch_bytes;
    uint8_t *out;
    uint8_t in[5 + GW_MQTT_PACKET_IN_BYTES_MAX];
};

static entry *at(const gw_window *w, uint64_t n)
{
    return &w->ring[n & w->mask];
}

/* ---- time ---------------------------------------------------------------------------------------------------- */

static void put_digits(char *out, unsigned value, int digits)
{
    for (int i = digits - 1; i >= 0; i--, value /= 10)
        out[i] = (char)('0' + value % 10);
}

/* Days since 1970-01-01 to a date: Howard Hinnant, "chrono-compatible low-level date algorithms". */
static void put_seconds(uint64_t unix_s, char *out)
{
    uint64_t days = unix_s / 86400, second = unix_s % 86400;
    uint64_t z = days + 719468, era = z / 146097, day_of_era = z % 146097;
    uint64_t year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
    uint64_t day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    uint64_t shifted = (5 * day_of_year + 2) / 153; /* March is 0 */
    unsigned day = (unsigned)(day_of_year - (153 * shifted + 2) / 5 + 1);
    unsigned month = (unsigned)(shifted < 10 ? shifted + 3 : shifted - 9);
    unsigned year = (unsigned)(year_of_era + era * 400 + (month <= 2));
    memcpy(out, "0000-00-00T00:00:00.000Z", TS_BYTES);
    put_digits(out, year, 4);
    put_digits(out + 5, month, 2);
    put_digits(out + 8, day, 2);
    put_digits(out + 11, (unsigned)(second / 3600), 2);
    put_digits(out + 14, (unsigned)(second / 60 % 60), 2);
    put_digits(out + 17, (unsigned)(second % 60), 2);
}

void gw_rfc3339_ms(uint64_t unix_ns, char *out)
{
    put_seconds(unix_ns / 1000000000u, out);
    put_digits(out + 20, (unsigned)(unix_ns / 1000000u % 1000u), 3);
}

/* ---- life ---------------------------------------------------------------------------------------------------- */

static bool topic_part_ok(const uint8_t *part, uint32_t bytes)
{
    for (uint32_t i = 0; i < bytes; i++)
        if (part[i] == '+' || part[i] == '#' || part[i] == 0)
            return false;
    return true;
}

/* The largest packet that a record of this log can become. */
static size_t packet_bound(const gw_window *w)
{
    return 5 + 2 + GW_MQTT_TOPIC_BYTES_MAX + 2 + 1 + SPLICE_BYTES + (size_t)gw_log_record_bytes_max(w->log);
}

static uint8_t *copy(const uint8_t *bytes, uint32_t n)
{
    uint8_t *to = malloc(n ? n : 1);
    if (to && n)
        memcpy(to, bytes, n);
    return to;
}

gw_window *gw_window_new(gw_log *log, unsigned sink, const gw_window_options *o)
{
    uint64_t topic_bytes_max =
        (uint64_t)o->topic_prefix_bytes + o->topic_suffix_bytes + (o->topic_is_fixed ? 0 : GW_DEVICE_ID_BYTES_MAX);
    if (o->inflight_max < 1 || o->inflight_max > GW_MQTT_IDS || o->batch_bytes < 1 ||
        o->batch_bytes > GW_MQTT_BATCH_BYTES_MAX || topic_bytes_max > GW_MQTT_TOPIC_BYTES_MAX || topic_bytes_max == 0 ||
        !topic_part_ok(o->topic_prefix, o->topic_prefix_bytes) ||
        !topic_part_ok(o->topic_suffix, o->topic_suffix_bytes))
        return NULL;
    gw_window *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    uint32_t slots = SPAN_MIN;
    while (slots < SPAN_MAX && slots < o->inflight_max * SPAN_FACTOR)
        slots *= 2;
    w->log = log;
    w->sink = sink;
    w->counters = gw_log_counters(log, GW_BLOCK_DELIVERY);
    w->topic_is_fixed = o->topic_is_fixed;
    w->prefix_bytes = o->topic_prefix_bytes;
    w->suffix_bytes = o->topic_suffix_bytes;
    w->inflight_max = o->inflight_max;
    w->batch_bytes = o->batch_bytes;
    w->mask = slots - 1;
    w->span_max = slots < GW_MQTT_IDS ? slots : GW_MQTT_IDS; /* ids stay unique */
    w->prefix = copy(o->topic_prefix, o->topic_prefix_bytes);
    w->suffix = copy(o->topic_suffix, o->topic_suffix_bytes);
    w->ring = calloc(slots, sizeof *w->ring);
    w->out = malloc(o->batch_bytes + packet_bound(w));
    if (!w->prefix || !w->suffix || !w->ring || !w->out) {
        gw_window_free(w);
        return NULL;
    }
    w->ts_second = UINT64_MAX;
    w->cursor = gw_cursor_load(log, sink);
    w->read_lsn = w->cursor.lsn;
    w->read_ordinal = w->cursor.ordinal;
    gw_window_connect(w);
    return w;
}

void gw_window_free(gw_window *w)
{
    if (!w)
        return;
    free(w->prefix);
    free(w->suffix);
    free(w->ring);
    free(w->out);
    free(w);
}

static void show_in_flight(gw_window *w)
{
    gw_counter_set(w->counters, GW_COUNTER_MQTT_IN_FLIGHT, w->in_flight);
}

/* Publish again from the cursor, with new ids. */
static void forget(gw_window *w)
{
    w->head = w->resend = w->tail; /* entry numbers go on, and the ids with them */
    w->in_flight = w->refused = 0;
    w->corrupt_lsn = 0;
    w->read_lsn = w->cursor.lsn;
    w->read_ordinal = w->cursor.ordinal;
    show_in_flight(w);
}

void gw_window_connect(gw_window *w)
{
    w->open = false;
    w->error = NULL;
    w->in_bytes = 0;
    gw_counter_set(w->counters, GW_COUNTER_MQTT_IN_FLIGHT, 0);
}

void gw_window_open(gw_window *w, bool resumed, uint32_t receive_max, uint32_t packet_bytes_max)
{
    if (receive_max < 1)
        receive_max = 1;
    w->limit = receive_max < w->inflight_max ? receive_max : w->inflight_max;
    w->packet_bytes_max = packet_bytes_max ? packet_bytes_max : UINT32_MAX;
    if (resumed) {
        for (uint64_t n = w->head; n != w->tail; n++)
            if (at(w, n)->state == SENT)
                at(w, n)->state = OWED;
        w->resend = w->head;
        w->in_flight = 0;
        show_in_flight(w);
    } else {
        gw_refusal held;
        if (gw_window_refusals(w, &held, 1))
            gw_window_probe(w, held.lsn);
        forget(w);
    }
    w->open = true;
}

bool gw_window_start_over(gw_window *w)
{
    if (w->in_flight)
        return false;
    for (uint64_t n = w->head; n != w->tail; n++)
        if (at(w, n)->state == OWED)
            return false;
    gw_refusal held;
    if (gw_window_refusals(w, &held, 1))
        gw_window_probe(w, held.lsn);
    forget(w);
    return true;
}

void gw_window_probe(gw_window *w, uint64_t until_lsn)
{
    if (until_lsn > w->probe_lsn)
        w->probe_lsn = until_lsn;
}

/* ---- publishing ---------------------------------------------------------------------------------------------- */

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

static uint8_t *put(uint8_t *to, const void *bytes, size_t n)
{
    memcpy(to, bytes, n);
    return to + n;
}

static uint8_t *put_splice(gw_window *w, uint8_t *to, uint64_t received_at_ns)
{
    uint64_t second = received_at_ns / 1000000000u;
    if (second != w->ts_second) {
        put_seconds(second, w->ts);
        w->ts_second = second;
    }
    put_digits(w->ts + 20, (unsigned)(received_at_ns / 1000000u % 1000u), 3);
    to = put(to, "\"ts\":\"", 6);
    to = put(to, w->ts, TS_BYTES);
    return put(to, "\",", 2);
}

/* Writes the packet at `to` and returns its end; e->packet_bytes is set in any case. NULL: e->reason says why the
 * record cannot be published. */
static uint8_t *encode(gw_window *w, const gw_record *r, entry *e, uint16_t id, uint8_t first_byte, uint8_t *to)
{
    uint32_t splice = 0;
    if (!(r->flags & GW_EVENT_HAS_TS)) {
        splice = behind_brace(r);
        if (!splice) {
            e->reason = GW_REASON_PAYLOAD_INVALID;
            return NULL;
        }
    }
    if (!device_id_ok(r)) {
        e->reason = GW_REASON_TOPIC_INVALID;
        return NULL;
    }
    uint32_t topic_bytes = w->prefix_bytes + (w->topic_is_fixed ? 0 : r->device_id_bytes) + w->suffix_bytes;
    uint32_t remaining = 2 + topic_bytes + 2 + 1 + r->body_bytes + (splice ? SPLICE_BYTES : 0);
    uint8_t header[5];
    unsigned header_bytes = 0;
    header[header_bytes++] = first_byte;
    for (uint32_t left = remaining;;) { /* section 1.5.5 */
        uint8_t low = left & 0x7f;
        left >>= 7;
        header[header_bytes++] = left ? low | 0x80 : low;
        if (!left)
            break;
    }
    e->packet_bytes = header_bytes + remaining;
    if (e->packet_bytes > w->packet_bytes_max) {
        e->reason = GW_REASON_PACKET_TOO_LARGE;
        return NULL;
    }
    to = put(to, header, header_bytes);
    *to++ = (uint8_t)(topic_bytes >> 8);
    *to++ = (uint8_t)topic_bytes;
    to = put(to, w->prefix, w->prefix_bytes);
    if (!w->topic_is_fixed)
        to = put(to, r->device_id, r->device_id_bytes);
    to = put(to, w->suffix, w->suffix_bytes);
    *to++ = (uint8_t)(id >> 8);
    *to++ = (uint8_t)id;
    *to++ = 0; /* property length */
    if (splice) {
        to = put(to, r->body, splice);
        to = put_splice(w, to, r->received_at_ns);
    }
    return put(to, r->body + splice, r->body_bytes - splice);
}

/* Move the cursor over the settled prefix. */
static void settle(gw_window *w)
{
    uint64_t before = w->cursor.lsn;
    while (w->head != w->tail) {
        const entry *e = at(w, w->head);
        if (e->state == ACKED)
            w->cursor.published++;
        else if (e->state == DEAD)
            w->cursor.dead_lettered++;
        else
            break;
        w->cursor.lsn = e->end;
        w->cursor.ordinal = e->ordinal;
        w->head++;
    }
    if (w->head == w->tail) { /* nothing open: PAD and VOID records behind the last one are done as well */
        w->cursor.lsn = w->read_lsn;
        w->cursor.ordinal = w->read_ordinal;
    }
    if ((int64_t)(w->resend - w->head) < 0)
        w->resend = w->head;
    if (w->probe_lsn && w->cursor.lsn > w->probe_lsn)
        w->probe_lsn = 0;
    if (w->cursor.lsn != before)
        gw_cursor_store(w->log, w->sink, &w->cursor); /* done for this sink from here on */
}

static void hold(gw_window *w, entry *e, bool by_broker)
{
    e->state = REFUSED;
    e->by_broker = by_broker;
    w->refused++;
    gw_counter_add(w->counters, GW_COUNTER_MQTT_NEGATIVE_ACKS, 1);
}

/* A dead letter of this sink is on file: what is left is to pass it. */
static bool is_dead(const gw_window *w, const gw_record *r)
{
    return r->dead >> w->sink & 1;
}

static uint16_t id_of(uint64_t n)
{
    return (uint16_t)(1 + n % GW_MQTT_IDS);
}

size_t gw_window_fill(gw_window *w, uint64_t now_ns, const uint8_t **bytes)
{
    *bytes = w->out;
    if (!w->open || w->error)
        return 0;
    uint32_t limit = w->probe_lsn ? 1 : w->limit;
    uint64_t sent = 0, repeated = 0;
    uint8_t *to = w->out, *const full = w->out + w->batch_bytes, *end;
    gw_record r;

    /* What the resumed session is owed goes first, also while a refusal holds the rest. */
    for (; w->resend != w->tail && w->in_flight < limit && to < full; w->resend++) {
        entry *e = at(w, w->resend);
        if (e->state != OWED)
            continue;
        if (gw_log_read(w->log, e->lsn, &r) != GW_OK) {
            w->corrupt_lsn = e->lsn;
            break;
        }
        if (is_dead(w, &r)) {
            e->state = DEAD;
            continue;
        }
        end = encode(w, &r, e, id_of(w->resend), PUBLISH_QOS1 | DUP, to);
        if (!end) { /* this connection's Maximum Packet Size is smaller */
            hold(w, e, false);
            continue;
        }
        to = end;
        e->state = SENT;
        e->sent_ns = now_ns;
        w->in_flight++;
        sent++, repeated++;
    }
    /* Records that cannot be published at all do not end the round in which they are found: the caller sets them
     * aside together, with one fdatasync. */
    bool hold_rest = w->refused || w->corrupt_lsn;
    while (w->resend == w->tail && !hold_rest && w->in_flight < limit && w->tail - w->head < w->span_max && to < full) {
        gw_status status = gw_log_read(w->log, w->read_lsn, &r);
        if (status != GW_OK) {
            if (status != GW_EMPTY)
                w->corrupt_lsn = w->read_lsn;
            break;
        }
        w->read_lsn = r.lsn + r.size;
        if (r.kind != GW_DATA)
            continue;
        w->read_ordinal++;
#ifdef GW_MUTANT_SKIP /* a build that loses one record on purpose: the books must show it */
        if (w->read_ordinal == GW_MUTANT_SKIP)
            continue;
#endif
        entry *e = at(w, w->tail);
        *e = (entry){.lsn = r.lsn,
                     .end = w->read_lsn,
                     .ordinal = w->read_ordinal,
                     .received_at_ns = r.received_at_ns,
                     .sent_ns = now_ns,
                     .state = is_dead(w, &r) ? DEAD : SENT};
        end = e->state == DEAD ? NULL : encode(w, &r, e, id_of(w->tail), PUBLISH_QOS1, to);
        w->tail++;
        w->resend = w->tail;
        if (!end) {
            if (e->state != DEAD)
                hold(w, e, false);
            else if (w->head + 1 == w->tail)
                settle(w); /* a long run of them must not fill the span: nobody's PUBACK would empty it */
            continue;
        }
        to = end;
        w->in_flight++;
        sent++;
        if (r.lsn < w->sent_high)
            repeated++;
        else
            w->sent_high = w->read_lsn;
    }
    settle(w);
    if (sent) {
        gw_counter_add(w->counters, GW_COUNTER_PUBLISH_SENT, sent);
        if (repeated)
            gw_counter_add(w->counters, GW_COUNTER_PUBLISH_REPEATED, repeated);
        show_in_flight(w);
    }
    return (size_t)(to - w->out);
}

/* ---- what the broker says ------------------------------------------------------------------------------------ */

static gw_mqtt_status broken(gw_window *w, const char *why)
{
    w->error = why;
    return GW_MQTT_PROTOCOL;
}

/* A variable byte integer (section 1.5.5): bytes taken, 0: not whole yet, -1: malformed. */
static int varint(const uint8_t *p, size_t left, uint32_t *value)
{
    *value = 0;
    for (int i = 0; i < 4; i++) {
        if ((size_t)i == left)
            return 0;
        *value |= (uint32_t)(p[i] & 0x7f) << (7 * i);
        if (!(p[i] & 0x80))
            return i > 0 && p[i] == 0 ? -1 : i + 1; /* the encoding must be the shortest [MQTT-1.5.5-1] */
    }
    return -1;
}

/* The properties of a PUBACK (section 3.4.2.2): one reason string, any number of user properties. */
static bool puback_properties_ok(const uint8_t *p, uint32_t left)
{
    bool reason_string = false;
    while (left) {
        uint8_t property = *p++;
        left--;
        int strings = property == 0x1f ? 1 : property == 0x26 ? 2 : 0;
        if (!strings || (property == 0x1f && reason_string))
            return false;
        reason_string |= property == 0x1f;
        while (strings--) {
            if (left < 2)
                return false;
            uint32_t bytes = (uint32_t)p[0] << 8 | p[1];
            if (left - 2 < bytes)
                return false;
            p += 2 + bytes;
            left -= 2 + bytes;
        }
    }
    return true;
}

static gw_mqtt_status puback(gw_window *w, gw_packet *packet, uint64_t now_realtime_ns)
{
    const uint8_t *p = packet->body;
    uint32_t n = packet->body_bytes;
    if (packet->flags)
        return broken(w, "PUBACK with reserved flags set (MQTT 5 section 2.1.3)");
    if (n < 2)
        return broken(w, "PUBACK without a packet identifier (MQTT 5 section 3.4.2)");
    uint16_t id = (uint16_t)(p[0] << 8 | p[1]);
    uint8_t reason = n > 2 ? p[2] : 0;
    if (n > 3) {
        uint32_t property_bytes;
        int taken = varint(p + 3, n - 3, &property_bytes);
        if (taken <= 0 || property_bytes != n - 3 - (uint32_t)taken ||
            !puback_properties_ok(p + 3 + taken, property_bytes))
            return broken(w, "PUBACK with malformed properties (MQTT 5 section 3.4.2.2)");
    }
    if (!w->open)
        return broken(w, "PUBACK before CONNACK (MQTT 5 section 3.2)");
    if (!id)
        return broken(w, "PUBACK with packet identifier 0 (MQTT 5 section 2.2.1)");
    uint64_t n_entry = w->head + (id - 1u + GW_MQTT_IDS - w->head % GW_MQTT_IDS) % GW_MQTT_IDS;
    entry *e = at(w, n_entry);
    if (n_entry - w->head >= w->tail - w->head || (e->state != SENT && e->state != OWED))
        return broken(w, "PUBACK for a packet identifier that is not in flight (MQTT 5 section 4.3.2)");
    if (reason != 0x00 && reason != 0x10 && reason < 0x80)
        return broken(w, "PUBACK with an unknown reason code (MQTT 5 section 3.4.2.1)");
    if (e->state == SENT)
        w->in_flight--;
    if (reason < 0x80) {
        e->state = ACKED;
        w->acks++;
        gw_histogram_observe(w->counters, GW_COUNTER_PUBACK_NS,
                             now_realtime_ns > e->received_at_ns ? now_realtime_ns - e->received_at_ns : 0);
        return GW_MQTT_OK;
    }
    e->reason = packet->reason = reason;
    packet->lsn = e->lsn;
    hold(w, e, true);
    return GW_MQTT_REFUSED;
}

/* The fixed header at p (section 2.1): its bytes, 0: not whole yet, -1: w->error is set. */
static int fixed_header(gw_window *w, const uint8_t *p, size_t left, uint32_t *remaining)
{
    int taken = varint(p + 1, left - 1, remaining);
    if (p[0] >> 4 == 0)
        return broken(w, "packet type 0 (MQTT 5 section 2.1.2)"), -1;
    if (taken < 0)
        return broken(w, "malformed remaining length (MQTT 5 section 1.5.5)"), -1;
    if (taken && *remaining > GW_MQTT_PACKET_IN_BYTES_MAX - 5)
        return broken(w, "packet above our Maximum Packet Size (MQTT 5 section 3.1.2.11.4)"), -1;
    return taken ? 1 + taken : 0;
}

/* The next whole packet of the stream: GW_MQTT_PACKET, GW_MQTT_OK (all used, none whole) or GW_MQTT_PROTOCOL. */
static gw_mqtt_status next_packet(gw_window *w, const uint8_t *data, size_t bytes, size_t *used, gw_packet *packet)
{
    uint32_t remaining = 0;
    const uint8_t *p = data + *used;
    size_t left = bytes - *used;
    int header = 0;
    if (!w->in_bytes) { /* the usual case: a packet that lies whole in the segment */
        header = left ? fixed_header(w, p, left, &remaining) : 0;
        if (header < 0)
            return GW_MQTT_PROTOCOL;
        if (header && left - (size_t)header >= remaining) {
            *packet = (gw_packet){.body = p + header, .body_bytes = remaining, .type = p[0] >> 4, .flags = p[0] & 15};
            *used += (size_t)header + remaining;
            return GW_MQTT_PACKET;
        }
    }
    for (;;) { /* collect: the header byte by byte, then the rest at once */
        if (w->in_bytes) {
            header = fixed_header(w, w->in, w->in_bytes, &remaining);
            if (header < 0)
                return GW_MQTT_PROTOCOL;
        }
        size_t need = header ? (size_t)header + remaining - w->in_bytes : 1;
        if (header && !need)
            break;
        if (need > bytes - *used)
            need = bytes - *used;
        if (!need)
            return GW_MQTT_OK;
        memcpy(w->in + w->in_bytes, data + *used, need);
        w->in_bytes += (uint32_t)need;
        *used += need;
    }
    w->in_bytes = 0;
    *packet =
        (gw_packet){.body = w->in + header, .body_bytes = remaining, .type = w->in[0] >> 4, .flags = w->in[0] & 15};
    return GW_MQTT_PACKET;
}

gw_mqtt_status gw_window_feed(gw_window *w, const uint8_t *data, size_t bytes, uint64_t now_realtime_ns, size_t *used,
                              gw_packet *packet)
{
    gw_mqtt_status status = GW_MQTT_PROTOCOL;
    *used = 0;
    while (!w->error) {
        status = next_packet(w, data, bytes, used, packet);
        if (status != GW_MQTT_PACKET || packet->type != PUBACK)
            break;
        status = puback(w, packet, now_realtime_ns);
        if (status != GW_MQTT_OK)
            break;
    }
    settle(w);
    show_in_flight(w);
    return status;
}

const char *gw_window_error(const gw_window *w)
{
    return w->error ? w->error : "";
}

/* ---- refusals, and a look ------------------------------------------------------------------------------------ */

uint32_t gw_window_refusals(const gw_window *w, gw_refusal *refusals, uint32_t most)
{
    uint32_t found = 0;
    for (uint64_t n = w->head; n != w->tail && found < most && found < w->refused; n++) {
        const entry *e = at(w, n);
        if (e->state == REFUSED)
            refusals[found++] =
                (gw_refusal){.lsn = e->lsn, .reason = e->reason, .by_broker = e->by_broker, .bytes = e->packet_bytes};
    }
    return found;
}

bool gw_window_dead_letter(gw_window *w, uint64_t lsn)
{
    uint64_t low = w->head, high = w->tail; /* entries stand in the log's order */
    while (low != high) {
        uint64_t middle = low + (high - low) / 2;
        if (at(w, middle)->lsn < lsn)
            low = middle + 1;
        else
            high = middle;
    }
    entry *e = at(w, low);
    if (low == w->tail || e->lsn != lsn || e->state != REFUSED)
        return false;
    e->state = DEAD;
    w->refused--;
    settle(w);
    return true;
}

gw_window_view gw_window_look(const gw_window *w)
{
    gw_window_view view = {.cursor = w->cursor,
                           .read_lsn = w->read_lsn,
                           .acks = w->acks,
                           .corrupt_lsn = w->corrupt_lsn,
                           .in_flight = w->in_flight,
                           .span = (uint32_t)(w->tail - w->head),
                           .refused = w->refused};
    for (uint64_t n = w->head; w->in_flight && n != w->tail; n++)
        if (at(w, n)->state == SENT) {
            view.oldest_sent_ns = at(w, n)->sent_ns;
            view.oldest_lsn = at(w, n)->lsn;
            break;
        }
    return view;
}
