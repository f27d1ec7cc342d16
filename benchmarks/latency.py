"""How long does an event take from POST to a subscriber, at 2 000 events a second?

An open loop: a client in its own process sends each event when it is due, over keep-alive
connections, and writes the due time into the payload; a subscriber in another process takes the
time when it has the event. Both read CLOCK_MONOTONIC. A client or connection that is late counts as
latency. In between: `gateway serve` and Mosquitto (stock limits).

The reference is the same client, publishing the same events with QoS 1 straight to the same
Mosquitto.
"""

import contextlib
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, Final

from benchmarks import logs
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare
from benchmarks.processes import Child, python
from benchmarks.servers import Gateway, Mosquitto

RATE: Final = 2000
TIMEOUT_S: Final = 10
CAPACITY_BYTES: Final = 256 * logs.MIB
_first_seq: Final = itertools.count(5_000_000_000, 1_000_000)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of the sorted values do not exceed."""
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1]


def _pass(kind: str, port: int, broker: Mosquitto, count: int, context: Context) -> list[float]:
    """Send `count` events one way; their latencies in ms, sorted.

    Raises Failed unless all arrive.
    """
    module = "benchmarks.peers."
    command = python("-m", f"{module}subscriber", str(broker.port), str(count), str(TIMEOUT_S))
    with Child("subscriber", command, context.directory, pipe=True) as subscriber:
        subscriber.wait_until(lambda: "subscribed" in subscriber.last_words(), 10, "subscribed")
        numbers = map(str, (port, count, RATE, next(_first_seq)))
        command = python("-m", f"{module}paced_client", kind, *numbers)
        with Child("client", command, context.directory, pipe=True) as client:
            sent: dict[str, Any] = json.loads(client.result(count / RATE + 30))
        seen: dict[str, Any] = json.loads(subscriber.result(TIMEOUT_S + 5))
    if seen["arrived"] != count or sent["sent"] != count:
        raise Failed(f"{sent['sent']} events sent, {seen['arrived']} of {count} arrived")
    if seen["repeated"]:
        raise Failed(f"{seen['repeated']} events arrived twice, though nothing broke")
    took = sorted(microseconds / 1000 for microseconds in seen["microseconds"])
    p50, p99 = percentile(took, 50), percentile(took, 99)
    context.say(f"{kind}: p50 {p50:.3f}, p99 {p99:.3f} ms; {sent['late']} sent late")
    return took


def measure(context: Context) -> dict[str, Figure]:
    """Through the gateway and straight to the broker, in turn; a first pair warms up."""
    seconds, rounds = context.pick(2, 3), context.pick(2, 3)
    count = seconds * RATE
    found: dict[str, list[list[float]]] = {"http": [], "mqtt": []}
    with contextlib.ExitStack() as stack:
        broker = Mosquitto(context.directory / "mosquitto")
        stack.enter_context(broker)
        gateway = Gateway(
            context.directory / "gateway", broker.url, context.workers, CAPACITY_BYTES
        )
        stack.enter_context(gateway)
        gateway.wait_until(gateway.connected, 10, "connected to the broker")
        ports = {"http": gateway.port, "mqtt": broker.port}
        for number in range(-1, rounds):
            for kind, runs in found.items():
                took = _pass(kind, ports[kind], broker, count if number >= 0 else RATE, context)
                if number >= 0:
                    runs.append(took)
        gateway.check()
        gateway.wait_until(lambda: gateway.waiting() == 0, TIMEOUT_S, "empty")
        broker.check()
    figures = {}
    for percent in (50, 99):
        ours, bare = ([percentile(run, percent) for run in found[k]] for k in ("http", "mqtt"))
        worst = statistics.median(run[-1] for run in found["http"])
        note = f"{rounds} runs of {seconds} s at {RATE} events/s, median maximum {worst:.3g} ms"
        figures[f"latency_ms_p{percent}"] = compare(ours, bare, "ms", note)
    return figures


BENCHMARKS: Final = [
    Benchmark(
        dict.fromkeys(
            ("latency_ms_p50", "latency_ms_p99"),
            "the same client straight to the same broker, QoS 1",
        ),
        measure,
    )
]
