"""Child processes: how the supervisor starts one, and what a child does before anything else.

The order of events

    supervisor (main thread)                    child
    memfd <- Launch, encoded
    SIGTERM blocked
    fork + exec  python -m MODULE FD NAME  -->  prctl(PR_SET_PDEATHSIG, SIGKILL)
                                                getppid() == Launch.parent, else exit SIGINT
                                                ignored: the supervisor decides the log's and the
                                                socket's descriptors from Launch handler for
                                                SIGTERM, then SIGTERM unblocked (`can_end`): one
                                                that came while Python was starting is not lost and
                                                does not kill

The parent-death signal follows the parent *thread*, so `spawn` refuses to run on any other than the
main one. A supervisor that died before the child's prctl is seen by the getppid check behind it.
What a child needs, secrets too, travels in a sealed memfd, never on a command line.

The lock on the log is a flock on an open file description that each child inherits: it lives as
long as anyone who maps the log."""

import ctypes
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

import msgspec

from gateway import logs
from gateway.config import Config
from gateway.errors import Exit


class Recovered(msgspec.Struct, frozen=True):
    """What the supervisor's recovery found; shown in /metrics by every worker."""

    records: int = 0
    torn_bytes: int = 0
    corrupt_bytes: int = 0


class Launch(msgspec.Struct, frozen=True):
    """Everything a child is told."""

    name: str
    """For log lines and `ps`: "worker-0", "delivery"."""
    index: int
    """Of a worker: its counter block."""
    parent: int
    lock_fd: int
    shared_fd: int
    listen_fd: int
    """Of a worker: its listening socket; else -1."""
    config: Config
    recovered: Recovered


_PR_SET_PDEATHSIG: Final = 1
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def spawn(module: str, launch: Launch) -> subprocess.Popen[bytes]:
    """Start `python -m module` with `launch`."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "children must be started by the main thread: they die with their parent thread"
        )
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the child inherits this
    fd = os.memfd_create("gateway-launch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, msgspec.json.encode(launch))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        inherited = (fd, launch.lock_fd, launch.shared_fd, launch.listen_fd)
        return subprocess.Popen(
            [sys.executable, "-m", module, str(fd), launch.name],
            stdin=subprocess.DEVNULL,
            pass_fds=[number for number in inherited if number >= 0],
            process_group=0,  # a Ctrl-C in a terminal reaches the supervisor alone
        )
    finally:
        os.close(fd)
        can_end()


def can_end() -> None:
    """The handler for SIGTERM is there: let it come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def begin(arguments: list[str]) -> Launch:
    """A child's first act: die with the supervisor. Then read what to do."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    fd = int(arguments[1])
    launch = msgspec.json.decode(os.pread(fd, os.fstat(fd).st_size, 0), type=Launch)
    os.close(fd)
    if os.getppid() != launch.parent:
        sys.exit(Exit.ORPHANED)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (launch.lock_fd, launch.shared_fd, launch.listen_fd):
        if number >= 0:
            os.set_inheritable(number, False)
    logs.set_up(launch.config.log.level, launch.name)
    return launch


def mqtt_status_path(config: Config) -> Path:
    """Where the delivery process writes what its connection does, and workers read it for
    /healthz."""
    return Path(config.log.directory) / "mqtt-status.json"


def raise_descriptor_limit() -> int:
    """Lift the soft limit of open files to the hard one; children inherit it. Returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20
