"""What does a stronger acknowledgement cost, beside `enqueue` and beside what it cannot do without?

    durable_vs_enqueue   requests/s with ?ack=durable against ?ack=enqueue, the same gateway, its
                         broker away: door, log and committer
    sink_vs_enqueue      requests/s with ?ack=sink against ?ack=enqueue, the same gateway publishing
                         into Mosquitto (stock limits, no subscriber). Both are what wrk saw
                         answered; each run begins with everything published.
    durable_latency_ms   p50 of ?ack=durable with one client (peers/one_client.py), its broker away,
                         against the p50 of the empty handler with the same client + the p50 of a
                         bare fdatasync of one 4 KiB dirty page on the same file system

Both words of a comparison stand in the query, so that reading it costs both the same. As many
requests as wrk saw answered must have been counted as answered with that acknowledgement, or the
run has failed: a dead letter's 202 is no `sink`.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import load, logs
from benchmarks.harness import (
    Benchmark,
    Context,
    Failed,
    Figure,
    Side,
    Voided,
    compare,
    interleave,
)
from benchmarks.latency import percentile
from benchmarks.processes import Child, closed_port, python
from benchmarks.servers import Gateway, GranianPeer, Mosquitto

DURABLE: Final = "durable_vs_enqueue"
SINK: Final = "sink_vs_enqueue"
LATENCY: Final = "durable_latency_ms"
SETTLE_S_MAX: Final = 60
PAGE_BYTES: Final = 4096
WAITED_SHARE_MAX: Final = 0.2
_first_seq: Final = itertools.count(6_000_000_000, 1_000_000)


def settled(gateway: Gateway, published: bool) -> bool:
    """Nothing is left to sync or, with `published`, to publish."""
    now = gateway.metrics()
    if published and now["gateway_events_waiting"]:
        return False
    return not (now["gateway_log_uncommitted_bytes"] or now["gateway_log_not_durable_bytes"])


def check_answers(ack: str, requests: int, before: dict[str, float], now: dict[str, float]) -> None:
    """All the answers said what was asked for, and all the events are in the log. Raises Failed."""
    accepted = "gateway_events_accepted_total"
    if (found := now[accepted] - before[accepted]) < requests:
        raise Failed(f"{requests} events were answered, but {found:.0f} accepted")
    if ack == "enqueue":
        return
    series = f'gateway_acks_total{{ack="{ack}"}}'
    if (found := now[series] - before[series]) < requests:
        raise Failed(f"{requests} events were answered, but {found:.0f} with {ack}")


def _rate(gateway: Gateway, ack: str, published: bool, seconds: float, directory: Path) -> float:
    """Requests a second, from rest to rest."""
    before = gateway.metrics()
    seen = load.run(gateway.port, seconds, directory, query=f"ack={ack}")
    gateway.check()
    gateway.wait_until(lambda: settled(gateway, published), SETTLE_S_MAX, "settled")
    check_answers(ack, seen.requests, before, gateway.metrics())
    return seen.rate


def _compared(gateway: Gateway, ack: str, published: bool, context: Context) -> Figure:
    seconds = context.pick(1, 2)
    sides: dict[str, Side] = {
        word: partial(_rate, gateway, word, published, seconds, context.directory)
        for word in (ack, "enqueue")
    }
    found = interleave(sides, context.pick(3, 4), context)
    if left := gateway.metrics()["gateway_unexplained_events"]:
        raise Failed(f"{left:.0f} events unexplained")
    return compare(found[ack], found["enqueue"], "req/s", "wrk -t1 -c64")


@contextlib.contextmanager
def _alone(context: Context, capacity_mib: int) -> Iterator[Gateway]:
    with contextlib.ExitStack() as stack:
        away = stack.enter_context(closed_port())
        gateway = Gateway(
            context.directory / "gateway",
            f"mqtt://127.0.0.1:{away}",
            context.workers,
            capacity_mib * logs.MIB,
        )
        yield stack.enter_context(gateway)


def measure_durable(context: Context) -> dict[str, Figure]:
    """Requests a second, `durable` and `enqueue` in turn."""
    with _alone(context, context.pick(256, 2048)) as gateway:
        figure = _compared(gateway, "durable", False, context)
        if gateway.metrics()["gateway_events_published_total"]:
            raise Failed("the broker should be away")
    return {DURABLE: figure}


def measure_sink(context: Context) -> dict[str, Figure]:
    """Requests a second, `sink` and `enqueue` in turn, into the same broker."""
    with (
        Mosquitto(context.directory / "mosquitto") as broker,
        Gateway(
            context.directory / "gateway",
            broker.url,
            context.workers,
            context.pick(128, 512) * logs.MIB,
        ) as gateway,
    ):
        gateway.wait_until(gateway.connected, 10, "connected to the broker")
        figure = _compared(gateway, "sink", True, context)
        broker.check()
    return {SINK: figure}


def _client_p50_ms(port: int, query: str, count: int, context: Context) -> float:
    numbers = map(str, (port, count, next(_first_seq)))
    command = python("-m", "benchmarks.peers.one_client", *numbers, query)
    with Child("client", command, context.directory, pipe=True) as client:
        took: list[float] = json.loads(client.result(120))["microseconds"]
    if len(took) != count:
        raise Failed(f"{len(took)} of {count} events were answered")
    return percentile(sorted(took), 50) / 1000


class BareSync:
    """fdatasync of one dirty page of a file whose blocks are all written: no metadata."""

    def __init__(self, path: Path, pages: int) -> None:
        self.path, self.pages = path, pages
        self._waited_ns = self._ran_ns = 0
        with path.open("wb") as file:
            file.write(bytes(PAGE_BYTES * pages))
            file.flush()
            os.fsync(file.fileno())

    def p50_ms(self) -> float:
        """Each page in turn; the time of the fdatasync alone."""
        took = []
        waited_ns, began_ns = waited_for_core_ns(), time.perf_counter_ns()
        fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for page in range(self.pages):
                os.pwrite(fd, os.urandom(PAGE_BYTES), page * PAGE_BYTES)
                started = time.perf_counter_ns()
                os.fdatasync(fd)
                took.append(time.perf_counter_ns() - started)
        finally:
            os.close(fd)
        self._waited_ns += waited_for_core_ns() - waited_ns
        self._ran_ns += time.perf_counter_ns() - began_ns
        return percentile(sorted(took), 50) / 1e6

    def judge(self) -> None:
        """Raises Voided when it measured the neighbours more than the disk."""
        share = self._waited_ns / self._ran_ns
        if share > WAITED_SHARE_MAX:
            raise Voided(
                f"the bare fdatasync waited for a core during {share:.0%} of its time (at most"
                f" {WAITED_SHARE_MAX:.0%}): the machine is busy, and a slow reference flatters"
            )


def waited_for_core_ns() -> int:
    """How long this thread was ready to run and had no core, so far."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1])


def measure_latency(context: Context) -> dict[str, Figure]:
    """One client: the gateway, the empty handler and a bare fdatasync in turn."""
    count = context.pick(500, 4000)
    with (
        _alone(context, 64) as gateway,
        GranianPeer("empty_handler", context.directory, context.workers) as empty,
    ):
        sync = BareSync(context.directory / "pages", count)
        before = gateway.metrics()
        rounds = context.pick(5, 9)
        sides: dict[str, Side] = {
            "durable": lambda: _client_p50_ms(gateway.port, "ack=durable", count, context),
            "empty handler": lambda: _client_p50_ms(empty.port, "ack=durable", count, context),
            "fdatasync": sync.p50_ms,
        }
        found = interleave(sides, rounds, context)
        gateway.check()
        empty.check()
        gateway.wait_until(lambda: settled(gateway, False), SETTLE_S_MAX, "settled")
        check_answers("durable", (rounds + 1) * count, before, gateway.metrics())
    sync.judge()
    handler, bare = found["empty handler"], found["fdatasync"]
    both = [a + b for a, b in zip(handler, bare, strict=True)]
    note = (
        f"{rounds} runs of {count} events; empty handler {min(handler):.3f} to {max(handler):.3f},"
        f" fdatasync {min(bare):.3f} to {max(bare):.3f} ms"
    )
    return {LATENCY: compare(found["durable"], both, "ms", note)}


BENCHMARKS: Final = [
    Benchmark({DURABLE: "the same gateway with ack=enqueue"}, measure_durable),
    Benchmark({SINK: "the same gateway and broker with ack=enqueue"}, measure_sink),
    Benchmark(
        {LATENCY: "the empty handler's p50 with the same client + a bare fdatasync's"},
        measure_latency,
    ),
]
