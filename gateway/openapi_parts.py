"""What the OpenAPI document of `gateway.openapi` is put together from: which code comes from which
path, and the schemas, parameters and headers that its paths refer to.

Schemas of answers are open, so that a later version may say more; a client ignores members that it
does not know."""

from typing import Any, Final

from gateway import _log, event_schema, http, metrics
from gateway.errors import NUMBER, REFUSALS
from gateway.inflate import CODINGS, WINDOW_BYTES_MAX
from gateway.settings import Config

_Json = dict[str, Any]

UNUSED: Final = {
    "unauthorized": "there is no authentication in this version",
    "forbidden": "there is no authentication in this version",
    "rate_limited": "a device has no rate of its own in this version",
}
"""Codes that have a place in the contract and that no path answers with yet, and why."""

EVENT: Final = tuple(r.code for r in REFUSALS[1 : NUMBER["duplicate_key"] + 1])
"""What the validator says of one event."""
_INGEST: Final = (
    *("bad_request", "method_not_allowed", "length_required", "batch_too_large", "body_timeout"),
    *("unsupported_media_type", "unsupported_encoding", "ack_not_supported", "unknown_ack"),
    *("malformed_json", "empty_batch", "bad_encoding", "internal", "accepted_pending"),
    *("log_full", "draining", "failed", "overloaded"),
)
_PAGE: Final = ("bad_request", "method_not_allowed", "internal")
ONE: Final = "/v1/ingest/{device_id}"
PATHS: Final[dict[str, frozenset[str]]] = {
    ONE: frozenset(
        {*_INGEST, *EVENT, "bad_device_id", "not_found", "body_too_large", "seq_conflict"}
    ),
    http.INGEST_MANY: frozenset({*_INGEST, "not_an_object"}),
    "/v1/receipts/{receipt}": frozenset({*_PAGE, "not_found"}),
    **dict.fromkeys(
        (
            *("/readyz", "/ready", "/healthz", "/health", "/metrics"),
            *("/docs", "/docs/openapi.json", "/docs/event.schema.json"),
        ),
        frozenset(_PAGE),
    ),
}
"""The codes of a whole answer by path: of a body {"code", "message", "field"}."""
ITEM: Final = (*EVENT, "bad_device_id", "seq_conflict", "body_too_large")
"""Codes of one event of a batch: in `errors`, and `code` when no event of it was good."""
STOPPED: Final = ("log_full", "draining", "failed", "accepted_pending")
"""Why a batch ended at `resume_at`."""

RETRY_AFTER_MAX_S: Final = http.RETRY_FULL_MAX_S * 3 // 2
RECEIPT: Final = "5922ff672cb81bf3-2-1a00-f161cc0d959e83b0"


def ref(kind: str, name: str) -> _Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def schemas(config: Config) -> _Json:
    count = {"type": "integer", "minimum": 0}
    text_ = {"type": "string"}
    used = [refusal.code for refusal in REFUSALS[1:] if refusal.code not in UNUSED]
    field = {
        "type": ["string", "null"],
        "maxLength": http.FIELD_CHARACTERS_MAX + 1,
        "description": "What in the event is wrong, as metrics.temp_c.",
    }
    ack = {"type": "string", "enum": list(http.ACKS)}
    aside = {"type": "string", "enum": ["dead_lettered", "finished"]}
    return {
        "Event": event_schema.event(config),
        "DeviceEvent": event_schema.event(config, named=True),
        "Error": {
            "description": "Why it was refused. Codes are stable, messages are for people.",
            "type": "object",
            "required": ["code", "message", "field"],
            "properties": {"code": {"type": "string", "enum": used}, "message": text_}
            | {"field": field},
        },
        "Acknowledged": {
            "description": "One event is in the log.",
            "type": "object",
            "required": ["ack"],
            "properties": {
                "ack": {**ack, "description": "What was reached, as in X-Ack."},
                "state": {
                    **aside,
                    "description": "`sink` was asked for, and it was not delivered: the broker"
                    " refused it for good (`dead_lettered`), or nobody can say any more.",
                },
            },
        },
        "BatchResult": {
            "description": "What came of a batch: accepted + duplicates + refused events were"
            " looked at, in order, and nothing behind them.",
            "type": "object",
            "required": ["ack", "accepted", "duplicates", "refused", "errors"],
            "properties": {
                "ack": {
                    "type": ["string", "null"],
                    "enum": [*http.ACKS, None],
                    "description": "What was reached for all that are in; null: none is.",
                },
                "accepted": {**count, "description": "New in the log."},
                "duplicates": {**count, "description": "In the log already."},
                "refused": {**count, "description": "As many as `errors` has."},
                "errors": {"type": "array", "items": ref("schemas", "ItemError")},
                "receipt": {**text_, "description": "As X-Receipt: it stands for all of them."},
                "receipts": {
                    "type": "array",
                    "items": {"type": ["string", "null"]},
                    "description": "With receipts=each: one for each event that was looked at,"
                    " null for a refused one.",
                },
                "dead_lettered": {**count, "description": "So many the broker refused for good."},
                "finished": {**count, "description": "Of so many nobody can say any more."},
                "code": {
                    "type": "string",
                    "enum": [code for code in used if code in {*ITEM, *STOPPED}],
                    "description": "Why it is not a plain success.",
                },
                "message": text_,
                "resume_at": {
                    **count,
                    "description": "The first event that was not looked at: send from there on"
                    " again after Retry-After.",
                },
            },
        },
        "ItemError": {
            "type": "object",
            "required": ["index", "code", "field", "message"],
            "properties": {
                "index": {**count, "description": "Place in the body, from 0."},
                "code": {"type": "string", "enum": list(ITEM)},
                "field": field,
                "message": text_,
            },
        },
        "Receipt": {
            "type": "object",
            "required": ["receipt", "state"],
            "properties": {"receipt": text_, "state": {"enum": states()}},
        },
        "UnknownReceipt": {
            "type": "object",
            "required": ["receipt", "state", "code", "message", "field"],
            "properties": {
                "receipt": text_,
                "state": {"const": "unknown"},
                "code": {"const": "not_found"},
                "message": text_,
                "field": {"type": "null"},
            },
        },
        "Ready": {
            "type": "object",
            "required": ["ready", "state"],
            "properties": {
                "ready": {"type": "boolean"},
                "state": {"enum": ["full", *metrics.STATES.values()]},
            },
        },
        "Health": {
            "type": "object",
            "required": ["status", "problems", "log", "events", "restarts", "worker"],
            "properties": {
                "status": {"enum": ["ok", "degraded", "failed"]},
                "problems": {"type": "array", "items": text_},
                **{
                    part: {"type": "object"}
                    for part in ("log", "mqtt", "sinks", "events", "restarts", "worker")
                },
            },
        },
    }


def states() -> list[str]:
    return [state for state in _log.RECEIPT_STATES if state != "unknown"]


def parameters(config: Config) -> _Json:
    default = config.http.ack
    what = (
        f"Which acknowledgement is asked for; without it {default} (http.ack). `enqueue`: committed"
        " in the log. `durable`: on the disk. `sink`: delivered."
    )
    ack = {"type": "string", "enum": list(http.ACKS)}
    return {
        "device_id": {
            "name": "device_id",
            "in": "path",
            "required": True,
            "schema": {"type": "string", "pattern": event_schema.DEVICE_ID},
            "example": "boiler-7",
        },
        "receipt": {
            "name": "receipt",
            "in": "path",
            "required": True,
            "description": "As X-Receipt gave it; opaque.",
            "schema": {"type": "string"},
            "example": RECEIPT,
        },
        "ack": {"name": "ack", "in": "query", "description": what, "schema": ack},
        "receipts": {
            "name": "receipts",
            "in": "query",
            "description": "`each`: the answer to a batch has a receipt for each event. Any other"
            " text is as if it were not there.",
            "schema": {"type": "string"},
        },
        "X-Ack": {
            "name": "X-Ack",
            "in": "header",
            "description": "The same as the query `ack`, which wins.",
            "schema": ack,
        },
        "Content-Encoding": {
            "name": "Content-Encoding",
            "in": "header",
            "description": "One coding of the body: one gzip member, or one zstd frame with a"
            f" window of at most {WINDOW_BYTES_MAX >> 20} MiB (RFC 9659) and no dictionary."
            " Content-Length is that of the compressed body. What comes out has the limits of a"
            f" plain body and, above 64 KiB, of {config.http.inflate_ratio_max} times its size"
            " (http.inflate_ratio_max).",
            "schema": {"type": "string", "enum": [*CODINGS, "x-gzip", "identity"]},
        },
    }


def headers() -> _Json:
    def header(description: str, **schema: Any) -> _Json:
        return {"description": description, "schema": schema}

    return {
        "X-Ack": {
            **header("What was reached.", type="string", enum=list(http.ACKS)),
            "required": True,
        },
        "X-Receipt": {
            **header("Ask /v1/receipts/ with it; of a batch: for all of it.", type="string"),
            "required": True,
        },
        "X-Duplicate": header(
            "A repeat (of a batch: all are): nothing was added.", type="string", enum=["true"]
        ),
        "X-Log-Used": header(
            "Percent of the log in use, when it is more than half full: slow down, if you can.",
            type="integer",
            minimum=http.LOG_USED_ABOVE + 1,
            maximum=100,
        ),
        "Retry-After": {
            **header(
                "Seconds, jittered: send again after them.",
                type="integer",
                minimum=1,
                maximum=RETRY_AFTER_MAX_S,
            ),
            "required": True,
        },
        "Allow": {**header("The methods of the path.", type="string"), "required": True},
        "Accept-Encoding": header("Beside `unsupported_encoding`: what is taken.", type="string"),
        "Connection": header(
            "The connection ends with this answer.", type="string", enum=["close"]
        ),
    }
