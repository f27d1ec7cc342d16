"""Who sends how much in which phase? The SLOs, read from slo.toml, and the fleets made from them.

warm_up   fleets connect and send; judged for lost events only
steady    steady.requests_per_second, one event each; the small fleets beside it
burst     burst.factor times as much, from devices that were quiet before
rest      as steady
outage    the broker is away; the reconnecting fleet has lost its link as well, and keeps readings
recovery  both are back: the backlog drains while devices come back, all at once
close     nobody sends; what is on its way is answered
"""

import math
import tomllib
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

PATH: Final = Path(__file__).with_name("slo.toml")
CLOSE_S: Final = 1.5

Kind = Literal["steady", "bursty", "reconnecting", "duplicates", "malformed", "batches"]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A table of slo.toml; a key that nobody reads is an error."""


class Steady(_Strict):
    """One event a request, at a fixed rate."""

    requests_per_second: float
    failures_max: int
    enqueue_ms_p50_max: float
    enqueue_ms_p99_max: float
    delivery_s_p99_max: float


class Burst(_Strict):
    """Many more for a short time."""

    factor: float
    failures_max: int


class Outage(_Strict):
    """The broker is away."""

    failures_max: int
    drain_factor_min: float


class Events(_Strict):
    """One by one, over the whole run."""

    lost_max: int
    refused_arrived_max: int
    unexplained_max: int


class Client(_Strict):
    """What makes a run void."""

    late_ms: float
    late_share_max: float
    sent_share_min: float


class Phases(_Strict):
    """Seconds."""

    warm_up: float
    steady: float
    burst: float
    rest: float
    outage: float
    recovery: float


class Slo(_Strict):
    """slo.toml."""

    steady: Steady
    burst: Burst
    outage: Outage
    events: Events
    client: Client
    phases: dict[str, Phases]


class Fleet(_Strict):
    """Devices of one kind. `period_s` lies between two requests of one device."""

    devices: int
    period_s: float

    @property
    def requests_per_second(self) -> float:
        """Of the whole fleet."""
        return self.devices / self.period_s


class Plan(_Strict):
    """What locust is given."""

    phases: list[tuple[str, float]]
    """Names and seconds, in order; a phase of no seconds is left out."""
    fleets: dict[Kind, Fleet]
    late_ms: float
    batch_events: int = 50

    @property
    def seconds(self) -> float:
        """Of the whole load."""
        return sum(seconds for _, seconds in self.phases)

    def has(self, phase: str) -> bool:
        """Whether the phase is part of this run."""
        return any(name == phase for name, _ in self.phases)


def read(path: Path = PATH) -> Slo:
    """The SLOs. Raises ValueError with the file and the key that is wrong."""
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text())
        return msgspec.convert(table, Slo)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{path}: {error}; the keys are those of loadtest/plan.py") from None


def plan(slo: Slo, phases: Phases, small_fleets: bool = True) -> Plan:
    """Fleets for these SLOs. 4 requests a second and device: an answer that takes longer than
    250 ms delays the next request, and counts there.
    """
    rate = slo.steady.requests_per_second
    period_s = 0.25

    def devices(requests_per_second: float) -> int:
        return max(1, round(requests_per_second * period_s))

    fleets: dict[Kind, Fleet] = {
        "steady": Fleet(devices(rate), period_s),
        "bursty": Fleet(devices(rate * (slo.burst.factor - 1)), period_s),
    }
    if not phases.burst:
        del fleets["bursty"]
    if small_fleets:  # shares of the steady rate, so that a small run has small ones
        fleets["reconnecting"] = Fleet(max(1, round(rate / 20)), 1.0)
        fleets["duplicates"] = Fleet(max(1, round(rate / 50)), 1.0)
        fleets["malformed"] = Fleet(max(1, round(rate / 50)), 1.0)
        fleets["batches"] = Fleet(max(1, round(rate / 100)), 1.0)
    named = [(name, getattr(phases, name)) for name in Phases.__struct_fields__]
    return Plan(
        phases=[(name, seconds) for name, seconds in named if seconds] + [("close", CLOSE_S)],
        fleets=fleets,
        late_ms=slo.client.late_ms,
    )


class Clock:
    """The phases in time. Fixed once, when the load begins."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.windows: list[tuple[str, float, float]] = []
        """Name, begin, end, in seconds of CLOCK_REALTIME."""

    def begin(self, at: float) -> None:
        """The first phase begins at this time."""
        for name, seconds in self._plan.phases:
            self.windows.append((name, at, at + seconds))
            at += seconds

    def phase(self, now: float) -> str:
        """At this time; the first and the last one go on for ever."""
        for name, _, end in self.windows:
            if now < end:
                return name
        return self.windows[-1][0]

    def window(self, phase: str) -> tuple[float, float]:
        """Begin and end. A phase that is not part of the run never comes."""
        for name, begin, end in self.windows:
            if name == phase:
                return begin, end
        return math.inf, math.inf

    @property
    def close(self) -> float:
        """From here on nobody sends."""
        return self.windows[-1][1]

    def requests(self) -> dict[str, int]:
        """By phase: how many the schedules of steady and bursty devices hold."""
        fleets, found = self._plan.fleets, {}
        for name, seconds in self._plan.phases:
            if name != "close":
                kinds: tuple[Kind, ...] = ("steady", "bursty") if name == "burst" else ("steady",)
                rate = sum(fleets[kind].requests_per_second for kind in kinds if kind in fleets)
                found[name] = round(seconds * rate)
        return found
