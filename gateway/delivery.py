"""The delivery process: takes what is in the log to the sinks.

    follower thread    log.follow: walks what is committed, fills holes of dead ones (GIL released)
          │ call_soon_threadsafe, at most one call outstanding
          ▼
    event loop         first: dead letters on file are marked in the log (in a thread)
                       MqttSink: fills the MQTT window from the log, moves its cursor on PUBACK
                       EmbeddedBroker, when mqtt.url = embedded
    file sink's thread FileSink: lines into files, fsync, moves its cursor
    committer thread   log.run_committer: fdatasync, durable and reclaim move (GIL released)

Follower and event loop count their rounds, at least one a second each (beat_follower, beat_loop):
the supervisor ends a delivery process whose rounds stand still.

Each sink has its own cursor, and none waits for another: one that is away, held or stuck keeps back
its own cursor only; one that fails in a way that nobody foresaw is made anew, and the others go on.

Nothing is kept here that a SIGKILL could lose: the next delivery process starts from the log.

What ends it

    SIGTERM           the supervisor has closed the log's tail: every sink takes what is left, at
                      most http.drain_deadline_ms; a last sync; exit 0
    a sync failed     final (guarantee 7): the log is FAILED; exit LOG_FAILED, and the supervisor
                      ends everything
    a damaged record  the same: the cursor may not pass it, recovery has to look
    bad settings      exit USAGE or PORT_BUSY
"""

import asyncio
import contextlib
import errno
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

import uvloop

from gateway import _log, books, dead_letters, process
from gateway.dead_letters import DeadLetters
from gateway.embedded_broker import EmbeddedBroker
from gateway.errors import ConfigError, Exit, GatewayError, PortBusy
from gateway.process import Launch
from gateway.settings import FILE, MQTT
from gateway.sinks import Sink, SinkStatus
from gateway.sinks.file import FileSink
from gateway.sinks.mqtt import MqttSink

FOLLOW_MS: Final = 1000
REST_US: Final = 300
"""After progress the follower rests so long: under load it wakes the loop some 3000 times a second,
not once an event. An event that comes after a rest is passed on at once; while somebody waits for
an acknowledgement the rest is shorter."""
BEAT_S: Final = 1.0
BEATS_A_LOOK: Final = 5
"""The size of the dead letters is looked up every so many beats: tools change it too."""
EMBEDDED_HOST: Final = "127.0.0.1"
AGAIN_S: Final = (1.0, 60.0)
"""A sink that failed is made anew after this, then after twice as long, up to the second number."""
CLOSE_S: Final = 2.0
"""The longest that a sink may take to close: a disk that hangs must not keep the others from their
last sync."""

_logger: Final = logging.getLogger(__name__)


class Delivery:
    """Runs until told to drain, or until something is final."""

    def __init__(self, log: _log.Log, launch: Launch) -> None:
        self._log = log
        self._config = launch.config
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[Exit] = self._loop.create_future()
        self._told = False
        self._beats = self._dropped = 0
        self._dead_letters = DeadLetters.of(launch.config, log.identity, MQTT)
        self._closing = False
        make: dict[str, Callable[[], Sink]] = {MQTT: self._mqtt, FILE: self._file}
        self._make = {name: make[name] for name in launch.config.sinks}
        try:
            self._sinks = {name: make() for name, make in self._make.items()}
        except ValueError as error:  # a topic or a certificate file that cannot be used
            raise ConfigError(str(error)) from error
        self._committer = threading.Thread(target=self._commit, name="committer", daemon=True)
        self._follower = threading.Thread(target=self._follow, name="follower", daemon=True)

    def _mqtt(self) -> Sink:
        return MqttSink(
            self._log,
            self._log.sink(MQTT),
            self._config.mqtt,
            self._dead_letters,
            on_status=self._on_status,
            status_file=process.status_path(self._config, MQTT),
        )

    def _file(self) -> Sink:
        return FileSink(
            self._log,
            self._log.sink(FILE),
            self._config.file,
            on_status=self._on_status,
            status_file=process.status_path(self._config, FILE),
        )

    async def run(self) -> Exit:
        """Returns the exit code."""
        self._loop.add_signal_handler(signal.SIGTERM, self._finish, Exit.OK)
        process.can_end()
        broker = await self._start_broker()
        self._committer.start()
        self._follower.start()
        self._beat()
        tasks = [asyncio.create_task(self._keep(name)) for name in self._sinks if name != MQTT]
        if MQTT in self._sinks:
            await asyncio.to_thread(self._mark_dead_letters)
            tasks.append(asyncio.create_task(self._keep(MQTT)))
        code = await self._end
        if code == Exit.OK:
            code = await self._drain()
        self._closing = True
        await self._close()
        if code == Exit.OK:
            code = await self._last_sync()
        for task in tasks:
            task.cancel()
        if broker is not None:
            await broker.close()
        return code

    async def _keep(self, name: str) -> None:
        """Run the sink until it is closed. What nobody foresaw ends this process when there is no
        other sink: the next one begins from nothing but the log."""
        again_s, again_max_s = AGAIN_S
        while not self._closing:
            try:
                await self._sinks[name].run()
                return
            except Exception:
                if len(self._sinks) == 1:
                    _logger.critical("the sink %s failed", name, exc_info=True)
                    self._finish(Exit.ERROR)
                    return
                _logger.critical(
                    "the sink %s failed; the others go on, and it begins again in %g s",
                    name,
                    again_s,
                    exc_info=True,
                )
            await asyncio.sleep(again_s)
            again_s = min(2 * again_s, again_max_s)
            if not self._closing:
                self._sinks[name] = self._make[name]()

    async def _close(self) -> None:
        closing = [asyncio.create_task(sink.close()) for sink in self._sinks.values()]
        if closing:
            await asyncio.wait(closing, timeout=CLOSE_S)

    async def _start_broker(self) -> EmbeddedBroker | None:
        if not (self._config.mqtt.broker and self._config.mqtt.broker.embedded):
            return None
        port = self._config.mqtt.embedded_port
        try:
            return await EmbeddedBroker(EMBEDDED_HOST, port).start()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortBusy(EMBEDDED_HOST, port, "mqtt.embedded_port") from None
            raise

    async def _drain(self) -> Exit:
        """Every sink takes what is left. What is committed is synced at once, not at the next
        interval: there are sinks that read no further than that."""
        until = time.monotonic() + self._config.http.drain_deadline_ms / 1000
        self._log.stop_committer()
        await asyncio.to_thread(self._committer.join)
        while (left := until - time.monotonic()) > 0 and not self._end_is_failure():
            if self._log.durable < self._log.committed:
                await self._sync()
            sinks = list(self._sinks.values())
            if sinks:
                draining = [asyncio.create_task(sink.drain(min(left, 0.25))) for sink in sinks]
                await asyncio.wait(draining, timeout=left)
            if all(sink.idle for sink in sinks) and self._log.committed == self._log.tail:
                break
            await asyncio.sleep(0.01)
        return Exit.LOG_FAILED if self._end_is_failure() else Exit.OK

    async def _sync(self) -> None:
        try:
            await asyncio.to_thread(self._log.sync)
        except _log.LogError as error:
            self._sync_failed(error)

    async def _last_sync(self) -> Exit:
        """The sinks move their cursors no more."""
        await self._sync()
        if self._end_is_failure():
            return Exit.LOG_FAILED
        for sink, name in books.sinks(self._log):
            if waiting := books.books(self._log, sink).waiting:
                _logger.warning(
                    "%d events are not %s yet; they stay in the log for the next start",
                    waiting,
                    "published" if name == MQTT else "in a file",
                )
        return Exit.OK

    def _end_is_failure(self) -> bool:
        return self._log.state == _log.FAILED

    def _finish(self, code: Exit) -> None:
        if not self._end.done():
            self._end.set_result(code)

    def _on_status(self, status: SinkStatus) -> None:
        if lsn := status.corrupt_lsn:
            process.tell_failed(f"a record that was accepted is damaged at lsn {lsn}")
            _logger.critical("the log is damaged at lsn %d; recovery has to look at it", lsn)
            self._log.state = _log.FAILED
            self._finish(Exit.LOG_FAILED)

    def _mark_dead_letters(self) -> None:
        try:
            marked = self._dead_letters.mark_in(self._log)
        except OSError as error:
            _logger.error(
                "the dead letters in %s cannot be read (%s): events that are there may be published"
                " again; look at the disk, and at the owner of the folder",
                self._dead_letters.folder,
                error.strerror or error,
            )
        else:
            if marked:
                _logger.info("%d events in the log have a dead letter", marked)

    def _beat(self) -> None:
        """Once a second."""
        self._count("beat_loop")
        if self._beats % BEATS_A_LOOK == 0:
            with contextlib.suppress(OSError):
                self._log.counter_set(
                    _log.BLOCK_DELIVERY,
                    _log.COUNTERS["dead_letter_bytes"],
                    dead_letters.total_bytes(self._dead_letters.folder),
                )
        self._count("dead_letters_dropped", self._dead_letters.dropped - self._dropped)
        self._dropped = self._dead_letters.dropped
        self._beats += 1
        self._loop.call_later(BEAT_S, self._beat)

    def _count(self, counter: str, n: int = 1) -> None:
        self._log.counter_add(_log.BLOCK_DELIVERY, _log.COUNTERS[counter], n)

    # ---- threads ---------------------------------------------------------------------------------

    def _commit(self) -> None:
        try:
            self._log.run_committer(self._config.log.commit_interval_ms)
        except BaseException as error:
            self._sync_failed(error)
            self._loop.call_soon_threadsafe(self._finish, Exit.LOG_FAILED)

    def _sync_failed(self, error: BaseException) -> None:
        process.tell_failed(error)
        _logger.critical("the log could not be synced; nothing more is accepted", exc_info=error)

    def _follow(self) -> None:
        try:
            seen = 0
            while True:
                committed = self._log.follow(seen, FOLLOW_MS)
                self._count("beat_follower")
                if committed != seen:
                    seen = committed
                    if not self._told:
                        self._told = True
                        self._loop.call_soon_threadsafe(self._tell)
                    self._log.rest(REST_US)
        except BaseException:
            _logger.critical("the follower failed", exc_info=True)
            with contextlib.suppress(RuntimeError):  # the loop may be closed
                self._loop.call_soon_threadsafe(self._finish, Exit.ERROR)

    def _tell(self) -> None:
        self._told = False  # before the look: what comes later is told again
        for sink in self._sinks.values():
            sink.on_committed()


async def _run(log: _log.Log, launch: Launch) -> Exit:
    return await Delivery(log, launch).run()


def main() -> None:
    """The delivery process, started by the supervisor."""
    launch = process.begin(sys.argv)
    code: int = Exit.ERROR
    try:
        log = _log.Log.attach(launch.lock_fd, launch.shared_fd)
        for gauge in (
            "mqtt_connected",
            "mqtt_in_flight",
            "file_up",
        ):  # what a killed predecessor left
            log.counter_set(_log.BLOCK_DELIVERY, _log.COUNTERS[gauge], 0)
        try:
            log.takeover()
        except _log.LogError as error:
            process.tell_failed(error)
            _logger.critical("the log cannot be taken over: an earlier write failed", exc_info=True)
            code = Exit.LOG_FAILED
        else:
            code = uvloop.run(_run(log, launch))
    except _log.NotALog as error:  # cut short or replaced under a running gateway
        process.tell_failed(error)
        code = Exit.LOG_FAILED
    except GatewayError as error:
        _logger.critical("%s", error)
        code = error.exit_code
    except Exception:
        _logger.critical("the delivery process failed", exc_info=True)
    process.end(code)


if __name__ == "__main__":
    main()
