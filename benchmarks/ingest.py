"""What does one event cost from Python: validate, claim, copy, checksum, commit, count?

`Ingest.event` into a real log file, each event with a new seq, beside an empty C function with the
same arguments. The log is walked, synced and emptied between rounds, and a round is shorter than
the ring: so rounds run over its end and write to pages that a sync has cleaned, as they do in
service.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from benchmarks import compiled, events, logs
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare, interleave, undisturbed

CAPACITY_BYTES: Final = 64 * logs.MIB
ROUND_BYTES_MAX: Final = CAPACITY_BYTES * 5 // 8


def nanoseconds_a_call(
    event: Callable[[str, bytes, int], int], device: str, bodies: Sequence[bytes], started_ns: int
) -> float:
    """Time of one call in a plain loop. Raises Failed when one is refused."""
    refused = 0
    with undisturbed():
        started = time.perf_counter_ns()
        for body in bodies:
            if event(device, body, started_ns):
                refused += 1
        took = time.perf_counter_ns() - started
    if refused:
        raise Failed(f"{refused} of {len(bodies)} events were refused")
    return took / len(bodies)


def _measure(name: str, shape: events.Shape, context: Context) -> dict[str, Figure]:
    from gateway import _log

    empty_event = compiled.module("empty_call", context.directory).event
    size = len(events.bodies(shape, 1)[0])
    count = min(context.pick(50_000, 100_000), ROUND_BYTES_MAX // (size + 192))
    stream = events.stream(shape, min(count, 4096))

    def fresh() -> list[bytes]:
        return list(itertools.islice(stream, count))

    path = logs.create(context.directory, CAPACITY_BYTES)
    with logs.opened(path) as (log, _), logs.ingesting(log) as ingest:

        def ours() -> float:
            logs.empty(log)
            bodies = fresh()
            return nanoseconds_a_call(ingest.event, events.device(1), bodies, _log.now_ns())

        def reference() -> float:
            return nanoseconds_a_call(empty_event, events.device(1), fresh(), _log.now_ns())

        found = interleave({"gateway": ours, "empty call": reference}, 5, context)
        logs.empty(log)
        logs.check_new(log)
        if gap := log.unexplained(log.sink(logs.SINK)):
            raise Failed(f"{gap} events unexplained")
    path.unlink()
    note = f"{count} events of {size} bytes a round"
    return {name: compare(found["gateway"], found["empty call"], "ns", note)}


def _benchmark(suffix: str, shape: events.Shape) -> Benchmark:
    name = "ingest_ns" + (f"_{suffix}" if suffix else "")
    return Benchmark({name: "an empty C call"}, partial(_measure, name, shape), quick=not suffix)


BENCHMARKS: Final = [_benchmark(suffix, shape) for suffix, shape in events.SHAPES.items()]
