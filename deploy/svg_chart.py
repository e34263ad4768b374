"""Charts as inline SVG, and a page around them: nothing is loaded from anywhere, tooltips are <title> elements.

Covers: axes with units and round ticks, dots with error bars, lines, a legend. Does not cover: what is drawn.
Pure: numbers to text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 20, 40, 56
_TICKS = 6

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --grid: #d8dee4; --back: #ffffff; --panel: #f6f8fa;
  --front: #0072b2; --present: #d55e00; --trial: #8c959f; --best: #009e73; --fourth: #cc79a7; --fifth: #b58900; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --grid: #3d444d; --back: #0d1117;
  --panel: #151b23; --front: #56b4e9; --present: #ff8c42; --trial: #656c76; --best: #2fd6a3; --fourth: #e39cc4;
  --fifth: #e6c34a; } }
body { margin: 2rem auto; max-width: 1160px; padding: 0 1rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } p { margin: .4rem 0 }
.soft { color: var(--soft) } .charts { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; flex: 1 1 520px; background: var(--panel); border: 1px solid var(--grid); border-radius: 8px;
  padding: .4rem }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif }
pre { background: var(--panel); border: 1px solid var(--grid); border-radius: 8px; padding: .7rem 1rem;
  white-space: pre-wrap }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--grid); white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 16rem }
 tr.present td { color: var(--present) }
tr.best td { color: var(--best); font-weight: 600 }
.grid { stroke: var(--grid); stroke-width: 1 } .axis { stroke: var(--soft); stroke-width: 1 }
svg text { fill: var(--soft) } svg text.title { fill: var(--ink); font-size: 14px; font-weight: 600 }
.line { fill: none; stroke-width: 2; stroke: var(--kind) } .dashed { stroke-dasharray: 5 4 }
.bar { stroke: var(--kind); stroke-width: 1.5; opacity: .6 } .dot { fill: var(--kind); stroke: var(--panel) }
.dot:hover { stroke: var(--ink); stroke-width: 2 } svg text.name { fill: var(--kind); font-weight: 600 }
.kind-trial { --kind: var(--trial) } .kind-front { --kind: var(--front) } .kind-present { --kind: var(--present) }
.kind-best { --kind: var(--best) } .kind-fourth { --kind: var(--fourth) } .kind-fifth { --kind: var(--fifth) }
"""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis.

    Attributes:
        show: writes a value with its unit. log: logarithmic, for positive values. marks: where to write one; none: at
        round values.
    """

    label: str
    low: float
    high: float
    show: Callable[[float], str]
    log: bool = False
    marks: tuple[float, ...] = ()

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """The marks, else round values, that lie within."""
        if self.marks:
            return [mark for mark in self.marks if self.low <= mark <= self.high]
        if self.log and self.high / self.low > 8:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            wanted = (1, 2, 5) if last - first <= 3 else (1,)
            marks = [factor * 10.0**power for power in range(first, last + 1) for factor in wanted]
        else:
            step = _round_step((self.high - self.low) / _TICKS)
            count = math.floor(self.high / step) - math.ceil(self.low / step) + 1
            marks = [(math.ceil(self.low / step) + n) * step for n in range(count)]
        return [mark for mark in marks if self.low <= mark * (1 + 1e-9) and mark <= self.high * (1 + 1e-9)]


@dataclass(frozen=True, slots=True)
class Dot:
    """A point. `kind` colours it (a `kind-` class); `name` is written beside it; halves are those of error bars."""

    x: float
    y: float
    kind: str
    title: str
    name: str = ""
    x_half: float = 0.0
    y_half: float = 0.0


@dataclass(slots=True)
class Chart:
    """Lines below dots, in the order in which they were added.

    Attributes:
        title: above it. legend: (kind, text).
    """

    title: str
    x: Axis
    y: Axis
    legend: Sequence[tuple[str, str]] = ()
    width: int = 560
    height: int = 400
    _shapes: list[str] = field(default_factory=list)

    def line(self, points: Iterable[tuple[float, float]], kind: str, *, style: str = "") -> None:
        """A line through points."""
        path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        self._shapes.append(f'<polyline class="line {style} kind-{kind}" points="{path}"/>')

    def dot(self, dot: Dot, *, radius: float = 5) -> None:
        """A dot with its error bars; a tooltip tells its title."""
        x, y = self._x(dot.x), self._y(dot.y)
        parts = [f'<g class="kind-{dot.kind}"><title>{html.escape(dot.title)}</title>']
        if dot.x_half:
            ends = self._x(self._within(self.x, dot.x - dot.x_half)), self._x(self._within(self.x, dot.x + dot.x_half))
            parts.append(f'<line class="bar" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if dot.y_half:
            ends = self._y(self._within(self.y, dot.y - dot.y_half)), self._y(self._within(self.y, dot.y + dot.y_half))
            parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>')
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>')
        if dot.name:
            right = x > self.width * 0.62
            at, anchor = (x - 9, "end") if right else (x + 9, "start")
            parts.append(
                f'<text class="name" x="{at:.1f}" y="{y - 7:.1f}" text-anchor="{anchor}">{html.escape(dot.name)}</text>'
            )
        self._shapes.append("".join([*parts, "</g>"]))

    def svg(self) -> str:
        """The drawing."""
        label = html.escape(f"{self.title}: {self.y.label} against {self.x.label}")
        parts = [f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{label}">']
        parts += [*self._x_axis(), *self._y_axis()]
        parts.append(f'<text class="title" x="{_LEFT}" y="18">{html.escape(self.title)}</text>')
        parts += [*self._shapes, *self._legend(), "</svg>"]
        return "".join(parts)

    def _x_axis(self) -> list[str]:
        bottom = self.height - _BOTTOM
        parts = []
        for mark in self.x.ticks():
            at = self._x(mark)
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
            text = html.escape(self.x.show(mark))
            parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
        middle = (_LEFT + self.width - _RIGHT) / 2
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        name = html.escape(self.x.label)
        return [*parts, f'<text x="{middle:.1f}" y="{self.height - 14}" text-anchor="middle">{name}</text>']

    def _y_axis(self) -> list[str]:
        parts = []
        for mark in self.y.ticks():
            at = self._y(mark)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            text = html.escape(self.y.show(mark))
            parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
        middle = (_TOP + self.height - _BOTTOM) / 2
        name = html.escape(self.y.label)
        turned = f'transform="rotate(-90 16 {middle:.1f})"'
        return [*parts, f'<text x="16" y="{middle:.1f}" text-anchor="middle" {turned}>{name}</text>']

    def _legend(self) -> list[str]:
        parts, x = [], float(_LEFT)
        for kind, text in self.legend:
            parts.append(f'<circle class="dot kind-{kind}" cx="{x + 5:.1f}" cy="{_TOP - 9}" r="5"/>')
            parts.append(f'<text x="{x + 14:.1f}" y="{_TOP - 5}">{html.escape(text)}</text>')
            x += 24 + 6.4 * len(text)
        return parts

    def _x(self, value: float) -> float:
        return _LEFT + self.x.place(value) * (self.width - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        return self.height - _BOTTOM - self.y.place(value) * (self.height - _TOP - _BOTTOM)

    @staticmethod
    def _within(axis: Axis, value: float) -> float:
        return min(axis.high, max(axis.low, value))


def axis_over(label: str, values: Iterable[float], show: Callable[[float], str], *, log: bool = False) -> Axis:
    """An axis that holds the values with a little room; a single value gets room, too."""
    real = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = (min(real), max(real)) if real else (0.0, 1.0)
    if log:
        low, high = (low / 1.15, high * 1.15) if real else (1.0, 10.0)
        return Axis(label, low, high, show, log=True)
    room = (high - low) * 0.08 or abs(high) * 0.05 or 0.5
    return Axis(label, max(0.0, low - room) if low >= 0 else low - room, high + room, show)


def write_page(folder: Path, name: str, text: str) -> Path:
    """Write a page into the folder, which is made if it is not there. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.html"
    file.write_text(text, encoding="utf-8")
    return file


def page(title: str, body: Sequence[str]) -> str:
    """A page that stands alone; `body` is HTML."""
    parts = ['<!doctype html><html lang="en"><head><meta charset="utf-8">']
    parts.append('<meta name="viewport" content="width=device-width, initial-scale=1">')
    parts.append(f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>")
    return "\n".join([*parts, *body, "</body></html>"]) + "\n"


def html_table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Rows of (class of the row, cells)."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = []
    for kind, cells in rows:
        inner = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr class="{kind}">{inner}</tr>')
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    if not rough > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
