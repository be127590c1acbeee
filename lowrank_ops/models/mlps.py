"""MLPs whose channels can be dropped: found by their shapes, then verified by running them with fewer channels."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .copies import shared_copy
from .experts import ExpertLinear
from .layers import HOOKS
from .running import evaluating, float64_device, random_state_kept

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
    all channels but columns of zeros in the consumer. The candidate is an MLP if both outputs are the same. Modules
    with hooks, and those that do not run on one tensor with the producers' input features, are not verified. A layer
    that the model holds at two places, such as one that two MLPs share, is in none: only one place would be verified.

    Args:
        model: any module; not changed.
        layers: ``{fqn: layer}``, the layers that may be changed.
    """
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
                return _alike(*(_outputs(copied, names, parts, x) for parts in (wide, narrow)))
    return False


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
    """The outputs of the consumer and of the module, with ``layers`` in the module."""
    for name, layer in zip(names, layers, strict=True):
        setattr(holder.get_submodule(_parent(name)), name.rpartition(".")[2], layer)
    holder.to(x.dtype)
    seen: list[Any] = []
    with evaluating(holder), torch.autocast(x.device.type, enabled=False):
        handle = layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
        output = holder(x.clone(), *[None] * _required(holder))
        handle.remove()
    found = [part for part in tree_leaves([seen, output]) if isinstance(part, Tensor)]
    if not seen or not all(bool(part.any()) for part in seen):
        raise ValueError("its consumer was not called")
    return found


def _required(module: nn.Module) -> int:
    """How many arguments beside the first one ``forward`` requires, such as masks."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return sum(part.kind is part.POSITIONAL_OR_KEYWORD and part.default is part.empty for part in parameters)


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return [part.shape for part in first] == [part.shape for part in second] and all(
        bool((a - b).norm() <= TOLERANCE * a.norm()) if a.is_floating_point() else torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
    )
