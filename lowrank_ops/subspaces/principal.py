"""Principal directions: eigenvectors of a second moment, or left singular vectors of a matrix, in float64.

No inverse of a covariance is required: rank-deficient covariances are the normal case.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Squared singular values up to this share of the largest one keep 12 digits of the angles in a Gram matrix.
NEARLY_ORTHOGONAL = 1e-3


class Subspace:
    """The principal directions of a space in descending order of variance, computed when first needed.

    Args:
        decompose: returns ``basis`` and ``spectrum``; called again if the basis is needed after :meth:`release`. With
            more tensors, matrices whose last one has ``features`` rows, the basis is that of the first tensor
            multiplied by each of them in turn, with columns made orthonormal when it is read.

    Attributes:
        basis: (..., features, directions), float64, orthonormal columns.
        spectrum: (..., directions), float64, the variance along each; numerically zero variances are exactly zero.
    """

    def __init__(self, decompose: Callable[[], tuple[Tensor, ...]]) -> None:
        self._decompose = decompose
        self._basis: Tensor | None = None
        self._matrices: list[Tensor] = []
        self._spectrum: Tensor | None = None

    def _find(self) -> tuple[Tensor, Tensor]:
        if self._basis is None or self._spectrum is None:
            self._basis, self._spectrum, *self._matrices = self._decompose()
        return self._basis, self._spectrum

    @property
    def basis(self) -> Tensor:
        return self.leading(self.spectrum.shape[-1])

    @property
    def spectrum(self) -> Tensor:
        return self._find()[1] if self._spectrum is None else self._spectrum

    def leading(self, rank: int) -> Tensor:
        """The first ``rank`` columns of the basis; takes less than the whole basis."""
        vectors = self._find()[0][..., :rank]
        if not self._matrices:
            return vectors
        for matrix in self._matrices:
            vectors = matrix @ vectors
        return orthonormal(vectors, self._are_nearly_orthogonal(rank))

    def _are_nearly_orthogonal(self, rank: int) -> bool:
        """Whether the products of the first ``rank`` vectors with the matrices are nearly orthogonal as they are."""
        kept = self.spectrum[..., :rank]
        return bool((kept[..., -1:] > NEARLY_ORTHOGONAL * kept[..., :1]).all())

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
        return sum(bytes_of(tensor) for tensor in (self._basis, *self._matrices))

    def release(self) -> None:
        """Drop the basis, which is recomputed if needed; the spectrum stays."""
        self._basis, self._matrices = None, []

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

    def shares(self) -> Tensor:
        """The share of the variance in the first 0, 1, ... directions, (..., directions + 1); 1 if there is none."""
        sums = F.pad(self.spectrum.cumsum(-1), (1, 0))
        return torch.where(sums[..., -1:] > 0, sums / sums[..., -1:].clamp_min(1e-300), 1.0)

    def mean_shares(self) -> list[float]:
        """:meth:`shares`, the mean over groups."""
        shares = self.shares()
        return shares.view(-1, shares.shape[-1]).mean(0).tolist()

    def explained(self, rank: int) -> Tensor:
        """The share of the variance in the first ``rank`` directions, (...,); 1 if there is no variance."""
        return self.shares()[..., rank]

    def dropped(self, rank: int) -> Tensor:
        """The variance outside the first ``rank`` directions, (...,): the error of a projection on them."""
        return self.spectrum[..., rank:].sum(-1)


def principal_directions(moment: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of a symmetric positive semi-definite matrix, in descending order.

    Args:
        moment: (..., features, features), float64; may be singular. Its lower triangle is read.
        noise: from :func:`noise_of_sums`; eigenvalues within the rounding error along their direction are set to 0.

    Returns:
        (..., features, features) and (..., features).
    """
    values, vectors = descending_eigh(moment)
    limit = None if noise is None else noise.amax(-1)
    return vectors, denoised(values, limit, lambda start: noise_along(noise, vectors[..., start:]))


def descending_eigh(moment: Tensor) -> tuple[Tensor, Tensor]:
    """``eigh`` of a symmetric matrix (its lower triangle is read), eigenvalues in descending order."""
    values, vectors = torch.linalg.eigh(moment.mT, UPLO="U")  # LAPACK stores columns: no transposed copy
    return values.flip(-1), vectors.flip(-1)


def singular_directions(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors and squared singular values of a tall matrix, from the Gram matrix of its columns.

    Args:
        matrix: (..., features, columns), float64, columns <= features; may be rank-deficient.

    Returns:
        The right singular vectors (..., columns, columns), the values (..., columns) and ``matrix``, as
        :class:`Subspace` takes them: ``matrix`` times the right singular vectors gives the left ones.
    """
    values, vectors = descending_eigh(lower_product(matrix.mT, matrix))
    return vectors, denoised(values), matrix


def orthonormal(columns: Tensor, nearly: bool = False) -> Tensor:
    """An orthonormal basis whose first n vectors span the first n columns, for every n.

    Of graded columns sigma_i u_i it is accurate also where small singular values lost digits in the Gram matrix. Where
    they did not, the columns are nearly orthogonal, and a Cholesky factor of their products takes less than a QR; or
    with ``nearly`` the lengths.
    """
    norms = columns.square().sum(-2, keepdim=True).sqrt()
    scaled = columns / norms.clamp_min(1e-300)
    if nearly:
        return scaled
    factor = near_identity_cholesky(lower_product(scaled.mT, scaled))
    if factor is None:
        return torch.linalg.qr(columns).Q
    return torch.linalg.solve_triangular(factor, scaled.mT, upper=False).mT


def orthonormal_pair(
    basis: Tensor, inner: Tensor, outputs: Tensor, nearly: bool = False
) -> tuple[Tensor, Tensor] | None:
    """P M W (..., n, features) and P^T (..., m, n), where P are the rows of B W^T made orthonormal in a metric M.

    Args:
        basis: B, (..., n, features).
        inner: B W^T M W, (..., n, features).
        outputs: B W^T, (..., n, m).
        nearly: as for :func:`orthonormal`.

    Returns:
        None if the rows are far from orthogonal in M.
    """
    norms = (basis * inner).sum(-1, keepdim=True).clamp_min(1e-300).sqrt()
    down, up = inner / norms, outputs / norms
    if not nearly:
        factor = near_identity_cholesky(down @ (basis / norms).mT)
        if factor is None:
            return None
        down, up = (torch.linalg.solve_triangular(factor, part, upper=False) for part in (down, up))
    return down, up.mT


def near_identity_cholesky(gram: Tensor) -> Tensor | None:
    """The lower Cholesky factor of matrices (..., n, n) of unit diagonal, or None if one is far from the identity."""
    factor, info = torch.linalg.cholesky_ex(gram)
    near = not bool(info.any()) and bool((factor.diagonal(dim1=-2, dim2=-1) > 0.9).all())
    return factor if near else None


def lower_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` where that is symmetric; only the lower triangle, which ``eigh`` reads, is defined.

    Args:
        left: (..., n, k).
        right: (..., k, n).
    """
    product = left.new_empty(*left.shape[:-1], left.shape[-2])
    for rows in _blocks(left.shape[-2]):
        product[..., rows, : rows.stop] = left[..., rows, :] @ right[..., : rows.stop]
    return product


def gram(matrix: Tensor) -> Tensor:
    """matrix^T matrix, (..., n, n), of a matrix (..., m, n), at half the work."""
    lower = lower_product(matrix.mT, matrix).tril()
    return lower + lower.tril(-1).mT


def congruence(symmetric: Tensor, matrix: Tensor) -> Tensor:
    """matrix^T symmetric matrix as matrix^T H matrix and its transpose, with H of :func:`half_product`.

    Args:
        symmetric: (..., n, n).
        matrix: (..., n, m).
    """
    product = matrix.mT @ half_product(symmetric, matrix)
    return product + product.mT


def half_product(symmetric: Tensor, matrix: Tensor) -> Tensor:
    """H matrix, (..., n, m), where H is the lower triangle of ``symmetric`` with half of its diagonal.

    For columns v of the matrix, v^T symmetric v = 2 v^T H v, at half the work.

    Args:
        symmetric: (..., n, n).
        matrix: (..., n, m).
    """
    product = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    three = [part if part.dim() == 3 else part.unsqueeze(0) for part in (symmetric, matrix, product)]
    _half_product(*three)
    return product


def _half_product(symmetric: Tensor, matrix: Tensor, out: Tensor) -> None:
    half = symmetric.shape[-1] // 2
    if half <= 72:  # smaller products are slower
        block = symmetric.tril()
        block.diagonal(dim1=-2, dim2=-1).mul_(0.5)
        torch.bmm(block, matrix, out=out)
        return
    _half_product(symmetric[:, :half, :half], matrix[:, :half], out[:, :half])
    _half_product(symmetric[:, half:, half:], matrix[:, half:], out[:, half:])
    out[:, half:].baddbmm_(symmetric[:, half:, :half], matrix[:, :half])


def root_congruence(symmetric: Tensor, root: Tensor) -> Tensor:
    """root^T symmetric root, of which only the lower triangle is defined; a third of the work for a triangular root.

    Args:
        symmetric: (..., n, n).
        root: (..., n, n).
    """
    blocks = _blocks(root.shape[-1])
    if not is_lower_triangular(root):
        return lower_product(root.mT, symmetric @ root)
    product = root.new_empty(root.shape)
    for columns in blocks:
        first = columns.start
        inner = symmetric[..., first:, first:] @ root[..., first:, columns]
        for rows in blocks:
            if rows.start >= first:
                left = root[..., rows.start :, rows].mT
                product[..., rows, columns] = left @ inner[..., rows.start - first :, :]
    return product


def root_times(root: Tensor, right: Tensor) -> Tensor:
    """``root @ right``; half the work where ``root`` (..., n, n) is lower triangular."""
    if not is_lower_triangular(root):
        return root @ right
    return torch.cat(
        [root[..., rows, : rows.stop] @ right[..., : rows.stop, :] for rows in _blocks(root.shape[-1])], -2
    )


def is_lower_triangular(matrix: Tensor) -> bool:
    """Whether the blocks above the diagonal that products would leave out are zero."""
    return not any(bool(matrix[..., : columns.start, columns].any()) for columns in _blocks(matrix.shape[-1]))


def _blocks(n: int) -> list[slice]:
    """Slices for products of which one triangle is left out: more would be slower, because each product is narrow."""
    step = max(-(-n // 8), 144)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)] or [slice(0, 0)]


def square_root(moment: Tensor) -> Tensor:
    """R with R R^T = ``moment``, (..., features, features), accurate relative to the scale of each feature.

    The Cholesky factor where it exists: its error is that of rounding the products of two features, whatever the
    condition. Else from the eigenvectors of the correlations; those of ``moment`` itself would lose the features next
    to an outlier channel.

    Args:
        moment: (..., features, features), float64, positive semi-definite up to rounding.
    """
    factor, info = torch.linalg.cholesky_ex(moment)
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    rounding = moment.shape[-1] * torch.finfo(moment.dtype).eps
    if not bool(info.any()) and bool((pivots > rounding * diagonal).all()):
        return factor
    scale = diagonal.clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    vectors, values = principal_directions(moment * inverse.unsqueeze(-1) * inverse.unsqueeze(-2))
    return scale.unsqueeze(-1) * vectors * values.sqrt().unsqueeze(-2)


def noise_of_sums(mean_square: Tensor, rounding: float) -> Tensor:
    """The variance that rounding of streamed sums may add along a direction v, as weights of its squared entries.

    Sums with relative rounding error ``rounding`` shift it by up to rounding * sqrt(features) * sum_i v_i^2 m_i, where
    m_i is the mean square of feature i.

    Args:
        mean_square: (..., features), of the features about the shift of the sums.
        rounding: relative rounding error of the sums.
    """
    return rounding * mean_square.shape[-1] ** 0.5 * mean_square


def noise_along(noise: Tensor | None, vectors: Tensor) -> Tensor:
    """The weights of :func:`noise_of_sums` summed over the squared entries of each vector, (..., n)."""
    assert noise is not None
    return (noise.unsqueeze(-2) @ vectors.square()).squeeze(-2)


def denoised(values: Tensor, limit: Tensor | None = None, along: Callable[[int], Tensor] | None = None) -> Tensor:
    """Descending eigenvalues, with those within rounding error of zero set to zero.

    Args:
        values: (..., n).
        limit: (...,), no direction has more noise of the sums; None if there is no such noise.
        along: ``along(start)`` returns the noise along the directions from ``start`` on, (..., n - start); called for
            directions whose values are not above the limit.
    """
    bound = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., :1].expand_as(values)  # eigh's own error
    if limit is not None and along is not None:
        start = int((values > limit.unsqueeze(-1)).sum(-1).min()) if values.numel() else 0
        if start < values.shape[-1]:
            bound = torch.cat([bound[..., :start], torch.maximum(bound[..., start:], along(start))], -1)
    return torch.where(values > bound, values, 0.0)


def bytes_of(tensor: Tensor | None) -> int:
    """Bytes of a tensor's elements; 0 for None."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
