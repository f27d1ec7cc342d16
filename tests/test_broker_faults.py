"""Every row of the table of broker faults in docs/delivery.md, one parametrised test a row.

The first column of a row stands at its test; the last test here holds the two tables together. A
real Mosquitto, TLS and a network that goes silent are in it as well.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gateway import _log
from gateway.errors import ConfigError
from gateway.mqtt import LinkStatus
from gateway.publisher import Publisher
from gateway.retry import PUBACK, Kind, Puback, Suspects
from tests import brokers
from tests.brokers import FaultProxy, Peer, Publish, ScriptedBroker, recorded
from tests.certificates import make_certificates
from tests.mosquitto import Mosquitto, free_port
from tests.publishing import (
    Script,
    Source,
    drained,
    event,
    number,
    numbers,
    publishing,
    run,
    scripted,
    settings,
    until,
)

ROOT = Path(__file__).parents[1]
ROWS: list[str] = []
Test = TypeVar("Test", bound=Callable[..., None])


def row(fault: str, *cases: str) -> Callable[[Test], Test]:
    """The test of a row of the table, run for each of its cases."""
    ROWS.append(fault)
    return pytest.mark.parametrize("case", cases)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    source = Source(tmp_path)
    yield source
    source.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


async def take(peer: Peer) -> None:
    """A broker that behaves."""
    await peer.accept()
    await peer.acknowledge_all()


def gaps(broker: ScriptedBroker) -> list[float]:
    return [b - a for a, b in zip(broker.times, broker.times[1:])]


def losses(source: Source) -> int:
    """Counted, not asked of the status: a connection may be back before anyone looks."""
    return source.counter("mqtt_disconnects") + source.counter("mqtt_connect_failures")


def balanced(source: Source, published: int, dead: int = 0) -> None:
    cursor = source.log.cursor(0)
    assert (cursor.published, cursor.dead_lettered, source.log.unexplained(0)) == (
        published,
        dead,
        0,
    )


# ---- a peer that is not there -----------------------------------------------------------------


@row(
    "refused, reset, FIN, accept without CONNACK, black hole, half-open",
    *("refused", "reset", "FIN", "half-close", "accept without CONNACK", "black hole", "deaf"),
)
def test_a_broker_that_is_gone_is_found_in_time(source: Source, case: str) -> None:
    source.add(5)
    # what finds it, and within how long
    limit_s = {"accept without CONNACK": 0.3, "black hole": 1.5, "deaf": 1.5}.get(case, 0.1)

    async def main() -> None:
        port = free_port()
        async with contextlib.AsyncExitStack() as stack:
            if case == "refused":
                proxy = None
            else:
                silent = [case == "accept without CONNACK"]

                async def script(peer: Peer) -> None:
                    if silent[0]:
                        await peer.left()
                    await take(peer)

                broker = await stack.enter_async_context(ScriptedBroker(script))
                proxy = await stack.enter_async_context(FaultProxy(broker.port))
                port = proxy.port
            publisher = await stack.enter_async_context(
                publishing(source, port, keep_alive_s=1, connect_timeout_ms=300)
            )
            if proxy is not None and not silent[0]:
                assert await publisher.drain(5)
            start = time.monotonic()
            if proxy is None:
                pass
            elif case == "reset":
                proxy.reset()
            elif case == "FIN":
                for peer in broker.peers:
                    peer.close()
            elif case == "half-close":
                proxy.half_close()
            elif case == "black hole":
                proxy.black_hole = True
            elif case == "deaf":
                proxy.deaf = True
            await until(lambda: losses(source))
            assert time.monotonic() - start < limit_s + 0.5
            before = source.log.committed
            source.add(5)  # ingest does not notice
            assert source.log.committed > before
            await until(lambda: source.counter("mqtt_connect_failures") > 2 or proxy is not None)
            if proxy is None:
                await stack.enter_async_context(ScriptedBroker(take, port))
            else:
                proxy.black_hole = proxy.deaf = silent[0] = False
            publisher.on_committed()
            assert await publisher.drain(5), publisher.status

    run(main())
    balanced(source, 10)


_peers = itertools.count()


class SilentPeer:
    """A recording broker in a network namespace of its own, which can fall silent."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "recorded"
        # Its own for each: the kernel takes its time to remove the last one.
        number = next(_peers) + os.getpid() * 8
        self._name, self._veth = f"gw-test-{number}", f"gwt{number}"
        high, low = number // 64 % 256, number % 64 * 4
        self._own, self.host = f"10.219.{high}.{low + 1}", f"10.219.{high}.{low + 2}"

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def inside(self, *command: str) -> None:
        subprocess.run(["ip", "netns", "exec", self._name, *command], check=True)

    def __enter__(self) -> "SilentPeer":
        self._ip("netns", "add", self._name)
        try:
            self._ip(*f"link add {self._veth} type veth peer name far netns {self._name}".split())
            self._ip("addr", "add", f"{self._own}/30", "dev", self._veth)
            self._ip("link", "set", self._veth, "up")
            self._ip("-n", self._name, "addr", "add", f"{self.host}/30", "dev", "far")
            self._ip("-n", self._name, "link", "set", "far", "up")
            command = ["ip", "netns", "exec", self._name, sys.executable, "-m", "tests.brokers"]
            command += ["record", "--host", self.host, "--port", "1883", "--file", str(self.file)]
            self._broker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
            assert self._broker.stdout is not None
            assert self._broker.stdout.readline()
        except BaseException:
            self._ip("netns", "del", self._name)
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._broker.kill()
        self._broker.wait()
        assert self._broker.stdout is not None
        self._broker.stdout.close()
        self._ip("netns", "del", self._name)  # and the pair of interfaces with it

    def fall_silent(self, how: str) -> None:
        if how == "nft drop":
            rules = "table inet t { chain c { type filter hook input priority 0; policy drop; }; }"
            self.inside("nft", rules)
        else:
            self._ip("-n", self._name, "link", "set", "far", "down")

    def come_back(self, how: str) -> None:
        if how == "nft drop":
            self.inside("nft", "flush", "ruleset")
        else:
            self._ip("-n", self._name, "link", "set", "far", "up")


@pytest.mark.parametrize(
    ("how", "when"),
    [("nft drop", "idle"), ("link down", "in flight"), ("nft drop", "before CONNECT")],
)
def test_a_silent_network_is_found_in_time(
    source: Source, tmp_path: Path, how: str, when: str
) -> None:
    with SilentPeer(tmp_path) as peer:

        async def main() -> None:
            changes: dict[str, Any] = {"url": f"mqtt://{peer.host}", "keep_alive_s": 1}
            if when == "before CONNECT":
                peer.fall_silent(how)
            start = time.monotonic()
            async with publishing(source, 0, connect_timeout_ms=500, **changes) as publisher:
                if when != "before CONNECT":
                    await until(lambda: publisher.status.ok)
                    peer.fall_silent(how)
                    start = time.monotonic()
                    if when == "in flight":
                        source.add(20)
                        publisher.on_committed()
                limit_s = 0.5 if when == "before CONNECT" else 1.5
                await until(lambda: losses(source))
                assert time.monotonic() - start < limit_s + 0.5, publisher.status
                source.add(20)  # ingest goes on
                peer.come_back(how)
                publisher.on_committed()
                assert await publisher.drain(10), publisher.status

        run(main(), 30)
        got = [number(message["payload"].encode()) for message in recorded(peer.file)]
    assert sorted(set(got)) == list(range(source.count))
    assert source.letters == []  # a network that dies is no strike
    balanced(source, source.count)


# ---- PUBACK -----------------------------------------------------------------------------------


@row(
    "PUBACK slow, never, out of order, repeated, unknown id, split into single bytes, a thousand in"
    " one segment",
    *("slow", "never", "out of order", "repeated", "unknown id", "single bytes", "a thousand"),
)
def test_pubacks_of_every_shape(source: Source, case: str) -> None:
    count = 1000 if case == "a thousand" else 8
    source.add(count)
    cursors: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        if peer.number:
            await peer.acknowledge_all()
            return
        publishes = await peer.publishes(count)
        answers = [brokers.puback(publish.id) for publish in publishes]
        if case == "never":
            await peer.left()
        elif case in ("repeated", "unknown id"):
            wrong = answers[0] if case == "repeated" else brokers.puback(60000)
            peer.send(answers[0] + answers[2] + wrong)
            while (await peer.packet())[0] != 0xE0:
                pass
            await peer.left()
        elif case == "out of order":
            for answer in reversed(answers):
                cursors.append(source.published)
                peer.send(answer)
                await asyncio.sleep(0.005)
        elif case == "slow":
            for answer in answers:
                await asyncio.sleep(0.03)
                peer.send(answer)
        elif case == "single bytes":
            await peer.send_bytewise(b"".join(answers))
        else:
            peer.send(b"".join(answers))
        await peer.acknowledge_all()

    scripted(source, script, drained, puback_timeout_ms=2000 if case == "slow" else 200)
    balanced(source, count)
    assert cursors == [0] * len(cursors)
    lost = case in ("never", "repeated", "unknown id")
    assert source.counter("mqtt_connects") == 1 + lost
    assert source.letters == []


def test_control_a_strike_for_a_missing_puback_would_kill_the_innocent(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that never acknowledges: with the rule the event waits, without it is struck out."""
    source.add(1)

    async def script(peer: Peer) -> None:
        await peer.accept()
        if peer.number < 4:
            await peer.left()
        await peer.acknowledge_all()

    changes = {"puback_timeout_ms": 100, "poison_attempts": 2}
    scripted(source, script, drained, **changes)
    assert source.letters == []
    source.add(1)
    from gateway import mqtt_link

    class Strikes(mqtt_link.Lost):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"blames_in_flight": True})

    monkeypatch.setattr(mqtt_link, "Lost", Strikes)
    scripted(source, script, drained, **changes)
    assert source.dead == [1]


@row("PUBACK 0x80 0x83 0x97", "0x80", "0x83", "0x97", "0xC7")
def test_a_puback_that_asks_for_patience_never_dead_letters(source: Source, case: str) -> None:
    source.add(6)
    seen: list[Publish] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        for n in range(12):
            seen.append(await peer.publish())
            if numbers(seen[-1:]) == [2] and n < 9:
                peer.puback(seen[-1].id, int(case, 0))
            else:
                peer.puback(seen[-1].id)
        await peer.acknowledge_all()

    scripted(source, script, drained, {"draw": lambda: 1.0})
    assert numbers(seen).count(2) > 3
    assert source.letters == []
    balanced(source, 6)


@row(
    "PUBACK 0x87 0x90 0x99; packet too large; topic too long",
    *("0x87", "0x90", "0x99", "too large", "topic invalid", "topic too long"),
)
def test_what_will_never_be_taken_is_set_aside(source: Source, case: str) -> None:
    changes: dict[str, Any] = {}
    reason = int(case, 0) if case.startswith("0x") else 0x95 if case == "too large" else 0x90
    properties = brokers.packet_bytes_max(2 + 2 + 15 + 2 + 1 + 60) if case == "too large" else b""
    source.add(2)
    if case in ("too large", "topic invalid"):
        append_odd_record(source, "a/b" if case == "topic invalid" else "dev-1")
    else:
        source.add(1)
    if case == "topic too long":
        with pytest.raises(ConfigError, match="longer than 65535"):
            Publisher(source.log, 0, settings(1, topic="t" * 65472 + "{device_id}"), source.shelf)
        changes["topic"] = "t" * 65471 + "{device_id}"
    source.add(2)
    sent: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.accept(properties=properties)
        while True:
            publish = await peer.publish()
            sent.append(number(publish.payload))
            refuse = sent[-1] == 2 and case not in ("too large", "topic invalid")
            peer.puback(publish.id, reason if refuse else None)

    scripted(source, script, drained, **changes)
    balanced(source, 4, 1)
    (letter,) = source.letters
    assert letter.reason == reason
    assert letter.attempts == (case not in ("too large", "topic invalid"))
    assert source.log.state_of(letter.record.lsn) == "dead_lettered"
    assert source.counter("mqtt_connects") == 1


def append_odd_record(source: Source, device_id: str) -> None:
    appender = _log.Appender(source.log)
    record = source.log.read(source.log.cursor(0).lsn)
    assert record is not None
    appender.append(record._replace(device_id=device_id, body=event(2)[:-1] + b" " * 100 + b"}"))
    appender.close()
    source.log.follow(0, 0)


# ---- what was in flight when the broker left --------------------------------------------------


@row(
    "DISCONNECT 0x95, 0x93, 0x82, 0x81, or a bare close after a send",
    *("0x95", "0x93", "0x82", "0x81", "FIN", "RST"),
)
def test_poison_is_found_one_by_one_and_set_aside(source: Source, case: str) -> None:
    """The first connection breaks with ten in flight; from then on one by one, and the poison has
    its strikes."""
    poison = {"0x95": 0, "RST": 9}.get(case, 3)
    source.add(20)
    rounds: list[list[int]] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        rounds.append([])
        if peer.number == 0:
            rounds[0] += numbers(await peer.publishes(10))
            leave(peer)
            return
        while True:
            publish = await peer.publish()
            rounds[-1] += numbers([publish])
            if rounds[-1][-1] < 10:
                assert await peer.silence(0.003)  # one by one
            if rounds[-1][-1] == poison:
                leave(peer)
                return
            peer.puback(publish.id)

    def leave(peer: Peer) -> None:
        if case.startswith("0x"):
            peer.send(brokers.disconnect(int(case, 0)))
        if case == "RST":
            peer.reset()
        else:
            peer.close()

    scripted(source, script, drained, inflight_max=10, poison_attempts=3)
    assert source.dead == [poison]
    (letter,) = source.letters
    assert (letter.poison, letter.attempts) == (True, 3)
    assert letter.reason == (int(case, 0) if case.startswith("0x") else None)
    assert rounds[0] == list(range(10))
    assert [seen[-1] for seen in rounds[1:4]] == [poison] * 3  # no more than K attempts
    assert len(rounds) == 5
    assert {n for seen in rounds for n in seen} == set(range(20))
    balanced(source, 19, 1)


@pytest.mark.parametrize("code", [0x00, 0x80, 0x83, 0x87, 0x90, 0x99])
def test_other_reasons_that_a_message_can_cause_blame_it_too(source: Source, code: int) -> None:
    source.add(3)

    async def script(peer: Peer) -> None:
        await peer.accept()
        while True:
            publish = await peer.publish()
            if numbers([publish]) == [1]:
                peer.send(brokers.disconnect(code))
                peer.close()
                return
            peer.puback(publish.id)

    scripted(source, script, drained, poison_attempts=2)
    assert source.dead == [1]


@pytest.mark.parametrize("code", [0x88, 0x89, 0x8B, 0x8D, 0x96, 0x97, 0x98, 0xA0])
def test_reasons_that_no_message_can_cause_blame_none(source: Source, code: int) -> None:
    source.add(3)

    async def script(peer: Peer) -> None:
        await peer.accept()
        if peer.number < 5:
            await peer.publish()
            peer.send(brokers.disconnect(code))
            peer.close()
        else:
            assert len(await peer.publishes(3)) == 3  # the window stays wide
            await peer.left()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: len(broker.peers) == 6 and publisher.window.in_flight == 3)

    scripted(source, script, check, poison_attempts=1)
    assert source.letters == []


def test_strikes_are_taken_back_by_an_end_in_the_quiet(source: Source) -> None:
    """Two of three connections stand the quiet and break on the event; the third breaks in it."""
    source.add(1)

    async def script(peer: Peer) -> None:
        await peer.accept()
        if peer.number >= 14:
            await peer.acknowledge_all()
        elif peer.number % 3:
            await peer.publish()
        peer.close()

    scripted(source, script, drained, poison_attempts=3)
    assert source.letters == []
    balanced(source, 1)


@pytest.mark.parametrize("when", ["at once", "before anything is proved", "after long"])
def test_a_broker_that_breaks_by_itself_strikes_nobody(
    source: Source, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`poison_attempts` is 1, and still nobody is struck: the experiment was never clean."""
    from gateway import retry

    if when == "after long":
        monkeypatch.setattr(retry, "STRIKE_S", 0.05)
    source.add(1)

    async def script(peer: Peer) -> None:
        await peer.accept()
        if peer.number >= 6:
            await peer.acknowledge_all()
        elif when == "at once":
            peer.close()
        elif when == "after long":
            await peer.publish()
            await asyncio.sleep(0.1)
            peer.close()
        else:
            await peer.silence(0.02)  # less than the quiet
            peer.close()

    scripted(source, script, drained, poison_attempts=1)
    assert source.letters == []
    balanced(source, 1)


def test_a_broker_that_takes_nothing_is_not_asked_faster_and_faster(source: Source) -> None:
    """Each event in its turn breaks the connection: the backoff starts again only once, so it is
    the broker's patience that ends, not the log's content."""
    source.add(50)

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.publish()
        peer.close()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: len(source.letters) == 3)
        assert publisher.connections[0].backoff.attempts >= 4

    options = {"draw": lambda: 0.0, "quiet_s": 0.01}
    scripted(source, script, check, options, poison_attempts=2)


def test_poison_waits_while_dead_letters_cannot_be_kept(source: Source) -> None:
    source.add(2)
    shelf: Any = source.shelf
    shelf.error = OSError(28, "No space left on device")

    async def script(peer: Peer) -> None:
        await peer.accept()
        while True:
            publish = await peer.publish()
            if numbers([publish]) == [0]:
                return
            peer.puback(publish.id)

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: shelf.tries > 3)
        assert "No space left" in publisher.status.last_error
        assert publisher.status.state == "held"
        peers = len(broker.peers)
        await asyncio.sleep(0.1)
        assert len(broker.peers) == peers  # not sent again meanwhile
        shelf.error = None
        await drained(publisher, broker)

    scripted(source, script, check, poison_attempts=2)
    assert source.dead == [0]
    balanced(source, 1, 1)


# ---- DISCONNECT, CONNACK, TLS -----------------------------------------------------------------


def never_tight(
    source: Source,
    script: Script,
    state: str,
    says: str,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    tls: ssl.SSLContext | None = None,
    **changes: Any,
) -> None:
    """The broker says no: no tight loop, one alarm, and the status file, which /healthz reads."""
    file = folder / "mqtt-status.json"

    async def main() -> None:
        async with ScriptedBroker(script, tls=tls) as broker:
            scheme = "mqtt" if tls is None else "mqtts"
            url = f"{scheme}://127.0.0.1:{broker.port}"
            options = {"status_file": file}
            async with publishing(
                source, broker.port, options, url=url, backoff_max_ms=100, **changes
            ) as publisher:
                await until(lambda: LinkStatus.read(file).state == state)
                status = LinkStatus.read(file)
                assert says in status.last_error, status
                assert not status.ok
                failures = "mqtt_connect_failures" if state == "refused" else "mqtt_disconnects"
                start, before = time.monotonic(), source.counter(failures)
                await until(lambda: source.counter(failures) == before + 2)
                assert time.monotonic() - start > 0.09  # half the cap or more, twice
                assert publisher.window.lsn < source.log.committed

    run(main())
    alarms = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(alarms) == 1, [r.getMessage() for r in alarms]


@row("DISCONNECT 0x8E (taken over)", "0x8E")
def test_a_session_taken_over_is_no_ping_pong(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    source.add(1)

    async def script(peer: Peer) -> None:
        assert (await peer.accept()).clean_start
        await peer.publish()
        peer.send(brokers.disconnect(int(case, 0)))
        peer.close()

    never_tight(source, script, Kind.TAKEN_OVER.value, "second gateway", tmp_path, caplog)
    assert source.letters == []


@row(
    "CONNACK 0x86 0x87 0x8A, TLS failure, wrong host, expired",
    *("0x86", "0x87", "0x8A", "not TLS", "unknown CA", "wrong host", "expired"),
)
def test_a_door_that_stays_shut_is_an_alarm(
    source: Source, certificates: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    source.add(1)

    async def script(peer: Peer) -> None:
        await peer.accept(reason=int(case, 0))
        await peer.left()

    if case.startswith("0x"):
        never_tight(source, script, "refused", case, tmp_path, caplog)
        return
    context = None
    says = {"not TLS": "TLS", "expired": "expired", "wrong host": "wrong.test"}.get(
        case, "mqtt.ca_file"
    )
    changes: dict[str, Any] = {"server_name": "broker.test"}
    changes["ca_file"] = str(certificates / ("other.pem" if case == "unknown CA" else "ca.pem"))
    if case == "wrong host":
        changes["server_name"] = "wrong.test"
    if case != "not TLS":
        name = "expired" if case == "expired" else "server"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    else:
        changes |= {"cert_file": str(certificates / "client.pem")}
        changes |= {"key_file": str(certificates / "client.key")}
        never_tight_plain(source, says, tmp_path, caplog, changes)
        return
    never_tight(source, script, "refused", says, tmp_path, caplog, context, **changes)


def never_tight_plain(
    source: Source, says: str, folder: Path, caplog: pytest.LogCaptureFixture, changes: Any
) -> None:
    """mqtts:// to a port that speaks plain MQTT, which answers a ClientHello with nonsense."""

    async def nonsense(peer: Peer) -> None:
        await peer._reader.read(65536)
        peer.send(b"400 speak plainly\r\n")
        await peer.left()

    async def main() -> None:
        async with ScriptedBroker(nonsense) as broker:
            url = f"mqtts://127.0.0.1:{broker.port}"
            async with publishing(source, broker.port, url=url, backoff_max_ms=100, **changes) as p:
                await until(lambda: p.status.state == "refused")
                assert says in p.status.last_error
                await until(lambda: len(broker.peers) == 3)
                assert min(gaps(broker)) > 0.045

    run(main())
    assert len([r for r in caplog.records if r.levelno >= logging.ERROR]) == 1


@pytest.mark.parametrize("case", ["wrong host", "expired"])
def test_mosquitto_with_a_certificate_that_is_wrong(
    source: Source, certificates: Path, tmp_path: Path, case: str
) -> None:
    source.add(3)
    name = "expired" if case == "expired" else "server"
    listener = (f"certfile {certificates}/{name}.pem", f"keyfile {certificates}/{name}.key")

    async def main() -> None:
        with Mosquitto(tmp_path / "m", listener=listener) as broker:
            async with publishing(
                source,
                broker.port,
                url=f"mqtts://127.0.0.1:{broker.port}",
                ca_file=str(certificates / "ca.pem"),
                server_name="wrong.test" if case == "wrong host" else "broker.test",
            ) as publisher:
                await until(lambda: publisher.status.state == "refused")
                says = "wrong.test" if case == "wrong host" else "expired"
                assert says in publisher.status.last_error
                assert source.published == 0

    run(main())


@row("a broker that speaks only 3.1.1", "return code 1", "accepts in its form", "closes")
def test_a_broker_of_mqtt_311_is_told_apart(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    source.add(1)

    async def script(peer: Peer) -> None:
        await peer.connect()
        if case == "closes":
            peer.close()
        else:
            peer.send(b"\x20\x02\x00\x01" if case == "return code 1" else b"\x20\x02\x00\x00")
            await peer.left()

    if case != "closes":
        never_tight(source, script, "refused", "MQTT 5", tmp_path, caplog)
        return

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: len(broker.peers) == 6)
        assert "MQTT 5" in publisher.status.last_error
        assert all(gap > 0.01 * 2**n - 0.003 for n, gap in enumerate(gaps(broker)))

    scripted(source, script, check, {"draw": lambda: 1.0}, backoff_max_ms=9999)


@row(
    "Receive Maximum 1, Maximum Packet Size small, Maximum QoS 0, session present unasked",
    *("Receive Maximum 1", "Maximum Packet Size", "Maximum QoS 0", "session present"),
)
def test_limits_of_the_broker_are_obeyed(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    source.add(12)
    most = 22 + len(event(9))
    properties = {
        "Receive Maximum 1": brokers.receive_maximum(1),
        "Maximum Packet Size": brokers.packet_bytes_max(most),
        "Maximum QoS 0": brokers.qos_max(0),
    }.get(case, b"")
    sizes: list[int] = []

    async def script(peer: Peer) -> None:
        unasked = case == "session present" and peer.number == 0
        await peer.accept(session_present=unasked, properties=properties)
        while True:
            publish = await peer.publish()
            assert not unasked
            sizes.append(22 + len(publish.payload))
            if case == "Receive Maximum 1":
                assert await peer.silence(0.005)
            peer.puback(publish.id)

    if case == "Maximum QoS 0":
        never_tight(source, script, "refused", "QoS 0", tmp_path, caplog)
        assert sizes == []
        return
    scripted(source, script, drained)
    if case == "Maximum Packet Size":
        assert max(sizes) == most
        assert source.dead == [10, 11]
        balanced(source, 10, 2)
    else:
        balanced(source, 12)
    if case == "session present":
        assert source.counter("mqtt_connects") == 1
        assert any("session present" in r.getMessage() for r in caplog.records)


@row("accept-CONNACK-close a hundred times", "100")
def test_a_hundred_closes_do_not_reset_the_backoff(source: Source, case: str) -> None:
    source.add(10)
    draws: list[float] = []
    looked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        if peer.number < int(case):
            peer.close()
        else:
            await looked.wait()
            await peer.acknowledge_all()

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        await until(lambda: len(broker.peers) > int(case), 15)
        assert publisher.connections[0].backoff.attempts == int(case)
        assert source.published == 0
        looked.set()
        await drained(publisher, broker)

    def draw() -> float:
        draws.append(0.1)
        return draws[-1]

    scripted(source, script, check, {"draw": draw}, poison_attempts=1)
    assert len(draws) >= int(case)
    assert source.letters == []  # with events in flight each time, and one strike would do
    balanced(source, 10)


# ---- a broker that forgets --------------------------------------------------------------------


@row("broker restarts and forgets the session", "scripted", "Mosquitto without persistence")
def test_a_forgotten_session_starts_from_the_cursor(
    source: Source, tmp_path: Path, case: str
) -> None:
    if case == "scripted":
        source.add(6)
        seen: list[list[Publish]] = []

        async def script(peer: Peer) -> None:
            connect = await peer.accept()
            assert connect.clean_start == (peer.number == 0)  # the old session was asked for
            seen.append([])
            for n in range(6 if peer.number == 0 else 4):
                seen[-1].append(await peer.publish())
                if peer.number or n in (0, 1, 3):
                    peer.puback(seen[-1][-1].id)
            if peer.number == 0:
                await until(lambda: source.published == 2)
                peer.close()
            await peer.left()

        scripted(source, script, drained)
        assert numbers(seen[1]) == [2, 3, 4, 5]
        assert not any(publish.dup for publish in seen[1])
        balanced(source, 6)
        return

    async def main() -> None:
        broker = Mosquitto(tmp_path / "m").start()
        try:
            async with publishing(source, broker.port) as publisher:
                for n in range(3):
                    source.add(300)
                    publisher.on_committed()
                    await until(lambda: publisher.status.ok and publisher.window.look().acks)
                    broker.kill(signal.SIGTERM if n == 0 else signal.SIGKILL)
                    await until(lambda: not publisher.status.ok)
                    source.add(100)
                    broker.start()
                assert await publisher.drain(10), publisher.status
        finally:
            broker.kill()

    run(main())
    assert source.letters == []
    balanced(source, 1200)


# ---- the way of the bytes ---------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["one byte a segment", "delay", "both"])
def test_a_bad_way_changes_nothing_but_the_time(source: Source, tmp_path: Path, fault: str) -> None:
    source.add(60)

    async def main() -> None:
        with Mosquitto(tmp_path / "m") as broker:
            async with FaultProxy(broker.port) as proxy:
                if fault != "delay":
                    proxy.segment_bytes = 1 if fault != "both" else 500
                if fault != "one byte a segment":
                    proxy.delay_s = 0.01
                async with publishing(source, proxy.port) as publisher:
                    assert await publisher.drain(10), publisher.status
                    assert proxy.accepted == 1

    run(main())
    balanced(source, 60)


def test_resets_at_any_moment_lose_and_double_nothing_in_the_books(
    source: Source, tmp_path: Path
) -> None:
    async def main() -> None:
        with Mosquitto(tmp_path / "m") as broker:
            async with FaultProxy(broker.port) as proxy:
                # Resets as quick as PUBACKs, and next to no quiet: strikes are tested elsewhere.
                options = {"quiet_s": 0.01}
                async with publishing(
                    source, proxy.port, options, poison_attempts=100
                ) as publisher:
                    for n in range(25):
                        source.add(40)
                        publisher.on_committed()
                        await asyncio.sleep(0.001 * n)
                        proxy.reset()
                    assert await publisher.drain(15), publisher.status

    run(main(), 40)
    assert source.letters == []
    balanced(source, 1000)


# ---- the tables -------------------------------------------------------------------------------


def test_every_row_of_the_table_has_its_test() -> None:
    text = (ROOT / "docs" / "delivery.md").read_text()
    table = text.partition("| fault | what the gateway does |\n|---|---|\n")[2].partition("\n\n")[0]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()] == ROWS


def test_the_puback_table_for_operators_is_the_one_in_force() -> None:
    text = (ROOT / "docs" / "delivery.md").read_text()
    table = text.partition("| PUBACK | verdict | why |\n|---|---|---|\n")[2].partition("\n\n")[0]
    found = dict(re.findall(r"^\| (0x[0-9A-F]{2}) .*? \| ([a-z ]+?) \|", table, re.M))
    words = {
        Puback.WAIT: "wait",
        Puback.DEAD_LETTER: "dead letter",
        Puback.RECONNECT: "new session",
    }
    assert found == {f"0x{code:02X}": words[verdict] for code, verdict in PUBACK.items()}


def test_strikes_are_for_the_same_event_only() -> None:
    suspects = Suspects(2, 1.0)
    one = _view(1, 100, 200)
    other = _view(1, 200, 300)
    assert suspects.connection_ended(one, 1, True) is None
    assert suspects.connection_ended(other, 1, True) is None
    assert suspects.connection_ended(one, 1, True) is None
    assert suspects.connection_ended(_view(5, 100, 600), 1, True) is None  # not alone
    assert suspects.connection_ended(one, 1, False) is None  # not proved
    assert suspects.connection_ended(one, 6 * 10**9, True) is None  # too late
    assert suspects.connection_ended(_view(0, 0, 200), 1, True) is None  # no fault of an event
    assert suspects.connection_ended(one, 1, True) is None
    assert suspects.connection_ended(one, 1, True) == 100
    assert suspects.quiet_s(599) == 1.0
    assert suspects.quiet_s(600) == 0.0


def _view(in_flight: int, oldest_lsn: int, read_lsn: int) -> Any:
    from gateway._mqtt import View

    return View(0, 0, 0, 0, read_lsn, in_flight, in_flight, 0, 0, 0, oldest_lsn, 0, 1)
