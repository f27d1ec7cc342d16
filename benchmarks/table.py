"""What does a run look like on a terminal?

Machine, versions and method first, then a line a figure.
"""

import textwrap
from typing import Final

from benchmarks.gates import GATES, verdict
from benchmarks.harness import Benchmark, Row

WIDTH: Final = 150


def number(value: float | None) -> str:
    """Four digits that matter."""
    if value is None:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def render(
    rows: list[Row],
    benchmarks: list[Benchmark],
    before: list[tuple[str, str]],
    load_after: str,
    took_s: float,
    quick: bool,
) -> str:
    """The whole text."""
    reference = {name: text for each in benchmarks for name, text in each.references.items()}
    lines = []
    for name, text in before:
        shown = f"{name + ':' if name else '':9} {text}"
        lines += textwrap.wrap(shown, WIDTH, subsequent_indent=" " * 10)
    lines += [f"{'after:':9} load {load_after}; the run took {took_s:.0f} s", ""]
    cells = [("figure", "value", "unit", "reference", "ratio", "gate", "")]
    notes = [""]
    for row in rows:
        gate = GATES.get(row.name)
        figure = row.figure
        if figure is None:
            cells.append((row.name, row.status.upper(), "", "", "", str(gate or ""), ""))
            notes.append(row.reason)
            continue
        cells.append(
            (
                row.name,
                number(figure.value),
                figure.unit,
                number(figure.reference),
                "" if figure.ratio is None else f"{figure.ratio:.3f}",
                str(gate or ""),
                verdict(row, quick),
            )
        )
        notes.append(f"against {reference[row.name]}; {figure.note}".rstrip("; "))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    right = {1, 3, 4}
    for index, (line, note) in enumerate(zip(cells, notes, strict=True)):
        padded = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
        if index == 0:
            lines.append("  ".join("-" * width for width in widths).rstrip())
        if note:
            lines += textwrap.wrap(note, WIDTH - 4, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
