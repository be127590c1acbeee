"""Markdown tables of results: ``python -m benchmarks.tables [FILE.json ...]``, by default of all in ``results/``.

One line per case: the time of lowrank_ops and its speedups over the baselines, or why there is none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .suite import RESULTS, load

OURS = ("lowrank_ops auto", "lowrank_ops", "lowrank_ops LowRankLinear")  # what a user calls
Row = Mapping[str, Any]


def tables(document: Mapping[str, Any]) -> Iterator[str]:
    """The suites of a results file, a table for each op."""
    for name, suite in document["suites"].items():
        facts, peak = suite["environment"], suite["peak"]
        rates = ", ".join(f"{rate:.4g} TFLOP/s {dtype}" for dtype, rate in peak["matmul_tflop_per_s"].items())
        whole = "" if suite["complete"] else ", not all cases"
        yield (
            f"`{name}`{whole}: {facts['device']}, {facts['threads']} thread(s), "
            f"load {facts['load_at_start']:g}, torch {facts['torch']}, Triton {facts['triton']}, commit "
            f"{facts['commit']}, {facts['date']}; peaks: copy {peak['copy_gb_per_s']:.4g} GB/s, matmul {rates}."
        )
        for op in dict.fromkeys(row["op"] for row in suite["rows"]):
            yield table([row for row in suite["rows"] if row["op"] == op])


def table(rows: Sequence[Row]) -> str:
    """One op."""
    ours = [row for row in rows if row["variant"] in OURS or not row["variant"].startswith("lowrank_ops")]
    baselines = list(dict.fromkeys(other for row in ours for other in row["speedup"]))
    shown = [row for row in ours if row["variant"] in OURS or row["variant"] == "every variant"]
    keys = list(dict.fromkeys(key for row in shown for key in row["shape"]))
    shown.sort(key=lambda row: [(isinstance(value := row["shape"].get(key), str), value) for key in keys])
    header = [f"`{rows[0]['op']}`", *keys, "µs", "of roofline", *(f"speedup over {name}" for name in baselines)]
    lines = [header, ["---"] * len(header)]
    for row in shown:
        cells = [row["variant"], *(str(row["shape"].get(key, "")) for key in keys)]
        if row["correct"] and row["median_us"]:
            share = row["roofline_fraction"]
            cells += [f"{row['median_us']:.1f}", f"{share:.0%}" if share else ""]
            cells += [f"{row['speedup'][name]:.2f}" if name in row["speedup"] else "" for name in baselines]
        else:
            cells += [f"failed: {row['failure']}" if row["failure"] else "wrong"] + [""] * (1 + len(baselines))
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*")
    files = parser.parse_args(argv).results or sorted(RESULTS.glob("*.json"))
    documents = [document for document in map(load, files) if "suites" in document]
    print("\n\n".join(part for document in documents for part in tables(document)))


if __name__ == "__main__":
    main()
