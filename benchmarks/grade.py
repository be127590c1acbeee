"""Grades a GPU's results against what the project set out to reach: ``python -m benchmarks.grade RESULTS.json``.

A target speaks of the shapes that the suites list. It is met where every one of them was measured, is right and
reaches what is required; one that misses is a miss, whatever else was measured. The exit code is 0 where all are met,
else 4.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import bench_covariance, bench_lowrank_linear, shapes
from .suite import load

AUTO = "lowrank_ops auto"
BACKENDS = ("lowrank_ops reference", "lowrank_ops triton", "lowrank_ops cuda")
LAUNCH_US = 2.0  # granted beside the floor where a call takes microseconds
DTYPE = "bf16"
MISSED = 4  # exit code

Group = Mapping[str, Mapping[str, Any]]  # the rows of one shape by arm
Shape = Mapping[str, int | str]
Key = tuple[str, frozenset[tuple[str, int | str]]]


class Target(NamedTuple):
    """One requirement on a figure of every one of some shapes."""

    number: int
    text: str
    op: str
    shapes: Sequence[Shape]
    figure: Callable[[Group], float | None]  # None: not measured
    required: float
    at_most: bool = False
    share: float = 1.0  # of the shapes that have to reach it

    def reached(self, figure: float) -> bool:
        return figure <= self.required if self.at_most else figure >= self.required


class Grade(NamedTuple):
    """What became of a target."""

    target: Target
    figures: Mapping[int, float]  # of shapes by their position in the target's; 0 or infinity for a wrong result

    @property
    def worst(self) -> float | None:
        """The figure that is farthest from what is required."""
        if not self.figures:
            return None
        return max(self.figures.values()) if self.target.at_most else min(self.figures.values())

    @property
    def misses(self) -> list[Shape]:
        """The shapes that were measured and fall short."""
        return [self.target.shapes[at] for at, figure in self.figures.items() if not self.target.reached(figure)]

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"``, ``"not measured"``, or how many of the shapes have been."""
        total = len(self.target.shapes)
        if len(self.misses) > (1 - self.target.share) * total:
            return "missed"
        if not self.figures:
            return "not measured"
        return "met" if len(self.figures) == total else f"{len(self.figures)} of {total} measured"


def over(*others: str, ours: str = AUTO) -> Callable[[Group], float | None]:
    """Times faster than the fastest of ``others``, or of all opponents where none is named."""

    def figure(group: Group) -> float | None:
        names = others or tuple(name for name in group if not name.startswith("lowrank_ops"))
        return _ratio(group, ours, [name for name in names if name in group])

    return figure


def near_best(group: Group) -> float | None:
    """The time of the fastest arm of all, ours included, as a share of our own choice's."""
    return _ratio(group, AUTO, [name for name in group if name != AUTO])


def near_best_backend(group: Group) -> float | None:
    """The time of the fastest backend as a share of our own choice's."""
    return _ratio(group, AUTO, [name for name in BACKENDS if name in group])


def of_floor(group: Group) -> float | None:
    """The floor and a launch as a share of the time."""
    row = group.get(AUTO)
    if row is None or not _sound(row):
        return None if row is None else 0.0
    return float((row["floor_us"] + LAUNCH_US) / row["median_us"])


def cost_over_forward(group: Group) -> float | None:
    """Times that calibration takes longer than the forward passes alone."""
    ratio = _ratio(group, "lowrank_ops", ["forward"] if "forward" in group else [])
    if ratio is None:
        return None
    return 1 / ratio if ratio else float("inf")


def _ratio(group: Group, ours: str, others: Sequence[str]) -> float | None:
    row = group.get(ours)
    if row is None:
        return None
    if not _sound(row):
        return 0.0
    times = [group[name]["median_us"] for name in others if _sound(group[name])]
    return min(times) / row["median_us"] if times else None


def _sound(row: Mapping[str, Any]) -> bool:
    return bool(row["correct"] and row["median_us"])


def targets() -> list[Target]:
    """What is to be shown, by its number."""
    covariance = [case.shape for case in bench_covariance.cases(DTYPE)]
    linear = [case.shape for case in bench_lowrank_linear.cases(DTYPE)]
    few = [shape for shape in linear if _number(shape, "tokens") <= 256]
    many = [shape for shape in linear if _number(shape, "tokens") >= 2048]

    def wide(least: int, most: int = 1 << 30) -> list[Shape]:
        return [shape for shape in covariance if least <= _number(shape, "features") <= most]

    long = [shape for shape in wide(768, 1024) if shape["tokens"] == max(shapes.COVARIANCE_TOKENS)]
    moments, layer, gemm, two = "covariance_update_", "lowrank_linear", over("torch_mm"), over("two_linears")
    small, large = _model("ViT-B/16", 0.5), _model("ViT-L/16", 0.25)
    calibrated = {"model": "ViT-L/16", "dtype": DTYPE}
    dense, near = over("dense", ours="lowrank_ops"), 1 / 1.03
    return [
        Target(1, "covariance: over the best other arm", moments, covariance, over(), 1.0),
        Target(1, "d >= 4096: over the product with float32 output", moments, wide(4096), gemm, 1.6),
        Target(1, "d = 3072: the same", moments, wide(3072, 3072), gemm, 1.25),
        Target(1, "d = 768, 1024, most tokens: the same", moments, long, gemm, 1.15),
        Target(1, "d >= 3072: over the float32 product", moments, wide(3072), over("float32_product"), 10.0),
        Target(2, "M <= 256, at most half the parameters: over dense", layer, _halved(few), over("dense"), 1.0),
        Target(2, "M <= 256, ViT: over two linears", layer, _vit(few), two, 1.5),
        Target(2, "M <= 256, rank 512 to 1024: the same", layer, _ranks(few, 512, 1024), two, 1.3),
        Target(2, "M = 1, rank >= 746: (floor + 2 us) / time", layer, _ranks(_single(few), 746), of_floor, 0.75),
        Target(3, "M >= 2048: best arm's time / ours", layer, many, near_best, 1 / 1.02),
        Target(3, "M >= 2048, rank <= 256: over two linears", layer, _ranks(many, 0, 256), two, 1.15),
        Target(4, "ViT-B/16 at 50%, batch 64, compiled: over dense", "model", [{**small, "batch": 64}], dense, 1.4),
        Target(4, "ViT-L/16 at 25%, batch 64, compiled: over dense", "model", [{**large, "batch": 64}], dense, 2.2),
        Target(4, "both at batch 1", "model", [{**small, "batch": 1}, {**large, "batch": 1}], dense, 1.0),
        Target(4, "ViT-L/16: calibration / forward", "calibration", [calibrated], cost_over_forward, 1.3, at_most=True),
        Target(5, "covariance: best backend's time / auto's", moments, covariance, near_best_backend, near, share=0.95),
        Target(5, "lowrank_linear: the same", layer, linear, near_best_backend, near, share=0.95),
    ]  # fmt: skip


def _number(shape: Shape, key: str) -> int:
    return int(shape[key])


def _halved(found: Iterable[Shape]) -> list[Shape]:
    kept = []
    for shape in found:
        width, height, stored = (_number(shape, key) for key in ("in_features", "out_features", "rank"))
        if 2 * (stored - 7) * (width + height) <= width * height:  # stored ranks are rounded up to multiples of 8
            kept.append(shape)
    return kept


def _vit(found: Iterable[Shape]) -> list[Shape]:
    return [shape for shape in found if _number(shape, "in_features") <= 1024]


def _ranks(found: Iterable[Shape], least: int, most: int = 1 << 30) -> list[Shape]:
    return [shape for shape in found if least <= _number(shape, "rank") <= most]


def _single(found: Iterable[Shape]) -> list[Shape]:
    return [shape for shape in found if shape["tokens"] == 1]


def _model(name: str, fraction: float) -> Shape:
    return {"model": name, "parameters": f"{fraction:.0%}", "mode": "compiled", "dtype": DTYPE}


def grades(document: Mapping[str, Any]) -> list[Grade]:
    """Every target against a file of results, of whatever suites it holds."""
    groups: dict[Key, dict[str, Mapping[str, Any]]] = {}
    for suite in document["suites"].values():
        for row in suite["rows"]:
            groups.setdefault((row["op"], frozenset(row["shape"].items())), {})[row["arm"]] = row
    return [_grade(target, groups) for target in targets()]


def _grade(target: Target, groups: Mapping[Key, Group]) -> Grade:
    figures = {}
    for at, shape in enumerate(target.shapes):
        wanted = shape.items()
        for (op, facts), group in groups.items():
            figure = target.figure(group) if op == target.op and wanted <= facts else None
            if figure is not None:
                figures[at] = figure
    return Grade(target, figures)


def markdown(found: Sequence[Grade]) -> str:
    """One line per target, and the shapes that fall short."""
    lines = ["| target | shapes | required | worst | |", "|---|---|---|---|---|"]
    misses = []
    for grade in found:
        target = grade.target
        least = "at most" if target.at_most else "at least"
        share = "" if target.share == 1 else f" on {target.share:.0%}"
        worst = "-" if grade.worst is None else f"{grade.worst:.2f}"
        lines.append(
            f"| {target.number}. {target.text} | {len(target.shapes)} | {least} {target.required:.2f}{share} | "
            f"{worst} | {grade.verdict} |"
        )
        for at, figure in grade.figures.items():
            if not target.reached(figure):
                shape = " ".join(f"{key}={value}" for key, value in target.shapes[at].items())
                misses.append(f"- {target.number}. {target.text}: {figure:.2f} at {shape}")
    return "\n".join([*lines, "", *misses]).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file that the suites wrote")
    found = grades(load(parser.parse_args(arguments).results))
    print(markdown(found))
    return MISSED if any(grade.verdict != "met" for grade in found) else 0


if __name__ == "__main__":
    sys.exit(main())
