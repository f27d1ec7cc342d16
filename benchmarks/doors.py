"""How many events a second does the second front door take, beside the first?

    robyn_vs_granian    `gateway serve` with http.server = robyn and granian, everything else the
                        same: one log each, their broker away, so that only the doors differ

Both get the same requests from the same script in the same rounds, and nginx `return 202` as well:
what the machine and wrk allow. What wrk saw accepted must be in the log, or the run has failed.
Stated, not gated: the second door is there for those who want it, not for its rate.
"""

import contextlib
import statistics
from typing import Final

from benchmarks import load, logs
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare, interleave
from benchmarks.pipeline import accepted_rate
from benchmarks.processes import closed_port
from benchmarks.servers import Gateway, Nginx

DOORS: Final = ("robyn", "granian")


def measure(context: Context) -> dict[str, Figure]:
    """Both in turn."""
    seconds = context.pick(1, 3)
    with contextlib.ExitStack() as stack:
        away = stack.enter_context(closed_port())
        gateways = {
            door: stack.enter_context(
                Gateway(
                    context.directory / door,
                    f"mqtt://127.0.0.1:{away}",
                    context.workers,
                    context.pick(256, 1024) * logs.MIB,
                    f"http.server={door}",
                )
            )
            for door in DOORS
        }
        nginx = stack.enter_context(Nginx(context.directory / "nginx"))

        def empty() -> float:
            seen = load.run(nginx.port, seconds, context.directory)
            nginx.check()
            return seen.rate

        robyn, granian = (gateways[door] for door in DOORS)
        found = interleave(
            {
                "robyn": lambda: accepted_rate(robyn, seconds, context.directory),
                "granian": lambda: accepted_rate(granian, seconds, context.directory),
                "nginx": empty,
            },
            3,
            context,
        )
        for gateway in gateways.values():
            now = gateway.metrics()
            if now["gateway_events_received_total"] != now["gateway_events_accepted_total"]:
                raise Failed("some events were refused")
    nginx_rate = statistics.median(found["nginx"])
    shares = {door: statistics.median(found[door]) / nginx_rate for door in DOORS}
    note = f"of nginx: robyn {shares['robyn']:.2f}, granian {shares['granian']:.2f}"
    return {"robyn_vs_granian": compare(found["robyn"], found["granian"], "req/s", note)}


BENCHMARKS: Final = [
    Benchmark({"robyn_vs_granian": "the same gateway with http.server = granian"}, measure)
]
"""One row."""
