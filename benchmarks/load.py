"""How many requests a second does a server answer?

wrk: 64 keep-alive connections in one thread, closed loop, each request with a new seq (post.lua).
A run in which one request failed is no slow run but a failed one: refused statuses, broken sockets
and timeouts raise.
"""

import itertools
import json
import re
import subprocess
import threading
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks import events
from benchmarks.harness import Failed
from benchmarks.processes import program

CONNECTIONS: Final = 64
DEVICES: Final = 64
EVENTS: Final = 512
"""Different events in turn; each request has a seq of its own besides."""

_lock = threading.Lock()
_runs = itertools.count(100)


class Load(NamedTuple):
    """A whole run."""

    requests: int
    seconds: float
    p50_us: float
    p99_us: float
    number: int = 0
    """The first three digits of each seq."""

    @property
    def rate(self) -> float:
        """Requests answered a second."""
        return self.requests / self.seconds


def _quote(data: bytes) -> str:
    return '"' + "".join(f"\\{byte:03}" for byte in data) + '"'


def write_events(path: Path, shape: events.Shape = events.reference, query: str = "") -> None:
    """The file that post.lua reads: requests of a fleet, around the seq."""
    target = f"?{query}" if query else ""
    pairs = []
    for number, event in enumerate(events.templates(shape, EVENTS)):
        head = (
            f"POST /v1/ingest/{events.device(number % DEVICES)}{target} HTTP/1.1\r\n"
            "Host: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {event.size}\r\n\r\n"
        )
        pairs.append(f"{{{_quote(head.encode() + event.before)},{_quote(event.after)}}}")
    path.write_text("return {" + ",\n".join(pairs) + "}\n")


def parse(output: str) -> Load:
    """What wrk said. Raises Failed unless every request was answered with a success."""
    match = re.search(r"^RESULT (\{.*\})$", output, re.MULTILINE)
    if match is None:
        raise Failed(f"wrk gave no result: {output.strip()[-300:]}")
    said = json.loads(match[1])
    wrong = {k: said[k] for k in ("connect", "read", "write", "status", "timeout") if said[k]}
    if wrong:
        raise Failed(f"of {said['requests']} requests, these failed: {wrong}")
    if not said["requests"]:
        raise Failed("not one request was answered")
    return Load(said["requests"], said["microseconds"] / 1e6, said["p50_us"], said["p99_us"])


def run(
    port: int,
    seconds: float,
    directory: Path,
    threads: int = 1,
    query: str = "",
    connections: int = CONNECTIONS,
) -> Load:
    """Send for some seconds. Raises Failed."""
    path = directory / f"events{query}.lua"
    if not path.exists():
        write_events(path, query=query)
    with _lock:
        first = next(_runs)
        for _ in range(threads - 1):
            next(_runs)
    if first + threads > 1000:
        raise Failed("the run numbers that make seq unique are used up")
    command = [
        *(program("wrk"), f"-t{threads}", f"-c{connections}", f"-d{max(1, round(seconds))}s"),
        *("--timeout", "5s", "-s", str(Path(__file__).with_name("post.lua"))),
        f"http://127.0.0.1:{port}/",
        *("--", str(path), str(first)),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30)
    except subprocess.TimeoutExpired:
        raise Failed("wrk did not end") from None
    if done.returncode:
        raise Failed(f"wrk ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
    return parse(done.stdout)._replace(number=first)
