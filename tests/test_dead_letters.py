"""Dead letters: the files, what a crash leaves of them, the bound, and the tools for operators."""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gateway import __main__, _log, dead_letters, refusals
from gateway.dead_letters import (
    Damaged,
    DeadLetter,
    DeadLetters,
    DeadLettersFull,
    Line,
    every_line,
    files,
    locked,
    rewrite,
    rfc3339_ns,
    unix_ns,
)
from gateway.errors import Exit
from gateway.publisher import Publisher
from tests import brokers
from tests.brokers import Peer, ScriptedBroker
from tests.gateway_process import GatewayProcess, wait_for
from tests.mosquitto import Mosquitto
from tests.own_mount import on_tmpfs
from tests.publishing import Source, drained, event, number, run, scripted, settings, until

ROOT = Path(__file__).parents[1]
IDENTITY = 0x7B


def letter(lsn: int = 4096, body: bytes = b'{"metrics":{}}', **changes: Any) -> DeadLetter:
    record = _log.Record(lsn, 128, 3, _log.DATA, 0, 1758626321123456789, 7, None, "dev-1", body, 0)
    values = {"topic": "telemetry/dev-1", "reason": 0x87, "poison": False, "text": "no"}
    return DeadLetter(record=record, **({"attempts": 1} | values | changes))


def shelf_in(folder: Path, **changes: Any) -> DeadLetters:
    bounds = {"file_bytes_max": 1 << 20, "files_max": 8, "when_full": "hold"} | changes
    return DeadLetters(folder / "dead-letters", IDENTITY, "mqtt", **bounds)


def kept(folder: Path) -> list[int]:
    """The lsns on file, each line counted."""
    found = []
    for path in files(folder):
        for _, line in dead_letters.lines(path):
            assert isinstance(line, Line), line
            found.append(line.lsn)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    source = Source(tmp_path)
    yield source
    source.close()


# ---- a line -----------------------------------------------------------------------------------


def test_a_line_says_what_why_where_and_when(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    before = time.time_ns()
    assert shelf.append([letter(), letter(4224, poison=True, reason=None, attempts=3)]) == 2
    (path,) = files(shelf.folder)
    first, second = map(json.loads, path.read_text().splitlines())
    assert before <= unix_ns(first.pop("dead_lettered_at")) <= time.time_ns()
    assert first == {
        "log": "000000000000007b",
        "epoch": 3,
        "lsn": 4096,
        "sink": "mqtt",
        "device_id": "dev-1",
        "topic": "telemetry/dev-1",
        "reason": 0x87,
        "reason_name": "not authorized",
        "text": "no",
        "received_at": "2025-09-23T11:18:41.123456789Z",
        "seq": 7,
        "boot": None,
        "attempts": 1,
        "body": '{"metrics":{}}',
    }
    assert (second["reason"], second["reason_name"], second["attempts"]) == (None, "poison", 3)


def test_folder_and_files_are_private(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    before = os.umask(0)
    try:
        shelf.append([letter()])
        rewrite(shelf.folder, lambda line: True, 1 << 20)
        shelf.append([letter(8192)])
        rewrite(shelf.folder, lambda line: line.lsn != 4096, 1 << 20)
    finally:
        os.umask(before)
    assert stat.S_IMODE(shelf.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in shelf.folder.iterdir()} == {0o600}


def test_what_root_makes_belongs_to_the_owner_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda fd, user, group: given.append((user, group)))
    shelf = shelf_in(tmp_path)
    shelf.append([letter(), letter(8192)])
    rewrite(shelf.folder, lambda line: line.lsn != 4096, 1 << 20)
    owner = shelf.folder.stat()
    assert given == [(owner.st_uid, owner.st_gid)] * 3  # the lock, the file, its successor


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
def test_any_body_comes_back_byte_for_byte(body: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shelf = shelf_in(Path(folder))
        shelf.append([letter(body=body)])
        (line,) = every_line(shelf.folder)
        assert isinstance(line, Line)
        assert line.payload == body


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.integers(0, 4102444800 * 10**9))
def test_times_keep_their_nanoseconds(at_ns: int) -> None:
    assert unix_ns(rfc3339_ns(at_ns)) == at_ns


# ---- torn, damaged, doubled -------------------------------------------------------------------


def test_a_torn_last_line_is_cut_wherever_it_is_torn(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    shelf.append([letter(4096), letter(4224)])
    (path,) = files(shelf.folder)
    whole = path.read_bytes()
    shelf.append([letter(4352, b'{"metrics":{},"payload":"%s"}' % (b"x" * 70000))])
    data = path.read_bytes()
    cuts = {*range(len(whole), len(whole) + 300, 3), *range(len(data) - 3, len(data))}
    for cut in sorted(cuts | set(range(len(whole), len(data), 4093))):
        path.write_bytes(data[:cut])
        assert [line.lsn for line in every_line(shelf.folder) if isinstance(line, Line)] == [
            4096,
            4224,
        ]
        shelf.append([letter(4480)])
        assert kept(shelf.folder) == [4096, 4224, 4480]
        assert path.read_bytes().startswith(whole)


def test_a_torn_last_line_is_cut_at_the_start(source: Source, tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    shelf.append([letter(4096)])
    (path,) = files(shelf.folder)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-20])
    assert shelf.mark_in(source.log) == 0
    assert path.read_bytes() == whole


def test_zeros_behind_the_last_line_are_cut(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    shelf.append([letter(4096)])
    (path,) = files(shelf.folder)
    with path.open("ab") as file:
        file.write(bytes(100_000))  # a size that reached the disk before the bytes
    shelf.append([letter(4224)])
    assert kept(shelf.folder) == [4096, 4224]


def test_a_damaged_line_is_said_and_never_removed(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    shelf.append([letter(4096), letter(4224), letter(4352)])
    (path,) = files(shelf.folder)
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(rows[0] + b'{"lsn":"?\n' + rows[2])
    found = list(every_line(shelf.folder))
    assert found[1] == Damaged(path, 2)
    assert rewrite(shelf.folder, lambda line: line.lsn != 4096, 1 << 20) == 1
    assert path.read_bytes() == b'{"lsn":"?\n' + rows[2]


def test_an_event_on_two_lines_counts_once(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    shelf.append([letter(4096), letter(4224), letter(4096)])
    assert [line.lsn for line in every_line(shelf.folder) if isinstance(line, Line)] == [4096, 4224]
    assert rewrite(shelf.folder, lambda line: True, 1 << 20) == 0
    assert kept(shelf.folder) == [4096, 4224]
    assert rewrite(shelf.folder, lambda line: line.lsn != 4096, 1 << 20) == 1


# ---- the bound --------------------------------------------------------------------------------


def test_files_are_numbered_and_closed_at_their_size(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path, file_bytes_max=700)
    for n in range(6):
        shelf.append([letter(4096 + 128 * n)])
    assert [path.name for path in files(shelf.folder)] == [f"00000{n}.ndjson" for n in (1, 2, 3)]
    assert max(path.stat().st_size for path in files(shelf.folder)) <= 700
    assert kept(shelf.folder) == [4096 + 128 * n for n in range(6)]
    shelf.append([letter(8192, b'{"metrics":{},"payload":"%s"}' % (b"x" * 5000))])  # fits nowhere
    assert len(files(shelf.folder)) == 4


def test_a_batch_goes_as_far_as_there_is_room(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path, file_bytes_max=700, files_max=2)
    letters = [letter(4096 + 128 * n) for n in range(9)]
    assert shelf.append(letters) == 4
    with pytest.raises(DeadLettersFull, match="requeue"):
        shelf.append(letters[4:])
    assert kept(shelf.folder) == [each.record.lsn for each in letters[:4]]


def test_room_that_a_tool_makes_is_used_without_a_restart(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path, file_bytes_max=700, files_max=3)
    assert shelf.append([letter(4096 + 128 * n) for n in range(9)]) == 6
    # One line of each of the first two files: they fit into one file now.
    assert rewrite(shelf.folder, lambda line: line.lsn not in (4096, 4352), 700) == 2
    assert len(files(shelf.folder)) == 2
    assert shelf.append([letter(8192)]) == 1
    assert kept(shelf.folder) == [4224, 4480, 4608, 4736, 8192]


def test_drop_oldest_removes_whole_files_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = shelf_in(tmp_path, file_bytes_max=700, files_max=2, when_full="drop_oldest")
    assert shelf.append([letter(4096 + 128 * n) for n in range(9)]) == 9
    assert kept(shelf.folder) == [4096 + 128 * n for n in (6, 7, 8)]
    assert shelf.dropped == 6
    assert len([r for r in caplog.records if "drop_oldest" in r.getMessage()]) == 3


# ---- a disk that says no ----------------------------------------------------------------------


def test_a_write_that_fails_halfway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = shelf_in(tmp_path)
    shelf.append([letter(4096)])
    real = os.write

    def half(fd: int, data: memoryview) -> int:
        if len(data) < 300:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(dead_letters.os, "write", half)
        for lsn in (4224, 4224, 4224):
            with pytest.raises(OSError, match="No space"):
                shelf.append([letter(lsn), letter(lsn + 128)])
    assert kept(shelf.folder) == [4096]
    shelf.append([letter(4224)])
    assert kept(shelf.folder) == [4096, 4224]
    assert len(files(shelf.folder)) == 1


def test_a_file_whose_sync_failed_is_never_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = shelf_in(tmp_path)
    shelf.append([letter(4096)])

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(dead_letters.os, "fdatasync", fail)
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output"):
                shelf.append([letter(4224)])
    assert kept(shelf.folder) == [4096]
    assert len(files(shelf.folder)) == 1  # failures do not use up the numbers
    shelf.append([letter(4224)])
    assert [path.name for path in files(shelf.folder)] == ["000001.ndjson", "000002.ndjson"]
    assert kept(shelf.folder) == [4096, 4224]


def test_a_lock_that_a_stopped_tool_holds_is_an_error_not_a_hang(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    shelf.append([letter()])
    with locked(shelf.folder), pytest.raises(TimeoutError, match="is a `gateway dead-letters`"):
        with locked(shelf.folder, 0.05):
            pass


def test_a_full_disk_holds_and_room_on_it_lets_go_on(tmp_path: Path) -> None:
    """A real file system without room, no fake: what is on it stays whole."""
    script = """
import errno, pathlib, sys
from gateway.dead_letters import files
from tests.test_dead_letters import kept, letter, shelf_in
shelf = shelf_in(pathlib.Path(sys.argv[1]))
body = b'{"metrics":{},"payload":"%s"}' % (b"x" * 3000)
done = 0
while True:
    try:
        assert shelf.append([letter(4096 + 8 * done, body), letter(4104 + 8 * done, body)]) == 2
        done += 2
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        break
assert done > 4
for _ in range(3):
    try:
        shelf.append([letter(8, body)])
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
lsns = kept(shelf.folder)
assert lsns[:done] == [4096 + 8 * n for n in range(done)] and lsns[done:] in ([], [8]), lsns
(pathlib.Path(sys.argv[1]) / "ballast").unlink()
shelf.append([letter(16, body)])
assert kept(shelf.folder)[-1] == 16
assert len(files(shelf.folder)) <= 2
print("held and went on")
"""
    (tmp_path / "script.py").write_text(script)
    done = on_tmpfs(
        tmp_path / "mount",
        f'head -c 65536 /dev/zero >"$MOUNT/ballast"\n'
        f'PYTHONPATH=. "{sys.executable}" "{tmp_path}/script.py" "$MOUNT"',
        size="128k",
    )
    assert done.stdout == "held and went on\n", done.stderr


def test_drop_on_a_full_disk_says_so_and_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    shelf.append([letter(8), *(letter(lsn, b"x" * 900) for lsn in range(16, 640, 8))])
    done = on_tmpfs(
        tmp_path / "mount",
        f'cp -r "{shelf.folder}" "$MOUNT"\n'
        'sed -i \'1s/"dev-1"/"dev-2"/\' "$MOUNT/dead-letters/000001.ndjson"\n'
        'touch "$MOUNT/dead-letters/.lock" "$MOUNT/dead-letters/.tools.lock"\n'
        'if cat /dev/zero >"$MOUNT/ballast"; then echo "the disk is not full"; fi\n'
        '"$GATEWAY" dead-letters drop --set log.directory="$MOUNT" --device dev-2'
        ' || echo "exit $?"\n'
        'ls "$MOUNT/dead-letters"',
        size="256k",
    )
    assert done.stdout == "exit 1\n000001.ndjson\n"
    said = [line for line in done.stderr.splitlines() if line.startswith("gateway:")]
    assert len(said) == 1
    assert "000001.new: No space left on device" in said[0]
    assert "Traceback" not in done.stderr


def test_a_folder_that_stays_locked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = shelf_in(tmp_path)
    shelf.append([letter()])

    def late(folder: Path, *_: object) -> int:
        with dead_letters.locked(folder, 0.01):
            return 0

    monkeypatch.setattr("gateway.dead_letter_tools.rewrite", late)
    with dead_letters.locked(shelf.folder):
        command = ["dead-letters", "drop", "--yes", "--set", f"log.directory={tmp_path}"]
        assert __main__.main(command) == Exit.LOCKED
    assert capsys.readouterr().err.startswith(f"gateway: {shelf.folder} has been locked for")


# ---- the order of events ----------------------------------------------------------------------


async def refuse_odd(peer: Peer) -> None:
    await peer.accept()
    while True:
        publish = await peer.publish()
        if number(publish.payload) % 2:
            peer.puback(publish.id, 0x87, "odd")
        else:
            peer.puback(publish.id)


def steps_of_a_dead_letter(source: Source, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order, until one event is set aside."""
    shelf = source.shelf = shelf_in(Path(str(source.log.path)).parent)
    source.add(2)
    steps: list[str] = []
    write, sync, mark = os.write, os.fdatasync, refusals.Aside._mark

    def passed() -> bool:
        return source.log.cursor(0).dead_lettered > 0

    def seen_write(fd: int, data: memoryview) -> int:
        steps.append(f"write, passed {passed()}")
        return write(fd, data)

    def seen_sync(fd: int) -> None:
        sync(fd)
        steps.append(f"fdatasync, passed {passed()}")

    def seen_mark(self: refusals.Aside, record: _log.Record) -> None:
        steps.append(f"mark, on file {len(kept(shelf.folder))}, passed {passed()}")
        mark(self, record)

    monkeypatch.setattr(dead_letters.os, "write", seen_write)
    monkeypatch.setattr(dead_letters.os, "fdatasync", seen_sync)
    monkeypatch.setattr(refusals.Aside, "_mark", seen_mark)
    scripted(source, refuse_odd, drained)
    return steps


IN_ORDER = [
    "write, passed False",
    "fdatasync, passed False",
    "mark, on file 1, passed False",
]


def test_the_cursor_passes_after_the_sync_and_the_mark(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert steps_of_a_dead_letter(source, monkeypatch) == IN_ORDER
    assert source.log.cursor(0).dead_lettered == 1


def test_control_a_dead_letter_without_a_sync_is_noticed(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = DeadLetters._append

    def lazy(self: DeadLetters, path: Path, size: int, data: bytearray) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(dead_letters.os, "fdatasync", lambda fd: None)
            append(self, path, size, data)

    monkeypatch.setattr(DeadLetters, "_append", lazy)
    assert steps_of_a_dead_letter(source, monkeypatch) != IN_ORDER


# ---- full -------------------------------------------------------------------------------------


def test_full_holds_the_cursor_until_an_operator_makes_room(source: Source, tmp_path: Path) -> None:
    shelf = source.shelf = shelf_in(tmp_path, file_bytes_max=700, files_max=2)
    source.add(40)

    async def check(publisher: Publisher, broker: ScriptedBroker) -> None:
        dropped = 0
        for _ in range(4):
            await until(lambda: publisher.status.state == "dead_letters_full")
            assert "gateway dead-letters" in publisher.status.last_error
            before = source.log.cursor(0)
            await asyncio.sleep(0.1)  # some retries
            assert source.log.cursor(0) == before
            assert before.dead_lettered == dropped + len(kept(shelf.folder))
            assert len(files(shelf.folder)) == 2
            dropped += rewrite(shelf.folder, lambda line: False, 700)
            await until(lambda before=before: source.log.cursor(0) != before)
        while dropped + len(kept(shelf.folder)) < 20:
            dropped += rewrite(shelf.folder, lambda line: False, 700)
            await asyncio.sleep(0.01)
        await drained(publisher, broker)
        assert len(broker.peers) == 1  # the connection was kept

    scripted(source, refuse_odd, check)
    cursor = source.log.cursor(0)
    assert (cursor.published, cursor.dead_lettered, source.log.unexplained(0)) == (20, 20, 0)


def test_drop_oldest_never_holds(source: Source, tmp_path: Path) -> None:
    shelf = source.shelf = shelf_in(
        tmp_path, file_bytes_max=700, files_max=2, when_full="drop_oldest"
    )
    source.add(120)
    scripted(source, refuse_odd, drained)
    assert source.log.cursor(0).dead_lettered == 60
    assert shelf.dropped + len(kept(shelf.folder)) == 60
    assert len(files(shelf.folder)) == 2


# ---- SIGKILL at each step ---------------------------------------------------------------------

STEPS = ("written in part", "written", "synced", "marked one", "marked all", "passed")


def victim(lock_fd: int, shared_fd: int, folder: str, port: int, step: str) -> None:
    """A delivery process in small, which kills itself at `step`."""
    log = _log.Log.attach(lock_fd, shared_fd)
    shelf = DeadLetters(
        Path(folder) / "dead-letters",
        log.identity,
        "mqtt",
        file_bytes_max=1 << 20,
        files_max=8,
        when_full="hold",
    )
    shelf.mark_in(log)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write, sync, mark = os.write, os.fdatasync, refusals.Aside._mark

    def write_half(fd: int, data: memoryview) -> int:
        done = write(fd, data[: len(data) - 30])
        die()
        return done

    def sync_then_die(fd: int) -> None:
        sync(fd)
        die()

    def mark_then_die(self: refusals.Aside, record: _log.Record) -> None:
        mark(self, record)
        die()

    if step == "written in part":
        dead_letters.os.write = write_half  # type: ignore[assignment]
    elif step == "written":
        dead_letters.os.fdatasync = die  # type: ignore[assignment]
    elif step == "synced":
        dead_letters.os.fdatasync = sync_then_die  # type: ignore[assignment]
    elif step == "marked one":
        refusals.Aside._mark = mark_then_die  # type: ignore[method-assign]
    elif step == "marked all":
        refusals.Refusals._say_set_aside = die  # type: ignore[method-assign]

    async def main() -> None:
        publisher = Publisher(log, 0, settings(port), shelf, quiet_s=0.05)
        if step == "passed":
            publisher.connections[0].passed = die  # type: ignore[method-assign]
        task = asyncio.create_task(publisher.run())
        assert await publisher.drain(10), publisher.status
        await publisher.close()
        await task

    run(main())


def test_sigkill_at_each_step_leaves_one_line_an_event(source: Source, tmp_path: Path) -> None:
    source.add(12)
    command = [sys.executable, "-m", "tests.test_dead_letters", str(source._fd)]
    sends: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        publishes = [await peer.publish()]
        while not await peer.silence(0.05):
            publishes.append(await peer.publish())
        for publish in publishes:  # together: one append for several
            sends.append(number(publish.payload))
            peer.send(brokers.puback(publish.id, 0x87 if sends[-1] % 2 else None))
        await refuse_rest(peer, sends)

    async def main() -> None:
        async with ScriptedBroker(script) as broker:
            for step in (*STEPS, "none"):
                source.add(2)
                end = [str(source.log.shared_fd), str(tmp_path), str(broker.port), step]
                process = await asyncio.create_subprocess_exec(
                    *command, *end, pass_fds=(source._fd, source.log.shared_fd), cwd=ROOT
                )
                try:
                    code = await asyncio.wait_for(process.wait(), 15)
                finally:
                    if process.returncode is None:
                        process.kill()
                assert code == (0 if step == "none" else -signal.SIGKILL), (step, code)

    run(main(), 60)
    cursor = source.log.cursor(0)
    assert (cursor.lsn, cursor.ordinal) == (source.log.committed, 26)
    assert (cursor.published, cursor.dead_lettered, source.log.unexplained(0)) == (13, 13, 0)
    lsns = kept(tmp_path / "dead-letters")
    assert len(lsns) == len(set(lsns)) == 13
    assert set(sends) == set(range(26))


async def refuse_rest(peer: Peer, sends: list[int]) -> None:
    with contextlib.suppress(EOFError):
        while True:
            publish = await peer.publish()
            sends.append(number(publish.payload))
            peer.puback(publish.id, 0x87 if sends[-1] % 2 else None)


def test_marks_that_a_power_cut_took_are_made_again_at_the_start(tmp_path: Path) -> None:
    source = Source(tmp_path)
    source.shelf = DeadLetters(
        tmp_path / "dead-letters",
        source.log.identity,
        "mqtt",
        file_bytes_max=1 << 20,
        files_max=8,
        when_full="hold",
    )
    source.add(6)
    first = source.log.cursor(0).lsn
    scripted(source, refuse_odd, drained)
    lsns = kept(tmp_path / "dead-letters")
    assert len(lsns) == 3
    source.close()
    path = tmp_path / "gateway.log"
    data = bytearray(path.read_bytes())
    for lsn in lsns:  # as a cut leaves it: the cursor of before, and no mark
        at = 4 * 4096 + lsn + 56
        assert any(data[at : at + 8])
        data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    fd = os.open(path, os.O_RDWR)
    log = _log.Log.open(str(path), fd, ["mqtt"])
    try:
        assert log.cursor(0).lsn == first
        assert [log.state_of(lsn) for lsn in lsns] == ["durable"] * 3
        assert source.shelf.mark_in(log) == 3
        assert [log.state_of(lsn) for lsn in lsns] == ["dead_lettered"] * 3
        other = DeadLetters(
            tmp_path / "dead-letters", 1, "mqtt", file_bytes_max=1, files_max=1, when_full="hold"
        )
        assert other.mark_in(log) == 0  # of another log
    finally:
        log.close()
        os.close(fd)


# ---- tools ------------------------------------------------------------------------------------


def gateway(folder: Path, *arguments: str, **sets: object) -> int:
    options = [f"--set=log.directory={folder}"]
    options += [f"--set={key.replace('__', '.')}={value}" for key, value in sets.items()]
    return __main__.main(["dead-letters", *arguments, *options])


def fill(folder: Path) -> list[DeadLetter]:
    letters = [
        letter(4096, event(0)),
        letter(4224, event(1), reason=0x99, topic="telemetry/dev-2"),
        letter(4352, event(2), reason=None, poison=True),
        letter(4480, b'{"metrics":{"n":3}}'),
    ]
    letters[1] = letters[1]._replace(record=letters[1].record._replace(device_id="dev-2"))
    shelf_in(folder).append(letters)
    return letters


def test_ls_counts_by_reason_and_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gateway(tmp_path, "ls") == 0
    assert "events   0" in capsys.readouterr().out
    fill(tmp_path)
    assert gateway(tmp_path, "ls") == 0
    out = capsys.readouterr().out
    for row in (
        "events   4",
        "       2  0x87 not authorized",
        "       1  0x99 payload format invalid",
        "       1  poison: broke connections",
        "       3  dev-1                     telemetry/dev-1",
        "       1  dev-2                     telemetry/dev-2",
        "files    1 of at most 8",
    ):
        assert row in out, out


def test_show_prints_what_is_selected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)

    def shown(*arguments: str) -> list[int]:
        assert gateway(tmp_path, "show", *arguments) == 0
        return [json.loads(row)["lsn"] for row in capsys.readouterr().out.splitlines()]

    assert shown() == [4096, 4224, 4352, 4480]
    assert shown("--reason", "0x87") == shown("--reason=135") == [4096, 4480]
    assert shown("--reason", "poison") == [4352]
    assert shown("--device", "dev-2", "--device", "dev-3") == [4224]
    assert shown("--reason", "0x87", "--device", "dev-2") == []
    assert shown("--limit", "2") == [4096, 4224]


def test_drop_wants_to_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    folder = tmp_path / "dead-letters"
    assert gateway(tmp_path, "drop") == 2
    assert "4 events, for good: repeat it with --yes" in capsys.readouterr().err
    assert len(kept(folder)) == 4
    assert gateway(tmp_path, "drop", "--reason", "0x99") == 0
    assert capsys.readouterr().out == "1 dead letter dropped\n"
    assert kept(folder) == [4096, 4352, 4480]
    assert gateway(tmp_path, "drop", "--yes") == 0
    assert capsys.readouterr().out == "3 dead letters dropped\n"
    assert files(folder) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "--reason", "what"), "--reason what: write a reason code of MQTT 5"),
        (("drop", "--reason", "0x999"), "--reason 0x999: write a reason code of MQTT 5"),
        (("requeue",), "mqtt.url is not set"),
    ],
)
def test_wrong_arguments_name_the_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert gateway(tmp_path, *arguments) == 2
    assert says in capsys.readouterr().err


def test_a_folder_without_a_log_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gateway(tmp_path / "no", "ls") == 6
    assert "name its folder with --set log.directory" in capsys.readouterr().err


class BrokerThread:
    """A scripted broker beside a command that has an event loop of its own."""

    def __init__(self, script: Callable[[Peer], Awaitable[None]]) -> None:
        self._script, self.port = script, 0
        self._ready, self._thread = threading.Event(), threading.Thread(target=self._run)

    def _run(self) -> None:
        async def main() -> None:
            self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
            async with ScriptedBroker(self._script) as broker:
                self.port = broker.port
                self._ready.set()
                await self._end.wait()

        asyncio.run(main())

    def __enter__(self) -> "BrokerThread":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)


def test_requeue_removes_what_is_taken_and_keeps_what_is_refused_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    seen: list[tuple[str, bytes]] = []
    clients: list[str] = []

    async def script(peer: Peer) -> None:
        clients.append((await peer.accept()).client_id)
        while True:
            publish = await peer.publish()
            seen.append((publish.topic, publish.payload))
            peer.puback(publish.id, 0x87 if "dev-2" in publish.topic else None)

    with BrokerThread(script) as broker:
        url = f"mqtt://127.0.0.1:{broker.port}"
        code = gateway(tmp_path, "requeue", mqtt__url=url, mqtt__topic="t/{device_id}")
    assert code == 10
    assert seen == [
        ("t/dev-1", event(0)),
        ("t/dev-2", event(1)),
        ("t/dev-1", event(2)),
        ("t/dev-1", b'{"ts":"2025-09-23T11:18:41.123Z","metrics":{"n":3}}'),  # when it was received
    ]
    assert clients == ["gateway-000000000000007b-requeue"]
    assert kept(tmp_path / "dead-letters") == [4224]
    out = capsys.readouterr().out
    assert out == "3 dead letters published again\n1 event refused again and kept: 0x87 not" + (
        " authorized\n"
    )


def test_requeue_says_when_the_broker_is_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], free_port: Callable[[], int]
) -> None:
    fill(tmp_path)
    from gateway import dead_letter_tools as tools
    from gateway.config import load

    url = f"mqtt://127.0.0.1:{free_port()}"
    config = load(None, sets=[f"log.directory={tmp_path}", f"mqtt.url={url}"]).config
    assert tools.requeue(config, tools.Selection.of([], []), stalled_s=0.3) == 9
    assert "is the broker running?" in capsys.readouterr().err
    assert len(kept(tmp_path / "dead-letters")) == 4


def test_a_second_tool_waits_for_its_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    with (tmp_path / "dead-letters" / ".tools.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert gateway(tmp_path, "drop", "--yes") == 1
    assert "another `gateway dead-letters` command is at work" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_not_taken(tmp_path: Path) -> None:
    fill(tmp_path)
    hold = threading.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        publishes = await peer.publishes(4)
        for publish in publishes[:2]:
            peer.puback(publish.id)
        hold.set()
        await peer.left()

    with BrokerThread(script) as broker:
        command = [sys.executable, "-m", "gateway", "dead-letters", "requeue"]
        sets = [f"--set=log.directory={tmp_path}", f"--set=mqtt.url=mqtt://127.0.0.1:{broker.port}"]
        process = subprocess.Popen([*command, *sets], cwd=ROOT, stdout=subprocess.PIPE)
        try:
            assert hold.wait(15)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=10)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert out == b"2 dead letters published again\n"
    assert kept(tmp_path / "dead-letters") == [4352, 4480]


# ---- a whole gateway --------------------------------------------------------------------------


def test_a_running_gateway_sets_aside_holds_when_full_and_is_helped_by_the_tools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic write telemetry/good\n")
    acl.chmod(0o644)
    folder = tmp_path / "gateway" / "log"
    options = (f"acl_file {acl}", "max_queued_messages 10000")
    with Mosquitto(tmp_path / "m", *options) as broker:
        url = f"mqtt://127.0.0.1:{broker.port}"
        sets = {
            "mqtt.url": url,
            "mqtt.backoff_max_ms": 200,
            "dead_letters.file_bytes_max": 65536,
            "dead_letters.files_max": 1,
        }
        body = b'{"metrics":{"n":1},"payload":"%s"}' % (b"x" * 4000)
        with GatewayProcess(tmp_path / "gateway", sets) as gw:
            for n in range(20):
                assert gw.post("bad" if n % 2 else "good", body) == 202
            wait_for(lambda: gw.metric("gateway_events_published_total") == 10)
            wait_for(lambda: gw.metric("gateway_events_dead_lettered_total") == 10)
            assert gw.health()["status"] == "ok"
            for _ in range(20):  # more than fits
                assert gw.post("bad", body) == 202
            wait_for(lambda: gw.health()["mqtt"]["state"] == "dead_letters_full")
            health = gw.health()
            assert health["status"] == "degraded"
            assert any("dead-letter files are full" in text for text in health["problems"])
            assert gw.metric("gateway_events_waiting") > 0
            # the delivery process is killed: nothing is written twice
            before = kept(folder / "dead-letters")
            (pid,) = gw.children()["delivery"]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: gw.children()["delivery"] not in ([], [pid]))
            wait_for(lambda: gw.health()["mqtt"]["state"] == "dead_letters_full")
            assert kept(folder / "dead-letters") == before
            # an operator mends the reason, and publishes again beside the running gateway
            acl.write_text("topic write telemetry/#\n")
            broker.send_signal(signal.SIGHUP)
            assert gateway(folder, "requeue", mqtt__url=url) == 0
            wait_for(lambda: gw.metric("gateway_events_waiting") == 0)
            wait_for(lambda: gw.health()["status"] == "ok")
            books = gw.health()["events"]
            assert books["unexplained"] == 0
            assert books["published"] + books["dead_lettered"] == 40
            assert gateway(folder, "requeue", mqtt__url=url) == 0
            assert gw.stop() == 0
    assert files(folder / "dead-letters") == []


@pytest.mark.parametrize("killed", ["delivery", "all"])
def test_what_is_on_file_at_a_start_is_neither_published_nor_written_again(
    tmp_path: Path, killed: str, free_port: Callable[[], int]
) -> None:
    """As a SIGKILL between fdatasync and mark leaves it: a line on file, an event without mark."""
    port = free_port()
    gw = GatewayProcess(tmp_path, {"mqtt.url": f"mqtt://127.0.0.1:{port}"})
    folder = Path(str(gw.settings["log.directory"]))
    with gw:
        for n in range(3):
            assert gw.post(body=event(n)) == 202
        wait_for(lambda: gw.metric("gateway_events_waiting") == 3)
        log = _log.Log.scan(str(folder / "gateway.log"))
        first = log.read(log.reclaim)
        assert first is not None
        shelf = DeadLetters(
            folder / "dead-letters",
            log.identity,
            "mqtt",
            file_bytes_max=1 << 20,
            files_max=8,
            when_full="hold",
        )
        shelf.append([DeadLetter(first, "telemetry/dev-1", 0x87, False, "", 1)])
        log.close()
        if killed == "delivery":
            (pid,) = gw.children()["delivery"]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: gw.children()["delivery"] not in ([], [pid]))
        else:
            gw.kill()
            gw.start()
        recorder = [sys.executable, "-m", "tests.brokers", "record", "--port", str(port)]
        recorder += ["--file", str(tmp_path / "recorded")]
        process = subprocess.Popen(recorder, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: gw.metric("gateway_events_waiting") == 0)
        finally:
            process.kill()
            process.wait()
        books = gw.health()["events"]
    assert (books["published"], books["dead_lettered"], books["unexplained"]) == (2, 1, 0)
    payloads = [message["payload"].encode() for message in brokers.recorded(tmp_path / "recorded")]
    assert payloads == [event(1), event(2)]
    assert kept(folder / "dead-letters") == [first.lsn]


if __name__ == "__main__":
    victim(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
