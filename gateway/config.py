"""Configuration: one frozen, typed `Config`, from a file, the environment and the command line.

Later wins:

    default < TOML file (--config, else GATEWAY_CONFIG) < environment GATEWAY_<SECTION>_<KEY>
            < --set section.key=value

Decoding is strict. An unknown key or a value out of range is a `ConfigError` that names the key,
where it came from, what was given and the closest right key. All of them are reported at once; what
does not fit together is looked at when each value is right by itself. A number of bytes may be
written as text with a unit ("256 MiB"). An empty text unsets a setting that may be unset.
"""

import difflib
import ipaddress
import json
import os
import re
import stat
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

import msgspec

from gateway.errors import ConfigError
from gateway.mqtt_settings import PASSWORD_FILE_FORBIDDEN_MODE, Broker, MqttConfig
from gateway.settings import (
    PLACES,
    RECORD_OVERHEAD_BYTES,
    SECTIONS,
    SETTINGS,
    AuthConfig,
    Config,
    FileConfig,
    HttpConfig,
    LogConfig,
    Setting,
)
from gateway.topics import topic_problem

__all__ = [
    "NO_BROKER",
    "NO_SINK",
    "AuthConfig",
    "Broker",
    "Config",
    "ConfigError",
    "FileConfig",
    "HttpConfig",
    "Loaded",
    "LogConfig",
    "MqttConfig",
    "effective",
    "example",
    "load",
    "toml",
]

ROBYN: Final = "robyn>=0.88,<0.89"
"""What the second door needs; an extra of pyproject.toml."""
NO_BROKER: Final = (
    "mqtt.url is not set, and this needs a broker: name one (mqtt://HOST or mqtts://HOST) with"
    " --set mqtt.url=..."
)
NO_SINK: Final = (
    "there is nowhere to deliver events to: name a broker (mqtt.url = mqtt://HOST or mqtts://HOST),"
    " a folder for files (file.directory), or `embedded` for a try-out:"
    " gateway serve --set mqtt.url=embedded"
)

_UNITS: Final = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SERVICE_LINK: Final = re.compile(
    r"GATEWAY_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*"
    r"|GATEWAY_(\w+_)?PORT=(tcp|udp|sctp)://.*",
    re.DOTALL,
)
"""What Kubernetes puts into the environment of every pod beside a service called gateway. Without
its value, GATEWAY_..._PORT could also be a misspelt setting."""


class Loaded(NamedTuple):
    """A checked configuration and where each setting came from."""

    config: Config
    origin: Mapping[str, str]
    """`section.key` → "default", "gateway.toml line 3", "environment GATEWAY_HTTP_PORT", ..."""


class _Given(NamedTuple):
    value: Any
    origin: str


def load(
    path: str | None = None,
    environment: Mapping[str, str] | None = None,
    sets: Sequence[str] = (),
) -> Loaded:
    """Read, merge and check the configuration.

    `path` is the TOML file (None: GATEWAY_CONFIG, else no file), `environment` defaults to
    `os.environ`, `sets` holds "section.key=value" texts. Raises ConfigError.
    """
    environment = os.environ if environment is None else environment
    problems: list[str] = []
    given: dict[str, _Given] = {}
    path = path if path is not None else environment.get("GATEWAY_CONFIG") or None
    for found in (
        _from_file(path, problems) if path is not None else {},
        _from_environment(environment, problems),
        _from_sets(sets, problems),
    ):
        given.update(found)
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origin = dict.fromkeys(SETTINGS, "default")
    for key, (value, where) in given.items():
        setting = SETTINGS[key]
        try:
            sections[setting.section][setting.name] = _convert(setting, value)
            origin[key] = where
        except ValueError as error:
            problems.append(_problem(key, where, value, str(error)))
    if problems:
        raise ConfigError(*problems)
    config = msgspec.convert(sections, Config)
    _check(config, origin, problems)
    if problems:
        raise ConfigError(*problems)
    return Loaded(config, origin)


# ---- sources -------------------------------------------------------------------------------------


def _from_file(path: str, problems: list[str]) -> dict[str, _Given]:
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"configuration file {path}: {error}") from None
    found: dict[str, _Given] = {}
    for section, content in table.items():
        items = content.items() if isinstance(content, dict) else [(None, content)]
        for name, value in items:
            key = section if name is None else f"{section}.{name}"
            line = _line(text, section, name)
            where = f"{path} line {line}" if line else path
            if _known(key, where, value, problems):
                found[key] = _Given(value, where)
        if isinstance(content, dict) and not content and section not in SECTIONS:
            _known(section, path, "an empty table", problems)
    return found


def _line(text: str, section: str, name: str | None) -> int | None:
    """Where a key stands in TOML text. The parser does not say, so this looks, and may not find."""
    quoted = r"""["']?%s["']?"""
    head = quoted % re.escape(section)
    tail = quoted % re.escape(name or "")
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        if table := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            current = table[1].strip("\"'")
        elif name is None:
            if re.match(rf"\s*{head}\s*=", line):
                return number
        elif (current == section and re.match(rf"\s*{tail}\s*[=.]", line)) or (
            not current and re.match(rf"\s*{head}\s*(\.\s*{tail}\s*=|=\s*\{{.*\b{tail}\s*=)", line)
        ):
            return number
    return None


def _from_environment(environment: Mapping[str, str], problems: list[str]) -> dict[str, _Given]:
    variables = {setting.variable: key for key, setting in SETTINGS.items()}
    found: dict[str, _Given] = {}
    for variable, value in sorted(environment.items()):
        if not variable.startswith("GATEWAY_") or variable == "GATEWAY_CONFIG":
            continue
        key = variables.get(variable)
        if key is None and _SERVICE_LINK.fullmatch(f"{variable}={value}"):
            continue
        where = f"environment {variable}"
        key = key or variable.removeprefix("GATEWAY_").lower().replace("_", ".", 1)
        if not _known(key, where, value, problems):
            continue
        if key == "http.port" and value.startswith("tcp://"):
            hint = "made by Kubernetes for a service gateway-http; set enableServiceLinks: false"
            problems.append(_problem(key, where, value, hint))
            continue
        _from_text(key, where, value, found, problems)
    return found


def _from_sets(sets: Sequence[str], problems: list[str]) -> dict[str, _Given]:
    found: dict[str, _Given] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            problems.append(f"--set {text}: write --set section.key=value")
        elif _known(key, "--set", value, problems):
            _from_text(key, "--set", value, found, problems)
    return found


def _from_text(
    key: str, where: str, value: str, found: dict[str, _Given], problems: list[str]
) -> None:
    """Text of the environment or --set, turned into the kind of value that its setting takes."""
    setting = SETTINGS[key]
    if setting.kind == "text":
        found[key] = _Given(value, where)
    elif setting.kind == "bool" and value in ("true", "false"):
        found[key] = _Given(value == "true", where)
    elif setting.kind == "int" and re.fullmatch(r"[+-]?\d[\d_]*", value, re.ASCII):
        found[key] = _Given(int(value), where)
    elif setting.kind == "number" and re.fullmatch(r"\d*\.?\d+", value, re.ASCII):
        found[key] = _Given(float(value), where)
    elif setting.kind == "int" and "_bytes" in setting.name and _size(value) is not None:
        found[key] = _Given(value, where)
    else:
        problems.append(_problem(key, where, value, f"must be {setting.expected}"))


# ---- values --------------------------------------------------------------------------------------


def _known(key: str, where: str, value: Any, problems: list[str]) -> bool:
    """Whether the key exists; otherwise a problem is noted, with the closest right key."""
    if key in SETTINGS:
        return True
    if key in SECTIONS:
        reason = f"is a section; write [{key}] and its keys below"
    else:
        close = _closest(key)
        hint = f"did you mean {close}?" if close else "`gateway config` lists them all"
        reason = f"no such setting; {hint}"
    problems.append(_problem(key, where, value, reason))
    return False


def _closest(key: str) -> str | None:
    """The setting that was meant, as far as spelling tells."""
    key = key.lower()
    same_name = [known for known in SETTINGS if known.endswith("." + key.rpartition(".")[2])]
    return next(iter(difflib.get_close_matches(key, SETTINGS, 1, 0.6) or same_name), None)


def _problem(key: str, where: str, value: Any, reason: str) -> str:
    meant = key if key in SETTINGS else _closest(key)
    secret = key in SECTIONS or (meant is not None and SETTINGS[meant].secret)
    shown = "hidden" if secret else _shorten(value)
    return f"{key}: {reason} (from {where}, given {shown})"


def _shorten(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    text = re.sub(r"^(\W?(?:mqtts?:)?/*).*@", r"\1(hidden)@", text)  # user and password in a URL
    return text if len(text) <= 80 else text[:77] + "..."


def _size(text: str) -> int | None:
    match = re.fullmatch(r"([\d_]+) ?([KMGT]iB|B|)", text, re.ASCII | re.IGNORECASE)
    if not match or not match[1].strip("_"):
        return None
    return int(match[1].replace("_", "")) * _UNITS[match[2].upper()]


def _convert(setting: Setting, value: Any) -> Any:
    """The value, strictly of the setting's type. Raises ValueError with what was expected."""
    if value == "" and setting.optional:
        return None
    if isinstance(value, str) and setting.kind == "int" and "_bytes" in setting.name:
        size = _size(value)
        value = value if size is None else size
    if setting.key == "http.server" and value == "robyn" and find_spec("robyn") is None:
        raise ValueError(f"robyn is not installed: pip install '{ROBYN}'; or use granian")
    try:
        return msgspec.convert(value, setting.field)
    except msgspec.ValidationError:
        raise ValueError(f"must be {setting.expected}") from None


# ---- checks that need more than one value, or more than a range ----------------------------------


def _check(config: Config, origin: Mapping[str, str], problems: list[str]) -> None:
    def wrong(key: str, reason: str) -> None:
        setting = SETTINGS[key]
        value = getattr(getattr(config, setting.section), setting.name)
        problems.append(_problem(key, origin[key], value, reason))

    for key, setting in SETTINGS.items():
        value = getattr(getattr(config, setting.section), setting.name)
        if isinstance(value, str) and not setting.choices:
            if not value:
                wrong(key, "must not be empty")
            elif re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", value) and not setting.secret:
                wrong(key, "must not have control characters")
    if problems:
        return
    http, log, mqtt = config.http, config.log, config.mqtt
    if config.sinks and not any(config.required):
        wrong(
            f"{config.sinks[-1]}.required",
            "no sink would be required: the log would keep events for nobody; at least one of"
            f" {' and '.join(f'{name}.required' for name in config.sinks)} must be true",
        )
    if log.forget_sink in config.sinks:
        place = PLACES[log.forget_sink or ""]
        wrong("log.forget_sink", f"it is configured: {place} is set; unset one of the two")
    if log.low_water > log.high_water:
        wrong("log.low_water", f"must not be above log.high_water = {log.high_water:g}")
    if not _is_loopback(http.host) and not config.auth.allow_anonymous:
        wrong(
            "http.host",
            "not a loopback address, and this version has no authentication; use 127.0.0.1, or set"
            " auth.allow_anonymous = true if everyone who reaches it may send",
        )
    capacity = log.capacity_bytes
    if capacity & (capacity - 1):
        below = 1 << (capacity.bit_length() - 1)
        wrong("log.capacity_bytes", f"must be a power of two: {below} or {2 * below}")
    if http.body_bytes_max > log.record_bytes_max - RECORD_OVERHEAD_BYTES:
        most = log.record_bytes_max - RECORD_OVERHEAD_BYTES
        wrong("http.body_bytes_max", f"at most {most} with log.capacity_bytes = {capacity}")
    if http.batch_bytes_max < http.body_bytes_max:
        wrong("http.batch_bytes_max", f"less than http.body_bytes_max = {http.body_bytes_max}")
    if http.batches_bytes_max < http.batch_bytes_max:
        wrong("http.batches_bytes_max", f"less than http.batch_bytes_max = {http.batch_bytes_max}")
    if reason := topic_problem(mqtt.topic):
        wrong("mqtt.topic", reason)
    if mqtt.client_id is not None:
        room = 128 - (0 if mqtt.connections == 1 else len(f"-{mqtt.connections - 1}"))
        if len(mqtt.client_id.encode()) > room:
            more = "" if room == 128 else f" with mqtt.connections = {mqtt.connections}"
            wrong("mqtt.client_id", f"must be at most {room} bytes{more}")
    _check_packs(config, wrong)
    if mqtt.backoff_max_ms < mqtt.backoff_base_ms:
        wrong("mqtt.backoff_max_ms", f"less than mqtt.backoff_base_ms = {mqtt.backoff_base_ms}")
    if mqtt.password is not None and mqtt.password_file is not None:
        wrong("mqtt.password", "set together with mqtt.password_file; use one of them")
    if mqtt.cert_file is not None and mqtt.key_file is None:
        wrong("mqtt.cert_file", "needs mqtt.key_file")
    if mqtt.key_file is not None and mqtt.cert_file is None:
        wrong("mqtt.key_file", "needs mqtt.cert_file")
    try:
        broker = mqtt.broker
    except ValueError as error:
        wrong("mqtt.url", str(error))
        return
    if broker is not None and broker.embedded and mqtt.embedded_port == http.port:
        wrong("mqtt.embedded_port", "is also http.port")
    for name in ("ca_file", "cert_file", "key_file", "alpn", "server_name"):
        if getattr(mqtt, name) is not None and (broker is None or not broker.tls):
            wrong(f"mqtt.{name}", "is for TLS only: mqtt.url must start with mqtts://")
    _check_files(mqtt, wrong)


def _check_packs(config: Config, wrong: Callable[[str, str], None]) -> None:
    mqtt = config.mqtt
    if mqtt.mode == "event":
        for name in ("pack_bytes_max", "pack_linger_ms", "pack_format", "pack_compression"):
            if getattr(mqtt, name) != SETTINGS[f"mqtt.{name}"].default:
                wrong(f"mqtt.{name}", 'is for packed messages only: set mqtt.mode = "packed" too')
        return
    if mqtt.pack_linger_ms >= config.http.sink_deadline_ms:
        wrong(
            "mqtt.pack_linger_ms",
            f"not below http.sink_deadline_ms = {config.http.sink_deadline_ms}: an event that waits"
            " so long for company would be answered 504",
        )


def _check_files(mqtt: MqttConfig, wrong: Callable[[str, str], None]) -> None:
    for name, forbidden in (
        ("ca_file", 0),
        ("cert_file", 0),
        ("key_file", 0o007),
        ("password_file", PASSWORD_FILE_FORBIDDEN_MODE),
    ):
        path = getattr(mqtt, name)
        if path is None:
            continue
        try:
            with open(path, "rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        except OSError as error:
            wrong(f"mqtt.{name}", f"cannot be read: {error.strerror}")
            continue
        if mode & forbidden:
            wrong(f"mqtt.{name}", f"mode {mode:04o} lets others read it; chmod 600 it")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ---- text -------------------------------------------------------------------------------------


def effective(loaded: Loaded) -> Iterator[tuple[str, str, str]]:
    """Every setting as (key, value as TOML, origin); secrets are hidden, what is unset is empty."""
    for key, setting in SETTINGS.items():
        value = getattr(getattr(loaded.config, setting.section), setting.name)
        shown = "(hidden)" if setting.secret and value is not None else toml(value)
        yield key, shown, loaded.origin[key]


def example() -> str:
    """A commented configuration file with every setting at its default: gateway.example.toml."""
    lines = [
        "# Settings of the telemetry gateway, with their defaults. Made by: gateway config"
        " --example",
        "#",
        "# Later wins: default < this file (--config FILE, else GATEWAY_CONFIG)",
        "#     < environment GATEWAY_<SECTION>_<KEY> < --set section.key=value",
        '# Take the # away from a line to change it. Sizes in bytes may be text: "256 MiB".',
    ]
    for section, doc in SECTIONS.items():
        lines += ["", "", *_comment(doc), f"[{section}]"]
        for setting in SETTINGS.values():
            if setting.section == section:
                lines += ["", *_example_of(setting)]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, 96, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )


def _example_of(setting: Setting) -> Iterator[str]:
    yield from _comment(setting.doc)
    if setting.choices or setting.kind in ("int", "number"):
        yield f"# Must be {setting.expected}."
    if setting.default_text:
        yield f"# Default: {setting.default_text}."
        yield f"#{setting.name} = {setting.low}"
    elif setting.default is None:
        yield f'#{setting.name} = ""  # unset'
    else:
        yield f"#{setting.name} = {toml(setting.default)}"


def toml(value: Any) -> str:
    """The value of a setting as TOML; empty for one that is unset."""
    if value is None:
        return ""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower()
