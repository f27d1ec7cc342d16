"""What does idempotency cost an event: the look-up of its key in the index, and the insert?

The time of `Ingest.event` minus that of the same call in a build whose index is off (GW_NO_INDEX in
gw_log.c: every event is appended as if it had no key). Same source, same flags, same bodies to
parse, compare and copy; each build has its own log.

    dedupe_cost_ns                   all events are of one device
    dedupe_cost_ns_million_devices   of a million devices, in random order
    dedupe_devices_ratio             the second over the first

The log is large, so that its index (a quarter of it) does not fit a core's own cache, and it is
lapped a few times before anything is measured: most look-ups then meet links, whole ones and lapped
ones, as in service. Between rounds it is walked, synced and emptied. The figure is the median of
the differences of single rounds.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING, Any, Final

from benchmarks import compiled, events, logs
from benchmarks.harness import Benchmark, Context, Failed, Figure, Side, interleave, undisturbed

if TYPE_CHECKING:
    from gateway._log import Ingest, Log

ONE: Final = "dedupe_cost_ns"
MILLION: Final = "dedupe_cost_ns_million_devices"
RATIO: Final = "dedupe_devices_ratio"
SWITCH: Final = "GW_NO_INDEX"
DEVICES: Final = 1_000_000
CAPACITY_BYTES: Final = 256 * logs.MIB
_events: Final = events.stream(events.reference)


def device_id(number: int) -> str:
    """As long for one device as for a million."""
    return f"dev-{number:07}"


def fleet(seed: int = 1) -> Iterator[str]:
    """A million devices in random order, again and again."""
    ids = [device_id(number) for number in range(DEVICES)]
    Random(seed).shuffle(ids)
    return itertools.cycle(ids)


class Build:
    """One build of the native core, with its log."""

    def __init__(self, log: "Log", ingest: "Ingest") -> None:
        self.log, self._ingest = log, ingest

    def nanoseconds_an_event(self, devices: Iterator[str], count: int) -> float:
        """Time of one call in a plain loop over fresh events. Raises Failed when one is refused."""
        from gateway import _log

        logs.empty(self.log)
        bodies = list(itertools.islice(_events, count))
        of = list(itertools.islice(devices, count))
        event, started_ns = self._ingest.event, _log.now_ns()
        refused = 0
        with undisturbed():
            started = time.perf_counter_ns()
            for device, body in zip(of, bodies, strict=True):
                if event(device, body, started_ns):
                    refused += 1
            took = time.perf_counter_ns() - started
        if refused:
            raise Failed(f"{refused} of {count} events were refused")
        return took / count

    def lap(self, devices: Iterator[str], count: int) -> None:
        """Write over the whole ring once."""
        until = self.log.tail + self.log.capacity_bytes
        while self.log.tail < until:
            self.nanoseconds_an_event(devices, count)

    def check(self) -> None:
        """Every event was new, and none is missing. Raises Failed."""
        logs.empty(self.log)
        logs.check_new(self.log)
        if gap := self.log.unexplained(self.log.sink(logs.SINK)):
            raise Failed(f"{gap} events unexplained")


def recognises(log: "Log", native: Any) -> bool:
    """Whether a repeat is recognised: the build has an index."""
    from gateway import _log

    (body,) = itertools.islice(_events, 1)
    with logs.ingesting(log, native) as ingest:
        codes = [ingest.event(device_id(0), body, _log.now_ns()) for _ in range(2)]
        if any(codes):
            raise Failed(f"an event was refused: {_log.CODES[max(codes)]}")
        return ingest.duplicate


def measure(context: Context) -> dict[str, Figure]:
    """Both builds and both fleets in turn."""
    from gateway import _log

    natives = {"": _log, " without index": compiled.variant("_log", SWITCH, context.directory)}
    count = context.pick(50_000, 100_000)
    fleets = {"one": itertools.repeat(device_id(0)), "million": fleet()}
    sides: dict[str, Side] = {}
    with contextlib.ExitStack() as stack:
        builds: dict[str, Build] = {}
        for number, (name, native) in enumerate(natives.items()):
            path = logs.create(context.directory / str(number), CAPACITY_BYTES)
            with logs.opened(path, native) as (log, _):
                if recognises(log, native) is not (native is _log):
                    raise Failed(f"{SWITCH} does not switch the index off, or it is always off")
            log, _ = stack.enter_context(logs.opened(path, native))
            ingest = stack.enter_context(logs.ingesting(log, native))
            builds[name] = Build(log, ingest)
            for _ in range(2):
                builds[name].lap(fleets["million"], count)
        for of, devices in fleets.items():
            for name, build in builds.items():
                sides[of + name] = lambda build=build, devices=devices: (  # type: ignore[misc]
                    build.nanoseconds_an_event(devices, count)
                )
        found = interleave(sides, context.pick(5, 7), context)
        for build in builds.values():
            build.check()
    one, million = (cost(found[of], found[f"{of} without index"], count) for of in fleets)
    if one.value <= 0:
        raise Failed(f"an index that costs {one.value:.1f} ns: the rounds are too noisy")
    return {ONE: one, MILLION: million, RATIO: ratio(one, million)}


def cost(with_index: list[float], without: list[float], count: int) -> Figure:
    """Median of the differences of single rounds."""
    more = [a - b for a, b in zip(with_index, without, strict=True)]
    value, against = statistics.median(more), statistics.median(without)
    note = f"rounds {min(more):.3g} to {max(more):.3g}; {count} events a round"
    return Figure(value, "ns", against, value / against, note)


def ratio(one: Figure, million: Figure) -> Figure:
    """How far both are apart."""
    return Figure(million.value, "ns", one.value, million.value / one.value)


BENCHMARKS: Final = [
    Benchmark(
        {
            ONE: "the same event in a build without the index",
            MILLION: "the same event in a build without the index",
            RATIO: "the cost with one device",
        },
        measure,
        quick=False,
    )
]
