"""The HTTP contract over raw sockets: any byte string gets exactly one well-formed answer or a
close, and what was refused is not in the log (guarantees 10, 16, 17, 22)."""

import json
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import http
from tests import conformance
from tests.conformance import DOORS
from tests.gateway_process import EVENT, ROOT, GatewayProcess, wait_for
from tests.raw_http import Client, chunked, request

DEADLINE_MS = 400
BODY_MAX = 4096


@pytest.fixture(scope="module", params=DOORS)
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    settings = {
        "http.server": request.param,
        "http.body_deadline_ms": DEADLINE_MS,
        "http.body_bytes_max": BODY_MAX,
        "http.batch_bytes_max": BODY_MAX,
    }
    with GatewayProcess(tmp_path_factory.mktemp("http"), settings) as gateway:
        yield gateway


def door_of(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["gateway"])


def in_log(gateway: GatewayProcess) -> tuple[float, float]:
    """How much is in the log: events, and bytes of the ring."""

    def walked() -> dict[str, float] | None:
        metrics = gateway.metrics()
        return None if metrics["gateway_log_uncommitted_bytes"] else metrics

    metrics = wait_for(walked, 3, "the delivery process to walk over what is there")
    return metrics["gateway_events_accepted_total"], metrics["gateway_log_bytes_used"]


# ---- the table: status (0: a close without an answer), code, closes ------------------------------

CLOSE = 0
TABLE: dict[str, tuple[bytes, set[int], str | None, bool | None]] = {
    # path and method
    "unknown path": (request(path="/nope"), {404}, "not_found", False),
    "root": (request(path="/"), {404}, "not_found", False),
    "no device id": (request(path="/v1/ingest/"), {404}, "not_found", False),
    "GET of the path of batches": (
        request(b"", path="/v1/ingest", method="GET", length=None),
        {405},
        "method_not_allowed",
        False,
    ),
    "a trailing slash": (request(path="/v1/ingest/dev-1/"), {404}, "not_found", False),
    "a level more": (request(path="/v1/ingest/dev-1/x"), {404}, "not_found", False),
    "an encoded slash": (request(path="/v1/ingest/a%2Fb"), {404}, "not_found", False),
    "dot dot": (request(path="/v1/ingest/../metrics"), {404}, "not_found", False),
    "device id dot dot": (request(path="/v1/ingest/.."), {400}, "bad_device_id", False),
    "device id %2e%2e": (request(path="/v1/ingest/%2e%2e"), {400}, "bad_device_id", False),
    "device id %00": (request(path="/v1/ingest/a%00"), {400}, "bad_device_id", False),
    "device id %0a": (request(path="/v1/ingest/a%0a"), {400}, "bad_device_id", False),
    "device id plus": (request(path="/v1/ingest/a+b"), {400}, "bad_device_id", False),
    "device id %23": (request(path="/v1/ingest/a%23"), {400}, "bad_device_id", False),
    "device id dollar": (request(path="/v1/ingest/$SYS"), {400}, "bad_device_id", False),
    "device id of 65": (request(path="/v1/ingest/" + "a" * 65), {400}, "bad_device_id", False),
    "device id not ASCII": (request(path="/v1/ingest/%C3%A9"), {400}, "bad_device_id", False),
    "device id broken UTF-8": (request(path="/v1/ingest/%FF"), {400}, "bad_device_id", False),
    "device id raw UTF-8": (request(path="/v1/ingest/\xc3\xa9"), {400}, None, None),
    "a blank in the path": (request(path="/v1/ingest/a b"), {400}, None, None),
    "GET": (request(b"", method="GET", length=None), {405}, "method_not_allowed", False),
    "PUT": (request(method="PUT"), {405}, "method_not_allowed", False),
    "DELETE": (request(b"", method="DELETE", length=None), {405}, "method_not_allowed", False),
    "OPTIONS": (request(b"", method="OPTIONS", length=None), {405}, "method_not_allowed", False),
    "TRACE": (request(b"", method="TRACE", length=None), {405}, "method_not_allowed", False),
    "a method of its own": (request(method="FROB"), {405}, "method_not_allowed", False),
    "a method in lower case": (request(method="post"), {405}, "method_not_allowed", False),
    "POST to a page": (request(path="/metrics"), {405}, "method_not_allowed", None),
    "CONNECT": (b"CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n", {404, 405}, None, None),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", {404}, None, None),
    # framing and size
    "no Content-Length": (request(length=None), {411}, "length_required", True),
    "chunked": (chunked(EVENT), {411}, "length_required", True),
    "chunked and cut": (chunked(EVENT, end=b""), {411}, "length_required", True),
    "chunks that are none": (
        request(b"zz\r\n", "Transfer-Encoding: chunked", length=None),
        {400, 411},
        None,
        True,
    ),
    "both lengths": (chunked(EVENT, length="Content-Length: 5"), {400, 411}, None, True),
    "both lengths, chunked first": (
        request(b"0\r\n\r\n", "Transfer-Encoding: chunked", "Content-Length: 5", length=None),
        {400, 411},
        None,
        True,
    ),
    "Transfer-Encoding gzip": (
        request(EVENT, "Transfer-Encoding: gzip"),
        {400, 411},
        None,
        True,
    ),
    "Transfer-Encoding twice": (
        request(b"0\r\n\r\n", "Transfer-Encoding: gzip", "Transfer-Encoding: chunked", length=None),
        {400, 411},
        None,
        True,
    ),
    "Transfer-Encoding on HTTP/1.0": (
        request(b"0\r\n\r\n", "Transfer-Encoding: chunked", length=None, version="HTTP/1.0"),
        {400, 411},
        None,
        True,
    ),
    "Content-Length above the limit": (
        request(length=f"Content-Length: {BODY_MAX + 1}"),
        {413},
        "body_too_large",
        True,
    ),
    "Content-Length of 20 digits": (
        request(length="Content-Length: 99999999999999999999"),
        {400, 413},
        None,
        True,
    ),
    "Content-Length of 19 digits": (
        request(length="Content-Length: 9999999999999999999"),
        {400, 413},
        None,
        True,
    ),
    "Content-Length negative": (request(length="Content-Length: -1"), {400}, None, True),
    "Content-Length with a plus": (request(length="Content-Length: +5"), {400}, None, True),
    "Content-Length hexadecimal": (request(length="Content-Length: 0x1b"), {400}, None, True),
    "Content-Length empty": (request(length="Content-Length: "), {400}, None, True),
    "Content-Length a list": (request(length="Content-Length: 27, 27"), {400}, None, True),
    "Content-Lengths that differ": (request(EVENT, "Content-Length: 5"), {400}, None, True),
    "Host missing": (request(host=None), {400}, "bad_request", True),
    "Host twice": (request(EVENT, "Host: i"), {400}, "bad_request", True),
    "Host not ASCII": (request(host="Host: \xe9"), {400}, "bad_request", True),
    "Host missing on a page": (
        b"GET /readyz HTTP/1.1\r\n\r\n",
        {400},
        "bad_request",
        True,
    ),
    "NUL in a header": (request(EVENT, "X-A: a\0b"), {400}, None, True),
    "a blank before the colon": (request(EVENT, "X-A : b"), {400}, None, True),
    "a header without a colon": (request(EVENT, "X-A"), {400}, None, True),
    "a folded header": (request(EVENT, "X-A: b", " c"), {400}, None, True),
    "an empty header name": (request(EVENT, ": b"), {400}, None, True),
    "a head of 200 KB": (request(EVENT, "X-A: " + "a" * 200_000), {431}, None, True),
    "a path of 100 KB": (request(path="/v1/ingest/" + "a" * 100_000), {414, 431, 400}, None, None),
    "150 headers": (request(EVENT, *(f"X-{i}: b" for i in range(150))), {431}, None, True),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {CLOSE, 400, 404, 505}, None, True),
    "HTTP/3.0": (request(version="HTTP/3.0"), {400, 505, CLOSE}, None, True),
    "HTTP/0.9": (b"GET /readyz\r\n\r\n", {400, CLOSE}, None, True),
    "TLS client hello": (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
        {400, CLOSE},
        None,
        True,
    ),
    "random bytes": (bytes(range(256)) * 4, {400, CLOSE}, None, True),
    # media type, encoding, ack
    "media type missing": (request(media=None), {415}, "unsupported_media_type", False),
    "text/plain": (
        request(media="Content-Type: text/plain"),
        {415},
        "unsupported_media_type",
        False,
    ),
    "a form": (
        request(media="Content-Type: application/x-www-form-urlencoded"),
        {415},
        "unsupported_media_type",
        False,
    ),
    "charset UTF-16": (
        request(media="Content-Type: application/json; charset=utf-16"),
        {415},
        "unsupported_media_type",
        False,
    ),
    "charset Latin-1": (
        request(media='Content-Type: application/json; charset="iso-8859-1"'),
        {415},
        "unsupported_media_type",
        False,
    ),
    "media type not ASCII": (
        request(media="Content-Type: application/json\xe9"),
        {415},
        "unsupported_media_type",
        False,
    ),
    "Content-Encoding gzip": (
        request(EVENT, "Content-Encoding: gzip"),
        {400},
        "bad_encoding",
        False,
    ),
    "Content-Encoding unknown": (
        request(EVENT, "Content-Encoding: x"),
        {415},
        "unsupported_encoding",
        False,
    ),
    "Content-Encoding not ASCII": (
        request(EVENT, "Content-Encoding: \xe9"),
        {415},
        "unsupported_encoding",
        False,
    ),
    "Content-Encoding identity, gzip": (
        request(EVENT, "Content-Encoding: identity", "Content-Encoding: gzip"),
        {415},
        "unsupported_encoding",
        False,
    ),
    "ack unknown": (request(path="/v1/ingest/d?ack=never"), {400}, "unknown_ack", False),
    "ack empty": (request(path="/v1/ingest/d?ack="), {400}, "unknown_ack", False),
    "ack in capitals": (request(path="/v1/ingest/d?ack=ENQUEUE"), {400}, "unknown_ack", False),
    "ack with blanks": (request(path="/v1/ingest/d?ack=%20sink"), {400}, "unknown_ack", False),
    "ack twice": (request(path="/v1/ingest/d?ack=enqueue&ack=x"), {400}, "unknown_ack", False),
    "acks that differ": (
        request(path="/v1/ingest/d?ack=enqueue&ack=durable"),
        {400},
        "unknown_ack",
        False,
    ),
    "acks that differ, encoded": (
        request(path="/v1/ingest/d?%61ck=sink&ack=enqueue"),
        {400},
        "unknown_ack",
        False,
    ),
    "X-Acks that differ": (
        request(EVENT, "X-Ack: enqueue", "X-Ack: durable"),
        {400},
        "unknown_ack",
        False,
    ),
    "X-Ack a list": (request(EVENT, "X-Ack: enqueue, durable"), {400}, "unknown_ack", False),
    "X-Ack empty": (request(EVENT, "X-Ack:"), {400}, "unknown_ack", False),
    "X-Ack unknown": (request(EVENT, "X-Ack: x"), {400}, "unknown_ack", False),
    "X-Ack not ASCII": (request(EVENT, "X-Ack: \xe9"), {400}, "unknown_ack", False),
    # JSON: one row a class, the rest stands in test_validator.py
    "empty body": (request(b""), {400}, "malformed_json", False),
    "null": (request(b"null"), {400}, "not_an_object", False),
    "an array": (request(b"[]"), {400}, "empty_batch", False),
    "two documents": (request(EVENT + EVENT), {400}, "malformed_json", False),
    "a BOM": (request(b"\xef\xbb\xbf" + EVENT), {400}, "malformed_json", False),
    "UTF-16": (request(EVENT.decode().encode("utf-16")), {400}, "malformed_json", False),
    "NaN": (request(b'{"metrics":{"a":NaN}}'), {400}, None, False),
    "1e400": (request(b'{"metrics":{"a":1e400}}'), {400}, None, False),
    "a duplicate key": (request(b'{"metrics":{"a":1,"\\u0061":2}}'), {400}, "duplicate_key", False),
    "an unknown field": (request(b'{"metrics":{"a":1},"x":1}'), {400}, "unknown_field", False),
    "an unknown field of 3 KB": (
        request(b'{"metrics":{"a":1},"' + b"x" * 3000 + b'":1}'),
        {400},
        "unknown_field",
        False,
    ),
    "deep": (
        request(b'{"metrics":{"a":1},"payload":' + b"[" * 2000 + b"]" * 2000 + b"}"),
        {400},
        None,
        False,
    ),
}


def check(
    gateway: GatewayProcess, name: str, within_s: float = 3.0, row: conformance.Row | None = None
) -> None:
    """One case of TABLE, or what `row` says of it."""
    data, statuses, code, closes = TABLE[name]
    if row is not None:
        statuses, code, closes = set(row.statuses), row.code, None
    before = in_log(gateway)
    with Client(gateway.port) as client:
        client.send(data)
        answer = client.answer()
        assert (answer.status if answer else CLOSE) in statuses
        if answer is not None:
            if code is not None:
                assert answer.code == code
                assert json.loads(answer.body).keys() == {"code", "message", "field"}
                assert answer.header("content-type") == "application/json"
            if answer.status == 405:
                assert answer.header("allow") or row
            if closes is True:
                assert client.is_closed(within_s)
            elif closes is False:
                client.send(request(b"", path="/readyz", method="GET", length=None, media=None))
                after = client.answer()
                assert after is not None
                assert after.status == 200
    if row is not None and row.ends_worker:
        wait_for(gateway.is_ready, 3, "the worker is started again")
    assert (row is not None and row.accepts) or in_log(gateway) == before


@pytest.mark.parametrize("name", TABLE)
def test_hostile_input_gets_one_answer_or_a_close(
    gateway: GatewayProcess, name: str, request: pytest.FixtureRequest
) -> None:
    row = conformance.CASES.get(name) if door_of(request) == "robyn" else None
    if row is not None and not row.ends_worker:  # each death makes the next start later
        with pytest.raises((AssertionError, ValueError)):
            check(gateway, name, 0.2)
    check(gateway, name, row=row)


GOOD: dict[str, bytes] = {
    "plain": request(),
    "charset utf-8": request(media="Content-Type: application/json; charset=utf-8"),
    "charset in quotes": request(media='Content-Type: application/json;charset="UTF-8"'),
    "media type in capitals": request(media="Content-Type: Application/JSON"),
    "Content-Encoding identity": request(EVENT, "Content-Encoding: identity"),
    "ack in the query": request(path="/v1/ingest/d?ack=enqueue"),
    "ack in the header": request(EVENT, "X-Ack: enqueue"),
    "the query wins": request(EVENT, "X-Ack: sink", path="/v1/ingest/d?ack=enqueue"),
    "ack twice, the same": request(path="/v1/ingest/d?ack=enqueue&%61ck=enqueue"),
    "X-Ack twice, the same": request(EVENT, "X-Ack: enqueue", "X-Ack: enqueue"),
    "another query": request(path="/v1/ingest/d?a=b&&=c"),
    "device id of 64": request(path="/v1/ingest/" + "aZ09_-" * 10 + "abcd"),
    "device id percent-encoded": request(path="/v1/ingest/%64ev"),
    "absolute form": request(path="http://other/v1/ingest/d"),
    "HTTP/1.0": request(version="HTTP/1.0"),
    "HTTP/1.0 without Host": request(version="HTTP/1.0", host=None),
    "the same Content-Length twice": request(EVENT, f"Content-Length: {len(EVENT)}"),
    "a body at the limit": request(EVENT + b" " * (BODY_MAX - len(EVENT))),
    "bare LF line ends": request().replace(b"\r\n", b"\n"),
    "empty lines before it": b"\r\n\r\n" + request(),
    "Expect: 100-continue": request(EVENT, "Expect: 100-continue"),
    "an Upgrade that is not followed": request(EVENT, "Connection: Upgrade", "Upgrade: h2c"),
    "a second Host that Granian does not show": request(EVENT).replace(
        b"Host: h", b"Host: h\r\nHost: \xff"
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_input_is_accepted_once(
    gateway: GatewayProcess, name: str, request: pytest.FixtureRequest
) -> None:
    before, _ = in_log(gateway)
    row = conformance.CASES.get(name) if door_of(request) == "robyn" else None
    if row is not None:
        with Client(gateway.port) as client:
            client.send(GOOD[name])
            answer = client.answer()
        assert answer is not None
        assert answer.status in row.statuses
        assert 202 not in row.statuses
        assert in_log(gateway)[0] == before
        return
    with Client(gateway.port) as client:
        client.send(GOOD[name])
        answer = client.answer()
        assert answer is not None
        assert (answer.status, answer.body) == (202, b'{"ack":"enqueue"}')
        assert answer.header("x-ack") == "enqueue"
        assert answer.header("x-receipt")
        assert answer.header("x-duplicate") is None
        assert answer.header("x-log-used") is None, "less than half full"
    wait_for(lambda: in_log(gateway)[0] == before + 1, 3, "one event more")


def test_body_that_stalls_is_cut_at_the_deadline(gateway: GatewayProcess) -> None:
    before = in_log(gateway)
    with Client(gateway.port) as slow:
        slow.send(request(length="Content-Length: 100"))
        began = time.monotonic()
        assert gateway.post() == 202  # others are unharmed meanwhile
        answer = slow.answer()
        assert answer is not None
        assert (answer.status, answer.code) == (408, "body_timeout")
        assert DEADLINE_MS / 1000 * 0.9 <= time.monotonic() - began <= DEADLINE_MS / 1000 + 1
        assert slow.is_closed()
    wait_for(lambda: in_log(gateway)[0] == before[0] + 1, 3, "only the other event")


def test_body_that_trickles_is_cut_at_the_deadline(gateway: GatewayProcess) -> None:
    with Client(gateway.port) as slow:
        slow.send(request(b"", length="Content-Length: 1000"))
        began = time.monotonic()
        answer = None
        slow.socket.settimeout(0.02)
        while time.monotonic() - began < 5 and answer is None:
            try:
                slow.send(b" ")
                answer = slow.answer()
            except TimeoutError:
                pass
            except OSError:
                break
        assert time.monotonic() - began < DEADLINE_MS / 1000 + 1
        assert answer is None or answer.status == 408


def test_a_hundred_slow_bodies_do_not_slow_others(gateway: GatewayProcess) -> None:
    slow = [Client(gateway.port) for _ in range(100)]
    for client in slow:
        client.send(request(b"{", length="Content-Length: 50"))
    began = time.monotonic()
    assert [gateway.post() for _ in range(20)] == [202] * 20
    assert time.monotonic() - began < DEADLINE_MS / 1000
    for client in slow:
        answer = client.answer()
        assert answer is not None
        assert answer.status == 408
        client.close()


def test_truncated_body_is_not_accepted(gateway: GatewayProcess) -> None:
    before = in_log(gateway)
    with Client(gateway.port) as client:
        client.send(request(length=f"Content-Length: {len(EVENT) + 1}"))
        client.socket.shutdown(socket.SHUT_WR)
        answer = client.answer()
        assert answer is None or answer.status in (400, 408)
    with Client(gateway.port) as client:
        client.send(request()[:-1])
    assert in_log(gateway) == before


def test_pipelined_requests_are_answered_in_order(gateway: GatewayProcess) -> None:
    with Client(gateway.port) as client:
        client.send(request() + request(b"{}") + request(path="/x") + request())
        statuses = [answer.status for _ in range(4) if (answer := client.answer())]
    assert statuses == [202, 400, 404, 202]


def test_one_byte_segments_are_one_request(gateway: GatewayProcess) -> None:
    with Client(gateway.port) as client:
        for byte in request():
            client.send(bytes([byte]))
        answer = client.answer()
    assert answer is not None
    assert answer.status == 202


class FakeHeaders(dict[str, str]):
    """As a door gives them to `examine`, also where its server would not."""

    def get_all(self, key: str) -> list[str]:
        return [self[key]] if key in self else []


def test_length_beside_a_transfer_encoding_does_not_count() -> None:
    headers = FakeHeaders({"content-length": "5", "content-type": "application/json"})
    terms = http.Terms(10, http.DURABLE)
    assert http.examine(headers, "", terms) == (0, http.DURABLE)
    headers["transfer-encoding"] = "chunked"
    assert http.examine(headers, "", terms)[0] == http.LENGTH_REQUIRED


def test_smuggled_request_is_not_seen(gateway: GatewayProcess) -> None:
    before = in_log(gateway)
    inner = request(path="/v1/ingest/smuggled")
    with Client(gateway.port) as client:
        client.send(
            request(b"0\r\n\r\n" + inner, "Transfer-Encoding: chunked", length="Content-Length: 5")
        )
        answer = client.answer()
        assert answer is None or answer.status in (400, 411)
        assert client.is_closed()
    assert in_log(gateway) == before


@pytest.mark.parametrize("size", [BODY_MAX + 1, 200_000, 900_000])
def test_too_large_body_is_drained_so_that_the_answer_is_seen(
    gateway: GatewayProcess, size: int
) -> None:
    with Client(gateway.port) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that it must drain
        client.send(request(b" " * size))
        answer = client.answer()
        assert answer is not None
        assert (answer.status, answer.code) == (413, "body_too_large")
        assert client.is_closed()


def test_endless_body_is_cut(gateway: GatewayProcess) -> None:
    with Client(gateway.port) as client:
        client.send(request(b"", length="Content-Length: 1000000000"))
        sent, began = 0, time.monotonic()
        try:
            while time.monotonic() - began < 5:
                client.send(b" " * 65536)
                sent += 65536
        except OSError:
            pass
        assert time.monotonic() - began < 4
        assert sent < conformance.ENDLESS_BYTES_MAX[str(gateway.settings["http.server"])]


def test_refused_body_that_is_awaited_keeps_the_connection(gateway: GatewayProcess) -> None:
    with Client(gateway.port) as client:
        client.send(request(b"", length=f"Content-Length: {len(EVENT)}", media="Content-Type: a/b"))
        client.socket.settimeout(DEADLINE_MS / 4000)
        with pytest.raises(TimeoutError):
            client.answer()
        client.socket.settimeout(5)
        client.send(EVENT)
        answer = client.answer()
        assert answer is not None
        assert answer.status == 415
        client.send(request())
        answer = client.answer()
        assert answer is not None
        assert answer.status == 202


def test_idle_connections_do_not_keep_others_out(gateway: GatewayProcess) -> None:
    idle = [socket.create_connection(("127.0.0.1", gateway.port), 5) for _ in range(500)]
    try:
        assert gateway.post() == 202
    finally:
        for connection in idle:
            connection.close()


def test_client_that_goes_away_harms_nobody(gateway: GatewayProcess) -> None:
    for cut in (10, 60, len(request()) - 3):
        for _ in range(20):
            with Client(gateway.port) as client:
                client.send(request()[:cut])
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert gateway.post() == 202
    assert gateway.metric('gateway_events_refused_total{code="internal"}') == 0


def test_uploads_that_break_off_cost_no_memory(gateway: GatewayProcess) -> None:
    def private_kib() -> int:
        status = Path(f"/proc/{gateway.children()['worker'][0]}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0])

    def break_off(rounds: int) -> None:
        for _ in range(rounds):
            clients = [Client(gateway.port) for _ in range(50)]
            for client in clients:
                client.send(request(EVENT)[:-1])
            assert gateway.post() == 202  # by now their heads are read
            for client in clients:
                reset = struct.pack("ii", 1, 0)
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                client.socket.close()
            assert gateway.post() == 202

    break_off(10)
    before = private_kib()
    break_off(80)
    assert private_kib() - before < 4000, "4000 that are kept cost some 8 MiB"


def test_long_name_of_a_field_is_not_echoed_whole(gateway: GatewayProcess) -> None:
    body = b'{"metrics":{"a":1},"' + b"x" * 3000 + b'":1}'
    _, _, answer = gateway.request(
        "POST", "/v1/ingest/d", body, {"Content-Type": "application/json"}
    )
    assert len(json.loads(answer)["field"]) <= 129


def test_error_says_field_and_place(gateway: GatewayProcess) -> None:
    status, _, body = gateway.request(
        "POST", "/v1/ingest/d", b'{"metrics":{"Temp":1}}', {"Content-Type": "application/json"}
    )
    answer = json.loads(body)
    assert (status, answer["code"]) == (400, "bad_metric_key")
    assert answer["field"].startswith("metrics")
    assert "byte" in answer["message"]


@pytest.mark.parametrize("path", ["/readyz", "/ready", "/healthz", "/health", "/metrics"])
def test_pages_answer_get_and_head(gateway: GatewayProcess, path: str) -> None:
    status, _, body = gateway.request("GET", path)
    assert status == 200
    assert body
    status, headers, body = gateway.request("HEAD", path)
    assert (status, body) == (200, b"")
    status, headers, _ = gateway.request("DELETE", path)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_page_with_a_body_and_a_strange_accept_is_a_page(gateway: GatewayProcess) -> None:
    accept = "Accept: " + ",;q=;;" * 50
    with Client(gateway.port) as client:
        client.send(request(b"x" * 10, accept, path="/metrics", method="GET"))
        answer = client.answer()
        assert answer is not None
        assert answer.status == 200
    with Client(gateway.port) as client:
        client.send(chunked(b"x" * 10).replace(b"POST /v1/ingest/dev-1", b"GET /readyz"))
        answer = client.answer()
        assert answer is not None
        assert answer.status == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("POST", "/v1/ingest/d", b"x" * 4097, "http.body_bytes_max = 4096"),
        ("GET", "/v1/ingest/d", b"", "use POST"),
        ("POST", "/v1/ingest/d/", b"{}", "no slash behind it"),
        ("POST", "/healthz", b"{}", "use GET"),
        ("POST", "/v1/ingest/d", b'{"metrics":[1]}', "its metrics must be"),
    ],
)
def test_message_says_what_to_do(
    gateway: GatewayProcess, method: str, path: str, body: bytes, words: str
) -> None:
    answer = gateway.request(method, path, body, {"Content-Type": "application/json"})[2]
    assert words in json.loads(answer)["message"]


def test_full_log_is_503_until_there_is_room(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path) as gateway:
        body = b'{"metrics":{"a":1},"payload":"' + b"x" * 60_000 + b'"}'
        accepted = 0
        while (status := gateway.post(body=body)) == 202:
            accepted += 1
            assert accepted < 100
        began = time.monotonic()
        waits = set()
        for _ in range(30):
            status, headers, answer = gateway.request(
                "POST", "/v1/ingest/d", body, {"Content-Type": "application/json"}
            )
            assert (status, json.loads(answer)["code"]) == (503, "log_full")
            waits.add(int(headers["retry-after"]))
        assert (time.monotonic() - began) / 30 < 0.1
        assert len(waits) > 1, "Retry-After is jittered"
        assert waits <= set(range(30, 46)), "nothing drains: nobody knows for how long"
        assert wait_for(lambda: gateway.metric("gateway_events_accepted_total") == accepted, 3)
        ready = gateway.request("GET", "/readyz")
        assert ready[0] == 200, "a full log is no reason to send devices elsewhere: 503 says it"
        assert json.loads(ready[2])["ready"] is True
        health = gateway.health()
        assert health["status"] == "degraded"
        assert any("the log is full" in problem for problem in health["problems"])
        lines = [line for line in gateway.output().splitlines() if "the log is full" in line]
        assert len(lines) == 1, "an alarm, not a flood"
        assert " error worker-0 " in lines[0]


INJECTED = """
    import os, socket, sys, tempfile, threading
    from gateway import _log, process, worker
    from gateway.config import Config, MqttConfig
    from gateway.frontends import granian

    path = os.path.join(sys.argv[1], "gateway.log")
    _log.create(path, 1 << 20)
    fd = os.open(path, os.O_RDWR)
    log = _log.Log.open(path, fd, ["mqtt"])
    listener = socket.create_server(("127.0.0.1", 0))
    fds = fd, log.shared_fd, listener.fileno()
    launch = process.Launch("worker-0", 0, os.getppid(), *fds, Config(), process.Recovered())

    class Broken:
        field = offset = None
        def event(self, *_): raise RuntimeError("injected \\n\\x1b[31m")
        def refuse(self, *_): pass
        def close(self): pass

    app = worker.App(log, launch)
    app.ingest.close()
    app.ingest = Broken()
    app.pages["/readyz"] = lambda accept: 1 / 0
    process.logs.set_up("info", "worker-0")
    print(listener.getsockname()[1], flush=True)
    granian.Door(app, listener.fileno()).serve()
    os._exit(0)
"""


def test_exception_in_the_handler_is_a_500_with_a_body_and_one_log_line(tmp_path: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INJECTED), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert worker.stdout is not None
        port = int(worker.stdout.readline())
        for data in (request(), request(b"", path="/readyz", method="GET", length=None), request()):
            with Client(port) as client:
                client.send(data)
                answer = client.answer()
                assert answer is not None
                assert (answer.status, answer.code) == (500, "internal")
        worker.terminate()
        _, errors = worker.communicate(timeout=10)
    finally:
        worker.kill()
        worker.wait()
    lines = [line for line in errors.decode().splitlines() if "internal error" in line]
    assert len(lines) == 1, "once a second, not once a request"
    assert "RuntimeError: injected" in lines[0]
    assert "\x1b" not in errors.decode()


def test_every_row_of_the_differences_is_a_case() -> None:
    assert conformance.CASES.keys() <= TABLE.keys() | GOOD.keys()
    files = ("http", "acks", "batches", "robyn")
    text = "".join((ROOT / "tests" / f"test_{name}.py").read_text() for name in files)
    for name, row in conformance.TESTS.items():
        assert f"def {name}(" in text
        assert f"def {row.instead}(" in text or row.instead in conformance.CASES


def test_the_document_has_the_table_of_differences() -> None:
    text = (ROOT / "docs" / "front-doors.md").read_text()
    begin, end = "<!-- python -m tests.conformance -->\n", "\n<!-- end -->"
    assert text.partition(begin)[2].partition(end)[0] == conformance.markdown()
