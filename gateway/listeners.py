"""The listening sockets of one address, and which of them take new connections.

Each worker has a socket of its own (SO_REUSEPORT): the kernel spreads connections over them by a
hash of their addresses, where one shared socket gave the first worker 64 of 64
(docs/front-doors.md). The supervisor keeps each socket open, so that connections queued for a dead
worker are served by its successor, not reset.

To take a socket out of new connections without losing those that are queued for it, a classic BPF
program chooses the socket of each (SO_ATTACH_REUSEPORT_CBPF, socket(7)). It returns a place in the
kernel's group, which `_group` mirrors:

    listen()   appends              [ a  b  c ]
    close()    the last one moves   [ c  b ]      a was closed

    program    A = random; A mod k; the A-th of the k places that take connections

A place that is not there is no error: the kernel falls back to its hash. So between a close and
the next program, which cannot happen in one step, a connection still reaches a socket that listens
(the place that is one too high can only have been the last, and the socket there is one that takes
connections). With all of them open there is no program, only the hash."""

import contextlib
import ctypes
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final

BACKLOG: Final = 4096

_SO_ATTACH_REUSEPORT_CBPF: Final = 51  # asm-generic/socket.h
_SO_DETACH_REUSEPORT_BPF: Final = 68
_LOAD_RANDOM: Final = (0x20, 0, 0, 0xFFFFF000 + 56)  # ld [SKF_AD_OFF + SKF_AD_RANDOM]
_MOD, _SKIP_UNLESS, _RETURN = 0x94, 0x15, 0x06  # filter.h: mod #k; jeq #k, 0, 1; ret #k
_QUEUED_AT: Final = 24
"""Of tcpi_unacked in struct tcp_info: of a listening socket, connections not yet accepted."""


def bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    """A socket on `address` beside others, not listening yet."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


def queued(listener: socket.socket) -> int:
    """Connections that wait to be accepted."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUED_AT + 4)
    return int(struct.unpack_from("I", info, _QUEUED_AT)[0])


class Listeners:
    """The group. Takes over sockets that are bound to one address, in no group yet."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._group: list[socket.socket] = []
        """In the kernel's order."""
        self._shut: set[socket.socket] = set()
        """Those that take no new connections."""
        for listener in sockets:
            listener.listen(BACKLOG)
            self._group.append(listener)

    def add(self) -> socket.socket:
        """One more, which takes nothing until `exchange`. Raises OSError; the kernel has no
        programs for it then, or no room."""
        first = self._group[0]
        self._steer()  # before the new one listens, which makes it a member
        listener = None
        try:
            listener = bound(first.family, first.getsockname())
            listener.listen(BACKLOG)
        except OSError:
            if listener is not None:
                listener.close()
            self._release()
            raise
        self._group.append(listener)
        self._shut.add(listener)
        return listener

    def exchange(self, old: socket.socket, new: socket.socket) -> None:
        """From now on `new` takes connections, and `old` none. Raises OSError."""
        shut = (self._shut | {old}) - {new}
        self._shut, before = shut, self._shut
        try:
            self._steer()
        except OSError:
            self._shut = before
            raise

    def close(self, listener: socket.socket) -> None:
        """Close one of them: what is queued for it is reset."""
        place = self._group.index(listener)
        listener.close()
        last = self._group.pop()
        if last is not listener:
            self._group[place] = last
        self._shut.discard(listener)
        self._release()

    def close_all(self) -> None:
        """Whoever connects from here on is refused."""
        for listener in self._group:
            listener.close()
        self._group.clear()
        self._shut.clear()

    def _steer(self) -> None:
        places = [i for i, listener in enumerate(self._group) if listener not in self._shut]
        program = [_LOAD_RANDOM, (_MOD, 0, 0, len(places))]
        for turn, place in enumerate(places):
            program += [(_SKIP_UNLESS, 0, 1, turn), (_RETURN, 0, 0, place)]
        program.append((_RETURN, 0, 0, places[0]))
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
        self._group[0].setsockopt(
            socket.SOL_SOCKET,
            _SO_ATTACH_REUSEPORT_CBPF,
            struct.pack("HP", len(program), ctypes.addressof(code)),
        )

    def _release(self) -> None:
        """A program that fits who is left, or none when all of them take connections."""
        if self._shut:
            self._steer()
        else:
            with contextlib.suppress(OSError):  # ENOENT: there is none
                self._group[0].setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)
