"""docs/guarantees.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "guarantees.md").read_text()


def test_every_named_test_and_file_exists():
    sources = [
        *ROOT.glob("tests/*.py"),
        *ROOT.glob("tests/native/*.[ch]"),
    ]
    everything = "\n".join(path.read_text() for path in sources)
    for name in re.findall(r"`(test_[a-z0-9_]+)`", TEXT):
        assert re.search(rf"\b{name}\(", everything), name
    for name in re.findall(r"`(?:tests/(?:native/)?)?(test_\w+\.(?:py|c))`", TEXT):
        assert [path for path in sources if path.name == name], name


def test_all_24_promises_are_listed():
    assert re.findall(r"^\| (\d+) \|", TEXT, re.M) == [str(n) for n in range(1, 25)]
