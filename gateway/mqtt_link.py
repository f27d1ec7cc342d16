"""One MQTT 5 connection: bytes between the compiled window and a socket, and its deadlines.

    broker ── bytes ──▶ window.feed ──▶ cursor      (compiled; PUBACKs never become objects)
    broker ◀── bytes ── window.fill ◀── log         (compiled; one transport.write a batch)
                  │
                  └─ everything else: CONNACK, PINGRESP, DISCONNECT, refusals ──▶ here, or the owner

Deadlines, none that polls:
- PUBACK: the oldest packet in flight is older than `mqtt.puback_timeout_ms` → lost.
- Tokens (`gateway.rates`), and packs that linger: the next moment at which something may be sent.
- Quiet: a connection that carries suspects first proves well (`gateway.retry.Suspects`).
- Keep-alive (3.1.2.10): PINGREQ when nothing was sent, or nothing came, for the keep-alive;
  nothing at all for 1.5 × keep-alive → lost. TCP_USER_TIMEOUT does the same for bytes that nobody
  acknowledges.
"""

import asyncio
import errno
import socket
import ssl
import time
from typing import Final, NamedTuple, Protocol, cast

from gateway import mqtt
from gateway._mqtt import Packet, ProtocolError, View, Window
from gateway.mqtt import Connack, MqttSettings, printable
from gateway.rates import Limits
from gateway.retry import BLAMES_IN_FLIGHT, BUSY_CONNACKS, LONG_DISCONNECTS, Kind, Lost

AT_ONCE_NS: Final = 1
"""What `Window.due_ns` says when something may be sent now."""

LATE_S: Final = 0.5
"""A timer this late means the process was stopped: what waits in the socket is read first."""


NETWORK_DEATHS: Final = frozenset(
    {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
)
"""Ends of a connection that no broker has chosen."""


class Terms(NamedTuple):
    """On what a connection goes on after CONNACK."""

    keep_alive_s: int
    quiet_s: float = 0.0
    """Nothing is published for so long."""


class Owner(Protocol):
    """What a link asks of the publisher."""

    @property
    def client_id(self) -> str: ...
    def accept(self, link: "Link", connack: Connack) -> Terms:
        """CONNACK: obey it, or raise Lost."""

    def refused(self, packet: Packet) -> None:
        """A PUBACK with an error came; the window holds by itself. May raise Lost."""

    def check_held(self, view: View) -> None:
        """The window holds, in flight or not."""

    def moved(self) -> None:
        """The cursor may have moved."""

    def throttled(self, seconds: float) -> None:
        """Something to publish waited so long for tokens."""


class Link(asyncio.Protocol):
    """One TCP or TLS connection. Hot path: `data_received`, `pump`."""

    def __init__(
        self,
        owner: Owner,
        window: Window,
        settings: MqttSettings,
        number: int = 0,
        limits: Limits | None = None,
    ) -> None:
        """`number`: which connection of the window it is."""
        loop = asyncio.get_running_loop()
        self._owner = owner
        self._loop = loop
        self._window = window
        self._settings = settings
        self._number, self._limits = number, limits
        self._feed, self._fill = self._window.feed, self._window.fill
        self._transport: asyncio.Transport | None = None
        self.made = False
        self.accepted: asyncio.Future[None] = loop.create_future()
        """The CONNACK was accepted, or Lost."""
        self.gone: asyncio.Future[Lost] = loop.create_future()
        """Why the connection ended, once it was open."""
        self._open = False
        self._ended = False
        """Whatever still comes must not reach the window: the next link may have it by now."""
        self._paused = False
        self._quiet: asyncio.TimerHandle | None = None
        self._keep_alive_s = 0.0
        self._packed = settings.mode == "packed"
        self._puback_timeout_s = settings.puback_timeout_ms / 1000
        self._sent_s = self._received_s = time.monotonic()
        self._pinged = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        self._later: asyncio.TimerHandle | None = None
        """Looks again when there are tokens, or when a pack has lingered."""
        self._later_s = 0.0
        self._throttled_s = 0.0
        """Since when something waits for tokens; 0: nothing does."""

    # ---- asyncio calls these ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        self.made = True
        self._set_options()

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self._received_s = time.monotonic()
        try:
            packets = self._feed(data, self._number)
        except ProtocolError as error:
            self._handle(error.packets)
            self._violated(str(error))
            return
        if packets is not None:
            self._handle(packets)
        if self._open:
            self.pump()
            self._owner.moved()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self.pump()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.accepted.done():
            self._lose(self._lost_before_connack(exc))
            return
        how = f"failed: {printable(str(exc))}" if exc is not None else "was closed by the broker"
        died = isinstance(exc, OSError) and exc.errno in NETWORK_DEATHS
        self._lose(Lost(f"the connection {how}", blames_in_flight=not died))

    def _lost_before_connack(self, exc: Exception | None) -> Lost:
        tls = self._settings.broker is not None and self._settings.broker.tls
        if isinstance(exc, ssl.SSLError):
            return Lost(
                f"TLS: {printable(str(exc.reason or exc))}; check mqtt.cert_file", Kind.REFUSED
            )
        if tls:  # TLS 1.3 refuses a client certificate after the handshake, and uvloop says no more
            return Lost(
                "the broker closed the TLS connection before CONNACK: does it want a client"
                " certificate (mqtt.cert_file)? is it a broker that speaks MQTT 5?",
                Kind.REFUSED,
            )
        return Lost(
            "the broker closed the connection before CONNACK; one that speaks only MQTT 3.1.1 may"
            " do so, and the gateway needs MQTT 5; so may a TLS port that is spoken to without TLS"
        )

    # ---- sending ---------------------------------------------------------------------------

    def _opened(self, terms: Terms) -> None:
        """CONNACK is accepted: publish."""
        self._open = True
        keep_alive_s = terms.keep_alive_s
        self._keep_alive_s = float(keep_alive_s)
        if terms.quiet_s:
            self._quiet = self._loop.call_later(terms.quiet_s, self._quiet_over)
        sock = self._socket()
        if sock is not None and keep_alive_s:
            # Half-open: bytes nobody acknowledges end it when the keep-alive would (RFC 5482).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, keep_alive_s * 1500)
        self.pump()
        self._arm()

    def _quiet_over(self) -> None:
        self._quiet = None
        self.pump()
        self._owner.moved()  # events that are marked as dead need no PUBACK

    def pump(self) -> None:
        """Send what may be sent."""
        transport = self._transport
        if transport is None or not self._open or self._quiet or transport.is_closing():
            return
        sent = False
        while not self._paused:
            batch = self._fill(self._number) if self._limits is None else self._fill_within_limits()
            if batch is None:
                break
            transport.write(batch)
            sent = True
        if sent:
            self._sent_s = time.monotonic()
            if self._timer_s > self._sent_s + self._puback_timeout_s:
                self._arm()
        if self._packed:
            self._linger()
        if self._window.is_held(self._number):
            self._owner.check_held(self._window.look(self._number))

    def _fill_within_limits(self) -> bytes | None:
        assert self._limits is not None
        now_s = time.monotonic()
        packets, size_bytes = self._limits.allow(now_s)
        batch = None
        if packets and size_bytes:
            batch = self._fill(self._number, packets, size_bytes)
        elif (due_ns := self._window.due_ns(self._number)) and due_ns <= now_s * 1e9:
            self._throttled_s = self._throttled_s or now_s
            self._look_again(now_s + self._limits.wait_s())
            return None
        if self._throttled_s:
            self._owner.throttled(now_s - self._throttled_s)
            self._throttled_s = 0.0
        if batch is not None:
            self._limits.spend(self._window.filled, len(batch))
        return batch

    def _linger(self) -> None:
        if self._paused or self._throttled_s:
            return  # time is not what it waits for
        due_ns = self._window.due_ns(self._number)
        if due_ns > AT_ONCE_NS:
            self._look_again(due_ns / 1e9)

    def _look_again(self, at_s: float) -> None:
        """Pump then, CLOCK_MONOTONIC seconds; the earliest wish counts."""
        if self._later is not None:
            if self._later_s <= at_s:
                return
            self._later.cancel()
        self._later_s = at_s
        # + 1 ms: see _arm
        self._later = self._loop.call_later(
            max(0.0, at_s - time.monotonic()) + 0.001, self._looked_for
        )

    def _looked_for(self) -> None:
        self._later = None
        self.pump()

    def write(self, packet: bytes) -> None:
        """A control packet."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(packet)
            self._sent_s = time.monotonic()

    def goodbye(self, reason: int) -> None:
        """DISCONNECT, then close once it is written."""
        self._stop_timers()
        if self._transport is not None and not self._transport.is_closing():
            if self._open:
                self._transport.write(mqtt.disconnect_packet(reason))
            self._transport.close()
        self._open, self._ended = False, True

    def abort(self) -> None:
        """Close without waiting for anything."""
        self._stop_timers()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.abort()
        self._open, self._ended = False, True

    # ---- what the broker says --------------------------------------------------------------

    def _handle(self, packets: list[Packet]) -> None:
        for packet in packets:
            try:
                self._handle_one(packet)
            except mqtt.CodecError as error:
                self._violated(str(error))
                return
            except Lost as lost:
                self._lose(lost)
                return

    def _handle_one(self, packet: Packet) -> None:
        if packet.type == mqtt.PUBACK:
            self._owner.refused(packet)
        elif packet.type == mqtt.PINGRESP:
            self._pinged = False
        elif packet.type == mqtt.CONNACK and not self.accepted.done():
            # Here and now: more may stand behind it in the same segment.
            terms = self._owner.accept(self, mqtt.parse_connack(packet.flags, packet.body))
            self.accepted.set_result(None)
            self._opened(terms)
        elif packet.type == mqtt.DISCONNECT and self._open:
            raise self._disconnected(mqtt.parse_disconnect(packet.flags, packet.body))
        else:
            self._violated(f"packet type {packet.type} out of place (4.13)")

    def _disconnected(self, goodbye: mqtt.Goodbye) -> Lost:
        if goodbye.reason == 0x8E:
            return Lost(
                "another client took over the session of client id"
                f" {printable(self._owner.client_id)} ({goodbye});"
                " is a second gateway running with the same mqtt.client_id?",
                Kind.TAKEN_OVER,
            )
        blames = goodbye.reason in BLAMES_IN_FLIGHT
        return Lost(
            f"the broker disconnected: {goodbye}",
            Kind.REFUSED if goodbye.reason in LONG_DISCONNECTS else Kind.AWAY,
            new_session=blames,
            blames_in_flight=blames,
            code=goodbye.reason,
        )

    def _violated(self, why: str) -> None:
        """The broker broke the protocol: say so (4.13.1), leave, and do not trust its session."""
        self.goodbye(0x82)
        self._lose(Lost(f"protocol error: {why}", new_session=True))

    def _lose(self, lost: Lost) -> None:
        self._open, self._ended = False, True
        self._stop_timers()
        if not self.accepted.done():
            self.accepted.set_exception(lost)
        elif not self.gone.done():
            self.gone.set_result(lost)

    # ---- time ------------------------------------------------------------------------------

    def _next_s(self) -> float | None:
        """The next moment that matters, CLOCK_MONOTONIC seconds."""
        at = []
        oldest_ns = self._window.look(self._number).oldest_sent_ns
        if oldest_ns:
            at.append(oldest_ns / 1e9 + self._puback_timeout_s)
        if self._keep_alive_s:
            if self._pinged:
                at.append(self._received_s + 1.5 * self._keep_alive_s)
            else:
                at.append(min(self._sent_s, self._received_s) + self._keep_alive_s)
        return min(at, default=None)

    def _arm(self) -> None:
        self._cancel_timer()
        at = self._next_s()
        if at is None:
            self._timer_s = float("inf")
            return
        self._timer_s = at
        # + 1 ms: uvloop's timers count milliseconds, and one that fires early would spin
        self._timer = self._loop.call_later(max(0.0, at - time.monotonic()) + 0.001, self._tick)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_timers(self) -> None:
        self._cancel_timer()
        if self._quiet is not None:
            self._quiet.cancel()
            self._quiet = None
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def _tick(self) -> None:
        self._timer = None
        now = time.monotonic()
        if now - self._timer_s > LATE_S:
            self._timer_s = now + LATE_S
            self._timer = self._loop.call_later(LATE_S, self._tick)
            return
        oldest_ns = self._window.look(self._number).oldest_sent_ns
        if oldest_ns and now >= oldest_ns / 1e9 + self._puback_timeout_s:
            self._lose(
                Lost(
                    f"no PUBACK within mqtt.puback_timeout_ms = {self._puback_timeout_s * 1000:.0f}"
                )
            )
            return
        if self._keep_alive_s:
            if self._pinged and now >= self._received_s + 1.5 * self._keep_alive_s:
                self._lose(
                    Lost(
                        "the broker is silent: nothing for"
                        f" {1.5 * self._keep_alive_s:g} s (keep-alive)"
                    )
                )
                return
            if not self._pinged and now >= min(self._sent_s, self._received_s) + self._keep_alive_s:
                self._pinged = True
                self.write(mqtt.PINGREQ_PACKET)
        self._arm()

    def _set_options(self) -> None:
        sock = self._socket()
        if sock is None:
            return
        keep_alive_s = self._settings.keep_alive_s
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle_s, interval_s = min(keep_alive_s, 32767), max(1, min(keep_alive_s // 6, 60))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, idle_s))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, keep_alive_s * 1500)

    def _socket(self) -> socket.socket | None:
        if self._transport is None:
            return None
        return cast("socket.socket | None", self._transport.get_extra_info("socket"))


def connect_refused(connack: Connack) -> Lost:
    """The broker said no to CONNECT."""
    step = {
        0x85: "change mqtt.client_id",
        0x86: "check mqtt.username and mqtt.password_file",
        # Mosquitto says this of a wrong password too
        0x87: "check mqtt.username and mqtt.password_file, or allow this client at the broker",
        0x8A: "the broker bans this client: ask its operator",
        0x9C: "change mqtt.url",
        0x9D: "change mqtt.url",
    }.get(connack.reason)
    busy = connack.reason in BUSY_CONNACKS
    return Lost(
        f"the broker refuses the connection: {connack}" + (f"; {step}" if step else ""),
        Kind.AWAY if busy else Kind.REFUSED,
    )


def connect_failure(error: OSError, broker: mqtt.Broker, settings: MqttSettings) -> Lost:
    """TCP or TLS did not come to be."""
    if isinstance(error, ssl.SSLCertVerificationError):
        name = settings.server_name or broker.host
        return Lost(
            f"TLS: the broker's certificate is not accepted for {name}:"
            f" {printable(error.verify_message)}; check mqtt.ca_file and mqtt.server_name",
            Kind.REFUSED,
        )
    if isinstance(error, ssl.SSLError):
        return Lost(
            f"TLS: {printable(str(error.reason or error))}; is this a TLS port, and does the broker"
            " accept mqtt.cert_file?",
            Kind.REFUSED,
        )
    if isinstance(error, socket.gaierror):
        # No answer from a name server, as while a machine starts, is no verdict on the name.
        kind = Kind.AWAY if error.errno == socket.EAI_AGAIN else Kind.REFUSED
        return Lost(f"the name {broker.host} is not found ({error.strerror}); check mqtt.url", kind)
    if isinstance(error, ConnectionResetError):
        hint = "; is this a TLS port?" if broker.tls else ""
        return Lost(f"the broker reset the connection before CONNACK{hint}")
    return Lost(
        f"cannot connect: {printable(error.strerror or str(error))}; is the broker running?"
    )
