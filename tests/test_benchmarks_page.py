"""The page of the figures is made from the results alone, and its pictures can be read."""

import copy
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command
from benchmarks import page, plot
from benchmarks.harness import Benchmark, Context, Curve, Figure

ROOT = Path(__file__).parent.parent
RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "benchmarks.json").read_text()
)
MARKERS = "by hand\n" + "".join(
    f"<!-- bench:{name} -->\nold\n<!-- /bench:{name} -->\nmore by hand\n"
    for name in ("run", "figures", "curves")
)
SVG = "{http://www.w3.org/2000/svg}"


# ---- the page ------------------------------------------------------------------------------------


def test_the_same_results_make_the_same_page() -> None:
    first = page.render(MARKERS, RECORDED)
    assert page.render(MARKERS, copy.deepcopy(RECORDED)) == first
    assert page.render(first[0], RECORDED) == first


def test_what_stands_outside_of_the_markers_stays() -> None:
    text, _ = page.render(MARKERS, RECORDED)
    assert text.startswith("by hand\n")
    assert text.count("more by hand\n") == 3
    assert "old" not in re.findall(r"^\w+$", text, re.MULTILINE)


def test_the_page_has_every_figure_with_its_value() -> None:
    text, _ = page.render(MARKERS, RECORDED)
    for name, row in RECORDED.items():
        if name != page.RUN:
            (line,) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
            assert page.number(row["value"]) in line


def test_the_page_says_on_what_machine_and_by_which_command() -> None:
    text, _ = page.render(MARKERS, RECORDED)
    assert f"| command | `{RECORDED['run']['command']}`" in text
    for name, said in RECORDED["run"]["lines"]:
        assert f"| {name} | {said} |" in text


def test_another_value_makes_another_page() -> None:
    other = copy.deepcopy(RECORDED)
    other["single_vs_nginx"]["ratio"] = 0.123
    assert "0.123" in page.render(MARKERS, other)[0]
    assert "0.123" not in page.render(MARKERS, RECORDED)[0]


def test_a_figure_that_failed_says_why_on_the_page() -> None:
    other = copy.deepcopy(RECORDED)
    nothing = dict.fromkeys(("value", "unit", "reference", "ratio"))
    other["single_vs_nginx"] = nothing | {"failed": "3 of 9 requests | were refused"}
    assert r"failed: 3 of 9 requests \| were refused" in page.render(MARKERS, other)[0]


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="bench:figures"):
        page.render(MARKERS.replace("bench:figures", "bench:nothing"), RECORDED)


def test_the_page_of_this_checkout_has_its_pictures() -> None:
    text = page.PAGE.read_text()
    page.render(text, RECORDED)
    pictures = set(re.findall(r"\]\((img/[^)]+)\)", text))
    assert {path for path in pictures if not (page.PAGE.parent / path).exists()} == set()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], True),
        (["--quick"], False),
        (["--quick", "--render"], True),
        (["--no-render"], False),
        (["--only", "one"], False),
    ],
)
def test_a_full_run_of_everything_renders_the_page(
    arguments: list[str], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: Context) -> Mapping[str, Figure]:
        return {"one": Figure(1, "s")}

    every = [Benchmark({"one": "nothing"}, run), Benchmark({"two": "nothing"}, lambda _: {})]
    if not arguments or arguments[0] != "--only":
        every = every[:1]
    rendered: list[Mapping[str, Any]] = []
    monkeypatch.setattr(command, "benchmarks", lambda: every)
    monkeypatch.setattr(page, "write", rendered.append)
    output = tmp_path / "latest.json"
    code = command.main([*arguments, "--quiet", "--output", str(output)])
    assert code == 0
    assert [results["one"]["value"] for results in rendered] == [1] * expected
    assert json.loads(output.read_text())["one"]["against"] == "nothing"


# ---- pictures ------------------------------------------------------------------------------------

CURVES = page.curves({name: row for name, row in RECORDED.items() if name != page.RUN})


@pytest.mark.parametrize("name", CURVES)
def test_a_picture_has_every_point_on_its_paper(name: str) -> None:
    curve = CURVES[name]
    root = ElementTree.fromstring(plot.draw(name, curve))
    lines = root.findall(f"{SVG}polyline")
    assert len(lines) == len(curve.lines)
    for line, points in zip(lines, curve.lines.values(), strict=True):
        places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        assert len(places) == len(points)
        for x, y in places:
            assert plot.LEFT <= x <= plot.WIDTH - plot.RIGHT
            assert plot.TOP <= y <= plot.HEIGHT - plot.BOTTOM


def test_a_picture_can_be_read_where_the_page_is_dark() -> None:
    text = plot.draw("t", Curve("x", "y", {"": [(1, 1), (2, 3)]}))
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    for rule in (".paper", "text {"):
        assert rule in light
        assert rule in dark


def test_a_higher_value_stands_higher() -> None:
    for log in (False, True):
        curve = Curve("x", "y", {"": [(1, 10), (10, 1000)]}, log_x=log, log_y=log)
        root = ElementTree.fromstring(plot.draw("t", curve))
        first, second = root.findall(f"{SVG}polyline")[0].attrib["points"].split()
        assert float(first.split(",")[0]) < float(second.split(",")[0])
        assert float(first.split(",")[1]) > float(second.split(",")[1])


def test_names_of_lines_that_end_together_stand_apart() -> None:
    lines = {name: [(1.0, 1.0), (2.0, end)] for name, end in (("a", 5), ("b", 5), ("c", 5.01))}
    root = ElementTree.fromstring(plot.draw("t", Curve("x", "y", lines)))
    at = sorted(float(text.attrib["y"]) for text in root.findall(f"{SVG}text[@class='name']"))
    assert len(at) == 3
    assert all(b - a >= plot.LABEL_HEIGHT - 0.1 for a, b in itertools.pairwise(at))


def test_text_of_a_picture_is_escaped() -> None:
    curve = Curve("<x>", "a & b", {"<n>": [(1, 1)]})
    ElementTree.fromstring(plot.draw("<t> & u", curve))


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1_400_000, [0, 500e3, 1e6, 1.5e6]), (5, [0, 1, 2, 3, 4, 5]), (0.03, [0, 0.01, 0.02, 0.03])],
)
def test_ticks_are_round_numbers(most: float, expected: list[float]) -> None:
    assert plot.linear(most) == pytest.approx(expected)


def test_few_decades_have_ticks_between() -> None:
    assert plot.decades(3, 80) == pytest.approx([1, 2, 5, 10, 20, 50, 100])
    assert plot.decades(1, 1_000_000) == pytest.approx([10.0**power for power in range(7)])


@pytest.mark.parametrize(
    ("value", "expected"), [(1_500_000, "1.5 M"), (20_000, "20 k"), (0.25, "0.25"), (0, "0")]
)
def test_numbers_on_an_axis_are_short(value: float, expected: str) -> None:
    assert plot.short(value) == expected


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 points"):
        plot.draw("t", Curve("x", "y", {"": []}))
