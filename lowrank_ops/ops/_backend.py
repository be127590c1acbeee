"""Which implementation of an op runs: the backends, the rows of an op's table, and the one place that chooses."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch


class Backend(str, enum.Enum):
    """Where an implementation comes from. ``AUTO`` leaves the choice to the op's table."""

    AUTO = "auto"
    REFERENCE = "reference"
    TRITON = "triton"
    CUDA = "cuda"


class Impl(NamedTuple):
    """One row of an op's table.

    ``supports`` is the single statement of what the implementation can run: it takes the op's problem (a
    hashable description of shapes, dtypes, layout and device) and returns None, or the reason why it cannot.
    ``prefers`` tells whether ``auto`` should pick it for a problem that it supports. ``plan`` tells in one line how it
    would run such a problem, or nothing. ``bind``, where there is one, does once for a problem what ``run`` would do in
    each call, and returns a function of the tensors alone.
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
    multiprocessors: int
    shared_memory: int  # bytes per block, opt-in limit


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run this problem; the message says why."""


@functools.cache
def device_facts(device: torch.device) -> Device:
    """Facts about ``device``; asks the driver once per device."""
    if device.type != "cuda":
        return Device(device.type, device.index or 0, (0, 0), 0, 0)
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    properties = torch.cuda.get_device_properties(ordinal)
    # ROCm has no opt-in limit.
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device("cuda", ordinal, (properties.major, properties.minor), properties.multi_processor_count, shared)


@functools.lru_cache(maxsize=8192)
def choose(table: Sequence[Impl], problem: Hashable, backend: str) -> Impl:
    """The implementation that runs ``problem``: the table's first that supports and prefers it.

    Raises:
        ValueError: ``backend`` is not the name of a backend.
        BackendUnavailableError: no implementation of the requested backend supports the problem.
    """
    wanted = _parse(backend)
    refusals = []
    fallback = None
    for impl in table:
        if wanted is not Backend.AUTO and impl.backend is not wanted:
            continue
        reason = impl.supports(problem)
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


def explain(table: Sequence[Impl], problem: Hashable, backend: str = "auto") -> str:
    """What ``choose`` would do and why, one line per implementation: ``"cuda: can run, by <kernel>: <tiles>"``."""
    try:
        chosen = choose(table, problem, backend)
    except BackendUnavailableError:
        chosen = None
    lines = []
    for impl in table:
        reason = impl.supports(problem)
        state = "runs" if impl is chosen else "can run" if reason is None else f"cannot run: {reason}"
        plan = impl.plan(problem) if reason is None else ""
        lines.append(f"{impl.name}: {state}" + (f", by {plan}" if plan else ""))
    return "\n".join(lines)


def _parse(backend: str) -> Backend:
    try:
        return Backend(backend)
    except ValueError:
        accepted = ", ".join(repr(member.value) for member in Backend)
        raise ValueError(f"backend must be one of {accepted}; got {backend!r}.") from None
