"""HTTP words that every front door shares: which answer a request gets, without knowing a server.

Order of checks (docs/http.md): path and method, framing and size, media type and encoding, ack;
then compiled code looks at the body. What a door does with the result:

    request ── path, method ──┬─ a page, a receipt ─────────── Answer
                              ├─ wrong ─────────────────────── refusal(code)
                              └─ ingest ── examine(headers) ──┬─ 0, ack ─ body, Ingest.event
                                                              ├─ BULK ─┐
                                                              └─ code ─┴─ examine_form(headers)
    examine_form ─┬─ 0, Form ─ body, gateway.batches
                  └─ code ──── refusal(code)
    Ingest.event ─┬─ 0 ────── receipt_headers; enqueue: X_ACK, BODY at once; else gateway.waiting
                  ├─ BUSY ─── gateway.waiting
                  └─ code ─── refusal(code)

`examine` is for what nearly every request is, one plain JSON event; whatever else it may be
(NDJSON, compressed, larger than an event, many devices) is BULK and costs a second look.

A refusal before the body was read either reads the body first, so that the connection stays in
step, or closes (`must_close`). Constants are built once: an accepted event formats its receipt and
nothing else."""

import functools
import math
import random
import re
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import unquote_plus

from gateway.errors import NUMBER, REFUSALS
from gateway.inflate import CODINGS

TYPE_JSON: Final = ("content-type", "application/json")
CLOSE: Final = ("connection", "close")


class Headers(Protocol):
    """Of a request; names in lower case. A value that is not visible ASCII is absent from `get` and
    `get_all`."""

    def get(self, key: str, default: Any = None) -> Any: ...
    def get_all(self, key: str) -> list[str]: ...
    def __contains__(self, key: str, /) -> bool: ...


class Answer(NamedTuple):
    """A whole response."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


INGEST: Final = "/v1/ingest/"
INGEST_MANY: Final = "/v1/ingest"
"""Batches whose events name their devices."""
FIELD_CHARACTERS_MAX: Final = 128
"""The name of an unknown field may be as long as a body; the answer shows its beginning."""

ACKS: Final = ("enqueue", "durable", "sink")
"""What an accepted event can be told, from weak to strong."""
ENQUEUE: Final = 0
DURABLE: Final = 1
SINK: Final = 2
X_ACK: Final = tuple(("x-ack", ack) for ack in ACKS)
BODY: Final = tuple(b'{"ack":"%s"}' % ack.encode() for ack in ACKS)
"""Of an accepted event, by what was reached."""
LOG_USED_ABOVE: Final = 50
"""Percent. When the log is fuller a 2xx says so, and clients can slow down first."""
_X_LOG_USED: Final = tuple(("x-log-used", str(percent)) for percent in range(101))
_X_DUPLICATE: Final = ("x-duplicate", "true")

RETRY_SOON_S: Final = range(1, 6)
"""Retry-After while the gateway ends or has failed: drawn for each answer, so that a fleet does not
come back at once."""
RETRY_FULL_MAX_S: Final = 60
"""A full log asks for no longer wait than this, jitter not counted: the rate may change."""
RETRY_NO_DRAIN_S: Final = 30
"""A full log that does not drain, since the broker is away: nobody knows for how long."""

BAD_REQUEST: Final = NUMBER["bad_request"]
_INCOMPLETE: Final = "the connection ended before the body was whole"

NOT_FOUND: Final = NUMBER["not_found"]
METHOD_NOT_ALLOWED: Final = NUMBER["method_not_allowed"]
BAD_DEVICE_ID: Final = NUMBER["bad_device_id"]
LENGTH_REQUIRED: Final = NUMBER["length_required"]
BODY_TOO_LARGE: Final = NUMBER["body_too_large"]
BODY_TIMEOUT: Final = NUMBER["body_timeout"]
UNSUPPORTED_MEDIA_TYPE: Final = NUMBER["unsupported_media_type"]
UNSUPPORTED_ENCODING: Final = NUMBER["unsupported_encoding"]
ACK_NOT_SUPPORTED: Final = NUMBER["ack_not_supported"]
UNKNOWN_ACK: Final = NUMBER["unknown_ack"]
SEQ_CONFLICT: Final = NUMBER["seq_conflict"]
BATCH_TOO_LARGE: Final = NUMBER["batch_too_large"]
LOG_FULL: Final = NUMBER["log_full"]
DRAINING: Final = NUMBER["draining"]
FAILED: Final = NUMBER["failed"]
ACCEPTED_PENDING: Final = NUMBER["accepted_pending"]
INTERNAL: Final = NUMBER["internal"]
OVERLOADED: Final = NUMBER["overloaded"]

_CLOSES: Final = frozenset(
    {
        BAD_REQUEST,
        LENGTH_REQUIRED,
        BODY_TOO_LARGE,
        BATCH_TOO_LARGE,
        BODY_TIMEOUT,
        DRAINING,
        FAILED,
        INTERNAL,
    }
)
ACCEPT_ENCODING: Final = ("accept-encoding", ", ".join(CODINGS))
"""Beside 415 for a coding (RFC 9110, 15.5.16)."""

device_id_at: Final = re.compile(r"[A-Za-z0-9_-]{1,64}").fullmatch
"""`device_id_at(path, len(INGEST))`: the rest of the path is a device id."""


def must_close(code: int) -> bool:
    """The connection ends with this refusal: the request's end is unknown, or the gateway is going
    away."""
    return code in _CLOSES


def worded(code: int, message: str | None = None) -> Answer:
    """The answer to a refusal, with `message` in the place of the usual one."""
    refusal = REFUSALS[code]
    headers = [TYPE_JSON]
    if must_close(code):
        headers.append(CLOSE)
    if code == UNSUPPORTED_ENCODING:
        headers.append(ACCEPT_ENCODING)
    return Answer(refusal.status, headers, refusal.body(None, message))


_ANSWERS: Final = {code: worded(code) for code in range(1, len(REFUSALS))}


def _with_waits(code: int, seconds: range) -> tuple[Answer, ...]:
    answer = _ANSWERS[code]
    return tuple(
        answer._replace(headers=[*answer.headers, ("retry-after", str(wait))]) for wait in seconds
    )


_LATER: Final = {
    code: _with_waits(code, RETRY_SOON_S)
    for code, answer in _ANSWERS.items()
    if answer.status in (429, 503)
}
INCOMPLETE: Final = worded(BODY_TIMEOUT, _INCOMPLETE)


def refusal(code: int, field: str | None = None, offset: int | None = None) -> Answer:
    """The answer to a verdict other than 0. `field` and `offset` say what in the body was wrong."""
    if code in _LATER:
        return random.choice(_LATER[code])
    answer = _ANSWERS[code]
    if field is None and offset is None:
        return answer
    text = REFUSALS[code]
    message = text.message if offset is None else f"{text.message} (at byte {offset} of the body)"
    return answer._replace(body=text.body(shortened(field), message))


def shortened(field: str | None) -> str | None:
    """The name of a field as an answer shows it."""
    if field is None or len(field) <= FIELD_CHARACTERS_MAX:
        return field
    return field[:FIELD_CHARACTERS_MAX] + "…"


@functools.lru_cache(RETRY_FULL_MAX_S)
def full(wait_s: int) -> tuple[Answer, ...]:
    """The answers to draw from while the log is full: `wait_s` seconds (1 to `RETRY_FULL_MAX_S`)
    and up to half as much more, at least one."""
    return _with_waits(LOG_FULL, range(wait_s, wait_s + max(1, wait_s // 2) + 1))


def full_wait_s(excess_bytes: float, drain_bytes_per_s: int) -> int:
    """Seconds until a full log takes events again: when it has drained by `excess_bytes`."""
    if drain_bytes_per_s <= 0:
        return RETRY_NO_DRAIN_S
    return min(max(1, math.ceil(excess_bytes / drain_bytes_per_s)), RETRY_FULL_MAX_S)


def receipt_headers(receipt: str, duplicate: bool, used_percent: int) -> list[tuple[str, str]]:
    """The headers of an accepted event, all but X-Ack."""
    headers = [TYPE_JSON, ("x-receipt", receipt)]
    if duplicate:
        headers.append(_X_DUPLICATE)
    if used_percent > LOG_USED_ABOVE:
        headers.append(_X_LOG_USED[min(used_percent, 100)])
    return headers


def set_aside(ack: int, state: str) -> bytes:
    """The body for an event that asked for `sink` and was not delivered: what holds, and its
    state."""
    return b'{"ack":"%s","state":"%s"}' % (ACKS[ack].encode(), state.encode())


def not_allowed(allow: str) -> Answer:
    """405 with the methods that the path has."""
    answer = worded(METHOD_NOT_ALLOWED, f"this path does not have that method; use {allow}")
    return answer._replace(headers=[*answer.headers, ("allow", allow)])


def closing(answer: Answer) -> Answer:
    """The same answer, and the connection ends with it."""
    return answer if CLOSE in answer.headers else answer._replace(headers=[*answer.headers, CLOSE])


def route(path: str, method: str) -> int:
    """What is wrong with a request whose path is no page: a code, or 0 for events to ingest."""
    many = path == INGEST_MANY
    if not many and (
        not path.startswith(INGEST) or len(path) == len(INGEST) or "/" in path[len(INGEST) :]
    ):
        return NOT_FOUND
    if method != "POST":
        return METHOD_NOT_ALLOWED
    return 0 if many or device_id_at(path, len(INGEST)) else BAD_DEVICE_ID


class Terms(NamedTuple):
    """What a worker's settings say about the head of a request."""

    body_bytes_max: int
    ack: int
    """What is told when nothing is asked for: an index of ACKS."""
    durable: bool = True
    """The log is on something that an fdatasync makes durable."""
    batch_bytes_max: int = 0


class Form(NamedTuple):
    """How a body is to be taken that is not, or need not be, one plain JSON event."""

    ack: int
    ndjson: bool = False
    """One event a line; else JSON: an array of events, or one event."""
    coding: str | None = None
    """One of gateway.inflate.CODINGS."""
    each: bool = False
    """A batch is to be answered with a receipt for each event."""
    length: int = 0
    """Bytes that Content-Length announces."""


BULK: Final = -1
"""`examine`: not a plain JSON event. See `examine_form`."""
_BULK: Final = (BULK, 0)
_GOOD: Final = tuple((0, ack) for ack in range(len(ACKS)))


def examine(headers: Headers, query: str, terms: Terms) -> tuple[int, int]:
    """What is wrong with the head of a request to ingest: a code, or 0, or BULK; and the
    acknowledgement that it asks for."""
    length = headers.get("content-length")
    if length is None or "transfer-encoding" in headers:
        return LENGTH_REQUIRED, 0
    if len(length) > 19 or int(length) > terms.body_bytes_max:
        return _BULK
    media_type = headers.get("content-type")
    if media_type != "application/json" and media(media_type) != JSON:
        return _BULK
    if "content-encoding" in headers:
        return _BULK
    if query or "x-ack" in headers:
        code, ack, each = examine_ack(headers, query, terms)
        return _BULK if each else (code, ack)
    return _GOOD[terms.ack]


_FORM: Final = Form(0)


def examine_form(headers: Headers, query: str, terms: Terms, many: bool) -> tuple[int, Form]:
    """The same for any request to ingest: a code, or 0 and how its body is to be taken. `many`: its
    path is INGEST_MANY.

    A JSON body may be larger than an event, since it may be a batch: that is known when it is
    here."""
    length = headers.get("content-length")
    if length is None or "transfer-encoding" in headers:
        return LENGTH_REQUIRED, _FORM
    kind = media(headers.get("content-type"))
    if len(length) > 19 or int(length) > terms.batch_bytes_max:
        return BATCH_TOO_LARGE if many or kind == NDJSON else BODY_TOO_LARGE, _FORM
    if kind is None:
        return UNSUPPORTED_MEDIA_TYPE, _FORM
    coding: str | None = None
    if "content-encoding" in headers:
        code, coding = examine_coding(headers)
        if code:
            return code, _FORM
    code, ack, each = examine_ack(headers, query, terms)
    return code, Form(ack, kind == NDJSON, coding, each, int(length))


JSON: Final = "json"
NDJSON: Final = "ndjson"
_MEDIA: Final = {
    "application/json": JSON,
    "application/x-ndjson": NDJSON,
    "application/ndjson": NDJSON,
    "application/jsonl": NDJSON,
}


def media(media_type: str | None) -> str | None:
    """JSON or NDJSON, None for anything else: without a charset or with UTF-8."""
    if media_type is None:
        return None
    name, *parameters = media_type.split(";")
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "charset" and value.strip().strip('"').lower() not in (
            "utf-8",
            "utf8",
        ):
            return None
    return _MEDIA.get(name.strip().lower())


_CODINGS: Final = {"gzip": "gzip", "x-gzip": "gzip", "zstd": "zstd"}
"""By name; RFC 9110, 8.4.1.3 asks for the second one."""


def examine_coding(headers: Headers) -> tuple[int, str | None]:
    """What is wrong with a Content-Encoding, or 0; and the one coding that it names, None when
    nothing was done to the body."""
    names = [
        name.strip().lower()
        for value in headers.get_all("content-encoding")
        for name in value.split(",")
    ]
    if names and all(name == "identity" for name in names):
        return 0, None
    coding = _CODINGS.get(names[0]) if len(names) == 1 else None
    return (UNSUPPORTED_ENCODING if coding is None else 0), coding


def examine_ack(headers: Headers, query: str, terms: Terms) -> tuple[int, int, bool]:
    """Which acknowledgement is asked for: the query's `ack` wins over the header X-Ack, and that
    over the settings. And whether the query asks for `receipts=each`."""
    asked = set()
    each = False
    if query:
        for part in query.split("&"):
            key, _, value = part.partition("=")
            key = unquote_plus(key)
            if key == "ack":
                asked.add(unquote_plus(value))
            elif key == "receipts":
                each = unquote_plus(value) == "each"
    if not asked and "x-ack" in headers:
        asked = {value.strip() for value in headers.get_all("x-ack")} or {""}
    if not asked:
        return 0, terms.ack, each
    value = asked.pop()
    if asked or value not in ACKS:
        return UNKNOWN_ACK, 0, each
    if value == "durable" and not terms.durable:
        return ACK_NOT_SUPPORTED, 0, each
    return 0, ACKS.index(value), each
