"""`gateway log ls`, `verify` and `dump`: what they show, and that they never write."""

import gzip
import itertools
import json
import os
import pty
import random
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from gateway import __main__ as cli
from gateway import _log, log_dump, log_tools
from tests import log_tools as drawing
from tests.gateway_process import GatewayProcess
from tests.log_tools import GOLDEN
from tests.log_writer import MIB, Writer
from tests.native_build import ROOT
from tests.own_mount import on_tmpfs

BODIES = [
    b'{"metrics":{}}',
    b' {"metrics" : {"t":1.50e0}, "seq":7 }\n',
    b'{"metrics":{},"tags":{"k":"\xc3\xa9\xe2\x82\xac\xf0\x9f\x8c\xa1"},"seq":8,"boot":3}',
    b'{"metrics":{},"payload":"\\u0000\\ud83c\\udf21 \\" \x7f \xc2\x85","seq":9}',
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gateway.log"


def run(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["log", *arguments, "--set", f"log.directory={path.parent}"])
    out = capsys.readouterr()
    return code, out.out, out.err


def dump(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> list[dict[str, Any]]:
    code, text, _ = run(capsys, path, "dump", *arguments)
    assert code == 0
    return [json.loads(line) for line in text.splitlines()]


def subprocess_dump(path: Path, *arguments: str) -> list[str]:
    sets = ["--set", f"log.directory={path.parent}"]
    return [sys.executable, "-m", "gateway", "log", "dump", *sets, *arguments]


# ---- dump -------------------------------------------------------------------------------------


def test_dump_is_what_was_posted(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.time_ns()
    with Writer(path) as log:
        positions = [log.put(f"dev-{n}", body) for n, body in enumerate(BODIES)]
    lines = dump(capsys, path)
    assert [line["lsn"] for line in lines] == positions
    assert [line["body"].encode() for line in lines] == BODIES
    assert [line["device_id"] for line in lines] == [f"dev-{n}" for n in range(len(BODIES))]
    assert [(line["seq"], line["boot"]) for line in lines] == [
        (None, None), (7, None), (8, 3), (9, None)
    ]  # fmt: skip
    for line in lines:
        assert list(line) == [
            "lsn", "size", "epoch", "kind", "received_at", "device_id", "seq", "boot", "body",
            "sinks",
        ]  # fmt: skip
        assert (line["kind"], line["epoch"], line["sinks"]) == ("data", 2, {"mqtt": "waiting"})
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", line["received_at"])
        assert began <= log_tools.parse_timestamp(line["received_at"]) <= time.time_ns()


def test_dump_is_ascii_without_control_characters(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:
        for body in BODIES:
            log.put("dev", body)
    _, text, _ = run(capsys, path, "dump")
    assert re.fullmatch(r"[\x20-\x7e\n]+", text)


def test_bytes_that_are_no_utf_8_survive(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = bytes(range(256))
    with Writer(path) as log:
        log.put("dev", b'{"metrics":{}}')
        record = log.log.read(log.ingest.lsn)
        assert record is not None
        appender = _log.Appender(log.log)
        appender.append(record._replace(body=body))
        appender.close()
    assert dump(capsys, path)[1]["body"].encode("utf-8", "surrogateescape") == body


def test_dump_shows_what_waits_unless_told_otherwise(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:
        positions = [log.post(seq) for seq in range(6)]
        assert log.log.mark_dead(0, positions[1])
        log.publish(3)
        log.settle()
    assert [line["seq"] for line in dump(capsys, path)] == [3, 4, 5]
    assert [line["sinks"]["mqtt"] for line in dump(capsys, path, "--all")] == [
        "done", "dead_lettered", "done", "waiting", "waiting", "waiting"
    ]  # fmt: skip


def test_dump_all_is_the_whole_ring(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Writer(path) as log:
        log.lap(2 * MIB + MIB // 2)
        positions = [log.post(seq) for seq in range(3)]
        end = log.log.tail
    lines = dump(capsys, path, "--all")
    assert [line["lsn"] for line in lines[-3:]] == positions
    # from the oldest that is not written over, without a gap
    assert end - MIB <= lines[0]["lsn"] < end - MIB + 4096
    for line, after in itertools.pairwise(lines):
        assert line["lsn"] + line["size"] == after["lsn"]


def test_dump_takes_ranges_times_and_a_device(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:
        at = [log.post(seq, f"dev-{seq % 2}") for seq in range(8)]
        log.publish(2)
        log.settle()
    when = [line["received_at"] for line in dump(capsys, path, "--all")]

    def seqs(*arguments: str) -> list[int]:
        return [line["seq"] for line in dump(capsys, path, *arguments)]

    assert seqs("--from", str(at[3])) == [3, 4, 5, 6, 7]
    assert seqs("--from", str(at[3] + 1), "--to", str(at[6])) == [4, 5]
    assert seqs("--from", "0", "--to", str(at[2])) == [0, 1]
    assert seqs("--to", str(at[4])) == [2, 3]
    assert seqs("--device", "dev-1") == [3, 5, 7]
    assert seqs("--device", "dev-1", "--all") == [1, 3, 5, 7]
    assert seqs("--since", when[5]) == [5, 6, 7]
    assert seqs("--since", when[1], "--until", when[3]) == [1, 2]
    assert seqs("--until", "1999-01-01T00:00:00+02:00") == []


def test_dump_says_that_positions_were_written_over(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:
        log.lap(2 * MIB)
    _, _, said = run(capsys, path, "dump", "--from", "4096")
    assert "written over" in said


def test_dump_of_the_golden_file_has_every_kind(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(gzip.decompress(GOLDEN.read_bytes()))
    _, expected = drawing.golden()
    kinds = {drawing.DATA: "data", drawing.VOID: "void", drawing.PAD: "pad"}
    lines = dump(capsys, path)
    hole = lines.pop(len(expected) - 1)
    last, after = expected[-2], expected[-1]
    assert hole == {
        "lsn": last.lsn + last.size,
        "size": after.lsn - last.lsn - last.size,
        "kind": "hole",
        "state": "torn",
    }
    assert [(line["lsn"], line["size"], line["kind"], line["epoch"]) for line in lines] == [
        (record.lsn, record.size, kinds[record.kind], record.epoch) for record in expected
    ]
    assert lines[0]["sinks"] == {"mqtt": "waiting", "file": "done"}
    assert lines[-1]["sinks"] == {"mqtt": "waiting", "file": "waiting"}


def test_output_is_there_once_it_is_whole(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(path) as log:
        for seq in range(3):
            log.post(seq)
    target = path.parent / "dump.ndjson"
    own_line = log_dump.line

    def line(log: _log.Log, found: Any) -> str:
        assert not target.exists()
        return own_line(log, found)

    monkeypatch.setattr(log_dump, "line", line)
    code, said, _ = run(capsys, path, "dump", "--output", str(target))
    assert (code, said) == (0, f"{target}: 3 records\n")
    assert target.stat().st_mode & 0o777 == 0o600
    assert [json.loads(line)["seq"] for line in target.read_text().splitlines()] == [0, 1, 2]
    code, _, said = run(capsys, path, "dump", "--output", str(path))
    assert code == 2
    assert "there is such a file" in said
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["dump.ndjson", "gateway.log"]


def test_interrupted_dump_is_130_and_leaves_no_file(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(path) as log:
        log.post(1)

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(log_dump, "line", interrupted)
    assert run(capsys, path, "dump", "--output", str(path.parent / "x"))[0] == 130
    assert run(capsys, path, "dump")[0] == 130
    assert [entry.name for entry in path.parent.iterdir()] == ["gateway.log"]


def test_a_pipe_that_closes_ends_the_dump_quietly(path: Path) -> None:
    with Writer(path) as log:
        for seq in range(2000):
            log.post(seq)
    with subprocess.Popen(
        subprocess_dump(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("stdout_is_terminal", [False, True])
def test_progress_is_for_a_terminal_that_does_not_get_the_dump(
    path: Path, stdout_is_terminal: bool
) -> None:
    with Writer(path) as log:
        log.post(1)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        subprocess_dump(path),
        stdout=theirs if stdout_is_terminal else subprocess.DEVNULL,
        stderr=theirs,
        cwd=ROOT,
    )
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 4096):
            said += chunk
    except OSError:  # how a terminal says that its other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(20) == 0
    assert (b"dumping:" in said) == (not stdout_is_terminal)


def test_dump_takes_no_memory_for_what_the_log_holds(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path, 16 * MIB) as log:
        for seq in range(400):
            log.post(seq, more=b',"payload":"%s"' % (b"x" * 30000))
    tracemalloc.start()
    try:
        assert log_dump.run(path, log_dump.Selection(), path.parent / "out") == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (path.parent / "out").stat().st_size > 12_000_000
    assert peak < 3 * MIB  # a record, its line, buffers; the record's room is up to 1 MiB
    capsys.readouterr()


# ---- ls ---------------------------------------------------------------------------------------


def test_ls_shows_marks_window_and_dead_letters(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path, sinks=("mqtt", "file")) as log:
        first = log.post(1)
        for seq in range(2, 6):
            log.post(seq)
        for sink in (0, 1):
            log.publish(3, sink)
        log.log.set_cursor(1, log.log.cursor(1)._replace(published=1, dead_lettered=2))
        log.settle()
    code, text, _ = run(capsys, path, "ls", "--set", "log.low_water=0.5")
    assert code == 0
    assert re.search(r"sink +mqtt +lsn \d+, 3 published, 0 dead-lettered", text)
    assert re.search(r"sink +file +lsn \d+, 1 published, 2 dead-lettered", text)
    assert "water      events are refused above 95 % in use, until 50 %" in text
    assert re.search(
        rf"window +repeats are recognised back to lsn {first}, received 20.* ago", text
    )


# ---- verify -----------------------------------------------------------------------------------


def damage(path: Path, lsn: int, at: int = 80) -> None:
    place = log_tools.RING_OFFSET + (lsn + at) % (path.stat().st_size - log_tools.RING_OFFSET)
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def settled(path: Path) -> list[int]:
    """Positions of eight durable events, of which the first four are published."""
    with Writer(path) as log:
        positions = [log.post(seq) for seq in range(8)]
        log.publish(4)
        log.settle()
    return positions


def verify_json(
    capsys: pytest.CaptureFixture[str], path: Path, *more: str
) -> tuple[int, dict[str, Any]]:
    code, text, _ = run(capsys, path, "verify", "--json", *more)
    return code, json.loads(text)


def test_verify_as_json(path: Path, settled: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    code, found = verify_json(capsys, path)
    assert (code, found["damaged"], found["records"], found["damage"]) == (0, False, 4, [])
    assert (found["scope"], found["running"]) == ("waiting", False)
    code, found = verify_json(capsys, path, "--all")
    assert (code, found["scope"], found["records"]) == (0, "ring", 8)
    damage(path, settled[5])
    code, found = verify_json(capsys, path)
    assert (code, found["damaged"], found["corrupt_places"]) == (8, True, 1)
    assert found["damage"] == [
        {
            "from": settled[5],
            "to": settled[6],
            "state": "corrupt",
            "file_offset": log_tools.RING_OFFSET + settled[5],
        }
    ]
    assert found["corrupt_bytes"] == settled[6] - settled[5]


def test_verify_all_finds_damage_of_what_is_published(
    path: Path, settled: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(path, settled[2])
    assert run(capsys, path, "verify")[0] == 0
    code, text, _ = run(capsys, path, "verify", "--all")
    assert code == 8
    assert f"lsn {settled[2]} to {settled[3]}" in text
    assert "No event is lost" in text
    assert verify_json(capsys, path, "--all")[1]["finished_damaged_places"] == 1


def test_verify_counts_every_place_and_lists_the_first(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writer(path) as log:
        positions = [log.post(seq) for seq in range(60)]
        log.settle()
    for lsn in positions[1::2]:
        damage(path, lsn)
    code, text, _ = run(capsys, path, "verify")
    assert code == 8
    assert text.count("  lsn ") == log_tools.LISTED_MAX
    assert f"and {30 - log_tools.LISTED_MAX} places more" in text
    assert "30 records waiting and whole" in text


def test_verify_finds_what_is_gone_from_the_end(
    path: Path, settled: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(path, settled[7])
    code, found = verify_json(capsys, path)
    assert code == 8
    assert [(each["from"], each["state"]) for each in found["damage"]] == [(settled[7], "corrupt")]


def test_damage_beside_a_running_gateway_must_be_seen_again(
    path: Path,
    settled: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(path, settled[5])
    looks: list[bool] = []
    own = log_tools.examine

    def examine(log: _log.Log, everything: bool) -> log_tools.Findings:
        looks.append(everything)
        if len(looks) == 3:
            damage(path, settled[5])  # it was a record that was being written over
            log = log_tools.scan(path)
        return own(log, everything)

    monkeypatch.setattr(log_tools, "examine", examine)
    monkeypatch.setattr(log_tools, "is_running", lambda _: True)
    assert run(capsys, path, "verify")[0] == 0
    assert len(looks) == 3


COMMANDS = [["ls", "--records", "9"], ["verify"], ["verify", "--all", "--json"], ["dump", "--all"]]


def test_no_command_changes_a_byte_or_a_time(
    path: Path, settled: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(path, settled[1])
    damage(path, settled[5])
    before, times = path.read_bytes(), path.stat()
    for command in COMMANDS:
        assert run(capsys, path, *command)[0] in (0, 8)
        assert path.read_bytes() == before
        now = path.stat()
        assert (now.st_mtime_ns, now.st_ctime_ns) == (times.st_mtime_ns, times.st_ctime_ns)
    assert [entry.name for entry in path.parent.iterdir()] == ["gateway.log"]


def test_commands_work_on_a_read_only_mount(path: Path, settled: list[int], tmp_path: Path) -> None:
    commands = "\n".join(
        f"$GATEWAY log {' '.join(command)} --set log.directory=$MOUNT >/dev/null"
        for command in COMMANDS
    )
    script = f"""
        cp {path} $MOUNT
        mount -o remount,ro $MOUNT
        if touch $MOUNT/x 2>/dev/null; then exit 99; fi
        {commands}"""
    done = on_tmpfs(tmp_path / "mount", script)
    assert done.returncode == 0, done.stderr


# ---- files that are not as they should be -------------------------------------------------------


def mutate(image: bytes, seed: int) -> bytes:
    """Cut, overwritten, zeroed, shuffled: what a disk or a copy may do to a file."""
    draw = random.Random(seed)
    data = bytearray(image)
    for _ in range(draw.randint(1, 4)):
        how = draw.randrange(7)
        # half of the time in the pages before the ring, or where records are
        top = draw.choice([4096, 5 * 4096, len(data)])
        at = draw.randrange(max(1, min(top, len(data))))
        n = draw.choice([1, 8, 64, 512, 4096, 65536])
        if how == 0:
            del data[at:]
        elif how == 1:
            data += draw.randbytes(n)
        elif how == 2 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif how == 3:
            data[at : at + n] = bytes(len(data[at : at + n]))
        elif how == 4:
            data[at : at + n] = draw.randbytes(len(data[at : at + n]))
        elif how == 5:
            data[at : at + n] = data[: len(data[at : at + n])]
        else:
            other = draw.randrange(max(1, len(data) - n))
            data[at : at + n], data[other : other + n] = data[other : other + n], data[at : at + n]
    return bytes(data)


def test_no_file_crashes_a_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = gzip.decompress(GOLDEN.read_bytes())
    codes: dict[int, int] = {}
    for seed in range(200):
        damaged = mutate(image, seed)
        path.write_bytes(damaged)
        for command in COMMANDS:
            code, out, said = run(capsys, path, *command)
            assert code in (0, 6, 8), (seed, command)
            assert (code == 6) == said.startswith("gateway: "), (seed, command)
            codes[code] = codes.get(code, 0) + 1
            if command[0] == "dump" and code == 0:
                for line in out.splitlines():
                    json.loads(line)
        assert path.read_bytes() == damaged
    assert all(codes.get(code, 0) > 20 for code in (0, 6, 8)), codes  # each way was taken


# ---- times ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:01.000000001z", 1_000_000_001),
        ("1970-01-01 02:00:00.5+02:00", 500_000_000),
        ("2025-09-23T11:18:41.123456789Z", 1758626321123456789),
    ],
)
def test_times_are_read_to_the_nanosecond(text: str, ns: int) -> None:
    assert log_tools.parse_timestamp(text) == ns
    assert log_tools.parse_timestamp(log_tools.timestamp(ns)) == ns


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2025-09-23", "2025-09-23T11:18:41", "2025-13-01T00:00:00Z"]
)
def test_other_times_are_refused(text: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run(capsys, path, "dump", "--since", text)
    assert code == 2
    assert f"--since {text}: " in said


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3600, "1 h 0 min"), (200_000, "2 d 7 h")],
)
def test_ages_are_for_people(seconds: int, text: str) -> None:
    assert log_tools.age(seconds) == text


# ---- beside a gateway ---------------------------------------------------------------------------


def test_commands_work_beside_a_running_gateway(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with GatewayProcess(tmp_path) as gateway:
        path = tmp_path / "log" / "gateway.log"
        for seq in range(5):
            assert gateway.post("dev", b'{"seq":%d,"metrics":{}}' % seq) == 202
        assert [line["seq"] for line in dump(capsys, path)] == [0, 1, 2, 3, 4]
        code, text, _ = run(capsys, path, "verify", "--all")
        assert code == 0
        assert "a gateway is running" in text
        assert gateway.post() == 202
