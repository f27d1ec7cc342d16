"""The parts of the documentation that are made from the code: run `python -m gateway.reference` in
a checkout after a change to settings, refusals or paths.

    docs/openapi.json       gateway.openapi, with the defaults
    docs/configuration.md   gateway.settings
    docs/http.md            what stands between its markers: paths, headers, codes

`tests/test_reference.py` holds that the files are as this would write them."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from gateway import openapi
from gateway import openapi_parts as parts
from gateway.config import toml
from gateway.errors import REFUSALS
from gateway.settings import SECTIONS, SETTINGS, Setting

_FOOTER: Final = "Made by `python -m gateway.reference`; a test holds it current."


def files(root: Path) -> dict[Path, str]:
    """What the files under `root` should hold. Raises ValueError when docs/http.md lacks a
    marker."""
    http = root / "docs" / "http.md"
    return {
        root / "docs" / "openapi.json": openapi.text(),
        root / "docs" / "configuration.md": configuration(),
        http: filled(http.read_text()),
    }


# ---- docs/configuration.md ---------------------------------------------------------------------


def configuration() -> str:
    """Every setting: what it may be, its default, its environment variable, and why."""
    lines = [
        "# Configuration: every setting",
        "",
        "Later wins: default < TOML file (`--config FILE`, else `GATEWAY_CONFIG`) < environment"
        " variable < `--set section.key=value`.",
        "`gateway config` prints what is in force and where each value came from,"
        " `gateway config --example` a commented file to begin with.",
        "",
        'A number of bytes may be text with a unit: `"256 MiB"`. An empty text unsets a setting'
        " that may be unset. A wrong setting is named, with the closest right one, and the gateway"
        " does not start (exit 2).",
    ]
    for section, doc in SECTIONS.items():
        rows = [_setting(setting) for setting in SETTINGS.values() if setting.section == section]
        lines += ["", f"## `[{section}]`", "", " ".join(doc.split()), ""]
        lines += _table(("setting", "must be", "default", "environment variable", "why"), rows)
    return "\n".join([*lines, "", "---", "", _FOOTER, ""])


def _setting(setting: Setting) -> tuple[str, ...]:
    if setting.default_text:
        default = setting.default_text
    elif setting.default is None:
        default = "unset"
    else:
        default = f"`{toml(setting.default)}`"
    kind = setting.expected
    if setting.choices:
        kind = ", ".join(f"`{choice}`" for choice in setting.choices)
    return (
        *(f"`{setting.key}`", kind + (", or unset" if setting.optional else "")),
        *(default, f"`{setting.variable}`", setting.doc),
    )


# ---- docs/http.md ------------------------------------------------------------------------------


def filled(text: str) -> str:
    """The page with its tables made anew, each between `<!-- made: NAME -->` and `<!-- /made -->`.
    Raises ValueError when a table has no place, or the page a marker of none."""
    document = openapi.document()
    made = {name: "\n".join(table(document)) for name, table in TABLES.items()}
    marker = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- /made -->)", re.DOTALL)
    names = [match[2] for match in marker.finditer(text)]
    if sorted(names) != sorted(made):
        raise ValueError(f"docs/http.md has the markers {names}; it needs one of each: {[*made]}")
    return marker.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", text)


def _paths(document: dict[str, Any]) -> Iterator[str]:
    def rows() -> Iterator[tuple[str, ...]]:
        for path, item in document["paths"].items():
            methods = [method for method in ("post", "get", "head") if method in item]
            operation = item[methods[0]]
            yield (
                f"`{', '.join(methods).upper()}`",
                f"`{path}`",
                " ".join(operation["responses"]),
                operation["summary"],
            )

    return _table(("method", "path", "statuses", ""), rows())


def _headers(document: dict[str, Any]) -> Iterator[str]:
    """Of answers, with the statuses that may have each."""
    of: dict[str, set[str]] = {}
    for item in document["paths"].values():
        for operation in (item[method] for method in ("post", "get") if method in item):
            for status, answer in operation["responses"].items():
                for name in answer.get("headers", ()):
                    of.setdefault(name, set()).add(status)
    components = document["components"]["headers"]
    return _table(
        ("header of an answer", "may come with", ""),
        [
            (f"`{name}`", " ".join(sorted(of[name])), components[name]["description"])
            for name in components
        ],
    )


def _codes(_: dict[str, Any]) -> Iterator[str]:
    used = set().union(*parts.PATHS.values())
    rows = [
        (str(refusal.status), f"`{refusal.code}`", _where(refusal.code), refusal.message)
        for refusal in sorted(REFUSALS[1:], key=lambda refusal: refusal.status)
        if refusal.code in used
    ]
    return _table(("status", "code", "refused alone in a batch", "message"), rows)


def _where(code: str) -> str:
    return "yes" if code in parts.ITEM else ""


TABLES: Final[dict[str, Callable[[dict[str, Any]], Iterable[str]]]] = {
    "paths": _paths,
    "headers": _headers,
    "codes": _codes,
}


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    for row in (head, ("---",) * len(head), *rows):
        cells = " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in row)
        yield f"| {cells} |"


def main(root: Path = Path()) -> int:
    """Write the files that are not as they should be, and name them."""
    for path, text in files(root).items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
