"""Each gate can fail: on a slower build, on a slower gateway, on recorded results made worse."""

import json
import platform
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import compiled, gates, harness, instructions, pipeline
from benchmarks.gates import GATES
from benchmarks.harness import Benchmark, Context, Figure, Row, Voided
from benchmarks.instructions import CASES, PREFIX, Slow
from benchmarks.servers import Gateway
from tests.native_build import TESTS

RECORDED = json.loads((Path(__file__).parent / "golden" / "benchmarks.json").read_text())
"""A quick run of everything: what `make bench BENCH=quick` wrote."""
ROWS = harness.as_rows({name: row for name, row in RECORDED.items() if name != "run"})
QUICK = [
    name
    for benchmark in command.select(command.benchmarks(), None, quick=True)
    for name in benchmark.names
]
ENFORCED = [name for name in QUICK if name in GATES and GATES[name].allowed(quick=True) is not None]


def worse(row: Row, by: float) -> Row:
    """The same row, on the wrong side of what is allowed by the share `by`."""
    gate = GATES[row.name]
    allowed = gate.allowed(quick=True)
    assert allowed is not None
    assert row.figure is not None
    if gate.comparison == "±":
        wrong = 1 + allowed * (1 + by)
    else:
        wrong = allowed * (1 + by if gate.comparison == "<=" else 1 - by)
    return row._replace(figure=row.figure._replace(**{gate.of: wrong}))


# ---- measured again ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "times", "code"),
    [([0.5, 0.95], 2, 0), ([0.5, 0.5, 0.95], 2, 0), ([0.5, 0.5, 0.5, 0.95], 2, 3), ([0.5], 0, 3)],
)
def test_what_falls_short_is_measured_again_so_many_times(
    tmp_path: Path, found: list[float], times: int, code: int
) -> None:
    left = iter(found)
    name = "pipeline_vs_empty_handler"
    benchmark = Benchmark({name: "itself"}, lambda _: {name: Figure(1.0, "req/s", 1.0, next(left))})
    options = command.parse(["--quick", "--quiet", "--again", str(times)])
    rows = command.run([benchmark], options, tmp_path)
    rows = command.run_again(rows, [benchmark], options, tmp_path)
    assert command.exit_code(rows, gate=True, quick=True) == code
    assert len(rows) == 1


def test_a_row_that_was_good_enough_is_not_replaced(tmp_path: Path) -> None:
    numbers = iter([(0.95, 0.1), (0.2, 0.6)])

    def measure(_: Context) -> dict[str, Figure]:
        good, bad = next(numbers)
        names = ("pipeline_vs_empty_handler", "single_vs_nginx")
        return {n: Figure(1.0, "x", 1.0, v) for n, v in zip(names, (good, bad), strict=True)}

    names = {"pipeline_vs_empty_handler": "", "single_vs_nginx": ""}
    benchmark = Benchmark(names, measure)
    options = command.parse(["--quick", "--quiet", "--again", "1"])
    rows = command.run([benchmark], options, tmp_path)
    rows = command.run_again(rows, [benchmark], options, tmp_path)
    assert [row.figure.ratio for row in rows if row.figure] == [0.95, 0.6]


# ---- recorded results ----------------------------------------------------------------------------


def test_the_recorded_run_has_every_figure_of_a_quick_run_and_passes() -> None:
    assert {row.name for row in ROWS if row.status == "measured"} == set(QUICK)
    assert len(ENFORCED) >= 15
    assert gates.short(ROWS, quick=True) == []
    assert command.exit_code(ROWS, gate=True, quick=True) == 0


@pytest.mark.parametrize("name", ENFORCED)
def test_a_figure_beyond_its_tolerance_is_named(name: str) -> None:
    rows = [worse(row, by=0.01) if row.name == name else row for row in ROWS]
    assert gates.short(rows, quick=True) == [name]
    assert command.exit_code(rows, gate=True, quick=True) == 3


@pytest.mark.parametrize("name", ENFORCED)
def test_a_figure_within_its_tolerance_passes(name: str) -> None:
    rows = [worse(row, by=-0.01) if row.name == name else row for row in ROWS]
    assert gates.short(rows, quick=True) == []


def test_no_absolute_time_is_a_gate_of_a_quick_run() -> None:
    absolute = [name for name in ENFORCED if GATES[name].of == "value"]
    units = {row.name: row.figure.unit for row in ROWS if row.figure is not None}
    assert {units[name] for name in absolute} == {"MiB"}


def test_fewer_instructions_are_outside_of_the_tolerance_too() -> None:
    def row(ratio: float) -> Row:
        return Row(PREFIX + "batch", "measured", Figure(ratio * 100, "instructions", 100, ratio))

    assert gates.verdict(row(0.985), quick=True) == "met"
    assert gates.verdict(row(0.975), quick=True) == "short"


# ---- a slower build ------------------------------------------------------------------------------

INSIDE = {
    "validate": "gw_validate",
    "ingest": "gw_producer_append",
    "batch": "gw_producer_append",
    "window": "gw_log_read",
    "packed": "gw_log_read",
}
"""What is called once an event, by case."""
EVENTS = 1000
INSTRUCTIONS_A_STEP = 2


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Objects of the native core and of the driver."""
    directory = tmp_path_factory.mktemp("instructions")
    instructions.compile_core(directory)
    return directory


def found(counts: Mapping[str, float], **other: str) -> dict[str, Any]:
    return {"conditions": {"compiler": "gcc 12.2.0", "scan path": "avx2"} | other} | {
        "instructions": dict(counts)
    }


@pytest.mark.parametrize("case", CASES)
def test_a_build_that_is_three_percent_slower_fails_the_count(core: Path, case: str) -> None:
    usual, _ = instructions.count(instructions.link(core), case, EVENTS)
    steps = round(usual * 0.03 / INSTRUCTIONS_A_STEP)
    slow, _ = instructions.count(instructions.link(core, Slow(INSIDE[case], steps)), case, EVENTS)
    figures = instructions.compare(found({case: usual}), found({case: slow}))
    rows = [Row(name, "measured", figure) for name, figure in figures.items()]
    print(f"{case}: {usual:.1f}, slowed {slow:.1f} instructions an event")
    assert gates.short(rows, quick=True) == [PREFIX + case]


def test_counts_are_the_same_in_every_run(core: Path) -> None:
    driver = instructions.link(core)
    first, again = (instructions.count(driver, "ingest", EVENTS)[0] for _ in range(2))
    assert again == pytest.approx(first, rel=0.001)


def test_counts_of_another_compiler_are_not_compared() -> None:
    with pytest.raises(Voided, match=r"not comparable .*compiler gcc 13"):
        instructions.compare(found({"batch": 1.0}), found({"batch": 1.0}, compiler="gcc 13.1.0"))
    rows = [Row(PREFIX + "batch", "void", None, "not comparable")]
    assert command.exit_code(rows, gate=False, quick=True) == 0
    assert command.exit_code(rows, gate=True, quick=True) == 3


def test_the_table_has_every_case_with_what_it_was_counted_with() -> None:
    table = json.loads(instructions.TABLE.read_text())
    assert set(table["instructions"]) == set(CASES)
    assert set(table["conditions"]) == set(instructions.conditions(""))
    if platform.machine() == table["conditions"]["machine"]:
        assert table["conditions"]["flags"] == " ".join(instructions.FLAGS)


# ---- a slower gateway ----------------------------------------------------------------------------


class Short(Context):
    """One round of one second."""

    def pick(self, quick: Any, full: Any) -> Any:
        return min(quick, 1) if quick <= 3 else quick


def test_a_gateway_that_is_slowed_down_fails_its_ratio_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = compiled.library(TESTS / "preload_slow.c", tmp_path)
    settings = {"LD_PRELOAD": str(library), "GW_SLOW_US": "60"}
    monkeypatch.setattr(pipeline, "Gateway", partial(Gateway, settings=settings))
    (benchmark,) = pipeline.BENCHMARKS
    rows = harness.attempt(benchmark, Short(quick=True, directory=tmp_path))
    assert {row.status for row in rows} == {"measured"}, rows
    assert gates.short(rows, quick=True) == ["pipeline_vs_empty_handler", "single_vs_nginx"]
