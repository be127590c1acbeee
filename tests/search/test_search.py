"""search_ranks: tolerance kept, evaluations bounded, bounds respected, the model dense afterwards."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.layers import PivotedLinear
from lowrank_ops.ranks.costs import in_parameters, options_of
from tests.calibrated_net import Calibrated
from tests.search.conftest import ParameterAccuracy


def only_dense_is_accurate(model: nn.Module) -> float:
    return float(not any(isinstance(module, (lro.LowRankLinear, lro.LowRankConv2d)) for module in model.modules()))


@pytest.mark.parametrize("by", ["budget", "layers"])
def test_the_tolerance_is_kept_and_nearly_used(calibrated: Calibrated, model: nn.Module, by: str) -> None:
    accuracy = ParameterAccuracy(model)
    ranks = lro.search_ranks(model, calibrated.covariances, accuracy, max_drop=4, by=by)
    steps = sum(math.ceil(math.log2(len(options_of(*item, in_parameters())))) for item in calibrated.spaces.items())
    assert accuracy.calls <= (10 if by == "budget" else 1 + steps)
    lro.compress_(model, calibrated.covariances, ranks)
    with torch.no_grad():
        assert 96 <= accuracy(model) < 97


def test_more_evaluations_come_nearer_to_the_tolerance(calibrated: Calibrated, model: nn.Module) -> None:
    ranks = lro.search_ranks(
        model, calibrated.covariances, ParameterAccuracy(model), 5, allocation="uniform", num_evaluations=14
    )
    report = lro.compress_(model, calibrated.covariances, ranks)
    assert 0.49 < 1 - report.model_parameters / report.model_parameters_before <= 0.5


@pytest.mark.parametrize("by", ["budget", "layers"])
def test_no_tolerance_keeps_every_layer_dense(calibrated: Calibrated, model: nn.Module, by: str) -> None:
    assert lro.search_ranks(model, calibrated.covariances, ParameterAccuracy(model), 0, by=by) == lro.Ranks({})


def test_no_ranks_are_evaluated_twice(calibrated: Calibrated, model: nn.Module) -> None:
    tried: list[tuple[int, ...]] = []

    def evaluate(model: nn.Module) -> float:
        tried.append(tuple(p.numel() for p in model.parameters()))
        return only_dense_is_accurate(model)

    lro.search_ranks(model, calibrated.covariances, evaluate, 0, num_evaluations=30)
    assert len(set(tried)) == len(tried) > 3


def test_the_first_evaluation_is_of_the_dense_model(calibrated: Calibrated, model: nn.Module) -> None:
    parameters: list[int] = []

    def evaluate(model: nn.Module) -> float:
        parameters.append(sum(p.numel() for p in model.parameters()))
        return 1.0

    lro.search_ranks(model, calibrated.covariances, evaluate, 0.1)
    assert parameters[0] == sum(p.numel() for p in model.parameters()) == max(parameters)


def test_overrides_hold_and_ranks_go_to_json_and_back(calibrated: Calibrated, model: nn.Module) -> None:
    config = lro.CompressionConfig(overrides={"head": 16, "conv": None})
    ranks = lro.search_ranks(model, calibrated.covariances, ParameterAccuracy(model), 4, config=config)
    assert ranks.ranks["head"] == 16 and "conv" not in ranks.ranks
    report = lro.compress_(model, calibrated.covariances, ranks)
    assert lro.CompressionConfig.from_json(report.config.to_json()).rank == ranks


class Heads(nn.Module):
    """Layers of one input; a rank saves little in the narrow one, which a budget therefore leaves dense."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 24)
        self.o = nn.Linear(120, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.cat([self.q(x), self.k(x), self.v(x)], -1))


def test_groups_are_low_rank_all_or_none_in_every_trial() -> None:
    model = Heads()
    covariances, tried = lro.calibrate(model, [torch.randn(200, 48)]), list[set[str]]()

    def evaluate(trial: nn.Module) -> float:
        tried.append({fqn for fqn, part in trial.named_modules() if isinstance(part, lro.LowRankLinear)})
        return ParameterAccuracy(model)(trial)

    alone = lro.search_ranks(model, covariances, evaluate, 4)
    assert any(0 < len(names & {"q", "k", "v"}) < 3 for names in tried) and "v" not in alone.ranks
    tried.clear()
    config = lro.CompressionConfig(group=True)
    together = lro.search_ranks(model, covariances, evaluate, 4, config=config)
    assert all(len(names & {"q", "k", "v"}) in (0, 3) for names in tried) and len(tried) > 3
    assert {"q", "k", "v"} <= together.ranks.keys()
    report = lro.compress_(model, covariances, replace(config, rank=together))
    assert report.groups == (("q", "k", "v"),)
    with pytest.raises(ValueError, match="group=True cannot be combined with by='layers'"):
        lro.search_ranks(Heads(), covariances, evaluate, 4, by="layers", config=config)


def test_trials_are_pivoted_as_the_compressed_model(calibrated: Calibrated, model: nn.Module, tmp_path: Path) -> None:
    kinds = set[type]()

    def evaluate(trial: nn.Module) -> float:
        kinds.update(type(part) for part in trial.modules())
        return ParameterAccuracy(model)(trial)

    config, cache = lro.CompressionConfig(pivoted=True), tmp_path / "trials"
    ranks = lro.search_ranks(model, calibrated.covariances, evaluate, 4, config=config, cache=cache)
    assert PivotedLinear in kinds
    with pytest.raises(ValueError, match="holds trials with another pivoted"):
        lro.search_ranks(model, calibrated.covariances, evaluate, 4, cache=cache)
    lro.compress_(model, calibrated.covariances, replace(config, rank=ranks))
    with torch.no_grad():
        assert ParameterAccuracy(calibrated.model)(model) >= 96


def test_filter_fn_selects_the_layers(calibrated: Calibrated, model: nn.Module) -> None:
    ranks = lro.search_ranks(
        model, calibrated.covariances, ParameterAccuracy(model), 1, filter_fn=lambda module, fqn: fqn == "wide"
    )
    assert set(ranks.ranks) == {"wide"}


def test_given_subspaces_give_the_same_ranks(calibrated: Calibrated, model: nn.Module) -> None:
    found = [
        lro.search_ranks(model, calibrated.covariances, ParameterAccuracy(model), 4, subspaces=spaces)
        for spaces in (None, calibrated.spaces)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("at", [1, 3])
def test_a_failing_evaluation_leaves_the_model_dense(calibrated: Calibrated, model: nn.Module, at: int) -> None:
    modules = list(model.modules())
    with pytest.raises(RuntimeError, match="power cut"):
        lro.search_ranks(model, calibrated.covariances, ParameterAccuracy(model, fails_at=at), 0.1)
    assert list(model.modules()) == modules


@pytest.mark.parametrize("returned", [math.nan, None, "good"])
def test_an_accuracy_that_is_not_a_finite_number(calibrated: Calibrated, model: nn.Module, returned: object) -> None:
    modules = list(model.train().modules())

    def evaluate(model: nn.Module) -> object:
        model.eval()
        return returned

    with pytest.raises(ValueError, match="evaluate must return a finite number, higher for better models; it returned"):
        lro.search_ranks(model, calibrated.covariances, evaluate, 0.1)
    assert list(model.modules()) == modules and all(module.training for module in modules)


def test_evaluate_may_change_training_flags(calibrated: Calibrated, model: nn.Module) -> None:
    model.train()
    lro.search_ranks(model, calibrated.covariances, lambda model: float(model.eval().training), 0.1)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("by", "max_drop"), [("budget", 0.0), ("layers", 0.0), ("budget", 9.0), ("layers", 9.0)])
def test_bounds_take_precedence_over_the_tolerance(
    calibrated: Calibrated, model: nn.Module, by: str, max_drop: float
) -> None:
    config = lro.CompressionConfig(bounds={"re:.*": (9, 24), "wide": (32, None), "again": (0, 16)})
    found = lro.search_ranks(model, calibrated.covariances, only_dense_is_accurate, max_drop, by=by, config=config)
    ranks = {fqn: found.ranks.get(fqn) for fqn in calibrated.spaces}
    for fqn in ("conv", "head"):
        assert ranks[fqn] is not None and 9 <= ranks[fqn] <= 24
    assert ranks["again"] is not None and ranks["again"] <= 16
    assert ranks["wide"] is None or ranks["wide"] >= 32
    if not max_drop:
        assert ranks["wide"] is None and ranks["again"] == 16, "the largest that bounds allow"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"evaluate": 3}, "evaluate must be a function"),
        ({"max_drop": -1}, "max_drop must be a non-negative number"),
        ({"by": "random"}, "by must be one of 'budget', 'layers'"),
        ({"allocation": "greedy"}, "allocation must be one of None, 'uniform', 'variance', 'loss'"),
        ({"num_evaluations": 1}, "num_evaluations must be an integer of at least 2"),
        ({"cache": 3}, "cache must be a string, a pathlib.Path or None; got 3"),
    ],
)
def test_invalid_arguments_are_explained(
    calibrated: Calibrated, model: nn.Module, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        lro.search_ranks(model, calibrated.covariances, **{"evaluate": len, "max_drop": 1, **arguments})
