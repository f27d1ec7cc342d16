"""Child processes: how the supervisor starts one, and what a child does before anything else.

The order of events

    supervisor (main thread)                    child
    memfd <- Launch, encoded
    pipe, for what the child tells
    SIGTERM, SIGUSR1 blocked
    fork + exec  python -m MODULE FD NAME  -->  prctl(PR_SET_PDEATHSIG, SIGKILL)
                                                getppid() == Launch.parent, else exit
                                                SIGINT ignored: the supervisor decides
                                                the log's and the socket's descriptors from Launch
                                                handlers, then `can_end` unblocks the signals: one
                                                that came while Python was starting is not lost and
                                                does not kill
    "ready"                                <--  `tell`: a worker serves
    "failed: ..."                          <--  `tell`: the delivery process, why the log has FAILED

The parent-death signal follows the parent *thread*, so `spawn` refuses to run on any other than the
main one. A supervisor that died before the child's prctl is seen by the getppid check behind it.
What a child needs, secrets too, travels in a sealed memfd, never on a command line.

The lock on the log is a flock on an open file description that each child inherits: it lives as
long as anyone who maps the log."""

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

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
    tell_fd: int = -1
    """The pipe behind `tell`; `spawn` makes it."""


READY: Final = "ready"
FAILED: Final = "failed: "
"""What a child tells; the reason follows the second one."""

_PR_SET_PDEATHSIG: Final = 1
_HELD_BACK: Final = {signal.SIGTERM, signal.SIGUSR1}
"""Signals that wait until a child has handlers for them."""
_TOLD_BYTES_MAX: Final = 4096  # PIPE_BUF: one write is one piece
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Spawned(NamedTuple):
    """A child that has been started."""

    process: subprocess.Popen[bytes]
    pidfd: int
    told_fd: int
    """What it tells, as lines; not blocking; at its end when the process has ended."""


def spawn(module: str, launch: Launch) -> Spawned:
    """Start `python -m module` with `launch`. Raises OSError when the system has no room for it."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "children must be started by the main thread: they die with their parent thread"
        )
    told_fd, tell_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    fd = -1
    child = None
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)  # the child inherits this
    try:
        fd = os.memfd_create("gateway-launch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        launch = msgspec.structs.replace(launch, tell_fd=tell_fd)
        os.write(fd, msgspec.json.encode(launch))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        inherited = (fd, launch.lock_fd, launch.shared_fd, launch.listen_fd, tell_fd)
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(fd), launch.name],
            stdin=subprocess.DEVNULL,
            pass_fds=[number for number in inherited if number >= 0],
            process_group=0,  # a Ctrl-C in a terminal reaches the supervisor alone
        )
        pidfd = os.pidfd_open(child.pid)
    except BaseException:
        os.close(told_fd)
        if child is not None:
            child.kill()
            child.wait()
        raise
    finally:
        os.close(tell_fd)
        if fd >= 0:
            os.close(fd)
        can_end()
    return Spawned(child, pidfd, told_fd)


def can_end() -> None:
    """The handlers are there: let the signals come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)


_tell_fd = -1


def tell(text: str) -> None:
    """A child's word to its supervisor. Never fails: a supervisor that is gone takes its children
    with it."""
    with contextlib.suppress(OSError):
        os.write(_tell_fd, text.replace("\n", " ").encode()[: _TOLD_BYTES_MAX - 1] + b"\n")


def end(code: int) -> NoReturn:
    """End this process at once: its other threads wait in the kernel, with nothing to lose. The
    code is told also when standard error takes nothing, as on a full disk."""
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def tell_failed(why: BaseException | str) -> None:
    """The log has FAILED, and why."""
    name = errno.errorcode.get(getattr(why, "errno", None) or 0)
    tell(f"{FAILED}{str(why).removeprefix('log: ')}{f' ({name})' if name else ''}")


def sockets_of(pid: int) -> int:
    """Sockets that a process has open."""
    count = 0
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # closed meanwhile
                count += os.readlink(entry.path).startswith("socket:")
    return count


def begin(arguments: list[str]) -> Launch:
    """A child's first act: die with the supervisor. Then read what to do."""
    global _tell_fd
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    fd = int(arguments[1])
    launch = msgspec.json.decode(os.pread(fd, os.fstat(fd).st_size, 0), type=Launch)
    os.close(fd)
    if os.getppid() != launch.parent:
        sys.exit(Exit.ORPHANED)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _tell_fd = launch.tell_fd
    for number in (launch.lock_fd, launch.shared_fd, launch.listen_fd, launch.tell_fd):
        if number >= 0:
            os.set_inheritable(number, False)
    logs.set_up(launch.config.log.level, launch.name)
    return launch


def status_path(config: Config, sink: str) -> Path:
    """Where the delivery process writes what a sink does, and workers read it for /healthz."""
    return Path(config.log.directory) / f"{sink}-status.json"


def write_status(path: Path, text: bytes) -> None:
    """Replace `path` atomically; a reader sees the old or the new text. On a full disk it is
    written over in place, which needs no room: that is when `held` must be seen. Raises OSError."""
    partial = path.with_name(f"{path.name}.tmp")  # one name: there is one writer at a time
    try:
        partial.write_bytes(text)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        with path.open("r+b") as file:
            file.write(text)
            file.truncate()


def raise_descriptor_limit() -> int:
    """Lift the soft limit of open files to the hard one; children inherit it. Returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20
