"""MLPs whose channels can be dropped: found by their shapes, then verified by running them with fewer channels."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .copies import shared_copy
from .experts import ExpertLinear
from .layers import HOOKS, input_of
from .running import evaluating, exclusive, float64_device, hooks, random_state_kept, shortened, without_fast_path

LEVELS = 2  # how far above the consumer's parent the producers are looked for
TOLERANCE = 1e-4  # of outputs, relative to their norm; modules run in float64 where the device has it


class Mlp(NamedTuple):
    """The linear layers of an MLP by name: the producers compute its channels, the consumer reads them.

    Input feature j of the consumer depends on output feature j of each producer only, and nothing else reads those.
    """

    producers: tuple[str, ...]  # which have the same input
    consumer: str


def find_mlps(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[Mlp]:
    """The MLPs of ``model`` among ``layers``; no layer belongs to two.

    A candidate is an ``nn.Linear`` (the consumer) and those layers of one module that have as many outputs as it has
    inputs (the producers), such as down, gate and up projections. A copy of the smallest module that holds them, with
    random weights in these layers, runs on random inputs twice: with half of the channels in narrower layers, and with
    all channels but columns of zeros in the consumer. The candidate is an MLP if both outputs are the same, and all
    tensors that the modules keep as attributes. Modules with hooks, and those that do not run on one tensor with the
    producers' input features, are not verified. A layer that the model holds at two places, such as one that two MLPs
    share, is in none: only one place would be verified. What the model does outside the module is verified by
    :func:`check_channels_apart` only.

    Args:
        model: any module; not changed.
        layers: ``{fqn: layer}``, the layers that may be changed.

    Raises:
        RuntimeError: another thread works on the model.
    """
    with exclusive(model):
        return _find_mlps(model, layers)


def _find_mlps(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[Mlp]:
    places = Counter(child for module in model.modules() for child in module._modules.values())
    linear = {
        fqn: layer
        for fqn, layer in layers.items()
        if isinstance(layer, nn.Linear) and not isinstance(layer, ExpertLinear) and places[layer] == 1
    }
    found: list[Mlp] = []
    taken: set[str] = set()
    for consumer in linear:
        for holder, producers in _candidates(model, consumer, linear):
            names = (*producers, consumer)
            parts = [linear[fqn] for fqn in names]
            if taken.isdisjoint(names) and _drops_channels(model.get_submodule(holder), holder, names, parts):
                found.append(Mlp(producers, consumer))
                taken.update(names)
                break
    return found


@torch.no_grad()
def check_channels_apart(model: nn.Module, mlps: Sequence[Mlp], run: Callable[[], Any]) -> None:
    """Refuse MLPs whose channels the model reads elsewhere, by running it twice.

    In both runs the consumers ignore half of their channels; in the second, the weights and biases of these channels
    have other values, also for code that reads them without calling the layer. Both runs start with the same buffers.
    The outputs of the model must be the same.

    Args:
        model: any module.
        mlps: of the model.
        run: runs the model on a batch and returns its output.

    Raises:
        ValueError: the outputs differ; the message names the consumers. Or they differ from call to call anyway, or
            hold no tensor.
    """

    def outputs(some: Sequence[Mlp], changed: bool) -> list[Tensor]:
        return _output_without_half(model, some, run, changed)

    def differ(some: Sequence[Mlp], changed: bool = True) -> bool:
        first, second = outputs(some, False), outputs(some, changed)
        narrow = any(part.dtype.itemsize < 4 for part in first if part.is_floating_point())
        return not _alike(first, second, 1e-2 if narrow else TOLERANCE)

    if mlps and differ(mlps):
        if differ(mlps, changed=False):
            raise ValueError(
                "channels cannot be verified: the model's output differs from call to call, even with the same seed "
                "and buffers. Make the model deterministic (it may read a counter, a clock or another random "
                "generator), or pass channels=False."
            )
        found = [mlp.consumer for mlp in mlps if differ([mlp])] or [mlp.consumer for mlp in mlps]
        raise ValueError(
            f"channels of {shortened(found)} cannot be dropped: the model's output depends on them even if these "
            "layers ignore them, so the model mixes them or reads them elsewhere. Name the consumers of other MLPs, "
            "channels=[...], or leave these layers out with filter_fn."
        )


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Every buffer is the same tensor with the same values after the block."""
    held = [(module, name, part) for module in model.modules() for name, part in module._buffers.items()]
    values = [None if part is None or part.is_meta else part.clone() for _, _, part in held]
    try:
        yield
    finally:
        for (module, name, part), value in zip(held, values, strict=True):
            module._buffers[name] = part
            if part is not None and value is not None and not torch.equal(part, value):
                part.copy_(value)


def _output_without_half(model: nn.Module, mlps: Sequence[Mlp], run: Callable[[], Any], changed: bool) -> list[Tensor]:
    """The model's output if consumers ignore half of their channels, whose weights have other values if ``changed``.

    Other threads may run the model meanwhile.
    """
    thread = get_ident()

    def ignore(dropped: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if get_ident() != thread:
                return None
            x = input_of(args, kwargs)
            return (x.masked_fill(dropped.to(x.device), 0),), {}

        return hook

    with (
        random_state_kept(model) as generators,
        _buffers_kept(model),
        evaluating(model),
        without_fast_path(),
        hooks() as handles,
        _OtherValues() as values,
    ):
        for mlp in mlps:
            consumer = model.get_submodule(mlp.consumer)
            weight = consumer.get_parameter("weight")
            channels = weight.shape[1]
            dropped = torch.randperm(channels, generator=torch.Generator().manual_seed(0)) < channels // 2
            handles.append(consumer.register_forward_pre_hook(ignore(dropped), with_kwargs=True))
            if changed:
                values.where[id(weight)] = dropped
                for producer in map(model.get_submodule, mlp.producers):
                    for part in producer.parameters(recurse=False):
                        values.where[id(part)] = dropped.unsqueeze(1) if part.dim() > 1 else dropped
        for generator in generators:
            generator.manual_seed(0)
        output = run()
    found = list(_tensors_in(output, set()))
    if not found:
        raise ValueError(
            f"channels cannot be verified: no tensor was found in the model's output, a {type(output).__name__}. "
            "Return tensors, in tuples, mappings or objects, or pass channels=False."
        )
    return found


class _OtherValues(TorchFunctionMode):
    """Functions of torch, those of layers included, get other values of some parameters, in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.where: dict[int, Tensor] = {}  # by id of the parameter: which values, as a mask

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") == "__get__" and not isinstance(found := function(*args), Tensor):
            return found  # a dtype, a shape
        args, kwargs = tree_map(self._changed, (args, kwargs or {}))
        return function(*args, **kwargs)

    def _changed(self, part: Any) -> Any:
        if id(part) not in self.where:
            return part
        return torch.where(self.where[id(part)].to(part.device), -100 * (part + part.abs().mean()), part)


def _tensors_in(output: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in an output: in containers, mappings and the attributes of objects, such as dataclasses."""
    for part in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        own = part if isinstance(part, Mapping) else getattr(part, "__dict__", None)
        if isinstance(part, Tensor):
            if not part.is_nested:
                yield part
        elif isinstance(own, Mapping) and not isinstance(part, (type, nn.Module)) and id(part) not in seen:
            seen.add(id(part))
            yield from _tensors_in(own, seen)


def _candidates(
    model: nn.Module, consumer: str, layers: Mapping[str, nn.Linear]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name of the smallest module that holds the consumer and possible producers, names of the producers)."""
    channels, holder = layers[consumer].in_features, consumer
    for _ in range(1 + LEVELS):
        if not holder:
            return
        holder = _parent(holder)
        names = [name for name, _ in model.get_submodule(holder).named_modules(prefix=holder) if name in layers]
        groups: dict[tuple[str, int], list[str]] = {}
        for fqn in names:
            if fqn != consumer and layers[fqn].out_features == channels:
                groups.setdefault((_parent(fqn), layers[fqn].in_features), []).append(fqn)
        for group in groups.values():
            yield holder, tuple(group)
            before = [fqn for fqn in names[: names.index(consumer)] if fqn in group]
            if len(group) > 1 and before:
                yield holder, (before[-1],)
        if groups:
            return


def _parent(fqn: str) -> str:
    return fqn.rpartition(".")[0]


def _drops_channels(holder: nn.Module, prefix: str, names: Sequence[str], layers: Sequence[nn.Linear]) -> bool:
    """Whether ``holder`` has the same outputs without some channels as with columns of zeros for them.

    Args:
        holder: the module named ``prefix``.
        names, layers: of the producers, then of the consumer.
    """
    if any(getattr(module, kind) for module in holder.modules() for kind in HOOKS):
        return False
    names = [fqn.removeprefix(f"{prefix}.") if prefix else fqn for fqn in names]
    weights = [layer.weight for layer in layers]
    channels, device = weights[-1].shape[1], weights[-1].device
    if channels < 2 or any(weight.is_meta for weight in weights):
        return False
    dtype = torch.float64 if float64_device(device) == device else torch.float32
    with random_state_kept(holder) as generators, torch.no_grad(), contextlib.suppress(Exception):  # the model's
        for generator in generators:
            generator.manual_seed(0)
        kept = torch.randperm(channels)[: channels // 2].sort().values.to(device)
        wide = [_random(layer, dtype) for layer in layers]
        narrow = [_linear(layer.weight[kept], None if layer.bias is None else layer.bias[kept]) for layer in wide[:-1]]
        narrow.append(_linear(wide[-1].weight[:, kept], wide[-1].bias))
        zeros = torch.ones(channels, dtype=torch.bool, device=device)
        zeros[kept] = False
        wide[-1].weight[:, zeros] = 0
        copied = shared_copy(holder)
        for size in _sizes(weights[0].shape[1]):
            x = torch.randn(size, dtype=dtype, device=device)
            with contextlib.suppress(Exception):
                first, second = (_outputs(_again(copied), names, parts, x) for parts in (wide, narrow))
                return _alike(first, second)
    return False


def _again(copied: nn.Module) -> nn.Module:
    """A copy with the same parameters, and its own copy of any state that ``forward`` changes."""
    parts = [part for module in copied.modules() for part in tree_leaves(dict(vars(module)))]
    kept = [part for part in parts if isinstance(part, Tensor) and (isinstance(part, nn.Parameter) or not part.is_leaf)]
    return copy.deepcopy(copied, {id(part): part for part in kept})


def _sizes(features: int) -> Sequence[tuple[int, ...]]:
    """Input shapes to try: sequences, rows, images with channels last and first."""
    return (2, 5, features), (7, features), (2, 4, 4, features), (2, features, 8, 8)


def _random(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    weight = torch.randn_like(layer.weight, dtype=dtype) / layer.in_features**0.5
    return _linear(weight, None if layer.bias is None else torch.randn_like(weight[:, 0]))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone(), False)
    layer.bias = None if bias is None else nn.Parameter(bias.clone(), False)
    return layer


def _outputs(holder: nn.Module, names: Sequence[str], layers: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
    """The outputs of the consumer and of the module with ``layers`` in it, and the tensors that its modules keep."""
    for name, layer in zip(names, layers, strict=True):
        setattr(holder.get_submodule(_parent(name)), name.rpartition(".")[2], layer)
    holder.to(x.dtype)
    seen: list[Any] = []
    with evaluating(holder), torch.autocast(x.device.type, enabled=False):
        handle = layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
        output = holder(x.clone(), *[None] * _required(holder))
        handle.remove()
    kept = [{**vars(module), "_modules": None, "_parameters": None} for module in holder.modules()]
    found = [part for part in tree_leaves([seen, output, kept]) if isinstance(part, Tensor)]
    if not seen or not all(bool(part.any()) for part in seen):
        raise ValueError("its consumer was not called")
    return found


def _required(module: nn.Module) -> int:
    """How many arguments ``forward`` requires besides the first one, such as masks."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return sum(part.kind is part.POSITIONAL_OR_KEYWORD and part.default is part.empty for part in parameters)


def _alike(first: Sequence[Tensor], second: Sequence[Tensor], tolerance: float = TOLERANCE) -> bool:
    return [part.shape for part in first] == [part.shape for part in second] and all(
        torch.equal(a, b) or (a.is_floating_point() and _distance(a, b) <= tolerance * _distance(a, None))
        for a, b in zip(first, second, strict=True)
    )


def _distance(a: Tensor, b: Tensor | None) -> float:
    """The norm of the difference, or of ``a``; values that are not finite count as zero."""
    a = a.nan_to_num(0.0, 0.0, 0.0)
    difference = a if b is None else a - b.nan_to_num(0.0, 0.0, 0.0)
    return float(torch.linalg.vector_norm(difference, dtype=torch.promote_types(a.dtype, torch.float32)))
