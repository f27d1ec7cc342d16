"""The made parts of the documentation are as the code would make them now."""

from pathlib import Path

import pytest

from gateway import reference
from gateway.errors import REFUSALS
from gateway.settings import SETTINGS
from tests.gateway_process import ROOT


@pytest.mark.parametrize("path", reference.files(ROOT), ids=lambda path: path.name)
def test_a_made_file_is_current(path: Path) -> None:
    assert path.read_text() == reference.files(ROOT)[path], "run python -m gateway.reference"


def test_every_setting_has_its_row() -> None:
    text = reference.configuration()
    for setting in SETTINGS.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{setting.key}` "))
        assert f"`{setting.variable}`" in row
        assert setting.doc.replace("<", "&lt;").replace("|", "\\|") in row


def test_the_writer_mends_what_is_not_current(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    for path in reference.files(ROOT):
        (tmp_path / "docs" / path.name).write_text(path.read_text())
    page = tmp_path / "docs" / "http.md"
    page.write_text(page.read_text().replace(f"`{REFUSALS[1].code}`", "`a_code_that_was`"))
    (tmp_path / "docs" / "openapi.json").unlink()
    assert reference.main(tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "docs" / "openapi.json"),
        str(page),
    ]
    assert reference.main(tmp_path) == 0
    assert capsys.readouterr().out == "", "nothing is left to do"


def test_a_page_without_a_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="needs one of each"):
        reference.filled("no markers")
