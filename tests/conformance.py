"""What the two front doors have in common, and the one table of what they have not.

tests/test_http.py, test_acks.py and test_batches.py run against both doors. Where Robyn differs
there is a row here: what Granian's door does, what Robyn's does instead, and why. The tests hold
each row in both directions: Robyn does what stands here, and it does not do what Granian does, so a
row that is not needed any more fails.

python -m tests.conformance prints the table that stands in docs/front-doors.md."""

from typing import NamedTuple

import pytest

DOORS = ("granian", "robyn")
CLOSE = 0


class Row(NamedTuple):
    """A case of test_http's tables in which Robyn differs."""

    granian: str
    robyn: str
    why: str
    statuses: frozenset[int]
    """Of Robyn; CLOSE: no answer."""
    code: str | None = None
    ends_worker: bool = False
    accepts: bool = False
    """An event comes into the log."""


class Behaviour(NamedTuple):
    """A test that does not hold for Robyn."""

    granian: str
    robyn: str
    why: str
    instead: str
    """The test of tests/test_robyn.py, or the case, that holds what Robyn does."""


_NO_CLOSE = "the server takes `Connection` out of an answer, and a handler has no connection"
_NO_CHUNK = "Robyn panics on a body that cannot be read, and is built to abort then"
_NOT_ASCII = "Robyn does not show a header whose value is not visible ASCII"
_SLASH = "Robyn takes the last slash from a path"
_METHOD = "Robyn routes nine methods and answers others itself"


def _stays(status: int, code: str, why: str = _NO_CLOSE) -> Row:
    return Row(f"{status}, close", f"{status}, stays open", why, frozenset({status}), code)


CASES: dict[str, Row] = {
    "no device id": Row("404", "as `/v1/ingest`: 400", _SLASH, frozenset({400})),
    "a trailing slash": Row(
        "404", "202: the path without it", _SLASH, frozenset({202}), accepts=True
    ),
    "a method of its own": Row("405, JSON", "405, text", _METHOD, frozenset({405})),
    "a method in lower case": Row("405, JSON", "405, text", _METHOD, frozenset({405})),
    "no Content-Length": Row(
        "411, close",
        "411; the body is taken for the next request: 400, close",
        _NO_CLOSE,
        frozenset({411}),
        "length_required",
    ),
    "chunked": _stays(411, "length_required"),
    "chunks that are none": Row(
        "411, close",
        "**the worker ends** and is started again",
        _NO_CHUNK,
        frozenset({CLOSE}),
        ends_worker=True,
    ),
    "both lengths": _stays(411, "length_required"),
    "both lengths, chunked first": _stays(411, "length_required"),
    "Host missing": _stays(400, "bad_request"),
    "Host twice": _stays(400, "bad_request"),
    "Host not ASCII": _stays(400, "bad_request"),
    "Host missing on a page": _stays(400, "bad_request"),
    "Content-Encoding not ASCII": Row(
        "415", "202: taken as not encoded", _NOT_ASCII, frozenset({202}), accepts=True
    ),
    "X-Ack not ASCII": Row(
        "400", "202: `http.ack` counts", _NOT_ASCII, frozenset({202}), accepts=True
    ),
    "HTTP/1.0 without Host": Row(
        "202", "400", "Robyn does not show the version", frozenset({400}), "bad_request"
    ),
    "the same Content-Length twice": Row("202", "400, close", "actix refuses it", frozenset({400})),
}

TESTS: dict[str, Behaviour] = {
    "test_smuggled_request_is_not_seen": Behaviour(
        "both lengths: 411, close",
        "411; what follows the chunked body is a request",
        _NO_CLOSE,
        "test_both_lengths_are_refused_and_chunked_wins",
    ),
    "test_too_large_body_is_drained_so_that_the_answer_is_seen": Behaviour(
        "413 at once, then a close",
        "413 when the body is here, stays open",
        "a handler gets the whole body; " + _NO_CLOSE,
        "test_too_large_body_is_refused_when_it_is_here",
    ),
    "test_largest_batch_and_one_byte_more": Behaviour(
        "413, close",
        "413, stays open",
        _NO_CLOSE,
        "test_too_large_body_is_refused_when_it_is_here",
    ),
    "test_sizes_of_what_is_inflated_have_the_limits_of_plain_bodies": Behaviour(
        "413, close",
        "413, stays open",
        _NO_CLOSE,
        "test_too_large_body_is_refused_when_it_is_here",
    ),
    "test_path_of_many_devices_takes_events_only": Behaviour(
        "`/v1/ingest/` is 404", "as `/v1/ingest`", _SLASH, "no device id"
    ),
    "test_strange_receipts_are_unknown_and_not_logged": Behaviour(
        "a receipt that ends in a slash, or is empty, is unknown",
        "without the slash; empty: 404 `not_found`",
        _SLASH,
        "a trailing slash",
    ),
}
"""By test function; a test that is parametrised differs in each of its cases."""
TRAILING = "POST-/v1/ingest/d/-{}-no slash behind it"
"""The one case of `test_message_says_what_to_do` that asks for what `a trailing slash` has not."""

ENDLESS_BYTES_MAX = {"granian": 64 << 20, "robyn": 1 << 30}
"""By door: so much of a body without end is taken at most before it is cut, on loopback."""

LISTED: tuple[tuple[str, str, str, str], ...] = (
    (
        "body without end",
        "cut at once",
        "cut when the guard looks, at least every 0.1 s: some 10 to 100 MB later, on loopback",
        "Robyn has no limit of a body; `ROBYN_MAX_PAYLOAD_SIZE` changes nothing in 0.88",
    ),
    (
        "Content-Length above the limit, body deadline",
        "answered from the head; 408 at the deadline",
        "413 when the body is here or was cut; 408 at the deadline or 0.2 s later",
        "a handler gets the whole request",
    ),
    (
        "body deadline while others wait for `durable` or `sink`",
        "the same",
        "longer by the deadline of those",
        "from outside, a body that stalls and an answer that is awaited look alike",
    ),
    (
        "`multipart/form-data`",
        "415",
        "415; 500 without a body of ours when it is no multipart",
        "Robyn takes it apart before the handler",
    ),
    ("`CONNECT`", "404 or 405", "405, or a close after the deadline", "actix waits for a tunnel"),
    (
        "`Upgrade: websocket` on an event",
        "a normal request",
        "accepted; the answer comes when the client ends",
        "actix takes the rest for an upgraded stream",
    ),
    (
        "retired worker (SIGHUP)",
        "each answer closes its connection",
        "idle connections are ended from outside: a request that crosses it sees a close",
        _NO_CLOSE,
    ),
    ("head", "64 KiB always, twice as much never", "128 KiB; 96 headers", "actix"),
    (
        "time for a head; idle keep-alive",
        "60 s",
        "the body deadline; 60 s",
        "the guard cannot tell a head from a body",
    ),
)
"""What is no case of a table: shown by tests of tests/test_robyn.py, or by nothing but its text."""


def expect_difference(request: pytest.FixtureRequest) -> None:
    """A test that stands in `TESTS` must fail at the second door."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if "robyn" in (parameters.get("gateway"), parameters.get("site")) and (
        request.function.__name__ in TESTS or request.node.callspec.id.endswith(TRAILING)
    ):
        request.applymarker(pytest.mark.xfail(raises=(AssertionError, KeyError)))


def markdown() -> str:
    """The table, as it stands in the document."""
    lines = ["| case | Granian | Robyn | why |", "|---|---|---|---|"]
    rows = [(f"`{name}`", row.granian, row.robyn, row.why) for name, row in CASES.items()]
    rows += [
        (name.removeprefix("test_").replace("_", " "), row.granian, row.robyn, row.why)
        for name, row in TESTS.items()
    ]
    lines += [f"| {' | '.join(row)} |" for row in [*rows, *LISTED]]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
