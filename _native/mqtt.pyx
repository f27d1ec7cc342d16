# The MQTT window for Python: see gw_mqtt.h. Methods convert, call, raise; no decision about meaning stands here.
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from collections import namedtuple


cdef extern from "<time.h>" nogil:
    ctypedef int clockid_t
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int CLOCK_REALTIME
    int clock_gettime(clockid_t clock, timespec *time)


cdef extern from "gw_mqtt.h" nogil:
    ctypedef bint gw_bool "bool"
    ctypedef struct gw_log:
        pass
    ctypedef struct gw_window:
        pass
    ctypedef enum gw_mqtt_status:
        GW_MQTT_OK
        GW_MQTT_PACKET
        GW_MQTT_REFUSED
        GW_MQTT_PROTOCOL
    int GW_MQTT_PACKET_IN_BYTES_MAX
    int GW_MQTT_TOPIC_BYTES_MAX
    int GW_REASON_TOPIC_INVALID
    int GW_REASON_PACKET_TOO_LARGE
    int GW_REASON_PAYLOAD_INVALID
    ctypedef struct gw_cursor:
        uint64_t lsn, ordinal, published, dead_lettered
    ctypedef struct gw_packet:
        const uint8_t *body
        uint32_t body_bytes
        uint8_t type, flags, reason
        uint64_t lsn
    ctypedef struct gw_window_options:
        const uint8_t *topic_prefix
        const uint8_t *topic_suffix
        uint32_t topic_prefix_bytes, topic_suffix_bytes
        gw_bool topic_is_fixed
        uint32_t inflight_max, batch_bytes
    ctypedef struct gw_refusal:
        uint64_t lsn
        uint8_t reason
        gw_bool by_broker
        uint32_t bytes
    ctypedef struct gw_window_view:
        gw_cursor cursor
        uint64_t read_lsn, oldest_sent_ns, oldest_lsn, acks, corrupt_lsn
        uint32_t in_flight, span, refused
    gw_window *gw_window_new(gw_log *log, unsigned sink, const gw_window_options *options)
    void gw_window_free(gw_window *window)
    void gw_window_connect(gw_window *window)
    void gw_window_open(gw_window *window, gw_bool resumed, uint32_t receive_max, uint32_t packet_bytes_max)
    gw_bool gw_window_start_over(gw_window *window)
    void gw_window_probe(gw_window *window, uint64_t until_lsn)
    size_t gw_window_fill(gw_window *window, uint64_t now_ns, const uint8_t **bytes)
    gw_mqtt_status gw_window_feed(gw_window *window, const uint8_t *data, size_t bytes, uint64_t now_realtime_ns,
                                  size_t *used, gw_packet *packet)
    const char *gw_window_error(const gw_window *window)
    uint32_t gw_window_refusals(const gw_window *window, gw_refusal *refusals, uint32_t most)
    gw_bool gw_window_dead_letter(gw_window *window, uint64_t lsn)
    gw_window_view gw_window_look(const gw_window *window)


PACKET_IN_BYTES_MAX = GW_MQTT_PACKET_IN_BYTES_MAX
TOPIC_BYTES_MAX = GW_MQTT_TOPIC_BYTES_MAX
TOPIC_INVALID = GW_REASON_TOPIC_INVALID
PACKET_TOO_LARGE = GW_REASON_PACKET_TOO_LARGE
PAYLOAD_INVALID = GW_REASON_PAYLOAD_INVALID

Packet = namedtuple("Packet", "type flags body reason lsn", module=__name__)
Refusal = namedtuple("Refusal", "lsn reason by_broker bytes", module=__name__)
View = namedtuple(
    "View",
    "lsn ordinal published dead_lettered read_lsn in_flight span refused acks oldest_sent_ns oldest_lsn corrupt_lsn",
    module=__name__,
)


class ProtocolError(Exception):
    def __init__(self, message, packets):
        super().__init__(message)
        self.packets = packets


cdef inline uint64_t _now(clockid_t clock) noexcept nogil:
    cdef timespec t
    clock_gettime(clock, &t)
    return <uint64_t>t.tv_sec * 1000000000u + <uint64_t>t.tv_nsec


cdef class Window:
    cdef gw_window *window
    cdef object log  # keeps the mapping alive

    def __cinit__(self, log, unsigned sink, bytes topic_prefix not None, topic_suffix,
                  uint32_t inflight_max=1000, uint32_t batch_bytes=65536):
        cdef gw_window_options options
        cdef bytes suffix = b"" if topic_suffix is None else topic_suffix
        options.topic_prefix = <const uint8_t *><const char *>topic_prefix
        options.topic_prefix_bytes = <uint32_t>len(topic_prefix)
        options.topic_suffix = <const uint8_t *><const char *>suffix
        options.topic_suffix_bytes = <uint32_t>len(suffix)
        options.topic_is_fixed = topic_suffix is None
        options.inflight_max = inflight_max
        options.batch_bytes = batch_bytes
        self.log = log
        self.window = gw_window_new(<gw_log *>PyCapsule_GetPointer(log._capsule(), "gw_log"), sink, &options)
        if self.window is NULL:
            raise ValueError("window: an option is out of its range, or no memory: topic "
                             f"{topic_prefix!r} ... {topic_suffix!r}, inflight_max {inflight_max}, "
                             f"batch_bytes {batch_bytes}")

    def __dealloc__(self):
        gw_window_free(self.window)

    def connect(self):
        gw_window_connect(self.window)

    def open(self, bint resumed, uint32_t receive_maximum=65535, uint32_t packet_bytes_max=0):
        gw_window_open(self.window, resumed, receive_maximum, packet_bytes_max)

    def start_over(self):
        return bool(gw_window_start_over(self.window))

    def probe(self, uint64_t until_lsn):
        gw_window_probe(self.window, until_lsn)

    def fill(self):
        cdef const uint8_t *data
        cdef size_t n = gw_window_fill(self.window, _now(CLOCK_MONOTONIC), &data)
        if n == 0:
            return None
        return PyBytes_FromStringAndSize(<const char *>data, <Py_ssize_t>n)

    def feed(self, const uint8_t[::1] data):
        cdef size_t bytes_left = <size_t>data.shape[0], used
        cdef const uint8_t *at = &data[0] if bytes_left else NULL
        cdef uint64_t now = _now(CLOCK_REALTIME)
        cdef gw_packet packet
        cdef gw_mqtt_status status
        packets = None
        while bytes_left:
            status = gw_window_feed(self.window, at, bytes_left, now, &used, &packet)
            at += used
            bytes_left -= used
            if status == GW_MQTT_OK:
                break
            if packets is None:
                packets = []
            if status == GW_MQTT_PROTOCOL:
                raise ProtocolError(gw_window_error(self.window).decode(), packets)
            packets.append(Packet(
                packet.type, packet.flags,
                PyBytes_FromStringAndSize(<const char *>packet.body, packet.body_bytes),
                packet.reason, packet.lsn if status == GW_MQTT_REFUSED else None))
        return packets

    def refusals(self):
        cdef uint32_t most = gw_window_look(self.window).refused, n, i
        if most == 0:
            return []
        cdef gw_refusal *r = <gw_refusal *>malloc(most * sizeof(gw_refusal))
        if r is NULL:
            raise MemoryError()
        try:
            n = gw_window_refusals(self.window, r, most)
            return [Refusal(r[i].lsn, r[i].reason, bool(r[i].by_broker), r[i].bytes) for i in range(n)]
        finally:
            free(r)

    def dead_letter(self, uint64_t lsn):
        return bool(gw_window_dead_letter(self.window, lsn))

    @property
    def held(self):
        cdef gw_window_view v = gw_window_look(self.window)
        return v.refused != 0 or v.corrupt_lsn != 0

    @property
    def lsn(self):
        return gw_window_look(self.window).cursor.lsn

    @property
    def in_flight(self):
        return gw_window_look(self.window).in_flight

    def look(self):
        cdef gw_window_view v = gw_window_look(self.window)
        return View(v.cursor.lsn, v.cursor.ordinal, v.cursor.published, v.cursor.dead_lettered, v.read_lsn,
                    v.in_flight, v.span, v.refused, v.acks, v.oldest_sent_ns, v.oldest_lsn, v.corrupt_lsn)
