"""Run the benchmarks, print the table, write results/latest.json.

Exit codes: 0 all measured · 1 a benchmark failed · 2 wrong arguments · 3 with --gate: a figure fell
short, or a gated one is void.
"""

import argparse
import fnmatch
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gates, harness, machine, page, table
from benchmarks.harness import Benchmark, Context, Row


def benchmarks() -> list[Benchmark]:
    """All of them, in the order of their table."""
    from benchmarks import (
        acks,
        batch,
        connections,
        dedupe,
        doors,
        end_to_end,
        file_sink,
        ingest,
        instructions,
        lanes,
        latency,
        memory,
        native_batch,
        offered_load,
        packed,
        pipeline,
        publisher,
        recovery,
        restart,
        sweeps,
        validator,
    )

    modules = (
        *(instructions, validator, ingest, native_batch, dedupe, pipeline, doors, lanes),
        *(acks, batch),
        *(sweeps, connections, end_to_end, publisher, packed, file_sink, latency, offered_load),
        *(recovery, restart, memory),
    )
    return [benchmark for module in modules for benchmark in module.BENCHMARKS]


def select(
    every: list[Benchmark], patterns: list[str] | None, quick: bool = False
) -> list[Benchmark]:
    """Those with a row that is called so; else those with a row whose name begins so. All, when
    nothing is asked for; of a quick run, those that belong there.

    Raises ValueError when there is none. A pattern may have * and ?.
    """
    if not patterns:
        return [benchmark for benchmark in every if benchmark.quick or not quick]
    chosen: set[str] = set()
    names = [name for benchmark in every for name in benchmark.names]
    for pattern in patterns:
        found = {pattern} & set(names) or set(fnmatch.filter(names, pattern + "*"))
        if not found:
            raise ValueError(f"no figure is called {pattern}; there are {', '.join(names)}")
        chosen |= found
    return [benchmark for benchmark in every if chosen & set(benchmark.names)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about 3 minutes instead of 8")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="a figure or the beginning of its name; repeatable",
    )
    parser.add_argument("--gate", action="store_true", help="exit code 3 when a figure falls short")
    parser.add_argument(
        "--again",
        type=int,
        default=0,
        metavar="TIMES",
        help="measure what failed or fell short of an enforced gate again, so many times (0)",
    )
    parser.add_argument(
        "--render",
        action=argparse.BooleanOptionalAction,
        help="write docs/performance.md and docs/img (a full run of everything does)",
    )
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--workers", type=int, default=1, help="HTTP workers of every server (1)")
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="where the figures go")
    parser.add_argument(
        "--directory", type=Path, help="scratch for logs; its file system matters (a temporary one)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser.parse_args(arguments)


def run(chosen: list[Benchmark], options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Each in a directory of its own, removed when it is done."""
    rows: list[Row] = []
    for benchmark in chosen:
        if not options.quiet:
            print(f"  {', '.join(benchmark.names)}", file=sys.stderr, flush=True)
        directory = scratch / benchmark.names[0]
        directory.mkdir()
        context = Context(options.quick, directory, options.workers, not options.quiet)
        started = time.monotonic()
        rows += harness.attempt(benchmark, context)
        context.say(f"{time.monotonic() - started:.1f} s")
        for row in rows[-len(benchmark.names) :]:
            if row.figure is None:
                context.say(f"{row.status}: {row.reason}")
        shutil.rmtree(directory, ignore_errors=True)
    return rows


def run_again(
    rows: list[Row], chosen: list[Benchmark], options: argparse.Namespace, scratch: Path
) -> list[Row]:
    """The same rows; those that failed or fell short are measured again while any does, at most
    `options.again` times. A neighbour that was busy for a minute is gone; a regression is not."""
    for number in range(options.again):
        bad = {row.name for row in rows if row.status == "failed"}
        bad |= set(gates.short(rows, options.quick))
        todo = [benchmark for benchmark in chosen if bad & set(benchmark.names)]
        if not todo:
            break
        print(f"  again: {', '.join(sorted(bad))}", file=sys.stderr, flush=True)
        folder = scratch / f"again-{number}"
        folder.mkdir()
        found = {row.name: row for row in run(todo, options, folder)}
        rows = [found[row.name] if row.name in bad else row for row in rows]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The whole run. Returns the exit code."""
    options = parse(arguments)
    every = benchmarks()
    if options.list:
        print("\n".join(name for benchmark in every for name in benchmark.names))
        return 0
    try:
        chosen = select(every, options.only, options.quick)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gateway-bench-", dir=options.directory) as scratch:
        before = machine.describe(Path(scratch), options.quick, options.workers)
        rows = run(chosen, options, Path(scratch))
        rows = run_again(rows, chosen, options, Path(scratch))
        after = machine.load()
    took_s = time.monotonic() - started
    print(table.render(rows, chosen, before, after, took_s, options.quick))
    command = " ".join(("make bench", *(["BENCH=quick"] if options.quick else [])))
    about = Run(before, after, took_s, options.quick, command)
    results = as_json(rows, chosen, about)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    whole = not options.quick and len(chosen) == len(every)
    if whole if options.render is None else options.render:
        page.write(json.loads(options.output.read_text()))
    return exit_code(rows, options.gate, options.quick)


class Run(NamedTuple):
    """What the results say beside their rows."""

    lines: list[tuple[str, str]]
    load_after: str
    took_s: float
    quick: bool
    command: str


def as_json(rows: list[Row], chosen: list[Benchmark], about: Run) -> dict[str, Any]:
    """What is written: a key a row, and `run`. The page is rendered from nothing else."""
    results = harness.as_results(rows)
    against = {name: text for each in chosen for name, text in each.references.items()}
    for row in rows:
        gate = gates.GATES.get(row.name)
        results[row.name] |= {"against": against[row.name]}
        if gate is not None:
            results[row.name] |= {"gate": str(gate), "verdict": gates.verdict(row, about.quick)}
    return {page.RUN: about._asdict(), **results}


def exit_code(rows: list[Row], gate: bool, quick: bool) -> int:
    """1 when a benchmark failed, 3 when a gate did."""
    if any(row.status == "failed" for row in rows):
        return 1
    return 3 if gate and gates.short(rows, quick) else 0


if __name__ == "__main__":
    sys.exit(main())
