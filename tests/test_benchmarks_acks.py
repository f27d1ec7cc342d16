"""The benchmarks of acknowledgements, idempotency and restarts: what makes a run of them fail.

No benchmark runs here; their figures belong to `make bench`.
"""

import fcntl
import itertools
import json
import os
import time
from pathlib import Path

import pytest

from benchmarks import acks, compiled, dedupe, events, logs, processes, restart, servers
from benchmarks.harness import Failed, Figure, Voided
from benchmarks.peers import one_client
from gateway import _log, _validator
from tests.test_benchmarks import Server

# ---- repeats are no load -----------------------------------------------------------------------


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that a gateway's /metrics has."""
    lines: list[str] = []
    monkeypatch.setattr(servers.Gateway, "get", lambda *_: (200, "\n".join(lines)))
    return lines


def test_a_gateway_that_took_an_event_for_a_repeat_fails_the_run(metrics: list[str]) -> None:
    gateway = object.__new__(servers.Gateway)
    metrics[:] = ["gateway_events_waiting 7.0", "gateway_events_duplicates_total 0.0"]
    assert gateway.waiting() == 7
    metrics[1] = "gateway_events_duplicates_total 3.0"
    with pytest.raises(Failed, match="3 events were taken for repeats"):
        gateway.waiting()


def test_a_log_that_was_filled_with_a_repeat_fails_the_run(tmp_path: Path) -> None:
    bodies = events.bodies(events.reference, 3)
    with logs.opened(logs.create(tmp_path, logs.MIB)) as (log, _):
        assert logs.fill(log, bodies, ["dev-1"]) == 3
        with pytest.raises(Failed, match="1 events were taken for repeats"):
            logs.fill(log, bodies[:1], ["dev-1"])


def test_one_client_never_sends_a_seq_twice() -> None:
    sent = one_client.requests(600, 6_000_000_000, "ack=durable")
    verdicts = [_validator.validate(request.partition(b"\r\n\r\n")[2]) for request in sent]
    assert {verdict.code for verdict in verdicts} == {""}
    assert len({verdict.seq for verdict in verdicts}) == 600


def run_client(server: Server, count: int, directory: Path) -> str:
    command = processes.python("-m", "benchmarks.peers.one_client", str(server.port), str(count))
    with processes.Child("client", [*command, "1000000000", "x=1"], directory, pipe=True) as client:
        return client.result(20)


def test_one_client_times_each_request(tmp_path: Path) -> None:
    with Server() as server:
        took = json.loads(run_client(server, 50, tmp_path))["microseconds"]
        assert len(took) == len(server.bodies) == 50
    assert min(took) > 0


def test_one_client_fails_with_the_first_refusal(tmp_path: Path) -> None:
    with Server(refuse_every=20) as server, pytest.raises(Failed, match="refused"):
        run_client(server, 50, tmp_path)


# ---- acknowledgements --------------------------------------------------------------------------

LADDER = ("enqueue", "durable", "sink")
BEFORE = {
    "gateway_events_accepted_total": 5.0,
    'gateway_acks_total{ack="durable"}': 1.0,
    'gateway_acks_total{ack="sink"}': 0.0,
}


@pytest.mark.parametrize("ack", LADDER)
@pytest.mark.parametrize("reached", LADDER)
def test_answers_count_only_with_the_acknowledgement_asked_for(ack: str, reached: str) -> None:
    now = dict(BEFORE)
    now["gateway_events_accepted_total"] += 100
    if reached != "enqueue":
        now[f'gateway_acks_total{{ack="{reached}"}}'] += 100
    if ack in ("enqueue", reached):
        acks.check_answers(ack, 100, BEFORE, now)
    else:
        with pytest.raises(Failed, match=f"but 0 with {ack}"):
            acks.check_answers(ack, 100, BEFORE, now)


def test_answers_without_an_event_in_the_log_fail_the_run() -> None:
    with pytest.raises(Failed, match="but 0 accepted"):
        acks.check_answers("enqueue", 1, BEFORE, BEFORE)


def test_a_sync_that_waited_for_a_core_is_no_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = itertools.count(0)
    monkeypatch.setattr(acks, "waited_for_core_ns", lambda: next(waited))
    sync = acks.BareSync(tmp_path / "pages", 10)
    assert sync.p50_ms() > 0
    sync.judge()
    waited = itertools.count(0, 10**12)
    sync.p50_ms()
    with pytest.raises(Voided, match="waited for a core"):
        sync.judge()


def test_the_time_without_a_core_is_known() -> None:
    assert acks.waited_for_core_ns() >= 0


# ---- idempotency -------------------------------------------------------------------------------


def test_the_cost_is_the_median_of_differences_within_a_round() -> None:
    figure = dedupe.cost([110.0, 530.0, 320.0], [100.0, 500.0, 300.0], 1000)
    assert (figure.value, figure.reference) == (20.0, 300.0)


def test_both_fleets_are_compared_by_what_the_index_costs_them() -> None:
    figure = dedupe.ratio(Figure(100.0, "ns", 300.0), Figure(120.0, "ns", 700.0))
    assert (figure.value, figure.reference, figure.ratio) == (120.0, 100.0, 1.2)


def test_a_million_devices_come_in_random_order_with_ids_of_one_length() -> None:
    ids = list(itertools.islice(dedupe.fleet(), dedupe.DEVICES))
    assert len(set(ids)) == dedupe.DEVICES
    assert {len(each) for each in ids} == {len(dedupe.device_id(0))}
    assert ids[:100] != sorted(ids[:100])


def test_the_index_is_off_in_the_build_without_it(tmp_path: Path) -> None:
    without = compiled.variant("_log", dedupe.SWITCH, tmp_path)
    path = logs.create(tmp_path, logs.MIB)
    for native, expected in ((_log, True), (without, False), (_log, True)):
        with logs.opened(path, native) as (log, _):
            assert dedupe.recognises(log, native) is expected


# ---- restarts ----------------------------------------------------------------------------------


def test_a_log_is_filled_to_a_share(tmp_path: Path) -> None:
    path = logs.create(tmp_path, 4 * logs.MIB)
    count = restart.fill(path, 0.5, events.stream(events.reference))
    with logs.opened(path) as (log, _):
        assert log.committed_ordinal == count
        assert 0.5 <= log.used / log.capacity_bytes < 0.6


def test_a_log_that_is_still_held_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "START_S_MAX", 0.05)
    path = tmp_path / "gateway.log"
    path.touch()
    restart.wait_released(path)
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(Failed, match="still holds the log"):
            restart.wait_released(path)


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
child.wait()
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_kill_takes_the_children_too(tmp_path: Path) -> None:
    with processes.Child("parent", processes.python("-c", PARENT), tmp_path) as parent:
        parent.wait_until(lambda: parent.last_words().isdigit(), 10, "up")
        child = int(parent.last_words())
        assert alive(child)
        parent.kill()
        assert parent.process.returncode == -9
        until = time.monotonic() + 10
        while alive(child) and time.monotonic() < until:
            os.sched_yield()
        assert not alive(child)
