"""Prints a Markdown table of the machine code of every Triton kernel: ``python -m tests.compile_gate.table``."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from tests.compile_gate.gate import ARCHS, Report, compile_launch
from tests.compile_gate.launches import CASES, Launch, launches

HEADER = "| op | kernel | arch | warps | stages | registers | shared memory, B | spills, B | tensor core | TMA loads |"


def rows() -> Iterator[str]:
    """One line per op, arch and kernel."""
    for op in CASES:
        for arch in ARCHS:
            for launch in launches(op, arch):
                yield _row(op, launch, compile_launch(launch, arch))


def _row(op: str, launch: Launch, report: Report) -> str:
    cells = (
        op,
        launch.name,
        f"sm_{report.arch}",
        launch.options["num_warps"],
        launch.options.get("num_stages", "-"),
        report.registers,
        report.shared,
        report.spill_stores + report.spill_loads,
        report.mma(),
        report.tma_loads or "-",
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    print(f"Compiled by Triton {triton.__version__}.\n\n{HEADER}\n|" + "---|" * (HEADER.count("|") - 1))
    for row in rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
