"""The compiled MQTT window: mqttools as oracle, random segments, C tests under sanitizers."""

import asyncio
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mqttools.common import (
    PayloadReader,
    unpack_string,
    unpack_u16,
    unpack_variable_integer,
)

from gateway import _log, mqtt
from gateway._mqtt import PACKET_TOO_LARGE, ProtocolError, Window
from gateway.topics import parse_topic
from tests import brokers

ROOT = Path(__file__).parents[1]
EVENT = b'{"ts":"2025-09-23T11:18:41Z","metrics":{"t":1}}'


class OneLog:
    """A log of its own, with what a test puts in."""

    def __init__(self, folder: Path) -> None:
        path = str(folder / "gateway.log")
        _log.create(path, _log.CAPACITY_MIN)
        self._fd = os.open(path, os.O_RDWR)
        self.log = _log.Log.open(path, self._fd, ["mqtt"])
        self._ingest = _log.Ingest(self.log, 0)

    def add(self, *bodies: bytes, device_id: str = "dev-1") -> None:
        for body in bodies:
            code = self._ingest.event(device_id, body, _log.now_ns())
            assert code == 0, _log.CODES[code]
        self.log.follow(0, 0)

    def close(self) -> None:
        self._ingest.close()
        self.log.close()
        os.close(self._fd)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[OneLog]:
    log = OneLog(tmp_path)
    yield log
    log.close()


def window_over(one: OneLog, inflight_max: int = 1000) -> Window:
    window = Window(one.log, 0, b"telemetry/", b"", inflight_max)
    window.open(False)
    return window


def unpack_all(data: bytes) -> list[tuple[int, str, int, bytes]]:
    """(first byte, topic, packet id, payload) of each PUBLISH, by mqttools' codec."""
    reader, found = PayloadReader(data), []
    while reader.is_data_available():
        first = reader.read(1)[0]
        body = PayloadReader(reader.read(unpack_variable_integer(reader)))
        topic, identifier = unpack_string(body), unpack_u16(body)
        assert unpack_variable_integer(body) == 0
        found.append((first, topic, identifier, body.read_all()))
    return found


@pytest.mark.parametrize(
    ("source", "macro"),
    [
        ("tests/native/test_mqtt.c", "GW_PLAIN"),
        ("tests/native/test_mqtt.c", "GW_MUTANT_SKIP=5"),
    ],
    ids=["window", "a record skipped on purpose"],
)
def test_native_tests_pass_under_sanitizers(source: str, macro: str, tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "no C compiler"
    program = tmp_path / "t"
    command = [
        compiler,
        "-std=gnu11",
        "-g",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-function",
    ]
    command += ["-Wno-unused-parameter", "-fsanitize=address,undefined"]
    command += ["-fno-sanitize-recover=all", f"-D{macro}", "-I_native", "-Itests/native"]
    sources = sorted((ROOT / "_native").glob("gw_mqtt*.c"))
    subprocess.run([*command, source, *sources, "-o", program], cwd=ROOT, check=True)
    done = subprocess.run([program, str(random.randrange(1 << 30)), "3000"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"ok")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.from_regex(r"\A[A-Za-z0-9_-]{1,64}\Z"),
            st.booleans(),
            st.sampled_from(["", " ", "\n\t", " " * 300]),
            st.integers(0, 17000),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_packets_are_what_mqttools_reads(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, bool, str, int]]
) -> None:
    one = OneLog(tmp_path_factory.mktemp("log"))
    bodies = []
    for device_id, has_ts, space, padding in events:
        ts = '"ts":"2025-09-23T11:18:41Z",' if has_ts else ""
        body = f'{space}{{{ts}"metrics":{{}},"payload":"{"x" * padding}"}}'.encode()
        one.add(body, device_id=device_id)
        bodies.append(body)
    window = window_over(one)
    data = b"".join(iter(window.fill, None))
    lsn = one.log.cursor(0).lsn
    for n, (first, topic, identifier, payload) in enumerate(unpack_all(data)):
        device_id, has_ts, space, _ = events[n]
        record = one.log.read(lsn)
        assert record is not None
        lsn += record.size
        assert (first, topic, identifier) == (0x32, f"telemetry/{device_id}", n + 1)
        if has_ts:
            assert payload == bodies[n]
        else:
            seconds, ns = divmod(record.received_at_ns, 10**9)
            at = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            ts = f'"ts":"{at}.{ns // 10**6:03d}Z",'.encode()
            head = len(space) + 1
            assert payload == bodies[n][:head] + ts + bodies[n][head:]
    assert len(unpack_all(data)) == len(events)
    one.close()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_segmentation_gives_the_same_verdicts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    one = OneLog(tmp_path_factory.mktemp("log"))
    one.add(*[EVENT] * 20)
    reasons = st.sampled_from([None, None, 0x00, 0x10, 0x97])
    strings = st.sampled_from(["", "", "why", "x" * 200])
    stream = b""
    for identifier in data.draw(st.permutations(range(1, 21))):
        reason = data.draw(reasons)
        stream += brokers.puback(identifier, reason, data.draw(strings) if reason else "")
        if data.draw(st.integers(0, 5)) == 0:
            stream += data.draw(
                st.sampled_from(
                    [
                        b"\xd0\x00",
                        b"\xe0\x01\x8e",
                        b"\x40\x02\x00\x63",
                        b"\x00\x00",
                        b"\x42\x02\x00\x01",
                    ]
                )
            )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1))))
    results = []
    for segments in ([stream], [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)])]):
        one.log.set_cursor(
            0, one.log.cursor(0)._replace(lsn=first_lsn(one), ordinal=0, published=0)
        )
        window = window_over(one)
        assert window.fill() is not None
        packets, error = [], ""
        for segment in segments:
            try:
                packets += window.feed(segment) or []
            except ProtocolError as problem:
                packets += problem.packets
                error = str(problem)
                break
        results.append((packets, error, window.look()._replace(oldest_sent_ns=0)))
    assert results[0] == results[1]
    one.close()


def first_lsn(one: OneLog) -> int:
    if not hasattr(one, "first"):
        one.first = one.log.cursor(0).lsn  # type: ignore[attr-defined]
    return one.first  # type: ignore[attr-defined,no-any-return]


def test_cursor_is_stored_in_the_log_as_pubacks_come(one: OneLog) -> None:
    one.add(EVENT, EVENT, EVENT)
    start = one.log.cursor(0)
    window = window_over(one)
    ids = [identifier for _, _, identifier, _ in unpack_all(window.fill() or b"")]
    window.feed(brokers.puback(ids[1]))
    assert one.log.cursor(0) == start
    window.feed(brokers.puback(ids[0]))
    assert one.log.cursor(0).published == 2
    window.feed(brokers.puback(ids[2], 0x10))
    assert one.log.cursor(0).lsn == one.log.committed == window.lsn
    assert one.log.cursor(0).ordinal == one.log.cursor(0).published == 3
    assert one.log.unexplained(0) == 0


def test_puback_time_is_counted_from_the_receipt(one: OneLog) -> None:
    one.add(EVENT)
    window = window_over(one)
    window.fill()
    window.feed(brokers.puback(1))
    at = _log.COUNTERS["puback_ns"]
    buckets = [one.log.counter(_log.BLOCK_DELIVERY, at + i) for i in range(24)]
    assert sum(buckets[:23]) == 1
    assert 0 < buckets[23] < 60 * 10**9


def test_refusals_tell_lsn_reason_and_words(one: OneLog) -> None:
    one.add(EVENT)
    window = window_over(one)
    window.fill()
    packets = window.feed(brokers.puback(1, 0x97, "come back later"))
    assert packets is not None
    (packet,) = packets
    assert (packet.type, packet.reason) == (mqtt.PUBACK, 0x97)
    assert packet.lsn == one.log.cursor(0).lsn
    assert mqtt.puback_reason_string(packet.body) == "come back later"
    assert window.held
    (refusal,) = window.refusals()
    assert refusal[:3] == (packet.lsn, 0x97, True)


def test_a_record_above_the_brokers_packet_size_is_held(one: OneLog) -> None:
    one.add(EVENT)
    window = Window(one.log, 0, b"telemetry/", b"")
    window.open(False, 65535, 60)
    assert window.fill() is None
    (refusal,) = window.refusals()
    assert (refusal.reason, refusal.by_broker) == (PACKET_TOO_LARGE, False)


def test_topic_without_a_device_is_one_topic(one: OneLog) -> None:
    one.add(EVENT)
    window = Window(one.log, 0, "målinger/alle".encode(), None)
    window.open(False)
    assert unpack_all(window.fill() or b"")[0][1] == "målinger/alle"


@pytest.mark.parametrize(
    ("prefix", "inflight_max"), [(b"a/+/", 1), (b"a/#", 1), (b"a\0", 1), (b"", 0), (b"a", 65536)]
)
def test_bad_options_are_refused(one: OneLog, prefix: bytes, inflight_max: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        Window(one.log, 0, prefix, b"", inflight_max)


# ---- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("", "empty"),
        ("a/+", "wildcards"),
        ("a/#", "wildcards"),
        ("$SYS/{device_id}", "start with"),
        ("a/{device}", "only {device_id}"),
        ("a/{device_id", "only {device_id}"),
        ("{device_id}/{device_id}", "once"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("x" * 65472 + "{device_id}", "65535"),
    ],
)
def test_bad_topics_are_refused_with_the_reason(template: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_topic(template)


def test_topics_fill_the_device_in() -> None:
    assert parse_topic("a/{device_id}/b").fill("x") == "a/x/b"
    assert parse_topic("a").fill("x") == "a"
    assert parse_topic("/a//{device_id}").fill("x") == "/a//x"
    assert parse_topic("x" * 65471 + "{device_id}").prefix == "x" * 65471


def test_connect_is_what_a_broker_reads() -> None:
    data = mqtt.connect_packet(
        "gæst",
        clean_start=True,
        keep_alive_s=30,
        session_expiry_s=300,
        username="brugér",
        password=b"\xff\x00",
    )
    ((first, body, end),) = brokers.split(data)
    assert (first, end) == (0x10, len(data))
    connect = brokers.read_connect(body)
    assert (connect.level, connect.clean_start, connect.keep_alive_s) == (5, True, 30)
    assert (connect.client_id, connect.username, connect.password) == (
        "gæst",
        "brugér",
        b"\xff\x00",
    )
    assert connect.properties == b"\x11" + struct.pack(">I", 300) + b"\x27" + struct.pack(
        ">I", 65536
    )


def connack_body(reason: int, properties: bytes) -> bytes:
    return bytes((0, reason)) + brokers.varint(len(properties)) + properties


def test_connack_with_user_properties_is_read() -> None:
    pair = b"\x26\x00\x01k\x00\x02\x21\x21"
    properties = pair + brokers.receive_maximum(7) + pair + b"\x1f\x00\x02hi" + brokers.qos_max(1)
    connack = mqtt.parse_connack(0, connack_body(0, properties))
    assert (connack.receive_maximum, connack.qos_max, connack.reason_string) == (7, 1, "hi")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00",
        b"\x02\x00\x00",
        b"\x01\x87\x00",
        b"\x00\x7f\x00",
        connack_body(0, b"\x21\x00\x00"),
        connack_body(0, b"\x27\x00\x00\x00\x00"),
        connack_body(0, b"\x24\x02"),
        connack_body(0, b"\x24\x00\x24\x00"),
        connack_body(0, b"\x21\x00"),
        connack_body(0, b"\x7e\x00"),
        connack_body(0, b"\x1f\x00\x09hi"),
        b"\x00\x00\x05\x24\x00",
        b"\x00\x00\xff\xff\xff\xff\xff",
    ],
)
def test_malformed_connack_is_a_codec_error(body: bytes) -> None:
    with pytest.raises(mqtt.CodecError):
        mqtt.parse_connack(0, body)


@given(st.binary(max_size=40))
def test_any_bytes_end_in_a_packet_or_a_codec_error(body: bytes) -> None:
    for parse in (mqtt.parse_connack, mqtt.parse_disconnect):
        try:
            parse(0, body)
        except mqtt.CodecError:
            pass


def test_connack_of_mqtt_311_is_told_apart() -> None:
    assert mqtt.parse_connack(0, b"\x00\x01").mqtt_311
    assert mqtt.parse_connack(0, b"\x00\x00").mqtt_311
    assert not mqtt.parse_connack(0, b"\x00\x00\x00").mqtt_311


def test_unknown_disconnect_reasons_are_named_by_number() -> None:
    assert str(mqtt.parse_disconnect(0, b"\xfe")) == "0xFE unknown reason"
    assert str(mqtt.parse_disconnect(0, b"")) == "0x00 success"


def test_text_from_outside_is_printable_and_bounded() -> None:
    assert mqtt.printable("a\nb\x1b[0m\u202e") == "a\\u000ab\\u001b[0m\\u202e"
    assert len(mqtt.printable("x" * 10_000)) < 210


def test_status_survives_the_way_through_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mqtt.status"
    assert mqtt.LinkStatus.read(file) == mqtt.LinkStatus()
    status = mqtt.LinkStatus(broker="mqtt://x:1").to("refused", "no")
    status.write(file)
    assert mqtt.LinkStatus.read(file) == status
    assert not status.ok
    assert list(tmp_path.iterdir()) == [file]
    file.write_text('{"sta')
    assert mqtt.LinkStatus.read(file) == mqtt.LinkStatus()


# ---- the tests' own recording broker ----------------------------------------------------------


def test_recording_broker_writes_before_it_acknowledges(tmp_path: Path) -> None:
    file = tmp_path / "messages"
    file.write_text('{"topic":"cut')  # a predecessor was killed within a line
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.brokers", "record", "--file", file],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(b":", 1)[1])

        async def publish() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            connect = mqtt.connect_packet(
                "c",
                clean_start=True,
                keep_alive_s=0,
                session_expiry_s=0,
                username=None,
                password=None,
            )
            message = brokers.packet(0x32, b"\x00\x01t\x00\x07\x00" + b"a\nb")
            writer.write(connect + message)
            answers = await reader.readexactly(len(brokers.connack() + brokers.puback(7)))
            assert answers == brokers.connack() + brokers.puback(7)
            (seen,) = brokers.recorded(file)
            assert (seen["topic"], seen["payload"], seen["id"], seen["client"]) == (
                "t",
                "a\nb",
                7,
                "c",
            )
            writer.close()

        asyncio.run(publish())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
