/* test_lines.c - sinks beside each other: required and optional cursors, what is skipped, lines, waiting for `durable`.
 *
 * Sources: _native/gw_lines.c _native/gw_log*.c _native/gw_crc32c.c */
#include "gw_lines.h"
#include "log_fixture.h"

enum { MQTT_SINK = 0, FILE_SINK = 1, RUN_BYTES = 1 << 16 };

static fixture with_optional_file(void)
{
    fixture f = fixture_on(fresh_image(), MQTT_AND_FILE);
    f.optional = 1u << FILE_SINK;
    CHECK_EQ(fixture_open(&f, false), GW_OK);
    return f;
}

/* n events of 1000 bytes, seen by mqtt, on the disk, their room free for mqtt's part. */
static void pass(gw_log *log, gw_producer *producer, unsigned n, uint64_t *id)
{
    for (unsigned i = 0; i < n; i++) {
        CHECK_EQ(put(producer, (*id)++, 3, 1000, NULL), GW_OK);
        if (i % 100 == 99 || i + 1 == n) {
            publish(log, MQTT_SINK, follow(log));
            settle(log);
        }
    }
}

static void books_balance(const gw_log *log)
{
    for (unsigned i = 0; i < log->shared->sinks; i++)
        CHECK_EQ(gw_log_unexplained(log, i), 0);
}

/* ---- required and optional ------------------------------------------------------------------------------------- */

static void test_reclaim_waits_for_required_sinks_only(void)
{
    for (unsigned optional = 0; optional < 2; optional++) {
        fixture f = fixture_on(fresh_image(), MQTT_AND_FILE);
        f.optional = optional << FILE_SINK;
        CHECK_EQ(fixture_open(&f, false), GW_OK);
        gw_producer *producer = producer_of(f.log);
        CHECK_EQ(put(producer, 1, 3, 1000, NULL), GW_OK);
        uint64_t first = gw_cursor_load(f.log, FILE_SINK).lsn, tail = gw_log_tail(f.log), end = follow(f.log);
        publish(f.log, MQTT_SINK, end);
        settle(f.log);
        CHECK(gw_log_is_required(f.log, MQTT_SINK));
        CHECK_EQ(gw_log_is_required(f.log, FILE_SINK), !optional);
        CHECK_EQ(gw_log_least_cursor(f.log), optional ? tail : first);
        CHECK_EQ(gw_log_reclaim(f.log), optional ? tail : first);
        CHECK_EQ(gw_log_state_of(f.log, first), optional ? GW_RECEIPT_DELIVERED : GW_RECEIPT_DURABLE);
        /* nothing holds what is below reclaim: a mark might meet a claim */
        CHECK(gw_log_mark_dead(f.log, FILE_SINK, first, 0) == !optional);
        CHECK_EQ(put(producer, 2, 3, 1000, NULL), GW_OK);
        end = follow(f.log);
        CHECK(gw_log_mark_dead(f.log, FILE_SINK, tail, 0));
        publish(f.log, MQTT_SINK, end);
        CHECK_EQ(gw_log_state_of(f.log, tail), optional ? GW_RECEIPT_DELIVERED : GW_RECEIPT_DEAD_LETTERED);
        gw_producer_close(producer);
        fixture_end(&f);
    }
}

static void test_one_sink_at_least_is_required(void)
{
    fixture f = fixture_on(fresh_image(), MQTT_AND_FILE);
    f.optional = 3;
    CHECK_EQ(fixture_open(&f, false), GW_ERRNO);
    CHECK_EQ(f.error.error_number, EINVAL);
    close(f.fd);
}

static void test_lapped_sink_skips_to_the_least_required_cursor(void)
{
    fixture f = with_optional_file();
    gw_producer *producer = producer_of(f.log);
    uint64_t id = 0;
    pass(f.log, producer, 300, &id);
    publish(f.log, FILE_SINK, gw_log_committed(f.log));
    uint64_t at = gw_cursor_load(f.log, FILE_SINK).lsn;
    CHECK_EQ(gw_log_skip(f.log, FILE_SINK), 0);
    pass(f.log, producer, CAPACITY / record_size(3, 1000), &id);
    CHECK(!gw_log_lapped(f.log, at)); /* all but a piece of a record */
    CHECK_EQ(gw_log_skip(f.log, FILE_SINK), 0);
    pass(f.log, producer, 50, &id);
    CHECK(gw_log_lapped(f.log, at));
    CHECK_EQ(gw_log_skip(f.log, MQTT_SINK), 0);
    CHECK_EQ(gw_log_lag_events(f.log, FILE_SINK), id - 300);
    CHECK_EQ(gw_log_skip(f.log, FILE_SINK), id - 300);
    gw_cursor file = gw_cursor_load(f.log, FILE_SINK);
    CHECK_EQ(file.lsn, gw_log_least_cursor(f.log));
    CHECK_EQ(file.skipped, id - 300);
    CHECK_EQ(file.ordinal, id);
    CHECK_EQ(gw_log_lag_events(f.log, FILE_SINK), 0);
    books_balance(f.log);
    settle(f.log);
    gw_producer_close(producer);
    fixture_reopen(&f);
    CHECK_EQ(gw_cursor_load(f.log, FILE_SINK).skipped, id - 300);
    books_balance(f.log);
    fixture_end(&f);
}

/* ---- starts ---------------------------------------------------------------------------------------------------- */

static void test_optional_cursor_below_the_start_stays_while_its_records_stand(void)
{
    for (unsigned required = 0; required < 2; required++) {
        fixture f = with_optional_file();
        gw_producer *producer = producer_of(f.log);
        uint64_t id = 0;
        pass(f.log, producer, 500, &id);
        uint64_t at = gw_cursor_load(f.log, FILE_SINK).lsn, tail = gw_log_tail(f.log);
        gw_producer_close(producer);
        f.optional = required ? 0 : 1u << FILE_SINK;
        fixture_reopen(&f);
        CHECK_EQ(f.report.start, tail);
        CHECK_EQ(gw_cursor_load(f.log, FILE_SINK).lsn, at);
        CHECK_EQ(gw_log_reclaim(f.log), required ? at : tail);
        CHECK_EQ(publish(f.log, FILE_SINK, tail), id); /* every byte of them */
        books_balance(f.log);
        fixture_end(&f);
    }
}

static void test_optional_cursor_that_was_written_over_moves_at_the_start(void)
{
    for (unsigned required = 0; required < 2; required++)
        for (unsigned more = 0; more < 3; more++) {
            NOTE("required %u, more %u", required, more);
            fixture f = with_optional_file();
            gw_producer *producer = producer_of(f.log);
            uint64_t id = 0;
            pass(f.log, producer, 10, &id);
            publish(f.log, FILE_SINK, gw_log_committed(f.log));
            pass(f.log, producer, CAPACITY / record_size(3, 1000) + 100, &id);
            for (unsigned i = 0; i < 10 * more; i++) /* behind mqtt's cursor */
                CHECK_EQ(put(producer, id++, 3, 1000, NULL), GW_OK);
            follow(f.log);
            uint64_t c = gw_cursor_load(f.log, MQTT_SINK).lsn;
            gw_producer_close(producer);
            f.optional = required ? 0 : 1u << FILE_SINK;
            fixture_reopen(&f);
            CHECK_EQ(f.report.records, 10 * more);
            CHECK_EQ(f.report.corrupt_count, 0);
            gw_cursor file = gw_cursor_load(f.log, FILE_SINK);
            CHECK_EQ(file.lsn, c);
            CHECK_EQ(file.published, 10);
            CHECK_EQ(file.skipped, id - 10 - 10 * more);
            CHECK_EQ(gw_log_reclaim(f.log), c);
            CHECK_EQ(publish(f.log, FILE_SINK, follow(f.log)), 10 * more);
            books_balance(f.log);
            fixture_end(&f);
        }
}

/* A claim of the next lap that nobody finished has torn one record below the start. */
static void test_optional_cursor_moves_when_one_record_on_its_way_is_torn(void)
{
    fixture f = with_optional_file();
    gw_producer *producer = producer_of(f.log);
    uint64_t id = 0;
    pass(f.log, producer, 100, &id);
    uint64_t at = gw_cursor_load(f.log, FILE_SINK).lsn, torn = at + 40 * record_size(3, 1000);
    gw_producer_close(producer);
    fixture_close(&f);
    uint8_t *image = image_of(&f);
    *image_byte(image, torn + 200) ^= 1;
    fixture_rewrite(&f, image);
    free(image);
    CHECK_EQ(fixture_open(&f, false), GW_OK);
    CHECK_EQ(gw_cursor_load(f.log, FILE_SINK).lsn, f.report.start);
    CHECK_EQ(gw_cursor_load(f.log, FILE_SINK).skipped, 100);
    books_balance(f.log);
    fixture_end(&f);
}

static void test_sink_with_nothing_waiting_is_forgotten(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *producer = producer_of(f.log);
    uint64_t id = 0;
    pass(f.log, producer, 5, &id);
    gw_producer_close(producer);
    fixture_close(&f);
    f.sinks = MQTT;
    CHECK_EQ(fixture_open(&f, false), GW_ERRNO); /* five events wait for the file */
    CHECK_EQ(f.error.error_number, EINVAL);
    CHECK(strstr(f.error.text, "5 events") && strstr(f.error.text, "\"file\""));
    f.forget = "file";
    CHECK_EQ(fixture_open(&f, false), GW_OK);
    CHECK_EQ(f.log->shared->sinks, 1);
    CHECK_EQ(gw_log_reclaim(f.log), f.report.start);

    static const char *const FILE_ONLY[] = {"file", NULL}, *const FILE_AND_OTHER[] = {"file", "other", NULL};
    f.forget = NULL;
    f.sinks = MQTT_AND_FILE;
    fixture_reopen(&f);
    f.sinks = FILE_ONLY; /* its place stays the second one: bytes of dead letters name places */
    fixture_reopen(&f);
    CHECK_EQ(gw_log_sink(f.log, "file"), 1);
    CHECK_EQ(gw_log_sink(f.log, "mqtt"), -1);
    CHECK(gw_log_sink_name(f.log, 0)[0] == 0 && !gw_log_is_required(f.log, 0));
    producer = producer_of(f.log);
    CHECK_EQ(put(producer, id, 3, 1000, NULL), GW_OK);
    publish(f.log, 1, follow(f.log));
    settle(f.log);
    CHECK_EQ(gw_log_reclaim(f.log), gw_log_tail(f.log));
    gw_producer_close(producer);
    f.sinks = FILE_AND_OTHER;
    fixture_reopen(&f);
    CHECK_EQ(gw_log_sink(f.log, "other"), 0);
    CHECK(gw_log_is_required(f.log, 0));
    CHECK_EQ(gw_cursor_load(f.log, 0).lsn, f.report.start);
    books_balance(f.log);
    fixture_end(&f);
}

/* ---- lines ----------------------------------------------------------------------------------------------------- */

typedef struct reader {
    gw_lines lines;
    uint8_t *out;
} reader;

static reader reader_of(gw_log *log, unsigned sink, size_t bytes_max, bool durable)
{
    reader r = {.out = malloc(gw_lines_room(log, bytes_max))};
    CHECK(r.out);
    gw_lines_init(&r.lines, log, sink, r.out, bytes_max, durable);
    return r;
}

static uint64_t append(gw_producer *producer, const char *id, const char *body)
{
    gw_event event = {.device_id = (const uint8_t *)id,
                      .device_id_bytes = (uint8_t)strlen(id),
                      .body = (const uint8_t *)body,
                      .body_bytes = (uint32_t)strlen(body),
                      .received_at_ns = 1758626321000000007u};
    uint64_t lsn;
    CHECK_EQ(gw_producer_append(producer, &event, &lsn), GW_OK);
    return lsn;
}

static void test_a_line_has_no_line_end_inside(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *producer = producer_of(f.log);
    for (unsigned bytes = 2; bytes < 70; bytes++) {
        char body[80], want[256], id[] = "d\"\\\x7f";
        for (unsigned at = 0; at < bytes; at++) {
            memset(body, 'x', bytes);
            body[bytes] = 0;
            body[at] = at % 2 ? '\n' : '\r';
            uint64_t lsn = append(producer, id, body);
            follow(f.log);
            reader r = reader_of(f.log, FILE_SINK, RUN_BYTES, false);
            uint64_t ignored;
            size_t n;
            CHECK_EQ(gw_lines_seek(&r.lines, lsn, &ignored), GW_OK);
            CHECK_EQ(gw_lines_fill(&r.lines, &n), GW_OK);
            body[at] = ' ';
            int length = snprintf(want, sizeof want,
                                  "{\"device_id\":\"d\\u0022\\u005c\\u007f\",\"received_at\":"
                                  "\"2025-09-23T11:18:41.000000007Z\",\"lsn\":%llu,\"event\":%s}\n",
                                  (unsigned long long)lsn, body);
            CHECK_EQ(n, length);
            CHECK(memcmp(r.out, want, n) == 0);
            free(r.out);
        }
    }
    gw_producer_close(producer);
    fixture_end(&f);
}

static void test_lines_stop_at_durable(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *producer = producer_of(f.log);
    reader r = reader_of(f.log, FILE_SINK, RUN_BYTES, true);
    size_t n;
    append(producer, "a", "{}");
    follow(f.log);
    sync_now(f.log);
    uint64_t end = gw_log_durable(f.log);
    append(producer, "b", "{}");
    follow(f.log);
    CHECK_EQ(gw_lines_fill(&r.lines, &n), GW_OK);
    CHECK_EQ(r.lines.events, 1);
    CHECK_EQ(r.lines.lsn, end);
    CHECK_EQ(gw_lines_fill(&r.lines, &n), GW_EMPTY);
    sync_now(f.log);
    CHECK_EQ(gw_lines_fill(&r.lines, &n), GW_OK);
    CHECK_EQ(r.lines.events, 1);
    free(r.out);
    gw_producer_close(producer);
    fixture_end(&f);
}

static void test_only_what_was_confirmed_moves_the_cursor(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *producer = producer_of(f.log);
    reader r = reader_of(f.log, FILE_SINK, 1, true); /* a line a run */
    uint64_t ends[3], at;
    size_t n;
    for (unsigned i = 0; i < 3; i++) {
        append(producer, "a", "{}");
        ends[i] = gw_log_tail(f.log);
    }
    follow(f.log);
    sync_now(f.log);
    for (unsigned i = 0; i < 3; i++) {
        uint64_t before = gw_cursor_load(f.log, FILE_SINK).lsn;
        CHECK_EQ(gw_lines_fill(&r.lines, &n), GW_OK);
        CHECK_EQ(r.lines.lsn, ends[i]);
        CHECK_EQ(gw_cursor_load(f.log, FILE_SINK).lsn, before);
        if (i == 0)
            continue;
        gw_lines_confirm(&r.lines);
        gw_cursor c = gw_cursor_load(f.log, FILE_SINK);
        CHECK_EQ(c.lsn, ends[i]);
        CHECK_EQ(c.published, i + 1);
        books_balance(f.log);
    }
    CHECK_EQ(gw_lines_seek(&r.lines, ends[1], &at), GW_EMPTY); /* below the cursor */
    reader again = reader_of(f.log, FILE_SINK, RUN_BYTES, true);
    CHECK_EQ(again.lines.lsn, ends[2]);
    uint64_t from = gw_log_tail(f.log);
    append(producer, "a", "{}");
    append(producer, "a", "{}");
    follow(f.log);
    sync_now(f.log);
    CHECK_EQ(gw_lines_seek(&again.lines, from + 8, &at), GW_EMPTY);
    CHECK_EQ(gw_lines_seek(&again.lines, gw_log_tail(f.log) + 64, &at), GW_EMPTY);
    CHECK_EQ(gw_lines_seek(&again.lines, from + record_size(1, 2), &at), GW_OK);
    gw_lines_confirm(&again.lines); /* the first one was on file already */
    CHECK_EQ(gw_cursor_load(f.log, FILE_SINK).published, 4);
    CHECK_EQ(gw_lines_fill(&again.lines, &n), GW_OK);
    CHECK_EQ(again.lines.events, 1);
    gw_lines_confirm(&again.lines);
    books_balance(f.log);
    free(r.out);
    free(again.out);
    gw_producer_close(producer);
    fixture_end(&f);
}

static void test_damage_ends_the_lines_where_it_is(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *producer = producer_of(f.log);
    uint64_t lsn[3], at;
    size_t n;
    for (unsigned i = 0; i < 3; i++)
        lsn[i] = append(producer, "a", "{\"a\":1}");
    follow(f.log);
    sync_now(f.log);
    ((uint8_t *)gw_word(f.log, lsn[1]))[70] ^= 1;
    reader r = reader_of(f.log, FILE_SINK, RUN_BYTES, true);
    CHECK_EQ(gw_lines_fill(&r.lines, &n), GW_OK);
    CHECK_EQ(r.lines.events, 1);
    CHECK_EQ(gw_lines_fill(&r.lines, &n), GW_CORRUPT);
    CHECK_EQ(r.lines.lsn, lsn[1]);
    CHECK_EQ(gw_lines_seek(&r.lines, lsn[2], &at), GW_CORRUPT);
    CHECK_EQ(at, lsn[1]);
    free(r.out);
    gw_producer_close(producer);
    fixture_end(&f);
}

static void test_run_that_was_written_over_while_it_was_copied_does_not_leave(void)
{
    fixture f = with_optional_file();
    gw_producer *producer = producer_of(f.log);
    uint64_t id = 0, at;
    size_t n;
    reader r = reader_of(f.log, FILE_SINK, RUN_BYTES, true);
    pass(f.log, producer, 10, &id);
    CHECK_EQ(gw_lines_fill(&r.lines, &n), GW_OK);
    pass(f.log, producer, 20, &id);
    uint64_t from = r.lines.lsn;
    /* The records still stand, but the tail says that their place is claimed, by who has stored nothing yet. */
    _Atomic uint64_t *tail = &f.log->shared->tail;
    uint64_t was = atomic_load(tail);
    atomic_store(tail, from + CAPACITY + 8);
    CHECK_EQ(gw_lines_fill(&r.lines, &n), GW_LAPPED);
    CHECK_EQ(n, 0);
    CHECK_EQ(r.lines.lsn, from);
    CHECK_EQ(gw_lines_seek(&r.lines, gw_log_committed(f.log), &at), GW_LAPPED);
    atomic_store(tail, from + CAPACITY);
    CHECK_EQ(gw_lines_fill(&r.lines, &n), GW_OK);
    CHECK_EQ(r.lines.events, 20);
    atomic_store(tail, was);
    gw_lines_confirm(&r.lines);
    books_balance(f.log);
    free(r.out);
    gw_producer_close(producer);
    fixture_end(&f);
}

/* ---- a reader that is chased ------------------------------------------------------------------------------------ */

typedef struct chase {
    gw_log *log;
    _Atomic bool over;
    unsigned events;
} chase;

static void *chase_append(void *context)
{
    chase *c = context;
    gw_producer *producer = producer_of(c->log);
    for (unsigned i = 0; i < c->events;) {
        char body[4096];
        unsigned bytes = 64 + scramble(i) % 2000;
        snprintf(body, sizeof body, "{\"n\":%u,\"x\":\"%0*u\"}", i, (int)bytes, i);
        gw_event event = {.device_id = (const uint8_t *)"dev",
                          .device_id_bytes = 3,
                          .body = (const uint8_t *)body,
                          .body_bytes = (uint32_t)strlen(body),
                          .received_at_ns = i};
        uint64_t lsn;
        if (gw_producer_append(producer, &event, &lsn) == GW_OK)
            i++;
        gw_cursor at = gw_cursor_load(c->log, MQTT_SINK);
        gw_record r;
        for (follow(c->log); gw_log_read(c->log, at.lsn, &r) == GW_OK; at.lsn += r.size) {
            at.ordinal += r.kind == GW_DATA;
            at.published += r.kind == GW_DATA;
        }
        if (at.lsn != gw_cursor_load(c->log, MQTT_SINK).lsn)
            gw_cursor_store(c->log, MQTT_SINK, &at);
        if (i % 64 == 0)
            settle(c->log);
    }
    settle(c->log);
    gw_producer_close(producer);
    atomic_store(&c->over, true);
    return NULL;
}

/* Every line is one event as it was sent, each at most once and in order, and the books say how many are missing. */
static void test_lines_of_a_chased_sink_are_whole_and_counted(void)
{
    fixture f = with_optional_file();
    chase c = {.log = f.log, .events = (unsigned)environment_number("GW_CROWD_EVENTS", 30000)};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, chase_append, &c) == 0);
    reader r = reader_of(f.log, FILE_SINK, 1 << 19, true);
    uint64_t lines = 0, skipped = 0, next = 0, at;
    for (unsigned runs = 0;; runs++) {
        size_t n;
        bool over = atomic_load(&c.over);
        gw_status status = gw_lines_fill(&r.lines, &n);
        if (status == GW_LAPPED) {
            gw_lines_confirm(&r.lines);
            skipped += gw_log_skip(f.log, FILE_SINK);
            CHECK_EQ(gw_lines_seek(&r.lines, gw_cursor_load(f.log, FILE_SINK).lsn, &at), GW_OK);
            continue;
        }
        CHECK(status == GW_OK || status == GW_EMPTY);
        for (size_t i = 0; i < n;) {
            const char *line = (const char *)r.out + i, *end = memchr(line, '\n', n - i);
            unsigned number, again, bytes;
            const char *event = strstr(line, ",\"event\":");
            CHECK(end && event && event < end &&
                  sscanf(event, ",\"event\":{\"n\":%u,\"x\":\"%u", &number, &again) == 2);
            bytes = 64 + scramble(number) % 2000;
            CHECK(number == again && number >= next);
            char want[4096];
            int length =
                snprintf(want, sizeof want, ",\"event\":{\"n\":%u,\"x\":\"%0*u\"}}\n", number, (int)bytes, number);
            CHECK_EQ(end + 1 - event, length);
            CHECK(memcmp(event, want, (size_t)length) == 0);
            next = number + 1;
            lines++;
            i = (size_t)(end + 1 - (const char *)r.out);
        }
        gw_lines_confirm(&r.lines);
        if (status == GW_EMPTY && over)
            break;
        while (runs % 4 == 3 && !atomic_load(&c.over) && !gw_log_lapped(f.log, r.lines.lsn))
            usleep(100);
    }
    CHECK(pthread_join(thread, NULL) == 0);
    gw_cursor cursor = gw_cursor_load(f.log, FILE_SINK);
    CHECK_EQ(cursor.published, lines);
    CHECK_EQ(cursor.skipped, skipped);
    CHECK_EQ(lines + skipped, c.events);
    CHECK(skipped > 0 && lines > 0);
    books_balance(f.log);
    free(r.out);
    fixture_end(&f);
}

/* ---- waiting for durable ---------------------------------------------------------------------------------------- */

typedef struct waiting {
    gw_log *log;
    uint64_t seen, durable, took_ms;
    int timeout_ms;
} waiting;

static void *wait_run(void *context)
{
    waiting *w = context;
    uint64_t from = now_ms();
    w->durable = gw_log_wait_durable(w->log, w->seen, w->timeout_ms);
    w->took_ms = now_ms() - from;
    return NULL;
}

static void wait_until_it_sleeps(gw_log *log)
{
    while (!atomic_load(&log->shared->waiter[GW_WAITER_SINK].flag))
        usleep(100);
}

static void test_durable_wakes_the_sink_that_waits_for_it(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *producer = producer_of(f.log);
    append(producer, "a", "{}");
    waiting w = {.log = f.log, .seen = gw_log_durable(f.log), .timeout_ms = 8000};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, wait_run, &w) == 0);
    wait_until_it_sleeps(f.log);
    follow(f.log);
    sync_now(f.log);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_EQ(w.durable, gw_log_tail(f.log));
    CHECK(w.took_ms < 7000);

    /* a wake-up before the sleep is not lost, and ends one sleep only */
    w.seen = w.durable;
    gw_log_wake_durable(f.log);
    wait_run(&w);
    CHECK(w.took_ms < 7000);
    w.timeout_ms = 20;
    wait_run(&w);
    CHECK(w.took_ms >= 19);

    /* a failed log ends a sleep once: a loop around it must not spin */
    w.timeout_ms = 8000;
    CHECK(pthread_create(&thread, NULL, wait_run, &w) == 0);
    wait_until_it_sleeps(f.log);
    gw_log_set_state(f.log, GW_STATE_FAILED);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(w.took_ms < 7000);
    w.timeout_ms = 20;
    wait_run(&w);
    CHECK(w.took_ms >= 19);
    gw_producer_close(producer);
    fixture_end(&f);
}

static void *committer_run(void *context)
{
    gw_error error;
    CHECK_EQ(gw_log_run_committer(context, 30000, &error), GW_OK);
    return NULL;
}

static void test_who_waits_for_sinks_hurries_the_committer_when_they_read_below_durable(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *producer = producer_of(f.log);
    gw_log_set_sinks_want_durable(f.log, true);
    CHECK(gw_log_sinks_want_durable(f.log));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, committer_run, f.log) == 0);
    uint64_t from = now_ms();
    for (unsigned i = 0; i < 5; i++) {
        uint64_t lsn = append(producer, "a", "{}");
        gw_log_want(f.log, 0, lsn, true);
        while (gw_log_durable(f.log) <= lsn) {
            CHECK(now_ms() - from < 20000);
            gw_log_wait_durable(f.log, lsn, 100);
        }
    }
    gw_log_stop_committer(f.log);
    CHECK(pthread_join(thread, NULL) == 0);
    gw_producer_close(producer);
    fixture_end(&f);
}

static const test TESTS[] = {
    {"reclaim_waits_for_required_sinks_only", test_reclaim_waits_for_required_sinks_only},
    {"one_sink_at_least_is_required", test_one_sink_at_least_is_required},
    {"lapped_sink_skips_to_the_least_required_cursor", test_lapped_sink_skips_to_the_least_required_cursor},
    {"optional_cursor_below_the_start_stays_while_its_records_stand",
     test_optional_cursor_below_the_start_stays_while_its_records_stand},
    {"optional_cursor_that_was_written_over_moves_at_the_start",
     test_optional_cursor_that_was_written_over_moves_at_the_start},
    {"optional_cursor_moves_when_one_record_on_its_way_is_torn",
     test_optional_cursor_moves_when_one_record_on_its_way_is_torn},
    {"sink_with_nothing_waiting_is_forgotten", test_sink_with_nothing_waiting_is_forgotten},
    {"a_line_has_no_line_end_inside", test_a_line_has_no_line_end_inside},
    {"lines_stop_at_durable", test_lines_stop_at_durable},
    {"only_what_was_confirmed_moves_the_cursor", test_only_what_was_confirmed_moves_the_cursor},
    {"damage_ends_the_lines_where_it_is", test_damage_ends_the_lines_where_it_is},
    {"run_that_was_written_over_while_it_was_copied_does_not_leave",
     test_run_that_was_written_over_while_it_was_copied_does_not_leave},
    {"lines_of_a_chased_sink_are_whole_and_counted", test_lines_of_a_chased_sink_are_whole_and_counted},
    {"durable_wakes_the_sink_that_waits_for_it", test_durable_wakes_the_sink_that_waits_for_it},
    {"who_waits_for_sinks_hurries_the_committer_when_they_read_below_durable",
     test_who_waits_for_sinks_hurries_the_committer_when_they_read_below_durable},
};

int main(int argc, char **argv)
{
    return run_tests(TESTS, sizeof TESTS / sizeof *TESTS, argc, argv);
}
