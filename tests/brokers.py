"""Brokers for tests: one does what a test dictates, one writes before it acknowledges.

    async with ScriptedBroker(script) as broker: ... # script(peer) plays each connection
    async with RecordingBroker(file) as broker: ...  # broker.port
    async with FaultProxy(broker.port) as proxy: ... # stands before one, and spoils the bytes' way
    python -m tests.brokers record --port P --file F # the same as a process; says its port

The recording broker appends one JSON line a PUBLISH (topic, payload, dup, id, client) to its file
before it sends the PUBACK: what it acknowledged is in the file even if it is killed with SIGKILL
right afterwards.

Both read MQTT 5 with code of their own, written from the standard, so that they are no mirror of
what they test.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import ssl
import struct
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

CONNECT, CONNACK, PUBLISH, PUBACK, PINGREQ, PINGRESP, DISCONNECT = 1, 2, 3, 4, 12, 13, 14


def varint(value: int) -> bytes:
    """A variable byte integer (1.5.5)."""
    out = bytearray()
    while True:
        value, low = divmod(value, 128)
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def packet(first: int, body: bytes) -> bytes:
    """Fixed header and body."""
    return bytes((first,)) + varint(len(body)) + body


def split(data: bytes | bytearray) -> Iterator[tuple[int, bytes, int]]:
    """The whole packets in `data` as (first byte, body, end offset)."""
    at = 0
    while True:
        length = shift = 0
        p = at + 1
        while True:
            if p >= len(data):
                return
            length |= (data[p] & 0x7F) << shift
            shift += 7
            p += 1
            if not data[p - 1] & 0x80:
                break
        if p + length > len(data):
            return
        yield data[at], bytes(data[p : p + length]), p + length
        at = p + length


class Connect(NamedTuple):
    """A CONNECT as read (3.1)."""

    level: int
    clean_start: bool
    keep_alive_s: int
    properties: bytes
    client_id: str
    username: str | None
    password: bytes | None


class Publish(NamedTuple):
    """A PUBLISH as read (3.3)."""

    topic: str
    id: int
    payload: bytes
    dup: bool
    qos: int
    retain: bool
    properties: bytes


def read_connect(body: bytes) -> Connect:
    """Wills are not expected here."""
    assert body[:6] == b"\x00\x04MQTT"
    level, flags, keep_alive_s = struct.unpack_from(">BBH", body, 6)
    at = 10
    properties = b""
    if level == 5:
        length, at = body[at], at + 1
        assert length < 128
        properties, at = body[at : at + length], at + length

    def field() -> bytes:
        nonlocal at
        (n,) = struct.unpack_from(">H", body, at)
        at += 2 + n
        assert at <= len(body)
        return body[at - n : at]

    client_id = field().decode()
    assert not flags & 0x04
    username = field().decode() if flags & 0x80 else None
    password = field() if flags & 0x40 else None
    assert at == len(body), "bytes behind the payload"
    return Connect(level, bool(flags & 2), keep_alive_s, properties, client_id, username, password)


def read_publish(first: int, body: bytes) -> Publish:
    """A PUBLISH of QoS 0 or 1 with fewer than 128 bytes of properties."""
    (n,) = struct.unpack_from(">H", body)
    topic, at = body[2 : 2 + n].decode(), 2 + n
    qos, identifier = first >> 1 & 3, 0
    if qos:
        (identifier,) = struct.unpack_from(">H", body, at)
        at += 2
    length = body[at]
    assert length < 128
    at += 1
    return Publish(
        topic,
        identifier,
        body[at + length :],
        bool(first & 8),
        qos,
        bool(first & 1),
        body[at : at + length],
    )


def connack(reason: int = 0, session_present: bool = False, properties: bytes = b"") -> bytes:
    """CONNACK (3.2); `properties` as on the wire, without their length."""
    return packet(0x20, bytes((session_present, reason)) + varint(len(properties)) + properties)


def puback(identifier: int, reason: int | None = None, reason_string: str = "") -> bytes:
    """PUBACK (3.4) in its shortest form."""
    body = struct.pack(">H", identifier)
    if reason is not None:
        body += bytes((reason,))
    if reason_string:
        text = reason_string.encode()
        properties = b"\x1f" + struct.pack(">H", len(text)) + text
        body += varint(len(properties)) + properties
    return packet(0x40, body)


def disconnect(reason: int) -> bytes:
    """DISCONNECT (3.14)."""
    return packet(0xE0, bytes((reason, 0)))


def receive_maximum(n: int) -> bytes:
    """CONNACK property (3.2.2.3.3)."""
    return b"\x21" + struct.pack(">H", n)


def packet_bytes_max(n: int) -> bytes:
    """CONNACK property Maximum Packet Size (3.2.2.3.6)."""
    return b"\x27" + struct.pack(">I", n)


def server_keep_alive_s(n: int) -> bytes:
    """CONNACK property (3.2.2.3.14)."""
    return b"\x13" + struct.pack(">H", n)


def qos_max(n: int) -> bytes:
    """CONNACK property (3.2.2.3.4)."""
    return b"\x24" + bytes((n,))


class Peer:
    """One accepted connection, as the script sees it."""

    def __init__(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.number = number
        """0 for the first connection of the broker."""
        self._reader, self._writer = reader, writer
        self._data = bytearray()

    async def packet(self) -> tuple[int, bytes]:
        """The next packet as (first byte, body). Raises EOFError."""
        while True:
            for first, body, end in split(self._data):
                del self._data[:end]
                return first, body
            more = await self._reader.read(65536)
            if not more:
                raise EOFError
            self._data += more

    async def connect(self) -> Connect:
        """The CONNECT."""
        first, body = await self.packet()
        assert first == CONNECT << 4
        return read_connect(body)

    async def accept(
        self, session_present: bool = False, properties: bytes = b"", reason: int = 0
    ) -> Connect:
        """Read the CONNECT, send a CONNACK."""
        connect = await self.connect()
        self.send(connack(reason, session_present, properties))
        return connect

    async def publish(self) -> Publish:
        """The next PUBLISH; PINGREQs are answered on the way. Raises EOFError at a DISCONNECT."""
        while True:
            first, body = await self.packet()
            if first == PINGREQ << 4:
                self.send(packet(PINGRESP << 4, b""))
                continue
            if first >> 4 == DISCONNECT:
                raise EOFError
            assert first >> 4 == PUBLISH, f"packet type {first >> 4}"
            return read_publish(first, body)

    async def publishes(self, count: int) -> list[Publish]:
        """The next `count` PUBLISH packets."""
        return [await self.publish() for _ in range(count)]

    async def acknowledge_all(self) -> None:
        """Acknowledge whatever comes until the other side leaves."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                first, body = await self.packet()
                if first == PINGREQ << 4:
                    self.send(packet(PINGRESP << 4, b""))
                elif first >> 4 == PUBLISH:
                    self.send(puback(read_publish(first, body).id))

    async def silence(self, seconds: float) -> bool:
        """True when nothing comes for that long."""
        try:
            first, body = await asyncio.wait_for(self.packet(), seconds)
        except TimeoutError:
            return True
        self._data[:0] = packet(first, body)
        return False

    async def left(self) -> None:
        """Wait until the other side is gone."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                await self.packet()

    def send(self, data: bytes) -> None:
        """Any bytes."""
        self._writer.write(data)

    async def send_bytewise(self, data: bytes) -> None:
        """Each byte in a segment of its own."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(data)):
            self._writer.write(data[i : i + 1])
            await self._writer.drain()
            await asyncio.sleep(0)

    def puback(self, identifier: int, reason: int | None = None, reason_string: str = "") -> None:
        self.send(puback(identifier, reason, reason_string))

    def close(self) -> None:
        """FIN."""
        self._writer.close()

    def reset(self) -> None:
        """RST: what was sent may be lost."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class ScriptedBroker:
    """Plays `script(peer)` for each connection; one that fails there fails the test at the end."""

    def __init__(
        self,
        script: Callable[[Peer], Awaitable[None]],
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._script, self.port, self._tls = script, port, tls
        self.peers: list[Peer] = []
        self.times: list[float] = []
        """Loop time of each connection."""
        self.failure: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "ScriptedBroker":
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, ssl=self._tls
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.failure is not None and kind is None:
            raise self.failure

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = Peer(len(self.peers), reader, writer)
        self.peers.append(peer)
        self.times.append(asyncio.get_running_loop().time())
        try:
            await self._script(peer)
        except (EOFError, ConnectionError, asyncio.CancelledError):
            pass
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            self._tasks.discard(task)
            writer.close()


class FaultProxy:
    """A TCP proxy before a broker. Its faults may be switched at any time, for all connections."""

    def __init__(self, upstream_port: int) -> None:
        self.port, self._upstream_port = 0, upstream_port
        self.black_hole = False
        """What is sent is swallowed, both ways; the connection stays."""
        self.deaf = False
        """Nothing is read any more: the sender's buffers fill."""
        self.segment_bytes = 65536
        """At most so many bytes a segment."""
        self.delay_s = 0.0
        """Before each piece is passed on."""
        self.accepted = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "FaultProxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self) -> None:
        """RST to every client."""
        for writer in self._open():
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def half_close(self) -> None:
        """FIN to every client; what they send is still read."""
        for writer in self._open():
            writer.write_eof()

    def _open(self) -> list[asyncio.StreamWriter]:
        return [writer for writer in self._writers if not writer.transport.is_closing()]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.accepted += 1
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there: asyncio.StreamWriter | None = None
        try:
            back, there = await asyncio.open_connection("127.0.0.1", self._upstream_port)
            ways = {
                asyncio.create_task(self._way(reader, there)),
                asyncio.create_task(self._way(back, writer)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.close()
            if there is not None:
                there.close()

    async def _way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                while self.deaf:
                    await asyncio.sleep(0.01)
                for at in range(0, len(data), self.segment_bytes):
                    if self.black_hole:
                        break
                    if self.delay_s:
                        await asyncio.sleep(self.delay_s)
                    writer.write(data[at : at + self.segment_bytes])
                    await writer.drain()
                    await asyncio.sleep(0)


class RecordingBroker:
    """Acknowledges QoS 1 after the message is in the file. No subscribers."""

    def __init__(self, file: Path | str, port: int = 0, host: str = "127.0.0.1") -> None:
        self.host, self.port = host, port
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        end = os.lseek(self._file, 0, os.SEEK_END)
        if end and os.pread(self._file, 1, end - 1) != b"\n":
            os.write(self._file, b"\n")  # a predecessor was killed within a line
        self.connections: set[_Recorder] = set()

    async def __aenter__(self) -> "RecordingBroker":
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Recorder(self), self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        os.close(self._file)

    def record(self, lines: list[str]) -> None:
        """One write for all of them."""
        data = memoryview("".join(lines).encode())
        while data:
            data = data[os.write(self._file, data) :]


class _Recorder(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, broker: RecordingBroker) -> None:
        self._broker, self._data, self._client = broker, bytearray(), ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        self._broker.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._broker.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        self._data += data
        lines: list[str] = []
        answers: list[bytes] = []
        used = 0
        for first, body, end in split(self._data):
            used = end
            if first >> 4 == PUBLISH:
                message = read_publish(first, body)
                line = {
                    "topic": message.topic,
                    "payload": message.payload.decode(),
                    "dup": message.dup,
                    "id": message.id,
                    "client": self._client,
                }
                lines.append(json.dumps(line) + "\n")
                if message.qos:
                    answers.append(puback(message.id))
            elif first >> 4 == CONNECT:
                self._client = read_connect(body).client_id
                answers.append(connack())
            elif first >> 4 == PINGREQ:
                answers.append(packet(PINGRESP << 4, b""))
            elif first >> 4 == DISCONNECT:
                self.transport.close()
        del self._data[:used]
        if lines:
            self._broker.record(lines)  # in the file before the PUBACK
        if answers:
            self.transport.write(b"".join(answers))


def recorded(file: Path | str) -> list[dict[str, Any]]:
    """The messages in a recording; a line that was cut by SIGKILL is left out."""
    messages = []
    for line in Path(file).read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            if line:
                messages.append(json.loads(line))
    return messages


async def _record(host: str, port: int, file: str) -> None:
    async with RecordingBroker(file, port, host) as broker:
        print(f"listening on {broker.host}:{broker.port}", flush=True)
        await asyncio.Event().wait()


def main(arguments: list[str] | None = None) -> int:
    """`record`: a recording broker until it is killed; its first line of output names the port."""
    parser = argparse.ArgumentParser(prog="python -m tests.brokers")
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="write each PUBLISH to a file before PUBACK")
    record.add_argument("--host", default="127.0.0.1")
    record.add_argument("--port", type=int, default=0)
    record.add_argument("--file", required=True)
    options = parser.parse_args(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_record(options.host, options.port, options.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
