"""A real gateway for tests: its own folder, free ports of loopback, every process reachable by pid.

    with GatewayProcess(folder, {"http.workers": 1}) as gateway: ... gateway.port,
    gateway.children() ...

Without `mqtt.url` the broker is a port on which nobody listens: events stay in the log. Signals go
to pids that are this gateway's own, never to names."""

import asyncio
import atexit
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests import brokers

EVENT = b'{"metrics":{"temp_c":21.5}}'
ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], within_s: float = 10.0, what: str = "") -> Any:
    """The first true value of `condition`. Raises AssertionError when there is none in time."""
    until = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until:
            raise AssertionError(f"not within {within_s} s: {what or condition}")
        time.sleep(0.01)


class GatewayProcess:
    """`gateway serve` with settings such as {"http.workers": 2}."""

    def __init__(self, directory: Path, settings: Mapping[str, object] | None = None) -> None:
        self.directory = directory
        self.port = free_port()
        self.settings: dict[str, object] = {
            "http.port": self.port,
            "http.workers": 1,
            "log.directory": directory / "log",
            "log.capacity_bytes": 1 << 20,
            "http.body_bytes_max": 65536,
            "mqtt.url": f"mqtt://127.0.0.1:{free_port()}",
            "mqtt.embedded_port": free_port(),
            **(settings or {}),
        }
        if "http.port" in (settings or {}):
            self.port = int(str(self.settings["http.port"]))
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = dict(os.environ)
        self.root = ROOT
        """Where its `gateway` package lies: another build for a mutant."""
        self.wrapper: list[str] = []
        """A program that starts it, such as strace; `pid` is that one's then."""
        atexit.register(self.kill)  # a test that fails before it stops it leaves nothing behind

    # ---- life ------------------------------------------------------------------------------------

    def start(self, ready: bool = True, within_s: float = 20.0) -> Self:
        """Start it, and wait until /readyz says yes. Raises AssertionError with its words when it
        does not."""
        self.directory.mkdir(parents=True, exist_ok=True)
        sets = [
            part for key, value in self.settings.items() for part in ("--set", f"{key}={value}")
        ]
        with (self.directory / "stderr.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [*self.wrapper, sys.executable, "-m", "gateway", "serve", *sets],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.root,
                env=self.environment,
            )
        if ready:
            wait_for(lambda: not self.alive() or self.is_ready(), within_s, self.output)
            assert self.alive(), f"the gateway ended with {self.process.poll()}:\n{self.output()}"
        return self

    def stop(self, within_s: float = 20.0) -> int | None:
        """SIGTERM, and its exit code; SIGKILL when it does not end. Safe to call twice."""
        if self.process is None:
            return None
        self.process.terminate()
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"SIGTERM did not end the gateway:\n{self.output()}") from None

    def kill(self) -> None:
        """SIGKILL to the supervisor; its children die with it."""
        if self.process is not None and self.process.poll() is None:
            children = self.child_pids()
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)
            wait_for(
                lambda: not any(is_alive(pid) for pid in children),
                what="children die with the supervisor",
            )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def alive(self) -> bool:
        """Whether the supervisor runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        assert self.process is not None
        return self.process.pid

    def output(self) -> str:
        """All that its processes said."""
        return (self.directory / "stderr.txt").read_text(errors="replace")

    def children(self) -> dict[str, list[int]]:
        """Live children: {"worker": [pid, ...], "delivery": [pid]}; empty lists while one is
        starting."""
        found: dict[str, list[int]] = {"worker": [], "delivery": []}
        for pid in self.child_pids():
            try:
                name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-2].decode()
            except (OSError, IndexError):
                continue
            kind = name.partition("-")[0]
            if kind in found:
                found[kind].append(pid)
        return found

    def child_pids(self) -> list[int]:
        """Every process whose parent is the supervisor and that is no zombie."""
        pids = []
        for entry in Path("/proc").iterdir():
            fields = stat_fields(int(entry.name)) if entry.name.isdigit() else None
            if fields is not None and int(fields[1]) == self.pid and fields[0] != "Z":
                pids.append(int(entry.name))
        return sorted(pids)

    # ---- what it says ----------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers with lower-case names, body, over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, device_id: str = "dev-1", body: bytes = EVENT) -> int:
        """The status of one event."""
        return self.request(
            "POST", f"/v1/ingest/{device_id}", body, {"Content-Type": "application/json"}
        )[0]

    def is_ready(self) -> bool:
        """Whether /readyz says yes."""
        try:
            return self.request("GET", "/readyz")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def health(self) -> dict[str, Any]:
        """/healthz."""
        health: dict[str, Any] = json.loads(self.request("GET", "/healthz")[2])
        return health

    def metrics(self) -> dict[str, float]:
        """/metrics: {'name{labels}': value}."""
        time.sleep(0.11)  # gateway.metrics.FRESH_S: what was counted before is in the page
        text = self.request("GET", "/metrics")[2].decode()
        rows = [line.rpartition(" ") for line in text.splitlines() if line and line[0] != "#"]
        return {name: float(value) for name, _, value in rows}

    def metric(self, name: str) -> float:
        """One of them."""
        return self.metrics()[name]


def stat_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat behind the name: state, ppid, ...; None when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    fields = stat_fields(pid)
    return fields is not None and fields[0] not in "ZX"


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = stat_fields(pid)
    return 0.0 if fields is None else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Valve:
    """A broker in a thread that acknowledges as many events as it is told to.

    with Valve() as broker: ... broker.port ... broker.allowed += 1"""

    def __init__(self) -> None:
        self.allowed = self.acked = self.received = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Valve":
        self._thread.start()
        wait_for(lambda: self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        async with brokers.ScriptedBroker(self._play) as broker:
            self.port = broker.port
            await self._end.wait()

    async def _play(self, peer: brokers.Peer) -> None:
        await peer.accept()
        while True:
            first, body = await peer.packet()
            if first >> 4 == brokers.PINGREQ:
                peer.send(brokers.packet(brokers.PINGRESP << 4, b""))
            elif first >> 4 != brokers.PUBLISH:
                return
            else:
                self.received += 1
                while self.acked >= self.allowed:
                    await asyncio.sleep(0.005)
                peer.send(brokers.puback(brokers.read_publish(first, body).id))
                self.acked += 1
