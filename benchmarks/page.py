"""What of docs/performance.md is written by a run? What stands between its markers, and docs/img.

    .venv/bin/python -m benchmarks.page [RESULTS]      write both from results/latest.json

The page and the pictures are a function of the results alone. Between `<!-- bench:NAME -->` and
`<!-- /bench:NAME -->` stands what this file writes: `run` (machine, versions, method, command),
`figures` (the table), `curves` (the pictures). Everything else on the page is written by hand.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks import harness, plot
from benchmarks.harness import Curve
from benchmarks.processes import ROOT
from benchmarks.table import number

PAGE: Final = ROOT / "docs" / "performance.md"
PICTURES: Final = ROOT / "docs" / "img"
PREFIX: Final = "bench-"
RUN: Final = "run"
"""Of the results: what is no row."""
TITLES: Final = {
    "rate_by_batch_size": "Events a second against the size of a batch",
    "rate_by_devices": "Events a second against the number of devices",
    "rate_by_log_fill": "Events a second against the fill of the log",
    "rate_by_connections": "Requests a second against open connections",
    "rss_mib_by_connections": "Memory of a worker against open connections",
    "latency_by_load_p99_ms": "Latency of an answer against the load that is offered",
}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def run_block(run: Mapping[str, Any]) -> str:
    """Where and how it was measured."""
    lines = [f"| {_cell(name)} | {_cell(text)} |" for name, text in run["lines"]]
    lines.append(
        f"| command | `{run['command']}`, {run['took_s']:.0f} s; load {run['load_after']} after |"
    )
    return "\n".join(["| | |", "|---|---|", *lines])


def figures_block(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of all rows."""
    lines = [
        "| figure | value | reference | ratio | asked for | |",
        "|---|---:|---:|---:|---|---|",
    ]
    for name, row in rows.items():
        if row["value"] is None:
            why = next(f"{kind}: {row[kind]}" for kind in ("failed", "void") if kind in row)
            lines.append(f"| `{name}` | | | | {row.get('gate', '')} | {_cell(why)} |")
            continue
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        asked = " ".join(filter(None, (row.get("gate", ""), row.get("verdict", ""))))
        about = "; ".join(filter(None, (row.get("against", ""), row.get("note", ""))))
        lines.append(
            f"| `{name}` | {number(row['value'])} {row['unit']} | {number(row['reference'])}"
            f" | {ratio} | {asked} | {_cell(about)} |"
        )
    return "\n".join(lines)


def curves(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Curve]:
    """By name of their row."""
    return {name: Curve(**row["curve"]) for name, row in rows.items() if "curve" in row}


def curves_block(found: Mapping[str, Curve]) -> str:
    """The pictures, and under each its numbers."""
    parts = []
    for name, curve in found.items():
        points = []
        for of, line in curve.lines.items():
            pairs = ", ".join(f"{plot.short(x)}: {plot.short(y)}" for x, y in line)
            points.append(f"{of} {pairs}".strip())
        picture = f"![{TITLES.get(name, name)}](img/{PREFIX}{name}.svg)"
        parts.append(f"{picture}\n\n`{name}`, {curve.y} by {curve.x}: {'; '.join(points)}.")
    return "\n\n".join(parts)


def replaced(page: str, name: str, block: str) -> str:
    """The page with another block between its markers. Raises ValueError without them."""
    pattern = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"docs/performance.md wants <!-- bench:{name} --> and its end, once")
    return pattern.sub(lambda match: f"{match[1]}\n{block}\n\n{match[2]}", page)


def render(page: str, results: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The new page, and the pictures by file name."""
    rows = {name: row for name, row in results.items() if name != RUN}
    found = curves(rows)
    page = replaced(page, "run", run_block(results[RUN]))
    page = replaced(page, "figures", figures_block(rows))
    page = replaced(page, "curves", curves_block(found))
    pictures = {
        f"{PREFIX}{name}.svg": plot.draw(TITLES.get(name, name), curve)
        for name, curve in found.items()
    }
    return page, pictures


def write(results: Mapping[str, Any]) -> None:
    """Into docs/; a picture that is no longer made goes."""
    page, pictures = render(PAGE.read_text(), results)
    PICTURES.mkdir(exist_ok=True)
    for old in PICTURES.glob(f"{PREFIX}*.svg"):
        if old.name not in pictures:
            old.unlink()
    for name, text in pictures.items():
        (PICTURES / name).write_text(text)
    PAGE.write_text(page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Render docs/performance.md from results.")
    parser.add_argument("results", nargs="?", type=Path, default=harness.RESULTS)
    write(json.loads(parser.parse_args().results.read_text()))
