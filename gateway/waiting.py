"""Requests that wait for more than `enqueue`: until their event is durable, or every sink has it.

    door's thread      event is in the log ─▶ `accepted` ─┐
                       another writes its key ─▶ `busy` ──┤ incoming (a deque)
                                                          ▼
    waiter thread      takes them into three lines, answers who is due, sleeps in `log.wait`

                       line       answered once              else, after its deadline
                       durable    log.durable > lsn          504 accepted_pending
                       sink       log.least_cursor > lsn     504 accepted_pending
                       busy       log.committed > lsn: the event is tried again, and may wait on

Only the waiter touches the lines, and only it answers what is in them, so each is answered exactly
once: by what it waits for, by its deadline, by the failure of the log (500), or by `end` (504).
Nothing is done for a client that goes away: its entry is as small as any and ends like any.

No wake-up is lost. A sleeper publishes what it sleeps for (`Line.above`), then looks at `incoming`
once more; a newcomer is put into `incoming` first and then looks at `above`: below it the sleeper
is nudged, at or above it the sleeper wakes in time by itself. `above` is 0 while it is awake. The
word of `log.wait` is older than the look at the positions. All of it happens under the GIL, which
orders it.

A sleeper who has just answered somebody sleeps on for the next step of that position, for a while:
clients that send one event after another cost no nudge each.

Memory: one entry a connection (HTTP/1.1 has one request at a time), without the body, except for
`busy`.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Final, Protocol

from gateway import _log, http
from gateway._log import NEVER, now_ns
from gateway.http import Answer

_logger: Final = logging.getLogger(__name__)

LINGER_MS: Final = 1000
"""How long a sleeper sleeps for the next step when nobody waits; also its longest sleep while
somebody does."""
IDLE_MS: Final = 3_600_000
FAILED_TICK_S: Final = 0.02
"""A failed log wakes every `log.wait` at once; the process ends soon."""
COMPACT_MIN: Final = 64
"""Entries of who was late that a line may hold beside as many that wait."""

_ACKS_DURABLE: Final = _log.COUNTERS["acks_durable"]
_ACKS_SINK: Final = _log.COUNTERS["acks_sink"]
_ACKS_LATE: Final = _log.COUNTERS["acks_late"]
_ACKS_DEAD: Final = _log.COUNTERS["acks_dead"]
_ACK_NS: Final = _log.COUNTERS["ack_ns"]


class Reply(Protocol):
    """Sends a whole response; any thread."""

    def __call__(self, status: int, headers: list[tuple[str, str]], body: bytes, /) -> object: ...


class Refused(Protocol):
    """The answer to a verdict of `Ingest.event`, which has counted it."""

    def __call__(self, code: int, ingest: _log.Ingest) -> Answer: ...


class _Entry:
    """One request that waits. `reply` is None once it is answered or in another line."""

    __slots__ = ("ack", "event", "headers", "lsn", "reply", "started_ns", "until_ns")

    def __init__(
        self,
        reply: Reply,
        lsn: int,
        ack: int,
        started_ns: int,
        until_ns: int,
        headers: list[tuple[str, str]],
        event: tuple[str, bytes] | None,
    ) -> None:
        self.reply: Reply | None = reply
        self.lsn, self.ack = lsn, ack
        self.started_ns, self.until_ns = started_ns, until_ns
        self.headers, self.event = headers, event


class Line:
    """Those who wait for one position, in two orders: of their lsn, and of their arrival."""

    def __init__(self, deadline_ms: int) -> None:
        self.deadline_ns: Final = deadline_ms * 1_000_000
        self.above = 0
        """What the waiter sleeps for: the position must lie above it. 0: it is awake."""
        self._by_lsn: list[tuple[int, int, _Entry]] = []
        self._by_arrival: deque[_Entry] = deque()
        self._gone = 0
        """Entries in `_by_lsn` that were late."""
        self._number = itertools.count()

    def add(self, entry: _Entry) -> None:
        """One more."""
        heappush(self._by_lsn, (entry.lsn, next(self._number), entry))
        self._by_arrival.append(entry)

    def again(self, entry: _Entry, lsn: int) -> None:
        """One that was due waits for another lsn; its deadline, and its place among those, stay."""
        entry.lsn = lsn
        heappush(self._by_lsn, (lsn, next(self._number), entry))

    def due(self, position: int) -> Iterator[_Entry]:
        """Take out those whose lsn lies below `position`. Each must be answered at once."""
        by_lsn = self._by_lsn
        while by_lsn and by_lsn[0][0] < position:
            entry = heappop(by_lsn)[2]
            if entry.reply is None:
                self._gone -= 1
            else:
                yield entry

    def late(self, now: int) -> Iterator[_Entry]:
        """Take out those whose deadline is over. Each must be answered at once."""
        by_arrival = self._by_arrival
        while by_arrival and (by_arrival[0].reply is None or by_arrival[0].until_ns <= now):
            entry = by_arrival.popleft()
            if entry.reply is not None:
                self._gone += 1
                yield entry
        if self._gone > COMPACT_MIN and self._gone * 2 > len(self._by_lsn):
            self._by_lsn = [item for item in self._by_lsn if item[2].reply is not None]
            heapify(self._by_lsn)
            self._gone = 0

    def sleep(self, idle: int) -> None:
        """Publish what is slept for: the lowest lsn, `idle` when nobody waits. Who was late must
        not count: no deadline wakes the sleeper for it."""
        by_lsn = self._by_lsn
        while by_lsn and by_lsn[0][2].reply is None:
            heappop(by_lsn)
            self._gone -= 1
        self.above = by_lsn[0][0] if by_lsn else idle

    @property
    def until_ns(self) -> int:
        """The first deadline, NEVER when nobody waits."""
        return self._by_arrival[0].until_ns if self._by_arrival else NEVER


class Waiting:
    """The requests of one worker that wait. `accepted` and `busy` are called by the door's one
    thread, `end` by any other."""

    def __init__(
        self,
        log: _log.Log,
        worker: int,
        durable_deadline_ms: int,
        sink_deadline_ms: int,
        refused: Refused,
        refuse: Callable[[int, int], Answer],
    ) -> None:
        self._log, self._worker = log, worker
        self._refused, self._refuse = refused, refuse
        self._durable = Line(durable_deadline_ms)
        self._sink = Line(sink_deadline_ms)
        self._busy = Line(durable_deadline_ms)
        self._incoming: deque[tuple[Line, _Entry]] = deque()
        self._parked = self._answered = 0  # written by the door's thread, by the waiter
        self._linger_ms = min(LINGER_MS, durable_deadline_ms, sink_deadline_ms)
        self._ending = False
        self._pending = http.refusal(http.ACCEPTED_PENDING)
        self._internal = http.refusal(http.INTERNAL)

    def start(self) -> None:
        """Start the waiter, which lives as long as the process."""
        threading.Thread(target=self._run, name="waiter", daemon=True).start()

    @property
    def count(self) -> int:
        """How many wait."""
        return self._parked - self._answered

    def end(self) -> None:
        """Nothing is confirmed any more: who waits, and who comes to wait from here on, gets 504.
        Returns at once."""
        self._ending = True
        self._log.nudge(self._worker)

    # ---- the door's thread -----------------------------------------------------------------------

    def accepted(
        self,
        reply: Reply,
        ingest: _log.Ingest,
        ack: int,
        started_ns: int,
        headers: list[tuple[str, str]],
    ) -> None:
        """Answer the event that `ingest` has just accepted, or recognised, once `ack` (DURABLE or
        SINK) is reached. `headers` are those of `http.receipt_headers`."""
        line = self._sink if ack == http.SINK else self._durable
        now = now_ns()
        entry = _Entry(reply, ingest.lsn, ack, started_ns, now + line.deadline_ns, headers, None)
        if ingest.duplicate and self._is_due(entry):
            reply(*self._confirmed(entry, now))
        else:
            self._park(line, entry)

    def busy(
        self, reply: Reply, lsn: int, ack: int, started_ns: int, event: tuple[str, bytes]
    ) -> None:
        """`Ingest.event` said BUSY: try the event (device id, body) again once `lsn` is
        committed."""
        headers = http.receipt_headers(self._log.receipt(lsn), False, 0)
        until_ns = now_ns() + self._busy.deadline_ns
        self._park(self._busy, _Entry(reply, lsn, ack, started_ns, until_ns, headers, event))

    def _park(self, line: Line, entry: _Entry) -> None:
        self._parked += 1
        self._incoming.append((line, entry))
        if line is not self._busy:
            self._log.want(self._worker, entry.lsn, line is self._sink)
        if entry.lsn < line.above:
            self._log.nudge(self._worker)

    # ---- the waiter thread -----------------------------------------------------------------------

    def _run(self) -> None:
        word = self._log.wait(self._worker, 0, NEVER, NEVER, NEVER, 0)
        while True:
            try:
                word = self._round(word)
            except BaseException:
                _logger.critical("internal error while answering who waits", exc_info=True)
                time.sleep(FAILED_TICK_S)

    def _round(self, word: int) -> int:
        """Answer who is due, sleep until somebody may be."""
        lines = self._durable, self._sink, self._busy
        for line in lines:
            line.above = 0
        while self._incoming:
            line, entry = self._incoming.popleft()
            line.add(entry)
        log = self._log
        durable, sinks, committed = log.durable, log.least_cursor, log.committed
        if log.state == _log.FAILED:  # read behind the positions: they were right when it was not
            self._fail()
            time.sleep(FAILED_TICK_S)
            return word
        now = now_ns()
        before = self._answered
        for entry in self._durable.due(durable):
            self._send(entry, *self._confirmed(entry, now))
        linger_durable = self._answered != before and not self._ending
        before = self._answered
        for entry in self._sink.due(sinks):
            self._send(entry, *self._confirmed(entry, now))
        linger_sink = self._answered != before and not self._ending
        for entry in self._busy.due(committed):
            self._try_again(entry, now)
        for line in lines:
            for entry in line.late(NEVER if self._ending else now):
                self._give_up(entry)

        until_ns = min(line.until_ns for line in lines)
        if until_ns != NEVER:
            timeout_ms = min(self._linger_ms, (until_ns - now) // 1_000_000 + 1)
        else:
            timeout_ms = self._linger_ms if linger_durable or linger_sink else IDLE_MS
        self._durable.sleep(durable if linger_durable else NEVER)
        self._sink.sleep(sinks if linger_sink else NEVER)
        self._busy.sleep(NEVER)
        if self._incoming:
            return word
        bounds = self._durable.above, self._sink.above, self._busy.above
        return log.wait(self._worker, word, *bounds, timeout_ms)

    def _is_due(self, entry: _Entry) -> bool:
        log = self._log
        position = log.least_cursor if entry.ack == http.SINK else log.durable
        return position > entry.lsn and log.state != _log.FAILED

    def _confirmed(self, entry: _Entry, now: int) -> tuple[int, list[tuple[str, str]], bytes]:
        """The answer to who waited for what is reached; or, for a sink that has set the event
        aside, never will be."""
        log, ack, status = self._log, entry.ack, 202
        body, counter = http.BODY[ack], _ACKS_DURABLE
        if ack == http.SINK:
            state = log.state_of(entry.lsn)
            if state == "delivered":
                status, counter = 200, _ACKS_SINK
            else:  # dead_lettered, or finished: written over since, and nobody can say
                ack = http.DURABLE if log.durable > entry.lsn else http.ENQUEUE
                body, counter = http.set_aside(ack, state), _ACKS_DEAD
        log.counter_add(self._worker, counter)
        log.observe(self._worker, _ACK_NS, max(0, now - entry.started_ns))
        entry.headers.append(http.X_ACK[ack])
        return status, entry.headers, body

    def _try_again(self, entry: _Entry, now: int) -> None:
        assert entry.event is not None
        assert entry.reply is not None
        device_id, body = entry.event
        try:  # not the door's `Ingest`: what that says of its last event must stay
            ingest = _log.Ingest(self._log, self._worker)
        except _log.LogError:  # no intent slot: those of dead workers are not resolved yet
            self._give_up(entry)
            return
        try:
            code = ingest.event(device_id, body, entry.started_ns, True)
            if code == _log.BUSY:
                entry.headers = http.receipt_headers(self._log.receipt(ingest.lsn), False, 0)
                self._busy.again(entry, ingest.lsn)
                return
            if code:
                self._send(entry, *self._refused(code, ingest))
                return
            headers = http.receipt_headers(ingest.receipt, ingest.duplicate, ingest.used_percent)
            if entry.ack == http.ENQUEUE:
                headers.append(http.X_ACK[http.ENQUEUE])
                self._send(entry, 202, headers, http.BODY[http.ENQUEUE])
                return
            entry.event = None
            line = self._sink if entry.ack == http.SINK else self._durable
            self._move(entry, line, ingest.lsn, now + line.deadline_ns, headers)
            self._log.want(self._worker, ingest.lsn, line is self._sink)
        finally:
            ingest.close()

    def _move(
        self, entry: _Entry, line: Line, lsn: int, until_ns: int, headers: list[tuple[str, str]]
    ) -> None:
        """To the incoming ones, so that it is looked at before the next sleep."""
        reply, entry.reply = entry.reply, None
        assert reply is not None
        moved = _Entry(reply, lsn, entry.ack, entry.started_ns, until_ns, headers, entry.event)
        self._incoming.append((line, moved))

    def _give_up(self, entry: _Entry) -> None:
        """It stays in the log, and nothing more is known."""
        if entry.event is None:
            self._log.counter_add(self._worker, _ACKS_LATE)
        else:  # it was received and nothing was decided: the books want a verdict
            self._refuse(http.ACCEPTED_PENDING, entry.started_ns)
        status, headers, body = self._pending
        self._send(entry, status, [*headers, *entry.headers[1:]], body)

    def _fail(self) -> None:
        for line in (self._durable, self._sink, self._busy):
            for entry in line.late(NEVER):
                if entry.event is not None:
                    self._refuse(http.INTERNAL, entry.started_ns)
                self._send(entry, *self._internal)

    def _send(
        self, entry: _Entry, status: int, headers: list[tuple[str, str]], body: bytes
    ) -> None:
        reply, entry.reply = entry.reply, None
        if reply is None:
            return
        self._answered += 1
        reply(status, headers, body)
