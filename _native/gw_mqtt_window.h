/* gw_mqtt_window.h - what the parts of the window share: gw_mqtt.c (the cursor, messages, connections), gw_mqtt_fill.c
 * (from the log into messages), gw_mqtt_packs.c (open packs), gw_mqtt_publish.c (PUBLISH out), gw_mqtt_feed.c (bytes
 * in). See gw_mqtt.h for the contract.
 *
 * A record's way; each connection has its own chain, packs and messages:
 *
 *   (log) --read--> WAITING: in the chain of its connection, in the log's order
 *           |         | take
 *           |         +--(packed)--> an open pack of its topic --full, or lingered--> ready
 *           |         v                                                                | send
 *           |       SENT <-------------------------------------------------------------'
 *           |         | '--PUBACK ok--> ACKED --settle--> gone, the cursor above it
 *           |         '--PUBACK >= 0x80, or cannot be sent--> REFUSED --dead_letter--> DEAD --settle--> gone
 *           '--marked as dead in the log (also when it is taken, and when it is sent)-----'
 *
 *   start over, session not resumed: SENT and REFUSED, and ACKED ones behind the first of these, are WAITING again
 *
 * A message's way: FLYING, on a resumed session OWED and FLYING again, REFUSED, OVER. */
#ifndef GW_MQTT_WINDOW_H
#define GW_MQTT_WINDOW_H

#include "gw_mqtt.h"

enum { PUBACK = 4, PUBLISH_QOS1 = 0x32, DUP = 0x08 };
enum { TS_BYTES = 24, PROPERTIES_BYTES_MAX = 40, ASIDE_MAX = 64 };
enum { RECORD_INDEX_BITS = 20, PACKS_MAX = 4096, PACKS_SPARE = 4, BUCKETS = 2 * PACKS_MAX };

enum record_state { WAITING = 0, SENT, ACKED, REFUSED, DEAD };
enum message_state { OVER = 0, FLYING, OWED, HELD };

/* An open record, 16 bytes, since there may be a million. `next`: index of the next one of the chain, pack or message
 * that it is in; of a record that is refused alone, its message's slot. */
typedef struct record {
    uint64_t lsn;
    uint64_t next : RECORD_INDEX_BITS;
    uint64_t words : 32; /* its size in the log, in words of 8 bytes */
    uint64_t state : 3;
    uint64_t alone : 1;    /* no other one may be in its message */
    uint64_t was_sent : 1; /* by this process */
    uint64_t names_device : 1;
    uint64_t connection : 6;
} record;
_Static_assert(sizeof(record) == 16, "16 MiB for a million open records");
_Static_assert(GW_MQTT_CONNECTIONS_MAX <= 1 << 6, "connection has 6 bits");

typedef struct chain {
    uint32_t first, last, count; /* indices of records */
} chain;

typedef struct message {
    chain records;
    uint32_t packet_bytes;
    uint64_t received_at_ns, sent_ns;
    uint64_t payload_bytes; /* of a pack, uncompressed */
    uint8_t state, reason;
    bool by_broker;
} message;

/* A pack before it is sent: open (in a bucket and in the list by age), ready (in the list of those), or free. */
typedef struct pack {
    chain records;
    uint32_t bytes;
    uint64_t hash, opened_ns;
    const uint8_t *device_id; /* in the log: its first record is open, so it stays */
    uint8_t device_id_bytes;
    uint16_t below;        /* in its bucket */
    uint16_t older, newer; /* in the list it is in; NONE: end */
} pack;

enum { NONE = UINT16_MAX };

typedef struct pack_list {
    uint16_t oldest, newest;
} pack_list;

typedef struct connection {
    unsigned number;
    bool open;
    uint32_t limit, packet_bytes_max;
    const char *error;

    chain waiting;
    uint64_t floor;     /* this connection's records below this number are done */
    uint64_t probe_lsn; /* one packet at a time while its first open record is at or below it; 0: no */
    uint64_t sent_end;  /* end of the last record, by position, that it has sent */
    uint64_t acks;

    uint64_t head, tail, resend; /* message numbers; [resend, tail) may hold OWED ones */
    message *ring;
    uint32_t in_flight, refused;

    pack *packs; /* NULL: one message a record */
    uint16_t *bucket;
    pack_list free, aging, ready;
    uint32_t open_packs; /* in `aging` */

    uint32_t in_bytes; /* of the packet that is not whole yet */
    uint8_t in[5 + GW_MQTT_PACKET_IN_BYTES_MAX];
} connection;

struct gw_window {
    gw_log *log;
    gw_counter_block *counters;
    unsigned sink;
    uint8_t *prefix, *suffix;
    uint32_t prefix_bytes, suffix_bytes;
    bool topic_is_fixed, packed, no_linger;
    bool is_optional; /* the log may go on without this sink: what is read may be written over meanwhile */
    uint32_t asides;
    uint64_t aside[ASIDE_MAX]; /* have a dead letter, and a place that cannot be marked any more */
    gw_pack_options pack;
    uint32_t inflight_max, span_max; /* configured; records that may be open */
    uint32_t packs;                  /* a connection */
    uint64_t device_key[2], bucket_key[2];

    gw_cursor cursor; /* as stored */
    uint64_t read_lsn, read_ordinal;
    uint64_t head, tail; /* numbers of open records */
    uint32_t mask, message_mask, messages_max;
    record *record;
    gw_record fresh; /* the last one that was read, so that its CRC is checked once */
    uint64_t corrupt_lsn;
    uint32_t in_flight, refused, filled;
    uint32_t connections;
    connection *connection;

    uint8_t properties[2][PROPERTIES_BYTES_MAX]; /* of a PUBLISH with their length: as it is, compressed */
    uint32_t properties_bytes[2];
    uint64_t ts_second; /* the second that `ts` shows */
    char ts[TS_BYTES];
    uint32_t batch_bytes;
    uint8_t *out, *compressed;
};

static inline message *message_at(const gw_window *w, const connection *c, uint64_t n)
{
    return &c->ring[n & w->message_mask];
}

static inline record *record_at(const gw_window *w, uint64_t number)
{
    return &w->record[number & w->mask];
}

static inline void chain_add(gw_window *w, chain *list, uint32_t index)
{
    if (list->count++)
        w->record[list->last].next = index;
    else
        list->first = index;
    list->last = index;
}

/* ---- gw_mqtt.c ----------------------------------------------------------------------------------------------- */

/* The number of an open record, of which a chain holds the index. */
static inline uint64_t number_of(const gw_window *w, uint32_t index)
{
    return w->head + ((index - (uint32_t)w->head) & w->mask);
}

/* Move the cursor over the settled prefix, and c's probe to its end. */
void gw_mqtt_settle(gw_window *w, connection *c);
/* The broker answered m, which is in flight or owed. */
void gw_mqtt_answered(gw_window *w, connection *c, message *m, uint8_t reason, uint64_t now_realtime_ns);
void gw_mqtt_show_in_flight(gw_window *w);
/* m cannot be sent, or was refused: its connection holds. */
void gw_mqtt_hold(gw_window *w, connection *c, message *m, bool by_broker);
void gw_mqtt_set_in_flight(gw_window *w, connection *c, uint32_t in_flight);
/* The head of c's messages moves over those that are over. */
void gw_mqtt_drop_over(gw_window *w, connection *c);

/* ---- gw_mqtt_fill.c ------------------------------------------------------------------------------------------ */

/* Reads the open record. false: the log is corrupt there. */
bool gw_mqtt_reread(gw_window *w, uint32_t index, gw_record *r);
/* A dead letter of this sink is on file: what is left is to pass it. */
bool gw_mqtt_is_dead(const gw_window *w, const gw_record *r);

/* ---- gw_mqtt_packs.c ----------------------------------------------------------------------------------------- */

bool gw_mqtt_packs_new(gw_window *w, connection *c);
void gw_mqtt_packs_clear(gw_window *w, connection *c);
/* The record goes into the open pack of its topic, which may close that one and others. */
void gw_mqtt_packs_add(gw_window *w, connection *c, uint32_t index, const gw_record *r, uint64_t now_ns);
void gw_mqtt_packs_close_oldest(connection *c);
static inline pack *oldest_of(const connection *c, const pack_list *list)
{
    return c->packs && list->oldest != NONE ? &c->packs[list->oldest] : NULL;
}
/* The oldest ready one is free again. */
void gw_mqtt_packs_pop(connection *c);

/* ---- gw_mqtt_publish.c --------------------------------------------------------------------------------------- */

enum encoded { ENCODED, IMPOSSIBLE, ALL_DEAD, CORRUPT };

/* The largest packet that a record of this log, or a pack, can become. */
size_t gw_mqtt_packet_bound(const gw_window *w);
/* What a packet has around its payload, at most. */
uint32_t gw_mqtt_around(const gw_window *w, const gw_record *r);
void gw_mqtt_set_properties(gw_window *w);
/* Bytes of a record in a pack, with what separates it from the next; 0: it can be in none. Sets names_device. */
uint32_t gw_mqtt_event_bytes(record *slot, const gw_record *r);
/* Writes the packet with m's records at *to and moves *to to its end; m->packet_bytes is set in any case. IMPOSSIBLE:
 * m->reason says why it cannot be published. A pack loses its records that are marked as dead (they are passed),
 * unless `repeat`. `fresh`: m's record, if it was just read and this is no pack; or NULL. */
enum encoded gw_mqtt_encode(gw_window *w, connection *c, message *m, uint16_t id, bool repeat, const gw_record *fresh,
                            uint8_t **to);

#endif
