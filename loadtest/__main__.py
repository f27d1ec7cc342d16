"""Run the load test and judge it by slo.toml. Writes build/loadtest/report.html and summary.json.

Exit codes: 0 all SLOs met · 1 a program of the run failed · 2 wrong arguments · 3 an SLO was missed
· 4 void: the client or the machine was too slow to measure anything.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

from benchmarks import machine
from benchmarks.harness import Failed
from loadtest import plan as plans
from loadtest import run as runs
from loadtest import verdict

OUTPUT: Final = Path(__file__).resolve().parent.parent / "build" / "loadtest"
FAILED: Final = 1
WORDS: Final = {
    verdict.MET: "all SLOs are met",
    verdict.MISSED: "an SLO is missed",
    verdict.VOID: "void: the load was not sent as planned; run it again on a quieter machine",
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="loadtest", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one minute instead of four")
    parser.add_argument(
        "--attempts", type=int, default=1, help="run again when a run is void, so often in all (1)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of what the fleets vary (1)")
    parser.add_argument(
        "--directory", type=Path, help="scratch for logs; its file system matters (a temporary one)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where report and summary go")
    return parser.parse_args(arguments)


def summary(outcome: runs.Outcome, code: int, options: argparse.Namespace) -> dict[str, object]:
    """What is kept of a run, without its events."""
    client = outcome.client
    kept = ("windows", "due", "requests", "stats", "repeats_sent", "repeats_told", "refusals_due")
    return {
        "verdict": WORDS[code],
        "exit_code": code,
        "quick": options.quick,
        "seed": options.seed,
        "load_average": machine.load(),
        "findings": [finding._asdict() for finding in outcome.findings],
        "client": {name: client[name] for name in (*kept, "sheds")},
        "subscriber": {
            "events": sum(map(len, outcome.arrivals.arrived.values())),
            "repeated": outcome.arrivals.repeated,
        },
        "gateway": {
            name: value
            for name, value in outcome.books.items()
            if name.startswith(("gateway_events", "gateway_unexplained", "gateway_mqtt"))
        },
    }


def attempt(options: argparse.Namespace) -> int:
    """One run. Returns its exit code; raises Failed."""
    slo = plans.read()
    plan = plans.plan(slo, slo.phases["quick" if options.quick else "full"])
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"loadtest: {text}", file=sys.stderr, flush=True)

    say(f"seed {options.seed}, {plan.seconds:g} s of load, load average {machine.load()}")
    with tempfile.TemporaryDirectory(prefix="gateway-load-", dir=options.directory) as scratch:
        outcome = runs.run(
            slo, plan, Path(scratch), say=say, report=output / "report.html", seed=options.seed
        )
    code = verdict.exit_code(outcome.findings)
    text = json.dumps(summary(outcome, code, options), indent=1)
    (output / "summary.json").write_text(text + "\n")
    print("\n".join(map(str, outcome.findings)))
    print(f"loadtest: {WORDS[code]} ({output / 'report.html'})")
    return code


def main(arguments: list[str] | None = None) -> int:
    """The whole command. Returns the exit code."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended
    code = verdict.VOID
    try:
        for _ in range(max(1, options.attempts)):
            code = attempt(options)
            if code != verdict.VOID:
                break
    except Failed as why:
        print(f"loadtest: no verdict: {why}", file=sys.stderr)
        return FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
