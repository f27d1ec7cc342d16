"""The fleets, for locust:  LOADTEST_PLAN=plan.json LOADTEST_RECORD=client.json locust -f ...

    Steady        one event a request, at its times
    Bursty        the same, quiet outside the burst
    Reconnecting  loses its link in the outage, keeps readings, comes back with a batch
    Duplicates    sends each event twice, byte for byte
    Malformed     sends what must be refused, and knows with which code
    Batches       collectors: NDJSON and JSON arrays, plain and gzip, one bad event now and then

A device waits like locust's `constant_throughput`, but for times that are fixed from the start: one
late request moves none behind it. Two kinds of late are kept apart. A device whose former answer
was late could not send: that time belongs to the server, and is added to the response time that
locust records. A device that was free and was woken late: that is locust's or the machine's doing,
and so is what comes behind it for that reason; it is counted, and can make the run void.

Every request is booked before it is sent. What its answer says moves the events to "accepted" or
"refused"; what is neither (500, 504, no answer) is unknown: it may arrive, and need not.
"""

import gzip
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

import gevent
import msgspec
from locust import LoadTestShape, events, task
from locust.contrib.fasthttp import FastHttpUser, ResponseContextManager
from locust.env import Environment

from loadtest import accounts
from loadtest.plan import CLOSE_S, Clock, Kind, Plan

PLAN: Final = msgspec.json.decode(Path(os.environ["LOADTEST_PLAN"]).read_bytes(), type=Plan)
RECORD: Final = Path(os.environ["LOADTEST_RECORD"])
SEED: Final = int(os.environ.get("LOADTEST_SEED", "1"))
NEVER_S: Final = 3600.0
GRACE_S: Final = 1.0  # from the start of the shape to the first request
Told = Callable[[ResponseContextManager], str]


class Book:
    """What was sent, and what became of it."""

    def __init__(self) -> None:
        self.sent: accounts.Seqs = {}
        self.accepted: accounts.Seqs = {}
        self.refused: accounts.Seqs = {}
        self.repeats_sent = 0
        """Events that were in before, sent once more."""
        self.repeats_told = 0
        """How many of them the gateway called repeats."""
        self.refusals_due = 0
        """Events that had to be refused and were."""
        self.sheds = 0
        """Requests answered 503 with Retry-After."""
        self.requests: dict[str, dict[str, int]] = {}
        """By phase in which they were due, of the fleets that send one event a request: how many
        were sent, how many of them before the phase was over, and how many late by locust's doing.
        """

    def add(self, account: accounts.Seqs, key: str, seqs: list[int]) -> None:
        account.setdefault(key, set()).update(seqs)

    def note(self, phase: str, now: float, late_s: float) -> None:
        row = self.requests.setdefault(phase, {"sent": 0, "in_time": 0, "late": 0})
        row["sent"] += 1
        row["in_time"] += now < CLOCK.window(phase)[1] + PLAN.late_ms / 1000
        row["late"] += late_s * 1000 > PLAN.late_ms


CLOCK: Final = Clock(PLAN)
BOOK: Final = Book()


def event(boot: int, seq: int, sent_ns: int, device: str = "") -> bytes:
    """A reading. With `device`, one that says whose it is."""
    whose = b'"device_id":"%s",' % device.encode() if device else b""
    return (
        b'{%s"boot":%d,"seq":%d,"metrics":{"temp_c":%d.5,"hum":%d.25,"rpm":%d},'
        b'"tags":{"site":"AAL","line":"3"},"payload":{"sent_ns":%d}}'
        % (whose, boot, seq, seq % 40, seq % 90, 1000 + seq % 9000, sent_ns)
    )


class Device(FastHttpUser):
    """One device: its own connection, its own schedule, its own numbers."""

    abstract = True
    kind: ClassVar[Kind]
    connection_timeout = network_timeout = 15.0
    max_redirects = max_retries = 0
    concurrency = 1
    default_headers: dict[str, str] | None = {"Content-Type": "application/json"}  # noqa: RUF012
    _numbers: ClassVar[dict[str, Iterator[int]]] = {}

    def on_start(self) -> None:
        number = next(self._numbers.setdefault(self.kind, itertools.count()))
        fleet = PLAN.fleets[self.kind]
        self.device_id = f"{self.kind}-{number:04}"
        self.path = f"/v1/ingest/{self.device_id}"
        self.boot, self.seq = 1, 0
        self.period_s = fleet.period_s
        self.free_at = self.late_s = 0.0
        self.client.client.cookiejar = None  # devices keep none, and asking costs a tenth
        # even over the period: so the fleet's rate is even as well
        self.offset_s = fleet.period_s * (number + 0.5) / fleet.devices
        self.due = self.first_due()
        self.random = random.Random(f"{SEED} {self.device_id}")
        gevent.sleep(max(0.0, self.due - time.time()))

    def first_due(self) -> float:
        """When the schedule begins."""
        return CLOCK.windows[0][1] + self.offset_s

    def next_due(self) -> float:
        """The time of the request after the one at self.due."""
        return self.due + self.period_s

    def wait_time(self) -> float:
        """Seconds until the next request is due; 0 when it is late."""
        self.due = self.next_due()
        if self.due >= CLOCK.close:
            return NEVER_S
        return max(0.0, self.due - time.time())

    def key(self) -> str:
        """For the accounts."""
        return f"{self.device_id}/{self.boot}"

    def send(self, body: bytes, told: Told, path: str = "", **headers: str) -> str:
        """One request; `told` reads the answer and returns what is wrong with it, or nothing."""
        now = time.time()
        phase = CLOCK.phase(self.due)
        # When it would have been free, had locust not been late with the former request already.
        waited_s = max(0.0, self.free_at - self.late_s - self.due)
        self.late_s = max(0.0, now - self.due - waited_s)
        if self.kind in ("steady", "bursty"):
            BOOK.note(phase, now, self.late_s)
        with self.client.post(
            path or self.path,
            data=body,  # type: ignore[arg-type]  # bytes are sent as they are
            headers=headers,
            name=f"{phase}: {self.kind}",
            catch_response=True,
        ) as answer:
            self.free_at = time.time()
            answer.request_meta["response_time"] += waited_s * 1000
            if wrong := told(answer):
                answer.failure(wrong)
            else:
                answer.success()
        return wrong

    def send_event(self) -> bytes:
        """One new event. Returns its body."""
        seq, key, boot = self.seq, self.key(), self.boot
        self.seq += 1
        body = event(boot, seq, time.time_ns())
        BOOK.add(BOOK.sent, key, [seq])

        def told(answer: ResponseContextManager) -> str:
            status = answer.status_code
            if status == 202:
                BOOK.add(BOOK.accepted, key, [seq])
                return "a new event was called a repeat" if is_repeat(answer) else ""
            if 400 <= status < 500 or status == 503:
                BOOK.add(BOOK.refused, key, [seq])
            return failure(answer)

        self.send(body, told)
        return body


def header(answer: ResponseContextManager, name: str) -> str:
    """Of an answer; nothing when there was none."""
    return str(answer.headers.get(name, "")) if answer.headers is not None else ""


def is_repeat(answer: ResponseContextManager) -> bool:
    """The gateway says that it had the event."""
    return header(answer, "x-duplicate") == "true"


def failure(answer: ResponseContextManager) -> str:
    """The name of what went wrong, the same for all of its kind."""
    if answer.status_code == 503:
        if header(answer, "retry-after"):
            BOOK.sheds += 1
            return "503 with Retry-After"
        return "503 without Retry-After"
    if not answer.status_code:
        return f"no answer: {type(getattr(answer, 'error', None)).__name__}"
    return f"status {answer.status_code}"


class Steady(Device):
    kind = "steady"

    @task
    def report(self) -> None:
        self.send_event()


class Bursty(Device):
    kind = "bursty"

    def first_due(self) -> float:
        return CLOCK.window("burst")[0] + self.offset_s

    def next_due(self) -> float:
        due = self.due + self.period_s
        return due if due < CLOCK.window("burst")[1] else CLOCK.close

    @task
    def report(self) -> None:
        self.send_event()


class Batch:
    """Events in one body, and how an answer is booked."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.events: list[tuple[str, int]] = []
        self.bad: dict[int, str] = {}
        """Index to code."""

    def add(self, key: str, seq: int, body: bytes, code: str = "") -> None:
        """One item; with `code` it must be refused with that."""
        if code:
            self.bad[len(self.bodies)] = code
        self.bodies.append(body)
        self.events.append((key, seq))
        BOOK.add(BOOK.sent, key, [seq])

    def body(self, array: bool) -> bytes:
        """On the wire."""
        if array:
            return b"[" + b",".join(self.bodies) + b"]"
        return b"\n".join(self.bodies) + b"\n"

    def told(self, answer: ResponseContextManager) -> str:
        """Book what the answer says of each item."""
        status = answer.status_code
        if status == 503 or 400 <= status < 500:
            for key, seq in self.events:
                BOOK.add(BOOK.refused, key, [seq])
            return failure(answer)
        if status not in (202, 207):
            return failure(answer)
        said: dict[str, Any] = json.loads(answer.content)
        found = {row["index"]: row["code"] for row in said["errors"]}
        looked_at = said.get("resume_at", len(self.events))
        for index, (key, seq) in enumerate(self.events):
            refused = index in found or index >= looked_at
            BOOK.add(BOOK.refused if refused else BOOK.accepted, key, [seq])
        due = {index: code for index, code in self.bad.items() if index < looked_at}
        BOOK.refusals_due += len(due)
        if found != due:
            return "other items refused than the bad ones"
        if said["accepted"] + said["duplicates"] + said["refused"] != looked_at:
            return "the counts of a batch are not those of its items"
        if said["duplicates"]:
            return "a new event was called a repeat"
        if looked_at < len(self.events):
            return (
                failure(answer) if status == 503 else "a batch was taken in part: the log is full"
            )
        return "" if status == (207 if due else 202) else f"status {status}"


class Reconnecting(Device):
    kind = "reconnecting"

    def on_start(self) -> None:
        self.kept: list[tuple[int, bytes]] = []
        super().on_start()

    def next_due(self) -> float:
        due = super().next_due()
        begin, end = CLOCK.window("outage")
        # All come back in the same moment, as a fleet does when its cell comes back.
        return end if self.due < end <= due and self.due >= begin else due

    @task
    def report(self) -> None:
        if CLOCK.phase(self.due) == "outage":
            if not self.kept:
                self.client.client.close()
            self.kept.append((self.seq, event(self.boot, self.seq, time.time_ns())))
            self.seq += 1
        elif self.kept:
            batch = Batch()
            for seq, body in self.kept:
                batch.add(self.key(), seq, body)
            self.kept = []
            headers = {"Content-Type": "application/x-ndjson"}
            self.send(batch.body(array=False), batch.told, **headers)
            self.boot, self.seq = self.boot + 1, 0  # as a device that was switched off and on
        else:
            self.send_event()


class Duplicates(Device):
    kind = "duplicates"

    @task
    def report(self) -> None:
        body = self.send_event()
        seq, key = self.seq - 1, self.key()
        if seq not in BOOK.accepted.get(key, ()):
            return
        BOOK.repeats_sent += 1

        def told(answer: ResponseContextManager) -> str:
            if answer.status_code != 202:
                return failure(answer)
            if not is_repeat(answer):
                return "a repeat was taken as new"
            BOOK.repeats_told += 1
            return ""

        self.due, self.late_s = self.free_at, 0.0  # due as soon as the first answer is in
        self.send(body, told)

    def next_due(self) -> float:
        return self.first_due() + self.period_s * self.seq


BAD: Final[tuple[tuple[str, bytes, bytes], ...]] = (
    ("malformed_json", b"}}", b"}"),
    ("malformed_json", b'"seq":', b'"seq" '),
    ("unknown_field", b'"metrics"', b'"measures"'),
    ("bad_metric_key", b"temp_c", b"Temp C"),
    ("bad_metric_value", b'"rpm":', b'"rpm":"fast","x":'),
    ("duplicate_key", b'"hum"', b'"temp_c"'),
    ("bad_tag_value", b'"line":"3"', b'"line":3'),
    ("bad_boot", b'"boot":', b'"boot":-'),
)
"""Code, what is replaced in a good event, and by what."""


class Malformed(Device):
    kind = "malformed"

    @task
    def report(self) -> None:
        seq, key = self.seq, self.key()
        self.seq += 1
        code, good, bad = BAD[seq % len(BAD)]
        body = event(self.boot, seq, time.time_ns()).replace(good, bad, 1)
        BOOK.add(BOOK.sent, key, [seq])

        def told(answer: ResponseContextManager) -> str:
            status = answer.status_code
            if 200 <= status < 300:
                BOOK.add(BOOK.accepted, key, [seq])
                return f"accepted, and should be {code}"
            if status == 400 or status == 503:
                BOOK.add(BOOK.refused, key, [seq])
            if status != 400:
                return failure(answer)
            BOOK.refusals_due += 1
            said = json.loads(answer.content)["code"]
            return "" if said == code else f"refused as {said}, and should be {code}"

        self.send(body, told)


class Batches(Device):
    """A collector for ten devices of its own, or a device with a history."""

    kind = "batches"
    bad_every = 10

    @task
    def report(self) -> None:
        turn = self.seq
        self.seq += 1
        array, packed, many = turn % 2 == 1, turn // 2 % 2 == 1, turn // 4 % 2 == 1
        batch = Batch()
        bad = self.random.randrange(PLAN.batch_events) if turn % self.bad_every == 0 else -1
        for index in range(PLAN.batch_events):
            device = f"{self.device_id}-{index % 10}" if many else self.device_id
            seq = turn * PLAN.batch_events + index
            body = event(self.boot, seq, time.time_ns(), device if many else "")
            code = ""
            if index == bad:
                code, body = "bad_metric_key", body.replace(b"temp_c", b"Temp C")
            batch.add(f"{device}/{self.boot}", seq, body, code)
        headers = {"Content-Type": "application/json" if array else "application/x-ndjson"}
        body = batch.body(array)
        if packed:
            headers["Content-Encoding"] = "gzip"
            body = gzip.compress(body, 1)
        self.send(body, batch.told, "/v1/ingest" if many else "", **headers)


def man_the_fleets() -> None:
    """As many devices as the plan says; locust passes over a class that is abstract."""
    for device in (Steady, Bursty, Reconnecting, Duplicates, Malformed, Batches):
        fleet = PLAN.fleets.get(device.kind)
        device.abstract = fleet is None
        device.fixed_count = fleet.devices if fleet else 0


man_the_fleets()


class Phases(LoadTestShape):
    """All devices are there from the start; the phases say who sends. Says each phase on standard
    output as it begins, for the one who takes the broker away.
    """

    use_common_options = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._said = ""

    def tick(self) -> tuple[int, float] | None:
        if not CLOCK.windows:
            CLOCK.begin(time.time() + GRACE_S)
        now = time.time()
        phase = CLOCK.phase(now)
        if phase != self._said:
            self._said = phase
            print(f"phase {phase}", flush=True)
        if now >= CLOCK.close + CLOSE_S:
            return None
        devices = sum(fleet.devices for fleet in PLAN.fleets.values())
        return devices, float(devices)


@events.test_stop.add_listener  # type: ignore[untyped-decorator]
def write_record(environment: Environment, **_: Any) -> None:
    """All that the client knows, for loadtest.verdict."""
    stats: dict[str, dict[str, Any]] = {}
    for (name, _method), entry in environment.stats.entries.items():
        stats[name] = {
            "requests": entry.num_requests,
            "failures": {},
            "ms_p50": entry.get_response_time_percentile(0.5),
            "ms_p99": entry.get_response_time_percentile(0.99),
            "ms_max": entry.max_response_time,
        }
    for error in environment.stats.errors.values():
        failures = stats[error.name]["failures"]
        text = str(error.error).removeprefix("CatchResponseError('").removesuffix("')")
        failures[text] = failures.get(text, 0) + error.occurrences
    unknown = accounts.minus(accounts.minus(BOOK.sent, BOOK.accepted), BOOK.refused)
    record = {
        "cpu_s": time.process_time(),
        "windows": {name: [begin, end] for name, begin, end in CLOCK.windows},
        "due": CLOCK.requests(),
        "requests": BOOK.requests,
        "stats": stats,
        "accepted": accounts.pack(BOOK.accepted),
        "refused": accounts.pack(BOOK.refused),
        "unknown": accounts.pack(unknown),
        "repeats_sent": BOOK.repeats_sent,
        "repeats_told": BOOK.repeats_told,
        "refusals_due": BOOK.refusals_due,
        "sheds": BOOK.sheds,
    }
    RECORD.write_text(json.dumps(record))
