/* test_log_death.c - real processes that are killed or stopped: producers at every fail point, alone, two and three at
 * once; a follower in the middle of a PAD; a committer anywhere; everybody at random.
 *
 * Sources: _native/gw_log*.c _native/gw_crc32c.c */
#include <sys/prctl.h>

#include "log_fixture.h"

#if !defined(GW_FAILPOINTS) || defined(__SANITIZE_THREAD__)
int main(void)
{
    return 0; /* needs fail points; processes are not what the thread sanitizer sees */
}
#else

static const char *const POINTS[] = {"before_claim", "after_intent",  "after_claim",
                                     "mid_copy",     "before_marker", "after_marker"};
enum { N_POINTS = 6, CLAIMED_FROM = 2, COMMITTED_FROM = 5 };

static const char *hook_point;
static int hook_signal;
static unsigned hook_countdown;

static void signal_at_point(const char *name)
{
    if (hook_point && strcmp(name, hook_point) == 0 && --hook_countdown == 0)
        kill(getpid(), hook_signal);
}

static void arm(const char *point, int signal_number)
{
    hook_point = point;
    hook_signal = signal_number;
    hook_countdown = 1;
    gw_failpoint_hook = signal_at_point;
}

/* A child that does not outlive this process. */
static pid_t fork_child(void)
{
    pid_t parent = getpid(), pid = fork();
    CHECK(pid >= 0);
    if (!pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
    }
    return pid;
}

/* A process of its own that attaches, appends one record and gets a signal at a fail point. */
static pid_t appender(fixture *f, const char *point, int signal_number, uint64_t id, unsigned body)
{
    pid_t pid = fork_child();
    if (pid)
        return pid;
    gw_producer *p = producer_of(fixture_attach(f));
    arm(point, signal_number);
    _exit(put(p, id, 0, body, NULL) == GW_OK ? 0 : 1);
}

static void await_death(pid_t pid)
{
    siginfo_t info;
    while (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT))
        CHECK(errno == EINTR);
}

/* As the supervisor does it: seen dead, marked, then reaped. */
static void bury(fixture *f, pid_t pid)
{
    await_death(pid);
    gw_log_owner_died(f->log, pid);
    CHECK(waitpid(pid, NULL, 0) == pid);
}

static void await_stop(pid_t pid)
{
    int status;
    CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
}

static void follow_to_the_tail_within(gw_log *log, uint64_t ms)
{
    uint64_t from = now_ms(), committed;
    while ((committed = gw_log_committed(log)) < gw_log_tail(log)) {
        CHECK(now_ms() - from <= ms);
        gw_log_follow(log, committed, 50);
    }
}

static unsigned owned_slots(gw_log *log)
{
    follow(log);
    unsigned n = 0;
    for (unsigned i = 0; i < GW_INTENT_SLOTS; i++)
        n += atomic_load(&log->shared->intent[i].owner) != 0;
    return n;
}

/* ---- producers ------------------------------------------------------------------------------------------------ */

static void producers_killed_at(fixture *f, gw_producer *p, unsigned n, const unsigned *point, const unsigned *body,
                                bool backwards)
{
    uint64_t from = gw_log_tail(f->log), want[8], got[8], holes = 0, hole_bytes = 0;
    unsigned wanted = 0;
    pid_t pid[3];
    want[wanted++] = 1;
    CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
    for (unsigned i = 0; i < n; i++) {
        pid[i] = appender(f, POINTS[point[i]], SIGKILL, 2 + i, body[i]);
        await_death(pid[i]);
        if (point[i] >= COMMITTED_FROM)
            want[wanted++] = 2 + i;
        else if (point[i] >= CLAIMED_FROM) {
            holes++;
            hole_bytes += record_size(0, body[i]);
        }
    }
    want[wanted++] = 9;
    CHECK_EQ(put(p, 9, 4, 100, NULL), GW_OK);
    if (holes) {
        follow(f->log);
        CHECK(gw_log_committed(f->log) < gw_log_tail(f->log)); /* nobody said that they are dead */
    }
    for (unsigned i = 0; i < n; i++)
        bury(f, pid[backwards ? n - 1 - i : i]);
    follow_to_the_tail_within(f->log, 1000);
    CHECK_EQ(seqs(f->log, from, got, 8), wanted);
    for (unsigned i = 0; i < wanted; i++)
        CHECK_EQ(got[i], want[i]);
    gw_record r;
    for (uint64_t lsn = from; lsn < gw_log_committed(f->log); lsn += r.size) {
        CHECK_EQ(gw_log_read(f->log, lsn, &r), GW_OK);
        if (r.kind == GW_PAD) {
            holes--;
            hole_bytes -= r.size;
        }
    }
    CHECK_EQ(holes, 0); /* exactly the holes */
    CHECK_EQ(hole_bytes, 0);
    CHECK_EQ(owned_slots(f->log), 1);
    CHECK_EQ(gw_log_unexplained(f->log, 0), 0);
    publish(f->log, 0, gw_log_committed(f->log));
    settle(f->log);
}

static void every_death_leaves_exactly_its_hole(void)
{
    static const unsigned bodies[] = {32, 136, 4000};
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    for (unsigned a = 0; a < N_POINTS; a++)
        for (unsigned k = 0; k < 3; k++) {
            NOTE("%s, body %u", POINTS[a], bodies[k]);
            producers_killed_at(&f, p, 1, &a, &bodies[k], false);
        }
    gw_producer_close(p);
    fixture_end(&f);
}

static void two_deaths_at_every_pair_of_points_leave_exactly_their_holes(void)
{
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    unsigned step = (unsigned)environment_number("GW_TEST_STEP", 1);
    for (unsigned i = 0; i < N_POINTS * N_POINTS * 4; i += step) {
        unsigned point[2] = {i / 4 % N_POINTS, i / 4 / N_POINTS}, body[2] = {i & 1 ? 4000 : 32, i & 1 ? 32 : 4000};
        NOTE("%s with %u, %s with %u, order %u", POINTS[point[0]], body[0], POINTS[point[1]], body[1], i & 2);
        producers_killed_at(&f, p, 2, point, body, i & 2);
    }
    gw_producer_close(p);
    fixture_end(&f);
}

static void three_deaths_leave_exactly_their_holes(void)
{
    static const unsigned lengths[6][3] = {{32, 136, 4000}, {32, 4000, 136}, {136, 32, 4000},
                                           {136, 4000, 32}, {4000, 32, 136}, {4000, 136, 32}};
    fixture f = fixture_new();
    gw_producer *p = producer_of(f.log);
    unsigned step = 7 * (unsigned)environment_number("GW_TEST_STEP", 1);
    for (unsigned i = 0; i < N_POINTS * N_POINTS * N_POINTS * 6; i += step) {
        unsigned k = i / 6, point[3] = {k % N_POINTS, k / N_POINTS % N_POINTS, k / N_POINTS / N_POINTS};
        const unsigned *body = lengths[i % 6];
        NOTE("%s %u, %s %u, %s %u", POINTS[point[0]], body[0], POINTS[point[1]], body[1], POINTS[point[2]], body[2]);
        producers_killed_at(&f, p, 3, point, body, i % 2);
    }
    gw_producer_close(p);
    fixture_end(&f);
}

static void dead_claim_over_the_ring_end_is_padded(void)
{
    for (unsigned before = 8; before <= 72; before += 8) {
        NOTE("%u bytes before the end", before);
        fixture f = fixture_new();
        gw_producer *p = producer_of(f.log);
        advance_to(f.log, p, CAPACITY - before - record_size(4, 100));
        unsigned point = 3, body = 200;
        producers_killed_at(&f, p, 1, &point, &body, false);
        gw_producer_close(p);
        fixture_reopen(&f);
        fixture_end(&f);
    }
}

/* ---- stopped producers ---------------------------------------------------------------------------------------- */

static _Atomic bool busy;

static void *traffic(void *context)
{
    gw_producer *p = producer_of(context);
    for (uint64_t id = 100; atomic_load(&busy); id++) {
        CHECK_EQ(put(p, id, 4, 20, NULL), GW_OK);
        usleep(2000);
    }
    gw_producer_close(p);
    return NULL;
}

/* The committed claims of others wake the follower far more often than its tick; or its caller asks for less. */
static void stopped_producer_is_killed_then_padded(bool with_traffic, int timeout_ms)
{
    NOTE("traffic %d, timeout %d ms", with_traffic, timeout_ms);
    fixture f = fixture_new();
    pid_t pid = appender(&f, "mid_copy", SIGSTOP, 1, 500);
    await_stop(pid);
    pthread_t thread;
    atomic_store(&busy, with_traffic);
    if (with_traffic)
        CHECK(pthread_create(&thread, NULL, traffic, f.log) == 0);
    else {
        gw_producer *p = producer_of(f.log);
        CHECK_EQ(put(p, 100, 4, 20, NULL), GW_OK);
        gw_producer_close(p);
    }
    uint64_t from = now_ms(), killed_after;
    for (;;) {
        CHECK_EQ(gw_log_follow(f.log, GW_FIRST_LSN, timeout_ms), GW_FIRST_LSN);
        siginfo_t info = {0};
        CHECK(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT | WNOHANG) == 0);
        killed_after = now_ms() - from;
        if (info.si_pid == pid)
            break;
        CHECK(killed_after < 2500);
    }
    CHECK(killed_after >= 250);
    CHECK_EQ(gw_log_follow(f.log, GW_FIRST_LSN, 100), GW_FIRST_LSN); /* killed, but nobody has seen it dead */
    gw_counter_block *counters = gw_log_counters(f.log, GW_BLOCK_DELIVERY);
    CHECK_EQ(counters->word[GW_COUNTER_PADS], 0);
    CHECK_EQ(counters->word[GW_COUNTER_KILLED_STUCK], 1);
    bury(&f, pid);
    atomic_store(&busy, false);
    if (with_traffic)
        CHECK(pthread_join(thread, NULL) == 0);
    follow_to_the_tail_within(f.log, 1000);
    CHECK_EQ(counters->word[GW_COUNTER_PADS], 1);
    gw_record r;
    CHECK_EQ(gw_log_read(f.log, GW_FIRST_LSN, &r), GW_OK);
    CHECK_EQ(r.kind, GW_PAD);
    CHECK_EQ(r.size, record_size(0, 500));
    fixture_end(&f);
}

static void stopped_producer_is_killed_and_only_then_padded(void)
{
    stopped_producer_is_killed_then_padded(false, 300);
}

static void stopped_producer_is_killed_under_traffic(void)
{
    stopped_producer_is_killed_then_padded(true, 300);
}

static void stopped_producer_is_killed_by_a_follower_of_short_waits(void)
{
    stopped_producer_is_killed_then_padded(false, 10);
}

static void producer_that_goes_on_in_time_is_left_alone(void)
{
    fixture f = fixture_new();
    pid_t pid = appender(&f, "mid_copy", SIGSTOP, 1, 500);
    await_stop(pid);
    for (uint64_t from = now_ms(); now_ms() - from < 120;)
        CHECK_EQ(gw_log_follow(f.log, GW_FIRST_LSN, 20), GW_FIRST_LSN);
    CHECK(kill(pid, SIGCONT) == 0);
    follow_to_the_tail_within(f.log, 5000);
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_SEQS(f.log, GW_FIRST_LSN, 1);
    fixture_end(&f);
}

/* Lock-free: one producer stands still after its claim, another fills the whole log. */
static void stopped_claim_holds_nobody_up(void)
{
    fixture f = fixture_new();
    pid_t pid = appender(&f, "after_claim", SIGSTOP, 1, 500);
    await_stop(pid);
    gw_producer *p = producer_of(f.log);
    uint64_t id = 1, from = now_ms();
    gw_status status;
    while ((status = put(p, ++id, 4, 1000, NULL)) == GW_OK)
        ;
    CHECK_EQ(status, GW_FULL);
    CHECK(now_ms() - from < 5000);
    CHECK(GW_FIRST_LSN + CAPACITY - gw_log_tail(f.log) < record_size(4, 1000));
    CHECK_EQ(follow(f.log), GW_FIRST_LSN);
    CHECK(kill(pid, SIGCONT) == 0);
    follow_to_the_tail_within(f.log, 5000);
    CHECK_EQ(publish(f.log, 0, gw_log_committed(f.log)), id - 1);
    CHECK(waitpid(pid, NULL, 0) == pid);
    gw_producer_close(p);
    fixture_end(&f);
}

/* ---- delivery process ----------------------------------------------------------------------------------------- */

static void follower_killed_inside_a_pad_is_followed_by_another(void)
{
    fixture f = fixture_new();
    pid_t dead = appender(&f, "before_marker", SIGKILL, 1, 500);
    bury(&f, dead);
    gw_producer *p = producer_of(f.log);
    CHECK_EQ(put(p, 2, 4, 100, NULL), GW_OK);
    pid_t follower = fork_child();
    if (!follower) {
        gw_log *log = fixture_attach(&f);
        arm("pad_before_marker", SIGKILL);
        follow(log);
        _exit(0);
    }
    int status;
    CHECK(waitpid(follower, &status, 0) == follower && WIFSIGNALED(status));
    CHECK_EQ(gw_log_committed(f.log), GW_FIRST_LSN);
    follow_to_the_tail_within(f.log, 1000);
    CHECK_SEQS(f.log, GW_FIRST_LSN, 2);
    gw_producer_close(p);
    fixture_end(&f);
}

static void committer_killed_at_any_point_is_followed_by_another(void)
{
    static const char *const points[] = {"before_slot", "mid_slot", "after_slot", "after_sync", "after_durable"};
    for (unsigned k = 0; k < 5; k++) {
        NOTE("%s", points[k]);
        fixture f = fixture_new();
        gw_producer *p = producer_of(f.log);
        CHECK_EQ(put(p, 1, 4, 100, NULL), GW_OK);
        uint64_t end = follow(f.log);
        publish(f.log, 0, end);
        pid_t committer = fork_child();
        if (!committer) {
            gw_log *log = fixture_attach(&f);
            arm(points[k], SIGKILL);
            sync_now(log);
            _exit(0);
        }
        int status;
        CHECK(waitpid(committer, &status, 0) == committer && WIFSIGNALED(status));
        CHECK(gw_log_durable(f.log) <= end && gw_log_reclaim(f.log) <= end);
        gw_log *next = fixture_attach(&f);
        CHECK_EQ(gw_log_takeover(next, &f.error), GW_OK);
        CHECK_EQ(put(p, 2, 4, 100, NULL), GW_OK);
        uint64_t later = follow(f.log);
        settle(next);
        CHECK_EQ(gw_log_durable(f.log), later);
        CHECK_EQ(gw_log_reclaim(f.log), end);
        gw_log_close(next);
        gw_producer_close(p);
        fixture_reopen(&f);
        CHECK_EQ(f.report.watermark, later);
        CHECK_EQ(f.report.records, 1);
        fixture_end(&f);
    }
}

/* Recovery itself is killed, again and again, between any two of its steps; the next one finds the same. */
static void recovery_killed_at_any_point_is_repeated(void)
{
    fixture f = fixture_with(MQTT_AND_FILE);
    gw_producer *p = producer_of(f.log);
    for (unsigned i = 1; i <= 10; i++) {
        CHECK_EQ(put(p, i, 4, 100, NULL), GW_OK);
        follow(f.log);
        if (i == 3)
            settle(f.log);
    }
    publish(f.log, 1, GW_FIRST_LSN + 6 * record_size(4, 100));
    settle(f.log);
    gw_producer_close(p);
    fixture_close(&f);
    uint8_t *image = image_of(&f);
    image_slot(image, newest_of(image))->magic = 0; /* the older slot: a watermark below the second hole */
    for (unsigned id = 2; id <= 8; id += 3)
        image_byte(image, GW_FIRST_LSN + (id - 1) * record_size(4, 100))[70] ^= 1;
    static const char *const points[] = {"pad_before_marker", "mid_slot"};
    for (unsigned k = 0; k < 2; k++)
        for (unsigned nth = 1; nth <= 3; nth++) {
            fixture_rewrite(&f, image);
            for (unsigned again = 0; again < 3; again++) {
                NOTE("%s, time %u, round %u", points[k], nth, again);
                pid_t pid = fork_child();
                if (!pid) {
                    arm(points[k], SIGKILL);
                    hook_countdown = nth;
                    _exit(fixture_open(&f, true) == GW_OK ? 0 : 1);
                }
                int status;
                CHECK(waitpid(pid, &status, 0) == pid);
                CHECK(WIFSIGNALED(status) || (WIFEXITED(status) && WEXITSTATUS(status) == 0));
                if (nth == 1)
                    CHECK(WIFSIGNALED(status) || (k == 0 && again));
            }
            CHECK_EQ(fixture_open(&f, true), GW_OK);
            CHECK_SEQS(f.log, GW_FIRST_LSN, 1, 3, 4, 6, 7, 9, 10);
            gw_record r;
            for (unsigned sink = 0; sink < 2; sink++)
                CHECK_EQ(gw_log_read(f.log, gw_cursor_load(f.log, sink).lsn, &r), GW_OK);
            fixture_close(&f);
        }
    free(image);
    fixture_end(&f);
}

/* ---- everybody, at random -------------------------------------------------------------------------------------- */

enum { WORKERS = 3, PER_WORKER = 200000 };

typedef struct board {                                   /* shared by all processes of a test */
    _Atomic uint32_t answered[WORKERS][PER_WORKER / 32]; /* a bit a number: told 202 */
    _Atomic uint32_t next[WORKERS];
    _Atomic int pid[WORKERS + 1];
} board;

static board *board_new(void)
{
    board *b = mmap(NULL, sizeof *b, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(b != MAP_FAILED);
    return b;
}

static void work(gw_log *log, board *b, unsigned worker, bool mortal)
{
    gw_producer *p;
    while (gw_producer_open(log, &p) != GW_OK)
        usleep(1000);
    uint64_t random = scramble((uint64_t)getpid());
    if (mortal && random % 3) { /* killed or stopped inside a claim; else from outside, anywhere */
        arm(POINTS[random / 4 % N_POINTS], random >> 20 & 7 ? SIGKILL : SIGSTOP);
        hook_countdown = 1 + random / 64 % 400;
    }
    for (;;) {
        uint32_t n = atomic_fetch_add(&b->next[worker], 1);
        if (n >= PER_WORKER)
            pause();
        random = scramble(random);
        unsigned body = (unsigned)(random % 16 ? random % 400 : random % 30000);
        gw_status status;
        while ((status = put(p, (uint64_t)n * WORKERS + worker, 5, body, NULL)) == GW_FULL)
            usleep(300);
        if (n % 16 == 0)
            usleep(100);
        if (status != GW_OK)
            _exit(0);
        atomic_fetch_or(&b->answered[worker][n / 32], 1u << n % 32);
    }
}

static pid_t worker_start(fixture *f, board *b, unsigned worker, bool mortal)
{
    pid_t pid = fork_child();
    if (!pid)
        work(fixture_attach(f), b, worker, mortal);
    return pid;
}

static uint32_t (*seen)[PER_WORKER / 32];

static void see(const gw_record *r, int64_t *last)
{
    if (r->kind != GW_DATA)
        return;
    CHECK(is_sample(r));
    unsigned worker = r->seq % WORKERS, n = (unsigned)(r->seq / WORKERS);
    CHECK((int64_t)n > last[worker]); /* in order, once */
    last[worker] = n;
    seen[worker][n / 32] |= 1u << n % 32;
}

static unsigned check_all_answered_are_seen(board *b)
{
    unsigned answered = 0;
    for (unsigned w = 0; w < WORKERS; w++)
        for (unsigned i = 0; i < PER_WORKER / 32; i++) {
            uint32_t yes = atomic_load(&b->answered[w][i]);
            CHECK_EQ(yes & ~seen[w][i], 0);
            answered += (unsigned)__builtin_popcount(yes);
        }
    return answered;
}

static void *committer_thread(void *context)
{
    gw_error error;
    CHECK_EQ(gw_log_run_committer(context, 2, &error), GW_OK);
    return NULL;
}

/* Workers are killed or stopped at random and started again, while the log laps; whatever was answered is published. */
static void random_deaths_lose_nothing_that_was_answered(void)
{
    uint64_t seed = (uint64_t)environment_number("GW_DEATH_SEED", (long)(now_ms() % 100000)), random = seed;
    unsigned deaths = (unsigned)environment_number("GW_DEATHS", 60);
    printf("seed %llu ... ", (unsigned long long)seed);
    fflush(stdout);
    NOTE("seed %llu", (unsigned long long)seed);
    fixture f = fixture_new();
    board *b = board_new();
    seen = calloc(WORKERS, sizeof *seen);
    int64_t last[WORKERS] = {-1, -1, -1};
    pthread_t committer;
    CHECK(pthread_create(&committer, NULL, committer_thread, f.log) == 0);
    pid_t pid[WORKERS];
    for (unsigned w = 0; w < WORKERS; w++)
        pid[w] = worker_start(&f, b, w, true);
    gw_cursor c = gw_cursor_load(f.log, 0);
    uint64_t next_death = now_ms() + 20, progress_at = now_ms();
    bool draining = false;
    while (!draining || gw_log_committed(f.log) < gw_log_tail(f.log) || c.lsn < gw_log_committed(f.log)) {
        gw_log_follow(f.log, c.lsn, 5);
        for (uint64_t committed = gw_log_committed(f.log); c.lsn < committed;) {
            gw_record r;
            CHECK_EQ(gw_log_read(f.log, c.lsn, &r), GW_OK);
            see(&r, last);
            c.lsn += r.size;
            c.ordinal += r.kind == GW_DATA;
            c.published += r.kind == GW_DATA;
            progress_at = now_ms();
        }
        gw_cursor_store(f.log, 0, &c);
        CHECK(now_ms() - progress_at < 5000);
        if (!draining && now_ms() >= next_death) {
            random = scramble(random);
            unsigned w = random % WORKERS;
            kill(pid[w], random >> 20 & 7 ? SIGKILL : SIGSTOP); /* a stopped one is killed by the reaper or later */
            next_death = now_ms() + random / 1024 % 20;
            if (!--deaths) {
                draining = true;
                for (unsigned i = 0; i < WORKERS; i++)
                    kill(pid[i], SIGKILL);
            }
        }
        for (unsigned w = 0; w < WORKERS; w++) {
            siginfo_t info = {0};
            if (pid[w] && waitid(P_PID, (id_t)pid[w], &info, WEXITED | WNOWAIT | WNOHANG) == 0 && info.si_pid) {
                bury(&f, pid[w]);
                pid[w] = draining ? 0 : worker_start(&f, b, w, true);
            }
        }
    }
    gw_log_stop_committer(f.log);
    CHECK(pthread_join(committer, NULL) == 0);
    for (unsigned w = 0; w < WORKERS; w++)
        if (pid[w])
            bury(&f, pid[w]);
    CHECK_EQ(owned_slots(f.log), 0);
    CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
    CHECK(gw_log_counters(f.log, GW_BLOCK_DELIVERY)->word[GW_COUNTER_PADS] > 0);
    printf("%u answered, %llu pads ... ", check_all_answered_are_seen(b),
           (unsigned long long)gw_log_counters(f.log, GW_BLOCK_DELIVERY)->word[GW_COUNTER_PADS]);
    free(seen);
    munmap(b, sizeof *b);
    fixture_end(&f);
}

static uint32_t begun(board *b)
{
    uint32_t sum = 0;
    for (unsigned w = 0; w < WORKERS; w++)
        sum += atomic_load(&b->next[w]);
    return sum;
}

/* Supervisor and workers die at once, several times over on one file. */
static void death_of_everybody_loses_nothing_that_was_answered(void)
{
    fixture f = fixture_new();
    fixture_close(&f);
    board *b = board_new();
    seen = calloc(WORKERS, sizeof *seen);
    int64_t last[WORKERS] = {-1, -1, -1};
    for (unsigned round = 0; round < 5; round++) {
        NOTE("round %u", round);
        pid_t supervisor = fork_child();
        if (!supervisor) {
            CHECK_EQ(fixture_open(&f, false), GW_OK);
            for (unsigned w = 0; w < WORKERS; w++)
                atomic_store(&b->pid[w], worker_start(&f, b, w, false));
            atomic_store(&b->pid[WORKERS], 1);
            gw_log *log = f.log;
            for (;;)
                gw_log_follow(log, gw_log_committed(log), 100);
        }
        uint32_t before = begun(b);
        for (uint64_t until = now_ms() + 10000;
             !atomic_load(&b->pid[WORKERS]) || begun(b) < before + 60 + round * 30;) {
            CHECK(now_ms() < until);
            usleep(200);
        }
        kill(supervisor, SIGKILL);
        for (unsigned w = 0; w < WORKERS; w++)
            kill(atomic_load(&b->pid[w]), SIGKILL);
        atomic_store(&b->pid[WORKERS], 0);
        CHECK(waitpid(supervisor, NULL, 0) == supervisor);
        gw_status status;
        for (uint64_t until = now_ms() + 5000; (status = fixture_open(&f, false)) == GW_LOCKED;) {
            CHECK(now_ms() < until); /* old writers outlive the supervisor a little */
            usleep(500);
        }
        CHECK_EQ(status, GW_OK);
        gw_cursor c = gw_cursor_load(f.log, 0);
        while (c.lsn < gw_log_committed(f.log)) {
            gw_record r;
            CHECK_EQ(gw_log_read(f.log, c.lsn, &r), GW_OK);
            see(&r, last);
            c.lsn += r.size;
            c.ordinal += r.kind == GW_DATA;
            c.published += r.kind == GW_DATA;
        }
        gw_cursor_store(f.log, 0, &c);
        settle(f.log);
        check_all_answered_are_seen(b);
        CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
        fixture_close(&f);
    }
    free(seen);
    munmap(b, sizeof *b);
    fixture_end(&f);
}

#define T(name)     \
    {               \
#name, name \
    }
static const test TESTS[] = {
    T(every_death_leaves_exactly_its_hole),
    T(two_deaths_at_every_pair_of_points_leave_exactly_their_holes),
    T(three_deaths_leave_exactly_their_holes),
    T(dead_claim_over_the_ring_end_is_padded),
    T(stopped_producer_is_killed_and_only_then_padded),
    T(stopped_producer_is_killed_under_traffic),
    T(stopped_producer_is_killed_by_a_follower_of_short_waits),
    T(producer_that_goes_on_in_time_is_left_alone),
    T(stopped_claim_holds_nobody_up),
    T(follower_killed_inside_a_pad_is_followed_by_another),
    T(committer_killed_at_any_point_is_followed_by_another),
    T(recovery_killed_at_any_point_is_repeated),
    T(random_deaths_lose_nothing_that_was_answered),
    T(death_of_everybody_loses_nothing_that_was_answered),
};

int main(int argc, char **argv)
{
    return run_tests(TESTS, sizeof TESTS / sizeof *TESTS, argc, argv);
}
#endif
