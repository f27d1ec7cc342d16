"""A real log for the benchmarks that need no server: made, filled and emptied in this process."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.harness import Failed

if TYPE_CHECKING:
    from gateway._log import Ingest, Log

MIB: Final = 1 << 20
SINK: Final = "mqtt"


def create(directory: Path, capacity_bytes: int) -> Path:
    """A new log file in `directory`."""
    from gateway import _log

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "gateway.log"
    path.unlink(missing_ok=True)
    _log.create(str(path), capacity_bytes)
    return path


@contextlib.contextmanager
def opened(
    path: Path, native: Any = None, sinks: Sequence[str] = (SINK,)
) -> "Iterator[tuple[Log, int]]":
    """The log, recovered and locked, and the descriptor that holds its lock.

    `native` is another build of `gateway._log`, here and below.
    """
    from gateway import _log

    lock_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        log = (native or _log).Log.open(str(path), lock_fd, sinks)
        try:
            yield log, lock_fd
        finally:
            log.close()
    finally:
        os.close(lock_fd)


@contextlib.contextmanager
def ingesting(log: "Log", native: Any = None) -> "Iterator[Ingest]":
    """A worker's way into the log."""
    from gateway import _log

    ingest = (native or _log).Ingest(log, 0)
    try:
        yield ingest
    finally:
        ingest.close()


def fill(log: "Log", bodies: Iterable[bytes], devices: Sequence[str]) -> int:
    """Append until the log is full or there are no more bodies; walk and sync. Returns how many."""
    from gateway import _log

    full = _log.CODES.index("log_full")
    count, code = 0, 0
    with ingesting(log) as ingest:
        for body in bodies:
            code = ingest.event(devices[count % len(devices)], body, _log.now_ns())
            if code:
                break
            count += 1
    if code not in (0, full):
        raise Failed(f"an event was refused: {_log.CODES[code]}")
    walk(log)
    check_new(log)
    return count


def check_new(log: "Log") -> None:
    """Raises Failed when an event was taken for a repeat: it was accepted without any work."""
    from gateway import _log

    if repeats := log.counter_total(_log.COUNTERS["duplicates"]):
        raise Failed(f"{repeats} events were taken for repeats: each must have a new seq")


def walk(log: "Log") -> None:
    """Move `committed` to the tail and make it durable."""
    while log.committed < log.tail:
        before = log.committed
        if log.follow(before, 1000) == before:
            raise Failed("the walk over the log does not get on")
    for _ in range(4):
        if not log.sync():
            return


def empty(log: "Log") -> None:
    """Let each sink pass everything, as if it were published, and give the room back."""
    walk(log)
    for sink in range(len(log.sinks)):
        at = log.cursor(sink)
        passed = log.committed_ordinal - at.ordinal
        log.set_cursor(
            sink,
            at._replace(
                lsn=log.committed, ordinal=at.ordinal + passed, published=at.published + passed
            ),
        )
    for _ in range(4):
        if not log.sync():
            break
    if log.reclaim != log.committed:
        raise Failed(f"the log was not emptied: reclaim {log.reclaim}, committed {log.committed}")
