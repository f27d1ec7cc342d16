"""A rolling restart: every worker is replaced by a new process, one after the other, and no request
fails for it; then the delivery process.

    START    another socket listens, shut to new connections; a successor is started with it. One
             that dies, or is not ready in READY_S, is given up, and with it the roll: the old
             worker has never stopped serving
    RETIRE   in one step the successor's socket takes new connections and the old one takes none
             (gateway.listeners). The old worker (SIGUSR1) accepts what is queued for it and answers
             each further request with `Connection: close`, until it has no connections, at most
             RETIRE_S
    END      SIGTERM: it answers what it has begun (a body that arrives, a wait for an
             acknowledgement), closes idle connections, exits. Its socket is closed when nothing is
             queued for it; else a process is started for the rest, and retired in its turn

The log is RUNNING all the time. Where a kernel does not let a program choose the socket, or no
counter block is free for a second process, a worker is replaced *in place*: it retires and ends
first, and its successor is started with the same socket, where connections wait meanwhile.

Deaths in between: the old worker before RETIRE is started again as ever; later, only if something
is queued for its socket. A successor that was ready is a worker like any other.

All times are counted in the supervisor's ticks. Not handled: an idle connection that is closed by
END at the very moment its client sends a request (RFC 9112, 9.3.1: inherent in keep-alive; RETIRE
makes it rare)."""

import enum
import logging
import signal
from typing import Final

from gateway import listeners, process
from gateway.children import Child, Children, how
from gateway.config import Config
from gateway.listeners import Listeners
from gateway.worker import GRACE_S

READY_S: Final = 10.0
"""A successor that needs longer is given up."""
RETIRE_MIN_S: Final = 1.0
"""A handshake that began with the old socket ends there: one lost packet more than a round trip."""
RETIRE_S: Final = 3.0
"""Time for a connection in use to learn that it is to be closed."""
POLL_S: Final = 0.1
QUEUE_ATTEMPTS: Final = 5
"""Processes that are started to serve what is queued for a socket that retires."""
SPARE_S: Final = 1.0

_logger: Final = logging.getLogger(__name__)


class _Phase(enum.Enum):
    START = enum.auto()
    GIVE_UP = enum.auto()
    RETIRE = enum.auto()
    END = enum.auto()
    DELIVERY = enum.auto()
    OVER = enum.auto()


class Roll:
    """One roll. The supervisor calls `tick` every POLL_S, and `died` for each child that ended."""

    def __init__(self, children: Children, group: Listeners, config: Config) -> None:
        self._children, self._group = children, group
        http = config.http
        waits_ms = max(http.body_deadline_ms, http.durable_deadline_ms, http.sink_deadline_ms)
        self._end_s = waits_ms / 1000 + GRACE_S + SPARE_S
        self._drain_s = http.drain_deadline_ms / 1000 + 5 * SPARE_S
        self._left = children.workers
        self._all = len(self._left)
        self._old = self._new = children.delivery  # until `_next`
        self._told_to_retire = False
        self._attempts = 0
        self._in_place = False
        self._sockets = 0
        """Of a worker without connections."""
        self._phase = _Phase.OVER
        self._elapsed_s = 0.0
        self._next()

    @property
    def is_over(self) -> bool:
        return self._phase is _Phase.OVER

    def tick(self, elapsed_s: float) -> None:
        """Go on; `elapsed_s` of the supervisor's own time have passed."""
        self._elapsed_s += elapsed_s
        match self._phase:
            case _Phase.START:
                self._await_ready()
            case _Phase.RETIRE:
                self._retire()
            case _Phase.END if self._elapsed_s >= self._end_s:
                self._kill(self._old)
            case _Phase.DELIVERY if self._elapsed_s >= self._drain_s:
                self._kill(self._children.delivery)

    def died(self, child: Child, code: int) -> bool:
        """True: this death belongs to the roll, and the child is not to be started again."""
        match self._phase:
            case _Phase.START | _Phase.GIVE_UP if child is self._new:
                self._gave_up(code)
                return not self._in_place
            case _Phase.RETIRE | _Phase.END if child is self._old:
                self._ended(code)
                return True
            case _Phase.DELIVERY if child.is_delivery:
                self._phase = _Phase.OVER
                if code != 0:
                    return False
                self._children.start(child)
                _logger.info("rolling restart: done")
                return True
        return False

    # ---- one worker ------------------------------------------------------------------------------

    def _next(self) -> None:
        if not self._left:
            self._restart_delivery()
            return
        self._old = self._left.pop(0)
        self._attempts = 0
        block = self._children.free_block()
        try:
            if block is None:
                raise OSError(0, "all counter blocks are in use")
            listener = self._group.add()
        except OSError as error:
            _logger.warning(
                "rolling restart: %s is replaced in place, new connections wait meanwhile: %s",
                self._old.name,
                error.strerror,
            )
            self._in_place = True
            self._new = self._old
            self._enter(_Phase.RETIRE)
            return
        self._in_place = False
        self._new = Child(self._old.name, self._old.module, block, listener)
        self._new.started_s = self._old.started_s  # no room for it now is no reason to end
        self._children.all.append(self._new)
        self._enter(_Phase.START)
        self._children.start(self._new)

    def _enter(self, phase: _Phase) -> None:
        self._phase, self._elapsed_s = phase, 0.0
        self._told_to_retire = False

    def _await_ready(self) -> None:
        if self._new.is_ready:
            self._new.proved = True
            if self._in_place:
                self._next()
                return
            assert self._old.listener is not None
            assert self._new.listener is not None
            assert self._new.process is not None
            self._sockets = process.sockets_of(self._new.process.pid)
            try:
                self._group.exchange(self._old.listener, self._new.listener)
            except OSError as error:
                self._give_up(f"cannot be given connections: {error.strerror}")
                return
            self._enter(_Phase.RETIRE)
            if self._old.process is None:  # it died meanwhile
                self._old.start_at_s = None
                self._after_the_end()
        elif self._elapsed_s >= READY_S:
            if self._in_place:
                self._abandon(f"was not ready in {READY_S:g} s")
            else:
                self._give_up(f"was not ready in {READY_S:g} s")

    def _retire(self) -> None:
        old = self._old
        if old.process is None:  # the system has no room to start it again
            return
        if not self._told_to_retire:
            self._told_to_retire = True
            old.signal(signal.SIGUSR1)
            self._elapsed_s = 0.0
        if self._elapsed_s >= RETIRE_S or (
            self._elapsed_s >= RETIRE_MIN_S and self._has_nobody(old)
        ):
            old.signal(signal.SIGTERM)
            self._enter(_Phase.END)

    def _has_nobody(self, child: Child) -> bool:
        """No connections: no more sockets than its successor had before it took any."""
        assert child.listener is not None
        assert child.process is not None
        return (
            not self._in_place
            and not listeners.queued(child.listener)
            and process.sockets_of(child.process.pid) <= self._sockets
        )

    def _ended(self, code: int) -> None:
        expected = self._phase is _Phase.END
        if not expected or code not in (0, -signal.SIGKILL):
            _logger.warning("rolling restart: the old %s %s", self._old.name, how(code))
        self._after_the_end()

    def _after_the_end(self) -> None:
        old = self._old
        assert old.listener is not None
        if self._in_place:
            self._enter(_Phase.START)
            self._children.start(old)
            return
        if listeners.queued(old.listener) and self._attempts < QUEUE_ATTEMPTS:
            self._attempts += 1
            self._enter(_Phase.RETIRE)
            self._children.start(old)
            return
        if lost := listeners.queued(old.listener):
            _logger.error(
                "rolling restart: no process lived long enough to serve %d connections that were"
                " queued for the old %s; they are reset",
                lost,
                old.name,
            )
        self._group.close(old.listener)
        self._children.all.remove(old)
        self._next()

    def _kill(self, child: Child) -> None:
        if child.process is not None:
            _logger.warning("%s does not end; killing it", child.name)
            child.signal(signal.SIGKILL)
        self._elapsed_s = 0.0

    # ---- the successor does not come up ----------------------------------------------------------

    def _give_up(self, why: str) -> None:
        _logger.error("rolling restart: the new %s %s; killing it", self._new.name, why)
        self._enter(_Phase.GIVE_UP)
        self._new.start_at_s = None
        if self._new.process is None:
            self._gave_up(None)
        else:
            self._new.signal(signal.SIGKILL)

    def _gave_up(self, code: int | None) -> None:
        """The new worker has ended."""
        if self._in_place:
            self._abandon(how(code) if code is not None else "could not be started")
            return
        assert self._new.listener is not None
        self._children.all.remove(self._new)
        self._group.close(self._new.listener)  # it took no connection
        self._abandon(how(code) if code is not None else "could not be started")

    def _abandon(self, why: str) -> None:
        done = self._all - len(self._left) - 1
        _logger.error(
            "rolling restart: ended after %d of %d workers: the new %s %s (its own lines above say"
            " why); %s",
            done,
            self._all,
            self._new.name,
            why,
            "it is started again until it runs"
            if self._in_place
            else "the old one goes on serving. Mend that, then send SIGHUP again",
        )
        self._phase = _Phase.OVER

    # ---- the delivery process --------------------------------------------------------------------

    def _restart_delivery(self) -> None:
        """It publishes what it has, at most as long as a drain, and its successor goes on from the
        log; workers accept events meanwhile."""
        delivery = self._children.delivery
        if delivery.process is None:  # it is about to be started anyhow
            self._phase = _Phase.OVER
            return
        self._enter(_Phase.DELIVERY)
        delivery.signal(signal.SIGTERM)
