/* gw_mqtt.h - the MQTT window: QoS 1 PUBLISH packets straight from log records, PUBACKs parsed in bulk.
 *
 * The log is the outbox. A window lies over it for one sink; it holds no payload, only what became of each record:
 *
 *        cursor                                              read
 *          v                                                  v
 *   log  --+--A--+--s--+--A--+-PAD-+--s--+--w--+--s--+--w--+--+--(committed, not read yet)--...
 *   done   |  records head .. tail-1: acked, sent, waiting    |   next records
 *          '-- moves over the acked prefix only
 *
 *   read --hash of the device--> connection: waits --> message n: one record, or a pack of one topic --> PUBLISH
 *
 *   Each connection numbers its messages by itself (n runs free): packet id = 1 + n mod 65535, never 0, and unique
 *   while at most 65535 are open, so PUBACK -> message is arithmetic, not a table. An identifier belongs to a session
 *   (MQTT 5 section 2.2.1); with one numbering for all, a connection that is away would use up the ids of the others.
 *   At most `inflight_max` messages a connection are sent and not acked. The span of open records is bounded too (done
 *   ones behind a hole included), so that neither a lost PUBACK nor a connection that is away can grow memory.
 *
 * What it promises
 *   M1  The cursor moves over the contiguous prefix of records, over all connections, whose message the broker
 *       acknowledged with success (0x00, 0x10) on the connection that sent it, or that the caller dead-lettered; PAD
 *       and VOID records move it and count nowhere. One gw_cursor_store a batch.
 *   M2  cursor.ordinal counts every DATA record below the cursor, as read from the log, not as published.
 *   M3  In flight <= min(configured, Receive Maximum), packets <= Maximum Packet Size. What would exceed it, or what
 *       the broker refuses (PUBACK >= 0x80), is never passed by itself: its connection holds (sends nothing new) until
 *       the caller starts over or dead-letters it. Of a refused pack nobody knows the guilty one: it cannot be
 *       dead-lettered, and after a start over its records go one a message. A record that the log has marked as dead
 *       for this sink is passed without being sent, and counted as dead-lettered: a dead letter on file is never
 *       written twice. (A pack that a resumed session wants again is sent whole, see M4.)
 *   M4  DUP is set only when a session was resumed, with the same packet id and the same message, oldest first
 *       [MQTT-4.4.0-1, 4.6.0-1]: a pack holds the same records, and is encoded (and compressed) from the log again.
 *   M5  Any bytes from a broker end in acks, packets for the caller, or GW_MQTT_PROTOCOL; never in undefined
 *       behaviour. The verdicts do not depend on how the stream is cut into segments.
 *   M6  A device has one connection, and there its records are sent in the log's order, across messages too; from a
 *       start over, or a session that is not resumed, again in order from the connection's first unacked record on.
 *   M7  A connection that is away or held keeps others from nothing until the span is full.
 *   M8  A pack lingers at most linger_ns behind its first record, if it may be sent then. It is closed before that by a
 *       record that would make it too large, when the table of open packs is full, or when the span is.
 *
 * Crash story: nothing here is on disk. SIGKILL at any instruction leaves the cursor at or below the acked prefix;
 * the next process reads on from the cursor, and the broker sees at most a window of records again.
 *
 * All reads happen at or above the cursor, which holds these bytes in the log (gw_log.h, P5). One thread. */
#ifndef GW_MQTT_H
#define GW_MQTT_H

#include "gw_log.h"

enum {
    GW_MQTT_IDS = 65535,                 /* packet ids 1 .. 65535 */
    GW_MQTT_PACKET_IN_BYTES_MAX = 65536, /* largest packet taken from a broker; told to it in CONNECT */
    GW_MQTT_TOPIC_BYTES_MAX = 65535,
    GW_MQTT_BATCH_BYTES_MAX = 16 << 20,
    GW_MQTT_PACK_BYTES_MAX = 16 << 20,
    GW_MQTT_CONNECTIONS_MAX = 64,
    GW_MQTT_RECORDS_MAX = 1 << 20
};

/* Reasons that the window gives itself, with the numbers of MQTT 5 section 2.4. */
enum { GW_REASON_TOPIC_INVALID = 0x90, GW_REASON_PACKET_TOO_LARGE = 0x95, GW_REASON_PAYLOAD_INVALID = 0x99 };

typedef struct gw_window gw_window;

typedef enum gw_mqtt_status {
    GW_MQTT_OK = 0,  /* every byte is used */
    GW_MQTT_PACKET,  /* *packet is one that the caller answers; call again with the rest */
    GW_MQTT_REFUSED, /* *packet is a PUBACK with reason 0x80 or more, its message holds now; call again with the rest */
    GW_MQTT_PROTOCOL /* malformed or against the protocol: gw_window_error(); drop the connection */
} gw_mqtt_status;

/* A packet from the broker. `body` is what follows the fixed header, valid until the next call. */
typedef struct gw_packet {
    const uint8_t *body;
    uint32_t body_bytes;
    uint8_t type, flags; /* the two halves of the first byte */
    uint8_t reason;      /* of a PUBACK */
    uint64_t lsn;        /* of the first record of a PUBACK's message */
} gw_packet;

/* Packs of many events. Each event is the stored body with "device_id" (unless it has that member), "lsn", and "ts"
 * where it has none, behind its opening brace; NDJSON, each line with its end, or a JSON array. */
typedef struct gw_pack_options {
    uint32_t
        bytes_max; /* 1 .. GW_MQTT_PACK_BYTES_MAX, of the payload, uncompressed; a record that is larger goes alone */
    uint64_t linger_ns;
    bool array;
    /* NULL, or: compress `in` to at most `room` bytes at `out`, and return how many; 0: it does not fit, or does not
     * work, and the payload is sent as it is. The same bytes must give the same result (M4). */
    size_t (*compress)(void *context, const uint8_t *in, size_t bytes, uint8_t *out, size_t room);
    void *context;
} gw_pack_options;

/* topic = prefix, then the device id (unless topic_is_fixed), then suffix; UTF-8, checked by the caller's template
 * rules, and here for length, '+', '#' and NUL. */
typedef struct gw_window_options {
    const uint8_t *topic_prefix, *topic_suffix;
    uint32_t topic_prefix_bytes, topic_suffix_bytes;
    bool topic_is_fixed;
    uint32_t inflight_max;       /* 1 .. 65535, a connection */
    uint32_t batch_bytes;        /* a fill stops at the first packet that reaches this */
    uint32_t connections;        /* 1 .. GW_MQTT_CONNECTIONS_MAX; 0: 1 */
    const gw_pack_options *pack; /* NULL: one message a record */
    uint32_t records_max;        /* open at most, with packs or several connections; 0: GW_MQTT_RECORDS_MAX */
} gw_window_options;

/* A message that holds its connection. */
typedef struct gw_refusal {
    uint64_t lsn;   /* of its first record */
    uint8_t reason; /* of the PUBACK, or a GW_REASON_* of our own */
    bool by_broker; /* else it was never sent */
    uint32_t bytes; /* of its PUBLISH packet */
    uint32_t connection, events;
} gw_refusal;

typedef struct gw_window_view {
    gw_cursor cursor;
    uint64_t read_lsn;       /* all that was read, or that the connection has ever sent, lies below */
    uint64_t oldest_sent_ns; /* when the oldest unacked packet was handed out; 0: none in flight */
    uint64_t oldest_lsn;     /* its first record; 0: none in flight */
    uint64_t acks;           /* PUBACKs with success, since the window was made */
    uint64_t corrupt_lsn;    /* the log gave GW_CORRUPT here: nothing is read on; 0: no */
    uint32_t in_flight, span, refused;
    uint32_t oldest_events; /* of the oldest unacked packet */
} gw_window_view;

/* What a fill may send: packets, and it stops at the first one that reaches `bytes`. */
typedef struct gw_fill_limits {
    uint32_t packets, bytes;
} gw_fill_limits;

#define GW_FILL_ALL ((gw_fill_limits){UINT32_MAX, UINT32_MAX})

enum { GW_ALL_CONNECTIONS = -1 };

/* NULL: no memory, or an option out of its range. Reads the sink's cursor. */
gw_window *gw_window_new(gw_log *log, unsigned sink, const gw_window_options *options);
void gw_window_free(gw_window *window);

/* `connection` is below `connections` everywhere. */

/* A connection begins, or is gone: the parser is empty, a PUBACK is a protocol error, nothing is sent until
 * gw_window_open. What was in flight can be looked at still. */
void gw_window_connect(gw_window *window, unsigned connection);

/* CONNACK success. `resumed` (session present): what is unacked is sent again first, same ids, DUP; else everything
 * from this connection's first unacked record on is published anew. `receive_max` 1 .. 65535; `packet_bytes_max` 0: no
 * limit. */
void gw_window_open(gw_window *window, unsigned connection, bool resumed, uint32_t receive_max,
                    uint32_t packet_bytes_max);

/* Forget the open messages and publish again from this connection's first unacked record: after a refusal. Only with
 * nothing in flight (else false, and nothing changed): a late PUBACK must not meet a new message. Behind a refused
 * record: one packet at a time until the connection is above it, so that a record refused for ever does not repeat a
 * whole window each time. Of a refused pack: its records go one a message. */
bool gw_window_start_over(gw_window *window, unsigned connection);

/* One packet at a time until the connection has passed `until_lsn`. If one pack alone is in flight, its records go one
 * a message from the next start over, or session that is not resumed, on. */
void gw_window_probe(gw_window *window, unsigned connection, uint64_t until_lsn);

/* Encode what may be sent now. Returns the bytes at *bytes (0: nothing), valid until the next call; the caller sends
 * them all, or gives the connection up. `now_ns`: CLOCK_MONOTONIC. */
size_t gw_window_fill(gw_window *window, unsigned connection, uint64_t now_ns, gw_fill_limits limits,
                      const uint8_t **bytes);
/* Packets in the last fill. */
uint32_t gw_window_filled(const gw_window *window);

/* When a fill has something to do: 1: now; a time: a pack has lingered then; 0: not before something changes. */
uint64_t gw_window_due_ns(const gw_window *window, unsigned connection);
/* Packs linger (true), or are closed when nothing more is committed. */
void gw_window_set_linger(gw_window *window, bool linger);

/* Take bytes from the broker. *used says how many were taken. `now_realtime_ns` is for the histogram, which a message
 * enters with its first record. */
gw_mqtt_status gw_window_feed(gw_window *window, unsigned connection, const uint8_t *data, size_t bytes,
                              uint64_t now_realtime_ns, size_t *used, gw_packet *packet);
const char *gw_window_error(const gw_window *window, unsigned connection);

/* The first `most` messages that hold a connection, in the log's order. Returns how many. */
uint32_t gw_window_refusals(const gw_window *window, gw_refusal *refusals, uint32_t most);

/* The refused record at `lsn` has a durable dead letter and is marked in the log: the cursor may pass it, counted as
 * dead-lettered. The connection is as wide as before once no refusal is left. false: no such refused record, or it is
 * one of a pack. */
bool gw_window_dead_letter(gw_window *window, uint64_t lsn);
/* The record at `lsn` has a durable dead letter, but the log cannot mark it: this sink is not required, and the others
 * have passed it. It is taken as marked until the window ends. false: there are too many such. */
bool gw_window_set_aside(gw_window *window, uint64_t lsn);

/* `connection`: one, or GW_ALL_CONNECTIONS. */
gw_window_view gw_window_look(const gw_window *window, int connection);
bool gw_window_is_held(const gw_window *window, int connection);
uint64_t gw_window_lsn(const gw_window *window);

/* Which connection publishes this device's events. */
unsigned gw_window_connection_of(const gw_window *window, const uint8_t *device_id, size_t bytes);

/* RFC 3339, UTC, milliseconds: "2025-09-23T11:18:41.123Z"; `out` has room for 24 bytes. Years 1970 .. 9999. */
void gw_rfc3339_ms(uint64_t unix_ns, char *out);

#endif
