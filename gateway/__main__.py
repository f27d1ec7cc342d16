"""The command line: `gateway`, also `python -m gateway`.

Parses, calls one function, and turns what it raises into a line on standard error and an exit code.
A command imports what it needs itself, so that `version` and `--help` answer at once.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from gateway import __version__

if TYPE_CHECKING:
    from gateway.config import Config, Loaded

EXIT_CODES: Final = {
    0: "success",
    1: "unexpected error",
    2: "wrong arguments or settings",
    3: "a port is in use by another program",
    4: "the log is in use by another gateway",
    5: "the log failed while the gateway ran: a write error",
    6: "the log cannot be opened, or there is none",
    7: "a child process lost its supervisor",
    8: "`log verify` found corruption",
    9: "`demo` could not reach a gateway",
    10: "`demo` had events refused",
    130: "interrupted",
}

_MAIN: Final = """\
Takes telemetry over HTTP, writes it to a crash-safe log, publishes it to MQTT.

examples:
  gateway serve --set mqtt.url=embedded        try it out, with a broker inside
  gateway serve --config gateway.toml          for real
  gateway config --config gateway.toml         what is in force, and where each value came from
  gateway demo                                 send weather readings to a running gateway
  gateway log verify --set log.directory=DIR   check a log for damage
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

_DEMO: Final = """\
Send hourly temperatures of Seattle and San Francisco through a running gateway.

examples:
  gateway demo
  gateway demo --rate 500 --count 5000
"""

_LS: Final = """\
Print what a log holds: positions, the cursor of each sink, what waits to be published.

examples:
  gateway log ls
  gateway log ls --records 10 --set log.directory=DIR
"""

_VERIFY: Final = """\
Check every record that waits in a log to be published, as the next start would; exits 8 when
something that was on the disk is damaged, and says where.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; never raises for what a user can mend."""
    args = _parser().parse_args(arguments)
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
        for line in text.splitlines():
            print(f"gateway: {line}", file=sys.stderr)
        return code


def _explain(error: Exception) -> tuple[int, str | None]:
    """Exit code and text for what a command raised; no text for what nobody foresaw."""
    from gateway.errors import Exit, GatewayError

    if isinstance(error, GatewayError):
        return error.exit_code, str(error)
    if isinstance(error, PermissionError | FileNotFoundError) and error.filename:
        return Exit.LOG_UNUSABLE, f"{error.filename}: {error.strerror}"
    if isinstance(error, ImportError) and re.search(r"\b_(log|mqtt|validator)\b", str(error)):
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
    from gateway.config import NO_BROKER
    from gateway.errors import ConfigError

    loaded = _load(args)
    if loaded.config.mqtt.url is None:
        raise ConfigError(NO_BROKER)
    from gateway import supervisor

    try_it = _try_it(loaded.config) if loaded.config.mqtt.url == "embedded" else None
    return supervisor.run(loaded.config, loaded.origin, try_it)


def _try_it(config: "Config") -> str:
    """Lines to type beside a gateway with its embedded broker."""
    http, mqtt = config.http, config.mqtt
    host = "127.0.0.1" if http.host in ("0.0.0.0", "::", "localhost") else http.host
    host = f"[{host}]" if ":" in host else host
    topic = mqtt.topic.partition("{device_id}")[0].rpartition("/")[0]
    topic = f"{topic}/#" if topic else "#"
    bin_ = os.path.dirname(sys.executable)  # the other terminal may be in another folder
    return f"""\
Watch events arrive, in another terminal, with one of

    mosquitto_sub -V mqttv5 -h 127.0.0.1 -p {mqtt.embedded_port} -t '{topic}' -v
    {bin_}/mqttools subscribe --host 127.0.0.1 --port {mqtt.embedded_port} '{topic}'

and send one, in a third, with

    curl -i http://{host}:{http.port}/v1/ingest/boiler-7 -H 'Content-Type: application/json' \\
         -d '{{"seq":1,"metrics":{{"temp_c":21.5}},"tags":{{"site":"AAL"}}}}'

or some hundred readings of weather stations with

    {bin_}/gateway demo --url http://{host}:{http.port}
"""


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


def _demo(args: argparse.Namespace) -> int:
    from gateway import demo

    return demo.run(args.url, args.rate, args.count)


def _log_ls(args: argparse.Namespace) -> int:
    loaded = _load(args)
    from gateway import log_tools

    return log_tools.ls(loaded.config.log.path, args.records)


def _log_verify(args: argparse.Namespace) -> int:
    loaded = _load(args)
    from gateway import log_tools

    return log_tools.verify(loaded.config.log.path)


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
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add(commands, "serve", _serve, "run the gateway", _SERVE, settings)
    shown = _add(commands, "config", _config, "print the effective settings", _CONFIG, settings)
    shown.add_argument("--example", action="store_true", help="print a commented file instead")
    demo = _add(commands, "demo", _demo, "send weather readings to a running gateway", _DEMO)
    demo.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway (%(default)s)")
    demo.add_argument("--rate", type=_positive, default=50, help="events a second (%(default)s)")
    demo.add_argument("--count", type=_positive, default=300, help="events in all (%(default)s)")
    log = commands.add_parser("log", help="look at a log without a gateway")
    logs = log.add_subparsers(metavar="COMMAND", required=True)
    ls = _add(logs, "ls", _log_ls, "print what a log holds", _LS, settings)
    ls.add_argument(
        "--records", type=_positive, default=0, metavar="N", help="also list the first N that wait"
    )
    _add(logs, "verify", _log_verify, "check a log for damage", _VERIFY, settings)
    _add(commands, "version", _version, "print the version", "Print the version.")
    return parser


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


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 1_000_000_000:
        raise argparse.ArgumentTypeError("must be an integer from 1 to 1000000000")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
