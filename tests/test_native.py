"""Runs every tests/native/test_*.c: plain, under sanitizers, and for aarch64 under qemu.

Longer: GW_POWER_RUNS=2000 GW_POWER_SEED=1, with test_log_power's program in build/native/plain.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.native_build import MODES, TESTS, build, run

PROGRAMS = sorted(TESTS.glob("test_*.c"))
CASES = [
    pytest.param(path, mode, id=f"{path.stem}-{mode}")
    for path in PROGRAMS
    for mode in MODES
    # threads are in these only
    if mode != "tsan" or path.stem in ("test_log_races", "test_log", "test_batch")
]


@pytest.fixture(scope="module")
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[Path, str], Future[CompletedProcess[str]]]]:
    """What the chosen tests need is built and run two at a time, begun before the first of them."""
    environment = {"TMPDIR": str(tmp_path_factory.mktemp("native"))}

    def build_and_run(path: Path, mode: str) -> CompletedProcess[str]:
        return run(build(path, mode), mode, environment=environment)

    wanted = [
        (call.params["path"], call.params["mode"])
        for item in request.session.items
        if item.path == request.node.path
        if (call := getattr(item, "callspec", None)) and "mode" in call.params
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(build_and_run, *case) for case in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_native_program_passes(
    ran: dict[tuple[Path, str], Future[CompletedProcess[str]]], path: Path, mode: str
) -> None:
    done = ran[path, mode].result()
    assert done.returncode == 0, done.stdout


def test_power_cut_finds_an_fdatasync_that_lies(tmp_path: Path) -> None:
    program = build(TESTS / "test_log_power.c", "plain")
    done = run(program, "plain", environment={"TMPDIR": str(tmp_path), "GW_POWER_LIE": "1"})
    assert done.returncode == 1, done.stdout
