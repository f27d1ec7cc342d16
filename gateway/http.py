"""HTTP words that every front door shares: which answer a request gets, without knowing a server.

Order of checks (docs/http.md): path and method, framing and size, media type and encoding, ack;
then compiled code looks at the body. What a door does with the result:

    request ── path, method ──┬─ a GET page ───────────────── Answer
                              ├─ wrong ────────────────────── refusal(code)
                              └─ ingest ── examine(headers) ─┬─ 0 ──── body, Ingest.event, answer
                                                             └─ code ─ refusal(code)

A refusal before the body was read either reads the body first, so that the connection stays in
step, or closes (`must_close`). Constants are built once: an accepted event costs no formatting."""

import random
import re
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import unquote_plus

from gateway.errors import NUMBER, REFUSALS

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
RETRY_AFTER_MAX_S: Final = 5
"""503 asks for a wait of 1 to this many seconds, drawn for each answer, so that a fleet does not
come back at once."""
FIELD_CHARACTERS_MAX: Final = 128
"""The name of an unknown field may be as long as a body; the answer shows its beginning."""
ACCEPTED: Final = Answer(202, [TYPE_JSON, ("x-ack", "enqueue")], b'{"ack":"enqueue"}')

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
LOG_FULL: Final = NUMBER["log_full"]
DRAINING: Final = NUMBER["draining"]
FAILED: Final = NUMBER["failed"]
INTERNAL: Final = NUMBER["internal"]

_CLOSES: Final = frozenset(
    {BAD_REQUEST, LENGTH_REQUIRED, BODY_TOO_LARGE, BODY_TIMEOUT, DRAINING, FAILED, INTERNAL}
)

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
    return Answer(refusal.status, headers, refusal.body(None, message))


_ANSWERS: Final = {code: worded(code) for code in range(1, len(REFUSALS))}
_WAITS: Final = [("retry-after", str(seconds)) for seconds in range(1, RETRY_AFTER_MAX_S + 1)]
_LATER: Final = {
    code: [answer._replace(headers=[*answer.headers, wait]) for wait in _WAITS]
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
    if field is not None and len(field) > FIELD_CHARACTERS_MAX:
        field = field[:FIELD_CHARACTERS_MAX] + "…"
    text = REFUSALS[code]
    message = text.message if offset is None else f"{text.message} (at byte {offset} of the body)"
    return answer._replace(body=text.body(field, message))


def not_allowed(allow: str) -> Answer:
    """405 with the methods that the path has."""
    answer = worded(METHOD_NOT_ALLOWED, f"this path does not have that method; use {allow}")
    return answer._replace(headers=[*answer.headers, ("allow", allow)])


def closing(answer: Answer) -> Answer:
    """The same answer, and the connection ends with it."""
    return answer if CLOSE in answer.headers else answer._replace(headers=[*answer.headers, CLOSE])


def route(path: str, method: str) -> int:
    """What is wrong with a request whose path is no page: a code, or 0 for an event to ingest."""
    if not path.startswith(INGEST) or len(path) == len(INGEST) or "/" in path[len(INGEST) :]:
        return NOT_FOUND
    if method != "POST":
        return METHOD_NOT_ALLOWED
    return 0 if device_id_at(path, len(INGEST)) else BAD_DEVICE_ID


def examine(headers: Headers, query: str, body_bytes_max: int) -> int:
    """What is wrong with the head of a request to ingest: a code, or 0."""
    length = headers.get("content-length")
    if length is None or "transfer-encoding" in headers:
        return LENGTH_REQUIRED
    if len(length) > 19 or int(length) > body_bytes_max:
        return BODY_TOO_LARGE
    media_type = headers.get("content-type")
    if media_type != "application/json" and not is_json(media_type):
        return UNSUPPORTED_MEDIA_TYPE
    if "content-encoding" in headers and not is_identity(headers):
        return UNSUPPORTED_ENCODING
    if query or "x-ack" in headers:
        return examine_ack(headers, query)
    return 0


def is_json(media_type: str | None) -> bool:
    """application/json, without a charset or with UTF-8."""
    if media_type is None:
        return False
    name, *parameters = media_type.split(";")
    if name.strip().lower() != "application/json":
        return False
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "charset" and value.strip().strip('"').lower() not in (
            "utf-8",
            "utf8",
        ):
            return False
    return True


def is_identity(headers: Headers) -> bool:
    """Content-Encoding is there and says that nothing was done to the body."""
    values = headers.get_all("content-encoding")
    return bool(values) and all(value.strip().lower() == "identity" for value in values)


def examine_ack(headers: Headers, query: str) -> int:
    """Which acknowledgement was asked for: the query's `ack` wins over the header X-Ack."""
    asked = []
    for part in query.split("&"):
        key, _, value = part.partition("=")
        if unquote_plus(key) == "ack":
            asked.append(unquote_plus(value))
    if not asked and "x-ack" in headers:
        asked = [value.strip() for value in headers.get_all("x-ack")] or [""]
    code = 0
    for value in asked:
        if value in ("durable", "sink"):
            code = code or ACK_NOT_SUPPORTED
        elif value != "enqueue":
            return UNKNOWN_ACK
    return code
