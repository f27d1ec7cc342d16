/* test_log_recovery.c - each row of the table in gw_log_recover.c, and what must never be taken for a record: torn
 * ones at every byte, former laps, payloads, markers that survived a power cut.
 *
 * Sources: _native/gw_log*.c _native/gw_crc32c.c */
#include "log_fixture.h"

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
        forged->marker = guess == 0      ? place
                         : guess == 512  ? place ^ gw_mix((uint64_t[2]){0, 0}, forged->epoch)
                         : guess == 1024 ? (place ^ *(uint64_t *)(void *)body)
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

/* A whole record of an epoch that never owned its position is none. */
static void record_of_another_epoch_is_not_accepted(void)
{
    for (int epoch = 1; epoch <= 3; epoch++) { /* they are of 2 */
        fixture f = ten_records(0);
        uint8_t *image = image_of(&f);
        gw_identity_page *identity = (gw_identity_page *)(void *)image;
        gw_header *header = (gw_header *)(void *)image_byte(image, TEN_LSN(3));
        CHECK_EQ(header->epoch, 2);
        header->epoch = (uint32_t)epoch;
        header->crc = gw_record_crc(header, (uint8_t *)(header + 1), TEN_LSN(3));
        header->marker = TEN_LSN(3) ^ gw_mix(identity->secret, header->epoch);
        fixture_rewrite(&f, image);
        CHECK_EQ(fixture_open(&f, false), GW_OK);
        CHECK_EQ(f.report.records, epoch == 2 ? 10 : 9);
        free(image);
        fixture_end(&f);
    }
}

/* Sector images of a power cut: slots of now, data of before, for three sinks that stand at different places. */
static void pads_are_cut_at_every_persisted_position(void)
{
    static const char *const three[] = {"a", "b", "c", NULL};
    static const unsigned at[] = {8, 5, 10};
    fixture f = fixture_with(three);
    gw_producer *p = producer_of(f.log);
    uint8_t *before = image_of(&f);
    for (unsigned i = 1; i <= 10; i++)
        CHECK_EQ(put(p, i, 4, 100, NULL), GW_OK);
    follow(f.log);
    for (unsigned sink = 0; sink < 3; sink++)
        publish(f.log, sink, TEN_LSN(at[sink]));
    sync_now(f.log);
    gw_producer_close(p);
    fixture_close(&f);
    uint8_t *now = image_of(&f);
    memcpy(now + GW_RING_OFFSET, before + GW_RING_OFFSET, CAPACITY); /* no data reached the disk */
    fixture_rewrite(&f, now);
    for (int crash = 0; crash < 3; crash++) {
        CHECK_EQ(fixture_open(&f, false), GW_OK);
        CHECK_EQ(f.report.start, TEN_LSN(10));
        p = producer_of(f.log);
        CHECK_EQ(put(p, 11 + (unsigned)crash, 4, 100, NULL), GW_OK);
        gw_producer_close(p);
        for (unsigned sink = 0; sink < 3; sink++) {
            gw_record r;
            uint64_t lsn = gw_cursor_load(f.log, sink).lsn, end = follow(f.log), n = 0;
            CHECK_EQ(lsn, TEN_LSN(at[sink]));
            for (; lsn < end; lsn += r.size) {
                CHECK_EQ(gw_log_read(f.log, lsn, &r), GW_OK); /* the cursor points at a record */
                n += r.kind == GW_DATA;
            }
            CHECK_EQ(n, 1);
            CHECK_EQ(gw_log_unexplained(f.log, sink), 0);
            publish(f.log, sink, end);
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

#define T(name)     \
    {               \
#name, name \
    }
static const test TESTS[] = {
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
    T(record_of_another_epoch_is_not_accepted),
    T(pads_are_cut_at_every_persisted_position),
    T(crash_loop_needs_no_room),
    T(fifty_crashes_with_writes_keep_every_record),
    T(marker_that_survived_a_cut_commits_nothing_in_the_next_run),
    T(records_behind_a_half_written_claim_are_recovered),
    T(scan_finds_what_recovery_would_find),
    T(scan_counts_from_the_least_cursor),
    T(read_refuses_an_epoch_that_does_not_own_the_position),
};

int main(int argc, char **argv)
{
    return run_tests(TESTS, sizeof TESTS / sizeof *TESTS, argc, argv);
}
