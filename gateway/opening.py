"""Before the first child: the log's folder and file, recovery, and the listening sockets.

    directory 0700, locked ─▶ gateway.log, when there is none
                   ─▶ Log.open: lock (wait ≤ 5 s for dying children of the last supervisor),
                      recovery, new epoch
                        └─ damage below the watermark: copy the file aside first, say so, go on

The log makes its file under another name and renames it when it is whole.
"""

import errno
import fcntl
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from gateway import _log, books, listeners
from gateway.config import Config
from gateway.errors import ConfigError, Exit, GatewayError, PortBusy
from gateway.log_tools import count, private, progress, sync_folder
from gateway.settings import FILE, PLACES

LOCK_WAIT_S: Final = 5.0
BACKLOG: Final = listeners.BACKLOG
MIB: Final = 1 << 20

_logger: Final = logging.getLogger(__name__)


class DirectoryLocked(GatewayError):
    """Another gateway has the log."""

    exit_code = Exit.LOCKED

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"{directory} is locked: is another gateway running on this directory? Stop it, or"
            " name another folder with log.directory"
        )


class LogUnusable(GatewayError):
    """The log cannot be made or opened."""

    exit_code = Exit.LOG_UNUSABLE


class Opened(NamedTuple):
    """The recovered log, and what keeps others away from it."""

    log: _log.Log
    lock_fd: int
    """Of the log: every child inherits it."""
    folder_fd: int
    """Of its folder: locked as long as the supervisor holds it."""


def open_log(config: Config) -> Opened:
    """Make the folder and the log where there are none, lock both, recover."""
    path = config.log.path
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder_fd = lock_folder(path.parent)
        if not path.exists():
            _create(path, config.log.capacity_bytes)
        lock_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise LogUnusable(
            f"{error.filename or path}: {error.strerror}{_next_step(error.errno)}"
        ) from None
    try:
        log = _open(path, lock_fd, config)
    except _log.NotALog as error:
        raise LogUnusable(
            f"{error}; move {path} away, or name another folder with log.directory"
        ) from None
    if log.capacity_bytes != config.log.capacity_bytes:
        _logger.warning(
            "log.capacity_bytes = %d has no effect: %s was made with %d, and keeps it. To change"
            " it, stop the gateway and run `gateway log resize`",
            config.log.capacity_bytes,
            path,
            log.capacity_bytes,
        )
    log.set_water(
        int(log.capacity_bytes * config.log.high_water),
        int(log.capacity_bytes * config.log.low_water),
    )
    # the file sink reads what is durable: who waits for it is waited for by the next sync
    log.sinks_want_durable = FILE in config.sinks and config.file.required
    _report(path, log)
    return Opened(log, lock_fd, folder_fd)


def _next_step(number: int | None) -> str:
    """What to do about an errno, for the end of a message."""
    match number:
        case None:
            return ""
        case errno.ENOSPC | errno.EDQUOT:
            return "; free some space, or choose a smaller log.capacity_bytes"
        case errno.EEXIST | errno.ENOTDIR:
            return "; log.directory must be a folder"
        case errno.EMFILE | errno.ENFILE:
            return "; raise the limit of open files (ulimit -n)"
        case errno.ENOMEM | errno.EAGAIN:
            return "; free some memory, or choose a smaller log.capacity_bytes"
        case errno.EIO | errno.ENXIO | errno.ENODEV | errno.EUCLEAN:
            return (
                "; the disk fails (dmesg | tail, smartctl -a): another start does not help before"
                " it is mended. Copy log.directory away first: what was durable is in there"
            )
        case _:
            return "; it is in log.directory: name a folder that this user can write to"


def _create(path: Path, capacity_bytes: int) -> None:
    _logger.info("making %s: %d MiB, once", path, capacity_bytes // MIB)
    with progress("making the log", capacity_bytes) as show:
        _log.create(str(path), capacity_bytes, show)


def lock_folder(directory: Path) -> int:
    """One gateway a folder, also when gateway.log is moved away or replaced under a running one."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    patiently(directory, BlockingIOError, lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
    return fd


def patiently(directory: Path, locked: type[Exception], attempt: Callable[[], Any]) -> Any:
    """`attempt` until it does not raise `locked`; DirectoryLocked after LOCK_WAIT_S."""
    until = 0.0
    while True:
        try:
            return attempt()
        except locked:
            now = time.monotonic()
            if not until:
                until = now + LOCK_WAIT_S
                _logger.info(
                    "%s is locked; waiting up to %d s for the last gateway to end",
                    directory,
                    LOCK_WAIT_S,
                )
            elif now > until:
                raise DirectoryLocked(directory) from None
            time.sleep(0.05)


def _open(path: Path, lock_fd: int, config: Config) -> _log.Log:
    accept_corruption = False

    def attempt() -> _log.Log:
        return _log.Log.open(
            str(path),
            lock_fd,
            config.sinks,
            accept_corruption,
            config.required,
            config.log.forget_sink,
        )

    while True:
        try:
            log: _log.Log = patiently(path.parent, _log.LogLocked, attempt)
            return log
        except _log.LogCorrupt as damage:
            if accept_corruption:
                raise LogUnusable(str(damage)) from None
            _set_aside(path, damage)
            accept_corruption = True
        except _log.NotALog:
            raise
        except _log.LogError as error:
            if error.errno == errno.EINVAL:
                _refuse_to_forget(path, config)
            raise LogUnusable(f"{error}{_next_step(error.errno)}") from None


def _refuse_to_forget(path: Path, config: Config) -> None:
    """A sink that is not configured any more, and for which events wait, is given up by name only.
    Raises LogUnusable when there is one."""
    found = _log.Log.scan(str(path))
    for sink, name in books.sinks(found):
        waiting = found.committed_ordinal - found.cursor(sink).ordinal
        if name not in config.sinks and waiting:
            raise LogUnusable(
                f"{path}: {count(waiting, 'event')} {'waits' if waiting == 1 else 'wait'} for the"
                f" sink {name}, which is not configured any more: configure it again"
                f" ({PLACES.get(name, name)}), or give up what waits with --set"
                f" log.forget_sink={name}"
            )


def _set_aside(path: Path, damage: _log.LogCorrupt) -> None:
    """Keep what is there now: the new epoch writes over the damage."""
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = path.with_name(f"{path.name}.corrupt-{now}")
    for number in itertools.count(2):  # a copy of other damage is not written over
        if not aside.exists():
            break
        aside = path.with_name(f"{path.name}.corrupt-{now}-{number}")
    partial = aside.with_name(aside.name + ".partial")
    found = damage.recovery
    _logger.critical(
        "%s: damage below the durable watermark (%s bytes in %s); copying the file to %s, then"
        " going on without it",
        path,
        found.corrupt_bytes if found else "?",
        ", ".join(f"{start}-{end}" for start, end in found.corrupt) if found else "?",
        aside,
    )
    try:
        with open(path, "rb") as source, open(partial, "wb", opener=private) as copy:
            size = os.fstat(source.fileno()).st_size
            with progress("copying the damaged log", size) as show:
                _copy(source.fileno(), copy.fileno(), size, show)
            os.fsync(copy.fileno())
        os.rename(partial, aside)
        sync_folder(path.parent)  # its name is on the disk before the damage is written over
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LogUnusable(
            f"{path} is damaged, and there is no room for a copy at {aside} ({error.strerror});"
            f" free {path.stat().st_size // MIB} MiB or move {path} away"
        ) from None


def _copy(source: int, target: int, size: int, show: Callable[[int], None]) -> None:
    """By reflink where the file system can; pages of zeros are left as holes elsewhere."""
    done = 0
    try:
        while done < size:
            count = os.copy_file_range(source, target, min(64 * MIB, size - done))
            if count == 0:
                break
            done += count
            show(done)
        return
    except OSError as error:
        if done or error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    os.truncate(target, size)
    while done < size:
        block = os.pread(source, MIB, done)
        if not block:
            break
        if block.count(0) != len(block):
            os.pwrite(target, block, done)
        done += len(block)
        show(done)


def _report(path: Path, log: _log.Log) -> None:
    found = log.recovery
    if found is None:
        return
    _logger.info(
        "%s: %d MiB, epoch %d, %d events in %d bytes to deliver",
        path,
        log.capacity_bytes // MIB,
        found.epoch,
        found.records,
        found.bytes,
    )
    if found.torn_bytes:
        _logger.warning(
            "%s: %d torn bytes were skipped: after a kill nothing is lost with them; after a power"
            " cut perhaps the last that was answered ack=enqueue",
            path,
            found.torn_bytes,
        )
    if found.corrupt_bytes:
        _logger.critical(
            "%s: %d bytes that were durable are damaged and lost", path, found.corrupt_bytes
        )


# ---- sockets -------------------------------------------------------------------------------------


def bind(config: Config) -> list[socket.socket]:
    """One socket a worker, bound and not listening yet. A first bind without SO_REUSEPORT finds a
    port that is taken, by another gateway too."""
    host, port = config.http.host, config.http.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"http.host: {host}: {error.strerror}") from None
    except UnicodeError:
        raise ConfigError(f"http.host: {host} is no name: a label is empty or too long") from None
    family, _, _, _, address = found[0]
    _probe(family, address, host, port, "http.port")
    sockets = [listeners.bound(family, address) for _ in range(config.http.workers)]
    broker = config.mqtt.broker
    if broker is not None and broker.embedded:
        port = config.mqtt.embedded_port
        _probe(socket.AF_INET, ("127.0.0.1", port), "127.0.0.1", port, "mqtt.embedded_port")
    return sockets


def _probe(family: int, address: tuple[object, ...], host: str, port: int, setting: str) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortBusy(host, port, setting) from None
            if error.errno == errno.EADDRNOTAVAIL:
                setting = "http.host"  # the embedded broker's host is always there
            raise ConfigError(
                f"{setting}: cannot listen on {host}:{port}: {error.strerror}"
            ) from None
