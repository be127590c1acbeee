"""Rank policies: explained variance, parameter budgets, ranks by hand, precedence and errors."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.ranks import choose_ranks
from lowrank_ops.ranks.allocation import _by_share
from lowrank_ops.ranks.costs import Option, dense_parameters, lowrank_parameters, stored_rank
from lowrank_ops.subspaces import layer_subspaces


@pytest.fixture(scope="module")
def spaces():
    """Six layers of different shapes: 'layers.0' ... 'layers.4' and 'head', which is too small to gain."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            widths = [96, 128, 64, 192, 96, 64]
            self.layers = nn.ModuleList(nn.Linear(a, b, bias=b != 64) for a, b in pairwise(widths))
            self.head = nn.Linear(64, 6)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.head(x)

    model = Model()
    x = torch.randn(600, 12) @ torch.randn(12, 96)
    layers = {fqn: module for fqn, module in model.named_modules() if isinstance(module, nn.Linear)}
    return layer_subspaces(layers, lro.calibrate(model, [x]))


def spent(spaces, ranks):
    return sum(
        dense_parameters(space) if ranks[fqn] is None else lowrank_parameters(space, ranks[fqn])
        for fqn, space in spaces.items()
    )


@pytest.mark.parametrize(("rank", "stored"), [(0, 8), (1, 8), (8, 8), (9, 16), (64, 64)])
def test_stored_ranks_are_multiples_of_8(rank, stored):
    assert stored_rank(rank) == stored


def test_parameters_are_those_of_the_layers(spaces):
    dense = nn.Linear(96, 128)
    assert dense_parameters(spaces["layers.0"]) == sum(p.numel() for p in dense.parameters())
    assert lowrank_parameters(spaces["layers.0"], 10) == sum(
        parameter.numel() for parameter in lro.LowRankLinear(96, 128, 10).parameters()
    )
    assert lowrank_parameters(spaces["layers.1"], 8) == 8 * (128 + 64) + 64  # centering gives it a bias


# --- explained variance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_explained_variance_takes_the_utilized_rank(spaces, threshold):
    ranks = choose_ranks(lro.ExplainedVariance(threshold), spaces)
    assert list(ranks) == list(spaces) and any(ranks.values())
    for fqn, space in spaces.items():
        expected = min(space.input.rank_at(threshold), space.output.rank_at(threshold))
        saves = lowrank_parameters(space, expected) < dense_parameters(space)
        assert ranks[fqn] == (expected if saves else None)


def test_layers_past_break_even_stay_dense(spaces):
    assert choose_ranks(lro.ExplainedVariance(0.5), spaces)["head"] is None


# --- budgets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "variance"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_budgets_are_met_from_below(spaces, fraction, allocation):
    ranks = choose_ranks(lro.ParameterBudget(fraction, allocation), spaces)
    total = sum(map(dense_parameters, spaces.values()))
    assert 0.99 * fraction * total - 1400 < spent(spaces, ranks) <= fraction * total  # the smallest step takes 1,280
    for fqn, rank in ranks.items():
        assert rank is None or (rank % 8 == 0 and lowrank_parameters(spaces[fqn], rank) < dense_parameters(spaces[fqn]))


@pytest.mark.parametrize("allocation", ["uniform", "variance"])
def test_budgets_are_met_to_one_percent_where_steps_are_small(allocation):
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))
    covariances = lro.calibrate(model, [torch.randn(300, 256)])
    spaces = layer_subspaces(dict(model.named_children()), covariances)
    total = sum(map(dense_parameters, spaces.values()))
    for fraction in (0.25, 0.5, 0.75):
        used = spent(spaces, choose_ranks(lro.ParameterBudget(fraction, allocation), spaces))
        assert (fraction - 0.01) * total <= used <= fraction * total


def test_the_whole_budget_keeps_everything_dense(spaces):
    for allocation in ("uniform", "variance"):
        assert set(choose_ranks(lro.ParameterBudget(1.0, allocation), spaces).values()) == {None}


def test_uniform_gives_similar_shares(spaces):
    ranks = choose_ranks(lro.ParameterBudget(0.5, "uniform"), spaces)
    shares = [
        lowrank_parameters(spaces[fqn], rank) / dense_parameters(spaces[fqn])
        for fqn, rank in ranks.items()
        if rank is not None
    ]
    assert max(shares) - min(shares) < 0.25  # a step is up to 0.17 of the smallest layer


def test_variance_keeps_more_variance_than_uniform(spaces):
    def kept(allocation):
        ranks = choose_ranks(lro.ParameterBudget(0.3, allocation), spaces)
        return sum(1.0 if rank is None else float(spaces[fqn].output.explained(rank)) for fqn, rank in ranks.items())

    assert kept("variance") > kept("uniform")


def test_a_budget_that_cannot_be_met_is_an_error(spaces):
    with pytest.raises(ValueError, match=r"fraction=0\.01 cannot be met: .* take \d+ .* only \d+ are available"):
        choose_ranks(lro.ParameterBudget(0.01, "uniform"), spaces)
    with pytest.raises(ValueError, match=r"fraction=0\.25 cannot be met.*-\d+ are available"):
        choose_ranks(lro.ParameterBudget(0.25, "uniform"), spaces, {"re:layers.*": None})


def test_overrides_count_in_the_budget(spaces):
    overrides = {"layers.0": None, "layers.2": 8}
    ranks = choose_ranks(lro.ParameterBudget(0.6, "uniform"), spaces, overrides)
    assert (ranks["layers.0"], ranks["layers.2"]) == (None, 8)
    assert spent(spaces, ranks) <= 0.6 * sum(map(dense_parameters, spaces.values()))


# --- ranks by hand ----------------------------------------------------------------------------------------------


def test_ranks_by_hand_leave_the_others_dense(spaces):
    ranks = choose_ranks(lro.Ranks({"layers.0": 5, "re:layers.[23]": 7}), spaces)
    assert ranks == {**dict.fromkeys(spaces), "layers.0": 5, "layers.2": 7, "layers.3": 7}


@pytest.mark.parametrize(
    "overrides",
    [
        {"layers.0": 3, "re:layers.*": 4, "re:.*[12]": 5, "head": None},
        {"re:layers.*": 4, "re:.*[12]": 5, "head": None, "layers.0": 3},
    ],
)
def test_names_precede_patterns_and_later_patterns_earlier(spaces, overrides):
    ranks = choose_ranks(lro.ExplainedVariance(0.99), spaces, overrides)
    assert ranks == {"layers.0": 3, "layers.1": 5, "layers.2": 5, "layers.3": 4, "layers.4": 4, "head": None}
    earlier = choose_ranks(lro.Ranks({}), spaces, {"re:.*[12]": 5, "re:layers.*": 4})
    assert earlier["layers.1"] == 4


def test_a_pattern_must_match_the_whole_name(spaces):
    with pytest.raises(ValueError, match=r"overrides: 're:layers' matches none of the layers considered: layers\.0, "):
        choose_ranks(lro.Ranks({}), spaces, {"re:layers": 4})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers.9": 4}, r"'layers\.9' matches none of the layers considered: layers\.0, layers\.1"),
        ({"re:(": 4}, r"'re:\(' is not a regular expression: missing \)"),
        ({"head": 7}, r"overrides\['head'\] must be None or an integer in \[0, 6\]; got 7"),
        ({"head": -1}, r"must be None or an integer in \[0, 6\]; got -1"),
        ({"head": 2.0}, r"must be None or an integer in \[0, 6\]; got 2\.0"),
        ({"head": True}, r"must be None or an integer in \[0, 6\]; got True"),
    ],
)
def test_bad_overrides(spaces, overrides, message):
    with pytest.raises(ValueError, match=message):
        choose_ranks(lro.ExplainedVariance(), spaces, overrides)
    with pytest.raises(ValueError, match=message.replace("overrides", "ranks")):
        choose_ranks(lro.Ranks(overrides), spaces)


def test_an_unknown_policy_is_an_error(spaces):
    with pytest.raises(TypeError, match="rank policy int is not known"):
        choose_ranks(64, spaces)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [lambda b: nn.Linear(48, 32, bias=b), lambda b: nn.Conv2d(8, 32, 2, groups=2, bias=b)])
def test_costs_are_the_parameters_that_layers_have(make, bias, centered):
    model = nn.Sequential(make(bias))
    batch = torch.randn(64, 48) if isinstance(model[0], nn.Linear) else torch.randn(16, 8, 4, 4)
    covariances = lro.calibrate(model, [batch])
    space = layer_subspaces({"0": model[0]}, covariances, centered=centered)["0"]
    assert dense_parameters(space) == sum(part.numel() for part in model.parameters())
    lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"0": 5}), centered=centered))
    assert lowrank_parameters(space, 5) == sum(part.numel() for part in model.parameters())


@pytest.mark.parametrize("budget", [30, 150, 151, 179, 270, 299, 300])
def test_uniform_takes_the_largest_common_share(budget) -> None:
    options = {"a": [Option(i, 10 * i) for i in range(1, 11)], "b": [Option(i, 20 * i) for i in range(1, 11)]}
    taken = _by_share(options, budget)
    assert taken == {"a": budget // 30 - 1, "b": budget // 30 - 1}
