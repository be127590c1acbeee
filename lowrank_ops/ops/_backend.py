"""Chooses which implementation of an op runs, from facts about the device and the tensors' layout."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Backend(str, enum.Enum):
    """Where an implementation comes from. ``AUTO`` lets :func:`choose` decide.

    ``UNVERIFIED`` is ``AUTO`` without the check of first calls in ``_verify``.
    """

    AUTO = "auto"
    UNVERIFIED = "unverified"
    REFERENCE = "reference"
    TRITON = "triton"
    CUDA = "cuda"


FREE = (Backend.AUTO, Backend.UNVERIFIED)  # those that leave the choice to this package


class Impl(NamedTuple):
    """One implementation of an op. A problem is a hashable description of shapes, dtypes, layout and device.

    ``supports(problem)`` returns None, or the reason why the implementation cannot run the problem. Legality is
    decided nowhere else: dispatch, ``explain`` and the tuner all call it. ``prefers(problem)`` is called for supported
    problems only; True lets ``auto`` choose the implementation. ``plan(problem)`` describes the launch in one
    line, for ``explain``, and may be empty. ``bind(problem)``, if given, does the per-problem work once and returns a
    function of the tensors.
    """

    name: str
    backend: Backend
    supports: Callable[[Any], str | None]
    run: Callable[..., Any]
    prefers: Callable[[Any], bool] = lambda problem: True
    plan: Callable[[Any], str] = lambda problem: ""
    bind: Callable[[Any], Callable[..., Any]] | None = None


class Device(NamedTuple):
    """The facts about a device on which a choice may depend."""

    type: str
    ordinal: int
    capability: tuple[int, int]
    sm_count: int
    shared_memory: int  # bytes per CTA, opt-in limit


# Kernels whose first call was wrong in this process: (implementation, kernel, device).
_distrusted: set[tuple[Impl, str, Device]] = set()


class BackendUnavailableError(RuntimeError):
    """The requested backend cannot run this call. The message says why."""


@functools.cache
def device_facts(device: torch.device) -> Device:
    """Facts about ``device``, cached per device."""
    if device.type != "cuda":
        return Device(device.type, device.index or 0, (0, 0), 0, 0)
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    properties = torch.cuda.get_device_properties(ordinal)
    # ROCm has no opt-in limit.
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device("cuda", ordinal, (properties.major, properties.minor), properties.multi_processor_count, shared)


def row_stride(x: Tensor) -> int:
    """Elements between consecutive rows of ``x`` (..., features) viewed as a matrix; 0 if there is no such view.

    The matrix must have unit column stride and rows that do not overlap: TMA descriptors refuse overlapping rows.
    """
    if x.is_contiguous():
        return x.shape[-1]
    if x.dim() < 2 or x.stride(-1) != 1:
        return 0
    step, rows = 0, 1  # row stride and row count of the dimensions so far; a dimension of size 1 may have any stride
    for size, stride in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if size == 1:
            continue
        if rows == 1:
            step = stride
        elif stride != step * rows:
            return 0
        rows *= size
    return step if step >= x.shape[-1] else 0


@functools.lru_cache(maxsize=8192)
def choose(table: Sequence[Impl], problem: Hashable, backend: str) -> Impl:
    """The implementation that runs ``problem``: the first in the table that supports and prefers it.

    Raises:
        TypeError, ValueError: ``backend`` is not the name of a backend.
        BackendUnavailableError: no implementation of the requested backend supports the problem.
    """
    wanted = _parse(backend)
    free = wanted in FREE
    refusals = []
    fallback = None
    for impl in table:
        if not free and impl.backend is not wanted:
            continue
        reason = impl.supports(problem)
        if reason is None and free:
            reason = distrusted(impl, problem)
        if reason is not None:
            refusals.append(f"{impl.name}: {reason}")
        elif impl.prefers(problem):
            return impl
        else:
            fallback = fallback or impl
    if fallback is not None:
        return fallback
    why = "; ".join(refusals) or "it has no implementation in this installation"
    raise BackendUnavailableError(
        f"backend={wanted.value!r} cannot run this call ({why}). Use backend='auto' to let lowrank_ops choose."
    )


def kernel_of(impl: Impl, problem: Any) -> str:
    """The kernel that runs a supported problem: the CUDA planner's name, otherwise that of the implementation."""
    return impl.plan(problem).partition(":")[0] or impl.name


def distrust(impl: Impl, problem: Any) -> None:
    """Keep ``auto`` from choosing the kernel that ran ``problem`` on its device again, for the rest of the process."""
    _distrusted.add((impl, kernel_of(impl, problem), problem.device))
    choose.cache_clear()


def distrusted_kernels() -> set[tuple[Impl, str, Device]]:
    """Those that ``auto`` avoids; decisions made before one was added are not valid."""
    return _distrusted


def distrusted(impl: Impl, problem: Any) -> str | None:
    """Why ``auto`` no longer chooses the kernel for a supported problem, or None."""
    if _distrusted and (impl, kernel_of(impl, problem), problem.device) in _distrusted:
        return "it was wrong or failed in its first call in this process"
    return None


def explain(table: Sequence[Impl], problem: Hashable, backend: str = "auto") -> str:
    """What :func:`choose` returns and why, one line per implementation: ``"cuda: can run, by <kernel>: <tiles>"``."""
    try:
        chosen = choose(table, problem, backend)
    except BackendUnavailableError:
        chosen = None
    lines = []
    for impl in table:
        reason = impl.supports(problem)
        state = "runs" if impl is chosen else "can run" if reason is None else f"cannot run: {reason}"
        plan = impl.plan(problem) if reason is None else ""
        doubt = distrusted(impl, problem) if reason is None else None
        lines.append(f"{impl.name}: {state}" + (f", by {plan}" if plan else "") + (f"; {doubt}" if doubt else ""))
    return "\n".join(lines)


def _parse(backend: str) -> Backend:
    try:
        return Backend(backend)
    except ValueError:
        accepted = ", ".join(repr(member.value) for member in Backend)
        error = ValueError if isinstance(backend, str) else TypeError
        raise error(f"backend must be one of {accepted}; got {backend!r}.") from None
