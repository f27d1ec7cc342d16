"""How many events a second go the whole way, beside the best ordinary peer?

`gateway serve` publishing into Mosquitto (stock limits, no subscriber) against Granian RSGI +
msgspec + gmqtt with a 202 from memory (peers/gmqtt_peer.py), same requests, nginx in the same
rounds.

The gateway's rate is what it keeps up: accepted events, divided by the time of the run and the time
that the broker then still needs to acknowledge what was left (counted when that is more than 1 % of
the run's events). A backlog that grows so makes the rate that of the slower end. The peer is given
its 202s as they come.

The row is void when the peer falls too far under the share of nginx's rate that shares.py gives for
it: then it is not the peer that this figure is about.
"""

import contextlib
import statistics
import time
from typing import Final

from benchmarks import load, logs, shares
from benchmarks.harness import Benchmark, Context, Failed, Figure, Side, compare, interleave
from benchmarks.servers import Gateway, GranianPeer, Mosquitto, Nginx

NAME: Final = "end_to_end_vs_gmqtt_peer"
BACKLOG_SHARE_MAX: Final = 0.01
DRAIN_S_MAX: Final = 60
CAPACITY_BYTES: Final = 512 * logs.MIB


def sustained(events: int, seconds: float, backlog: int, drain_s: float) -> float:
    """Events a second that the whole chain keeps up."""
    if backlog <= BACKLOG_SHARE_MAX * events:
        return events / seconds
    return events / (seconds + drain_s)


class Run:
    """The gateway's side, and the largest backlog that a run left."""

    def __init__(self, gateway: Gateway, seconds: float, context: Context) -> None:
        self._gateway, self._seconds, self._directory = gateway, seconds, context.directory
        self.backlogs: list[int] = []

    def __call__(self) -> float:
        gateway = self._gateway
        before = gateway.metrics()
        if before["gateway_events_waiting"]:
            raise Failed(f"{before['gateway_events_waiting']:.0f} events wait before the run")
        seen = load.run(gateway.port, self._seconds, self._directory)
        ended = time.monotonic()
        gateway.check()
        backlog = gateway.waiting()
        gateway.wait_until(lambda: gateway.waiting() == 0, DRAIN_S_MAX, "empty")
        drain_s = time.monotonic() - ended
        after = gateway.metrics()
        for name in ("accepted", "published"):
            series = f"gateway_events_{name}_total"
            if (found := after[series] - before[series]) < seen.requests:
                raise Failed(f"{seen.requests} events were answered 202, but {found:.0f} {name}")
        if after["gateway_unexplained_events"]:
            raise Failed(f"{after['gateway_unexplained_events']:.0f} events unexplained")
        self.backlogs.append(backlog)
        return sustained(seen.requests, seen.seconds, backlog, drain_s)


def measure(context: Context) -> dict[str, Figure]:
    """Gateway, peer and nginx in turn."""
    seconds = context.pick(1, 2)
    with contextlib.ExitStack() as stack:
        broker = Mosquitto(context.directory / "mosquitto")
        stack.enter_context(broker)
        gateway = Gateway(
            context.directory / "gateway", broker.url, context.workers, CAPACITY_BYTES
        )
        stack.enter_context(gateway)
        gateway.wait_until(gateway.connected, 10, "connected to the broker")
        peer = GranianPeer(
            "gmqtt_peer", context.directory, context.workers, {"PEER_MQTT_PORT": str(broker.port)}
        )
        stack.enter_context(peer)
        nginx = Nginx(context.directory / "nginx")
        stack.enter_context(nginx)

        def rate(server: GranianPeer | Nginx) -> float:
            seen = load.run(server.port, seconds, context.directory)
            server.check()
            return seen.rate

        run = Run(gateway, seconds, context)
        sides: dict[str, Side] = {
            "gateway": run,
            "peer": lambda: rate(peer),
            "nginx": lambda: rate(nginx),
        }
        found = interleave(sides, 3, context)
        broker.check()
    ours, theirs, most = (statistics.median(found[name]) for name in sides)
    shares.judge("gmqtt", theirs, most)
    note = (
        f"nginx {most:,.0f}/s, gateway {ours / most:.3f} of it, peer {theirs / most:.3f};"
        f" largest backlog at a run's end {max(run.backlogs)}"
    )
    return {NAME: compare(found["gateway"], found["peer"], "req/s", note)}


BENCHMARKS: Final = [Benchmark({NAME: "Granian RSGI + msgspec + gmqtt, 202 from memory"}, measure)]
