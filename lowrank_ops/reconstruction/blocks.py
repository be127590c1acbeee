"""Block-wise reconstruction: the factors of one block at a time, trained towards the dense block's output.

One-shot factors minimize each layer's own error. Here all factors of a block are trained together, from the compressed
model's input of the block to the dense model's output of it, so that they correct each other's errors and those of
earlier blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..arguments import check_arguments, check_positive
from ..calibration.call_weights import SEED
from ..calibration.gradients import OutputGradients
from ..calibration.objectives import Sensitivity, check_sensitivity, objective
from ..calibration.statistics import NonFiniteActivationError
from ..factors.projections import Factors
from ..files import digest
from ..layers import LowRankConv1d, LowRankLayer
from ..layers.replace import lowrank_type, replacements_of
from ..models.experts import on_listed_experts
from ..models.layers import find_layers, is_supported
from ..models.masks import Mask, Masks, real_rows
from ..models.running import (
    ProgressBar,
    call_model,
    device_of,
    differentiable,
    float64_device,
    hooks,
    move,
    output_tensor,
    shortened,
    warn_caller,
)
from .checkpoint import resume_checkpoint, run_identity, save_checkpoint
from .paired_runs import Block, BlockCall, PairedRuns, Position, block_name, find_chains
from .sequential import chains_named, checked_batches

DAMPING = 1e-3  # of the output metric, relative to its mean diagonal
WARMUP = 5  # steps
LOWER = 4.0  # divides the learning rate where the first epoch does not lower the error
_FIELDS = ("last_hidden_state",)  # of a block's output, where it is an object or a mapping


@dataclass(frozen=True)
class BlockReconstruction:
    """Settings of a block-wise reconstruction, for ``compress_(..., reconstruction=...)``.

    Args:
        batches: as for :func:`lowrank_ops.calibrate`, preferably the same and at least 2; held in memory. One optimizer
            step takes one batch.
        sensitivity: as for :func:`lowrank_ops.calibrate`, preferably the same. One more forward and backward pass of
            the dense model measures the second moment of the gradient at every block's output, which weights the
            block's error. None: the error of each output feature is relative to the variance of what the block adds to
            its input.
        epochs: passes over the batches for each block.
        lr: peak learning rate of Adam relative to the root mean square of each factor. A block whose error the first
            epoch does not lower starts again with a quarter of it, at most twice.
        held_out: share of the batches, from the end, that are not used for training. The epoch with the lowest error
            on them is used; a block that does not improve keeps its factors.
        autocast: ``torch.bfloat16`` runs the models in mixed precision; None does not. Factors and errors stay float32.
        mask, unmasked_rows, forward: as for :func:`lowrank_ops.calibrate`.
        blocks: names of the containers whose children are the blocks, such as ``"model.layers"``; None finds them.
        checkpoint: file written after every block. If it exists, the run resumes from it and gives the same factors,
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
        check_positive(epochs=self.epochs, lr=self.lr)
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
    """Train factors towards the dense model's outputs, block by block in the order of the calls.

    The dense model and the one with the factors trained so far run side by side, and the inputs and outputs of one
    block are kept in main memory. Layers outside of blocks keep their factors, and a warning names them.

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
        ValueError: an invalid setting, fewer than 2 batches, no blocks, layers that cannot be replaced, a checkpoint of
            another run, a batch whose loss depends on no block, a block whose output depends on values beside its
            arguments.
    """
    batches = checked_batches(model, factors, settings.batches)
    if len(batches) < 2:
        raise ValueError("a block-wise reconstruction needs at least 2 batches, one of them held out; split the batch.")
    replacements_of(model, factors)  # raises now for layers that could not be replaced in the end
    found, _ = find_layers(model)
    layers = {fqn: found[fqn] for fqn in factors}
    chains = find_chains(model, layers) if settings.blocks is None else chains_named(model, settings.blocks)
    checkpoint = None if settings.checkpoint is None else Path(settings.checkpoint)
    identity: dict[str, Any] = {}
    done: dict[str, Factors] = {}
    if checkpoint is not None:
        own = {name: getattr(settings, name) for name in ("epochs", "lr", "held_out")}
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
        trained = [block for block in runs.blocks if members[block]]
        if not trained:
            raise ValueError(
                "the model has no blocks to reconstruct: no ModuleList or Sequential whose children hold the layers "
                "and are called one after another, each on the last one's output alone. Use SequentialReconstruction, "
                "which needs none."
            )
        metrics = {}
        if settings.sensitivity is not None and not all(fqn in done for block in trained for fqn in members[block]):
            metrics = _output_metrics(model, trained, batches, settings, progress)
        for fqn, layer in layers.items():
            runs.replace(fqn, lowrank_type(layer).from_factors(layer, new[fqn]))
        position: Position = {}
        ready: dict[str, Factors] = {}
        with ProgressBar(total=len(trained), desc="reconstructing", unit="block", disable=not progress) as bar:
            for block in runs.blocks:
                runs.advance(position)
                position = {**position, block[0]: block[1] + 1}  # from the next block on
                if block not in trained:
                    continue
                if all(fqn in done for fqn in members[block]):
                    result = {fqn: done[fqn] for fqn in members[block]}
                else:
                    inside = {fqn: (layers[fqn], new[fqn]) for fqn in members[block]}
                    result = _train(runs, block, inside, settings, metrics.get(block))
                for fqn, part in result.items():
                    new[fqn] = ready[fqn] = part
                    runs.replace(fqn, lowrank_type(layers[fqn]).from_factors(layers[fqn], part))
                bar.update()
                if checkpoint is not None:
                    save_checkpoint(checkpoint, identity, ready)
    if (warning := masks.finish()) is not None:
        warn_caller(warning)
    outside = [fqn for fqn in layers if not any(fqn in inside for inside in members.values())]
    if outside:
        warn_caller(f"these layers are in no block and are not reconstructed: {shortened(outside)}")
    return new


def _start(rows: Callable[[Any, BlockCall], Tensor], call: BlockCall, target: Tensor) -> Tensor:
    """The rows of the block's input if they are of the output's shape; else zero."""
    given = output_tensor([*call.args, *call.kwargs.values()], ())
    start = None if given is None or given.dim() < 2 else rows(given, call)
    return start if start is not None and start.shape == target.shape else torch.zeros(())


def _layers_in(name: str, layers: Iterable[str]) -> list[str]:
    return [fqn for fqn in layers if fqn == name or fqn.startswith(f"{name}.")]


def _train(
    runs: PairedRuns,
    block: Block,
    members: Mapping[str, tuple[nn.Module, Factors]],
    settings: BlockReconstruction,
    metric: Tensor | None,
) -> dict[str, Factors]:
    """The trained factors of one block's layers; the given ones if training does not improve the block."""
    calls = dict(runs.block_calls(block))
    name = block_name(runs.model, block)
    module = runs.model.get_submodule(name)
    precision = settings._precision(runs.device)
    with precision:
        alone = runs.runs_alone(block, calls[0])
    if not alone:
        raise ValueError(
            f"block {name!r} cannot be run alone: its output depends on values beside its arguments, such as those "
            "that other modules have stored. Use SequentialReconstruction, which runs the whole model."
        )

    def rows(output: Any, call: BlockCall) -> Tensor:
        found = output_tensor(output, _FIELDS)
        if found is None:
            raise ValueError(f"block {name!r} returns {type(output).__name__}, which holds no float tensor.")
        return _rows(name, module, found, call.mask)

    targets = {batch: rows(runs.dense_output(block, batch), call) for batch, call in calls.items()}
    if metric is None:
        metric = _relative_metric([targets[batch] - _start(rows, calls[batch], targets[batch]) for batch in calls])
    metric = metric.to(runs.device)

    def error(batch: int) -> Tensor:
        call = calls[batch]
        with precision:
            output = runs.run_block(block, call)
        difference = rows(output, call) - targets[batch].to(runs.device)
        return (difference.float() @ metric).square().sum(-1).mean()

    held = max(1, round(settings.held_out * len(calls)))
    training, testing = list(calls)[:-held], list(calls)[-held:]

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

    new = {fqn: lowrank_type(dense).from_factors(dense, factors) for fqn, (dense, factors) in members.items()}
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


def _factors_of(layer: LowRankLayer, old: Factors) -> Factors:
    """The factors in a trained layer, without its padding."""
    return replace(
        old,
        down=layer.down.detach().reshape(*old.down.shape[:-2], -1, old.down.shape[-1])[..., : old.rank, :].clone(),
        up=layer.up.detach().reshape(*old.up.shape[:-1], -1)[..., : old.rank].clone(),
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
                found = output_tensor(output, _FIELDS)
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
