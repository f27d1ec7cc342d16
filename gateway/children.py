"""The supervisor's children: started, heard, reaped, started again.

    start     Launch in a memfd, fork + exec; the pidfd and the pipe of what it tells are watched
    dies      waitid(WNOWAIT) ─▶ log.owner_died(pid), while the pid cannot be another's
              ─▶ log.wake ─▶ reap ─▶ the supervisor decides
    again     at once; one that keeps dying young waits, at most RESTART_MAX_S

Time that decides about others is counted in ticks of the supervisor: what passes between two looks
counts TICK_S at most, so a machine or a supervisor that was stopped has seen nothing happen."""

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Final

from gateway import _log, process
from gateway.config import Config
from gateway.errors import Exit, GatewayError
from gateway.process import Launch, Recovered

YOUNG_S: Final = 5.0
"""A child that lived shorter died young."""
RESTART_MAX_S: Final = 1.5
"""The longest wait before a child is started again; with the start itself less than 2 s (guarantee
20)."""
TICK_S: Final = 0.5
HUNG_S: Final = 5.0
"""Of ticks without a beat: the delivery process makes no progress."""
HUNG_FIRST_S: Final = 60.0
"""The same before its first beat: its first fdatasync may have a whole log to write."""

_logger: Final = logging.getLogger(__name__)


class ProcessNotStarted(GatewayError):
    """The system has no room for a child at the start."""

    def __init__(self, name: str, error: OSError) -> None:
        super().__init__(
            f"{name} cannot be started: {error.strerror}; raise the limit of open files, processes"
            " or memory"
        )


class Child:
    """A place that a process fills."""

    def __init__(self, name: str, module: str, block: int, listener: socket.socket | None) -> None:
        self.name, self.module, self.block, self.listener = name, module, block, listener
        self.process: subprocess.Popen[bytes] | None = None
        self.pidfd = self.told_fd = -1
        self.told = ""
        """What the process has told, in lines."""
        self.started_s = 0.0
        self.deaths_young = 0
        self.proved = False
        """It has lived long enough once: its settings are good."""
        self.start_at_s: float | None = None
        """When it is to be started again."""

    @property
    def is_delivery(self) -> bool:
        return self.listener is None

    @property
    def is_ready(self) -> bool:
        """A worker serves."""
        return process.READY in self.told.splitlines()

    @property
    def why_failed(self) -> str | None:
        """What it told about a log that has FAILED."""
        lines = [line for line in self.told.splitlines() if line.startswith(process.FAILED)]
        return lines[0].removeprefix(process.FAILED) if lines else None

    def signal(self, number: int) -> None:
        """Send a signal to the process, if there is one; it cannot be another's pid, since only we
        reap it."""
        if self.process is not None:
            os.kill(self.process.pid, number)

    def hear(self) -> bool:
        """Read what it tells. False: it has said its last word."""
        try:
            data = os.read(self.told_fd, 65536)
        except BlockingIOError:
            return True
        self.told += data.decode(errors="replace")
        return bool(data)

    def next_wait_s(self) -> float:
        """How long to wait before it is started again; called once a death."""
        if time.monotonic() - self.started_s >= YOUNG_S:
            self.proved = True
            self.deaths_young = 0
            return 0.0
        self.deaths_young += 1
        return (
            0.0
            if self.deaths_young == 1
            else min(RESTART_MAX_S, 0.1 * 2.0 ** (self.deaths_young - 2))
        )


class Children:
    """All of them; the delivery process is the first."""

    def __init__(
        self,
        log: _log.Log,
        lock_fd: int,
        config: Config,
        selector: selectors.BaseSelector,
        on_death: Callable[[Child, int], None],
    ) -> None:
        """`on_death(child, exit code)` is called for one that has been reaped."""
        self._log, self._lock_fd, self._config = log, lock_fd, config
        self._selector, self._on_death = selector, on_death
        found = log.recovery
        self._recovered = (
            Recovered(found.records, found.torn_bytes, found.corrupt_bytes)
            if found
            else Recovered()
        )
        self.delivery = Child("delivery", "gateway.delivery", 0, None)
        self.all: list[Child] = [self.delivery]

    @property
    def workers(self) -> list[Child]:
        """Everyone but the delivery process."""
        return self.all[1:]

    @property
    def alive(self) -> bool:
        """Whether any process runs."""
        return any(child.process is not None for child in self.all)

    def free_block(self) -> int | None:
        """A worker's counter block that no process writes. A block has one writer, so a worker and
        the one that replaces it cannot share theirs."""
        used = {child.block for child in self.workers}
        return next((block for block in range(_log.WORKERS_MAX) if block not in used), None)

    def start(self, child: Child) -> None:
        """Start its process; later, when the system has no room now. Raises ProcessNotStarted when
        that is so the first time."""
        child.start_at_s = None
        launch = Launch(
            name=child.name,
            index=child.block,
            parent=os.getpid(),
            lock_fd=self._lock_fd,
            shared_fd=self._log.shared_fd,
            listen_fd=-1 if child.listener is None else child.listener.fileno(),
            config=self._config,
            recovered=self._recovered,
        )
        try:
            child.process, child.pidfd, child.told_fd = process.spawn(child.module, launch)
        except OSError as error:  # no descriptor, process or memory left: perhaps for a moment
            if not child.started_s:
                raise ProcessNotStarted(child.name, error) from None
            _logger.error(
                "%s cannot be started: %s; trying again in %g s",
                child.name,
                error.strerror,
                RESTART_MAX_S,
            )
            child.start_at_s = time.monotonic() + RESTART_MAX_S
            return
        child.told = ""
        child.started_s = time.monotonic()
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._reap(child))
        self._selector.register(child.told_fd, selectors.EVENT_READ, lambda: self._hear(child))
        _logger.info("%s is process %d", child.name, child.process.pid)

    def start_due(self) -> None:
        """Start those whose time has come."""
        now = time.monotonic()
        for child in list(self.all):
            if child.start_at_s is not None and child.start_at_s <= now:
                self.start(child)

    def signal_all(self, number: int) -> None:
        """Send a signal to every process."""
        for child in self.all:
            child.signal(number)

    def start_none(self) -> None:
        """Nobody is started again."""
        for child in self.all:
            child.start_at_s = None

    def _hear(self, child: Child) -> None:
        if child.told_fd >= 0 and not child.hear():  # below 0: it was reaped a moment ago
            self._deafen(child)

    def _deafen(self, child: Child) -> None:
        if child.told_fd >= 0:
            self._selector.unregister(child.told_fd)
            os.close(child.told_fd)
            child.told_fd = -1

    def _reap(self, child: Child) -> None:
        if child.process is None:
            return
        pid = child.process.pid
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        # Its claims may be resolved from here on, and its pid is nobody else's before it is reaped.
        self._log.owner_died(pid)
        self._log.wake()
        code = child.process.wait()
        if child.told_fd >= 0:
            child.hear()  # its last words
            self._deafen(child)
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        child.process, child.pidfd = None, -1
        if child.is_delivery:
            for gauge in ("mqtt_connected", "mqtt_in_flight", "file_up", "sync_since_ns"):
                self._log.counter_set(_log.BLOCK_DELIVERY, _log.COUNTERS[gauge], 0)
        self._on_death(child, code)


class Pulse:
    """Whether a delivery process makes progress: its follower and its event loop each count a word
    at least once a second."""

    def __init__(self, log: _log.Log) -> None:
        self._log = log
        self._words = [_log.COUNTERS[name] for name in ("beat_follower", "beat_loop")]
        self.begin()

    def begin(self) -> None:
        """Another process has been started."""
        self._seen = self._read()
        self._silent_s = [0.0] * len(self._words)
        self._beaten = [False] * len(self._words)

    def tick(self, elapsed_s: float) -> bool:
        """`elapsed_s` of the supervisor's own time have passed. True: it hangs."""
        now = self._read()
        hung = False
        for i, beat in enumerate(now):
            if beat != self._seen[i]:
                self._silent_s[i], self._beaten[i] = 0.0, True
            else:
                self._silent_s[i] += elapsed_s
                hung |= self._silent_s[i] >= (HUNG_S if self._beaten[i] else HUNG_FIRST_S)
        self._seen = now
        return hung

    @property
    def has_beaten(self) -> bool:
        """Each has counted since it began: the process runs."""
        return all(
            beaten or now != seen
            for beaten, now, seen in zip(self._beaten, self._read(), self._seen, strict=True)
        )

    def _read(self) -> list[int]:
        return [self._log.counter(_log.BLOCK_DELIVERY, word) for word in self._words]


def how(code: int) -> str:
    """How a process ended, for people."""
    if code < 0:
        with contextlib.suppress(ValueError):  # most real-time signals have no name
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"
    with contextlib.suppress(ValueError):
        return f"exited with {code} ({Exit(code).name})"
    return f"exited with {code}"
