"""FastAPI, pydantic with the same rules, uvicorn, and aiomqtt with QoS 1: the usual Python stack.

A 202 is sent after the PUBACK. Run by uvicorn in the environment of requirements/fastapi.txt.
Environment: PEER_MQTT_PORT.
"""

import contextlib
import logging
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

import aiomqtt
from fastapi import FastAPI, Path, Request, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

Key = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Tag = Annotated[str, StringConstraints(max_length=128)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
DeviceId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Event(BaseModel):
    """One event; the depth of its payload is not bounded."""

    model_config = ConfigDict(extra="forbid")

    metrics: Annotated[dict[Key, Number], Field(max_length=32)]
    tags: Annotated[dict[Key, Tag], Field(max_length=16)] | None = None
    ts: AwareDatetime | None = None
    seq: Count | None = None
    boot: Count | None = None
    payload: Any = None


@contextlib.asynccontextmanager
async def _connected(app: FastAPI) -> AsyncIterator[None]:
    logging.getLogger("mqtt").setLevel(logging.ERROR)  # warns of each publish beyond ten at once
    port = int(os.environ["PEER_MQTT_PORT"])
    async with aiomqtt.Client("127.0.0.1", port) as client:
        app.state.publish = client.publish
        yield


async def ingest(device_id: DeviceId, event: Event, request: Request) -> Response:
    """What is published is the body as it came; the answer is made without a model."""
    await request.app.state.publish("telemetry/" + device_id, await request.body(), qos=1)
    return Response(b'{"ack":"sink"}', 202, media_type="application/json")


app = FastAPI(lifespan=_connected)
app.add_api_route("/v1/ingest/{device_id}", ingest, methods=["POST"], response_model=None)
