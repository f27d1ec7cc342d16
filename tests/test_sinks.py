"""Several sinks beside each other, in whole gateways: each gets every event, none holds another,
and the books of each balance (guarantees 3-5, 19)."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.children import HUNG_S
from gateway.errors import Exit
from tests import brokers
from tests.gateway_process import ROOT, GatewayProcess, Valve, free_port, wait_for

PADDING = "x" * 20_000
"""Some fifty such events fill the smallest log."""
JSON = {"Content-Type": "application/json"}


class Recorder(Valve):
    """A broker that takes everything and keeps each event's seq."""

    def __init__(
        self, port: int = 0, refused: Collection[int] = (), poison: Collection[int] = ()
    ) -> None:
        """Of the seqs in `refused` it says, after a while, that it will never take them; those in
        `poison` end its connection."""
        super().__init__()
        self.wanted_port, self.refused, self.poison = port, refused, poison
        self.seqs: list[int] = []

    async def _serve(self) -> None:
        async with brokers.ScriptedBroker(self._play, port=self.wanted_port) as broker:
            self.port = broker.port
            await self._end.wait()

    async def _play(self, peer: brokers.Peer) -> None:
        await peer.accept()
        while True:
            first, body = await peer.packet()
            if first >> 4 == brokers.PINGREQ:
                peer.send(brokers.packet(brokers.PINGRESP << 4, b""))
            elif first >> 4 != brokers.PUBLISH:
                return
            else:
                publish = brokers.read_publish(first, body)
                self.seqs.append(json.loads(publish.payload)["seq"])
                if self.seqs[-1] in self.refused:
                    await asyncio.sleep(1)
                    peer.send(brokers.puback(publish.id, 0x87))
                elif self.seqs[-1] in self.poison:
                    await asyncio.sleep(0.3)
                    return
                else:
                    peer.send(brokers.puback(publish.id))


class Site:
    """A gateway with a folder for files, and a broker or the port of one that is away."""

    def __init__(self, folder: Path, broker: str = "", **settings: object) -> None:
        self.files = folder / "files"
        self.gateway = GatewayProcess(
            folder,
            {
                "mqtt.url": broker,
                "file.directory": self.files,
                "mqtt.backoff_base_ms": 10,
                "mqtt.backoff_max_ms": 100,
                **{key.replace("__", "."): value for key, value in settings.items()},
            },
        )
        self.sent: list[int] = []

    def send(self, count: int, padding: str = "", ack: str = "") -> list[int]:
        """The statuses of so many events; those that were accepted are in `sent`."""
        statuses = []
        for _ in range(count):
            seq = len(self.sent) + 1
            body = {"seq": seq, "metrics": {"n": seq}, "payload": padding}
            statuses.append(
                self.gateway.request(
                    "POST", f"/v1/ingest/dev{ack}", json.dumps(body).encode(), JSON
                )[0]
            )
            if statuses[-1] in (200, 202, 504):
                self.sent.append(seq)
        return statuses

    def lines(self) -> list[dict[str, Any]]:
        """What stands in the files, in their order; a line without its end is none."""
        found = []
        for path in sorted(self.files.glob("events-*")):
            for line in path.read_bytes().splitlines(keepends=True):
                assert line.endswith(b"\n"), path
                found.append(json.loads(line))
        return found

    def seqs(self) -> list[int]:
        return [line["event"]["seq"] for line in self.lines()]

    def sink(self, name: str) -> dict[str, Any]:
        sink: dict[str, Any] = self.gateway.health()["sinks"][name]
        return sink

    def has_all(self, name: str) -> Callable[[], bool]:
        return lambda: self.sink(name)["lag_events"] == 0

    def has_room(self) -> bool:
        """The head has passed what the required sinks have: a commit says so."""
        return bool(self.gateway.health()["log"]["used_bytes"] < 200_000)

    def books(self, name: str) -> dict[str, float]:
        """Of one sink, from /metrics."""
        found = re.compile(rf'gateway_sink_(\w+)\{{sink="{name}"\}}').fullmatch
        return {
            match[1]: value
            for key, value in self.gateway.metrics().items()
            if (match := found(key)) is not None
        }


def away() -> str:
    return f"mqtt://127.0.0.1:{free_port()}"


@contextlib.contextmanager
def running(site: Site) -> Iterator[Site]:
    with site.gateway:
        yield site


def test_each_sink_gets_every_event(tmp_path: Path) -> None:
    with Recorder() as broker, running(Site(tmp_path, f"mqtt://127.0.0.1:{broker.port}")) as site:
        assert site.send(60) == [202] * 60
        assert site.send(1, ack="?ack=sink") == [200]
        assert site.seqs() == site.sent, "ack=sink: it is in the file before the answer"
        assert broker.seqs == site.sent
        lsns = [line["lsn"] for line in site.lines()]
        assert lsns == sorted(set(lsns))
        assert {line["device_id"] for line in site.lines()} == {"dev"}
        for name in ("mqtt", "file"):
            books = site.books(name)
            assert books["events_confirmed_total"] == 61
            assert (books["events_skipped_total"], books["unexplained_events"]) == (0, 0)
            assert (books["lag_events"], books["up"], books["required"]) == (0, 1, 1)
        assert site.gateway.metric("gateway_events_published_total") == 61
        assert site.gateway.health()["problems"] == []
        assert f"sinks: mqtt to mqtt://127.0.0.1:{broker.port}, mode" in site.gateway.output()
        assert f"; file in {site.files}\n" in site.gateway.output()


def test_a_broker_that_is_away_holds_its_own_cursor_only(tmp_path: Path) -> None:
    with running(Site(tmp_path, away(), http__sink_deadline_ms=300)) as site:
        site.send(30)
        wait_for(site.has_all("file"))
        wait_for(lambda: site.seqs() == site.sent)
        health = site.gateway.health()
        assert health["sinks"]["mqtt"]["lag_events"] == 30
        assert health["problems"] == ["not connected to the broker"]
        assert site.send(1, ack="?ack=sink") == [504], "both are required"
        books = site.books("mqtt")
        assert (books["lag_events"], books["up"]) == (31, 0)
        assert books["lag_seconds"] > 0
        assert books["lag_bytes"] == site.gateway.metric("gateway_log_bytes_used")
        wait_for(site.has_all("file"))
        books = site.books("file")
        assert (books["lag_events"], books["lag_bytes"], books["lag_seconds"]) == (0, 0, 0)


def test_a_folder_that_cannot_be_used_holds_the_log_and_not_the_broker(tmp_path: Path) -> None:
    with Recorder() as broker:
        site = Site(tmp_path, f"mqtt://127.0.0.1:{broker.port}")
        site.files.write_text("no folder")
        with running(site):
            while site.send(1, PADDING) == [202]:
                assert len(site.sent) < 200
            assert len(site.sent) > 40
            wait_for(site.has_all("mqtt"), what="the broker has all")
            assert broker.seqs == site.sent
            problems = "\n".join(site.gateway.health()["problems"])
            assert "the log is full" in problems
            assert "file is furthest behind" in problems
            assert "the file sink is held" in problems
            assert str(site.files) in site.sink("file")["last_error"]
            site.files.unlink()
            wait_for(site.has_all("file"), what="it begins by itself once there is a folder")
            wait_for(lambda: site.send(1) == [202], what="there is room again")
            wait_for(lambda: site.seqs() == site.sent)
            wait_for(lambda: site.gateway.health()["status"] == "ok")


def test_a_file_sink_that_is_not_required_is_passed(tmp_path: Path) -> None:
    with Recorder() as broker:
        url = f"mqtt://127.0.0.1:{broker.port}"
        site = Site(tmp_path, url, file__required="false")
        site.files.write_text("no folder")
        with running(site):
            for _ in range(15):  # three logs full
                assert site.send(9, PADDING) == [202] * 9
                assert site.send(1, PADDING, ack="?ack=sink") == [200]
                wait_for(site.has_room)
            assert broker.seqs == site.sent, "unharmed"
            site.files.unlink()
            wait_for(site.has_all("file"))
            site.send(1)
            wait_for(lambda: site.seqs()[-1:] == site.sent[-1:])
            wait_for(site.has_all("file"))
            books = site.books("file")
            lines = site.seqs()
            assert lines == sorted(set(lines)), "in order, none twice"
            assert books["events_skipped_total"] > 50
            assert books["events_confirmed_total"] == len(lines)
            assert len(lines) + books["events_skipped_total"] == len(site.sent)
            assert (books["unexplained_events"], books["required"]) == (0, 0)
            assert site.books("mqtt")["events_skipped_total"] == 0
            assert site.gateway.metric("gateway_unexplained_events") == 0
            skipped = site.sink("file")["skipped"]
            assert skipped == books["events_skipped_total"]
            said = f"file was too far behind: {skipped} events were given up for it so far"
            assert said in "\n".join(site.gateway.health()["problems"])
        assert "not required" in site.gateway.output()


def test_a_broker_that_is_not_required_is_passed(tmp_path: Path) -> None:
    port = free_port()
    site = Site(tmp_path, f"mqtt://127.0.0.1:{port}", mqtt__required="false")
    with running(site):
        for _ in range(15):  # three logs full
            assert site.send(9, PADDING) == [202] * 9
            assert site.send(1, PADDING, ack="?ack=sink") == [200], "the file alone"
            wait_for(site.has_room)
        assert site.seqs() == site.sent
        assert site.sink("mqtt")["lag_events"] == len(site.sent)
        delivery = site.gateway.children()["delivery"]
        with Recorder(port) as broker:
            wait_for(site.has_all("mqtt"), what="it goes on where the log still has something")
            site.send(20)
            wait_for(lambda: broker.seqs[-1:] == site.sent[-1:])
            wait_for(site.has_all("mqtt"))
            books = site.books("mqtt")
            assert books["events_skipped_total"] > 50
            assert books["events_confirmed_total"] == len(set(broker.seqs))
            assert books["events_confirmed_total"] + books["events_skipped_total"] == len(site.sent)
            assert (books["unexplained_events"], books["required"]) == (0, 0)
            assert site.books("file")["unexplained_events"] == 0
        assert site.gateway.children()["delivery"] == delivery
        assert site.gateway.health()["log"]["state"] == "running"
        assert "the log is corrupt" not in site.gateway.output()


@pytest.mark.parametrize("how", ["refused", "poison"])
def test_what_a_broker_that_is_not_required_never_takes_is_set_aside_once(
    tmp_path: Path, how: str
) -> None:
    with Recorder(**{how: {2}}) as broker:
        site = Site(
            tmp_path,
            f"mqtt://127.0.0.1:{broker.port}",
            mqtt__required="false",
            log__commit_interval_ms=10,
        )
        with running(site):
            site.send(3)
            wait_for(site.has_room)  # the head is past what the broker is about to refuse
            wait_for(site.has_all("mqtt"))
            metrics = site.gateway.metrics()
            assert site.books("mqtt")["events_confirmed_total"] == 2
            assert metrics["gateway_events_dead_lettered_total"] == 1
            assert metrics["gateway_unexplained_events"] == 0
            site.send(1)
            wait_for(site.has_all("mqtt"))
            (letters,) = tmp_path.glob("**/dead-letters/*.ndjson")
            assert len(letters.read_text().splitlines()) == 1
        assert sorted(set(broker.seqs)) == [1, 2, 3, 4]
        assert broker.seqs.count(2) <= (1 if how == "refused" else 4), "mqtt.poison_attempts is 3"
        assert "failed" not in site.gateway.output()


def test_files_alone_are_a_gateway(tmp_path: Path) -> None:
    site = Site(tmp_path, log__commit_interval_ms=60_000, file__sync_interval_ms=60_000)
    with running(site):
        began_s = time.monotonic()
        assert site.send(1, ack="?ack=sink") == [200]
        assert time.monotonic() - began_s < 1, "nobody waits for an interval"
        assert site.seqs() == [1]
        site.send(20)
        health = site.gateway.health()
        assert "mqtt" not in health
        assert list(health["sinks"]) == ["file"]
        assert site.gateway.stop() == 0
        assert "not in a file yet" not in site.gateway.output()
    assert site.seqs() == site.sent
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gateway", "dead-letters", "ls"),
            *("--set", f"log.directory={tmp_path / 'log'}"),
            *("--set", f"file.directory={site.files}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0
    assert "There are none with this configuration: no broker is set" in done.stdout


def test_lines_stand_once_after_sigkill(tmp_path: Path) -> None:
    with Recorder() as broker:
        site = Site(
            tmp_path,
            f"mqtt://127.0.0.1:{broker.port}",
            file__sync_interval_ms=5,
            file__file_bytes_max=65536,
        )
        with running(site):
            for kill in range(4):
                site.send(40, "y" * 1000)
                delivery = wait_for(lambda: site.gateway.children()["delivery"])
                os.kill(delivery[0], signal.SIGKILL)
                site.send(10 + kill)
        for _ in range(2):  # the `with` above ended with SIGKILL of everything
            site.gateway.start()
            site.send(40, "y" * 1000)
            site.gateway.kill()
        with running(site):
            wait_for(site.has_all("file"))
            wait_for(site.has_all("mqtt"))
            books = site.books("file")
            assert books["events_confirmed_total"] == len(site.sent)
            assert books["unexplained_events"] == 0
        assert site.seqs() == site.sent, "once, in order"
        assert Counter(broker.seqs).keys() == set(site.sent), "at least once"
        assert len(list(site.files.glob("events-*.ndjson"))) > 1


def test_a_sink_with_events_is_given_up_by_name_only(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    site = Site(folder, away())
    with running(site):
        site.send(5)
        wait_for(site.has_all("file"))
    site.gateway.settings["mqtt.url"] = ""
    site.gateway.start(ready=False)
    assert site.gateway.process is not None
    assert site.gateway.process.wait(20) == Exit.LOG_UNUSABLE
    said = site.gateway.output().replace("\n", " ")
    assert "5 events wait for the sink mqtt, which is not configured any more" in said
    assert (
        "configure it again (mqtt.url), or give up what waits with --set log.forget_sink=mqtt"
        in said
    )
    site.gateway.settings["log.forget_sink"] = "mqtt"
    with running(site):
        assert list(site.gateway.health()["sinks"]) == ["file"]
        assert site.send(1, ack="?ack=sink") == [200]
        assert site.gateway.metric("gateway_unexplained_events") == 0
    del site.gateway.settings["log.forget_sink"]
    with running(site):  # nothing of it is left
        assert site.send(1, ack="?ack=sink") == [200]
    assert site.seqs() == site.sent


def test_a_sink_without_events_goes_silently_and_comes_back(tmp_path: Path) -> None:
    with Recorder() as broker:
        url = f"mqtt://127.0.0.1:{broker.port}"
        site = Site(tmp_path, url)
        with running(site):
            assert site.send(3, ack="?ack=sink") == [200] * 3
            assert site.gateway.stop() == 0
        site.gateway.settings["mqtt.url"] = ""
        with running(site):
            assert list(site.gateway.health()["sinks"]) == ["file"]
            assert site.send(3, ack="?ack=sink") == [200] * 3
            assert site.gateway.stop() == 0
        site.gateway.settings["mqtt.url"] = url
        with running(site):
            assert site.send(3, ack="?ack=sink") == [200] * 3
            for name, count in (("file", 9), ("mqtt", 3)):
                books = site.books(name)
                assert books["unexplained_events"] == 0, name
                assert books["events_confirmed_total"] == count, name
        assert site.seqs() == site.sent
        assert broker.seqs == [1, 2, 3, 7, 8, 9]


def test_a_rolling_restart_loses_no_line(tmp_path: Path) -> None:
    with Recorder() as broker, running(Site(tmp_path, f"mqtt://127.0.0.1:{broker.port}")) as site:
        before = site.gateway.children()["delivery"]
        os.kill(site.gateway.pid, signal.SIGHUP)
        while site.gateway.children()["delivery"] in (before, []):
            assert site.send(1) == [202]
            assert len(site.sent) < 20_000
        assert site.send(1, ack="?ack=sink") == [200]
        assert site.seqs() == site.sent
        assert set(broker.seqs) == set(site.sent)


# ---- a disk that hangs, a sink that fails ---------------------------------------------------


def with_disk(site: Site, body: str) -> Path:
    """Make fdatasync and fsync of the gateway's Python do `body` first while the file that is
    returned exists. The log is synced by compiled code."""
    folder = site.gateway.directory / "patched"
    folder.mkdir(parents=True)
    flag = folder / "flag"
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(
            f"""
            import os, time
            def patched(real):
                def sync(fd):
                    {body}
                    return real(fd)
                return sync
            flag = {str(flag)!r}
            os.fsync, os.fdatasync = patched(os.fsync), patched(os.fdatasync)
            """
        )
    )
    site.gateway.environment["PYTHONPATH"] = str(folder)
    return flag


def test_a_disk_that_hangs_holds_the_file_sink_only(tmp_path: Path) -> None:
    with Recorder() as broker:
        site = Site(tmp_path, f"mqtt://127.0.0.1:{broker.port}")
        flag = with_disk(site, "while os.path.exists(flag): time.sleep(0.01)")
        with running(site):
            assert site.send(1, ack="?ack=sink") == [200]
            delivery = site.gateway.children()["delivery"]
            flag.touch()
            until_s = time.monotonic() + HUNG_S + 2
            while time.monotonic() < until_s:
                site.send(1)
                wait_for(lambda: broker.seqs == site.sent, 2, "the broker gets it at once")
                time.sleep(0.2)
            assert site.gateway.children()["delivery"] == delivery
            assert site.gateway.metric("gateway_delivery_killed_hung_total") == 0
            assert site.sink("file")["lag_events"] == len(site.sent) - 1
            wait_for(lambda: site.sink("file")["state"] == "stuck")
            assert "the file sink is stuck" in "\n".join(site.gateway.health()["problems"])
            flag.unlink()
            wait_for(site.has_all("file"))
            assert site.seqs() == site.sent


def test_a_sink_that_fails_is_made_anew_and_the_other_goes_on(tmp_path: Path) -> None:
    with Recorder() as broker:
        site = Site(tmp_path, f"mqtt://127.0.0.1:{broker.port}")
        flag = with_disk(site, "if os.path.exists(flag): raise ZeroDivisionError('unforeseen')")
        with running(site):
            delivery = site.gateway.children()["delivery"]
            flag.touch()
            site.send(3)
            wait_for(lambda: "the sink file failed; the others go on" in site.gateway.output())
            site.send(3)
            wait_for(lambda: broker.seqs == site.sent, 2)
            flag.unlink()
            wait_for(site.has_all("file"))
            assert site.seqs() == site.sent
            assert broker.seqs == site.sent
            assert site.gateway.children()["delivery"] == delivery


def test_a_disk_that_hangs_does_not_keep_the_end_from_coming(tmp_path: Path) -> None:
    with Recorder() as broker:
        site = Site(
            tmp_path,
            f"mqtt://127.0.0.1:{broker.port}",
            file__required="false",
            http__drain_deadline_ms=500,
        )
        flag = with_disk(site, "while os.path.exists(flag): time.sleep(0.01)")
        with running(site):
            flag.touch()
            site.send(3)
            wait_for(site.has_all("mqtt"))
            assert site.gateway.stop() == 0
            assert "3 events are not in a file yet; they stay in the log" in site.gateway.output()
            flag.unlink()
        with running(site):
            wait_for(site.has_all("file"))
            assert site.seqs() == site.sent
            assert broker.seqs == site.sent
