"""The log and its index against a model of them, over random histories with crashes and power cuts.

GW_STATES=20 runs twenty times as many; GW_STATES_SEED=N others. What fails is printed as the
shortest sequence of steps that fails.
"""

import os
from dataclasses import dataclass

import pytest
from hypothesis import Phase

from tests.log_states import IndexMachine, LogMachine, Machine, run
from tests.native_build import NATIVE, extension

SEED = int(os.environ.get("GW_STATES_SEED") or 1)
MORE = int(os.environ.get("GW_STATES") or 1)


def test_log_does_what_the_model_says() -> None:
    run(LogMachine, 70 * MORE, 40, SEED)


def test_index_and_receipts_do_what_the_model_says() -> None:
    run(IndexMachine, 70 * MORE, 40, SEED)


@dataclass(frozen=True)
class Mutant:
    """A rule taken away: a patch of a source in _native. Each text must stand there once."""

    name: str
    machine: type[Machine]
    source: str
    patches: tuple[tuple[str, str], ...]


MUTANTS = [
    Mutant(
        "reuse up to the live cursor",
        LogMachine,
        "gw_log.c",
        (
            (
                "uint64_t reclaim = atomic_load_explicit(&shared->reclaim, "
                "memory_order_acquire); /* R */",
                "uint64_t reclaim = gw_log_least_cursor(producer->log);",
            ),
        ),
    ),
    Mutant(
        "durable beyond the contiguous prefix",
        LogMachine,
        "gw_log_commit.c",
        (
            (
                "atomic_store_explicit(&shared->durable, committed,",
                "atomic_store_explicit(&shared->durable, gw_log_tail(log),",
            ),
        ),
    ),
    Mutant(
        "stop at the first damaged record on recovery",
        LogMachine,
        "gw_log_recover.c",
        (
            (
                "        while (x <= last && !whole(&s, x, &data))\n            x += 8;\n",
                "        x = last + 1;\n",
            ),
        ),
    ),
    Mutant(
        "recovery trusts the marker without the CRC",
        LogMachine,
        "gw_log_recover.c",
        (("(header->crc != gw_record_crc(header, (const uint8_t *)(header + 1), p))", "(0)"),),
    ),
    Mutant(
        "the slot holds the cursors' places without their books",
        LogMachine,
        "gw_log_commit.c",
        (
            (
                "        page.sink[i].cursor = gw_cursor_load(log, i);\n",
                "        page.sink[i].cursor.lsn = gw_cursor_load(log, i).lsn;\n",
            ),
        ),
    ),
    Mutant(
        "read a record found by the index without the tail check",
        IndexMachine,
        "gw_log_index.c",
        (("    return tail > lsn + log->mask + 1;", "    return tail < lsn;"),),
    ),
    Mutant(
        "the window is a record shorter than the ring",
        IndexMachine,
        "gw_log_index.c",
        (("    return tail > lsn + log->mask + 1;", "    return tail > lsn + log->mask - 63;"),),
    ),
    Mutant(
        "bodies are the same when they are as long",
        IndexMachine,
        "gw_log_index.c",
        (
            (
                "    for (uint32_t i = 8; i < image->head_words; i++) {\n",
                "    for (uint32_t i = 8; i < image->head_words; i++) {\n        return true;\n",
            ),
        ),
    ),
    Mutant(
        "the key has no boot",
        IndexMachine,
        "gw_log_index.c",
        (
            ("    if (boot) { /* mostly", "    if (boot && false) { /* mostly"),
            (" || have.boot != want->boot", ""),
        ),
    ),
    Mutant(
        "the index is rebuilt from what is not done only",
        IndexMachine,
        "gw_log_index.c",
        (("    while (p < least) {", "    while (!p) {"),),
    ),
    Mutant(
        "what a later claim wrote over is called lost",
        IndexMachine,
        "gw_log_receipt.c",
        (("    if (!whole && least > lsn && ", "    if (!whole && least < lsn && "),),
    ),
    Mutant(
        "a marker without its body is a record",
        IndexMachine,
        "gw_log_receipt.c",
        (("    return used <= log->shared->record_bytes_max &&", "    return used ||"),),
    ),
    Mutant(
        "a receipt's epoch is not looked at",
        IndexMachine,
        "gw_log_receipt.c",
        (
            (
                "    if (!gw_epoch_ok(shared->range, shared->epochs, lsn, epoch))\n",
                "    epoch = gw_epoch_at(shared->range, shared->epochs, lsn);\n    if (!epoch)\n",
            ),
        ),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_machine_notices(mutant: Mutant) -> None:
    text = (NATIVE / mutant.source).read_text()
    for old, new in mutant.patches:
        assert text.count(old) == 1, f"{mutant.source} has changed: {old}"
        text = text.replace(old, new)
    native = extension({mutant.source: text})
    broken = type(f"Broken{mutant.machine.__name__}", (mutant.machine,), {"native": native})
    with pytest.raises((AssertionError, native.LogError)):
        run(broken, 200, 30, SEED, phases=[Phase.generate], report_multiple_bugs=False)
