"""The compiled MQTT window: see `_native/gw_mqtt.h`.

Encodes QoS 1 PUBLISH packets from log records, parses PUBACKs in bulk, moves the sink's cursor over the
acknowledged prefix. Section numbers are those of MQTT 5.
"""

from typing import Final, NamedTuple

from gateway._log import Log

PACKET_IN_BYTES_MAX: Final[int]
"""Largest packet taken from a broker; told to it in CONNECT (3.1.2.11.4)."""
TOPIC_BYTES_MAX: Final[int]
TOPIC_INVALID: Final[int]
PACKET_TOO_LARGE: Final[int]
PAYLOAD_INVALID: Final[int]

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

class View(NamedTuple):
    """The cursor and the open entries."""

    lsn: int
    ordinal: int
    published: int
    dead_lettered: int
    read_lsn: int
    in_flight: int
    span: int
    refused: int
    acks: int
    oldest_sent_ns: int
    """CLOCK_MONOTONIC; 0 when nothing is in flight."""
    oldest_lsn: int
    """Its record; 0 when nothing is in flight."""
    corrupt_lsn: int
    """The log is corrupt here and nothing is read on; 0 when it is not."""

class ProtocolError(Exception):
    """The broker's bytes are malformed or against the protocol. `packets` came before them."""

    packets: list[Packet]
    def __init__(self, message: str, packets: list[Packet]) -> None: ...

class Window:
    """One sink's window over the log, for one connection at a time. One thread."""

    def __init__(
        self,
        log: Log,
        sink: int,
        topic_prefix: bytes,
        topic_suffix: bytes | None,
        inflight_max: int = 1000,
        batch_bytes: int = 65536,
    ) -> None:
        """Topics are prefix, device id, suffix; with the suffix None the prefix alone. Raises ValueError."""

    def connect(self) -> None:
        """A connection begins: the parser is empty, nothing is sent until `open`."""

    def open(self, resumed: bool, receive_maximum: int = 65535, packet_bytes_max: int = 0) -> None:
        """CONNACK success. `resumed`: what is unacked goes first with DUP, else start from the cursor."""

    def start_over(self) -> bool:
        """Read again from the cursor, one packet at a time up to the record that held the window.

        False, and nothing is changed, while something is in flight.
        """

    def probe(self, until_lsn: int) -> None:
        """One packet at a time until the cursor has passed `until_lsn`."""

    def fill(self) -> bytes | None:
        """The packets that may be sent now; all of them must be, or the connection given up."""

    def feed(self, data: bytes | bytearray | memoryview) -> list[Packet] | None:
        """Take bytes from the broker. Raises ProtocolError."""

    def refusals(self) -> list[Refusal]:
        """All records that hold the window, in the log's order."""

    def dead_letter(self, lsn: int) -> bool:
        """The refused record has a durable dead letter and is marked in the log: the cursor may pass it.

        False: no such refused record.
        """
    held: bool
    """Nothing new is sent: a record was refused, or the log is corrupt."""
    lsn: int
    """The cursor."""
    in_flight: int
    def look(self) -> View: ...
