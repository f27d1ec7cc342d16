"""One run: Mosquitto, subscriber, gateway and locust, each in a process of its own on this machine.

    broker up, subscriber there, gateway connected
    locust sends; its shape says each phase on standard output
        outage     the broker gets SIGTERM: it keeps its sessions in a file, so an event that it
                   acknowledged and had not yet passed on is not lost in it
        recovery   it is started again on the same port
    the gateway's log is empty; one last event follows all others to the subscriber
    records and books are read, everything is ended

The gateway has its defaults, but for one worker (the cores are shared with locust, broker and
subscriber), and a reconnect at most BACKOFF_MS after the broker's return: the drain is what is
measured here, not the wait before it.
"""

import contextlib
import getpass
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import msgspec

from benchmarks.harness import Failed
from benchmarks.processes import Child, answers, free_port, program, python
from benchmarks.servers import MOSQUITTO_VARIABLE, Gateway
from loadtest import subscriber, verdict
from loadtest.plan import Plan, Slo

LAST_DEVICE: Final = "end-of-the-run"
BACKOFF_MS: Final = 1000
CAPACITY_BYTES: Final = 256 << 20
DRAIN_S_MAX: Final = 60.0
LAST_S_MAX: Final = 10.0
LOCUST_S_MORE: Final = 60.0
"""For start and report, beside its phases."""
Door = Callable[[int], AbstractContextManager[int]]


class Broker:
    """Mosquitto that can be away for a while and loses nothing by it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        directory.mkdir(parents=True)
        self._settings = directory / "mosquitto.conf"
        self._settings.write_text(
            f"listener {self.port} 127.0.0.1\n"
            "allow_anonymous true\n"
            f"user {getpass.getuser()}\n"
            f"persistence true\npersistence_location {directory}/\nautosave_interval 0\n"
            "log_type error\nlog_type warning\n"
            # The subscriber's queue is what Mosquitto must not cut.
            "max_queued_messages 0\nmax_inflight_messages 1000\n"
        )
        self._place: socket.socket | None = None
        self._child = self._start()

    def _start(self) -> Child:
        command = [program("mosquitto", MOSQUITTO_VARIABLE), "-c", str(self._settings)]
        child = Child("mosquitto", command, self.directory)
        child.wait_until(lambda: answers(self.port), 10, "listening")
        return child

    def leave(self) -> None:
        """End it. Its port is kept: else another program could be given it meanwhile."""
        self._child.stop()
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", self.port))

    def come_back(self) -> None:
        """Start it again, with its sessions. Raises Failed."""
        if self._place is not None:
            self._place.close()
            self._place = None
            self._child = self._start()

    def check(self) -> None:
        """Raises Failed when it is dead, and not away."""
        if self._place is None:
            self._child.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._child.stop()
        if self._place is not None:
            self._place.close()


class Outcome(NamedTuple):
    """What a run gave."""

    findings: list[verdict.Finding]
    client: dict[str, Any]
    arrivals: subscriber.Arrivals
    books: dict[str, float]


@contextlib.contextmanager
def _straight(port: int) -> Iterator[int]:
    yield port


def run(
    slo: Slo,
    plan: Plan,
    directory: Path,
    *,
    say: Callable[[str], None],
    report: Path | None = None,
    door: Door = _straight,
    seed: int = 1,
) -> Outcome:
    """The whole of it. Locust reaches the gateway's port through `door`.

    Raises Failed when a program does not do its part; that is no verdict on the gateway.
    """
    record = directory / "subscriber.json"
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(Broker(directory / "mosquitto"))
        command = python("-m", "loadtest.subscriber", str(broker.port), LAST_DEVICE, str(record))
        listener = stack.enter_context(Child("subscriber", command, directory, pipe=True))
        listener.wait_until(lambda: "subscribed" in listener.last_words(), 10, "subscribed")
        gateway = stack.enter_context(
            Gateway(
                directory / "gateway",
                f"mqtt://127.0.0.1:{broker.port}",
                1,
                CAPACITY_BYTES,
                f"mqtt.backoff_max_ms={BACKOFF_MS}",
            )
        )
        gateway.wait_until(gateway.connected, 10, "connected to the broker")
        port = stack.enter_context(door(gateway.port))
        client = _locust(
            plan, port, broker, directory, say, report or directory / "report.html", seed
        )
        say("locust is done; waiting until the log is empty")
        for child in (gateway, listener, broker):
            child.check()
        # A log that does not become empty is no failed run: the books will say what waits.
        with contextlib.suppress(Failed):
            gateway.wait_until(
                lambda: gateway.books()["gateway_events_waiting"] == 0, DRAIN_S_MAX, "empty"
            )
        before = gateway.books()["gateway_events_published_total"]
        last = b'{"boot":1,"seq":1,"metrics":{},"payload":{"sent_ns":0}}'
        if gateway.post(LAST_DEVICE, last) != 202:
            raise Failed("the gateway did not take the last event of the run")
        with contextlib.suppress(Failed):
            listener.result(LAST_S_MAX)
            gateway.wait_until(  # a page of /metrics may be a moment old
                lambda: gateway.books()["gateway_events_published_total"] > before,
                LAST_S_MAX,
                "empty again",
            )
        gateway.check()
        books = gateway.books()
        listener.stop()
    arrivals = subscriber.read(record)
    return Outcome(verdict.judge(slo, plan, client, arrivals, books), client, arrivals, books)


def _locust(
    plan: Plan,
    port: int,
    broker: Broker,
    directory: Path,
    say: Callable[[str], None],
    report: Path,
    seed: int,
) -> dict[str, Any]:
    """Send everything; the broker goes and comes as the phases do. Returns the client's record."""
    wanted, record = directory / "plan.json", directory / "client.json"
    wanted.write_bytes(msgspec.json.encode(plan))
    command = python(
        *("-m", "locust", "-f", str(Path(__file__).with_name("locustfile.py"))),
        *("--headless", "--only-summary", "--exit-code-on-error", "0", "--html", str(report)),
        *("--host", f"http://127.0.0.1:{port}"),
    )
    settings = {
        "LOADTEST_PLAN": str(wanted),
        "LOADTEST_RECORD": str(record),
        "LOADTEST_SEED": str(seed),
    }
    with Child("locust", command, directory, settings=settings, pipe=True) as locust:
        watch = threading.Timer(plan.seconds + LOCUST_S_MORE, locust.process.kill)
        watch.start()
        try:
            assert locust.process.stdout is not None
            for line in locust.process.stdout:
                word, _, phase = line.decode(errors="replace").strip().partition(" ")
                if word != "phase":
                    continue
                say(f"{phase}: {dict(plan.phases)[phase]:g} s")
                if phase == "outage":
                    broker.leave()
                elif phase != "close":
                    broker.come_back()
            if (code := locust.process.wait()) != 0:
                raise Failed(f"locust ended with {code}: {locust.last_words()}")
        finally:
            watch.cancel()
    if not record.exists():
        raise Failed(f"locust wrote no record: {locust.last_words()}")
    client: dict[str, Any] = json.loads(record.read_text())
    return client
