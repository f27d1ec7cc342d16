"""`gateway log replay`: publish records of a log again.

    the log, read only ──▶ a spool without a name: the chosen events, copied and checked
                       ──▶ gateway.scratch: a temporary log and the gateway's own publisher
                       ──▶ broker

The spool is the snapshot: a gateway that runs meanwhile may write over what is replayed. The topics
are the same as the first time, so subscribers see the events again; nothing in a message tells
them. The client id is the gateway's with "-replay", so that the running gateway keeps its session.
The log, its cursors and its dead letters are not touched.
"""

import asyncio
import logging
import marshal
import sys
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, Final

from gateway import _log
from gateway.config import NO_BROKER, Config
from gateway.errors import ConfigError, Exit, GatewayError
from gateway.log_dump import Selection
from gateway.log_tools import (
    RUNNING,
    Hole,
    count,
    is_running,
    progress,
    scan,
    size,
    timestamp,
)
from gateway.mqtt import broker_name
from gateway.publisher import LOGGER
from gateway.scratch import Scratch, Verdict, client_id_beside

SUFFIX: Final = "-replay"
STALLED_S: Final = 30.0
"""Nothing was settled for so long: it gives up."""
REASONS_MAX: Final = 8
"""Different refusals that are told apart."""


class Spool:
    """The events to publish, in a file that has no name."""

    def __init__(self, log: _log.Log, selection: Selection, file: BinaryIO) -> None:
        """Copies them. Raises OSError."""
        self._file = file
        self.events = self.bytes = self.holes = 0
        self.first: _log.Record | None = None
        self.last: _log.Record | None = None
        start, end = selection.range(log)
        with progress("reading the log", end - start) as show:
            for found in selection.select(log):
                show(found.lsn - start)
                if isinstance(found, Hole):
                    self.holes += 1
                elif found.kind == _log.DATA:
                    marshal.dump(tuple(found), file)
                    self.events += 1
                    self.bytes += len(found.body)
                    self.first, self.last = self.first or found, found

    def __iter__(self) -> Iterator[_log.Record]:
        self._file.seek(0)
        for _ in range(self.events):
            yield _log.Record(*marshal.load(self._file))


class _Tally:
    """What became of the events."""

    def __init__(self) -> None:
        self.published = self.refused = 0
        self.reasons: dict[str, int] = {}

    def add(self, record: _log.Record, verdict: Verdict) -> None:
        if verdict.published:
            self.published += 1
            return
        self.refused += 1
        reason = verdict.text if len(self.reasons) < REASONS_MAX else "other reasons"
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if self.refused == 1:
            _say(f"lsn {record.lsn}, device {record.device_id}: {verdict.text}")


def run(config: Config, selection: Selection, yes: bool) -> int:
    """Publish what `selection` takes to the configured broker. Returns an exit code: REFUSED when
    the broker refused some for good, UNREACHABLE when it gave up before all were settled.

    Raises ConfigError (no broker, or everything without `yes`), NoLog, `_log.LogError`, OSError."""
    broker = config.mqtt.broker
    if broker is None:
        raise ConfigError(NO_BROKER)
    path = config.log.path
    if is_running(path):
        _say(f"note: {RUNNING}")
    log = scan(path)
    client_id = client_id_beside(config.mqtt, f"{log.identity:016x}", SUFFIX)
    with tempfile.TemporaryFile(prefix="gateway-replay-") as file:
        try:
            spool = Spool(log, selection, file)
        except OSError as error:
            raise GatewayError(
                f"no room for a copy of the events in {tempfile.gettempdir()} ({error.strerror});"
                " set TMPDIR to a folder that has it, or choose fewer events"
            ) from None
        log.close()
        for line in _plan(spool, broker_name(broker), config.mqtt.topic, client_id):
            print(line, flush=True)
        if not spool.events:
            return Exit.OK
        if not yes and _is_everything(selection):
            raise ConfigError(
                "this is everything that the log still holds: add --yes to publish all of it"
                " again, or choose with --from, --to, --since, --until or --device"
            )
        return _publish(config, spool, client_id)


def _is_everything(selection: Selection) -> bool:
    return selection._replace(everything=False) == Selection()


def _plan(spool: Spool, broker: str, topic: str, client_id: str) -> Iterator[str]:
    if spool.holes:
        yield f"{count(spool.holes, 'place')} without a whole record: see `gateway log verify`"
    if spool.first is None or spool.last is None:
        yield "no event to replay there"
        return
    first, last = spool.first, spool.last
    yield f"events   {spool.events}, {size(spool.bytes)} of bodies"
    yield f"from     lsn {first.lsn}, received {timestamp(first.received_at_ns)}"
    yield f"to       lsn {last.lsn}, received {timestamp(last.received_at_ns)}"
    yield f"broker   {broker}, topic {topic}, as {client_id}"
    yield "Subscribers of these topics will see the events again."


def _is_for_people(line: logging.LogRecord) -> bool:
    """Not the publisher's alarms about dead letters, of which a replay makes none; it says itself
    what was refused, and why it gave up."""
    return line.levelno < logging.ERROR


def _publish(config: Config, spool: Spool, client_id: str) -> int:
    tally = _Tally()
    LOGGER.addFilter(_is_for_people)
    try:
        with progress("publishing", spool.events) as show:

            def settled(record: _log.Record, verdict: Verdict) -> None:
                tally.add(record, verdict)
                show(tally.published + tally.refused)

            async def publish() -> str:
                async with Scratch(
                    config.mqtt, client_id=client_id, stalled_s=STALLED_S
                ) as scratch:
                    return await scratch.publish(spool, settled)

            why = asyncio.run(publish())
    except KeyboardInterrupt:
        _summary(spool, tally)
        raise
    finally:
        LOGGER.removeFilter(_is_for_people)
    _summary(spool, tally)
    if why:
        _say(f"gave up: {why}")
        return Exit.UNREACHABLE
    return Exit.REFUSED if tally.refused else Exit.OK


def _summary(spool: Spool, tally: _Tally) -> None:
    left = spool.events - tally.published - tally.refused
    print(f"{tally.published} published, {tally.refused} refused, {left} left")
    for reason, n in tally.reasons.items():
        print(f"{n:>9} refused: {reason}")
    if left:
        print("What is left may have reached the broker or not; replaying it again is safe.")


def _say(text: str) -> None:
    print(f"gateway: {text}", file=sys.stderr)
