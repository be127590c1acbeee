"""Decompositions: principal directions, singular directions and square roots of second moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_ops.subspaces import Subspace
from lowrank_ops.subspaces.principal import (
    congruence,
    gram,
    half_product,
    lower_product,
    noise_of_sums,
    principal_directions,
    root_congruence,
    root_times,
    singular_directions,
    square_root,
)


def moment_with(*spectrum: float) -> Tensor:
    """A second moment with these eigenvalues, in random directions."""
    values = torch.tensor(spectrum, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    return (basis * values) @ basis.T


@pytest.mark.parametrize("scale", [1e-40, 1.0, 1e40])
def test_directions_are_sorted_and_noise_is_zero(scale: float) -> None:
    vectors, values = principal_directions(scale * moment_with(2, 0, 5, 1, 0, 0))
    torch.testing.assert_close(values / scale, torch.tensor([5, 2, 1, 0, 0, 0]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(6).double())


def test_noise_is_bounded_along_each_direction() -> None:
    """Sums of a feature with a large mean round; a quiet feature without a mean stays exact."""
    moment, mean = torch.diag(torch.tensor([1.0, 1e-6]).double()), torch.tensor([10.0, 0.0]).double()

    def rank(moment: Tensor, rounding: float) -> int:
        noise = noise_of_sums(moment.diagonal() + mean.square(), rounding)
        return int((principal_directions(moment, noise)[1] > 0).sum())

    assert rank(moment, 1e-7) == 2
    assert rank(moment.flip(0, 1), 1e-7) == 1  # the quiet feature has the large mean
    assert rank(moment.flip(0, 1), 1e-12) == 2


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_singular_directions_are_those_of_the_moment(rank: int, scale: float) -> None:
    matrix = scale * torch.randn(2, 40, rank).double() @ torch.randn(2, rank, 6).double()
    space = Subspace(lambda: singular_directions(matrix))
    basis, spectrum = space.basis, space.spectrum
    moment = matrix @ matrix.mT / scale**2
    assert basis.shape == (2, 40, 6) and spectrum.shape == (2, 6)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6).double().expand(2, 6, 6))
    assert not spectrum[:, rank:].any()
    expected = torch.linalg.eigvalsh(moment).flip(-1)[:, :6]
    torch.testing.assert_close(spectrum / scale**2, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(basis.mT @ moment @ basis, torch.diag_embed(expected), rtol=1e-10, atol=1e-10)


def test_small_singular_directions_are_orthonormal() -> None:
    """The Gram matrix squares the singular values; what it cannot resolve must not spoil the basis."""
    matrix = torch.linalg.qr(torch.randn(30, 5).double()).Q * torch.logspace(0, -9, 5).double()
    mixed = matrix @ torch.linalg.qr(torch.randn(5, 5).double()).Q
    basis = Subspace(lambda: singular_directions(mixed)).basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(5).double(), rtol=0, atol=1e-13)
    outside = matrix - basis @ (basis.T @ matrix)
    assert float(outside.norm()) < 1e-14


MOMENTS = {
    "regular": (4, 3, 2, 1, 0.5),
    "deficient": (4, 3, 0, 0, 0),
    "nearly singular": (4, 3, 1e-9, 1e-12, 0),
    "zero": (0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("spectrum", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("features", [(1, 1, 1, 1, 1), (1e7, 1, 1, 1e-7, 0)], ids=["plain", "outliers"])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_square_roots_are_accurate_for_every_feature(
    spectrum: tuple[float, ...], features: tuple[float, ...], scale: float
) -> None:
    """Relative to each feature's own scale, an outlier of 1e14 times the scale of another one included."""
    by = torch.tensor(features, dtype=torch.float64)
    moment = moment_with(*spectrum)
    batch = scale**2 * torch.stack([moment, torch.eye(5).double()]) * by.outer(by)
    root = square_root(batch)
    ones = torch.where(by > 0, 1 / by, 0.0) / scale
    error = (root @ root.mT - batch) * ones.outer(ones)
    assert float(error.abs().max()) < 1e-13


def test_released_directions_are_recomputed_and_spectra_kept() -> None:
    calls = []

    def decompose() -> tuple[Tensor, Tensor]:
        calls.append(1)
        return principal_directions(moment)

    moment = moment_with(3, 2, 1)
    space = Subspace(decompose)
    basis, spectrum = space.basis, space.spectrum
    assert len(calls) == 1 and space.held_bytes() == 9 * 8
    space.release()
    assert space.held_bytes() == 0 and space.spectrum is spectrum and len(calls) == 1
    assert torch.equal(space.basis, basis) and len(calls) == 2


@pytest.mark.parametrize("n", [1, 64, 65, 600])
@pytest.mark.parametrize("groups", [(), (2,)])
def test_half_products_are_the_whole_ones(n: int, groups: tuple[int, ...]) -> None:
    matrix = torch.randn(*groups, n, 5).double()
    moment = matrix @ matrix.mT + torch.eye(n).double()
    torch.testing.assert_close(lower_product(matrix, matrix.mT).tril(), (matrix @ matrix.mT).tril())
    torch.testing.assert_close(gram(matrix), matrix.mT @ matrix)
    torch.testing.assert_close(congruence(moment, matrix), matrix.mT @ moment @ matrix)
    torch.testing.assert_close(
        2 * (matrix * half_product(moment, matrix)).sum(-2), ((moment @ matrix) * matrix).sum(-2)
    )
    for root in (torch.linalg.cholesky(moment), moment):  # a triangle, and a whole matrix
        torch.testing.assert_close(root_times(root, matrix), root @ matrix)
        torch.testing.assert_close(root_congruence(moment, root).tril(), (root.mT @ moment @ root).tril())


def test_noise_grows_with_the_root_of_the_features() -> None:
    """rounding * sqrt(features) * mean square."""
    noise = noise_of_sums(torch.full((64,), 3.0).double(), 1e-10)
    torch.testing.assert_close(noise, torch.full((64,), 1e-10 * 8 * 3).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1.0, 1e200])
def test_explained_variance_does_not_depend_on_the_scale(scale: float) -> None:
    space = Subspace(lambda: (torch.eye(2).double(), torch.tensor([3.0, 1.0]).double() * scale))
    torch.testing.assert_close(space.explained(1), torch.tensor(0.75).double())
    assert float(space.explained(2)) == 1 and space.rank_at(0.7) == 1 and space.rank_at(0.8) == 2
