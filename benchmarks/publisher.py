"""How many messages a second leave a full log for a broker, beside a raw socket that sends the same
packets?

The real delivery process (walk, committer, publisher) on a log that was filled before, against
peers/raw_publish.c: the same packets, encoded before, the same sliding window, PUBACKs parsed in C.
Mosquitto without a subscriber, twice:

    publisher_vs_raw_socket         no limits (max_inflight_messages 0): mqtt.inflight_max holds
    publisher_vs_raw_socket_stock   as installed: Receive Maximum 20

Counted from the first PUBACK that moved the cursor to the last one; the raw socket from its first
byte. Once a run, the first packets of the gateway's window are compared with those of the raw
socket, byte for byte.
"""

import itertools
import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import compiled, events, logs
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare, interleave
from benchmarks.peers import mqtt_wire
from benchmarks.processes import environment
from benchmarks.servers import Mosquitto

if TYPE_CHECKING:
    from gateway._log import Log

DELIVERY: Final = "gateway.delivery"
DEVICES: Final = 64
TOPIC: Final = "telemetry/"
STALL_S: Final = 20
POLL_S: Final = 0.001


class Source:
    """The events of each round."""

    def __init__(self, count: int) -> None:
        self._stream = events.stream(events.reference)
        self.count = count

    def bodies(self) -> list[bytes]:
        """Fresh ones."""
        return list(itertools.islice(self._stream, self.count))


def packets(bodies: list[bytes]) -> list[bytes]:
    """What the publisher should send for them, from packet id 1 on."""
    return [
        mqtt_wire.publish(TOPIC + events.device(i % DEVICES), body, i % 65535 + 1)
        for i, body in enumerate(bodies)
    ]


def compare_packets(log: "Log", expected: list[bytes]) -> None:
    """The gateway's own window encodes the same bytes. Raises Failed."""
    from gateway._mqtt import Window

    window = Window(log, log.sink(logs.SINK), TOPIC.encode(), b"")
    window.connect()
    window.open(False, 100, 0)
    if window.fill() != b"".join(expected[:100]):
        raise Failed("the gateway's packets are not those of the raw socket")


def _wait_published(log: "Log", child: "subprocess.Popen[bytes]", count: int) -> float:
    """Messages a second while the delivery process empties the log."""
    sink = log.sink(logs.SINK)
    before = log.cursor(sink).published
    first = seen = 0
    started = moved = time.monotonic()
    while True:
        published = log.cursor(sink).published - before
        now = time.monotonic()
        if published and not first:
            first, started = published, now
        if published >= count:
            break
        if published != seen:
            seen, moved = published, now
        if child.poll() is not None:
            raise Failed(
                f"the delivery process ended with {child.returncode}; its words stand above"
            )
        if now > moved + STALL_S:
            raise Failed(f"{published} of {count} published, then nothing for {STALL_S} s")
        time.sleep(POLL_S)
    if first >= count:
        raise Failed("everything was published between two looks: more events are needed")
    return (count - first) / (now - started)


class Delivery:
    """Our side: fill the log, start a delivery process, wait until it is empty, end the process."""

    def __init__(
        self, log: "Log", lock_fd: int, broker: Mosquitto, source: Source, *more: str
    ) -> None:
        """`more` are settings."""
        from gateway import config

        self._log, self._lock_fd, self._source = log, lock_fd, source
        directory = Path(str(log.path)).parent
        sets = [
            f"mqtt.url={broker.url}",
            f"log.directory={directory}",
            "log.level=warning",
            "http.drain_deadline_ms=0",
            *more,
        ]
        self._config = config.load(environment={}, sets=sets).config
        self.inflight_max = self._config.mqtt.inflight_max
        self._compared = bool(more)  # other settings, other packets

    def __call__(self) -> float:
        from gateway import process

        bodies = self._source.bodies()
        devices = [events.device(number) for number in range(DEVICES)]
        logs.empty(self._log)
        if logs.fill(self._log, bodies, devices) != len(bodies):
            raise Failed("the log is too small for a round")
        if not self._compared:
            compare_packets(self._log, packets(bodies[:100]))
            self._compared = True
        launch = process.Launch(
            name="delivery",
            index=0,
            parent=os.getpid(),
            lock_fd=self._lock_fd,
            shared_fd=self._log.shared_fd,
            listen_fd=-1,
            config=self._config,
            recovered=process.Recovered(),
        )
        child = process.spawn(DELIVERY, launch).process
        try:
            return _wait_published(self._log, child, len(bodies))
        finally:
            self._end(child)

    def _end(self, child: "subprocess.Popen[bytes]") -> None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def raw(
    program: Path, broker: Mosquitto, packets: list[bytes], window: int, directory: Path
) -> float:
    """The reference: messages a second."""
    path = directory / "packets"
    path.write_bytes(b"".join(packets))
    command = [str(program), str(broker.port), str(path), str(len(packets)), str(window)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    if done.returncode:
        raise Failed(done.stderr.strip() or f"raw_publish ended with {done.returncode}")
    said = json.loads(done.stdout)
    if said["messages"] != len(packets):
        raise Failed(f"{said['messages']} of {len(packets)} messages")
    return float(said["messages"] / said["seconds"])


def _measure(name: str, limits: bool, context: Context) -> dict[str, Figure]:
    program = compiled.executable("raw_publish", context.directory)
    source = Source(context.pick(100_000, 200_000))
    path = logs.create(context.directory / "log", context.pick(64, 128) * logs.MIB)
    with (
        Mosquitto(context.directory / "mosquitto", limits) as broker,
        logs.opened(path) as (log, lock_fd),
    ):
        delivery = Delivery(log, lock_fd, broker, source)

        def reference() -> float:
            made = packets(source.bodies())
            return raw(program, broker, made, delivery.inflight_max, context.directory)

        found = interleave({"gateway": delivery, "raw": reference}, 3, context)
        broker.check()
        if gap := log.unexplained(log.sink(logs.SINK)):
            raise Failed(f"{gap} events unexplained")
    limit = "Receive Maximum 20" if limits else "no limits, window 1000"
    note = f"{source.count:,} messages a round, Mosquitto with {limit}"
    return {name: compare(found["gateway"], found["raw"], "msg/s", note)}


BENCHMARKS: Final = [
    Benchmark(
        {name: "a raw socket in C, same packets"}, partial(_measure, name, limits), quick=not limits
    )
    for name, limits in (
        ("publisher_vs_raw_socket", False),
        ("publisher_vs_raw_socket_stock", True),
    )
]
