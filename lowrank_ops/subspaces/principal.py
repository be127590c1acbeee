"""Eigenvalues and leading eigenvectors of second moments, whole where that is cheap and in part where it is not.

Below ``WIDE`` features one ``eigh`` gives everything. A wide space computes what it is asked for: its eigenvalues
alone, or its leading directions by subspace iteration from a random start (Halko, Martinsson, Tropp 2011, arXiv
0909.4061, algorithm 4.4), and forgets matrices on request. Everything in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WIDE = 2048  # features from which whole decompositions are avoided; below, an eigh takes seconds
OVERSAMPLING = 4  # directions iterated beyond the rank: rank / 4, and 8 more
ITERATIONS = 4
_LARGEST_SKETCH = 1 / 3  # of the features; beyond it the iteration costs as much as eigh


@dataclass(frozen=True)
class Leading:
    """The first directions of a space.

    Attributes:
        basis: (..., features, rank), float64, orthonormal columns.
        dropped: (...,), the variance outside them, which is exactly what a projection on them loses.
        excess: (...,), a bound on how much of ``dropped`` the best directions of that number would keep; 0 where
            these are the best.
    """

    basis: Tensor
    dropped: Tensor
    excess: Tensor


class Subspace:
    """The principal directions of a space, by falling variance.

    Attributes:
        basis: (..., features, features), float64, directions in columns.
        spectrum: (..., features), float64, the variance along each; what is numerically zero is exactly zero.
    """

    def __init__(self, basis: Tensor, spectrum: Tensor) -> None:
        self._basis, self._spectrum = basis, spectrum

    @property
    def basis(self) -> Tensor:
        return self._basis

    @property
    def spectrum(self) -> Tensor:
        return self._spectrum

    @property
    def spectrum_is_known(self) -> bool:
        """Whether reading the spectrum takes no decomposition."""
        return True

    @property
    def total(self) -> Tensor:
        """The variance of the whole space, (...,)."""
        return self.spectrum.sum(-1)

    def rank_at(self, explained_variance: float) -> int:
        """The least number of directions that hold this share of the variance; with groups, of the neediest one.

        1 gives the numerical rank; a space without variance has rank 0.
        """
        return int(self.ranks_at(explained_variance).max())

    def ranks_at(self, explained_variance: float) -> Tensor:
        """:meth:`rank_at` for each group, (...,)."""
        nonzero = (self.spectrum > 0).sum(-1)
        if explained_variance >= 1:
            return nonzero
        enough = explained_variance * self.spectrum.sum(-1, keepdim=True)
        return torch.minimum((self.spectrum.cumsum(-1) < enough).sum(-1) + 1, nonzero)

    def explained(self, rank: int) -> Tensor:
        """The share of the variance that the first ``rank`` directions hold, (...,); 1 where there is none."""
        total = self.spectrum.sum(-1)
        return torch.where(total > 0, self.spectrum[..., :rank].sum(-1) / total.clamp_min(1e-300), 1.0)

    def leading(self, rank: int) -> Leading:
        """The first ``rank`` directions; a wide space may give others that hold nearly as much."""
        dropped = self.spectrum[..., rank:].sum(-1)
        return Leading(self.basis[..., :rank], dropped, torch.zeros_like(dropped))

    def scaled(self, scale: Tensor) -> Subspace:
        """The same directions with variances in another unit; ``scale`` is (...,)."""
        return Subspace(self.basis, self.spectrum * scale.unsqueeze(-1))

    def release(self) -> None:
        """Drop what can be made again at need; spectra stay."""


class WideSubspace(Subspace):
    """A space of many features, decomposed only as far as it is asked for.

    Args:
        moment: gives the second moment, (..., features, features), float64; called whenever it is needed.
        mean, rounding: as for :func:`principal_subspace`.
        scale: of the variances, (...,).
    """

    def __init__(
        self,
        moment: Callable[[], Tensor],
        mean: Tensor | None = None,
        rounding: float = 0.0,
        scale: Tensor | None = None,
    ) -> None:
        self._moment, self._mean, self._rounding, self._scale = moment, mean, rounding, scale
        self._whole: Subspace | None = None
        self._values: Tensor | None = None
        self._trace: Tensor | None = None
        self._leading: Leading | None = None

    @property
    def basis(self) -> Tensor:
        return self._decompose().basis

    @property
    def spectrum(self) -> Tensor:
        if self._values is None:
            self._values = self._eigenvalues()
        return self._in_units(self._values)

    @property
    def spectrum_is_known(self) -> bool:
        return self._values is not None

    @property
    def total(self) -> Tensor:
        if self._values is not None:
            return self.spectrum.sum(-1)
        if self._trace is None:
            self._trace = _trace(self._moment())
        return self._in_units(self._trace)

    def leading(self, rank: int) -> Leading:
        if self._leading is None or self._leading.basis.shape[-1] != rank:
            self._leading = self._find_leading(rank)
        found = self._leading
        return Leading(found.basis, self._in_units(found.dropped), self._in_units(found.excess))

    def scaled(self, scale: Tensor) -> Subspace:
        return WideSubspace(self._moment, self._mean, self._rounding, scale)

    def release(self) -> None:
        self._whole = self._leading = None

    def _in_units(self, variances: Tensor) -> Tensor:
        if self._scale is None:
            return variances
        return variances * (self._scale.unsqueeze(-1) if variances.dim() > self._scale.dim() else self._scale)

    def _decompose(self) -> Subspace:
        if self._whole is None:
            self._whole = principal_subspace(self._moment(), self._mean, self._rounding)
            self._values = self._whole.spectrum
        return self._whole

    def _eigenvalues(self) -> Tensor:
        """The spectrum without the directions, unless those decide which of it is noise."""
        moment = self._moment()
        values = torch.linalg.eigvalsh(moment).flip(-1)
        of_sums = _noise_of_sums(moment, self._mean, self._rounding)
        of_eigh = _noise_of_eigh(values)
        surely = values > torch.maximum(of_sums.amax(-1, keepdim=True), of_eigh)
        possibly = values > torch.maximum(of_sums.amin(-1, keepdim=True), of_eigh)
        if bool((possibly & ~surely).any()):
            del moment
            return self._decompose().spectrum
        return torch.where(surely, values, 0.0)

    def _find_leading(self, rank: int) -> Leading:
        if self._whole is not None:
            return self._whole.leading(rank)
        moment = self._moment()
        if sketch_width(rank) > _LARGEST_SKETCH * moment.shape[-1]:
            del moment  # eigh takes as much memory again
            return self._decompose().leading(rank)
        self._trace = _trace(moment)
        found = subspace_iteration(moment, rank)
        if self._values is None:
            return found
        dropped = self._values.sum(-1) - (self._trace - found.dropped)  # without the noise
        least = self._values[..., rank:].sum(-1)
        return Leading(found.basis, dropped.clamp_min(0), (dropped - least).clamp_min(0))


def principal_subspace(moment: Tensor, mean: Tensor | None = None, rounding: float = 0.0) -> Subspace:
    """Eigenvectors and eigenvalues of a symmetric positive semi-definite matrix; what is rounding noise is zero.

    Sums that are rounded relative to the mean squares m_i of the features shift the variance along a direction v by
    up to rounding * sqrt(features) * sum_i v_i^2 m_i, and ``eigh`` shifts all of them relative to the largest.

    Args:
        moment: (..., features, features), float64; singular matrices are the normal case.
        mean: (..., features), what was subtracted from the features, or None.
        rounding: relative rounding error of the sums that ``moment`` was made from.
    """
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(-1), vectors.flip(-1)
    of_sums = (_noise_of_sums(moment, mean, rounding).unsqueeze(-2) @ vectors.square()).squeeze(-2)
    return Subspace(vectors, torch.where(values > torch.maximum(of_sums, _noise_of_eigh(values)), values, 0.0))


def sketch_width(rank: int) -> int:
    """How many directions :func:`subspace_iteration` iterates for ``rank`` of them."""
    return rank + rank // OVERSAMPLING + 8


def subspace_iteration(moment: Tensor, rank: int, iterations: int = ITERATIONS) -> Leading:
    """Nearly the first ``rank`` directions, by products with ``moment`` only.

    The Ritz values t_1 >= t_2 >= ... of the k iterated directions lie below the eigenvalues l_i, one by one. As
    l_i^2 - t_i^2 >= 2 t_rank (l_i - t_i) for i <= rank, and as the other eigenvalues' squares are no less than the
    other Ritz values', the first ``rank`` eigenvalues exceed their Ritz values together by no more than
    (|moment|_F^2 - sum_{i<=k} t_i^2) / (2 t_rank); by Cauchy and Schwarz, nor by the root of rank times that numerator.

    Args:
        moment: (..., features, features), float64, symmetric positive semi-definite.
        rank: number of directions.
        iterations: products with ``moment``, each orthonormalised; the start is random, the same in every call.
    """
    features = moment.shape[-1]
    width = min(features, sketch_width(rank))
    generator = torch.Generator(moment.device).manual_seed(0)
    shape = (*moment.shape[:-1], width)
    sketch = torch.randn(shape, dtype=moment.dtype, device=moment.device, generator=generator)
    for _ in range(iterations):
        sketch = torch.linalg.qr(moment @ sketch).Q
    projected = sketch.mT @ (moment @ sketch)
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)[..., :rank]
    total = _trace(moment)
    dropped = (total - values[..., :rank].sum(-1)).clamp_min(0)
    square = moment.square().sum((-2, -1))
    rounding = features * torch.finfo(moment.dtype).eps * square
    missing = (square - values.square().sum(-1)).clamp_min(0) + rounding
    last = values[..., rank - 1] if rank else torch.zeros_like(total)
    excess = torch.minimum(missing / (2 * last).clamp_min(1e-300), (rank * missing).sqrt())
    return Leading(sketch @ vectors, dropped, torch.minimum(excess, dropped))


def _trace(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1)


def _noise_of_sums(moment: Tensor, mean: Tensor | None, rounding: float) -> Tensor:
    """What rounding of the sums may add along each feature, (..., features); along a direction, their mean over it."""
    mean_square = moment.diagonal(dim1=-2, dim2=-1)
    if mean is not None:
        mean_square = mean_square + mean.square()
    return rounding * moment.shape[-1] ** 0.5 * mean_square


def _noise_of_eigh(values: Tensor) -> Tensor:
    """What ``eigh`` may add to each of the falling eigenvalues, (..., 1)."""
    return values.shape[-1] * torch.finfo(values.dtype).eps * values[..., :1]
