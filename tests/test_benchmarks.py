"""The benchmarks' own logic: what is compared, and that a run which failed never becomes a number.

No benchmark runs here; their figures belong to `make bench`.
"""

import contextlib
import itertools
import json
import socketserver
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import __main__ as command
from benchmarks import (
    compiled,
    end_to_end,
    events,
    gates,
    harness,
    latency,
    load,
    memory,
    peer_table,
    processes,
    shares,
    table,
)
from benchmarks.gates import GATES, Gate
from benchmarks.harness import Benchmark, Context, Failed, Figure, Row, Voided
from benchmarks.peers import mqtt_wire, msgspec_rules
from gateway import _validator


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(quick=True, directory=tmp_path)


def benchmark(run: Any, *names: str) -> Benchmark:
    return Benchmark(dict.fromkeys(names or ("figure",), "a reference"), run)


def measured(name: str, value: float, ratio: float | None = None) -> Row:
    return Row(name, "measured", Figure(value, "x", 1.0, value if ratio is None else ratio))


# ---- rounds and medians ------------------------------------------------------------------------


def test_sides_are_measured_in_turn() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return 1.0

    harness.interleave({"A": lambda: side("A"), "B": lambda: side("B")}, 3, warm_up=False)
    assert order == ["A", "B", "A", "B", "A", "B"]


def test_the_warm_up_round_is_thrown_away() -> None:
    values = iter([9.0, 1.0, 2.0])
    assert harness.interleave({"A": lambda: next(values)}, 2) == {"A": [1.0, 2.0]}


def test_medians_of_both_sides_are_compared() -> None:
    figure = harness.compare([1.0, 100.0, 2.0], [4.0, 5.0, 3.0], "s")
    assert (figure.value, figure.reference, figure.ratio) == (2.0, 4.0, 0.5)


def test_a_comparison_needs_as_many_rounds_on_both_sides() -> None:
    with pytest.raises(ValueError):
        harness.compare([1.0, 2.0], [1.0], "s")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_number_that_is_no_measurement_fails(value: float) -> None:
    with pytest.raises(Failed):
        harness.interleave({"A": lambda: value}, 1)


# ---- failures ----------------------------------------------------------------------------------


def test_a_failed_run_ends_its_benchmark_without_a_figure(context: Context) -> None:
    values = iter([1.0, 1.0, 1.0])

    def side() -> float:
        try:
            return next(values)
        except StopIteration:
            raise Failed("3 of 1000 requests were refused") from None

    def run(_: Context) -> Mapping[str, Figure]:
        found = harness.interleave({"A": side}, 5, warm_up=False)
        return {"figure": harness.compare(found["A"], found["A"], "req/s")}

    (row,) = harness.attempt(benchmark(run), context)
    assert (row.status, row.figure) == ("failed", None)
    assert row.reason == "3 of 1000 requests were refused"


def test_an_unexpected_exception_is_a_failure_that_says_its_kind(context: Context) -> None:
    def run(_: Context) -> Mapping[str, Figure]:
        raise KeyError("gateway_events_waiting")

    (row,) = harness.attempt(benchmark(run), context)
    assert row.status == "failed"
    assert "KeyError" in row.reason


def test_a_benchmark_that_leaves_out_a_figure_has_failed(context: Context) -> None:
    rows = harness.attempt(benchmark(lambda _: {"a": Figure(1, "s")}, "a", "b"), context)
    assert [row.status for row in rows] == ["failed", "failed"]


def test_a_void_row_is_neither_a_figure_nor_a_failure(context: Context) -> None:
    def run(_: Context) -> Mapping[str, Figure]:
        raise Voided("the peer is not itself")

    rows = harness.attempt(benchmark(run), context)
    assert [row.status for row in rows] == ["void"]
    assert command.exit_code(rows, gate=False, quick=False) == 0


def test_an_interrupt_is_not_caught(context: Context) -> None:
    def run(_: Context) -> Mapping[str, Figure]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.attempt(benchmark(run), context)


def test_a_failure_makes_the_exit_code_1() -> None:
    rows = [measured("a", 1), Row("b", "failed", None, "why")]
    assert command.exit_code(rows, gate=False, quick=True) == 1
    assert command.exit_code(rows[:1], gate=False, quick=True) == 0


def test_results_have_null_where_there_is_no_figure() -> None:
    rows = [measured("a", 2.0, 0.5), Row("b", "failed", None, "why"), Row("c", "void", None, "so")]
    results = json.loads(json.dumps(harness.as_results(rows)))
    assert harness.as_rows(results) == rows
    assert results["a"] == {"value": 2.0, "unit": "x", "reference": 1.0, "ratio": 0.5}
    assert results["b"]["value"] is None
    assert results["b"]["failed"] == "why"
    assert results["c"]["void"] == "so"


def test_the_table_says_why_a_row_has_no_figure() -> None:
    rows = [measured("validator_vs_msgspec", 0.05), Row("latency_ms_p50", "failed", None, "lost 3")]
    benchmarks = [benchmark(None, "validator_vs_msgspec", "latency_ms_p50")]
    text = table.render(rows, benchmarks, [("machine", "a fast one")], "0.1", 3.0, quick=True)
    assert "a fast one" in text.splitlines()[0]
    assert "FAILED" in text
    assert "lost 3" in text
    assert "met" in text


# ---- gates -------------------------------------------------------------------------------------


def test_every_gate_belongs_to_a_figure() -> None:
    names = {name for each in command.benchmarks() for name in each.names}
    assert set(GATES) <= names | set(peer_table.REFERENCES)


def test_no_two_figures_share_a_name() -> None:
    names = [name for each in command.benchmarks() for name in each.names]
    assert len(names) == len(set(names))


@pytest.fixture
def one_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"up": Gate("ratio", ">=", 0.9, 0.1), "down": Gate("value", "<=", 400, None)}
    monkeypatch.setattr(gates, "GATES", table)


@pytest.mark.usefixtures("one_gate")
@pytest.mark.parametrize(
    ("name", "value", "quick", "expected"),
    [
        ("up", 0.90, False, "met"),
        ("up", 0.89, False, "short"),
        ("up", 0.89, True, "within slack"),
        ("up", 0.80, True, "short"),
        ("down", 400, False, "met"),
        ("down", 401, False, "short"),
        ("down", 401, True, "short, not enforced"),
        ("other", 1, False, ""),
    ],
)
def test_a_figure_stands_to_its_gate(name: str, value: float, quick: bool, expected: str) -> None:
    assert gates.verdict(measured(name, value), quick) == expected


@pytest.mark.usefixtures("one_gate")
def test_a_gated_row_without_a_figure_falls_short() -> None:
    rows = [Row("up", "void", None, "why")]
    assert command.exit_code(rows, gate=True, quick=False) == 3


@pytest.mark.usefixtures("one_gate")
def test_gates_count_only_when_asked_for() -> None:
    rows = [measured("up", 0.5)]
    assert command.exit_code(rows, gate=False, quick=False) == 0
    assert command.exit_code(rows, gate=True, quick=False) == 3


# ---- the command line --------------------------------------------------------------------------


def test_only_takes_the_beginning_of_a_name() -> None:
    every = command.benchmarks()
    chosen = command.select(every, ["latency_ms"])
    assert [each.names for each in chosen] == [("latency_ms_p50", "latency_ms_p99")]


def test_a_quick_run_leaves_out_what_is_not_for_it() -> None:
    every = [benchmark(None, "a"), Benchmark({"b": "nothing"}, lambda _: {}, quick=False)]
    assert command.select(every, None, quick=True) == every[:1]
    assert command.select(every, None) == every
    assert command.select(every, ["b"], quick=True) == every[1:]


def test_only_prefers_the_row_that_is_called_so() -> None:
    chosen = command.select(command.benchmarks(), ["publisher_vs_raw_socket"])
    assert [each.names for each in chosen] == [("publisher_vs_raw_socket",)]


def test_only_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="no figure is called speed"):
        command.select(command.benchmarks(), ["speed"])


# ---- wrk ---------------------------------------------------------------------------------------


def said(**changes: int) -> str:
    result = dict(requests=1000, microseconds=2_000_000, p50_us=1, p99_us=2)
    result |= dict.fromkeys(("connect", "read", "write", "status", "timeout"), 0)
    return f"Running 2s test\nRESULT {json.dumps(result | changes)}\n"


def test_a_rate_is_requests_over_the_real_time() -> None:
    assert load.parse(said()).rate == 500


@pytest.mark.parametrize("error", ["connect", "read", "write", "status", "timeout"])
def test_one_failed_request_fails_the_run(error: str) -> None:
    with pytest.raises(Failed, match=error):
        load.parse(said(**{error: 1}))


def test_a_run_without_an_answer_is_no_rate() -> None:
    with pytest.raises(Failed):
        load.parse(said(requests=0))
    with pytest.raises(Failed):
        load.parse("unable to connect")


class Server(socketserver.ThreadingTCPServer):
    """Answers 202 on a free port and keeps the bodies; every `refuse_every`-th request gets 503,
    one that asks for `sink` 200.
    """

    daemon_threads = True
    request_queue_size = 128
    answer = b""

    def __init__(self, refuse_every: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.port = int(self.server_address[1])
        self.bodies: list[bytes] = []
        self.targets: set[bytes] = set()
        self.refuse_every = refuse_every
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def pause(self) -> None:
        """Before each answer."""

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Connection(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        server = self.server
        with contextlib.suppress(ConnectionError):
            while head := self.rfile.readline():
                while (line := self.rfile.readline()) != b"\r\n":
                    head += line
                length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
                server.bodies.append(self.rfile.read(length))
                target = head.split()[1]
                server.targets.add(target)
                refused = server.refuse_every and len(server.bodies) % server.refuse_every == 0
                good = b"200 OK" if target.endswith(b"?ack=sink") else b"202 Accepted"
                status = b"503 No" if refused else good
                server.pause()
                head = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(server.answer))
                self.wfile.write(head + server.answer)


def test_wrk_sends_valid_events_and_never_a_seq_twice(tmp_path: Path) -> None:
    with Server() as server:
        for _ in range(2):
            seen = load.run(server.port, 1, tmp_path)
            assert 0 < seen.requests <= len(server.bodies)
    whole = [body for body in server.bodies if body.endswith(b"}")]  # the end of a run cuts some
    verdicts = [_validator.validate(body) for body in whole]
    assert {verdict.code for verdict in verdicts} == {""}
    assert len({verdict.seq for verdict in verdicts}) == len(verdicts)


def test_wrk_asks_for_an_acknowledgement_and_takes_200_for_a_success(tmp_path: Path) -> None:
    with Server() as server:
        assert load.run(server.port, 1, tmp_path, query="ack=sink").requests > 0
        assert {target.partition(b"?")[2] for target in server.targets} == {b"ack=sink"}
    with Server() as server:
        load.run(server.port, 1, tmp_path)
        assert {target.partition(b"?")[2] for target in server.targets} == {b""}


def test_a_run_with_one_refused_request_in_many_fails(tmp_path: Path) -> None:
    with Server(refuse_every=500) as server, pytest.raises(Failed, match="'status'"):
        load.run(server.port, 1, tmp_path)


# ---- end to end --------------------------------------------------------------------------------


def test_a_backlog_that_does_not_grow_costs_nothing() -> None:
    assert end_to_end.sustained(events=10_000, seconds=2, backlog=100, drain_s=0.3) == 5000


def test_a_backlog_that_grows_makes_the_rate_that_of_the_slower_end() -> None:
    assert end_to_end.sustained(events=10_000, seconds=2, backlog=5000, drain_s=2) == 2500


def test_a_peer_that_is_not_itself_voids_the_row() -> None:
    shares.judge("gmqtt", rate=16_000, nginx=100_000)
    with pytest.raises(Voided, match=r"0\.150 of nginx"):
        shares.judge("gmqtt", rate=15_000, nginx=100_000)


def test_a_peer_is_itself_at_its_known_rate_however_fast_nginx_is() -> None:
    shares.judge("gmqtt", rate=27_100, nginx=400_000)
    with pytest.raises(Voided, match=r"0\.068 of nginx"):
        shares.judge("gmqtt", rate=27_000, nginx=400_000)


# ---- latency, memory ---------------------------------------------------------------------------


def test_percentiles_are_values_that_were_measured() -> None:
    ordered = [float(number) for number in range(1, 101)]
    assert latency.percentile(ordered, 50) == 50
    assert latency.percentile(ordered, 99) == 99
    assert latency.percentile([7.0], 99) == 7
    assert latency.percentile([1.0, 2.0], 99) == 2


SMAPS = """\
55e0c0000000-55e0c0001000 r--p 00000000 08:01 123   /usr/bin/python3.11
Rss:                 100 kB
7f0000000000-7f0010000000 rw-s 00004000 08:01 124   /tmp/data/gateway.log
Size:             262144 kB
Rss:              200000 kB
7f0010000000-7f0010010000 rw-s 00000000 00:01 5     /memfd:gateway (deleted)
Rss:                  64 kB
7f0010020000-7f0010030000 rw-p 00000000 00:00 0
Rss:                  24 kB
SwapPss:               0 kB
"""


def test_memory_beside_the_log_leaves_out_the_log_and_what_is_shared() -> None:
    assert memory.beside_kib(SMAPS, Path("/tmp/data/gateway.log")) == 124


# ---- children ----------------------------------------------------------------------------------


def test_a_child_that_dies_is_a_failure_with_its_last_words(tmp_path: Path) -> None:
    command = processes.python("-c", "import sys; sys.exit('the port is taken')")
    with processes.Child("server", command, tmp_path) as child:
        with pytest.raises(Failed, match="server ended with 1: the port is taken"):
            child.wait_until(lambda: False, 10, "ready")


def test_a_program_that_cannot_be_started_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="broker cannot be started: /nowhere/broker"):
        processes.Child("broker", ["/nowhere/broker"], tmp_path)


def test_a_program_that_is_not_installed_is_a_failure() -> None:
    with pytest.raises(Failed, match="scripts/bootstrap test"):
        processes.program("no-such-program")


# ---- events and peers --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", events.SHAPES.values(), ids=lambda shape: shape.__name__)
def test_every_shape_is_valid_for_both_validators(shape: events.Shape) -> None:
    bodies = events.bodies(shape, 50)
    assert len(set(bodies)) == 50
    for body in bodies:
        verdict = _validator.validate(body)
        assert verdict.code == ""
        assert verdict.seq == msgspec_rules.decode(body).seq


def test_sizes_are_those_that_the_names_say() -> None:
    def mean(shape: events.Shape) -> float:
        return sum(map(len, events.bodies(shape, 20))) / 20

    assert 35 <= mean(events.tiny) <= 45
    assert 140 <= mean(events.reference) <= 152
    assert 950 <= mean(events.kib1) <= 1100
    assert 7900 <= mean(events.kib8) <= 8400


def test_a_stream_never_repeats_a_seq() -> None:
    bodies = list(itertools.islice(events.stream(events.reference, variety=10), 1000))
    assert len({_validator.validate(body).seq for body in bodies}) == 1000


def test_templates_make_valid_events_of_one_size() -> None:
    for template in events.templates(events.reference, 50):
        body = b"%s%d%s" % (template.before, 1_000_000_001, template.after)
        assert len(body) == template.size
        assert _validator.validate(body).seq == 1_000_000_001


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"metrics":{"T":1}}',
        b'{"metrics":{"t":"1"}}',
        b'{"metrics":{"t":1e999}}',
        b'{"metrics":{"t":true}}',
        b'{"metrics":{"t\\n":1}}',
        b'{"metrics":{"t":1},"tags":{"a":1}}',
        b'{"metrics":{"t":1},"tags":{"a":"' + b"x" * 129 + b'"}}',
        b'{"metrics":{"t":1},"seq":-1}',
        b'{"metrics":{"t":1},"seq":1.5}',
        b'{"metrics":{"t":1},"seq":9223372036854775808}',
        b'{"metrics":{"t":1},"ts":"2025-01-01T00:00:00"}',
        b'{"metrics":{"t":1},"other":1}',
        b'{"metrics":{"t":1}} x',
    ],
)
def test_msgspec_refuses_what_the_gateway_refuses(body: bytes) -> None:
    assert _validator.check(body)
    with pytest.raises(msgspec.DecodeError):
        msgspec_rules.decode(body)


def test_a_packet_stream_is_cut_the_same_wherever_it_is_split() -> None:
    sent = [mqtt_wire.publish("telemetry/d", b"x" * size, 7) for size in (0, 1, 120, 200, 20_000)]
    stream = b"".join(sent)
    for step in (1, 7, 1000, len(stream)):
        parser = mqtt_wire.Parser()
        found = [
            mqtt_wire.payload(first, body)
            for at in range(0, len(stream), step)
            for first, body in parser.feed(stream[at : at + step])
        ]
        assert [len(body) for body in found] == [0, 1, 120, 200, 20_000]


def test_the_peers_in_c_compile_without_warnings(tmp_path: Path) -> None:
    assert compiled.executable("raw_publish", tmp_path).exists()
    assert compiled.executable("fleet", tmp_path, compiled.CLIENTS).exists()
    assert compiled.module("empty_call", tmp_path).event("d", b"{}", 1) == 0
