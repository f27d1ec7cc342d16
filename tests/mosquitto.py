"""A real Mosquitto for tests: its own configuration, a free port of loopback, a folder of its own.

    with Mosquitto(folder, "max_inflight_messages 20") as broker: ... broker.port ...

Found in PATH, /usr/sbin (Debian) or the folder that GW_MOSQUITTO names. Killed by its pid only.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any


def find(name: str = "mosquitto") -> str | None:
    """Path of mosquitto or one of its clients; None: not installed."""
    extra = os.environ.get("GW_MOSQUITTO", "")
    places = f"{extra}:{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
    return shutil.which(name, path=places)


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Mosquitto:
    """Started on entry, killed on exit. `lines` are added to the configuration."""

    def __init__(
        self, folder: Path, *lines: str, port: int = 0, listener: tuple[str, ...] = ()
    ) -> None:
        self.folder, self.port = folder, port or free_port()
        self._lines, self._listener = lines, listener
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What it said."""
        return (self.folder / "mosquitto.log").read_text(errors="replace")

    def start(self, within_s: float = 5.0) -> "Mosquitto":
        """Raises RuntimeError with the broker's words when it does not come up."""
        binary = find()
        if binary is None:
            raise RuntimeError("mosquitto is not installed: apt-get install mosquitto")
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "mosquitto.conf"
        lines = [
            f"listener {self.port} 127.0.0.1",
            *self._listener,
            "allow_anonymous true",
            "persistence false",
            *self._lines,
        ]
        if not any(line.startswith("user ") for line in lines):
            lines.append(f"user {_user()}")
        config.write_text("\n".join(lines) + "\n")
        with (self.folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen(
                [binary, "-c", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"mosquitto did not start:\n{self.log}")

    def send_signal(self, number: int) -> None:
        """SIGSTOP, SIGCONT, SIGHUP ..."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End it and wait."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> "Mosquitto":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.kill()


def _user() -> str:
    """Mosquitto gives up root unless told who to be."""
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name
