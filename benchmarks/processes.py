"""How are other programs run? Each with its own output file, its own free port, and a sure end.

A child that dies while it is needed is a failure with its last words, never a row of slow numbers.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from benchmarks.harness import Failed

ROOT: Final = Path(__file__).resolve().parent.parent
_LIBC: Final = ctypes.CDLL(None)
_PR_SET_PDEATHSIG: Final = 1


def program(name: str, variable: str | None = None) -> str:
    """The path of a program: from the environment, PATH or /usr/sbin. Raises Failed."""
    if variable and (given := os.environ.get(variable)):
        return given
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
    found = shutil.which(name, path=path)
    if found is None:
        hint = f" or set ${variable}" if variable else ""
        raise Failed(f"{name} is not installed: run scripts/bootstrap test{hint}")
    return found


def environment() -> dict[str, str]:
    """Ours, without settings of a gateway, and with the checkout importable."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GATEWAY_", "GRANIAN_"))}
    kept["PYTHONPATH"] = str(ROOT)
    return kept


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port that refuses connections, and that nobody else gets meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


def answers(port: int) -> bool:
    """Whether something accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Child:
    """A program that runs beside. Use it as a context manager."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        directory: Path,
        *,
        settings: Mapping[str, str] | None = None,
        pipe: bool = False,
    ) -> None:
        self.name = name
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / f"{name}.log"
        with self.log.open("wb") as output:
            try:
                self.process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment() | dict(settings or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if pipe else output,
                    stderr=output,
                    start_new_session=True,  # so that stop() can end its children with it
                    preexec_fn=_die_with_parent,
                )
            except OSError as error:
                raise Failed(f"{name} cannot be started: {command[0]}: {error.strerror}") from None

    @property
    def pid(self) -> int:
        """Of the program itself, not of its children."""
        return self.process.pid

    def last_words(self) -> str:
        """The end of its output, on one line."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-5:]) or "no output"

    def check(self) -> None:
        """Raises Failed when it is dead."""
        code = self.process.poll()
        if code is not None:
            raise Failed(f"{self.name} ended with {code}: {self.last_words()}")

    def wait_until(self, ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for a condition while the program lives. Raises Failed."""
        until = time.monotonic() + timeout_s
        while not ready():
            self.check()
            if time.monotonic() > until:
                raise Failed(f"{self.name}: not {what} in {timeout_s:g} s: {self.last_words()}")
            time.sleep(0.02)

    def result(self, timeout_s: float) -> str:
        """Its standard output after it has ended well. Raises Failed."""
        try:
            output, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name}: no end in {timeout_s:g} s: {self.last_words()}") from None
        if self.process.returncode:
            self.check()
        return str(output.decode())

    def stop(self, timeout_s: float = 15) -> None:
        """SIGTERM, time to end, then SIGKILL for it and what it started."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def kill(self) -> None:
        """SIGKILL for it and what it started, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def python(*arguments: str) -> list[str]:
    """The command of a Python program in this checkout."""
    return [sys.executable, *arguments]
