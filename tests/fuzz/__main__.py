"""`scripts/fuzz`: every target in turn, for an equal part of the time."""

import argparse
import os
import random
import sys

from tests import fuzz
from tests.native_build import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=int(os.environ.get("FUZZ_SECONDS") or 60))
    parser.add_argument("--seed", type=int, default=random.randrange(1, 1 << 31))
    parser.add_argument("--merge", type=int, metavar="MOST", help="rewrite the corpora instead")
    parser.add_argument("target", nargs="*", help=f"of {', '.join(fuzz.TARGETS)}; default: all")
    options = parser.parse_args()
    targets = options.target or list(fuzz.TARGETS)
    if unknown := set(targets) - set(fuzz.TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if options.merge:
        for target in targets:
            print(f"{target}: {fuzz.merge(target, options.merge)} files")
        return 0
    if not fuzz.HAS_LIBFUZZER:
        sys.exit("fuzz: clang is not installed; run scripts/bootstrap test")

    print(f"seed {options.seed}, {options.seconds} s", flush=True)
    print(f"{'target':12}{'executions':>12}{'new entries':>13}{'crashes':>9}", flush=True)
    crashes = 0
    for target in targets:
        outcome = fuzz.fuzz(target, max(1, options.seconds // len(targets)), seed=options.seed)
        crashes += len(outcome.reproducers)
        print(
            f"{target:12}{outcome.executions:12}{outcome.new_entries:13}"
            f"{len(outcome.reproducers):9}",
            flush=True,
        )
        for path in outcome.reproducers:
            (fuzz.FOUND / f"{path.name}.log").write_text(outcome.log)
            print(f"    {path.relative_to(ROOT)}, see {path.name}.log beside it", flush=True)
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
