"""Reads a Dockerfile: the instructions that ours uses, and an error for everything else, so that
nothing is passed over in silence."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

EXEC_FORM = {"ENTRYPOINT", "CMD"}
KNOWN = EXEC_FORM | {
    *("ARG", "COPY", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "STOPSIGNAL", "USER"),
    *("VOLUME", "WORKDIR"),
}


class Instruction(NamedTuple):
    """One of them; `flags` without their dashes."""

    line: int
    name: str
    flags: dict[str, str]
    text: str

    @property
    def words(self) -> list[str]:
        """The arguments, of exec form or separated by blanks."""
        if self.text.startswith("["):
            return [str(word) for word in json.loads(self.text)]
        return shlex.split(self.text)

    @property
    def pairs(self) -> dict[str, str]:
        """Of ENV, LABEL, ARG: KEY=VALUE."""
        return dict(word.partition("=")[::2] for word in self.words)


class Stage(NamedTuple):
    """From one FROM to the next."""

    name: str
    base: str
    instructions: list[Instruction]

    def last(self, name: str) -> Instruction:
        """The one of this name that is in force."""
        return [one for one in self.instructions if one.name == name][-1]

    def merged(self, name: str) -> dict[str, str]:
        """All pairs of ENV or LABEL."""
        return {k: v for one in self.instructions if one.name == name for k, v in one.pairs.items()}


def instructions(text: str) -> Iterator[Instruction]:
    """Raises ValueError for what is not understood."""
    pending, began = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        began = began if pending else number
        pending += line.strip()
        if pending.endswith("\\"):
            pending = pending[:-1].rstrip() + " "
            continue
        name, _, rest = pending.partition(" ")
        pending = ""
        flags = {}
        while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        if name not in KNOWN or rest.startswith("--"):
            raise ValueError(f"Dockerfile, line {began}: {name} {rest}: not understood here")
        if name in EXEC_FORM and not rest.startswith("["):
            raise ValueError(f"Dockerfile, line {began}: {name}: write the exec form, [...]")
        if set(flags) - {"COPY": {"from"}, "HEALTHCHECK": HEALTH_FLAGS}.get(name, set()):
            raise ValueError(f"Dockerfile, line {began}: {name}: flags {sorted(flags)}")
        yield Instruction(began, name, flags, rest)


HEALTH_FLAGS = {"interval", "timeout", "start-period", "retries"}


def stages(text: str) -> list[Stage]:
    """The stages, in order; the last one is the image."""
    found: list[Stage] = []
    for one in instructions(text):
        if one.name == "FROM":
            words = one.words
            if len(words) not in (1, 3) or (len(words) == 3 and words[1] != "AS"):
                raise ValueError(f"Dockerfile, line {one.line}: write FROM IMAGE [AS NAME]")
            found.append(Stage(words[2] if len(words) == 3 else str(len(found)), words[0], []))
        elif not found:
            raise ValueError(f"Dockerfile, line {one.line}: {one.name} before FROM")
        else:
            found[-1].instructions.append(one)
    return found


class Ignored:
    """.dockerignore: the last pattern that matches a path, or a folder it lies in, decides."""

    def __init__(self, text: str) -> None:
        self._rules = []
        self._kept = re.findall(r"^!/?(\S+)", text, re.MULTILINE)
        for line in text.splitlines():
            if line.strip() and not line.startswith("#"):
                pattern = line.strip().removeprefix("!").strip("/")
                self._rules.append((_regex(pattern), not line.startswith("!")))

    def whole(self, folder: str) -> bool:
        """Nothing below it is taken."""
        kept = any(path.startswith((f"{folder}/", "*")) for path in self._kept)
        return folder in self and not kept

    def __contains__(self, path: str) -> bool:
        parts = path.split("/")
        prefixes = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        ignored = False
        for pattern, verdict in self._rules:
            if any(pattern.fullmatch(prefix) for prefix in prefixes):
                ignored = verdict
        return ignored


def _regex(pattern: str) -> re.Pattern[str]:
    out = ""
    for piece in re.split(r"(\*\*/|\*\*|\*|\?)", pattern):
        out += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(
            piece, re.escape(piece)
        )
    return re.compile(out)


def context(root: Path, sources: list[str]) -> list[str]:
    """Paths of the files below `root` that a COPY of `sources` takes, without the ignored ones."""
    ignored = Ignored((root / ".dockerignore").read_text())

    def below(folder: Path) -> Iterator[str]:
        for path in sorted(folder.iterdir()):
            name = str(path.relative_to(root))
            if path.is_file() and name not in ignored:
                yield name
            elif path.is_dir() and not path.is_symlink() and not ignored.whole(name):
                yield from below(path)

    files: list[str] = []
    for source in sources:
        top = root / source
        files += [source] if top.is_file() and source not in ignored else below(top)
    return files
