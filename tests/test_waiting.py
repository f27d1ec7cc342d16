"""Who waits for an acknowledgement is answered exactly once, never early, and no wake-up is lost.

A real log, whose positions are moved by hand (tests/native/positions.c), so that each order of
events can be made. Controls are the same sources with one place changed.
"""

import ctypes
import functools
import itertools
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest

from gateway import _log, _waiting, http, waiting
from gateway.http import DURABLE, ENQUEUE, SINK
from gateway.waiting import Waiting
from tests.native_build import NATIVE, TESTS, extension, library

BODY = b'{"metrics":{"a":1}}'
RECEIPT = ("x-receipt", "r")
WORKER = 3
ASLEEP = 1 << 31
"""`positions_flag` of a waiter that sleeps for nothing but a nudge."""


@functools.cache
def positions() -> ctypes.CDLL:
    """The library that moves positions."""
    found = ctypes.CDLL(str(library(TESTS / "positions.c")))
    word = ctypes.c_uint64
    found.positions_move.argtypes = [ctypes.c_void_p, word, word, word, ctypes.c_bool]
    found.positions_move.restype = None
    found.positions_flag.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    found.positions_flag.restype = ctypes.c_uint32
    found.positions_nudges.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    found.positions_nudges.restype = ctypes.c_uint32
    found.positions_wanted.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_bool]
    found.positions_wanted.restype = word
    return found


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p


class Log:
    """A log whose positions a test moves. What is said of single records is made up."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/gateway.log"
            _log.create(path, _log.CAPACITY_MIN)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self.real = _log.Log.open(path, fd, ["mqtt"])
            os.close(fd)
        self.wait, self.nudge = self.real.wait, self.real.nudge
        self.counter_add, self._capsule = self.real.counter_add, self.real._capsule
        self.pointer = _pointer(self.real._capsule(), b"gw_log")
        self.states: dict[int, str] = {}
        self.at = {"durable": 0, "least_cursor": 0, "committed": 0}
        self.move()

    def move(self, wake: bool = True, **to: int) -> None:
        """Move positions, and wake who sleeps for them."""
        self.at |= to
        positions().positions_move(self.pointer, *self.at.values(), wake)

    def fail(self) -> None:
        self.real.state = _log.FAILED

    @property
    def flag(self) -> int:
        return int(positions().positions_flag(self.pointer, WORKER))

    @property
    def nudges(self) -> int:
        return int(positions().positions_nudges(self.pointer, WORKER))

    @property
    def wanted(self) -> tuple[int, int]:
        """The highest lsn that was asked for: durable, every sink."""
        durable, sink = (
            int(positions().positions_wanted(self.pointer, WORKER, which))
            for which in (True, False)
        )
        return durable, sink

    def state_of(self, lsn: int) -> str:
        return self.states.get(lsn, "delivered")

    def receipt(self, lsn: int) -> str:
        return f"receipt-{lsn}"

    def count(self, name: str) -> int:
        return self.real.counter(WORKER, _log.COUNTERS[name])

    @property
    def observed(self) -> int:
        first = _log.COUNTERS["ack_ns"]
        buckets = range(first, first + len(_log.HISTOGRAM_BOUNDS_NS) + 1)
        return sum(self.real.counter(WORKER, bucket) for bucket in buckets)


class Ingest:
    """What `Waiting` reads of an accepted event."""

    field = offset = None
    receipt, used_percent = "r2", 0

    def __init__(self, lsn: int, duplicate: bool = False) -> None:
        self.lsn, self.duplicate = lsn, duplicate


class Request:
    """Keeps what it was answered."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, list[tuple[str, str]], bytes]] = []
        self.log: Log | None = None
        self.seen: dict[str, int] | None = None
        self.thread = ""

    def __call__(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        if self.log is not None:
            self.seen = dict(self.log.at)
        self.thread = threading.current_thread().name
        self.answers.append((status, headers, body))

    def answer(self, within_s: float = 5.0) -> tuple[int, dict[str, str], dict[str, Any]]:
        wait_for(lambda: self.answers, within_s)
        status, headers, body = self.answers[0]
        return status, dict(headers), json.loads(body)


def wait_for(condition: Callable[[], object], within_s: float = 5.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.001)


class Bench:
    """A `Waiting` over a `Log`."""

    def __init__(
        self, module: ModuleType = waiting, durable_ms: int = 60_000, sink_ms: int = 60_000
    ) -> None:
        self.log = Log()
        self.refusals: list[int] = []

        def refuse(code: int, started_ns: int) -> http.Answer:
            self.refusals.append(code)
            return http.refusal(code)

        self.waiting: Waiting = module.Waiting(
            self.log, WORKER, durable_ms, sink_ms, lambda code, ingest: http.refusal(code), refuse
        )
        self.word = -1
        self.rounds = 0
        """The waiter has gone to sleep so often."""
        self.own_nudges = 0
        self._sleep = self.waiting.sleep
        self.waiting.sleep = self.sleep  # type: ignore[method-assign]

    def sleep(self, word: int, linger: bool) -> int:
        self.word = word
        self.rounds += 1
        return self._sleep(word, linger)

    def start(self) -> "Bench":
        self.waiting.start()
        wait_for(lambda: self.log.flag)
        return self

    def accept(self, ack: int, lsn: int, duplicate: bool = False) -> Request:
        request = Request()
        request.log = self.log
        headers = [http.TYPE_JSON, RECEIPT]
        ingest: Any = Ingest(lsn, duplicate)
        self.waiting.accepted(request, ingest, ack, _log.now_ns(), headers)
        return request

    @property
    def nudges(self) -> int:
        """By others than the test."""
        return self.log.nudges - self.own_nudges

    def asleep(self) -> None:
        """Every nudge was heard, and it sleeps again."""
        wait_for(lambda: self.log.flag and self.word == self.log.nudges)

    def settle(self) -> None:
        """It has been round once more, and sleeps again."""
        self.own_nudges += 1
        self.log.nudge(WORKER)
        self.asleep()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench().start()
    yield bench
    bench.log.fail()  # its thread goes on, slowly


# ---- when, and what ------------------------------------------------------------------------------


def test_durable_is_answered_when_the_position_has_passed_not_before(bench: Bench) -> None:
    request = bench.accept(DURABLE, 100)
    bench.log.move(durable=100, least_cursor=200, committed=200)
    bench.settle()
    assert request.answers == []
    bench.log.move(durable=101)
    status, headers, body = request.answer()
    assert (status, headers["x-ack"], body) == (202, "durable", {"ack": "durable"})
    assert headers["x-receipt"] == "r"
    assert bench.log.wanted == (100, 0)
    assert bench.log.count("acks_durable") == bench.log.observed == 1


def test_sink_is_answered_when_every_cursor_has_passed_not_before(bench: Bench) -> None:
    request = bench.accept(SINK, 100)
    bench.log.move(durable=200, least_cursor=100)
    bench.settle()
    assert request.answers == []
    bench.log.move(least_cursor=101)
    status, headers, body = request.answer()
    assert (status, headers["x-ack"], body) == (200, "sink", {"ack": "sink"})
    assert bench.log.wanted == (0, 100)
    assert bench.log.count("acks_sink") == 1


@pytest.mark.parametrize(("durable", "holds"), [(0, "enqueue"), (200, "durable")])
@pytest.mark.parametrize("state", ["dead_lettered", "finished"])
def test_sink_of_an_event_that_was_set_aside_is_no_200(
    bench: Bench, state: str, durable: int, holds: str
) -> None:
    bench.log.states[100] = state
    request = bench.accept(SINK, 100)
    bench.log.move(durable=durable, least_cursor=200)
    status, headers, body = request.answer()
    assert (status, headers["x-ack"], body) == (202, holds, {"ack": holds, "state": state})
    assert bench.log.count("acks_dead") == 1
    assert bench.log.count("acks_sink") == 0


def test_a_repeat_whose_original_is_there_already_is_answered_at_once(bench: Bench) -> None:
    bench.log.move(durable=200, least_cursor=150)
    bench.asleep()
    assert bench.accept(DURABLE, 100, duplicate=True).answers[0][0] == 202
    assert bench.accept(SINK, 100, duplicate=True).answers[0][0] == 200
    assert bench.accept(SINK, 160, duplicate=True).answers == []
    assert bench.waiting.count == 1


def test_repeats_are_answered_by_their_originals_place_whatever_came_before(bench: Bench) -> None:
    new = bench.accept(SINK, 1000)
    old = bench.accept(SINK, 10, duplicate=True)
    bench.log.move(least_cursor=500)
    assert old.answer()[0] == 200
    assert new.answers == []
    bench.log.move(least_cursor=1001)
    assert new.answer()[0] == 200


def test_deadlines_are_kept_by_kind() -> None:
    bench = Bench(durable_ms=60, sink_ms=200).start()
    began = time.monotonic()
    durable, sink = bench.accept(DURABLE, 100), bench.accept(SINK, 100)
    status, headers, body = durable.answer()
    assert 0.055 < time.monotonic() - began < 0.19
    assert (status, body["code"], headers["x-receipt"]) == (504, "accepted_pending", "r")
    assert sink.answers == []
    assert sink.answer()[0] == 504
    assert 0.195 < time.monotonic() - began < 1
    assert bench.log.count("acks_late") == 2
    assert bench.refusals == [], "it was accepted"
    assert bench.waiting.count == 0


def test_who_comes_after_one_who_was_late_has_a_deadline_too() -> None:
    bench = Bench(sink_ms=30).start()
    for lsn in (100, 200, 150):
        assert bench.accept(SINK, lsn).answer(1.0)[0] == 504
        bench.asleep()


def test_who_was_late_is_not_kept() -> None:
    bench = Bench(durable_ms=10, sink_ms=10).start()
    requests = [bench.accept(SINK, lsn) for lsn in range(5000, 1, -1)]
    for request in requests:
        assert request.answer()[0] == 504
    wait_for(lambda: bench.waiting.count == 0)
    bench.asleep()
    del request
    for kept in (requests, [Request()]):
        assert {sys.getrefcount(request) for request in kept} == {3}


def test_a_failed_log_ends_every_wait_with_500_within_a_second(bench: Bench) -> None:
    requests = [bench.accept(ack, 100 * ack) for ack in (DURABLE, SINK)]
    bench.log.fail()
    bench.log.move(durable=1000, least_cursor=1000)
    for request in [*requests, bench.accept(DURABLE, 5), bench.accept(SINK, 5, duplicate=True)]:
        assert request.answer(1.0)[2]["code"] == "internal"
    assert bench.waiting.count == 0
    assert bench.log.count("acks_durable") == bench.log.count("acks_sink") == 0


def test_the_end_answers_who_is_due_and_gives_the_rest_504(bench: Bench) -> None:
    due, rest = bench.accept(DURABLE, 100), bench.accept(SINK, 100)
    bench.log.move(wake=False, durable=101)  # the last sync, and nobody is woken
    bench.waiting.end()
    assert due.answer()[0] == 202
    assert rest.answer()[0] == 504
    assert bench.accept(SINK, 200).answer(0.5)[0] == 504, "also who comes later"
    assert bench.accept(DURABLE, 90, duplicate=True).answer(0.5)[0] == 202


# ---- the same key at another worker --------------------------------------------------------------


class Again:
    """Stands in for `_log.Ingest` in the waiter: gives the next of `verdicts`."""

    verdicts: list[tuple[int, Ingest]]
    events: list[tuple[str, bytes, bool]]
    opened = 0

    def __init__(self, log: object, block: int) -> None:
        type(self).opened += 1
        self.block = block

    def event(self, device_id: str, body: bytes, started_ns: int, again: bool = False) -> int:
        self.events.append((device_id, body, again))
        code, said = self.verdicts.pop(0)
        self.lsn, self.duplicate, self.receipt = said.lsn, said.duplicate, said.receipt
        self.used_percent, self.field, self.offset = 60, None, None
        return code

    def close(self) -> None:
        type(self).opened -= 1


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> type[Again]:
    monkeypatch.setattr(_log, "Ingest", Again)
    Again.verdicts, Again.events, Again.opened = [], [], 0
    return Again


def park_busy(bench: Bench, ack: int = ENQUEUE, lsn: int = 100) -> Request:
    request = Request()
    bench.waiting.busy(request, lsn, ack, _log.now_ns(), ("dev", BODY))
    return request


def test_a_key_that_another_worker_writes_is_tried_again_when_it_is_committed(
    bench: Bench, again: type[Again]
) -> None:
    again.verdicts = [(0, Ingest(100, duplicate=True))]
    request = park_busy(bench)
    bench.log.move(committed=100)
    bench.settle()
    assert again.events == []
    bench.log.move(committed=101)
    status, headers, body = request.answer()
    assert (status, body, headers["x-ack"]) == (202, {"ack": "enqueue"}, "enqueue")
    assert (headers["x-duplicate"], headers["x-receipt"]) == ("true", "r2")
    assert headers["x-log-used"] == "60"
    assert again.events == [("dev", BODY, True)]
    assert again.opened == 0
    assert bench.log.wanted == (0, 0)


def test_a_key_may_be_busy_again_and_its_event_wait_on(bench: Bench, again: type[Again]) -> None:
    again.verdicts = [(_log.BUSY, Ingest(300)), (0, Ingest(300))]
    request = park_busy(bench, SINK)
    bench.log.move(committed=101)
    wait_for(lambda: len(again.events) == 1)
    bench.asleep()
    assert request.answers == []
    bench.log.move(committed=301)
    wait_for(lambda: len(again.events) == 2)
    bench.asleep()
    assert request.answers == []
    assert bench.log.wanted == (0, 300)
    bench.log.move(least_cursor=301)
    assert request.answer()[0] == 200
    assert len(request.answers) == 1
    assert bench.waiting.count == 0


def test_a_key_that_is_busy_again_keeps_its_deadline(again: type[Again]) -> None:
    again.verdicts = [(_log.BUSY, Ingest(300))]
    bench = Bench(durable_ms=400).start()
    first = park_busy(bench)
    time.sleep(0.2)
    second = park_busy(bench, lsn=900)
    bench.log.move(committed=101)
    status, headers, _ = first.answer()
    assert second.answers == [], "the first one waited for the second one's deadline"
    assert (status, headers["x-receipt"]) == (504, "receipt-300")
    assert second.answer()[0] == 504
    assert bench.waiting.count == 0


def test_a_key_that_stays_busy_is_504_with_a_receipt_and_in_the_books(again: type[Again]) -> None:
    bench = Bench(durable_ms=50).start()
    status, headers, body = park_busy(bench).answer()
    assert (status, body["code"]) == (504, "accepted_pending")
    assert headers["x-receipt"] == "receipt-100"
    assert bench.refusals == [http.ACCEPTED_PENDING]
    assert bench.log.count("acks_late") == 0


def test_a_conflict_that_shows_later_is_answered(bench: Bench, again: type[Again]) -> None:
    again.verdicts = [(http.NUMBER["seq_conflict"], Ingest(100))]
    request = park_busy(bench)
    bench.log.move(committed=101)
    assert request.answer()[0] == 409


def test_a_failed_log_ends_the_wait_for_a_key(bench: Bench, again: type[Again]) -> None:
    request = park_busy(bench)
    bench.log.fail()
    assert request.answer(1.0)[0] == 500
    assert bench.refusals == [http.INTERNAL]


def test_no_free_intent_slot_is_504(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(log: object, block: int) -> None:
        raise _log.LogError("every intent slot has an owner")

    monkeypatch.setattr(_log, "Ingest", full)
    request = park_busy(bench)
    bench.log.move(committed=101)
    assert request.answer()[0] == 504


# ---- waking --------------------------------------------------------------------------------------


def test_only_who_is_not_covered_wakes_the_sleeper(bench: Bench) -> None:
    bench.asleep()
    first = bench.accept(DURABLE, 100)
    assert bench.nudges == 1
    bench.asleep()
    bench.accept(DURABLE, 200)
    bench.accept(DURABLE, 300)
    assert bench.nudges == 1, "the wake-up for 100 serves them too"
    bench.accept(DURABLE, 50, duplicate=True)
    assert bench.nudges == 2
    bench.asleep()
    bench.accept(SINK, 300)
    assert bench.nudges == 3
    bench.asleep()
    bench.log.move(durable=400)
    first.answer()


def test_clients_that_come_back_at_once_cost_no_nudge(bench: Bench) -> None:
    for lsn in range(100, 200):
        request = bench.accept(DURABLE, lsn)
        bench.log.move(durable=lsn + 1)
        assert request.answer()[0] == 202
        bench.asleep()
    assert bench.nudges == 1


def test_an_idle_waiter_sleeps(bench: Bench) -> None:
    bench.asleep()
    assert bench.log.flag == ASLEEP
    rounds = bench.rounds
    time.sleep(1.5 * waiting.LINGER_MS / 1000)
    assert bench.rounds == rounds


def test_a_short_deadline_holds_for_who_comes_while_the_waiter_lingers() -> None:
    bench = Bench(durable_ms=50, sink_ms=60_000).start()
    first = bench.accept(DURABLE, 100)
    bench.log.move(durable=101)
    assert first.answer()[0] == 202
    bench.asleep()
    began = time.monotonic()
    assert bench.accept(DURABLE, 200).answer()[0] == 504
    assert time.monotonic() - began < 0.5


# ---- the door answers by the way -----------------------------------------------------------------


def test_who_is_due_is_answered_by_the_door_with_its_next_event() -> None:
    bench = Bench()  # no waiter at all
    first, second, sink = bench.accept(DURABLE, 100), bench.accept(DURABLE, 200), None
    sink = bench.accept(SINK, 150)
    bench.log.move(durable=101)
    third = bench.accept(DURABLE, 300)
    assert [len(r.answers) for r in (first, second, third, sink)] == [1, 0, 0, 0]
    bench.log.move(durable=201, least_cursor=151)
    bench.accept(SINK, 400)
    assert [len(r.answers) for r in (first, second, third, sink)] == [1, 1, 0, 1]
    assert bench.waiting.count == 2
    assert (bench.log.count("acks_durable"), bench.log.count("acks_sink")) == (2, 1)


def test_the_door_confirms_nothing_when_the_log_has_failed() -> None:
    bench = Bench()
    first = bench.accept(DURABLE, 100)
    bench.log.fail()
    bench.log.move(durable=1000)
    second = bench.accept(DURABLE, 200)
    repeat = bench.accept(DURABLE, 100, duplicate=True)
    assert first.answers == second.answers == repeat.answers == []
    bench.waiting.start()
    for request in (first, second, repeat):
        assert request.answer()[0] == 500


def test_who_was_answered_by_the_door_wakes_the_waiter_for_nothing(bench: Bench) -> None:
    """The sleeper finds nobody due, and sleeps on without a round."""
    bench.accept(DURABLE, 100)
    bench.settle()
    rounds = bench.rounds
    for lsn in range(200, 3000, 100):
        bench.log.move(wake=False, durable=lsn - 50)
        request = bench.accept(DURABLE, lsn)
        bench.log.move()
        assert request.answers == []
    bench.log.move(durable=10_000)
    request.answer()
    assert bench.rounds <= rounds + 3
    assert bench.nudges == 1


def test_an_answer_that_cannot_be_sent_keeps_nobody_from_his(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(status: int, headers: object, body: bytes) -> None:
        raise RuntimeError("the wire is cut")

    ingest: Any = Ingest(100)
    bench.waiting.accepted(broken, ingest, DURABLE, _log.now_ns(), [http.TYPE_JSON, RECEIPT])
    after = bench.accept(DURABLE, 100)
    bench.log.move(durable=101)
    assert after.answer()[0] == 202
    wait_for(lambda: bench.waiting.count == 0)
    assert "the wire is cut" in caplog.text


# ---- batches -------------------------------------------------------------------------------------


def batch(
    bench: Bench, ack: int, lsn: int, reached: int | None = None
) -> tuple[Request, list[Any]]:
    request, asked = Request(), []

    def answer(ack: int, late: bool) -> http.Answer:
        asked.append((ack, late))
        x_ack = [] if late else [http.X_ACK[ack if reached is None else reached]]
        return http.Answer(504 if late else 202, [http.TYPE_JSON, *x_ack], b'{"accepted":2}')

    bench.waiting.batch(request, lsn, ack, _log.now_ns(), answer)
    return request, asked


@pytest.mark.parametrize(("ack", "position"), [(DURABLE, "durable"), (SINK, "least_cursor")])
def test_a_batch_is_answered_when_its_highest_event_is_there(
    bench: Bench, ack: int, position: str
) -> None:
    request, asked = batch(bench, ack, 500)
    bench.log.move(**{position: 500})
    bench.settle()
    assert asked == request.answers == []
    bench.log.move(**{position: 501})
    assert request.answer()[2] == {"accepted": 2}
    assert asked == [(ack, False)]
    assert bench.log.count(f"acks_{http.ACKS[ack]}") == bench.log.observed == 1
    assert bench.waiting.count == 0


def test_a_batch_that_is_there_already_is_answered_at_once(bench: Bench) -> None:
    bench.log.move(durable=501)
    request, asked = batch(bench, DURABLE, 500)
    assert len(request.answers) == len(asked) == 1


def test_a_batch_that_is_late_says_so() -> None:
    bench = Bench(durable_ms=30).start()
    request, asked = batch(bench, DURABLE, 500)
    assert request.answer()[0] == 504
    assert asked == [(DURABLE, True)]
    assert bench.log.count("acks_late") == 1


def test_a_batch_that_a_sink_has_set_aside_in_part_counts_as_such(bench: Bench) -> None:
    request, _ = batch(bench, SINK, 500, reached=ENQUEUE)
    bench.log.move(least_cursor=501)
    request.answer()
    assert (bench.log.count("acks_sink"), bench.log.count("acks_dead")) == (0, 1)


def test_a_failed_log_ends_the_wait_of_a_batch_with_500(bench: Bench) -> None:
    request, asked = batch(bench, DURABLE, 500)
    bench.log.fail()
    assert request.answer(1.0)[0] == 500
    assert asked == []


# ---- just before the sleep, and controls ---------------------------------------------------------

Edits = Sequence[tuple[str, str, str]]


def mutant(*edits: tuple[str, str, str]) -> ModuleType:
    """`gateway.waiting` with places changed: file, old text, new text."""
    texts: dict[str, str] = {}
    for name, old, new in edits:
        path = NATIVE.parent / "gateway" / name if name == "waiting.py" else NATIVE / name
        text = texts.get(name) or path.read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times: {old}"
        texts[name] = text.replace(old, new)
    source = texts.pop("waiting.py", None) or (NATIVE.parent / "gateway/waiting.py").read_text()
    module = ModuleType("mutant")
    with pytest.MonkeyPatch.context() as patch:
        if texts:
            module.compiled = extension(texts, "_waiting")  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "gateway._waiting", module.compiled)
        exec(compile(source, "mutant", "exec"), vars(module))
    return module


HOOK = (
    "gw_waiting.c",
    "static bool lie_down(",
    """__attribute__((visibility("default"))) void (*gw_test_hook)(void);

static bool lie_down(""",
)
BEFORE_ABOVE = (
    "gw_waiting.c",
    "        atomic_store_explicit(&line->above, above[i], memory_order_relaxed);",
    """        if (i == GW_LINE_DURABLE && gw_test_hook)
            gw_test_hook();
        atomic_store_explicit(&line->above, above[i], memory_order_relaxed);""",
)
BEHIND_ABOVE = (
    "gw_waiting.c",
    "    atomic_thread_fence(memory_order_seq_cst); /* F */\n    for",
    """    if (gw_test_hook)
        gw_test_hook();
    atomic_thread_fence(memory_order_seq_cst); /* F */
    for""",
)
BEFORE_LOOK = (
    "gw_waiting.c",
    "    uint64_t position[GW_LINES], above[GW_LINES];\n",
    """    uint64_t position[GW_LINES], above[GW_LINES];
    if (gw_test_hook)
        gw_test_hook();
""",
)
NO_SECOND_LOOK = (
    "gw_waiting.c",
    "lowest < above[i] || lowest < position[i]",
    "lowest < position[i]",
)
NO_NUDGE = (
    "gw_waiting.c",
    "    if (entry->lsn < atomic_load_explicit(&line->above, memory_order_relaxed))",
    "    if (false)",
)


_hooks: list[object] = []
"""Waiters go on as long as the process, and call them."""


def newcomer(*edits: tuple[str, str, str], idle: bool = False) -> Request:
    """One comes for durable while the waiter lies down for somebody in another line, and is due at
    once; or when nobody is there (`idle`), and is not due before its deadline."""
    module = mutant(HOOK, *edits)
    bench = Bench(module, durable_ms=50 if idle else 60_000).start()
    requests: list[Request] = []

    def come() -> None:
        if not requests:
            requests.append(bench.accept(DURABLE, 150))
            bench.log.move(durable=101 if idle else 151)

    native = ctypes.CDLL(module.compiled.__file__)
    hook = ctypes.CFUNCTYPE(None)(come)
    _hooks.append(hook)
    if not idle:
        bench.accept(SINK, 500)
        bench.asleep()
    ctypes.c_void_p.in_dll(native, "gw_test_hook").value = ctypes.cast(hook, ctypes.c_void_p).value
    bench.log.nudge(WORKER)
    wait_for(lambda: requests)
    return requests[0]


@pytest.mark.parametrize(
    "place", [BEFORE_LOOK, BEFORE_ABOVE, BEHIND_ABOVE], ids=["look", "before", "behind"]
)
def test_who_comes_while_the_waiter_lies_down_is_seen(place: tuple[str, str, str]) -> None:
    assert newcomer(place).answer(0.5)[0] == 202


def test_without_the_second_look_the_newcomer_would_wait() -> None:
    with pytest.raises(AssertionError, match="did not come"):
        newcomer(BEFORE_ABOVE, NO_SECOND_LOOK).answer(0.5)


def test_who_comes_while_an_idle_waiter_lies_down_has_a_deadline() -> None:
    assert newcomer(BEFORE_LOOK, idle=True).answer(1.0)[0] == 504


def test_an_idle_waiter_that_does_not_look_would_forget_the_deadline() -> None:
    blind = ("gw_waiting.c", " || (idle && lowest != GW_NOBODY)", "")
    with pytest.raises(AssertionError, match="did not come"):
        newcomer(BEFORE_LOOK, blind, idle=True).answer(0.5)


def test_without_a_nudge_the_newcomer_would_wait() -> None:
    bench = Bench(mutant(NO_NUDGE), durable_ms=1000).start()
    request = bench.accept(DURABLE, 100)
    bench.log.move(durable=101)
    with pytest.raises(AssertionError, match="did not come"):
        request.answer(0.5)


# ---- everything at once --------------------------------------------------------------------------


def storm(module: ModuleType, seed: int, count: int = 3000) -> list[str]:
    """A door, a committer and a publisher race; returns what went wrong."""
    chance = random.Random(seed)
    bench = Bench(module, durable_ms=3000, sink_ms=3000).start()
    log, requests = bench.log, []
    end = threading.Event()
    tail = itertools.count(8, 8)
    last = 0

    def step() -> None:
        while not end.is_set():
            log.move(durable=last + 1)
            time.sleep(chance.random() * 0.002)
            log.move(least_cursor=log.at["durable"])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    mover = threading.Thread(target=step)
    mover.start()
    try:
        for _ in range(count):
            lsn = last = next(tail)
            repeat = chance.random() < 0.2
            if repeat:
                lsn = chance.randrange(8, last + 8, 8)
            ack = chance.choice((DURABLE, SINK))
            requests.append((ack, lsn, bench.accept(ack, lsn, repeat)))
            if chance.random() < 0.02:
                time.sleep(chance.random() * 0.01)
        wait_for(lambda: all(request.answers for _, _, request in requests), 6)
    finally:
        end.set()
        mover.join()
        sys.setswitchinterval(interval)
    log.fail()
    wrong = []
    for ack, lsn, request in requests:
        assert request.seen is not None
        if len(request.answers) != 1:
            wrong.append(f"{lsn}: {len(request.answers)} answers")
        elif request.answers[0][0] == 504:
            wrong.append(f"{lsn}: late")
        elif request.seen["least_cursor" if ack == SINK else "durable"] <= lsn:
            wrong.append(f"{lsn}: early")
    return wrong


@pytest.mark.parametrize("seed", range(3))
def test_in_a_storm_each_is_answered_once_and_not_early(seed: int) -> None:
    assert storm(waiting, seed) == []


EARLY = {
    "due": (
        "gw_waiting.c",
        ">= position)\n            break;",
        ">= position + 64)\n            break;",
    ),
    "a repeat": ("waiting.pyx", "(may_be_due and", "(may_be_due or"),
    "sink": ("gw_waiting.c", "gw_log_least_cursor(room->log)", "gw_log_durable(room->log)"),
}


@pytest.mark.parametrize("name", EARLY)
def test_the_storm_finds_an_answer_that_is_early(name: str) -> None:
    module = mutant(EARLY[name])
    assert any("early" in text for seed in range(10) for text in storm(module, seed, 500))


TWICE = {
    "due": (
        "waiting.pyx",
        "            for i in range(found):\n                self.confirm(",
        """            for i in range(found):
                if due[i].lsn % 1000 == 0:
                    entry = due[i]
                    own(&entry, <object>due[i].reply, list(<object>due[i].headers), None)
                    gw_room_enter(&self.room, kind, &entry)
                self.confirm(""",
    ),
    "at once": (
        "waiting.pyx",
        "            self.confirm(entry, now)\n        else:\n            self.park(kind, entry)",
        """            own(entry, reply, list(headers), more)
            self.confirm(entry, now)
            own(entry, reply, headers, more)
        self.park(kind, entry)""",
    ),
}
ROOM_FOR_TWO = ("waiting.pyx", "cdef gw_entry due[AT_ONCE]", "cdef gw_entry entry, due[AT_ONCE]")


@pytest.mark.parametrize("name", TWICE)
def test_the_storm_finds_an_answer_that_is_given_twice(name: str) -> None:
    module = mutant(TWICE[name], ROOM_FOR_TWO)
    assert any("2 answers" in text for seed in range(10) for text in storm(module, seed, 500))


def test_who_is_answered_is_not_answered_again_at_the_deadline() -> None:
    bench = Bench(durable_ms=40).start()
    request = bench.accept(DURABLE, 100)
    bench.log.move(durable=101)
    request.answer()
    time.sleep(0.06)
    bench.settle()
    bench.log.fail()
    assert len(request.answers) == 1


# ---- a line against a model ----------------------------------------------------------------------


def differs(module: ModuleType, seed: int, steps: int = 1500) -> str | None:
    """Enter and take out at random, beside a plain list. Returns the first difference."""
    chance = random.Random(seed)
    log: Any = Log()
    room = module.Waiting(log, WORKER, 1000, 1000, lambda *_: None, lambda *_: None)
    line: list[tuple[int, int, int]] = []  # lsn, until, number
    tail = now = 1000
    for number in range(steps):
        what = chance.random()
        if what < 0.7:
            tail, now = tail + chance.randrange(3), now + chance.randrange(3)
            in_order = chance.random() < 0.8
            lsn = tail if in_order else chance.randrange(1, tail)
            until = now + 300 - (0 if chance.random() < 0.8 else chance.randrange(250))
            line.append((lsn, until, number))
            room.enter(_waiting.BUSY, print, lsn, 0, 0, until, None, ("dev", b"%d" % number))
        elif what < 0.8:
            position = tail + 1 - chance.randrange(800)
            log.move(committed=position)
            found = room.due_busy()
            expected = [entry for entry in line if entry[0] < position]
            line = [entry for entry in line if entry[0] >= position]
            if [entry.lsn for entry in found] != sorted(entry[0] for entry in expected):
                return f"{number}: due in another order"
        else:
            found = room.late(now)
            expected = [entry for entry in line if entry[1] <= now]
            line = [entry for entry in line if entry[1] > now]
        if what >= 0.7:
            numbers = sorted(int(entry.more[1]) for entry in found)
            if numbers != sorted(entry[2] for entry in expected):
                return f"{number}: {numbers} for {expected}"
            for _ in found:
                room.send(lambda *_: None, 200, [], b"")
        if room.count != len(line):
            return f"{number}: {room.count} wait, not {len(line)}"
    return None


@pytest.mark.parametrize("seed", range(5))
def test_a_line_keeps_both_orders(seed: int) -> None:
    assert differs(waiting, seed) is None


LINES = {
    "any lsn stands in the row": ("entry->lsn >= last->lsn && ", ""),
    "any deadline stands in the row": (" && entry->until_ns >= last->until_ns", ""),
    "the deadlines in the heap are forgotten": (
        "    if (entry->until_ns < line->heap_until_ns)\n",
        "    if (!line->heap_count)\n",
    ),
    "who is late leaves no heap": ("i = found ? kept / 2 : 0;", "i = 0;"),
    "the row is not copied in order": ("row[i] = *in_row(line, i);", "row[i] = line->row[i];"),
}


@pytest.mark.parametrize("name", LINES)
def test_the_model_finds_a_line_that_is_wrong(name: str) -> None:
    module = mutant(("gw_waiting.c", *LINES[name]))
    assert any(differs(module, seed) for seed in range(10))
