"""One HTTP worker process, without its server: what is answered, from the log and the
configuration.

A door (gateway/frontends/*) owns sockets, threads and requests; it asks here for verdicts and
pages:

    door ── device id, body ──▶ App.ingest.event (compiled: validate, claim, copy, commit)
         ── code ─────────────▶ App.refuse     count and say why
         ── path ─────────────▶ App.pages      /readyz /healthz /metrics

There is no `gateway/ingest.py` between: `gateway._log.Ingest` already takes a device id and a body
and returns a verdict, and knows no HTTP.

Nothing here waits. All methods are called by one thread at a time, the door's.
"""

import logging
import os
from collections.abc import Callable
from typing import Final

import msgspec

from gateway import _log, http, metrics
from gateway.errors import REFUSALS
from gateway.http import Answer
from gateway.logs import Seldom
from gateway.process import Launch, mqtt_status_path
from gateway.settings import RECORD_OVERHEAD_BYTES

_logger: Final = logging.getLogger(__name__)
_encode: Final = msgspec.json.Encoder().encode
_NO_STORE: Final = ("cache-control", "no-store")

PAGES: Final = _log.COUNTERS["requests"]
"""Requests that are not events; those are counted by `Ingest`, so an event costs no second
counter."""
LINK_UP: Final = ("connected", "held", "draining")
"""States of the publisher that only a connection has."""
FULL_INTERVAL_S: Final = 60.0
"""A full log is said again after this."""
GRACE_S: Final = 1.5
"""After the last answer a door waits at most this long for slow readers before the process ends."""


class App:
    """What one worker answers."""

    def __init__(self, log: _log.Log, launch: Launch) -> None:
        self.log = log
        self.config: Final = launch.config
        self.block: Final = launch.index
        self.ingest = _log.Ingest(log, launch.index)
        self.draining = False
        """Set by the door when its process is told to end: /readyz says so even before the log's
        state does."""
        self._status_path = mqtt_status_path(launch.config)
        self._exposition = metrics.Exposition(log, launch.recovered)
        self._seldom = Seldom(1.0)
        self._seldom_full = Seldom(FULL_INTERVAL_S)
        limits = launch.config.http
        self._limits: Final = {
            code: http.worded(code, f"{REFUSALS[code].message} = {limit}")
            for code, limit in (
                (http.BODY_TOO_LARGE, limits.body_bytes_max),
                (http.BODY_TIMEOUT, limits.body_deadline_ms),
            )
        }
        """Who sends an event does not know the settings."""
        self.pages: Final[dict[str, Callable[[str | None], Answer]]] = {
            "/readyz": self._ready,
            "/ready": self._ready,
            "/healthz": self._health,
            "/health": self._health,
            "/metrics": self._metrics,
        }
        """GET pages by path; the argument is the header Accept."""

    # ---- events ----------------------------------------------------------------------------------

    def refused(self, code: int) -> Answer:
        """The answer to a verdict of `ingest.event` other than 0, which has counted it."""
        if code == http.FAILED:
            # Failed after the commit: it is unknown whether the event stays, and only a 500 says
            # that.
            return http.refusal(http.INTERNAL)
        if code == http.LOG_FULL:
            self._say_full()
        return http.refusal(self._why(code), self.ingest.field, self.ingest.offset)

    def refuse(self, code: int, started_ns: int) -> Answer:
        """Count and answer a refusal that the door decided."""
        code = self._why(code)
        self.ingest.refuse(code, started_ns)
        return self._limits.get(code) or http.refusal(code)

    def _why(self, code: int) -> int:
        """The log's tail is closed when it drains and when it has failed."""
        return http.FAILED if code == http.DRAINING and self.log.state == _log.FAILED else code

    def _say_full(self) -> None:
        held = self._seldom_full()
        if held is not None:
            _logger.error(
                "the log is full: new events are refused with 503%s; it empties as the broker takes"
                " events (mqtt in /healthz says what holds them up)",
                f" ({held + 1} since the last line)" if held else "",
            )

    def internal(self, started_ns: int) -> Answer:
        """The answer when the door's own code raised: logged, counted, never silent. Call it in the
        handler."""
        held = self._seldom()
        if held is not None:
            more = f" ({held} more since the last line)" if held else ""
            _logger.error("internal error while answering a request%s", more, exc_info=True)
        try:
            self.ingest.refuse(http.INTERNAL, started_ns)
        except Exception:
            _logger.exception("could not count an internal error")
        return http.refusal(http.INTERNAL)

    # ---- pages -----------------------------------------------------------------------------------

    def page(self, path: str, method: str, accept: str | None) -> Answer | None:
        """The answer to a path that is a page, or None."""
        page = self.pages.get(path)
        if page is None:
            return None
        self.log.counter_add(self.block, PAGES)
        if method not in ("GET", "HEAD"):
            return http.not_allowed("GET, HEAD")
        return page(accept)

    def _ready(self, accept: str | None) -> Answer:
        state = _log.DRAINING if self.draining else self.log.state
        body = _encode({"ready": state == _log.RUNNING, "state": metrics.STATES[state]})
        return Answer(200 if state == _log.RUNNING else 503, [http.TYPE_JSON, _NO_STORE], body)

    def _health(self, accept: str | None) -> Answer:
        log = self.log
        state = log.state
        books = metrics.books(log)
        used = max(0, log.tail - log.reclaim)
        connected = log.counter_total(_log.COUNTERS["mqtt_connected"]) > 0
        link = self._link()
        if not connected and link.get("state") in LINK_UP:
            link["state"] = "starting"  # who wrote that is gone
        room = log.capacity_bytes - used
        problems = [
            text
            for wrong, text in (
                (state != _log.RUNNING, f"the log is {metrics.STATES[state]}"),
                (
                    room < self.config.http.body_bytes_max + RECORD_OVERHEAD_BYTES,
                    "the log is full: it has no room for the largest event",
                ),
                (not connected, "not connected to the broker"),
                (link.get("state") == "held", "the broker refuses an event: publishing stops"),
                (books.unexplained, f"{books.unexplained} events are unexplained"),
            )
            if wrong
        ]
        if state == _log.FAILED:
            status = "failed"
        else:
            status = "degraded" if problems else "ok"
        body = _encode(
            {
                "status": status,
                "problems": problems,
                "log": {
                    "state": metrics.STATES[state],
                    "used_bytes": used,
                    "capacity_bytes": log.capacity_bytes,
                },
                "mqtt": {
                    **link,
                    "connected": connected,
                    "in_flight": log.counter_total(_log.COUNTERS["mqtt_in_flight"]),
                    "connect_failures": log.counter_total(_log.COUNTERS["mqtt_connect_failures"]),
                },
                "events": books._asdict(),
                "restarts": {
                    "worker": log.counter_total(_log.COUNTERS["restarts_worker"]),
                    "delivery": log.counter_total(_log.COUNTERS["restarts_delivery"]),
                },
                "worker": {"index": self.block, "pid": os.getpid()},
            }
        )
        # Liveness: a broker that is away is no reason to restart the gateway, so "degraded" is 200.
        return Answer(503 if status == "failed" else 200, [http.TYPE_JSON, _NO_STORE], body)

    def _link(self) -> dict[str, object]:
        """What the publisher last wrote about its connection; a file, since it is text."""
        try:
            status = msgspec.json.decode(self._status_path.read_bytes(), type=dict[str, object])
        except (OSError, msgspec.DecodeError):
            return {}
        return {
            key: status.get(key) for key in ("broker", "state", "last_error", "last_error_unix_s")
        }

    def _metrics(self, accept: str | None) -> Answer:
        content_type, body = self._exposition.render(accept)
        return Answer(200, [("content-type", content_type), _NO_STORE], body)

    def close(self) -> None:
        """Give the intent slot back."""
        self.ingest.close()


def build(launch: Launch) -> App:
    """The app of the process that `launch` describes."""
    return App(_log.Log.attach(launch.lock_fd, launch.shared_fd), launch)
