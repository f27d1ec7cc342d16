"""How many instructions does the native core take, and has that changed?

    .venv/bin/python -m benchmarks.instructions            count and compare
    .venv/bin/python -m benchmarks.instructions --update   count and write instructions.json

Time says little on a shared machine; callgrind counts the instructions of the same work, and they
are the same to a few in a million. instructions.c does the work; a row is what one event costs:

    instructions_validate   gw_validate, 142 bytes
    instructions_ingest     gw_ingest_event: validate, look for the key, claim, copy, commit, count
    instructions_batch      gw_ingest_batch of 1000 events as NDJSON, the same
    instructions_window     gw_window_fill and gw_window_feed: PUBLISH out, PUBACK in
    instructions_packed     the same in messages of 64 KiB

What a count depends on stands in the table: compiler, flags, machine, C library, valgrind, and the
scan path that the validator takes on valgrind's idea of this processor. Counts of another set are
not compared: the rows are void, which a run with --gate takes for a failure, and others do not.
Fewer instructions are outside the tolerance too: then the table is out of date, and would hide the
next loss.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.harness import Benchmark, Context, Failed, Figure, Voided
from benchmarks.processes import ROOT, program

TABLE: Final = Path(__file__).with_name("instructions.json")
SOURCE: Final = Path(__file__).with_name("instructions.c")
NATIVE: Final = ROOT / "_native"
CASES: Final = {"validate": 1000, "ingest": 2000, "batch": 4000, "window": 4000, "packed": 4000}
"""How many events each works on."""
FLAGS: Final = (
    *("-std=gnu11", "-O2", "-g", "-fPIC", "-fwrapv", "-fvisibility=hidden", "-DNDEBUG"),
    *("-D_GNU_SOURCE", *(("-march=x86-64", "-mprfchw") if platform.machine() == "x86_64" else ())),
)
"""Of setup.py and Python's own, with the oldest processor of the family."""
PREFIX: Final = "instructions_"


class Slow(NamedTuple):
    """A build that is slower on purpose: `function` first counts `steps` down."""

    function: str
    steps: int

    def source(self) -> str:
        """A function that stands before the real one (ld --wrap); both take four words at most."""
        arguments = "long a, long b, long c, long d"
        return (
            f"long __real_{self.function}({arguments});\n"
            f"long __wrap_{self.function}({arguments});\n"
            f"long __wrap_{self.function}({arguments}) {{\n"
            f'    for (long step = {self.steps}; step; step--) __asm__ volatile("");\n'
            f"    return __real_{self.function}(a, b, c, d);\n}}\n"
        )


def _run(command: list[str], directory: Path, what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    if done.returncode:
        raise Failed(f"{what} failed: {(done.stdout + done.stderr).strip()[-300:]}")
    return done.stdout


def compile_core(directory: Path) -> None:
    """Objects of the native core and of the driver, in `directory`."""
    sources = [str(path) for path in sorted(NATIVE.glob("gw_*.c"))]
    command = [program("cc"), *FLAGS, f"-I{NATIVE}", "-c", *sources, str(SOURCE)]
    _run(command, directory, "compiling the native core")


def link(directory: Path, slow: Slow | None = None) -> Path:
    """The driver from these objects."""
    output = directory / ("instructions" if slow is None else f"slow-{slow.function}-{slow.steps}")
    objects = [str(path) for path in sorted(directory.glob("*.o"))]
    command = [program("cc"), "-O2", *objects, "-o", str(output)]
    if slow is not None:
        source = output.with_suffix(".c")
        source.write_text(slow.source())
        command += [str(source), f"-Wl,--wrap={slow.function}"]
    _run(command, directory, "linking the driver")
    return output


def count(driver: Path, case: str, events: int | None = None) -> tuple[float, str]:
    """Instructions an event, and the scan path of the validator. Raises Failed."""
    events = events or CASES[case]
    found = driver.with_name(f"{driver.name}.{case}.callgrind")
    command = [
        *(program("valgrind"), "-q", "--tool=callgrind", "--toggle-collect=work"),
        *(f"--callgrind-out-file={found}", str(driver), str(driver.parent), case, str(events)),
    ]
    path = _run(command, driver.parent, f"counting {case}").strip()
    total = re.search(r"^totals: (\d+)$", found.read_text(), re.MULTILINE)
    if total is None or not int(total[1]):
        raise Failed(f"callgrind counted nothing for {case}")
    return int(total[1]) / events, path


def _first_version(*command: str) -> str:
    try:
        said = _run([program(command[0]), *command[1:]], ROOT, command[0]).splitlines()[0]
    except (Failed, OSError, IndexError):
        return f"{command[0]} unknown"
    version = re.search(r"\d+\.\d+(\.\d+)?", said.rpartition(")")[2])
    name = "gcc" if command[0] == "cc" else command[0]
    return f"{'clang' if 'clang' in said else name} {version[0] if version else said}"


def conditions(path: str) -> dict[str, str]:
    """What the counts depend on, beside the sources."""
    return {
        "compiler": _first_version("cc", "--version"),
        "flags": " ".join(FLAGS),
        "machine": platform.machine(),
        "libc": os.confstr("CS_GNU_LIBC_VERSION") or "unknown",
        "valgrind": _first_version("valgrind", "--version"),
        "scan path": path,
    }


def count_all(directory: Path, cases: Mapping[str, int] = CASES) -> dict[str, Any]:
    """Build and count: what the table holds."""
    compile_core(directory)
    driver = link(directory)
    counts, path = {}, ""
    for case in cases:
        counts[case], path = count(driver, case)
    return {"conditions": conditions(path), "instructions": counts}


def comparable(table: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises Voided when the counts were made under other conditions."""
    known, here = table["conditions"], found["conditions"]
    if other := [key for key in here if known.get(key) != here[key]]:
        differences = "; ".join(
            f"{key} {here[key]}, in the table {known.get(key)}" for key in other
        )
        raise Voided(
            f"not comparable with {TABLE.name}: {differences}."
            " `python -m benchmarks.instructions --update` makes a table for this machine"
        )


def compare(table: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Figure]:
    """Each case beside its count in the table. Raises Voided."""
    comparable(table, found)
    figures = {}
    for case, value in found["instructions"].items():
        known = table["instructions"].get(case)
        if known is None:
            raise Failed(f"{TABLE.name} has no {case}: python -m benchmarks.instructions --update")
        note = f"{found['conditions']['compiler']}, scan path {found['conditions']['scan path']}"
        figures[PREFIX + case] = Figure(value, "instructions", known, value / known, note)
    return figures


def measure(context: Context) -> dict[str, Figure]:
    """Build, count, compare with the table."""
    return compare(json.loads(TABLE.read_text()), count_all(context.directory))


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 1 when a count has moved, or cannot be compared."""
    from benchmarks import gates
    from benchmarks.harness import Row

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="gateway-instructions-") as directory:
        try:
            found = count_all(Path(directory))
        except Failed as why:
            print(why, file=sys.stderr)
            return 1
    if options.update:
        TABLE.write_text(json.dumps(found, indent=1) + "\n")
        print(TABLE.read_text(), end="")
        return 0
    try:
        figures = compare(json.loads(TABLE.read_text()), found)
    except (Failed, Voided) as why:
        print(why, file=sys.stderr)
        return 1
    rows = [Row(name, "measured", figure) for name, figure in figures.items()]
    for row in rows:
        assert row.figure is not None
        print(f"{row.name:22} {row.figure.value:8.1f} {row.figure.ratio:.4f} of the table")
    return 1 if gates.short(rows, quick=True) else 0


BENCHMARKS: Final = [
    Benchmark(
        {PREFIX + case: "benchmarks/instructions.json" for case in CASES},
        measure,
    )
]


if __name__ == "__main__":
    sys.exit(main())
