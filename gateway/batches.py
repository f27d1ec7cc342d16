"""Many events in one request, or one that came compressed: from a whole body to its answer.

    body ── inflate ─┬─ one JSON event on a device's path ─▶ back to the door: Ingest.event
                     └─ a batch ─▶ Ingest.batch (compiled: split, then validate, claim, copy and
                                   commit item by item; the GIL is free meanwhile)
                                     │
        framing is wrong: 4xx        ├─ some in: 202, 200 for `sink`; 207 when not all are
        and nothing is in            ├─ none in: 400; 503 when the log takes nothing
                                     └─ the log failed in the middle: 500, nobody knows

An answer counts the items that were looked at: accepted + duplicates + refused. `resume_at` is the
first that was not, when the log filled (drained ...) in the middle; what stands before it is in or
named in `errors`, so a client goes on exactly there. X-Receipt is that of the highest lsn: what
holds for it holds for the whole batch.

The door's thread calls `take`; an answer that waits for its acknowledgement is made by the thread
of `gateway.waiting`. Memory: what large bodies announce while they arrive, and what answers keep
while they wait, share http.batches_bytes_max (`held`); beyond it batches are refused, single events
never."""

import random
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec

from gateway import _log, http
from gateway.errors import REFUSALS
from gateway.http import Answer, Form
from gateway.inflate import inflate
from gateway.settings import HttpConfig
from gateway.waiting import Reply, Waiting

_encode: Final = msgspec.json.Encoder().encode
is_array: Final = re.compile(rb"[ \t\r\n]*\[").match
"""A JSON body is a batch: its first byte behind white space is a bracket."""
_BATCHES: Final = _log.COUNTERS["batches"]
_BATCH_EVENTS: Final = _log.COUNTERS["batch_events"]
_INFLATED_BYTES: Final = _log.COUNTERS["inflated_bytes"]

_NONE_GOOD: Final = "no event of the batch was accepted; errors says why"
_PENDING: Final = (
    "accepted, but not confirmed in time; send it again with the same seqs, or ask /v1/receipts/"
    " with X-Receipt"
)
_REST: Final = "what begins with item resume_at is not in: send it again after Retry-After"
_STOPPED: Final = {
    code: f"{REFUSALS[code].message.partition(';')[0]}; {_REST}"
    for code in (http.LOG_FULL, http.DRAINING, http.FAILED)
} | {
    http.ACCEPTED_PENDING: "another request is writing an event with the same device id, boot and"
    f" seq; {_REST}"
}


class ItemError(msgspec.Struct, gc=False):
    """Why one event of a batch was refused. Ten thousand of them must not wake the garbage
    collector: it looks at all that the process has."""

    index: int
    code: str
    field: str | None
    message: str


class Event:
    """One event that came in a larger or compressed body, as a door takes it: like the future of a
    body that is here."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def result(self) -> bytes:
        """The body."""
        return self._body

    def cancel(self) -> None:
        """Past its deadline in the instant between its arrival and its turn."""


class Batches:
    """The batches of one worker."""

    def __init__(
        self,
        log: _log.Log,
        worker: int,
        ingest: _log.Ingest,
        waiting: Waiting,
        limits: HttpConfig,
        refuse: Callable[[int, int], Answer],
        shed: Callable[[int], tuple[int, Answer]],
    ) -> None:
        """`refuse` counts and answers a refusal; `shed` says why the log takes nothing (a code of
        `Batch.stop`), and what a single event would be answered."""
        self._log, self._worker, self._ingest, self._waiting = log, worker, ingest, waiting
        self._refuse, self._shed = refuse, shed
        self._limits = limits
        self._item_messages: Final = [refusal.message for refusal in REFUSALS]
        self._item_messages[http.BODY_TOO_LARGE] = (
            f"the event is larger than http.body_bytes_max = {limits.body_bytes_max}"
        )
        self.held: dict[object, int] = {}
        """Bytes, by who holds them. A dict, since more than one thread takes out: a pop is one
        step, where `-=` on a sum is three."""

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more may be held."""
        return sum(self.held.values()) + size <= self._limits.batches_bytes_max

    def take(
        self, reply: Reply, device_id: str | None, body: bytes, form: Form, started_ns: int
    ) -> Event | None:
        """Answer the request whose body has arrived whole; `device_id` None: each event names its
        own. Returns what is for the door: one event."""
        batch = form.ndjson or device_id is None
        if form.coding is not None:
            most = self._limits.batch_bytes_max
            code, body = inflate(form.coding, body, most, self._limits.inflate_ratio_max)
            self._log.counter_add(self._worker, _INFLATED_BYTES, len(body))
            if code == http.BATCH_TOO_LARGE and not batch and not is_array(body):
                code = http.BODY_TOO_LARGE
            if code:
                reply(*self._refuse(code, started_ns))
                return None
        if not batch and not is_array(body):
            if len(body) <= self._limits.body_bytes_max:
                return Event(body)
            reply(*self._refuse(http.BODY_TOO_LARGE, started_ns))
            return None
        self.batch(reply, device_id, body, form, started_ns)
        return None

    def batch(
        self, reply: Reply, device_id: str | None, body: bytes, form: Form, started_ns: int
    ) -> None:
        """Answer a batch."""
        log = self._log
        if form.ack != http.ENQUEUE and not self.has_room(0):
            reply(*self._refuse(http.OVERLOADED, started_ns))
            return
        dead = self._dead_lettered() if form.ack == http.SINK else 0
        limits = self._limits.body_bytes_max, self._limits.batch_events_max
        batch = self._ingest.batch(device_id, body, form.ndjson, started_ns, limits)
        if batch.code:
            reply(*self._misframed(batch))
            return
        log.counter_add(self._worker, _BATCHES)
        log.counter_add(self._worker, _BATCH_EVENTS, batch.items)
        good = batch.accepted + batch.duplicates
        said: dict[str, Any] = {
            "ack": None,
            "accepted": batch.accepted,
            "duplicates": batch.duplicates,
            "refused": len(batch.errors),
            "errors": self._errors(batch),
        }
        status, headers = 202, [http.TYPE_JSON]
        if good:
            all_repeated = batch.duplicates == good and not batch.errors
            said["receipt"] = log.receipt(batch.lsn)
            headers = http.receipt_headers(said["receipt"], all_repeated, batch.used_percent)
            if form.each:
                said["receipts"] = self._receipts(batch)
            if batch.errors:
                status = 207
        else:
            status = 400
            first = batch.errors[0][1] if batch.errors else 0  # none: it stopped at once
            said["code"], said["message"] = REFUSALS[first].code, _NONE_GOOD
        if batch.resume_at is not None:
            code, single = self._shed(batch.stop)
            if code == http.INTERNAL or (code == http.FAILED and good):
                # The log failed after a commit: what recovery will find is unknown.
                reply(*http.refusal(http.INTERNAL))
                return
            status = 207 if good or batch.errors else single.status
            said["resume_at"] = batch.resume_at
            said["code"], said["message"] = REFUSALS[code].code, _STOPPED[code]
            headers += single.headers[1:]  # Retry-After, Connection
            if code == http.ACCEPTED_PENDING:
                headers.append(("retry-after", str(random.choice(http.RETRY_SOON_S))))
        if not good:
            reply(status, headers, _encode(said))
        elif form.ack == http.ENQUEUE:
            said["ack"] = http.ACKS[http.ENQUEUE]
            reply(status, [*headers, http.X_ACK[http.ENQUEUE]], _encode(said))
        else:
            # The lsns are needed only to find what was set aside: a repeat may have been long ago.
            lsns = batch.lsns if form.ack == http.SINK else b""
            key = object()
            self.held[key] = len(lsns) + len(said["errors"]) + len(said.get("receipts", b""))
            # `said` has the errors; as they came, their fields may be as long as the body was.
            kept = batch._replace(errors=[], lsns=lsns)
            answer = partial(self._confirmed, key, kept, dead, status, headers, said)
            self._waiting.batch(reply, batch.lsn, form.ack, started_ns, answer)

    def _confirmed(
        self,
        key: object,
        batch: _log.Batch,
        dead: int,
        status: int,
        headers: list[tuple[str, str]],
        said: dict[str, Any],
        ack: int,
        late: bool,
    ) -> Answer:
        """The answer of a batch that asked for `ack`: it is reached, or (`late`) was not in
        time."""
        self.held.pop(key, None)
        log = self._log
        if late:
            held = http.DURABLE if log.durable > batch.lsn else http.ENQUEUE
            refusal = REFUSALS[http.ACCEPTED_PENDING]
            said["ack"] = http.ACKS[held]
            said["code"], said["message"] = refusal.code, _PENDING
            return Answer(refusal.status, headers, _encode(said))
        # None was set aside since before the first of them was in, and no repeat is among them: all
        # are delivered, and nobody has to ask for each.
        if ack == http.SINK and (batch.duplicates or self._dead_lettered() != dead):
            states = Counter(map(log.state_of, filter(None, memoryview(batch.lsns).cast("Q"))))
            aside = {state: states[state] for state in ("dead_lettered", "finished")}
            if any(aside.values()):
                ack = http.DURABLE if log.durable > batch.lsn else http.ENQUEUE
                said.update((state, n) for state, n in aside.items() if n)
        if ack == http.SINK and status == 202:
            status = 200
        said["ack"] = http.ACKS[ack]
        return Answer(status, [*headers, http.X_ACK[ack]], _encode(said))

    def _dead_lettered(self) -> int:
        log = self._log
        return sum(log.cursor(sink).dead_lettered for sink in range(len(log.sinks)))

    def _misframed(self, batch: _log.Batch) -> Answer:
        code = batch.code
        if code == http.BATCH_TOO_LARGE:
            most = f"{self._limits.batch_bytes_max} and {self._limits.batch_events_max}"
            return http.worded(code, f"{REFUSALS[code].message} = {most}")
        return http.refusal(code, None, batch.offset)

    def _errors(self, batch: _log.Batch) -> msgspec.Raw:
        """The refused items as JSON: bytes are smaller than what they are made from, and may have
        to be kept."""
        messages = self._item_messages
        return msgspec.Raw(
            _encode(
                [
                    ItemError(
                        index,
                        REFUSALS[code].code,
                        http.shortened(field),
                        messages[code]
                        if offset is None
                        else f"{messages[code]} (at byte {offset} of the event)",
                    )
                    for index, code, field, offset in batch.errors
                ]
            )
        )

    def _receipts(self, batch: _log.Batch) -> msgspec.Raw:
        receipt = self._log.receipt
        lsns = memoryview(batch.lsns).cast("Q")
        return msgspec.Raw(_encode([receipt(lsn) if lsn else None for lsn in lsns]))
