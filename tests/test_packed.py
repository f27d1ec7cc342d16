"""Packed messages: many events of one topic in one, each as it was stored behind its device_id and
lsn; linger and size are kept, and only the guilty of a pack is set aside."""

import asyncio
import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from gateway import _log
from gateway._mqtt import View
from gateway.publisher import Publisher
from gateway.retry import Suspects
from gateway.scratch import Scratch
from tests import brokers, mosquitto
from tests.brokers import Peer, Publish, ScriptedBroker
from tests.gateway_process import GatewayProcess, wait_for
from tests.mosquitto import Mosquitto
from tests.publishing import Source, drained, event, publishing, run, scripted, settings, until

PACKED = dict(mode="packed")
SPLICED = re.compile(
    rb'( *)\{"device_id":"([A-Za-z0-9_-]+)","lsn":([0-9]+),'
    rb'("ts":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z",)?'
)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    source = Source(tmp_path)
    yield source
    source.close()


def put(source: Source, device_id: str, body: bytes) -> None:
    assert source._ingest.event(device_id, body, _log.now_ns()) == 0
    source.log.follow(0, 0)


def stored(source: Source) -> dict[int, tuple[str, bytes]]:
    """lsn → device and body, of every event in the log."""
    found, lsn = {}, source.log.oldest[0] if source.log.oldest else source.log.committed
    while (record := source.log.read(lsn)) is not None:
        if record.kind == _log.DATA:
            found[record.lsn] = (record.device_id, record.body)
        lsn += record.size
    return found


def lines(payload: bytes) -> list[bytes]:
    assert payload.endswith(b"\n")
    return payload[:-1].split(b"\n")


def numbers(payload: bytes) -> list[int]:
    return [json.loads(line)["metrics"]["n"] for line in lines(payload)]


def as_stored(line: bytes) -> tuple[int, str, bytes]:
    """lsn, device and the event without what was put in; line ends between tokens are spaces."""
    match = SPLICED.match(line)
    assert match, line
    return int(match[3]), match[2].decode(), match[1] + b"{" + line[match.end() :]


class Taker:
    """A broker that keeps every message."""

    def __init__(self, properties: bytes = b"") -> None:
        self.messages: list[Publish] = []
        self.times: list[float] = []
        self._properties = properties

    async def __call__(self, peer: Peer) -> None:
        await peer.accept(properties=self._properties)
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                self.messages.append(publish := await peer.publish())
                self.times.append(time.monotonic())
                peer.puback(publish.id)

    @property
    def numbers(self) -> list[int]:
        return [n for message in self.messages for n in numbers(message.payload)]


def content_type(text: str) -> bytes:
    return b"\x03" + len(text).to_bytes(2, "big") + text.encode()


def settled(source: Source, published: int, dead: int = 0) -> None:
    cursor = source.log.cursor(0)
    assert (cursor.published, cursor.dead_lettered) == (published, dead)
    assert cursor.ordinal == published + dead
    assert cursor.lsn == source.log.committed
    assert source.log.unexplained(0) == 0


BODIES = [
    event(1),
    b'{"metrics":{"a":1.50}}',
    b'  { "metrics" : {"a":1e2},\n\t"payload":{"text":"a\\nb { } [ ] \\u00e9 \xc3\xa9"} }  ',
    b'\r\n{"ts":"2025-09-23T13:18:41+02:00","boot":3,"metrics":{},"tags":{"k":"\\"}"}}\n',
    b'{"metrics":{"a":0},"payload":[[],{},"\xf0\x9f\x8c\xa1"]}',
]


# ---- what a subscriber gets -------------------------------------------------------------------


def test_each_line_at_a_subscriber_of_mosquitto_is_the_stored_event(
    source: Source, tmp_path: Path
) -> None:
    subscriber = mosquitto.find("mosquitto_sub")
    assert subscriber
    devices = [f"dev-{n}" for n in range(5)]
    for n in range(300):
        put(source, devices[n % 5], BODIES[n // 5 % len(BODIES)])
    output = b""

    async def main() -> None:
        nonlocal output
        with Mosquitto(tmp_path / "m", "max_queued_messages 0", "log_type subscribe") as broker:
            watcher = await asyncio.create_subprocess_exec(
                *(subscriber, "-p", str(broker.port), "-V", "mqttv5", "-t", "telemetry/#"),
                *("-q", "1", "-F", "%t %C %x"),
                stdout=subprocess.PIPE,
            )
            try:
                await until(lambda: "telemetry/#" in broker.log)
                async with publishing(source, broker.port, **PACKED) as publisher:
                    assert await publisher.drain(5), publisher.status
                await asyncio.sleep(0.2)
            finally:
                watcher.terminate()
            output = (await watcher.communicate())[0]

    run(main())
    found = []
    for message in output.decode().splitlines():
        topic, kind, payload = message.split(" ")
        assert kind == "application/x-ndjson"
        for line in lines(bytes.fromhex(payload)):
            lsn, device, body = as_stored(line)
            assert topic == f"telemetry/{device}"
            parsed = json.loads(line)
            assert (parsed["device_id"], parsed["lsn"]) == (device, lsn)
            assert "ts" in parsed
            found.append((lsn, (device, body)))
    assert len(output.splitlines()) < 100
    flat = bytes.maketrans(b"\r\n", b"  ")
    expected = {lsn: (d, body.translate(flat)) for lsn, (d, body) in stored(source).items()}
    assert len(found) == 300
    for lsn, (device, body) in found:
        there = expected[lsn]
        assert (device, body.strip()) == (there[0], there[1].strip())
    for device in devices:  # the order of the log
        own = [lsn for lsn, (d, _) in found if d == device]
        assert own == sorted(own)
    settled(source, 300)


@pytest.mark.parametrize("pack_format", ["ndjson", "array"])
@pytest.mark.parametrize("pack_compression", ["none", "zstd"])
def test_the_content_type_says_what_is_in_the_message(
    source: Source, pack_format: str, pack_compression: str
) -> None:
    source.add(200)
    taker = Taker()
    changes = dict(pack_format=pack_format, pack_compression=pack_compression)
    scripted(source, taker, drained, **PACKED, **changes)
    kind = {"ndjson": "application/x-ndjson", "array": "application/json"}[pack_format]
    kind += "+zstd" if pack_compression == "zstd" else ""
    found: list[int] = []
    for message in taker.messages:
        assert message.properties == content_type(kind)
        payload = message.payload
        if pack_compression == "zstd":
            payload = zstd.decompress(payload)
            assert len(message.payload) < len(payload) / 2
        if pack_format == "array":
            found += [item["metrics"]["n"] for item in json.loads(payload)]
        else:
            found += numbers(payload)
    assert found == list(range(200))
    assert len(taker.messages) < 10
    settled(source, 200)


# ---- linger and size --------------------------------------------------------------------------


def test_an_event_alone_waits_as_long_as_it_may_and_no_longer(source: Source) -> None:
    taker = Taker()
    added: list[float] = []

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.ok)
        for n in range(3):
            added.append(time.monotonic())
            source.add(1)
            publisher.on_committed()
            await asyncio.sleep(0.02)
            source.add(1)  # within the linger: goes along
            publisher.on_committed()
            await until(lambda n=n: source.published == 2 * n + 2)

    scripted(source, taker, check, **PACKED, pack_linger_ms=100)
    assert [numbers(message.payload) for message in taker.messages] == [[0, 1], [2, 3], [4, 5]]
    for added_s, came_s in zip(added, taker.times):
        assert 0.099 <= came_s - added_s < 0.2


def test_a_drain_waits_for_no_company(source: Source) -> None:
    taker = Taker()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.ok)
        source.add(3)
        publisher.on_committed()
        started_s = time.monotonic()
        await drained(publisher, broker)
        assert time.monotonic() - started_s < 1

    scripted(source, taker, check, **PACKED, pack_linger_ms=5000)
    assert taker.numbers == [0, 1, 2]


@pytest.mark.parametrize("packet_bytes_max", [0, 1500])
def test_a_pack_is_no_larger_than_it_may_be(source: Source, packet_bytes_max: int) -> None:
    large = 3000
    for n in range(120):
        source.add(1)
        if n % 40 == 20 and not packet_bytes_max:
            put(source, "dev-1", b'{"metrics":{"n":-1},"payload":"%s"}' % (b"x" * large))
    properties = brokers.packet_bytes_max(packet_bytes_max) if packet_bytes_max else b""
    taker = Taker(properties)
    scripted(source, taker, drained, **PACKED, pack_bytes_max=2048)
    sizes = [len(m.payload) for m in taker.messages]
    most = min(2048, packet_bytes_max or 2048)
    for message in taker.messages:
        if len(lines(message.payload)) > 1:
            assert len(message.payload) <= most
    assert max(len(lines(m.payload)) for m in taker.messages) > 5
    assert [n for n in taker.numbers if n >= 0] == list(range(120))
    if packet_bytes_max:
        whole = [
            5 + 2 + len(m.topic) + 3 + len(m.properties) + len(m.payload) for m in taker.messages
        ]
        assert max(whole) <= packet_bytes_max + 3
    else:
        assert sum(size > most for size in sizes) == 3  # alone, and whole
    assert source.dead == []


def test_limits_of_messages_and_packs_work_together(source: Source) -> None:
    """What a broker that counts messages is for: few messages, many events."""
    source.add(2000)
    taker = Taker()
    started_s = time.monotonic()
    scripted(source, taker, drained, **PACKED, pack_bytes_max=8192, publishes_per_second_max=100)
    took_s = taker.times[-1] - started_s
    assert taker.numbers == list(range(2000))
    assert len(taker.messages) <= 100 * took_s + 2
    assert took_s < 2


# ---- what a broker refuses --------------------------------------------------------------------


class Picky:
    """Refuses or breaks on every message that holds one of `bad`; resumes sessions."""

    def __init__(self, bad: set[int], reason: int | None, times: int = 1 << 30) -> None:
        self.bad, self.reason, self.times = bad, reason, times
        self.taken: list[int] = []

    async def __call__(self, peer: Peer) -> None:
        connect = await peer.connect()
        peer.send(brokers.connack(session_present=not connect.clean_start))
        while True:
            publish = await peer.publish()
            own = numbers(publish.payload)
            if self.bad.intersection(own) and self.times > 0:
                self.times -= 1
                if self.reason is None:
                    peer.close()
                    return
                peer.puback(publish.id, self.reason, "no good")
            else:
                self.taken += own
                peer.puback(publish.id)


def test_of_a_refused_pack_only_the_guilty_is_set_aside(source: Source) -> None:
    bad = {17, 18, 250, 999}
    broker = Picky(bad, 0x99)
    source.add(1000)
    never = dict(backoff_base_ms=60_000, backoff_max_ms=60_000)  # what is final waits for nothing
    changes = dict(pack_bytes_max=4096, **never)
    scripted(source, broker, drained, {"draw": lambda: 1.0}, **PACKED, **changes)
    assert source.dead == sorted(bad)
    assert {(letter.reason, letter.text) for letter in source.letters} == {(0x99, "no good")}
    assert set(broker.taken) == set(range(1000)) - bad
    lasts = list(dict.fromkeys(reversed(broker.taken)))[::-1]
    assert lasts == sorted(lasts)  # what follows a refused pack comes again behind it
    settled(source, 996, 4)


def test_a_pack_that_is_refused_for_now_is_tried_until_it_is_taken(source: Source) -> None:
    broker = Picky({5}, 0x97, times=3)
    source.add(300)
    scripted(source, broker, drained, **PACKED, pack_bytes_max=4096)
    assert source.dead == []
    assert set(broker.taken) == set(range(300))
    settled(source, 300)


def test_a_broker_over_its_quota_gets_one_event_at_a_time(source: Source) -> None:
    """Not all the events of the packs that it refused, at once."""
    alone: list[bool] = []

    async def broker(peer: brokers.Peer) -> None:
        await peer.connect()
        peer.send(brokers.connack())
        while True:
            publish = await peer.publish()
            over = len(alone) < 3
            if over and numbers(publish.payload) == [0]:
                alone.append(await peer.silence(0.05))
            peer.puback(publish.id, 0x97 if over else None)

    source.add(300)
    scripted(source, broker, drained, **PACKED, pack_bytes_max=4096)
    assert alone == [True] * 3
    settled(source, 300)


@pytest.mark.parametrize("inflight_max", [1, 1000])
def test_of_a_pack_that_breaks_connections_only_the_guilty_is_set_aside(
    source: Source, inflight_max: int
) -> None:
    broker = Picky({77}, None)
    source.add(300)
    changes = dict(pack_bytes_max=4096, inflight_max=inflight_max)
    scripted(source, broker, drained, **PACKED, **changes)
    assert source.dead == [77]
    assert source.letters[0].poison
    assert set(broker.taken) == set(range(300)) - {77}
    settled(source, 299, 1)


def test_control_a_pack_that_is_blamed_as_a_whole_costs_the_innocent(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Suspects.connection_ended

    def hasty(suspects: Suspects, view: View, now_ns: int, proved: bool) -> int | None:
        return ended(suspects, view._replace(oldest_events=1), now_ns, proved)

    monkeypatch.setattr(Suspects, "connection_ended", hasty)
    broker = Picky({77}, None)
    source.add(300)
    changes = dict(pack_bytes_max=4096, inflight_max=1, poison_attempts=1)
    scripted(source, broker, drained, **PACKED, **changes)
    assert source.dead != [77]


def test_a_broker_that_breaks_by_itself_sets_no_event_of_a_pack_aside(source: Source) -> None:
    taken: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        while True:
            publish = await peer.publish()
            if peer.number < 4:
                peer.close()
                return
            taken.extend(numbers(publish.payload))
            peer.puback(publish.id)

    source.add(300)
    scripted(source, script, drained, **PACKED, pack_bytes_max=4096, poison_attempts=4)
    assert source.dead == []
    assert set(taken) == set(range(300))
    settled(source, 300)


def test_a_resumed_session_gets_the_same_message_again(source: Source) -> None:
    seen: list[Publish] = []

    async def script(peer: Peer) -> None:
        await peer.accept(session_present=peer.number > 0)
        if peer.number == 0:
            seen.extend(await peer.publishes(2))
            peer.send(brokers.disconnect(0x8B))
            peer.close()
            return
        for _ in range(2):
            seen.append(await peer.publish())
            peer.puback(seen[-1].id)
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: source.published == source.count)

    for compression in ("none", "zstd"):
        seen.clear()
        changes: dict[str, Any] = dict(pack_bytes_max=1024, pack_compression=compression)
        while True:  # two packs
            source.add(1)
            if source.count % 16 == 0:
                break
        scripted(source, script, check, **PACKED, **changes)
        first, again = seen[:2], seen[2:]
        assert [p.dup for p in again] == [True, True]
        assert [(p.id, p.payload, p.properties) for p in again] == [
            (p.id, p.payload, p.properties) for p in first
        ]


def test_one_topic_for_all_holds_events_of_several_devices(source: Source) -> None:
    for n in range(60):
        source.add(1, f"dev-{n % 3}")
    taker = Taker()
    scripted(source, taker, drained, **PACKED, topic="all")
    assert taker.numbers == list(range(60))
    first = [as_stored(line)[1] for line in lines(taker.messages[0].payload)]
    assert first[:3] == ["dev-0", "dev-1", "dev-2"]
    assert {m.topic for m in taker.messages} == {"all"}


# ---- tools ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack_format", ["ndjson", "array"])
def test_tools_publish_the_lines_that_the_gateway_would(source: Source, pack_format: str) -> None:
    for n in range(20):
        put(source, f"dev-{n % 2}", BODIES[n % len(BODIES)])
    own, again = Taker(), Taker()
    scripted(source, own, drained, **PACKED, pack_bytes_max=1024)
    lines_there = [line for m in own.messages for line in lines(m.payload)]
    records = [record for lsn in stored(source) if (record := source.log.read(lsn))]
    clients: list[str] = []

    async def script(peer: Peer) -> None:
        clients.append((await peer.accept()).client_id)
        while True:
            again.messages.append(publish := await peer.publish())
            peer.puback(publish.id)

    async def main() -> None:
        changes = dict(pack_format=pack_format, pack_compression="zstd", connections=4)
        async with ScriptedBroker(script) as broker:
            mqtt = settings(broker.port, **PACKED, **changes)
            async with Scratch(mqtt, client_id="gw-again") as scratch:
                assert await scratch.publish(records, lambda record, verdict: None) == ""

    run(main())
    there = {json.loads(line)["lsn"]: line for line in lines_there}
    ends = (b"[", b"]") if pack_format == "array" else (b"", b"\n")
    wanted = [ends[0] + there[record.lsn] + ends[1] for record in records]
    assert [message.payload for message in again.messages] == wanted
    assert clients == ["gw-again"]


# ---- a whole gateway --------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["embedded", "mosquitto"])
def test_a_gateway_packs_over_a_pool(tmp_path: Path, url: str) -> None:
    with contextlib.ExitStack() as stack:
        if url == "mosquitto":
            url = f"mqtt://127.0.0.1:{stack.enter_context(Mosquitto(tmp_path / 'm')).port}"
        settings = {
            "mqtt.url": url,
            "mqtt.connections": 3,
            "mqtt.client_id": "gw",
            "mqtt.mode": "packed",
            "mqtt.pack_compression": "zstd",
            "mqtt.pack_linger_ms": 200,
            "mqtt.publishes_per_second_max": 50,
        }
        gateway = stack.enter_context(GatewayProcess(tmp_path / "g", settings))
        wait_for(lambda: gateway.health()["mqtt"]["connected"])
        said = gateway.health()["mqtt"]
        assert said["state"] == "connected"
        assert [part["client_id"] for part in said["connections"]] == ["gw-0", "gw-1", "gw-2"]
        for n in range(60):
            body = b'{"metrics":{"n":%d}}' % n
            assert gateway.post(f"dev-{n % 6}", body) == 202
        assert gateway.post("dev-1?ack=sink", b'{"metrics":{"n":60}}') == 200  # after the linger
        wait_for(lambda: gateway.metrics()["gateway_events_published_total"] == 61)
        now = gateway.metrics()
        assert now["gateway_mqtt_connected"] == 3
        messages = now["gateway_mqtt_publish_sent_total"]
        assert messages < 61
        assert now["gateway_receipt_to_puback_seconds_count"] == messages
        assert now["gateway_unexplained_events"] == 0
        assert gateway.stop() == 0
