"""What becomes of events that hold the window: dead letters for what is final, patience for the
rest.

    PUBACK ≥ 0x80, or no PUBLISH can be made of it
        │ final: the records that hold the connection now, together
        ├──▶ one append, one fdatasync (in a thread) ─▶ mark_dead each ─▶ the window passes each
        │       └─ full, or the disk says no: nothing is passed, alarm, try again with backoff
        │ later, perhaps: once nothing is in flight
        └──▶ wait with backoff ─▶ start over from the cursor, one by one up to that record
        │ a pack of several events: once nothing is in flight
        └──▶ start over at once, its events one a message: only the guilty one is set aside

A record that is marked in the log already is on file: it is passed, and not written again.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Protocol

from gateway import books, mqtt
from gateway._log import Lapped, Log, Record
from gateway._mqtt import Packet, Refusal, View, Window
from gateway.dead_letters import DeadLetter, DeadLettersFull, Shelf
from gateway.mqtt import printable, reason_name
from gateway.retry import Alarms, Backoff, Lost, Puback, after_puback
from gateway.topics import TopicTemplate

FULL: Final = "dead_letters_full"
"""State of the link while nothing can be set aside."""

TOGETHER_BYTES: Final = 4 << 20
"""Bodies that are set aside with one append: memory is bounded, whatever the window holds."""


class Host(Protocol):
    """What is asked of the publisher."""

    name: str
    client_id: str

    def held(self, state: str, error: str) -> None:
        """Publishing waits here; `state` is "held" or FULL."""

    def passed(self) -> None:
        """Dead letters may have moved the cursor and opened the window."""

    def failed(self, error: BaseException) -> None:
        """What can never happen did: end."""


class Aside:
    """Where dead letters go: shared by the connections, one append at a time."""

    def __init__(
        self, log: Log, sink: int, shelf: Shelf, topic: TopicTemplate, window: Window
    ) -> None:
        self._log, self._sink, self._shelf, self._topic = log, sink, shelf, topic
        self._window = window
        self._turn = asyncio.Lock()

    def read(self, lsn: int) -> Record:
        """A record that the window has read. Raises LogError, also when the log went on without
        this sink: what was copied may be half another event then."""
        record = self._read(lsn)
        assert record is not None, "the window has read it"
        if self.is_passed:
            raise Lapped(f"{self._log.path}: written over at lsn {lsn}, where publishing stood")
        return record

    def _read(self, lsn: int) -> Record | None:
        return self._log.read(lsn)

    @property
    def is_passed(self) -> bool:
        """Not damage: nobody waits for this sink, and the log went on without it."""
        return books.is_passed(self._log, self._sink)

    def is_dead(self, record: Record) -> bool:
        """It has a dead letter."""
        return bool(record.dead >> self._sink & 1)

    def topic(self, record: Record) -> str:
        """The topic that it has, or would have."""
        return self._topic.fill(record.device_id)

    async def write(self, letters: Sequence[DeadLetter]) -> int:
        """How many of the first ones are durable and marked in the log. Raises DeadLettersFull,
        OSError."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            done = await loop.run_in_executor(None, self._shelf.append, letters)
        for letter in letters[:done]:
            self._mark(letter.record)
        return done

    def _mark(self, record: Record) -> None:
        """Of a sink for which the log does not wait, what every other sink has passed cannot be
        marked: its place is no longer only read. The window knows it then, and after a restart it
        is sent, and refused, again."""
        if self._log.mark_dead(self._sink, record.lsn, record.epoch):
            return
        self._window.set_aside(record.lsn)
        if self._log.is_required(self._sink):
            raise RuntimeError(f"the log does not know the event at lsn {record.lsn} any more")


class Refusals:
    """The messages of one connection that hold it. On the loop's thread."""

    def __init__(
        self,
        host: Host,
        log: Log,
        window: Window,
        connection: int,
        aside: Aside,
        patience: Backoff,
        alarms: Alarms,
    ) -> None:
        self._host, self._log, self._window, self._connection = host, log, window, connection
        self._aside, self._patience, self._alarms = aside, patience, alarms
        self._words: dict[int, str] = {}
        """What the broker said of a record, until it has its dead letter."""
        self._task: asyncio.Task[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._lsn = -1
        """The record that waits, or the last one that did."""
        self._acks_at_try = -1

    # ---- from the connection ---------------------------------------------------------------

    def answered(self, packet: Packet) -> None:
        """A PUBACK with an error; the window holds by itself. Raises Lost when the connection has
        to end."""
        assert packet.lsn is not None
        verdict = after_puback(packet.reason)
        words = printable(mqtt.puback_reason_string(packet.body))
        if verdict is Puback.RECONNECT:
            raise Lost(
                f"the broker answers a PUBLISH with {reason_name(packet.reason)}", new_session=True
            )
        if verdict is Puback.WAIT:
            self._say_held(packet.lsn, packet.reason, words)
        elif words:
            self._words[packet.lsn] = words

    def check(self, view: View) -> None:
        """The window holds."""
        if self._task is not None or self._retry is not None:
            return
        refusals = self._own()
        final = [refusal for refusal in refusals if _is_final(refusal)]
        if final:
            self._task = asyncio.get_running_loop().create_task(self._set_aside(final))
            self._task.add_done_callback(self._ended)
            return
        if view.in_flight:  # let the rest come home: a late PUBACK must not meet a new entry
            return
        if any(map(_is_to_be_split, refusals)):
            if self._start_over():  # else what a resumed session is owed goes first
                asyncio.get_running_loop().call_soon(self._host.passed)
            return
        if refusals:
            lsn = refusals[0].lsn
        else:
            lsn = view.corrupt_lsn
            text = f"the log is corrupt at lsn {lsn}: nothing behind it is published"
            if self._aside.is_passed:
                text = f"the log was written over at lsn {lsn}, where publishing stood"
            else:
                self._alarms.say(logging.ERROR, text, "run: gateway log verify")
            self._host.held("held", text)
        if lsn != self._lsn:
            self._lsn = lsn
            self._patience.reset()
        self._try_later()

    def connected(self) -> None:
        """A new connection: look again at once."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._task is None:
            self._words.clear()

    def over(self, view: View) -> bool:
        """What was tried again was taken."""
        return view.acks > self._acks_at_try

    async def close(self) -> None:
        """What is being written is marked before the log goes away."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._task is not None:
            await asyncio.wait({self._task})

    # ---- later, perhaps --------------------------------------------------------------------

    def _say_held(self, lsn: int, reason: int, words: str) -> None:
        text = f"{self._host.name}: the broker refuses {self._event(lsn)}: {reason_name(reason)}"
        text += f" ({words})" if words else ""
        self._alarms.say(
            logging.WARNING,
            text,
            f"publishing waits and tries again ({printable(self._host.client_id)})",
            f"waits {reason}",
        )
        self._host.held("held", text)

    def _event(self, lsn: int) -> str:
        record = self._log.read(lsn)
        topic = "?" if record is None else self._aside.topic(record)
        return f"the event at lsn {lsn}, topic {printable(topic)}"

    def _try_later(self) -> None:
        self._retry = asyncio.get_running_loop().call_later(
            self._patience.next_s(), self._try_again
        )

    def _try_again(self) -> None:
        self._retry = None
        refusals = self._own()
        if not any(map(_is_final, refusals)):
            if refusals:  # a pack too: a broker over its quota must not get all its events at once
                self._window.probe(refusals[0].lsn, connection=self._connection)
            self._start_over()
        self._host.passed()

    def _start_over(self) -> bool:
        self._words.clear()
        self._acks_at_try = self._window.look(self._connection).acks
        return self._window.start_over(self._connection)

    def _own(self) -> list[Refusal]:
        return [
            refusal for refusal in self._window.refusals() if refusal.connection == self._connection
        ]

    # ---- dead letters ----------------------------------------------------------------------

    async def _set_aside(self, refusals: Sequence[Refusal]) -> None:
        passed: list[int] = []
        letters: list[DeadLetter] = []
        together = 0
        for refusal in refusals:
            if together > TOGETHER_BYTES:
                break  # the rest holds the window still, and is next
            record = self._aside.read(refusal.lsn)
            together += len(record.body)
            if self._aside.is_dead(record):
                passed.append(refusal.lsn)
                continue
            text = self._words.pop(refusal.lsn, "")
            if not refusal.by_broker and refusal.bytes:
                text = f"not sent: a packet of {refusal.bytes} bytes"
            elif not refusal.by_broker:
                text = "not sent: no PUBLISH can be made of it"
            letters.append(
                DeadLetter(
                    record,
                    self._aside.topic(record),
                    refusal.reason,
                    False,
                    text,
                    int(refusal.by_broker),
                )
            )
        done = await self._write(letters) if letters else 0
        passed += [letter.record.lsn for letter in letters[:done]]
        for lsn in passed:
            self._window.dead_letter(lsn)
        if done < len(letters):
            for letter in letters[done:]:
                self._words[letter.record.lsn] = letter.text
        if passed:
            self._patience.reset()
        elif letters:
            self._try_later()

    async def poison(self, lsn: int, reason: int | None, attempts: int) -> None:
        """Set aside the event that broke connections. Comes back when it is durable."""
        record = self._aside.read(lsn)
        letter = DeadLetter(
            record,
            self._aside.topic(record),
            reason,
            True,
            f"the broker closed the connection {attempts} times with this event alone in flight",
            attempts,
        )
        while not self._aside.is_dead(record) and not await self._write([letter]):
            await asyncio.sleep(self._patience.next_s())

    async def _write(self, letters: Sequence[DeadLetter]) -> int:
        """How many of the first ones are durable and marked."""
        try:
            done = await self._aside.write(letters)
        except DeadLettersFull as problem:
            self._cannot(FULL, str(problem))
            return 0
        except OSError as problem:
            self._cannot(
                "held",
                f"dead letters cannot be written ({problem.strerror or problem}): free some space,"
                " and look at the disk",
            )
            return 0
        self._say_set_aside(letters[:done])
        return done

    def _cannot(self, state: str, problem: str) -> None:
        text = f"{self._host.name}: {problem}"
        self._alarms.say(
            logging.ERROR,
            text,
            "publishing waits, nothing is dropped, and tries again"
            f" ({printable(self._host.client_id)})",
            state,
        )
        self._host.held(state, text)

    def _say_set_aside(self, letters: Sequence[DeadLetter]) -> None:
        for reason in {(letter.reason, letter.poison) for letter in letters}:
            those = [letter for letter in letters if (letter.reason, letter.poison) == reason]
            first = those[0]
            why = "broke connections" if first.poison else reason_name(first.reason or 0)
            text = f" ({first.text})" if first.text else ""
            more = f", and {len(those) - 1} more," if len(those) > 1 else ""
            self._alarms.say(
                logging.ERROR,
                f"{self._host.name}: dead letter: the event at lsn {first.record.lsn}, topic"
                f" {printable(first.topic)}{more} set aside: {why}{text}",
                "see `gateway dead-letters ls`; this is said once a minute",
                f"dead letter {reason}",
            )

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._host.failed(error)
        else:
            self._host.passed()


def _is_final(refusal: Refusal) -> bool:
    return refusal.events == 1 and _never(refusal)


def _is_to_be_split(refusal: Refusal) -> bool:
    return refusal.events > 1 and _never(refusal)


def _never(refusal: Refusal) -> bool:
    return not refusal.by_broker or after_puback(refusal.reason) is Puback.DEAD_LETTER
