"""Loads the library of CUDA kernels and calls its planner, which chooses the kernel for a problem."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._backend import Device, device_facts

LIBRARY = Path(__file__).parents[1] / "liblowrank_ops.so"


class Machine(NamedTuple):
    """The planner's view of a device."""

    capability: int  # 10 * major + minor
    sm_count: int
    shared_memory: int  # bytes per CTA, opt-in limit
    clusters: tuple[int, ...] = ()  # of 2, 4 and 8 CTAs, resident at once; empty: the planner's estimate


@dataclass(frozen=True)
class Choice:
    """A tuned table's choice of kernel. The defaults leave each decision to the planner."""

    kernel: str = ""  # empty: the first that can run the problem
    splits: int = 0  # split-K: CTAs that share a tile's tokens (covariance) or features (lowrank_linear)
    token_tile: int = 0  # tokens per CTA of prefill_sm90

    def __iter__(self) -> Iterator[Any]:
        """In the order of the ops' arguments."""
        return iter((self.kernel, self.splits, self.token_tile))


DEFAULT_CHOICE = Choice()

#: Every kernel that a Choice may name.
KERNELS = ("covariance_sm80", "covariance_sm90", "covariance_sm90_wide", "decode_sm80", "decode_sm90", "prefill_sm90")

#: A typical device of each arch, to plan without one.
MACHINES = {
    "sm_80": Machine(80, 108, 166912),
    "sm_86": Machine(86, 84, 101376),
    "sm_89": Machine(89, 128, 101376),
    "sm_90": Machine(90, 132, 232448),
    "sm_100": Machine(100, 148, 232448),
    "sm_120": Machine(120, 170, 101376),
}


@functools.cache
def unavailable() -> str | None:
    """Load the library, which registers ``torch.ops.lowrank_ops._cuda_*`` and ``_plan_*``. None, or why it failed."""
    if not LIBRARY.is_file():
        return "the native library was not built: reinstall with LOWRANK_OPS_CUDA=ON to see what the build needs"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the native library does not load: {error}"
    if not hasattr(torch.ops.lowrank_ops, "_cuda_lowrank_linear_grouped"):
        return "the native library is older than this package: reinstall to build it again"
    driver, built = cuda_versions()
    if driver and int(driver.split(".")[0]) < (major := int(built.split(".")[0])):
        return (
            f"the native library was built by CUDA {built} and needs a driver for CUDA {major}.0 or newer; the driver "
            f"here is for CUDA {driver}"
        )
    return None


def cuda_versions() -> tuple[str, str]:
    """Of the driver, empty where there is none, and of the toolkit that built the loaded library: ``"13.3"``."""
    return str(torch.ops.lowrank_ops._cuda_driver()), str(torch.ops.lowrank_ops._cuda_toolkit())


def toolkit() -> str:
    """The CUDA toolkit that built the library, such as ``"13.3"``, or why there is no library."""
    return unavailable() or str(torch.ops.lowrank_ops._cuda_toolkit())


def unavailable_on(device_type: str) -> str | None:
    """Why no CUDA kernel can run on a device of this type, or None."""
    return unavailable() if device_type == "cuda" else "it needs a CUDA device"


@functools.cache
def machine(device: Device) -> Machine:
    """A ``Device`` in the planner's terms, with its clusters as the runtime counts them, or else estimated."""
    major, minor = device.capability
    here = device.ordinal < torch.cuda.device_count() and device == device_facts(torch.device("cuda", device.ordinal))
    clusters: tuple[int, ...] = ()
    if here and unavailable() is None:
        with contextlib.suppress(RuntimeError):  # that a launch raises as well; to ask what a kernel can do must not
            clusters = tuple(torch.ops.lowrank_ops._clusters(device.ordinal))
    return Machine(10 * major + minor, device.sm_count, device.shared_memory, clusters)


def usable_choice(tuned: Choice | None, refused: Callable[[Choice], str]) -> Choice:
    """``tuned``, or the planner's default where there is none or ``refused`` gives a reason against it.

    A tuned entry is that of the nearest shape, which may be legal where this problem is not.
    """
    return DEFAULT_CHOICE if tuned is None or refused(tuned) else tuned


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def plan_covariance(
    tokens: int,
    features: int,  # per group
    groups: int,
    dtype: torch.dtype,
    source: str,  # "matrix", "aligned_matrix" (rows start on 16 bytes) or "patches" of a convolution
    allow_tf32: bool,
    machine: Machine,
    choice: Choice = DEFAULT_CHOICE,
) -> tuple[str, str]:
    """``("", plan)``, or ``(reason, "")`` where no kernel can run the problem."""
    planner = _planner("plan_covariance")
    return planner(tokens, features, groups, dtype_name(dtype), source, allow_tf32, *machine, *choice)


def plan_lowrank_linear(
    tokens: int,
    in_features: int,
    ranks: Sequence[int],  # of a layer, or of each member of a group
    out_features: Sequence[int],
    shared: bool,  # the members have one down
    dtype: torch.dtype,
    aligned: bool,  # matrices and their rows start on 16 bytes
    machine: Machine,
    choice: Choice = DEFAULT_CHOICE,
) -> tuple[str, str]:
    """``("", plan)``, or ``(reason, "")`` where no kernel can run the problem."""
    planner = _planner("plan_lowrank_linear")
    sizes = tokens, in_features, list(ranks), list(out_features), shared
    return planner(*sizes, dtype_name(dtype), aligned, *machine, *choice)


def plan(
    op: str,
    arch: str,
    dtype: torch.dtype,
    *,
    tokens: int,
    aligned: bool = True,
    features: int = 0,
    groups: int = 1,
    allow_tf32: bool = False,
    in_features: int = 0,
    rank: int | Sequence[int] = 0,
    out_features: int | Sequence[int] = 0,
    shared: bool = False,
    **choice: Any,
) -> str:
    """The planner's default for a problem on a typical device of ``arch``: one line, or ``"cannot run: <reason>"``.

    Args:
        op: ``"covariance_update_"`` or ``"conv_covariance_update_"``, which take ``features``, ``groups`` and
            ``allow_tf32``, or ``"lowrank_linear"``, which takes ``in_features``, ``rank`` and ``out_features``, or
            ``"lowrank_linear_grouped"``, which takes these two of each member, and ``shared``.
        arch: a key of ``MACHINES``.
        dtype: of the inputs.
        tokens: rows of ``x``; for a convolution, patches.
        aligned: the matrices and their rows start on 16 bytes.
        choice: fields of :class:`Choice`.

    Raises:
        ValueError: an unknown op or arch.
        RuntimeError: neither the library nor ``lowrank_ops._planner`` was built.
    """
    if arch not in MACHINES:
        raise ValueError(f"arch must be one of {', '.join(map(repr, MACHINES))}; got {arch!r}.")
    typical, chosen = MACHINES[arch], Choice(**choice)
    if op in ("lowrank_linear", "lowrank_linear_grouped"):
        ranks, outs = ([size] if isinstance(size, int) else size for size in (rank, out_features))
        reason, text = plan_lowrank_linear(tokens, in_features, ranks, outs, shared, dtype, aligned, typical, chosen)
    elif op in ("covariance_update_", "conv_covariance_update_"):
        source = "patches" if op.startswith("conv") else "aligned_matrix" if aligned else "matrix"
        reason, text = plan_covariance(tokens, features, groups, dtype, source, allow_tf32, typical, chosen)
    else:
        raise ValueError(
            "op must be covariance_update_, conv_covariance_update_, lowrank_linear or lowrank_linear_grouped; "
            f"got {op!r}."
        )
    return f"cannot run: {reason}" if reason else text


def _planner(function: str) -> Callable[..., tuple[str, str]]:
    """The library's planner, for its archs; without the library, the ``_planner`` extension module."""
    reason = unavailable()
    if reason is None:
        return getattr(torch.ops.lowrank_ops, f"_{function}")  # type: ignore[no-any-return]
    try:
        return getattr(importlib.import_module("lowrank_ops._planner"), function)  # type: ignore[no-any-return]
    except ImportError:
        raise RuntimeError(f"No plan without the native library or its planner: {reason}.") from None
