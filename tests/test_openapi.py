"""The OpenAPI document: it is one, it is complete, and a running gateway answers as it says.

Answers are held against closed copies of the document's schemas: a member, header, status or code
that is not documented is a failure."""

import copy
import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from openapi_spec_validator import OpenAPIV31SpecValidator

from gateway import _log, event_schema, http, openapi, worker
from gateway import openapi_parts as parts
from gateway.config import Config, HttpConfig
from gateway.errors import BY_CODE, REFUSALS
from gateway.process import Launch, Recovered
from tests.gateway_process import EVENT, ROOT, GatewayProcess
from tests.raw_http import Answer, Client, request
from tests.test_event_schema import many
from tests.test_http import GOOD, TABLE

DOCUMENT = openapi.document()
PATHS = DOCUMENT["paths"]
DOCS = "/docs"
"""The page for people, which is no part of a worker's own answers."""
ONE, MANY = "/v1/ingest/d", "/v1/ingest"
NDJSON = "Content-Type: application/x-ndjson"


def resolved(node: Any, schemas: dict[str, Any]) -> Any:
    """Without references."""
    if isinstance(node, dict):
        if "$ref" in node:
            *_, kind, name = node["$ref"].split("/")
            return resolved(schemas[name] if kind == "schemas" else COMPONENTS[kind][name], schemas)
        return {key: resolved(value, schemas) for key, value in node.items()}
    return [resolved(item, schemas) for item in node] if isinstance(node, list) else node


COMPONENTS = DOCUMENT["components"]
OPEN = {"Health"}
"""Its parts are for people."""
CLOSED = {
    name: schema
    if name in OPEN or "additionalProperties" in schema
    else {**schema, "additionalProperties": False}
    for name, schema in copy.deepcopy(COMPONENTS["schemas"]).items()
}


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in PATHS.items():
        for method in ("get", "head", "post"):
            if method in item:
                yield path, method, item[method]


# ---- the document -------------------------------------------------------------------------------


def test_the_document_is_openapi_3_1() -> None:
    assert list(OpenAPIV31SpecValidator(DOCUMENT).iter_errors()) == []
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert DOCUMENT["info"]["license"]["identifier"] == "Apache-2.0"


def test_a_document_that_breaks_the_specification_is_noticed() -> None:
    wrong = copy.deepcopy(DOCUMENT)
    del wrong["paths"]["/readyz"]["get"]["responses"]["200"]["description"]
    assert list(OpenAPIV31SpecValidator(wrong).iter_errors())


def test_operations_have_ids_tags_and_a_summary() -> None:
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(ids)) == len(ids)
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for path, _, operation in operations():
        assert set(operation["tags"]) <= tags, path
        assert operation["summary"], path


def test_every_example_is_what_its_schema_says() -> None:
    count = 0
    for path, method, operation in operations():
        contents = [answer.get("content", {}) for answer in operation["responses"].values()]
        contents.append(operation.get("requestBody", {}).get("content", {}))
        for media in (media for content in contents for media in content.values()):
            judge = jsonschema_rs.Draft202012Validator(resolved(media["schema"], CLOSED))
            for name, example in media.get("examples", {}).items():
                assert judge.is_valid(example["value"]), (path, method, name)
                count += 1
    assert count > 100


def documented() -> set[str]:
    """Codes that have an example of their own, or stand in an item of a batch."""
    found = set(COMPONENTS["schemas"]["ItemError"]["properties"]["code"]["enum"])
    for _, _, operation in operations():
        for answer in operation["responses"].values():
            for media in answer.get("content", {}).values():
                found |= set(media.get("examples", {})) & BY_CODE.keys()
    return found


def test_every_refusal_is_documented_or_listed_as_unused() -> None:
    codes = {refusal.code for refusal in REFUSALS[1:]}
    assert documented() == codes - parts.UNUSED.keys()
    assert parts.UNUSED.keys() <= codes


def test_every_code_stands_beside_its_status_only() -> None:
    for path, method, operation in operations():
        for status, answer in operation["responses"].items():
            for media in answer.get("content", {}).values():
                for name in media.get("examples", {}).keys() & BY_CODE.keys():
                    assert BY_CODE[name].status == int(status), (path, method, name)


def test_unused_codes_are_used_by_nobody() -> None:
    """401, 403 and 429 wait for authentication and rates. A source that names one of them makes
    this fail: then the document needs it."""
    assert sorted(parts.UNUSED) == ["forbidden", "rate_limited", "unauthorized"]
    words = re.compile("|".join(f'"{code}"|GW_CODE_{code.upper()}' for code in parts.UNUSED))
    sources = [*ROOT.glob("gateway/**/*.py"), *ROOT.glob("_native/gw_*.[ch]")]
    users = {path.name for path in sources if words.search(path.read_text())}
    assert users == {"errors.py", "openapi_parts.py", "gw_codes.h"}


@contextmanager
def app(folder: Path) -> Iterator[worker.App]:
    """What a worker answers, without its server."""
    folder.mkdir(exist_ok=True)
    path = folder / "gateway.log"
    _log.create(str(path), 1 << 20)
    with open(path, "r+b") as file:
        log = _log.Log.open(str(path), file.fileno(), ["mqtt"])
        app = worker.App(log, Launch("worker-0", 0, 0, file.fileno(), 0, 0, Config(), Recovered()))
        yield app
        app.close()
        log.close()


def test_every_page_of_a_worker_is_documented(tmp_path: Path) -> None:
    listed = {path for path in PATHS if "{" not in path and path != http.INGEST_MANY}
    with app(tmp_path) as worker_app:
        served = set(worker_app.pages)
    # what the docs page loads is a part of it
    assert {path for path in served if not path.startswith("/docs/") or path in listed} <= listed
    assert listed - served <= {DOCS}


def test_limits_are_those_of_the_settings() -> None:
    config = Config(http=HttpConfig(body_bytes_max=1234, batch_events_max=77, ack="durable"))
    said = openapi.text(config)
    assert "at most 1234 bytes" in said
    assert '"maxItems": 77' in said
    assert "without it durable (http.ack)" in said
    assert json.loads(said)["components"]["schemas"]["Event"] == event_schema.event(config)


def test_the_event_is_the_published_schema() -> None:
    document = event_schema.document()
    alone = {key: value for key, value in document.items() if not key.startswith("$")}
    assert COMPONENTS["schemas"]["Event"] == alone


def test_states_of_receipts_are_those_of_the_log() -> None:
    states = COMPONENTS["schemas"]["Receipt"]["properties"]["state"]["enum"]
    assert {*states, "unknown"} == set(_log.RECEIPT_STATES)


def test_media_types_are_those_that_the_door_takes() -> None:
    for name in (parts.ONE, http.INGEST_MANY):
        content = PATHS[name]["post"]["requestBody"]["content"]
        assert {http.media(media) for media in content} == {http.JSON, http.NDJSON}
        assert len(content) == len(http._MEDIA)
    codings = COMPONENTS["parameters"]["Content-Encoding"]["schema"]["enum"]
    assert set(codings) == {*http._CODINGS, "identity"}


# ---- the command --------------------------------------------------------------------------------


def gateway(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=ROOT,
    ).stdout


@pytest.mark.parametrize("arguments", [["openapi"], ["--dump-openapi"], ["--dump_openapi"]])
def test_the_command_prints_the_document(arguments: list[str]) -> None:
    assert gateway(*arguments) == openapi.text()


def test_yaml_is_the_same_document() -> None:
    assert yaml.safe_load(gateway("openapi", "--yaml")) == DOCUMENT


def test_the_command_takes_settings() -> None:
    assert "at most 999 bytes" in gateway("--dump-openapi", "--set", "http.body_bytes_max=999")


# ---- a running gateway --------------------------------------------------------------------------

SETTINGS: dict[str, object] = {
    "http.body_deadline_ms": 300,
    "http.sink_deadline_ms": 100,
    "http.body_bytes_max": 16384,
    "http.batches_bytes_max": 1 << 20,
}
USUAL = {"date", "server", "content-length", "content-type", "cache-control", "connection"}
NO_BODY = {400, 414, 431}
"""What breaks HTTP itself is answered by the HTTP library, with a status alone."""


def template(target: str) -> str | None:
    """The documented path that a request's target belongs to."""
    path = re.sub("^http://[^/]*", "", target).partition("?")[0]
    if path in PATHS:
        return path
    for prefix, name in ((http.INGEST, parts.ONE), (worker.RECEIPTS, "/v1/receipts/{receipt}")):
        rest = path.removeprefix(prefix)
        if path.startswith(prefix) and rest and "/" not in rest:
            return name
    return None


def check(document: dict[str, Any], method: str, target: str, answer: Answer) -> None:
    """Raises AssertionError where an answer is not as the document says."""
    item = document["paths"].get(template(target))
    if item is None:
        assert answer.status in (404, 405, 400, 414, 431, 505), target
        return
    operation = item.get(method.lower()) or item.get("post") or item["get"]
    said = operation["responses"].get(str(answer.status))
    assert said, f"{method} {target}: {answer.status} is not documented"
    if method.lower() not in item:
        assert answer.status in (405, *NO_BODY)
    headers = dict(answer.headers)
    described = {name.lower(): header for name, header in said.get("headers", {}).items()}
    if answer.body or answer.status not in NO_BODY:
        for name, header in described.items():
            header = resolved(header, CLOSED)
            if name in headers:
                value: Any = headers[name]
                if header["schema"]["type"] == "integer":
                    value = int(value)
                assert jsonschema_rs.Draft202012Validator(header["schema"]).is_valid(value), name
            else:
                assert not header.get("required"), f"{answer.status} without {name}"
        assert headers.keys() <= described.keys() | USUAL
    if not answer.body:
        assert answer.status in NO_BODY or method == "HEAD", answer.status
        return
    media = said["content"].get(headers["content-type"].partition(";")[0])
    assert media, headers["content-type"]
    value = answer.body.decode() if "json" not in headers["content-type"] else answer.json
    schema = resolved(media["schema"], closed(document))
    errors = list(jsonschema_rs.Draft202012Validator(schema).iter_errors(value))
    assert not errors, (answer.status, answer.body, [str(error) for error in errors])


def closed(document: dict[str, Any]) -> dict[str, Any]:
    if document is DOCUMENT:
        return CLOSED
    schemas: dict[str, Any] = document["components"]["schemas"]
    return schemas


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """Its broker is away."""
    with GatewayProcess(tmp_path_factory.mktemp("openapi"), SETTINGS) as gateway:
        yield gateway


def ask(gateway: GatewayProcess, data: bytes) -> Answer | None:
    """Send one request; its answer is held against the document."""
    with Client(gateway.port) as client:
        client.send(data)
        method, _, rest = data.lstrip().partition(b" ")
        answer = client.answer(head_only=method == b"HEAD")
        if answer is not None:
            note(method.decode("latin-1"), rest.partition(b" ")[0].decode("latin-1"), answer)
        return answer


SEEN: set[tuple[str | None, str, str | None]] = set()
"""Path, status and code of the answers that came."""


def note(method: str, target: str, answer: Answer) -> None:
    check(DOCUMENT, method, target, answer)
    is_json = answer.header("content-type") == "application/json" and answer.body
    code = answer.json.get("code") if is_json else None
    SEEN.add((template(target), str(answer.status), code))


LINE = b'{"seq":%d,"metrics":{"a":1}}\n'
LINES = b"".join(LINE % seq for seq in range(3))
BAD = b'{"seq":-1,"metrics":{}}\n'
DEVICES = LINES.replace(b'{"seq"', b'{"device_id":"d","seq"')
CASES: dict[str, tuple[bytes, int, str | None]] = {
    "durable": (request(path="/v1/ingest/d?ack=durable"), 202, None),
    "sink, late": (request(path="/v1/ingest/d?ack=sink"), 504, "accepted_pending"),
    "first": (request(LINE % 50, path="/v1/ingest/d"), 202, None),
    "repeat": (request(LINE % 50, path="/v1/ingest/d"), 202, None),
    "conflict": (request(b'{"seq":50,"metrics":{}}', path="/v1/ingest/d"), 409, "seq_conflict"),
    "batch": (request(LINES, path="/v1/ingest/b", media=NDJSON), 202, None),
    "batch again": (request(LINES, path="/v1/ingest/b?receipts=each", media=NDJSON), 202, None),
    "batch, late": (
        request(LINES, path="/v1/ingest/e?ack=sink", media=NDJSON),
        504,
        "accepted_pending",
    ),
    "a part": (request(LINES + BAD, path="/v1/ingest/f?receipts=each", media=NDJSON), 207, None),
    "none good": (request(BAD, path="/v1/ingest/f", media=NDJSON), 400, "bad_seq"),
    "none but conflicts": (
        request(b'[{"seq":50,"metrics":{}}]', path="/v1/ingest/d"),
        400,
        "seq_conflict",
    ),
    "array that is none": (request(b"[1,", path="/v1/ingest/d"), 400, "malformed_json"),
    "devices": (request(DEVICES, path="/v1/ingest?ack=durable", media=NDJSON), 202, None),
    "a device without a name": (request(path="/v1/ingest"), 400, "bad_device_id"),
    "many, unknown ack": (request(path="/v1/ingest?ack=x"), 400, "unknown_ack"),
    "many, empty": (request(b"", path="/v1/ingest", media=NDJSON), 400, "empty_batch"),
    "many, too large": (
        request(b"", path="/v1/ingest", length=f"Content-Length: {2 << 20}"),
        413,
        "batch_too_large",
    ),
    "many, no length": (request(path="/v1/ingest", length=None), 411, "length_required"),
    "many, PUT": (request(path="/v1/ingest", method="PUT"), 405, "method_not_allowed"),
    "gzip": (
        request(gzip.compress(LINES), "Content-Encoding: gzip", path="/v1/ingest/g", media=NDJSON),
        202,
        None,
    ),
    "zeros in gzip": (
        request(gzip.compress(bytes(1 << 19)), "Content-Encoding: gzip"),
        413,
        "body_too_large",
    ),
    "event in a large body": (
        request(b'{"metrics":{},"payload":"' + b"x" * 20_000 + b'"}'),
        413,
        "body_too_large",
    ),
    "many, a part": (
        request(DEVICES + BAD, path="/v1/ingest", media=NDJSON), 207, None
    ),
    "many, a number": (request(b"1", path="/v1/ingest"), 400, "not_an_object"),
    "many, no array": (request(b"[1,", path="/v1/ingest"), 400, "malformed_json"),
    "many, not gzip": (
        request(EVENT, "Content-Encoding: gzip", path="/v1/ingest"), 400, "bad_encoding"
    ),
    "many, unknown coding": (
        request(EVENT, "Content-Encoding: br", path="/v1/ingest"), 415, "unsupported_encoding"
    ),
    "many, text": (
        request(path="/v1/ingest", media="Content-Type: text/plain"), 415, "unsupported_media_type"
    ),
    "many, late": (
        request(DEVICES, path="/v1/ingest?ack=sink", media=NDJSON), 504, "accepted_pending"
    ),
    "many, cut": (
        request(b"{", path="/v1/ingest", length="Content-Length: 9"), 408, "body_timeout"
    ),
    "batch, too large": (
        request(b"", length=f"Content-Length: {2 << 20}", media=NDJSON), 413, "batch_too_large"
    ),
    **{
        code: (request(body), 400, code)
        for code, body in {
            "missing_metrics": b"{}",
            "too_many_members": many(1025),
            "too_many_metrics": b'{"metrics":{%s}}' % b",".join(b'"a%d":1' % i for i in range(33)),
            "bad_metric_key": b'{"metrics":{"A":1}}',
            "too_many_tags": b'{"metrics":{},"tags":{%s}}'
            % b",".join(b'"a%d":""' % i for i in range(17)),
            "bad_tag_key": b'{"metrics":{},"tags":{"A":""}}',
            "bad_tag_value": b'{"metrics":{},"tags":{"a":1}}',
            "bad_ts": b'{"metrics":{},"ts":"now"}',
            "bad_boot": b'{"metrics":{},"boot":-1}',
        }.items()
    },
    "cut": (request(b"{", length="Content-Length: 9"), 408, "body_timeout"),
    "unknown receipt": (request(b"", path="/v1/receipts/x", method="GET"), 404, "not_found"),
    "POST to a receipt": (request(path="/v1/receipts/x"), 405, "method_not_allowed"),
}  # fmt: skip


def events(away: GatewayProcess, _: Path) -> None:
    """Events, batches, repeats, receipts."""
    for name, (data, status, code) in CASES.items():
        answer = ask(away, data)
        assert answer is not None, name
        assert answer.status == status, (name, answer.body)
        assert answer.json.get("code") == code, name
        receipt = answer.header("x-receipt")
        if receipt:
            for method in ("GET", "HEAD"):
                path = f"/v1/receipts/{receipt}"
                state = ask(away, request(b"", path=path, method=method, length=None, media=None))
                assert state is not None
                assert state.status == 200


def hostile(away: GatewayProcess, _: Path) -> None:
    """What tests/test_http.py sends, and heads that are too long for each path."""
    rows = [*(row[0] for row in TABLE.values()), *GOOD.values()]
    answers = [answer for data in rows if (answer := ask(away, data)) is not None]
    assert len(answers) > 100
    for path in PATHS:
        method = "POST" if "post" in PATHS[path] else "GET"
        path = path.format(device_id="d", receipt="x")
        for data, status in (
            (request(path=path, method=method, host=None), 400),
            (request(path=path + "?a=" + "a" * 100_000, method=method), 414),
            (request(b"", "X-A: " + "a" * 200_000, path=path, method=method), 431),
        ):
            answer = ask(away, data)
            assert answer is not None
            assert answer.status == status, path


def pages(away: GatewayProcess, _: Path) -> None:
    openmetrics = "Accept: application/openmetrics-text; version=1.0.0"
    for path in PATHS:
        if "{" in path or path in (http.INGEST_MANY, DOCS):
            continue
        for method in ("GET", "HEAD"):
            data = request(b"", openmetrics, path=path, method=method, length=None, media=None)
            for answer in (ask(away, data), ask(away, data.replace(b"openmetrics-text", b"x"))):
                assert answer is not None
                assert answer.status == 200, path
        for data in (request(path=path), request(method="HEAD")):
            answer = ask(away, data)
            assert answer is not None
            assert answer.status == 405


def sink(_: GatewayProcess, folder: Path) -> None:
    """A broker that acknowledges."""
    settings = {**SETTINGS, "http.sink_deadline_ms": 5000, "mqtt.url": "embedded"}
    with GatewayProcess(folder, settings) as gateway:
        for data in (
            request(path="/v1/ingest/d?ack=sink"),
            request(LINES, path="/v1/ingest/e?ack=sink", media=NDJSON),
            request(DEVICES, path="/v1/ingest?ack=sink", media=NDJSON),
        ):
            answer = ask(gateway, data)
            assert answer is not None
            assert (answer.status, answer.json["ack"]) == (200, "sink")


def closed_log(_: GatewayProcess, folder: Path) -> None:
    """A log that takes nothing: full, then draining; and too many large bodies."""
    more = {"http.body_deadline_ms": 9000, "http.drain_deadline_ms": 200}
    with GatewayProcess(folder, {**SETTINGS, **more}) as gateway:
        event = b'{"metrics":{},"payload":"%s"}\n' % (b"x" * 3000)
        named = event.replace(b"{", b'{"device_id":"d",', 1)
        seen = []
        for path, line in ((ONE, event), (ONE, event), (MANY, named)):
            answer = ask(gateway, request(line * 340, path=path, media=NDJSON))
            assert answer is not None
            seen.append((answer.status, answer.json["code"], answer.json["resume_at"] > 0))
        assert seen == [(207, "log_full", True), *[(503, "log_full", False)] * 2]
        answer = ask(gateway, request(event))
        assert answer is not None
        assert (answer.status, answer.code) == (503, "log_full")
        ready = ask(gateway, request(b"", path="/readyz", method="GET", length=None))
        assert ready is not None
        assert ready.json["state"] == "full"
        large = "Content-Length: 1000000"
        with Client(gateway.port) as first, Client(gateway.port) as second:
            first.send(request(b"", length=large, path=ONE))
            assert first.is_silent(0.1)
            for path in (ONE, MANY):
                answer = ask(gateway, request(b"", length=large, path=path))
                assert answer is not None
                assert (answer.status, answer.code) == (503, "overloaded")
            second.send(request(b"", length="Content-Length: 9", path=MANY))
            assert second.is_silent(0.1)
            assert gateway.process is not None
            gateway.process.terminate()
            for path, client in ((ONE, first), (MANY, second)):
                answer = client.answer()
                assert answer is not None
                note("POST", path, answer)
                assert (answer.status, answer.code) == (503, "draining")


def failed(_: GatewayProcess, folder: Path) -> None:
    """What no input alone brings about: a log that failed or lies in memory, an exception."""
    with app(folder) as worker_app:
        now_ns = _log.now_ns()

        def said(method: str, path: str, answer: http.Answer) -> None:
            note(method, path, Answer(answer.status, answer.headers, answer.body))

        said("POST", ONE, worker_app.refuse(http.ACK_NOT_SUPPORTED, now_ns))
        said("POST", MANY, worker_app.refuse(http.ACK_NOT_SUPPORTED, now_ns))
        worker_app.log.state = _log.FAILED
        for path in (ONE, MANY):
            said("POST", path, worker_app.refuse(http.DRAINING, now_ns))
        for path in PATHS:
            method = "POST" if "post" in PATHS[path] else "GET"
            path = path.format(device_id="d", receipt="x")
            said(method, path, worker_app.internal(now_ns))
        for path in ("/readyz", "/ready", "/healthz", "/health"):
            answer = worker_app.page(path, "GET", None)
            assert answer is not None
            assert answer.status == 503
            said("GET", path, answer)


SCENARIOS = {run.__name__: run for run in (events, hostile, pages, sink, closed_log, failed)}
RAN: set[str] = set()


def provoke(name: str, away: GatewayProcess, folder: Path) -> None:
    SCENARIOS[name](away, folder)
    RAN.add(name)


@pytest.mark.parametrize("name", SCENARIOS)
def test_answers_are_documented(away: GatewayProcess, tmp_path: Path, name: str) -> None:
    provoke(name, away, tmp_path)


def test_every_documented_answer_was_provoked(away: GatewayProcess, tmp_path: Path) -> None:
    """The other direction: nothing is documented that does not come."""
    for name in SCENARIOS.keys() - RAN:
        provoke(name, away, tmp_path / name)
    documented = set()
    for path, _, operation in operations():
        for status, answer in operation["responses"].items():
            content = answer.get("content", {}).get("application/json", {})
            codes = content.get("examples", {}).keys() & BY_CODE.keys()
            documented |= {(path, status, code) for code in codes or {None}}
    came = SEEN | {(path, status, None) for path, status, _ in SEEN}
    assert {row for row in documented - came if row[0] != DOCS} == set()


def test_a_gateway_serves_its_own_limits(away: GatewayProcess) -> None:
    def served(path: str) -> Any:
        return json.loads(away.request("GET", path)[2])

    limits = HttpConfig(body_bytes_max=16384, body_deadline_ms=300, sink_deadline_ms=100,
                        batches_bytes_max=1 << 20)  # fmt: skip
    config = Config(http=limits)
    assert served("/docs/openapi.json") == openapi.document(config)
    assert served("/docs/event.schema.json") == event_schema.document(config)


@pytest.mark.parametrize(
    "body",
    [
        http.BODY[http.SINK],
        http.set_aside(http.DURABLE, "dead_lettered"),
        http.set_aside(http.ENQUEUE, "finished"),
    ],
)
def test_the_body_of_an_event_is_documented(body: bytes) -> None:
    judge = jsonschema_rs.Draft202012Validator(resolved(CLOSED["Acknowledged"], CLOSED))
    assert judge.is_valid(json.loads(body))


# ---- controls -----------------------------------------------------------------------------------


def wrong_documents() -> Iterator[tuple[str, dict[str, Any]]]:
    def spoilt() -> tuple[dict[str, Any], dict[str, Any]]:
        document = copy.deepcopy(DOCUMENT)
        return document, document["paths"][parts.ONE]["post"]["responses"]

    document, responses = spoilt()
    del responses["400"]
    yield "a status that is missing", document
    document, responses = spoilt()
    codes = responses["400"]["content"]["application/json"]["schema"]["anyOf"][0]["allOf"][1]
    codes["properties"]["code"]["enum"].remove("bad_seq")
    yield "a code that is missing", document
    document, responses = spoilt()
    responses["400"]["headers"]["X-Ack"] = {"schema": {"type": "string"}, "required": True}
    yield "a header that does not come", document
    document, responses = spoilt()
    responses["400"]["content"] = {"text/plain": {"schema": {}}}
    yield "another media type", document


@pytest.mark.parametrize("name", dict(wrong_documents()))
def test_a_wrong_document_is_noticed(away: GatewayProcess, name: str) -> None:
    data = request(b'{"seq":-1,"metrics":{}}')
    assert ask(away, data) is not None
    with Client(away.port) as client:
        client.send(data)
        answer = client.answer()
    assert answer is not None
    with pytest.raises(AssertionError):
        check(dict(wrong_documents())[name], "POST", "/v1/ingest/dev-1", answer)
