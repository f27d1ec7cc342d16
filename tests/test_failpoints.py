"""Each point of the native core at which a process may die or be stopped, under each
acknowledgement, in a whole gateway (guarantees 2, 3, 9, 11, 20).

A build with fail points gets GW_FAILPOINT=name:N:signal:file: the first process that passes the
point for the Nth time and removes the file gets the signal, and no other. Devices send meanwhile,
with one acknowledgement each, and repeat until they are answered; tests/history.py judges. A
process that is stopped goes on after STOPPED_S, unless the gateway has killed it before."""

import asyncio
import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import uvloop

from tests import history
from tests.gateway_process import stat_fields
from tests.history import Attempt, Event, Nemesis
from tests.mutant_gateway import Edits, Native, package
from tests.torture import Recording, Stage
from tests.torture_clients import Device

PRODUCER = (
    "before_claim", "after_intent", "after_claim", "mid_copy", "before_index", "before_marker",
    "after_marker",
)  # fmt: skip
"""Passed by a worker for each event."""
COMMITTER = ("before_slot", "mid_slot", "after_slot", "after_sync", "after_durable")
"""Passed by the delivery process for each sync."""
ACKS = ("enqueue", "durable", "sink")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
PASSES = 6
"""The Nth pass: a committer passes a few times before the first event."""
STOPPED_S = 0.6
"""A stopped producer that holds up the log is killed after 0.3 s."""
DELAY_MAX_S = 2.0
"""From the first attempt of any event to its 2xx: guarantee 20, and what this gateway itself took
to start, since a busy machine starts processes late."""
AT_ONCE = 4


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    points = Native(flags=("-DGW_FAILPOINTS",))
    return package(tmp_path_factory.mktemp("failpoints"), native={"_log": points})


class Case(Stage):
    """One gateway, one point, one acknowledgement, one signal."""

    def __init__(self, directory: Path, root: Path, point: str, ack: str, name: str) -> None:
        directory.mkdir()
        super().__init__(directory, Recording(directory, []), {"mqtt.backoff_base_ms": 50}, 0, root)
        self.armed = directory / "armed"
        self.armed.touch()
        self.point, self.name = point, name
        self.start_s = 0.0
        self.gateway.environment["GW_FAILPOINT"] = (
            f"{point}:{PASSES}:{int(SIGNALS[name])}:{self.armed}"
        )
        self.devices = [
            Device(f"d-{i}", self.network, [ack], random.Random(f"{point} {ack} {name} {i}"), 0.0)
            for i in range(4)
        ]

    async def run(self) -> history.Verdict:
        try:
            began = time.monotonic()
            await self.start()
            self.start_s = time.monotonic() - began
            clients = [asyncio.create_task(device.run(0.01)) for device in self.devices]
            async with asyncio.timeout(15):
                while self.armed.exists():
                    await asyncio.sleep(0.005)
            self.write(Nemesis(time.monotonic(), "point", self.name))
            if self.name == "stop":
                await asyncio.sleep(STOPPED_S)
                for pid in self.gateway.child_pids():
                    if (stat_fields(pid) or "?")[0] == "T":
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.3)
            for device in self.devices:
                device.stopped = True
            async with asyncio.timeout(15):
                await asyncio.gather(*clients)
            return await self.judge()
        finally:
            await self.stop()

    def wrong(self, verdict: history.Verdict) -> list[str]:
        """Everything that is not as promised."""
        found = list(self.problems)
        if not verdict.ok or not verdict.accepted:
            found.append(str(verdict))
        if self.point in PRODUCER and verdict.repeated:
            # nobody published twice, so the log has two records of one event
            found.append(f"{verdict.repeated} arrived twice")
        delay_s = longest_delay_s(self.file)
        if delay_s > DELAY_MAX_S + self.start_s:
            found.append(f"an event was accepted after {delay_s:.2f} s")
        return found


def longest_delay_s(file: Path) -> float:
    """From the first attempt of an event to its first 2xx."""
    sent: dict[Event, float] = {}
    accepted: dict[Event, float] = {}
    for row in history.read(file):
        if isinstance(row, Attempt):
            sent.setdefault(row.event, row.sent)
            if row.accepted:
                accepted.setdefault(row.event, row.answered)
    return max((at - sent[event] for event, at in accepted.items()), default=0.0)


async def all_cases(folder: Path, root: Path, point: str) -> dict[str, list[str]]:
    """{"ack signal": what is wrong} of one point, some at a time."""
    wrong: dict[str, list[str]] = {}
    places = asyncio.Semaphore(AT_ONCE)

    async def one(ack: str, name: str) -> None:
        async with places:
            case = Case(folder / f"{ack}-{name}", root, point, ack, name)
            try:
                verdict = await case.run()
            except (TimeoutError, AssertionError) as error:
                wrong[f"{ack} {name}"] = [repr(error), case.gateway.output()[-1500:]]
                return
            print(f"{point} {ack} {name}: {verdict.accepted} accepted", end=", ")
            print(f"longest delay {longest_delay_s(case.file):.2f} s")
            if found := case.wrong(verdict):
                wrong[f"{ack} {name}"] = found

    await asyncio.gather(*(one(ack, name) for ack in ACKS for name in SIGNALS))
    return wrong


@pytest.mark.parametrize("point", [*PRODUCER, *COMMITTER])
def test_nothing_is_lost_doubled_or_late_though_a_process_is_hit_at(point, build, tmp_path):
    wrong = uvloop.run(all_cases(tmp_path, build, point))
    assert not wrong, "\n".join(f"{case}: {line}" for case, what in wrong.items() for line in what)


def wrong_with(folder: Path, edits: dict[str, Edits], point: str, ack: str) -> list[str]:
    """What is found in a build with a fault when a process is killed at the point."""
    build = Native(edits, ("-DGW_FAILPOINTS",))
    root = package(folder / "build", native={"_log": build})
    case = Case(folder / "run", root, point, ack, "kill")
    return case.wrong(uvloop.run(case.run()))


def test_control_without_dedupe_what_was_committed_before_the_death_is_there_twice(tmp_path):
    blind = (".flags = verdict->flags,", ".flags = verdict->flags & ~GW_EVENT_HAS_SEQ,")
    wrong = wrong_with(tmp_path, {"gw_ingest.c": [blind]}, "after_marker", "enqueue")
    assert any("arrived twice" in what for what in wrong), wrong
