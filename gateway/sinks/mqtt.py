"""The broker as a sink: a `gateway.publisher.Publisher`, and another one when the log has passed
it.

    run ─▶ Publisher ── close ────────────────────────────────────────▶ end
              ▲  └─ the place of an optional sink was written over: its window holds positions
              │     that mean nothing any more ─▶ close, log.skip ─┐
              └────────────────────────────────────────────────────┘

What was in flight then may have arrived, and is counted as skipped: at least once never promised
the other way round.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gateway import books
from gateway._log import Log, LogError
from gateway.dead_letters import Shelf
from gateway.mqtt import LinkStatus
from gateway.mqtt_settings import MqttConfig
from gateway.publisher import Publisher
from gateway.settings import MQTT
from gateway.sinks import SinkStatus

LOGGER: Final = logging.getLogger("gateway.publisher")


class MqttSink:
    """Publishes to the broker, and moves the cursor of `sink`."""

    name = MQTT

    def __init__(
        self,
        log: Log,
        sink: int,
        settings: MqttConfig,
        dead_letters: Shelf,
        *,
        on_status: Callable[[SinkStatus], None] | None = None,
        status_file: Path | None = None,
    ) -> None:
        """Raises ConfigError when a setting cannot be used (topic, certificate files)."""
        self._log, self._sink = log, sink
        self._on_status = on_status
        self._closing = False
        self._passed: asyncio.Task[None] | None = None
        """Ends a publisher that the log has passed."""
        self._settings, self._dead_letters = settings, dead_letters
        self._status_file = status_file
        self._publisher = self._make()

    def _make(self) -> Publisher:
        return Publisher(
            self._log,
            self._sink,
            self._settings,
            self._dead_letters,
            on_status=self._link,
            status_file=self._status_file,
        )

    async def run(self) -> None:
        """Publish until `close`."""
        while not self._closed():
            try:
                await asyncio.create_task(self._publisher.run())
            except LogError:  # of a refusal whose record is gone
                if not self._is_passed():
                    raise
            if self._passed is not None:
                await self._passed
                self._passed = None
            if self._closed():
                return
            skipped = self._log.skip(self._sink)
            LOGGER.warning(
                "the log went on without the broker: %d events were not published;"
                " mqtt.required = true makes it wait",
                skipped,
            )
            self._publisher = self._make()

    def on_committed(self) -> None:
        """More may be in the log."""
        self._publisher.on_committed()

    @property
    def idle(self) -> bool:
        """Everything that is committed now is done."""
        return self._publisher.idle

    async def drain(self, deadline_s: float) -> bool:
        """Publish until `idle`, at most so many seconds. True: idle."""
        return await self._publisher.drain(deadline_s)

    async def close(self) -> None:
        """Say goodbye to the broker and end `run`."""
        self._closing = True
        await self._publisher.close()

    def status(self) -> SinkStatus:
        """What it is doing now; of a pool, the connection that is worst off."""
        link = self._publisher.status
        corrupt = self._publisher.window.look().corrupt_lsn or None
        return SinkStatus(
            state=link.state,
            last_error=link.last_error,
            last_error_unix_s=link.last_error_unix_s,
            since_unix_s=link.since_unix_s,
            corrupt_lsn=None if corrupt is None or self._is_passed() else corrupt,
        )

    def _closed(self) -> bool:
        return self._closing

    def _is_passed(self) -> bool:
        return books.is_passed(self._log, self._sink)

    def _link(self, _: LinkStatus) -> None:
        status = self.status()
        if (
            status.state == "held"
            and self._passed is None
            and self._publisher.window.look().corrupt_lsn
            and self._is_passed()
        ):
            self._passed = asyncio.create_task(self._publisher.close())
        elif self._on_status is not None:
            self._on_status(status)
