"""The files of the file sink on disk: names, and what is found there after a crash.

    <file.directory>/                                   0700 when it is made here
      events-<log>-<first>-<last>.ndjson[.zst]          finished: synced, renamed, name synced
      events-<log>-<first>.ndjson[.zst].part            the one that is written, at most one

`<log>` is the log's identity in 16 hex digits: files of other gateways in the same folder are never
touched. `<first>` and `<last>` are the lsn of its lines, in 20 digits, so that names sort. Files
are 0600. A line:

    {"device_id":"<id>","received_at":"<RFC 3339, UTC, ns>","lsn":<integer>,"event":<as sent>}\\n

Compressed, a file is a row of zstd frames (RFC 8878), a frame for each run of lines that was synced
together, with its size in its header and a checksum at its end.

What is known of a `.part` after a crash: lines below the cursor were synced before the cursor
moved; what follows may be torn, whole, or zeros. So `Part.reopen` cuts there, unless the last whole
line is one that the log does not have: then the log was put back from an older copy, the line may
be the only one of its event, and the file is set aside as it is. Where it cuts:

    plain   behind the last line below the cursor. Lines rise, so it is found by halves: a part of
            any size costs some forty short reads
    zstd    behind the last frame that begins below the cursor. Cursors move from frame to frame; if
            one lies inside all the same, the rest of its frame is whole (checksum), and is passed
            when the log is read (`Part.last`)
"""

import bisect
import contextlib
import errno
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from backports import zstd

Pread = Callable[[int, int], bytes]
"""(bytes, offset) -> what is there; shorter at the end."""

LINE_BYTES_MAX: Final = 2 << 20
"""No line is longer: a record is at most 1 MiB. What is longer in a file is no line."""
FRAME_BYTES_MAX: Final = 4 << 20
"""The same for a compressed run: below 1 MiB of lines, and one fill of the log's."""
ZSTD_LEVEL: Final = 3
"""zstd's own default: higher ones cost more time than they save bytes."""
_OPTIONS: Final[dict[int, int]] = {
    zstd.CompressionParameter.compression_level: ZSTD_LEVEL,
    zstd.CompressionParameter.checksum_flag: 1,
}
_STEP_BYTES: Final = 64 * 1024
_SCAN_BYTES: Final = 2 * FRAME_BYTES_MAX

_HEAD: Final = re.compile(
    rb'\{"device_id":"[A-Za-z0-9_-]{1,64}","received_at":"([^"]{20,35})","lsn":(\d{1,20}),"event":'
)
_NAME: Final = re.compile(
    r"events-([0-9a-f]{16})-(\d{20})(?:-(\d{20}))?\.ndjson(\.zst)?(\.part)?", re.ASCII
)


class Entry(NamedTuple):
    """A file of this log's, by its name."""

    first: int
    last: int | None
    """None: it is a `.part`."""
    compressed: bool
    name: str


def name_of(identity: int, first: int, last: int | None, compressed: bool) -> str:
    """The name of a finished file; of a `.part` when `last` is None."""
    end = ".part" if last is None else ""
    until = "" if last is None else f"-{last:020d}"
    return f"events-{identity:016x}-{first:020d}{until}.ndjson{'.zst' if compressed else ''}{end}"


def pread_of(data: bytes) -> Pread:
    """The same of bytes in memory."""
    return lambda n, at: data[at : at + n]


def lsn_of(line: bytes) -> int | None:
    """The lsn of a line, or of its beginning; None: it is no line."""
    head = _HEAD.match(line)
    return None if head is None else int(head[2])


def line_start(lines: bytes | memoryview, end: int) -> int:
    """Where the line begins whose last byte stands before `end`. Copies no more than that line and
    one step."""
    at = end - 1
    while at > 0:
        low = max(0, at - 4096)
        found = bytes(lines[low:at]).rfind(b"\n")
        if found >= 0:
            return low + found + 1
        at = low
    return 0


def last_whole(lines: bytes) -> bytes:
    """The last line that is one, whatever stands behind it; b"": there is none."""
    for line in reversed(lines.splitlines(keepends=True)):
        if line.endswith(b"\n") and lsn_of(line) is not None:
            with contextlib.suppress(ValueError):  # zeros in its middle
                msgspec.json.decode(line)
                return line
    return b""


def end_below(pread: Pread, size: int, bound: int) -> int:
    """The end of the last line whose lsn is below `bound`: 0, or behind a line end.

    The lines below rise in their lsn and stand at the beginning; what follows may be anything."""
    low, high = 0, size
    while low < high:
        middle = (low + high) // 2
        start = _behind_line(pread, middle - 1, size) if middle else 0
        end = None if start is None or start >= high else _behind_line(pread, start, size)
        if start is not None and end is not None and not _not_below(pread(256, start), bound):
            low = end
        else:
            high = middle
    return low


def _behind_line(pread: Pread, at: int, size: int) -> int | None:
    """Behind the first line end at or after `at`; None: there is none near enough."""
    until = min(size, at + LINE_BYTES_MAX)
    while at < until:
        found = pread(_STEP_BYTES, at).find(b"\n")
        if found >= 0:
            return at + found + 1
        at += _STEP_BYTES
    return None


def frames(pread: Pread, size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the whole frames from the beginning on; ends where there is none."""
    at = 0
    while at < size:
        data = memoryview(pread(_SCAN_BYTES, at))  # slices of it are not copies
        begin = at
        while at - begin < len(data):
            try:
                length = zstd.get_frame_size(data[at - begin :])
            except zstd.ZstdError:
                break
            yield at, length
            at += length
        if at == begin:
            return


def inflated(pread: Pread, frame: tuple[int, int]) -> bytes:
    """The lines of a frame; b"" when it is damaged."""
    try:
        return zstd.decompress(pread(frame[1], frame[0]))
    except zstd.ZstdError:
        return b""


class Folder:
    """The folder, and the names of one log in it."""

    def __init__(self, path: Path, identity: int) -> None:
        self.path, self.identity = path, identity
        self._fd = -1

    def open(self) -> None:
        """Make it when it is not there; hold on to what is there now. Raises OSError."""
        self.close()
        there = next(parent for parent in self.path.parents if parent.exists())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
        for parent in self.path.parents:  # also when it was there: who made it may have been killed
            with contextlib.suppress(PermissionError):  # not ours to read, so not made by us
                _sync_folder(parent)
            if parent == there:
                break
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def entries(self) -> tuple[list[Entry], list[Entry]]:
        """Finished files and `.part`s of this log, oldest first."""
        finished: list[Entry] = []
        parts: list[Entry] = []
        for name in os.listdir(self._fd):
            match = _NAME.fullmatch(name)
            if match is None or int(match[1], 16) != self.identity:
                continue
            last = None if match[3] is None else int(match[3])
            entry = Entry(int(match[2]), last, match[4] is not None, name)
            if (last is None) == (match[5] is not None):
                (parts if last is None else finished).append(entry)
        return sorted(finished), sorted(parts)

    def open_file(self, name: str, flags: int) -> int:
        """A descriptor of a regular file. Raises OSError, also for a symbolic link."""
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", name)
        return fd

    def sync(self) -> None:
        """Names that were added, replaced or removed are durable from here."""
        os.fsync(self._fd)

    def rename(self, old: str, new: str) -> None:
        """Raises OSError; FileExistsError rather than to replace a file."""
        try:
            os.stat(new, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        else:
            raise FileExistsError(errno.EEXIST, "a file stands there", new)

    def unlink(self, name: str) -> None:
        """Raises OSError."""
        os.unlink(name, dir_fd=self._fd)

    def expect(self, name: str, fd: int, size: int) -> None:
        """Raises FileNotFoundError when the file `fd` is not what a user finds by that name: it, or
        the folder, was removed, replaced or cut, and what is written to `fd` nobody can find."""
        own = os.fstat(fd)
        try:
            found = os.stat(self.path / name, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if (
            found is None
            or (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino)
            or own.st_size != size
        ):
            raise FileNotFoundError(
                errno.ENOENT, "removed, replaced or cut while it was written", name
            )

    def set_aside(self, entry: Entry) -> str:
        """Give a file a name that is none of this log's; returns it. Raises OSError."""
        for number in itertools.count(1):
            name = f"other-{f'{number}-' if number > 1 else ''}{entry.name.removesuffix('.part')}"
            with contextlib.suppress(FileExistsError):  # of an earlier time
                self.rename(entry.name, name)
                break
        self.sync()
        return name

    def remove_oldest(self, files_max: int) -> int:
        """Remove finished files beyond `files_max`; 0 keeps all. Returns how many went. Raises
        OSError."""
        finished = self.entries()[0] if files_max else []
        gone = finished[: max(0, len(finished) - files_max)]
        for entry in gone:
            self.unlink(entry.name)
        return len(gone)

    def last_line(self, entry: Entry) -> bytes:
        """Of a finished file; b"" when it has none that can be read. Raises OSError."""
        fd = self.open_file(entry.name, os.O_RDONLY)
        try:

            def pread(n: int, at: int) -> bytes:
                return os.pread(fd, n, at)

            size = os.fstat(fd).st_size
            if entry.compressed:
                lines = inflated(pread, max(frames(pread, size), default=(0, 0)))
            else:
                lines = pread(LINE_BYTES_MAX, max(0, size - LINE_BYTES_MAX))
            return lines[line_start(lines, len(lines)) :]
        finally:
            os.close(fd)


class NotLogged(Exception):
    """A line of a `.part` is not of this log's history."""


class Part:
    """The file that is written. Its lines are safe once `sync` has returned."""

    def __init__(self, folder: Folder, fd: int, entry: Entry) -> None:
        self._folder, self._fd, self.entry = folder, fd, entry
        self.lines_bytes = 0
        """Before compression."""
        self.last = entry.first
        """The lsn of the last line."""
        self.last_line = b""
        """Of a part that was found."""
        self.first_received_s = 0.0
        """Of a part that was found: unix seconds."""
        self._bytes = self._synced_bytes = 0
        self._gathered: list[bytes] = []
        self._name_synced = False

    @classmethod
    def begin(cls, folder: Folder, first: int, compressed: bool) -> "Part":
        """A new file. Raises OSError."""
        name = name_of(folder.identity, first, None, compressed)
        fd = folder.open_file(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        return cls(folder, fd, Entry(first, None, compressed, name))

    @classmethod
    def reopen(
        cls, folder: Folder, entry: Entry, cursor: int, is_logged: Callable[[int, bytes], bool]
    ) -> "Part | None":
        """What a crash left, cut as said above; None: nothing stayed, and it is removed. Raises
        OSError; NotLogged, when a whole line behind the cut is not what the log has at its lsn:
        then the file is as it was."""
        fd = folder.open_file(entry.name, os.O_RDWR | os.O_APPEND)
        try:
            part = cls(folder, fd, entry)
            end = part._cut(cursor, is_logged)
            if end:
                return part
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        folder.unlink(entry.name)
        return None

    def _cut(self, cursor: int, is_logged: Callable[[int, bytes], bool]) -> int:
        fd = self._fd

        def pread(n: int, at: int) -> bytes:
            return os.pread(fd, n, at)

        size = os.fstat(fd).st_size
        if self.entry.compressed:
            whole = list(frames(pread, size))
            keep = bisect.bisect_left(
                whole, True, key=lambda frame: _not_below(inflated(pread, frame), cursor)
            )
            end = sum(whole[keep - 1]) if keep else 0
            lines = inflated(pread, whole[keep - 1]) if keep else b""
            self.lines_bytes = sum(
                zstd.get_frame_info(pread(32, at)).decompressed_size or 0 for at, _ in whole[:keep]
            )
            first = inflated(pread, whole[0])[:256] if keep else b""
            behind = next(filter(None, (inflated(pread, x) for x in reversed(whole[keep:]))), b"")
        else:
            end = self.lines_bytes = end_below(pread, size, cursor)
            low = max(0, end - LINE_BYTES_MAX)
            lines = pread(end - low, low)
            first = pread(256, 0)
            behind = pread(LINE_BYTES_MAX, max(end, size - LINE_BYTES_MAX))
        line = last_whole(behind)
        if line and not is_logged(lsn_of(line) or 0, line):
            raise NotLogged
        self._bytes = self._synced_bytes = end
        self.last_line = lines[line_start(lines, len(lines)) :]
        self.last = lsn_of(self.last_line) or self.last
        self.first_received_s = _received_s(first)
        if end < size:
            os.ftruncate(fd, end)
        return end

    def write(self, lines: bytes | memoryview) -> None:
        """Whole lines. Raises OSError; then the end of the file is unknown."""
        if self.entry.compressed:
            self._gathered.append(bytes(lines))
        else:
            self._write(lines)
        self.lines_bytes += len(lines)
        self.last = lsn_of(bytes(lines[(at := line_start(lines, len(lines))) : at + 256])) or 0

    def _write(self, data: bytes | memoryview) -> None:
        self._bytes += len(data)
        left = memoryview(data)
        while left:
            left = left[os.write(self._fd, left) :]

    def sync(self) -> None:
        """What was written is durable, and can be found, from here. Raises OSError; then this
        descriptor is not to be trusted again: its next sync could say yes for pages that are gone.
        """
        if self._gathered:
            self._write(zstd.compress(b"".join(self._gathered), options=_OPTIONS))
            self._gathered.clear()
        os.fdatasync(self._fd)
        if not self._name_synced:
            self._folder.sync()
            self._name_synced = True
        self._folder.expect(self.entry.name, self._fd, self._bytes)
        self._synced_bytes = self._bytes

    def finish(self) -> None:
        """Close a synced file under its final name. Raises OSError."""
        first, _, compressed, name = self.entry
        self._folder.rename(name, name_of(self._folder.identity, first, self.last, compressed))
        self._folder.sync()
        self.close()

    def give_up(self) -> None:
        """After trouble: take out what is not synced, if that can be done, and let go of it. A line
        that a full disk cut in two does not stand there until there is room."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._synced_bytes)
        self.close()

    def close(self) -> None:
        """Let go of it as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _not_below(lines: bytes, cursor: int) -> bool:
    lsn = lsn_of(lines)
    return lsn is None or lsn >= cursor


def _received_s(line: bytes) -> float:
    head = _HEAD.match(line)
    moment = "1970-01-01T00:00:00" if head is None else head[1][:19].decode()
    return datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
