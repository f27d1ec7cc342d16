"""The compiled window with packs and several connections: real packets as a JSON reader sees them,
a model in Python, and mutants, which the native test must notice.

What the model holds at each step: the cursor is the contiguous prefix, over all connections, of
events whose message was acknowledged or that are dead letters; a device has one connection, and
there its events go out in order with none left out; DUP only on a resumed session, with the same id
and the same bytes; a refused pack is nobody's dead letter.
"""

import gzip
import json
import os
import tempfile
from collections.abc import Iterator
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
from gateway._mqtt import PACK_BYTES_MAX, Pack, Window
from tests import brokers, native_build

INFLIGHT_MAX = 5
DEVICES = 7
FOREVER = 1 << 62


@dataclass
class Message:
    """A PUBLISH, read as a subscriber would."""

    id: int
    dup: bool
    topic: str
    content_type: str
    payload: bytes

    @property
    def lsns(self) -> list[int]:
        data = gzip.decompress(self.payload) if "+" in self.content_type else self.payload
        if self.content_type.startswith("application/json"):
            events = json.loads(data)
        else:
            assert data.endswith(b"\n")
            events = [json.loads(line) for line in data.splitlines()]
        for event in events:
            assert event["device_id"] == self.topic.rpartition("/")[2]
        return [event["lsn"] for event in events]


def messages(data: bytes | None) -> Iterator[Message]:
    """Section 3.3."""
    for first, body, _ in brokers.split(data or b""):
        assert first & 0xF7 == 0x32
        end = 2 + int.from_bytes(body[:2], "big")
        kind, properties = body[end + 3], body[end + 3 : end + 3 + body[end + 2]]
        assert kind == 0x03
        assert int.from_bytes(properties[1:3], "big") == len(properties) - 3
        yield Message(
            int.from_bytes(body[end : end + 2], "big"),
            bool(first & 8),
            body[2:end].decode(),
            properties[3:].decode(),
            body[end + 3 + body[end + 2] :],
        )


class OneLog:
    """A log of its own in a folder of its own."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = str(Path(self._folder.name) / "gateway.log")
        _log.create(path, _log.CAPACITY_MIN)
        self._fd = os.open(path, os.O_RDWR)
        self.log = _log.Log.open(path, self._fd, ["mqtt"])
        self._ingest = _log.Ingest(self.log, 0)

    def add(self, device_id: str, body: bytes = b'{"metrics":{"t":1}}') -> int:
        code = self._ingest.event(device_id, body, _log.now_ns())
        assert code == 0, _log.CODES[code]
        self.log.follow(0, 0)
        return self._ingest.lsn

    def close(self) -> None:
        self._ingest.close()
        self.log.close()
        os.close(self._fd)
        self._folder.cleanup()


@pytest.fixture
def one() -> Iterator[OneLog]:
    log = OneLog()
    yield log
    log.close()


class PacksModel(RuleBasedStateMachine):
    """What the window sends, and what becomes of it."""

    @initialize(
        connections=st.sampled_from([1, 3]),
        bytes_max=st.integers(50, 600),
        array=st.booleans(),
        compress=st.booleans(),
    )
    def make(self, connections: int, bytes_max: int, array: bool, compress: bool) -> None:
        self.one = OneLog()
        self.log = self.one.log
        pack = Pack(bytes_max, FOREVER, array, deterministic if compress else None)
        self.window = Window(
            self.log, 0, b"t/", b"", INFLIGHT_MAX, connections=connections, pack=pack
        )
        self.window.linger = False
        self.connections = range(connections)
        names = [f"{n:04d}" for n in range(1000)]
        self.devices = []
        """Device n is of connection n % connections, whatever the log's identity."""
        for n in range(DEVICES):
            name = next(x for x in names if self.window.connection_of(x) == n % connections)
            names.remove(name)
            self.devices.append(name)
        self.events: dict[int, str] = {}
        """Device by lsn, in the log's order."""
        self.acked: set[int] = set()
        self.dead: set[int] = set()
        self.last = dict.fromkeys(self.devices, 0)
        """The last one sent since the stream of its connection began anew."""
        self.flying: list[dict[int, Message]] = [{} for _ in self.connections]
        self.refused: list[list[list[int]]] = [[] for _ in self.connections]
        self.open = dict.fromkeys(self.connections, False)
        self.resumed = dict.fromkeys(self.connections, False)
        self.limit = dict.fromkeys(self.connections, 0)
        for connection in self.connections:
            self.start(connection, False, 5)

    def teardown(self) -> None:
        if hasattr(self, "one"):
            self.one.close()

    def start(self, connection: int, resumed: bool, receive_maximum: int) -> None:
        self.window.open(resumed, receive_maximum, connection=connection)
        self.open[connection], self.resumed[connection] = True, resumed
        self.limit[connection] = min(receive_maximum, INFLIGHT_MAX)
        if not resumed:
            self.anew(connection)

    def of(self, connection: int) -> list[int]:
        return [
            lsn
            for lsn, device in self.events.items()
            if self.window.connection_of(device) == connection
        ]

    def anew(self, connection: int) -> None:
        self.flying[connection].clear()
        self.refused[connection].clear()
        mine = self.of(connection)
        first = next((lsn for lsn in mine if lsn not in self.acked | self.dead), None)
        if first is not None:
            self.acked -= {lsn for lsn in mine if lsn > first}
        for device in self.devices:
            if self.window.connection_of(device) == connection:
                self.last[device] = 0

    # ---- steps ---------------------------------------------------------------------------------

    @rule(devices=st.lists(st.integers(0, DEVICES - 1), min_size=1, max_size=25))
    def add(self, devices: list[int]) -> None:
        for n in devices:
            self.events[self.one.add(self.devices[n])] = self.devices[n]

    @rule(data=st.data(), packets_max=st.sampled_from([1, 3, 100]), linger=st.booleans())
    def fill(self, data: st.DataObject, packets_max: int, linger: bool) -> None:
        connection = data.draw(st.sampled_from(self.connections))
        self.window.linger = linger
        sent = list(messages(self.window.fill(connection, packets_max)))
        assert self.window.filled == len(sent) <= packets_max
        for message in sent:
            self.check(connection, message)

    def check(self, connection: int, message: Message) -> None:
        flying = self.flying[connection]
        if message.dup:
            assert self.resumed[connection]
            before = flying[message.id]
            assert (before.topic, before.payload) == (message.topic, message.payload)
            return
        assert message.id not in flying
        flying[message.id] = message
        device = message.topic.removeprefix("t/")
        assert self.window.connection_of(device) == connection
        lsns = message.lsns
        assert lsns
        wanted = [
            lsn
            for lsn, name in self.events.items()
            if name == device and lsn > self.last[device] and lsn not in self.acked | self.dead
        ]
        assert lsns == wanted[: len(lsns)]
        self.last[device] = lsns[-1]

    def in_flight(self, connection: int) -> bool:
        return bool(self.open[connection] and self.window.look(connection).in_flight)

    @precondition(lambda self: any(map(self.in_flight, self.connections)))
    @rule(data=st.data(), reason=st.sampled_from([0x00, 0x10, 0x00, 0x00, 0x99, 0x97]))
    def puback(self, data: st.DataObject, reason: int) -> None:
        ready = [c for c in self.connections if self.in_flight(c)]
        connection = data.draw(st.sampled_from(ready))
        identifier = data.draw(st.sampled_from(sorted(self.flying[connection])))
        message = self.flying[connection].pop(identifier)
        packets = self.window.feed(brokers.puback(identifier, reason), connection)
        if reason < 0x80:
            assert packets is None
            self.acked.update(message.lsns)
        else:
            assert packets is not None
            assert packets[0].lsn == message.lsns[0]
            self.refused[connection].append(message.lsns)
            assert self.window.is_held(connection)

    @precondition(lambda self: any(self.refused))
    @rule()
    def dead_letters(self) -> None:
        """One event alone is set aside; of several nobody knows which."""
        for refusal in self.window.refusals():
            lsns = [refusal.lsn]
            alone = lsns in self.refused[refusal.connection]
            assert alone == (refusal.events == 1)
            if alone:
                assert self.log.mark_dead(0, refusal.lsn)
                self.dead.add(refusal.lsn)
                self.refused[refusal.connection].remove(lsns)
            assert self.window.dead_letter(refusal.lsn) == alone

    @rule(data=st.data())
    def start_over(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from(self.connections))
        split = [lsns for lsns in self.refused[connection] if len(lsns) > 1]
        may = not self.flying[connection]
        assert self.window.start_over(connection) == may
        if not may:
            return
        self.anew(connection)
        self.window.linger = False
        if self.open[connection] and split:
            for message in messages(self.window.fill(connection)):
                self.check(connection, message)
                suspects = {lsn for lsns in split for lsn in lsns}
                assert len(message.lsns) == 1 or not suspects & set(message.lsns)

    @rule(data=st.data(), probe=st.booleans())
    def lose(self, data: st.DataObject, probe: bool) -> None:
        connection = data.draw(st.sampled_from(self.connections))
        if probe:
            self.window.probe(self.window.look(connection).read_lsn, connection)
        self.window.close(connection)
        self.open[connection] = False

    @precondition(lambda self: not all(self.open.values()))
    @rule(data=st.data(), resumed=st.booleans(), receive_maximum=st.integers(1, 9))
    def connect(self, data: st.DataObject, resumed: bool, receive_maximum: int) -> None:
        away = [connection for connection, is_open in self.open.items() if not is_open]
        self.start(data.draw(st.sampled_from(away)), resumed, receive_maximum)

    # ---- what holds ----------------------------------------------------------------------------

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "one"):
            return
        view, stored = self.window.look(), self.log.cursor(0)
        prefix = []
        for lsn in self.events:
            if lsn not in self.acked | self.dead:
                assert stored.lsn <= lsn
                break
            prefix.append(lsn)
        else:
            assert not self.events or stored.lsn == self.log.committed or view.span == 0
        assert stored.ordinal == len(prefix)
        assert stored.dead_lettered == len(self.dead & set(prefix))
        assert stored.published == stored.ordinal - stored.dead_lettered
        assert self.log.unexplained(0) == 0
        assert view.refused == sum(map(len, self.refused))
        for connection in self.connections:
            mine = self.window.look(connection)
            assert mine.refused == len(self.refused[connection])
            assert mine.in_flight <= len(self.flying[connection])
            if self.open[connection]:
                assert mine.in_flight <= self.limit[connection]


TestPacksModel = PacksModel.TestCase
TestPacksModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def deterministic(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


# ---- what a subscriber and an owner see ---------------------------------------------------------


@pytest.mark.parametrize(
    ("pack", "content_type"),
    [
        (Pack(), "application/x-ndjson"),
        (Pack(array=True), "application/json"),
        (Pack(compress=deterministic), "application/x-ndjson+zstd"),
        (Pack(array=True, compress=deterministic), "application/json+zstd"),
    ],
)
def test_every_event_is_its_body_with_device_lsn_and_time(
    one: OneLog, pack: Pack, content_type: str
) -> None:
    bodies = [
        b'{"metrics":{"a":1},"ts":"2025-09-23T11:18:41Z"}',
        b'\r\n {\n "metrics" : {} ,\n"payload":{"x":"\\n\\u000a"}\n}\n',
    ]
    lsns = [one.add("pump_2", body) for body in bodies * 50]
    window = Window(one.log, 0, b"t/", b"/e", pack=pack)
    window.linger = False
    window.open(False)
    (message,) = messages(window.fill())
    assert (message.topic, message.content_type) == ("t/pump_2/e", content_type)
    data = gzip.decompress(message.payload) if pack.compress else message.payload
    events = json.loads(data) if pack.array else [json.loads(line) for line in data.splitlines()]
    assert [event.pop("lsn") for event in events] == lsns
    for event, body in zip(events, bodies * 50, strict=True):
        want = json.loads(body)
        record_ts = event.pop("ts")
        assert record_ts == want.pop("ts", record_ts)
        assert event == {"device_id": "pump_2", **want}
    window.feed(brokers.puback(message.id))
    assert window.lsn == one.log.committed
    assert one.log.cursor(0).published == 100


def test_what_compress_cannot_do_goes_as_it_is(
    one: OneLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[BaseException | None] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: seen.append(args.exc_value))

    def fails(data: bytes) -> bytes:
        raise ValueError("no")

    for compress in (fails, lambda data: b"", lambda data: data, lambda data: data + b"x"):
        one.add("d")
        window = Window(one.log, 0, b"t", None, pack=Pack(linger_ns=0, compress=compress))
        window.open(False)
        (message,) = messages(window.fill())
        assert message.content_type == "application/x-ndjson"
        assert message.payload.startswith(b'{"device_id":"d","lsn":')
    assert [str(error) for error in seen] == ["no"]


def test_a_connection_that_is_not_there_is_an_index_error(one: OneLog) -> None:
    window = Window(one.log, 0, b"t/", b"", connections=2)
    for call in (
        window.connect,
        window.close,
        window.start_over,
        window.fill,
        window.due_ns,
        window.is_held,
        window.look,
        lambda c: window.open(False, connection=c),
        lambda c: window.probe(1, c),
        lambda c: window.feed(b"", c),
    ):
        call(1)
        with pytest.raises(IndexError, match="connection 2 of 2"):
            call(2)


@pytest.mark.parametrize("connections", [0, 65])
def test_connections_have_a_limit(one: OneLog, connections: int) -> None:
    Window(one.log, 0, b"t/", b"", connections=64)
    with pytest.raises(ValueError, match=f"connections {connections}"):
        Window(one.log, 0, b"t/", b"", connections=connections)


@pytest.mark.parametrize("bytes_max", [0, PACK_BYTES_MAX + 1])
def test_packs_have_a_limit(one: OneLog, bytes_max: int) -> None:
    for good in (1, PACK_BYTES_MAX):
        Window(one.log, 0, b"t/", b"", pack=Pack(good))
    with pytest.raises(ValueError, match=f"bytes_max={bytes_max}"):
        Window(one.log, 0, b"t/", b"", pack=Pack(bytes_max))


# ---- mutants ----------------------------------------------------------------------------------

MUTANTS = {
    "an ack counts on the wrong connection": (
        "gw_mqtt_feed.c",
        "    message *m = message_at(w, c, n_message);\n",
        "    c = &w->connection[0];\n    message *m = message_at(w, c, n_message);\n",
    ),
    "the cursor passes a pack that is not acknowledged": (
        "gw_mqtt_fill.c",
        "        r->state = SENT;\n",
        "        r->state = ACKED;\n",
    ),
    "an acknowledged pack takes one event of its neighbour along": (
        "gw_mqtt.c",
        "    uint32_t index = m->records.first;\n"
        "    for (uint32_t n = m->records.count; n; n--, index = w->record[index].next)\n"
        "        w->record[index].state = ACKED;\n",
        "    uint32_t index = m->records.first;\n"
        "    for (uint32_t n = m->records.count; n; n--, index = w->record[index].next)\n"
        "        w->record[index].state = w->record[(index + 1) & w->mask].state = ACKED;\n",
    ),
    "what was acknowledged behind a hole is not sent again": (
        "gw_mqtt.c",
        "if (r->state != DEAD && behind)",
        "if (r->state == SENT || r->state == REFUSED)",
    ),
    "new ones go before what is owed": (
        "gw_mqtt_fill.c",
        "while (c->resend == c->tail && !hold_rest",
        "while (!hold_rest",
    ),
    "two packs of one device are open": (
        "gw_mqtt_packs.c",
        "        close_pack(c, i);\n        i = NONE;\n",
        "        i = NONE;\n",
    ),
    "closed packs leave in another order": (
        "gw_mqtt_packs.c",
        "    uint16_t i = c->ready.oldest;\n",
        "    uint16_t i = c->ready.newest;\n",
    ),
    "linger is ignored": (
        "gw_mqtt_fill.c",
        "return p && now_ns - p->opened_ns >= w->pack.linger_ns;",
        "return p;",
    ),
    "a pack lingers for ever": (
        "gw_mqtt_fill.c",
        "return p && now_ns - p->opened_ns >= w->pack.linger_ns;",
        "return false;",
    ),
    "a rare device waits behind a busy one": (
        "gw_mqtt_fill.c",
        "if (oldest && oldest->opened_ns != f->now_ns && has_lingered(w, oldest, f->now_ns))",
        "if (false)",
    ),
    "a full table closes the newest": (
        "gw_mqtt_packs.c",
        "close_pack(c, c->aging.oldest);\n        i = c->free",
        "close_pack(c, c->aging.newest);\n        i = c->free",
    ),
    "a full span waits for the linger": (
        "gw_mqtt_fill.c",
        "w->no_linger || span_is_full(w) || has",
        "w->no_linger || has",
    ),
    "a refused pack is set aside whole": (
        "gw_mqtt.c",
        "    if (m->records.count > 1)\n        return false;\n",
        "",
    ),
    "a refused pack is sent again as it was": (
        "gw_mqtt.c",
        "message_at(w, c, n)->state == HELD && message_at(w, c, n)->records.count > 1)",
        "false)",
    ),
    "a suspected pack is not split": (
        "gw_mqtt.c",
        "message_at(w, c, n)->state == FLYING && message_at(w, c, n)->records.count > 1)",
        "false)",
    ),
    "what is marked as dead stays in its pack": (
        "gw_mqtt_publish.c",
        "if (!repeat && gw_mqtt_is_dead(w, &r)) {",
        "if (false) {",
    ),
    "a resumed pack loses what was marked as dead": (
        "gw_mqtt_publish.c",
        "if (!repeat && gw_mqtt_is_dead(w, &r)) {",
        "if (gw_mqtt_is_dead(w, &r)) {",
    ),
    "one that is away blocks the others": (
        "gw_mqtt_fill.c",
        "        if (number == c->number)\n            return true;\n",
        "        return number == c->number;\n",
    ),
    "a refusal holds every connection": (
        "gw_mqtt_fill.c",
        "const bool hold_rest = c->refused;",
        "const bool hold_rest = w->refused;",
    ),
    "a device changes its connection": (
        "gw_mqtt.c",
        "gw_siphash(w->device_key, device_id, bytes) % w->connections",
        "(gw_siphash(w->device_key, device_id, bytes) + w->head / 64) % w->connections",
    ),
    "packs ignore the Maximum Packet Size": (
        "gw_mqtt_publish.c",
        "    m->packet_bytes = packet_bytes_of(w, &topic, compressed, bytes);\n"
        "    if (m->packet_bytes > c->packet_bytes_max)",
        "    m->packet_bytes = packet_bytes_of(w, &topic, compressed, bytes);\n    if (false)",
    ),
    "line ends of a body stay": (
        "gw_mqtt_publish.c",
        "            if (*p == '\\n' || *p == '\\r')\n",
        "            if (false)\n",
    ),
    "a device_id is doubled": (
        "gw_mqtt_publish.c",
        "    slot->names_device = names_device(",
        "    slot->names_device = false && names_device(",
    ),
    "an inner device_id counts": (
        "gw_mqtt_publish.c",
        "if (depth == 0 && behind < end",
        "if (behind < end",
    ),
    "what is compressed is not said": (
        "gw_mqtt_publish.c",
        "        compressed = n > 0 && n < bytes;\n        if (compressed) {",
        "        if (n > 0 && n < bytes) {",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_packs_and_connections_is_noticed(name: str) -> None:
    source, old, new = MUTANTS[name]
    text = (native_build.NATIVE / source).read_text()
    assert text.count(old) == 1, "the mutant's place is gone, or not the only one"
    test = native_build.TESTS / "test_mqtt_packs.c"
    program = native_build.build(test, "plain", {source: text.replace(old, new)})
    assert native_build.run(program, "plain").returncode != 0
