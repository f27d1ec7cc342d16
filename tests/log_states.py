"""What the log should do, as a small model beside the real one: two hypothesis state machines.

Both drive `gateway._log` on a file in memory and know what must be there after each step: each
record's bytes, each position, each cursor and its books. A power cut is a choice, for each sector
of 512 bytes, between what the last fdatasync wrote and what the memory held.

`LogMachine` appends events of every size. `IndexMachine` repeats keys and asks for receipts: the
window in which a repeat is known is exactly the last `capacity` bytes claimed.
"""

import os
import random
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway import _log

CAPACITY = _log.CAPACITY_MIN
RECORD_MAX = CAPACITY // 8
RING, FIRST_LSN, HEADER, SECTOR = 4 * 4096, 4096, 64, 512
DEAD = slice(56, 64)
"""Of a record: the only bytes that change after the commit."""
SINKS = ("mqtt", "file")
EPOCHS_MAX = 24
"""Restarts a run: below the size of the log's table, behind which receipts are unknown."""
CODE = {name: number for number, name in enumerate(_log.CODES)}

bodies = st.one_of(
    st.integers(0, 300),
    st.sampled_from([1000, 20_000, RECORD_MAX // 2, RECORD_MAX - 200, RECORD_MAX]),
)
devices = st.sampled_from(["a", "dev-1", "d" * 64])


@dataclass
class Event:
    lsn: int
    epoch: int
    device_id: str
    body: bytes = field(repr=False)
    seq: int | None = None
    boot: int | None = None
    dead: int = 0
    lost: bool = False
    """A power cut took it."""
    torn: bool = False
    """Done, and written over by claims that a power cut took: nobody knows whether it stands."""
    receipt: str = ""

    @property
    def used(self) -> int:
        return HEADER + len(self.device_id) + len(self.body)

    @property
    def size(self) -> int:
        return (self.used + 7) // 8 * 8

    @property
    def end(self) -> int:
        return self.lsn + self.size


@dataclass(frozen=True)
class Pad:
    lsn: int
    end: int
    used: int = HEADER


@cache
def empty_log() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, "log")
        _log.create(str(path), CAPACITY)
        return path.read_bytes()


def body_of(number: int, size: int, seq: int | None = None, boot: int | None = None) -> bytes:
    """A valid event of `size` bytes, or of the fewest it needs."""
    head = f'{{"seq":{seq},' if seq is not None else "{"
    head += f'"boot":{boot},' if boot is not None else ""
    head += f'"metrics":{{"n":{number}}}'
    short = (head + "}").encode()
    rest = size - len(short) - len(',"payload":""')
    return short if rest < 0 else (head + ',"payload":"' + "x" * rest + '"}').encode()


def differ(before: memoryview, after: memoryview, item: Event | Pad) -> bool:
    """Whether a byte of the record that counts is another one in the second image."""
    for start, end in ((0, DEAD.start), (DEAD.stop, item.used)):
        at = (item.lsn + start) % CAPACITY
        first = min(end - start, CAPACITY - at)
        for a, n in ((at, first), (0, end - start - first)):
            if before[RING + a : RING + a + n] != after[RING + a : RING + a + n]:
                return True
    return False


@dataclass
class Model:
    """Positions and books as they should be; `events` in the log's order, lost ones included."""

    tail: int = FIRST_LSN
    committed: int = FIRST_LSN
    durable: int = FIRST_LSN
    reclaim: int = FIRST_LSN
    watermark: int = FIRST_LSN
    ordinal: int = 0
    high: int = FIRST_LSN
    """The highest tail there ever was."""
    epochs: list[tuple[int, int]] = field(default_factory=lambda: [(FIRST_LSN, 2)])
    cursors: list[_log.Cursor] = field(default_factory=list)
    persisted: list[_log.Cursor] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    pads: list[Pad] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        return self.epochs[-1][1]

    def between(self, start: int, end: int) -> list[Event]:
        """Events that are there, by position."""
        there = [event for event in self.events if not event.lost]
        first = bisect_left(there, start, key=lambda event: event.lsn)
        return there[first : bisect_left(there, end, key=lambda event: event.lsn)]


class Machine(RuleBasedStateMachine):
    native: ModuleType = _log

    def __init__(self) -> None:
        super().__init__()
        self.fd = os.memfd_create("log")
        os.write(self.fd, empty_log())
        self.path = f"/proc/self/fd/{self.fd}"
        self.model = Model()
        self.number = 0
        self.open()
        self.model.cursors = [_log.Cursor(FIRST_LSN, 0, 0, 0)] * len(SINKS)
        self.model.persisted = list(self.model.cursors)

    def open(self) -> None:
        lock = os.open(self.path, os.O_RDWR)
        self.log = self.native.Log.open(self.path, lock, SINKS)
        os.close(lock)
        self.doors = [self.native.Ingest(self.log, i) for i in range(2)]
        self.synced = self.image()

    def close(self) -> None:
        for door in self.doors:
            door.close()
        self.log.close()

    def teardown(self) -> None:
        self.close()
        os.close(self.fd)

    def image(self) -> bytes:
        return os.pread(self.fd, RING + CAPACITY, 0)

    # ---- steps that both machines have

    def send(
        self,
        door: int,
        device_id: str,
        body: bytes,
        seq: int | None = None,
        boot: int | None = None,
    ) -> Event | None:
        """An event whose key is new: committed, or full, or too large."""
        m = self.model
        event = Event(m.tail, m.epoch, device_id, body, seq, boot)
        code = self.doors[door].event(device_id, body, _log.now_ns())
        if event.size > RECORD_MAX:
            assert code == CODE["body_too_large"]
            return None
        if m.tail + event.size > m.reclaim + CAPACITY:
            assert code == CODE["log_full"], _log.CODES[code]
            return None
        assert code == 0, _log.CODES[code]
        assert not self.doors[door].duplicate
        assert self.doors[door].lsn == m.tail
        event.receipt = self.doors[door].receipt
        m.events.append(event)
        m.tail = event.end
        m.high = max(m.high, m.tail)
        return event

    @rule(sizes=st.lists(st.integers(0, 1500), min_size=2, max_size=9))
    def burst(self, sizes: list[int]) -> None:
        """Events without keys, next to each other: what a power cut tears is some of them."""
        for size in sizes:
            self.number += 1
            self.send(0, "burst", body_of(self.number, size))

    @rule()
    def follow(self) -> None:
        m = self.model
        m.ordinal += len(m.between(m.committed, m.tail))
        m.committed = m.tail
        assert self.log.follow(0, 0) == m.tail

    @rule()
    def sync(self) -> None:
        m = self.model
        assert self.log.sync() == (m.durable != m.committed)
        m.watermark, m.durable = m.durable, m.committed
        m.persisted = list(m.cursors)
        m.reclaim = min(cursor.lsn for cursor in m.cursors)
        self.synced = self.image()

    @rule(sinks=st.sampled_from([(0, 1), (0,), (1,)]), count=st.integers(1, 20), dead=st.booleans())
    def publish(self, sinks: tuple[int, ...], count: int, dead: bool) -> None:
        for sink in sinks:
            self.publish_to(sink, count, dead)

    def publish_to(self, sink: int, count: int, dead: bool) -> None:
        """The next records of a sink; with `dead`, the last of them is set aside."""
        m = self.model
        cursor = m.cursors[sink]
        events = m.between(cursor.lsn, m.committed)[:count]
        if not events:
            return
        if dead:
            assert self.log.mark_dead(sink, events[-1].lsn, events[-1].epoch)
            events[-1].dead |= 1 << sink
        m.cursors[sink] = _log.Cursor(
            events[-1].end,
            cursor.ordinal + len(events),
            cursor.published + len(events) - dead,
            cursor.dead_lettered + dead,
        )
        self.log.set_cursor(sink, m.cursors[sink])

    @rule()
    def drain(self) -> None:
        """Everything is published, and its room is free."""
        self.follow()
        self.publish((0, 1), len(self.model.events), False)
        self.sync()
        self.sync()

    # ---- ends, good and bad

    @precondition(lambda self: len(self.model.epochs) < EPOCHS_MAX)
    @rule()
    def restart(self) -> None:
        self.follow()
        self.sync()
        self.sync()
        self.close()
        self.reopen(self.image())

    @precondition(lambda self: len(self.model.epochs) < EPOCHS_MAX)
    @rule()
    def kill(self) -> None:
        """SIGKILL of everything: the file is as it is."""
        self.close()
        self.reopen(self.image())

    @precondition(lambda self: len(self.model.epochs) < EPOCHS_MAX)
    @rule(seed=st.integers(0, 1 << 30), sizes=st.lists(st.integers(0, 1500), max_size=6))
    def power_cut(self, seed: int, sizes: list[int]) -> None:
        self.burst(sizes)
        self.close()
        before = self.image()
        dice, share = random.Random(seed), random.Random(seed).choice([0.0, 0.1, 0.5, 0.9, 1.0])
        for at in range(0, len(before), SECTOR):
            old = self.synced[at : at + SECTOR]
            if old != before[at : at + SECTOR] and dice.random() < share:
                os.pwrite(self.fd, old, at)
        self.reopen(before)

    @precondition(lambda self: len(self.model.epochs) < EPOCHS_MAX)
    @rule(share=st.floats(0, 1), seed=st.integers(0, 1 << 30))
    def power_cut_with_garbage(self, share: float, seed: int) -> None:
        """Worse than a disk does it: whatever is not durable, from a point on, is zero or noise."""
        m = self.model
        self.close()
        before = self.image()
        start = m.durable + int((m.tail - m.durable) * share)
        noise = random.Random(seed).randbytes(m.tail - start) if seed % 2 else bytes(m.tail - start)
        at = start % CAPACITY
        os.pwrite(self.fd, noise[: CAPACITY - at], RING + at)
        os.pwrite(self.fd, noise[CAPACITY - at :], RING)
        self.reopen(before)

    def reopen(self, before: bytes) -> None:
        """Recovery of what the file holds now; `before` is what the processes had stored."""
        m = self.model
        old, new = memoryview(before), memoryview(self.image())
        c = min(cursor.lsn for cursor in m.persisted)
        pads = [pad for pad in m.pads if pad.lsn >= c]
        items = sorted([*m.between(c, m.tail), *pads], key=lambda item: item.lsn)
        kept = [item for item in items if not differ(old, new, item)]
        end = max([c, *(item.end for item in kept)])
        start = max(end, m.watermark, m.epochs[-1][0], *(cursor.lsn for cursor in m.persisted))
        there = {item.lsn for item in kept}
        for event in m.between(c, m.tail):
            event.lost = event.lsn not in there
            assert not event.lost or event.lsn >= m.durable
        for event in m.between(0, c):
            event.torn |= event.lsn < m.high - CAPACITY
        self.open()
        found = self.log.recovery
        assert found.corrupt_bytes == 0
        assert (found.watermark, found.end, found.start) == (m.watermark, end, start)
        assert found.records == len(m.between(c, m.tail))
        assert found.torn_bytes == end - c - sum(item.end - item.lsn for item in kept)
        assert found.epoch == m.epoch + 1
        while m.epochs and m.epochs[-1][0] >= start:
            m.epochs.pop()
        m.epochs.append((start, found.epoch))
        m.tail = m.committed = m.durable = start
        m.cursors, m.reclaim = list(m.persisted), c
        m.ordinal = min(m.persisted).ordinal + found.records
        for event in m.between(c, start):  # as the publisher does it from its dead-letter file
            for sink in range(len(SINKS)):
                if event.dead >> sink & 1:
                    assert self.log.mark_dead(sink, event.lsn, event.epoch)
        m.pads = self.read_back()
        self.synced = self.image()

    # ---- what must hold after each step

    def read_back(self) -> list[Pad]:
        """Every record above reclaim, byte for byte; returns the PADs."""
        m = self.model
        pads, lsn, expected = [], m.reclaim, iter(m.between(m.reclaim, m.committed))
        while record := self.log.read(lsn):
            if record.kind == _log.PAD:
                pads.append(Pad(lsn, lsn + record.size))
            else:
                event = next(expected)
                assert (record.lsn, record.size) == (event.lsn, event.size)
                assert (record.kind, record.epoch) == (_log.DATA, event.epoch)
                assert (record.device_id, record.body) == (event.device_id, event.body)
                assert (record.seq, record.boot, record.dead) == (event.seq, event.boot, event.dead)
            lsn += record.size
        assert lsn == m.committed
        assert next(expected, None) is None
        return pads

    @invariant()
    def positions_are_those_of_the_model(self) -> None:
        m, log = self.model, self.log
        assert (log.tail, log.committed, log.durable, log.reclaim) == (
            m.tail, m.committed, m.durable, m.reclaim
        )  # fmt: skip
        assert log.committed_ordinal == m.ordinal
        assert log.used == m.tail - m.reclaim <= CAPACITY
        assert [log.cursor(i) for i in range(len(SINKS))] == m.cursors
        least = min(cursor.lsn for cursor in m.cursors)
        assert m.reclaim <= least == log.least_cursor
        assert max(cursor.lsn for cursor in m.cursors) <= m.committed
        assert log.state == _log.RUNNING

    @invariant()
    def books_balance(self) -> None:
        assert [self.log.unexplained(i) for i in range(len(SINKS))] == [0, 0]

    @invariant()
    def what_was_written_is_read(self) -> None:
        self.read_back()


class LogMachine(Machine):
    @rule(door=st.integers(0, 1), device_id=devices, size=bodies, keyed=st.booleans())
    def append(self, door: int, device_id: str, size: int, keyed: bool) -> None:
        self.number += 1
        seq = self.number if keyed else None
        self.send(door, device_id, body_of(self.number, size, seq), seq)

    @rule(size=st.sampled_from([RECORD_MAX - 100, RECORD_MAX // 3]))
    def fill(self, size: int) -> None:
        """Until it is full; also when all of it is published: room comes with the next sync."""
        while self.send(0, "fill", body_of(self.number, size)):
            self.number += 1
        self.follow()
        self.publish((0, 1), len(self.model.events), False)
        assert not self.send(0, "fill", body_of(self.number, size))

    @precondition(lambda self: self.model.high == self.model.tail)
    @invariant()
    def oldest_is_the_first_of_the_last_lap(self) -> None:
        m = self.model
        there = m.between(m.tail - CAPACITY, m.committed)
        oldest = self.log.oldest
        assert (oldest and oldest[0]) == (there[0].lsn if there else None)


class IndexMachine(Machine):
    """Keys from a small set, so that they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.by_key: dict[tuple[str, int, int], list[Event]] = {}
        self.lost_from: dict[int, int] = {}
        """The first position of each epoch that a power cut took."""

    @rule(
        door=st.integers(0, 1),
        device_id=devices,
        boot=st.sampled_from([None, 0, 1, (1 << 63) - 1]),
        seq=st.integers(0, 3),
        number=st.integers(0, 2),
        size=st.sampled_from([0, 0, 60, 60, 5000, RECORD_MAX - 200, RECORD_MAX]),
    )
    def event(
        self, door: int, device_id: str, boot: int | None, seq: int, number: int, size: int
    ) -> None:
        self.repeat(door, device_id, body_of(number, size, seq, boot), seq, boot)

    def repeat(self, door: int, device_id: str, body: bytes, seq: int, boot: int | None) -> None:
        """An event whose key may be there."""
        m, ingest = self.model, self.doors[door]
        with_key = self.by_key.setdefault((device_id, boot or 0, seq), [])
        # More than one: the last of them may be lost to a power cut, that the others outlived.
        known = [e for e in with_key if not e.lost and m.tail <= e.lsn + CAPACITY]
        first = known[-1] if known else None
        if HEADER + len(device_id) + len(body) > RECORD_MAX:
            first = None  # said before anything is looked up
        if first and first.torn:
            return  # either verdict is right
        if first is None:
            if event := self.send(door, device_id, body, seq, boot):
                with_key.append(event)
            elif not with_key:
                del self.by_key[device_id, boot or 0, seq]
            return
        code = ingest.event(device_id, body, _log.now_ns())
        if first.body == body:
            assert code == 0, _log.CODES[code]
            assert ingest.duplicate
            assert (ingest.lsn, ingest.receipt) == (first.lsn, first.receipt)
        else:
            assert code == CODE["seq_conflict"], _log.CODES[code]
            assert not ingest.duplicate

    @rule(count=st.integers(1, 9), size=st.sampled_from([RECORD_MAX - 100, RECORD_MAX // 3, 64]))
    def lap(self, count: int, size: int) -> None:
        """Other events pass through."""
        for _ in range(count):
            self.drain()
            self.number += 1
            self.send(0, "fill", body_of(self.number, size))

    @precondition(lambda self: self.by_key and len(self.model.epochs) < EPOCHS_MAX)
    @rule(choice=st.integers(0, 1000), published=st.booleans())
    def restart_and_repeat(self, choice: int, published: bool) -> None:
        first = self.chosen(choice)
        if published:
            self.drain()
        self.kill()
        self.repeat(1, first.device_id, first.body, first.seq or 0, first.boot)

    @precondition(lambda self: self.by_key)
    @rule(choice=st.integers(0, 1000), door=st.integers(0, 1), number=st.integers(0, 2))
    def again(self, choice: int, door: int, number: int) -> None:
        """A key that was there, with a body that is as long."""
        first = self.chosen(choice)
        body = body_of(number, len(first.body), first.seq, first.boot)
        self.repeat(door, first.device_id, body, first.seq or 0, first.boot)

    def chosen(self, choice: int) -> Event:
        return self.by_key[sorted(self.by_key)[choice % len(self.by_key)]][-1]

    @precondition(lambda self: self.by_key)
    @rule(choice=st.integers(0, 1000), beyond=st.sampled_from([0, 8, 64, 128]))
    def edge(self, choice: int, beyond: int) -> None:
        """A repeat when the last byte claimed is the last, or nearly, that leaves it known."""
        m, first = self.model, self.chosen(choice)
        gap = first.lsn + CAPACITY + beyond - m.tail
        least = Event(0, 0, "fill", body_of(self.number, 200)).size
        if first.lost or first.torn or gap < least:
            return
        while gap:
            size = gap if gap <= RECORD_MAX else min(RECORD_MAX, gap - least)
            self.drain()
            assert self.send(0, "fill", body_of(self.number, size - HEADER - len("fill")))
            gap -= size
        self.repeat(0, first.device_id, first.body, first.seq or 0, first.boot)

    def expected(self, event: Event) -> set[str]:
        m = self.model
        doubt = event.lsn >= self.lost_from.get(event.epoch, m.high)
        if event.lost:
            return {"lost", "unknown"}  # unknown: what stands there now is not known to be another
        if m.tail > event.lsn + CAPACITY:
            return {"unknown"} if doubt else {"finished"}
        done = {"dead_lettered" if event.dead else "delivered"}
        if event.torn:
            return done | ({"unknown"} if doubt else {"finished"})
        if event.dead:
            return {"dead_lettered"}
        if min(cursor.lsn for cursor in m.cursors) > event.lsn:
            return {"delivered"}
        return {"durable"} if m.durable > event.lsn else {"enqueued"}

    @invariant()
    def receipts_say_what_became_of_it(self) -> None:
        events = self.model.events
        self.lost_from = {event.epoch: event.lsn for event in reversed(events) if event.lost}
        for event in events:
            if event.end > self.model.tail - 2 * CAPACITY:
                assert self.log.receipt_state(event.receipt) in self.expected(event), event


def run(machine: type[Machine], examples: int, steps: int, seed: int, **settings: Any) -> None:
    """Raises what the machine asserts, with the shortest sequence of steps that leads there."""
    import hypothesis
    from hypothesis.stateful import run_state_machine_as_test

    print(f"seed {seed}, {examples} runs of {steps} steps")
    run_state_machine_as_test(
        hypothesis.seed(seed)(machine),
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            **settings,
        ),
    )
