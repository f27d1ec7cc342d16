"""Sends events at a fixed rate, whatever the answers do (open loop), by HTTP or straight to the
broker.

    python -m benchmarks.peers.paced_client http|mqtt PORT COUNT RATE FIRST_SEQ

An event is due at a fixed time and says so in its payload ("due_ns"); when no connection is free
then, it waits, and that wait counts. 16 keep-alive connections by HTTP; one by MQTT with QoS 1 and
at most 20 in flight. Prints {"sent": n, "late": n}; late: due more than 1 ms before it could be
sent. Ends with 1 when an answer is no success.
"""

import json
import select
import socket
import sys
import time
from collections import deque
from random import Random

from benchmarks import events
from benchmarks.peers import mqtt_wire

CONNECTIONS = 16
DEVICES = 64
IN_FLIGHT_MAX = 20
LATE_NS = 1_000_000


def event(template: events.Template, seq: int, due_ns: int) -> bytes:
    """The event of the template, with its time in the payload."""
    body = b"%s%d%s" % (template.before, seq, template.after)
    return body.replace(b'"payload":{', b'"payload":{"due_ns":%d,' % due_ns, 1)


class Http:
    """Keep-alive connections with one request at a time each."""

    def __init__(self, port: int) -> None:
        self.free: deque[socket.socket] = deque()
        self._partial: dict[socket.socket, bytes] = {}
        for _ in range(CONNECTIONS):
            connection = socket.create_connection(("127.0.0.1", port), 10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._partial[connection] = b""
            self.free.append(connection)
        self.sockets = list(self._partial)
        self.answered = 0

    def may_send(self) -> bool:
        """A connection is free."""
        return bool(self.free)

    def send(self, device: str, body: bytes) -> None:
        """One request."""
        self.free.popleft().sendall(
            b"POST /v1/ingest/%s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (device.encode(), len(body), body)
        )

    def receive(self, connection: socket.socket) -> None:
        """Take what came. Raises ConnectionError."""
        data = connection.recv(65536)
        if not data:
            raise ConnectionError("the server closed a connection")
        data = self._partial[connection] + data
        head, found, rest = data.partition(b"\r\n\r\n")
        if found:
            if not head.startswith(b"HTTP/1.1 202 "):
                raise ConnectionError(f"refused: {data[:300]!r}")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(rest) >= length:
                self.answered += 1
                self.free.append(connection)
                data = b""
        self._partial[connection] = data


class Mqtt:
    """One connection with a small window."""

    def __init__(self, port: int) -> None:
        connection, self._parser = mqtt_wire.dial(port, "bench-client")
        self.sockets = [connection]
        self.answered = 0
        self._sent = 0

    def may_send(self) -> bool:
        """The window is open."""
        return self._sent - self.answered < IN_FLIGHT_MAX

    def send(self, device: str, body: bytes) -> None:
        """One PUBLISH."""
        packet_id = self._sent % 65535 + 1
        self._sent += 1
        self.sockets[0].sendall(mqtt_wire.publish(f"telemetry/{device}", body, packet_id))

    def receive(self, connection: socket.socket) -> None:
        """Take PUBACKs. Raises ConnectionError."""
        data = connection.recv(65536)
        if not data:
            raise ConnectionError("the broker closed the connection")
        for first, body in self._parser.feed(data):
            if first != mqtt_wire.PUBACK or (len(body) > 2 and body[2] >= 0x80):
                raise ConnectionError(f"no PUBACK with success: {first:#x} {body!r}")
            self.answered += 1


def main() -> int:
    """The whole life of the program."""
    kind, rate = sys.argv[1], float(sys.argv[4])
    port, count, first_seq = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[5])
    link: Http | Mqtt = Http(port) if kind == "http" else Mqtt(port)
    templates = events.templates(events.reference, 512, seed=Random().randrange(1 << 30))
    interval_ns = round(1e9 / rate)
    begin = time.monotonic_ns() + 50_000_000
    late = sent = 0
    quiet_until = begin + 10_000_000_000
    while link.answered < count:
        now = time.monotonic_ns()
        while sent < count and begin + sent * interval_ns <= now and link.may_send():
            due_ns = begin + sent * interval_ns
            late += now - due_ns > LATE_NS
            body = event(templates[sent % len(templates)], first_seq + sent, due_ns)
            link.send(events.device(sent % DEVICES), body)
            sent += 1
            now = time.monotonic_ns()
        wait_ns = begin + sent * interval_ns - now if sent < count and link.may_send() else 10**9
        ready, _, _ = select.select(link.sockets, [], [], max(wait_ns, 0) / 1e9)
        for connection in ready:
            link.receive(connection)
        if ready:
            quiet_until = time.monotonic_ns() + 10_000_000_000
        elif time.monotonic_ns() > quiet_until:
            raise TimeoutError(f"{link.answered} of {count} answered, then nothing for 10 s")
    print(json.dumps({"sent": sent, "late": late}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
