"""The retry policy as tables: what each answer of a broker asks for, how long to wait, and which
event is to blame when connections break.

    PUBACK          success ─▶ the cursor may pass
                    final   ─▶ dead letter, then the cursor may pass
                    wait    ─▶ the stream waits, then tries again
                    reconnect ▶ new connection, new session
    connection      away, refused, taken over: how long to wait
    lost            what was in flight is suspect, or not (`Suspects`)

docs/delivery.md has the same tables for operators; tests hold the two together. Section numbers are
those of MQTT 5.0.
"""

import enum
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from gateway._mqtt import View

QUIET_S: Final = 1.0
"""How long a connection must stand before a suspect may be blamed for its end."""

STRIKE_S: Final = 5.0
"""An end this long after the suspect was sent is not the suspect's doing."""

ALARM_INTERVAL_S: Final = 60.0
"""The same alarm is logged again after this."""


class Puback(enum.Enum):
    """What a PUBACK reason of 0x80 or more asks for."""

    DEAD_LETTER = "the event will never be taken"
    WAIT = "later, perhaps"
    RECONNECT = "the two sides do not agree on what is in flight"


PUBACK: Final[Mapping[int, Puback]] = {
    0x80: Puback.WAIT,
    0x83: Puback.WAIT,
    0x87: Puback.DEAD_LETTER,
    0x90: Puback.DEAD_LETTER,
    0x91: Puback.RECONNECT,
    0x97: Puback.WAIT,
    0x99: Puback.DEAD_LETTER,
}
"""Every error of 3.4.2.1."""


def after_puback(reason: int) -> Puback:
    """A reason that the standard does not know says nothing about the event: wait."""
    return PUBACK.get(reason, Puback.WAIT)


class Kind(enum.Enum):
    """What the loss of a connection asks for; the value is the state of the link."""

    AWAY = "waiting"
    REFUSED = "refused"
    TAKEN_OVER = "taken_over"


BLAMES_IN_FLIGHT: Final = frozenset({0x00, 0x80, 0x81, 0x82, 0x83, 0x87, 0x90, 0x93, 0x95, 0x99})
"""DISCONNECT reasons (3.14.2.1) that a PUBLISH in flight can have caused."""

LONG_DISCONNECTS: Final = frozenset({0x9B, 0x9C, 0x9D})
"""DISCONNECT reasons that time alone does not mend."""

BUSY_CONNACKS: Final = frozenset({0x88, 0x89, 0x97, 0x9F})
"""CONNACK reasons (3.2.2.2) that time mends; every other refusal waits long."""


class Lost(Exception):
    """The connection is over, or never came to be."""

    def __init__(
        self,
        reason: str,
        kind: Kind = Kind.AWAY,
        *,
        new_session: bool = False,
        blames_in_flight: bool = False,
        code: int | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind
        self.new_session = new_session
        """The session is not to be trusted: the next CONNECT asks for a clean one."""
        self.blames_in_flight = blames_in_flight
        """The broker ended it, perhaps because of what was in flight."""
        self.code = code
        """Of the broker's DISCONNECT."""


class Backoff:
    """Full jitter (Brooker, "Exponential Backoff and Jitter"): random(0, min(cap, base * 2^n))."""

    def __init__(self, base_s: float, cap_s: float, draw: Callable[[], float]) -> None:
        self._base_s, self._cap_s, self._draw = base_s, cap_s, draw
        self.attempts = 0

    def next_s(self) -> float:
        """Seconds to wait before the next attempt."""
        bound = min(self._cap_s, self._base_s * 2.0 ** min(self.attempts, 60))
        self.attempts += 1
        return bound * self._draw()

    def long_s(self) -> float:
        """The same for what time alone does not mend: between half the cap and the cap."""
        self.attempts += 1
        return self._cap_s * (0.5 + 0.5 * self._draw())

    def reset(self) -> None:
        """The other side has proved well."""
        self.attempts = 0


class Suspects:
    """Tells an event that breaks connections (poison) from a broker that breaks them by itself.

    When the broker ends a connection and something was in flight, all of that is suspect: it is
    sent one by one until the cursor has passed it. A suspect gets a strike when the experiment was
    clean: it was alone in flight, in a message of its own (a pack is split before one of its events
    is blamed), the end came within STRIKE_S of its sending, and the connection had proved well
    before, by an acknowledgement or by standing QUIET_S with nothing sent.

    So a broker that is restarted, or that accepts and closes a hundred times, strikes nobody: it
    would have to fail just between one PUBLISH and its PUBACK, `strikes_max` times, each time with
    the same event, and never in the quiet: an end with nothing in flight is proof against the
    broker or the network, and takes the strikes back. A PUBACK that does not come, a silent peer
    and a network that dies are no strikes: a broker that never acknowledges is not the event's
    fault.
    """

    def __init__(self, strikes_max: int, quiet_s: float = QUIET_S) -> None:
        self._strikes_max, self._quiet_s = strikes_max, quiet_s
        self.until_lsn = 0
        """Every event below was in flight when a connection broke."""
        self._lsn = -1
        self.strikes = 0

    def quiet_s(self, cursor_lsn: int) -> float:
        """How long a new connection sends nothing, so that it proves well first."""
        return self._quiet_s if cursor_lsn < self.until_lsn else 0.0

    def connection_ended(self, view: View, now_ns: int, proved: bool) -> int | None:
        """The broker ended a connection with `view` in flight. Returns the lsn of an event that has
        its last strike, or None. `now_ns` is CLOCK_MONOTONIC."""
        if not view.in_flight:
            self.strikes = 0
            return None
        self.until_lsn = max(self.until_lsn, view.read_lsn)
        quick = now_ns - view.oldest_sent_ns <= STRIKE_S * 1e9
        if view.in_flight != 1 or view.oldest_events > 1 or not quick or not proved:
            return None
        if view.oldest_lsn != self._lsn:
            self._lsn, self.strikes = view.oldest_lsn, 0
        self.strikes += 1
        return self._lsn if self.strikes >= self._strikes_max else None


class Alarms:
    """Logs the same thing at most once a minute, also when others come between."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: dict[str, float] = {}
        """When, CLOCK_MONOTONIC seconds; those of the last minute."""

    def say(self, level: int, text: str, next_step: str, key: str | None = None) -> bool:
        """Log `text; next_step`. What has the same `key` (else text) is the same thing. False: it
        was said within the last minute, and is a debug line now."""
        now_s = time.monotonic()
        self._said = {k: at for k, at in self._said.items() if now_s - at < ALARM_INTERVAL_S}
        key = text if key is None else key
        again = key in self._said
        if not again:
            self._said[key] = now_s
        self._logger.log(logging.DEBUG if again else level, "%s; %s", text, next_step)
        return not again

    def clear(self) -> None:
        """It is over: what comes next is news."""
        self._said.clear()
