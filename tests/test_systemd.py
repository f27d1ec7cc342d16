"""What the service manager is told, by the notifier alone and by a whole gateway."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.systemd import Notifier
from tests.gateway_process import GatewayProcess, wait_for


class Listener:
    """A notify socket, and what came."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address[0] == "@" else address)
        self._socket.settimeout(0.1)
        self._over = False
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._over:
            try:
                text = self._socket.recv(4096).decode()
            except TimeoutError:
                continue
            self.messages.append(dict(line.split("=", 1) for line in text.split("\n")))

    def states(self) -> list[str]:
        """READY, RELOADING, STOPPING, WATCHDOG, in order."""
        return [key for message in self.messages for key in message if message[key] == "1"]

    def said(self, state: str) -> bool:
        return state in self.states()

    def close(self) -> None:
        self._over = True
        self._thread.join()
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    name = f"@gateway-test-{os.getpid()}-{time.monotonic_ns()}"
    manager = Listener(name if request.param == "abstract" else str(tmp_path / "notify"))
    yield manager
    manager.close()


def test_each_word_is_one_datagram(manager: Listener) -> None:
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "3000000", "PATH": "kept"}
    notifier = Notifier.take(environment)
    assert environment == {"PATH": "kept"}  # children inherit nothing of it
    notifier.ready("serving")
    notifier.reloading("rolling")
    notifier.stopping("draining")
    wait_for(lambda: len(manager.messages) == 3)
    ready, reloading, stopping = manager.messages
    assert ready == {"READY": "1", "STATUS": "serving"}
    assert reloading.pop("MONOTONIC_USEC").isdigit()
    assert reloading == {"RELOADING": "1", "STATUS": "rolling"}
    assert stopping == {"STOPPING": "1", "STATUS": "draining"}
    notifier.close()


def test_a_sign_of_life_is_given_three_times_a_period(manager: Listener) -> None:
    notifier = Notifier.take({"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "300000"})
    until = time.monotonic() + 0.35
    while time.monotonic() < until:
        notifier.beat()
        time.sleep(0.001)
    notifier.close()
    wait_for(lambda: len(manager.messages) >= 3)
    assert 3 <= len(manager.messages) <= 4
    assert set(manager.states()) == {"WATCHDOG"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NOTIFY_SOCKET": ""},
        {"NOTIFY_SOCKET": "/nowhere/notify"},
        {"NOTIFY_SOCKET": "@nobody-listens-here"},
        {"NOTIFY_SOCKET": "/" + "x" * 200},
        {"NOTIFY_SOCKET": "@" + "x" * 200, "WATCHDOG_USEC": "1000"},
        {"WATCHDOG_USEC": "soon"},
    ],
    ids=str,
)
def test_a_manager_that_is_not_there_does_no_harm(environment: dict[str, str]) -> None:
    notifier = Notifier.take(environment)
    for word in (notifier.ready, notifier.reloading, notifier.stopping):
        word("nobody hears this")
    notifier.beat()
    notifier.close()
    notifier.ready("closed")


def test_the_watchdog_of_another_process_is_not_ours(manager: Listener) -> None:
    variables = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    notifier = Notifier.take(variables)
    notifier.beat()
    notifier.ready("serving")
    wait_for(lambda: manager.messages)
    assert manager.states() == ["READY"]
    notifier.close()


def test_a_gateway_says_what_it_does(tmp_path: Path) -> None:
    manager = Listener(str(tmp_path / "notify"))
    gateway = GatewayProcess(tmp_path / "gateway", {"http.workers": 2})
    gateway.environment |= {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1200000"}
    try:
        gateway.start(ready=False)
        wait_for(lambda: manager.said("READY"), 20, gateway.output())
        assert gateway.is_ready()  # at the moment it is said, events are taken
        assert gateway.children().keys() == {"worker", "delivery"}
        assert all(
            b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
            for pid in gateway.child_pids()
        )
        wait_for(lambda: manager.states().count("WATCHDOG") >= 3)

        os.kill(gateway.pid, signal.SIGHUP)
        wait_for(lambda: manager.said("RELOADING"))
        wait_for(lambda: manager.states().count("READY") == 2, 30, gateway.output())
        assert "rolling restart: done" in gateway.output()
        assert gateway.is_ready()

        assert gateway.post() == 202  # waits for a broker that is not there
        os.kill(gateway.pid, signal.SIGTERM)
        wait_for(lambda: manager.said("STOPPING"))
        beats = manager.states().count("WATCHDOG")
        wait_for(lambda: manager.states().count("WATCHDOG") > beats + 2)  # also while it drains
    finally:
        gateway.kill()
        manager.close()
    stopping = next(message for message in manager.messages if "STOPPING" in message)
    assert stopping["STATUS"] == "draining, for at most 10 s"


def test_a_supervisor_that_is_stopped_gives_no_sign_of_life(tmp_path: Path) -> None:
    """The control of the beat: it comes from the loop, not from a thread beside it."""
    manager = Listener(str(tmp_path / "notify"))
    gateway = GatewayProcess(tmp_path / "gateway")
    gateway.environment |= {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "300000"}
    try:
        gateway.start()
        wait_for(lambda: manager.said("WATCHDOG"))
        os.kill(gateway.pid, signal.SIGSTOP)
        time.sleep(0.2)  # what was sent arrives
        before = len(manager.messages)
        time.sleep(0.8)
        assert len(manager.messages) == before
    finally:
        gateway.kill()
        manager.close()


def test_it_is_not_ready_before_every_worker_serves(tmp_path: Path) -> None:
    manager = Listener(str(tmp_path / "notify"))
    gateway = GatewayProcess(tmp_path / "gateway")
    gateway.environment |= {"NOTIFY_SOCKET": manager.address}
    try:
        gateway.start(ready=False)
        pid = wait_for(lambda: gateway.alive() and [*gateway.children()["worker"], 0][0])
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)  # delivery is up by now
        assert not manager.said("READY")
        os.kill(pid, signal.SIGCONT)
        wait_for(lambda: manager.said("READY"), 20, gateway.output())
    finally:
        gateway.kill()
        manager.close()
