/* test_mqtt_packs.c - the MQTT window with packs and several connections, over a fake log. Build and run:
 *   gcc -std=gnu11 -g -fsanitize=address,undefined -I_native tests/native/test_mqtt_packs.c _native/gw_mqtt*.c -o t
 *   ./t [seed [rounds]]
 */
#include "gw_mqtt.h"
#include "gw_validator.h"
#include "window_fixture.h"

#define BODY "{\"metrics\":{\"t\":1}}"
#define MS 1000000ull

enum { TS = GW_EVENT_HAS_TS, MOST = 6000 };

static uint64_t clock_ns = 1000 * MS;
static seen s[MOST], t[MOST];

static gw_window *window_with(gw_log *log, const gw_pack_options *pack, uint32_t connections, uint32_t inflight_max)
{
    gw_window_options o = {.topic_prefix = (const uint8_t *)"t/",
                           .topic_prefix_bytes = 2,
                           .inflight_max = inflight_max,
                           .batch_bytes = 1 << 20,
                           .connections = connections,
                           .pack = pack};
    gw_window *w = gw_window_new(log, 0, &o);
    CHECK(w);
    return w;
}

static gw_window *packed(gw_log *log, uint32_t bytes_max, uint64_t linger_ms)
{
    gw_window *w = window_with(log, &(gw_pack_options){.bytes_max = bytes_max, .linger_ns = linger_ms * MS}, 1, 1000);
    gw_window_open(w, 0, false, 65535, 0);
    return w;
}

static void add(gw_log *log, const char *device_id, unsigned records)
{
    while (records--)
        fake_add(log, GW_DATA, device_id, BODY, TS);
}

static unsigned fill_of(gw_window *w, unsigned connection, seen *out)
{
    const uint8_t *bytes;
    size_t n = gw_window_fill(w, connection, clock_ns, GW_FILL_ALL, &bytes);
    unsigned found = publishes(bytes, n, out, MOST);
    CHECK(found == gw_window_filled(w));
    return found;
}

static unsigned fill(gw_window *w, seen *out)
{
    return fill_of(w, 0, out);
}

/* Records 0 .. of the log that a message holds, by their lsn. */
static unsigned records_of(const gw_log *log, const seen *message, unsigned *out, unsigned most)
{
    static const char key[] = "\"lsn\":";
    unsigned found = 0;
    const char *p = (const char *)message->payload, *const end = p + message->payload_bytes;
    for (; end - p > (long)sizeof key; p++)
        if (!memcmp(p, key, sizeof key - 1)) {
            gw_record r;
            CHECK(found < most && gw_log_read(log, strtoull(p + sizeof key - 1, NULL, 10), &r) == GW_OK);
            unsigned low = 0;
            while (log->record[low].lsn != r.lsn)
                low++;
            out[found++] = low;
        }
    return found;
}

/* "0-3,5" means these records; nothing else may be in it. */
static bool holds(const gw_log *log, const seen *message, const char *records)
{
    static unsigned found[MOST];
    unsigned n = records_of(log, message, found, MOST), at = 0;
    while (*records) {
        char *next;
        unsigned from = (unsigned)strtoul(records, &next, 10), to = from;
        if (*next == '-')
            to = (unsigned)strtoul(next + 1, &next, 10);
        for (; from <= to; from++, at++)
            if (at >= n || found[at] != from)
                return false;
        records = *next == ',' ? next + 1 : next;
    }
    return at == n;
}

static gw_mqtt_status puback_of(gw_window *w, unsigned connection, uint16_t id, int reason)
{
    gw_packet packet;
    size_t used;
    uint8_t bytes[] = {0x40, 3, (uint8_t)(id >> 8), (uint8_t)id, (uint8_t)reason};
    if (reason < 0)
        bytes[1] = 2;
    return gw_window_feed(w, connection, bytes, reason < 0 ? 4 : 5, 0, &used, &packet);
}

static bool ack(gw_window *w, const seen *message)
{
    return puback_of(w, 0, message->id, -1) == GW_MQTT_OK;
}

static bool all_done(const gw_window *w, const gw_log *log)
{
    return log->cursor.lsn == gw_log_committed(log) && gw_window_look(w, GW_ALL_CONNECTIONS).span == 0 &&
           log->cursor.published + log->cursor.dead_lettered == log->cursor.ordinal;
}

static bool payload_is(const seen *message, const char *text)
{
    return message->payload_bytes == strlen(text) && !memcmp(message->payload, text, strlen(text));
}

/* ---- packs --------------------------------------------------------------------------------------------------- */

static void test_events_carry_device_lsn_and_time(void)
{
    static const struct {
        const char *body, *line;
        uint8_t flags;
    } is[] = {
        {BODY, "{\"device_id\":\"d\",\"lsn\":4096,\"metrics\":{\"t\":1}}\n", TS},
        {" \r\n{ \"metrics\":\n{},\r\n\"tags\":{}}\n", /* line ends between tokens are no lines */
         "{\"device_id\":\"d\",\"lsn\":4096, \"metrics\": {},  \"tags\":{}} \n", TS},
        {"{\"metrics\":{}}", "{\"device_id\":\"d\",\"lsn\":4096,\"ts\":\"2025-09-23T11:18:41.123Z\",\"metrics\":{}}\n",
         0},
        {"{\"metrics\":{},\"device_id\" : \"d\"}", "{\"lsn\":4096,\"metrics\":{},\"device_id\" : \"d\"}\n", TS},
        {"{\"d\\u0065vice\\u005Fid\":\"d\",\"metrics\":{}}",
         "{\"lsn\":4096,\"d\\u0065vice\\u005Fid\":\"d\",\"metrics\":{}}\n", TS},
        {"{\"metrics\":{},\"payload\":{\"device_id\":[\"device_id\"]}}", /* not its own */
         "{\"device_id\":\"d\",\"lsn\":4096,\"metrics\":{},\"payload\":{\"device_id\":[\"device_id\"]}}\n", TS},
        {"{\"metrics\":{},\"payload\":\"\\\"device_id\\\":\\\\\"}",
         "{\"device_id\":\"d\",\"lsn\":4096,\"metrics\":{},\"payload\":\"\\\"device_id\\\":\\\\\"}\n", TS},
        {"{\"metrics\":{},\"payload\":\"device_id\"}",
         "{\"device_id\":\"d\",\"lsn\":4096,\"metrics\":{},\"payload\":\"device_id\"}\n", TS},
        {"{\"metrics\":{\"device_id\":1}}", "{\"device_id\":\"d\",\"lsn\":4096,\"metrics\":{\"device_id\":1}}\n", TS},
    };
    for (unsigned i = 0; i < sizeof is / sizeof *is; i++) {
        gw_log *log = fake_new();
        fake_add(log, GW_DATA, "d", is[i].body, is[i].flags);
        gw_window *w = packed(log, 1000, 0);
        CHECK(fill(w, s) == 1 && payload_is(&s[0], is[i].line));
        CHECK(!strcmp(s[0].topic, "t/d") && !strcmp(s[0].type, "application/x-ndjson") && s[0].first == 0x32);
        CHECK(ack(w, &s[0]) && all_done(w, log));
        done(w, log);
    }
}

static void test_an_array_is_one_json_value(void)
{
    gw_log *log = fake_new();
    fake_add(log, GW_DATA, "d", "{\"metrics\":{}}", TS);
    fake_add(log, GW_DATA, "d", "\n{\"metrics\":{}}\n", TS);
    gw_window *w = window_with(log, &(gw_pack_options){.bytes_max = 1000, .array = true}, 1, 10);
    gw_window_open(w, 0, false, 65535, 0);
    CHECK(fill(w, s) == 1 && !strcmp(s[0].type, "application/json"));
    CHECK(payload_is(&s[0], "[{\"device_id\":\"d\",\"lsn\":4096,\"metrics\":{}},"
                            "{\"device_id\":\"d\",\"lsn\":4176,\"metrics\":{}} ]"));
    done(w, log);
}

static void test_a_pack_is_full_at_its_limit_and_not_before(void)
{
    for (int array = 0; array < 2; array++)
        for (uint32_t most = 140; most < 200; most++) {
            gw_log *log = fake_new();
            add(log, "d", 7);
            gw_window *w =
                window_with(log, &(gw_pack_options){.bytes_max = most, .array = array, .linger_ns = MS}, 1, 1000);
            gw_window_open(w, 0, false, 65535, 0);
            const uint32_t one = 47, in_each = (most - (uint32_t)array) / one; /* an event with its line end */
            const unsigned n = fill(w, s); /* the last one lingers, unless it is full to the byte */
            for (unsigned i = 0; i < n; i++)
                CHECK(s[i].payload_bytes == in_each * one + (uint32_t)array && s[i].payload_bytes <= most);
            CHECK(n == 7 / in_each - (7 % in_each == 0 && s[0].payload_bytes < most));
            done(w, log);
        }
}

static void test_a_pack_lingers_for_more_and_no_longer(void)
{
    gw_log *log = fake_new();
    gw_window *w = packed(log, 65536, 20);
    CHECK(gw_window_due_ns(w, 0) == 0);
    add(log, "d", 3);
    CHECK(gw_window_due_ns(w, 0) == 1); /* there is something to read */
    CHECK(fill(w, s) == 0 && gw_window_due_ns(w, 0) == clock_ns + 20 * MS);
    clock_ns += 19 * MS;
    add(log, "d", 2);
    CHECK(fill(w, s) == 0 && gw_window_due_ns(w, 0) == clock_ns + MS);
    clock_ns += MS;
    add(log, "d", 1);
    add(log, "e", 1);
    CHECK(fill(w, s) == 1); /* closed before what has come since is read */
    CHECK(holds(log, &s[0], "0-4") && gw_window_due_ns(w, 0) == clock_ns + 20 * MS);
    CHECK(log->cursor_stores == 0 && gw_window_look(w, 0).in_flight == 1);
    gw_window_set_linger(w, false);
    CHECK(gw_window_due_ns(w, 0) == 1 && fill(w, t) == 2 && holds(log, &t[0], "5") && holds(log, &t[1], "6"));
    add(log, "d", 3); /* without lingering, what is there goes together still */
    CHECK(fill(w, t + 2) == 1 && holds(log, &t[2], "7-9"));
    CHECK(ack(w, &t[0]) && ack(w, &t[1]) && ack(w, &t[2]) && log->cursor.lsn == FAKE_FIRST_LSN);
    CHECK(ack(w, &s[0]) && all_done(w, log) && log->cursor.published == 10 && log->cursor_stores == 1);
    done(w, log);
}

static void test_no_device_waits_behind_a_busy_one(void)
{
    gw_log *log = fake_new();
    gw_window *w = packed(log, 200, 20);
    add(log, "rare", 1);
    CHECK(fill(w, s) == 0);
    clock_ns += 20 * MS;
    add(log, "busy", 1000);
    CHECK(fill(w, s) > 10 && holds(log, &s[0], "0"));
    done(w, log);
}

static void test_topics_are_packed_by_themselves_in_order(void)
{
    static char id[100][8];
    gw_log *log = fake_new();
    for (unsigned i = 0; i < 1000; i++) {
        sprintf(id[i % 100], "d%u", i % 100);
        add(log, id[i % 100], 1);
    }
    gw_window *w = packed(log, 65536, 0);
    CHECK(fill(w, s) == 100);
    for (unsigned i = 0; i < 100; i++) {
        unsigned found[16];
        CHECK(records_of(log, &s[i], found, 16) == 10);
        for (unsigned k = 0; k < 10; k++)
            CHECK(found[k] == i + 100 * k && !strcmp(s[i].topic + 2, id[i]));
    }
    for (unsigned i = 100; i-- > 0;) {
        CHECK(log->cursor.published == 0);
        CHECK(ack(w, &s[i]));
    }
    CHECK(all_done(w, log) && log->cursor_stores == 1 && gw_window_look(w, 0).acks == 100);
    done(w, log);
}

static void test_a_fixed_topic_is_one_pack_for_all_devices(void)
{
    gw_log *log = fake_new();
    add(log, "a", 1);
    add(log, "b", 2);
    gw_window_options o = {.topic_prefix = (const uint8_t *)"all",
                           .topic_prefix_bytes = 3,
                           .topic_is_fixed = true,
                           .inflight_max = 1,
                           .batch_bytes = 1,
                           .pack = &(gw_pack_options){.bytes_max = 500}};
    gw_window *w = gw_window_new(log, 0, &o);
    gw_window_open(w, 0, false, 1, 0);
    CHECK(fill(w, s) == 1 && holds(log, &s[0], "0-2") && !strcmp(s[0].topic, "all"));
    CHECK(memmem(s[0].payload, s[0].payload_bytes, "\"device_id\":\"b\"", 15));
    done(w, log);
}

static void test_the_table_of_packs_is_bounded_and_the_oldest_goes_first(void)
{
    static char id[5000][8];
    gw_log *log = fake_new();
    for (unsigned i = 0; i < 5000; i++) {
        sprintf(id[i], "d%u", i);
        add(log, id[i], 1);
    }
    gw_window *w = window_with(log, &(gw_pack_options){.bytes_max = 65536, .linger_ns = 1000 * MS}, 1, 65535);
    gw_window_open(w, 0, false, 65535, 0);
    CHECK(fill(w, s) == 5000 - 4096);
    for (unsigned i = 0; i < 904; i++)
        CHECK(!strcmp(s[i].topic + 2, id[i]));
    gw_window_set_linger(w, false);
    CHECK(fill(w, t) == 4096 && !strcmp(t[0].topic + 2, id[904]));
    done(w, log);
}

static void test_a_resumed_session_gets_the_same_packs_with_dup(void)
{
    gw_log *log = fake_new();
    add(log, "d", 3);
    gw_window *w = packed(log, 65536, 0);
    CHECK(fill(w, s) == 1);
    add(log, "d", 2);
    CHECK(fill(w, s + 1) == 1);
    static uint8_t first[4096];
    memcpy(first, s[1].payload, s[1].payload_bytes);
    add(log, "d", 1);
    log->record[4].dead = 1; /* meanwhile; the broker may have the message, so it stays as it was */
    gw_window_connect(w, 0);
    gw_window_open(w, 0, true, 65535, 0);
    CHECK(gw_window_due_ns(w, 0) == 1 && fill(w, t) == 3);
    CHECK(t[0].first == 0x3a && t[0].id == s[0].id && holds(log, &t[0], "0-2"));
    CHECK(t[1].first == 0x3a && t[1].id == s[1].id && t[1].payload_bytes == s[1].payload_bytes);
    CHECK(!memcmp(first, t[1].payload, t[1].payload_bytes));
    CHECK(t[2].first == 0x32 && holds(log, &t[2], "5"));
    CHECK(ack(w, &t[0]) && ack(w, &t[1]) && ack(w, &t[2]) && all_done(w, log));
    done(w, log);
}

static void test_a_session_that_is_not_resumed_gets_all_from_the_first_unacked(void)
{
    gw_log *log = fake_new();
    add(log, "a", 2);
    add(log, "b", 2);
    add(log, "c", 2);
    gw_window *w = packed(log, 65536, 0);
    CHECK(fill(w, s) == 3 && ack(w, &s[0]) && ack(w, &s[2]) && log->cursor.ordinal == 2);
    gw_window_connect(w, 0);
    gw_window_open(w, 0, false, 65535, 0);
    CHECK(fill(w, t) == 2 && t[0].first == 0x32 && t[0].id != s[0].id && holds(log, &t[0], "2-3"));
    CHECK(holds(log, &t[1], "4-5") && ack(w, &t[1]) && ack(w, &t[0]) && all_done(w, log));
    CHECK(log->counters.word[GW_COUNTER_PUBLISH_REPEATED] == 2 && log->counters.word[GW_COUNTER_PUBLISH_SENT] == 5);
    done(w, log);
}

static void test_what_is_marked_as_dead_leaves_its_pack(void)
{
    gw_log *log = fake_new();
    add(log, "d", 4);
    log->record[1].dead = 1; /* before it is read */
    gw_window *w = packed(log, 65536, 20);
    CHECK(fill(w, s) == 0);
    log->record[0].dead = log->record[3].dead = 1; /* while the pack lingers */
    gw_window_set_linger(w, false);
    CHECK(fill(w, s) == 1 && holds(log, &s[0], "2") && log->cursor.dead_lettered == 2);
    CHECK(ack(w, &s[0]) && all_done(w, log) && log->cursor.published == 1 && log->cursor.dead_lettered == 3);
    add(log, "d", 2);
    gw_window_set_linger(w, true);
    CHECK(fill(w, s) == 0);
    log->record[4].dead = log->record[5].dead = 1;
    gw_window_set_linger(w, false);
    CHECK(fill(w, s) == 0 && all_done(w, log) && log->cursor.dead_lettered == 5);
    done(w, log);
}

static void test_of_a_refused_pack_only_the_guilty_one_is_set_aside(void)
{
    gw_log *log = fake_new();
    add(log, "d", 4);
    add(log, "e", 2);
    gw_window *w = packed(log, 65536, 0);
    gw_refusal r[4];
    CHECK(fill(w, s) == 2 && puback_of(w, 0, s[0].id, 0x99) == GW_MQTT_REFUSED);
    CHECK(gw_window_refusals(w, r, 4) == 1 && r[0].events == 4 && r[0].lsn == log->record[0].lsn && r[0].by_broker);
    CHECK(gw_window_is_held(w, 0) && !gw_window_dead_letter(w, r[0].lsn) && !gw_window_start_over(w, 0));
    CHECK(ack(w, &s[1]) && gw_window_start_over(w, 0) && !gw_window_is_held(w, 0));
    add(log, "d", 3);
    CHECK(fill(w, s) == 6);
    for (unsigned i = 0; i < 4; i++)
        CHECK(holds(log, &s[i], (const char[]){(char)('0' + i), 0}));
    CHECK(holds(log, &s[4], "4-5") && holds(log, &s[5], "6-8"));
    CHECK(puback_of(w, 0, s[2].id, 0x99) == GW_MQTT_REFUSED);
    for (unsigned i = 0; i < 6; i++)
        CHECK(i == 2 || ack(w, &s[i]));
    CHECK(log->cursor.ordinal == 2 && gw_window_refusals(w, r, 4) == 1);
    CHECK(r[0].events == 1 && r[0].lsn == log->record[2].lsn && gw_window_dead_letter(w, r[0].lsn));
    CHECK(all_done(w, log) && log->cursor.dead_lettered == 1 && log->cursor.published == 8);
    done(w, log);
}

static void test_packs_obey_the_maximum_packet_size(void)
{
    for (uint32_t most = 60; most < 300; most++) {
        gw_log *log = fake_new();
        add(log, "d", 10);
        gw_window *w = packed(log, 65536, 20);
        CHECK(fill(w, s) == 0); /* a pack lingers that this connection could send */
        gw_window_connect(w, 0);
        gw_window_open(w, 0, true, 65535, most);
        gw_window_set_linger(w, false);
        const uint8_t *bytes;
        size_t n = gw_window_fill(w, 0, clock_ns, (gw_fill_limits){1, UINT32_MAX}, &bytes);
        const bool fits = most >= 2 + 2 + 3 + 2 + 1 + 3 + 20 + 47; /* with one event */
        CHECK(n <= most && (n > 0) == fits);
        gw_refusal r[10];
        CHECK(gw_window_refusals(w, r, 10) == (fits ? 0 : 10));
        CHECK(fits || (r[0].reason == GW_REASON_PACKET_TOO_LARGE && r[0].events == 1 && !r[0].by_broker));
        done(w, log);
    }
}

static void test_an_event_above_the_limit_goes_alone(void)
{
    static char big[1000];
    memset(big, ' ', sizeof big - 1);
    memcpy(big, "{\"metrics\":{}", 13);
    big[sizeof big - 2] = '}';
    gw_log *log = fake_new();
    add(log, "d", 2);
    fake_add(log, GW_DATA, "d", big, TS);
    add(log, "d", 2);
    gw_window *w = packed(log, 300, 0);
    CHECK(fill(w, s) == 3 && holds(log, &s[0], "0-1") && holds(log, &s[1], "2") && holds(log, &s[2], "3-4"));
    done(w, log);
}

static void test_what_can_be_in_no_pack_holds_alone(void)
{
    gw_log *log = fake_new();
    add(log, "d", 1);
    fake_add(log, GW_DATA, "no/topic", BODY, TS);
    fake_add(log, GW_DATA, "d", "[1]", TS);
    add(log, "d", 1);
    gw_window *w = packed(log, 300, 0);
    gw_refusal r[3];
    CHECK(fill(w, s) == 2 && holds(log, &s[0], "0") && holds(log, &s[1], "3"));
    CHECK(gw_window_refusals(w, r, 3) == 2 && r[0].reason == GW_REASON_TOPIC_INVALID && r[0].events == 1);
    CHECK(r[1].reason == GW_REASON_PAYLOAD_INVALID && r[1].lsn == log->record[2].lsn);
    CHECK(gw_window_dead_letter(w, r[1].lsn) && gw_window_dead_letter(w, r[0].lsn));
    CHECK(ack(w, &s[0]) && ack(w, &s[1]) && all_done(w, log));
    done(w, log);
}

static void test_corruption_inside_a_pack_is_never_passed(void)
{
    gw_log *log = fake_new();
    add(log, "d", 4);
    gw_window *w = packed(log, 1000, 20);
    CHECK(fill(w, s) == 0);
    log->record[0].dead = 1;
    log->corrupt_lsn = log->record[2].lsn;
    gw_window_set_linger(w, false);
    for (int i = 0; i < 3; i++)
        CHECK(fill(w, s) == 0 && gw_window_look(w, 0).corrupt_lsn == log->corrupt_lsn && gw_window_is_held(w, 0));
    CHECK(log->cursor.lsn <= log->record[1].lsn && gw_window_due_ns(w, 0) != 1);
    log->corrupt_lsn = 0;
    CHECK(gw_window_start_over(w, 0) && fill(w, s) == 1 && holds(log, &s[0], "1-3") && ack(w, &s[0]));
    CHECK(all_done(w, log) && log->cursor.dead_lettered == 1);
    add(log, "d", 1);
    CHECK(fill(w, s) == 1);
    gw_window_set_linger(w, true);
    add(log, "d", 1);
    CHECK(fill(w, s) == 0);
    gw_window_set_linger(w, false);
    log->corrupt_lsn = log->record[4].lsn;
    gw_window_connect(w, 0);
    gw_window_open(w, 0, true, 65535, 0);
    CHECK(fill(w, s) == 0 && fill(w, s) == 0); /* nothing goes before what is owed */
    done(w, log);
}

static void test_a_suspected_pack_is_split(void)
{
    gw_log *log = fake_new();
    add(log, "d", 3);
    add(log, "e", 2);
    gw_window *w = packed(log, 1000, 0);
    CHECK(fill(w, s) == 2);
    gw_window_probe(w, 0, gw_window_look(w, 0).read_lsn - 1); /* the connection broke: two are suspects */
    gw_window_connect(w, 0);
    gw_window_open(w, 0, false, 65535, 0);
    CHECK(fill(w, s) == 1 && holds(log, &s[0], "0-2") && fill(w, s) == 0);
    CHECK(gw_window_look(w, 0).oldest_events == 3);
    gw_window_probe(w, 0, gw_window_look(w, 0).read_lsn - 1); /* and again, with one alone */
    gw_window_connect(w, 0);
    gw_window_open(w, 0, false, 65535, 0);
    for (unsigned i = 0; i < 3; i++) {
        CHECK(fill(w, s) == 1 && holds(log, &s[0], (const char[]){(char)('0' + i), 0}));
        CHECK(gw_window_look(w, 0).oldest_events == 1 && ack(w, &s[0]));
    }
    CHECK(fill(w, s) == 1 && holds(log, &s[0], "3-4") && ack(w, &s[0]) && all_done(w, log));
    done(w, log);
}

/* Every second byte; of what begins with '[', nothing smaller. */
static size_t halve(void *context, const uint8_t *in, size_t bytes, uint8_t *out, size_t room)
{
    ++*(unsigned *)context;
    size_t n = 0;
    for (size_t i = 0; i < bytes && *in != '['; i += 2)
        out[n++] = in[i];
    CHECK(n <= room);
    return n;
}

static void test_a_compressed_pack_says_so(void)
{
    for (int array = 0; array < 2; array++) {
        unsigned calls = 0;
        gw_log *log = fake_new();
        add(log, "d", 20);
        gw_window *w = window_with(
            log, &(gw_pack_options){.bytes_max = 1000, .array = array, .compress = halve, .context = &calls}, 1, 10);
        gw_window_open(w, 0, false, 65535, 0);
        static uint8_t first[1000];
        CHECK(fill(w, s) == 1 && calls == 1);
        CHECK(!strcmp(s[0].type, array ? "application/json" : "application/x-ndjson+zstd"));
        CHECK(s[0].payload_bytes == (array ? 941 : 470) && s[0].payload[0] == (array ? '[' : '{'));
        CHECK(array || s[0].payload[1] == 'd');
        memcpy(first, s[0].payload, s[0].payload_bytes);
        gw_window_connect(w, 0);
        gw_window_open(w, 0, true, 65535, 0);
        CHECK(fill(w, t) == 1 && t[0].first == 0x3a && t[0].payload_bytes == s[0].payload_bytes);
        CHECK(!memcmp(first, t[0].payload, t[0].payload_bytes) && ack(w, &t[0]) && all_done(w, log));
        done(w, log);
    }
}

static void test_a_fill_obeys_its_limits(void)
{
    for (int with_packs = 0; with_packs < 2; with_packs++) {
        gw_log *log = fake_new();
        for (unsigned i = 0; i < 10; i++)
            fake_add(log, GW_DATA, i % 2 ? "d" : "e", BODY, TS);
        gw_window *w = window_with(log, with_packs ? &(gw_pack_options){.bytes_max = 50} : NULL, 1, 100);
        gw_window_open(w, 0, false, 65535, 0);
        const uint8_t *bytes;
        CHECK(gw_window_fill(w, 0, 1, (gw_fill_limits){0, 1000}, &bytes) == 0);
        CHECK(gw_window_fill(w, 0, 1, (gw_fill_limits){1000, 0}, &bytes) == 0 && gw_window_filled(w) == 0);
        size_t one = gw_window_fill(w, 0, 1, (gw_fill_limits){1, 1000}, &bytes);
        CHECK(publishes(bytes, one, s, MOST) == 1 && gw_window_filled(w) == 1);
        size_t n = gw_window_fill(w, 0, 1, (gw_fill_limits){3, 1000}, &bytes);
        CHECK(publishes(bytes, n, s, MOST) == 3 && gw_window_filled(w) == 3);
        n = gw_window_fill(w, 0, 1, (gw_fill_limits){100, (uint32_t)one}, &bytes);
        CHECK(publishes(bytes, n, s, MOST) == 1);
        n = gw_window_fill(w, 0, 1, (gw_fill_limits){100, (uint32_t)one + 1}, &bytes);
        CHECK(publishes(bytes, n, s, MOST) == 2); /* the one that reaches it goes too */
        gw_window_connect(w, 0);
        gw_window_open(w, 0, true, 65535, 0);
        n = gw_window_fill(w, 0, 1, (gw_fill_limits){4, 1 << 20}, &bytes);
        CHECK(publishes(bytes, n, s, MOST) == 4 && s[0].first == 0x3a && gw_window_due_ns(w, 0) == 1);
        done(w, log);
    }
}

/* ---- connections --------------------------------------------------------------------------------------------- */

static unsigned of(const gw_window *w, const char *device_id)
{
    return gw_window_connection_of(w, (const uint8_t *)device_id, strlen(device_id));
}

/* Two devices, of connection 0 and 1. */
static void two(const gw_window *w, char id[2][8])
{
    for (unsigned c = 0; c < 2; c++)
        for (unsigned i = 0; i < 1000; i++) {
            sprintf(id[c], "d%u", i);
            if (of(w, id[c]) == c)
                break;
        }
    CHECK(of(w, id[0]) == 0 && of(w, id[1]) == 1);
}

static void test_devices_are_shared_out_and_stay(void)
{
    gw_log *log = fake_new();
    gw_window *w = window_with(log, NULL, 7, 10), *again = window_with(log, NULL, 7, 10);
    unsigned count[7] = {0};
    for (unsigned i = 0; i < 7000; i++) {
        char id[16];
        sprintf(id, "device-%u", i);
        count[of(w, id)]++;
        CHECK(of(w, id) == of(again, id));
    }
    for (unsigned c = 0; c < 7; c++)
        CHECK(count[c] > 800 && count[c] < 1200);
    gw_window_free(again);
    done(w, log);
}

static void test_one_that_is_away_blocks_its_own_devices_only(void)
{
    for (int with_packs = 0; with_packs < 2; with_packs++) {
        char id[2][8];
        gw_log *log = fake_new();
        gw_window *w = window_with(log, with_packs ? &(gw_pack_options){.bytes_max = 50} : NULL, 2, 1000);
        two(w, id);
        for (unsigned i = 0; i < 8; i++)
            add(log, id[i % 2], 1);
        gw_window_open(w, 1, false, 65535, 0);
        CHECK(fill_of(w, 0, s) == 0 && fill_of(w, 1, s) == 4 && gw_window_look(w, 0).in_flight == 0);
        for (unsigned i = 0; i < 4; i++)
            CHECK(!strcmp(s[i].topic + 2, id[1]) && puback_of(w, 1, s[i].id, -1) == GW_MQTT_OK);
        CHECK(log->cursor.lsn == FAKE_FIRST_LSN && gw_window_look(w, 1).span == 8);
        add(log, id[1], 1);
        CHECK(gw_window_due_ns(w, 1) == 1 && gw_window_due_ns(w, 0) == 0);
        CHECK(fill_of(w, 1, t) == 1);
        gw_window_open(w, 0, false, 2, 0);
        CHECK(gw_window_due_ns(w, 0) == 1);
        CHECK(fill_of(w, 0, s) == 2); /* the oldest of its own */
        CHECK(puback_of(w, 0, s[0].id, -1) == GW_MQTT_OK && log->cursor.ordinal == 2);
        CHECK(puback_of(w, 0, s[1].id, -1) == GW_MQTT_OK && fill_of(w, 0, s) == 2 && fill_of(w, 0, s + 2) == 0);
        CHECK(puback_of(w, 0, s[0].id, -1) == GW_MQTT_OK && puback_of(w, 0, s[1].id, -1) == GW_MQTT_OK);
        CHECK(log->cursor.ordinal == 8 && puback_of(w, 1, t[0].id, -1) == GW_MQTT_OK && all_done(w, log));
        CHECK(log->counters.word[GW_COUNTER_PUBLISH_REPEATED] == 0);
        done(w, log);
    }
}

static void test_a_puback_counts_on_its_own_connection_only(void)
{
    char id[2][8];
    gw_log *log = fake_new();
    gw_window *w = window_with(log, NULL, 2, 10);
    two(w, id);
    add(log, id[0], 3);
    gw_window_open(w, 0, false, 65535, 0);
    gw_window_open(w, 1, false, 65535, 0);
    CHECK(fill_of(w, 0, s) == 3 && fill_of(w, 1, s + 3) == 0);
    CHECK(puback_of(w, 1, s[0].id, -1) == GW_MQTT_PROTOCOL && *gw_window_error(w, 1) && !*gw_window_error(w, 0));
    CHECK(log->cursor_stores == 0 && gw_window_look(w, 0).in_flight == 3);
    gw_window_connect(w, 1);
    gw_window_open(w, 1, true, 65535, 0);
    add(log, id[1], 1);
    CHECK(fill_of(w, 1, t) == 1 && t[0].id == s[0].id); /* ids belong to a session */
    CHECK(puback_of(w, 1, t[0].id, -1) == GW_MQTT_OK && log->cursor_stores == 0);
    for (unsigned i = 0; i < 3; i++)
        CHECK(puback_of(w, 0, s[i].id, -1) == GW_MQTT_OK);
    CHECK(all_done(w, log));
    done(w, log);
}

static void test_a_refusal_holds_its_own_connection_only(void)
{
    char id[2][8];
    gw_log *log = fake_new();
    gw_window *w = window_with(log, NULL, 2, 10);
    two(w, id);
    add(log, id[0], 2);
    add(log, id[1], 1);
    gw_window_open(w, 0, false, 65535, 0);
    gw_window_open(w, 1, false, 65535, 0);
    CHECK(fill_of(w, 0, s) == 2 && fill_of(w, 1, t) == 1 && puback_of(w, 0, s[0].id, 0x97) == GW_MQTT_REFUSED);
    CHECK(puback_of(w, 1, t[0].id, -1) == GW_MQTT_OK);
    CHECK(gw_window_is_held(w, 0) && !gw_window_is_held(w, 1) && gw_window_is_held(w, GW_ALL_CONNECTIONS));
    add(log, id[0], 1);
    add(log, id[1], 2);
    CHECK(fill_of(w, 0, s + 2) == 0 && fill_of(w, 1, t) == 2 && log->cursor.ordinal == 0);
    CHECK(puback_of(w, 0, s[1].id, -1) == GW_MQTT_OK && gw_window_start_over(w, 0));
    CHECK(gw_window_look(w, 1).in_flight == 2 && fill_of(w, 0, s) == 1); /* alone, until it has passed */
    CHECK(puback_of(w, 1, t[0].id, -1) == GW_MQTT_OK && puback_of(w, 1, t[1].id, -1) == GW_MQTT_OK);
    CHECK(fill_of(w, 0, s + 1) == 0 && puback_of(w, 0, s[0].id, -1) == GW_MQTT_OK);
    CHECK(fill_of(w, 0, s) == 2 && log->counters.word[GW_COUNTER_PUBLISH_REPEATED] == 2);
    CHECK(puback_of(w, 0, s[0].id, -1) == GW_MQTT_OK && puback_of(w, 0, s[1].id, -1) == GW_MQTT_OK);
    CHECK(all_done(w, log));
    done(w, log);
}

static void test_the_span_is_bounded_when_one_is_away(void)
{
    char id[2][8];
    gw_log *log = fake_new();
    gw_window_options o = {.topic_prefix = (const uint8_t *)"t/",
                           .topic_prefix_bytes = 2,
                           .inflight_max = 1000,
                           .batch_bytes = 1 << 20,
                           .connections = 2,
                           .pack = &(gw_pack_options){.bytes_max = 1000, .linger_ns = 1000 * MS},
                           .records_max = 3000};
    gw_window *w = gw_window_new(log, 0, &o);
    two(w, id);
    gw_window_open(w, 1, false, 65535, 0);
    add(log, id[0], 1);
    add(log, id[1], 5000);
    unsigned records = 0, found[64];
    for (unsigned n; (n = fill_of(w, 1, s)) != 0;)
        for (unsigned i = 0; i < n; i++) {
            records += records_of(log, &s[i], found, 64);
            CHECK(puback_of(w, 1, s[i].id, -1) == GW_MQTT_OK);
        }
    CHECK(records == 2999 && gw_window_look(w, 1).span == 3000); /* the last pack of a full span does not linger */
    CHECK(log->cursor_stores == 0 && gw_window_due_ns(w, 1) == 0);
    gw_window_open(w, 0, false, 65535, 0);
    CHECK(fill_of(w, 0, s) == 1 && puback_of(w, 0, s[0].id, -1) == GW_MQTT_OK);
    CHECK(log->cursor.ordinal == 3000 && log->cursor_stores == 1 && gw_window_due_ns(w, 1) == 1);
    CHECK(fill_of(w, 1, s) > 50);
    o.records_max = GW_MQTT_RECORDS_MAX + 1;
    CHECK(!gw_window_new(log, 0, &o));
    done(w, log);
}

/* ---- any order of what may happen ---------------------------------------------------------------------------- */

enum { DEVICES = 40, LINKS = 3, RECORDS = 3000 };

typedef struct sent {
    uint16_t id;
    unsigned count;
    unsigned record[64];
    uint64_t digest;
} sent;

typedef struct world {
    gw_log *log;
    gw_window *w;
    bool packs;
    unsigned device[RECORDS], poison; /* of each record; this one is refused always */
    bool acked[RECORDS], dead[RECORDS];
    int last[DEVICES]; /* the last record sent since this device's stream began anew; -1: none */
    sent flying[LINKS][64];
    unsigned flights[LINKS], limit[LINKS];
    bool open[LINKS], resumed[LINKS];
    char id[DEVICES][8];
} world;

static uint64_t digest_of(const seen *m)
{
    uint64_t d = 14695981039346656037ull;
    for (uint32_t i = 0; i < m->payload_bytes; i++)
        d = (d ^ m->payload[i]) * 1099511628211ull;
    return d;
}

/* The stream of connection c begins anew at its first record that is not done. */
static void anew(world *x, unsigned c)
{
    bool behind = false;
    for (unsigned i = 0; i < x->log->records; i++)
        if (of(x->w, x->id[x->device[i]]) == c) {
            behind |= !x->acked[i] && !x->dead[i];
            if (behind)
                x->acked[i] = false;
        }
    for (unsigned d = 0; d < DEVICES; d++)
        if (of(x->w, x->id[d]) == c)
            x->last[d] = -1;
    x->flights[c] = 0;
}

static void check_sent(world *x, unsigned c, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        unsigned found[64], count;
        if (x->packs) {
            count = records_of(x->log, &s[i], found, 64);
        } else { /* its number is in the body */
            count = 1;
            found[0] = (unsigned)strtoul((const char *)s[i].payload + 16, NULL, 10);
        }
        CHECK(count > 0);
        const unsigned d = x->device[found[0]];
        CHECK(of(x->w, x->id[d]) == c && !strcmp(s[i].topic + 2, x->id[d]));
        if (s[i].first & 8) { /* the same message, the oldest that is owed */
            CHECK(x->resumed[c]);
            unsigned k = 0;
            while (k < x->flights[c] && x->flying[c][k].id != s[i].id)
                k++;
            CHECK(k < x->flights[c] && x->flying[c][k].digest == digest_of(&s[i]));
            continue;
        }
        for (unsigned k = 0; k < x->flights[c]; k++)
            CHECK(x->flying[c][k].id != s[i].id);
        sent *f = &x->flying[c][x->flights[c]++];
        *f = (sent){.id = s[i].id, .count = count, .digest = digest_of(&s[i])};
        for (unsigned k = 0; k < count; k++) { /* in order, none left out but those that are done */
            CHECK(x->device[found[k]] == d && !x->dead[found[k]] && !x->acked[found[k]]);
            for (unsigned between = (unsigned)(x->last[d] + 1); between < found[k]; between++)
                CHECK(x->device[between] != d || x->dead[between] || x->acked[between]);
            CHECK((int)found[k] > x->last[d]);
            x->last[d] = (int)found[k];
            f->record[k] = found[k];
        }
    }
}

static unsigned dice(unsigned n)
{
    return (unsigned)rand() % n;
}

static void check_cursor(const world *x)
{
    unsigned prefix = 0, dead = 0;
    while (prefix < x->log->records && (x->acked[prefix] || x->dead[prefix]))
        dead += x->dead[prefix++];
    const gw_cursor *cursor = &x->log->cursor;
    CHECK(cursor->ordinal == prefix && cursor->dead_lettered == dead && cursor->published == prefix - dead);
    CHECK(prefix == 0 || cursor->lsn == fake_end(x->log, prefix));
    for (unsigned c = 0; c < LINKS; c++)
        CHECK(!x->open[c] || gw_window_look(x->w, (int)c).in_flight <= x->limit[c]);
}

static void take_refusals(world *x, unsigned c)
{
    gw_refusal r[64];
    unsigned n = gw_window_refusals(x->w, r, 64);
    bool waits = false;
    for (unsigned i = 0; i < n; i++) {
        if (r[i].connection != c)
            continue;
        unsigned record = 0;
        while (x->log->record[record].lsn != r[i].lsn)
            record++;
        if (r[i].events == 1 && record == x->poison) {
            x->log->record[record].dead = 1;
            x->dead[record] = true;
            CHECK(gw_window_dead_letter(x->w, r[i].lsn));
        } else {
            CHECK(r[i].events == 1 || !gw_window_dead_letter(x->w, r[i].lsn));
            waits = true;
        }
    }
    if (waits && gw_window_start_over(x->w, c))
        anew(x, c);
}

static void answer(world *x, unsigned c, unsigned k, bool quota)
{
    const sent f = x->flying[c][k];
    bool refused = quota;
    for (unsigned i = 0; i < f.count; i++)
        refused |= f.record[i] == x->poison;
    CHECK(puback_of(x->w, c, f.id, refused ? (quota ? 0x97 : 0x99) : -1) == (refused ? GW_MQTT_REFUSED : GW_MQTT_OK));
    for (unsigned i = 0; i < f.count && !refused; i++)
        x->acked[f.record[i]] = true;
    memmove(&x->flying[c][k], &x->flying[c][k + 1], (--x->flights[c] - k) * sizeof f);
}

static void send_all(world *x, unsigned c)
{
    for (unsigned n; (n = fill_of(x->w, c, s)) != 0;) {
        check_sent(x, c, n);
        check_cursor(x);
    }
    CHECK(!x->open[c] || gw_window_due_ns(x->w, c) != 1 || gw_window_is_held(x->w, (int)c));
}

static void open_link(world *x, unsigned c, bool resumed)
{
    x->limit[c] = 1 + dice(12);
    x->open[c] = true;
    x->resumed[c] = resumed;
    gw_window_open(x->w, c, resumed, x->limit[c], 0);
    if (!resumed)
        anew(x, c);
}

static void test_any_order_of_events(unsigned seed)
{
    static world x;
    static char body[RECORDS][48];
    memset(&x, 0, sizeof x);
    srand(seed);
    x.log = fake_new();
    x.packs = seed % 3 != 0;
    const unsigned links = x.packs && seed % 2 ? 1 : LINKS;
    x.w = window_with(x.log,
                      x.packs ? &(gw_pack_options){.bytes_max = 100 + dice(1500), .linger_ns = dice(3) * 5 * MS} : NULL,
                      links, 12);
    x.poison = dice(600);
    for (unsigned d = 0; d < DEVICES; d++)
        sprintf(x.id[d], "d%u", d);
    for (unsigned d = 0; d < DEVICES; d++)
        x.last[d] = -1;
    for (unsigned c = 0; c < links; c++)
        open_link(&x, c, false);
    for (unsigned step = 0; step < 400; step++) {
        const unsigned c = dice(links), what = dice(100);
        clock_ns += dice(4) * MS;
        if (what < 25) {
            for (unsigned n = dice(12); n && x.log->records < RECORDS; n--) {
                unsigned i = x.log->records, d = dice(dice(2) ? 3 : DEVICES);
                x.device[i] = d;
                sprintf(body[i], "{\"metrics\":{\"n\":%u}}", i);
                fake_add(x.log, GW_DATA, x.id[d], body[i], TS);
            }
        } else if (what < 60) {
            send_all(&x, c);
        } else if (what < 92) {
            for (unsigned n = dice(6); n && x.flights[c] && x.open[c] && gw_window_look(x.w, (int)c).in_flight; n--)
                answer(&x, c, dice(x.flights[c]), dice(40) == 0);
        } else if (what < 96) {
            if (dice(2))
                gw_window_probe(x.w, c, gw_window_look(x.w, (int)c).read_lsn);
            gw_window_connect(x.w, c);
            x.open[c] = false;
        } else {
            if (!x.open[c])
                open_link(&x, c, dice(2) && !gw_window_look(x.w, (int)c).refused);
        }
        if (x.open[c])
            take_refusals(&x, c);
        check_cursor(&x);
    }
    gw_window_set_linger(x.w, false);
    for (unsigned c = 0; c < links; c++)
        if (!x.open[c])
            open_link(&x, c, false);
    for (unsigned round = 0; !all_done(x.w, x.log) || x.log->records == 0; round++) {
        CHECK(round < 20000);
        if (!x.log->records)
            break;
        for (unsigned c = 0; c < links; c++) {
            send_all(&x, c);
            while (x.flights[c])
                answer(&x, c, 0, false);
            take_refusals(&x, c);
            check_cursor(&x);
        }
    }
    done(x.w, x.log);
}

int main(int count, char **argument)
{
    const unsigned seed = count > 1 ? (unsigned)strtoul(argument[1], NULL, 10) : 1;
    const unsigned rounds = count > 2 ? (unsigned)strtoul(argument[2], NULL, 10) : 60;
    test_events_carry_device_lsn_and_time();
    test_an_array_is_one_json_value();
    test_a_pack_is_full_at_its_limit_and_not_before();
    test_a_pack_lingers_for_more_and_no_longer();
    test_no_device_waits_behind_a_busy_one();
    test_topics_are_packed_by_themselves_in_order();
    test_a_fixed_topic_is_one_pack_for_all_devices();
    test_the_table_of_packs_is_bounded_and_the_oldest_goes_first();
    test_a_resumed_session_gets_the_same_packs_with_dup();
    test_a_session_that_is_not_resumed_gets_all_from_the_first_unacked();
    test_what_is_marked_as_dead_leaves_its_pack();
    test_of_a_refused_pack_only_the_guilty_one_is_set_aside();
    test_packs_obey_the_maximum_packet_size();
    test_an_event_above_the_limit_goes_alone();
    test_what_can_be_in_no_pack_holds_alone();
    test_corruption_inside_a_pack_is_never_passed();
    test_a_suspected_pack_is_split();
    test_a_compressed_pack_says_so();
    test_a_fill_obeys_its_limits();
    test_devices_are_shared_out_and_stay();
    test_one_that_is_away_blocks_its_own_devices_only();
    test_a_puback_counts_on_its_own_connection_only();
    test_a_refusal_holds_its_own_connection_only();
    test_the_span_is_bounded_when_one_is_away();
    for (unsigned i = 0; i < rounds; i++) {
        check_seed = seed + i;
        test_any_order_of_events(seed + i);
    }
    puts("ok");
    return 0;
}
