"""The acknowledgement ladder, receipts, repeats and backpressure of whole gateways (guarantees 1,
3, 7, 10, 11, 16, 18).

The disk and the broker do what a test says: see tests/ack_site.py.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import _log, http
from gateway.errors import Exit
from tests.ack_site import Site, event, with_fail_points
from tests.conformance import DOORS
from tests.gateway_process import is_alive, stat_fields, wait_for
from tests.mutant_gateway import Native, package
from tests.raw_http import Answer, Client, request

WAIT_S = 0.25
"""Long enough for an answer that comes too early to show."""


@pytest.fixture(scope="module", params=DOORS)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """Deadlines are long: whoever is answered was answered for a reason."""
    settings = {
        "http.server": request.param,
        "http.durable_deadline_ms": 20_000,
        "http.sink_deadline_ms": 20_000,
    }
    with Site(tmp_path_factory.mktemp("acks"), settings) as site:
        yield site


@pytest.fixture(autouse=True)
def _let_go(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves the shared site as it was."""
    yield
    if "site" in request.fixturenames:
        site: Site = request.getfixturevalue("site")
        site.restore()


_numbers = iter(range(1, 1_000_000))


def new() -> int:
    """A seq that no other test uses."""
    return next(_numbers)


def answer_of(client: Client) -> Answer:
    """The next answer on a connection."""
    answer = client.answer()
    assert answer is not None, "closed without an answer"
    return answer


# ---- which acknowledgement -----------------------------------------------------------------------

LADDER = {"enqueue": 202, "durable": 202, "sink": 200}


@pytest.mark.parametrize("ack", LADDER)
@pytest.mark.parametrize("how", ["query", "header", "query over header", "default"])
def test_each_acknowledgement_can_be_asked_for(
    site: Site, tmp_path: Path, ack: str, how: str
) -> None:
    other = "sink" if ack == "enqueue" else "enqueue"
    data = {
        "query": event(seq=new(), ack=ack),
        "header": event("dev", new(), None, None, 1, f"X-Ack: {ack}"),
        "query over header": event("dev", new(), ack, None, 1, f"X-Ack: {other}"),
        "default": event(seq=new()),
    }[how]
    with contextlib.ExitStack() as stack:
        if how == "default" and ack != "enqueue":
            site = stack.enter_context(Site(tmp_path, {"http.ack": ack}))
        client = stack.enter_context(site.client())
        client.send(data)
        answer = answer_of(client)
        assert (answer.status, answer.header("x-ack")) == (LADDER[ack], ack)
        assert answer.json == {"ack": ack}
        receipt = answer.header("x-receipt")
        assert site.receipt(receipt) != "unknown"
        assert answer.header("x-duplicate") is None
        client.send(event(seq=new()))  # the connection is in step
        assert answer_of(client).status in (200, 202)


def test_nothing_is_durable_in_memory(tmp_path: Path) -> None:
    memory = Path(tempfile.mkdtemp(prefix="gateway-test-", dir="/dev/shm"))
    try:
        with Site(tmp_path, {"log.directory": memory / "log"}) as site:
            answer = site.post(seq=1, ack="durable")
            assert (answer.status, answer.code) == (400, "ack_not_supported")
            assert "log.directory is in memory" in answer.json["message"]
            assert site.post(seq=1).header("x-duplicate") is None
            assert site.post(seq=1, ack="sink").status == 200
            assert site.gateway.stop() == 0
            site.gateway.settings["http.ack"] = "durable"
            site.gateway.start(ready=False)
            assert site.gateway.process is not None
            assert site.gateway.process.wait(10) == Exit.USAGE
            assert "http.ack: nothing is durable on tmpfs" in site.gateway.output()
    finally:
        shutil.rmtree(memory)


# ---- durable -------------------------------------------------------------------------------------


def durable_waits_for_the_disk(site: Site) -> bool:
    """Whether an answer "durable" comes after the fdatasync that covers it, and not before."""
    site.disk("hold")
    try:
        with site.ask(seq=new(), ack="durable") as client:
            if not client.is_silent(WAIT_S):
                return False
            enqueued = site.post(seq=new())
            assert enqueued.header("x-ack") == "enqueue"
            assert site.receipt(enqueued.header("x-receipt")) in ("enqueued", "delivered")
            site.disk("")
            answer = answer_of(client)
            assert (answer.status, answer.header("x-ack")) == (202, "durable")
            assert site.receipt(answer.header("x-receipt")) in ("durable", "delivered")
    finally:
        site.disk("")
    return True


def test_durable_is_answered_after_the_fdatasync(site: Site) -> None:
    assert durable_waits_for_the_disk(site)


def test_one_fdatasync_serves_all_who_wait(site: Site) -> None:
    site.disk("hold")
    clients = [site.ask(f"d{number}", new(), "durable") for number in range(50)]
    wait_for(lambda: site.waiting == 50)
    before = site.gateway.metric("gateway_log_syncs_total")
    site.disk("")
    for client in clients:
        assert answer_of(client).header("x-ack") == "durable"
        client.close()
    # One that was held, one for those who came while it was, and the cursor's behind them.
    assert site.gateway.metric("gateway_log_syncs_total") - before <= 4


def test_durable_does_not_wait_for_the_interval(tmp_path: Path) -> None:
    with Site(tmp_path, {"log.commit_interval_ms": 60_000}) as site:
        for _ in range(5):
            began = time.monotonic()
            assert site.post(seq=new(), ack="durable").header("x-ack") == "durable"
            assert time.monotonic() - began < 2


# ---- sink ----------------------------------------------------------------------------------------


def sink_waits_for_the_puback(site: Site) -> bool:
    """Whether an answer "sink" comes after the PUBACK of its event, and not before."""
    site.broker.hold()
    try:
        with site.ask(seq=new(), ack="sink") as client:
            durable = site.post(seq=new(), ack="durable")
            if not client.is_silent(WAIT_S):
                return False
            assert site.receipt(durable.header("x-receipt")) == "durable"
            site.broker.let_go()
            answer = answer_of(client)
            assert (answer.status, answer.header("x-ack")) == (200, "sink")
            assert site.receipt(answer.header("x-receipt")) == "delivered"
    finally:
        site.broker.let_go()
    return True


def test_sink_is_answered_after_the_puback(site: Site) -> None:
    assert sink_waits_for_the_puback(site)


def test_sink_of_a_dead_letter_says_so(site: Site) -> None:
    site.broker.hold()
    site.disk("hold")
    with site.ask(seq=new(), ack="sink") as client, site.ask(seq=new(), ack="sink") as other:
        wait_for(lambda: site.waiting == 2)
        log = site.log()
        lsn = wait_for(lambda: log.oldest) and log.cursor(0).lsn
        wait_for(lambda: log.committed > lsn)
        record = log.read(lsn)
        assert record is not None
        assert log.mark_dead(0, lsn)
        log.close()
        site.broker.let_go()
        first, second = answer_of(client), answer_of(other)
    dead, good = (first, second) if "state" in first.json else (second, first)
    assert (dead.status, dead.json) == (202, {"ack": "enqueue", "state": "dead_lettered"})
    assert dead.header("x-ack") == "enqueue"
    assert good.status == 200
    assert site.receipt(dead.header("x-receipt")) == "dead_lettered"
    assert site.gateway.metric('gateway_acks_total{ack="dead_lettered"}') == 1


QUOTA_EXCEEDED = 0x97
PAYLOAD_FORMAT_INVALID = 0x99


def test_sink_of_an_event_that_the_broker_refuses_for_now(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        site.broker.reason = QUOTA_EXCEEDED
        client = site.ask("dev", 1, "sink")
        held = "publishing is held: an event is refused"
        wait_for(lambda: held in "".join(site.gateway.health()["problems"]))
        assert client.is_silent(WAIT_S)
        site.broker.reason = None
        assert answer_of(client).status == 200
        wait_for(lambda: site.gateway.health()["status"] == "ok")


def test_sink_of_an_event_that_the_broker_refuses_for_good(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        site.broker.reason = PAYLOAD_FORMAT_INVALID
        for first in (True, False):
            answer = site.post("dev", 1, "sink")
            assert answer.status == 202
            assert answer.json["state"] == "dead_lettered"
            assert answer.header("x-ack") == answer.json["ack"] != "sink"
            assert answer.header("x-duplicate") == (None if first else "true")
            assert site.receipt(answer.header("x-receipt")) == "dead_lettered"
        assert site.post("dev", 1, "durable").header("x-ack") == "durable"
        site.broker.reason = None
        assert site.post("dev", 2, "sink").status == 200
        metrics = site.gateway.metrics()
        assert metrics["gateway_events_dead_lettered_total"] == 1
        assert metrics["gateway_events_published_total"] == 1
        assert metrics['gateway_acks_total{ack="dead_lettered"}'] == 2
        site.gateway.kill()
        site.gateway.start()
        answer = site.post("dev", 1, "sink")
        assert (answer.status, answer.json["state"]) == (202, "dead_lettered")


# ---- controls: a door that answers too early must fail the tests above ---------------------------


def early(position: str, folder: Path) -> Path:
    """The package with a waiting room that takes a position for passed."""
    edits = [(f"{position}(room->log)", "UINT64_MAX")]
    return package(folder, native={"_waiting": Native({"gw_waiting.c": edits})})


def test_a_door_that_answers_durable_at_once_is_found(tmp_path: Path) -> None:
    root = early("gw_log_durable", tmp_path / "mutant")
    with Site(tmp_path / "site", root=root) as site:
        assert not durable_waits_for_the_disk(site)


def test_a_door_that_answers_sink_at_once_is_found(tmp_path: Path) -> None:
    root = early("gw_log_least_cursor", tmp_path / "mutant")
    with Site(tmp_path / "site", root=root) as site:
        assert not sink_waits_for_the_puback(site)


# ---- deadlines, repeats --------------------------------------------------------------------------


def test_late_is_504_and_the_repeat_gets_the_originals_ack(tmp_path: Path) -> None:
    settings = {"http.durable_deadline_ms": 200, "http.sink_deadline_ms": 300}
    with Site(tmp_path, settings) as site:
        site.broker.hold()
        site.disk("hold")
        for ack, deadline_s in (("durable", 0.2), ("sink", 0.3)):
            seq = new()
            began = time.monotonic()
            late = site.post(seq=seq, ack=ack)
            took_s = time.monotonic() - began
            assert (late.status, late.code) == (504, "accepted_pending")
            assert deadline_s <= took_s < deadline_s + 1
            assert late.header("x-ack") is None
            assert late.header("connection") is None
            assert site.receipt(late.header("x-receipt")) == "enqueued"
            # Nothing has changed: the repeat waits for the original, and is late as well.
            again = site.post(seq=seq, ack=ack)
            assert (again.status, again.header("x-duplicate")) == (504, "true")
            assert again.header("x-receipt") == late.header("x-receipt")
            weaker = site.post(seq=seq, ack="enqueue")
            assert (weaker.status, weaker.header("x-duplicate")) == (202, "true")
            assert weaker.header("x-receipt") == late.header("x-receipt")
        site.disk("")
        site.broker.let_go()
        wait_for(lambda: site.gateway.metric("gateway_events_waiting") == 0)
        for number, ack, status in ((seq - 1, "durable", 202), (seq, "sink", 200)):
            answer = site.post(seq=number, ack=ack)
            assert (answer.status, answer.header("x-ack")) == (status, ack)
            assert answer.header("x-duplicate") == "true"
        assert len(site.broker.payloads) == 2
        metrics = site.gateway.metrics()
        assert metrics["gateway_events_accepted_total"] == 2
        assert metrics["gateway_events_duplicates_total"] == 6
        assert metrics['gateway_acks_total{ack="pending"}'] == 4
        assert metrics['gateway_events_refused_total{code="accepted_pending"}'] == 0
        assert site.waiting == 0


def test_a_repeat_is_recognised_by_device_boot_seq(site: Site) -> None:
    seq = new()
    first = site.post("dev", seq)
    assert first.header("x-duplicate") is None
    for _ in range(2):
        repeat = site.post("dev", seq)
        assert (repeat.status, repeat.header("x-duplicate")) == (202, "true")
        assert repeat.header("x-receipt") == first.header("x-receipt")
    assert site.post("dev", seq, boot=0, value=2).status == 409, "boot is 0 when it is not given"
    for other in (site.post("other", seq), site.post("dev", seq, boot=1), site.post("dev", new())):
        assert (other.status, other.header("x-duplicate")) == (202, None)


def test_the_same_key_with_another_body_is_a_conflict(site: Site) -> None:
    seq = new()
    site.post(seq=seq, value=1)
    for ack in LADDER:
        answer = site.post(seq=seq, ack=ack, value=2)
        assert (answer.status, answer.code) == (409, "seq_conflict")
        assert answer.header("x-receipt") is None
        assert answer.header("x-duplicate") is None
    assert site.post(seq=seq, value=1).header("x-duplicate") == "true"


def test_events_without_seq_are_never_repeats(site: Site) -> None:
    answers = [site.post(boot=boot) for boot in (None, None, 7, 7)]
    assert [answer.status for answer in answers] == [202] * 4
    assert all(answer.header("x-duplicate") is None for answer in answers)
    assert len({answer.header("x-receipt") for answer in answers}) == 4


def test_received_is_accepted_and_duplicates_and_refused(site: Site) -> None:
    def books() -> tuple[float, float, float, float]:
        metrics = site.gateway.metrics()
        refused = sum(n for name, n in metrics.items() if "gateway_events_refused_total" in name)
        return (
            metrics["gateway_events_received_total"],
            metrics["gateway_events_accepted_total"],
            metrics["gateway_events_duplicates_total"],
            refused,
        )

    before = books()
    seq = new()
    for ack in (None, "durable", "sink"):
        site.post(seq=seq, ack=ack)
        site.post(seq=seq, ack=ack, value=2)
        site.post(ack=ack)
        with site.client() as client:
            client.send(request(b'{"metrics":1}', path=f"/v1/ingest/d?ack={ack or 'enqueue'}"))
            assert answer_of(client).status == 400
    wait_for(lambda: books()[1] - before[1] == 4)
    received, accepted, duplicates, refused = (b - a for a, b in zip(before, books()))
    assert (received, accepted, duplicates, refused) == (12, 4, 2, 6)


# ---- one key, many workers -----------------------------------------------------------------------


def test_one_key_at_the_same_instant_is_accepted_once(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    senders = 24
    with Site(tmp_path, {"http.workers": 2, "log.capacity_bytes": 8 << 20}) as site:
        wait_for(lambda: len({site.gateway.health()["worker"]["pid"] for _ in range(8)}) == 2)
        clients = [site.client() for _ in range(senders)]
        rounds = 60
        barrier = threading.Barrier(senders)
        answers: list[list[tuple[int, Answer]]] = [[] for _ in range(rounds)]
        values = [[chance.randrange(2) for _ in range(rounds)] for _ in range(senders)]
        pad = chance.choice((0, 500, 4000))

        def send(client: Client, mine: list[int]) -> None:
            for number, value in enumerate(mine):
                ack = ("enqueue", "durable", "sink")[number % 3]
                data = event("dev", number, ack, None, value if number % 2 else 1, pad=pad)
                barrier.wait(30)
                client.send(data)
                answers[number].append((value if number % 2 else 1, answer_of(client)))

        threads = [
            threading.Thread(target=send, args=pair) for pair in zip(clients, values, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        workers = [len(site.gateway.children()["worker"])]
        assert workers == [2]
        for number, found in enumerate(answers):
            assert len(found) == senders
            good = [(value, answer) for value, answer in found if answer.status in (200, 202)]
            first = [value for value, answer in good if answer.header("x-duplicate") is None]
            assert len(first) == 1, f"event {number} was accepted {len(first)} times"
            assert {value for value, _ in good} == set(first), "one body won"
            assert len({answer.header("x-receipt") for _, answer in good}) == 1
            for value, answer in found:
                assert answer.status == 409 or value == first[0]
        wait_for(lambda: site.gateway.metric("gateway_events_waiting") == 0)
        assert site.gateway.metric("gateway_events_accepted_total") == rounds
        assert len(site.broker.payloads) == rounds


def test_a_key_that_was_busy_is_decided_when_the_other_has_written_it(tmp_path: Path) -> None:
    from tests.test_waiting import Request, Waiting

    path = str(tmp_path / "gateway.log")
    _log.create(path, _log.CAPACITY_MIN)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    log = _log.Log.open(path, fd, ["mqtt"])
    ingest = _log.Ingest(log, 0)
    refusals: list[int] = []

    def refused(code: int, _: _log.Ingest) -> http.Answer:
        return http.refusal(code)

    def refuse(code: int, started_ns: int) -> http.Answer:
        refusals.append(code)
        return http.refusal(code)

    waiting = Waiting(log, 0, 5000, 5000, refused, refuse)
    waiting.start()
    body, other = b'{"seq":1,"metrics":{}}', b'{"seq":1,"metrics":{"a":1}}'
    assert ingest.event("dev", body, _log.now_ns()) == 0
    receipt = ingest.receipt
    same, conflict, durable = Request(), Request(), Request()
    for request_, sent, ack in ((same, body, 0), (conflict, other, 0), (durable, body, 1)):
        waiting.busy(request_, ingest.lsn, ack, _log.now_ns(), ("dev", sent))
    time.sleep(0.05)
    assert same.answers == conflict.answers == durable.answers == []
    log.follow(0, 0)  # committed moves over it
    status, headers, _ = same.answer()
    assert (status, headers["x-duplicate"], headers["x-receipt"]) == (202, "true", receipt)
    assert conflict.answer()[0] == 409
    time.sleep(0.05)
    assert durable.answers == []
    log.sync()
    status, headers, _ = durable.answer()
    assert (status, headers["x-ack"], headers["x-duplicate"]) == (202, "durable", "true")
    assert waiting.count == 0
    assert refusals == []
    ingest.close()
    os.close(fd)


class Busy:
    """A gateway whose worker 0 stops within the commit of its first event: the key is in the index,
    and the event is not in the log yet."""

    def __init__(self, folder: Path) -> None:
        once = folder / "once"
        once.touch()
        self.site = Site(folder / "site", {"http.workers": 2}, with_fail_points(folder / "tree"))
        self.site.environment["GW_FAILPOINT"] = f"before_marker:1:{int(signal.SIGSTOP)}:{once}"

    def __enter__(self) -> "Busy":
        site = self.site.__enter__()
        self.first, self.second = site.client_of(0), site.client_of(1)
        self.looker = site.client_of(1)
        self.pid = site.worker_of(self.first)["pid"]
        return self

    def __exit__(self, *_: object) -> None:
        self.site.__exit__(None, None, None)

    def begin(self, value: int = 1) -> None:
        """Worker 0 gets the event and stops, worker 1 gets it and waits."""
        self.first.send(event("dev", 1))
        wait_for(lambda: (stat_fields(self.pid) or "?")[0] in "Tt")
        self.second.send(event("dev", 1, value=value))
        wait_for(lambda: self.site.worker_of(self.looker)["waiting"] == 1)


def test_a_key_whose_writer_dies_is_accepted_elsewhere(tmp_path: Path) -> None:
    with Busy(tmp_path) as busy:
        busy.begin()
        answer = answer_of(busy.second)  # the stopped worker is killed, its claim filled
        assert (answer.status, answer.header("x-duplicate")) == (202, None)
        assert busy.first.is_closed()
        repeat = busy.site.post("dev", 1)
        assert repeat.header("x-receipt") == answer.header("x-receipt")
        metrics = busy.site.gateway.metrics()
        assert metrics["gateway_events_accepted_total"] == 1
        assert metrics["gateway_log_pads_total"] == 1


@pytest.mark.parametrize(("value", "status", "duplicate"), [(1, 202, "true"), (2, 409, None)])
def test_a_key_is_decided_once_its_writer_goes_on(
    tmp_path: Path, value: int, status: int, duplicate: str | None
) -> None:
    with Busy(tmp_path) as busy:
        delivery = busy.site.gateway.children()["delivery"][0]
        os.kill(delivery, signal.SIGSTOP)  # else it kills the stopped worker
        busy.begin(value)
        assert busy.second.is_silent(WAIT_S)
        os.kill(busy.pid, signal.SIGCONT)
        first = answer_of(busy.first)
        assert (first.status, first.header("x-duplicate")) == (202, None)
        os.kill(delivery, signal.SIGCONT)
        second = answer_of(busy.second)
        assert (second.status, second.header("x-duplicate")) == (status, duplicate)
        if duplicate:
            assert second.header("x-receipt") == first.header("x-receipt")
        assert busy.site.gateway.metric("gateway_events_accepted_total") == 1


# ---- receipts ------------------------------------------------------------------------------------


def test_receipt_goes_through_its_states(site: Site) -> None:
    site.broker.hold()
    site.disk("hold")
    receipt = site.post(seq=new()).header("x-receipt")
    assert site.receipt(receipt) == "enqueued"
    site.disk("")
    wait_for(lambda: site.receipt(receipt) == "durable")
    site.broker.let_go()
    wait_for(lambda: site.receipt(receipt) == "delivered")


def test_receipt_of_an_event_that_was_written_over_is_finished(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        first = site.post(seq=1, ack="sink").header("x-receipt")
        with site.client() as client:
            seq = 2
            while seq < 22:
                client.send(event("dev", seq, "sink", pad=60_000))
                status = answer_of(client).status
                assert status in (200, 503)  # room is made by the next fdatasync
                seq += status == 200
        assert site.receipt(first) == "finished"
        again = site.post(seq=1)
        assert again.header("x-duplicate") is None, "the window is what the ring still holds"


def test_receipt_page_says_what_it_is_asked(site: Site) -> None:
    receipt = site.post(seq=new()).header("x-receipt")
    answer = site.get(f"/v1/receipts/{receipt}")
    assert answer.status == 200
    assert answer.json.keys() == {"receipt", "state"}
    assert answer.json["receipt"] == receipt
    assert answer.header("cache-control") == "no-store"
    head = site.get(f"/v1/receipts/{receipt}", "HEAD")
    assert (head.status, head.header("cache-control")) == (200, "no-store")
    with site.client() as client:
        client.send(request(b"", path=f"/v1/receipts/{receipt}", method="DELETE"))
        answer = answer_of(client)
        assert (answer.status, answer.header("allow")) == (405, "GET, HEAD")


def strange_receipts(receipt: str) -> list[str]:
    log, epoch, lsn, mac = receipt.split("-")
    zeros = "0" * 16
    return [
        "",
        "x",
        "-",
        "---",
        "%00",
        "%ff%fe",
        "%ed%a0%80",
        "%1b%5b31m",
        "a/b",
        "..%2f..%2fetc%2fpasswd",
        "%C3%A9",
        "x" * 60_000,
        f"{zeros}-{epoch}-{lsn}-{mac}",
        f"{log}-{int(epoch, 16) + 1:x}-{lsn}-{mac}",
        f"{log}-{epoch}-{int(lsn, 16) + 8:x}-{mac}",
        f"{log}-{epoch}-{lsn}-{zeros}",
        f"{log}-{epoch}-{lsn}",
        f"{receipt}-",
        f"{receipt}0",
        receipt.upper() if receipt.upper() != receipt else "X",
        f"{log}-{epoch}-{'f' * 17}-{mac}",
    ]


def test_strange_receipts_are_unknown_and_not_logged(site: Site, tmp_path: Path) -> None:
    receipt = site.post(seq=new()).header("x-receipt")
    assert receipt is not None
    with Site(tmp_path) as other:
        foreign = other.post(seq=1).header("x-receipt")
    said = len(site.gateway.output())
    for text in [*strange_receipts(receipt), str(foreign)]:
        answer = site.get(f"/v1/receipts/{text}")
        assert (answer.status, answer.json["state"]) == (404, "unknown"), text
        assert answer.json.keys() == {"receipt", "state", "code", "message", "field"}
        assert answer.code == "not_found"
        assert len(answer.json["receipt"]) <= 128
        assert answer.json["receipt"].isascii()
    assert len(site.gateway.output()) == said
    assert site.receipt(receipt) in ("enqueued", "durable", "delivered")


# ---- across restarts -----------------------------------------------------------------------------


def test_repeats_and_receipts_outlive_restarts(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        site.broker.hold()
        enqueued = site.post(seq=1, ack="enqueue")
        durable = site.post(seq=2, ack="durable")
        site.gateway.kill()
        site.gateway.start()
        for seq, first in ((1, enqueued), (2, durable)):
            assert site.receipt(first.header("x-receipt")) in ("enqueued", "durable")
            repeat = site.post(seq=seq, ack="durable")
            assert (repeat.status, repeat.header("x-duplicate")) == (202, "true")
            assert repeat.header("x-receipt") == first.header("x-receipt")
            assert site.post(seq=seq, value=2).status == 409
        site.broker.let_go()
        assert site.post(seq=2, ack="sink").status == 200
        assert site.gateway.stop() == 0
        site.gateway.start()
        repeat = site.post(seq=1, ack="sink")
        assert (repeat.status, repeat.header("x-duplicate")) == (200, "true")
        assert site.receipt(enqueued.header("x-receipt")) == "delivered"
        assert site.gateway.metric("gateway_events_accepted_total") == 2


def test_receipts_of_a_log_that_was_replaced_are_unknown(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        receipt = site.post(seq=1, ack="durable").header("x-receipt")
        assert site.gateway.stop() == 0
        shutil.rmtree(site.folder / "gateway" / "log")
        site.gateway.start()
        assert site.receipt(receipt) == "unknown"
        assert site.post(seq=1).header("x-duplicate") is None


# ---- full, draining, failed ----------------------------------------------------------------------


def test_full_log_answers_repeats_and_says_when_to_come_back(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        log = site.log()
        log.set_water(int(0.95 * log.capacity_bytes), int(0.9 * log.capacity_bytes))
        site.broker.hold()
        first = site.post("dev", 0)
        assert first.header("x-log-used") is None
        seq, shown = 1, []
        with site.client() as client:
            while True:
                client.send(event("dev", seq, pad=12_000))
                answer = answer_of(client)
                if answer.status != 202:
                    break
                shown.append(int(answer.header("x-log-used") or 0))
                seq += 1
            assert (answer.status, answer.code) == (503, "log_full")
            assert 30 <= int(answer.header("retry-after") or 0) <= 45, "nothing drains"
            client.send(event("dev", seq - 1, pad=12_000))
            repeat = answer_of(client)
            assert (repeat.status, repeat.header("x-duplicate")) == (202, "true")
            assert int(repeat.header("x-log-used") or 0) > 85
        assert shown == sorted(shown)
        assert 50 not in shown
        assert shown[-1] > 85
        assert [n for n in shown if n] == [n for n in shown if n > 50]
        assert site.get("/readyz").json == {"ready": True, "state": "full"}
        health = site.gateway.health()
        assert any("the log is full" in problem for problem in health["problems"])

        log.counter_set(_log.BLOCK_DELIVERY, _log.COUNTERS["drain_bytes_per_s"], 4000)
        excess = log.used - 0.9 * log.capacity_bytes
        expected = min(60, max(1, -(-excess // 4000)))
        time.sleep(0.11)
        waits = set()
        for _ in range(60):
            answer = site.post("new", seq)
            if answer.status == 202:
                break  # a small one may find room
            waits.add(int(answer.header("retry-after") or 0))
        assert waits
        assert min(waits) >= expected
        assert max(waits) <= expected + max(1, expected / 2)
        assert len(waits) > 1
        log.close()

        site.broker.let_go()
        wait_for(lambda: site.gateway.metric("gateway_events_waiting") == 0)
        wait_for(lambda: site.post("dev", 10_000, ack="sink").status == 200)
        assert site.get("/readyz").json == {"ready": True, "state": "running"}
        assert site.gateway.health()["status"] == "ok"


def test_those_who_wait_are_answered_while_delivery_drains(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        site.broker.hold()
        done = site.post("dev", 1, "durable")
        assert done.status == 202
        waiting = [site.ask("dev", 2 + number, "sink") for number in range(10)]
        wait_for(lambda: site.waiting == 10)
        assert site.gateway.process is not None
        repeat_on = site.client()
        newcomer_on = site.client()
        site.gateway.process.terminate()
        wait_for(lambda: not site.gateway.is_ready())
        repeat_on.send(event("dev", 1, "durable"))
        repeat = answer_of(repeat_on)
        assert (repeat.status, repeat.header("x-duplicate")) == (202, "true")
        newcomer_on.send(event("dev", 99))
        newcomer = answer_of(newcomer_on)
        assert (newcomer.status, newcomer.code) == (503, "draining")
        assert 1 <= int(newcomer.header("retry-after") or 0) <= 5
        site.broker.let_go()
        for client in waiting:
            assert answer_of(client).status == 200
        assert site.gateway.process.wait(10) == 0


def test_those_who_still_wait_at_the_end_get_504(tmp_path: Path) -> None:
    with Site(tmp_path, {"http.drain_deadline_ms": 300}) as site:
        site.broker.hold()
        waiting = [site.ask("dev", number, "sink") for number in range(10)]
        wait_for(lambda: site.waiting == 10)
        assert site.gateway.process is not None
        site.gateway.process.terminate()
        receipts = []
        for client in waiting:
            answer = answer_of(client)
            assert (answer.status, answer.code) == (504, "accepted_pending")
            receipts.append(answer.header("x-receipt"))
        assert site.gateway.process.wait(10) == 0
        site.broker.let_go()
        site.gateway.start()
        for number in range(10):
            repeat = site.post("dev", number, "sink")
            assert (repeat.status, repeat.header("x-duplicate")) == (200, "true")
            assert site.receipt(repeat.header("x-receipt")) == "delivered"
        assert len(set(receipts)) == 10


def test_those_who_wait_when_the_log_fails_get_500(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        site.broker.hold()
        site.disk("hold")
        waiting = [site.ask("dev", n, ("durable", "sink")[n % 2]) for n in range(10)]
        wait_for(lambda: site.waiting == 10)
        began = time.monotonic()
        site.disk("fail")
        for client in waiting:
            answer = answer_of(client)
            assert (answer.status, answer.code) == (500, "internal")
            assert client.is_closed()
        assert time.monotonic() - began < 1
        assert site.gateway.process is not None
        assert site.gateway.process.wait(10) == 5
        site.disk("")
        site.broker.let_go()
        site.gateway.start()
        for number in range(10):
            assert site.post("dev", number, "sink").status == 200


# ---- processes that die while requests wait ------------------------------------------------------


def test_those_who_wait_are_answered_by_a_new_delivery_process(site: Site) -> None:
    site.broker.hold()
    site.disk("hold")
    durable = [site.ask("dev", new(), "durable") for _ in range(5)]
    sink = [site.ask("dev", new(), "sink") for _ in range(5)]
    wait_for(lambda: site.waiting == 10)
    os.kill(wait_for(lambda: site.gateway.children()["delivery"])[0], signal.SIGKILL)
    site.disk("")
    site.broker.let_go()
    for client in durable:
        assert answer_of(client).header("x-ack") == "durable"
    for client in sink:
        assert answer_of(client).status == 200


def test_those_who_wait_at_a_killed_worker_repeat_and_are_recognised(site: Site) -> None:
    site.broker.hold()
    seqs = [new() for _ in range(5)]
    clients = [site.ask("dev", seq, "sink") for seq in seqs]
    wait_for(lambda: site.waiting == 5)
    killed = site.gateway.children()["worker"][0]
    os.kill(killed, signal.SIGKILL)
    for client in clients:
        assert client.is_closed()
    wait_for(lambda: not is_alive(killed))
    clients = [site.ask("dev", seq, "sink") for seq in seqs]
    wait_for(lambda: site.waiting == 5)
    site.broker.let_go()
    for client in clients:
        answer = answer_of(client)
        assert (answer.status, answer.header("x-duplicate")) == (200, "true")


# ---- clients that misbehave ----------------------------------------------------------------------


def test_clients_that_go_away_while_they_wait_leave_nothing(site: Site) -> None:
    site.broker.hold()
    clients = [site.ask("dev", new(), "sink") for _ in range(40)]
    wait_for(lambda: site.waiting == 40)
    for number, client in enumerate(clients):
        if number % 2:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    stays = site.ask("dev", new(), "sink")
    wait_for(lambda: site.waiting == 41)
    site.broker.let_go()
    assert answer_of(stays).status == 200
    wait_for(lambda: site.waiting == 0)
    assert site.gateway.metric('gateway_events_refused_total{code="internal"}') == 0


def test_a_connection_stays_in_step_after_a_wait(site: Site) -> None:
    first, second = new(), new()
    with site.client() as client:
        site.broker.hold()
        client.send(
            event("dev", first, "sink")
            + event("dev", second)
            + request(b"", path="/readyz", method="GET", length=None)
            + event("dev", first, "durable")
        )
        assert client.is_silent(WAIT_S), "the first is not answered yet"
        site.broker.let_go()
        answers = [answer_of(client) for _ in range(4)]
        assert [answer.status for answer in answers] == [200, 202, 200, 202]
        assert answers[3].header("x-receipt") == answers[0].header("x-receipt")
        assert answers[1].header("x-duplicate") is None
        client.send(event("dev", new(), "sink"))
        assert answer_of(client).status == 200


def test_slow_readers_do_not_hold_up_others(site: Site) -> None:
    slow = []
    for _ in range(5):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(0.2)
        sock.connect(("127.0.0.1", site.gateway.port))
        data = b"".join(event("dev", new(), "durable") for _ in range(2000))
        with contextlib.suppress(TimeoutError):
            sock.sendall(data)
        slow.append(sock)
    began = time.monotonic()
    for ack, status in LADDER.items():
        assert site.post(seq=new(), ack=ack).status == status
    assert time.monotonic() - began < 2
    for sock in slow:
        sock.close()
    wait_for(lambda: site.waiting == 0)
