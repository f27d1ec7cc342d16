"""Rolling restart: SIGHUP replaces every process, and no request fails for it.

The clients are raw asyncio: HTTP/1.1 that honours `Connection: close`, and no retry of any kind, so
that one reset, one early end or one status other than 202 is a failure.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import http.client
import json
import os
import random
import shutil
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import listeners
from gateway.listeners import Listeners
from tests.gateway_process import EVENT, ROOT, GatewayProcess, Valve, wait_for

ROLL_WITHIN_S = 40.0
DONE = "rolling restart: done"


class Hammer:
    """Clients that keep their connections, and clients that open one for each event."""

    def __init__(self, port: int, keeping: int = 8, opening: int = 4) -> None:
        self._port, self._keeping, self._opening = port, keeping, opening
        self.accepted = 0
        self.closed = 0
        """Answers that said `Connection: close` to a client that would have stayed."""
        self.failures: Counter[str] = Counter()
        self._end = False

    async def run_during(self, watch: "asyncio.Future[None]") -> None:
        """Send until `watch` is done."""
        clients = [self._client(f"keep-{i}", True) for i in range(self._keeping)]
        clients += [self._client(f"open-{i}", False) for i in range(self._opening)]
        tasks = [asyncio.ensure_future(client) for client in clients]
        try:
            await watch
        finally:
            self._end = True
            await asyncio.gather(*tasks)

    async def _client(self, device: str, keep: bool) -> None:
        seq = 0
        while not self._end:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError as error:
                self.failures[f"connect: {type(error).__name__}"] += 1
                await asyncio.sleep(0.01)
                continue
            try:
                stay = True
                while stay and not self._end:
                    seq += 1
                    stay = await self._post(reader, writer, device, seq, keep)
                    await asyncio.sleep(0.002)  # two cores; others work here too
            except (OSError, EOFError, ValueError, TimeoutError) as error:
                self.failures[f"{device[:4]}: {type(error).__name__}"] += 1
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _post(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        device: str,
        seq: int,
        keep: bool,
    ) -> bool:
        """Whether the connection may be used again."""
        body = b'{"seq":%d,"metrics":{"temp_c":21.5}}' % seq
        ack = b"durable" if seq % 2 else b"enqueue"
        close = b"" if keep else b"Connection: close\r\n"
        writer.write(
            b"POST /v1/ingest/%s?ack=%s HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n%s"
            b"Content-Length: %d\r\n\r\n%s" % (device.encode(), ack, close, len(body), body)
        )
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 15)).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r")[0])
        await reader.readexactly(length)
        status = int(head.split()[1])
        if status == 202:
            self.accepted += 1
        else:
            self.failures[str(status)] += 1
        closes = "connection: close" in head
        self.closed += closes and keep
        return not closes


async def until(condition: object, within_s: float, gateway: GatewayProcess) -> None:
    """As `wait_for`, while the clients run."""
    end = time.monotonic() + within_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, gateway.output()
        await asyncio.sleep(0.05)


def pids(gateway: GatewayProcess) -> set[int]:
    return {pid for group in gateway.children().values() for pid in group}


def workers_up(gateway: GatewayProcess, count: int = 2) -> bool:
    return len(gateway.children()["worker"]) == count and gateway.is_ready()


def copied(folder: Path, changes: dict[str, list[tuple[str, str]]] | None = None) -> Path:
    """A copy of the package to run, and to break, with texts in its files replaced."""
    shutil.copytree(
        ROOT / "gateway", folder / "gateway", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name, pairs in (changes or {}).items():
        change(folder / "gateway" / name, pairs)
    return folder


def change(path: Path, pairs: list[tuple[str, str]]) -> None:
    text = path.read_text()
    for old, new in pairs:
        assert text.count(old) == 1, f"{path}: {old!r} stands there {text.count(old)} times"
        text = text.replace(old, new)
    path.write_text(text)


def hammered(gateway: GatewayProcess, rolls: int) -> Hammer:
    """Rolls under load, one after the other, each to its end."""
    hammer = Hammer(gateway.port)

    async def roll() -> None:
        for n in range(1, rolls + 1):
            before = pids(gateway)
            os.kill(gateway.pid, signal.SIGHUP)
            await until(lambda n=n: gateway.output().count(DONE) == n, ROLL_WITHIN_S, gateway)
            await until(lambda: len(pids(gateway)) == 3, 15, gateway)
            assert not before & pids(gateway), "every process is another one"

    async def main() -> None:
        await hammer.run_during(asyncio.ensure_future(roll()))

    asyncio.run(main())
    return hammer


QUICK = [
    ("RETIRE_MIN_S: Final = 1.0", "RETIRE_MIN_S: Final = 0.3"),
    ("RETIRE_S: Final = 3.0", "RETIRE_S: Final = 0.6"),
]
"""For tests of what comes behind the grace."""


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcess]:
    """Two workers and the embedded broker, from a copy of the package whose rolls are quick."""
    gateway = GatewayProcess(tmp_path / "run", {"mqtt.url": "embedded", "http.workers": 2})
    gateway.root = copied(tmp_path, {"rolling.py": QUICK})
    with gateway:
        wait_for(lambda: workers_up(gateway), 20)
        yield gateway


# ---- the kernel's side ---------------------------------------------------------------------------


def send_to_place(group: Listeners, place: int) -> None:
    """A program that returns one place."""
    code = struct.pack("HBBI", 0x06, 0, 0, place)
    held = ctypes.create_string_buffer(code)
    group._group[0].setsockopt(socket.SOL_SOCKET, 51, struct.pack("HP", 1, ctypes.addressof(held)))


def address_of(group: Listeners) -> tuple[str, int]:
    return group._group[0].getsockname()


def accepted_by(group: Listeners, count: int) -> dict[socket.socket, int]:
    """Connect `count` times and see who got them."""
    clients = [socket.create_connection(address_of(group), 5) for _ in range(count)]
    got = {}
    for listener in group._group:
        got[listener] = 0
        while listeners.queued(listener):
            listener.accept()[0].close()
            got[listener] += 1
    for client in clients:
        client.close()
    assert sum(got.values()) == count
    return got


def group_of(count: int) -> Listeners:
    first = listeners.bound(socket.AF_INET, ("127.0.0.1", 0))
    others = [listeners.bound(socket.AF_INET, first.getsockname()) for _ in range(count - 1)]
    return Listeners([first, *others])


def test_places_are_those_of_the_kernel_after_any_order_of_listen_and_close() -> None:
    choose = random.Random(7)
    group = group_of(3)
    for _ in range(40):
        if len(group._group) < 2 or (len(group._group) < 7 and choose.random() < 0.5):
            added = group.add()
            group._shut.discard(added)
        else:
            group.close(choose.choice(group._group))
        for place, listener in enumerate(group._group):
            send_to_place(group, place)
            assert accepted_by(group, 1)[listener] == 1, f"place {place} of {len(group._group)}"
        group._release()
    group.close_all()


def test_a_new_socket_takes_no_connection_until_the_exchange_nor_the_old_one_after_it() -> None:
    group = group_of(3)
    old = group._group[1]
    new = group.add()
    assert accepted_by(group, 60)[new] == 0
    group.exchange(old, new)
    got = accepted_by(group, 200)
    assert got[old] == 0
    assert all(count > 20 for listener, count in got.items() if listener is not old), got
    group.close(old)
    assert all(count > 20 for count in accepted_by(group, 200).values())
    group.close_all()


def test_a_new_socket_that_is_given_up_takes_nothing_with_it() -> None:
    group = group_of(2)
    new = group.add()
    assert accepted_by(group, 30)[new] == 0
    group.close(new)
    assert all(count > 10 for count in accepted_by(group, 200).values())
    group.close_all()


# ---- under load ----------------------------------------------------------------------------------


def test_three_rolls_under_load_fail_no_request(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path, {"mqtt.url": "embedded", "http.workers": 2})
    with gateway:
        wait_for(lambda: workers_up(gateway), 20)
        survives_three_rolls(gateway)


def survives_three_rolls(gateway: GatewayProcess) -> None:
    hammer = hammered(gateway, 3)
    assert hammer.failures == {}
    assert hammer.closed >= 6, "clients were told to go to the new workers"
    assert hammer.accepted > 500
    wait_for(lambda: gateway.metric("gateway_events_published_total") >= hammer.accepted, 10)
    metrics = gateway.metrics()
    assert metrics["gateway_events_accepted_total"] == hammer.accepted, "counters go on"
    assert metrics["gateway_unexplained_events"] == 0
    assert metrics['gateway_process_restarts_total{process="worker"}'] == 0, "none of them died"
    assert "warning supervisor" not in gateway.output(), gateway.output()


def test_control_without_the_program_and_the_grace_requests_fail(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path / "run", {"mqtt.url": "embedded", "http.workers": 2})
    changes = [
        (
            "self._group.exchange(self._old.listener, self._new.listener)",
            "self._group._shut.clear(), self._group._release()",
        ),
        ("old.signal(signal.SIGUSR1)", "self._elapsed_s = RETIRE_S"),
        ("RETIRE_S: Final = 3.0", "RETIRE_S: Final = 0.0"),
        (
            "            self._elapsed_s = 0.0\n        if self._elapsed_s",
            "        if self._elapsed_s",
        ),
        ("listeners.queued(old.listener) and self._attempts", "self._attempts < 0 and 0"),
    ]
    gateway.root = copied(tmp_path, {"rolling.py": changes})
    with gateway:
        wait_for(lambda: workers_up(gateway), 20)
        hammer = hammered(gateway, 2)
    assert hammer.failures, "the clients see nothing: they prove nothing"


def test_without_the_programs_of_the_kernel_a_roll_goes_in_place(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path / "run", {"mqtt.url": "embedded", "http.workers": 2})
    unknown = [("_SO_ATTACH_REUSEPORT_CBPF: Final = 51", "_SO_ATTACH_REUSEPORT_CBPF: Final = 4051")]
    gateway.root = copied(tmp_path, {"listeners.py": unknown})
    with gateway:
        wait_for(lambda: workers_up(gateway), 20)
        hammer = hammered(gateway, 1)
        assert gateway.output().count("is replaced in place") == 2
    kept = {what: n for what, n in hammer.failures.items() if not what.startswith("open")}
    assert kept == {}
    assert hammer.failures.total() <= 4, hammer.failures  # accepted, and closed before its request


# ---- what is begun is finished -------------------------------------------------------------------


def quick(folder: Path, settings: dict[str, object]) -> GatewayProcess:
    gateway = GatewayProcess(folder / "run", settings)
    gateway.root = copied(folder, {"rolling.py": QUICK})
    return gateway


def begin_body(port: int, size: int, device: str = "slow") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), 15)
    client.sendall(
        b"POST /v1/ingest/%s HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % (device.encode(), size)
    )
    return client


def is_stopped(pid: int) -> bool:
    """Each of its threads: one that still runs would accept, and reset it."""
    return all(") T " in (t / "stat").read_text() for t in Path(f"/proc/{pid}/task").iterdir())


def test_a_body_that_arrives_while_its_worker_ends_is_accepted(tmp_path: Path) -> None:
    with quick(tmp_path, {"mqtt.url": "embedded"}) as gateway:
        (old,) = gateway.children()["worker"]
        with begin_body(gateway.port, len(EVENT)) as client:
            assert gateway.is_ready()  # its head has been read by now
            os.kill(gateway.pid, signal.SIGHUP)
            wait_for(lambda: len(gateway.children()["worker"]) == 2, 15)
            time.sleep(1.5)  # RETIRE_S and more: it has been told to end
            assert old in gateway.children()["worker"]
            client.sendall(EVENT)
            answer = client.recv(4096).lower()
        assert answer.startswith(b"http/1.1 202")
        assert b"connection: close" in answer
        wait_for(lambda: DONE in gateway.output(), 10)
        assert old not in gateway.children()["worker"]


def test_a_body_that_stalls_holds_the_roll_no_longer_than_its_deadline(tmp_path: Path) -> None:
    settings = {"mqtt.url": "embedded", "http.body_deadline_ms": 2500}
    with quick(tmp_path, settings) as gateway:
        with begin_body(gateway.port, len(EVENT)) as client:
            assert gateway.is_ready()
            os.kill(gateway.pid, signal.SIGHUP)
            assert client.recv(12) == b"HTTP/1.1 408"
        wait_for(lambda: DONE in gateway.output(), 10)


def test_a_kept_connection_is_told_to_go_to_the_successor(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, {"mqtt.url": "embedded"}) as gateway:
        kept = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)

        def ask() -> tuple[str | None, int]:
            kept.request("GET", "/healthz")
            answer = kept.getresponse()
            worker = json.loads(answer.read())["worker"]
            return answer.getheader("connection"), worker["index"]

        says, block = ask()
        assert says is None
        os.kill(gateway.pid, signal.SIGHUP)
        until = time.monotonic() + 15
        while says is None and time.monotonic() < until:
            says, same = ask()
            assert same == block
            time.sleep(0.02)
        assert says == "close"
        # side by side, so they must not count in one place
        assert gateway.health()["worker"]["index"] != block
        wait_for(lambda: DONE in gateway.output(), 15)


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGKILL])
def test_connections_queued_for_the_old_worker_are_answered(
    tmp_path: Path, number: signal.Signals
) -> None:
    with GatewayProcess(tmp_path, {"mqtt.url": "embedded"}) as gateway:
        queued_is_answered(gateway, number)


def answers_soon(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2) as client:
        client.sendall(b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n")
        return client.recv(12) == b"HTTP/1.1 200"
    return False


def queued_is_answered(gateway: GatewayProcess, number: signal.Signals) -> None:
    (old,) = gateway.children()["worker"]
    os.kill(old, signal.SIGSTOP)
    wait_for(lambda: is_stopped(old), 15)
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), 10))
            for _ in range(20)
        ]
        for client in clients:
            client.sendall(b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n")
        os.kill(gateway.pid, signal.SIGHUP)
        wait_for(lambda: gateway.output().count("worker-0 is process") == 2, 15)
        wait_for(lambda: answers_soon(gateway.port), 15)  # the successor does
        os.kill(old, number)
        for client in clients:
            assert client.recv(12) == b"HTTP/1.1 200"
    wait_for(lambda: DONE in gateway.output(), 15)


def test_control_a_queue_that_nobody_looks_at_is_reset(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path / "run", {"mqtt.url": "embedded"})
    looks = ("listeners.queued(old.listener) and self._attempts", "self._attempts < 0 and 0")
    gateway.root = copied(tmp_path, {"rolling.py": [looks]})
    with gateway, pytest.raises((OSError, AssertionError)):
        queued_is_answered(gateway, signal.SIGKILL)


def begin_waiting(gateway: GatewayProcess, broker: Valve) -> socket.socket:
    """A request that waits for the broker's acknowledgement."""
    client = socket.create_connection(("127.0.0.1", gateway.port), 15)
    client.sendall(
        b"POST /v1/ingest/d?ack=sink HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(EVENT), EVENT)
    )
    wait_for(lambda: broker.received == 1, 15)
    return client


def test_who_waits_for_the_broker_is_answered_before_the_worker_ends(tmp_path: Path) -> None:
    with Valve() as broker:
        settings = {
            "mqtt.url": f"mqtt://127.0.0.1:{broker.port}",
            "http.drain_deadline_ms": 500,
        }
        with quick(tmp_path, settings) as gateway:
            (old,) = gateway.children()["worker"]
            with begin_waiting(gateway, broker) as client:
                os.kill(gateway.pid, signal.SIGHUP)
                wait_for(lambda: len(gateway.children()["worker"]) == 2, 15)
                time.sleep(3.0)  # RETIRE_S, and GRACE_S behind it
                assert old in gateway.children()["worker"]
                broker.allowed = 1
                assert client.recv(12) == b"HTTP/1.1 200"
            wait_for(lambda: DONE in gateway.output(), 10)
            assert old not in gateway.children()["worker"]


def test_who_waits_in_vain_holds_the_roll_no_longer_than_its_deadline(tmp_path: Path) -> None:
    with Valve() as broker:
        settings = {
            "mqtt.url": f"mqtt://127.0.0.1:{broker.port}",
            "http.sink_deadline_ms": 3000,
            "http.drain_deadline_ms": 500,
        }
        with quick(tmp_path, settings) as gateway:
            with begin_waiting(gateway, broker) as client:
                os.kill(gateway.pid, signal.SIGHUP)
                assert client.recv(12) == b"HTTP/1.1 504"
            wait_for(lambda: DONE in gateway.output(), 10)


# ---- what comes in between -----------------------------------------------------------------------


def test_sighup_during_the_start_does_not_end_it(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path)
    folder = tmp_path / "log"
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # it waits for the last gateway, as it may for recovery
        gateway.start(ready=False)
        wait_for(lambda: "is locked; waiting" in gateway.output(), 15)
        os.kill(gateway.pid, signal.SIGHUP)
        time.sleep(0.2)
    finally:
        os.close(fd)
    try:
        wait_for(lambda: not gateway.alive() or gateway.is_ready(), 15)
        assert gateway.alive(), gateway.output()
        assert gateway.stop() == 0
    finally:
        gateway.kill()


def test_a_second_sighup_is_one_more_roll(gateway: GatewayProcess) -> None:
    os.kill(gateway.pid, signal.SIGHUP)
    wait_for(lambda: "SIGHUP" in gateway.output(), 15)
    for _ in range(3):
        os.kill(gateway.pid, signal.SIGHUP)
        time.sleep(0.05)
    wait_for(lambda: gateway.output().count(DONE) == 2, ROLL_WITHIN_S)
    time.sleep(0.3)  # a third one would have begun
    assert gateway.output().count("SIGHUP: rolling restart") == 2
    wait_for(lambda: workers_up(gateway), 15)


@pytest.mark.parametrize("after_s", [0.0, 0.5, 1.2])
def test_sigterm_in_a_roll_ends_cleanly(gateway: GatewayProcess, after_s: float) -> None:
    assert [gateway.post() for _ in range(10)] == [202] * 10
    os.kill(gateway.pid, signal.SIGHUP)
    time.sleep(after_s)
    assert gateway.stop() == 0
    assert "not published yet" not in gateway.output()
    assert gateway.output().endswith(" info supervisor ended, exit code 0\n")


@pytest.mark.parametrize("after_s", [0.1, 0.5, 1.0])
def test_workers_killed_in_a_roll_are_replaced(gateway: GatewayProcess, after_s: float) -> None:
    before = pids(gateway)
    os.kill(gateway.pid, signal.SIGHUP)
    wait_for(lambda: "SIGHUP" in gateway.output(), 15)
    time.sleep(after_s)
    for pid in gateway.children()["worker"]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(
        lambda: (
            "rolling restart: done" in gateway.output()
            or "rolling restart: ended after" in gateway.output()
        ),
        ROLL_WITHIN_S,
    )
    wait_for(lambda: workers_up(gateway) and len(pids(gateway)) == 3, 15)
    assert [gateway.post() for _ in range(20)] == [202] * 20
    os.kill(gateway.pid, signal.SIGHUP)  # and the next one finds nothing in its way
    wait_for(lambda: gateway.output().count(DONE) >= 1, ROLL_WITHIN_S)
    wait_for(lambda: workers_up(gateway) and len(pids(gateway)) == 3, 15)
    assert not before & pids(gateway)


def test_a_successor_that_dies_ends_the_roll_not_the_service(gateway: GatewayProcess) -> None:
    before = gateway.children()["worker"]
    door = gateway.root / "gateway" / "frontends" / "granian.py"
    good = door.read_text()
    door.write_text("raise SystemExit('no such module')\n")
    hammer = Hammer(gateway.port)

    async def main() -> None:
        async def roll() -> None:
            os.kill(gateway.pid, signal.SIGHUP)
            await until(
                lambda: "rolling restart: ended after 0 of 2" in gateway.output(), 5, gateway
            )
            await asyncio.sleep(0.3)

        await hammer.run_during(asyncio.ensure_future(roll()))

    asyncio.run(main())
    assert hammer.failures == {}
    assert gateway.children()["worker"] == before
    assert "the old one goes on serving" in gateway.output()
    door.write_text(good)
    assert hammered(gateway, 1).failures == {}


def test_a_successor_that_is_not_ready_ends_the_roll_not_the_service(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path / "run", {"mqtt.url": "embedded", "http.workers": 2})
    short = ("READY_S: Final = 10.0", "READY_S: Final = 1.0")
    gateway.root = copied(tmp_path, {"rolling.py": [short]})
    with gateway:
        wait_for(lambda: workers_up(gateway), 20)
        before = gateway.children()["worker"]
        change(
            gateway.root / "gateway" / "frontends" / "granian.py",
            [("        process.tell(process.READY)\n", "")],
        )
        os.kill(gateway.pid, signal.SIGHUP)
        wait_for(lambda: "rolling restart: ended after 0 of 2" in gateway.output(), 15)
        assert "was not ready in 1 s" in gateway.output()
        assert gateway.children()["worker"] == before
        assert [gateway.post() for _ in range(20)] == [202] * 20


def test_a_roll_that_was_paused_gives_nobody_up(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path / "run", {"mqtt.url": "embedded"})
    short = ("READY_S: Final = 10.0", "READY_S: Final = 1.5")
    gateway.root = copied(tmp_path, {"rolling.py": [short]})
    with gateway:
        os.kill(gateway.pid, signal.SIGHUP)
        wait_for(lambda: len(gateway.children()["worker"]) == 2, 15)
        everyone = [gateway.pid, *gateway.child_pids()]
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        for pid in everyone:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: DONE in gateway.output(), 15)
