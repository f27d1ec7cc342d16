"""A storm on the front door: is each request answered exactly once, and does no connection starve?

    python -m tests.door_storm --seconds 600 --connections 96 --seed 7 --kill-every 20

Each connection draws from the seed what it does next, and knows the answer that this very request
must get:

    event       a new (device, seq), with ack=enqueue, durable or sink: 202 or 200, its own receipt
    repeat      an event that was answered before: X-Duplicate and the same receipt
    refused     a field that no other request names: 400, and the answer names it
    pipelined   several of these in one write: the answers come in their order
    slow        the body in drops: answered when it is whole
    cut         hangs up in the head, in the body, or with the answer still to come (FIN or RST)

Between two requests nothing may lie in the socket: an answer too many is found by the next one.
Workers are killed now and then; whoever was connected to one starts anew. At the end:

    wrong         answers that are not the one which that request must get      must be 0
    unanswered    waited for longer than PATIENCE_S                             must be 0
    slowest       milliseconds of the slowest answers, and what was asked: those that began or ended
                  near a kill are apart, since a new worker needs a while

Whatever is random comes from the printed seed.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path

from tests.gateway_process import ROOT, GatewayProcess
from tests.mosquitto import Mosquitto

PATIENCE_S = 12.0
KILL_SHADOW_S = 2.0
KINDS = ("event", "repeat", "refused", "pipelined", "slow", "cut")
WEIGHTS = (10, 2, 3, 4, 1, 2)
ACKS = ("enqueue", "enqueue", "enqueue", "durable", "sink")
REMEMBERED = 50


class Wrong(Exception):
    """An answer that this request must not get."""


@dataclasses.dataclass(slots=True)
class Asked:
    """One request, and what its answer must be."""

    data: bytes
    what: str
    status: tuple[int, ...]
    field: str | None = None
    receipt: str | None = None
    key: tuple[str, int] | None = None
    started: float = 0.0


@dataclasses.dataclass
class Result:
    """What was seen."""

    seed: int
    asked: int = 0
    answered: int = 0
    cut: int = 0
    broken: int = 0
    kills: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    took: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    shadowed: int = 0
    slowest: list[tuple[float, str]] = dataclasses.field(default_factory=list)

    def ok(self, slowest_ms: float) -> bool:
        """Nothing wrong, and no answer in the quiet slower than that."""
        return not self.wrong and (not self.slowest or self.slowest[0][0] <= slowest_ms)

    def __str__(self) -> str:
        lines = [
            f"seed={self.seed} asked={self.asked} answered={self.answered} cut={self.cut}"
            f" connections_lost={self.broken} kills={self.kills} wrong={len(self.wrong)}"
            f" near_a_kill={self.shadowed}"
        ]
        for what, took in sorted(self.took.items()):
            took.sort()
            marks = [took[min(len(took) - 1, int(len(took) * q))] for q in (0.5, 0.99, 0.999)]
            shown = " ".join(f"{1000 * mark:.1f}" for mark in marks)
            lines.append(
                f"{what:10} {len(took):8} p50 p99 p99.9 {shown} max {1000 * took[-1]:.1f} ms"
            )
        lines += [f"slowest {ms:.0f} ms: {what}" for ms, what in self.slowest[:5]]
        return "\n".join(lines + self.wrong[:10])


def request(path: str, body: bytes) -> bytes:
    """A POST with a body of JSON."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: storm\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection:
    """One device behind one socket at a time."""

    def __init__(self, storm: "Storm", number: int) -> None:
        self.storm, self.device = storm, f"storm-{number}"
        self.rng = random.Random(storm.result.seed * 10_007 + number)
        self.seq = 0
        self.known: list[tuple[bytes, str]] = []
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    # ---- what is asked ---------------------------------------------------------------------------

    def event(self) -> Asked:
        self.seq += 1
        body = b'{"seq":%d,"metrics":{"n":%d}}' % (self.seq, self.seq)
        ack = self.rng.choice(ACKS)
        status = (200,) if ack == "sink" else (202,)
        path = f"/v1/ingest/{self.device}?ack={ack}"
        return Asked(request(path, body), ack, status, key=(body.decode(), self.seq))

    def repeat(self) -> Asked:
        if not self.known:
            return self.event()
        body, receipt = self.rng.choice(self.known)
        path = f"/v1/ingest/{self.device}"
        return Asked(request(path, body), "repeat", (202,), receipt=receipt)

    def refused(self) -> Asked:
        field = f"x{self.rng.getrandbits(60):x}"
        body = b'{"metrics":{},"%s":1}' % field.encode()
        path = f"/v1/ingest/{self.device}"
        return Asked(request(path, body), "refused", (400,), field=field)

    def one(self) -> Asked:
        return self.rng.choice((self.event, self.event, self.repeat, self.refused))()

    # ---- life ------------------------------------------------------------------------------------

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            try:
                if self.writer is None:
                    await self._connect()
                await self._act()
            except Wrong as wrong:
                self.storm.result.wrong.append(f"{self.device}: {wrong}")
                self._hang_up(rst=True)
            except (OSError, asyncio.IncompleteReadError):
                self.storm.result.broken += 1
                self._hang_up(rst=True)
                await asyncio.sleep(0.02)
        self._hang_up()

    async def _connect(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.storm.port)

    def _hang_up(self, rst: bool = False) -> None:
        writer, self.writer = self.writer, None
        if writer is None:
            return
        if rst:
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    async def _act(self) -> None:
        kind = self.rng.choices(KINDS, WEIGHTS)[0]
        if kind == "cut":
            await self._cut()
        elif kind == "slow":
            asked = self.one()
            head, _, body = asked.data.partition(b"\r\n\r\n")
            await self._send(head + b"\r\n\r\n")
            for at in range(0, len(body), 7):
                await asyncio.sleep(self.rng.random() * 0.05)
                await self._send(body[at : at + 7])
            await self._answers([asked])
        else:
            count = self.rng.randint(2, 5) if kind == "pipelined" else 1
            several = [self.one() if count > 1 else getattr(self, kind)() for _ in range(count)]
            await self._send(b"".join(asked.data for asked in several))
            await self._answers(several)

    async def _cut(self) -> None:
        asked = self.one()
        await self._send(asked.data[: self.rng.randint(1, len(asked.data))])
        if self.rng.random() < 0.5:
            await asyncio.sleep(self.rng.random() * 0.005)
        self._hang_up(rst=self.rng.random() < 0.5)
        self.storm.result.cut += 1

    async def _send(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)
        await self.writer.drain()

    async def _answers(self, several: list[Asked]) -> None:
        started = time.monotonic()
        for asked in several:
            asked.started = started
            self.storm.result.asked += 1
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._answer(asked)
            except TimeoutError:
                raise Wrong(f"{asked.what} is not answered after {PATIENCE_S} s") from None
        if self.rng.random() < 0.1:
            await asyncio.sleep(self.rng.random() * 0.01)
            if self.reader is not None and self.reader._buffer:  # type: ignore[attr-defined]
                raise Wrong(f"bytes that nobody asked for, behind {several[-1].what}")

    async def _answer(self, asked: Asked) -> None:
        assert self.reader is not None
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await self.reader.readexactly(int(headers["content-length"]))
        status, said = int(head[0].split()[1]), json.loads(body)
        receipt = headers.get("x-receipt")
        if status not in asked.status:
            raise Wrong(f"{asked.what}: {status} {said}, not {asked.status}")
        if asked.field is not None and said.get("field") != asked.field:
            raise Wrong(f"the answer to another request: {said}, not the field {asked.field}")
        if asked.receipt is not None and (asked.receipt, "true") != (
            receipt,
            headers.get("x-duplicate"),
        ):
            raise Wrong(f"a repeat of {asked.receipt} got {receipt}, {headers}")
        if asked.key is not None:
            if said.get("ack") != asked.what or headers.get("x-ack") != asked.what:
                raise Wrong(f"{asked.what} was asked for, {said} answered")
            if receipt is None or receipt in self.storm.receipts:
                raise Wrong(f"two events have the receipt {receipt}")
            self.storm.receipts.add(receipt)
            self.known = [*self.known[-REMEMBERED:], (asked.key[0].encode(), receipt)]
        self.storm.took(asked, time.monotonic())


class Storm:
    """All connections, and the kills."""

    def __init__(self, gateway: GatewayProcess, connections: int, seed: int) -> None:
        self.gateway, self.port = gateway, gateway.port
        self.result = Result(seed)
        self.receipts: set[str] = set()
        self._killed_at = [-10.0]
        self._rng = random.Random(seed)
        self._connections = [Connection(self, number) for number in range(connections)]

    def took(self, asked: Asked, now: float) -> None:
        """An answer is as it should be."""
        self.result.answered += 1
        seconds = now - asked.started
        killed = self._killed_at[-1]
        if killed > asked.started - KILL_SHADOW_S:
            self.result.shadowed += 1
            return
        self.result.took.setdefault(asked.what, []).append(seconds)
        slowest = self.result.slowest
        if len(slowest) < 20 or 1000 * seconds > slowest[-1][0]:
            slowest.append((1000 * seconds, f"{asked.what} at {now - self.began:.2f} s"))
            slowest.sort(reverse=True)
            del slowest[20:]

    async def run(self, seconds: float, kill_every_s: float) -> Result:
        """Until the time is over."""
        self.began = time.monotonic()
        until = self.began + seconds
        tasks = [asyncio.create_task(each.run(until)) for each in self._connections]
        while kill_every_s and time.monotonic() < until - kill_every_s:
            await asyncio.sleep(kill_every_s)
            workers = await asyncio.to_thread(lambda: self.gateway.children()["worker"])
            if workers:
                self._killed_at.append(time.monotonic())
                os.kill(self._rng.choice(workers), signal.SIGKILL)
                self.result.kills += 1
        await asyncio.gather(*tasks)
        return self.result


def run(
    folder: Path,
    seconds: float,
    connections: int,
    seed: int,
    kill_every_s: float = 0,
    root: Path = ROOT,
) -> Result:
    """A gateway of two workers into Mosquitto, and the storm. `root`: of another build."""
    settings = {"http.workers": 2, "log.capacity_bytes": 64 << 20}
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(Mosquitto(folder / "mosquitto"))
        url = f"mqtt://127.0.0.1:{broker.port}"
        gateway = GatewayProcess(folder / "gateway", {**settings, "mqtt.url": url})
        gateway.root = root
        stack.enter_context(gateway)
        result = asyncio.run(Storm(gateway, connections, seed).run(seconds, kill_every_s))
        if left := gateway.metric("gateway_unexplained_events"):
            result.wrong.append(f"{left:.0f} events are unexplained")
        if "Traceback" in gateway.output() or "internal error" in gateway.output():
            result.wrong.append("the gateway said: " + gateway.output()[-2000:])
    return result


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.door_storm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--connections", type=int, default=96)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--kill-every", type=float, default=20, metavar="SECONDS")
    parser.add_argument("--slowest-ms", type=float, default=1000)
    chosen = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if chosen.seed is None else chosen.seed
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), chosen.seconds, chosen.connections, seed, chosen.kill_every)
    print(result)
    return 0 if result.ok(chosen.slowest_ms) else 1


if __name__ == "__main__":
    sys.exit(main())
