"""What became of the events that were answered? Two counts, one cheap and one that knows each.

    Taken        how many messages Mosquitto took, by its own count: costs nothing while a rate is
                 measured, and says when a server has published what it had
    Subscriber   which events reached a subscriber: each by its own seq, wherever it stands in a
                 message; for a run of its own, since forwarding costs the broker

Mosquitto needs SETTINGS: it must not drop for a slow subscriber, and must count each second.
"""

import contextlib
import re
import select
import socket
import threading
import time
from types import TracebackType
from typing import Final, NamedTuple, Self

from benchmarks.harness import Failed
from benchmarks.peers import mqtt_wire

SETTINGS: Final = ("max_queued_messages 0", "sys_interval 1")
STILL_S: Final = 1.5
"""More than one interval: what was counted before has been said."""
GIVEN_UP_S: Final = 5.0
"""Nothing more comes: what is missing is lost."""
DRAIN_S_MAX: Final = 60
SUBACK_S_MAX: Final = 10
_RECEIVED: Final = "$SYS/broker/publish/messages/received"
_seqs = re.compile(rb'"seq": ?"?(\d{10})\b').findall


class Taken:
    """Mosquitto's count of the messages that it was sent."""

    def __init__(self, port: int) -> None:
        self._connection, self._parser = mqtt_wire.dial(port, "bench-taken")
        self._connection.sendall(mqtt_wire.subscribe(_RECEIVED))
        self.count = 0

    def _read(self, wait_s: float) -> bool:
        """Whether the count has changed within this time."""
        before = self.count
        if select.select([self._connection], [], [], wait_s)[0]:
            data = self._connection.recv(65536)
            if not data:
                raise Failed("the broker closed the connection that reads its counts")
            for first, body in self._parser.feed(data):
                if first & 0xF0 == mqtt_wire.PUBLISH:
                    self.count = int(mqtt_wire.payload(first, body))
        return self.count != before

    def now(self) -> int:
        """The latest count that was said, at most a second old."""
        while self._read(0):
            pass
        return self.count

    def since(self, before: int, expected: int | None, timeout_s: float = DRAIN_S_MAX) -> int:
        """Messages since the count was `before`, once it stands still: briefly when as many as
        expected are there, else for so long that no more will come.
        """
        until = time.monotonic() + timeout_s
        still_since = time.monotonic()
        while (now := time.monotonic()) < until:
            if self._read(0.1):
                still_since = now
            complete = expected is not None and self.count - before >= expected
            if now - still_since > (STILL_S if complete else GIVEN_UP_S):
                break
        return self.count - before

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()


class Confirmed(NamedTuple):
    """A run with a subscriber. Of the requests that wrk left unanswered at its end, at most one a
    connection, some are delivered: so many losses can hide.
    """

    answered: int
    delivered: int

    @property
    def share(self) -> float:
        """Of the answered events that arrived."""
        return min(1.0, self.delivered / self.answered)


class Subscriber:
    """Collects the seqs of all events that arrive. Use it as a context manager."""

    def __init__(self, port: int) -> None:
        self._connection, self._parser = mqtt_wire.dial(port, "bench-confirm")
        self._subscribed = threading.Event()
        self._seen: dict[int, set[int]] = {}
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._ended = False
        self._thread = threading.Thread(target=self._collect, name="subscriber", daemon=True)

    def _collect(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._connection.recv(1 << 20):
                found = []
                for first, body in self._parser.feed(data):
                    if first == mqtt_wire.SUBACK:
                        self._subscribed.set()
                    elif first & 0xF0 == mqtt_wire.PUBLISH:
                        found += _seqs(body)
                with self._lock:
                    self._last = time.monotonic()
                    for seq in map(int, found):
                        self._seen.setdefault(seq // 10**7, set()).add(seq)
        self._ended = True

    def delivered(self, number: int) -> int:
        """Different events of a run of wrk that have arrived."""
        with self._lock:
            return len(self._seen.get(number, ()))

    def confirm(self, number: int, answered: int, timeout_s: float = DRAIN_S_MAX) -> Confirmed:
        """Wait until a run's events are there, or nothing has arrived for GIVEN_UP_S."""
        began = time.monotonic()
        while self.delivered(number) < answered:
            now = time.monotonic()
            if now - max(began, self._last) > GIVEN_UP_S or now - began > timeout_s:
                break
            if self._ended:
                raise Failed("the broker closed the connection of the subscriber")
            time.sleep(0.05)
        return Confirmed(answered, self.delivered(number))

    def __enter__(self) -> Self:
        self._thread.start()
        self._connection.sendall(mqtt_wire.subscribe("#"))
        if not self._subscribed.wait(SUBACK_S_MAX):
            raise Failed(f"no SUBACK in {SUBACK_S_MAX} s")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._connection.close()
