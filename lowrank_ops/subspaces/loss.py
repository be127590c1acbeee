"""The space of a layer's output in the metric of the loss."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration.statistics import Moments
from .principal import (
    Subspace,
    bytes_of,
    congruence,
    denoised,
    descending_eigh,
    noise_along,
    orthonormal,
    orthonormal_pair,
    root_congruence,
    root_times,
)

if TYPE_CHECKING:
    from .layer import LayerSubspaces

DAMPING = 1e-3  # of the metric, relative to its mean eigenvalue


class LossSpace:
    """The output space in the metric of the loss, M = G / scale + 1e-3 I with G the output gradients' second moment.

    The damping keeps M regular where few gradients were seen; without any gradient M is a multiple of the identity and
    the spectrum is zero. The directions p_i of the outputs satisfy p_i^T M p_j = 0 for i != j, and W' = P P^T M W with
    the first r of them, scaled to p_i^T M p_i = 1, has the minimum error in that metric at rank r.

    Args:
        spaces: of the layer.
        gradients: moments of the output gradients.

    Attributes:
        subspace: its spectrum is in units of the loss: half of it beyond a rank is the increase of the loss of one
            sample, to second order and including the damping, if those directions are dropped.
        corrected: the same as :func:`lowrank_ops.correct_predictions` measured it, without damping, or None.
    """

    def __init__(self, spaces: LayerSubspaces, gradients: Moments) -> None:
        self._spaces, self._gradients, self._device = spaces, gradients, spaces.mean.device
        self._held: tuple[Tensor, ...] = ()  # directions P; of a tall layer, W^T M W, and P before they are orthonormal
        self._lost: tuple[Tensor, Tensor] | None = None  # with each direction: plain output variance, and that in M
        self.corrected: Tensor | None = None
        self.subspace = Subspace(self._decompose_tall if spaces.is_tall else self._decompose)

    @property
    def scale(self) -> Tensor:
        """The mean eigenvalue of G, (...,)."""
        return self._gradients.mean_square.mean(-1).clamp_min(0).to(self._device)

    @property
    def metric(self) -> Tensor:
        """M, (..., out_features, out_features), float64, positive definite."""
        rounding = self._gradients.rounding * self._gradients.total.shape[-1]  # of the eigenvalues of G / scale
        if rounding < 0.5 * DAMPING:
            return self._damped()
        return self.root @ self.root.mT

    @cached_property
    def root(self) -> Tensor:
        """L with L L^T = M, lower triangular."""
        return _cholesky_of_damped(self._damped())

    def _damped(self) -> Tensor:
        gradients, scale = self._gradients, self.scale[..., None, None]
        divisor = torch.where(scale > 0, scale.clamp_min(1e-300) * max(gradients.count, 1), torch.inf)
        metric = gradients.divided(divisor.to(gradients.total.device)).to(self._device)
        metric.diagonal(dim1=-2, dim2=-1).add_(DAMPING)
        return metric

    def _decompose(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors of L^T W C W^T L."""
        matrix, noise = self._spaces.output_moment(self._spaces.loss_activations)
        root = self.root
        values, vectors = descending_eigh(root_congruence(matrix, root))
        limit = (noise * root.square().sum(-1)).sum(-1)
        values = denoised(values, limit, lambda start: noise_along(noise, root @ vectors[..., start:]))
        outputs = torch.linalg.solve_triangular(root.mT, vectors, upper=True)
        self._held, self._lost = (outputs,), (values * outputs.square().sum(-2), values)
        return vectors, values * self.scale.unsqueeze(-1)

    def _decompose_tall(self) -> tuple[Tensor, Tensor]:
        """R times the eigenvectors of R^T W^T M W R, R R^T = C, with (in_features, in_features) matrices but for M."""
        activations, weight, metric = self._spaces.loss_activations, self._spaces.weight, self.metric
        root = self._spaces.input_root(activations)
        inner = congruence(metric, weight)
        values, vectors = descending_eigh(root_congruence(inner, root))
        inputs = root_times(root, vectors)
        columns = weight @ inputs
        squares = columns.square()
        noise = self._spaces.noise(squares.sum(-1), activations)

        def along(start: int) -> Tensor:
            return noise_along(noise, metric @ columns[..., start:]) / values[..., start:].clamp_min(1e-300)

        values = denoised(values, (noise * metric.diagonal(dim1=-2, dim2=-1)).sum(-1), along)
        self._held, self._lost = (inner, columns), (torch.where(values > 0, squares.sum(-2), 0.0), values)
        return inputs, values * self.scale.unsqueeze(-1)

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        if self._lost is None:
            _ = self.subspace.spectrum
        assert self._lost is not None
        return self._lost

    @property
    def variances(self) -> Tensor:
        """The plain output variance that is lost with each direction, (..., directions)."""
        return self._decomposed()[0]

    @property
    def values(self) -> Tensor:
        """The variance along each direction in the metric M, (..., directions)."""
        return self._decomposed()[1]

    @property
    def spectrum(self) -> Tensor:
        """The corrected spectrum if there is one."""
        return self.subspace.spectrum if self.corrected is None else self.corrected

    def loss_increase(self, rank: int) -> float:
        """Half of the spectrum beyond a rank, without the damping: the predicted increase of the loss of one sample."""
        if self.corrected is not None:
            return 0.5 * float(self.corrected[..., rank:].sum())
        damping = DAMPING * self.scale.unsqueeze(-1) * self.variances
        return max(0.0, 0.5 * float((self.subspace.spectrum - damping)[..., rank:].sum()))

    def projection(self, rank: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """P^T M, P^T M W and P for the first ``rank`` directions P, scaled to P^T M P = I.

        P^T M is None where it was not needed.
        """
        basis = self.subspace.leading(rank)
        *inner, columns = self._held
        columns = columns[..., :rank]
        if not inner:
            return self._lifted(basis, columns)
        pair = orthonormal_pair(basis.mT, basis.mT @ inner[0], columns.mT)
        if pair is None:  # directions without variance
            basis = orthonormal(self.root.mT @ columns)
            return self._lifted(basis, torch.linalg.solve_triangular(self.root.mT, basis, upper=True))
        return None, *pair

    def _lifted(self, basis: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left = root_times(self.root, basis).mT
        return left, left @ self._spaces.weight, outputs

    def held_bytes(self) -> int:
        """Bytes of the decompositions that are held."""
        return self.subspace.held_bytes() + sum(map(bytes_of, (self.__dict__.get("root"), *self._held)))

    def release(self) -> None:
        """Drop the matrices, which are recomputed if needed; the spectrum stays."""
        self.__dict__.pop("root", None)
        self._held = ()
        self.subspace.release()


def _cholesky_of_damped(metric: Tensor) -> Tensor:
    """The Cholesky factor of a positive semi-definite matrix, up to rounding, plus DAMPING I."""
    root, info = torch.linalg.cholesky_ex(metric)
    pivots = root.diagonal(dim1=-2, dim2=-1).square()  # none is below the smallest eigenvalue
    if bool(info.any()) or not bool((pivots > 0.5 * DAMPING).all()):  # rounding of the sums is near the damping
        values, vectors = torch.linalg.eigh(metric)
        root = torch.linalg.cholesky((vectors * values.clamp_min(DAMPING).unsqueeze(-2)) @ vectors.mT)
    return root
