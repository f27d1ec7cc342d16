"""A file sink on a log of its own, on a disk that can be made to fail, and the check of its files.

`Disk` stands for the module `os` in `gateway.sinks.files`: it counts the calls that change
something, remembers what a power cut would leave, and can end the process or fail at any of them.
"""

import asyncio
import errno
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from backports import zstd

from gateway import _log
from gateway.dead_letters import rfc3339_ns
from gateway.settings import FileConfig
from gateway.sinks import SinkStatus, files
from gateway.sinks.file import FileSink
from tests.log_writer import Writer

CHANGES = ("write", "fdatasync", "fsync", "rename", "unlink", "ftruncate", "mkdir")


class PowerCut(BaseException):
    """Nothing after it happens."""


class Disk:
    """The real folder, and what of it is synced. `at` is asked before each change with its number
    and name; it may raise, kill, or return a number of bytes: then a write is cut there first."""

    def __init__(self, at: Callable[[int, str], object] = lambda number, name: None) -> None:
        self.at = at
        self.calls: list[str] = []
        self.syncing = Path()
        """The file of the last fdatasync, also of one that fails."""
        self.synced: dict[int, bytes] = {}
        """By inode: the content at its last fdatasync."""
        self.names: dict[Path, dict[str, int]] = {}
        """By folder: its entries at its last fsync."""

    @classmethod
    def after(cls, before: "Disk | None", at: Callable[[int, str], object]) -> "Disk":
        """The same disk, with the power on again: what stands there now is synced."""
        disk = cls(at)
        if before is not None:
            disk.names = {folder: _inodes(folder) for folder in before.names}
            for folder, names in disk.names.items():
                disk.synced |= {inode: _content(folder / name) for name, inode in names.items()}
        return disk

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "open":
            return self._open
        if name not in CHANGES:
            return real

        def change(*arguments: Any, **more: Any) -> Any:
            if name == "fdatasync":
                self.syncing = Path(f"/proc/self/fd/{arguments[0]}")
            self._before(name, *arguments)
            done = real(*arguments, **more)
            if name == "fdatasync":
                self.synced[os.fstat(arguments[0]).st_ino] = _content(
                    f"/proc/self/fd/{arguments[0]}"
                )
            elif name == "fsync":
                folder = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
                self.names[folder] = _inodes(folder) if folder.exists() else {}
            return done

        return change

    def _before(self, name: str, *arguments: Any) -> None:
        number = len(self.calls)
        self.calls.append(name)
        cut = self.at(number, name)
        if name == "write" and type(cut) is int:
            os.write(arguments[0], bytes(arguments[1])[:cut])
            self.at(number, "torn")

    def _open(self, path: str, flags: int, *arguments: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            self._before("create")
        fd = os.open(path, flags, *arguments, **more)
        if flags & os.O_CREAT:
            self.synced.pop(os.fstat(fd).st_ino, None)  # the number of a file that is gone
        return fd

    def cut_power(self, folder: Path, draw: random.Random) -> None:
        """Make the folder what a power cut may leave: synced names with synced contents, and any
        part of what was not synced, or something else in its place."""
        if not folder.exists():
            return
        now = _inodes(folder)
        contents = {inode: _content(folder / name) for name, inode in now.items()}
        names = draw.choice((now, self.names.get(folder, {})))
        for name in now:
            (folder / name).unlink()
        for name, inode in names.items():
            synced = self.synced.get(inode, b"")
            current = contents.get(inode, synced)
            data = synced
            if current.startswith(synced):
                tail = current[len(synced) :]
                kept = tail[: draw.randint(0, len(tail))]
                data += draw.choice(
                    (
                        b"",
                        kept,
                        tail,
                        kept + bytes(len(tail) - len(kept)),
                        draw.randbytes(len(tail)),
                    )
                )
            elif draw.random() < 0.5:  # it was cut, and that is not synced
                data = current
            (folder / name).write_bytes(data)


def _inodes(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries if entry.is_file()}


def _content(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


class Site:
    """A log and a file sink that writes it to `folder`."""

    def __init__(
        self,
        base: Path,
        make: type[FileSink] = FileSink,
        *,
        folder: str = "events",
        capacity_bytes: int = 1 << 20,
        sinks: tuple[str, ...] = ("file",),
        required: list[bool] | None = None,
        **settings: Any,
    ) -> None:
        self.base, self.folder, self.make = base, base / folder, make
        self.settings = FileConfig(
            **{"directory": str(self.folder), "sync_interval_ms": 1, **settings}
        )
        self.capacity_bytes, self.sinks, self.required = capacity_bytes, sinks, required
        self.statuses: list[SinkStatus] = []

    def __enter__(self) -> Self:
        self.writer = Writer(self.base / "gateway.log", self.capacity_bytes, self.sinks)
        if self.required is not None:
            self.writer._open = self._open_with_optional_sinks  # type: ignore[method-assign]
        self.writer.__enter__()
        self.log = self.writer.log
        self.index = self.log.sink("file")
        return self

    def _open_with_optional_sinks(self) -> _log.Log:
        return _log.Log.open(
            str(self.writer.path), self.writer._fd, self.sinks, required=self.required
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.writer.__exit__(kind, error, trace)

    def post(self, count: int, size: int = 20) -> None:
        """Events, durable."""
        for _ in range(count):
            seq = self.log.committed_ordinal
            self.writer.post(seq, f"dev-{seq % 7}", b',"payload":"%s"' % (b"x" * size))
        self.writer.settle()

    def run(
        self, until: Callable[[FileSink], object] | None = None, within_s: float = 20.0
    ) -> FileSink:
        """Run the sink until `until` (else: until it is idle), then close it; raises what it
        raises."""

        async def main() -> FileSink:
            sink = self.make(
                self.log,
                self.index,
                self.settings,
                on_status=self.statuses.append,
                status_file=self.base / "file-status.json",
                draw=lambda: 0.01,
            )
            task = asyncio.create_task(sink.run())
            end = time.monotonic() + within_s
            try:
                while not task.done() and not (until(sink) if until else sink.idle):
                    assert time.monotonic() < end, (sink.status(), self.names)
                    await asyncio.sleep(0.001)
            finally:
                await sink.close()
                await task
            return sink

        return asyncio.run(main())

    @property
    def names(self) -> list[str]:
        """What stands in the folder, oldest first."""
        return sorted(os.listdir(self.folder)) if self.folder.exists() else []

    def expected(self, lsn: int = 4096) -> list[bytes]:
        """A line for each event in the log, made from the record."""
        lines = []
        while record := self.log.read(lsn):
            lsn += record.size
            if record.kind == _log.DATA:
                lines.append(
                    b'{"device_id":"%s","received_at":"%s","lsn":%d,"event":%s}\n'
                    % (
                        record.device_id.encode(),
                        rfc3339_ns(record.received_at_ns).encode(),
                        record.lsn,
                        record.body,
                    )
                )
        return lines

    def last_lines(self, count: int) -> list[bytes]:
        """The last of `expected`, of a log that was written over."""
        return self.expected(self.log.oldest[0] if self.log.oldest else 0)[-count:]

    def written(self) -> list[bytes]:
        """The lines of all files, by name."""
        found: list[bytes] = []
        for name in self.names:
            if name.startswith("events-"):
                data = (self.folder / name).read_bytes()
                if ".zst" in name:
                    data = zstd.decompress(data) if data else b""
                found += data.splitlines(keepends=True)
        return found

    def check(self) -> None:
        """Each event once, whole, in order; each file named for what it holds."""
        assert self.written() == self.expected()
        parts = [name for name in self.names if name.endswith(".part")]
        assert len(parts) <= 1, parts
        for name in self.names:
            data = (self.folder / name).read_bytes()
            lines = (zstd.decompress(data) if ".zst" in name else data).splitlines()
            first, last = (json.loads(lines[i])["lsn"] for i in (0, -1))
            is_part = name.endswith(".part")
            assert name == files.name_of(
                self.log.identity, first, None if is_part else last, ".zst" in name
            )


def fork(child: Callable[[], None]) -> int:
    """The pid of a process that does `child` and exits with 0, or says why not with 1."""
    pid = os.fork()
    if pid:
        return pid
    try:
        child()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"child: {error!r}\n".encode())
        os._exit(1)


def kill_at(point: int, tear: int | None = None) -> Callable[[int, str], object]:
    """For `Disk.at`: SIGKILL to oneself at change number `point`; a write is torn behind `tear`."""

    def at(number: int, name: str) -> object:
        if number == point:
            if name == "write" and tear is not None:
                return tear
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(10)
        return None

    return at


def fill(mount: Path, base: Path) -> None:
    """The folder is on a disk of 256 KiB that something else fills; then it goes away."""
    ballast = mount / "ballast"
    ballast.write_bytes(bytes(180 * 1024))
    with Site(base, directory=str(mount / "events")) as site:
        site.folder = mount / "events"
        site.post(400, size=150)

        def step(sink: FileSink) -> bool:
            held = [status for status in site.statuses if status.state == "held"]
            if held and ballast.exists():
                assert os.strerror(errno.ENOSPC) in held[-1].last_error
                assert all(line.endswith(b"\n") for line in site.written())
                assert not sink.idle
                ballast.unlink()
            return sink.idle

        site.run(step)
        site.check()
        assert not ballast.exists()
        print(f"held, then all {len(site.written())} lines")


if __name__ == "__main__":
    fill(Path(sys.argv[2]), Path(sys.argv[3]))
