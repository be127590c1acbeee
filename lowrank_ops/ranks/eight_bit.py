"""What rounding a layer's factors, or its weight, to 8 bits costs, predicted from its statistics; sizes in bytes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..policies import EIGHT_BIT
from ..subspaces.balance import balance
from ..subspaces.channels import ChannelSubspaces
from ..subspaces.layer import LayerSubspaces
from ..subspaces.loss import DAMPING
from ..subspaces.pivots import pivoted_rows
from .costs import (
    PLAIN,
    RANK_ALIGNMENT,
    Bounds,
    Formats,
    Option,
    dense_parameters,
    factor_parameters,
    is_pivoted,
    lowrank_parameters,
    stored_rank,
    worth_of_ranks,
)

SCALE_BYTES = 4  # per row
ORDER_BYTES = 4  # per output of a pivoted layer
PIVOTED_RANKS = 4  # at which the rounding of pivoted factors is predicted; between them it is interpolated

# Mean square error in float8_e4m3fn, with 3 bits of mantissa, relative to the mean square of the values, which are
# taken as uniform in their logarithm: the spacing of those in [1, 2) is 1/8, and their mean square 1.5 / ln 2.
_FP8_ERROR = (1 / 8) ** 2 / 12 / (1.5 / math.log(2))


def dense_bytes(spaces: LayerSubspaces) -> int:
    """Bytes of the dense layer."""
    return dense_parameters(spaces) * spaces.dtype.itemsize


def weight_bytes(spaces: LayerSubspaces) -> int:
    """Bytes of a dense layer's weight in 8 bits, with its scales."""
    _, in_features, out_features = spaces.dimensions
    return out_features * (in_features + SCALE_BYTES)


def eight_bit_bytes(spaces: LayerSubspaces) -> int:
    """Bytes of the dense layer with an 8-bit weight."""
    return weight_bytes(spaces) + (0 if spaces.bias is None else spaces.bias.nbytes)


def lowrank_bytes(spaces: LayerSubspaces, rank: int, formats: Formats = PLAIN, *, pivoted: bool = False) -> int:
    """Bytes of the low-rank layer, or of an MLP with ``rank`` channels; centering adds a bias to one without."""
    if isinstance(spaces, ChannelSubspaces):
        return lowrank_parameters(spaces, rank) * spaces.dtype.itemsize
    biases = lowrank_parameters(spaces, rank) - factor_parameters(spaces, rank)
    return factor_bytes(spaces, rank, formats, pivoted=pivoted) + biases * spaces.dtype.itemsize


def factor_bytes(spaces: LayerSubspaces, rank: int, formats: Formats = PLAIN, *, pivoted: bool = False) -> int:
    """Bytes of the two factors, with the scales of 8-bit ones, and the order of the outputs of pivoted ones."""
    groups, in_features, out_features = spaces.dimensions
    if is_pivoted(spaces, rank, pivoted):
        sizes = (rank, in_features), (out_features - rank, rank)
        widths = (
            rows * (spaces.dtype.itemsize * columns if form is None else columns + SCALE_BYTES)
            for (rows, columns), form in zip(sizes, formats, strict=True)
        )
        return sum(widths) + ORDER_BYTES * out_features
    stored, width = groups * stored_rank(rank), spaces.dtype.itemsize
    down = stored * in_features * (width if formats[0] is None else 1) + (SCALE_BYTES * stored if formats[0] else 0)
    up = stored * out_features * (width if formats[1] is None else 1) + (
        SCALE_BYTES * out_features if formats[1] else 0
    )
    return down + up


class Rounding(NamedTuple):
    """What rounding adds by rank: entry r is that of factors with the first r directions, (directions + 1,)."""

    dense_loss: float  # of the layer that stays dense, by rounding its weight
    dense_error: float
    down_loss: Tensor  # of one sample, to second order; zero where no output gradients were streamed
    up_loss: Tensor
    down_error: Tensor  # E|y - y'|^2
    up_error: Tensor

    def loss(self, rank: int | None, formats: Formats) -> float:
        """The increase of the loss by rounding the factors that have a format, or the weight without a rank."""
        return self.dense_loss if rank is None else _sum(self.down_loss, self.up_loss, rank, formats)

    def error(self, rank: int | None, formats: Formats) -> float:
        """The error of the outputs by rounding the factors that have a format, or the weight without a rank."""
        return self.dense_error if rank is None else _sum(self.down_error, self.up_error, rank, formats)


def _sum(down: Tensor, up: Tensor, rank: int, formats: Formats) -> float:
    return sum(float(part[rank]) for part, form in zip((down, up), formats, strict=True) if form is not None)


def can_be_eight_bit(space: LayerSubspaces) -> bool:
    """Whether factors and weight can be 8-bit and the error of that is known: of a linear layer, its input streamed."""
    return space.is_linear and space.statistics.side == "input"


def rounding_of(space: LayerSubspaces, form: str, *, by_loss: bool, pivoted: bool = False) -> Rounding:
    """Predict rounding for the factors of all ranks, by loss or of the output principal components, and the weight.

    Roundings of elements are independent of each other and of the input, so their mean squares add up: an error e in
    row j of ``down`` causes the output error u_j e^T x, one in ``up`` the error e t_j, one in row i of the weight
    e^T x in output i. The factors are scaled as :func:`lowrank_ops.factors.factorize` does it.

    Args:
        space: of a linear layer whose input was streamed.
        form: ``"int8"`` or ``"fp8"``.
        by_loss: the directions of the loss; needs output gradients.
        pivoted: the layer is pivoted where that is smaller: an error e in a pivot row is one in the rows that are
            combinations of it as well, by their coefficients.
    """
    directions = min(space.dimensions[1:])
    if by_loss:
        assert space.loss is not None
        _, down, up = space.loss.projection(directions)
    else:
        up = space.output.leading(directions)
        down = up.mT @ space.weight
    moment = space.loss_moment(centered=space.centered)  # centered layers have a bias that makes their mean exact
    hidden = ((down @ moment) * down).sum(-1).clamp_min(0)  # E[t_j^2]
    inputs = moment.diagonal()
    plain = space.loss_activations is space.statistics.activations
    factors = balance(space, down, up, down, hidden if plain else ((down @ space.moment) * down).sum(-1).clamp_min(0))
    up, down, hidden = up / factors, down * factors.unsqueeze(1), hidden * factors.square()
    squares = up.square().sum(0)
    of_outputs, of_directions = torch.zeros(len(up), dtype=up.dtype, device=up.device), torch.zeros_like(squares)
    if (gradients := space.gradient_moment) is not None:
        of_outputs = gradients.diagonal()
        if by_loss:
            assert space.loss is not None
            of_directions = space.loss.scale * (factors.square().reciprocal() - DAMPING * squares).clamp_min(0)
        else:
            of_directions = (up * (gradients @ up)).sum(0)  # the diagonal of up^T G up
    rows = _errors_of_rows(down, inputs, form)
    of_dense = inputs if space.bias is not None else space.loss_moment(centered=False).diagonal()
    outputs = _errors_of_rows(space.weight, of_dense, form)
    if form == "fp8":
        elements = _FP8_ERROR * up.square() * hidden
        up_loss, up_error = (of_outputs @ elements).cumsum(0), elements.sum(0).cumsum(0)
    else:
        steps = (up.abs().cummax(1).values / EIGHT_BIT[form]).square() / 12  # (out_features, rank)
        total = hidden.cumsum(0)
        up_loss, up_error = (of_outputs @ steps) * total, steps.sum(0) * total
    down_loss, down_error = (rows * of_directions).cumsum(0), (rows * squares).cumsum(0)
    parts = (down_loss / 2, up_loss / 2, down_error, up_error)
    by_rank = [torch.cat([part.new_zeros(1), part]).cpu() for part in parts]
    smallest = next((rank for rank in range(directions + 1) if is_pivoted(space, rank, pivoted)), None)
    if smallest is not None:
        ranks = torch.linspace(smallest, directions, PIVOTED_RANKS).long().unique().tolist()
        found = [_pivoted_rounding(down, up, hidden, inputs, gradients, form, rank) for rank in ranks]
        for part, values in zip(by_rank, zip(*found, strict=True), strict=True):
            between = np.interp(range(smallest, directions + 1), ranks, values)
            part[smallest:] = torch.from_numpy(between)
    return Rounding(float(of_outputs @ outputs) / 2, float(outputs.sum()), *by_rank)


def _pivoted_rounding(
    down: Tensor, up: Tensor, hidden: Tensor, inputs: Tensor, gradients: Tensor | None, form: str, rank: int
) -> tuple[float, float, float, float]:
    """The fields of a :class:`Rounding` at one rank.

    Args:
        down, up: the factors of all ranks, float64.
        hidden: E[t_j^2] of t = down x, whose elements are taken as uncorrelated.
        inputs: E[x_j^2].
        gradients: second moment of the output gradients, or None.
        form, rank: of the layer.
    """
    pivots, others, coefficients = pivoted_rows(up[:, :rank])
    of_rows = _errors_of_rows(up[pivots, :rank] @ down[:rank], inputs, form)
    squares = up[pivots, :rank].square() @ hidden[:rank]  # E[y_j^2] of the pivots
    of_others = _errors_of_rows(coefficients, squares, form) if len(others) else squares.new_zeros(0)
    down_loss = up_loss = 0.0
    if gradients is not None:
        spread = torch.cat([torch.eye(rank).to(coefficients), coefficients])  # of a pivot's error, (out_features, rank)
        order = torch.cat([pivots, others])
        of_pivots = (spread * (gradients[order][:, order] @ spread)).sum(0)
        down_loss = 0.5 * float(of_pivots @ of_rows)
        up_loss = 0.5 * float(gradients.diagonal()[others] @ of_others)
    down_error = float((1 + coefficients.square().sum(0)) @ of_rows)
    return down_loss, up_loss, down_error, float(of_others.sum())


def _errors_of_rows(matrix: Tensor, inputs: Tensor, form: str) -> Tensor:
    """E[(e^T x)^2] for the rounding e of each row of ``matrix``, given E[x_j^2]."""
    if form == "fp8":
        return _FP8_ERROR * (matrix.square() @ inputs)
    return (matrix.abs().amax(1) / EIGHT_BIT[form]).square() / 12 * inputs.sum()


def byte_options(
    space: LayerSubspaces,
    form: str,
    bounds: Bounds,
    rounding: Rounding | None,
    allocation: str,
    *,
    pivoted: bool = False,
) -> list[tuple[Option, float]]:
    """Sizes and what each is worth, in ascending order of bytes; those worth no more than a smaller one are left out.

    Without ``rounding``, factors and dense weights keep the dtype of the layer. The worth is what ``allocation``
    maximizes: the loss that is saved, doubled, or the share of the output variance that is kept, less what rounding
    costs of it. In a uniform allocation, rounding costs less than one direction.
    """
    dense = Option(None, dense_bytes(space))
    formats: list[Formats] = [PLAIN] if rounding is None else [PLAIN, (form, None), (None, form), (form, form)]
    if allocation == "uniform":
        formats = formats[-1:]
    kept = worth_of_ranks(space, allocation)
    largest = space.max_rank if bounds.max is None else min(space.max_rank, bounds.max)
    found = [(dense, kept[-1])] if bounds.max is None else []

    def add(option: Option, worth: float) -> None:
        if option.cost >= dense.cost:
            return
        if rounding is not None and allocation == "loss":
            worth -= 2 * rounding.loss(option.rank, option.formats)
        elif rounding is not None and allocation == "variance":
            worth -= rounding.error(option.rank, option.formats) / max(space.output_variance, 1e-300)
        elif rounding is not None:
            worth -= 0.5
        found.append((option, worth))

    if bounds.max is None and rounding is not None:
        add(Option(None, eight_bit_bytes(space), (form,)), kept[-1])
    for rank in range(RANK_ALIGNMENT, largest + 1, RANK_ALIGNMENT):
        for chosen in formats if rank >= bounds.min else ():
            add(Option(rank, lowrank_bytes(space, rank, chosen, pivoted=pivoted), chosen), kept[rank])
    found.sort(key=lambda pair: (pair[0].cost, -pair[1]))
    rising: list[tuple[Option, float]] = []
    for option, worth in found:
        if not rising or worth > rising[-1][1]:
            rising.append((option, worth))
    return rising
