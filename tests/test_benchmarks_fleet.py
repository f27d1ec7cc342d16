"""The client of the batch and latency benchmarks: what it sends, and what it must not hide."""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import batch, fleet, offered_load
from benchmarks.fleet import Fleet, Run
from benchmarks.harness import Context, Failed
from gateway import _validator
from tests.test_benchmarks import Server


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def seqs(bodies: list[bytes]) -> list[int | None]:
    """Of all events in bodies of lines; each must be valid."""
    verdicts = [_validator.validate(line) for body in bodies for line in body.splitlines()]
    assert {verdict.code for verdict in verdicts} == {""}
    return [verdict.seq for verdict in verdicts]


def test_every_event_of_every_run_has_a_seq_of_its_own(client: Fleet, server: Server) -> None:
    sent = [client.send(server.port, "ndjson", 10, 5, requests=20) for _ in range(2)]
    assert [run.requests for run in sent] == [20, 20]
    found = seqs(server.bodies)
    assert len(found) == len(set(found)) == sum(run.accepted for run in sent) == 400


def test_single_events_are_sent_as_they_are(client: Fleet, server: Server) -> None:
    client.send(server.port, "event", 1, 5, requests=30, connections=4)
    assert len(set(seqs(server.bodies))) == 30
    assert server.targets == {b"/v1/ingest/fleet-%04d" % number for number in range(4)}


def test_an_array_is_one_json_value(client: Fleet, server: Server) -> None:
    client.send(server.port, "array", 7, 5, requests=3)
    events = [event for body in server.bodies for event in json.loads(body)]
    assert len({event["seq"] for event in events}) == len(events) == 21


def test_events_name_as_many_devices_as_asked_for(client: Fleet, server: Server) -> None:
    client.send(server.port, "ndjson", 100, 5, requests=20, devices=50)
    names = [json.loads(line)["device_id"] for body in server.bodies for line in body.splitlines()]
    assert server.targets == {b"/v1/ingest"}
    assert {int(name.removeprefix("dev-")) for name in names} == set(range(50))
    steps = [int(b[4:]) - int(a[4:]) for a, b in itertools.pairwise(names)]
    assert steps.count(1) < len(steps) / 10, "devices come in no order"


def test_one_refused_request_fails_the_run(client: Fleet) -> None:
    with Server(refuse_every=7) as server, pytest.raises(Failed, match=r"refused: HTTP/1\.1 503"):
        client.send(server.port, "ndjson", 2, 5, requests=50, connections=2)


class Counting(Server):
    """Says in its answer how many events it accepted: one less than it got."""

    answer = b'{"ack":"enqueue","accepted":4,"duplicates":1,"refused":0,"errors":[]}'


def test_an_event_that_is_taken_for_a_repeat_fails_the_run(client: Fleet) -> None:
    with Counting() as server, pytest.raises(Failed, match="of 10 events, 8 were accepted, 2 take"):
        client.send(server.port, "ndjson", 5, 5, requests=2)


class Stalling(Server):
    """Stops for a while, once."""

    at, seconds = 40, 0.4

    def pause(self) -> None:
        if len(self.bodies) == self.at:
            time.sleep(self.seconds)


def test_requests_that_were_due_while_the_server_stood_still_are_late(client: Fleet) -> None:
    """200 a second over one connection: about 80 of 200 were due in the pause, the worst 0.4 s."""
    with Stalling() as server:
        run = client.send(server.port, "event", 1, 1, rate=200, connections=1)
    assert run.requests == 200
    assert run.p90_us > 100_000, run
    with Stalling() as server:  # a closed loop does not see it: the control
        run = client.send(server.port, "event", 1, 5, requests=200, connections=1)
    assert run.p90_us < 100_000, run


def test_a_load_that_is_too_much_makes_the_run_longer() -> None:
    run = Run(1000, 1000, 1, 1.2, 0.1, 1, 1, 1, 1)
    assert offered_load.kept_up(run, rate=860)
    assert not offered_load.kept_up(run, rate=1000)


def test_batches_leave_room_in_the_log() -> None:
    batches = fleet.batches_that_fit(1 << 30, 0.5, 1000)
    one = len(fleet.body("ndjson", 1000, 0, False))
    assert (1 << 30) * 0.3 < batches * one < (1 << 30) * 0.5
    assert fleet.batches_that_fit(1 << 30, 0.5, 1000, named=True) < batches


def test_a_disk_without_room_for_the_log_is_said_before(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="name another --directory"):
        batch.check_room(Context(quick=True, directory=tmp_path), 1 << 50)
