"""The long kill test: what was answered 202 arrives, whatever is killed or stopped meanwhile.

    python -m tests.chaos --rounds 60 --rate 1500 --seed 7    gateway processes killed and stopped
    python -m tests.chaos --broker recording --rounds 20      the broker is killed as well

Paced clients send one event after another, each on behalf of one device, and repeat an event until
it is answered 202. A subscriber of Mosquitto (or a broker that records before it acknowledges) says
what arrived. At the end:

    lost          answered 202 and never arrived                      must be 0
    out_of_order  first arrivals of a device that do not ascend       must be 0
    unexplained   gateway_unexplained_events                          must be 0
    repeated      arrived more than once                              counted: the promise is
                                                                      at least once

Whatever is random comes from the printed seed.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from tests.brokers import recorded
from tests.gateway_process import GatewayProcess, free_port
from tests.mosquitto import Mosquitto

TARGETS = ("worker", "delivery", "supervisor", "everything")


@dataclasses.dataclass
class Report:
    """Counts of one run."""

    seed: int
    rounds: int = 0
    offered: int = 0
    accepted: int = 0
    arrived: int = 0
    repeated: int = 0
    lost: int = 0
    out_of_order: int = 0
    unexplained: int = 0
    refused: int = 0
    unknown: int = 0
    starts: int = 0
    broker_starts: int = 0
    seconds: float = 0.0
    actions: dict[str, int] = dataclasses.field(default_factory=dict)
    lost_events: list[str] = dataclasses.field(default_factory=list)

    def ok(self) -> bool:
        return not (self.lost or self.out_of_order or self.unexplained)

    def __str__(self) -> str:
        head = " ".join(
            f"{name}={value:.1f}" if isinstance(value, float) else f"{name}={value}"
            for name, value in dataclasses.asdict(self).items()
            if name not in ("actions", "lost_events")
        )
        return f"{head}\n{self.actions}" + (f"\nlost: {self.lost_events[:20]}" if self.lost else "")


class Device:
    """One client: a device that sends seq 1, 2, 3 ... and goes on only after a 202."""

    def __init__(self, name: str, port: int, report: Report, shape: random.Random) -> None:
        self.name = name
        self.port = port
        self.report = report
        self.shape = shape
        self.accepted = 0
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, interval_s: float, stop: asyncio.Event) -> None:
        due = time.monotonic()
        while not stop.is_set():
            seq = self.accepted + 1
            pad = "x" * self.shape.choice((0, 0, 0, 40, 900))
            body = b'{"seq":%d,"metrics":{"a":%d},"payload":"%s"}' % (seq, seq, pad.encode())
            while True:
                self.report.offered += 1
                status = await self._post(body)
                if status == 202:
                    break
                if status == 0:
                    self.report.unknown += 1
                else:
                    self.report.refused += 1
                if stop.is_set():
                    return  # not accepted: it may arrive or not
                await asyncio.sleep(0.02)
            self.accepted = seq
            due += interval_s
            pause = due - time.monotonic()
            if pause < -1.0:
                due = time.monotonic()
            await asyncio.sleep(max(0.0, pause))
        self._drop()

    def _drop(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _post(self, body: bytes) -> int:
        """The status, or 0 when it is unknown what became of the request."""
        try:
            async with asyncio.timeout(2.0):
                if self._streams is None:
                    self._streams = await asyncio.open_connection("127.0.0.1", self.port)
                reader, writer = self._streams
                writer.write(
                    b"POST /v1/ingest/%s HTTP/1.1\r\nHost: gateway\r\n"
                    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                    % (self.name.encode(), len(body), body)
                )
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                if length:
                    await reader.readexactly(int(length[1]))
                if re.search(rb"(?i)connection: *close", head):
                    self._drop()
                return int(head[9:12])
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
            self._drop()
            return 0


class Arrivals:
    """What has arrived, in its order."""

    def __init__(self) -> None:
        self.highest: dict[str, int] = {}
        self.seen: dict[str, set[int]] = {}
        self.repeated = 0
        self.out_of_order = 0

    def add(self, events: Iterable[tuple[str, int]]) -> None:
        for device, seq in events:
            seen = self.seen.setdefault(device, set())
            if seq in seen:
                self.repeated += 1
                continue
            seen.add(seq)
            if seq < self.highest.get(device, 0):
                self.out_of_order += 1
            else:
                self.highest[device] = seq

    def missing(self, device: str, highest: int) -> list[int]:
        """Those of 1 ... highest that have not arrived."""
        return sorted(set(range(1, highest + 1)) - self.seen.get(device, set()))


def metric(text: str, name: str) -> float:
    found = re.search(rf"^{name}(?:{{[^}}]*}})? ([-0-9.e+]+)$", text, re.M)
    return float(found[1]) if found else float("nan")


def scrape(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


class Broker:
    """Mosquitto with a subscriber that writes what arrives to a file."""

    kills = False

    def __init__(self, directory: Path) -> None:
        self.file = directory / "arrived.txt"
        self._mosquitto = Mosquitto(
            directory / "mosquitto", "max_queued_messages 0", "max_inflight_messages 1000"
        )
        self.port = self._mosquitto.port
        self._subscriber: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._mosquitto.start()
        with self.file.open("ab") as out:
            self._subscriber = await asyncio.create_subprocess_exec(
                "mosquitto_sub", "-V", "mqttv5", "-q", "1", "-h", "127.0.0.1", "-p", str(self.port),
                "-i", "chaos", "-t", "telemetry/#", "-F", "%t %p", stdout=out,
            )  # fmt: skip
        await asyncio.sleep(0.3)

    async def kill(self) -> None:
        raise NotImplementedError

    def size(self) -> int:
        return self.file.stat().st_size

    def events(self) -> Iterable[tuple[str, int]]:
        line = re.compile(rb'^telemetry/(\S+) .*?"seq":(\d+),', re.M)
        return ((m[1].decode(), int(m[2])) for m in line.finditer(self.file.read_bytes()))

    async def stop(self) -> None:
        if self._subscriber is not None and self._subscriber.returncode is None:
            self._subscriber.terminate()  # it writes out what it holds
            await self._subscriber.wait()
        self._mosquitto.kill(signal.SIGTERM)


class RecordingBroker:
    """Writes each PUBLISH to a file before it acknowledges it, and may be killed."""

    kills = True

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: list[Path] = []  # one a life: SIGKILL may cut the last line of each
        self.port = free_port()
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._files.append(self._directory / f"recorded-{len(self._files)}.txt")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.brokers", "record", "--port", str(self.port),
            "--file", str(self._files[-1]), stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip

    def size(self) -> int:
        return sum(file.stat().st_size for file in self._files if file.exists())

    def events(self) -> Iterable[tuple[str, int]]:
        for file in self._files:
            for message in recorded(file) if file.exists() else ():
                yield message["topic"].partition("/")[2], json.loads(message["payload"])["seq"]

    async def kill(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        await self.kill()


class Chaos:
    """One run."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self.args = args
        self.random = random.Random(args.seed)
        self.report = Report(args.seed)
        self.broker = (
            RecordingBroker(directory) if args.broker == "recording" else Broker(directory)
        )
        self.gateway = GatewayProcess(
            directory,
            {
                "mqtt.url": f"mqtt://127.0.0.1:{self.broker.port}",
                "http.workers": args.workers,
                "log.capacity_bytes": args.capacity,
                "mqtt.backoff_max_ms": 500,
                "log.level": "warning",
            },
        )
        self._running = True

    async def run(self) -> Report:
        began = time.monotonic()
        report, args = self.report, self.args
        await self.broker.start()
        report.broker_starts = 1
        await asyncio.to_thread(self.gateway.start)
        report.starts = 1
        keeper = asyncio.create_task(self._keep_alive())
        stop = asyncio.Event()
        devices = [
            Device(f"device-{i}", self.gateway.port, report, random.Random(args.seed * 1000 + i))
            for i in range(args.devices)
        ]
        clients = [asyncio.create_task(d.run(args.devices / args.rate, stop)) for d in devices]
        try:
            while report.rounds < args.rounds or sum(d.accepted for d in devices) < args.accepted:
                await self._round()
                report.rounds += 1
                if report.rounds % 10 == 0 and args.verbose:
                    print(
                        f"round {report.rounds}: accepted {sum(d.accepted for d in devices)}",
                        flush=True,
                    )
            await asyncio.sleep(2.0)
            stop.set()
            await asyncio.gather(*clients)
            await self._drained()
            report.unexplained = int(
                metric(scrape(self.gateway.port), "gateway_unexplained_events")
            )
        finally:
            self._running = False
            keeper.cancel()
            for client in clients:
                client.cancel()
            await asyncio.to_thread(self.gateway.stop)
            await self.broker.stop()
        report.accepted = sum(d.accepted for d in devices)
        arrivals = Arrivals()
        arrivals.add(self.broker.events())
        report.arrived = sum(len(seen) for seen in arrivals.seen.values())
        report.repeated, report.out_of_order = arrivals.repeated, arrivals.out_of_order
        for device in devices:
            missing = arrivals.missing(device.name, device.accepted)
            report.lost += len(missing)
            report.lost_events += [f"{device.name}/{seq}" for seq in missing[:5]]
        report.seconds = time.monotonic() - began
        return report

    async def _keep_alive(self) -> None:
        """What systemd does: a gateway that is gone is started again."""
        while self._running:
            if not self.gateway.alive():
                self.report.starts += 1
                self.gateway.start(ready=False)
            await asyncio.sleep(0.05)

    async def _round(self) -> None:
        targets = [*TARGETS, "broker"] if self.broker.kills else list(TARGETS)
        target = self.random.choice(targets)
        action = "kill" if target == "broker" else self.random.choice(("kill", "stop"))
        pause_s = self.random.uniform(0.1, 5.0) if action == "stop" else 0.0
        settle_s = self.random.uniform(0.2, 1.5)
        name = f"{action} {target}"
        self.report.actions[name] = self.report.actions.get(name, 0) + 1
        if target == "broker":
            await self.broker.kill()
            await asyncio.sleep(self.random.uniform(0.0, 1.0))
            await self.broker.start()
            self.report.broker_starts += 1
        else:
            pids = self._pids(target)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
            if action == "stop":
                await asyncio.sleep(pause_s)
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(settle_s)

    def _pids(self, target: str) -> list[int]:
        if not self.gateway.alive():
            return []
        if target == "supervisor":
            return [self.gateway.pid]
        children = self.gateway.children()
        if target == "everything":
            return [self.gateway.pid, *(pid for pids in children.values() for pid in pids)]
        pids = children.get(target, [])
        return [self.random.choice(pids)] if pids else []

    async def _drained(self) -> None:
        """Wait until nothing is left to publish and the subscriber has had time to write."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            text = await asyncio.to_thread(scrape, self.gateway.port)
            if metric(text, "gateway_events_accepted_total") == metric(
                text, "gateway_events_published_total"
            ):
                break
            await asyncio.sleep(0.2)
        size = -1
        while size != self.broker.size():
            size = self.broker.size()
            await asyncio.sleep(1.0)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=60)
    p.add_argument(
        "--accepted", type=int, default=0, help="go on until so many events were accepted"
    )
    p.add_argument("--rate", type=float, default=1500.0, help="events a second offered")
    p.add_argument("--devices", type=int, default=16)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--capacity", type=int, default=64 << 20)
    p.add_argument("--broker", choices=("mosquitto", "recording"), default="mosquitto")
    p.add_argument("--seed", type=int, default=None)
    p.add_argument("--verbose", action="store_true")
    return p


def run(*arguments: str) -> Report:
    args = parser().parse_args(arguments)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gateway-chaos-") as directory:
        return asyncio.run(Chaos(args, Path(directory)).run())


if __name__ == "__main__":
    result = run(*sys.argv[1:])
    print(result)
    sys.exit(0 if result.ok() else 1)
