"""How much memory does each process hold beside the log, after some hundred thousand events?

The resident size of all mappings of the process but the log and the memfd that all processes share
(/proc/PID/smaps): its own memory and, counted in full, the code of Python and of libraries. The
events come through wrk and go to Mosquitto; the process is measured when everything is published.

    rss_mib_worker     the largest HTTP worker, beside one of the empty Granian handler that
                       answered as many requests
    rss_mib_delivery   the delivery process, beside a bare Python interpreter
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks import load, logs
from benchmarks.harness import Benchmark, Context, Failed, Figure
from benchmarks.processes import Child, python
from benchmarks.servers import Gateway, GranianPeer, Mosquitto

CAPACITY_BYTES: Final = 256 * logs.MIB
_MAPPING: Final = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)$")


def beside_kib(smaps: str, log: Path) -> int:
    """Resident KiB of everything in the text of smaps but the log and memfds."""
    total, counted = 0, True
    for line in smaps.splitlines():
        if mapping := _MAPPING.match(line):
            counted = not mapping[1].startswith(("/memfd:", str(log)))
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def resident_mib(pid: int, log: Path) -> float:
    """Resident memory of a process beside the log."""
    return beside_kib(Path(f"/proc/{pid}/smaps").read_text(), log) / 1024


def children(pid: int) -> Iterator[tuple[int, list[str]]]:
    """Children of a process, with their command lines."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            yield int(child), [part.decode(errors="replace") for part in command]


def _send(port: int, requests: int, context: Context) -> int:
    sent = 0
    while sent < requests:
        sent += load.run(port, context.pick(2, 4), context.directory).requests
        context.say(f"{sent:,} requests")
    return sent


def measure(context: Context) -> dict[str, Figure]:
    """Send, let it be published, look; then the references."""
    requests = context.pick(100_000, 400_000)
    nowhere = context.directory / "no.log"
    with contextlib.ExitStack() as stack:
        broker = Mosquitto(context.directory / "mosquitto")
        stack.enter_context(broker)
        gateway = Gateway(
            context.directory / "gateway", broker.url, context.workers, CAPACITY_BYTES
        )
        stack.enter_context(gateway)
        gateway.wait_until(gateway.connected, 10, "connected to the broker")
        sent = _send(gateway.port, requests, context)
        gateway.wait_until(lambda: gateway.waiting() == 0, 60, "empty")
        if (published := gateway.metrics()["gateway_events_published_total"]) < sent:
            raise Failed(f"{sent} events were accepted, but {published:.0f} published")
        log = gateway.data / "gateway.log"
        found = {name: resident_mib(pid, log) for pid, (*_, name, _) in children(gateway.pid)}
    workers = [size for name, size in found.items() if name.startswith("worker")]
    if len(workers) != context.workers or "delivery" not in found:
        raise Failed(f"unexpected processes: {', '.join(found)}")
    with GranianPeer("empty_handler", context.directory, context.workers) as peer:
        _send(peer.port, requests, context)
        empty = max(resident_mib(pid, nowhere) for pid, _ in children(peer.pid))
    command = python("-c", "print('up', flush=True); import time; time.sleep(60)")
    with Child("python", command, context.directory) as bare:
        bare.wait_until(lambda: "up" in bare.last_words(), 5, "up")
        interpreter = resident_mib(bare.pid, nowhere)
    note = f"after {sent:,} events"
    worker, delivery = max(workers), found["delivery"]
    return {
        "rss_mib_worker": Figure(worker, "MiB", empty, worker / empty, note),
        "rss_mib_delivery": Figure(delivery, "MiB", interpreter, delivery / interpreter, note),
    }


BENCHMARKS: Final = [
    Benchmark(
        {
            "rss_mib_worker": "a worker of the empty Granian handler, after as many requests",
            "rss_mib_delivery": "a bare Python interpreter",
        },
        measure,
    )
]
