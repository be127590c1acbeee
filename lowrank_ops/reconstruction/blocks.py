"""Block-wise reconstruction: the factors of one or several blocks at a time, trained towards the dense model.

One-shot factors minimize each layer's own error. Here all factors of a block are trained together, on the compressed
model's input of the block, so that they correct each other's errors and those of earlier blocks. They are trained
towards the dense block's output, or towards the dense model's logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..arguments import check_arguments, check_positive
from ..calibration.call_weights import SEED
from ..calibration.gradients import OutputGradients
from ..calibration.objectives import Sensitivity, check_sensitivity, divergence, objective
from ..calibration.statistics import NonFiniteActivationError
from ..factors.projections import Factors
from ..files import digest
from ..layers import LowRankConv1d, LowRankLayer, NarrowLinear
from ..layers.replace import replaceable, replacement
from ..models.experts import on_listed_experts
from ..models.layers import find_layers, is_supported
from ..models.mask_sources import Mask
from ..models.masks import Masks, real_rows
from ..models.running import (
    NO_REAL_ROW,
    ProgressBar,
    call_model,
    device_of,
    differentiable,
    float64_device,
    hooks,
    in_layer,
    move,
    output_tensor,
    shortened,
    warn_caller,
)
from .checkpoint import resume_checkpoint, run_identity, save_checkpoint
from .paired_runs import OUTPUT_FIELDS, Block, PairedRuns, block_name, find_chains
from .sequential import chains_named, checked_batches

_MEMORY = "Use smaller batches, or train fewer blocks together."
DAMPING = 1e-3  # of the output metric, relative to its mean diagonal
WARMUP = 5  # steps
LOWER = 4.0  # divides the learning rate where the first epoch does not lower the error
TARGETS = ("block", "logits")


@dataclass(frozen=True)
class BlockReconstruction:
    """Settings of a block-wise reconstruction, for ``compress_(..., reconstruction=...)``.

    Args:
        batches: as for :func:`lowrank_ops.calibrate`, preferably the same and at least 2; held in memory. One optimizer
            step takes one batch.
        sensitivity: as for :func:`lowrank_ops.calibrate`, preferably the same; for ``target="block"``. One more forward
            and backward pass of the dense model measures the second moment of the gradient at every block's output,
            which weights the block's error. None: the error of each output feature is relative to the variance of what
            the block adds to its input.
        target: ``"block"``: the dense block's output. ``"logits"``: the dense model's logits. The error is then the
            Kullback-Leibler divergence of the compressed model's distributions, and gradients pass through all later
            blocks, whose factors are fixed meanwhile. This lowers the loss of a language model much further, because
            later blocks decide which errors matter. It takes longer, and a step needs the memory of a forward and
            backward pass of the whole model.
        together: number of blocks that are trained at a time, towards the output of the last of them. With
            ``target="logits"``, 5 take a fifth of the time.
        epochs: passes over the batches for each training.
        lr: peak learning rate of Adam relative to the root mean square of each factor. Blocks whose error the first
            epoch does not lower start again with a quarter of it, at most twice.
        held_out: share of the batches, from the end, that are not used for training. The epoch with the lowest error
            on them is used; blocks that do not improve keep their factors.
        autocast: ``torch.bfloat16`` runs the models in mixed precision; None does not. Factors and errors stay float32.
        mask, unmasked_rows, forward: as for :func:`lowrank_ops.calibrate`.
        blocks: names of the containers whose children are the blocks, such as ``"model.layers"``; None finds them.
        checkpoint: file written after every training. If it exists, the run resumes from it and gives the same factors,
            provided that weights, factors, batches and settings are the same, which is checked.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> def block():
        ...     return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
        >>> model = torch.nn.Sequential(block(), block())
        >>> batches = [torch.randn(64, 32) for _ in range(8)]
        >>> covariances = lro.calibrate(model, batches)
        >>> report = lro.compress_(model, covariances, reconstruction=lro.BlockReconstruction(batches))
        >>> any(layer.reconstructed for layer in report.layers)
        True
    """

    batches: Iterable[Any]
    sensitivity: Sensitivity | None = None
    target: str = "block"
    together: int = 1
    epochs: int = 4
    lr: float = 1e-3
    held_out: float = 0.125
    mask: Mask | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    blocks: str | Sequence[str] | None = None
    checkpoint: str | Path | None = None
    unmasked_rows: str = "count"
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        if self.sensitivity is not None:
            check_sensitivity(self.sensitivity)
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(map(repr, TARGETS))}; got {self.target!r}.")
        if self.target == "logits" and self.sensitivity is not None:
            raise ValueError("sensitivity weights the error of target='block'; leave it out with target='logits'.")
        check_positive(together=self.together, epochs=self.epochs, lr=self.lr)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be a number in (0, 1); got {self.held_out!r}.")
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast must be None or torch.bfloat16; got {self.autocast!r}.")

    def _precision(self, device: torch.device) -> torch.autocast:
        """The context of the models' runs; without a cache of weights, which training changes."""
        return torch.autocast(
            device.type, self.autocast or torch.bfloat16, self.autocast is not None, cache_enabled=False
        )

    def _run(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for a batch."""
        with self._precision(device_of(model)):
            return (self.forward or call_model)(model, batch)


@on_listed_experts
def reconstruct_blocks(
    model: nn.Module, factors: Mapping[str, Factors], settings: BlockReconstruction, *, progress: bool = False
) -> dict[str, Factors]:
    """Train factors towards the dense model, block by block in the order of the calls.

    The dense model and the one with the factors trained so far run side by side. Kept in main memory are both inputs of
    a block and its dense output, or the last block's for ``target="logits"``, of all batches. Layers outside of blocks
    keep their factors, and a warning names them.

    Args:
        model: the dense model; run in eval mode and returned to its previous state.
        factors: ``{fqn: Factors}`` from :func:`lowrank_ops.factors.factorize`, where training starts.
        settings: batches and options.
        progress: show a progress bar.

    Returns:
        ``{fqn: Factors}`` in the order of ``factors``; trained ones are in the layer's dtype, with ``reconstructed``
        true and without predicted errors.

    Raises:
        NonFiniteActivationError: NaN or inf in the error or the output gradient of a block.
        ValueError: an invalid setting, fewer than 2 batches, a batch without rows that count, no blocks, layers that
            cannot be replaced, a checkpoint of another run, a batch whose loss depends on no block, a model without
            logits for ``target="logits"``.
    """
    batches = checked_batches(model, factors, settings.batches)
    if len(batches) < 2:
        raise ValueError("a block-wise reconstruction needs at least 2 batches, one of them held out; split the batch.")
    replaceable(model, factors)  # raises now for layers that could not be replaced in the end
    found, _ = find_layers(model)
    layers = {fqn: found[fqn] for fqn in factors}
    chains = find_chains(model, layers) if settings.blocks is None else chains_named(model, settings.blocks)
    checkpoint = None if settings.checkpoint is None else Path(settings.checkpoint)
    identity: dict[str, Any] = {}
    done: dict[str, Factors] = {}
    if checkpoint is not None:
        own = {name: getattr(settings, name) for name in ("target", "together", "epochs", "lr", "held_out")}
        own["autocast"] = str(settings.autocast)
        given = digest({fqn: (part.down, part.up, part.bias) for fqn, part in factors.items()})
        identity = run_identity(layers, factors, batches, settings, kind="blocks", start=given, chains=chains, **own)
        done = resume_checkpoint(checkpoint, identity, layers)

    masks = Masks(model, settings.mask, settings.unmasked_rows)
    new = dict(factors)
    with (
        torch.autocast(device_of(model).type, enabled=False),  # the caller's
        PairedRuns(model, layers, batches, settings._run, masks, chains, strict=settings.blocks is not None) as runs,
    ):
        members = {block: _layers_in(block_name(model, block), layers) for block in runs.blocks}
        windows = _windows([block for block in runs.blocks if members[block]], settings.together)
        if not windows:
            raise ValueError(
                "the model has no blocks to reconstruct: no ModuleList or Sequential whose children hold the layers "
                "and are called one after another, each on the last one's output alone. Use SequentialReconstruction, "
                "which needs none."
            )
        inside = {window: [fqn for block in window for fqn in members[block]] for window in windows}
        metrics = {}
        if settings.sensitivity is not None and not all(fqn in done for part in inside.values() for fqn in part):
            metrics = _output_metrics(model, [window[-1] for window in windows], batches, settings, progress)
        for fqn, layer in layers.items():
            runs.replace(fqn, replacement(layer, new[fqn]))
        ready: dict[str, Factors] = {}
        with ProgressBar(total=len(windows), desc="reconstructing", unit="window", disable=not progress) as bar:
            for window, names in inside.items():
                if all(fqn in done for fqn in names):
                    result = {fqn: done[fqn] for fqn in names}
                else:
                    before = runs.blocks[: runs.blocks.index(window[0])]
                    runs.advance({chain: index + 1 for chain, index in before})
                    parts = {fqn: (layers[fqn], new[fqn]) for fqn in names}
                    with in_layer(names[0], _MEMORY):
                        result = _train(runs, window, parts, settings, masks, metrics.get(window[-1]))
                for fqn, part in result.items():
                    new[fqn] = ready[fqn] = part
                    runs.replace(fqn, replacement(layers[fqn], part))
                bar.update()
                if checkpoint is not None:
                    save_checkpoint(checkpoint, identity, ready)
    if (warning := masks.finish()) is not None:
        warn_caller(warning)
    outside = [fqn for fqn in layers if not any(fqn in names for names in members.values())]
    if outside:
        warn_caller(f"these layers are in no block and are not reconstructed: {shortened(outside)}")
    return new


def _layers_in(name: str, layers: Iterable[str]) -> list[str]:
    return [fqn for fqn in layers if fqn == name or fqn.startswith(f"{name}.")]


def _windows(blocks: Sequence[Block], together: int) -> list[tuple[Block, ...]]:
    """Successive blocks of one chain, as many as are trained together."""
    chains = [list(part) for _, part in groupby(blocks, key=lambda block: block[0])]
    return [tuple(part[start : start + together]) for part in chains for start in range(0, len(part), together)]


def _block_error(
    runs: PairedRuns, window: Sequence[Block], settings: BlockReconstruction, metric: Tensor | None
) -> Callable[[int], Tensor]:
    """The error of the last block's output, by batch, in the metric."""
    name = block_name(runs.model, window[-1])
    module = runs.model.get_submodule(name)

    def rows(values: Any, mask: Tensor | None) -> Tensor:
        found = output_tensor(values, OUTPUT_FIELDS)
        if found is None:
            raise ValueError(
                f"block {name!r} returns {type(values).__name__}, which holds no float tensor; name other blocks."
            )
        return _rows(name, module, found, mask)

    targets, added = [], []
    for batch in range(len(runs.batches)):
        dense = runs.section(window[0], window[-1], batch, False)
        targets.append(rows(dense.output, dense.mask).to("cpu", copy=True))
        if not targets[-1].numel():
            raise ValueError(f"block {name!r}: batch {batch} (counted from 0) {NO_REAL_ROW}")
        if metric is None:
            given = dense.input
            start = torch.zeros(()) if given is None or given.dim() < 2 else rows(given, dense.mask).cpu()
            added.append(targets[-1] - start if start.shape == targets[-1].shape else targets[-1])
    root = (_relative_metric(added) if metric is None else metric).to(runs.device)

    def error(batch: int) -> Tensor:
        compressed = runs.section(window[0], window[-1], batch, True)
        difference = rows(compressed.output, compressed.mask) - targets[batch].to(runs.device)
        return (difference.float() @ root).square().sum(-1).mean()

    return error


def _train(
    runs: PairedRuns,
    window: Sequence[Block],
    members: Mapping[str, tuple[nn.Module, Factors]],
    settings: BlockReconstruction,
    masks: Masks,
    metric: Tensor | None,
) -> dict[str, Factors]:
    """The trained factors of the layers in one or several blocks; the given ones if training does not help."""
    name = block_name(runs.model, window[0])

    def divergence_of(batch: int) -> Tensor:
        with torch.no_grad():
            dense = runs.dense_output(batch)
        return divergence(runs.output(batch), dense, masks.of_output(), 1.0, "target='logits'", "target='block'")

    error = divergence_of if settings.target == "logits" else _block_error(runs, window, settings, metric)
    held = max(1, round(settings.held_out * len(runs.batches)))
    everything = list(range(len(runs.batches)))
    training, testing = everything[:-held], everything[-held:]

    def held_out_error() -> float:
        with torch.no_grad():
            return sum(float(error(batch)) for batch in testing) / held

    def gradients_of(batch: int) -> Sequence[Tensor | None]:
        with torch.enable_grad():
            value = error(batch)
            try:
                return torch.autograd.grad(value, parameters, allow_unused=True)
            except RuntimeError as problem:  # activations changed in place
                raise ValueError(f"block {name!r} cannot be trained: {problem}") from problem

    new = {fqn: replacement(dense, factors) for fqn, (dense, factors) in members.items()}
    for fqn, layer in new.items():
        runs.replace(fqn, layer.requires_grad_(True))
    parameters = [parameter for layer in new.values() for parameter in layer.parameters()]
    start = [parameter.detach().clone() for parameter in parameters]
    best, states = held_out_error(), None
    if not math.isfinite(best):
        raise NonFiniteActivationError(
            f"block {name!r}: its error is {best} in the compressed model. Check the batches, or run the model in a "
            "wider dtype."
        )
    for lr in (settings.lr, settings.lr / LOWER, settings.lr / LOWER**2):
        for _ in _epochs(parameters, gradients_of, training, settings.epochs, lr):
            if (value := held_out_error()) < best:
                best, states = value, [parameter.detach().clone() for parameter in parameters]
            elif states is None:
                break
        if states is not None:
            break
        _fill(parameters, start)
    if states is None:
        return {fqn: factors for fqn, (_, factors) in members.items()}
    _fill(parameters, states)
    return {fqn: _factors_of(new[fqn], factors) for fqn, (_, factors) in members.items()}


def _epochs(
    parameters: Sequence[nn.Parameter],
    gradients_of: Callable[[int], Sequence[Tensor | None]],
    training: Sequence[int],
    epochs: int,
    lr: float,
) -> Iterator[None]:
    """Adam with a cosine schedule; yields after each epoch.

    16-bit parameters have float32 copies, so that steps below their precision are not lost.
    """
    wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in parameters]
    masters = [parameter.detach().to(dtype, copy=True) for parameter, dtype in zip(parameters, wide, strict=True)]
    rates = [lr * float(master.square().mean().sqrt()) for master in masters]
    optimizer = torch.optim.Adam(
        [{"params": [master], "lr": rate} for master, rate in zip(masters, rates, strict=True)]
    )
    generator = torch.Generator().manual_seed(SEED)
    step, total = 0, epochs * len(training)
    for _ in range(epochs):
        for position in torch.randperm(len(training), generator=generator).tolist():
            factor = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            gradients = gradients_of(training[position])
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = None if gradient is None else gradient.to(master.dtype)
            optimizer.step()
            _fill(parameters, masters)
            step += 1
        yield


@torch.no_grad()
def _fill(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _factors_of(layer: LowRankLayer | NarrowLinear, old: Factors) -> Factors:
    """The factors of a trained layer without their padding, or the weight of a narrow one."""
    if isinstance(layer, NarrowLinear):
        down, up = layer.weight.detach().clone(), old.up
    else:
        down = layer.down.detach().reshape(*old.down.shape[:-2], -1, old.down.shape[-1])[..., : old.rank, :].clone()
        up = layer.up.detach().reshape(*old.up.shape[:-1], -1)[..., : old.rank].clone()
    return replace(
        old,
        down=down,
        up=up,
        bias=None if layer.bias is None else layer.bias.detach().clone(),
        predicted_error=None,
        predicted_loss=None,
        reconstructed=True,
    )


def _rows(name: str, module: nn.Module, output: Tensor, mask: Tensor | None) -> Tensor:
    """The real rows (rows, features) of a block's output; the features of convolutional blocks are channels."""
    *_, last = [None, *(part for part in module.modules() if is_supported(part) or isinstance(part, LowRankLayer))]
    line = output.dim() == 3 and isinstance(last, (nn.Conv1d, LowRankConv1d))
    if line or (output.dim() == 4 and any(isinstance(part, nn.Conv2d) for part in module.modules())):
        output, mask = output.movedim(1, -1), None
    return real_rows(output, mask).flatten(0, -2)


def _relative_metric(added: Sequence[Tensor]) -> Tensor:
    """The inverse standard deviation of each feature of what a block adds to its input, as a diagonal matrix."""
    variance = torch.cat([part.float() for part in added]).var(0)
    floor = 1e-6 * variance.mean() + torch.finfo(torch.float32).tiny
    return variance.clamp_min(floor).rsqrt().diag()


def _output_metrics(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Any], settings: BlockReconstruction, progress: bool
) -> dict[Block, Tensor]:
    """L (features, features) with L L^T the damped second moment of the gradient at each block's output.

    To second order, an error e of one row increases the loss by |e L|^2 / 2.
    """
    assert settings.sensitivity is not None
    device = device_of(model)
    gradients = OutputGradients()
    masks = Masks(model, settings.mask, settings.unmasked_rows)
    sums: dict[str, Tensor] = {}
    modules = {block_name(model, block): model.get_submodule(block_name(model, block)) for block in blocks}
    with ExitStack() as stack:
        stack.enter_context(differentiable(model, SEED))
        masks.attach(stack.enter_context(hooks()))
        for name, module in modules.items():

            def watch(module: nn.Module, args: Any, output: Any, name: str = name) -> Any:
                found = output_tensor(output, OUTPUT_FIELDS)
                if found is None:
                    return None
                start = gradients.watch(name, found, masks.of_block(name, module, found), None)
                return None if start is None else tree_map(lambda part: start if part is found else part, output)

            stack.callback(module.register_forward_hook(watch).remove)
        for batch in ProgressBar(batches, desc="output gradients", unit="batch", disable=not progress):
            moved = move(batch, device)
            # The output is not bound to a name, which would keep this batch's graph during the next forward.
            loss = objective(settings.sensitivity, settings._run(model, moved), moved, masks.of_output()).loss
            for name, values, mask, _ in gradients.of(loss):
                rows = _rows(name, modules[name], values, mask)
                rows = rows.to(float64_device(rows.device)).double()
                sums[name] = sums.get(name, torch.zeros(())) + rows.mT @ rows
    return {block: _root(sums[name], name) for block, name in zip(blocks, modules, strict=True) if name in sums}


def _root(moment: Tensor, name: str) -> Tensor:
    mean = moment.diagonal().mean()
    if not bool(moment.isfinite().all()):
        raise NonFiniteActivationError(
            f"block {name!r}: its output gradient holds NaN or inf. Check the batches, or run the model in a wider "
            "dtype."
        )
    if not bool(mean > 0):
        return torch.eye(len(moment))
    damped = moment / mean + DAMPING * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.cholesky(damped).float()
