"""Log lines on standard error: one line a record, and nothing in a line that a terminal would obey.

    2026-11-24T07:49:27.123Z warning worker-0 internal error (3 more like it) | Traceback ... |
    KeyError: 'x'

A message may carry what a device, a broker or a file name said. Control characters (C0, DEL, C1,
U+2028, U+2029, lone surrogates) are written as escapes, the line ends of a traceback as ` | `.
Secrets and bodies are not logged at all; that is the duty of the caller."""

import logging
import re
import sys
import time
from typing import Final

_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` on one line, each control character as an escape."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _OneLine(logging.Formatter):
    """time, level, process, message, traceback: one line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        text = " | ".join(printable(line) for line in text.split("\n") if line.strip())
        return (
            f"{moment}.{int(record.msecs):03d}Z {record.levelname.lower()} {self._process} {text}"
        )


def set_up(level: str, process: str) -> None:
    """Send every record of this process, from `level` on, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.raiseExceptions = False  # a closed standard error is no reason to fail
    logging.captureWarnings(True)


class Seldom:
    """Lets a kind of record through once an interval, so that a fault a request costs no line a
    request."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next = 0.0
        self._held = 0

    def __call__(self) -> int | None:
        """None: hold this one back. Else log it; the number says how many were held back before
        it."""
        now = time.monotonic()
        if now < self._next:
            self._held += 1
            return None
        self._next = now + self._interval_s
        held, self._held = self._held, 0
        return held
