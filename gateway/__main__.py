"""The command line: `gateway`, also `python -m gateway`.

Parses, calls one function, and turns what it raises into a line on standard error and an exit code.
A command imports what it needs itself, so that `version` and `--help` answer at once.
"""

import argparse
import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gateway import __version__, help_texts

if TYPE_CHECKING:
    from gateway.config import Loaded
    from gateway.log_dump import Selection

EXIT_CODES: Final = {
    0: "success",
    1: "unexpected error",
    2: "wrong arguments or settings",
    3: "a port is in use by another program",
    4: "the log is in use by another gateway",
    5: "the log failed while the gateway ran: a write error",
    6: "the log cannot be opened, or there is none",
    7: "a child process lost its supervisor",
    8: "`log verify` found corruption, or `log resize` would have copied some",
    9: "`demo` could not reach a gateway, `log replay` or `dead-letters requeue` no broker",
    10: "`demo`, `log replay` or `dead-letters requeue` had events refused",
    130: "interrupted",
}

_MAIN: Final = """\
Takes telemetry over HTTP, writes it to a crash-safe log, delivers it to MQTT and to files.

examples:
  gateway serve --set mqtt.url=embedded        try it out, with a broker inside
  gateway serve --config gateway.toml          for real
  gateway config --config gateway.toml         what is in force, and where each value came from
  gateway demo                                 send weather readings to a running gateway
  gateway log verify --set log.directory=DIR   check a log for damage
  gateway log dump | jq .                      the events that wait, as NDJSON
  gateway openapi >openapi.json                the HTTP interface, for programs
"""

_SERVE: Final = """\
Run the gateway until SIGTERM or Ctrl-C, which drain it. SIGHUP replaces its processes one by one,
without a failed request and with the settings of the start: certificate files are read again, the
configuration is not.

examples:
  gateway serve --set mqtt.url=embedded
  gateway serve --config gateway.toml --set http.port=9000
  GATEWAY_MQTT_URL=mqtts://broker.example gateway serve
"""

_CONFIG: Final = """\
Print the effective settings and where each came from. Secrets are hidden.

  default < TOML file (--config, else GATEWAY_CONFIG) < GATEWAY_<SECTION>_<KEY> < --set

examples:
  gateway config --set http.workers=2
  gateway config --example >gateway.toml       a commented file with all settings
"""

_HEALTH: Final = """\
Ask a running gateway whether it is ready (GET /readyz): exits 0 when it is, else 1, and says why.
A full log is ready (`ready: full`): it refuses new events for a while, and GET /healthz says what
holds it. Without --url the gateway that these settings describe, on this machine.

  gateway health --url http://127.0.0.1:9000 --timeout 1
"""

_OPENAPI: Final = """\
Print the HTTP interface as an OpenAPI 3.1 document, with the limits of these settings. A running
gateway serves its own at /docs/openapi.json, and the JSON Schema of an event at
/docs/event.schema.json. `gateway --dump-openapi` is the same.

examples:
  gateway openapi | python3 -m json.tool
  gateway openapi --yaml --config gateway.toml
"""

_DEMO: Final = """\
Send hourly temperatures of Seattle and San Francisco through a running gateway.

examples:
  gateway demo
  gateway demo --rate 500 --count 5000
"""

_DUMP_OPENAPI: Final = ("--dump-openapi", "--dump_openapi")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; never raises for what a user can mend."""
    code = _run(arguments)
    try:
        sys.stderr.flush()
    except OSError:  # a full disk: Python would end with 120 for what it cannot say
        os._exit(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in _DUMP_OPENAPI:
        given[0] = "openapi"
    args = _parser().parse_args(given)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        code = command(args)
        sys.stdout.flush()
        return int(code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # of `gateway config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        code, text = _explain(error)
        if text is None:
            raise
        with contextlib.suppress(OSError):  # the code says it too
            for line in text.splitlines():
                print(f"gateway: {line}", file=sys.stderr)
        return code


def _explain(error: Exception) -> tuple[int, str | None]:
    """Exit code and text for what a command raised; no text for what nobody foresaw."""
    from gateway.errors import Exit, GatewayError

    if isinstance(error, GatewayError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        where = f"{error.filename}: " if error.filename else ""
        return Exit.ERROR, f"{where}{error.strerror}; make room there, and run it again"
    if isinstance(error, OSError) and error.filename:
        return Exit.LOG_UNUSABLE, f"{error.filename}: {error.strerror}"
    if isinstance(error, TimeoutError):  # of a lock; it says which
        return Exit.LOCKED, str(error)
    if isinstance(error, ImportError) and re.search(
        r"\b_(log|mqtt|validator|waiting|lines)\b", str(error)
    ):
        return Exit.ERROR, f"compiled modules are missing ({error}): run scripts/bootstrap"
    if "gateway._log" in sys.modules:
        from gateway._log import LogError, LogLocked

        if isinstance(error, LogLocked):
            return Exit.LOCKED, f"{error}: is another gateway running on this directory?"
        if isinstance(error, LogError):
            return Exit.LOG_UNUSABLE, str(error)
    return Exit.ERROR, None


# ---- commands ---------------------------------------------------------------------------------


def _load(args: argparse.Namespace) -> "Loaded":
    from gateway import config

    return config.load(args.config, sets=args.set)


def _serve(args: argparse.Namespace) -> int:
    from gateway.config import NO_SINK
    from gateway.errors import ConfigError

    loaded = _load(args)
    if not loaded.config.sinks:
        raise ConfigError(NO_SINK)
    from gateway import demo, supervisor

    try_it = demo.try_it(loaded.config) if loaded.config.mqtt.url == "embedded" else None
    return supervisor.run(loaded.config, loaded.origin, try_it)


def _config(args: argparse.Namespace) -> int:
    from gateway import config

    if args.example:
        print(config.example(), end="")
        return 0
    rows = list(config.effective(_load(args)))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for key, value, origin in rows:
        print(f"{key:<{widths[0]}}  {value or '(unset)':<{widths[1]}}  {origin}".rstrip())
    return 0


def _openapi(args: argparse.Namespace) -> int:
    loaded = _load(args)
    from gateway import openapi

    print((openapi.yaml if args.yaml else openapi.text)(loaded.config), end="")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from gateway import demo

    return demo.run(args.url, args.rate, args.count)


def _health(args: argparse.Namespace) -> int:
    from gateway import health_check

    url = args.url or health_check.url_of(_load(args).config.http)
    return health_check.run(url, args.timeout)


def _log_ls(args: argparse.Namespace) -> int:
    loaded = _load(args)
    from gateway import log_tools

    return log_tools.ls(loaded.config.log, args.records)


def _log_verify(args: argparse.Namespace) -> int:
    loaded = _load(args)
    from gateway import log_tools

    return log_tools.verify(loaded.config.log.path, args.all, args.json)


def _log_dump(args: argparse.Namespace) -> int:
    loaded = _load(args)
    from gateway import log_dump

    output = None if args.output in (None, "-") else Path(args.output)
    return log_dump.run(loaded.config.log.path, _selection(args), output)


def _selection(args: argparse.Namespace) -> "Selection":
    from gateway.errors import ConfigError
    from gateway.log_dump import Selection
    from gateway.log_tools import parse_timestamp

    def time(option: str, text: str | None) -> int | None:
        try:
            return None if text is None else parse_timestamp(text)
        except ValueError as error:
            raise ConfigError(f"--{option} {text}: {error}") from None

    since_ns, until_ns = time("since", args.since), time("until", args.until)
    everything = args.all or since_ns is not None or until_ns is not None
    return Selection(args.start, args.end, since_ns, until_ns, args.device, everything)


def _log_replay(args: argparse.Namespace) -> int:
    loaded = _load(args)
    from gateway import log_replay

    args.all = True
    return log_replay.run(loaded.config, _selection(args), args.yes)


def _log_resize(args: argparse.Namespace) -> int:
    from gateway import config
    from gateway.errors import ConfigError

    try:
        capacity = f"log.capacity_bytes={args.capacity}"
        loaded = config.load(args.config, sets=[*args.set, capacity])
    except ConfigError as error:
        own = "log.capacity_bytes: "
        problems = (
            text.replace("from --set,", "from --capacity,") if text.startswith(own) else text
            for text in error.problems
        )
        raise ConfigError(*problems) from None
    from gateway import log_resize

    return log_resize.resize(loaded.config.log.path, loaded.config.log.capacity_bytes)


def _dead_letters(args: argparse.Namespace) -> int:
    loaded = _load(args)
    from gateway import dead_letter_tools as tools

    if args.dead_letters == "ls":
        return tools.ls(loaded.config)
    selection = tools.Selection.of(args.reason, args.device)
    if args.dead_letters == "show":
        return tools.show(loaded.config, selection, args.limit)
    if args.dead_letters == "drop":
        return tools.drop(loaded.config, selection, args.yes)
    return tools.requeue(loaded.config, selection)


def _version(_: argparse.Namespace) -> int:
    print(f"gateway {__version__}")
    return 0


# ---- arguments --------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    codes = "".join(f"  {code:>3}  {meaning}\n" for code, meaning in EXIT_CODES.items())
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--config", metavar="FILE", help="TOML file (else $GATEWAY_CONFIG)")
    settings.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="set one setting; may be repeated, and outranks file and environment",
    )
    parser = argparse.ArgumentParser(
        prog="gateway",
        description=_MAIN,
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gateway {__version__}")
    parser.add_argument(*_DUMP_OPENAPI, action="store_true", help="the same as `gateway openapi`")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add(commands, "serve", _serve, "run the gateway", _SERVE, settings)
    shown = _add(commands, "config", _config, "print the effective settings", _CONFIG, settings)
    shown.add_argument("--example", action="store_true", help="print a commented file instead")
    printed = _add(commands, "openapi", _openapi, "print the HTTP interface", _OPENAPI, settings)
    printed.add_argument("--yaml", action="store_true", help="YAML instead of JSON")
    demo = _add(commands, "demo", _demo, "send weather readings to a running gateway", _DEMO)
    demo.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway (%(default)s)")
    demo.add_argument("--rate", type=_positive, default=50, help="events a second (%(default)s)")
    demo.add_argument("--count", type=_positive, default=300, help="events in all (%(default)s)")
    health = _add(commands, "health", _health, "ask whether it is ready", _HEALTH, settings)
    health.add_argument("--url", help="the gateway (http.host and http.port of the settings)")
    health.add_argument("--timeout", type=_positive, default=3, help="seconds (%(default)s)")
    _add_log(commands, settings)
    _add_dead_letters(commands, settings)
    _add(commands, "version", _version, "print the version", "Print the version.")
    return parser


def _add_dead_letters(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    settings: argparse.ArgumentParser,
) -> None:
    parser = commands.add_parser(
        "dead-letters",
        help="look at events that the broker refused for good, publish or drop them",
        description=help_texts.DEAD_LETTERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="COMMAND", required=True)
    some = argparse.ArgumentParser(add_help=False)
    for option, text in (
        ("reason", "those with this reason code (0x87, 135) or `poison`"),
        ("device", "those of this device"),
    ):
        some.add_argument(
            f"--{option}", action="append", default=[], help=f"only {text}; may be repeated"
        )
    for name, short, text in (
        ("ls", "count them by reason, device and topic", "Print how many there are, and why."),
        ("show", "print them as JSON, a line each", help_texts.DEAD_LETTERS_SHOW),
        ("requeue", "publish them again", help_texts.REQUEUE),
        ("drop", "remove them for good", help_texts.DROP),
    ):
        chosen = () if name == "ls" else (some,)
        action = _add(actions, name, _dead_letters, short, text, settings, *chosen)
        action.set_defaults(dead_letters=name)
        if name == "show":
            action.add_argument("--limit", type=_positive, default=0, metavar="N", help="at most N")
        if name == "drop":
            action.add_argument("--yes", action="store_true", help="really all of them")


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Callable[[argparse.Namespace], int],
    short: str,
    text: str,
    *parents: argparse.ArgumentParser,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=short,
        description=text,
        parents=parents,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    return parser


def _add_log(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    settings: argparse.ArgumentParser,
) -> None:
    log = commands.add_parser(
        "log", help="look at a log without a gateway, or resize it", description=help_texts.LOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    logs = log.add_subparsers(metavar="COMMAND", required=True)
    ls = _add(logs, "ls", _log_ls, "print what a log holds", help_texts.LS, settings)
    ls.add_argument(
        "--records", type=_positive, default=0, metavar="N", help="also list the first N that wait"
    )
    verify = _add(
        logs, "verify", _log_verify, "check a log for damage", help_texts.VERIFY, settings
    )
    verify.add_argument("--all", action="store_true", help="the whole ring, not only what waits")
    verify.add_argument("--json", action="store_true", help="one JSON object instead of text")
    dump = _add(logs, "dump", _log_dump, "print records as NDJSON", help_texts.DUMP, settings)
    dump.add_argument(
        "--all", action="store_true", help="also what is published and not yet written over"
    )
    dump.add_argument("--output", metavar="FILE", help="a new file, there once it is whole")
    _add_range(dump)
    replay = _add(logs, "replay", _log_replay, "publish events again", help_texts.REPLAY, settings)
    _add_range(replay)
    replay.add_argument("--yes", action="store_true", help="also when that is everything")
    resize = _add(
        logs, "resize", _log_resize, "change a log's capacity", help_texts.RESIZE, settings
    )
    resize.add_argument(
        "--capacity", required=True, metavar="SIZE", help="a power of two, such as 1GiB"
    )


def _add_range(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="start", type=_lsn, metavar="LSN", help="the first position")
    parser.add_argument(
        "--to", dest="end", type=_lsn, metavar="LSN", help="the position behind the last"
    )
    parser.add_argument("--since", metavar="TIME", help="received then or later (RFC 3339)")
    parser.add_argument("--until", metavar="TIME", help="received before then (RFC 3339)")
    parser.add_argument("--device", metavar="ID", help="only events of this device")


def _lsn(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError("must be a position (lsn), as `gateway log ls` prints it")
    return int(text)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 1_000_000_000:
        raise argparse.ArgumentTypeError("must be an integer from 1 to 1000000000")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
