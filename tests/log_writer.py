"""A log written without a gateway: events in, cursor moved, synced.

with Writer(path) as log: log.post(1); log.publish(); log.settle()
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway import _log
from tests.gateway_process import wait_for

MIB = 1 << 20


class Writer:
    """A log of `capacity_bytes`, made when there is none, opened as a gateway opens it."""

    def __init__(self, path: Path, capacity_bytes: int = MIB, sinks: tuple[str, ...] = ("mqtt",)):
        self.path, self._sinks = path, sinks
        if not path.exists():
            _log.create(str(path), capacity_bytes)

    def __enter__(self) -> Self:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        self.log = wait_for(self._open)
        self.log.takeover()
        self.ingest = _log.Ingest(self.log, 0)
        return self

    def _open(self) -> _log.Log | None:
        """None while the threads of a killed gateway still end."""
        try:
            return _log.Log.open(str(self.path), self._fd, self._sinks)
        except _log.LogLocked:
            return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ingest.close()
        self.log.close()
        os.close(self._fd)

    def post(self, seq: int, device_id: str = "dev-1", more: bytes = b"") -> int:
        """The lsn of an event that is accepted; `more` are fields such as b',"payload":1'."""
        return self.put(device_id, b'{"seq":%d,"metrics":{"t":%d.5}%s}' % (seq, seq % 90, more))

    def put(self, device_id: str, body: bytes) -> int:
        """The same with any body."""
        code = self.ingest.event(device_id, body, _log.now_ns())
        assert code == 0, _log.CODES[code]
        self.follow()
        return self.ingest.lsn

    def follow(self) -> int:
        """Committed, up to the tail."""
        return self.log.follow(self.log.tail - 1, 0)

    def publish(self, events: int | None = None, sink: int = 0) -> None:
        """What a publisher does: past `events`, or all."""
        cursor = self.log.cursor(sink)
        left = events
        while left != 0 and (record := self.log.read(cursor.lsn)):
            data = record.kind == _log.DATA
            cursor = cursor._replace(
                lsn=record.lsn + record.size,
                ordinal=cursor.ordinal + data,
                published=cursor.published + data,
            )
            if data and left is not None:
                left -= 1
        self.log.set_cursor(sink, cursor)

    def settle(self) -> None:
        """All that is committed is durable, and the watermark says so."""
        while self.log.sync():
            pass

    def lap(self, to: int, seq: int = 1 << 40) -> None:
        """Published events up to about position `to`, which is what writes over older ones."""
        while self.log.tail < to:
            self.post(seq, "lap", b',"payload":"%s"' % (b"x" * 3000))
            seq += 1
            if self.log.used > self.log.capacity_bytes // 2:
                self.publish()
                self.settle()
        self.publish()
        self.settle()


def waiting(path: Path) -> list[tuple[int, str, bytes]]:
    """lsn, device and body of each event that the next start would publish."""
    with Writer(path) as log:
        lsn, found = log.log.cursor(0).lsn, []
        while record := log.log.read(lsn):
            lsn += record.size
            if record.kind == _log.DATA:
                found.append((record.lsn, record.device_id, record.body))
        return found
