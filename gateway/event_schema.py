"""The event as a JSON Schema (draft 2020-12): what docs/http.md and `gateway._validator` say, as
far as a schema can.

A schema speaks of values; the gateway also reads the text they are written in. So what it refuses
beyond this schema is of the text (a key twice, `1.0` for an integer, bytes of UTF-8) or of the
whole document (depth, members in all). `tests/test_event_schema.py` has the list, each with a case,
and holds that there is nothing else.

Patterns are those of ECMA-262, as JSON Schema asks: `$` is the end of the text and nothing before
it. They use no shorthand that differs between engines (`\\d`, look-around). `ts` needs no
`format`, which a validator may ignore: its pattern knows the calendar.
"""

from collections.abc import Mapping
from typing import Any, Final

from gateway.settings import Config

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
ID: Final = "urn:telemetry-gateway:event"
"""A name and no address: the document is where a gateway serves it, /docs/event.schema.json."""
INTEGER_MAX: Final = 2**63 - 1
METRICS_MAX: Final = 32
TAGS_MAX: Final = 16
TAG_VALUE_BYTES_MAX: Final = 128
PAYLOAD_DEPTH_MAX: Final = 32
MEMBERS_MAX: Final = 1024
KEY: Final = "^[a-z][a-z0-9_]{0,31}$"
DEVICE_ID: Final = "^[A-Za-z0-9_-]{1,64}$"

_DAY: Final = (
    "(?:"
    "[0-9]{4}-(?:"
    "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29"
    ")"
)
"""A day that exists; the last line: 29 February, of a leap year."""
_TIME: Final = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?"
_OFFSET: Final = "(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
TS: Final = f"^{_DAY}[Tt]{_TIME}{_OFFSET}$"
"""RFC 3339, 5.6, without the leap second."""

EXAMPLE: Final[Mapping[str, Any]] = {
    "ts": "2025-09-23T11:18:41Z",
    "seq": 10,
    "metrics": {"temp_c": 21.5, "rpm": 1200},
    "tags": {"site": "AAL"},
    "payload": {"raw": "ok"},
}


def event(config: Config, named: bool = False) -> dict[str, Any]:
    """The schema of one event, without `$schema` and `$id`. `named`: as it comes to /v1/ingest,
    with its `device_id`."""
    body_bytes_max = config.http.body_bytes_max
    count = {"type": "integer", "minimum": 0, "maximum": INTEGER_MAX}
    key = {"pattern": KEY}
    device_id = {
        "type": "string",
        "pattern": DEVICE_ID,
        "description": "The device it is from. Written without escapes.",
    }
    example = {"device_id": "boiler-7", **EXAMPLE} if named else dict(EXAMPLE)
    return {
        "title": "Event of a named device" if named else "Event",
        "description": (
            f"One event: at most {body_bytes_max} bytes (http.body_bytes_max) of strict JSON in"
            " UTF-8 (RFC 8259, RFC 7493): no byte order mark, no key twice in an object, no lone"
            " surrogate or noncharacter, numbers within the range of a double, at most"
            f" {MEMBERS_MAX} object members in all. It is stored and published byte for byte."
        ),
        "type": "object",
        "required": ["device_id", "metrics"] if named else ["metrics"],
        "additionalProperties": False,
        "properties": {
            **({"device_id": device_id} if named else {}),
            "metrics": {
                "description": "What was measured; may be empty.",
                "type": "object",
                "maxProperties": METRICS_MAX,
                "propertyNames": key,
                "additionalProperties": {"type": "number"},
            },
            "tags": {
                "type": "object",
                "maxProperties": TAGS_MAX,
                "propertyNames": key,
                "additionalProperties": {
                    "description": f"At most {TAG_VALUE_BYTES_MAX} bytes of UTF-8, which a schema"
                    " can only bound by characters.",
                    "type": "string",
                    "maxLength": TAG_VALUE_BYTES_MAX,
                },
            },
            "ts": {
                "description": "When it happened: RFC 3339 with offset, no leap second. Without it"
                " the published event gets the time of receipt.",
                "type": "string",
                "format": "date-time",
                "pattern": TS,
            },
            "seq": {
                **count,
                "description": "This device's number of the event: a repeat is recognised by it."
                " Written as digits only: 1.0 and 1e0 are refused.",
            },
            "boot": {
                **count,
                "description": "Counts a device's restarts, for devices whose seq starts again;"
                " missing: 0. Written as seq is.",
            },
            "payload": {
                "description": f"Any JSON value, nested at most {PAYLOAD_DEPTH_MAX} deep.",
            },
        },
        "examples": [example],
    }


def document(config: Config | None = None) -> dict[str, Any]:
    """The schema of one event as a document of its own: /docs/event.schema.json."""
    return {"$schema": DIALECT, "$id": ID, **event(config or Config())}
