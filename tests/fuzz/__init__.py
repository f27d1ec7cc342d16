"""The fuzz targets: fuzz_NAME.c is a harness, corpus/NAME what reaches the code that it tests.

A harness is built twice: with libFuzzer (mode "fuzz", needs clang), and with a main that replays
files (mode "replay", any gcc), so that a corpus is tested where there is no clang. `scripts/fuzz`
runs all of them for a while; tests/test_fuzz.py replays the corpora.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.native_build import CACHE, FUZZ, build, run

CORPUS = FUZZ / "corpus"
FOUND = CACHE.parent / "fuzz"
"""New inputs and reproducers; not committed."""
# The log's recovery looks at each word of the ring: a hook at each comparison costs four fifths.
MODE = {
    "validator": "fuzz", "batch": "fuzz", "puback": "fuzz", "log": "fuzz-blind", "text": "fuzz",
}  # fmt: skip
TARGETS = tuple(MODE)
HAS_LIBFUZZER = shutil.which("clang") is not None


@dataclass(frozen=True)
class Outcome:
    executions: int
    new_entries: int
    reproducers: list[Path]
    log: str


def harness(target: str) -> Path:
    return FUZZ / f"fuzz_{target}.c"


def replay(
    target: str, *, rounds: int = 0, seed: int = 1, instead: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Every file of the corpus once, then each `rounds` times with changes, without libFuzzer."""
    program = build(harness(target), "replay", instead)
    options = ["--mutate", str(rounds), "--seed", str(seed)]
    return run(program, "replay", *options, str(CORPUS / target))


def fuzz(
    target: str,
    seconds: int,
    *,
    seed: int = 0,
    found: Path = FOUND,
    corpus: Path | None = None,
    instead: Mapping[str, str] | None = None,
) -> Outcome:
    """One target for a while; ends at the first crash. 0 seconds: the corpus once."""
    program = build(harness(target), MODE[target], instead)
    own = found / "corpus" / target
    own.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in own.iterdir()}
    crashes = set(found.glob(f"{target}-*"))
    options = [f"-max_total_time={seconds}"] if seconds else ["-runs=0"]
    done = run(
        program,
        MODE[target],
        *options,
        f"-seed={seed}",
        f"-artifact_prefix={found}/{target}-",
        "-timeout=10",
        "-print_final_stats=1",
        str(own),
        str(corpus or CORPUS / target),
        seconds=seconds + 120,
    )
    match = re.search(r"stat::number_of_executed_units:\s+(\d+)", done.stdout)
    executions = int(match[1]) if match else 0
    reproducers = sorted(set(found.glob(f"{target}-*")) - crashes)
    if done.returncode and not reproducers:
        raise RuntimeError(f"{target}: the fuzzer failed, with no input to blame\n{done.stdout}")
    new = {path.name for path in own.iterdir()} - before
    return Outcome(executions, len(new), reproducers, done.stdout)


def merge(target: str, most: int) -> int:
    """Rewrite the corpus: what has a name stays; of what else is there or was found, as few files
    as reach all that it reaches, and of these the first, which reach the most. `most` in all."""
    program = build(harness(target), MODE[target])
    corpus, fresh = CORPUS / target, FOUND / "merged" / target
    named = [path for path in corpus.glob("*") if not re.fullmatch("[0-9a-f]{40}", path.name)]
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for path in named:
        shutil.copyfile(path, fresh / path.name)
    sources = [str(path) for path in (corpus, FOUND / "corpus" / target) if path.exists()]
    options = ["-set_cover_merge=1", "-use_counters=0"]
    done = run(program, MODE[target], *options, str(fresh), *sources, seconds=600)
    assert done.returncode == 0, done.stdout
    kept = sorted(fresh.iterdir(), key=lambda path: path.stat().st_mtime_ns)[:most]
    shutil.rmtree(corpus, ignore_errors=True)
    corpus.mkdir(parents=True)
    for path in kept:
        shutil.copyfile(path, corpus / path.name)
    return len(kept)
