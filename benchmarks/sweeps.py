"""Does the rate depend on the size of a batch, on the fill of the log, on the number of devices?

One worker, its broker away, the closed loop of clients/fleet.c. At each point of the last two, the
better of two runs counts: what else the machine does can only slow one down.

    rate_by_batch_size   1 to 1000 events a request: the rate of the largest beside single ones
    rate_by_devices      batches of 1000, devices 1 to 1 000 000: the least rate beside the first
    rate_by_log_fill     batches of 1000 into a log that fills up: the least rate beside the first
"""

import contextlib
from collections.abc import Iterator
from typing import Final

from benchmarks import batch, fleet
from benchmarks.fleet import Fleet
from benchmarks.harness import Benchmark, Context, Curve, Failed, Figure
from benchmarks.processes import closed_port
from benchmarks.servers import Gateway

BY_SIZE: Final = "rate_by_batch_size"
BY_DEVICES: Final = "rate_by_devices"
BY_FILL: Final = "rate_by_log_fill"
SIZES: Final = (1, 10, 100, 1000)
Line = list[tuple[float, float]]


@contextlib.contextmanager
def _gateway(context: Context, capacity_bytes: int) -> Iterator[Gateway]:
    batch.check_room(context, capacity_bytes)
    with closed_port() as away:
        url = f"mqtt://127.0.0.1:{away}"
        with Gateway(
            context.directory / "gateway", url, context.workers, capacity_bytes
        ) as gateway:
            yield gateway


def least(line: Line, unit: str, note: str, curve: Curve) -> Figure:
    """The lowest point beside the first one."""
    first, lowest = line[0][1], min(rate for _, rate in line)
    return Figure(lowest, unit, first, lowest / first, note, curve)


def by_size(context: Context) -> dict[str, Figure]:
    """The same number of connections for every size."""
    seconds = context.pick(0.5, 1.0)
    client, line = Fleet(context.directory), []
    with _gateway(context, context.pick(1, 2) << 30) as gateway:
        batch.rate_of(gateway, client, SIZES[-1], seconds / 2)
        for size in SIZES:
            line.append((float(size), batch.rate_of(gateway, client, size, seconds).rate))
            context.say(f"{size} events a request: {line[-1][1]:,.0f} events/s")
    (_, single), (_, largest) = line[0], line[-1]
    curve = Curve("events a request", "events/s", {"": line}, log_x=True, log_y=True)
    note = f"{fleet.CONNECTIONS} connections"
    return {BY_SIZE: Figure(largest, "events/s", single, largest / single, note, curve)}


def by_devices(context: Context) -> dict[str, Figure]:
    """Each event names its device; the order has no locality."""
    seconds = context.pick(0.3, 0.5)
    numbers = context.pick((1, 1_000_000), (1, 100, 10_000, 100_000, 1_000_000))
    capacity = context.pick(1, 4) << 30
    client = Fleet(context.directory)
    with _gateway(context, capacity) as gateway:
        most = fleet.batches_that_fit(
            capacity, batch.FULL / (2 * len(numbers)), batch.SIZE, named=True
        )
        best = dict.fromkeys(numbers, 0.0)
        for number in (*numbers, *reversed(numbers)):
            run = batch.rate_of(gateway, client, batch.SIZE, seconds, requests=most, devices=number)
            best[number] = max(best[number], run.rate)
            context.say(f"{number:,} devices: {run.rate:,.0f} events/s")
    line = [(float(number), rate) for number, rate in best.items()]
    curve = Curve("devices", "events/s", {"": line}, log_x=True)
    return {BY_DEVICES: least(line, "events/s", "batches of 1000", curve)}


def by_fill(context: Context) -> dict[str, Figure]:
    """A run at each level, and what lies between is filled up."""
    capacity = context.pick(1, 4) << 30
    levels = context.pick((5, 45, 85), (5, 20, 35, 50, 65, 80, 88))
    client, line = Fleet(context.directory), []
    with _gateway(context, capacity) as gateway:
        for level in levels:
            used = gateway.metrics()["gateway_log_bytes_used"] / capacity
            if (missing := level / 100 - used) > 0:
                most = fleet.batches_that_fit(capacity, missing, batch.SIZE)
                batch.rate_of(gateway, client, batch.SIZE, 60, requests=most)
            most = fleet.batches_that_fit(capacity, context.pick(0.04, 0.02), batch.SIZE)
            rate = max(
                batch.rate_of(gateway, client, batch.SIZE, 60, requests=most).rate for _ in range(2)
            )
            line.append((float(level), rate))
            context.say(f"{level} % full: {rate:,.0f} events/s")
        now = gateway.metrics()["gateway_log_bytes_used"] / capacity
        if now < levels[-1] / 100:
            raise Failed(f"the log was only {now:.0%} full at the end")
    curve = Curve("log fill, %", "events/s", {"": line})
    note = f"log of {capacity >> 30} GiB, batches of 1000"
    return {BY_FILL: least(line, "events/s", note, curve)}


BENCHMARKS: Final = [
    Benchmark({BY_SIZE: "one event a request"}, by_size),
    Benchmark({BY_DEVICES: "one device"}, by_devices),
    Benchmark({BY_FILL: "the log 5 % full"}, by_fill),
]
