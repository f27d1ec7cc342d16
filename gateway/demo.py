"""`gateway demo`: real weather readings through a running gateway, so that something moves.

Hourly temperatures of two stations (see demo_data/LICENSE) are sent as events at a steady rate over
one kept-alive connection. `seq` counts up per device; `boot` is the time of the start, so a second
run repeats no key.
"""

import csv
import http.client
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from gateway.errors import ConfigError, Exit
from gateway.settings import Config

DATA: Final = Path(__file__).parent / "demo_data" / "temperatures.csv"
TIMEOUT_S: Final = 10
BAR_COLUMNS: Final = 40


def try_it(config: Config) -> str:
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


def readings() -> list[tuple[str, str, float]]:
    """The vendored rows: time with offset, device id, temperature in degrees Fahrenheit."""
    with open(DATA, encoding="ascii", newline="") as file:
        return [(row["ts"], row["device_id"], float(row["temp_f"])) for row in csv.DictReader(file)]


def events(boot: int) -> Iterator[tuple[str, bytes]]:
    """Device id and body of each event, without end: the readings go round."""
    seq: Counter[str] = Counter()
    for ts, device_id, temp_f in itertools.cycle(readings()):
        seq[device_id] += 1
        event = {
            "ts": ts,
            "seq": seq[device_id],
            "boot": boot,
            "metrics": {"temp_f": temp_f, "temp_c": round((temp_f - 32) / 1.8, 2)},
            "tags": {"source": "noaa"},
        }
        yield device_id, json.dumps(event, separators=(",", ":")).encode()


def run(url: str, rate: int, count: int) -> int:
    """Send `count` events at `rate` a second. Returns an exit code. Raises ConfigError (url)."""
    host, port = address(url)
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    answers: Counter[int] = Counter()
    refusal = ""
    started = time.monotonic()
    code = Exit.OK
    try:
        for number, (device_id, body) in enumerate(
            itertools.islice(events(int(time.time())), count)
        ):
            if (wait := started + number / rate - time.monotonic()) > 0:
                time.sleep(wait)
            status, text = send(connection, device_id, body)
            answers[status] += 1
            if status != 202:
                refusal, code = text, Exit.REFUSED
            bar(number + 1, count, answers)
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except (OSError, http.client.HTTPException) as error:
        code = Exit.UNREACHABLE
        refusal = (
            f"no gateway answers at {url} ({str(error) or type(error).__name__});"
            " start it with `make run` or `gateway serve`, or say where it is with --url"
        )
    finally:
        connection.close()
    if sys.stderr.isatty() and answers:
        print(file=sys.stderr)
    if answers:
        report(answers, time.monotonic() - started)
    if refusal:
        print(f"gateway: {refusal}", file=sys.stderr)
    return code


def address(url: str) -> tuple[str, int]:
    """Host and port of an http:// URL. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
        raise ConfigError(f"--url {url}: write http://HOST:PORT")
    return parts.hostname, port or 80


def send(connection: http.client.HTTPConnection, device_id: str, body: bytes) -> tuple[int, str]:
    """One event; its status and the text of the answer. Reconnects when the server had closed.

    Raises OSError, http.client.HTTPException.
    """
    path = f"/v1/ingest/{device_id}"
    headers = {"Content-Type": "application/json"}
    kept_alive = connection.sock is not None
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
    except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
        connection.close()
        if not kept_alive:
            raise
        # The same seq again: should the first one have been accepted, this is its repeat.
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
    return answer.status, answer.read().decode("utf-8", "replace")


def bar(done: int, count: int, answers: Counter[int]) -> None:
    """Draw the progress bar on a terminal."""
    if sys.stderr.isatty():
        full = BAR_COLUMNS * done // count
        refused = done - answers[202]
        print(
            f"\r[{'#' * full}{'.' * (BAR_COLUMNS - full)}] {done}/{count}"
            f"  accepted {answers[202]}, other {refused} ",
            end="",
            file=sys.stderr,
            flush=True,
        )


def report(answers: Counter[int], seconds: float) -> None:
    """Print how many answers had which status."""
    total = answers.total()
    print(f"{total} events sent in {seconds:.1f} s, {answers[202]} accepted")
    for status, n in sorted(answers.items()):
        if status != 202:
            name = http.client.responses.get(status, "")
            print(f"  {n} answered {status} {name}".rstrip())
