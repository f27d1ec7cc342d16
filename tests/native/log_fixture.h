/* log_fixture.h - a log in a memfd, an fdatasync that a test commands, events made from a number. One program includes
 * it once; tests are functions listed in TESTS.
 *
 *   ./test_log            runs every test, prints one line each
 *   ./test_log NAME...    runs these
 *
 * fdatasync is replaced in the whole program: it counts, calls on_fdatasync if there is one, and touches no disk. */
#ifndef LOG_FIXTURE_H
#define LOG_FIXTURE_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "gw_crc32c.h"
#include "gw_hash.h"
#include "gw_log_shared.h"

#define CHECK(condition)                                            \
    do {                                                            \
        if (!(condition))                                           \
            check_failed(__FILE__, __LINE__, __func__, #condition); \
    } while (0)
#define CHECK_EQ(left, right)                                                                                       \
    do {                                                                                                            \
        unsigned long long left_ = (unsigned long long)(left), right_ = (unsigned long long)(right);                \
        if (left_ != right_) {                                                                                      \
            fprintf(stderr, "%s = %llu (%#llx), %s = %llu (%#llx)\n", #left, left_, left_, #right, right_, right_); \
            check_failed(__FILE__, __LINE__, __func__, #left " == " #right);                                        \
        }                                                                                                           \
    } while (0)

static char check_note[160]; /* what a loop was at, shown with a failure */

__attribute__((noreturn)) static inline void check_failed(const char *file, int line, const char *where,
                                                          const char *what)
{
    fprintf(stderr, "%s:%d: %s: %s%s%s\n", file, line, where, what, check_note[0] ? "; at " : "", check_note);
    fflush(NULL);
    _exit(1);
}

#define NOTE(...) snprintf(check_note, sizeof check_note, __VA_ARGS__)

static inline long environment_number(const char *name, long otherwise)
{
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

/* ---- fdatasync ------------------------------------------------------------------------------------------------ */

static _Atomic unsigned fdatasyncs;
static int (*on_fdatasync)(int fd);

int fdatasync(int fd)
{
    atomic_fetch_add(&fdatasyncs, 1);
    return on_fdatasync ? on_fdatasync(fd) : 0;
}

/* ---- events made from a number -------------------------------------------------------------------------------- */

static inline uint64_t scramble(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static inline uint64_t record_size(unsigned device_id_bytes, unsigned body_bytes)
{
    return (GW_RECORD_HEADER_BYTES + (uint64_t)device_id_bytes + body_bytes + 7) / 8 * 8;
}

static bool samples_have_keys; /* those whose number says so: a test that puts one twice wants it twice */

typedef struct sample {
    gw_event event;
    uint8_t device_id[255], *body;
} sample;

static inline void sample_make(sample *s, uint64_t id, unsigned device_id_bytes, unsigned body_bytes)
{
    s->body = malloc(body_bytes + 8);
    CHECK(s->body);
    for (unsigned i = 0; i < device_id_bytes; i++)
        s->device_id[i] = (uint8_t)('a' + (id + i) % 26);
    for (unsigned i = 0; i < body_bytes; i += 8) {
        uint64_t word = scramble(id * 1000003 + i);
        memcpy(s->body + i, &word, 8);
    }
    s->event = (gw_event){.device_id = s->device_id,
                          .body = s->body,
                          .body_bytes = body_bytes,
                          .device_id_bytes = (uint8_t)device_id_bytes,
                          .flags = (uint8_t)(id % 8 & (samples_have_keys ? 7 : 7 & ~GW_EVENT_KEYED)),
                          .splice = (uint8_t)(id % 200),
                          .received_at_ns = scramble(id),
                          .seq = id,
                          .boot = id / 3};
}

static inline void sample_free(sample *s)
{
    free(s->body);
}

static inline gw_status put(gw_producer *producer, uint64_t id, unsigned device_id_bytes, unsigned body_bytes,
                            uint64_t *lsn)
{
    sample s;
    sample_make(&s, id, device_id_bytes, body_bytes);
    uint64_t ignored;
    gw_status status = gw_producer_append(producer, &s.event, lsn ? lsn : &ignored);
    sample_free(&s);
    return status;
}

/* Every byte of a record is that of the event with its number. */
static inline bool is_sample(const gw_record *r)
{
    sample s;
    sample_make(&s, r->seq, r->device_id_bytes, r->body_bytes);
    bool same = r->boot == s.event.boot && r->received_at_ns == s.event.received_at_ns && r->flags == s.event.flags &&
                r->splice == s.event.splice && r->size == record_size(r->device_id_bytes, r->body_bytes) &&
                memcmp(r->device_id, s.device_id, r->device_id_bytes) == 0 &&
                memcmp(r->body, s.body, r->body_bytes) == 0;
    sample_free(&s);
    return same;
}

/* ---- a log in a memfd ----------------------------------------------------------------------------------------- */

static const char *const MQTT[] = {"mqtt", NULL};
static const char *const MQTT_AND_FILE[] = {"mqtt", "file", NULL};
static const char *const NO_SINKS[] = {NULL};

#define CAPACITY GW_CAPACITY_MIN
#define FILE_BYTES (GW_RING_OFFSET + CAPACITY)

typedef struct fixture {
    char path[64];
    int fd; /* of the memfd */
    int fd_lock;
    const char *const *sinks;
    uint32_t optional;
    const char *forget;
    gw_log *log;
    gw_recovery report;
    gw_error error;
} fixture;

/* The bytes of an empty log, made once by gw_log_create. */
static inline const uint8_t *fresh_image(void)
{
    static uint8_t *image;
    if (image)
        return image;
    char path[256];
    gw_error error;
    const char *directory = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/gw-fixture-%d.log", directory ? directory : "/tmp", (int)getpid());
    CHECK(gw_log_create(path, CAPACITY, NULL, NULL, &error) == GW_OK);
    image = malloc(FILE_BYTES);
    CHECK(image);
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0 && read(fd, image, FILE_BYTES) == (ssize_t)FILE_BYTES);
    close(fd);
    unlink(path);
    return image;
}

static inline gw_status fixture_open(fixture *f, bool accept_corruption)
{
    f->fd_lock = open(f->path, O_RDWR | O_CLOEXEC);
    CHECK(f->fd_lock >= 0);
    gw_status status = gw_log_open(f->path, f->fd_lock, &(gw_sinks){f->sinks, f->optional, f->forget},
                                   accept_corruption, &f->log, &f->report, &f->error);
    if (status != GW_OK) {
        f->log = NULL;
        close(f->fd_lock);
        f->fd_lock = -1;
    }
    return status;
}

/* Memory goes, the file stays: what a SIGKILL of everything leaves. */
static inline void fixture_close(fixture *f)
{
    gw_log_close(f->log);
    f->log = NULL;
    if (f->fd_lock >= 0)
        close(f->fd_lock);
    f->fd_lock = -1;
}

static inline fixture fixture_on(const uint8_t *image, const char *const *sinks)
{
    fixture f = {.sinks = sinks, .fd_lock = -1};
    f.fd = memfd_create("log", MFD_CLOEXEC);
    CHECK(f.fd >= 0 && pwrite(f.fd, image, FILE_BYTES, 0) == (ssize_t)FILE_BYTES);
    snprintf(f.path, sizeof f.path, "/proc/self/fd/%d", f.fd);
    return f;
}

static inline fixture fixture_with(const char *const *sinks)
{
    fixture f = fixture_on(fresh_image(), sinks);
    CHECK_EQ(fixture_open(&f, false), GW_OK);
    return f;
}

static inline fixture fixture_new(void)
{
    return fixture_with(MQTT);
}

static inline void fixture_end(fixture *f)
{
    fixture_close(f);
    close(f->fd);
    check_note[0] = 0;
}

static inline void fixture_reopen(fixture *f)
{
    fixture_close(f);
    CHECK_EQ(fixture_open(f, false), GW_OK);
}

static inline gw_log *fixture_attach(fixture *f)
{
    gw_log *log;
    gw_error error;
    CHECK_EQ(gw_log_attach(f->fd_lock, gw_log_fd_shared(f->log), &log, &error), GW_OK);
    return log;
}

static inline uint8_t *image_of(const fixture *f)
{
    uint8_t *image = malloc(FILE_BYTES);
    CHECK(image && pread(f->fd, image, FILE_BYTES, 0) == (ssize_t)FILE_BYTES);
    return image;
}

/* Bytes [lsn, lsn + bytes) of the ring in an image or the file, around the end. */
static inline uint8_t *image_byte(uint8_t *image, uint64_t lsn)
{
    return image + GW_RING_OFFSET + lsn % CAPACITY;
}

static inline gw_slot_page *image_slot(uint8_t *image, unsigned which)
{
    return (gw_slot_page *)(void *)(image + (1 + which) * GW_PAGE);
}

static inline unsigned newest_of(uint8_t *image)
{
    return image_slot(image, 1)->sequence > image_slot(image, 0)->sequence;
}

static inline void fixture_rewrite(fixture *f, const uint8_t *image)
{
    CHECK(pwrite(f->fd, image, FILE_BYTES, 0) == (ssize_t)FILE_BYTES);
}

static inline gw_producer *producer_of(gw_log *log)
{
    gw_producer *producer;
    CHECK_EQ(gw_producer_open(log, &producer), GW_OK);
    return producer;
}

static inline uint64_t follow(gw_log *log)
{
    return gw_log_follow(log, UINT64_MAX, 0);
}

static inline void sync_now(gw_log *log)
{
    bool changed;
    gw_error error;
    CHECK_EQ(gw_log_sync(log, &changed, &error), GW_OK);
}

/* Two syncs: durable, then the watermark that says so. */
static inline void settle(gw_log *log)
{
    sync_now(log);
    sync_now(log);
}

/* The publisher of a sink: reads to `end`, checks every byte, keeps the books. Returns DATA records. */
static inline uint64_t publish(gw_log *log, unsigned sink, uint64_t end)
{
    gw_cursor c = gw_cursor_load(log, sink);
    uint64_t before = c.published;
    while (c.lsn < end) {
        gw_record r;
        CHECK_EQ(gw_log_read(log, c.lsn, &r), GW_OK);
        if (r.kind == GW_DATA) {
            CHECK(is_sample(&r));
            c.ordinal++;
            c.published++;
        }
        c.lsn = r.lsn + r.size;
    }
    gw_cursor_store(log, sink, &c);
    return c.published - before;
}

/* Fill up to `lsn` exactly with records that are published and reclaimed. */
static inline void advance_to(gw_log *log, gw_producer *producer, uint64_t lsn)
{
    uint64_t at;
    while ((at = gw_log_tail(log)) < lsn) {
        uint64_t left = lsn - at, size = left > 65536 + 64 ? 65536 : left;
        CHECK(size >= 64);
        CHECK_EQ(put(producer, 1000000 + at, 0, (unsigned)(size - 64), NULL), GW_OK);
        for (unsigned i = 0; i < log->shared->sinks; i++)
            publish(log, i, follow(log));
        settle(log);
    }
    CHECK_EQ(gw_log_tail(log), lsn);
}

/* The seqs of all DATA records from `from` to committed; checks each byte. */
static inline unsigned seqs(gw_log *log, uint64_t from, uint64_t *out, unsigned most)
{
    unsigned n = 0;
    uint64_t committed = follow(log);
    while (from < committed) {
        gw_record r;
        CHECK_EQ(gw_log_read(log, from, &r), GW_OK);
        if (r.kind == GW_DATA) {
            CHECK(is_sample(&r));
            CHECK(n < most);
            out[n++] = r.seq;
        }
        from += r.size;
    }
    CHECK_EQ(from, committed);
    return n;
}

#define CHECK_SEQS(log, from, ...)                    \
    do {                                              \
        uint64_t want_[] = {__VA_ARGS__}, got_[4096]; \
        unsigned n_ = seqs(log, from, got_, 4096);    \
        CHECK_EQ(n_, sizeof want_ / sizeof *want_);   \
        for (unsigned i_ = 0; i_ < n_; i_++)          \
            CHECK_EQ(got_[i_], want_[i_]);            \
    } while (0)

/* ---- claims that are left half-way ---------------------------------------------------------------------------- */

#ifdef GW_FAILPOINTS

/* A producer's thread that halts at a fail point. To the reaper its slot belongs to this process, so that it lives,
 * until halted_die() says otherwise. */
typedef struct halted {
    pthread_t thread;
    sem_t here, go;
    const char *point;
    bool die, arrived;
    gw_producer *producer;
    sample sample;
    uint64_t lsn;
    gw_status status;
} halted;

static _Thread_local halted *halted_self;

static inline void halted_hook(const char *name)
{
    halted *h = halted_self;
    if (!h || h->arrived || strcmp(name, h->point) != 0)
        return;
    h->arrived = true;
    sem_post(&h->here);
    while (sem_wait(&h->go))
        ;
    if (h->die)
        pthread_exit(NULL);
}

static inline void *halted_run(void *context)
{
    halted *h = context;
    halted_self = h;
    h->status = gw_producer_append(h->producer, &h->sample.event, &h->lsn);
    if (!h->arrived)
        sem_post(&h->here);
    return NULL;
}

/* False: it came to an end without passing the point (h->status says how). */
static inline bool halted_try(halted *h, gw_log *log, const char *point, uint64_t id, unsigned body_bytes)
{
    *h = (halted){.point = point, .producer = producer_of(log)};
    sample_make(&h->sample, id, 0, body_bytes);
    CHECK(sem_init(&h->here, 0, 0) == 0 && sem_init(&h->go, 0, 0) == 0);
    CHECK(pthread_create(&h->thread, NULL, halted_run, h) == 0);
    while (sem_wait(&h->here))
        ;
    if (!h->arrived) {
        CHECK(pthread_join(h->thread, NULL) == 0);
        gw_producer_close(h->producer);
        sample_free(&h->sample);
    }
    return h->arrived;
}

static inline void halted_start(halted *h, gw_log *log, const char *point, uint64_t id, unsigned body_bytes)
{
    gw_failpoint_hook = halted_hook;
    CHECK(halted_try(h, log, point, id, body_bytes));
}

static inline gw_status halted_finish(halted *h)
{
    sem_post(&h->go);
    CHECK(pthread_join(h->thread, NULL) == 0);
    gw_producer_close(h->producer);
    sample_free(&h->sample);
    return h->status;
}

enum { NOBODY = 0x7ffffff0 }; /* a pid that cannot be */

/* The thread ends where it is; its slot stays behind, under a pid that no process has, marked dead or not yet. */
static inline void halted_kill(halted *h, bool marked)
{
    h->die = true;
    atomic_store(&h->producer->intent->owner, NOBODY | (marked ? GW_OWNER_DEAD : 0));
    sem_post(&h->go);
    CHECK(pthread_join(h->thread, NULL) == 0);
    free(h->producer);
    sample_free(&h->sample);
}
#endif

/* ---- main ----------------------------------------------------------------------------------------------------- */

typedef struct test {
    const char *name;
    void (*run)(void);
} test;

static inline uint64_t now_ms(void)
{
    return gw_now_ns() / 1000000;
}

static inline int run_tests(const test *tests, size_t count, int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    alarm((unsigned)environment_number("GW_TEST_SECONDS", 120)); /* nothing hangs */
    int ran = 0;
    for (size_t i = 0; i < count; i++) {
        bool wanted = argc < 2;
        for (int k = 1; k < argc; k++)
            wanted |= strcmp(argv[k], tests[i].name) == 0;
        if (!wanted)
            continue;
        uint64_t from = now_ms();
        printf("%s ... ", tests[i].name);
        fflush(stdout);
        on_fdatasync = NULL;
        tests[i].run();
        printf("ok (%llu ms)\n", (unsigned long long)(now_ms() - from));
        fflush(stdout);
        ran++;
    }
    if (argc >= 2 && ran != argc - 1) {
        fprintf(stderr, "no such test\n");
        return 2;
    }
    return ran ? 0 : 2;
}

#endif
