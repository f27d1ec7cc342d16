"""The published schema of an event against the compiled validator: they agree on every document,
but for the differences that stand here, each with its reason and its case.

A schema speaks of values, the validator of the text. So a document is compared as a value (judged
by jsonschema-rs, whose patterns are those of ECMA-262, as JSON Schema asks) and as the text that
`json` makes of it."""

import copy
import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import jsonschema
import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway import _log, event_schema, http
from gateway._validator import validate
from gateway.config import Config
from tests.from_schema import from_schema

SCHEMA = event_schema.document()
INT63_MAX = 2**63 - 1


def judge(schema: dict[str, Any]) -> Callable[[Any], bool]:
    return jsonschema_rs.Draft202012Validator(schema).is_valid


says_yes = judge(SCHEMA)


def text(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


def takes(value: Any) -> bool:
    """Whether the gateway does."""
    return validate(text(value)).code == ""


def test_the_schema_is_a_schema_of_its_draft() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]
    for example in SCHEMA["examples"]:
        assert says_yes(example)
        assert takes(example)


def test_a_device_id_of_the_schema_is_one_of_the_path() -> None:
    for device_id in ("a" * 64, "_-", "a" * 65, "", "a.b", "a\n", "é"):
        listed = judge({"type": "string", "pattern": event_schema.DEVICE_ID})(device_id)
        assert listed == bool(http.device_id_at(device_id)), device_id


# ---- what a schema cannot say -------------------------------------------------------------------


class Difference(NamedTuple):
    text: bytes
    code: str
    """Of the gateway, which refuses it; the schema says yes, or cannot be asked."""
    why: str
    is_json: bool = True


def nested(depth: int) -> bytes:
    return b'{"metrics":{},"payload":' + b"[" * depth + b"]" * depth + b"}"


def many(members: int) -> bytes:
    return text({"metrics": {}, "payload": {str(i): 0 for i in range(members - 2)}})


DIFFERENCES = {
    "a key twice": Difference(
        b'{"metrics":{"a":1,"a":1}}', "duplicate_key", "a value has each key once"
    ),
    "a field twice": Difference(
        b'{"seq":1,"metrics":{},"seq":1}', "duplicate_key", "a value has each key once"
    ),
    "a key twice, once with an escape": Difference(
        b'{"metrics":{},"payload":{"a":1,"\\u0061":1}}',
        "duplicate_key",
        "a value has each key once",
    ),
    "payload of 33 levels": Difference(
        nested(33), "payload_too_deep", "a schema of JSON Schema cannot count levels of any value"
    ),
    "1025 members": Difference(
        many(1025), "too_many_members", "nor members over all levels: they bound time and memory"
    ),
    "seq 1.0": Difference(
        b'{"metrics":{},"seq":1.0}', "bad_seq", "1.0 is an integer to JSON Schema; it is no count"
    ),
    "seq 1e0": Difference(b'{"metrics":{},"seq":1e0}', "bad_seq", "as 1.0"),
    "seq -0": Difference(b'{"metrics":{},"seq":-0}', "bad_seq", "-0 equals 0"),
    "boot 1.0": Difference(b'{"metrics":{},"boot":1.0}', "bad_boot", "as seq"),
    "130 bytes in 65 characters": Difference(
        text({"metrics": {}, "tags": {"a": "é" * 65}}),
        "bad_tag_value",
        "maxLength counts characters; a record and a topic are made of bytes",
    ),
    "a metric beyond a double": Difference(
        b'{"metrics":{"a":1' + b"0" * 400 + b"}}",
        "bad_metric_value",
        "a schema's numbers have no size; a reader would make it infinite",
    ),
    "a payload beyond a double": Difference(
        b'{"metrics":{},"payload":-1' + b"0" * 400 + b"}",
        "malformed_json",
        "RFC 7493, 2.2: no number beyond a double, anywhere",
    ),
    "a lone surrogate": Difference(
        b'{"metrics":{},"payload":"\\ud800"}',
        "malformed_json",
        "RFC 7493, 2.1: it is no character, and has no UTF-8",
    ),
    "a noncharacter": Difference(
        '{"metrics":{},"payload":"\uffff"}'.encode(), "malformed_json", "RFC 7493, 2.1"
    ),
    "a noncharacter in a tag": Difference(
        '{"metrics":{},"tags":{"a":"\ufdd0"}}'.encode(), "malformed_json", "RFC 7493, 2.1"
    ),
    "1e400": Difference(
        b'{"metrics":{"a":1e400}}', "bad_metric_value", "reads as infinite, no JSON value", False
    ),
    "NaN": Difference(b'{"metrics":{"a":NaN}}', "malformed_json", "no JSON", False),
    "a byte order mark": Difference(
        b'\xef\xbb\xbf{"metrics":{}}', "malformed_json", "not in front of JSON (RFC 8259)", False
    ),
    "two values": Difference(b'{"metrics":{}}{}', "malformed_json", "no JSON", False),
    "nothing": Difference(b"", "malformed_json", "no JSON", False),
    "not UTF-8": Difference(b'{"metrics":{},"payload":"\xff"}', "malformed_json", "no JSON", False),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_one(name: str) -> None:
    case = DIFFERENCES[name]
    assert validate(case.text).code == case.code
    if case.is_json:
        assert says_yes(json.loads(case.text))
    else:
        with pytest.raises(ValueError, match=r"."):
            json.loads(case.text.decode(), parse_constant=int, parse_float=finite)


def finite(number: str) -> float:
    if float(number) in (float("inf"), float("-inf")):
        raise ValueError(number)
    return float(number)


@pytest.mark.parametrize("body", [nested(32), many(1024)], ids=["32 levels", "1024 members"])
def test_at_the_limit_both_say_yes(body: bytes) -> None:
    assert validate(body).code == ""
    assert says_yes(json.loads(body))


def test_an_event_larger_than_the_setting_is_refused_by_the_door() -> None:
    """The size of the text is a setting of the gateway, so it stands in the description only."""
    config = Config()
    value = {"metrics": {}, "payload": "x" * config.http.body_bytes_max}
    assert says_yes(value)
    assert f"{config.http.body_bytes_max} bytes" in SCHEMA["description"]
    headers = {"content-length": str(len(text(value))), "content-type": "application/json"}
    terms = http.Terms(config.http.body_bytes_max, 0, True, config.http.body_bytes_max)
    assert http.examine(headers, "", terms)[0] == http.BULK
    assert http.examine_form(headers, "", terms, False)[0] == http.BODY_TOO_LARGE


def test_a_judge_whose_dollar_also_matches_before_a_line_feed_says_yes_too_often() -> None:
    """Python's `re`, and so the package jsonschema. The pattern is right by ECMA-262."""
    value = {"metrics": {"a\n": 1}}
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(value)
    assert not says_yes(value)
    assert validate(text(value)).code == "bad_metric_key"


@pytest.mark.parametrize(
    "ts",
    [
        "0000-02-29t00:00:00z",
        "9999-12-31T23:59:59.123456789012345678901+23:59",
        "2025-01-01T00:00:00-00:00",
    ],
)
def test_an_unusual_ts_is_not_refused_by_a_judge_that_asserts_formats(ts: str) -> None:
    value = {"metrics": {}, "ts": ts}
    assert jsonschema_rs.Draft202012Validator(SCHEMA, validate_formats=True).is_valid(value)
    assert takes(value)


# ---- one document at a time: each rule at its limit and past it ---------------------------------

OTHERS: tuple[Any, ...] = (None, True, 0, -1, 1.5, "", "a", [], {}, [1], {"a": 1}, {"a": "b"})
DAYS = [f"{y}-{m:02}-{d:02}" for y in ("2023", "2024", "1900", "2000", "0000", "0004", "0100")
        for m in range(14) for d in (0, 1, 28, 29, 30, 31, 32)]  # fmt: skip
CLOCKS = [
    *(f"{h}:00:00" for h in ("00", "09", "19", "20", "23", "24", "29", "7", "007")),
    *(f"00:{m}:00" for m in ("59", "60", "5", "99")),
    *(f"23:59:{s}" for s in ("59", "60", "61", "5", "00.", "00.1", "00.123456789012", "00,1")),
    "00:00",
]
OFFSETS = ["Z", "z", "+00:00", "-23:59", "+24:00", "-00:60", "+0100", "+01", "", " Z", "Z ", "Z\n"]
TIMES = [
    *(f"{day}T00:00:00Z" for day in DAYS),
    *(f"2025-09-23{t}11:18:41Z" for t in ("T", "t", " ", "", "_", "TT")),
    *(f"2025-09-23T{clock}Z" for clock in CLOCKS),
    *(f"2025-09-23T11:18:41{offset}" for offset in OFFSETS),
    *("", "2025-09-23", "11:18:41Z", " 2025-09-23T11:18:41Z", "x2025-09-23T11:18:41Z"),
    *("２０２５-09-23T11:18:41Z", "20250923T111841Z", "+2025-09-23T11:18:41Z"),
]
KEYS = ["a", "a" * 32, "a" * 33, "", "A", "aA", "1", "a1", "_", "a_", "a-", "a.b", "é", "aé", " a",
        "a ", "a\n", "\na", "a\nb"]  # fmt: skip


def corpus() -> Iterator[Any]:
    yield from OTHERS
    for name in ("metrics", "tags", "ts", "seq", "boot", "payload"):
        for value in OTHERS:
            yield {"metrics": {}, name: value}
            yield {name: value}
    for name in ("x", "Metrics", "device_id", "", "metrics\n", "seqs", "_seq"):
        yield {"metrics": {}, name: "a"}
    for name in ("seq", "boot"):
        for n in (0, 1, INT63_MAX - 1, INT63_MAX, INT63_MAX + 1, 2**64, -1, -INT63_MAX, 0.5, "1"):
            yield {"metrics": {}, name: n}
    for ts in TIMES:
        yield {"metrics": {}, "ts": ts}
    for key in KEYS:
        yield {"metrics": {key: 1}}
        yield {"metrics": {}, "tags": {key: "a"}}
    for value in OTHERS:
        yield {"metrics": {"a": value}}
        yield {"metrics": {}, "tags": {"a": value}}
    for n in (0, 1, 15, 16, 17, 31, 32, 33):
        yield {"metrics": {f"a{i}": 1 for i in range(n)}}
        yield {"metrics": {}, "tags": {f"a{i}": "" for i in range(n)}}
    for n in (0, 1, 127, 128, 129):
        yield {"metrics": {}, "tags": {"a": "x" * n}}
    for number in (0, -0.0, 1e308, -1e308, 5e-324, 2**64, 10**300):
        yield {"metrics": {"a": number}}


@cache
def verdicts() -> list[tuple[Any, bool]]:
    return [(value, takes(value)) for value in corpus()]


def disagreements(schema: dict[str, Any]) -> list[Any]:
    yes = judge(schema)
    return [value for value, taken in verdicts() if yes(value) != taken]


def test_they_agree_on_every_rule_at_its_limit_and_past_it() -> None:
    taken = sum(taken for _, taken in verdicts())
    assert 150 < taken < len(verdicts()) - 150, "both sides of each rule"
    assert disagreements(SCHEMA) == []


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def mutate(schema: dict[str, Any]) -> None:
        for name in path[:-1]:
            schema = schema[name]
        del schema[path[-1]]

    return mutate


def with_(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def mutate(schema: dict[str, Any]) -> None:
        for name in path[:-1]:
            schema = schema[name]
        assert schema[path[-1]] != value
        schema[path[-1]] = value

    return mutate


WRONG: dict[str, Callable[[dict[str, Any]], None]] = {
    "any field": without("additionalProperties"),
    "no metrics": without("required"),
    "any type": without("type"),
    "a field dropped": without("properties", "seq"),
    "boot dropped": without("properties", "boot"),
    "payload dropped": without("properties", "payload"),
    "metrics of anything": without("properties", "metrics", "additionalProperties"),
    "metrics of integers": with_(
        "integer", "properties", "metrics", "additionalProperties", "type"
    ),
    "metrics any many": with_(33, "properties", "metrics", "maxProperties"),
    "metrics fewer": with_(31, "properties", "metrics", "maxProperties"),
    "any metric key": without("properties", "metrics", "propertyNames"),
    "a key of 31": with_(
        {"pattern": "^[a-z][a-z0-9_]{0,30}$"}, "properties", "metrics", "propertyNames"
    ),
    "an open end": with_(
        {"pattern": "^[a-z][a-z0-9_]{0,31}"}, "properties", "metrics", "propertyNames"
    ),
    "an open beginning": with_(
        {"pattern": "[a-z][a-z0-9_]{0,31}$"}, "properties", "tags", "propertyNames"
    ),
    "tags of anything": without("properties", "tags", "additionalProperties", "type"),
    "long tags": with_(129, "properties", "tags", "additionalProperties", "maxLength"),
    "many tags": with_(17, "properties", "tags", "maxProperties"),
    "any ts": without("properties", "ts", "pattern"),
    "a ts without a calendar": with_(
        "^[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])[Tt].*(?:[Zz]|[+-]..:..)$",
        *("properties", "ts", "pattern"),
    ),
    "a leap second": with_(
        event_schema.TS.replace(":[0-5][0-9](?:", ":(?:[0-5][0-9]|60)(?:"),
        *("properties", "ts", "pattern"),
    ),
    "an upper-case T": with_(
        event_schema.TS.replace("[Tt]", "T"), "properties", "ts", "pattern"
    ),
    "seq below zero": without("properties", "seq", "minimum"),
    "seq of 64 bits": with_(2**64, "properties", "seq", "maximum"),
    "seq one less": with_(INT63_MAX - 1, "properties", "seq", "maximum"),
    "seq a fraction": with_("number", "properties", "boot", "type"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_schema_is_noticed(name: str) -> None:
    schema = copy.deepcopy(SCHEMA)
    WRONG[name](schema)
    assert disagreements(schema), "this mistake would not be seen"


# ---- generated documents ------------------------------------------------------------------------


def beyond(value: Any) -> bool:
    """Whether one of DIFFERENCES is in the document."""
    seen = [0, 0]

    def wrong(item: Any, depth: int) -> bool:
        seen[0] += len(item) if isinstance(item, dict) else 0
        if isinstance(item, str):
            return any(0xD800 <= ord(c) < 0xE000 or 0xFDD0 <= ord(c) < 0xFDF0
                       or ord(c) & 0xFFFE == 0xFFFE for c in item)  # fmt: skip
        if isinstance(item, int) and abs(item) >= 2**1024:
            return True
        if isinstance(item, dict | list):
            inner = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            return depth > 32 or any(wrong(part, depth + 1) for part in inner)
        return False

    if wrong(value, -1) or seen[0] > 1024:
        return True
    if not isinstance(value, dict):
        return False
    tags = value.get("tags")
    return any(isinstance(value.get(name), float) for name in ("seq", "boot")) or (
        isinstance(tags, dict)
        and any(len(tag.encode()) > 128 for tag in tags.values() if isinstance(tag, str))
    )


def agree(value: Any) -> None:
    if not beyond(value):
        assert says_yes(value) == takes(value), (validate(text(value)), value)


GENERATED = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
EVENTS = from_schema(SCHEMA)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20) | st.sampled_from([*TIMES, *KEYS, "x" * 129, INT63_MAX + 1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=4),
    max_leaves=8,
)  # fmt: skip


@GENERATED
@given(EVENTS)
def test_what_the_schema_draws_is_taken(value: Any) -> None:
    """But for a key with a line feed behind it, which Python's `$` lets `from_schema` draw: that
    one is refused by both."""
    agree(value)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """An event that one or two small changes may have spoilt."""
    value = draw(EVENTS)
    for _ in range(draw(st.integers(1, 2))):
        spots = list(places(value))
        owner, key = draw(st.sampled_from(spots))
        change = draw(st.sampled_from(["value", "remove", "rename", "add", "edge"]))
        if change == "remove":
            del owner[key]
        elif change == "rename" and isinstance(owner, dict):
            owner[draw(st.sampled_from(KEYS) | st.text(max_size=40))] = owner.pop(key)
        elif change == "add" and isinstance(owner, dict):
            name = draw(st.sampled_from(["tags", "ts", "seq", "boot", "payload", "x", *KEYS]))
            owner[name] = draw(ANY)
        elif change == "edge" and isinstance(owner[key], str):
            owner[key] = draw(edges(owner[key]))
        elif change == "edge" and type(owner[key]) in (int, float):
            owner[key] = draw(st.sampled_from([-1, 0.5, INT63_MAX, INT63_MAX + 1, str(owner[key])]))
        else:
            owner[key] = draw(ANY)
        if not value:
            break
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a document."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@st.composite
def edges(draw: st.DrawFn, word: str) -> str:
    at = draw(st.integers(0, len(word)))
    more = draw(st.sampled_from(["", "0", "9", "-", "\n", "Z", "é"]))
    return word[:at] + more + word[at + draw(st.integers(0, 1)) :]


@GENERATED
@given(mutated())
def test_a_changed_event_gets_the_same_verdict_from_both(value: Any) -> None:
    agree(value)


def test_changes_make_both_verdicts() -> None:
    """A control: the test above compares refusals as well as events that are still good."""
    seen: list[bool] = []

    @settings(GENERATED, max_examples=100)
    @given(mutated())
    def look(value: Any) -> None:
        seen.append(says_yes(value))

    look()
    assert min(seen.count(True), seen.count(False)) > 5


# ---- events that name their device --------------------------------------------------------------


def test_a_named_event_is_an_event_with_a_device_id(tmp_path: Any) -> None:
    schema = event_schema.event(Config(), named=True)
    yes = judge(schema)
    plain = event_schema.event(Config())
    assert {**plain["properties"], "device_id": ...}.keys() == schema["properties"].keys()
    assert all(
        schema["properties"][name] == plain["properties"][name] for name in plain["properties"]
    )
    path = tmp_path / "gateway.log"
    _log.create(str(path), 1 << 20)
    with open(path, "r+b") as file:
        log = _log.Log.open(str(path), file.fileno(), ["mqtt"])
        ingest = _log.Ingest(log, 0)

        def taken(body: bytes) -> bool:
            batch = ingest.batch(None, body, False, _log.now_ns(), (65536, 10))
            return batch.accepted == 1

        for device_id in ("a", "a" * 64, "a" * 65, "", "a.b", "a\n", "é", None, 1, ["a"]):
            value = {"device_id": device_id, "metrics": {}}
            assert yes(value) == taken(text(value)), value
        for value in (
            {"metrics": {}},
            {"device_id": "a"},
            {"device_id": "a", "metrics": {}, "x": 1},
        ):
            assert not yes(value)
            assert not taken(text(value))
        escaped = b'{"device_id":"\\u0061","metrics":{}}'
        assert yes(json.loads(escaped))  # a difference: its text would not be what MQTT is told
        assert not taken(escaped)
        ingest.close()
        log.close()
