"""Sinks: the places that events are delivered to, behind one small protocol.

A sink has a cursor of its own in the log, by its name: all events below it are done for this sink.
That cursor is the sink's confirmed position, and the sink is its only writer: it moves when the
other side has the events for good (a PUBACK, an fsync), never before.

    log ──┬── cursor "mqtt" ──▶ gateway.publisher
          └── cursor "file" ──▶ gateway.sinks.file

A sink that stands still keeps back its own cursor and nothing else: no other sink waits for it, and
neither does the loop. So a sink whose system calls can hang makes them in a thread of its own.
"""

import time
from pathlib import Path
from typing import Protocol

import msgspec

from gateway import process


class SinkStatus(msgspec.Struct, frozen=True):
    """What a sink is doing, for /healthz and other processes."""

    state: str = "starting"
    """starting, running, held (it cannot go on for now, and tries again), stuck (a system call does
    not return), damaged (a record of the log: recovery has to look), draining, closed."""
    last_error: str = ""
    """The last failure and the next step; kept after it is over."""
    last_error_unix_s: float = 0.0
    since_unix_s: float = 0.0
    """When `state` began."""
    corrupt_lsn: int | None = None
    """A record that was accepted is damaged there; the sink has ended."""

    @property
    def ok(self) -> bool:
        """Events flow."""
        return self.state in ("running", "draining")

    def to(self, state: str, error: str | None = None) -> "SinkStatus":
        """The next status; unchanged parts stay."""
        now = time.time()
        status = self
        if state != self.state:
            status = msgspec.structs.replace(status, state=state, since_unix_s=now)
        if error is not None:
            status = msgspec.structs.replace(status, last_error=error, last_error_unix_s=now)
        return status

    def write(self, path: Path) -> None:
        """Replace what stands in `path`. Raises OSError."""
        process.write_status(path, msgspec.json.encode(self) + b"\n")

    @staticmethod
    def read(path: Path) -> "SinkStatus":
        """The status in `path`; the default one while there is none that can be read."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=SinkStatus)
        except (OSError, msgspec.DecodeError):
            return SinkStatus()


class Sink(Protocol):
    """What the delivery process asks of a sink. All of it on the loop's thread."""

    name: str
    """Of its cursor in the log, at most 15 ASCII characters."""

    async def run(self) -> None:
        """Open, write run after run of records, move the cursor over what is confirmed, until
        `close`. Trouble of the other side is waited out, not raised. Returns early only when a
        record is damaged: `status().corrupt_lsn` says where."""

    def on_committed(self) -> None:
        """More may be in the log. Cheap when there is nothing."""

    @property
    def idle(self) -> bool:
        """Everything that is committed now is done for this sink."""

    async def drain(self, deadline_s: float) -> bool:
        """Hurry until `idle`, at most so many seconds. True: idle."""

    async def close(self) -> None:
        """End `run`. What is not confirmed stays in the log for the next start."""

    def status(self) -> SinkStatus:
        """What it is doing now."""
