"""The regression behind a reconstruction: optimal, affine, robust to singular matrices and to few rows."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_ops.calibration import Moments
from lowrank_ops.calibration.statistics import LayerStatistics
from lowrank_ops.factors import Factors, factorize
from lowrank_ops.models.layers import input_rows
from lowrank_ops.reconstruction.regression import PairedSums, reconstruct_layers
from lowrank_ops.subspaces import LayerSubspaces
from lowrank_ops.subspaces.loss import DAMPING


def rows_of(count: int, features: int, rank: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs x with a mean, and z, x after a linear map plus noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(count, rank) @ normal(rank, features) + 2
    z = x @ (torch.eye(features).double() + noise * normal(features, features)) + noise * normal(count, features) - 1
    return x, z


def sums_of(layers: dict[str, nn.Module], x: Tensor, z: Tensor, folds: int = 1) -> PairedSums:
    pairs = PairedSums(layers, folds)
    for fold, (x_part, z_part) in enumerate(zip(x.chunk(folds), z.chunk(folds), strict=True)):
        for x_rows, z_rows in zip(x_part.split(17), z_part.split(17), strict=True):
            pairs.update(fold, x_rows, z_rows)
    pairs.finish()
    return pairs


def blank(layer: nn.Linear, rank: int, projection: str = "output") -> Factors:
    """Factors that only give rank and projection."""
    out_features, in_features = layer.weight.shape
    down, up = torch.zeros(rank, in_features), torch.zeros(out_features, rank)
    return Factors(down, up, layer.bias, rank, projection, None, 0.0)


def fitted(
    layer: nn.Linear, x: Tensor, z: Tensor, rank: int, *, g: Tensor | None = None, centered: bool = True,
    ridge: float | None = 0.0,
) -> Factors:  # fmt: skip
    pairs = sums_of({"layer": layer}, x, z, folds=2 if ridge is None else 1)
    gradients = {} if g is None else {"layer": Moments(g.T @ g, g.sum(0), len(g))}
    wanted = blank(layer, rank, "output" if g is None else "loss")
    return reconstruct_layers(pairs, {"layer": wanted}, gradients, centered=centered, ridge=ridge)["layer"]


def metric_of(g: Tensor | None, features: int) -> Tensor:
    if g is None:
        return torch.eye(features).double()
    moment = g.T @ g / len(g)
    return moment / moment.trace() * features + DAMPING * torch.eye(features).double()


def loss_error(layer: nn.Linear, factors: Factors, x: Tensor, z: Tensor, metric: Tensor) -> float:
    error = layer(x).detach() - F.linear(z, factors.up @ factors.down, factors.bias)
    return float(((error @ metric) * error).sum() / len(x))


def linear(in_features: int, out_features: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features).double()


def by_numpy(layer: nn.Linear, x: Tensor, z: Tensor, rank: int, metric: Tensor) -> float:
    """The least error of affine maps of a rank: regression on an orthonormal basis of the rows, then SVD."""
    y = layer(x).detach().numpy()
    rows = z.numpy() - z.numpy().mean(0)
    values, vectors = np.linalg.eigh(metric.numpy())
    target = (y - y.mean(0)) @ (vectors * np.sqrt(values)) @ vectors.T
    left, singular, _ = np.linalg.svd(rows, full_matrices=False)
    left = left[:, singular > 1e-8 * max(singular[0], 1e-300)]
    explained = np.linalg.svd(left.T @ target, compute_uv=False)
    return float(((target**2).sum() - (explained[:rank] ** 2).sum()) / len(y))


@settings(max_examples=60, deadline=None)
@given(
    in_features=st.integers(1, 9),
    out_features=st.integers(1, 9),
    x_rank=st.integers(0, 9),
    g_rank=st.integers(0, 9),
    count=st.integers(2, 60),
    noise=st.sampled_from([0.0, 0.01, 0.3]),
    seed=st.integers(0, 99),
)
def test_no_affine_map_of_the_rank_has_less_error(
    in_features: int, out_features: int, x_rank: int, g_rank: int, count: int, noise: float, seed: int
) -> None:
    layer = linear(in_features, out_features, seed)
    x, z = rows_of(count, in_features, x_rank, noise, seed)
    g = rows_of(50, out_features, g_rank, 0.0, seed + 1)[0] - 2 if g_rank else None
    metric = metric_of(g, out_features)
    for rank in {0, 1, min(in_features, out_features)}:
        factors = fitted(layer, x, z, rank, g=g)
        assert all(part.isfinite().all() for part in (factors.down, factors.up, factors.bias))
        best = by_numpy(layer, x, z, rank, metric)
        assert loss_error(layer, factors, x, z, metric) == pytest.approx(best, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.1, None, math.inf])
@pytest.mark.parametrize("out_features", [3, 12])  # less and more than the input's
def test_predicted_error_is_the_measured_error(out_features: int, ridge: float | None, centered: bool) -> None:
    layer = linear(8, out_features)
    x, z = rows_of(100, 8, 6, 0.2, 1)
    factors = fitted(layer, x, z, 2, centered=centered, ridge=ridge)
    assert factors.predicted_error == pytest.approx(loss_error(layer, factors, x, z, torch.eye(out_features).double()))
    y = layer(x).detach() - (0 if centered else layer.bias.detach())
    assert factors.output_variance == pytest.approx(float((y - centered * y.mean(0)).square().sum() / len(y)))
    assert factors.reconstructed and factors.predicted_loss is None
    if not centered:
        torch.testing.assert_close(factors.bias, layer.bias.detach())


@pytest.mark.parametrize("projection", ["output", "loss", "utilized"])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("ridge", [0.0, None])
def test_unchanged_inputs_give_one_shot_factors(projection: str, centered: bool, ridge: float | None) -> None:
    layer = linear(9, 6)
    x, _ = rows_of(80, 9, 5, 0.0, 0)
    g = torch.randn(50, 6).double()
    gradients = Moments(g.T @ g, g.sum(0), len(g))
    statistics = LayerStatistics("input", Moments(x.T @ x, x.sum(0), len(x)), gradients)
    spaces = LayerSubspaces.of_layer(layer, statistics, centered=centered)
    expected = factorize(spaces, 3, projection)
    pairs = sums_of({"layer": layer}, x, x.clone(), folds=2 if ridge is None else 1)
    found = reconstruct_layers(pairs, {"layer": expected}, {"layer": gradients}, centered=centered, ridge=ridge)[
        "layer"
    ]
    torch.testing.assert_close(found.up @ found.down, expected.up @ expected.down)
    torch.testing.assert_close(found.bias, expected.bias)
    assert found.predicted_error == pytest.approx(expected.predicted_error, rel=1e-6, abs=1e-9)
    assert (found.rank, found.projection) == (3, projection)


def test_layers_that_share_an_input_fit_as_each_alone() -> None:
    layers = {"q": linear(7, 2, 0), "k": linear(7, 3, 1)}  # side by side narrower than the input
    x, z = rows_of(60, 7, 7, 0.3, 2)
    together = reconstruct_layers(
        sums_of(layers, x, z), {fqn: blank(layer, 2) for fqn, layer in layers.items()}, {}, centered=True, ridge=0.01
    )
    for fqn, layer in layers.items():
        alone = fitted(layer, x, z, 2, ridge=0.01)
        torch.testing.assert_close(together[fqn].up @ together[fqn].down, alone.up @ alone.down)
        torch.testing.assert_close(together[fqn].bias, alone.bias)


def test_an_infinite_ridge_keeps_the_weight() -> None:
    layer = linear(6, 6)
    x, z = rows_of(50, 6, 6, 0.3, 0)
    factors = fitted(layer, x, z, 6, ridge=math.inf)
    torch.testing.assert_close(factors.up @ factors.down, layer.weight.detach())
    mean = layer(x).detach().mean(0)
    torch.testing.assert_close(F.linear(z, layer.weight.detach(), factors.bias).mean(0), mean)


def held_out_error(count: int, ridge: float | None, noise: float) -> float:
    """On fresh rows, of maps fitted to few or many; part of the change of the input is predictable."""
    layer = linear(40, 40)
    torch.manual_seed(3)
    bend = torch.eye(40).double() + 0.3 * torch.randn(40, 2).double() @ torch.randn(2, 40).double()

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        z = torch.randn(rows, 40).double() * torch.logspace(0, -1.5, 40)
        return z @ bend + noise * torch.randn(rows, 40).double(), z

    factors = fitted(layer, *draw(count), 40, ridge=ridge)
    return loss_error(layer, factors, *draw(5000), torch.eye(40).double())


@pytest.mark.parametrize("count", [30, 60, 120, 4000])
@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_the_chosen_ridge_is_near_the_best_held_out_one(count: int, noise: float) -> None:
    chosen = held_out_error(count, None, noise)
    fixed = [held_out_error(count, ridge, noise) for ridge in (0.0, 1e-4, 1e-2, 0.1, 1.0, 10.0, math.inf)]
    assert chosen < (1.4 if count < 40 else 1.1) * min(fixed)  # 15 rows per fold for 40 directions
    if count < 100 and noise == 1.0:
        assert chosen < 0.8 * fixed[0], "plain regression overfits here"


def test_rows_of_a_convolution_are_its_patches() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), padding_mode="circular").double()
    x = torch.randn(2, 3, 9, 8).double()
    y = F.linear(input_rows(conv, x), conv.weight.flatten(1), conv.bias)
    expected = conv(x).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(y, expected)


def test_low_precision_inputs_are_subtracted_exactly() -> None:
    layer = linear(4, 4).bfloat16()
    x = torch.randn(64, 4).bfloat16()
    z = (x.float() * 1.01).bfloat16()
    pairs = sums_of({"layer": layer}, x, z)
    expected = (x.double() - z.double()).T @ z.double()
    torch.testing.assert_close(pairs.folds[0].second_moment[4:, :4], expected)


def test_autocast_does_not_round_output_changes() -> None:
    layer = linear(12, 4).float()  # narrower out than in, so that outputs are summed
    x = 100 + torch.randn(64, 12)
    z = x + 0.01 * torch.randn(64, 12)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = sums_of({"layer": layer}, x, z)
    torch.testing.assert_close(pairs.folds[0].second_moment, sums_of({"layer": layer}, x, z).folds[0].second_moment)
