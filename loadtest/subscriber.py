"""Writes down every event that the broker delivers: which ones, and when.

    python -m loadtest.subscriber PORT LAST_DEVICE RECORD_FILE

QoS 1 and a session that outlives connections: a broker that goes away loses nothing of ours, so
what is missing at the end was never published. Says "subscribed" on standard error. When an event
of LAST_DEVICE has come, all before it have (one connection publishes, in the order of the log), and
the record is written; SIGTERM ends it as well, with "complete": false.

The record: {"complete", "repeated", "foreign", "arrived": {"device/boot": ranges}}, and beside it,
with the suffix .times, pairs of int64: when an event was sent and when it arrived first, in ns of
CLOCK_REALTIME.
"""

import array
import gc
import json
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.peers import mqtt_wire
from loadtest import accounts

TOPIC = "telemetry/"
EVENT = re.compile(rb'"boot":(\d+).*"seq":(\d+).*"sent_ns":(\d+)', re.DOTALL).search
SESSION_S = 3600
RETRY_S = 0.05


class Record:
    """What arrived, in memory until the end."""

    def __init__(self) -> None:
        self.arrived: accounts.Seqs = {}
        self.times = array.array("q")
        self.repeated = self.foreign = 0
        self.complete = False

    def take(self, topic: bytes, payload: bytes, now_ns: int) -> None:
        """One message."""
        found = EVENT(payload)
        if found is None:
            self.foreign += 1
            return
        boot, seq, sent_ns = found.groups()
        key = f"{topic.decode().removeprefix(TOPIC)}/{boot.decode()}"
        seqs = self.arrived.setdefault(key, set())
        number = int(seq)
        if number in seqs:
            self.repeated += 1
        else:
            seqs.add(number)
            self.times.append(int(sent_ns))
            self.times.append(now_ns)

    def write(self, path: Path) -> None:
        """Both files."""
        with path.with_suffix(".times").open("wb") as output:
            self.times.tofile(output)
        path.write_text(
            json.dumps(
                {
                    "complete": self.complete,
                    "repeated": self.repeated,
                    "foreign": self.foreign,
                    "arrived": accounts.pack(self.arrived),
                }
            )
        )


class Arrivals(NamedTuple):
    """A record that was read back."""

    complete: bool
    repeated: int
    foreign: int
    arrived: accounts.Seqs
    times: list[tuple[int, int]]
    """(sent, arrived) in ns of CLOCK_REALTIME, in the order of arrival."""


def read(path: Path) -> Arrivals:
    """What `Record.write` wrote."""
    numbers = array.array("q", path.with_suffix(".times").read_bytes())
    said = json.loads(path.read_text())
    return Arrivals(
        said["complete"],
        said["repeated"],
        said["foreign"],
        accounts.unpack(said["arrived"]),
        list(zip(numbers[::2], numbers[1::2], strict=True)),
    )


def listen(port: int, last: bytes, record: Record) -> None:
    """One connection. Raises OSError when it ends before the last event."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(mqtt_wire.connect("loadtest-subscriber", SESSION_S))
        parser = mqtt_wire.Parser()
        while True:
            data = connection.recv(1 << 20)
            now_ns = time.time_ns()
            if not data:
                raise ConnectionError("the broker closed the connection")
            acks = bytearray()
            for first, body in parser.feed(data):
                kind = first & 0xF0
                if kind == mqtt_wire.PUBLISH:
                    topic = body[2 : 2 + int.from_bytes(body[:2], "big")]
                    if first & 0x06:
                        acks += mqtt_wire.puback(mqtt_wire.packet_id(body))
                    if topic == last:
                        record.complete = True
                    else:
                        record.take(topic, mqtt_wire.payload(first, body), now_ns)
                elif kind == mqtt_wire.CONNACK:
                    if body[1]:
                        raise ValueError(f"the broker refused the subscriber: {body[1]:#x}")
                    connection.sendall(mqtt_wire.subscribe(TOPIC + "#", qos=1))
                elif kind == mqtt_wire.SUBACK:
                    if body[-1] != 1:
                        raise ValueError(f"the broker granted no QoS 1: {body[-1]:#x}")
                    print("subscribed", file=sys.stderr, flush=True)
            if acks:
                connection.sendall(acks)
            if record.complete:
                return


def main() -> int:
    """The whole life of the program."""
    port, last, path = int(sys.argv[1]), (TOPIC + sys.argv[2]).encode(), Path(sys.argv[3])
    record = Record()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    gc.disable()  # nothing here makes cycles, and a pause would be counted as a late delivery
    try:
        while not record.complete:
            try:
                listen(port, last, record)
            except OSError:
                time.sleep(RETRY_S)
    finally:
        record.write(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
