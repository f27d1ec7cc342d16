# Part of log.pyx: the counters of gw_counters.h and their names.

cdef extern from "gw_counters.h":
    enum:
        GW_WORKERS_MAX, GW_BLOCK_DELIVERY, GW_BLOCK_SUPERVISOR, GW_BLOCK_COUNT, GW_HISTOGRAM_BUCKETS
        GW_COUNTER_WORDS, GW_COUNTER_RECEIVED, GW_COUNTER_ACCEPTED, GW_COUNTER_ACCEPTED_BYTES, GW_COUNTER_REQUESTS
        GW_COUNTER_REFUSED, GW_COUNTER_REQUEST_NS, GW_COUNTER_PUBACK_NS, GW_COUNTER_PUBLISH_SENT
        GW_COUNTER_PUBLISH_REPEATED, GW_COUNTER_MQTT_CONNECTS, GW_COUNTER_MQTT_CONNECT_FAILURES
        GW_COUNTER_MQTT_DISCONNECTS, GW_COUNTER_MQTT_CONNECTED, GW_COUNTER_MQTT_NEGATIVE_ACKS
        GW_COUNTER_MQTT_IN_FLIGHT, GW_COUNTER_SYNCS, GW_COUNTER_SYNC_NS, GW_COUNTER_PADS, GW_COUNTER_KILLED_STUCK
        GW_COUNTER_RESTARTS_WORKER, GW_COUNTER_RESTARTS_DELIVERY, GW_COUNTER_KILLED_HUNG, GW_COUNTER_ACK_NS
        GW_COUNTER_BATCHES, GW_COUNTER_BATCH_EVENTS, GW_COUNTER_INFLATED_BYTES
        GW_COUNTER_DUPLICATES, GW_COUNTER_BEAT_FOLLOWER, GW_COUNTER_BEAT_LOOP, GW_COUNTER_SYNC_SINCE_NS
        GW_COUNTER_DRAIN_BYTES_PER_S, GW_COUNTER_ACKS_DURABLE, GW_COUNTER_ACKS_SINK, GW_COUNTER_ACKS_LATE
        GW_COUNTER_ACKS_DEAD, GW_COUNTER_DEAD_LETTER_BYTES, GW_COUNTER_LETTERS_DROPPED, GW_COUNTER_MQTT_THROTTLED_NS
        GW_COUNTER_FILE_BYTES, GW_COUNTER_FILE_SYNCS, GW_COUNTER_FILE_SYNC_NS, GW_COUNTER_FILE_FILES
        GW_COUNTER_FILE_REMOVED, GW_COUNTER_FILE_WRITE_FAILURES, GW_COUNTER_FILE_UP
    ctypedef struct gw_counter_block:
        pass
    void gw_counter_add(gw_counter_block *block, unsigned index, uint64_t n) noexcept nogil
    void gw_counter_set(gw_counter_block *block, unsigned index, uint64_t n) noexcept nogil
    void gw_histogram_observe(gw_counter_block *block, unsigned histogram, uint64_t ns) noexcept nogil

cdef extern from *:
    """
    #include "gw_counters.h"
    static const char *const gw_code_names[] = {"",
    #define GW_CODE_NAME(name, text) text,
    GW_CODES(GW_CODE_NAME)
    };
    static const uint64_t gw_bounds[] = GW_HISTOGRAM_BOUNDS_NS;
    static inline uint64_t gw_counter_load(const gw_counter_block *block, unsigned index)
    {
        return atomic_load_explicit(&block->word[index], memory_order_relaxed);
    }
    """
    const char *gw_code_names[]
    const uint64_t gw_bounds[]
    enum:
        GW_CODE_COUNT
    uint64_t gw_counter_load(const gw_counter_block *block, unsigned index) noexcept nogil

CODES = tuple(gw_code_names[i].decode() for i in range(GW_CODE_COUNT))
HISTOGRAM_BOUNDS_NS = tuple(gw_bounds[i] for i in range(GW_HISTOGRAM_BUCKETS - 1))
COUNTERS = {
    "received": GW_COUNTER_RECEIVED,
    "accepted": GW_COUNTER_ACCEPTED,
    "accepted_bytes": GW_COUNTER_ACCEPTED_BYTES,
    "requests": GW_COUNTER_REQUESTS,
    "refused": GW_COUNTER_REFUSED,
    "request_ns": GW_COUNTER_REQUEST_NS,
    "puback_ns": GW_COUNTER_PUBACK_NS,
    "publish_sent": GW_COUNTER_PUBLISH_SENT,
    "publish_repeated": GW_COUNTER_PUBLISH_REPEATED,
    "mqtt_connects": GW_COUNTER_MQTT_CONNECTS,
    "mqtt_connect_failures": GW_COUNTER_MQTT_CONNECT_FAILURES,
    "mqtt_disconnects": GW_COUNTER_MQTT_DISCONNECTS,
    "mqtt_connected": GW_COUNTER_MQTT_CONNECTED,
    "mqtt_negative_acks": GW_COUNTER_MQTT_NEGATIVE_ACKS,
    "mqtt_in_flight": GW_COUNTER_MQTT_IN_FLIGHT,
    "mqtt_throttled_ns": GW_COUNTER_MQTT_THROTTLED_NS,
    "syncs": GW_COUNTER_SYNCS,
    "sync_ns": GW_COUNTER_SYNC_NS,
    "pads": GW_COUNTER_PADS,
    "killed_stuck": GW_COUNTER_KILLED_STUCK,
    "duplicates": GW_COUNTER_DUPLICATES,
    "beat_follower": GW_COUNTER_BEAT_FOLLOWER,
    "beat_loop": GW_COUNTER_BEAT_LOOP,
    "sync_since_ns": GW_COUNTER_SYNC_SINCE_NS,
    "drain_bytes_per_s": GW_COUNTER_DRAIN_BYTES_PER_S,
    "acks_durable": GW_COUNTER_ACKS_DURABLE,
    "acks_sink": GW_COUNTER_ACKS_SINK,
    "acks_late": GW_COUNTER_ACKS_LATE,
    "acks_dead": GW_COUNTER_ACKS_DEAD,
    "dead_letter_bytes": GW_COUNTER_DEAD_LETTER_BYTES,
    "dead_letters_dropped": GW_COUNTER_LETTERS_DROPPED,
    "killed_hung": GW_COUNTER_KILLED_HUNG,
    "ack_ns": GW_COUNTER_ACK_NS,
    "restarts_worker": GW_COUNTER_RESTARTS_WORKER,
    "restarts_delivery": GW_COUNTER_RESTARTS_DELIVERY,
    "batches": GW_COUNTER_BATCHES,
    "batch_events": GW_COUNTER_BATCH_EVENTS,
    "inflated_bytes": GW_COUNTER_INFLATED_BYTES,
    "file_bytes": GW_COUNTER_FILE_BYTES,
    "file_syncs": GW_COUNTER_FILE_SYNCS,
    "file_sync_ns": GW_COUNTER_FILE_SYNC_NS,
    "file_files": GW_COUNTER_FILE_FILES,
    "file_removed": GW_COUNTER_FILE_REMOVED,
    "file_write_failures": GW_COUNTER_FILE_WRITE_FAILURES,
    "file_up": GW_COUNTER_FILE_UP,
}
