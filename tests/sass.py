"""Reads machine code as cuobjdump and nvdisasm print it."""

from __future__ import annotations

import re
from collections.abc import Iterator

_LINE = re.compile(
    r"^(?P<label>\.L_\w+):|^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<code>[A-Z].*?)\s*;",
    re.MULTILINE,
)
_FROM_REGISTERS = re.compile(r"HGMMA\S*\s+R\d+, R(\d+)(?:\.\w+)*, gdesc")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_BRANCH = re.compile(r"BRA\S*\s.*?(?:`\((\.L_\w+)\)|0x([0-9a-f]+))$")
_WRITES = re.compile(r"(?P<opcode>\S+)\s+(?:U?!?PT?\d?, )*R(?P<first>\d+)\b")
_NO_RESULT = re.compile(r"BAR|BRX|RET|WARPSYNC|NANOSLEEP|\w*SETP")  # whose first register is read
_OPERANDS = 4  # registers of A of one HGMMA
_GIVES_BACK = re.compile(r"USETMAXREG\.DEALLOC\S*\s+(0x[0-9a-f]+)")  # all registers from this number on

_Instruction = tuple[str, bool]  # without its predicate, and whether it has one


def overwritten_operands(code: str) -> list[str]:
    """Instructions that write to an A register of a wgmma which may still run: between it and the wait for its group.

    ptxas before 13.3 is known to allocate such registers again. All paths from each wgmma are followed.
    """
    if "HGMMA" not in code:
        return []
    instructions, numbers = _parsed(code)
    found = []
    for start, (instruction, _) in enumerate(instructions):
        if not (operand := _FROM_REGISTERS.match(instruction)):
            continue
        first = int(operand[1])
        # Where the path is, and groups committed since this wgmma, its own among them.
        paths, seen = [(start + 1, int("gsb0" in instruction))], set()
        while paths:
            at, groups = paths.pop()
            if at >= len(instructions) or (at, groups) in seen:
                continue
            seen.add((at, groups))
            now, _ = instructions[at]
            if (wait := _WAIT.match(now)) and groups > int(wait[1], 16):
                continue
            if any(first <= register < first + _OPERANDS for register in _written(now)):
                found.append(f"{now} while {instruction} may run")
                continue
            groups = min(groups + (now.startswith("HGMMA") and "gsb0" in now), 8)
            paths += [(after, groups) for after in _after(at, instructions, numbers)]
    return found


def returned_registers(code: str) -> list[str]:
    """Instructions that use a register which their warp has released by setmaxnreg.dec, on any path from it."""
    if "USETMAXREG" not in code:
        return []
    instructions, numbers = _parsed(code)
    found = []
    for start, (instruction, _) in enumerate(instructions):
        if not (gives_back := _GIVES_BACK.match(instruction)):
            continue
        paths, seen = [start + 1], set()
        while paths:
            at = paths.pop()
            if at >= len(instructions) or at in seen:
                continue
            seen.add(at)
            now = instructions[at][0]
            if any(int(register) >= int(gives_back[1], 16) for register in re.findall(r"\bR(\d+)", now)):
                found.append(f"{now} after {instruction}")
            paths += _after(at, instructions, numbers)
    return found


def _parsed(code: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions, and which of them the labels and addresses are."""
    instructions: list[_Instruction] = []
    numbers: dict[str, int] = {}
    for line in _LINE.finditer(code):
        if line["label"]:
            numbers[line["label"]] = len(instructions)
        else:
            numbers[line["address"].lstrip("0") or "0"] = len(instructions)
            instructions.append((line["code"], line["predicate"] is not None))
    return instructions, numbers


def _after(at: int, instructions: list[_Instruction], numbers: dict[str, int]) -> Iterator[int]:
    """The instructions that may be next."""
    now, conditional = instructions[at]
    branch = _BRANCH.match(now)
    if branch:
        yield numbers[branch[1] or branch[2].lstrip("0") or "0"]
    if conditional or not (branch or now.startswith("EXIT")):
        yield at + 1


def _written(instruction: str) -> range:
    """The registers of its result."""
    match = None if _NO_RESULT.match(instruction) else _WRITES.match(instruction)
    if match is None:
        return range(0)
    opcode, first = match["opcode"], int(match["first"])
    if shape := re.match(r"HGMMA\.64x(\d+)x\d+\.(F16)?", opcode):
        count = int(shape[1]) // (4 if shape[2] else 2)
    elif opcode.startswith(("HMMA", "LDSM")):
        count = 4
    else:
        count = 4 if ".128" in opcode else 2 if re.search(r"\.64|WIDE|^D(ADD|MUL|FMA)", opcode) else 1
    return range(first, first + count)
