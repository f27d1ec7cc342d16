"""The settings themselves: frozen, typed structs, and a table made from them.

The structs are the only list of settings. Each field carries its type, default, range and reason;
the checks of `gateway.config`, `gateway.example.toml` and `gateway config` are made from them.
Units stand last in a name: `_ms` milliseconds, `_s` seconds, `_bytes` bytes.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta, inspect

from gateway.mqtt_settings import MqttConfig

MQTT: Final = "mqtt"
FILE: Final = "file"
SINKS: Final = (MQTT, FILE)
"""Names of the sinks, of their cursors in the log, and of the sections of their settings."""
PLACES: Final = {MQTT: "mqtt.url", FILE: "file.directory"}
"""The setting that makes each of them one of this gateway's."""
MIB: Final = 1 << 20
RECORD_OVERHEAD_BYTES: Final = 192
"""The most that a record adds to a body: header 64, device id 64, padding, and what a later
version may add.
"""

_HTTP_BODY_MAX: Final = MIB - RECORD_OVERHEAD_BYTES


class HttpConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The front door."""

    host: Annotated[
        str,
        Meta(
            description="Address to listen on. There is no authentication in this version, so an"
            " address that is not loopback is refused unless auth.allow_anonymous = true."
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535, description="TCP port to listen on.")] = 8000
    workers: Annotated[
        int,
        Meta(
            ge=1,
            le=32,
            description="Worker processes. One saturates about one core; the counters in shared"
            " memory have room for 32.",
            extra={"default": "the cores this process may use, at most 4"},
        ),
    ] = min(4, len(os.sched_getaffinity(0)))
    pin_workers: Annotated[
        bool,
        Meta(
            description="Keep each worker on one core, worker after worker. For machines with more"
            " cores than workers use; on a small one a worker's two busy threads want two cores."
        ),
    ] = False
    server: Annotated[
        Literal["granian", "robyn"],
        Meta(
            description="HTTP server. robyn is the second door: slower, with weaker limits, and an"
            " extra to install (docs/front-doors.md)."
        ),
    ] = "granian"
    body_bytes_max: Annotated[
        int,
        Meta(
            ge=64,
            le=_HTTP_BODY_MAX,
            description="Largest event, also in a batch; a larger one is refused. An event is"
            " small, and an MQTT message of it must fit a broker. It must also fit a record of the"
            " log:"
            " min(log.capacity_bytes / 8, 1 MiB) - 192.",
        ),
    ] = 65536
    batch_bytes_max: Annotated[
        int,
        Meta(
            ge=64,
            le=64 * MIB,
            description="Largest body of a batch, also once it is not compressed any more; a larger"
            " one is 413. One thread a worker takes them: the largest should cost it some"
            " milliseconds. Not below http.body_bytes_max.",
        ),
    ] = MIB
    batch_events_max: Annotated[
        int,
        Meta(ge=1, le=1_000_000, description="Most events of a batch; more of them are 413."),
    ] = 10_000
    batches_bytes_max: Annotated[
        int,
        Meta(
            ge=MIB,
            le=1 << 40,
            description="Bytes a worker may hold for batches: what bodies above http.body_bytes_max"
            " announce while they arrive, and answers that wait for their acknowledgement. Beyond"
            " it batches are 503 overloaded, single events never. Not below http.batch_bytes_max.",
        ),
    ] = 64 * MIB
    inflate_ratio_max: Annotated[
        int,
        Meta(
            ge=1,
            le=100_000,
            description="A compressed body may become so many times larger, once it is above"
            " 64 KiB; beyond it 413. Events that are alike seldom reach 40.",
        ),
    ] = 100
    body_deadline_ms: Annotated[
        int,
        Meta(
            ge=10,
            le=600_000,
            description="Time for a body to arrive whole; then 408. Bounds what slow senders can"
            " hold.",
        ),
    ] = 5000
    drain_deadline_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=600_000,
            description="Time to answer what is in flight and to publish after SIGTERM. Below the"
            " usual 30 s after which an orchestrator kills.",
        ),
    ] = 10_000
    ack: Annotated[
        Literal["enqueue", "durable", "sink"],
        Meta(
            description="What an accepted event is told when it does not ask: enqueue, committed in"
            " the log; durable, on the disk; sink, confirmed by every required sink. ?ack= and"
            " X-Ack win."
        ),
    ] = "enqueue"
    durable_deadline_ms: Annotated[
        int,
        Meta(
            ge=10,
            le=600_000,
            description="The longest wait for ack=durable; then 504 accepted_pending.",
        ),
    ] = 5000
    sink_deadline_ms: Annotated[
        int,
        Meta(
            ge=10,
            le=600_000,
            description="The longest wait for ack=sink; then 504 accepted_pending.",
        ),
    ] = 10_000


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The log on disk, and the lines on standard error."""

    directory: Annotated[
        str,
        Meta(
            description="Folder of the log, made with mode 0700; relative to where the gateway is"
            " started. One gateway a folder."
        ),
    ] = "./data"
    capacity_bytes: Annotated[
        int,
        Meta(
            ge=MIB,
            le=1 << 40,
            description="Size of the log, a power of two, allocated at once. It holds what a"
            " required sink has not confirmed: rate x event size x longest outage. Fixed once the"
            " log exists; `gateway log resize` changes it.",
        ),
    ] = 256 * MIB
    commit_interval_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=60_000,
            description="Time between two fdatasync while anything changes: the most that a power"
            " cut may take from events acknowledged with enqueue.",
        ),
    ] = 200
    high_water: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="Share of log.capacity_bytes in use above which events are refused with"
            " 503 ...",
        ),
    ] = 0.95
    low_water: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="... until no more than this share is in use: 503 comes and goes in"
            " stretches, not with each event. Not above log.high_water.",
        ),
    ] = 0.90
    forget_sink: Annotated[
        str | None,
        Meta(
            description="mqtt or file: give up what the log still holds for that sink, which is not"
            " configured any more. Without it such a start is refused while events wait for it."
        ),
    ] = None
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="Least severity of the lines on standard error."),
    ] = "info"

    @property
    def path(self) -> Path:
        """The log file. Absolute: a message about it must not need the working directory."""
        return Path(self.directory).absolute() / "gateway.log"

    @property
    def record_bytes_max(self) -> int:
        """Largest record in bytes."""
        return min(self.capacity_bytes // 8, MIB)


class FileConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Events written to files: one JSON object a line, beside the broker or without one."""

    directory: Annotated[
        str | None,
        Meta(
            description="Folder of the files, made with mode 0700; relative to where the gateway is"
            " started. Unset: no files."
        ),
    ] = None
    required: Annotated[
        bool,
        Meta(
            description="true: the log keeps an event until it is in a file, and ack=sink waits for"
            " it. false: when the log fills, what is not in a file yet is skipped, and counted. At"
            " least one sink must be required."
        ),
    ] = True
    file_bytes_max: Annotated[
        int,
        Meta(
            ge=64 * 1024,
            le=1 << 40,
            description="Bytes of lines, before compression, at which a file is finished and the"
            " next one begun.",
        ),
    ] = 128 * MIB
    file_age_max_s: Annotated[
        int,
        Meta(
            ge=1,
            le=366 * 86_400,
            description="Age at which a file is finished, however small it is: how long until its"
            " lines can be taken away.",
        ),
    ] = 3600
    files_max: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="Finished files that are kept: beyond them the oldest ones are removed, and"
            " counted. 0 keeps all.",
        ),
    ] = 0
    compression: Annotated[
        Literal["none", "zstd"],
        Meta(description="Compression of the files; zstd: their names end in .ndjson.zst."),
    ] = "none"
    sync_interval_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=60_000,
            description="Longest time that lines are gathered before they are synced to the disk;"
            " 1 MiB of them, or somebody who waits with ack=sink, ends it at once.",
        ),
    ] = 200


class DeadLettersConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Events that the broker refuses for good: kept in files beside the log, never thrown away in
    silence."""

    file_bytes_max: Annotated[
        int,
        Meta(
            ge=64 * 1024,
            le=1 << 40,
            description="Size at which a file of dead letters is closed and the next one begun.",
        ),
    ] = 16 * MIB
    files_max: Annotated[
        int,
        Meta(ge=1, le=1000, description="Number of files, the one that is written included."),
    ] = 8
    when_full: Annotated[
        Literal["hold", "drop_oldest"],
        Meta(
            description="When all files are full: hold stops publishing, with an alarm, until"
            " `gateway dead-letters` makes room; drop_oldest removes the oldest file, counted."
        ),
    ] = "hold"


class AuthConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may send."""

    allow_anonymous: Annotated[
        bool,
        Meta(
            description="Accept events from anyone who reaches http.host even when it is not"
            " loopback. There is no authentication in this version."
        ),
    ] = False


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that can be set. `Config()` has the defaults; `load` makes one that is checked."""

    http: HttpConfig = HttpConfig()
    log: LogConfig = LogConfig()
    mqtt: MqttConfig = MqttConfig()
    dead_letters: DeadLettersConfig = DeadLettersConfig()
    file: FileConfig = FileConfig()
    auth: AuthConfig = AuthConfig()

    @property
    def sinks(self) -> tuple[str, ...]:
        """Names of the sinks that are configured; each is the name of a cursor in the log."""
        places = self.mqtt.url, self.file.directory
        return tuple(name for name, place in zip(SINKS, places, strict=True) if place is not None)

    @property
    def required(self) -> tuple[bool, ...]:
        """Of each of `sinks`: whether the log waits for it."""
        return tuple(getattr(self, name).required for name in self.sinks)


class Setting(NamedTuple):
    """One row of the table of settings, made from a field of the structs above."""

    section: str
    name: str
    doc: str
    default: Any
    default_text: str | None
    """Said in the place of a default that depends on the machine."""
    kind: Literal["int", "number", "bool", "text"]
    optional: bool
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    secret: bool
    field: Any
    """The msgspec type, for strict conversion."""

    @property
    def key(self) -> str:
        """`section.name`."""
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"GATEWAY_{self.section}_{self.name}".upper()

    @property
    def expected(self) -> str:
        """What a value must be, for people."""
        if self.choices:
            return " or ".join(self.choices)
        if self.kind == "bool":
            return "true or false"
        if self.kind == "text":
            return "text"
        if self.kind == "number":
            return f"a number above {self.low:g}, at most {self.high:g}"
        size = ', or text such as "256 MiB"' if "_bytes" in self.name else ""
        return f"an integer from {self.low} to {self.high}{size}"


def _settings() -> Iterator[Setting]:
    for section in msgspec.structs.fields(Config):
        fields = inspect.type_info(section.type)
        assert isinstance(fields, inspect.StructType)
        for plain, field in zip(msgspec.structs.fields(section.type), fields.fields, strict=True):
            meta = field.type
            assert isinstance(meta, inspect.Metadata)
            assert meta.extra_json_schema
            kind = meta.type
            optional = isinstance(kind, inspect.UnionType)
            yield Setting(
                section=section.name,
                name=field.name,
                doc=meta.extra_json_schema["description"],
                default=field.default,
                default_text=(meta.extra or {}).get("default"),
                kind="int"
                if isinstance(kind, inspect.IntType)
                else "number"
                if isinstance(kind, inspect.FloatType)
                else "bool"
                if isinstance(kind, inspect.BoolType)
                else "text",
                optional=optional,
                choices=tuple(map(str, get_args(get_args(plain.type)[0])))
                if isinstance(kind, inspect.LiteralType)
                else (),
                low=kind.ge
                if isinstance(kind, inspect.IntType)
                else kind.gt
                if isinstance(kind, inspect.FloatType)
                else None,
                high=kind.le if isinstance(kind, inspect.IntType | inspect.FloatType) else None,
                secret=bool((meta.extra or {}).get("secret")),
                field=plain.type,
            )


SETTINGS: Final[dict[str, Setting]] = {setting.key: setting for setting in _settings()}
"""All settings by `section.name`, in order."""

SECTIONS: Final[dict[str, str]] = {
    section.name: section.type.__doc__ for section in msgspec.structs.fields(Config)
}
"""What each section is about."""
