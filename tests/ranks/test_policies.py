"""Budgets of parameters and FLOPs by allocation, bounds, and policies as JSON."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.ranks import choose_ranks
from lowrank_ops.ranks.costs import in_macs, in_parameters, options_of, stored_rank
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces


def test_macs_of_a_pivoted_layer_are_its_elements_by_rows() -> None:
    model = nn.Sequential(nn.Linear(48, 32))
    space = layer_subspaces({"0": model[0]}, lro.calibrate(model, [torch.randn(50, 48)]))["0"]
    layer = lro.layers.PivotedLinear.from_linear(model[0], 16)
    elements = sum(getattr(layer, name).numel() for name in layer.matrices)
    assert in_macs(pivoted=True).lowrank("0", space, 16) == 50 * elements == 50 * 16 * (48 + 32 - 16)


def test_macs_are_counted_by_rows(calibrated) -> None:  # type: ignore[no-untyped-def]
    _, _, spaces = calibrated
    images = 6 * 64
    dense = {fqn: in_macs().dense(fqn, space) for fqn, space in spaces.items()}
    assert dense == {
        "conv": images * 16 * 72 * 32,
        "wide": images * 512 * 64,
        "again": 3 * images * 64 * 64,
        "head": images * 64 * 40,
    }
    assert in_macs().lowrank("conv", spaces["conv"], 9) == images * 16 * 16 * (72 + 32)


@pytest.mark.parametrize("allocation", ["uniform", "variance", "loss"])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.75, 1.0])
def test_flop_budget_is_met(calibrated, fraction: float, allocation: str) -> None:  # type: ignore[no-untyped-def]
    _, _, spaces = calibrated
    ranks = choose_ranks(lro.FlopBudget(fraction, allocation), spaces)
    spent = sum(in_macs().of(fqn, space, ranks[fqn]) for fqn, space in spaces.items())
    dense = sum(in_macs().dense(fqn, space) for fqn, space in spaces.items())
    cheapest_step = min(
        options_of(fqn, space, in_macs())[1].cost - options_of(fqn, space, in_macs())[0].cost
        for fqn, space in spaces.items()
    )
    assert spent <= fraction * dense
    assert spent > fraction * dense - 8 * cheapest_step or fraction == 1
    assert all(rank is None for rank in ranks.values()) or fraction < 1


def test_flops_and_parameters_spend_differently(calibrated) -> None:  # type: ignore[no-untyped-def]
    _, _, spaces = calibrated
    by_flops = choose_ranks(lro.FlopBudget(0.5, "loss"), spaces)
    by_parameters = choose_ranks(lro.ParameterBudget(0.5, "loss"), spaces)
    assert by_flops["conv"] is not None and by_flops != by_parameters


def dropped_loss(spaces: dict[str, LayerSubspaces], ranks: dict[str, int | None]) -> float:
    return sum(
        float(spaces[fqn].loss.subspace.spectrum[rank:].sum()) for fqn, rank in ranks.items() if rank is not None
    )


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7, 0.9])
def test_loss_allocation_is_near_the_optimum(calibrated, fraction: float) -> None:  # type: ignore[no-untyped-def]
    """Against every combination of options of the four layers."""
    _, _, spaces = calibrated
    budget = fraction * sum(in_parameters().dense(fqn, space) for fqn, space in spaces.items())
    options = {fqn: options_of(fqn, space, in_parameters()) for fqn, space in spaces.items()}
    best = min(
        dropped_loss(spaces, {fqn: option.rank for fqn, option in zip(spaces, combination, strict=True)})
        for combination in itertools.product(*options.values())
        if sum(option.cost for option in combination) <= budget
    )
    found = {
        allocation: choose_ranks(lro.ParameterBudget(fraction, allocation), spaces)
        for allocation in ("uniform", "variance", "loss")
    }
    for ranks in found.values():
        assert sum(in_parameters().of(fqn, spaces[fqn], rank) for fqn, rank in ranks.items()) <= budget
    lost = {allocation: dropped_loss(spaces, ranks) for allocation, ranks in found.items()}
    assert lost["loss"] <= min(lost.values())
    assert lost["loss"] <= 1.2 * best + 1e-9


def test_layers_past_break_even_become_dense(calibrated) -> None:  # type: ignore[no-untyped-def]
    _, _, spaces = calibrated
    ranks = choose_ranks(lro.ParameterBudget(0.9, "loss"), spaces)
    assert None in ranks.values()
    for fqn, rank in ranks.items():
        if rank is not None:
            assert in_parameters().lowrank(fqn, spaces[fqn], rank) < in_parameters().dense(fqn, spaces[fqn])
            assert rank == stored_rank(rank)


def test_loss_allocation_needs_output_gradients(calibrated) -> None:  # type: ignore[no-untyped-def]
    model, covariances, _ = calibrated
    layers = {fqn: module for fqn, module in model.named_modules() if fqn in covariances}
    statistics = {**covariances, "head": replace(covariances["head"], output_gradients=None)}
    spaces = layer_subspaces(layers, lro.Covariances(statistics))
    with pytest.raises(ValueError, match=r"'loss' needs output gradients for every layer, and 'head' has none"):
        choose_ranks(lro.ParameterBudget(0.5, "loss"), spaces)
    assert choose_ranks(lro.ParameterBudget(0.5, "loss"), spaces, {"head": None})["head"] is None


BOUNDS = {"re:.*": (9, 24), "wide": (32, None), "again": (0, 16)}


@pytest.mark.parametrize(
    "policy",
    [
        lro.ExplainedVariance(0.999),
        lro.ExplainedVariance(0.01),
        *(lro.ParameterBudget(0.65, allocation) for allocation in ("uniform", "variance", "loss")),
        lro.FlopBudget(0.7, "loss"),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_every_policy_stays_within_bounds(calibrated, policy: lro.config.RankPolicy) -> None:  # type: ignore[no-untyped-def]
    _, _, spaces = calibrated

    ranks = choose_ranks(policy, spaces, bounds=BOUNDS)
    for fqn in ("conv", "head"):
        assert ranks[fqn] is not None and 9 <= ranks[fqn] <= 24
    assert ranks["again"] is not None and ranks["again"] <= 16
    assert ranks["wide"] is None or ranks["wide"] >= 32


def test_bounds_of_patterns_names_and_overrides(calibrated) -> None:  # type: ignore[no-untyped-def]
    model, covariances, spaces = calibrated
    low = lro.ExplainedVariance(0.01)
    ranks = choose_ranks(low, spaces, {"head": 3}, bounds={"re:.*": (10, None), "conv": (16, None)})
    assert ranks == {"conv": 16, "wide": 10, "again": 10, "head": 3}
    free = choose_ranks(lro.ParameterBudget(0.5, "loss"), spaces)
    assert choose_ranks(lro.ParameterBudget(0.5, "loss"), spaces, bounds={"re:.*": (0, None)}) == free
    config = lro.CompressionConfig(low, bounds={"re:.*": [10, None]})
    report = lro.compress_(copy.deepcopy(model), covariances, config, subspaces=spaces)
    assert {layer.rank for layer in report.layers} == {10}


@pytest.mark.parametrize("pair", [7, (1,), (-1, 4), (5, 4), (0, 0), (1.0, 2), (True, 2), (None, 3)])
def test_bad_bounds_are_explained(calibrated, pair: object) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"bounds\['a'\] must be \(min, max\)"):
        lro.CompressionConfig(bounds={"a": pair})
    with pytest.raises(ValueError, match=r"bounds\['wide'\] must be"):
        choose_ranks(lro.ExplainedVariance(), calibrated[2], bounds={"wide": pair})


def test_bounds_that_leave_no_rank_are_explained(calibrated) -> None:  # type: ignore[no-untyped-def]
    _, _, spaces = calibrated
    with pytest.raises(ValueError, match=r"bounds leave no rank for 'again': no multiple of 8 in \[33, 39\]"):
        choose_ranks(lro.ParameterBudget(0.5, "uniform"), spaces, bounds={"again": (33, 39)})
    with pytest.raises(ValueError, match="bounds: 'nothing' matches none"):
        choose_ranks(lro.ParameterBudget(0.5, "uniform"), spaces, bounds={"nothing": (0, 8)})
    with pytest.raises(ValueError, match="cannot be met"):
        choose_ranks(lro.ParameterBudget(0.2, "uniform"), spaces, bounds={"wide": (40, None)})


def test_policies_go_to_json_and_back() -> None:
    config = lro.CompressionConfig(lro.FlopBudget(0.4, "loss"), projection="loss")
    assert lro.CompressionConfig.from_json(config.to_json()) == config
    bounded = lro.CompressionConfig(bounds={"re:.*": (8, None), "head": (0, 16)})
    assert lro.CompressionConfig.from_json(bounded.to_json()) == bounded
