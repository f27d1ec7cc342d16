# The part of log.pyx that is one worker's way in: gw_ingest.h for one event, gw_batch.h for many.

cdef extern from "gw_validator.h":
    enum:
        GW_FIELD_NONE, GW_FIELD_METRICS, GW_FIELD_TAGS, GW_FIELD_TS, GW_FIELD_SEQ, GW_FIELD_BOOT, GW_FIELD_PAYLOAD
        GW_FIELD_UNKNOWN, GW_FIELD_DEVICE_ID
        GW_EVENT_HAS_SEQ, GW_EVENT_HAS_BOOT
        GW_CODE_BODY_TOO_LARGE, GW_CODE_SEQ_CONFLICT, GW_CODE_BAD_DEVICE_ID, GW_CODE_INTERNAL
    ctypedef struct gw_verdict:
        uint16_t code
        uint8_t field, flags
        uint32_t offset, field_offset, field_bytes

cdef extern from "gw_ingest.h":
    int GW_INGEST_BUSY
    ctypedef struct gw_ingest:
        gw_log *log
        gw_producer *producer
        gw_counter_block *counters
        uint64_t hash_key[2]
        uint64_t lsn
        uint8_t used_percent
        c_bool duplicate
        gw_verdict verdict
    int gw_ingest_event(gw_ingest *ingest, const uint8_t *device_id, size_t device_id_bytes, const uint8_t *body,
                        size_t body_bytes, uint64_t started_ns, c_bool again) noexcept nogil
    void gw_ingest_refuse(gw_ingest *ingest, unsigned code, uint64_t started_ns) noexcept nogil
    uint64_t gw_monotonic_ns() noexcept nogil

cdef extern from "gw_batch.h":
    ctypedef struct gw_item:
        uint32_t offset
    ctypedef struct gw_batch_refusal:
        uint32_t index
        gw_verdict verdict
    ctypedef struct gw_batch:
        uint32_t items, offset, looked_at, accepted, duplicates, refused
        uint16_t code, stop
        uint8_t used_percent
        uint64_t lsn
        gw_item *item
        uint64_t *lsns
        gw_batch_refusal *refusal
    ctypedef struct gw_batch_limits:
        uint32_t event_bytes_max, events_max
    int gw_ingest_batch(gw_ingest *ingest, gw_batch *batch, const uint8_t *device_id, size_t device_id_bytes,
                        const uint8_t *body, size_t body_bytes, c_bool lines, gw_batch_limits limits) noexcept nogil
    void gw_batch_count(const gw_ingest *ingest, const gw_batch *batch, uint64_t started_ns) noexcept nogil
    void gw_batch_free(gw_batch *batch) noexcept nogil

BUSY = GW_INGEST_BUSY
Batch = namedtuple("Batch", "code offset items accepted duplicates errors resume_at stop lsn used_percent lsns")

cdef dict FIELD_NAMES = {
    GW_FIELD_METRICS: "metrics", GW_FIELD_TAGS: "tags", GW_FIELD_TS: "ts", GW_FIELD_SEQ: "seq", GW_FIELD_BOOT: "boot",
    GW_FIELD_PAYLOAD: "payload", GW_FIELD_DEVICE_ID: "device_id",
}


cdef object field_of(const gw_verdict *verdict, const uint8_t *body):
    name = FIELD_NAMES.get(verdict.field)
    cdef bytes inner = PyBytes_FromStringAndSize(<const char *>body + verdict.field_offset, verdict.field_bytes)
    if verdict.field == GW_FIELD_UNKNOWN:
        return inner.decode("utf-8", "replace")
    if verdict.field_offset:  # the inner key may be empty
        return f"{name}.{inner.decode('utf-8', 'replace')}"
    return name


@cython.no_gc_clear  # the producer's slot lies in the log's map, which must outlive it
cdef class Ingest:
    cdef gw_ingest ingest
    cdef gw_batch scratch
    cdef Log log
    cdef bint inside  # a thread is in `batch`, without the GIL
    cdef readonly object field
    cdef readonly object offset

    def __init__(self, Log log not None, unsigned block):
        if self.log is not None:
            raise ValueError("already open")
        self.ingest.counters = log.block(block, 0)
        status = gw_producer_open(log.live(), &self.ingest.producer)
        if status != GW_OK:
            raise LogError("no intent slot is free: too many workers, or dead ones whose claims are not resolved yet")
        self.ingest.log = log.live()
        self.log = log
        log.producers += 1
        cdef bytes key = os.urandom(16)
        memcpy(self.ingest.hash_key, PyBytes_AS_STRING(key), 16)

    def __dealloc__(self):
        self.release()
        gw_batch_free(&self.scratch)

    cdef void release(self):
        if self.ingest.producer is not NULL:
            gw_producer_close(self.ingest.producer)
            self.ingest.producer = NULL
            self.log.producers -= 1

    cdef int check_usable(self) except -1:
        if self.ingest.producer is NULL:
            raise ValueError("closed")
        if self.inside:
            raise ValueError("another thread is in a batch of this Ingest: one a thread")
        return 0

    def close(self):
        if self.ingest.producer is not NULL:
            self.check_usable()
        self.release()

    @property
    def lsn(self):
        return self.ingest.lsn

    @property
    def duplicate(self):
        return self.ingest.duplicate

    @property
    def used_percent(self):
        return self.ingest.used_percent

    @property
    def receipt(self):
        return self.log.receipt(self.ingest.lsn)

    def event(self, str device_id not None, bytes body not None, uint64_t started_ns, bint again=False):
        cdef Py_ssize_t device_id_bytes
        cdef const char *device = PyUnicode_AsUTF8AndSize(device_id, &device_id_bytes)
        self.check_usable()
        cdef int code = gw_ingest_event(
            &self.ingest, <const uint8_t *>device, device_id_bytes, <const uint8_t *>PyBytes_AS_STRING(body),
            PyBytes_GET_SIZE(body), started_ns, again)
        if code > 0:
            self.explain(body)
        return code

    cdef explain(self, bytes body):
        cdef gw_verdict *verdict = &self.ingest.verdict
        if not verdict.code:  # refused by the log, not by the validator
            self.field = self.offset = None
            return
        self.field = field_of(verdict, <const uint8_t *>PyBytes_AS_STRING(body))
        self.offset = verdict.offset

    def batch(self, str device_id, bytes body not None, bint ndjson, uint64_t started_ns, limits):
        cdef gw_batch_limits most
        most.event_bytes_max, most.events_max = limits
        cdef Py_ssize_t device_id_bytes = 0
        cdef const char *device = NULL
        if device_id is not None:
            device = PyUnicode_AsUTF8AndSize(device_id, &device_id_bytes)
        cdef const uint8_t *start = <const uint8_t *>PyBytes_AS_STRING(body)
        cdef size_t size = PyBytes_GET_SIZE(body)
        self.check_usable()
        self.inside = True
        with nogil:
            gw_ingest_batch(&self.ingest, &self.scratch, <const uint8_t *>device, device_id_bytes, start, size,
                            ndjson, most)
        self.inside = False
        gw_batch_count(&self.ingest, &self.scratch, started_ns)
        return self.came_of(start)

    cdef came_of(self, const uint8_t *body):
        cdef gw_batch *b = &self.scratch
        cdef gw_batch_refusal *refusal
        if b.code == GW_CODE_INTERNAL:
            raise MemoryError("no memory for the items of a batch; nothing of it is in")
        errors = []
        cdef uint32_t i
        for i in range(b.refused):
            refusal = &b.refusal[i]
            errors.append((
                refusal.index, refusal.verdict.code,
                field_of(&refusal.verdict, body + b.item[refusal.index].offset),
                None if refusal.verdict.code in (GW_CODE_SEQ_CONFLICT, GW_CODE_BODY_TOO_LARGE)
                else refusal.verdict.offset,
            ))
        return Batch(
            b.code, b.offset if b.code and b.code != GW_CODE_BAD_DEVICE_ID else None, b.items, b.accepted,
            b.duplicates, errors, b.looked_at if b.stop else None, b.stop, b.lsn, b.used_percent,
            PyBytes_FromStringAndSize(<const char *>b.lsns, b.looked_at * sizeof(uint64_t)))

    def refuse(self, unsigned code, uint64_t started_ns):
        if not 0 < code < <unsigned>GW_CODE_COUNT:
            raise ValueError(f"code {code}")
        gw_ingest_refuse(&self.ingest, code, started_ns)
        # field and offset stay: they belong to the other thread's last event, which may not be answered yet


def now_ns():
    return gw_monotonic_ns()
