"""`gateway log resize`: nothing that waits is lost, whatever happens at whichever instant."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import __main__ as cli
from gateway import _log, log_resize, log_tools, opening
from tests.gateway_process import GatewayProcess, wait_for
from tests.log_tools import Image
from tests.log_writer import MIB, Writer, waiting
from tests.native_build import NATIVE, ROOT, TESTS, build, run
from tests.own_mount import on_tmpfs


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gateway.log"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "LOCK_WAIT_S", 0.1)


def resize(
    capsys: pytest.CaptureFixture[str], path: Path, capacity: int | str
) -> tuple[int, str, str]:
    sets = ["--set", f"log.directory={path.parent}", "--set", "http.body_bytes_max=65536"]
    code = cli.main(["log", "resize", "--capacity", str(capacity), *sets])
    out = capsys.readouterr()
    return code, out.out, out.err


def capacity_of(path: Path) -> int:
    return path.stat().st_size - log_tools.RING_OFFSET


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


# ---- round trips ------------------------------------------------------------------------------


def states(path: Path, receipts: list[str]) -> list[str]:
    with Writer(path) as log:
        return [log.log.receipt_state(receipt) for receipt in receipts]


def test_up_then_down_keeps_all_that_waits_receipts_and_repeats(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipts = []
    with Writer(path) as log:
        for seq in range(3):  # written over in the end
            log.post(seq, "early")
            receipts.append(log.ingest.receipt)
        log.publish()
        log.lap(2 * MIB - 100_000)
        positions = []
        for seq in range(1000):  # over the ends of both rings
            positions.append(log.post(seq, f"dev-{seq % 7}", b',"payload":"%s"' % (b"x" * 100)))
            receipts.append(log.ingest.receipt)
        assert positions[0] < 2 * MIB < positions[-1]
        log.publish(400)
        log.settle()
        assert log.log.mark_dead(0, positions[500])
        identity = log.log.identity
    was, told = waiting(path), states(path, receipts)
    assert len(was) == 600
    assert {*told} == {"finished", "delivered", "durable", "dead_lettered"}

    for capacity in (4 * MIB, 2 * MIB, MIB):
        code, said, _ = resize(capsys, path, capacity)
        assert code == 0, said
        assert capacity_of(path) == capacity
        assert waiting(path) == was
        assert states(path, receipts) == told
        (path.parent / "gateway.log.before-resize").unlink()
        with Writer(path) as log:
            assert log.log.identity == identity
            for seq in (0, 399, 400, 999):  # published or not: it is a repeat
                body = b'{"seq":%d,"metrics":{"t":%d.5},"payload":"%s"}'
                device_id, text = f"dev-{seq % 7}", body % (seq, seq % 90, b"x" * 100)
                log.put(device_id, text)
                assert log.ingest.duplicate
                assert log.ingest.lsn == positions[seq]
                code = log.ingest.event(device_id, text.replace(b"x", b"y"), _log.now_ns())
                assert _log.CODES[code] == "seq_conflict"
            assert log.log.unexplained(0) == 0

    with Writer(path) as log:
        log.publish()
        log.lap(4 * MIB)  # and the ring goes on
        log.post(5)
    assert log_tools.verify(path, everything=True) == 0


def test_smaller_log_keeps_the_newest_and_says_how_far_back(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipts = []
    with Writer(path, 4 * MIB) as log:
        for seq in range(3000):
            log.post(seq, more=b',"payload":"%s"' % (b"x" * 600))
            receipts.append(log.ingest.receipt)
        log.publish(2900)
        log.settle()
    was, told = waiting(path), states(path, receipts)
    code, said, _ = resize(capsys, path, MIB)
    assert code == 0
    assert "4194304 bytes (4 MiB) → 1048576 bytes (1 MiB), 100 records waiting" in said
    assert "repeats are recognised back to events received" in said
    assert waiting(path) == was
    now = states(path, receipts)
    lapped = now.index("delivered")
    assert 1500 < lapped < 2000
    assert now == ["finished"] * lapped + told[lapped:]


def test_resize_to_the_same_capacity_changes_nothing(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:
        log.post(1)
    before = path.read_bytes()
    code, said, _ = resize(capsys, path, "1 MiB")
    assert code == 0
    assert "already" in said
    assert path.read_bytes() == before
    assert names(path) == ["gateway.log"]


def test_old_file_is_kept_to_the_byte_and_its_mode_is_taken_over(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:
        log.post(1)
    path.chmod(0o640)
    if os.getuid() == 0:
        os.chown(path, 12345, 54321)
    before, was = path.read_bytes(), path.stat()
    code, said, _ = resize(capsys, path, 2 * MIB)
    assert code == 0
    kept = path.with_name("gateway.log.before-resize")
    assert str(kept) in said
    assert kept.read_bytes() == before
    for file in (kept, path):
        now = file.stat()
        assert (now.st_mode, now.st_uid, now.st_gid, now.st_nlink) == (
            was.st_mode, was.st_uid, was.st_gid, 1
        )  # fmt: skip
    assert kept.stat().st_mtime_ns == was.st_mtime_ns


def test_new_file_is_as_the_drawing_has_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Writer(path) as log:
        log.lap(MIB - 20_000)
        log.publish()
        for seq in range(40):
            log.post(seq, more=b',"payload":"%s"' % (b"x" * 900))
        log.settle()
    oldest = log_tools.scan(path).next(0, 1 << 60)
    assert oldest is not None
    before = Image(bytearray(path.read_bytes()))
    assert resize(capsys, path, 2 * MIB)[0] == 0
    after = Image(bytearray(path.read_bytes()))
    old, new = before.slot(), after.slot()
    assert (after.identity.secret, after.identity.identity) == (
        before.identity.secret, before.identity.identity
    )  # fmt: skip
    assert (new.watermark, new.epoch, new.ranges, new.cursors) == (
        old.watermark, old.epoch, old.ranges, old.cursors
    )  # fmt: skip
    records = list(after.records(oldest.lsn))
    assert records == list(before.records(oldest.lsn))
    assert records[-1].seq == 39
    assert 0 <= oldest.lsn - (records[-1].lsn + records[-1].size - MIB) < 4096


def test_either_slot_of_the_new_file_will_do(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:
        for seq in range(900):
            log.post(seq, more=b',"payload":"%s"' % (b"x" * 900))
        log.settle()  # a slot whose cursor is the log's beginning
        log.publish(850)
        log.log.sync()
    was = waiting(path)
    assert resize(capsys, path, 2 * MIB)[0] == 0
    whole = path.read_bytes()
    for page in (1, 2):
        path.write_bytes(whole[: 4096 * page] + bytes(4096) + whole[4096 * (page + 1) :])
        assert waiting(path) == was


# ---- a gateway before and after -----------------------------------------------------------------


@pytest.mark.parametrize("capacity", [MIB, 4 * MIB])
def test_killed_gateway_is_resized_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], capacity: int
) -> None:
    gateway = GatewayProcess(tmp_path, {"log.capacity_bytes": 2 * MIB})
    path = tmp_path / "log" / "gateway.log"
    bodies = [b'{"seq":%d,"metrics":{"t":1}}' % seq for seq in range(50)]
    with gateway:
        for body in bodies:
            assert gateway.post("dev", body) == 202
    code, said, _ = resize(capsys, path, capacity)
    assert code == 0, said
    assert "50 records waiting" in said
    gateway.settings["log.capacity_bytes"] = capacity
    with gateway:
        assert gateway.post("dev", b'{"seq":50,"metrics":{"t":1}}') == 202
        wait_for(lambda: gateway.metric("gateway_log_not_durable_bytes") == 0, 5)
        assert gateway.metric("gateway_unexplained_events") == 0
        assert "has no effect" not in gateway.output()
    assert [body for _, _, body in waiting(path)][:50] == bodies


# ---- refusals -----------------------------------------------------------------------------------


def refused(
    capsys: pytest.CaptureFixture[str], path: Path, capacity: int | str, exit_code: int
) -> str:
    """What is said; nothing may have changed."""
    before, there = path.read_bytes(), names(path)
    times = path.stat().st_mtime_ns
    code, out, said = resize(capsys, path, capacity)
    assert (code, out) == (exit_code, "")
    assert said.startswith("gateway: ")
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == times
    assert names(path) == there
    return said


def test_running_gateway_is_told_to_stop(
    tmp_path: Path, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with GatewayProcess(tmp_path) as gateway:
        code, _, said = resize(capsys, tmp_path / "log" / "gateway.log", 2 * MIB)
        assert code == 4
        assert "is locked: is another gateway running on this directory? Stop it" in said
        assert gateway.post() == 202
        assert not (tmp_path / "log" / "gateway.log.new").exists()


def test_log_that_a_child_still_holds_is_not_touched(
    path: Path, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:  # locks the file, not its folder
        log.post(1)
        code, _, said = resize(capsys, path, 2 * MIB)
    assert code == 4
    assert "is locked" in said
    assert names(path) == ["gateway.log"]


def test_folder_that_a_starting_gateway_holds_is_not_touched(
    path: Path, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:
        log.post(1)
    folder_fd = opening.lock_folder(path.parent)  # before it opens the file
    try:
        assert "is locked" in refused(capsys, path, 2 * MIB, 4)
    finally:
        os.close(folder_fd)


def test_what_waits_must_fit(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Writer(path, 2 * MIB) as log:
        for seq in range(400):
            log.post(seq, more=b',"payload":"%s"' % (b"x" * 3000))
    said = refused(capsys, path, MIB, 6)
    assert "wait to be published, more than a capacity of 1048576 holds" in said
    assert "let the gateway run until the broker has taken what waits" in said


def test_record_must_not_be_above_the_new_maximum(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path, 2 * MIB) as log:
        log.post(1)
        lsn = log.post(2, more=b',"payload":"%s"' % (b"x" * 200_000))
    said = refused(capsys, path, MIB, 6)
    assert "a record that waits has 2001" in said
    with Writer(path) as log:
        log.publish()
        log.settle()
        assert log.log.read(lsn) is not None
    assert resize(capsys, path, MIB)[0] == 0


def test_damage_is_not_copied(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Writer(path) as log:
        lsn = log.post(1)
        log.post(2)
        log.settle()
    with open(path, "r+b") as file:
        file.seek(log_tools.RING_OFFSET + lsn + 70)
        file.write(b"!")
    said = refused(capsys, path, 2 * MIB, 8)
    assert "`gateway log verify` says where" in said
    assert "`gateway serve` copies the file aside" in said


def test_torn_end_is_copied(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Writer(path) as log:
        log.post(1)
        log.settle()
        lsn = log.post(2)
        log.post(3)
    with open(path, "r+b") as file:
        file.seek(log_tools.RING_OFFSET + lsn + 70)
        file.write(b"!")
    assert resize(capsys, path, 2 * MIB)[0] == 0
    assert [lsn for lsn, *_ in waiting(path)] == [4096, lsn + (lsn - 4096)]


@pytest.mark.parametrize(
    ("capacity", "text"),
    [
        ("3MiB", "must be a power of two: 2097152 or 4194304 (from --capacity, given 3145728)"),
        ("1KiB", "log.capacity_bytes: must be an integer from 1048576"),
        ("large", "from --capacity, given 'large'"),
    ],
)
def test_other_capacities_are_usage_errors(
    path: Path, capsys: pytest.CaptureFixture[str], capacity: str, text: str
) -> None:
    with Writer(path):
        pass
    assert text in refused(capsys, path, capacity, 2)


def test_what_is_no_log_is_left_alone(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(b"x" * MIB)
    assert "not a gateway log" in refused(capsys, path, 2 * MIB, 6)
    path.unlink()
    code, _, said = resize(capsys, path, 2 * MIB)
    assert code == 6
    assert "no log there" in said


def test_backup_of_an_earlier_resize_is_not_written_over(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:
        log.post(1)
    kept = path.with_name("gateway.log.before-resize")
    kept.write_bytes(b"mine")
    assert f"{kept} is there from an earlier resize; remove it" in refused(capsys, path, 2 * MIB, 6)
    assert kept.read_bytes() == b"mine"


def test_room_is_looked_at_first(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(path) as log:
        log.post(1)
    monkeypatch.setattr(log_resize, "_write", lambda *_: pytest.fail("it began"))
    said = refused(capsys, path, 1 << 40, 6)
    assert "are needed beside the old file" in said
    assert "free some space, or choose a smaller --capacity" in said


def test_full_disk_on_the_way_leaves_the_log_as_it_was(path: Path, tmp_path: Path) -> None:
    """A disk that is full although it seemed not to be: on a small tmpfs, with the look ahead taken
    away."""
    with Writer(path) as log:
        for seq in range(20):
            log.post(seq)
    program = (
        "import sys; from gateway import log_resize, __main__;"
        " log_resize._check_room = lambda *_: None;"
        " sys.exit(__main__.main(sys.argv[1:]))"
    )
    script = f"""
        cp {path} $MOUNT
        {sys.executable} -c '{program}' log resize --capacity 2MiB \\
            --set log.directory=$MOUNT || echo exit $?
        cmp {path} $MOUNT/gateway.log
        ls $MOUNT"""
    done = on_tmpfs(tmp_path / "mount", script, size="2500k")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "exit 6\ngateway.log\n"
    assert "No space left on device; nothing was changed; free some space" in done.stderr


# ---- killed at each step ------------------------------------------------------------------------


STEPS = [
    ("fallocate", 1),
    ("pwrite64", 1),
    ("pwrite64", 5),  # the ring
    ("pwrite64", 200),
    ("pwrite64", 517),  # the slots: 4 + 512 pages are before them
    ("pwrite64", 518),
    ("pwrite64", 519),  # the identity page
    ("fsync", 1),
    ("linkat,link", 1),
    ("fsync", 2),  # the folder
    ("rename", 1),
    ("fsync", 3),
]


@pytest.mark.parametrize(("call", "nth"), STEPS)
def test_killed_at_any_step_it_leaves_a_log(
    path: Path, capsys: pytest.CaptureFixture[str], call: str, nth: int
) -> None:
    with Writer(path) as log:
        log.lap(MIB - 3000)
        log.publish()
        for seq in range(40):
            log.post(seq)
    was = waiting(path)
    command = [sys.executable, "-m", "gateway", "log", "resize", "--capacity", "2MiB"]
    done = subprocess.run(
        [
            *("strace", "-f", "-o", "/dev/null"),
            *("-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={nth}"),
            *(*command, "--set", f"log.directory={path.parent}"),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # that renames, too
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, (done.stdout, done.stderr)
    assert path.exists()
    if (call, nth) != ("rename", 1):  # which is done or not
        assert capacity_of(path) == (2 * MIB if (call, nth) == ("fsync", 3) else MIB)
    assert waiting(path) == was
    # and what it left is in nobody's way
    code, _, problem = resize(capsys, path, 4 * MIB)
    if "earlier resize" in problem:
        assert capacity_of(path) == 2 * MIB  # that one was done
        path.with_name("gateway.log.before-resize").unlink()
        code, _, problem = resize(capsys, path, 4 * MIB)
    assert code == 0, problem
    assert waiting(path) == was
    assert names(path) == ["gateway.log", "gateway.log.before-resize"]


def test_interrupted_resize_leaves_the_log_alone(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(path) as log:
        log.post(1)
    before = path.read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(log_resize, "progress", lambda *_: contextlib.nullcontext(stop))
    assert resize(capsys, path, 2 * MIB)[0] == 130
    assert path.read_bytes() == before
    assert names(path) == ["gateway.log"]


# ---- each part is needed: taken away, a native test notices -------------------------------------


MUTANTS = {
    "the copy's end within its first page is forgotten": (
        "lap < 2; lap++",
        "lap < 1; lap++",
        "ring_is_filled_to_the_last_byte",
    ),
    "one slot is written": (
        "for (unsigned i = 0; i < 2; i++, slot.sequence++) {",
        "for (unsigned i = 0; i < 1; i++, slot.sequence++) {",
        "both_slots_say_the_same",
    ),
    "where epochs lost events is not copied": (
        "    memcpy(slot.lost_from, shared->lost_from, sizeof slot.lost_from);\n",
        "",
        "torn_places_are_copied_as_they_are",
    ),
    "the new file is not compared": (
        "        status = compare(&c, path, found, error);\n",
        "        (void)compare;\n",
        "copy_is_read_back",
    ),
    "what waits is copied as far as it fits": (
        "    if (start - least > c->capacity)\n",
        "    if (false)\n",
        "what_waits_must_fit_to_the_byte",
    ),
    "records may be larger than the new maximum": (
        "if (record.kind != GW_PAD && record.size > c->record_bytes_max)",
        "if (record.kind > GW_PAD)",
        "record_that_is_too_large_must_be_finished",
    ),
    "damage is copied": (
        "    if (found->corrupt_count)\n",
        "    if (false)\n",
        "damage_below_the_watermark_is_refused",
    ),
    "records are shown without their checksum": (
        "if (header->crc != gw_record_crc(header, rest, p))",
        "if (false && rest)",
        "next_finds_every_whole_record_and_no_other",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name: str, tmp_path: Path) -> None:
    old, new, test = MUTANTS[name]
    text = (NATIVE / "gw_log_resize.c").read_text()
    assert text.count(old) == 1
    program = build(
        TESTS / "test_log_resize.c", "plain", {"gw_log_resize.c": text.replace(old, new)}
    )
    done = run(program, "plain", test, environment={"TMPDIR": str(tmp_path)})
    assert done.returncode != 0, done.stdout
