"""`gateway dead-letters ls | show | requeue | drop`: what an operator does with dead letters.

All of them work beside a running gateway and without one. Only one `requeue` or `drop` runs at a
time; what a running gateway adds meanwhile is left alone.

    requeue   read ─▶ publish with the configured MQTT settings, client id "...-requeue"
              ─▶ what the broker took leaves the files, the rest stays
              (a SIGKILL in between: it is still there, and would be published once more)
"""

import contextlib
import fcntl
import json
import os
import sys
from asyncio import Runner
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import uvloop

from gateway._log import DATA, Record
from gateway.config import NO_BROKER, Config
from gateway.dead_letters import (
    FOLDER,
    POISON,
    Damaged,
    Key,
    Line,
    every_line,
    files,
    rewrite,
    total_bytes,
    unix_ns,
)
from gateway.errors import ConfigError, Exit, GatewayError, NoLog
from gateway.log_tools import count, size
from gateway.mqtt import printable, reason_name
from gateway.publisher import LOGGER as PUBLISHER_LOGGER
from gateway.scratch import HAS_TS, STALLED_S, Scratch, Verdict, client_id_beside
from gateway.settings import FILE

ROWS_MAX: Final = 20
"""Rows of a table of `ls`."""


class Selection(NamedTuple):
    """Which dead letters; what is empty selects all."""

    reasons: frozenset[int | str]
    devices: frozenset[str]

    @classmethod
    def of(cls, reasons: Sequence[str], devices: Sequence[str]) -> "Selection":
        """From the command line. Raises ConfigError."""
        return cls(frozenset(map(_reason, reasons)), frozenset(devices))

    def takes(self, line: Line) -> bool:
        """Whether it is meant."""
        reason = POISON if line.reason_name == POISON else line.reason
        return (not self.reasons or reason in self.reasons) and (
            not self.devices or line.device_id in self.devices
        )


def _reason(text: str) -> int | str:
    if text == POISON:
        return POISON
    with contextlib.suppress(ValueError):
        if 0 <= (reason := int(text, 0)) <= 0xFF:
            return reason
    raise ConfigError(
        f"--reason {text}: write a reason code of MQTT 5, such as 0x87 or 135, or `poison`;"
        " `gateway dead-letters ls` shows those that are there"
    )


def ls(config: Config) -> int:
    """Print what there is. Returns an exit code."""
    folder = _folder(config)
    reasons: Counter[str] = Counter()
    topics: Counter[tuple[str, str]] = Counter()
    oldest = newest = ""
    damaged: list[Damaged] = []
    for line in every_line(folder):
        if isinstance(line, Damaged):
            damaged.append(line)
            continue
        reasons[_name(line)] += 1
        topics[line.topic, line.device_id] += 1
        oldest = min(oldest or line.dead_lettered_at, line.dead_lettered_at)
        newest = max(newest, line.dead_lettered_at)
    paths = files(folder)
    limit = config.dead_letters
    print(f"folder   {folder}")
    print(
        f"files    {len(paths)} of at most {limit.files_max}, {size(total_bytes(folder))} of at"
        f" most {size(limit.files_max * limit.file_bytes_max)}; when full: {limit.when_full}"
    )
    print(f"events   {sum(reasons.values())}")
    if not paths and config.sinks == (FILE,):
        print("There are none with this configuration: no broker is set (mqtt.url) to refuse any.")
    for line in damaged:
        print(f"DAMAGED  {line.path}, line {line.number}: cannot be read, and is left as it is")
    if not reasons:
        return Exit.OK
    print(f"oldest   {oldest}\nnewest   {newest}\n\n{'EVENTS':>8}  REASON")
    for reason, number in reasons.most_common():
        print(f"{number:>8}  {reason}")
    print(f"\n{'EVENTS':>8}  {'DEVICE':<24}  TOPIC")
    for (topic, device_id), number in topics.most_common(ROWS_MAX):
        print(f"{number:>8}  {printable(device_id):<24}  {printable(topic)}")
    if len(topics) > ROWS_MAX:
        print(f"{'...':>8}  and {count(len(topics) - ROWS_MAX, 'topic')} more")
    return Exit.OK


def show(config: Config, selection: Selection, limit: int) -> int:
    """Print the lines, oldest first; 0: no limit. Returns an exit code."""
    shown = 0
    for line in every_line(_folder(config)):
        if isinstance(line, Damaged):
            print(f"{line.path}: line {line.number} cannot be read", file=sys.stderr)
        elif selection.takes(line):
            print(msgspec.json.encode(line).decode())
            shown += 1
            if shown == limit:
                break
    return Exit.OK


def drop(config: Config, selection: Selection, yes: bool) -> int:
    """Remove dead letters for good. Returns an exit code. Raises ConfigError when neither `yes` nor
    a selection says that it is meant."""
    folder = _folder(config)
    chosen = sum(1 for line in _lines(folder) if selection.takes(line))
    if not yes and not any(selection):
        raise ConfigError(
            f"this would drop all dead letters, {count(chosen, 'event')}, for good: repeat it with"
            " --yes, or choose some with --reason or --device"
        )
    gone = 0
    if chosen:
        with _alone(folder):
            gone = rewrite(
                folder, lambda line: not selection.takes(line), config.dead_letters.file_bytes_max
            )
    print(f"{count(gone, 'dead letter')} dropped")
    return Exit.OK


def requeue(config: Config, selection: Selection, stalled_s: float = STALLED_S) -> int:
    """Publish dead letters again, now. Returns Exit.OK when the broker took all of them."""
    if config.mqtt.url is None:
        raise ConfigError(NO_BROKER)
    folder = _folder(config)
    first = next((line for line in _lines(folder) if selection.takes(line)), None)
    if first is None:
        print("no dead letters to requeue")
        return Exit.OK
    client_id = client_id_beside(config.mqtt, first.log, "-requeue")
    taken: set[Key] = set()
    refused: Counter[str] = Counter()
    flying: deque[Key] = deque()
    why = ""

    def records() -> Iterator[Record]:
        for line in _lines(folder):
            if not selection.takes(line):
                continue
            try:
                record = _record(line)
            except ValueError as error:
                print(f"gateway: lsn {line.lsn} stays, it is damaged: {error}", file=sys.stderr)
                continue
            flying.append(line.key)
            yield record

    def settled(record: Record, verdict: Verdict) -> None:
        key = flying.popleft()
        if verdict.published:
            taken.add(key)
        else:
            reason = POISON if verdict.reason is None else reason_name(verdict.reason)
            refused[f"{reason} ({verdict.text})" if verdict.text else reason] += 1

    async def publish() -> str:
        async with Scratch(config.mqtt, client_id=client_id, stalled_s=stalled_s) as scratch:
            return await scratch.publish(records(), settled)

    with _alone(folder):
        level = PUBLISHER_LOGGER.level
        PUBLISHER_LOGGER.setLevel("CRITICAL")  # what it would log is said here, and once
        try:
            with Runner(loop_factory=uvloop.new_event_loop) as runner:
                why = runner.run(publish())
        finally:
            PUBLISHER_LOGGER.setLevel(level)
            if taken:
                room = config.dead_letters.file_bytes_max
                rewrite(folder, lambda line: line.key not in taken, room)
            print(f"{count(len(taken), 'dead letter')} published again")
    for reason, number in refused.most_common(ROWS_MAX):
        print(f"{count(number, 'event')} refused again and kept: {reason}")
    if why:
        print(f"gateway: the rest is kept: {why}", file=sys.stderr)
        return Exit.UNREACHABLE
    return Exit.REFUSED if refused else Exit.OK


def _folder(config: Config) -> Path:
    folder = config.log.path.parent / FOLDER
    if not folder.parent.is_dir():
        raise NoLog(str(config.log.path))
    return folder


def _lines(folder: Path) -> Iterator[Line]:
    return (line for line in every_line(folder) if isinstance(line, Line))


def _name(line: Line) -> str:
    if line.reason_name == POISON:
        return "poison: broke connections" + (
            f", last with {reason_name(line.reason)}" if line.reason else ""
        )
    return f"0x{line.reason or 0:02X} {line.reason_name}"


def _record(line: Line) -> Record:
    """Raises ValueError."""
    body = line.payload
    try:
        event = json.loads(body)
    except ValueError:
        event = None  # what cannot be read has no ts
    flags = HAS_TS if isinstance(event, dict) and "ts" in event else 0
    return Record(
        lsn=line.lsn,
        size=0,
        epoch=line.epoch,
        kind=DATA,
        flags=flags,
        received_at_ns=unix_ns(line.received_at),
        seq=None,
        boot=None,
        device_id=line.device_id,
        body=body,
        dead=0,
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One such command at a time. Raises GatewayError."""
    fd = os.open(folder / ".tools.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GatewayError(
                f"{folder}: another `gateway dead-letters` command is at work; wait until it ends"
            ) from None
        yield
    finally:
        os.close(fd)
