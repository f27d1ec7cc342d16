"""The OpenAPI document against the running gateway: requests drawn from what it promises, and every
answer held against what it says of answers. Seed and number of requests are fixed."""

import copy
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
import schemathesis
from backports import zstd
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, checks
from schemathesis.core.failures import FailureGroup
from schemathesis.schemas import BaseSchema

from gateway import openapi
from gateway.http import INGEST
from tests.gateway_process import GatewayProcess

DOORS = ["granian", "robyn"]
SEED = 20_251_124
EXAMPLES = 150
"""Of each kind for a path that takes events; a page is the same each time."""
EXAMPLES_PAGE = 3
JSON_TYPE = "application/json"
NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl")
ONE = f"{INGEST}{{device_id}}"
RECEIPT = "/v1/receipts/{receipt}"
PATHS = openapi.document()["paths"]
OPERATIONS = [(path, method) for path, item in PATHS.items() for method in item]
POSTS = [operation for operation in OPERATIONS if operation[1] == "post"]

BEYOND_THE_SCHEMA = {
    "bad_seq": "1.0 is an integer for JSON Schema, and not for the gateway",
    "bad_boot": "1.0 is an integer for JSON Schema, and not for the gateway",
    "bad_tag_value": "a length in bytes of UTF-8; JSON Schema counts characters",
    "bad_ts": "a format, which JSON Schema only notes",
    "payload_too_deep": "JSON Schema cannot bound depth",
    "too_many_members": "JSON Schema cannot count members in all",
    "seq_conflict": "another request has sent that seq; 400 when it is all that a batch has",
    "ack_not_supported": "durable, where the log lies in memory",
}
"""Codes with which a body is refused that the document's schema lets pass, and why that is no
lie."""


def ndjson() -> st.SearchStrategy[bytes]:
    """Lines of events, which the document cannot describe: with a device of their own or without,
    so that some are refused on either path."""
    numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)
    event = st.fixed_dictionaries(
        {"metrics": st.dictionaries(st.sampled_from(["temp_c", "a", "z" * 32]), numbers)},
        optional={"device_id": st.sampled_from(["a", "B-2_"]), "seq": st.integers(0, 2**63 - 1)},
    )
    lines = st.lists(event.map(json.dumps), min_size=1, max_size=3)
    return lines.map(lambda lines: "\n".join(lines).encode())


schemathesis.openapi.media_type(NDJSON[0], ndjson(), aliases=list(NDJSON[1:]))


@pytest.fixture(scope="module", params=DOORS)
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    settings: dict[str, object] = {"mqtt.url": "embedded", "log.capacity_bytes": 64 << 20}
    settings["http.server"] = request.param
    with GatewayProcess(tmp_path_factory.mktemp("conformance"), settings) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def document(gateway: GatewayProcess) -> dict[str, Any]:
    """As it is served."""
    found: dict[str, Any] = json.loads(gateway.request("GET", "/docs/openapi.json")[2])
    return found


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False  # no proxy of the environment
        yield session


def compressed(body: bytes, coding: str) -> bytes:
    """`body` as the header Content-Encoding says it is; a coding that is none changes nothing."""
    if coding in ("gzip", "x-gzip"):
        return gzip.compress(body)
    return zstd.compress(body) if coding == "zstd" else body


@schemathesis.serializer(*NDJSON)
def as_it_is(_: schemathesis.SerializationContext, value: Any) -> bytes:
    """Of a body that was drawn as bytes, or is text of an example."""
    return value if isinstance(value, bytes) else str(value).encode()


def send(case: Case, gateway: GatewayProcess, session: requests.Session) -> requests.Response:
    """Send it. Schemathesis draws the header Content-Encoding without doing what it says; that is
    done here."""
    arguments = case.as_transport_kwargs(base_url=f"http://127.0.0.1:{gateway.port}")
    prepared = session.prepare_request(requests.Request(**arguments))
    if isinstance(prepared.body, str):
        prepared.body = prepared.body.encode()
    if isinstance(prepared.body, bytes):
        prepared.body = compressed(prepared.body, prepared.headers.get("Content-Encoding", ""))
        prepared.headers["Content-Length"] = str(len(prepared.body))
    return session.send(prepared, timeout=15)


def code_of(answer: requests.Response) -> str:
    try:
        return str(answer.json().get("code", ""))
    except ValueError:
        return ""


def check(case: Case, answer: requests.Response) -> None:
    """Raises FailureGroup when `answer` is not what the document says."""
    excluded = []
    described = case.media_type not in NDJSON
    if answer.status_code == 400 and (not described or code_of(answer) in BEYOND_THE_SCHEMA):
        excluded.append(checks.positive_data_acceptance)
    if "ack" in (case.query or {}) and "X-Ack" in (case.headers or {}):
        excluded.append(checks.negative_data_rejection)  # the query wins; the header may be wrong
    if answer.status_code == 413:
        excluded.append(checks.negative_data_rejection)  # it takes 413 for an acceptance
    case.validate_response(answer, excluded_checks=excluded)


def every(
    schema: BaseSchema,
    operation: tuple[str, str],
    mode: GenerationMode,
    test: Callable[[Case], None],
    examples: int,
) -> None:
    """Call `test` with requests of one operation, the same ones each time."""
    path, method = operation

    @seed(SEED)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(schema[path][method.upper()].as_strategy(generation_mode=mode))
    def run(case: Case) -> None:
        test(case)

    print(f"seed {SEED}: {method} {path}, {examples} {mode.value}")
    run()


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o[1]} {o[0]}")
def test_every_answer_is_one_that_the_document_has(
    gateway: GatewayProcess,
    document: dict[str, Any],
    session: requests.Session,
    operation: tuple[str, str],
    mode: GenerationMode,
) -> None:
    """Status, media type, headers and schema; no 5xx; what is wrong for the document is refused."""
    schema = schemathesis.openapi.from_dict(document)
    if mode.is_negative and operation not in POSTS:
        return
    seen: Counter[int] = Counter()

    def test(case: Case) -> None:
        answer = send(case, gateway, session)
        seen[answer.status_code] += 1
        check(case, answer)

    every(schema, operation, mode, test, EXAMPLES if operation in POSTS else EXAMPLES_PAGE)
    print(dict(seen))
    if operation in POSTS:  # else nothing was said
        assert 400 in seen if mode.is_negative else {200, 202} <= set(seen)


@pytest.mark.parametrize("path", PATHS)
def test_any_other_method_is_405_with_those_that_the_document_has(
    gateway: GatewayProcess, document: dict[str, Any], path: str
) -> None:
    address = path.format(device_id="dev-1", receipt="unknown")
    methods = {method.upper() for method in document["paths"][path]}
    schema = schemathesis.openapi.from_dict(document)
    operation = schema[path][sorted(methods)[0]]
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - methods:
        url = f"http://127.0.0.1:{gateway.port}{address}"
        answer = requests.request(method, url, headers={"Content-Length": "0"}, timeout=10)
        assert answer.status_code == 405, method
        assert set(answer.headers["allow"].split(", ")) == methods
        if method != "HEAD":
            operation.validate_response(answer)


# ---- controls: what does not fit is found ----------------------------------------------------


def accept_only(status: str) -> Callable[[dict[str, Any]], None]:
    def patch(post: dict[str, Any]) -> None:
        post["responses"] = {status: post["responses"][status]}

    return patch


def change(**wrong: Any) -> Callable[[dict[str, Any]], None]:
    """Another answer for every 2xx."""

    def patch(post: dict[str, Any]) -> None:
        for status in ("200", "202", "207"):
            post["responses"][status].update(copy.deepcopy(wrong))

    return patch


def ask_for_more(post: dict[str, Any]) -> None:
    post["requestBody"]["content"][JSON_TYPE]["schema"] = {"const": {"metrics": {"UPPER": 1}}}


CONTROLS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a status that is not documented": (accept_only("409"), "UndefinedStatusCode"),
    "a body of another schema": (
        change(content={JSON_TYPE: {"schema": {"required": ["nope"]}}}),
        "JsonSchemaError",
    ),
    "another media type": (
        change(content={"text/csv": {"schema": {"type": "string"}}}),
        "UndefinedContentType",
    ),
    "a header that is missing": (
        change(headers={"X-Nope": {"required": True, "schema": {"type": "string"}}}),
        "MissingHeaders",
    ),
    "a header of another schema": (
        change(headers={"X-Ack": {"required": True, "schema": {"const": "nope"}}}),
        "JsonSchemaError",
    ),
    "what is right is refused": (ask_for_more, "RejectedPositiveData"),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_document_that_the_gateway_does_not_keep_is_found(
    gateway: GatewayProcess, document: dict[str, Any], session: requests.Session, control: str
) -> None:
    patch, failure = CONTROLS[control]
    wrong = copy.deepcopy(document)
    patch(wrong["paths"][ONE]["post"])
    schema = schemathesis.openapi.from_dict(wrong)
    assert failure in failures(schema, GenerationMode.POSITIVE, gateway, session)


def test_wrong_data_that_is_taken_is_found(
    gateway: GatewayProcess, document: dict[str, Any], session: requests.Session
) -> None:
    wrong = copy.deepcopy(document)
    post = wrong["paths"][ONE]["post"]
    post["parameters"] = post["parameters"][:1]  # the device id is what is mostly wrong
    post["requestBody"]["content"] = {JSON_TYPE: {"schema": {"const": {"metrics": {}}}}}
    wrong["components"]["parameters"]["device_id"]["schema"] = {"type": "string", "pattern": "^x$"}
    schema = schemathesis.openapi.from_dict(wrong)
    found = failures(schema, GenerationMode.NEGATIVE, gateway, session, examples=100)
    assert "AcceptedNegativeData" in found


def test_a_5xx_is_found(
    gateway: GatewayProcess, document: dict[str, Any], session: requests.Session
) -> None:
    def broken(answer: requests.Response) -> None:
        answer.status_code = 503

    schema = schemathesis.openapi.from_dict(document)
    assert "ServerError" in failures(schema, GenerationMode.POSITIVE, gateway, session, broken)


def failures(
    schema: BaseSchema,
    mode: GenerationMode,
    gateway: GatewayProcess,
    session: requests.Session,
    change: Callable[[requests.Response], None] = lambda answer: None,
    examples: int = 25,
) -> set[str]:
    """Names of what `check` finds in answers to events."""
    found: set[str] = set()

    def test(case: Case) -> None:
        answer = send(case, gateway, session)
        change(answer)
        try:
            check(case, answer)
        except FailureGroup as group:
            found.update(type(failure).__name__ for failure in group.exceptions)

    every(schema, (ONE, "post"), mode, test, examples)
    return found
