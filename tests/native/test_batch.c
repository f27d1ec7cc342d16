/* test_batch.c - many events in one call: where they are found in a body, what is in the log when the batch ends early
 * or its process dies in the middle, and that each key is in once whoever sends it how often.
 *
 * Sources: _native/gw_batch.c _native/gw_ingest.c _native/gw_log*.c _native/gw_crc32c.c _native/gw_validator*.c */
#include <stdarg.h>
#include <sys/prctl.h>

#include "gw_batch.h"
#include "log_fixture.h"

static const uint64_t HASH_KEY[2] = {0x0706050403020100ull, 0x0f0e0d0c0b0a0908ull};
static const gw_batch_limits LIMITS = {65536, 10000};
static const uint8_t DEVICE[] = "line-7";
enum { DEVICE_BYTES = sizeof DEVICE - 1 };

typedef struct text {
    char *at;
    size_t bytes;
} text;

__attribute__((format(printf, 2, 3))) static void say(text *t, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    char more[512];
    const int bytes = vsnprintf(more, sizeof more, format, arguments);
    va_end(arguments);
    CHECK(bytes >= 0 && bytes < (int)sizeof more);
    t->at = realloc(t->at, t->bytes + (size_t)bytes); /* of its exact size: the sanitizer sees one byte too many */
    CHECK(t->at);
    memcpy(t->at + t->bytes, more, (size_t)bytes);
    t->bytes += (size_t)bytes;
}

/* An array or lines of the events with the keys [from, to). */
static text events(bool lines, unsigned from, unsigned to)
{
    text t = {0};
    say(&t, "%s", lines ? "\n" : "[");
    for (unsigned i = from; i < to; i++)
        say(&t, "%s{\"seq\":%u,\"metrics\":{\"a\":%u},\"payload\":\"]\\\"[\"}",
            i == from ? ""
            : lines   ? "\r\n"
                      : ",",
            i, i);
    say(&t, "%s", lines ? "" : "]");
    return t;
}

static gw_ingest ingest_of(gw_log *log)
{
    return (gw_ingest){.log = log, .producer = producer_of(log), .counters = gw_log_counters(log, 0)};
}

static int send_text(gw_ingest *ingest, gw_batch *batch, const text *t, bool lines)
{
    return gw_ingest_batch(ingest, batch, DEVICE, DEVICE_BYTES, (const uint8_t *)t->at, t->bytes, lines, LIMITS);
}

/* The seqs of all DATA records from `from` to committed. */
static unsigned keys_in(gw_log *log, uint64_t from, uint64_t *keys, unsigned most)
{
    unsigned n = 0;
    const uint64_t committed = follow(log);
    for (gw_record r; from < committed; from += r.size) {
        CHECK_EQ(gw_log_read(log, from, &r), GW_OK);
        if (r.kind == GW_DATA) {
            CHECK(n < most);
            CHECK(r.splice == 1 && r.body[0] == '{' && r.body[r.body_bytes - 1] == '}');
            keys[n++] = r.seq;
        }
    }
    return n;
}

static void check_keys(gw_log *log, uint64_t lsn, unsigned from, unsigned to)
{
    static uint64_t keys[20000];
    CHECK_EQ(keys_in(log, lsn, keys, 20000), to - from);
    for (unsigned i = 0; i < to - from; i++)
        CHECK_EQ(keys[i], from + i);
}

static void take_everything(gw_log *log)
{
    gw_cursor c = gw_cursor_load(log, 0);
    const uint64_t events = (follow(log), gw_log_committed_ordinal(log)) - c.ordinal;
    c.lsn = gw_log_committed(log), c.ordinal += events, c.published += events;
    gw_cursor_store(log, 0, &c);
    settle(log);
}

/* ---- framing -------------------------------------------------------------------------------------------------- */

static gw_batch split(const char *body, size_t bytes, bool lines)
{
    static gw_batch batch;
    uint8_t *exact = malloc(bytes + !bytes);
    CHECK(exact);
    memcpy(exact, body, bytes);
    gw_batch_split(&batch, exact, bytes, lines, false, HASH_KEY, LIMITS);
    free(exact);
    return batch;
}

#define E "{\"metrics\":{}}"

static void each_item_of_an_array_is_found(void)
{
    static const struct {
        const char *body, *items[8];
    } rows[] = {
        {"[" E "]", {E}},
        {" \t\r\n[ \t\r\n" E " \t\r\n, \t\r\n" E " \t\r\n] \t\r\n", {E, E}},
        {"[1,-2.5e3,\"a]\\\"[\",tru,[[],{}],{\"a\":[1,{}]}," E "]",
         {"1", "-2.5e3", "\"a]\\\"[\"", "tru", "[[],{}]", "{\"a\":[1,{}]}", E}},
        {"[{\"a\":\"}]\\\\\"}," E "]", {"{\"a\":\"}]\\\\\"}", E}},
        {"[{,}," E "]", {"{,}", E}},
        {"[{:}," E "]", {"{:}", E}},
        {"[\xef\xbb\xbf," E "]", {"\xef\xbb\xbf", E}},
        {"[{\"a\":1 2}," E "]", {"{\"a\":1 2}", E}},
        {" " E " ", {E}},
        {"{\"a\"}", {"{\"a\"}"}},
    };
    for (unsigned i = 0; i < sizeof rows / sizeof *rows; i++) {
        NOTE("%s", rows[i].body);
        const gw_batch b = split(rows[i].body, strlen(rows[i].body), false);
        CHECK_EQ(b.code, 0);
        unsigned n = 0;
        for (; n < 8 && rows[i].items[n]; n++) {
            CHECK(n < b.items);
            CHECK_EQ(b.item[n].bytes, strlen(rows[i].items[n]));
            CHECK(memcmp(rows[i].body + b.item[n].offset, rows[i].items[n], b.item[n].bytes) == 0);
            CHECK_EQ(b.item[n].code == 0, strcmp(rows[i].items[n], E) == 0);
        }
        CHECK_EQ(b.items, n);
    }
    check_note[0] = 0;
}

static void what_is_no_array_is_refused_where_it_breaks(void)
{
    static const struct {
        const char *body;
        enum gw_code code;
        unsigned offset;
    } rows[] = {
        {"", GW_CODE_MALFORMED_JSON, 0},
        {" ", GW_CODE_MALFORMED_JSON, 1},
        {"[]", GW_CODE_EMPTY_BATCH, 2},
        {" [ ] ", GW_CODE_EMPTY_BATCH, 5},
        {"[] ]", GW_CODE_MALFORMED_JSON, 3},
        {"[", GW_CODE_MALFORMED_JSON, 1},
        {"[" E, GW_CODE_MALFORMED_JSON, 15},
        {"[" E ",", GW_CODE_MALFORMED_JSON, 16},
        {"[" E ",]", GW_CODE_MALFORMED_JSON, 16},
        {"[," E "]", GW_CODE_MALFORMED_JSON, 1},
        {"[" E " " E "]", GW_CODE_MALFORMED_JSON, 16},
        {"[" E "]]", GW_CODE_MALFORMED_JSON, 16},
        {"[" E "]x", GW_CODE_MALFORMED_JSON, 16},
        {"[" E "}", GW_CODE_MALFORMED_JSON, 15},
        {"[1 2]", GW_CODE_MALFORMED_JSON, 3},
        {"[1\"a\"]", GW_CODE_MALFORMED_JSON, 2},
        {"[\"a\":1]", GW_CODE_MALFORMED_JSON, 4},
        {"[\"a]", GW_CODE_MALFORMED_JSON, 4},
        {"[\"a\\\"]", GW_CODE_MALFORMED_JSON, 6},
        {"[{\"a\":[}]", GW_CODE_MALFORMED_JSON, 7},
        {"[{\"a\":1]", GW_CODE_MALFORMED_JSON, 7},
        {"[{\\\"a\":1}]", GW_CODE_MALFORMED_JSON, 2},
        {"[:]", GW_CODE_MALFORMED_JSON, 1},
        {"\xef\xbb\xbf[" E "]", GW_CODE_MALFORMED_JSON, 0},
        {"7", GW_CODE_NOT_AN_OBJECT, 0},
        {" null", GW_CODE_NOT_AN_OBJECT, 1},
    };
    for (unsigned i = 0; i < sizeof rows / sizeof *rows; i++) {
        NOTE("%s", rows[i].body);
        const gw_batch b = split(rows[i].body, strlen(rows[i].body), false);
        CHECK_EQ(b.code, rows[i].code);
        CHECK_EQ(b.offset, rows[i].offset);
    }
    static const char with_nul[] = "[\0]"; /* a byte like another: an item that is wrong */
    CHECK_EQ(split(with_nul, 3, false).code, 0);
    check_note[0] = 0;
}

static void no_beginning_of_an_array_is_an_array(void)
{
    text t = {0};
    say(&t, "[" E ",{\"a\":\"\\u0041]\"},[{\"b\":[]}]," E "]");
    CHECK_EQ(split(t.at, t.bytes, false).code, 0);
    for (size_t bytes = 0; bytes < t.bytes; bytes++) {
        NOTE("%zu bytes", bytes);
        const gw_batch b = split(t.at, bytes, false);
        CHECK_EQ(b.code, GW_CODE_MALFORMED_JSON);
        CHECK_EQ(b.offset, bytes);
    }
    free(t.at);
    check_note[0] = 0;
}

static void lines_are_found_whatever_ends_them(void)
{
    static const char body[] = "\n\r\n " E " \r\n\t\n" E "\n{\"metrics\":\n{}}\n" E;
    const gw_batch b = split(body, sizeof body - 1, true);
    CHECK_EQ(b.code, 0);
    CHECK_EQ(b.items, 5); /* a line end inside of an event makes two of it, both wrong */
    for (unsigned i = 0; i < 5; i++)
        CHECK_EQ(b.item[i].code, i == 2 || i == 3 ? GW_CODE_MALFORMED_JSON : 0);
    CHECK_EQ(b.item[0].bytes, sizeof E - 1);
    CHECK_EQ(split("", 0, true).code, GW_CODE_EMPTY_BATCH);
    CHECK_EQ(split(" \r\n\n", 4, true).code, GW_CODE_EMPTY_BATCH);
}

/* Brackets deeper than any rule allows: counted, in constant stack, and what stands behind them is still found. */
static void depth_is_counted(void)
{
    for (unsigned depth = 1; depth <= 300000; depth += depth < 130 ? 1 : 99990) {
        NOTE("depth %u", depth);
        char *body = malloc(2ull * depth + 40);
        CHECK(body);
        char *p = body;
        *p++ = '[';
        const unsigned braces = depth < 64 ? depth : 64; /* the outer ones */
        memset(p, '{', braces), memset(p + braces, '[', depth - braces), p += depth;
        memset(p, ']', depth - braces), memset(p + depth - braces, '}', braces), p += depth;
        memcpy(p, "," E "]", sizeof "," E "]"), p += sizeof "," E "]" - 1;
        gw_batch b = split(body, (size_t)(p - body), false);
        CHECK_EQ(b.code, 0);
        CHECK_EQ(b.items, 2);
        CHECK_EQ(b.item[0].bytes, 2 * depth);
        CHECK(b.item[0].code && !b.item[1].code);
        char *const closing = body + 1 + depth + depth / 2, kind = *closing;
        *closing = kind == '}' ? ']' : '}'; /* another kind than the one that it closes */
        b = split(body, (size_t)(p - body), false);
        CHECK_EQ(b.code, depth - depth / 2 <= 64 ? GW_CODE_MALFORMED_JSON : 0);
        *closing = kind;
        body[1] = ' '; /* one too few */
        CHECK_EQ(split(body, (size_t)(p - body), false).code, GW_CODE_MALFORMED_JSON);
        free(body);
    }
    check_note[0] = 0;
}

/* ---- into the log ---------------------------------------------------------------------------------------------- */

static void ten_thousand_events_are_one_batch(void)
{
    fixture f = fixture_new();
    gw_ingest in = ingest_of(f.log);
    gw_batch b = {0};
    for (unsigned lines = 0; lines < 2; lines++) {
        text t = {0};
        say(&t, "%s", lines ? "" : "[");
        for (unsigned i = 0; i < 10000; i++) /* just what 1 MiB takes */
            say(&t, "%s{\"metrics\":{}}", !i ? "" : lines ? "\n" : ",");
        say(&t, "%s", lines ? "" : "]");
        CHECK_EQ(send_text(&in, &b, &t, lines), 0);
        CHECK_EQ(b.items, 10000);
        CHECK_EQ(b.accepted, 10000);
        CHECK_EQ(b.looked_at, 10000);
        take_everything(f.log);
        CHECK_EQ(gw_log_committed_ordinal(f.log), 10000ull * (lines + 1));
        t.at[t.bytes - 1] = lines ? '}' : ',';
        say(&t, "%s{\"metrics\":{}}%s", lines ? "\n" : "", lines ? "" : "]");
        const uint64_t tail = gw_log_tail(f.log);
        CHECK_EQ(send_text(&in, &b, &t, lines), GW_CODE_BATCH_TOO_LARGE);
        CHECK_EQ(gw_log_tail(f.log), tail);
        free(t.at);
    }
    CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
    gw_batch_free(&b);
    gw_producer_close(in.producer);
    fixture_end(&f);
}

static void repeats_inside_a_batch_are_duplicates(void)
{
    fixture f = fixture_new();
    gw_ingest in = ingest_of(f.log);
    gw_batch b = {0};
    text t = {0};
    say(&t,
        "[{\"seq\":1,\"metrics\":{}},{\"seq\":2,\"metrics\":{}}, {\"seq\":1,\"metrics\":{}} ,"
        "{\"seq\":1,\"metrics\":{\"a\":1}},{\"seq\":1,\"boot\":1,\"metrics\":{}},{\"metrics\":{}},{\"metrics\":{}}]");
    for (unsigned round = 0; round < 2; round++) {
        CHECK_EQ(send_text(&in, &b, &t, false), 0);
        CHECK_EQ(b.accepted, round ? 2 : 5); /* those without a key are always new */
        CHECK_EQ(b.duplicates, round ? 4 : 1);
        CHECK_EQ(b.refused, 1);
        CHECK_EQ(b.refusal[0].index, 3);
        CHECK_EQ(b.refusal[0].verdict.code, GW_CODE_SEQ_CONFLICT);
        CHECK_EQ(b.lsns[2], b.lsns[0]);
        CHECK_EQ(b.lsns[3], 0);
        CHECK_EQ(b.lsn, b.lsns[6]);
    }
    free(t.at);
    gw_batch_free(&b);
    gw_producer_close(in.producer);
    fixture_end(&f);
}

static void full_log_ends_a_batch_at_the_first_event_that_is_not_in(void)
{
    fixture f = fixture_new();
    gw_ingest in = ingest_of(f.log);
    gw_batch b = {0};
    const uint64_t from = gw_log_tail(f.log);
    unsigned next = 0;
    for (unsigned lines = 0; next < 9000; lines ^= 1) {
        text t = events(lines, next, 9000);
        CHECK_EQ(send_text(&in, &b, &t, lines), 0);
        CHECK_EQ(b.stop, next + b.looked_at < 9000 ? GW_CODE_LOG_FULL : 0);
        CHECK(b.looked_at > 0);
        CHECK_EQ(b.accepted, b.looked_at);
        check_keys(f.log, next ? gw_cursor_load(f.log, 0).lsn : from, next, next + b.looked_at);
        next += b.looked_at;
        if (b.stop) { /* nothing goes in before there is room */
            free(t.at);
            t = events(lines, next, 9000);
            CHECK_EQ(send_text(&in, &b, &t, lines), 0);
            CHECK(b.stop == GW_CODE_LOG_FULL && b.looked_at == 0 && b.lsn == 0);
        }
        take_everything(f.log);
        free(t.at);
    }
    CHECK_EQ(gw_log_committed_ordinal(f.log), 9000);
    CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
    gw_batch_free(&b);
    gw_producer_close(in.producer);
    fixture_end(&f);
}

/* Two producers send the same batches at once: each key is in once, and both are told so. */
typedef struct rival {
    pthread_t thread;
    gw_log *log;
    uint64_t accepted, duplicates;
} rival;

enum { RIVAL_BATCHES = 12, RIVAL_EVENTS = 60 };

static void *rival_run(void *context)
{
    rival *r = context;
    gw_ingest in = ingest_of(r->log);
    gw_batch b = {0};
    for (unsigned i = 0; i < RIVAL_BATCHES; i++) {
        text t = events(i % 2, i * RIVAL_EVENTS, (i + 1) * RIVAL_EVENTS);
        CHECK_EQ(send_text(&in, &b, &t, i % 2), 0);
        CHECK_EQ(b.stop, 0);
        CHECK_EQ(b.looked_at, RIVAL_EVENTS);
        r->accepted += b.accepted, r->duplicates += b.duplicates;
        free(t.at);
    }
    gw_batch_free(&b);
    gw_producer_close(in.producer);
    return NULL;
}

static void rivals_that_send_the_same_batches_put_each_key_in_once(void)
{
    fixture f = fixture_new();
    rival r[2] = {{.log = f.log}, {.log = f.log}};
    for (unsigned i = 0; i < 2; i++)
        CHECK(pthread_create(&r[i].thread, NULL, rival_run, &r[i]) == 0);
    for (unsigned i = 0; i < 2; i++)
        CHECK(pthread_join(r[i].thread, NULL) == 0);
    CHECK_EQ(r[0].accepted + r[1].accepted, RIVAL_BATCHES * RIVAL_EVENTS);
    CHECK_EQ(r[0].duplicates + r[1].duplicates, RIVAL_BATCHES * RIVAL_EVENTS);
    check_keys(f.log, GW_FIRST_LSN, 0, RIVAL_BATCHES * RIVAL_EVENTS);
    fixture_end(&f);
}

#ifdef GW_FAILPOINTS

static const char *hook_point;
static unsigned hook_countdown;
static void (*hook_action)(void);
static gw_log *hook_log;

static void at_point(const char *name)
{
    if (hook_point && strcmp(name, hook_point) == 0 && --hook_countdown == 0)
        hook_action();
}

static void arm(const char *point, unsigned nth, void (*action)(void))
{
    hook_point = point, hook_countdown = nth, hook_action = action;
    gw_failpoint_hook = at_point;
}

static void die(void)
{
    kill(getpid(), SIGKILL);
}

static void halt(void)
{
    kill(getpid(), SIGSTOP);
}

static void drain(void)
{
    gw_log_set_state(hook_log, GW_DRAINING);
}

static void fail(void)
{
    gw_log_set_state(hook_log, GW_STATE_FAILED);
}

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

/* A process of its own that sends the events [from, to) and meets its fate at the nth pass of a point. */
static pid_t sender(fixture *f, const char *point, unsigned nth, void (*action)(void), unsigned from, unsigned to)
{
    pid_t pid = fork_child();
    if (pid)
        return pid;
    gw_ingest in = ingest_of(fixture_attach(f));
    gw_batch b = {0};
    arm(point, nth, action);
    text t = events(false, from, to);
    _exit(send_text(&in, &b, &t, false));
}

static void bury(fixture *f, pid_t pid)
{
    siginfo_t info;
    while (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT))
        CHECK(errno == EINTR);
    CHECK(info.si_code == CLD_KILLED);
    gw_log_owner_died(f->log, pid);
    CHECK(waitpid(pid, NULL, 0) == pid);
    const uint64_t began = now_ms();
    while (gw_log_committed(f->log) < gw_log_tail(f->log)) {
        CHECK(now_ms() - began <= 1000);
        gw_log_follow(f->log, gw_log_committed(f->log), 50);
    }
}

/* Killed anywhere in a batch: what was committed stays, in order, the rest is not there, and the batch sent again adds
 * just that. */
static void death_in_a_batch_leaves_its_beginning(void)
{
    static const char *const points[] = {"before_claim", "after_intent",  "after_claim", "mid_copy",
                                         "before_index", "before_marker", "after_marker"};
    enum { EVENTS = 10, COMMITTED = 6 };
    static const unsigned passes[] = {1, 2, 6, 10};
    fixture f = fixture_new();
    gw_ingest in = ingest_of(f.log);
    gw_batch b = {0};
    unsigned from = 0;
    for (unsigned k = 0; k < 7; k++)
        for (unsigned i = 0; i < 4; i++, from += EVENTS) {
            NOTE("%s, pass %u", points[k], passes[i]);
            const uint64_t lsn = gw_log_tail(f.log);
            bury(&f, sender(&f, points[k], passes[i], die, from, from + EVENTS));
            const unsigned in_log = passes[i] - (k < COMMITTED);
            check_keys(f.log, lsn, from, from + in_log);
            text t = events(true, from, from + EVENTS);
            CHECK_EQ(send_text(&in, &b, &t, true), 0);
            CHECK_EQ(b.duplicates, in_log);
            CHECK_EQ(b.accepted, EVENTS - in_log);
            check_keys(f.log, lsn, from, from + EVENTS);
            free(t.at);
            take_everything(f.log);
        }
    CHECK_EQ(gw_log_committed_ordinal(f.log), from);
    CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
    gw_batch_free(&b);
    gw_producer_close(in.producer);
    fixture_end(&f);
}

/* Everything dies with the batch: what was committed is found by recovery. */
static void death_of_everybody_in_a_batch_leaves_its_beginning(void)
{
    fixture f = fixture_new();
    pid_t pid = sender(&f, "before_marker", 6, die, 0, 10);
    CHECK(waitpid(pid, NULL, 0) == pid);
    fixture_reopen(&f);
    check_keys(f.log, GW_FIRST_LSN, 0, 5);
    CHECK_EQ(f.report.records, 5);
    fixture_end(&f);
}

static void drain_in_the_middle_ends_the_batch_there(void)
{
    fixture f = fixture_new();
    gw_ingest in = ingest_of(f.log);
    gw_batch b = {0};
    hook_log = f.log;
    arm("before_claim", 5, drain);
    text t = events(false, 0, 10);
    CHECK_EQ(send_text(&in, &b, &t, false), 0);
    CHECK_EQ(b.stop, GW_CODE_DRAINING);
    CHECK_EQ(b.looked_at, 4);
    CHECK_EQ(b.accepted, 4);
    check_keys(f.log, GW_FIRST_LSN, 0, 4);
    CHECK_EQ(send_text(&in, &b, &t, false), 0); /* repeats are still known */
    CHECK_EQ(b.duplicates, 4);
    CHECK_EQ(b.looked_at, 4);
    free(t.at);
    gw_batch_free(&b);
    gw_producer_close(in.producer);
    fixture_end(&f);
}

static void failure_in_the_middle_ends_the_batch_at_the_event_it_is_unknown_of(void)
{
    fixture f = fixture_new();
    gw_ingest in = ingest_of(f.log);
    gw_batch b = {0};
    hook_log = f.log;
    arm("before_marker", 5, fail);
    text t = events(false, 0, 10);
    CHECK_EQ(send_text(&in, &b, &t, false), 0);
    CHECK_EQ(b.stop, GW_CODE_FAILED);
    CHECK_EQ(b.looked_at, 4);
    free(t.at);
    gw_batch_free(&b);
    gw_producer_close(in.producer);
    fixture_end(&f);
}

static void await_stop(pid_t pid)
{
    int status;
    CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
}

static void key_that_stays_busy_ends_the_batch_there(void)
{
    fixture f = fixture_new();
    gw_ingest in = ingest_of(f.log);
    gw_batch b = {0};
    pid_t pid = sender(&f, "before_marker", 1, halt, 3, 4);
    await_stop(pid);
    text t = events(false, 0, 10);
    const uint64_t began = now_ms();
    CHECK_EQ(send_text(&in, &b, &t, false), 0);
    const uint64_t took = now_ms() - began;
    CHECK(took >= 50 && took < 1000);
    CHECK_EQ(b.stop, GW_CODE_ACCEPTED_PENDING);
    CHECK_EQ(b.looked_at, 3);
    CHECK_EQ(b.accepted, 3);
    kill(pid, SIGKILL);
    bury(&f, pid);
    CHECK_EQ(send_text(&in, &b, &t, false), 0);
    CHECK_EQ(b.stop, 0);
    CHECK_EQ(b.duplicates, 3);
    CHECK_EQ(b.accepted, 7);
    CHECK_EQ(gw_log_unexplained(f.log, 0), 0);
    free(t.at);
    gw_batch_free(&b);
    gw_producer_close(in.producer);
    fixture_end(&f);
}

static void *wake_later(void *context)
{
    usleep(8000);
    kill(*(pid_t *)context, SIGCONT);
    return NULL;
}

static void busy_key_is_waited_for(void)
{
    fixture f = fixture_new();
    gw_ingest in = ingest_of(f.log);
    gw_batch b = {0};
    pid_t pid = sender(&f, "before_marker", 1, halt, 3, 4);
    await_stop(pid);
    pthread_t waker;
    text t = events(false, 0, 10);
    CHECK(pthread_create(&waker, NULL, wake_later, &pid) == 0);
    CHECK_EQ(send_text(&in, &b, &t, false), 0);
    CHECK(pthread_join(waker, NULL) == 0 && waitpid(pid, NULL, 0) == pid);
    CHECK_EQ(b.stop, 0);
    CHECK_EQ(b.accepted, 9);
    CHECK_EQ(b.duplicates, 1);
    free(t.at);
    gw_batch_free(&b);
    gw_producer_close(in.producer);
    fixture_end(&f);
}
#endif

#define T(name)     \
    {               \
#name, name \
    }
static const test TESTS[] = {
    T(each_item_of_an_array_is_found),
    T(what_is_no_array_is_refused_where_it_breaks),
    T(no_beginning_of_an_array_is_an_array),
    T(lines_are_found_whatever_ends_them),
    T(depth_is_counted),
    T(ten_thousand_events_are_one_batch),
    T(repeats_inside_a_batch_are_duplicates),
    T(full_log_ends_a_batch_at_the_first_event_that_is_not_in),
    T(rivals_that_send_the_same_batches_put_each_key_in_once),
#ifdef GW_FAILPOINTS
    T(death_in_a_batch_leaves_its_beginning),
    T(death_of_everybody_in_a_batch_leaves_its_beginning),
    T(drain_in_the_middle_ends_the_batch_there),
    T(failure_in_the_middle_ends_the_batch_at_the_event_it_is_unknown_of),
    T(key_that_stays_busy_ends_the_batch_there),
    T(busy_key_is_waited_for),
#endif
};

int main(int argc, char **argv)
{
    return run_tests(TESTS, sizeof TESTS / sizeof *TESTS, argc, argv);
}
