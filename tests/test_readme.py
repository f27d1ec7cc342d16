"""The README names only what exists."""

import re
from pathlib import Path

import pytest

from gateway import __main__ as cli
from gateway.settings import SETTINGS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
COMMANDS = set(re.findall(r"(?:`|bin/)gateway ((?:log |dead-letters )?[a-z]+)", README))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"scripts/[a-z]+", README))))
def test_scripts_exist_and_can_be_run(path: str) -> None:
    assert (ROOT / path).stat().st_mode & 0o100


@pytest.mark.parametrize("name", sorted(set(re.findall(r"make ([a-z]+)`", README))))
def test_targets_of_make_exist(name: str) -> None:
    assert re.search(rf"^{name}:", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^):]+)\)", README))))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"^\| `([\w/]+/)`", README, re.MULTILINE))))
def test_folders_exist(path: str) -> None:
    assert (ROOT / path).is_dir()


@pytest.mark.parametrize(
    "key", sorted(set(re.findall(r"\b(?:http|log|mqtt|auth)\.(?!md\b|example)[a-z_]+", README)))
)
def test_settings_exist(key: str) -> None:
    assert key in SETTINGS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0


def test_all_commands_are_there() -> None:
    assert {"serve", "config", "demo", "log ls", "log verify", "version"} <= COMMANDS
    assert {
        "log dump",
        "log replay",
        "log resize",
        "dead-letters ls",
        "dead-letters requeue",
    } <= COMMANDS


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`(--[a-z]+)", README))))
def test_options_exist(option: str) -> None:
    sources = [ROOT / "gateway" / "__main__.py", *(ROOT / "scripts").iterdir()]
    assert any(option in path.read_text() for path in sources)


def test_the_curl_line_sends_what_the_validator_accepts() -> None:
    from gateway._validator import validate

    match = re.search(r"-d '(.*)'", README)
    assert match
    assert validate(match[1].encode()).code == ""


def test_the_first_screen_has_the_two_commands() -> None:
    top = "\n".join(README.splitlines()[:40])
    for line in ("scripts/run", "scripts/test", "curl -i http://127.0.0.1:8000/v1/ingest/"):
        assert line in top
    assert "mosquitto_sub -V mqttv5 -h 127.0.0.1 -t 'telemetry/#' -v" in top
    assert ".venv/bin/mqttools subscribe" in top
