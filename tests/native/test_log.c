/* test_log.c - the log's rules one by one: append, read, reclaim, sinks, books, checksums, lock, create.
 * (Recovery: test_log_recovery.c; committer, interleavings, threads: test_log_races.c; power cuts: test_log_power.c;
 * deaths of real processes: test_log_death.c.)
 *
 * Sources: _native/gw_log*.c _native/gw_crc32c.c */
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
        CHECK_EQ(put(p, 8, 3, 50, NULL), GW_OK);
        CHECK_SEQS(f.log, CAPACITY - before, 7, 8);
        CHECK_EQ(lsn, CAPACITY - before);
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

/* Somebody wrote into the map: the walk stops instead of going astray, even where lsn + size runs over. */
static void walk_fails_on_a_size_that_cannot_be(void)
{
    static const uint64_t sizes[] = {0, 8, 65, CAPACITY, UINT64_MAX - 7, UINT64_MAX - GW_FIRST_LSN + 1};
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        NOTE("size %llu", (unsigned long long)sizes[i]);
        fixture f = fixture_new();
        gw_producer *p = producer_of(f.log);
        CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
        memcpy(f.log->ring + GW_FIRST_LSN + 16, &sizes[i], 8);
        CHECK_EQ(follow(f.log), GW_FIRST_LSN);
        CHECK_EQ(gw_log_state(f.log), GW_STATE_FAILED);
        gw_producer_close(p);
        fixture_end(&f);
    }
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
        if (i < GW_DEAD_OFFSET || i >= GW_RECORD_HEADER_BYTES)
            CHECK_EQ(gw_log_read(f.log, GW_FIRST_LSN, &r), GW_CORRUPT);
        else { /* the dead letters' marks: nothing but the mark itself means anything */
            CHECK_EQ(gw_log_read(f.log, GW_FIRST_LSN, &r), GW_OK);
            CHECK_EQ(r.dead, 0);
        }
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
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 1, 0, 100, NULL), GW_OK);
    gw_producer_close(p);
    fixture_close(&f);
    f.sinks = MQTT;
    CHECK_EQ(fixture_open(&f, false), GW_ERRNO);
    CHECK(strstr(f.error.text, "\"file\""));
    f.sinks = NO_SINKS;
    CHECK_EQ(fixture_open(&f, false), GW_ERRNO);
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
    CHECK_EQ(gw_log_open(f.path, wrong, &(gw_sinks){.names = MQTT}, false, &log, &report, &error), GW_ERRNO);
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

#define T(name)     \
    {               \
#name, name \
    }
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
    T(walk_fails_on_a_size_that_cannot_be),
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
};

int main(int argc, char **argv)
{
    return run_tests(TESTS, sizeof TESTS / sizeof *TESTS, argc, argv);
}
