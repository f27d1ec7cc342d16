"""Words to a service manager: sd_notify(3), over the datagram socket that $NOTIFY_SOCKET names.

    READY=1        every worker serves and delivery runs; again at the end of a rolling restart
    RELOADING=1    a rolling restart (SIGHUP) has begun
    STOPPING=1     the drain, or the end, has begun
    WATCHDOG=1     the supervisor's loop goes round; at least twice in $WATCHDOG_USEC
    STATUS=...     a line for people, beside each of these

Without $NOTIFY_SOCKET nothing is done. Nothing here ever fails or waits: a gateway does its work
whether or not anybody listens. The variables are taken out of the environment, so that children,
which are not the unit's main process, do not find them."""

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final, Self

VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """One service manager, or nobody."""

    def __init__(self, address: str | None = None, watchdog_s: float = 0.0) -> None:
        """`address` is a path, or a name of the abstract namespace with `@` before it.
        `watchdog_s`: the manager ends us after so long without a sign of life; 0: never."""
        self._address = f"\0{address[1:]}" if address and address[0] == "@" else address
        self._socket: socket.socket | None = None
        self._watchdog_s = watchdog_s
        self._next_beat_s = 0.0
        if self._address:
            kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            with contextlib.suppress(OSError):
                self._socket = socket.socket(socket.AF_UNIX, kind)

    @classmethod
    def take(cls, environment: MutableMapping[str, str] | None = None) -> Self:
        """The one that started this process; its variables are removed from `environment`."""
        environment = os.environ if environment is None else environment
        address, watchdog_us, pid = (environment.pop(name, None) for name in VARIABLES)
        mine = pid in (None, "", str(os.getpid()))
        good = mine and watchdog_us is not None and watchdog_us.isascii() and watchdog_us.isdigit()
        return cls(address or None, int(watchdog_us or 0) / 1e6 if good else 0.0)

    def ready(self, status: str) -> None:
        """It serves: what is ordered after it may start, and the watchdog counts from here."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self, status: str) -> None:
        """`ready` follows when it is over. The time is what Type=notify-reload asks for."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}", f"STATUS={status}")

    def stopping(self, status: str) -> None:
        """It ends, by itself or because it was told to."""
        self._send("STOPPING=1", f"STATUS={status}")

    def beat(self) -> None:
        """A sign of life, when one is due; to be called often."""
        if self._watchdog_s and (now := time.monotonic()) >= self._next_beat_s:
            self._next_beat_s = now + self._watchdog_s / 3
            self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._socket is not None and self._address is not None:
            with contextlib.suppress(OSError):  # nobody there, or its queue is full
                self._socket.sendto("\n".join(lines).encode(), self._address)

    def close(self) -> None:
        """Nothing is said any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
