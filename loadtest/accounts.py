"""Events as sets of (device, boot, seq), and how they are written down.

A key is "device/boot"; its seqs are a set, in files a list of ranges [first, last]: a fleet numbers
its events in a row, so a run of a million events is a few kilobytes.
"""

from collections.abc import Iterable, Mapping

Seqs = dict[str, set[int]]
Ranges = dict[str, list[list[int]]]


def ranges(seqs: Iterable[int]) -> list[list[int]]:
    """The numbers as sorted ranges [first, last]."""
    found: list[list[int]] = []
    for seq in sorted(seqs):
        if found and found[-1][1] == seq - 1:
            found[-1][1] = seq
        else:
            found.append([seq, seq])
    return found


def pack(seqs: Mapping[str, set[int]]) -> Ranges:
    """For a file."""
    return {key: ranges(numbers) for key, numbers in seqs.items() if numbers}


def unpack(packed: Mapping[str, list[list[int]]]) -> Seqs:
    """From a file."""
    return {
        key: {seq for first, last in runs for seq in range(first, last + 1)}
        for key, runs in packed.items()
    }


def minus(these: Mapping[str, set[int]], those: Mapping[str, set[int]]) -> Seqs:
    """What is in the first and not in the second."""
    nothing: set[int] = set()
    found = {key: seqs - those.get(key, nothing) for key, seqs in these.items()}
    return {key: seqs for key, seqs in found.items() if seqs}


def both(these: Mapping[str, set[int]], those: Mapping[str, set[int]]) -> Seqs:
    """What is in both."""
    found = {key: seqs & those[key] for key, seqs in these.items() if key in those}
    return {key: seqs for key, seqs in found.items() if seqs}


def count(seqs: Mapping[str, set[int]]) -> int:
    """Of all events."""
    return sum(map(len, seqs.values()))


def some(seqs: Mapping[str, set[int]], most: int = 3) -> str:
    """The first few by name, for a message."""
    named = [f"{key} seq {first}" for key in sorted(seqs) for first, _ in ranges(seqs[key])]
    return ", ".join(named[:most]) + (" ..." if len(named) > most else "")
