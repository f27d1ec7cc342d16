"""The settings of the broker and of how events are published to it: `[mqtt]`.

A part of `gateway.settings`, which makes the table of all settings; the same rules hold here.
"""

import os
import re
import stat
from typing import Annotated, Final, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from gateway.errors import ConfigError

PASSWORD_FILE_FORBIDDEN_MODE: Final = 0o077


class Broker(NamedTuple):
    """What `mqtt.url` names."""

    host: str
    port: int
    tls: bool
    embedded: bool


def parse_url(url: str, embedded_port: int) -> Broker:
    """Take `mqtt.url` apart. Raises ValueError with what is wrong."""
    if url == "embedded":
        return Broker("127.0.0.1", embedded_port, False, True)
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("mqtt", "mqtts"):
        raise ValueError("write mqtt://HOST[:PORT], mqtts://HOST[:PORT] or embedded")
    if "@" in rest:
        raise ValueError("no user in the URL; use mqtt.username and mqtt.password_file")
    parts = urlsplit("//" + rest.removesuffix("/"))
    if parts.path or parts.query or parts.fragment or "?" in rest or "#" in rest:
        raise ValueError("nothing may follow the host and port")
    host = parts.hostname
    if not host or not re.fullmatch(r"[A-Za-z0-9._:%-]+", host):
        raise ValueError("the host is missing or not a name or address")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port is None and parts.netloc.endswith(":"):
        port = 0
    if port is None:
        port = 8883 if scheme == "mqtts" else 1883
    if not 1 <= port <= 65535:
        raise ValueError("the port must be from 1 to 65535")
    return Broker(host, port, scheme == "mqtts", False)


class MqttConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The broker and how events are published to it."""

    url: Annotated[
        str | None,
        Meta(
            description="mqtt://HOST[:1883], mqtts://HOST[:8883], or embedded: a broker inside the"
            " gateway, for development only. The broker must speak MQTT 5."
        ),
    ] = None
    required: Annotated[
        bool,
        Meta(
            description="true: the log keeps an event until the broker has it, and ack=sink waits"
            " for it. false: when the log fills, what is not published yet is skipped, and counted."
            " At least one sink must be required."
        ),
    ] = True
    embedded_port: Annotated[
        int, Meta(ge=1, le=65535, description="Port of the embedded broker on 127.0.0.1.")
    ] = 1883
    topic: Annotated[
        str,
        Meta(
            description="Topic of each message; {device_id} is replaced. No wildcards, no leading"
            " $, at most 65535 bytes (the limit of MQTT) when filled."
        ),
    ] = "telemetry/{device_id}"
    client_id: Annotated[
        str | None,
        Meta(
            description="MQTT client id, 1 to 128 bytes (the limit of AWS IoT Core); unset:"
            " gateway-<log identity>, stable across restarts and unique to a log."
        ),
    ] = None
    username: Annotated[str | None, Meta(description="User name for the broker.")] = None
    password: Annotated[
        str | None,
        Meta(
            description="Password for the broker; better in password_file.", extra={"secret": True}
        ),
    ] = None
    password_file: Annotated[
        str | None,
        Meta(
            description="File with the password, one line end at its end is not part of it;"
            " refused when group or others can read it. Read again at each connection."
        ),
    ] = None
    ca_file: Annotated[
        str | None,
        Meta(description="PEM file of authorities to trust (mqtts); unset: those of the system."),
    ] = None
    cert_file: Annotated[str | None, Meta(description="PEM client certificate (mqtts).")] = None
    key_file: Annotated[
        str | None,
        Meta(description="PEM key of cert_file; refused when everyone can read it."),
    ] = None
    alpn: Annotated[
        str | None,
        Meta(description="ALPN protocol to offer (mqtts), for brokers that share port 443."),
    ] = None
    server_name: Annotated[
        str | None,
        Meta(description="Name for SNI and certificate check (mqtts); unset: the host of url."),
    ] = None
    poison_attempts: Annotated[
        int,
        Meta(
            ge=1,
            le=100,
            description="An event that was alone in flight when the broker closed the connection so"
            " many times is dead-lettered.",
        ),
    ] = 3
    inflight_max: Annotated[
        int,
        Meta(
            ge=1,
            le=65535,
            description="Messages sent and not yet acknowledged; MQTT has 65535 packet ids. The"
            " broker's Receive Maximum also holds.",
        ),
    ] = 1000
    connections: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="Connections that share the load, each device on one of them, for brokers"
            " that limit a connection. More than one: their client ids are <client id>-0, -1 ...",
        ),
    ] = 1
    publishes_per_second_max: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="Messages a second on a connection, 0: no limit. A tenth of a second's"
            " worth may go at once, nothing is saved up beyond that.",
        ),
    ] = 0
    bytes_per_second_max: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 40,
            description="Bytes of messages a second on a connection, 0: no limit. A tenth of a"
            " second's worth and one message may go at once.",
        ),
    ] = 0
    mode: Annotated[
        Literal["event", "packed"],
        Meta(
            description="event: one message an event, the event as it was sent. packed: many events"
            " of one topic in one message, each with its device_id and lsn."
        ),
    ] = "event"
    pack_bytes_max: Annotated[
        int,
        Meta(
            ge=1024,
            le=1 << 20,
            description="Most bytes of events in a packed message; an event that is larger goes"
            " alone. The broker's Maximum Packet Size also holds.",
        ),
    ] = 65536
    pack_linger_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=5000,
            description="Longest time that an event waits for others to share its message.",
        ),
    ] = 20
    pack_format: Annotated[
        Literal["ndjson", "array"],
        Meta(description="Payload of a packed message: an event a line, or a JSON array."),
    ] = "ndjson"
    pack_compression: Annotated[
        Literal["none", "zstd"],
        Meta(
            description="Compression of packed messages; the content type says so (+zstd)."
            " pack_bytes_max counts bytes before it."
        ),
    ] = "none"
    keep_alive_s: Annotated[
        int,
        Meta(
            ge=1,
            le=65535,
            description="MQTT keep-alive; a dead connection is found within 1.5 times this. 0"
            " would never find it.",
        ),
    ] = 30
    puback_timeout_ms: Annotated[
        int,
        Meta(
            ge=100,
            le=3_600_000,
            description="Longest wait for an acknowledgement; then the connection is dropped and"
            " events are published again.",
        ),
    ] = 10_000
    connect_timeout_ms: Annotated[
        int,
        Meta(
            ge=100,
            le=600_000,
            description="Time for TCP, TLS and CONNACK together; a broker that takes longer is"
            " treated as away.",
        ),
    ] = 10_000
    backoff_base_ms: Annotated[
        int,
        Meta(
            ge=10,
            le=600_000,
            description="Upper bound of the first random wait before a reconnect; doubles up to"
            " backoff_max_ms.",
        ),
    ] = 200
    backoff_max_ms: Annotated[
        int,
        Meta(
            ge=10,
            le=3_600_000,
            description="Largest upper bound of that wait: how late a broker's return may be"
            " noticed.",
        ),
    ] = 30_000

    @property
    def broker(self) -> Broker | None:
        """`url` taken apart; None when there is none."""
        return None if self.url is None else parse_url(self.url, self.embedded_port)

    def read_password(self) -> bytes | None:
        """The password from `password` or `password_file`. Raises ConfigError when the file cannot
        be used.
        """
        if self.password_file is None:
            return None if self.password is None else self.password.encode()
        try:
            with open(self.password_file, "rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if mode & PASSWORD_FILE_FORBIDDEN_MODE:
                    raise ConfigError(
                        f"mqtt.password_file: {self.password_file} has mode {mode:04o}, so others"
                        f" can read it; chmod 600 {self.password_file}"
                    )
                data = file.read(65536)
        except OSError as error:
            raise ConfigError(
                f"mqtt.password_file: {self.password_file}: {error.strerror}"
            ) from None
        return data.removesuffix(b"\n").removesuffix(b"\r")
