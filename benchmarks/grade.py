"""Grades a GPU's results against what the project set out to reach: ``python -m benchmarks.grade RESULTS.json``.

A target speaks of the shapes that the suites list. It is met where every one of them was measured, is right and
reaches what is required; one that misses is a miss, whatever else was measured. The exit code is 0 where all are met,
else 4.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .suite import load
from .targets import Group, Shape, Target, targets

MISSED = 4  # exit code

Key = tuple[str, frozenset[tuple[str, int | str]]]


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
