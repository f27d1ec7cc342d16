"""Which machine, which versions, and in what state: what a figure is worth nothing without."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

from benchmarks.harness import Failed
from benchmarks.processes import ROOT, program
from benchmarks.servers import MOSQUITTO_VARIABLE, version


def load() -> str:
    """Load averages: a busy machine measures its neighbours."""
    return " ".join(f"{average:.2f}" for average in os.getloadavg())


def _first(path: str, pattern: str) -> str:
    try:
        match = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return "unknown"
    return match[1].strip() if match else "unknown"


def _governor() -> str:
    path = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    found = _first(path, r"(\S+)")
    return "frequency not ours to see" if found == "unknown" else f"governor {found}"


def _file_system(directory: Path) -> str:
    best = ("", "unknown")
    try:
        for line in Path("/proc/mounts").read_text().splitlines():
            _, at, kind, *_ = line.split()
            inside = at == "/" or f"{directory.resolve()}/".startswith(f"{at}/")
            if inside and len(at) >= len(best[0]):
                best = (at, kind)
    except OSError:
        pass
    return f"{best[1]} at {best[0]}"


def _says(name: str, *arguments: str, pattern: str, variable: str | None = None) -> str:
    try:
        command = [program(name, variable), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (Failed, OSError, subprocess.TimeoutExpired):
        return f"{name} is not installed"
    match = re.search(pattern, done.stdout + done.stderr)
    return f"{name} {match[1] if match else '(version unknown)'}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout

    try:
        head = git("rev-parse", "--short=12", "HEAD").strip()
        return f"commit {head}" + (" with changes" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "no commit known"


def describe(directory: Path, quick: bool, workers: int) -> list[tuple[str, str]]:
    """The lines above the table."""
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    now = datetime.datetime.now(datetime.UTC)
    model = _first("/proc/cpuinfo", r"^model name\s*:\s*(.*)$")
    packages = ("granian", "uvloop", "msgspec", "gmqtt", "mqttools")
    return [
        ("when", f"{now:%Y-%m-%d %H:%M} UTC, {'quick' if quick else 'full'} run"),
        (
            "machine",
            f"{model}, {len(os.sched_getaffinity(0))} cores, {memory_mib} MiB, {_governor()}",
        ),
        ("state", f"load {load()} before; {_file_system(directory)}; Linux {platform.release()}"),
        (
            "versions",
            f"gateway {version('telemetry-gateway')}, {_commit()}; Python"
            f" {platform.python_version()}; " + ", ".join(f"{p} {version(p)}" for p in packages),
        ),
        (
            "programs",
            ", ".join(
                (
                    _says("mosquitto", "-h", pattern=r"version (\S+)", variable=MOSQUITTO_VARIABLE),
                    _says("nginx", "-v", pattern=r"nginx/(\S+)"),
                    _says("wrk", "-v", pattern=r"wrk (\S+)"),
                    _says("cc", "--version", pattern=r"(\d+\.\d+\.\d+)"),
                )
            ),
        ),
        (
            "method",
            "medians of interleaved rounds (A B A B ...) after a warm-up round; client, servers and"
            " broker on this machine; every event has a new seq",
        ),
        ("", f"HTTP: wrk -t1 -c64, keep-alive; {workers} worker process(es) in every server"),
    ]
