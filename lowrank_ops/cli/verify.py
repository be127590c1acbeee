"""``lowrank-ops doctor --verify``: runs all kernels on the GPU at hand and records those that are right."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..factors.eight_bit import DTYPES as DTYPES_8_BIT
from ..factors.eight_bit import quantized
from ..ops import _native, _verify, covariance, grouped, linear
from ..ops._backend import Backend, Impl, kernel_of
from ..ops.covariance import _cuda as covariance_cuda
from ..ops.grouped import _cuda as grouped_cuda
from ..ops.linear import _cuda as linear_cuda
from ..ops.linear import reference
from .command import Failure, Result, one_line

DTYPES = (torch.bfloat16, torch.float16)
TOKENS = (1, 7, 64, 200, 3000)
LAYERS = ((768, 136, 3072), (4096, 512, 1024), (203, 37, 301))  # in_features, rank, out_features
EIGHT_BIT = [(down, up) for form in DTYPES_8_BIT for down, up in ((form, form), (form, None), (None, form))]
MATRICES = ((12608, 768), (3000, 4096), (777, 333))  # tokens, features
IMAGES = ((8, 64, 28, 28), (2, 24, 17, 13))  # batch, channels, height, width

_REFUSE: dict[str, Callable[..., str]] = {
    "covariance_update_": covariance_cuda.refuse,
    "conv_covariance_update_": covariance_cuda.refuse_conv,
    "lowrank_linear": linear_cuda.refuse,
    "lowrank_linear_grouped": grouped_cuda.refuse,
}
_Run = Callable[..., "_verify.Errors | None"]  # of an implementation and its options


def run() -> Result:
    """Verify on the current CUDA device and write the record."""
    if not torch.cuda.is_available():
        raise Failure(1, "doctor --verify runs the kernels on a CUDA device, and torch finds none here.")
    device = torch.device("cuda", torch.cuda.current_device())
    return verify(device, torch.cuda.get_device_name(device))


def verify(device: torch.device, name: str) -> Result:
    """Run every kernel on ``device`` for all cases that it supports, and write the record of the device's arch."""
    found: dict[tuple[str, str, str], list[str]] = {}  # by op, kernel and compiler, what was wrong
    worst: dict[tuple[str, str, str], tuple[int, float]] = {}  # calls, and the largest error over the allowed one
    arch = device.type
    for op, table, problem, compare in _cases(device):
        arch = _verify.arch(problem.device)
        for kernel, impl, options in _kernels(op, table, problem):
            key = op, kernel, _verify.compiler(op, impl.backend)
            wrong = found.setdefault(key, [])
            calls, ratio = worst.get(key, (0, 0.0))
            try:
                errors = compare(impl, **options)
                assert errors is not None, "the inputs are neither zero nor infinite"
                error, allowed = errors
                if not error <= allowed:
                    wrong.append(f"error {error:.2e}, allowed {allowed:.2e}, for {problem}")
                ratio = max(ratio, error / allowed)
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {one_line(error)}, for {problem}")
            worst[key] = calls + 1, ratio
    if not found:
        raise Failure(1, f"No kernel can run on {name}; lowrank-ops doctor shows why.")
    path = _verify.write_record(arch, name, {key: not wrong for key, wrong in found.items()})
    return _report(arch, name, str(path), found, worst)


def _report(
    arch: str,
    device: str,
    path: str,
    found: dict[tuple[str, str, str], list[str]],
    worst: dict[tuple[str, str, str], tuple[int, float]],
) -> Result:
    rows = [("op", "kernel", "compiler", "calls", "error / allowed", "result")]
    kernels = []
    for key, wrong in found.items():
        calls, ratio = worst[key]
        state = "right" if not wrong else f"WRONG in {len(wrong)}"
        rows.append((*key, str(calls), f"{ratio:.2f}", state))
        op, kernel, compiler = key
        kernels.append(
            {"op": op, "kernel": kernel, "compiler": compiler, "calls": calls, "error": ratio, "wrong": wrong}
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{device}, {arch}", ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for (_, kernel, _), wrong in found.items():
        lines += ["", f"{kernel}: {wrong[0]}"] if wrong else []
    lines += ["", f"The record is {path}; first calls of the kernels that are right in all calls are not checked."]
    document = {"command": "doctor", "arch": arch, "device": device, "kernels": kernels, "record": path}
    return Result(document, "\n".join(lines), 1 if any(found.values()) else 0)


def _kernels(op: str, table: tuple[Impl, ...], problem: Any) -> Iterator[tuple[str, Impl, dict[str, Any]]]:
    """The kernels that can run a problem: names, implementations and options of ``impl.run``."""
    for impl in table:
        if impl.backend is Backend.TRITON and impl.supports(problem) is None:
            yield kernel_of(impl, problem), impl, {}
    cuda = next((impl for impl in table if impl.backend is Backend.CUDA), None)
    if cuda is not None and _native.unavailable_on(problem.device.type) is None:
        for kernel in _native.KERNELS:
            choice = _native.Choice(kernel=kernel)
            if not _REFUSE[op](problem, choice):
                yield kernel, cuda, {"choice": choice}


def _cases(device: torch.device) -> Iterator[tuple[str, tuple[Impl, ...], Any, _Run]]:
    """Ops, tables, problems and functions that run an implementation and return its error and the allowed one."""
    normal = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    for dtype in DTYPES:
        for tokens in TOKENS:
            for width, rank, outputs in LAYERS:
                x = normal(tokens, width).to(dtype)
                down, up = (normal(rank, width) / width**0.5).to(dtype), (normal(outputs, rank) / rank**0.5).to(dtype)
                yield _linear(x, down, up, normal(outputs).to(dtype), "gelu")
                yield _linear(x, down.T.contiguous().T, up.T.contiguous().T, None, "none")  # as in the backward
                for forms in EIGHT_BIT:
                    pairs = zip((down, up), forms, strict=True)
                    (down_8, down_scale), (up_8, up_scale) = (
                        (factor, None) if form is None else quantized(factor, form) for factor, form in pairs
                    )
                    scales = {"down_scale": down_scale, "up_scale": up_scale}
                    yield _linear(x, down_8, up_8, normal(outputs).to(dtype), "gelu", **scales)
                yield _grouped(
                    x, [down, down[: rank // 2]], [up, up[:, : rank // 2].contiguous()], [None, up[:, 0].contiguous()]
                )
                yield _grouped(x, [down], [up, up[: outputs // 2], up[:8]], [None] * 3)  # one down for all
    for dtype, tf32 in (*((dtype, False) for dtype in DTYPES), (torch.float32, False), (torch.float32, True)):
        for state in (torch.float32, torch.float64):
            for matrix in MATRICES:
                x = normal(*matrix).to(dtype)
                second_moment = torch.empty(matrix[1], matrix[1], dtype=state, device=device)
                problem: Any = covariance.describe(
                    second_moment, x, deterministic=state == torch.float64, allow_tf32=tf32
                )
                table = covariance.TABLE
                yield "covariance_update_", table, problem, _comparison(covariance.trial, problem, x)
            for shape, groups, layout in zip(
                IMAGES, (1, 2), (torch.channels_last, torch.contiguous_format), strict=True
            ):
                x = normal(*shape).to(dtype).contiguous(memory_format=layout)
                total = torch.empty(groups, shape[1] // groups * 9, dtype=state, device=device)
                problem = covariance.describe_conv(total, total, x, (3, 3), (1, 2), (1, 0), (1, 1), allow_tf32=tf32)
                table = covariance.CONV_TABLE
                yield "conv_covariance_update_", table, problem, _comparison(covariance.trial_conv, problem, x)


def _linear(*args: Any, **scales: Any) -> tuple[str, tuple[Impl, ...], Any, _Run]:
    problem = linear.describe(*args, **scales)

    def compare(impl: Impl, **options: Any) -> _verify.Errors | None:
        return reference.errors(impl.run(problem, *args, **scales, **options), *args, **scales)

    return "lowrank_linear", linear.TABLE, problem, compare


def _grouped(*args: Any) -> tuple[str, tuple[Impl, ...], Any, _Run]:
    problem = grouped.describe(*args)

    def compare(impl: Impl, **options: Any) -> _verify.Errors | None:
        return grouped.reference.errors(impl.run(problem, *args, **options), *args)

    return "lowrank_linear_grouped", grouped.TABLE, problem, compare


def _comparison(trial: Callable[..., _verify.Errors | None], problem: Any, x: torch.Tensor) -> _Run:
    return lambda impl, **options: trial(impl, problem, x, limit=sys.maxsize, **options)
