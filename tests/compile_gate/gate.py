"""Compiles a Triton kernel for an arch without a device of it and checks the machine code.

Must run in a process without TRITON_INTERPRET: the interpreter replaces the kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from tests.compile_gate.launches import Launch
from tests.sass import overwritten_operands

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes per CTA, opt-in limit
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SERIALIZED = ("C7510", "C7511", "C7515")  # ptxas: "wgmma pipelines were serialized because ..."

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_TENSOR_CORE_OPCODE = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
_ASYNC_PROXY_MMA = re.compile(r"HGMMA|UTC\w*MMA")  # read shared memory through the async proxy
_LINE = re.compile(
    r"^(?P<label>\.L_\w+):|^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<code>[A-Z].*?)\s*;", re.MULTILINE
)
_BRANCH = re.compile(r"BRA.*`\((\.L_\w+)\)")
_WAIT = re.compile(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)")  # for all but so many groups of LDGSTS, which is cp.async
_REPORT_VERSION = 4


class Report(NamedTuple):
    """The machine code of one kernel for one arch."""

    arch: int
    triton: str
    registers: int  # per thread
    stack: int  # bytes per thread
    spill_stores: int  # bytes, as ptxas counts them
    spill_loads: int
    local_stores: int  # STL instructions
    local_loads: int  # LDL instructions
    shared: int  # bytes per CTA
    tensor_core: dict[str, int]  # opcode -> count
    tma_loads: int  # UTMALDG instructions
    serialized: list[str]  # ptxas's codes for wgmma that waits after each instruction
    in_flight: list[int]  # of each loop that loads by cp.async: groups of loads that its waits leave in flight
    overwritten: int  # writes to registers that a wgmma may still read
    unfenced: int  # wgmma or tcgen05.mma after a wait for cp.async without a fence.proxy.async between them

    def mma(self) -> str:
        """The kernel's most frequent tensor-core instruction, or "-"."""
        return max(self.tensor_core, key=self.tensor_core.__getitem__) if self.tensor_core else "-"


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int,
    num_stages: int,
    attrs: Mapping[tuple[int, ...], Any] | None = None,
    **options: Any,
) -> Report:
    """Compile ``kernel`` for ``arch`` (80, 90 or 100) and read the cubin. Reports are cached in Triton's cache.

    ``signature`` holds every argument that is not in ``constexprs``.
    """
    full = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, full, dict(constexprs), dict(attrs or {}))
    options = {"num_warps": num_warps, "num_stages": num_stages, **options}
    key = repr((_REPORT_VERSION, triton.__version__, source.hash(), arch, sorted(options.items())))
    cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    kept = cache.get_file("report.json")
    if kept is not None:
        return Report(**json.loads(Path(kept).read_text()))

    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True  # only this log reports spills and serialized wgmma
        knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = _read(arch, compiled, log.getvalue())
    cache.put(json.dumps(report._asdict()), "report.json", binary=False)
    return report


def compile_launch(launch: Launch, arch: int) -> Report:
    """Compile a recorded launch for ``arch``."""
    options = {"num_warps": 4, "num_stages": 3, **launch.options}  # Triton's defaults
    return compile_kernel(launch.kernel, launch.signature, launch.constexprs, arch, attrs=launch.attrs, **options)


def assert_clean(
    report: Report, arch: int, tma: bool = False, mma: bool | str = True, spills: int = 0, in_flight: int = 0
) -> None:
    """Fail, listing all faults of ``report``: spills, too much shared memory, missing instructions, serialized wgmma.

    Args:
        tma: whether the kernel must load by TMA.
        spills: bytes that the kernel is known to spill, at most.
        in_flight: groups of loads that every loop over cp.async has to leave in flight where it waits, at least.
        mma: True if it must use the arch's newest tensor-core instruction; a string names another, False accepts any.
    """
    faults = []
    if report.arch != arch:
        faults.append(f"compiled for sm_{report.arch}, not sm_{arch}")
    if max(report.spill_stores, report.spill_loads) > spills:
        faults.append(f"spills {report.spill_stores} bytes of stores, {report.spill_loads} bytes of loads")
    if max(report.local_stores, report.local_loads) > spills // 4:
        faults.append(f"{report.local_stores} STL and {report.local_loads} LDL instructions")
    if report.shared > SHARED_LIMIT[arch]:
        faults.append(f"{report.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    if tma and not report.tma_loads:
        faults.append("no UTMALDG: the loads do not go through TMA")
    wanted = TENSOR_CORE[arch] if mma is True else mma
    if wanted and not any(opcode.startswith(wanted) for opcode in report.tensor_core):
        faults.append(f"no {wanted}; tensor-core instructions: {report.tensor_core or 'none'}")
    if report.overwritten:
        faults.append(f"{report.overwritten} writes to registers that a wgmma may still read")
    if report.unfenced:
        faults.append(f"{report.unfenced} MMAs that read what cp.async wrote without a fence.proxy.async between them")
    if in_flight > min(report.in_flight, default=in_flight):
        faults.append(f"loops that wait with {report.in_flight} groups of loads in flight; {in_flight} are required")
    if report.serialized:
        faults.append(f"ptxas serialized wgmma: {', '.join(report.serialized)}")
    assert not faults, f"sm_{arch}, Triton {report.triton}: " + "; ".join(faults)


def _read(arch: int, compiled: Any, log: str) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        code = _tool("nvdisasm", "--no-dataflow", "-c", str(cubin))
    opcodes = Counter(_OPCODE.findall(code))
    return Report(
        arch=arch,
        triton=triton.__version__,
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        spill_stores=_number(r"(\d+) bytes spill stores", log),
        spill_loads=_number(r"(\d+) bytes spill loads", log),
        local_stores=_starting(opcodes, "STL"),
        local_loads=_starting(opcodes, "LDL"),
        shared=compiled.metadata.shared,
        tensor_core={opcode: count for opcode, count in sorted(opcodes.items()) if _TENSOR_CORE_OPCODE.match(opcode)},
        tma_loads=_starting(opcodes, "UTMALDG"),
        serialized=sorted({message for message in SERIALIZED if message in log}),
        in_flight=loads_in_flight(code),
        overwritten=len(overwritten_operands(code)),
        unfenced=unfenced_mmas(code),
    )


def loads_in_flight(code: str) -> list[int]:
    """For each loop of ``code`` that loads by cp.async: how many groups of loads its waits leave in flight."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops = []
    for line in _LINE.finditer(code):
        if line["label"]:
            labels[line["label"]] = len(instructions)
            continue
        branch = _BRANCH.match(line["code"])
        if branch and branch[1] in labels:
            loops.append((labels[branch[1]], len(instructions)))
        instructions.append(line["code"])
    found: list[tuple[int, int]] = []
    waits = {}
    for first, last in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        body = instructions[first:last]
        left = [int(wait[1], 16) for wait in map(_WAIT.match, body) if wait]
        innermost = all(last < other_first or other_last < first for other_first, other_last in found)
        if innermost and left and any(instruction.startswith("LDGSTS") for instruction in body):
            found.append((first, last))
            waits[first] = min(left)
    return [waits[first] for first in sorted(waits)]


def unfenced_mmas(code: str) -> int:
    """MMAs of the async proxy that follow a wait for cp.async, a write by the generic proxy, without a fence."""
    count, unfenced = 0, False
    if "LDGSTS" not in code:
        return 0
    for line in _LINE.finditer(code):
        instruction = line["code"] or ""
        if _WAIT.match(instruction):
            unfenced = True
        elif instruction.startswith("FENCE.VIEW.ASYNC"):
            unfenced = False
        elif unfenced and _ASYNC_PROXY_MMA.match(instruction):
            count += 1
    return count


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_BIN / name, *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    assert found, f"no match for {pattern!r} in:\n{text}"
    return max(int(value) for value in found)


def _starting(opcodes: Counter[str], prefix: str) -> int:
    return sum(count for opcode, count in opcodes.items() if opcode.split(".")[0] == prefix)
