"""``lowrank-ops doctor``: reports versions, devices, and which implementation of each op can run here."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
from collections.abc import Iterator
from typing import Any

import safetensors
import torch
from torch import Tensor

from .. import ops
from ..ops import _native
from ..version import __version__
from . import verify
from .command import Failure, Result, add_command, add_output, one_line

_DOCTOR = """\
Print the versions and devices found, and for each op which implementations can run here and why the others cannot.
Exits with 1 if an op has none; with --verify if a kernel is wrong or there is no CUDA device."""

_DOCTOR_EXAMPLE = """\
examples:
  lowrank-ops doctor
  plan the CUDA kernels for an arch, without a GPU
    lowrank-ops doctor --plan sm_90
  run all kernels on the GPU here; those that are right are then no longer checked in their first calls
    lowrank-ops doctor --verify"""


def add(commands: Any) -> None:
    """Declare the command."""
    doctor = add_command(
        commands, "doctor", "show what can run on this machine, and why the rest cannot", _DOCTOR, _DOCTOR_EXAMPLE, run
    )
    alone = doctor.add_mutually_exclusive_group()
    alone.add_argument(
        "--plan",
        metavar="ARCH",
        help="print only how the CUDA kernels run typical calls on an arch: sm_80, sm_90, ...",
    )
    alone.add_argument(
        "--verify",
        action="store_true",
        help="run all kernels on the CUDA device here, compare them with float64 and record those that are right",
    )
    add_output(doctor)


def run(options: argparse.Namespace) -> Result:
    if options.plan is not None:
        return _plans(options.plan)
    if options.verify:
        return verify.run()
    environment = {
        "lowrank_ops": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "not built into this torch",
        "triton": _version_of("triton"),
        "nvcc": _native.toolkit(),
        "safetensors": safetensors.__version__,
        "matplotlib": _version_of("matplotlib"),
    }
    devices = [{"device": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}]
    devices += [_gpu(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    calls = [call for device in devices for call in _calls(str(device["device"]))]
    held = all(any(row["chosen"] for row in call["implementations"]) for call in calls)

    width = max(map(len, environment))
    lines = [f"{name.ljust(width)}  {value}" for name, value in environment.items()]
    for device in devices:
        facts = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        lines.append(f"{'device'.ljust(width)}  {device['device']}: {device['name']}, {facts}")
    for call in calls:
        lines += ["", f"{call['op']} of {call['call']} on {call['device']}"]
        names = max(len(row["implementation"]) for row in call["implementations"])
        for row in call["implementations"]:
            state = "runs" if row["chosen"] else "can run" if row["can_run"] else f"cannot run: {row['reason']}"
            state += f", by {row['plan']}" if row["plan"] else ""
            lines.append(f"  {row['implementation'].ljust(names)}  {state}")
    lines += ["", "Every op can run on every device." if held else "No implementation can run one of these calls."]
    document = {"command": "doctor", "environment": environment, "devices": devices, "calls": calls, "held": held}
    return Result(document, "\n".join(lines), 0 if held else 1)


def _plans(arch: str) -> Result:
    """The native planner's choice for typical calls on an arch. Unlike ``explain``, it needs no tensors on a device."""
    calls: list[tuple[str, dict[str, Any]]] = [
        ("covariance_update_", {"tokens": tokens, "features": features})
        for tokens, features in ((12608, 768), (8192, 4096))
    ]
    calls.append(("conv_covariance_update_", {"tokens": 8 * 28 * 28, "features": 64 * 9, "groups": 1}))
    calls += [
        ("lowrank_linear", {"tokens": tokens, "in_features": width, "rank": rank, "out_features": outputs})
        for width, rank, outputs in ((768, 136, 768), (768, 216, 3072), (4096, 512, 4096))
        for tokens in (1, 64, 2048, 12608)
    ]
    grouped_query = {"in_features": 4096, "rank": (512, 256, 256), "out_features": (4096, 1024, 1024)}
    calls += [("lowrank_linear_grouped", {"tokens": tokens, **grouped_query}) for tokens in (1, 64)]
    plans: list[dict[str, Any]] = []
    lines = [f"bfloat16 on {arch}"]
    for op, call in calls:
        try:
            plan = _native.plan(op, arch, torch.bfloat16, **call)
        except RuntimeError as error:
            raise Failure(1, one_line(error)) from error
        plans.append({"op": op, "call": call, "plan": plan})
        lines += ["", f"{op} of {', '.join(f'{name} {size}' for name, size in call.items())}", f"  {plan}"]
    return Result({"command": "doctor", "arch": arch, "plans": plans}, "\n".join(lines))


def _version_of(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        return str(importlib.import_module(module).__version__)
    except Exception as error:  # report a broken installation, do not fail on it
        return f"cannot be imported: {one_line(error)}"


def _gpu(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "sm_count": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30, 1),
    }


def _calls(device: str) -> Iterator[dict[str, Any]]:
    """Typical calls of each op on a device, with one row per implementation."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    sums, width, rank, patch = torch.float64, 1024, 256, 64 * 9
    typical: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
        (
            "covariance_update_",
            f"4096 x {width}",
            (zeros(width, width, dtype=sums), zeros(width, dtype=sums), zeros(4096, width)),
            {},
        ),
        (
            "conv_covariance_update_",
            "8 x 64 x 28 x 28, kernel 3 x 3",
            (zeros(1, patch, patch, dtype=sums), zeros(1, patch, dtype=sums), zeros(8, 64, 28, 28)),
            {"kernel_size": (3, 3), "padding": (1, 1)},
        ),
    ]
    typical += [
        (
            "lowrank_linear",
            f"{tokens} x {width}, rank {rank}",
            (zeros(tokens, width), zeros(rank, width), zeros(width, rank)),
            {},
        )
        for tokens in (1, 4096)
    ]
    members = [zeros(rank, width)] * 3, [zeros(width, rank)] * 3
    typical += [
        (
            "lowrank_linear_grouped",
            f"{tokens} x {width}, 3 members of rank {rank}",
            (zeros(tokens, width), *members),
            {},
        )
        for tokens in (1, 4096)
    ]
    ends = zeros(3, dtype=torch.int64)
    tensors = zeros(64, width), ends, *members, [None] * 3
    typical.append(("lowrank_experts", f"64 x {width}, 3 experts of rank {rank}", tensors, {}))
    for op, shape, given, keywords in typical:
        yield {
            "op": op,
            "call": f"{shape}, {str(dtype).removeprefix('torch.')}",
            "device": device,
            "implementations": [_row(line) for line in ops.explain(op, *given, **keywords).splitlines()],
        }


def _row(line: str) -> dict[str, Any]:
    """Parse a line of ``ops.explain``."""
    name, _, answer = line.partition(": ")
    refused = answer.startswith("cannot run: ")
    state, _, plan = ("", "", "") if refused else answer.partition(", by ")
    return {
        "implementation": name,
        "can_run": not refused,
        "chosen": state == "runs",
        "reason": answer.removeprefix("cannot run: ") if refused else None,
        "plan": plan or None,
    }
