# The lines of a sink for Python: see gw_lines.h. Methods convert, call, raise; no decision about meaning stands here.
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport uint8_t, uint64_t

from gateway._log import Lapped, LogCorrupt

cdef extern from "gw_lines.h":
    ctypedef bint c_bool "bool"
    ctypedef enum gw_status:
        GW_OK, GW_EMPTY, GW_CORRUPT, GW_LAPPED
    ctypedef struct gw_log:
        pass
    ctypedef struct gw_lines:
        uint64_t lsn, ordinal, events
    const char *gw_log_sink_name(const gw_log *log, unsigned sink) nogil
    size_t gw_lines_room(const gw_log *log, size_t bytes_max) nogil
    void gw_lines_init(gw_lines *lines, gw_log *log, unsigned sink, uint8_t *out, size_t bytes_max,
                       c_bool durable) nogil
    gw_status gw_lines_seek(gw_lines *lines, uint64_t lsn, uint64_t *at) nogil
    gw_status gw_lines_fill(gw_lines *lines, size_t *bytes) nogil
    void gw_lines_confirm(gw_lines *lines) nogil


cdef class Lines:
    cdef gw_lines lines
    cdef object log  # keeps the mapping alive
    cdef object view  # of `out`, which is allocated once
    cdef bytearray out

    def __init__(self, log not None, unsigned sink, size_t bytes_max=1 << 20, bint durable=True):
        cdef gw_log *native = <gw_log *>PyCapsule_GetPointer(log._capsule(), "gw_log")
        if self.log is not None:
            raise ValueError("already open")
        if gw_log_sink_name(native, sink) is NULL:
            raise IndexError(f"sink {sink}")
        if not 0 < bytes_max <= 1 << 30:
            raise ValueError(f"bytes_max = {bytes_max} is not in 1 ... {1 << 30}")
        self.out = bytearray(gw_lines_room(native, bytes_max))
        self.view = memoryview(self.out).toreadonly()
        gw_lines_init(&self.lines, native, sink, <uint8_t *>PyByteArray_AS_STRING(self.out), bytes_max, durable)
        self.log = log

    cdef object failure(self, gw_status status, uint64_t lsn):
        path = self.log.path or "log"
        if status == GW_LAPPED:
            return Lapped(f"{path}: written over before it was read at lsn {lsn}", path=self.log.path, lsn=lsn)
        return LogCorrupt(f"{path}: no whole record at lsn {lsn}", path=self.log.path, lsn=lsn)

    cdef int live(self) except -1:
        if self.log is None:
            raise ValueError("closed")
        self.log._capsule()  # raises when the log is closed
        return 0

    @property
    def lsn(self):
        return self.lines.lsn

    @property
    def ordinal(self):
        return self.lines.ordinal

    @property
    def events(self):
        return self.lines.events

    def fill(self):
        cdef gw_status status
        cdef size_t n = 0
        self.live()
        self.log._hold()
        with nogil:
            status = gw_lines_fill(&self.lines, &n)
        self.log._release()
        if status == GW_OK:
            return self.view[:n]
        if status == GW_EMPTY:
            return None
        raise self.failure(status, self.lines.lsn)

    def seek(self, uint64_t lsn):
        cdef gw_status status
        cdef uint64_t at = 0
        self.live()
        self.log._hold()
        with nogil:
            status = gw_lines_seek(&self.lines, lsn, &at)
        self.log._release()
        if status == GW_EMPTY:
            raise ValueError(f"lsn {lsn}: no record starts there, at or above the cursor")
        if status != GW_OK:
            raise self.failure(status, at)

    def confirm(self):
        self.live()
        gw_lines_confirm(&self.lines)
