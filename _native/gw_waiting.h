/* gw_waiting.h - the waiting room of one worker: requests that wait for a position of the log, each in one of three
 * lines.
 *
 *   line     position it waits for      enters                                 leaves
 *   DURABLE  durable > lsn              gw_room_enter, any thread              gw_line_due, gw_line_late: whoever takes
 *   SINK     the least cursor > lsn                                            an entry out, once, answers it
 *   BUSY     committed > lsn
 *
 * A line is a row and a heap. New events come with growing lsns and growing deadlines: they stand in the row, and its
 * first is the next to be due and to be late. Who breaks either order (a repeat of an old event, a key that is busy
 * again) stands in the heap, by lsn; its deadlines are looked through when the first of them is over, and not before.
 *
 * Every function but gw_room_sleep wants one lock to be held around it (Python's GIL). The sleeper runs without:
 *
 *   who enters                                    sleeper
 *   `lowest` of the line                          `above` of each line: what it sleeps for
 *   fence (F of gw_log_shared.h)                  fence
 *   below `above`?  nudge it                      `lowest` below `above`, or due? back to work
 *
 * One of the two sees the other, so nobody is left who comes just before the sleep. `above` is 0 while it is awake.
 * Others may take out who is due as well (the thread of the door, which comes by anyway): woken by the position, the
 * sleeper looks at `lowest` alone, finds nobody due, and sleeps on without the lock. */
#ifndef GW_WAITING_H
#define GW_WAITING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "gw_log.h"

enum gw_line_kind { GW_LINE_DURABLE, GW_LINE_SINK, GW_LINE_BUSY, GW_LINES };

#define GW_NOBODY UINT64_MAX

/* One request that waits. The pointers are the binding's. */
typedef struct gw_entry {
    uint64_t lsn, until_ns, started_ns; /* CLOCK_MONOTONIC */
    void *reply, *headers, *more;
    int ack;
} gw_entry;

typedef struct gw_line {
    gw_entry *row, *heap;
    size_t row_first, row_count, row_room; /* a ring; its room is a power of two */
    size_t heap_count, heap_room;
    uint64_t heap_until_ns;    /* no deadline in the heap is over before it */
    _Atomic uint64_t lowest;   /* lsn of who is due first, GW_NOBODY */
    _Atomic uint64_t answered; /* taken out because they were due */
    /* the sleeper */
    _Atomic uint64_t above;
    uint64_t answered_seen;
    bool lingers; /* somebody was answered lately: sleep for the next step, whoever comes by then */
} gw_line;

typedef struct gw_room {
    gw_log *log;
    unsigned worker;
    gw_line line[GW_LINES];
} gw_room;

void gw_room_init(gw_room *room, gw_log *log, unsigned worker);
void gw_room_free(gw_room *room);
/* False: no memory, and the entry is not in. The sleeper is woken when it would sleep too long for it. */
bool gw_room_enter(gw_room *room, enum gw_line_kind kind, const gw_entry *entry);
uint64_t gw_room_position(const gw_room *room, enum gw_line_kind kind);
/* Somebody waits whose position is passed. Without the lock it may be over when it is read. */
static inline bool gw_room_is_due(const gw_room *room, enum gw_line_kind kind)
{
    uint64_t lowest = atomic_load_explicit(&room->line[kind].lowest, memory_order_relaxed);
    return lowest != GW_NOBODY && lowest < gw_room_position(room, kind);
}
/* Take out at most `most` whose lsn lies below `position`, in the order of their lsn. Returns how many. */
size_t gw_line_due(gw_line *line, uint64_t position, gw_entry *out, size_t most);
/* Take out at most `most` whose deadline is not after `now_ns`. Returns how many. */
size_t gw_line_late(gw_line *line, uint64_t now_ns, gw_entry *out, size_t most);
/* No deadline is over before it; UINT64_MAX when nobody waits. */
uint64_t gw_line_until_ns(const gw_line *line);
/* Sleep, without the lock, until somebody may be due or late: until a position has passed an entry, a deadline is near,
 * the log has failed, or the word of gw_log_wait is no longer `word`. At most linger_ms while anybody waits or was
 * answered since the last call, which must be shorter than any deadline of who enters meanwhile; else idle_ms.
 * Returns the word. One thread. */
uint32_t gw_room_sleep(gw_room *room, uint32_t word, uint64_t until_ns, int linger_ms, int idle_ms);

#endif
