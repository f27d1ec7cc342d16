"""Who waits for an acknowledgement is answered exactly once, never early, and no wake-up is lost.

A log of Python stands in for the compiled one, so that each order of events can be made.
"""

import inspect
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from gateway import _log, http, waiting
from gateway._log import NEVER
from gateway.http import DURABLE, ENQUEUE, SINK
from gateway.waiting import Line, Waiting

BODY = b'{"metrics":{"a":1}}'
RECEIPT = ("x-receipt", "r")


class FakeLog:
    """Positions that a test moves. `wait` keeps to the contract of `Log.wait`."""

    def __init__(self) -> None:
        self.durable = self.least_cursor = self.committed = 0
        self.state = _log.RUNNING
        self.states: dict[int, str] = {}
        self.counted: dict[int, int] = {}
        self.wanted: list[tuple[int, bool]] = []
        self.nudges = 0
        self.sleeping = False
        self.slept_for: tuple[int, int, int, int] | None = None
        self._word = 7
        self._changed = threading.Condition()

    def move(self, **positions: int) -> None:
        with self._changed:
            for name, value in positions.items():
                setattr(self, name, value)
            self._changed.notify_all()

    def want(self, worker: int, lsn: int, sink: bool) -> None:
        self.wanted.append((lsn, sink))

    def nudge(self, worker: int) -> None:
        with self._changed:
            self.nudges += 1
            self._word += 1
            self._changed.notify_all()

    def wait(
        self, worker: int, word: int, durable: int, sinks: int, committed: int, timeout_ms: int
    ) -> int:
        with self._changed:
            self.slept_for, self.sleeping = (durable, sinks, committed, timeout_ms), True
            self._changed.wait_for(
                lambda: (
                    self._word != word
                    or self.durable > durable
                    or self.least_cursor > sinks
                    or self.committed > committed
                    or self.state == _log.FAILED
                ),
                timeout_ms / 1000,
            )
            self.sleeping = False
            return self._word

    def state_of(self, lsn: int) -> str:
        return self.states.get(lsn, "delivered")

    def receipt(self, lsn: int) -> str:
        return f"receipt-{lsn}"

    def counter_add(self, block: int, index: int, n: int = 1) -> None:
        self.counted[index] = self.counted.get(index, 0) + n

    def observe(self, block: int, histogram: int, ns: int) -> None:
        self.counter_add(block, histogram)

    def count(self, name: str) -> int:
        return self.counted.get(_log.COUNTERS[name], 0)


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
        self.log: FakeLog | None = None
        self.seen: tuple[int, int] | None = None

    def __call__(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        if self.log is not None:
            self.seen = self.log.durable, self.log.least_cursor
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
    """A `Waiting` over a `FakeLog`."""

    def __init__(
        self, module: ModuleType = waiting, durable_ms: int = 60_000, sink_ms: int = 60_000
    ) -> None:
        self.log = FakeLog()
        self.refusals: list[int] = []

        def refuse(code: int, started_ns: int) -> http.Answer:
            self.refusals.append(code)
            return http.refusal(code)

        self.waiting: Waiting = module.Waiting(
            self.log, 3, durable_ms, sink_ms, lambda code, ingest: http.refusal(code), refuse
        )

    def start(self) -> "Bench":
        self.waiting.start()
        wait_for(lambda: self.log.sleeping)
        return self

    def accept(self, ack: int, lsn: int, duplicate: bool = False) -> Request:
        request = Request()
        request.log = self.log
        headers = [http.TYPE_JSON, RECEIPT]
        ingest: Any = Ingest(lsn, duplicate)
        self.waiting.accepted(request, ingest, ack, _log.now_ns(), headers)
        return request

    def asleep(self) -> None:
        wait_for(lambda: self.log.sleeping and not self.waiting._incoming)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench().start()
    yield bench
    bench.log.move(state=_log.FAILED)  # its thread goes on, slowly


# ---- when, and what ------------------------------------------------------------------------------


def test_durable_is_answered_when_the_position_has_passed_not_before(bench: Bench) -> None:
    request = bench.accept(DURABLE, 100)
    bench.log.move(durable=100, least_cursor=200, committed=200)
    bench.asleep()
    assert request.answers == []
    bench.log.move(durable=101)
    status, headers, body = request.answer()
    assert (status, headers["x-ack"], body) == (202, "durable", {"ack": "durable"})
    assert headers["x-receipt"] == "r"
    assert bench.log.wanted == [(100, False)]
    assert bench.log.count("acks_durable") == bench.log.count("ack_ns") == 1


def test_sink_is_answered_when_every_cursor_has_passed_not_before(bench: Bench) -> None:
    request = bench.accept(SINK, 100)
    bench.log.move(durable=200, least_cursor=100)
    bench.asleep()
    assert request.answers == []
    bench.log.move(least_cursor=101)
    status, headers, body = request.answer()
    assert (status, headers["x-ack"], body) == (200, "sink", {"ack": "sink"})
    assert bench.log.wanted == [(100, True)]
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
    requests = [bench.accept(SINK, lsn) for lsn in range(1, 5000)]
    for request in requests:
        assert request.answer()[0] == 504
    bench.accept(SINK, 6000)
    wait_for(lambda: bench.waiting.count == 0)
    assert len(bench.waiting._sink._by_lsn) <= 2 * waiting.COMPACT_MIN


def test_who_was_late_behind_one_who_waits_is_not_kept() -> None:
    line, count = Line(1000), 10_000
    first = waiting._Entry(Request(), 1, 1, 0, NEVER, [], None)
    line.add(first)
    for number in range(count):
        line.add(waiting._Entry(Request(), 10 + number, 1, 0, number, [], None))
    line._by_arrival.rotate(-1)  # it came last, for the place of an old event
    for entry in line.late(count):
        entry.reply = None
    assert len(line._by_lsn) <= 2 * waiting.COMPACT_MIN
    assert next(line.due(2)) is first


def test_a_failed_log_ends_every_wait_with_500_within_a_second(bench: Bench) -> None:
    requests = [bench.accept(ack, 100 * ack) for ack in (DURABLE, SINK)]
    bench.log.move(state=_log.FAILED, durable=1000, least_cursor=1000)
    for request in [*requests, bench.accept(DURABLE, 5), bench.accept(SINK, 5, duplicate=True)]:
        assert request.answer(1.0)[2]["code"] == "internal"
    assert bench.waiting.count == 0
    assert bench.log.count("acks_durable") == bench.log.count("acks_sink") == 0


def test_the_end_answers_who_is_due_and_gives_the_rest_504(bench: Bench) -> None:
    due, rest = bench.accept(DURABLE, 100), bench.accept(SINK, 100)
    bench.log.durable = 101  # the last sync, and nobody is woken
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
    bench.asleep()
    assert again.events == []
    bench.log.move(committed=101)
    status, headers, body = request.answer()
    assert (status, body, headers["x-ack"]) == (202, {"ack": "enqueue"}, "enqueue")
    assert (headers["x-duplicate"], headers["x-receipt"]) == ("true", "r2")
    assert headers["x-log-used"] == "60"
    assert again.events == [("dev", BODY, True)]
    assert again.opened == 0
    assert bench.log.wanted == []


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
    assert bench.log.wanted == [(300, True)]
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
    bench.log.move(state=_log.FAILED)
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
    assert bench.log.nudges == 1
    bench.asleep()
    bench.accept(DURABLE, 200)
    bench.accept(DURABLE, 300)
    assert bench.log.nudges == 1, "the wake-up for 100 serves them too"
    bench.accept(DURABLE, 50, duplicate=True)
    assert bench.log.nudges == 2
    bench.asleep()
    bench.accept(SINK, 300)
    assert bench.log.nudges == 3
    bench.asleep()
    bench.log.move(durable=400)
    first.answer()


def test_clients_that_come_back_at_once_cost_no_nudge(bench: Bench) -> None:
    for lsn in range(100, 200):
        request = bench.accept(DURABLE, lsn)
        bench.log.move(durable=lsn + 1)
        assert request.answer()[0] == 202
        bench.asleep()
    assert bench.log.nudges == 1


def test_an_idle_waiter_sleeps(bench: Bench) -> None:
    bench.asleep()
    assert bench.log.slept_for == (NEVER, NEVER, NEVER, waiting.IDLE_MS)


def test_a_short_deadline_holds_for_who_comes_while_the_waiter_lingers() -> None:
    bench = Bench(durable_ms=50, sink_ms=60_000).start()
    first = bench.accept(DURABLE, 100)
    bench.log.move(durable=101)
    assert first.answer()[0] == 202
    bench.asleep()
    began = time.monotonic()
    assert bench.accept(DURABLE, 200).answer()[0] == 504
    assert time.monotonic() - began < 0.5


def mutant(old: str, new: str) -> ModuleType:
    """`gateway.waiting` with one place changed."""
    source = inspect.getsource(waiting)
    assert source.count(old) == 1
    module = ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), vars(module))
    return module


def newcomer_just_before_the_sleep(module: ModuleType) -> Request:
    """One comes after the waiter has looked at `incoming`, before it has said what it sleeps
    for."""
    bench = Bench(module).start()
    requests: list[Request] = []
    sleep = bench.waiting._durable.sleep

    def interrupted(idle: int) -> None:
        if not requests:
            requests.append(bench.accept(DURABLE, 50))
            bench.log.durable = 51
        sleep(idle)

    bench.waiting._durable.sleep = interrupted  # type: ignore[method-assign]
    bench.waiting._log.nudge(3)  # one more round
    wait_for(lambda: requests)
    return requests[0]


def test_who_comes_just_before_the_sleep_is_seen() -> None:
    assert newcomer_just_before_the_sleep(waiting).answer(0.5)[0] == 202


def test_without_the_second_look_the_newcomer_would_wait() -> None:
    blind = mutant("if self._incoming:\n            return word", "if False:\n            return")
    request = newcomer_just_before_the_sleep(blind)
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
            log.move(least_cursor=log.durable)

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
    log.move(state=_log.FAILED)
    wrong = []
    for ack, lsn, request in requests:
        assert request.seen is not None
        if len(request.answers) != 1:
            wrong.append(f"{lsn}: {len(request.answers)} answers")
        elif request.answers[0][0] == 504:
            wrong.append(f"{lsn}: late")
        elif request.seen[ack == SINK] <= lsn:
            wrong.append(f"{lsn}: early")
    return wrong


@pytest.mark.parametrize("seed", range(3))
def test_in_a_storm_each_is_answered_once_and_not_early(seed: int) -> None:
    assert storm(waiting, seed) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self._durable.due(durable)", "self._durable.due(durable + 64)"),
        ("self._sink.due(sinks)", "self._sink.due(durable)"),
    ],
)
def test_the_storm_finds_a_waiter_that_answers_early(old: str, new: str) -> None:
    early = any(
        "early" in text for seed in range(10) for text in storm(mutant(old, new), seed, 500)
    )
    assert early


def answers_after_the_deadline(module: ModuleType) -> int:
    bench = Bench(module, durable_ms=40).start()
    request = bench.accept(DURABLE, 100)
    bench.log.move(durable=101)
    request.answer()
    time.sleep(0.06)
    bench.waiting._log.nudge(3)  # one more round
    bench.asleep()
    bench.log.move(state=_log.FAILED)
    return len(request.answers)


def test_who_is_answered_is_not_answered_again_at_the_deadline() -> None:
    assert answers_after_the_deadline(waiting) == 1
    forgetful = mutant(
        "reply, entry.reply = entry.reply, None\n        if", "reply = entry.reply\n        if"
    )
    assert answers_after_the_deadline(forgetful) > 1


def test_a_line_keeps_both_orders() -> None:
    chance = random.Random(1)
    line = Line(1000)
    entries = [
        waiting._Entry(Request(), chance.randrange(10_000), 1, 0, now, [], None)
        for now in range(500)
    ]
    for entry in entries:
        line.add(entry)
    for entry in line.late(99):
        assert entry.until_ns <= 99
        entry.reply = None
    assert [entry.until_ns for entry in entries if entry.reply is None] == list(range(100))
    due = []
    for entry in line.due(5000):
        due.append(entry.lsn)
        entry.reply = None
    assert due == sorted(entry.lsn for entry in entries[100:] if entry.lsn < 5000)
    assert line.until_ns <= min(entry.until_ns for entry in entries if entry.reply is not None)
