"""Several connections that share the load, and token buckets: one connection's trouble stays its
own, the cursor is exact over all of them, and no broker gets more than the configured rates."""

import asyncio
import contextlib
import itertools
import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import rates
from gateway.config import load
from gateway.mqtt import LinkStatus
from gateway.mqtt_link import Link
from gateway.publisher import Publisher
from gateway.rates import BURST_S, Limits
from tests import brokers
from tests.brokers import FaultProxy, Peer, Publish, RecordingBroker, ScriptedBroker, recorded
from tests.mosquitto import Mosquitto
from tests.publishing import (
    Script,
    Source,
    drained,
    number,
    publishing,
    run,
    scripted,
    settings,
    until,
)

DEVICES = [f"dev-{n}" for n in range(64)]
ALL = dict(connections=4)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    source = Source(tmp_path)
    yield source
    source.close()


def add(source: Source, count: int) -> None:
    """Events of all devices in turn; number n is of device n mod 64."""
    for _ in range(count):
        source.add(1, DEVICES[source.count % len(DEVICES)])


class Seen:
    """What a broker got, and from whom."""

    def __init__(self) -> None:
        self.publishes: list[tuple[str, Publish]] = []
        self.clients: list[str] = []

    async def take(self, peer: Peer, client: str) -> None:
        """Acknowledge whatever comes."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                self.publishes.append((client, publish := await peer.publish()))
                peer.puback(publish.id)

    def check(self, count: int) -> None:
        """Nothing is lost, each device came over one connection, in the log's order."""
        firsts = list(dict.fromkeys((p.topic, number(p.payload)) for _, p in self.publishes))
        assert sorted(n for _, n in firsts) == list(range(count))
        for n, device in enumerate(DEVICES):
            own = [m for topic, m in firsts if topic == f"telemetry/{device}"]
            assert own == list(range(n, count, len(DEVICES)))
            clients = {c for c, p in self.publishes if p.topic == f"telemetry/{device}"}
            assert len(clients) == 1
        assert {c for c, _ in self.publishes} == {f"gw-{n}" for n in range(4)}


def settled(source: Source, published: int, dead: int = 0) -> None:
    """The books, to the event."""
    cursor = source.log.cursor(0)
    assert (cursor.published, cursor.dead_lettered) == (published, dead)
    assert cursor.ordinal == source.log.committed_ordinal == published + dead
    assert cursor.lsn == source.log.committed
    assert source.log.unexplained(0) == 0


# ---- connections ------------------------------------------------------------------------------


def test_a_pool_shares_the_devices_and_moves_one_cursor(source: Source) -> None:
    add(source, 800)
    seen = Seen()

    async def script(peer: Peer) -> None:
        await seen.take(peer, (await peer.accept()).client_id)

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.status.state == "connected")
        assert source.counter("mqtt_connected") == 4
        await drained(publisher, broker)
        assert len(broker.peers) == 4

    scripted(source, script, check, **ALL)
    seen.check(800)
    settled(source, 800)
    assert source.counter("mqtt_connected") == 0


def test_a_connection_reads_on_for_the_others(source: Source) -> None:
    """What its fill has read may be another connection's, which nothing else would wake."""
    add(source, 1)
    seen, go = Seen(), asyncio.Event()

    async def script(peer: Peer) -> None:
        client = (await peer.accept()).client_id
        seen.publishes.append((client, publish := await peer.publish()))
        await go.wait()
        peer.puback(publish.id)
        await seen.take(peer, client)

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: publisher.all_up() and seen.publishes)
        add(source, 399)  # and nobody says so to the publisher
        go.set()
        await until(lambda: source.published == 400, 2)

    scripted(source, script, check, **ALL)
    seen.check(400)


def test_control_without_waking_the_others_they_starve(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "_pump_all", lambda publisher: None)
    with pytest.raises(AssertionError):
        test_a_connection_reads_on_for_the_others(source)


def faulty(case: str, over: asyncio.Event, seen: Seen) -> Script:
    """A broker that mistreats connection 2 in one way until `over`."""

    async def script(peer: Peer) -> None:
        connect = await peer.connect()
        client = connect.client_id
        if client != "gw-2" or over.is_set():
            peer.send(brokers.connack())
            await seen.take(peer, client)
            return
        if case == "refused":
            peer.send(brokers.connack(0x87, properties=b""))
            await peer.left()
            return
        if case == "silent":
            await peer.left()
            return
        peer.send(brokers.connack())
        if case == "killed":
            for _ in range(2):
                seen.publishes.append((client, publish := await peer.publish()))
                peer.puback(publish.id)
            await peer.publish()
            peer.reset()
        elif case == "taken over":
            peer.send(brokers.disconnect(0x8E))
            await peer.left()
        else:
            assert case == "held"
            while not over.is_set():
                peer.puback((await peer.publish()).id, 0x97)
            await seen.take(peer, client)

    return script


@pytest.mark.parametrize("case", ["killed", "held", "refused", "silent", "taken over"])
def test_the_others_go_on_while_one_connection_is(source: Source, case: str) -> None:
    over, seen = asyncio.Event(), Seen()
    state = {"killed": "", "silent": "", "taken over": "taken_over"}.get(case, case)

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        own = {d for d in DEVICES if publisher.window.connection_of(d) == 2}
        assert own
        for _ in range(4):
            add(source, 160)
            publisher.on_committed()
            others = [n for n in range(source.count) if DEVICES[n % len(DEVICES)] not in own]

            def through(others: list[int] = others) -> bool:
                there = {number(p.payload) for client, p in seen.publishes if client != "gw-2"}
                return set(others) <= there

            await until(through)
        assert source.published < 640
        if state:
            await until(lambda: publisher.status.state == state)
            part = publisher.status.connections[2]
            assert part.state == state
            assert part.last_error == publisher.status.last_error
        if case != "killed":
            up = [c.state for c in publisher.status.connections if c.client_id != "gw-2"]
            assert up == ["connected"] * 3
        over.set()
        await drained(publisher, broker)

    changes = dict(puback_timeout_ms=500, connect_timeout_ms=200, poison_attempts=100)
    scripted(source, faulty(case, over, seen), check, **ALL, **changes)
    seen.check(640)
    settled(source, 640)
    assert source.dead == []


def test_a_long_outage_of_one_connection_keeps_nobody_else(tmp_path: Path) -> None:
    """More events than a window of one connection would hold open."""
    source = Source(tmp_path, 1 << 24)
    over, seen = asyncio.Event(), Seen()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        own = {d for d in DEVICES if publisher.window.connection_of(d) == 2}
        add(source, 20_000)
        publisher.on_committed()
        others = sum(DEVICES[n % len(DEVICES)] not in own for n in range(20_000))
        await until(lambda: len(seen.publishes) == others, 10)
        over.set()
        assert await publisher.drain(10)

    scripted(source, faulty("refused", over, seen), check, **ALL, inflight_max=10)
    seen.check(20_000)
    settled(source, 20_000)
    source.close()


def test_each_connection_keeps_the_client_id_it_was_given(source: Source) -> None:
    asked: list[str] = []

    async def script(peer: Peer) -> None:
        asked.append(client := (await peer.connect()).client_id)
        given = b"given-" + client.encode()[-1:]
        peer.send(brokers.connack(properties=b"\x12\x00\x07" + given))
        if peer.number < 2:
            peer.close()
        else:
            await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: len(asked) >= 4 and publisher.all_up())

    scripted(source, script, check, connections=2)
    assert sorted(asked[:2]) == ["gw-0", "gw-1"]
    assert sorted(asked[2:4]) == ["given-0", "given-1"]


def test_a_refusal_for_good_is_set_aside_on_its_connection(source: Source) -> None:
    add(source, 320)
    seen = Seen()

    async def script(peer: Peer) -> None:
        client = (await peer.accept()).client_id
        while True:
            publish = await peer.publish()
            bad = number(publish.payload) % 5 == 3
            if not bad:
                seen.publishes.append((client, publish))
            peer.puback(publish.id, 0x87 if bad else 0)

    scripted(source, script, drained, **ALL)
    assert sorted(source.dead) == list(range(3, 320, 5))
    settled(source, 256, 64)


def test_poison_on_one_connection_is_found_while_the_others_go_on(source: Source) -> None:
    add(source, 160)
    seen = Seen()

    async def script(peer: Peer) -> None:
        client = (await peer.accept()).client_id
        while True:
            publish = await peer.publish()
            if number(publish.payload) == 77:
                peer.close()
                return
            seen.publishes.append((client, publish))
            peer.puback(publish.id)

    scripted(source, script, drained, **ALL)
    assert source.dead == [77]
    settled(source, 159, 1)
    assert source.counter("mqtt_connects") >= 4 + 3


# ---- what is said -----------------------------------------------------------------------------


def test_the_status_file_names_each_connection(source: Source, tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    over, seen = asyncio.Event(), Seen()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        def parts() -> dict[str, str]:
            return {part.client_id: part.state for part in LinkStatus.read(file).connections}

        one_down = {f"gw-{n}": "refused" if n == 2 else "connected" for n in range(4)}
        await until(lambda: parts() == one_down)
        assert LinkStatus.read(file).state == "refused"
        assert "0x87" in LinkStatus.read(file).last_error
        assert source.counter("mqtt_connected") == 3
        over.set()
        await until(lambda: LinkStatus.read(file).ok and publisher.all_up())
        assert json.loads(file.read_text())["connections"][1]["client_id"] == "gw-1"

    script = faulty("refused", over, seen)
    scripted(source, script, check, {"status_file": file}, **ALL)
    assert LinkStatus.read(file).state == "closed"


@pytest.mark.parametrize(
    ("states", "worst"),
    [
        (["connected", "connected"], "connected"),
        (["connected", "waiting"], "waiting"),
        (["held", "waiting"], "held"),
        (["refused", "held"], "refused"),
        (["draining", "connected"], "draining"),
    ],
)
def test_a_pool_is_as_well_as_its_worst_connection(states: list[str], worst: str) -> None:
    parts = tuple(LinkStatus().to(state, f"{state} it is") for state in states)
    status = LinkStatus(broker="b").pooled(parts)
    assert (status.state, status.last_error) == (worst, f"{worst} it is")
    assert status.connections == parts
    assert status.ok == all(part.ok for part in parts)


# ---- brokers that are killed ------------------------------------------------------------------


def test_resets_at_any_moment_keep_each_devices_order(source: Source, tmp_path: Path) -> None:
    draw = random.Random(seed := random.randrange(1 << 32))
    print(f"seed {seed}")
    file = tmp_path / "messages"

    async def main() -> None:
        async with (
            RecordingBroker(file) as broker,
            FaultProxy(broker.port) as proxy,
            publishing(source, proxy.port, **ALL, poison_attempts=100) as publisher,
        ):
            for _ in range(12):
                add(source, 160)
                publisher.on_committed()
                await asyncio.sleep(draw.random() * 0.05)
                proxy.reset()
            assert await publisher.drain(10)

    run(main())
    settled(source, 12 * 160)
    firsts: dict[str, list[int]] = {}
    for message in recorded(file):
        own = firsts.setdefault(message["topic"], [])
        if (n := number(message["payload"].encode())) not in own:
            own.append(n)
    assert firsts == {
        f"telemetry/{device}": list(range(n, 12 * 160, len(DEVICES)))
        for n, device in enumerate(DEVICES)
    }


@pytest.mark.parametrize("mode", ["event", "packed"])
def test_mosquitto_killed_again_and_again_loses_nothing(
    source: Source, tmp_path: Path, mode: str
) -> None:
    async def main() -> None:
        broker = Mosquitto(tmp_path / "m").start()
        try:
            async with publishing(source, broker.port, **ALL, mode=mode) as publisher:
                for _ in range(3):
                    await until(publisher.all_up)
                    acks = publisher.window.look().acks
                    add(source, 800)
                    publisher.on_committed()
                    await until(lambda acks=acks: publisher.window.look().acks > acks)
                    broker.kill(signal.SIGKILL)
                    await until(lambda: source.counter("mqtt_connected") == 0)
                    add(source, 160)
                    publisher.on_committed()
                    broker.start()
                assert await publisher.drain(10)
        finally:
            broker.kill()

    run(main(), 40)
    settled(source, 3 * 960)


# ---- token buckets ----------------------------------------------------------------------------


def most(spent: list[tuple[float, int]], rate: float, slack: float) -> float:
    """The most that any window of time has above rate × its length + slack; at most 0: kept."""
    excess = -1.0
    for first, (start_s, _) in enumerate(spent):
        total = 0
        for at_s, n in spent[first:]:
            total += n
            excess = max(excess, total - rate * (at_s - start_s) - slack)
    return excess


def play(limits: Limits, steps: list[tuple[float, int, bool]]) -> list[tuple[float, int, int]]:
    """Spend all that is allowed after each pause; True: the connection is made again."""
    now_s, spent = 1000.0, []
    for pause_s, size_bytes, again in steps:
        now_s += pause_s
        if again:
            limits.empty(now_s)
        while all(allowed := limits.allow(now_s)):
            packets = min(allowed[0], -(-allowed[1] // size_bytes))  # the last may lie above
            limits.spend(packets, packets * size_bytes)
            spent.append((now_s, packets, packets * size_bytes))
    return spent


STEPS = st.lists(
    st.tuples(st.floats(0, 2), st.integers(100, 5000), st.booleans()), min_size=1, max_size=60
)


@given(st.integers(1, 2000), st.integers(1000, 100_000), STEPS)
def test_no_time_sees_more_than_its_rate_and_a_burst(
    publishes: int, size_bytes: int, steps: list[tuple[float, int, bool]]
) -> None:
    spent = play(Limits(publishes, size_bytes, 1000.0), steps)
    packets = [(at_s, n) for at_s, n, _ in spent]
    sizes = [(at_s, n) for at_s, _, n in spent]
    burst = max(1, publishes * BURST_S)
    assert most(packets, publishes, burst) <= 1e-3
    assert most(sizes, size_bytes, max(1, size_bytes * BURST_S) + 5000) <= 1e-3
    if spent:  # it starts empty
        for per, rate, one in ((packets, publishes, 0), (sizes, size_bytes, 5000)):
            for at_s, _ in per:
                until_then = sum(n for s, n in per if s <= at_s)
                assert until_then <= rate * (at_s - 1000.0) + one + 1e-3


@given(st.integers(1, 100_000), st.integers(0, 100_000))
def test_a_wait_ends_with_a_token(rate: int, debt: int) -> None:
    limits = Limits(rate, 0, 0.0)
    limits.spend(debt, 0)
    now_s = limits.wait_s()
    assert now_s >= min(rates.STEP_S, 1 / rate)
    assert limits.allow(now_s)[0] >= 1


def test_a_new_connection_keeps_what_is_owed_and_nothing_that_is_saved() -> None:
    limits = Limits(100, 0, 0.0)
    assert limits.allow(5.0)[0] == 10
    limits.empty(5.0)
    assert limits.allow(5.0)[0] == 0
    limits.spend(3, 0)
    limits.empty(5.0)
    assert limits.allow(5.035)[0] == 0
    assert limits.allow(5.041)[0] == 1


RATE = 200


def throttled(source: Source, lives: int, **changes: Any) -> list[tuple[float, int, int]]:
    """(when, messages, bytes) of each message, from a broker that ends each connection after 15."""
    seen: list[tuple[float, int, int]] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        for n in itertools.count():
            publish = await peer.publish()
            seen.append((time.monotonic(), 1, len(publish.payload)))
            peer.puback(publish.id)
            if n == 15 and peer.number < lives:
                peer.send(brokers.disconnect(0x8B))
                peer.close()
                return

    scripted(source, script, drained, **changes)
    return seen


def test_a_broker_sees_no_more_than_the_rate_and_reconnects_gain_nothing(source: Source) -> None:
    source.add(150)
    started_s = time.monotonic()
    seen = throttled(source, 5, publishes_per_second_max=RATE)
    assert source.published == 150
    assert len(seen) <= RATE * (seen[-1][0] - started_s) + 5  # 5: the loop's own delays
    assert source.counter("mqtt_throttled_ns") > 0.3e9


def test_control_a_bucket_that_is_full_after_each_reconnect_is_noticed(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(bucket: rates.Bucket, now_s: float) -> None:
        bucket._tokens, bucket._at_s = bucket._burst, now_s

    monkeypatch.setattr(rates.Bucket, "empty", fill)
    with pytest.raises(AssertionError):
        test_a_broker_sees_no_more_than_the_rate_and_reconnects_gain_nothing(source)


def test_bytes_are_limited_too(source: Source) -> None:
    source.add(100)
    started_s = time.monotonic()
    seen = throttled(source, 0, bytes_per_second_max=8000)
    took_s = seen[-1][0] - started_s
    assert sum(size for _, _, size in seen) <= 8000 * took_s + 100
    assert source.counter("mqtt_throttled_ns") > 0.2e9


def test_waiting_for_tokens_is_no_busy_loop(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    allow = Limits.allow

    def counted(limits: Limits, now_s: float) -> tuple[int, int]:
        nonlocal looks
        looks += 1
        return allow(limits, now_s)

    monkeypatch.setattr(Limits, "allow", counted)
    source.add(10)
    throttled(source, 0, publishes_per_second_max=20)
    assert looks < 60  # three a message: the timer, the end of the tokens, the PUBACK
    before = looks
    assert before >= 10


def test_without_limits_nothing_is_counted_as_throttled(source: Source) -> None:
    source.add(100)
    throttled(source, 0)
    assert source.counter("mqtt_throttled_ns") == 0


def test_limits_hold_for_each_connection_by_itself(source: Source) -> None:
    add(source, 320)
    seen = Seen()

    async def script(peer: Peer) -> None:
        await seen.take(peer, (await peer.accept()).client_id)

    started_s = time.monotonic()
    scripted(source, script, drained, **ALL, publishes_per_second_max=RATE)
    took_s = time.monotonic() - started_s
    clients = [client for client, _ in seen.publishes]
    per_client = [clients.count(f"gw-{n}") for n in range(4)]
    assert max(per_client) / RATE < took_s + 0.05
    assert took_s < 320 / RATE  # one connection alone would take longer
    seen.check(320)


def pumps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts how often links look whether there is something to send."""
    count = 0
    pump = Link.pump

    def counted(link: Link) -> None:
        nonlocal count
        count += 1
        pump(link)

    monkeypatch.setattr(Link, "pump", counted)
    return lambda: count


@pytest.mark.parametrize("mode", ["event", "packed"])
def test_an_idle_or_full_pool_does_nothing(
    source: Source, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    count = pumps(monkeypatch)

    async def script(peer: Peer) -> None:
        await peer.accept(properties=brokers.receive_maximum(1))
        await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(publisher.all_up)
        before = count()
        await asyncio.sleep(0.2)
        assert count() == before
        add(source, 1600)
        publisher.on_committed()
        await until(lambda: publisher.window.in_flight == 4)
        await asyncio.sleep(0.1)  # packs linger
        before = count()
        await asyncio.sleep(0.3)
        assert count() - before <= 4

    scripted(source, script, check, **ALL, mode=mode, publishes_per_second_max=1000)


def test_ids_of_a_pool_are_the_base_and_a_number(source: Source) -> None:
    publisher = Publisher(source.log, 0, settings(1, client_id=None, connections=3), source.shelf)
    base = f"gateway-{source.log.identity:016x}"
    assert [c.client_id for c in publisher.connections] == [f"{base}-{n}" for n in range(3)]


def test_the_settings_for_aws_are_accepted_and_keep_its_limits(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "delivery.md").read_text()
    text = text.partition("## AWS IoT Core")[2].partition("```toml\n")[2].partition("```")[0]
    for name in ("AmazonRootCA1.pem", "gateway.pem.crt", "gateway.pem.key"):
        (tmp_path / name).touch(0o600)
        text = text.replace(name, str(tmp_path / name))
    (tmp_path / "aws.toml").write_text(text)
    mqtt = load(str(tmp_path / "aws.toml"), {}).config.mqtt
    assert mqtt.publishes_per_second_max * (1 + BURST_S) <= 100
    assert mqtt.bytes_per_second_max * (1 + BURST_S) + (128 << 10) <= 512 << 10
    assert mqtt.inflight_max <= 100
