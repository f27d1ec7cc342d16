"""A gateway whose disk and broker do what a test says, for acknowledgements and what may hold them
up.

    with Site(folder) as site:
        site.disk("hold")                  # no fdatasync begins ("fail": EIO, "": go on)
        site.broker.hold()                 # PUBLISH is read, no PUBACK is sent, until let_go()
        site.post("dev", seq=1, ack="durable")
"""

import asyncio
import hashlib
import os
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import uvloop

from gateway import _log
from gateway.worker import in_memory
from tests.brokers import (
    PINGREQ,
    PINGRESP,
    PUBLISH,
    Peer,
    Publish,
    ScriptedBroker,
    packet,
    read_publish,
)
from tests.gateway_process import ROOT, GatewayProcess
from tests.raw_http import Answer, Client, request

CACHE = ROOT / "build" / "acks"


def on_disk(folder: Path) -> Path:
    """`folder`, or one in build/ when that lies in memory, where nothing is durable. Both are
    empty."""
    folder.mkdir(exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        if in_memory(fd) is None:
            return folder
    finally:
        os.close(fd)
    other = CACHE / folder.name
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir(parents=True)
    return other


def gate_library() -> Path:
    """preload_gate.c, built."""
    library = CACHE / "preload_gate.so"
    source = ROOT / "tests" / "native" / "preload_gate.c"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        CACHE.mkdir(parents=True, exist_ok=True)
        made = CACHE / f"preload_gate.{os.getpid()}.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", source, "-o", made], check=True)
        made.rename(library)
    return library


class Broker:
    """A broker in a thread of its own; keeps each PUBLISH, acknowledges at once or when told."""

    def __init__(self) -> None:
        self.port = 0
        self.payloads: list[bytes] = []
        self._held: list[tuple[Peer, int]] = []
        self._hold = False
        self.reason: int | None = None
        """Of the PUBACKs that follow; None: success."""
        self._loop: asyncio.AbstractEventLoop
        self._end = asyncio.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._play)

    def _play(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with ScriptedBroker(self._script, self.port) as broker:
            self.port = broker.port
            self._up.set()
            await self._end.wait()

    async def _script(self, peer: Peer) -> None:
        await peer.accept()
        try:
            while True:
                first, body = await peer.packet()
                if first == PINGREQ << 4:
                    peer.send(packet(PINGRESP << 4, b""))
                elif first >> 4 == PUBLISH:
                    self._published(peer, read_publish(first, body))
        finally:  # what it was not told is sent again on the next connection
            self._held = [held for held in self._held if held[0] is not peer]

    def _published(self, peer: Peer, message: Publish) -> None:
        self.payloads.append(message.payload)
        if self._hold:
            self._held.append((peer, message.id))
        else:
            peer.puback(message.id, self.reason)

    def hold(self) -> None:
        """Acknowledge nothing from here on."""
        self._hold = True

    def let_go(self) -> None:
        """Acknowledge what is held, and what comes from here on."""

        async def go() -> None:
            self._hold = False
            for peer, number in self._held:
                peer.puback(number, self.reason)
            self._held.clear()

        asyncio.run_coroutine_threadsafe(go(), self._loop).result(5)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)


class Site:
    """A gateway, its disk, its broker."""

    def __init__(
        self, folder: Path, settings: Mapping[str, object] | None = None, root: Path = ROOT
    ) -> None:
        self.folder = on_disk(folder)
        self.broker = Broker()
        self._settings, self._root = dict(settings or {}), root
        self.environment: dict[str, str] = {}
        """Of the gateway; for before it starts."""
        self._gate = self.folder / "gate"
        self._clients: list[Client] = []
        self.gateway: GatewayProcess

    def __enter__(self) -> Self:
        self.broker.__enter__()
        try:
            self.gateway = GatewayProcess(
                self.folder / "gateway",
                {
                    "mqtt.url": f"mqtt://127.0.0.1:{self.broker.port}",
                    "mqtt.puback_timeout_ms": 60_000,
                    **self._settings,
                },
            )
            self.gateway.root = self._root
            self.gateway.environment |= {
                "LD_PRELOAD": str(gate_library()),
                "GW_GATE": str(self._gate),
                **self.environment,
            }
            self.gateway.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disk("")
        self.close_clients()
        if hasattr(self, "gateway"):
            self.gateway.kill()
        self.broker.__exit__()
        if CACHE in self.folder.parents:
            shutil.rmtree(self.folder, ignore_errors=True)

    def disk(self, says: str) -> None:
        """ "hold", "fail" or ""; see preload_gate.c."""
        if says:
            made = self._gate.with_suffix(".new")
            made.write_text(says)
            made.rename(self._gate)
        else:
            self._gate.unlink(missing_ok=True)

    def client(self, timeout_s: float = 10.0) -> Client:
        """A connection."""
        client = Client(self.gateway.port, timeout_s)
        self._clients.append(client)
        return client

    def client_of(self, worker: int) -> Client:
        """A connection to the worker of that index."""
        for _ in range(200):
            client = self.client()
            if self.worker_of(client)["index"] == worker:
                return client
        raise AssertionError(f"no connection reached worker {worker}")

    def worker_of(self, client: Client) -> dict[str, int]:
        """What the worker at the other end says of itself: index, pid, waiting."""
        client.send(request(b"", path="/healthz", method="GET", length=None, media=None))
        answer = client.answer()
        assert answer is not None
        worker: dict[str, int] = answer.json["worker"]
        return worker

    def restore(self) -> None:
        """As it was: what one test has done to it is nothing to the next."""
        self.disk("")
        self.broker.reason = None
        self.broker.let_go()
        self.close_clients()

    def close_clients(self) -> None:
        """All connections that were made."""
        while self._clients:
            self._clients.pop().close()

    def ask(
        self,
        device: str = "dev",
        seq: int | None = None,
        ack: str | None = None,
        boot: int | None = None,
        value: int = 1,
    ) -> Client:
        """A connection on which one event was sent and whose answer is still to come."""
        client = self.client()
        client.send(event(device, seq, ack, boot, value))
        return client

    def post(
        self,
        device: str = "dev",
        seq: int | None = None,
        ack: str | None = None,
        boot: int | None = None,
        value: int = 1,
    ) -> Answer:
        """The answer to one event."""
        with self.ask(device, seq, ack, boot, value) as client:
            answer = client.answer()
        assert answer is not None, "closed without an answer"
        return answer

    def receipt(self, receipt: str | None) -> str:
        """What became of it."""
        return str(self.get(f"/v1/receipts/{receipt}").json["state"])

    def get(self, path: str, method: str = "GET") -> Answer:
        """The answer to a request without a body."""
        with self.client() as client:
            client.send(request(b"", path=path, method=method, length=None, media=None))
            answer = client.answer(head_only=method == "HEAD")
        assert answer is not None
        return answer

    @property
    def waiting(self) -> int:
        """Requests that wait, of the worker that answers."""
        count: int = self.gateway.health()["worker"]["waiting"]
        return count

    def log(self) -> _log.Log:
        """The running gateway's log, in this process."""
        folder = Path(f"/proc/{self.gateway.pid}/fd")
        links = {os.readlink(path): path for path in folder.iterdir()}
        lock = next(path for name, path in links.items() if name.endswith("/gateway.log"))
        shared = next(path for name, path in links.items() if "memfd:" in name)
        return _log.Log.attach(
            os.open(lock, os.O_RDWR | os.O_CLOEXEC), os.open(shared, os.O_RDWR | os.O_CLOEXEC)
        )


def event(
    device: str = "dev",
    seq: int | None = None,
    ack: str | None = None,
    boot: int | None = None,
    value: int = 1,
    *headers: str,
    pad: int = 0,
) -> bytes:
    """A request with one event."""
    key = "" if seq is None else f'"seq":{seq},'
    key += "" if boot is None else f'"boot":{boot},'
    fill = f',"payload":"{"x" * pad}"' if pad else ""
    body = f'{{{key}"metrics":{{"a":{value}}}{fill}}}'.encode()
    query = "" if ack is None else f"?ack={ack}"
    return request(body, *headers, path=f"/v1/ingest/{device}{query}")


def with_fail_points(folder: Path) -> Path:
    """A tree whose compiled log can be stopped where GW_FAILPOINT says (`_native/gw_log.c`)."""
    sources = ["build/cython/_native/log.c"]
    sources += [
        str(path.relative_to(ROOT))
        for pattern in ("gw_log*.c", "gw_crc32c.c", "gw_ingest.c", "gw_batch.c", "gw_validator*.c")
        for path in sorted((ROOT / "_native").glob(pattern))
    ]
    headers = sorted((ROOT / "_native").glob("*.h"))
    texts = [(ROOT / name).read_bytes() for name in (*sources, *headers)]
    digest = hashlib.sha256(b"\0".join(texts)).hexdigest()[:20]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    library = CACHE / f"log-{digest}{suffix}"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = library.with_name(f"{library.name}.{os.getpid()}")
        flags = [
            "-std=gnu11",
            "-O1",
            "-shared",
            "-fPIC",
            "-w",
            "-D_GNU_SOURCE",
            "-DGW_FAILPOINTS",
            "-I_native",
        ]
        include = f"-I{sysconfig.get_path('include')}"
        subprocess.run(["gcc", *flags, include, *sources, "-o", made], cwd=ROOT, check=True)
        made.rename(library)
    package = folder / "gateway"
    package.mkdir(parents=True)
    for path in (ROOT / "gateway").iterdir():
        if not path.name.startswith(("_log.c", "__pycache__")):
            (package / path.name).symlink_to(path)
    (package / f"_log{suffix}").symlink_to(library)
    return folder
