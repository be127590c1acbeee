"""Registers, stack, shared memory and instructions of every kernel in a library or an object file."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.sass import overwritten_operands, returned_registers

REGISTERS_PER_SM = 65536
# Bytes of static shared memory that the planner leaves room for beside the dynamic. The other kernels may opt in to all
# there is. From sm_90 on cuobjdump counts the system's 1024 bytes, which are not part of that limit.
STATIC_SHARED = {"covariance_sm80": 8320, "covariance_sm90": 4096, "covariance_sm90_wide": 4096}
RESERVED_SHARED = 1024

# Threads per CTA and CTAs per SM.
LAUNCH_BOUNDS = {
    "covariance_sm80": (256, 1),
    "covariance_sm90": (288, 2),
    "covariance_sm90_wide": (384, 1),
    "covariance_add_partials": (256, 1),
    "decode_down_sm80": (256, 1),
    "decode_up_sm80": (256, 1),
    "decode_sm90": (256, 1),
    "prefill_sm90": (288, 1),
}
THREE_WARPGROUPS = (512, 1)  # prefill_sm90 with three consumer warpgroups

# Required instructions: tensor cores, TMA, mbarriers, barriers of the cluster and the grid.
NEEDS = {
    "decode_down_sm80": ("HMMA", "ATOMG", "MEMBAR"),
    "covariance_sm90": ("HGMMA", "UTMALDG", "SYNCS"),
    "covariance_sm90_wide": ("HGMMA", "UTMALDG", "SYNCS", "UCGABAR_ARV", "UCGABAR_WAIT", "USETMAXREG", "REDG"),
    "decode_sm90": ("HMMA", "UBLKCP", "SYNCS", "UCGABAR_ARV", "UCGABAR_WAIT", "ATOM"),
    "prefill_sm90": ("HGMMA", "UTMALDG", "SYNCS"),
}


class Kernel(NamedTuple):
    """One kernel for one arch."""

    name: str
    symbol: str  # mangled, with the template arguments
    arch: str
    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # static bytes per CTA
    opcodes: dict[str, int]  # first word of the opcode -> count
    mmas: dict[str, int]  # tensor-core opcodes in full -> count
    device_fences: int = 0  # MEMBAR.GPU: wait until all writes of the thread are visible to the device
    overwritten: int = 0  # writes to registers that a wgmma may still read
    returned: int = 0  # instructions with registers that setmaxnreg has given back

    def has(self, opcode: str) -> bool:
        return self.opcodes.get(opcode, 0) > 0


def three_warpgroups(kernel: Kernel) -> bool:
    """Whether a CTA has three consumer warpgroups: the last template argument of prefill_sm90."""
    return kernel.name == "prefill_sm90" and re.search(r"Li3EE", kernel.symbol) is not None


def tool(name: str) -> str | None:
    """The toolkit's program, or Triton's; cuobjdump and nvdisasm have to be of the same."""
    found = shutil.which(name) or shutil.which(name, path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.submodule_search_locations is None:
        return None
    bundled = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.is_file() else None


def kernels(binary: Path) -> list[Kernel]:
    """Every kernel in ``binary`` for every arch, in both reports of cuobjdump."""
    usage = {}
    for arch, text in _by_arch(_cuobjdump("-res-usage", binary)):
        for symbol, registers, stack, shared in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text
        ):
            usage[arch, symbol] = int(registers), int(stack), int(shared)
    found = []
    for arch, text in _by_arch(_cuobjdump("-sass", binary)):
        for part in text.split("Function : ")[1:]:
            symbol, code = part.split("\n", 1)
            opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
            found.append(
                Kernel(
                    kernel_name(symbol),
                    symbol,
                    arch,
                    *usage[arch, symbol],
                    Counter(opcode.split(".")[0] for opcode in opcodes),
                    Counter(opcode for opcode in opcodes if "MMA" in opcode.split(".")[0]),
                    sum(opcode.startswith("MEMBAR") and opcode.endswith(".GPU") for opcode in opcodes),
                    len(overwritten_operands(code)),
                    len(returned_registers(code)),
                )
            )
    assert len(found) == len(usage), "the two reports have different kernels"
    return found


def kernel_name(symbol: str) -> str:
    """``"decode_up_sm80"`` from its mangled symbol, of any namespace; a kernel that is not in the list as it is."""
    return next((name for name in LAUNCH_BOUNDS if f"{len(name)}{name}" in symbol), symbol)


def faults(kernel: Kernel) -> list[str]:
    """All faults of ``kernel``."""
    found = []
    threads, ctas = LAUNCH_BOUNDS.get(kernel.name, (1024, 1))
    if three_warpgroups(kernel):
        threads, ctas = THREE_WARPGROUPS
    if kernel.registers * threads * ctas > REGISTERS_PER_SM:
        found.append(f"{kernel.registers} registers x {threads} threads x {ctas} CTAs are too many")
    if kernel.stack:
        found.append(f"a stack of {kernel.stack} bytes")
    for opcode in ("LDL", "STL"):
        if kernel.has(opcode):
            found.append(f"{kernel.opcodes[opcode]} {opcode}")
    static = kernel.shared - (0 if kernel.arch == "sm_80" else RESERVED_SHARED)
    if static > (planned := STATIC_SHARED.get(kernel.name, 0)):
        found.append(f"{static} bytes of static shared memory, {planned} are planned")
    found += [f"no {opcode}" for opcode in NEEDS.get(kernel.name, ()) if not kernel.has(opcode)]
    if kernel.overwritten:
        found.append(f"{kernel.overwritten} writes to registers that a wgmma may still read")
    if kernel.returned:
        found.append(f"{kernel.returned} instructions with registers that were given back")
    if kernel.has("HGMMA"):
        # A warpgroup waits once a step and once at the end; with serialized wgmma after every one.
        mmas, waits = kernel.opcodes.get("HGMMA", 0), kernel.opcodes.get("WARPGROUP", 0)
        if waits > mmas:
            found.append(f"{waits} WARPGROUP for {mmas} HGMMA: serialized")
    elif (
        kernel.name in LAUNCH_BOUNDS
        and "HGMMA" not in NEEDS.get(kernel.name, ())
        and kernel.name != "covariance_add_partials"
    ):
        mma = "HMMA.1688.F32.TF32" if "Tf32" in kernel.symbol else "HMMA.16816.F32"
        if not any(opcode.startswith(mma) for opcode in kernel.mmas):
            found.append(f"no {mma}: {kernel.mmas or 'no MMAs'}")
    # The cluster barrier publishes writes; releasing a stage to other CTAs, in the loop, must not.
    barriers = kernel.opcodes.get("UCGABAR_ARV", 0)
    if "UTMALDG" in NEEDS.get(kernel.name, ()) and kernel.device_fences > barriers:
        found.append(f"{kernel.device_fences} fences for the device, {barriers} cluster barriers")
    # Source::aligned_matrix is the enumerator 1.
    if kernel.name == "covariance_sm80" and "SourceE1E" in kernel.symbol and not kernel.has("LDGSTS"):
        found.append("no LDGSTS: no cp.async")
    return found


def _cuobjdump(option: str, binary: Path) -> str:
    program = tool("cuobjdump")
    assert program, "no cuobjdump"
    path = os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", "")])  # it runs nvdisasm
    result = subprocess.run(
        [program, option, str(binary)], check=True, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    return result.stdout


def _by_arch(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"^arch = (sm_\w+)$", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))
