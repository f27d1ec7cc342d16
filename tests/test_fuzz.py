"""The corpora of tests/fuzz, replayed under sanitizers; and each harness can fail.

`scripts/fuzz` (make fuzz FUZZ_SECONDS=600) looks for more.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import fuzz
from tests.native_build import FUZZ, NATIVE

SEED = 1
ROUNDS = {"validator": 300, "batch": 300, "puback": 50, "log": 5, "text": 300}


def test_every_harness_is_a_target_with_a_corpus() -> None:
    assert {path.stem.removeprefix("fuzz_") for path in FUZZ.glob("*.c")} == set(fuzz.TARGETS)
    for target in fuzz.TARGETS:
        assert len(list((fuzz.CORPUS / target).iterdir())) >= 10, target


def test_corpora_are_small() -> None:
    files = [path for path in fuzz.CORPUS.rglob("*") if path.is_file()]
    assert len(files) <= 300
    assert sum(path.stat().st_size for path in files) < 600_000


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_corpus_and_its_neighbours_find_nothing(target: str) -> None:
    done = fuzz.replay(target, rounds=ROUNDS[target], seed=SEED)
    assert done.returncode == 0, done.stdout
    match = re.search(r"(\d+) inputs, seed 1", done.stdout)
    assert match
    assert int(match[1]) == (1 + ROUNDS[target]) * len(list((fuzz.CORPUS / target).iterdir()))


@pytest.mark.parametrize("target", fuzz.TARGETS if fuzz.HAS_LIBFUZZER else ())
def test_corpus_finds_nothing_under_libfuzzer(target: str, tmp_path: Path) -> None:
    outcome = fuzz.fuzz(target, 0, found=tmp_path)
    assert outcome.reproducers == []
    assert outcome.executions >= len(list((fuzz.CORPUS / target).iterdir()))


@dataclass(frozen=True)
class Mutant:
    """A bug: a patch of a source in _native. The text must stand there exactly once."""

    target: str
    name: str
    source: str
    old: str
    new: str

    def instead(self) -> Mapping[str, str]:
        text = (NATIVE / self.source).read_text()
        assert text.count(self.old) == 1, f"{self.name}: {self.source} has changed"
        return {self.source: text.replace(self.old, self.new)}


MUTANTS = [
    Mutant(
        "validator",
        "an escape is read beyond the body",
        "gw_validator_text.c",
        "if (end - p < 6 || p[0]",
        "if (p[0]",
    ),
    Mutant(
        "validator",
        "one scan path does not stop at a backslash",
        "gw_validator_sse2.c",
        "#define GW_SCAN_SSE2\n",
        "#include <emmintrin.h>\n#define GW_SCAN_SSE2\n"
        "#define _mm_set1_epi8(c) _mm_set1_epi8((c) == '\\\\' ? '\"' : (c))\n",
    ),
    Mutant(
        "batch",
        "brackets of any kind match",
        "gw_batch.c",
        "(depth <= TYPED && (objects & 1) != (c == '}'))",
        "false",
    ),
    Mutant(
        "batch",
        "a string is read beyond the body",
        "gw_batch.c",
        "    for (; p < end; p++) {\n        if (*p == '\"')",
        "    for (;; p++) {\n        if (*p == '\"')",
    ),
    Mutant(
        "batch",
        "an event that is too large is taken",
        "gw_batch.c",
        "    if (length > s->limits.event_bytes_max)\n        code = GW_CODE_BODY_TOO_LARGE;\n",
        "",
    ),
    Mutant(
        "puback",
        "a property's length is not checked",
        "gw_mqtt_feed.c",
        "            if (left - 2 < bytes)\n                return false;\n",
        "",
    ),
    Mutant(
        "puback",
        "an id that is not in flight is acknowledged",
        "gw_mqtt_feed.c",
        "if (n_message - c->head >= c->tail - c->head || (m->state != FLYING && m->state != OWED))",
        "if (m->state == HELD)",
    ),
    Mutant(
        "puback",
        "an ack counts on another connection",
        "gw_mqtt_feed.c",
        "    message *m = message_at(w, c, n_message);\n",
        "    c = &w->connection[0];\n    message *m = message_at(w, c, n_message);\n",
    ),
    Mutant(
        "puback",
        "a refused pack is one dead letter",
        "gw_mqtt.c",
        "    if (m->records.count > 1)\n        return false;\n",
        "",
    ),
    Mutant(
        "puback",
        "Receive Maximum is not obeyed",
        "gw_mqtt.c",
        "c->limit = receive_max < w->inflight_max ? receive_max : w->inflight_max;",
        "c->limit = w->inflight_max;",
    ),
    Mutant(
        "puback",
        "the header's bytes are forgotten between two segments",
        "gw_mqtt_feed.c",
        "        if (!need)\n            return GW_MQTT_OK;",
        "        if (!need)\n            return c->in_bytes *= c->in_bytes != 1, GW_MQTT_OK;",
    ),
    Mutant(
        "log",
        "recovery trusts the marker without the CRC",
        "gw_log_recover.c",
        "    if (header->crc != gw_record_crc(header, (const uint8_t *)(header + 1), p))\n"
        "        return 0;\n",
        "",
    ),
    Mutant(
        "log",
        "read trusts the marker without the CRC",
        "gw_log_read.c",
        "    if (header->crc != gw_record_crc(header, rest, lsn))\n",
        "    if (0)\n",
    ),
    Mutant(
        "log",
        "recovery stops at the first damaged record",
        "gw_log_recover.c",
        "        while (x <= last && !whole(&s, x, &data))\n            x += 8;\n",
        "        x = last + 1;\n",
    ),
    Mutant(
        "log",
        "a PAD covers a cursor",
        "gw_log_recover.c",
        "to = next_cut(slot, from, found->list[i].to);",
        "(void)next_cut, to = found->list[i].to;",
    ),
    Mutant(
        "log",
        "damage below the watermark is called torn",
        "gw_log_recover.c",
        "        if (p < w)\n            corrupt_add(report, p, x < w ? x : w);",
        "        if (x < w)\n            corrupt_add(report, p, x);",
    ),
    Mutant(
        "text",
        "a receipt's MAC is not looked at",
        "gw_log_receipt.c",
        "    for (size_t i = 0; i < bytes; i++)\n        different",
        "    for (size_t i = 0; i < 16; i++)\n        different",
    ),
    Mutant(
        "text",
        "a receipt is read beyond its end",
        "gw_log_receipt.c",
        "    for (; from < limit && *from != end; from++, digits++) {",
        "    for (; *from != end; from++, digits++) {",
    ),
    Mutant(
        "text",
        "a device id may hold a dot",
        "gw_validator.c",
        "c == '-' || c == '_'))",
        "c == '-' || c == '_' || c == '.'))",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.target}: {m.name}")
def test_corpus_finds_a_planted_bug(mutant: Mutant) -> None:
    done = fuzz.replay(mutant.target, instead=mutant.instead())
    assert done.returncode not in (0, 2), done.stdout


@pytest.mark.parametrize("target", [t for t in ("text",) if fuzz.HAS_LIBFUZZER])
def test_fuzzing_finds_a_planted_bug_from_nothing(target: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    mutant = next(m for m in MUTANTS if m.name == "a device id may hold a dot")
    outcome = fuzz.fuzz(
        target, 20, seed=SEED, found=tmp_path, corpus=empty, instead=mutant.instead()
    )
    (reproducer,) = outcome.reproducers
    assert b"." in reproducer.read_bytes()
    assert "broken: gw_device_id_ok" in outcome.log
    assert outcome.executions > 0


def test_the_script_fails_when_something_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.fuzz import __main__ as script

    crash = fuzz.FOUND / "text-crash-planted"

    def found(target: str, seconds: int, seed: int) -> fuzz.Outcome:
        assert (seconds, seed) == (5, 7)
        return fuzz.Outcome(12, 3, [crash] if target == "text" else [], "what was said")

    monkeypatch.setattr(fuzz, "fuzz", found)
    monkeypatch.setattr(fuzz, "HAS_LIBFUZZER", True)
    monkeypatch.setattr(fuzz, "FOUND", tmp_path)
    arguments = ["fuzz", "--seconds", "10", "--seed", "7"]
    monkeypatch.setattr("sys.argv", [*arguments, "validator", "puback"])
    assert script.main() == 0
    monkeypatch.setattr("sys.argv", [*arguments, "validator", "text"])
    assert script.main() == 1
    assert "build/fuzz/text-crash-planted" in capsys.readouterr().out
    assert (tmp_path / "text-crash-planted.log").read_text() == "what was said"
