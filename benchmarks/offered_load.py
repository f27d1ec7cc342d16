"""How long does an answer take at which load, up to the load that is too much?

An open loop (clients/fleet.c): single events are due at fixed times, whatever the answers do, and a
latency counts from when its event was due; that no connection was free then is latency too. One
worker, the broker away, ack=enqueue. The loads are shares of what the same client reaches in a
closed loop just before; a load counts as kept up when all its answers came in 1.05 of its time.

    latency_by_load_p99_ms   the 99th percentile at half of the closed loop's rate
    kept_up_vs_closed_loop   the highest load that was kept up, beside the closed loop's rate
"""

from typing import Final

from benchmarks import logs
from benchmarks.fleet import Fleet, Run
from benchmarks.harness import Benchmark, Context, Curve, Failed, Figure
from benchmarks.processes import closed_port
from benchmarks.servers import Gateway

P99: Final = "latency_by_load_p99_ms"
KEPT_UP: Final = "kept_up_vs_closed_loop"
CONNECTIONS: Final = 256
HALF: Final = 0.5
LATE: Final = 1.05
PERCENTILES: Final = {"p50": "p50_us", "p99": "p99_us", "p99.9": "p999_us"}


def kept_up(run: Run, rate: float) -> bool:
    """The whole load was answered about in its time."""
    return run.seconds <= LATE * run.requests / rate


def measure(context: Context) -> dict[str, Figure]:
    """The closed loop, then one load after the other."""
    shares = context.pick((0.25, HALF, 0.8), (0.1, 0.25, HALF, 0.65, 0.8, 0.9, 0.97, 1.05))
    seconds = context.pick(1.0, 2.0)
    client = Fleet(context.directory)
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in PERCENTILES}
    best = half_ms = 0.0
    with closed_port() as away:
        url = f"mqtt://127.0.0.1:{away}"
        with Gateway(context.directory / "gateway", url, 1, 1024 * logs.MIB) as gateway:
            client.send(gateway.port, "event", 1, 0.5, connections=64)
            most = client.send(gateway.port, "event", 1, seconds, connections=64).rate
            for share in shares:
                rate = most * share
                run = client.send(
                    gateway.port, "event", 1, seconds, rate=rate, connections=CONNECTIONS
                )
                gateway.check()
                for name, of in PERCENTILES.items():
                    lines[name].append((rate, getattr(run, of) / 1000))
                if kept_up(run, rate):
                    best = max(best, rate)
                if share == HALF:
                    half_ms = run.p99_us / 1000
                context.say(
                    f"{rate:,.0f}/s: p50 {run.p50_us / 1000:.2f}, p99 {run.p99_us / 1000:.2f} ms"
                )
    if not best:
        raise Failed(f"not even {most * shares[0]:,.0f} events/s were kept up")
    curve = Curve("events/s offered", "ms", lines, log_y=True)
    note = f"at {most * HALF:,.0f} events/s, half of the closed loop's {most:,.0f}/s"
    return {
        P99: Figure(half_ms, "ms", None, None, note, curve),
        KEPT_UP: Figure(best, "events/s", most, best / most, f"{CONNECTIONS} connections"),
    }


BENCHMARKS: Final = [
    Benchmark(
        {P99: "nothing", KEPT_UP: "the same client in a closed loop, 64 connections"},
        measure,
        quick=False,
    )
]
