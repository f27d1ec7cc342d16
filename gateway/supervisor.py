"""The supervisor: starts the workers and the delivery process, replaces them, drains, ends.

It takes no event and delivers none. It sleeps in one select over its children and a signal pipe,
and looks up twice a second.

    start     bind ─▶ open_log (lock, recovery) ─▶ listen ─▶ delivery, workers
    a child   is started again (gateway.children); a delivery process that makes no progress for
    dies      HUNG_S of ticks is killed and started again
    SIGHUP    every process is replaced, the workers without a failed request (gateway.rolling);
              another SIGHUP meanwhile: once more
    SIGTERM,  the log's tail is closed: every worker answers 503 and /readyz says no
    SIGINT    ─▶ the sinks take what is left, at most http.drain_deadline_ms, delivery syncs, exits
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
import time
from collections.abc import Iterator, Mapping
from typing import Final

from gateway import _log, books, logs, opening, process, systemd
from gateway.children import HUNG_S, TICK_S, Child, Children, Pulse, how
from gateway.config import Config
from gateway.dead_letters import DeadLetters
from gateway.errors import Exit, PortBusy
from gateway.listeners import Listeners
from gateway.rolling import POLL_S, Roll
from gateway.settings import FILE, MQTT
from gateway.worker import GRACE_S

DOORS: Final = {"granian": "gateway.frontends.granian", "robyn": "gateway.frontends.robyn"}
WORKER_KILL_S: Final = GRACE_S + 1.0
DELIVERY_KILL_S: Final = 5.0
"""After the drain deadline, for the last sync."""

_logger: Final = logging.getLogger(__name__)
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Supervisor:
    """One gateway."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._selector = selectors.DefaultSelector()
        self._signal_fd, self._signaller_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._signal_fd, selectors.EVENT_READ, self._signals)
        self._code: Exit = Exit.OK
        self._ending = False
        self._kill_at_s: dict[Child, float] = {}
        self._roll: Roll | None = None
        self._roll_again = False
        self._looked_s = 0.0
        """When the supervisor last looked around."""
        self._systemd = systemd.Notifier.take()
        self._is_ready = False
        """Everything runs, and the service manager has been told."""
        self._log: _log.Log
        self._children: Children
        self._listeners: Listeners
        self._pulse: Pulse

    def run(self, welcome: str | None = None) -> Exit:
        """Until everything has ended; `welcome` is printed when nothing stands in the way of the
        start. Raises GatewayError when it cannot start."""
        # Until the children run there is nothing to drain: a signal ends the start. (Without a
        # handler, process 1 of a container would not hear it.)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # What SIGHUP asks for a start does anyhow, and recovery may take long.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        process.raise_descriptor_limit()
        sockets = opening.bind(self._config)
        self._log, lock_fd, _ = opening.open_log(self._config)
        self._mark_dead_letters()
        self._pulse = Pulse(self._log)
        self._children = Children(self._log, lock_fd, self._config, self._selector, self._died)
        self._listeners = Listeners(sockets)
        door = DOORS[self._config.http.server]
        for index, listener in enumerate(sockets):
            self._children.all.append(Child(f"worker-{index}", door, index, listener))
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # the pipe tells
        signal.set_wakeup_fd(self._signaller_fd, warn_on_full_buffer=False)
        if welcome:
            print(welcome, flush=True)
        for child in self._children.all:
            self._children.start(child)
        host = (
            f"[{self._config.http.host}]"
            if ":" in self._config.http.host
            else self._config.http.host
        )
        _logger.info(
            "POST events to http://%s:%d/v1/ingest/{device_id}; workers: %d; sinks: %s",
            host,
            self._config.http.port,
            len(sockets),
            "; ".join(_sinks(self._config)),
        )
        self._looked_s = time.monotonic()
        try:
            while self._children.alive or not self._ending:
                self._step()
        finally:
            self._children.signal_all(signal.SIGKILL)
            self._listeners.close_all()
            self._systemd.close()
        _logger.info("ended, exit code %d", self._code)
        for number in _SIGNALS:  # Python takes the handlers away before it exits: a signal that
            signal.signal(number, signal.SIG_IGN)  # comes then would take the exit code's place
        self._log.close()
        return self._code

    def _mark_dead_letters(self) -> None:
        if MQTT not in self._config.sinks:
            return
        try:
            DeadLetters.of(self._config, self._log.identity, MQTT).mark_in(self._log)
        except OSError as error:  # the delivery process tries again, and says what follows from it
            _logger.warning("the dead letters cannot be read: %s", error)

    def _step(self) -> None:
        due = [self._looked_s + (TICK_S if self._roll is None else POLL_S)]
        due += [c.start_at_s for c in self._children.all if c.start_at_s is not None]
        due += self._kill_at_s.values()
        for key, _ in self._selector.select(max(0.0, min(due) - time.monotonic())):
            key.data()
        now = time.monotonic()
        self._children.start_due()
        for child, at_s in list(self._kill_at_s.items()):
            if at_s <= now:
                del self._kill_at_s[child]
                if child.process is not None:
                    _logger.warning("%s does not end; killing it", child.name)
                    child.signal(signal.SIGKILL)
        if now - self._looked_s >= (TICK_S if self._roll is None else POLL_S):
            elapsed_s = min(now - self._looked_s, TICK_S)
            self._looked_s = now
            if not self._ending:
                self._look_around(elapsed_s)
        self._systemd.beat()
        if not self._is_ready and not self._ending and self._roll is None and self._all_serve():
            self._is_ready = True
            http = self._config.http
            self._systemd.ready(f"takes events on {http.host} port {http.port}")

    def _all_serve(self) -> bool:
        return all(c.is_ready for c in self._children.workers) and self._pulse.has_beaten

    def _look_around(self, elapsed_s: float) -> None:
        """`elapsed_s` that this process has lived through have passed."""
        delivery = self._children.delivery
        if delivery.process is not None and self._pulse.tick(elapsed_s):
            _logger.critical(
                "delivery (process %d) has made no progress for %g s, though it runs; killing it"
                " and starting another one: no event is lost, some may be published again",
                delivery.process.pid,
                HUNG_S,
            )
            self._log.counter_add(_log.BLOCK_SUPERVISOR, _log.COUNTERS["killed_hung"])
            delivery.signal(signal.SIGKILL)
            self._pulse.begin()
        if self._roll is not None:
            self._roll.tick(elapsed_s)
            self._after_roll()

    def _died(self, child: Child, code: int) -> None:
        self._kill_at_s.pop(child, None)
        if child.is_delivery:
            self._pulse.begin()
        # SIGBUS: the mapped file was cut short, or a sector of it cannot be read
        if code in (Exit.LOG_FAILED, -signal.SIGBUS) or self._log.state == _log.FAILED:
            self._fail(child, code)
        elif self._ending:
            self._died_while_ending(child, code)
        elif self._roll is not None and self._roll.died(child, code):
            self._after_roll()
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
            _logger.warning("%s %s; starting it again", child.name, how(code))

    # ---- signals ---------------------------------------------------------------------------------

    def _signals(self) -> None:
        try:
            received = os.read(self._signal_fd, 64)
        except BlockingIOError:
            return
        for number in received:
            if number == signal.SIGHUP:
                self._restart()
            elif not self._ending:
                _logger.info(
                    "%s: draining; %d events wait to be delivered, for at most %g s%s",
                    signal.Signals(number).name,
                    books.waiting(self._log),
                    self._config.http.drain_deadline_ms / 1000,
                    "; Ctrl-C again kills" if number == signal.SIGINT else "",
                )
                self._drain()
            elif number == signal.SIGINT:
                _logger.warning("interrupted again: killing everything")
                self._code = Exit.INTERRUPTED
                self._children.signal_all(signal.SIGKILL)

    def _restart(self) -> None:
        if self._ending:
            return
        if self._roll is not None:
            _logger.info("SIGHUP: another rolling restart follows the one that is under way")
            self._roll_again = True
            return
        self._is_ready = False
        self._systemd.reloading("rolling restart")
        _logger.info(
            "SIGHUP: rolling restart of %d workers, then of delivery, with the settings of the"
            " start (certificate files are read again, the configuration is not)",
            len(self._children.workers),
        )
        self._roll = Roll(self._children, self._listeners, self._config)
        self._after_roll()

    def _after_roll(self) -> None:
        if self._roll is not None and self._roll.is_over:
            self._roll = None
            if self._roll_again:
                self._roll_again = False
                self._restart()

    # ---- the end ---------------------------------------------------------------------------------

    def _drain(self) -> None:
        self._ending = True
        self._systemd.stopping(
            f"draining, for at most {self._config.http.drain_deadline_ms / 1000:g} s"
        )
        self._roll = None
        self._log.state = _log.DRAINING
        delivery = self._children.delivery
        self._children.start_none()
        if delivery.process is None:
            # it was about to be: what is in the log wants to be published
            self._children.start(delivery)
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
                    "delivery %s while draining; what is left stays in the log", how(code)
                )
                self._code = Exit.ERROR
            self._end_workers()

    def _end_workers(self) -> None:
        self._listeners.close_all()  # whoever connects from here on is refused at once
        for child in self._children.workers:
            if child.process is not None:
                child.signal(signal.SIGTERM)
                self._kill_at_s[child] = time.monotonic() + WORKER_KILL_S

    def _end(self, code: Exit) -> None:
        """End everything now, without draining."""
        self._ending = True
        self._roll = None
        self._code = code
        self._systemd.stopping(f"ends with exit code {code}")
        if self._log.state == _log.RUNNING:
            self._log.state = _log.DRAINING
        self._children.start_none()
        self._children.delivery.signal(signal.SIGKILL)
        self._end_workers()

    def _fail(self, child: Child, code: int) -> None:
        if self._code == Exit.LOG_FAILED:
            return
        self._log.state = _log.FAILED
        path = self._config.log.path
        if code == -signal.SIGBUS:
            why = f"a part of the file is gone or cannot be read (SIGBUS in {child.name})"
        else:
            told = [c.why_failed for c in self._children.all if c.why_failed]
            why = told[0] if told else "a write did not reach the disk"
        _logger.critical("the log has FAILED: %s: %s", path, why)
        _logger.critical(
            "lost at most: %d bytes that were accepted with ack=enqueue and had not reached the"
            " disk; everything answered durable or sink is safe. Nothing more is accepted (503),"
            " the gateway ends with exit code %d",
            max(0, self._log.tail - self._log.durable),
            Exit.LOG_FAILED,
        )
        _logger.critical(
            "what to do: look at the disk of %s (dmesg | tail, df, smartctl -a), mend it, then"
            " start the gateway again: it recovers from what is on the disk and publishes the rest."
            " A start that ends with exit code %d means that the disk still fails: copy %s away"
            " first",
            path.parent,
            Exit.LOG_UNUSABLE,
            path,
        )
        self._end(Exit.LOG_FAILED)


def _sinks(config: Config) -> Iterator[str]:
    """Where events go, for people."""
    for name, required in zip(config.sinks, config.required, strict=True):
        mqtt, file = config.mqtt, config.file
        where = {
            MQTT: f"mqtt to {mqtt.url}, mode {mqtt.mode}, connections: {mqtt.connections}",
            FILE: f"file in {file.directory}",
        }[name]
        yield where if required else f"{where}, not required"


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
