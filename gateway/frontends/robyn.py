"""The Robyn door: the one file that knows Robyn (Rust: sockets, HTTP/1.1 by actix; no TLS
here).

    actix thread (one)                            main thread
    head, body collected ──▶ handle: answer       `_Loop.run_forever`: looks at the sockets
    waits for the reply  ◀── `_Reply`, any time   (gateway.frontends.guard), ends the process

Robyn gives a handler the whole request, never its head alone, and asks an event loop to await what
an asynchronous handler returns. This door has no event loop, since nothing in it waits: Robyn is
given an object whose `call_soon*` call at once, and the handler returns a `_Reply`, which is
complete when it has been called, from whichever thread. So `handle` is a plain function in the one
thread that reads the sockets, and `Ingest` has one thread.

What Robyn does not bound is bounded here as far as it can be from outside. A body that ended early
looks whole to Robyn: its length is compared with Content-Length. Bodies are not limited while they
arrive, nor in time: the guard cuts them. What stays different from the other door stands in
docs/front-doors.md, held by tests/conformance.py; above all, a malformed chunk ends the process.

Only the compiled module is used, with one worker thread and our own socket: Robyn's process pool,
reloader, arguments, environment file, banner and documentation pages belong to its Python part."""

import asyncio
import contextlib
import importlib
import logging
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Generator
from typing import Any, Final
from urllib.parse import unquote

from gateway import http, process, worker
from gateway._log import BUSY, RUNNING, now_ns
from gateway.batches import is_array
from gateway.errors import GatewayError
from gateway.frontends.guard import Guard, Limits
from gateway.http import BULK, ENQUEUE, INGEST, INGEST_MANY, Form
from gateway.worker import App

_robyn: Final[Any] = importlib.import_module("robyn.robyn")
"""Its classes are public, but not all that they take and do."""
ROBYN: Final = "0.88"
METHODS: Final = (
    *("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "CONNECT"),
)
"""Those that Robyn can route."""
CONNECTIONS_MAX: Final = 10_240
"""A worker; the limit of open files is set to it. Beyond it, new connections wait in the
backlog."""
DESCRIPTORS_RESERVED: Final = 256
IDLE_S: Final = 60.0
OVERSIZE_BYTES: Final = 1 << 20
"""So much more than the largest body a request may send before it is cut."""
SWITCH_S: Final = 0.0005
"""As in the other door: the waiter's thread and the guard get the GIL from a busy thread soon."""
TICK_S: Final = 0.05
"""Between two looks at the sockets while a request is arriving."""
TICK_IDLE_S: Final = 0.1
LOOK_SHARE: Final = 20
"""A look may take so small a part of the time: with very many connections it comes less often."""
_ACCEPTOR: Final = "actix-server ac"
"""The thread that accepts; comm has 15 characters."""
_START_S: Final = 10.0

_PREFIX: Final = len(INGEST)


class _Headers:
    """Of a request, as `gateway.http.Headers`."""

    def __init__(self, values: dict[str, list[str]]) -> None:
        self._values = values

    def get(self, key: str, default: Any = None) -> Any:
        values = self._values.get(key)
        return values[0] if values else default

    def get_all(self, key: str) -> list[str]:
        return self._values.get(key, [])

    def __contains__(self, key: str, /) -> bool:
        return key in self._values


class _Reply:
    """What `handle` returns, and what it calls to answer; like an asyncio.Future to Robyn."""

    _asyncio_future_blocking = False

    def __init__(self, unanswered: "set[_Reply]") -> None:
        self._unanswered = unanswered
        self._response: Any = None
        self._then: Callable[[Any], object] | None = None
        unanswered.add(self)

    def __call__(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """Answer. Any thread, once."""
        self._response = _robyn.Response(status, _robyn.Headers(dict(headers)), body)
        self._unanswered.discard(self)
        then = self._then
        if then is not None:
            self._then = None
            then(self)

    def add_done_callback(self, then: Callable[[Any], object]) -> None:
        self._then = then
        if self._response is not None and self._then is not None:  # answered meanwhile
            self._then = None
            then(self)

    def result(self) -> Any:
        return self._response

    def cancel(self) -> bool:
        """The client went away; the event is what it is."""
        return False

    def __await__(self) -> Generator["_Reply", None, Any]:
        while self._response is None:
            yield self
        return self._response


class _Task:
    """Steps Robyn's coroutine around a `_Reply` at once; like an asyncio.Task to Robyn."""

    def __init__(self, coroutine: Any) -> None:
        self._coroutine = coroutine
        self._done = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._then: list[Any] = []
        self._step(None)

    def _step(self, _: object) -> None:
        try:
            reply = self._coroutine.send(None)
        except StopIteration as end:
            self._value = end.value
        except BaseException as error:
            self._error = error
        else:
            reply.add_done_callback(self._step)
            return
        self._done = True
        for then in self._then:
            then(self)

    def add_done_callback(self, then: Any, *, context: Any = None) -> None:
        if self._done:
            then(self)
        else:
            self._then.append(then)

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value

    def cancelled(self) -> bool:
        return False

    def cancel(self) -> bool:
        """The client went away: what waits, waits on, and nobody hears the answer."""
        return False


class _Loop:
    """In place of an event loop."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run_forever = run
        """Robyn calls it in the thread that started it, until it returns."""

    def call_soon(self, callback: Any, *arguments: Any, context: Any = None) -> None:
        asyncio._set_running_loop(self)  # type: ignore[arg-type]
        callback(*arguments)

    call_soon_threadsafe = call_soon

    def create_task(self, awaitable: Any, *, context: Any = None) -> Any:
        return awaitable if isinstance(awaitable, _Reply) else _Task(awaitable)


class _Policy(asyncio.DefaultEventLoopPolicy):
    """Gives Robyn that loop."""

    def __init__(self, loop: _Loop) -> None:
        super().__init__()
        self._our: Any = loop

    def new_event_loop(self) -> Any:
        return self._our

    def get_event_loop(self) -> Any:
        return self._our

    def set_event_loop(self, loop: Any) -> None:
        pass


class Door:
    """Serves one App on one listening socket, until SIGTERM."""

    def __init__(self, app: App, listen_fd: int) -> None:
        self._app = app
        self._ingest = app.ingest
        self._waiting = app.waiting
        self._batches = app.batches
        self._terms = app.terms
        self._listen_fd = listen_fd
        self._unanswered: set[_Reply] = set()
        self._told_to_end = False
        self._retiring = False
        limits = app.config.http
        self._answer_s = max(limits.durable_deadline_ms, limits.sink_deadline_ms) / 1000
        self._guard = Guard(
            Limits(
                limits.body_deadline_ms / 1000,
                max(limits.body_bytes_max, limits.batch_bytes_max) + OVERSIZE_BYTES,
                limits.body_bytes_max,
                limits.batches_bytes_max,
                IDLE_S,
            )
        )
        self._wake_fd, self._waker_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # ---- the actix thread ------------------------------------------------------------------------

    def handle(self, request: Any) -> _Reply:
        """A request is here, or what came of it."""
        started_ns = now_ns()
        reply = _Reply(self._unanswered)
        try:
            self._answer(request, reply, started_ns)
        except BaseException:
            reply(*self._app.internal(started_ns))
        return reply

    def _answer(self, request: Any, reply: _Reply, started_ns: int) -> None:
        headers = _Headers(request.headers.get_headers())
        path, method = request.url.path, request.method
        if "%" in path:
            path = unquote(path, errors="replace")
        if len(headers.get_all("host")) != 1:
            self._refuse(reply, http.BAD_REQUEST, started_ns)
            return
        page = self._app.page(path, method, headers.get("accept"))
        if page is not None:
            reply(*page)
            return
        code = http.route(path, method)
        if code:
            self._refuse(reply, code, started_ns)
            return
        form: Form | None = None
        query = _query(request.query_params)
        code, ack = BULK, 0
        if path != INGEST_MANY:
            code, ack = http.examine(headers, query, self._terms)
        if code == BULK:
            code, form = http.examine_form(headers, query, self._terms, path == INGEST_MANY)
            ack = form.ack
        body: str | bytes = request.body
        whole = body.encode() if isinstance(body, str) else bytes(body)
        if not code and len(whole) != int(headers.get("content-length")):
            # Cut by the client, or by the guard; Robyn does not say.
            answer = self._app.refuse(self._why_cut(), started_ns)
            reply(*(answer if self._app.draining else http.INCOMPLETE))
        elif code:
            self._refuse(reply, code, started_ns)
        else:
            self._take(reply, path[_PREFIX:], whole, ack, form, started_ns)

    def _take(
        self,
        reply: _Reply,
        device_id: str,
        body: bytes,
        ack: int,
        form: Form | None,
        started_ns: int,
    ) -> None:
        if form is None and is_array(body):
            form = Form(ack)
        if form is not None:
            event = self._batches.take(reply, device_id or None, body, form, started_ns)
            if event is None:
                return
            body = event.result()
        ingest = self._ingest
        code = ingest.event(device_id, body, started_ns)
        if code == 0:
            headers = http.receipt_headers(ingest.receipt, ingest.duplicate, ingest.used_percent)
            if ack == ENQUEUE:
                headers.append(http.X_ACK[ENQUEUE])
                reply(202, headers, http.BODY[ENQUEUE])
            else:
                self._waiting.accepted(reply, ingest, ack, started_ns, headers)
        elif code == BUSY:
            self._waiting.busy(reply, ingest.lsn, ack, started_ns, (device_id, body))
        else:
            reply(*self._app.refused(code, ingest))

    def _refuse(self, reply: _Reply, code: int, started_ns: int) -> None:
        answer = self._app.refuse(code, started_ns)
        reply(*(http.not_allowed("POST") if code == http.METHOD_NOT_ALLOWED else answer))

    def _why_cut(self) -> int:
        return http.DRAINING if self._app.draining else http.BODY_TIMEOUT

    # ---- main thread -----------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer requests until SIGTERM; then refuse what is arriving, end connections, return.

        SIGUSR1 retires the worker: idle connections are ended, and what SIGTERM finds unanswered is
        answered, not refused."""
        sys.setswitchinterval(SWITCH_S)
        self._waiting.start()  # before signals are let in: they are for this thread
        signal.signal(signal.SIGTERM, self._tell_to_end)
        signal.signal(signal.SIGUSR1, self._retire)
        signal.set_wakeup_fd(self._waker_fd, warn_on_full_buffer=False)
        process.can_end()
        _limit_descriptors()
        loop = _Loop(self._watch)
        asyncio.set_event_loop_policy(_Policy(loop))
        server = _robyn.Server()
        handler = _robyn.FunctionInfo(self.handle, True, 1, {}, {})
        for name in METHODS:
            for route in ("/", "/*rest"):
                server.add_route(getattr(_robyn.HttpMethod, name), route, handler, False)
        server.start(_holding(self._listen_fd), 1)

    def _watch(self) -> None:
        _await_acceptor()
        process.tell(process.READY)
        wait_s = TICK_IDLE_S
        while not self._told_to_end:
            self._wait(wait_s)
            wait_s = self._look()
        replaced = self._is_replaced
        self._app.draining = not replaced()
        self._guard.stop_accepting()
        until = time.monotonic() + worker.GRACE_S
        while (left := until - time.monotonic()) > 0:
            if not replaced():
                self._waiting.end()  # nothing is confirmed any more
                self._guard.end_arriving()
            elif self._unanswered:
                until = time.monotonic() + worker.GRACE_S  # each has a deadline of its own
            self._look(closing=True)
            if not self._unanswered and not self._guard.connections:
                break
            self._wait(min(left, TICK_S))

    def _look(self, closing: bool = False) -> float:
        """Look at the sockets; returns when to do it again."""
        began_s = time.monotonic()
        patience_s = self._answer_s if self._unanswered else 0.0
        arriving = self._guard.look(patience_s, closing or self._retiring)
        took_s = time.monotonic() - began_s
        return max(TICK_S if arriving or self._retiring else TICK_IDLE_S, LOOK_SHARE * took_s)

    def _is_replaced(self) -> bool:
        """A successor serves, and the gateway goes on."""
        return self._retiring and self._app.log.state == RUNNING

    def _wait(self, timeout_s: float) -> None:
        if select.select([self._wake_fd], [], [], timeout_s)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_fd, 4096)

    def _tell_to_end(self, *_: object) -> None:
        self._told_to_end = True

    def _retire(self, *_: object) -> None:
        self._retiring = True


def _query(parameters: Any) -> str:
    """Robyn takes the query apart but decodes nothing, and says nothing of the order of keys, which
    means nothing here."""
    return "&".join(
        f"{key}={value}" for key, values in parameters.to_dict().items() for value in values
    )


def _holding(listen_fd: int) -> Any:
    """Robyn's socket binds an address of its own, a free port of loopback, and takes no descriptor:
    ours is put in its place."""
    before = _sockets()
    held = _robyn.SocketHeld("127.0.0.1", 0)
    (fd,) = _sockets() - before
    os.dup2(listen_fd, fd, False)
    return held


def _sockets() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.add(int(name))
    return found


def _limit_descriptors() -> None:
    """actix has no limit of connections that Robyn would let us set."""
    soft = min(process.raise_descriptor_limit(), CONNECTIONS_MAX + DESCRIPTORS_RESERVED)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )


def _await_acceptor() -> None:
    """Robyn says nothing when it serves: wait for its thread that accepts."""
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as comm:
                if comm.read().startswith(_ACCEPTOR):
                    return
        time.sleep(0.005)
    raise GatewayError(f"robyn {_robyn.get_version()} did not start; install robyn {ROBYN}.*")


def _check_robyn() -> None:
    needed = ("FunctionInfo", "Headers", "HttpMethod", "Response", "Server", "SocketHeld")
    missing = [name for name in needed if not hasattr(_robyn, name)]
    if missing:
        raise GatewayError(
            f"robyn {_robyn.get_version()} does not have what this door uses"
            f" ({', '.join(missing)}); install robyn {ROBYN}.*"
        )


def main() -> None:
    """One worker process, started by the supervisor."""
    for name in ("actix_http", "actix_server", "actix_web", "robyn"):
        # a line for each request that is no HTTP, as a stranger likes it
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    worker.run(_check_robyn, Door)


if __name__ == "__main__":
    main()
