/* raw_publish.c - how many messages a second a broker takes from a client that does nothing else.
 *
 *     raw_publish PORT FILE COUNT WINDOW
 *
 * FILE holds COUNT encoded QoS 1 PUBLISH packets with packet ids 1, 2 ... 65535, 1 ... They are
 * sent as they are, at most min(WINDOW, Receive Maximum) unacknowledged, refilled after each read
 * of PUBACKs, at most 64 KiB a write. Prints
 * {"messages": n, "seconds": s, "window": w}; from the first byte sent to the last PUBACK. Anything
 * but a PUBACK with success, in order, ends it with 1. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { WRITE_MAX = 65536, READ_MAX = 65536, STALL_MS = 10000 };

static void fail(const char *what)
{
    fprintf(stderr, "raw_publish: %s (errno: %s)\n", what, strerror(errno));
    exit(1);
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* The offset behind the packet at `at`. */
static size_t packet_end(const uint8_t *data, size_t size, size_t at)
{
    size_t length = 0, here = at + 1;
    for (int shift = 0;; shift += 7) {
        if (here >= size || shift > 21)
            fail("FILE does not hold COUNT packets");
        length |= (size_t)(data[here] & 0x7f) << shift;
        if (data[here++] < 0x80)
            break;
    }
    if (here + length > size)
        fail("FILE does not hold COUNT packets");
    return here + length;
}

/* CONNECT, CONNACK; returns the Receive Maximum. */
static unsigned greet(int fd)
{
    static const uint8_t connect_packet[] = {0x10, 23,  0,   4,   'M', 'Q', 'T', 'T', 5,
                                             2,    0,   0,   0,   0,   10,  'r', 'a', 'w',
                                             '-',  's', 'o', 'c', 'k', 'e', 't'};
    if (send(fd, connect_packet, sizeof connect_packet, 0) != (ssize_t)sizeof connect_packet)
        fail("send CONNECT");
    uint8_t in[256];
    ssize_t got = recv(fd, in, 2, MSG_WAITALL);
    if (got != 2 || in[0] != 0x20 || in[1] < 3 || in[1] > 127)
        fail("no CONNACK");
    unsigned length = in[1];
    if (recv(fd, in, length, MSG_WAITALL) != (ssize_t)length || in[1] != 0)
        fail("CONNACK refuses");
    for (unsigned i = 3; i < length;) {
        uint8_t id = in[i++];
        switch (id) {
        case 0x21:
            return i + 1 < length ? (unsigned)in[i] << 8 | in[i + 1] : 65535;
        case 0x11:
        case 0x27:
            i += 4;
            break;
        case 0x13:
        case 0x22:
            i += 2;
            break;
        case 0x24:
        case 0x25:
        case 0x28:
        case 0x29:
        case 0x2a:
            i += 1;
            break;
        case 0x12:
        case 0x15:
        case 0x16:
        case 0x1a:
        case 0x1c:
        case 0x1f:
            i += 2 + (i + 1 < length ? (unsigned)in[i] << 8 | in[i + 1] : 0);
            break;
        default:
            fail("CONNACK with a property that is not expected");
        }
    }
    return 65535;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        fail("usage: raw_publish PORT FILE COUNT WINDOW");
    size_t count = strtoull(argv[3], NULL, 10);
    unsigned window = (unsigned)strtoul(argv[4], NULL, 10);

    int file = open(argv[2], O_RDONLY);
    struct stat st;
    if (file < 0 || fstat(file, &st) != 0)
        fail("open FILE");
    size_t size = (size_t)st.st_size;
    const uint8_t *data = mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    size_t *end =
        malloc((count + 1) * sizeof *end); /* packet i lies between end[i] and end[i + 1] */
    if (data == MAP_FAILED || end == NULL)
        fail("map FILE");
    end[0] = 0;
    for (size_t i = 0; i < count; i++)
        end[i + 1] = packet_end(data, size, end[i]);

    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1]))};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) != 0)
        fail("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    unsigned receive_maximum = greet(fd);
    if (receive_maximum < window)
        window = receive_maximum;

    static uint8_t in[READ_MAX];
    size_t sent = 0, offset = 0, acked = 0,
           have = 0; /* packets handed over; bytes sent; PUBACKs; bytes in `in` */
    double started = now_s();
    while (acked < count) {
        size_t may = acked + window < count ? acked + window : count;
        while (sent < may && end[sent + 1] - offset <= WRITE_MAX)
            sent++;
        if (sent < may && offset == end[sent])
            sent++; /* one packet larger than a write */
        bool blocked = false;
        if (offset < end[sent]) {
            ssize_t n = send(fd, data + offset, end[sent] - offset, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (n > 0)
                offset += (size_t)n;
            else if (errno != EAGAIN)
                fail("send");
            blocked = offset < end[sent];
        }
        ssize_t n = recv(fd, in + have, READ_MAX - have, MSG_DONTWAIT);
        if (n == 0)
            fail("the broker closed the connection");
        if (n < 0) {
            if (errno != EAGAIN)
                fail("recv");
            if (!blocked && sent < count && sent < acked + window)
                continue; /* more may be sent at once */
            struct pollfd p = {.fd = fd, .events = (short)(POLLIN | (blocked ? POLLOUT : 0))};
            if (poll(&p, 1, STALL_MS) <= 0)
                fail("nothing from the broker for 10 s");
            continue;
        }
        have += (size_t)n;
        size_t at = 0;
        while (have - at >= 2 && have - at >= 2u + in[at + 1]) {
            unsigned id = (unsigned)in[at + 2] << 8 | in[at + 3];
            if (in[at] != 0x40 || in[at + 1] < 2 || (in[at + 1] > 2 && in[at + 4] >= 0x80))
                fail("not a PUBACK with success");
            if (id != acked % 65535 + 1)
                fail("PUBACK out of order");
            acked++;
            at += 2u + in[at + 1];
        }
        memmove(in, in + at, have - at);
        have -= at;
    }
    double seconds = now_s() - started;
    printf("{\"messages\": %zu, \"seconds\": %.9f, \"window\": %u}\n", acked, seconds, window);
    return 0;
}
