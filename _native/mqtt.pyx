# The MQTT window for Python: see gw_mqtt.h. Methods convert, call, raise; no decision about meaning stands here.
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

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
    ctypedef struct gw_pack_options:
        uint32_t bytes_max
        uint64_t linger_ns
        gw_bool array
        size_t (*compress)(void *context, const uint8_t *data, size_t n, uint8_t *out, size_t room) noexcept
        void *context
    ctypedef struct gw_window_options:
        const uint8_t *topic_prefix
        const uint8_t *topic_suffix
        uint32_t topic_prefix_bytes, topic_suffix_bytes
        gw_bool topic_is_fixed
        uint32_t inflight_max, batch_bytes, connections, records_max
        const gw_pack_options *pack
    ctypedef struct gw_refusal:
        uint64_t lsn
        uint8_t reason
        gw_bool by_broker
        uint32_t bytes, connection, events
    ctypedef struct gw_fill_limits:
        uint32_t packets, bytes
    int GW_ALL_CONNECTIONS
    int GW_MQTT_CONNECTIONS_MAX
    int GW_MQTT_PACK_BYTES_MAX
    ctypedef struct gw_window_view:
        gw_cursor cursor
        uint64_t read_lsn, oldest_sent_ns, oldest_lsn, acks, corrupt_lsn
        uint32_t in_flight, span, refused, oldest_events
    gw_window *gw_window_new(gw_log *log, unsigned sink, const gw_window_options *options)
    void gw_window_free(gw_window *window)
    void gw_window_connect(gw_window *window, unsigned connection)
    void gw_window_open(gw_window *window, unsigned connection, gw_bool resumed, uint32_t receive_max,
                        uint32_t packet_bytes_max)
    gw_bool gw_window_start_over(gw_window *window, unsigned connection)
    void gw_window_probe(gw_window *window, unsigned connection, uint64_t until_lsn)
    uint32_t gw_window_filled(const gw_window *window)
    uint64_t gw_window_due_ns(const gw_window *window, unsigned connection)
    void gw_window_set_linger(gw_window *window, gw_bool linger)
    gw_mqtt_status gw_window_feed(gw_window *window, unsigned connection, const uint8_t *data, size_t bytes,
                                  uint64_t now_realtime_ns, size_t *used, gw_packet *packet)
    const char *gw_window_error(const gw_window *window, unsigned connection)
    uint32_t gw_window_refusals(const gw_window *window, gw_refusal *refusals, uint32_t most)
    gw_bool gw_window_dead_letter(gw_window *window, uint64_t lsn)
    gw_bool gw_window_set_aside(gw_window *window, uint64_t lsn)
    gw_window_view gw_window_look(const gw_window *window, int connection)
    gw_bool gw_window_is_held(const gw_window *window, int connection)
    uint64_t gw_window_lsn(const gw_window *window)
    unsigned gw_window_connection_of(const gw_window *window, const uint8_t *device_id, size_t bytes)


cdef extern from "gw_mqtt.h":  # with the GIL: it calls `compress`
    size_t gw_window_fill(gw_window *window, unsigned connection, uint64_t now_ns, gw_fill_limits limits,
                          const uint8_t **bytes)



PACKET_IN_BYTES_MAX = GW_MQTT_PACKET_IN_BYTES_MAX
TOPIC_BYTES_MAX = GW_MQTT_TOPIC_BYTES_MAX
TOPIC_INVALID = GW_REASON_TOPIC_INVALID
PACKET_TOO_LARGE = GW_REASON_PACKET_TOO_LARGE
PAYLOAD_INVALID = GW_REASON_PAYLOAD_INVALID
CONNECTIONS_MAX = GW_MQTT_CONNECTIONS_MAX
PACK_BYTES_MAX = GW_MQTT_PACK_BYTES_MAX

Packet = namedtuple("Packet", "type flags body reason lsn", module=__name__)
Refusal = namedtuple("Refusal", "lsn reason by_broker bytes connection events", module=__name__)
Pack = namedtuple("Pack", "bytes_max linger_ns array compress", module=__name__,
                  defaults=(65536, 20_000_000, False, None))
View = namedtuple(
    "View",
    "lsn ordinal published dead_lettered read_lsn in_flight span refused acks oldest_sent_ns oldest_lsn corrupt_lsn "
    "oldest_events",
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


cdef size_t _compress(void *context, const uint8_t *data, size_t n, uint8_t *out, size_t room) noexcept:
    """What raises here is reported as unraisable, and the payload goes as it is."""
    cdef bytes result = (<object>context)(PyBytes_FromStringAndSize(<const char *>data, <Py_ssize_t>n))
    n = <size_t>len(result)
    if n == 0 or n > room:
        return 0
    memcpy(out, <const char *>result, n)
    return n


cdef class Window:
    cdef gw_window *window
    cdef unsigned connections
    cdef object log  # keeps the mapping alive
    cdef object compress  # keeps it alive
    cdef bint lingers

    def __cinit__(self, log, unsigned sink, bytes topic_prefix not None, topic_suffix,
                  uint32_t inflight_max=1000, uint32_t batch_bytes=65536, *, uint32_t connections=1, pack=None):
        cdef gw_window_options options
        cdef gw_pack_options packing
        cdef bytes suffix = b"" if topic_suffix is None else topic_suffix
        options.topic_prefix = <const uint8_t *><const char *>topic_prefix
        options.topic_prefix_bytes = <uint32_t>len(topic_prefix)
        options.topic_suffix = <const uint8_t *><const char *>suffix
        options.topic_suffix_bytes = <uint32_t>len(suffix)
        options.topic_is_fixed = topic_suffix is None
        options.inflight_max = inflight_max
        options.batch_bytes = batch_bytes
        options.connections = connections
        options.records_max = 0
        options.pack = NULL
        if pack is not None:
            self.compress = pack.compress
            packing.bytes_max = pack.bytes_max
            packing.linger_ns = pack.linger_ns
            packing.array = pack.array
            packing.compress = NULL
            if self.compress is not None:
                packing.compress = _compress
            packing.context = <void *>self.compress
            options.pack = &packing
        self.log = log
        self.connections = connections
        self.lingers = True
        if connections:
            self.window = gw_window_new(<gw_log *>PyCapsule_GetPointer(log._capsule(), "gw_log"), sink, &options)
        if self.window is NULL:
            raise ValueError("window: an option is out of its range, or no memory: topic "
                             f"{topic_prefix!r} ... {topic_suffix!r}, inflight_max {inflight_max}, "
                             f"batch_bytes {batch_bytes}, connections {connections}, pack {pack}")

    def __dealloc__(self):
        gw_window_free(self.window)

    cdef unsigned _known(self, unsigned connection) except? 0xFFFFFFFF:
        if connection >= self.connections:
            raise IndexError(f"connection {connection} of {self.connections}: they count from 0")
        return connection

    def connect(self, unsigned connection=0):
        gw_window_connect(self.window, self._known(connection))

    def close(self, unsigned connection=0):
        gw_window_connect(self.window, self._known(connection))

    def open(self, bint resumed, uint32_t receive_maximum=65535, uint32_t packet_bytes_max=0, *,
             unsigned connection=0):
        gw_window_open(self.window, self._known(connection), resumed, receive_maximum, packet_bytes_max)

    def start_over(self, unsigned connection=0):
        return bool(gw_window_start_over(self.window, self._known(connection)))

    def probe(self, uint64_t until_lsn, unsigned connection=0):
        gw_window_probe(self.window, self._known(connection), until_lsn)

    def fill(self, unsigned connection=0, uint32_t packets_max=0xFFFFFFFF, uint32_t bytes_max=0xFFFFFFFF):
        cdef const uint8_t *data
        cdef gw_fill_limits limits
        limits.packets = packets_max
        limits.bytes = bytes_max
        cdef size_t n = gw_window_fill(self.window, self._known(connection), _now(CLOCK_MONOTONIC), limits, &data)
        if n == 0:
            return None
        return PyBytes_FromStringAndSize(<const char *>data, <Py_ssize_t>n)

    @property
    def filled(self):
        return gw_window_filled(self.window)

    @property
    def linger(self):
        return bool(self.lingers)

    @linger.setter
    def linger(self, bint value):
        self.lingers = value
        gw_window_set_linger(self.window, value)

    def due_ns(self, unsigned connection=0):
        return gw_window_due_ns(self.window, self._known(connection))

    def feed(self, const uint8_t[::1] data, unsigned connection=0):
        cdef size_t bytes_left = <size_t>data.shape[0], used
        cdef const uint8_t *at = &data[0] if bytes_left else NULL
        cdef uint64_t now = _now(CLOCK_REALTIME)
        cdef gw_packet packet
        cdef gw_mqtt_status status
        packets = None
        self._known(connection)
        while bytes_left:
            status = gw_window_feed(self.window, connection, at, bytes_left, now, &used, &packet)
            at += used
            bytes_left -= used
            if status == GW_MQTT_OK:
                break
            if packets is None:
                packets = []
            if status == GW_MQTT_PROTOCOL:
                raise ProtocolError(gw_window_error(self.window, connection).decode(), packets)
            packets.append(Packet(
                packet.type, packet.flags,
                PyBytes_FromStringAndSize(<const char *>packet.body, packet.body_bytes),
                packet.reason, packet.lsn if status == GW_MQTT_REFUSED else None))
        return packets

    def refusals(self):
        cdef uint32_t most = gw_window_look(self.window, GW_ALL_CONNECTIONS).refused, n, i
        if most == 0:
            return []
        cdef gw_refusal *r = <gw_refusal *>malloc(most * sizeof(gw_refusal))
        if r is NULL:
            raise MemoryError()
        try:
            n = gw_window_refusals(self.window, r, most)
            return [Refusal(r[i].lsn, r[i].reason, bool(r[i].by_broker), r[i].bytes, r[i].connection, r[i].events)
                    for i in range(n)]
        finally:
            free(r)

    def dead_letter(self, uint64_t lsn):
        return bool(gw_window_dead_letter(self.window, lsn))

    def set_aside(self, uint64_t lsn):
        return bool(gw_window_set_aside(self.window, lsn))

    def is_held(self, unsigned connection=0):
        return bool(gw_window_is_held(self.window, <int>self._known(connection)))

    @property
    def held(self):
        return bool(gw_window_is_held(self.window, GW_ALL_CONNECTIONS))

    @property
    def lsn(self):
        return gw_window_lsn(self.window)

    @property
    def in_flight(self):
        return gw_window_look(self.window, GW_ALL_CONNECTIONS).in_flight

    def look(self, connection=None):
        cdef int which = GW_ALL_CONNECTIONS if connection is None else <int>self._known(connection)
        cdef gw_window_view v = gw_window_look(self.window, which)
        return View(v.cursor.lsn, v.cursor.ordinal, v.cursor.published, v.cursor.dead_lettered, v.read_lsn,
                    v.in_flight, v.span, v.refused, v.acks, v.oldest_sent_ns, v.oldest_lsn, v.corrupt_lsn,
                    v.oldest_events)

    def connection_of(self, str device_id):
        cdef bytes name = device_id.encode()
        return gw_window_connection_of(self.window, <const uint8_t *><const char *>name, <size_t>len(name))
