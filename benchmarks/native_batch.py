"""What does an event of a batch cost in the native call: split, validate, deduplicate, commit?

`Ingest.batch` in this process with 1000 events, each with a new seq, beside `Ingest.event` with the
same events one by one. As NDJSON and as an array; all of one device, and each of one of a million
devices, in random order, which the event names itself (27 bytes more). The log is walked, synced
and emptied between rounds.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks import dedupe, events, logs
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare, interleave, undisturbed

if TYPE_CHECKING:
    from gateway._log import Ingest

NAME: Final = "native_batch_ns"
SIZE: Final = 1000
LIMITS: Final = (65536, 10_000)
CAPACITY_BYTES: Final = 256 * logs.MIB


def pack(bodies: list[bytes], array: bool) -> bytes:
    """One body of many events."""
    return b"[" + b",".join(bodies) + b"]" if array else b"\n".join(bodies)


def named(body: bytes, device: str) -> bytes:
    """The event with its device's name in it."""
    return b'{"device_id":"%s",%s' % (device.encode(), body[1:])


class _Sides:
    """The same events, in batches and one by one."""

    def __init__(self, ingest: "Ingest", array: bool, many: bool, batches: int) -> None:
        self._ingest, self._array, self._many, self._batches = ingest, array, many, batches
        self._events = events.stream(events.reference)
        self._devices: Iterator[str] = (
            dedupe.fleet() if many else itertools.repeat(dedupe.device_id(0))
        )

    def _fresh(self, count: int) -> tuple[list[bytes], list[str]]:
        return list(itertools.islice(self._events, count)), list(
            itertools.islice(self._devices, count)
        )

    def batch(self) -> float:
        """Nanoseconds an event. Raises Failed unless each event of each batch is accepted."""
        from gateway import _log

        device = None if self._many else dedupe.device_id(0)
        made = []
        for _ in range(self._batches):
            bodies, of = self._fresh(SIZE)
            if self._many:
                bodies = [named(body, name) for body, name in zip(bodies, of, strict=True)]
            made.append(pack(bodies, self._array))
        batch, ndjson, started_ns = self._ingest.batch, not self._array, _log.now_ns()
        wrong = 0
        with undisturbed():
            started = time.perf_counter_ns()
            for body in made:
                if batch(device, body, ndjson, started_ns, LIMITS).accepted != SIZE:
                    wrong += 1
            took = time.perf_counter_ns() - started
        if wrong:
            raise Failed(f"{wrong} of {self._batches} batches were not accepted whole")
        return took / (self._batches * SIZE)

    def one_by_one(self) -> float:
        """The same for `Ingest.event`."""
        from gateway import _log

        bodies, of = self._fresh(self._batches * SIZE)
        event, started_ns = self._ingest.event, _log.now_ns()
        refused = 0
        with undisturbed():
            started = time.perf_counter_ns()
            for body, device in zip(bodies, of, strict=True):
                if event(device, body, started_ns):
                    refused += 1
            took = time.perf_counter_ns() - started
        if refused:
            raise Failed(f"{refused} of {len(bodies)} events were refused")
        return took / len(bodies)


def _measure(name: str, array: bool, many: bool, context: Context) -> dict[str, Figure]:
    path = logs.create(context.directory, CAPACITY_BYTES)
    with logs.opened(path) as (log, _), logs.ingesting(log) as ingest:
        sides = _Sides(ingest, array, many, context.pick(50, 100))

        def emptied(side: Callable[[], float]) -> float:
            logs.empty(log)
            return side()

        found = interleave(
            {
                "batch": partial(emptied, sides.batch),
                "one by one": partial(emptied, sides.one_by_one),
            },
            5,
            context,
        )
        logs.empty(log)
        logs.check_new(log)
        if gap := log.unexplained(log.sink(logs.SINK)):
            raise Failed(f"{gap} events unexplained")
    path.unlink()
    size = len(next(events.stream(events.reference, 1))) + (27 if many else 0)
    note = f"batches of {SIZE}, {size} bytes an event"
    return {name: compare(found["batch"], found["one by one"], "ns", note)}


def _benchmark(array: bool, many: bool) -> Benchmark:
    name = NAME + ("_array" if array else "") + ("_million_devices" if many else "")
    return Benchmark(
        {name: "the same events one by one, by Ingest.event"},
        partial(_measure, name, array, many),
        quick=not (array or many),
    )


BENCHMARKS: Final = [_benchmark(array, many) for many in (False, True) for array in (False, True)]
