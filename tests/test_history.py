"""The checker of tests/history.py: a true history passes, and each kind of lie is found as that.

`Model` is a gateway of twenty lines: a log with a window, an index, a disk that syncs and a broker
that records. Its histories are true; each corruption changes one of them in one way."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from tests.history import (
    CUT,
    UNKNOWN,
    Arrival,
    Attempt,
    DeadLetter,
    End,
    Event,
    Nemesis,
    Receipt,
    Rows,
    Setup,
    Sync,
    Verdict,
    body_hash,
    check,
    encode,
    event_of,
    read,
)

SIZE = 64
CAPACITY = 16 * SIZE
STEP = st.tuples(
    st.sampled_from(
        ["new", "new", "new", "repeat", "old", "conflict", "no seq", "bad", "cut", "full", "boot"]
    ),
    st.integers(0, 2),
    st.sampled_from(["enqueue", "durable", "sink"]),
    st.sampled_from(["answered", "answered", "answered", "lost before", "lost behind"]),
    st.booleans(),
)


@dataclass
class Model:
    """Takes steps, one request each, and writes the history of a gateway that is right."""

    rows: list[Rows] = field(default_factory=lambda: [Setup("recording", CAPACITY, traced=True)])
    time: float = 0.0
    tail: int = SIZE
    index: dict[tuple[str, int, int], tuple[int, Event]] = field(default_factory=dict)
    log: dict[int, Event] = field(default_factory=dict)
    boot: Counter[str] = field(default_factory=Counter)
    seq: Counter[str] = field(default_factory=Counter)
    sent: dict[str, list[Event]] = field(default_factory=dict)
    cursor: int = SIZE
    dead: set[Event] = field(default_factory=set)

    def tick(self) -> float:
        self.time += 1.0
        return self.time

    def step(self, what: str, number: int, ack: str, outcome: str, drain: bool) -> None:
        device = f"d{number}" if number else "refused"
        if what == "boot":
            self.boot[device] += 1
            self.seq[device] = 0
        old = [event for event in self.sent.get(device, []) if event.seq is not None]
        if what in ("repeat", "old", "conflict") and old:
            event = old[0] if what == "old" else old[-1]
            if what == "conflict":
                event = event._replace(body=f"other {self.time}")
        else:
            self.seq[device] += 1
            seq = None if what == "no seq" else self.seq[device]
            event = Event(device, self.boot[device], seq, f"body {self.time}")
        self.request(event, ack, outcome, what)
        if drain:
            self.drain()

    def request(self, event: Event, ack: str, outcome: str, what: str = "") -> Attempt:
        sent = self.tick()
        status, lsn, duplicate, reached = UNKNOWN, None, False, None
        if what in ("bad", "full", "cut"):
            status = {"bad": 400, "full": 503, "cut": CUT}[what]
        elif outcome != "lost before":
            status, lsn, duplicate = self.take(event)
        if lsn is not None:
            if ack == "durable":
                self.rows.append(Sync(self.tick(), self.tick()))
                status, reached = 202, "durable"
            elif ack == "sink" and event not in self.dead:
                self.drain()
                status, reached = (202, "enqueue") if event in self.dead else (200, "sink")
            else:
                status, reached = 202, "enqueue"
        if outcome != "answered":
            status, lsn, duplicate, reached = UNKNOWN, None, False, None
        receipt = None if lsn is None else f"receipt-{lsn}"
        answer = Attempt(
            "c", event, ack, sent, self.tick(), status, reached, lsn, receipt, duplicate
        )
        self.rows.append(answer)
        if status not in (400, 503, CUT, 409):
            self.sent.setdefault(event.device, []).append(event)
        return answer

    def take(self, event: Event) -> tuple[int, int | None, bool]:
        found = self.index.get(event.key) if event.key else None
        if found is not None and self.tail <= found[0] + CAPACITY:
            lsn, first = found
            return (202, lsn, True) if first == event else (409, None, False)
        lsn, self.tail = self.tail, self.tail + SIZE
        self.log[lsn] = event
        if event.key:
            self.index[event.key] = (lsn, event)
        return 202, lsn, False

    def drain(self) -> None:
        while self.cursor < self.tail:
            event = self.log[self.cursor]
            if event.device == "refused":
                self.dead.add(event)
                self.rows.append(DeadLetter(event))
            else:
                self.rows.append(Arrival(event, self.tick()))
                if self.cursor % 5 == 0:
                    self.rows.append(Arrival(event, self.tick()))
            self.cursor += SIZE

    def end(self) -> list[Rows]:
        self.request(Event("last", 0, 1, "last"), "enqueue", "answered")
        self.drain()
        accepted = [row for row in self.rows if isinstance(row, Attempt) and row.accepted]
        for attempt in accepted:
            state = "dead_lettered" if attempt.event in self.dead else "delivered"
            if attempt.lsn is not None and attempt.lsn + CAPACITY < self.tail:
                state = "finished"
            asked = self.tick()
            self.rows.append(Receipt(attempt.event, state, asked, self.tick(), final=True))
        self.rows.append(End(0))
        return self.rows


def history(steps: list[tuple[str, int, str, str, bool]]) -> list[Rows]:
    model = Model()
    for step in steps:
        model.step(*step)
    return model.end()


HISTORIES = st.lists(STEP, max_size=60).map(history)
FIXED = history(
    [
        ("new", 1, "enqueue", "answered", False),
        ("new", 1, "durable", "answered", True),
        ("conflict", 1, "enqueue", "answered", False),
        ("repeat", 1, "sink", "answered", False),
        ("new", 2, "sink", "answered", True),
        ("cut", 2, "enqueue", "answered", False),
        ("bad", 2, "enqueue", "answered", False),
        ("new", 0, "enqueue", "answered", True),
        ("new", 1, "enqueue", "answered", True),
        ("no seq", 1, "enqueue", "answered", True),
    ]
)


@given(HISTORIES)
@settings(max_examples=300, deadline=None)
def test_true_history_passes(rows):
    verdict = check(rows)
    assert verdict.ok, str(verdict)


def test_true_history_is_counted():
    verdict = check(FIXED)
    assert verdict.ok, str(verdict)
    assert (verdict.accepted, verdict.delivered, verdict.dead_lettered) == (7, 6, 1)
    assert (verdict.duplicates, verdict.conflicts) == (1, 1)
    assert verdict.answers["202 durable"] == 1
    assert verdict.answers["200 sink"] == 2


def test_history_is_read_as_it_was_written(tmp_path):
    (tmp_path / "h.ndjson").write_bytes(b"".join(encode(row) + b"\n" for row in FIXED))
    assert list(read(tmp_path / "h.ndjson")) == FIXED


# ---- corruptions -----------------------------------------------------------------------------


class NothingFits(Exception):
    """This history has nothing that could be corrupted so."""


def find(rows: list[Rows], condition: Callable[[Attempt], bool]) -> Attempt:
    """The first attempt that fits."""
    for row in rows:
        if isinstance(row, Attempt) and condition(row):
            return row
    raise NothingFits


def without(rows: list[Rows], event: Event) -> list[Rows]:
    """Its arrivals and receipts never were."""
    return [row for row in rows if not (isinstance(row, Arrival | Receipt) and row.event == event)]


def changed(rows: list[Rows], row: Rows, **fields: object) -> list[Rows]:
    return [msgspec.structs.replace(r, **fields) if r is row else r for r in rows]


def after(rows: list[Rows], row: Rows, *more: Rows) -> list[Rows]:
    at = next(i for i, r in enumerate(rows) if r is row) + 1
    return [*rows[:at], *more, *rows[at:]]


def accepted_and_delivered(rows: list[Rows]) -> Callable[[Attempt], bool]:
    arrived = {row.event for row in rows if isinstance(row, Arrival)}
    return lambda a: a.accepted and a.event in arrived and a.event.device != "last"


def is_fresh(a: Attempt) -> bool:
    """Accepted with a key, and not the last event: behind that one no window is decided."""
    return a.accepted and not a.duplicate and a.event.seq is not None and a.event.device != "last"


def an_event_never_arrives(rows: list[Rows]) -> list[Rows]:
    return without(rows, find(rows, accepted_and_delivered(rows)).event)


def two_events_change_places(rows: list[Rows]) -> list[Rows]:
    first_accepted = {}
    for row in rows:
        if isinstance(row, Attempt) and row.accepted:
            first_accepted.setdefault(row.event, row.answered)
    firsts: dict[str, Arrival] = {}
    seen = set()
    for row in rows:
        if not isinstance(row, Arrival) or row.event in seen:
            continue
        seen.add(row.event)
        earlier = firsts.get(row.event.device)
        if earlier is not None:
            sent = min(
                r.sent
                for r in rows
                if isinstance(r, Attempt) and r.event == row.event and r.possible
            )
            if first_accepted.get(earlier.event, sent) < sent:
                late = [earlier, *(r for r in rows if r == earlier)]
                rest = [r for r in rows if not isinstance(r, Arrival) or r.event != earlier.event]
                return after(rest, row, *late[:1])
        firsts[row.event.device] = row
    raise NothingFits


def sink_is_answered_before_the_arrival(rows: list[Rows]) -> list[Rows]:
    lie = find(rows, lambda a: a.reached == "sink")
    first = next(row for row in rows if isinstance(row, Arrival) and row.event == lie.event)
    return changed(rows, lie, answered=first.time - 0.5)


def sink_is_answered_for_a_dead_letter(rows: list[Rows]) -> list[Rows]:
    lie = find(rows, lambda a: a.accepted and a.event.device == "refused")
    return changed(rows, lie, status=200, reached="sink")


def accepted_at_once(rows: list[Rows]) -> Callable[[Attempt], bool]:
    """Accepted at the first attempt: no sync before can have covered it."""
    first: dict[Event, Attempt] = {}
    for row in rows:
        if isinstance(row, Attempt):
            first.setdefault(row.event, row)
    return lambda a: a.accepted and first[a.event] is a


def durable_is_answered_without_a_sync(rows: list[Rows]) -> list[Rows]:
    find(rows, lambda a: a.reached == "durable")
    return [row for row in rows if not isinstance(row, Sync)]


def durable_is_answered_before_the_sync_returned(rows: list[Rows]) -> list[Rows]:
    at_once = accepted_at_once(rows)
    lie = find(rows, lambda a: a.reached == "durable" and at_once(a))
    return changed(rows, lie, answered=lie.sent + 1.5)


def durable_rests_on_a_sync_that_had_begun(rows: list[Rows]) -> list[Rows]:
    at_once = accepted_at_once(rows)
    lie = find(rows, lambda a: a.reached == "durable" and at_once(a))
    return [
        msgspec.structs.replace(row, started=lie.sent - 0.5)
        if isinstance(row, Sync) and lie.sent < row.started < lie.answered
        else row
        for row in rows
    ]


def durable_rests_on_a_sync_that_failed(rows: list[Rows]) -> list[Rows]:
    find(rows, lambda a: a.reached == "durable")
    return [
        msgspec.structs.replace(row, failed=True) if isinstance(row, Sync) else row for row in rows
    ]


def a_key_is_accepted_twice(rows: list[Rows]) -> list[Rows]:
    once = find(rows, is_fresh)
    assert once.lsn is not None
    twice = msgspec.structs.replace(
        once, sent=once.answered + 0.1, answered=once.answered + 0.2, lsn=once.lsn + SIZE // 2
    )
    return after(rows, once, twice)


def a_repeat_is_not_marked(rows: list[Rows]) -> list[Rows]:
    once = find(rows, is_fresh)
    return after(rows, once, msgspec.structs.replace(once, sent=once.answered + 0.1))


def a_repeat_is_a_conflict(rows: list[Rows]) -> list[Rows]:
    once = find(rows, is_fresh)
    return after(
        rows,
        once,
        Attempt("c", once.event, "enqueue", once.answered + 0.1, once.answered + 0.2, 409),
    )


def a_repeat_is_a_conflict_beside_another_body(rows: list[Rows]) -> list[Rows]:
    once = find(rows, is_fresh)
    other = once.event._replace(body="another")
    t = once.answered
    return after(
        rows,
        once,
        Attempt("c", other, "enqueue", t + 0.1, t + 0.2, UNKNOWN),
        Attempt("c", once.event, "enqueue", t + 0.3, t + 0.4, 409),
    )


def another_body_is_accepted(rows: list[Rows]) -> list[Rows]:
    once = find(rows, is_fresh)
    assert once.lsn is not None
    other = msgspec.structs.replace(
        once,
        event=once.event._replace(body="another"),
        sent=once.answered + 0.1,
        answered=once.answered + 0.2,
        lsn=once.lsn + SIZE // 2,
        reached="enqueue",
    )
    arrival = Arrival(other.event, other.answered)
    return after(rows, once, other, arrival)


def another_body_passes_for_a_repeat(rows: list[Rows]) -> list[Rows]:
    once = find(rows, is_fresh)
    other = msgspec.structs.replace(
        once,
        event=once.event._replace(body="another"),
        sent=once.answered + 0.1,
        answered=once.answered + 0.2,
        duplicate=True,
    )
    return after(rows, once, other)


def a_first_is_marked_as_a_repeat(rows: list[Rows]) -> list[Rows]:
    attempts = Counter(row.event for row in rows if isinstance(row, Attempt))
    once = find(rows, lambda a: a.accepted and a.event.seq is not None and attempts[a.event] == 1)
    return changed(rows, once, duplicate=True)


def a_refused_event_arrives(rows: list[Rows]) -> list[Rows]:
    refused = find(rows, lambda a: a.status in (400, 503))
    return after(rows, refused, Arrival(refused.event, refused.answered))


def half_a_body_arrives(rows: list[Rows]) -> list[Rows]:
    cut = find(rows, lambda a: a.status == CUT)
    return after(rows, cut, Arrival(cut.event, cut.answered))


def a_refused_event_becomes_a_dead_letter(rows: list[Rows]) -> list[Rows]:
    refused = find(rows, lambda a: a.status in (400, 503))
    return after(rows, refused, DeadLetter(refused.event))


def a_torn_body_arrives(rows: list[Rows]) -> list[Rows]:
    event = find(rows, lambda a: a.accepted).event
    return [*rows, Arrival(event._replace(body="torn"), 1e9)]


def a_receipt_says_delivered_too_early(rows: list[Rows]) -> list[Rows]:
    a = find(rows, accepted_and_delivered(rows))
    a = find(rows, lambda first: first.event == a.event)
    return [*rows, Receipt(a.event, "delivered", a.sent, a.sent)]


def a_receipt_says_finished_of_what_is_lost(rows: list[Rows]) -> list[Rows]:
    a = find(rows, accepted_and_delivered(rows))
    return [*without(rows, a.event), Receipt(a.event, "finished", 1e9, 1e9)]


def a_receipt_says_durable_without_a_sync(rows: list[Rows]) -> list[Rows]:
    a = find(rows, accepted_at_once(rows))
    return [*rows, Receipt(a.event, "durable", a.sent, a.sent + 0.5)]


def a_receipt_never_ends(rows: list[Rows]) -> list[Rows]:
    a = find(rows, lambda a: a.accepted)
    return [*rows, Receipt(a.event, "enqueued", 1e9, 1e9, final=True)]


def a_receipt_says_dead_lettered_of_what_is_not(rows: list[Rows]) -> list[Rows]:
    a = find(rows, accepted_and_delivered(rows))
    return [*rows, Receipt(a.event, "dead_lettered", 1e9, 1e9)]


def a_receipt_says_lost(rows: list[Rows]) -> list[Rows]:
    a = find(rows, lambda a: a.accepted)
    return [*rows, Receipt(a.event, "lost", 1e9, 1e9)]


def a_receipt_is_missing(rows: list[Rows]) -> list[Rows]:
    return changed(rows, find(rows, lambda a: a.accepted), lsn=None)


def two_events_have_one_receipt(rows: list[Rows]) -> list[Rows]:
    last = find(rows, lambda a: a.event.device == "last")
    first = find(rows, lambda a: a.accepted and a.event != last.event)
    return changed(rows, last, lsn=first.lsn)


def the_books_do_not_balance(rows: list[Rows]) -> list[Rows]:
    return [*rows[:-1], End(-1)]


CORRUPTIONS: list[tuple[str, Callable[[list[Rows]], list[Rows]]]] = [
    ("lost", an_event_never_arrives),
    ("out_of_order", two_events_change_places),
    ("acked_early", sink_is_answered_before_the_arrival),
    ("acked_early", sink_is_answered_for_a_dead_letter),
    ("acked_early", durable_is_answered_without_a_sync),
    ("acked_early", durable_is_answered_before_the_sync_returned),
    ("acked_early", durable_rests_on_a_sync_that_had_begun),
    ("acked_early", durable_rests_on_a_sync_that_failed),
    ("doubled", a_key_is_accepted_twice),
    ("doubled", a_repeat_is_not_marked),
    ("misjudged", a_repeat_is_a_conflict),
    ("misjudged", a_repeat_is_a_conflict_beside_another_body),
    ("misjudged", another_body_is_accepted),
    ("misjudged", another_body_passes_for_a_repeat),
    ("misjudged", a_first_is_marked_as_a_repeat),
    ("leaked", a_refused_event_arrives),
    ("leaked", half_a_body_arrives),
    ("leaked", a_refused_event_becomes_a_dead_letter),
    ("invented", a_torn_body_arrives),
    ("false_receipts", a_receipt_says_delivered_too_early),
    ("false_receipts", a_receipt_says_finished_of_what_is_lost),
    ("false_receipts", a_receipt_says_durable_without_a_sync),
    ("false_receipts", a_receipt_never_ends),
    ("false_receipts", a_receipt_says_dead_lettered_of_what_is_not),
    ("false_receipts", a_receipt_says_lost),
    ("false_receipts", a_receipt_is_missing),
    ("false_receipts", two_events_have_one_receipt),
    ("unexplained", the_books_do_not_balance),
]


@pytest.mark.parametrize(("name", "corrupt"), CORRUPTIONS, ids=lambda x: getattr(x, "__name__", x))
def test_each_lie_is_found_in_a_history_with_every_kind_of_row(name, corrupt):
    verdict = check(corrupt(FIXED))
    assert not verdict.ok
    assert getattr(verdict, name) > 0, str(verdict)


def test_every_count_that_must_be_zero_has_a_lie_that_raises_it():
    assert {name for name, _ in CORRUPTIONS} == set(Verdict.MUST_BE_ZERO)


@pytest.mark.parametrize(("name", "corrupt"), CORRUPTIONS, ids=lambda x: getattr(x, "__name__", x))
@given(st.lists(STEP, min_size=10, max_size=60))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_each_lie_is_found_in_any_history(name, corrupt, steps):
    try:
        verdict = check(corrupt(history(steps)))
    except NothingFits:
        reject()
    assert getattr(verdict, name) > 0, str(verdict)


# ---- what is no violation --------------------------------------------------------------------


def test_key_that_was_lapped_is_accepted_again():
    steps = [("new", 1, "enqueue", "answered", True)] * 40
    model = Model()
    for step in steps:
        model.step(*step)
    model.step("old", 1, "enqueue", "answered", True)
    rows = model.end()
    again = [row for row in rows if isinstance(row, Attempt)][-2]
    assert not again.duplicate
    assert check(rows).ok


def test_event_whose_answer_nobody_read_may_come_late():
    a, b = Event("d", 0, 1, "a"), Event("d", 0, 2, "b")
    rows: list[Rows] = [
        Setup("recording", CAPACITY),
        Attempt("c", a, "enqueue", 1, 2, UNKNOWN),
        Attempt("c", b, "enqueue", 3, 4, 202, "enqueue", 64),
        Arrival(b, 5),
        Arrival(a, 6),
    ]
    assert check(rows).ok


def forgetful(device: str, later_arrival: float) -> Verdict:
    """A Mosquitto that is killed at 10; a later event, of `device`, arrives at that time."""
    a, b = Event("d", 0, 1, "a"), Event(device, 0, 2, "b")
    return check(
        [
            Setup("mosquitto", CAPACITY),
            Attempt("c", a, "enqueue", 1, 2, 202, "enqueue", 64),
            Attempt("c", b, "enqueue", 3, 4, 202, "enqueue", 128),
            Nemesis(10, "broker", "kill", forgets=True),
            Arrival(b, later_arrival),
            Receipt(a, "delivered", 20, 21, final=True),
        ]
    )


def test_what_a_killed_broker_forgot_is_not_lost_by_the_gateway():
    verdict = forgetful("d", later_arrival=11)
    assert verdict.ok, str(verdict)
    assert verdict.forgotten == 1


@pytest.mark.parametrize("device", ["d", "another"])
def test_event_that_others_overtook_before_the_broker_was_killed_is_lost(device):
    verdict = forgetful(device, later_arrival=9)
    assert (verdict.forgotten, verdict.lost, verdict.false_receipts) == (0, 1, 1)


def test_event_that_was_sent_after_the_broker_was_killed_is_lost():
    a = Event("d", 0, 1, "a")
    rows: list[Rows] = [
        Setup("mosquitto", CAPACITY),
        Nemesis(10, "broker", "kill", forgets=True),
        Attempt("c", a, "enqueue", 11, 12, 202, "enqueue", 64),
    ]
    assert check(rows).lost == 1


def accepted_again(killed: float) -> Verdict:
    """`a` is accepted at 2 and, lapped, at 22; it arrives once, behind `b` that was sent at 12."""
    a, b = Event("d", 0, 1, "a"), Event("d", 0, 2, "b")
    return check(
        [
            Setup("mosquitto", CAPACITY),
            Attempt("c", a, "enqueue", 1, 2, 202, "enqueue", 64),
            Nemesis(killed, "broker", "kill", forgets=True),
            Attempt("c", b, "enqueue", 12, 13, 202, "enqueue", 640),
            Arrival(b, 14),
            Attempt("c", a, "enqueue", 21, 22, 202, "enqueue", 6400),
            Arrival(a, 23),
        ]
    )


def test_event_that_a_broker_forgot_may_come_late_when_it_is_accepted_again():
    assert accepted_again(killed=5).ok


def test_event_that_no_broker_can_have_forgotten_must_not_come_late():
    assert accepted_again(killed=0.5).out_of_order == 1
    assert accepted_again(killed=21.5).out_of_order == 1


def test_spliced_time_of_receipt_does_not_change_an_event():
    sent = b'{"seq":5,"boot":2,"metrics":{"a":1}}'
    published = b'{"ts":"2025-09-23T11:18:41.000000Z",' + sent[1:]
    assert event_of("d", published) == event_of("d", sent) == Event("d", 2, 5, body_hash(sent))
