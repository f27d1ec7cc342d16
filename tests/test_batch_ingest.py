"""Batches through the binding: where events begin and end, what is refused, what is counted.

An independent splitter (regular expressions and a stack) and Python's `json` say what the framing
of a body is; the validator, alone with each item, says what is wrong with it. Ends of a batch in
the middle, deaths and races are in tests/native/test_batch.c.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway import _log, _validator
from tests.log_states import empty_log
from tests.native_build import NATIVE, TESTS, build, extension, run

CODE = {name: number for number, name in enumerate(_log.CODES)}
LIMITS = (65536, 10_000)
SPACE = b" \t\n\r"


class Door:
    """A log in memory whose events are taken as soon as they are looked at, and a way into it."""

    def __init__(self, native: Any = _log) -> None:
        self.fd = os.memfd_create("log")
        os.write(self.fd, empty_log())
        path = f"/proc/self/fd/{self.fd}"
        lock = os.open(path, os.O_RDWR)
        self.log = native.Log.open(path, lock, ["mqtt"])
        os.close(lock)
        self.ingest = native.Ingest(self.log, 0)

    def send(
        self,
        body: bytes,
        device: str | None = "dev-1",
        *,
        lines: bool = False,
        limits: tuple[int, int] = LIMITS,
    ) -> _log.Batch:
        batch: _log.Batch = self.ingest.batch(device, body, lines, _log.now_ns(), limits)
        return batch

    def take(self) -> list[_log.Record]:
        """What is in the log; there is room for more then."""
        end, cursor, records = self.log.follow(self.log.tail - 1, 0), self.log.cursor(0), []
        at = cursor.lsn
        while at < end:
            record = self.log.read(at)
            at += record.size
            if record.kind == _log.DATA:
                records.append(record)
        n = len(records)
        self.log.set_cursor(
            0,
            cursor._replace(lsn=at, ordinal=cursor.ordinal + n, published=cursor.published + n),
        )
        self.log.sync()
        self.log.sync()
        return records

    def counters(self) -> dict[str, int]:
        names = ("received", "accepted", "duplicates", "accepted_bytes", "request_ns")
        found = {name: self.log.counter(0, _log.COUNTERS[name]) for name in names}
        found["requests_timed"] = sum(
            self.log.counter(0, _log.COUNTERS["request_ns"] + i) for i in range(23)
        )
        for number, name in enumerate(_log.CODES):
            if refused := self.log.counter(0, _log.COUNTERS["refused"] + number):
                found[name] = refused
        del found["request_ns"]
        return found

    def close(self) -> None:
        self.ingest.close()
        self.log.close()
        os.close(self.fd)


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.close()


@pytest.fixture(scope="module")
def wide_door() -> Iterator[Door]:
    """For hypothesis: one for all examples."""
    door = Door()
    yield door
    door.close()


def lsns(batch: _log.Batch) -> list[int]:
    return memoryview(batch.lsns).cast("Q").tolist()


def event(**fields: object) -> bytes:
    return json.dumps({"metrics": {}, **fields}, separators=(",", ":")).encode()


def array(*items: bytes) -> bytes:
    return b"[" + b",".join(items) + b"]"


# -------------------------------------------------------------------------------------- framing

TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[ \t\n\r]+|[\[\]{},:"\\]|[^\[\]{},:"\\ \t\n\r]+', re.DOTALL)
PAIRS = {b"]": b"[", b"}": b"{"}


class NoArray(Exception):
    pass


def split_array(body: bytes) -> list[bytes]:
    """The items of an array. Raises NoArray."""
    tokens = [(m[0], m.start(), m.end()) for m in TOKEN.finditer(body)]
    tokens = [token for token in tokens if token[0][:1] not in SPACE]
    if not tokens or tokens[0][0] != b"[":
        raise NoArray
    items: list[bytes] = []
    stack = [b"["]
    begins: int | None = None  # of the item that is open
    expected = "value or end"
    for text, start, end in tokens[1:]:
        if not stack or text in (b'"', b"\\"):
            raise NoArray
        if text in (b"[", b"{"):
            if len(stack) == 1 and expected == "comma or end":
                raise NoArray
            if len(stack) == 1:
                begins = start
            stack.append(text)
        elif text in PAIRS:
            if len(stack) == 1 and expected == "value":
                raise NoArray
            if stack.pop() != PAIRS[text]:
                raise NoArray
            if len(stack) == 1:
                items.append(body[begins:end])
                expected = "comma or end"
        elif len(stack) == 1:
            if text == b",":
                if expected != "comma or end":
                    raise NoArray
                expected = "value"
            elif text == b":" or expected == "comma or end":
                raise NoArray
            else:
                items.append(text)
                expected = "comma or end"
    if stack:
        raise NoArray
    return items


def split_lines(body: bytes) -> list[bytes]:
    return [item for line in body.split(b"\n") if (item := line.strip(SPACE))]


def assert_items_are(door: Door, batch: _log.Batch, items: list[bytes]) -> None:
    """The batch is of these items, each with the verdict that it gets alone."""
    assert (batch.code, batch.items, batch.stop, batch.resume_at) == (0, len(items), 0, None)
    bodies = [record.body for record in door.take()]
    verdicts = [_validator.validate(item) for item in items]
    assert bodies == [i for i, v in zip(items, verdicts, strict=True) if not v.code]
    assert batch.errors == [
        (index, CODE[verdict.code], verdict.field, verdict.offset)
        for index, verdict in enumerate(verdicts)
        if verdict.code
    ]
    assert [bool(lsn) for lsn in lsns(batch)] == [not verdict.code for verdict in verdicts]
    assert batch.accepted == len(bodies)


def assert_framing_is_right(door: Door, body: bytes) -> None:
    batch = door.send(body)
    try:
        items = split_array(body)
    except NoArray:
        items = None
    if not body.strip(SPACE).startswith(b"["):
        assert items is None
    elif items is None:
        assert batch.code == CODE["malformed_json"]
        assert batch.offset is not None
    elif not items:
        assert batch.code == CODE["empty_batch"]
    else:
        assert_items_are(door, batch, items)
    if batch.code:
        assert (batch.accepted, batch.errors, batch.lsns) == (0, [], b"")
        assert door.log.tail == door.log.committed  # nothing went in
    assert_python_agrees(body, items)


def loads(text: bytes) -> Any:
    def no_constant(name: str) -> None:
        raise ValueError(name)

    # what Python's json calls no JSON is none; what else it takes (lone surrogates) is not framing
    return json.loads(text.decode(), parse_constant=no_constant)


def assert_python_agrees(body: bytes, items: list[bytes] | None) -> None:
    try:
        value = loads(body)
    except (ValueError, RecursionError):
        assert items is None or not all(is_json(item) for item in items)
        return
    if isinstance(value, list):
        assert items is not None
        assert [loads(item) for item in items] == value
    else:
        assert items is None


def is_json(text: bytes) -> bool:
    try:
        loads(text)
    except (ValueError, RecursionError):
        return False
    return True


spaces = st.text(" \t\n\r", max_size=3).map(str.encode)
texts = st.text('[]{},:"\\/ \n\t\x00aé€\U0001f600', max_size=6) | st.text(max_size=4)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
dumped = st.builds(
    lambda value, escaped, indent: json.dumps(value, ensure_ascii=escaped, indent=indent).encode(
        errors="replace"
    ),
    st.builds(lambda payload: {"metrics": {"a": 1}, "payload": payload}, values) | values,
    st.booleans(),
    st.sampled_from([None, 1]),
)
junk = st.text('[]{},:"\\ 1a\x00\ufeff', max_size=6).map(str.encode)
items = st.builds(
    lambda before, item, after: before + item + after,
    spaces,
    st.one_of(dumped, dumped, dumped, junk),
    spaces,
)
bodies = st.builds(
    lambda before, parts, after: before + b"[" + b",".join(parts) + b"]" + after,
    spaces,
    st.lists(items, max_size=4),
    spaces,
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A body that was cut, or in which some bytes are others."""
    body = bytearray(draw(bodies))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(body)))
        match draw(st.sampled_from(["cut", "insert", "replace", "remove"])):
            case "cut":
                del body[at:]
            case "insert":
                body[at:at] = draw(junk)
            case "replace":
                body[at : at + 1] = draw(junk)[:1]
            case _:
                del body[at : at + 1]
    return bytes(body)


@settings(max_examples=200, deadline=None)
@given(bodies)
@example(b"[]")
@example(b'[{"metrics":{}}]')
@example(b'[ {"metrics":{},"payload":"]\\"["}\t,\r\n{"metrics":{}} ]\n')
def test_array_is_split_as_python_reads_it(wide_door: Door, body: bytes) -> None:
    assert_framing_is_right(wide_door, body)


@settings(max_examples=400, deadline=None)
@given(damaged())
@example(b'[{"metrics":{}}')
@example(b'[{"metrics":{}},]')
@example(b'\xef\xbb\xbf[{"metrics":{}}]')
@example(b'[{"metrics":{}}\x00]')
@example(b'[{"metrics":{}}]\x00')
@example(b'[{"a":[}]')
@example(b'[{\\"a":1}]')
@example(b'["\\')
@example(b"[1 2]")
@example(b'[{"metrics":{"":1}},{"":0},{"tags":{"":1}}]')
def test_damaged_array_is_judged_as_by_others(wide_door: Door, body: bytes) -> None:
    assert_framing_is_right(wide_door, body)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(items, damaged()), max_size=4), st.sampled_from([b"\n", b"\r\n"]))
@example([b'{"metrics":{}}'], b"\n")
@example([b'\xef\xbb\xbf{"metrics":{}}', b"\x00"], b"\n")
def test_lines_are_split_as_python_splits_them(
    wide_door: Door, parts: list[bytes], line_end: bytes
) -> None:
    body = line_end.join(parts)
    batch = wide_door.send(body, lines=True)
    if expected := split_lines(body):
        assert_items_are(wide_door, batch, expected)
    else:
        assert batch.code == CODE["empty_batch"]


def test_every_scan_path_splits_the_same(wide_door: Door) -> None:
    body = array(event(payload='{"]'), b" 7 ", event(payload=[[{}]]), b'{"a":[1]}')
    for path in _validator.scan_paths():
        _validator.select_scan_path(path)
        assert_framing_is_right(wide_door, body)
    _validator.select_scan_path(_validator.scan_paths()[0])


def test_lone_object_is_a_batch_of_one(door: Door) -> None:
    batch = door.send(b" \n" + event(seq=1) + b"\t")
    assert (batch.code, batch.items, batch.accepted) == (0, 1, 1)
    assert [record.body for record in door.take()] == [event(seq=1)]
    batch = door.send(event() + b" x")
    assert (batch.items, batch.errors) == (1, [(0, CODE["malformed_json"], None, 15)])


@pytest.mark.parametrize(
    ("body", "code", "offset"),
    [(b"", "malformed_json", 0), (b" 7", "not_an_object", 1), (b'"[]"', "not_an_object", 0)],
)
def test_body_that_is_no_batch_is_refused_as_one(
    door: Door, body: bytes, code: str, offset: int
) -> None:
    batch = door.send(body)
    assert (batch.code, batch.offset, batch.items) == (CODE[code], offset, 0)
    assert door.counters()[code] == 1


def test_the_same_event_is_the_same_however_it_came(door: Door) -> None:
    one = event(seq=7)
    assert door.send(b"[\n  " + one + b"\n]").accepted == 1
    assert door.send(b"  " + one + b" \r\n", lines=True).duplicates == 1
    assert door.send(one).duplicates == 1
    assert door.ingest.event("dev-1", one, 0) == 0
    assert door.ingest.duplicate


# ---------------------------------------------------------------------------------- each event


def test_refusals_name_index_code_field_place(door: Door) -> None:
    batch = door.send(
        array(
            event(seq=1),
            event(ts="now"),
            b'{"metrics":{"a":"x"}}',
            b'{"metrics":{},"\\u0078":1}',
            event(seq=1, boot=0, ts="2025-09-23T11:18:41Z"),
            b"[]",
            event(seq=2),
        )
    )
    assert batch.errors == [
        (1, CODE["bad_ts"], "ts", 19),
        (2, CODE["bad_metric_value"], "metrics.a", 16),
        (3, CODE["unknown_field"], "\\u0078", 14),
        (4, CODE["seq_conflict"], None, None),
        (5, CODE["not_an_object"], None, 0),
    ]
    assert (batch.items, batch.accepted, batch.duplicates) == (7, 2, 0)
    assert [lsn > 0 for lsn in lsns(batch)] == [True, *[False] * 5, True]
    assert batch.lsn == lsns(batch)[-1]


def test_repeats_are_duplicates_and_have_their_originals_lsn(door: Door) -> None:
    first = door.send(array(event(seq=1), event(seq=2), event(seq=1)))
    assert (first.accepted, first.duplicates) == (2, 1)
    one, two, again = lsns(first)
    assert (again, first.lsn) == (one, two)
    repeat = door.send(event(seq=2) + b"\n" + event(seq=1), lines=True)
    assert (repeat.accepted, repeat.duplicates, repeat.lsn) == (0, 2, two)
    assert lsns(repeat) == [two, one]


def test_events_are_stored_in_order_with_one_time(door: Door) -> None:
    before = time.time_ns()
    door.send(array(*(event(seq=n, boot=3) for n in range(500))))
    records = door.take()
    assert [(record.seq, record.boot) for record in records] == [(n, 3) for n in range(500)]
    assert {record.device_id for record in records} == {"dev-1"}
    (received_at,) = {record.received_at_ns for record in records}
    assert before <= received_at <= time.time_ns()


@pytest.mark.parametrize("lines", [False, True])
def test_events_may_be_at_most_as_large_and_as_many_as_the_limits(door: Door, lines: bool) -> None:
    good, large = event(payload="x"), event(payload="xx")
    join = b"\n".join if lines else lambda parts: array(*parts)
    batch = door.send(join([good, large, good]), lines=lines, limits=(len(good), 3))
    assert (batch.accepted, batch.errors) == (2, [(1, CODE["body_too_large"], None, None)])
    tail = door.log.tail
    batch = door.send(join([good] * 4), lines=lines, limits=(len(good), 3))
    assert (batch.code, batch.accepted, batch.errors) == (CODE["batch_too_large"], 0, [])
    assert door.log.tail == tail


def test_event_larger_than_any_record_is_refused_alone(door: Door) -> None:
    large = event(payload="x" * door.log.record_bytes_max)
    batch = door.send(array(event(), large, event()), limits=(1 << 20, 10))
    assert (batch.accepted, batch.errors) == (2, [(1, CODE["body_too_large"], None, None)])


def test_event_too_large_that_is_also_wrong_is_too_large(door: Door) -> None:
    batch = door.send(array(b'{"x":"' + b"x" * 100 + b'"}'), limits=(50, 10))
    assert batch.errors == [(0, CODE["body_too_large"], None, None)]


# ------------------------------------------------------------------------------------- devices


def named(device_id: object, **fields: object) -> bytes:
    return event(device_id=device_id, **fields)


def test_each_event_may_name_its_device(door: Door) -> None:
    bodies = [named("a", seq=1), named("b" * 64, seq=1), named("A-z_09", seq=1), named("a", seq=1)]
    batch = door.send(array(*bodies), None)
    assert (batch.accepted, batch.duplicates, batch.errors) == (3, 1, [])
    records = door.take()
    assert [record.device_id for record in records] == ["a", "b" * 64, "A-z_09"]
    assert [record.body for record in records] == bodies[:3]


def test_device_id_may_stand_anywhere_in_an_event(door: Door) -> None:
    body = b'{"metrics":{"device_id":1},"seq":4,"tags":{},"device_id" : "d-9"}\n'
    assert door.send(body, None, lines=True).accepted == 1
    (record,) = door.take()
    assert (record.device_id, record.seq) == ("d-9", 4)


def test_device_id_that_is_spelled_with_an_escape_is_the_same_member(door: Door) -> None:
    body = rb'{"\u0064evice_id":"a","metrics":{}}'
    assert door.send(body, None).accepted == 1
    assert door.send(b'{"device_id":"a",' + body[1:], None).errors == [
        (0, CODE["duplicate_key"], "device_id", 17)
    ]
    assert door.send(body).errors[0][:3] == (0, CODE["unknown_field"], r"\u0064evice_id")


@pytest.mark.parametrize(
    ("written", "offset"),
    [
        (b'""', 13), (b'"' + b"d" * 65 + b'"', 13), (b'"a.b"', 13), (b'"a\\u0062"', 13),
        (b'"a/b"', 13), (b'"\xc3\xa9"', 13), (b"7", 13), (b"null", 13), (b"{}", 13),
    ],
)  # fmt: skip
def test_bad_device_id_is_refused_alone(door: Door, written: bytes, offset: int) -> None:
    body = array(b'{"device_id":' + written + b',"metrics":{}}', named("a"))
    batch = door.send(body, None)
    assert batch.errors == [(0, CODE["bad_device_id"], "device_id", offset)]
    assert batch.accepted == 1


def test_missing_device_id_is_refused_alone(door: Door) -> None:
    batch = door.send(array(event(), named("a"), b'{"seq":1}'), None)
    assert batch.errors == [
        (0, CODE["bad_device_id"], "device_id", 13),
        (2, CODE["missing_metrics"], "metrics", 8),
    ]


def test_device_id_in_an_event_of_one_device_is_an_unknown_field(door: Door) -> None:
    batch = door.send(array(named("dev-1")))
    assert batch.errors == [(0, CODE["unknown_field"], "device_id", 14)]


def test_bad_device_id_of_the_batch_refuses_all_of_it(door: Door) -> None:
    batch = door.send(array(event()), "a.b")
    assert (batch.code, batch.offset, batch.accepted) == (CODE["bad_device_id"], None, 0)
    assert door.counters()["bad_device_id"] == 1


# ------------------------------------------------------------------------------------ the rest


def test_a_full_log_says_where_to_go_on(door: Door) -> None:
    events = [event(seq=n, payload="x" * 300) for n in range(4000)]
    at, stored = 0, []
    while at < len(events):
        batch = door.send(array(*events[at:]))
        assert batch.errors == []
        if batch.stop:
            assert batch.stop == CODE["log_full"]
            assert batch.resume_at == batch.accepted
            assert batch.used_percent >= 99
        at += batch.accepted
        assert (batch.resume_at is None) == (at == len(events))
        stored += [record.body for record in door.take()]
    assert stored == events


def test_refusals_behind_the_place_where_it_stopped_are_not_named(door: Door) -> None:
    events = [event(seq=n, payload="x" * 300) for n in range(4000)]
    batch = door.send(array(b"1", *events, b"2"))
    assert batch.stop == CODE["log_full"]
    assert [error[0] for error in batch.errors] == [0]
    assert batch.resume_at == batch.accepted + 1 == len(lsns(batch))


def test_a_draining_log_takes_nothing_but_knows_repeats(door: Door) -> None:
    door.send(array(event(seq=1)))
    door.log.state = _log.DRAINING
    batch = door.send(array(event(seq=1), event(seq=2), event(seq=3)))
    assert (batch.duplicates, batch.stop, batch.resume_at) == (1, CODE["draining"], 1)


def test_each_event_is_counted_once(door: Door) -> None:
    door.send(array(event(seq=1), event(seq=1), event(seq=1, payload=0), b"7", b"8", event()))
    accepted_bytes = len(event(seq=1)) + len(event())
    expected = {
        "received": 6, "accepted": 2, "duplicates": 1, "accepted_bytes": accepted_bytes,
        "requests_timed": 1, "seq_conflict": 1, "not_an_object": 2,
    }  # fmt: skip
    assert door.counters() == expected
    door.send(b"[")
    door.log.state = _log.DRAINING
    door.send(array(event(), event(), event()))
    expected |= {"received": 8, "requests_timed": 3, "malformed_json": 1, "draining": 1}
    assert door.counters() == expected


def test_other_threads_run_meanwhile(door: Door) -> None:
    ticks, done = 0, False

    def tick() -> None:
        nonlocal ticks
        while not done:
            time.sleep(1e-5)
            ticks += 1

    def ran_during(call: Callable[[], object]) -> bool:
        for _ in range(50):
            before = ticks
            call()
            if ticks > before:
                return True
        return False

    body = b"\n".join([event()] * 10_000)
    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    thread.start()
    try:
        sys.setswitchinterval(1000)  # whoever has the GIL keeps it, unless it lets go
        time.sleep(0.02)
        assert ran_during(lambda: door.send(body, lines=True))
        assert not ran_during(lambda: sum(range(50_000)))  # control: this one does not let go
    finally:
        done = True
        sys.setswitchinterval(interval)
        thread.join()


def test_ingest_that_is_closed_takes_no_batch(door: Door) -> None:
    ingest = _log.Ingest(door.log, 1)
    ingest.close()
    with pytest.raises(ValueError, match="closed"):
        ingest.batch("dev-1", array(event()), False, 0, LIMITS)


# ------------------------------------------------------------------------------------- mutants


@dataclass(frozen=True)
class Mutant:
    """A bug in gw_batch.c that a test of tests/native/test_batch.c sees."""

    name: str
    old: str
    new: str
    test: str

    def instead(self) -> dict[str, str]:
        text = (NATIVE / "gw_batch.c").read_text()
        assert text.count(self.old) == 1, f"{self.name}: gw_batch.c has changed"
        return {"gw_batch.c": text.replace(self.old, self.new)}


FULL = "full_log_ends_a_batch_at_the_first_event_that_is_not_in"
BREAKS = "what_is_no_array_is_refused_where_it_breaks"
MUTANTS = [
    Mutant(
        "an item is committed before the framing is known",
        "ingest->hash_key, limits))\n        return batch->code;\n",
        "ingest->hash_key, limits))\n        (void)batch;\n",
        "ten_thousand_events_are_one_batch",
    ),
    Mutant(
        "brackets of any kind match",
        "(depth <= TYPED && (objects & 1) != (c == '}'))",
        "false",
        BREAKS,
    ),
    Mutant(
        "kinds of brackets are lost below depth 64",
        "if (depth++ < TYPED)",
        "if (depth++ < ~0u)",
        "depth_is_counted",
    ),
    Mutant(
        "something may stand behind an array",
        "        if (last)\n            return p < end ?",
        "        if (last)\n            return 0 ?",
        BREAKS,
    ),
    Mutant(
        "an array may end with a comma",
        "        const bool last = *p == ']';\n        p = skip_space(p + 1, end);\n",
        "        bool last = *p == ']';\n        p = skip_space(p + 1, end);\n"
        "        if (p < end && *p == ']')\n            last = true, p++;\n",
        BREAKS,
    ),
    Mutant(
        "a backslash outside of a string is passed over",
        "        case BACKSLASH:\n            *wrong = p;\n            return NULL;\n",
        "        case BACKSLASH:\n",
        BREAKS,
    ),
    Mutant(
        "an escaped quote ends a string",
        "        if (*p == '\\\\')\n            p++;\n",
        "",
        "each_item_of_an_array_is_found",
    ),
    Mutant(
        "the validator's end of an event is one byte too far",
        "    *behind = p + length;",
        "    *behind = p + length + !code;",
        "each_item_of_an_array_is_found",
    ),
    Mutant(
        "the first event that is not in was looked at",
        "    batch->looked_at = i;",
        "    batch->looked_at = i + (batch->stop != 0);",
        FULL,
    ),
    Mutant(
        "a batch goes on behind a full log",
        "        return GW_CODE_LOG_FULL;",
        "        return 0;",
        FULL,
    ),
    Mutant(
        "a log that fails in the middle is not noticed",
        "    default:\n        return GW_CODE_FAILED;",
        "    default:\n        return 0;",
        "failure_in_the_middle_ends_the_batch_at_the_event_it_is_unknown_of",
    ),
    Mutant(
        "a busy key is not waited for",
        "    while (status == GW_BUSY && a->waited_ns < WAIT_NS) {",
        "    while (false) {",
        "busy_key_is_waited_for",
    ),
    Mutant(
        "a busy key is waited for without end",
        "a->waited_ns += gw_monotonic_ns() - before;",
        "(void)before;",
        "key_that_stays_busy_ends_the_batch_there",
    ),
    Mutant(
        "an event goes in without its key",
        ".flags = item->flags,",
        ".flags = item->flags & ~GW_EVENT_HAS_SEQ,",
        "death_in_a_batch_leaves_its_beginning",
    ),
    Mutant(
        "an event that was refused keeps the key of another",
        "    batch->lsns[index] = 0;",
        "    (void)0;",
        "repeats_inside_a_batch_are_duplicates",
    ),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_a_native_test_notices(mutant: Mutant, tmp_path: Any) -> None:
    program = build(TESTS / "test_batch.c", "plain", mutant.instead())
    done = run(program, "plain", mutant.test, seconds=5, environment={"TMPDIR": str(tmp_path)})
    assert done.returncode not in (0, 2), f"{mutant.test} passes\n{done.stdout}"


def test_control_a_splitter_that_is_blind_to_strings_is_noticed() -> None:
    text = (NATIVE / "gw_batch.c").read_text()
    old = "['\"'] = QUOTE,"
    assert text.count(old) == 1
    door = Door(extension({"gw_batch.c": text.replace(old, "")}))
    with pytest.raises(AssertionError):
        assert_framing_is_right(door, b'[{"]":1},{"metrics":{}}]')
    door.close()
