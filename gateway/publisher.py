"""The publisher: MQTT 5 connections that empty the log into a broker with QoS 1.

The log is the outbox and the compiled window (`gateway._mqtt.Window`) is the only memory of what is
out; `gateway.connection` is the life of one client id, `gateway.mqtt_link` moves bytes between the
window and its socket.

    log ──▶ window ──┬─ devices of connection 0 ──▶ client id <base>-0 ──▶ broker
              ▲      ├─ devices of connection 1 ──▶ client id <base>-1 ──▶ broker
              │      └─ ...
           one cursor, over the contiguous prefix of what all of them had acknowledged

Promises (guarantees 3-5, 12-14, 19)
- Nothing is passed that the broker did not confirm, or that has no durable dead letter.
- A device is published on one connection, in the log's order. A connection that is away or held
  keeps back its own devices only, until what is acknowledged behind them fills the window.
- Nothing polls: a timer a connection for each kind of deadline, at the next one that matters.

Crash story: nothing here outlives the process. The next one starts with clean sessions from the
stored cursor, and passes what is marked in the log as dead.
"""

import asyncio
import functools
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

from backports import zstd

from gateway import _log, mqtt
from gateway._log import Log
from gateway._mqtt import Pack, Window
from gateway.connection import UP, Connection, Stability
from gateway.dead_letters import Shelf
from gateway.errors import ConfigError
from gateway.logs import Seldom
from gateway.mqtt import LinkStatus, MqttSettings, broker_name
from gateway.refusals import Aside
from gateway.retry import ALARM_INTERVAL_S, QUIET_S, Alarms, Backoff
from gateway.topics import parse_topic

LOGGER = logging.getLogger("gateway.publisher")

BATCH_BYTES: Final = 65536
"""A write; larger ones gain nothing (measured), smaller ones cost system calls."""

STABLE_S: Final = 10.0
"""A connection that lived this long was stable: the backoff starts again."""

STABLE_WITH_ACK_S: Final = 3.0
"""The same for a connection on which the broker acknowledged something."""

ZSTD_LEVEL: Final = 3
"""zstd's own default: higher ones cost more time a pack than they save bytes."""

STATUS_REST_S: Final = 0.1
"""The status file follows a pool's single connections at most so often."""


class Publisher:
    """Publishes what is committed in `log` to the broker, and moves the cursor of `sink`.

    Build it on the loop's thread, `await run()` in a task of its own, call `on_committed` on the
    loop whenever the log has moved on, `await drain(...)` and `await close()` at the end. The only
    writer of this sink's cursor.
    """

    def __init__(
        self,
        log: Log,
        sink: int,
        settings: MqttSettings,
        dead_letters: Shelf,
        *,
        on_status: Callable[[LinkStatus], None] | None = None,
        status_file: Path | None = None,
        draw: Callable[[], float] = random.random,
        stable_s: float = STABLE_S,
        stable_with_ack_s: float = STABLE_WITH_ACK_S,
        quiet_s: float = QUIET_S,
    ) -> None:
        """Raises ConfigError when a setting cannot be used (topic, certificate files).

        `dead_letters` takes what the broker will never take; it is called in a thread.

        `on_status` is called at each change of a connection's status, and `status_file` replaced
        at each change of `status`. `draw` gives 0 ... 1 for the jitter.
        """
        broker = settings.broker
        if broker is None:
            raise ConfigError("mqtt.url is not set")
        try:
            topic = parse_topic(settings.topic)
            tls = mqtt.tls_context(settings) if broker.tls else None
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._log = log
        self.name = broker_name(broker)
        self.window = Window(
            log,
            sink,
            topic.prefix.encode(),
            None if topic.suffix is None else topic.suffix.encode(),
            settings.inflight_max,
            BATCH_BYTES,
            connections=settings.connections,
            pack=_pack(settings),
        )
        base = f"gateway-{log.identity:016x}" if settings.client_id is None else settings.client_id
        aside = Aside(log, sink, dead_letters, topic, self.window)
        alarms = Alarms(LOGGER)

        def backoff() -> Backoff:
            return Backoff(settings.backoff_base_ms / 1000, settings.backoff_max_ms / 1000, draw)

        self.connections = [
            Connection(
                self,
                number,
                base if settings.connections == 1 else f"{base}-{number}",
                log,
                self.window,
                settings,
                broker,
                tls,
                aside,
                (backoff(), backoff()),
                alarms,
                Stability(stable_s, stable_with_ack_s, quiet_s),
            )
            for number in range(settings.connections)
        ]
        self.status = LinkStatus(broker=self.name)
        self._on_status, self._status_file = on_status, status_file
        self._status_trouble = Seldom(ALARM_INTERVAL_S)
        self._status_timer: asyncio.TimerHandle | None = None
        self._pumping = False
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._closed = asyncio.Event()
        self._drained: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None

    # ---- for the delivery process ----------------------------------------------------------

    async def run(self) -> None:
        """Publish until `close`. Returns then; never raises on account of the broker."""
        if self._closing:
            return
        self._task = asyncio.current_task()
        running = [asyncio.create_task(connection.run()) for connection in self.connections]
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
            for task in running:
                if task.done():
                    task.result()
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            if not self._closing:
                raise
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self._show_connected(0)
            self._closed.set()

    def on_committed(self) -> None:
        """More may be committed. On the loop's thread; cheap when there is nothing."""
        for connection in self.connections:
            connection.pump()
        self._look_whether_drained()

    @property
    def idle(self) -> bool:
        """Everything that is committed now is done for this sink."""
        return self.window.lsn >= self._log.committed

    @property
    def draining(self) -> bool:
        """Within `drain`."""
        return self._drained is not None

    async def drain(self, deadline_s: float) -> bool:
        """Publish until `idle`, at most `deadline_s` seconds. True: idle."""
        self.window.linger = False
        for connection in self.connections:
            connection.drain()
        self.on_committed()
        if self.idle:
            return True
        self._drained = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(asyncio.shield(self._drained), deadline_s)
        except TimeoutError:
            pass
        finally:
            self._drained = None
        return self.idle

    async def close(self) -> None:
        """Say goodbye to the broker (DISCONNECT 0x00) and end `run`.

        What is in flight is published again by the next process."""
        self._closing = True
        for connection in self.connections:
            connection.goodbye()
        if self._task is not None:
            self._task.cancel()
            await self._closed.wait()
        for connection in self.connections:
            connection.set_status("closed")

    # ---- for the connections ---------------------------------------------------------------

    def moved(self, connection: Connection) -> None:
        """It was read from: the cursor may have moved, others may have room again."""
        self._look_whether_drained()
        if len(self.connections) > 1 and not self._pumping:
            self._pumping = True  # once a round of the loop, however many connections were read
            asyncio.get_running_loop().call_soon(self._pump_all)

    def _pump_all(self) -> None:
        self._pumping = False
        if not self._closing:
            self.on_committed()

    def _look_whether_drained(self) -> None:
        if self._drained is not None and not self._drained.done() and self.idle:
            self._drained.set_result(None)

    def all_up(self) -> bool:
        """Every connection is open."""
        return all(connection.status.state in UP for connection in self.connections)

    def failed(self, error: BaseException) -> None:
        """End `run` with this."""
        self._failure = error
        if self._task is not None:
            self._task.cancel()

    def count(self, counter: str) -> None:
        """One more."""
        self._log.counter_add(_log.BLOCK_DELIVERY, _log.COUNTERS[counter], 1)

    def throttled(self, seconds: float) -> None:
        """Something to publish waited so long for tokens."""
        index = _log.COUNTERS["mqtt_throttled_ns"]
        self._log.counter_add(_log.BLOCK_DELIVERY, index, int(seconds * 1e9))

    def changed(self, connection: Connection) -> None:
        """Its status is another one."""
        parts = tuple(connection.status for connection in self.connections)
        self._show_connected(sum(part.state in UP for part in parts))
        before = self.status
        self.status = parts[0] if len(parts) == 1 else before.pooled(parts)
        if self._on_status is not None:
            self._on_status(connection.status)
        if len(parts) == 1 or self.status.state != before.state:
            self._write_status()
        elif self._status_timer is None:
            loop = asyncio.get_running_loop()
            self._status_timer = loop.call_later(STATUS_REST_S, self._write_status)

    def _show_connected(self, count: int) -> None:
        index = _log.COUNTERS["mqtt_connected"]
        self._log.counter_set(_log.BLOCK_DELIVERY, index, count)

    def _write_status(self) -> None:
        if self._status_timer is not None:
            self._status_timer.cancel()
            self._status_timer = None
        if self._status_file is None:
            return
        try:
            self.status.write(self._status_file)
        except OSError as problem:
            if self._status_trouble() is not None:  # a full disk lasts
                LOGGER.warning("cannot write %s: %s", self._status_file, problem)


def _pack(settings: MqttSettings) -> Pack | None:
    if settings.mode == "event":
        return None
    compress = None
    if settings.pack_compression == "zstd":
        compress = functools.partial(zstd.compress, level=ZSTD_LEVEL)
    return Pack(
        settings.pack_bytes_max,
        settings.pack_linger_ms * 1_000_000,
        settings.pack_format == "array",
        compress,
    )
