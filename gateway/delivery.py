"""The delivery process: the one reader of the log.

    follower thread    log.follow: walks what is committed, fills holes of dead ones (GIL released)
          │ call_soon_threadsafe, at most one call outstanding
          ▼
    event loop         first: dead letters on file are marked in the log (in a thread)
                       Publisher: fills the MQTT window from the log, moves the cursor on PUBACK
                       EmbeddedBroker, when mqtt.url = embedded
    committer thread   log.run_committer: fdatasync, durable and reclaim move (GIL released)

Follower and event loop count their rounds, at least one a second each (beat_follower, beat_loop):
the supervisor ends a delivery process whose rounds stand still.

Nothing is kept here that a SIGKILL could lose: the next delivery process starts from the log.

What ends it

    SIGTERM           the supervisor has closed the log's tail: publish what is left, at most
                      http.drain_deadline_ms; a last sync; exit 0
    a sync failed     final (guarantee 7): the log is FAILED; exit LOG_FAILED, and the supervisor
                      ends everything
    a damaged record  the same: the cursor may not pass it, recovery has to look
    bad settings      exit USAGE or PORT_BUSY
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
from typing import Final

import uvloop

from gateway import _log, dead_letters, metrics, process
from gateway.dead_letters import DeadLetters
from gateway.embedded_broker import EmbeddedBroker
from gateway.errors import ConfigError, Exit, GatewayError, PortBusy
from gateway.mqtt import LinkStatus
from gateway.process import Launch
from gateway.publisher import Publisher

FOLLOW_MS: Final = 1000
REST_US: Final = 300
"""After progress the follower rests so long: under load it wakes the loop some 3000 times a second,
not once an event. An event that comes after a rest is passed on at once; while somebody waits for
an acknowledgement the rest is shorter."""
BEAT_S: Final = 1.0
BEATS_A_LOOK: Final = 5
"""The size of the dead letters is looked up every so many beats: tools change it too."""
EMBEDDED_HOST: Final = "127.0.0.1"

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
        self._dead_letters = DeadLetters.of(launch.config, log.identity, metrics.SINK)
        try:
            self._publisher = Publisher(
                log,
                log.sink(metrics.SINK),
                launch.config.mqtt,
                self._dead_letters,
                on_status=self._on_status,
                status_file=process.mqtt_status_path(launch.config),
            )
        except ValueError as error:  # a topic or a certificate file that cannot be used
            raise ConfigError(str(error)) from error
        self._committer = threading.Thread(target=self._commit, name="committer", daemon=True)
        self._follower = threading.Thread(target=self._follow, name="follower", daemon=True)

    async def run(self) -> Exit:
        """Returns the exit code."""
        self._loop.add_signal_handler(signal.SIGTERM, self._finish, Exit.OK)
        process.can_end()
        broker = await self._start_broker()
        self._committer.start()
        self._follower.start()
        self._beat()
        await asyncio.to_thread(self._mark_dead_letters)
        publishing = asyncio.create_task(self._publisher.run())
        publishing.add_done_callback(self._publisher_ended)
        code = await self._end
        if code == Exit.OK:
            code = await self._drain()
        with contextlib.suppress(Exception):
            await self._publisher.close()
        if broker is not None:
            await broker.close()
        return code

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
        """Publish what is left, then sync once more."""
        until = time.monotonic() + self._config.http.drain_deadline_ms / 1000
        while (left := until - time.monotonic()) > 0 and not self._end_is_failure():
            await self._publisher.drain(min(left, 0.25))
            if self._publisher.idle and self._log.committed == self._log.tail:
                break
            await asyncio.sleep(0.01)
        self._log.stop_committer()
        await asyncio.to_thread(self._committer.join)
        if self._end_is_failure():
            return Exit.LOG_FAILED
        left_over = metrics.books(self._log).waiting
        if left_over:
            _logger.warning(
                "%d events are not published yet; they stay in the log for the next start",
                left_over,
            )
        return Exit.OK

    def _end_is_failure(self) -> bool:
        return self._log.state == _log.FAILED

    def _finish(self, code: Exit) -> None:
        if not self._end.done():
            self._end.set_result(code)

    def _publisher_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() is not None:
            _logger.critical("the publisher failed", exc_info=task.exception())
            self._finish(Exit.ERROR)

    def _on_status(self, status: LinkStatus) -> None:
        if status.state == "held" and (lsn := self._publisher.window.look().corrupt_lsn):
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
            process.tell_failed(error)
            _logger.critical("the log could not be synced; nothing more is accepted", exc_info=True)
            self._loop.call_soon_threadsafe(self._finish, Exit.LOG_FAILED)

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
        self._publisher.on_committed()


async def _run(log: _log.Log, launch: Launch) -> Exit:
    return await Delivery(log, launch).run()


def main() -> None:
    """The delivery process, started by the supervisor."""
    launch = process.begin(sys.argv)
    code: int = Exit.ERROR
    try:
        log = _log.Log.attach(launch.lock_fd, launch.shared_fd)
        for gauge in ("mqtt_connected", "mqtt_in_flight"):  # what a killed predecessor left
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
    sys.stderr.flush()
    os._exit(code)  # the follower waits in the kernel, with nothing to lose


if __name__ == "__main__":
    main()
