"""Principal directions: eigenvectors of a second moment, or left singular vectors of a matrix, in float64.

No inverse of a covariance is required: rank-deficient covariances are the normal case.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Noise = Callable[[Tensor], Tensor]  # directions (..., features, n) -> variances (..., n) that may be rounding error


class Subspace:
    """The principal directions of a space, by falling variance, computed when first needed.

    Args:
        decompose: returns ``basis`` and ``spectrum``; called again if the basis is needed after :meth:`release`.

    Attributes:
        basis: (..., features, directions), float64, orthonormal columns.
        spectrum: (..., directions), float64, the variance along each; numerically zero variances are exactly zero.
    """

    def __init__(self, decompose: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._decompose = decompose
        self._basis: Tensor | None = None
        self._spectrum: Tensor | None = None

    @property
    def basis(self) -> Tensor:
        if self._basis is None:
            self._basis, self._spectrum = self._decompose()
        return self._basis

    @property
    def spectrum(self) -> Tensor:
        if self._spectrum is None:
            self._basis, self._spectrum = self._decompose()
        return self._spectrum

    @property
    def total(self) -> Tensor:
        """The variance of the whole space, (...,)."""
        return self.spectrum.sum(-1)

    @property
    def is_decomposed(self) -> bool:
        """Whether the spectrum is known, so that reading it takes no decomposition."""
        return self._spectrum is not None

    def held_bytes(self) -> int:
        """Bytes of the basis, 0 after :meth:`release`."""
        return 0 if self._basis is None else self._basis.numel() * self._basis.element_size()

    def release(self) -> None:
        """Drop the basis, which is recomputed if needed; the spectrum stays."""
        self._basis = None

    def rank_at(self, explained_variance: float) -> int:
        """The smallest number of directions with this share of the variance; with groups, the largest of theirs.

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
        """The share of the variance in the first ``rank`` directions, (...,); 1 if there is no variance."""
        total = self.total
        return torch.where(total > 0, self.spectrum[..., :rank].sum(-1) / total.clamp_min(1e-300), 1.0)

    def dropped(self, rank: int) -> Tensor:
        """The variance outside the first ``rank`` directions, (...,): the error of a projection on them."""
        return self.spectrum[..., rank:].sum(-1)


def principal_directions(moment: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of a symmetric positive semi-definite matrix, by falling eigenvalue.

    Args:
        moment: (..., features, features), float64; may be singular.
        noise: bounds the rounding error along directions; eigenvalues below it are set to 0.

    Returns:
        (..., features, features) and (..., features).
    """
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(-1), vectors.flip(-1)
    return vectors, _denoised(values, vectors, noise)


def singular_directions(matrix: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
    """Left singular vectors and squared singular values of a tall matrix, from the Gram matrix of its columns.

    Args:
        matrix: (..., features, columns), float64, columns <= features; may be rank-deficient.
        noise: as for :func:`principal_directions`.

    Returns:
        (..., features, columns) and (..., columns).
    """
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    # Q of the graded columns sigma_i u_i: orthonormal also where small singular values lost digits in the Gram matrix.
    basis = torch.linalg.qr(matrix @ vectors.flip(-1)).Q
    return basis, _denoised(values.flip(-1), basis, noise)


def square_root(moment: Tensor) -> Tensor:
    """R with R R^T = ``moment``, (..., features, features), accurate relative to the scale of each feature.

    The Cholesky factor if the matrix is well-conditioned up to those scales, else from the eigenvectors of the
    correlations. The eigenvectors of ``moment`` itself would lose the features next to an outlier channel.

    Args:
        moment: (..., features, features), float64, positive semi-definite up to rounding.
    """
    factor, info = torch.linalg.cholesky_ex(moment)
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    if not bool(info.any()) and bool((pivots > 1e-4 * diagonal).all()):
        return factor
    scale = diagonal.clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    vectors, values = principal_directions(moment * inverse.unsqueeze(-1) * inverse.unsqueeze(-2))
    return scale.unsqueeze(-1) * vectors * values.sqrt().unsqueeze(-2)


def noise_of_sums(moment_diagonal: Tensor, mean: Tensor | None, rounding: float) -> Noise:
    """The variance that rounding of streamed sums may add along a direction v.

    Sums with relative rounding error ``rounding`` shift it by up to rounding * sqrt(features) * sum_i v_i^2 m_i, where
    m_i is the mean square of feature i.

    Args:
        moment_diagonal: (..., features), variances of the features.
        mean: (..., features), what was subtracted from the features, or None.
        rounding: relative rounding error of the sums.
    """
    mean_square = moment_diagonal if mean is None else moment_diagonal + mean.square()
    of_features = rounding * moment_diagonal.shape[-1] ** 0.5 * mean_square
    return lambda vectors: (of_features.unsqueeze(-2) @ vectors.square()).squeeze(-2)


def _denoised(values: Tensor, vectors: Tensor, noise: Noise | None) -> Tensor:
    """Eigenvalues, falling, with those within rounding error of zero set to zero."""
    bound = vectors.shape[-2] * torch.finfo(values.dtype).eps * values[..., :1]  # eigh's own error
    if noise is not None:
        bound = torch.maximum(noise(vectors), bound)
    return torch.where(values > bound, values, 0.0)
