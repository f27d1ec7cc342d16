"""The compiled MQTT window: see `_native/gw_mqtt.h`.

Encodes QoS 1 PUBLISH packets from log records, parses PUBACKs in bulk, moves the sink's cursor over the
acknowledged prefix, for one connection or several that share the devices by a hash. Section numbers are those of
MQTT 5.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from gateway._log import Log

PACKET_IN_BYTES_MAX: Final[int]
"""Largest packet taken from a broker; told to it in CONNECT (3.1.2.11.4)."""
TOPIC_BYTES_MAX: Final[int]
TOPIC_INVALID: Final[int]
PACKET_TOO_LARGE: Final[int]
PAYLOAD_INVALID: Final[int]
CONNECTIONS_MAX: Final[int]
PACK_BYTES_MAX: Final[int]

class Packet(NamedTuple):
    """A packet that Python answers, or a PUBACK that refuses (type 4; `lsn` is set then)."""

    type: int
    flags: int
    body: bytes
    """What follows the fixed header."""
    reason: int
    """Reason code of a PUBACK (3.4.2.1); else 0."""
    lsn: int | None

class Refusal(NamedTuple):
    """A record that holds the window."""

    lsn: int
    reason: int
    """The broker's, or TOPIC_INVALID, PACKET_TOO_LARGE, PAYLOAD_INVALID of our own."""
    by_broker: bool
    bytes: int
    """Size of its PUBLISH packet."""
    connection: int
    events: int
    """In its message. More than 1: nobody knows yet which of them is the guilty one; `dead_letter` is False, and
    `start_over` sends these one a message (at once, if the reason is final). `lsn` is the first one's."""

class Pack(NamedTuple):
    """Many events of one topic in one message. Each gets `"device_id":"...","lsn":123,` and, where it has none, `"ts"`
    behind its opening brace; a device_id that it has already is not doubled; line ends between its tokens are
    spaces. The content type (3.3.2.3.9) is application/x-ndjson or application/json."""

    bytes_max: int = 65536
    """Of the payload, before compression; an event that alone is larger goes alone. 1 ... PACK_BYTES_MAX."""
    linger_ns: int = 20_000_000
    """How long a message waits for more events after its first."""
    array: bool = False
    """A JSON array; else NDJSON, each line with its end."""
    compress: Callable[[bytes], bytes] | None = None
    """Deterministic: a message that is sent again on a resumed session is compressed again. The content type ends in
    `+zstd` then. What does not become smaller, or raises (reported as unraisable), goes as it is, and its content
    type says so."""

class View(NamedTuple):
    """The cursor and what is open, of one connection or of all: `in_flight`, `refused`, `acks`, `oldest_...` and
    `read_lsn` are the connection's."""

    lsn: int
    ordinal: int
    published: int
    dead_lettered: int
    read_lsn: int
    """Everything that was read, or that this connection has sent, lies below."""
    in_flight: int
    """PUBLISH packets."""
    span: int
    """Events at or above the cursor that were read, done ones among them."""
    refused: int
    """Messages."""
    acks: int
    oldest_sent_ns: int
    """CLOCK_MONOTONIC; 0 when nothing is in flight."""
    oldest_lsn: int
    """Its record; 0 when nothing is in flight."""
    corrupt_lsn: int
    """The log is corrupt here and nothing is read on; 0 when it is not."""
    oldest_events: int
    """In the oldest message in flight. More than 1: it can be no suspect by itself; `probe` splits it."""

class ProtocolError(Exception):
    """The broker's bytes are malformed or against the protocol. `packets` came before them."""

    packets: list[Packet]
    def __init__(self, message: str, packets: list[Packet]) -> None: ...

class Window:
    """One sink's window over the log, for all its connections. One thread.

    A device belongs to one connection (a hash), which publishes its events in the log's order. A connection that is
    away or held blocks its own devices only, until as much is open as the window can hold. A fill of any connection
    reads the log on for all of them: after new commits, fill each one.
    """

    def __init__(
        self,
        log: Log,
        sink: int,
        topic_prefix: bytes,
        topic_suffix: bytes | None,
        inflight_max: int = 1000,
        batch_bytes: int = 65536,
        *,
        connections: int = 1,
        pack: Pack | None = None,
    ) -> None:
        """Topics are prefix, device id, suffix; with the suffix None the prefix alone (packed: one message holds
        events of several devices then). `inflight_max` holds for a connection. Raises ValueError."""

    def connect(self, connection: int = 0) -> None:
        """A connection begins: the parser is empty, nothing is sent until `open`."""

    def open(
        self,
        resumed: bool,
        receive_maximum: int = 65535,
        packet_bytes_max: int = 0,
        *,
        connection: int = 0,
    ) -> None:
        """CONNACK success. `resumed`: what is unacked goes first with DUP, the same messages; else everything of this
        connection from its first unacknowledged event on is published anew."""

    def close(self, connection: int = 0) -> None:
        """The connection is gone: nothing is sent, PUBACKs are a protocol error. What it had in flight stays its own.
        `look` still tells what was in flight."""

    def start_over(self, connection: int = 0) -> bool:
        """Publish again from this connection's first unacknowledged event.

        A refused message of one event: one packet at a time up to that event. A refused pack: its events go one a
        message, and the rest packed as ever.
        False, and nothing is changed, while something is in flight.
        """

    def probe(self, until_lsn: int, connection: int = 0) -> None:
        """One packet at a time until this connection has passed `until_lsn`.

        When one pack alone is in flight (a connection broke, and `connect` is not called yet), its events go one a
        message from here on; ask for a clean session then, since a session that is resumed wants the pack as it was.
        """

    def fill(
        self, connection: int = 0, packets_max: int = 0xFFFFFFFF, bytes_max: int = 0xFFFFFFFF
    ) -> bytes | None:
        """The packets that may be sent now; all of them must be, or the connection given up.

        It stops at `packets_max` packets, and at the first packet that reaches `bytes_max` (or batch_bytes): the last
        packet may lie above it, so a token bucket may owe. 0: nothing is sent.
        """
    filled: int
    """Packets in the last `fill`."""
    linger: bool
    """True. False: packs wait for nothing (in a drain)."""

    def due_ns(self, connection: int = 0) -> int:
        """CLOCK_MONOTONIC when `fill` has something to do: 1 (at once: something may be sent or read now, as after
        another connection has read on or the cursor has made room), when a pack has lingered, or 0: not before a
        PUBACK, a commit or a call changes something. Limits given to `fill` are not looked at."""

    def feed(
        self, data: bytes | bytearray | memoryview, connection: int = 0
    ) -> list[Packet] | None:
        """Take bytes from the broker. Raises ProtocolError. The `lsn` of a refusal is its message's first event."""

    def refusals(self) -> list[Refusal]:
        """All messages that hold a connection, in the log's order."""

    def dead_letter(self, lsn: int) -> bool:
        """The refused record has a durable dead letter and is marked in the log: the cursor may pass it.

        False: no such refused record, or it is one of several in a pack.
        """

    def set_aside(self, lsn: int) -> bool:
        """The record has a durable dead letter, but the log cannot mark it (`Log.mark_dead` is False): it is taken as
        marked as long as this window lives. False: there are too many such.
        """

    def is_held(self, connection: int = 0) -> bool:
        """Nothing new is sent on this connection: a message was refused, or the log is corrupt."""
    held: bool
    """Any connection is."""
    lsn: int
    """The cursor: the contiguous prefix over all connections."""
    in_flight: int
    """Over all connections."""
    def look(self, connection: int | None = None) -> View:
        """None: of all connections."""

    def connection_of(self, device_id: str) -> int:
        """Which connection publishes this device's events."""
