/* gw_mqtt_fill.c - from the log into messages: reading on, and what one fill sends. */
#include "gw_mqtt_window.h"

/* ---- reading ------------------------------------------------------------------------------------------------- */

static gw_status read_at(const gw_window *w, uint64_t lsn, gw_record *r)
{
    return w->is_optional ? gw_log_read_once(w->log, lsn, gw_log_committed(w->log), r) : gw_log_read(w->log, lsn, r);
}

bool gw_mqtt_reread(gw_window *w, uint32_t index, gw_record *r)
{
    if (read_at(w, w->record[index].lsn, r) == GW_OK)
        return true;
    w->corrupt_lsn = w->record[index].lsn;
    return false;
}

bool gw_mqtt_is_dead(const gw_window *w, const gw_record *r)
{
    for (uint32_t i = 0; i < w->asides; i++)
        if (w->aside[i] == r->lsn)
            return true;
    return r->dead >> w->sink & 1;
}

static void pass_dead(gw_window *w, connection *c, uint64_t number)
{
    record_at(w, number)->state = DEAD;
    if (number == w->head)
        gw_mqtt_settle(w, c); /* a long run of them must not fill the span: nobody's PUBACK would empty it */
}

static uint16_t id_of(uint64_t n)
{
    return (uint16_t)(1 + n % GW_MQTT_IDS);
}

static bool span_is_full(const gw_window *w)
{
    return w->tail - w->head >= w->span_max;
}

/* Read the log on until there is a record for c, which waits then; those of others wait as well. */
static bool read_on(gw_window *w, connection *c)
{
    while (!w->corrupt_lsn && !span_is_full(w)) {
        gw_record *r = &w->fresh;
        gw_status status = read_at(w, w->read_lsn, r);
        if (status != GW_OK) {
            if (status != GW_EMPTY)
                w->corrupt_lsn = w->read_lsn;
            return false;
        }
        w->read_lsn = r->lsn + r->size;
        if (r->kind != GW_DATA)
            continue;
        w->read_ordinal++;
#ifdef GW_MUTANT_SKIP /* a build that loses one record on purpose: the books must show it */
        if (w->read_ordinal == GW_MUTANT_SKIP)
            continue;
#endif
        const unsigned number = gw_window_connection_of(w, r->device_id, r->device_id_bytes);
        const uint64_t n = w->tail++;
        *record_at(w, n) = (record){.lsn = r->lsn, .words = (uint32_t)(r->size / 8), .connection = number & 63};
        if (gw_mqtt_is_dead(w, r)) {
            pass_dead(w, c, n);
            continue;
        }
        chain_add(w, &w->connection[number].waiting, (uint32_t)n & w->mask);
        if (number == c->number)
            return true;
    }
    return false;
}

/* The next record of c that waits in its chain or in the log, *r its content. false: none, or it is corrupt. */
static bool take(gw_window *w, connection *c, uint32_t *index, gw_record *r)
{
    for (;;) {
        const bool fresh = !c->waiting.count;
        if (fresh && !read_on(w, c))
            return false;
        *index = c->waiting.first;
        if (fresh)
            *r = w->fresh;
        else if (!gw_mqtt_reread(w, *index, r))
            return false;
        c->waiting.first = (uint32_t)w->record[*index].next;
        if (--c->waiting.count)
            gw_log_prefetch(w->log, w->record[c->waiting.first].lsn);
        if (!gw_mqtt_is_dead(w, r))
            return true;
        pass_dead(w, c, number_of(w, *index));
    }
}

/* ---- publishing ---------------------------------------------------------------------------------------------- */

typedef struct filling {
    uint64_t now_ns, sent, repeated;
    uint32_t limit, packets_max;
    uint8_t *to, *full;
} filling;

static bool has_room(const connection *c, const filling *f)
{
    return c->in_flight < f->limit && f->to < f->full && f->sent < f->packets_max;
}

/* What the resumed session is owed goes first, also while a refusal holds the rest. */
static void resend(gw_window *w, connection *c, filling *f)
{
    for (; c->resend != c->tail && has_room(c, f); c->resend++) {
        message *m = message_at(w, c, c->resend);
        if (m->state != OWED)
            continue;
        switch (gw_mqtt_encode(w, c, m, id_of(c->resend), true, NULL, &f->to)) {
        case CORRUPT:
            return;
        case ALL_DEAD:
            m->state = OVER;
            break;
        case IMPOSSIBLE: /* this connection's Maximum Packet Size is smaller */
            gw_mqtt_hold(w, c, m, false);
            break;
        case ENCODED:
            m->state = FLYING;
            m->sent_ns = f->now_ns;
            gw_mqtt_set_in_flight(w, c, c->in_flight + 1);
            f->sent++, f->repeated++;
        }
    }
    gw_mqtt_drop_over(w, c);
}

/* A new message of these records. false: the log is corrupt at one of them; *records is what is left of them. */
static bool publish(gw_window *w, connection *c, filling *f, chain *records, uint32_t payload_bytes,
                    const gw_record *fresh)
{
    message *m = message_at(w, c, c->tail);
    *m = (message){.records = *records, .payload_bytes = payload_bytes, .sent_ns = f->now_ns};
    const enum encoded encoded = gw_mqtt_encode(w, c, m, id_of(c->tail), false, fresh, &f->to);
    if (encoded == CORRUPT) {
        *records = m->records;
        return false;
    }
    if (encoded == ALL_DEAD) {
        gw_mqtt_settle(w, c);
        return true;
    }
    bool repeated = false;
    uint32_t index = m->records.first;
    for (uint32_t n = m->records.count; n; n--, index = w->record[index].next) {
        record *r = &w->record[index];
        r->state = SENT;
        if (encoded != ENCODED)
            continue;
        repeated |= r->was_sent;
        r->was_sent = true;
        if (r->lsn + (uint64_t)r->words * 8 > c->sent_end)
            c->sent_end = r->lsn + (uint64_t)r->words * 8;
    }
    c->resend = ++c->tail;
    if (encoded == IMPOSSIBLE) {
        gw_mqtt_hold(w, c, m, false);
        return true;
    }
    m->state = FLYING;
    gw_mqtt_set_in_flight(w, c, c->in_flight + 1);
    f->sent++;
    f->repeated += repeated;
    return true;
}

static bool send_next_record(gw_window *w, connection *c, filling *f)
{
    gw_record r;
    uint32_t index;
    return take(w, c, &index, &r) && publish(w, c, f, &(chain){index, index, 1}, 0, &r);
}

static bool has_lingered(const gw_window *w, const pack *p, uint64_t now_ns)
{
    return p && now_ns - p->opened_ns >= w->pack.linger_ns;
}

static bool send_next_pack(gw_window *w, connection *c, filling *f)
{
    pack *p;
    while (!(p = oldest_of(c, &c->ready))) {
        gw_record r;
        uint32_t index;
        const pack *oldest = oldest_of(c, &c->aging);
        if (oldest && oldest->opened_ns != f->now_ns && has_lingered(w, oldest, f->now_ns))
            gw_mqtt_packs_close_oldest(c);
        else if (take(w, c, &index, &r))
            gw_mqtt_packs_add(w, c, index, &r, f->now_ns);
        else if ((oldest = oldest_of(c, &c->aging)) &&
                 (w->no_linger || span_is_full(w) || has_lingered(w, oldest, f->now_ns)))
            gw_mqtt_packs_close_oldest(c);
        else
            return false;
    }
    if (!publish(w, c, f, &p->records, p->bytes, NULL))
        return false;
    gw_mqtt_packs_pop(c);
    return true;
}

size_t gw_window_fill(gw_window *w, unsigned number, uint64_t now_ns, gw_fill_limits limits, const uint8_t **bytes)
{
    connection *c = &w->connection[number];
    *bytes = w->out;
    w->filled = 0;
    if (!c->open || c->error || !limits.packets || !limits.bytes)
        return 0;
    filling f = {.now_ns = now_ns,
                 .limit = c->probe_lsn ? 1 : c->limit,
                 .packets_max = limits.packets,
                 .to = w->out,
                 .full = w->out + (limits.bytes < w->batch_bytes ? limits.bytes : w->batch_bytes)};
    resend(w, c, &f);
    /* Records that cannot be published at all do not end the round in which they are found: the caller sets them
     * aside together, with one fdatasync. */
    const bool hold_rest = c->refused;
    while (c->resend == c->tail && !hold_rest && has_room(c, &f) && c->tail - c->head < w->messages_max &&
           (w->packed ? send_next_pack : send_next_record)(w, c, &f))
        ;
    gw_mqtt_settle(w, c);
    if (w->is_optional && gw_log_lapped(w->log, w->cursor.lsn)) {
        w->corrupt_lsn = w->cursor.lsn; /* written over while it was encoded: what is in `out` may be torn */
        return 0;
    }
    w->filled = (uint32_t)f.sent;
    if (f.sent) {
        gw_counter_add(w->counters, GW_COUNTER_PUBLISH_SENT, f.sent);
        if (f.repeated)
            gw_counter_add(w->counters, GW_COUNTER_PUBLISH_REPEATED, f.repeated);
        gw_mqtt_show_in_flight(w);
    }
    return (size_t)(f.to - w->out);
}

uint32_t gw_window_filled(const gw_window *w)
{
    return w->filled;
}

void gw_window_set_linger(gw_window *w, bool linger)
{
    w->no_linger = !linger;
}

uint64_t gw_window_due_ns(const gw_window *w, unsigned number)
{
    const connection *c = &w->connection[number];
    if (!c->open || c->error || c->in_flight >= (c->probe_lsn ? 1 : c->limit))
        return 0;
    if (c->resend != c->tail)
        return w->corrupt_lsn ? 0 : 1;
    if (c->refused || c->tail - c->head >= w->messages_max)
        return 0;
    const pack *oldest = oldest_of(c, &c->aging);
    if (!w->corrupt_lsn && (c->waiting.count || oldest_of(c, &c->ready)))
        return 1;
    if (!w->corrupt_lsn && !span_is_full(w) && w->read_lsn < gw_log_committed(w->log))
        return 1;
    if (!oldest)
        return 0;
    return w->no_linger || span_is_full(w) ? 1 : oldest->opened_ns + w->pack.linger_ns;
}
