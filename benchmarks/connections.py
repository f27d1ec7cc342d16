"""Does the rate depend on how many connections are open, and what does an open one cost?

Two workers (one takes 8192 connections), the broker away. wrk works with at most 64 connections;
the rest is held open by clients/idle.py, each of them posting an event now and then. All of them
must still be open at the end. Of two runs the better one counts: what else the machine does can
only slow one down.

    rate_by_connections         the least rate of 64 and more connections beside that of 64
    rss_mib_by_connections      the largest worker, beside the same one with 64
"""

import contextlib
import json
import resource
import signal
from typing import Final

from benchmarks import batch, load, logs, memory
from benchmarks.harness import Benchmark, Context, Curve, Failed, Figure
from benchmarks.processes import Child, closed_port, python
from benchmarks.servers import Gateway

RATE: Final = "rate_by_connections"
RSS: Final = "rss_mib_by_connections"
WORKERS: Final = 2
CAPACITY_BYTES: Final = 512 * logs.MIB
FIRST_SEQ: Final = 9_000_000_000


def _held(gateway: Gateway, count: int, first_seq: int, context: Context) -> Child:
    numbers = map(str, (gateway.port, count, first_seq))
    command = python("-m", "benchmarks.clients.idle", *numbers)
    child = Child(f"idle-{count}", command, context.directory, pipe=True)
    child.wait_until(lambda: "held" in child.last_words(), 60, f"{count} connections open")
    return child


def _at(gateway: Gateway, number: int, seq: int, context: Context) -> tuple[float, float]:
    """Requests/s and MiB of the largest worker with so many connections."""
    active = min(number, load.CONNECTIONS)
    with contextlib.ExitStack() as stack:
        idle = number - active
        held = stack.enter_context(_held(gateway, idle, seq, context)) if idle else None
        before = batch.accepted(gateway)
        seen = [
            load.run(gateway.port, 1, context.directory, connections=active)
            for _ in range(context.pick(1, 2))
        ]
        gateway.check()
        sent = sum(run.requests for run in seen)
        if (counted := batch.accepted(gateway) - before) < sent:
            raise Failed(f"{sent} events were answered 202, {counted:.0f} counted")
        largest = max(
            memory.resident_mib(pid, gateway.data / "gateway.log")
            for pid, (*_, name, _) in memory.children(gateway.pid)
            if name.startswith("worker")
        )
        if held is not None:
            held.process.send_signal(signal.SIGTERM)
            said = json.loads(held.result(30))
            if said["open"] != idle:
                raise Failed(f"{said['open']} of {idle} connections were open")
    return max(run.rate for run in seen), largest


def measure(context: Context) -> dict[str, Figure]:
    """From one connection to ten thousand."""
    numbers = context.pick((64, 2000), (1, 8, 64, 1000, 10_000))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * numbers[-1]:
        raise Failed(
            f"{numbers[-1]} connections need a limit of open files above {hard}: ulimit -n"
        )
    rates: list[tuple[float, float]] = []
    sizes: list[tuple[float, float]] = []
    with closed_port() as away:
        with Gateway(
            context.directory / "gateway", f"mqtt://127.0.0.1:{away}", WORKERS, CAPACITY_BYTES
        ) as gateway:
            for place, number in enumerate((64, *numbers)):  # the first one warms up
                rate, mib = _at(gateway, number, FIRST_SEQ + place * 1_000_000, context)
                context.say(f"{number} connections: {rate:,.0f} req/s, {mib:.1f} MiB")
                rates.append((float(number), rate))
                sizes.append((float(number), mib))
    del rates[0], sizes[0]
    many = [rate for number, rate in rates if number >= load.CONNECTIONS]
    usual = many[0]
    usual_mib = next(mib for number, mib in sizes if number == load.CONNECTIONS)
    axis = "connections"
    note = f"{WORKERS} workers; {load.CONNECTIONS} connections are active, or all"
    return {
        RATE: Figure(
            min(many),
            "req/s",
            usual,
            min(many) / usual,
            note,
            Curve(axis, "req/s", {"": rates}, log_x=True),
        ),
        RSS: Figure(
            sizes[-1][1],
            "MiB",
            usual_mib,
            sizes[-1][1] / usual_mib,
            f"with {numbers[-1]:,} connections",
            Curve(axis, "MiB of a worker", {"": sizes}, log_x=True),
        ),
    }


BENCHMARKS: Final = [
    Benchmark({RATE: "64 connections", RSS: "the same worker with 64 connections"}, measure)
]
