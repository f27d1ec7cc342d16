"""What can go wrong, in two lists: exceptions for surprises, refusals for verdicts.

Exceptions (each carries what it is about and says what to do next):

    Exception
    ├── GatewayError                    base of what the Python side raises on purpose
    │   ├── ConfigError                 a setting is wrong: says which, and where it came from
    │   ├── PortBusy                    another program listens there: names the setting to change
    │   └── NoLog                       no log file where one should be read
    └── gateway._log.LogError           raised by compiled code: path, lsn, errno where known
        ├── LogLocked                   is another gateway running on this directory?
        ├── LogCorrupt                  damage below the durable watermark
        └── NotALog                     the identity page is not one of ours

Refusals are not exceptions: compiled code and the door return a number, and `REFUSALS` turns it
into an HTTP status and a body. The names are part of the HTTP contract and never change; their
order is that of `_native/gw_codes.h`, where number 0 means accepted.

What a status promises: 4xx and 503 mean "not in the log"; 500 and 504 mean "unknown: send it again
with the same seq". So a door that finds the log FAILED *after* its commit answers `internal` (500),
not `failed` (503).
"""

import enum
from typing import ClassVar, Final, NamedTuple

import msgspec


class Exit(enum.IntEnum):
    """Exit codes of the command line and of every process; `gateway --help` shows them."""

    OK = 0
    ERROR = 1
    """Unexpected."""
    USAGE = 2
    """Wrong arguments or settings."""
    PORT_BUSY = 3
    LOCKED = 4
    """Another gateway runs on this log directory."""
    LOG_FAILED = 5
    """A write error: final for this run. Recovery decides what is on the disk."""
    LOG_UNUSABLE = 6
    """The log cannot be opened: none there, not a log, no room to copy a damaged one aside ..."""
    ORPHANED = 7
    """A child whose supervisor was gone before it began."""
    DAMAGED = 8
    """`log verify` found damage below the durable watermark; `log resize` refuses to copy it."""
    UNREACHABLE = 9
    """`demo` could not reach a gateway, `log replay` or `dead-letters requeue` no broker."""
    REFUSED = 10
    """`demo`, `log replay` or `dead-letters requeue` had events refused."""
    INTERRUPTED = 130


class GatewayError(Exception):
    """Base of what the gateway raises on purpose; `str()` is fit to be shown to a user."""

    exit_code: ClassVar[Exit] = Exit.ERROR


class ConfigError(GatewayError):
    """One or more settings are wrong. `problems` has a line for each."""

    exit_code = Exit.USAGE

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class PortBusy(GatewayError):
    """`host:port` is taken; `setting` is the key to change."""

    exit_code = Exit.PORT_BUSY

    def __init__(self, host: str, port: int, setting: str) -> None:
        super().__init__(
            f"{host}:{port} is in use by another program; change {setting}"
            f" (for example --set {setting}={port + 1 if port < 65535 else port - 1})"
        )
        self.host, self.port, self.setting = host, port, setting


class NoLog(GatewayError):
    """There is no log at `path`."""

    exit_code = Exit.LOG_UNUSABLE

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path}: no log there; name its folder with --set log.directory=DIR or --config FILE"
        )
        self.path = path


class Refusal(NamedTuple):
    """One reason for which an event is refused."""

    code: str
    """Stable name, as in the body of the answer and in `gateway_events_refused_total{code}`."""
    status: int
    """HTTP status."""
    message: str
    """For people; may change."""

    def body(self, field: str | None = None, message: str | None = None) -> bytes:
        """The body of the answer: `{"code": ..., "message": ..., "field": ...}`; `field` is null
        when there is none.
        """
        return _encode({"code": self.code, "message": message or self.message, "field": field})


_encode: Final = msgspec.json.Encoder().encode

_KEY: Final = "must match ^[a-z][a-z0-9_]{0,31}$"

REFUSALS: Final[tuple[Refusal, ...]] = (
    Refusal("", 202, "accepted"),
    Refusal(
        "malformed_json", 400, "the body is not one strict JSON value in UTF-8 (RFC 8259, RFC 7493)"
    ),
    Refusal("too_many_members", 400, "an event may have at most 1024 object members in all"),
    Refusal("not_an_object", 400, "an event and its metrics must be JSON objects"),
    Refusal(
        "unknown_field",
        400,
        "only metrics, tags, ts, seq, boot and payload may stand at the top, and device_id in an"
        " event that goes to /v1/ingest",
    ),
    Refusal("missing_metrics", 400, "metrics is required; it may be empty"),
    Refusal("too_many_metrics", 400, "metrics must have ≤ 32 keys"),
    Refusal("bad_metric_key", 400, f"a key of metrics {_KEY}"),
    Refusal("bad_metric_value", 400, "a value in metrics must be a finite number"),
    Refusal("too_many_tags", 400, "tags must have ≤ 16 keys"),
    Refusal("bad_tag_key", 400, f"a key of tags {_KEY}"),
    Refusal(
        "bad_tag_value",
        400,
        "tags must be an object whose values are strings of ≤ 128 bytes of UTF-8",
    ),
    Refusal("bad_ts", 400, "ts must be an RFC 3339 date-time with offset and without leap second"),
    Refusal("bad_seq", 400, "seq must be an integer from 0 to 9223372036854775807"),
    Refusal("bad_boot", 400, "boot must be an integer from 0 to 9223372036854775807"),
    Refusal("payload_too_deep", 400, "payload may be nested at most 32 deep"),
    Refusal("duplicate_key", 400, "an object has the same key twice"),
    Refusal(
        "bad_device_id",
        400,
        "the device id, of the path or in each event to /v1/ingest, must match"
        " ^[A-Za-z0-9_-]{1,64}$",
    ),
    Refusal(
        "not_found",
        404,
        "no such path; events go to /v1/ingest/{device_id}, with no slash behind it; /docs has all"
        " paths",
    ),
    Refusal("method_not_allowed", 405, "this path does not have that method; see the header Allow"),
    Refusal("length_required", 411, "send Content-Length and no Transfer-Encoding"),
    Refusal("body_too_large", 413, "the body is larger than http.body_bytes_max"),
    Refusal("body_timeout", 408, "the body did not arrive within http.body_deadline_ms"),
    Refusal(
        "unsupported_media_type",
        415,
        "send Content-Type: application/json or application/x-ndjson (charset UTF-8 or none)",
    ),
    Refusal(
        "unsupported_encoding",
        415,
        "send the body without Content-Encoding, or with one of gzip and zstd",
    ),
    Refusal(
        "ack_not_supported",
        400,
        "nothing is durable here: log.directory is in memory (tmpfs); ask for enqueue or sink",
    ),
    Refusal("unknown_ack", 400, "ack must be enqueue, durable or sink, and one of them"),
    Refusal("seq_conflict", 409, "this device sent another body with the same boot and seq before"),
    Refusal(
        "batch_too_large",
        413,
        "the batch is larger than http.batch_bytes_max or http.batch_events_max",
    ),
    Refusal("unauthorized", 401, "the credential is missing or not valid"),
    Refusal("forbidden", 403, "this credential may not write for this device"),
    Refusal("rate_limited", 429, "this device is over its rate; send again after Retry-After"),
    Refusal(
        "log_full",
        503,
        "the log is full (log.capacity_bytes); not accepted, send again after Retry-After",
    ),
    Refusal("draining", 503, "the gateway is stopping; not accepted, send again after Retry-After"),
    Refusal(
        "failed",
        503,
        "the log has failed and is being recovered; not accepted, send again after Retry-After",
    ),
    Refusal(
        "accepted_pending",
        504,
        "accepted, but not confirmed in time; send it again with the same seq, or ask"
        " /v1/receipts/ with X-Receipt",
    ),
    Refusal(
        "internal",
        500,
        "unexpected error; it is unknown whether the event was accepted: send it again",
    ),
    Refusal("bad_request", 400, "HTTP/1.1 requires exactly one Host header"),
    Refusal("empty_batch", 400, "a batch needs at least one event"),
    Refusal(
        "bad_encoding",
        400,
        "the body is not one whole gzip member or zstd frame, as Content-Encoding says",
    ),
    Refusal(
        "overloaded",
        503,
        "too many large bodies at once (http.batches_bytes_max); not accepted, send again after"
        " Retry-After",
    ),
)
"""All verdicts by number. `REFUSALS[0]` is "accepted"; the rest follow `_native/gw_codes.h`."""

BY_CODE: Final[dict[str, Refusal]] = {refusal.code: refusal for refusal in REFUSALS}
NUMBER: Final[dict[str, int]] = {refusal.code: number for number, refusal in enumerate(REFUSALS)}
"""The number of a code, as `Ingest.refuse` takes it."""
