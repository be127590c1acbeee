"""Budgets are met from below within one percent, on real models, by every allocation."""

import pytest

pytest.importorskip("transformers")

import lowrank_ops as lro
from benchmarks.accuracy import budgets
from lowrank_ops.latencies import LatencyCurve, LayerLatencies
from lowrank_ops.layers.latency import ranks_to_time
from lowrank_ops.models.layers import dimensions
from lowrank_ops.ranks import choose_ranks
from lowrank_ops.ranks.costs import in_macs, in_parameters, nanoseconds

MODELS = {"demo ViT": lambda: budgets.vit(200), "small BERT": budgets.bert}


@pytest.fixture(scope="module", params=MODELS)
def subject(request: pytest.FixtureRequest) -> budgets.Subject:
    return MODELS[request.param]()


def by_size(subject: budgets.Subject) -> LayerLatencies:
    """Times from MACs and launches instead of a clock: the same in every run."""
    curves, layers = {}, {}
    for fqn, space in subject.spaces.items():
        layer = subject.model.get_submodule(fqn)
        _, fan_in, fan_out = dimensions(layer)
        ranks, rows = tuple(ranks_to_time(layer, 12)), space.rows / 100
        seconds = tuple(4e-6 + rows * rank * (fan_in + fan_out) * 1e-10 for rank in ranks)
        curves[fqn] = LatencyCurve(2e-6 + rows * fan_in * fan_out * 1e-10, ranks, seconds)
        layers[fqn] = {fqn: 1}
    return LayerLatencies("by size", 1, curves, layers)


@pytest.mark.parametrize("allocation", budgets.ALLOCATIONS)
@pytest.mark.parametrize("fraction", budgets.FRACTIONS)
def test_parameter_and_mac_budgets_are_met(subject: budgets.Subject, fraction: float, allocation: str) -> None:
    for policy, price in ((lro.ParameterBudget, in_parameters()), (lro.FlopBudget, in_macs())):
        ranks = choose_ranks(policy(fraction, allocation), subject.spaces)
        assert fraction - 0.01 <= budgets.share(subject, ranks, price) <= fraction


@pytest.mark.parametrize("allocation", budgets.ALLOCATIONS)
@pytest.mark.parametrize("fraction", [0.35, 0.5, 0.75])
def test_latency_budgets_are_met_as_predicted(subject: budgets.Subject, fraction: float, allocation: str) -> None:
    latencies = by_size(subject)
    ranks = choose_ranks(lro.LatencyBudget(fraction, latencies, allocation), subject.spaces)
    assert fraction - 0.01 <= budgets.share(subject, ranks, nanoseconds(latencies)) <= fraction


def test_the_table_shows_what_cannot_be_met() -> None:
    case = {"model": "m", "budget": "latency", "allocation": "loss"}
    rows = [
        {**case, "fraction": 0.15, "refused": "no"},
        {**case, "fraction": 0.25, "share": 0.2468, "ms": 1.0, "dense_ms": 2.0},
    ]
    line = budgets.table(rows).splitlines()[-1]
    assert line == "| m | latency | loss | cannot be met | 24.68% (50%) | not measured | not measured | not measured |"
    assert all(map(budgets._met, rows)) and not budgets._met({"fraction": 0.5, "share": 0.48})
    assert not budgets._met({"fraction": 0.5, "share": 0.501})


def test_whole_models_are_timed(subject: budgets.Subject) -> None:
    dense, small = budgets.whole_latency(subject, dict.fromkeys(subject.spaces, 8), rounds=1)
    assert dense > 0 and small > 0
