"""The compiled validator against its rules: limits, classes of JSON text, and a plain reference.

Three nets, from coarse to fine: the corpus of `json_cases`, where a person wrote down what is
right; each limit of docs/http.md at the limit and one past it; and hypothesis, which compares
whole verdicts (code, field, offset, values) with `reference_validator`. Every body goes through
every scan path of this machine, and all must say the same. What C code alone can show (no byte
outside the body is read, a constant stack, other processors) is in `native/test_validator.c`, run
from here.
"""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway import _validator as validator
from tests import json_cases
from tests import reference_validator as reference

ROOT = Path(__file__).parents[1]
EVENT = (
    b'{"ts":"2025-09-23T11:18:41Z","seq":1,"metrics":{"temp_c":21.5,"hum":40.25,"rpm":1200},'
    b'"tags":{"site":"AAL","line":"3"},"payload":{"raw":"ok"}}'
)
INT63_MAX = 2**63 - 1
DOCUMENTS = json_cases.documents()


@pytest.fixture(autouse=True)
def best_scan_path():
    yield
    validator.select_scan_path(validator.scan_paths()[0])


def verdict_of(body: bytes) -> validator.Verdict:
    """The verdict, the same on every scan path and from both functions."""
    verdicts = []
    for path in validator.scan_paths():
        validator.select_scan_path(path)
        verdicts.append(validator.validate(body))
        assert validator.CODES[validator.check(body)] == verdicts[-1].code, path
    assert all(verdict == verdicts[0] for verdict in verdicts), dict(
        zip(validator.scan_paths(), verdicts, strict=True)
    )
    return verdicts[0]


def code_of(body: bytes | str) -> str:
    return verdict_of(body if isinstance(body, bytes) else body.encode()).code


def event(**fields: object) -> bytes:
    return json.dumps({"metrics": {}, **fields}, ensure_ascii=False, separators=(",", ":")).encode()


def assert_as_reference(body: bytes) -> None:
    ours, theirs = verdict_of(body), reference.validate(body)
    if theirs.code:
        assert ours[:6] == (*theirs[:3], False, None, None), (ours, theirs)
    else:
        assert tuple(ours) == tuple(theirs)


# --------------------------------------------------------------------------------------- the corpus


@pytest.mark.parametrize("name", json_cases.YES)
def test_json_is_accepted_as_payload(name):
    assert code_of(json_cases.in_payload(json_cases.YES[name])) == ""


@pytest.mark.parametrize("name", json_cases.NO)
def test_text_that_is_not_json_is_refused_as_payload(name):
    code = code_of(json_cases.in_payload(json_cases.NO[name]))
    assert code == ("payload_too_deep" if "100000" in name else "malformed_json")


@pytest.mark.parametrize("name", json_cases.RULES)
def test_rule_about_the_document_is_named(name):
    code, text = json_cases.RULES[name]
    assert code_of(json_cases.in_payload(text)) == code


@pytest.mark.parametrize("name", json_cases.CHOICE)
def test_choice_left_by_rfc_8259_is_made(name):
    taken, text = json_cases.CHOICE[name]
    assert (code_of(json_cases.in_payload(text)) == "") == taken


@pytest.mark.parametrize("name", DOCUMENTS)
def test_corpus_gets_the_verdict_of_the_reference(name):
    assert_as_reference(DOCUMENTS[name])


@pytest.mark.parametrize("name", json_cases.YES)
def test_every_prefix_of_json_is_refused(name):
    body = json_cases.in_payload(json_cases.YES[name])
    for end in [*range(min(len(body), 120)), *range(max(len(body) - 40, 0), len(body))]:
        assert code_of(body[:end]) == "malformed_json", body[:end]


# -------------------------------------------------------------------------------------- the verdict


def test_event_with_every_field_is_accepted():
    assert len(EVENT) == 142
    assert verdict_of(EVENT) == ("", None, 0, True, 1, None, b"2025-09-23T11:18:41Z", 0)


def test_verdict_says_where_the_object_begins():
    assert verdict_of(b' \r\n\t{"metrics":{}} ').object_offset == 4


def test_verdict_carries_seq_with_boot():
    assert verdict_of(event(seq=7, boot=8))[4:6] == (7, 8)


def test_optional_fields_are_none_when_they_are_missing():
    assert verdict_of(b'{"metrics":{}}') == ("", None, 0, False, None, None, None, 0)


def test_refused_event_has_no_values():
    refused = verdict_of(b'{"seq":1,"boot":2,"ts":"2025-09-23T11:18:41Z","metrics":{},"x":0}')
    assert refused[:7] == ("unknown_field", "x", 59, False, None, None, None)


def test_code_names_are_those_of_the_header():
    assert validator.CODES[:3] == ("", "malformed_json", "too_many_members")
    assert validator.CODES[-1] == "overloaded"
    assert len(set(validator.CODES)) == len(validator.CODES)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_any_contiguous_buffer_is_read(kind):
    assert validator.validate(kind(EVENT)) == validator.validate(EVENT)
    assert validator.check(kind(EVENT)) == 0


@pytest.mark.parametrize("wrong", [None, "text", 1, memoryview(EVENT)[::2]])
def test_what_is_no_contiguous_buffer_raises(wrong):
    for function in (validator.validate, validator.check, validator.device_id_ok):
        with pytest.raises((TypeError, BufferError)):
            function(wrong)


def test_slice_of_a_buffer_is_read_in_its_bounds():
    assert validator.validate(memoryview(b"[" + EVENT + b"]")[1:-1]).code == ""
    assert validator.validate(memoryview(EVENT)[:-1]).code == "malformed_json"


def test_portable_scan_path_is_always_there():
    assert validator.scan_paths()[-1] == "portable"


def test_unknown_scan_path_is_an_error():
    with pytest.raises(ValueError, match="portable"):
        validator.select_scan_path("sse9")


# ------------------------------------------------------------------------------------ the top level


@pytest.mark.parametrize("text", ["null", "[]", '""', "0", "-1", "true", "[" * 100_000, "nul"])
def test_document_of_another_type_is_not_an_object(text):
    assert verdict_of(text.encode())[:3] == ("not_an_object", None, 0)


@pytest.mark.parametrize("text", ["", " ", "x", "}", "NaN", "\ufeff{}", "\ufeff" + EVENT.decode()])
def test_document_that_begins_no_value_is_malformed(text):
    assert code_of(text) == "malformed_json"


def test_two_documents_are_malformed():
    assert verdict_of(EVENT + EVENT)[:3] == ("malformed_json", None, len(EVENT))


@pytest.mark.parametrize(
    "key", ["x", "", "Metrics", "metric", "metricss", "ts ", "tss", "device_id"]
)
def test_unknown_field_is_refused_by_name(key):
    assert verdict_of(event(**{key: 1}))[:3] == ("unknown_field", key, 14)


def test_unknown_field_is_named_as_it_was_written():
    assert verdict_of(b'{"\\u0078\xc3\xa5":1}')[:2] == ("unknown_field", "\\u0078å")


def test_escaped_field_name_is_the_field():
    escaped = b"".join(b"\\u%04x" % letter for letter in b"metrics")
    assert code_of(b'{"' + escaped + b'":{"a":"x"}}') == "bad_metric_value"
    assert verdict_of(b'{"\\u0073eq":5,"metrics":{}}').seq == 5
    assert verdict_of(b'{"t\\u0073":"2025-01-01T00:00:00Z","metrics":{}}').has_ts


@pytest.mark.parametrize("field", reference.FIELDS)
def test_field_that_comes_twice_is_a_duplicate(field):
    value = {"metrics": "{}", "tags": "{}", "ts": '"2025-01-01T00:00:00Z"'}.get(field, "0")
    escaped = f"\\u{ord(field[0]):04x}{field[1:]}"
    for again in (field, escaped):
        body = f'{{"{field}":{value},"{again}":{value}}}'.encode()
        assert verdict_of(body)[:2] == ("duplicate_key", field)


def test_missing_metrics_comes_behind_every_other_rule():
    assert verdict_of(b'{"seq":1}')[:3] == ("missing_metrics", "metrics", 8)
    assert verdict_of(b"{}")[:3] == ("missing_metrics", "metrics", 1)
    assert code_of(b"{} x") == "malformed_json"
    assert code_of(b'{"seq":-1}') == "bad_seq"


def test_first_broken_rule_wins_over_malformed_json_behind_it():
    assert verdict_of(b'{"seq":-1,]]')[:2] == ("bad_seq", "seq")
    assert verdict_of(b'{"metrics":{"a":"\xff')[:2] == ("bad_metric_value", "metrics.a")
    assert code_of(b'{"seq":1]') == "malformed_json"


@pytest.mark.parametrize("field", ["metrics", "tags"])
@pytest.mark.parametrize("value", ["null", "[]", '""', "0", "-1", "true"])
def test_metrics_or_tags_of_another_type_is_not_an_object(field, value):
    body = f'{{"{field}":{value}}}'.encode()
    assert verdict_of(body)[:3] == ("not_an_object", field, body.index(b":") + 1)


# --------------------------------------------------------------------------------- metrics and tags


@pytest.mark.parametrize(
    ("field", "limit", "value", "code"),
    [("metrics", 32, 1, "too_many_metrics"), ("tags", 16, "x", "too_many_tags")],
)
def test_number_of_keys_is_limited(field, limit, value, code):
    for prefix in ("k", "a_long_key_with_more_than_16_"):
        keys = [f"{prefix}{i}" for i in range(limit + 1)]
        assert code_of(event(**{field: dict.fromkeys(keys[:limit], value)})) == ""
        assert verdict_of(event(**{field: dict.fromkeys(keys, value)}))[:2] == (code, field)


GOOD_NAMES = ["a", "z", "a0", "a_", "temp_c", "a" * 31, "a" * 32, "a23456789", "a1234567890123456"]
BAD_NAMES = [
    "",
    "A",
    "aB",
    "0",
    "_",
    "a-b",
    "a.b",
    "a b",
    "\u00e5",
    "a\u00e5",
    "a" * 33,
    "a\n",
    "a\0",
]


@pytest.mark.parametrize(("field", "value"), [("metrics", "1"), ("tags", '"x"')])
@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_name_is_accepted_plain_as_well_as_escaped(field, value, name):
    first = "" if field == "metrics" else '"metrics":{},'
    assert code_of(f'{{{first}"{field}":{{"{name}":{value}}}}}') == ""
    for escaped_from in range(len(name)):
        written = name[:escaped_from] + "".join(f"\\u{ord(c):04x}" for c in name[escaped_from:])
        assert code_of(f'{{{first}"{field}":{{"{written}":{value}}}}}') == ""


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [("metrics", 1, "bad_metric_key"), ("tags", "x", "bad_tag_key")],
)
@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_name_is_refused_plain_as_well_as_escaped(field, value, code, name):
    plain = json.dumps(name, ensure_ascii=False)[1:-1]
    for written in (plain, "".join(f"\\u{ord(c):04x}" for c in name)):
        body = f'{{"{field}":{{"{written}":{json.dumps(value)}}}}}'.encode()
        assert verdict_of(body)[:3] == (code, f"{field}.{written}", len(field) + 5)


@pytest.mark.parametrize("byte", range(256))
def test_every_byte_inside_a_name_is_judged_like_the_reference(byte):
    for position in range(40):
        name = b"a" * position + bytes([byte]) + b"a"
        assert_as_reference(b'{"metrics":{"' + name + b'":1}}')


@pytest.mark.parametrize(("field", "value"), [("metrics", "1"), ("tags", '"x"')])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32])
def test_name_that_comes_twice_is_a_duplicate_at_any_length(field, value, length):
    name = "abcdefghijklmnopqrstuvwxyz_01234"[:length]
    escaped = "\\u0061" + name[1:]
    for again in (name, escaped):
        body = f'{{"{field}":{{"{name}":{value},"b":{value},"{again}":{value}}}}}'.encode()
        assert verdict_of(body)[:2] == ("duplicate_key", f"{field}.{again}")


@pytest.mark.parametrize("length", [8, 9, 16, 17, 18, 31, 32])
def test_names_that_differ_in_one_byte_are_no_duplicates(length):
    for position in range(1, length):
        names = ["a" * length, "a" * position + "b" + "a" * (length - position - 1)]
        assert code_of(event(metrics=dict.fromkeys(names, 1))) == ""
    names = ["a" * n for n in range(1, 33)]
    assert code_of(event(metrics=dict.fromkeys(names, 1))) == ""


def test_32_names_that_differ_in_two_bytes_are_no_duplicates():
    for length in range(3, 33):
        for position in range(1, length - 1):
            before, behind = "a" * position, "b" * (length - position - 2)
            names = [f"{before}{i:02}{behind}" for i in range(32)]
            assert validator.validate(event(metrics=dict.fromkeys(names, 1))).code == ""


def test_duplicate_is_found_at_every_place_among_32_names():
    for first in range(31):
        names = [f"m{i}" for i in range(31)]
        body = ",".join(f'"{name}":1' for name in [*names, names[first]])
        assert code_of(f'{{"metrics":{{{body}}}}}') == "duplicate_key"


@pytest.mark.parametrize("value", ["0", "-0", "1.5", "-1e-7", "1.7976931348623157e308", "1e-400"])
def test_finite_number_is_a_metric(value):
    assert code_of(f'{{"metrics":{{"a":{value}}}}}') == ""


@pytest.mark.parametrize(
    "value", ["null", "true", '"1"', "[1]", "{}", "1e400", "-1e309", "1" + "0" * 309]
)
def test_anything_else_is_a_bad_metric_value(value):
    assert verdict_of(f'{{"metrics":{{"a":{value}}}}}'.encode())[:3] == (
        "bad_metric_value",
        "metrics.a",
        16,
    )


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "01", "1.", "+1", ".5", "0x1", ""]
)
def test_metric_that_is_no_json_is_malformed(value):
    assert code_of(f'{{"metrics":{{"a":{value}}}}}') == "malformed_json"


@pytest.mark.parametrize(
    ("character", "written"),
    [
        ("x", "x"),
        ("\u00e5", "\u00e5"),
        ("\u20ac", "\u20ac"),
        ("\U0001f600", "\U0001f600"),
        ("x", "\\u0078"),
        ("\n", "\\n"),
        ("\u00e5", "\\u00e5"),
        ("\u20ac", "\\u20ac"),
        ("\U0001f600", "\\ud83d\\ude00"),
    ],
)
def test_tag_value_is_limited_to_128_bytes_after_unescaping(character, written):
    size = len(character.encode())
    for length, code in ((128, ""), (129, "bad_tag_value")):
        value = written * (length // size) + "a" * (length % size)
        body = f'{{"metrics":{{}},"tags":{{"site":"{value}"}}}}'.encode()
        assert verdict_of(body)[:2] == (code, "tags.site" if code else None)


@pytest.mark.parametrize("value", ["null", "1", "true", "[]", "{}"])
def test_tag_value_of_another_type_is_refused(value):
    assert verdict_of(f'{{"tags":{{"a":{value}}}}}'.encode())[:3] == ("bad_tag_value", "tags.a", 13)


# ------------------------------------------------------------------------------------- seq and boot


@pytest.mark.parametrize("field", ["seq", "boot"])
@pytest.mark.parametrize("value", [0, 1, 9, 10, 2**31, 2**53 + 1, 10**18, INT63_MAX - 1, INT63_MAX])
def test_counter_in_range_is_read_exactly(field, value):
    assert getattr(verdict_of(event(**{field: value})), field) == value


@pytest.mark.parametrize("field", ["seq", "boot"])
@pytest.mark.parametrize(
    "value",
    [
        *(str(INT63_MAX + 1), str(2**64), str(2**64 + 1), "9" * 19, "9" * 20, "1" + "0" * 400),
        *("-0", "-1", "0.0", "1.0", "1e2", "0e0", "1E2", "1e400", "1e-1", "1.5"),
        *("null", "true", '"1"', "[]", "{}"),
    ],
)
def test_counter_of_another_form_is_refused(field, value):
    body = f'{{"{field}":{value},"metrics":{{}}}}'.encode()
    assert verdict_of(body)[:3] == (f"bad_{field}", field, len(field) + 4)


@pytest.mark.parametrize("field", ["seq", "boot"])
@pytest.mark.parametrize("value", ["", "+1", "01", "00", "-", "1.", "1e", "0x1", "1_0", "NaN"])
def test_counter_that_is_no_json_is_malformed(field, value):
    assert code_of(f'{{"{field}":{value},"metrics":{{}}}}') == "malformed_json"


def test_boot_may_come_without_seq():
    assert verdict_of(event(boot=3))[4:6] == (None, 3)


# ----------------------------------------------------------------------------------------------- ts

GOOD_TIMES = [
    "2025-09-23T11:18:41Z",
    "2025-09-23t11:18:41z",
    "2025-09-23T11:18:41.5Z",
    "2025-09-23T11:18:41.123456789Z",
    "2025-09-23T11:18:41." + "0123456789" * 20 + "Z",
    "2025-09-23T11:18:41+00:00",
    "2025-09-23T11:18:41-00:00",
    "2025-09-23T11:18:41+23:59",
    "2025-09-23T11:18:41.25-23:59",
    "2025-09-23T23:59:59Z",
    "2025-09-23T00:00:00Z",
    "0000-01-01T00:00:00Z",
    "0000-02-29T00:00:00Z",
    "9999-12-31T23:59:59Z",
    "2024-02-29T00:00:00Z",
    "2000-02-29T00:00:00Z",
    "2025-02-28T00:00:00Z",
    *[f"2025-{month:02}-30T00:00:00Z" for month in (1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)],
    *[f"2025-{month:02}-31T00:00:00Z" for month in (1, 3, 5, 7, 8, 10, 12)],
]
BAD_TIMES = [
    "",
    "2025-09-23",
    "2025-09-23T11:18:41",
    "2025-09-23T11:18Z",
    "2025-09-23T11:18:41.Z",
    "2025-09-23T11:18:41,5Z",
    "2025-09-23T11:18:41.5",
    "2025-09-23T11:18:41." + "5" * 100,
    "2025-09-23 11:18:41Z",
    "2025-09-23_11:18:41Z",
    "2025-09-23T11:18:41 Z",
    "2025-09-23T11:18:41ZZ",
    "2025-09-23T11:18:41Z ",
    " 2025-09-23T11:18:41Z",
    "2025-09-23T11:18:60Z",
    "2016-12-31T23:59:60Z",
    "2025-09-23T24:00:00Z",
    "2025-09-23T11:60:00Z",
    "2025-00-23T11:18:41Z",
    "2025-13-23T11:18:41Z",
    "2025-09-00T11:18:41Z",
    "2025-01-32T11:18:41Z",
    *[f"2025-{month:02}-31T00:00:00Z" for month in (2, 4, 6, 9, 11)],
    "2025-02-29T00:00:00Z",
    "2025-02-30T00:00:00Z",
    "1900-02-29T00:00:00Z",
    "2100-02-29T00:00:00Z",
    "2025-09-23T11:18:41+24:00",
    "2025-09-23T11:18:41+00:60",
    "2025-09-23T11:18:41+0000",
    "2025-09-23T11:18:41+00",
    "2025-09-23T11:18:41+00:00:00",
    "2025-09-23T11:18:41+00:0",
    "2025-09-23T11:18:41+0a:00",
    "2025-09-23T11:18:41+00:0a",
    "2025-09-23T11:18:41*00:00",
    "2025-09-23T11:18:41Z+00:00",
    "+2025-09-23T11:18:41Z",
    "-2025-09-23T11:18:41Z",
    "12025-09-23T11:18:41Z",
    "25-09-23T11:18:41Z",
    "20250923T111841Z",
    "2025-W39-2T11:18:41Z",
    "2025-266T11:18:41Z",
    "1758626321",
    "2025-09-23T11:18:41\u00e5",
    "2025-09-23T11:18:4\uff11Z",
]


@pytest.mark.parametrize("text", GOOD_TIMES)
def test_timestamp_is_accepted(text):
    assert reference.timestamp_ok(text)
    assert verdict_of(event(ts=text)).ts == text.encode()


@pytest.mark.parametrize("text", BAD_TIMES)
def test_timestamp_is_refused(text):
    assert not reference.timestamp_ok(text)
    assert verdict_of(event(ts=text))[:3] == ("bad_ts", "ts", 19)


@pytest.mark.parametrize("text", GOOD_TIMES + BAD_TIMES)
def test_escaped_timestamp_is_judged_like_a_plain_one(text):
    good = reference.timestamp_ok(text)
    for step in (1, 2, 7, 20):
        written = "".join(
            f"\\u{ord(c):04x}" if i % step == step - 1 else c for i, c in enumerate(text)
        )
        verdict = verdict_of(f'{{"ts":"{written}","metrics":{{}}}}'.encode())
        assert verdict.code == ("" if good else "bad_ts")
        assert verdict.ts == (written.encode() if good else None)


@pytest.mark.parametrize("byte", range(256))
def test_every_byte_inside_a_timestamp_is_judged_like_the_reference(byte):
    for text in (b"2025-09-23T11:18:41.5+01:00", b"2024-02-29T11:18:41Z"):
        for position in range(len(text)):
            changed = text[:position] + bytes([byte]) + text[position + 1 :]
            assert_as_reference(b'{"metrics":{},"ts":"' + changed + b'"}')


def test_character_of_several_bytes_inside_a_timestamp_is_refused():
    text = "2025-09-23T11:18:41.123456+01:00"
    for character in ("\u0080", "\u00ba", "\u00e5", "\u07ff", "\u0800", "\u20ac", "\U0001f600"):
        for position in range(len(text)):
            for width in (len(character.encode()), 1):
                changed = text[:position] + character + text[position + width :]
                assert verdict_of(event(ts=changed)).code == "bad_ts"


def test_every_day_of_the_calendar_is_judged_like_the_reference():
    for year in (0, 1, 4, 100, 400, 1900, 1999, 2000, 2023, 2024, 2100, 9999):
        for month in range(14):
            for day in range(34):
                text = f"{year:04}-{month:02}-{day:02}T00:00:00Z"
                code = "" if reference.timestamp_ok(text) else "bad_ts"
                assert validator.validate(b'{"metrics":{},"ts":"%s"}' % text.encode()).code == code


@pytest.mark.parametrize("value", ["null", "0", "true", "[]", "{}"])
def test_timestamp_of_another_type_is_refused(value):
    assert verdict_of(f'{{"ts":{value},"metrics":{{}}}}'.encode())[:3] == ("bad_ts", "ts", 6)


# ------------------------------------------------------------------------------------------ payload


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_payload_depth_is_limited_to_32(opening, closing):
    levels = opening.count("[") + opening.count("{")
    at_limit, past = 32 // levels, 32 // levels + 1
    nested = [(opening * times + "0" + closing * times).encode() for times in (at_limit, past)]
    assert code_of(json_cases.in_payload(nested[0])) == ""
    verdict = verdict_of(json_cases.in_payload(nested[1]))
    assert verdict[:3] == ("payload_too_deep", "payload", 24 + len(opening) * at_limit)


def test_depth_falls_again_when_a_bracket_closes():
    branch = b"[" * 31 + b"]" * 31
    assert code_of(json_cases.in_payload(b"[" + b",".join([branch] * 50) + b"]")) == ""


def test_hundred_thousand_brackets_need_no_stack():
    assert code_of(json_cases.in_payload(b"[" * 100_000)) == "payload_too_deep"
    assert code_of(json_cases.in_payload(b'{"a":' * 100_000)) == "payload_too_deep"
    assert code_of(b"[" * 100_000) == "not_an_object"


def test_members_are_limited_to_1024_in_one_object():
    # two of them are metrics and payload
    for count, code in ((1022, ""), (1023, "too_many_members")):
        assert code_of(event(payload={f"k{i}": i for i in range(count)})) == code


def test_members_are_limited_to_1024_over_all_objects():
    for count, code in ((1022, ""), (1023, "too_many_members")):
        assert code_of(event(payload=[{"a": i} for i in range(count)])) == code


def test_members_of_every_part_count():
    fields = {"tags": {f"t{i}": "" for i in range(16)}, "metrics": {f"m{i}": 0 for i in range(32)}}
    room = 1024 - 3 - 16 - 32
    assert code_of(event(**fields, payload={f"k{i}": i for i in range(room)})) == ""
    refused = verdict_of(event(**fields, payload={f"k{i}": i for i in range(room + 1)}))
    assert refused[:2] == ("too_many_members", None)
    before = {"payload": {f"k{i}": i for i in range(1023)}, "seq": 1, "metrics": {}}
    assert code_of(json.dumps(before)) == "too_many_members"
    before = {"payload": {f"k{i}": i for i in range(1022)}, "metrics": {"a": 1}}
    assert code_of(json.dumps(before)) == "too_many_members"


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 10, 16, 17, 100, 1000])
def test_duplicate_is_found_at_every_place_of_an_object(count):
    keys = [f"key{i}" for i in range(count)]
    for first in {0, 1, 6, 7, 8, 9, count // 2, count - 1} & set(range(count)):
        for again in (keys[first], "\\u006b" + keys[first][1:]):
            members = ",".join(f'"{key}":0' for key in [*keys, again])
            body = f'{{"metrics":{{}},"payload":{{{members}}}}}'.encode()
            assert verdict_of(body)[:3] == ("duplicate_key", "payload", body.rindex(b',"') + 1)


def test_keys_that_differ_in_one_byte_are_no_duplicates():
    for length in (1, 7, 8, 9, 20):
        keys = ["a" * i + "b" + "a" * (length - i - 1) for i in range(length)] + ["a" * length]
        for escape in ("a", "\\u0061"):
            members = ",".join(f'"{key.replace("a", escape, 1)}":0' for key in keys)
            assert code_of(f'{{"metrics":{{}},"payload":{{{members}}}}}') == ""


def test_same_keys_in_many_wide_objects_are_no_duplicates():
    wide = {f"k{i}": {"k0": 0, "k1": 1} for i in range(12)}
    assert code_of(event(payload=[wide] * 25)) == ""
    assert code_of(event(payload={"a": wide, "b": {"c": wide, "d": wide}})) == ""


def test_wide_object_goes_on_behind_a_nested_wide_object():
    inner = {f"i{i}": 0 for i in range(12)}
    keys = [f'"k{i}":{json.dumps(inner)}' for i in range(30)]
    for again, code in (("k30", ""), ("k0", "duplicate_key"), ("k8", "duplicate_key"), ("i0", "")):
        members = ",".join([*keys, f'"{again}":0'])
        assert code_of(f'{{"metrics":{{}},"payload":{{{members}}}}}') == code


# ---------------------------------------------------------------------------------------- device id


@pytest.mark.parametrize("device_id", [b"a", b"Z", b"0", b"_", b"-", b"a" * 64, b"AZaz09_-"])
def test_device_id_is_accepted(device_id):
    assert validator.device_id_ok(device_id)


@pytest.mark.parametrize(
    "device_id", [b"", b"a" * 65, b"a\n", b"a\0", "å".encode(), b"a/b", b"a+b"]
)
def test_device_id_is_refused(device_id):
    assert not validator.device_id_ok(device_id)


def test_every_byte_of_a_device_id_is_judged_like_the_reference():
    for byte in range(256):
        for device_id in (bytes([byte]), b"a" + bytes([byte]), bytes([byte]) + b"a"):
            assert validator.device_id_ok(device_id) == reference.device_id_ok(device_id)


# -------------------------------------------------------------------------------------- linear time


def seconds_for(body: bytes) -> float:
    best = 1.0
    for _ in range(9):
        start = time.perf_counter()
        validator.check(body)
        best = min(best, time.perf_counter() - start)
    return best


HOSTILE = {
    "brackets": lambda n: json_cases.in_payload(b"[" * n),
    "empty objects": lambda n: json_cases.in_payload(b"[" + b"{}," * n + b"{}]"),
    "digits": lambda n: json_cases.in_payload(b"1" * n),
    "digits with exponent": lambda n: json_cases.in_payload(b"0." + b"0" * n + b"1e%d" % (n + 309)),
    "exponent": lambda n: json_cases.in_payload(b"1e-" + b"9" * n),
    "escapes": lambda n: json_cases.in_payload(b'"' + b"\\u00e5" * n + b'"'),
    "long keys of one prefix": lambda n: json_cases.in_payload(
        b"{" + b",".join(b'"%s%d":0' % (b"k" * (n // 64), i) for i in range(64)) + b"}"
    ),
    "long escaped keys of one prefix": lambda n: json_cases.in_payload(
        b"{" + b",".join(b'"%s%02d":0' % (b"\\u006b" * (n // 64), i) for i in range(64)) + b"}"
    ),
    "space": lambda n: b" " * n + EVENT + b" " * n,
    "timestamp fraction": lambda n: event(ts="2025-09-23T11:18:41." + "1" * n + "Z"),
    "tag escapes": lambda n: b'{"tags":{"a":"' + b"\\n" * n + b'"}}',
    "controls behind spaces": lambda n: b'{"metrics":{},"payload":"' + b"\xc3\xa5 " * n,
}


def assert_linear(small: bytes, large: bytes) -> None:
    """Eight times the work may take 24 times as long: linear is 8, quadratic is 64."""
    for _ in range(5):
        if seconds_for(large) <= 24 * seconds_for(small) + 20e-6:
            return
    pytest.fail(f"{seconds_for(small):.6f} s, {seconds_for(large):.6f} s for 8 times as much")


@pytest.mark.parametrize("shape", HOSTILE)
def test_time_grows_no_faster_than_the_body(shape):
    assert_linear(HOSTILE[shape](20_000), HOSTILE[shape](160_000))


@pytest.mark.parametrize("key", ["%d", "\\u0061%d", "one_head_for_all_%04d"])
def test_time_grows_no_faster_than_the_keys(key):
    objects = [",".join(f'"{key % i}":0' for i in range(count)) for count in (125, 1000)]
    small, large = (json_cases.in_payload(b"{%s}" % keys.encode()) for keys in objects)
    assert code_of(large) == ""
    assert_linear(small, large)


# ---------------------------------------------------------------------------- against the reference

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=12)
    ),
    max_leaves=25,
)
names = st.from_regex(r"\A[a-z][a-z0-9_]{0,33}\Z") | st.text(max_size=4)
times = st.datetimes().map(lambda t: t.isoformat() + "Z") | st.sampled_from(GOOD_TIMES + BAD_TIMES)
counters = st.integers(0, INT63_MAX) | st.sampled_from([-1, -0.0, 1.0, INT63_MAX + 1, "1", None])
near_events = st.fixed_dictionaries(
    {},
    optional={
        "metrics": st.dictionaries(names, st.floats() | st.integers() | json_values, max_size=4)
        | st.dictionaries(st.from_regex(r"\A[a-z]{1,3}\Z"), st.integers(), max_size=34),
        "tags": st.dictionaries(names, st.text(max_size=140) | json_values, max_size=4),
        "ts": times | json_values,
        "seq": counters,
        "boot": counters,
        "payload": json_values,
        "x": st.none(),
    },
)
fragments = st.sampled_from(
    [
        *(text for text in (*json_cases.YES.values(), *json_cases.NO.values()) if len(text) < 400),
        *(bytes([byte]) for byte in b'"\\{}[],: \0\xffe.-0'),
        *(
            b'"a":1,',
            b'"a":',
            b'"metrics":{},',
            b'"seq":0,',
            b"null",
            b"\\u",
            b"9" * 20,
            b"\xc3\xa5",
        ),
    ]
)


@st.composite
def valid_events(draw):
    """A valid event in one of many spellings: order, whitespace, escapes."""
    good_names = st.from_regex(r"\A[a-z][a-z0-9_]{0,31}\Z")
    numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    fields = draw(
        st.fixed_dictionaries(
            {"metrics": st.dictionaries(good_names, numbers, max_size=6)},
            optional={
                "tags": st.dictionaries(good_names, st.text(max_size=30), max_size=4),
                "ts": st.sampled_from(GOOD_TIMES),
                "seq": st.integers(0, INT63_MAX),
                "boot": st.integers(0, INT63_MAX),
                "payload": json_values,
            },
        )
    )
    order = draw(st.permutations(list(fields)))
    return json.dumps(
        {field: fields[field] for field in order},
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.none() | st.integers(0, 9)),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", "\r\n:  ")])),
    ).encode("utf-8", "surrogatepass")


@st.composite
def mutated_events(draw):
    body = bytearray(draw(valid_events()))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(body)))
        stop = start + draw(st.sampled_from([0, 0, 1, 1, 2, 5]))
        body[start:stop] = draw(fragments | st.binary(max_size=2))
    return bytes(body)


@settings(max_examples=300, deadline=None)
@given(valid_events())
def test_valid_events_in_any_spelling_get_the_verdict_of_the_reference(body):
    assert_as_reference(body)


@settings(max_examples=300, deadline=None)
@given(near_events, st.booleans())
def test_near_events_get_the_verdict_of_the_reference(fields, ensure_ascii):
    assert_as_reference(
        json.dumps(fields, ensure_ascii=ensure_ascii).encode("utf-8", "surrogatepass")
    )


@settings(max_examples=600, deadline=None)
@given(mutated_events())
def test_mutated_events_get_the_verdict_of_the_reference(body):
    assert_as_reference(body)


@settings(max_examples=300, deadline=None)
@given(st.lists(fragments, max_size=20).map(b"".join))
def test_fragments_in_payload_get_the_verdict_of_the_reference(text):
    assert_as_reference(json_cases.in_payload(text))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
@example(b"{" * 40)
def test_random_bytes_get_the_verdict_of_the_reference(body):
    assert_as_reference(body)
    assert_as_reference(json_cases.in_payload(body))
    assert_as_reference(json_cases.in_payload(b'"' + body + b'"'))


@settings(max_examples=300, deadline=None)
@given(
    st.text("0123456789", min_size=1, max_size=330),
    st.text("0123456789", max_size=330),
    st.integers(-700, 700) | st.just(10**30),
)
def test_numbers_near_the_limit_get_the_verdict_of_the_reference(whole, fraction, exponent):
    whole = whole.lstrip("0") or "0"
    for number in (f"{whole}.{fraction or 0}e{exponent}", f"-{whole}e{exponent}", whole):
        assert_as_reference(json_cases.in_payload(number.encode()))


@settings(max_examples=300, deadline=None)
@given(st.integers(-3, 3), st.integers(0, 330), st.integers(0, 20), st.integers(0, 40))
def test_numbers_at_the_midpoint_get_the_verdict_of_the_reference(delta, shift, zeros, cut):
    digits = str(2**1024 - 2**970 + delta)[: 309 - cut] + "0" * zeros
    for number in (f"{digits}e{cut - zeros}", f"0.{'0' * shift}{digits}e{309 + shift}"):
        assert_as_reference(json_cases.in_payload(number.encode()))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 80), st.integers(0, 80), st.integers(0, 255), st.integers(0, 40))
def test_byte_at_any_distance_from_the_end_is_found(before, behind, byte, spaces):
    text = b'"' + b"x" * before + bytes([byte]) + b"x" * behind + b'"'
    assert_as_reference(b" " * spaces + json_cases.in_payload(text) + b" " * (spaces // 2))


# ----------------------------------------------------------------------------------- the C tests

SOURCES = ["-I_native", *sorted(map(str, (ROOT / "_native").glob("gw_validator*.c")))]
FLAGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", *SOURCES, "-lpthread"]
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(compiler: str, program: Path, *arguments: str) -> Path:
    subprocess.run([compiler, *arguments, *FLAGS, "-o", str(program)], cwd=ROOT, check=True)
    return program


def test_native_test_passes_under_sanitizers(tmp_path):
    program = build("gcc", tmp_path / "t", "tests/native/test_validator.c", *SANITIZERS)
    subprocess.run([program], check=True, timeout=120)


def test_native_test_passes_with_the_flags_that_ship(tmp_path):
    program = build("gcc", tmp_path / "t", "tests/native/test_validator.c", "-O2", "-DNDEBUG")
    subprocess.run([program, str(time.time_ns())], check=True, timeout=120)  # prints its seed


def test_native_test_passes_on_aarch64(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    assert compiler
    assert emulator
    source = "tests/native/test_validator.c"
    program = build(compiler, tmp_path / "t", source, "-O2", "-static")
    run = subprocess.run([emulator, program], check=True, timeout=120, capture_output=True)
    assert b"scan paths: neon portable" in run.stdout
