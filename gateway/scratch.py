"""Publish records again from outside the gateway's log: `dead-letters requeue`, `log replay`.

A temporary log that nobody else sees (its file has no name any more once it is open) and the
gateway's own publisher, which empties it into the broker with QoS 1. Each record gets a verdict
only after the broker's answer.

    async with Scratch(config.mqtt, client_id="gateway-...-requeue") as scratch:
        why = await scratch.publish(records, lambda record, verdict: ...)

Crash story: the log vanishes with the process. What had no verdict may or may not have reached the
broker; publish it again.
"""

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple, Self

import msgspec

from gateway import _log
from gateway._log import Record
from gateway.dead_letters import DeadLetter
from gateway.errors import GatewayError
from gateway.mqtt_settings import MqttConfig
from gateway.publisher import Publisher
from gateway.settings import RECORD_OVERHEAD_BYTES

CAPACITY_BYTES: Final = 8 << 20
"""Room for the largest record (a log takes records up to an eighth of it, at most 1 MiB)."""

STALLED_S: Final = 30.0
"""No verdict for so long: the broker is away, or says no."""

LOOK_S: Final = 0.01
CLIENT_ID_BYTES_MAX: Final = 128
"""As `mqtt.client_id`: the limit of AWS IoT Core."""
BODY_BYTES_MAX: Final = (1 << 20) - RECORD_OVERHEAD_BYTES
_ONE_LINE: Final = bytes.maketrans(b"\r\n", b"  ")
HAS_TS: Final = 1
"""The flag of a record whose body has a ts of its own (`gw_validator.h`)."""


def client_id_beside(config: MqttConfig, identity: str, suffix: str) -> str:
    """The gateway's client id with a suffix: a running gateway must not be taken over (3.1.4)."""
    own = config.client_id or f"gateway-{identity}"
    return own.encode()[: CLIENT_ID_BYTES_MAX - len(suffix)].decode(errors="ignore") + suffix


class Verdict(NamedTuple):
    """What the broker said of one record."""

    published: bool
    reason: int | None
    """Reason code when it was refused for good; None: it broke connections."""
    text: str


PUBLISHED: Final = Verdict(True, 0, "")


class Scratch:
    """One temporary log, one connection. Takes MQTT settings as the gateway does; several calls of
    `publish` may follow each other."""

    def __init__(
        self,
        settings: MqttConfig,
        *,
        client_id: str,
        stalled_s: float = STALLED_S,
        capacity_bytes: int = CAPACITY_BYTES,
    ) -> None:
        # One connection, so that one client id is enough; messages of one event, since a pack would
        # tell the positions of the temporary log.
        self._settings = msgspec.structs.replace(
            settings,
            client_id=client_id,
            connections=1,
            mode="event",
        )
        self._packed, self._array = settings.mode == "packed", settings.pack_format == "array"
        self._stalled_s, self._capacity_bytes = stalled_s, capacity_bytes
        self._refused: dict[int, Verdict] = {}
        self._open = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Raises ConfigError, OSError, LogError."""
        async with contextlib.AsyncExitStack() as stack:
            self._log = stack.enter_context(_nameless_log(self._capacity_bytes))
            self._appender = _log.Appender(self._log)
            stack.callback(self._appender.close)
            self._publisher = Publisher(self._log, 0, self._settings, self)
            task = asyncio.create_task(self._publisher.run())
            stack.push_async_callback(self._end, task)
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def _end(self, task: "asyncio.Task[None]") -> None:
        await self._publisher.close()
        await task

    def append(self, letters: Sequence[DeadLetter]) -> int:
        """The publisher's dead letters (`gateway.dead_letters.Shelf`); they live in memory here."""
        for letter in letters:
            reason = None if letter.poison else letter.reason
            self._refused[letter.record.lsn] = Verdict(False, reason, letter.text)
        return len(letters)

    async def publish(
        self, records: Iterable[Record], on_verdict: Callable[[Record, Verdict], None]
    ) -> str:
        """Publish DATA records in this order; each is handed to `on_verdict` once it is settled.
        Returns "" when all are, else why it gave up: nothing was settled for `stalled_s`, or the
        broker refuses the connection. Cancel it at any time. Raises what reading `records` raises,
        and LogError."""
        left = iter(records)
        ready: Record | None = next(left, None)
        flying: deque[tuple[int, Record]] = deque()
        settled_s = time.monotonic()
        while ready is not None or flying:
            while ready is not None and (lsn := self._append(ready)) >= 0:
                flying.append((lsn, ready))
                ready = next(left, None)
            self._log.follow(0, 0)
            self._publisher.on_committed()
            await asyncio.sleep(LOOK_S)
            cursor = self._publisher.window.lsn
            while flying and flying[0][0] < cursor:
                lsn, record = flying.popleft()
                on_verdict(record, self._refused.pop(lsn, PUBLISHED))
                settled_s = time.monotonic()
            if ready is not None:
                self._log.sync()  # room is made where the cursor has passed
            status = self._publisher.status
            if flying and status.state in ("refused", "taken_over"):
                return status.last_error
            if flying and time.monotonic() - settled_s > self._stalled_s:
                return status.last_error or f"{status.broker} has not answered"
        return ""

    def _append(self, record: Record) -> int:
        if self._packed:
            record = as_packed(record, self._array)
        # Without its key: the same event may well come twice, and the topic does not need it.
        return self._appender.append(
            record._replace(seq=None, boot=None, flags=record.flags & HAS_TS)
        )


def as_packed(record: Record, array: bool) -> Record:
    """The record with the payload that it would have alone in a packed message as its body: the
    same members are put in, with the position that it had. Unchanged when it has no room for them
    (within some hundred bytes of the largest record)."""
    rest = record.body.lstrip(b" \t\r\n")[1:]  # behind the opening brace
    names = json.loads(record.body)
    put = b"" if "device_id" in names else b'"device_id":"%s",' % record.device_id.encode()
    put += b'"lsn":%d,' % record.lsn
    if not record.flags & HAS_TS:
        put += b'"ts":"%s",' % rfc3339_ms(record.received_at_ns).encode()
    line = (b"{" + put + rest).translate(_ONE_LINE)
    body = b"[%s]" % line if array else line + b"\n"
    if len(body) > BODY_BYTES_MAX:
        return record
    return record._replace(body=body, flags=record.flags | HAS_TS)


def rfc3339_ms(unix_ns: int) -> str:
    """UTC, milliseconds, as the publisher writes it."""
    seconds, rest = divmod(unix_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1_000_000:03d}Z"


@contextlib.contextmanager
def _nameless_log(capacity_bytes: int) -> Iterator[_log.Log]:
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="gateway-scratch-"))
        try:
            path = folder / "gateway.log"
            _log.create(str(path), capacity_bytes)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            log = _log.Log.open(str(path), fd, ["mqtt"])
            stack.callback(log.close)
        except OSError as error:
            raise GatewayError(
                f"{folder}: no temporary log of {capacity_bytes >> 20} MiB can be made there"
                f" ({error.strerror}); set TMPDIR to a folder that has room"
            ) from None
        finally:  # nothing is left behind from here on, not even by SIGKILL
            shutil.rmtree(folder, ignore_errors=True)
        log.takeover()
        yield log
