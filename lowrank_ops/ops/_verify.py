"""Checks the first calls of kernels that no GPU has verified yet, and keeps the records of verified ones.

``auto`` treats a (kernel, arch, compiler) as unverified unless ``tuned/verified.<arch>.json`` lists it. In each
process, the first call of an unverified kernel for each bucket of problems is also computed by the reference, in part,
and compared. A kernel that is wrong or fails gives one warning, and ``auto`` no longer chooses it in that process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Hashable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import write_whole
from ..version import __version__
from . import _native
from ._backend import Backend, Device, Impl, distrust, kernel_of

VARIABLE = "LOWRANK_OPS_VERIFY"
_FOLDERS = {"lowrank_linear": ["linear"], "lowrank_linear_grouped": ["linear", "grouped"]}  # with an op's kernels
Errors = tuple[float, float]  # that of a kernel, and the allowed one

_passed: set[Hashable] = set()  # the buckets that were right in this process


class FirstCall(NamedTuple):
    """A call of an unverified kernel for a bucket of problems that it has not run yet in this process."""

    op: str
    impl: Impl
    problem: Any
    bucket: Hashable
    forget: Callable[[], None]

    @property
    def passed(self) -> bool:
        """Whether a call of this bucket was found right."""
        return self.bucket in _passed

    def check(self, x: Tensor, run: Callable[[], Errors | None]) -> bool:
        """Whether the kernel was right. If not, a warning was given, unless nothing could be checked now.

        Args:
            x: the input.
            run: runs the kernel and returns its error and the allowed one. None if the call shows nothing, as for
                x = 0: it then counts as right, and the next call is checked.
        """
        if not can_check(x):
            return False
        try:
            errors = run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._distrust(f"failed with {type(error).__name__}: {error}")
            return False
        if errors is None:
            return True
        if not errors[0] <= errors[1]:  # NaN is wrong, too
            self._distrust(f"is wrong: its error is {errors[0]:.2e}, {errors[1]:.2e} is allowed")
            return False
        _passed.add(self.bucket)
        return True

    def _distrust(self, what: str) -> None:
        kernel, device = kernel_of(self.impl, self.problem), self.problem.device
        distrust(self.impl, self.problem)
        self.forget()  # before the warning, which may be raised as an error
        warnings.warn(
            f"The kernel {kernel} of {self.op} {what}. This call and all later ones with backend='auto' use PyTorch's "
            f"products instead. Please report this message: lowrank_ops {__version__}, torch {torch.__version__}, "
            f"{compiler(self.op, self.impl.backend)}, {arch(device)}, {self.problem}.",
            RuntimeWarning,
            stacklevel=2,
        )


def first_call(op: str, impl: Impl, problem: Any, backend: str, forget: Callable[[], None]) -> FirstCall | None:
    """The check that a call needs, or None. Callers cache a None with their decision.

    Raises:
        ValueError: ``LOWRANK_OPS_VERIFY`` is neither ``first`` nor ``off``.
    """
    if impl.backend is Backend.REFERENCE or backend != Backend.AUTO or not enabled():
        return None
    kernel = kernel_of(impl, problem)
    bucket = (op, kernel, *map(_bucketed, problem))
    if bucket in _passed or is_verified(op, kernel, compiler(op, impl.backend), arch(problem.device)):
        return None
    return FirstCall(op, impl, problem, bucket, forget)


def can_check(x: Tensor) -> bool:
    """Whether a check may run now: it reads results, which is impossible in a CUDA graph capture or a trace.

    Nor can Triton load a kernel during a capture: ``cuModuleLoadData`` would end it.
    """
    return not torch.compiler.is_compiling() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def enabled() -> bool:
    """Whether first calls are checked at all: the environment variable ``LOWRANK_OPS_VERIFY``."""
    value = os.environ.get(VARIABLE, "first")
    if value not in ("first", "off"):
        raise ValueError(f"The environment variable {VARIABLE} must be 'first' or 'off'; got {value!r}.")
    return value == "first"


def arch(device: Device) -> str:
    """``"sm_90"`` for compute capability 9.0."""
    major, minor = device.capability
    return f"{'gfx' if torch.version.hip else 'sm'}_{major}{minor}" if device.type == "cuda" else device.type


@functools.cache
def compiler(op: str, backend: Backend) -> str:
    """What compiled the kernels of an op: Triton with a digest of its sources, or a CUDA toolkit with this release."""
    if backend is Backend.CUDA:
        return f"cuda {_native.toolkit()}, lowrank_ops {__version__}"
    import triton

    folders = _FOLDERS.get(op, ["covariance"])
    sources = sorted(path for folder in folders for path in Path(__file__).with_name(folder).glob("_triton*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return f"triton {triton.__version__}, sources {digest[:12]}"


def is_verified(op: str, kernel: str, compiled_by: str, name: str) -> bool:
    """Whether the record of the arch ``name`` lists the kernel."""
    return {"op": op, "kernel": kernel, "compiler": compiled_by} in _record(name)


@functools.cache
def _record(name: str) -> list[dict[str, str]]:
    path = record_path(name)
    try:
        return list(json.loads(path.read_text())["kernels"]) if path.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of verified kernels ({error!r}); remove it.") from None


def record_path(name: str) -> Path:
    """The record of the arch ``name``, beside the tuned tables."""
    return Path(str(files("lowrank_ops.ops"))) / "tuned" / f"verified.{name}.json"


def write_record(name: str, device: str, verdicts: Mapping[tuple[str, str, str], bool]) -> Path:
    """Add the kernels that passed to the record of an arch and remove those that did not.

    Args:
        name: of the arch.
        device: on which they ran.
        verdicts: by (op, kernel, compiler), whether all calls were right.

    Raises:
        OSError: the record cannot be written.
    """
    path = record_path(name)
    kernels = [
        entry for entry in _record(name) if tuple(entry[k] for k in ("op", "kernel", "compiler")) not in verdicts
    ]
    for (op, kernel, compiled_by), passed in verdicts.items():
        if passed:
            kernels.append({"op": op, "kernel": kernel, "compiler": compiled_by})
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps({"arch": name, "device": device, "kernels": kernels}, indent=1).encode() + b"\n")
    _record.cache_clear()
    return path


def _bucketed(value: Any) -> Hashable:
    """Sizes and strides by their number of bits and whether vectors of 8 divide them; everything else unchanged."""
    if isinstance(value, tuple) and not isinstance(value, Device):
        return tuple(map(_bucketed, value))
    return (value.bit_length(), value % 8 == 0) if type(value) is int else value
