"""How soon after everything was killed is the next event accepted, with a log that is nearly full?

SIGKILL for the supervisor and all it started, then `gateway serve` again on the same folder: the
time from the kill to the first 202. In it are the death of all processes, the start of Python,
recovery, the index, the children and their ports. The log is 256 MiB, 95 % full, its broker away;
log.high_water is 1, else a log so full would refuse. The page cache is warm, as it is when
processes die and the machine does not.

The reference is the same restart with an empty log of the same size.
"""

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks import events, logs
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare, interleave
from benchmarks.processes import closed_port
from benchmarks.servers import Gateway

NAME: Final = "restart_s"
CAPACITY_BYTES: Final = 256 * logs.MIB
FULL_SHARE: Final = 0.95
START_S_MAX: Final = 60
POLL_S: Final = 0.005
_CHUNK: Final = 1000


def fill(path: Path, share: float, bodies: Iterator[bytes]) -> int:
    """Append until so much of the log is used. Returns how many events."""
    devices = [events.device(number) for number in range(64)]
    count = 0
    with logs.opened(path) as (log, _):
        while log.used < share * log.capacity_bytes:
            count += logs.fill(log, itertools.islice(bodies, _CHUNK), devices)
    return count


def wait_released(path: Path) -> None:
    """Until no process holds the log any more. Raises Failed."""
    until = time.monotonic() + START_S_MAX
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > until:
                raise Failed("a process that was killed still holds the log")
            time.sleep(0.001)
    finally:
        os.close(fd)


class Restarts:
    """A gateway that is killed and started again."""

    def __init__(
        self, directory: Path, url: str, workers: int, share: float, bodies: Iterator[bytes]
    ) -> None:
        self._directory, self._url, self._workers = directory, url, workers
        self._bodies, self._share = bodies, share
        path = logs.create(directory / "data", CAPACITY_BYTES)
        self.accepted = fill(path, share, bodies)
        self.gateway = self._start()
        self._first_accepted(time.monotonic())

    def _start(self) -> Gateway:
        return Gateway(
            self._directory,
            self._url,
            self._workers,
            CAPACITY_BYTES,
            "log.high_water=1.0",
            wait=False,
        )

    def _first_accepted(self, since: float) -> float:
        """Seconds until a 202; each attempt is a new event. Raises Failed."""
        while True:
            with contextlib.suppress(OSError):
                status = self.gateway.post(events.device(1), next(self._bodies))
                if status == 202:
                    break
                if status != 503:
                    raise Failed(f"the first event was answered {status}")
            self.gateway.check()
            if time.monotonic() > since + START_S_MAX:
                raise Failed(f"no event accepted: {self.gateway.last_words()}")
            time.sleep(POLL_S)
        took = time.monotonic() - since
        self.accepted += 1
        self._check()
        return took

    def _check(self) -> None:
        """Everything that was accepted is there. Raises Failed."""
        gateway = self.gateway
        gateway.wait_until(lambda: gateway.waiting() >= self.accepted, 10, "whole")
        used = gateway.metrics()["gateway_log_bytes_used"]
        if used < self._share * CAPACITY_BYTES:
            raise Failed(f"the log is not full: {used:.0f} of {CAPACITY_BYTES} bytes")

    def seconds(self) -> float:
        """Kill everything; until the next event is accepted."""
        since = time.monotonic()
        self.gateway.kill()
        wait_released(self.gateway.data / "gateway.log")
        self.gateway = self._start()
        return self._first_accepted(since)

    def stop(self) -> None:
        """The end."""
        self.gateway.stop()


def measure(context: Context) -> dict[str, Figure]:
    """A full log and an empty one in turn."""
    bodies = events.stream(events.reference)
    with contextlib.ExitStack() as stack:
        away = stack.enter_context(closed_port())
        sides = {}
        for name, share in (("full", FULL_SHARE), ("empty", 0.0)):
            restarts = Restarts(
                context.directory / name,
                f"mqtt://127.0.0.1:{away}",
                context.workers,
                share,
                bodies,
            )
            stack.callback(restarts.stop)
            sides[name] = restarts.seconds
        found = interleave(sides, context.pick(3, 5), context, warm_up=False)
    worst = max(found["full"])
    note = f"{CAPACITY_BYTES >> 20} MiB, {FULL_SHARE:.0%} full; slowest {worst:.3g} s"
    return {NAME: compare(found["full"], found["empty"], "s", note)}


BENCHMARKS: Final = [Benchmark({NAME: "the same restart with an empty log"}, measure, quick=False)]
