"""How are the peers that are written in C, and variants of the gateway's own modules, built?

When a benchmark needs them: peers with the system's compiler, variants by setup.py.
"""

import importlib
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Final

from benchmarks.harness import Failed
from benchmarks.processes import ROOT, environment, program

PEERS: Final = Path(__file__).with_name("peers")
CLIENTS: Final = Path(__file__).with_name("clients")

_VARIANT: Final = """
import sys
import setuptools  # brings distutils where Python has none
from distutils import core
name, macro, lib, temp = sys.argv[1:]
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", lib, "--build-temp", temp]
distribution = core.run_setup("setup.py", sys.argv[1:], "commandline")
distribution.ext_modules = [e for e in distribution.ext_modules if e.name == name]
for extension in distribution.ext_modules:
    extension.define_macros.append((macro, "1"))
distribution.run_commands()
"""


def _compile(source: Path, output: Path, *flags: str) -> Path:
    command = [program("cc"), "-std=gnu11", "-O2", "-Wall", "-Wextra", *flags, str(source)]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"cannot compile {source.name}: {done.stderr.strip()[-300:]}")
    return output


def executable(name: str, directory: Path, folder: Path = PEERS) -> Path:
    """`folder`/`name`.c as a program."""
    return _compile(folder / f"{name}.c", directory / name, "-D_GNU_SOURCE")


def library(source: Path, directory: Path) -> Path:
    """A source as a library for LD_PRELOAD."""
    return _compile(source, directory / f"{source.stem}.so", "-shared", "-fPIC", "-D_GNU_SOURCE")


def module(name: str, directory: Path) -> ModuleType:
    """peers/`name`.c as an extension module."""
    include = sysconfig.get_path("include")
    built = _compile(
        PEERS / f"{name}.c", directory / f"{name}.so", "-shared", "-fPIC", f"-I{include}"
    )
    return _load(name, built)


def variant(name: str, macro: str, directory: Path) -> ModuleType:
    """gateway.`name` with the sources and flags of setup.py, and one macro defined besides.

    Another module beside the usual one: objects of both can live in one process, apart.
    """
    importlib.import_module(f"gateway.{name}")  # else Cython gives its name to the variant
    library = directory / macro.lower()
    arguments = (f"gateway.{name}", macro, str(library), str(directory / "temp"))
    done = subprocess.run(
        [sys.executable, "-c", _VARIANT, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    built = list(library.glob(f"gateway/{name}.*"))
    if done.returncode or len(built) != 1:
        raise Failed(f"cannot build gateway.{name} with {macro}: {done.stderr.strip()[-300:]}")
    return _load(f"{macro.lower()}.{name}", built[0])


def _load(name: str, built: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, built)
    if spec is None or spec.loader is None:
        raise Failed(f"cannot load {built}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
