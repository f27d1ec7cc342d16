"""The Granian door: the one file that knows Granian (Rust: sockets, HTTP/1.1 by hyper; no TLS
here).

Granian's own way costs two event-loop wake-ups and two hand-overs of the GIL a request (start of
the coroutine, arrival of the body). This door needs no event loop, since nothing in a request waits
but its body:

    tokio thread          Granian's Python thread (one)            main thread
    head parsed    ────▶  schedule: path, headers; ask for body    sleeps; while bodies are
    body collected ────▶  arrived: Ingest.event, response          pending it wakes now and then
    response sent                                                  and cuts those past the deadline

An event that asks for more than `enqueue` is answered later, by this thread when another one comes
or by that of `gateway.waiting`: `response_bytes` may be called from any thread.

It registers its own scheduler and, in place of an event loop, an object whose `call_soon*` call at
once. So `schedule` and `arrived` are plain functions in the thread that holds the GIL anyhow. A
slow body occupies no thread. Measured in docs/front-doors.md: 1.4 times the rate of an RSGI
coroutine that only reads the body.

A body that need not be one plain JSON event goes to `gateway.batches`, which answers it or gives
back the one event that was in it.

What Granian does not bound is bounded here: Content-Length is checked before the body is read, a
body has a deadline, a refused body is drained up to a limit, the end of the process has a grace.
One thread calls `Ingest.event`; the others only count refusals, and all do it under the GIL.

The classes of `granian._granian` are private: the version is pinned, and `_check_granian` says what
to do when it does not fit."""

import importlib
import logging
import os
import select
import signal
import sys
import time
from typing import Any, Final

import granian
from granian.http import HTTP1Settings

from gateway import http, opening, process, worker
from gateway._log import BUSY, RUNNING, now_ns
from gateway.batches import is_array
from gateway.errors import GatewayError
from gateway.http import BULK, ENQUEUE, INGEST, INGEST_MANY, Answer, Form, device_id_at
from gateway.worker import App

_granian: Final[Any] = importlib.import_module("granian._granian")
"""Private, and its stub is not what the compiled module takes."""
GRANIAN: Final = "2.8"
CONNECTIONS_MAX: Final = 10_240
"""A worker; with `http.body_bytes_max` this bounds its memory. Beyond it, new connections wait in
the backlog."""
DESCRIPTORS_RESERVED: Final = 256
HEADER_TIMEOUT_MS: Final = 60_000
"""Time for a whole head, and for a kept-alive connection to begin the next one (hyper has one timer
for both)."""
HEAD_BYTES_MAX: Final = 65_536
"""hyper's read buffer: a head above twice this size is 431 for sure, one below this size is not."""
DRAIN_BYTES_MAX: Final = 1 << 20
DRAIN_NS: Final = 1_000_000_000
"""After an early refusal so much of the body is read and dropped, so that the client sees the
answer, not a reset."""
SWITCH_S: Final = 0.0005
"""The thread of `gateway.waiting` gets the GIL from a busy Python thread after this; the 5 ms of
CPython are ten times what an fdatasync often takes."""
_TICK_MIN_S: Final = 0.005
_TICK_MAX_S: Final = 0.5

_PREFIX: Final = len(INGEST)
_X_ACK_ENQUEUE: Final = http.X_ACK[ENQUEUE]
_BODY_ENQUEUE: Final = http.BODY[ENQUEUE]
_OBJECT: Final = b"{"
"""A body that sorts below it does not begin with a brace, and may be an array."""


_Known = Answer | Form
"""Before the body is here: that it is refused, or that it need not be a plain JSON event."""


class _Now:
    """In place of an event loop: what Granian schedules runs at once, in the thread that schedules
    it."""

    def call_soon(self, callback: Any, *arguments: Any, context: Any = None) -> None:
        callback(*arguments)

    call_soon_threadsafe = call_soon


class _Scheduler(_granian.CallbackScheduler):  # type: ignore[misc]
    """Granian calls `_schedule_fn(watcher)` for each request."""

    def __init__(self, *_: object) -> None:
        super().__init__()


class _Closing:
    """A request's protocol in a worker that retires: its answer closes the connection."""

    def __init__(self, proto: Any) -> None:
        self._proto = proto

    def __call__(self) -> Any:
        return self._proto()

    def __aiter__(self) -> Any:
        return self._proto.__aiter__()

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self._proto.response_bytes(*http.closing(Answer(status, headers, body)))


class _Drain:
    """Reads and drops the rest of a body whose refusal is already on its way."""

    def __init__(self, proto: Any, drains: "set[_Drain]") -> None:
        self._body = proto.__aiter__()
        self._left = DRAIN_BYTES_MAX
        self._drains = drains
        self._future: Any = None
        self.started_ns = now_ns()
        drains.add(self)
        self._read()

    def _read(self) -> None:
        self._future = self._body.__anext__()
        self._future.add_done_callback(self)

    def __call__(self, future: Any) -> None:
        try:
            size = len(future.result())
            self._left -= size
            if size and self._left > 0 and self in self._drains:
                self._read()
                return
        except Exception:
            pass  # the client went away
        self.end()

    def end(self) -> None:
        """Let go of the body; hyper then closes the connection."""
        self._drains.discard(self)
        future, self._future, self._body = self._future, None, None
        if future is not None:
            future.cancel()


class Door:
    """Serves one App on one listening socket, until SIGTERM."""

    def __init__(self, app: App, listen_fd: int) -> None:
        self._app = app
        self._ingest = app.ingest
        self._event = app.ingest.event
        self._waiting = app.waiting
        self._batches = app.batches
        self._listen_fd = listen_fd
        self._terms = app.terms
        self._deadline_ns = app.config.http.body_deadline_ms * 1_000_000
        self._tick_s = min(max(self._deadline_ns / 8e9, _TICK_MIN_S), _TICK_MAX_S)
        self._pending: dict[Any, tuple[Any, str, int, int, _Known | None]] = {}
        """Bodies that are arriving, oldest first: protocol, device id ("": each event names its
        own), start, acknowledgement asked for, and what is known of them."""
        self._drains: set[_Drain] = set()
        self._sweeping = False
        self._told_to_end = False
        self._retiring = False
        self._ended = False
        self._wake_fd, self._waker_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # ---- Granian's Python thread -----------------------------------------------------------------

    def schedule(self, watcher: Any) -> None:
        """A request's head is here. Must not raise: Granian would not clear the exception."""
        started_ns = now_ns()
        proto = _Closing(watcher.proto) if self._retiring else watcher.proto
        try:
            scope = watcher.scope
            path = scope.path
            if path.startswith(INGEST) and scope.method == "POST" and device_id_at(path, _PREFIX):
                headers = scope.headers
                if len(headers.get_all("host")) == 1:
                    code, ack = http.examine(headers, scope.query_string, self._terms)
                    if not code:
                        self._read(proto, path[_PREFIX:], started_ns, ack, None)
                        return
                    if code == BULK:
                        self._bulk(scope, proto, path, started_ns)
                        return
            self._unusual(scope, proto, path, started_ns)
        except BaseException:
            self._respond(proto, self._app.internal(started_ns))

    def arrived(self, future: Any) -> None:
        """A body is here, or never will be."""
        entry = self._pending.pop(future, None)
        if entry is None:
            return  # past its deadline, and answered
        proto, device_id, started_ns, ack, answer = entry
        if self._retiring:
            proto = _Closing(proto)
        try:
            try:
                body = future.result()
            except Exception as error:
                # Granian's future keeps the error, its traceback this frame, and the frame the
                # future: a cycle through Rust, which no collector sees.
                error.__traceback__ = None
                self._batches.held.pop(entry[0], None)
                self._app.refuse(http.BODY_TIMEOUT, started_ns)
                self._respond(proto, http.INCOMPLETE)
                return
            if answer is not None:
                if isinstance(answer, Form):
                    self._batches.held.pop(entry[0], None)
                    self._take(proto, device_id, body, answer, started_ns)
                else:
                    proto.response_bytes(*answer)
                return
            if body < _OBJECT and is_array(body):
                self._batches.batch(proto.response_bytes, device_id, body, Form(ack), started_ns)
                return
            code = self._event(device_id, body, started_ns)
            ingest = self._ingest
            if code == 0:
                headers = http.receipt_headers(
                    ingest.receipt, ingest.duplicate, ingest.used_percent
                )
                if ack == ENQUEUE:
                    headers.append(_X_ACK_ENQUEUE)
                    proto.response_bytes(202, headers, _BODY_ENQUEUE)
                else:
                    self._waiting.accepted(proto.response_bytes, ingest, ack, started_ns, headers)
            elif code == BUSY:
                event = device_id, body
                self._waiting.busy(proto.response_bytes, ingest.lsn, ack, started_ns, event)
            else:
                proto.response_bytes(*self._app.refused(code, ingest))
        except BaseException:
            self._respond(proto, self._app.internal(started_ns))

    def _read(
        self, proto: Any, device_id: str, started_ns: int, ack: int, answer: _Known | None
    ) -> None:
        future = proto()
        self._pending[future] = (proto, device_id, started_ns, ack, answer)
        future.add_done_callback(self.arrived)
        if not self._sweeping:
            self._sweeping = True
            self._wake()

    def _bulk(self, scope: Any, proto: Any, path: str, started_ns: int) -> None:
        """Anything to ingest that need not be a plain JSON event."""
        headers, many = scope.headers, path == INGEST_MANY
        code, form = http.examine_form(headers, scope.query_string, self._terms, many)
        large = form.length > self._terms.body_bytes_max
        if not code and large and not self._batches.has_room(form.length):
            code = http.OVERLOADED
        if code:
            self._refuse(headers, proto, code, started_ns)
            return
        if large:
            self._batches.held[proto] = form.length
        self._read(proto, path[_PREFIX:], started_ns, form.ack, form)

    def _take(self, proto: Any, device_id: str, body: bytes, form: Form, started_ns: int) -> None:
        reply = proto.response_bytes
        event = self._batches.take(reply, device_id or None, body, form, started_ns)
        if event is not None:
            self._pending[event] = proto, device_id, started_ns, form.ack, None
            self.arrived(event)

    def _unusual(self, scope: Any, proto: Any, path: str, started_ns: int) -> None:
        """Everything but an event whose head is in order."""
        headers = scope.headers
        method = scope.method
        if not _one_host(scope, headers):
            code = http.BAD_REQUEST
        else:
            page = self._app.page(path, method, headers.get("accept"))
            if page is not None:
                self._respond(proto, page)
                return
            code = http.route(path, method)
            if code == 0:  # a batch of many devices; HTTP/1.0 without Host
                self._bulk(scope, proto, path, started_ns)
                return
        self._refuse(headers, proto, code, started_ns)

    def _refuse(self, headers: http.Headers, proto: Any, code: int, started_ns: int) -> None:
        """The head is enough to refuse it."""
        answer = self._app.refuse(code, started_ns)
        if code == http.METHOD_NOT_ALLOWED:
            answer = http.not_allowed("POST")
        chunked = "transfer-encoding" in headers
        length = headers.get("content-length", "0")
        keeps = not chunked and not http.must_close(code)
        if not chunked and length == "0":
            self._respond(proto, answer)
        elif keeps and int(length) <= self._terms.body_bytes_max:
            self._read(proto, "", started_ns, 0, answer)  # keep the connection in step
        else:
            self._respond(proto, http.closing(answer))
            if "expect" not in headers:
                _Drain(proto, self._drains)
                if not self._sweeping:
                    self._sweeping = True
                    self._wake()

    def _respond(self, proto: Any, answer: Answer) -> None:
        proto.response_bytes(*answer)

    # ---- main thread -----------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer requests until SIGTERM; then refuse what is pending, end connections, return.

        SIGUSR1 retires the worker: each answer closes its connection, and what SIGTERM finds
        pending or waiting is answered, not refused: a successor takes new requests, and the log
        goes on."""
        sys.setswitchinterval(SWITCH_S)
        self._waiting.start()  # before signals are let in: they are for this thread
        signal.signal(signal.SIGTERM, self._tell_to_end)
        signal.signal(signal.SIGUSR1, self._retire)
        signal.set_wakeup_fd(self._waker_fd, warn_on_full_buffer=False)
        process.can_end()
        end = _granian.WorkerSignal()
        end.add_cb(self._has_ended)
        self._start(end)
        process.tell(process.READY)
        while not self._told_to_end:
            self._wait(self._tick_s if self._sweeping else None)
            self._sweep()
        self._app.draining = not self._is_replaced()
        end.set()
        grace_s = worker.GRACE_S
        until = time.monotonic() + grace_s
        while not self._ended and (left := until - time.monotonic()) > 0:
            if not self._is_replaced():
                self._waiting.end()  # nothing is confirmed any more
                self._refuse_pending()  # the log takes nothing more: to wait is in vain
            elif self._unanswered():
                until = time.monotonic() + grace_s  # each of them has a deadline of its own
                self._sweep()
            self._wait(min(left, 0.05))

    def _is_replaced(self) -> bool:
        """A successor serves, and the gateway goes on."""
        return self._retiring and self._app.log.state == RUNNING

    def _unanswered(self) -> bool:
        """Requests whose answer is still to come."""
        return bool(self._pending) or self._waiting.count > 0

    def _start(self, end: Any) -> None:
        limit = process.raise_descriptor_limit()
        connections_max = max(1, min(CONNECTIONS_MAX, limit - DESCRIPTORS_RESERVED))
        loop = _Now()
        scheduler = _Scheduler(loop, None, None, None, None)
        scheduler._schedule_fn = self.schedule
        settings = HTTP1Settings(
            header_read_timeout=HEADER_TIMEOUT_MS, keep_alive=True, max_buffer_size=HEAD_BYTES_MAX
        )
        server = _granian.RSGIWorker(
            self._app.block + 1,
            (None, _granian.SocketHolder(self._listen_fd, False, opening.BACKLOG)),
            None,  # ipc
            1,  # tokio threads
            1,  # tokio blocking threads
            1,  # Python threads: `Ingest` wants one
            30,  # their idle timeout
            connections_max,
            "1",  # HTTP/1.1 only
            settings,
            None,  # HTTP/2
            False,  # websockets
            None,  # static files
            *(False, None, None, None, "tls1.3", None, [], False),  # TLS
            (None, None),  # metrics
        )
        server.serve_str(scheduler, loop, end)

    def _sweep(self) -> None:
        """Cut bodies past their deadline; stop ticking when there is nothing to watch."""
        self._sweeping = False
        now = now_ns()
        limit = now - self._deadline_ns
        while (oldest := self._oldest()) is not None:
            future, started_ns = oldest
            if started_ns > limit:
                break
            self._cut(future, http.BODY_TIMEOUT)
        for drain in list(self._drains):
            if drain.started_ns < now - DRAIN_NS:
                drain.end()
        if self._pending or self._drains:
            self._sweeping = True

    def _refuse_pending(self) -> None:
        while (oldest := self._oldest()) is not None:
            self._cut(oldest[0], http.DRAINING)

    def _oldest(self) -> tuple[Any, int] | None:
        for _ in range(100):  # the other thread may change the dict between two steps of this one
            try:
                future, entry = next(iter(self._pending.items()))
                return future, entry[2]
            except StopIteration:
                return None
            except RuntimeError:
                continue
        return None

    def _cut(self, future: Any, code: int) -> None:
        entry = self._pending.pop(future, None)
        if entry is not None:
            proto, _, started_ns, _, _ = entry
            self._batches.held.pop(proto, None)
            self._respond(proto, self._app.refuse(code, started_ns))
            future.cancel()

    def _wait(self, timeout_s: float | None) -> None:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        if poll.poll(None if timeout_s is None else timeout_s * 1000):
            try:
                os.read(self._wake_fd, 4096)
            except BlockingIOError:
                pass

    def _wake(self) -> None:
        try:
            os.write(self._waker_fd, b"w")
        except BlockingIOError:
            pass  # full: it is awake

    def _tell_to_end(self, *_: object) -> None:
        self._told_to_end = True

    def _retire(self, *_: object) -> None:
        self._retiring = True

    def _has_ended(self) -> None:
        self._ended = True
        self._wake()


def _one_host(scope: Any, headers: http.Headers) -> bool:
    """Exactly one Host; HTTP/1.0 may have none."""
    hosts = headers.get_all("host")
    if "host" not in headers:
        return bool(scope.http_version == "1")
    return len(hosts) == 1


def _check_granian() -> None:
    needed = ("CallbackScheduler", "RSGIWorker", "SocketHolder", "WorkerSignal")
    missing = [name for name in needed if not hasattr(_granian, name)]
    if missing or not hasattr(_granian.RSGIWorker, "serve_str"):
        raise GatewayError(
            f"granian {granian.__version__} does not have what this door uses"
            f" ({', '.join(missing) or 'serve_str'});"
            f" install granian {GRANIAN}.*"
        )


def main() -> None:
    """One worker process, started by the supervisor."""
    logging.getLogger("_granian").setLevel(logging.WARNING)
    worker.run(_check_granian, Door)


if __name__ == "__main__":
    main()
