"""A publisher over a real log, for tests of what a broker may do to it.

source = Source(folder)              a log, and events to put in
scripted(source, script, check)      run a publisher against a scripted broker
"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvloop

from gateway import _log
from gateway.dead_letters import DeadLetter, Shelf
from gateway.mqtt_settings import MqttConfig
from gateway.publisher import Publisher
from tests.brokers import Peer, Publish, ScriptedBroker

Script = Callable[[Peer], Awaitable[None]]


def event(n: int) -> bytes:
    return b'{"ts":"2025-09-23T11:18:41Z","metrics":{"n":%d}}' % n


class MemoryShelf:
    """Dead letters in memory."""

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []
        self.batches: list[int] = []
        self.tries = 0
        self.error: Exception | None = None
        """Raised in place of keeping them, when set."""
        self.wait: threading.Event | None = None
        """Waited for before they are kept."""

    def append(self, letters: Sequence[DeadLetter]) -> int:
        self.tries += 1
        if self.wait is not None:
            assert self.wait.wait(10)
        if self.error is not None:
            raise self.error
        self.letters += letters
        self.batches.append(len(letters))
        return len(letters)


class Source:
    """A log, and events to put in."""

    def __init__(self, folder: Path, capacity_bytes: int = _log.CAPACITY_MIN) -> None:
        path = str(folder / "gateway.log")
        _log.create(path, capacity_bytes)
        self._fd = os.open(path, os.O_RDWR)
        self.log = _log.Log.open(path, self._fd, ["mqtt"])
        self._ingest = _log.Ingest(self.log, 0)
        self.count = 0
        self.shelf: Shelf = MemoryShelf()

    def add(self, count: int = 1, device_id: str = "dev-1") -> None:
        for _ in range(count):
            assert self._ingest.event(device_id, event(self.count), _log.now_ns()) == 0
            self.count += 1
        self.log.follow(0, 0)

    def counter(self, name: str) -> int:
        return self.log.counter(_log.BLOCK_DELIVERY, _log.COUNTERS[name])

    @property
    def letters(self) -> list[DeadLetter]:
        """The dead letters, when they are in memory."""
        assert isinstance(self.shelf, MemoryShelf)
        return self.shelf.letters

    @property
    def dead(self) -> list[int]:
        """The numbers of the events with a dead letter."""
        return [number(letter.record.body) for letter in self.letters]

    @property
    def published(self) -> int:
        cursor = self.log.cursor(0)
        assert cursor.published <= cursor.ordinal
        return cursor.published

    def close(self) -> None:
        self._ingest.close()
        self.log.close()
        os.close(self._fd)


def run(main: Coroutine[Any, Any, None], within_s: float = 20) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main, within_s))


async def until(condition: Callable[[], Any], within_s: float = 5) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        await asyncio.sleep(0.002)


def settings(port: int, **changes: Any) -> MqttConfig:
    values: dict[str, Any] = {
        "url": f"mqtt://127.0.0.1:{port}",
        "client_id": "gw",
        "backoff_base_ms": 10,
        "backoff_max_ms": 40,
        "connect_timeout_ms": 2000,
        "puback_timeout_ms": 5000,
    }
    return MqttConfig(**(values | changes))


@contextlib.asynccontextmanager
async def publishing(
    source: Source, port: int, options: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[Publisher]:
    publisher = Publisher(
        source.log,
        0,
        settings(port, **changes),
        source.shelf,
        **({"quiet_s": 0.05} | (options or {})),
    )
    task = asyncio.create_task(publisher.run())
    try:
        yield publisher
    finally:
        await publisher.close()
        await task


def scripted(
    source: Source,
    script: Script,
    check: Callable[[Publisher, ScriptedBroker], Awaitable[None]],
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> None:
    """Run a publisher against a script until `check` returns."""

    async def main() -> None:
        async with (
            ScriptedBroker(script) as broker,
            publishing(source, broker.port, options, **changes) as publisher,
        ):
            await check(publisher, broker)
            if broker.failure is not None:
                raise broker.failure

    run(main())


async def drained(publisher: Publisher, broker: ScriptedBroker) -> None:
    assert await publisher.drain(5), (publisher.status, publisher.window.look(), broker.failure)


def number(payload: bytes) -> int:
    """The n of `event(n)`."""
    return int(payload.split(b":")[-1].rstrip(b"}"))


def numbers(publishes: list[Publish]) -> list[int]:
    return [number(publish.payload) for publish in publishes]
