"""How is a figure made, and what becomes of a run that fails?

    interleave   A B A B ...: each side measures once a round: a drift of the machine hits all alike
    compare      medians of both sides, and their ratio
    attempt      one benchmark: its figures, or why there are none

A side returns one number. What it cannot measure whole it raises as `Failed`; nothing here turns
that into a number. A figure whose reference did not do what it is known to do is `Voided`: the
comparison would say nothing.
"""

import gc
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

Side = Callable[[], float]
T = TypeVar("T")


class Failed(Exception):
    """A run did not do the whole of what it should: there is no figure."""


class Voided(Exception):
    """The reference is not what it should be: the figure would mean nothing."""


class Curve(NamedTuple):
    """How a figure depends on something: one or more lines over the same axis."""

    x: str
    """What is varied, with its unit."""
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    """By name: points in the order of x."""
    log_x: bool = False
    log_y: bool = False


class Figure(NamedTuple):
    """One measured row. `ratio` is value / reference."""

    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    note: str = ""
    curve: Curve | None = None


Status = Literal["measured", "failed", "void"]


class Row(NamedTuple):
    """What the table and the results show of one name."""

    name: str
    status: Status
    figure: Figure | None
    reason: str = ""


@dataclass(frozen=True)
class Context:
    """What a benchmark is given."""

    quick: bool
    directory: Path
    """Scratch, on the file system that the logs are on; each benchmark has its own."""
    workers: int = 1
    """HTTP workers of the gateway and of every peer."""
    verbose: bool = False

    def pick(self, quick: T, full: T) -> T:
        """One of two sizes of a measurement."""
        return quick if self.quick else full

    def say(self, text: str) -> None:
        """Progress, on standard error."""
        if self.verbose:
            print(f"    {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Benchmark:
    """A question:

    the names of its rows with what each is compared with, and how they are measured.
    """

    references: Mapping[str, str]
    run: Callable[[Context], Mapping[str, Figure]]
    quick: bool = True
    """Also in a quick run of everything."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its rows."""
        return tuple(self.references)


def interleave(
    sides: Mapping[str, Side], rounds: int, context: Context | None = None, warm_up: bool = True
) -> dict[str, list[float]]:
    """Each side once a round, in the same order; a first round warms up and is thrown away.

    Raises whatever a side raises, and Failed for a number that is none.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1 if warm_up else 0, rounds):
        for name, side in sides.items():
            value = side()
            if not (math.isfinite(value) and value > 0):
                raise Failed(f"{name}: {value} is no measurement")
            if number >= 0:
                found[name].append(value)
            if context is not None:
                context.say(
                    f"{'warm-up' if number < 0 else f'round {number + 1}'} {name}: {value:,.6g}"
                )
    return found


def compare(ours: list[float], reference: list[float], unit: str, note: str = "") -> Figure:
    """Medians of both sides. The note says how far the ratios of single rounds lie apart."""
    value, against = statistics.median(ours), statistics.median(reference)
    ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    spread = f"rounds {min(ratios):.3g} to {max(ratios):.3g}"
    return Figure(value, unit, against, value / against, f"{spread}; {note}" if note else spread)


def attempt(benchmark: Benchmark, context: Context) -> list[Row]:
    """Run it. Whatever it raises becomes the reason why its rows have no figure."""
    try:
        figures = dict(benchmark.run(context))
        if missing := [name for name in benchmark.names if name not in figures]:
            raise Failed(f"no figure for {', '.join(missing)}")
        for name, figure in figures.items():
            if name not in benchmark.names:
                raise Failed(f"a figure that is not announced: {name}")
            if not math.isfinite(figure.value):
                raise Failed(f"{name}: {figure.value} is no measurement")
    except Voided as why:
        return [Row(name, "void", None, str(why)) for name in benchmark.names]
    except Exception as why:
        reason = str(why) or type(why).__name__
        if not isinstance(why, Failed):
            reason = f"{type(why).__name__}: {reason}"
        return [Row(name, "failed", None, reason) for name in benchmark.names]
    return [Row(name, "measured", figures[name]) for name in benchmark.names]


@contextmanager
def undisturbed() -> Iterator[None]:
    """For timing loops in this process: no garbage collection in the middle of one."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


FLAT: Final = ("value", "unit", "reference", "ratio")
"""What each row of the results has; a note and a curve only where there are some."""
RESULTS: Final = Path(__file__).with_name("results") / "latest.json"


def as_results(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """The rows of results/latest.json, by name. A row without a figure has nulls, and says why."""
    results: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.figure is not None:
            figure = row.figure._asdict()
            if row.figure.curve is not None:
                figure["curve"] = row.figure.curve._asdict()
            results[row.name] = {key: of for key, of in figure.items() if of not in ("", None)}
            results[row.name] |= {key: figure[key] for key in FLAT}
        else:
            results[row.name] = dict.fromkeys(FLAT)
            results[row.name][row.status] = row.reason
    return results


def as_rows(results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The other way round, without curves: rows that were measured some time before."""
    rows = []
    for name, found in results.items():
        reason = next((found[kind] for kind in ("failed", "void") if kind in found), "")
        if found["value"] is None:
            rows.append(Row(name, "void" if "void" in found else "failed", None, reason))
        else:
            rows.append(Row(name, "measured", Figure(**{key: found[key] for key in FLAT})))
    return rows
