"""Devices that do everything a device may do, and some things that it may not.

Each device sends one event after another and goes on when it is accepted; what it asks, sends and
is told becomes a row of the history. Beside plain events: repeats of what was accepted, one event
on two connections at the same instant, another body for a key, events without a seq, a new boot,
bodies that are malformed, slow, cut short, or whose sender hangs up.

A request costs one call of `Connection.request`, no task and no timer: all clients, the gateway and
the broker share a few cores."""

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from tests.history import CUT, UNKNOWN, Attempt, Event, Receipt, Rows, event_of

PATIENCE_S = 4.0
"""Without an answer the connection is closed then; above the gateway's own deadlines."""
RETRY_S = 0.03
MALFORMED = (
    (b'"}', b'"'),
    (b'"}', b'"}}'),
    (b'"n":', b'"n":,'),
    (b'"n"', b'"N"'),
    (b'"payload"', b'"metrics"'),
    (b'"payload":"', b'"payload":"\xff'),
    (b'"payload"', b'"seq":-1,"payload"'),
)
"""What makes a good body a bad one."""
_HEADER = re.compile(rb"\r\n(x-ack|x-receipt|x-duplicate|content-length|connection): *([^\r]*)")
_CODE = re.compile(rb'"code": *"(\w+)"')
_STATE = re.compile(rb'"state": *"(\w+)"')


class Answer(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.asked_at = 0.0
        self._waiting: asyncio.Future[Answer | None] | None = None
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._answer(None)

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return
        headers = dict(_HEADER.findall(self._data[: end + 2].lower()))
        body_end = end + 4 + int(headers.get(b"content-length", b"0"))
        if len(self._data) < body_end:
            return
        answer = Answer(int(self._data[9:12]), headers, self._data[end + 4 : body_end])
        self._data = self._data[body_end:]
        if headers.get(b"connection") == b"close":
            self.close()
        self._answer(answer)

    def _answer(self, answer: Answer | None) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()
            self.transport = None

    def send(self, data: bytes) -> "asyncio.Future[Answer | None]":
        assert self._waiting is None
        self._waiting = asyncio.get_running_loop().create_future()
        self.asked_at = time.monotonic()
        if self.transport is None:
            self._answer(None)
            return asyncio.ensure_future(_nothing())
        self.transport.write(data)
        return self._waiting


async def _nothing() -> None:
    return None


class Network:
    """The connections of all devices, and the place where rows go."""

    def __init__(self, port: int, write: Callable[[Rows], None]) -> None:
        self.port, self.write = port, write
        self.open: set[Connection] = set()
        self.receipts: dict[str, Event] = {}
        self.accepted = 0

    async def connect(self) -> Connection:
        """An open connection, or one that is closed already."""
        connection = Connection()
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: connection, "127.0.0.1", self.port
            )
        except OSError:
            return connection
        self.open.add(connection)
        return connection

    async def impatient(self) -> None:
        """Cuts connections whose answer does not come. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(0.2)
            limit = time.monotonic() - PATIENCE_S
            for connection in [c for c in self.open if c.transport is None]:
                self.open.discard(connection)
            for connection in self.open:
                if connection._waiting is not None and connection.asked_at < limit:
                    connection.close()

    def close(self) -> None:
        """All connections."""
        for connection in self.open:
            connection.close()
        self.open.clear()

    def keep_receipt(self, receipt: str, event: Event, random: random.Random) -> None:
        """A sample of all receipts, to be asked for at the end."""
        if len(self.receipts) >= 3000:
            if random.random() > 0.02:
                return
            self.receipts.pop(random.choice(list(self.receipts)))
        self.receipts[receipt] = event


def head(device: str, length: int, ack: str | None, by_header: bool = False) -> bytes:
    """Of a POST; `ack` in the query or as X-Ack."""
    query = f"?ack={ack}" if ack and not by_header else ""
    header = f"X-Ack: {ack}\r\n" if ack and by_header else ""
    return (
        f"POST /v1/ingest/{device}{query} HTTP/1.1\r\nHost: gateway\r\n{header}"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


class Device:
    """One device with its connections."""

    def __init__(
        self, name: str, network: Network, acks: list[str], plan: random.Random, odd: float = 0.2
    ) -> None:
        self.name, self.network, self.acks, self.random, self.odd = name, network, acks, plan, odd
        self.boot = self.seq = self.number = 0
        self.stopped = False
        self.recent: deque[tuple[Event, bytes]] = deque(maxlen=150)
        """Accepted with a seq: material for repeats and conflicts."""
        self._connections: list[Connection] = [Connection(), Connection()]

    async def run(self, interval_s: float) -> None:
        """Send until told to stop."""
        due = time.monotonic() + self.random.random() * interval_s
        while not self.stopped:
            await self.step()
            due = max(due + interval_s, time.monotonic() - 1.0)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        for connection in self._connections:
            connection.close()

    async def step(self) -> None:
        """One event, plain or odd."""
        if self.random.random() >= self.odd:
            await self.plain()
        else:
            await self.random.choices(
                [
                    self.repeat, self.twins, self.conflict, self.rivals, self.no_seq,
                    self.malformed, self.slow, self.cut, self.hang_up, self.reboot,
                ],
                [5, 5, 3, 2, 3, 2, 1, 1, 2, 0.5],
            )[0]()  # fmt: skip

    # ---- bodies ------------------------------------------------------------------------------

    def body(self, seq: int | None) -> bytes:
        """Unlike every other of this device."""
        self.number += 1
        pad = "x" * self.random.choice((0, 0, 0, 40, 900))
        key = "" if seq is None else f'"boot":{self.boot},"seq":{seq},'
        ts = '"ts":"2025-09-23T11:18:41Z",' if self.random.random() < 0.1 else ""
        return f'{{{ts}{key}"metrics":{{"n":{self.number}}},"payload":"{pad}"}}'.encode()

    def next(self) -> tuple[Event, bytes]:
        """A new event with a seq."""
        self.seq += 1
        body = self.body(self.seq)
        return event_of(self.name, body), body

    def ack(self) -> str:
        return self.random.choice(self.acks)

    # ---- one request -------------------------------------------------------------------------

    async def connection(self, which: int = 0) -> Connection:
        """Number `which`, open if that can be."""
        if self._connections[which].transport is None:
            self._connections[which] = await self.network.connect()
        return self._connections[which]

    async def post(self, event: Event, body: bytes, ack: str, which: int = 0) -> Attempt:
        """Ask once."""
        connection = await self.connection(which)
        sent = time.monotonic()
        data = head(self.name, len(body), ack, self.number % 7 == 0) + body
        return self.row(event, ack, sent, await connection.send(data), which)

    def row(
        self, event: Event, ack: str, sent: float, answer: Answer | None, which: int = 0
    ) -> Attempt:
        """Write down what was told."""
        client = f"{self.name}/{which}"
        now = time.monotonic()
        if answer is None:
            attempt = Attempt(client, event, ack, sent, now, UNKNOWN)
        elif 200 <= answer.status < 300:
            receipt = answer.headers.get(b"x-receipt", b"").decode() or None
            attempt = Attempt(
                client,
                event,
                ack,
                sent,
                now,
                answer.status,
                answer.headers.get(b"x-ack", b"").decode() or None,
                lsn_of(receipt) if receipt else None,
                receipt,
                answer.headers.get(b"x-duplicate") == b"true",
            )
            self.network.accepted += not attempt.duplicate
            if receipt:
                self.network.keep_receipt(receipt, event, self.random)
        else:
            code = _CODE.search(answer.body)
            attempt = Attempt(
                client, event, ack, sent, now, answer.status,
                code=code[1].decode() if code else None,
            )  # fmt: skip
        self.network.write(attempt)
        return attempt

    async def until_accepted(self, event: Event, body: bytes, ack: str) -> Attempt | None:
        """Repeat while it is unknown or refused for now; None: told to stop."""
        while True:
            attempt = await self.post(event, body, ack)
            if attempt.accepted:
                if event.seq is not None:
                    self.recent.append((event, body))
                if attempt.receipt and self.random.random() < 0.02:
                    await self.ask(attempt.receipt, event)
                return attempt
            if self.stopped or not (attempt.possible or attempt.status in (408, 503)):
                return None
            if attempt.status == 504 and self.random.random() < 0.5:
                ack = "enqueue"
            await asyncio.sleep(RETRY_S * self.random.uniform(0.5, 2.0))

    async def ask(self, receipt: str, event: Event, final: bool = False) -> str | None:
        """What became of it."""
        connection = await self.connection()
        asked = time.monotonic()
        answer = await connection.send(
            f"GET /v1/receipts/{receipt} HTTP/1.1\r\nHost: gateway\r\n\r\n".encode()
        )
        # 404 has a state too: unknown
        state = _STATE.search(answer.body) if answer and answer.status in (200, 404) else None
        if state is None:
            return None
        name = state[1].decode()
        self.network.write(Receipt(event, name, asked, time.monotonic(), final))
        return name

    # ---- what a device does ------------------------------------------------------------------

    async def plain(self) -> None:
        await self.until_accepted(*self.next(), self.ack())

    async def repeat(self) -> None:
        """Something that was accepted, once more; also on the other connection."""
        if self.recent:
            event, body = self.random.choice(self.recent)
            await self.post(event, body, self.ack(), self.random.randrange(2))

    async def twins(self) -> None:
        """One event, at the same instant on two connections."""
        event, body = self.next()
        both = await asyncio.gather(
            self.post(event, body, self.ack(), 0), self.post(event, body, self.ack(), 1)
        )
        if not any(attempt.accepted for attempt in both):
            await self.until_accepted(event, body, self.ack())

    async def conflict(self) -> None:
        """Another body for a key that was accepted."""
        if self.recent:
            event, _ = self.random.choice(self.recent)
            boot, self.boot = self.boot, event.boot or 0
            body = self.body(event.seq)
            self.boot = boot
            await self.post(event_of(self.name, body), body, self.ack(), self.random.randrange(2))

    async def rivals(self) -> None:
        """Two bodies for a new key at the same instant: the key is given up then."""
        event, body = self.next()
        other = self.body(self.seq)
        await asyncio.gather(
            self.post(event, body, self.ack(), 0),
            self.post(event_of(self.name, other), other, self.ack(), 1),
        )

    async def no_seq(self) -> None:
        body = self.body(None)
        await self.until_accepted(event_of(self.name, body), body, self.ack())

    async def malformed(self) -> None:
        good = self.body(None)
        old, new = self.random.choice(MALFORMED)
        body = good.replace(old, new)
        await self.post(event_of(self.name, body), body, self.ack())

    async def slow(self) -> None:
        """The body comes in two pieces; sometimes past the deadline for bodies."""
        event, body = self.next()
        connection = await self.connection()
        ack, sent, at = self.ack(), time.monotonic(), self.random.randrange(1, len(body))
        connection_sends = connection.send(head(self.name, len(body), ack) + body[:at])
        await asyncio.sleep(self.random.choice((0.05, 0.3, 1.5)))
        if connection.transport is not None:
            connection.transport.write(body[at:])
        attempt = self.row(event, ack, sent, await connection_sends)
        if not attempt.accepted:
            connection.close()  # a refusal that came before the second piece: out of step
            await self.until_accepted(event, body, ack)

    async def cut(self) -> None:
        """The connection ends within the body: that is no event."""
        event, body = self.next()
        connection = await self.network.connect()
        if connection.transport is None:
            return
        sent = time.monotonic()
        at = self.random.randrange(len(body))
        connection.send(head(self.name, len(body), None) + body[:at])
        await asyncio.sleep(self.random.choice((0.0, 0.01)))
        connection.close()
        now = time.monotonic()
        self.network.write(Attempt(f"{self.name}/x", event, "enqueue", sent, now, CUT))
        if self.random.random() < 0.5:
            await self.until_accepted(event, body, self.ack())

    async def hang_up(self) -> None:
        """The whole event, but nobody waits for the answer."""
        event, body = self.next()
        connection = await self.network.connect()
        sent = time.monotonic()
        ack = self.ack()
        connection.send(head(self.name, len(body), ack) + body)
        await asyncio.sleep(self.random.choice((0.0, 0.001, 0.01)))
        connection.close()
        self.network.write(Attempt(f"{self.name}/x", event, ack, sent, time.monotonic(), UNKNOWN))
        if self.random.random() < 0.5:
            await self.until_accepted(event, body, self.ack())

    async def reboot(self) -> None:
        """The device's own count starts again."""
        self.boot += 1
        self.seq = 0
        await self.plain()


def lsn_of(receipt: str) -> int | None:
    """ "<identity>-<epoch>-<lsn>-<mac>", hexadecimal."""
    parts = receipt.split("-")
    try:
        return int(parts[2], 16)
    except (IndexError, ValueError):
        return None


async def storm(
    network: Network, name: str, acks: list[str], count: int, plan: random.Random
) -> None:
    """So many devices ask at the same instant, and once more each until it is accepted."""
    devices = [Device(f"{name}-{i}", network, acks, plan) for i in range(count)]
    try:
        async with asyncio.timeout(15):
            await asyncio.gather(*(device.plain() for device in devices))
    except TimeoutError:
        pass
    for device in devices:
        for connection in device._connections:
            connection.close()
