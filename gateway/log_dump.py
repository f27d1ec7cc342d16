"""`gateway log dump`: records as NDJSON, one line each, with their positions.

    {"lsn":4096,"size":136,"epoch":2,"kind":"data","received_at":"2025-09-23T11:18:41.000000001Z",
     "device_id":"boiler-7","seq":1,"boot":null,"body":"{\\"seq\\":1 ...}",
     "sinks":{"mqtt":"waiting"}}

`body` holds the bytes exactly as they were sent (UTF-8; a byte that is none stands as a lone
surrogate U+DC80 ... U+DCFF, Python's surrogateescape). A sink is waiting, done (its cursor is
above) or dead_lettered. `kind` is data, void (a claim that became nothing), pad (a claim whose
producer died, or a hole that recovery covered) or hole (no whole record; with `state` torn, corrupt
or finished). Memory is that of one record, whatever the log holds.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from gateway import _log
from gateway.books import sinks
from gateway.errors import ConfigError, Exit
from gateway.log_tools import (
    RUNNING,
    Hole,
    count,
    is_running,
    private,
    progress,
    ring_start,
    scan,
    sync_folder,
    timestamp,
    walk,
)

ENCODE: Final = json.JSONEncoder(separators=(",", ":")).encode
KINDS: Final = {_log.DATA: "data", _log.VOID: "void", _log.PAD: "pad"}


class Selection(NamedTuple):
    """Which records: positions, times of receipt (unix ns) and a device; None does not ask."""

    start: int | None = None
    end: int | None = None
    since_ns: int | None = None
    until_ns: int | None = None
    device_id: str | None = None
    everything: bool = False
    """From the ring's start, when `start` does not say where."""

    def range(self, log: _log.Log) -> tuple[int, int]:
        """The positions to look at, inside of what is there."""
        first = ring_start(log)
        start = self.start if self.start is not None else first if self.everything else log.reclaim
        end = log.committed if self.end is None else min(self.end, log.committed)
        return max(start, first), end

    def takes(self, found: _log.Record | Hole) -> bool:
        """Whether time and device fit. A hole, void or pad has neither."""
        if self.since_ns is None and self.until_ns is None and self.device_id is None:
            return True
        return (
            isinstance(found, _log.Record)
            and found.kind == _log.DATA
            and self.device_id in (None, found.device_id)
            and (self.since_ns is None or found.received_at_ns >= self.since_ns)
            and (self.until_ns is None or found.received_at_ns < self.until_ns)
        )

    def select(self, log: _log.Log) -> Iterator[_log.Record | Hole]:
        """What is asked for, in the log's order."""
        start, end = self.range(log)
        return (found for found in walk(log, start, end) if self.takes(found))


def run(path: Path, selection: Selection, output: Path | None) -> int:
    """Print what `selection` takes, to standard output or to a new file `output`. Returns an exit
    code. Raises ConfigError (`output` exists), OSError."""
    running = is_running(path)
    log = scan(path)
    start, end = selection.range(log)
    if selection.start is not None and selection.start < start:
        _say(f"note: what stood below lsn {start} was written over")
    records = 0
    alone = output is not None or not sys.stdout.isatty()
    with _target(output) as target, progress("dumping", end - start, alone) as show:
        for found in selection.select(log):
            target.write(line(log, found) + "\n")
            records += isinstance(found, _log.Record)
            show(found.lsn - start)
        target.flush()
    if running:
        _say(f"note: {RUNNING}")
    if output is not None:
        print(f"{output}: {count(records, 'record')}")
    return Exit.OK


def line(log: _log.Log, found: _log.Record | Hole) -> str:
    """One line of the dump, without its end."""
    fields: dict[str, Any] = {"lsn": found.lsn, "size": found.size}
    if isinstance(found, Hole):
        fields |= {"kind": "hole", "state": found.state}
        return ENCODE(fields)
    fields |= {"epoch": found.epoch, "kind": KINDS[found.kind]}
    if found.kind != _log.PAD:
        fields |= {
            "received_at": timestamp(found.received_at_ns),
            "device_id": found.device_id,
            "seq": found.seq,
            "boot": found.boot,
            "body": found.body.decode("utf-8", "surrogateescape"),
        }
    if found.kind == _log.DATA:
        fields["sinks"] = {
            name: "dead_lettered"
            if found.dead >> sink & 1
            else "done"
            if found.lsn < log.cursor(sink).lsn
            else "waiting"
            for sink, name in sinks(log)
        }
    return ENCODE(fields)


@contextmanager
def _target(output: Path | None) -> Iterator[TextIO]:
    """Standard output; or a file that has its name only once it is whole and on the disk."""
    if output is None:
        yield sys.stdout
        return
    if output.exists():
        raise ConfigError(f"--output {output}: there is such a file; remove it or name another one")
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        with open(partial, "x", encoding="ascii", opener=private) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, output)
        sync_folder(output.parent)
    finally:
        partial.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(f"gateway: {text}", file=sys.stderr)
