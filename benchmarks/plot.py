"""Pictures of results: ``python -m benchmarks.plot FILE.json --out FOLDER``."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .suite import load

OURS = "lowrank_ops auto"
Row = Mapping[str, Any]


def layer(row: Row) -> str:
    shape = row["shape"]
    return f"{shape['in_features']}→{shape['out_features']}, rank {shape['rank']}, {shape['dtype']}"


def tokens(row: Row) -> str:
    return f"{row['shape']['tokens']} tokens, {row['shape']['dtype']}"


# Name, op, key of the shape along x, baseline (None: the roofline), and the name of a curve.
PICTURES: tuple[tuple[str, str, str, str | None, Callable[[Row], str]], ...] = (
    ("linear_over_dense", "lowrank_linear", "tokens", "dense", layer),
    ("linear_over_two", "lowrank_linear", "tokens", "two_linears", layer),
    ("linear_rank", "lowrank_linear", "rank", "dense", tokens),
    ("linear_roofline", "lowrank_linear", "tokens", None, layer),
    ("covariance_over_mm", "covariance_update_", "features", "torch_mm", tokens),
    ("covariance_roofline", "covariance_update_", "features", None, tokens),
)


def curves(
    rows: Sequence[Row], op: str, x: str, baseline: str | None, name: Callable[[Row], str]
) -> dict[str, list[tuple[float, float]]]:
    """Points of the right rows of lowrank_ops: ``x`` and the speedup over ``baseline`` or fraction of the roofline."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["op"] == op and row["variant"] == OURS and row["correct"]:
            value = row["speedup"].get(baseline) if baseline else row["roofline_fraction"]
            if value is not None:
                found[name(row)].append((row["shape"][x], value))
    return {label: sorted(points) for label, points in sorted(found.items())}


def draw(rows: Sequence[Row], folder: Path, device: str) -> list[Path]:
    """All pictures for which there are rows."""
    from matplotlib.figure import Figure

    written = []
    for file, op, x, baseline, name in PICTURES:
        found = curves(rows, op, x, baseline, name)
        if not found:
            continue
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for label, points in found.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set(xlabel=x, ylabel=f"speedup over {baseline}" if baseline else "fraction of the roofline")
        axes.set_title(f"{op} on {device}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{file}.png")
        figure.savefig(written[-1], dpi=150)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    arguments = parser.parse_args(argv)
    for suite in load(arguments.results)["suites"].values():
        print(*draw(suite["rows"], arguments.out, suite["environment"]["device"]), sep="\n")


if __name__ == "__main__":
    main()
