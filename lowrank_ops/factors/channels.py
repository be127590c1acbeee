"""The layers of an MLP with fewer channels: rows of the producers' weights, and the consumer's updated weight."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..models.layers import all_finite
from ..subspaces.channels import ChannelSubspaces
from .projections import Factors


def narrowed(fqn: str, spaces: ChannelSubspaces, channels: int, projection: str) -> dict[str, Factors]:
    """``{fqn: Factors}`` of all layers of an MLP, each a whole weight in the dtype and on the device of its layer.

    The consumer's weight is W C_:K (C_KK)^-1 for the kept channels K, which minimizes the output error in every metric.
    Its bias takes up the mean of the dropped channels.

    Args:
        fqn: of the consumer.
        spaces: of the MLP.
        channels: number to keep.
        projection: which channels are kept: ``"loss"``, by smallest loss; ``"output"``, by smallest output error.

    Raises:
        ValueError: an element overflows the dtype of the layer.
    """
    loss = spaces.loss if projection == "loss" else None
    used = "output" if loss is None else "loss"
    if loss is not None:
        kept, activations = loss.subspace.leading(channels), spaces.loss_activations
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
    if loss is not None and loss.corrected is not None:
        increase = loss.loss_increase(channels)
    elif (gradients := spaces.gradient_moment) is not None:
        weighted = lost @ spaces.loss_moment(centered=spaces.centered)
        increase = 0.5 * float(((gradients @ lost) * weighted).sum().clamp_min(0))
    found: dict[str, Factors] = {}
    for name, space in {**spaces.producers, fqn: spaces}.items():
        if name == fqn:
            values, its_bias, predicted = weight, bias, (error, increase)
        else:  # the consumer's prediction is that of the whole MLP
            rows = kept.to(space.device)
            values, its_bias = space.weight[rows], None if space.bias is None else space.bias.to(space.weight)[rows]
            predicted = 0.0, None if increase is None else 0.0
        part = Factors.of_weight(
            values, its_bias, None, predicted_error=predicted[0], predicted_loss=predicted[1],
            output_variance=space.output_variance,
        )  # fmt: skip
        part = replace(part, rank=channels, kept=kept.to(spaces.layer_device), projection=used)
        part = found[name] = part.to(space.dtype, space.layer_device)
        if not all(all_finite(each) for each in (part.down, part.bias) if each is not None):
            raise ValueError(
                f"its weight or bias with {channels} channels overflows {space.dtype}. Convert the "
                "model to torch.bfloat16 or torch.float32, or keep the MLP dense with overrides={name: None}."
            )
    return found


def widened(factors: Factors, in_features: int) -> Factors:
    """The consumer's factors with columns of zeros for the dropped channels; the function stays the same."""
    assert factors.kept is not None
    weight = factors.down.new_zeros(len(factors.down), in_features)
    weight[:, factors.kept] = factors.down
    return replace(factors, down=weight, kept=torch.arange(in_features, device=weight.device))
