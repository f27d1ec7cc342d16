"""Dead letters: the events that a broker will never take, in files that a power cut does not hurt.

    <log.directory>/dead-letters/      0700
        .lock                          flock, held for one append or one rewrite
        000001.ndjson ...              0600, one JSON object a line, oldest first

    {"log":"7b...","epoch":3,"lsn":4096,"sink":"mqtt","device_id":"boiler-7",
     "topic":"telemetry/boiler-7","reason":135,"reason_name":"not authorized","text":"...",
     "received_at":"...","dead_lettered_at":"...","seq":1,"boot":null,"attempts":1,
     "body":"{\\"metrics\\":{}}"}

`body` gives the original bytes back exactly; bytes that are no UTF-8 stand in `body_base64`.
(log, epoch, lsn, sink) names an event: the same one on two lines counts once.

The order of events, and what a crash between two of them leaves

    append ─▶ fdatasync ─▶ mark in the log ─▶ the cursor passes
           │             │                  └ a line on file, an event marked: passed at the start
           │             └ a line on file: the next start marks it, and it is passed
           └ perhaps a part of a line at the end: cut at the next append or start. Whole lines stay:
             they are synced and marked at the next start (`mark_in`)

A failed write or sync is undone by cutting the file to what it was. A file whose fdatasync failed
is never written again: its next fdatasync could say yes for pages that are gone.

A file is closed at `file_bytes_max` and the next number begun. With `files_max` files, "hold"
raises DeadLettersFull, "drop_oldest" removes the oldest file.
"""

import base64
import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from gateway._log import Log, Record
from gateway.config import Config
from gateway.log_tools import sync_folder, timestamp
from gateway.mqtt import REASONS

FOLDER: Final = "dead-letters"
"""Beside the log."""
POISON: Final = "poison"
"""Name of the reason of an event that broke connections."""
LOCK_WAIT_S: Final = 5.0
"""A tool that rewrites files holds the lock no longer than this."""

LOGGER = logging.getLogger("gateway.dead_letters")

Key = tuple[str, int, int, str]
"""log, epoch, lsn, sink."""


class DeadLettersFull(Exception):
    """All files are full and `dead_letters.when_full` is "hold"."""

    def __init__(self, folder: Path, files: int) -> None:
        super().__init__(
            f"the dead-letter files are full: {files} in {folder}; look at them with `gateway"
            " dead-letters ls`, then `gateway dead-letters requeue` or `drop`"
        )
        self.folder = folder


class DeadLetter(NamedTuple):
    """An event to set aside, as the publisher knows it."""

    record: Record
    topic: str
    reason: int | None
    """Reason code of MQTT 5 (2.4); None: the connection broke without one."""
    poison: bool
    """It broke connections; else it was refused, or could not be sent at all."""
    text: str
    """The broker's words: printable, bounded."""
    attempts: int
    """How often it was sent for this verdict."""


class Shelf(Protocol):
    """Where the publisher puts dead letters."""

    def append(self, letters: Sequence[DeadLetter]) -> int:
        """Keep the first ones; returns how many of them are durable now, at least one. Blocks.
        Raises DeadLettersFull or OSError when none is."""


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of a file."""

    log: str
    """Identity, 16 hexadecimal digits."""
    epoch: int
    lsn: int
    sink: str
    device_id: str
    topic: str
    reason: int | None
    reason_name: str
    text: str
    received_at: str
    """RFC 3339, UTC, nanoseconds."""
    dead_lettered_at: str
    seq: int | None
    boot: int | None
    attempts: int
    body: str | None
    body_base64: str | None = None

    @property
    def key(self) -> Key:
        """What names the event."""
        return self.log, self.epoch, self.lsn, self.sink

    @property
    def payload(self) -> bytes:
        """The body as the device sent it. Raises ValueError."""
        if self.body_base64 is not None:
            return base64.b64decode(self.body_base64, validate=True)
        if self.body is None:
            raise ValueError("a dead letter without a body")
        return self.body.encode()


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Line).decode
rfc3339_ns: Final = timestamp


def unix_ns(text: str) -> int:
    """The other way round. Raises ValueError."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{9})Z", text)
    if match is None:
        raise ValueError(f"{text!r} is not a time with nanoseconds in UTC")
    return int(datetime.fromisoformat(match[1] + "+00:00").timestamp()) * 10**9 + int(match[2])


# ---- files ------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """The files, oldest first; none when there is no folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    numbers = sorted(int(name[:-7]) for name in names if re.fullmatch(r"\d{6,}\.ndjson", name))
    return [folder / f"{number:06d}.ndjson" for number in numbers]


def total_bytes(folder: Path) -> int:
    """Size of all files; one that vanishes meanwhile counts nothing."""
    total = 0
    for path in files(folder):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


class Damaged(NamedTuple):
    """A line that cannot be read. It is kept, and said."""

    path: Path
    number: int
    """From 1."""


def lines(path: Path) -> Iterator[tuple[bytes, Line | Damaged]]:
    """Each line with its bytes; a part of a line at the end, which nobody was promised, is left
    out. Nothing when the file is gone."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                yield raw, _decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError):
                yield raw, Damaged(path, number)


def every_line(folder: Path) -> Iterator[Line | Damaged]:
    """The lines of all files, oldest first; an event counts once."""
    seen: set[Key] = set()
    for path in files(folder):
        for _, line in lines(path):
            if isinstance(line, Line):
                if line.key in seen:
                    continue
                seen.add(line.key)
            yield line


@contextlib.contextmanager
def locked(folder: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Hold the lock of the folder. Raises TimeoutError, OSError."""
    with contextlib.suppress(FileExistsError):
        os.close(_made(folder / ".lock"))
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(
                        f"{folder} has been locked for {wait_s:g} s: is a `gateway dead-letters`"
                        " command stopped there?"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _made(path: Path) -> int:
    """A new file, open. Root gives it to the folder's owner: the gateway must be able to open what
    an operator's tool leaves."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # nobody else may
        owner = path.parent.stat()
        os.fchown(fd, owner.st_uid, owner.st_gid)
    return fd


def rewrite(folder: Path, keep: Callable[[Line], bool], file_bytes_max: int) -> int:
    """Take lines out: under the lock, write-new, fsync, rename. Returns how many events went.
    Damaged lines stay; files that fit into one are put together, which makes room for new ones.

    A crash leaves whole files; between putting two together and removing one, its lines stand
    twice, and count once."""
    gone: set[Key] = set()
    seen: set[Key] = set()
    with locked(folder):
        for leftover in folder.glob("*.new"):
            leftover.unlink()
        for path in files(folder):
            out: set[int] = set()
            for number, (_, line) in enumerate(lines(path)):
                if not isinstance(line, Line):
                    continue
                if line.key in seen or line.key in gone:
                    out.add(number)
                elif keep(line):
                    seen.add(line.key)
                else:
                    out.add(number)
                    gone.add(line.key)
            if out:
                rows = (raw for number, (raw, _) in enumerate(lines(path)) if number not in out)
                _replace(path, rows)
        older: Path | None = None
        for path in files(folder):
            if older is not None:
                room = file_bytes_max - path.stat().st_size
                if older.stat().st_size <= room:
                    _replace(path, (raw for each in (older, path) for raw, _ in lines(each)))
                    older.unlink()
            older = path
        sync_folder(folder)
    return len(gone)


def _replace(path: Path, rows: Iterator[bytes]) -> None:
    """An empty file goes away."""
    new = path.with_suffix(".new")
    fd = _made(new)
    try:
        with open(fd, "wb") as file:
            file.writelines(rows)
            file.flush()
            os.fsync(fd)
    except OSError as error:
        new.unlink()  # a full disk must not be fuller for it
        raise OSError(error.errno, error.strerror, str(new)) from None
    os.rename(new, path)
    if path.stat().st_size == 0:
        path.unlink()


def _write_all(fd: int, data: bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# ---- the writer -------------------------------------------------------------------------------


class DeadLetters:
    """The files of one log's sink, for the delivery process. Keeps no descriptor and trusts no
    memory of the folder: a tool may have rewritten it since. One thread at a time."""

    @classmethod
    def of(cls, config: Config, identity: int, sink: str) -> "DeadLetters":
        """Those of the log of `config`."""
        kept = config.dead_letters
        return cls(
            config.log.path.parent / FOLDER,
            identity,
            sink,
            file_bytes_max=kept.file_bytes_max,
            files_max=kept.files_max,
            when_full=kept.when_full,
        )

    def __init__(
        self,
        folder: Path,
        identity: int,
        sink: str,
        *,
        file_bytes_max: int,
        files_max: int,
        when_full: Literal["hold", "drop_oldest"],
    ) -> None:
        self.folder = folder
        self.dropped = 0
        """Dead letters that went with a file that was removed to make room."""
        self._log, self._sink = f"{identity:016x}", sink
        self._file_bytes_max, self._files_max = file_bytes_max, files_max
        self._when_full = when_full
        self._spoiled: set[Path] = set()

    def append(self, letters: Sequence[DeadLetter]) -> int:
        """See `Shelf`: some of the first ones may be durable when the rest has no room."""
        now = rfc3339_ns(time.time_ns())
        rows = [_encode(self._line(letter, now)) + b"\n" for letter in letters]
        done = 0
        self._make_folder()
        with locked(self.folder):
            try:
                while done < len(rows):
                    path, size = self._target(len(rows[done]))
                    end, data = done + 1, bytearray(rows[done])
                    while (
                        end < len(rows)
                        and size + len(data) + len(rows[end]) <= self._file_bytes_max
                    ):
                        data += rows[end]
                        end += 1
                    self._append(path, size, data)
                    done = end
            except (DeadLettersFull, OSError):
                if not done:
                    raise
        return done

    def mark_in(self, log: Log) -> int:
        """At the start: mark in the log what is on file and whose mark a crash may have taken, so
        that it is neither sent nor written again. Returns how many. Raises OSError.

        Who has opened the log, and lets nobody write yet, marks all that the ring still holds: a
        power cut in the middle of a sync may have kept a cursor and lost the mark below it. Others
        mark what no producer may write over, at or above `reclaim`."""
        sink, marked = log.sink(self._sink), 0
        from_lsn = log.reclaim if log.recovery is None else max(0, log.tail - log.capacity_bytes)
        for epoch, lsn in self._on_file(from_lsn):
            marked += log.mark_dead(sink, lsn, epoch)
        return marked

    def _on_file(self, from_lsn: int) -> Iterator[tuple[int, int]]:
        """(epoch, lsn) of the dead letters of this log's sink, synced before the first one is told.
        Newest file first; ends behind a file in which all are below `from_lsn`."""
        if not self.folder.exists():
            return
        with locked(self.folder):
            paths = files(self.folder)
            if paths:  # only the newest one can have lines that were not synced
                fd = os.open(paths[-1], os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    self._cut_torn_end(fd, paths[-1])
                    os.fdatasync(fd)
                finally:
                    os.close(fd)
        for path in reversed(paths):
            highest = -1
            for _, line in lines(path):
                if isinstance(line, Damaged):
                    LOGGER.error("%s: line %d cannot be read; it is left as it is", *line)
                elif line.log == self._log and line.sink == self._sink:
                    highest = max(highest, line.lsn)
                    yield line.epoch, line.lsn
            if 0 <= highest < from_lsn:
                return

    def _line(self, letter: DeadLetter, now: str) -> Line:
        record = letter.record
        body: str | None
        try:
            body, encoded = record.body.decode(), None
        except UnicodeDecodeError:
            body, encoded = None, base64.b64encode(record.body).decode()
        if letter.poison:
            name = POISON
        else:
            name = REASONS.get(letter.reason or 0, "unknown reason")
        return Line(
            log=self._log,
            epoch=record.epoch,
            lsn=record.lsn,
            sink=self._sink,
            device_id=record.device_id,
            topic=letter.topic,
            reason=letter.reason,
            reason_name=name,
            text=letter.text,
            received_at=rfc3339_ns(record.received_at_ns),
            dead_lettered_at=now,
            seq=record.seq,
            boot=record.boot,
            attempts=letter.attempts,
            body=body,
            body_base64=encoded,
        )

    def _make_folder(self) -> None:
        try:
            os.mkdir(self.folder, 0o700)
        except FileExistsError:
            return
        sync_folder(self.folder.parent)

    def _target(self, row_bytes: int) -> tuple[Path, int]:
        """The file for the next row, and its size."""
        paths = files(self.folder)
        if paths and paths[-1] not in self._spoiled:
            fd = os.open(paths[-1], os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                size = self._cut_torn_end(fd, paths[-1])
            finally:
                os.close(fd)
            if size == 0 or size + row_bytes <= self._file_bytes_max:
                return paths[-1], size
        number = int(paths[-1].stem) + 1 if paths else 1
        while len(paths) >= self._files_max:
            if self._when_full == "hold":
                raise DeadLettersFull(self.folder, len(paths))
            self._drop(paths.pop(0))
        path = self.folder / f"{number:06d}.ndjson"
        os.close(_made(path))
        sync_folder(self.folder)
        return path, 0

    def _drop(self, path: Path) -> None:
        with path.open("rb") as file:
            count = sum(1 for _ in file)
        path.unlink()
        self._spoiled.discard(path)
        self.dropped += count
        LOGGER.error(
            "%s removed with %d dead letters to make room: dead_letters.when_full = drop_oldest",
            path,
            count,
        )

    @staticmethod
    def _cut_torn_end(fd: int, path: Path) -> int:
        """Cut a part of a line at the end; returns the size."""
        size = end = os.fstat(fd).st_size
        while end and os.pread(fd, 1, end - 1) != b"\n":
            start = max(0, end - 65536)
            end = start + os.pread(fd, end - start, start).rfind(b"\n") + 1
        if end != size:
            os.ftruncate(fd, end)
            LOGGER.warning("%s: cut a torn line of %d bytes at its end", path, size - end)
        return end

    def _append(self, path: Path, size: int, data: bytearray) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        written = False
        try:
            _write_all(fd, data)
            written = True
            os.fdatasync(fd)  # durable from here: the cursor may pass these events
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)
            if size == 0:
                with contextlib.suppress(OSError):
                    path.unlink()
            elif written:
                self._spoiled.add(path)
            raise
        finally:
            os.close(fd)
