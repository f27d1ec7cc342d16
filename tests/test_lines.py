"""Sinks that read lines, through the bindings: the text of a line, books, what is missed, waiting.

The rules one by one are in tests/native/test_lines.c.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import _lines, _log
from gateway.dead_letters import rfc3339_ns
from gateway.refusals import Aside
from tests.log_tools import Image

MIB = 1 << 20
MQTT, FILE = 0, 1
AT_NS = 1758626321000000000


class Site:
    """A log with both sinks."""

    def __init__(self, path: Path, required: bool = True) -> None:
        self.path = path
        if not path.exists():
            _log.create(str(path), MIB)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        sinks, wanted = ["mqtt", "file"], [True, required]
        self.log = _log.Log.open(str(path), fd, sinks, required=wanted)
        os.close(fd)
        self.appender = _log.Appender(self.log)

    def append(self, body: bytes, device_id: str = "dev-1", at_ns: int = AT_NS) -> int:
        record = _log.Record(0, 0, 0, _log.DATA, 0, at_ns, None, None, device_id, body)
        lsn = self.appender.append(record)
        assert lsn > 0
        return lsn

    def settle(self) -> None:
        """Committed, and durable."""
        self.log.follow(self.log.tail - 1, 0)
        while self.log.sync():
            pass

    def pass_mqtt(self) -> None:
        cursor, accepted = self.log.cursor(MQTT), self.log.committed_ordinal
        published = cursor.published + accepted - cursor.ordinal
        self.log.set_cursor(
            MQTT, cursor._replace(lsn=self.log.committed, ordinal=accepted, published=published)
        )
        self.settle()

    def close(self) -> None:
        self.appender.close()
        self.log.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gateway.log"


@contextlib.contextmanager
def site_of(path: Path, required: bool = True) -> Iterator[Site]:
    site = Site(path, required)
    try:
        yield site
    finally:
        site.close()


@given(
    events=st.lists(
        st.tuples(
            st.text("abcXYZ019-_.:", min_size=1, max_size=40),
            st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=40), max_size=6),
            st.sampled_from([None, 0, 3]),
            st.integers(0, 4_000_000_000_000_000_000),
        ),
        min_size=1,
        max_size=12,
    ),
    bytes_max=st.sampled_from([1, 300, MIB]),
)
def test_a_line_is_the_event_as_json(
    tmp_path_factory: pytest.TempPathFactory,
    events: list[tuple[str, dict[str, object], int | None, int]],
    bytes_max: int,
) -> None:
    with site_of(tmp_path_factory.mktemp("lines") / "gateway.log") as site:
        wanted = []
        for device_id, event, indent, at_ns in events:
            body = json.dumps(event, indent=indent, ensure_ascii=False).replace("\n", "\r\n")
            lsn = site.append(body.encode(), device_id, at_ns)
            wanted.append(
                {
                    "device_id": device_id,
                    "received_at": rfc3339_ns(at_ns),
                    "lsn": lsn,
                    "event": event,
                }
            )
        site.settle()
        lines, text, count = _lines.Lines(site.log, FILE, bytes_max), b"", 0
        while (run := lines.fill()) is not None:
            assert len(run) <= bytes_max or lines.events == 1
            text += run
            count += lines.events
        assert count == len(wanted)
        assert [json.loads(line) for line in text.splitlines()] == wanted
        assert text.count(b"\n") == len(wanted)
        assert b"\r" not in text
        lines.confirm()
        assert site.log.cursor(FILE).published == len(wanted)
        assert site.log.unexplained(FILE) == 0


def test_what_was_not_confirmed_is_read_again(path: Path) -> None:
    with site_of(path) as site:
        for number in range(4):
            site.append(b'{"n":%d}' % number)
        site.settle()
        lines = _lines.Lines(site.log, FILE, 1)
        assert lines.fill()
        assert lines.fill()
        lines.confirm()
        assert lines.fill()
        site.settle()
    with site_of(path) as site:
        lines = _lines.Lines(site.log, FILE)
        run = lines.fill()
        assert run is not None
        assert [json.loads(line)["event"]["n"] for line in bytes(run).splitlines()] == [2, 3]


def test_lines_above_durable_are_read_only_when_asked_for(path: Path) -> None:
    with site_of(path) as site:
        site.append(b"{}")
        site.log.follow(0, 0)
        assert _lines.Lines(site.log, FILE).fill() is None
        assert _lines.Lines(site.log, FILE, durable=False).fill() is not None


def test_lapped_sink_skips_what_it_missed(path: Path) -> None:
    with site_of(path, required=False) as site:
        lines = _lines.Lines(site.log, FILE)
        events = 1400
        for number in range(events):
            site.append(b'{"n":%d,"x":"%s"}' % (number, b"x" * 1000))
            if number % 100 == 99:
                site.settle()
                site.pass_mqtt()
        site.append(b'{"n":1400}')
        site.settle()
        assert not site.log.is_required(FILE)
        assert site.log.lag_events(FILE) == events + 1
        with pytest.raises(_lines.Lapped) as lapped:
            lines.fill()
        assert isinstance(lapped.value, _log.LogError)
        assert lapped.value.lsn == lines.lsn
        lines.confirm()
        assert site.log.skip(FILE) == events
        assert site.log.skip(FILE) == 0
        lines.seek(site.log.cursor(FILE).lsn)
        run = lines.fill()
        assert run is not None
        assert json.loads(bytes(run))["event"] == {"n": 1400}
        lines.confirm()
        cursor = site.log.cursor(FILE)
        assert (cursor.published, cursor.skipped, site.log.unexplained(FILE)) == (1, events, 0)
        while site.log.sync():
            pass
    slot = Image(bytearray(path.read_bytes())).slot()
    assert slot.optional == 1 << FILE
    assert slot.cursors[FILE].skipped == events


def test_damaged_record_is_told_with_its_place(path: Path) -> None:
    with site_of(path) as site:
        lsn = site.append(b'{"n":1}')
        site.settle()
        with path.open("r+b") as file:
            file.seek(4 * 4096 + lsn + 70)
            file.write(b"!")
        lines = _lines.Lines(site.log, FILE)
        with pytest.raises(_log.LogCorrupt, match=f"at lsn {lsn}") as damage:
            lines.fill()
        assert damage.value.lsn == lsn


def test_wrong_arguments_are_refused(path: Path) -> None:
    with site_of(path) as site:
        lines = _lines.Lines(site.log, FILE)
        for lsn in (0, lines.lsn + 8, lines.lsn + MIB):
            with pytest.raises(ValueError, match="no record starts there"):
                lines.seek(lsn)
        with pytest.raises(IndexError):
            _lines.Lines(site.log, 2)
        with pytest.raises(ValueError, match="bytes_max"):
            _lines.Lines(site.log, FILE, 0)
        with pytest.raises(ValueError, match="already open"):
            lines.__init__(site.log, FILE)  # type: ignore[misc]
    with pytest.raises(ValueError, match="closed"):
        lines.fill()
    fd = os.open(path, os.O_RDWR)
    for required in ([False, False], [True], [True, True, True]):
        with pytest.raises(ValueError, match="required"):
            _log.Log.open(str(path), fd, ["mqtt", "file"], required=required)
    os.close(fd)


def test_sink_that_is_gone_keeps_its_events_until_it_is_given_up(path: Path) -> None:
    with site_of(path) as site:
        site.append(b"{}")
        site.settle()
        site.pass_mqtt()
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(_log.LogError, match='1 events for the sink "file"'):
        _log.Log.open(str(path), fd, ["mqtt"])
    log = _log.Log.open(str(path), fd, ["mqtt"], forget="file")
    assert log.sinks == ("mqtt",)
    log.close()
    os.close(fd)


def test_thread_that_waits_for_durable_is_woken_by_the_sync(path: Path) -> None:
    with site_of(path) as site:
        seen, found = site.log.durable, []
        thread = threading.Thread(target=lambda: found.append(site.log.wait_durable(seen, 20_000)))
        thread.start()
        site.append(b"{}")
        began = time.monotonic()
        site.settle()
        thread.join(20)
        assert found == [site.log.tail]
        thread = threading.Thread(target=lambda: site.log.wait_durable(site.log.tail, 20_000))
        thread.start()
        site.log.wake_durable()
        thread.join(20)
        assert not thread.is_alive()
        assert time.monotonic() - began < 10
        assert not site.log.sinks_want_durable
        site.log.sinks_want_durable = True
        assert site.log.sinks_want_durable


def test_no_dead_letter_is_made_of_a_place_that_may_be_written_over(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site_of(path, required=False) as site:
        lsn = site.append(b'{"metrics":{}}')
        site.settle()
        # no shelf and no topic are wanted for a look
        aside = Aside(site.log, FILE, None, None, None)  # type: ignore[arg-type]
        assert aside.read(lsn).body == b'{"metrics":{}}'
        whole = site.log.read(lsn)
        while site.log.tail <= lsn + site.log.capacity_bytes:
            site.append(b'{"metrics":{},"payload":"%s"}' % (b"x" * 60_000))
            site.settle()
            site.pass_mqtt()
        monkeypatch.setattr(Aside, "_read", lambda *_: whole)  # copied before, looked at now
        with pytest.raises(_log.Lapped):
            aside.read(lsn)
