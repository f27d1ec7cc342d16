/* fuzz_puback.c - any bytes from a broker end in a verdict, and the verdict does not depend on the segments.
 *
 *   clang -g -fsanitize=fuzzer,address,undefined -I_native -Itests/native tests/fuzz/fuzz_puback.c _native/gw_mqtt.c
 *   gcc -g -DGW_FUZZ_MAIN -fsanitize=address,undefined ... && ./a.out SEED RUNS     (no libFuzzer: random streams)
 *
 * The first byte of an input says how many records are in flight (0: no CONNACK yet), the second how the rest is
 * cut; the rest is what the broker sends. */
#include "gw_mqtt.h"

#include "fake_log.h"

static gw_log *fuzz_log(void)
{
    static gw_log *log;
    if (!log) {
        log = fake_new();
        for (int i = 0; i < 300; i++)
            fake_add(log, i % 7 == 3 ? GW_PAD : GW_DATA, "dev", "{\"metrics\":{}}", i & 1);
    }
    log->cursor = (gw_cursor){.lsn = FAKE_FIRST_LSN};
    return log;
}

typedef struct result {
    gw_cursor cursor;
    unsigned packets, refused;
    gw_mqtt_status last;
    uint64_t digest;
} result;

static result run(const uint8_t *data, size_t n, uint8_t in_flight, size_t segment)
{
    static const uint8_t prefix[] = "t/";
    gw_log *log = fuzz_log();
    gw_window_options o = {.topic_prefix = prefix,
                           .topic_prefix_bytes = 2,
                           .inflight_max = in_flight ? in_flight : 1,
                           .batch_bytes = 4096};
    gw_window *w = gw_window_new(log, 0, &o);
    result r = {.last = GW_MQTT_OK};
    const uint8_t *out;
    if (in_flight) {
        gw_window_open(w, false, 65535, 0);
        while (gw_window_fill(w, 1, &out))
            ;
    }
    for (size_t at = 0; at < n && r.last != GW_MQTT_PROTOCOL;) {
        size_t left = n - at < segment ? n - at : segment, used;
        uint8_t *copy = malloc(left); /* the sanitizer sees one byte too many */
        memcpy(copy, data + at, left);
        for (size_t done = 0;;) {
            gw_packet p;
            r.last = gw_window_feed(w, copy + done, left - done, 0, &used, &p);
            done += used;
            if (done > left)
                abort();
            if (r.last == GW_MQTT_OK || r.last == GW_MQTT_PROTOCOL) {
                if (r.last == GW_MQTT_OK && done != left)
                    abort();
                break;
            }
            r.packets += r.last == GW_MQTT_PACKET;
            r.refused += r.last == GW_MQTT_REFUSED;
            r.digest = r.digest * 31 + p.type;
            for (uint32_t i = 0; i < p.body_bytes; i++)
                r.digest = r.digest * 31 + p.body[i];
        }
        free(copy);
        at += left;
    }
    gw_window_view v = gw_window_look(w);
    if (v.cursor.published > v.cursor.ordinal || v.in_flight > v.span || v.cursor.lsn > v.read_lsn)
        abort();
    r.cursor = log->cursor;
    gw_window_free(w);
    return r;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n < 2)
        return 0;
    result whole = run(data + 2, n - 2, data[0], n), cut = run(data + 2, n - 2, data[0], 1 + data[1] % 9);
    if (whole.last != cut.last || whole.packets != cut.packets || whole.refused != cut.refused ||
        whole.digest != cut.digest || whole.cursor.lsn != cut.cursor.lsn ||
        whole.cursor.published != cut.cursor.published)
        abort();
    return 0;
}

#ifdef GW_FUZZ_MAIN
int main(int argc, char **argv)
{
    unsigned seed = argc > 1 ? (unsigned)atoi(argv[1]) : 1, runs = argc > 2 ? (unsigned)atoi(argv[2]) : 20000;
    unsigned long protocol = 0;
    srand(seed);
    for (unsigned i = 0; i < runs; i++) {
        uint8_t in[512];
        size_t n = 0;
        in[n++] = (uint8_t)rand();
        in[n++] = (uint8_t)rand();
        while (n < 480 && rand() % 40) { /* mostly PUBACKs, some of them wrong */
            unsigned id = 1 + (unsigned)(n / 4) + (rand() % 16 ? 0 : (unsigned)rand() % 3);
            int shape = rand() % 24;
            in[n++] = shape == 0 ? (uint8_t)rand() : shape == 1 ? 0xd0 : 0x40;
            in[n++] = shape == 1 ? 0 : shape == 2 ? (uint8_t)(rand() % 20) : shape < 6 ? 4 : 2;
            if (shape == 1)
                continue;
            in[n++] = (uint8_t)(id >> 8);
            in[n++] = (uint8_t)id;
            if (shape < 6)
                in[n++] = rand() % 2 ? 0x10 : 0x97, in[n++] = (uint8_t)(rand() % 3 / 2);
        }
        LLVMFuzzerTestOneInput(in, n);
        protocol += run(in + 2, n - 2, in[0], n).last == GW_MQTT_PROTOCOL;
    }
    printf("ok: seed %u, %u streams, %lu of them against the protocol\n", seed, runs, protocol);
    return 0;
}
#endif
