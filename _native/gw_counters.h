/* gw_counters.h - the counters that /metrics shows, in shared memory.
 *
 * One block of words a process; each word has one writer (that process), every reader adds the blocks up. Blocks
 * belong to a place, not to a pid: a worker that is started again goes on in its predecessor's block. A SIGKILL may
 * lose the last increments; the books (accepted = published + dead-lettered + in the log) do not use them. */
#ifndef GW_COUNTERS_H
#define GW_COUNTERS_H

#include <stdatomic.h>
#include <stdint.h>

#include "gw_codes.h"

enum { GW_WORKERS_MAX = 32, GW_BLOCK_DELIVERY = GW_WORKERS_MAX, GW_BLOCK_SUPERVISOR, GW_BLOCK_COUNT };

/* Upper bounds in nanoseconds of both histograms; a last bucket takes the rest. */
#define GW_HISTOGRAM_BOUNDS_NS                                                                                      \
    {                                                                                                               \
        100000ull, 250000ull, 500000ull, 1000000ull, 2500000ull, 5000000ull, 10000000ull, 25000000ull, 50000000ull, \
            100000000ull, 250000000ull, 500000000ull, 1000000000ull, 2500000000ull, 5000000000ull, 10000000000ull,  \
            30000000000ull, 60000000000ull, 300000000000ull, 1800000000000ull, 7200000000000ull, 86400000000000ull  \
    }
enum { GW_HISTOGRAM_BUCKETS = 23 }; /* 22 bounds and the rest */

/* Words of a block. A histogram is its buckets (not cumulative) followed by the sum in nanoseconds. */
enum gw_counter {
    GW_COUNTER_RECEIVED = 0, /* events whose body arrived whole */
    GW_COUNTER_ACCEPTED,
    GW_COUNTER_ACCEPTED_BYTES,     /* bytes of bodies */
    GW_COUNTER_REQUESTS,           /* requests of every kind */
    GW_COUNTER_REFUSED = 8,        /* + enum gw_code */
    GW_COUNTER_REQUEST_NS = 72,    /* histogram: start of the handler to the verdict */
    GW_COUNTER_PUBACK_NS = 104,    /* histogram: receipt of the event to its PUBACK */
    GW_COUNTER_PUBLISH_SENT = 136, /* PUBLISH packets written, repeats included */
    GW_COUNTER_PUBLISH_REPEATED,   /* of these, sent before (after a reconnect) */
    GW_COUNTER_MQTT_CONNECTS,      /* CONNACK success */
    GW_COUNTER_MQTT_CONNECT_FAILURES,
    GW_COUNTER_MQTT_DISCONNECTS,
    GW_COUNTER_MQTT_CONNECTED, /* gauge: connections that are open */
    GW_COUNTER_MQTT_NEGATIVE_ACKS,
    GW_COUNTER_MQTT_IN_FLIGHT,    /* gauge */
    GW_COUNTER_SYNCS,             /* fdatasync calls of the committer */
    GW_COUNTER_SYNC_NS,           /* total time in them */
    GW_COUNTER_PADS,              /* holes of dead producers that were filled */
    GW_COUNTER_KILLED_STUCK,      /* stopped producers that were killed to free the log */
    GW_COUNTER_DUPLICATES,        /* repeats that were recognised; they are not in ACCEPTED */
    GW_COUNTER_BEAT_FOLLOWER,     /* the follower came round (at least once a second) */
    GW_COUNTER_BEAT_LOOP,         /* the delivery process's event loop came round (at least once a second) */
    GW_COUNTER_SYNC_SINCE_NS,     /* gauge: CLOCK_MONOTONIC when the running fdatasync began; 0: none runs */
    GW_COUNTER_DRAIN_BYTES_PER_S, /* gauge: how fast reclaim moves, smoothed; 0 while nothing moves */
    GW_COUNTER_ACKS_DURABLE,      /* requests answered "durable" */
    GW_COUNTER_ACKS_SINK,         /* requests answered "sink" */
    GW_COUNTER_ACKS_LATE,         /* accepted, but 504: not confirmed in time */
    GW_COUNTER_ACKS_DEAD,         /* asked for sink, and the event was dead-lettered */
    GW_COUNTER_DEAD_LETTER_BYTES, /* gauge: bytes of dead-letter files */
    GW_COUNTER_LETTERS_DROPPED,   /* gone with a file that was removed to make room (drop_oldest) */
    GW_COUNTER_RESTARTS_WORKER = 160,
    GW_COUNTER_RESTARTS_DELIVERY,
    GW_COUNTER_KILLED_HUNG,       /* delivery processes that made no progress and were killed */
    GW_COUNTER_ACK_NS = 164,      /* histogram: start of the request to its answer "durable" or "sink" */
    GW_COUNTER_BATCHES = 188,     /* batches whose framing was right */
    GW_COUNTER_BATCH_EVENTS,      /* events in them, looked at or not */
    GW_COUNTER_INFLATED_BYTES,    /* of compressed bodies, as they were before */
    GW_COUNTER_MQTT_THROTTLED_NS, /* something to publish waited so long for tokens; all connections */
    GW_COUNTER_FILE_BYTES,        /* of lines written, before compression */
    GW_COUNTER_FILE_SYNCS,
    GW_COUNTER_FILE_SYNC_NS,
    GW_COUNTER_FILE_FILES,          /* finished */
    GW_COUNTER_FILE_REMOVED,        /* finished files removed for files_max */
    GW_COUNTER_FILE_WRITE_FAILURES, /* times that writing had to be held */
    GW_COUNTER_FILE_UP,             /* gauge: 1 while the sink writes */
    GW_COUNTER_WORDS = 200
};

typedef struct gw_counter_block {
    _Alignas(64) _Atomic uint64_t word[GW_COUNTER_WORDS];
} gw_counter_block;

/* One writer a word: no locked instruction. */
static inline void gw_counter_add(gw_counter_block *block, unsigned index, uint64_t n)
{
    uint64_t old = atomic_load_explicit(&block->word[index], memory_order_relaxed);
    atomic_store_explicit(&block->word[index], old + n, memory_order_relaxed);
}

static inline void gw_counter_set(gw_counter_block *block, unsigned index, uint64_t n)
{
    atomic_store_explicit(&block->word[index], n, memory_order_relaxed);
}

static inline void gw_histogram_observe(gw_counter_block *block, unsigned histogram, uint64_t ns)
{
    static const uint64_t bound[GW_HISTOGRAM_BUCKETS - 1] = GW_HISTOGRAM_BOUNDS_NS;
    unsigned i = 0;
    while (i < GW_HISTOGRAM_BUCKETS - 1 && ns > bound[i])
        i++;
    gw_counter_add(block, histogram + i, 1);
    gw_counter_add(block, histogram + GW_HISTOGRAM_BUCKETS, ns);
}

#endif
