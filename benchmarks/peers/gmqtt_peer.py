"""The best ordinary peer: Granian RSGI, msgspec with the same rules, gmqtt with QoS 1, and a 202
from memory.

gmqtt has no window: it raises OverflowError when Receive Maximum packets are out. What it does not
take waits in a deque and goes out as PUBACKs come. A 202 of this peer means that the event stands
in a queue of this process; what the broker confirms is counted apart, for GET /stats: {"accepted":
n, "acknowledged": n}. Environment: PEER_MQTT_PORT.
"""

import asyncio
import json
import os
import re
from collections import deque
from typing import Any

import msgspec
from gmqtt import Client
from gmqtt.mqtt.constants import MQTTv50
from gmqtt.storage import PersistentStorage

from benchmarks.peers.msgspec_rules import decode

INGEST = "/v1/ingest/"
HEADERS = [("content-type", "application/json"), ("x-ack", "enqueue")]
BODY = b'{"ack":"enqueue"}'
device_id_at = re.compile(r"[A-Za-z0-9_-]{1,64}").fullmatch


class Outgoing(PersistentStorage):  # type: ignore[misc]
    """gmqtt's own store of what is out, and behind it what gmqtt does not take yet."""

    def __init__(self) -> None:
        super().__init__()
        self.acknowledged = 0
        self.client: Any = None
        self.waiting: deque[tuple[str, bytes]] = deque()
        self._refilling = False

    def publish(self, topic: str, body: bytes) -> None:
        """Now, or after what waits already."""
        if self.waiting:
            self.waiting.append((topic, body))
            return
        try:
            self.client.publish(topic, body, qos=1)
        except OverflowError:
            self.waiting.append((topic, body))

    def remove_message_by_mid(self, mid: int) -> None:
        """A PUBACK came."""
        self.acknowledged += 1
        super().remove_message_by_mid(mid)
        if self.waiting and not self._refilling:
            self._refilling = True
            asyncio.get_running_loop().call_soon(self._refill)

    def _refill(self) -> None:
        self._refilling = False
        try:
            while self.waiting:
                self.client.publish(*self.waiting[0], qos=1)
                self.waiting.popleft()
        except OverflowError:
            pass


class App:
    """One worker."""

    def __init__(self) -> None:
        self.accepted = 0
        self.outgoing = Outgoing()

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(self._connect())

    async def _connect(self) -> None:
        client = Client(f"peer-{os.getpid()}", persistent_storage=self.outgoing)
        await client.connect("127.0.0.1", int(os.environ["PEER_MQTT_PORT"]), version=MQTTv50)
        self.outgoing.client = client

    async def __rsgi__(self, scope: Any, proto: Any) -> None:
        path = scope.path
        if not (path.startswith(INGEST) and scope.method == "POST"):
            self._other(path, proto)
            return
        device_id = path[len(INGEST) :]
        if not device_id_at(device_id):
            proto.response_str(400, [], "device id")
            return
        body = await proto()
        try:
            decode(body)
        except msgspec.DecodeError as error:
            proto.response_str(400, [], str(error))
            return
        self.outgoing.publish("telemetry/" + device_id, body)
        self.accepted += 1
        proto.response_bytes(202, HEADERS, BODY)

    def _other(self, path: str, proto: Any) -> None:
        if path == "/stats":
            stats = {"accepted": self.accepted, "acknowledged": self.outgoing.acknowledged}
            proto.response_str(200, [("content-type", "application/json")], json.dumps(stats))
        else:
            proto.response_str(404, [], "")


app = App()
