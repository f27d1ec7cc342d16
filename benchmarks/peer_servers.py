"""Who are the peers, how is each started, and what does its 2xx mean?

All do the same job: POST /v1/ingest/{device_id}, the rules of an event, telemetry/{device_id} at
QoS 1 into the same Mosquitto, 202. What one cannot do its description says. One process each, as
many workers as the gateway has where it knows workers. Starting one installs it when it is not
there.
"""

import contextlib
import http.client
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks import installs
from benchmarks.processes import Child, free_port
from benchmarks.servers import GranianPeer

START_S_MAX: Final = 40
READY: Final = b'{"metrics":{"ready":1}}'


class PeerServer(Child):
    """A peer that is told its two ports by the environment."""

    def __init__(
        self,
        name: str,
        command: Callable[[int], list[str]],
        directory: Path,
        mqtt_port: int,
        **settings: str,
    ) -> None:
        self.port = free_port()
        ports = {"PEER_HTTP_PORT": str(self.port), "PEER_MQTT_PORT": str(mqtt_port)}
        super().__init__(name, command(self.port), directory, settings=ports | settings)
        try:
            self.wait_until(self.ready, START_S_MAX, "ready")
        except BaseException:
            self.stop()  # the others go on without it
            raise

    def ready(self) -> bool:
        """A good event is answered well. A port that is open says less: Node-RED answers 404 until
        its flow runs, and nothing until it has a broker.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
        with contextlib.closing(connection):
            try:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/ingest/ready", READY, headers)
                return connection.getresponse().status in (200, 202)
            except (OSError, http.client.HTTPException):
                return False

    def stop(self, timeout_s: float = 2) -> None:
        """Nothing is to be saved, and Robyn does not heed SIGTERM."""
        super().stop(timeout_s)


Server = PeerServer | GranianPeer


def fastapi(directory: Path, mqtt_port: int, workers: int) -> Server:
    """Under uvicorn with its fastest parts."""
    interpreter = installs.venv("fastapi")

    def command(port: int) -> list[str]:
        return [
            *(interpreter, "-m", "uvicorn", "benchmarks.peers.fastapi_peer:app"),
            *("--host", "127.0.0.1", "--port", str(port), "--workers", str(workers)),
            *("--loop", "uvloop", "--http", "httptools", "--backlog", "4096"),
            *("--no-access-log", "--log-level", "warning"),
        ]

    return PeerServer("fastapi", command, directory, mqtt_port)


def robyn(directory: Path, mqtt_port: int, workers: int) -> Server:
    """With its own Rust server."""
    interpreter = installs.venv("robyn")
    options = ("--processes", str(workers), "--workers", "1", "--log-level", "WARN")
    command = [interpreter, "-m", "benchmarks.peers.robyn_peer", *options]
    return PeerServer("robyn", lambda _: command, directory, mqtt_port)


def gmqtt(directory: Path, mqtt_port: int, workers: int) -> Server:
    """In the project's own environment, which has all that it needs."""
    return GranianPeer("gmqtt_peer", directory, workers, {"PEER_MQTT_PORT": str(mqtt_port)})


def aiomqtt(directory: Path, mqtt_port: int, workers: int) -> Server:
    """The same Granian with the same settings."""
    interpreter = installs.venv("granian")
    settings = {"PEER_MQTT_PORT": str(mqtt_port)}
    return GranianPeer("aiomqtt_peer", directory, workers, settings, interpreter)


def node_red(directory: Path, mqtt_port: int, workers: int) -> Server:
    """One process, whatever `workers` is."""
    program = installs.node_red()
    source = installs.PEERS / "node_red"
    command = [
        *("node", program, "--settings", str(source / "settings.js")),
        *("--userDir", str(directory / "node-red"), str(source / "flow.json")),
    ]
    return PeerServer("node_red", lambda _: command, directory, mqtt_port)


def thingsboard(directory: Path, mqtt_port: int, workers: int) -> Server:
    """One process, whatever `workers` is. It asks the vendor for updates and installs packages when
    it starts: here neither gets out.
    """
    interpreter = installs.venv("thingsboard")
    folder = directory / "thingsboard"
    command = [interpreter, "-m", "benchmarks.peers.thingsboard_peer", str(folder)]
    nowhere = "http://127.0.0.1:9"
    settings = {"https_proxy": nowhere, "http_proxy": nowhere, "PIP_NO_INDEX": "1"}
    return PeerServer("thingsboard", lambda _: command, directory, mqtt_port, **settings)


class Peer(NamedTuple):
    """A row of the table."""

    title: str
    meaning: str
    """What its 2xx means."""
    start: Callable[[Path, int, int], Server]
    """Given a folder, the broker's port and the number of workers. Raises Failed."""
    one_message_an_event: bool = True
    good_status: int = 202


PUBACK: Final = "the broker has it (PUBACK)"
PEERS: Final[dict[str, Peer]] = {
    "fastapi": Peer("FastAPI + pydantic + uvicorn + aiomqtt", PUBACK, fastapi),
    "robyn": Peer("Robyn + msgspec + mqttools (QoS 0)", "nothing: no acknowledgement", robyn),
    "gmqtt": Peer("Granian + msgspec + gmqtt", "it is in the process's memory", gmqtt),
    "aiomqtt": Peer("Granian + msgspec + aiomqtt", PUBACK, aiomqtt),
    "node_red": Peer("Node-RED (http in → mqtt out)", PUBACK, node_red),
    "thingsboard": Peer(
        "ThingsBoard IoT Gateway, REST connector",
        "it is in the process's memory, unchecked; equal ts become one",
        thingsboard,
        one_message_an_event=False,
        good_status=200,
    ),
}
