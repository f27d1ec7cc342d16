"""The publisher: one MQTT 5 connection that empties the log into a broker with QoS 1.

The log is the outbox and the compiled window (`gateway._mqtt.Window`) is the only memory of what is
out; `gateway.mqtt_link` moves bytes between it and a socket; this module decides what happens when
the broker is away or says no.

    run:  connect ── CONNACK ──▶ connected ──(lost)──▶ wait ──▶ connect ...
             │                       │ ▲
             │ refused, TLS          │ │ a record was refused: stop, let the rest come home,
             ▼                       ▼ │ wait, start over from the cursor one by one
          wait long, alarm          held

Promises (guarantees 3-5, 12, 13, 19)
- Nothing is passed that the broker did not confirm. A refused record holds the cursor, with an
  alarm, until it is accepted; nothing is dropped.
- An unanswered PUBLISH is never sent again on the same connection (4.4): after `puback_timeout_ms`
  the connection is dropped. A session that the broker still has is resumed (same ids, DUP); else
  publishing starts from the cursor.
- Reconnects wait random(0, min(cap, base * 2^n)); n starts again only after a connection has proved
  stable.
- Nothing polls: one timer a connection, at the next deadline that matters.

Crash story: nothing here outlives the process. The next one starts with a clean session from the
stored cursor.
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
from gateway.errors import ConfigError, GatewayError
from gateway.mqtt import Connack, LinkStatus, MqttSettings, broker_name, printable, reason_name
from gateway.mqtt_link import Kind, Link, Lost, connect_failure, connect_refused
from gateway.settings import parse_topic

LOGGER = logging.getLogger("gateway.publisher")

BATCH_BYTES: Final = 65536
"""A write; larger ones gain nothing (measured), smaller ones cost system calls."""

SESSION_EXPIRY_S: Final = 300
"""How long the broker keeps our session after a drop (3.1.2.11.2): longer than any backoff."""

STABLE_S: Final = 10.0
"""A connection that lived this long was stable: the backoff starts again."""

STABLE_WITH_ACK_S: Final = 3.0
"""The same for a connection on which the broker acknowledged something."""

ALARM_INTERVAL_S: Final = 60.0
"""The same alarm is logged again after this."""


class Backoff:
    """Full jitter (Brooker, "Exponential Backoff and Jitter"): random(0, min(cap, base * 2^n))."""

    def __init__(self, base_s: float, cap_s: float, draw: Callable[[], float]) -> None:
        self._base_s, self._cap_s, self._draw = base_s, cap_s, draw
        self.attempts = 0

    def next_s(self) -> float:
        """Seconds to wait before the next attempt."""
        bound = min(self._cap_s, self._base_s * 2.0 ** min(self.attempts, 60))
        self.attempts += 1
        return bound * self._draw()

    def long_s(self) -> float:
        """The same for what time alone does not mend: between half the cap and the cap."""
        self.attempts += 1
        return self._cap_s * (0.5 + 0.5 * self._draw())

    def reset(self) -> None:
        """The other side has proved well."""
        self.attempts = 0


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
        *,
        on_status: Callable[[LinkStatus], None] | None = None,
        status_file: Path | None = None,
        draw: Callable[[], float] = random.random,
        stable_s: float = STABLE_S,
        stable_with_ack_s: float = STABLE_WITH_ACK_S,
    ) -> None:
        """Raises ConfigError when a setting cannot be used (topic, certificate files).

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
        self._topic = topic
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
        self._patience = Backoff(settings.backoff_base_ms / 1000, cap_s, draw)
        self._stable_s, self._stable_with_ack_s = stable_s, stable_with_ack_s
        self.status = LinkStatus(broker=self.name)
        self._on_status, self._status_file = on_status, status_file
        self._connection: Link | None = None
        self._resumable = False
        self._clean_start = True
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._closed = asyncio.Event()
        self._drained: asyncio.Future[None] | None = None
        self._alarms: dict[str, float] = {}
        """When each text was logged, CLOCK_MONOTONIC seconds; those of the last minute."""
        self._held_lsn = -1
        self._retry: asyncio.TimerHandle | None = None
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
                try:
                    await self._connect_once()
                except Lost as lost:
                    wait_s = self._after(lost, time.monotonic() - started, acks)
                self._count("mqtt_connected", 0)
                await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            if not self._closing:
                raise
        finally:
            self._count("mqtt_connected", 0)
            self._cancel_retry()
            self._closed.set()

    def on_committed(self) -> None:
        """More may be committed. On the loop's thread; cheap when there is nothing."""
        if self._connection is not None:
            self._connection.pump()

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
        held = self.window.refusal() is not None
        self._clean_start = not self._resumable or held
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

    def accept(self, link: Link, connack: Connack) -> int:
        """CONNACK: obey it and return the keep-alive in seconds, or raise Lost."""
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
                suspect=True,
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
        self._cancel_retry()
        self.window.open(connack.session_present, connack.receive_maximum, connack.packet_bytes_max)
        keep_alive_s = (
            self._settings.keep_alive_s if connack.keep_alive_s is None else connack.keep_alive_s
        )
        self._count("mqtt_connects", 1)
        self._count("mqtt_connected", 1)
        limit = min(connack.receive_maximum, self._settings.inflight_max)
        LOGGER.info(
            "connected to %s as %s: %d in flight at most, packets up to %s bytes, keep-alive %d s,"
            " session %s",
            self.name,
            printable(self.client_id),
            limit,
            connack.packet_bytes_max or "any",
            keep_alive_s,
            "resumed" if connack.session_present else "new",
        )
        self._connection = link
        self._set_status("connected" if self._drained is None else "draining")
        return keep_alive_s

    def _after(self, lost: Lost, lived_s: float, acks_before: int) -> float:
        """Log the loss, set the status, and say how many seconds to wait."""
        was_connected = self.status.state in ("connected", "held", "draining")
        self._count("mqtt_disconnects" if was_connected else "mqtt_connect_failures", 1)
        if lost.suspect or lost.kind is not Kind.AWAY:
            self._resumable = False
        acked = self.window.look().acks > acks_before
        if was_connected and lived_s >= (self._stable_with_ack_s if acked else self._stable_s):
            self._backoff.reset()
            self._alarms.clear()
        long = lost.kind is not Kind.AWAY
        wait_s = self._backoff.long_s() if long else self._backoff.next_s()
        text = f"{self.name}: {lost.reason}"
        self._alarm(
            logging.ERROR if long else logging.WARNING,
            text,
            f"events stay in the log; next attempt in {wait_s:.1f} s",
        )
        self._set_status(lost.kind.value, text)
        return wait_s

    # ---- a record that the broker refuses --------------------------------------------------

    def refused(self, packet: Packet) -> None:
        """A PUBACK with an error. The window holds by itself; this says so."""
        assert packet.lsn is not None
        words = printable(mqtt.puback_reason_string(packet.body))
        self._say_held(
            packet.lsn, packet.reason, f"the broker refuses {{}}: {{}} ({words})" if words else ""
        )

    def _say_held(self, lsn: int, reason: int, form: str = "") -> None:
        record = self._log.read(lsn)
        topic = self._topic.fill(record.device_id) if record is not None else "?"
        form = form or "the broker refuses {}: {}"
        text = f"{self.name}: " + form.format(
            f"the event at lsn {lsn}, topic {printable(topic)}", reason_name(reason)
        )
        if reason in mqtt.TRANSIENT_REASONS:
            self._alarm(logging.WARNING, text, "publishing waits and tries again")
        else:
            self._alarm(
                logging.ERROR,
                text,
                "publishing stops here and tries again, nothing is dropped: allow this topic,"
                " payload and size at the broker",
            )
        self._set_status("held", text)

    def check_held(self, view: View) -> None:
        """The window holds: once nothing is in flight, wait and start over from the cursor."""
        if view.in_flight or self._retry is not None:
            return
        # Dead letters will come in here: a refusal for good gets a durable one, then
        # window.dead_letter(lsn) lets the cursor pass it.
        refusal = self.window.refusal()
        if refusal is not None:
            lsn = refusal.lsn
            if not refusal.by_broker:
                self._say_held(
                    lsn,
                    refusal.reason,
                    f"cannot publish {{}}: {{}} (a packet of {refusal.bytes} bytes)",
                )
        else:
            lsn = view.corrupt_lsn
            text = f"the log is corrupt at lsn {lsn}: nothing behind it is published"
            self._alarm(logging.ERROR, text, "run: gateway log verify")
            self._set_status("held", text)
        if lsn != self._held_lsn:
            self._held_lsn = lsn
            self._patience.reset()
        self._retry = asyncio.get_running_loop().call_later(
            self._patience.next_s(), self._try_again
        )

    def _try_again(self) -> None:
        self._retry = None
        if self._connection is not None and self.window.start_over():
            self._connection.pump()

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    # ---- for the connection ----------------------------------------------------------------

    def moved(self) -> None:
        """PUBACKs came in."""
        if self._drained is not None and not self._drained.done() and self.idle:
            self._drained.set_result(None)
        if (
            self.status.state == "held"
            and not self.window.held
            and self.window.lsn > self._held_lsn
        ):
            LOGGER.info("%s: the event at lsn %d is accepted now", self.name, self._held_lsn)
            self._set_status("connected")

    def _count(self, counter: str, value: int) -> None:
        index = _log.COUNTERS[counter]
        if counter == "mqtt_connected":
            self._log.counter_set(_log.BLOCK_DELIVERY, index, value)
        else:
            self._log.counter_add(_log.BLOCK_DELIVERY, index, value)

    def _alarm(self, level: int, text: str, next_step: str) -> None:
        """Log, but the same text at most once a minute, also when others come between."""
        now_s = time.monotonic()
        self._alarms = {t: at for t, at in self._alarms.items() if now_s - at < ALARM_INTERVAL_S}
        if text in self._alarms:
            level = logging.DEBUG
        else:
            self._alarms[text] = now_s
        LOGGER.log(level, "%s; %s", text, next_step)

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
                LOGGER.warning("cannot write %s: %s", self._status_file, problem)
