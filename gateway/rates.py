"""How fast a connection may publish: token buckets, for brokers that limit a connection.

    tokens ──┐ rate a second, at most `burst` of them
             ▼
          [ bucket ] ── publish only while it holds something ──▶ spend what was sent

Over any t seconds at most rate × t + burst tokens are spent, and the one message that emptied the
bucket: a message is never cut, so it may leave the bucket in debt, which is paid back before the
next. A bucket starts empty, and is emptied when its connection is made again: a restart or a
reconnect gains nothing. Nothing polls: `Limits.wait_s` says when to look again.
"""

import math
from typing import Final, Self

from gateway.mqtt import MqttSettings

BURST_S: Final = 0.1
"""What is saved up at most, in seconds of the rate. Brokers count by the second, some by that of
their own clock: a whole second's worth at once could be twice what they allow."""

STEP_S: Final = 0.005
"""A wait is for so many seconds of the rate: a timer a message would cost more than the message."""

PACKETS_MAX: Final = 0xFFFFFFFF


class Bucket:
    """Tokens that come back at `rate` a second. Times are CLOCK_MONOTONIC seconds."""

    def __init__(self, rate: float, now_s: float) -> None:
        self._rate = rate
        self._burst = max(1.0, rate * BURST_S)
        self._step = max(1.0, rate * STEP_S)
        self._tokens, self._at_s = 0.0, now_s

    def tokens(self, now_s: float) -> int:
        """What may be spent now."""
        if now_s > self._at_s:
            self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rate)
            self._at_s = now_s
        return max(0, math.floor(self._tokens + 1e-6))  # 1e-6: ten tenths are one

    def spend(self, count: int) -> None:
        """May lead into debt."""
        self._tokens -= count

    def wait_s(self) -> float:
        """Seconds from the last `tokens` until it is worth to look again."""
        return max(0.0, (self._step - self._tokens) / self._rate)

    def empty(self, now_s: float) -> None:
        """Nothing is saved; what is owed stays owed."""
        self.tokens(now_s)
        self._tokens = min(self._tokens, 0.0)


class Limits:
    """The buckets of one connection: messages and bytes."""

    def __init__(self, publishes_per_s: float, bytes_per_s: float, now_s: float) -> None:
        """0: no limit."""
        self._packets = Bucket(publishes_per_s, now_s) if publishes_per_s else None
        self._bytes = Bucket(bytes_per_s, now_s) if bytes_per_s else None

    @classmethod
    def of(cls, settings: MqttSettings, now_s: float) -> Self | None:
        """None: there are none."""
        rates = settings.publishes_per_second_max, settings.bytes_per_second_max
        return cls(*rates, now_s) if any(rates) else None

    def allow(self, now_s: float) -> tuple[int, int]:
        """Messages, and bytes after which no further one may follow; one of them 0: wait."""
        return (
            PACKETS_MAX if self._packets is None else self._packets.tokens(now_s),
            PACKETS_MAX if self._bytes is None else min(PACKETS_MAX, self._bytes.tokens(now_s)),
        )

    def spend(self, packets: int, size_bytes: int) -> None:
        """What was sent."""
        if self._packets is not None:
            self._packets.spend(packets)
        if self._bytes is not None:
            self._bytes.spend(size_bytes)

    def wait_s(self) -> float:
        """Seconds from the last `allow` until it is worth to look again."""
        return max(bucket.wait_s() for bucket in (self._packets, self._bytes) if bucket is not None)

    def empty(self, now_s: float) -> None:
        """A new connection: what the last one saved up is not its own."""
        for bucket in (self._packets, self._bytes):
            if bucket is not None:
                bucket.empty(now_s)
