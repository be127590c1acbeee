"""Time layers, dense and at several ranks, on the device at hand: model + one batch -> LayerLatencies."""

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
from tqdm import tqdm

from ..config import LatencyCurve, LayerLatencies
from ..models.layers import FilterFn, dimensions, find_layers
from ..models.running import call_model, device_of, evaluating, move
from ..ranks.costs import RANK_ALIGNMENT
from .lowrank import LowRankConv2d, LowRankLinear

LEAST_SAMPLE = 1e-3  # seconds; shorter calls are timed several at a time


class _Call(NamedTuple):
    """A layer and the shape of an input that it received; calls with one name take the same time."""

    layer: nn.Module
    shape: torch.Size

    @property
    def name(self) -> str:
        layer, size = self.layer, " x ".join(map(str, self.shape))
        _, in_features, out_features = dimensions(layer)
        if isinstance(layer, nn.Conv2d):
            kernel = " x ".join(map(str, layer.kernel_size))
            geometry = f"{layer.in_channels} -> {layer.out_channels}, kernel {kernel}, stride {layer.stride}"
            geometry += f", padding {layer.padding} {layer.padding_mode}, dilation {layer.dilation}"
            geometry += f", groups {layer.groups}"
        else:
            geometry = f"{in_features} -> {out_features}"
        dtype = str(layer.get_parameter("weight").dtype).removeprefix("torch.")
        return f"{type(layer).__name__} {geometry}, {size}, {dtype}"


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
    """Time every distinct call of a layer in one forward, as it is and replaced at several ranks.

    Nothing else in this package times anything; what this function finds is kept by :meth:`LayerLatencies.save` and
    spent by :class:`lowrank_ops.LatencyBudget`. Inputs are random, of the shapes that ``batch`` brings about, in
    the dtype of the layer's weight. The variants of a call are timed in turn and the median counts. Times are of
    eager calls with warm caches, with their launch; on a machine that computes something else they are too long.

    Args:
        model: as it will run: its device, its dtype; evaluated in eval mode and handed back as it was, and so is the
            random state.
        batch: one batch as for :func:`lowrank_ops.calibrate`, of the size whose latency is wanted.
        filter_fn: ``filter_fn(module, fqn) -> bool`` chooses layers; None takes all that can be compressed.
        forward: ``forward(model, batch)`` replaces the call of the model.
        points: ranks, spread evenly up to where factors have as many parameters as the layer.
        rounds: samples of each variant, at least a millisecond of calls each.
        progress: show a progress bar.

    Raises:
        ValueError: a bad argument, or a model without layers that can be compressed and were called.
    """
    for name, value, least in (("points", points, 2), ("rounds", rounds, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
    device = device_of(model)
    calls: dict[str, Counter[str]] = {}
    distinct: dict[str, _Call] = {}
    layers, _ = find_layers(model, filter_fn)

    def see(fqn: str, x: Tensor) -> None:
        # nn.TransformerEncoder takes padding out; to a Linear what is left is a matrix
        call = _Call(layers[fqn], torch.cat(x.unbind()).shape if x.is_nested else x.shape)
        distinct.setdefault(call.name, call)
        calls.setdefault(fqn, Counter())[call.name] += 1

    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, fqn=fqn: see(fqn, args[0] if args else next(iter(kwargs.values()))),
            with_kwargs=True,
        )
        for fqn, layer in layers.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            (forward or call_model)(model, move(batch, device))
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError("the forward of model called no layer that can be compressed and that filter_fn keeps.")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # inputs and factors are random
        curves = {
            name: _curve(call, points, rounds)
            for name, call in tqdm(distinct.items(), desc="timing layers", unit="shape", disable=not progress)
        }
    return LayerLatencies(_name_of(device), torch.get_num_threads(), curves, {fqn: dict(c) for fqn, c in calls.items()})


def _curve(call: _Call, points: int, rounds: int) -> LatencyCurve:
    weight = call.layer.get_parameter("weight")
    x = torch.randn(call.shape, device=weight.device, dtype=weight.dtype)
    arms: dict[int | None, nn.Module] = {None: call.layer}
    arms |= {rank: _replacement(call.layer, rank) for rank in ranks_to_time(call.layer, points)}
    with torch.inference_mode():
        times = time_in_turn({rank: partial(arm, x) for rank, arm in arms.items()}, x.device, rounds)
    ranks = tuple(rank for rank in arms if rank is not None)
    return LatencyCurve(times[None], ranks, tuple(times[rank] for rank in ranks))


def ranks_to_time(layer: nn.Module, points: int) -> list[int]:
    """At most ``points`` aligned ranks up to break-even in parameters, rising, both ends among them."""
    _, in_features, out_features = dimensions(layer)
    steps = max(1, in_features * out_features // (in_features + out_features) // RANK_ALIGNMENT)
    if steps <= points:
        return [RANK_ALIGNMENT * step for step in range(1, steps + 1)]
    return [RANK_ALIGNMENT * round(1 + (steps - 1) * point / (points - 1)) for point in range(points)]


def _replacement(layer: nn.Module, rank: int) -> nn.Module:
    rank = min(rank, *dimensions(layer)[1:])  # what is stored, and timed, is aligned all the same
    if isinstance(layer, nn.Conv2d):
        conv = LowRankConv2d.empty_like(layer, rank, bias=True)
        conv.reset_parameters()
        return conv
    linear = LowRankLinear.empty_like(layer, rank, bias=True)
    linear.reset_parameters()
    return linear


def time_in_turn(arms: Mapping[Any, Callable[[], Any]], device: torch.device, rounds: int) -> dict[Any, float]:
    """Median seconds of one call of each arm, timed one after another so that slow moments fall on all."""
    repeats = {}
    for name, run in arms.items():
        run()  # what is compiled or allocated once
        repeats[name] = max(1, round(LEAST_SAMPLE / max(_seconds(run, 1, device), 1e-7)))
    samples: dict[Any, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
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


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
