"""Activations that are hard to add up: what is predicted is what is measured, or is said to be unknown."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.factors import factorize
from lowrank_ops.models.layers import find_layers
from lowrank_ops.subspaces import layer_subspaces
from tests.reliability.campaign import LONG, examples, figures, sized

IN, OUT = 24, 32
RANKS = (1, 5, 12, 20) if LONG else (5, 12)


def rows(kind: str, count: int) -> Tensor:
    """(count, IN) float64 activations of one kind, with a falling spectrum."""
    x = torch.randn(count, IN).double() @ (torch.randn(IN, IN).double() * torch.logspace(0, -2, IN).double())
    if kind == "outlier channels":
        x[:, [3, 17]] *= 1e4
    elif kind == "means of 1,000 times the spread":
        x += 1e3 * x.std() * torch.randn(IN).double()
    elif kind == "means of a million times the spread":
        x += 1e6 * x.std() * torch.randn(IN).double()
    elif kind == "scale 1e-20":
        x *= 1e-20
    elif kind == "scale 1e20":
        x *= 1e20
    elif kind == "constant":
        x = x[:1].expand(count, -1).clone()
    elif kind == "some constant features":
        x[:, ::3] = 7.0
    elif kind == "zeros":
        x.zero_()
    elif kind == "one direction":
        x = x[:, :1] * x[:1]
    return x


KINDS = [
    "plain", "outlier channels", "means of 1,000 times the spread", "means of a million times the spread",
    "scale 1e-20", "scale 1e20", "constant", "some constant features", "zeros", "one direction",
]  # fmt: skip
COUNTS = (1, 2, IN // 2, IN, 400) if LONG else (1, IN // 2, 400)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(IN, OUT)).to(dtype)


def measured(model: nn.Module, x: Tensor, factors: lro.LowRankLinear | nn.Module) -> float:
    with torch.no_grad():
        return float((model(x) - factors(x)).double().square().sum(-1).mean())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_predicted_errors_are_measured(kind: str) -> None:
    """In float64, over the calibration rows: to 1e-6 of the output's variance, beyond the rounding of its square."""
    worst = 0.0
    with figures(f"predicted and measured error: {kind}") as counts:
        for seed in range(sized(1, 2)):
            torch.manual_seed(seed)
            for count in COUNTS:
                x, model = rows(kind, count), network()
                covariances = lro.calibrate(model, [*x.split(100)], sensitivity="output")
                for centered in (True, False):
                    space = layer_subspaces(find_layers(model)[0], covariances, centered=centered)["0"]
                    before = torch.inf
                    for rank in RANKS:
                        for projection in ("output", "loss", "utilized", "input"):
                            factors = factorize(space, rank, projection)
                            size, variance = float(model[0](x).square().sum(-1).mean()), factors.output_variance
                            assert factors.predicted_error is not None
                            for form in (lro.LowRankLinear, lro.layers.PivotedLinear):
                                error = measured(model[0], x, form.from_factors(model[0], factors))
                                # Both outputs are rounded: their difference by a few eps of their size.
                                rounding = 64 * torch.finfo(torch.float64).eps * size**0.5
                                differ = abs(factors.predicted_error - error) - (2 * error**0.5 + rounding) * rounding
                                case = (count, centered, rank, projection, form, differ, variance)
                                assert differ <= 1e-6 * variance, case
                                worst = max(worst, differ / variance if variance else 0.0)
                                counts["cases"] = counts.get("cases", 0) + 1
                            if projection == "output":
                                assert factors.predicted_error <= before * (1 + 1e-9), "not monotone in the rank"
                                before = factors.predicted_error
        counts["worst"] = float(f"{worst:.1g}")


@pytest.mark.filterwarnings("ignore")
def test_errors_of_eight_bits_are_predicted() -> None:
    """Roundings are taken as independent, so the measured error differs from the predicted one by chance."""
    worst = cases = 0.0
    with figures("predicted and measured error: 8 bits, all of these") as counts:
        counts_tried = (1, 2, 3, IN // 2, 400) if LONG else (2, 400)
        for seed, kind, count in itertools.product(range(sized(1, 5)), KINDS if LONG else KINDS[:4:3], counts_tried):
            torch.manual_seed(seed)
            x, dense = rows(kind, count), network()
            covariances = lro.calibrate(dense, [x])
            size = float(dense(x).square().sum(-1).mean())
            for form, fraction, allocation, pivoted in itertools.product(
                ("int8", "fp8"), (0.15, 0.2, 0.4), ("variance", "uniform"), (False, True) if LONG else (False,)
            ):
                model = copy.deepcopy(dense)
                policy = lro.ByteBudget(fraction, form, allocation)
                report = lro.compress_(model, covariances, lro.CompressionConfig(policy, pivoted=pivoted))
                error, predicted = measured(dense, x, model), report.layers[0].predicted_error
                assert predicted is not None
                rounding = (64 * torch.finfo(torch.float64).eps) ** 2 * size
                case = (kind, count, form, fraction, allocation, pivoted, error, predicted)
                assert error <= 4 * predicted + rounding, case
                worst = max(worst, (error - rounding) / predicted if predicted else 0.0)
                cases += 1
        counts.update(cases=int(cases), times_the_predicted=float(f"{worst:.2g}"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_explained_variance_stays_within_one(kind: str) -> None:
    for count in COUNTS:
        torch.manual_seed(count)
        x, model = rows(kind, count), network()
        covariances = lro.calibrate(model, [x], sensitivity="output")
        for centered in (True, False):
            space = layer_subspaces(find_layers(model)[0], covariances, centered=centered)["0"]
            for part in (space.input, space.output, space.loss.subspace if space.loss else None):
                assert part is not None
                assert bool((part.spectrum >= 0).all()) and bool(part.spectrum.isfinite().all())
                assert bool((part.spectrum.diff() <= 0).all())
                shares = torch.stack([part.explained(rank) for rank in range(part.spectrum.shape[-1] + 1)])
                assert bool((shares <= 1).all()) and bool((shares.diff(dim=0) >= -1e-15).all())
                assert float(part.explained(part.spectrum.shape[-1])) == 1
                ranks = [part.rank_at(share) for share in (0.1, 0.5, 0.9, 0.99, 1.0)]
                assert ranks == sorted(ranks) and ranks[-1] <= count
            for policy in (0.5, 0.99, 1.0):
                assert 0 <= space.utilized_rank(policy) <= min(IN, OUT, count)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("scale 1e-20", "scale 1e20", "outlier channels")]
)
def test_narrow_dtypes_add_only_their_rounding(dtype: torch.dtype, kind: str) -> None:
    """The error of the stored layer is the predicted one up to what the dtype rounds, and is never NaN."""
    torch.manual_seed(0)
    eps = torch.finfo(dtype).eps
    for count in (IN // 2, 400):
        model = network(dtype)
        x = rows(kind, count)
        x = (x / x.abs().max().clamp_min(1e-300)).to(dtype)
        covariances = lro.calibrate(model, [x])
        dense = copy.deepcopy(model)
        report = lro.compress_(model, covariances, lro.Ranks({"0": 8}))
        error = measured(dense.double()[0], x.double(), model.double()[0])
        size = float(dense[0](x.double()).square().sum(-1).mean())
        predicted = report.layers[0].predicted_error
        assert (
            predicted is not None
            and error <= 1.01 * predicted + 40 * eps * (predicted * size) ** 0.5 + (40 * eps) ** 2 * size
        )


def test_values_beyond_the_sums_are_refused() -> None:
    """1e20 squared overflows float32 sums: an error that names the layer and the batch, not inf or NaN."""
    with pytest.raises(lro.NonFiniteActivationError, match=r"layer '0'.*overflows the sums.*batch 0"):
        lro.calibrate(network(torch.float32), [1e20 * torch.randn(8, IN)], dtype=torch.float32)
    covariances = lro.calibrate(network(torch.float32), [1e17 * torch.randn(100, IN)], dtype=torch.float32)
    assert covariances["0"].activations.count == 100


def test_few_rows_are_warned_of() -> None:
    for count in (1, IN - 1):
        model = network()
        covariances = lro.calibrate(model, [torch.randn(count, IN).double()])
        with pytest.warns(UserWarning, match=rf"fewer calibration rows than .*\({count} of {IN}\)"):
            lro.compress_(model, covariances, lro.Ranks({"0": 8}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lro.compress_(model := network(), lro.calibrate(model, [torch.randn(IN, IN).double()]), lro.Ranks({"0": 8}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_covariances_of_many_tokens_are_exact(mean: float, dtype: torch.dtype) -> None:
    """A block of rows over and over: its covariance is that of the whole, known in float64."""
    torch.manual_seed(0)
    block = torch.randn(10000, 16) + mean
    exact = block.double() - block.double().mean(0)
    exact = exact.T @ exact / len(block)
    tokens = sized(50_000, 10_000_000)
    name = f"covariance over many tokens: equal blocks, sums in {str(dtype)[6:]}, mean {mean:g} times the spread"
    with figures(name) as counts:
        batches = (block for _ in range(tokens // len(block)))
        moments = lro.calibrate(nn.Sequential(nn.Linear(16, 16)), batches, dtype=dtype)["0"].activations
        assert moments.count == tokens
        error = float((moments.moment(centered=True) - exact).abs().max() / exact.abs().max())
        counts.update(tokens=tokens, relative_error=float(f"{error:.2g}"))
        # In float32, equal blocks are rounded alike, a thousand times.
        assert error < (1e-6 if dtype == torch.float64 else 2e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_covariances_of_many_different_tokens_are_exact(dtype: torch.dtype) -> None:
    """As in practice: the errors of blocks are of either sign."""
    torch.manual_seed(0)
    tokens, block = sized(50_000, 10_000_000), 10_000
    products: list[Tensor] = []
    sums: list[Tensor] = []

    def blocks() -> Iterator[Tensor]:
        for _ in range(tokens // block):
            rows = torch.randn(block, 16) * torch.logspace(0, -1, 16)
            products.append(rows.double().T @ rows.double())
            sums.append(rows.double().sum(0))
            yield rows

    with figures(f"covariance over many tokens: different blocks, sums in {str(dtype)[6:]}") as counts:
        moments = lro.calibrate(nn.Sequential(nn.Linear(16, 16)), blocks(), dtype=dtype)["0"].activations
        mean = torch.stack(sums).sum(0) / tokens  # pairwise, not one after another
        expected = torch.stack(products).sum(0) / tokens - torch.outer(mean, mean)
        error = float((moments.moment(centered=True) - expected).abs().max() / expected.abs().max())
        counts.update(tokens=tokens, relative_error=float(f"{error:.2g}"))
        assert error < (1e-9 if dtype == torch.float64 else 1e-5)


def test_any_rows_give_finite_factors() -> None:
    """Random scales from denormal to the largest whose square is finite, feature by feature."""

    @examples(6, 300)
    @given(st.integers(0, 2**31), st.integers(1, 60), st.lists(st.integers(-320, 140), min_size=IN, max_size=IN))
    def check(seed: int, count: int, exponents: list[int]) -> None:
        torch.manual_seed(seed)
        scales = torch.tensor([10.0**exponent for exponent in exponents], dtype=torch.float64)
        x, model = torch.randn(count, IN).double() * scales, network()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            covariances = lro.calibrate(model, [x], sensitivity="output")
            for projection in ("output", "loss", "utilized", "input", "weight"):
                space = layer_subspaces(find_layers(model)[0], covariances)["0"]
                factors = factorize(space, 6, projection)
                assert bool(factors.down.isfinite().all()) and bool(factors.up.isfinite().all()), projection
                assert factors.predicted_error is not None
                assert 0 <= factors.predicted_error < torch.inf and 0 <= factors.output_variance < torch.inf

    with figures("factors of rows of any scale") as counts:
        check()
        counts["cases"] = sized(6, 300)
