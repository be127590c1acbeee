"""measured_ranks corrects predicted losses by what trial compressions measure, within its number of evaluations."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.ranks.allocation import allocate
from lowrank_ops.ranks.costs import in_parameters
from lowrank_ops.search import measured
from lowrank_ops.subspaces import layer_subspaces
from tests.calibrated_net import Calibrated


@pytest.fixture(scope="module")
def stack() -> Calibrated:
    """Three blocks of two layers."""
    torch.manual_seed(0)
    blocks = [OrderedDict(attn=nn.Linear(64, 64), gate=nn.Tanh(), mlp=nn.Linear(64, 64)) for _ in range(3)]
    model = nn.Sequential(*[nn.Sequential(block) for block in blocks]).double()
    batches = [torch.randn(200, 64).double() * torch.logspace(0.5, -1, 64) for _ in range(2)]
    covariances = lro.calibrate(model, batches, sensitivity="output")
    layers = {fqn: module for fqn, module in model.named_modules() if fqn in covariances}
    return Calibrated(model, covariances, layer_subspaces(layers, covariances))


class KnownLoss:
    """A loss that is the sum of the layers' predicted losses, each times a factor."""

    def __init__(self, calibrated: Calibrated, factors: dict[str, float]) -> None:
        self.spaces, self.factors, self.calls = calibrated.spaces, factors, 0

    def of(self, ranks: dict[str, int | None]) -> float:
        dropped = {fqn: measured._dropped(space, ranks.get(fqn)) for fqn, space in self.spaces.items()}
        return sum(self.factors.get(fqn, 1.0) * value for fqn, value in dropped.items())

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        kinds = (lro.LowRankLinear, lro.LowRankConv2d)
        return -self.of({fqn: m.rank for fqn, m in model.named_modules() if isinstance(m, kinds)})


def test_finds_what_is_best_by_the_measured_loss(stack: Calibrated) -> None:
    factors = {f"{depth}.mlp": 8.0 for depth in range(3)}
    loss = KnownLoss(stack, factors)
    found = lro.measured_ranks(stack.model, stack.covariances, loss, 0.5, num_evaluations=20)
    plain, optimum = (allocate(0.5, "loss", in_parameters(), stack.spaces, {}, {}, weights=w) for w in (None, factors))
    assert loss.of(dict(found.ranks)) < loss.of(plain)
    assert loss.of(dict(found.ranks)) == pytest.approx(loss.of(optimum), rel=1e-6)
    assert loss.calls <= 20


def test_is_never_worse_on_what_is_measured(calibrated: Calibrated, model: nn.Module) -> None:
    values: list[float] = []

    def noise(model: nn.Module) -> float:
        values.append(-float(len(values)))  # the first trial, by predicted losses, is the best
        return values[-1]

    found = lro.measured_ranks(model, calibrated.covariances, noise, 0.4, num_evaluations=12)
    plain = allocate(0.4, "loss", in_parameters(), calibrated.spaces, {}, {})
    assert dict(found.ranks) == {fqn: rank for fqn, rank in plain.items() if rank is not None}
    assert not any(isinstance(module, lro.LowRankLinear) for module in model.modules())


def test_a_stored_trial_is_not_repeated(calibrated: Calibrated, model: nn.Module, tmp_path: Path) -> None:
    loss = KnownLoss(calibrated, {"wide": 8.0})
    found = [
        lro.measured_ranks(model, calibrated.covariances, loss, 0.4, num_evaluations=12, cache=tmp_path / "trials")
        for _ in range(2)
    ]
    calls = loss.calls
    lro.measured_ranks(model, calibrated.covariances, loss, 0.4, num_evaluations=12, cache=tmp_path / "trials")
    assert loss.calls == calls
    assert found[0] == found[1]


def test_groups_are_of_one_kind_and_neighboring_depth() -> None:
    layers = [f"blocks.{depth}.{kind}" for depth in range(6) for kind in ("attn", "mlp.up")]
    groups = measured._groups(layers, 5)
    assert [fqn for group in groups for fqn in group] == sorted(layers, key=lambda fqn: ("mlp" in fqn, fqn))
    assert len(groups) == 5 and all(len({fqn.split(".", 2)[2] for fqn in group}) == 1 for group in groups)
    assert len(measured._groups(["a", "b", "c", "d"], 2)) == 2
    assert measured._groups(["a.0", "a.1"], 9) == [["a.0"], ["a.1"]]


def test_bad_arguments_are_refused(calibrated: Calibrated, model: nn.Module) -> None:
    def accuracy(model: nn.Module) -> float:
        return 0.0

    with pytest.raises(ValueError, match="num_evaluations must be an integer of at least 7; got 6"):
        lro.measured_ranks(model, calibrated.covariances, accuracy, 0.5, num_evaluations=6)
    with pytest.raises(ValueError, match="rounds must be positive; got 0"):
        lro.measured_ranks(model, calibrated.covariances, accuracy, 0.5, rounds=0)
    with pytest.raises(ValueError, match="output gradients"):
        plain = lro.calibrate(model, [torch.randn(8, 8, 4, 4).double()])
        lro.measured_ranks(model, plain, accuracy, 0.5)
    with pytest.raises(TypeError, match="evaluate must be a function"):
        lro.measured_ranks(model, calibrated.covariances, 3, 0.5)  # type: ignore[arg-type]
