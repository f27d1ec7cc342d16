"""A damaged log is never modified before a copy of it exists."""

import os
import time
from pathlib import Path

import pytest

from gateway import _log, log_tools, opening
from gateway.config import Config, load
from tests.log_writer import Writer, waiting
from tests.own_mount import on_tmpfs


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log with damage below its watermark."""
    path = tmp_path / "log" / "gateway.log"
    path.parent.mkdir()
    with Writer(path) as log:
        positions = [log.post(seq) for seq in range(5)]
        log.settle()
    hurt(path, positions[2] + 70)
    return path


def hurt(path: Path, lsn: int) -> None:
    with open(path, "r+b") as file:
        file.seek(log_tools.RING_OFFSET + lsn)
        file.write(b"!")


def config_of(path: Path) -> Config:
    sets = f"log.directory={path.parent}", "log.capacity_bytes=1MiB", "mqtt.url=embedded"
    return load(sets=sets).config


def opened_and_closed(path: Path) -> None:
    opened = opening.open_log(config_of(path))
    opened.log.close()
    os.close(opened.lock_fd)
    os.close(opened.folder_fd)


def test_nothing_is_written_before_the_copy_is_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    copied: list[Path] = []
    own = opening._set_aside

    def set_aside(log: Path, damage: _log.LogCorrupt) -> None:
        own(log, damage)
        copied.extend(path.parent.glob("gateway.log.corrupt-*"))
        assert path.read_bytes() == before

    monkeypatch.setattr(opening, "_set_aside", set_aside)
    opened_and_closed(path)
    (copy,) = copied
    assert copy.read_bytes() == before
    assert path.read_bytes() != before  # it went on: a new epoch, the hole covered
    assert len(waiting(path)) == 4


def test_copy_that_fails_half_way_leaves_the_log_as_it_was(path: Path, tmp_path: Path) -> None:
    """On a disk that has room for the log and half a copy of it."""
    script = f"""
        cp {path} $MOUNT
        $GATEWAY serve --set log.directory=$MOUNT --set log.capacity_bytes=1MiB \\
            --set mqtt.url=mqtt://127.0.0.1:9 || echo exit $?
        cmp {path} $MOUNT/gateway.log
        ls $MOUNT"""
    done = on_tmpfs(tmp_path / "mount", script, size="1600k")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "exit 6\ngateway.log\n"
    assert "is damaged, and there is no room for a copy" in done.stderr
    assert "No space left on device" in done.stderr


def test_copy_does_not_replace_an_older_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.struct_time((2025, 9, 23, 1, 2, 3, 1, 266, 0))
    monkeypatch.setattr(opening.time, "gmtime", lambda: now)
    older = path.with_name("gateway.log.corrupt-20250923T010203Z")
    older.write_bytes(b"of other damage")
    before = path.read_bytes()
    opened_and_closed(path)
    assert older.read_bytes() == b"of other damage"
    assert path.with_name(f"{older.name}-2").read_bytes() == before


def test_log_whose_slots_are_both_damaged_is_refused_untouched(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 + 40] ^= 1
    data[8192 + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(opening.LogUnusable, match=r"both slot pages .* move .* away"):
        opened_and_closed(path)
    assert path.read_bytes() == data
    assert [entry.name for entry in path.parent.iterdir()] == ["gateway.log"]


@pytest.mark.parametrize("page", [1, 2])
def test_one_slot_is_enough(path: Path, page: int) -> None:
    data = bytearray(path.read_bytes())
    data[4096 * page + 40] ^= 1
    path.write_bytes(data)
    opened_and_closed(path)
    assert len(waiting(path)) == 4
