"""Offline view of a log: `gateway log ls` and `gateway log verify`.

Reads what recovery would find, without a lock and without writing a byte. While a gateway runs on
the same log the view is a snapshot of a moving thing, and both commands say so.
"""

import fcntl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

from gateway import _log
from gateway.errors import Exit, NoLog

SINKS: Final = ("mqtt",)
"""Names of the cursors that this version writes."""
ALIGNMENT_BYTES: Final = 8

RUNNING: Final = (
    "a gateway is running on this log: this is an offline view of what is in the file now, and"
    " its newest part may look torn"
)


class Readable(Protocol):
    """What is read of a `_log.Log` that was opened with `scan`."""

    @property
    def recovery(self) -> _log.Recovery | None: ...
    @property
    def capacity_bytes(self) -> int: ...
    @property
    def identity(self) -> int: ...
    @property
    def committed(self) -> int: ...
    @property
    def reclaim(self) -> int: ...
    def read(self, lsn: int) -> _log.Record | None: ...
    def sink(self, name: str) -> int: ...
    def cursor(self, sink: int) -> _log.Cursor: ...


def scan(path: Path) -> _log.Log:
    """Open the log read-only. Raises NoLog, `_log.NotALog`, `_log.LogError`."""
    if not path.exists():
        raise NoLog(str(path))
    return _log.Log.scan(str(path))


def is_running(path: Path) -> bool:
    """Whether a gateway holds the log's lock; asks by trying to share it, and lets go at once."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def ls(path: Path, records: int) -> int:
    """Print what the log holds, and its first `records` waiting records. Returns an exit code."""
    running = is_running(path) if path.exists() else False
    log = scan(path)
    for line in summary(log, path):
        print(line)
    if records:
        print()
        for line in listing(log, records):
            print(line)
    if running:
        print(f"\nnote: {RUNNING}")
    return Exit.OK


def verify(path: Path) -> int:
    """Check every record that waits. Returns Exit.DAMAGED when something below the watermark is
    corrupt."""
    running = is_running(path) if path.exists() else False
    log = scan(path)
    found = log.recovery
    assert found is not None
    if running:
        print(f"note: {RUNNING}")
    print(f"{path}: {count(found.records, 'record')} waiting and whole, {size(found.bytes)}")
    if found.torn_bytes:
        print(
            f"torn: {size(found.torn_bytes)} above the durable watermark {found.watermark};"
            " normal after a crash, nothing that was acknowledged as durable is in it"
        )
    if not found.corrupt_bytes:
        print("no corruption")
        return Exit.OK
    print(
        f"CORRUPT: {size(found.corrupt_bytes)} below the durable watermark {found.watermark},"
        " which were once on the disk:"
    )
    for start, end in found.corrupt:
        print(f"  lsn {start} to {end} ({end - start} bytes), {place(start, log.capacity_bytes)}")
    print(
        "Check the disk. `gateway serve` copies the file aside and goes on with the whole records."
    )
    return Exit.DAMAGED


def place(lsn: int, capacity_bytes: int) -> str:
    """Where a position is in the file: the ring starts behind four pages of 4 KiB."""
    return f"byte {4 * 4096 + lsn % capacity_bytes} of the file"


def summary(log: Readable, path: Path) -> Iterator[str]:
    """Lines about the log as a whole."""
    found = log.recovery
    assert found is not None
    yield f"log        {path}"
    yield f"identity   {log.identity:016x}"
    yield f"capacity   {size(log.capacity_bytes)}"
    yield f"epoch      {found.epoch}"
    yield f"watermark  lsn {found.watermark}  (durable below it)"
    yield f"end        lsn {found.end}"
    for name in SINKS:
        try:
            cursor = log.cursor(log.sink(name))
        except KeyError:
            continue
        yield (
            f"sink       {name}  lsn {cursor.lsn}, {cursor.published} published,"
            f" {cursor.dead_lettered} dead-lettered"
        )
    share = 100 * (found.end - log.reclaim) / log.capacity_bytes
    yield (
        f"waiting    {count(found.records, 'record')}, {size(found.bytes)}"
        f"  ({share:.1f} % of the log in use)"
    )
    yield f"torn       {size(found.torn_bytes)}"
    yield f"corrupt    {size(found.corrupt_bytes)}" + (
        "  (see `gateway log verify`)" if found.corrupt_bytes else ""
    )


def listing(log: Readable, limit: int) -> Iterator[str]:
    """A heading and a line for each of the first `limit` events that wait, and for each hole."""
    yield f"{'LSN':>14} {'BYTES':>7} {'RECEIVED':<27} {'SEQ':>12} DEVICE"
    lsn = log.reclaim
    shown = 0
    while shown < limit and lsn < log.committed:
        try:
            record = log.read(lsn)
        except _log.LogCorrupt:
            end = next_whole(log, lsn)
            yield f"{lsn:>14} {end - lsn:>7} (a hole: torn or corrupt)"
            lsn = end
            continue
        if record is None:
            return
        lsn += record.size
        if record.kind != _log.DATA:
            continue
        shown += 1
        received = datetime.fromtimestamp(record.received_at_ns / 1e9, UTC)
        seq = "-" if record.seq is None else str(record.seq)
        yield (
            f"{record.lsn:>14} {record.size:>7}"
            f" {received.isoformat(timespec='microseconds').replace('+00:00', 'Z'):<27}"
            f" {seq:>12} {record.device_id}"
        )


def next_whole(log: Readable, lsn: int) -> int:
    """The first position above `lsn` where a whole record stands, else the end of the log."""
    for start in range(lsn + ALIGNMENT_BYTES, log.committed, ALIGNMENT_BYTES):
        try:
            log.read(start)
        except _log.LogCorrupt:
            continue
        return start
    return log.committed


def size(n: int) -> str:
    """`n` bytes, for people."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n >= 1 << shift:
            return f"{n} bytes ({n / (1 << shift):.4g} {unit})"
    return count(n, "byte")


def count(n: int, noun: str) -> str:
    """`1 record`, `2 records`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"
