"""README's tables from the JSON of results: ``python -m benchmarks.tables [--write]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .suite import RESULTS, load

README = Path(__file__).parent.parent / "README.md"
START = "<!-- cpu table: python -m benchmarks.tables --write -->"
END = "<!-- end of cpu table -->"
OURS = "lowrank_ops auto"
MODES = {
    "inference_mode": "Python and dispatch of one call under `inference_mode`",
    "no_grad": "Python and dispatch of one call under `no_grad`",
    "backward": "The same of one call and its backward",
}
CALLS = {
    OURS: "`lowrank_linear`",
    "two F.linear": "two `F.linear`",
    "F.linear": "one",
    "lowrank_ops LowRankLinear": "`LowRankLinear`",
    "two nn.Linear": "two `nn.Linear`",
}


def cpu_section(document: Mapping[str, Any]) -> str:
    """The CPU suite as Markdown: where it ran, and ratios to what one would use instead."""
    suite = document["suites"]["cpu"]
    facts, rows = suite["environment"], suite["rows"]
    quiet = "a quiet machine" if facts["quiet"] else f"a machine shared with others (load {facts['load_at_start']:g})"
    lines = [
        f"{facts['device']}, {facts['threads']} thread on its own clock, {quiet}; torch {facts['torch']}, float32, "
        f"commit {facts['commit']}, {facts['date']}. Times faster than the alternative, medians of interleaved calls:",
        "",
        *_table(
            ["`covariance_update_`, d", "tokens", "full product"],
            [
                [row["shape"]["features"], row["shape"]["tokens"], _times(row, "torch_mm")]
                for row in _of(rows, "covariance_update_")
            ],
        ),
        "",
        *_table(
            ["`lowrank_linear`", "rank", "tokens", "dense", "two `F.linear`"],
            [
                [
                    f"{row['shape']['in_features']} → {row['shape']['out_features']}",
                    row["shape"]["rank"],
                    row["shape"]["tokens"],
                    _times(row, "dense"),
                    _times(row, "two_linears"),
                ]
                for row in _of(rows, "lowrank_linear")
            ],
        ),
    ]
    for mode, what in MODES.items():
        group = {
            row["arm"]: row["median_us"] for row in rows if row["op"] == "overhead" and row["shape"]["mode"] == mode
        }
        if group:
            lines += [
                "",
                f"{what}, by a layer of 8 features: "
                + ", ".join(f"{name} {group[arm]:.1f} µs" for arm, name in CALLS.items() if arm in group)
                + ".",
            ]
    return "\n".join(lines)


def _of(rows: Sequence[dict[str, Any]], op: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["op"] == op and row["arm"] == OURS]


def _times(row: Mapping[str, Any], other: str) -> str:
    """A speed-up, or what stands in its place."""
    if not row["correct"]:
        return "wrong"
    return f"{row['speedup'][other]:.2f}" if other in row["speedup"] else "not measured"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def replaced(text: str, section: str) -> str:
    """``text`` with ``section`` between the marks.

    Raises:
        ValueError: the marks are not there, once and in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(END) < text.index(START):
        raise ValueError(f"README must have {START!r} and {END!r}, once and in this order.")
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{section}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """The command line: print the section, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md, between its marks")
    arguments = parser.parse_args()
    section = cpu_section(load(RESULTS / "cpu.json"))
    if arguments.write:
        README.write_text(replaced(README.read_text(), section))
    else:
        print(section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
