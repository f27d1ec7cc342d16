"""How does the table of the peers look in the README? Made from the results, between two marks."""

import json
from pathlib import Path
from typing import Any, Final

from benchmarks.gates import GATES
from benchmarks.harness import Failed
from benchmarks.peer_servers import PEERS
from benchmarks.processes import ROOT
from benchmarks.table import number

README: Final = ROOT / "README.md"
BEGIN: Final = "<!-- peers: written by `make bench-peers ARGS=--readme` -->"
END: Final = "<!-- end of peers -->"

OURS: Final = {
    "ours_enqueue": ("**this gateway**, `ack=enqueue`", "it is in the log, and survives SIGKILL"),
    "ours_sink": ("**this gateway**, `ack=sink`", "the broker has it (PUBACK)"),
    "ours_broker_away": ("**this gateway**, its broker away", "it is in the log"),
}
COMPARISONS: Final = {
    "vs_fastapi": "end to end beside FastAPI + aiomqtt",
    "vs_best_peer": "end to end beside Granian + gmqtt",
    "sink_vs_aiomqtt_peer": "`ack=sink` beside Granian + aiomqtt",
    "single_vs_nginx": "the door alone beside nginx",
}


def _cells(row: dict[str, Any], nginx: float) -> tuple[str, str, str]:
    """2xx/s, share of nginx, confirmed; or why not."""
    if row["value"] is None:
        why = row.get("void") or row.get("failed") or "no figure"
        kind = "void: " if "void" in row else ""
        return f"{kind}{why}".replace("|", "/"), "", ""
    confirmed = row.get("confirmed")
    share = "" if confirmed is None else "all" if confirmed >= 1 else f"{confirmed:.1%}"
    return number(row["value"]), f"{row['value'] / nginx:.3f}", share


def render(results: dict[str, Any]) -> str:
    """The section, without its marks."""
    rows, nginx = results["rows"], results["nginx"]
    named = dict(OURS)
    named |= {f"peer_{key}": (peer.title, peer.meaning) for key, peer in PEERS.items()}
    named = {name: said for name, said in named.items() if name in rows}
    lines = [
        "| one event a request → MQTT | 2xx/s | ÷ nginx | confirmed | what its 2xx means |",
        "|---|---|---|---|---|",
    ]
    for name, (title, meaning) in named.items():
        rate, share, confirmed = _cells(rows[name], nginx)
        lines.append(f"| {title} | {rate} | {share} | {confirmed} | {meaning} |")
    lines += ["", "| ratio | measured | wanted |", "|---|---|---|"]
    for name, text in COMPARISONS.items():
        if name not in rows:
            continue
        ratio = rows[name]["ratio"]
        shown = f"{ratio:.2f}" if ratio is not None else "void" if "void" in rows[name] else "none"
        lines.append(f"| {text} | {shown} | {GATES[name].comparison} {GATES[name].limit:g} |")
    about = results["about"]
    lines += [
        "",
        f"nginx `return 202`: {number(nginx)}/s in the same rounds. {about['when']};"
        f" {about['machine']}; {about['programs']}; {about['peers']}."
        " Client, servers and broker on the same machine; wrk -t1 -c64, every event with a new seq;"
        " medians of interleaved rounds; one worker each. Confirmed: the share of the answered"
        " events that reached a subscriber, in a run of its own.",
    ]
    return "\n".join(lines)


def replaced(text: str, section: str) -> str:
    """The README with this section. Raises Failed when a mark is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise Failed(f"README.md has not both marks: {BEGIN} and {END}")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def write(results: Path, readme: Path = README) -> None:
    """Results into the README. Raises Failed when there are none, or only of a quick run."""
    try:
        found = json.loads(results.read_text())
    except OSError:
        raise Failed(f"{results.name} is not there: measure first, make bench-peers") from None
    if found["quick"]:
        raise Failed("the last run was a quick one: measure first, make bench-peers")
    if missing := [key for key in PEERS if f"peer_{key}" not in found["rows"]]:
        raise Failed(f"the last run was without {', '.join(missing)}: make bench-peers")
    readme.write_text(replaced(readme.read_text(), render(found)))
