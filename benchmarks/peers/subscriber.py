"""Receives COUNT different events over MQTT and prints how long each one took, as JSON.

    python -m benchmarks.peers.subscriber PORT COUNT TIMEOUT_S

Each payload says when it was due ("due_ns", CLOCK_MONOTONIC); it has arrived when recv() returns
with its last byte. Prints "subscribed", then {"arrived": n, "repeated": n, "microseconds": [...]}
in the order of arrival. Ends with 1 when events are missing after TIMEOUT_S without a new one.
"""

import json
import re
import sys
import time

from benchmarks.peers import mqtt_wire

DUE = re.compile(rb'"due_ns":(\d+)').search


def main() -> int:
    """The whole life of the program."""
    port, count, timeout_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    connection, parser = mqtt_wire.dial(port, "bench-subscriber")
    connection.sendall(mqtt_wire.subscribe("telemetry/#"))
    seen: set[int] = set()
    took: list[float] = []
    repeated = 0
    connection.settimeout(timeout_s)
    while len(seen) < count:
        try:
            data = connection.recv(1 << 20)
        except TimeoutError:
            break
        now = time.monotonic_ns()
        if not data:
            break
        for first, body in parser.feed(data):
            if first == mqtt_wire.SUBACK:
                print("subscribed", file=sys.stderr, flush=True)
            elif first & 0xF0 == mqtt_wire.PUBLISH:
                found = DUE(mqtt_wire.payload(first, body))
                if found is None:
                    raise ValueError(f"not one of ours: {body!r}")
                due_ns = int(found[1])
                if due_ns in seen:
                    repeated += 1
                else:
                    seen.add(due_ns)
                    took.append((now - due_ns) / 1000)
    print(json.dumps({"arrived": len(seen), "repeated": repeated, "microseconds": took}))
    return 0 if len(seen) == count else 1


if __name__ == "__main__":
    sys.exit(main())
