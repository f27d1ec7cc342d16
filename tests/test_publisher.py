"""The publisher against brokers that misbehave , and a real Mosquitto."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.dead_letters import DeadLettersFull
from gateway.errors import ConfigError
from gateway.mqtt import LinkStatus
from gateway.mqtt_link import connect_failure
from gateway.mqtt_settings import MqttConfig
from gateway.publisher import Publisher
from gateway.retry import Backoff, Kind
from tests import brokers, mosquitto
from tests.brokers import Peer, Publish, ScriptedBroker
from tests.certificates import make_certificates
from tests.own_mount import on_tmpfs
from tests.publishing import (
    MemoryShelf,
    Source,
    drained,
    event,
    numbers,
    publishing,
    run,
    scripted,
    settings,
    until,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    source = Source(tmp_path)
    yield source
    source.close()


# ---- the way it should go ---------------------------------------------------------------------


def test_events_are_published_in_order_with_qos_1(source: Source) -> None:
    source.add(3)
    seen: list[Publish] = []

    async def script(peer: Peer) -> None:
        connect = await peer.accept()
        assert (connect.level, connect.clean_start, connect.client_id) == (5, True, "gw")
        for _ in range(5):
            seen.append(await peer.publish())
            peer.puback(seen[-1].id)
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: source.published == 3)
        source.add(2)  # woken, not polled
        publisher.on_committed()
        await drained(publisher, broker)

    scripted(source, script, check)
    assert numbers(seen) == [0, 1, 2, 3, 4]
    assert all(p.topic == "telemetry/dev-1" and p.qos == 1 and not p.dup for p in seen)
    assert source.log.unexplained(0) == 0
    assert source.counter("publish_sent") == source.published == 5
    assert source.counter("publish_repeated") == 0
    assert source.counter("mqtt_connects") == 1
    assert source.counter("mqtt_connected") == 0  # closed by now


def test_a_planned_end_says_goodbye(source: Source) -> None:
    last: list[tuple[int, bytes]] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        with contextlib.suppress(EOFError):
            while True:
                last.append(await peer.packet())

    async def main() -> None:
        async with ScriptedBroker(script) as broker:
            async with publishing(source, broker.port) as publisher:
                await until(lambda: publisher.status.state == "connected")
            await until(lambda: last)
            assert publisher.status.state == "closed"

    run(main())
    assert last == [(0xE0, b"\x00\x00")]


def test_drain_gives_up_at_its_deadline(source: Source) -> None:
    source.add(1)

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.window.in_flight)
        assert not await publisher.drain(0.05)
        assert not publisher.idle

    scripted(source, script, check)
    assert source.published == 0


def test_user_and_password_are_sent(source: Source, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_bytes(b"s3cret\n")
    seen: list[brokers.Connect] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.accept())
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.ok)

    scripted(source, script, check, username="me", password_file=str(file))
    assert (seen[0].username, seen[0].password) == ("me", b"s3cret")


def test_client_id_defaults_to_the_logs_identity(source: Source) -> None:
    publisher = Publisher(source.log, 0, settings(1, client_id=None), source.shelf)
    assert publisher.connections[0].client_id == f"gateway-{source.log.identity:016x}"


def test_an_assigned_client_id_is_kept(source: Source) -> None:
    seen: list[str] = []

    async def script(peer: Peer) -> None:
        connect = await peer.connect()
        seen.append(connect.client_id)
        peer.send(brokers.connack(properties=b"\x12\x00\x03abc"))
        if peer.number == 0:
            peer.close()
        else:
            await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: len(seen) > 1 and publisher.status.ok)

    scripted(source, script, check, client_id="")
    assert seen == ["", "abc"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"url": None}, "mqtt.url"),
        ({"topic": "a/+"}, "mqtt.topic: must not have the wildcards"),
        ({"url": "mqtts://h", "ca_file": "/nonexistent"}, "mqtt.ca_file"),
        ({"url": "mqtts://h", "cert_file": "/no", "key_file": "/no"}, "mqtt.cert_file"),
        ({"url": "mqtts://h", "alpn": "x" * 256}, "mqtt.alpn"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    source: Source, changes: dict[str, Any], names: str
) -> None:
    with pytest.raises(ConfigError, match=names):
        Publisher(source.log, 0, settings(1, **changes), source.shelf)


# ---- PUBACKs ----------------------------------------------------------------------------------


def test_pubacks_out_of_order_move_the_cursor_over_the_prefix(source: Source) -> None:
    source.add(3)
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        first, second, third = await peer.publishes(3)
        peer.puback(third.id)
        peer.puback(second.id)
        await go.wait()
        peer.puback(first.id)
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.window.in_flight == 1)
        assert source.published == 0
        go.set()
        await drained(publisher, broker)

    scripted(source, script, check)
    assert source.published == 3


def test_pubacks_in_single_bytes_count(source: Source) -> None:
    source.add(3)

    async def script(peer: Peer) -> None:
        await peer.accept()
        data = b"".join(brokers.puback(p.id, 0x10, "nobody") for p in await peer.publishes(3))
        await peer.send_bytewise(data)
        await peer.left()

    scripted(source, script, drained)
    assert source.published == 3


def test_a_thousand_pubacks_in_one_segment_count(source: Source) -> None:
    source.add(1000)

    async def script(peer: Peer) -> None:
        await peer.accept()
        peer.send(b"".join(brokers.puback(p.id) for p in await peer.publishes(1000)))
        await peer.left()

    scripted(source, script, drained)
    assert source.published == 1000


@pytest.mark.parametrize("receive_maximum", [1, 2, 7])
def test_receive_maximum_is_obeyed_while_the_window_slides(
    source: Source, receive_maximum: int
) -> None:
    source.add(20)
    seen: list[Publish] = []

    async def script(peer: Peer) -> None:
        await peer.accept(properties=brokers.receive_maximum(receive_maximum))
        flying = await peer.publishes(receive_maximum)
        assert await peer.silence(0.05)
        while len(seen) < 20:
            seen.append(flying.pop(0))
            peer.puback(seen[-1].id)
            if len(seen) + len(flying) < 20:
                flying.append(await peer.publish())  # refilled, not waited empty
        await peer.left()

    scripted(source, script, drained)
    assert numbers(seen) == list(range(20))


@pytest.mark.parametrize("wrong", ["unknown", "repeated", "zero"])
def test_a_puback_for_nothing_in_flight_is_a_protocol_error(source: Source, wrong: str) -> None:
    source.add(3)
    ends: list[tuple[int, bytes]] = []
    starts: list[bool] = []

    async def script(peer: Peer) -> None:
        starts.append((await peer.accept()).clean_start)
        first, *_ = await peer.publishes(3 if peer.number == 0 else 2)
        peer.puback(first.id)
        if peer.number == 0:
            peer.puback({"unknown": 999, "repeated": first.id, "zero": 0}[wrong])
            ends.append(await peer.packet())
            await peer.left()
        else:
            peer.puback(first.id + 1)
            await peer.acknowledge_all()

    scripted(source, script, drained)
    assert ends == [(0xE0, b"\x82\x00")]
    assert starts == [True, True]  # its session is not trusted
    assert source.published == 3


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00",
        b"\x42\x02\x00\x01",
        b"\xd0\xff\xff\xff\xff",
        b"\x30\x04\x00\x01t\x00",
        b"\xf0\x00",
    ],
    ids=["type 0", "flags", "length", "publish", "auth"],
)
def test_other_breaches_of_the_protocol_end_the_connection(source: Source, data: bytes) -> None:
    source.add(1)

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.publish()
        if peer.number == 0:
            peer.send(data)
            assert await peer.packet() == (0xE0, b"\x82\x00")
            await peer.left()
        else:
            peer.puback(2)
            await peer.left()

    scripted(source, script, drained)


def test_no_puback_drops_the_connection_and_resumes_the_session(source: Source) -> None:
    source.add(3)
    seen: list[list[Publish]] = []

    async def script(peer: Peer) -> None:
        connect = await peer.accept(session_present=peer.number > 0)
        assert connect.clean_start == (peer.number == 0)
        assert connect.properties[:1] == b"\x11"  # session expiry
        if peer.number == 0:
            seen.append(await peer.publishes(3))
            peer.puback(seen[0][1].id)
            assert await peer.silence(0.15)  # no resend by a timer
            await peer.left()
        else:
            seen.append(await peer.publishes(2))
            for publish in seen[1]:
                peer.puback(publish.id)
            await peer.left()

    scripted(source, script, drained, puback_timeout_ms=200)
    assert [(p.id, p.dup) for p in seen[1]] == [(seen[0][0].id, True), (seen[0][2].id, True)]
    assert [p.payload for p in seen[1]] == [seen[0][0].payload, seen[0][2].payload]
    assert source.published == 3
    assert source.counter("publish_repeated") == 2


def test_a_forgotten_session_is_published_again_from_the_cursor(source: Source) -> None:
    source.add(3)
    seen: list[list[Publish]] = []

    async def script(peer: Peer) -> None:
        await peer.accept()  # session present: no
        if peer.number == 0:
            seen.append(await peer.publishes(3))
            peer.puback(seen[0][0].id)
            peer.puback(seen[0][2].id)
            await until(lambda: source.published == 1)
            peer.reset()
        else:
            seen.append([])
            for _ in range(2):  # one by one: what was in flight is suspect
                seen[1].append(await peer.publish())
                assert await peer.silence(0.02)
                peer.puback(seen[1][-1].id)
            await peer.left()

    scripted(source, script, drained)
    assert numbers(seen[1]) == [1, 2]
    assert not any(p.dup for p in seen[1])
    assert not {p.id for p in seen[0]} & {p.id for p in seen[1]}
    assert source.log.unexplained(0) == 0


@pytest.mark.parametrize("reason", [0x80, 0x83, 0x97, 0xC0])
def test_a_refused_record_is_tried_again_until_it_is_accepted(
    source: Source, reason: int, caplog: pytest.LogCaptureFixture
) -> None:
    source.add(5)
    seen: list[Publish] = []
    times: list[float] = []

    async def script(peer: Peer) -> None:
        await peer.accept(properties=brokers.receive_maximum(3))
        first, second, third = await peer.publishes(3)
        peer.puback(second.id, reason, "not now\n")
        assert await peer.silence(0.05)  # nothing new, and no retry before the rest is home
        peer.puback(first.id)
        peer.puback(third.id)
        for attempt in range(3):  # alone, with a new id, no DUP
            publish = await peer.publish()
            times.append(asyncio.get_running_loop().time())
            assert numbers([publish]) == [1]
            assert not publish.dup
            assert publish.id not in (first.id, second.id, third.id)
            assert await peer.silence(0.01)
            peer.puback(publish.id, reason if attempt < 2 else 0)
        for _ in range(3):
            seen.append(await peer.publish())
            peer.puback(seen[-1].id)
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.state == "held")
        assert source.published <= 1
        assert f"0x{reason:02X}" in publisher.status.last_error
        assert "telemetry/dev-1" in publisher.status.last_error
        await drained(publisher, broker)
        assert publisher.status.state == "draining"

    scripted(source, script, check, {"draw": lambda: 1.0}, backoff_base_ms=20)
    assert times[1] - times[0] > 0.035  # patience: 20 ms, 40 ms, 40 ms
    assert times[2] - times[1] > 0.035
    assert numbers(seen) == [2, 3, 4]  # the order of the log after the hold
    assert source.published == 5
    assert source.log.unexplained(0) == 0
    assert source.counter("mqtt_negative_acks") == 3
    record = next(r for r in caplog.records if "refuses" in r.getMessage())
    assert record.levelno == logging.WARNING
    assert source.letters == []
    assert r"not now\u000a" in record.getMessage()


@pytest.mark.parametrize("reason", [0x87, 0x90, 0x99])
def test_a_record_refused_for_good_is_set_aside_while_the_rest_is_in_flight(
    source: Source, reason: int, caplog: pytest.LogCaptureFixture
) -> None:
    source.add(8)
    seen: list[Publish] = []

    async def script(peer: Peer) -> None:
        await peer.accept(properties=brokers.receive_maximum(3))
        first, second, third = await peer.publishes(3)
        peer.puback(second.id, reason, "never\n")
        seen.append(await peer.publish())  # at once, and with the others still out
        peer.puback(first.id)
        seen.extend(await peer.publishes(1))
        for publish in (third, *seen):
            peer.puback(publish.id)
        for _ in range(3):  # as wide as before: no probing behind a dead letter
            seen.append(await peer.publish())
        for publish in seen[-3:]:
            peer.puback(publish.id)
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await drained(publisher, broker)
        assert publisher.status.state == "draining"

    scripted(source, script, check)
    assert numbers(seen) == [3, 4, 5, 6, 7]
    (letter,) = source.letters
    assert (letter.reason, letter.text, letter.attempts) == (reason, r"never\u000a", 1)
    assert (letter.topic, letter.poison) == ("telemetry/dev-1", False)
    assert letter.record.body == event(1)
    cursor = source.log.cursor(0)
    assert (cursor.published, cursor.dead_lettered, source.log.unexplained(0)) == (7, 1, 0)
    assert source.log.state_of(letter.record.lsn) == "dead_lettered"
    (alarm,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert f"0x{reason:02X}" in alarm
    assert "topic telemetry/dev-1" in alarm
    assert "gateway dead-letters ls" in alarm


def test_a_topic_tree_that_is_refused_is_set_aside_with_few_syncs(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    source.add(5000)

    async def script(peer: Peer) -> None:
        await peer.accept()
        for _ in range(5000):
            peer.puback((await peer.publish()).id, 0x87, "not yours")
        await peer.left()

    scripted(source, script, drained)
    assert source.dead == list(range(5000))
    assert isinstance(source.shelf, MemoryShelf)
    assert len(source.shelf.batches) < 250, source.shelf.batches
    assert source.log.cursor(0).dead_lettered == 5000
    errors = [r for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1


def test_a_packet_above_the_brokers_maximum_is_set_aside_unsent(source: Source) -> None:
    source.add(3000)
    seen: list[Publish] = []

    async def script(peer: Peer) -> None:
        await peer.accept(properties=brokers.packet_bytes_max(2 + 2 + 15 + 2 + 1 + len(event(10))))
        for _ in range(100):
            seen.append(await peer.publish())
            peer.puback(seen[-1].id)
        await peer.left()

    scripted(source, script, drained)
    assert numbers(seen) == list(range(100))  # those with two digits are small enough
    assert source.dead == list(range(100, 3000))
    assert {letter.reason for letter in source.letters} == {0x95}
    assert source.letters[0].attempts == 0
    assert source.letters[0].text == "not sent: a packet of 71 bytes"
    assert isinstance(source.shelf, MemoryShelf)
    assert len(source.shelf.batches) < 10, source.shelf.batches


def test_dead_letters_that_cannot_be_kept_hold_the_cursor(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    source.add(4)
    assert isinstance(source.shelf, MemoryShelf)
    shelf = source.shelf
    sends: list[Publish] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        for n in range(4):
            sends.append(await peer.publish())
            peer.puback(sends[-1].id, 0x90 if n in (1, 2) else None)
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        for error, state in (
            (OSError(28, "No space left on device"), "held"),
            (DeadLettersFull(Path("x"), 8), "dead_letters_full"),
        ):
            shelf.error = error
            publisher.on_committed()
            await until(lambda state=state: publisher.status.state == state)
            before = shelf.tries
            await until(lambda before=before: shelf.tries > before + 2)
            assert source.log.cursor(0).ordinal == source.published == 1
            assert not publisher.status.ok
        shelf.error = None
        await drained(publisher, broker)
        assert publisher.status.ok

    shelf.error = OSError(28, "No space left on device")
    scripted(source, script, check)
    assert source.dead == [1, 2]
    assert len(sends) == 4  # nothing is sent again for it
    texts = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(texts) == 3  # each alarm once, and the dead letters at last
    assert "No space left on device" in texts[0]
    assert "gateway dead-letters requeue" in texts[1]


@pytest.mark.parametrize("again", ["before the mark", "after the mark"])
def test_a_connection_lost_while_dead_letters_are_written_doubles_nothing(
    source: Source, again: str
) -> None:
    source.add(5)
    assert isinstance(source.shelf, MemoryShelf)
    shelf = source.shelf
    shelf.wait = threading.Event()
    first_lsn = source.log.cursor(0).lsn

    async def script(peer: Peer) -> None:
        await peer.accept()
        if peer.number == 0:
            publishes = await peer.publishes(5)
            for publish in publishes[:2]:
                peer.puback(publish.id, 0x87)
            peer.puback(publishes[2].id)
            await until(lambda: shelf.tries)
            peer.send(brokers.disconnect(0x8B))
            peer.close()
        else:
            first = await peer.publish()
            assert shelf.wait is not None
            if again == "after the mark":
                shelf.wait.set()
                await until(lambda: source.log.state_of(first_lsn) == "dead_lettered")
            peer.puback(first.id, 0x87)  # refused once more
            await asyncio.sleep(0.05)
            shelf.wait.set()
            await peer.acknowledge_all()

    scripted(source, script, drained)
    assert sorted(source.dead) == [0, 1]
    cursor = source.log.cursor(0)
    assert (cursor.published, cursor.dead_lettered, source.log.unexplained(0)) == (3, 2, 0)


def test_a_record_that_is_marked_already_is_neither_sent_nor_written(source: Source) -> None:
    source.add(3)
    record = source.log.read(source.log.cursor(0).lsn)
    assert record is not None
    assert source.log.mark_dead(0, record.lsn, record.epoch)
    seen: list[Publish] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        seen.extend(await peer.publishes(2))
        for publish in seen:
            peer.puback(publish.id)
        await peer.left()

    scripted(source, script, drained)
    assert numbers(seen) == [1, 2]
    assert source.letters == []
    assert source.log.cursor(0).dead_lettered == 1


def test_a_packet_id_that_the_broker_thinks_in_use_asks_for_a_new_session(source: Source) -> None:
    source.add(2)
    starts: list[bool] = []

    async def script(peer: Peer) -> None:
        starts.append((await peer.accept()).clean_start)
        if peer.number == 0:
            peer.puback((await peer.publish()).id, 0x91)
            await peer.left()
        else:
            await peer.acknowledge_all()

    scripted(source, script, drained)
    assert starts == [True, True]
    assert source.published == 2


# ---- connections ------------------------------------------------------------------------------


def test_a_broker_that_is_away_is_found_when_it_is_back(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    source.add(2)
    port = mosquitto.free_port()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.acknowledge_all()

    async def main() -> None:
        async with publishing(source, port) as publisher:
            await until(lambda: source.counter("mqtt_connect_failures") > 3)
            assert publisher.status.state in ("waiting", "connecting")
            assert f"mqtt://127.0.0.1:{port}" in publisher.status.last_error
            async with ScriptedBroker(script, port):
                await until(lambda: source.published == 2)

    run(main())
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1  # once, not at each attempt
    assert "is the broker running?" in warnings[0].getMessage()


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_connection_that_breaks_is_made_again(source: Source, how: str) -> None:
    source.add(2)

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.publish()
        if peer.number < 3:
            getattr(peer, how)()
        else:
            peer.puback(5)  # 1 and 2, then one by one 3, 4, 5, 6
            peer.puback((await peer.publish()).id)
            await peer.left()

    scripted(source, script, drained, poison_attempts=3)
    assert source.counter("mqtt_disconnects") >= 3
    assert source.published == 2


def test_a_broker_that_never_sends_connack_is_given_up(source: Source) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: len(broker.peers) > 1)
        assert "no CONNACK within mqtt.connect_timeout_ms = 100" in publisher.status.last_error

    scripted(source, script, check, connect_timeout_ms=100)


def test_a_close_before_connack_names_mqtt_5(source: Source) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        peer.close()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.last_error)
        assert "MQTT 5" in publisher.status.last_error

    scripted(source, script, check)


@pytest.mark.parametrize(
    "answer",
    [b"\x20\x02\x00\x01", b"\x20\x02\x00\x00", b"\x20\x03\x00\x84\x00", b"\x20\x03\x00\x01\x00"],
)
def test_a_broker_of_mqtt_311_gets_a_message_that_names_mqtt_5(
    source: Source, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        peer.send(answer)
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.state == "refused")
        assert "MQTT 5" in publisher.status.last_error
        await until(lambda: len(broker.peers) == 3)
        gaps = [b - a for a, b in zip(broker.times, broker.times[1:], strict=False)]
        assert min(gaps) > 0.045  # half the cap or more: no tight loop

    scripted(source, script, check, backoff_max_ms=100)
    assert [r.levelname for r in caplog.records if "MQTT 5" in r.getMessage()] == ["ERROR"]


@pytest.mark.parametrize(
    ("reason", "step"),
    [(0x86, "mqtt.username"), (0x87, "allow this client"), (0x8A, "operator"), (0x85, "client_id")],
)
def test_a_connack_that_refuses_raises_an_alarm_without_a_tight_loop(
    source: Source, reason: int, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept(reason=reason, properties=b"\x1f\x00\x03bad")
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.state == "refused")
        assert f"0x{reason:02X}" in publisher.status.last_error
        assert "(bad)" in publisher.status.last_error
        assert step in publisher.status.last_error
        await until(lambda: len(broker.peers) == 3)
        assert broker.times[-1] - broker.times[0] > 0.09
        assert source.counter("mqtt_connects") == 0

    scripted(source, script, check, backoff_max_ms=100)
    errors = [r for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1  # an alarm, not a flood


def test_a_broker_of_qos_0_is_refused(source: Source) -> None:
    source.add(1)

    async def script(peer: Peer) -> None:
        await peer.accept(properties=brokers.qos_max(0))
        assert await peer.silence(0.05)

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.state == "refused")
        assert "QoS 0" in publisher.status.last_error

    scripted(source, script, check)


def test_session_present_unasked_is_a_protocol_error(source: Source) -> None:
    source.add(1)

    async def script(peer: Peer) -> None:
        connect = await peer.accept(session_present=peer.number == 0)
        assert connect.clean_start
        if peer.number == 0:
            await peer.left()
        else:
            await peer.acknowledge_all()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.last_error)
        assert "session present" in publisher.status.last_error
        await drained(publisher, broker)

    scripted(source, script, check)


def test_the_reason_of_a_disconnect_is_named(source: Source) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        peer.send(brokers.disconnect(0x98))
        peer.close()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.last_error)
        assert "0x98 administrative action" in publisher.status.last_error

    scripted(source, script, check)


def test_a_session_taken_over_is_not_taken_back_at_once(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(peer: Peer) -> None:
        assert (await peer.accept()).clean_start
        peer.send(brokers.disconnect(0x8E))
        peer.close()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.state == "taken_over")
        assert "second gateway" in publisher.status.last_error
        await until(lambda: len(broker.peers) == 3)
        gaps = [b - a for a, b in zip(broker.times, broker.times[1:], strict=False)]
        assert min(gaps) > 0.045

    scripted(source, script, check, backoff_max_ms=100)
    assert any(r.levelname == "ERROR" for r in caplog.records)


def test_accept_and_close_does_not_reset_the_backoff(source: Source) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        peer.close()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: len(broker.peers) == 7)
        gaps = [b - a for a, b in zip(broker.times, broker.times[1:], strict=False)]
        for n, gap in enumerate(gaps):
            assert gap >= 0.005 * 2**n - 0.002, gaps

    scripted(source, script, check, {"draw": lambda: 1.0}, backoff_base_ms=5, backoff_max_ms=9999)


@pytest.mark.parametrize("proof", ["time", "puback"])
def test_a_stable_connection_resets_the_backoff(source: Source, proof: str) -> None:
    source.add(1)

    async def script(peer: Peer) -> None:
        await peer.accept()
        publish = await peer.publish()
        if peer.number >= 4:
            if proof == "puback":
                peer.puback(publish.id)
            await peer.silence(0.1)
            if proof == "puback":
                source.add(1)
        peer.close()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: len(broker.peers) == 6)
        assert publisher.connections[0].backoff.attempts == 1

    bounds = {"time": (0.08, 99.0), "puback": (99.0, 0.08)}[proof]
    options = {"stable_s": bounds[0], "stable_with_ack_s": bounds[1]}
    scripted(source, script, check, options, poison_attempts=100)


def test_backoff_is_full_jitter_under_a_cap() -> None:
    draws = iter([0.5] * 6 + [0.0])
    backoff = Backoff(1.0, 10.0, lambda: next(draws))
    assert [backoff.next_s() for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, 5.0]
    assert backoff.long_s() == 7.5
    assert backoff.next_s() == 0.0
    backoff.attempts = 100_000
    draws = iter([1.0])
    assert backoff.next_s() == 10.0


def test_keep_alive_pings_and_finds_a_silent_broker(source: Source) -> None:
    pings: list[float] = []

    async def script(peer: Peer) -> None:
        connect = await peer.accept()
        assert connect.keep_alive_s == 1
        if peer.number:
            await peer.left()
            return
        for answered in (True, False):
            assert await peer.packet() == (0xC0, b"")
            pings.append(time.monotonic())
            if answered:
                peer.send(b"\xd0\x00")
        await peer.left()
        pings.append(time.monotonic())

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: len(broker.peers) == 2)
        assert "silent" in publisher.status.last_error

    scripted(source, script, check, keep_alive_s=1)
    assert 0.9 < pings[1] - pings[0] < 1.4
    assert pings[2] - pings[1] < 0.9  # 1.5 × keep-alive after the last sign of life


def test_the_servers_keep_alive_replaces_ours(source: Source) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept(properties=brokers.server_keep_alive_s(1))
        assert await peer.packet() == (0xC0, b"")
        peer.send(b"\xd0\x00")
        source.add(1)
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: source.count == 1)

    scripted(source, script, check, keep_alive_s=600)


def test_a_broker_that_does_not_read_costs_no_memory(tmp_path: Path) -> None:
    source = Source(tmp_path, 32 << 20)
    source.add(100_000)
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        peer._reader._transport.pause_reading()  # type: ignore[attr-defined]
        await go.wait()
        peer._reader._transport.resume_reading()  # type: ignore[attr-defined]
        await peer.acknowledge_all()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.window.in_flight > 1000)
        sizes = []
        for _ in range(20):
            link = publisher.connections[0].link
            assert link is not None
            assert link._transport is not None
            sizes.append(link._transport.get_write_buffer_size())
            publisher.on_committed()
            await asyncio.sleep(0)
        assert max(sizes) < 300_000
        go.set()
        assert await publisher.drain(15)

    scripted(source, script, check, inflight_max=65535)
    assert source.published == 100_000
    source.close()


def test_status_is_seen_by_other_processes(source: Source, tmp_path: Path) -> None:
    file = tmp_path / "mqtt.status"
    seen: list[str] = []

    async def script(peer: Peer) -> None:
        await peer.accept(reason=0x86 if peer.number == 0 else 0)
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: LinkStatus.read(file).state == "refused")
        await until(lambda: LinkStatus.read(file).ok)
        assert "0x86" in LinkStatus.read(file).last_error

    options = {"status_file": file, "on_status": lambda status: seen.append(status.state)}
    scripted(source, script, check, options, poison_attempts=100)
    assert LinkStatus.read(file).state == "closed"
    assert seen == ["connecting", "refused", "connecting", "connected", "closed"]


# ---- TLS --------------------------------------------------------------------------------------


def test_status_that_cannot_be_written_leaves_no_more_than_one_file(tmp_path: Path) -> None:
    target = tmp_path / "status.json"
    target.mkdir()  # os.replace fails; a full disk fails a step before
    write = (
        "import sys; from pathlib import Path; from gateway.mqtt import LinkStatus;"
        "LinkStatus().write(Path(sys.argv[1]))"
    )
    for _ in range(3):  # three delivery processes
        ended = subprocess.run([sys.executable, "-c", write, target], stderr=subprocess.DEVNULL)
        assert ended.returncode == 1
    assert list(tmp_path.iterdir()) == [target]


def test_status_is_seen_on_a_full_disk(tmp_path: Path) -> None:
    script = """
import errno, sys
from pathlib import Path
from gateway.mqtt import LinkStatus
file = Path(sys.argv[1]) / "status.json"
LinkStatus(state="connected").write(file)
try:
    with open(Path(sys.argv[1]) / "ballast", "wb", 0) as ballast:
        while True:
            ballast.write(bytes(4096))
except OSError as error:
    assert error.errno == errno.ENOSPC
for state in ("held", "dead_letters_full", "held"):
    LinkStatus(state=state).write(file)
    assert LinkStatus.read(file).state == state
"""
    (tmp_path / "script.py").write_text(script)
    run = f'PYTHONPATH=. "{sys.executable}" "{tmp_path}/script.py" "$MOUNT"; ls "$MOUNT"'
    done = on_tmpfs(tmp_path / "mount", run, size="128k")
    assert done.stdout.split() == ["ballast", "status.json"], done.stderr


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def test_tls_with_client_certificate_alpn_and_sni(source: Source, certificates: Path) -> None:
    source.add(1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["mqtt"])
    names: list[str] = []
    context.sni_callback = lambda sock, name, _: names.append(name)
    seen: list[Any] = []

    async def script(peer: Peer) -> None:
        tls = peer._writer.get_extra_info("ssl_object")
        seen.append((tls.selected_alpn_protocol(), tls.getpeercert()["subject"]))
        await peer.accept()
        await peer.acknowledge_all()

    async def main() -> None:
        async with (
            ScriptedBroker(script, tls=context) as broker,
            publishing(
                source,
                broker.port,
                url=f"mqtts://127.0.0.1:{broker.port}",
                ca_file=str(certificates / "ca.pem"),
                cert_file=str(certificates / "client.pem"),
                key_file=str(certificates / "client.key"),
                alpn="mqtt",
                server_name="broker.test",
            ) as publisher,
        ):
            await drained(publisher, broker)

    run(main())
    assert names == ["broker.test"]
    assert seen == [("mqtt", ((("commonName", "client"),),))]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ca_file": "other.pem"}, "mqtt.ca_file"),
        ({"ca_file": "ca.pem", "server_name": "wrong.test"}, "wrong.test"),
        ({"ca_file": "ca.pem", "server_name": "broker.test"}, "TLS"),
    ],
    ids=["wrong CA", "wrong name", "no client certificate"],
)
def test_tls_that_fails_is_an_alarm_without_a_tight_loop(
    source: Source, certificates: Path, changes: dict[str, str], says: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    changes = changes | {"ca_file": str(certificates / changes["ca_file"])}
    changes.setdefault("server_name", "broker.test")

    async def script(peer: Peer) -> None:
        await peer.connect()
        raise AssertionError("CONNECT was sent")

    async def main() -> None:
        async with ScriptedBroker(script, tls=context) as broker:
            url = f"mqtts://127.0.0.1:{broker.port}"
            async with publishing(source, broker.port, url=url, **changes) as publisher:
                await until(lambda: source.counter("mqtt_connect_failures") == 1)
                assert publisher.status.state == "refused"
                assert says in publisher.status.last_error
                start = time.monotonic()
                await until(lambda: source.counter("mqtt_connect_failures") == 3)
                assert time.monotonic() - start > 0.035

    run(main())


def test_tls_spoken_to_a_plain_port_is_named(source: Source) -> None:
    async def script(peer: Peer) -> None:
        await peer._reader.read(1)
        peer.send(b"\x20\x02\x00\x01")
        peer.close()

    async def main() -> None:
        async with ScriptedBroker(script) as broker:
            url = f"mqtts://127.0.0.1:{broker.port}"
            async with publishing(source, broker.port, url=url) as publisher:
                await until(lambda: publisher.status.last_error)
                assert "is this a TLS port" in publisher.status.last_error

    run(main())


def test_a_host_that_is_not_found_is_an_alarm(source: Source) -> None:
    async def main() -> None:
        async with publishing(source, 1, url="mqtt://no-such-host.invalid") as publisher:
            await until(lambda: publisher.status.last_error)
            assert publisher.status.state == "refused"
            assert "no-such-host.invalid" in publisher.status.last_error

    run(main())


def test_a_name_server_that_does_not_answer_is_asked_again_soon() -> None:
    settings = MqttConfig(url="mqtt://broker")
    broker = settings.broker
    assert broker is not None

    def kind(number: int) -> Kind:
        error = socket.gaierror(number, "no")
        return connect_failure(error, broker, settings).kind

    assert kind(socket.EAI_AGAIN) is Kind.AWAY
    assert kind(socket.EAI_NONAME) is Kind.REFUSED


def test_alarms_that_take_turns_are_no_flood(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept(reason=0x87 if peer.number % 2 else 0x88)
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: len(broker.peers) == 8)

    scripted(source, script, check, backoff_max_ms=20)
    alarms = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(alarms) == len({text.partition("; next attempt")[0] for text in alarms}) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"url": "mqtt://a..b"},
        {"url": "mqtt://" + "a" * 64},
        {"url": "mqtt://."},
        {"username": "u" * 65536},
        {"password": "p" * 65536},
    ],
    ids=["empty label", "long label", "dot", "long user name", "long password"],
)
def test_settings_that_no_connect_can_carry_are_an_alarm(
    source: Source, changes: dict[str, Any]
) -> None:
    async def main() -> None:
        async with (
            ScriptedBroker(lambda peer: peer.left()) as broker,
            publishing(source, broker.port, **changes) as publisher,
        ):
            await until(lambda: publisher.status.last_error)
            assert publisher.status.state == "refused"
            assert "check mqtt.url" in publisher.status.last_error

    run(main())


def test_a_stopped_process_reads_what_came_before_it_judges(source: Source) -> None:
    source.add(1)

    async def script(peer: Peer) -> None:
        await peer.accept()
        publish = await peer.publish()
        fd = peer._writer.get_extra_info("socket").fileno()
        loop, (here, there) = asyncio.get_running_loop(), socket.socketpair()

        def stand_still() -> None:
            """As SIGSTOP would: the PUBACK waits in the socket, and timers are looked at first."""
            loop.remove_reader(here)
            here.close()
            there.close()
            os.write(fd, brokers.puback(publish.id))
            time.sleep(1.0)

        loop.add_reader(here, stand_still)
        there.send(b"x")
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: source.published == 1)

    scripted(source, script, check, puback_timeout_ms=200)
    assert source.counter("mqtt_disconnects") == 0


def test_a_broker_killed_between_file_and_puback_loses_nothing(
    source: Source, tmp_path: Path
) -> None:
    file, port = tmp_path / "messages", mosquitto.free_port()
    command = [sys.executable, "-m", "tests.brokers", "record", "--port", str(port)]
    command += ["--file", str(file)]

    async def main() -> None:
        async with publishing(source, port) as publisher:
            for _ in range(3):
                process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
                try:
                    source.add(2000)
                    publisher.on_committed()
                    acks = publisher.window.look().acks
                    await until(lambda acks=acks: publisher.window.look().acks > acks + 100)
                finally:
                    process.kill()
                    process.wait()
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            try:
                assert await publisher.drain(10)
            finally:
                process.kill()
                process.wait()

    run(main())
    payloads = [message["payload"].encode() for message in brokers.recorded(file)]
    assert set(payloads) == {event(n) for n in range(6000)}
    firsts = list(dict.fromkeys(payloads))
    assert firsts == [event(n) for n in range(6000)]  # repeats aside, the order of the log
    assert source.log.unexplained(0) == 0


# ---- a real broker ----------------------------------------------------------------------------


def test_events_arrive_at_a_subscriber_of_mosquitto(source: Source, tmp_path: Path) -> None:
    subscriber = mosquitto.find("mosquitto_sub")
    assert subscriber
    source.add(2000)

    async def main() -> None:
        options = ("max_queued_messages 0", "log_type subscribe")
        with mosquitto.Mosquitto(tmp_path / "m", *options) as broker:
            watcher = await asyncio.create_subprocess_exec(
                *(subscriber, "-p", str(broker.port), "-V", "mqttv5", "-t", "telemetry/#"),
                *("-q", "1", "-C", "2000"),
                stdout=subprocess.PIPE,
            )
            assert watcher.stdout is not None
            await until(lambda: "telemetry/#" in broker.log)
            async with publishing(source, broker.port) as publisher:
                output = await watcher.stdout.read()
                assert await publisher.drain(5)
            await watcher.wait()
            assert output.splitlines() == [event(n) for n in range(2000)]

    run(main())
    assert source.log.unexplained(0) == 0


def test_mosquitto_killed_again_and_again_loses_nothing_unacknowledged(
    source: Source, tmp_path: Path
) -> None:
    async def main() -> None:
        broker = mosquitto.Mosquitto(tmp_path / "m").start()
        try:
            async with publishing(source, broker.port) as publisher:
                for _ in range(4):
                    await until(lambda: publisher.status.ok)
                    source.add(500)
                    publisher.on_committed()
                    await until(lambda: publisher.window.look().acks)
                    broker.kill(signal.SIGKILL)
                    await until(lambda: not publisher.status.ok)
                    source.add(100)
                    publisher.on_committed()
                    broker.start()
                assert await publisher.drain(5)
        finally:
            broker.kill()

    run(main())
    assert source.published == source.log.cursor(0).ordinal == 2400
    assert source.log.unexplained(0) == 0


def test_mosquitto_is_reached_with_tls_and_a_client_certificate(
    source: Source, tmp_path: Path, certificates: Path
) -> None:
    source.add(10)
    listener = (
        f"cafile {certificates / 'ca.pem'}",
        f"certfile {certificates / 'server.pem'}",
        f"keyfile {certificates / 'server.key'}",
        "require_certificate true",
    )

    async def main() -> None:
        with mosquitto.Mosquitto(tmp_path / "m", listener=listener) as broker:
            async with publishing(
                source,
                broker.port,
                url=f"mqtts://127.0.0.1:{broker.port}",
                ca_file=str(certificates / "ca.pem"),
                cert_file=str(certificates / "client.pem"),
                key_file=str(certificates / "client.key"),
                server_name="broker.test",
            ) as publisher:
                assert await publisher.drain(5), publisher.status

    run(main())
    assert source.published == 10


def test_topics_that_mosquitto_forbids_are_set_aside_and_others_go_on(
    source: Source, tmp_path: Path
) -> None:
    subscriber = mosquitto.find("mosquitto_sub")
    assert subscriber
    acl = tmp_path / "acl"
    acl.write_text(
        "topic read telemetry/#\ntopic write telemetry/good-1\ntopic write telemetry/good-2\n"
    )
    acl.chmod(0o644)
    devices = ("good-1", "bad", "good-2")
    for n in range(3000):
        source.add(1, devices[n % 3])

    async def main() -> None:
        # Not 0, for no limit: Mosquitto 2.0.11 then drops whoever it refuses a second message.
        options = (f"acl_file {acl}", "max_queued_messages 10000", "log_type subscribe")
        with mosquitto.Mosquitto(tmp_path / "m", *options) as broker:
            watcher = await asyncio.create_subprocess_exec(
                *(subscriber, "-p", str(broker.port), "-V", "mqttv5", "-t", "telemetry/#"),
                *("-q", "1", "-C", "2000"),
                stdout=subprocess.PIPE,
            )
            assert watcher.stdout is not None
            await until(lambda: "telemetry/#" in broker.log)
            try:
                async with publishing(source, broker.port) as publisher:
                    assert await publisher.drain(10), publisher.status
                    output = await asyncio.wait_for(watcher.stdout.read(), 5)
                await watcher.wait()
            finally:
                if watcher.returncode is None:
                    watcher.kill()
            assert output.splitlines() == [event(n) for n in range(3000) if n % 3 != 1]

    run(main())
    assert source.dead == [n for n in range(3000) if n % 3 == 1]
    assert {letter.topic for letter in source.letters} == {"telemetry/bad"}
    assert {letter.reason for letter in source.letters} == {0x87}
    assert source.log.unexplained(0) == 0
