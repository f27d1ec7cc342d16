# cython: language_level=3, freethreading_compatible=False
"""Thin binding of gw_log.h and gw_ingest.h: convert, call, raise. The docstrings are in gateway/_log.pyi."""

import os
from collections import namedtuple

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_New
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, strlen

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

include "counters.pxi"

cdef extern from "gw_log.h":
    ctypedef enum gw_status:
        GW_OK, GW_FULL, GW_CLOSED, GW_FAILED, GW_EMPTY, GW_CORRUPT, GW_TOO_LARGE, GW_NO_SLOT, GW_LOCKED, GW_NOT_A_LOG
        GW_ERRNO, GW_DUPLICATE, GW_CONFLICT, GW_BUSY
    enum:
        GW_RECEIPT_BYTES_MAX
    enum:
        GW_DATA, GW_VOID, GW_PAD, GW_RUNNING, GW_DRAINING, GW_STATE_FAILED, GW_SINKS_MAX, GW_SINK_NAME_BYTES
        GW_DAMAGE_MAX
    ctypedef int gw_state "enum gw_state"
    ctypedef bint c_bool "bool"
    const uint64_t GW_CAPACITY_MIN
    const uint64_t GW_CAPACITY_MAX
    ctypedef struct gw_log:
        pass
    ctypedef struct gw_producer:
        pass
    ctypedef struct gw_error:
        int error_number
        uint64_t lsn
        char text[160]
    ctypedef struct gw_damage:
        uint64_t start "from"
        uint64_t end "to"
    ctypedef struct gw_recovery:
        uint64_t start, watermark, end, records, bytes, torn_bytes, corrupt_bytes
        uint32_t corrupt_count, epoch
        gw_damage corrupt[16]
    ctypedef struct gw_record:
        uint64_t lsn, size, received_at_ns, seq, boot
        const uint8_t *device_id
        const uint8_t *body
        uint32_t body_bytes, epoch
        uint8_t device_id_bytes, flags, kind, splice, dead
    ctypedef struct gw_event:
        const uint8_t *device_id
        const uint8_t *body
        uint32_t body_bytes
        uint8_t device_id_bytes, flags, splice
        uint64_t received_at_ns, seq, boot
    ctypedef struct gw_cursor:
        uint64_t lsn, ordinal, published, dead_lettered, base, skipped
    ctypedef struct gw_sinks:
        const char *const *names
        uint32_t optional
        const char *forget

    gw_status gw_log_create(const char *path, uint64_t capacity, int (*progress)(void *, uint64_t) noexcept,
                            void *context, gw_error *error) nogil
    gw_status gw_log_open(const char *path, int fd_lock, const gw_sinks *sinks, bint accept_corruption,
                          gw_log **log, gw_recovery *report, gw_error *error) nogil
    gw_status gw_log_attach(int fd_lock, int fd_shared, gw_log **log, gw_error *error) nogil
    gw_status gw_log_scan(const char *path, gw_log **log, gw_recovery *report, gw_error *error) nogil
    gw_status gw_log_next(const gw_log *log, uint64_t lsn, uint64_t limit, uint8_t *buffer, gw_record *record) nogil
    const char *gw_log_sink_name(const gw_log *log, unsigned sink) nogil
    gw_status gw_log_resize(const gw_log *log, const gw_recovery *found, const char *path, uint64_t capacity,
                            int (*progress)(void *, uint64_t) noexcept, void *context, uint64_t *start,
                            gw_error *error) nogil
    void gw_log_close(gw_log *log) nogil
    int gw_log_fd_shared(const gw_log *log) nogil
    uint64_t gw_log_capacity(const gw_log *log) nogil
    uint64_t gw_log_record_bytes_max(const gw_log *log) nogil
    uint64_t gw_log_identity(const gw_log *log) nogil
    uint64_t gw_log_tail(const gw_log *log) nogil
    uint64_t gw_log_committed(const gw_log *log) nogil
    uint64_t gw_log_committed_ordinal(const gw_log *log) nogil
    uint64_t gw_log_durable(const gw_log *log) nogil
    uint64_t gw_log_reclaim(const gw_log *log) nogil
    gw_state gw_log_state(const gw_log *log) nogil
    void gw_log_set_state(gw_log *log, gw_state state) nogil
    gw_counter_block *gw_log_counters(gw_log *log, unsigned block) nogil
    int64_t gw_log_unexplained(const gw_log *log, unsigned sink) nogil
    uint64_t gw_log_lag_events(const gw_log *log, unsigned sink) nogil
    uint64_t gw_log_used(const gw_log *log) nogil
    c_bool gw_log_is_full(const gw_log *log) nogil
    uint64_t gw_log_least_cursor(const gw_log *log) nogil
    c_bool gw_log_is_required(const gw_log *log, unsigned sink) nogil
    void gw_log_set_sinks_want_durable(gw_log *log, c_bool wanted) nogil
    c_bool gw_log_sinks_want_durable(const gw_log *log) nogil
    uint64_t gw_log_wait_durable(gw_log *log, uint64_t seen, int timeout_ms) nogil
    void gw_log_wake_durable(gw_log *log) nogil
    c_bool gw_log_sinks_wanted(const gw_log *log, uint64_t lsn) nogil
    uint64_t gw_log_skip(gw_log *log, unsigned sink) nogil
    void gw_log_set_water(gw_log *log, uint64_t high, uint64_t low) nogil
    gw_status gw_log_oldest(const gw_log *log, gw_record *record) nogil
    void gw_log_receipt(const gw_log *log, uint64_t lsn, char *out) nogil
    int gw_log_receipt_state(const gw_log *log, const char *text, size_t bytes, uint64_t *lsn) nogil
    int gw_log_state_of(const gw_log *log, uint64_t lsn) nogil
    void gw_log_want(gw_log *log, unsigned worker, uint64_t lsn, c_bool sink) nogil
    uint32_t gw_log_wait(gw_log *log, unsigned worker, uint32_t word, uint64_t durable_above, uint64_t sinks_above,
                         uint64_t committed_above, int timeout_ms) nogil
    void gw_log_nudge(gw_log *log, unsigned worker) nogil
    void gw_log_rest(gw_log *log, int microseconds) nogil
    c_bool gw_log_mark_dead(gw_log *log, unsigned sink, uint64_t lsn, uint32_t epoch) nogil
    gw_status gw_producer_append(gw_producer *producer, const gw_event *event, uint64_t *lsn) nogil
    gw_status gw_producer_open(gw_log *log, gw_producer **producer) nogil
    void gw_producer_close(gw_producer *producer) nogil
    uint64_t gw_log_follow(gw_log *log, uint64_t seen, int timeout_ms) nogil
    void gw_log_wake(gw_log *log) nogil
    gw_status gw_log_read(const gw_log *log, uint64_t lsn, gw_record *record) nogil
    int gw_log_sink(const gw_log *log, const char *name) nogil
    gw_cursor gw_cursor_load(const gw_log *log, unsigned sink) nogil
    void gw_cursor_store(gw_log *log, unsigned sink, const gw_cursor *cursor) nogil
    void gw_log_owner_died(gw_log *log, int pid) nogil
    gw_status gw_log_takeover(gw_log *log, gw_error *error) nogil
    gw_status gw_log_sync(gw_log *log, c_bool *changed, gw_error *error) nogil
    gw_status gw_log_run_committer(gw_log *log, int interval_ms, gw_error *error) nogil
    void gw_log_stop_committer(gw_log *log) nogil

RUNNING, DRAINING, FAILED = GW_RUNNING, GW_DRAINING, GW_STATE_FAILED
DATA, VOID, PAD = GW_DATA, GW_VOID, GW_PAD
BLOCK_DELIVERY, BLOCK_SUPERVISOR, BLOCK_COUNT = GW_BLOCK_DELIVERY, GW_BLOCK_SUPERVISOR, GW_BLOCK_COUNT
WORKERS_MAX = GW_WORKERS_MAX
NEVER = 0xffffffffffffffff
RECEIPT_STATES = ("unknown", "enqueued", "durable", "delivered", "dead_lettered", "finished", "lost")
CAPACITY_MIN, CAPACITY_MAX = GW_CAPACITY_MIN, GW_CAPACITY_MAX

Recovery = namedtuple("Recovery", "start watermark end records bytes torn_bytes corrupt_bytes corrupt epoch")
Record = namedtuple("Record", "lsn size epoch kind flags received_at_ns seq boot device_id body dead",
                    defaults=(0,))
Cursor = namedtuple("Cursor", "lsn ordinal published dead_lettered base skipped", defaults=(0, 0))


class LogError(Exception):
    def __init__(self, message, path=None, lsn=None, errno=None):
        super().__init__(message)
        self.path = path
        self.lsn = lsn
        self.errno = errno


class LogLocked(LogError):
    pass


class LogCorrupt(LogError):
    recovery = None


class NotALog(LogError):
    pass


class Lapped(LogError):
    pass


cdef object error_of(gw_status status, gw_error *error, object path):
    text = error.text.decode("utf-8", "replace")
    number = error.error_number or None
    message = f"{path or 'log'}: {text}"
    if number:
        message += f": {os.strerror(number)}"
    kind = LogError
    if status == GW_LOCKED:
        kind = LogLocked
    elif status == GW_CORRUPT:
        kind = LogCorrupt
        message += f" at lsn {error.lsn}"
    elif status == GW_NOT_A_LOG:
        kind = NotALog
    return kind(message, path=path, lsn=error.lsn or None, errno=number)


cdef object recovery_of(gw_recovery *report):
    count = min(report.corrupt_count, <uint32_t>GW_DAMAGE_MAX)
    return Recovery(
        report.start, report.watermark, report.end, report.records, report.bytes, report.torn_bytes,
        report.corrupt_bytes, tuple((report.corrupt[i].start, report.corrupt[i].end) for i in range(count)),
        report.epoch)


cdef object record_of(const gw_record *record):
    if record.kind == GW_PAD:
        return Record(record.lsn, record.size, record.epoch, record.kind, 0, 0, None, None, "", b"", 0)
    return Record(
        record.lsn, record.size, record.epoch, record.kind, record.flags, record.received_at_ns,
        record.seq if record.flags & GW_EVENT_HAS_SEQ else None,
        record.boot if record.flags & GW_EVENT_HAS_BOOT else None,
        PyUnicode_DecodeASCII(<const char *>record.device_id, record.device_id_bytes, "replace"),
        PyBytes_FromStringAndSize(<const char *>record.body, record.body_bytes), record.dead)


cdef int on_progress(void *context, uint64_t done) noexcept with gil:
    call, caught = <object>context
    try:
        PyErr_CheckSignals()  # Ctrl-C while a large file is filled
        if call is not None:
            call(done)
    except BaseException as stop:
        caught.append(stop)
        return 1
    return 0


def create(str path, uint64_t capacity_bytes, progress=None):
    cdef bytes name = os.fsencode(path)
    cdef const char *c_path = name
    cdef gw_error error
    cdef gw_status status
    caught = []
    watch = (progress, caught)
    cdef void *context = <void *>watch
    with nogil:
        status = gw_log_create(c_path, capacity_bytes, on_progress, context, &error)
    if caught:
        raise caught[0]
    if status != GW_OK:
        if not GW_CAPACITY_MIN <= capacity_bytes <= GW_CAPACITY_MAX or capacity_bytes & (capacity_bytes - 1):
            raise ValueError(f"capacity_bytes = {capacity_bytes} is not a power of two from {GW_CAPACITY_MIN} "
                             f"to {GW_CAPACITY_MAX}")
        raise OSError(error.error_number, error.text.decode() + ": " + os.strerror(error.error_number), path)


cdef class Log:
    cdef gw_log *log
    cdef gw_recovery found  # of a scan
    cdef bytearray looked  # next's buffer
    cdef int producers
    cdef int inside  # calls without the GIL: they stand in the map that close takes away
    cdef readonly object path
    cdef readonly object recovery

    def __init__(self):
        raise TypeError("use Log.open, Log.attach or Log.scan")

    def __dealloc__(self):
        gw_log_close(self.log)

    cdef gw_log *live(self) except NULL:
        if self.log is NULL:
            raise ValueError("the log is closed")
        return self.log

    @staticmethod
    def open(str path, int lock_fd, sinks, bint accept_corruption=False, required=None, forget=None):
        cdef bytes name = os.fsencode(path)
        cdef const char *c_path = name
        cdef list names = [s.encode("ascii") for s in sinks]
        cdef const char *c_sinks[9]
        cdef bytes forgotten
        cdef gw_sinks all
        cdef gw_recovery report
        cdef gw_error error
        cdef gw_status status
        if len(names) > GW_SINKS_MAX or any(not 0 < len(n) <= GW_SINK_NAME_BYTES for n in names):
            raise ValueError(f"at most {GW_SINKS_MAX} sinks with names of 1 to {GW_SINK_NAME_BYTES} bytes")
        for i, n in enumerate(names):
            c_sinks[i] = <const char *>(<bytes>n)
        c_sinks[len(names)] = NULL
        wanted = [True] * len(names) if required is None else list(required)
        if len(wanted) != len(names) or (names and not any(wanted)):
            raise ValueError(f"required = {required}: one for each of {sinks}, one at least true")
        all.names, all.optional, all.forget = c_sinks, 0, NULL
        for i, is_required in enumerate(wanted):
            all.optional |= (0 if is_required else 1) << <int>i
        if forget is not None:
            forgotten = forget.encode("ascii")
            all.forget = forgotten
        cdef Log self = Log.__new__(Log)
        report.corrupt_count = 0
        with nogil:
            status = gw_log_open(c_path, lock_fd, &all, accept_corruption, &self.log, &report, &error)
        if status != GW_OK:
            failure = error_of(status, &error, path)
            if status == GW_CORRUPT and report.corrupt_count:
                failure.recovery = recovery_of(&report)
            raise failure
        self.path = path
        self.recovery = recovery_of(&report)
        return self

    @staticmethod
    def attach(int lock_fd, int shared_fd):
        cdef gw_error error
        cdef Log self = Log.__new__(Log)
        status = gw_log_attach(lock_fd, shared_fd, &self.log, &error)
        if status != GW_OK:
            raise error_of(status, &error, None)
        return self

    @staticmethod
    def scan(str path):
        cdef bytes name = os.fsencode(path)
        cdef const char *c_path = name
        cdef gw_error error
        cdef gw_status status
        cdef Log self = Log.__new__(Log)
        with nogil:
            status = gw_log_scan(c_path, &self.log, &self.found, &error)
        if status != GW_OK:
            raise error_of(status, &error, path)
        self.path = path
        self.recovery = recovery_of(&self.found)
        return self

    @property
    def sinks(self):
        names = []
        while True:
            name = gw_log_sink_name(self.live(), len(names))
            if name is NULL:
                return tuple(names)
            names.append(name[:GW_SINK_NAME_BYTES].rstrip(b"\0").decode("ascii", "replace"))

    def next(self, uint64_t lsn, uint64_t limit):
        cdef gw_record record
        cdef gw_log *log = self.live()
        if self.looked is None:
            self.looked = bytearray(gw_log_record_bytes_max(log))
        if gw_log_next(log, lsn, limit, <uint8_t *>PyByteArray_AS_STRING(self.looked), &record) != GW_OK:
            return None
        return record_of(&record)

    def resize(self, str path, uint64_t capacity_bytes, progress=None):
        cdef bytes name = os.fsencode(path)
        cdef const char *c_path = name
        cdef gw_log *log = self.live()
        cdef gw_error error
        cdef gw_status status
        cdef uint64_t start = 0
        caught = []
        watch = (progress, caught)
        cdef void *context = <void *>watch
        self.inside += 1
        with nogil:
            status = gw_log_resize(log, &self.found, c_path, capacity_bytes, on_progress, context, &start, &error)
        self.inside -= 1
        if caught:
            raise caught[0]
        if status != GW_OK:
            raise error_of(status, &error, self.path)
        return start

    def close(self):
        if self.producers:
            raise ValueError("an Ingest of this log is still open")
        if self.inside:
            raise ValueError("another thread is still in a call of this log")
        gw_log_close(self.log)
        self.log = NULL

    @property
    def shared_fd(self):
        return gw_log_fd_shared(self.live())

    @property
    def capacity_bytes(self):
        return gw_log_capacity(self.live())

    @property
    def record_bytes_max(self):
        return gw_log_record_bytes_max(self.live())

    @property
    def identity(self):
        return gw_log_identity(self.live())

    @property
    def tail(self):
        return gw_log_tail(self.live())

    @property
    def committed(self):
        return gw_log_committed(self.live())

    @property
    def committed_ordinal(self):
        return gw_log_committed_ordinal(self.live())

    @property
    def durable(self):
        return gw_log_durable(self.live())

    @property
    def reclaim(self):
        return gw_log_reclaim(self.live())

    @property
    def used(self):
        return gw_log_used(self.live())

    @property
    def full(self):
        return bool(gw_log_is_full(self.live()))

    @property
    def least_cursor(self):
        return gw_log_least_cursor(self.live())

    def is_required(self, unsigned sink):
        return bool(gw_log_is_required(self.live(), self.checked_sink(sink)))

    @property
    def sinks_want_durable(self):
        return bool(gw_log_sinks_want_durable(self.live()))

    @sinks_want_durable.setter
    def sinks_want_durable(self, bint wanted):
        gw_log_set_sinks_want_durable(self.live(), wanted)

    def wait_durable(self, uint64_t seen, int timeout_ms):
        cdef gw_log *log = self.live()
        self.inside += 1
        with nogil:
            seen = gw_log_wait_durable(log, seen, timeout_ms)
        self.inside -= 1
        return seen

    def wake_durable(self):
        gw_log_wake_durable(self.live())

    def sinks_wanted(self, uint64_t lsn):
        return gw_log_sinks_wanted(self.live(), lsn)

    @property
    def oldest(self):
        cdef gw_record record
        if gw_log_oldest(self.live(), &record) != GW_OK:
            return None
        return record.lsn, record.received_at_ns

    def set_water(self, uint64_t high, uint64_t low):
        if not 0 < low <= high <= gw_log_capacity(self.live()):
            raise ValueError(f"water marks {high}, {low}: 0 < low <= high <= capacity does not hold")
        gw_log_set_water(self.log, high, low)

    def receipt(self, uint64_t lsn):
        cdef char text[68]
        gw_log_receipt(self.live(), lsn, text)
        return PyUnicode_DecodeASCII(text, strlen(text), "strict")

    def receipt_state(self, str receipt not None):
        cdef uint64_t lsn
        cdef bytes text = receipt.encode("utf-8", "surrogatepass")
        return RECEIPT_STATES[gw_log_receipt_state(self.live(), text, len(text), &lsn)]

    def state_of(self, uint64_t lsn):
        return RECEIPT_STATES[gw_log_state_of(self.live(), lsn)]

    cdef unsigned checked_worker(self, unsigned worker) except? 99:
        if worker >= GW_WORKERS_MAX:
            raise IndexError(f"worker {worker}")
        self.live()
        return worker

    def want(self, unsigned worker, uint64_t lsn, bint sink):
        gw_log_want(self.live(), self.checked_worker(worker), lsn, sink)

    def wait(self, unsigned worker, uint32_t word, uint64_t durable_above, uint64_t sinks_above,
             uint64_t committed_above, int timeout_ms):
        cdef gw_log *log = self.live()
        self.checked_worker(worker)
        self.inside += 1
        with nogil:
            word = gw_log_wait(log, worker, word, durable_above, sinks_above, committed_above, timeout_ms)
        self.inside -= 1
        return word

    def nudge(self, unsigned worker):
        gw_log_nudge(self.live(), self.checked_worker(worker))

    def rest(self, int microseconds):
        cdef gw_log *log = self.live()
        self.inside += 1
        with nogil:
            gw_log_rest(log, microseconds)
        self.inside -= 1

    def mark_dead(self, unsigned sink, uint64_t lsn, uint32_t epoch=0):
        return bool(gw_log_mark_dead(self.live(), self.checked_sink(sink), lsn, epoch))

    @property
    def state(self):
        return <int>gw_log_state(self.live())

    @state.setter
    def state(self, int state):
        if not GW_RUNNING <= state <= GW_STATE_FAILED:
            raise ValueError(f"state = {state} is none of RUNNING, DRAINING, FAILED")
        gw_log_set_state(self.live(), <gw_state>state)

    def read(self, uint64_t lsn):
        cdef gw_record record
        cdef gw_error error
        status = gw_log_read(self.live(), lsn, &record)
        if status == GW_EMPTY:
            return None
        if status != GW_OK:
            error.error_number = 0
            error.lsn = lsn
            memcpy(error.text, b"no whole record", 16)
            raise error_of(GW_CORRUPT, &error, self.path)
        return record_of(&record)

    def follow(self, uint64_t seen, int timeout_ms):
        cdef gw_log *log = self.live()
        cdef uint64_t committed
        self.inside += 1
        with nogil:
            committed = gw_log_follow(log, seen, timeout_ms)
        self.inside -= 1
        return committed

    def wake(self):
        gw_log_wake(self.live())

    def sink(self, str name):
        index = gw_log_sink(self.live(), name.encode("ascii"))
        if index < 0:
            raise KeyError(name)
        return index

    cdef unsigned checked_sink(self, unsigned sink) except? 99:
        if sink >= GW_SINKS_MAX:
            raise IndexError(f"sink {sink}")
        self.live()
        return sink

    def cursor(self, unsigned sink):
        cdef gw_cursor c = gw_cursor_load(self.live(), self.checked_sink(sink))
        return Cursor(c.lsn, c.ordinal, c.published, c.dead_lettered, c.base, c.skipped)

    def set_cursor(self, unsigned sink, cursor):
        cdef gw_cursor c
        c.lsn, c.ordinal, c.published, c.dead_lettered, c.base, c.skipped = cursor
        gw_cursor_store(self.live(), self.checked_sink(sink), &c)

    def skip(self, unsigned sink):
        return gw_log_skip(self.live(), self.checked_sink(sink))

    def lag_events(self, unsigned sink):
        return gw_log_lag_events(self.live(), self.checked_sink(sink))

    def unexplained(self, unsigned sink):
        return gw_log_unexplained(self.live(), self.checked_sink(sink))

    def owner_died(self, int pid):
        gw_log_owner_died(self.live(), pid)

    def takeover(self):
        cdef gw_log *log = self.live()
        cdef gw_error error
        cdef gw_status status
        self.inside += 1
        with nogil:
            status = gw_log_takeover(log, &error)
        self.inside -= 1
        if status != GW_OK:
            raise error_of(status, &error, self.path)

    def sync(self):
        cdef gw_log *log = self.live()
        cdef gw_error error
        cdef gw_status status
        cdef c_bool changed = False
        self.inside += 1
        with nogil:
            status = gw_log_sync(log, &changed, &error)
        self.inside -= 1
        if status != GW_OK:
            raise error_of(status, &error, self.path)
        return bool(changed)

    def run_committer(self, int interval_ms):
        cdef gw_log *log = self.live()
        cdef gw_error error
        cdef gw_status status
        self.inside += 1
        with nogil:
            status = gw_log_run_committer(log, interval_ms, &error)
        self.inside -= 1
        if status != GW_OK:
            raise error_of(status, &error, self.path)

    def stop_committer(self):
        gw_log_stop_committer(self.live())

    cdef gw_counter_block *block(self, unsigned block, unsigned index) except NULL:
        cdef gw_counter_block *counters = gw_log_counters(self.live(), block)
        if counters is NULL or index >= GW_COUNTER_WORDS:
            raise IndexError(f"block {block}, counter {index}")
        return counters

    def counter(self, unsigned block, unsigned index):
        return gw_counter_load(self.block(block, index), index)

    def counter_total(self, unsigned index):
        cdef uint64_t total = 0
        cdef unsigned i
        for i in range(GW_BLOCK_COUNT):
            total += gw_counter_load(self.block(i, index), index)
        return total

    def counter_add(self, unsigned block, unsigned index, uint64_t n=1):
        gw_counter_add(self.block(block, index), index, n)

    def counter_set(self, unsigned block, unsigned index, uint64_t n):
        gw_counter_set(self.block(block, index), index, n)

    def observe(self, unsigned block, unsigned histogram, uint64_t ns):
        if histogram not in (GW_COUNTER_REQUEST_NS, GW_COUNTER_PUBACK_NS, GW_COUNTER_ACK_NS):
            raise IndexError(f"histogram {histogram}")
        gw_histogram_observe(self.block(block, histogram), histogram, ns)

    def _capsule(self):
        return PyCapsule_New(self.live(), "gw_log", NULL)

    def _hold(self):
        self.live()
        self.inside += 1

    def _release(self):
        self.inside -= 1


include "ingest.pxi"


@cython.no_gc_clear  # as Ingest
cdef class Appender:
    cdef gw_producer *producer
    cdef Log log

    def __init__(self, Log log not None):
        if self.log is not None:
            raise ValueError("already open")
        if gw_producer_open(log.live(), &self.producer) != GW_OK:
            raise LogError("no intent slot is free")
        self.log = log
        log.producers += 1

    def __dealloc__(self):
        self.close()

    cpdef close(self):
        if self.producer is not NULL:
            gw_producer_close(self.producer)
            self.producer = NULL
            self.log.producers -= 1

    def append(self, record):
        cdef gw_event event
        cdef bytes device = record.device_id.encode("ascii"), body = record.body
        cdef uint64_t lsn = 0
        if self.producer is NULL:
            raise ValueError("closed")
        if len(device) > 255:
            raise ValueError(f"a device id of {len(device)} bytes")
        event.device_id = <const uint8_t *>PyBytes_AS_STRING(device)
        event.device_id_bytes = <uint8_t>len(device)
        event.body = <const uint8_t *>PyBytes_AS_STRING(body)
        event.body_bytes = <uint32_t>len(body)
        event.flags, event.splice, event.received_at_ns = record.flags, 0, record.received_at_ns
        event.seq, event.boot = record.seq or 0, record.boot or 0
        status = gw_producer_append(self.producer, &event, &lsn)
        if status == GW_FULL:
            return -1
        if status == GW_DUPLICATE or status == GW_CONFLICT:
            raise ValueError(f"device {record.device_id}, boot {record.boot}, seq {record.seq} is in the log already")
        if status != GW_OK:
            raise LogError({GW_CLOSED: "the log is closed for new records", GW_TOO_LARGE: "the record is too large",
                            GW_FAILED: "the log has failed"}.get(status, "the record cannot be appended now"))
        return lsn
