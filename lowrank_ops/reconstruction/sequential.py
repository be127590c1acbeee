"""Sequential refit: each layer's factors fitted to the dense model's output from the compressed model's input.

Factors made from the dense model's activations know nothing of the errors that the layers before them make. Taken in
the order of their calls, each layer can make up for what has gone wrong so far, as far as its input tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..calibration.felt_rows import FeltRows, felt_rows
from ..calibration.objectives import Sensitivity, check_sensitivity
from ..calibration.statistics import Covariance, NonFiniteActivationError
from ..factors.factorize import Factors
from ..layers import LowRankConv2d, LowRankLinear
from ..layers.replace import replaced
from ..models.layers import find_layers, input_rows, weight_matrix
from ..models.masks import Mask, real_rows
from ..models.running import call_model
from .paired_runs import Group, Streams, find_chains
from .regression import PairedSums, refit_layers

_FORMAT = "lowrank_ops.refit/1"


def refit_factors(
    model: nn.Module,
    factors: Mapping[str, Factors],
    batches: Iterable[Any],
    *,
    sensitivities: Mapping[str, Covariance] | None = None,
    sensitivity: Sensitivity | None = None,
    centered: bool = True,
    ridge: float | None = None,
    mask: Mask | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    blocks: str | Sequence[str] | None = None,
    checkpoint: str | Path | None = None,
    max_state_bytes: int = 4 << 30,
    progress: bool = False,
) -> dict[str, Factors]:
    """Fit factors anew, layer by layer in the order of the calls, to what the dense model computes.

    The dense model and the one with the factors refitted so far run side by side. Layers that receive the same tensor
    (q, k, v) are fitted together, from one pass of each model through one block; the outputs of the blocks before it
    are kept in main memory, those of one block for each model. Layers outside of blocks, and models without any, are
    run from the start up to the layer in question, which gives the same and takes longer. The model is not changed.

    Layers keep the factors they have, and a warning says so, where they are convolutions with groups, are not reached
    by the first batch, receive in the two models rows that do not correspond (as experts do that a router
    chooses), or would need more than ``max_state_bytes``. Layers without factors stay dense.

    Args:
        model: the dense model; evaluated in eval mode and handed back as it was.
        factors: ``{fqn: Factors}`` as from :func:`lowrank_ops.factorize`; they say rank and projection of each layer.
        batches: as for :func:`lowrank_ops.calibrate`, at best the same; held in memory, as each is run many times.
        sensitivities: of a calibration, for factors with ``projection="loss"``.
        sensitivity: as for :func:`lowrank_ops.calibrate`, at best the same: one more forward and backward pass of the
            dense model then tells what the loss feels of each row, by which rows count for factors with
            ``projection="loss"``; so do they in the means that biases make exact and in ``predicted_error``. Rows of
            calls that the loss does not depend on count alike, and a warning names their layers. Keeps 4 bytes per
            row and layer, 8 in a float64 model. None: all rows alike.
        centered: fit about the means and fold them into the biases, as the factors were made.
        ridge: what is added to the variance of every direction of the input, relative to the mean one, in the
            regression: 0 fits the rows as they are, infinity keeps the dense weight and takes only the new input's
            subspace. None chooses it for each layer by cross-validation between the even and the odd batches
            (or between two halves of a single batch), in the layer's own metric.
        mask: as for :func:`lowrank_ops.calibrate`.
        forward: ``forward(model, batch)`` replaces the call of the model.
        blocks: names of the containers whose children are the blocks, such as ``"encoder.layer"``; None finds them.
        checkpoint: file that is written after every block. If it exists, the run goes on from it: what it holds is
            not fitted again, and the factors come out as from an unbroken run.
        max_state_bytes: bound on the sums of one group of layers, (2 in_features)^2 float64 numbers twice, or less
            where the outputs are narrower; for each of its layers where rows are weighed.
        progress: show a progress bar.

    Returns:
        ``{fqn: Factors}`` in the order of ``factors``; new ones are in the layer's dtype and have ``refitted`` true.

    Raises:
        NonFiniteActivationError: NaN or inf in the input of a layer, or in a gradient.
        ValueError: a bad argument, layers that cannot be replaced, a checkpoint of another run, a batch whose loss
            depends on no layer.
    """
    sensitivities = sensitivities or {}
    if sensitivity is not None:
        check_sensitivity(sensitivity)
    batches = _checked(model, factors, batches, sensitivities, ridge)
    with replaced(model, factors):  # raises now for what could not be put into the model in the end
        pass
    found, _ = find_layers(model)
    layers = {fqn: found[fqn] for fqn in factors}
    chains = find_chains(model, layers) if blocks is None else _containers(model, blocks)
    settings = _settings(layers, factors, len(batches), centered, ridge, sensitivity)
    done = {} if checkpoint is None else _resume(Path(checkpoint), settings)
    new, kept = dict(factors), dict.fromkeys(layers, "the first batch did not reach it")
    by_loss = {
        fqn: layer
        for fqn, layer in layers.items()
        if factors[fqn].projection == "loss" and fqn not in done and getattr(layer, "groups", 1) == 1
    }
    run = forward or call_model
    felt = FeltRows()
    if sensitivity is not None and by_loss:
        felt = felt_rows(model, by_loss, batches, sensitivity, mask=mask, forward=run, progress=progress)

    def refitted(streams: Streams, group: Group) -> dict[str, Factors] | str:
        """New factors of a group, or why it keeps those that it has."""
        if all(fqn in done for fqn in group.layers):
            return {fqn: done[fqn] for fqn in group.layers}
        members = {fqn: layers[fqn] for fqn in group.layers}
        folds = 2 if ridge is None else 1
        if any(getattr(layer, "groups", 1) > 1 for layer in members.values()):
            return "it is a convolution with groups"
        # Rows alike have one sum for all layers, weights are each layer's own.
        alike = {fqn: layer for fqn, layer in members.items() if fqn not in felt}
        parts = [*([alike] if alike else []), *({fqn: members[fqn]} for fqn in members if fqn in felt)]
        if (needed := sum(PairedSums.state_bytes(part, folds) for part in parts)) > max_state_bytes:
            return f"its sums would take {needed / 2**30:.2g} GiB, more than max_state_bytes"
        sums = [PairedSums(part, folds) for part in parts]
        reason = _stream(streams, group, sums, felt)
        if reason is not None:
            return reason
        fitted: dict[str, Factors] = {}
        for pairs in sums:
            old = {fqn: factors[fqn] for fqn in pairs.layers}
            fitted |= refit_layers(pairs, old, sensitivities, centered=centered, ridge=ridge)
        return fitted

    with (
        Streams(model, layers, batches, run, mask, chains, strict=blocks is not None) as streams,
        tqdm(total=len(layers), desc="refitting", unit="layer", disable=not progress) as bar,
    ):
        called_once = {fqn for group in streams.groups if group.calls == 1 for fqn in group.layers}
        for fqn in layers.keys() - called_once:  # later calls depend on what the layer makes of earlier ones
            streams.replace(fqn, _layer(layers[fqn], new[fqn]))
        ready: dict[str, Factors] = {}
        for group, following in zip(streams.groups, [*streams.groups[1:], None], strict=False):
            streams.advance(group.position)
            result = refitted(streams, group)
            for fqn in group.layers:
                if isinstance(result, str):
                    kept[fqn] = result
                else:
                    new[fqn] = result[fqn]
                    del kept[fqn]
                ready[fqn] = new[fqn]
                streams.replace(fqn, _layer(layers[fqn], new[fqn]))
            bar.update(len(group.layers))
            if checkpoint is not None and (following is None or following.position != group.position):
                _save(Path(checkpoint), settings, ready)
    if kept:
        reasons = "".join(f"\n  {fqn}: {reason}" for fqn, reason in kept.items())
        warnings.warn(f"these layers are not refitted:{reasons}", stacklevel=2)
    if unfelt := [fqn for fqn in felt.missing if fqn not in kept]:
        warnings.warn(
            "gradients do not correspond to the rows of these layers row by row, so that some or all of their rows "
            f"count alike: {', '.join(unfelt)}",
            stacklevel=2,
        )
    return new


def _stream(streams: Streams, group: Group, sums: Sequence[PairedSums], felt: FeltRows) -> str | None:
    """Fill the sums with all batches; a reason where the rows of the two models do not correspond."""
    leader = group.layers[0]
    layer = streams.layers[leader]
    folds = sums[0].folds
    last = len(folds) - 1
    for batch, dense, compressed, masks in streams.pairs(group):
        if [x.shape for x in dense] != [z.shape for z in compressed]:
            return "its inputs in the dense and in the compressed model do not correspond row by row"
        for call, (x, z, mask) in enumerate(zip(dense, compressed, masks, strict=True)):
            mask = None if isinstance(layer, nn.Conv2d) else mask
            x, z = (input_rows(layer, real_rows(leader, part, mask)) for part in (x, z))
            halves = last > 0 and len(streams.batches) == 1
            for pairs in sums:
                weights = felt.of_call(next(iter(pairs.layers)), batch, call, len(dense), len(x))
                if halves:
                    half = len(x) // 2
                    for fold, part in enumerate((slice(half), slice(half, None))):
                        pairs.update(fold, x[part], z[part], None if weights is None else _of_mean_one(weights[part]))
                else:
                    pairs.update(batch % 2 if last else 0, x, z, weights)
    if not all(fold.count for fold in folds):
        return "too few rows reached it"
    for pairs in sums:
        pairs.finish()
    if not all(pairs.is_finite() for pairs in sums):
        raise NonFiniteActivationError(
            f"layer {leader!r}: its input holds NaN or inf, in the dense or in the compressed model. Check the "
            "batches, or run the model in a wider dtype."
        )
    return None


def _of_mean_one(weights: Tensor) -> Tensor:
    """The weights of some rows of a batch as if they were all: sums count rows."""
    return weights / weights.mean() if bool(weights.any()) else torch.ones_like(weights)


def _layer(dense: nn.Module, factors: Factors) -> nn.Module:
    make = LowRankConv2d.from_factors if isinstance(dense, nn.Conv2d) else LowRankLinear.from_factors
    return make(dense, factors)  # type: ignore[arg-type]


def _checked(
    model: nn.Module,
    factors: Mapping[str, Factors],
    batches: Iterable[Any],
    sensitivities: Mapping[str, Covariance],
    ridge: float | None,
) -> list[Any]:
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise ValueError("model is compiled, which hides its layers; refit and compress it before torch.compile.")
    if "" in factors:
        raise ValueError("model is itself the layer to refit, and has no layer before it; refit_factors does nothing.")
    unweighed = [fqn for fqn, part in factors.items() if part.projection == "loss" and fqn not in sensitivities]
    if unweighed:
        raise ValueError(
            f"factors of projection='loss' need their sensitivities, which lack {', '.join(unweighed)}; pass "
            "sensitivities=covariances.sensitivities."
        )
    if isinstance(batches, (Tensor, Mapping, str)):
        raise TypeError(
            f"batches must be a collection of batches; got one {type(batches).__name__}. Pass [batch] for a single one."
        )
    if ridge is not None and (isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not ridge >= 0):
        raise ValueError(f"ridge must be None or a number that is not negative; got {ridge!r}.")
    held = list(batches)
    if not held:
        raise ValueError("batches was empty; pass at least one batch.")
    return held


def _containers(model: nn.Module, blocks: str | Sequence[str]) -> list[str]:
    names = [blocks] if isinstance(blocks, str) else list(blocks)
    modules = dict(model.named_modules())
    for name in names:
        if not isinstance(modules.get(name), (nn.ModuleList, nn.Sequential)):
            what = f"is a {type(modules[name]).__name__}" if name in modules else "is not there"
            known = [name for name, module in modules.items() if isinstance(module, (nn.ModuleList, nn.Sequential))]
            raise ValueError(
                f"blocks must name ModuleLists or Sequentials of the model; {name!r} {what}. "
                f"There are: {', '.join(map(repr, known)) or 'none'}."
            )
    return names


def _settings(
    layers: Mapping[str, nn.Module],
    factors: Mapping[str, Factors],
    batches: int,
    centered: bool,
    ridge: float | None,
    sensitivity: Sensitivity | None,
) -> dict[str, Any]:
    """What must be the same for a checkpoint to go on."""
    digest = hashlib.sha256()
    for layer in layers.values():  # enough of every weight to know the model by
        digest.update(weight_matrix(layer).reshape(-1)[:256].double().cpu().numpy().tobytes())
    return {
        "ranks": {fqn: part.rank for fqn, part in factors.items()},
        "projections": {fqn: part.projection for fqn, part in factors.items()},
        "batches": batches,
        "centered": centered,
        "ridge": ridge,
        "sensitivity": "a function" if callable(sensitivity) else sensitivity,
        "weights": digest.hexdigest(),
    }


def _save(path: Path, settings: dict[str, Any], done: Mapping[str, Factors]) -> None:
    """Write what has been fitted; a crash leaves the old file or the new one."""
    tensors, entries = {}, {}
    for fqn, part in done.items():
        for name in ("down", "up", "bias"):
            tensor = getattr(part, name)
            if tensor is not None:
                tensors[f"{fqn}.{name}"] = tensor.contiguous().cpu()
        names = (
            "rank", "projection", "predicted_error", "output_variance", "predicted_loss", "excess_error", "refitted",
        )  # fmt: skip
        entries[fqn] = {name: getattr(part, name) for name in names}
    header = {"format": _FORMAT, "settings": settings, "layers": entries}
    partial = path.with_name(path.name + ".part")
    save_file(tensors, partial, metadata={"lowrank_ops": json.dumps(header)})
    os.replace(partial, path)


def _resume(path: Path, settings: dict[str, Any]) -> dict[str, Factors]:
    if not path.parent.is_dir():
        raise ValueError(f"checkpoint {str(path)!r} is in a folder that does not exist; make it first.")
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["lowrank_ops"])
            known = header["format"] == _FORMAT
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {error}. Delete it to start anew.") from None
    if not known:
        raise ValueError(f"checkpoint {str(path)!r} was not written by a refit. Name another file.")
    differ = [name for name, value in settings.items() if header["settings"].get(name) != value]
    if differ:
        raise ValueError(
            f"checkpoint {str(path)!r} is of another run: its {', '.join(differ)} differ. Use the same arguments to go "
            "on with it, or delete it to start anew."
        )
    return {
        fqn: Factors(tensors[f"{fqn}.down"], tensors[f"{fqn}.up"], tensors.get(f"{fqn}.bias"), **entry)
        for fqn, entry in header["layers"].items()
    }
