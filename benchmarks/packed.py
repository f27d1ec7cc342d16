"""How many events a second leave a full log in packed messages?

The real delivery process with `mqtt.mode=packed` on a log that was filled before, into Mosquitto
without a subscriber and without limits, beside peers/raw_publish.c: messages of the same size,
packed before, in the same window. Events are counted by the cursor, from its first move to its
last; the raw socket's messages are counted by their PUBACKs.

    packed_events_per_second   events of 64 devices, each message of one device, up to 64 KiB
"""

import itertools
from typing import Final

from benchmarks import compiled, events, logs
from benchmarks.harness import Benchmark, Context, Failed, Figure, compare, interleave
from benchmarks.peers import mqtt_wire
from benchmarks.publisher import DEVICES, TOPIC, Delivery, Source, raw
from benchmarks.servers import Mosquitto

NAME: Final = "packed_events_per_second"
PACK_BYTES_MAX: Final = 65536
SETTINGS: Final = ("mqtt.mode=packed", f"mqtt.pack_bytes_max={PACK_BYTES_MAX}")


def messages(bodies: list[bytes]) -> list[bytes]:
    """What a publisher may send for them: a device's events, line by line, as many as have room."""
    lines: dict[str, list[bytes]] = {}
    for number, body in enumerate(bodies):
        device = events.device(number % DEVICES)
        line = b'{"device_id":"%s","lsn":%d,%s\n' % (device.encode(), 10**9 + number, body[1:])
        lines.setdefault(device, []).append(line)
    made: list[bytes] = []
    for device, of in lines.items():
        room = PACK_BYTES_MAX // max(map(len, of))
        for at in range(0, len(of), room):
            payload = b"".join(of[at : at + room])
            made.append(mqtt_wire.publish(TOPIC + device, payload, len(made) % 65535 + 1))
    return made


def measure(context: Context) -> dict[str, Figure]:
    """Both in turn, with fresh events."""
    program = compiled.executable("raw_publish", context.directory)
    source = Source(400_000)
    path = logs.create(context.directory / "log", 128 * logs.MIB)
    with (
        Mosquitto(context.directory / "mosquitto", limits=False) as broker,
        logs.opened(path) as (log, lock_fd),
    ):
        delivery = Delivery(log, lock_fd, broker, source, *SETTINGS)
        made = messages(list(itertools.islice(events.stream(events.reference), source.count)))

        def reference() -> float:
            rate = raw(program, broker, made, delivery.inflight_max, context.directory)
            return rate * source.count / len(made)

        found = interleave({"gateway": delivery, "raw": reference}, context.pick(2, 3), context)
        broker.check()
        if gap := log.unexplained(log.sink(logs.SINK)):
            raise Failed(f"{gap} events unexplained")
    note = f"{source.count:,} events a round, {source.count / len(made):.0f} a message"
    return {NAME: compare(found["gateway"], found["raw"], "events/s", note)}


BENCHMARKS: Final = [
    Benchmark({NAME: "a raw socket in C that sends messages of the same size"}, measure)
]
