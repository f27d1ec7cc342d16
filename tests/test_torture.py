"""Guarantees 1 to 3, 5, 10 to 12 and 20 of the whole gateway: see tests/torture.py.

The controls put one fault into a gateway each; a short run without any blow must find it as what
it is."""

import pytest

from tests import torture
from tests.mutant_gateway import Native, package


def test_everything_is_broken_before_a_broker_that_records():
    report = torture.run("--seconds", "30", "--broker", "recording")
    print(report)
    assert report.ok, str(report)
    answers = report.verdict.answers
    assert min(answers["202 enqueue"], answers["202 durable"], answers["200 sink"]) > 1000
    assert min(report.verdict.duplicates, report.verdict.conflicts) > 100
    assert report.verdict.dead_lettered > 100


def test_everything_is_broken_before_mosquitto():
    report = torture.run("--seconds", "30", "--broker", "mosquitto")
    print(report)
    assert report.ok, str(report)
    assert report.verdict.accepted > 10_000
    assert report.verdict.dead_lettered > 100


def passed(position: str) -> Native:
    """A waiting room that takes a position for passed."""
    return Native({"gw_waiting.c": [(f"{position}(room->log)", "UINT64_MAX")]})


SABOTAGE = {
    "durable is answered before the sync": (
        "acked_early",
        {},
        {"_waiting": passed("gw_log_durable")},
    ),
    "sink is answered at once": (
        "acked_early",
        {
            "waiting.py": [
                (
                    "        super().__init__(\n",
                    """        class Delivered:
            _capsule = log._capsule
            state_of = staticmethod(lambda lsn: "delivered")

        super().__init__(
""",
                ),
                ("*(log, worker, *deadlines,", "*(Delivered(), worker, *deadlines,"),
            ]
        },
        {"_waiting": passed("gw_log_least_cursor")},
    ),
    "a key is accepted again": (
        "doubled",
        {},
        {
            "_log": Native(
                {
                    "gw_ingest.c": [
                        (".flags = verdict->flags,", ".flags = verdict->flags & ~GW_EVENT_HAS_SEQ,")
                    ]
                }
            )
        },
    ),
    "another body passes for a repeat": (
        "misjudged",
        {},
        {
            "_log": Native(
                {
                    "gw_log.c": [
                        ("found == GW_FOUND_SAME ? GW_DUPLICATE : GW_CONFLICT", "GW_DUPLICATE")
                    ]
                }
            )
        },
    ),
    "what is kept is refused": (
        "leaked",
        {},
        {
            "_log": Native(
                {
                    "gw_ingest.c": [
                        (
                            "return count(ingest, GW_CODE_ACCEPTED, started_ns);\n"
                            "    case GW_DUPLICATE:",
                            "return count(ingest, ingest->lsn / 8 % 20 ? 0 : GW_CODE_BAD_SEQ,"
                            " started_ns);\n"
                            "    case GW_DUPLICATE:",
                        )
                    ]
                }
            )
        },
    ),
    "a record is passed over without being published": (
        "lost",
        {},
        {"_mqtt": Native(flags=("-DGW_MUTANT_SKIP=100",))},
    ),
    "a receipt says delivered whatever is so": (
        "false_receipts",
        {
            "worker.py": [
                (
                    'self.log.receipt_state(receipt) if _is_receipt(receipt) else "unknown"',
                    '"delivered"',
                )
            ]
        },
        {},
    ),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_a_fault_that_was_put_in_is_found(what, tmp_path):
    count, python, native = SABOTAGE[what]
    root = package(tmp_path / "mutant", python, native)
    arguments = ("--seconds", "2.5", "--rate", "600", "--devices", "24", "--refused", "0", "--calm")
    report = torture.run(*arguments, "--root", str(root), "--seed", "1")
    print(report)
    assert getattr(report.verdict, count) > 0, str(report)


def test_a_calm_run_without_a_fault_finds_nothing():
    report = torture.run("--seconds", "2.5", "--rate", "600", "--refused", "0", "--calm")
    assert report.ok, str(report)
    assert report.verdict.repeated == 0
