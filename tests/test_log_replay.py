"""`gateway log replay`: what was in the log arrives again, and the log is as it was."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway import __main__ as cli
from gateway import _log, log_dump, log_replay, log_tools
from tests.brokers import PUBLISH, Peer, RecordingBroker, ScriptedBroker, read_publish, recorded
from tests.conftest import find_free_port
from tests.gateway_process import GatewayProcess, wait_for
from tests.log_writer import MIB, Writer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    return folder / "gateway.log"


@contextlib.contextmanager
def in_a_thread(broker: Any) -> Iterator[int]:
    """A broker of tests.brokers on a loop of its own: the command runs its own. Its port."""
    loop = asyncio.new_event_loop()
    started, ended = threading.Event(), asyncio.Event()

    async def life() -> None:
        async with broker:
            started.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(life()))
    thread.start()
    assert started.wait(10)
    try:
        yield broker.port
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        assert not thread.is_alive()
        loop.close()


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    file = tmp_path / "recorded.ndjson"
    with in_a_thread(RecordingBroker(file)) as port:

        def messages() -> list[dict[str, Any]]:
            return recorded(file)

        messages.port = port  # type: ignore[attr-defined]
        yield messages


def replay(
    capsys: pytest.CaptureFixture[str], path: Path, port: int, *arguments: str
) -> tuple[int, str, str]:
    sets = [f"log.directory={path.parent}", f"mqtt.url=mqtt://127.0.0.1:{port}"]
    options = [part for text in sets for part in ("--set", text)]
    code = cli.main(["log", "replay", *options, *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


TS = b'{"ts":"2025-09-23T11:18:41Z","seq":%d,"metrics":{"t":1}}'


@pytest.fixture
def written(path: Path) -> list[int]:
    """Ten events of two devices, half of them published; each body has a ts."""
    with Writer(path) as log:
        positions = [log.put(f"dev-{seq % 2}", TS % seq) for seq in range(10)]
        log.publish(5)
        log.settle()
    return positions


def test_a_range_arrives_again_to_the_byte(
    path: Path, written: list[int], recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before, times = path.read_bytes(), path.stat().st_mtime_ns
    code, said, problem = replay(
        capsys, path, recorder.port, "--from", str(written[2]), "--to", str(written[8])
    )
    assert code == 0, problem
    messages = recorder()
    assert [message["payload"].encode() for message in messages] == [
        TS % seq for seq in range(2, 8)
    ]
    assert [message["topic"] for message in messages] == [
        f"telemetry/dev-{seq % 2}" for seq in range(2, 8)
    ]
    identity = log_tools.scan(path).identity
    assert {message["client"] for message in messages} == {f"gateway-{identity:016x}-replay"}
    assert "events   6, " in said
    assert f"broker   mqtt://127.0.0.1:{recorder.port}, topic telemetry/{{device_id}}" in said
    assert "Subscribers of these topics will see the events again." in said
    assert said.endswith("6 published, 0 refused, 0 left\n")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, times)
    assert [entry.name for entry in path.parent.iterdir()] == ["gateway.log"]


def test_time_of_receipt_is_put_in_as_it_was_the_first_time(
    path: Path, recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:
        lsn = log.put("dev", b'{"metrics":{"t":1},"seq":1}')
        record = log.log.read(lsn)
    assert record is not None
    assert replay(capsys, path, recorder.port, "--device", "dev")[0] == 0
    ts = json.loads(recorder()[0]["payload"])["ts"]
    assert log_tools.parse_timestamp(ts) // 10**6 == record.received_at_ns // 10**6


def test_more_than_the_temporary_log_holds_arrives_in_order(
    path: Path, recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    more = b',"payload":"%s"' % (b"x" * 20_000)
    with Writer(path, 32 * MIB) as log:
        for seq in range(700):
            log.post(seq, f"dev-{seq % 3}", more)
    code, said, _ = replay(capsys, path, recorder.port, "--yes")
    assert code == 0
    assert "700 published" in said
    assert [json.loads(message["payload"])["seq"] for message in recorder()] == list(range(700))


def test_selections_are_those_of_dump(
    path: Path, written: list[int], recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_tools.scan(path)
    when = [
        log_tools.timestamp(record.received_at_ns)
        for record in log_dump.Selection(everything=True).select(log)
        if isinstance(record, _log.Record)
    ]
    log.close()
    arguments = ("--since", when[1], "--until", when[6], "--device", "dev-1")
    assert replay(capsys, path, recorder.port, *arguments)[0] == 0
    assert [json.loads(message["payload"])["seq"] for message in recorder()] == [1, 3, 5]


def test_everything_wants_yes(
    path: Path, written: list[int], recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, problem = replay(capsys, path, recorder.port)
    assert code == 2
    assert "events   10, " in said  # it says what it would do
    assert "add --yes" in problem
    assert recorder() == []
    assert replay(capsys, path, recorder.port, "--yes")[0] == 0
    assert len(recorder()) == 10


def test_nothing_to_replay_is_success(
    path: Path, written: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = replay(capsys, path, find_free_port(), "--device", "nobody")
    assert (code, said) == (0, "no event to replay there\n")


def test_no_broker_is_a_usage_error(
    path: Path, written: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["log", "replay", "--yes", "--set", f"log.directory={path.parent}"]) == 2
    assert "mqtt.url is not set" in capsys.readouterr().err


def test_refused_events_are_counted_and_the_rest_goes_on(
    path: Path, written: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        while (first_body := await peer.packet())[0] >> 4 == PUBLISH:
            message = read_publish(*first_body)
            peer.puback(message.id, 0x99 if b'"seq":4' in message.payload else None)

    with in_a_thread(ScriptedBroker(script)) as port:
        code, said, problem = replay(capsys, path, port, "--yes")
    assert code == 10
    assert "9 published, 1 refused, 0 left" in said
    assert f"lsn {written[4]}, device dev-0: " in problem
    assert "1 refused: " in said
    assert "dead letter" not in said + problem


def test_broker_that_is_not_there_is_given_up(
    path: Path,
    written: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_replay, "STALLED_S", 0.3)
    code, said, problem = replay(capsys, path, find_free_port(), "--yes")
    assert code == 9
    assert "0 published, 0 refused, 10 left" in said
    assert "gave up: " in problem
    assert "is the broker running?" in problem


def test_interrupted_replay_says_how_far_it_came(
    path: Path,
    written: list[int],
    recorder: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = log_replay.progress

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    def progress(what: str, total: int) -> Any:
        return contextlib.nullcontext(interrupt) if what == "publishing" else own(what, total)

    monkeypatch.setattr(log_replay, "progress", progress)
    code, said, _ = replay(capsys, path, recorder.port, "--yes")
    assert code == 130
    assert "1 published, 0 refused, 9 left" in said


def test_client_id_of_the_settings_gets_the_suffix_and_stays_short_enough(
    path: Path, written: list[int], recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for client_id, expected in (("plant", "plant-replay"), ("x" * 128, "x" * 121 + "-replay")):
        sets = ("--set", f"mqtt.client_id={client_id}", "--from", str(written[9]))
        assert replay(capsys, path, recorder.port, *sets)[0] == 0
        assert recorder()[-1]["client"] == expected


def test_replay_beside_a_running_gateway_leaves_it_alone(
    tmp_path: Path, recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"mqtt.url": f"mqtt://127.0.0.1:{recorder.port}"}
    with GatewayProcess(tmp_path, settings) as gateway:
        path = tmp_path / "log" / "gateway.log"
        for seq in range(20):
            assert gateway.post("dev", TS % seq) == 202
        wait_for(lambda: len(recorder()) == 20)
        code, said, problem = replay(capsys, path, recorder.port, "--device", "dev")
        assert code == 0, problem
        assert "a gateway is running" in problem
        assert "20 published" in said
        assert gateway.post("dev", TS % 20) == 202
        wait_for(lambda: len(recorder()) == 41)
        assert gateway.metric("gateway_unexplained_events") == 0
    messages = recorder()
    clients = [message["client"] for message in messages]
    assert clients[20:40] == [f"{clients[0]}-replay"] * 20
    assert clients[40] == clients[0]
    assert [m["payload"] for m in messages[:20]] == [m["payload"] for m in messages[20:40]]


def test_events_that_are_written_over_meanwhile_still_arrive(
    path: Path, written: list[int], recorder: Any, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The spool is the snapshot: what happens to the log after it does not matter."""
    own = log_replay._publish

    def publish(*arguments: Any) -> int:
        with Writer(path) as log:
            log.publish()
            log.lap(3 * MIB)
        return own(*arguments)

    monkeypatch.setattr(log_replay, "_publish", publish)
    assert replay(capsys, path, recorder.port, "--yes")[0] == 0
    assert [message["payload"].encode() for message in recorder()] == [
        TS % seq for seq in range(10)
    ]
