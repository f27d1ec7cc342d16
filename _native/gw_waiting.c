/* gw_waiting.c - see gw_waiting.h. */
#include "gw_waiting.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "gw_log_shared.h"

enum { ROOM_MIN = 64 };

void gw_room_init(gw_room *room, gw_log *log, unsigned worker)
{
    memset(room, 0, sizeof *room);
    room->log = log;
    room->worker = worker;
    for (int i = 0; i < GW_LINES; i++) {
        atomic_init(&room->line[i].lowest, GW_NOBODY);
        room->line[i].heap_until_ns = UINT64_MAX;
    }
}

void gw_room_free(gw_room *room)
{
    for (int i = 0; i < GW_LINES; i++) {
        free(room->line[i].row);
        free(room->line[i].heap);
    }
}

uint64_t gw_room_position(const gw_room *room, enum gw_line_kind kind)
{
    return kind == GW_LINE_DURABLE ? gw_log_durable(room->log)
           : kind == GW_LINE_SINK  ? gw_log_least_cursor(room->log)
                                   : gw_log_committed(room->log);
}

/* ---- a line --------------------------------------------------------------------------------------------------- */

static gw_entry *in_row(const gw_line *line, size_t i)
{
    return &line->row[(line->row_first + i) & (line->row_room - 1)];
}

static void tell_lowest(gw_line *line)
{
    uint64_t row = line->row_count ? in_row(line, 0)->lsn : GW_NOBODY;
    uint64_t heap = line->heap_count ? line->heap[0].lsn : GW_NOBODY;
    atomic_store_explicit(&line->lowest, row < heap ? row : heap, memory_order_relaxed);
}

static bool into_row(gw_line *line, const gw_entry *entry)
{
    if (line->row_count == line->row_room) {
        size_t room = line->row_room ? line->row_room * 2 : ROOM_MIN;
        gw_entry *row = malloc(room * sizeof *row);
        if (!row)
            return false;
        for (size_t i = 0; i < line->row_count; i++)
            row[i] = *in_row(line, i);
        free(line->row);
        line->row = row;
        line->row_room = room;
        line->row_first = 0;
    }
    *in_row(line, line->row_count++) = *entry;
    return true;
}

static void from_row(gw_line *line, gw_entry *out)
{
    *out = *in_row(line, 0);
    line->row_first++;
    line->row_count--;
}

static void sift_down(gw_line *line, size_t i)
{
    gw_entry entry = line->heap[i];
    for (size_t child; (child = 2 * i + 1) < line->heap_count; i = child) {
        if (child + 1 < line->heap_count && line->heap[child + 1].lsn < line->heap[child].lsn)
            child++;
        if (line->heap[child].lsn >= entry.lsn)
            break;
        line->heap[i] = line->heap[child];
    }
    line->heap[i] = entry;
}

static bool into_heap(gw_line *line, const gw_entry *entry)
{
    if (line->heap_count == line->heap_room) {
        size_t room = line->heap_room ? line->heap_room * 2 : ROOM_MIN;
        gw_entry *heap = realloc(line->heap, room * sizeof *heap);
        if (!heap)
            return false;
        line->heap = heap;
        line->heap_room = room;
    }
    size_t i = line->heap_count++;
    for (; i && line->heap[(i - 1) / 2].lsn > entry->lsn; i = (i - 1) / 2)
        line->heap[i] = line->heap[(i - 1) / 2];
    line->heap[i] = *entry;
    if (entry->until_ns < line->heap_until_ns)
        line->heap_until_ns = entry->until_ns;
    return true;
}

static void from_heap(gw_line *line, gw_entry *out)
{
    *out = line->heap[0];
    if (--line->heap_count) {
        line->heap[0] = line->heap[line->heap_count];
        sift_down(line, 0);
    } else {
        line->heap_until_ns = UINT64_MAX;
    }
}

static size_t late_in_heap(gw_line *line, uint64_t now_ns, gw_entry *out, size_t most)
{
    size_t found = 0, kept = 0;
    uint64_t until_ns = UINT64_MAX;
    for (size_t i = 0; i < line->heap_count; i++) {
        if (line->heap[i].until_ns <= now_ns && found < most) {
            out[found++] = line->heap[i];
            continue;
        }
        if (line->heap[i].until_ns < until_ns)
            until_ns = line->heap[i].until_ns;
        line->heap[kept++] = line->heap[i];
    }
    line->heap_count = kept;
    line->heap_until_ns = until_ns;
    for (size_t i = found ? kept / 2 : 0; i-- > 0;)
        sift_down(line, i);
    return found;
}

size_t gw_line_due(gw_line *line, uint64_t position, gw_entry *out, size_t most)
{
    size_t found = 0;
    while (found < most) {
        uint64_t row = line->row_count ? in_row(line, 0)->lsn : GW_NOBODY;
        uint64_t heap = line->heap_count ? line->heap[0].lsn : GW_NOBODY;
        if ((row < heap ? row : heap) >= position)
            break;
        if (row <= heap)
            from_row(line, &out[found++]);
        else
            from_heap(line, &out[found++]);
    }
    if (found) {
        tell_lowest(line);
        uint64_t answered = atomic_load_explicit(&line->answered, memory_order_relaxed);
        atomic_store_explicit(&line->answered, answered + found, memory_order_relaxed);
    }
    return found;
}

size_t gw_line_late(gw_line *line, uint64_t now_ns, gw_entry *out, size_t most)
{
    size_t found = 0;
    while (found < most && line->row_count && in_row(line, 0)->until_ns <= now_ns)
        from_row(line, &out[found++]);
    if (found < most && line->heap_until_ns <= now_ns)
        found += late_in_heap(line, now_ns, out + found, most - found);
    if (found)
        tell_lowest(line);
    return found;
}

uint64_t gw_line_until_ns(const gw_line *line)
{
    uint64_t row = line->row_count ? in_row(line, 0)->until_ns : UINT64_MAX;
    return row < line->heap_until_ns ? row : line->heap_until_ns;
}

bool gw_room_enter(gw_room *room, enum gw_line_kind kind, const gw_entry *entry)
{
    gw_line *line = &room->line[kind];
    const gw_entry *last = line->row_count ? in_row(line, line->row_count - 1) : NULL;
    bool in_order = !last || (entry->lsn >= last->lsn && entry->until_ns >= last->until_ns);
    if (!(in_order ? into_row(line, entry) : into_heap(line, entry)))
        return false;
    tell_lowest(line);
    if (kind == GW_LINE_BUSY)
        atomic_thread_fence(memory_order_seq_cst); /* F */
    else
        gw_log_want(room->log, room->worker, entry->lsn, kind == GW_LINE_SINK); /* fences */
    if (entry->lsn < atomic_load_explicit(&line->above, memory_order_relaxed))
        gw_log_nudge(room->log, room->worker);
    return true;
}

/* ---- the sleeper ---------------------------------------------------------------------------------------------- */

/* Say what is slept for. False: somebody is due, or came just now below it. */
static bool lie_down(gw_room *room, bool idle)
{
    uint64_t position[GW_LINES], above[GW_LINES];
    for (int i = 0; i < GW_LINES; i++) {
        gw_line *line = &room->line[i];
        uint64_t lowest = atomic_load_explicit(&line->lowest, memory_order_relaxed);
        position[i] = lowest != GW_NOBODY || line->lingers ? gw_room_position(room, i) : 0;
        above[i] = lowest != GW_NOBODY ? lowest : line->lingers ? position[i] : GW_NOBODY;
        atomic_store_explicit(&line->above, above[i], memory_order_relaxed);
    }
    atomic_thread_fence(memory_order_seq_cst); /* F */
    for (int i = 0; i < GW_LINES; i++) {
        uint64_t lowest = atomic_load_explicit(&room->line[i].lowest, memory_order_relaxed);
        if (lowest < above[i] || lowest < position[i] || (idle && lowest != GW_NOBODY))
            return false;
    }
    return true;
}

static bool answered_since(gw_line *line)
{
    uint64_t answered = atomic_load_explicit(&line->answered, memory_order_relaxed);
    bool since = answered != line->answered_seen;
    line->answered_seen = answered;
    return since;
}

uint32_t gw_room_sleep(gw_room *room, uint32_t word, uint64_t until_ns, int linger_ms, int idle_ms)
{
    gw_line *line = room->line;
    bool idle = until_ns == UINT64_MAX;
    for (int i = 0; i < GW_LINES; i++) {
        line[i].lingers = answered_since(&line[i]) && i != GW_LINE_BUSY && linger_ms;
        idle &= !line[i].lingers;
    }
    uint64_t now = gw_now_ns(), wake_ns = now + (uint64_t)(idle ? idle_ms : linger_ms) * 1000000u;
    if (until_ns < wake_ns)
        wake_ns = until_ns;
    while (now < wake_ns && lie_down(room, idle)) {
        uint64_t above[GW_LINES];
        for (int i = 0; i < GW_LINES; i++)
            above[i] = atomic_load_explicit(&line[i].above, memory_order_relaxed);
        int timeout_ms = (int)((wake_ns - now + 999999u) / 1000000u);
        uint32_t found = gw_log_wait(room->log, room->worker, word, above[GW_LINE_DURABLE], above[GW_LINE_SINK],
                                     above[GW_LINE_BUSY], timeout_ms);
        if (found != word || gw_log_state(room->log) == GW_STATE_FAILED) {
            word = found;
            break;
        }
        for (int i = 0; i < GW_LINE_BUSY; i++)
            line[i].lingers |= linger_ms && answered_since(&line[i]);
        now = gw_now_ns();
    }
    for (int i = 0; i < GW_LINES; i++)
        atomic_store_explicit(&line[i].above, 0, memory_order_relaxed);
    return word;
}
