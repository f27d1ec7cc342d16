"""System calls that fail, disks that are full, limits that are tiny, clocks that jump: the gateway
goes on or ends with a word, and what was accepted arrives (guarantees 2, 7, 15).

The long run, every call of a clean run: python -m tests.syscall_faults --all
"""

import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from errno import EIO
from pathlib import Path

import pytest

from gateway.errors import Exit
from tests import syscall_faults
from tests.gateway_process import ROOT, GatewayProcess, free_port, wait_for
from tests.syscall_faults import EVER, SAMPLE, Fault, Run

CASES = (None, *SAMPLE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """All of them side by side: mostly they wait."""
    return syscall_faults.run_all(tmp_path_factory.mktemp("faults"), list(CASES), 4)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_no_promise_is_broken_when(runs: list[Run], number: int) -> None:
    one = runs[number]
    assert one.violations == [], one.output
    if one.fault is None:
        total = syscall_faults.ENQUEUED + syscall_faults.DURABLE
        assert len(one.accepted) == total, one.statuses
        assert min(one.counts.values()) > 0, "the library sees every kind of call"
    else:
        assert one.hits, "the script has no such call any more"
        if one.fault.kind == "fdatasync":
            late = one.fault.first > 2  # the first two are the supervisor's own
            assert one.code == (Exit.LOG_FAILED if late else Exit.LOG_UNUSABLE)
        if one.fault.kind == "write":
            assert one.code == 0, "no line of the log is worth an event"


def test_faults_of_the_sample_strike_while_events_are_taken(runs: list[Run]) -> None:
    struck = [one for one in runs if one.hits and one.accepted and one.code == Exit.LOG_FAILED]
    assert len(struck) >= 3


def test_what_failed_and_what_to_do_is_said(runs: list[Run]) -> None:
    for one in (one for one in runs if one.code == Exit.LOG_FAILED):
        (failed,) = re.findall(r"the log has FAILED: (.*)", one.output)
        assert re.fullmatch(r"/.*/log/gateway\.log: .*of the log.*error \(EIO\)", failed)
        lost = r"lost at most: \d+ bytes .* everything answered durable or sink is safe"
        assert re.search(lost, one.output)
        assert "start the gateway again: it recovers" in one.output


def test_a_start_on_a_disk_that_still_fails_says_that_another_one_does_not_help(
    runs: list[Run],
) -> None:
    one = runs[CASES.index(Fault("fdatasync", 1, EIO, EVER))]
    assert one.code == Exit.LOG_UNUSABLE
    assert "another start does not help before it is mended" in one.output


# ---- controls ------------------------------------------------------------------------------------


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    with syscall_faults.broker(tmp_path) as broker:
        yield broker


def test_control_a_gateway_that_ignores_a_failed_sync_is_found(
    tmp_path: Path, recorder: tuple[int, Path]
) -> None:
    ignored = Fault("fdatasync", 6, EIO, EVER, lies=True)
    one = syscall_faults.run(tmp_path / "run", "control", *recorder, ignored)
    assert any("2xx after a failed fdatasync" in text for text in one.violations)


def test_control_events_that_do_not_arrive_are_found(
    tmp_path: Path, recorder: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscall_faults, "ARRIVES_WITHIN_S", 0.5)
    other = tmp_path / "another.ndjson"
    other.touch()
    one = syscall_faults.run(tmp_path / "run", "control", recorder[0], other)
    assert any("50 are missing" in text for text in one.violations)


# ---- room, limits, clocks ------------------------------------------------------------------------


def serve(*words: str, **sets: object) -> list[str]:
    settings = {
        "http.port": free_port(),
        "http.workers": 1,
        "http.drain_deadline_ms": 0,
        "log.capacity_bytes": 1 << 20,
        "mqtt.url": f"mqtt://127.0.0.1:{free_port()}",
        **{key.replace("__", "."): value for key, value in sets.items()},
    }
    command = [*words, sys.executable, "-m", "gateway", "serve"]
    return command + [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]


def test_a_full_disk_at_the_first_start_leaves_nothing_behind(tmp_path: Path) -> None:
    command = serve(log__directory=tmp_path / "disk" / "log", log__capacity_bytes=4 << 20)
    (tmp_path / "disk").mkdir()
    script = (
        'mount -t tmpfs -o size=2M none "$0" && { "$@"; echo "code $?"; find "$0"/log -type f; }'
    )
    own_mounts = [
        "unshare",
        "--mount",
        *([] if os.getuid() == 0 else ["--user", "--map-root-user"]),
    ]
    ended = subprocess.run(
        [*own_mounts, "sh", "-c", script, str(tmp_path / "disk"), *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert ended.stdout == f"code {Exit.LOG_UNUSABLE:d}\n", ended
    assert f"{tmp_path}/disk/log/gateway.log" in ended.stderr
    assert "No space left on device; free some space, or choose a smaller" in ended.stderr


def test_any_limit_of_open_files_is_enough_or_is_named(tmp_path: Path) -> None:
    def start(limit: int) -> str:
        """What is wrong, or nothing."""
        folder = tmp_path / str(limit)
        gateway = GatewayProcess(folder)
        folder.mkdir()
        command = serve(
            "prlimit", f"--nofile={limit}", http__port=gateway.port, log__directory=folder
        )
        with (folder / "stderr.txt").open("ab") as output:
            gateway.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            wait_for(lambda: not gateway.alive() or gateway.is_ready(), 15)
            if gateway.alive():
                return "" if gateway.post() == 202 and gateway.stop() == 0 else gateway.output()
            code, said = gateway.process.wait(), gateway.output()
            named = "Too many open files" in said and "Traceback" not in said
            return "" if named and code in (Exit.ERROR, Exit.LOG_UNUSABLE) else f"{code}: {said}"
        except AssertionError as error:
            return f"neither: {error} {gateway.output()}"
        finally:
            gateway.kill()

    limits = range(9, 31, 3)
    with ThreadPoolExecutor(3) as pool:
        wrong = {limit: text for limit, text in zip(limits, pool.map(start, limits)) if text}
    assert wrong == {}


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, recorder: tuple[int, Path]) -> None:
    port, published = recorder
    counts = tmp_path / "counts"
    counts.write_bytes(bytes(4096))
    gateway = GatewayProcess(tmp_path / "gateway", {"mqtt.url": f"mqtt://127.0.0.1:{port}"})
    gateway.environment |= {
        "LD_PRELOAD": str(syscall_faults.shim()),
        "GW_FAULT_FOLDER": str(gateway.directory),
        "GW_FAULT_COUNTS": str(counts),
    }
    with gateway:
        wait_for(lambda: gateway.health()["status"] == "ok", 5)
        before = gateway.child_pids()
        day = 86_400
        for step in (0, 366 * day, -366 * day, day, 0):
            with counts.open("r+b") as file:
                file.seek(15 * 8)
                file.write(struct.pack("q", step))
            assert gateway.post() == 202
            time.sleep(0.6)  # the supervisor looks, delivery beats, the log is synced
        wait_for(lambda: gateway.metric("gateway_events_published_total") == 5, 5)
        wait_for(lambda: gateway.metric("gateway_log_not_durable_bytes") == 0, 5)
        assert gateway.child_pids() == before
        assert gateway.health()["status"] == "ok"
    years = {int(stamp[:4]) for stamp in re.findall(r'"ts\\":\\"(\d{4}-)', published.read_text())}
    assert len(years) == 3, "the events bear the time of the clock"
