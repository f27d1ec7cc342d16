"""One HTTP worker process, without its server: what is answered, from the log and the
configuration.

A door (gateway/frontends/*) owns sockets, threads and requests; it asks here for verdicts and
pages:

    door ── device id, body ──▶ App.ingest.event (compiled: validate, claim, copy, commit)
         ── code ─────────────▶ App.refuse, App.refused   say why (and count)
         ── accepted ─────────▶ App.waiting   who asked for more than `enqueue`
         ── any other body ───▶ App.batches   many events, or one that is compressed
         ── path ─────────────▶ App.page      /readyz /healthz /metrics /docs/... /v1/receipts/...

`gateway._log.Ingest` takes a device id and a body and returns a verdict; it knows no HTTP.

Nothing here waits but `gateway.waiting`'s own thread. That thread, the door's and the main thread
call `refused` and `refuse`; the rest is the door's. The GIL keeps them apart.
"""

import ctypes
import logging
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NoReturn, Protocol

import msgspec

from gateway import _log, books, docs_ui, http, metrics, openapi, process
from gateway.batches import Batches
from gateway.errors import REFUSALS, ConfigError, Exit, GatewayError
from gateway.http import Answer
from gateway.logs import Seldom
from gateway.process import Launch, status_path
from gateway.settings import FILE, MQTT, RECORD_OVERHEAD_BYTES
from gateway.waiting import Waiting

_logger: Final = logging.getLogger(__name__)
_encode: Final = msgspec.json.Encoder().encode
_NO_STORE: Final = ("cache-control", "no-store")

PAGES: Final = _log.COUNTERS["requests"]
"""Requests that are not events; those are counted by `Ingest`, so an event costs no second
counter."""
_HUNG: Final = _log.COUNTERS["killed_hung"]
_UNKNOWN_RECEIPT: Final = "not a receipt of this log, or of a log that was replaced"
SINK_UP: Final = {
    MQTT: ("connected", "held", "dead_letters_full", "draining"),
    FILE: ("running", "draining"),
}
"""States of a sink that only one that is up has."""
FULL_INTERVAL_S: Final = 60.0
"""A full log is said again after this."""
FULL_FRESH_S: Final = 0.1
"""Retry-After of a full log is computed so seldom: a flood of refusals must stay cheap."""
SYNC_SLOW_S: Final = 1.0
"""An fdatasync that runs longer is said in /healthz."""
RECENT_S: Final = 600.0
"""So long /healthz says that a delivery process hung and was killed, or that a sink was passed."""
FILE_LATE_S: Final = 30.0
"""Beyond file.sync_interval_ms: an event that has waited so long for a file is a problem."""
_AWAY: Final = "not connected to the broker"
_NOT_CONNECTED: Final = {
    "refused": "the broker refuses the connection (mqtt.last_error)",
    "taken_over": "another client has taken over this client id (mqtt.last_error)",
}
"""By the publisher's state, where waiting will not mend it."""
_PART: Final = ("client_id", "state", "since_unix_s", "last_error", "last_error_unix_s")
"""What is said of each connection of a pool; the broker is the same for all."""
_SINK: Final = (
    *("state", "required", "lag_events", "lag_seconds", "skipped"),
    *("last_error", "last_error_unix_s"),
)
"""What is said of each sink."""
RECEIPTS: Final = "/v1/receipts/"
RECEIPT_SHOWN_MAX: Final = 128
_is_receipt: Final = re.compile(r"[0-9A-Za-z-]{1,128}").fullmatch
_IN_MEMORY: Final = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}
"""statfs(2), f_type."""
GRACE_S: Final = 1.5
"""After the last answer a door waits at most this long for slow readers before the process ends."""


class Lately:
    """Whether a count has grown within `RECENT_S`, as far as somebody asked."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._grown_s = -RECENT_S

    def __call__(self, count: int) -> bool:
        now_s = time.monotonic()
        if count != self._count:
            self._count, self._grown_s = count, now_s
        return now_s - self._grown_s < RECENT_S


class App:
    """What one worker answers."""

    def __init__(self, log: _log.Log, launch: Launch) -> None:
        self.log = log
        self.config: Final = launch.config
        self.block: Final = launch.index
        self.ingest = _log.Ingest(log, launch.index)
        limits = launch.config.http
        memory = in_memory(launch.lock_fd)
        if memory and limits.ack == "durable":
            raise ConfigError(
                f"http.ack: nothing is durable on {memory}, where log.directory ="
                f" {launch.config.log.directory} is; use enqueue or sink, or move the log to a disk"
            )
        self.terms: Final = http.Terms(
            limits.body_bytes_max,
            http.ACKS.index(limits.ack),
            memory is None,
            limits.batch_bytes_max,
        )
        self.waiting: Final = Waiting(
            log,
            launch.index,
            limits.durable_deadline_ms,
            limits.sink_deadline_ms,
            self.refused,
            self.refuse,
        )
        self.batches: Final = Batches(
            log, launch.index, self.ingest, self.waiting, limits, self.refuse, self.shed
        )
        self.draining = False
        """Set by the door when its process is told to end: /readyz says so even before the log's
        state does."""
        self._exposition = metrics.Exposition(log, launch.recovered)
        self._corrupt_bytes: Final = launch.recovered.corrupt_bytes
        self._seldom = Seldom(1.0)
        self._seldom_full = Seldom(FULL_INTERVAL_S)
        self._full: tuple[Answer, ...] = ()
        self._full_until_s = 0.0
        self._hung = Lately(log.counter_total(_HUNG))
        self._skipped = {name: Lately(log.cursor(sink).skipped) for sink, name in books.sinks(log)}
        self._limits: Final = {
            code: http.worded(code, f"{REFUSALS[code].message} = {limit}")
            for code, limit in (
                (
                    http.BODY_TOO_LARGE,
                    f"{limits.body_bytes_max} (a batch: http.batch_bytes_max ="
                    f" {limits.batch_bytes_max}; compressed: http.inflate_ratio_max ="
                    f" {limits.inflate_ratio_max})",
                ),
                (
                    http.BATCH_TOO_LARGE,
                    f"{limits.batch_bytes_max} and {limits.batch_events_max} (compressed:"
                    f" http.inflate_ratio_max = {limits.inflate_ratio_max})",
                ),
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
            **docs_ui.pages(),
            **openapi.pages(launch.config),
        }
        """GET pages by path; the argument is the header Accept."""

    # ---- events ----------------------------------------------------------------------------------

    def refused(self, code: int, ingest: _log.Ingest) -> Answer:
        """The answer to a verdict of `ingest.event` other than 0 and BUSY, which has counted it."""
        if code == http.FAILED:
            # Failed after the commit: it is unknown whether the event stays, and only a 500 says
            # that.
            return http.refusal(http.INTERNAL)
        if code == http.LOG_FULL:
            return self._say_full()
        return http.refusal(self._why(code), ingest.field, ingest.offset)

    def shed(self, code: int) -> tuple[int, Answer]:
        """Why the log takes nothing more, by the code at which `ingest.batch` stopped and which it
        has counted; and the answer to a single event."""
        if code == http.LOG_FULL:
            return code, self._say_full()
        code = http.INTERNAL if code == http.FAILED else self._why(code)  # as in `refused`
        return code, http.refusal(code)

    def refuse(self, code: int, started_ns: int) -> Answer:
        """Count and answer a refusal that the door decided."""
        code = self._why(code)
        self.ingest.refuse(code, started_ns)
        return self._limits.get(code) or http.refusal(code)

    def _why(self, code: int) -> int:
        """The log's tail is closed when it drains and when it has failed."""
        return http.FAILED if code == http.DRAINING and self.log.state == _log.FAILED else code

    def _say_full(self) -> Answer:
        now_s = time.monotonic()
        if now_s >= self._full_until_s:
            self._full_until_s = now_s + FULL_FRESH_S
            low_bytes = self.config.log.low_water * self.log.capacity_bytes
            rate = self.log.counter_total(_log.COUNTERS["drain_bytes_per_s"])
            self._full = http.full(http.full_wait_s(self.log.used - low_bytes, rate))
        held = self._seldom_full()
        if held is not None:
            _logger.error(
                "the log is full: new events are refused with 503%s; it empties as %s takes events"
                " (/healthz says what holds it up)",
                f" ({held + 1} since the last line)" if held else "",
                self._furthest_behind(),
            )
        return random.choice(self._full)

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
        if page is None and not path.startswith(RECEIPTS):
            return None
        self.log.counter_add(self.block, PAGES)
        if method not in ("GET", "HEAD"):
            return http.not_allowed("GET, HEAD")
        return page(accept) if page else self._receipt(path[len(RECEIPTS) :])

    def _receipt(self, receipt: str) -> Answer:
        """What became of an event. Any text may be asked for: it is bounded, and never logged."""
        state = self.log.receipt_state(receipt) if _is_receipt(receipt) else "unknown"
        said = {"receipt": receipt, "state": state}
        if state != "unknown":
            return Answer(200, [http.TYPE_JSON, _NO_STORE], _encode(said))
        shown = receipt[:RECEIPT_SHOWN_MAX].encode("ascii", "replace").decode()
        why = {"code": "not_found", "message": _UNKNOWN_RECEIPT, "field": None}
        body = _encode({"receipt": shown, "state": state, **why})
        return Answer(404, [http.TYPE_JSON, _NO_STORE], body)

    def _ready(self, accept: str | None) -> Answer:
        """A full log does not make a worker unready. Its clients must come back to it: the index
        that knows their repeats is that of this log, and 503 with Retry-After tells them more than
        a load balancer without backends."""
        state = _log.DRAINING if self.draining else self.log.state
        ready = state == _log.RUNNING
        shown = "full" if ready and self.log.full else metrics.STATES[state]
        body = _encode({"ready": ready, "state": shown})
        return Answer(200 if ready else 503, [http.TYPE_JSON, _NO_STORE], body)

    def _health(self, accept: str | None) -> Answer:
        log = self.log
        state = log.state
        used = log.used
        room = int(log.capacity_bytes * self.config.log.high_water) - used
        largest = self.config.http.body_bytes_max + RECORD_OVERHEAD_BYTES
        sync_s = metrics.sync_running_s(log)
        hung = log.counter_total(_HUNG)
        sinks = {name: self._sink(sink, name) for sink, name in books.sinks(log)}
        unexplained = books.unexplained(log)
        problems = [
            text
            for wrong, text in (
                (state != _log.RUNNING, f"the log is {metrics.STATES[state]}"),
                (log.full or room < largest, self._why_full(used, room < largest)),
                (sync_s > SYNC_SLOW_S, f"an fdatasync has been running for {sync_s:.1f} s"),
                *(self._link_problems(sinks[MQTT]) if MQTT in sinks else ()),
                *(self._file_problems(sinks[FILE]) if FILE in sinks else ()),
                *(
                    (
                        self._skipped[name](sink["skipped"]),
                        f"{name} was too far behind: {sink['skipped']} events were given up for it"
                        f" so far ({name}.required = false)",
                    )
                    for name, sink in sinks.items()
                ),
                (
                    self._hung(hung),
                    f"the delivery process hung and was killed ({hung} since the start)",
                ),
                (unexplained, f"{unexplained} events are unexplained"),
                (
                    self._corrupt_bytes,
                    f"{self._corrupt_bytes} bytes that were durable were found damaged at the start"
                    " and are lost: compare gateway.log.corrupt-*, beside the log",
                ),
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
                "sinks": {
                    name: {key: sink.get(key) for key in _SINK} for name, sink in sinks.items()
                },
                **({MQTT: self._shown_link(sinks[MQTT])} if MQTT in sinks else {}),
                "events": books.books(log, books.primary(log))._asdict() if sinks else None,
                "restarts": {
                    "worker": log.counter_total(_log.COUNTERS["restarts_worker"]),
                    "delivery": log.counter_total(_log.COUNTERS["restarts_delivery"]),
                    "delivery_hung": hung,
                },
                "worker": {
                    "index": self.block,
                    "pid": os.getpid(),
                    "waiting": self.waiting.count,
                },
            }
        )
        # Liveness: a broker that is away is no reason to restart the gateway, so "degraded" is 200.
        return Answer(503 if status == "failed" else 200, [http.TYPE_JSON, _NO_STORE], body)

    def _sink(self, sink: int, name: str) -> dict[str, Any]:
        """What the sink last wrote about itself (a file, since it is text), and its books."""
        try:
            path = status_path(self.config, name)
            status = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.DecodeError):
            status = {}
        status["up"] = self.log.counter_total(_log.COUNTERS[metrics.UP[name]])
        if not status["up"] and status.get("state") in SINK_UP[name]:
            status["state"] = "starting"  # who wrote that is gone
        now = books.books(self.log, sink)
        return {
            **status,
            "required": self.log.is_required(sink),
            "lag_events": now.waiting,
            "lag_seconds": round(books.oldest_waiting_s(self.log, sink), 3),
            "skipped": now.skipped,
        }

    def _link_problems(self, link: dict[str, Any]) -> Iterable[tuple[object, str]]:
        up, of = link["up"], self.config.mqtt.connections
        state = link.get("state")
        return (
            (not up, _NOT_CONNECTED.get(str(state), _AWAY)),
            (0 < up < of, f"{up} of {of} connections to the broker are up (mqtt.connections)"),
            (
                state == "held",
                f"publishing is held{_where(link, 'held')}: an event is refused for now, or the"
                " disk takes no dead letters (mqtt.last_error)",
            ),
            (
                state == "dead_letters_full",
                "the dead-letter files are full: publishing stops"
                f"{_where(link, 'dead_letters_full')}; see `gateway dead-letters ls`",
            ),
        )

    def _file_problems(self, file: dict[str, Any]) -> Iterable[tuple[object, str]]:
        late_s = FILE_LATE_S + self.config.file.sync_interval_ms / 1000
        return (
            (
                not file["up"],
                f"the file sink is {file.get('state', 'starting')} (sinks.file.last_error)",
            ),
            (
                file["up"] and file["lag_seconds"] > late_s,
                f"the oldest event has waited {file['lag_seconds']:.0f} s for the file sink: the"
                " disk of file.directory hangs or is too slow",
            ),
        )

    def _why_full(self, used: int, no_room: bool) -> str:
        percent = 100 * used // self.log.capacity_bytes
        behind = f"{self._furthest_behind()} is furthest behind"
        if no_room:
            return f"the log is full ({percent} %): it has no room for the largest event; {behind}"
        return (
            f"the log is full ({percent} %): new events are refused until log.low_water; {behind}"
        )

    def _furthest_behind(self) -> str:
        """The required sink that the head waits for."""
        log = self.log
        lags = [
            (log.cursor(sink).lsn, name) for sink, name in books.sinks(log) if log.is_required(sink)
        ]
        return min(lags)[1] if lags else "no sink"

    def _shown_link(self, status: dict[str, Any]) -> dict[str, object]:
        keys = ["broker", "state", "last_error", "last_error_unix_s"]
        link: dict[str, object] = {key: status.get(key) for key in keys}
        parts = status.get("connections")
        if isinstance(parts, list) and parts:
            link["connections"] = [{key: part.get(key) for key in _PART} for part in parts]
        total = self.log.counter_total
        return {
            **link,
            "connected": status["up"] >= self.config.mqtt.connections,
            "in_flight": total(_log.COUNTERS["mqtt_in_flight"]),
            "connect_failures": total(_log.COUNTERS["mqtt_connect_failures"]),
        }

    def _metrics(self, accept: str | None) -> Answer:
        content_type, body = self._exposition.render(accept)
        return Answer(200, [("content-type", content_type), _NO_STORE], body)

    def close(self) -> None:
        """Give the intent slot back."""
        self.ingest.close()


def _where(link: Mapping[str, object], state: str) -> str:
    """Of a pool, how many of its connections are in `state`: the others go on."""
    parts = link.get("connections")
    if not isinstance(parts, list) or not parts:
        return ""
    return f" on {sum(p['state'] == state for p in parts)} of {len(parts)} connections"


def in_memory(fd: int) -> str | None:
    """The name of the file system when the file lies on one that keeps nothing on a disk."""
    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None).fstatfs(fd, buffer) != 0:
        return None
    size = ctypes.sizeof(ctypes.c_long)
    return _IN_MEMORY.get(int.from_bytes(buffer.raw[:size], sys.byteorder) & 0xFFFFFFFF)


def pin(index: int) -> int:
    """Keep this process on one core of those that it may use, the next one for the next worker.
    Returns which. Before other threads start: they inherit it."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[index % len(cores)]
    os.sched_setaffinity(0, {core})
    return core


def build(launch: Launch) -> App:
    """The app of the process that `launch` describes."""
    if launch.config.http.pin_workers:
        pin(launch.index)
    return App(_log.Log.attach(launch.lock_fd, launch.shared_fd), launch)


class Door(Protocol):
    """What a front door makes of an app and its listening socket."""

    def serve(self) -> None:
        """Answer requests until SIGTERM."""


def run(check: Callable[[], None], door: Callable[[App, int], Door]) -> NoReturn:
    """The life of a worker process. `check` raises GatewayError when the door's server is not the
    one that it was written for."""
    launch = process.begin(sys.argv)
    try:
        check()
        app = build(launch)
    except GatewayError as error:
        _logger.critical("%s", error)
        sys.exit(Exit.USAGE)
    except _log.NotALog as error:  # cut short or replaced under a running gateway
        process.tell_failed(error)
        sys.exit(Exit.LOG_FAILED)
    except _log.LogError as error:  # no memory or descriptor for it: perhaps for a moment
        _logger.critical("cannot attach to the log: %s", error)
        sys.exit(Exit.ERROR)
    door(app, launch.listen_fd).serve()
    app.close()
    process.end(Exit.OK)
