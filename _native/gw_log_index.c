/* gw_log_index.c - see gw_log_index.h for the picture, the rules and the crash story. */
#include "gw_log_index.h"

#include <string.h>

#include "gw_hash.h"

enum { BYTES_A_BUCKET = 64, BYTES_A_LINK = 64, SPINS = 256 };

uint64_t gw_index_buckets(uint64_t capacity)
{
    return capacity / BYTES_A_BUCKET;
}

size_t gw_index_bytes(uint64_t capacity)
{
    return (size_t)(gw_index_buckets(capacity) + capacity / BYTES_A_LINK) * sizeof(uint64_t);
}

uint64_t gw_index_hash(const gw_log *log, const uint8_t *device_id, size_t device_id_bytes, uint64_t boot, uint64_t seq)
{
    uint8_t key[16 + 256];
    size_t bytes = 8 + device_id_bytes;
    memcpy(key, &seq, 8);
    memcpy(key + 8, device_id, device_id_bytes);
    if (boot) { /* mostly there is none; keys are told apart in the record, not here */
        memcpy(key + bytes, &boot, 8);
        bytes += 8;
    }
    return gw_siphash(log->shared->index_key, key, bytes);
}

static inline _Atomic uint64_t *prev_of(const gw_log *log, uint64_t lsn)
{
    return &log->prevs[(lsn & log->mask) / BYTES_A_LINK];
}

static inline uint64_t relaxed(const _Atomic uint64_t *word)
{
    return atomic_load_explicit(word, memory_order_relaxed);
}

/* Whether the record at `at` has the image's key. It may be torn: the caller looks at the tail afterwards. */
static bool same_key(const _Atomic uint64_t *at, const gw_image *image)
{
    const gw_header *want = (const gw_header *)(const void *)image->head;
    gw_header have;
    uint64_t words[8];
    for (unsigned i = 0; i < 8; i++)
        words[i] = relaxed(&at[i]);
    memcpy(&have, words, sizeof have);
    if (have.seq != want->seq || have.boot != want->boot || have.device_id_bytes != want->device_id_bytes ||
        !(have.flags & GW_EVENT_KEYED))
        return false;
    uint8_t id[256];
    for (unsigned i = 0; i < have.device_id_bytes; i += 8) {
        uint64_t word = relaxed(&at[8 + i / 8]);
        memcpy(id + i, &word, 8);
    }
    return memcmp(id, image->head + GW_RECORD_HEADER_BYTES, have.device_id_bytes) == 0;
}

/* Device id and body, word by word. What fills the last word counts for nothing: no checksum covers it, and a power
 * cut may have torn it off. */
static bool same_body(const _Atomic uint64_t *at, const gw_image *image)
{
    const gw_header *want = (const gw_header *)(const void *)image->head;
    uint64_t lengths;
    memcpy(&lengths, &want->body_bytes, 8);
    if ((uint32_t)relaxed(&at[6]) != (uint32_t)lengths)
        return false;
    unsigned partly = (want->device_id_bytes + want->body_bytes) % 8;
    uint64_t counts = partly ? (1ull << (8 * partly)) - 1 : ~0ull;
    bool head_is_all = !image->rest_words && !image->rest_bytes;
    uint64_t word;
    for (uint32_t i = 8; i < image->head_words; i++) {
        memcpy(&word, image->head + 8ull * i, 8);
        if ((relaxed(&at[i]) ^ word) & (head_is_all && i + 1 == image->head_words ? counts : ~0ull))
            return false;
    }
    at += image->head_words;
    for (uint32_t i = 0; i < image->rest_words; i++) {
        memcpy(&word, image->rest + 8ull * i, 8);
        if (relaxed(&at[i]) != word)
            return false;
    }
    return !image->rest_bytes || !((relaxed(&at[image->rest_words]) ^ image->last) & counts);
}

/* The kind of the committed record at lsn, or -1. */
static int kind_at(const gw_log *log, const _Atomic uint64_t *at, uint64_t lsn)
{
    uint64_t marker = atomic_load_explicit(at, memory_order_acquire); /* M */
    uint32_t epoch = (uint32_t)(relaxed(&at[1]) >> 32);
    uint64_t mix = epoch == log->shared->epoch ? log->shared->mix : gw_mix(log->shared->secret, epoch);
    uint64_t kind = marker ^ mix ^ lsn;
    return kind <= GW_PAD ? (int)kind : -1;
}

static inline bool lapped(const gw_log *log, uint64_t lsn)
{
    atomic_thread_fence(memory_order_acquire);
    uint64_t tail = atomic_load_explicit(&log->shared->tail, memory_order_acquire) & ~GW_TAIL_CLOSED; /* T */
    return tail > lsn + log->mask + 1;
}

void gw_index_prefetch(const gw_log *log, uint64_t hash, uint64_t lsn)
{
    __builtin_prefetch((const void *)gw_index_head(log, hash), 1);
    __builtin_prefetch((const void *)prev_of(log, lsn), 1);
}

void gw_index_prefetch_link(const gw_log *log, uint64_t link)
{
    __builtin_prefetch((const void *)prev_of(log, gw_link_lsn(link)), 0);
}

gw_found gw_index_walk(const gw_log *log, uint64_t hash, uint64_t link, uint64_t until, gw_image *image, uint64_t *lsn)
{
    uint64_t fingerprint = hash >> 56, above = UINT64_MAX;
    for (unsigned spins = 0;;) {
        uint64_t l = gw_link_lsn(link);
        if (!link || l <= until || l >= above || lapped(log, l)) /* mostly: before the miss that its link costs */
            return GW_FOUND_NOTHING;
        const _Atomic uint64_t *at = gw_word(log, l);
        uint64_t next = relaxed(prev_of(log, l));
        bool key = (link & 0xff) == fingerprint && same_key(at, image);
        bool body = key && same_body(at, image);
        int kind = key ? kind_at(log, at, l) : GW_DATA;
        if (lapped(log, l))
            return GW_FOUND_NOTHING;
        if (key && kind < 0 && spins++ < SPINS) /* mostly it is there in a moment */
            continue;
        if (key && (kind == GW_DATA || kind < 0)) {
            *lsn = l;
            return kind < 0 ? GW_FOUND_OPEN : body ? GW_FOUND_SAME : GW_FOUND_OTHER;
        }
        above = l;
        link = next;
    }
}

gw_found gw_index_insert(gw_log *log, uint64_t hash, uint64_t walked, gw_image *image, uint64_t lsn)
{
    _Atomic uint64_t *head = gw_index_head(log, hash);
    uint64_t seen = walked, other;
    for (;;) {
        atomic_store_explicit(prev_of(log, lsn), seen, memory_order_relaxed);
        if (atomic_compare_exchange_strong_explicit(head, &seen, gw_link(lsn, hash), memory_order_acq_rel, /* X */
                                                    memory_order_acquire))
            return GW_FOUND_NOTHING;
        if (gw_link_lsn(seen) > lsn)
            return GW_FOUND_OPEN;
        gw_found found = gw_index_walk(log, hash, seen, gw_link_lsn(walked), image, &other);
        if (found != GW_FOUND_NOTHING)
            return found;
        walked = seen;
    }
}

/* ---- rebuilding ----------------------------------------------------------------------------------------------- */

static void add(gw_log *log, uint64_t lsn)
{
    const gw_header *header = (const gw_header *)(const void *)gw_word(log, lsn);
    if (header->kind != GW_DATA || !(header->flags & GW_EVENT_KEYED))
        return;
    uint64_t hash =
        gw_index_hash(log, (const uint8_t *)(header + 1), header->device_id_bytes, header->boot, header->seq);
    _Atomic uint64_t *head = gw_index_head(log, hash);
    atomic_store_explicit(prev_of(log, lsn), relaxed(head), memory_order_relaxed);
    atomic_store_explicit(head, gw_link(lsn, hash), memory_order_relaxed);
}

void gw_index_rebuild(gw_log *log, uint64_t least, uint64_t start)
{
    uint64_t capacity = log->mask + 1;
    uint64_t p = start > capacity + GW_FIRST_LSN ? start - capacity : GW_FIRST_LSN;
    gw_record record;
    log->shared->oldest_lsn = least;
    /* Below the least cursor nothing was checked, and newer claims may have torn some of it. */
    while (p < least) {
        if (!relaxed(gw_word(log, p))) /* never written: a log that was made larger has much of it */
            p += 8;
        else if (gw_log_read_at(log, p, least, &record) == GW_OK) {
            if (p < log->shared->oldest_lsn)
                log->shared->oldest_lsn = p;
            add(log, p);
            p += record.size;
        } else {
            p += 8;
        }
    }
    for (p = least; p < start;) {
        add(log, p);
        p += ((const gw_header *)(const void *)gw_word(log, p))->size;
    }
}
