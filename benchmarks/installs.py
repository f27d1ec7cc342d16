"""How do the peers come onto this machine? Each into a folder of its own below build/peers, never
into the project's environment.

Python peers: a virtual environment with the versions of peers/requirements. Node-RED: npm, the one
that is there or else Debian's. What is there already and still has the wanted versions is kept.
What cannot be installed raises NotInstalled, and the peer's row says why.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.harness import Failed
from benchmarks.processes import ROOT, environment

FOLDER: Final = ROOT / "build" / "peers"
PEERS: Final = Path(__file__).with_name("peers")
TIMEOUT_S: Final = 600
NAMED: Final = (
    *("fastapi", "pydantic", "uvicorn", "aiomqtt", "robyn", "mqttools", "granian", "msgspec"),
    *("node-red", "thingsboard-gateway"),
)


class NotInstalled(Failed):
    """The peer is not here; the message begins with "not installed"."""


def say(text: str) -> None:
    """What is being installed, on standard error."""
    print(f"==> {text}", file=sys.stderr, flush=True)


def reason(output: str) -> str:
    """The line of an installer's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or line.startswith("E: ")]
    return (telling or lines or ["no output"])[-1][:300]


def run(command: Sequence[str], cwd: Path = ROOT) -> None:
    """One step of an installation. Raises NotInstalled with the reason."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"not installed: no end of {command[0]} in {TIMEOUT_S} s") from None
    except OSError as error:
        raise NotInstalled(f"not installed: {command[0]}: {error.strerror}") from None
    if done.returncode:
        raise NotInstalled(f"not installed: {reason(done.stdout)}")


def _state(folder: Path, wanted: Path) -> str:
    about = f"{folder}\n{sys.version}\n".encode()
    return hashlib.sha256(about + wanted.read_bytes()).hexdigest()


def is_installed(folder: Path, wanted: Path) -> bool:
    """Whether an installation ended well, here and with these versions."""
    stamp = folder / "stamp"
    return stamp.exists() and stamp.read_text() == _state(folder, wanted)


def requirements(name: str) -> Path:
    """The versions of a Python peer, pinned with all that they bring."""
    return PEERS / "requirements" / f"{name}.txt"


def has_venv(name: str) -> bool:
    """Whether `venv(name)` would install nothing."""
    return is_installed(FOLDER / name, requirements(name))


def venv(name: str) -> str:
    """The interpreter of a peer's own environment. Raises NotInstalled."""
    folder, wanted = FOLDER / name, requirements(name)
    interpreter = folder / "bin" / "python"
    if not is_installed(folder, wanted):
        say(f"installing {name} by pip into {folder.relative_to(ROOT)}")
        run([sys.executable, "-m", "venv", "--clear", str(folder)])
        pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        run([*pip, "--requirement", str(wanted)])
        (folder / "stamp").write_text(_state(folder, wanted))
    return str(interpreter)


def npm() -> str:
    """An npm: the one that is there, else Debian's, by apt. Raises NotInstalled."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        say("installing nodejs and npm by apt")
        root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        apt = [*root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
        run([*apt, "update"])
        run([*apt, "install", "-y", "--no-install-recommends", "nodejs", "npm"])
    found = shutil.which("npm")
    if found is None:
        raise NotInstalled("not installed: npm is not in PATH, though apt installed it")
    return found


def versions() -> str:
    """The wanted versions of what a peer's title names."""
    pins = dict(
        line.split("==")
        for path in sorted((PEERS / "requirements").iterdir())
        for line in path.read_text().splitlines()
        if "==" in line
    )
    pins |= json.loads((PEERS / "node_red" / "package.json").read_text())["dependencies"]
    return ", ".join(f"{name} {pins[name]}" for name in NAMED)


def _node_red() -> tuple[Path, Path]:
    return FOLDER / "node-red", PEERS / "node_red" / "package.json"


def has_node_red() -> bool:
    """Whether `node_red()` would install nothing."""
    return is_installed(*_node_red())


def node_red() -> str:
    """Node-RED's program, to be run by node. Raises NotInstalled."""
    folder, wanted = _node_red()
    if not is_installed(folder, wanted):
        program = npm()
        say(f"installing Node-RED by npm into {folder.relative_to(ROOT)}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copy(wanted, folder)
        options = ("--omit=dev", "--no-audit", "--no-fund", "--no-package-lock")
        run([program, "install", *options], cwd=folder)
        (folder / "stamp").write_text(_state(folder, wanted))
    return str(folder / "node_modules" / "node-red" / "red.js")
