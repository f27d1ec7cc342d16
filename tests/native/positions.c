/* Moves the positions of a log, as committer, follower and publishers would, and looks at how a worker's waiter sleeps.
 * A shared object for tests/test_waiting.py. Sources: _native/gw_crc32c.c _native/gw_log*.c */
#include "gw_log_shared.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT void positions_move(gw_log *log, uint64_t durable, uint64_t cursor, uint64_t committed, bool wake)
{
    gw_cursor at = {.lsn = committed};
    gw_versioned_store(&log->shared->committed, &at);
    at.lsn = cursor;
    gw_versioned_store(&log->shared->cursor[0], &at);
    atomic_store_explicit(&log->shared->durable, durable, memory_order_release);
    if (wake)
        gw_wake_waiters(log, GW_WAITS_DURABLE | GW_WAITS_SINKS | GW_WAITS_COMMITTED);
}

/* 0: it is awake; else 1 << 31 and what it sleeps for. */
EXPORT uint32_t positions_flag(gw_log *log, unsigned worker)
{
    return atomic_load(&log->shared->waiter[worker].flag);
}

EXPORT uint32_t positions_nudges(gw_log *log, unsigned worker)
{
    return atomic_load(&log->shared->waiter[worker].nudges);
}

EXPORT uint64_t positions_wanted(gw_log *log, unsigned worker, bool durable)
{
    gw_waiter *waiter = &log->shared->waiter[worker];
    return atomic_load(durable ? &waiter->wanted_durable : &waiter->wanted);
}
