"""The long random run: clients, workers, delivery, supervisor and broker are all broken meanwhile.

    python -m tests.torture --seconds 600 --seed 7                 half of it before each broker
    python -m tests.torture --seconds 600 --seed 7 --broker mosquitto
    python -m tests.torture --check build/torture/7.ndjson         judge a kept history again

Devices (tests/torture_clients.py) ask for every acknowledgement, repeat, conflict, hang up. A plan
drawn from the seed kills, stops (SIGSTOP) and slows (SIGSTOP and SIGCONT in turn) one process after
another, restarts workers in turn (SIGHUP), drains and starts again (SIGTERM), lets the broker lag,
cut connections and refuse some topics, and lets a crowd ask at once. The ring is small: it laps
many times. Everything is written down, and tests/history.py judges it; its counts are printed. A
violation exits 1 and keeps the history, whose path is printed.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import uvloop

from tests import history
from tests.gateway_process import ROOT, GatewayProcess, free_port, wait_for
from tests.history import Arrival, DeadLetter, End, Nemesis, Rows, Setup, Sync, Verdict, event_of
from tests.mosquitto import Mosquitto
from tests.torture_broker import recorded
from tests.torture_clients import Device, Network, storm

KEPT = ROOT / "build" / "torture"
PROCESSES = ("worker", "delivery", "supervisor", "everything")
DRAINED_WITHIN_S = 60.0
CROWDS_MAX = 200
"""Names for so many storms are known to the broker."""


# ---- brokers ---------------------------------------------------------------------------------


class Broker(Protocol):
    """The other end, and what it received."""

    name: str
    port: int
    faults: tuple[str, ...]
    """What it can be told beside signals."""
    settle_s: float
    """How long after the last PUBACK something may still arrive."""

    async def start(self) -> None: ...
    async def end(self, number: int) -> None: ...
    async def stop(self) -> None: ...
    def pid(self) -> int: ...
    def tell(self, order: str) -> None: ...
    def arrivals(self) -> Iterable[tuple[float, str, bytes]]: ...
    def size(self) -> int: ...


class Recording:
    """tests/torture_broker.py as a process."""

    name = "recording"
    faults = ("lag", "close")
    settle_s = 0.0

    def __init__(self, directory: Path, allowed: list[str]) -> None:
        self._directory, self.port = directory, free_port()
        self._files: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self._files.append(self._directory / f"recorded-{len(self._files)}.txt")
        self._files[-1].touch()
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "tests.torture_broker",
                "--port", str(self.port), "--file", str(self._files[-1]),
            ],
            stdin=subprocess.PIPE,
            cwd=ROOT,
        )  # fmt: skip

    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def end(self, number: int) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.send_signal(number)
        self._process.send_signal(signal.SIGCONT)
        await asyncio.to_thread(self._process.wait)
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    async def stop(self) -> None:
        if self._process is not None:
            await self.end(signal.SIGKILL)
            self._process = None

    def tell(self, order: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(order.encode() + b"\n")
            self._process.stdin.flush()

    def arrivals(self) -> Iterator[tuple[float, str, bytes]]:
        for file in self._files:
            yield from recorded(file)

    def size(self) -> int:
        return sum(file.stat().st_size for file in self._files)


class Subscribed:
    """Mosquitto, and a subscriber whose session outlives it.

    Its database is written once the subscriber is there, so that also after SIGKILL messages wait
    for it; those that Mosquitto held when it was killed are forgotten. SIGTERM keeps all."""

    name = "mosquitto"
    faults = ()
    settle_s = 0.5

    def __init__(self, directory: Path, allowed: list[str]) -> None:
        folder = directory / "mosquitto"
        folder.mkdir()
        rules = folder / "rules"
        # A pattern, since a session that was read from the database has no user's rules yet.
        reads = "pattern read telemetry/#\n"
        rules.write_text("".join(f"topic write telemetry/{name}\n" for name in allowed) + reads)
        rules.chmod(0o600)
        self._file = directory / "arrived.txt"
        self._mosquitto = Mosquitto(
            # not 0: then 2.0.11 closes the connection behind each publish that it refuses
            folder, "max_queued_messages 1000000", "max_inflight_messages 1000",
            f"acl_file {rules}", "persistence true", f"persistence_location {folder}/",
        )  # fmt: skip
        self._database = folder / "mosquitto.db"
        self.port = self._mosquitto.port
        self._subscriber: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        await asyncio.to_thread(self._mosquitto.start)
        if self._subscriber is not None:
            return
        with self._file.open("ab") as out:
            self._subscriber = subprocess.Popen(
                [
                    "mosquitto_sub", "-V", "mqttv5", "-q", "1", "-p", str(self.port), "-c",
                    "-x", "86400", "-i", "subscriber", "-t", "telemetry/#", "-F", "%U %t %p",
                ],
                stdout=out,
            )  # fmt: skip
        await asyncio.sleep(0.5)
        self._mosquitto.send_signal(signal.SIGUSR1)
        await asyncio.to_thread(wait_for, self._database.exists)

    def pid(self) -> int:
        return self._mosquitto.pid

    async def end(self, number: int) -> None:
        self._mosquitto.send_signal(signal.SIGCONT)
        await asyncio.to_thread(self._mosquitto.kill, number)

    async def stop(self) -> None:
        if self._subscriber is not None:
            self._subscriber.terminate()  # it writes out what it holds
            await asyncio.to_thread(self._subscriber.wait)
            self._subscriber = None
            await self.end(signal.SIGTERM)

    def tell(self, order: str) -> None:
        raise NotImplementedError

    def arrivals(self) -> Iterator[tuple[float, str, bytes]]:
        offset = time.time() - time.monotonic()
        for at, device, payload in recorded(self._file):
            yield at - offset, device, payload

    def size(self) -> int:
        return self._file.stat().st_size


BROKERS: dict[str, type[Recording] | type[Subscribed]] = {
    broker.name: broker for broker in (Recording, Subscribed)
}


# ---- what is done to whom --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Action:
    """One blow, how long it lasts, and the rest after it."""

    name: str
    target: str
    seconds: float
    rest_s: float
    pick: float
    """Which of several processes, as a share."""


def plan(seed: int, faults: tuple[str, ...]) -> Iterator[Action]:
    """Endless; the same for the same seed and broker."""
    draw = random.Random(seed)
    while True:
        name = draw.choices(
            ["kill", "stop", "slow", "restart", "storm", "reload", *faults],
            [5, 4, 2, 1, 1, 1, *(1 for _ in faults)],
        )[0]
        if name in ("kill", "stop", "slow"):
            target = draw.choice([*PROCESSES, "worker", "delivery", "broker"])
        elif name == "restart":
            target = draw.choice(("gateway", "broker"))
        elif name in faults:
            target = "broker"
        else:
            target = "gateway"
        seconds = 0.0 if name == "kill" else draw.choice((0.2, 1.0, 3.0)) * draw.uniform(0.5, 1.5)
        yield Action(name, target, seconds, draw.uniform(0.1, 1.2), draw.random())


class Stage:
    """A gateway and a broker whose history is written down, and judged at the end."""

    def __init__(
        self,
        directory: Path,
        broker: Broker,
        settings: Mapping[str, object],
        seed: int = 0,
        root: Path = ROOT,
    ) -> None:
        self.directory, self.broker = directory, broker
        self.gateway = GatewayProcess(
            directory,
            {
                "mqtt.url": f"mqtt://127.0.0.1:{broker.port}",
                "http.workers": 2,
                "log.capacity_bytes": 2 << 20,
                "mqtt.backoff_max_ms": 500,
                "mqtt.puback_timeout_ms": 2000,
                "mqtt.connect_timeout_ms": 2000,
                "http.body_deadline_ms": 1000,
                "http.durable_deadline_ms": 1500,
                "http.sink_deadline_ms": 2500,
                "http.drain_deadline_ms": 3000,
                "log.level": "warning",
                **settings,
            },
        )
        self.gateway.root = root
        self._trace = directory / "syncs.txt"
        self.gateway.environment |= {
            "LD_PRELOAD": str(sync_tracer()),
            "GW_SYNC_TRACE": str(self._trace),
        }
        self.file = directory / "history.ndjson"
        self._rows = self.file.open("wb", buffering=1 << 20)
        capacity = int(str(self.gateway.settings["log.capacity_bytes"]))
        self.write(Setup(broker.name, capacity, seed, traced=True))
        self.network = Network(self.gateway.port, self.write)
        self._last = Device("last", self.network, ["sink"], random.Random(0))
        self.starts = 0
        self.problems: list[str] = []
        """What went wrong and is in no row."""
        self._tasks: list[asyncio.Task[None]] = []

    def write(self, row: Rows) -> None:
        self._rows.write(history.encode(row) + b"\n")

    async def start(self) -> None:
        await self.broker.start()
        await asyncio.to_thread(self.gateway.start)
        self.starts = 1
        self._tasks = [
            asyncio.create_task(self._keep_alive()),
            asyncio.create_task(self.network.impatient()),
        ]

    async def judge(self) -> Verdict:
        """Wait for the last event, ask for receipts, end everything, check."""
        await self._drained()
        for receipt, event in list(self.network.receipts.items()):
            for _ in range(5):
                if await self._last.ask(receipt, event, final=True) is not None:
                    break
                await asyncio.sleep(0.2)
            else:
                self.problems.append(f"no answer to {receipt}")
        text = await asyncio.to_thread(scrape, self.gateway.port)
        await self.stop()
        with self.file.open("ab", buffering=1 << 20) as self._rows:
            self._collect()
            self.write(End(int(metric(text, "unexplained_events"))))
        return history.check(history.read(self.file))

    async def stop(self) -> None:
        """End both, also after a failure. Safe to call twice."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        self.network.close()
        await asyncio.sleep(0)  # transports close in the next round of the loop
        await asyncio.to_thread(self.gateway.kill)
        await self.broker.stop()
        self._rows.close()

    async def _keep_alive(self) -> None:
        """What systemd does: a gateway that is gone is started again."""
        while True:
            if not self.gateway.alive():
                self.starts += 1
                self.gateway.start(ready=False)
            await asyncio.sleep(0.05)

    async def _drained(self) -> None:
        """A sink's answer to a new event: all before it is delivered or set aside. (The gateway's
        own count of what waits does not know what nobody has walked over yet.)"""
        until = time.monotonic() + DRAINED_WITHIN_S
        while (await self._last.post(*self._last.next(), "sink")).reached != "sink":
            if time.monotonic() > until:
                health = await asyncio.to_thread(scrape, self.gateway.port, "healthz")
                self.problems.append(f"not drained within {DRAINED_WITHIN_S:.0f} s: {health}")
                return
            await asyncio.sleep(0.1)
        size = -1
        while self.broker.settle_s and size != self.broker.size():
            size = self.broker.size()
            await asyncio.sleep(self.broker.settle_s)

    def _collect(self) -> None:
        for at, device, payload in self.broker.arrivals():
            self.write(Arrival(event_of(device, payload), at))
        for device, body, reason in dead_letters(self.directory / "log"):
            self.write(DeadLetter(event_of(device, body), reason))
        if self._trace.exists():
            for line in self._trace.read_text().splitlines():
                began, returned, result = map(int, line.split())
                self.write(Sync(began / 1e9, returned / 1e9, result != 0))


class Torture(Stage):
    """One long run."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self.args = args
        names = [f"d-{i}" for i in range(args.devices)]
        crowd = [f"s{k}-{i}" for k in range(CROWDS_MAX) for i in range(args.crowd)]
        settings = {
            "http.workers": args.workers,
            "log.capacity_bytes": args.capacity,
            **dict(setting.split("=", 1) for setting in args.set),
        }
        broker = BROKERS[args.broker](directory, [*names, *crowd, "last"])
        super().__init__(directory, broker, settings, args.seed, args.root)
        names += [f"refused-{i}" for i in range(args.refused)]
        self.devices = [
            Device(name, self.network, args.acks.split(","), random.Random(f"{args.seed} {name}"))
            for name in names
        ]
        self._storms = 0
        self._crowds: set[asyncio.Task[None]] = set()

    async def run(self) -> Verdict:
        clients: list[asyncio.Task[None]] = []
        try:
            await self.start()
            interval_s = len(self.devices) / self.args.rate
            clients += [asyncio.create_task(device.run(interval_s)) for device in self.devices]
            await self._nemesis(clients)
            for device in self.devices:
                device.stopped = True
            await asyncio.wait_for(asyncio.gather(*clients, *self._crowds), 60)
            return await self.judge()
        finally:
            for task in (*clients, *self._crowds):
                task.cancel()
            await self.stop()

    # ---- nemesis -----------------------------------------------------------------------------

    async def _nemesis(self, clients: "list[asyncio.Task[None]]") -> None:
        until = time.monotonic() + self.args.seconds
        for rounds, action in enumerate(plan(self.args.seed, self.broker.faults)):
            if time.monotonic() > until:
                return
            for client in clients:
                if client.done():
                    client.result()  # a bug of the client's own
            if not self.args.calm:
                await self._act(action)
            await asyncio.sleep(action.rest_s)
            if self.args.verbose and rounds % 20 == 19:
                left = until - time.monotonic()
                print(f"{self.network.accepted} accepted, {left:.0f} s left", flush=True)

    async def _act(self, action: Action) -> None:
        forgets = self.args.broker == "mosquitto" and (action.name, action.target) == (
            "kill",
            "broker",
        )
        self.write(Nemesis(time.monotonic(), action.target, action.name, forgets))
        match action.name, action.target:
            case (("kill" | "restart" as how), "broker"):
                await self.broker.end(signal.SIGKILL if how == "kill" else signal.SIGTERM)
                await asyncio.sleep(action.seconds / 3)
                await self.broker.start()
            case (("kill" | "stop" | "slow"), _):
                await self._strike(action)
            case "restart", _:
                await self._drain_and_start()
            case "reload", _:
                self._signal([self.gateway.pid], signal.SIGHUP)
                await asyncio.sleep(action.seconds)
            case "storm", _:
                self._storm()
            case fault, _:
                self.broker.tell(f"lag {action.seconds / 10}" if fault == "lag" else "close 50")
                await asyncio.sleep(action.seconds)
                self.broker.tell("calm")

    def _storm(self) -> None:
        draw = random.Random(f"{self.args.seed} storm {self._storms}")
        acks = [ack for ack in self.args.acks.split(",") if ack != "enqueue"] or ["enqueue"]
        crowd = asyncio.create_task(
            storm(self.network, f"s{self._storms % CROWDS_MAX}", acks, self.args.crowd, draw)
        )
        self._storms += 1
        self._crowds.add(crowd)
        crowd.add_done_callback(self._crowds.discard)

    async def _strike(self, action: Action) -> None:
        pids = self._pids(action)
        if action.name == "kill":
            self._signal(pids, signal.SIGKILL)
            return
        until = time.monotonic() + action.seconds
        while True:
            self._signal(pids, signal.SIGSTOP)
            await asyncio.sleep(action.seconds if action.name == "stop" else 0.03)
            self._signal(pids, signal.SIGCONT)
            if time.monotonic() >= until:
                return
            await asyncio.sleep(0.015)

    def _signal(self, pids: list[int], number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _pids(self, action: Action) -> list[int]:
        if action.target == "broker":
            return [self.broker.pid()]
        if not self.gateway.alive():
            return []
        if action.target == "supervisor":
            return [self.gateway.pid]
        children = self.gateway.children()
        if action.target == "everything":
            return [self.gateway.pid, *(pid for pids in children.values() for pid in pids)]
        pids = sorted(children[action.target])
        return [pids[int(action.pick * len(pids))]] if pids else []

    async def _drain_and_start(self) -> None:
        """What systemctl restart does; the gateway must say 0."""
        process = self.gateway.process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            code = await asyncio.wait_for(asyncio.to_thread(process.wait, 30), 31)
        except subprocess.TimeoutExpired:
            self.problems.append("SIGTERM did not end the gateway within 30 s")
            return
        if code not in (0, -signal.SIGTERM, 130):  # the latter two: before its children ran
            self.problems.append(f"exit code {code} after SIGTERM")


def dead_letters(log: Path) -> Iterator[tuple[str, bytes, str]]:
    """Device, body and reason of each line of the dead-letter files."""
    for file in sorted(log.glob("dead-letters/*.ndjson")):
        for line in file.read_bytes().splitlines():
            letter = json.loads(line)
            body = letter["body"]
            data = b64decode(letter["body_base64"]) if body is None else body.encode()
            yield letter["device_id"], data, letter["reason_name"]


def sync_tracer() -> Path:
    """The compiled tests/native/preload_syncs.c."""
    source = ROOT / "tests" / "native" / "preload_syncs.c"
    library = ROOT / "build" / "native" / "preload_syncs.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        fresh = library.with_name(f"{library.name}.{os.getpid()}")
        subprocess.run(
            ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", source, "-o", fresh],
            check=True,
        )
        fresh.rename(library)
    return library


def scrape(port: int, page: str = "metrics") -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=2) as answer:
            return str(answer.read().decode())
    except OSError as error:
        return f"# {error}"


def metric(text: str, name: str) -> float:
    found = re.search(rf"^gateway_{name} ([-0-9.e+]+)$", text, re.M)
    return float(found[1]) if found else float("nan")


# ---- command line ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="scripts/torture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--seconds", type=float, default=300.0)
    p.add_argument("--seed", type=int, default=None)
    p.add_argument("--broker", choices=BROKERS, help="not given: one after the other")
    p.add_argument("--rate", type=float, default=1200.0, help="events a second offered")
    p.add_argument("--devices", type=int, default=48)
    p.add_argument("--refused", type=int, default=2, help="devices whose topic the broker refuses")
    p.add_argument("--crowd", type=int, default=60, help="devices that ask at the same instant")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--capacity", type=int, default=1 << 20)
    p.add_argument("--acks", default="enqueue,enqueue,enqueue,durable,sink")
    p.add_argument("--set", action="append", default=[], help="a setting of the gateway, KEY=VALUE")
    p.add_argument("--root", type=Path, default=ROOT, help="where the gateway package lies")
    p.add_argument("--calm", action="store_true", help="without any blow")
    p.add_argument("--check", type=Path, help="judge this history instead")
    p.add_argument("--verbose", action="store_true")
    return p


@dataclasses.dataclass
class Report:
    verdict: Verdict
    problems: list[str]
    seconds: float
    starts: int
    kept: Path | None = None

    @property
    def ok(self) -> bool:
        return self.verdict.ok and not self.problems

    def __str__(self) -> str:
        lines = [f"{self.seconds:.0f} s, {self.starts} starts", str(self.verdict), *self.problems]
        if self.kept:
            lines.append(f"history: {self.kept}")
        return "\n".join(lines)


def keep(torture: Torture) -> Path:
    """Copy the history, and beside it what the gateway said."""
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = KEPT / f"{torture.args.seed}-{torture.args.broker}.ndjson"
    shutil.copy(torture.file, kept)
    shutil.copy(torture.directory / "stderr.txt", kept.with_suffix(".stderr.txt"))
    return kept


def run(*arguments: str) -> Report:
    """One run, before the recording broker unless told otherwise. The history stays in
    build/torture when there is something to look at."""
    args = parser().parse_args(arguments)
    args.broker = args.broker or Recording.name
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {args.seed}, broker {args.broker}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gateway-torture-") as directory:
        torture = Torture(args, Path(directory))
        try:
            verdict = uvloop.run(torture.run())
        except BaseException:
            print(f"history: {keep(torture)}", file=sys.stderr)
            raise
        report = Report(verdict, torture.problems, time.monotonic() - began, torture.starts)
        if not report.ok:
            report.kept = keep(torture)
    return report


def main(arguments: list[str]) -> int:
    args = parser().parse_args(arguments)
    if args.check:
        verdict = history.check(history.read(args.check))
        print(verdict)
        return 0 if verdict.ok else 1
    if args.seed is None:
        arguments = [*arguments, "--seed", str(random.SystemRandom().randrange(1 << 31))]
    brokers = [args.broker] if args.broker else BROKERS
    share = str(args.seconds / len(brokers))
    reports = []
    for broker in brokers:
        reports.append(run(*arguments, "--broker", broker, "--seconds", share))
        print(reports[-1], flush=True)
    return 0 if all(report.ok for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
