"""Style as a test: layers, widths, lengths, names, stubs, and nothing of one machine."""

import ast
import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = sorted(
    path
    for folder in ("gateway", "tests", "benchmarks", "loadtest")
    for path in (ROOT / folder).rglob("*.py*")
    if path.suffix in (".py", ".pyi")
)
PYTHON.append(ROOT / "setup.py")
C = sorted(
    path for path in (ROOT / "_native").iterdir() if path.suffix in (".c", ".h", ".pyx", ".pxi")
)
C += sorted(
    path
    for folder in ("native", "fuzz")
    for path in (ROOT / "tests" / folder).rglob("*")
    if path.suffix in (".c", ".h")
)

# Lowest first. A module imports only from layers below its own, and within its layer only from
# what stands before it.
LAYERS = {
    "native": ["_log", "_validator", "_mqtt", "_waiting", "_lines"],
    "words": [
        *("errors", "logs", "systemd", "topics", "mqtt_settings", "settings", "config"),
        *("inflate", "http", "docs_ui", "process", "mqtt", "books", "metrics"),
        *("event_schema", "openapi_parts", "yaml", "openapi", "reference"),
    ],
    "work": [
        *("log_tools", "log_dump", "listeners", "opening", "log_resize", "dead_letters", "retry"),
        *("rates", "refusals", "mqtt_link", "connection", "publisher", "scratch", "log_replay"),
        *("dead_letter_tools", "embedded_broker", "waiting", "batches"),
        *("sinks", "sinks.files", "sinks.file", "sinks.mqtt"),
    ],
    "assembly": ["worker", "delivery", "children", "rolling", "supervisor"],
    "doors": [
        *("frontends.granian", "frontends.guard", "frontends.robyn"),
        *("demo", "health_check", "help_texts", "__main__"),
    ],
}
ORDER = ["", "frontends", *(name for names in LAYERS.values() for name in names)]
# Who may know a library; the rest is kept from it.
KNOWS = {
    "granian": {"frontends.granian"},
    "robyn": {"frontends.robyn"},
    "mqttools": {"mqtt", "embedded_broker"},
    "prometheus_client": {"metrics"},
    "argparse": {"__main__"},
}
LINES_MAX = 500
# One noun that does not fit. Shorten the file, then the number; never the other way round.
LONGER = {
    "_native/gw_log_recover.c": 660,
    "_native/log.pyx": 690,  # bindings, boring
    "gateway/embedded_broker.py": 600,
    "gateway/__main__.py": 540,  # help texts that teach
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "gateway").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in (ROOT / "gateway").rglob("*.py")}


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            yield node.module or ""
            if node.module in ("gateway", "gateway.frontends"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_below(name: str) -> None:
    assert name in ORDER, f"gateway/{name}: give it a place in LAYERS"
    for imported in imports(MODULES[name]):
        if imported.startswith("gateway."):
            below = imported.removeprefix("gateway.")
            if below in ORDER:  # the rest are names in gateway/__init__.py
                assert ORDER.index(below) < ORDER.index(name), f"{name} imports {below}"


def test_every_row_of_the_layers_exists() -> None:
    compiled = {path.stem for path in (ROOT / "gateway").glob("*.pyi")}
    assert set(ORDER) == set(MODULES) | compiled


@pytest.mark.parametrize("library", KNOWS)
def test_only_those_who_may_know_a_library_import_it(library: str) -> None:
    users = {
        name
        for name, path in MODULES.items()
        if any(imported.partition(".")[0] == library for imported in imports(path))
    }
    assert users <= KNOWS[library]


@pytest.mark.parametrize("path", PYTHON + C, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_short(path: Path) -> None:
    columns = 120 if path in C or path.suffix == ".pyi" else 100
    lines = path.read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > columns] == []


@pytest.mark.parametrize(
    "path",
    [path for path in PYTHON + C if path.parts[-2] in ("gateway", "frontends", "sinks", "_native")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_are_short(path: Path) -> None:
    most = LONGER.get(str(path.relative_to(ROOT)), LINES_MAX)
    assert len(path.read_text().splitlines()) <= most, "two nouns in one file?"


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_classes_are_nouns_that_say_something(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert not re.search(r"Manager|Handler|Helper|Util", node.name)


def public(names: Iterator[str] | list[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def declared(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


@pytest.mark.parametrize("stub", sorted((ROOT / "gateway").glob("*.pyi")), ids=lambda p: p.stem)
def test_a_stub_and_its_module_have_the_same_names(stub: Path) -> None:
    module = importlib.import_module(f"gateway.{stub.stem}")
    body = ast.parse(stub.read_text()).body
    own = [
        name
        for name, thing in vars(module).items()
        if not isinstance(thing, type(ast))
        and getattr(thing, "__module__", None) in (None, module.__name__)
    ]
    assert public(declared(body)) <= public(list(vars(module)))
    assert public(own) - public(declared(body)) == set()
    for node in body:
        if isinstance(node, ast.ClassDef):
            compiled = vars(module)[node.name]
            missing = {name for name in public(declared(node.body)) if not hasattr(compiled, name)}
            extra = public(list(vars(compiled))) - public(declared(node.body))
            if issubclass(compiled, tuple | Exception):
                extra = set()  # what NamedTuple brings; attributes set on the instance
                missing &= set(getattr(compiled, "_fields", ()))
            assert (missing, extra) == (set(), set()), node.name


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").iterdir()), ids=lambda path: path.name)
def test_scripts_are_posix_shell(path: Path) -> None:
    assert path.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", path], check=True)


@pytest.mark.parametrize("path", PYTHON + C, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_names_a_document_that_is_not_here(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"\b(?:FAULTS|DESIGN|STYLE)\b|\b[Ii]ssue \d+", text) == [] or path == Path(
        __file__
    )
    for name in set(re.findall(r"\b(?:docs|tests|models)/[\w/-]+\.(?:md|py|c)\b", text)):
        assert (ROOT / name).exists(), name


def test_no_file_names_a_place_of_one_machine() -> None:
    own = re.compile(rf"(?<![\w.])/(home|root|Users|work)/\w|{re.escape(str(ROOT))}\b".encode())
    made = re.compile(r"\.(?!ci)\w+|build|data|__pycache__|.*\.egg-info")
    found = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*")
        if not any(made.fullmatch(part) for part in path.relative_to(ROOT).parts[:-1])
        and path.is_file()
        and path.suffix not in (".so", ".pyc")
        and path != Path(__file__)
        and own.search(path.read_bytes())
    ]
    assert found == []
