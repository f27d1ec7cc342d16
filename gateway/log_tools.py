"""Offline view of a log: `gateway log ls` and `gateway log verify`, and what the other commands
read a log with.

    ring start             least cursor          watermark        end
        │  finished: done       │  waits: to be       │                │
        │  for every sink       │  published          │                │
        ▼                       ▼                     ▼                ▼
     ───┬────┬────┬────┬────┬───┬────┬─────┬──────┬───┬────┬──────┬────┐
        │ whole records, none in │ a hole here is     │ a hole here is │
        │ places that are not    │ corrupt            │ torn           │
     ───┴────────────────────────┴────────────────────┴────────────────┘

Reads what recovery would find, without a lock and without writing a byte. While a gateway runs on
the same log the view is a snapshot of a moving thing: each record that is shown was copied first
and checked then, but which records there are may change at any moment. The commands say so.
"""

import fcntl
import functools
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from gateway import _log
from gateway.books import sinks
from gateway.errors import Exit, NoLog
from gateway.settings import LogConfig

RING_OFFSET: Final = 4 * 4096
"""The ring stands behind four pages."""
LOOK_BYTES: Final = 16 << 20
"""The most that is searched for a record in one call that Ctrl-C cannot end."""
LISTED_MAX: Final = 16
"""Damaged places that are listed one by one."""
LOOKS: Final = 3
"""Damage beside a running gateway is reported when it is seen so many times: a record that was
published and written over during one look is none."""

RUNNING: Final = (
    "a gateway is running on this log: this is an offline view of what is in the file now, and"
    " its newest part may look torn"
)


class Hole(NamedTuple):
    """A place [lsn, end) between records where none is whole."""

    lsn: int
    end: int
    state: str
    """corrupt: below the durable watermark, and it was still to be published; torn: above it;
    finished: below every cursor."""

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.lsn


# ---- reading -------------------------------------------------------------------------------------


def scan(path: Path) -> _log.Log:
    """Open the log read-only. Raises NoLog, `_log.NotALog`, `_log.LogError`."""
    if not path.exists():
        raise NoLog(str(path))
    return _log.Log.scan(str(path))


def is_running(path: Path) -> bool:
    """Whether a gateway holds the log's lock; asks by trying to share it, and lets go at once."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def ring_start(log: _log.Log) -> int:
    """Everything below was written over."""
    return max(log.committed - log.capacity_bytes, 0)


def walk(log: _log.Log, start: int, end: int) -> Iterator[_log.Record | Hole]:
    """Every whole record in [start, end), of any kind, and every hole between two of them.

    What stands before the first record is a hole only when `start` is a place where one must begin:
    the least cursor. So is what is missing between the end of the last record and the watermark.
    """
    boundary = start == log.reclaim
    at = start
    while record := _next(log, at, end):
        if record.lsn > at and boundary:
            yield from _holes(log, at, record.lsn)
        yield record
        at, boundary = record.lsn + record.size, True
    if boundary and at < end:
        yield from _holes(log, at, end)


def _next(log: _log.Log, start: int, end: int) -> _log.Record | None:
    while start < end:
        limit = min(start + LOOK_BYTES, end)
        if record := log.next(start, limit):
            return record
        start = limit
    return None


def _holes(log: _log.Log, start: int, end: int) -> Iterator[Hole]:
    """[start, end) cut where what it means changes."""
    cuts = sorted({start, end, *(at for at in (log.reclaim, log.durable) if start < at < end)})
    for lsn, to in itertools.pairwise(cuts):
        state = "finished" if to <= log.reclaim else "corrupt" if to <= log.durable else "torn"
        yield Hole(lsn, to, state)


# ---- ls ------------------------------------------------------------------------------------------


def ls(settings: LogConfig, records: int) -> int:
    """Print what the log holds, and its first `records` waiting records. Returns an exit code."""
    running = is_running(settings.path)
    log = scan(settings.path)
    for line in summary(log, settings):
        print(line)
    if records:
        print()
        for line in listing(log, records):
            print(line)
    if running:
        print(f"\nnote: {RUNNING}")
    return Exit.OK


def summary(log: _log.Log, settings: LogConfig) -> Iterator[str]:
    """Lines about the log as a whole."""
    found = log.recovery
    assert found is not None
    yield f"log        {settings.path}"
    yield f"identity   {log.identity:016x}"
    yield f"capacity   {size(log.capacity_bytes)}"
    yield f"epoch      {found.epoch}"
    yield f"watermark  lsn {found.watermark}  (durable below it)"
    yield f"end        lsn {found.end}"
    for sink, name in sinks(log):
        cursor = log.cursor(sink)
        skipped = f", {cursor.skipped} skipped" if cursor.skipped else ""
        yield (
            f"sink       {name}  lsn {cursor.lsn}, {cursor.published} published,"
            f" {cursor.dead_lettered} dead-lettered{skipped},"
            f" {log.committed_ordinal - cursor.ordinal} waiting"
        )
    share = 100 * (found.end - log.reclaim) / log.capacity_bytes
    yield (
        f"waiting    {count(found.records, 'record')}, {size(found.bytes)}"
        f"  ({share:.1f} % of the log in use)"
    )
    yield (
        f"water      events are refused above {100 * settings.high_water:g} % in use, until"
        f" {100 * settings.low_water:g} %"
    )
    yield f"window     {window(log)}"
    yield f"torn       {size(found.torn_bytes)}"
    yield f"corrupt    {size(found.corrupt_bytes)}" + (
        "  (see `gateway log verify`)" if found.corrupt_bytes else ""
    )


def window(log: _log.Log) -> str:
    """How far back a repeated event is recognised: to the oldest record that is still there."""
    for record in walk(log, ring_start(log), log.committed):
        if isinstance(record, _log.Record) and record.kind == _log.DATA:
            age_s = max(0, time.time_ns() - record.received_at_ns) // 1_000_000_000
            return (
                f"repeats are recognised back to lsn {record.lsn}, received"
                f" {timestamp(record.received_at_ns)} ({age(age_s)} ago)"
            )
    return "no event yet"


def listing(log: _log.Log, limit: int) -> Iterator[str]:
    """A heading and a line for each of the first `limit` events that wait, and for each hole."""
    yield f"{'LSN':>14} {'BYTES':>7} {'RECEIVED':<30} {'SEQ':>12} DEVICE"
    shown = 0
    for found in walk(log, log.reclaim, log.committed):
        if isinstance(found, Hole):
            yield f"{found.lsn:>14} {found.size:>7} (a hole: torn or corrupt)"
        elif found.kind == _log.DATA:
            seq = "-" if found.seq is None else str(found.seq)
            yield (
                f"{found.lsn:>14} {found.size:>7} {timestamp(found.received_at_ns):<30}"
                f" {seq:>12} {found.device_id}"
            )
            shown += 1
            if shown == limit:
                return


# ---- verify --------------------------------------------------------------------------------------


class Findings(NamedTuple):
    """What `verify` saw."""

    log: _log.Log
    records: int
    """Whole events."""
    bytes: int
    holes: tuple[Hole, ...]
    """The first LISTED_MAX of those that are corrupt or finished."""
    corrupt_count: int
    corrupt_bytes: int
    finished_count: int
    finished_bytes: int
    torn_bytes: int

    @property
    def damaged(self) -> bool:
        """Something that was on the disk is not whole any more."""
        return bool(self.corrupt_count or self.finished_count)


def verify(path: Path, everything: bool = False, as_json: bool = False) -> int:
    """Check every record that waits; with `everything` also the finished ones that are still in the
    ring. Returns Exit.DAMAGED when something below the watermark is not whole."""
    running = is_running(path)
    for _ in range(LOOKS):
        found = examine(scan(path), everything)
        if not (running and found.damaged):
            break
    if as_json:
        print(json.dumps(_as_json(path, running, everything, found)))
    else:
        for line in _report(path, running, everything, found):
            print(line)
    return Exit.DAMAGED if found.damaged else Exit.OK


def examine(log: _log.Log, everything: bool) -> Findings:
    """Look at what waits, or at the whole ring."""
    recovery = log.recovery
    assert recovery is not None
    records, size_ = recovery.records, recovery.bytes
    holes: list[Hole] = []
    counts = {"corrupt": 0, "finished": 0, "torn": 0}
    sizes = dict.fromkeys(counts, 0)
    if everything or recovery.corrupt_bytes or recovery.torn_bytes:
        records = size_ = 0
        start = ring_start(log) if everything else log.reclaim
        end = max(log.committed, recovery.watermark)  # what is gone from the end, too
        for found in walk(log, start, end):
            if isinstance(found, Hole):
                counts[found.state] += 1
                sizes[found.state] += found.size
                if found.state != "torn" and len(holes) < LISTED_MAX:
                    holes.append(found)
            elif found.kind == _log.DATA:
                records += 1
                size_ += found.size
    return Findings(
        log,
        records,
        size_,
        tuple(holes),
        counts["corrupt"],
        sizes["corrupt"],
        counts["finished"],
        sizes["finished"],
        sizes["torn"],
    )


def _report(path: Path, running: bool, everything: bool, found: Findings) -> Iterator[str]:
    log = found.log
    if running:
        yield f"note: {RUNNING}"
    which = "in the ring" if everything else "waiting"
    yield f"{path}: {count(found.records, 'record')} {which} and whole, {size(found.bytes)}"
    if found.torn_bytes:
        yield (
            f"torn: {size(found.torn_bytes)} above the durable watermark {log.durable};"
            " normal after a crash, nothing that was acknowledged as durable is in it"
        )
    if not found.damaged:
        yield "no corruption"
        return
    if found.corrupt_count:
        yield (
            f"CORRUPT: {size(found.corrupt_bytes)} below the durable watermark {log.durable},"
            " which were once on the disk and still to be published:"
        )
        yield from _places(log, found, "corrupt", found.corrupt_count)
    if found.finished_count:
        yield (
            f"DAMAGED: {size(found.finished_bytes)} of what every sink is done with. No event is"
            " lost, but repeats of these events are not recognised any more. A kill or a power cut"
            " may do this to the oldest records in the ring; anywhere else it is the disk:"
        )
        yield from _places(log, found, "finished", found.finished_count)
    yield (
        "Check the disk. `gateway serve` copies the file aside and goes on with the whole records;"
        " `gateway log dump` prints those."
        if found.corrupt_count
        else "Check the disk. `gateway serve` goes on as if nothing was."
    )


def _places(log: _log.Log, found: Findings, state: str, total: int) -> Iterator[str]:
    shown = [hole for hole in found.holes if hole.state == state]
    for hole in shown:
        yield (
            f"  lsn {hole.lsn} to {hole.end} ({hole.size} bytes),"
            f" {place(hole.lsn, log.capacity_bytes)}"
        )
    if total > len(shown):
        yield f"  and {count(total - len(shown), 'place')} more"


def _as_json(path: Path, running: bool, everything: bool, found: Findings) -> dict[str, Any]:
    log = found.log
    assert log.recovery is not None
    return {
        "path": str(path),
        "identity": f"{log.identity:016x}",
        "capacity_bytes": log.capacity_bytes,
        "epoch": log.recovery.epoch,
        "running": running,
        "scope": "ring" if everything else "waiting",
        "ring_start": ring_start(log),
        "least_cursor": log.reclaim,
        "watermark": log.durable,
        "end": log.committed,
        "records": found.records,
        "bytes": found.bytes,
        "torn_bytes": found.torn_bytes,
        "corrupt_bytes": found.corrupt_bytes,
        "corrupt_places": found.corrupt_count,
        "finished_damaged_bytes": found.finished_bytes,
        "finished_damaged_places": found.finished_count,
        "damage": [
            {
                "from": hole.lsn,
                "to": hole.end,
                "state": hole.state,
                "file_offset": RING_OFFSET + hole.lsn % log.capacity_bytes,
            }
            for hole in found.holes
        ],
        "damaged": found.damaged,
    }


def place(lsn: int, capacity_bytes: int) -> str:
    """Where a position is in the file."""
    return f"byte {RING_OFFSET + lsn % capacity_bytes} of the file"


# ---- words ---------------------------------------------------------------------------------------


def size(n: int) -> str:
    """`n` bytes, for people."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n >= 1 << shift:
            return f"{n} bytes ({n / (1 << shift):.4g} {unit})"
    return count(n, "byte")


def count(n: int, noun: str) -> str:
    """`1 record`, `2 records`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def age(seconds: int) -> str:
    """`45 s`, `12 min`, `3 h 5 min`, `2 d 4 h`."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds} s"


def timestamp(ns: int) -> str:
    """RFC 3339 in UTC with nine digits, of unix nanoseconds."""
    seconds, fraction = divmod(ns, 1_000_000_000)
    return f"{_second(seconds)}.{fraction:09d}Z"


@functools.lru_cache(64)
def _second(unix_s: int) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%dT%H:%M:%S}"


_TIME: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:([Zz])|([+-]\d\d:\d\d))", re.ASCII
)


def parse_timestamp(text: str) -> int:
    """Unix nanoseconds of an RFC 3339 date-time with offset. Raises ValueError."""
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError("write an RFC 3339 time with offset, such as 2025-09-23T11:18:41Z")
    day, clock, fraction, _, offset = match.groups()
    whole = datetime.fromisoformat(f"{day}T{clock}{offset or '+00:00'}")
    return int(whole.timestamp()) * 1_000_000_000 + int((fraction or "").ljust(9, "0"))


@contextmanager
def progress(what: str, total: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows a line that is rewritten on a terminal (of standard error), and nothing elsewhere."""
    terminal = shown and sys.stderr.isatty()
    last = 0.0

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if terminal and now - last > 0.1:
            last = now
            share = 100 * done // max(total, 1)
            print(f"\r{what}: {share:3d} %", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def private(name: str, flags: int) -> int:
    """An opener for `open`: a new file that only its owner can read."""
    return os.open(name, flags | os.O_CLOEXEC, 0o600)


def sync_folder(folder: Path) -> None:
    """Names that were given and taken in it are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
