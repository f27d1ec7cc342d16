/* test_log_resize.c - the log with another capacity, and the search for whole records.
 *
 * Sources: _native/gw_log*.c _native/gw_crc32c.c */
#include "log_fixture.h"

#define MIB (1ull << 20)

static const char *new_path(void)
{
    static char path[256];
    const char *directory = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/gw-resized-%d.log", directory ? directory : "/tmp", (int)getpid());
    unlink(path);
    return path;
}

static gw_log *scanned(const char *path, gw_recovery *found)
{
    gw_log *log;
    gw_error error;
    CHECK_EQ(gw_log_scan(path, &log, found, &error), GW_OK);
    return log;
}

/* The file at `path` as a fixture. */
static fixture fixture_at(const char *path)
{
    fixture f = {.fd = open(path, O_RDWR | O_CLOEXEC), .fd_lock = -1, .sinks = MQTT};
    CHECK(f.fd >= 0);
    snprintf(f.path, sizeof f.path, "/proc/self/fd/%d", f.fd);
    return f;
}

static fixture resized(const char *from, uint64_t capacity, uint64_t *start)
{
    const char *path = new_path();
    gw_recovery found;
    gw_error error;
    gw_log *log = scanned(from, &found);
    CHECK_EQ(gw_log_resize(log, &found, path, capacity, NULL, NULL, start, &error), GW_OK);
    gw_log_close(log);
    fixture f = fixture_at(path);
    unlink(path); /* the descriptor keeps it */
    struct stat stat;
    CHECK(fstat(f.fd, &stat) == 0);
    CHECK_EQ(stat.st_size, GW_RING_OFFSET + capacity);
    return f;
}

/* Records whose seqs are first ... last, the finished ones included; each byte of theirs. */
static void check_all(const char *path, uint64_t from, uint64_t first, uint64_t last)
{
    gw_recovery found;
    gw_log *log = scanned(path, &found);
    uint8_t *buffer = malloc(gw_log_record_bytes_max(log));
    CHECK(buffer);
    uint64_t seq = first, p = from;
    gw_record r;
    while (gw_log_next(log, p, UINT64_MAX, buffer, &r) == GW_OK) {
        CHECK_EQ(r.lsn, p); /* none is missing */
        if (r.kind == GW_DATA) {
            CHECK_EQ(r.seq, seq++);
            CHECK(is_sample(&r));
        }
        p = r.lsn + r.size;
    }
    CHECK_EQ(p, found.end);
    CHECK_EQ(seq, last + 1);
    free(buffer);
    gw_log_close(log);
}

/* Some finished, then some waiting records, the last of them `before` bytes over a lap's end; synced. */
static uint64_t write_some(fixture *f, uint64_t end, uint64_t *waits)
{
    gw_producer *p = producer_of(f->log);
    advance_to(f->log, p, end - 30000);
    uint64_t id = 1;
    for (; id <= 20; id++)
        CHECK_EQ(put(p, id, id % 17, 600, NULL), GW_OK);
    publish(f->log, 0, follow(f->log));
    *waits = gw_log_tail(f->log);
    for (; gw_log_tail(f->log) < end + 100; id++)
        CHECK_EQ(put(p, id, id % 17, 300 + id % 90, NULL), GW_OK);
    follow(f->log);
    settle(f->log);
    gw_producer_close(p);
    return id - 1;
}

static void every_record_keeps_its_place_in_any_size(void)
{
    for (unsigned shift = 0; shift < 200; shift += 8) {
        NOTE("shifted by %u", shift);
        fixture f = fixture_new();
        uint64_t waits, from;
        uint64_t last = write_some(&f, 3 * CAPACITY + shift, &waits); /* over the end of both rings' laps */
        uint64_t identity = gw_log_identity(f.log), end = gw_log_tail(f.log);
        fixture_close(&f); /* not in peace: no last sync */

        fixture larger = resized(f.path, 4 * CAPACITY, &from);
        CHECK(from < waits && from + CAPACITY >= end);
        fixture smaller = resized(larger.path, CAPACITY, &from);
        CHECK(from < waits && from + CAPACITY >= end);
        fixture *each[] = {&larger, &smaller};
        for (unsigned i = 0; i < 2; i++) {
            gw_recovery found;
            gw_log *log = scanned(each[i]->path, &found);
            gw_cursor cursor = gw_cursor_load(log, 0);
            CHECK_EQ(cursor.lsn, waits);
            gw_log_close(log);
            /* all that waits, and what is finished just below */
            check_all(each[i]->path, waits, 21, last);
            CHECK_EQ(fixture_open(each[i], false), GW_OK);
            CHECK_EQ(gw_log_identity(each[i]->log), identity);
            CHECK_EQ(each[i]->report.records, last - 20);
            CHECK_EQ(each[i]->report.end, end);
            CHECK_EQ(gw_log_unexplained(each[i]->log, 0), 0);
            /* written over long ago; in the larger file its place is empty */
            CHECK_EQ(gw_log_state_of(each[i]->log, GW_FIRST_LSN), GW_RECEIPT_FINISHED);
            CHECK_EQ(publish(each[i]->log, 0, gw_log_committed(each[i]->log)), last - 20);
            gw_producer *p = producer_of(each[i]->log); /* and it goes on, over the end again */
            advance_to(each[i]->log, p, 5 * CAPACITY);
            gw_producer_close(p);
            fixture_end(each[i]);
        }
        fixture_end(&f);
    }
}

static void torn_places_are_copied_as_they_are(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t lsn[6];
    for (unsigned i = 0; i < 6; i++) {
        CHECK_EQ(put(p, i + 1, 5, 200, &lsn[i]), GW_OK);
        if (i == 1)
            settle((follow(f.log), f.log)); /* 1 and 2 are below the watermark */
    }
    gw_producer_close(p);
    fixture_close(&f);
    uint8_t *image = image_of(&f);
    *image_byte(image, lsn[3] + 100) ^= 1;
    fixture_rewrite(&f, image);
    uint64_t from;
    fixture larger = resized(f.path, 2 * CAPACITY, &from);
    CHECK_EQ(fixture_open(&larger, false), GW_OK);
    CHECK_EQ(larger.report.records, 5);
    CHECK_EQ(larger.report.torn_bytes, record_size(5, 200));
    CHECK_SEQS(larger.log, lsn[0], 1, 2, 3, 5, 6);
    uint64_t lost = larger.log->shared->lost_from[larger.log->shared->epochs - 2];
    CHECK_EQ(lost, lsn[3]);
    fixture_close(&larger);
    fixture again = resized(larger.path, 4 * CAPACITY, &from);
    gw_recovery found;
    gw_log *log = scanned(again.path, &found);
    CHECK_EQ(log->shared->lost_from[log->shared->epochs - 2], lost);
    gw_log_close(log);
    fixture_end(&again);
    fixture_end(&larger);
    free(image);
    fixture_end(&f);
}

static gw_status try_resize(const char *from, uint64_t capacity, gw_error *error)
{
    const char *path = new_path();
    gw_recovery found;
    uint64_t start;
    gw_log *log = scanned(from, &found);
    gw_status status = gw_log_resize(log, &found, path, capacity, NULL, NULL, &start, error);
    gw_log_close(log);
    if (status != GW_OK)
        CHECK(access(path, F_OK) != 0); /* nothing is left */
    unlink(path);
    return status;
}

static void what_waits_must_fit_to_the_byte(void)
{
    fixture f = fixture_new();
    uint64_t from;
    fixture larger = resized(f.path, 2 * CAPACITY, &from);
    CHECK_EQ(fixture_open(&larger, false), GW_OK);
    gw_producer *p = producer_of(larger.log);
    for (unsigned i = 0; i < CAPACITY / 8192; i++)
        CHECK_EQ(put(p, i + 1, 4, 8192 - 64 - 4, NULL), GW_OK);
    follow(larger.log);
    settle(larger.log);
    gw_error error;
    CHECK_EQ(try_resize(larger.path, CAPACITY, &error), GW_OK); /* full, but it fits */
    CHECK_EQ(put(p, 999, 0, 0, NULL), GW_OK);
    follow(larger.log);
    settle(larger.log);
    uint8_t before[64], after[64];
    CHECK(pread(larger.fd, before, 64, GW_PAGE) == 64);
    CHECK_EQ(try_resize(larger.path, CAPACITY, &error), GW_FULL);
    CHECK(strstr(error.text, "1048640 bytes wait"));
    CHECK(pread(larger.fd, after, 64, GW_PAGE) == 64 && memcmp(before, after, 64) == 0);
    gw_producer_close(p);
    fixture_end(&larger);
    fixture_end(&f);
}

static void record_that_is_too_large_must_be_finished(void)
{
    fixture f = fixture_new();
    uint64_t from, large, lsn;
    gw_record record;
    fixture larger = resized(f.path, 2 * CAPACITY, &from);
    CHECK_EQ(fixture_open(&larger, false), GW_OK);
    gw_producer *p = producer_of(larger.log);
    CHECK_EQ(put(p, 1, 5, 100, NULL), GW_OK);
    CHECK_EQ(put(p, 2, 0, CAPACITY / 8 - 64 + 1, &large), GW_OK); /* one byte more than the smaller ring takes */
    CHECK_EQ(put(p, 3, 5, 100, &lsn), GW_OK);
    CHECK_EQ(put(p, 4, 5, 100, NULL), GW_OK);
    follow(larger.log);
    settle(larger.log);
    gw_error error;
    CHECK_EQ(try_resize(larger.path, CAPACITY, &error), GW_TOO_LARGE);
    CHECK_EQ(error.lsn, large);
    publish(larger.log, 0, follow(larger.log));
    settle(larger.log);
    gw_producer_close(p);
    fixture_close(&larger);
    fixture smaller = resized(larger.path, CAPACITY, &from);
    CHECK_EQ(fixture_open(&smaller, false), GW_OK);
    CHECK_EQ(gw_log_oldest(smaller.log, &record), GW_OK);
    CHECK_EQ(record.lsn, GW_FIRST_LSN);
    CHECK_EQ(gw_log_state_of(smaller.log, large), GW_RECEIPT_FINISHED);
    fixture_end(&smaller);
    fixture_end(&larger);
    fixture_end(&f);
}

static void damage_below_the_watermark_is_refused(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t lsn[3];
    for (unsigned i = 0; i < 3; i++)
        CHECK_EQ(put(p, i + 1, 5, 200, &lsn[i]), GW_OK);
    follow(f.log);
    settle(f.log);
    gw_producer_close(p);
    fixture_close(&f);
    uint8_t *image = image_of(&f);
    *image_byte(image, lsn[1] + 80) ^= 4;
    fixture_rewrite(&f, image);
    gw_error error;
    CHECK_EQ(try_resize(f.path, 2 * CAPACITY, &error), GW_CORRUPT);
    CHECK_EQ(error.lsn, lsn[1]);
    free(image);
    fixture_end(&f);
}

static int stop_at_once(void *context, uint64_t done)
{
    CHECK(access(context, F_OK) == 0);
    return done == 0;
}

static void stopped_copy_is_taken_away(void)
{
    fixture f = fixture_new();
    const char *path = new_path();
    gw_recovery found;
    gw_error error;
    uint64_t start;
    gw_log *log = scanned(f.path, &found);
    CHECK_EQ(gw_log_resize(log, &found, path, 2 * CAPACITY, stop_at_once, (void *)path, &start, &error), GW_ERRNO);
    CHECK_EQ(error.error_number, EINTR);
    CHECK(access(path, F_OK) != 0);
    gw_log_close(log);
    fixture_end(&f);
}

/* A byte that changes on its way to the disk. */
static int damage(void *context, uint64_t done)
{
    int fd = open(context, O_WRONLY);
    CHECK(done > 0 || (fd >= 0 && pwrite(fd, "!", 1, GW_RING_OFFSET + 80) == 1));
    close(fd);
    return 0;
}

static void copy_is_read_back(void)
{
    for (unsigned finished = 0; finished < 2; finished++) {
        fixture f = fixture_new();
        const char *path = new_path();
        gw_recovery found;
        gw_error error;
        uint64_t start, waits;
        write_some(&f, 2 * CAPACITY + 40, &waits);
        if (finished) { /* where recovery does not look */
            publish(f.log, 0, follow(f.log));
            settle(f.log);
        }
        fixture_close(&f);
        gw_log *log = scanned(f.path, &found);
        CHECK_EQ(gw_log_resize(log, &found, path, 2 * CAPACITY, damage, (void *)path, &start, &error), GW_ERRNO);
        CHECK_EQ(error.error_number, EIO);
        CHECK(access(path, F_OK) != 0);
        gw_log_close(log);
        fixture_end(&f);
    }
}

static void ring_is_filled_to_the_last_byte(void)
{
    /* as much of what is finished as has room: the copy's two ends meet within a page */
    for (unsigned device = 0; device < 40; device += 8) {
        fixture f = fixture_new();
        uint64_t from;
        fixture larger = resized(f.path, 4 * CAPACITY, &from);
        CHECK_EQ(fixture_open(&larger, false), GW_OK);
        gw_producer *p = producer_of(larger.log);
        uint64_t id = 0;
        CHECK_EQ(put(p, ++id, device, 64, NULL), GW_OK);
        while (gw_log_tail(larger.log) < 3 * CAPACITY)
            CHECK_EQ(put(p, ++id, 0, 8192 - 64, NULL), GW_OK);
        publish(larger.log, 0, follow(larger.log));
        settle(larger.log);
        uint64_t end = gw_log_tail(larger.log);
        gw_producer_close(p);
        fixture_close(&larger);
        fixture smaller = resized(larger.path, CAPACITY, &from);
        CHECK_EQ(end - from, CAPACITY);
        check_all(smaller.path, from, id + 1 - CAPACITY / 8192, id);
        fixture_end(&smaller);
        fixture_end(&larger);
        fixture_end(&f);
    }
}

static void both_slots_say_the_same(void)
{
    fixture f = fixture_new();
    uint64_t from;
    fixture larger = resized(f.path, 2 * CAPACITY, &from);
    gw_slot_page slot[2];
    for (unsigned i = 0; i < 2; i++)
        CHECK(pread(larger.fd, &slot[i], GW_PAGE, (off_t)((1 + i) * GW_PAGE)) == (ssize_t)GW_PAGE);
    CHECK(slot[0].sequence + 1 == slot[1].sequence || slot[1].sequence + 1 == slot[0].sequence);
    CHECK(memcmp(&slot[0].watermark, &slot[1].watermark, GW_PAGE - offsetof(gw_slot_page, watermark)) == 0);
    fixture_end(&larger);
    fixture_end(&f);
}

static void next_finds_every_whole_record_and_no_other(void)
{
    fixture f = fixture_new();
    uint64_t waits;
    uint64_t last = write_some(&f, 2 * CAPACITY + 40, &waits);
    fixture_close(&f);
    gw_recovery found;
    gw_log *log = scanned(f.path, &found);
    uint8_t *buffer = malloc(gw_log_record_bytes_max(log));
    CHECK(buffer);
    gw_record r;
    uint64_t p = waits, lsn[4096];
    unsigned n = 0;
    for (; gw_log_next(log, p, UINT64_MAX, buffer, &r) == GW_OK; p = r.lsn + r.size)
        lsn[n++] = r.lsn;
    CHECK_EQ(n, last - 20);
    /* from every position between two records: the next one; below a limit: none */
    for (uint64_t x = lsn[0] + 1; x <= lsn[1]; x++) {
        CHECK_EQ(gw_log_next(log, x, UINT64_MAX, buffer, &r), GW_OK);
        CHECK_EQ(r.lsn, lsn[1]);
        CHECK_EQ(gw_log_next(log, x, lsn[1], buffer, &r), GW_EMPTY);
    }
    CHECK_EQ(gw_log_next(log, p, UINT64_MAX, buffer, &r), GW_EMPTY);
    gw_log_close(log);

    /* one bit anywhere in a record, and it is not there any more */
    uint8_t *image = image_of(&f);
    for (uint64_t at = lsn[2]; at < lsn[2] + 64 + 40; at++) {
        if (at >= lsn[2] + 56 && at < lsn[2] + 64)
            continue; /* dead: not in the checksum */
        *image_byte(image, at) ^= 16;
        fixture_rewrite(&f, image);
        log = scanned(f.path, &found);
        CHECK_EQ(gw_log_next(log, lsn[2], UINT64_MAX, buffer, &r), GW_OK);
        CHECK_EQ(r.lsn, lsn[3]);
        gw_log_close(log);
        *image_byte(image, at) ^= 16;
    }
    free(image);
    free(buffer);
    fixture_end(&f);
}

#define T(name)     \
    {               \
#name, name \
    }

static const test TESTS[] = {
    T(every_record_keeps_its_place_in_any_size),
    T(torn_places_are_copied_as_they_are),
    T(what_waits_must_fit_to_the_byte),
    T(record_that_is_too_large_must_be_finished),
    T(damage_below_the_watermark_is_refused),
    T(stopped_copy_is_taken_away),
    T(copy_is_read_back),
    T(ring_is_filled_to_the_last_byte),
    T(both_slots_say_the_same),
    T(next_finds_every_whole_record_and_no_other),
};

int main(int argc, char **argv)
{
    return run_tests(TESTS, sizeof TESTS / sizeof *TESTS, argc, argv);
}
