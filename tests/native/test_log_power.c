/* test_log_power.c - power cuts, at random from seeds, over the real recovery.
 *
 * A run drives a log of 1 MiB with two sinks, and a third one that is optional after most starts: appends, claims
 * left half-way, deaths, publishing, group commits, dead committers. What the disk may hold is modelled beside it:
 * `version[0]` is the file as the last fdatasync that returned has covered it, the others are later states. A
 * power cut makes an image in which each 512-byte sector is of any version or of now; a kill keeps all of now. The
 * real recovery opens the image, and may be cut itself. Then:
 *
 *   1 every record that was durable is there, byte for byte (guarantee 1), after a kill every one committed (2)
 *   4 nothing lies below a sink's cursor that the sink never published, or skipped and counted
 *   5 the books balance
 *   6 nothing is read that was never written, or was lost by an earlier recovery, or stands elsewhere
 *   8 an image of a power cut is never reported as corruption
 *  11 a repeat of what is there is recognised, and receipts tell what became of each event
 *
 *   GW_POWER_RUNS=N GW_POWER_SEED=S    N runs from seed S on
 *   GW_POWER_LIE=1                     fdatasync lies: a control, the test must fail
 *
 * Sources: _native/gw_log*.c _native/gw_crc32c.c */
#include "log_fixture.h"

#ifndef GW_FAILPOINTS
int main(void)
{
    return 0; /* needs claims that stop half-way */
}
#else

enum { EVENTS_MAX = 4000, VERSIONS_MAX = 8, OPEN_MAX = 3, SINKS = 3, STEPS = 220, SECTOR = 512 };

typedef struct truth {
    uint64_t lsn, size;
    unsigned device_id_bytes, body_bytes;
    bool claimed, committed, durable, lost, published[SINKS];
    char receipt[GW_RECEIPT_BYTES_MAX];
} truth;

static const char *const NAMES[] = {"mqtt", "file", "third", NULL};
enum { THIRD = 2 };

static struct run {
    fixture f;
    uint64_t random, seed;
    truth truth[EVENTS_MAX]; /* by seq */
    unsigned events;
    halted open[OPEN_MAX];
    bool is_open[OPEN_MAX];
    gw_producer *producer;
    uint8_t *version[VERSIONS_MAX];
    unsigned versions;
    enum { RUNNING, RECOVERING } mode;
    unsigned recovery_syncs, recovery_dies_at;
    bool cut_in_sync, all_killed, lies;
    uint64_t skipped[SINKS];
} run;

static unsigned images, recoveries_cut, recovered_records, takeovers, skips, moved, stayed;

static unsigned dice(unsigned sides)
{
    return (unsigned)((run.random = scramble(run.random)) >> 33) % sides;
}

#define MUST(condition, ...)                                 \
    do {                                                     \
        if (!(condition)) {                                  \
            fprintf(stderr, __VA_ARGS__);                    \
            fprintf(stderr, "\n");                           \
            NOTE("seed %llu", (unsigned long long)run.seed); \
            CHECK(condition);                                \
        }                                                    \
    } while (0)

/* ---- what the disk may hold ----------------------------------------------------------------------------------- */

static void versions_drop(unsigned first)
{
    for (unsigned i = 0; i < first; i++)
        free(run.version[i]);
    memmove(run.version, run.version + first, (run.versions - first) * sizeof *run.version);
    run.versions -= first;
}

static void version_note(void)
{
    if (run.versions < VERSIONS_MAX - 1)
        run.version[run.versions++] = image_of(&run.f);
}

static void versions_are_only(uint8_t *image)
{
    versions_drop(run.versions);
    run.version[run.versions++] = image;
}

/* ---- what goes on --------------------------------------------------------------------------------------------- */

static unsigned some_body(void)
{
    switch (dice(5)) {
    case 0:
    case 1:
        return dice(240);
    case 2:
    case 3:
        return 2000 + dice(14000);
    default:
        return 30000 + dice(80000);
    }
}

static void op_append(void)
{
    if (run.events + 1 >= EVENTS_MAX)
        return;
    unsigned id = run.events, body = some_body();
    uint64_t lsn;
    gw_status status = put(run.producer, id, 3, body, &lsn);
    if (status != GW_OK) {
        MUST(status == GW_FULL || gw_log_state(run.f.log) != GW_RUNNING, "append: status %d", status);
        return;
    }
    run.truth[id] = (truth){.lsn = lsn,
                            .size = record_size(3, body),
                            .device_id_bytes = 3,
                            .body_bytes = body,
                            .claimed = true,
                            .committed = true};
    gw_log_receipt(run.f.log, lsn, run.truth[id].receipt);
    run.events++;
}

static void op_open(void)
{
    static const char *const points[] = {"after_intent", "after_claim", "mid_copy", "before_marker"};
    if (run.events + 1 >= EVENTS_MAX)
        return;
    for (unsigned i = 0; i < OPEN_MAX; i++) {
        if (run.is_open[i])
            continue;
        unsigned id = run.events++, body = some_body();
        run.is_open[i] = halted_try(&run.open[i], run.f.log, points[dice(4)], id, body);
        return;
    }
}

static void op_close(unsigned i, bool alive)
{
    if (!run.is_open[i])
        return;
    halted *h = &run.open[i];
    unsigned body_bytes = h->sample.event.body_bytes;
    uint64_t id = h->sample.event.seq, size = record_size(0, body_bytes);
    run.is_open[i] = false;
    if (!alive) {
        halted_kill(h, true);
        return;
    }
    gw_status status = halted_finish(h);
    if (status == GW_OK) {
        run.truth[id] =
            (truth){.lsn = h->lsn, .size = size, .body_bytes = body_bytes, .claimed = true, .committed = true};
        gw_log_receipt(run.f.log, h->lsn, run.truth[id].receipt);
    }
}

static void op_publish(void)
{
    unsigned sink = dice(3) ? 0 : dice(4) ? 1 : THIRD;
    uint64_t committed = follow(run.f.log);
    if (gw_log_lapped(run.f.log, gw_cursor_load(run.f.log, sink).lsn)) {
        MUST(!gw_log_is_required(run.f.log, sink), "required sink %u is lapped", sink);
        skips += gw_log_skip(run.f.log, sink) > 0;
    }
    gw_cursor c = gw_cursor_load(run.f.log, sink);
    for (unsigned n = 1 + dice(8); n && c.lsn < committed; n--) {
        gw_record r;
        gw_status status = gw_log_read(run.f.log, c.lsn, &r);
        MUST(status == GW_OK, "sink %u reads status %d at %llu, committed %llu", sink, status,
             (unsigned long long)c.lsn, (unsigned long long)committed);
        if (r.kind == GW_DATA) {
            MUST(r.seq < run.events && run.truth[r.seq].lsn == r.lsn && is_sample(&r),
                 "sink %u reads a wrong record at %llu", sink, (unsigned long long)c.lsn);
            run.truth[r.seq].published[sink] = true;
            c.published++;
            c.ordinal++;
        }
        c.lsn += r.size;
    }
    gw_cursor_store(run.f.log, sink, &c);
}

static void op_small(void)
{
    switch (dice(8)) {
    case 0:
    case 1:
    case 2:
        op_append();
        break;
    case 3:
        op_open();
        break;
    case 4:
        op_close(dice(OPEN_MAX), true);
        break;
    case 5:
        op_close(dice(OPEN_MAX), false);
        break;
    default:
        op_publish();
    }
    if (dice(3) == 0)
        version_note();
}

static int power_fdatasync(int fd)
{
    (void)fd;
    if (run.mode == RECOVERING) {
        if (++run.recovery_syncs == run.recovery_dies_at) {
            errno = EIO;
            return -1;
        }
        if (!run.lies)
            versions_are_only(image_of(&run.f));
        return 0;
    }
    uint8_t *covered = image_of(&run.f);
    unsigned older = run.versions;
    for (unsigned n = dice(4); n; n--)
        op_small();
    if (dice(12) == 0) {
        run.cut_in_sync = true;
        free(covered);
        errno = EIO;
        return -1;
    }
    if (run.lies) {
        free(covered);
        return 0;
    }
    versions_drop(older);
    memmove(run.version + 1, run.version, run.versions * sizeof *run.version);
    run.version[0] = covered;
    run.versions++;
    return 0;
}

static jmp_buf died;
static const char *dies_at;

static void power_hook(const char *name)
{
    if (halted_self)
        halted_hook(name);
    else if (dies_at && strcmp(name, dies_at) == 0)
        longjmp(died, 1);
}

static void now_durable(void)
{
    uint64_t durable = gw_log_durable(run.f.log);
    for (unsigned i = 0; i < run.events; i++) {
        truth *t = &run.truth[i];
        if (t->committed && !t->lost && t->lsn + t->size <= durable)
            t->durable = true;
    }
}

static void op_sync(void)
{
    bool changed;
    if (gw_log_sync(run.f.log, &changed, &run.f.error) == GW_OK)
        now_durable();
    else
        MUST(run.cut_in_sync, "sync failed: %s", run.f.error.text);
}

/* The committer is killed anywhere; another one goes on. */
static void op_committer_dies(void)
{
    static const char *const points[] = {"before_slot", "mid_slot", "after_slot", "after_sync", "after_durable"};
    dies_at = points[dice(5)];
    if (!setjmp(died)) {
        op_sync();
        dies_at = NULL;
        return; /* the power failed first */
    }
    dies_at = NULL;
    now_durable();      /* what somebody may have been told */
    if (dice(3) == 0) { /* everybody was */
        run.all_killed = true;
        return;
    }
    takeovers++;
    gw_status status = gw_log_takeover(run.f.log, &run.f.error);
    MUST(status == GW_OK || run.cut_in_sync, "takeover: %s", run.f.error.text);
}

/* ---- crash and recovery --------------------------------------------------------------------------------------- */

static void verify(bool kill)
{
    gw_log *log = run.f.log;
    static bool got[EVENTS_MAX];
    memset(got, 0, sizeof got);
    uint64_t least = UINT64_MAX, committed = gw_log_committed(log), required = gw_log_least_cursor(log);
    for (unsigned k = 0; k < SINKS; k++)
        if (gw_cursor_load(log, k).lsn < least)
            least = gw_cursor_load(log, k).lsn; /* a place below reclaim too is whole now */
    stayed += least < required;
    gw_record r;
    bool stood[SINKS] = {false};
    for (uint64_t lsn = least; lsn < committed; lsn += r.size) {
        for (unsigned k = 0; k < SINKS; k++)
            stood[k] |= gw_cursor_load(log, k).lsn == lsn;
        gw_status status = gw_log_read(log, lsn, &r);
        MUST(status == GW_OK, "after recovery nothing whole stands at %llu", (unsigned long long)lsn);
        if (r.kind == GW_PAD)
            continue;
        MUST(r.seq < run.events && run.truth[r.seq].claimed, "a record that never was: seq %llu at %llu",
             (unsigned long long)r.seq, (unsigned long long)lsn);
        truth *t = &run.truth[r.seq];
        MUST(t->lsn == lsn && t->size == r.size, "record %llu was moved", (unsigned long long)r.seq);
        MUST(!t->lost, "record %llu rises from the dead", (unsigned long long)r.seq);
        MUST(is_sample(&r), "record %llu has other bytes", (unsigned long long)r.seq);
        got[r.seq] = true;
        recovered_records++;
    }
    for (unsigned k = 0; k < SINKS; k++) {
        gw_cursor c = gw_cursor_load(log, k);
        MUST(c.lsn == committed || stood[k], "the cursor of sink %u points into nothing", k);
        MUST(gw_log_unexplained(log, k) == 0, "sink %u: %lld unexplained", k, (long long)gw_log_unexplained(log, k));
        MUST(c.ordinal - c.base == c.published + c.dead_lettered + c.skipped, "sink %u: books", k);
        MUST(k == THIRD || !c.skipped, "required sink %u has skipped %llu", k, (unsigned long long)c.skipped);
        uint64_t missed = 0;
        for (unsigned i = 0; i < run.events; i++)
            missed +=
                run.truth[i].committed && !run.truth[i].lost && run.truth[i].lsn < c.lsn && !run.truth[i].published[k];
        MUST(missed <= c.skipped, "%llu records lie below the cursor of sink %u, which has skipped %llu",
             (unsigned long long)missed, k, (unsigned long long)c.skipped);
        moved += c.skipped != run.skipped[k];
        run.skipped[k] = c.skipped;
    }
    for (unsigned i = 0; i < run.events; i++) {
        truth *t = &run.truth[i];
        if (got[i]) {
            t->committed = t->durable = true;
            continue;
        }
        if (t->committed && !t->lost && t->lsn >= least) {
            MUST(!t->durable, "durable record %u at %llu is gone", i, (unsigned long long)t->lsn);
            MUST(!kill, "record %u at %llu was committed and is gone after a kill", i, (unsigned long long)t->lsn);
            t->lost = true;
        }
        if (!t->committed)
            t->lost = true;
    }
}

static void verify_receipts(void)
{
    gw_log *log = run.f.log;
    uint64_t least = gw_log_least_cursor(log), tail = gw_log_tail(log);
    for (unsigned i = 0; i < run.events; i++) {
        const truth *t = &run.truth[i];
        if (!t->committed || !t->receipt[0])
            continue;
        uint64_t lsn;
        enum gw_receipt_state state = gw_log_receipt_state(log, t->receipt, strlen(t->receipt), &lsn);
        bool lapped = tail > t->lsn + CAPACITY, ok;
        if (t->lost)
            ok = state == GW_RECEIPT_LOST || ((lapped || t->lsn < least) && state == GW_RECEIPT_UNKNOWN);
        else if (lapped)
            ok = state == GW_RECEIPT_FINISHED || state == GW_RECEIPT_UNKNOWN;
        else if (t->lsn < least)
            ok = state == GW_RECEIPT_DELIVERED || state == GW_RECEIPT_FINISHED || state == GW_RECEIPT_UNKNOWN;
        else
            ok = state == GW_RECEIPT_DURABLE; /* recovery has synced it */
        MUST(ok, "the receipt of event %u at %llu says %d (lost %d, lapped %d, least cursor %llu)", i,
             (unsigned long long)t->lsn, (int)state, t->lost, lapped, (unsigned long long)least);
    }
}

/* Of the events whose number gives them a key; those below the cursors may have been torn since they were published. */
static void verify_repeats(void)
{
    uint64_t least = gw_log_least_cursor(run.f.log), lsn;
    for (unsigned i = 0; i < run.events; i++) {
        const truth *t = &run.truth[i];
        if ((i & 2) && t->committed && !t->lost && t->lsn >= least && t->size < 20000) {
            gw_status status = put(run.producer, i, t->device_id_bytes, t->body_bytes, &lsn);
            MUST(status == GW_DUPLICATE && lsn == t->lsn, "a repeat of event %u at %llu gets status %d", i,
                 (unsigned long long)t->lsn, (int)status);
        }
    }
}

static void cut(void)
{
    uint8_t *now = image_of(&run.f), *image = malloc(FILE_BYTES);
    CHECK(image);
    run.version[run.versions++] = now;
    unsigned mode = dice(4);
    for (uint64_t at = 0; at < FILE_BYTES; at += SECTOR) {
        unsigned of = dice(run.versions);
        if (mode == 1 && dice(5))
            of = 0;
        if (mode == 2 && dice(5))
            of = run.versions - 1;
        memcpy(image + at, run.version[of] + at, SECTOR);
    }
    fixture_rewrite(&run.f, image);
    versions_are_only(image);
}

static void op_crash(bool kill)
{
    for (unsigned i = 0; i < OPEN_MAX; i++)
        op_close(i, false);
    gw_producer_close(run.producer);
    run.producer = NULL;
    fixture_close(&run.f);
    run.cut_in_sync = run.all_killed = false;
    if (!kill)
        cut();
    run.mode = RECOVERING;
    for (bool power_failed = !kill;;) {
        images++;
        run.recovery_syncs = 0;
        run.recovery_dies_at = dice(3) ? 0 : 1 + dice(2);
        run.f.optional = dice(3) ? 1u << THIRD : 0;
        gw_status status = fixture_open(&run.f, false);
        if (status == GW_OK) {
            kill = !power_failed;
            break;
        }
        MUST(run.recovery_dies_at && status == GW_ERRNO && run.f.error.error_number == EIO,
             "an undamaged image is refused: status %d, %s, lsn %llu", status, run.f.error.text,
             (unsigned long long)run.f.error.lsn);
        recoveries_cut++;
        if (dice(2)) { /* the power fails now, or only the process is gone */
            cut();
            power_failed = true;
        }
    }
    run.mode = RUNNING;
    verify(kill);
    verify_receipts();
    run.producer = producer_of(run.f.log);
    verify_repeats();
}

static void one_run(uint64_t seed, bool lies)
{
    memset(&run, 0, sizeof run);
    run.seed = run.random = seed;
    run.lies = lies;
    run.mode = RECOVERING;
    on_fdatasync = power_fdatasync;
    gw_failpoint_hook = power_hook;
    run.f = fixture_on(fresh_image(), NAMES);
    run.f.optional = 1u << THIRD;
    run.version[run.versions++] = image_of(&run.f);
    CHECK_EQ(fixture_open(&run.f, false), GW_OK);
    run.mode = RUNNING;
    run.producer = producer_of(run.f.log);
    for (unsigned step = 0; step < STEPS; step++) {
        unsigned what = dice(100);
        if (what < 72)
            op_small();
        else if (what < 90)
            op_sync();
        else if (what < 93)
            op_committer_dies();
        else
            op_crash(what >= 97);
        if (run.cut_in_sync || run.all_killed)
            op_crash(run.all_killed || dice(4) == 0);
        follow(run.f.log);
        MUST(gw_log_state(run.f.log) == GW_RUNNING, "the log is in state FAILED");
    }
    for (unsigned i = 0; i < OPEN_MAX; i++)
        op_close(i, false);
    gw_producer_close(run.producer);
    fixture_end(&run.f);
    versions_drop(run.versions);
}

static void every_image_of_a_power_cut_is_recovered(void)
{
    uint64_t seed = (uint64_t)environment_number("GW_POWER_SEED", 1);
    long runs = environment_number("GW_POWER_RUNS", 40);
    for (long i = 0; i < runs; i++)
        one_run(seed + (uint64_t)i, environment_number("GW_POWER_LIE", 0));
    printf(
        "seeds %llu to %llu, %u images, %u recoveries cut, %u records, %u takeovers, %u skips, %u times skipped more "
        "at a start, %u places below reclaim ... ",
        (unsigned long long)seed, (unsigned long long)(seed + (uint64_t)runs - 1), images, recoveries_cut,
        recovered_records, takeovers, skips, moved, stayed);
    gw_failpoint_hook = NULL;
}

int main(int argc, char **argv)
{
    samples_have_keys = true;
    static const test tests[] = {{"every_image_of_a_power_cut_is_recovered", every_image_of_a_power_cut_is_recovered}};
    return run_tests(tests, 1, argc, argv);
}
#endif
