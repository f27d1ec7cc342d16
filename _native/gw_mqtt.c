/* gw_mqtt.c - the cursor, messages and connections. Contract: gw_mqtt.h; pictures: gw_mqtt_window.h. */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "gw_hash.h"
#include "gw_mqtt_window.h"
#include "gw_validator.h"

enum { SPAN_MIN = 1024, SPAN_FACTOR = 4, SPAN_MAX = 65536 };
_Static_assert(GW_MQTT_RECORDS_MAX == 1 << RECORD_INDEX_BITS, "an index of a record has so many bits");

/* ---- life ---------------------------------------------------------------------------------------------------- */

static bool topic_part_ok(const uint8_t *part, uint32_t bytes)
{
    for (uint32_t i = 0; i < bytes; i++)
        if (part[i] == '+' || part[i] == '#' || part[i] == 0)
            return false;
    return true;
}

static uint8_t *copy(const uint8_t *bytes, uint32_t n)
{
    uint8_t *to = malloc(n ? n : 1);
    if (to && n)
        memcpy(to, bytes, n);
    return to;
}

static bool options_ok(const gw_window_options *o)
{
    uint64_t topic_bytes_max =
        (uint64_t)o->topic_prefix_bytes + o->topic_suffix_bytes + (o->topic_is_fixed ? 0 : GW_DEVICE_ID_BYTES_MAX);
    return o->inflight_max >= 1 && o->inflight_max <= GW_MQTT_IDS && o->batch_bytes >= 1 &&
           o->batch_bytes <= GW_MQTT_BATCH_BYTES_MAX && topic_bytes_max <= GW_MQTT_TOPIC_BYTES_MAX &&
           topic_bytes_max > 0 && topic_part_ok(o->topic_prefix, o->topic_prefix_bytes) &&
           topic_part_ok(o->topic_suffix, o->topic_suffix_bytes) && o->connections <= GW_MQTT_CONNECTIONS_MAX &&
           o->records_max <= GW_MQTT_RECORDS_MAX &&
           (!o->pack || (o->pack->bytes_max >= 1 && o->pack->bytes_max <= GW_MQTT_PACK_BYTES_MAX));
}

static bool connections_new(gw_window *w)
{
    w->connection = calloc(w->connections, sizeof *w->connection);
    for (uint32_t i = 0; w->connection && i < w->connections; i++) {
        connection *c = &w->connection[i];
        c->number = i;
        c->ring = calloc(w->message_mask + 1, sizeof *c->ring);
        if (!c->ring || (w->packed && !gw_mqtt_packs_new(w, c)))
            return false;
        gw_mqtt_packs_clear(w, c);
    }
    return w->connection;
}

gw_window *gw_window_new(gw_log *log, unsigned sink, const gw_window_options *o)
{
    if (!options_ok(o))
        return NULL;
    gw_window *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    uint32_t messages = SPAN_MIN;
    while (messages < SPAN_MAX && messages < o->inflight_max * SPAN_FACTOR)
        messages *= 2;
    w->log = log;
    w->sink = sink;
    w->is_optional = !gw_log_is_required(log, sink);
    w->counters = gw_log_counters(log, GW_BLOCK_DELIVERY);
    w->topic_is_fixed = o->topic_is_fixed;
    w->prefix_bytes = o->topic_prefix_bytes;
    w->suffix_bytes = o->topic_suffix_bytes;
    w->inflight_max = o->inflight_max;
    w->batch_bytes = o->batch_bytes;
    w->connections = o->connections ? o->connections : 1;
    w->packed = o->pack;
    if (o->pack)
        w->pack = *o->pack;
    w->packs = o->topic_is_fixed ? 1 : PACKS_MAX;
    w->message_mask = messages - 1;
    w->messages_max = messages < GW_MQTT_IDS ? messages : GW_MQTT_IDS; /* ids stay unique */
    w->span_max = w->messages_max;
    if (w->packed || w->connections > 1)
        w->span_max = o->records_max ? o->records_max : GW_MQTT_RECORDS_MAX;
    uint32_t slots = SPAN_MIN;
    while (slots < w->span_max)
        slots *= 2;
    w->mask = slots - 1;
    /* The same device has the same connection also after a restart; who is in which bucket is nobody's business. */
    w->device_key[0] = gw_log_identity(log);
    if (getrandom(w->bucket_key, sizeof w->bucket_key, 0) != sizeof w->bucket_key)
        w->bucket_key[0] = (uintptr_t)w;
    gw_mqtt_set_properties(w);
    w->prefix = copy(o->topic_prefix, o->topic_prefix_bytes);
    w->suffix = copy(o->topic_suffix, o->topic_suffix_bytes);
    w->record = calloc(w->mask + 1, sizeof *w->record);
    w->out = malloc(o->batch_bytes + gw_mqtt_packet_bound(w));
    w->compressed = malloc(w->packed && w->pack.compress ? gw_mqtt_packet_bound(w) : 1);
    if (!w->prefix || !w->suffix || !w->record || !w->out || !w->compressed || !connections_new(w)) {
        gw_window_free(w);
        return NULL;
    }
    w->ts_second = UINT64_MAX;
    w->cursor = gw_cursor_load(log, sink);
    w->read_lsn = w->cursor.lsn;
    w->read_ordinal = w->cursor.ordinal;
    gw_mqtt_show_in_flight(w);
    return w;
}

void gw_window_free(gw_window *w)
{
    if (!w)
        return;
    for (uint32_t i = 0; w->connection && i < w->connections; i++) {
        free(w->connection[i].ring);
        free(w->connection[i].packs);
        free(w->connection[i].bucket);
    }
    free(w->connection);
    free(w->prefix);
    free(w->suffix);
    free(w->record);
    free(w->out);
    free(w->compressed);
    free(w);
}

void gw_mqtt_show_in_flight(gw_window *w)
{
    uint64_t open = 0;
    for (uint32_t i = 0; i < w->connections; i++)
        open += w->connection[i].open ? w->connection[i].in_flight : 0;
    gw_counter_set(w->counters, GW_COUNTER_MQTT_IN_FLIGHT, open);
}

/* ---- the cursor ---------------------------------------------------------------------------------------------- */

static bool is_done(const record *r)
{
    return r->state == ACKED || r->state == DEAD;
}

/* The first open record of this connection, or w->tail. */
static uint64_t floor_of(const gw_window *w, connection *c)
{
    if ((int64_t)(c->floor - w->head) < 0)
        c->floor = w->head;
    while (c->floor != w->tail && (record_at(w, c->floor)->connection != c->number || is_done(record_at(w, c->floor))))
        c->floor++;
    return c->floor;
}

void gw_mqtt_settle(gw_window *w, connection *c)
{
    const uint64_t before = w->cursor.lsn;
    for (; w->head != w->tail; w->head++) {
        const record *r = record_at(w, w->head);
        if (r->state == ACKED)
            w->cursor.published++;
        else if (r->state == DEAD)
            w->cursor.dead_lettered++;
        else
            break;
        w->cursor.lsn = r->lsn + (uint64_t)r->words * 8;
        w->cursor.ordinal = w->read_ordinal - (w->tail - w->head - 1);
    }
    if (w->head == w->tail) { /* nothing open: PAD and VOID records behind the last one are done as well */
        w->cursor.lsn = w->read_lsn;
        w->cursor.ordinal = w->read_ordinal;
    }
    if (c->probe_lsn) {
        const uint64_t floor = floor_of(w, c);
        if (floor == w->tail ? w->read_lsn > c->probe_lsn : record_at(w, floor)->lsn > c->probe_lsn)
            c->probe_lsn = 0;
    }
    if (w->cursor.lsn != before)
        gw_cursor_store(w->log, w->sink, &w->cursor); /* done for this sink from here on */
}

/* ---- messages ------------------------------------------------------------------------------------------------ */

/* Of what is over, nothing is kept: the head is a message that is in flight, owed or held. */
void gw_mqtt_drop_over(gw_window *w, connection *c)
{
    while (c->head != c->tail && message_at(w, c, c->head)->state == OVER)
        c->head++;
    if ((int64_t)(c->resend - c->head) < 0)
        c->resend = c->head;
}

void gw_mqtt_set_in_flight(gw_window *w, connection *c, uint32_t in_flight)
{
    w->in_flight += in_flight - c->in_flight;
    c->in_flight = in_flight;
}

static void set_refused(gw_window *w, connection *c, uint32_t refused)
{
    w->refused += refused - c->refused;
    c->refused = refused;
}

void gw_mqtt_hold(gw_window *w, connection *c, message *m, bool by_broker)
{
    m->state = HELD;
    m->by_broker = by_broker;
    record *first = &w->record[m->records.first];
    first->state = REFUSED;
    if (m->records.count == 1)
        first->next = (uint32_t)(m - c->ring);
    set_refused(w, c, c->refused + 1);
    gw_counter_add(w->counters, GW_COUNTER_MQTT_NEGATIVE_ACKS, 1);
}

void gw_mqtt_answered(gw_window *w, connection *c, message *m, uint8_t reason, uint64_t now_realtime_ns)
{
    if (m->state == FLYING)
        gw_mqtt_set_in_flight(w, c, c->in_flight - 1);
    if (reason >= 0x80) {
        m->reason = reason;
        gw_mqtt_hold(w, c, m, true);
        return;
    }
    uint32_t index = m->records.first;
    for (uint32_t n = m->records.count; n; n--, index = w->record[index].next)
        w->record[index].state = ACKED;
    m->state = OVER;
    c->acks++;
    gw_mqtt_drop_over(w, c);
    gw_histogram_observe(w->counters, GW_COUNTER_PUBACK_NS,
                         now_realtime_ns > m->received_at_ns ? now_realtime_ns - m->received_at_ns : 0);
}

static void mark_alone(gw_window *w, const message *m)
{
    uint32_t index = m->records.first;
    for (uint32_t n = m->records.count; n; n--, index = w->record[index].next)
        w->record[index].alone = true;
}

/* What waits is in the chain again, in the log's order, and in no pack. */
static void gather(gw_window *w, connection *c)
{
    gw_mqtt_packs_clear(w, c);
    c->waiting = (chain){0};
    for (uint64_t n = w->head; n != w->tail; n++)
        if (record_at(w, n)->connection == c->number && record_at(w, n)->state == WAITING)
            chain_add(w, &c->waiting, (uint32_t)n & w->mask);
}

/* Publish again from this connection's first unacked record, with new ids. What was acknowledged behind that goes out
 * again too, so that the last a subscriber sees of a device is in order. */
static void forget(gw_window *w, connection *c)
{
    for (uint64_t n = c->head; n != c->tail; n++)
        if (message_at(w, c, n)->state == HELD && message_at(w, c, n)->records.count > 1)
            mark_alone(w, message_at(w, c, n));
    c->head = c->resend = c->tail; /* message numbers go on, and the ids with them */
    gw_mqtt_set_in_flight(w, c, 0);
    set_refused(w, c, 0);
    w->corrupt_lsn = 0;
    bool behind = false;
    for (uint64_t n = w->head; n != w->tail; n++) {
        record *r = record_at(w, n);
        if (r->connection != c->number)
            continue;
        behind |= !is_done(r);
        if (r->state != DEAD && behind)
            r->state = WAITING;
    }
    c->floor = w->head;
    gather(w, c);
    gw_mqtt_show_in_flight(w);
}

/* ---- connections --------------------------------------------------------------------------------------------- */

void gw_window_connect(gw_window *w, unsigned number)
{
    connection *c = &w->connection[number];
    c->open = false;
    c->error = NULL;
    c->in_bytes = 0;
    gw_mqtt_show_in_flight(w);
}

/* One at a time up to the first record that is refused alone. */
static void probe_refused(gw_window *w, connection *c)
{
    for (uint64_t n = c->head; c->refused && n != c->tail; n++) {
        const message *m = message_at(w, c, n);
        if (m->state == HELD && m->records.count == 1) {
            const uint64_t lsn = w->record[m->records.first].lsn;
            c->probe_lsn = lsn > c->probe_lsn ? lsn : c->probe_lsn;
            return;
        }
    }
}

void gw_window_open(gw_window *w, unsigned number, bool resumed, uint32_t receive_max, uint32_t packet_bytes_max)
{
    connection *c = &w->connection[number];
    if (receive_max < 1)
        receive_max = 1;
    c->limit = receive_max < w->inflight_max ? receive_max : w->inflight_max;
    c->packet_bytes_max = packet_bytes_max ? packet_bytes_max : UINT32_MAX;
    c->open = true;
    if (resumed) {
        for (uint64_t n = c->head; n != c->tail; n++)
            if (message_at(w, c, n)->state == FLYING)
                message_at(w, c, n)->state = OWED;
        c->resend = c->head;
        gw_mqtt_set_in_flight(w, c, 0);
        gather(w, c); /* this connection's packets may be smaller */
        gw_mqtt_show_in_flight(w);
    } else {
        probe_refused(w, c);
        forget(w, c);
    }
}

bool gw_window_start_over(gw_window *w, unsigned number)
{
    connection *c = &w->connection[number];
    if (c->in_flight)
        return false;
    for (uint64_t n = c->head; n != c->tail; n++)
        if (message_at(w, c, n)->state == OWED)
            return false;
    probe_refused(w, c);
    forget(w, c);
    return true;
}

void gw_window_probe(gw_window *w, unsigned number, uint64_t until_lsn)
{
    connection *c = &w->connection[number];
    if (until_lsn > c->probe_lsn)
        c->probe_lsn = until_lsn;
    for (uint64_t n = c->head; c->in_flight == 1 && n != c->tail; n++)
        if (message_at(w, c, n)->state == FLYING && message_at(w, c, n)->records.count > 1)
            mark_alone(w, message_at(w, c, n));
}

unsigned gw_window_connection_of(const gw_window *w, const uint8_t *device_id, size_t bytes)
{
    return w->connections == 1 ? 0 : (unsigned)(gw_siphash(w->device_key, device_id, bytes) % w->connections);
}

/* ---- refusals, and a look ------------------------------------------------------------------------------------ */

/* The message of a refused record, which is its first. */
static message *held_message(const gw_window *w, uint32_t index)
{
    const record *r = &w->record[index];
    const connection *c = &w->connection[r->connection];
    if (r->next <= w->message_mask) {
        message *m = &c->ring[r->next];
        if (m->state == HELD && m->records.count == 1 && m->records.first == index)
            return m;
    }
    for (uint64_t n = c->head; n != c->tail; n++)
        if (message_at(w, c, n)->state == HELD && message_at(w, c, n)->records.first == index)
            return message_at(w, c, n);
    return NULL;
}

uint32_t gw_window_refusals(const gw_window *w, gw_refusal *refusals, uint32_t most)
{
    uint32_t found = 0;
    for (uint64_t n = w->head; n != w->tail && found < most && found < w->refused; n++) {
        const record *r = record_at(w, n);
        const message *m = r->state == REFUSED ? held_message(w, (uint32_t)n & w->mask) : NULL;
        if (m)
            refusals[found++] = (gw_refusal){.lsn = r->lsn,
                                             .reason = m->reason,
                                             .by_broker = m->by_broker,
                                             .bytes = m->packet_bytes,
                                             .connection = r->connection,
                                             .events = m->records.count};
    }
    return found;
}

bool gw_window_dead_letter(gw_window *w, uint64_t lsn)
{
    uint64_t low = w->head, high = w->tail; /* records stand in the log's order */
    while (low != high) {
        uint64_t middle = low + (high - low) / 2;
        if (record_at(w, middle)->lsn < lsn)
            low = middle + 1;
        else
            high = middle;
    }
    record *r = record_at(w, low);
    if (low == w->tail || r->lsn != lsn || r->state != REFUSED)
        return false;
    message *m = held_message(w, (uint32_t)low & w->mask);
    if (m->records.count > 1)
        return false;
    connection *c = &w->connection[r->connection];
    r->state = DEAD;
    m->state = OVER;
    gw_mqtt_drop_over(w, c);
    set_refused(w, c, c->refused - 1);
    gw_mqtt_settle(w, c);
    return true;
}

bool gw_window_set_aside(gw_window *w, uint64_t lsn)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < w->asides; i++)
        if (w->aside[i] >= w->cursor.lsn)
            w->aside[kept++] = w->aside[i];
    w->asides = kept;
    if (kept == ASIDE_MAX)
        return false;
    w->aside[w->asides++] = lsn;
    return true;
}

gw_window_view gw_window_look(const gw_window *w, int number)
{
    gw_window_view view = {.cursor = w->cursor,
                           .read_lsn = w->read_lsn,
                           .corrupt_lsn = w->corrupt_lsn,
                           .span = (uint32_t)(w->tail - w->head)};
    for (uint32_t i = 0; i < w->connections; i++) {
        const connection *c = &w->connection[i];
        if (number != GW_ALL_CONNECTIONS && (int)i != number)
            continue;
        view.in_flight += c->in_flight;
        view.refused += c->refused;
        view.acks += c->acks;
        if (number != GW_ALL_CONNECTIONS)
            view.read_lsn = c->sent_end;
        for (uint64_t n = c->head; c->in_flight && n != c->tail; n++) {
            const message *m = message_at(w, c, n);
            if (m->state != FLYING)
                continue;
            if (!view.oldest_sent_ns || m->sent_ns < view.oldest_sent_ns) {
                view.oldest_sent_ns = m->sent_ns;
                view.oldest_lsn = w->record[m->records.first].lsn;
                view.oldest_events = m->records.count;
            }
            break;
        }
    }
    return view;
}

bool gw_window_is_held(const gw_window *w, int number)
{
    return w->corrupt_lsn || (number == GW_ALL_CONNECTIONS ? w->refused : w->connection[number].refused);
}

uint64_t gw_window_lsn(const gw_window *w)
{
    return w->cursor.lsn;
}
