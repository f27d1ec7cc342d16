"""The load test's own tests: whether it fails when it should.

Records with one violation each must be named by it, and a door that lies must be found out by a
real run, from both sides. Locust and its gevent run in a process of their own, never in this one.
"""

import asyncio
import contextlib
import copy
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from loadtest import __main__ as command
from loadtest import accounts, plan, run, subscriber, verdict
from loadtest.plan import Phases, Plan, Slo
from loadtest.subscriber import Arrivals

SLO = plan.read()
PLAN = plan.plan(SLO, Phases(1, 2, 1, 0, 2, 2))
BEGIN_NS = 1_700_000_000_000_000_000


class Records:
    """What a run without fault writes down: 3 devices, 100 events a second, 10 repeats."""

    def __init__(self) -> None:
        windows, at = {}, BEGIN_NS / 1e9
        for name, seconds in PLAN.phases:
            windows[name] = [at, at + seconds]
            at += seconds
        back_ns = round(windows["outage"][1] * 1e9)
        self.times: list[tuple[int, int]] = []
        self.arrived: accounts.Seqs = {f"steady-{n}/1": set() for n in range(3)}
        for number in range(800):
            sent_ns = BEGIN_NS + number * 10_000_000
            away = windows["outage"][0] * 1e9 <= sent_ns < back_ns
            arrived_ns = back_ns + (sent_ns - back_ns) // 100 + 50_000_000 if away else sent_ns
            self.times.append((sent_ns, arrived_ns + 2_000_000))
            self.arrived[f"steady-{number % 3}/1"].add(number)
        self.complete, self.repeated, self.foreign = True, 0, 0
        row = {"requests": 200, "failures": {}, "ms_p50": 1, "ms_p99": 9, "ms_max": 30}
        phases = [name for name, _ in PLAN.phases if name != "close"]
        self.client: dict[str, Any] = {
            "windows": windows,
            "due": dict.fromkeys(phases, 200),
            "requests": {n: {"sent": 200, "in_time": 200, "late": 0} for n in phases},
            "stats": {f"{name}: steady": copy.deepcopy(row) for name in phases},
            "accepted": accounts.pack(self.arrived),
            "refused": {"malformed-1/1": [[0, 9]]},
            "unknown": {},
            "repeats_sent": 10,
            "repeats_told": 10,
            "refusals_due": 10,
            "sheds": 0,
        }
        self.books = {
            "gateway_events_accepted_total": 801.0,
            "gateway_events_published_total": 801.0,
            "gateway_events_duplicates_total": 10.0,
            'gateway_events_refused_total{code="bad_ts"}': 10.0,
            "gateway_events_waiting": 0.0,
            "gateway_unexplained_events": 0.0,
        }

    def judge(self) -> list[verdict.Finding]:
        arrivals = Arrivals(self.complete, self.repeated, self.foreign, self.arrived, self.times)
        return verdict.judge(SLO, PLAN, self.client, arrivals, self.books)

    def fail(self, phase: str, what: str, shed: bool = False) -> None:
        self.client["stats"][f"{phase}: steady"]["failures"][what] = 1
        self.client["sheds"] += shed

    def slow(self, name: str, ms: float) -> None:
        self.client["stats"]["steady: steady"][name] = ms

    def deliver_late(self) -> None:
        for at in range(110, 116):  # 6 of the 200 of the steady phase
            sent, arrived = self.times[at]
            self.times[at] = sent, arrived + 1_100_000_000

    def drain_slowly(self) -> None:
        begin, end = (round(at * 1e9) for at in self.client["windows"]["outage"])
        for at, (sent, _) in enumerate(self.times):
            if begin <= sent < end:
                self.times[at] = sent, end + (sent - begin) // 2

    def stay(self) -> None:
        """The broker was never away."""
        self.times = [(sent, sent + 2_000_000) for sent, _ in self.times]

    def lose(self) -> None:
        self.arrived["steady-1/1"].discard(31)

    def lose_behind_a_repeat(self) -> None:
        """As many messages as events, but not the same ones."""
        self.lose()
        self.repeated += 1

    def deliver_refused(self) -> None:
        self.arrived["malformed-1/1"] = {4}

    def deliver_unsent(self) -> None:
        self.arrived["steady-1/1"].add(100_000)

    def count(self, name: str, by: float) -> None:
        self.books[name] += by

    def send_late(self) -> None:
        self.client["requests"]["steady"]["late"] = 3

    def send_less(self, late: int) -> None:
        self.client["requests"]["burst"] = {"sent": 200, "in_time": 195, "late": late}


MET, MISSED, VOID = verdict.MET, verdict.MISSED, verdict.VOID
VIOLATIONS: dict[str, tuple[Callable[[Records], None], str, int, str]] = {
    "a request fails": (
        lambda r: r.fail("steady", "status 500"),
        "steady.failures_max",
        MISSED,
        "1 x steady: status 500",
    ),
    "a request of the steady phase is shed": (
        lambda r: r.fail("steady", verdict.SHED, shed=True),
        "steady.failures_max",
        MISSED,
        verdict.SHED,
    ),
    "the median is slow": (lambda r: r.slow("ms_p50", 6), "steady.enqueue_ms_p50_max", MISSED, ""),
    "the slowest are slow": (
        lambda r: r.slow("ms_p99", 26),
        "steady.enqueue_ms_p99_max",
        MISSED,
        "",
    ),
    "nothing was measured": (
        lambda r: r.slow("ms_p99", math.inf),
        "steady.enqueue_ms_p99_max",
        MISSED,
        "",
    ),
    "deliveries are late": (
        Records.deliver_late,
        "steady.delivery_s_p99_max",
        MISSED,
        "200 events",
    ),
    "503 without Retry-After in the burst": (
        lambda r: r.fail("burst", "503 without Retry-After"),
        "burst.failures_max",
        MISSED,
        "503 without",
    ),
    "a failure in the outage": (
        lambda r: r.fail("outage", "status 504"),
        "outage.failures_max",
        MISSED,
        "status 504",
    ),
    "a failure in the recovery": (
        lambda r: r.fail("recovery", "no answer: ConnectionResetError"),
        "outage.failures_max",
        MISSED,
        "no answer",
    ),
    "the backlog drains slowly": (
        Records.drain_slowly,
        "outage.drain_factor_min",
        MISSED,
        "200 waiting",
    ),
    "an event is lost": (Records.lose, "events.lost_max", MISSED, "steady-1/1 seq 31"),
    "an event is lost behind a repeat": (
        Records.lose_behind_a_repeat,
        "events.lost_max",
        MISSED,
        "steady-1/1 seq 31",
    ),
    "the last event does not come": (
        lambda r: setattr(r, "complete", False),
        "events.lost_max",
        MISSED,
        "the last event",
    ),
    "a refused event arrives": (
        Records.deliver_refused,
        "events.refused_arrived_max",
        MISSED,
        "malformed-1/1 seq 4",
    ),
    "an event arrives that nobody sent": (
        Records.deliver_unsent,
        "events.unexplained_max",
        MISSED,
        "steady-1/1 seq 100000",
    ),
    "something else arrives": (
        lambda r: setattr(r, "foreign", 1),
        "events.unexplained_max",
        MISSED,
        "nobody sent",
    ),
    "the books miss an accepted one": (
        lambda r: r.count("gateway_events_accepted_total", -1),
        "events.unexplained_max",
        MISSED,
        "accepted_total is 800",
    ),
    "the books have one too many": (
        lambda r: r.count("gateway_events_accepted_total", 1),
        "events.unexplained_max",
        MISSED,
        "accepted_total is 802",
    ),
    "the books miss a repeat": (
        lambda r: r.count("gateway_events_duplicates_total", -1),
        "events.unexplained_max",
        MISSED,
        "duplicates_total is 9",
    ),
    "the books miss a refusal": (
        lambda r: r.count('gateway_events_refused_total{code="bad_ts"}', -1),
        "events.unexplained_max",
        MISSED,
        "refused_total is 9",
    ),
    "an event waits for ever": (
        lambda r: r.count("gateway_events_waiting", 1),
        "events.unexplained_max",
        MISSED,
        "waiting is 1",
    ),
    "the gateway cannot explain one": (
        lambda r: r.count("gateway_unexplained_events", 1),
        "events.unexplained_max",
        MISSED,
        "unexplained_events is 1",
    ),
    "the broker was not away": (Records.stay, "outage.drain_factor_min", VOID, "was not away"),
    "locust was late": (Records.send_late, "client.late_share_max", VOID, "3 of 200"),
    "locust sent too little": (
        lambda r: r.send_less(late=3),
        "client.sent_share_min",
        VOID,
        "burst: 195 of 200 requests; locust was late",
    ),
    "late answers held requests back": (
        lambda r: r.send_less(late=2),
        "client.sent_share_min",
        MISSED,
        "late answers held the rest back",
    ),
}


def test_a_run_without_fault_meets_every_slo() -> None:
    findings = Records().judge()
    assert {finding.verdict for finding in findings} == {"MET"}, "\n".join(map(str, findings))
    assert verdict.exit_code(findings) == MET
    limits = {
        f"{table}.{key}"
        for table, keys in msgspec.to_builtins(SLO).items()
        for key in keys
        if key.endswith(("_max", "_min"))
    }
    assert {finding.slo for finding in findings} == limits, "an SLO that nobody judges"


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_named(name: str) -> None:
    violate, slo, code, words = VIOLATIONS[name]
    records = Records()
    violate(records)
    findings = records.judge()
    (found,) = [finding for finding in findings if finding.verdict != "MET"]
    assert found.slo == slo
    assert words in str(found)
    assert verdict.exit_code(findings) == code


def test_shedding_is_no_failure_in_the_burst() -> None:
    records = Records()
    records.fail("burst", verdict.SHED, shed=True)
    assert verdict.exit_code(records.judge()) == MET


def test_an_unknown_event_may_arrive() -> None:
    for arrives in (False, True):
        records = Records()
        records.client["unknown"] = {"steady-1/1": [[5000, 5000]]}
        if arrives:
            records.arrived["steady-1/1"].add(5000)
            records.books["gateway_events_accepted_total"] += 1
            records.books["gateway_events_published_total"] += 1
        assert verdict.exit_code(records.judge()) == MET


def test_a_late_client_excuses_times_only() -> None:
    records = Records()
    records.send_late()
    records.slow("ms_p99", 500)
    assert verdict.exit_code(records.judge()) == VOID
    records.lose()
    assert verdict.exit_code(records.judge()) == MISSED


def test_a_void_run_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(command, "attempt", lambda _: codes.pop(0))
    for given, code, left in (
        ([VOID, VOID, MET], VOID, [MET]),
        ([VOID, MET], MET, []),
        ([MISSED, MET], MISSED, [MET]),
    ):
        codes[:] = given
        assert command.main(["--attempts", "2"]) == code
        assert codes == left


# ---- slo.toml, accounts, records -----------------------------------------------------------------


def test_the_slos_are_those_that_were_promised() -> None:
    assert msgspec.to_builtins(SLO.steady) == {
        "requests_per_second": 1000,
        "failures_max": 0,
        "enqueue_ms_p50_max": 5,
        "enqueue_ms_p99_max": 25,
        "delivery_s_p99_max": 1.0,
    }
    assert (SLO.burst.factor, SLO.burst.failures_max) == (3, 0)
    assert (SLO.outage.drain_factor_min, SLO.outage.failures_max) == (5, 0)
    assert set(msgspec.to_builtins(SLO.events).values()) == {0}
    assert (SLO.phases["full"].burst, SLO.phases["full"].outage) == (10, 20)


def test_a_wrong_key_in_the_slos_is_named(tmp_path: Path) -> None:
    path = tmp_path / "slo.toml"
    path.write_text(plan.PATH.read_text().replace("lost_max", "losses_max"))
    with pytest.raises(ValueError, match=r"slo\.toml: .*losses_max"):
        plan.read(path)


def test_the_fleets_send_what_the_slos_say() -> None:
    whole = plan.plan(SLO, SLO.phases["full"])
    assert whole.fleets["steady"].requests_per_second == SLO.steady.requests_per_second
    both = whole.fleets["steady"].requests_per_second + whole.fleets["bursty"].requests_per_second
    assert both == SLO.burst.factor * SLO.steady.requests_per_second


def test_accounts_survive_a_file() -> None:
    seqs = {"a/1": {0, 1, 2, 7, 9, 10}, "b/1": {5}, "b/2": set[int]()}
    packed = json.loads(json.dumps(accounts.pack(seqs)))
    assert packed == {"a/1": [[0, 2], [7, 7], [9, 10]], "b/1": [[5, 5]]}
    assert accounts.unpack(packed) == {"a/1": seqs["a/1"], "b/1": {5}}
    assert accounts.minus(seqs, {"a/1": {0, 1, 2, 7, 9}, "b/1": {5}}) == {"a/1": {10}}


def test_the_subscriber_keeps_apart_what_came_twice(tmp_path: Path) -> None:
    record = subscriber.Record()
    for boot, seq in ((1, 1), (1, 2), (1, 1), (2, 1)):
        body = b'{"boot":%d,"seq":%d,"metrics":{},"payload":{"sent_ns":7}}' % (boot, seq)
        record.take(b"telemetry/dev-1", body, 10)
    record.take(b"telemetry/dev-1", b"else", 10)
    record.write(tmp_path / "record.json")
    found = subscriber.read(tmp_path / "record.json")
    assert found.arrived == {"dev-1/1": {1, 2}, "dev-1/2": {1}}
    assert (found.repeated, found.foreign, found.complete) == (1, 1, False)
    assert found.times == [(7, 10)] * 3


# ---- real runs, small ----------------------------------------------------------------------------


def small(phases: Phases, late_share_max: float = 1.0) -> tuple[Slo, Plan]:
    """60 requests a second. A machine with others on it is not what is tested: nothing is void."""
    steady = msgspec.structs.replace(SLO.steady, requests_per_second=60)
    client = msgspec.structs.replace(
        SLO.client, late_ms=250, late_share_max=late_share_max, sent_share_min=0.0
    )
    slo = msgspec.structs.replace(SLO, steady=steady, client=client)
    return slo, plan.plan(slo, phases)


class LyingDoor:
    """Stands before the gateway: every answer comes `delay_s` late, and one device's events are
    answered 202 and thrown away.
    """

    def __init__(self, upstream_port: int, delay_s: float, forgets: bytes) -> None:
        self.port, self.forgotten = 0, 0
        self._upstream_port, self._delay_s, self._forgets = upstream_port, delay_s, forgets
        self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
        self._open = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))

    def __enter__(self) -> int:
        self._thread.start()
        assert self._open.wait(10)
        return self.port

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._open.set()
        await self._stop.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = None
        try:
            back, there = await asyncio.open_connection("127.0.0.1", self._upstream_port)
            while True:
                request = await self._message(reader)
                if b"/" + self._forgets + b" " in request:
                    self.forgotten += 1
                    answer = b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\n{}"
                else:
                    there.write(request)
                    answer = await self._message(back)
                await asyncio.sleep(self._delay_s)
                writer.write(answer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            if there is not None:
                there.close()

    @staticmethod
    async def _message(reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        return head + await reader.readexactly(length)


def test_every_fleet_is_accounted_for_from_both_sides(tmp_path: Path) -> None:
    slo, small_plan = small(Phases(1, 3, 1, 0, 2, 3))
    outcome = run.run(slo, small_plan, tmp_path, say=print, report=tmp_path / "report.html")
    words = "\n".join(map(str, outcome.findings))
    for finding in outcome.findings:
        assert finding.verdict == "MET" or finding.timed, words
    (drained,) = (f for f in outcome.findings if f.slo == "outage.drain_factor_min")
    assert drained.found > 0, words
    fleets = {key.partition("-")[0] for key in outcome.arrivals.arrived}
    assert fleets == {"steady", "bursty", "reconnecting", "duplicates", "batches"}
    assert any(key.endswith("/2") for key in outcome.arrivals.arrived), "nobody came back"
    assert outcome.client["refusals_due"] > 0
    assert outcome.client["repeats_told"] > 0
    assert "<html" in (tmp_path / "report.html").read_text()
    assert "gevent" not in sys.modules


def test_a_door_that_is_slow_or_forgets_is_found_out(tmp_path: Path) -> None:
    slo, small_plan = small(Phases(1, 3, 0, 0, 0, 0))
    doors: list[LyingDoor] = []

    @contextlib.contextmanager
    def lying(port: int) -> Iterator[int]:
        doors.append(LyingDoor(port, 0.4, b"steady-0003"))
        with doors[0] as lies:
            yield lies

    outcome = run.run(slo, small_plan, tmp_path, say=print, door=lying)
    words = "\n".join(map(str, outcome.findings))
    found = {finding.slo: finding for finding in outcome.findings if finding.verdict == "MISSED"}
    # 250 ms between requests of a device, 400 ms each: those that had to wait say so
    assert found["steady.enqueue_ms_p50_max"].found >= 600, words
    assert 0 < found["events.lost_max"].found <= doors[0].forgotten, words
    assert "steady-0003/1 seq 0" in found["events.lost_max"].detail
    assert "gateway_events_accepted_total is" in found["events.unexplained_max"].detail
    assert verdict.exit_code(outcome.findings) == MISSED


def test_a_client_that_stands_still_is_no_verdict_on_the_gateway(tmp_path: Path) -> None:
    slo, small_plan = small(Phases(1, 3, 0, 0, 0, 0), late_share_max=0.1)

    def say(text: str) -> None:
        if text.startswith("steady"):
            (locust,) = (
                child for child in psutil.Process().children() if "locust" in child.cmdline()
            )
            locust.suspend()
            try:
                time.sleep(1.5)  # half of the phase
            finally:
                locust.resume()

    outcome = run.run(slo, small_plan, tmp_path, say=say)
    words = "\n".join(map(str, outcome.findings))
    (late,) = (f for f in outcome.findings if f.slo == "client.late_share_max")
    assert late.verdict == "VOID", words
    assert late.found > 0.2, words
    assert verdict.exit_code(outcome.findings) == VOID, words
