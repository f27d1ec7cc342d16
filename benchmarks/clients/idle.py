"""Holds many keep-alive connections that do almost nothing.

    python -m benchmarks.clients.idle PORT COUNT FIRST_SEQ

Opens COUNT connections and posts one event over each; prints "held" then. Until SIGTERM comes, one
connection after the other posts its next event, each about once in 20 s. Prints {"open": n,
"answered": n} at the end, and ends with 1 when a connection was closed or an event refused.
"""

import contextlib
import itertools
import json
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator

from benchmarks import events

ROUND_S = 20


@contextlib.contextmanager
def stoppable() -> Iterator[list[int]]:
    """SIGTERM is noted."""
    seen: list[int] = []
    was = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGTERM, was)


def post(connection: socket.socket, number: int, template: events.Template, seq: int) -> None:
    """One event and its answer. Raises ConnectionError when it is no 202."""
    body = b"%s%d%s" % (template.before, seq, template.after)
    connection.sendall(
        b"POST /v1/ingest/idle-%05d HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (number, len(body), body)
    )
    answer = b""
    while b"\r\n\r\n" not in answer:
        data = connection.recv(4096)
        if not data:
            raise ConnectionError(f"connection {number} was closed")
        answer += data
    head, _, rest = answer.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
    while len(rest) < length:
        rest += connection.recv(4096)
    if not head.startswith(b"HTTP/1.1 202 "):
        raise ConnectionError(f"connection {number}: refused: {head[:100]!r}")


def main() -> int:
    """The whole life of the program."""
    port, count, first_seq = map(int, sys.argv[1:])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    templates = events.templates(events.reference, 64)
    seqs = itertools.count(first_seq)
    connections: list[socket.socket] = []
    with stoppable() as stopped:
        for number in range(count):
            connections.append(socket.create_connection(("127.0.0.1", port), 10))
            post(connections[-1], number, templates[number % 64], next(seqs))
        print("held", file=sys.stderr, flush=True)
        answered = count
        while not stopped:
            number = answered % count
            post(connections[number], number, templates[number % 64], next(seqs))
            answered += 1
            time.sleep(ROUND_S / count)
    print(json.dumps({"open": len(connections), "answered": answered}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
