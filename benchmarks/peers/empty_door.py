"""The gateway's own Granian door around an app that accepts all unread: what the door costs.

python -m benchmarks.peers.empty_door PORT WORKERS
"""

import os
import signal
import socket
import sys
from types import SimpleNamespace
from typing import Any

from benchmarks.peers.empty_handler import RECEIPT
from gateway import http
from gateway.config import Config
from gateway.frontends.granian import Door
from gateway.opening import BACKLOG


def _event(device_id: str, body: bytes, started_ns: int) -> int:
    return 0


def _nothing() -> None:
    pass


def main() -> None:
    """As many processes as workers, on one listening socket."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listening.bind(("127.0.0.1", int(sys.argv[1])))
    listening.listen(BACKLOG)
    for _ in range(int(sys.argv[2]) - 1):
        if os.fork() == 0:
            break
    config = Config()
    app: Any = SimpleNamespace(
        config=config,
        terms=http.Terms(config.http.body_bytes_max, http.ENQUEUE),
        block=0,
        draining=False,
        ingest=SimpleNamespace(event=_event, receipt=RECEIPT, duplicate=False, used_percent=0),
        batches=SimpleNamespace(held={}),
        waiting=SimpleNamespace(start=_nothing, end=_nothing, count=0),
    )
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Door(app, listening.detach()).serve()


if __name__ == "__main__":
    main()
