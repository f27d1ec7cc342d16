/* instructions.c - the work of the native core, to be counted under callgrind.
 *
 *     instructions DIRECTORY CASE COUNT
 *
 * CASE is validate, ingest, batch, window or packed, with COUNT events: only what happens inside work() is to be
 * counted, what prepares it stands outside. The events have the reference shape, 142 bytes and a new seq each. Prints
 * the scan path that the validator took; ends with 1 when the work was not done whole. */
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "gw_batch.h"
#include "gw_ingest.h"
#include "gw_mqtt.h"

#define DEVICE "dev-0001"
#define TOPIC "telemetry/"
enum {
    CAPACITY = 8 << 20,
    EVENT_BYTES = 142,
    LINE_BYTES = EVENT_BYTES + 1,
    FIRST_SEQ = 1000,
    EVENTS_MAX = 9000,
    BATCH = 1000
};

static unsigned count;
static uint8_t *lines; /* the events, a line end behind each */
static gw_ingest ingest;
static gw_window *window;

__attribute__((noreturn)) static void fail(const char *what)
{
    fprintf(stderr, "instructions: %s\n", what);
    exit(1);
}

static void make_lines(void)
{
    lines = malloc((size_t)count * LINE_BYTES + 1);
    if (lines == NULL)
        fail("no memory");
    for (unsigned i = 0; i < count; i++) {
        int n = snprintf((char *)lines + (size_t)i * LINE_BYTES, LINE_BYTES + 1,
                         "{\"ts\":\"2025-09-23T11:18:41Z\",\"seq\":%u,\"metrics\":{\"temp_c\":21.5,\"hum\":40.2,"
                         "\"rpm\":120},\"tags\":{\"site\":\"AAL\",\"line\":\"3\"},\"payload\":{\"raw\":\"o\"}}\n",
                         FIRST_SEQ + i);
        if (n != LINE_BYTES)
            fail("an event is not of 142 bytes");
    }
}

static void open_log(const char *directory)
{
    static const char *const sinks[] = {"mqtt", NULL};
    char path[4096];
    gw_log *log;
    gw_recovery report;
    gw_error error;
    snprintf(path, sizeof path, "%s/gateway.log", directory);
    unlink(path);
    if (gw_log_create(path, CAPACITY, NULL, NULL, &error) != GW_OK)
        fail("gw_log_create");
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || gw_log_open(path, fd, &(gw_sinks){.names = sinks}, false, &log, &report, &error) != GW_OK)
        fail("gw_log_open");
    ingest = (gw_ingest){.log = log, .counters = gw_log_counters(log, 0), .hash_key = {1, 2}};
    if (gw_producer_open(log, &ingest.producer) != GW_OK)
        fail("gw_producer_open");
}

static void open_window(const gw_pack_options *pack)
{
    gw_window_options options = {.topic_prefix = (const uint8_t *)TOPIC,
                                 .topic_prefix_bytes = sizeof TOPIC - 1,
                                 .inflight_max = 1000,
                                 .batch_bytes = 65536,
                                 .connections = 1,
                                 .pack = pack};
    while (gw_log_committed(ingest.log) < gw_log_tail(ingest.log))
        gw_log_follow(ingest.log, gw_log_committed(ingest.log), 0);
    window = gw_window_new(ingest.log, 0, &options);
    if (window == NULL)
        fail("gw_window_new");
    gw_window_connect(window, 0);
    gw_window_open(window, 0, false, 65535, 0);
}

/* ---- the work ------------------------------------------------------------------------------------------------- */

static void validate(void)
{
    gw_verdict verdict;
    for (unsigned i = 0; i < count; i++)
        if (gw_validate(lines + (size_t)i * LINE_BYTES, EVENT_BYTES, ingest.hash_key, &verdict))
            fail("an event is refused");
}

static void ingest_events(void)
{
    for (unsigned i = 0; i < count; i++)
        if (gw_ingest_event(&ingest, (const uint8_t *)DEVICE, sizeof DEVICE - 1, lines + (size_t)i * LINE_BYTES,
                            EVENT_BYTES, 0, false) ||
            ingest.duplicate)
            fail("an event is refused, or taken for a repeat");
}

static void ingest_batches(void)
{
    static gw_batch batch;
    gw_batch_limits limits = {.event_bytes_max = 65536, .events_max = 10000};
    for (unsigned i = 0; i < count; i += BATCH) {
        unsigned size = count - i < BATCH ? count - i : BATCH;
        if (gw_ingest_batch(&ingest, &batch, (const uint8_t *)DEVICE, sizeof DEVICE - 1, lines + (size_t)i * LINE_BYTES,
                            (size_t)size * LINE_BYTES, true, limits) ||
            batch.accepted != size)
            fail("a batch is not accepted whole");
        gw_batch_count(&ingest, &batch, 0);
    }
}

/* The window is filled and acknowledged until the cursor is at the end. */
static void publish(void)
{
    static uint8_t pubacks[4 * GW_MQTT_IDS];
    unsigned acked = 0;
    while (gw_window_lsn(window) < gw_log_committed(ingest.log)) {
        const uint8_t *bytes;
        while (gw_window_fill(window, 0, 1, GW_FILL_ALL, &bytes))
            ;
        unsigned n = gw_window_look(window, 0).in_flight;
        if (n == 0)
            fail("nothing is in flight");
        for (unsigned i = 0; i < n; i++) {
            unsigned id = 1 + (acked + i) % GW_MQTT_IDS;
            memcpy(pubacks + (size_t)4 * i, (uint8_t[]){0x40, 2, (uint8_t)(id >> 8), (uint8_t)id}, 4);
        }
        size_t used;
        gw_packet packet;
        if (gw_window_feed(window, 0, pubacks, (size_t)4 * n, 1, &used, &packet) != GW_MQTT_OK)
            fail("a PUBACK is refused");
        acked += n;
    }
}

static void fill_and_open_window(void)
{
    ingest_events();
    open_window(NULL);
}

static void fill_and_open_packed(void)
{
    static const gw_pack_options pack = {.bytes_max = 65536};
    ingest_events();
    open_window(&pack);
}

static void nothing(void)
{
}

static const struct {
    const char *name;
    void (*prepare)(void), (*work)(void);
} cases[] = {
    {"validate", nothing, validate},           {"ingest", nothing, ingest_events},
    {"batch", nothing, ingest_batches},        {"window", fill_and_open_window, publish},
    {"packed", fill_and_open_packed, publish},
};

/* What is counted: callgrind toggles on this name. */
__attribute__((noinline)) void work(void (*of_the_case)(void));
void work(void (*of_the_case)(void))
{
    of_the_case();
}

int main(int argc, char **argv)
{
    if (argc != 4)
        fail("usage: instructions DIRECTORY CASE COUNT");
    count = (unsigned)strtoul(argv[3], NULL, 10);
    if (count == 0 || count > EVENTS_MAX)
        fail("COUNT is out of its range");
    make_lines();
    open_log(argv[1]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (strcmp(argv[2], cases[i].name) == 0) {
            cases[i].prepare();
            work(cases[i].work);
            puts(gw_validator_selected());
            return 0;
        }
    fail("no such case");
}
