/* fleet.c - posts events or batches over keep-alive connections, one thread, each event with a new seq.
 *
 *     fleet PORT TARGET TYPE FILE CONNECTIONS SECONDS REQUESTS RATE FIRST_SEQ DEVICES
 *
 * FILE holds bodies, each behind a line with its length and its number of events; connection i sends body i mod their
 * number. Before a body is sent, the ten digits behind each "seq": are filled with the next number, and the seven
 * behind each "device_id":"dev- with a device of DEVICES, in an order without locality. A `*` at the end of TARGET
 * becomes the connection's number, four digits. TYPE is the Content-Type.
 *
 * RATE 0 is a closed loop: a connection sends again when its answer is there. Otherwise a request is due every 1/RATE
 * s, whatever the answers do, and its latency counts from when it was due, also when no connection was free then; all
 * that were due are sent, so a server that is too slow makes the run longer. Ends after SECONDS, or REQUESTS if that is
 * not 0, when every answer is there.
 *
 * Prints {"requests", "accepted", "duplicates", "refused", "bytes", "seconds", "next_seq", "busy", "p50_us", ...}:
 * accepted as the answers say, `busy` the share of the time that this program did not wait. An answer that is neither
 * 200 nor 202, a closed connection, 10 s without an answer: ends with 1. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { SEQ_DIGITS = 10, DEVICE_DIGITS = 7, ANSWER_MAX = 65536, STEPS = 32, READY_MAX = 256, HEAD_MAX = 512 };
#define STALL_NS 10000000000ull

typedef struct body {
    uint8_t *bytes;
    size_t size;
    unsigned events;
    uint32_t *seq_at, *device_at; /* offsets of the digits */
    unsigned devices;             /* how many of them */
} body;

typedef struct connection {
    int fd;
    bool writes; /* EPOLLOUT is asked for */
    const body *of;
    uint8_t *bytes; /* its own copy */
    char head[HEAD_MAX];
    size_t head_bytes, sent;
    uint64_t due_ns;
    char answer[ANSWER_MAX + 1];
    size_t have;
} connection;

static struct {
    body *all;
    unsigned count;
} bodies;
static uint64_t next_seq, devices;
static uint64_t requests, accepted, duplicates, refused, bytes_sent;
static uint64_t histogram[64 * STEPS], latency_max;
static int poller;

__attribute__((noreturn)) static void fail(const char *what, const char *more)
{
    fprintf(stderr, "fleet: %s %s (errno: %s)\n", what, more, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- bodies ------------------------------------------------------------------------------------------------------ */

static uint32_t *find_all(const body *b, const char *text, unsigned *found)
{
    uint32_t *at = malloc(b->events * sizeof *at);
    size_t size = strlen(text);
    const uint8_t *here = b->bytes, *end = b->bytes + b->size;
    *found = 0;
    while ((here = memmem(here, (size_t)(end - here), text, size)) != NULL) {
        if (*found == b->events)
            fail("FILE: more places than events for", text);
        here += size;
        at[(*found)++] = (uint32_t)(here - b->bytes);
    }
    return at;
}

static void read_bodies(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL)
        fail("open", path);
    size_t size;
    unsigned events, found;
    while (fscanf(file, "%zu %u", &size, &events) == 2) {
        bodies.all = realloc(bodies.all, (bodies.count + 1) * sizeof *bodies.all);
        body *b = &bodies.all[bodies.count++];
        *b = (body){.bytes = malloc(size), .size = size, .events = events};
        if (fgetc(file) != '\n' || fread(b->bytes, 1, size, file) != size)
            fail("FILE ends early:", path);
        b->seq_at = find_all(b, "\"seq\":", &found);
        if (found != events)
            fail("FILE: not one seq an event:", path);
        b->device_at = find_all(b, "\"device_id\":\"dev-", &b->devices);
    }
    if (bodies.count == 0)
        fail("FILE has no body:", path);
    fclose(file);
}

static void write_digits(uint8_t *to, unsigned digits, uint64_t value)
{
    while (digits--) {
        to[digits] = (uint8_t)('0' + value % 10);
        value /= 10;
    }
}

static void renew(connection *c)
{
    const body *b = c->of;
    for (unsigned i = 0; i < b->events; i++) {
        write_digits(c->bytes + b->seq_at[i], SEQ_DIGITS, next_seq);
        if (i < b->devices)
            write_digits(c->bytes + b->device_at[i], DEVICE_DIGITS, (next_seq * 2654435761u % 4294967291u) % devices);
        next_seq++;
    }
}

/* ---- connections ------------------------------------------------------------------------------------------------- */

static void watch(connection *c, bool writes, int how)
{
    struct epoll_event event = {.events = EPOLLIN | (writes ? EPOLLOUT : 0u), .data.ptr = c};
    if (epoll_ctl(poller, how, c->fd, &event) != 0)
        fail("epoll_ctl", "");
    c->writes = writes;
}

static void open_connection(connection *c, unsigned number, int port, const char *target, const char *type)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&to, sizeof to) != 0)
        fail("connect", "");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->of = &bodies.all[number % bodies.count];
    c->bytes = malloc(c->of->size);
    memcpy(c->bytes, c->of->bytes, c->of->size);
    int size = (int)strlen(target);
    bool numbered = size > 0 && target[size - 1] == '*';
    char device[16] = "";
    if (numbered)
        snprintf(device, sizeof device, "%04u", number % 10000);
    int n = snprintf(c->head, sizeof c->head,
                     "POST %.*s%s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n",
                     size - numbered, target, device, type, c->of->size);
    if (n < 0 || n >= (int)sizeof c->head)
        fail("TARGET is too long", "");
    c->head_bytes = (size_t)n;
    watch(c, false, EPOLL_CTL_ADD);
}

/* Send what is left of the request. */
static void push(connection *c)
{
    size_t total = c->head_bytes + c->of->size;
    while (c->sent < total) {
        struct iovec parts[2];
        int n = 0;
        if (c->sent < c->head_bytes) {
            parts[n++] = (struct iovec){c->head + c->sent, c->head_bytes - c->sent};
            parts[n++] = (struct iovec){c->bytes, c->of->size};
        } else {
            size_t at = c->sent - c->head_bytes;
            parts[n++] = (struct iovec){c->bytes + at, c->of->size - at};
        }
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)n};
        ssize_t went = sendmsg(c->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (went < 0 && errno == EAGAIN)
            break;
        if (went < 0)
            fail("send", "");
        c->sent += (size_t)went;
    }
    if (c->writes != (c->sent < total))
        watch(c, c->sent < total, EPOLL_CTL_MOD);
}

static void start(connection *c, uint64_t due_ns)
{
    renew(c);
    c->sent = c->have = 0;
    c->due_ns = due_ns;
    requests++;
    bytes_sent += c->head_bytes + c->of->size;
    push(c);
}

static void observe(uint64_t ns)
{
    unsigned power = 63 - (unsigned)__builtin_clzll(ns | STEPS);
    histogram[(power - 5) * STEPS + (ns >> (power - 5)) % STEPS]++;
    if (ns > latency_max)
        latency_max = ns;
}

static double percentile_us(double share)
{
    uint64_t total = 0, below = 0;
    for (unsigned i = 0; i < sizeof histogram / sizeof *histogram; i++)
        total += histogram[i];
    for (unsigned i = 0; i < sizeof histogram / sizeof *histogram; i++)
        if ((double)(below += histogram[i]) >= share * (double)total && total)
            return (double)((uint64_t)(STEPS + i % STEPS + 1) << (i / STEPS)) / 1000;
    return 0;
}

static uint64_t number_in(const char *text, const char *name)
{
    const char *at = strstr(text, name);
    return at ? strtoull(at + strlen(name), NULL, 10) : 0;
}

/* Read; true when the answer is there whole. */
static bool pull(connection *c)
{
    ssize_t n = recv(c->fd, c->answer + c->have, ANSWER_MAX - c->have, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return false;
    if (n <= 0)
        fail("the server closed a connection", "");
    c->have += (size_t)n;
    c->answer[c->have] = 0;
    char *end = strstr(c->answer, "\r\n\r\n");
    if (end == NULL)
        return false;
    char *length = strcasestr(c->answer, "content-length:");
    size_t size = length && length < end ? strtoul(length + 15, NULL, 10) : 0;
    if (c->have < (size_t)(end + 4 - c->answer) + size)
        return false;
    if (strncmp(c->answer, "HTTP/1.1 202", 12) != 0 && strncmp(c->answer, "HTTP/1.1 200", 12) != 0)
        fail("refused:", c->answer);
    if (c->sent < c->head_bytes + c->of->size)
        fail("answered before the request was there:", c->answer);
    if (strstr(end, "\"accepted\":")) {
        accepted += number_in(end, "\"accepted\":");
        duplicates += number_in(end, "\"duplicates\":");
        refused += number_in(end, "\"refused\":");
    } else {
        accepted += c->of->events; /* one event, or a server that does not count */
    }
    observe(now_ns() - c->due_ns);
    return true;
}

/* ---- the run ----------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    if (argc != 11)
        fail("usage: fleet PORT TARGET TYPE FILE CONNECTIONS SECONDS REQUESTS RATE FIRST_SEQ DEVICES", "");
    read_bodies(argv[4]);
    unsigned open = (unsigned)atoi(argv[5]);
    uint64_t run_ns = (uint64_t)(atof(argv[6]) * 1e9), most = strtoull(argv[7], NULL, 10);
    double rate = atof(argv[8]);
    next_seq = strtoull(argv[9], NULL, 10);
    devices = strtoull(argv[10], NULL, 10);
    if (devices == 0)
        devices = 1;
    poller = epoll_create1(EPOLL_CLOEXEC);
    connection *all = calloc(open, sizeof *all), **idle = calloc(open, sizeof *idle);
    for (unsigned i = 0; i < open; i++) {
        open_connection(&all[i], i, atoi(argv[1]), argv[2], argv[3]);
        idle[i] = &all[open - 1 - i];
    }
    if (rate > 0 && (most == 0 || rate * atof(argv[6]) < (double)most))
        most = (uint64_t)(rate * atof(argv[6]));
    unsigned free_count = open;
    uint64_t began = now_ns(), moved = began, now = began, waited = 0, last = began, due = 0;
    for (;;) {
        bool may = (rate > 0 || now - began < run_ns) && (most == 0 || requests < most);
        while (may && free_count > 0) {
            uint64_t at = now;
            if (rate > 0) {
                at = began + (uint64_t)((double)due * 1e9 / rate);
                if (at > now)
                    break;
                due++;
            }
            start(idle[--free_count], at);
            may = most == 0 || requests < most;
        }
        if (!may && free_count == open)
            break;
        uint64_t before = now_ns(), sleep_ns = STALL_NS;
        if (may && rate > 0 && free_count > 0) {
            uint64_t at = began + (uint64_t)((double)due * 1e9 / rate);
            sleep_ns = at > before ? at - before : 0;
        }
        struct timespec timeout = {(time_t)(sleep_ns / 1000000000u), (long)(sleep_ns % 1000000000u)};
        struct epoll_event ready[READY_MAX];
        int n = epoll_pwait2(poller, ready, READY_MAX, &timeout, NULL);
        if (n < 0 && errno != EINTR)
            fail("epoll_pwait2", "");
        now = now_ns();
        waited += now - before;
        for (int i = 0; i < n; i++) {
            connection *c = ready[i].data.ptr;
            if (ready[i].events & EPOLLOUT)
                push(c);
            if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR) && pull(c)) {
                idle[free_count++] = c;
                last = now_ns();
            }
            moved = now;
        }
        if (now - moved > STALL_NS && free_count < open)
            fail("nothing from the server for 10 s", "");
    }
    double seconds = (double)(last - began) / 1e9;
    printf("{\"requests\": %llu, \"accepted\": %llu, \"duplicates\": %llu, \"refused\": %llu, \"bytes\": %llu, "
           "\"seconds\": %.6f, \"next_seq\": %llu, \"busy\": %.4f, \"p50_us\": %.1f, \"p90_us\": %.1f, "
           "\"p99_us\": %.1f, \"p999_us\": %.1f, \"max_us\": %.1f}\n",
           (unsigned long long)requests, (unsigned long long)accepted, (unsigned long long)duplicates,
           (unsigned long long)refused, (unsigned long long)bytes_sent, seconds, (unsigned long long)next_seq,
           1 - (double)waited / 1e9 / seconds, percentile_us(0.5), percentile_us(0.9), percentile_us(0.99),
           percentile_us(0.999), (double)latency_max / 1000);
    return 0;
}
