"""`gateway log resize`: the same log in a file of another capacity.

    gateway.log.new        written whole, synced, read back and compared
    gateway.log.before-resize   a second name (hard link) of the old file
    gateway.log.new ──rename──▶ gateway.log

Between any two steps `gateway.log` is a whole log, the old one or the new one: a hard link and one
rename leave no instant without it. What an interrupted run leaves beside it is taken away by the
next. The old file is read and never written: a log that was not closed is copied as it is, and the
next start recovers the copy as it would have recovered the old one.

Identity, secret, epochs, cursors, books and the position of every record stay, so receipts, the
recognition of repeats and each sink's place survive. How far back repeats are recognised depends on
the capacity: a smaller log keeps the newest records.
"""

import errno
import fcntl
import os
from pathlib import Path
from typing import Final, NamedTuple

from gateway import _log
from gateway.errors import Exit, GatewayError, NoLog
from gateway.log_tools import (
    age,
    count,
    progress,
    ring_start,
    scan,
    size,
    sync_folder,
    timestamp,
    walk,
)
from gateway.opening import lock_folder, patiently

NEW: Final = ".new"
BEFORE: Final = ".before-resize"


class CannotResize(GatewayError):
    """The log stays as it is; the text says why and what to do."""

    exit_code = Exit.LOG_UNUSABLE


class DamagedLog(GatewayError):
    """Damage below the watermark: what to keep of it is not resize's to decide."""

    exit_code = Exit.DAMAGED


class _Files(NamedTuple):
    log: Path
    new: Path
    before: Path


def resize(path: Path, capacity_bytes: int) -> int:
    """Give the log at `path` another capacity (a power of two). Returns an exit code.

    Raises NoLog, DirectoryLocked (a gateway runs), CannotResize, DamagedLog, `_log.NotALog`."""
    if not path.exists():
        raise NoLog(str(path))
    own = path.resolve()  # the file behind a symbolic link is the one to be replaced
    files = _Files(own, own.with_name(own.name + NEW), own.with_name(own.name + BEFORE))
    folder_fd = lock_folder(path.parent)
    try:
        with open(path, "rb") as file:
            # children of a killed supervisor may still write for a moment
            patiently(
                path.parent,
                BlockingIOError,
                lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
            )
            return _resize(files, capacity_bytes)
    finally:
        os.close(folder_fd)


def _resize(files: _Files, capacity_bytes: int) -> int:
    log = scan(files.log)
    found = log.recovery
    assert found is not None
    if found.corrupt_bytes:
        raise DamagedLog(
            f"{files.log}: {size(found.corrupt_bytes)} below the durable watermark are damaged;"
            " nothing was changed. `gateway log verify` says where; `gateway serve` copies the file"
            " aside and goes on with the whole records, and then it can be resized"
        )
    if log.capacity_bytes == capacity_bytes:
        print(f"{files.log} has a capacity of {size(capacity_bytes)} already; nothing was changed")
        return Exit.OK
    _make_way(files)
    _check_room(files, log, capacity_bytes)
    window = _oldest(log, ring_start(log))
    start = _write(files, log, capacity_bytes)
    old_capacity_bytes = log.capacity_bytes
    kept = _oldest(log, start)
    log.close()
    _swap(files)
    print(
        f"{files.log}: {size(old_capacity_bytes)} → {size(capacity_bytes)},"
        f" {count(found.records, 'record')} waiting"
    )
    if kept is not None and window is not None and kept > window:
        print(
            f"repeats are recognised back to events received {timestamp(kept)}"
            f" instead of {timestamp(window)} ({age((kept - window) // 1_000_000_000)} less)"
        )
    print(f"The old file is {files.before}; remove it when the gateway runs.")
    print(f"Set log.capacity_bytes = {capacity_bytes} in the gateway's settings.")
    return Exit.OK


def _oldest(log: _log.Log, start: int) -> int | None:
    """When the first event at or above `start` was received, unix ns."""
    for found in walk(log, start, log.committed):
        if isinstance(found, _log.Record) and found.kind == _log.DATA:
            return found.received_at_ns
    return None


def _make_way(files: _Files) -> None:
    """Take away what an interrupted run has left; a backup is nobody's leftover."""
    files.new.unlink(missing_ok=True)
    if not files.before.exists():
        return
    if not files.before.samefile(files.log):
        raise CannotResize(
            f"{files.before} is there from an earlier resize; remove it, or move it away, and try"
            " again"
        )
    files.before.unlink()


def _check_room(files: _Files, log: _log.Log, capacity_bytes: int) -> None:
    disk = os.statvfs(files.log.parent)
    free, needed = disk.f_bavail * disk.f_frsize, capacity_bytes + files.log.stat().st_blksize * 4
    if free < needed:
        raise CannotResize(
            f"{files.log.parent}: {size(needed)} are needed beside the old file, and {size(free)}"
            " are free; free some space, or choose a smaller --capacity"
        )


def _write(files: _Files, log: _log.Log, capacity_bytes: int) -> int:
    """The new file, whole. Returns the position from which on records are in it."""
    try:
        with progress("writing the new log", capacity_bytes) as show:
            return log.resize(str(files.new), capacity_bytes, show)
    except _log.LogError as error:
        if error.errno == errno.ENOSPC:
            step = "free some space, or choose a smaller --capacity"
        elif error.errno in (errno.EPERM, errno.EACCES):
            step = "run this as root or as the user that the gateway runs as"
        elif error.errno:
            step = "look at the disk"
        else:
            step = (
                "let the gateway run until the broker has taken what waits, or choose a larger"
                " --capacity"
            )
        raise CannotResize(f"{error}; nothing was changed; {step}") from None


def _swap(files: _Files) -> None:
    """The new file takes the name; the old one keeps another."""
    try:
        os.link(files.log, files.before)
    except OSError as error:
        files.new.unlink()
        raise CannotResize(
            f"{files.before}: {error.strerror}; nothing was changed; the folder's file system must"
            " have hard links"
        ) from None
    sync_folder(files.log.parent)
    # From here the gateway's next start takes the new one.
    os.rename(files.new, files.log)
    sync_folder(files.log.parent)
