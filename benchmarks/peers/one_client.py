"""Sends one event after the other over one keep-alive connection, the next when the last is
answered.

    python -m benchmarks.peers.one_client PORT COUNT FIRST_SEQ QUERY

Prints {"microseconds": [...]}: from the first byte sent to the last byte of the answer received.
Ends with 1 when an answer is no success.
"""

import json
import socket
import sys
import time
from random import Random

from benchmarks import events

DEVICES = 64


def requests(count: int, first_seq: int, query: str) -> list[bytes]:
    """Whole requests, each with its own seq, made before the clock runs."""
    templates = events.templates(events.reference, 512, seed=Random().randrange(1 << 30))
    found = []
    for number in range(count):
        template = templates[number % len(templates)]
        body = b"%s%d%s" % (template.before, first_seq + number, template.after)
        head = (
            f"POST /v1/ingest/{events.device(number % DEVICES)}?{query} HTTP/1.1\r\n"
            "Host: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        found.append(head.encode() + body)
    return found


def receive(connection: socket.socket) -> None:
    """One whole answer. Raises ConnectionError."""
    data = b""
    while True:
        more = connection.recv(65536)
        if not more:
            raise ConnectionError("the server closed the connection")
        data += more
        head, found, rest = data.partition(b"\r\n\r\n")
        if not found:
            continue
        if not head.startswith(b"HTTP/1.1 202 "):
            raise ConnectionError(f"refused: {data[:300]!r}")
        if len(rest) >= int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]):
            return


def main() -> int:
    """The whole life of the program."""
    port, count, first_seq = map(int, sys.argv[1:4])
    prepared = requests(count, first_seq, sys.argv[4])
    took = []
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for request in prepared:
            started = time.perf_counter_ns()
            connection.sendall(request)
            receive(connection)
            took.append((time.perf_counter_ns() - started) / 1000)
    print(json.dumps({"microseconds": took}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
