/* window_fixture.h - what the tests of the MQTT window share: a check, and a reader of PUBLISH packets. */
#ifndef WINDOW_FIXTURE_H
#define WINDOW_FIXTURE_H

#include "fake_log.h"
#include "gw_mqtt.h"

static unsigned check_seed; /* of what is drawn at random; 0: nothing is */

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, __func__, #condition); \
            if (check_seed)                                                               \
                fprintf(stderr, "seed %u\n", check_seed);                                 \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

static void done(gw_window *w, gw_log *log)
{
    gw_window_free(w);
    free(log);
}

typedef struct seen {
    uint16_t id;
    uint8_t first;
    char topic[128], type[64]; /* content type, "" if there is none */
    const uint8_t *payload;
    uint32_t payload_bytes;
} seen;

/* A plain PUBLISH reader, written from section 3.3. */
static unsigned publishes(const uint8_t *p, size_t n, seen *out, unsigned most)
{
    unsigned count = 0;
    const uint8_t *end = p + n;
    while (p < end && count < most) {
        seen *s = &out[count++];
        s->first = *p++;
        uint32_t remaining = 0;
        for (int shift = 0;; shift += 7) {
            remaining |= (uint32_t)(*p & 0x7f) << shift;
            if (!(*p++ & 0x80))
                break;
        }
        const uint8_t *next = p + remaining;
        unsigned topic = (unsigned)p[0] << 8 | p[1];
        CHECK(topic < sizeof s->topic && next <= end);
        memcpy(s->topic, p + 2, topic);
        s->topic[topic] = 0;
        p += 2 + topic;
        s->id = (uint16_t)(p[0] << 8 | p[1]);
        unsigned properties = p[2];
        CHECK(properties < 128 && (!properties || (p[3] == 0x03 && p[4] == 0 && p[5] == properties - 3)));
        memcpy(s->type, p + 6, properties ? p[5] : 0);
        s->type[properties ? p[5] : 0] = 0;
        s->payload = p + 3 + properties;
        s->payload_bytes = (uint32_t)(next - s->payload);
        p = next;
    }
    CHECK(p == end);
    return count;
}

#endif
