"""Processes: whatever is killed comes back, nothing is left behind, the end is orderly
(guarantees 2, 15, 18, 20)."""

import contextlib
import http.client
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import children
from gateway.errors import Exit
from tests.gateway_process import (
    EVENT,
    ROOT,
    GatewayProcess,
    Valve,
    cpu_s,
    free_port,
    is_alive,
    stat_fields,
    wait_for,
)
from tests.mosquitto import Mosquitto

BACK_WITHIN_S = 2.0


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcess]:
    """Two workers and the embedded broker."""
    with GatewayProcess(tmp_path, {"mqtt.url": "embedded", "http.workers": 2}) as gateway:
        wait_for(lambda: all_up(gateway), what="all processes")
        yield gateway


def all_up(gateway: GatewayProcess, workers: int = 2) -> bool:
    children = gateway.children()
    return len(children["worker"]) == workers and len(children["delivery"]) == 1


def published(gateway: GatewayProcess, count: int) -> bool:
    metrics = gateway.metrics()
    assert metrics["gateway_unexplained_events"] == 0
    return metrics["gateway_events_published_total"] == count


def test_killed_worker_is_back_within_two_seconds(gateway: GatewayProcess) -> None:
    killed = gateway.children()["worker"][0]
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: killed not in gateway.child_pids() and all_up(gateway), BACK_WITHIN_S)
    answers = [gateway.post() for _ in range(20)]  # over both sockets
    assert answers == [202] * 20
    assert gateway.metric('gateway_process_restarts_total{process="worker"}') == 1
    wait_for(lambda: published(gateway, 20), 5)


def test_worker_killed_by_a_signal_without_a_name_is_back(gateway: GatewayProcess) -> None:
    killed = gateway.children()["worker"][0]
    os.kill(killed, signal.SIGRTMIN + 1)
    wait_for(lambda: killed not in gateway.child_pids() and all_up(gateway), BACK_WITHIN_S)
    assert "was killed by signal" in gateway.output()


def test_connections_queued_for_a_killed_worker_are_served_by_its_successor(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, {"mqtt.url": "embedded"}) as gateway:
        worker = gateway.children()["worker"][0]
        os.kill(worker, signal.SIGSTOP)
        tasks = Path(f"/proc/{worker}/task")  # a thread that still runs would accept, and reset it
        wait_for(lambda: all(") T " in (t / "stat").read_text() for t in tasks.iterdir()), 5)
        with socket.create_connection(("127.0.0.1", gateway.port), 5) as queued:
            queued.sendall(b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n")
            os.kill(worker, signal.SIGKILL)
            assert queued.recv(12) == b"HTTP/1.1 200"


def test_killed_delivery_process_is_back_within_two_seconds(gateway: GatewayProcess) -> None:
    killed = gateway.children()["delivery"][0]
    os.kill(killed, signal.SIGKILL)
    assert gateway.post() == 202
    wait_for(lambda: killed not in gateway.child_pids() and all_up(gateway), BACK_WITHIN_S)
    wait_for(lambda: published(gateway, 1), 5)
    assert gateway.metric('gateway_process_restarts_total{process="delivery"}') == 1


def test_delivery_killed_again_and_again_is_back_within_two_seconds(
    gateway: GatewayProcess,
) -> None:
    for _ in range(4):
        killed = gateway.children()["delivery"][0]
        os.kill(killed, signal.SIGKILL)
        wait_for(
            lambda killed=killed: killed not in gateway.child_pids() and all_up(gateway),
            BACK_WITHIN_S,
        )
    assert gateway.post() == 202
    wait_for(lambda: published(gateway, 1), 5)


def test_child_that_cannot_be_started_for_a_while_is_started_later(gateway: GatewayProcess) -> None:
    _, hard = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (3, hard))
    os.kill(gateway.children()["worker"][0], signal.SIGKILL)
    wait_for(lambda: "cannot be started: Too many open files" in gateway.output(), 5)
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (hard, hard))
    wait_for(lambda: all_up(gateway), 5)
    assert [gateway.post() for _ in range(20)] == [202] * 20


def test_start_without_descriptors_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    limited = ["prlimit", "--nofile=18", sys.executable, "-m", "gateway", "serve"]
    sets = {
        "http.port": free_port(),
        "http.workers": 4,
        "log.directory": tmp_path,
        "log.capacity_bytes": 1 << 20,
        "mqtt.url": "mqtt://127.0.0.1:1",
    }
    limited += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    ended = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 1
    assert "cannot be started: Too many open files" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_children_die_with_a_killed_supervisor(gateway: GatewayProcess) -> None:
    children = gateway.child_pids()
    assert len(children) == 3
    os.kill(gateway.pid, signal.SIGKILL)
    wait_for(lambda: not any(is_alive(pid) for pid in children), 2)


def test_supervisor_started_again_at_once_keeps_what_was_accepted(gateway: GatewayProcess) -> None:
    for _ in range(10):
        assert gateway.post() == 202
    gateway.process.kill() if gateway.process else None
    assert gateway.process is not None
    gateway.process.wait()
    gateway.start()
    wait_for(lambda: published(gateway, 10), 5)


def test_everything_killed_at_once_comes_back_with_what_was_accepted(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, {"http.workers": 2}) as gateway:
        for _ in range(10):
            assert gateway.post() == 202
        for pid in [gateway.pid, *gateway.child_pids()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert gateway.process is not None
        gateway.process.wait()
        gateway.start()
        wait_for(lambda: gateway.metric("gateway_events_accepted_total") == 10, 5)


def test_stopped_supervisor_does_not_stop_the_service(gateway: GatewayProcess) -> None:
    os.kill(gateway.pid, signal.SIGSTOP)
    try:
        assert gateway.post() == 202
        wait_for(lambda: published(gateway, 1), 5)
    finally:
        os.kill(gateway.pid, signal.SIGCONT)


def test_orphan_before_its_first_act_exits(tmp_path: Path) -> None:
    code = (
        "import os,sys\n"
        "from gateway import process\n"
        "from gateway.config import Config\n"
        "import msgspec\n"
        "launch=process.Launch('delivery',0,1 if os.getppid()!=1 else"
        " 2,-1,-1,-1,Config(),process.Recovered())\n"
        "fd=os.memfd_create('x');os.write(fd,msgspec.json.encode(launch))\n"
        "process.begin(['x',str(fd)])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=10).returncode == 7


def test_second_gateway_on_the_directory_is_refused(gateway: GatewayProcess) -> None:
    other = GatewayProcess(
        gateway.directory / "other",
        {"log.directory": gateway.settings["log.directory"], "mqtt.url": "embedded"},
    )
    other.start(ready=False)
    assert other.process is not None
    assert other.process.wait(10) == 4
    assert "is another gateway running on this directory?" in other.output()
    assert gateway.post() == 202


def test_second_gateway_is_refused_though_the_log_was_moved_away(
    gateway: GatewayProcess, tmp_path: Path
) -> None:
    folder = Path(str(gateway.settings["log.directory"]))
    (folder / "gateway.log").rename(folder / "moved.log")
    second = GatewayProcess(tmp_path / "second", {"log.directory": folder})
    second.start(ready=False)
    assert second.process is not None
    assert second.process.wait(15) == Exit.LOCKED
    assert "is another gateway running on this directory?" in second.output()
    assert gateway.post() == 202


def test_log_that_is_cut_short_under_a_running_gateway_ends_it(gateway: GatewayProcess) -> None:
    os.truncate(Path(str(gateway.settings["log.directory"])) / "gateway.log", 4096)
    with contextlib.suppress(OSError, http.client.HTTPException):
        gateway.post()
    assert gateway.process is not None
    assert gateway.process.wait(15) == Exit.LOG_FAILED
    assert "the log has FAILED" in gateway.output()


@pytest.mark.parametrize(
    ("setting", "other"), [("http.port", "mqtt.embedded_port"), ("mqtt.embedded_port", "http.port")]
)
def test_busy_port_is_an_error_that_names_the_setting(
    tmp_path: Path, setting: str, other: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gateway = GatewayProcess(tmp_path, {"mqtt.url": "embedded", setting: port})
        gateway.start(ready=False)
        assert gateway.process is not None
        assert gateway.process.wait(10) == 3
    assert f"change {setting}" in gateway.output()
    assert "Traceback" not in gateway.output()
    assert other not in gateway.output()


def test_second_gateway_on_the_port_is_refused(gateway: GatewayProcess, tmp_path: Path) -> None:
    other = GatewayProcess(tmp_path / "other", {"http.port": gateway.port})
    other.start(ready=False)
    assert other.process is not None
    assert other.process.wait(10) == 3
    assert "change http.port" in other.output()


def test_sigterm_publishes_what_is_left_then_exits_zero(gateway: GatewayProcess) -> None:
    for _ in range(200):
        assert gateway.post() == 202
    children = gateway.child_pids()
    began = time.monotonic()
    assert gateway.stop() == 0
    assert time.monotonic() - began < 5
    assert not any(is_alive(pid) for pid in children)
    assert "not published yet" not in gateway.output()


def test_sigterm_while_the_delivery_process_is_away_publishes_what_is_left(
    gateway: GatewayProcess,
) -> None:
    for _ in range(7):  # so often that the next one is started later
        killed = wait_for(lambda: gateway.children()["delivery"])[0]
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda killed=killed: killed not in gateway.child_pids())
    assert [gateway.post() for _ in range(10)] == [202] * 10
    assert not gateway.children()["delivery"]
    assert gateway.stop() == 0
    listed = subprocess.run(
        [
            *(sys.executable, "-m", "gateway", "log", "ls"),
            *("--set", f"log.directory={gateway.settings['log.directory']}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "10 published" in listed, listed


def test_draining_gateway_refuses_with_503_and_closes(tmp_path: Path) -> None:
    settings = {"http.drain_deadline_ms": 1500}  # the broker is away: the drain lasts so long
    with GatewayProcess(tmp_path, settings) as gateway:
        assert gateway.post() == 202
        assert gateway.process is not None
        with socket.create_connection(("127.0.0.1", gateway.port), 5) as waiting:
            waiting.sendall(
                b"POST /v1/ingest/d HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(EVENT)
            )
            gateway.process.terminate()
            began = time.monotonic()
            wait_for(lambda: gateway.request("GET", "/readyz")[0] == 503, 1)
            status, headers, body = gateway.request(
                "POST", "/v1/ingest/d", EVENT, {"Content-Type": "application/json"}
            )
            assert status == 503
            assert b'"draining"' in body
            assert headers["connection"] == "close"
            assert 1 <= int(headers["retry-after"]) <= 5
            waiting.sendall(EVENT)
            assert waiting.recv(12) == b"HTTP/1.1 503"
        assert gateway.process.wait(10) == 0
        assert time.monotonic() - began > 1.2, "it goes on trying until the deadline"
        assert "1 events are not published yet" in gateway.output()
        assert " events wait to be delivered, for at most 1.5 s" in gateway.output()
        assert gateway.output().endswith(" info supervisor ended, exit code 0\n")


BROKER = """
import asyncio, sys
from gateway.embedded_broker import EmbeddedBroker

async def main():
    await EmbeddedBroker("127.0.0.1", int(sys.argv[1])).start()
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_broker_that_comes_back_during_the_drain_gets_everything(tmp_path: Path) -> None:
    port = free_port()
    settings = {
        "mqtt.url": f"mqtt://127.0.0.1:{port}",
        "mqtt.backoff_base_ms": 10,
        "mqtt.backoff_max_ms": 50,
    }
    with GatewayProcess(tmp_path, settings) as gateway:
        for _ in range(20):
            assert gateway.post() == 202
        assert gateway.process is not None
        gateway.process.terminate()
        wait_for(lambda: gateway.request("GET", "/readyz")[0] == 503, 2)
        broker = subprocess.Popen([sys.executable, "-c", BROKER, str(port)], cwd=ROOT)
        try:
            assert gateway.process.wait(10) == 0
        finally:
            broker.kill()
            broker.wait()
        assert "not published yet" not in gateway.output()


def test_sigterm_while_the_children_start_is_not_lost(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path, {"mqtt.url": "embedded"}).start(ready=False)
    assert gateway.process is not None
    wait_for(lambda: len(gateway.child_pids()) == 2)
    gateway.process.terminate()
    assert gateway.process.wait(10) == 0


def test_body_in_flight_at_the_end_is_answered(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, {"mqtt.url": "embedded"}) as gateway:
        assert gateway.process is not None
        with socket.create_connection(("127.0.0.1", gateway.port), 5) as waiting:
            waiting.sendall(
                b"POST /v1/ingest/d HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n"
            )
            assert gateway.is_ready()  # its head has been read by now
            began = time.monotonic()
            gateway.process.terminate()
            assert waiting.recv(12) == b"HTTP/1.1 503"
        assert gateway.process.wait(10) == 0
        assert time.monotonic() - began < 4


def test_drain_does_not_hang_on_a_stopped_child(tmp_path: Path) -> None:
    settings = {"mqtt.url": "embedded", "http.workers": 2, "http.drain_deadline_ms": 300}
    with GatewayProcess(tmp_path, settings) as gateway:
        wait_for(lambda: all_up(gateway))
        os.kill(gateway.children()["worker"][0], signal.SIGSTOP)
        assert gateway.stop(within_s=10) == 0


def test_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, {"http.drain_deadline_ms": 30_000}) as gateway:
        assert gateway.post() == 202
        children = gateway.child_pids()
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGINT)
        wait_for(lambda: gateway.request("GET", "/readyz")[0] == 503, 2)
        gateway.process.send_signal(signal.SIGINT)
        assert gateway.process.wait(3) == 130
        assert not any(is_alive(pid) for pid in children)


def test_sighup_is_survived(gateway: GatewayProcess) -> None:
    os.kill(gateway.pid, signal.SIGHUP)
    wait_for(lambda: "SIGHUP" in gateway.output(), 2)
    assert gateway.post() == 202


def test_no_zombie_is_left(gateway: GatewayProcess) -> None:
    for pid in gateway.child_pids():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all_up(gateway), BACK_WITHIN_S)
    states = [
        fields[0]
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and (fields := stat_fields(int(entry.name)))
        if int(fields[1]) == gateway.pid
    ]
    assert "Z" not in states


def test_idle_gateway_uses_at_most_one_percent_of_a_core(gateway: GatewayProcess) -> None:
    assert gateway.post() == 202
    time.sleep(1.5)  # the last sync, imports
    pids = [gateway.pid, *gateway.child_pids()]
    began, before = time.monotonic(), sum(map(cpu_s, pids))
    time.sleep(5)  # this is the measurement
    used, elapsed = sum(map(cpu_s, pids)) - before, time.monotonic() - began
    assert used / elapsed <= 0.01, f"{100 * used / elapsed:.2f} % of a core"


def test_broker_away_does_not_keep_the_gateway_from_being_ready(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path) as gateway:
        assert gateway.is_ready()
        health = wait_for(lambda: (h := gateway.health())["mqtt"].get("last_error") and h, 5)
        assert health["status"] == "degraded"
        assert health["mqtt"]["connected"] is False
        assert health["problems"] == ["not connected to the broker"]


def test_health_says_that_publishing_is_held(tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic write telemetry/good\n")
    with Mosquitto(tmp_path / "mosquitto", f"acl_file {tmp_path / 'acl'}") as broker:
        settings = {"mqtt.url": f"mqtt://127.0.0.1:{broker.port}", "http.drain_deadline_ms": 0}
        with GatewayProcess(tmp_path, settings) as gateway:
            wait_for(lambda: gateway.health()["status"] == "ok", 5)
            folder = Path(str(gateway.settings["log.directory"])) / "dead-letters"
            folder.write_text("in the way: nothing can be set aside\n")
            assert gateway.post("bad") == 202
            health = wait_for(lambda: (h := gateway.health())["status"] != "ok" and h, 5)
            assert health["status"] == "degraded"
            assert health["mqtt"]["connected"] is True
            assert health["problems"][0].startswith("publishing is held:")
            folder.unlink()
            wait_for(lambda: gateway.health()["events"]["dead_lettered"] == 1, 5)


SET_FAILED = """
import os, sys
from gateway import _log

folder = f"/proc/{sys.argv[1]}/fd"
links = {os.readlink(f"{folder}/{fd}"): f"{folder}/{fd}" for fd in os.listdir(folder)}
shared = next(fd for name, fd in links.items() if "memfd:" in name)
lock = next(fd for name, fd in links.items() if name.endswith("gateway.log"))
log = _log.Log.attach(os.open(lock, os.O_RDWR), os.open(shared, os.O_RDWR))
log.state = _log.FAILED
"""


def test_failed_log_ends_everything_with_its_own_code(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path) as gateway:
        children = gateway.child_pids()
        delivery = wait_for(lambda: gateway.children()["delivery"])[0]
        os.kill(delivery, signal.SIGSTOP)  # so that there is time to look
        subprocess.run(
            [sys.executable, "-c", SET_FAILED, str(gateway.pid)], cwd=ROOT, check=True, timeout=10
        )
        status, _, body = gateway.request(
            "POST", "/v1/ingest/d", EVENT, {"Content-Type": "application/json"}
        )
        assert (status, b'"failed"' in body) == (503, True)
        assert gateway.request("GET", "/healthz")[0] == 503
        os.kill(delivery, signal.SIGCONT)
        os.kill(delivery, signal.SIGKILL)
        assert gateway.process is not None
        assert gateway.process.wait(10) == 5
        assert not any(is_alive(pid) for pid in children)
        assert "start the gateway again" in gateway.output()
        gateway.start()
        assert gateway.post() == 202


def test_sync_that_fails_ends_the_gateway_and_no_2xx_follows(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path) as gateway:
        assert gateway.post() == 202
        delivery = wait_for(lambda: gateway.children()["delivery"])[0]
        tracer = subprocess.Popen(
            [
                *("strace", "-f", "-qq", "-e", "trace=fdatasync"),
                *("-e", "inject=fdatasync:error=EIO"),
                *("-o", str(tmp_path / "strace.txt"), "-p", str(delivery)),
            ],
            stderr=subprocess.PIPE,
        )
        try:
            statuses = []
            until = time.monotonic() + 10
            while gateway.alive() and time.monotonic() < until:
                try:
                    statuses.append(gateway.post())
                except OSError:
                    statuses.append(0)
            assert gateway.process is not None
            assert gateway.process.wait(5) == 5
        finally:
            tracer.kill()
            tracer.communicate()
        after = statuses[next(i for i, status in enumerate(statuses) if status != 202) :]
        assert 202 not in after
        assert set(after) <= {503, 500, 0}
        assert "start the gateway again" in gateway.output()
        gateway.start()
        assert gateway.post() == 202


# ---- a delivery process that hangs ---------------------------------------------------------------


class FakeLog:
    """Two words that a test counts."""

    def __init__(self) -> None:
        self.words = {children._log.COUNTERS[name]: 7 for name in ("beat_follower", "beat_loop")}

    def counter(self, block: int, index: int) -> int:
        assert block == children._log.BLOCK_DELIVERY
        return self.words[index]


@pytest.mark.parametrize("dead", ["beat_follower", "beat_loop"])
def test_one_word_that_stands_still_is_a_hang(dead: str) -> None:
    log = FakeLog()
    pulse = children.Pulse(log)  # type: ignore[arg-type]
    for _ in range(20):
        for name in ("beat_follower", "beat_loop"):
            log.words[children._log.COUNTERS[name]] += 1
        assert not pulse.tick(0.5)
    (lives,) = {"beat_follower", "beat_loop"} - {dead}
    ticks = 0
    hung = False
    while not hung:
        log.words[children._log.COUNTERS[lives]] += 1
        hung = pulse.tick(0.5)
        ticks += 1
    assert ticks == 10


def test_a_process_that_has_not_beaten_yet_has_a_minute() -> None:
    pulse = children.Pulse(FakeLog())  # type: ignore[arg-type]
    ticks = next(n for n in range(1, 1000) if pulse.tick(0.5))
    assert ticks == 120


def is_published(gateway: GatewayProcess, count: int) -> bool:
    return gateway.metric("gateway_events_published_total") >= count


def test_stopped_delivery_process_is_replaced(gateway: GatewayProcess) -> None:
    hung = gateway.children()["delivery"][0]
    time.sleep(0.6)  # it has beaten
    os.kill(hung, signal.SIGSTOP)
    assert gateway.post() == 202
    wait_for(lambda: hung not in gateway.child_pids() and all_up(gateway), 8)
    wait_for(lambda: is_published(gateway, 1), 3)
    assert f"delivery (process {hung}) has made no progress for 5 s" in gateway.output()
    assert gateway.metric('gateway_process_restarts_total{process="delivery"}') == 1


def package(folder: Path, changes: dict[str, tuple[str, str]]) -> Path:
    """A copy of the package with texts replaced."""
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gateway", folder / "gateway", ignore=left_out)
    for name, (old, new) in changes.items():
        path = folder / "gateway" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name}: {old}"
        path.write_text(text.replace(old, new))
    return folder


HANGS = """
import os

def _hang(self):
    if os.path.exists("hang"):
        os.unlink("hang")
        time.sleep(3600)
    beat(self)

beat, Delivery._beat = Delivery._beat, _hang

if __name__ == "__main__":"""


def test_delivery_process_whose_event_loop_hangs_is_replaced(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path / "run", {"mqtt.url": "embedded"})
    gateway.root = package(tmp_path, {"delivery.py": ('\nif __name__ == "__main__":', HANGS)})
    with gateway:
        hung = wait_for(lambda: gateway.children()["delivery"])[0]
        time.sleep(1.2)  # it has beaten
        (tmp_path / "hang").touch()
        wait_for(lambda: not (tmp_path / "hang").exists(), 3)
        assert gateway.post() == 202
        wait_for(lambda: hung not in gateway.child_pids() and all_up(gateway, 1), 8)
        wait_for(lambda: is_published(gateway, 1), 3)


SHORT = ("HUNG_S: Final = 5.0", "HUNG_S: Final = 2.5")


def pause(gateway: GatewayProcess, pids: list[int]) -> None:
    """Longer than a hang may last."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3.3)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    time.sleep(1.2)  # to look around


def test_what_was_paused_does_not_hang(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path / "run", {"mqtt.url": "embedded"})
    gateway.root = package(tmp_path, {"children.py": SHORT})
    with gateway:
        wait_for(lambda: all_up(gateway, 1))
        time.sleep(1.5)  # it has beaten
        before = gateway.child_pids()
        pause(gateway, [gateway.pid])
        pause(gateway, [gateway.pid, *before])
        assert gateway.child_pids() == before
        assert "no progress" not in gateway.output()
        assert gateway.post() == 202
        wait_for(lambda: is_published(gateway, 1), 3)


def test_control_a_clock_instead_of_ticks_kills_what_was_paused(tmp_path: Path) -> None:
    clock = ("elapsed_s = min(now - self._looked_s, TICK_S)", "elapsed_s = now - self._looked_s")
    gateway = GatewayProcess(tmp_path / "run", {"mqtt.url": "embedded"})
    gateway.root = package(tmp_path, {"children.py": SHORT, "supervisor.py": clock})
    with gateway:
        wait_for(lambda: all_up(gateway, 1))
        time.sleep(1.5)  # it has beaten
        everyone = [gateway.pid, *gateway.child_pids()]
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)
        os.kill(gateway.pid, signal.SIGCONT)
        wait_for(lambda: "no progress" in gateway.output(), 2)


# ---- water marks ---------------------------------------------------------------------------------


def test_full_is_said_from_the_high_mark_until_the_low_mark(tmp_path: Path) -> None:
    with Valve() as broker:
        settings = {
            "mqtt.url": f"mqtt://127.0.0.1:{broker.port}",
            "mqtt.puback_timeout_ms": 60_000,
            "log.high_water": 0.5,
            "log.low_water": 0.25,
            "log.commit_interval_ms": 10,
            "http.drain_deadline_ms": 0,
        }
        with GatewayProcess(tmp_path, settings) as gateway:
            body = b'{"metrics":{},"payload":"%s"}' % (b"x" * 10_000)
            capacity = gateway.health()["log"]["capacity_bytes"]

            def used() -> float:
                return float(gateway.health()["log"]["used_bytes"] / capacity)

            accepted = 0
            while gateway.post(body=body) == 202:
                accepted += 1
            assert 0.5 - 0.02 < used() <= 0.5 + 0.02
            while used() > 0.30:
                broker.allowed += 1
                wait_for(lambda: broker.acked == broker.allowed, 5)
                assert gateway.post(body=body) == 503, used()
            while (status := gateway.post(body=body)) == 503 and used() > 0.1:
                broker.allowed += 1
                wait_for(lambda: broker.acked == broker.allowed, 5)
                time.sleep(0.03)  # a sync: reclaim follows
            assert status == 202
            assert 0.2 < used() < 0.27
            more = 0
            while gateway.post(body=body) == 202:
                more += 1
            assert more > accepted // 3, "a stretch, not one event"
            broker.allowed = 1 << 30


def test_load_is_spread_over_the_workers(gateway: GatewayProcess) -> None:
    seen = [gateway.health()["worker"]["index"] for _ in range(60)]
    assert 10 <= seen.count(0) <= 50


def test_pinned_workers_stay_on_a_core_each(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, {"http.workers": 2, "http.pin_workers": "true"}) as gateway:
        cores = sorted(os.sched_getaffinity(0))

        def pinned() -> list[set[tuple[int, ...]]]:
            return [
                {
                    tuple(os.sched_getaffinity(int(task.name)))
                    for task in Path(f"/proc/{pid}/task").iterdir()
                }
                for pid in gateway.children()["worker"]
            ]

        # one worker that is ready answers for both
        wanted = sorted([(cores[index % len(cores)],)] for index in range(2))
        wait_for(lambda: sorted(map(list, pinned())) == wanted, what="each on a core of its own")
        (delivery,) = gateway.children()["delivery"]
        assert sorted(os.sched_getaffinity(delivery)) == cores


def test_every_202_survives_a_worker_killed_under_load(gateway: GatewayProcess) -> None:
    accepted: list[int] = []
    end = threading.Event()

    def send() -> None:
        count = 0
        while not end.is_set():
            with contextlib.suppress(OSError):
                count += gateway.post() == 202
        accepted.append(count)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(0.3)  # load
        workers = gateway.children()["worker"]
        if workers:
            os.kill(workers[0], signal.SIGKILL)
    end.set()
    for thread in threads:
        thread.join()
    wait_for(lambda: gateway.metric("gateway_events_published_total") >= sum(accepted), 10)
    wait_for(lambda: gateway.metric("gateway_events_waiting") == 0, 10)
    assert gateway.metric("gateway_unexplained_events") == 0


def test_log_being_made_when_killed_is_made_again(tmp_path: Path) -> None:
    making = tmp_path / "log" / "gateway.log.new"
    making.parent.mkdir()
    making.write_bytes(b"half")
    with GatewayProcess(tmp_path) as gateway:
        assert gateway.post() == 202
        assert not making.exists()
        assert (tmp_path / "log").stat().st_mode & 0o077 in (0, 0o055)


def test_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "gateway.log").write_bytes(b"x" * (2 << 20))
    gateway = GatewayProcess(tmp_path)
    gateway.start(ready=False)
    assert gateway.process is not None
    assert gateway.process.wait(10) == 6
    assert "move" in gateway.output()
    assert "Traceback" not in gateway.output()


def test_damage_below_the_watermark_is_copied_aside_before_the_gateway_goes_on(
    tmp_path: Path,
) -> None:
    with GatewayProcess(tmp_path) as gateway:
        for _ in range(3):
            assert gateway.post() == 202
        wait_for(lambda: gateway.metric("gateway_log_not_durable_bytes") == 0, 5)
        time.sleep(0.5)  # two intervals: the persisted watermark follows one sync later
    path = tmp_path / "log" / "gateway.log"
    data = path.read_bytes()
    place = data.index(EVENT, data.index(EVENT) + 1)  # of the second one
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"?")
    damaged = path.read_bytes()
    with GatewayProcess(tmp_path) as gateway:
        (copy,) = path.parent.glob("gateway.log.corrupt-*")
        assert copy.read_bytes() == damaged
        assert copy.stat().st_mode & 0o777 == 0o600
        assert "damage below the durable watermark" in gateway.output()
        assert gateway.metric("gateway_log_recovered_corrupt_bytes") > 0
        assert any("found damaged at the start" in text for text in gateway.health()["problems"])
        assert gateway.post() == 202


def test_sigterm_while_the_log_is_made_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path, {"log.capacity_bytes": 1 << 30})
    gateway.start(ready=False)
    making = tmp_path / "log" / "gateway.log.new"
    assert gateway.process is not None
    wait_for(lambda: making.exists() and making.stat().st_size > 0, 5)
    gateway.process.terminate()
    assert gateway.process.wait(5) == 130
    assert not (tmp_path / "log" / "gateway.log").exists()
    gateway.settings["log.capacity_bytes"] = 1 << 20
    gateway.start()
    assert gateway.post() == 202
    gateway.kill()


@pytest.mark.parametrize(
    ("host", "said"),
    [("192.0.2.1", "cannot listen on 192.0.2.1"), ("a..b", "a..b is no name")],
)
def test_host_that_cannot_be_bound_is_an_error_that_names_the_setting(
    tmp_path: Path, host: str, said: str
) -> None:
    gateway = GatewayProcess(tmp_path, {"http.host": host, "auth.allow_anonymous": "true"})
    gateway.start(ready=False)
    assert gateway.process is not None
    assert gateway.process.wait(10) == 2
    assert f"http.host: {said}" in gateway.output()


def test_ipv6_loopback_is_served(tmp_path: Path) -> None:
    port = free_port()
    gateway = GatewayProcess(tmp_path, {"http.host": "::1", "http.port": port}).start(ready=False)
    try:

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("::1", port), 5) as client:
                client.sendall(b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n")
                return client.recv(12) == b"HTTP/1.1 200"
            return False

        wait_for(answers, 10, gateway.output())
    finally:
        gateway.kill()
