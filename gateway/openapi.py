"""The HTTP interface as an OpenAPI 3.1 document, made from what the doors answer with.

    gateway.errors.REFUSALS   every code, its status, its message ──┐
    gateway.http              headers, codings, waits               ├─▶ document(config)
    gateway.event_schema      the event                             │     ─▶ JSON, YAML, a page
    gateway.settings          limits: of a gateway, or the defaults ┘

Which code can come from which path is said once, in `gateway.openapi_parts`. Statuses, examples and
enums follow from it; `tests/test_openapi.py` holds them against a running gateway.
docs/openapi.json is the document with the defaults, written by `python -m gateway.reference`.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from gateway import __version__, event_schema, http
from gateway import openapi_parts as parts
from gateway import yaml as yaml_text
from gateway.errors import NUMBER, REFUSALS
from gateway.http import Answer
from gateway.settings import SETTINGS, Config

_Json = dict[str, Any]

JSON: Final = "application/json"
NDJSON: Final = ("application/x-ndjson", "application/ndjson", "application/jsonl")
METRICS: Final = ("text/plain", "application/openmetrics-text")
"""Their parameters (version, charset, escaping) follow Accept."""

_SUMMARY: Final = {
    "/readyz": "Does this gateway take events?",
    "/healthz": "State of each part, and in words what is not well",
    "/metrics": "Prometheus metrics",
    "/docs": "This document as a page, with which requests can be sent",
    "/docs/openapi.json": "This document, with the limits of the gateway that serves it",
    "/docs/event.schema.json": "JSON Schema (2020-12) of an event",
}
_ALIASES: Final = {"/ready": "/readyz", "/health": "/healthz"}


def document(config: Config | None = None) -> _Json:
    """The OpenAPI 3.1 document of a gateway with these settings; None: the defaults."""
    config = config or Config()
    paths: _Json = {
        parts.ONE: {
            "post": _ingest(config, parts.ONE, "ingest", "An event, or a batch of one device"),
        },
        http.INGEST_MANY: {
            "post": _ingest(
                config, http.INGEST_MANY, "ingestMany", "A batch of events that name their devices"
            )
        },
        "/v1/receipts/{receipt}": {
            **_page(
                "receipt",
                "receipts",
                "What became of an accepted event",
                _receipt_answers(),
                parameters=[parts.ref("parameters", "receipt")],
            ),
        },
    }
    for path, tag, answers in _page_answers():
        name = path.removeprefix("/").replace("/", "_").replace(".", "_")
        summary = _SUMMARY.get(path) or f"The same as {_ALIASES[path]}"
        paths[path] = _page(name, tag, summary, answers)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Telemetry gateway",
            "version": __version__,
            "summary": "HTTP to a crash-safe log to MQTT",
            "description": _about(config),
            "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The gateway that serves this document"}],
        "security": [],
        "tags": [
            {"name": "ingest", "description": "Events, one or many in a request"},
            {"name": "receipts", "description": "What became of an event"},
            {"name": "operation", "description": "For load balancers, orchestrators, Prometheus"},
            {"name": "documents", "description": "This interface, for people and programs"},
        ],
        "paths": paths,
        "components": {
            "schemas": parts.schemas(config),
            "parameters": parts.parameters(config),
            "headers": parts.headers(),
        },
    }


def text(config: Config | None = None) -> str:
    """The document as JSON."""
    return json.dumps(document(config), indent=2, ensure_ascii=False) + "\n"


def yaml(config: Config | None = None) -> str:
    """The document as YAML 1.2: mappings and lists in blocks, texts in double quotes as in JSON."""
    return yaml_text.encode(document(config))


def pages(config: Config) -> dict[str, Callable[[str | None], Answer]]:
    """The two documents as pages of a worker, each made when it is first asked for."""

    def static(media: str, make: Callable[[], str]) -> Callable[[str | None], Answer]:
        made: list[Answer] = []

        def page(_: str | None) -> Answer:
            if not made:
                headers = [("content-type", media), ("cache-control", "no-store")]
                made.append(Answer(200, headers, make().encode()))
            return made[0]

        return page

    def schema() -> str:
        return json.dumps(event_schema.document(config), indent=2, ensure_ascii=False) + "\n"

    return {
        "/docs/openapi.json": static(JSON, lambda: text(config)),
        "/docs/event.schema.json": static("application/schema+json", schema),
    }


# ---- what it says ------------------------------------------------------------------------------


def _about(config: Config) -> str:
    names = (
        *("body_bytes_max", "batch_bytes_max", "batch_events_max", "batches_bytes_max"),
        *("inflate_ratio_max", "body_deadline_ms", "durable_deadline_ms", "sink_deadline_ms"),
    )
    limits = "\n".join(
        f"- `http.{name}` = {getattr(config.http, name)}: {SETTINGS[f'http.{name}'].doc}"
        for name in names
    )
    return (
        "Devices send events; the gateway writes each to a crash-safe log, answers, and delivers it"
        " at least once.\n\n"
        "HTTP/1.1. `Content-Length` is required, `Transfer-Encoding` is refused. A request is"
        " checked in this order: path and method, framing and size, media type and encoding,"
        " acknowledgement, JSON and event rules, repeats, log.\n\n"
        "2xx: it is in the log, as `X-Ack` says. 4xx and 503: it is not. 500, 504 and a closed"
        " connection: unknown, send it again with the same `seq`.\n\n"
        "Any other path is 404 `not_found`, any other method 405 `method_not_allowed`. What breaks"
        " HTTP itself is answered without a body (400, 414, 431) or not at all. An answer with"
        " `Connection: close` ends its connection; any answer may have it while the gateway"
        " replaces its processes. A query that is not listed is ignored.\n\n"
        f"## Limits of this gateway\n\n{limits}\n"
    )


# ---- answers -----------------------------------------------------------------------------------


def _header_refs(*names: str, optional: Iterable[str] = ()) -> _Json:
    refs: _Json = {name: parts.ref("headers", name) for name in names}
    for name in optional:  # one that is required elsewhere
        refs[name] = {**parts.headers()[name], "required": False}
    return refs


def _refusal(path: str, status: int, *more: _Json, **also: _Json) -> _Json:
    """The answer to what was refused with `status` on `path`, with every code as an example. `more`
    are other schemas that its body may have, `also` their examples."""
    codes = [r for r in REFUSALS[1:] if r.status == status and r.code in parts.PATHS[path]]
    headers = ["Connection"] if any(http.must_close(NUMBER[r.code]) for r in codes) else []
    headers += {405: ["Allow"], 415: ["Accept-Encoding"], 503: ["Retry-After"]}.get(status, [])
    one = {
        "allOf": [
            parts.ref("schemas", "Error"),
            {"properties": {"code": {"enum": [refusal.code for refusal in codes]}}},
        ]
    }
    examples: _Json = {
        refusal.code: {"summary": refusal.message, "value": json.loads(refusal.body())}
        for refusal in codes
    }
    if status == 408:
        cut = json.loads(http.INCOMPLETE.body)
        examples["body_timeout_cut"] = {"summary": cut["message"], "value": cut}
    return {
        "description": _DESCRIPTION[status],
        **({"headers": _header_refs(*headers)} if headers else {}),
        "content": {
            JSON: {
                "schema": {"anyOf": [one, *more]} if more else one,
                "examples": {**examples, **also},
            }
        },
    }


_DESCRIPTION: Final = {
    400: "Refused as it is. Without a body when it is not HTTP/1.1. A batch of which no event was"
    " good says why of each.",
    404: "No such path: a slash in the device id, or behind it.",
    405: "Any other method than those of this path.",
    408: "The body did not arrive whole in time.",
    409: "This device sent another body with the same boot and seq before.",
    411: "No Content-Length, or a Transfer-Encoding.",
    413: "Too large. Answered before the body is read where the head shows it.",
    415: "The media type or the coding is not one that is taken.",
    500: "Unexpected. It is unknown whether anything is in the log: send it again.",
    503: "Not in the log: send it again after Retry-After. A batch of which nothing is in says"
    " resume_at 0.",
    504: "In the log, and not confirmed in time; or (of a repeat) still being written by another"
    " request.",
}


_TOO_LONG: Final = {
    "414": {"description": "The path is too long; the connection ends. No body."},
    "431": {"description": "The head is too large; the connection ends. No body."},
}


def _batch_schema(*codes: str) -> _Json:
    schema = parts.ref("schemas", "BatchResult")
    if not codes:
        return schema
    return {"allOf": [schema, {"properties": {"code": {"enum": list(codes)}}}]}


def _batch(ack: str | None, accepted: int, refused: int, **more: Any) -> _Json:
    errors = [
        {"index": i, "code": "bad_ts", "field": "ts", "message": REFUSALS[NUMBER["bad_ts"]].message}
        for i in range(refused)
    ]
    said = {"ack": ack, "accepted": accepted, "duplicates": 0, "refused": refused}
    return {"value": {**said, "errors": errors, **more}}


def _ingest(config: Config, path: str, name: str, summary: str) -> _Json:
    many = path == http.INGEST_MANY
    item = [code for code in parts.ITEM if many or code != "bad_device_id"]
    single = [] if many else [parts.ref("schemas", "Acknowledged")]
    good = ("X-Ack", "X-Receipt", "X-Duplicate", "X-Log-Used")

    def accepted(ack: str, **also: _Json) -> _Json:
        examples: _Json = {} if many else {ack: {"value": {"ack": ack}}}
        examples["batch"] = _batch(ack, 3, 0, receipt=parts.RECEIPT)
        schemas = [*single, _batch_schema()]
        return {
            "headers": _header_refs(*good),
            "content": {
                JSON: {
                    "schema": {"anyOf": schemas} if single else schemas[0],
                    "examples": {**examples, **also},
                }
            },
        }

    durable: _Json = {} if many else {"durable": {"value": {"ack": "durable"}}}
    aside: _Json = (
        {}
        if many
        else {
            "dead_lettered": {
                "summary": "sink was asked for, and the broker refused it for good",
                "value": {"ack": "durable", "state": "dead_lettered"},
            }
        }
    )
    stopped = {"code": "log_full", "message": REFUSALS[NUMBER["log_full"]].message}
    late = {
        "code": "accepted_pending",
        "message": REFUSALS[NUMBER["accepted_pending"]].message,
        "receipt": parts.RECEIPT,
    }
    why = {"code": "bad_ts", "message": "no event of the batch was accepted; errors says why"}
    pending = _refusal(
        path, 504, _batch_schema("accepted_pending"), batch=_batch("enqueue", 3, 0, **late)
    )
    pending["headers"] = _header_refs(
        "X-Duplicate", "X-Log-Used", optional=("X-Receipt", "Retry-After")
    )
    responses: _Json = {
        "200": {"description": "Delivered: `sink` was asked for and reached.", **accepted("sink")},
        "202": {
            "description": "In the log: `enqueue`, `durable`; or `sink` of what was set aside.",
            **accepted("enqueue", **durable, **aside),
        },
        "207": {
            "description": "A batch of which a part is in: `errors` names the events that will"
            " never be taken; from `resume_at` on nothing was looked at.",
            "headers": _header_refs(
                "X-Duplicate",
                "X-Log-Used",
                "Connection",
                optional=("X-Ack", "X-Receipt", "Retry-After"),
            ),
            "content": {
                JSON: {
                    "schema": _batch_schema(*parts.STOPPED),
                    "examples": {
                        "refused": _batch("enqueue", 2, 1, receipt=parts.RECEIPT),
                        "stopped": _batch(
                            "enqueue", 2, 0, receipt=parts.RECEIPT, resume_at=2, **stopped
                        ),
                    },
                }
            },
        },
        "400": _refusal(path, 400, _batch_schema(*item), batch=_batch(None, 0, 1, **why)),
        **({} if many else {"404": _refusal(path, 404)}),
        "405": _refusal(path, 405),
        "408": _refusal(path, 408),
        **({} if many else {"409": _refusal(path, 409)}),
        **{str(status): _refusal(path, status) for status in (411, 413, 415)},
        **_TOO_LONG,
        "500": _refusal(path, 500),
        "503": _refusal(
            path,
            503,
            _batch_schema("log_full", "draining", "failed"),
            batch=_batch(None, 0, 0, resume_at=0, **stopped),
        ),
        "504": pending,
    }
    return {
        "operationId": name,
        "tags": ["ingest"],
        "summary": summary,
        "parameters": [
            parts.ref("parameters", name)
            # a reference beside the methods of a path, where it would stand once, is not followed
            # by Swagger UI 5
            for name in (
                *(() if many else ("device_id",)),
                *("ack", "X-Ack", "receipts", "Content-Encoding"),
            )
        ],
        "requestBody": _body(config, many),
        "responses": dict(sorted(responses.items())),
    }


def _body(config: Config, many: bool) -> _Json:
    limits = config.http
    event = parts.ref("schemas", "DeviceEvent" if many else "Event")
    of = {"device_id": "boiler-7"} if many else {}
    events = [
        {**of, "seq": 10, "metrics": {"temp_c": 21.5}},
        {**of, "seq": 11, "metrics": {"temp_c": 21.6}},
    ]
    lines = "".join(json.dumps(event, separators=(",", ":")) + "\n" for event in events)
    ndjson = {
        "schema": {"type": "string", "description": "An event a line; blank lines do not count."},
        "examples": {"batch": {"value": lines}},
    }
    return {
        "required": True,
        "description": (
            f"One event of at most {limits.body_bytes_max} bytes (http.body_bytes_max), or a batch"
            f" of at most {limits.batch_events_max} events (http.batch_events_max) and"
            f" {limits.batch_bytes_max} bytes (http.batch_bytes_max). A batch need not be right as"
            " a whole: a wrong event of it is refused alone."
        ),
        "content": {
            JSON: {
                "schema": {
                    "anyOf": [
                        event,
                        {
                            "type": "array",
                            "items": event,
                            "minItems": 1,
                            "maxItems": limits.batch_events_max,
                        },
                    ]
                },
                "examples": {
                    "event": {"value": {**of, **event_schema.EXAMPLE}},
                    "batch": {"value": events},
                },
            },
            **dict.fromkeys(NDJSON, ndjson),
        },
    }


def _page(name: str, tag: str, summary: str, answers: _Json, **also: Any) -> _Json:
    """GET and HEAD, `also` of both. HEAD has the same statuses and headers, and never a body."""
    answers = dict(sorted(answers.items()))
    bare = {
        status: {key: value for key, value in answer.items() if key != "content"}
        for status, answer in answers.items()
    }
    said = {"tags": [tag], "summary": summary, **also}
    return {
        "get": {"operationId": name, **said, "responses": answers},
        "head": {"operationId": f"{name}Head", **said, "responses": bare},
    }


def _page_answer(description: str, *media: str, **content: Any) -> _Json:
    return {"description": description, "content": dict.fromkeys(media or (JSON,), content)}


def _common(path: str) -> _Json:
    return {
        "400": {**_refusal(path, 400), "description": "Not exactly one Host."},
        "405": _refusal(path, 405),
        **_TOO_LONG,
        "500": _refusal(path, 500),
    }


def _receipt_answers() -> _Json:
    states = {
        state: {"value": {"receipt": parts.RECEIPT, "state": state}} for state in parts.states()
    }
    unknown = json.loads(REFUSALS[NUMBER["not_found"]].body())
    unknown = {"receipt": "text", "state": "unknown", **unknown}
    return {
        "200": _page_answer("Its state.", schema=parts.ref("schemas", "Receipt"), examples=states),
        "404": _page_answer(
            "Not a receipt, of another gateway or log, or of a time nobody can speak for.",
            schema=parts.ref("schemas", "UnknownReceipt"),
            examples={"not_found": {"value": unknown}},
        ),
        **_common("/v1/receipts/{receipt}"),
    }


def _page_answers() -> Iterator[tuple[str, str, _Json]]:
    """Path, tag and answers of each page."""
    object_ = {"type": "object"}
    shown: dict[str, tuple[str, _Json]] = {
        "/readyz": (
            "operation",
            {
                "200": _page_answer(
                    "It takes events, or its log is full (`full`): devices come back to it.",
                    schema=parts.ref("schemas", "Ready"),
                ),
                "503": _page_answer(
                    "It is ending, or failed.", schema=parts.ref("schemas", "Ready")
                ),
            },
        ),
        "/healthz": (
            "operation",
            {
                "200": _page_answer(
                    "`ok`, or `degraded`: that is no reason to restart it.",
                    schema=parts.ref("schemas", "Health"),
                ),
                "503": _page_answer("`failed`.", schema=parts.ref("schemas", "Health")),
            },
        ),
        "/metrics": (
            "operation",
            {
                "200": _page_answer(
                    "Text, or OpenMetrics where Accept asks for it.",
                    *METRICS,
                    schema={"type": "string"},
                )
            },
        ),
        "/docs": (
            "documents",
            {"200": _page_answer("A page.", "text/html", schema={"type": "string"})},
        ),
        "/docs/openapi.json": (
            "documents",
            {"200": _page_answer("OpenAPI 3.1.", schema=object_)},
        ),
        "/docs/event.schema.json": (
            "documents",
            {"200": _page_answer("A schema.", "application/schema+json", schema=object_)},
        ),
    }
    for path in parts.PATHS:
        if path not in (parts.ONE, http.INGEST_MANY, "/v1/receipts/{receipt}"):
            tag, answers = shown[_ALIASES.get(path, path)]
            yield path, tag, {**answers, **_common(path)}
