/* gw_mqtt.h - the MQTT window: QoS 1 PUBLISH packets straight from log records, PUBACKs parsed in bulk.
 *
 * The log is the outbox. A window lies over it for one sink; it holds no payload, only which records are out:
 *
 *        cursor                                    read
 *          v                                        v
 *   log  --+--A--+--S--+--A--+-PAD-+--S--+--S--+----+--(committed, not read yet)--...
 *   done   |  acked, sent: entries head .. tail-1   |   next records to publish
 *          '-- moves over the acked prefix only
 *
 *   entry n (n runs free) has packet id 1 + n mod 65535: never 0, and unique while at most 65535 entries are open, so
 *   PUBACK -> entry is arithmetic, not a table. At most `inflight_max` entries are sent and not acked; the span of open
 *   entries (acked ones behind a hole included) is bounded too, so that one lost PUBACK cannot grow memory.
 *
 * What it promises
 *   M1  The cursor moves over the contiguous prefix of entries that the broker acknowledged with success (0x00, 0x10)
 *       or that the caller dead-lettered; PAD and VOID records move it and count nowhere. One gw_cursor_store a batch.
 *   M2  cursor.ordinal counts every DATA record below the cursor, as read from the log, not as published.
 *   M3  In flight <= min(configured, Receive Maximum), packets <= Maximum Packet Size. A record that would exceed it,
 *       or that the broker refuses (PUBACK >= 0x80), is never passed by itself: the window holds (sends nothing new)
 *       until the caller starts over or dead-letters it. One that the log has marked as dead for this sink is passed
 *       without being sent, and counted as dead-lettered: a dead letter on file is never written twice.
 *   M4  DUP is set only when a session was resumed, with the same packet id, oldest first [MQTT-4.4.0-1, 4.6.0-1].
 *   M5  Any bytes from the broker end in acks, packets for the caller, or GW_MQTT_PROTOCOL; never in undefined
 *       behaviour. The verdicts do not depend on how the stream is cut into segments.
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
    GW_MQTT_BATCH_BYTES_MAX = 16 << 20
};

/* Reasons that the window gives itself, with the numbers of MQTT 5 section 2.4. */
enum { GW_REASON_TOPIC_INVALID = 0x90, GW_REASON_PACKET_TOO_LARGE = 0x95, GW_REASON_PAYLOAD_INVALID = 0x99 };

typedef struct gw_window gw_window;

typedef enum gw_mqtt_status {
    GW_MQTT_OK = 0,  /* every byte is used */
    GW_MQTT_PACKET,  /* *packet is one that the caller answers; call again with the rest */
    GW_MQTT_REFUSED, /* *packet is a PUBACK with reason 0x80 or more, its entry holds now; call again with the rest */
    GW_MQTT_PROTOCOL /* malformed or against the protocol: gw_window_error(); drop the connection */
} gw_mqtt_status;

/* A packet from the broker. `body` is what follows the fixed header, valid until the next call. */
typedef struct gw_packet {
    const uint8_t *body;
    uint32_t body_bytes;
    uint8_t type, flags; /* the two halves of the first byte */
    uint8_t reason;      /* of a PUBACK */
    uint64_t lsn;        /* of a PUBACK's record */
} gw_packet;

/* topic = prefix, then the device id (unless topic_is_fixed), then suffix; UTF-8, checked by the caller's template
 * rules, and here for length, '+', '#' and NUL. */
typedef struct gw_window_options {
    const uint8_t *topic_prefix, *topic_suffix;
    uint32_t topic_prefix_bytes, topic_suffix_bytes;
    bool topic_is_fixed;
    uint32_t inflight_max; /* 1 .. 65535 */
    uint32_t batch_bytes;  /* a fill stops at the first packet that reaches this */
} gw_window_options;

/* A record that holds the window. */
typedef struct gw_refusal {
    uint64_t lsn;
    uint8_t reason; /* of the PUBACK, or a GW_REASON_* of our own */
    bool by_broker; /* else it was never sent */
    uint32_t bytes; /* of its PUBLISH packet */
} gw_refusal;

typedef struct gw_window_view {
    gw_cursor cursor;
    uint64_t read_lsn;
    uint64_t oldest_sent_ns; /* when the oldest unacked packet was handed out; 0: none in flight */
    uint64_t oldest_lsn;     /* its record; 0: none in flight */
    uint64_t acks;           /* PUBACKs with success, since the window was made */
    uint64_t corrupt_lsn;    /* the log gave GW_CORRUPT here: nothing is read on; 0: no */
    uint32_t in_flight, span, refused;
} gw_window_view;

/* NULL: no memory, or an option out of its range. Reads the sink's cursor. */
gw_window *gw_window_new(gw_log *log, unsigned sink, const gw_window_options *options);
void gw_window_free(gw_window *window);

/* A connection begins: the parser is empty, a PUBACK is a protocol error, nothing is sent until gw_window_open. */
void gw_window_connect(gw_window *window);

/* CONNACK success. `resumed` (session present): what is unacked is sent again first, same ids, DUP; else everything
 * above the cursor is published anew. `receive_max` 1 .. 65535; `packet_bytes_max` 0: no limit. */
void gw_window_open(gw_window *window, bool resumed, uint32_t receive_max, uint32_t packet_bytes_max);

/* Forget the open entries and read again from the cursor: after a refusal. Only with nothing in flight (else false,
 * and nothing changed): a late PUBACK must not meet a new entry. One packet at a time until the cursor lies above
 * the record that held the window, so that a record refused for ever does not repeat a whole window each time. */
bool gw_window_start_over(gw_window *window);

/* One packet at a time until the cursor has passed `until_lsn`. */
void gw_window_probe(gw_window *window, uint64_t until_lsn);

/* Encode what may be sent now. Returns the bytes at *bytes (0: nothing), valid until the next call; the caller sends
 * them all, or gives the connection up. `now_ns`: CLOCK_MONOTONIC. */
size_t gw_window_fill(gw_window *window, uint64_t now_ns, const uint8_t **bytes);

/* Take bytes from the broker. *used says how many were taken. `now_realtime_ns` is for the histogram. */
gw_mqtt_status gw_window_feed(gw_window *window, const uint8_t *data, size_t bytes, uint64_t now_realtime_ns,
                              size_t *used, gw_packet *packet);
const char *gw_window_error(const gw_window *window);

/* The first `most` records that hold the window, in the log's order. Returns how many. */
uint32_t gw_window_refusals(const gw_window *window, gw_refusal *refusals, uint32_t most);

/* The refused record at `lsn` has a durable dead letter and is marked in the log: the cursor may pass it, counted as
 * dead-lettered. The window is as wide as before once no refusal is left. false: no such refused record. */
bool gw_window_dead_letter(gw_window *window, uint64_t lsn);

gw_window_view gw_window_look(const gw_window *window);

/* RFC 3339, UTC, milliseconds: "2025-09-23T11:18:41.123Z"; `out` has room for 24 bytes. Years 1970 .. 9999. */
void gw_rfc3339_ms(uint64_t unix_ns, char *out);

#endif
