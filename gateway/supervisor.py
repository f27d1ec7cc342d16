"""The supervisor: starts the workers and the delivery process, starts each again when it dies,
drains, ends.

It takes no event and publishes none. It sleeps in one select over the children's pidfds and a
signal pipe; nothing polls.

    start     open_log (lock, recovery) ─▶ bind ─▶ listen ─▶ delivery, workers
    a child   waitid(WNOWAIT) ─▶ log.owner_died(pid), while the pid cannot be another's
    dies      ─▶ log.wake ─▶ reap ─▶ start it again at once; one that keeps dying young waits,
              at most RESTART_MAX_S
    SIGTERM,  the log's tail is closed: every worker answers 503 and /readyz says no
    SIGINT    ─▶ delivery publishes what is left, at most http.drain_deadline_ms, syncs, exits
              ─▶ workers end their connections, exit ─▶ exit 0
    SIGINT    again: everything is killed
    FAILED    (a write error; the exit of the delivery process says it) everything ends,
              exit LOG_FAILED: the next start recovers

Killed itself, its children die with it (parent-death signal), and the next supervisor waits for
their lock."""

import logging
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from typing import Final

from gateway import _log, logs, metrics, opening, process
from gateway.config import Config
from gateway.errors import Exit, GatewayError, PortBusy
from gateway.process import Launch, Recovered
from gateway.worker import GRACE_S

DOORS: Final = {"granian": "gateway.frontends.granian"}
DELIVERY: Final = "gateway.delivery"
YOUNG_S: Final = 5.0
"""A child that lived shorter died young."""
RESTART_MAX_S: Final = 1.5
"""The longest wait before a child is started again; with the start itself less than 2 s (guarantee
20)."""
WORKER_KILL_S: Final = GRACE_S + 1.0
DELIVERY_KILL_S: Final = 5.0
"""After the drain deadline, for the last sync."""

_logger: Final = logging.getLogger(__name__)
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ProcessNotStarted(GatewayError):
    """The system has no room for a child at the start."""

    def __init__(self, name: str, error: OSError) -> None:
        super().__init__(
            f"{name} cannot be started: {error.strerror}; raise the limit of open files, processes"
            " or memory"
        )


class Child:
    """A place that a process fills."""

    def __init__(self, name: str, module: str, index: int, listener: socket.socket | None) -> None:
        self.name, self.module, self.index, self.listener = name, module, index, listener
        self.process: subprocess.Popen[bytes] | None = None
        self.pidfd = -1
        self.started_s = 0.0
        self.deaths_young = 0
        self.proved = False
        """It has lived long enough once: its settings are good."""
        self.start_at_s: float | None = None
        """When it is to be started again."""

    @property
    def is_delivery(self) -> bool:
        return self.listener is None

    def signal(self, number: int) -> None:
        """Send a signal to the process, if there is one; it cannot be another's pid, since only we
        reap it."""
        if self.process is not None:
            os.kill(self.process.pid, number)

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


class Supervisor:
    """One gateway."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._selector = selectors.DefaultSelector()
        self._signal_fd, self._signaller_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._signal_fd, selectors.EVENT_READ)
        self._code: Exit = Exit.OK
        self._ending = False
        self._kill_at_s: dict[Child, float] = {}
        self._children: list[Child] = []
        self._sockets: list[socket.socket] = []
        self._log: _log.Log
        self._lock_fd = -1
        self._recovered = Recovered()

    def run(self, welcome: str | None = None) -> Exit:
        """Until everything has ended; `welcome` is printed when nothing stands in the way of the
        start. Raises GatewayError when it cannot start."""
        # Until the children run there is nothing to drain: a signal ends the start. (Without a
        # handler, process 1 of a container would not hear it.)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        process.raise_descriptor_limit()
        self._sockets = opening.bind(self._config)
        self._log, self._lock_fd, _ = opening.open_log(self._config)
        if found := self._log.recovery:
            self._recovered = Recovered(found.records, found.torn_bytes, found.corrupt_bytes)
        self._children = [Child("delivery", DELIVERY, 0, None)]
        for index, listener in enumerate(self._sockets):
            listener.listen(opening.BACKLOG)
            self._children.append(
                Child(f"worker-{index}", DOORS[self._config.http.server], index, listener)
            )
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # the pipe tells
        signal.set_wakeup_fd(self._signaller_fd, warn_on_full_buffer=False)
        if welcome:
            print(welcome, flush=True)
        for child in self._children:
            self._start(child)
        host = (
            f"[{self._config.http.host}]"
            if ":" in self._config.http.host
            else self._config.http.host
        )
        _logger.info(
            "POST events to http://%s:%d/v1/ingest/{device_id}; %d workers, publishing to %s",
            host,
            self._config.http.port,
            len(self._sockets),
            self._config.mqtt.url,
        )
        try:
            while self._children_alive() or not self._ending:
                self._step()
        finally:
            self._kill_all()
            self._close_sockets()
        _logger.info("ended, exit code %d", self._code)
        self._log.close()
        return self._code

    def _step(self) -> None:
        now = time.monotonic()
        due = [child.start_at_s for child in self._children if child.start_at_s is not None]
        due += self._kill_at_s.values()
        timeout = max(0.0, min(due) - now) if due else None
        for key, _ in self._selector.select(timeout):
            if key.fd == self._signal_fd:
                self._signals()
            elif isinstance(key.data, Child):
                self._died(key.data)
        now = time.monotonic()
        for child in self._children:
            if child.start_at_s is not None and child.start_at_s <= now:
                self._start(child)
        for child, at_s in list(self._kill_at_s.items()):
            if at_s <= now:
                del self._kill_at_s[child]
                if child.process is not None:
                    _logger.warning("%s does not end; killing it", child.name)
                    child.signal(signal.SIGKILL)

    # ---- children --------------------------------------------------------------------------------

    def _children_alive(self) -> bool:
        return any(child.process is not None for child in self._children)

    def _start(self, child: Child) -> None:
        child.start_at_s = None
        launch = Launch(
            name=child.name,
            index=child.index,
            parent=os.getpid(),
            lock_fd=self._lock_fd,
            shared_fd=self._log.shared_fd,
            listen_fd=-1 if child.listener is None else child.listener.fileno(),
            config=self._config,
            recovered=self._recovered,
        )
        try:
            child.process = process.spawn(child.module, launch)
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
        child.pidfd = os.pidfd_open(child.process.pid)
        child.started_s = time.monotonic()
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        _logger.info("%s is process %d", child.name, child.process.pid)

    def _died(self, child: Child) -> None:
        assert child.process is not None
        pid = child.process.pid
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        # Its claims may be resolved from here on, and its pid is nobody else's before it is reaped.
        self._log.owner_died(pid)
        self._log.wake()
        code = child.process.wait()
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        child.process, child.pidfd = None, -1
        self._kill_at_s.pop(child, None)
        if child.is_delivery:
            for gauge in ("mqtt_connected", "mqtt_in_flight"):
                self._log.counter_set(_log.BLOCK_DELIVERY, _log.COUNTERS[gauge], 0)
        # SIGBUS: the mapped file was cut short, or a sector of it cannot be read
        if code in (Exit.LOG_FAILED, -signal.SIGBUS) or self._log.state == _log.FAILED:
            self._fail()
        elif self._ending:
            self._died_while_ending(child, code)
        elif code in (Exit.USAGE, Exit.PORT_BUSY) and not child.proved:
            _logger.critical(
                "%s cannot run with these settings; the line before this one says why", child.name
            )
            self._end(Exit(code))
        else:
            wait_s = child.next_wait_s()
            counter = "restarts_delivery" if child.is_delivery else "restarts_worker"
            self._log.counter_add(_log.BLOCK_SUPERVISOR, _log.COUNTERS[counter])
            child.start_at_s = time.monotonic() + wait_s
            _logger.warning("%s (process %d) %s; starting it again", child.name, pid, _how(code))

    # ---- the end ---------------------------------------------------------------------------------

    def _signals(self) -> None:
        try:
            received = os.read(self._signal_fd, 64)
        except BlockingIOError:
            return
        for number in received:
            if number == signal.SIGHUP:
                _logger.info(
                    "SIGHUP: settings are read at the start only; restart the gateway for others"
                )
            elif not self._ending:
                _logger.info(
                    "%s: draining; %d events wait to be published, for at most %g s%s",
                    signal.Signals(number).name,
                    metrics.books(self._log).waiting,
                    self._config.http.drain_deadline_ms / 1000,
                    "; Ctrl-C again kills" if number == signal.SIGINT else "",
                )
                self._drain()
            elif number == signal.SIGINT:
                _logger.warning("interrupted again: killing everything")
                self._code = Exit.INTERRUPTED
                self._kill_all()

    def _drain(self) -> None:
        self._ending = True
        self._log.state = _log.DRAINING
        delivery = self._children[0]
        for child in self._children:
            child.start_at_s = None
        if delivery.process is None:
            self._start(delivery)  # it was about to be: what is in the log wants to be published
        if delivery.process is None:  # there is no room for it
            delivery.start_at_s = None
            self._end_workers()
            return
        delivery.signal(signal.SIGTERM)
        self._kill_at_s[delivery] = (
            time.monotonic() + self._config.http.drain_deadline_ms / 1000 + DELIVERY_KILL_S
        )

    def _died_while_ending(self, child: Child, code: int) -> None:
        if child.is_delivery:
            if code != 0 and self._code == Exit.OK:
                _logger.error(
                    "delivery %s while draining; what is left stays in the log", _how(code)
                )
                self._code = Exit.ERROR
            self._end_workers()

    def _end_workers(self) -> None:
        self._close_sockets()  # whoever connects from here on is refused at once
        for child in self._children:
            if not child.is_delivery and child.process is not None:
                child.signal(signal.SIGTERM)
                self._kill_at_s[child] = time.monotonic() + WORKER_KILL_S

    def _end(self, code: Exit) -> None:
        """End everything now, without draining."""
        self._ending = True
        self._code = code
        for child in self._children:
            child.start_at_s = None
        delivery = self._children[0]
        if delivery.process is not None:
            delivery.signal(signal.SIGKILL)
        self._end_workers()

    def _fail(self) -> None:
        if self._code == Exit.LOG_FAILED:
            return
        self._log.state = _log.FAILED
        _logger.critical(
            "the log has FAILED: a write to %s did not reach the disk, or the log is damaged."
            " Nothing more is accepted. Look at the disk (dmesg, free space, SMART), then start the"
            " gateway again: it recovers from what is on the disk",
            self._config.log.path,
        )
        self._end(Exit.LOG_FAILED)

    def _kill_all(self) -> None:
        for child in self._children:
            if child.process is not None:
                child.signal(signal.SIGKILL)

    def _close_sockets(self) -> None:
        for listener in self._sockets:
            listener.close()


def _how(code: int) -> str:
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:  # most real-time signals have no name
            return f"was killed by signal {-code}"
    return f"exited with {code}"


def run(
    config: Config, origin: Mapping[str, str] | None = None, welcome: str | None = None
) -> Exit:
    """Run a gateway until it is told to end. `origin` says where settings came from, for
    messages; `welcome` is printed once it starts."""
    logs.set_up(config.log.level, "supervisor")
    try:
        return Supervisor(config).run(welcome)
    except PortBusy as busy:
        where = (origin or {}).get(busy.setting)
        if where and where != "default":
            _logger.error("%s comes from %s", busy.setting, where)
        raise
