"""The unit file: systemd accepts it, it restricts much, and the gateway lives within what it
restricts."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from gateway.settings import SETTINGS, HttpConfig
from gateway.supervisor import DELIVERY_KILL_S, WORKER_KILL_S
from tests.gateway_process import ROOT, GatewayProcess, wait_for

UNIT = ROOT / "deploy" / "systemd" / "telemetry-gateway.service"
EXPOSURE_MAX = 1.5
"""Of 10, as systemd counts; it calls up to 2 OK."""
PROGRAM = "/opt/telemetry-gateway/bin/gateway"


def values(key: str) -> list[str]:
    """Of each line of the unit."""
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|min|)", text).groups()  # type: ignore[union-attr]
    return int(number) * (60 if unit == "min" else 1)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
    )


def installed(folder: Path, text: str) -> Path:
    """The unit where its program is there."""
    unit = folder / UNIT.name
    unit.write_text(text.replace(PROGRAM, str(shutil.which("true"))))
    return unit


def test_systemd_accepts_it(tmp_path: Path) -> None:
    done = analyze("verify", installed(tmp_path, UNIT.read_text()))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("wrong", ["ProtectSytem=strict", "SystemCallFilter=@system-services"])
def test_systemd_does_not_accept_what_is_misspelt(wrong: str, tmp_path: Path) -> None:
    text = UNIT.read_text().replace("[Install]", f"{wrong}\n[Install]")
    assert analyze("verify", installed(tmp_path, text)).stderr != ""


def test_little_is_exposed(tmp_path: Path) -> None:
    unit = installed(tmp_path, UNIT.read_text())
    done = analyze("security", "--offline=true", f"--threshold={int(EXPOSURE_MAX * 10)}", unit)
    assert done.returncode == 0, done.stdout


def test_the_drain_has_its_time() -> None:
    (stop,) = values("TimeoutStopSec")
    drain_s = HttpConfig().drain_deadline_ms / 1000
    assert seconds(stop) > drain_s + DELIVERY_KILL_S + WORKER_KILL_S


def test_its_variables_are_settings() -> None:
    words = " ".join(values("Environment")).split()
    names = {word.partition("=")[0] for word in words} - {"PYTHONDONTWRITEBYTECODE"}
    assert names
    assert names <= {setting.variable for setting in SETTINGS.values()}


# ---- system calls -------------------------------------------------------------------------------


def of_set(name: str) -> set[str]:
    """The system calls in a set of systemd's, sets within it too."""
    if not name.startswith("@"):
        return {name}
    found: set[str] = set()
    for line in analyze("syscall-filter", name).stdout.splitlines()[1:]:
        word = line.strip()
        if word and not word.startswith("#"):
            found |= of_set(word)
    return found


def refused() -> set[str]:
    """What the unit's filter refuses."""
    allowed: set[str] = set()
    for line in values("SystemCallFilter"):
        named = set().union(*(of_set(word) for word in line.removeprefix("~").split()))
        allowed = allowed - named if line.startswith("~") else allowed | named
    return of_set("@known") - allowed


def confined(gateway: GatewayProcess, folder: Path, calls: set[str]) -> None:
    """Its processes get EPERM for each of `calls`, as under the filter."""
    strace = shutil.which("strace")
    assert strace
    names = ",".join(f"?{call}" for call in sorted(calls))
    wrapper = folder / "bin" / "python"
    wrapper.parent.mkdir(parents=True)
    gateway.environment["GW_TRACE"] = str(folder / "trace")
    wrapper.write_text(
        f'#!/bin/sh\nexec {strace} -f -qq --seccomp-bpf -e signal=none -o "$GW_TRACE"'
        f' -e trace={names} -e inject={names}:error=EPERM -- "$@"\n'
    )
    wrapper.chmod(0o700)
    gateway.wrapper = [str(wrapper)]


def supervisor_pid(gateway: GatewayProcess) -> int:
    """Of the gateway below its strace."""
    return int(wait_for(gateway.child_pids)[0])


def test_it_lives_with_what_the_filter_refuses(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path / "gateway", {"mqtt.url": "embedded", "http.workers": 2})
    confined(gateway, tmp_path, refused())
    try:
        gateway.start()
        status, _, body = gateway.request(
            "POST",
            "/v1/ingest/dev-1?ack=sink",
            b'{"metrics":{"temp_c":21.5}}',
            {"Content-Type": "application/json"},
        )
        assert status == 200, body
        assert gateway.request("GET", "/metrics")[0] == 200
        pid = supervisor_pid(gateway)
        os.kill(pid, signal.SIGHUP)
        wait_for(lambda: "rolling restart: done" in gateway.output(), 30, gateway.output())
        assert gateway.post() == 202
        os.kill(pid, signal.SIGTERM)
        assert gateway.process is not None
        assert gateway.process.wait(20) == 0, gateway.output()
    finally:
        gateway.kill()
    trace = (tmp_path / "trace").read_text()
    tried = set(re.findall(r"^\d+ +(\w+)\(", trace, re.MULTILINE))
    assert tried <= {"io_uring_setup"}, trace[:2000]  # the event loop does without


@pytest.mark.parametrize("call", ["pidfd_open", "memfd_create"])
def test_it_does_not_live_without_what_it_needs(call: str, tmp_path: Path) -> None:
    """The control: a filter that refused these would be seen."""
    gateway = GatewayProcess(tmp_path / "gateway")
    confined(gateway, tmp_path, refused() | {call})
    gateway.start(ready=False)
    try:
        assert gateway.process is not None
        assert gateway.process.wait(20) != 0
    finally:
        gateway.kill()


def test_nothing_is_written_and_executed(tmp_path: Path) -> None:
    """MemoryDenyWriteExecute: no memory that is both, none that becomes executable."""
    gateway = GatewayProcess(tmp_path / "gateway", {"mqtt.url": "embedded"})
    confined(gateway, tmp_path, set())
    wrapper = Path(gateway.wrapper[0])
    strace = shutil.which("strace")
    wrapper.write_text(
        f'#!/bin/sh\nexec {strace} -f -qq --seccomp-bpf -o "$GW_TRACE"'
        ' -e trace=mmap,mprotect,pkey_mprotect,shmat -- "$@"\n'
    )
    try:
        gateway.start()
        assert gateway.post() == 202
    finally:
        os.kill(supervisor_pid(gateway), signal.SIGTERM)
        assert gateway.process is not None
        gateway.process.wait(20)
    lines = (tmp_path / "trace").read_text().splitlines()
    assert any("PROT_EXEC" in line for line in lines)  # libraries are mapped so, from files
    bad = [
        line
        for line in lines
        if "PROT_EXEC" in line and ("mprotect(" in line or "PROT_WRITE" in line)
    ]
    assert bad == []
