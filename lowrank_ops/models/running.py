"""Call a model on a batch, read its output, and restore training flags and random states afterwards."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock, RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from .interrupts import uninterrupted_exits

EMPTY = "batches was empty; pass at least one batch, and not a generator that is used up."
NO_REAL_ROW = "has no rows to use: it is empty, or the mask excludes all of its positions. Remove it."
_MODES = ("train", "eval")


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """tqdm with a lock of this process.

    tqdm's own lock is shared with forked processes: if one is killed while it holds the lock, all others wait forever.
    Creating that lock also fixes the start method of multiprocessing.
    """

    _lock = RLock()


@contextmanager
def hooks() -> Iterator[list[RemovableHandle]]:
    """A list for the handles of hooks, which are removed after the block, however it ends."""
    handles: list[RemovableHandle] = []
    with uninterrupted_exits(), _eager():
        try:
            yield handles
        finally:
            for handle in handles:
                handle.remove()


def warn_caller(message: str) -> None:
    """Warn at the first caller outside this package."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("lowrank_ops.", "contextlib")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def shortened(names: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    return ", ".join([*names[:5], *([f"and {len(names) - 5} more"] if len(names) > 5 else [])])


def warn_of_few_rows(found: Sequence[str], rows: str = "calibration rows", remedy: str = "calibrate with") -> None:
    """One warning for all layers with few rows, ``["name (rows of features)"]``."""
    if found:
        warn_caller(
            f"fewer {rows} than min(in_features, out_features): {shortened(found)}. "
            f"Ranks and errors hold for these rows only; {remedy} more batches."
        )


class _ProcessState:
    """A setting of the process: saved by the first of several overlapping blocks, restored by the last."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        self._read, self._write = read, write
        self._lock, self._blocks, self._before = Lock(), 0, None

    @contextmanager
    def kept(self) -> Iterator[None]:
        with self._lock:
            if not self._blocks:
                self._before = self._read()
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if not self._blocks:
                    self._write(self._before)


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled functions as plain Python inside the block: compiled code does not run hooks that come later."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and the import would take long
        yield
        return
    with _stance.kept():
        yield


_fast_path = _ProcessState(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)
_cpu_random_state = _ProcessState(torch.get_rng_state, torch.set_rng_state)
_stance = _ProcessState(
    lambda: torch.compiler.set_stance("force_eager"), lambda stance: stance.__exit__(None, None, None)
)
_owners: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # the thread that works on a module
_owners_lock = Lock()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Reserve ``model`` for this thread inside the block.

    Raises:
        RuntimeError: another thread works on the model, or on one of its modules.
    """
    thread, modules = get_ident(), list(model.modules())
    with uninterrupted_exits():
        with _owners_lock:
            if any(_owners.get(module, thread) != thread for module in modules):
                raise RuntimeError(
                    "another thread calibrates, compresses or searches this model or shares modules with it; wait for "
                    "that thread, or work on copy.deepcopy(model)."
                )
            new = WeakSet(module for module in modules if module not in _owners)  # some may be replaced and freed
            _owners.update(dict.fromkeys(new, thread))
            del modules
        try:
            yield
        finally:
            with _owners_lock:
                for module in new:
                    _owners.pop(module, None)


@contextmanager
def training_flags_kept(*models: nn.Module, trained: bool = False) -> Iterator[None]:
    """Restore every module's mode after the block, by its own ``train()`` if it defines one.

    Layers that fold an adapter into their weight in ``eval()`` unfold it in ``train()``. A warning names those whose
    weights differ afterwards by more than rounding, unless they are ``trained`` inside the block.
    """
    modules = [module for model in models for module in model.modules() if hasattr(module, "training")]
    training = {module: module.training for module in modules}
    named = {module: fqn for model in models for fqn, module in model.named_modules() if _defines_mode(module)}
    before = _norms_in(named)
    try:
        yield
    finally:
        for model in models:
            _set_modes(model, training)
        after = _norms_in(named)
        changed = [fqn or "(the model)" for module, fqn in named.items() if not _alike(before[module], after[module])]
        if changed and not trained:
            warn_caller(
                f"the parameters of {', '.join(changed)} have changed: train() of these modules does not undo their "
                "eval(), or the model changed them."
            )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, without compiled code; every module's mode is restored afterwards."""
    with uninterrupted_exits(), _eager(), training_flags_kept(*models):
        for model in models:
            _set_modes(model, dict.fromkeys(model.modules(), False))
        yield


def _set_modes(module: nn.Module, wanted: Mapping[nn.Module, bool]) -> None:
    """Set every module's mode with as few calls of ``train()`` as possible: it is not idempotent for all modules."""
    if not hasattr(module, "training"):  # frozen TorchScript
        return
    mode = wanted.get(module, module.training)
    if _defines_mode(module):
        inside = [part for part in module.modules() if hasattr(part, "training")]
        if any(part.training != wanted.get(part, part.training) for part in inside):
            with contextlib.suppress(NotImplementedError):  # an exported program has no modes
                module.train(mode) if mode else module.eval()
    module.training = mode
    for child in module.children():
        _set_modes(child, wanted)


def _defines_mode(module: nn.Module) -> bool:
    """Whether ``train()`` or ``eval()`` of ``module`` may do more than set flags."""
    return any(getattr(getattr(module, name), "__func__", None) is not getattr(nn.Module, name) for name in _MODES)


def _norms_in(modules: dict[nn.Module, str]) -> dict[nn.Module, list[float]]:
    """The norms of the parameters in each module that are in none of the ``modules`` inside it."""
    found: dict[nn.Module, list[float]] = {}
    seen: set[nn.Parameter] = set()
    for module in reversed(modules):  # inner ones come after outer ones
        own = [parameter for parameter in module.parameters() if parameter not in seen]
        found[module] = [_norm(parameter) for parameter in own]
        seen.update(own)
    return found


def _norm(parameter: nn.Parameter) -> float:
    empty = isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta
    return 0.0 if empty or not parameter.is_floating_point() else float(parameter.detach().float().norm())


def _alike(before: list[float], after: list[float]) -> bool:
    return len(before) == len(after) and all(
        math.isclose(x, y, rel_tol=1e-2) or x != x for x, y in zip(before, after, strict=True)
    )


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[list[torch.Generator]]:
    """Restore the random state after the block; yields the generators of the CPU and of the model's GPUs."""
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with _cpu_random_state.kept(), torch.random.fork_rng(devices=devices):
        yield [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]


@contextmanager
def without_fast_path(wanted: bool = True) -> Iterator[None]:
    """Disable the fast path of nn.TransformerEncoder inside the block, if ``wanted``.

    The fast path of a frozen encoder removes padding by nested tensors, which its layers do not support with gradients.
    """
    if not wanted:
        yield
        return
    with _fast_path.kept():
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def check_differentiable(model: nn.Module) -> None:
    """Raise ValueError for a parameter that was created in inference mode, which autograd does not support."""
    name = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if name is not None:
        raise ValueError(
            f"parameter {name!r} was created in torch.inference_mode, so it cannot have a gradient. Outside of "
            "inference mode, create the model again or pass copy.deepcopy(model)."
        )


@contextmanager
def differentiable(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode with gradients and a seed inside the block; modes and random states are restored."""
    check_differentiable(model)
    with (
        uninterrupted_exits(),
        torch.inference_mode(False),
        torch.enable_grad(),
        random_state_kept(model) as generators,
        evaluating(model),
        without_fast_path(),
    ):
        for generator in generators:
            generator.manual_seed(seed)  # torch.manual_seed would seed other GPUs as well
        yield


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call the model: a mapping as keyword arguments, a tuple or list as positional ones, the rest as one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):  # a named tuple is one argument
        return model(*batch)
    return model(batch)


@contextmanager
def in_layer(
    fqn: str, remedy: str = "Leave the layer out with filter_fn, or move the model to the CPU."
) -> Iterator[None]:
    """Name the layer and the remedy in an error of the allocator, whose message has the bytes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        kind = next(kind for kind in (torch.OutOfMemoryError, MemoryError, RuntimeError) if isinstance(error, kind))
        if kind is RuntimeError and "can't allocate memory" not in str(error):
            raise
        raise kind(f"layer {fqn!r}: not enough memory. {remedy} ({error})") from error


@contextmanager
def in_batch(index: int) -> Iterator[None]:
    """Add a batch's index to exceptions of the user's code, where Python has notes (3.11 or newer)."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(
                f"lowrank_ops: in batch {index} (counted from 0). A batch is passed to the model as keyword arguments "
                "if it is a mapping, as positional ones if it is a tuple or list, else as one argument; forward= "
                "replaces that call."
            )
        raise


def move(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch, nested in mappings, tuples and lists."""
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and not isinstance(batch, nn.utils.rnn.PackedSequence):
        moved = [move(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    movable = isinstance(batch, (Tensor, nn.utils.rnn.PackedSequence))
    return batch.to(device=device) if movable else batch


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter that accelerate has not offloaded; the CPU without parameters."""
    dispatched = hasattr(model, "_hf_hook")
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if not dispatched or device.type != "meta"), torch.device("cpu"))


def available(device: torch.device | str) -> torch.device:
    """The device, with its index.

    Raises:
        ValueError: it is unknown or not there.
    """
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here: {error}") from None
    return found


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether a device has float64, tested once; Apple's MPS and some Intel GPUs do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU if it has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def output_tensor(output: Any, fields: Sequence[str]) -> Tensor | None:
    """The float tensor in a model's output: itself, the first of ``fields`` that it has, or the first of a sequence.

    None if that is not a float tensor with at least one dimension.
    """
    found = output
    if not isinstance(output, Tensor):
        get = output.get if isinstance(output, Mapping) else lambda name: getattr(output, name, None)
        found = next((value for value in map(get, fields) if isinstance(value, Tensor)), None)
        if found is None and isinstance(output, (tuple, list)) and output:
            found = output[0]
    return found if isinstance(found, Tensor) and found.is_floating_point() and found.dim() else None
