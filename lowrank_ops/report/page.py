"""One page of HTML with pictures in SVG: no script, no font, no address; it opens anywhere and prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

# Colours that colour-blind people can tell apart (Okabe and Ito); names stand beside them everywhere.
KIND_COLOURS = {"qkv": "#0072b2", "proj": "#d55e00", "mlp": "#009e73", "conv": "#aa4499", "other": "#767676"}

DECADES = 4  # of variance left out that spectra show

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5a636e; --line: #d5dae0; --paper: #fff; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #a3adb8; --line: #3a424c; --paper: #14181d; --card: #1d232a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 62rem; background: var(--paper); color: var(--ink);
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
svg .grid { stroke: var(--line); stroke-width: 1; } svg .track { fill: var(--card); }
.wide { overflow: auto hidden; } .wide svg { min-width: 38rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
thead th { border-bottom-width: 2px; }
tbody th { font-weight: 400; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; margin: .3rem 0 .6rem;
  font-size: .88rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
"""


class Bar(NamedTuple):
    """One line of a bar chart; values are shares in [0, 1]."""

    label: str
    value: float
    kind: str  # colours it
    text: str  # what stands beside it


class Curve(NamedTuple):
    """One line of a plot: y over even steps of x in [0, 1], both shares, and a point on it."""

    label: str
    kind: str
    y: Sequence[float]
    mark: float | None = None  # x of the point


def page(title: str, subtitle: str, cards: Sequence[tuple[str, str, str]], sections: Sequence[str]) -> str:
    """The whole document.

    Args:
        title, subtitle: plain text.
        cards: (name, value, remark) of the figures that matter most.
        sections: made by :func:`section`.
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


def section(title: str, remark: str, *content: str) -> str:
    """A heading, what to see in it, and pictures or tables."""
    shown = f"<p>{escape(remark)}</p>" if remark else ""
    return f"<section><h2>{escape(title)}</h2>{shown}{''.join(content)}</section>"


def key(kinds: Sequence[str]) -> str:
    """Which colour is which kind."""
    items = "".join(f'<li><i style="background:{KIND_COLOURS[kind]}"></i>{kind}</li>' for kind in kinds)
    return f'<ul class="key" aria-label="colours">{items}</ul>'


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose first ``texts`` columns are text and whose others are numbers."""

    def classed(column: int) -> str:
        return ' class="text"' if column < texts else ""

    head = "".join(f'<th scope="col"{classed(column)}>{escape(name)}</th>' for column, name in enumerate(header))
    body = "".join(
        "<tr>"
        + f'<th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{classed(column)}>{escape(cell)}</td>" for column, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def bars(description: str, lines: Sequence[Bar]) -> str:
    """Horizontal bars on a scale of 0 to 100%, one to a line."""
    left, right, step = min(330, 30 + 7 * max((len(line.label) for line in lines), default=0)), 130, 21
    width, height = 960, step * len(lines) + 24
    span = width - left - right
    marks = "".join(
        f'<line class="grid" x1="{left + span * share / 4:.0f}" x2="{left + span * share / 4:.0f}" y1="0" '
        f'y2="{height - 20}"/><text class="soft" text-anchor="middle" x="{left + span * share / 4:.0f}" '
        f'y="{height - 4}">{25 * share}%</text>'
        for share in range(5)
    )
    drawn = "".join(
        f"<g><title>{escape(line.label)}: {escape(line.text)}</title>"
        f'<text x="{left - 8}" y="{step * row + 14}" text-anchor="end">{escape(_shortened(line.label))}</text>'
        f'<rect x="{left}" y="{step * row + 4}" width="{max(1.0, span * min(1.0, line.value)):.1f}" '
        f'height="{step - 7}" rx="2" fill="{KIND_COLOURS[line.kind]}"/>'
        f'<text class="soft" x="{left + span + 10}" y="{step * row + 14}">{escape(line.text)}</text></g>'
        for row, line in enumerate(lines)
    )
    return _svg(width, height, description, marks + drawn)


def curves(description: str, lines: Sequence[Curve], x_label: str, y_label: str) -> str:
    """What each line leaves of 100%, on a logarithmic scale, with a point on those that have one."""
    width, height, left, bottom = 960, 400, 78, 46
    span, rise = width - left - 20, height - bottom - 12

    def at(x: float, y: float) -> str:
        depth = min(DECADES, -math.log10(max(1 - y, 1e-12)))
        return f"{left + span * x:.1f},{12 + rise * depth / DECADES:.1f}"

    grid = "".join(_tick(left, span, rise, share / 4, across=False) for share in range(5))
    grid += "".join(
        _tick(left, span, rise, 1 - decade / DECADES, f"{100 / 10**decade:g}%", up=False)
        for decade in range(DECADES + 1)
    )
    drawn = "".join(
        f"<g><title>{escape(line.label)}</title>"
        f'<polyline fill="none" stroke="{KIND_COLOURS[line.kind]}" stroke-width="1.4" stroke-opacity=".7" points="'
        + " ".join(at(index / (len(line.y) - 1), y) for index, y in enumerate(line.y) if _visible(line.y, index))
        + '"/></g>'
        for line in lines
    )
    drawn += "".join(
        f"<g><title>{escape(line.label)}</title>{_dot(at(line.mark, _interpolated(line.y, line.mark)), line.kind)}</g>"
        for line in lines
        if line.mark is not None
    )
    return _svg(width, height, description, grid + drawn + _axes(left, span, rise, height, x_label, y_label))


def _visible(y: Sequence[float], index: int) -> bool:
    """Whether the line has not reached the bottom of the picture before."""
    return index == 0 or 1 - y[index - 1] > 10.0**-DECADES


def scatter(description: str, points: Sequence[tuple[str, str, float, float]], x_label: str, y_label: str) -> str:
    """Points (label, kind, x, y) on two logarithmic scales of one range, with the diagonal where x = y."""
    width, height, left, bottom = 620, 460, 78, 46
    span, rise = width - left - 20, height - bottom - 12
    values = [math.log10(value) for _, _, x, y in points for value in (x, y)]
    low, high = math.floor(min(values)), math.ceil(max(values))
    high = max(high, low + 1)

    def at(x: float, y: float) -> str:
        share_x, share_y = ((math.log10(value) - low) / (high - low) for value in (x, y))
        return f"{left + span * share_x:.1f},{12 + rise * (1 - share_y):.1f}"

    grid = "".join(
        _tick(left, span, rise, (decade - low) / (high - low), f"{10.0 ** (decade + 2):g}%")
        for decade in range(low, high + 1)
    )
    start, end = at(10.0**low, 10.0**low).split(","), at(10.0**high, 10.0**high).split(",")
    grid += f'<line class="grid" stroke-dasharray="5 4" x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}"/>'
    drawn = "".join(
        f"<g><title>{escape(label)}: {x:.3%}, {y:.3%}</title>{_dot(at(x, y), kind)}</g>" for label, kind, x, y in points
    )
    return _svg(width, height, description, grid + drawn + _axes(left, span, rise, height, x_label, y_label))


def _svg(width: int, height: int, description: str, content: str) -> str:
    return (
        f'<div class="wide"><svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(description)}">'
        f"{content}</svg></div>"
    )


def _tick(
    left: int, span: int, rise: int, share: float, text: str | None = None, up: bool = True, across: bool = True
) -> str:
    """Grid lines with a text at a share of the way up the picture, of the way across it, or both."""
    x, y = left + span * share, 12 + rise * (1 - share)
    text = f"{share:.0%}" if text is None else text
    lines = ""
    if up:
        lines += f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="12" y2="{12 + rise}"/>'
        lines += f'<text class="soft" text-anchor="middle" x="{x:.1f}" y="{rise + 28}">{text}</text>'
    if across:
        lines += f'<line class="grid" x1="{left}" x2="{left + span}" y1="{y:.1f}" y2="{y:.1f}"/>'
        lines += f'<text class="soft" text-anchor="end" x="{left - 6}" y="{y + 4:.1f}">{text}</text>'
    return lines


def _axes(left: int, span: int, rise: int, height: int, x_label: str, y_label: str) -> str:
    middle = 12 + rise / 2
    return (
        f'<text text-anchor="middle" x="{left + span / 2:.0f}" y="{height - 2}">{escape(x_label)}</text>'
        f'<text text-anchor="middle" transform="translate(13 {middle:.0f}) rotate(-90)">{escape(y_label)}</text>'
    )


def _dot(place: str, kind: str) -> str:
    x, y = place.split(",")
    return f'<circle cx="{x}" cy="{y}" r="4" fill="{KIND_COLOURS[kind]}" stroke="var(--paper)" stroke-width="1.2"/>'


def _interpolated(y: Sequence[float], x: float) -> float:
    place = min(max(x, 0.0), 1.0) * (len(y) - 1)
    left = min(int(place), len(y) - 2)
    return y[left] + (y[left + 1] - y[left]) * (place - left)


def _shortened(label: str, most: int = 42) -> str:
    return label if len(label) <= most else f"{label[: most // 3]}…{label[-(most - most // 3 - 1) :]}"
