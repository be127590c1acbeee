"""Affine maps fitted to paired inputs: what a layer should compute once its input has changed.

A dense layer y = W x is to be reproduced from z, the input that the layer receives in the compressed model. The best
map is W + D C^+, where C is the second moment of z and D the cross moment of e = W (x - z) with z, both about the mean.
Low-rank factors of that map on the spaces of z are then a reduced-rank regression (Izenman 1975), in the metric of the
loss if requested.

The correction is ridge-regularized: with few rows, where it is mostly noise, the map shrinks to W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..calibration.statistics import LayerStatistics, Moments
from ..calibration.sums import shift_of
from ..calibration.token_weights import add_weighted
from ..factors.projections import Factors, factorize, rounded
from ..models.layers import bias_vector, weight_matrix
from ..models.running import has_float64
from ..ops import covariance_finalize_, covariance_update_
from ..subspaces.layer import LayerSubspaces
from ..subspaces.loss import DAMPING
from ..subspaces.principal import Subspace, noise_of_sums, principal_directions

# Candidates for the ridge, relative to the mean variance of the input's features; infinity leaves W as it is.
RIDGES = (*(10 ** (exponent / 2) for exponent in range(-14, 7)), float("inf"))


class PairedSums:
    """Sums over rows [z, e] of layers that share their input, in one fold or two for cross-validation.

    e = W (x - z), of all the layers side by side, or x - z itself if that is narrower. As in calibration, devices
    without float64 sum in float32 about a shift; finished sums are then on the CPU.

    Args:
        layers: ``{fqn: layer}``, Linear, Conv1D, or Conv1d or Conv2d without groups.
        folds: 1 or 2.
    """

    def __init__(self, layers: Mapping[str, nn.Module], folds: int) -> None:
        self.layers = dict(layers)
        self._weights = {fqn: weight_matrix(layer) for fqn, layer in layers.items()}
        first = next(iter(self._weights.values()))
        self.in_features = first.shape[1]
        outputs = sum(len(weight) for weight in self._weights.values())
        self._of_outputs = outputs < self.in_features
        features = self.in_features + (outputs if self._of_outputs else self.in_features)
        self._dtype = torch.float64 if has_float64(first.device) else torch.float32
        self.folds = [Moments.zeros((features,), self._dtype, first.device) for _ in range(folds)]

    @staticmethod
    def state_bytes(layers: Mapping[str, nn.Module], folds: int) -> int:
        """Bytes of the sums of such layers."""
        shapes = [weight_matrix(layer).shape for layer in layers.values()]
        features = shapes[0][1] + min(shapes[0][1], sum(shape[0] for shape in shapes))
        return 8 * folds * features**2

    def update(
        self,
        fold: int,
        x: Tensor,  # (rows, in_features), in the dense model
        z: Tensor,  # (rows, in_features), in the compressed one
        weights: Tensor | None = None,  # (rows,), with a mean of 1; None: unweighted
    ) -> None:
        """Add paired rows to a fold."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        z, change = z.to(dtype), x.to(dtype) - z.to(dtype)
        if self._of_outputs:
            with torch.autocast(x.device.type, enabled=False):  # small differences must not be rounded
                change = torch.cat([change @ weight.to(dtype).T for weight in self._weights.values()], dim=-1)
        sums, rows = self.folds[fold], torch.cat([z, change], dim=-1)
        if self._dtype == torch.float32 and not any(other.count for other in self.folds):
            for other in self.folds:
                other.shift = shift_of(rows, self._dtype)
        if weights is not None:
            add_weighted(sums, rows, weights.to(rows).unsqueeze(-1))
            return
        rows = rows if sums.shift is None else rows - sums.shift
        covariance_update_(sums.second_moment, sums.total, rows)
        sums.count += len(rows)

    def finish(self) -> None:
        """Mirror the triangles; no update may follow."""
        for sums in self.folds:
            covariance_finalize_(sums.second_moment)
        self._finished = [sums.to_float64().about(None) for sums in self.folds]
        for sums in self.folds:
            sums.to_float64_device_()

    def is_finite(self) -> bool:
        """Whether no NaN or inf was added."""
        return all(bool(sums.second_moment.diagonal().sum().isfinite()) for sums in self.folds)

    def of(self, fqn: str) -> list[_Sums]:
        """The folds of one layer."""
        weight, d = self._weights[fqn].to(self._finished[0].total.device).double(), self.in_features
        start = d
        for other, other_weight in self._weights.items():
            if other == fqn:
                break
            start += len(other_weight)
        found = []
        for sums in self._finished:
            moment, total = sums.second_moment, sums.total
            if self._of_outputs:
                own = slice(start, start + len(weight))
                zz, ez, ee, e = moment[:d, :d], moment[own, :d], moment[own, own], total[own]
            else:
                ez, ee = weight @ moment[d:, :d], weight @ moment[d:, d:] @ weight.T
                zz, e = moment[:d, :d], weight @ total[d:]
            found.append(_Sums(zz, ez, ee, total[:d], e, sums.count))
        return found


class _Sums(NamedTuple):
    """Sums over the rows of one layer, float64."""

    zz: Tensor  # (in_features, in_features)
    ez: Tensor  # (out_features, in_features)
    ee: Tensor  # (out_features, out_features)
    z: Tensor  # (in_features,)
    e: Tensor  # (out_features,)
    rows: int

    def moments(self, z_mean: Tensor, e_mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E[z z^T], E[e z^T] and E[e e^T] about given means."""

        def about(products: Tensor, left: Tensor, right: Tensor, left_mean: Tensor, right_mean: Tensor) -> Tensor:
            crossed = torch.outer(left, right_mean) + torch.outer(left_mean, right)
            return products / self.rows - crossed / self.rows + torch.outer(left_mean, right_mean)

        return (
            about(self.zz, self.z, self.z, z_mean, z_mean),
            about(self.ez, self.e, self.z, e_mean, z_mean),
            about(self.ee, self.e, self.e, e_mean, e_mean),
        )


def reconstruct_layers(
    pairs: PairedSums,
    factors: Mapping[str, Factors],
    output_gradients: Mapping[str, Moments],
    *,
    centered: bool,
    ridge: float | None,
) -> dict[str, Factors]:
    """New factors of the same ranks and projections for layers that share their input.

    Args:
        pairs: finished sums.
        factors: of the layers; they give rank and projection.
        output_gradients: of the layers with ``projection="loss"``.
        centered: fold the means into the bias.
        ridge: relative to the mean variance of the input's features; None chooses it for each layer by
            cross-validation between the folds, in the layer's own metric.
    """
    d = pairs.in_features
    whole = Moments(
        sum(fold.second_moment[:d, :d] for fold in pairs.folds),  # type: ignore[arg-type]
        sum(fold.total[:d] for fold in pairs.folds),  # type: ignore[arg-type]
        sum(fold.count for fold in pairs.folds),
        None if (shift := pairs.folds[0].shift) is None else shift[:d],
    )
    mean = whole.mean if centered else None
    inputs = _space(whole.moment(centered=centered), mean, whole.rounding)
    bases: list[Subspace] = []
    found = {}
    for fqn, layer in pairs.layers.items():
        folds = pairs.of(fqn)
        total = _Sums(*(sum(parts) for parts in zip(*folds, strict=True)))  # type: ignore[arg-type]
        means = [part / total.rows if centered else torch.zeros_like(part) for part in (total.z, total.e)]
        gradients = output_gradients.get(fqn) if factors[fqn].projection == "loss" else None
        chosen = ridge
        if chosen is None:
            held = [fold.moments(*means) for fold in folds]
            if not bases:  # the inputs are the same for all layers
                bases = [_space(part[0], mean, whole.rounding) for part in held]
            shares = [fold.rows / total.rows for fold in folds]
            chosen = _best_ridge(
                held, shares, bases, None if gradients is None else _metric(gradients, total.zz.device)
            )
        statistics = LayerStatistics("input", whole, output_gradients.get(fqn))
        try:
            found[fqn] = _fit(
                layer, statistics, inputs, total.moments(*means), means[1], factors[fqn], chosen, centered=centered
            )
        except ValueError as error:
            raise ValueError(f"layer {fqn!r}: {error}") from None
    return found


def _space(moment: Tensor, mean: Tensor | None, rounding: float) -> Subspace:
    mean_square = moment.diagonal() if mean is None else moment.diagonal() + mean.square()
    noise = noise_of_sums(mean_square, rounding)
    return Subspace(lambda: principal_directions(moment, noise))


def _gains(spectrum: Tensor, ridge: Tensor | float) -> Tensor:
    """The ridge-regularized inverse on the space that the rows span, and zero beyond it."""
    return torch.where(spectrum > 0, 1 / (spectrum + ridge), 0.0)


def _best_ridge(
    held: list[tuple[Tensor, Tensor, Tensor]], shares: list[float], bases: list[Subspace], metric: Tensor | None
) -> float:
    """The ridge whose maps, each fitted to one fold, have the minimum error on the other fold.

    In the basis of a fold's inputs each ridge is a diagonal, so trying many is cheap. The ridge is relative to sums
    over all rows; a fold uses it in proportion to its share of them.
    """
    scale = sum(share * float(basis.spectrum.mean()) for share, basis in zip(shares, bases, strict=True))
    errors = torch.zeros(len(RIDGES), dtype=torch.float64)
    for fitted, judged in ((0, 1), (1, 0)):
        basis, spectrum = bases[fitted].basis, bases[fitted].spectrum
        correction = held[fitted][1] @ basis  # (out_features, in_features)
        weighted = correction if metric is None else metric @ correction
        zz, ez, _ = held[judged]
        quadratic = (basis.mT @ zz @ basis) * (weighted.mT @ correction)
        linear = ((ez @ basis) * weighted).sum(0)
        for index, ridge in enumerate(RIDGES):
            gains = _gains(spectrum, ridge * scale / shares[fitted])
            errors[index] += shares[judged] * float(gains @ quadratic @ gains - 2 * gains @ linear)
    return RIDGES[int(errors.argmin())]


def _metric(gradients: Moments, device: torch.device) -> Tensor | None:
    """The damped metric of the loss up to its scale, or None for the identity."""
    moment = gradients.moment(centered=False).to(device)
    if not moment.diagonal().sum() > 0:
        return None
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return moment / moment.diagonal().mean() + DAMPING * eye


def _fit(
    layer: nn.Module,
    statistics: LayerStatistics,
    inputs: Subspace,
    moments: tuple[Tensor, Tensor, Tensor],
    e_mean: Tensor,
    old: Factors,
    ridge: float,
    *,
    centered: bool,
) -> Factors:
    """Factors of the ridge-regularized map, with their error against the dense model's output."""
    own, bias = weight_matrix(layer), bias_vector(layer)
    weight, bias = (None if part is None else part.to(e_mean.device).double() for part in (own, bias))
    assert weight is not None
    basis, spectrum = inputs.basis, inputs.spectrum
    zz, ez, ee = moments
    gains = _gains(spectrum, ridge * float(spectrum.mean()))
    fitted = weight + (ez @ basis * gains) @ basis.mT
    if centered:  # the mean of y, from that of z
        shift = e_mean + (weight - fitted) @ statistics.activations.mean
        bias = shift if bias is None else bias + shift
    spaces = LayerSubspaces(fitted, bias, statistics, centered=centered, input_space=inputs)
    factors = factorize(spaces, old.rank, old.projection)
    lost = weight - factors.up @ factors.down  # y - y' = lost z + e
    crossed = lost @ ez.mT
    error = float((lost @ zz @ lost.mT + crossed + crossed.mT + ee).trace())
    crossed = weight @ ez.mT
    variance = float((weight @ zz @ weight.mT + crossed + crossed.mT + ee).trace())
    return replace(
        rounded(factors, spaces, own.dtype, own.device),
        predicted_error=max(0.0, error),
        output_variance=variance,
        predicted_loss=None,
        reconstructed=True,
    )
