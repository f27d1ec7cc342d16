/* fuzz_text.c - short texts from outside: device ids, receipts, positions. A device id is [A-Za-z0-9_-]{1,64} or
 * refused; a receipt that was not given out, or that was changed anywhere, is unknown; one that was tells its state.
 *
 * Sources: _native/gw_crc32c.c _native/gw_log*.c _native/gw_validator*.c
 *
 * An input: byte 0 says what the rest is (see `enum`). CHANGED_RECEIPT: the receipt's number, then pairs of a place and
 * what is XORed to the character there: an input stays good when the secret's use or the text's form changes. */
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.h"
#include "gw_crc32c.h"
#include "gw_hash.h"
#include "gw_log_shared.h"
#include "gw_validator.h"

enum { DEVICE_ID, RECEIPT, CHANGED_RECEIPT, POSITION, KINDS };
enum { BIG = 131072 - GW_RECORD_HEADER_BYTES - 8, RECEIPTS_MAX = 16 };

typedef struct known {
    uint64_t lsn;
    enum gw_receipt_state state;
    char text[GW_RECEIPT_BYTES_MAX];
} known;

static gw_log *the_log;
static known given[RECEIPTS_MAX];
static unsigned given_count;

static void publish(uint64_t end, unsigned dead_lettered)
{
    bool changed;
    gw_error error;
    MUST(gw_log_follow(the_log, 0, 0) >= end);
    for (unsigned sink = 0; sink < 2; sink++) {
        gw_cursor c = gw_cursor_load(the_log, sink);
        c.lsn = end, c.ordinal++, c.published += !dead_lettered, c.dead_lettered += dead_lettered;
        gw_cursor_store(the_log, sink, &c);
    }
    for (int i = 0; i < 2; i++)
        MUST(gw_log_sync(the_log, &changed, &error) == GW_OK);
}

static uint64_t append(gw_producer *producer, uint32_t body_bytes)
{
    static uint8_t body[BIG] = "{}";
    static const uint8_t device_id[] = "dev";
    const gw_event event = {.device_id = device_id, .device_id_bytes = 3, .body = body, .body_bytes = body_bytes};
    uint64_t lsn;
    MUST(gw_producer_append(producer, &event, &lsn) == GW_OK);
    return lsn;
}

static void give(uint64_t lsn, enum gw_receipt_state state)
{
    known *k = &given[given_count++];
    *k = (known){.lsn = lsn, .state = state};
    gw_log_receipt(the_log, lsn, k->text);
    MUST(strlen(k->text) < sizeof k->text);
}

/* A log with the secret 1, 2 and a record in each state. */
static void make_log(void)
{
    static const uint64_t total = GW_RING_OFFSET + GW_CAPACITY_MIN;
    static gw_slot_page slot = {.magic = GW_SLOT_MAGIC,
                                .version = GW_LOG_VERSION,
                                .sequence = 1,
                                .watermark = GW_FIRST_LSN,
                                .epoch = 1,
                                .epochs = 1,
                                .range = {{.start = GW_FIRST_LSN, .epoch = 1}}};
    static gw_identity_page identity = {.magic = GW_LOG_MAGIC,
                                        .version = GW_LOG_VERSION,
                                        .capacity = GW_CAPACITY_MIN,
                                        .record_bytes_max = GW_CAPACITY_MIN / 8,
                                        .identity = 0x1122334455667788,
                                        .secret = {1, 2}};
    slot.crc = gw_crc32c(0, &slot, sizeof slot);
    identity.crc = gw_crc32c(0, &identity, sizeof identity);
    const int fd = memfd_create("fuzz", MFD_CLOEXEC);
    MUST(fd >= 0 && ftruncate(fd, (off_t)total) == 0 && pwrite(fd, &identity, GW_PAGE, 0) == GW_PAGE);
    MUST(pwrite(fd, &slot, GW_PAGE, 2 * GW_PAGE) == GW_PAGE);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    const int fd_lock = open(path, O_RDWR | O_CLOEXEC);
    static const char *const sinks[] = {"mqtt", "file", NULL};
    gw_recovery report;
    gw_error error;
    MUST(fd_lock >= 0 &&
         gw_log_open(path, fd_lock, &(gw_sinks){.names = sinks}, false, &the_log, &report, &error) == GW_OK);

    gw_producer *producer;
    MUST(gw_producer_open(the_log, &producer) == GW_OK);
    const uint64_t lapped = append(producer, 2);
    publish(gw_log_tail(the_log), 0);
    for (int i = 0; i < 9; i++) {
        append(producer, BIG);
        publish(gw_log_tail(the_log), 0);
    }
    give(lapped, GW_RECEIPT_FINISHED);
    const uint64_t delivered = append(producer, 2);
    publish(gw_log_tail(the_log), 0);
    const uint64_t dead = append(producer, 2);
    MUST(gw_log_follow(the_log, 0, 0) && gw_log_mark_dead(the_log, 1, dead, 0));
    publish(gw_log_tail(the_log), 1);
    const uint64_t durable = append(producer, 2);
    bool changed;
    MUST(gw_log_follow(the_log, 0, 0) && gw_log_sync(the_log, &changed, &error) == GW_OK);
    const uint64_t enqueued = append(producer, 2);
    gw_log_follow(the_log, 0, 0);
    gw_producer_close(producer);
    give(delivered, GW_RECEIPT_DELIVERED);
    give(dead, GW_RECEIPT_DEAD_LETTERED);
    give(durable, GW_RECEIPT_DURABLE);
    give(enqueued, GW_RECEIPT_ENQUEUED);

    /* What a run before this one gave out, at a position that it lost: the same text with another epoch and MAC. */
    known *k = &given[given_count++];
    *k = (known){.lsn = enqueued, .state = GW_RECEIPT_LOST};
    const uint64_t words[3] = {identity.identity, 1, enqueued};
    snprintf(k->text, sizeof k->text, "%016llx-1-%llx-%016llx", (unsigned long long)words[0],
             (unsigned long long)enqueued, (unsigned long long)gw_siphash(the_log->shared->receipt_key, words, 24));
}

/* The four numbers of a receipt are those of `k`: zeros in front of one are no other receipt. */
static bool means(const char *text, const known *k)
{
    unsigned long long is[4], was[4];
    return sscanf(text, "%16llx-%llx-%llx-%16llx", &is[0], &is[1], &is[2], &is[3]) == 4 &&
           sscanf(k->text, "%16llx-%llx-%llx-%16llx", &was[0], &was[1], &was[2], &was[3]) == 4 &&
           memcmp(is, was, sizeof is) == 0;
}

static void receipt(const char *text, size_t bytes)
{
    char *exact = malloc(bytes + !bytes), ended[GW_RECEIPT_BYTES_MAX] = "";
    MUST(exact != NULL);
    memcpy(exact, text, bytes); /* the sanitizer sees one byte too many */
    memcpy(ended, text, bytes < sizeof ended ? bytes : 0);
    uint64_t lsn = 0;
    const enum gw_receipt_state state = gw_log_receipt_state(the_log, exact, bytes, &lsn);
    bool one_of_ours = false;
    for (unsigned i = 0; i < given_count; i++) {
        const bool same = bytes == strlen(given[i].text) && memcmp(exact, given[i].text, bytes) == 0;
        MUST(!same || (state == given[i].state && lsn == given[i].lsn));
        one_of_ours |= same || means(ended, &given[i]);
    }
    MUST(one_of_ours || state == GW_RECEIPT_UNKNOWN);
    free(exact);
}

static void position(uint64_t lsn)
{
    const enum gw_receipt_state state = gw_log_state_of(the_log, lsn);
    bool was_given = false;
    for (unsigned i = 0; i < given_count; i++)
        if (lsn == given[i].lsn && given[i].state != GW_RECEIPT_LOST) {
            MUST(state == given[i].state);
            was_given = true;
        }
    char text[GW_RECEIPT_BYTES_MAX];
    memset(text, 'x', sizeof text);
    gw_log_receipt(the_log, lsn, text);
    MUST(memchr(text, 0, sizeof text) != NULL);
    MUST(was_given || !gw_log_mark_dead(the_log, 0, lsn, 0));
}

static void device_id(const uint8_t *id, size_t bytes)
{
    uint8_t *exact = malloc(bytes + !bytes);
    MUST(exact != NULL);
    memcpy(exact, id, bytes);
    bool good = bytes >= 1 && bytes <= 64;
    for (size_t i = 0; i < bytes; i++)
        good &= exact[i] && strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-", exact[i]);
    MUST(gw_device_id_ok(exact, bytes) == good);
    free(exact);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (!the_log)
        make_log();
    if (!bytes)
        return 0;
    const uint8_t *rest = data + 1;
    const size_t n = bytes - 1;
    switch (data[0] % KINDS) {
    case DEVICE_ID:
        device_id(rest, n);
        break;
    case RECEIPT:
        receipt((const char *)rest, n);
        break;
    case CHANGED_RECEIPT: {
        if (!n)
            return 0;
        char text[GW_RECEIPT_BYTES_MAX];
        memcpy(text, given[rest[0] % given_count].text, sizeof text);
        const size_t length = strlen(text);
        for (size_t i = 1; i + 2 <= n; i += 2)
            text[rest[i] % length] ^= (char)rest[i + 1];
        receipt(text, length);
        break;
    }
    default: {
        uint64_t lsn = 0;
        memcpy(&lsn, rest, n < 8 ? n : 8);
        position(lsn);
    }
    }
    return 0;
}
