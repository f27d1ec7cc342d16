"""How does the gateway stand beside what others use for the same job?

    .venv/bin/python -m benchmarks.peer_table [--quick] [--peers NAME,...] [--gate] [--readme]

Every peer of peer_servers.py and the gateway, with the same requests, into the same Mosquitto, and
nginx `return 202` in the same rounds. What is not here is installed first (installs.py).

    vs_fastapi            the gateway end to end / FastAPI + aiomqtt
    vs_best_peer          the gateway end to end / Granian + gmqtt, whose 202 comes from memory
    sink_vs_aiomqtt_peer  the gateway with ack=sink / Granian + aiomqtt: both answer after PUBACK
    single_vs_nginx       the gateway with its broker away / nginx

A round measures each side once, one after the other; after a peer's turn the broker's own count
must stand still before the next one begins. The gateway's end-to-end rate is what it keeps up
(end_to_end.py), a peer's are its 2xx as they come. Then each side has one more run, with a
subscriber that knows each event by its seq: `confirmed` is the share of the answered events that
arrived. A peer that loses has that in its row; a gateway that loses has failed.

A peer that cannot be installed or started, or that refuses a request, has a row that says why, and
the others go on. One that is not itself (shares.py) is void, and so is what is compared with it.
Exit codes: those of `python -m benchmarks`.
"""

import argparse
import contextlib
import json
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import acks, harness, installs, load, logs, machine, peer_readme, shares, table
from benchmarks.__main__ import exit_code
from benchmarks.deliveries import SETTINGS, Confirmed, Subscriber, Taken
from benchmarks.end_to_end import Run
from benchmarks.harness import Benchmark, Context, Failed, Row, Side, Voided, compare
from benchmarks.peer_servers import PEERS
from benchmarks.pipeline import accepted_rate
from benchmarks.processes import closed_port
from benchmarks.servers import Gateway, Mosquitto, Nginx

NGINX: Final = "nginx"
ENQUEUE: Final = "ours_enqueue"
SINK: Final = "ours_sink"
ALONE: Final = "ours_broker_away"
OURS: Final = (ENQUEUE, SINK, ALONE)
COMPARED: Final[dict[str, tuple[str, str]]] = {
    "vs_fastapi": (ENQUEUE, "peer_fastapi"),
    "vs_best_peer": (ENQUEUE, "peer_gmqtt"),
    "sink_vs_aiomqtt_peer": (SINK, "peer_aiomqtt"),
    "single_vs_nginx": (ALONE, NGINX),
}
REFERENCES: Final[dict[str, str]] = {
    **{name: f"{reference} in the same rounds" for name, (_, reference) in COMPARED.items()},
    **dict.fromkeys((*OURS, *(f"peer_{key}" for key in PEERS)), "nginx `return 202`"),
}
"""All rows, with what each is compared with."""
RESULTS: Final = harness.RESULTS.with_name("peers.json")


@dataclass
class Tally:
    """Of a peer's rounds, the one that warms up among them."""

    answered: int = 0
    taken: int = 0


@dataclass
class Measured:
    """What the rounds gave."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    """By row; nginx beside them."""
    broken: dict[str, str] = field(default_factory=dict)
    """Why a row has no figure."""
    confirmed: dict[str, Confirmed] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)


def take_turns(
    sides: Mapping[str, Side], rounds: int, broken: dict[str, str], say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Each side once a round, after one round that warms up. One that fails is left out from then
    on, and `broken` says why; without nginx nothing can be said: that raises.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, rounds):
        for name, side in sides.items():
            if name in broken:
                continue
            try:
                value = side()
                if not (math.isfinite(value) and value > 0):
                    raise Failed(f"{value} is no measurement")
            except (Failed, OSError) as why:
                if name == NGINX:
                    raise
                broken[name] = str(why)
                say(f"{name}: {why}")
                continue
            if number >= 0:
                rates[name].append(value)
            say(f"{'warm-up' if number < 0 else f'round {number + 1}'} {name}: {value:,.6g}")
    return rates


def rows_of(measured: Measured) -> list[Row]:
    """The rows of what was asked for, in the order of the table."""
    rates, nginx = measured.rates, measured.rates[NGINX]
    found: dict[str, Row] = {}
    for name in REFERENCES:
        if name in COMPARED or name not in measured.rates.keys() | measured.broken.keys():
            continue
        why = measured.broken.get(name)
        if why is None and name in OURS and (lost := _lost(measured.confirmed.get(name))):
            why = lost
        if why is not None:
            found[name] = Row(name, "failed", None, why)
            continue
        try:
            if name.startswith("peer_"):
                key = name.removeprefix("peer_")
                shares.judge(key, statistics.median(rates[name]), statistics.median(nginx))
        except Voided as void:
            found[name] = Row(name, "void", None, str(void))
            continue
        figure = compare(rates[name], nginx, "2xx/s", _note(name, measured))
        found[name] = Row(name, "measured", figure)
    for name, (ours, reference) in COMPARED.items():
        if reference != NGINX and reference not in found:
            continue
        both = [found[side] for side in (ours, reference) if side != NGINX]
        missing = [row for row in both if row.figure is None]
        if missing:
            status, reason = missing[0].status, f"{missing[0].name}: {missing[0].reason}"
            found[name] = Row(name, status, None, reason)
        else:
            note = _notes((ours, reference), measured)
            figure = compare(rates[ours], rates[reference], "2xx/s", note)
            found[name] = Row(name, "measured", figure)
    return [found[name] for name in REFERENCES if name in found]


def _lost(confirmed: Confirmed | None) -> str:
    if confirmed is None or confirmed.delivered >= confirmed.answered:
        return ""
    lost = confirmed.answered - confirmed.delivered
    return f"{lost} of {confirmed.answered} answered events never reached the subscriber"


def _note(name: str, measured: Measured) -> str:
    parts = []
    if (confirmed := measured.confirmed.get(name)) is not None:
        parts.append(_lost(confirmed) or f"all {confirmed.answered} events of a run arrived")
    if (tally := measured.tallies.get(name)) is not None:
        parts.append(f"all rounds: {tally.answered} answered, {tally.taken} messages published")
    return "; ".join(parts)


def _notes(names: tuple[str, ...], measured: Measured) -> str:
    said = ((name, _lost(measured.confirmed.get(name))) for name in names)
    return "; ".join(f"{name}: {lost}" for name, lost in said if lost)


class _Sides:
    """The servers, and one measurement of each."""

    def __init__(self, context: Context, stack: contextlib.ExitStack) -> None:
        self._context = context
        self.seconds = context.pick(2, 4)
        directory, workers = context.directory, context.workers
        self.broker = stack.enter_context(Mosquitto(directory / "mosquitto", more=SETTINGS))
        self.taken = stack.enter_context(contextlib.closing(Taken(self.broker.port)))
        self.gateway = stack.enter_context(
            Gateway(directory / "gateway", self.broker.url, workers, 512 * logs.MIB)
        )
        self.gateway.wait_until(self.gateway.connected, 10, "connected to the broker")
        away = stack.enter_context(closed_port())
        capacity = context.pick(512, 1024) * logs.MIB
        url = f"mqtt://127.0.0.1:{away}"
        self.alone = stack.enter_context(Gateway(directory / "alone", url, workers, capacity))
        self.nginx = stack.enter_context(Nginx(directory / "nginx"))
        self.tallies: dict[str, Tally] = {}

    def _load(self, port: int, query: str = "") -> load.Load:
        return load.run(port, self.seconds, self._context.directory, query=query)

    def ours(self) -> dict[str, Side]:
        """Before the peers: while the last two are measured, the broker's count catches up with
        what the first two published.
        """

        def nginx() -> float:
            return self._load(self.nginx.port).rate

        return {
            ENQUEUE: Run(self.gateway, self.seconds, self._context),
            SINK: self._sink,
            ALONE: lambda: accepted_rate(self.alone, self.seconds, self._context.directory),
            NGINX: nginx,
        }

    def _sink(self) -> float:
        before = self.gateway.metrics()
        seen = self._load(self.gateway.port, "ack=sink")
        self.gateway.wait_until(lambda: acks.settled(self.gateway, True), 60, "settled")
        acks.check_answers("sink", seen.requests, before, self.gateway.metrics())
        return seen.rate

    def peer(self, name: str, server: Any, one_message_an_event: bool) -> Side:
        """The peer's 2xx a second; what it has then still to publish is waited for."""
        tally = self.tallies.setdefault(name, Tally())

        def side() -> float:
            before, answered = self.taken.now(), 0
            try:
                seen = self._load(server.port)
                server.check()
                answered = seen.requests
            finally:
                expected = answered if one_message_an_event else None
                published = self.taken.since(before, expected)
            tally.answered += answered
            tally.taken += published
            return seen.rate

        return side

    def confirm(self, port: int, query: str = "") -> Confirmed:
        """A run with a subscriber."""
        with Subscriber(self.broker.port) as subscriber:
            seen = self._load(port, query)
            return subscriber.confirm(seen.number, seen.requests)


def measure(context: Context, wanted: list[str]) -> Measured:
    """Install, start, take turns, confirm."""
    measured = Measured()
    with contextlib.ExitStack() as stack:
        started: dict[str, Any] = {}
        sides = _Sides(context, stack)
        for key in wanted:
            try:
                folder = context.directory / key
                server = PEERS[key].start(folder, sides.broker.port, context.workers)
                started[f"peer_{key}"] = stack.enter_context(server)
            except (Failed, OSError) as why:
                measured.broken[f"peer_{key}"] = str(why)
                context.say(f"{key}: {why}")
        turns = sides.ours()
        for name, server in started.items():
            one = PEERS[name.removeprefix("peer_")].one_message_an_event
            turns[name] = sides.peer(name, server, one)
        rounds = context.pick(3, 5)
        measured.rates = take_turns(turns, rounds, measured.broken, context.say)
        measured.tallies = sides.tallies
        targets = {ENQUEUE: (sides.gateway.port, ""), SINK: (sides.gateway.port, "ack=sink")}
        targets |= {name: (server.port, "") for name, server in started.items()}
        for name, target in targets.items():
            if name in measured.broken:
                continue
            try:
                measured.confirmed[name] = sides.confirm(*target)
                context.say(f"confirmed {name}: {measured.confirmed[name].share:.2%}")
            except (Failed, OSError) as why:
                measured.broken[name] = str(why)
        sides.broker.check()
        if left := sides.gateway.metrics()["gateway_unexplained_events"]:
            raise Failed(f"{left:.0f} events unexplained")
    return measured


def as_results(
    rows: list[Row], measured: Measured, about: list[tuple[str, str]], quick: bool
) -> dict[str, Any]:
    """The content of results/peers.json."""
    results: dict[str, dict[str, Any]] = harness.as_results(rows)
    for name, confirmed in measured.confirmed.items():
        if name in results:
            results[name]["confirmed"] = confirmed.share
    return {
        "about": dict(about),
        "quick": quick,
        "nginx": statistics.median(measured.rates[NGINX]),
        "rows": results,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="peer_table", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about 4 minutes instead of 10")
    parser.add_argument(
        "--peers", default=",".join(PEERS), metavar="NAME,...", help=f"of {', '.join(PEERS)}"
    )
    parser.add_argument("--gate", action="store_true", help="exit code 3 when a figure falls short")
    parser.add_argument(
        "--readme", action="store_true", help="measure nothing; the last results go to the README"
    )
    parser.add_argument("--workers", type=int, default=1, help="HTTP workers of every server (1)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--directory", type=Path, help="scratch for logs (a temporary one)")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The whole run. Returns the exit code."""
    options = parse(arguments)
    wanted = [key for key in options.peers.split(",") if key]
    if unknown := [key for key in wanted if key not in PEERS]:
        print(f"peer_table: no peer {', '.join(unknown)}; {', '.join(PEERS)}", file=sys.stderr)
        return 2
    if options.readme:
        try:
            peer_readme.write(options.output)
        except Failed as why:
            print(f"peer_table: {why}", file=sys.stderr)
            return 1
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gateway-peers-", dir=options.directory) as scratch:
        directory = Path(scratch)
        context = Context(options.quick, directory, options.workers, not options.quiet)
        before = machine.describe(directory, options.quick, options.workers)
        before.append(("peers", installs.versions()))
        try:
            measured = measure(context, wanted)
        except Failed as why:
            print(f"peer_table: {why}", file=sys.stderr)
            return 1
    rows = rows_of(measured)
    took_s = time.monotonic() - began
    benchmark = Benchmark(REFERENCES, lambda _: {})
    print(table.render(rows, [benchmark], before, machine.load(), took_s, options.quick))
    results = as_results(rows, measured, before, options.quick)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print("\n" + peer_readme.render(results))
    return exit_code(rows, options.gate, options.quick)


if __name__ == "__main__":
    sys.exit(main())
