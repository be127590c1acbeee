"""The table of ``docs/kernels.md``: what every shipped kernel became for every arch.

``python -m tests.compile_gate.table`` prints it; ``--write docs/kernels.md`` replaces what stands between the file's
``<!-- kernel table -->`` marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import triton

from tests.compile_gate.gate import ARCHS, Report, compile_specialization
from tests.compile_gate.shipped import OPS

MARK = "<!-- kernel table -->"
HEADER = (
    "| op | kernel and configuration | arch | warps | stages | registers | shared memory, B | spills, B | "
    "tensor core | TMA loads |"
)


def rows() -> Iterator[str]:
    """One line per op, arch and specialization."""
    for op, shipped in OPS.items():
        for arch in ARCHS:
            for specialization in shipped(arch):
                report = compile_specialization(specialization, arch)
                yield _row(op, specialization.name, specialization.num_warps, specialization.num_stages, report)


def _row(op: str, name: str, num_warps: int, num_stages: int, report: Report) -> str:
    cells = (
        op,
        name,
        f"sm_{report.arch}",
        num_warps,
        num_stages,
        report.registers,
        report.shared,
        report.spill_stores + report.spill_loads,
        report.mma(),
        report.tma_loads or "-",
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table() -> str:
    rule = "|" + "---|" * (HEADER.count("|") - 1)
    return "\n".join([f"Compiled by Triton {triton.__version__}.", "", HEADER, rule, *rows()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="a Markdown file with two <!-- kernel table --> marks")
    path = parser.parse_args().write
    text = table()
    if path is None:
        print(text)
        return
    before, _, after = path.read_text().split(MARK)
    path.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}")


if __name__ == "__main__":
    main()
