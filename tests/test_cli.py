"""The command line: help, exit codes, and no traceback for a user's mistake."""

import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gateway import __main__ as cli
from gateway import __version__, _log, demo, log_tools, supervisor
from gateway._validator import validate
from gateway.config import Config, example
from gateway.errors import Exit

COMMANDS = [
    "serve",
    "config",
    "openapi",
    "demo",
    "log",
    *(f"log {command}" for command in ("ls", "verify", "dump", "replay", "resize")),
    "version",
]
MIB = 1 << 20


def gateway(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **environment},
        check=False,
    )


# ---- help, version, mistakes ------------------------------------------------------------------


def test_help_lists_commands_and_exit_codes() -> None:
    answer = gateway("--help")
    assert answer.returncode == 0
    for command in ("serve", "config", "demo", "log", "version"):
        assert f"\n    {command} " in answer.stdout
    for code, meaning in cli.EXIT_CODES.items():
        assert f"{code:>3}  {meaning}" in answer.stdout


def test_version_is_also_an_option() -> None:
    assert gateway("--version").stdout == f"gateway {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"usage: gateway {command}" in capsys.readouterr().out


def test_version_is_printed_without_loading_what_it_does_not_need() -> None:
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gateway", "version"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert answer.stdout == f"gateway {__version__}\n"
    for module in ("msgspec", "asyncio", "gateway._log", "gateway.config", "http.client"):
        assert f"| {module}\n" not in answer.stderr.replace("  ", " ")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "COMMAND"),
        (["sevre"], 2, "invalid choice: 'sevre'"),
        (["log"], 2, "COMMAND"),
        (["serve"], 2, "file.directory"),
        (["serve", "--set", "mqtt.url=broker"], 2, "mqtt.url: write mqtt://HOST"),
        (["serve", "--config", "/nowhere.toml"], 2, "/nowhere.toml: No such file"),
        (["config", "--set", "http.prot=1"], 2, "did you mean http.port?"),
        (["config", "--set", "http.port"], 2, "write --set section.key=value"),
        (["demo", "--rate", "0"], 2, "must be an integer from 1"),
        (["demo", "--url", "https://x"], 2, "write http://HOST:PORT"),
        (["log", "ls", "--set", "log.directory=/nowhere"], 6, "/nowhere/gateway.log: no log there"),
        (["log", "verify", "--set", "log.directory=/nowhere"], 6, "no log there"),
        (["log", "dump", "--set", "log.directory=/nowhere"], 6, "no log there"),
        (["log", "dump", "--from", "-1"], 2, "must be a position (lsn), as `gateway log ls`"),
        (["log", "dump", "--until", "noon"], 2, "--until noon: write an RFC 3339 time"),
        (["log", "resize"], 2, "--capacity"),
        (["log", "replay"], 2, "mqtt.url is not set"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_a_line_and_an_exit_code(arguments: list[str], code: int, text: str) -> None:
    answer = gateway(*arguments)
    assert answer.returncode == code
    assert text in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_a_closed_pipe_is_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "gateway", "config", "--example"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo"]) == 130


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(demo, "run", broken)
    with pytest.raises(RuntimeError):
        cli.main(["demo"])


# ---- config -----------------------------------------------------------------------------------


def test_config_shows_values_with_their_origin_and_no_secret() -> None:
    answer = gateway("config", "--set", "http.port=9000", GATEWAY_MQTT_PASSWORD="hunter2")
    rows = {line.split()[0]: line.split()[1:] for line in answer.stdout.splitlines()}
    assert rows["http.port"] == ["9000", "--set"]
    assert rows["http.host"] == ['"127.0.0.1"', "default"]
    assert rows["mqtt.url"] == ["(unset)", "default"]
    assert rows["mqtt.password"] == ["(hidden)", "environment", "GATEWAY_MQTT_PASSWORD"]
    assert "hunter2" not in answer.stdout + answer.stderr


def test_config_prints_the_example() -> None:
    assert gateway("config", "--example").stdout == example()


# ---- serve ------------------------------------------------------------------------------------


def test_serve_with_the_embedded_broker_prints_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[str | None] = []

    def run(config: Config, _: object, welcome: str) -> int:
        served.append(config.mqtt.url)
        print(welcome)
        return 7

    monkeypatch.setattr(supervisor, "run", run)
    sets = (
        "mqtt.url=embedded",
        "http.port=9000",
        "mqtt.embedded_port=1999",
        "mqtt.topic=a/{device_id}/b",
    )
    assert cli.main(["serve", *(part for text in sets for part in ("--set", text))]) == 7
    text = capsys.readouterr().out
    assert "mosquitto_sub -V mqttv5 -h 127.0.0.1 -p 1999 -t 'a/#' -v" in text
    assert "mqttools subscribe --host 127.0.0.1 --port 1999 'a/#'" in text
    assert "curl -i http://127.0.0.1:9000/v1/ingest/" in text
    body = re.search(r"-d '(.*)'", text)
    assert body
    assert validate(body[1].encode()).code == ""
    assert served == ["embedded"]


def test_serve_with_another_broker_prints_none_of_that(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "run", lambda *_: 0)
    assert cli.main(["serve", "--set", "mqtt.url=mqtt://broker"]) == 0
    assert capsys.readouterr().out == ""


# ---- log --------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[int]]:
    """A log with three synced records, closed; its path and their positions."""
    path = tmp_path / "gateway.log"
    _log.create(str(path), MIB)
    with open(path, "r+b") as file:
        log = _log.Log.open(str(path), file.fileno(), ["mqtt"])
        ingest = _log.Ingest(log, 0)
        positions = []
        for seq in range(3):
            body = json.dumps({"seq": seq, "metrics": {"t": 1}}).encode()
            assert ingest.event(f"device-{seq}", body, _log.now_ns()) == 0
            positions.append(ingest.lsn)
        log.follow(0, 0)
        log.takeover()
        while log.sync():
            pass
        ingest.close()
        log.close()
    return path, positions


def cli_log(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> tuple[int, str]:
    code = cli.main(["log", *arguments, "--set", f"log.directory={path.parent}"])
    return code, capsys.readouterr().out


def test_ls_shows_what_waits(
    written: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = cli_log(capsys, written[0], "ls")
    assert code == 0
    assert "waiting    3 records" in text
    assert "capacity   1048576 bytes (1 MiB)" in text
    assert "0 published, 0 dead-lettered" in text
    assert "corrupt    0 bytes" in text
    assert "running" not in text


def test_ls_lists_the_first_records(
    written: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, positions = written
    _, text = cli_log(capsys, path, "ls", "--records", "2")
    rows = [line.split() for line in text.splitlines() if "device-" in line]
    assert [(int(row[0]), row[3], row[4]) for row in rows] == [
        (positions[0], "0", "device-0"),
        (positions[1], "1", "device-1"),
    ]
    assert all(row[2].startswith("20") and row[2].endswith("Z") for row in rows)


def test_verify_of_a_whole_log_is_success(
    written: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = cli_log(capsys, written[0], "verify")
    assert code == 0
    assert "3 records waiting and whole" in text
    assert "no corruption" in text


def test_verify_of_a_damaged_log_says_where(
    written: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, positions = written
    place = 4 * 4096 + positions[1] % MIB + 80
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    code, text = cli_log(capsys, path, "verify")
    assert code == 8
    assert f"lsn {positions[1]} to {positions[2]}" in text
    _, text = cli_log(capsys, path, "ls", "--records", "3")
    assert f"{positions[1]:>14}" in text
    assert "(a hole: torn or corrupt)" in text
    assert "device-2" in text


def test_a_file_that_is_not_a_log_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gateway.log").write_bytes(bytes(MIB))
    assert cli.main(["log", "verify", "--set", f"log.directory={tmp_path}"]) == 6
    assert "gateway: " in capsys.readouterr().err


def test_both_say_when_a_gateway_runs(
    written: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = written
    with open(path, "r+b") as file:
        log = _log.Log.open(str(path), file.fileno(), ["mqtt"])
        assert log_tools.is_running(path)
        for command in ("ls", "verify"):
            assert "a gateway is running on this log" in cli_log(capsys, path, command)[1]
        log.close()
    assert not log_tools.is_running(path)
    with open(path, "rb") as other:  # another `gateway log ls` at the same moment is no gateway
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not log_tools.is_running(path)


def test_looking_changes_no_byte(
    written: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = written
    before = path.read_bytes()
    cli_log(capsys, path, "ls", "--records", "9")
    cli_log(capsys, path, "verify")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1536, "1536 bytes (1.5 KiB)"),
        (1 << 40, "1099511627776 bytes (1024 GiB)"),
    ],
)
def test_sizes_are_for_people(n: int, text: str) -> None:
    assert log_tools.size(n) == text


# ---- demo -------------------------------------------------------------------------------------


class Door:
    """A stand-in for the gateway: keeps what it was sent, answers with the statuses it is given."""

    def __init__(self, port: int, statuses: list[int]) -> None:
        received: list[tuple[str, dict[str, object]]] = []
        self.received = received

        class Request(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                received.append((self.path, body))
                status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", port), Request)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def door(free_port: Callable[[], int]) -> Iterator[Callable[..., tuple[Door, str]]]:
    doors: list[Door] = []

    def start(*statuses: int) -> tuple[Door, str]:
        port = free_port()
        doors.append(Door(port, list(statuses)))
        return doors[-1], f"http://127.0.0.1:{port}"

    yield start
    for each in doors:
        each.close()


def test_the_vendored_readings_are_two_stations_in_order() -> None:
    rows = demo.readings()
    assert {device for _, device, _ in rows} == {"seattle", "san-francisco"}
    assert [ts for ts, _, _ in rows] == sorted(ts for ts, _, _ in rows)
    assert len(rows) == 2 * 31 * 24
    assert (demo.DATA.parent / "LICENSE").exists()


def test_demo_sends_every_event_once_with_rising_seq(
    door: Callable[..., tuple[Door, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    server, url = door(202)
    assert demo.run(url, 10_000, 6) == 0
    assert [path for path, _ in server.received][:2] == [
        "/v1/ingest/seattle",
        "/v1/ingest/san-francisco",
    ]
    assert [event["seq"] for _, event in server.received] == [1, 1, 2, 2, 3, 3]
    assert len({event["boot"] for _, event in server.received}) == 1
    assert "6 events sent" in capsys.readouterr().out


def test_demo_keeps_its_rate(door: Callable[..., tuple[Door, str]]) -> None:
    _, url = door(202)
    began = time.monotonic()
    demo.run(url, 50, 6)
    assert time.monotonic() - began >= 0.1


def test_demo_counts_refusals_and_fails(
    door: Callable[..., tuple[Door, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = door(202, 503, 202)
    assert demo.run(url, 10_000, 4) == 10
    assert "3 accepted" in (text := capsys.readouterr().out)
    assert "1 answered 503 Service Unavailable" in text


def test_demo_says_how_to_start_a_gateway(
    free_port: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.run(f"http://127.0.0.1:{free_port()}", 50, 3) == 9
    assert "start it with `make run`" in capsys.readouterr().err


def test_an_interrupted_demo_prints_its_summary(
    door: Callable[..., tuple[Door, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, url = door(202)

    def interrupt(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "bar", interrupt)
    assert demo.run(url, 10_000, 100) == 130
    assert "2 events sent" in capsys.readouterr().out


def test_exit_code_is_told_though_standard_error_takes_nothing() -> None:
    command = [sys.executable, "-m", "gateway", "serve", "--set", "http.workers=0"]
    with Path("/dev/full").open("wb") as full:
        assert subprocess.run(command, stderr=full, timeout=30).returncode == Exit.USAGE
