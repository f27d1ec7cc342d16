"""The log through its binding: the file's bytes, errors of the disk, what one commit costs it.

The rules one by one are in tests/native/test_log*.c.
"""

import contextlib
import errno
import gzip
import os
import resource
import statistics
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway import _log
from tests import log_tools
from tests.log_tools import GOLDEN, PAD, Image, LogRecord, crc32c, siphash13
from tests.native_build import CACHE, ROOT, TESTS

BODY = b'{"seq":%d,"metrics":{"temp_c":21.5,"rpm":1200}}'
MIB = 1 << 20


@contextlib.contextmanager
def opened(path: Path, *sinks: str, accept: bool = False) -> Iterator[_log.Log]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        log = _log.Log.open(str(path), fd, sinks or ["mqtt"], accept)
        try:
            yield log
        finally:
            log.close()
    finally:
        os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.log"
    _log.create(str(path), MIB)
    return path


@pytest.fixture
def put() -> Iterator[Callable[..., int]]:
    """Append an event; the code (0: accepted)."""
    doors: dict[int, _log.Ingest] = {}

    def append(log: _log.Log, body: bytes, device_id: str = "dev-1") -> int:
        door = doors.get(id(log)) or doors.setdefault(id(log), _log.Ingest(log, 0))
        return door.event(device_id, body, _log.now_ns())

    append.doors = doors  # type: ignore[attr-defined]
    yield append
    for door in doors.values():
        door.close()


def image(path: Path) -> Image:
    return Image(bytearray(path.read_bytes()))


def publish(log: _log.Log, sink: int = 0, skip: int | None = None) -> list[_log.Record]:
    """What a publisher does, up to committed; leaves out the record with seq `skip`."""
    cursor, records = log.cursor(sink), []
    while record := log.read(cursor.lsn):
        told = record.kind == _log.DATA and record.seq != skip
        cursor = cursor._replace(
            lsn=record.lsn + record.size,
            ordinal=cursor.ordinal + (record.kind == _log.DATA),
            published=cursor.published + told,
        )
        records.append(record)
    log.set_cursor(sink, cursor)
    return records


# ---- the file's bytes


def test_checksums_of_the_second_implementation_are_right() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4
    # Python hashes bytes with siphash13 since 3.11; PYTHONHASHSEED=0 keys it with zeros
    code = "print(*[hash(bytes(range(n))) & (1 << 64) - 1 for n in range(1, 40)])"
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    if sys.hash_info.algorithm == "siphash13" and sys.hash_info.cutoff == 0:
        own = [siphash13((0, 0), bytes(range(n))) for n in range(1, 40)]
        assert [int(word) for word in out.stdout.split()] == own


def test_golden_file_is_what_its_generator_writes() -> None:
    assert gzip.decompress(GOLDEN.read_bytes()) == bytes(log_tools.golden()[0].data)


def test_golden_file_is_read_by_the_code(tmp_path: Path) -> None:
    path = tmp_path / "golden.log"
    path.write_bytes(gzip.decompress(GOLDEN.read_bytes()))
    _, expected = log_tools.golden()
    slot = image(path).slot()
    with opened(path, "mqtt", "file") as log:
        found = log.recovery
        assert found is not None
        end = expected[-1].lsn + expected[-1].size
        assert (found.watermark, found.end, found.start) == (slot.watermark, end, end)
        assert (found.epoch, found.corrupt_bytes) == (4, 0)
        assert found.torn_bytes == expected[-1].lsn - expected[-2].lsn - expected[-2].size
        assert log.identity == image(path).identity.identity
        assert log.committed_ordinal == 5000 + sum(r.kind == _log.DATA for r in expected)
        assert [log.unexplained(i) for i in range(2)] == [0, 0]
        assert log.cursor(log.sink("file")) == (slot.cursors[1].lsn, 5004, 5004, 0, 0, 0)
        lsn, read = slot.cursors[0].lsn, []
        while record := log.read(lsn):
            read.append(record)
            lsn += record.size
    hole = read.pop(len(expected) - 1)
    assert (hole.kind, hole.epoch, hole.size) == (_log.PAD, 3, found.torn_bytes)
    for record, was in zip(read, expected, strict=True):
        assert (record.lsn, record.size, record.kind, record.epoch) == (
            was.lsn, was.size, was.kind, was.epoch
        )  # fmt: skip
        if was.kind != PAD:
            assert (record.device_id.encode(), record.body) == (was.device_id, was.body)
            assert record.received_at_ns == was.received_at_ns
            assert (record.seq, record.boot) == ((was.seq, was.boot) if was.flags else (None, None))


def test_recovery_writes_what_the_drawing_says(tmp_path: Path) -> None:
    path = tmp_path / "golden.log"
    path.write_bytes(gzip.decompress(GOLDEN.read_bytes()))
    before, expected = log_tools.golden()
    with opened(path, "mqtt", "file"):
        pass
    after = image(path)
    end = expected[-1].lsn + expected[-1].size
    torn = expected[-2].lsn + expected[-2].size
    before.put(
        torn,
        LogRecord(torn, PAD, 3, flags=log_tools.PAD_LOST, pad_size=expected[-1].lsn - torn).encode(
            after.identity.secret
        ),
    )
    old = before.slot()
    before.put_slot(
        log_tools.replace(
            old, sequence=42, epoch=4, ranges=(*old.ranges, (end, 4)), lost_from=(0, 0, torn, 0)
        )
    )
    assert after.data == before.data  # to the byte


def test_appended_records_are_as_drawn_to_the_byte(path: Path, put: Callable[..., int]) -> None:
    bodies = [BODY % n + b" " * (n * 37 % 900) for n in range(60)]
    with opened(path) as log:
        for n, body in enumerate(bodies):
            assert put(log, body, f"dev-{'x' * (n % 50)}") == 0
        log.follow(log.tail - 1, 0)
        assert len(publish(log)) == 60
        log.sync()
        log.sync()
        end = log.tail
        for door in put.doors.values():  # type: ignore[attr-defined]
            door.close()
    found = image(path)
    records = list(found.records(log_tools.FIRST_LSN))
    assert [(r.body, r.seq, r.epoch) for r in records] == [
        (body, n, 2) for n, body in enumerate(bodies)
    ]
    assert records[-1].lsn + records[-1].size == end
    slot = found.slot()
    assert (slot.watermark, slot.epoch) == (end, 2)
    assert slot.ranges == ((log_tools.FIRST_LSN, 2),)  # epoch 1 was empty, its range is replaced
    assert slot.cursors == (log_tools.SlotCursor("mqtt", end, 60, 60, 0, 0),)
    assert all(found.slots())


# ---- the binding


def test_create_refuses_sizes_that_are_no_power_of_two(tmp_path: Path) -> None:
    for size in (0, MIB - 8, MIB + 8, 3 * MIB, _log.CAPACITY_MAX * 2):
        with pytest.raises(ValueError, match="power of two"):
            _log.create(str(tmp_path / "x"), size)
    assert list(tmp_path.iterdir()) == []


def test_create_refuses_a_file_that_is_there(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        _log.create(str(path), MIB)
    assert path.read_bytes() == before


def test_create_stopped_by_its_progress_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _log.create(str(tmp_path / "x"), MIB, stop)
    assert list(tmp_path.iterdir()) == []


def test_second_gateway_is_refused(path: Path) -> None:
    with opened(path), pytest.raises(_log.LogLocked, match="another process"), opened(path):
        pass


def test_something_else_is_not_a_log(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x" * 5 * MIB)
    with pytest.raises(_log.NotALog, match="not a gateway log"), opened(path):
        pass


def test_corruption_carries_its_ranges(path: Path, put: Callable[..., int]) -> None:
    with opened(path) as log:
        for n in range(5):
            assert put(log, BODY % n) == 0
        log.follow(log.tail - 1, 0)
        log.sync()
        log.sync()
        for door in put.doors.values():  # type: ignore[attr-defined]
            door.close()
    damaged = image(path)
    third = list(damaged.records(log_tools.FIRST_LSN))[2]
    damaged.put(third.lsn + 80, b"!!!!")
    path.write_bytes(damaged.data)
    with pytest.raises(_log.LogCorrupt, match=f"lsn {third.lsn}") as caught, opened(path):
        pass
    assert caught.value.recovery is not None
    assert caught.value.recovery.corrupt == ((third.lsn, third.lsn + third.size),)
    with opened(path, accept=True) as log:
        assert [r.seq for r in publish(log) if r.kind == _log.DATA] == [0, 1, 3, 4]
        assert log.unexplained(0) == 0


def test_log_is_not_closed_under_a_call(path: Path) -> None:
    with opened(path) as log:
        committer = threading.Thread(target=log.run_committer, args=(5,))
        committer.start()
        while True:  # until it is in the call
            try:
                assert log.sync() in (True, False)
                with pytest.raises(ValueError, match="another thread"):
                    log.close()
                break
            except pytest.fail.Exception:
                pytest.fail("closed under a running committer")
        log.stop_committer()
        committer.join()


def test_closed_log_says_so(path: Path) -> None:
    with opened(path) as log:
        pass
    with pytest.raises(ValueError, match="closed"):
        log.read(4096)


def test_publisher_that_skips_one_record_shows_exactly_one(
    path: Path, put: Callable[..., int]
) -> None:
    with opened(path) as log:
        for n in range(9):
            assert put(log, BODY % n) == 0
        log.follow(log.tail - 1, 0)
        assert log.unexplained(0) == 0
        publish(log, skip=4)
        assert log.unexplained(0) == 1
        for door in put.doors.values():  # type: ignore[attr-defined]
            door.close()


# ---- errors of the disk


@pytest.fixture(scope="module")
def preload() -> Path:
    library = CACHE / "preload_errors.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_suffix(f".{os.getpid()}")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-D_GNU_SOURCE", "-o", fresh]
    subprocess.run([*command, TESTS / "preload_errors.c"], check=True)
    fresh.rename(library)
    return library


def run_python(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


SYNC_FAILS = """
import os, sys
from gateway import _log
path = sys.argv[1]
try:
    log = _log.Log.open(path, os.open(path, os.O_RDWR), ["mqtt"])
except _log.LogError as e:
    print("open:", e)
    raise SystemExit
door = _log.Ingest(log, 0)
accepted = 0
try:
    log.takeover()
    for accepted in range(20):
        assert door.event("dev-1", b'{"seq":%d,"metrics":{}}' % accepted, 0) == 0
        log.follow(log.tail - 1, 0)
        log.sync()
except _log.LogError as e:
    print("sync:", e)
assert log.state == _log.FAILED, log.state
durable = log.durable
for _ in range(3):  # no OK afterwards, whoever asks
    assert door.event("dev-1", b'{"metrics":{}}', 0) != 0
    try:
        log.sync()
        raise SystemExit("a sync after the error said OK")
    except _log.LogError:
        pass
next = _log.Log.attach(os.open(path, os.O_RDWR), log.shared_fd)
try:
    next.takeover()
    raise SystemExit("the next committer said OK")
except _log.LogError:
    pass
assert log.durable == durable
print(accepted)
"""


@pytest.mark.parametrize("nth", [1, 2, 3, 5, 9])
def test_error_of_any_fdatasync_is_final(path: Path, preload: Path, nth: int) -> None:
    out = run_python(SYNC_FAILS, path, LD_PRELOAD=str(preload), GW_FDATASYNC_FAILS=str(nth))
    assert "Input/output error" in out
    assert out.startswith("open:") == (nth <= 2)
    with opened(path) as log:  # the file is as good as the disk is
        assert log.recovery is not None
        assert log.recovery.corrupt == ()
        if nth > 4:
            assert log.recovery.records == int(out.split()[-1]) + 1


def test_full_disk_leaves_nothing_behind(tmp_path: Path, preload: Path) -> None:
    code = """
    import sys
    from gateway import _log
    try:
        _log.create(sys.argv[1] + "/x", 1 << 20)
    except OSError as e:
        print(e.errno)
    """
    out = run_python(code, tmp_path, LD_PRELOAD=str(preload), GW_FALLOCATE_FAILS="1")
    assert int(out) == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit_leaves_nothing_behind(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            _log.create(str(tmp_path / "x"), MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# ---- what a commit costs the disk

COMMITS = """
import os, statistics, sys
from gateway import _log
path, cold = sys.argv[1], sys.argv[2] == "cold"

def written():
    with open("/proc/self/io") as f:
        return int(next(line for line in f if line.startswith("write_bytes")).split()[1])

def drop():
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)

if cold:
    drop()
fd = os.open(path, os.O_RDWR)
log = _log.Log.open(path, fd, ["mqtt"])
door = _log.Ingest(log, 0)
costs = []
for n in range(13):
    before = written()
    assert door.event("dev-1", b'{"seq":%d,"metrics":{"temp_c":21.5}}' % n, 0) == 0
    end = log.follow(log.tail - 1, 0)
    c = log.cursor(0)
    log.set_cursor(0, c._replace(lsn=end, ordinal=c.ordinal + 1, published=c.published + 1))
    log.sync()
    costs.append(written() - before)
    # move on by some pages, so that no page stays in use
    for _ in range(3):
        assert door.event("dev-1", b'{"metrics":{},"payload":"' + b"x" * 9000 + b'"}', 0) == 0
    c = log.cursor(0)
    end = log.follow(log.tail - 1, 0)
    log.set_cursor(0, c._replace(lsn=end, ordinal=c.ordinal + 3, published=c.published + 3))
    log.sync()
print(*costs)
"""


@pytest.fixture
def disk_path(tmp_path: Path) -> Iterator[Path]:
    """A log on a file system that has a disk."""
    kinds = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        kinds[where] = kind
    place = next(str(p) for p in (tmp_path, *tmp_path.parents) if str(p) in kinds)
    folder = tmp_path if kinds[place] not in ("tmpfs", "ramfs") else CACHE
    path = folder / f"commits-{os.getpid()}.log"
    _log.create(str(path), 16 * MIB)
    yield path
    path.unlink()


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_small_commit_writes_at_most_16_kib(disk_path: Path, cache: str) -> None:
    with opened(disk_path):
        pass  # a second opening, as after a restart
    costs = [int(word) for word in run_python(COMMITS, disk_path, cache).split()]
    print(costs)
    assert 4096 <= statistics.median(costs) <= 16384, costs
