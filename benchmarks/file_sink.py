"""How fast do events go from a full log into files, and what does that cost the broker's share?

    file_sink_mib_per_second   gateway.sinks.file on a log that was filled before, to the fsync of
                               the last line, beside a plain write and fsync of the same bytes
    two_sinks_vs_one           messages a second out of a full log for Mosquitto, with the file
                               sink beside the publisher and without it; a log for each

Where the files stand matters as much as where the log does: both are in `--directory`.
"""

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import events, logs
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare, interleave
from benchmarks.publisher import Delivery, Source
from benchmarks.servers import Mosquitto

if TYPE_CHECKING:
    from gateway._log import Log

FILE: Final = "file"
DEVICES: Final = 64
DRAIN_S: Final = 60
CHUNK_BYTES: Final = logs.MIB


async def _write_out(log: "Log", folder: Path) -> None:
    from gateway.settings import FileConfig
    from gateway.sinks.file import FileSink

    sink = FileSink(log, log.sink(FILE), FileConfig(directory=str(folder)))
    running = asyncio.ensure_future(sink.run())
    try:
        if not await sink.drain(DRAIN_S):
            raise Failed(f"the file sink is not done after {DRAIN_S} s: {sink.status()}")
    finally:
        await sink.close()
        await running


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if ".ndjson" in path.name)


class Sides:
    """Both sides of a round: the sink writes what the reference then writes again."""

    def __init__(self, log: "Log", folder: Path) -> None:
        self._log, self._folder = log, folder
        self._devices = [events.device(number) for number in range(DEVICES)]
        self._bodies = events.stream(events.reference)
        self._written: list[Path] = []
        self.count = 0

    def sink(self) -> float:
        """MiB of lines a second, out of a full log."""
        logs.empty(self._log)
        shutil.rmtree(self._folder, ignore_errors=True)
        self.count = logs.fill(self._log, self._bodies, self._devices)
        before = self._log.cursor(self._log.sink(FILE)).published
        started = time.perf_counter()
        asyncio.run(_write_out(self._log, self._folder))
        took = time.perf_counter() - started
        written = self._log.cursor(self._log.sink(FILE)).published - before
        if written != self.count:
            raise Failed(f"{written} of {self.count} events were confirmed")
        self._written = _files(self._folder)
        lines = sum(path.read_bytes().count(b"\n") for path in self._written)
        if lines != self.count:
            raise Failed(f"{lines} lines for {self.count} events")
        return sum(path.stat().st_size for path in self._written) / logs.MIB / took

    def plain(self) -> float:
        """The same bytes, written and synced by nothing but a loop."""
        chunks = []
        for path in self._written:
            text = path.read_bytes()
            chunks += [text[at : at + CHUNK_BYTES] for at in range(0, len(text), CHUNK_BYTES)]
        target = self._folder.with_name("plain")
        started = time.perf_counter()
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for chunk in chunks:
                os.write(fd, chunk)
            os.fsync(fd)
            took = time.perf_counter() - started
        finally:
            os.close(fd)
        target.unlink()
        return sum(map(len, chunks)) / logs.MIB / took


def measure(context: Context) -> dict[str, Figure]:
    """Fill the log, write it out, write the same once more."""
    capacity = context.pick(64, 256) * logs.MIB
    path = logs.create(context.directory / "log", capacity)
    with logs.opened(path, sinks=(FILE,)) as (log, _):
        sides = Sides(log, context.directory / "files")
        found = interleave({"sink": sides.sink, "plain": sides.plain}, context.pick(3, 5), context)
        if gap := log.unexplained(log.sink(FILE)):
            raise Failed(f"{gap} events unexplained")
    note = f"{sides.count:,} events a round, a {capacity >> 20} MiB log, fsync included"
    return {"file_sink_mib_per_second": compare(found["sink"], found["plain"], "MiB/s", note)}


class Beside(Delivery):
    """A delivery process with both sinks; the rate is the broker's."""

    def __init__(
        self, log: "Log", lock_fd: int, broker: Mosquitto, source: Source, folder: Path
    ) -> None:
        super().__init__(log, lock_fd, broker, source, f"file.directory={folder}")
        self._sink, self._events = log.sink(FILE), source.count

    def __call__(self) -> float:
        logs.empty(self._log)
        before = self._log.cursor(self._sink).published
        rate = super().__call__()
        if (written := self._log.cursor(self._sink).published - before) < self._events / 4:
            raise Failed(f"only {written} of {self._events} events were written beside")
        return rate


def measure_beside(context: Context) -> dict[str, Figure]:
    """Both logs in turn, one broker."""
    source = Source(context.pick(100_000, 200_000))
    capacity = context.pick(64, 128) * logs.MIB
    one = logs.create(context.directory / "one", capacity)
    two = logs.create(context.directory / "two", capacity)
    with (
        Mosquitto(context.directory / "mosquitto", False) as broker,
        logs.opened(one) as (alone, alone_fd),
        logs.opened(two, sinks=(logs.SINK, FILE)) as (both, both_fd),
    ):
        sides = {
            "both": Beside(both, both_fd, broker, source, context.directory / "files"),
            "alone": Delivery(alone, alone_fd, broker, source),
        }
        found = interleave(sides, 3, context)
        broker.check()
        gaps = [both.unexplained(sink) for sink in range(len(both.sinks))]
        if any(gaps):
            raise Failed(f"{gaps} events unexplained")
    note = f"{source.count:,} messages a round, Mosquitto without a subscriber"
    return {"two_sinks_vs_one": compare(found["both"], found["alone"], "msg/s", note)}


BENCHMARKS: Final = [
    Benchmark({"file_sink_mib_per_second": "a plain write and fsync of the same bytes"}, measure),
    Benchmark({"two_sinks_vs_one": "the same without the file sink"}, measure_beside),
]
