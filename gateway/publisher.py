"""The publisher: one MQTT 5 connection that empties the log into a broker with QoS 1.

The log is the outbox and the compiled window (`gateway._mqtt.Window`) is the only memory of what is
out; `gateway.mqtt_link` moves bytes between it and a socket; this module decides what happens when
the broker is away or says no.

    run:  connect ── CONNACK ──▶ connected ──(lost)──▶ wait ──▶ connect ...
             │                       │ ▲                 │
             │ refused, TLS          │ │ gateway.refusals │ the last strike of an event that
             ▼                       ▼ │                 ▼ breaks connections: dead letter first
          wait long, alarm          held

Promises (guarantees 3-5, 12-14, 19)
- Nothing is passed that the broker did not confirm, or that has no durable dead letter.
- An unanswered PUBLISH is never sent again on the same connection (4.4): after `puback_timeout_ms`
  the connection is dropped. A session that the broker still has is resumed (same ids, DUP); else
  publishing starts from the cursor.
- Reconnects wait random(0, min(cap, base * 2^n)); n starts again only after a connection has proved
  stable.
- Nothing polls: one timer a connection, at the next deadline that matters.

The policy is in `gateway.retry`. Crash story: nothing here outlives the process. The next one
starts with a clean session from the stored cursor, and passes what is marked in the log as dead.
"""

import asyncio
import logging
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gateway import _log, mqtt
from gateway._log import Log
from gateway._mqtt import Packet, View, Window
from gateway.dead_letters import Shelf
from gateway.errors import ConfigError, GatewayError
from gateway.logs import Seldom
from gateway.mqtt import Connack, LinkStatus, MqttSettings, broker_name, printable
from gateway.mqtt_link import Link, Terms, connect_failure, connect_refused
from gateway.refusals import FULL, Refusals
from gateway.retry import ALARM_INTERVAL_S, QUIET_S, Alarms, Backoff, Kind, Lost, Suspects
from gateway.topics import parse_topic

LOGGER = logging.getLogger("gateway.publisher")

BATCH_BYTES: Final = 65536
"""A write; larger ones gain nothing (measured), smaller ones cost system calls."""

SESSION_EXPIRY_S: Final = 300
"""How long the broker keeps our session after a drop (3.1.2.11.2): longer than any backoff."""

STABLE_S: Final = 10.0
"""A connection that lived this long was stable: the backoff starts again."""

STABLE_WITH_ACK_S: Final = 3.0
"""The same for a connection on which the broker acknowledged something."""


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

        `on_status` is called, and `status_file` replaced, at each change of `status`. `draw` gives
        0 ... 1 for the jitter.
        """
        broker = settings.broker
        if broker is None:
            raise ConfigError("mqtt.url is not set")
        try:
            topic = parse_topic(settings.topic)
            self._tls = mqtt.tls_context(settings) if broker.tls else None
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._log = log
        self._settings = settings
        self._broker = broker
        self.name = broker_name(broker)
        self.window = Window(
            log,
            sink,
            topic.prefix.encode(),
            None if topic.suffix is None else topic.suffix.encode(),
            settings.inflight_max,
            BATCH_BYTES,
        )
        self.client_id = (
            f"gateway-{log.identity:016x}" if settings.client_id is None else settings.client_id
        )
        cap_s = settings.backoff_max_ms / 1000
        self._backoff = Backoff(settings.backoff_base_ms / 1000, cap_s, draw)
        self._alarms = Alarms(LOGGER)
        self._refusals = Refusals(
            self,
            log,
            sink,
            self.window,
            dead_letters,
            topic,
            Backoff(settings.backoff_base_ms / 1000, cap_s, draw),
            self._alarms,
        )
        self._suspects = Suspects(settings.poison_attempts, quiet_s)
        self._quiet_s, self._acks_at_poison = 0.0, -1
        self._stable_s, self._stable_with_ack_s = stable_s, stable_with_ack_s
        self.status = LinkStatus(broker=self.name)
        self._on_status, self._status_file = on_status, status_file
        self._status_trouble = Seldom(ALARM_INTERVAL_S)
        self._connection: Link | None = None
        self._resumable = False
        self._clean_start = True
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._closed = asyncio.Event()
        self._drained: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None
        self._set_status("starting")

    # ---- for the delivery process ----------------------------------------------------------

    async def run(self) -> None:
        """Publish until `close`. Returns then; never raises on account of the broker."""
        if self._closing:
            return
        self._task = asyncio.current_task()
        try:
            while True:
                started = time.monotonic()
                acks = self.window.look().acks
                self._quiet_s = 0.0
                try:
                    await self._connect_once()
                except Lost as lost:
                    ended = lost
                self._count("mqtt_connected", 0)
                acked = self.window.look().acks > acks
                wait_s = self._after(ended, time.monotonic() - started, acked)
                if await self._set_poison_aside(ended, acked):
                    wait_s = self._backoff.next_s()
                await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            if not self._closing:
                raise
        finally:
            self._count("mqtt_connected", 0)
            await self._refusals.close()
            self._closed.set()

    def on_committed(self) -> None:
        """More may be committed. On the loop's thread; cheap when there is nothing."""
        if self._connection is not None:
            self._connection.pump()
            self.moved()

    @property
    def idle(self) -> bool:
        """Everything that is committed now is done for this sink."""
        return self.window.lsn >= self._log.committed

    async def drain(self, deadline_s: float) -> bool:
        """Publish until `idle`, at most `deadline_s` seconds. True: idle."""
        if self._connection is not None and self.status.state == "connected":
            self._set_status("draining")
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
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.goodbye(0x00)
        if self._task is not None:
            self._task.cancel()
            await self._closed.wait()
        self._set_status("closed")

    # ---- connecting ------------------------------------------------------------------------

    async def _connect_once(self) -> None:
        """One connection from CONNECT to its end. Always raises Lost."""
        self._set_status("connecting")
        loop = asyncio.get_running_loop()
        try:
            password = self._settings.read_password()
        except GatewayError as error:
            raise Lost(str(error), Kind.REFUSED) from None
        self._clean_start = not self._resumable or self.window.look().refused > 0
        self._resumable = False
        self.window.connect()
        connection = Link(self, self.window, self._settings)
        timeout_s = self._settings.connect_timeout_ms / 1000
        try:
            async with asyncio.timeout(timeout_s):
                await loop.create_connection(
                    lambda: connection,
                    self._broker.host,
                    self._broker.port,
                    ssl=self._tls,
                    server_hostname=(self._settings.server_name or self._broker.host)
                    if self._tls is not None
                    else None,
                )
                connection.write(
                    mqtt.connect_packet(
                        self.client_id,
                        clean_start=self._clean_start,
                        keep_alive_s=self._settings.keep_alive_s,
                        session_expiry_s=SESSION_EXPIRY_S,
                        username=self._settings.username,
                        password=password,
                    )
                )
                await connection.accepted
        except BaseException as error:
            connection.accepted.cancel()  # nobody asks for it any more
            connection.abort()
            if isinstance(error, (Lost, asyncio.CancelledError)):
                raise
            if isinstance(error, TimeoutError):
                stage = "CONNACK" if connection.made else "connection"
                limit_ms = self._settings.connect_timeout_ms
                raise Lost(f"no {stage} within mqtt.connect_timeout_ms = {limit_ms}") from None
            if isinstance(error, OSError):
                raise connect_failure(error, self._broker, self._settings) from None
            if isinstance(error, ValueError | struct.error):
                # a name that cannot be looked up, a password that no CONNECT can carry ...
                raise Lost(
                    f"cannot connect with these settings: {printable(str(error))}; check mqtt.url,"
                    " mqtt.server_name, mqtt.username and mqtt.password_file",
                    Kind.REFUSED,
                ) from None
            raise
        try:
            raise await connection.gone
        finally:
            self._connection = None
            connection.abort()

    def accept(self, link: Link, connack: Connack) -> Terms:
        """CONNACK: obey it, or raise Lost."""
        if connack.mqtt_311 or connack.reason in (0x01, 0x84):
            raise Lost(
                f"the broker answered {connack} in the manner of MQTT 3.1.1: the gateway needs a"
                " broker that speaks MQTT 5, since 3.1.1 cannot tell a refused message from a"
                " delivered one",
                Kind.REFUSED,
            )
        if connack.reason:
            raise connect_refused(connack)
        if connack.session_present and self._clean_start:
            raise Lost(
                "protocol error: CONNACK has session present though a clean one was asked for"
                " (3.2.2.1.1)",
                new_session=True,
            )
        if connack.qos_max < 1:
            raise Lost(
                "the broker allows QoS 0 only (Maximum QoS 0): it cannot acknowledge messages, so"
                " none are sent; allow QoS 1 there",
                Kind.REFUSED,
            )
        if connack.client_id is not None:
            self.client_id = connack.client_id
        self._resumable = connack.session_expiry_s is None or connack.session_expiry_s > 0
        self._refusals.connected()
        self._quiet_s = self._suspects.quiet_s(self.window.lsn)
        self.window.open(connack.session_present, connack.receive_maximum, connack.packet_bytes_max)
        keep_alive_s = (
            self._settings.keep_alive_s if connack.keep_alive_s is None else connack.keep_alive_s
        )
        self._count("mqtt_connects", 1)
        self._count("mqtt_connected", 1)
        limit = min(connack.receive_maximum, self._settings.inflight_max)
        LOGGER.info(
            "connected to %s as %s: %d in flight at most, packets of %s, keep-alive %d s,"
            " session %s",
            self.name,
            printable(self.client_id),
            limit,
            f"up to {connack.packet_bytes_max} bytes" if connack.packet_bytes_max else "any size",
            keep_alive_s,
            "resumed" if connack.session_present else "new",
        )
        self._connection = link
        self._set_status("connected" if self._drained is None else "draining")
        return Terms(keep_alive_s, self._quiet_s)

    def _after(self, lost: Lost, lived_s: float, acked: bool) -> float:
        """Log the loss, set the status, and say how many seconds to wait."""
        was_connected = self.status.state in ("connected", "held", FULL, "draining")
        self._count("mqtt_disconnects" if was_connected else "mqtt_connect_failures", 1)
        if lost.new_session or lost.kind is not Kind.AWAY:
            self._resumable = False
        if was_connected and lived_s >= (self._stable_with_ack_s if acked else self._stable_s):
            self._backoff.reset()
            self._alarms.clear()
        long = lost.kind is not Kind.AWAY
        wait_s = self._backoff.long_s() if long else self._backoff.next_s()
        text = f"{self.name}: {lost.reason}"
        self._alarms.say(
            logging.ERROR if long else logging.WARNING,
            text,
            f"events stay in the log; next attempt in {wait_s:.1f} s",
        )
        self._set_status(lost.kind.value, text)
        return wait_s

    async def _set_poison_aside(self, lost: Lost, acked: bool) -> bool:
        """What was in flight when the broker ended the connection is sent one by one from here on.
        True: an event had its last strike, and has a dead letter now."""
        view = self.window.look()
        if not lost.blames_in_flight:
            return False
        proved = acked or self._quiet_s > 0
        poison = self._suspects.connection_ended(view, time.monotonic_ns(), proved)
        if view.in_flight:
            self.window.probe(self._suspects.until_lsn - 1)
        if poison is None:
            return False
        await self._refusals.poison(poison, lost.code, self._suspects.strikes)
        self._resumable = False  # a session that is resumed wants it again (4.4)
        if view.acks > self._acks_at_poison:  # else it may be the broker that takes nothing
            self._backoff.reset()
        self._acks_at_poison = view.acks
        return True

    # ---- for the connection ----------------------------------------------------------------

    def refused(self, packet: Packet) -> None:
        """A PUBACK with an error. The window holds by itself."""
        self._refusals.answered(packet)

    def check_held(self, view: View) -> None:
        """The window holds."""
        self._refusals.check(view)

    def moved(self) -> None:
        """The cursor may have moved."""
        if self._drained is not None and not self._drained.done() and self.idle:
            self._drained.set_result(None)
        state = self.status.state
        if state not in ("held", FULL) or self.window.held:
            return
        if state == FULL or self.window.lsn > self._refusals.lsn:
            LOGGER.info("%s: publishing goes on at lsn %d", self.name, self.window.lsn)
            self._set_status("connected" if self._drained is None else "draining")

    # ---- for what holds the window ---------------------------------------------------------

    def held(self, state: str, error: str) -> None:
        """Publishing waits."""
        self._set_status(state, error)

    def passed(self) -> None:
        """Dead letters may have moved the cursor and opened the window."""
        self.on_committed()

    def failed(self, error: BaseException) -> None:
        """End `run` with this."""
        self._failure = error
        if self._task is not None:
            self._task.cancel()

    def _count(self, counter: str, value: int) -> None:
        index = _log.COUNTERS[counter]
        if counter == "mqtt_connected":
            self._log.counter_set(_log.BLOCK_DELIVERY, index, value)
        else:
            self._log.counter_add(_log.BLOCK_DELIVERY, index, value)

    def _set_status(self, state: str, error: str | None = None) -> None:
        status = self.status.to(state, error)
        if status == self.status:
            return
        self.status = status
        if self._on_status is not None:
            self._on_status(status)
        if self._status_file is not None:
            try:
                status.write(self._status_file)
            except OSError as problem:
                if self._status_trouble() is not None:  # a full disk lasts
                    LOGGER.warning("cannot write %s: %s", self._status_file, problem)
