"""How are batches sent, and events at a fixed rate?

By clients/fleet.c, one thread, with bodies that were made before: only the digits of `seq` (and of
`device_id`) are renewed, so that every event is a new one, and the client is not what is measured.
"""

import json
import subprocess
from pathlib import Path
from typing import Final, Literal, NamedTuple

from benchmarks import compiled, events
from benchmarks.harness import Failed

Kind = Literal["event", "ndjson", "array"]
MEDIA_TYPES: Final[dict[Kind, str]] = {
    "event": "application/json",
    "ndjson": "application/x-ndjson",
    "array": "application/json",
}
BODIES: Final = 4
"""Different bodies of a run; each connection renews a copy of its own."""
CONNECTIONS: Final = 16
DEVICE_DIGITS: Final = 7
_FIRST_SEQ: Final = 10 ** (events.SEQ_DIGITS - 1)


class Run(NamedTuple):
    """What the client saw."""

    requests: int
    accepted: int
    bytes: int
    seconds: float
    busy: float
    """Share of the time that the client did not wait."""
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float

    @property
    def rate(self) -> float:
        """Events accepted a second."""
        return self.accepted / self.seconds


def body(kind: Kind, size: int, seed: int, named: bool) -> bytes:
    """A body of `size` events; `named`: each with a place for its device id."""
    pieces = []
    for before, after in events.templates(events.reference, size, seed):
        event = before + b"0" * events.SEQ_DIGITS + after
        if named:
            event = b'{"device_id":"dev-%s",%s' % (b"0" * DEVICE_DIGITS, event[1:])
        pieces.append(event)
    if kind == "array":
        return b"[" + b",".join(pieces) + b"]"
    return b"\n".join(pieces)


class Fleet:
    """The client, built; it never sends a seq twice."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._program = compiled.executable("fleet", directory, compiled.CLIENTS)
        self._next_seq = _FIRST_SEQ

    def _bodies(self, kind: Kind, size: int, named: bool) -> Path:
        path = self._directory / f"{kind}-{size}{'-named' if named else ''}.bodies"
        if not path.exists():
            made = [body(kind, size, seed, named) for seed in range(BODIES)]
            path.write_bytes(b"".join(b"%d %d\n%s" % (len(one), size, one) for one in made))
        return path

    def send(
        self,
        port: int,
        kind: Kind,
        size: int,
        seconds: float,
        *,
        requests: int = 0,
        rate: float = 0,
        connections: int = CONNECTIONS,
        devices: int = 0,
    ) -> Run:
        """Post bodies of `size` events.

        seconds: how long; no more than `requests` if that is not 0
        rate: requests/s of an open loop, whose latencies count from when a request was due; 0: each
            connection sends when it has its answer
        devices: 0: a connection is a device; else each event names one of so many
        Raises Failed when an answer was no success, or an event was not accepted as a new one.
        """
        path = self._bodies(kind, size, devices > 0)
        target = "/v1/ingest" if devices else "/v1/ingest/fleet-*"
        numbers = (connections, seconds, requests, rate, self._next_seq, devices)
        command = [
            *(str(self._program), str(port), target, MEDIA_TYPES[kind], str(path)),
            *map(str, numbers),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
        except subprocess.TimeoutExpired:
            raise Failed("the client did not end") from None
        if done.returncode:
            raise Failed(done.stderr.strip()[-300:] or f"the client ended with {done.returncode}")
        said = json.loads(done.stdout)
        self._next_seq = said["next_seq"]
        sent = said["requests"] * size
        if said["accepted"] != sent:
            raise Failed(
                f"of {sent} events, {said['accepted']} were accepted, {said['duplicates']} taken"
                f" for repeats, {said['refused']} refused"
            )
        if not sent:
            raise Failed("not one request was answered")
        return Run(**{name: said[name] for name in Run._fields})


def batches_that_fit(capacity_bytes: int, share: float, size: int, named: bool = False) -> int:
    """Batches of `size` events that take so much of a log."""
    event = max(map(len, body("ndjson", 16, 0, named).splitlines()))
    record_bytes = (64 + len("fleet-0000") + event + 7) // 8 * 8
    return max(1, int(capacity_bytes * share / record_bytes / size))
