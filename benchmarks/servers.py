"""Which servers stand in the benchmarks, and with which settings? All on free ports of 127.0.0.1.

nginx answers 202 from its configuration: the rate that wrk and the machine allow. Granian peers get
the settings of the gateway's own door: backlog, connections, head size and timeout, one runtime
thread, HTTP/1.1 without websockets. Mosquitto has its stock limits unless said otherwise, and
persistence off.
"""

import http.client
import importlib.metadata
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Failed
from benchmarks.processes import Child, answers, free_port, program, python

MOSQUITTO_VARIABLE = "MOSQUITTO"


class Mosquitto(Child):
    """A broker. `limits=False` lifts the two limits that hold a publisher back; `more` are lines of
    its configuration.
    """

    def __init__(self, directory: Path, limits: bool = True, more: Sequence[str] = ()) -> None:
        self.port = free_port()
        lines = [
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            "persistence false",
            "log_type error",
            "log_type warning",
        ]
        if not limits:
            lines += ["max_inflight_messages 0", "max_queued_messages 0"]
        lines += more
        directory.mkdir(parents=True, exist_ok=True)
        settings = directory / "mosquitto.conf"
        settings.write_text("\n".join(lines) + "\n")
        command = [program("mosquitto", MOSQUITTO_VARIABLE), "-c", str(settings)]
        super().__init__("mosquitto", command, directory)
        self.wait_until(lambda: answers(self.port), 10, "listening")

    @property
    def url(self) -> str:
        """For `mqtt.url`."""
        return f"mqtt://127.0.0.1:{self.port}"


NGINX = """
daemon off; master_process off; worker_processes 1;
pid {directory}/nginx.pid; error_log stderr error;
events {{ worker_connections 1024; }}
http {{
    access_log off; keepalive_requests 1000000000;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ return 202; }} }}
}}
"""


class Nginx(Child):
    """Answers 202 to everything."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        directory.mkdir(parents=True, exist_ok=True)
        settings = directory / "nginx.conf"
        settings.write_text(NGINX.format(directory=directory, port=self.port))
        command = [program("nginx"), "-e", "stderr", "-p", str(directory), "-c", str(settings)]
        super().__init__("nginx", command, directory)
        self.wait_until(lambda: answers(self.port), 10, "listening")


class GranianPeer(Child):
    """An RSGI app of `benchmarks/peers` under Granian, with the settings of the gateway's door."""

    def __init__(
        self,
        module: str,
        directory: Path,
        workers: int,
        settings: dict[str, str] | None = None,
        interpreter: str = sys.executable,
    ) -> None:
        from gateway import opening
        from gateway.frontends import granian as door

        self.port = free_port()
        command = [
            *(interpreter, "-m", "granian", f"benchmarks.peers.{module}:app"),
            *("--interface", "rsgi", "--http", "1", "--no-ws", "--loop", "uvloop"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", str(workers)),
            *("--runtime-mode", "st", "--runtime-threads", "1", "--runtime-blocking-threads", "1"),
            *("--backlog", str(opening.BACKLOG), "--backpressure", str(door.CONNECTIONS_MAX)),
            *("--http1-buffer-size", str(door.HEAD_BYTES_MAX)),
            *("--http1-header-read-timeout", str(door.HEADER_TIMEOUT_MS)),
            *("--log-level", "warning"),
        ]
        super().__init__(module, command, directory, settings=settings)
        self.wait_until(lambda: answers(self.port), 20, "listening")


class Gateway(Child):
    """The real thing: `gateway serve`."""

    def __init__(
        self,
        directory: Path,
        mqtt_url: str,
        workers: int,
        capacity_bytes: int,
        *sets: str,
        wait: bool = True,
        settings: dict[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.data = directory / "data"
        given = (
            f"http.port={self.port}",
            f"http.workers={workers}",
            f"log.directory={self.data}",
            f"log.capacity_bytes={capacity_bytes}",
            f"mqtt.url={mqtt_url}",
            "log.level=warning",
            "http.drain_deadline_ms=0",  # what is left unpublished is of no interest here
            *sets,
        )
        command = python("-m", "gateway", "serve")
        for text in given:
            command += ["--set", text]
        super().__init__("gateway", command, directory, settings=settings)
        if wait:
            self.wait_until(self.ready, 120, "ready")

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page. Raises OSError."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"{path}: {error!r}") from None
        finally:
            connection.close()

    def post(self, device: str, body: bytes) -> int:
        """Send one event over a new connection. Returns the status; raises OSError."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", f"/v1/ingest/{device}", body, headers)
            return connection.getresponse().status
        except http.client.HTTPException as error:
            raise OSError(f"{device}: {error!r}") from None
        finally:
            connection.close()

    def ready(self) -> bool:
        """/readyz says 200."""
        try:
            return self.get("/readyz")[0] == 200
        except OSError:
            return False

    def books(self) -> dict[str, float]:
        """/metrics: the series by name and labels as they stand in the text. Raises Failed."""
        status, text = self.get("/metrics")
        if status != 200:
            raise Failed(f"/metrics answered {status}")
        series = {}
        for line in text.splitlines():
            if match := re.fullmatch(r"([a-z_]+(?:\{.*\})?) (\S+)", line):
                series[match[1]] = float(match[2])
        return series

    def metrics(self) -> dict[str, float]:
        """The same. Raises Failed when an event was taken for a repeat: a repeat is answered as
        accepted, but nothing was done for it. So no run that looks here can count one.
        """
        series = self.books()
        if repeats := series["gateway_events_duplicates_total"]:
            raise Failed(f"{repeats:.0f} events were taken for repeats: each must have a new seq")
        return series

    def waiting(self) -> int:
        """Events that are accepted and not yet published."""
        return int(self.metrics()["gateway_events_waiting"])

    def connected(self) -> bool:
        """The publisher has a broker."""
        return self.metrics()["gateway_mqtt_connected"] == 1


def version(package: str) -> str:
    """Of an installed Python package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
