"""Layers with more outputs than inputs, which are decomposed on the input side, against the output side in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_ops.calibration import Moments
from lowrank_ops.calibration.statistics import LayerStatistics
from lowrank_ops.factors import Factors, factorize
from lowrank_ops.subspaces import LayerSubspaces
from lowrank_ops.subspaces.loss import DAMPING

GROUPS, ROWS, FEATURES, OUTPUTS = 2, 300, 8, 24


def sums(rows: Tensor, weights: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Moments:
    """Moments of rows (groups, rows, features), accumulated in ``dtype``."""
    rows = rows.to(dtype)
    weighted = rows if weights is None else rows * weights.to(dtype).unsqueeze(-1)
    return Moments(weighted.mT @ rows, weighted.sum(-2), rows.shape[-2])


def rows_of(kind: str) -> Tensor:
    x = torch.randn(GROUPS, ROWS, FEATURES).double() + 0.5
    if kind == "deficient":
        x = x[..., :3] @ torch.randn(3, FEATURES).double()
    if kind == "unequal groups":
        x[0] = x[0, :, :2] @ torch.randn(2, FEATURES).double()
    if kind == "dead features":
        x[..., ::2] = 0
    if kind == "zero":
        x = 0 * x
    return x


@pytest.fixture(params=["regular", "deficient", "unequal groups", "dead features", "zero"])
def x(request: pytest.FixtureRequest) -> Tensor:
    return rows_of(request.param)


def weight_and_gradients() -> tuple[Tensor, Tensor]:
    scales = torch.logspace(0, -2, OUTPUTS).double()
    return torch.randn(GROUPS, OUTPUTS, FEATURES).double(), torch.randn(GROUPS, 100, OUTPUTS).double() * scales


def product(factors: Factors) -> Tensor:
    return factors.up @ factors.down


def directions(factors: Factors) -> Tensor:
    """The columns of ``up``, which are scaled, at length 1."""
    return factors.up / factors.up.norm(dim=-2, keepdim=True)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3, 5, 8])
def test_output_factors_are_those_of_the_output_moment(x: Tensor, centered: bool, rank: int) -> None:
    weight, _ = weight_and_gradients()
    spaces = LayerSubspaces(weight, None, LayerStatistics("input", sums(x)), centered=centered)
    factors = factorize(spaces, rank, "output")
    assert factors.down.shape == (GROUPS, rank, FEATURES) and factors.up.shape == (GROUPS, OUTPUTS, rank)
    y = (x - (x.mean(-2, keepdim=True) if centered else 0)) @ weight.mT
    values = torch.linalg.eigvalsh(y.mT @ y / ROWS).flip(-1).clamp_min(0)
    total = float(values.sum())
    optimum = float(values[..., rank:].sum())
    basis = directions(factors)
    error = float((y - (y @ basis) @ basis.mT).square().sum() / ROWS)
    assert factors.predicted_error == pytest.approx(optimum, rel=1e-10, abs=1e-10 * total)
    assert error == pytest.approx(optimum, rel=1e-10, abs=1e-10 * total)
    assert factors.output_variance == pytest.approx(total, rel=1e-10)
    torch.testing.assert_close(product(factors), basis @ (basis.mT @ weight))


@pytest.mark.parametrize("weights", [True, False], ids=["token weights", "unweighted"])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3, 5, 8])
def test_loss_factors_are_optimal_in_the_metric(x: Tensor, centered: bool, weights: bool, rank: int) -> None:
    weight, g = weight_and_gradients()
    w = torch.rand(GROUPS, ROWS).double() if weights else torch.ones(GROUPS, ROWS).double()
    w /= w.mean(-1, keepdim=True)
    statistics = LayerStatistics("input", sums(x), sums(g), sums(x, w) if weights else None)
    spaces = LayerSubspaces(weight, None, statistics, centered=centered)
    factors = factorize(spaces, rank, "loss")
    y = (x - (x.mean(-2, keepdim=True) if centered else 0)) @ weight.mT
    moment = g.mT @ g / g.shape[-2]
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    metric = moment + DAMPING * trace / OUTPUTS * torch.eye(OUTPUTS).double()
    values, vectors = torch.linalg.eigh(metric)
    in_metric = (y * w.sqrt().unsqueeze(-1)) @ (vectors * values.sqrt().unsqueeze(-2))
    squares = torch.linalg.svdvals(in_metric).square() / ROWS
    lost = y - (x - (x.mean(-2, keepdim=True) if centered else 0)) @ product(factors).mT
    error = float(((lost @ metric) * lost * w.unsqueeze(-1)).sum() / ROWS)
    assert error == pytest.approx(float(squares[..., rank:].sum()), rel=1e-9, abs=1e-12 * float(squares.sum()))
    assert factors.predicted_loss == pytest.approx(
        0.5 * float(((lost @ moment) * lost * w.unsqueeze(-1)).sum() / ROWS), rel=1e-9, abs=1e-12 * float(squares.sum())
    )


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_float32_sums_are_near_the_optimum(x: Tensor, centered: bool, rank: int) -> None:
    weight, _ = weight_and_gradients()
    statistics = LayerStatistics("input", sums(x, dtype=torch.float32))
    factors = factorize(LayerSubspaces(weight, None, statistics, centered=centered), rank, "output")
    y = (x - (x.mean(-2, keepdim=True) if centered else 0)) @ weight.mT
    squares = torch.linalg.svdvals(y).square() / ROWS
    basis = directions(factors)
    error = float((y - y @ basis @ basis.mT).square().sum() / ROWS)
    assert error == pytest.approx(float(squares[..., rank:].sum()), rel=1e-6, abs=1e-5 * float(squares.sum()))


@pytest.mark.parametrize("deficient", [True, False])
@pytest.mark.parametrize("projection", ["output", "loss"])
@pytest.mark.parametrize("token_weights", [True, False])
def test_an_outlier_channel_folded_into_the_weight_is_free(
    deficient: bool, projection: str, token_weights: bool
) -> None:
    """Scaling a channel up and its weight down is the same function: the same ranks and the same errors."""
    x, (weight, g) = rows_of("deficient" if deficient else "regular"), weight_and_gradients()
    w = torch.rand(GROUPS, ROWS).double() if token_weights else None
    found = []
    for scale in (1.0, 1e9):
        by = torch.ones(FEATURES).double()
        by[0] = scale
        statistics = LayerStatistics("input", sums(x * by), sums(g), None if w is None else sums(x * by, w))
        spaces = LayerSubspaces(weight / by, None, statistics, centered=True)
        factors = factorize(spaces, 2, projection)
        found.append((factors, [spaces.output.rank_at(share) for share in (0.5, 0.9, 0.99)], product(factors) * by))
    (plain, plain_ranks, plain_product), (scaled, scaled_ranks, scaled_product) = found
    assert plain_ranks == scaled_ranks
    assert scaled.predicted_error == pytest.approx(plain.predicted_error, rel=1e-6)
    assert scaled.predicted_loss == pytest.approx(plain.predicted_loss, rel=1e-6)
    torch.testing.assert_close(scaled_product, plain_product, rtol=1e-5, atol=1e-6)
