/* fuzz_puback.c - any bytes from a broker end in a verdict that does not depend on how the stream is cut, nothing is
 * in flight that the broker did not allow, and the cursor never passes what was not acknowledged; with one message a
 * record or packs, on one connection or two.
 *
 * Sources: _native/gw_mqtt*.c (the log is tests/native/fake_log.h). An input:
 *   byte 0  the configured window     byte 2  bits: see `enum`
 *   byte 1  seed of the cuts          byte 3  the broker's Receive Maximum; 0: 65535
 *   byte 4  where the second connection (the same one again, or another) begins, of 256ths of the rest;
 *           then what the broker sends */
#include "gw_mqtt.h"

#include "fake_log.h"
#include "fuzz.h"

enum { NOT_CONNECTED = 1, DEAD_LETTER = 2, RECONNECT = 4, RESUMED = 8, START_OVER = 16, PACKET_MAX = 32 };
enum { PACKED = 64, TWO = 128 };
enum { HEADER_BYTES = 5, RECORDS = 300, PACKET_BYTES = 64, PACK_PACKET_BYTES = 128, IDS = 1024 };

typedef struct setup {
    uint32_t inflight_max, receive_max;
    uint8_t bits;
} setup;

typedef struct result {
    gw_cursor cursor;
    unsigned packets, refused, sent;
    gw_mqtt_status last;
    uint64_t digest;
    bool in_flight[IDS]; /* of this connection: sent, and not acknowledged */
    unsigned dead;
    unsigned acks;
    bool known; /* no connection broke a rule: of one that does, what came before that counts */
} result;

static gw_log *log_of_records(void)
{
    static const char *const device[] = {"dev", "de1", "de2", "de3"};
    static gw_log *log;
    if (!log) {
        log = fake_new();
        for (int i = 0; i < RECORDS; i++)
            fake_add(log, i % 7 == 3 ? GW_PAD : GW_DATA, i % 50 == 20 ? "no/topic" : device[i % 4],
                     i % 9 == 5 ? "{\"metrics\":{}, \"payload\":\"longer than the others\"}" : "{\"metrics\":{}}",
                     i & 1);
    }
    log->cursor = (gw_cursor){.lsn = FAKE_FIRST_LSN};
    return log;
}

static void digest(result *r, uint64_t word)
{
    r->digest = (r->digest ^ word) * 0x100000001b3ull;
}

static uint32_t packet_bytes(const setup *s)
{
    return s->bits & PACKED ? PACK_PACKET_BYTES : PACKET_BYTES;
}

/* Sends what may be sent; each packet is a PUBLISH with an id, DUP only in a resumed session. */
static void fill(gw_window *w, const setup *s, unsigned connection, bool resumed, result *r)
{
    const uint8_t *out;
    for (size_t n; (n = gw_window_fill(w, connection, 1, GW_FILL_ALL, &out)) != 0;)
        for (size_t at = 0; at < n; r->sent++) {
            MUST(n - at >= 2 && (out[at] & 0xf7) == 0x32); /* QoS 1 */
            MUST(!(out[at] & 8) || resumed);
            size_t topic = at + 1, bytes = 0;
            for (unsigned shift = 0;; shift += 7) {
                MUST(topic < n && shift < 28);
                bytes |= (size_t)(out[topic] & 0x7f) << shift;
                if (!(out[topic++] & 0x80))
                    break;
            }
            size_t id = topic + 2 + (size_t)(out[topic] << 8 | out[topic + 1]);
            MUST(id + 2 <= n && (out[id] || out[id + 1]));
            MUST(!(s->bits & PACKET_MAX) || topic - at + bytes <= packet_bytes(s));
            const unsigned number = (unsigned)(out[id] << 8 | out[id + 1]);
            MUST(number < IDS && (!r->known || r->in_flight[number] == (out[at] >> 3 & 1)));
            r->in_flight[number] = true;
            digest(r, (uint64_t)out[at] << 16 | (uint64_t)out[id] << 8 | out[id + 1]);
            at = topic + bytes;
            MUST(at <= n);
        }
    MUST(gw_window_look(w, (int)connection).in_flight <=
         (s->inflight_max < s->receive_max ? s->inflight_max : s->receive_max));
}

static void refused(gw_window *w, const setup *s, unsigned connection, result *r)
{
    gw_refusal refusal;
    r->refused++;
    MUST(gw_window_refusals(w, &refusal, 1) == 1 && gw_window_is_held(w, (int)refusal.connection));
    if (s->bits & DEAD_LETTER) {
        MUST(gw_window_dead_letter(w, refusal.lsn) == (refusal.events == 1));
        r->dead += refusal.events == 1;
    } else if (s->bits & START_OVER) {
        digest(r, gw_window_start_over(w, connection));
    }
}

/* What a connection said that broke no rule: each PUBACK is for a packet that was in flight. */
static void acknowledge(const uint8_t *p, size_t n, result *r)
{
    for (const uint8_t *const end = p + n; end - p >= 2;) {
        const bool is_puback = p[0] == 0x40;
        size_t bytes = 0;
        for (unsigned shift = 0, more = 1; more && p + 1 < end; shift += 7) {
            bytes |= (size_t)(*++p & 0x7f) << shift;
            more = *p & 0x80;
            if (more && p + 1 == end)
                return;
        }
        p++;
        if ((size_t)(end - p) < bytes)
            return;
        if (is_puback) {
            const unsigned number = (unsigned)(p[0] << 8 | p[1]);
            MUST(number < IDS && r->in_flight[number]);
            r->in_flight[number] = false;
            r->acks += bytes == 2 || p[2] < 0x80;
        }
        p += bytes;
    }
}

/* One connection: the bytes in pieces of `cut` bytes; 0: of a random number. */
static void feed(gw_window *w, const setup *s, unsigned connection, const uint8_t *data, size_t n, size_t cut, dice *d,
                 result *r)
{
    for (size_t at = 0, left; at < n && r->last != GW_MQTT_PROTOCOL; at += left) {
        left = cut ? cut : 1 + roll(d, 1 + roll(d, 40));
        left = left < n - at ? left : n - at;
        uint8_t *copy = malloc(left); /* the sanitizer sees one byte too many */
        MUST(copy != NULL);
        memcpy(copy, data + at, left);
        for (size_t done = 0, used;;) {
            gw_packet p;
            r->last = gw_window_feed(w, connection, copy + done, left - done, 0, &used, &p);
            MUST(used <= left - done);
            done += used;
            if (r->last == GW_MQTT_OK || r->last == GW_MQTT_PROTOCOL) {
                MUST(r->last == GW_MQTT_PROTOCOL || done == left);
                MUST(!*gw_window_error(w, connection) == (r->last == GW_MQTT_OK));
                break;
            }
            MUST(r->last == GW_MQTT_PACKET ? p.type != 4 : p.type == 4 && p.reason >= 0x80);
            r->packets += r->last == GW_MQTT_PACKET;
            digest(r, (uint64_t)p.type << 8 | p.flags);
            for (uint32_t i = 0; i < p.body_bytes; i++)
                digest(r, p.body[i]);
            if (r->last == GW_MQTT_REFUSED)
                refused(w, s, connection, r);
        }
        free(copy);
    }
}

static result run(const setup *s, const uint8_t *data, size_t n, size_t second, size_t cut, dice d)
{
    static const uint8_t prefix[] = "t/";
    gw_log *log = log_of_records();
    const gw_pack_options pack = {.bytes_max = 200};
    gw_window_options o = {.topic_prefix = prefix,
                           .topic_prefix_bytes = 2,
                           .inflight_max = s->inflight_max,
                           .batch_bytes = 4096,
                           .connections = s->bits & TWO ? 2 : 1,
                           .pack = s->bits & PACKED ? &pack : NULL,
                           .records_max = 200};
    gw_window *w = gw_window_new(log, 0, &o);
    MUST(w != NULL);
    result r = {.last = GW_MQTT_OK, .known = true};
    const uint32_t packet_max = s->bits & PACKET_MAX ? packet_bytes(s) : 0;
    if (!(s->bits & NOT_CONNECTED)) {
        gw_window_open(w, 0, false, s->receive_max, packet_max);
        fill(w, s, 0, false, &r);
    }
    feed(w, s, 0, data, second, cut, &d, &r);
    r.known = r.last != GW_MQTT_PROTOCOL;
    if (r.known)
        acknowledge(data, second, &r);
    if (s->bits & RECONNECT) {
        const unsigned other = s->bits & TWO ? 1 : 0;
        if (!(s->bits & RESUMED) || other)
            memset(r.in_flight, 0, sizeof r.in_flight);
        gw_window_connect(w, other);
        r.last = GW_MQTT_OK;
        gw_window_open(w, other, s->bits & RESUMED, s->receive_max, packet_max);
        fill(w, s, other, s->bits & RESUMED, &r);
        feed(w, s, other, data + second, n - second, cut, &d, &r);
        r.known &= r.last != GW_MQTT_PROTOCOL;
        if (r.known)
            acknowledge(data + second, n - second, &r);
        fill(w, s, other, s->bits & RESUMED, &r);
    }
    gw_window_view v = gw_window_look(w, GW_ALL_CONNECTIONS);
    MUST(v.cursor.published + v.cursor.dead_lettered <= v.cursor.ordinal && v.cursor.ordinal <= RECORDS);
    MUST(v.in_flight <= v.span && v.cursor.lsn <= v.read_lsn);
    MUST((s->bits & PACKED || v.cursor.published <= v.acks) && v.cursor.dead_lettered <= r.dead);
    MUST(!r.known || v.acks == r.acks);
    r.cursor = log->cursor;
    gw_window_free(w);
    return r;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes < HEADER_BYTES)
        return 0;
    const setup s = {.inflight_max = data[0] + 1u, .receive_max = data[3] ? data[3] : 65535, .bits = data[2]};
    const uint8_t *stream = data + HEADER_BYTES;
    const size_t n = bytes - HEADER_BYTES, second = s.bits & RECONNECT ? n * data[4] / 256 : n;
    const result whole = run(&s, stream, n, second, n + 1, dice_of(0));
    for (size_t cut = 0; cut < 2; cut++) { /* at random; single bytes */
        const result other = run(&s, stream, n, second, cut, dice_of(data[1]));
        MUST(whole.last == other.last && whole.packets == other.packets && whole.refused == other.refused);
        MUST(whole.digest == other.digest && whole.sent == other.sent);
        MUST(memcmp(&whole.cursor, &other.cursor, sizeof whole.cursor) == 0);
    }
    return 0;
}
