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

from benchmarks import gates, harness, machine, table
from benchmarks.harness import Benchmark, Context, Row


def benchmarks() -> list[Benchmark]:
    """All of them, in the order of their table."""
    from benchmarks import (
        acks,
        dedupe,
        end_to_end,
        ingest,
        latency,
        memory,
        pipeline,
        publisher,
        recovery,
        restart,
        validator,
    )

    modules = (
        *(validator, ingest, dedupe, pipeline, acks, end_to_end, publisher, latency),
        *(recovery, restart, memory),
    )
    return [benchmark for module in modules for benchmark in module.BENCHMARKS]


def select(every: list[Benchmark], patterns: list[str] | None) -> list[Benchmark]:
    """Those with a row that is called so; else those with a row whose name begins so.

    Raises ValueError when there is none. A pattern may have * and ?.
    """
    if not patterns:
        return every
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
    parser.add_argument("--quick", action="store_true", help="about 3 minutes instead of 12")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="a figure or the beginning of its name; repeatable",
    )
    parser.add_argument("--gate", action="store_true", help="exit code 3 when a figure falls short")
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
        rows += harness.attempt(benchmark, context)
        for row in rows[-len(benchmark.names) :]:
            if row.figure is None:
                context.say(f"{row.status}: {row.reason}")
        shutil.rmtree(directory, ignore_errors=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The whole run. Returns the exit code."""
    options = parse(arguments)
    every = benchmarks()
    if options.list:
        print("\n".join(name for benchmark in every for name in benchmark.names))
        return 0
    try:
        chosen = select(every, options.only)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gateway-bench-", dir=options.directory) as scratch:
        before = machine.describe(Path(scratch), options.quick, options.workers)
        rows = run(chosen, options, Path(scratch))
        after = machine.load()
    took_s = time.monotonic() - started
    print(table.render(rows, chosen, before, after, took_s, options.quick))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.dumps(harness.as_results(rows), indent=1, ensure_ascii=False)
    options.output.write_text(results + "\n")
    return exit_code(rows, options.gate, options.quick)


def exit_code(rows: list[Row], gate: bool, quick: bool) -> int:
    """1 when a benchmark failed, 3 when a gate did."""
    if any(row.status == "failed" for row in rows):
        return 1
    return 3 if gate and gates.short(rows, quick) else 0


if __name__ == "__main__":
    sys.exit(main())
