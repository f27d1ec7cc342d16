"""System calls that fail: the Nth of a scripted run, for every N.

    python -m tests.syscall_faults           a sample, as in the tests
    python -m tests.syscall_faults --all     every N of every kind; prints counts

The script of a run: a gateway makes its log, takes 30 events with ack=enqueue and 20 with
ack=durable, publishes them to a broker that writes each down before it acknowledges, gets SIGTERM;
then a second gateway starts on the same folder, without faults, and ends in order. A clean run
counts the calls of each kind; then each of them fails in a run of its own.

What must hold whatever fails
    - the gateway goes on, or ends with a documented exit code within ENDS_WITHIN_S, and a line
      names the error and the file; no traceback, no process dies of a signal of its own
    - what was answered 2xx arrives at the broker, at the latest after the clean restart
    - no 2xx to a request that began after a failed fdatasync
    - the clean restart is ready, and ends with 0
"""

import argparse
import http.client
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import EIO, EMFILE, ENOMEM, ENOSPC
from pathlib import Path

from gateway.__main__ import EXIT_CODES
from tests.brokers import recorded
from tests.gateway_process import ROOT, GatewayProcess, wait_for
from tests.native_build import CACHE, TESTS

KINDS = (
    *("fdatasync", "fsync", "write", "pwrite", "rename"),
    *("fallocate", "ftruncate", "mmap", "open", "memfd"),
)
"""As in preload_faults.c."""
ERRORS = {
    "fdatasync": (EIO,),
    "fsync": (EIO,),
    "write": (ENOSPC, EIO),
    "pwrite": (ENOSPC, EIO),
    "rename": (EIO,),
    "fallocate": (ENOSPC,),
    "ftruncate": (EIO,),
    "mmap": (ENOMEM,),
    "open": (EMFILE, EIO),
    "memfd": (EMFILE,),
}
EVER = 1 << 60
ENQUEUED, DURABLE = 30, 20
ENDS_WITHIN_S = 20.0
ARRIVES_WITHIN_S = 10.0
AFTER_FAULT_S = 0.5
"""So long events are sent after a failed fdatasync, or until the gateway has ended."""
SETTLES_S = 0.05
"""From the return of a failed fdatasync to the state FAILED: instructions, and a scheduler."""


@dataclass(frozen=True)
class Fault:
    """The calls `first` to `last` of a kind fail."""

    kind: str
    first: int
    error: int
    last: int
    lies: bool = False
    """The caller is told that it did not fail: a gateway that ignores the error."""

    def __str__(self) -> str:
        calls = f"{self.first}" if self.last == self.first else f"{self.first} and all after it"
        return f"{self.kind} {calls}: {os.strerror(self.error)}{' (ignored)' if self.lies else ''}"


@dataclass
class Run:
    """What became of one run of the script."""

    fault: Fault | None
    counts: dict[str, int] = field(default_factory=dict)
    hits: list[tuple[int, str]] = field(default_factory=list)
    """When a call failed (CLOCK_MONOTONIC, ns) and on which file."""
    code: int | None = None
    accepted: set[int] = field(default_factory=set)
    statuses: Counter[int] = field(default_factory=Counter)
    """0: no answer."""
    violations: list[str] = field(default_factory=list)
    output: str = ""


def shim() -> Path:
    """The library, built anew when its source has changed."""
    source = TESTS / "preload_faults.c"
    library = CACHE / "preload_faults.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-o", fresh]
        subprocess.run([*command, source], check=True)
        fresh.rename(library)
    return library


@contextmanager
def broker(folder: Path) -> Iterator[tuple[int, Path]]:
    """A recording broker in a process: its port, and the file."""
    file = folder / "published.ndjson"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.brokers", "record", "--file", str(file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().rpartition(b":")[2]), file
    finally:
        process.kill()
        process.communicate()


def run(
    folder: Path,
    device: str,
    port: int,
    published: Path,
    fault: Fault | None = None,
) -> Run:
    """The script, once, in a new `folder`."""
    result = Run(fault)
    counts, hits = folder / "counts", folder / "hits"
    folder.mkdir()
    counts.write_bytes(bytes(4096))
    hits.touch()
    settings = {
        "mqtt.url": f"mqtt://127.0.0.1:{port}",
        "mqtt.backoff_base_ms": 20,
        "mqtt.backoff_max_ms": 50,
        "http.drain_deadline_ms": 3000,
        "log.commit_interval_ms": 20,
    }
    gateway = GatewayProcess(folder / "gateway", settings)
    gateway.environment |= {
        "LD_PRELOAD": str(shim()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "GW_FAULT_FOLDER": str(gateway.directory),
        "GW_FAULT_COUNTS": str(counts),
        "GW_FAULT_HITS": str(hits),
    }
    if fault:
        gateway.environment |= {
            "GW_FAULT_CALL": fault.kind,
            "GW_FAULT_FIRST": str(fault.first),
            "GW_FAULT_LAST": str(fault.last),
            "GW_FAULT_ERRNO": str(fault.error),
            **({"GW_FAULT_LIES": "1"} if fault.lies else {}),
        }
    gateway.start(ready=False)
    _first_life(gateway, result, device, hits)
    words = struct.unpack(f"{len(KINDS)}Q", counts.read_bytes()[: 8 * len(KINDS)])
    result.counts = dict(zip(KINDS, words))
    _judge_the_end(gateway, result)
    for name in [name for name in gateway.environment if name.startswith(("GW_FAULT", "LD_PRE"))]:
        del gateway.environment[name]
    _second_life(gateway, result, device, published)
    result.output = gateway.output()
    return result


def _first_life(gateway: GatewayProcess, result: Run, device: str, hits: Path) -> None:
    until = time.monotonic() + ENDS_WITHIN_S
    while gateway.alive() and not gateway.is_ready():
        if time.monotonic() > until:
            result.violations.append("neither ready nor ended: it hangs")
            break
        time.sleep(0.01)
    began: dict[int, int] = {}
    seq = 0
    send_until = 0.0
    while gateway.alive() and (seq < ENQUEUED + DURABLE or time.monotonic() < send_until):
        seq += 1
        began[seq] = time.monotonic_ns()
        status = _post(gateway, device, seq, "enqueue" if seq <= ENQUEUED else "durable")
        result.statuses[status] += 1
        if 200 <= status < 300:
            result.accepted.add(seq)
        elif status not in (0, 500, 503, 504):
            result.violations.append(f"event {seq} got {status}")
        if not send_until and "fdatasync" in hits.read_text():
            send_until = time.monotonic() + AFTER_FAULT_S
    if gateway.alive():
        assert gateway.process is not None
        gateway.process.terminate()
    try:
        assert gateway.process is not None
        result.code = gateway.process.wait(ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        result.violations.append(f"not ended {ENDS_WITHIN_S} s after SIGTERM: it hangs")
        gateway.kill()
    for line in hits.read_text().splitlines():
        kind, ns, path = line.split(" ", 2)
        result.hits.append((int(ns), path))
        if kind == "fdatasync":
            late = [n for n in result.accepted if began[n] > int(ns) + SETTLES_S * 1e9]
            if late:
                result.violations.append(f"{len(late)} events got 2xx after a failed fdatasync")
                break


def _post(gateway: GatewayProcess, device: str, seq: int, ack: str) -> int:
    body = b'{"seq":%d,"metrics":{"n":%d}}' % (seq, seq)
    headers = {"Content-Type": "application/json"}
    try:
        return gateway.request("POST", f"/v1/ingest/{device}?ack={ack}", body, headers)[0]
    except (OSError, http.client.HTTPException):
        return 0


def _judge_the_end(gateway: GatewayProcess, result: Run) -> None:
    output = gateway.output()
    if result.code is not None and result.code not in EXIT_CODES:
        result.violations.append(f"exit code {result.code} is not documented")
    if died := re.findall(r"was killed by (SIG(?:SEGV|ABRT|BUS|ILL|FPE))", output):
        result.violations.append(f"a process died of {died[0]}")
    if re.search(r"^Traceback|panicked at", output, re.MULTILINE):
        result.violations.append("a traceback")
    if result.code and result.fault and result.hits:
        path = result.hits[0][1].removesuffix(".new")  # the log while it is made
        if path.endswith("stderr.txt"):
            return  # the line that would say it is the one that could not be written
        if os.strerror(result.fault.error) not in output:
            result.violations.append(f"exit code {result.code}, and no line names the error")
        if not path.startswith("/memfd:") and path not in output:
            result.violations.append(f"exit code {result.code}, and no line names {path}")
    if result.code and not result.hits:
        result.violations.append(f"exit code {result.code} without a fault")


def _second_life(gateway: GatewayProcess, result: Run, device: str, published: Path) -> None:
    def missing() -> set[int]:
        topic = f"telemetry/{device}"
        seen = {json.loads(m["payload"])["seq"] for m in recorded(published) if m["topic"] == topic}
        return result.accepted - seen

    try:
        gateway.start()
        wait_for(lambda: not missing(), ARRIVES_WITHIN_S, "events")
    except AssertionError as error:
        result.violations.append(f"after the restart {len(missing())} are missing: {error}"[:2000])
    code = gateway.stop()
    if code != 0:
        result.violations.append(f"the clean restart ended with {code}")
    gateway.kill()


def faults(counts: dict[str, int], step: int = 1) -> Iterator[Fault]:
    """Every `step`-th call of each kind, with each of its errors; and a disk that dies: all calls
    from one on fail."""
    for kind, errors in ERRORS.items():
        for error in errors:
            for n in range(1, counts[kind] + 1, step):
                yield Fault(kind, n, error, n)
    for kind in ("fdatasync", "pwrite", "write"):
        for n in range(1, counts[kind] + 1, step):
            yield Fault(kind, n, EIO, EVER)


SAMPLE = (
    *(Fault("fdatasync", n, EIO, n) for n in (1, 3, 4, 8, 12, 16)),
    *(Fault("fdatasync", n, EIO, EVER) for n in (1, 6)),
    Fault("pwrite", 100, ENOSPC, 100),
    Fault("write", 2, ENOSPC, EVER),
    *(Fault("open", n, EMFILE, n) for n in (2, 4)),
    Fault("rename", 1, EIO, 1),
    *(Fault("mmap", n, ENOMEM, n) for n in (2, 6)),
    Fault("memfd", 2, EMFILE, 2),
)


def run_all(folder: Path, cases: list[Fault | None], jobs: int = 3) -> list[Run]:
    """Each in a folder and with a device of its own, some side by side."""
    shim()
    with broker(folder) as (port, published), ThreadPoolExecutor(jobs) as pool:
        return list(
            pool.map(
                lambda pair: run(
                    folder / str(pair[0]), f"case-{pair[0]}", port, published, pair[1]
                ),
                enumerate(cases),
            )
        )


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each run that broke a promise, and the counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.syscall_faults")
    parser.add_argument("--all", action="store_true", help="every call of a clean run")
    parser.add_argument("--step", type=int, default=1, help="with --all: every STEP-th only")
    parser.add_argument("--kind", choices=KINDS, help="with --all: this kind only")
    parser.add_argument("--jobs", type=int, default=3, help="runs side by side (%(default)s)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gateway-faults-") as name:
        (clean,) = run_all(_under(name, "clean"), [None])
        print("a clean run:", ", ".join(f"{n} {kind}" for kind, n in clean.counts.items()))
        cases = list(faults(clean.counts, options.step)) if options.all else list(SAMPLE)
        cases = [case for case in cases if options.kind in (None, case.kind)]
        runs = [clean, *run_all(_under(name, "faults"), list(cases), options.jobs)]
    for one in runs:
        for violation in one.violations:
            print(f"{one.fault}: {violation}")
    table: Counter[tuple[str, str]] = Counter()
    for one in runs[1:]:
        assert one.fault is not None
        ended = f"exit {one.code}" if one.hits else "not reached"
        table[one.fault.kind, ended] += 1
    for (kind, ended), count in sorted(table.items()):
        print(f"{kind:<10} {ended:<12} {count:5d}")
    broken = sum(bool(one.violations) for one in runs)
    accepted = sum(len(one.accepted) for one in runs)
    print(f"{len(runs)} runs, {accepted} events accepted, {broken} runs broke a promise")
    return 1 if broken else 0


def _under(name: str, part: str) -> Path:
    folder = Path(name) / part
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
