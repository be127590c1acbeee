"""Weight x subspace -> thin factors: W' = up down, with the mean folded into the bias. Everything in float64.

No Cholesky and no inverse of a covariance: a rank-deficient one is the normal case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import PROJECTIONS, check_choice
from ..subspaces.layer import LayerSubspaces, Subspace


@dataclass(frozen=True)
class Factors:
    """The replacement of one layer.

    Attributes:
        down: (..., rank, in_features), float64.
        up: (..., out_features, rank), float64.
        bias: (groups * out_features,), float64, or None.
        rank: the true rank, before padding.
        projection: how the factors were made; ``"output"`` where ``"loss"`` was asked for without a sensitivity.
        predicted_error: E|y - y'|^2 over the calibration rows, summed over the outputs; None where it cannot
            be known (only the output was streamed, and the projection is ``"weight"``).
        output_variance: the variance of y about its mean (or about zero where not centred), to compare with.
        predicted_loss: the increase of the loss of one sample, to second order, that the error brings; None where no
            sensitivity was streamed or the error cannot be known, and after a refit.
        excess_error: a bound on how much of ``predicted_error`` the best factors of that rank would avoid, for
            ``"output"``: 0 but for wide layers, whose directions are found by iteration; None for other projections
            and after a refit.
        refitted: made by :func:`lowrank_ops.refit_factors`; ``predicted_error`` is then that of the compressed model's
            output against the dense model's, with what the layers before it contribute, and over rows as the refit
            weighed them, as is ``output_variance``.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    rank: int
    projection: str
    predicted_error: float | None
    output_variance: float
    predicted_loss: float | None = None
    excess_error: float | None = None
    refitted: bool = False

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in another dtype, as the layer will hold them."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, down=self.down.to(dtype), up=self.up.to(dtype), bias=bias)


def factorize(spaces: LayerSubspaces, rank: int, projection: str = "output") -> Factors:
    """Factors of rank ``rank`` for one layer.

    Args:
        spaces: the layer's weight and spaces.
        rank: at most min(in_features, out_features).
        projection: ``"output"``: W' = U U^T W with U the first ``rank`` output directions, the least output
            error at that rank, which equals the variance dropped. ``"loss"``: the same in the metric of the loss,
            min |G^1/2 (W - W') C^1/2| with G the second moment of the loss's gradient; ``"output"`` where no
            sensitivity was streamed. ``"utilized"``: W' = P_T W P_S (Garg et al.
            2024) at the largest explained variance whose utilized rank is ``rank``. ``"input"``: W' = W P_S with P_S on
            the first ``rank`` input directions. ``"weight"``: truncated SVD.

    Raises:
        ValueError: an unknown projection; ``"utilized"`` and ``"input"`` need the input space, and only the output was
            streamed.
    """
    check_choice("projection", projection, PROJECTIONS)
    if projection == "loss" and spaces.loss is None:
        projection = "output"
    left = None  # (..., rank, out_features), where down is left @ W
    if projection == "utilized":
        down, up = _utilized(spaces, rank)
    elif projection == "input":
        source = _input_space(spaces, projection).leading(rank).basis
        down, up = source.mT, spaces.weight @ source
    else:
        left, up = _output_projection(spaces, rank, projection)
        down = left @ spaces.weight
    best = spaces.output.leading(rank) if projection == "output" else None
    lost = _lost_moment(spaces, down, up, left, projection) if best is None else None
    felt = lost
    if spaces.weighs_rows or lost is None:
        felt = None if spaces.sensitivity is None else _lost_moment(spaces, down, up, left, projection, felt=True)
    return Factors(
        down,
        up,
        _bias(spaces, down, up, left, projection),
        rank,
        projection,
        _trace(lost) if best is None else float(best.dropped.sum()),
        float(spaces.output.total.sum()),
        _predicted_loss(spaces, felt),
        None if best is None else float(best.excess.sum()),
    )


def _output_projection(spaces: LayerSubspaces, rank: int, projection: str) -> tuple[Tensor, Tensor]:
    """The two sides of a projection of the output, W' = up left W."""
    if projection == "loss":
        assert spaces.loss is not None
        directions = spaces.loss.subspace.leading(rank).basis
        return directions.mT @ spaces.loss.root, spaces.loss.inverse_root @ directions
    space = spaces.output if projection == "output" else spaces.weight_output
    up = space.leading(rank).basis
    return up.mT, up


def _input_space(spaces: LayerSubspaces, projection: str) -> Subspace:
    if spaces.input is None:
        raise ValueError(
            f"projection={projection!r} needs the input space, but only the output was streamed; calibrate with "
            "side='input' or use projection='output'."
        )
    return spaces.input


def _utilized(spaces: LayerSubspaces, rank: int) -> tuple[Tensor, Tensor]:
    inputs = _input_space(spaces, "utilized")
    sizes = [_dimensions_at(spaces, group, rank) for group in range(spaces.dimensions.groups)]
    input_basis = inputs.leading(max(k_s for k_s, _ in sizes)).basis
    output_basis = spaces.output.leading(max(k_t for _, k_t in sizes)).basis
    groups = zip(_batch(spaces.weight), _batch(input_basis), _batch(output_basis), sizes, strict=True)
    downs, ups = [], []
    for weight, input_basis, output_basis, (k_s, k_t) in groups:
        source, target = input_basis[:, :k_s], output_basis[:, :k_t]
        if k_t <= k_s:
            down, up = target.T @ weight @ source @ source.T, target
        else:
            down, up = source.T, target @ target.T @ weight @ source
        downs.append(down)
        ups.append(up)
    if spaces.dimensions.groups == 1:
        return downs[0], ups[0]
    return torch.stack(downs), torch.stack(ups)


def _dimensions_at(spaces: LayerSubspaces, group: int, rank: int) -> tuple[int, int]:
    """k_S and k_T, the lesser of them ``rank``, at the largest explained variance at which that is so.

    The space whose first ``rank`` directions hold more of its variance sets that threshold, and the other one needs at
    least as many directions for it. Past the numerical rank of both, directions without variance fill up.
    """
    assert spaces.input is not None
    if rank == 0:
        return 0, 0
    sides = [_batch(space.spectrum, 1)[group] for space in (spaces.input, spaces.output)]
    shares = [spectrum.cumsum(0) / spectrum.sum().clamp_min(1e-300) for spectrum in sides]
    threshold = max(float(share[rank - 1]) for share in shares)
    needed = [int((share < threshold).sum()) + 1 for share in shares]
    limits = [int((spectrum > 0).sum()) for spectrum in sides]
    k_s, k_t = (min(max(rank, need), max(rank, limit)) for need, limit in zip(needed, limits, strict=True))
    return k_s, k_t


def _bias(spaces: LayerSubspaces, down: Tensor, up: Tensor, left: Tensor | None, projection: str) -> Tensor | None:
    """b' = b + (W - W') mu, which makes the mean output exact; the SVD of the weight stays blind to the data."""
    bias = None if spaces.bias is None else spaces.bias.double()
    if not spaces.centered or projection == "weight":
        return bias
    if left is not None:
        kept = up @ (left @ spaces.output_mean.unsqueeze(-1))
    else:
        kept = up @ (down @ spaces.mean.unsqueeze(-1))
    shift = (spaces.output_mean - kept.squeeze(-1)).flatten()
    return shift if bias is None else bias + shift


def _lost_moment(
    spaces: LayerSubspaces, down: Tensor, up: Tensor, left: Tensor | None, projection: str, felt: bool = False
) -> Tensor | None:
    """E[(y - y')(y - y')^T], (..., out_features, out_features); None where the streamed side does not tell it.

    With ``felt`` over rows weighed with what the loss feels of them.
    """
    if left is not None and projection != "weight":  # the error is a projection of the output itself
        lost = torch.eye(up.shape[-2], dtype=up.dtype, device=up.device) - up @ left
        return lost @ (spaces.felt_output_moment if felt else spaces.output_moment) @ lost.mT
    if spaces.covariance.side != "input":
        return None
    lost = spaces.weight - up @ down
    centered = spaces.centered and projection != "weight"
    if felt:
        moment = spaces.felt_moment(centered=centered)
    else:
        moment = spaces.moment if centered == spaces.centered else spaces.covariance.moment(centered=centered)
    moment = moment.to(lost.device)
    return lost @ moment @ lost.mT


def _trace(lost: Tensor | None) -> float | None:
    return None if lost is None else max(0.0, float(lost.diagonal(dim1=-2, dim2=-1).sum()))


def _predicted_loss(spaces: LayerSubspaces, lost: Tensor | None) -> float | None:
    if spaces.gradient_moment is None or lost is None:
        return None
    return max(0.0, 0.5 * float((spaces.gradient_moment * lost).sum()))


def _batch(tensor: Tensor, dims: int = 2) -> Tensor:
    """Add the dimension of groups where there is only one."""
    return tensor if tensor.dim() > dims else tensor.unsqueeze(0)
