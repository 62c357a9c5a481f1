"""Line plots as SVG, drawn here: axes with labels, logarithmic where values ask for it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from utils.web.report.elements import text

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 44
MOST_POINTS = 400  # of a line; more are averaged
LOG_SPAN = 30.0  # positive values that span more than this are drawn on a logarithmic axis
COLOURS = 6  # that the style knows; more lines begin anew

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Values over steps."""

    name: str
    points: Sequence[Point]
    smooth: bool = False  # draw a running average over the values themselves
    dots: bool = False  # show each point
    dashed: bool = False  # a level to compare with


@dataclass(frozen=True)
class Axis:
    """Values to pixels."""

    low: float
    high: float
    first: float  # pixel of `low`
    last: float  # pixel of `high`
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        return self.first + (value - low) / max(high - low, 1e-30) * (self.last - self.first)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-30)) if self.log else value

    def ticks(self) -> list[float]:
        """Round values along it."""
        return log_ticks(self.low, self.high) if self.log else round_ticks(self.low, self.high)


def round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About so many round numbers from low to high."""
    raw = (high - low) / about
    scale = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next((m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw), scale)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    parts = (1.0, 2.0, 5.0) if last - first <= 4 else (1.0,)
    every = max(1, (last - first) // 6)
    found = [part * 10.0**n for n in range(first, last + 1, every) for part in parts]
    return [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Finite points, at most so many: neighbours are averaged."""
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = -(-len(kept) // most) if kept else 1
    groups = [kept[i : i + size] for i in range(0, len(kept), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """A running average over about a twentieth of the points, without a bias at its start."""
    keep = 1.0 - 2.0 / (max(1.0, len(points) / 20.0) + 1.0)
    total, weight, found = 0.0, 0.0, []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1.0
        found.append((x, total / weight))
    return found


def plot(
    lines: Sequence[Line], *, x_label: str, y_label: str, log_x: bool = False, about: str = ""
) -> str:
    """An SVG with its legend; hovering tells values. Nothing where there are no points."""
    drawn = [(line, thinned(line.points)) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    x, y = axes([p for _, points in drawn for p in points], log_x=log_x)
    shapes = [grid(x, y, x_label, y_label)]
    told = []
    for number, (line, points) in enumerate(drawn):
        shapes.append(shape(line, points, x, y, number % COLOURS))
        pixels = [[round(x.at(a), 1), round(y.at(b), 1), f"{a:.6g}", f"{b:.4g}"] for a, b in points]
        told.append({"name": line.name, "colour": number % COLOURS, "points": pixels})
    data = text(json.dumps(told, separators=(",", ":")))
    return (
        f'<figure class="plot" data-lines="{data}"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{text(about or y_label)}">{"".join(shapes)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f"{legend([line for line, _ in drawn])}<output></output></figure>"
    )


def axes(points: Sequence[Point], *, log_x: bool) -> tuple[Axis, Axis]:
    """Both axes, with a little room around the values."""
    xs, ys = zip(*points, strict=True)
    log = min(ys) > 0.0 and max(ys) / min(ys) > LOG_SPAN
    low, high = min(ys), max(ys)
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        low, high = (0.0 if 0.0 <= low < room * 4 else low - room), high + room
    left, right = min(xs), max(xs)
    if left == right:
        left, right = left - 0.5, right + 0.5
    if log_x:
        left, right = left / 1.25, right * 1.25
    return (
        Axis(left, right, LEFT, WIDTH - RIGHT, log_x),
        Axis(low, high, HEIGHT - BOTTOM, TOP, log),
    )


def grid(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    """Lines at round values, with numbers and what the axes are."""
    base = HEIGHT - BOTTOM
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in x.ticks():
        at = x.at(value)
        parts.append(
            f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{base}" y2="{base + 5}"/>'
        )
        parts.append(f'<text x="{at:.1f}" y="{base + 18}" text-anchor="middle">{value:.6g}</text>')
    end = WIDTH - RIGHT
    across, middle = (LEFT + end) / 2, (TOP + base) / 2
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{end}" y1="{base}" y2="{base}"/>')
    named = 'class="name" text-anchor="middle"'
    parts.append(f'<text {named} x="{across}" y="{HEIGHT - 6}">{text(x_label)}</text>')
    turned = f"translate(13 {middle}) rotate(-90)"
    parts.append(f'<text {named} transform="{turned}">{text(y_label)}</text>')
    return "".join(parts)


def shape(line: Line, points: Sequence[Point], x: Axis, y: Axis, colour: int) -> str:
    """One line, raw and where asked for smoothed."""
    parts = []
    if line.smooth and len(points) > 20:
        parts.append(path(points, x, y, f"raw s{colour}"))
        points = smoothed(points)
    parts.append(path(points, x, y, f"line s{colour}{' dashed' if line.dashed else ''}"))
    if line.dots or len(points) == 1:
        parts += [
            f'<circle class="dot s{colour}" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="4"/>'
            for a, b in points
        ]
    return "".join(parts)


def path(points: Sequence[Point], x: Axis, y: Axis, kind: str) -> str:
    """Points joined by straight lines."""
    pixels = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
    return f'<polyline class="{kind}" points="{pixels}"/>'


def legend(lines: Sequence[Line]) -> str:
    """Names beside their colours; of a single line none, since its axis names it."""
    if len(lines) < 2:
        return ""
    items = []
    for number, line in enumerate(lines):
        kind = f"s{number % COLOURS}{' dashed' if line.dashed else ''}"
        items.append(f'<span><i class="{kind}"></i>{text(line.name)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'
