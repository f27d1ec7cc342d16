"""The books of each sink, read from shared memory: what it has, what it misses, how far it is
behind.

    accepted = delivered + dead-lettered + skipped + waiting + unexplained   (guarantee 5)

Positions and ordinals come from the log: they survive restarts and balance exactly.
"""

import time
from typing import Final, NamedTuple

from gateway import _log
from gateway.settings import MQTT

PADS_MAX: Final = 100
"""Filled holes in a row that are stepped over to find the oldest event."""


class Books(NamedTuple):
    """The books of one sink, read in an order in which an event can only be seen as too new."""

    accepted: int
    published: int
    dead_lettered: int
    skipped: int
    """Passed by the head before this sink had them: only of a sink that is not required."""
    waiting: int
    unexplained: int


def sinks(log: _log.Log) -> list[tuple[int, str]]:
    """Number and name of each sink; the place of one that was forgotten has no name."""
    return [(number, name) for number, name in enumerate(log.sinks) if name]


def primary(log: _log.Log) -> int:
    """The sink that series without a label are about: the broker where there is one."""
    return next((number for number, name in sinks(log) if name == MQTT), sinks(log)[0][0])


def books(log: _log.Log, sink: int) -> Books:
    """Those of `sink`, at about the same moment."""
    cursor = log.cursor(sink)
    accepted = log.committed_ordinal
    return Books(
        accepted,
        cursor.published,
        cursor.dead_lettered,
        cursor.skipped,
        accepted - cursor.ordinal,
        log.unexplained(sink),
    )


def unexplained(log: _log.Log) -> int:
    """Over all sinks: a gap in one must not be hidden by a surplus in another."""
    return sum(abs(log.unexplained(sink)) for sink, _ in sinks(log))


def waiting(log: _log.Log) -> int:
    """Events that the sink that is furthest behind has still to take, of those that are
    required."""
    return max(
        (books(log, sink).waiting for sink, _ in sinks(log) if log.is_required(sink)),
        default=0,
    )


def oldest_waiting_s(log: _log.Log, sink: int) -> float:
    """Seconds since the receipt of the event that the sink takes next; 0 when there is none."""
    lsn = log.cursor(sink).lsn
    for _ in range(PADS_MAX):
        try:
            record = log.read(lsn)
        except _log.LogError:  # taken, and written over meanwhile: the log is busy, not behind
            return 0.0
        if record is None:
            return 0.0
        if record.kind == _log.DATA:
            return max(0.0, time.time() - record.received_at_ns / 1e9)
        lsn += record.size
    return 0.0


def is_passed(log: _log.Log, sink: int) -> bool:
    """The place of a sink that is not required was written over: it has to skip."""
    return not log.is_required(sink) and log.tail - log.cursor(sink).lsn > log.capacity_bytes
