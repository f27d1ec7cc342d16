"""The file sink: each event on one line, once, whole, in order, whatever dies when."""

import asyncio
import contextlib
import errno
import inspect
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import types
from unittest import mock

import msgspec
import pytest
from backports import zstd

from gateway import _log
from gateway.sinks import SinkStatus, file, files
from gateway.sinks.file import FileSink
from tests.file_sink_site import Disk, PowerCut, Site, fork, kill_at
from tests.gateway_process import ROOT
from tests.own_mount import on_tmpfs

CODINGS = ("none", "zstd")
SMALL_FILE = 1500
"""Bytes: ten lines."""


# ---- what stands in the files --------------------------------------------------------------------


@pytest.mark.parametrize("compression", CODINGS)
def test_events_become_lines_and_a_restart_goes_on_in_the_same_file(tmp_path, compression):
    with Site(tmp_path, compression=compression) as site:
        site.post(100)
        site.run()
        site.check()
        (name,) = site.names
        site.post(100)
        site.run()
        site.check()
        assert site.names == [name]
        assert name.endswith(".part")
        assert (states(site)[0], states(site)[-1]) == ("starting", "closed")
        assert site.log.unexplained(site.index) == 0


def test_folder_and_files_are_for_their_owner_only(tmp_path):
    with Site(tmp_path, folder="made/events") as site:
        site.post(1)
        site.run()
        assert stat.S_IMODE(site.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((site.folder / site.names[0]).stat().st_mode) == 0o600


@pytest.mark.parametrize("compression", CODINGS)
def test_no_file_is_larger_than_its_limit_or_cuts_a_line(tmp_path, compression):
    with Site(tmp_path, compression=compression, file_bytes_max=SMALL_FILE) as site:
        site.post(200)
        site.run()
        site.check()
        sizes = [len(content(site, name)) for name in site.names]
        assert max(sizes) <= SMALL_FILE
        assert min(sizes[:-1]) > SMALL_FILE - 200
        assert not any(name.endswith(".part") for name in site.names[:-1])


def content(site, name):
    data = (site.folder / name).read_bytes()
    return zstd.decompress(data) if ".zst" in name else data


def test_a_line_larger_than_a_file_has_a_file_of_its_own(tmp_path):
    with Site(tmp_path, file_bytes_max=SMALL_FILE) as site:
        site.post(1)
        site.post(1, size=5000)
        site.post(1)
        site.run()
        site.check()
        assert [content(site, name).count(b"\n") for name in site.names] == [1, 1, 1]


def test_an_old_file_is_finished_while_nothing_comes(tmp_path):
    with Site(tmp_path, file_age_max_s=0.2) as site:
        until = time.monotonic() + 0.3
        site.run(lambda sink: time.monotonic() > until)
        assert site.names == []  # no line, no file
        site.post(3)
        site.run(lambda sink: sink.idle and not site.names[-1].endswith(".part"))
        site.check()


def test_age_counts_from_the_first_line_also_over_a_restart(tmp_path):
    with Site(tmp_path, file_age_max_s=0.5) as site:
        site.post(1)
        site.run()
        assert site.names[0].endswith(".part")
        time.sleep(0.5)
        site.post(1)
        started = time.monotonic()
        site.run(lambda sink: sink.idle and not site.names[0].endswith(".part"))
        assert time.monotonic() - started < 0.45
        site.check()


@pytest.mark.parametrize(("old", "new"), [CODINGS, CODINGS[::-1]])
def test_another_compression_begins_another_file(tmp_path, old, new):
    with Site(tmp_path, compression=old) as site:
        site.post(10)
        site.run()
        site.settings = with_settings(site, compression=new)
        site.post(10)
        site.run()
        site.check()
        assert [".zst" in name for name in site.names] == [c == "zstd" for c in (old, new)]


def test_lines_that_come_slowly_are_gathered_before_a_sync(tmp_path, monkeypatch):
    disk = Disk()
    monkeypatch.setattr(files, "os", disk)
    with Site(tmp_path, sync_interval_ms=300) as site:

        def feed(sink):
            site.post(1)
            return len(site.expected()) == 20

        site.run(feed)  # much less than 300 ms
        site.check()
        assert disk.calls.count("fdatasync") <= 2


@pytest.mark.parametrize("wanted", [True, False])
def test_somebody_who_waits_for_the_sink_ends_the_gathering(tmp_path, wanted):
    with Site(tmp_path, sync_interval_ms=60_000) as site:
        site.post(1)
        if wanted:
            site.log.want(0, site.log.tail - 8, True)
        until = time.monotonic() + 0.5
        sink = site.run(lambda sink: sink.idle or time.monotonic() > until)
        assert (time.monotonic() < until) == wanted
        assert sink.idle  # closing syncs


def test_a_drain_does_not_gather(tmp_path):
    with Site(tmp_path, sync_interval_ms=60_000) as site:
        site.post(5)

        async def main():
            sink = FileSink(site.log, site.index, site.settings)
            task = asyncio.create_task(sink.run())
            assert await sink.drain(5.0)
            assert sink.idle
            await sink.close()
            await task

        asyncio.run(main())
        site.check()


def test_nothing_is_written_before_the_log_has_it_durable(tmp_path):
    with Site(tmp_path) as site:
        site.post(1)
        site.writer.post(2)  # committed only
        site.run(lambda sink: site.log.cursor(site.index).lsn >= site.log.durable)
        assert len(site.written()) == 1
        site.writer.settle()
        site.run()
        site.check()


# ---- SIGKILL -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tear", [None, 700])
@pytest.mark.parametrize("compression", CODINGS)
def test_sigkill_at_every_step_leaves_each_line_once(tmp_path, compression, tear):
    points = kill_at_every_step(tmp_path, compression, tear)
    assert points > 20  # steps of the first child, each of which it was killed at


def kill_at_every_step(tmp_path, compression, tear, make=FileSink, module=files):
    settings = {"compression": compression, "file_bytes_max": SMALL_FILE}
    for point in range(200):
        base = tmp_path / str(point)
        base.mkdir()
        with Site(base, **settings) as site:
            site.post(35)

        def child(at, base=base):
            """A gateway's start, the sink until it is idle; the cursor is persisted often."""
            with Site(base, make, **settings) as site:
                module.os = Disk(at)
                site.run(lambda sink: (site.log.sync() and False) or sink.idle)

        first = end_of_child(child, kill_at(point, tear))
        end_of_child(child, kill_at(point * 5 % 13, tear))  # the next start is killed too
        with Site(base, make, **settings) as site:
            site.post(5)
            site.run(within_s=3.0)
            site.check()
            assert site.log.unexplained(site.index) == 0
        if first == 0:
            return point
    raise AssertionError("no end")


def end_of_child(child, at):
    _, status = os.waitpid(fork(lambda: child(at)), 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code


def post_and_write(base, settings):
    """In a child: until it is killed, or everything it was to post is in files."""
    with Site(base, capacity_bytes=CAPACITY, **settings) as site:

        def step(sink):
            room = CAPACITY // 2 - site.log.tail
            if room > 0:
                site.post(5, size=random.randrange(200))
            return room <= 0 and sink.idle

        site.run(step)


CAPACITY = 4 << 20
"""Nothing is written over, so the log at the end says what the files must hold."""


@pytest.mark.parametrize("compression", CODINGS)
def test_sigkill_at_any_time_leaves_each_line_once(tmp_path, compression):
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    settings = {"compression": compression, "file_bytes_max": 20_000, "sync_interval_ms": 5}
    with Site(tmp_path, capacity_bytes=CAPACITY, **settings) as site:
        site.post(1)
    for _ in range(20):
        pid = fork(lambda: post_and_write(tmp_path, settings))
        time.sleep(draw.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with Site(tmp_path, **settings) as site:
        site.post(5)
        site.run()
        site.check()
        assert len(site.names) > 3


# ---- power cuts ----------------------------------------------------------------------------------


def cut_power_often(base, seed, make=FileSink, module=files):
    """Run until the power is cut at some step, up to three times, then to the end, and check."""
    base.mkdir()
    draw = random.Random(seed)
    settings = {
        "file_bytes_max": draw.choice((400, SMALL_FILE, 1 << 20)),
        "compression": draw.choice(CODINGS),
    }
    with Site(base, make, **settings) as site:
        site.post(draw.randrange(1, 30))
        disk = None
        for _ in range(draw.randint(1, 3)):
            cursors = [site.log.cursor(site.index)]
            disk = Disk.after(disk, power_cut_at(draw.randrange(25), draw, cursors, site))
            module.os = disk
            with contextlib.suppress(PowerCut):
                site.run()
            module.os = os
            disk.cut_power(site.folder, draw)
            # what was persisted is one of those that were confirmed, perhaps an older one
            cursors.append(site.log.cursor(site.index))
            site.log.set_cursor(site.index, draw.choice(cursors))
            site.post(draw.randrange(3))
        site.run(within_s=3.0)
        site.check()


def power_cut_at(point, draw, cursors, site):
    tear = draw.choice((None, draw.randrange(300)))

    def at(number, name):
        cursors.append(site.log.cursor(site.index))
        if number >= point:
            if name == "write" and tear is not None and number == point:
                return tear
            raise PowerCut
        return None

    return at


def test_a_power_cut_at_any_step_leaves_each_line_once(tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    for run in range(150):
        cut_power_often(tmp_path / str(run), seed + run)


FOUND = (AssertionError, LookupError, ValueError, zstd.ZstdError)
"""What `Site.check` raises."""


def mutant(module, old, new):
    """FileSink and its module of files, one line of `module` being another one."""
    made = []
    for original in (files, file):
        source = inspect.getsource(original)
        if original.__name__ == f"gateway.sinks.{module}":
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        changed = types.ModuleType(original.__name__)
        with mock.patch.dict(sys.modules, {each.__name__: each for each in made}):
            exec(compile(source, original.__file__, "exec"), changed.__dict__)
        made.append(changed)
    return made[1].FileSink, made[0]


POWER_MUTANTS = {
    "no fdatasync": ("files", "        os.fdatasync(self._fd)\n", ""),
    "no sync of a new name": (
        "files",
        "            self._folder.sync()\n            self._name",
        "            self._name",
    ),
    "confirmed when it is written": (
        "file",
        '                self._count("file_bytes", end)\n',
        "                self._lines.confirm()\n",
    ),
    "not cut": (
        "files",
        "self.lines_bytes = end_below(pread, size, cursor)",
        "self.lines_bytes = size",
    ),
    "frames not cut": ("files", "end = sum(whole[keep - 1]) if keep else 0", "end = size"),
    "finished without a sync": ("file", "                self._sync_part(part)\n", ""),
    "written lines are not passed": ("file", "and not self._pass(*newest)", "and False"),
}


@pytest.mark.parametrize("change", POWER_MUTANTS.values(), ids=POWER_MUTANTS)
def test_power_cuts_find(tmp_path, change):
    make, module = mutant(*change)
    for run in range(200):
        try:
            cut_power_often(tmp_path / str(run), run, make, module)
        except FOUND:
            return
    raise AssertionError("not found")


@pytest.mark.parametrize(
    "name", ["not cut", "written lines are not passed", "confirmed when it is written"]
)
def test_kills_find(tmp_path, name):
    make, module = mutant(*POWER_MUTANTS[name])
    with pytest.raises(FOUND):
        kill_at_every_step(tmp_path, "none", 700, make, module)


# ---- trouble: held, and on again without a restart -----------------------------------------------


def failing(name, error, times, after=0):
    """For `Disk.at`: the calls of `name` fail, `times` of them, the first `after` do not."""
    left = {"skip": after, "fail": times}

    def at(number, called):
        if called != name:
            return
        if left["skip"]:
            left["skip"] -= 1
        elif left["fail"]:
            left["fail"] -= 1
            raise OSError(error, os.strerror(error))

    return at


def states(site):
    return [status.state for status in site.statuses]


@pytest.mark.parametrize("compression", CODINGS)
@pytest.mark.parametrize(
    ("name", "error"),
    [
        *(("write", code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO)),
        *(("fdatasync", code) for code in (errno.EIO, errno.ENOSPC)),
        *((name, errno.EIO) for name in ("fsync", "rename", "create", "unlink", "ftruncate")),
    ],
)
def test_a_call_that_fails_holds_the_sink_until_it_works(
    tmp_path, monkeypatch, compression, name, error
):
    with Site(tmp_path, compression=compression, file_bytes_max=SMALL_FILE) as site:
        site.post(15)
        site.run()
        site.post(15)
        monkeypatch.setattr(files, "os", Disk(failing(name, error, 3)))
        site.run()
        monkeypatch.setattr(files, "os", Disk(failing(name, error, 3, after=1)))
        site.post(25)
        site.run()
        site.check()
        if name not in ("unlink", "ftruncate"):
            said = site.statuses[-1].last_error
            assert os.strerror(error) in said
            assert str(site.folder) in said
        assert states(site)[-1] == "closed"
        assert site.log.counter_total(_log.COUNTERS["file_up"]) == 0
        if name in ("write", "fdatasync"):
            assert site.log.counter_total(_log.COUNTERS["file_write_failures"]) >= 3


def torn_write(at_byte):
    """For `Disk.at`: the disk fills inside of each write."""

    def at(number, called):
        if called == "torn":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return at_byte if called == "write" else None

    return at


def test_a_torn_line_is_cut_while_the_disk_is_full(tmp_path, monkeypatch):
    with Site(tmp_path) as site:
        site.post(3)
        site.run()
        site.post(3)
        monkeypatch.setattr(files, "os", Disk(torn_write(77)))
        site.run(lambda sink: states(site).count("held") > 3)
        assert site.written() == site.expected()[:3]
        monkeypatch.setattr(files, "os", os)
        site.run()
        site.check()


def test_a_file_whose_sync_failed_is_not_written_again(tmp_path):
    with Site(tmp_path) as site:
        names = names_after_a_failed_sync(site, files)
        site.check()
        assert len(names) == 2
        assert content(site, names[0]).count(b"\n") == 3


def test_a_sync_that_is_only_repeated_loses_lines(tmp_path):
    sync = "        os.fdatasync(self._fd)\n"
    again = "        try: os.fdatasync(self._fd)\n        except OSError: os.fdatasync(self._fd)\n"
    make, module = mutant("files", sync, again)
    with Site(tmp_path, make) as site:
        names_after_a_failed_sync(site, module)
        with pytest.raises(FOUND):
            site.check()


def names_after_a_failed_sync(site, module):
    """The kernel drops what it could not write and says so once (errseq)."""
    site.post(3)
    site.run()
    site.post(3)
    left = [True]

    def at(number, name):
        if name == "fdatasync" and left:
            left.clear()
            data = disk.syncing.read_bytes()
            with disk.syncing.open("r+b") as file:
                file.seek(len(b"".join(site.expected()[:3])))
                file.write(bytes(len(data) - file.tell()))
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    module.os = disk = Disk(at)
    try:
        site.run()
    finally:
        module.os = os
    assert not left
    return site.names


def take_away(site):
    for name in site.names:
        (site.folder / name).unlink()


def move_away(site):
    for name in site.names:
        (site.folder / name).rename(site.base / name)


def remove_folder(site):
    shutil.rmtree(site.folder)


def replace_folder(site):
    site.folder.rename(site.base / "old")
    site.folder.mkdir()


def put_another_in_its_place(site):
    for name in site.names:
        (site.folder / name).unlink()
        (site.folder / name).write_bytes(b"")


def cut_short(site):
    for name in site.names:
        os.truncate(site.folder / name, 0)


GONE = [
    *(take_away, move_away, remove_folder, replace_folder, put_another_in_its_place, cut_short),
]


@pytest.mark.parametrize("gone", GONE)
def test_nothing_is_confirmed_that_nobody_can_find(tmp_path, gone):
    with Site(tmp_path) as site:
        assert lines_found_after(gone, site, files) == 4
        assert "removed, replaced or cut" in site.statuses[-1].last_error


@pytest.mark.parametrize("gone", GONE)
def test_without_the_look_it_is(tmp_path, gone):
    look = "self._folder.expect(self.entry.name, self._fd, self._bytes)"
    blind, module = mutant("files", look, "pass")
    with Site(tmp_path, blind) as site:
        assert lines_found_after(gone, site, module) == 0


def lines_found_after(gone, site, module):
    """Of four events that came just before the file, with three confirmed ones, was gone."""
    site.post(3)
    site.run()
    site.post(4)
    left = [gone]
    module.os = Disk(lambda number, name: name == "fdatasync" and left and left.pop()(site))
    try:
        site.run()
    finally:
        module.os = os
    found = site.written()
    assert all(line in site.expected()[3:] for line in found)
    return len(found)


def test_a_full_disk_recovers_by_itself(tmp_path):
    done = on_tmpfs(
        tmp_path / "small",
        f'"{sys.executable}" -m tests.file_sink_site fill "$MOUNT" "{tmp_path}"',
        size="256k",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("No space left on device; make room") == 1
    assert "held, then all 400 lines" in done.stdout


def test_a_folder_that_cannot_be_made_holds(tmp_path):
    (tmp_path / "events").write_text("a file")
    with Site(tmp_path) as site:
        site.post(1)

        def step(sink):
            if "held" in states(site) and (tmp_path / "events").is_file():
                (tmp_path / "events").unlink()
            return sink.idle

        site.run(step)
        site.check()


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder"])
def test_only_a_regular_file_is_taken_for_a_part(tmp_path, kind):
    with Site(tmp_path) as site:
        site.post(1)
        site.run()
        part = site.folder / site.names[0]
        part.rename(tmp_path / "elsewhere")
        if kind == "symlink":
            part.symlink_to(tmp_path / "elsewhere")
        elif kind == "fifo":
            os.mkfifo(part)
        else:
            part.mkdir()
        site.post(1)
        site.run(lambda sink: "held" in states(site))
        assert (tmp_path / "elsewhere").read_bytes() == site.expected()[0]


def test_a_finished_file_that_is_not_the_logs_is_put_aside(tmp_path):
    with Site(tmp_path, file_bytes_max=SMALL_FILE) as site:
        site.post(25)
        there = site.folder / files.name_of(site.log.identity, 4096, site.log.tail, False)
        site.folder.mkdir()
        there.write_bytes(b"no line")
        site.run()
        aside = site.folder / f"other-{there.name}"
        assert aside.read_bytes() == b"no line"
        aside.unlink()
        site.check()


def test_no_finished_file_is_written_over(tmp_path):
    with Site(tmp_path) as site:
        site.post(9)
        site.run()
        (part,) = site.names
        lsns = [json.loads(line)["lsn"] for line in site.expected()]
        there = site.folder / files.name_of(site.log.identity, lsns[0], lsns[-1], False)
        there.write_bytes(b"")
        site.settings = with_settings(site, file_age_max_s=0)

        def step(sink):
            if "held" in states(site) and there.exists() and not there.stat().st_size:
                there.rename(tmp_path / "empty")
            return not (site.folder / part).exists()

        site.run(step)
        assert "move it away" in site.statuses[-1].last_error
        site.check()


def with_settings(site, **changed):
    return msgspec.structs.replace(site.settings, **changed)


def test_a_log_put_back_from_a_copy_loses_no_event(tmp_path):
    assert lines_after_a_restore(tmp_path, FileSink) == 9


def test_without_the_comparison_it_does(tmp_path):
    trusting, _ = mutant("file", "if line == written and end:", "if line and end:")
    assert lines_after_a_restore(tmp_path, trusting) < 9


def lines_after_a_restore(base, make):
    settings = {"file_bytes_max": SMALL_FILE}
    with Site(base, make, **settings) as site:
        site.post(5)
    shutil.copy(base / "gateway.log", base / "copy")
    with Site(base, make, **settings) as site:
        site.post(4)
        site.settings = with_settings(site, file_age_max_s=0)
        site.run(lambda sink: sink.idle and site.names and not site.names[-1].endswith(".part"))
    shutil.copy(base / "copy", base / "gateway.log")
    with Site(base, make, **settings) as site:
        for seq in range(4):
            site.writer.put("other-device", b'{"metrics":{"t":%d.75}}' % (10 + seq))
        site.writer.settle()
        site.run()
        return len(set(site.written()) & set(site.expected()))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_log_put_back_from_a_copy_takes_no_line_of_the_part_away(tmp_path, compression):
    assert lines_lost_by_restores(tmp_path, compression, FileSink) == set()


def test_without_a_look_at_what_is_cut_it_does(tmp_path):
    blind, _ = mutant("files", "if line and not is_logged(", "if not line and is_logged(")
    assert lines_lost_by_restores(tmp_path, "none", blind) != set()


def lines_lost_by_restores(base, compression, make):
    settings = {"compression": compression}
    with Site(base, make, **settings) as site:
        site.post(5)
        site.run()
    shutil.copy(base / "gateway.log", base / "copy")
    written = set()
    for _ in range(2):
        with Site(base, make, **settings) as site:
            site.post(4)
            site.run()
            written |= set(site.written())
        shutil.copy(base / "copy", base / "gateway.log")
        with Site(base, make, **settings) as site:
            site.run()
            written -= set(site.written())
    for path in site.folder.glob("other-*"):
        data = path.read_bytes()
        data = zstd.decompress(data) if path.suffix == ".zst" else data
        written -= set(data.splitlines(keepends=True))
    return written


def test_a_damaged_record_ends_the_sink_and_says_where(tmp_path):
    with Site(tmp_path) as site:
        site.post(3)
        lsn = json.loads(site.expected()[1])["lsn"]
        with (tmp_path / "gateway.log").open("r+b") as log:
            log.seek(4 * 4096 + lsn % site.capacity_bytes + 80)
            log.write(b"!")
        sink = site.run(lambda sink: False)
        assert (sink.status().state, sink.status().corrupt_lsn) == ("damaged", lsn)
        assert site.log.cursor(site.index).lsn <= lsn
        assert SinkStatus.read(tmp_path / "file-status.json").corrupt_lsn == lsn


def test_a_disk_that_hangs_is_said_and_left_behind(tmp_path, monkeypatch):
    go_on = threading.Event()
    hang = Disk(lambda number, name: name != "write" or go_on.wait(20))
    monkeypatch.setattr(files, "os", hang)
    monkeypatch.setattr(file, "STUCK_S", 0.1)
    monkeypatch.setattr(file, "CLOSE_S", 0.1)
    with Site(tmp_path) as site:
        site.post(1)

        async def main():
            sink = FileSink(site.log, site.index, site.settings, on_status=site.statuses.append)
            task = asyncio.create_task(sink.run())
            while "stuck" not in states(site):
                await asyncio.sleep(0.01)
            assert "look at the disk" in sink.status().last_error
            started = time.monotonic()
            await sink.close()
            assert time.monotonic() - started < 5
            go_on.set()
            await task

        asyncio.run(main())
        site.check()


# ---- what else is in the folder ------------------------------------------------------------------


def test_retention_removes_the_oldest_finished_files_of_this_log_only(tmp_path):
    with Site(tmp_path, file_bytes_max=SMALL_FILE, files_max=3) as site:
        site.folder.mkdir(mode=0o700)
        foreign = [
            files.name_of(site.log.identity ^ 1, 1, 2, False),
            files.name_of(site.log.identity ^ 1, 3, None, False),
            "notes.txt",
        ]
        for name in foreign:
            (site.folder / name).write_text("not a line")
        site.post(100)
        site.run()
        own = [name for name in site.names if name not in foreign]
        assert len(own) == 4
        assert own[-1].endswith(".part")
        kept = b"".join(content(site, name) for name in own).splitlines(keepends=True)
        assert kept == site.expected()[-len(kept) :]
        removed = site.log.counter_total(_log.COUNTERS["file_removed"])
        assert removed + 3 == site.log.counter_total(_log.COUNTERS["file_files"])
        for name in foreign:
            assert (site.folder / name).read_text() == "not a line"


def test_finished_files_may_be_taken_away(tmp_path):
    with Site(tmp_path, file_bytes_max=SMALL_FILE) as site:
        site.post(35)
        site.run()
        before = site.written()
        for name in site.names[:-1]:
            (site.folder / name).unlink()
        kept = len(site.written())
        site.post(5)
        site.run()
        assert site.written() == site.expected()[len(before) - kept :]


def test_the_docs_commands_read_the_files(tmp_path):
    text = (ROOT / "docs" / "file-sink.md").read_text()
    commands = re.search(r"## Reading\n\n```sh\n(.*?)```", text, re.DOTALL)[1].splitlines()
    for compression, command in zip(CODINGS, commands):
        base = tmp_path / compression
        base.mkdir()
        with Site(base, compression=compression, file_bytes_max=SMALL_FILE) as site:
            site.post(35)
            site.run()
            command = command.replace("boiler-7", "dev-3").replace("temp_c", "t")
            done = subprocess.run(
                ["sh", "-ec", command], cwd=site.folder, capture_output=True, text=True
            )
            assert (done.returncode, done.stderr) == (0, "")
            lines = b"".join(content(site, name) for name in site.names[:-1]).splitlines()
            if compression == "none":
                own = [line for line in map(json.loads, lines) if line["device_id"] == "dev-3"]
                assert [json.loads(line) for line in done.stdout.splitlines()] == [
                    [line["received_at"], line["event"]["metrics"]["t"]] for line in own
                ]
            else:
                assert done.stdout.split() == [str(len(lines)), "t"]


# ---- optional ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", CODINGS)
def test_a_sink_that_is_not_required_skips_what_was_written_over(tmp_path, compression):
    with Site(
        tmp_path, compression=compression, sinks=("mqtt", "file"), required=[True, False]
    ) as site:
        site.post(10)
        site.run()
        site.writer.lap(site.log.tail + 3 * site.capacity_bytes)
        site.post(10)
        site.run()
        cursor = site.log.cursor(site.index)
        assert cursor.skipped > 0
        assert site.log.unexplained(site.index) == 0
        lines = site.written()
        assert len(lines) == cursor.published
        lsns = [json.loads(line)["lsn"] for line in lines]
        assert lsns == sorted(set(lsns))
        assert lines[-10:] == site.last_lines(10)
