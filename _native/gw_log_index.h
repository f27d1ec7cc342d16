/* gw_log_index.h - idempotency: an index over the log, not a second store. Not for users of gw_log.h.
 *
 *   hash(device id, boot, seq), keyed with the log's secret
 *          |
 *   head[hash & mask] --> newest link --prev--> older link --prev--> ... --> 0, or a link that was lapped: the end
 *                            |
 *                         the record in the ring: key and body are compared there, exactly
 *
 *   link = lsn / 8 << 8 | fingerprint of the key; 0: none. prev[(lsn & ring mask) / 64] is the record's own link to the
 *   next older one of its bucket: two records never begin in the same 64 bytes. lsn falls strictly along a chain.
 *   Nothing is deleted or moved: what the ring laps ends its chain.
 *
 * Insert of L, its record written but for the marker, h the head last walked:
 *   prev[L] = h; CAS head h -> L. Lost to h': if h' > L, commit L as VOID and start over with a look-up; else walk h'
 *   down to h: the key is there, commit VOID and start over; it is not, again with h = h'.
 * Two producers with one key insert into one chain: the second one's CAS fails, or its look-up finds the first.
 *
 * Dereference of L: fields and link by relaxed loads; acquire fence; load tail; tail > L + capacity: what was read may
 * be torn, the chain ends here. The fence pairs with the release fence of a producer between its claim and its first
 * store. No marker yet: the original is still being written (or its producer is dead and a PAD is on its way); nobody
 * may be told anything about it: GW_BUSY.
 *
 * Crash story: the index is shared memory; recovery rebuilds it from the ring. A producer that dies between its insert
 * and its marker leaves a link to what becomes a PAD, which leaves prev alone, so the chain goes on.
 *
 * The window is exactly the last `capacity` bytes claimed. Memory: capacity / 8 for prev, and as much for heads. */
#ifndef GW_LOG_INDEX_H
#define GW_LOG_INDEX_H

#include "gw_log_shared.h"

/* A record as it is about to be written: header, device id and as much of the body as fills a word lie in `head`;
 * further words come straight from the body. */
typedef struct gw_image {
    _Alignas(8) uint8_t head[GW_RECORD_HEADER_BYTES + 256 + 8];
    const uint8_t *rest;
    uint64_t last; /* the bytes of the last, partly filled word */
    uint32_t head_words, rest_words, rest_bytes;
    uint32_t crc; /* without the lsn */
} gw_image;

static inline gw_header *gw_image_header(gw_image *image)
{
    return (gw_header *)(void *)image->head;
}

typedef enum gw_found { GW_FOUND_NOTHING, GW_FOUND_SAME, GW_FOUND_OTHER, GW_FOUND_OPEN } gw_found;

uint64_t gw_index_buckets(uint64_t capacity);
/* Bytes of shared memory behind gw_shared. */
size_t gw_index_bytes(uint64_t capacity);

uint64_t gw_index_hash(const gw_log *log, const uint8_t *device_id, size_t device_id_bytes, uint64_t boot,
                       uint64_t seq);

static inline _Atomic uint64_t *gw_index_head(const gw_log *log, uint64_t hash)
{
    return &log->heads[hash & (log->shared->index_buckets - 1)];
}

static inline uint64_t gw_link(uint64_t lsn, uint64_t hash)
{
    return lsn / 8 << 8 | hash >> 56;
}

static inline uint64_t gw_link_lsn(uint64_t link)
{
    return link >> 8 << 3;
}

/* What an insert at about `lsn` will touch, early; the walk's first miss, early. */
void gw_index_prefetch(const gw_log *log, uint64_t hash, uint64_t lsn);
void gw_index_prefetch_link(const gw_log *log, uint64_t link);
/* Walk from `link` down to the first at or below `until` (lsn); *lsn is what was found. */
gw_found gw_index_walk(const gw_log *log, uint64_t hash, uint64_t link, uint64_t until, gw_image *image, uint64_t *lsn);
/* The insert above. Nothing: done. Else the record must become a VOID. */
gw_found gw_index_insert(gw_log *log, uint64_t hash, uint64_t walked, gw_image *image, uint64_t lsn);
/* From the ring, before any producer runs: [start - capacity, start), of which [least, start) is known to be whole. */
void gw_index_rebuild(gw_log *log, uint64_t least, uint64_t start);

#endif
