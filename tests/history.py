"""The history of a run, and the checker that judges it.

A history is what clients, the broker's side, the disk and whoever broke things saw, on one clock
(CLOCK_MONOTONIC in seconds), one JSON row a line:

    setup        what was run: broker, capacity of the log, seed
    attempt      one request: event, ack asked for, sent, answered, status, what the answer said
    arrival      one PUBLISH at the broker (written before its PUBACK) or at a subscriber
    dead_letter  one line of the dead-letter files
    sync         one fdatasync of the log: started, returned
    receipt      what /v1/receipts said
    nemesis      what was done to whom
    end          the gateway's own books when all was drained

`check` is a pure function of these rows. An event is (device, boot, seq, hash of its body); without
a seq the hash alone tells it apart, so bodies without a seq must differ. What is judged:

    lost          2xx, and it neither arrived nor became a dead letter
    out_of_order  of one device: x arrived first before y did, though y's 2xx was read before x was
                  first sent, so that y stands below x in the log
    acked_early   `sink` read before its event was at the recording broker; `durable` without an
                  fdatasync that started after the event was first sent and returned before the read
    doubled       one key, two records: two lsn, or two 2xx without X-Duplicate, in the window
    misjudged     409 though the same body stands in the window, or nothing that conflicts was sent;
                  2xx for another body of the same key; X-Duplicate on a repeat of nothing
    leaked        every attempt of it was refused or cut short, and yet it arrived
    invented      it arrived, and nobody sent it: torn, stale or forged
    false_receipts  "delivered" before or without arrival, "finished" without an end, "durable"
                  without a sync, "lost" without a power cut, one lsn for two events, a 2xx without
    unexplained   what the books cannot explain

All of these must be 0. Repeated and unknown are counted: at least once, and a closed socket says
nothing. `forgotten` counts what a broker without persistence took with it when it was killed.

The window of a key is the last `capacity` bytes claimed. The tail at time t is at most the least
lsn of a fresh 2xx that was sent after t: with that bound a verdict about the window is never
wrong, and what it cannot decide is not judged.
"""

import bisect
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple

import msgspec

UNKNOWN = 0
"""Status of a request whose socket closed or whose answer did not come in time."""
CUT = -1
"""Status of a request whose body was not sent whole: it cannot be in the log."""


class Event(NamedTuple):
    """What makes an event this one and no other."""

    device: str
    boot: int | None
    seq: int | None
    body: str

    @property
    def key(self) -> tuple[str, int, int] | None:
        """The idempotency key, or None without a seq."""
        return None if self.seq is None else (self.device, self.boot or 0, self.seq)


class Row(msgspec.Struct, tag_field="kind", tag=str.lower, omit_defaults=True, gc=False):
    """Base of all rows."""


class Setup(Row, tag="setup"):
    broker: str
    """`recording`: arrivals were written before their PUBACK; `mosquitto`: by a subscriber."""
    capacity: int
    seed: int = 0
    traced: bool = False
    """Whether there are sync rows."""


class Attempt(Row, tag="attempt"):
    client: str
    event: Event
    ack: str
    sent: float
    answered: float
    status: int
    reached: str | None = None
    """X-Ack of the answer."""
    lsn: int | None = None
    """Of X-Receipt."""
    receipt: str | None = None
    duplicate: bool = False
    code: str | None = None
    """Of a refusal."""

    @property
    def accepted(self) -> bool:
        return 200 <= self.status < 300

    @property
    def possible(self) -> bool:
        """It may have put its event into the log."""
        return self.accepted or self.status in (UNKNOWN, 500, 504)


class Arrival(Row, tag="arrival"):
    event: Event
    time: float


class DeadLetter(Row, tag="dead_letter"):
    event: Event
    reason: str = ""


class Sync(Row, tag="sync"):
    started: float
    returned: float
    failed: bool = False


class Receipt(Row, tag="receipt"):
    event: Event
    state: str
    asked: float
    answered: float
    final: bool = False
    """Asked for when everything was drained."""


class Nemesis(Row, tag="nemesis"):
    time: float
    target: str
    action: str
    forgets: bool = False
    """The broker was killed, and keeps no messages."""


class End(Row, tag="end"):
    unexplained: int


Rows = Setup | Attempt | Arrival | DeadLetter | Sync | Receipt | Nemesis | End

encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Rows).decode


def read(file: Path) -> Iterator[Rows]:
    """The rows of a file."""
    with file.open("rb") as lines:
        for line in lines:
            yield _decode(line)


_SPLICED = re.compile(rb'^\{"ts":"[^"]*",')
_KEY = re.compile(rb'"(boot|seq)":(\d+)')


def body_hash(body: bytes) -> str:
    """Of a body; a `ts` that opens it does not count: the publisher may have put it there."""
    return hashlib.blake2b(_SPLICED.sub(b"{", body, count=1), digest_size=8).hexdigest()


def event_of(device: str, body: bytes) -> Event:
    """From a published body whose keys stand in its first 128 bytes."""
    keys = {name: int(value) for name, value in _KEY.findall(body, 0, 128)}
    return Event(device, keys.get(b"boot"), keys.get(b"seq"), body_hash(body))


# ---- the verdict -----------------------------------------------------------------------------


@dataclass
class Verdict:
    """Counts, and the first few examples of each violation."""

    MUST_BE_ZERO: ClassVar[tuple[str, ...]] = (
        "lost",
        "out_of_order",
        "acked_early",
        "doubled",
        "misjudged",
        "leaked",
        "invented",
        "false_receipts",
        "unexplained",
    )  # fmt: skip
    EXAMPLES_MAX: ClassVar[int] = 10

    attempts: int = 0
    events: int = 0
    accepted: int = 0
    """Events with a 2xx."""
    delivered: int = 0
    repeated: int = 0
    dead_lettered: int = 0
    unknown: int = 0
    """Attempts."""
    duplicates: int = 0
    """2xx with X-Duplicate."""
    conflicts: int = 0
    """409."""
    receipts: int = 0
    receipts_unknown: int = 0
    forgotten: int = 0
    lost: int = 0
    out_of_order: int = 0
    acked_early: int = 0
    doubled: int = 0
    misjudged: int = 0
    leaked: int = 0
    invented: int = 0
    false_receipts: int = 0
    unexplained: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    """2xx by X-Ack, refusals by code or status."""
    nemesis: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def violation(self, name: str, what: object) -> None:
        count = getattr(self, name) + 1
        setattr(self, name, count)
        if count <= self.EXAMPLES_MAX:
            self.examples.append(f"{name}: {what}")

    @property
    def ok(self) -> bool:
        return not any(getattr(self, name) for name in self.MUST_BE_ZERO)

    def __str__(self) -> str:
        counts = {n: v for n, v in asdict(self).items() if isinstance(v, int)}
        lines = [" ".join(f"{name}={value}" for name, value in counts.items())]
        for name in ("answers", "nemesis"):
            rows = sorted(getattr(self, name).items())
            lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in rows))
        return "\n".join([*lines, *self.examples])


@dataclass
class _Story:
    """All that is known about one event."""

    attempts: list[Attempt] = field(default_factory=list)
    arrived: float | None = None
    """The first time."""
    dead: bool = False
    forgotten: bool = False

    def first_sent(self) -> float:
        """The earliest that it can be in the log."""
        return min((a.sent for a in self.attempts if a.possible), default=math.inf)

    def first_accepted(self) -> float:
        """From here on it is known to be in the log."""
        return min((a.answered for a in self.attempts if a.accepted), default=math.inf)

    def record_accepted(self, arrived: float, forgetting: list[float]) -> float:
        """The same of the record that arrived first: of the first one, unless a broker forgot it
        and the key was accepted again after the ring had lapped it."""
        first = self.first_accepted()
        fresh = [a for a in self.attempts if a.accepted and not a.duplicate]
        for killed in forgetting:
            again = [a.answered for a in fresh if killed < a.sent < arrived]
            if first < killed and again:
                return min(again)
        return first


class _Window:
    """Which records certainly stand in the ring at a time."""

    def __init__(self, attempts: Iterable[Attempt], capacity: int) -> None:
        # What a dead producer had claimed is claimed again after a recovery: the oldest bytes of
        # the ring may be gone a little before the tail says so.
        self._bytes = capacity - capacity // 8
        fresh = sorted(
            (a.sent, a.lsn)
            for a in attempts
            if a.accepted and not a.duplicate and a.lsn is not None
        )
        self._sent = [sent for sent, _ in fresh]
        self._least = [lsn for _, lsn in fresh]
        for i in range(len(fresh) - 2, -1, -1):
            self._least[i] = min(self._least[i], self._least[i + 1])

    def holds(self, lsn: int | None, time: float) -> bool:
        """Whether the record at `lsn`, made before, certainly stands there until `time`."""
        at = bisect.bisect_left(self._sent, time)
        return lsn is not None and at < len(self._least) and self._least[at] <= lsn + self._bytes


class _Syncs:
    """The fdatasync calls of the log."""

    def __init__(self, rows: list[Sync]) -> None:
        rows = sorted((row for row in rows if not row.failed), key=lambda row: row.started)
        self._started = [row.started for row in rows]
        self._returned = [row.returned for row in rows]
        for i in range(len(rows) - 2, -1, -1):
            self._returned[i] = min(self._returned[i], self._returned[i + 1])

    def within(self, start: float, end: float) -> bool:
        """One began after `start` and had returned by `end`."""
        at = bisect.bisect_left(self._started, start)
        return at < len(self._started) and self._returned[at] <= end


def check(rows: Iterable[Rows]) -> Verdict:
    """Judge a history; its first row is the setup."""
    verdict = Verdict()
    setup = Setup("", 0)
    stories: dict[Event, _Story] = defaultdict(_Story)
    arrivals: list[Arrival] = []
    syncs: list[Sync] = []
    receipts: list[Receipt] = []
    forgetting: list[float] = []
    for row in rows:
        match row:
            case Attempt():
                stories[row.event].attempts.append(row)
                _count(verdict, row)
            case Arrival():
                arrivals.append(row)
            case DeadLetter():
                stories[row.event].dead = True
            case Sync():
                syncs.append(row)
            case Receipt():
                receipts.append(row)
            case Nemesis():
                verdict.nemesis[f"{row.action} {row.target}"] += 1
                if row.forgets:
                    forgetting.append(row.time)
            case End():
                verdict.unexplained = abs(row.unexplained)
            case Setup():
                setup = row
    attempts = [a for story in stories.values() for a in story.attempts]
    timed = setup.broker == "recording"
    verdict.events = sum(1 for story in stories.values() if story.attempts)
    _check_arrivals(verdict, stories, arrivals, forgetting)
    _check_lost(verdict, stories, arrivals, forgetting)
    _check_acks(verdict, stories, _Syncs(syncs) if setup.traced else None, timed)
    _check_keys(verdict, stories, _Window(attempts, setup.capacity))
    _check_receipts(verdict, stories, receipts, _Syncs(syncs) if setup.traced else None, timed)
    return verdict


def _count(verdict: Verdict, attempt: Attempt) -> None:
    verdict.attempts += 1
    verdict.unknown += attempt.status in (UNKNOWN, 500, 504)
    verdict.duplicates += attempt.accepted and attempt.duplicate
    verdict.conflicts += attempt.status == 409
    if attempt.accepted:
        verdict.answers[f"{attempt.status} {attempt.reached}"] += 1
    elif attempt.status > 0:
        verdict.answers[f"{attempt.status} {attempt.code or ''}".rstrip()] += 1
    else:
        verdict.answers["cut" if attempt.status == CUT else "unknown"] += 1


def _check_arrivals(
    verdict: Verdict,
    stories: dict[Event, _Story],
    arrivals: list[Arrival],
    forgetting: list[float],
) -> None:
    latest_sent: dict[str, float] = {}
    for arrival in arrivals:
        story = stories[arrival.event]
        if story.arrived is not None:
            verdict.repeated += 1
            continue
        story.arrived = arrival.time
        verdict.delivered += 1
        if not story.attempts:
            verdict.violation("invented", arrival.event)
            continue
        device = arrival.event.device
        accepted = story.record_accepted(arrival.time, forgetting)
        if accepted < latest_sent.get(device, -math.inf):
            verdict.violation("out_of_order", arrival.event)
        sent = story.first_sent()
        if sent == math.inf:
            verdict.violation("leaked", (arrival.event, _statuses(story)))
        else:
            latest_sent[device] = max(sent, latest_sent.get(device, -math.inf))


def _statuses(story: _Story) -> list[int]:
    return sorted({a.status for a in story.attempts})


def _check_lost(
    verdict: Verdict,
    stories: dict[Event, _Story],
    arrivals: list[Arrival],
    forgetting: list[float],
) -> None:
    # Events come in the log's order, from one publisher to one subscriber. What was in the log
    # before another event was even sent, and that one arrived before the broker was killed, was
    # not in the broker's hands any more.
    handed_on = [
        (
            killed,
            max(
                (stories[a.event].first_sent() for a in arrivals if a.time < killed),
                default=-math.inf,
            ),
        )
        for killed in forgetting
    ]
    for event, story in stories.items():
        verdict.dead_lettered += story.dead
        if story.dead and story.first_sent() == math.inf:
            verdict.violation("leaked", (event, "dead letter", _statuses(story)))
        accepted = story.first_accepted()
        if accepted == math.inf:
            continue
        verdict.accepted += 1
        if story.arrived is not None or story.dead:
            continue
        story.forgotten = any(
            story.first_sent() < killed and accepted >= latest_sent
            for killed, latest_sent in handed_on
        )
        if story.forgotten:
            verdict.forgotten += 1
        else:
            verdict.violation("lost", (event, f"accepted at {accepted:.3f}"))


def _check_acks(
    verdict: Verdict, stories: dict[Event, _Story], syncs: _Syncs | None, timed: bool
) -> None:
    for story in stories.values():
        first_sent = story.first_sent()
        for attempt in story.attempts:
            if not attempt.accepted:
                continue
            if attempt.reached == "sink":
                late = timed and story.arrived is not None and story.arrived > attempt.answered
                if story.dead or late or (timed and story.arrived is None):
                    verdict.violation("acked_early", (attempt, f"arrived {story.arrived}"))
            elif (
                attempt.reached == "durable"
                and syncs is not None
                and not syncs.within(first_sent, attempt.answered)
            ):
                verdict.violation("acked_early", (attempt, f"first sent {first_sent}"))


def _check_keys(verdict: Verdict, stories: dict[Event, _Story], window: _Window) -> None:
    keys: dict[tuple[str, int, int], list[Event]] = defaultdict(list)
    for event, story in stories.items():
        if event.key is not None and story.attempts:
            keys[event.key].append(event)
    for events in keys.values():
        attempts = [a for event in events for a in stories[event].attempts]
        if len(attempts) == 1:
            _check_alone(verdict, attempts[0])
            continue
        _check_records(verdict, [a for a in attempts if a.accepted], window)
        for attempt in attempts:
            if attempt.status == 409:
                _check_conflict(verdict, attempt, attempts, window)
            elif attempt.accepted and attempt.duplicate and _repeats_nothing(attempt, attempts):
                verdict.violation("misjudged", ("repeat of nothing", attempt))


def _repeats_nothing(repeat: Attempt, attempts: list[Attempt]) -> bool:
    return not any(
        other is not repeat
        and other.event == repeat.event
        and other.possible
        and other.sent < repeat.answered
        for other in attempts
    )


def _check_alone(verdict: Verdict, attempt: Attempt) -> None:
    if attempt.status == 409:
        verdict.violation("misjudged", ("nothing conflicts", attempt))
    elif attempt.accepted and attempt.duplicate:
        verdict.violation("misjudged", ("repeat of nothing", attempt))


def _check_records(verdict: Verdict, accepted: list[Attempt], window: _Window) -> None:
    """One key has one record, while the window holds it."""
    accepted = sorted((a for a in accepted if a.lsn is not None), key=lambda a: a.lsn or 0)
    for first, second in pairwise(accepted):
        if first.lsn == second.lsn:
            if first.event != second.event:
                verdict.violation("misjudged", ("two bodies", first, second))
            elif not first.duplicate and not second.duplicate:
                verdict.violation("doubled", (first, second))
        elif window.holds(first.lsn, second.answered):
            same = first.event == second.event
            verdict.violation("doubled" if same else "misjudged", (first, second))


def _check_conflict(
    verdict: Verdict, conflict: Attempt, attempts: list[Attempt], window: _Window
) -> None:
    others = [
        a
        for a in attempts
        if a.event != conflict.event and a.possible and a.sent < conflict.answered
    ]
    if not others:
        verdict.violation("misjudged", ("nothing conflicts", conflict))
        return
    for same in attempts:
        if (
            same.accepted
            and same.event == conflict.event
            and same.answered < conflict.sent
            and window.holds(same.lsn, conflict.answered)
        ):
            verdict.violation("misjudged", ("the same body stands there", conflict, same))
            return


def _check_receipts(
    verdict: Verdict,
    stories: dict[Event, _Story],
    receipts: list[Receipt],
    syncs: _Syncs | None,
    timed: bool,
) -> None:
    owner: dict[int, Event] = {}
    for event, story in stories.items():
        for attempt in story.attempts:
            if not attempt.accepted:
                continue
            if attempt.lsn is None:
                verdict.violation("false_receipts", ("none", attempt))
            elif owner.setdefault(attempt.lsn, event) != event:
                verdict.violation("false_receipts", ("two events", attempt, owner[attempt.lsn]))
    for receipt in receipts:
        verdict.receipts += 1
        story = stories[receipt.event]
        here = story.forgotten or (
            story.arrived is not None and (not timed or story.arrived <= receipt.answered)
        )
        match receipt.state:
            case "delivered":
                true = here and not story.dead
            case "finished":
                true = here or story.dead
            case "dead_lettered":
                true = story.dead
            case "durable":
                synced = syncs is None or syncs.within(story.first_sent(), receipt.answered)
                true = synced and not receipt.final
            case "enqueued":
                true = not receipt.final
            case "unknown":
                verdict.receipts_unknown += 1
                true = True
            case _:
                true = False
        if not true:
            verdict.violation("false_receipts", (receipt, f"arrived {story.arrived}"))
