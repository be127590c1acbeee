"""Self-contained HTML pages with SVG charts: no script, font or link, so that they open offline and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

# Colors that colorblind readers can tell apart (Okabe and Ito); the names are always shown next to them.
KIND_COLORS = {"qkv": "#0072b2", "proj": "#d55e00", "mlp": "#009e73", "conv": "#aa4499", "other": "#767676"}

DECADES = 4  # of residual variance that spectra show

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5a636e; --line: #d5dae0; --paper: #fff; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #a3adb8; --line: #3a424c; --paper: #14181d; --card: #1d232a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .25rem; }
p { margin: .25rem 0 .75rem; color: var(--soft); max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.cards div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.cards dt { color: var(--soft); font-size: .85rem; }
.cards dd { margin: 0; font-size: 1.45rem; font-weight: 600; line-height: 1.25; }
.cards dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--ink); font-size: 12px; } svg .soft { fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; }
.wide { overflow: auto hidden; } .wide svg { min-width: 38rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .28rem .38rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.text, td.text { text-align: left; }
thead th { border-bottom-width: 2px; }
tbody th { font-weight: 400; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; margin: .3rem 0 .6rem;
  font-size: .88rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
"""


class Bar(NamedTuple):
    """One bar of a bar chart."""

    label: str
    value: float  # in [0, 1]
    kind: str  # decides the color
    text: str  # shown next to the bar


class Curve(NamedTuple):
    """One line of a plot: y at evenly spaced x in [0, 1], with an optional point on it."""

    label: str
    kind: str
    y: Sequence[float]
    mark: float | None = None  # x of the point


def page(title: str, subtitle: str, cards: Sequence[tuple[str, str, str]], sections: Sequence[str]) -> str:
    """The whole document.

    Args:
        title, subtitle: plain text.
        cards: (name, value, remark) of the most important figures.
        sections: from :func:`section`.
    """
    figures = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in cards
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n"
        f'<main>\n<dl class="cards">{figures}</dl>\n' + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def framed(document: str) -> str:
    """A document in an iframe, for notebooks, so that neither's style affects the other."""
    style = "width:100%;height:40rem;border:0"
    return f'<iframe srcdoc="{escape(document)}" sandbox="" style="{style}"></iframe>'


def section(title: str, remark: str, *content: str) -> str:
    """A heading, a remark in plain text, and charts or tables."""
    shown = f"<p>{escape(remark)}</p>" if remark else ""
    return f"<section><h2>{escape(title)}</h2>{shown}{''.join(content)}</section>"


def key(kinds: Sequence[str]) -> str:
    """The legend of the colors."""
    items = "".join(f'<li><i style="background:{KIND_COLORS[kind]}"></i>{kind}</li>' for kind in kinds)
    return f'<ul class="key" aria-label="colors">{items}</ul>'


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose first ``texts`` columns hold text and the others numbers."""

    def cells(row: Sequence[str], first: str, others: str) -> str:
        tags = [first, *[others] * (len(row) - 1)]
        kinds = ["text" if column < texts else "number" for column in range(len(row))]
        return "".join(
            f'<{tag} class="{kind}">{escape(cell)}</{tag[:2]}>'
            for tag, kind, cell in zip(tags, kinds, row, strict=True)
        )

    head = cells(header, 'th scope="col"', 'th scope="col"')
    body = "".join("<tr>" + cells(row, 'th scope="row"', "td") + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


class _Canvas(NamedTuple):
    """A chart: its size and the margins around the plot area, in pixels. Shares count from the lower left corner."""

    width: int
    height: int
    left: int = 78
    right: int = 20
    top: int = 12
    bottom: int = 46

    def x(self, share: float) -> float:
        return self.left + (self.width - self.left - self.right) * share

    def y(self, share: float) -> float:
        return self.top + (self.height - self.top - self.bottom) * (1 - share)

    def column(self, share: float, text: str) -> str:
        """A vertical grid line with its label."""
        x, low = f"{self.x(share):.1f}", self.y(0)
        return (
            f'<line class="grid" x1="{x}" x2="{x}" y1="{self.top}" y2="{low:.1f}"/>'
            f'<text class="soft" text-anchor="middle" x="{x}" y="{low + 16:.1f}">{text}</text>'
        )

    def row(self, share: float, text: str) -> str:
        """A horizontal grid line with its label."""
        y = self.y(share)
        return (
            f'<line class="grid" x1="{self.left}" x2="{self.x(1):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="soft" text-anchor="end" x="{self.left - 6}" y="{y + 4:.1f}">{text}</text>'
        )

    def dot(self, x: float, y: float, kind: str) -> str:
        return (
            f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4" fill="{KIND_COLORS[kind]}" '
            'stroke="var(--paper)" stroke-width="1.2"/>'
        )

    def names(self, x: str, y: str) -> str:
        """The names of both axes."""
        return (
            f'<text text-anchor="middle" x="{self.x(0.5):.0f}" y="{self.height - 5}">{escape(x)}</text>'
            f'<text text-anchor="middle" transform="translate(13 {self.y(0.5):.0f}) rotate(-90)">{escape(y)}</text>'
        )

    def svg(self, description: str, *content: str) -> str:
        return (
            f'<div class="wide"><svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" role="img" '
            f'aria-label="{escape(description)}">{"".join(content)}</svg></div>'
        )


def _titled(title: str, content: str) -> str:
    """Content with a tooltip."""
    return f"<g><title>{escape(title)}</title>{content}</g>"


def bars(description: str, lines: Sequence[Bar]) -> str:
    """Horizontal bars on a scale of 0 to 100%, one per line."""
    left, step = min(330, 30 + 7 * max((len(line.label) for line in lines), default=0)), 21
    canvas = _Canvas(960, step * len(lines) + 24, left, right=130, top=0, bottom=20)
    grid = (canvas.column(share / 4, f"{25 * share}%") for share in range(5))
    drawn = (
        _titled(
            f"{line.label}: {line.text}",
            f'<text x="{left - 8}" y="{step * row + 14}" text-anchor="end">{escape(_shortened(line.label))}</text>'
            f'<rect x="{left}" y="{step * row + 4}" width="{max(1.0, canvas.x(min(1.0, line.value)) - left):.1f}" '
            f'height="{step - 7}" rx="2" fill="{KIND_COLORS[line.kind]}"/>'
            f'<text class="soft" x="{canvas.x(1) + 10:.0f}" y="{step * row + 14}">{escape(line.text)}</text>',
        )
        for row, line in enumerate(lines)
    )
    return canvas.svg(description, *grid, *drawn)


def curves(description: str, lines: Sequence[Curve], x_label: str, y_label: str) -> str:
    """1 - y of every line on a logarithmic scale, and its point."""
    canvas = _Canvas(960, 400)

    def height(y: float) -> float:
        return 1 - min(DECADES, -math.log10(max(1 - y, 1e-12))) / DECADES

    def visible(y: Sequence[float]) -> Sequence[float]:
        """The values up to the first one at the bottom of the chart."""
        return y[: 1 + next((index for index, value in enumerate(y) if 1 - value <= 10.0**-DECADES), len(y))]

    grid = [canvas.column(share / 4, f"{25 * share}%") for share in range(5)]
    grid += [canvas.row(1 - decade / DECADES, f"{100 / 10**decade:g}%") for decade in range(DECADES + 1)]
    drawn = [
        _titled(
            line.label,
            f'<polyline fill="none" stroke="{KIND_COLORS[line.kind]}" stroke-width="1.4" stroke-opacity=".7" points="'
            + " ".join(
                f"{canvas.x(index / (len(line.y) - 1)):.1f},{canvas.y(height(y)):.1f}"
                for index, y in enumerate(visible(line.y))
            )
            + '"/>',
        )
        for line in lines
    ]
    drawn += [
        _titled(line.label, canvas.dot(line.mark, height(_interpolated(line.y, line.mark)), line.kind))
        for line in lines
        if line.mark is not None
    ]
    return canvas.svg(description, *grid, *drawn, canvas.names(x_label, y_label))


def scatter(description: str, points: Sequence[tuple[str, str, float, float]], x_label: str, y_label: str) -> str:
    """Points (label, kind, x, y) on two logarithmic axes of the same range, and the diagonal x = y."""
    canvas = _Canvas(620, 460)
    values = [math.log10(value) for _, _, x, y in points for value in (x, y)]
    low, high = math.floor(min(values)), math.ceil(max(values))
    high = max(high, low + 1)

    def share(value: float) -> float:
        return (math.log10(value) - low) / (high - low)

    ticks = [((decade - low) / (high - low), f"{10.0 ** (decade + 2):g}%") for decade in range(low, high + 1)]
    grid = [axis(place, text) for place, text in ticks for axis in (canvas.column, canvas.row)]
    diagonal = (
        f'<line class="grid" stroke-dasharray="5 4" x1="{canvas.x(0):.1f}" y1="{canvas.y(0):.1f}" '
        f'x2="{canvas.x(1):.1f}" y2="{canvas.y(1):.1f}"/>'
    )
    drawn = [
        _titled(f"{label}: {x:.3%}, {y:.3%}", canvas.dot(share(x), share(y), kind)) for label, kind, x, y in points
    ]
    return canvas.svg(description, *grid, diagonal, *drawn, canvas.names(x_label, y_label))


def _interpolated(y: Sequence[float], x: float) -> float:
    place = min(max(x, 0.0), 1.0) * (len(y) - 1)
    left = min(int(place), len(y) - 2)
    return y[left] + (y[left + 1] - y[left]) * (place - left)


def _shortened(label: str, longest: int = 42) -> str:
    return label if len(label) <= longest else f"{label[: longest // 3]}…{label[-(longest - longest // 3 - 1) :]}"
