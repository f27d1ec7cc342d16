"""The file sink: events as lines of JSON in files, synced before the log's cursor moves.

    log, below durable ──fill──▶ run of whole lines ──write──▶ .part ──fdatasync──▶ confirm: cursor
                         ▲ one buffer, in compiled code          │
                         │                                       └─ full or old: rename, sync folder
               thread of its own: a disk that hangs holds this sink only

Promises
- A line stands in the files once, whole, in the log's order, whatever died when.
- The cursor passes an event only when its line is synced, the name of its file too, and a user
  finds that file by its name.
- Memory: one run (below 1 MiB of lines, and one fill), whatever waits.
- Nothing is read above `durable`: an lsn in a file never names another event after a power cut.

The order of events, and what SIGKILL or a power cut after each leaves for the next start (`_open`)

    begin .part ─▶ write ─▶ fdatasync ─▶ sync folder ─▶ look by name ─▶ confirm ─▶ persisted
        │            │          │   (of a new file)         │             │ by the next commit
        │            │          │                           │             └ done
        │            │          └───────────────────────────┴ lines not below the cursor: cut off,
        │            │                                        read from the log and written again
        │            └ the same, perhaps torn or zeros: cut off
        └ an empty .part, or none: removed

    (full or old) rename ─▶ sync folder ─▶ confirm, begin the next .part
                    │           └ the name says up to where the log is written out: read on there,
                    │             also when the cursor is behind; nothing stands twice
                    └ power cut: one of the two names. Under the old one it is a .part, as above

Each step is made only after the one before it has returned, so at most one name is ever in doubt
and there is at most one .part. The cursor that the next start sees may be an older one than was
confirmed, never a newer one: it is persisted with the log's commits.

Lines that a finished file has and the cursor has not are passed without being written, if its last
line is the log's: a log that was put back from a copy has other events there, and gets its lines.

Trouble (a full disk, a failed sync, a folder that was removed) ends in the same way as a crash: the
state is "held", everything is closed, and after a backoff the folder is opened as at a start. The
.part is finished at its last confirmed line and a new one begun, for a descriptor whose sync failed
once can never be believed again.
"""

import asyncio
import contextlib
import errno
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from gateway import _log
from gateway._lines import Lines
from gateway._log import Lapped, Log
from gateway.errors import ConfigError
from gateway.logs import Seldom
from gateway.retry import ALARM_INTERVAL_S, Alarms, Backoff
from gateway.settings import FileConfig
from gateway.sinks import SinkStatus
from gateway.sinks.files import (
    Entry,
    Folder,
    NotLogged,
    Part,
    end_below,
    line_start,
    lsn_of,
    pread_of,
)

LOGGER = logging.getLogger("gateway.sinks.file")

RUN_BYTES: Final = 1 << 20
"""So many bytes of lines are synced at once: larger runs gain nothing."""
WAIT_MS: Final = 1000
"""The longest sleep of the thread; it wakes by itself when there is something."""
BACKOFF_BASE_S: Final = 0.2
BACKOFF_CAP_S: Final = 5.0
"""What holds this sink is on this machine: somebody makes room, and does not want to wait."""
STUCK_S: Final = 10.0
"""A system call that has not returned for so long."""
CLOSE_S: Final = 5.0
"""So long `close` waits for the thread; a disk that hangs is left behind with it."""

NEXT_STEP: Final = {
    errno.ENOSPC: "make room on that disk, or let file.files_max remove old files; the sink goes on"
    " by itself",
    errno.EDQUOT: "raise the quota, or let file.files_max remove old files; the sink goes on by"
    " itself",
    errno.EACCES: "look at the owner and the mode of the folder",
    errno.EPERM: "look at the owner and the mode of the folder",
    errno.EROFS: "the file system is mounted read-only: look at the disk, or set file.directory",
    errno.ENOENT: "its lines that were not confirmed are written again; take away finished files"
    " only",
    errno.EEXIST: "move it away: nothing is written over",
    errno.ELOOP: "a symbolic link stands where the file should be: remove it",
}


class FileSink:
    """Writes what is durable in `log` to files, and moves the cursor of `sink`.

    Build it, `await run()` in a task of its own, `await drain(...)` and `await close()` at the end.
    Its thread is the only writer of this sink's cursor.
    """

    name = "file"

    def __init__(
        self,
        log: Log,
        sink: int,
        settings: FileConfig,
        *,
        on_status: Callable[[SinkStatus], None] | None = None,
        status_file: Path | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Raises ConfigError when there is no folder in the settings. `on_status` is called on the
        loop at each change of the status, and `status_file` replaced; `draw` is for the jitter."""
        if settings.directory is None:
            raise ConfigError("file.directory is not set")
        self._log, self._sink, self._settings = log, sink, settings
        self._compressed = settings.compression == "zstd"
        self._lines = Lines(log, sink, RUN_BYTES)
        self._folder = Folder(Path(settings.directory).absolute(), log.identity)
        self._part: Part | None = None
        self._part_until_s = 0.0
        """CLOCK_MONOTONIC: then it is old."""
        self._pending_bytes = 0
        """Lines that are filled and not confirmed."""
        self._pending_since_s = 0.0
        self._rest = b""
        """Lines that were filled and are not written yet: of the run with which a start began."""
        self._backoff = Backoff(BACKOFF_BASE_S, BACKOFF_CAP_S, draw)
        self._alarms = Alarms(LOGGER)
        self._status = SinkStatus()
        self._on_status, self._status_file = on_status, status_file
        self._status_trouble = Seldom(ALARM_INTERVAL_S)
        self._thread = threading.Thread(target=self._live, name="file sink", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._changed = asyncio.Event()
        self._closing = threading.Event()
        self._busy_since_s: float | None = None
        """CLOCK_MONOTONIC; None: it sleeps."""

    # ---- for the delivery process, on the loop -----------------------------------------------

    async def run(self) -> None:
        """Write until `close`; returns earlier when a record of the log is damaged."""
        if self._closing.is_set():
            return
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._thread.start()
        shown = None
        while True:
            if (status := self.status()) != shown:
                shown = status
                self._show(status)
            if self._ended.done():
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), STUCK_S / 10)
            self._changed.clear()
        self._ended.result()

    def on_committed(self) -> None:
        """Nothing to do: the thread wakes when what is committed is durable."""
        self._look_whether_drained()

    @property
    def idle(self) -> bool:
        """Everything that is committed now is in files, synced."""
        return self._log.cursor(self._sink).lsn >= self._log.committed

    def status(self) -> SinkStatus:
        """What it is doing now."""
        since = self._busy_since_s
        if since is None or time.monotonic() - since < STUCK_S:
            return self._status
        return msgspec.structs.replace(
            self._status,
            state="stuck",
            last_error=f"{self._folder.path}: a system call has not returned for {STUCK_S:g} s;"
            " look at the disk",
        )

    async def drain(self, deadline_s: float) -> bool:
        """Sync without gathering until `idle`, at most so long. True: idle."""
        self._drained = asyncio.get_running_loop().create_future()
        self._log.wake_durable()
        self._look_whether_drained()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._drained), deadline_s)
        return self.idle

    async def close(self) -> None:
        """End `run`: what is written is synced and confirmed, the `.part` stays."""
        self._closing.set()
        self._log.wake_durable()
        if self._ended is not None:
            await asyncio.wait((self._ended,), timeout=CLOSE_S)

    def _look_whether_drained(self) -> None:
        if self._drained is not None and not self._drained.done() and self.idle:
            self._drained.set_result(None)

    def _show(self, status: SinkStatus) -> None:
        self._log.counter_set(_log.BLOCK_DELIVERY, _log.COUNTERS["file_up"], int(status.ok))
        if self._on_status is not None:
            self._on_status(status)
        if self._status_file is None:
            return
        try:
            status.write(self._status_file)
        except OSError as problem:
            if self._status_trouble() is not None:  # a full disk lasts
                LOGGER.warning("cannot write %s: %s", self._status_file, problem)

    # ---- the thread --------------------------------------------------------------------------

    def _live(self) -> None:
        failure: BaseException | None = None
        try:
            self._try_until_closed()
        except _log.LogCorrupt as damage:
            self._become("damaged", f"a record that was accepted is damaged: {damage}", damage.lsn)
        except BaseException as error:
            failure = error
        finally:
            self._let_go()
            self._call(self._end, failure)

    def _end(self, failure: BaseException | None) -> None:
        assert self._ended is not None
        if failure is not None:
            self._ended.set_exception(failure)
        else:
            if self._status.corrupt_lsn is None:
                self._status = self._status.to("closed")
            self._ended.set_result(None)
        self._changed.set()

    def _try_until_closed(self) -> None:
        after_trouble = False
        while not self._closing.is_set():
            self._busy_since_s = time.monotonic()
            try:
                self._open(after_trouble)
                self._write_until_closed()
            except OSError as error:
                after_trouble = True
                self._hold(error)

    def _hold(self, error: OSError) -> None:
        if self._part is not None:
            self._part.give_up()
        self._let_go()
        self._count("file_write_failures")
        name = error.filename if isinstance(error.filename, str) else ""
        text = f"{self._folder.path / name}: {error.strerror or error}"
        step = NEXT_STEP.get(error.errno or 0, "look at the disk")
        self._alarms.say(logging.ERROR, f"the file sink is held: {text}", step)
        self._become("held", f"{text}; {step}")
        self._busy_since_s = None
        self._closing.wait(self._backoff.next_s())

    def _let_go(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None
        self._folder.close()

    def _become(self, state: str, error: str | None = None, lsn: int | None = None) -> None:
        before = self._status
        status = before.to(state, error)
        if lsn is not None:
            status = msgspec.structs.replace(status, corrupt_lsn=lsn)
        self._status = status
        if status != before:
            if before.state == "held" and state == "running":
                LOGGER.info("the file sink goes on in %s", self._folder.path)
            self._call(self._changed.set)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _count(self, counter: str, n: int = 1) -> None:
        self._log.counter_add(_log.BLOCK_DELIVERY, _log.COUNTERS[counter], n)

    # ---- start, and start again --------------------------------------------------------------

    def _open(self, after_trouble: bool) -> None:
        """Find out what is written, make it whole, and read on behind it."""
        cursor = self._log.cursor(self._sink).lsn
        self._pending_bytes, self._rest = 0, b""
        self._lines.seek(cursor)
        self._folder.open()
        finished, parts = self._folder.entries()
        newest: tuple[int, bytes] | None = None
        if finished and (last := finished[-1].last) is not None and last >= cursor:
            newest = last, self._folder.last_line(finished[-1])
        for entry in parts:
            try:
                part = Part.reopen(self._folder, entry, cursor, self._is_logged)
            except NotLogged:
                self._set_aside(entry, cursor)
                continue
            if part is None:
                continue
            self._part = part
            if part.last >= cursor:
                newest = part.last, part.last_line
            if after_trouble or entry is not parts[-1] or entry.compressed != self._compressed:
                part.sync()
                self._finish(part)
        self._remove_old()
        if self._part is not None:
            age_s = max(0.0, time.time() - self._part.first_received_s)
            self._part_until_s = time.monotonic() + self._settings.file_age_max_s - age_s
        if newest is not None and not self._pass(*newest):
            for entry in finished:
                if entry.last is not None and entry.last >= cursor:
                    self._set_aside(entry, cursor)
            self._lines.seek(cursor)

    def _set_aside(self, entry: Entry, cursor: int) -> None:
        old, new = self._folder.path / entry.name, self._folder.set_aside(entry)
        LOGGER.error(
            "%s is not of this log, which may have been put back from an older copy: it"
            " is now %s, and the log's events from lsn %d on are written",
            *(old, new, cursor),
        )

    def _is_logged(self, lsn: int, line: bytes) -> bool:
        """The log has this very line there."""
        lines = Lines(self._log, self._sink, 1)
        try:
            lines.seek(lsn)
            return bytes(lines.fill() or b"") == line
        except ValueError:
            return False
        except _log.LogError:  # lapped or damaged: whoever reads on there finds it
            return True

    def _pass(self, last: int, written: bytes) -> bool:
        """Lines from the cursor on up to `last` are in a file: they need only be confirmed. False:
        `written`, the last one there, is not what the log has at `last`; nothing was passed."""
        while self._log.cursor(self._sink).lsn <= last:
            try:
                lines = self._lines.fill()
            except Lapped:
                self._skip()
                continue
            if lines is None:
                return False
            data = bytes(lines)
            end = end_below(pread_of(data), len(data), last + 1)
            line = data[line_start(data, end) : end]
            if line == written and end:
                self._rest, self._pending_bytes = data[end:], end
                return True
            if lsn_of(line) == last or end < len(data):
                return False
        return True

    # ---- run after run -----------------------------------------------------------------------

    def _write_until_closed(self) -> None:
        while True:
            self._busy_since_s = now_s = time.monotonic()
            closing = self._closing.is_set()
            durable = self._log.durable  # before the look: what comes later ends the wait
            lines = None if closing else self._next()
            if lines is not None:
                if not self._pending_bytes:
                    self._pending_since_s = now_s
                self._write(lines)
            due_s = self._pending_since_s + self._settings.sync_interval_ms / 1000
            done = (part := self._part) is not None and (
                now_s >= self._part_until_s or part.lines_bytes >= self._settings.file_bytes_max
            )
            hurry = done or closing or self._hurry(lines is None)
            if hurry or self._pending_bytes >= RUN_BYTES or now_s >= due_s:
                self._sync()
            if done and part is not None:
                self._finish(part)
                self._remove_old()
            if not self._pending_bytes:
                self._become("running")
            if closing:
                return
            if lines is None:
                until_s = due_s if self._pending_bytes else now_s + WAIT_MS / 1000
                if self._part is not None:
                    until_s = min(until_s, self._part_until_s)
                self._busy_since_s = None
                wait_ms = min(WAIT_MS, max(1, int((until_s - now_s) * 1000) + 1))
                self._log.wait_durable(durable, wait_ms)

    def _hurry(self, caught_up: bool) -> bool:
        """Somebody waits for what is gathered, and nothing can be added to it."""
        if not (caught_up and self._pending_bytes):
            return False
        return self._drained is not None or self._log.sinks_wanted(self._log.cursor(self._sink).lsn)

    def _next(self) -> bytes | memoryview | None:
        """Whole lines, perhaps none; None: nothing new is durable."""
        if self._rest:
            rest, self._rest = self._rest, b""
            return rest
        try:
            return self._lines.fill()
        except Lapped:
            self._sync()
            self._skip()
            return b""

    def _skip(self) -> None:
        """The log was written over where this sink, which it does not wait for, would read on."""
        skipped = self._log.skip(self._sink)
        self._lines.seek(self._log.cursor(self._sink).lsn)
        self._alarms.say(
            logging.WARNING,
            f"the log went on without the file sink: {skipped} events are in no file",
            "file.required = true makes it wait",
            key="skipped",
        )

    def _write(self, lines: bytes | memoryview) -> None:
        """Into one file or several: a line that would lift a file above its size begins the next
        one."""
        while lines:
            part = self._part
            if part is None:
                lsn = lsn_of(bytes(lines[:256]))
                assert lsn is not None
                part = self._part = Part.begin(self._folder, lsn, self._compressed)
                self._part_until_s = time.monotonic() + self._settings.file_age_max_s
            room = self._settings.file_bytes_max - part.lines_bytes
            end = len(lines)
            if end > room:
                end = line_start(lines, room + 1) if room > 0 else 0
                if end == 0 and part.lines_bytes == 0:  # one line that is larger than a file
                    end = bytes(lines).index(b"\n") + 1
            if end:
                part.write(lines[:end])
                self._count("file_bytes", end)
                self._pending_bytes += end
                lines = lines[end:]
            if lines:
                self._sync_part(part)
                self._finish(part)
                self._remove_old()

    def _sync(self) -> None:
        """What was filled is durable; the cursor passes it."""
        if self._rest:
            return  # it is filled too, and not written
        if self._pending_bytes and self._part is not None:
            self._sync_part(self._part)
        if self._pending_bytes or self._lines.lsn > self._log.cursor(self._sink).lsn:
            self._lines.confirm()  # from here ack=sink may be told yes, and the log may forget
            self._pending_bytes = 0
            self._backoff.reset()
            if self._drained is not None:
                self._call(self._look_whether_drained)

    def _sync_part(self, part: Part) -> None:
        started_ns = time.monotonic_ns()
        part.sync()
        self._count("file_syncs")
        self._count("file_sync_ns", time.monotonic_ns() - started_ns)

    def _finish(self, part: Part) -> None:
        """A part, synced, gets its final name."""
        part.finish()
        self._part = None
        self._count("file_files")

    def _remove_old(self) -> None:
        try:
            removed = self._folder.remove_oldest(self._settings.files_max)
        except OSError as error:  # too many files are no reason to write none
            self._alarms.say(
                logging.ERROR,
                f"old files in {self._folder.path} cannot be removed: {error.strerror}",
                "look at the owner and the mode of the folder",
            )
        else:
            self._count("file_removed", removed)
