"""The compiled log and the one-call ingest path: see `_native/gw_log.h`.

Positions (lsn) are byte counts that only grow. Times are unix nanoseconds.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

RUNNING: Final[int]
DRAINING: Final[int]
FAILED: Final[int]
DATA: Final[int]
VOID: Final[int]
PAD: Final[int]
BLOCK_DELIVERY: Final[int]
BLOCK_SUPERVISOR: Final[int]
BLOCK_COUNT: Final[int]
WORKERS_MAX: Final[int]
CODES: Final[tuple[str, ...]]
COUNTERS: Final[dict[str, int]]
"""Word index of each counter of `gw_counters.h`, by its lower-case name ("received", "restarts_worker", ...)."""
RECEIPT_STATES: Final[tuple[str, ...]]
"""unknown, enqueued, durable, delivered, dead_lettered, finished, lost."""
NEVER: Final[int]
"""A bound of `Log.wait` that is not waited for."""
BUSY: Final[int]
"""`Ingest.event`: another worker is writing the same key; nothing was decided."""
HISTOGRAM_BOUNDS_NS: Final[tuple[int, ...]]
CAPACITY_MIN: Final[int]
CAPACITY_MAX: Final[int]

class LogError(Exception):
    """Base of what this module raises. `path`, `lsn`, `errno` are set where known (else None)."""

    path: str | None
    lsn: int | None
    errno: int | None

class LogLocked(LogError):
    """Another process holds the log."""

class LogCorrupt(LogError):
    """Damage below the durable watermark. `recovery` says where."""

    recovery: Recovery | None

class NotALog(LogError):
    """The identity page is not one of ours, or of another version or size."""

class Lapped(LogError):
    """The place of a sink that is not required was written over before it was read (`lsn`): see `Log.skip`."""

class Recovery(NamedTuple):
    start: int
    watermark: int
    end: int
    records: int
    bytes: int
    torn_bytes: int
    corrupt_bytes: int
    corrupt: tuple[tuple[int, int], ...]
    epoch: int

class Record(NamedTuple):
    lsn: int
    size: int
    epoch: int
    kind: int
    flags: int
    received_at_ns: int
    seq: int | None
    boot: int | None
    device_id: str
    body: bytes
    dead: int
    """Bit i: sink i has set it aside (a dead letter)."""

class Cursor(NamedTuple):
    """A sink's place and books: ordinal - base = published + dead_lettered + skipped, or events are unexplained."""

    lsn: int
    ordinal: int
    published: int
    dead_lettered: int
    base: int = 0
    skipped: int = 0
    """Written over before a sink that was not required came to them."""

def create(path: str, capacity_bytes: int, progress: Callable[[int], Any] | None = None) -> None:
    """Make a new log file. Raises FileExistsError, ValueError (capacity), OSError (ENOSPC ...)."""

class Log:
    @staticmethod
    def open(
        path: str,
        lock_fd: int,
        sinks: Sequence[str],
        accept_corruption: bool = False,
        required: Sequence[bool] | None = None,
        forget: str | None = None,
    ) -> Log:
        """Lock, recover, start a new epoch. Raises LogLocked, NotALog, LogCorrupt, LogError, ValueError.

        `required`, one for each of `sinks` (None: all are): a sink that is not holds nothing back, and what is written
        over before it comes to it is skipped. One at least must be. A sink that the log knows and that is not among
        `sinks` is forgotten if no event waits for it, or if it is `forget`; else LogError (errno EINVAL).
        """

    @staticmethod
    def attach(lock_fd: int, shared_fd: int) -> Log:
        """A child's view of its supervisor's log."""

    @staticmethod
    def scan(path: str) -> Log:
        """Read-only and without a lock: what recovery would find. Nothing is written."""
    sinks: tuple[str, ...]
    """Names of the cursors, in the order of their numbers; empty: the place of a sink that was forgotten."""

    def next(self, lsn: int, limit: int) -> Record | None:
        """Of a scanned log: the first whole record of any kind that begins in [lsn, limit), also below the cursors;
        right also while a gateway writes to the file."""

    def resize(
        self, path: str, capacity_bytes: int, progress: Callable[[int], Any] | None = None
    ) -> int:
        """Of a scanned log, under its lock: write it with another capacity to `path`, sync, read back. Returns the
        position from which on records are in it. Raises LogError, LogCorrupt; then nothing is left at `path`."""
    path: str | None
    recovery: Recovery | None
    shared_fd: int
    capacity_bytes: int
    record_bytes_max: int
    identity: int
    tail: int
    committed: int
    committed_ordinal: int
    durable: int
    reclaim: int
    used: int
    """tail - reclaim: bytes that cannot be written over yet."""
    full: bool
    """Events are refused for want of room: the high mark was met, and the low one is not reached yet."""
    least_cursor: int
    """Of the required sinks."""
    sinks_want_durable: bool
    """A sink reads below `durable` only: the committer hurries also for who waits for sinks."""
    state: int
    """RUNNING, DRAINING or FAILED; assigning moves it forward only."""
    oldest: tuple[int, int] | None
    """lsn and received_at_ns of the oldest record still in the ring: how far back a repeat is recognised."""

    def set_water(self, high: int, low: int) -> None:
        """Refuse above `high` used bytes until fewer than `low` are used. Raises ValueError."""

    def receipt(self, lsn: int) -> str: ...
    def receipt_state(self, receipt: str) -> str:
        """One of RECEIPT_STATES; any text may be asked for."""

    def state_of(self, lsn: int) -> str:
        """The same for the position of an event that this process accepted."""

    def want(self, worker: int, lsn: int, sink: bool) -> None:
        """Somebody will wait for `durable` (or every required sink's cursor) to pass lsn: hurry."""

    def wait(
        self,
        worker: int,
        word: int,
        durable_above: int,
        sinks_above: int,
        committed_above: int,
        timeout_ms: int,
    ) -> int:
        """Sleep (GIL released) until a position lies above its bound (NEVER: not waited for), the log has failed,
        the worker's word is no longer `word`, or the time is over. Returns the word."""

    def nudge(self, worker: int) -> None:
        """End the worker's `wait`."""

    def wait_durable(self, seen: int, timeout_ms: int) -> int:
        """Sleep (GIL released) until `durable` > seen, `wake_durable`, or the timeout; returns `durable`. One thread of
        the delivery process. A log that has failed ends the sleep once."""

    def wake_durable(self) -> None:
        """End the `wait_durable` that runs, or the next one."""

    def sinks_wanted(self, lsn: int) -> bool:
        """Somebody waits for the sinks to pass a position at or above lsn."""

    def rest(self, microseconds: int) -> None:
        """The follower's pause (GIL released); shorter when somebody waits for an acknowledgement."""

    def mark_dead(self, sink: int, lsn: int, epoch: int = 0) -> bool:
        """This sink has set the record at lsn aside. False: no such record. See `gw_log.h`."""

    def close(self) -> None: ...
    def read(self, lsn: int) -> Record | None:
        """The record at lsn; None at or above `committed`. Raises LogCorrupt."""

    def follow(self, seen: int, timeout_ms: int) -> int:
        """Walk, fill holes of dead producers, wait until committed > seen or the timeout; returns committed."""

    def wake(self) -> None: ...
    def sink(self, name: str) -> int:
        """Index of a sink's cursor. Raises KeyError."""

    def cursor(self, sink: int) -> Cursor: ...
    def set_cursor(self, sink: int, cursor: Cursor) -> None: ...
    def skip(self, sink: int) -> int:
        """Move the cursor of a sink that is not required, and whose place was written over, to the least required
        cursor. Returns the events it missed, which are in its books; 0: it need not move. By its writer only."""

    def is_required(self, sink: int) -> bool: ...
    def lag_events(self, sink: int) -> int:
        """Events that the sink has not passed yet, also those that it will have to skip."""

    def unexplained(self, sink: int) -> int: ...
    def owner_died(self, pid: int) -> None: ...
    def takeover(self) -> None:
        """First call of a committer. Raises LogError, and the state is FAILED then."""

    def sync(self) -> bool:
        """One group commit; True when another one would move something. Raises LogError (final)."""

    def run_committer(self, interval_ms: int) -> None:
        """Blocks, with the GIL released, until `stop_committer`. Raises LogError (final)."""

    def stop_committer(self) -> None: ...
    def counter(self, block: int, index: int) -> int: ...
    def counter_total(self, index: int) -> int:
        """Sum over all blocks."""

    def counter_add(self, block: int, index: int, n: int = 1) -> None: ...
    def counter_set(self, block: int, index: int, n: int) -> None: ...
    def observe(self, block: int, histogram: int, ns: int) -> None: ...
    def _hold(self) -> None:
        """Until `_release`, `close` refuses: another module reads without the GIL."""

    def _release(self) -> None: ...
    def _capsule(self) -> Any:
        """PyCapsule "gw_log" with the gw_log pointer, for `gateway._mqtt`."""

class Batch(NamedTuple):
    """What came of a batch. accepted + duplicates + len(errors) events were looked at, in order, from the first on."""

    code: int
    """0, or why the body is no batch: nothing of it is in (MALFORMED_JSON, NOT_AN_OBJECT, EMPTY_BATCH,
    BATCH_TOO_LARGE, BAD_DEVICE_ID), with the `offset` in the body where its framing breaks."""
    offset: int | None
    items: int
    """Events in the body."""
    accepted: int
    duplicates: int
    errors: list[tuple[int, int, str | None, int | None]]
    """Of each event refused: its index, the number of its refusal in CODES, the field, the offset in the event."""
    resume_at: int | None
    """Index of the first event that was not looked at, when it ended early; of a log that has failed, the event whose
    fate is unknown."""
    stop: int
    """Why it ended early: the number of log_full, draining, failed, accepted_pending (a key stayed busy); 0."""
    lsn: int
    """The highest of the events accepted and of the originals of duplicates; 0: none."""
    used_percent: int
    lsns: bytes
    """A native unsigned 64-bit number for each event looked at: its lsn, or its original's; 0: refused."""

class Ingest:
    """One worker's way into the log: validate, claim, copy, commit in one call. One thread."""

    def __init__(self, log: Log, block: int) -> None:
        """Takes an intent slot and the counter block `block`. Raises LogError when no slot is free."""
    field: str | None
    """Of the last refusal: what it is about ("metrics.temp_c", "seq" ...)."""
    offset: int | None
    """Of the last refusal: byte offset in the body."""
    lsn: int
    """Of the last accepted event, or of the original that it repeats; of the one to wait for when BUSY."""
    duplicate: bool
    """The last accepted event was a repeat: nothing was added, the answer is about its original."""
    used_percent: int
    """How full the log was when the last event was accepted."""
    receipt: str
    """Of the last accepted event."""

    def event(self, device_id: str, body: bytes, started_ns: int, again: bool = False) -> int:
        """0 when the event is committed in the log, else the number of the refusal in CODES, or BUSY.

        Counts received, accepted, duplicates, refused and the request's time since `started_ns` (`now_ns()`).
        After BUSY: call it again with `again` once `Log.committed` lies above `lsn`; only then is the rest counted.
        """

    def batch(
        self,
        device_id: str | None,
        body: bytes,
        ndjson: bool,
        started_ns: int,
        limits: tuple[int, int],
    ) -> Batch:
        """Many events: a JSON array, a line for each (`ndjson`), or a lone object. The GIL is released.

        `device_id` None: each event has a member "device_id". `limits`: the largest event in bytes (each larger one is
        refused alone), the most events. White space around an event is not part of it. A key that another worker is
        writing is waited for, at most 50 ms in all. Counts as `event` does, for each event; the request's time once.
        Raises MemoryError, and then nothing is in; ValueError (closed, or in use by another thread), OverflowError.
        """

    def refuse(self, code: int, started_ns: int) -> None:
        """Count a refusal that the door decided itself (media type, size ...)."""

    def close(self) -> None: ...

class Appender:
    """Offline tools' way into a log: no validation, no verdict beyond the log's own. One thread."""

    def __init__(self, log: Log) -> None: ...
    def append(self, record: Record) -> int:
        """Append a copy of a DATA record (its lsn, size, epoch and dead are not used). Returns the lsn; -1: full.

        Raises LogError. A key that stands in the log already raises ValueError.
        """

    def close(self) -> None: ...

def now_ns() -> int:
    """CLOCK_MONOTONIC."""
