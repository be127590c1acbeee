"""Low-rank factors of one layer: W' = up down, with the mean folded into the bias. Everything in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice
from ..config import PROJECTIONS
from ..models.layers import all_finite
from ..ops.linear.reference import dequantized
from ..ranks.costs import PLAIN, Formats
from ..subspaces.balance import balance
from ..subspaces.layer import LayerSubspaces
from ..subspaces.principal import Subspace, half_product
from .eight_bit import quantized
from .pivoted import Pivots, all_coefficients, pivots_of


@dataclass(frozen=True)
class Factors:
    """The replacement of one layer.

    Attributes:
        down: (..., rank, in_features), float64.
        up: (..., out_features, rank), float64.
        bias: (groups * out_features,), float64, or None.
        rank: the true rank, before padding.
        projection: how the factors were made; ``"output"`` if ``"loss"`` was requested without output gradients.
        predicted_error: E|y - y'|^2 over the calibration rows, summed over the outputs; None if it cannot be known
            (only the output was streamed, and the projection is ``"weight"``).
        output_variance: the variance of y about its mean (about zero if not centered), to compare with.
        predicted_loss: the increase of the loss of one sample, to second order; None if no output gradients were
            streamed or the error cannot be known, and after a reconstruction.
        reconstructed: made by a reconstruction. ``predicted_error`` then compares the layer's outputs in the dense and
            in the compressed model, so it includes the errors of earlier layers. If the reconstruction used token
            weights, ``predicted_error`` and ``output_variance`` are over token-weighted rows.
        formats: how a layer stores ``down`` and ``up``: ``"int8"``, ``"fp8"``, or None for its dtype. Here they are not
            rounded yet. One format only: ``down`` is the weight of a dense layer, and ``up`` is empty.
        pivots: of a pivoted layer; computed from the factors where None.
        kept: (rank,), int64: the channels that are kept, for a layer of an MLP with fewer channels.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    rank: int
    projection: str
    predicted_error: float | None
    output_variance: float
    predicted_loss: float | None = None
    reconstructed: bool = False
    formats: Formats = PLAIN
    pivots: Pivots | None = None
    kept: Tensor | None = None

    @property
    def is_dense(self) -> bool:
        """Whether ``down`` is the whole weight."""
        return len(self.formats) == 1

    @classmethod
    def of_weight(cls, weight: Tensor, bias: Tensor | None, form: str | None, **predicted: Any) -> Factors:
        """A weight (out_features, in_features) that a dense layer stores, in 8 bits or its dtype (None)."""
        values = {"predicted_error": None, "output_variance": 0.0, **predicted}
        return cls(weight, weight.new_empty(len(weight), 0), bias, min(weight.shape), "", formats=(form,), **values)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Factors:
        """The same factors in the dtype, on the device of the layer."""
        down, up, bias = (
            None if part is None else part.to(device=device, dtype=dtype) for part in (self.down, self.up, self.bias)
        )
        assert down is not None and up is not None
        return replace(self, down=down, up=up, bias=bias, pivots=None)


def factorize(spaces: LayerSubspaces, rank: int, projection: str = "output") -> Factors:
    """Factors of rank ``rank`` for one layer.

    Args:
        spaces: the layer's weight and spaces.
        rank: at most min(in_features, out_features).
        projection: ``"output"``: W' = U U^T W with U the first ``rank`` output directions, the minimum output error at
            that rank, which equals the variance dropped. ``"loss"``: the same in the metric of the loss, the minimum of
            |M^1/2 (W - W') C^1/2| with M the damped second moment of the output gradients; ``"output"`` if none were
            streamed. ``"utilized"``: W' = P_T W P_S (Garg et al. 2024) at the largest explained variance whose
            utilized rank is ``rank``. ``"input"``: W' = W P_S with P_S on the first ``rank`` input directions.
            ``"weight"``: truncated SVD.

    Raises:
        ValueError: an unknown projection; ``"utilized"`` or ``"input"`` where only the output was streamed.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> from lowrank_ops.factors import factorize
        >>> from lowrank_ops.subspaces import layer_subspaces
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> spaces = layer_subspaces({"0": model[0]}, lro.calibrate(model, [torch.randn(64, 16)]))
        >>> factors = factorize(spaces["0"], rank=4)
        >>> factors.down.shape, factors.up.shape
        (torch.Size([4, 16]), torch.Size([8, 4]))
    """
    check_choice("projection", projection, PROJECTIONS)
    if projection == "loss" and spaces.loss is None:
        projection = "output"
    weight, left = spaces.weight, None  # left (..., rank, out_features): down is left @ W
    squares = None  # mean square of each element of x down^T about the mean, (..., rank), where known
    error = None
    if projection == "utilized":
        down, up, squares, error = _two_sided_projection(weight, _input_space(spaces, projection), spaces.output, rank)
    elif projection == "input":
        source = _input_space(spaces, projection).leading(rank)
        down, up = source.mT, weight @ source
    elif projection == "loss":
        assert spaces.loss is not None
        left, down, up = spaces.loss.projection(rank)
        if spaces.loss_activations is spaces.statistics.activations:
            squares = spaces.loss.values[..., :rank]
    elif projection == "output":
        down, up = spaces.output.projection(rank)
        left, squares = up.mT, spaces.output.spectrum[..., :rank]
        error = float(spaces.output.dropped(rank).sum())
    else:
        up = spaces.weight_output.leading(rank)
        left, down = up.mT, up.mT @ weight
    centered = spaces.centered and projection != "weight"
    reader = down if spaces.statistics.side == "input" else left  # of the streamed side, (..., rank, features), or None
    half = None if squares is not None or reader is None else half_product(spaces.moment, reader.mT)
    if half is not None and reader is not None:
        squares = 2 * (half * reader.mT).sum(-2).clamp_min(0)
    error, increase = _predictions(spaces, down, up, left, half, rank, projection, error, centered=centered)
    bias = _bias(spaces, down, up, left, projection)
    scale = balance(spaces, down, up, reader, squares)
    down, up = down * scale.unsqueeze(-1), up / scale.unsqueeze(-2)
    return Factors(down, up, bias, rank, projection, error, spaces.output_variance, increase)


def rounded(
    factors: Factors, spaces: LayerSubspaces, dtype: torch.dtype, device: torch.device | None = None
) -> Factors:
    """``factors`` of :func:`factorize` in the dtype of the layer, with the bias that makes their mean output exact.

    Args:
        factors: float64.
        spaces: of the layer.
        dtype: of the layer.
        device: of the layer; by default that of the factors.

    Raises:
        ValueError: an element overflows ``dtype``, as biases of ``"input"`` and ``"utilized"`` may where the means of
            the inputs cancel in the dense layer only.
    """
    result = _with_exact_mean(factors, factors.to(dtype, device), spaces)
    for name in ("down", "up", "bias"):
        exact, stored = getattr(factors, name), getattr(result, name)
        if stored is not None and not all_finite(stored):
            raise ValueError(
                f"its {name} of rank {factors.rank} reaches {float(exact.abs().max()):.2g}, which overflows {dtype}. "
                "Convert the model to torch.bfloat16 or torch.float32, use projection='output', or keep the layer "
                "dense with overrides={name: None}."
            )
    return result


def stored_as(
    factors: Factors, spaces: LayerSubspaces, formats: Formats, loss: float, error: float, *, pivoted: bool = False
) -> Factors:
    """``factors`` of :func:`rounded` for a layer that stores them in these formats or pivoted, with the bias for these.

    Args:
        factors: in the dtype of the layer; they are rounded to 8 bits when they are put into one.
        spaces: of the layer.
        formats: of down and up.
        loss, error: predicted increases by rounding to 8 bits, added to those of the factors.
        pivoted: the layer stores pivot rows and coefficients.
    """
    pivots = pivots_of(factors.down, factors.up) if pivoted else None
    wide = torch.promote_types(factors.down.dtype, torch.float32)
    down, up = (
        part if form is None else dequantized(*quantized(part, form), wide)
        for part, form in zip((pivots or (factors.down, factors.up))[:2], formats, strict=True)
    )
    if pivots is not None:
        up = all_coefficients(up, pivots.order)
    exact = factors.to(spaces.mean.dtype, spaces.mean.device)
    bias = _with_exact_mean(exact, replace(exact, down=down, up=up), spaces).bias
    known = factors.predicted_loss, factors.predicted_error
    added = [None if value is None else value + extra for value, extra in zip(known, (loss, error), strict=True)]
    return replace(
        factors,
        bias=None if bias is None else bias.to(factors.down),
        formats=formats,
        pivots=pivots,
        predicted_loss=added[0],
        predicted_error=added[1],
    )


def eight_bit_weight(spaces: LayerSubspaces, projection: str, formats: Formats, loss: float, error: float) -> Factors:
    """The weight of a layer that stays dense and stores it in 8 bits; its bias, if any, makes the mean output exact.

    Args:
        spaces: of the layer.
        projection: of the other layers; the bias stays as it is for ``"weight"``, which ignores the data.
        formats: of the weight.
        loss, error: predicted increases by rounding.
    """
    (form,) = formats
    assert form is not None
    weight = spaces.weight.to(spaces.dtype)
    bias = None if spaces.bias is None else spaces.bias.to(spaces.weight)
    if bias is not None and spaces.centered and projection != "weight":
        lost = spaces.weight - dequantized(*quantized(weight, form), spaces.dtype).to(spaces.weight)
        bias = bias + lost @ spaces.mean  # not in place: in float64 it is the layer's own
    predicted = {
        "predicted_error": error,
        "predicted_loss": None if spaces.loss is None else loss,
        "output_variance": spaces.output_variance,
    }
    return Factors.of_weight(weight, bias, form, **predicted).to(spaces.dtype, spaces.layer_device)


def _with_exact_mean(factors: Factors, result: Factors, spaces: LayerSubspaces) -> Factors:
    if factors.bias is None or not spaces.centered or factors.projection == "weight":
        return result
    if spaces.statistics.side != "input":  # the mean of the input is not known
        return result
    mean = spaces.mean.unsqueeze(-1)
    up, down = (part.to(mean) for part in (result.up, result.down))
    bias = factors.bias + (factors.up @ (factors.down @ mean) - up @ (down @ mean)).flatten()
    return replace(result, bias=bias.to(result.up))


def _input_space(spaces: LayerSubspaces, projection: str) -> Subspace:
    if spaces.input is None:
        raise ValueError(
            f"projection={projection!r} needs the input space, but only the output was streamed; calibrate with "
            "side='input' or use projection='output'."
        )
    return spaces.input


def _two_sided_projection(
    weight: Tensor, inputs: Subspace, outputs: Subspace, rank: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """P_T W P_S in the thinner of its two forms, group by group, the mean squares of x down^T, and the output error.

    Along the input directions, elements of U^T W x are uncorrelated: their variances add up, to the squares over those
    in S and, with the variance outside T, to the error over the others.
    """
    sizes = _utilized_sizes(inputs.spectrum, outputs.spectrum, rank)
    targets = outputs.leading(max(k_t for _, k_t in sizes))
    found, error = [], 0.0
    for w, source, variances, target, dropped, (k_s, k_t) in zip(
        _groups(weight),
        _groups(inputs.basis),
        _groups(inputs.spectrum, 1),
        _groups(targets),
        _groups(outputs.spectrum, 1),
        sizes,
        strict=True,
    ):
        target = target[:, :k_t]
        inner = target.T @ w @ source
        by_direction = inner.square() * variances
        error += float(dropped[k_t:].sum() + by_direction[:, k_s:].sum())
        inner, source = inner[:, :k_s], source[:, :k_s]
        if k_t <= k_s:
            found.append((inner @ source.T, target, by_direction[:, :k_s].sum(1)))
        else:
            found.append((source.T, target @ inner, variances[:k_s]))
    down, up, squares = (part[0] if weight.dim() == 2 else torch.stack(part) for part in zip(*found, strict=True))
    return down, up, squares, error


def _utilized_sizes(input_spectrum: Tensor, output_spectrum: Tensor, rank: int) -> list[tuple[int, int]]:
    """For each group k_S and k_T, the smaller of them ``rank``, at the largest explained variance where that holds.

    The space whose first ``rank`` directions hold more of its variance sets that threshold, and the other one needs at
    least as many directions for it. Beyond the numerical rank of both, directions without variance fill up.
    """
    sizes = []
    for sides in zip(_groups(input_spectrum, 1), _groups(output_spectrum, 1), strict=True):
        if rank == 0:
            sizes.append((0, 0))
            continue
        shares = [spectrum.cumsum(0) / spectrum.sum().clamp_min(1e-300) for spectrum in sides]
        threshold = max(float(share[rank - 1]) for share in shares)
        needed = [int((share < threshold).sum()) + 1 for share in shares]
        limits = [int((spectrum > 0).sum()) for spectrum in sides]
        k_s, k_t = (min(max(rank, need), max(rank, limit)) for need, limit in zip(needed, limits, strict=True))
        sizes.append((k_s, k_t))
    return sizes


def _bias(spaces: LayerSubspaces, down: Tensor, up: Tensor, left: Tensor | None, projection: str) -> Tensor | None:
    """b' = b + (W - W') mu, which makes the mean output exact; the SVD of the weight ignores the data."""
    bias = None if spaces.bias is None else spaces.bias.to(spaces.device, torch.float64)
    if not spaces.centered or projection == "weight":
        return bias
    if left is not None:
        kept = up @ (left @ spaces.output_mean.unsqueeze(-1))
    else:
        kept = up @ (down @ spaces.mean.unsqueeze(-1))
    shift = (spaces.output_mean - kept.squeeze(-1)).flatten()
    return shift if bias is None else bias + shift


def _predictions(
    spaces: LayerSubspaces,
    down: Tensor,
    up: Tensor,
    left: Tensor | None,
    half: Tensor | None,
    rank: int,
    projection: str,
    error: float | None,
    *,
    centered: bool,
) -> tuple[float | None, float | None]:
    """E|y - y'|^2, and E[(g^T (y - y'))^2] / 2 assuming g and y - y' independent; None if unknown.

    For optimal projections they are sums over the dropped directions, otherwise sums over W - W'.

    Args:
        error: where it is known.
    """
    increase = None
    if projection == "loss" and spaces.loss is not None:
        increase = spaces.loss.loss_increase(rank)
        if spaces.loss_activations is spaces.statistics.activations:
            error = float(spaces.loss.variances[..., rank:].sum())
    lacks_increase = increase is None and spaces.loss is not None
    lost = _lost(spaces, down, up, left, projection) if error is None or lacks_increase else None
    if lost is None:
        return error, increase
    if error is None:
        if centered == spaces.centered and half is not None:  # from the halves that other figures take as well
            whole = spaces.half_moment
            weighted = (half @ up.mT).neg_().add_(whole)
        else:
            weighted = half_product(spaces.statistics.activations.moment(centered=centered).to(lost.device), lost.mT)
        error = max(0.0, 2 * float(weighted.mul_(lost.mT).sum()))
    if lacks_increase:
        assert spaces.gradient_moment is not None
        weighted = spaces.gradient_moment @ lost
        increase = max(0.0, 0.5 * float((weighted * (lost @ spaces.loss_moment(centered=centered))).sum()))
    return error, increase


def _lost(spaces: LayerSubspaces, down: Tensor, up: Tensor, left: Tensor | None, projection: str) -> Tensor | None:
    """What maps the streamed side to y - y': W - W', or I - up left if the output was streamed; None if unknown."""
    if spaces.statistics.side == "input":
        return spaces.weight - up @ down
    if left is None or projection == "weight":
        return None
    return torch.eye(up.shape[-2], dtype=up.dtype, device=up.device) - up @ left


def _groups(tensor: Tensor, dims: int = 2) -> Tensor:
    """Add the dimension of groups if there is none."""
    return tensor if tensor.dim() > dims else tensor.unsqueeze(0)
