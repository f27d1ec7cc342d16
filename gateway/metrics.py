"""/metrics: one collector over the counters and positions in shared memory.

Every worker can answer for all processes, since nothing is kept in a process. Two kinds of numbers,
and each HELP says which one it is:

    from the log    accepted, published, dead-lettered, unexplained: ordinals and cursors, persisted
                    by the committer; they survive restarts and balance exactly
    counted         everything else: one word a process in shared memory; zero again when the
                    gateway is started again; a SIGKILL may lose the last increments of a process

The number of series is fixed: labels are reasons, processes, states and bucket bounds, never input.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gateway import __version__, _log, books
from gateway.process import Recovered
from gateway.settings import FILE, MQTT

FRESH_S: Final = 0.1
"""A page this old is still shown."""
PAGES_MAX: Final = 4
"""Pages, one an Accept, that are kept so long."""
ACKS: Final = {
    "durable": "acks_durable",
    "sink": "acks_sink",
    "pending": "acks_late",
    "dead_lettered": "acks_dead",
}
"""How a wait for more than `enqueue` can end, and its counter."""
UP: Final = {MQTT: "mqtt_connected", FILE: "file_up"}
"""The gauge of each sink that is not 0 while it can take events."""
STATES: Final = {_log.RUNNING: "running", _log.DRAINING: "draining", _log.FAILED: "failed"}
_COUNTED: Final = "Counted since the gateway was started."
_BOUNDS: Final = [*(repr(bound / 1e9) for bound in _log.HISTOGRAM_BOUNDS_NS), "+Inf"]


def sync_running_s(log: _log.Log) -> float:
    """How long the fdatasync that runs now has been running; 0 when none runs."""
    since_ns = log.counter(_log.BLOCK_DELIVERY, _log.COUNTERS["sync_since_ns"])
    return max(0, _log.now_ns() - since_ns) / 1e9 if since_ns else 0.0


class LogCollector(Collector):
    """Reads the log's shared memory at each scrape."""

    def __init__(self, log: _log.Log, recovered: Recovered) -> None:
        self._log = log
        self._recovered = recovered

    def _total(self, name: str, offset: int = 0) -> int:
        return self._log.counter_total(_log.COUNTERS[name] + offset)

    def collect(self) -> Iterator[Metric]:
        yield from self._events()
        yield from self._requests()
        yield from self._log_file()
        yield from self._sinks()
        yield from self._mqtt()
        if FILE in self._log.sinks:
            yield from self._file()
        yield from self._processes()

    def _events(self) -> Iterable[Metric]:
        sink = books.primary(self._log)
        now = books.books(self._log, sink)
        yield _counter(
            "gateway_events_received",
            f"Events whose body arrived whole, accepted or not. {_COUNTED}",
            self._total("received"),
        )
        yield _counter(
            "gateway_events_accepted",
            "Events committed in the log since it was made. From the log: survives restarts and"
            " crashes. While the delivery process is away it stands still, and catches up.",
            now.accepted,
        )
        yield _counter(
            "gateway_events_duplicates",
            "Repeats of an event that is in the log already: answered as accepted, and not"
            f" accepted again. {_COUNTED}",
            self._total("duplicates"),
        )
        refused = CounterMetricFamily(
            "gateway_events_refused",
            "Requests refused, by the code of the answer. Those whose body arrived are also in"
            " received = accepted (since the start) + duplicates + refused."
            f" {_COUNTED}",
            labels=["code"],
        )
        for number, code in enumerate(_log.CODES):
            if number:
                refused.add_metric([code], self._total("refused", number))
        yield refused
        yield _counter(
            "gateway_events_published",
            "Events that the broker acknowledged, since the log was made; without a broker, those"
            " that are in a file. From the log: moves with the cursor.",
            now.published,
        )
        yield _counter(
            "gateway_events_dead_lettered",
            "Events that the broker refused for good and that were set aside, since the log was"
            " made. From the log.",
            now.dead_lettered,
        )
        yield _counter(
            "gateway_dead_letters_dropped",
            "Dead letters that went with the oldest file, to make room (dead_letters.when_full ="
            f" drop_oldest). {_COUNTED}",
            self._total("dead_letters_dropped"),
        )
        yield GaugeMetricFamily(
            "gateway_events_waiting",
            "Events committed in the log and not yet published (gateway_sink_lag_events has every"
            " sink).",
            now.waiting,
        )
        yield GaugeMetricFamily(
            "gateway_unexplained_events",
            "Accepted - published - dead-lettered - skipped - waiting, its size added up over the"
            " sinks. Must be 0: anything else is a bug or damage.",
            books.unexplained(self._log),
        )

        yield GaugeMetricFamily(
            "gateway_oldest_unpublished_seconds",
            "Time since the receipt of the event that is to be published next; 0 when there is"
            " none.",
            books.oldest_waiting_s(self._log, sink),
        )
        yield from self._window()
        yield GaugeMetricFamily(
            "gateway_dead_letter_bytes",
            "Bytes of the dead-letter files.",
            self._total("dead_letter_bytes"),
        )

    def _window(self) -> Iterable[Metric]:
        oldest = self._log.oldest
        yield GaugeMetricFamily(
            "gateway_dedupe_window_seconds",
            "Age of the oldest event in the log's ring: how far back a repeat is recognised. Keep"
            " it above the longest time after which a device sends again; 0 when the log is"
            " empty.",
            max(0.0, time.time() - oldest[1] / 1e9) if oldest else 0.0,
        )
        yield GaugeMetricFamily(
            "gateway_dedupe_window_bytes",
            "Bytes of the ring in which a repeat is recognised; at most its capacity.",
            max(0, self._log.tail - oldest[0]) if oldest else 0,
        )

    def _requests(self) -> Iterable[Metric]:
        handled = sum(self._total("request_ns", offset) for offset in range(len(_BOUNDS)))
        yield _counter(
            "gateway_requests",
            f"HTTP requests of every kind: events, refusals and pages. {_COUNTED}",
            handled + self._total("requests"),
        )
        yield _counter(
            "gateway_accepted_bytes",
            f"Bytes of the bodies of accepted events. {_COUNTED}",
            self._total("accepted_bytes"),
        )
        yield _counter(
            "gateway_batches",
            f"Batches that could be taken apart, whatever became of their events. {_COUNTED}",
            self._total("batches"),
        )
        yield _counter(
            "gateway_batch_events",
            "Events in those batches, as they were sent: also refused ones, repeats, and what stood"
            f" behind the place where a batch stopped. {_COUNTED}",
            self._total("batch_events"),
        )
        yield _counter(
            "gateway_inflated_bytes",
            f"Bytes that compressed bodies became. {_COUNTED}",
            self._total("inflated_bytes"),
        )
        yield self._histogram(
            "gateway_request_seconds",
            f"From the start of a request's handling to its verdict, accepted and refused."
            f" {_COUNTED}",
            "request_ns",
        )
        yield self._histogram(
            "gateway_receipt_to_puback_seconds",
            "From the receipt of an event to the broker's acknowledgement; of a packed one, from"
            f" that of its first event. {_COUNTED}",
            "puback_ns",
        )
        acks = CounterMetricFamily(
            "gateway_acks",
            "Requests that asked for durable or sink, by how the wait ended: pending is 504, the"
            f" event stays in the log. {_COUNTED}",
            labels=["ack"],
        )
        for ack, counter in ACKS.items():
            acks.add_metric([ack], self._total(counter))
        yield acks
        yield self._histogram(
            "gateway_ack_seconds",
            "From the start of a request's handling to its answer, of those that asked for durable"
            f" or sink and were answered in time. {_COUNTED}",
            "ack_ns",
        )

    def _log_file(self) -> Iterable[Metric]:
        log = self._log
        reclaim, committed, tail = log.reclaim, log.committed, log.tail
        cursor = log.cursor(books.primary(log))
        yield GaugeMetricFamily(
            "gateway_log_bytes_used",
            "Bytes of the log that cannot be written over yet.",
            max(0, tail - reclaim),
        )
        yield GaugeMetricFamily(
            "gateway_log_capacity_bytes", "Size of the log's ring.", log.capacity_bytes
        )
        yield GaugeMetricFamily(
            "gateway_log_unpublished_bytes",
            "Bytes of committed records not yet published.",
            max(0, committed - cursor.lsn),
        )
        yield GaugeMetricFamily(
            "gateway_log_not_durable_bytes",
            "Bytes of committed records that no fdatasync covers yet.",
            max(0, committed - log.durable),
        )
        yield GaugeMetricFamily(
            "gateway_log_uncommitted_bytes",
            "Bytes that producers claimed and the delivery process has not walked over yet.",
            max(0, tail - committed),
        )
        state = GaugeMetricFamily(
            "gateway_log_state", "1 for the state the log is in.", labels=["state"]
        )
        for value, name in STATES.items():
            state.add_metric([name], int(log.state == value))
        yield state
        yield _counter(
            "gateway_log_syncs",
            f"fdatasync calls of the committer. {_COUNTED}",
            self._total("syncs"),
        )
        yield _counter(
            "gateway_log_sync_seconds",
            f"Time spent in them. {_COUNTED}",
            self._total("sync_ns") / 1e9,
        )
        yield GaugeMetricFamily(
            "gateway_log_sync_running_seconds",
            "How long the fdatasync that runs now has been running; 0 when none runs.",
            sync_running_s(log),
        )
        yield GaugeMetricFamily(
            "gateway_log_drain_bytes_per_second",
            "How fast the log empties, smoothed; the Retry-After of a full log comes from it.",
            self._total("drain_bytes_per_s"),
        )
        yield _counter(
            "gateway_log_pads",
            f"Holes that dead producers left in the log and that were filled. {_COUNTED}",
            self._total("pads"),
        )
        yield _counter(
            "gateway_log_killed_stuck",
            f"Stopped producers that were killed because they held up the log. {_COUNTED}",
            self._total("killed_stuck"),
        )
        yield GaugeMetricFamily(
            "gateway_log_recovered_torn_bytes",
            "Found torn when this gateway was started: writes that nobody was promised as durable.",
            self._recovered.torn_bytes,
        )
        yield GaugeMetricFamily(
            "gateway_log_recovered_corrupt_bytes",
            "Found damaged below the durable watermark when this gateway was started. Not 0: see"
            " the start-up log.",
            self._recovered.corrupt_bytes,
        )

    def _sinks(self) -> Iterable[Metric]:
        log = self._log
        sinks = [(name, i, books.books(log, i)) for i, name in books.sinks(log)]
        rows = (
            (
                CounterMetricFamily,
                "events_confirmed",
                "Events that it has: acknowledged by the broker, synced in a file. From the log.",
                [now.published for _, _, now in sinks],
            ),
            (
                CounterMetricFamily,
                "events_skipped",
                "Events that were written over before it had them, since it is not required. From"
                " the log.",
                [now.skipped for _, _, now in sinks],
            ),
            (
                GaugeMetricFamily,
                "lag_events",
                "Events committed in the log that it has still to take.",
                [now.waiting for _, _, now in sinks],
            ),
            (
                GaugeMetricFamily,
                "lag_bytes",
                "Bytes of the log between its cursor and the end of what is committed.",
                [max(0, log.committed - log.cursor(i).lsn) for _, i, _ in sinks],
            ),
            (
                GaugeMetricFamily,
                "lag_seconds",
                "Time since the receipt of the event that it takes next; 0 when there is none.",
                [books.oldest_waiting_s(log, i) for _, i, _ in sinks],
            ),
            (
                GaugeMetricFamily,
                "unexplained_events",
                "The gap in its books. Must be 0: anything else is a bug or damage.",
                [now.unexplained for _, _, now in sinks],
            ),
            (
                GaugeMetricFamily,
                "up",
                "1 while it can take events: a connection to the broker is open, files can be"
                " written.",
                [int(self._total(UP[name]) > 0) for name, _, _ in sinks],
            ),
            (
                GaugeMetricFamily,
                "required",
                "1 when the log waits for it; 0 when it may be passed.",
                [int(log.is_required(i)) for _, i, _ in sinks],
            ),
        )
        for family, name, text, values in rows:
            metric = family(f"gateway_sink_{name}", text, labels=["sink"])
            for (sink, _, _), value in zip(sinks, values, strict=True):
                metric.add_metric([sink], value)
            yield metric

    def _file(self) -> Iterable[Metric]:
        for name, counter, text in (
            ("bytes", "file_bytes", "Bytes of lines written, before compression."),
            ("syncs", "file_syncs", "fsync calls of the file sink."),
            ("finished", "file_files", "Files finished: whole, synced, under their last name."),
            ("removed", "file_removed", "Files removed because of file.files_max."),
            (
                "write_failures",
                "file_write_failures",
                "Writes and syncs that failed and were tried again.",
            ),
        ):
            yield _counter(f"gateway_file_{name}", f"{text} {_COUNTED}", self._total(counter))
        yield _counter(
            "gateway_file_sync_seconds",
            f"Time spent in its fsync calls. {_COUNTED}",
            self._total("file_sync_ns") / 1e9,
        )

    def _mqtt(self) -> Iterable[Metric]:
        for name, counter, text in (
            (
                "gateway_mqtt_publish_sent",
                "publish_sent",
                "PUBLISH packets written, repeats included.",
            ),
            (
                "gateway_mqtt_publish_repeated",
                "publish_repeated",
                "PUBLISH packets of events that were sent before.",
            ),
            ("gateway_mqtt_connects", "mqtt_connects", "Connections that the broker accepted."),
            (
                "gateway_mqtt_connect_failures",
                "mqtt_connect_failures",
                "Attempts to connect that failed.",
            ),
            ("gateway_mqtt_disconnects", "mqtt_disconnects", "Connections that ended."),
            ("gateway_mqtt_negative_acks", "mqtt_negative_acks", "PUBACKs that refused an event."),
        ):
            yield _counter(name, f"{text} {_COUNTED}", self._total(counter))
        yield _counter(
            "gateway_mqtt_throttled_seconds",
            "Time that something to publish waited for mqtt.publishes_per_second_max or"
            f" mqtt.bytes_per_second_max, added up over the connections. {_COUNTED}",
            self._total("mqtt_throttled_ns") / 1e9,
        )
        yield GaugeMetricFamily(
            "gateway_mqtt_connected",
            "Connections to the broker that are open, of mqtt.connections.",
            self._total("mqtt_connected"),
        )
        yield GaugeMetricFamily(
            "gateway_mqtt_in_flight",
            "Messages sent and not yet acknowledged.",
            self._total("mqtt_in_flight"),
        )

    def _processes(self) -> Iterable[Metric]:
        restarts = CounterMetricFamily(
            "gateway_process_restarts",
            f"Dead processes that were started again. {_COUNTED}",
            labels=["process"],
        )
        for process in ("worker", "delivery"):
            restarts.add_metric([process], self._total(f"restarts_{process}"))
        yield restarts
        yield _counter(
            "gateway_delivery_killed_hung",
            f"Delivery processes that made no progress and were killed. {_COUNTED}",
            self._total("killed_hung"),
        )
        info = GaugeMetricFamily(
            "gateway_build_info", "1; the label says which version runs.", labels=["version"]
        )
        info.add_metric([__version__], 1)
        yield info

    def _histogram(self, name: str, text: str, counter: str) -> Metric:
        below = 0
        buckets = []
        for offset, bound in enumerate(_BOUNDS):
            below += self._total(counter, offset)
            buckets.append((bound, below))
        total_s = self._total(counter, len(_BOUNDS)) / 1e9
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total_s)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value)


class Exposition:
    """Renders the collector as Prometheus text, or as OpenMetrics where Accept asks for it.

    A page costs as much as a hundred events, and a client that goes away leaves its request in the
    queue of the thread that answers them: so a page is made at most once in `FRESH_S`."""

    def __init__(self, log: _log.Log, recovered: Recovered) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(LogCollector(log, recovered))
        self._pages: dict[str, tuple[str, bytes]] = {}
        self._until_s = 0.0

    def render(self, accept: str | None) -> tuple[str, bytes]:
        """Content type and text."""
        accept = accept or ""
        now_s = time.monotonic()
        if now_s >= self._until_s:
            self._pages.clear()
            self._until_s = now_s + FRESH_S
        elif len(self._pages) >= PAGES_MAX and accept not in self._pages:
            accept = ""  # nobody needs so many kinds of page at once: plain text
        page = self._pages.get(accept)
        if page is None:
            page = self._pages[accept] = self._render(accept)
        return page

    def _render(self, accept: str) -> tuple[str, bytes]:
        try:
            encode, content_type = exposition.choose_encoder(accept)
        except Exception:  # whatever a client may write into Accept
            logging.getLogger(__name__).debug("Accept could not be read", exc_info=True)
            encode, content_type = exposition.generate_latest, exposition.CONTENT_TYPE_LATEST
        return content_type, encode(self._registry)
