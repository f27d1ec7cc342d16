"""Bounds for connections of a server that has none: how long a request may take to arrive, how
large it may be, how long a connection may be idle.

The server's own thread reads the sockets. Another thread looks at them from the side, now and then,
through TCP_INFO (tcp(7)), which counts what each socket has received and sent. HTTP/1.1 answers one
request after another, so

    received more since it last sent   a request is arriving, or waits for its answer
    else                               idle

What takes too long or is too large is cut in two steps: first its reading side ends, as if the
client had said no more, so that the server can still answer; if that is not the end of it, both
sides. Each look holds a reference of its own to the socket, so a descriptor that is closed and used
again meanwhile is never cut by mistake, and needs no free descriptor for it."""

import os
import socket
import struct
import time
from collections.abc import Iterable
from typing import Final, NamedTuple

_LISTEN: Final = 10  # TCP_LISTEN, net/tcp_states.h
_INFO_BYTES: Final = 208
_STATE, _LAST_SENT, _LAST_RECEIVED, _RECEIVED, _SENT = 0, 44, 52, 128, 200
"""Offsets in struct tcp_info: tcpi_state, tcpi_last_data_sent (ms), tcpi_last_data_recv (ms),
tcpi_bytes_received, tcpi_bytes_sent."""
_ANSWER_S: Final = 0.5
"""After its reading side was ended, a request is answered so soon, or never."""


class Limits(NamedTuple):
    """What a connection may do."""

    request_s: float
    """Time for a whole request to arrive."""
    request_bytes_max: int
    small_bytes: int
    """What a request may always hold; the rest of all of them shares `large_bytes_max`."""
    large_bytes_max: int
    idle_s: float


class _Seen(NamedTuple):
    """What the last look saw of a socket."""

    fd: int
    sent: int
    base: int
    """Bytes received when it had last sent."""
    since_s: float
    """When its request began to arrive."""
    cut_s: float
    """When its reading side was ended; 0: never."""


class Guard:
    """Of all TCP connections of this process. One thread."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._hand = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        """Refers to the socket that is being looked at. Its family is not true of all of them, and
        not used."""
        self._seen: dict[int, _Seen] = {}
        """By inode."""
        self.connections = 0
        self.cut = 0

    def close(self) -> None:
        """Give its two descriptors back."""
        self._hand.close()
        os.close(self._null)

    def look(self, patience_s: float = 0.0, closing: bool = False) -> bool:
        """Cut what is past its limits. `patience_s` is added to the time of a request: some of them
        wait for their answer. `closing`: idle connections end. Returns whether a request is
        arriving or waiting."""
        now_s = time.monotonic()
        limits, seen = self._limits, self._seen
        fresh: dict[int, _Seen] = {}
        pending: list[tuple[int, int]] = []
        try:
            for fd in _descriptors():
                info = self._take(fd)
                if info is None or info[_STATE] == _LISTEN:
                    continue
                inode = os.fstat(self._hand.fileno()).st_ino
                (received,) = struct.unpack_from("Q", info, _RECEIVED)
                (sent,) = struct.unpack_from("Q", info, _SENT)
                old = seen.get(inode) or _Seen(fd, 0, 0, now_s, 0.0)
                if sent != old.sent:
                    old = _Seen(fd, sent, received, now_s, old.cut_s)
                size = received - old.base
                if not size:
                    old = old._replace(since_s=now_s)
                    idle = min(struct.unpack_from("I", info, at)[0] for at in _LAST)
                    if closing or idle > limits.idle_s * 1000:
                        old = self._end(old, now_s)
                else:
                    pending.append((size, inode))
                    late = now_s - old.since_s > limits.request_s + patience_s
                    if late or size > limits.request_bytes_max:
                        old = self._end(old, now_s)
                fresh[inode] = old
            self._seen = fresh
            self.connections = len(fresh)
            self._bound(pending, now_s)
        finally:
            os.dup2(self._null, self._hand.fileno(), False)
        return bool(pending)

    def end_arriving(self) -> None:
        """End the reading side of every connection: what has not arrived whole never will."""
        now_s = time.monotonic()
        try:
            for fd in _descriptors():
                info = self._take(fd)
                if info is not None and info[_STATE] != _LISTEN:
                    inode = os.fstat(self._hand.fileno()).st_ino
                    seen = self._seen.get(inode) or _Seen(fd, 0, 0, now_s, 0.0)
                    if not seen.cut_s:
                        self._seen[inode] = self._end(seen, now_s)
        finally:
            os.dup2(self._null, self._hand.fileno(), False)

    def stop_accepting(self) -> None:
        """Let go of every listening socket. It goes on listening while another process has it."""
        for fd in _descriptors():
            info = self._take(fd)
            if info is not None and info[_STATE] == _LISTEN:
                os.dup2(self._null, fd, False)
        os.dup2(self._null, self._hand.fileno(), False)

    def _take(self, fd: int) -> bytes | None:
        """Refer to the socket `fd`, and what the kernel says of it; None when it is none."""
        if fd in (self._null, self._hand.fileno()):
            return None
        try:
            os.dup2(fd, self._hand.fileno(), False)
            info = self._hand.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except OSError:
            return None
        return info if len(info) == _INFO_BYTES else None

    def _bound(self, pending: list[tuple[int, int]], now_s: float) -> None:
        """The largest requests are cut until all of them together are within the limit."""
        small = self._limits.small_bytes
        total = sum(size - small for size, _ in pending if size > small)
        if total <= self._limits.large_bytes_max:
            return
        for size, inode in sorted(pending, reverse=True):
            if total <= self._limits.large_bytes_max or size <= small:
                return
            seen = self._seen[inode]
            if self._take(seen.fd) and os.fstat(self._hand.fileno()).st_ino == inode:
                self._seen[inode] = self._end(seen, now_s)
            total -= size - small

    def _end(self, seen: _Seen, now_s: float) -> _Seen:
        how = socket.SHUT_RD
        if seen.cut_s:
            if now_s - seen.cut_s < _ANSWER_S:
                return seen
            how = socket.SHUT_RDWR
        else:
            self.cut += 1
        try:
            self._hand.shutdown(how)
        except OSError:
            pass  # it has ended by itself
        return seen._replace(cut_s=seen.cut_s or now_s)


_LAST: Final = (_LAST_SENT, _LAST_RECEIVED)


def _descriptors() -> Iterable[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # there is no descriptor left to read it with
        return range(os.sysconf("SC_OPEN_MAX"))
