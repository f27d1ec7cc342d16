"""The table of peers: that each peer does the job, and that no row says more than was measured.

A peer that needs an environment of its own is tried where that environment is; the one that runs in
the project's is tried always. Figures belong to `make bench-peers`.
"""

import contextlib
import functools
import http.client
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    deliveries,
    events,
    gates,
    installs,
    peer_readme,
    peer_servers,
    peer_table,
    processes,
    servers,
    shares,
)
from benchmarks.deliveries import Confirmed, Subscriber, Taken
from benchmarks.harness import Failed
from benchmarks.peer_servers import PEERS
from benchmarks.peers import mqtt_wire, thingsboard_peer

EVENT = events.bodies(events.reference, 1, first_seq=9_990_000_001)[0]
ENVIRONMENT = {"fastapi": "fastapi", "robyn": "robyn", "aiomqtt": "granian"}
ENVIRONMENT["thingsboard"] = "thingsboard"
HERE = ["gmqtt", *(key for key, venv in ENVIRONMENT.items() if installs.has_venv(venv))]
if installs.has_node_red():
    HERE.append("node_red")
UNCHECKED = {"thingsboard"}
REFUSED = {"thingsboard": {200}, "fastapi": {422}, "node_red": {400, 500}}
AS_SENT = {"fastapi", "robyn", "gmqtt", "aiomqtt"}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[servers.Mosquitto]:
    with servers.Mosquitto(tmp_path / "mosquitto", more=deliveries.SETTINGS) as running:
        yield running


def post(port: int, device: str, body: bytes) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/v1/ingest/{device}", body, headers)
        return connection.getresponse().status


def publish(port: int, *bodies: bytes, topic: str = "telemetry/d") -> None:
    connection, parser = mqtt_wire.dial(port, "test-publisher")
    with contextlib.closing(connection):
        left = len(bodies)
        for number, body in enumerate(bodies, 1):
            connection.sendall(mqtt_wire.publish(topic, body, number))
        while left:
            left -= sum(1 for first, _ in parser.feed(connection.recv(4096)) if first == 0x40)


# ---- the peers ---------------------------------------------------------------------------------


def topic_of(packet: bytes) -> str:
    return packet[2 : 2 + int.from_bytes(packet[:2])].decode()


@pytest.mark.parametrize("key", HERE)
def test_one_request_to_a_peer_is_one_message(
    key: str, tmp_path: Path, broker: servers.Mosquitto
) -> None:
    peer = PEERS[key]
    topic = "v1/gateway/telemetry" if key == "thingsboard" else "telemetry/dev-0001"
    with peer.start(tmp_path, broker.port, 1) as server:
        connection, parser = mqtt_wire.dial(broker.port, "test-subscriber")
        with contextlib.closing(connection):
            connection.sendall(mqtt_wire.subscribe(topic.replace("dev-0001", "#")))
            connection.settimeout(20)
            assert [first for first, _ in parser.feed(connection.recv(100))] == [mqtt_wire.SUBACK]
            refused = {
                post(server.port, "dev-0001", b'{"metrics":{"Temp":1},"seq":1}'),
                post(server.port, "dev-0001", b'{"metrics":{"t":1},"seq":1,"other":2}'),
                post(server.port, "dev-0001", b'{"metrics":{"t":"1"},"seq":1}'),
                post(server.port, "dev-0001", b"{"),  # the 500 of Node-RED
                post(server.port, "dev.0001", EVENT.replace(b"999", b"998")),
            }
            assert refused == REFUSED.get(key, {400})
            assert post(server.port, "dev-0001", EVENT) == peer.good_status
            got: list[tuple[int, bytes]] = []
            while not any(b"9990000001" in packet for _, packet in got):
                got += parser.feed(connection.recv(65536))
    assert {topic_of(packet) for _, packet in got} == {topic}
    if key not in UNCHECKED:  # what was refused would have come first
        ((first, packet),) = got
        body = mqtt_wire.payload(first, packet)
        assert json.loads(body) == json.loads(EVENT)
        assert (body == EVENT) == (key in AS_SENT)


def test_what_is_published_by_thingsboard_names_the_seq() -> None:
    settings = thingsboard_peer.rest(1)
    (mapping,) = settings["mapping"]
    assert mapping["endpoint"] == "/v1/ingest/{device_id}"
    assert "seq" in [value["key"] for value in mapping["converter"]["timeseries"]]
    message = b'{"dev-0001":[{"ts":1,"values":{"seq":"1021004936","t":"1"}}]}'
    assert deliveries._seqs(message) == [b"1021004936"]


def test_the_flow_of_node_red_publishes_what_it_answers() -> None:
    flow = json.loads((installs.PEERS / "node_red" / "flow.json").read_text())
    nodes = {node["id"]: node for node in flow}
    (out,) = (node for node in flow if node["type"] == "mqtt out")
    assert out["qos"] == "1"
    checked, refused = nodes["check"]["wires"]
    assert (checked, refused) == ([out["id"]], ["answer"])
    (complete,) = (node for node in flow if node["type"] == "complete")
    assert (complete["scope"], complete["wires"]) == ([out["id"]], [["answer"]])
    assert not set(nodes) & {node["type"] for node in flow}  # Node-RED calls that a circle


@pytest.mark.parametrize("path", sorted((installs.PEERS / "requirements").iterdir()))
def test_the_versions_of_a_peer_are_pinned(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines[1:])


def test_every_peer_has_a_share() -> None:
    assert set(shares.SHARES) == set(shares.RATES) == set(PEERS)


# ---- what became of the events -----------------------------------------------------------------


def test_a_subscriber_counts_each_event_once(broker: servers.Mosquitto) -> None:
    with Subscriber(broker.port) as subscriber:
        bodies = [b'{"seq":%d}' % seq for seq in (1011000001, 1011000002, 1011000002, 1021000001)]
        publish(broker.port, *bodies, b'{"d":[{"seq": "1011000003"},{"seq":"1011000004"}]}')
        assert subscriber.confirm(101, 4) == Confirmed(4, 4)
        assert subscriber.delivered(102) == 1


def test_an_event_that_was_lost_is_missing(
    broker: servers.Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "GIVEN_UP_S", 0.3)
    with Subscriber(broker.port) as subscriber:
        publish(broker.port, b'{"seq":1011000001}', b'{"seq":1011000003}')
        confirmed = subscriber.confirm(101, 3)
    assert confirmed == Confirmed(3, 2)
    assert confirmed.share == pytest.approx(2 / 3)


def test_a_slow_subscriber_gets_all(broker: servers.Mosquitto) -> None:
    with Subscriber(broker.port) as subscriber:
        subscriber._lock.acquire()  # it reads no more
        bodies = [b'{"seq":101%07d,"rest":"%s"}' % (n, b"x" * 2000) for n in range(5000)]
        try:
            publish(broker.port, *bodies[:20])
            for at in range(20, len(bodies), 20):
                publish(broker.port, *bodies[at : at + 20])
        finally:
            subscriber._lock.release()
        assert subscriber.confirm(101, len(bodies)).share == 1


def test_the_brokers_count_is_waited_for(broker: servers.Mosquitto) -> None:
    with contextlib.closing(Taken(broker.port)) as taken:
        before = taken.now()
        publish(broker.port, *[b"{}"] * 15)
        assert taken.since(before, 15) == 15


def test_a_count_that_stands_still_is_not_waited_for_long(
    broker: servers.Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "GIVEN_UP_S", 0.2)
    with contextlib.closing(Taken(broker.port)) as taken:
        assert taken.since(taken.now(), 1) == 0


# ---- turns -------------------------------------------------------------------------------------


def sides(**given: list[float | Exception]) -> dict[str, Callable[[], float]]:
    def side(values: Iterator[float | Exception]) -> float:
        value = next(values)
        if isinstance(value, Exception):
            raise value
        return value

    return {name: functools.partial(side, iter(values)) for name, values in given.items()}


def quiet(_: str) -> None:
    pass


def test_a_side_that_fails_is_left_out_while_the_others_go_on() -> None:
    broken: dict[str, str] = {}
    given = sides(nginx=[9, 1, 2], good=[9, 3, 4], bad=[9, 5, Failed("refused"), 7])
    found = peer_table.take_turns(given, 2, broken, quiet)
    assert (found["good"], found["nginx"]) == ([3, 4], [1, 2])
    assert broken == {"bad": "refused"}


def test_a_side_that_is_no_number_is_broken() -> None:
    broken: dict[str, str] = {}
    peer_table.take_turns(sides(nginx=[1, 1], bad=[0.0]), 1, broken, quiet)
    assert "no measurement" in broken["bad"]


def test_without_nginx_there_is_no_table() -> None:
    with pytest.raises(Failed, match="gone"):
        peer_table.take_turns(sides(nginx=[1, Failed("gone")]), 1, {}, quiet)


# ---- rows --------------------------------------------------------------------------------------

RATES = {
    "nginx": 100_000,
    "ours_enqueue": 40_000,
    "ours_sink": 20_000,
    "ours_broker_away": 51_000,
    "peer_fastapi": 4_000,
    "peer_robyn": 7_000,
    "peer_gmqtt": 20_000,
    "peer_aiomqtt": 8_000,
    "peer_node_red": 3_600,
    "peer_thingsboard": 3_300,
}


def measured(**changes: float) -> peer_table.Measured:
    rates = {name: [rate, rate, rate] for name, rate in (RATES | changes).items()}
    found = peer_table.Measured(rates=rates)
    found.confirmed = {
        name: Confirmed(1000, 1010) for name in rates if name not in ("nginx", "ours_broker_away")
    }
    return found


def rows(found: peer_table.Measured) -> dict[str, Any]:
    return {row.name: row for row in peer_table.rows_of(found)}


def test_each_figure_is_a_ratio_of_two_sides() -> None:
    found = rows(measured())
    ratios = {name: found[name].figure.ratio for name in peer_table.COMPARED}
    assert ratios == {
        "vs_fastapi": 10,
        "vs_best_peer": 2,
        "sink_vs_aiomqtt_peer": 2.5,
        "single_vs_nginx": 0.51,
    }
    assert set(found) == set(peer_table.REFERENCES)
    assert all(gates.verdict(found[name], False) == "met" for name in peer_table.COMPARED)


@pytest.mark.parametrize(
    ("name", "rate", "short"),
    [
        ("ours_enqueue", 31_000, "vs_fastapi"),
        ("ours_enqueue", 29_000, "vs_best_peer"),
        ("ours_sink", 11_000, "sink_vs_aiomqtt_peer"),
        ("ours_broker_away", 49_000, "single_vs_nginx"),
    ],
)
def test_a_slower_gateway_falls_short(name: str, rate: float, short: str) -> None:
    found = peer_table.rows_of(measured(**{name: rate}))
    assert short in gates.short(found, quick=False)


@pytest.mark.parametrize("key", PEERS)
def test_a_peer_that_is_not_itself_is_void(key: str) -> None:
    least = shares.share_min(key) * RATES["nginx"]
    name = f"peer_{key}"
    assert rows(measured(**{name: least * 1.01}))[name].status == "measured"
    assert rows(measured(**{name: least * 0.99}))[name].status == "void"


def test_what_is_compared_with_a_void_peer_is_void() -> None:
    found = rows(measured(peer_gmqtt=10_000))
    assert found["vs_best_peer"].status == "void"
    assert found["vs_best_peer"].figure is None
    assert "peer_gmqtt" in found["vs_best_peer"].reason
    assert found["vs_fastapi"].status == "measured"
    assert "vs_best_peer" in gates.short(found.values(), quick=False)


def test_a_gateway_that_loses_has_failed() -> None:
    given = measured()
    given.confirmed["ours_enqueue"] = Confirmed(1000, 999)
    found = rows(given)
    assert found["ours_enqueue"].status == "failed"
    assert "1 of 1000" in found["ours_enqueue"].reason
    assert (found["vs_fastapi"].status, found["vs_best_peer"].status) == ("failed", "failed")
    assert found["sink_vs_aiomqtt_peer"].status == "measured"


def test_a_peer_that_loses_has_it_in_its_row() -> None:
    given = measured()
    given.confirmed["peer_gmqtt"] = Confirmed(1000, 420)
    found = rows(given)
    assert "580 of 1000" in found["peer_gmqtt"].figure.note
    assert "580 of 1000" in found["vs_best_peer"].figure.note
    text = peer_readme.render(results(given))
    assert re.search(r"Granian \+ msgspec \+ gmqtt \|.*\| 42\.0% \|", text)


def test_a_peer_that_is_not_installed_says_why_and_fails_the_run() -> None:
    given = measured()
    del given.rates["peer_node_red"]
    given.broken["peer_node_red"] = "not installed: E: Unable to locate package npm"
    found = peer_table.rows_of(given)
    (row,) = (row for row in found if row.name == "peer_node_red")
    assert (row.status, row.figure) == ("failed", None)
    assert peer_table.exit_code(found, gate=False, quick=False) == 1
    assert "not installed: E: Unable" in peer_readme.render(results(given))


def test_peers_that_were_not_asked_for_have_no_row() -> None:
    given = measured()
    for key in PEERS:
        if key != "gmqtt":
            del given.rates[f"peer_{key}"]
    found = rows(given)
    assert set(found) == {*peer_table.OURS, "peer_gmqtt", "vs_best_peer", "single_vs_nginx"}
    assert peer_table.exit_code(list(found.values()), gate=True, quick=False) == 0


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert peer_table.main(["--peers", "flask"]) == 2
    assert "no peer flask" in capsys.readouterr().err


# ---- installing --------------------------------------------------------------------------------


def test_an_installation_that_fails_says_the_line_that_tells(tmp_path: Path) -> None:
    code = "print('Collecting x'); print('ERROR: No matching distribution'); print('bye'); exit(1)"
    with pytest.raises(installs.NotInstalled, match="not installed: ERROR: No matching"):
        installs.run([sys.executable, "-c", code])
    with pytest.raises(installs.NotInstalled, match="not installed: /nowhere: No such file"):
        installs.run(["/nowhere"])


def test_an_installation_is_made_once_for_its_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(installs, "ROOT", tmp_path)
    monkeypatch.setattr(installs, "FOLDER", tmp_path / "build")
    monkeypatch.setattr(installs, "PEERS", tmp_path)

    def run(command: list[str], cwd: Path = tmp_path) -> None:
        steps.append(command[2])
        if command[2] == "venv":
            (tmp_path / "build" / "x").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(installs, "run", run)
    wanted = tmp_path / "requirements" / "x.txt"
    wanted.parent.mkdir()
    wanted.write_text("# x\nx==1\n")
    assert not installs.has_venv("x")
    assert installs.venv("x") == installs.venv("x") == str(tmp_path / "build/x/bin/python")
    assert steps == ["venv", "pip"]
    wanted.write_text("# x\nx==2\n")
    assert not installs.has_venv("x")
    installs.venv("x")
    assert steps == ["venv", "pip"] * 2


def test_an_installation_that_failed_is_not_taken_for_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installs, "ROOT", tmp_path)
    monkeypatch.setattr(installs, "FOLDER", tmp_path / "build")

    def run(command: list[str], cwd: Path = tmp_path) -> None:
        (tmp_path / "build" / "robyn").mkdir(parents=True, exist_ok=True)
        if "pip" in command:
            raise installs.NotInstalled("not installed: no network")

    monkeypatch.setattr(installs, "run", run)
    with pytest.raises(installs.NotInstalled):
        installs.venv("robyn")
    assert not installs.has_venv("robyn")


def test_npm_comes_from_debian_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[str]] = []
    monkeypatch.setattr(installs.shutil, "which", lambda _: "npm" if len(steps) == 2 else None)
    monkeypatch.setattr(installs, "run", steps.append)
    assert installs.npm() == "npm"
    assert [step[-2:] for step in steps] == [["apt-get", "update"], ["nodejs", "npm"]]


def test_the_versions_of_what_a_title_names_are_said() -> None:
    assert re.search(r"fastapi \d.*robyn \d.*node-red 4\.\d", installs.versions())


def test_a_peer_that_does_not_start_leaves_no_process(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"

    def start(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peer_servers, "START_S_MAX", 0.5)
        peer_servers.PeerServer("mute", lambda _: processes.python("-c", code), tmp_path, 1)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Failed, match="not ready"):
        start(patch)
    pid = (tmp_path / "mute.log").read_text().strip()
    assert subprocess.run(["ps", "-p", pid], capture_output=True).returncode == 1


# ---- the README --------------------------------------------------------------------------------


def results(given: peer_table.Measured, quick: bool = False) -> dict[str, Any]:
    about = [("when", "today"), ("machine", "a fast one"), ("programs", "nginx"), ("peers", "")]
    return peer_table.as_results(peer_table.rows_of(given), given, about, quick)


def test_the_section_has_a_row_for_each_side_and_each_ratio() -> None:
    text = peer_readme.render(json.loads(json.dumps(results(measured()))))
    for peer in PEERS.values():
        assert f"| {peer.title} |" in text
    assert "| FastAPI + pydantic + uvicorn + aiomqtt | 4,000 | 0.040 | all |" in text
    assert "| end to end beside FastAPI + aiomqtt | 10.00 | >= 8 |" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {4, 6}


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    readme = f"before\n{peer_readme.BEGIN}\nold\n{peer_readme.END}\nafter\n"
    assert peer_readme.replaced(readme, "new") == (
        f"before\n{peer_readme.BEGIN}\n\nnew\n\n{peer_readme.END}\nafter\n"
    )
    with pytest.raises(Failed, match="marks"):
        peer_readme.replaced("before\nafter\n", "new")


def test_the_readme_has_the_marks() -> None:
    peer_readme.replaced(peer_readme.README.read_text(), "")


def test_a_quick_run_does_not_go_into_the_readme(tmp_path: Path) -> None:
    given, readme = tmp_path / "peers.json", tmp_path / "README.md"
    readme.write_text(f"{peer_readme.BEGIN}{peer_readme.END}")
    with pytest.raises(Failed, match="measure first"):
        peer_readme.write(given, readme)
    given.write_text(json.dumps(results(measured(), quick=True)))
    with pytest.raises(Failed, match="quick"):
        peer_readme.write(given, readme)
    part = measured()
    del part.rates["peer_robyn"]
    given.write_text(json.dumps(results(part)))
    with pytest.raises(Failed, match="without robyn"):
        peer_readme.write(given, readme)
    given.write_text(json.dumps(results(measured())))
    peer_readme.write(given, readme)
    assert "| Node-RED (http in → mqtt out) | 3,600 |" in readme.read_text()
