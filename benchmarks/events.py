"""Which events are sent? Several shapes, each event with its own values and a new seq.

`reference` is the event of docs/performance.md, and the one that the gates speak of; the others are
reported beside it.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final, NamedTuple

SITES: Final = ("AAL", "CPH", "Ørsted", "SEA", "SFO", "München", "lab-3")


def _dump(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()


def _ts(random: Random) -> str:
    return (
        f"2025-{random.randint(1, 12):02}-{random.randint(1, 28):02}"
        f"T{random.randint(0, 23):02}:{random.randint(0, 59):02}:{random.randint(0, 59):02}Z"
    )


def _number(random: Random) -> float:
    return random.choice(
        (round(random.uniform(-40, 120), 2), random.randint(0, 5000), random.random())
    )


def tiny(random: Random, seq: int) -> bytes:
    """About 40 bytes."""
    return _dump({"metrics": {"t": round(random.uniform(10, 40), 2)}, "seq": seq})


def reference(random: Random, seq: int) -> bytes:
    """The event of docs/performance.md: about 142 bytes and the digits of seq."""
    metrics = {
        "temp_c": round(random.uniform(10, 40), 1),
        "hum": round(random.uniform(10, 90), 2),
        "rpm": random.randint(1000, 9999),
    }
    tags = {"site": random.choice(("AAL", "CPH", "SEA", "SFO")), "line": str(random.randint(1, 9))}
    payload = {"raw": random.choice(("ok", "up", "hi", "lo"))}
    return _dump(
        {"ts": _ts(random), "seq": seq, "metrics": metrics, "tags": tags, "payload": payload}
    )


def _filled(random: Random, seq: int, size: int) -> bytes:
    """Metrics, tags, and a payload of samples and text, escapes and letters beyond ASCII among
    it.
    """
    samples: list[dict[str, Any]] = []
    event = {
        "ts": _ts(random),
        "seq": seq,
        "metrics": {f"channel_{i}": _number(random) for i in range(8)},
        "tags": {"site": random.choice(SITES), "line": str(random.randint(1, 99)), "fw": "2.14.3"},
        "payload": {"samples": samples, "comment": 'said "öl läuft"\n', "ok": True, "next": None},
    }
    length = len(_dump(event))
    while length < size - 30:
        t, v = random.randint(0, 86_400_000), _number(random)
        samples.append({"t": t, "v": v, "q": random.choice(("good", "bad", "fällt aus"))})
        length += len(_dump(samples[-1])) + 1
    return _dump(event)


def kib1(random: Random, seq: int) -> bytes:
    """About 1 KB."""
    return _filled(random, seq, 1024)


def kib8(random: Random, seq: int) -> bytes:
    """About 8 KB."""
    return _filled(random, seq, 8192)


def metrics32(random: Random, seq: int) -> bytes:
    """As many metrics as are allowed."""
    metrics = {f"sensor_{i:02}": _number(random) for i in range(32)}
    return _dump({"ts": _ts(random), "seq": seq, "metrics": metrics})


def deep(random: Random, seq: int) -> bytes:
    """A payload as deep as is allowed."""
    payload: Any = random.randint(0, 9999)
    for level in range(32):
        payload = [payload, level] if random.random() < 0.5 else {f"level_{level}": payload}
    return _dump({"seq": seq, "metrics": {"t": _number(random)}, "payload": payload})


Shape = Callable[[Random, int], bytes]

SHAPES: Final[dict[str, Shape]] = {
    "": reference,
    "40b": tiny,
    "1kb": kib1,
    "8kb": kib8,
    "32_metrics": metrics32,
    "deep": deep,
}
"""By the suffix of a row's name; the gates speak of the first one."""


def bodies(shape: Shape, count: int, seed: int = 1, first_seq: int = 1_000_000) -> list[bytes]:
    """`count` events of a shape, each with its own seq and values."""
    random = Random(seed)
    return [shape(random, first_seq + number) for number in range(count)]


SEQ_DIGITS: Final = 10


class Template(NamedTuple):
    """An event around a seq of SEQ_DIGITS digits."""

    before: bytes
    after: bytes

    @property
    def size(self) -> int:
        """Of the whole event."""
        return len(self.before) + SEQ_DIGITS + len(self.after)


def templates(shape: Shape, count: int, seed: int = 2) -> list[Template]:
    """`count` events whose seq is yet to be filled in."""
    random, seq = Random(seed), int("9" * SEQ_DIGITS)
    found = []
    for _ in range(count):
        before, after = shape(random, seq).split(b'"seq":%d' % seq)
        found.append(Template(before + b'"seq":', after))
    return found


def stream(shape: Shape, variety: int = 4096) -> Iterator[bytes]:
    """Events without end: `variety` different ones in turn, and none with the seq of another."""
    different = templates(shape, variety)
    for number in itertools.count():
        template = different[number % variety]
        yield b"%s%d%s" % (template.before, 10 ** (SEQ_DIGITS - 1) + number, template.after)


def device(number: int) -> str:
    """One of the fleet's device ids."""
    return f"dev-{number:04}"
