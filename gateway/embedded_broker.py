"""A small MQTT 5 broker inside the delivery process, so that a try-out needs no other program.

For development only: nothing is stored, watchers get QoS 0, and there are no users.

mqttools' broker, extended. Its codec and its books (sessions, retained messages) stay; what breaks
in 0.50.0 as it is was replaced:

    mqttools 0.50.0                               here
    QoS 1 is refused as malformed                 PUBACK after the message went to the watchers
    clients with an empty id share one session    each is assigned an id (3.2.2.3.7)
    a 3.1.1 CONNECT is met with silence           CONNACK with return code 1, in 3.1.1's form
    `a/#` matches `ab`, `.` matches all           filters by level (4.7), `$` hidden from wildcards
    unbounded writes to a slow watcher            more than WATCHER_BYTES_MAX waiting: messages are
                                                  left out for it and counted; others go on
    no keep-alive, sessions for ever              both enforced
    streams read byte by byte                     one pass over a segment, one write a watcher

        publisher ── PUBLISH QoS 1 ──▶ segment ──▶ route (cached by topic) ──▶ watchers, QoS 0
                  ◀── PUBACKs, one write ──┘

Section numbers are those of MQTT 5.0.
"""

import asyncio
import logging
import secrets
from collections.abc import Iterator
from typing import Any, Final, cast

from mqttools.broker import Broker
from mqttools.common import (
    ConnectReasonCode,
    ControlPacketType,
    DisconnectReasonCode,
    MalformedPacketError,
    PayloadReader,
    PropertyIds,
    SubackReasonCode,
    UnsubackReasonCode,
    pack_connack,
    pack_disconnect,
    pack_pingresp,
    pack_publish,
    pack_suback,
    pack_unsuback,
    pack_variable_integer,
    unpack_connect,
    unpack_subscribe,
    unpack_unsubscribe,
)

from gateway import mqtt
from gateway.mqtt import CodecError, printable

LOGGER = logging.getLogger("gateway.embedded_broker")

PACKET_BYTES_MAX: Final = 2 << 20
"""Largest packet taken: twice the largest event."""

WATCHER_BYTES_MAX: Final = 4 << 20
"""What may wait for one watcher; beyond it messages are left out for it, as QoS 0 allows."""

CLIENTS_MAX: Final = 200
"""Connections at a time."""

RETAINED_MAX: Final = 1000
"""Topics with a retained message."""

ROUTES_MAX: Final = 10_000
"""Topics whose watchers are remembered."""

CONNECT_TIMEOUT_S: Final = 10.0
"""From TCP's connection to CONNECT."""

CLOSE_TIMEOUT_S: Final = 1.0
"""For the last bytes of a connection that is closed."""

SESSION_EXPIRY_S_MAX: Final = 3600
"""A session without a client is kept no longer."""

_PUBLISH_PROPERTIES: Final = frozenset({0x01, 0x02, 0x03, 0x08, 0x09, 0x26})
"""What a publisher may send here (3.3.2.3): no topic alias, no subscription identifier."""


class _Stop(Exception):
    """This connection ends with a DISCONNECT of that reason; None: without one."""

    def __init__(self, reason: int | None, why: str) -> None:
        super().__init__(why)
        self.reason = reason


def filter_ok(topic_filter: str) -> bool:
    """4.7.1: `#` alone in the last level, `+` alone in its level, no NUL, not empty."""
    levels = topic_filter.split("/")
    return (
        topic_filter != ""
        and "\0" not in topic_filter
        and all("#" not in level for level in levels[:-1])
        and ("#" not in levels[-1] or levels[-1] == "#")
        and all("+" not in level or level == "+" for level in levels)
    )


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a topic belongs to a filter (4.7.1, 4.7.2)."""
    if topic.startswith("$") and topic_filter[:1] in ("#", "+"):
        return False
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for i, level in enumerate(wanted):
        if level == "#":
            return True
        if i == len(levels) or (level != "+" and level != levels[i]):
            return False
    return len(wanted) == len(levels)


class EmbeddedBroker(Broker):  # type: ignore[misc]
    """`broker = await EmbeddedBroker("127.0.0.1", 1883).start()`, then `await broker.close()`."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__([])
        self.host, self.port = host, port
        self.left_out = 0
        """Messages that slow watchers did not get."""
        self.clients: set[_Client] = set()
        self.routes: dict[bytes, tuple[tuple[_Client, bool], ...]] = {}
        """Topic → its watchers, and whether each wants not to hear itself."""
        self._filters: dict[str, dict[Any, int]] = {}
        """Filter → session → subscription options (3.8.3.1)."""
        self._server: asyncio.Server | None = None

    async def start(self) -> "EmbeddedBroker":
        """Listen. Raises OSError when the port is taken; port 0 takes a free one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Client(self), self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        LOGGER.warning(
            "the embedded MQTT broker listens on %s:%d: for development only, nothing is stored",
            self.host,
            self.port,
        )
        return self

    async def close(self) -> None:
        """Say goodbye to every client (0x8B) and stop listening."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for client in list(self.clients):
            client.end(DisconnectReasonCode.SERVER_SHUTTING_DOWN)

    # ---- books: what mqttools' get_session calls, and what it lacks ------------------------

    def add_subscriber(self, topic: str, session: Any, options: int = 0) -> None:
        """`topic` is a filter of either kind."""
        self._filters.setdefault(topic, {})[session] = options
        session.subscriptions.add(topic)
        self.routes.clear()

    def remove_subscriber(self, topic: str, session: Any) -> None:
        sessions = self._filters.get(topic, {})
        if sessions.pop(session, None) is not None and not sessions:
            del self._filters[topic]
        self.routes.clear()

    def remove_session(self, client_id: str) -> None:
        """Forget it and its subscriptions; one that is gone already is no error."""
        session = self._sessions.pop(client_id, None)
        if session is not None:
            for topic in session.subscriptions:
                self.remove_subscriber(topic, session)

    def client_of(self, client_id: str) -> "_Client | None":
        """Who is connected with that id."""
        session = self._sessions.get(client_id)
        return None if session is None else session.client

    def is_subscribed(self, topic_filter: str, session: Any) -> bool:
        return session in self._filters.get(topic_filter, {})

    def expire_session(self, session: Any) -> None:
        """After its interval, unless a client came back for it."""
        if session.client is None and self._sessions.get(session.client_id) is session:
            self.remove_session(session.client_id)

    def retain(self, topic: str, message: bytes) -> None:
        """3.3.1.3: an empty message takes the retained one away."""
        if not message:
            self.remove_retained_message(topic)
        elif topic in self._retained_messages or len(self._retained_messages) < RETAINED_MAX:
            self.add_retained_message(topic, message)
        else:
            LOGGER.warning("%d topics are retained; %s is not", RETAINED_MAX, printable(topic))

    def retained(self, topic_filter: str) -> Iterator[tuple[str, bytes]]:
        for topic, message in self._retained_messages.items():
            if matches(topic_filter, topic):
                yield topic, message

    def route(self, topic: bytes) -> tuple[tuple["_Client", bool], ...]:
        """The connected watchers of a topic, each once. Raises _Stop for a bad topic."""
        try:
            name = topic.decode()
        except UnicodeDecodeError:
            raise _Stop(0x81, "topic is not UTF-8") from None
        if not name or "+" in name or "#" in name or "\0" in name:
            raise _Stop(0x90, "topic is empty or has wildcards")
        found: dict[_Client, bool] = {}
        for topic_filter, sessions in self._filters.items():
            if matches(topic_filter, name):
                for session, options in sessions.items():
                    if session.client is not None:
                        no_local = bool(options & 4)
                        found[session.client] = no_local and found.get(session.client, True)
        if len(self.routes) >= ROUTES_MAX:
            self.routes.clear()
        self.routes[topic] = route = tuple(found.items())
        return route

    def publish(self, topic: str, message: bytes, properties: dict[Any, Any]) -> None:
        """To all watchers (wills)."""
        packet = pack_publish(topic, message, False, properties)
        for client, _ in self.route(topic.encode()):
            client.waiting.append(packet)
            client.hand_over()


class _Client(asyncio.Protocol):
    """One connection, of a publisher, a watcher or both."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self._rest = b""
        self._session: Any = None
        self._normal_end = False
        self._keep_alive_s = 0.0
        self._received_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._publishes = False
        self._packet_bytes_max = 0
        self._slow = False
        self.waiting: list[bytes] = []
        """Packets for this watcher, written at the end of the segment they came in."""

    # ---- asyncio calls these ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if len(self._broker.clients) >= CLIENTS_MAX:
            LOGGER.warning("%d clients are connected; one more is turned away", CLIENTS_MAX)
            self._transport.abort()
            return
        self._broker.clients.add(self)
        self._timer = self._loop.call_later(CONNECT_TIMEOUT_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        self._received_s = self._loop.time()
        if self._rest:
            data = self._rest + data
            self._rest = b""
        answers = bytearray()
        touched: dict[_Client, None] = {}
        try:
            used = self._packets(data, answers, touched)
            self._rest = data[used:]
        except _Stop as stop:
            self._stop(stop, answers)
        except (CodecError, MalformedPacketError) as error:
            self._stop(_Stop(0x81, str(error)), answers)
        else:
            if answers and not self._transport.is_closing():
                self._transport.write(answers)
        for watcher in touched:
            watcher.hand_over()

    def pause_writing(self) -> None:
        if self._publishes and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._publishes and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        broker, session = self._broker, self._session
        broker.clients.discard(self)
        self.waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
        if session is None or session.client is not self:
            return
        session.client = None
        broker.routes.clear()
        if session.will_topic is not None and not self._normal_end:
            try:
                broker.publish(session.will_topic, session.will_message, {})
                if session.will_retain:
                    broker.retain(session.will_topic, session.will_message)
            except _Stop as stop:
                LOGGER.info("the will of %s: %s", printable(session.client_id), stop)
        expiry_s = min(session.expiry_interval, SESSION_EXPIRY_S_MAX)
        if expiry_s == 0:
            broker.remove_session(session.client_id)
        else:
            self._loop.call_later(expiry_s, broker.expire_session, session)

    # ---- sending ---------------------------------------------------------------------------

    def hand_over(self) -> None:
        """Write what waits, or leave it out when this watcher does not read."""
        if not self.waiting:
            return
        packets, self.waiting = self.waiting, []
        if self._transport.is_closing():
            return
        if self._packet_bytes_max:
            packets = [packet for packet in packets if len(packet) <= self._packet_bytes_max]
        if self._transport.get_write_buffer_size() > WATCHER_BYTES_MAX:
            self._broker.left_out += len(packets)
            if not self._slow:
                self._slow = True
                LOGGER.warning(
                    "the watcher %s reads too slowly: messages are left out for it",
                    printable(self._session.client_id),
                )
            return
        self._slow = False
        self._transport.write(b"".join(packets))

    def end(self, reason: int | None) -> None:
        """DISCONNECT with a reason (None: without), then close."""
        if not self._transport.is_closing():
            if reason is not None and self._session is not None:
                self._transport.write(pack_disconnect(reason))
            self._transport.close()
            self._loop.call_later(CLOSE_TIMEOUT_S, self._transport.abort)  # if it does not read

    def _stop(self, stop: _Stop, answers: bytearray) -> None:
        LOGGER.info("an MQTT client is disconnected: %s", printable(str(stop)))
        if answers and not self._transport.is_closing():
            self._transport.write(answers)
        self.end(stop.reason)

    # ---- receiving -------------------------------------------------------------------------

    def _packets(self, data: bytes, answers: bytearray, touched: "dict[_Client, None]") -> int:
        """Take the whole packets of `data`; returns the bytes used. Hot for PUBLISH."""
        size = len(data)
        at = 0
        routes = self._broker.routes
        while at + 2 <= size:
            first = data[at]
            if self._session is None and first != 0x10:
                raise _Stop(None, "the first packet is no CONNECT")
            body = at + 2
            length = data[at + 1]
            if length & 0x80:
                length &= 0x7F
                shift = 7
                while True:
                    if body == size:
                        return at
                    byte = data[body]
                    body += 1
                    length |= (byte & 0x7F) << shift
                    if not byte & 0x80:
                        break
                    shift += 7
                    if shift > 21:
                        raise _Stop(0x81, "malformed remaining length")
            if length > PACKET_BYTES_MAX:
                raise _Stop(0x95, f"a packet of {length} bytes")
            end = body + length
            if end > size:
                return at
            at = end
            if first >> 4 != 3:
                self._control(first, data[body:end], answers)
                if self._transport.is_closing():
                    return size
                continue

            # PUBLISH (3.3)
            self._publishes = True
            qos = first >> 1 & 3
            if qos > 1:
                raise _Stop(0x9B if qos == 2 else 0x81, f"PUBLISH with QoS {qos}")
            if length < 3 + 2 * qos:
                raise _Stop(0x81, "PUBLISH is too short")
            topic_end = body + 2 + (data[body] << 8 | data[body + 1])
            rest = topic_end + 2 * qos
            if rest >= end:
                raise _Stop(0x81, "the topic runs past the end of its packet")
            topic = data[body + 2 : topic_end]
            route = routes.get(topic)
            if route is None:
                route = self._broker.route(topic)
            if data[rest]:
                _check_properties(data[body:end], rest - body)
            if first & 1:
                self._broker.retain(topic.decode(), _payload(data[rest:end]))
            delivered = False
            if route:
                length = end - rest + topic_end - body
                packet = (
                    b"\x30"
                    + (bytes((length,)) if length < 128 else pack_variable_integer(length))
                    + data[body:topic_end]
                    + data[rest:end]
                )
                for watcher, no_local in route:
                    if not no_local or watcher is not self:
                        delivered = True
                        watcher.waiting.append(packet)
                        touched[watcher] = None
            if qos:
                high, low = data[topic_end], data[topic_end + 1]
                if not high and not low:
                    raise _Stop(0x82, "PUBLISH with packet identifier 0")
                answers += bytes((0x40, 2, high, low) if delivered else (0x40, 3, high, low, 0x10))
        return at

    def _control(self, first: int, body: bytes, answers: bytearray) -> None:
        kind, flags = first >> 4, first & 15
        if kind == ControlPacketType.CONNECT and self._session is not None:
            raise _Stop(0x82, "a second CONNECT (3.1)")
        if flags != (2 if kind in (8, 10) else 0):
            raise _Stop(0x81, f"packet type {kind} with flags {flags}")
        if kind == ControlPacketType.CONNECT:
            self._connect(body, answers)
        elif kind == ControlPacketType.SUBSCRIBE:
            self._subscribe(body, answers)
        elif kind == ControlPacketType.UNSUBSCRIBE:
            self._unsubscribe(body, answers)
        elif kind == ControlPacketType.PINGREQ:
            answers += pack_pingresp()
        elif kind == ControlPacketType.DISCONNECT:
            self._normal_end = mqtt.parse_disconnect(flags, body).reason != 0x04
            if answers:
                self._transport.write(bytes(answers))
                answers.clear()
            self._transport.close()
        else:
            raise _Stop(0x82, f"packet type {kind} is not for a broker like this")

    def _connect(self, body: bytes, answers: bytearray) -> None:
        """3.1"""
        if body[:7] in (b"\x00\x04MQTT\x04", b"\x00\x06MQIsd") or (
            body[:6] == b"\x00\x04MQTT" and body[6:7] != b"\x05"
        ):
            answers += mqtt.connack_311_packet(1)
            raise _Stop(None, "a client that does not speak MQTT 5; use -V mqttv5")
        if body[7:8] and body[7] & 1:
            raise _Stop(None, "CONNECT with its reserved flag set")
        (
            client_id,
            clean_start,
            will_topic,
            will_message,
            will_retain,
            keep_alive_s,
            properties,
            username,
            password,
        ) = unpack_connect(PayloadReader(mqtt.strip_user_properties(body, 10)))
        if PropertyIds.AUTHENTICATION_METHOD in properties:
            self._refuse(ConnectReasonCode.BAD_AUTHENTICATION_METHOD, answers)
        if username is not None or password is not None:
            self._refuse(ConnectReasonCode.BAD_USER_NAME_OR_PASSWORD, answers)  # there are no users
        if body[7] & 0x18 > 0x08:
            self._refuse(ConnectReasonCode.QOS_NOT_SUPPORTED, answers)
        answer: dict[PropertyIds, Any] = {
            PropertyIds.MAXIMUM_QOS: 1,
            PropertyIds.MAXIMUM_PACKET_SIZE: PACKET_BYTES_MAX,
            PropertyIds.SUBSCRIPTION_IDENTIFIER_AVAILABLE: 0,
            PropertyIds.SHARED_SUBSCRIPTION_AVAILABLE: 0,
        }
        if client_id == "":
            client_id = "watcher-" + secrets.token_hex(8)
            answer[PropertyIds.ASSIGNED_CLIENT_IDENTIFIER] = client_id
        older = self._broker.client_of(client_id)
        session, session_present = self._broker.get_session(client_id, clean_start)
        session.client = self
        if older is not None:
            older.end(DisconnectReasonCode.SESSION_TAKEN_OVER)
        session.expiry_interval = properties.get(PropertyIds.SESSION_EXPIRY_INTERVAL, 0)
        session.will_topic, session.will_message = will_topic, will_message
        session.will_retain = will_retain
        self._session = session
        self._packet_bytes_max = properties.get(PropertyIds.MAXIMUM_PACKET_SIZE, 0)
        self._keep_alive_s = float(keep_alive_s)
        self._broker.routes.clear()
        answers += pack_connack(session_present, ConnectReasonCode.SUCCESS, answer)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if keep_alive_s:
            self._timer = self._loop.call_later(1.5 * keep_alive_s, self._tick)
        LOGGER.debug("client %s is connected", printable(client_id))

    def _refuse(self, reason: int, answers: bytearray) -> None:
        answers += pack_connack(False, reason, {})
        raise _Stop(None, f"CONNECT is refused: {mqtt.reason_name(reason)}")

    def _tick(self) -> None:
        """Keep-alive (3.1.2.10): one and a half of it without a packet ends the connection."""
        left_s = self._received_s + 1.5 * self._keep_alive_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s + 0.001, self._tick)
            return
        self._timer = None
        LOGGER.info("client %s is silent: disconnected", printable(self._session.client_id))
        self.end(DisconnectReasonCode.KEEP_ALIVE_TIMEOUT)

    def _subscribe(self, body: bytes, answers: bytearray) -> None:
        """3.8"""
        identifier, properties, subscriptions = unpack_subscribe(
            PayloadReader(mqtt.strip_user_properties(body, 2))
        )
        if PropertyIds.SUBSCRIPTION_IDENTIFIER in properties:
            raise _Stop(0xA1, "SUBSCRIBE with a subscription identifier")
        if not subscriptions or not identifier:
            raise _Stop(0x82, "SUBSCRIBE without a filter or packet identifier")
        reasons = bytearray()
        retained: list[bytes] = []
        for topic_filter, options in subscriptions:
            if options & 0xC0 or options & 3 == 3 or options >> 4 & 3 == 3:
                raise _Stop(0x81, "SUBSCRIBE with reserved options")
            if topic_filter.startswith("$share/"):
                reasons.append(SubackReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED)
                continue
            if not filter_ok(topic_filter):
                reasons.append(SubackReasonCode.TOPIC_FILTER_INVALID)
                continue
            handling = options >> 4 & 3
            if handling == 0 or (
                handling == 1 and not self._broker.is_subscribed(topic_filter, self._session)
            ):
                retained += (
                    pack_publish(topic, message, True, {})
                    for topic, message in self._broker.retained(topic_filter)
                )
            self._broker.add_subscriber(topic_filter, self._session, options)
            reasons.append(SubackReasonCode.GRANTED_QOS_0)
        answers += pack_suback(identifier, reasons)
        for packet in retained:
            answers += packet

    def _unsubscribe(self, body: bytes, answers: bytearray) -> None:
        """3.10"""
        identifier, topics = unpack_unsubscribe(PayloadReader(mqtt.strip_user_properties(body, 2)))
        if not topics or not identifier:
            raise _Stop(0x82, "UNSUBSCRIBE without a filter or packet identifier")
        reasons = bytearray()
        for topic_filter in topics:
            known = self._broker.is_subscribed(topic_filter, self._session)
            if known:
                self._broker.remove_subscriber(topic_filter, self._session)
                self._session.subscriptions.discard(topic_filter)
            reasons.append(
                UnsubackReasonCode.SUCCESS if known else UnsubackReasonCode.NO_SUBSCRIPTION_EXISTED
            )
        answers += pack_unsuback(identifier, reasons)


def _check_properties(body: bytes, at: int) -> None:
    """The properties of a PUBLISH that is passed on unchanged (3.3.2.3)."""
    stripped = mqtt.strip_user_properties(body, at)
    for identifier in mqtt.property_ids(stripped, at):
        if identifier == PropertyIds.TOPIC_ALIAS:
            raise _Stop(0x94, "PUBLISH with a topic alias; none is allowed here")
        if identifier not in _PUBLISH_PROPERTIES:
            raise _Stop(0x82, f"PUBLISH with property 0x{identifier:02X}")


def _payload(rest: bytes) -> bytes:
    """What stands behind the properties of a PUBLISH."""
    length, shift, at = 0, 0, 0
    while True:
        byte = rest[at]
        at += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return rest[at + length :]
