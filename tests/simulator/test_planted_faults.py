"""Faults planted in the kernels' sources one at a time, of synchronization above all: the tests find each."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from simulated import LIBRARY_NAME


class Fault(NamedTuple):
    file: str
    right: str
    wrong: str
    kernel: str  # the tests that have to find it
    says: str  # what they say: an error in the values, or the simulated device's own words


VALUES = "AssertionError: off by|assert .*all"
FAULTS = {
    "covariance_sm80: a stage is read before all threads have brought theirs": Fault(
        "covariance/covariance_sm80",
        "__syncthreads();  // everyone's copies",
        "// everyone's copies",
        "covariance_sm80",
        VALUES,
    ),
    "covariance_sm80: one group of copies too few is waited for": Fault(
        "covariance/covariance_sm80",
        "wait_copies<kStages - 2>",
        "wait_copies<kStages - 1>",
        "covariance_sm80",
        f"{VALUES}|not waited for",
    ),
    "covariance_sm80: no zeros past the last token": Fault(
        "covariance/covariance_sm80",
        "valid_features(feature, args.features) : 0;\n      const Element* from = valid ?",
        "valid_features(feature, args.features) : 8;\n      const Element* from = valid ?",
        "covariance_sm80",
        VALUES,
    ),
    "covariance_sm90: a stage is given back while it is multiplied": Fault(
        "covariance/covariance_sm90",
        "sm90::arrive(pipeline.empty(step - 1))",
        "sm90::arrive(pipeline.empty(step))",
        "covariance_sm90",
        f"{VALUES}|no thread can go on|more threads arrive",
    ),
    "covariance_sm90: a stage is read before it is full": Fault(
        "covariance/covariance_sm90",
        "sm90::wait(pipeline.full(step), Pipeline::parity(step));",
        "",
        "covariance_sm90",
        VALUES,
    ),
    "covariance_sm90: a stage is overwritten before it is given back": Fault(
        "covariance/covariance_sm90",
        "sm90::wait(pipeline.empty(step), Pipeline::parity(step) ^ 1);",
        "",
        "covariance_sm90",
        f"{VALUES}|no thread can go on",
    ),
    "covariance_sm90: more bytes are expected than come": Fault(
        "covariance/covariance_sm90",
        "const int operands = block.diagonal() ? 1 : 2;",
        "const int operands = 1;",
        "covariance_sm90",
        f"{VALUES}|no thread can go on",
    ),
    "covariance_sm90: accumulators are read before the products are done": Fault(
        "covariance/covariance_sm90",
        "sm90::wait_products<0>();",
        "",
        "covariance_sm90",
        f"{VALUES}|not waited for",
    ),
    "covariance_sm90: no fence between the accumulators' uses": Fault(
        "covariance/covariance_sm90", "sm90::fence_products();", "", "covariance_sm90", "wgmma.fence"
    ),
    "decode_sm80: t is read before the kernel that writes it has ended": Fault(
        "lowrank_linear/decode_sm80", "wait_for_predecessor();", "", "decode_sm80", VALUES
    ),
    "decode_sm80: the sums take t's place while it is read": Fault(
        "lowrank_linear/decode_sm80",
        "__syncthreads();  // t has been read",
        "// t has been read",
        "decode_sm80",
        VALUES,
    ),
    "decode_sm90: t is read before all blocks have written it": Fault(
        "lowrank_linear/decode_sm90", "cg::this_grid().sync();", "", "decode_sm90", VALUES
    ),
    "decode_sm90: up is read before it is there": Fault(
        "lowrank_linear/decode_sm90", "sm90::wait(sm90::shared_address(shared), 0);", "", "decode_sm90", VALUES
    ),
    "decode_sm90: sums are read before the cluster has left them": Fault(
        "lowrank_linear/decode_sm90", "cluster.sync();", "__syncthreads();", "decode_sm90", VALUES
    ),
    "decode_sm90: sums are overwritten while they are read": Fault(
        "lowrank_linear/decode_sm90",
        "__syncthreads();  // the sums have been read",
        "// the sums have been read",
        "decode_sm90",
        VALUES,
    ),
    "decode_sm90: the slab is a tile longer than its memory": Fault(
        "lowrank_linear/decode_sm90",
        "least(args.resident_tiles, slab",
        "least(args.resident_tiles + 1, slab",
        "decode_sm90",
        "within the block's shared memory",
    ),
    "prefill_sm90: t is read before the cluster has handed it over": Fault(
        "lowrank_linear/prefill_sm90",
        "      sm90::arrive_cluster();\n      sm90::wait_cluster();\n#pragma",
        "#pragma",
        "prefill_sm90",
        f"{VALUES}|no thread can go on|cluster's barrier",
    ),
    "prefill_sm90: a stage is given back while it is multiplied": Fault(
        "lowrank_linear/prefill_sm90",
        "sm90::wait_products<0>();\n      if (consumer % 32 == 0) sm90::arrive(empty(step));",
        "if (consumer % 32 == 0) sm90::arrive(empty(step));\n      sm90::wait_products<0>();",
        "prefill_sm90",
        VALUES,
    ),
    "prefill_sm90: the first round waits for stages that nobody gives back": Fault(
        "lowrank_linear/prefill_sm90",
        "sm90::wait(empty(step), parity(step) ^ 1);  // the first",
        "sm90::wait(empty(step), parity(step));  // the first",
        "prefill_sm90",
        "no thread can go on; .* wait for a barrier in shared memory",
    ),
    "prefill_sm90: a block ends while others write to it": Fault(
        "lowrank_linear/prefill_sm90",
        "    __syncwarp();\n    if constexpr (kCluster > 1) sm90::wait_cluster();",
        "    __syncwarp();",
        "prefill_sm90",
        "between arriving at the cluster's barrier and waiting",
    ),
}


def run(*command: str | Path, cwd: Path) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def plant(fault: Fault, library: Path, folder: Path) -> Path:
    """The library with one source compiled anew."""
    build = next(parent for parent in library.parents if (parent / "compile_commands.json").is_file())
    commands = json.loads((build / "compile_commands.json").read_text())
    entry = next(c for c in commands if c["file"].endswith(f"{fault.file}.cpp"))
    source = Path(entry["file"])
    text = source.read_text()
    assert text.count(fault.right) == 1, f"{source} has {fault.right!r} {text.count(fault.right)} times"
    planted = folder / source.name
    planted.write_text(f'#line 1 "{source}"\n' + text.replace(fault.right, fault.wrong))
    arguments = shlex.split(entry["command"])
    output = arguments.index("-o") + 1
    objects = [shlex.split(c["command"])[output] for c in commands if "lowrank_ops_simulated" in c["command"]]
    objects.remove(arguments[output])
    arguments[output] = str(folder / "planted.o")
    arguments[arguments.index(str(source))] = str(planted)
    run(*arguments, "-O0", "-g0", "-iquote", source.parent, cwd=build)
    torch = next(a for a in arguments if a.endswith("torch/include")).removesuffix("include") + "lib"
    out = folder / LIBRARY_NAME
    link = ["-L" + torch, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    run("c++", "-shared", "-o", out, folder / "planted.o", *objects, *link, cwd=build)
    return out


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_found(fault: Fault, library: Path, tmp_path: Path) -> None:
    planted = plant(fault, library, tmp_path)
    tests = Path(__file__).with_name("test_kernels.py")
    options = ["-x", "-q", "-p", "no:cacheprovider", "-k", fault.kernel, "--simulated-library", planted]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", tests, *options], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1, result.stdout
    assert re.search(rf"^E .*({fault.says})", result.stdout, re.MULTILINE), result.stdout
