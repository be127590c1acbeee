"""Token weights: how much the loss depends on each row of an activation, and moments of rows with these weights.

To second order, an error e = (W - W') x in one row of a layer's output changes the loss by (g^T e)^2 / 2, where g is
the gradient there. The mean over rows of (g g^T) times (x x^T) is not the product of their means: rows with small
gradients, such as tokens that nothing attends to, count in E[x x^T] as much as any other. Weighting each row by |g|^2
is one step of the iteration for the nearest such product (Van Loan and Pitsianis 1993).

Weights are relative to the sample: a classifier's gradients are large for the few samples that it is unsure of, and
moments dominated by those would fit the others badly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import Conv, images, is_conv, pad_input, patches
from ..models.masks import real_rows
from ..ops import covariance_update_
from ..ops.covariance.reference import MIN_CHUNK_BYTES, chunk_bytes
from .sampling import Sampler
from .statistics import Moments

MAX_ELEMENTS = 1 << 23  # of copies of rows, or of a convolution's patches, in memory at a time; fewer on the CPU


class SavedActivation:
    """The input or output of one call of a layer, saved until its gradient is known."""

    def __init__(self, x: Tensor, y: Tensor, side: str) -> None:
        # Outputs are cloned, because the model may change them in place, and so are inputs without a version counter.
        # Other inputs are saved by autograd as well, for the gradient of the weight, and cost nothing.
        self._side, saved = side, x if side == "input" else y.detach()
        self._values = saved.clone() if side == "output" or saved.is_inference() else saved
        self._version = None if self._values.is_inference() else self._values._version

    def values(self, fqn: str) -> Tensor:
        """The activation of layer ``fqn``, as it was in the call.

        Raises:
            ValueError: it was changed in place after the call.
        """
        if self._version is not None and self._values._version != self._version:
            raise ValueError(
                f"the input of layer {fqn!r} was changed in place after the layer had used it, so token weights and "
                "corrections cannot be applied to it; pass token_weights=False, or leave the layer out."
            )
        return self._values.detach()

    def add_to(
        self,
        moments: Moments,
        fqn: str,
        layer: nn.Module,
        gradient: Tensor,
        mask: Tensor | None,
        sampler: Sampler | None = None,
    ) -> None:
        """Add the rows to ``moments``, with token weights from their gradients.

        Args:
            moments: sums of w (x - shift) (x - shift)^T and w (x - shift).
            fqn: the layer's name, for messages.
            layer: the layer that was called.
            gradient: of its output, in the output's shape.
            mask: of the forward.
            sampler: chooses rows; None takes all.

        Raises:
            ValueError: the input was changed in place after the call.
        """
        values = self.values(fqn)
        if not gradient.numel():
            return
        if not is_conv(layer):
            weights = token_weights(layer, gradient, mask)
            add_weighted(moments, real_rows(values, mask), weights.unsqueeze(-1), sampler)
            return
        weights = _conv_weights(images(layer, gradient), layer.groups)  # (samples, height, width, groups)
        values = images(layer, _padded(layer, values) if self._side == "input" else values)
        most = elements_at_a_time(moments.total)
        height, line = weights.shape[1], weights.shape[2] * moments.total.numel()
        lines = min(height, max(1, most // line))
        samples = max(1, most // (line * lines))
        for part, part_weights in zip(values.split(samples), weights.split(samples), strict=True):
            for first, band in zip(range(0, height, lines), part_weights.split(lines, 1), strict=True):
                if self._side == "input":
                    rows = _patches(layer, part, first, band.shape[1])
                else:
                    rows = part[:, :, first : first + lines].movedim(1, -1)
                add_weighted(moments, rows, band.flatten(0, -2), sampler)


def elements_at_a_time(total: Tensor) -> int:
    """The elements of rows that may be copied at a time, for sums with this total."""
    if total.device.type != "cpu":
        return MAX_ELEMENTS
    return min(MAX_ELEMENTS, chunk_bytes(total) // total.element_size())


def _padded(layer: Conv, x: Tensor) -> Tensor:
    x, padding = pad_input(layer, x)
    return F.pad(x, [size for size in reversed(padding) for _ in range(2)]) if any(padding) else x


def _patches(layer: Conv, x: Tensor, first: int, lines: int) -> Tensor:
    """The patches (rows, in_features) of some lines of a convolution's output, from its padded input."""
    top, reach = first * layer.stride[0], layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
    x = x[:, :, top : top + (lines - 1) * layer.stride[0] + reach]
    return patches(layer, x, (0, 0))


def token_weights(layer: nn.Module, gradient: Tensor, mask: Tensor | None) -> Tensor:
    """Token weights (rows,) of the real rows of one call of a layer, in their order.

    Args:
        layer: Linear, Conv1D, or Conv1d or Conv2d without groups.
        gradient: at the layer's output, in the output's shape.
        mask: of the forward, or None.
    """
    if is_conv(layer):
        return _conv_weights(images(layer, gradient), 1).flatten()
    if gradient.is_nested:
        return torch.cat([relative_squares(part.unsqueeze(0)).flatten() for part in gradient.unbind()])
    if mask is not None and gradient.shape[:-1] in (mask.shape, (mask.numel(),)):
        mask = mask.to(gradient.device)
        return relative_squares(gradient.reshape(*mask.shape, gradient.shape[-1]), mask)[mask]
    return relative_squares(gradient if gradient.dim() > 1 else gradient.unsqueeze(0)).flatten()


def _conv_weights(gradient: Tensor, groups: int) -> Tensor:
    """Weights (samples, height, width, groups) of a gradient (samples, groups * channels, height, width)."""
    by_group = gradient.unflatten(1, (groups, -1)).movedim(2, -1)  # (samples, groups, height, width, channels)
    return relative_squares(by_group.flatten(0, 1)).unflatten(0, (-1, groups)).movedim(1, -1)


def relative_squares(gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """|g|^2 of every row over its mean in the sample; 1 in samples without a gradient.

    Args:
        gradient: (samples, ..., features).
        mask: (samples, ...), true for real rows; weights of other rows are undefined.

    Returns:
        (samples, ...), float32 or float64; the mean over a sample's rows is 1.
    """
    if not gradient.numel():
        return torch.ones(gradient.shape[:-1], device=gradient.device)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    rows = gradient.reshape(len(gradient), -1, gradient.shape[-1])
    sizes = torch.maximum(rows.amax(-1), -rows.amin(-1)).to(dtype)  # the largest of each row
    real = None if mask is None else mask.flatten(1)
    count = torch.full_like(sizes[:, 0], rows.shape[1]) if real is None else real.sum(1).clamp_min(1)
    largest = (sizes if real is None else sizes.masked_fill(~real, 0)).amax(1)
    nonzero = largest != 0  # true for NaN, which then appears in the weights, where the caller checks for it
    scale = torch.where(nonzero, largest, 1.0).view(-1, 1, 1)  # avoids underflow of squared small gradients
    some = max(1, (MAX_ELEMENTS if rows.device.type != "cpu" else MIN_CHUNK_BYTES // 4) // rows[:, 0].numel())
    squares = torch.cat([(part.to(dtype) / scale).square().sum(-1) for part in rows.split(some, 1)], 1)
    if real is not None:
        squares = squares.masked_fill(~real, 0)
    mean = squares.sum(1, keepdim=True) / count.unsqueeze(1)
    return torch.where(nonzero.unsqueeze(1), squares / mean, 1.0).view(gradient.shape[:-1])


def add_weighted(moments: Moments, rows: Tensor, weights: Tensor, sampler: Sampler | None = None) -> None:
    """Add rows (..., groups * features) with weights (rows, groups) of mean 1; those that ``sampler`` chooses."""
    chosen = None if sampler is None else sampler.choose(len(weights))
    if chosen is not None:
        chosen = chosen.to(rows.device)
        rows, weights = rows.reshape(-1, moments.total.numel())[chosen], weights[chosen]
    moment, total, shift = moments.second_moment, moments.total, moments.shift
    groups, features = total.numel() // total.shape[-1], total.shape[-1]
    dtype = rows.dtype
    length = weights.to(torch.promote_types(dtype, torch.float32)).sqrt()
    some = max(1, elements_at_a_time(total) // total.numel())
    with torch.autocast(total.device.type, enabled=False):  # sums must not be rounded
        for part, lengths in zip(rows.reshape(-1, total.numel()).split(some), length.split(some), strict=True):
            shifted = part if shift is None else part - shift.flatten()
            scaled = shifted.reshape(-1, groups, features) * lengths.unsqueeze(-1)  # in the dtype of ``length``
            by_group = scaled.movedim(1, 0)  # (groups, rows, features)
            # In the dtype of the sums: in float32 a mean much larger than the deviation would cost digits of the
            # variance.
            wide = torch.promote_types(total.dtype, scaled.dtype)
            total += (lengths.T.unsqueeze(1).to(wide) @ by_group.to(wide)).view_as(total)
            if groups == 1:
                # Kernels multiply rows of their own dtype fast; weighted ones may overflow float16.
                kept = scaled.device.type == "cpu" or dtype == torch.float16
                covariance_update_(moment, torch.zeros_like(total), scaled if kept else scaled.to(dtype))
            else:  # often hundreds of small ones
                by_group = by_group.to(moment.dtype)
                moment.baddbmm_(by_group.mT, by_group)
    moments.count += len(weights)
