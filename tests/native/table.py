"""Prints a Markdown table of every CUDA kernel of the built library: ``python -m tests.native.table [LIBRARY]``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.native import machine_code

HEADER = (
    "| kernel | template arguments | arch | registers | static shared memory, B | stack, B | spills | instructions "
    "| MMAs | copies | run |"
)
TYPES = {"f": "fp32", "NS_4arch4Tf32E": "fp32 as tf32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")
SPILLS = ("LDL", "STL")  # to and from local memory
SOURCES = ("rows", "aligned rows", "patches")  # the enumerators of Source


def arguments(kernel: machine_code.Kernel) -> str:
    """``"bf16, aligned rows, 4 stages"`` from the mangled template arguments."""
    if edge := re.search(r"covariance_add_partialsILi(\d+)E", kernel.symbol):
        return f"tiles of {edge[1]}"
    match = re.search(rf"{kernel.name}I({'|'.join(TYPES)})(\S*?)Evv?", kernel.symbol + "v")
    if match is None:
        return "-"
    parts = [TYPES[match[1]]]
    rest = match[2] + "E"
    if kernel.name == "covariance_sm80":
        source, stages = re.findall(r"E(\d+)E", rest.replace("ELi", "EE"))[:2]
        parts += [SOURCES[int(source)], f"{stages} stages"]
    elif kernel.name == "decode_sm90":
        groups, row_tiles = re.findall(r"Li(\d+)E", rest)
        parts += [f"{8 * int(groups)} tokens", f"{16 * int(row_tiles)} rows of down"]
    elif kernel.name == "prefill_sm90":
        ranks, cluster, peers, warpgroups = re.findall(r"Li(\d+)E", rest)
        parts += [f"{64 * int(warpgroups)} tokens", f"ranks up to {ranks}", f"clusters of {cluster}"]
        parts += ["a peer CTA"] if peers == "2" else []
    elif kernel.name.startswith("decode"):
        groups, vectorized = re.findall(r"L[ib](\d+)E", rest)
        parts += [f"{8 * int(groups)} tokens", "aligned" if vectorized == "1" else "any alignment"]
    return ", ".join(parts)


def row(kernel: machine_code.Kernel) -> str:
    mmas = ", ".join(f"{count} {opcode}" for opcode, count in sorted(kernel.mmas.items())) or "-"
    copies = ", ".join(f"{kernel.opcodes[name]} {name}" for name in COPIES if kernel.has(name)) or "-"
    cells = (
        kernel.name,
        arguments(kernel),
        kernel.arch,
        kernel.registers,
        kernel.shared,
        kernel.stack,
        sum(kernel.opcodes.get(name, 0) for name in SPILLS),
        sum(kernel.opcodes.values()),
        mmas,
        copies,
        "compiled, not run",
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(library: Path) -> str:
    rule = "|" + "---|" * (HEADER.count("|") - 1)
    kernels = sorted(machine_code.kernels(library), key=lambda kernel: (kernel.name, kernel.symbol, kernel.arch))
    return "\n".join([HEADER, rule, *map(row, kernels)])


def main() -> None:
    from lowrank_ops.ops import _native

    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else _native.LIBRARY))


if __name__ == "__main__":
    main()
