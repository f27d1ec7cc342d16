"""What the Robyn door does where tests/test_http.py cannot ask both doors the same: cuts, memory,
death, drain, roll, and what it must not do beside."""

import gzip
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import Exit
from tests.gateway_process import EVENT, GatewayProcess, Valve, cpu_s, wait_for
from tests.raw_http import Client, request

DEADLINE_MS = 400
JSON = {"Content-Type": "application/json"}
ROBYN = {"http.server": "robyn"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    settings = {**ROBYN, "http.body_deadline_ms": DEADLINE_MS, "http.body_bytes_max": 4096}
    with GatewayProcess(tmp_path_factory.mktemp("robyn"), settings) as gateway:
        yield gateway


def accepted(gateway: GatewayProcess) -> float:
    return gateway.metric("gateway_events_accepted_total")


def worker(gateway: GatewayProcess) -> int:
    return gateway.children()["worker"][0]


# ---- what a request gets -------------------------------------------------------------------------


@pytest.mark.parametrize("ack", ["durable", "sink"])
def test_acknowledgements_are_awaited(tmp_path: Path, ack: str) -> None:
    with Valve() as broker:
        settings = {**ROBYN, "mqtt.url": f"mqtt://127.0.0.1:{broker.port}"}
        with GatewayProcess(tmp_path, settings) as gateway:
            with Client(gateway.port) as waiting:
                waiting.send(request(path=f"/v1/ingest/d?ack={ack}"))
                if ack == "sink":
                    assert waiting.is_silent(0.3)
                    assert gateway.post() == 202  # the thread that reads is free meanwhile
                    broker.allowed = 2
                answer = waiting.answer()
                assert answer is not None
                assert (answer.status, answer.json["ack"]) == (
                    202 if ack == "durable" else 200,
                    ack,
                )


def test_ack_that_never_comes_is_a_504_in_time(tmp_path: Path) -> None:
    settings = {**ROBYN, "http.sink_deadline_ms": 1500, "http.body_deadline_ms": 100}
    with GatewayProcess(tmp_path, settings) as gateway:
        status, headers, body = gateway.request("POST", "/v1/ingest/d?ack=sink", EVENT, JSON)
        assert (status, json.loads(body)["code"]) == (504, "accepted_pending")
        assert headers["x-receipt"]
        assert gateway.metric('gateway_events_refused_total{code="internal"}') == 0


def test_batches_and_compressed_bodies_are_taken(gateway: GatewayProcess) -> None:
    lines = b"\n".join(b'{"metrics":{"a":%d}}' % i for i in range(500))
    before = accepted(gateway)
    ndjson = {"Content-Type": "application/x-ndjson"}
    status, _, body = gateway.request("POST", "/v1/ingest/d", lines, ndjson)
    assert (status, json.loads(body)["accepted"]) == (202, 500)
    many = b'[{"device_id":"a","metrics":{"a":1}},{"device_id":"b","metrics":{"a":1}},{}]'
    status, _, body = gateway.request("POST", "/v1/ingest", many, JSON)
    assert (status, json.loads(body)["accepted"], json.loads(body)["refused"]) == (207, 2, 1)
    zipped = {**JSON, "Content-Encoding": "gzip"}
    assert gateway.request("POST", "/v1/ingest/d", gzip.compress(EVENT), zipped)[0] == 202
    assert accepted(gateway) - before == 503


def test_body_that_is_not_utf8_is_refused(gateway: GatewayProcess) -> None:
    status, _, body = gateway.request("POST", "/v1/ingest/d", b'{"metrics":{"\xff":1}}', JSON)
    assert status == 400
    assert json.loads(body)["code"] != "internal"


def test_what_is_stored_is_what_was_sent(tmp_path: Path) -> None:
    body = '{ "metrics" : {"a":1} ,\r\n"payload":"é\\u00e9\\u0000 \U0001f600"}'.encode()
    with GatewayProcess(tmp_path, ROBYN) as gateway:
        assert gateway.post(body=body) == 202
        assert body in (tmp_path / "log" / "gateway.log").read_bytes()


def test_multipart_comes_to_nothing(gateway: GatewayProcess) -> None:
    before = accepted(gateway)
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + EVENT + b"\r\n--x--\r\n"
    assert gateway.request("POST", "/v1/ingest/d", part, form)[0] == 415
    assert gateway.request("POST", "/v1/ingest/d", EVENT, form)[0] == 500
    assert accepted(gateway) == before


def test_both_lengths_are_refused_and_chunked_wins(gateway: GatewayProcess) -> None:
    before = accepted(gateway)
    inner = request(path="/v1/ingest/behind")
    both = request(b"0\r\n\r\n", "Transfer-Encoding: chunked", length="Content-Length: 5")
    with Client(gateway.port) as client:
        client.send(both + inner)
        statuses = [answer.status for _ in range(2) if (answer := client.answer())]
    assert statuses == [411, 202]
    assert accepted(gateway) == before + 1


@pytest.mark.parametrize("size", [4097, 200_000, 900_000])
def test_too_large_body_is_refused_when_it_is_here(gateway: GatewayProcess, size: int) -> None:
    with Client(gateway.port) as client:
        client.send(request(b" " * size))
        answer = client.answer()
        assert answer is not None
        assert (answer.status, answer.code) == (413, "body_too_large")


def test_upgrade_to_a_websocket_is_not_followed(gateway: GatewayProcess) -> None:
    with Client(gateway.port) as client:
        client.send(request(EVENT, "Connection: Upgrade", "Upgrade: websocket"))
        client.socket.shutdown(socket.SHUT_WR)
        answer = client.answer()
        assert answer is None or answer.status == 202


def test_connect_is_ended(gateway: GatewayProcess) -> None:
    with Client(gateway.port) as client:
        client.send(b"CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n")
        answer = client.answer()
        assert answer is None or answer.status in (404, 405)


def test_head_that_stalls_is_cut_at_the_deadline(gateway: GatewayProcess) -> None:
    with Client(gateway.port) as client:
        client.send(b"POST /v1/ingest/d HTTP/1.1\r\nHost:")
        began = time.monotonic()
        assert client.is_closed()
        assert time.monotonic() - began < DEADLINE_MS / 1000 + 1


def test_idle_connection_lives_longer_than_a_body_may_take(gateway: GatewayProcess) -> None:
    with Client(gateway.port) as client:
        for _ in range(2):
            client.send(request())
            answer = client.answer()
            assert answer is not None
            assert answer.status == 202
            assert client.is_silent(DEADLINE_MS / 1000 * 2)


def test_large_bodies_are_cut_and_memory_is_bounded(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, {**ROBYN, "http.batches_bytes_max": "1MiB"}) as gateway:
        pid = worker(gateway)
        sent = []

        def pour() -> None:
            total = 0
            with Client(gateway.port) as client:
                client.send(request(b"", length="Content-Length: 4000000000"))
                try:
                    while total < 4_000_000_000:
                        client.send(b" " * (1 << 18))
                        total += 1 << 18
                except OSError:
                    pass
            sent.append(total)

        threads = [threading.Thread(target=pour) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        status = Path(f"/proc/{pid}/status").read_text()
        peak_mib = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        print("sent MiB", [n >> 20 for n in sent], "peak MiB", peak_mib)
        assert len(sent) == 4
        assert peak_mib < 512
        assert gateway.post() == 202
        assert worker(gateway) == pid


def test_large_bodies_share_a_limit(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, {**ROBYN, "http.batches_bytes_max": "1MiB"}) as gateway:
        part = request(b" " * 900_000, length="Content-Length: 1000000")
        began = time.monotonic()
        with Client(gateway.port) as first, Client(gateway.port) as second:
            first.send(part)
            second.send(part + b" " * 1000)
            answer = second.answer()  # the larger one goes
            assert answer is not None
            assert (answer.status, answer.code) == (408, "body_timeout")
            first.send(b" " * 100_000)
            answer = first.answer()
            assert answer is not None
            assert (answer.status, answer.code) == (413, "body_too_large")
        assert time.monotonic() - began < 4, "long before the deadline of a body"


def test_no_pages_but_ours(gateway: GatewayProcess) -> None:
    for path in ("/openapi.json", "/robyn", "/mcp"):
        status, headers, _ = gateway.request("GET", path)
        assert (status, headers["content-type"]) == (404, "application/json")
    assert b"/docs/init.js" in gateway.request("GET", "/docs")[2]


def test_strangers_write_no_log_lines(gateway: GatewayProcess) -> None:
    for noise in (b"\x16\x03\x01 noise\r\n\r\n", request(EVENT, "Content-Length: 5")):
        with Client(gateway.port) as client:
            client.send(noise)
            client.answer()
    assert "actix" not in gateway.output()
    assert "\x1b" not in gateway.output()


# ---- processes -----------------------------------------------------------------------------------


def test_worker_is_one_process_and_quiet(gateway: GatewayProcess) -> None:
    pid = worker(gateway)
    assert not Path(f"/proc/{pid}/task/{pid}/children").read_text()
    wait_for(lambda: gateway.post() == 202)
    before = cpu_s(pid)
    time.sleep(1)
    assert cpu_s(pid) - before < 0.1
    assert "Starting server" not in gateway.output()


def test_killed_worker_is_back_within_two_seconds(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, ROBYN) as gateway:
        assert gateway.post() == 202
        os.kill(worker(gateway), signal.SIGKILL)
        began = time.monotonic()
        wait_for(gateway.is_ready, 5)
        assert time.monotonic() - began < 2
        assert gateway.post() == 202
        assert accepted(gateway) == 2


def test_malformed_chunk_costs_the_worker_and_nothing_else(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, {**ROBYN, "http.drain_deadline_ms": 0}) as gateway:
        assert gateway.post() == 202
        for _ in range(3):  # it dies young each time, and the gateway goes on
            with Client(gateway.port) as client:
                client.send(request(b"zz\r\n", "Transfer-Encoding: chunked", length=None))
                assert client.answer() is None
            wait_for(gateway.is_ready, 3)
        assert gateway.post() == 202
        assert accepted(gateway) == 2
        assert "was killed by SIGABRT" in gateway.output()
        assert gateway.stop() == 0


def test_sigterm_answers_what_waits(tmp_path: Path) -> None:
    settings = {**ROBYN, "http.drain_deadline_ms": 300, "http.sink_deadline_ms": 5000}
    with GatewayProcess(tmp_path, settings) as gateway:
        with Client(gateway.port) as waiting, Client(gateway.port) as slow:
            waiting.send(request(path="/v1/ingest/d?ack=sink"))
            slow.send(request(length="Content-Length: 100"))
            wait_for(lambda: gateway.health()["worker"]["waiting"] == 1)
            assert gateway.process is not None
            gateway.process.terminate()
            answer = waiting.answer()
            if answer is not None:  # now and then Robyn closes first, which says the same: unknown
                assert (answer.status, answer.code) == (504, "accepted_pending")
            answer = slow.answer()
            if answer is not None:
                assert (answer.status, answer.code) == (503, "draining")
        assert gateway.process.wait(10) == 0


def test_rolling_restart_keeps_every_event(tmp_path: Path) -> None:
    """A request that crosses the end of its idle connection sees a close; sent again, it is in."""
    settings = {**ROBYN, "http.workers": 2, "log.capacity_bytes": 8 << 20}
    with GatewayProcess(tmp_path, settings) as gateway:
        old = set(gateway.children()["worker"])
        counts = {"in": 0, "closed": 0, "wrong": 0}
        done = threading.Event()

        def send(name: str) -> None:
            client, seq = Client(gateway.port), 0
            while not done.is_set():
                seq += 1
                body = b'{"metrics":{"a":1},"seq":%d}' % seq
                while True:
                    try:
                        client.send(request(body, path=f"/v1/ingest/{name}"))
                        answer = client.answer()
                    except OSError:
                        answer = None
                    if answer is not None:
                        break
                    client.close()
                    client = Client(gateway.port)
                    counts["closed"] += 1
                counts["in" if answer.status == 202 else "wrong"] += 1
                time.sleep(0.005)
            client.close()

        threads = [threading.Thread(target=send, args=(f"d{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        os.kill(gateway.pid, signal.SIGHUP)
        try:
            wait_for(
                lambda: len(pids := set(gateway.children()["worker"])) == 2 and not pids & old,
                20,
                gateway.output,
            )
        finally:
            done.set()
            for thread in threads:
                thread.join()
        print(counts)
        assert counts["wrong"] == 0
        assert counts["closed"] <= 2 * len(threads)
        assert accepted(gateway) == counts["in"]


def test_second_gateway_finds_the_port_taken(gateway: GatewayProcess, tmp_path: Path) -> None:
    other = GatewayProcess(tmp_path, {**ROBYN, "http.port": gateway.port}).start(ready=False)
    assert other.process is not None
    assert other.process.wait(10) == Exit.PORT_BUSY, other.output()
