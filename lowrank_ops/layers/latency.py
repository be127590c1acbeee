"""Time every layer on the model's device, dense and at several ranks: model + one batch -> LayerLatencies."""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..latencies import LatencyCurve, LayerLatencies
from ..models.experts import on_listed_experts
from ..models.layers import FilterFn, check_not_dispatched, dimensions, find_layers, input_of, is_conv, with_values
from ..models.running import ProgressBar, call_model, device_of, evaluating, hooks, in_batch, move
from ..ranks.costs import RANK_ALIGNMENT
from .replace import lowrank_type

MIN_SAMPLE_SECONDS = 1e-3  # one sample repeats a shorter call until it takes this long


class _Call(NamedTuple):
    """A layer and the shape of one of its inputs. Calls with equal names are timed once."""

    layer: nn.Module
    shape: torch.Size

    @property
    def name(self) -> str:
        layer, size = self.layer, " x ".join(map(str, self.shape))
        _, in_features, out_features = dimensions(layer)
        if is_conv(layer):
            kernel = " x ".join(map(str, layer.kernel_size))
            geometry = f"{layer.in_channels} -> {layer.out_channels}, kernel {kernel}, stride {layer.stride}"
            geometry += f", padding {layer.padding} {layer.padding_mode}, dilation {layer.dilation}"
            geometry += f", groups {layer.groups}"
        else:
            geometry = f"{in_features} -> {out_features}"
        dtype = str(layer.get_parameter("weight").dtype).removeprefix("torch.")
        return f"{type(layer).__name__} {geometry}, {size}, {dtype}"


@checked()
@on_listed_experts
def measure_latency(
    model: nn.Module,
    batch: Any,
    *,
    filter_fn: FilterFn | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    points: int = 12,
    rounds: int = 9,
    progress: bool = False,
) -> LayerLatencies:
    """Time every distinct call of a layer in one forward pass, dense and at several ranks.

    Pass the result to :class:`lowrank_ops.LatencyBudget`; :meth:`LayerLatencies.save` stores it. No other function of
    this package times anything. Inputs are random tensors with the shapes that layers receive for ``batch``, in the
    dtype of the layer's weight. The variants of a call are timed in turn, and the median of each is reported. Times
    are of eager calls with warm caches and include the launch; other programs on the machine lengthen them.

    Args:
        model: on the device and in the dtype in which it will run. It runs in eval mode; its training flags and the
            random state are restored.
        batch: one batch as for :func:`lowrank_ops.calibrate`, of the size whose latency matters.
        filter_fn: ``filter_fn(module, fqn) -> bool`` chooses layers; None chooses all that can be compressed.
        forward: ``forward(model, batch)`` replaces the call of the model.
        points: number of ranks, evenly spaced up to the rank at which the factors have as many parameters as the
            layer.
        rounds: samples per variant, each of at least one millisecond.
        progress: show a progress bar.

    Returns:
        Seconds per call and rank, and the calls of each layer.

    Raises:
        ValueError: ``points`` or ``rounds`` is too small, accelerate moves weights on each call, or the forward pass
            calls no layer that can be compressed.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
        >>> latencies = lro.measure_latency(model, torch.randn(16, 64), points=2, rounds=1)
        >>> list(latencies.curves)
        ['Linear 64 -> 32, 16 x 64, float32']
        >>> policy = lro.LatencyBudget(0.8, latencies)
    """
    for name, value, minimum in (("points", points, 2), ("rounds", rounds, 1)):
        if value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}; got {value!r}.")
    check_not_dispatched(model)
    device = device_of(model)
    calls: dict[str, Counter[str]] = {}
    distinct: dict[str, _Call] = {}
    layers, without = with_values(find_layers(model, filter_fn)[0])
    for fqn, reason in without.items():
        raise ValueError(f"layer {fqn!r} cannot be timed: {reason}.")

    def record(fqn: str, x: Any) -> None:
        if not isinstance(x, Tensor):
            return  # the layer raises
        if not x.numel():
            raise ValueError(f"batch is empty: layer {fqn!r} has an input of shape {tuple(x.shape)}.")
        # nn.TransformerEncoder removes padding by nested tensors; a Linear multiplies the remaining rows as one matrix.
        call = _Call(layers[fqn], torch.cat(x.unbind()).shape if x.is_nested else x.shape)
        distinct.setdefault(call.name, call)
        calls.setdefault(fqn, Counter())[call.name] += 1

    with hooks() as handles, evaluating(model), torch.no_grad(), in_batch(0):
        for fqn, layer in layers.items():
            handle = layer.register_forward_pre_hook(
                lambda module, args, kwargs, fqn=fqn: record(fqn, input_of(args, kwargs)), with_kwargs=True
            )
            handles.append(handle)
        (forward or call_model)(model, move(batch, device))
    if not calls:
        raise ValueError("the forward pass of model called no layer that can be compressed and that filter_fn keeps.")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # inputs and factors are random
        curves = {
            name: _curve(call, points, rounds)
            for name, call in ProgressBar(distinct.items(), desc="timing layers", unit="shape", disable=not progress)
        }
    return LayerLatencies(
        _device_name(device), torch.get_num_threads(), curves, {fqn: dict(c) for fqn, c in calls.items()}
    )


def _curve(call: _Call, points: int, rounds: int) -> LatencyCurve:
    weight = call.layer.get_parameter("weight")
    x = torch.randn(call.shape, device=weight.device, dtype=weight.dtype)
    ranks = tuple(ranks_to_time(call.layer, points))
    variants: dict[int | None, nn.Module] = {None: call.layer}
    variants |= {rank: _random_lowrank(call.layer, rank) for rank in ranks}
    with torch.inference_mode():
        times = time_in_turn({rank: partial(layer, x) for rank, layer in variants.items()}, x.device, rounds)
    return LatencyCurve(times[None], ranks, tuple(times[rank] for rank in ranks))


def ranks_to_time(layer: nn.Module, points: int) -> list[int]:
    """At most ``points`` aligned ranks in ascending order, from the smallest to break-even in parameters, inclusive."""
    _, in_features, out_features = dimensions(layer)
    steps = max(1, in_features * out_features // (in_features + out_features) // RANK_ALIGNMENT)
    if steps <= points:
        return [RANK_ALIGNMENT * step for step in range(1, steps + 1)]
    return [RANK_ALIGNMENT * round(1 + (steps - 1) * point / (points - 1)) for point in range(points)]


def _random_lowrank(layer: nn.Module, rank: int) -> nn.Module:
    rank = min(rank, *dimensions(layer)[1:])  # its stored rank is aligned all the same
    replacement = lowrank_type(layer).empty_like(layer, rank, bias=True)
    replacement.reset_parameters()
    return replacement


def time_in_turn(variants: Mapping[Any, Callable[[], Any]], device: torch.device, rounds: int) -> dict[Any, float]:
    """Median seconds of one call of each variant; each round times all variants, so that slow moments affect all."""
    repeats = {}
    for name, run in variants.items():
        run()  # compile and allocate
        repeats[name] = max(1, round(MIN_SAMPLE_SECONDS / max(_seconds(run, 1, device), 1e-7)))
    samples: dict[Any, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            samples[name].append(_seconds(run, repeats[name], device))
    return {name: statistics.median(values) for name, values in samples.items()}


def _seconds(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
