"""/healthz says in words what is wrong, /readyz whether events are taken; a full log says when to
come back. One worker's answers, without its server."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import _log, http, process, worker
from gateway.config import Config, HttpConfig, LogConfig
from gateway.errors import ConfigError
from gateway.mqtt import LinkStatus
from gateway.settings import MIB
from tests.gateway_process import EVENT, wait_for

CAPACITY = _log.CAPACITY_MIN


class Worker:
    """An App over a log that this process plays the supervisor and the delivery process of."""

    def __init__(self, folder: Path, sinks: Sequence[str] = ("mqtt",)) -> None:
        path = str(folder / "gateway.log")
        _log.create(path, CAPACITY)
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.log = _log.Log.open(path, self.fd, sinks)
        self.log.set_water(CAPACITY * 95 // 100, CAPACITY * 90 // 100)
        self.folder = folder
        log = LogConfig(directory=str(folder), capacity_bytes=CAPACITY)
        config = Config(http=HttpConfig(body_bytes_max=MIB // 16), log=log)
        launch = process.Launch(
            "worker-0", 0, 0, self.fd, self.log.shared_fd, -1, config, process.Recovered()
        )
        self.app = worker.App(self.log, launch)

    def link(self, state: str, connected: bool) -> None:
        (self.folder / "mqtt-status.json").write_text(json.dumps({"state": state}))
        gauge = _log.COUNTERS["mqtt_connected"]
        self.log.counter_set(_log.BLOCK_DELIVERY, gauge, int(connected))

    def count(self, name: str, value: int, block: int = _log.BLOCK_DELIVERY) -> None:
        self.log.counter_set(block, _log.COUNTERS[name], value)

    def health(self) -> dict[str, Any]:
        answer = self.app.page("/healthz", "GET", None)
        assert answer is not None
        health: dict[str, Any] = json.loads(answer.body)
        return health

    @property
    def problems(self) -> str:
        return "; ".join(self.health()["problems"])

    def ready(self) -> tuple[int, dict[str, Any]]:
        answer = self.app.page("/readyz", "GET", None)
        assert answer is not None
        return answer.status, json.loads(answer.body)

    def fill(self) -> http.Answer:
        """Events until one is refused; that refusal's answer."""
        body = EVENT + b" " * 20_000
        while not (code := self.app.ingest.event("dev", body, _log.now_ns())):
            pass
        assert code == http.LOG_FULL
        return self.app.refused(code, self.app.ingest)

    def empty(self) -> None:
        """All of it is published, and persisted."""
        self.log.follow(0, 0)
        ordinal = self.log.committed_ordinal
        self.log.set_cursor(0, _log.Cursor(self.log.committed, ordinal, ordinal, 0))
        self.log.sync()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Worker]:
    site = Worker(tmp_path)
    site.link("connected", True)
    yield site
    site.app.close()
    site.log.close()
    os.close(site.fd)


def test_all_is_well(site: Worker) -> None:
    health = site.health()
    assert (health["status"], health["problems"]) == ("ok", [])
    assert health["worker"]["waiting"] == 0
    assert health["restarts"] == {"worker": 0, "delivery": 0, "delivery_hung": 0}
    assert site.ready() == (200, {"ready": True, "state": "running"})


def test_a_full_log_is_a_problem_and_no_reason_to_go_elsewhere(site: Worker) -> None:
    site.fill()
    assert "the log is full (9" in site.problems
    assert site.health()["status"] == "degraded"
    assert site.ready() == (200, {"ready": True, "state": "full"})
    site.empty()
    assert site.problems == ""
    assert site.ready() == (200, {"ready": True, "state": "running"})


def test_a_long_fdatasync_is_a_problem(site: Worker) -> None:
    site.count("sync_since_ns", _log.now_ns() - 500_000_000)
    assert site.problems == ""
    site.count("sync_since_ns", _log.now_ns() - 2_500_000_000)
    assert "an fdatasync has been running for 2.5 s" in site.problems


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("held", "publishing is held: an event is refused"),
        ("dead_letters_full", "the dead-letter files are full: publishing stops"),
    ],
)
def test_publishing_that_is_held_is_a_problem(site: Worker, state: str, words: str) -> None:
    site.link(state, True)
    assert words in site.problems
    site.link(state, False)
    assert words not in site.problems, "who wrote that is gone"
    assert "not connected to the broker" in site.problems


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("refused", "the broker refuses the connection"),
        ("taken_over", "another client has taken over this client id"),
        ("waiting", "not connected to the broker"),
    ],
)
def test_a_problem_with_the_broker_says_which(site: Worker, state: str, words: str) -> None:
    site.link(state, False)
    assert words in site.problems


def test_a_delivery_process_that_hung_is_a_problem_for_a_while(
    site: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.count("killed_hung", 2, _log.BLOCK_SUPERVISOR)
    assert "hung and was killed (2 since" in site.problems
    assert site.health()["restarts"]["delivery_hung"] == 2
    monkeypatch.setattr(worker, "RECENT_S", 0.0)
    assert site.problems == ""
    assert site.health()["restarts"]["delivery_hung"] == 2


def test_a_worker_that_starts_does_not_complain_of_what_was_long_ago(tmp_path: Path) -> None:
    first = Worker(tmp_path)
    first.link("connected", True)
    first.count("killed_hung", 1, _log.BLOCK_SUPERVISOR)
    launch = process.Launch(
        *("worker-1", 1, 0, first.fd, first.log.shared_fd, -1, first.app.config),
        process.Recovered(),
    )
    second = worker.App(first.log, launch)
    answer = second.page("/healthz", "GET", None)
    assert answer is not None
    assert json.loads(answer.body)["problems"] == []
    second.close()
    first.app.close()


# ---- Retry-After ---------------------------------------------------------------------------------


def waits(site: Worker, answers: int = 300) -> set[int]:
    site.app._full_until_s = 0.0
    found = set()
    for _ in range(answers):
        answer = site.app.refused(http.LOG_FULL, site.app.ingest)
        assert (answer.status, json.loads(answer.body)["code"]) == (503, "log_full")
        found.add(int(dict(answer.headers)["retry-after"]))
    return found


@pytest.mark.parametrize(
    ("excess_bytes", "rate", "seconds"),
    [
        (0, 1000, 1),
        (-5000, 1000, 1),
        (1, 1000, 1),
        (1001, 1000, 2),
        (20_000, 1000, 20),
        (59_001, 1000, 60),
        (10**12, 1000, 60),
        (10**12, 1, 60),
        (5000, 0, 30),
    ],
)
def test_wait_comes_from_the_drain_rate(excess_bytes: int, rate: int, seconds: int) -> None:
    assert http.full_wait_s(excess_bytes, rate) == seconds


@pytest.mark.parametrize("seconds", [1, 2, 3, 30, 60])
def test_wait_is_jittered_upwards(seconds: int) -> None:
    drawn = [int(dict(answer.headers)["retry-after"]) for answer in http.full(seconds)]
    assert drawn == list(range(seconds, seconds + max(1, seconds // 2) + 1))


def test_a_full_log_says_when_to_come_back(site: Worker) -> None:
    site.fill()
    excess = site.log.used - 0.9 * CAPACITY
    assert excess > 20_000
    assert waits(site) == set(range(30, 46)), "nothing drains"
    site.count("drain_bytes_per_s", int(excess / 9.5))
    assert waits(site) == set(range(10, 16))
    site.count("drain_bytes_per_s", 1 << 40)
    assert waits(site) == {1, 2}


def test_a_flood_of_refusals_is_cheap(site: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    site.fill()
    computed = []

    def counting(excess_bytes: float, rate: int) -> int:
        computed.append(rate)
        return full_wait_s(excess_bytes, rate)

    full_wait_s = http.full_wait_s
    monkeypatch.setattr(http, "full_wait_s", counting)
    began = time.monotonic()
    answers = {id(site.app.refused(http.LOG_FULL, site.app.ingest)) for _ in range(2000)}
    assert len(computed) <= 1 + (time.monotonic() - began) / worker.FULL_FRESH_S
    assert len(answers) <= 16, "made once, drawn often"
    site.count("drain_bytes_per_s", 1 << 40)
    wait_for(lambda: min(waits(site, 1)) < 3, 2)


# ---- where nothing is durable --------------------------------------------------------------------


def test_memory_is_known() -> None:
    fd = os.memfd_create("test")
    try:
        assert worker.in_memory(fd) == "tmpfs"
    finally:
        os.close(fd)
    with open("/proc/self/stat") as other:
        assert worker.in_memory(other.fileno()) is None
    assert worker.in_memory(-1) is None


def test_durable_by_default_is_refused_in_memory(site: Worker) -> None:
    fd = os.memfd_create("test")
    config = Config(http=HttpConfig(ack="durable"))
    launch = process.Launch(
        "worker-0", 0, 0, fd, site.log.shared_fd, -1, config, process.Recovered()
    )
    try:
        with pytest.raises(ConfigError, match=r"http\.ack: nothing is durable on tmpfs"):
            worker.App(site.log, launch)
    finally:
        os.close(fd)


def test_durable_is_refused_where_it_means_nothing() -> None:
    class Headers(dict[str, str]):
        def get_all(self, key: str) -> list[str]:
            return [self[key]] if key in self else []

    headers = Headers({"content-length": "5", "content-type": "application/json"})
    terms = http.Terms(10, http.ENQUEUE, durable=False)
    assert http.examine(headers, "", terms) == (0, http.ENQUEUE)
    assert http.examine(headers, "ack=sink", terms) == (0, http.SINK)
    assert http.examine(headers, "ack=durable", terms)[0] == http.ACK_NOT_SUPPORTED
    headers["x-ack"] = "durable"
    assert http.examine(headers, "", terms)[0] == http.ACK_NOT_SUPPORTED
    assert http.examine(headers, "ack=enqueue", terms) == (0, http.ENQUEUE)


def test_a_pool_says_how_many_of_its_connections_are_up(site: Worker) -> None:
    mqtt = msgspec.structs.replace(site.app.config.mqtt, connections=4)
    site.app.config = msgspec.structs.replace(site.app.config, mqtt=mqtt)
    parts = tuple(
        LinkStatus(client_id=f"gw-{n}").to("refused" if n == 2 else "connected", f"error {n}")
        for n in range(4)
    )
    LinkStatus(broker="mqtt://b:1").pooled(parts).write(site.folder / "mqtt-status.json")
    site.count("mqtt_connected", 3)
    assert site.problems == "3 of 4 connections to the broker are up (mqtt.connections)"
    said = site.health()["mqtt"]
    assert (said["connected"], said["state"], said["last_error"]) == (False, "refused", "error 2")
    assert [part["client_id"] for part in said["connections"]] == [f"gw-{n}" for n in range(4)]
    assert said["connections"][2].keys() == {*LinkStatus.__slots__} - {"broker", "connections"}
    site.count("mqtt_connected", 4)
    assert (site.problems, site.health()["mqtt"]["connected"]) == ("", True)
    site.count("mqtt_connected", 0)
    assert "the broker refuses the connection" in site.problems


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("held", "publishing is held on 1 of 4 connections: an event is refused"),
        ("dead_letters_full", "publishing stops on 1 of 4 connections; see `gateway dead-letters"),
    ],
)
def test_a_pool_says_how_many_of_its_connections_are_held(
    site: Worker, state: str, words: str
) -> None:
    parts = tuple(LinkStatus().to(state if n == 2 else "connected") for n in range(4))
    LinkStatus().pooled(parts).write(site.folder / "mqtt-status.json")
    site.count("mqtt_connected", 4)
    assert words in site.problems


# ---- sinks ------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Worker]:
    site = Worker(tmp_path, ("file",))
    site.count("file_up", 1)
    (tmp_path / "file-status.json").write_text('{"state": "running"}')
    yield site
    site.app.close()
    site.log.close()
    os.close(site.fd)


def test_files_alone_say_nothing_of_a_broker(files: Worker) -> None:
    health = files.health()
    assert (health["status"], health["problems"]) == ("ok", [])
    assert "mqtt" not in health
    file = health["sinks"]["file"]
    assert (file["state"], file["required"], file["lag_events"]) == ("running", True, 0)


@pytest.mark.parametrize("state", ["held", "stuck"])
def test_files_that_cannot_be_written_are_a_problem(files: Worker, state: str) -> None:
    files.count("file_up", 0)
    (files.folder / "file-status.json").write_text(
        json.dumps({"state": state, "last_error": "No space left on device"})
    )
    assert files.problems == f"the file sink is {state} (sinks.file.last_error)"
    assert files.health()["sinks"]["file"]["last_error"] == "No space left on device"


def test_a_state_of_a_file_sink_that_is_gone_is_not_believed(files: Worker) -> None:
    files.count("file_up", 0)
    assert files.problems == "the file sink is starting (sinks.file.last_error)"


def test_an_event_that_waits_long_for_a_file_is_a_problem(
    files: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files.app.ingest.event("dev", EVENT, _log.now_ns()) == 0
    files.log.follow(0, 0)
    assert files.problems == ""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 29)
    assert files.problems == ""
    monkeypatch.setattr(time, "time", lambda: real() + 31)
    assert "has waited 31 s for the file sink" in files.problems


def test_a_full_log_names_the_sink_that_is_furthest_behind(tmp_path: Path) -> None:
    site = Worker(tmp_path, ("mqtt", "file"))
    site.fill()
    site.log.follow(0, 0)
    ordinal = site.log.committed_ordinal
    site.log.set_cursor(0, _log.Cursor(site.log.committed, ordinal, ordinal, 0))
    assert "file is furthest behind" in site.problems
    site.app.close()
    site.log.close()
    os.close(site.fd)
