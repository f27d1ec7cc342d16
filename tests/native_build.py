"""Builds and runs the C tests of tests/native: plain, under sanitizers, and for aarch64 under qemu;
and the harnesses of tests/fuzz.

The opening comment of a test names its sources (`_native/gw_*.c`). What is built lies in
build/native under a name made from everything that it was made of: a second run builds nothing.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import get_ident
from types import ModuleType

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "_native"
TESTS = ROOT / "tests" / "native"
FUZZ = ROOT / "tests" / "fuzz"
CACHE = ROOT / "build" / "native"
APT = "sudo apt-get install -y gcc libc6-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
FLAGS = ["-std=gnu11", "-g", "-D_GNU_SOURCE", "-I_native", "-Itests/native", "-pthread", *WARNINGS]


@dataclass(frozen=True)
class Mode:
    compiler: str
    flags: tuple[str, ...]
    runner: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


MODES = {
    "plain": Mode("gcc", ("-O1", "-DGW_FAILPOINTS"), environment={"GW_POWER_RUNS": "30"}),
    "asan": Mode(
        "gcc",
        ("-O1", "-DGW_FAILPOINTS", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        environment={"GW_POWER_RUNS": "12", "GW_TEST_STEP": "3", "GW_CROWD_EVENTS": "20000"},
    ),
    # without fail points: as it ships
    "tsan": Mode(
        "gcc",
        ("-O1", "-fsanitize=thread", "-Wno-tsan"),
        environment={"GW_TEST_STEP": "23", "GW_CROWD_EVENTS": "15000"},
    ),
    "aarch64": Mode(
        "aarch64-linux-gnu-gcc",
        ("-O1", "-DGW_FAILPOINTS", "-static"),
        ("qemu-aarch64",),
        {"GW_POWER_RUNS": "6", "GW_TEST_STEP": "13", "GW_DEATHS": "20"},
    ),
}

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
LIBFUZZER = ("-O1", "-fsanitize=fuzzer", *SANITIZERS)
FUZZ_MODES = {
    "replay": Mode("gcc", ("-O1", "-DGW_FUZZ_MAIN", *SANITIZERS)),
    "fuzz": Mode("clang", LIBFUZZER),
    "fuzz-blind": Mode("clang", (*LIBFUZZER, "-fno-sanitize-coverage=trace-cmp")),
}


def mode_of(name: str) -> Mode:
    return MODES.get(name) or FUZZ_MODES[name]


def sources_of(test: Path) -> list[Path]:
    opening = test.read_text().partition("#include")[0]
    patterns = re.findall(r"_native/(gw_[\w*]+\.c)", opening)
    return [test, *(path for pattern in patterns for path in sorted(NATIVE.glob(pattern)))]


@cache
def _compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise AssertionError(f"{name} is missing: {APT}")
    return path + subprocess.run([path, "--version"], capture_output=True, text=True).stdout


@cache
def _headers() -> bytes:
    return b"".join(p.read_bytes() for d in (NATIVE, TESTS, FUZZ) for p in sorted(d.glob("*.h")))


def _digest(*parts: bytes | str) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else part)
        h.update(b"\0")
    return h.hexdigest()[:20]


def _make(path: Path, command: Sequence[str | Path]) -> Path:
    """Run a command that makes `path`, unless it is there; whole or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}.{get_ident()}")
        done = subprocess.run([*command, "-o", fresh], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
        fresh.rename(path)
    return path


def _object(source: Path, mode: Mode) -> Path:
    compiler = _compiler(mode.compiler)
    digest = _digest(compiler, *FLAGS, *mode.flags, _headers(), source.read_bytes())
    path = CACHE / "objects" / f"{source.stem}-{digest}.o"
    return _make(path, [mode.compiler, *FLAGS, *mode.flags, "-c", source])


def _patched(source: Path, instead: Mapping[str, str] | None) -> Path:
    """The source, or a file with the other text that `instead` has for its name."""
    text = (instead or {}).get(source.name)
    if text is None:
        return source
    path = CACHE / "mutants" / _digest(text) / source.name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def build(test: Path, mode_name: str, instead: Mapping[str, str] | None = None) -> Path:
    """The program; `instead` maps names of sources in _native to other texts for them."""
    mode = mode_of(mode_name)
    objects = [_object(_patched(source, instead), mode) for source in sources_of(test)]
    path = CACHE / mode_name / f"{test.stem}-{_digest(*map(str, objects))}"
    return _make(path, [mode.compiler, *FLAGS, *mode.flags, *objects])


EXTENSIONS = {
    "_log": (
        "log.pyx",
        ("gw_crc32c.c", "gw_log*.c", "gw_ingest.c", "gw_batch.c", "gw_validator*.c"),
    ),
    "_waiting": ("waiting.pyx", ("gw_crc32c.c", "gw_log*.c", "gw_waiting.c")),
}
PART = Mode("gcc", ("-O1", "-fPIC", "-fvisibility=hidden"))


def extension(instead: Mapping[str, str], name: str = "_log") -> ModuleType:
    """Another `gateway.<name>`, built with other texts for sources; the real one is left alone."""
    include = f"-I{sysconfig.get_path('include')}"
    binding = Mode("gcc", ("-O0", "-fPIC", "-fvisibility=hidden", "-w", include))
    source, patterns = EXTENSIONS[name]
    pyx = _patched(NATIVE / source, instead)
    parts = [path.read_bytes() for path in sorted(NATIVE.glob("*.px[di]"))]
    generated = CACHE / "cython" / _digest(pyx.read_bytes(), *parts) / pyx.with_suffix(".c").name
    cython = [
        sys.executable,
        "-m",
        "cython",
        "-3",
        "-I",
        NATIVE,
        "--module-name",
        f"gateway.{name}",
    ]
    objects = [_object(_make(generated, [*cython, pyx]), binding)]
    for pattern in patterns:
        objects += [_object(_patched(path, instead), PART) for path in sorted(NATIVE.glob(pattern))]
    path = CACHE / "extension" / f"{name}-{_digest(*map(str, objects))}.so"
    _make(path, ["gcc", "-shared", "-pthread", *objects])
    loader = ExtensionFileLoader(f"gateway.{name}", str(path))
    spec = spec_from_file_location(f"gateway.{name}", path, loader=loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def library(test: Path) -> Path:
    """A C test as a shared object, for ctypes."""
    objects = [_object(source, PART) for source in sources_of(test)]
    path = CACHE / "library" / f"{test.stem}-{_digest(*map(str, objects))}.so"
    return _make(path, ["gcc", "-shared", "-pthread", *objects])


def run(
    program: Path,
    mode_name: str,
    *names: str,
    seconds: int = 120,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    mode = mode_of(mode_name)
    if mode.runner and shutil.which(mode.runner[0]) is None:
        raise AssertionError(f"{mode.runner[0]} is missing: {APT}")
    return subprocess.run(
        [*mode.runner, str(program), *names],
        env={
            **os.environ,
            "ASAN_OPTIONS": "abort_on_error=0:detect_stack_use_after_return=0",
            "TSAN_OPTIONS": "halt_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            **mode.environment,
            "GW_TEST_SECONDS": str(seconds),
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds + 30,
    )
