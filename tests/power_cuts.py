"""Many power cuts over the real recovery: tests/native/test_log_power.c with a budget and a seed.

python -m tests.power_cuts --runs 640 --seed 5000     about 20 000 crash images, a minute
python -m tests.power_cuts --lie                      the control: fdatasync lies, and it must fail
"""

import argparse
import random
import subprocess
import sys

from tests.native_build import MODES, TESTS, build

SECONDS_A_RUN = 5


def main() -> int:
    """Exit code 1: a crash image that the recovery should have kept whole was not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=640, help="about 32 images each")
    parser.add_argument("--seed", type=int, default=None, help="of the first run; random")
    parser.add_argument("--lie", action="store_true", help="fdatasync returns and writes nothing")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 31)
    done = subprocess.run(
        [build(TESTS / "test_log_power.c", "plain")],
        env={
            **MODES["plain"].environment,
            "GW_POWER_RUNS": str(args.runs),
            "GW_POWER_SEED": str(seed),
            "GW_TEST_SECONDS": str(60 + SECONDS_A_RUN * args.runs),
            **({"GW_POWER_LIE": "1"} if args.lie else {}),
        },
    )
    return int(done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
