"""The storm on the front door, short; and doors that it must find out."""

import random

from tests import door_storm
from tests.mutant_gateway import package

SLOWEST_MS = 3000
"""On a machine that also runs other tests; the command asks for less."""


def test_each_request_is_answered_once_and_none_waits_long(tmp_path):
    seed = random.SystemRandom().getrandbits(32)
    result = door_storm.run(tmp_path, 6, 48, seed, kill_every_s=2.5)
    print(result)
    assert result.ok(SLOWEST_MS), result
    assert result.kills >= 1
    assert result.cut > 50
    assert result.answered > 2000


def test_storm_finds_an_answer_to_another_request(tmp_path):
    root = package(
        tmp_path / "mutant",
        python={
            "worker.py": [
                (
                    "        return http.refusal(self._why(code), ingest.field, ingest.offset)",
                    "        self._last = getattr(self, '_next', ingest.field)\n"
                    "        self._next = ingest.field\n"
                    "        return http.refusal(self._why(code), self._last, ingest.offset)",
                )
            ]
        },
    )
    result = door_storm.run(tmp_path, 2, 8, seed=1, root=root)
    assert any("the answer to another request" in line for line in result.wrong), result


def test_storm_finds_a_door_that_stands_still(tmp_path):
    root = package(
        tmp_path / "mutant",
        python={
            "worker.py": [
                (
                    "        return http.refusal(self._why(code), ingest.field, ingest.offset)",
                    "        time.sleep(1.2 * (time.monotonic_ns() % 50 == 0))\n"
                    "        return http.refusal(self._why(code), ingest.field, ingest.offset)",
                )
            ]
        },
    )
    result = door_storm.run(tmp_path, 4, 16, seed=1, root=root)
    assert not result.wrong, result
    assert not result.ok(1000), result
