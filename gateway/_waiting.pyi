"""The compiled waiting room of a worker: see `_native/gw_waiting.h`. `gateway.waiting` completes it.

Times are nanoseconds of CLOCK_MONOTONIC. An ack is an index of `gateway.http.ACKS`.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

from gateway._log import Ingest, Log

_Headers: TypeAlias = list[tuple[str, str]]
_Reply: TypeAlias = Callable[[int, _Headers, bytes], object]

DURABLE: Final[int]
SINK: Final[int]
BUSY: Final[int]
"""The lines: who waits for `Log.durable`, for `Log.least_cursor`, for `Log.committed`."""

class Entry(NamedTuple):
    """One that was taken out of its line, and must be answered."""

    reply: _Reply
    lsn: int
    ack: int
    started_ns: int
    until_ns: int
    headers: _Headers | None
    more: tuple[str, bytes] | Callable[[int, bool], tuple[int, _Headers, bytes]] | None
    """The event of who is in line BUSY; how to answer a batch."""

class Room:
    """Who waits, in three lines. `accepted` and `batch` are the door's one thread's, the rest the waiter's."""

    def __init__(
        self,
        log: Log,
        worker: int,
        durable_deadline_ms: int,
        sink_deadline_ms: int,
        linger_ms: int,
        idle_ms: int,
        x_ack: tuple[tuple[str, str], ...],
        body: tuple[bytes, ...],
        set_aside: Callable[[int, str], bytes],
    ) -> None:
        """The log must not be closed while the room lives. `x_ack` and `body`: of an answer, by ack."""
    count: int
    """How many wait."""

    def accepted(
        self, reply: _Reply, ingest: Ingest, ack: int, started_ns: int, headers: _Headers
    ) -> None:
        """Answer the event that `ingest` has just accepted, or recognised, once `ack` (DURABLE or SINK of
        `gateway.http`) is reached. `headers` are those of `gateway.http.receipt_headers`. Answers, by the way, who
        else is due."""

    def batch(
        self,
        reply: _Reply,
        lsn: int,
        ack: int,
        started_ns: int,
        answer: Callable[[int, bool], tuple[int, _Headers, bytes]],
    ) -> None:
        """Answer a batch once `ack` (DURABLE or SINK) is reached for `lsn`, at once if it is already, or when its
        deadline is over: `answer(ack, late)` makes the whole answer then, on whichever thread it is."""

    def enter(
        self,
        line: int,
        reply: _Reply,
        lsn: int,
        ack: int,
        started_ns: int,
        until_ns: int,
        headers: _Headers | None,
        more: Any,
        again: bool = False,
    ) -> None:
        """Stand in line. `until_ns` 0: the line's deadline, from now. `again`: it was taken out, and counts already.

        Raises MemoryError; then it is not in."""

    def answer(self) -> bool:
        """Answer who is due for durable and sink. False: the log has failed."""

    def send(self, reply: _Reply, status: int, headers: _Headers, body: bytes) -> None:
        """Answer one that was taken out."""

    def due_busy(self) -> list[Entry]:
        """Take out those of line BUSY whose lsn is committed."""

    def late(self, now_ns: int) -> list[Entry]:
        """Take out those of all lines whose deadline is over."""

    def sleep(self, word: int, linger: bool) -> int:
        """Sleep (GIL released) until somebody may be due or late. Takes and returns the word of `Log.wait`."""
