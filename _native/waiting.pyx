# cython: language_level=3, freethreading_compatible=False
"""Binding of gw_waiting.h: who waits, and the answers of who is due. The docstrings are in gateway/_waiting.pyi."""

import logging
from collections import namedtuple

cimport cython
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF, Py_XDECREF, PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "gw_counters.h":
    enum:
        GW_WORKERS_MAX, GW_COUNTER_ACKS_DURABLE, GW_COUNTER_ACKS_SINK, GW_COUNTER_ACKS_DEAD, GW_COUNTER_ACK_NS
    ctypedef struct gw_counter_block:
        pass
    void gw_counter_add(gw_counter_block *block, unsigned index, uint64_t n) noexcept nogil
    void gw_histogram_observe(gw_counter_block *block, unsigned histogram, uint64_t ns) noexcept nogil

cdef extern from "gw_log_shared.h":
    uint64_t gw_now_ns() noexcept nogil

cdef extern from "gw_waiting.h":
    ctypedef struct gw_log:
        pass
    int GW_STATE_FAILED
    int gw_log_state(const gw_log *log) noexcept nogil
    uint64_t gw_log_durable(const gw_log *log) noexcept nogil
    gw_counter_block *gw_log_counters(gw_log *log, unsigned block) noexcept nogil

    ctypedef enum gw_line_kind "enum gw_line_kind":
        GW_LINE_DURABLE, GW_LINE_SINK, GW_LINE_BUSY, GW_LINES
    const uint64_t GW_NOBODY
    ctypedef struct gw_entry:
        uint64_t lsn, until_ns, started_ns
        void *reply
        void *headers
        void *more
        int ack
    ctypedef struct gw_line:
        pass
    ctypedef struct gw_room:
        gw_log *log
        gw_line line[3]
    void gw_room_init(gw_room *room, gw_log *log, unsigned worker) noexcept nogil
    void gw_room_free(gw_room *room) noexcept nogil
    bint gw_room_enter(gw_room *room, gw_line_kind kind, const gw_entry *entry) noexcept nogil
    uint64_t gw_room_position(const gw_room *room, gw_line_kind kind) noexcept nogil
    bint gw_room_is_due(const gw_room *room, gw_line_kind kind) noexcept nogil
    size_t gw_line_due(gw_line *line, uint64_t position, gw_entry *out, size_t most) noexcept nogil
    size_t gw_line_late(gw_line *line, uint64_t now_ns, gw_entry *out, size_t most) noexcept nogil
    uint64_t gw_line_until_ns(const gw_line *line) noexcept nogil
    uint32_t gw_room_sleep(gw_room *room, uint32_t word, uint64_t until_ns, int linger_ms, int idle_ms) noexcept nogil

DURABLE = <int>GW_LINE_DURABLE
SINK = <int>GW_LINE_SINK
BUSY = <int>GW_LINE_BUSY

Entry = namedtuple("Entry", "reply lsn ack started_ns until_ns headers more", module=__name__)

cdef enum:
    ENQUEUED, ACK_DURABLE, ACK_SINK  # indices of gateway.http.ACKS
    AT_ONCE = 64

cdef object logger = logging.getLogger("gateway.waiting")


cdef void own(gw_entry *entry, object reply, object headers, object more) noexcept:
    entry.reply, entry.headers, entry.more = <void *>reply, <void *>headers, <void *>more
    Py_INCREF(reply)
    Py_INCREF(headers)
    Py_INCREF(more)


cdef void disown(gw_entry *entry) noexcept:
    Py_XDECREF(<PyObject *>entry.reply)
    Py_XDECREF(<PyObject *>entry.headers)
    Py_XDECREF(<PyObject *>entry.more)


cdef object taken(gw_entry *entry):
    found = Entry(<object>entry.reply, entry.lsn, entry.ack, entry.started_ns, entry.until_ns, <object>entry.headers,
                  <object>entry.more)
    disown(entry)
    return found


@cython.no_gc_clear  # the entries would dangle
cdef class Room:
    cdef gw_room room
    cdef gw_counter_block *counters
    cdef object log
    cdef tuple x_ack, body
    cdef object set_aside
    cdef uint64_t deadline_ns[3]
    cdef int linger_ms, idle_ms
    cdef readonly int64_t count

    def __cinit__(self, *_, **__):
        gw_room_init(&self.room, NULL, 0)

    def __init__(self, log not None, unsigned worker, int durable_deadline_ms, int sink_deadline_ms, int linger_ms,
                 int idle_ms, tuple x_ack not None, tuple body not None, set_aside not None):
        if self.log is not None:
            raise ValueError("already open")
        if worker >= GW_WORKERS_MAX:
            raise IndexError(f"worker {worker}")
        gw_room_init(&self.room, <gw_log *>PyCapsule_GetPointer(log._capsule(), "gw_log"), worker)
        self.counters = gw_log_counters(self.room.log, worker)
        self.log = log
        self.x_ack, self.body, self.set_aside = x_ack, body, set_aside
        self.deadline_ns[<int>GW_LINE_DURABLE] = self.deadline_ns[<int>GW_LINE_BUSY] = durable_deadline_ms * 1000000ull
        self.deadline_ns[<int>GW_LINE_SINK] = sink_deadline_ms * 1000000ull
        self.linger_ms, self.idle_ms = min(linger_ms, durable_deadline_ms, sink_deadline_ms), idle_ms

    def __dealloc__(self):
        cdef gw_entry entry
        cdef int kind
        for kind in range(<int>GW_LINES):
            while gw_line_due(&self.room.line[kind], GW_NOBODY, &entry, 1):
                disown(&entry)
        gw_room_free(&self.room)

    def accepted(self, reply not None, ingest, int ack, uint64_t started_ns, list headers not None):
        cdef gw_entry entry
        cdef gw_line_kind kind = GW_LINE_SINK if ack == ACK_SINK else GW_LINE_DURABLE
        entry.lsn = ingest.lsn
        self.come(kind, &entry, ack, started_ns, reply, headers, None, ingest.duplicate)

    def batch(self, reply not None, uint64_t lsn, int ack, uint64_t started_ns, answer not None):
        cdef gw_entry entry
        cdef gw_line_kind kind = GW_LINE_SINK if ack == ACK_SINK else GW_LINE_DURABLE
        entry.lsn = lsn
        self.come(kind, &entry, ack, started_ns, reply, None, answer, True)

    cdef int come(self, gw_line_kind kind, gw_entry *entry, int ack, uint64_t started_ns, object reply, object headers,
                  object more, bint may_be_due) except -1:
        cdef uint64_t now = gw_now_ns()
        entry.ack, entry.started_ns, entry.until_ns = ack, started_ns, now + self.deadline_ns[<int>kind]
        own(entry, reply, headers, more)
        self.count += 1
        if (may_be_due and gw_room_position(&self.room, kind) > entry.lsn
                and gw_log_state(self.room.log) != GW_STATE_FAILED):
            self.confirm(entry, now)
        else:
            self.park(kind, entry)
        if gw_room_is_due(&self.room, GW_LINE_DURABLE):
            self.answer_line(GW_LINE_DURABLE)
        if gw_room_is_due(&self.room, GW_LINE_SINK):
            self.answer_line(GW_LINE_SINK)
        return 0

    cdef int park(self, gw_line_kind kind, gw_entry *entry) except -1:
        if not gw_room_enter(&self.room, kind, entry):
            self.count -= 1
            disown(entry)
            raise MemoryError
        return 0

    def enter(self, int line, reply, uint64_t lsn, int ack, uint64_t started_ns, uint64_t until_ns, headers, more,
              bint again=False):
        cdef gw_entry entry
        if not 0 <= line < <int>GW_LINES:
            raise IndexError(f"line {line}")
        entry.lsn, entry.ack, entry.started_ns = lsn, ack, started_ns
        entry.until_ns = until_ns or gw_now_ns() + self.deadline_ns[line]
        own(&entry, reply, headers, more)
        self.count += not again
        self.park(<gw_line_kind>line, &entry)

    def answer(self):
        self.answer_line(GW_LINE_DURABLE)
        self.answer_line(GW_LINE_SINK)
        return gw_log_state(self.room.log) != GW_STATE_FAILED

    cdef int answer_line(self, gw_line_kind kind) except -1:
        cdef gw_entry due[AT_ONCE]
        cdef size_t i, found = AT_ONCE
        cdef uint64_t position = gw_room_position(&self.room, kind)
        if gw_log_state(self.room.log) == GW_STATE_FAILED:  # read behind the position: it was right when this is not
            return 0
        cdef uint64_t now = gw_now_ns()
        while found == AT_ONCE:
            found = gw_line_due(&self.room.line[<int>kind], position, due, AT_ONCE)
            for i in range(found):
                self.confirm(&due[i], now)
        return 0

    cdef int confirm(self, gw_entry *entry, uint64_t now) except -1:
        """Answer one that is out of its line. What goes wrong there is its own affair."""
        cdef int counter = GW_COUNTER_ACKS_SINK if entry.ack == ACK_SINK else GW_COUNTER_ACKS_DURABLE
        cdef int reached = entry.ack, status = 202
        reply = <object>entry.reply
        self.count -= 1
        try:
            if entry.headers == <void *>None:
                status, headers, body = (<object>entry.more)(reached, False)
                if self.x_ack[reached] not in headers:
                    counter = GW_COUNTER_ACKS_DEAD
            else:
                headers = <list>entry.headers
                body = self.body[reached]
                if reached == ACK_SINK:
                    state = self.log.state_of(entry.lsn)
                    if state == "delivered":
                        status = 200
                    else:  # dead_lettered, or finished: written over since, and nobody can say
                        reached = ACK_DURABLE if gw_log_durable(self.room.log) > entry.lsn else ENQUEUED
                        body, counter = self.set_aside(reached, state), GW_COUNTER_ACKS_DEAD
                (<list>headers).append(self.x_ack[reached])
            gw_counter_add(self.counters, counter, 1)
            gw_histogram_observe(self.counters, GW_COUNTER_ACK_NS,
                                 now - entry.started_ns if now > entry.started_ns else 0)
            reply(status, headers, body)
        except BaseException:
            logger.critical("internal error while answering who waits", exc_info=True)
        finally:
            disown(entry)
        return 0

    def send(self, reply, int status, headers, body):
        self.count -= 1
        reply(status, headers, body)

    def due_busy(self):
        return self.take(GW_LINE_BUSY, gw_room_position(&self.room, GW_LINE_BUSY), 0)

    def late(self, uint64_t now_ns):
        found = []
        for kind in range(<int>GW_LINES):
            found += self.take(<gw_line_kind>kind, 0, now_ns)
        return found

    cdef list take(self, gw_line_kind kind, uint64_t position, uint64_t now_ns):
        cdef gw_entry out[AT_ONCE]
        cdef size_t i, found = AT_ONCE
        cdef gw_line *line = &self.room.line[<int>kind]
        entries = []
        while found == AT_ONCE:
            found = gw_line_late(line, now_ns, out, AT_ONCE) if now_ns else gw_line_due(line, position, out, AT_ONCE)
            for i in range(found):
                entries.append(taken(&out[i]))
        return entries

    def sleep(self, uint32_t word, bint linger):
        cdef uint64_t until_ns = GW_NOBODY
        cdef int kind
        for kind in range(<int>GW_LINES):
            until_ns = min(until_ns, gw_line_until_ns(&self.room.line[kind]))
        cdef int linger_ms = self.linger_ms if linger else 0
        with nogil:
            word = gw_room_sleep(&self.room, word, until_ns, linger_ms, self.idle_ms)
        return word
