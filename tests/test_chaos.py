"""Invariants 2, 5, 12, 20 of the whole gateway: see tests/chaos.py."""

from tests import chaos


def test_every_202_arrives_though_any_process_is_killed_or_stopped():
    report = chaos.run("--rounds", "60", "--rate", "1500", "--accepted", "50000", "--verbose")
    print(report)
    assert report.ok(), str(report)
    assert report.accepted >= 50_000, str(report)
    assert report.rounds >= 60, str(report)


def test_every_202_is_on_the_recording_brokers_disk_though_the_broker_is_killed_too():
    report = chaos.run("--broker", "recording", "--rounds", "15", "--rate", "800")
    print(report)
    assert report.ok(), str(report)
    assert report.broker_starts > 1, str(report)


def test_the_checker_sees_a_lost_a_repeated_and_a_late_event():
    arrivals = chaos.Arrivals()
    arrivals.add([("a", 1), ("a", 2), ("a", 2), ("a", 5), ("a", 4), ("b", 1)])
    assert arrivals.missing("a", 5) == [3]
    assert arrivals.missing("b", 1) == []
    assert arrivals.missing("c", 1) == [1]
    assert arrivals.repeated == 1
    assert arrivals.out_of_order == 1
