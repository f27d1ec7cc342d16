"""The documents are true: what README and quick start say to type works, links lead somewhere, and
nothing is named that does not exist; the runbook leaves nothing out."""

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway import __main__ as cli
from gateway.errors import REFUSALS, Exit
from gateway.settings import SETTINGS
from tests import shell_blocks
from tests.gateway_process import GatewayProcess

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path for folder in (".", "docs", "deploy") for path in (ROOT / folder).glob("*.md")
)
INDEX = ROOT / "docs" / "README.md"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
EXECUTED = ("README.md", "docs/quick-start.md")
MODULES = {path.stem: path for path in sorted((ROOT / "gateway").rglob("*.py"))}
SOURCES = "\n".join(path.read_text() for path in MODULES.values())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """For a copy of the checkout and the logs that are made in it: nobody keeps them."""
    yield tmp_path
    shutil.rmtree(tmp_path)


# ---- what is to be typed -------------------------------------------------------------------------


@pytest.mark.parametrize("document", EXECUTED)
def test_every_shell_block_does_what_the_document_says(document: str, folder: Path) -> None:
    text = (ROOT / document).read_text()
    assert len(shell_blocks.blocks(text)) >= 5
    shell_blocks.run(text, folder)


def test_the_rules_for_devices_show_requests_that_are_accepted(folder: Path) -> None:
    start = "<!-- runs until Ctrl-C -->\n```sh\nscripts/run\n```\n"
    printed = shell_blocks.run(start + (ROOT / "docs" / "http.md").read_text(), folder)
    answers = re.findall(r"^HTTP/1.1 (\d+)", "".join(printed), re.MULTILINE)
    assert answers == ["202"] * 4


@pytest.mark.parametrize("document", EXECUTED)
def test_all_shell_is_in_blocks_that_are_executed(document: str) -> None:
    languages = re.findall(r"^\s*(?:```|~~~)(\w*)\n", (ROOT / document).read_text(), re.MULTILINE)
    assert set(languages) <= {"", "sh", "text"}


def test_control_a_block_that_fails_is_found(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit code 1 in block 1:\nfalse\n"):
        shell_blocks.run("```sh\nx=1\n```\n```sh\nfalse\n```\n```sh\ntrue\n```\n", folder)


def test_control_a_block_keeps_to_itself_and_to_the_copy(folder: Path) -> None:
    document = "```sh\nls -A data 2>/dev/null | wc -l; ps -e | wc -l; ss -Htan | wc -l\n```\n"
    data, processes, sockets = shell_blocks.run(document, folder)[0].split()
    assert (data, sockets) == ("0", "0")
    assert int(processes) < 10


def test_control_output_that_is_not_as_shown_is_found() -> None:
    document = "```sh\ntrue\n```\n\n```text\nHTTP/1.1 202 Accepted\n…\n{…}\n```\n"
    block = shell_blocks.blocks(document)[0]
    shell_blocks.check(block, 'HTTP/1.1 202 Accepted\n\n{"ack":"enqueue"}')
    for printed in ("HTTP/1.1 400 Bad Request\n{}", "{}\nHTTP/1.1 202 Accepted\n", ""):
        with pytest.raises(AssertionError, match="should print"):
            shell_blocks.check(block, printed)


def test_the_first_screen_gets_an_event_accepted() -> None:
    top = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for line in ("scripts/run", "curl -i http://127.0.0.1:8000/v1/ingest/", "202 Accepted"):
        assert line in top


# ---- links ---------------------------------------------------------------------------------------


def anchors(document: str) -> set[str]:
    """What `#...` may follow the name of a document, as GitHub makes it of headings."""
    found: set[str] = set()
    prose = re.sub(r"^```.*?^```$", "", document, flags=re.MULTILINE | re.DOTALL)
    for title in re.findall(r"^#+ (.*)$", prose, re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        number = 0
        while (unique := slug if not number else f"{slug}-{number}") in found:
            number += 1
        found.add(unique)
    return found


def links(document: str) -> list[str]:
    """Relative targets, also of pictures."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", document, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def broken_links(document: str, path: Path) -> list[str]:
    """Those that lead nowhere."""
    found = []
    for link in links(document):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if target != path and not target.exists():
            found.append(link)
        elif anchor and target.suffix == ".md":
            text = document if target == path else target.read_text()
            if anchor not in anchors(text):
                found.append(link)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path.read_text(), path) == []


def test_control_broken_links_are_found() -> None:
    document = "## A `b` and: c\n[x](#a-b-and-c) [y](#a-b) [z](http.md) [w](htp.md)\n"
    document += "[v](http.md#an-event) [u](http.md#no-event) ![p](img/no.svg) <http://x/>\n"
    found = broken_links(document, ROOT / "docs" / "x.md")
    assert found == ["#a-b", "htp.md", "http.md#no-event", "img/no.svg"]


def unreachable(start: Path, documents: list[Path]) -> set[str]:
    """Documents to which no chain of links leads."""
    seen, to_read = {start}, [start]
    while to_read:
        path = to_read.pop()
        for link in links(path.read_text()):
            target = (path.parent / link.partition("#")[0]).resolve()
            if target.is_dir():
                target /= "README.md"
            if target.suffix == ".md" and target.exists() and target not in seen:
                seen.add(target)
                to_read.append(target)
    return {name_of(path) for path in documents if path not in seen}


@pytest.mark.parametrize("start", [INDEX, ROOT / "README.md"], ids=name_of)
def test_every_document_can_be_reached(start: Path) -> None:
    assert unreachable(start, DOCUMENTS) == set()


def test_control_a_document_that_nobody_links_to_is_found() -> None:
    lonely = ROOT / "docs" / "lonely.md"
    assert unreachable(INDEX, [*DOCUMENTS, lonely]) == {name_of(lonely)}


# ---- names ---------------------------------------------------------------------------------------

HEALTH = {"mqtt.state", "mqtt.last_error", "mqtt.last_error_unix_s", "mqtt.connected"}
"""Members of /healthz that look like settings."""
ELSEWHERE = {"--data-binary", "x-amzn-mqtt-ca", "gateway/bin/gateway", "gateway/bin/pip"} | {
    "benchmarks/results/latest.json"
}
"""Names of others; `gateway` is also what an installation may be called. And what a benchmark run
makes, which is not there in a fresh clone."""

MADE = {"benchmarks/results/latest.json"}
"""Files that a run makes, which a new clone does not have."""


def code_of(document: str) -> list[str]:
    """What stands in back ticks, and the lines of code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", document, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose) + [x for block in blocks for x in block.splitlines()]


def unknown_settings(code: str) -> Iterator[str]:
    sections = "|".join(sorted({key.partition(".")[0] for key in SETTINGS}))
    for match in re.finditer(rf"(?<![\w./-])({sections})\.([a-z_]+)(\*?)(?![\w(])", code):
        section, name, star = match.groups()
        key = f"{section}.{name}"
        known = key in SETTINGS or key in HEALTH or (ROOT / "docs" / key).exists()
        if star:
            known = any(setting.startswith(key) for setting in SETTINGS)
        elif section in MODULES:
            known |= re.search(rf"\b{name}\b", MODULES[section].read_text()) is not None
        if not known and name not in ("py", "c", "h", "pyx", "pyi", "json"):
            yield key
    for name in re.findall(r"\bGATEWAY_([A-Z_]+)\b", code):
        if name != "CONFIG" and name not in {key.upper().replace(".", "_") for key in SETTINGS} | {
            f"{section.upper()}_" for section in sections.split("|")
        }:
            yield f"GATEWAY_{name}"


def unknown_paths(code: str) -> Iterator[str]:
    """Files of the checkout, and what `make` can make."""
    places = r"(?<![\w./-])((?:gateway|_native|tests|docs|scripts|benchmarks|loadtest|deploy)/"
    for match in re.finditer(places + r"[\w./*-]*\w[\w./*-]*)", code):
        name = match[1].rstrip("/.")
        if name in (*ELSEWHERE, *MADE) or code[match.end() : match.end() + 1] in ("<", "{", "…"):
            continue
        if not any(ROOT.glob(name)):
            yield name
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"^(?:make|.*[;&] make) ([a-z-]+)", code):
        if not re.search(rf"^{name}:", makefile, re.MULTILINE):
            yield f"make {name}"


def unknown_headers(code: str) -> Iterator[str]:
    for name in re.findall(r"(?<![\w/-])([Xx]-[A-Za-z-]+\w)", code):
        if name not in ELSEWHERE and name.lower() not in SOURCES.lower():
            yield name


def unknown_options(code: str) -> Iterator[str]:
    """Of a span that is an option, as in `--all`."""
    match = re.match(r"(--[a-z][a-z-]+)", code)
    if match and match[1] not in ELSEWHERE:
        scripts = [path.read_text() for path in (ROOT / "scripts").iterdir()]
        tools = [
            path.read_text()
            for folder in ("tests", "benchmarks", "loadtest")
            for path in (ROOT / folder).glob("*.py")
            if path != Path(__file__)
        ]
        name = match[1].removeprefix("--")
        texts = (SOURCES, *scripts, *tools)
        if not any(f"--{name}" in text or f'"{name}"' in text for text in texts):
            yield match[1]


def commands(code: str) -> list[str]:
    """The commands of the command line."""
    called = re.match(r"(?:[\w./-]*/)?gateway ((?:log |dead-letters )?[a-z][a-z-]*)\b", code)
    return [called[1]] if called else []


@pytest.mark.parametrize(
    "find", [unknown_settings, unknown_paths, unknown_headers, unknown_options]
)
@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_nothing_is_named_that_does_not_exist(
    path: Path, find: Callable[[str], Iterator[str]]
) -> None:
    found = {name for code in code_of(path.read_text()) for name in find(code)}
    assert found == set()


@pytest.mark.parametrize(
    ("find", "good", "bad"),
    [
        (unknown_settings, "`http.port` `mqtt.pack_*` `mqtt.state`", "`http.prt`"),
        (unknown_settings, "`GATEWAY_HTTP_PORT`", "`GATEWAY_HTTP_PRT`"),
        (unknown_settings, "```toml\n[mqtt]\n```", "```sh\ngateway serve --set mqtt.uri=x\n```"),
        (unknown_paths, "`scripts/run` `_native/gw_log*.c`", "`scripts/walk`"),
        (unknown_paths, "`make run`", "`make walk`"),
        (unknown_headers, "`X-Ack`", "`X-Nack`"),
        (unknown_options, "`--example`", "`--exmple`"),
    ],
)
def test_control_a_name_that_does_not_exist_is_found(
    find: Callable[[str], Iterator[str]], good: str, bad: str
) -> None:
    assert [name for code in code_of(good) for name in find(code)] == []
    assert [name for code in code_of(bad) for name in find(code)] != []


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    named = {
        command
        for path in DOCUMENTS
        for code in code_of(path.read_text())
        for command in commands(code)
    }
    assert {"serve", "config", "log ls", "log verify", "log resize", "dead-letters ls"} <= named
    wrong = set()
    for command in named:
        with pytest.raises(SystemExit) as ended:
            cli.main([*command.split(), "--help"])
        if ended.value.code != 0:
            wrong.add(command)
    capsys.readouterr()
    assert wrong == set()
    assert commands(".venv/bin/gateway log lss --set x=y") == ["log lss"]


METRIC = re.compile(r"(?<![\w/.-])(gateway_[a-z_]+)(\*?)(?![\w/]|\.py)")


def test_metrics_exist(tmp_path: Path) -> None:
    settings = {"file.directory": tmp_path / "events"} if "file.directory" in SETTINGS else {}
    with GatewayProcess(tmp_path, settings) as gateway:
        series = {name.partition("{")[0] for name in gateway.metrics()}
    named: dict[str, str] = {}
    for path in DOCUMENTS:
        for code in code_of(path.read_text()):
            for name, star in METRIC.findall(code):
                there = [s for s in series if s == name or (star and s.startswith(name))]
                families = {re.sub("_(total|bucket|count|sum)$", "", s) for s in series}
                if not there and name not in families:
                    named[name] = name_of(path)
    assert named == {}
    assert METRIC.findall("gateway_no tests/gateway_process.py") == [("gateway_no", "")]


# ---- the runbook ---------------------------------------------------------------------------------


def rows(document: str) -> dict[str, list[str]]:
    """Rows of tables by each name in back ticks in the first cell."""
    found = {}
    for line in document.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`([a-z_]+)`", cells[0]) if line.startswith("|") else ():
            found[name] = cells[1:]
    return found


def test_the_runbook_has_a_row_for_every_code() -> None:
    has = rows(RUNBOOK)
    for refusal in REFUSALS[1:]:
        assert has.get(refusal.code, [""])[0] == str(refusal.status), refusal.code
    assert rows("| `log_full` `draining` | 503 | x |\n`failed` | 503") == {
        "log_full": ["503", "x"],
        "draining": ["503", "x"],
    }


def test_the_runbook_has_a_heading_for_every_exit_code() -> None:
    headings = set(re.findall(r"^### (\d+ [A-Z_]+)$", RUNBOOK, re.MULTILINE))
    assert headings == {f"{code.value} {code.name}" for code in Exit}


def literals(node: ast.AST, module: ast.Module, seen: set[str]) -> Iterator[str]:
    """The text of an expression, in pieces: also of constants and functions of the module that it
    names. `seen` has the names that were followed."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value
        name = inner.id if isinstance(inner, ast.Name) else getattr(inner, "attr", "")
        if not name or name in seen:
            continue
        seen.add(name)
        for other in ast.walk(module):
            if isinstance(other, ast.FunctionDef) and other.name == name:
                for result in ast.walk(other):
                    if isinstance(result, ast.Return) and result.value is not None:
                        yield from literals(result.value, module, seen)
            elif isinstance(other, ast.Assign | ast.AnnAssign) and other in module.body:
                targets = other.targets if isinstance(other, ast.Assign) else [other.target]
                if name in map(ast.unparse, targets) and other.value is not None:
                    yield from literals(other.value, module, seen)


def fragments(text: str) -> list[str]:
    """What is said whatever the values are, long enough to be found."""
    pieces = re.split(r"%\w", text)
    return [
        piece.strip(" ;:,.(") for piece in pieces if sum(letter.isalpha() for letter in piece) >= 8
    ]


def health_problems() -> set[str]:
    """Literal pieces of what /healthz may say under `problems`."""
    found: set[str] = set()
    for path in MODULES.values():
        module = ast.parse(path.read_text())
        for function in ast.walk(module):
            if not isinstance(function, ast.FunctionDef) or "health" not in function.name:
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "problems":
                    for text in literals(node.value, module, {"problems"}):
                        found.update(piece for piece in fragments(text) if " " in piece)
    return found


def log_lines() -> Iterator[tuple[str, str]]:
    """Where, and the first literal piece of each line of level warning or worse."""
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            level, owner = node.func.attr, ast.unparse(node.func.value).lower()
            if level in ("warning", "error", "critical", "exception") and "logger" in owner:
                texts = node.args[:1]
            elif level == "say" and "alarms" in owner:
                texts = node.args[1:3]
            else:
                continue
            pieces = [
                piece
                for text in texts
                for part in ast.walk(text)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
                for piece in fragments(part.value)
            ]
            if pieces:
                yield f"{name_of(path)}:{node.lineno}", pieces[0]


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_the_runbook_has_every_problem_of_healthz() -> None:
    problems = health_problems()
    assert len(problems) >= 12
    assert {problem for problem in problems if problem not in flat(RUNBOOK)} == set()


def test_the_runbook_has_every_alarming_line_of_the_log() -> None:
    lines = dict(log_lines())
    assert len(lines) >= 40
    missing = {where: text for where, text in lines.items() if flat(text) not in flat(RUNBOOK)}
    assert missing == {}
