"""README's tables from the JSON of results: ``python -m benchmarks.tables [--write]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .suite import RESULTS, load
from .targets import AUTO as OURS

README = Path(__file__).parent.parent / "README.md"
MARKS = {
    "cpu": ("<!-- cpu table: python -m benchmarks.tables --write -->", "<!-- end of cpu table -->"),
    "gpu": ("<!-- gpu tables: python -m benchmarks.tables --write -->", "<!-- end of gpu tables -->"),
}
NOT_MEASURED = "not measured"
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


def gpu_section(documents: Sequence[Mapping[str, Any]]) -> str:
    """What GPUs measured as Markdown, one device after the other; and where none did, that."""
    if not documents:
        return "Figures of a GPU are not measured yet."
    return "\n\n".join("\n".join(_device(document["suites"])) for document in documents)


def _device(suites: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, suite in suites.items():
        facts, limits = suite["environment"], suite["ceilings"]
        whole = "" if suite["complete"] else ", not all of its cases"
        lines.append(
            f"`{name}`{whole}: {facts['device']}, torch {facts['torch']}, Triton {facts['triton']}, commit "
            f"{facts['commit']}, {facts['date']}; copies {limits['copy_gb_per_s'] / 1000:.2f} TB/s, "
            f"bfloat16 products {limits['matmul_tflop_per_s']['bfloat16']:.0f} TFLOP/s."
        )
    rows = [row for suite in suites.values() for row in suite["rows"]]
    moments = [row for row in _of(rows, "covariance_update_") if row["shape"]["dtype"] == "bf16"]
    if moments:
        opponents = {"float32_product": "float32 product", "torch_mm": "product with float32 output"}
        lines += ["", "Times faster than the alternative; bfloat16, medians of CUDA graphs with cold caches:", ""]
        sizes = sorted(moments, key=lambda row: (row["shape"]["features"], row["shape"]["tokens"]))
        lines += _table(
            ["`covariance_update_`, d", "tokens", "µs", "of the roofline", *opponents.values()],
            [
                [row["shape"]["features"], row["shape"]["tokens"], _us(row), _share(row)]
                + [_times(row, other) for other in opponents]
                for row in sizes
            ],
        )
    layers = [row for row in _of(rows, "lowrank_linear") if row["shape"]["dtype"] == "bf16"]
    if layers:
        lines += ["", "`lowrank_linear`, times faster than dense / than two `F.linear`, by tokens:", ""]
        lines += _grid(
            layers,
            lambda shape: f"{shape['in_features']} → {shape['out_features']}, rank {shape['rank']}",
            "tokens",
            ("dense", "two_linears"),
        )
    models = [row for row in rows if row["op"] == "model" and row["arm"] == "lowrank_ops"]
    if models:
        lines += ["", "Forward passes, times faster than dense / than two linears in each place, by batch:", ""]
        lines += _grid(
            models,
            lambda shape: f"{shape['model']}, {shape['parameters']} of the parameters, {shape['mode']}",
            "batch",
            ("dense", "two_linears"),
        )
    for row in rows:
        if row["op"] == "calibration" and row["arm"] == "lowrank_ops":
            forward = f"{1 / row['speedup']['forward']:.2f}" if "forward" in row["speedup"] else NOT_MEASURED
            lines += ["", f"Calibration of {row['shape']['model']}, in times of its forward passes: {forward}."]
    return lines


def _grid(
    rows: Sequence[Mapping[str, Any]], name: Callable[[Mapping[str, Any]], str], across: str, over: Sequence[str]
) -> list[str]:
    """A table with one shape's number across, and in each cell the speed-ups."""
    columns = sorted({row["shape"][across] for row in rows})
    cells: dict[str, dict[Any, str]] = {}
    for row in rows:
        found = " / ".join(_times(row, other) for other in over) if row["correct"] else "wrong"
        cells.setdefault(name(row["shape"]), {})[row["shape"][across]] = found
    body = [[label, *(found.get(column, NOT_MEASURED) for column in columns)] for label, found in cells.items()]
    return _table(["", *map(str, columns)], body)


def _us(row: Mapping[str, Any]) -> str:
    return f"{row['median_us']:.1f}" if row["median_us"] else NOT_MEASURED


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['fraction_of_floor']:.0%}" if row["correct"] and row["fraction_of_floor"] else NOT_MEASURED


def _of(rows: Sequence[dict[str, Any]], op: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["op"] == op and row["arm"] == OURS]


def _times(row: Mapping[str, Any], other: str) -> str:
    """A speed-up, or what stands in its place."""
    if not row["correct"]:
        return "wrong"
    return f"{row['speedup'][other]:.2f}" if other in row["speedup"] else NOT_MEASURED


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def sections() -> dict[str, str]:
    """Both of README's sections from the files in ``results``."""
    timed = {path.stem: load(path) for path in sorted(RESULTS.glob("*.json"))}
    suites = {name: document for name, document in timed.items() if "suites" in document}
    return {"cpu": cpu_section(suites.pop("cpu")), "gpu": gpu_section(list(suites.values()))}


def replaced(text: str, which: str, section: str) -> str:
    """``text`` with ``section`` between the marks of ``which``, "cpu" or "gpu".

    Raises:
        ValueError: the marks are not there, once and in order.
    """
    start, end = MARKS[which]
    if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
        raise ValueError(f"README must have {start!r} and {end!r}, once and in this order.")
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{section}\n{end}{rest.partition(end)[2]}"


def main() -> int:
    """The command line: print the sections, or write them into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md, between its marks")
    arguments = parser.parse_args()
    text = README.read_text()
    for which, section in sections().items():
        text = replaced(text, which, section)
        if not arguments.write:
            print(f"{section}\n")
    if arguments.write:
        README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
