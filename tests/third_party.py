"""THIRD_PARTY.md, from the metadata of what is installed:

    python -m tests.third_party >THIRD_PARTY.md

Names and licences, no versions: those are in pyproject.toml, and the page must not change with each
release of somebody else."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
HEAD = """\
# Third-party software

The gateway itself is licensed under Apache-2.0 ([LICENSE](LICENSE)). It uses what follows. Written
by `python -m tests.third_party >THIRD_PARTY.md` from the metadata of the installed packages.

Packages are installed from their own distributions, which carry their licence texts
(`*.dist-info`); nothing of them is in the gateway's own sdist or wheel.
"""


class Vendored(NamedTuple):
    """What lies in this repository and is not ours."""

    folder: str
    name: str
    licence: str
    origin: str


VENDORED = [
    Vendored(
        "gateway/demo_data",
        "hourly temperatures of Seattle and San Francisco",
        "public domain",
        "NOAA, by way of the vega-datasets collection",
    ),
    Vendored(
        "gateway/docs_ui",
        "swagger-ui-dist",
        "Apache-2.0",
        "https://github.com/swagger-api/swagger-ui",
    ),
]

_CLASSIFIED = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


def requirements(extra: str = "") -> list[str]:
    """What a user installs: `gateway`, or `gateway[extra]` beyond it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return [Requirement(text).name for text in listed]


def closure(names: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """They and all they need, by canonical name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        distribution = importlib.metadata.distribution(waiting.pop())
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name in found:
            continue
        found[name] = distribution
        for text in distribution.requires or []:
            one = Requirement(text)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                waiting.append(one.name)
    return found


def licence(distribution: importlib.metadata.Distribution) -> str:
    """SPDX where it says so, else what its classifiers or its one word say."""
    metadata = distribution.metadata
    if expression := metadata["License-Expression"]:
        return str(expression)
    word = metadata["License"] or ""
    if re.fullmatch(r"[A-Za-z]+(-[\w.]+)*", word):
        return str(word)
    rows = [row.split(" :: ")[-1] for row in metadata.get_all("Classifier") or []]
    return " OR ".join(sorted(_CLASSIFIED[row] for row in rows if row in _CLASSIFIED))


def home(distribution: importlib.metadata.Distribution) -> str:
    """Where its source is, as far as it says."""
    urls = dict(text.split(", ", 1) for text in distribution.metadata.get_all("Project-URL") or [])
    folded = {label.lower(): url for label, url in urls.items()}
    for label in (
        "source",
        "source code",
        "repository",
        "github",
        "homepage",
        "changelog",
        "changes",
    ):
        if label in folded:
            return re.sub(r"(github\.com/[^/]+/[^/]+)/.*", r"\1", folded[label]).rstrip("/")
    return str(distribution.metadata["Home-page"] or next(iter(urls.values()), "")).rstrip("/")


def table(names: list[str], known: set[str]) -> str:
    """Those that are not in `known`."""
    lines = ["| package | licence | where |", "|---|---|---|"]
    for name, distribution in sorted(closure(names).items()):
        if name not in known:
            lines.append(f"| {name} | {licence(distribution)} | {home(distribution)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole of it."""
    base = requirements()
    vendored = "".join(
        f"| `{one.folder}` | {one.name} | {one.licence} | {one.origin} |\n" for one in VENDORED
    )
    return f"""\
{HEAD}
## Installed with it

{table(base, set())}
## Installed with `telemetry-gateway[robyn]`

{table(requirements("robyn"), set(closure(base)))}
## In this repository, and in its sdist and wheel

| folder | what | licence | from |
|---|---|---|---|
{vendored}"""


if __name__ == "__main__":
    sys.stdout.write(page())
