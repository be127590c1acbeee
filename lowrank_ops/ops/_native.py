"""The library of CUDA kernels: loaded when first asked for, and why not where it cannot be."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

LIBRARY = Path(__file__).parents[1] / "liblowrank_ops.so"


class Machine(NamedTuple):
    """What the planner knows of a device."""

    capability: int  # 10 * major + minor
    sm_count: int
    shared_memory: int  # bytes that a block may ask for


@dataclass(frozen=True)
class Choice:
    """What a tuned table has found faster than the planner's own choice."""

    kernel: str = ""  # empty: the first that can run the problem
    splits: int = 0  # blocks that share a tile's tokens, or a row tile's features and outputs; 0: the planner's
    token_tile: int = 0  # tokens of a block of prefill_sm90

    def __iter__(self) -> Iterator[Any]:
        """In the order of the ops' arguments."""
        return iter((self.kernel, self.splits, self.token_tile))


PLANNERS = Choice()  # the planner's own


def choice(tuned: Choice | None, refused: Callable[[Choice], str]) -> Choice:
    """A table's, which speaks for the nearest shape, where there is one and this problem can have it."""
    return PLANNERS if tuned is None or refused(tuned) else tuned


#: A typical device of each arch, for plans where there is none.
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
    """Load the library of ``torch.ops.lowrank_ops._cuda_*`` and ``_plan_*``; None, or what is in the way."""
    if not LIBRARY.is_file():
        return "the native library was not built: LOWRANK_OPS_CUDA=ON at install tells what it needs"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


def machine(device: tuple[str, int, tuple[int, int], int, int]) -> Machine:
    """A ``Device`` as the planner takes it."""
    _, _, (major, minor), multiprocessors, shared_memory = device
    return Machine(10 * major + minor, multiprocessors, shared_memory)


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def plan(
    op: str,
    dtype: torch.dtype,
    machine: Machine,
    *,
    tokens: int,
    aligned: bool = True,
    features: int = 0,
    groups: int = 1,
    allow_tf32: bool = False,
    in_features: int = 0,
    rank: int = 0,
    out_features: int = 0,
    kernel: str = "",
    splits: int = 0,
    token_tile: int = 0,
) -> str:
    """Which CUDA kernel would run a problem on a machine that need not be here, and how; or ``"cannot run: ..."``.

    Args:
        op: ``"covariance_update_"`` or ``"conv_covariance_update_"``, which take ``features``, ``groups`` (for
            convolutions of patches: channels of a group x kernel height x width, and ``tokens`` counts patches) and
            ``allow_tf32``, or ``"lowrank_linear"``, which takes ``in_features``, ``rank`` and ``out_features``.
        aligned: the matrices and their rows start on 16 bytes.
        kernel: such as ``"decode_sm80"`` instead of the first that can.
        splits: blocks that share a tile's tokens (covariances), the features of ``down`` (decode) or also the rows of
            ``up`` (prefill), instead of the planner's number.
        token_tile: 128 or 192 tokens per block of prefill; 256: two blocks of 128, which bring each other the weights.

    Raises:
        ValueError: an unknown op.
        RuntimeError: neither the library nor ``lowrank_ops._planner`` was built.
    """
    if op == "lowrank_linear":
        shape: tuple[Any, ...] = (tokens, in_features, rank, out_features, dtype_name(dtype), aligned)
    elif op in ("covariance_update_", "conv_covariance_update_"):
        source = "patches" if op.startswith("conv") else "aligned_matrix" if aligned else "matrix"
        shape = (tokens, features, groups, dtype_name(dtype), source, allow_tf32)
    else:
        raise ValueError(f"op must be covariance_update_, conv_covariance_update_ or lowrank_linear; got {op!r}.")
    planner = _planner("plan_lowrank_linear" if op == "lowrank_linear" else "plan_covariance")
    reason, text = planner(*shape, *machine, kernel, splits, token_tile)
    return f"cannot run: {reason}" if reason else text


def _planner(function: str) -> Callable[..., tuple[str, str]]:
    """The planner of the library, which also knows for which archs that was built; else the one for this Python."""
    reason = unavailable()
    if reason is None:
        return getattr(torch.ops.lowrank_ops, f"_{function}")  # type: ignore[no-any-return]
    try:
        return getattr(importlib.import_module("lowrank_ops._planner"), function)  # type: ignore[no-any-return]
    except ImportError:
        raise RuntimeError(f"No plan without the native library or its planner: {reason}.") from None
