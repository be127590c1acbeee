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

LEVELS = 2  # above the consumer's parent, up to which modules that hold the MLP are tried
TOLERANCE = 1e-4  # of outputs, relative to their norm; the models run in float64 where the device has it


class Mlp(NamedTuple):
    """Linear layers of which one reads, channel by channel, what the others compute.

    Input feature j of the consumer depends on output feature j of the producers only, and nothing else reads these.
    """

    producers: tuple[str, ...]  # of one input
    consumer: str


def find_mlps(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[Mlp]:
    """The MLPs of ``model`` among ``layers``; no layer is in two.

    A candidate is an ``nn.Linear`` and those of one module that have as many outputs as it has inputs, such as gate, up
    and down projections. A copy of the smallest module that holds them, with random weights in these layers, then runs
    on random inputs: once with half of the channels, in narrower layers, and once with all of them and columns of zeros
    in the consumer. It is an MLP if both runs give the same outputs. Modules that do not run on one tensor of the
    producers' input features, and those with hooks, are not verified and hold none. A layer that is in the model at
    two places, such as one that two MLPs share, is in none: only one of its places would be verified.

    Args:
        model: any module; not changed.
        layers: ``{fqn: layer}``, those that may be changed.
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
    """The name of the smallest module that holds the consumer and layers that may be its producers, and their names."""
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
    """Whether ``holder`` gives the same outputs without channels as with columns of zeros.

    Args:
        holder: a module, whose name is ``prefix``.
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
    with random_state_kept(holder) as generators, torch.no_grad(), contextlib.suppress(Exception):  # of the model
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
    """Of tensors on which a module may run: sequences, rows, and images with channels last or first."""
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
    """What the last of ``layers`` and the module return, with ``layers`` in the module."""
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
