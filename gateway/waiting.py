"""Requests that wait for more than `enqueue`: until their event is durable, or every sink has it.

    door's thread      event is in the log ─▶ `accepted` ─┐
                       a batch is ──────────▶ `batch` ────┤ a line of the waiting room
                       another writes its key ─▶ `busy` ──┤ (gateway._waiting, compiled)
                                                          ▼
    waiter thread      answers who is due, sleeps in the room, natively

                       line       answered once              else, after its deadline
                       durable    log.durable > lsn          504 accepted_pending
                       sink       log.least_cursor > lsn     504 accepted_pending
                       busy       log.committed > lsn: the event is tried again, and may wait on

Who is due is answered by whichever thread comes by first: the door's, with each event that is to
wait (it holds the GIL anyhow), or the waiter, woken by the position, when the door is quiet. Each
is answered exactly once: by what it waits for, by its deadline, by the failure of the log (500), or
by `end` (504). An entry leaves its line under the GIL, and whoever took it out answers it. Nothing
is done for a client that goes away: its entry is as small as any and ends like any.

No wake-up is lost, and who comes just before the sleep is seen: `_native/gw_waiting.h`.

A sleeper sleeps on, for a while, for the next step of a position at which somebody was just
answered: clients that send one event after another cost no nudge each.

Memory: one entry a connection (HTTP/1.1 has one request at a time), without the body, except for
`busy`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from gateway import _log, http
from gateway._log import NEVER, now_ns
from gateway._waiting import BUSY, DURABLE, SINK, Entry, Room
from gateway.http import Answer

_logger: Final = logging.getLogger(__name__)

LINGER_MS: Final = 1000
"""How long a sleeper sleeps for the next step when nobody waits; also its longest sleep while
somebody does."""
IDLE_MS: Final = 3_600_000
FAILED_TICK_S: Final = 0.02
"""A failed log wakes every sleeper at once; the process ends soon."""

_ACKS_LATE: Final = _log.COUNTERS["acks_late"]


class Reply(Protocol):
    """Sends a whole response; any thread."""

    def __call__(self, status: int, headers: list[tuple[str, str]], body: bytes, /) -> object: ...


class Refused(Protocol):
    """The answer to a verdict of `Ingest.event`, which has counted it."""

    def __call__(self, code: int, ingest: _log.Ingest) -> Answer: ...


class Waiting(Room):
    """The requests of one worker that wait. `accepted`, `batch` and `busy` are called by the door's
    one thread, `end` by any other."""

    def __init__(
        self,
        log: _log.Log,
        worker: int,
        durable_deadline_ms: int,
        sink_deadline_ms: int,
        refused: Refused,
        refuse: Callable[[int, int], Answer],
    ) -> None:
        deadlines = durable_deadline_ms, sink_deadline_ms
        super().__init__(
            *(log, worker, *deadlines, LINGER_MS, IDLE_MS), http.X_ACK, http.BODY, http.set_aside
        )
        self._log, self._worker = log, worker
        self._refused, self._refuse = refused, refuse
        self._ending = False
        self._pending = http.refusal(http.ACCEPTED_PENDING)
        self._internal = http.refusal(http.INTERNAL)

    def start(self) -> None:
        """Start the waiter, which lives as long as the process."""
        threading.Thread(target=self._run, name="waiter", daemon=True).start()

    def end(self) -> None:
        """Nothing is confirmed any more: who waits, and who comes to wait from here on, gets 504.
        Returns at once."""
        self._ending = True
        self._log.nudge(self._worker)

    def busy(
        self, reply: Reply, lsn: int, ack: int, started_ns: int, event: tuple[str, bytes]
    ) -> None:
        """`Ingest.event` said BUSY: try the event (device id, body) again once `lsn` is
        committed."""
        headers = http.receipt_headers(self._log.receipt(lsn), False, 0)
        self.enter(BUSY, reply, lsn, ack, started_ns, 0, headers, event)

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
        if not self.answer():
            self._each(self.late(NEVER), self._fail)
            time.sleep(FAILED_TICK_S)
            return word
        self._each(self.due_busy(), self._try_again)
        self._each(self.late(NEVER if self._ending else now_ns()), self._give_up)
        return self.sleep(word, not self._ending)

    def _each(self, entries: Iterable[Entry], end: Callable[[Entry], None]) -> None:
        """They are out of their lines: what goes wrong with one must not keep the next from its
        answer."""
        for entry in entries:
            try:
                end(entry)
            except BaseException:
                _logger.critical("internal error while answering who waits", exc_info=True)

    def _try_again(self, entry: Entry) -> None:
        assert isinstance(entry.more, tuple)
        device_id, body = entry.more
        try:  # not the door's `Ingest`: what that says of its last event must stay
            ingest = _log.Ingest(self._log, self._worker)
        except _log.LogError:  # no intent slot: those of dead workers are not resolved yet
            self._give_up(entry)
            return
        reply, ack, started_ns = entry.reply, entry.ack, entry.started_ns
        try:
            code = ingest.event(device_id, body, started_ns, True)
            if code == _log.BUSY:
                headers = http.receipt_headers(self._log.receipt(ingest.lsn), False, 0)
                place = ingest.lsn, ack, started_ns, entry.until_ns
                self.enter(BUSY, reply, *place, headers, entry.more, True)
                return
            if code:
                self.send(reply, *self._refused(code, ingest))
                return
            headers = http.receipt_headers(ingest.receipt, ingest.duplicate, ingest.used_percent)
            if ack == http.ENQUEUE:
                headers.append(http.X_ACK[http.ENQUEUE])
                self.send(reply, 202, headers, http.BODY[http.ENQUEUE])
                return
            line = SINK if ack == http.SINK else DURABLE
            self.enter(line, reply, ingest.lsn, ack, started_ns, 0, headers, None, True)
        finally:
            ingest.close()

    def _give_up(self, entry: Entry) -> None:
        """It stays in the log, and nothing more is known."""
        if callable(entry.more):
            self._log.counter_add(self._worker, _ACKS_LATE)
            self.send(entry.reply, *entry.more(entry.ack, True))
            return
        if entry.more is None:
            self._log.counter_add(self._worker, _ACKS_LATE)
        else:  # it was received and nothing was decided: the books want a verdict
            self._refuse(http.ACCEPTED_PENDING, entry.started_ns)
        status, headers, body = self._pending
        self.send(entry.reply, status, [*headers, *(entry.headers or ())[1:]], body)

    def _fail(self, entry: Entry) -> None:
        if isinstance(entry.more, tuple):
            self._refuse(http.INTERNAL, entry.started_ns)
        self.send(entry.reply, *self._internal)
