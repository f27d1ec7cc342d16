"""The compiled window against a model of it in Python: any order of what a broker and a network may
do. Mutants of the window, which the native tests must notice.

What holds at each step: the cursor is the contiguous prefix of events that were acknowledged or are
dead letters; in flight <= the limit; DUP only on a resumed session, with the same id; nothing is
skipped; published + dead-lettered + base = ordinal.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from gateway import _log
from gateway._mqtt import Window
from tests import brokers, native_build
from tests.publishing import event, number

INFLIGHT_MAX = 6


@dataclass
class Entry:
    """An event that the window has read."""

    n: int
    state: str
    """sent, owed, acked, refused, dead."""
    id: int = 0


class WindowModel(RuleBasedStateMachine):
    """The real window does each step, the model does it too, and they are compared."""

    @initialize()
    def make(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = str(Path(self.folder.name) / "gateway.log")
        _log.create(path, _log.CAPACITY_MIN)
        self.fd = os.open(path, os.O_RDWR)
        self.log = _log.Log.open(path, self.fd, ["mqtt"])
        self.ingest = _log.Ingest(self.log, 0)
        self.window = Window(self.log, 0, b"t/", b"", INFLIGHT_MAX)
        self.lsns: list[int] = []
        self.marked: set[int] = set()
        self.entries: list[Entry] = []
        self.cursor = self.read = self.resend = 0
        self.published = self.dead_lettered = 0
        self.limit = 0
        self.open = self.resumed = False
        self.probe = -1
        self.add(10)
        self.connect(False, 5)

    def teardown(self) -> None:
        if hasattr(self, "log"):
            self.ingest.close()
            self.log.close()
            os.close(self.fd)
            self.folder.cleanup()

    # ---- the model -----------------------------------------------------------------------------

    def in_state(self, *states: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.state in states]

    def settle(self) -> None:
        while self.entries and self.entries[0].state in ("acked", "dead"):
            entry = self.entries.pop(0)
            self.published += entry.state == "acked"
            self.dead_lettered += entry.state == "dead"
            self.cursor = entry.n + 1
            self.resend = max(0, self.resend - 1)
        if self.cursor > self.probe:
            self.probe = -1

    def forget(self) -> None:
        refused = self.in_state("refused")
        if refused:
            self.probe = max(self.probe, refused[0].n)
        self.entries.clear()
        self.resend, self.read = 0, self.cursor

    def expected(self) -> list[tuple[int, bool]]:
        """(event, DUP) of what one fill sends."""
        out: list[tuple[int, bool]] = []
        if not self.open:
            return out
        limit = 1 if self.probe >= 0 else self.limit
        while self.resend < len(self.entries) and len(self.in_state("sent")) < limit:
            entry = self.entries[self.resend]
            self.resend += 1
            if entry.state == "owed":
                entry.state = "dead" if entry.n in self.marked else "sent"
                if entry.state == "sent":
                    out.append((entry.n, True))
        held = bool(self.in_state("refused"))
        while (
            self.resend == len(self.entries)
            and not held
            and len(self.in_state("sent")) < limit
            and self.read < len(self.lsns)
        ):
            entry = Entry(self.read, "dead" if self.read in self.marked else "sent")
            self.entries.append(entry)
            self.read += 1
            self.resend += 1
            if entry.state == "sent":
                out.append((entry.n, False))
        self.settle()
        return out

    # ---- steps ---------------------------------------------------------------------------------

    @rule(count=st.integers(1, 20))
    def add(self, count: int) -> None:
        for _ in range(count):
            assert self.ingest.event("d", event(len(self.lsns)), _log.now_ns()) == 0
            self.lsns.append(self.ingest.lsn)
        self.log.follow(0, 0)

    @rule()
    def fill(self) -> None:
        while True:
            expected = self.expected()
            data = self.window.fill() or b""
            sent = [brokers.read_publish(first, body) for first, body, _ in brokers.split(data)]
            assert [(number(publish.payload), publish.dup) for publish in sent] == expected
            by_n = {entry.n: entry for entry in self.entries}
            for publish in sent:
                entry = by_n[number(publish.payload)]
                others = [other.id for other in self.entries if other is not entry]
                assert publish.id not in others
                if publish.dup:
                    assert self.resumed
                    assert publish.id == entry.id
                entry.id = publish.id
            if not expected:
                return

    @precondition(lambda self: self.open and self.in_state("sent"))
    @rule(
        data=st.data(), reason=st.sampled_from([0x00, 0x10, 0x00, 0x87, 0x97]), then=st.booleans()
    )
    def puback(self, data: st.DataObject, reason: int, then: bool) -> None:
        """One answer, and perhaps what a link does then."""
        entry = data.draw(st.sampled_from(self.in_state("sent")))
        packets = self.window.feed(brokers.puback(entry.id, reason))
        if reason < 0x80:
            assert packets is None
            entry.state = "acked"
        else:
            assert packets is not None
            assert packets[0].lsn == self.lsns[entry.n]
            entry.state = "refused"
        self.settle()
        if then:
            self.fill()

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def dead_letter(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.entries))
        lsn = self.lsns[entry.n]
        if entry.state == "refused":
            assert self.log.mark_dead(0, lsn)
            self.marked.add(entry.n)
            entry.state = "dead"
            assert self.window.dead_letter(lsn)
            self.settle()
        else:
            assert not self.window.dead_letter(lsn)

    @precondition(lambda self: self.read < len(self.lsns) or self.in_state("sent", "owed"))
    @rule(data=st.data())
    def mark(self, data: st.DataObject) -> None:
        """A dead letter on file, as of poison or at a start."""
        ahead = [*range(self.read, len(self.lsns))]
        n = data.draw(st.sampled_from([*(e.n for e in self.in_state("sent", "owed")), *ahead]))
        assert self.log.mark_dead(0, self.lsns[n])
        self.marked.add(n)

    @precondition(lambda self: self.open)
    @rule()
    def lose(self) -> None:
        self.window.connect()
        self.open = False

    @precondition(lambda self: not self.open)
    @rule(resumed=st.booleans(), receive_maximum=st.integers(1, 9))
    def connect(self, resumed: bool, receive_maximum: int) -> None:
        self.window.open(resumed, receive_maximum)
        self.open, self.resumed = True, resumed
        self.limit = min(receive_maximum, INFLIGHT_MAX)
        if resumed:
            for entry in self.in_state("sent"):
                entry.state = "owed"
            self.resend = 0
        else:
            self.forget()

    @precondition(lambda self: self.open)
    @rule()
    def start_over(self) -> None:
        may = not self.in_state("sent", "owed")
        assert self.window.start_over() == may
        if may:
            self.forget()

    @precondition(lambda self: self.lsns)
    @rule(data=st.data())
    def suspect(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.lsns) - 1))
        self.window.probe(self.lsns[n])
        self.probe = max(self.probe, n)
        # One that the cursor has passed ends at the next settle; until then it limits.

    # ---- what holds ----------------------------------------------------------------------------

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "log"):
            return
        view = self.window.look()
        stored = self.log.cursor(0)
        done = self.lsns[self.cursor] if self.cursor < len(self.lsns) else self.log.committed
        assert stored.lsn == view.lsn == done
        assert (view.ordinal, view.published, view.dead_lettered) == (
            self.cursor,
            self.published,
            self.dead_lettered,
        )
        assert stored.published + stored.dead_lettered + stored.base == stored.ordinal
        assert self.log.unexplained(0) == 0
        assert view.refused == len(self.in_state("refused"))
        assert [r.lsn for r in self.window.refusals()] == [
            self.lsns[entry.n] for entry in self.in_state("refused")
        ]
        if self.open:
            flying = self.in_state("sent")
            assert view.in_flight == len(flying) <= self.limit
            assert view.oldest_lsn == (self.lsns[flying[0].n] if flying else 0)


TestWindowModel = WindowModel.TestCase
TestWindowModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# ---- mutants ----------------------------------------------------------------------------------

MUTANTS = {
    "the cursor moves when a message is sent, not when it is acknowledged": (
        "gw_mqtt_fill.c",
        "        r->state = SENT;\n",
        "        r->state = ACKED;\n",
    ),
    "the cursor passes what was refused": (
        "gw_mqtt.c",
        "        else if (r->state == DEAD)\n",
        "        else if (r->state == DEAD || r->state == REFUSED)\n",
    ),
    "the cursor passes what is in flight": (
        "gw_mqtt.c",
        "        else\n            break;\n        w->cursor.lsn",
        "        else if (r->state == REFUSED)\n            break;\n        w->cursor.lsn",
    ),
    "a refusal holds nobody": (
        "gw_mqtt_fill.c",
        "const bool hold_rest = c->refused;",
        "const bool hold_rest = false;",
    ),
    "a dead letter for what was not refused": (
        "gw_mqtt.c",
        " || r->state != REFUSED)\n        return",
        ")\n        return",
    ),
    "what is marked as dead is sent": (
        "gw_mqtt_fill.c",
        "return r->dead >> w->sink & 1;",
        "return (r->dead >> w->sink & 1) && r->lsn == 0;",
    ),
    "another sink's mark counts": (
        "gw_mqtt_fill.c",
        "r->dead >> w->sink & 1",
        "r->dead != 0",
    ),
    "marked ones fill the span": (
        "gw_mqtt_fill.c",
        "    if (number == w->head)\n        gw_mqtt_settle(w, c);",
        "    (void)c;",
    ),
    "DUP on what was never sent": (
        "gw_mqtt_publish.c",
        "repeat ? PUBLISH_QOS1 | DUP : PUBLISH_QOS1, fresh, to);",
        "PUBLISH_QOS1 | DUP, fresh, to);",
    ),
    "Receive Maximum is ignored": (
        "gw_mqtt.c",
        "receive_max < w->inflight_max ? receive_max",
        "false ? receive_max",
    ),
    "suspects go out together": (
        "gw_mqtt_fill.c",
        "c->probe_lsn ? 1 : c->limit,",
        "c->limit,",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_the_window_is_noticed(name: str) -> None:
    source, old, new = MUTANTS[name]
    text = (native_build.NATIVE / source).read_text()
    assert text.count(old) == 1, "the mutant's place is gone, or not the only one"
    test = native_build.TESTS / "test_mqtt.c"
    program = native_build.build(test, "plain", {source: text.replace(old, new)})
    assert native_build.run(program, "plain").returncode != 0
