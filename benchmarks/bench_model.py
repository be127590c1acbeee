"""Whole models, dense and low-rank, and the cost of their calibration: ``python -m benchmarks.bench_model``.

All variants compute one function: the dense weights are the products of the factors. Results are compared on the first
samples of the batch, in float64.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ops as lro

from . import models
from .harness import META, Case, Tensors, Variant, compile_every_shape, on_cuda
from .shapes import DTYPES
from .suite import main

VARIANTS = ("dense", "two_linears", "lowrank_ops")
BATCHES = (1, 8, 64, 256)
FRACTIONS = (0.5, 0.25)
COMPARED = 4  # samples of a batch
CALIBRATION_BATCHES = 4
CALIBRATED = {"vit": "blocks.0.fc1", "llama": "blocks.0.gate"}  # the layer whose second moment is compared


def cases(dtype: str, quick: bool = False, sizes: Mapping[str, models.Size] = models.SIZES) -> Iterator[Case]:
    """Calibrations; then every model at every fraction of its parameters, with every batch, eager and compiled."""
    if quick:
        (name, size), *_ = sizes.items()
        yield calibration_case(name, size, 64, dtype)
        yield case(name, size, 0.5, 64, "compiled", dtype)
        return
    yield from (calibration_case(name, size, 64, dtype) for name, size in sizes.items())
    for name, size in sizes.items():
        for fraction in FRACTIONS:
            for batch in BATCHES:
                yield from (case(name, size, fraction, batch, mode, dtype) for mode in ("eager", "compiled"))


def case(name: str, size: models.Size, fraction: float, batch: int, mode: str, dtype: str) -> Case:
    """The forward pass of one model."""
    kind = DTYPES[dtype]

    def make(device: torch.device, seed: int) -> Tensors:
        return (models.sample(size, batch, device, kind, seed),)

    def variant(which: str) -> Variant:
        def forward(x: Tensor) -> Tensor:
            result: Tensor = _ready(size, fraction, which, mode, x.device, kind)(x)
            return result

        backend = "auto" if which == "lowrank_ops" else None
        return Variant(which, forward, *([on_cuda] if mode == "compiled" else []), backend=backend)

    def exact(tensors: Tensors) -> Tensor:
        model = models.variant(_model(size, fraction, tensors[0].device, kind), "two_linears")
        result: Tensor = model.double()(tensors[0][:COMPARED].double())
        return result

    meta = models.lowrank_model(size, fraction, META, kind)
    parameters = sum(parameter.numel() for parameter in meta.parameters())
    return Case(
        op="model",
        shape={"model": name, "parameters": f"{fraction:.0%}", "batch": batch, "mode": mode, "dtype": dtype},
        flops=models.flops(meta, size, batch),
        bytes=parameters * kind.itemsize + make(META, 0)[0].nbytes,
        dtype=kind,
        make=make,
        variants=tuple(map(variant, VARIANTS)),
        solve=lambda run, tensors: run(*tensors)[:COMPARED].clone(),
        exact=exact,
        plain=lambda x: _ready(size, fraction, "two_linears", "eager", x.device, kind)(x),
        cold=False,
        context=torch.no_grad,
    )


@functools.lru_cache(maxsize=1)
def _model(size: models.Size, fraction: float, device: torch.device, dtype: torch.dtype) -> nn.Module:
    _ready.cache_clear()
    torch.compiler.reset()  # frees the compiled code, CUDA graphs and memory of the model before
    return models.lowrank_model(size, fraction, device, dtype)


@functools.lru_cache(maxsize=2 * len(VARIANTS))
def _ready(
    size: models.Size, fraction: float, which: str, mode: str, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Any]:
    """A variant to call; successive cases use the same ones."""
    model = models.variant(_model(size, fraction, device, dtype), which)
    if mode != "compiled":
        return model
    compile_every_shape()
    options = torch._inductor.list_mode_options("reduce-overhead")
    required = "triton.cudagraph_or_error"  # instead of going on without CUDA graphs
    options |= {required: True} if required in torch._inductor.list_options() else {}
    return torch.compile(model, options=options, dynamic=False)


def calibration_case(name: str, size: models.Size, batch: int, dtype: str) -> Case:
    """Calibration of a dense model by this package and by float32 hooks, against forward passes alone."""
    kind, compared = DTYPES[dtype], CALIBRATED[size.kind]

    def make(device: torch.device, seed: int) -> Tensors:
        batches = range(CALIBRATION_BATCHES)
        return tuple(models.sample(size, batch, device, kind, CALIBRATION_BATCHES * seed + one) for one in batches)

    def model(device: torch.device) -> nn.Module:
        dense = _ready(size, 0.5, "dense", "eager", device, kind)
        assert isinstance(dense, nn.Module)
        return dense

    def forward(*batches: Tensor) -> None:
        for x in batches:
            model(x.device)(x)

    def hooked(*batches: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return _hooked(model(batches[0].device), batches, dtype, compared)

    def ours(*batches: Tensor) -> Tensor:
        found = lro.calibrate(model(batches[0].device), batches, filter_fn=lambda _, fqn: fqn.startswith("blocks."))
        moment: Tensor = found[compared].activations.second_moment
        return moment

    return Case(
        op="calibration",
        shape={"model": name, "batch": batch, "batches": CALIBRATION_BATCHES, "dtype": dtype},
        flops=0.0,
        bytes=0.0,
        dtype=kind,
        make=make,
        variants=(
            Variant("forward", forward, checked=False),
            Variant("hooks_float32", hooked),
            Variant("lowrank_ops", ours, backend="auto"),
        ),
        solve=lambda run, batches: run(*batches),
        exact=lambda batches: hooked(*batches, dtype=torch.float64),
        plain=hooked,
        cold=False,
        context=torch.no_grad,
    )


def _hooked(model: nn.Module, batches: Iterable[Tensor], dtype: torch.dtype, compared: str) -> Tensor:
    """The second moment of one layer's input, by plain hooks on every layer."""
    states: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1]).to(dtype)
        product = rows.T @ rows
        states[module] = states[module] + product if module in states else product

    blocks = model.get_submodule("blocks")
    handles = [layer.register_forward_hook(hook) for layer in blocks.modules() if isinstance(layer, nn.Linear)]
    try:
        for x in batches:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return states[model.get_submodule(compared)]


if __name__ == "__main__":
    sys.exit(main("model", __doc__, cases, "bf16"))
