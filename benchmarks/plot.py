"""Pictures from the JSON of results alone: ``python -m benchmarks.plot results/FILE.json --out FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .suite import load

OURS = "lowrank_ops auto"
Row = Mapping[str, Any]
Curve = list[tuple[float, float]]


def curves(
    rows: Sequence[Row],
    op: str,
    x: str,
    value: Callable[[Row], float | None],
    name: Callable[[Row], str],
    arm: str = OURS,
) -> dict[str, Curve]:
    """Points (shape[x], value) of an op's right rows by one arm, one curve per name, in order of x."""
    found: dict[str, Curve] = defaultdict(list)
    for row in rows:
        number = value(row) if row["op"] == op and row["arm"] == arm and row["correct"] else None
        if number is not None:
            found[name(row)].append((row["shape"][x], number))
    return {label: sorted(points) for label, points in sorted(found.items())}


def draw(rows: Sequence[Row], folder: Path, device: str) -> list[Path]:
    """All pictures for which there are rows."""

    def layer(row: Row) -> str:
        shape = row["shape"]
        return f"{shape['in_features']}→{shape['out_features']}, rank {shape['rank']}, {shape['dtype']}"

    def over(other: str) -> Callable[[Row], float | None]:
        return lambda row: row["speedup"].get(other)

    def share(row: Row) -> float | None:
        fraction: float | None = row["fraction_of_floor"]
        return fraction

    def tokens(row: Row) -> str:
        return f"{row['shape']['tokens']} tokens, {row['shape']['dtype']}"

    linear, covariance = "lowrank_linear", "covariance_update_"
    wanted = [
        ("linear_over_dense", linear, "tokens", over("dense"), layer, "times faster than dense"),
        ("linear_over_two", linear, "tokens", over("two_linears"), layer, "times faster than two F.linear"),
        ("linear_rank", linear, "rank", over("dense"), tokens, "times faster than dense"),
        ("linear_roofline", linear, "tokens", share, layer, "fraction of the roofline"),
        ("covariance_over_mm", covariance, "features", over("torch_mm"), tokens, "times faster than torch's product"),
        ("covariance_roofline", covariance, "features", share, tokens, "fraction of the roofline"),
    ]
    written = []
    for file, op, x, value, name, label in wanted:
        found = curves(rows, op, x, value, name)
        if found:
            written.append(_picture(folder / f"{file}.png", found, x, label, f"{op} on {device}"))
    return written


def _picture(path: Path, found: Mapping[str, Curve], x: str, label: str, title: str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in found.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set(xlabel=x, ylabel=label, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    arguments = parser.parse_args()
    for suite in load(arguments.results)["suites"].values():
        for path in draw(suite["rows"], arguments.out, suite["environment"]["device"]):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
