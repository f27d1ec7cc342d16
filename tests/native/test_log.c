/* test_log.c - the log's rules one by one: append, read, reclaim, books, recovery as a table, interleavings that are
 * forced at fail points. (Whole power cuts: test_log_power.c. Deaths of real processes: test_log_death.c.)
 *
 * Sources: _native/gw_log.c _native/gw_log_commit.c _native/gw_log_recover.c _native/gw_crc32c.c */
#include "log_fixture.h"

/* ---- append, read --------------------------------------------------------------------------------------------- */

static void every_length_reads_back_every_byte(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t id = 0;
    for (unsigned device = 0; device <= 17; device++)
        for (unsigned body = 0; body <= 33; body++) {
            NOTE("device_id %u, body %u", device, body);
            CHECK_EQ(put(p, ++id, device, body, NULL), GW_OK);
        }
    CHECK_EQ(put(p, ++id, 255, 1, NULL), GW_OK);
    CHECK_EQ(publish(f.log, 0, follow(f.log)), id);
    CHECK_EQ(gw_log_committed_ordinal(f.log), id);
    gw_producer_close(p);
    fixture_end(&f);
}

static void record_runs_over_the_ring_end_at_every_alignment(void)
{
    for (unsigned before = 8; before <= 208; before += 8) {
        NOTE("%u bytes before the end", before);
        fixture f = fixture_new();
        gw_producer *p = producer_of(f.log);
        advance_to(f.log, p, CAPACITY - before);
        uint64_t lsn;
        CHECK_EQ(put(p, 7, 9, 191 - 64, &lsn), GW_OK);
        CHECK_EQ(lsn, CAPACITY - before);
        CHECK_EQ(put(p, 8, 3, 50, NULL), GW_OK);
        CHECK_SEQS(f.log, lsn, 7, 8);
        gw_producer_close(p);
        fixture_reopen(&f); /* recovery reads over the end, too */
        CHECK_EQ(f.report.records, 2);
        CHECK_EQ(publish(f.log, 0, gw_log_committed(f.log)), 2);
        fixture_end(&f);
    }
}

static void record_at_the_size_limit_is_taken(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t max = gw_log_record_bytes_max(f.log);
    CHECK_EQ(max, CAPACITY / 8);
    CHECK_EQ(put(p, 1, 5, (unsigned)max - 64 - 5, NULL), GW_OK);
    CHECK_SEQS(f.log, GW_FIRST_LSN, 1);
    gw_producer_close(p);
    fixture_end(&f);
}

static void record_one_past_the_size_limit_leaves_nothing(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t max = gw_log_record_bytes_max(f.log), tail = gw_log_tail(f.log);
    CHECK_EQ(put(p, 1, 5, (unsigned)max - 64 - 5 + 1, NULL), GW_TOO_LARGE);
    CHECK_EQ(gw_log_tail(f.log), tail);
    gw_producer_close(p);
    fixture_end(&f);
}

static void full_is_a_verdict_that_leaves_nothing(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t id = 0;
    while (put(p, ++id, 4, 8192 - 64 - 4, NULL) == GW_OK)
        ;
    CHECK_EQ(gw_log_tail(f.log), GW_FIRST_LSN + CAPACITY); /* the very last byte is used */
    uint64_t tail = gw_log_tail(f.log);
    uint8_t *before = image_of(&f), *after;
    CHECK_EQ(put(p, id, 0, 0, NULL), GW_FULL);
    after = image_of(&f);
    CHECK(memcmp(before, after, FILE_BYTES) == 0);
    CHECK_EQ(gw_log_tail(f.log), tail);
    CHECK_EQ(atomic_load(&p->intent->pos), GW_POSITION_NONE);
    CHECK_EQ(publish(f.log, 0, follow(f.log)), id - 1);
    CHECK_EQ(put(p, id, 0, 0, NULL), GW_FULL); /* published, not yet persisted */
    sync_now(f.log);
    CHECK_EQ(put(p, id, 0, 0, NULL), GW_OK);
    gw_producer_close(p);
    free(before);
    free(after);
    fixture_end(&f);
}

static uint64_t reclaim_during_sync;
static gw_log *watched;

static int look_at_reclaim(int fd)
{
    (void)fd;
    reclaim_during_sync = gw_log_reclaim(watched);
    return 0;
}

static void reclaim_moves_only_after_the_sync_that_persists_the_cursor(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *p = producer_of(f.log);
    for (unsigned i = 0; i < 10; i++)
        CHECK_EQ(put(p, i, 4, 100, NULL), GW_OK);
    uint64_t end = follow(f.log);
    publish(f.log, 0, end);
    sync_now(f.log);
    CHECK_EQ(gw_log_reclaim(f.log), GW_FIRST_LSN); /* the other sink holds it */
    publish(f.log, 1, end);
    CHECK_EQ(gw_log_reclaim(f.log), GW_FIRST_LSN);
    watched = f.log;
    on_fdatasync = look_at_reclaim;
    sync_now(f.log);
    CHECK_EQ(reclaim_during_sync, GW_FIRST_LSN);
    CHECK_EQ(gw_log_reclaim(f.log), end);
    CHECK_EQ(gw_log_durable(f.log), end);
    gw_producer_close(p);
    fixture_end(&f);
}

static uint64_t cursor_moved_to;

static int move_the_cursor(int fd)
{
    (void)fd;
    gw_cursor c = gw_cursor_load(watched, 0);
    c.lsn = cursor_moved_to;
    gw_cursor_store(watched, 0, &c);
    return 0;
}

static void reclaim_is_the_cursor_in_the_slot_not_the_one_that_moved_meanwhile(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    cursor_moved_to = follow(f.log);
    watched = f.log;
    on_fdatasync = move_the_cursor;
    bool changed;
    CHECK_EQ(gw_log_sync(f.log, &changed, &f.error), GW_OK);
    CHECK(changed);
    CHECK_EQ(gw_log_reclaim(f.log), GW_FIRST_LSN);
    sync_now(f.log);
    CHECK_EQ(gw_log_reclaim(f.log), cursor_moved_to);
    gw_producer_close(p);
    fixture_end(&f);
}

static int append_during_sync(int fd)
{
    (void)fd;
    gw_producer *p = producer_of(watched);
    CHECK_EQ(put(p, 99, 4, 100, NULL), GW_OK);
    gw_producer_close(p);
    follow(watched);
    return 0;
}

static void durable_covers_only_what_was_committed_before_the_sync(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    uint64_t before = follow(f.log);
    watched = f.log;
    on_fdatasync = append_during_sync;
    bool changed;
    CHECK_EQ(gw_log_sync(f.log, &changed, &f.error), GW_OK);
    CHECK_EQ(gw_log_durable(f.log), before);
    CHECK(gw_log_committed(f.log) > before);
    CHECK(changed);
    gw_producer_close(p);
    fixture_end(&f);
}

/* Without a sink recovery begins at the persisted watermark: nothing above it may be overwritten. */
static void log_without_sinks_reclaims_no_further_than_the_persisted_watermark(void)
{
    fixture f = fixture_with(NO_SINKS);
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    uint64_t end = follow(f.log);
    sync_now(f.log);
    CHECK_EQ(gw_log_reclaim(f.log), GW_FIRST_LSN);
    sync_now(f.log);
    CHECK_EQ(gw_log_reclaim(f.log), end);
    gw_producer_close(p);
    fixture_end(&f);
}

static void draining_log_is_closed(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    gw_log_set_state(f.log, GW_DRAINING);
    uint64_t tail = gw_log_tail(f.log);
    CHECK_EQ(put(p, 2, 4, 100, NULL), GW_CLOSED);
    CHECK_EQ(gw_log_tail(f.log), tail);
    CHECK_EQ(atomic_load(&p->intent->pos), GW_POSITION_NONE);
    CHECK_EQ(publish(f.log, 0, follow(f.log)), 1); /* what is there is read, synced, published */
    settle(f.log);
    CHECK_EQ(gw_log_durable(f.log), tail);
    gw_log_set_state(f.log, GW_RUNNING); /* no way back */
    CHECK_EQ(gw_log_state(f.log), GW_DRAINING);
    CHECK_EQ(put(p, 3, 4, 100, NULL), GW_CLOSED);
    gw_producer_close(p);
    fixture_end(&f);
}

static void failed_state_is_final(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    gw_log_set_state(f.log, GW_STATE_FAILED);
    CHECK_EQ(put(p, 2, 4, 100, NULL), GW_CLOSED); /* not in the log */
    gw_log_set_state(f.log, GW_DRAINING);
    CHECK_EQ(gw_log_state(f.log), GW_STATE_FAILED);
    bool changed;
    CHECK_EQ(gw_log_sync(f.log, &changed, &f.error), GW_FAILED);
    CHECK_EQ(gw_log_takeover(f.log, &f.error), GW_FAILED);
    gw_producer_close(p);
    fixture_end(&f);
}

static void sixty_fifth_producer_finds_no_slot(void)
{
    fixture f = fixture_new();
    gw_producer *p[GW_INTENT_SLOTS], *extra;
    for (unsigned i = 0; i < GW_INTENT_SLOTS; i++)
        p[i] = producer_of(f.log);
    CHECK_EQ(gw_producer_open(f.log, &extra), GW_NO_SLOT);
    gw_producer_close(p[17]);
    p[17] = producer_of(f.log);
    CHECK_EQ(put(p[17], 1, 4, 100, NULL), GW_OK);
    for (unsigned i = 0; i < GW_INTENT_SLOTS; i++)
        gw_producer_close(p[i]);
    fixture_end(&f);
}

static void read_refuses_what_is_no_record(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    CHECK_EQ(put(p, 2, 4, 100, NULL), GW_OK);
    uint64_t end = follow(f.log);
    gw_record r;
    CHECK_EQ(gw_log_read(f.log, end, &r), GW_EMPTY);
    for (uint64_t lsn = GW_FIRST_LSN + 1; lsn < GW_FIRST_LSN + record_size(4, 100); lsn++)
        CHECK_EQ(gw_log_read(f.log, lsn, &r), GW_CORRUPT);
    gw_producer_close(p);
    fixture_end(&f);
}

static void read_notices_any_flipped_byte(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 4, 101, NULL), GW_OK);
    follow(f.log);
    gw_record r;
    for (unsigned i = 0; i < 64 + 4 + 101; i++) {
        NOTE("byte %u", i);
        f.log->ring[GW_FIRST_LSN + i] ^= 0x10;
        CHECK_EQ(gw_log_read(f.log, GW_FIRST_LSN, &r), GW_CORRUPT);
        f.log->ring[GW_FIRST_LSN + i] ^= 0x10;
    }
    CHECK_EQ(gw_log_read(f.log, GW_FIRST_LSN, &r), GW_OK);
    gw_producer_close(p);
    fixture_end(&f);
}

/* ---- sinks, books --------------------------------------------------------------------------------------------- */

static void new_sink_starts_at_the_end(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    uint64_t end = follow(f.log);
    gw_producer_close(p);
    f.sinks = MQTT_AND_FILE;
    fixture_reopen(&f);
    CHECK_EQ(gw_cursor_load(f.log, (unsigned)gw_log_sink(f.log, "mqtt")).lsn, GW_FIRST_LSN);
    gw_cursor file = gw_cursor_load(f.log, (unsigned)gw_log_sink(f.log, "file"));
    CHECK_EQ(file.lsn, end);
    CHECK_EQ(file.ordinal, 1);
    CHECK_EQ(file.base, 1);
    CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
    CHECK_EQ(gw_log_unexplained(f.log, 1), 0);
    CHECK_EQ(gw_log_sink(f.log, "nobody"), (unsigned long long)-1);
    fixture_end(&f);
}

static void known_sink_keeps_its_place(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *p = producer_of(f.log);
    uint64_t middle = 0;
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    CHECK_EQ(put(p, 2, 4, 100, &middle), GW_OK);
    follow(f.log);
    publish(f.log, 0, middle);
    sync_now(f.log);
    gw_producer_close(p);
    static const char *const other_order[] = {"file", "mqtt", NULL};
    f.sinks = other_order;
    fixture_reopen(&f);
    CHECK_EQ(gw_cursor_load(f.log, (unsigned)gw_log_sink(f.log, "mqtt")).lsn, middle);
    CHECK_EQ(gw_cursor_load(f.log, (unsigned)gw_log_sink(f.log, "mqtt")).published, 1);
    CHECK_EQ(gw_cursor_load(f.log, (unsigned)gw_log_sink(f.log, "file")).lsn, GW_FIRST_LSN);
    fixture_end(&f);
}

static void removed_sink_is_refused_by_name(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    fixture_close(&f);
    f.sinks = MQTT;
    CHECK_EQ(fixture_open(&f, false), GW_ERRNO);
    CHECK(strstr(f.error.text, "\"file\""));
    fixture_end(&f);
}

static void ninth_sink_is_refused(void)
{
    static const char *const nine[] = {"a", "b", "c", "d", "e", "f", "g", "h", "i", NULL};
    fixture f = fixture_on(fresh_image(), nine);
    CHECK_EQ(fixture_open(&f, false), GW_ERRNO);
    static const char *const longest[] = {"sixteen-bytes-ok", NULL};
    f.sinks = longest;
    CHECK_EQ(fixture_open(&f, false), GW_OK);
    CHECK_EQ(gw_log_sink(f.log, "sixteen-bytes-ok"), 0);
    fixture_end(&f);
}

static void books_balance(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    for (unsigned i = 1; i <= 20; i++) {
        CHECK_EQ(put(p, i, 4, 100, NULL), GW_OK);
        CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
        follow(f.log);
        CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
        if (i % 3 == 0)
            publish(f.log, 0, gw_log_committed(f.log));
        CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
        if (i % 7 == 0) {
            if (i % 2)
                sync_now(f.log);
            gw_producer_close(p);
            fixture_reopen(&f);
            p = producer_of(f.log);
            CHECK_EQ(gw_log_committed_ordinal(f.log), i);
            CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
        }
    }
    gw_producer_close(p);
    fixture_end(&f);
}

static void publisher_that_skips_a_record_shows_exactly_one(void)
{
    for (unsigned counts_it = 0; counts_it < 2; counts_it++) {
        fixture f = fixture_new();
        gw_producer *p = producer_of(f.log);
        for (unsigned i = 1; i <= 5; i++)
            CHECK_EQ(put(p, i, 4, 100, NULL), GW_OK);
        uint64_t end = follow(f.log);
        publish(f.log, 0, GW_FIRST_LSN + 2 * record_size(4, 100));
        gw_cursor c = gw_cursor_load(f.log, 0);
        c.lsn += record_size(4, 100); /* on purpose */
        c.ordinal += counts_it;
        gw_cursor_store(f.log, 0, &c);
        publish(f.log, 0, end);
        CHECK_EQ(gw_log_unexplained(f.log, 0), 1);
        settle(f.log);
        gw_producer_close(p);
        if (counts_it) { /* it does not go away: the ordinal is persisted */
            fixture_reopen(&f);
            CHECK_EQ(gw_log_unexplained(f.log, 0), 1);
        }
        fixture_end(&f);
    }
}

static void dead_lettered_events_are_explained(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    gw_cursor c = gw_cursor_load(f.log, 0);
    c.lsn = follow(f.log);
    c.ordinal = c.dead_lettered = 1;
    gw_cursor_store(f.log, 0, &c);
    CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
    c.published = 1; /* counted twice */
    gw_cursor_store(f.log, 0, &c);
    CHECK_EQ(gw_log_unexplained(f.log, 0), (unsigned long long)-1);
    gw_producer_close(p);
    fixture_end(&f);
}

/* ---- checksums ------------------------------------------------------------------------------------------------ */

static void crc32c_paths_agree(void)
{
    CHECK_EQ(gw_crc32c(0, "123456789", 9), 0xe3069283u); /* RFC 3720, B.4 */
    CHECK_EQ(gw_crc32c_portable(0, "123456789", 9), 0xe3069283u);
    uint8_t bytes[512 + 8];
    for (unsigned i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)scramble(i);
    for (unsigned at = 0; at < 8; at++)
        for (unsigned n = 0; n <= 512; n += n < 40 ? 1 : 37) {
            uint32_t whole = gw_crc32c(5, bytes + at, n);
            CHECK_EQ(whole, gw_crc32c_portable(5, bytes + at, n));
            CHECK_EQ(whole, gw_crc32c(gw_crc32c(5, bytes + at, n / 3), bytes + at + n / 3, n - n / 3));
        }
    uint64_t word;
    memcpy(&word, bytes, 8);
    CHECK_EQ(gw_crc32c_u64(7, word), gw_crc32c_portable(7, bytes, 8));
}

/* ---- lock, attach, create ------------------------------------------------------------------------------------- */

static void second_gateway_is_locked_out(void)
{
    fixture f = fixture_new(), second = f;
    CHECK_EQ(fixture_open(&second, false), GW_LOCKED);
    fixture_end(&f);
}

/* The opener's own descriptor is closed, its memory unmapped: a worker still maps the log. */
static void lock_lives_as_long_as_anyone_who_maps_the_log(void)
{
    fixture f = fixture_new(), second = f;
    gw_log *worker = fixture_attach(&f);
    fixture_close(&f);
    CHECK_EQ(fixture_open(&second, false), GW_LOCKED);
    gw_log_close(worker);
    CHECK_EQ(fixture_open(&second, false), GW_OK);
    fixture_close(&second);
    fixture_end(&f);
}

static void lock_of_another_file_is_refused(void)
{
    fixture f = fixture_new(), other = fixture_on(fresh_image(), MQTT);
    gw_log *log;
    gw_recovery report;
    gw_error error;
    fixture_close(&f);
    int wrong = open(other.path, O_RDWR | O_CLOEXEC);
    CHECK_EQ(gw_log_open(f.path, wrong, MQTT, false, &log, &report, &error), GW_ERRNO);
    close(wrong);
    fixture_end(&f);
    fixture_end(&other);
}

static void shared_memory_of_another_log_is_refused(void)
{
    fixture f = fixture_new();
    uint8_t *image = image_of(&f);
    gw_identity_page *identity = (gw_identity_page *)(void *)image;
    identity->identity ^= 1;
    identity->crc = 0;
    identity->crc = gw_crc32c(0, identity, sizeof *identity);
    fixture other = fixture_on(image, MQTT);
    CHECK_EQ(fixture_open(&other, false), GW_OK);
    gw_log *log;
    gw_error error;
    CHECK_EQ(gw_log_attach(f.fd_lock, gw_log_fd_shared(other.log), &log, &error), GW_NOT_A_LOG);
    free(image);
    fixture_end(&f);
    fixture_end(&other);
}

static void shared_memory_of_something_else_is_refused(void)
{
    fixture f = fixture_new();
    gw_log *log;
    gw_error error;
    CHECK_EQ(gw_log_attach(f.fd_lock, f.fd, &log, &error), GW_NOT_A_LOG);
    int zeros = memfd_create("zeros", MFD_CLOEXEC);
    CHECK(ftruncate(zeros, sizeof(gw_shared)) == 0);
    CHECK_EQ(gw_log_attach(f.fd_lock, zeros, &log, &error), GW_NOT_A_LOG);
    close(zeros);
    fixture_end(&f);
}

static int stop_at_once(void *context, uint64_t done)
{
    (void)context;
    (void)done;
    return 1;
}

static void create_leaves_nothing_when_it_is_stopped(void)
{
    char path[256], fresh[300];
    gw_error error;
    snprintf(path, sizeof path, "%s/gw-create-%d.log", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp", (int)getpid());
    snprintf(fresh, sizeof fresh, "%s.new", path);
    CHECK_EQ(gw_log_create(path, CAPACITY, stop_at_once, NULL, &error), GW_ERRNO);
    CHECK_EQ(error.error_number, EINTR);
    CHECK(access(path, F_OK) && access(fresh, F_OK));
    CHECK_EQ(gw_log_create(path, CAPACITY + 8, NULL, NULL, &error), GW_ERRNO);
    CHECK_EQ(gw_log_create(path, CAPACITY / 2, NULL, NULL, &error), GW_ERRNO);
    CHECK_EQ(gw_log_create(path, GW_CAPACITY_MAX * 2, NULL, NULL, &error), GW_ERRNO);
    CHECK(access(path, F_OK) && access(fresh, F_OK));
    CHECK_EQ(gw_log_create(path, CAPACITY, NULL, NULL, &error), GW_OK);
    CHECK_EQ(gw_log_create(path, CAPACITY, NULL, NULL, &error), GW_ERRNO);
    CHECK_EQ(error.error_number, EEXIST);
    unlink(path);
}

static void damaged_identity_page_is_not_a_log(void)
{
    uint8_t *image = malloc(FILE_BYTES);
    CHECK(image);
    for (unsigned at = 0; at < GW_PAGE; at += at < 64 ? 1 : 501) {
        NOTE("byte %u", at);
        memcpy(image, fresh_image(), FILE_BYTES);
        image[at] ^= 4;
        fixture f = fixture_on(image, MQTT);
        CHECK_EQ(fixture_open(&f, true), GW_NOT_A_LOG);
        fixture_end(&f);
    }
    free(image);
    fixture f = fixture_on(fresh_image(), MQTT);
    CHECK(ftruncate(f.fd, (off_t)(FILE_BYTES - GW_PAGE)) == 0);
    CHECK_EQ(fixture_open(&f, true), GW_NOT_A_LOG);
    fixture_end(&f);
}

/* ---- recovery: each row of the table in gw_log_recover.c ------------------------------------------------------- */

/* Ten records of 4 + 100 bytes, ids 1..10; the first `durable` of them settled; nothing published. */
static fixture ten_records(unsigned durable)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    for (unsigned i = 1; i <= 10; i++) {
        CHECK_EQ(put(p, i, 4, 100, NULL), GW_OK);
        follow(f.log);
        if (i == durable)
            settle(f.log);
    }
    gw_producer_close(p);
    fixture_close(&f);
    return f;
}

#define TEN_SIZE record_size(4, 100)
#define TEN_LSN(id) (GW_FIRST_LSN + ((id)-1) * TEN_SIZE)

static void whole_records_are_accepted(void)
{
    fixture f = ten_records(4);
    CHECK_EQ(fixture_open(&f, false), GW_OK);
    CHECK_EQ(f.report.watermark, TEN_LSN(5));
    CHECK_EQ(f.report.end, TEN_LSN(11));
    CHECK_EQ(f.report.start, TEN_LSN(11));
    CHECK_EQ(f.report.records, 10);
    CHECK_EQ(f.report.bytes, 10 * TEN_SIZE);
    CHECK_EQ(f.report.torn_bytes + f.report.corrupt_bytes + f.report.corrupt_count, 0);
    CHECK_EQ(f.report.epoch, 3);
    CHECK_EQ(gw_log_durable(f.log), TEN_LSN(11));
    CHECK_EQ(gw_log_reclaim(f.log), GW_FIRST_LSN);
    CHECK_SEQS(f.log, GW_FIRST_LSN, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10);
    fixture_end(&f);
}

static void hole_above_the_watermark_is_torn(void)
{
    fixture f = ten_records(4);
    uint8_t *image = image_of(&f);
    image_byte(image, TEN_LSN(7))[70] ^= 1;
    fixture_rewrite(&f, image);
    CHECK_EQ(fixture_open(&f, false), GW_OK);
    CHECK_EQ(f.report.torn_bytes, TEN_SIZE);
    CHECK_EQ(f.report.corrupt_count, 0);
    CHECK_EQ(f.report.records, 9);
    CHECK_SEQS(f.log, GW_FIRST_LSN, 1, 2, 3, 4, 5, 6, 8, 9, 10);
    CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
    publish(f.log, 0, gw_log_committed(f.log));
    CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
    free(image);
    fixture_end(&f);
}

static void hole_below_the_watermark_is_corruption(void)
{
    fixture f = ten_records(8);
    uint8_t *image = image_of(&f);
    image_byte(image, TEN_LSN(3))[70] ^= 1;
    image_byte(image, TEN_LSN(5))[8] ^= 1;
    image_byte(image, TEN_LSN(6))[8] ^= 1;
    fixture_rewrite(&f, image);
    for (int again = 0; again < 2; again++) { /* a refused open changes nothing of it */
        CHECK_EQ(fixture_open(&f, false), GW_CORRUPT);
        CHECK_EQ(f.report.corrupt_count, 2);
        CHECK_EQ(f.report.corrupt_bytes, 3 * TEN_SIZE);
        CHECK_EQ(f.report.corrupt[0].from, TEN_LSN(3));
        CHECK_EQ(f.report.corrupt[0].to, TEN_LSN(4));
        CHECK_EQ(f.report.corrupt[1].from, TEN_LSN(5));
        CHECK_EQ(f.report.corrupt[1].to, TEN_LSN(7));
        CHECK_EQ(f.error.lsn, TEN_LSN(3));
    }
    CHECK_EQ(fixture_open(&f, true), GW_OK);
    CHECK_EQ(f.report.corrupt_count, 2);
    CHECK_SEQS(f.log, GW_FIRST_LSN, 1, 2, 4, 7, 8, 9, 10);
    fixture_reopen(&f); /* mended: PADs are there now */
    CHECK_EQ(f.report.corrupt_count, 0);
    free(image);
    fixture_end(&f);
}

static void hole_across_the_watermark_is_corrupt_below_it_only(void)
{
    fixture f = ten_records(5);
    uint8_t *image = image_of(&f);
    for (unsigned id = 4; id <= 7; id++)
        image_byte(image, TEN_LSN(id))[70] ^= 1;
    fixture_rewrite(&f, image);
    CHECK_EQ(fixture_open(&f, true), GW_OK);
    CHECK_EQ(f.report.corrupt_count, 1);
    CHECK_EQ(f.report.corrupt[0].from, TEN_LSN(4));
    CHECK_EQ(f.report.corrupt[0].to, TEN_LSN(6));
    CHECK_EQ(f.report.torn_bytes, 2 * TEN_SIZE);
    CHECK_SEQS(f.log, GW_FIRST_LSN, 1, 2, 3, 8, 9, 10);
    free(image);
    fixture_end(&f);
}

static void missing_end_below_the_watermark_is_corruption(void)
{
    fixture f = ten_records(10);
    uint8_t *image = image_of(&f);
    memset(image_byte(image, TEN_LSN(9)), 0, 2 * TEN_SIZE);
    fixture_rewrite(&f, image);
    CHECK_EQ(fixture_open(&f, false), GW_CORRUPT);
    CHECK_EQ(f.report.end, TEN_LSN(9));
    CHECK_EQ(f.report.corrupt[0].from, TEN_LSN(9));
    CHECK_EQ(f.report.corrupt[0].to, TEN_LSN(11));
    CHECK_EQ(fixture_open(&f, true), GW_OK);
    CHECK_EQ(f.report.start, TEN_LSN(11)); /* never below what was promised */
    CHECK_SEQS(f.log, GW_FIRST_LSN, 1, 2, 3, 4, 5, 6, 7, 8);
    free(image);
    fixture_end(&f);
}

static void more_damage_than_the_report_can_list_is_counted(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    for (unsigned i = 1; i <= 60; i++)
        CHECK_EQ(put(p, i, 4, 100, NULL), GW_OK);
    follow(f.log);
    settle(f.log);
    gw_producer_close(p);
    fixture_close(&f);
    uint8_t *image = image_of(&f);
    for (unsigned id = 2; id <= 60; id += 2)
        image_byte(image, TEN_LSN(id))[70] ^= 1;
    fixture_rewrite(&f, image);
    CHECK_EQ(fixture_open(&f, false), GW_CORRUPT);
    CHECK_EQ(f.report.corrupt_count, 30);
    CHECK_EQ(f.report.corrupt_bytes, 30 * TEN_SIZE);
    CHECK_EQ(fixture_open(&f, true), GW_OK);
    CHECK_EQ(f.report.records, 30);
    free(image);
    fixture_end(&f);
}

/* Bytes from each offset on are not the ones that were written: the record is there or it is not, the others are. */
static void torn_record_is_skipped_at_every_byte(void)
{
    fixture f = ten_records(0);
    uint8_t *image = image_of(&f), *torn = malloc(FILE_BYTES);
    CHECK(torn);
    /* what else may stand there: zeros, the same bytes of a former lap's record, noise, noise behind the tear only */
    for (unsigned id = 6; id <= 10; id += 4) /* with four behind it, and as the last one */
        for (unsigned filling = 0; filling < 3; filling++)
            for (unsigned from = 0; from < TEN_SIZE; from += (unsigned)environment_number("GW_TEST_STEP", 1)) {
                NOTE("record %u torn from byte %u, filling %u", id, from, filling);
                memcpy(torn, image, FILE_BYTES);
                uint8_t *record = image_byte(torn, TEN_LSN(id)), *other = image_byte(torn, TEN_LSN(2));
                bool same = true;
                for (unsigned i = from; i < TEN_SIZE; i++) {
                    uint8_t was = record[i];
                    record[i] = filling == 0 ? 0 : filling == 1 ? other[i] : (uint8_t)scramble(i);
                    same &= was == record[i] || i >= 64 + 4 + 100; /* the fill is in no checksum */
                }
                fixture_rewrite(&f, torn);
                CHECK_EQ(fixture_open(&f, false), GW_OK);
                CHECK_EQ(f.report.records, same ? 10 : 9);
                uint64_t got[11], want = 1;
                unsigned n = seqs(f.log, GW_FIRST_LSN, got, 11);
                CHECK_EQ(n, same ? 10 : 9);
                for (unsigned i = 0; i < n; i++, want++) {
                    want += want == id && !same;
                    CHECK_EQ(got[i], want);
                }
                fixture_close(&f);
            }
    free(image);
    free(torn);
    fixture_end(&f);
}

static void torn_slot_page_falls_back_to_the_other(void)
{
    fixture f = ten_records(4);
    uint8_t *image = image_of(&f), *torn = malloc(FILE_BYTES);
    CHECK(torn);
    unsigned newest = newest_of(image);
    uint64_t watermark = image_slot(image, !newest)->watermark;
    for (unsigned cut = 0; cut < 12; cut++) {
        /* each sector, each half, zero or of the page before; sectors behind the used bytes are covered as well */
        unsigned from = cut < 8 ? cut * 512 : cut % 2 * 2048, bytes = cut < 8 ? 512 : 2048;
        for (unsigned filling = 0; filling < 2; filling++) {
            NOTE("slot page torn at %u, filling %u", from, filling);
            memcpy(torn, image, FILE_BYTES);
            uint8_t *page = (uint8_t *)image_slot(torn, newest);
            memset(page + from, filling ? 0xff : 0, bytes);
            bool same = memcmp(torn, image, FILE_BYTES) == 0;
            fixture_rewrite(&f, torn);
            CHECK_EQ(fixture_open(&f, false), GW_OK);
            CHECK_EQ(f.report.watermark, same ? TEN_LSN(5) : watermark);
            CHECK_SEQS(f.log, GW_FIRST_LSN, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10);
            fixture_close(&f);
        }
    }
    memset(image_slot(image, newest), 0, 512);
    image_slot(image, !newest)->sink[3].cursor.base ^= 1;
    fixture_rewrite(&f, image);
    CHECK_EQ(fixture_open(&f, true), GW_NOT_A_LOG);
    CHECK(strstr(f.error.text, "both slot pages"));
    free(image);
    free(torn);
    fixture_end(&f);
}

/* Same offsets, same sizes, lap after lap: an old record is never taken for a new one. */
static void former_laps_never_come_back(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t id = 0, lsn = 0;
    for (unsigned lap = 0; lap < 3; lap++)
        for (unsigned i = 0; i < CAPACITY / 8192; i++) {
            CHECK_EQ(put(p, ++id, 4, 8192 - 64 - 4, &lsn), GW_OK);
            publish(f.log, 0, follow(f.log));
            settle(f.log);
        }
    gw_producer_close(p);
    fixture_close(&f);
    uint8_t *image = image_of(&f);
    fixture_reopen(&f);
    CHECK_EQ(f.report.records, 0); /* all of it is published; the laps before it are whole, and not records */
    CHECK_EQ(f.report.start, lsn + 8192);
    fixture_close(&f);
    /* two newest records lost in a power cut, cursors and watermark of before them */
    fixture g = fixture_on(image, MQTT);
    CHECK_EQ(fixture_open(&g, false), GW_OK);
    p = producer_of(g.log);
    uint64_t first;
    CHECK_EQ(put(p, 1, 4, 8192 - 64 - 4, &first), GW_OK);
    CHECK_EQ(put(p, 2, 4, 8192 - 64 - 4, NULL), GW_OK);
    CHECK_EQ(put(p, 3, 4, 8192 - 64 - 4, NULL), GW_OK);
    gw_producer_close(p);
    fixture_close(&g);
    uint8_t *now = image_of(&g);
    for (unsigned lost = 0; lost < 8; lost++) {
        NOTE("lost %u", lost);
        uint8_t *cut = malloc(FILE_BYTES);
        CHECK(cut);
        memcpy(cut, now, FILE_BYTES);
        for (unsigned k = 0; k < 3; k++)
            if (lost & 1u << k) /* the former lap's record stands there again, byte for byte */
                memcpy(image_byte(cut, first + k * 8192), image_byte(image, first + k * 8192), 8192);
        fixture_rewrite(&g, cut);
        CHECK_EQ(fixture_open(&g, false), GW_OK);
        uint64_t got[4], want = 0;
        unsigned n = seqs(g.log, first, got, 4);
        for (unsigned i = 0; i < n; i++) {
            while (lost & 1u << want)
                want++;
            CHECK_EQ(got[i], ++want);
        }
        CHECK_EQ(n, 3 - (lost & 1) - (lost >> 1 & 1) - (lost >> 2 & 1));
        fixture_close(&g);
        free(cut);
    }
    free(image);
    free(now);
    fixture_end(&g);
    fixture_end(&f);
}

/* A body may hold the bytes of records: copies of real ones, ones made with everything but the secret. The record that
 * carries them is damaged, so that recovery searches its inside. */
static void nothing_inside_a_payload_is_taken_for_a_record(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t real, carrier = 0;
    CHECK_EQ(put(p, 1, 4, 100, &real), GW_OK);
    follow(f.log);
    uint8_t *body = calloc(1, 8192);
    CHECK(body);
    for (unsigned at = 0; at + 512 <= 8192; at += 512) {
        uint64_t place = real + TEN_SIZE + GW_RECORD_HEADER_BYTES + at; /* where it is going to stand */
        memcpy(body + at, f.log->ring + real, TEN_SIZE);                /* a copy of a real record */
        gw_header *forged = (gw_header *)(void *)(body + at + 256);
        *forged = (gw_header){.epoch = f.log->shared->epoch, .size = 128, .seq = 666, .body_bytes = 64};
        place += 256;
        forged->crc = gw_record_crc(forged, (uint8_t *)(forged + 1), place);
        uint64_t guess = at % 2048;
        forged->marker = guess == 0 ? place : guess == 512 ? place ^ gw_mix((uint64_t[2]){0, 0}, forged->epoch)
                                          : guess == 1024  ? (place ^ *(uint64_t *)(void *)body)
                                                           : *(uint64_t *)(void *)body;
    }
    gw_event event = {.device_id = body, .body = body, .body_bytes = 8192, .seq = 2};
    CHECK_EQ(gw_producer_append(p, &event, &carrier), GW_OK);
    CHECK_EQ(carrier, real + TEN_SIZE);
    CHECK_EQ(put(p, 3, 4, 100, NULL), GW_OK);
    follow(f.log);
    gw_producer_close(p);
    fixture_close(&f);
    uint8_t *image = image_of(&f);
    image_byte(image, carrier)[8] ^= 1;
    fixture_rewrite(&f, image);
    CHECK_EQ(fixture_open(&f, false), GW_OK);
    CHECK_EQ(f.report.records, 2);
    CHECK_EQ(f.report.torn_bytes, GW_RECORD_HEADER_BYTES + 8192);
    CHECK_SEQS(f.log, GW_FIRST_LSN, 1, 3);
    free(image);
    free(body);
    fixture_end(&f);
}

/* A copy of a record to any other place of the file, with its marker made good for that place, lacks the CRC. */
static void record_that_was_moved_is_not_accepted(void)
{
    fixture f = ten_records(0);
    uint8_t *image = image_of(&f);
    gw_identity_page *identity = (gw_identity_page *)(void *)image;
    uint64_t from = TEN_LSN(3), to = TEN_LSN(20);
    memcpy(image_byte(image, to), image_byte(image, from), TEN_SIZE);
    gw_header *moved = (gw_header *)(void *)image_byte(image, to);
    moved->marker = to ^ gw_mix(identity->secret, moved->epoch);
    fixture_rewrite(&f, image);
    CHECK_EQ(fixture_open(&f, false), GW_OK);
    CHECK_EQ(f.report.records, 10);
    free(image);
    fixture_end(&f);
}

/* Sector images of a power cut: slots of now, data of before, for two sinks that stand at different places. */
static void pads_are_cut_at_every_persisted_position(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *p = producer_of(f.log);
    uint8_t *before = image_of(&f);
    for (unsigned i = 1; i <= 10; i++)
        CHECK_EQ(put(p, i, 4, 100, NULL), GW_OK);
    follow(f.log);
    publish(f.log, 0, TEN_LSN(8));
    publish(f.log, 1, TEN_LSN(5));
    sync_now(f.log);
    gw_producer_close(p);
    fixture_close(&f);
    uint8_t *now = image_of(&f);
    memcpy(now + GW_RING_OFFSET, before + GW_RING_OFFSET, CAPACITY); /* no data reached the disk */
    fixture_rewrite(&f, now);
    for (int crash = 0; crash < 3; crash++) {
        CHECK_EQ(fixture_open(&f, false), GW_OK);
        CHECK_EQ(gw_cursor_load(f.log, 0).lsn, TEN_LSN(8));
        CHECK_EQ(gw_cursor_load(f.log, 1).lsn, TEN_LSN(5));
        CHECK_EQ(f.report.start, TEN_LSN(8));
        p = producer_of(f.log);
        CHECK_EQ(put(p, 11 + (unsigned)crash, 4, 100, NULL), GW_OK);
        gw_producer_close(p);
        for (unsigned sink = 0; sink < 2; sink++) {
            gw_record r;
            uint64_t lsn = gw_cursor_load(f.log, sink).lsn, end = follow(f.log), n = 0;
            for (; lsn < end; lsn += r.size) {
                CHECK_EQ(gw_log_read(f.log, lsn, &r), GW_OK); /* the cursor points at a record */
                n += r.kind == GW_DATA;
            }
            CHECK_EQ(n, 1);
            CHECK_EQ(gw_log_unexplained(f.log, sink), 0);
        }
        fixture_close(&f);
        fixture_rewrite(&f, now);
    }
    free(before);
    free(now);
    fixture_end(&f);
}

static void crash_loop_needs_no_room(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t id = 0;
    while (put(p, ++id, 4, 8192 - 64 - 4, NULL) == GW_OK)
        ;
    follow(f.log);
    gw_producer_close(p);
    for (unsigned crash = 0; crash < 50; crash++) {
        NOTE("crash %u", crash);
        fixture_reopen(&f);
        CHECK_EQ(f.report.records, id - 1);
        CHECK_EQ(f.report.start, GW_FIRST_LSN + CAPACITY);
        CHECK_EQ(f.report.epoch, 3 + crash);
        CHECK(f.log->shared->epochs <= 3);
    }
    CHECK_EQ(publish(f.log, 0, gw_log_committed(f.log)), id - 1);
    sync_now(f.log);
    p = producer_of(f.log);
    CHECK_EQ(put(p, id, 4, 100, NULL), GW_OK);
    gw_producer_close(p);
    fixture_end(&f);
}

/* More epochs than the table has ranges, all of them in the log at once. */
static void fifty_crashes_with_writes_keep_every_record(void)
{
    fixture f = fixture_new();
    for (unsigned crash = 1; crash <= 50; crash++) {
        NOTE("crash %u", crash);
        gw_producer *p = producer_of(f.log);
        CHECK_EQ(put(p, crash, 4, 100, NULL), GW_OK);
        gw_producer_close(p);
        if (crash % 3 == 0) {
            follow(f.log);
            sync_now(f.log);
        }
        fixture_reopen(&f);
        CHECK_EQ(f.report.records, crash);
        CHECK_EQ(f.report.torn_bytes + f.report.corrupt_bytes, 0);
    }
    CHECK_EQ(publish(f.log, 0, gw_log_committed(f.log)), 50);
    CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
    fixture_end(&f);
}

/* A power cut spares the marker's sector and takes the rest: the next run claims the same place. */
static void marker_that_survived_a_cut_commits_nothing_in_the_next_run(void)
{
    fixture f = fixture_new();
    uint8_t *before = image_of(&f);
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 0, 512 * 6 - 64, NULL), GW_OK);
    gw_producer_close(p);
    fixture_close(&f);
    uint8_t *now = image_of(&f);
    memcpy(image_byte(before, GW_FIRST_LSN), image_byte(now, GW_FIRST_LSN), 512);
    fixture_rewrite(&f, before);
    CHECK_EQ(fixture_open(&f, false), GW_OK);
    CHECK_EQ(f.report.records, 0);
    CHECK_EQ(gw_log_tail(f.log), GW_FIRST_LSN);
    /* claimed, nothing stored yet */
    uint64_t tail = GW_FIRST_LSN + 512 * 6;
    p = producer_of(f.log);
    atomic_store(&p->intent->len, 512 * 6);
    atomic_store(&p->intent->pos, GW_FIRST_LSN);
    atomic_store(&f.log->shared->tail, tail);
    CHECK_EQ(follow(f.log), GW_FIRST_LSN);
    CHECK_EQ(gw_log_state(f.log), GW_RUNNING);
    gw_producer_close(p);
    free(before);
    free(now);
    fixture_end(&f);
}

/* Every process died while one claim was half-written: what was committed behind it was answered 202. */
static void records_behind_a_half_written_claim_are_recovered(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    atomic_fetch_add(&f.log->shared->tail, 4096); /* the claim of one that wrote nothing */
    CHECK_EQ(put(p, 2, 4, 100, NULL), GW_OK);
    CHECK_EQ(put(p, 3, 4, 100, NULL), GW_OK);
    gw_producer_close(p);
    fixture_reopen(&f);
    CHECK_EQ(f.report.records, 3);
    CHECK_EQ(f.report.torn_bytes, 4096);
    CHECK_SEQS(f.log, GW_FIRST_LSN, 1, 2, 3);
    fixture_end(&f);
}

static void scan_finds_what_recovery_would_find(void)
{
    fixture f = ten_records(8);
    uint8_t *image = image_of(&f), *after;
    image_byte(image, TEN_LSN(3))[70] ^= 1;
    fixture_rewrite(&f, image);
    gw_log *log;
    CHECK_EQ(gw_log_scan(f.path, &log, &f.report, &f.error), GW_OK);
    CHECK_EQ(f.report.corrupt_count, 1);
    CHECK_EQ(f.report.records, 9);
    CHECK_EQ(gw_log_committed(log), TEN_LSN(11));
    gw_record r;
    CHECK_EQ(gw_log_read(log, TEN_LSN(3), &r), GW_CORRUPT);
    CHECK_EQ(gw_log_read(log, TEN_LSN(4), &r), GW_OK);
    after = image_of(&f);
    CHECK(memcmp(image, after, FILE_BYTES) == 0);
    gw_log_close(log);
    free(image);
    free(after);
    fixture_end(&f);
}

static void scan_counts_from_the_least_cursor(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *p = producer_of(f.log);
    for (unsigned i = 1; i <= 10; i++)
        CHECK_EQ(put(p, i, 4, 100, NULL), GW_OK);
    follow(f.log);
    publish(f.log, 0, TEN_LSN(8)); /* sink 0 is ahead of sink 1 */
    publish(f.log, 1, TEN_LSN(5));
    settle(f.log);
    gw_producer_close(p);
    gw_log *log;
    CHECK_EQ(gw_log_scan(f.path, &log, &f.report, &f.error), GW_OK); /* of a log in use */
    CHECK_EQ(gw_log_committed_ordinal(log), 10);
    CHECK_EQ(gw_log_unexplained(log, 0), 0);
    CHECK_EQ(gw_log_unexplained(log, 1), 0);
    gw_log_close(log);
    fixture_end(&f);
}

/* A record of an epoch that never owned its position is not shown by read either. */
static void read_refuses_an_epoch_that_does_not_own_the_position(void)
{
    fixture f = ten_records(0);
    CHECK_EQ(fixture_open(&f, false), GW_OK); /* epoch 3 starts at TEN_LSN(11); 1 to 10 are of epoch 2 */
    gw_record r;
    CHECK_EQ(gw_log_read(f.log, TEN_LSN(3), &r), GW_OK);
    gw_header *header = (gw_header *)(void *)(f.log->ring + TEN_LSN(3));
    header->epoch = 3;
    header->crc = gw_record_crc(header, (uint8_t *)(header + 1), TEN_LSN(3));
    header->marker = TEN_LSN(3) ^ gw_mix(f.log->shared->secret, 3);
    CHECK_EQ(gw_log_read(f.log, TEN_LSN(3), &r), GW_CORRUPT);
    fixture_end(&f);
}

/* ---- committer ------------------------------------------------------------------------------------------------ */

static void *committer_thread(void *context)
{
    gw_error error;
    return (void *)(uintptr_t)gw_log_run_committer(context, 2, &error);
}

static void committer_sleeps_when_nothing_changes(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, committer_thread, f.log) == 0);
    for (unsigned i = 1; i <= 3; i++) {
        CHECK_EQ(put(p, i, 4, 100, NULL), GW_OK);
        uint64_t end = follow(f.log);
        for (uint64_t until = now_ms() + 5000; gw_log_durable(f.log) < end;) {
            CHECK(now_ms() < until);
            usleep(500);
        }
        publish(f.log, 0, end);
        for (uint64_t until = now_ms() + 5000; gw_log_reclaim(f.log) < end;) {
            CHECK(now_ms() < until);
            usleep(500);
        }
    }
    unsigned before, after = atomic_load(&fdatasyncs);
    uint64_t until = now_ms() + 10000;
    do { /* two looks 100 ms apart with no sync between */
        CHECK(now_ms() < until);
        before = after;
        usleep(100000);
        after = atomic_load(&fdatasyncs);
    } while (before != after);
    gw_log_stop_committer(f.log);
    void *status;
    CHECK(pthread_join(thread, &status) == 0);
    CHECK_EQ((uintptr_t)status, GW_OK);
    gw_producer_close(p);
    fixture_end(&f);
}

/* The committer of a delivery process that was told to stop says nothing about the next one's. */
static void stopping_one_committer_does_not_stop_the_next(void)
{
    fixture f = fixture_new();
    gw_log *first = fixture_attach(&f), *second = fixture_attach(&f);
    gw_error error;
    gw_log_stop_committer(first);
    CHECK_EQ(gw_log_run_committer(first, 2, &error), GW_OK);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, committer_thread, second) == 0);
    gw_producer *p = producer_of(f.log);
    usleep(20000);
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    uint64_t end = follow(f.log);
    for (uint64_t until = now_ms() + 5000; gw_log_durable(f.log) < end;) {
        CHECK(now_ms() < until);
        usleep(500);
    }
    gw_log_stop_committer(second);
    CHECK(pthread_join(thread, NULL) == 0);
    gw_producer_close(p);
    gw_log_close(first);
    gw_log_close(second);
    fixture_end(&f);
}

static int fail_once(int fd)
{
    (void)fd;
    on_fdatasync = NULL; /* the kernel tells an error once */
    errno = EIO;
    return -1;
}

static void failed_sync_is_final(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    uint64_t durable = gw_log_durable(f.log);
    follow(f.log);
    on_fdatasync = fail_once;
    bool changed;
    CHECK_EQ(gw_log_sync(f.log, &changed, &f.error), GW_FAILED);
    CHECK_EQ(f.error.error_number, EIO);
    CHECK_EQ(gw_log_state(f.log), GW_STATE_FAILED);
    CHECK_EQ(gw_log_sync(f.log, &changed, &f.error), GW_FAILED);
    CHECK_EQ(gw_log_durable(f.log), durable);
    CHECK_EQ(put(p, 2, 4, 100, NULL), GW_CLOSED);
    gw_log *next = fixture_attach(&f);
    CHECK_EQ(gw_log_takeover(next, &f.error), GW_FAILED);
    gw_log_close(next);
    gw_producer_close(p);
    fixture_end(&f);
}

static int witness_fd;

static int fail_at_the_witness(int fd)
{
    struct stat a, b;
    /* the same file: what tells them apart is the open file description */
    CHECK(fstat(fd, &a) == 0 && fstat(witness_fd, &b) == 0 && a.st_ino == b.st_ino);
    if (fd != witness_fd)
        return 0; /* opened after the error was told: hears nothing */
    errno = EIO;
    return -1;
}

static void error_that_a_dead_committer_did_not_report_is_found_at_takeover(void)
{
    fixture f = fixture_new();
    gw_log *next = fixture_attach(&f);
    witness_fd = next->fd_lock;
    on_fdatasync = fail_at_the_witness;
    CHECK_EQ(gw_log_takeover(next, &f.error), GW_FAILED);
    CHECK_EQ(gw_log_state(f.log), GW_STATE_FAILED);
    on_fdatasync = NULL;
    gw_log_close(next);
    fixture_end(&f);
}

static void shared_words_are_not_in_the_log_file(void)
{
    fixture f = fixture_new();
    struct stat log, shared;
    CHECK(fstat(f.fd, &log) == 0 && fstat(gw_log_fd_shared(f.log), &shared) == 0);
    CHECK(log.st_ino != shared.st_ino);
    CHECK_EQ(shared.st_nlink, 0);
    CHECK(fcntl(gw_log_fd_shared(f.log), F_GET_SEALS) >= 0); /* memory, of memfd_create */
    fixture_end(&f);
}

/* ---- forced interleavings ------------------------------------------------------------------------------------- */

#ifdef GW_FAILPOINTS

static void dead_intent_at_the_claim_of_a_living_one_is_not_padded(void)
{
    fixture f = fixture_new();
    halted dead, living;
    halted_start(&dead, f.log, "after_intent", 1, 100);
    halted_start(&living, f.log, "mid_copy", 2, 300);
    halted_kill(&dead, true);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(follow(f.log), GW_FIRST_LSN);
    CHECK_EQ(halted_finish(&living), GW_OK);
    CHECK_SEQS(f.log, GW_FIRST_LSN, 2);
    CHECK_EQ(gw_log_counters(f.log, GW_BLOCK_DELIVERY)->word[GW_COUNTER_PADS], 0);
    fixture_end(&f);
}

static void hole_is_as_long_as_the_claim_not_as_another_intent_at_its_place(void)
{
    /* the claim shorter than the dead intent, and longer; a living claim behind it, or the tail, or a dead claim */
    for (unsigned shape = 0; shape < 6; shape++) {
        NOTE("shape %u", shape);
        unsigned claim = shape % 2 ? 96 : 4000, intent = shape % 2 ? 4000 : 96;
        fixture f = fixture_new();
        halted a, b, c;
        halted_start(&a, f.log, "after_intent", 1, intent);
        halted_start(&b, f.log, "after_claim", 2, claim);
        if (shape / 2)
            halted_start(&c, f.log, "before_marker", 3, 50);
        halted_kill(&a, true);
        halted_kill(&b, true);
        if (shape / 2 == 2)
            halted_kill(&c, true);
        uint64_t end = GW_FIRST_LSN + record_size(0, claim);
        if (shape / 2 == 1) {
            CHECK_EQ(follow(f.log), end);
            CHECK_EQ(halted_finish(&c), GW_OK);
            CHECK_SEQS(f.log, GW_FIRST_LSN, 3);
        } else {
            CHECK_EQ(follow(f.log), end);
            CHECK_EQ(follow(f.log), gw_log_tail(f.log));
        }
        gw_record r;
        CHECK_EQ(gw_log_read(f.log, GW_FIRST_LSN, &r), GW_OK);
        CHECK_EQ(r.kind, GW_PAD);
        CHECK_EQ(r.size, record_size(0, claim));
        fixture_end(&f);
    }
}

static void unmarked_death_is_not_padded(void)
{
    fixture f = fixture_new();
    halted h;
    halted_start(&h, f.log, "mid_copy", 1, 300);
    unsigned slot = (unsigned)(h.producer->intent - f.log->shared->intent);
    halted_kill(&h, false);
    CHECK_EQ(follow(f.log), GW_FIRST_LSN);
    gw_log_owner_died(f.log, NOBODY);
    CHECK_EQ(follow(f.log), gw_log_tail(f.log));
    follow(f.log);
    CHECK_EQ(atomic_load(&f.log->shared->intent[slot].owner), 0);
    fixture_end(&f);
}

static void dead_slot_is_not_reused_while_its_claim_is_a_hole(void)
{
    fixture f = fixture_new();
    halted first, dead;
    halted_start(&first, f.log, "mid_copy", 1, 300); /* lives, and keeps the walk below the other one's hole */
    halted_start(&dead, f.log, "mid_copy", 2, 200);
    unsigned slot = (unsigned)(dead.producer->intent - f.log->shared->intent);
    halted_kill(&dead, true);
    CHECK_EQ(follow(f.log), GW_FIRST_LSN);
    CHECK(atomic_load(&f.log->shared->intent[slot].owner) & GW_OWNER_DEAD);
    gw_producer *restarted = producer_of(f.log);
    CHECK(restarted->intent != &f.log->shared->intent[slot]);
    CHECK_EQ(put(restarted, 3, 4, 100, NULL), GW_OK);
    CHECK_EQ(halted_finish(&first), GW_OK);
    CHECK_SEQS(f.log, GW_FIRST_LSN, 1, 3);
    follow(f.log);
    CHECK_EQ(atomic_load(&f.log->shared->intent[slot].owner), 0);
    gw_producer_close(restarted);
    fixture_end(&f);
}

/* A slot whose owner died before it had claimed anything: its intent lies at the tail. */
static void dead_slot_with_an_intent_at_the_tail_is_freed(void)
{
    fixture f = fixture_new();
    halted h;
    halted_start(&h, f.log, "after_intent", 1, 300);
    unsigned slot = (unsigned)(h.producer->intent - f.log->shared->intent);
    halted_kill(&h, true);
    follow(f.log);
    CHECK_EQ(atomic_load(&f.log->shared->intent[slot].owner), 0);
    CHECK_EQ(atomic_load(&f.log->shared->intent[slot].pos), GW_POSITION_NONE);
    fixture_end(&f);
}

static halted late;
static fixture *late_fixture;

/* The follower is about to free slots; meanwhile a producer claims, dies, and is marked dead. */
static void claim_and_die(const char *name)
{
    if (strcmp(name, "before_free") != 0) {
        halted_hook(name);
        return;
    }
    halted_start(&late, late_fixture->log, "mid_copy", 5, 300);
    halted_kill(&late, true);
    gw_failpoint_hook = NULL;
}

static void slot_of_a_claim_made_while_slots_are_freed_is_kept(void)
{
    fixture f = fixture_new();
    late_fixture = &f;
    gw_failpoint_hook = claim_and_die;
    follow(f.log);
    CHECK(gw_log_tail(f.log) > GW_FIRST_LSN);
    CHECK_EQ(follow(f.log), gw_log_tail(f.log)); /* the hole has an owner, and is filled */
    CHECK_EQ(gw_log_state(f.log), GW_RUNNING);
    fixture_end(&f);
}

static void full_verdict_takes_the_intent_back(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log), *q = producer_of(f.log);
    uint64_t id = 0;
    while (put(p, ++id, 4, 8192 - 64 - 4, NULL) == GW_OK)
        ;
    publish(f.log, 0, follow(f.log));
    settle(f.log);
    /* p loses its CAS to q, which fills the log: p's intent stands at q's claim until p takes it back */
    uint64_t tail = gw_log_tail(f.log);
    atomic_store(&p->intent->len, 96);
    atomic_store(&p->intent->pos, tail);
    atomic_store(&f.log->shared->reclaim, tail - CAPACITY + 8192);
    CHECK_EQ(put(q, 7, 4, 8192 - 64 - 4, NULL), GW_OK);
    CHECK_EQ(put(p, 8, 4, 100, NULL), GW_FULL);
    CHECK_EQ(atomic_load(&p->intent->pos), GW_POSITION_NONE);
    gw_producer_close(p);
    gw_producer_close(q);
    fixture_end(&f);
}

static gw_log *failing;

static void fail_before_the_marker(const char *name)
{
    if (strcmp(name, "before_marker") == 0)
        gw_log_set_state(failing, GW_STATE_FAILED);
}

static void state_that_failed_during_the_copy_gives_no_ok(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    failing = f.log;
    gw_failpoint_hook = fail_before_the_marker;
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_FAILED);
    gw_failpoint_hook = NULL;
    gw_producer_close(p);
    fixture_end(&f);
}

static jmp_buf committer_died;
static const char *committer_dies_at;

static void committer_hook(const char *name)
{
    if (strcmp(name, committer_dies_at) == 0)
        longjmp(committer_died, 1);
}

/* One sync that ends at a fail point. */
static void sync_dies_at(gw_log *log, const char *point)
{
    committer_dies_at = point;
    gw_failpoint_hook = committer_hook;
    if (!setjmp(committer_died)) {
        sync_now(log);
        CHECK(!"reached");
    }
    gw_failpoint_hook = NULL;
}

/* The committer dies anywhere; the next one takes over; the power fails while its first slot is on the way. One slot
 * is whole in every such image. */
static void one_slot_is_whole_after_a_committer_died_at(const char *point)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    for (unsigned i = 1; i <= 4; i++) {
        CHECK_EQ(put(p, i, 4, 100, NULL), GW_OK);
        publish(f.log, 0, follow(f.log));
        sync_now(f.log);
    }
    CHECK_EQ(put(p, 5, 4, 100, NULL), GW_OK);
    follow(f.log);
    sync_dies_at(f.log, point);
    uint64_t reclaim = gw_log_reclaim(f.log);
    gw_log *next = fixture_attach(&f);
    CHECK_EQ(gw_log_takeover(next, &f.error), GW_OK);
    uint8_t *synced = image_of(&f);
    sync_dies_at(next, "after_slot"); /* the power fails before this sync returns */
    uint8_t *now = image_of(&f), *cut = malloc(FILE_BYTES);
    CHECK(cut);
    for (unsigned sectors = 0; sectors < 256; sectors += sectors < 8 ? 1 : 31) {
        NOTE("%s, sectors %#x", point, sectors);
        memcpy(cut, synced, FILE_BYTES);
        for (unsigned at = GW_PAGE; at < 3 * GW_PAGE; at += 512)
            if (sectors >> (at / 512 % 8) & 1)
                memcpy(cut + at, now + at, 512);
        fixture g = fixture_on(cut, MQTT);
        CHECK_EQ(fixture_open(&g, false), GW_OK);
        CHECK(gw_log_reclaim(g.log) >= reclaim);
        fixture_end(&g);
    }
    gw_producer_close(p);
    gw_log_close(next);
    free(synced);
    free(now);
    free(cut);
    fixture_end(&f);
}

static void one_slot_is_whole_after_a_committer_died_at_any_point(void)
{
    static const char *const points[] = {"before_slot", "mid_slot", "after_slot", "after_sync", "after_durable"};
    for (unsigned k = 0; k < 5; k++)
        one_slot_is_whole_after_a_committer_died_at(points[k]);
}

#endif

/* ---- threads -------------------------------------------------------------------------------------------------- */

enum { PRODUCERS = 3 };

typedef struct crowd {
    gw_log *log;
    _Atomic unsigned running;
    unsigned events;
    uint64_t last[PRODUCERS];
} crowd;

typedef struct crowd_member {
    crowd *crowd;
    unsigned index;
} crowd_member;

static void *crowd_produce(void *context)
{
    crowd_member *me = context;
    gw_producer *p = producer_of(me->crowd->log);
    uint64_t random = me->index + 1;
    for (uint64_t n = 1; n <= me->crowd->events;) {
        random = scramble(random);
        unsigned body = random % 16 ? random % 300 : random % 9000;
        gw_status status = put(p, n * PRODUCERS + me->index, (unsigned)(random >> 32) % 20, body, NULL);
        if (status == GW_OK)
            n++;
        else {
            CHECK_EQ(status, GW_FULL);
            usleep(200);
        }
    }
    gw_producer_close(p);
    atomic_fetch_sub(&me->crowd->running, 1);
    gw_log_wake(me->crowd->log);
    return NULL;
}

/* Reads behind the follower, as the publisher does, and checks every byte and every producer's order. */
static void *crowd_read(void *context)
{
    crowd *c = context;
    gw_cursor cursor = gw_cursor_load(c->log, 0);
    for (unsigned idle = 0;;) {
        gw_record r;
        bool over = atomic_load(&c->running) == 0 && gw_log_committed(c->log) == gw_log_tail(c->log);
        gw_status status = gw_log_read(c->log, cursor.lsn, &r);
        if (status == GW_EMPTY) {
            gw_cursor_store(c->log, 0, &cursor);
            if (over)
                return NULL;
            usleep(idle++ % 8 ? 50 : 500);
            continue;
        }
        CHECK_EQ(status, GW_OK);
        CHECK_EQ(r.kind, GW_DATA);
        CHECK(is_sample(&r));
        unsigned producer = r.seq % PRODUCERS;
        CHECK_EQ(r.seq / PRODUCERS, c->last[producer] + 1);
        c->last[producer]++;
        cursor.lsn += r.size;
        cursor.ordinal++;
        cursor.published++;
        if (cursor.published % 64 == 0)
            gw_cursor_store(c->log, 0, &cursor);
    }
}

static void *crowd_follow(void *context)
{
    crowd *c = context;
    while (atomic_load(&c->running) || gw_log_committed(c->log) != gw_log_tail(c->log))
        gw_log_follow(c->log, gw_log_committed(c->log), 100);
    return NULL;
}

static void producers_follower_committer_and_reader_agree_over_many_laps(void)
{
    fixture f = fixture_new();
    crowd c = {.log = f.log, .running = PRODUCERS, .events = (unsigned)environment_number("GW_CROWD_EVENTS", 6000)};
    pthread_t producer[PRODUCERS], reader, follower, committer;
    crowd_member member[PRODUCERS];
    CHECK(pthread_create(&committer, NULL, committer_thread, f.log) == 0);
    CHECK(pthread_create(&follower, NULL, crowd_follow, &c) == 0);
    CHECK(pthread_create(&reader, NULL, crowd_read, &c) == 0);
    for (unsigned i = 0; i < PRODUCERS; i++) {
        member[i] = (crowd_member){&c, i};
        CHECK(pthread_create(&producer[i], NULL, crowd_produce, &member[i]) == 0);
    }
    for (unsigned i = 0; i < PRODUCERS; i++)
        CHECK(pthread_join(producer[i], NULL) == 0);
    CHECK(pthread_join(follower, NULL) == 0);
    CHECK(pthread_join(reader, NULL) == 0);
    gw_log_stop_committer(f.log);
    CHECK(pthread_join(committer, NULL) == 0);
    for (unsigned i = 0; i < PRODUCERS; i++)
        CHECK_EQ(c.last[i], c.events);
    CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
    CHECK_EQ(gw_log_durable(f.log), gw_log_tail(f.log));
    CHECK_EQ(gw_log_reclaim(f.log), gw_log_tail(f.log));
    fixture_end(&f);
}

/* ---------------------------------------------------------------------------------------------------------------- */

#define T(name) {#name, name}
static const test TESTS[] = {
    T(every_length_reads_back_every_byte),
    T(record_runs_over_the_ring_end_at_every_alignment),
    T(record_at_the_size_limit_is_taken),
    T(record_one_past_the_size_limit_leaves_nothing),
    T(full_is_a_verdict_that_leaves_nothing),
    T(reclaim_moves_only_after_the_sync_that_persists_the_cursor),
    T(reclaim_is_the_cursor_in_the_slot_not_the_one_that_moved_meanwhile),
    T(durable_covers_only_what_was_committed_before_the_sync),
    T(log_without_sinks_reclaims_no_further_than_the_persisted_watermark),
    T(draining_log_is_closed),
    T(failed_state_is_final),
    T(sixty_fifth_producer_finds_no_slot),
    T(read_refuses_what_is_no_record),
    T(read_notices_any_flipped_byte),
    T(new_sink_starts_at_the_end),
    T(known_sink_keeps_its_place),
    T(removed_sink_is_refused_by_name),
    T(ninth_sink_is_refused),
    T(books_balance),
    T(publisher_that_skips_a_record_shows_exactly_one),
    T(dead_lettered_events_are_explained),
    T(crc32c_paths_agree),
    T(second_gateway_is_locked_out),
    T(lock_lives_as_long_as_anyone_who_maps_the_log),
    T(lock_of_another_file_is_refused),
    T(shared_memory_of_another_log_is_refused),
    T(shared_memory_of_something_else_is_refused),
    T(create_leaves_nothing_when_it_is_stopped),
    T(damaged_identity_page_is_not_a_log),
    T(whole_records_are_accepted),
    T(hole_above_the_watermark_is_torn),
    T(hole_below_the_watermark_is_corruption),
    T(hole_across_the_watermark_is_corrupt_below_it_only),
    T(missing_end_below_the_watermark_is_corruption),
    T(more_damage_than_the_report_can_list_is_counted),
    T(torn_record_is_skipped_at_every_byte),
    T(torn_slot_page_falls_back_to_the_other),
    T(former_laps_never_come_back),
    T(nothing_inside_a_payload_is_taken_for_a_record),
    T(record_that_was_moved_is_not_accepted),
    T(pads_are_cut_at_every_persisted_position),
    T(crash_loop_needs_no_room),
    T(fifty_crashes_with_writes_keep_every_record),
    T(marker_that_survived_a_cut_commits_nothing_in_the_next_run),
    T(records_behind_a_half_written_claim_are_recovered),
    T(scan_finds_what_recovery_would_find),
    T(scan_counts_from_the_least_cursor),
    T(read_refuses_an_epoch_that_does_not_own_the_position),
    T(committer_sleeps_when_nothing_changes),
    T(stopping_one_committer_does_not_stop_the_next),
    T(failed_sync_is_final),
    T(error_that_a_dead_committer_did_not_report_is_found_at_takeover),
    T(shared_words_are_not_in_the_log_file),
#ifdef GW_FAILPOINTS
    T(dead_intent_at_the_claim_of_a_living_one_is_not_padded),
    T(hole_is_as_long_as_the_claim_not_as_another_intent_at_its_place),
    T(unmarked_death_is_not_padded),
    T(dead_slot_is_not_reused_while_its_claim_is_a_hole),
    T(dead_slot_with_an_intent_at_the_tail_is_freed),
    T(slot_of_a_claim_made_while_slots_are_freed_is_kept),
    T(full_verdict_takes_the_intent_back),
    T(state_that_failed_during_the_copy_gives_no_ok),
    T(one_slot_is_whole_after_a_committer_died_at_any_point),
#endif
    T(producers_follower_committer_and_reader_agree_over_many_laps),
};

int main(int argc, char **argv)
{
    return run_tests(TESTS, sizeof TESTS / sizeof *TESTS, argc, argv);
}
