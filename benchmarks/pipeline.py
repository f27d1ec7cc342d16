"""How many requests a second does the whole door take, beside a handler that does nothing?

`gateway serve` with its broker away, so that only the door works (receive, validate, log, answer;
the delivery process walks and syncs), against

    pipeline_vs_empty_handler   a Granian RSGI coroutine that reads the body and answers 202, with
                                the same server settings
    pipeline_vs_empty_door      the gateway's own Granian door around an app that accepts every
                                body unread: what is left is the price of the pipeline itself
    single_vs_nginx             nginx `return 202`: what the machine and wrk allow

All get the same
requests from the same script. What wrk saw accepted must be in the log, or the run has failed.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks import load, logs
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare, interleave
from benchmarks.processes import Child, answers, closed_port, free_port, python
from benchmarks.servers import Gateway, GranianPeer, Nginx


class EmptyDoor(Child):
    """The gateway's door without a log behind it."""

    def __init__(self, directory: Path, workers: int) -> None:
        self.port = free_port()
        command = python("-m", "benchmarks.peers.empty_door", str(self.port), str(workers))
        super().__init__("empty_door", command, directory)
        self.wait_until(lambda: answers(self.port), 20, "listening")


def accepted_rate(gateway: Gateway, seconds: float, directory: Path) -> float:
    """Requests a second, after a look whether the log has all of them."""
    before = gateway.metrics()["gateway_events_accepted_total"]
    seen = load.run(gateway.port, seconds, directory)
    gateway.check()
    gateway.wait_until(
        lambda: gateway.metrics()["gateway_events_accepted_total"] - before >= seen.requests,
        5,
        f"all {seen.requests} accepted events in the log",
    )
    return seen.rate


def _rate(server: Child, port: int, seconds: float, directory: Path) -> float:
    seen = load.run(port, seconds, directory)
    server.check()
    return seen.rate


@contextlib.contextmanager
def _servers(context: Context) -> Iterator[tuple[Gateway, dict[str, tuple[Child, int]]]]:
    with contextlib.ExitStack() as stack:
        away = stack.enter_context(closed_port())
        capacity = context.pick(512, 2048) * logs.MIB
        gateway = Gateway(
            context.directory / "gateway", f"mqtt://127.0.0.1:{away}", context.workers, capacity
        )
        stack.enter_context(gateway)
        empty = GranianPeer("empty_handler", context.directory, context.workers)
        stack.enter_context(empty)
        door = EmptyDoor(context.directory, context.workers)
        stack.enter_context(door)
        nginx = Nginx(context.directory / "nginx")
        stack.enter_context(nginx)
        servers: dict[str, tuple[Child, int]] = {
            "empty handler": (empty, empty.port),
            "empty door": (door, door.port),
            "nginx": (nginx, nginx.port),
        }
        yield gateway, servers


def measure(context: Context) -> dict[str, Figure]:
    """All sides in turn."""
    seconds = context.pick(2, 3)
    with _servers(context) as (gateway, servers):
        sides: dict[str, Callable[[], float]] = {
            "gateway": lambda: accepted_rate(gateway, seconds, context.directory)
        }
        for name, (server, port) in servers.items():
            sides[name] = lambda server=server, port=port: _rate(  # type: ignore[misc]
                server, port, seconds, context.directory
            )
        found = interleave(sides, 3, context)
        now = gateway.metrics()
        if now["gateway_mqtt_connected"] or now["gateway_events_published_total"]:
            raise Failed("the broker should be away")
        if refused := now["gateway_events_received_total"] - now["gateway_events_accepted_total"]:
            raise Failed(f"{refused:.0f} events were refused")
    nginx = statistics.median(found["nginx"])
    ours = statistics.median(found["gateway"])
    note = f"nginx {nginx:,.0f}/s, gateway {ours / nginx:.2f} of it"
    figures = {"single_vs_nginx": compare(found["gateway"], found["nginx"], "req/s")}
    for reference in servers:
        if reference != "nginx":
            against = statistics.median(found[reference]) / nginx
            figures[f"pipeline_vs_{reference.replace(' ', '_')}"] = compare(
                found["gateway"], found[reference], "req/s", f"{note}, {reference} {against:.2f}"
            )
    return figures


BENCHMARKS: Final = [
    Benchmark(
        {
            "pipeline_vs_empty_handler": "an RSGI coroutine that reads the body and answers 202",
            "pipeline_vs_empty_door": "our own door without validator and log",
            "single_vs_nginx": "nginx `return 202`",
        },
        measure,
    )
]
