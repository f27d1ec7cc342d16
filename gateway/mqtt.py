"""MQTT 5 in words: control packets, reason codes, topics, TLS, and the state of the link.

Packets are packed and unpacked with mqttools' codec. Three of its gaps are closed here: user
properties (pairs of strings) are taken out before it reads them, unknown reason codes are an error
instead of a crash, and a CONNACK in the form of MQTT 3.1.1 is told from a malformed one. PUBLISH
and PUBACK are compiled code (`gateway._mqtt`).

Section numbers are those of MQTT 5.0. Times carry their unit in the name.
"""

import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from mqttools.common import (
    ConnectReasonCode,
    ControlPacketType,
    MalformedPacketError,
    PayloadReader,
    PropertyIds,
    pack_connect,
    pack_disconnect,
    pack_fixed_header,
    pack_pingreq,
    pack_variable_integer,
    unpack_connack,
    unpack_property,
    unpack_string,
    unpack_variable_integer,
)

from gateway import _mqtt, process

CONNACK: Final = int(ControlPacketType.CONNACK)
PUBLISH: Final = int(ControlPacketType.PUBLISH)
PUBACK: Final = int(ControlPacketType.PUBACK)
PINGRESP: Final = int(ControlPacketType.PINGRESP)
DISCONNECT: Final = int(ControlPacketType.DISCONNECT)
AUTH: Final = int(ControlPacketType.AUTH)

PINGREQ_PACKET: Final[bytes] = pack_pingreq()

REASONS: Final[Mapping[int, str]] = {
    0x00: "success",
    0x01: "unacceptable protocol version (MQTT 3.1.1)",
    0x02: "identifier rejected (MQTT 3.1.1)",
    0x03: "server unavailable (MQTT 3.1.1)",
    0x04: "bad user name or password (MQTT 3.1.1)",
    0x05: "not authorized (MQTT 3.1.1)",
    0x10: "no matching subscribers",
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "implementation specific error",
    0x84: "unsupported protocol version",
    0x85: "client identifier not valid",
    0x86: "bad user name or password",
    0x87: "not authorized",
    0x88: "server unavailable",
    0x89: "server busy",
    0x8A: "banned",
    0x8B: "server shutting down",
    0x8C: "bad authentication method",
    0x8D: "keep alive timeout",
    0x8E: "session taken over",
    0x8F: "topic filter invalid",
    0x90: "topic name invalid",
    0x91: "packet identifier in use",
    0x92: "packet identifier not found",
    0x93: "receive maximum exceeded",
    0x94: "topic alias invalid",
    0x95: "packet too large",
    0x96: "message rate too high",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x99: "payload format invalid",
    0x9A: "retain not supported",
    0x9B: "QoS not supported",
    0x9C: "use another server",
    0x9D: "server moved",
    0x9E: "shared subscriptions not supported",
    0x9F: "connection rate exceeded",
    0xA0: "maximum connect time",
    0xA1: "subscription identifiers not supported",
    0xA2: "wildcard subscriptions not supported",
}
"""Reason codes (2.4), and the CONNACK return codes of 3.1.1 below 0x10."""


class CodecError(Exception):
    """A control packet from the other side is malformed or against the protocol."""


def reason_name(code: int) -> str:
    """`0x87 not authorized`."""
    return f"0x{code:02X} {REASONS.get(code, 'unknown reason')}"


def printable(text: str, chars_max: int = 200) -> str:
    """Text from outside, fit for a log line: no control characters, bounded."""
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[: chars_max + 1])
    return shown if len(shown) <= chars_max else shown[:chars_max] + "..."


# ---- settings ---------------------------------------------------------------------------------


class Broker(Protocol):
    """Where the broker is: `gateway.settings.Broker`."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def tls(self) -> bool: ...
    @property
    def embedded(self) -> bool: ...


class MqttSettings(Protocol):
    """What the publisher reads of the configuration: `gateway.settings.MqttConfig`."""

    @property
    def broker(self) -> Broker | None: ...
    @property
    def topic(self) -> str: ...
    @property
    def client_id(self) -> str | None: ...
    @property
    def username(self) -> str | None: ...
    @property
    def ca_file(self) -> str | None: ...
    @property
    def cert_file(self) -> str | None: ...
    @property
    def key_file(self) -> str | None: ...
    @property
    def alpn(self) -> str | None: ...
    @property
    def server_name(self) -> str | None: ...
    @property
    def inflight_max(self) -> int: ...
    @property
    def connections(self) -> int: ...
    @property
    def publishes_per_second_max(self) -> int: ...
    @property
    def bytes_per_second_max(self) -> int: ...
    @property
    def mode(self) -> str: ...
    @property
    def pack_bytes_max(self) -> int: ...
    @property
    def pack_linger_ms(self) -> int: ...
    @property
    def pack_format(self) -> str: ...
    @property
    def pack_compression(self) -> str: ...
    @property
    def keep_alive_s(self) -> int: ...
    @property
    def poison_attempts(self) -> int: ...
    @property
    def puback_timeout_ms(self) -> int: ...
    @property
    def connect_timeout_ms(self) -> int: ...
    @property
    def backoff_base_ms(self) -> int: ...
    @property
    def backoff_max_ms(self) -> int: ...
    def read_password(self) -> bytes | None: ...


def broker_name(broker: Broker) -> str:
    """`mqtts://host:port`, for messages."""
    host = f"[{broker.host}]" if ":" in broker.host else broker.host
    return f"mqtt{'s' if broker.tls else ''}://{host}:{broker.port}"


def tls_context(settings: MqttSettings) -> ssl.SSLContext:
    """With verification, always. Raises ValueError naming the setting that cannot be used."""
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"mqtt.ca_file: {settings.ca_file}: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.cert_file is not None:
        try:
            # An encrypted key must not stop at a prompt: the empty password is refused instead.
            context.load_cert_chain(settings.cert_file, settings.key_file, password="")
        except (OSError, ssl.SSLError) as error:
            raise ValueError(
                f"mqtt.cert_file, mqtt.key_file: {settings.cert_file}, {settings.key_file}: {error}"
            ) from None
    if settings.alpn is not None:
        try:
            context.set_alpn_protocols([settings.alpn])
        except (OSError, ValueError) as error:
            raise ValueError(f"mqtt.alpn: {error}") from None
    return context


# ---- properties -------------------------------------------------------------------------------


def strip_user_properties(body: bytes, at: int) -> bytes:
    """`body` without the user properties (2.2.2) of the property section at offset `at`.

    mqttools reads a user property as one string; it is two. Also checks that the section ends where
    it says, and that no other property stands twice. Raises CodecError.
    """
    reader = PayloadReader(body)
    try:
        reader.seek(at)
        length = unpack_variable_integer(reader)
        start = reader.tell()
        end = start + length
        if end > len(body):
            raise CodecError("properties run past the end of the packet (2.2.2)")
        kept = b""
        seen: set[int] = set()
        while (here := reader.tell()) < end:
            identifier = unpack_variable_integer(reader)
            if identifier == PropertyIds.USER_PROPERTY:
                unpack_string(reader)
                unpack_string(reader)
                continue
            if identifier in seen:
                raise CodecError(f"property 0x{identifier:02X} stands twice (2.2.2.2)")
            seen.add(identifier)
            unpack_property(PropertyIds(identifier), reader)
            kept += body[here : reader.tell()]
        if reader.tell() != end:
            raise CodecError("a property runs past the end of its section (2.2.2)")
    except (MalformedPacketError, ValueError, KeyError) as error:
        raise CodecError(f"malformed properties (2.2.2): {error}") from None
    return body[:at] + bytes(pack_variable_integer(len(kept))) + kept + body[end:]


# ---- packets ----------------------------------------------------------------------------------


def connect_packet(
    client_id: str,
    *,
    clean_start: bool,
    keep_alive_s: int,
    session_expiry_s: int,
    username: str | None,
    password: bytes | None,
) -> bytes:
    """CONNECT (3.1)."""
    # mqttools counts characters where it must count bytes: it is given one character a byte.
    packed = pack_connect(
        _Utf8(client_id),
        clean_start,
        None,
        None,
        False,
        0,
        username,
        password,
        keep_alive_s,
        {
            PropertyIds.SESSION_EXPIRY_INTERVAL: session_expiry_s,
            PropertyIds.MAXIMUM_PACKET_SIZE: _mqtt.PACKET_IN_BYTES_MAX,
        },
    )
    return bytes(packed)


class _Utf8(str):
    """A string whose length is that of its UTF-8 encoding."""

    def __len__(self) -> int:
        return len(self.encode())


@dataclass(frozen=True, slots=True)
class Connack:
    """CONNACK (3.2), with MQTT's defaults where the broker said nothing."""

    reason: int
    session_present: bool = False
    receive_maximum: int = 65535
    packet_bytes_max: int = 0
    """0: no limit."""
    qos_max: int = 2
    keep_alive_s: int | None = None
    """The server's own keep-alive, which replaces ours; None: ours."""
    client_id: str | None = None
    """Assigned by the broker."""
    session_expiry_s: int | None = None
    reason_string: str = ""
    server_reference: str = ""
    mqtt_311: bool = False
    """The answer has the form of MQTT 3.1.1: two bytes, no properties."""

    def __str__(self) -> str:
        text = reason_name(self.reason)
        if self.reason_string:
            text += f" ({printable(self.reason_string)})"
        if self.server_reference:
            text += f" (server reference: {printable(self.server_reference)})"
        return text


def parse_connack(flags: int, body: bytes) -> Connack:
    """Raises CodecError."""
    if flags or len(body) < 2 or body[0] > 1:
        raise CodecError("malformed CONNACK (3.2)")
    session_present, reason = bool(body[0]), body[1]
    if len(body) == 2:
        return Connack(reason, session_present, mqtt_311=True)
    if reason and reason not in list(ConnectReasonCode):
        raise CodecError(f"CONNACK with an unknown reason code 0x{reason:02X} (3.2.2.2)")
    if reason and session_present:
        raise CodecError("CONNACK refuses and has session present (3.2.2.1.1)")
    try:
        _, _, properties = unpack_connack(PayloadReader(strip_user_properties(body, 2)))
    except MalformedPacketError as error:
        raise CodecError(f"malformed CONNACK (3.2): {error}") from None
    receive_maximum = properties.get(PropertyIds.RECEIVE_MAXIMUM, 65535)
    packet_bytes_max = properties.get(PropertyIds.MAXIMUM_PACKET_SIZE)
    qos_max = properties.get(PropertyIds.MAXIMUM_QOS, 2)
    if receive_maximum == 0:
        raise CodecError("CONNACK with Receive Maximum 0 (3.2.2.3.3)")
    if packet_bytes_max == 0:
        raise CodecError("CONNACK with Maximum Packet Size 0 (3.2.2.3.6)")
    if PropertyIds.MAXIMUM_QOS in properties and qos_max > 1:
        raise CodecError(f"CONNACK with Maximum QoS {qos_max} (3.2.2.3.4)")
    return Connack(
        reason,
        session_present,
        receive_maximum,
        packet_bytes_max or 0,
        qos_max,
        properties.get(PropertyIds.SERVER_KEEP_ALIVE),
        properties.get(PropertyIds.ASSIGNED_CLIENT_IDENTIFIER),
        properties.get(PropertyIds.SESSION_EXPIRY_INTERVAL),
        properties.get(PropertyIds.REASON_STRING, ""),
        properties.get(PropertyIds.SERVER_REFERENCE, ""),
    )


class Goodbye(NamedTuple):
    """DISCONNECT from the broker (3.14)."""

    reason: int
    reason_string: str
    server_reference: str

    def __str__(self) -> str:
        return str(
            Connack(
                self.reason,
                reason_string=self.reason_string,
                server_reference=self.server_reference,
            )
        )


def parse_disconnect(flags: int, body: bytes) -> Goodbye:
    """Raises CodecError."""
    if flags:
        raise CodecError("DISCONNECT with reserved flags set (3.14.1)")
    reason = body[0] if body else 0
    properties = _properties(body, 1) if len(body) > 1 else {}
    return Goodbye(
        reason,
        properties.get(PropertyIds.REASON_STRING, ""),
        properties.get(PropertyIds.SERVER_REFERENCE, ""),
    )


def puback_reason_string(body: bytes) -> str:
    """The broker's words in a PUBACK (3.4.2.2), or "". Its body was checked by compiled code."""
    return str(_properties(body, 3).get(PropertyIds.REASON_STRING, "")) if len(body) > 3 else ""


def property_ids(body: bytes, at: int) -> list[int]:
    """The identifiers in a property section at offset `at`, user properties left out."""
    return list(_properties(body, at))


def _properties(body: bytes, at: int) -> dict[int, Any]:
    reader = PayloadReader(strip_user_properties(body, at))
    reader.seek(at)
    end = unpack_variable_integer(reader) + reader.tell()
    found: dict[int, Any] = {}
    while reader.tell() < end:
        identifier = reader.read(1)[0]
        found[identifier] = unpack_property(PropertyIds(identifier), reader)
    return found


def disconnect_packet(reason: int = 0) -> bytes:
    """DISCONNECT (3.14)."""
    return bytes(pack_disconnect(reason))


def connack_311_packet(return_code: int) -> bytes:
    """CONNACK of MQTT 3.1.1 (its section 3.2): what an old client understands."""
    return bytes(pack_fixed_header(ControlPacketType.CONNACK, 0, 2)) + bytes((0, return_code))


# ---- the state of the link --------------------------------------------------------------------


WORSE: Final = (
    *("closed", "connected", "draining", "starting", "connecting", "waiting", "held"),
    *("dead_letters_full", "taken_over", "refused"),
)
"""States of a connection, the one that says most of a pool last."""


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """What the publisher is doing, for `/healthz` and other processes."""

    state: str = "starting"
    """starting, connecting, connected, waiting (to connect again), refused (the broker or TLS says
    no), taken_over, held (an event was refused for now, or the disk takes no dead letters),
    dead_letters_full, draining, closed."""
    broker: str = ""
    last_error: str = ""
    """The last failure and the next step; kept after it is over."""
    last_error_unix_s: float = 0.0
    since_unix_s: float = 0.0
    """When `state` began."""
    client_id: str = ""
    connections: "tuple[LinkStatus, ...]" = ()
    """Of a pool: each of its connections. `state` and `last_error` are then those of the one that
    is worst off."""

    @property
    def ok(self) -> bool:
        """Events flow."""
        return self.state in ("connected", "draining")

    def to(self, state: str, error: str | None = None) -> "LinkStatus":
        """The next status; unchanged parts stay."""
        now = time.time()
        status = self
        if state != self.state:
            status = replace(status, state=state, since_unix_s=now)
        if error is not None:
            status = replace(status, last_error=error, last_error_unix_s=now)
        return status

    def pooled(self, parts: "tuple[LinkStatus, ...]") -> "LinkStatus":
        """The next status of a pool whose connections have `parts` now."""
        worst = max(parts, key=lambda part: WORSE.index(part.state))
        said = worst if worst.last_error else max(parts, key=lambda part: part.last_error_unix_s)
        return replace(
            self.to(worst.state),
            last_error=said.last_error,
            last_error_unix_s=said.last_error_unix_s,
            connections=parts,
        )

    def write(self, path: Path) -> None:
        """Replace what stands in `path`. Raises OSError."""
        process.write_status(path, json.dumps(asdict(self)).encode() + b"\n")

    @staticmethod
    def read(path: Path) -> "LinkStatus":
        """The status in `path`; the default one while there is none that can be read."""
        try:
            status = json.loads(path.read_text())
            parts = (LinkStatus(**part) for part in status.pop("connections", ()))
            return LinkStatus(**status, connections=tuple(parts))
        except (OSError, ValueError, TypeError, AttributeError):
            return LinkStatus()
