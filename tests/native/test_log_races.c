/* test_log_races.c - committer, errors of fdatasync, interleavings that are forced at fail points, threads.
 *
 * Sources: _native/gw_log*.c _native/gw_crc32c.c */
#include "log_fixture.h"

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

static void *one_long_follow(void *context)
{
    gw_log_follow(context, gw_log_committed(context), 3000);
    return NULL;
}

/* A follower that sleeps is woken by a commit, and by a death; it does not find them by its time-out. */
static void sleeping_follower_is_woken(void)
{
    for (unsigned by = 0; by < 2; by++) {
        fixture f = fixture_new();
        gw_producer *p = producer_of(f.log);
        pthread_t thread;
        uint64_t from = now_ms();
        CHECK(pthread_create(&thread, NULL, one_long_follow, f.log) == 0);
        while (!atomic_load(&f.log->shared->follower_flag))
            usleep(500);
        usleep(20000);
        if (by == 0)
            CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
        else
            gw_log_owner_died(f.log, 0x7ffffff0);
        CHECK(pthread_join(thread, NULL) == 0);
        CHECK(now_ms() - from < 2500);
        gw_producer_close(p);
        fixture_end(&f);
    }
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

/* The kernel calls pages clean after a failed writeback, whatever the disk holds. What must be made dirty again is seen
 * as the kernel sees it: every page of the log is write-protected, and a store into it is caught. */
static struct {
    struct {
        uint8_t *base;
        uint64_t bytes, offset;
    } map[8];
    unsigned maps;
    bool stored[FILE_BYTES / GW_PAGE];
} trap;

static void on_store(int number, siginfo_t *info, void *context)
{
    (void)context;
    uint8_t *at = info->si_addr;
    for (unsigned i = 0; i < trap.maps; i++)
        if (at >= trap.map[i].base && at < trap.map[i].base + trap.map[i].bytes) {
            uint64_t page = (uint64_t)(at - trap.map[i].base) / GW_PAGE;
            trap.stored[trap.map[i].offset / GW_PAGE + page] = true;
            mprotect(trap.map[i].base + page * GW_PAGE, GW_PAGE, PROT_READ | PROT_WRITE);
            return;
        }
    signal(number, SIG_DFL);
}

static void trap_every_page(void)
{
    memset(&trap, 0, sizeof trap);
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    CHECK(maps);
    while (fgets(line, sizeof line, maps)) {
        unsigned long from, to, offset;
        if (strstr(line, "memfd:log ") && sscanf(line, "%lx-%lx %*s %lx", &from, &to, &offset) == 3) {
            CHECK(trap.maps < 8);
            trap.map[trap.maps].base = (uint8_t *)from;
            trap.map[trap.maps].bytes = to - from;
            trap.map[trap.maps++].offset = offset;
        }
    }
    fclose(maps);
    CHECK(trap.maps);
    struct sigaction action = {.sa_sigaction = on_store, .sa_flags = SA_SIGINFO};
    CHECK(sigaction(SIGSEGV, &action, NULL) == 0);
    for (unsigned i = 0; i < trap.maps; i++)
        CHECK(mprotect(trap.map[i].base, trap.map[i].bytes, PROT_READ) == 0);
}

static void untrap(void)
{
    signal(SIGSEGV, SIG_DFL);
}

/* Every page of [from, to) of the ring, and both slots. */
static void check_stored(uint64_t from, uint64_t to)
{
    for (uint64_t lsn = from / GW_PAGE * GW_PAGE; lsn < to; lsn += GW_PAGE) {
        NOTE("lsn %llu", (unsigned long long)lsn);
        CHECK(trap.stored[(GW_RING_OFFSET + lsn % CAPACITY) / GW_PAGE]);
    }
    CHECK(trap.stored[1] && trap.stored[2]);
}

static void everything_that_may_be_unsynced_is_dirty_again_at_takeover(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    advance_to(f.log, p, CAPACITY - 3 * 8192);
    uint64_t durable = gw_log_durable(f.log);
    for (unsigned i = 0; i < 6; i++) /* over the ring's end */
        CHECK_EQ(put(p, i, 0, 8192 - 64 - 8, NULL), GW_OK);
    follow(f.log);
    atomic_fetch_add(&f.log->shared->tail, 8192); /* claimed, being written */
    gw_log *next = fixture_attach(&f);
    trap_every_page();
    CHECK_EQ(gw_log_takeover(next, &f.error), GW_OK);
    untrap();
    check_stored(durable, gw_log_tail(f.log));
    gw_producer_close(p);
    gw_log_close(next);
    fixture_end(&f);
}

static unsigned trap_countdown;

static int trap_at_the_first_sync(int fd)
{
    (void)fd;
    if (--trap_countdown == 0)
        trap_every_page();
    return 0;
}

static void everything_above_the_watermark_is_dirty_again_at_recovery(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    advance_to(f.log, p, CAPACITY - 3 * 8192);
    uint64_t watermark = gw_log_durable(f.log);
    for (unsigned i = 0; i < 6; i++)
        CHECK_EQ(put(p, i, 0, 8192 - 64 - 8, NULL), GW_OK);
    uint64_t end = follow(f.log);
    gw_producer_close(p);
    fixture_close(&f);
    trap_countdown = 1;
    on_fdatasync = trap_at_the_first_sync;
    CHECK_EQ(fixture_open(&f, false), GW_OK);
    untrap();
    CHECK_EQ(f.report.watermark, watermark);
    trap.stored[1] = trap.stored[2] = true; /* stored to before the first sync */
    check_stored(watermark, end);
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
    publish(f.log, 0, follow(f.log)); /* another cursor in each slot: a torn one is seen */
    sync_dies_at(f.log, point);
    uint64_t reclaim = gw_log_reclaim(f.log);
    gw_log *next = fixture_attach(&f);
    CHECK_EQ(gw_log_takeover(next, &f.error), GW_OK);
    uint8_t *synced = image_of(&f);
    CHECK_EQ(put(p, 6, 4, 100, NULL), GW_OK);
    publish(f.log, 0, follow(f.log));
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

#define T(name)     \
    {               \
#name, name \
    }
static const test TESTS[] = {
    T(committer_sleeps_when_nothing_changes),
    T(sleeping_follower_is_woken),
    T(stopping_one_committer_does_not_stop_the_next),
    T(failed_sync_is_final),
    T(error_that_a_dead_committer_did_not_report_is_found_at_takeover),
    T(everything_that_may_be_unsynced_is_dirty_again_at_takeover),
    T(everything_above_the_watermark_is_dirty_again_at_recovery),
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
