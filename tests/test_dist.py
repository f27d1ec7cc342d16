"""sdist and wheel hold what they must; `make dist` also compares and uses them."""

import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import dist, third_party
from tests.gateway_process import ROOT

EXTENSIONS = {path.stem for path in (ROOT / "gateway").glob("*.pyi")}
SHIPPED = {name for name in dist.tracked() if name.startswith("gateway/")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    return dist.make_sdist(dist.checkout(folder / "checkout"), folder / "sdist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return dist.build("wheel", dist.unpack(sdist, folder / "unpacked"), folder / "wheel")


def test_the_sdist_has_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    native = {name for name in dist.tracked() if name.startswith("_native/")}
    needed = {"setup.py", "pyproject.toml", "LICENSE", "THIRD_PARTY.md", "README.md"}
    assert native | SHIPPED | needed <= names
    assert [name for name in names if name.startswith(("tests", "benchmarks", "build"))] == []
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []
    assert {(member.uid, member.uname, member.mtime) for member in members} == {
        (0, "", dist.epoch())
    }


@pytest.mark.slow
def test_the_wheel_has_what_runs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        points = archive.read(f"{info}/entry_points.txt").decode()
    compiled = {name for name in names if name.endswith(".so")}
    assert {name.split("/")[1].partition(".")[0] for name in compiled} == EXTENSIONS
    assert {name for name in names - compiled if ".dist-info/" not in name} == SHIPPED
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/THIRD_PARTY.md"} <= names
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "gateway = gateway.__main__:main" in points


@pytest.mark.slow
def test_the_wheel_names_no_folder_of_the_machine_that_built_it(wheel: Path) -> None:
    unpacked = str(wheel.parent.parent).encode()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert unpacked not in content, name
            assert str(ROOT).encode() not in content, name


def test_third_party_page_is_current() -> None:
    page = (ROOT / "THIRD_PARTY.md").read_text()
    assert page == third_party.page(), "python -m tests.third_party >THIRD_PARTY.md"


def test_every_package_has_a_licence_that_is_known() -> None:
    names = third_party.requirements() + third_party.requirements("robyn")
    for name, distribution in third_party.closure(names).items():
        assert third_party.licence(distribution), name
        assert third_party.home(distribution).startswith("https://"), name


def test_every_vendored_folder_is_on_the_page() -> None:
    """Who brings something in brings its licence, and is listed."""
    licensed = {
        str(path.parent.relative_to(ROOT))
        for path in (ROOT / "gateway").rglob("LICENSE*")
        if "__pycache__" not in path.parts
    }
    assert licensed
    assert licensed <= {one.folder for one in third_party.VENDORED}


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "9. Accepting Warranty or Additional Liability." in text
    assert "END OF TERMS AND CONDITIONS" in text
