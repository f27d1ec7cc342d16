"""How are the peers that are written in C built?

With the system's compiler, when a benchmark needs them.
"""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Final

from benchmarks.harness import Failed
from benchmarks.processes import program

PEERS: Final = Path(__file__).with_name("peers")


def _compile(source: Path, output: Path, *flags: str) -> Path:
    command = [program("cc"), "-std=gnu11", "-O2", "-Wall", "-Wextra", *flags, str(source)]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"cannot compile {source.name}: {done.stderr.strip()[-300:]}")
    return output


def executable(name: str, directory: Path) -> Path:
    """peers/`name`.c as a program."""
    return _compile(PEERS / f"{name}.c", directory / name)


def module(name: str, directory: Path) -> ModuleType:
    """peers/`name`.c as an extension module."""
    include = sysconfig.get_path("include")
    built = _compile(
        PEERS / f"{name}.c", directory / f"{name}.so", "-shared", "-fPIC", f"-I{include}"
    )
    spec = importlib.util.spec_from_file_location(name, built)
    if spec is None or spec.loader is None:
        raise Failed(f"cannot load {built}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
