"""/metrics: the names that are promised, a number of series that input cannot change, both formats
(guarantee 5, 23)."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from gateway import _log, books, metrics
from gateway.process import Recovered
from gateway.settings import MQTT
from tests.gateway_process import EVENT, GatewayProcess, wait_for

PROMISED = (
    "gateway_events_received_total",
    "gateway_events_accepted_total",
    "gateway_events_published_total",
    "gateway_events_dead_lettered_total",
    "gateway_log_bytes_used",
    "gateway_log_capacity_bytes",
    "gateway_unexplained_events",
    "gateway_log_syncs_total",
    "gateway_log_sync_seconds_total",
    "gateway_mqtt_connected",
    "gateway_mqtt_throttled_seconds_total",
    "gateway_mqtt_in_flight",
    "gateway_request_seconds_count",
    "gateway_receipt_to_puback_seconds_count",
    'gateway_process_restarts_total{process="worker"}',
    'gateway_process_restarts_total{process="delivery"}',
    'gateway_log_state{state="running"}',
    'gateway_events_refused_total{code="log_full"}',
    "gateway_events_duplicates_total",
    'gateway_acks_total{ack="durable"}',
    'gateway_acks_total{ack="sink"}',
    'gateway_acks_total{ack="pending"}',
    'gateway_acks_total{ack="dead_lettered"}',
    "gateway_ack_seconds_count",
    "gateway_dedupe_window_seconds",
    "gateway_dedupe_window_bytes",
    "gateway_oldest_unpublished_seconds",
    "gateway_log_drain_bytes_per_second",
    "gateway_log_sync_running_seconds",
    "gateway_dead_letter_bytes",
    "gateway_delivery_killed_hung_total",
    *(
        f'gateway_sink_{name}{{sink="{sink}"}}'
        for name in (
            *("events_confirmed_total", "events_skipped_total", "lag_events", "lag_bytes"),
            *("lag_seconds", "unexplained_events", "up", "required"),
        )
        for sink in ("mqtt", "file")
    ),
    *(
        f"gateway_file_{name}_total"
        for name in ("bytes", "syncs", "sync_seconds", "finished", "removed", "write_failures")
    ),
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("metrics")
    settings = {"mqtt.url": "embedded", "http.workers": 2, "file.directory": folder / "files"}
    with GatewayProcess(folder, settings) as gateway:
        yield gateway


@pytest.fixture
def log(tmp_path: Path) -> Iterator[_log.Log]:
    import os

    path = str(tmp_path / "gateway.log")
    _log.create(path, _log.CAPACITY_MIN)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    log = _log.Log.open(path, fd, [MQTT])
    yield log
    log.close()
    os.close(fd)


def samples(log: _log.Log) -> dict[str, float]:
    text = metrics.Exposition(log, Recovered(1, 2, 3)).render(None)[1].decode()
    rows = (line.rpartition(" ") for line in text.splitlines() if line[0] != "#")
    return {name: float(value) for name, _, value in rows}


def test_promised_names_are_there(gateway: GatewayProcess) -> None:
    found = gateway.metrics()
    assert [name for name in PROMISED if name not in found] == []


def test_number_of_series_does_not_depend_on_input(gateway: GatewayProcess) -> None:
    before = gateway.metrics().keys()
    for number in range(30):
        gateway.post(f"device-{number}")
        gateway.post(f"device-{number}", b'{"x%d":1}' % number)
        gateway.request("GET", f"/path-{number}?q={number}")
        gateway.request(f"METHOD{number}", "/metrics")
        gateway.request("GET", f"/v1/receipts/{number}")
        gateway.post(f"device-{number}", b'{"metrics":{},"seq":%d,"boot":%d}' % (number, number))
    assert gateway.metrics().keys() == before


def test_books_balance_over_all_workers(gateway: GatewayProcess) -> None:
    before = gateway.metrics()
    for _ in range(50):
        assert gateway.post() == 202

    def arrived() -> bool:
        now = gateway.metrics()
        return (
            now["gateway_events_published_total"] == before["gateway_events_published_total"] + 50
        )

    wait_for(arrived, 5)
    now = gateway.metrics()
    assert now["gateway_events_accepted_total"] == before["gateway_events_accepted_total"] + 50
    assert now["gateway_events_received_total"] == before["gateway_events_received_total"] + 50
    assert now["gateway_unexplained_events"] == 0
    assert now["gateway_events_waiting"] == 0
    assert now["gateway_mqtt_connected"] == 1
    waits = "gateway_receipt_to_puback_seconds_count"
    assert now[waits] >= before[waits] + 50


def test_each_refusal_is_counted_under_its_code(gateway: GatewayProcess) -> None:
    def counts(code: str) -> float:
        return gateway.metric(f'gateway_events_refused_total{{code="{code}"}}')

    before = {code: counts(code) for code in ("malformed_json", "not_found", "length_required")}
    gateway.post(body=b"{")
    gateway.request("GET", "/nope")
    gateway.request("POST", "/v1/ingest/d", None, {"Transfer-Encoding": "chunked"})
    assert {code: counts(code) - value for code, value in before.items()} == dict.fromkeys(
        before, 1
    )


def test_both_formats_parse(gateway: GatewayProcess) -> None:
    status, headers, body = gateway.request("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert len(list(prometheus(body.decode()))) > 20
    status, headers, body = gateway.request(
        "GET", "/metrics", None, {"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert len(list(open_metrics(body.decode()))) > 20


def test_every_help_says_something(gateway: GatewayProcess) -> None:
    text = gateway.request("GET", "/metrics")[2].decode()
    assert re.findall(r"^# HELP (\S+) *$", text, re.MULTILINE) == []


def test_counters_of_all_processes_are_added_up(log: _log.Log) -> None:
    for block in (0, 1, _log.WORKERS_MAX - 1, _log.BLOCK_DELIVERY):
        log.counter_add(block, _log.COUNTERS["received"], 10)
    assert samples(log)["gateway_events_received_total"] == 40


def test_histogram_is_cumulative_in_seconds(log: _log.Log) -> None:
    for ns in (50_000, 100_000, 300_000, 10**18):
        log.observe(0, _log.COUNTERS["request_ns"], ns)
    found = samples(log)
    assert found['gateway_request_seconds_bucket{le="0.0001"}'] == 2
    assert found['gateway_request_seconds_bucket{le="0.0005"}'] == 3
    assert found['gateway_request_seconds_bucket{le="86400.0"}'] == 3
    assert found['gateway_request_seconds_bucket{le="+Inf"}'] == 4
    assert found["gateway_request_seconds_sum"] == pytest.approx(1e9, rel=1e-3)


def test_bytes_used_grow_with_what_is_accepted(log: _log.Log) -> None:
    ingest = _log.Ingest(log, 0)
    before = samples(log)["gateway_log_bytes_used"]
    assert ingest.event("dev-1", EVENT, _log.now_ns()) == 0
    now = samples(log)
    assert now["gateway_log_bytes_used"] > before
    assert now["gateway_log_uncommitted_bytes"] == now["gateway_log_bytes_used"] - before
    ingest.close()


def test_skipped_record_is_unexplained(log: _log.Log) -> None:
    ingest = _log.Ingest(log, 0)
    for _ in range(3):
        assert ingest.event("dev-1", EVENT, _log.now_ns()) == 0
    end = log.follow(log.cursor(0).lsn, 0)
    cursor = log.cursor(0)
    log.set_cursor(
        0, cursor._replace(lsn=end, ordinal=cursor.ordinal + 3, published=cursor.published + 2)
    )
    assert samples(log)["gateway_unexplained_events"] == 1
    ingest.close()


def test_a_refusal_in_between_does_not_take_the_field_from_an_answer(log: _log.Log) -> None:
    ingest = _log.Ingest(log, 0)
    try:
        ingest.event("dev", b'{"metrics":{"a":"x"}}', _log.now_ns())
        ingest.refuse(_log.CODES.index("body_timeout"), _log.now_ns())  # the main thread cuts
        assert (ingest.field, ingest.offset) == ("metrics.a", 16)
    finally:
        ingest.close()


def test_what_recovery_found_is_shown(log: _log.Log) -> None:
    found = samples(log)
    assert found["gateway_log_recovered_torn_bytes"] == 2
    assert found["gateway_log_recovered_corrupt_bytes"] == 3


def test_pages_asked_for_again_and_again_are_made_once(log: _log.Log) -> None:
    shown = metrics.Exposition(log, Recovered())
    first = shown.render(None)
    assert shown.render(None) is first
    openmetrics = "application/openmetrics-text; version=1.0.0; q=0.%d"
    made = {id(shown.render(openmetrics % q)[1]) for q in range(100)}
    assert len(made) <= metrics.PAGES_MAX
    time.sleep(metrics.FRESH_S)
    assert shown.render(None) is not first


def test_window_is_what_the_ring_holds(log: _log.Log) -> None:
    found = samples(log)
    assert found["gateway_dedupe_window_seconds"] == found["gateway_dedupe_window_bytes"] == 0
    ingest = _log.Ingest(log, 0)
    try:
        assert ingest.event("dev-1", EVENT, _log.now_ns()) == 0
        log.follow(0, 0)
        time.sleep(0.02)
        found = samples(log)
        assert 0.02 <= found["gateway_dedupe_window_seconds"] < 10
        assert found["gateway_dedupe_window_bytes"] == found["gateway_log_bytes_used"] > 0
        lsn = log.cursor(0).lsn
        for _ in range(60):  # twice around the ring
            assert ingest.event("dev-1", EVENT + b" " * 40_000, _log.now_ns()) == 0
            committed = log.follow(lsn, 0)
            log.set_cursor(0, log.cursor(0)._replace(lsn=committed))
            log.sync()
        found = samples(log)
        capacity = log.capacity_bytes
        assert capacity - 2 * 41_000 < found["gateway_dedupe_window_bytes"] <= capacity
    finally:
        ingest.close()


def test_oldest_unpublished_is_that_of_the_cursor(log: _log.Log) -> None:
    ingest = _log.Ingest(log, 0)
    try:
        assert samples(log)["gateway_oldest_unpublished_seconds"] == 0
        assert ingest.event("dev-1", EVENT, _log.now_ns()) == 0
        log.follow(0, 0)
        time.sleep(0.05)
        assert ingest.event("dev-1", EVENT, _log.now_ns()) == 0
        log.follow(0, 0)
        assert 0.05 <= samples(log)["gateway_oldest_unpublished_seconds"] < 10
        first = log.read(log.cursor(0).lsn)
        assert first is not None
        log.set_cursor(0, log.cursor(0)._replace(lsn=first.lsn + first.size))
        second = samples(log)["gateway_oldest_unpublished_seconds"]
        log.set_cursor(0, log.cursor(0)._replace(lsn=log.committed))
        assert second > samples(log)["gateway_oldest_unpublished_seconds"] == 0
    finally:
        ingest.close()


class Holes:
    """A log whose cursor stands at holes that were filled, or at what was written over."""

    def __init__(self, pads: int, lapped: bool = False) -> None:
        self._pads, self._lapped = pads, lapped

    def sink(self, name: str) -> int:
        return 0

    def cursor(self, sink: int) -> _log.Cursor:
        return _log.Cursor(64, 0, 0, 0)

    def read(self, lsn: int) -> _log.Record | None:
        if self._lapped:
            raise _log.LogCorrupt("no whole record")
        if lsn < 64 + 64 * self._pads:
            return _log.Record(lsn, 64, 1, _log.PAD, 0, 0, None, None, "", b"")
        at_ns = time.time_ns() - 5_000_000_000
        return _log.Record(lsn, 64, 1, _log.DATA, 0, at_ns, None, None, "dev", EVENT)


@pytest.mark.parametrize(
    ("log", "seconds"),
    [(Holes(0), 5), (Holes(3), 5), (Holes(10_000), 0), (Holes(0, lapped=True), 0)],
)
def test_holes_are_not_the_oldest_event(log: Any, seconds: float) -> None:
    assert books.oldest_waiting_s(log, 0) == pytest.approx(seconds, abs=1)


def test_sync_that_runs_is_timed(log: _log.Log) -> None:
    assert samples(log)["gateway_log_sync_running_seconds"] == 0
    since = _log.COUNTERS["sync_since_ns"]
    log.counter_set(_log.BLOCK_DELIVERY, since, _log.now_ns() - 3_000_000_000)
    assert 3 <= samples(log)["gateway_log_sync_running_seconds"] < 10


def test_ack_histogram_is_its_own(log: _log.Log) -> None:
    log.observe(0, _log.COUNTERS["ack_ns"], 2_000_000)
    found = samples(log)
    assert found["gateway_ack_seconds_count"] == 1
    assert found["gateway_request_seconds_count"] == 0
