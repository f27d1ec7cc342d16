/* test_log_index.c - idempotency index, receipts, marks of dead letters, water marks, waiting.
 *
 * Sources: _native/gw_log*.c _native/gw_crc32c.c */
#include "log_fixture.h"

#include "gw_log_index.h"

enum { KEYED = 2 }; /* samples whose number mod 8 has this bit have a key */

static gw_status put_event(gw_producer *p, const char *device, uint64_t boot, uint64_t seq, const char *body,
                           uint64_t *lsn)
{
    gw_event event = {.device_id = (const uint8_t *)device,
                      .body = (const uint8_t *)body,
                      .body_bytes = (uint32_t)strlen(body),
                      .device_id_bytes = (uint8_t)strlen(device),
                      .flags = GW_EVENT_KEYED,
                      .received_at_ns = 1000 + seq,
                      .seq = seq,
                      .boot = boot};
    return gw_producer_append(p, &event, lsn);
}

/* Everything committed is published and reclaimed. */
static void pass_all(gw_log *log)
{
    gw_cursor c = {.lsn = follow(log), .ordinal = gw_log_committed_ordinal(log)};
    c.published = c.ordinal;
    gw_cursor_store(log, 0, &c);
    settle(log);
}

static uint64_t fill_to(gw_log *log, gw_producer *p, uint64_t lsn)
{
    advance_to(log, p, lsn);
    return gw_log_tail(log);
}

/* ---- verdicts ------------------------------------------------------------------------------------------------- */

static void repeat_is_a_duplicate_and_another_body_a_conflict(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log), *q = producer_of(f.log);
    static const char *const bodies[] = {"{}", "{\"a\":1234}", "{\"a\":1235}", "{\"a\":12345678901234567890123}"};
    uint64_t first[4], lsn;
    for (uint64_t i = 0; i < 4; i++)
        CHECK_EQ(put_event(p, "device", 0, i, bodies[i], &first[i]), GW_OK);
    uint64_t tail = gw_log_tail(f.log);
    for (uint64_t i = 0; i < 4; i++)
        for (unsigned b = 0; b < 4; b++) {
            CHECK_EQ(put_event(b % 2 ? p : q, "device", 0, i, bodies[b], &lsn), b == i ? GW_DUPLICATE : GW_CONFLICT);
            CHECK_EQ(lsn, first[i]);
        }
    CHECK_EQ(gw_log_tail(f.log), tail);
    /* every part of the key counts */
    CHECK_EQ(put_event(p, "device", 1, 0, bodies[0], &lsn), GW_OK);
    CHECK_EQ(put_event(p, "devic", 0, 0, bodies[0], &lsn), GW_OK);
    CHECK_EQ(put_event(p, "device", 0, 4, bodies[0], &lsn), GW_OK);
    /* and no key is no key */
    CHECK_EQ(put(p, 8, 4, 50, NULL), GW_OK);
    CHECK_EQ(put(p, 8, 4, 50, NULL), GW_OK);
    gw_producer_close(p);
    gw_producer_close(q);
    fixture_end(&f);
}

static void repeat_is_answered_when_the_log_is_full_or_closed(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t first, lsn, n = 100;
    CHECK_EQ(put_event(p, "d", 0, 1, "{}", &first), GW_OK);
    for (unsigned bytes = 60000; bytes; bytes /= 2)
        while (put(p, 8 * n++, 0, bytes, NULL) == GW_OK)
            ;
    CHECK_EQ(put_event(p, "d", 0, 2, "{}", &lsn), GW_FULL);
    CHECK_EQ(put_event(p, "d", 0, 1, "{}", &lsn), GW_DUPLICATE);
    gw_log_set_state(f.log, GW_DRAINING);
    CHECK_EQ(put_event(p, "d", 0, 1, "{}", &lsn), GW_DUPLICATE);
    CHECK_EQ(put_event(p, "d", 0, 1, "[]", &lsn), GW_CONFLICT);
    CHECK_EQ(put_event(p, "d", 0, 2, "{}", &lsn), GW_CLOSED);
    gw_log_set_state(f.log, GW_STATE_FAILED);
    CHECK_EQ(put_event(p, "d", 0, 1, "{}", &lsn), GW_FAILED);
    gw_producer_close(p);
    fixture_end(&f);
}

/* The window is exactly the last `capacity` bytes claimed. */
static void window_ends_with_the_byte_that_is_written_over(void)
{
    for (unsigned over = 0; over < 2; over++) {
        NOTE("over %u", over);
        fixture f = fixture_new();
        gw_producer *p = producer_of(f.log);
        advance_to(f.log, p, GW_FIRST_LSN + 4096);
        uint64_t first, lsn;
        CHECK_EQ(put_event(p, "d", 0, 1, "{}", &first), GW_OK);
        pass_all(f.log);
        fill_to(f.log, p, first + CAPACITY + (over ? 64 : 0));
        CHECK_EQ(put_event(p, "d", 0, 1, "{}", &lsn), over ? GW_OK : GW_DUPLICATE);
        gw_producer_close(p);
        fixture_end(&f);
    }
}

static void window_survives_a_restart(void)
{
    samples_have_keys = true;
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    static uint64_t lsns[6000];
    unsigned n = 0;
    for (uint64_t id = 0; id < 6000; id++) { /* over the ring's end, more than once */
        gw_status status = put(p, id, 4, 300 + (unsigned)(id % 50), &lsns[id]);
        if (status == GW_FULL) {
            publish(f.log, 0, follow(f.log));
            settle(f.log);
            status = put(p, id, 4, 300 + (unsigned)(id % 50), &lsns[id]);
        }
        CHECK_EQ(status, GW_OK);
    }
    gw_producer_close(p);
    for (unsigned how = 0; how < 2; how++) { /* what waits is read on; nothing waits */
        fixture_reopen(&f);
        uint64_t tail = gw_log_tail(f.log), lsn;
        p = producer_of(f.log);
        n = 0;
        for (uint64_t id = 0; id < 6000; id++) {
            if (!(id & KEYED) || lsns[id] + CAPACITY < tail)
                continue;
            NOTE("event %u", (unsigned)id);
            CHECK_EQ(put(p, id, 4, 300 + (unsigned)(id % 50), &lsn), GW_DUPLICATE);
            CHECK_EQ(lsn, lsns[id]);
            n++;
        }
        CHECK(n > 1000);
        CHECK_EQ(gw_log_tail(f.log), tail);
        gw_record oldest;
        CHECK_EQ(gw_log_oldest(f.log, &oldest), GW_OK);
        CHECK(oldest.lsn + CAPACITY >= tail && oldest.lsn + CAPACITY < tail + 1024);
        CHECK_EQ(f.log->shared->oldest_lsn, oldest.lsn); /* it need not be searched for at each scrape */
        gw_producer_close(p);
        publish(f.log, 0, follow(f.log));
        settle(f.log);
    }
    fixture_end(&f);
    samples_have_keys = false;
}

/* A sequence number of `device` whose key falls into the bucket of (device, 0, seq). */
static uint64_t neighbour(gw_log *log, const char *device, uint64_t seq, uint64_t after)
{
    size_t n = strlen(device);
    const uint8_t *id = (const uint8_t *)device;
    _Atomic uint64_t *head = gw_index_head(log, gw_index_hash(log, id, n, 0, seq));
    for (uint64_t other = after + 1;; other++)
        if (other != seq && gw_index_head(log, gw_index_hash(log, id, n, 0, other)) == head)
            return other;
}

static void keys_of_one_bucket_do_not_hide_each_other(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t seqs_of[12] = {1}, first[12], lsn;
    for (unsigned i = 1; i < 12; i++)
        seqs_of[i] = neighbour(f.log, "d", 1, seqs_of[i - 1]);
    for (unsigned i = 0; i < 12; i++)
        CHECK_EQ(put_event(p, "d", 0, seqs_of[i], "{}", &first[i]), GW_OK);
    for (unsigned round = 0; round < 2; round++) {
        for (unsigned i = 0; i < 12; i++) {
            CHECK_EQ(put_event(p, "d", 0, seqs_of[i], "{}", &lsn), GW_DUPLICATE);
            CHECK_EQ(lsn, first[i]);
        }
        gw_producer_close(p);
        fixture_reopen(&f);
        p = producer_of(f.log);
    }
    gw_producer_close(p);
    fixture_end(&f);
}

/* ---- races ---------------------------------------------------------------------------------------------------- */

#ifdef GW_FAILPOINTS

/* Two claim the same key; whoever comes to the index second gives its place away. */
static void two_claims_of_one_key_leave_one_event(void)
{
    samples_have_keys = true;
    for (unsigned order = 0; order < 4; order++) {
        NOTE("order %u", order);
        fixture f = fixture_new();
        halted a, b;
        halted_start(&a, f.log, "before_index", 2, 100);
        halted_start(&b, f.log, "before_index", 2, order & 2 ? 108 : 100);
        uint64_t a_lsn = GW_FIRST_LSN, b_lsn = a_lsn + record_size(0, 100);
        halted *first = order & 1 ? &b : &a, *second = order & 1 ? &a : &b;
        CHECK_EQ(halted_finish(first), GW_OK);
        CHECK_EQ(first->lsn, order & 1 ? b_lsn : a_lsn);
        CHECK_EQ(halted_finish(second), order & 2 ? GW_CONFLICT : GW_DUPLICATE);
        CHECK_EQ(second->lsn, first->lsn);
        CHECK_SEQS(f.log, GW_FIRST_LSN, 2);
        CHECK_EQ(gw_log_committed(f.log), gw_log_tail(f.log));
        CHECK_EQ(gw_log_committed_ordinal(f.log), 1);
        gw_record r;
        CHECK_EQ(gw_log_read(f.log, order & 1 ? a_lsn : b_lsn, &r), GW_OK);
        CHECK_EQ(r.kind, GW_VOID);
        fixture_end(&f);
    }
    samples_have_keys = false;
}

/* The original is being written: nobody is told anything. Its writer goes on, or dies. */
static void repeat_of_an_unfinished_event_is_busy(void)
{
    samples_have_keys = true;
    for (unsigned dies = 0; dies < 2; dies++) {
        fixture f = fixture_new();
        gw_producer *p = producer_of(f.log);
        halted a;
        uint64_t lsn = 0;
        halted_start(&a, f.log, "before_marker", 2, 100);
        CHECK_EQ(put(p, 2, 0, 100, &lsn), GW_BUSY);
        CHECK_EQ(lsn, GW_FIRST_LSN);
        CHECK_EQ(put(p, 2, 0, 101, &lsn), GW_BUSY);
        if (dies) {
            halted_kill(&a, true);
            CHECK_EQ(put(p, 2, 0, 100, &lsn), GW_BUSY); /* until its hole is filled */
            follow(f.log);
            CHECK_EQ(put(p, 2, 0, 100, &lsn), GW_OK);
            CHECK(lsn > GW_FIRST_LSN);
        } else {
            CHECK_EQ(halted_finish(&a), GW_OK);
            CHECK_EQ(put(p, 2, 0, 100, &lsn), GW_DUPLICATE);
        }
        CHECK_SEQS(f.log, GW_FIRST_LSN, 2);
        gw_producer_close(p);
        fixture_end(&f);
    }
    samples_have_keys = false;
}

static halted other;

static void start_event(halted *h, gw_log *log, const char *point, uint64_t seq)
{
    gw_failpoint_hook = halted_hook;
    *h = (halted){.point = point, .producer = producer_of(log)};
    sample_make(&h->sample, 0, 0, 2);
    memcpy(h->sample.device_id, "d", 1);
    memcpy(h->sample.body, "{}", 2);
    h->sample.event = (gw_event){.device_id = h->sample.device_id,
                                 .body = h->sample.body,
                                 .body_bytes = 2,
                                 .device_id_bytes = 1,
                                 .flags = GW_EVENT_KEYED,
                                 .received_at_ns = 1000 + seq,
                                 .seq = seq};
    CHECK(sem_init(&h->here, 0, 0) == 0 && sem_init(&h->go, 0, 0) == 0);
    CHECK(pthread_create(&h->thread, NULL, halted_run, h) == 0);
    while (sem_wait(&h->here))
        ;
    CHECK(h->arrived);
}

/* A slow producer finds a newer record at its bucket's head: its own place would break the order of the chain. */
static void chain_stays_in_order_of_positions(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t neighbours = neighbour(f.log, "d", 1, 1), newer, lsn;
    start_event(&other, f.log, "before_index", 1);
    CHECK_EQ(put_event(p, "d", 0, neighbours, "{}", &newer), GW_OK);
    CHECK_EQ(halted_finish(&other), GW_OK);
    CHECK(other.lsn > newer);
    CHECK_EQ(put_event(p, "d", 0, neighbours, "{}", &lsn), GW_DUPLICATE);
    CHECK_EQ(put_event(p, "d", 0, 1, "{}", &lsn), GW_DUPLICATE);
    CHECK_EQ(follow(f.log), gw_log_tail(f.log));
    CHECK_EQ(gw_log_committed_ordinal(f.log), 2);
    gw_producer_close(p);
    fixture_end(&f);
}

/* The PAD of a dead producer leaves its link alone: what is older in the chain is still found. */
static void pad_does_not_cut_a_chain(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t neighbours = neighbour(f.log, "d", 1, 1), lsn;
    CHECK_EQ(put_event(p, "d", 0, neighbours, "{}", &lsn), GW_OK);
    start_event(&other, f.log, "before_marker", 1);
    halted_kill(&other, true);
    follow(f.log);
    CHECK_EQ(follow(f.log), gw_log_tail(f.log));
    CHECK_EQ(put_event(p, "d", 0, neighbours, "{}", &lsn), GW_DUPLICATE);
    CHECK_EQ(put_event(p, "d", 0, 1, "{}", &lsn), GW_OK);
    gw_producer_close(p);
    fixture_end(&f);
}

/* What a slow look-up may see: the head still leads to a place that the next lap has claimed, and bytes of both. */
static void body_that_is_written_over_gives_no_conflict(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t first, lsn;
    CHECK_EQ(put_event(p, "d", 0, 1, "{\"a\":1}", &first), GW_OK);
    pass_all(f.log);
    fill_to(f.log, p, first + CAPACITY);
    uint8_t *at = f.log->ring + (first & f.log->mask), before[128];
    memcpy(before, at, sizeof before);
    CHECK_EQ(put(p, 8, 0, 64, NULL), GW_OK); /* written over from its first byte on ... */
    memcpy(at, before, sizeof before);       /* ... but some of the old ones are seen, */
    at[64 + 1 + 5] = '2';                    /* and a new one */
    CHECK_EQ(put_event(p, "d", 0, 1, "{\"a\":1}", &lsn), GW_OK);
    gw_producer_close(p);
    fixture_end(&f);
}
#endif

enum { RIVALS = 4, RIVAL_KEYS = 48 };

typedef struct verdict_row {
    uint64_t lsn;
    uint32_t key;
    uint8_t status, body;
} verdict_row;

typedef struct rival {
    gw_log *log;
    pthread_t thread;
    unsigned number, rounds, rows;
    verdict_row *row;
    _Atomic unsigned *running;
} rival;

static void *rival_run(void *context)
{
    rival *me = context;
    gw_producer *p = producer_of(me->log);
    char body[700];
    for (unsigned i = 0; i < me->rounds; i++) {
        uint64_t r = scramble(me->number * 1000003ull + i);
        uint32_t key = (uint32_t)(r % RIVAL_KEYS);
        uint8_t which = (r >> 20) % 8 == 0;
        memset(body, which ? 'y' : 'x', sizeof body - 1);
        body[100 + key * 12] = 0;
        uint64_t lsn = 0;
        gw_status status;
        do {
            status = put_event(p, "rival", 0, key, body, &lsn);
            if (status == GW_FULL || status == GW_BUSY)
                sched_yield();
        } while (status == GW_FULL || status == GW_BUSY);
        CHECK(status == GW_OK || status == GW_DUPLICATE || status == GW_CONFLICT);
        me->row[me->rows++] = (verdict_row){lsn, key, (uint8_t)status, which};
    }
    gw_producer_close(p);
    atomic_fetch_sub(me->running, 1);
    gw_log_wake(me->log);
    return NULL;
}

static int by_lsn(const void *a, const void *b)
{
    const verdict_row *x = a, *y = b;
    return x->lsn != y->lsn ? (x->lsn > y->lsn) - (x->lsn < y->lsn) : (int)x->status - (int)y->status;
}

/* Many producers, few keys, a ring that laps all the time: one event a key and window, and every verdict is about an
 * event that was accepted. */
static void rivals_for_few_keys_agree(void)
{
    fixture f = fixture_new();
    _Atomic unsigned running = RIVALS;
    unsigned rounds = (unsigned)environment_number("GW_CROWD_EVENTS", 20000);
    rival rivals[RIVALS];
    for (unsigned i = 0; i < RIVALS; i++) {
        rivals[i] = (rival){.log = f.log, .number = i, .rounds = rounds, .running = &running};
        rivals[i].row = malloc(rounds * sizeof(verdict_row));
        CHECK(pthread_create(&rivals[i].thread, NULL, rival_run, &rivals[i]) == 0);
    }
    gw_producer *p = producer_of(f.log); /* laps the ring, so that keys come free again */
    for (uint64_t n = 0; atomic_load(&running) || gw_log_committed(f.log) != gw_log_tail(f.log); n++) {
        put(p, 8 * n, 4, 4000, NULL);
        gw_cursor c = gw_cursor_load(f.log, 0);
        c.lsn = gw_log_follow(f.log, 0, 0);
        c.published += gw_log_committed_ordinal(f.log) - c.ordinal;
        c.ordinal = gw_log_committed_ordinal(f.log);
        gw_cursor_store(f.log, 0, &c);
        sync_now(f.log);
        if (!atomic_load(&running))
            gw_log_follow(f.log, 0, 1);
    }
    gw_producer_close(p);
    size_t rows = 0;
    verdict_row *all = malloc(RIVALS * rounds * sizeof *all);
    for (unsigned i = 0; i < RIVALS; i++) {
        CHECK(pthread_join(rivals[i].thread, NULL) == 0);
        memcpy(all + rows, rivals[i].row, rivals[i].rows * sizeof *all);
        rows += rivals[i].rows;
        free(rivals[i].row);
    }
    qsort(all, rows, sizeof *all, by_lsn);
    uint64_t last[RIVAL_KEYS] = {0};
    unsigned accepted = 0, repeats = 0, conflicts = 0;
    const verdict_row *original = NULL;
    for (size_t i = 0; i < rows; i++) {
        const verdict_row *r = &all[i];
        if (r->status == GW_OK) {
            CHECK(!last[r->key] || r->lsn > last[r->key] + CAPACITY);
            last[r->key] = r->lsn;
            original = r;
            accepted++;
            continue;
        }
        CHECK(original && original->lsn == r->lsn && original->key == r->key);
        CHECK_EQ(r->status, original->body == r->body ? GW_DUPLICATE : GW_CONFLICT);
        *(r->status == GW_DUPLICATE ? &repeats : &conflicts) += 1;
    }
    CHECK(accepted > RIVAL_KEYS && repeats && conflicts);
    free(all);
    fixture_end(&f);
}

#ifdef GW_FAILPOINTS

/* A producer sleeps between its looks at the tail and at what is reclaimed; an empty log is not full for it. */
static void late_look_at_the_tail_is_not_full(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 8, 4, 500, NULL), GW_OK);
    pass_all(f.log);
    start_event(&other, f.log, "after_tail", 1);
    CHECK_EQ(put(p, 8, 4, 500, NULL), GW_OK);
    pass_all(f.log);
    CHECK_EQ(halted_finish(&other), GW_OK);
    CHECK(!gw_log_is_full(f.log));
    CHECK_EQ(atomic_load(&f.log->shared->shedding), 0);
    gw_producer_close(p);
    fixture_end(&f);
}

#endif

/* ---- receipts ------------------------------------------------------------------------------------------------- */

static enum gw_receipt_state state_of(const gw_log *log, const char *receipt)
{
    uint64_t lsn;
    return gw_log_receipt_state(log, receipt, strlen(receipt), &lsn);
}

static void receipt_tells_what_became_of_an_event(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    char receipt[GW_RECEIPT_BYTES_MAX], dead[GW_RECEIPT_BYTES_MAX];
    uint64_t lsn, dead_lsn;
    CHECK_EQ(put_event(p, "d", 0, 1, "{}", &lsn), GW_OK);
    CHECK_EQ(put_event(p, "d", 0, 2, "{}", &dead_lsn), GW_OK);
    gw_log_receipt(f.log, lsn, receipt);
    gw_log_receipt(f.log, dead_lsn, dead);
    CHECK_EQ(state_of(f.log, receipt), GW_RECEIPT_ENQUEUED);
    uint64_t end = follow(f.log);
    CHECK_EQ(state_of(f.log, receipt), GW_RECEIPT_ENQUEUED);
    sync_now(f.log);
    CHECK_EQ(state_of(f.log, receipt), GW_RECEIPT_DURABLE);
    CHECK_EQ(gw_log_state_of(f.log, lsn), GW_RECEIPT_DURABLE);
    CHECK(!gw_log_mark_dead(f.log, 0, dead_lsn, 99));
    CHECK(!gw_log_mark_dead(f.log, 0, dead_lsn + 8, 0));
    CHECK(gw_log_mark_dead(f.log, 0, dead_lsn, f.log->shared->epoch));
    CHECK_EQ(state_of(f.log, dead), GW_RECEIPT_DEAD_LETTERED);
    gw_cursor c = {.lsn = end, .ordinal = 2, .published = 1, .dead_lettered = 1};
    gw_cursor_store(f.log, 0, &c);
    CHECK_EQ(state_of(f.log, receipt), GW_RECEIPT_DELIVERED);
    CHECK_EQ(state_of(f.log, dead), GW_RECEIPT_DEAD_LETTERED);
    gw_record r;
    CHECK_EQ(gw_log_read(f.log, dead_lsn, &r), GW_OK); /* the checksum does not cover the mark */
    CHECK_EQ(r.dead, 1);
    settle(f.log);
    gw_producer_close(p);
    fixture_reopen(&f); /* the mark is in the file */
    p = producer_of(f.log);
    CHECK_EQ(state_of(f.log, receipt), GW_RECEIPT_DELIVERED);
    CHECK_EQ(state_of(f.log, dead), GW_RECEIPT_DEAD_LETTERED);
    CHECK_EQ(put_event(p, "d", 0, 2, "{}", &lsn), GW_DUPLICATE);
    CHECK_EQ(put(p, 8, 4, 50, NULL), GW_OK);
    CHECK(!gw_log_mark_dead(f.log, 0, dead_lsn, 0)); /* below reclaim anything may be written over, at any moment */
    pass_all(f.log);
    fill_to(f.log, p, dead_lsn + CAPACITY + 64);
    CHECK_EQ(state_of(f.log, receipt), GW_RECEIPT_FINISHED);
    CHECK_EQ(state_of(f.log, dead), GW_RECEIPT_FINISHED);
    CHECK_EQ(put_event(p, "d", 0, 2, "{}", &lsn), GW_OK);
    gw_producer_close(p);
    fixture_end(&f);
}

static void receipt_of_something_else_is_unknown(void)
{
    fixture f = fixture_new(), g = fixture_with(MQTT_AND_FILE);
    gw_producer *p = producer_of(f.log);
    char receipt[GW_RECEIPT_BYTES_MAX], wrong[2 * GW_RECEIPT_BYTES_MAX];
    uint64_t lsn;
    CHECK_EQ(put_event(p, "d", 0, 1, "{}", &lsn), GW_OK);
    gw_log_receipt(f.log, lsn, receipt);
    size_t n = strlen(receipt);
    CHECK(n < GW_RECEIPT_BYTES_MAX);
    for (size_t i = 0; i < n; i++) /* no character can be another one, or missing, or twice */
        for (int c = -1; c < 128; c++) {
            NOTE("character %d at %u", c, (unsigned)i);
            memcpy(wrong, receipt, n + 1);
            if (c < 0)
                memmove(wrong + i, wrong + i + 1, n - i);
            else
                wrong[i] = (char)c;
            if (memcmp(wrong, receipt, n + 1) != 0) {
                uint64_t ignored;
                CHECK_EQ(gw_log_receipt_state(f.log, wrong, c < 0 ? n - 1 : n, &ignored), GW_RECEIPT_UNKNOWN);
            }
        }
    snprintf(wrong, sizeof wrong, "%s0", receipt);
    CHECK_EQ(state_of(f.log, wrong), GW_RECEIPT_UNKNOWN);
    CHECK_EQ(state_of(f.log, ""), GW_RECEIPT_UNKNOWN);
    g.log->shared->identity ^= 1;
    CHECK_EQ(state_of(g.log, receipt), GW_RECEIPT_UNKNOWN);
    g.log->shared->identity ^= 1;
    gw_producer_close(p);
    fixture_end(&f);
    fixture_end(&g);
}

/* A power cut takes what no fdatasync covered; other events then stand at the same positions. */
static void receipt_of_what_a_power_cut_took_is_lost(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t kept, lost, last;
    char kept_receipt[GW_RECEIPT_BYTES_MAX], lost_receipt[GW_RECEIPT_BYTES_MAX], last_receipt[GW_RECEIPT_BYTES_MAX];
    CHECK_EQ(put_event(p, "d", 0, 1, "{}", &kept), GW_OK);
    follow(f.log);
    settle(f.log);
    CHECK_EQ(put_event(p, "d", 0, 2, "{\"a\":2}", &lost), GW_OK);
    CHECK_EQ(put_event(p, "d", 0, 3, "{\"a\":3}", &last), GW_OK);
    gw_log_receipt(f.log, kept, kept_receipt);
    gw_log_receipt(f.log, lost, lost_receipt);
    gw_log_receipt(f.log, last, last_receipt);
    gw_producer_close(p);
    uint8_t *image = image_of(&f);
    fixture_close(&f);

    for (unsigned hole = 0; hole < 2; hole++) { /* the end is gone; a hole before a record that was kept */
        NOTE("hole %u", hole);
        uint8_t *cut = malloc(FILE_BYTES);
        memcpy(cut, image, FILE_BYTES);
        memset(image_byte(cut, lost), 0, (size_t)(last - lost) + (hole ? 0 : 64 + 16));
        fixture_rewrite(&f, cut);
        free(cut);
        CHECK_EQ(fixture_open(&f, false), GW_OK);
        p = producer_of(f.log);
        uint64_t again;
        CHECK_EQ(state_of(f.log, kept_receipt), GW_RECEIPT_DURABLE);
        CHECK_EQ(state_of(f.log, lost_receipt), GW_RECEIPT_LOST);
        CHECK_EQ(state_of(f.log, last_receipt), hole ? GW_RECEIPT_DURABLE : GW_RECEIPT_LOST);
        CHECK_EQ(put_event(p, "d", 0, 2, "{\"a\":2}", &again), GW_OK); /* the device sends it again */
        CHECK_EQ(state_of(f.log, lost_receipt), GW_RECEIPT_LOST);
        pass_all(f.log);
        CHECK_EQ(state_of(f.log, lost_receipt), GW_RECEIPT_LOST);
        fill_to(f.log, p, last + CAPACITY + 128);
        CHECK_EQ(state_of(f.log, kept_receipt), GW_RECEIPT_FINISHED);
        /* nobody can say any more what stood where there was a hole */
        CHECK_EQ(state_of(f.log, lost_receipt), hole ? GW_RECEIPT_UNKNOWN : GW_RECEIPT_LOST);
        gw_producer_close(p);
        fixture_close(&f);
        CHECK_EQ(fixture_open(&f, false), GW_OK); /* nor after a restart */
        CHECK_EQ(state_of(f.log, lost_receipt), hole ? GW_RECEIPT_UNKNOWN : GW_RECEIPT_LOST);
        fixture_close(&f);
    }
    free(image);
    CHECK_EQ(fixture_open(&f, true), GW_OK);
    fixture_end(&f);
}

/* ---- water marks ---------------------------------------------------------------------------------------------- */

/* What waits, or is repeated, may be older than every epoch that the table still knows. */
static void receipt_of_a_repeat_is_the_first_ones_after_any_number_of_runs(void)
{
    fixture f = fixture_new();
    char receipt[GW_RECEIPT_BYTES_MAX], again[GW_RECEIPT_BYTES_MAX];
    uint64_t first = 0, lsn;
    for (uint64_t run = 0; run < 2 * GW_EPOCHS_MAX; run++) {
        NOTE("run %u", (unsigned)run);
        gw_producer *p = producer_of(f.log);
        if (run == 0) {
            CHECK_EQ(put_event(p, "d", 0, 1, "{}", &first), GW_OK);
            gw_log_receipt(f.log, first, receipt);
        }
        CHECK_EQ(put(p, 8, 4, 50, NULL), GW_OK); /* a run without events takes no place in the table */
        bool published = run >= GW_EPOCHS_MAX + 8;
        if (published)
            pass_all(f.log);
        else
            follow(f.log);
        sync_now(f.log);
        CHECK_EQ(put_event(p, "d", 0, 1, "{}", &lsn), GW_DUPLICATE);
        CHECK_EQ(lsn, first);
        gw_log_receipt(f.log, lsn, again);
        CHECK(strcmp(again, receipt) == 0);
        CHECK_EQ(state_of(f.log, again), published ? GW_RECEIPT_DELIVERED : GW_RECEIPT_DURABLE);
        CHECK_EQ(gw_log_state_of(f.log, lsn), published ? GW_RECEIPT_DELIVERED : GW_RECEIPT_DURABLE);
        gw_producer_close(p);
        fixture_reopen(&f);
    }
    CHECK(f.log->shared->range[0].start > first);
    fixture_end(&f);
}

static void full_comes_and_goes_with_hysteresis(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t high = CAPACITY * 8 / 10, low = CAPACITY / 2, id = 0, used = 0;
    gw_log_set_water(f.log, high, low);
    while (put(p, 8 * ++id, 4, 8192 - 64 - 4, NULL) == GW_OK)
        used += 8192;
    CHECK_EQ(gw_log_used(f.log), used);
    CHECK(used <= high && used + 8192 > high);
    uint64_t end = follow(f.log), cursor = GW_FIRST_LSN;
    while (gw_log_used(f.log) + 8192 > low) {
        CHECK_EQ(put(p, 8 * ++id, 4, 8192 - 64 - 4, NULL), GW_FULL);
        cursor += 8192;
        CHECK(cursor <= end);
        publish(f.log, 0, cursor);
        settle(f.log);
    }
    for (unsigned i = 0; i < (high - low) / 8192; i++)
        CHECK_EQ(put(p, 8 * ++id, 4, 8192 - 64 - 4, NULL), GW_OK);
    /* marks that leave no room for the largest record are raised */
    gw_log_set_water(f.log, 1, 1);
    publish(f.log, 0, follow(f.log));
    settle(f.log);
    CHECK_EQ(put(p, 8 * ++id, 0, (unsigned)gw_log_record_bytes_max(f.log) - 64, NULL), GW_OK);
    gw_producer_close(p);
    fixture_end(&f);
}

/* It says nothing about the events of others, which fit. */
static void one_large_event_that_does_not_fit_refuses_nobody_else(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t high = CAPACITY * 95 / 100, id = 0;
    gw_log_set_water(f.log, high, CAPACITY * 9 / 10);
    while (gw_log_used(f.log) + 8192 <= CAPACITY * 92 / 100)
        CHECK_EQ(put(p, 8 * ++id, 4, 8192 - 64 - 4, NULL), GW_OK);
    CHECK_EQ(put(p, 8 * ++id, 4, 120000, NULL), GW_FULL);
    CHECK_EQ(put(p, 8 * ++id, 4, 8192 - 64 - 4, NULL), GW_OK);
    gw_producer_close(p);
    fixture_end(&f);
}

/* ---- waiting -------------------------------------------------------------------------------------------------- */

typedef struct sleeper {
    gw_log *log;
    uint64_t durable, sinks, committed;
    uint32_t word;
    _Atomic bool over;
    pthread_t thread;
} sleeper;

static void *sleeper_run(void *context)
{
    sleeper *s = context;
    s->word = gw_log_wait(s->log, 3, s->word, s->durable, s->sinks, s->committed, 20000);
    atomic_store(&s->over, true);
    return NULL;
}

static void sleeper_start(sleeper *s, gw_log *log, uint64_t durable, uint64_t sinks, uint64_t committed)
{
    *s = (sleeper){.log = log, .durable = durable, .sinks = sinks, .committed = committed};
    s->word = atomic_load(&log->shared->waiter[3].nudges);
    CHECK(pthread_create(&s->thread, NULL, sleeper_run, s) == 0);
    while (!atomic_load(&log->shared->waiter[3].flag) && !atomic_load(&s->over))
        usleep(200);
    usleep(5000);
}

static void sleeper_ends(sleeper *s)
{
    uint64_t from = now_ms();
    CHECK(pthread_join(s->thread, NULL) == 0);
    CHECK(now_ms() - from < 5000);
}

static void each_position_wakes_who_waits_for_it(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    uint64_t lsn, never = UINT64_MAX;
    sleeper s;
    CHECK_EQ(put_event(p, "d", 0, 1, "{}", &lsn), GW_OK);
    sleeper_start(&s, f.log, never, never, lsn);
    CHECK(!atomic_load(&s.over));
    follow(f.log);
    sleeper_ends(&s);
    sleeper_start(&s, f.log, lsn, never, never);
    CHECK(!atomic_load(&s.over));
    sync_now(f.log);
    sleeper_ends(&s);
    sleeper_start(&s, f.log, never, lsn, never);
    CHECK(!atomic_load(&s.over));
    pass_all(f.log);
    sleeper_ends(&s);
    sleeper_start(&s, f.log, lsn, never, never); /* it is already so */
    CHECK(atomic_load(&s.over));
    sleeper_ends(&s);
    sleeper_start(&s, f.log, never, never, never);
    CHECK(!atomic_load(&s.over));
    gw_log_nudge(f.log, 3);
    sleeper_ends(&s);
    sleeper_start(&s, f.log, gw_log_tail(f.log), never, never);
    gw_log_set_state(f.log, GW_STATE_FAILED);
    sleeper_ends(&s);
    gw_producer_close(p);
    fixture_end(&f);
}

static void *slow_committer(void *context)
{
    gw_error error;
    return (void *)(uintptr_t)gw_log_run_committer(context, 30000, &error);
}

static _Atomic bool stop_following;

static void *resting_follower(void *context)
{
    uint64_t seen = 0;
    while (!atomic_load(&stop_following)) {
        seen = gw_log_follow(context, seen, 1000);
        gw_log_rest(context, 30000000);
    }
    return NULL;
}

/* The interval is 30 s and the follower rests as long: who waits is served at once, one sync for all who wait. */
static void who_waits_for_durable_is_not_kept_for_the_interval(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    pthread_t committer, follower;
    atomic_store(&stop_following, false);
    CHECK(pthread_create(&committer, NULL, slow_committer, f.log) == 0);
    CHECK(pthread_create(&follower, NULL, resting_follower, f.log) == 0);
    uint64_t lsn;
    for (uint64_t i = 1; i <= 50; i++) {
        uint64_t from = now_ms();
        CHECK_EQ(put_event(p, "d", 0, i, "{}", &lsn), GW_OK);
        gw_log_want(f.log, 3, lsn, false);
        while (gw_log_durable(f.log) <= lsn) {
            gw_log_wait(f.log, 3, atomic_load(&f.log->shared->waiter[3].nudges), lsn, UINT64_MAX, UINT64_MAX, 100);
            CHECK(now_ms() - from < 15000);
        }
        CHECK_EQ(put_event(p, "s", 0, i, "{}", &lsn), GW_OK);
        gw_log_want(f.log, 3, lsn, true);
        while (gw_log_committed(f.log) <= lsn) {
            gw_log_wait(f.log, 3, atomic_load(&f.log->shared->waiter[3].nudges), UINT64_MAX, UINT64_MAX, lsn, 100);
            CHECK(now_ms() - from < 15000);
        }
    }
    unsigned before = atomic_load(&fdatasyncs);
    for (uint64_t i = 100; i < 300; i++)
        CHECK_EQ(put_event(p, "d", 0, i, "{}", &lsn), GW_OK);
    gw_log_want(f.log, 3, lsn, false);
    while (gw_log_durable(f.log) <= lsn)
        usleep(200);
    CHECK(atomic_load(&fdatasyncs) - before < 20);
    atomic_store(&stop_following, true);
    gw_log_want(f.log, 3, gw_log_tail(f.log), true); /* ends the rest */
    gw_log_wake(f.log);
    gw_log_stop_committer(f.log);
    CHECK(pthread_join(committer, NULL) == 0);
    CHECK(pthread_join(follower, NULL) == 0);
    gw_producer_close(p);
    fixture_end(&f);
}

#define T(name)     \
    {               \
#name, name \
    }
static const test TESTS[] = {
    T(repeat_is_a_duplicate_and_another_body_a_conflict),
    T(repeat_is_answered_when_the_log_is_full_or_closed),
    T(window_ends_with_the_byte_that_is_written_over),
    T(window_survives_a_restart),
    T(keys_of_one_bucket_do_not_hide_each_other),
#ifdef GW_FAILPOINTS
    T(two_claims_of_one_key_leave_one_event),
    T(repeat_of_an_unfinished_event_is_busy),
    T(chain_stays_in_order_of_positions),
    T(pad_does_not_cut_a_chain),
    T(body_that_is_written_over_gives_no_conflict),
    T(late_look_at_the_tail_is_not_full),
#endif
    T(rivals_for_few_keys_agree),
    T(receipt_tells_what_became_of_an_event),
    T(receipt_of_something_else_is_unknown),
    T(receipt_of_what_a_power_cut_took_is_lost),
    T(receipt_of_a_repeat_is_the_first_ones_after_any_number_of_runs),
    T(full_comes_and_goes_with_hysteresis),
    T(one_large_event_that_does_not_fit_refuses_nobody_else),
    T(each_position_wakes_who_waits_for_it),
    T(who_waits_for_durable_is_not_kept_for_the_interval),
};

int main(int argc, char **argv)
{
    return run_tests(TESTS, sizeof TESTS / sizeof *TESTS, argc, argv);
}
