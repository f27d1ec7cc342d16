"""Which way to a body is fastest, and which is safe?

Every lane reads the body and answers 202 with the same headers, under Granian with the settings of
the gateway's own door:

    lane_door            the gateway's door without validator and log: callbacks where Granian
                         schedules them, no event loop
    lane_rsgi_*          an RSGI coroutine on uvloop, asyncio or rloop
    lane_rsgi_rust       on uvloop, with Granian's own tasks
    lane_rsgi_mt         on uvloop, with Granian's multi-threaded runtime
    lane_asgi            an ASGI application on uvloop
    lane_wsgi, _wsgi_4   a WSGI application with 1 and 4 blocking threads

Each against nginx `return 202` in the same rounds, and once more while four clients send bodies
that never end (`..._slow_bodies` is the share of its own rate that is left): WSGI has no thread
left then.
"""

import contextlib
import socket
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks import load
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare, interleave
from benchmarks.pipeline import EmptyDoor
from benchmarks.processes import Child, answers, free_port, python
from benchmarks.servers import Nginx

SLOW_BODIES: Final = 4
HANDLER: Final = "benchmarks.peers.empty_handler:app"
LANES: Final[dict[str, tuple[str, ...]]] = {
    "rsgi_uvloop": ("rsgi", "uvloop", "st", "1", HANDLER),
    "rsgi_asyncio": ("rsgi", "asyncio", "st", "1", HANDLER),
    "rsgi_rloop": ("rsgi", "rloop", "st", "1", HANDLER),
    "rsgi_rust": ("rsgi", "uvloop", "st", "1", HANDLER, "--task-impl", "rust"),
    "rsgi_mt": ("rsgi", "uvloop", "mt", "1", HANDLER),
    "asgi": ("asgi", "uvloop", "st", "1", "benchmarks.peers.empty_lanes:asgi"),
    "wsgi": ("wsgi", "uvloop", "st", "1", "benchmarks.peers.empty_lanes:wsgi"),
    "wsgi_4": ("wsgi", "uvloop", "st", "4", "benchmarks.peers.empty_lanes:wsgi"),
}
"""Interface, event loop, runtime mode, blocking threads, application, further options."""


class Lane(Child):
    """Granian, one worker."""

    def __init__(self, name: str, directory: Path) -> None:
        interface, loop, mode, threads, target, *more = LANES[name]
        self.port = free_port()
        command = python(
            *("-m", "granian", target, "--interface", interface, "--loop", loop),
            *("--http", "1", "--no-ws", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--runtime-mode", mode, "--blocking-threads", threads),
            *("--log-level", "warning", "--backlog", "4096"),
            *more,
        )
        super().__init__(f"lane_{name}", command, directory)
        self.wait_until(lambda: answers(self.port), 20, "listening")


@contextlib.contextmanager
def slow_bodies(port: int) -> Iterator[None]:
    """Clients that announce a body and do not send it."""
    with contextlib.ExitStack() as stack:
        for number in range(SLOW_BODIES):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            head = f"POST /v1/ingest/slow-{number} HTTP/1.1\r\nHost: slow\r\n"
            client.sendall(
                (head + "Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{").encode()
            )
        yield


def _rate(server: Child, port: int, seconds: float, directory: Path) -> float:
    seen = load.run(port, seconds, directory)
    server.check()
    return seen.rate


def _share_left(server: Child, port: int, alone: float, context: Context) -> float:
    """Of its own rate, beside slow bodies. 0: nobody was answered."""
    with slow_bodies(port):
        try:
            return _rate(server, port, context.pick(1, 2), context.directory) / alone
        except Failed:
            return 0.0


def measure(context: Context) -> dict[str, Figure]:
    """All lanes in turn, then each beside slow bodies."""
    seconds = context.pick(1, 3)
    with contextlib.ExitStack() as stack:
        servers: dict[str, tuple[Child, int]] = {}
        door = stack.enter_context(EmptyDoor(context.directory, 1))
        servers["door"] = (door, door.port)
        for name in LANES:
            lane = stack.enter_context(Lane(name, context.directory))
            servers[name] = (lane, lane.port)
        nginx = stack.enter_context(Nginx(context.directory / "nginx"))
        servers["nginx"] = (nginx, nginx.port)
        sides: dict[str, Callable[[], float]] = {
            name: lambda server=server, port=port: _rate(  # type: ignore[misc]
                server, port, seconds, context.directory
            )
            for name, (server, port) in servers.items()
        }
        found = interleave(sides, context.pick(1, 3), context)
        figures = {}
        for name, (server, port) in servers.items():
            if name == "nginx":
                continue
            left = _share_left(server, port, statistics.median(found[name]), context)
            figures[f"lane_{name}"] = compare(
                found[name], found["nginx"], "req/s", f"beside slow bodies {left:.2f} of it"
            )
            figures[f"lane_{name}_slow_bodies"] = Figure(
                left, "of its own rate", note=f"{SLOW_BODIES} bodies that never end"
            )
    return figures


BENCHMARKS: Final = [
    Benchmark(
        {
            name: reference
            for lane in ("door", *LANES)
            for name, reference in (
                (f"lane_{lane}", "nginx return 202"),
                (f"lane_{lane}_slow_bodies", ""),
            )
        },
        measure,
        quick=False,
    )
]
