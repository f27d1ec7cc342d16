"""How does a curve look? As an SVG of its own: no library, the same bytes for the same curve.

The picture brings its background with it, and a dark one where the reader's system is dark, so that
it can be read on any page. Lines are told apart by colour, by marker, and by a name at their end.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

from benchmarks.harness import Curve

WIDTH: Final = 680
HEIGHT: Final = 340
LEFT, RIGHT, TOP, BOTTOM = 78, 62, 40, 50
LINES_MAX: Final = 4
LABEL_HEIGHT: Final = 14
RULES: Final = """\
text { font: 12px system-ui, sans-serif; fill: #24292f; }
.title { font-size: 14px; font-weight: 600; }
.paper { fill: #ffffff; stroke: #d0d7de; }
.grid { stroke: #d8dee4; stroke-width: 1; }
.line { fill: none; stroke-width: 2; }
.l0 { stroke: #0550ae; } .f0 { fill: #0550ae; }
.l1 { stroke: #bc4c00; } .f1 { fill: #bc4c00; }
.l2 { stroke: #116329; } .f2 { fill: #116329; }
.l3 { stroke: #8250df; } .f3 { fill: #8250df; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .paper { fill: #0d1117; stroke: #30363d; }
  .grid { stroke: #30363d; }
  .l0 { stroke: #79c0ff; } .f0 { fill: #79c0ff; }
  .l1 { stroke: #ffa657; } .f1 { fill: #ffa657; }
  .l2 { stroke: #7ee787; } .f2 { fill: #7ee787; }
  .l3 { stroke: #d2a8ff; } .f3 { fill: #d2a8ff; }
}"""


def short(value: float) -> str:
    """A number for an axis: 1500000 is 1.5 M."""
    for unit, of in ((" M", 1e6), (" k", 1e3)):
        if abs(value) >= of:
            return f"{value / of:.4g}{unit}"
    return f"{value:.4g}"


class Axis(NamedTuple):
    """From values to pixels."""

    low: float
    high: float
    at_low: float
    at_high: float
    log: bool
    ticks: Sequence[float]

    def place(self, value: float) -> float:
        """The pixel of a value."""
        low, high, here = self.low, self.high, value
        if self.log:
            low, high, here = math.log10(low), math.log10(high), math.log10(value)
        return self.at_low + (here - low) / (high - low) * (self.at_high - self.at_low)


def linear(most: float) -> list[float]:
    """Ticks of 1, 2 or 5 times a power of ten, from 0 to the first one that is not below `most`."""
    rough = most / 5
    power: float = 10 ** math.floor(math.log10(rough))
    step = next(power * of for of in (1, 2, 5, 10) if power * of >= rough)
    return [step * number for number in range(math.ceil(most / step - 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten around the values; with 2 and 5 between when there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    found = [10.0**power for power in range(first, last + 1)]
    if last - first <= 2:
        found = sorted({*found, *(of * ten for ten in found[:-1] for of in (2, 5))})
    return found


def _axis(values: Sequence[float], log: bool, at_low: float, at_high: float) -> Axis:
    if log:
        ticks = decades(min(values), max(values))
    else:
        ticks = linear(max(values))
    return Axis(ticks[0], ticks[-1], at_low, at_high, log, ticks)


def _marker(kind: int, x: float, y: float) -> str:
    if kind == 0:
        return f'<circle class="f0" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
    corners = {1: "-4,4 0,-4 4,4", 2: "-4,-4 4,-4 4,4 -4,4", 3: "0,-5 5,0 0,5 -5,0"}[kind]
    return f'<polygon class="f{kind}" transform="translate({x:.1f} {y:.1f})" points="{corners}"/>'


def draw(title: str, curve: Curve) -> str:
    """The whole file. Raises ValueError when there is nothing to draw, or a log axis has a 0."""
    points = [point for line in curve.lines.values() for point in line]
    if not points or len(curve.lines) > LINES_MAX:
        raise ValueError(f"{title}: {len(curve.lines)} lines with {len(points)} points")
    x = _axis([of for of, _ in points], curve.log_x, LEFT, WIDTH - RIGHT)
    y = _axis([of for _, of in points], curve.log_y, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<style>\n{RULES}\n</style>",
        f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="6"/>',
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
    ]
    for tick in y.ticks:
        at = y.place(tick)
        parts += [
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>',
            f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(tick)}</text>',
        ]
    for tick in x.ticks:
        at = x.place(tick)
        parts += [
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{short(tick)}</text>",
        ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts += [
        f'<text x="{middle:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(curve.x)}</text>',
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:.1f}) rotate(-90)"'
        f' text-anchor="middle">{escape(curve.y)}</text>',
    ]
    labels: list[tuple[float, float, str]] = []
    for kind, (name, line) in enumerate(curve.lines.items()):
        places = [(x.place(a), y.place(b)) for a, b in line]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline class="line l{kind}" points="{path}"/>')
        parts += [_marker(kind, a, b) for a, b in places]
        if name:
            labels.append((places[-1][1] + 4, places[-1][0] + 8, name))
    below = 0.0
    for at, right, name in sorted(labels):
        below = max(at, below + LABEL_HEIGHT)
        parts.append(f'<text class="name" x="{right:.1f}" y="{below:.1f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])
