"""How many events a second does one worker accept in batches?

`gateway serve` with one worker, its broker away, batches of 1000 events as NDJSON over HTTP, each
event with a new seq, for ten seconds on end: page cache, committer and walk are part of it. The
books must agree: what the answers say was accepted is what the log counted.

    batch_events_per_second_core   the rate of that run
    batch_vs_bytes_alone           beside the same client and bodies against a Granian handler that
                                   only reads the body and answers 202, before and after
"""

import shutil
import statistics
from typing import Final

from benchmarks import fleet
from benchmarks.fleet import Fleet
from benchmarks.harness import Benchmark, Context, Failed, Figure
from benchmarks.processes import closed_port
from benchmarks.servers import Gateway, GranianPeer

RATE: Final = "batch_events_per_second_core"
SHARE: Final = "batch_vs_bytes_alone"
SIZE: Final = 1000
FULL: Final = 0.92
"""Of the log: a run ends before events are refused."""
SPARE_BYTES: Final = 1 << 30


def check_room(context: Context, capacity_bytes: int) -> None:
    """Raises Failed when the disk has no room for such a log."""
    free = shutil.disk_usage(context.directory).free
    if free < capacity_bytes + SPARE_BYTES:
        raise Failed(
            f"a log of {capacity_bytes >> 30} GiB wants {capacity_bytes + SPARE_BYTES >> 20} MiB in"
            f" {context.directory}, and {free >> 20} MiB are free: name another --directory"
        )


def accepted(gateway: Gateway) -> float:
    """As the log counts; raises Failed when an event was taken for a repeat."""
    return gateway.metrics()["gateway_events_accepted_total"]


def rate_of(gateway: Gateway, fleet: Fleet, size: int, seconds: float, **given: int) -> fleet.Run:
    """One run into the gateway. Raises Failed when its books and the client's do not agree."""
    before = accepted(gateway)
    run = fleet.send(gateway.port, "ndjson", size, seconds, **given)
    gateway.check()
    what = f"all {run.accepted} accepted events in the log"
    gateway.wait_until(lambda: accepted(gateway) - before >= run.accepted, 5, what)
    if (counted := accepted(gateway) - before) != run.accepted:
        raise Failed(f"{run.accepted} events were answered as accepted, {counted:.0f} counted")
    return run


def measure(context: Context) -> dict[str, Figure]:
    """The handler, the gateway for the whole time, the handler again."""
    capacity = context.pick(1, 8) << 30
    seconds, around = context.pick((2, 1), (10, 2))
    check_room(context, capacity)
    client = Fleet(context.directory)
    most = fleet.batches_that_fit(capacity, FULL, SIZE)
    with closed_port() as away, GranianPeer("empty_handler", context.directory, 1) as bare:
        with Gateway(
            context.directory / "gateway", f"mqtt://127.0.0.1:{away}", 1, capacity
        ) as gateway:
            client.send(bare.port, "ndjson", SIZE, 0.5)
            bytes_alone = [client.send(bare.port, "ndjson", SIZE, around).rate]
            run = rate_of(gateway, client, SIZE, seconds, requests=most)
            bytes_alone.append(client.send(bare.port, "ndjson", SIZE, around).rate)
    if run.seconds < seconds / 2:
        raise Failed(f"the log was full after {run.seconds:.1f} s")
    alone = statistics.median(bytes_alone)
    note = (
        f"{run.accepted:,} events of {run.bytes / run.accepted:.0f} bytes in {run.seconds:.1f} s,"
        f" log of {capacity >> 30} GiB; p99 of a batch {run.p99_us / 1000:.1f} ms;"
        f" the client was busy {run.busy:.0%} of the time"
    )
    return {
        RATE: Figure(run.rate, "events/s", alone, run.rate / alone, note),
        SHARE: Figure(run.rate, "events/s", alone, run.rate / alone),
    }


BENCHMARKS: Final = [
    Benchmark(
        dict.fromkeys((RATE, SHARE), "a Granian handler that reads the bodies and answers 202"),
        measure,
    )
]
