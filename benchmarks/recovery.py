"""How fast is a full log opened: every record found and its checksum proved, beside a plain read of
the same file?

Both from the page cache, as after the death of every process. The time is that of `Log.open`: lock,
recovery, the new epoch, and the syncs that belong to it.
"""

import os
import time
from pathlib import Path
from typing import Final

from benchmarks import events, logs
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare, interleave

CHUNK_BYTES: Final = logs.MIB


def _read_mib_per_second(path: Path) -> float:
    chunk = bytearray(CHUNK_BYTES)
    size = 0
    with open(path, "rb", buffering=0) as file:
        started = time.perf_counter()
        while got := file.readinto(chunk):
            size += got
        return size / logs.MIB / (time.perf_counter() - started)


def _open_mib_per_second(path: Path, records: int) -> float:
    from gateway import _log

    lock_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        started = time.perf_counter()
        log = _log.Log.open(str(path), lock_fd, [logs.SINK])
        took = time.perf_counter() - started
        found = log.recovery
        log.close()
    finally:
        os.close(lock_fd)
    if found is None or found.records != records or found.torn_bytes or found.corrupt_bytes:
        raise Failed(f"recovery found {found}, but the log has {records} records")
    return float(found.bytes / logs.MIB / took)


def measure(context: Context) -> dict[str, Figure]:
    """Fill a log to the brim, then open it again and again."""
    capacity = context.pick(128, 256) * logs.MIB
    bodies = events.stream(events.reference)
    devices = [events.device(number) for number in range(64)]
    path = logs.create(context.directory, capacity)
    with logs.opened(path) as (log, _):
        records = logs.fill(log, bodies, devices)
        used = log.committed - log.reclaim
    if used < 0.99 * capacity:
        raise Failed(f"the log is not full: {used} of {capacity} bytes")
    sides = {
        "open": lambda: _open_mib_per_second(path, records),
        "read": lambda: _read_mib_per_second(path),
    }
    found = interleave(sides, context.pick(3, 5), context)
    path.unlink()
    note = f"{capacity >> 20} MiB, {records} records"
    return {"recovery_mib_per_second": compare(found["open"], found["read"], "MiB/s", note)}


BENCHMARKS: Final = [
    Benchmark({"recovery_mib_per_second": "plain read of the file, page cache warm"}, measure)
]
