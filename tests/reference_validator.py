"""The rules of docs/http.md in plain Python: what the compiled validator is tested against.

Written from the design and from the contract in `_native/gw_validator.h`, for reading and not for
speed: one function a rule, the standard library for all that it knows (UTF-8, rounding to double,
the calendar). It shares no idea with the C code: strings become `str`, objects become sets of keys,
nesting is recursion (to depth 32, so it may be).
"""

import calendar
import math
import re
from typing import NamedTuple, NoReturn

NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
INTEGER = re.compile(r"0|[1-9][0-9]*")
TIMESTAMP = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-9]{2})(\.[0-9]+)?"
    r"([Zz]|[+-]([0-9]{2}):([0-9]{2}))"
)
SURROGATE_PAIR = re.compile(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
CODE_UNIT = re.compile(r"\\u([0-9a-fA-F]{4})")
SHORT_ESCAPES = {
    '"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t",
}  # fmt: skip
MEMBERS_MAX, METRICS_MAX, TAGS_MAX, TAG_VALUE_BYTES_MAX, DEPTH_MAX = 1024, 32, 16, 128, 32
FIELDS = ("metrics", "tags", "ts", "seq", "boot", "payload")


class Verdict(NamedTuple):
    code: str
    field: str | None = None
    offset: int = 0
    has_ts: bool = False
    seq: int | None = None
    boot: int | None = None
    ts: bytes | None = None
    object_offset: int = 0


class Refused(Exception):
    pass


def validate(body: bytes) -> Verdict:
    try:
        return _Event(body).document()
    except Refused as refused:
        return Verdict(*refused.args)


def device_id_ok(device_id: bytes) -> bool:
    return re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", device_id) is not None


def timestamp_ok(text: str) -> bool:
    match = TIMESTAMP.fullmatch(text)
    if match is None:
        return False
    year, month, day, hour, minute, second = (int(match[i]) for i in range(1, 7))
    if not 1 <= month <= 12:
        return False
    # the Gregorian calendar repeats every 400 years, and Python's has no year 0
    if not 1 <= day <= calendar.monthrange(year + 400, month)[1]:
        return False
    offset_hour, offset_minute = int(match[9] or 0), int(match[10] or 0)
    clock_ok = hour <= 23 and minute <= 59 and second <= 59
    return clock_ok and offset_hour <= 23 and offset_minute <= 59


def is_noncharacter(character: str) -> bool:
    code = ord(character)
    return 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE


class _Event:
    def __init__(self, body: bytes) -> None:
        self.body = body
        self.at = 0
        self.members = 0

    # the grammar of JSON

    def refuse(self, code: str, field: str | None, offset: int) -> NoReturn:
        raise Refused(code, field, offset)

    def malformed(self, offset: int) -> NoReturn:
        self.refuse("malformed_json", None, offset)

    def peek(self) -> str:
        """The next byte as a character; "" at the end."""
        return self.body[self.at : self.at + 1].decode("latin-1")

    def next_token(self) -> str:
        while self.peek() and self.peek() in " \t\r\n":
            self.at += 1
        return self.peek()

    def expect(self, characters: str) -> str:
        found = self.next_token()
        if not found or found not in characters:
            self.malformed(self.at)
        self.at += 1
        return found

    def value_begins(self, wanted: str, code: str, field: str) -> None:
        """What begins here must be a value, and of the type that begins with `wanted`."""
        found = self.next_token()
        if not found or found not in '{["-0123456789tfn':
            self.malformed(self.at)
        if found not in wanted:
            self.refuse(code, field, self.at)

    def string(self) -> str:
        self.expect('"')
        text = ""
        while (character := self.character()) is not None:
            text += character
        return text

    def character(self) -> str | None:
        """One character of a string, None for its closing quote."""
        start = self.at
        first = self.peek()
        if not first or first < " ":
            self.malformed(start)
        if first == '"':
            self.at += 1
            return None
        if first == "\\":
            character = self.escape()
        else:
            character = self.utf8()
        if is_noncharacter(character):
            self.malformed(start)
        return character

    def utf8(self) -> str:
        for length in (1, 2, 3, 4):
            try:
                character = self.body[self.at : self.at + length].decode("utf-8")
            except UnicodeDecodeError:
                continue
            self.at += length
            return character
        return self.malformed(self.at)

    def escape(self) -> str:
        start = self.at
        letter = self.body[start + 1 : start + 2].decode("latin-1")
        if letter in SHORT_ESCAPES:
            self.at += 2
            return SHORT_ESCAPES[letter]
        pair = self.body[start : start + 12].decode("latin-1")
        if match := SURROGATE_PAIR.match(pair):
            self.at += 12
            return bytes.fromhex(match[1] + match[2]).decode("utf-16-be")
        if match := CODE_UNIT.match(pair):
            code = int(match[1], 16)
            if 0xD800 <= code <= 0xDFFF:
                self.malformed(start)
            self.at += 6
            return chr(code)
        return self.malformed(start)

    def digits(self) -> None:
        if not self.peek().isdecimal():
            self.malformed(self.at)
        while self.peek().isdecimal():
            self.at += 1

    def number(self) -> str:
        self.next_token()
        start = self.at
        if self.peek() == "-":
            self.at += 1
        if self.peek() == "0":
            self.at += 1
        else:
            self.digits()
        if self.peek() == ".":
            self.at += 1
            self.digits()
        if self.peek() and self.peek() in "eE":
            self.at += 1
            if self.peek() and self.peek() in "+-":
                self.at += 1
            self.digits()
        return self.body[start : self.at].decode()

    def key(self, field: str | None, count: int, limit: int | None) -> tuple[str, str, int]:
        """A key: its text, as it was written, and where it begins. Counts it."""
        self.next_token()
        start = self.at
        text = self.string()
        self.members += 1
        if self.members > MEMBERS_MAX:
            self.refuse("too_many_members", None, start)
        if limit is not None and count == limit:
            self.refuse(f"too_many_{field}", field, start)
        return text, self.body[start + 1 : self.at - 1].decode(), start

    # the rules of an event

    def document(self) -> Verdict:
        found = self.next_token()
        if found != "{":
            if found and found in '["-0123456789tfn':
                self.refuse("not_an_object", None, self.at)
            self.malformed(self.at)
        object_offset = self.at
        self.at += 1
        values: dict[str, object] = {}
        if self.next_token() == "}":
            self.at += 1
        else:
            while True:
                field, written, start = self.key(None, 0, None)
                if field not in FIELDS:
                    self.refuse("unknown_field", written, start)
                if field in values:
                    self.refuse("duplicate_key", field, start)
                self.expect(":")
                self.next_token()
                values[field] = getattr(self, f"read_{field}")()
                if self.expect(",}") == "}":
                    break
        brace = self.at - 1
        if self.next_token():
            self.malformed(self.at)
        if "metrics" not in values:
            self.refuse("missing_metrics", "metrics", brace)
        seq, boot, ts = values.get("seq"), values.get("boot"), values.get("ts")
        return Verdict("", None, 0, ts is not None, seq, boot, ts, object_offset)

    def read_metrics(self) -> None:
        def value(name: str) -> None:
            self.value_begins("-0123456789", "bad_metric_value", name)
            start = self.at
            if math.isinf(float(self.number())):
                self.refuse("bad_metric_value", name, start)

        self.flat_object("metrics", METRICS_MAX, "bad_metric_key", value)

    def read_tags(self) -> None:
        def value(name: str) -> None:
            self.value_begins('"', "bad_tag_value", name)
            start = self.at
            if len(self.string().encode()) > TAG_VALUE_BYTES_MAX:
                self.refuse("bad_tag_value", name, start)

        self.flat_object("tags", TAGS_MAX, "bad_tag_key", value)

    def flat_object(self, field: str, limit: int, bad_key: str, value) -> None:
        self.value_begins("{", "not_an_object", field)
        self.at += 1
        names: set[str] = set()
        if self.next_token() == "}":
            self.at += 1
            return
        while True:
            name, written, start = self.key(field, len(names), limit)
            if not NAME.fullmatch(name):
                self.refuse(bad_key, f"{field}.{written}", start)
            if name in names:
                self.refuse("duplicate_key", f"{field}.{written}", start)
            names.add(name)
            self.expect(":")
            value(f"{field}.{written}")
            if self.expect(",}") == "}":
                return

    def read_ts(self) -> bytes:
        self.value_begins('"', "bad_ts", "ts")
        start = self.at
        if not timestamp_ok(self.string()):
            self.refuse("bad_ts", "ts", start)
        return self.body[start + 1 : self.at - 1]

    def read_seq(self) -> int:
        return self.counter("seq")

    def read_boot(self) -> int:
        return self.counter("boot")

    def counter(self, field: str) -> int:
        self.value_begins("-0123456789", f"bad_{field}", field)
        start = self.at
        text = self.number()
        if not INTEGER.fullmatch(text) or len(text) > 19 or int(text) > 2**63 - 1:
            self.refuse(f"bad_{field}", field, start)
        return int(text)

    def read_payload(self, depth: int = 0) -> None:
        found = self.next_token()
        start = self.at
        if found and found in "{[" and depth == DEPTH_MAX:
            self.refuse("payload_too_deep", "payload", start)
        if found == "{":
            self.payload_object(depth)
        elif found == "[":
            self.payload_array(depth)
        elif found == '"':
            self.string()
        elif found and found in "-0123456789":
            if math.isinf(float(self.number())):
                self.malformed(start)
        else:
            for literal in (b"true", b"false", b"null"):
                if self.body.startswith(literal, start):
                    self.at += len(literal)
                    return
            self.malformed(start)

    def payload_object(self, depth: int) -> None:
        self.at += 1
        keys: set[str] = set()
        if self.next_token() == "}":
            self.at += 1
            return
        while True:
            key, _, start = self.key("payload", 0, None)
            if key in keys:
                self.refuse("duplicate_key", "payload", start)
            keys.add(key)
            self.expect(":")
            self.read_payload(depth + 1)
            if self.expect(",}") == "}":
                return

    def payload_array(self, depth: int) -> None:
        self.at += 1
        if self.next_token() == "]":
            self.at += 1
            return
        while True:
            self.read_payload(depth + 1)
            if self.expect(",]") == "]":
                return
