"""Rows weighed with what the loss feels of them: the moments that factors and ranks by loss are made of.

To second order, an error e = (W - W') x of one row of a layer's output costs the loss (g^T e)^2 / 2, g being the
gradient there. The mean over rows of g g^T times x x^T is not the product of the two means: rows that the loss hardly
feels, such as those of tokens that nothing attends to, count in E[x x^T] as much as any other. Weights of |g|^2, one
step of the iteration for the nearest product of two such matrices (Van Loan and Pitsianis 1993), mend that.

They weigh the rows of one sample against each other, not samples: a classifier's gradients are large for the few
samples that it is unsure of, and moments of those alone would fit the others badly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import bias_vector, pad_input, patches
from ..models.masks import real_rows
from ..ops import covariance_update_
from .statistics import Covariance

MOST_ELEMENTS = 1 << 24  # elements of a convolution's patches, or of rows in the sums' dtype, at a time


class KeptRows:
    """What a layer was given in one call, or has made of it, kept until the gradient is known."""

    def __init__(self, x: Tensor, y: Tensor, side: str) -> None:
        # What is done to an output in place afterwards is the model's business: a copy is kept, and so it is of inputs
        # that count no versions. Other inputs are kept by autograd as well, for the gradient of the weight.
        self._side, kept = side, x if side == "input" else y.detach()
        self._values = kept.clone() if side == "output" or kept.is_inference() else kept
        self._version = None if self._values.is_inference() else self._values._version

    def add_to(self, covariance: Covariance, fqn: str, layer: nn.Module, gradient: Tensor, mask: Tensor | None) -> None:
        """Add the rows, weighed with their gradients.

        Args:
            covariance: sums of w x x^T and w x.
            fqn: the layer's name, for messages.
            layer: that was called.
            gradient: of its output, in the output's shape.
            mask: of the forward.

        Raises:
            ValueError: the input was changed in place after the call.
        """
        if self._version is not None and self._values._version != self._version:
            raise ValueError(
                f"the input of layer {fqn!r} was changed in place after the layer had used it, so that its rows can no "
                "longer be weighed with their gradients; pass weigh_rows=False."
            )
        if not gradient.numel():
            return
        values, bias = self._values.detach(), bias_vector(layer) if self._side == "output" else None
        if not isinstance(layer, nn.Conv2d):
            weights = weights_of(layer, gradient, mask)
            add_weighted(covariance, real_rows(fqn, values, mask), weights.unsqueeze(-1), bias)
            return
        values, gradient = (part if part.dim() == 4 else part.unsqueeze(0) for part in (values, gradient))
        weights = _weights_of_conv(gradient, layer.groups)  # (images, height, width, groups)
        values = _padded(layer, values) if self._side == "input" else values
        height, line = weights.shape[1], weights.shape[2] * covariance.total.numel()
        lines = min(height, max(1, MOST_ELEMENTS // line))
        images = max(1, MOST_ELEMENTS // (line * lines))
        for part, part_weights in zip(values.split(images), weights.split(images), strict=True):
            for first, band in zip(range(0, height, lines), part_weights.split(lines, 1), strict=True):
                if self._side == "input":
                    rows = _patches(layer, part, first, band.shape[1])
                else:
                    rows = part[:, :, first : first + lines].movedim(1, -1)
                add_weighted(covariance, rows, band.flatten(0, -2), bias)


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    x, (vertical, horizontal) = pad_input(layer, x)
    return F.pad(x, (horizontal, horizontal, vertical, vertical)) if vertical or horizontal else x


def _patches(layer: nn.Conv2d, x: Tensor, first: int, lines: int) -> Tensor:
    """The patches (rows, in_features) of some lines of a convolution's output, from its padded input."""
    top, reach = first * layer.stride[0], layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
    x = x[:, :, top : top + (lines - 1) * layer.stride[0] + reach]
    return patches(layer, x, (0, 0))


def weights_of(layer: nn.Module, gradient: Tensor, mask: Tensor | None) -> Tensor:
    """Weights (rows,) of the real rows that a layer was given in one call, in their order.

    Args:
        layer: Linear, Conv1D, or Conv2d without groups.
        gradient: of its output, in the output's shape.
        mask: of the forward.
    """
    if isinstance(layer, nn.Conv2d):
        return _weights_of_conv(gradient if gradient.dim() == 4 else gradient.unsqueeze(0), 1).flatten()
    if gradient.is_nested:
        return torch.cat([balanced(part.unsqueeze(0)).flatten() for part in gradient.unbind()])
    if mask is not None and gradient.shape[:-1] in (mask.shape, (mask.numel(),)):
        mask = mask.to(gradient.device)
        return balanced(gradient.reshape(*mask.shape, -1), mask)[mask]
    return balanced(gradient if gradient.dim() > 1 else gradient.unsqueeze(0)).flatten()


def _weights_of_conv(gradient: Tensor, groups: int) -> Tensor:
    """Weights (samples, height, width, groups) of a gradient (samples, groups * channels, height, width)."""
    by_group = gradient.unflatten(1, (groups, -1)).movedim(2, -1)  # (samples, groups, height, width, channels)
    return balanced(by_group.flatten(0, 1)).unflatten(0, (-1, groups)).movedim(1, -1)


def balanced(gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """|g|^2 of every row over its mean in the sample; 1 in samples without a gradient.

    Args:
        gradient: (samples, ..., features).
        mask: (samples, ...), the rows that there are; the weights of others say nothing.

    Returns:
        (samples, ...), float32 or float64; the mean over a sample's rows is 1.
    """
    if not gradient.numel():
        return torch.ones(gradient.shape[:-1], device=gradient.device)
    rows = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).reshape(
        len(gradient), -1, gradient.shape[-1]
    )
    count = torch.full_like(rows[:, 0, 0], rows.shape[1]) if mask is None else mask.flatten(1).sum(1).clamp_min(1)
    if mask is not None:
        rows = rows.masked_fill(~mask.view(*rows.shape[:2], 1), 0)
    largest = rows.abs().amax((1, 2))
    felt = largest != 0  # also where it is NaN, which then is a weight, for the caller to see
    rows = rows / torch.where(felt, largest, 1.0).view(-1, 1, 1)  # else squares of small gradients would vanish
    squares = rows.square().sum(-1)
    mean = squares.sum(1, keepdim=True) / count.unsqueeze(1)
    return torch.where(felt.unsqueeze(1), squares / mean, 1.0).view(gradient.shape[:-1])


def add_weighted(covariance: Covariance, rows: Tensor, weights: Tensor, bias: Tensor | None = None) -> None:
    """Add rows (..., groups * features), less a bias, each group with a weight of its own, (rows, groups)."""
    moment, total = covariance.second_moment, covariance.total
    groups, features = total.numel() // total.shape[-1], total.shape[-1]
    dtype = rows.dtype
    length = weights.to(torch.promote_types(dtype, torch.float32)).sqrt()
    rows = rows if bias is None else rows - bias.to(length)
    scaled = rows.reshape(-1, groups, features) * length.unsqueeze(-1)  # in the dtype of the lengths
    by_group = scaled.movedim(1, 0)  # (groups, rows, features)
    with torch.autocast(total.device.type, enabled=False):  # sums must not be rounded
        # In the sums' dtype: in single precision a mean that is large beside the variance would cost the latter digits.
        wide, some = torch.promote_types(total.dtype, scaled.dtype), max(1, MOST_ELEMENTS // total.numel())
        for part, lengths in zip(by_group.split(some, 1), length.split(some), strict=True):
            total += (lengths.T.unsqueeze(1).to(wide) @ part.to(wide)).view_as(total)
        if groups == 1:
            # Rounded as the rows are, which is fast; but float16 may not hold them.
            narrow = scaled if dtype == torch.float16 else scaled.to(dtype)
            covariance_update_(moment, torch.zeros_like(total), narrow)
        else:  # often hundreds of small ones
            by_group = by_group.to(moment.dtype)
            moment.baddbmm_(by_group.mT, by_group)
    covariance.count += len(scaled)
