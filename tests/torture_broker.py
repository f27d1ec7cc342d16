"""A broker for long runs: it records before it acknowledges, and it can be told to misbehave.

    python -m tests.torture_broker --port P --file F

Each PUBLISH is a line "seconds topic payload" in F, CLOCK_MONOTONIC, before its PUBACK is sent.
What is for a device `refused-...` is not recorded and gets PUBACK 0x87. Its standard input takes

    lag S       acknowledge S seconds late
    close N     cut the connection at each Nth PUBLISH, without an answer
    calm        neither
"""

import argparse
import asyncio
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.brokers import (
    CONNECT,
    DISCONNECT,
    PINGREQ,
    PINGRESP,
    PUBLISH,
    connack,
    packet,
    puback,
    read_publish,
    split,
)

NOT_AUTHORIZED = 0x87
REFUSED = "telemetry/refused-"


class FickleBroker:
    """One listening socket, one file."""

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.lag_s = 0.0
        self.close_each = 0
        self.publishes = 0

    async def serve(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_server(lambda: _Peer(self), "127.0.0.1", port, reuse_address=True)
        orders = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
        while line := await orders.readline():
            self.obey(line.decode().split())

    def obey(self, words: list[str]) -> None:
        match words:
            case ["lag", seconds]:
                self.lag_s = float(seconds)
            case ["close", count]:
                self.close_each = int(count)
            case ["calm"]:
                self.lag_s, self.close_each = 0.0, 0

    def record(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]


class _Peer(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, broker: FickleBroker) -> None:
        self._broker, self._data = broker, bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        broker = self._broker
        self._data += data
        lines: list[bytes] = []
        answers: list[bytes] = []
        used = 0
        cut = False
        now = b"%.9f" % time.monotonic()
        for first, body, end in split(self._data):
            used = end
            if first >> 4 == PUBLISH:
                broker.publishes += 1
                if broker.close_each and broker.publishes % broker.close_each == 0:
                    cut = True
                    break
                message = read_publish(first, body)
                if message.topic.startswith(REFUSED):
                    answers.append(puback(message.id, NOT_AUTHORIZED))
                    continue
                lines.append(b"%s %s %s\n" % (now, message.topic.encode(), message.payload))
                answers.append(puback(message.id))
            elif first >> 4 == CONNECT:
                answers.append(connack())
            elif first >> 4 == PINGREQ:
                answers.append(packet(PINGRESP << 4, b""))
            elif first >> 4 == DISCONNECT:
                cut = True
        del self._data[:used]
        if lines:
            broker.record(b"".join(lines))
        if cut:
            self.transport.abort()
        elif answers:
            self._answer(b"".join(answers))

    def _answer(self, data: bytes) -> None:
        if self._broker.lag_s:
            asyncio.get_running_loop().call_later(self._broker.lag_s, self.transport.write, data)
        else:
            self.transport.write(data)


def recorded(file: Path) -> Iterator[tuple[float, str, bytes]]:
    """Time, device and payload of each whole line; SIGKILL may have cut the last one."""
    with file.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                seconds, topic, payload = line[:-1].split(b" ", 2)
                yield float(seconds), topic.decode().partition("/")[2], payload


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torture_broker")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--file", type=Path, required=True)
    options = parser.parse_args()
    asyncio.run(FickleBroker(options.file).serve(options.port))


if __name__ == "__main__":
    main()
