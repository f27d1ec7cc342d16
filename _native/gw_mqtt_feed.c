/* gw_mqtt_feed.c - what the brokers say: bytes become PUBACKs, which are taken here, and packets for the caller. */
#include <string.h>

#include "gw_mqtt_window.h"

static gw_mqtt_status broken(connection *c, const char *why)
{
    c->error = why;
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

static gw_mqtt_status puback(gw_window *w, connection *c, gw_packet *packet, uint64_t now_realtime_ns)
{
    const uint8_t *p = packet->body;
    uint32_t n = packet->body_bytes;
    if (packet->flags)
        return broken(c, "PUBACK with reserved flags set (MQTT 5 section 2.1.3)");
    if (n < 2)
        return broken(c, "PUBACK without a packet identifier (MQTT 5 section 3.4.2)");
    uint16_t id = (uint16_t)(p[0] << 8 | p[1]);
    uint8_t reason = n > 2 ? p[2] : 0;
    if (n > 3) {
        uint32_t property_bytes;
        int taken = varint(p + 3, n - 3, &property_bytes);
        if (taken <= 0 || property_bytes != n - 3 - (uint32_t)taken ||
            !puback_properties_ok(p + 3 + taken, property_bytes))
            return broken(c, "PUBACK with malformed properties (MQTT 5 section 3.4.2.2)");
    }
    if (!c->open)
        return broken(c, "PUBACK before CONNACK (MQTT 5 section 3.2)");
    if (!id)
        return broken(c, "PUBACK with packet identifier 0 (MQTT 5 section 2.2.1)");
    uint64_t n_message = c->head + (id - 1u + GW_MQTT_IDS - c->head % GW_MQTT_IDS) % GW_MQTT_IDS;
    message *m = message_at(w, c, n_message);
    if (n_message - c->head >= c->tail - c->head || (m->state != FLYING && m->state != OWED))
        return broken(c, "PUBACK for a packet identifier that is not in flight (MQTT 5 section 4.3.2)");
    if (reason != 0x00 && reason != 0x10 && reason < 0x80)
        return broken(c, "PUBACK with an unknown reason code (MQTT 5 section 3.4.2.1)");
    packet->reason = reason < 0x80 ? 0 : reason;
    packet->lsn = w->record[m->records.first].lsn;
    gw_mqtt_answered(w, c, m, reason, now_realtime_ns);
    return reason < 0x80 ? GW_MQTT_OK : GW_MQTT_REFUSED;
}

/* The fixed header at p (section 2.1): its bytes, 0: not whole yet, -1: c->error is set. */
static int fixed_header(connection *c, const uint8_t *p, size_t left, uint32_t *remaining)
{
    int taken = varint(p + 1, left - 1, remaining);
    if (p[0] >> 4 == 0)
        return broken(c, "packet type 0 (MQTT 5 section 2.1.2)"), -1;
    if (taken < 0)
        return broken(c, "malformed remaining length (MQTT 5 section 1.5.5)"), -1;
    if (taken && *remaining > GW_MQTT_PACKET_IN_BYTES_MAX - 5)
        return broken(c, "packet above our Maximum Packet Size (MQTT 5 section 3.1.2.11.4)"), -1;
    return taken ? 1 + taken : 0;
}

/* The next whole packet of the stream: GW_MQTT_PACKET, GW_MQTT_OK (all used, none whole) or GW_MQTT_PROTOCOL. */
static gw_mqtt_status next_packet(connection *c, const uint8_t *data, size_t bytes, size_t *used, gw_packet *packet)
{
    uint32_t remaining = 0;
    const uint8_t *p = data + *used;
    size_t left = bytes - *used;
    int header = 0;
    if (!c->in_bytes) { /* the usual case: a packet that lies whole in the segment */
        header = left ? fixed_header(c, p, left, &remaining) : 0;
        if (header < 0)
            return GW_MQTT_PROTOCOL;
        if (header && left - (size_t)header >= remaining) {
            *packet = (gw_packet){.body = p + header, .body_bytes = remaining, .type = p[0] >> 4, .flags = p[0] & 15};
            *used += (size_t)header + remaining;
            return GW_MQTT_PACKET;
        }
    }
    for (;;) { /* collect: the header byte by byte, then the rest at once */
        if (c->in_bytes) {
            header = fixed_header(c, c->in, c->in_bytes, &remaining);
            if (header < 0)
                return GW_MQTT_PROTOCOL;
        }
        size_t need = header ? (size_t)header + remaining - c->in_bytes : 1;
        if (header && !need)
            break;
        if (need > bytes - *used)
            need = bytes - *used;
        if (!need)
            return GW_MQTT_OK;
        memcpy(c->in + c->in_bytes, data + *used, need);
        c->in_bytes += (uint32_t)need;
        *used += need;
    }
    c->in_bytes = 0;
    *packet =
        (gw_packet){.body = c->in + header, .body_bytes = remaining, .type = c->in[0] >> 4, .flags = c->in[0] & 15};
    return GW_MQTT_PACKET;
}

gw_mqtt_status gw_window_feed(gw_window *w, unsigned number, const uint8_t *data, size_t bytes,
                              uint64_t now_realtime_ns, size_t *used, gw_packet *packet)
{
    connection *c = &w->connection[number];
    gw_mqtt_status status = GW_MQTT_PROTOCOL;
    *used = 0;
    while (!c->error) {
        status = next_packet(c, data, bytes, used, packet);
        if (status != GW_MQTT_PACKET || packet->type != PUBACK)
            break;
        status = puback(w, c, packet, now_realtime_ns);
        if (status != GW_MQTT_OK)
            break;
    }
    gw_mqtt_settle(w, c);
    gw_mqtt_show_in_flight(w);
    return status;
}

const char *gw_window_error(const gw_window *w, unsigned number)
{
    const char *error = w->connection[number].error;
    return error ? error : "";
}
