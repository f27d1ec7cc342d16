"""One connection of the pool: a client id, its session, and what happens when the broker is away or
says no.

    run:  connect ── CONNACK ──▶ connected ──(lost)──▶ wait ──▶ connect ...
             │                       │ ▲                 │
             │ refused, TLS          │ │ gateway.refusals │ the last strike of an event that
             ▼                       ▼ │                 ▼ breaks connections: dead letter first
          wait long, alarm          held

Each has its own backoff, session, suspects, deadlines and token buckets: what the broker does to
one is not held against the others, and the devices of one that is away wait alone.

- An unanswered PUBLISH is never sent again on the same connection (4.4): after `puback_timeout_ms`
  the connection is dropped. A session that the broker still has is resumed (same ids, DUP); else
  publishing starts from the cursor.
- Reconnects wait random(0, min(cap, base * 2^n)); n starts again only after a connection has proved
  stable.
"""

import asyncio
import logging
import ssl
import struct
import time
from dataclasses import replace
from typing import Final, NamedTuple, Protocol

from gateway import mqtt
from gateway._log import Log
from gateway._mqtt import Packet, View, Window
from gateway.errors import GatewayError
from gateway.mqtt import Broker, Connack, LinkStatus, MqttSettings, printable
from gateway.mqtt_link import Link, Terms, connect_failure, connect_refused
from gateway.rates import Limits
from gateway.refusals import FULL, Aside, Refusals
from gateway.retry import Alarms, Backoff, Kind, Lost, Suspects

LOGGER = logging.getLogger("gateway.publisher")

SESSION_EXPIRY_S: Final = 300
"""How long the broker keeps our session after a drop (3.1.2.11.2): longer than any backoff."""

UP: Final = ("connected", "held", FULL, "draining")
"""States that only an open connection has."""


class Stability(NamedTuple):
    """When a connection has proved well, in seconds."""

    alone_s: float
    """It lived so long."""
    with_ack_s: float
    """It lived so long, and the broker acknowledged something."""
    quiet_s: float
    """It stood so long with nothing sent: its end may be blamed on a suspect."""


class Pool(Protocol):
    """What a connection asks of the publisher."""

    @property
    def draining(self) -> bool: ...
    def changed(self, connection: "Connection") -> None:
        """Its status is another one."""

    def moved(self, connection: "Connection") -> None:
        """It was read from: the cursor may have moved, others may have room again."""

    def all_up(self) -> bool:
        """Every connection is open."""

    def count(self, counter: str) -> None:
        """One more."""

    def throttled(self, seconds: float) -> None:
        """Something to publish waited so long for tokens."""

    def failed(self, error: BaseException) -> None:
        """What can never happen did: end."""


class Connection:
    """Publishes the devices that the window gives to connection `number`. On the loop's thread."""

    def __init__(
        self,
        pool: Pool,
        number: int,
        client_id: str,
        log: Log,
        window: Window,
        settings: MqttSettings,
        broker: Broker,
        tls: ssl.SSLContext | None,
        aside: Aside,
        backoffs: tuple[Backoff, Backoff],
        alarms: Alarms,
        stability: Stability,
    ) -> None:
        """`backoffs`: between connections, and between tries of an event that is refused."""
        self._pool, self.number, self.client_id = pool, number, client_id
        self._window, self._settings, self._broker, self._tls = window, settings, broker, tls
        self.name = mqtt.broker_name(broker)
        self.backoff, patience = backoffs
        self._alarms, self._stability = alarms, stability
        self._refusals = Refusals(self, log, window, number, aside, patience, alarms)
        self._suspects = Suspects(settings.poison_attempts, stability.quiet_s)
        self._quiet_s, self._acks_at_poison = 0.0, -1
        self.status = LinkStatus(broker=self.name, client_id=client_id)
        self.link: Link | None = None
        """The open connection; None while there is none."""
        self._limits = Limits.of(settings, time.monotonic())
        self._resumable = False
        self._clean_start = True

    def look(self) -> View:
        """The window's part that is this connection's."""
        return self._window.look(connection=self.number)

    async def run(self) -> None:
        """Publish until cancelled; never raises on account of the broker."""
        try:
            while True:
                started = time.monotonic()
                acks = self.look().acks
                self._quiet_s = 0.0
                try:
                    await self._connect_once()
                except Lost as lost:
                    ended = lost
                acked = self.look().acks > acks
                wait_s = self._after(ended, time.monotonic() - started, acked)
                if await self._set_poison_aside(ended, acked):
                    wait_s = self.backoff.next_s()
                await asyncio.sleep(wait_s)
        finally:
            await self._refusals.close()

    def pump(self) -> None:
        """Send what may be sent."""
        if self.link is not None:
            self.link.pump()
            self._look_whether_it_goes_on()

    def drain(self) -> None:
        """Nothing more comes: what lingers goes out."""
        if self.status.state == "connected":
            self.set_status("draining")

    def goodbye(self) -> None:
        """DISCONNECT 0x00."""
        link, self.link = self.link, None
        if link is not None:
            link.goodbye(0x00)

    def set_status(self, state: str, error: str | None = None) -> None:
        """Tell the pool when it is another one."""
        status = self.status.to(state, error)
        if status != self.status:
            self.status = status
            self._pool.changed(self)

    # ---- connecting ------------------------------------------------------------------------

    async def _connect_once(self) -> None:
        """One connection from CONNECT to its end. Always raises Lost."""
        self.set_status("connecting")
        loop = asyncio.get_running_loop()
        try:
            password = self._settings.read_password()
        except GatewayError as error:
            raise Lost(str(error), Kind.REFUSED) from None
        self._clean_start = not self._resumable or self.look().refused > 0
        self._resumable = False
        self._window.connect(connection=self.number)
        if self._limits is not None:
            self._limits.empty(time.monotonic())
        link = Link(self, self._window, self._settings, self.number, self._limits)
        timeout_s = self._settings.connect_timeout_ms / 1000
        try:
            async with asyncio.timeout(timeout_s):
                await loop.create_connection(
                    lambda: link,
                    self._broker.host,
                    self._broker.port,
                    ssl=self._tls,
                    server_hostname=(self._settings.server_name or self._broker.host)
                    if self._tls is not None
                    else None,
                )
                link.write(
                    mqtt.connect_packet(
                        self.client_id,
                        clean_start=self._clean_start,
                        keep_alive_s=self._settings.keep_alive_s,
                        session_expiry_s=SESSION_EXPIRY_S,
                        username=self._settings.username,
                        password=password,
                    )
                )
                await link.accepted
        except BaseException as error:
            link.accepted.cancel()  # nobody asks for it any more
            link.abort()
            if isinstance(error, (Lost, asyncio.CancelledError)):
                raise
            if isinstance(error, TimeoutError):
                stage = "CONNACK" if link.made else "connection"
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
            raise await link.gone
        finally:
            self.link = None
            link.abort()
            self._window.close(connection=self.number)

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
            self.status = replace(self.status, client_id=connack.client_id)
        self._resumable = connack.session_expiry_s is None or connack.session_expiry_s > 0
        self._refusals.connected()
        self._quiet_s = self._suspects.quiet_s(self._window.lsn)
        self._window.open(
            connack.session_present,
            connack.receive_maximum,
            connack.packet_bytes_max,
            connection=self.number,
        )
        keep_alive_s = (
            self._settings.keep_alive_s if connack.keep_alive_s is None else connack.keep_alive_s
        )
        self._pool.count("mqtt_connects")
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
        self.link = link
        self.set_status("draining" if self._pool.draining else "connected")
        return Terms(keep_alive_s, self._quiet_s)

    def _after(self, lost: Lost, lived_s: float, acked: bool) -> float:
        """Log the loss, set the status, and say how many seconds to wait."""
        was_connected = self.status.state in UP
        self._pool.count("mqtt_disconnects" if was_connected else "mqtt_connect_failures")
        if lost.new_session or lost.kind is not Kind.AWAY:
            self._resumable = False
        stable_s = self._stability.with_ack_s if acked else self._stability.alone_s
        if was_connected and lived_s >= stable_s:
            self.backoff.reset()
            if self._pool.all_up():  # else the rest of a pool that falls would say it once each
                self._alarms.clear()
        long = lost.kind is not Kind.AWAY
        wait_s = self.backoff.long_s() if long else self.backoff.next_s()
        text = f"{self.name}: {lost.reason}"
        self._alarms.say(
            logging.ERROR if long else logging.WARNING,
            text,
            f"events stay in the log; next attempt in {wait_s:.1f} s ({printable(self.client_id)})",
        )
        self.set_status(lost.kind.value, text)
        return wait_s

    async def _set_poison_aside(self, lost: Lost, acked: bool) -> bool:
        """What was in flight when the broker ended the connection is sent one by one from here on.
        True: an event had its last strike, and has a dead letter now."""
        view = self.look()
        if not lost.blames_in_flight:
            return False
        proved = acked or self._quiet_s > 0
        poison = self._suspects.connection_ended(view, time.monotonic_ns(), proved)
        if view.in_flight:
            self._window.probe(self._suspects.until_lsn - 1, connection=self.number)
        if view.oldest_events > 1 and view.in_flight == 1:
            self._resumable = False  # the pack is split: a resumed session wants it as it was (4.4)
        if poison is None:
            return False
        await self._refusals.poison(poison, lost.code, self._suspects.strikes)
        self._resumable = False  # a session that is resumed wants it again (4.4)
        if view.acks > self._acks_at_poison:  # else it may be the broker that takes nothing
            self.backoff.reset()
        self._acks_at_poison = view.acks
        return True

    # ---- for the link ----------------------------------------------------------------------

    def refused(self, packet: Packet) -> None:
        """A PUBACK with an error. The window holds by itself."""
        self._refusals.answered(packet)

    def check_held(self, view: View) -> None:
        """The window holds."""
        self._refusals.check(view)

    def moved(self) -> None:
        """The cursor may have moved."""
        self._look_whether_it_goes_on()
        self._pool.moved(self)

    def throttled(self, seconds: float) -> None:
        """Something to publish waited so long for tokens."""
        self._pool.throttled(seconds)

    def _look_whether_it_goes_on(self) -> None:
        state = self.status.state
        if state not in ("held", FULL) or self._window.is_held(connection=self.number):
            return
        if state == FULL or self._refusals.over(self.look()):
            LOGGER.info(
                "%s: publishing goes on at lsn %d (%s)",
                self.name,
                self._window.lsn,
                printable(self.client_id),
            )
            self.set_status("draining" if self._pool.draining else "connected")

    # ---- for what holds the window ---------------------------------------------------------

    def held(self, state: str, error: str) -> None:
        """Publishing waits."""
        self.set_status(state, error)

    def passed(self) -> None:
        """Dead letters may have moved the cursor and opened the window."""
        self.pump()
        self._pool.moved(self)

    def failed(self, error: BaseException) -> None:
        """End the publisher with this."""
        self._pool.failed(error)
