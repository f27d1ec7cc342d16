"""The compiled reader of sinks that write lines: see `_native/gw_lines.h`.

A line is `{"device_id":"...","received_at":"<RFC 3339, UTC, ns>","lsn":<integer>,"event":<body>}` and a line end; the
body is as it was sent, but that line ends between its tokens are spaces.
"""

from gateway._log import Lapped as Lapped
from gateway._log import Log

class Lines:
    """Reads the log for one sink, whose cursor nobody else moves. One thread."""

    lsn: int
    """The next record to read; at first the sink's cursor."""
    ordinal: int
    """Events below `lsn` since the log was made."""
    events: int
    """In the last run."""

    def __init__(self, log: Log, sink: int, bytes_max: int = ..., durable: bool = True) -> None:
        """`bytes_max`: of a run; one line alone may be longer. `durable`: read only below `Log.durable`, so that an lsn
        that was written never means another event after a power cut. Raises IndexError, ValueError."""

    def fill(self) -> memoryview | None:
        """The next run of whole lines, valid until the next call; None: nothing new. The GIL is released.

        Raises LogCorrupt (a damaged record: `lsn`), and Lapped for a sink that is not required and whose place was
        written over: nothing was read then; `confirm` what is safe, `Log.skip`, `seek` to the cursor.
        """

    def seek(self, lsn: int) -> None:
        """Go on at `lsn`, at or above the cursor: what lies between counts as filled. Raises ValueError when no record
        starts there, LogCorrupt, Lapped."""

    def confirm(self) -> None:
        """Everything filled so far is safe in the sink: its cursor and its books move."""
