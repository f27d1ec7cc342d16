"""The shell blocks of a document, run as a reader runs them.

In order, by one bash with `set -e`, in the root of a fresh copy of the checkout. What a document
says about its blocks stands in HTML comments, which a reader does not see:

    <!-- runs until Ctrl-C -->     the next block goes on: a terminal of its own, like the reader's
    <!-- Ctrl-C -->                before the next block all that run are interrupted

A ```text block behind a shell block is its output: each of its lines stands in what the block
printed, in that order; `…` is any text.

The network, the processes and the mounts are namespaces of their own: ports are free whatever else
runs, `kill` reaches nobody else, and nothing outlives the run. The copy is mounted at the place
that .venv was made for, since that cannot be moved; what apt and pip would bring is there already.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PLACE = Path(sys.prefix).resolve().parent
"""Where .venv lies: its scripts name this place."""
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "build", "data", "__pycache__", ".hypothesis", ".*_cache"
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$|^<!-- (runs until Ctrl-C|Ctrl-C) -->$", re.M | re.S)

PROLOGUE = """\
set -e
copy=$1 place=$2 out=$3
ip link set lo up
mount --bind "$place/.venv" "$copy/.venv"
mount -o remount,bind,ro "$copy/.venv"
for stamp in "$copy"/.venv/*.stamp; do # a build of the copy must not say so to the checkout
    cp "$stamp" "$out"
    mount --bind "$out/${stamp##*/}" "$stamp"
done
mount --rbind "$copy" "$place"
cd "$place"

sockets() { ss -Htan state listening state established | sort; }
settled() { # pid, sockets before: until it listens or is connected, and no more is coming
    for _ in $(seq 400); do
        kill -0 "$1" 2>/dev/null || return 1
        now=$(sockets)
        sleep 0.25
        [ "$now" != "$2" ] && [ "$now" = "$(sockets)" ] && sleep 0.5 &&
            [ "$now" = "$(sockets)" ] && return 0
    done
    return 1
}
running=
interrupt() {
    for pid in $running; do
        kill -INT -- "-$pid" 2>/dev/null || true
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -0 "$pid" 2>/dev/null && { echo "Ctrl-C does not end process $pid" >&2; exit 1; }
    done
    running=
}
"""


class Block(NamedTuple):
    """One shell block, and what is said of it."""

    text: str
    goes_on: bool
    after_interrupt: bool
    shows: list[str]


def blocks(document: str) -> list[Block]:
    """The shell blocks of a document, in order."""
    found: list[Block] = []
    said: set[str] = set()
    fresh = False
    for match in FENCE.finditer(document):
        language, text, comment = match.groups()
        if comment:
            said.add(comment)
        elif language == "sh":
            found.append(Block(text, "runs until Ctrl-C" in said, "Ctrl-C" in said, []))
            said, fresh = set(), True
        elif language == "text" and fresh:
            found[-1].shows.extend(text.splitlines())
        else:
            fresh = False
    return found


def script(those: list[Block]) -> str:
    """Bash that runs them; the output of block i goes to the file i."""
    lines = [PROLOGUE]
    for i, block in enumerate(those):
        output = f'"$out/{i}"'
        if block.after_interrupt:
            lines.append("interrupt")
        if block.goes_on:
            lines += [
                "before=$(sockets)",
                "set -m",
                f"bash -ec {shlex.quote(block.text)} </dev/null >{output} 2>&1 &",
                "set +m",
                'running="$! $running"',
                f'settled $! "$before" || {{ echo "block {i} is not up" >&2; exit 1; }}',
            ]
        else:
            lines.append(f"{{\n:\n{block.text}}} </dev/null >{output} 2>&1")
    lines += ["sleep 0.5 # what was sent last arrives", "interrupt", "echo all blocks have run"]
    return "\n".join(lines) + "\n"


def run(document: str, folder: Path, within_s: float = 180) -> list[str]:
    """What each block printed. Raises AssertionError when one fails, or prints something else than
    the document shows."""
    those = blocks(document)
    copy, out = folder / "copy", folder / "out"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_COPIED)
    if (ROOT / "build" / "cython").is_dir():  # what is compiled is not compiled again
        shutil.copytree(ROOT / "build" / "cython", copy / "build" / "cython")
    (copy / ".venv").unlink(missing_ok=True)
    (copy / ".venv").mkdir()
    out.mkdir()
    (folder / "script").write_text(script(those))
    ran = subprocess.run(
        [
            *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *(() if os.getuid() == 0 else ("--user", "--map-root-user")),
            *("bash", folder / "script", copy, PLACE, out),
        ],
        env={
            **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
            "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
            # `scripts/test` begins, and does not run all that this is a part of
            "PYTEST_ADDOPTS": "--collect-only -q tests/test_errors.py",
        },
        capture_output=True,
        text=True,
        timeout=within_s,
    )
    printed = [
        path.read_text(errors="replace").replace("\r\n", "\n") if path.exists() else ""
        for path in (out / str(i) for i in range(len(those)))
    ]
    if ran.returncode != 0 or "all blocks have run" not in ran.stdout:
        begun = [i for i in range(len(those)) if (out / str(i)).exists()]
        last = begun[-1] if begun else 0
        hint = "is .venv current? scripts/bootstrap test\n" if "Read-only" in printed[last] else ""
        raise AssertionError(
            hint + f"exit code {ran.returncode} in block {last}:\n{those[last].text}"
            f"it printed:\n{printed[last][-3000:]}\n{ran.stdout}{ran.stderr}"
        )
    for block, text in zip(those, printed, strict=True):
        check(block, text)
    return printed


def check(block: Block, printed: str) -> None:
    """Raises AssertionError when a line that the document shows was not printed, or not there."""
    at = 0
    for line in block.shows:
        wanted = ".*?".join(re.escape(part) for part in line.strip().split("…"))
        if wanted == ".*?":
            continue
        found = re.compile(wanted).search(printed, at)
        assert found, f"{block.text}should print\n{line}\nand printed\n{printed}"
        at = found.end()
