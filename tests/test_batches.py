"""Batches and compressed bodies through real sockets: which answer, and what is in the log then
(guarantees 2, 3, 5, 10, 11, 16, 17, 22)."""

import gzip
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import pytest
from backports import zstd

from gateway import _log, http
from gateway.batches import Batches
from gateway.settings import HttpConfig
from tests.ack_site import Site
from tests.conformance import DOORS
from tests.gateway_process import wait_for
from tests.mutant_gateway import package
from tests.raw_http import Answer, Client, request

NDJSON: Final = "application/x-ndjson"
JSON: Final = "application/json"
WAIT_S: Final = 0.25
"""Long enough for an answer that comes too early to show."""
BODY_MAX: Final = 4096
EVENTS_MAX: Final = 10_000


@pytest.fixture(scope="module", params=DOORS)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    settings = {
        "http.server": request.param,
        "http.body_bytes_max": BODY_MAX,
        "http.body_deadline_ms": 2000,
        "http.durable_deadline_ms": 20_000,
        "http.sink_deadline_ms": 20_000,
        "log.capacity_bytes": 64 << 20,
    }
    with Site(tmp_path_factory.mktemp("batches"), settings) as site:
        yield site


@pytest.fixture(autouse=True)
def _let_go(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves the shared site as it was."""
    yield
    if "site" in request.fixturenames:
        site: Site = request.getfixturevalue("site")
        site.restore()


_numbers = iter(range(1, 1_000_000_000))


def good(seq: int | None = None, value: int = 1) -> bytes:
    """An event whose seq no other test uses."""
    seq = next(_numbers) if seq is None else seq
    return b'{"seq":%d,"metrics":{"a":%d}}' % (seq, value)


def named(device: str, seq: int | None = None) -> bytes:
    """An event that names its device."""
    return b'{"device_id":"%s",' % device.encode() + good(seq)[1:]


def array(items: Iterable[bytes]) -> bytes:
    return b"[" + b",".join(items) + b"]"


def lines(items: Iterable[bytes]) -> bytes:
    return b"".join(item + b"\n" for item in items)


def send(
    port: int,
    body: bytes,
    media: str = JSON,
    *headers: str,
    path: str = "/v1/ingest/dev",
    timeout_s: float = 20.0,
    length: str = "",
) -> Answer:
    """The answer to one request."""
    with Client(port, timeout_s) as client:
        client.send(
            request(body, *headers, path=path, media=f"Content-Type: {media}", length=length)
        )
        answer = client.answer()
    assert answer is not None, "closed without an answer"
    return answer


def post(site: Site, body: bytes, media: str = JSON, *headers: str, path: str = "") -> Answer:
    return send(site.gateway.port, body, media, *headers, path=path or "/v1/ingest/dev")


class Books(NamedTuple):
    """What the counters say."""

    received: float
    accepted: float
    duplicates: float
    refused: float
    bytes: float


def books(site: Site) -> Books:
    metrics = site.gateway.metrics()
    log = site.log()
    try:
        accepted = log.counter_total(_log.COUNTERS["accepted"])
    finally:
        log.close()
    refused = sum(v for k, v in metrics.items() if k.startswith("gateway_events_refused_total"))
    return Books(
        metrics["gateway_events_received_total"],
        accepted,
        metrics["gateway_events_duplicates_total"],
        refused,
        metrics["gateway_accepted_bytes_total"],
    )


def counts(answer: Answer) -> tuple[int, int, int]:
    body = answer.json
    assert len(body["errors"]) == body["refused"]
    return body["accepted"], body["duplicates"], body["refused"]


# ---- what is a batch -----------------------------------------------------------------------------

ONE: Final = "/v1/ingest/dev"
MANY: Final = "/v1/ingest"
BATCHES: Final[dict[str, tuple[str, str, str, int]]] = {
    # name: path, media type, body with %s for an event, events
    "array": (ONE, JSON, "[%s,%s]", 2),
    "array of one": (ONE, JSON, "[%s]", 1),
    "array behind white space": (ONE, JSON, " \t\r\n[ %s\n,\t%s\r] \n", 2),
    "array with a charset": (ONE, "Application/JSON; charset=UTF-8", "[%s]", 1),
    "lines": (ONE, NDJSON, "%s\n%s\n", 2),
    "lines, the last one open": (ONE, NDJSON, "%s\n%s", 2),
    "lines of DOS": (ONE, NDJSON, "%s\r\n%s\r\n", 2),
    "blank lines": (ONE, NDJSON, "\n\n%s\n \t\r\n\r\n%s\n\n", 2),
    "application/ndjson": (ONE, "application/ndjson", "%s\n", 1),
    "application/jsonl": (ONE, "application/jsonl;charset=utf-8", "%s\n", 1),
    "many devices, array": (MANY, JSON, "[%s,%s]", 2),
    "many devices, lines": (MANY, NDJSON, "%s\n%s\n", 2),
    "many devices, one object": (MANY, JSON, "%s", 1),
    "many devices, one object behind white space": (MANY, JSON, "\n %s ", 1),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batch_is_accepted_once(site: Site, name: str) -> None:
    path, media, text, n = BATCHES[name]
    events = [named("x-1") if path == MANY else good() for _ in range(n)]
    body = text.encode() % tuple(events)
    before = books(site)
    answer = post(site, body, media, path=path)
    assert (answer.status, answer.header("x-ack")) == (202, "enqueue")
    assert answer.header("content-type") == "application/json"
    receipt = answer.header("x-receipt")
    assert answer.json == {
        "ack": "enqueue",
        "accepted": n,
        "duplicates": 0,
        "refused": 0,
        "errors": [],
        "receipt": receipt,
    }
    assert site.receipt(receipt) in ("enqueued", "durable", "delivered")
    assert answer.header("x-duplicate") is None
    repeat = post(site, body, media, path=path)
    assert (repeat.status, counts(repeat)) == (202, (0, n, 0))
    assert repeat.header("x-duplicate") == "true"
    assert repeat.header("x-receipt") == receipt
    after = books(site)
    assert after.received - before.received == 2 * n
    assert after.accepted - before.accepted == n
    assert after.duplicates - before.duplicates == n
    assert after.refused == before.refused
    wait_for(lambda: all(published(site)[seq_of(event)] == 1 for event in events), 5)


def seq_of(event: bytes) -> int:
    seq: int = json.loads(event)["seq"]
    return seq


def published(site: Site) -> Counter[int]:
    """How often each seq came to the broker."""
    return Counter(json.loads(payload)["seq"] for payload in list(site.broker.payloads))


# ---- what is none: nothing is in -----------------------------------------------------------------

MISFRAMED: Final = {
    "nothing": "",
    "a bracket": "[",
    "the other bracket": "]",
    "not closed": "[%s",
    "not closed behind a comma": "[%s,",
    "a comma too many": "[%s,]",
    "a comma before": "[,%s]",
    "two commas": "[%s,,%s]",
    "a comma missing": "[%s %s]",
    "closed twice": "[%s]]",
    "something behind it": "[%s]x",
    "two arrays": "[%s][%s]",
    "closed by a brace": "[%s}",
    "an item that is cut": '[%s,{"metrics":{"a":1}]',
    "a string that is cut": '[%s,{"metrics":{"a]',
    "a million brackets": "[" * 1_000_000,
    "many brackets behind an event": "[%s," + "[" * 100_000,
    "a byte order mark": "\ufeff[%s]",
    "a vertical tab before": "\v[%s]",
}


@pytest.mark.parametrize("path", [ONE, MANY])
@pytest.mark.parametrize("name", MISFRAMED)
def test_of_what_is_no_array_nothing_is_in(site: Site, name: str, path: str) -> None:
    text = MISFRAMED[name].encode()
    before = books(site)
    body = text % ((good(),) * text.count(b"%s"))
    answer = post(site, body, path=path)
    assert answer.status == 400
    assert answer.json["code"] in ("malformed_json", "not_an_object", "bad_device_id")
    assert answer.header("x-receipt") is None
    after = books(site)
    assert after.accepted == before.accepted
    assert after.received - before.received == after.refused - before.refused == 1


@pytest.mark.parametrize("path", [ONE, MANY])
@pytest.mark.parametrize(
    ("body", "media"),
    [(b"[]", JSON), (b" [ \t\r\n] ", JSON), (b"", NDJSON), (b"\n\r\n \t\n", NDJSON)],
)
def test_empty_batch_is_refused(site: Site, body: bytes, media: str, path: str) -> None:
    answer = post(site, body, media, path=path)
    assert (answer.status, answer.code) == (400, "empty_batch")


# ---- items that are wrong: refused alone ---------------------------------------------------------

WRONG: Final[dict[bytes, str]] = {
    b"7": "not_an_object",
    b"null": "not_an_object",
    b'"text"': "not_an_object",
    b"[]": "not_an_object",
    b'{"metrics":{"a":1},"x":1}': "unknown_field",
    b'{"metrics":{"a":1},"device_id":"other"}': "unknown_field",
    b'{"metrics":{"a":1},"ts":"yesterday"}': "bad_ts",
    b'{"metrics":{"a":\x001}}': "",
    b'{"metrics":{"a":1},"payload":"\xff\xc0\xaf"}': "malformed_json",
    b'{"metrics":{"a":1},"payload":"' + b"x" * BODY_MAX + b'"}': "body_too_large",
    b'{"metrics":{"a":1},"payload":' + b"[" * 200 + b"]" * 200 + b"}": "payload_too_deep",
    b'{"metrics":{"a":1,"\\u0061":2}}': "duplicate_key",
}


@pytest.mark.parametrize("media", [JSON, NDJSON])
def test_item_that_is_wrong_is_refused_alone(site: Site, media: str) -> None:
    items = [good()]
    for wrong in WRONG:
        items += [wrong, good()]
    before = books(site)
    answer = post(site, array(items) if media == JSON else lines(items), media)
    assert answer.status == 207
    assert counts(answer) == (len(WRONG) + 1, 0, len(WRONG))
    for i, (error, code) in enumerate(zip(answer.json["errors"], WRONG.values(), strict=True)):
        assert error.keys() == {"index", "code", "field", "message"}
        assert error["index"] == 2 * i + 1
        assert error["code"] == code or not code
    after = books(site)
    assert after.accepted - before.accepted == len(WRONG) + 1
    assert after.refused - before.refused == len(WRONG)
    assert after.received - before.received == len(items)


def test_error_of_an_item_says_where(site: Site) -> None:
    answer = post(site, array([good(), b' {"metrics":{"Temp":1}} ']))
    (error,) = answer.json["errors"]
    assert (error["index"], error["code"], error["field"]) == (1, "bad_metric_key", "metrics.Temp")
    assert "(at byte 12 of the event)" in error["message"]
    long = b'{"metrics":{},"' + b"x" * 3000 + b'":1}'
    (error,) = post(site, array([good(), long])).json["errors"]
    assert len(error["field"]) <= http.FIELD_CHARACTERS_MAX + 1
    large = b'{"metrics":{},"payload":"' + b"x" * BODY_MAX + b'"}'
    (error,) = post(site, array([large, good()])).json["errors"]
    assert f"http.body_bytes_max = {BODY_MAX}" in error["message"]


def test_batch_without_one_good_event_is_400(site: Site) -> None:
    answer = post(site, array([b"{}", b"7"]))
    assert (answer.status, counts(answer)) == (400, (0, 0, 2))
    assert [error["code"] for error in answer.json["errors"]] == [
        "missing_metrics",
        "not_an_object",
    ]
    assert (answer.json["ack"], answer.code) == (None, "missing_metrics")
    assert answer.header("x-receipt") is None
    assert answer.header("x-ack") is None


def test_key_twice_in_a_batch_is_a_repeat_or_a_conflict(site: Site) -> None:
    seq = next(_numbers)
    answer = post(site, array([good(seq), good(seq), good(seq, 2)]))
    assert (answer.status, counts(answer)) == (207, (1, 1, 1))
    assert answer.json["errors"][0]["code"] == "seq_conflict"
    assert answer.header("x-duplicate") is None
    assert post(site, good(seq)).header("x-duplicate") == "true"


# ---- many devices --------------------------------------------------------------------------------


def test_events_of_many_devices_have_keys_of_their_own(site: Site) -> None:
    seq = next(_numbers)
    answer = post(site, array(named(f"many-{i}", seq) for i in range(3)), path=MANY)
    assert counts(answer) == (3, 0, 0)
    again = post(site, lines([named("many-1", seq), named("many-3", seq)]), NDJSON, path=MANY)
    assert counts(again) == (1, 1, 0)


@pytest.mark.parametrize(
    "member",
    [
        b"",
        b'"device_id":7,',
        b'"device_id":"",',
        b'"device_id":"a.b",',
        b'"device_id":"%s",' % (b"a" * 65),
        b'"device_id":"\\u0061",',
        b'"device_id":"a\xc3\xa9",',
    ],
)
def test_device_id_of_an_event_must_be_one(site: Site, member: bytes) -> None:
    answer = post(site, array([b"{" + member + good()[1:], named("a" * 64)]), path=MANY)
    assert (answer.status, counts(answer)) == (207, (1, 0, 1))
    error = answer.json["errors"][0]
    assert (error["code"], error["field"]) == ("bad_device_id", "device_id")


def test_path_of_many_devices_takes_events_only(site: Site) -> None:
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        answer = site.get(MANY, method)
        assert (answer.status, answer.header("allow")) == (405, "POST")
    assert post(site, good(), path="/v1/ingest/").status == 404
    assert post(site, good(), path="/v1/ingestx").status == 404


# ---- limits --------------------------------------------------------------------------------------


def test_most_events_of_a_batch_and_one_more(site: Site) -> None:
    events = [good() for _ in range(EVENTS_MAX)]
    assert counts(post(site, lines(events), NDJSON)) == (EVENTS_MAX, 0, 0)
    before = books(site)
    for body, media in ((lines([*events, good()]), NDJSON), (array([*events, good()]), JSON)):
        answer = post(site, body, media)
        assert (answer.status, answer.code) == (413, "batch_too_large")
        assert f"{EVENTS_MAX}" in answer.json["message"]
    assert books(site).accepted == before.accepted


def test_largest_batch_and_one_byte_more(site: Site) -> None:
    body = array([good()])
    answer = post(site, body + b" " * ((1 << 20) - len(body)))
    assert (answer.status, counts(answer)) == (202, (1, 0, 0))
    for media, code, path in (
        (NDJSON, "batch_too_large", ONE),
        (JSON, "body_too_large", ONE),
        (JSON, "batch_too_large", MANY),
    ):
        answer = post(site, body + b" " * ((1 << 20) + 1 - len(body)), media, path=path)
        assert (answer.status, answer.code) == (413, code)
        assert answer.header("connection") == "close"
        assert "http.batch_bytes_max" in answer.json["message"]
        assert "1048576" in answer.json["message"]


def test_event_larger_than_an_event_is_413_also_where_a_batch_may_be_larger(site: Site) -> None:
    before = books(site)
    answer = post(site, b'{"metrics":{},"payload":"' + b"x" * BODY_MAX + b'"}')
    assert (answer.status, answer.code) == (413, "body_too_large")
    answer = post(site, b'[{"metrics":{},"payload":"' + b"x" * 1_000_000 + b'"}]')
    assert (answer.status, answer.json["errors"][0]["code"]) == (400, "body_too_large")
    assert books(site).accepted == before.accepted


def test_ten_thousand_wrong_events_are_named_and_others_go_on(site: Site) -> None:
    body = lines([b'{"metrics":{"a":null},"ts":"%d"}' % i for i in range(EVENTS_MAX)])
    slowest = 0.0
    end = threading.Event()

    def others() -> None:
        nonlocal slowest
        while not end.is_set():
            began = time.monotonic()
            assert post(site, good()).status == 202
            slowest = max(slowest, time.monotonic() - began)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        answer = post(site, body, NDJSON)
    finally:
        end.set()
        thread.join()
    assert (answer.status, counts(answer)) == (400, (0, 0, EVENTS_MAX))
    assert [error["index"] for error in answer.json["errors"]] == list(range(EVENTS_MAX))
    assert slowest < 1.0


def test_receipts_are_given_for_each_item_when_asked(site: Site) -> None:
    body = array([good(), b"{}", good()])
    answer = post(site, body, path=f"{ONE}?receipts=each")
    receipts = answer.json["receipts"]
    assert receipts[1] is None
    assert receipts[2] == answer.header("x-receipt") == answer.json["receipt"]
    assert all(site.receipt(receipts[i]) != "unknown" for i in (0, 2))
    repeat = post(
        site, array([good(), body[1:-1].split(b",{}", 1)[0]]), path=f"{ONE}?receipts=each"
    )
    assert repeat.json["receipts"][1] == receipts[0]
    assert repeat.json["receipt"] == repeat.json["receipts"][0], "the highest, not the last"
    assert "receipts" not in post(site, array([good()]), path=f"{ONE}?receipts=none").json
    assert post(site, good(), path=f"{ONE}?receipts=each").json == {"ack": "enqueue"}


# ---- acknowledgements ----------------------------------------------------------------------------


def ask(site: Site, body: bytes, ack: str, media: str = NDJSON, query: str = "") -> Client:
    """A connection on which a batch was sent and whose answer is still to come."""
    client = site.client(20.0)
    path = f"{ONE}?ack={ack}{query}"
    client.send(request(body, path=path, media=f"Content-Type: {media}"))
    return client


def answer_of(client: Client) -> Answer:
    answer = client.answer()
    assert answer is not None, "closed without an answer"
    return answer


def test_durable_batch_is_answered_after_the_fdatasync(site: Site) -> None:
    site.disk("hold")
    client = ask(site, lines([good(), b"{}", good()]), "durable")
    assert client.is_silent(WAIT_S)
    site.disk("")
    answer = answer_of(client)
    assert (answer.status, answer.header("x-ack")) == (207, "durable")
    assert (answer.json["ack"], counts(answer)) == ("durable", (2, 0, 1))
    assert site.receipt(answer.header("x-receipt")) in ("durable", "delivered")
    answer = answer_of(ask(site, lines([good()]), "durable"))
    assert (answer.status, answer.json["ack"]) == (202, "durable")


def test_sink_batch_is_answered_when_the_broker_has_all_of_it(site: Site) -> None:
    site.broker.hold()
    events = [good() for _ in range(50)]
    client = ask(site, array(events), "sink", JSON)
    assert client.is_silent(WAIT_S)
    assert site.receipt(post(site, array(events)).header("x-receipt")) in ("enqueued", "durable")
    site.broker.let_go()
    answer = answer_of(client)
    assert (answer.status, answer.header("x-ack"), counts(answer)) == (200, "sink", (50, 0, 0))
    assert all(published(site)[seq_of(event)] == 1 for event in events)
    repeat = answer_of(ask(site, lines(events), "sink"))
    assert (repeat.status, counts(repeat)) == (200, (0, 50, 0))
    assert repeat.header("x-duplicate") == "true"
    mixed = answer_of(ask(site, lines([good(), b"7"]), "sink"))
    assert (mixed.status, mixed.json["ack"]) == (207, "sink")


def test_batch_with_dead_letters_is_not_called_delivered(site: Site) -> None:
    site.broker.reason = 0x99
    refused = [good(), good()]
    answer = answer_of(ask(site, lines(refused), "sink"))
    assert (answer.status, counts(answer)) == (202, (2, 0, 0))
    assert answer.json["dead_lettered"] == 2
    assert answer.json["ack"] == answer.header("x-ack") != "sink"
    site.broker.reason = None
    answer = answer_of(ask(site, lines([refused[0], good()]), "sink"))
    assert (answer.status, counts(answer)) == (202, (1, 1, 0))
    assert answer.json["dead_lettered"] == 1, "a repeat of what was set aside before"
    answer = answer_of(ask(site, lines([good()]), "sink"))
    assert (answer.status, "dead_lettered" in answer.json) == (200, False)


def test_batch_that_is_not_confirmed_in_time_is_504_with_counts(tmp_path: Path) -> None:
    settings = {"http.durable_deadline_ms": 100, "http.sink_deadline_ms": 150}
    with Site(tmp_path, settings) as site:
        site.broker.hold()
        site.disk("hold")
        for ack in ("durable", "sink"):
            answer = answer_of(ask(site, lines([good(), b"{}"]), ack))
            assert (answer.status, answer.code) == (504, "accepted_pending")
            assert counts(answer) == (1, 0, 1)
            assert answer.json["ack"] == "enqueue"
            assert answer.header("x-ack") is None
            assert site.receipt(answer.header("x-receipt")) == "enqueued"


def test_batch_that_waits_when_the_log_fails_is_500(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        site.disk("hold")
        client = ask(site, lines([good()]), "durable")
        assert client.is_silent(0.1)
        site.disk("fail")
        answer = client.answer()
        assert answer is None or (answer.status, answer.code) == (500, "internal")


# ---- a log that fills in the middle --------------------------------------------------------------


def goes_on(site: Site) -> None:
    """A client of a log that fills up sends what is left, from `resume_at` on."""
    site.broker.hold()
    seed = random.randrange(1 << 30)
    source = random.Random(seed)
    events = [
        b'{"seq":%d,"metrics":{"a":1},"payload":"%s"}'
        % (next(_numbers), b"x" * source.randrange(500))
        for _ in range(6000)
    ]
    events[3] = b"{}"
    sent, stops = 0, 0
    looked_at: Counter[str] = Counter()
    deadline = time.monotonic() + 30
    while sent < len(events):
        assert time.monotonic() < deadline
        batch = events[sent : sent + 2000]
        answer = post(site, lines(batch), NDJSON)
        body = answer.json
        looked_at.update({key: body[key] for key in ("accepted", "duplicates", "refused")})
        if "resume_at" not in body:
            assert answer.status in (202, 207)
            sent += len(batch)
            continue
        stops += 1
        at = body["resume_at"]
        assert at == sum(counts(answer)), f"seed {seed}"
        assert body["code"] == "log_full"
        assert int(answer.header("retry-after") or 0) >= 1
        if at:
            assert answer.status == 207
            assert int(answer.header("x-log-used") or 0) > 50
        else:
            assert answer.status == 503
            assert answer.header("x-receipt") is None
            site.broker.let_go()  # it is full for sure
        sent += at
    assert stops >= 2
    assert looked_at == Counter(accepted=len(events) - 1, refused=1)
    seqs = {seq_of(event) for event in events if event != b"{}"}
    wait_for(lambda: published(site).keys() >= seqs, 20)
    assert published(site) == Counter(dict.fromkeys(seqs, 1)), f"seed {seed}"
    assert site.gateway.metric("gateway_unexplained_events") == 0


def test_client_goes_on_at_resume_at_and_each_event_is_in_once(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        goes_on(site)


# ---- controls: a door that lies must fail the tests above ----------------------------------------

LIES: Final = {
    "an answer that does not wait": (
        "self._waiting.batch(reply, batch.lsn, form.ack, started_ns, answer)",
        "reply(*answer(form.ack, False))",
        test_durable_batch_is_answered_after_the_fdatasync,
    ),
    "a dead letter is called delivered": (
        "if ack == http.SINK and (batch.duplicates or self._dead_lettered() != dead):",
        "if False:",
        test_batch_with_dead_letters_is_not_called_delivered,
    ),
    "repeats are not looked at": (
        "(batch.duplicates or self._dead_lettered() != dead)",
        "(self._dead_lettered() != dead)",
        test_batch_with_dead_letters_is_not_called_delivered,
    ),
    "resume_at is one too far": (
        'said["resume_at"] = batch.resume_at',
        'said["resume_at"] = batch.resume_at + 1',
        goes_on,
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_about_a_batch_is_found(tmp_path: Path, name: str) -> None:
    truth, lie, look = LIES[name]
    root = package(tmp_path / "lie", {"batches.py": [(truth, lie)]})
    with Site(tmp_path / "site", root=root) as site, pytest.raises(AssertionError):
        look(site)


# ---- every way in which a batch can stop, from made-up outcomes ----------------------------------


class MadeUp:
    """In place of log, `Ingest` and `Waiting`: what they say is given."""

    sinks = ("mqtt",)
    durable = 0

    def __init__(self, outcome: _log.Batch, state: int = _log.RUNNING) -> None:
        self._outcome, self.state = outcome, state
        self.answers: list[tuple[int, list[tuple[str, str]], bytes]] = []

    def batch(self, *_: object) -> _log.Batch:
        return self._outcome

    def counter_add(self, *_: object) -> None: ...

    def receipt(self, lsn: int) -> str:
        return f"receipt-{lsn}"

    def refuse(self, code: int, started_ns: int) -> http.Answer:
        return http.refusal(code)

    def shed(self, code: int) -> tuple[int, http.Answer]:
        code = {http.FAILED: http.INTERNAL}.get(code, code)
        if code == http.DRAINING and self.state == _log.FAILED:
            code = http.FAILED
        return code, http.refusal(code)

    def reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.answers.append((status, headers, body))


def outcome(good: int, wrong: int, stop: int) -> _log.Batch:
    errors = [(good + i, http.NUMBER["bad_ts"], "ts", 7) for i in range(wrong)]
    resume_at = good + wrong if stop else None
    return _log.Batch(0, None, 9, good, 0, errors, resume_at, stop, 64 if good else 0, 60, b"")


FULL, DRAINING, FAILED, BUSY = http.LOG_FULL, http.DRAINING, http.FAILED, http.ACCEPTED_PENDING
STOPS: Final = [
    # good, wrong, stop, the log: status, code, waits, closes
    (2, 0, 0, _log.RUNNING, 202, None, False, False),
    (2, 1, 0, _log.RUNNING, 207, None, False, False),
    (0, 3, 0, _log.RUNNING, 400, "bad_ts", False, False),
    (0, 0, FULL, _log.RUNNING, 503, "log_full", True, False),
    (0, 1, FULL, _log.RUNNING, 207, "log_full", True, False),
    (2, 0, FULL, _log.RUNNING, 207, "log_full", True, False),
    (2, 1, FULL, _log.RUNNING, 207, "log_full", True, False),
    (0, 0, DRAINING, _log.DRAINING, 503, "draining", True, True),
    (2, 0, DRAINING, _log.DRAINING, 207, "draining", True, True),
    (0, 0, DRAINING, _log.FAILED, 503, "failed", True, True),
    (0, 2, DRAINING, _log.FAILED, 207, "failed", True, True),
    (2, 0, DRAINING, _log.FAILED, 500, "internal", False, True),
    (0, 0, FAILED, _log.FAILED, 500, "internal", False, True),
    (2, 0, FAILED, _log.FAILED, 500, "internal", False, True),
    (0, 0, BUSY, _log.RUNNING, 504, "accepted_pending", True, False),
    (2, 0, BUSY, _log.RUNNING, 207, "accepted_pending", True, False),
]


@pytest.mark.parametrize(
    ("good", "wrong", "stop", "state", "status", "code", "waits", "closes"), STOPS
)
def test_every_way_to_stop_has_its_answer(
    good: int,
    wrong: int,
    stop: int,
    state: int,
    status: int,
    code: str | None,
    waits: bool,
    closes: bool,
) -> None:
    made_up: Any = MadeUp(outcome(good, wrong, stop), state)
    batches = Batches(made_up, 0, made_up, made_up, HttpConfig(), made_up.refuse, made_up.shed)
    batches.batch(made_up.reply, "dev", b"[]", http.Form(http.ENQUEUE), 0)
    ((got, headers, text),) = made_up.answers
    body = json.loads(text)
    assert (got, body.get("code")) == (status, code)
    assert ("retry-after" in dict(headers)) == waits
    assert (http.CLOSE in headers) == closes
    assert len(dict(headers)) == len(headers)
    if status != 500:
        assert (body["accepted"], body["refused"], len(body["errors"])) == (good, wrong, wrong)
        assert body.get("resume_at") == (good + wrong if stop else None)
        assert (dict(headers).get("x-receipt"), body.get("receipt")) == (
            ("receipt-64", "receipt-64") if good else (None, None)
        )
        assert dict(headers).get("x-ack") == body["ack"] == ("enqueue" if good else None)
        assert dict(headers).get("x-log-used") == ("60" if good else None)
    if stop and status != 500:
        assert "resume_at" in body["message"]


@pytest.mark.parametrize("ack", [http.DURABLE, http.SINK])
def test_answer_that_waits_keeps_no_more_than_it_counts(ack: int) -> None:
    """A field that is unknown may have a name as long as an event."""
    wrong = (1, http.NUMBER["unknown_field"], "x" * 60_000, 17)
    came = outcome(1, 1, 0)._replace(errors=[wrong] * 15, lsns=b"l" * 80_000)
    made_up: Any = MadeUp(came, _log.RUNNING)
    kept: list[Any] = []
    made_up.cursor = lambda _: SimpleNamespace(dead_lettered=0)
    waiting: Any = SimpleNamespace(batch=lambda *arguments: kept.append(arguments[-1]))
    batches = Batches(made_up, 0, made_up, waiting, HttpConfig(), made_up.refuse, made_up.shed)
    batches.batch(made_up.reply, "dev", b"[]", http.Form(ack), 0)
    (counted,) = batches.held.values()
    (answer,) = kept
    assert len(repr(answer.args)) < counted + 1024


# ---- compressed bodies ---------------------------------------------------------------------------

COMPRESS: Final = {"gzip": gzip.compress, "x-gzip": gzip.compress, "zstd": zstd.compress}


@pytest.mark.parametrize("name", COMPRESS)
def test_compressed_body_is_what_it_was(site: Site, name: str) -> None:
    coding = f"Content-Encoding: {name}"
    compress = COMPRESS[name]
    event = good()
    before = books(site)
    answer = post(site, compress(event), JSON, coding)
    assert (answer.status, answer.json) == (202, {"ack": "enqueue"})
    answer = post(site, event)
    assert answer.header("x-duplicate") == "true", "the same bytes"
    answer = post(site, compress(event), JSON, coding, path=f"{ONE}?ack=durable")
    assert (answer.status, answer.json) == (202, {"ack": "durable"})
    assert counts(post(site, compress(array([good(), good()])), JSON, coding)) == (2, 0, 0)
    assert counts(post(site, compress(lines([good(), b"7"])), NDJSON, coding)) == (1, 0, 1)
    assert counts(post(site, compress(named("z")), JSON, coding, path=MANY)) == (1, 0, 0)
    answer = post(site, compress(b'{"metrics":{"A":1}}'), JSON, coding)
    assert (answer.status, answer.code) == (400, "bad_metric_key")
    assert books(site).accepted - before.accepted == 5
    assert site.gateway.metric("gateway_inflated_bytes_total") > len(event)


def test_sizes_of_what_is_inflated_have_the_limits_of_plain_bodies(site: Site) -> None:
    coding = "Content-Encoding: gzip"
    event = good()
    largest = event + b" " * (BODY_MAX - len(event))
    assert post(site, gzip.compress(largest), JSON, coding).status == 202
    answer = post(site, gzip.compress(largest + b" "), JSON, coding)
    assert (answer.status, answer.code) == (413, "body_too_large")
    noise = random.Random(1).randbytes(600_000).hex().encode()  # halves, and no more
    for text, media, path, code in (
        (b'{"payload":"' + noise, JSON, ONE, "body_too_large"),
        (b' ["' + noise, JSON, ONE, "batch_too_large"),
        (b'{"payload":"' + noise, JSON, MANY, "batch_too_large"),
        (noise, NDJSON, ONE, "batch_too_large"),
    ):
        answer = post(site, gzip.compress(text, 1), media, coding, path=path)
        assert (answer.status, answer.code) == (413, code)
        assert answer.header("connection") == "close"


def test_bombs_are_413_and_cost_no_memory(site: Site) -> None:
    (pid,) = site.gateway.children()["worker"]

    def high_kib() -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])

    small = gzip.compress(bytes(200_000))
    assert post(site, small, NDJSON, "Content-Encoding: gzip").code == "batch_too_large"
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = high_kib()
    zeros = bytes(1 << 26)
    for coding, body, status in (
        ("gzip", gzip.compress(zeros), 413),
        ("gzip", gzip.compress(gzip.compress(zeros)), 400),  # one layer: what is in it is no event
        ("zstd", zstd.compress(zeros), 413),
    ):
        answer = post(site, body, NDJSON, f"Content-Encoding: {coding}")
        assert answer.status == status
    assert high_kib() - before < 4096


BAD_BODIES: Final = {
    "plain": (good(0), "gzip"),
    "nothing": (b"", "gzip"),
    "nothing of zstd": (b"", "zstd"),
    "cut": (gzip.compress(good(0))[:-1], "gzip"),
    "cut zstd": (zstd.compress(good(0))[:-1], "zstd"),
    "behind it": (gzip.compress(good(0)) + b"\0", "gzip"),
    "two members": (gzip.compress(b"[") + gzip.compress(b"]"), "gzip"),
    "two frames": (zstd.compress(b"[") + zstd.compress(b"]"), "zstd"),
    "the other coding": (zstd.compress(good(0)), "gzip"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_body_that_is_not_its_coding_is_400(site: Site, name: str) -> None:
    body, coding = BAD_BODIES[name]
    before = books(site)
    for path, media in ((ONE, JSON), (ONE, NDJSON), (MANY, JSON)):
        answer = post(site, body, media, f"Content-Encoding: {coding}", path=path)
        assert (answer.status, answer.code) == (400, "bad_encoding")
    assert books(site).accepted == before.accepted


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Encoding: gzip, gzip"],
        ["Content-Encoding: gzip, zstd"],
        ["Content-Encoding: identity, gzip"],
        ["Content-Encoding: gzip", "Content-Encoding: zstd"],
        ["Content-Encoding: "],
        ["Content-Encoding: br"],
        ["Content-Encoding: deflate"],
        ["Content-Encoding: gzip;q=1"],
    ],
)
def test_other_codings_and_lists_are_415(site: Site, headers: list[str]) -> None:
    answer = post(site, gzip.compress(good()), JSON, *headers)
    assert (answer.status, answer.code) == (415, "unsupported_encoding")
    assert answer.header("accept-encoding") == "gzip, zstd"


def test_coding_in_capitals_is_known(site: Site) -> None:
    assert post(site, gzip.compress(good()), JSON, "Content-Encoding: GZip").status == 202
    assert post(site, array([good()]), JSON, "Content-Encoding: identity").status == 202


# ---- large bodies --------------------------------------------------------------------------------

LARGE: Final = {"http.batch_bytes_max": 1 << 20, "http.batches_bytes_max": 1 << 20}


def announce(site: Site, size: int) -> Client:
    """A connection on which the head of a batch was sent."""
    client = site.client()
    length = f"Content-Length: {size}"
    client.send(request(b"[", path=ONE, media=f"Content-Type: {JSON}", length=length))
    return client


def test_large_bodies_share_their_room_and_small_events_need_none(tmp_path: Path) -> None:
    settings = {**LARGE, "http.body_deadline_ms": 1000, "http.body_bytes_max": BODY_MAX}
    with Site(tmp_path, settings) as site:
        slow = [announce(site, 1 << 19) for _ in range(2)]
        body = array([good()])
        large = body + b" " * BODY_MAX

        def is_shed() -> bool:
            answer = post(site, large)
            assert answer.status == 202 or answer.code == "overloaded"
            if answer.status == 503:
                assert 1 <= int(answer.header("retry-after") or 0) <= 5
            return answer.status == 503

        wait_for(is_shed, 3, "both heads are read")
        assert post(site, good()).status == 202
        assert post(site, array([good()])).status == 202, "a small batch"
        assert all(answer_of(client).status == 408 for client in slow)
        assert not is_shed(), "what was cut gave its room back"
        for _ in range(5):  # who goes away, too
            for client in [announce(site, 1 << 19) for _ in range(2)]:
                client.close()
        wait_for(lambda: not is_shed(), 3)
        for _ in range(5):  # and who is answered
            assert post(site, body + b" " * 400_000).status == 202


def test_answers_that_wait_share_the_room_too(tmp_path: Path) -> None:
    with Site(tmp_path, {**LARGE, "http.workers": 1, "log.capacity_bytes": 16 << 20}) as site:
        site.broker.hold()
        wrong = lines([good(), *[b"{}"] * 9000])
        client = ask(site, wrong, "sink")

        def is_shed() -> bool:
            answer = answer_of(ask(site, lines([good()]), "durable"))
            assert answer.status == 202 or answer.code == "overloaded"
            return answer.status == 503

        wait_for(is_shed, 5)
        assert post(site, lines([good()]), NDJSON).status == 202, "its answer does not wait"
        assert site.post(seq=next(_numbers), ack="durable").status == 202, "an event"
        site.broker.let_go()
        answer = answer_of(client)
        assert (answer.status, counts(answer)) == (207, (1, 0, 9000))
        wait_for(lambda: not is_shed(), 5)


def test_large_body_that_stalls_is_408(site: Site) -> None:
    answer = answer_of(announce(site, 100_000))
    assert (answer.status, answer.code) == (408, "body_timeout")


def test_large_body_that_ends_early_is_not_taken(site: Site) -> None:
    before = books(site)
    with Client(site.gateway.port) as client:
        body = array([good()] * 2000)
        client.send(request(body, length=f"Content-Length: {len(body) + 1}"))
    time.sleep(0.1)
    assert books(site).accepted == before.accepted


def test_connection_stays_in_step_behind_batches(site: Site) -> None:
    with Client(site.gateway.port) as client:
        client.send(
            request(array([good()] * 500))
            + request(lines([good()] * 500), media=f"Content-Type: {NDJSON}")
            + request(b"[x")
            + request(good(), "Expect: 100-continue")
            + request(gzip.compress(good()), "Content-Encoding: gzip")
            + request(array([good()]), path=MANY)
            + request(good())
        )
        statuses = [answer.status for _ in range(7) if (answer := client.answer())]
    assert statuses == [202, 202, 400, 202, 202, 400, 202]


# ---- workers that die ----------------------------------------------------------------------------


def test_killed_workers_take_no_answered_event_with_them(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    source = random.Random(seed)
    settings = {"http.workers": 2, "log.capacity_bytes": 64 << 20}
    with Site(tmp_path, settings) as site:
        end = threading.Event()
        answered: list[set[int]] = [set() for _ in range(4)]
        sent: list[set[int]] = [set() for _ in range(4)]

        def run(me: int) -> None:
            seq = (me + 1) * 10_000_000
            while not end.is_set():
                n = source.choice((1, 10, 300, 3000))
                seqs = range(seq, seq + n)
                seq += n
                sent[me].update(seqs)
                coding = source.choice(([], ["Content-Encoding: zstd"]))
                body = lines(good(i) for i in seqs)
                try:
                    answer = send(
                        site.gateway.port,
                        zstd.compress(body) if coding else body,
                        NDJSON,
                        *coding,
                        path=f"/v1/ingest/d-{me}",
                        timeout_s=3,
                    )
                except (OSError, AssertionError):
                    continue  # unknown: it may be in, or a part of it
                if answer.status in (202, 207):
                    assert counts(answer)[1:] == (0, 0)
                    answered[me].update(seqs[: answer.json.get("resume_at", n)])
                else:
                    assert answer.status == 503

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        kills = 0
        until = time.monotonic() + 4
        while time.monotonic() < until:
            time.sleep(source.uniform(0.05, 0.4))
            workers = site.gateway.children()["worker"]
            if workers:
                os.kill(source.choice(workers), signal.SIGKILL)
                kills += 1
        end.set()
        for thread in threads:
            thread.join()
        everything, all_sent = set().union(*answered), set().union(*sent)
        assert kills >= 5
        assert len(everything) > 1000
        wait_for(lambda: published(site).keys() >= everything, 30, f"seed {seed}")
        wait_for(lambda: site.gateway.metric("gateway_events_waiting") == 0, 10)
        assert published(site).keys() <= all_sent
        assert max(published(site).values()) == 1, "nothing was sent twice by anybody"
        assert site.gateway.metric("gateway_unexplained_events") == 0
