"""How long does it take to check one event, beside msgspec with the same rules?

Both are called from Python, event by event, over the same 256 different events; a side's time a
call includes the loop around it. The rules that msgspec cannot say (peers/msgspec_rules.py) are
work that only we do.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from benchmarks import events
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare, interleave, undisturbed
from benchmarks.peers import msgspec_rules

EVENTS: Final = 256


def microseconds_a_call(
    call: Callable[[bytes], Any], bodies: Sequence[bytes], passes: int
) -> float:
    """Time of one call in a plain loop."""
    with undisturbed():
        started = time.perf_counter_ns()
        for _ in range(passes):
            for body in bodies:
                call(body)
        return (time.perf_counter_ns() - started) / (passes * len(bodies)) / 1000


def _measure(name: str, shape: events.Shape, context: Context) -> dict[str, Figure]:
    from gateway import _validator

    bodies = events.bodies(shape, EVENTS)
    for body in bodies:
        if code := _validator.check(body):
            raise Failed(f"{_validator.CODES[code]}: {body[:200]!r}")
        msgspec_rules.decode(body)
    target_us = context.pick(60_000, 150_000)
    sides: dict[str, Callable[[], float]] = {}
    for side, call in (("gateway", _validator.check), ("msgspec", msgspec_rules.decode)):
        once = microseconds_a_call(call, bodies, 2) * len(bodies)
        passes = max(2, round(target_us / once))
        sides[side] = partial(microseconds_a_call, call, bodies, passes)
    found = interleave(sides, context.pick(5, 7), context)
    size = round(sum(map(len, bodies)) / len(bodies))
    note = f"{size} bytes, {_validator.scan_paths()[0]}"
    return {name: compare(found["gateway"], found["msgspec"], "µs", note)}


def _benchmark(suffix: str, shape: events.Shape) -> Benchmark:
    name = "validator_vs_msgspec" + (f"_{suffix}" if suffix else "")
    return Benchmark({name: "msgspec"}, partial(_measure, name, shape), quick=not suffix)


BENCHMARKS: Final = [_benchmark(suffix, shape) for suffix, shape in events.SHAPES.items()]
