"""Guarantees 2, 5, 12 and 20 with one acknowledgement and a plain client: see tests/chaos.py.

Short here: tests/test_torture.py does the same and more to a gateway, with another checker. The
long run is `python -m tests.chaos --rounds 60 --accepted 100000`."""

from tests import chaos


def test_every_202_arrives_though_any_process_is_killed_or_stopped():
    report = chaos.run("--rounds", "5", "--rate", "1500")
    print(report)
    assert report.ok(), str(report)
    assert report.accepted >= 2_000, str(report)


def test_every_202_is_on_the_recording_brokers_disk_though_the_broker_is_killed_too():
    report = chaos.run("--broker", "recording", "--rounds", "5", "--rate", "800", "--seed", "1")
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
