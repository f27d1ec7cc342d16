"""The few MQTT 5 packets that the measuring clients need, so that no client library stands in
the figures.
"""

import socket
import struct
from collections.abc import Iterator
from typing import Final

CONNACK: Final = 0x20
PUBLISH: Final = 0x30
PUBACK: Final = 0x40
SUBACK: Final = 0x90


def _varint(number: int) -> bytes:
    out = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        out.append(low | (0x80 if number else 0))
        if not number:
            return bytes(out)


def _packet(first: int, rest: bytes) -> bytes:
    return bytes((first,)) + _varint(len(rest)) + rest


def _text(text: str) -> bytes:
    return struct.pack("!H", len(text.encode())) + text.encode()


def connect(client_id: str, session_s: int = 0) -> bytes:
    """CONNECT with no keep-alive, and clean start unless the session is to be kept so long."""
    flags, properties = b"\x02", b"\x00"
    if session_s:
        flags, properties = b"\x00", b"\x05\x11" + struct.pack("!I", session_s)
    return _packet(
        0x10, _text("MQTT") + b"\x05" + flags + b"\x00\x00" + properties + _text(client_id)
    )


def publish(topic: str, payload: bytes, packet_id: int) -> bytes:
    """PUBLISH with QoS 1."""
    return _packet(0x32, _text(topic) + struct.pack("!HB", packet_id, 0) + payload)


def puback(packet_id: int) -> bytes:
    """PUBACK with success."""
    return struct.pack("!BBH", PUBACK, 2, packet_id)


def subscribe(topic: str, qos: int = 0) -> bytes:
    """SUBSCRIBE to one filter."""
    return _packet(0x82, b"\x00\x01\x00" + _text(topic) + bytes((qos,)))


class Parser:
    """Cuts a stream into packets."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The first byte and the body of each whole packet."""
        data = self._rest + data if self._rest else data
        at, end = 0, len(data)
        while True:
            length, shift, here = 0, 0, at + 1
            while here < end:
                byte = data[here]
                here += 1
                length |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            else:
                break
            if here + length > end:
                break
            yield data[at], data[here : here + length]
            at = here + length
        self._rest = data[at:]


def payload(first: int, body: bytes) -> bytes:
    """Of a PUBLISH without properties longer than 127 bytes."""
    at = 2 + int.from_bytes(body[:2], "big") + (2 if first & 0x06 else 0)
    return body[at + 1 + body[at] :]


def packet_id(body: bytes) -> int:
    """Of a PUBLISH with QoS 1."""
    at = 2 + int.from_bytes(body[:2], "big")
    return int.from_bytes(body[at : at + 2], "big")


def dial(port: int, client_id: str) -> tuple[socket.socket, Parser]:
    """Connect and read CONNACK. Raises ConnectionError."""
    connection = socket.create_connection(("127.0.0.1", port), 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(connect(client_id))
    parser = Parser()
    while data := connection.recv(4096):
        for first, body in parser.feed(data):
            if first != CONNACK or body[1]:
                raise ConnectionError(f"no CONNACK with success: {first:#x} {body!r}")
            return connection, parser
    raise ConnectionError("the broker closed the connection")
