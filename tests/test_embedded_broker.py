"""The embedded broker with Mosquitto's clients, and with a client that sends any bytes."""

import asyncio
import contextlib
import logging
import random
import signal
import struct
import subprocess
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
import uvloop

from gateway import embedded_broker
from gateway.embedded_broker import EmbeddedBroker, filter_ok, matches
from gateway.mqtt import connect_packet
from tests import brokers, mosquitto
from tests.brokers import packet
from tests.test_publisher import Source, publishing, source, until

__all__ = ["source"]  # the fixture


def run(main: Coroutine[Any, Any, None], within_s: float = 20) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main, within_s))


@contextlib.asynccontextmanager
async def embedded() -> AsyncIterator[EmbeddedBroker]:
    broker = await EmbeddedBroker("127.0.0.1", 0).start()
    try:
        yield broker
    finally:
        await broker.close()
        await until(lambda: not broker.clients)


class Client:
    """A bare MQTT 5 client that can also misbehave."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self._data = reader, writer, bytearray()

    @staticmethod
    async def open(
        broker: EmbeddedBroker,
        client_id: str = "",
        clean_start: bool = True,
        expiry_s: int = 0,
        keep_alive_s: int = 0,
    ) -> "tuple[Client, bytes]":
        client = await Client.bare(broker)
        client.send(
            connect_packet(
                client_id,
                clean_start=clean_start,
                keep_alive_s=keep_alive_s,
                session_expiry_s=expiry_s,
                username=None,
                password=None,
            )
        )
        first, body = await client.packet()
        assert (first, body[1]) == (0x20, 0)
        return client, body

    @staticmethod
    async def bare(broker: EmbeddedBroker) -> "Client":
        return Client(*await asyncio.open_connection("127.0.0.1", broker.port))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def packet(self) -> tuple[int, bytes]:
        """Raises EOFError."""
        while True:
            for first, body, end in brokers.split(self._data):
                del self._data[:end]
                return first, body
            more = await self.reader.read(65536)
            if not more:
                raise EOFError
            self._data += more

    async def publish(self) -> brokers.Publish:
        first, body = await self.packet()
        assert first >> 4 == 3, hex(first)
        return brokers.read_publish(first, body)

    async def subscribe(self, *filters: str, options: int = 0) -> list[int]:
        body = b"\x00\x01\x00"
        for topic_filter in filters:
            body += string(topic_filter) + bytes((options,))
        self.send(packet(0x82, body))
        first, body = await self.packet()
        assert (first, body[:3]) == (0x90, b"\x00\x01\x00")
        return list(body[3:])

    async def closed(self) -> int | None:
        """The reason of the DISCONNECT before the end; None: none came."""
        reason = None
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                first, body = await self.packet()
                if first == 0xE0:
                    reason = body[0] if body else 0
        self.writer.close()
        return reason


def string(text: str) -> bytes:
    return struct.pack(">H", len(text.encode())) + text.encode()


def publish(
    topic: str, payload: bytes, identifier: int = 0, flags: int = 0, properties: bytes = b""
) -> bytes:
    body = string(topic) + (struct.pack(">H", identifier) if identifier else b"")
    first = 0x30 | flags | (2 if identifier else 0)
    return packet(first, body + brokers.varint(len(properties)) + properties + payload)


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/c", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("+", "a", True),
        ("+", "a/b", False),
        ("+/+", "/a", True),
        ("a/+/c", "a/b/c", True),
        ("a/+", "a", False),
        ("a.c", "abc", False),
    ],
)
def test_filters_match_by_level(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


@pytest.mark.parametrize("topic_filter", ["", "a/#/b", "a#", "a+", "a/b+/c", "a\0"])
def test_malformed_filters_are_refused(topic_filter: str) -> None:
    assert not filter_ok(topic_filter)


# ---- Mosquitto's clients ----------------------------------------------------------------------


async def watcher(broker: EmbeddedBroker, *arguments: str) -> asyncio.subprocess.Process:
    """mosquitto_sub, subscribed."""
    binary = mosquitto.find("mosquitto_sub")
    assert binary
    before = sum(len(s.subscriptions) for s in broker._sessions.values())
    process = await asyncio.create_subprocess_exec(
        *(binary, "-p", str(broker.port), "-V", "mqttv5", "-F", "%t %p"),
        *arguments,
        stdout=subprocess.PIPE,
    )
    await until(lambda: sum(len(s.subscriptions) for s in broker._sessions.values()) > before)
    return process


async def mosquitto_pub(
    broker: EmbeddedBroker, *arguments: str, version: str = "mqttv5"
) -> tuple[int, bytes]:
    """Exit code and what it said."""
    binary = mosquitto.find("mosquitto_pub")
    assert binary
    process = await asyncio.create_subprocess_exec(
        *(binary, "-p", str(broker.port), "-V", version, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    output = await process.stdout.read()
    return await process.wait(), output


def test_several_watchers_with_overlapping_filters_each_get_each_message_once() -> None:
    async def main() -> None:
        async with embedded() as broker:
            filters = [("t/#",), ("t/+",), ("t/a", "t/#"), ("#",), ("t/b",)]
            watchers = [
                await watcher(broker, "-C", "2", *(x for f in fs for x in ("-t", f)), "-q", "1")
                for fs in filters[:4]
            ]
            other = await watcher(broker, "-C", "1", "-t", "t/b")
            assert len(broker._sessions) == 5  # empty ids do not share a session
            for topic, text in (("t/a", "1"), ("t/b", "2")):
                assert await mosquitto_pub(broker, "-q", "1", "-t", topic, "-m", text) == (0, b"")
            for process in watchers:
                assert process.stdout is not None
                assert await process.stdout.read() == b"t/a 1\nt/b 2\n"
                assert await process.wait() == 0
            assert other.stdout is not None
            assert await other.stdout.read() == b"t/b 2\n"
            await other.wait()
            await until(lambda: not broker._sessions and not broker._filters)

    run(main())


def test_a_watcher_that_dies_does_not_stop_the_others() -> None:
    async def main() -> None:
        async with embedded() as broker:
            first = await watcher(broker, "-t", "#")
            second = await watcher(broker, "-t", "#", "-C", "1")
            first.kill()
            await first.wait()
            assert await mosquitto_pub(broker, "-q", "1", "-t", "a", "-m", "x") == (0, b"")
            assert second.stdout is not None
            assert await second.stdout.read() == b"a x\n"
            await second.wait()

    run(main())


@pytest.mark.parametrize("version", ["mqttv311", "mqttv31"])
def test_older_clients_are_refused_in_words_they_understand(version: str) -> None:
    async def main() -> None:
        async with embedded() as broker:
            code, output = await mosquitto_pub(broker, "-t", "a", "-m", "x", version=version)
            assert code != 0
            assert b"unacceptable protocol version" in output.lower()

    run(main())


def test_retained_messages_and_wills_reach_watchers() -> None:
    async def main() -> None:
        async with embedded() as broker:
            await mosquitto_pub(broker, "-r", "-q", "1", "-t", "r/a", "-m", "kept")
            late = await watcher(broker, "-t", "r/#", "-t", "w", "-C", "2")
            dying = await watcher(broker, "-t", "x", "--will-topic", "w", "--will-payload", "gone")
            dying.send_signal(signal.SIGKILL)
            await dying.wait()
            assert late.stdout is not None
            assert await late.stdout.read() == b"r/a kept\nw gone\n"
            await late.wait()

    run(main())


def test_user_properties_and_message_properties_pass() -> None:
    async def main() -> None:
        async with embedded() as broker:
            user = ("-D", "connect", "user-property", "k", "v")
            seeing = await watcher(broker, "-t", "a", "-C", "1", *user)
            code, output = await mosquitto_pub(
                broker,
                *("-q", "1", "-t", "a", "-m", "x", *user),
                *("-D", "publish", "content-type", "text/plain"),
                *("-D", "publish", "user-property", "a", "b"),
            )
            assert (code, output) == (0, b"")
            assert seeing.stdout is not None
            assert await seeing.stdout.read() == b"a x\n"
            await seeing.wait()

    run(main())


def test_users_are_refused_since_there_are_none() -> None:
    async def main() -> None:
        async with embedded() as broker:
            code, output = await mosquitto_pub(broker, "-t", "a", "-m", "x", "-u", "me")
            assert code != 0
            assert b"bad user name or password" in output.lower()

    run(main())


def test_the_publisher_reaches_watchers_through_it(source: Source) -> None:
    source.add(1000)

    async def main() -> None:
        async with embedded() as broker:
            seeing = await watcher(broker, "-t", "telemetry/+", "-C", "1500")
            async with publishing(source, broker.port) as publisher:
                await until(lambda: source.published == 1000)
                for client in list(broker.clients):
                    if client._publishes:
                        client._transport.abort()  # a lost connection: the session is resumed
                await until(lambda: source.counter("mqtt_disconnects") == 1)
                source.add(500)
                assert await publisher.drain(5)
            assert seeing.stdout is not None
            assert len((await seeing.stdout.read()).splitlines()) == 1500
            await seeing.wait()

    run(main())
    assert source.log.unexplained(0) == 0


# ---- the protocol, by hand --------------------------------------------------------------------


def test_qos_1_is_acknowledged_whether_anyone_watches_or_not() -> None:
    async def main() -> None:
        async with embedded() as broker:
            one, connack = await Client.open(broker)
            assert b"\x12" in connack  # Assigned Client Identifier
            one.send(publish("a", b"x", 7))
            assert await one.packet() == (0x40, b"\x00\x07\x10")  # no matching subscribers
            two, _ = await Client.open(broker)
            assert await two.subscribe("a", options=1) == [0]  # granted QoS 0
            one.send(publish("a", b"x", 8) + publish("a", b"y"))
            assert await one.packet() == (0x40, b"\x00\x08")
            assert [(await two.publish()).payload for _ in range(2)] == [b"x", b"y"]
            one.writer.close()
            two.writer.close()

    run(main())


def test_no_local_and_unsubscribe_are_obeyed() -> None:
    async def main() -> None:
        async with embedded() as broker:
            one, _ = await Client.open(broker)
            await one.subscribe("a", options=4)
            await one.subscribe("b")
            one.send(publish("a", b"x") + publish("b", b"y"))
            assert (await one.publish()).topic == "b"
            one.send(packet(0xA2, b"\x00\x02\x00" + string("b") + string("c")))
            assert await one.packet() == (0xB0, b"\x00\x02\x00\x00\x11")
            one.send(publish("b", b"z", 3))
            assert await one.packet() == (0x40, b"\x00\x03\x10")
            await one.subscribe("b")
            one.send(publish("b", b"again"))
            assert (await one.publish()).payload == b"again"
            assert await one.subscribe("$share/g/a", "x#") == [0x9E, 0x8F]
            one.writer.close()

    run(main())


def test_sessions_are_kept_and_taken_over() -> None:
    async def main() -> None:
        async with embedded() as broker:
            one, _ = await Client.open(broker, "me", expiry_s=100)
            await one.subscribe("a")
            two, connack = await Client.open(broker, "me", clean_start=False, expiry_s=100)
            assert connack[0] == 1
            assert await one.closed() == 0x8E
            two.send(publish("a", b"x"))
            assert (await two.publish()).payload == b"x"
            other, _ = await Client.open(broker)
            other.send(publish("a", b"y", 1))
            assert await other.packet() == (0x40, b"\x00\x01")
            two.writer.transport.abort()
            await until(lambda: broker.client_of("me") is None)
            other.send(publish("a", b"z", 2))  # the session is kept, nobody is there
            assert await other.packet() == (0x40, b"\x00\x02\x10")
            other.writer.close()
            three, connack = await Client.open(broker, "me", clean_start=True)
            assert connack[0] == 0
            three.send(publish("a", b"x", 1))
            assert await three.packet() == (0x40, b"\x00\x01\x10")
            four, connack = await Client.open(broker, "me", clean_start=True)
            assert await three.closed() == 0x8E
            four.send(packet(0xE0, b""))
            assert await four.closed() is None
            await until(lambda: not broker._sessions)

    run(main())


def test_a_silent_client_is_disconnected() -> None:
    async def main() -> None:
        async with embedded() as broker:
            client, _ = await Client.open(broker, keep_alive_s=1)
            client.send(b"\xc0\x00")
            assert await client.packet() == (0xD0, b"")
            assert await client.closed() == 0x8D

    run(main())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x30\xff\xff\xff\xff", 0x81),
        (b"\x30\xff\xff\xff\x7f", 0x95),
        (b"\x00\x00", 0x82),
        (b"\x31\x00", 0x81),
        (b"\x30\x04\x00\x05ab", 0x81),
        (publish("", b"x"), 0x90),
        (publish("a/+", b"x"), 0x90),
        (packet(0x30, b"\x00\x01\xff\x00x"), 0x81),
        (packet(0x32, b"\x00\x01a\x00\x00\x00x"), 0x82),
        (packet(0x34, b"\x00\x01a\x00\x01\x00x"), 0x9B),
        (packet(0x36, b"\x00\x01a\x00\x01\x00x"), 0x81),
        (publish("a", b"x", properties=b"\x23\x00\x01"), 0x94),
        (publish("a", b"x", properties=b"\x0b\x01"), 0x82),
        (publish("a", b"x", properties=b"\x01"), 0x81),
        (packet(0x80, b"\x00\x01\x00\x00\x01a\x00"), 0x81),
        (packet(0x82, b"\x00\x01\x00"), 0x82),
        (packet(0x82, b"\x00\x01\x00\x00\x01a\x03"), 0x81),
        (packet(0x82, b"\x00\x01\x02\x0b\x01\x00\x01a\x00"), 0xA1),
        (packet(0x82, b"\x00"), 0x81),
        (packet(0x40, b"\x00\x01"), 0x82),
        (packet(0x10, b"\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x00"), 0x82),
        (packet(0xF0, b""), 0x82),
    ],
)
@pytest.mark.parametrize("bytewise", [False, True])
def test_malformed_packets_close_only_their_connection(
    data: bytes, reason: int, bytewise: bool
) -> None:
    async def main() -> None:
        async with embedded() as broker:
            good, _ = await Client.open(broker)
            await good.subscribe("a")
            bad, _ = await Client.open(broker)
            if bytewise:
                for i in range(len(data)):
                    bad.send(data[i : i + 1])
                    await asyncio.sleep(0)
            else:
                bad.send(data)
            assert await bad.closed() == reason
            good.send(publish("a", b"x"))
            assert (await good.publish()).payload == b"x"
            good.writer.close()

    run(main())


@pytest.mark.parametrize(
    "data",
    [
        publish("a", b"x", 1),
        b"\xc0\x00",
        packet(0x10, b"\x00\x04MQTT\x05\x03\x00\x00\x00\x00\x00"),
        packet(0x10, b"\x00\x04MQTT\x05\x02"),
        packet(0x10, b""),
        packet(0x10, b"\x00\x04XQTT\x05\x02\x00\x00\x00\x00\x00"),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_connect_is_closed_without_a_word(data: bytes) -> None:
    async def main() -> None:
        async with embedded() as broker:
            client = await Client.bare(broker)
            client.send(data)
            assert await client.closed() is None

    run(main())


def test_random_bytes_never_reach_the_other_clients(caplog: pytest.LogCaptureFixture) -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    caplog.set_level(logging.ERROR, "asyncio")  # an exception in a callback is logged there

    async def main() -> None:
        async with embedded() as broker:
            good, _ = await Client.open(broker)
            await good.subscribe("nothing/of/that/name")
            for _ in range(150):
                bad, _ = await Client.open(broker)
                first = draw.choice([0x30, 0x32, 0x82, 0xA2, 0xE0, 0x10, draw.randrange(256)])
                body = draw.randbytes(draw.randrange(24))
                if draw.random() < 0.5:
                    body = b"\x00\x01" + body
                bad.send(packet(first, body) + draw.randbytes(3))
                bad.writer.write_eof()
                await bad.closed()
                bad.writer.close()
            good.send(b"\xc0\x00")
            assert await good.packet() == (0xD0, b"")
            good.writer.close()

    run(main())
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR], f"seed {seed}"


def test_a_slow_watcher_costs_bounded_memory_and_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded_broker, "WATCHER_BYTES_MAX", 200_000)

    async def main() -> None:
        async with embedded() as broker:
            slow, _ = await Client.open(broker)
            await slow.subscribe("a")
            slow.reader._transport.pause_reading()  # type: ignore[attr-defined]
            good, _ = await Client.open(broker)
            await good.subscribe("a")
            sender, _ = await Client.open(broker)
            biggest, sent = 0, 0
            while broker.left_out < 50 or sent < 500:
                sender.send(publish("a", b"x" * 20_000, 1))
                sent += 1
                assert (await good.publish()).payload == b"x" * 20_000
                assert (await sender.packet())[0] == 0x40
                biggest = max(c._transport.get_write_buffer_size() for c in broker.clients)
                assert biggest < 300_000
            slow.reader._transport.resume_reading()  # type: ignore[attr-defined]
            assert (await slow.publish()).payload == b"x" * 20_000
            for client in (slow, good, sender):
                client.writer.close()

    run(main())
    assert sum("too slowly" in r.getMessage() for r in caplog.records) == 1


def test_a_watchers_packet_limit_is_obeyed() -> None:
    async def main() -> None:
        async with embedded() as broker:
            client = await Client.bare(broker)
            body = b"\x00\x04MQTT\x05\x02\x00\x00\x05\x27\x00\x00\x00\x14\x00\x01c"
            client.send(packet(0x10, body))
            await client.packet()
            await client.subscribe("a")
            client.send(publish("a", b"x" * 30) + publish("a", b"short"))
            assert (await client.publish()).payload == b"short"
            client.writer.close()

    run(main())


def test_a_busy_port_is_an_os_error() -> None:
    async def main() -> None:
        async with embedded() as broker:
            with pytest.raises(OSError):
                await EmbeddedBroker("127.0.0.1", broker.port).start()

    run(main())


def test_the_log_says_that_it_is_for_development(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with embedded():
            pass

    run(main())
    assert any("development only" in r.getMessage() for r in caplog.records)


def test_closing_says_goodbye() -> None:
    async def main() -> None:
        async with embedded() as broker:
            client, _ = await Client.open(broker)
        assert await client.closed() == 0x8B

    run(main())
