"""Whole models, dense and low-rank, and what their calibration costs: ``python -m benchmarks.bench_model [--smoke]``.

All variants compute one function: the dense weights are the products of the factors. Results are compared on the first
samples of the batch, in float64.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ops as lro

from . import models
from .measure import Tensors, compile_every_shape, time_arms
from .rows import Arm, Case, Row, compare, distance, on_cuda
from .shapes import DTYPES
from .suite import Job, finish, parser, run

VARIANTS = ("dense", "two_linears", "lowrank_ops")
BATCHES = (1, 8, 64, 256)
FRACTIONS = (0.5, 0.25)
COMPARED = 4  # samples of a batch
CALIBRATION_BATCHES = 4
CALIBRATED = {"vit": "blocks.0.fc1", "llama": "blocks.0.gate"}  # the layer whose second moment is compared
CALIBRATIONS = ("forward", "hooks_float32", "lowrank_ops")


def cases(
    sizes: dict[str, models.Size], batches: Iterable[int], dtype: str, fractions: Iterable[float] = FRACTIONS
) -> Iterator[Case]:
    """Every model at every fraction of its parameters, with every batch, eager and compiled with CUDA graphs."""
    for name, size in sizes.items():
        for fraction in fractions:
            for batch in batches:
                for mode in ("eager", "compiled"):
                    yield case(name, size, fraction, batch, mode, dtype)


def case(name: str, size: models.Size, fraction: float, batch: int, mode: str, dtype: str) -> Case:
    """The forward pass of one model."""
    kind = DTYPES[dtype]
    unavailable = on_cuda if mode == "compiled" else lambda device: None

    def make(device: torch.device, seed: int) -> Tensors:
        return (models.sample(size, batch, device, kind, seed),)

    def forward(which: str) -> Callable[[Tensor], Tensor]:
        return lambda x: _ready(size, fraction, which, mode, x.device, kind)(x)

    def exact(tensors: Tensors) -> Tensor:
        model = models.variant(_model(size, fraction, tensors[0].device, kind), "two_linears")
        result: Tensor = model.double()(tensors[0][:COMPARED].double())
        return result

    meta = models.lowrank_model(size, fraction, torch.device("meta"), kind)
    parameters = sum(parameter.numel() for parameter in meta.parameters())
    batch_bytes = make(torch.device("meta"), 0)[0].nbytes
    return Case(
        op="model",
        shape={"model": name, "parameters": f"{fraction:.0%}", "batch": batch, "mode": mode, "dtype": dtype},
        flops=models.flops(meta, size, batch),
        bytes=parameters * kind.itemsize + batch_bytes,
        dtype=kind,
        make=make,
        arms=tuple(
            Arm(which, forward(which), unavailable, "auto" if which == "lowrank_ops" else None) for which in VARIANTS
        ),
        solve=lambda run, tensors: run(*tensors)[:COMPARED].clone(),
        exact=exact,
        plain=lambda x: _ready(size, fraction, "two_linears", "eager", x.device, kind)(x),
        pose=None,
        graph=False,
    )


@functools.lru_cache(maxsize=1)
def _model(size: models.Size, fraction: float, device: torch.device, dtype: torch.dtype) -> nn.Module:
    _ready.cache_clear()
    torch.compiler.reset()  # compiled code and CUDA graphs of the model before, and the memory that they hold
    return models.lowrank_model(size, fraction, device, dtype)


@functools.lru_cache(maxsize=2 * len(VARIANTS))
def _ready(
    size: models.Size, fraction: float, which: str, mode: str, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Any]:
    """A variant to call; the last few are kept, as cases that follow one another use the same ones."""
    model = models.variant(_model(size, fraction, device, dtype), which)
    if mode != "compiled":
        return model
    compile_every_shape()
    return torch.compile(model, options=_cuda_graphs(), dynamic=False)


def _cuda_graphs() -> dict[str, Any]:
    """The options of "reduce-overhead", with an error where it would do without CUDA graphs."""
    required = "triton.cudagraph_or_error"
    options: dict[str, Any] = torch._inductor.list_mode_options("reduce-overhead")
    return options | ({required: True} if required in torch._inductor.list_options() else {})


def calibration_rows(
    name: str, size: models.Size, batch: int, device: torch.device, dtype: str, seconds: float
) -> list[Row]:
    """Calibration of a dense model by this package and by float32 hooks, against forward passes alone."""
    kind, compared = DTYPES[dtype], CALIBRATED[size.kind]
    model = models.variant(models.lowrank_model(size, 0.5, device, kind), "dense")
    batches = [models.sample(size, batch, device, kind, seed) for seed in range(CALIBRATION_BATCHES)]
    moments: dict[str, Tensor] = {}

    def forward(first: Tensor) -> None:
        for x in batches:
            model(x)

    def hooks(first: Tensor) -> None:
        moments["hooks_float32"] = _hooked(model, batches, torch.float32, compared)

    def ours(first: Tensor) -> None:
        covariances = lro.calibrate(model, batches, filter_fn=lambda module, fqn: fqn.startswith("blocks."))
        moments["lowrank_ops"] = covariances[compared].second_moment

    arms = dict(zip(CALIBRATIONS, (forward, hooks, ours), strict=True))
    shape = calibration_shape(name, batch, dtype)
    rows = {arm: Row("calibration", dict(shape), arm) for arm in arms}
    exact = _hooked(model, batches, torch.float64, compared)
    hooks(batches[0])
    ours(batches[0])
    allowed = 2 * distance(moments["hooks_float32"], exact) + 1e-6
    rows["forward"].correct = all(bool(model(x).isfinite().all()) for x in batches)
    for arm, moment in moments.items():
        rows[arm].error, rows[arm].allowed = distance(moment, exact), allowed
        rows[arm].correct = rows[arm].error <= allowed  # type: ignore[operator]
    for arm, timing in time_arms(arms, [(batches[0],)], seconds, graph=False).items():
        if isinstance(timing, str):
            rows[arm].failure, rows[arm].correct = timing, False
        else:
            rows[arm].median_us, rows[arm].p90_us, rows[arm].eager_us, rows[arm].samples = timing
    return compare(list(rows.values()), ["forward", "hooks_float32"])


def calibration_shape(name: str, batch: int, dtype: str) -> dict[str, int | str]:
    """What the rows of a calibration say of it."""
    return {"model": name, "batch": batch, "batches": CALIBRATION_BATCHES, "dtype": dtype}


def _hooked(model: nn.Module, batches: Iterable[Tensor], dtype: torch.dtype, compared: str) -> Tensor:
    """The second moment of one layer's input, by hooks on every layer as one would write them."""
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


def main() -> int:
    """The command line."""
    arguments = parser(__doc__)
    arguments.add_argument("--smoke", action="store_true", help="tiny models, for a look at the suite itself")
    arguments.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parsed = arguments.parse_args()
    sizes = models.SMOKE_SIZES if parsed.smoke else models.SIZES
    batches = (1, 2) if parsed.smoke else BATCHES
    device = torch.device(parsed.device)

    def calibration(name: str, size: models.Size) -> Job:
        shape = calibration_shape(name, batches[-2], parsed.dtype)
        return Job("calibration", shape, CALIBRATIONS, lambda: calibration_rows(
            name, size, batches[-2], device, parsed.dtype, parsed.seconds
        ))  # fmt: skip

    jobs = [calibration(name, size) for name, size in sizes.items()]
    suite = run("model", cases(sizes, batches, parsed.dtype), parsed, jobs=jobs)
    return 0 if suite is None else finish(suite, "model", parsed.out)


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
