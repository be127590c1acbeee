"""The layers of an MLP with fewer channels: rows of the producers' weights, and the consumer's updated weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.layers import all_finite
from ..subspaces.channels import ChannelSubspaces
from .projections import Factors


def narrowed(fqn: str, spaces: ChannelSubspaces, channels: int, projection: str) -> dict[str, Factors]:
    """``{fqn: Factors}`` of all layers of an MLP, each a whole weight in the dtype and on the device of its layer.

    The consumer's weight is W C_:K (C_KK)^-1 for the kept channels K, which minimizes the output error in every metric.
    Its bias takes the mean of what is dropped.

    Args:
        fqn: of the consumer.
        spaces: of the MLP.
        channels: number to keep.
        projection: which channels are kept: ``"loss"``, by smallest loss; ``"output"``, by smallest output error.

    Raises:
        ValueError: an element overflows the dtype of the layer.
    """
    by_loss = projection == "loss" and spaces.loss is not None
    if by_loss:
        assert spaces.loss is not None
        kept, activations = spaces.loss.subspace.leading(channels), spaces.loss_activations
    else:
        kept, activations = spaces.output.leading(channels), spaces.statistics.activations
    kept = kept.sort().values
    moment = spaces.damped_moment(activations)
    root = torch.linalg.cholesky(moment[kept][:, kept])
    weight = torch.cholesky_solve((spaces.weight @ moment[:, kept]).mT, root).mT.to(spaces.dtype)
    lost = spaces.weight.clone()
    lost[:, kept] -= weight
    bias = None if spaces.bias is None else spaces.bias.to(lost)
    if spaces.centered:
        shift = lost @ spaces.mean
        bias = shift if bias is None else bias + shift
    error = float(((lost @ spaces.moment) * lost).sum().clamp_min(0))
    increase = None
    if by_loss and spaces.loss is not None and spaces.loss.corrected is not None:
        increase = spaces.loss.loss_increase(channels)
    elif (gradients := spaces.gradient_moment) is not None:
        weighted = lost @ spaces.loss_moment(centered=spaces.centered)
        increase = 0.5 * float(((gradients @ lost) * weighted).sum().clamp_min(0))
    shared: dict[str, Any] = {
        "kept": kept.to(spaces.layer_device),
        "projection": "loss" if by_loss else "output",
    }
    found = {
        fqn: _of_weight(
            weight, bias, predicted_error=error, predicted_loss=increase, output_variance=spaces.output_variance,
            **shared,
        )
    }  # fmt: skip
    for name, space in spaces.producers.items():
        known = None if increase is None else 0.0  # the consumer has that of the whole MLP
        rows = kept.to(space.device)
        found[name] = _of_weight(
            space.weight[rows], None if space.bias is None else space.bias.to(space.weight)[rows],
            predicted_error=0.0, predicted_loss=known, output_variance=space.output_variance, **shared,
        )  # fmt: skip
    own = {fqn: spaces, **spaces.producers}
    found = {name: part.to(own[name].dtype, own[name].layer_device) for name, part in found.items()}
    for name, part in found.items():
        if not all(all_finite(values) for values in (part.down, part.bias) if values is not None):
            raise ValueError(
                f"its weight or bias with {channels} channels overflows {own[name].dtype}. Convert the "
                "model to torch.bfloat16 or torch.float32, or keep the MLP dense with overrides={name: None}."
            )
    return {name: found[name] for name in (*spaces.producers, fqn)}


def _of_weight(weight: Tensor, bias: Tensor | None, *, kept: Tensor, projection: str, **predicted: Any) -> Factors:
    part = Factors.of_weight(weight, bias, None, **predicted)
    return replace(part, rank=len(kept), kept=kept, projection=projection)


def widened(factors: Factors, in_features: int) -> Factors:
    """The consumer's factors with columns of zeros for the dropped channels; the function stays the same."""
    assert factors.kept is not None
    weight = factors.down.new_zeros(len(factors.down), in_features)
    weight[:, factors.kept] = factors.down
    return replace(factors, down=weight, kept=torch.arange(in_features, device=weight.device))
