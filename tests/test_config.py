"""Configurations: to JSON and back, defaults resolved, invalid values refused."""

import json

import pytest

import lowrank_ops as lro

CONFIGS = [
    lro.CompressionConfig(),
    lro.CompressionConfig(16),
    lro.CompressionConfig(lro.ExplainedVariance(0.9), "utilized", centered=False),
    lro.CompressionConfig(lro.ExplainedVariance(1)),
    lro.CompressionConfig(lro.ParameterBudget(0.5, "variance"), "weight", overrides={"a.b": 8, "re:c.*": None}),
    lro.CompressionConfig(lro.FlopBudget(0.4, "loss"), projection="loss", reconstruction="sequential"),
    lro.CompressionConfig(lro.Ranks({"re:.*": 16}), "input"),
    lro.CompressionConfig(bounds={"re:.*": (8, None), "head": (0, 16)}),
    lro.CompressionConfig(lro.FlopBudget(0.5), pivoted=True),
    lro.CompressionConfig(lro.FlopBudget(0.5), group=True),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config):
    text = config.to_json()
    assert lro.CompressionConfig.from_json(text) == config
    assert json.loads(text)["version"] == 2
    assert lro.CompressionConfig.from_dict(config.to_dict()) == config


def test_json_of_a_budget():
    assert lro.CompressionConfig(lro.ParameterBudget(0.5), overrides={"a": None}).to_dict() == {
        "version": 2,
        "rank": {"policy": "parameter_budget", "fraction": 0.5, "allocation": None},
        "projection": None,
        "centered": True,
        "overrides": {"a": None},
        "reconstruction": None,
        "bounds": {},
        "pivoted": False,
        "group": False,
        "channels": False,
    }


def test_version_1_is_read():
    old = {
        "version": 1,
        "rank": {"policy": "parameter_budget", "fraction": 0.5, "allocation": "energy"},
        "projection": "loss",
        "centered": True,
        "overrides": {"a": None},
    }
    expected = lro.CompressionConfig(lro.ParameterBudget(0.5, "variance"), "loss", overrides={"a": None})
    assert lro.CompressionConfig.from_dict(old) == expected
    refit = lro.CompressionConfig.from_dict({**old, "refit": "sequential", "bounds": {"b": [8, None]}})
    assert refit.reconstruction == "sequential" and refit.bounds == {"b": (8, None)}


def test_version_1_without_a_projection_keeps_its_defaults():
    old = {"version": 1, "rank": {"policy": "flop_budget", "fraction": 0.5}}
    config = lro.CompressionConfig.from_dict(old)
    assert config.projection == "output" and config.rank == lro.FlopBudget(0.5, "uniform")


def changed(**changes):
    values = {**lro.CompressionConfig().to_dict(), **changes}
    return {key: value for key, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(version=3), r"version must be 1 or 2; got 3\. Update lowrank_ops"),
        (changed(version=None), "version must be 1 or 2; got None"),
        (changed(rank={"policy": "magic"}), "policy must be one of 'explained_variance', .*; got 'magic'"),
        (changed(rank={"threshold": 0.9}), "the field 'policy' is missing"),
        (changed(rank=None), "the field 'rank' is missing"),
        (changed(rank={"policy": "parameter_budget"}), "not a compression configuration of version 2: .*'fraction'"),
        (changed(rank={"policy": "ranks", "ranks": {}, "extra": 1}), "unexpected keyword argument 'extra'"),
        (changed(rank=7), "not a compression configuration of version 2"),
        (changed(colour="red"), "unexpected keyword argument 'colour'"),
        (changed(refit="sequential"), "unexpected keyword argument 'refit'"),
        (changed(projection="svd"), "projection must be one of None, 'output', .*'input', 'weight'; got 'svd'"),
        (changed(centered="no"), "centered must be a bool; got 'no'"),
        ([1], "a compression configuration must be a JSON object; got list"),
    ],
)  # fmt: skip
def test_bad_json_is_a_value_error(values, message):
    with pytest.raises(ValueError, match=message):
        lro.CompressionConfig.from_json(json.dumps(values))


def test_text_that_is_not_json_is_a_value_error():
    with pytest.raises(ValueError, match="Expecting value"):
        lro.CompressionConfig.from_json("rank: 3")


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan"), "0.5", None, True])
def test_shares_lie_between_0_and_1(share):
    error = ValueError if type(share) in (int, float) else TypeError
    with pytest.raises(error, match=r"threshold must be a number in \(0, 1\]; got "):
        lro.ExplainedVariance(share)
    with pytest.raises(error, match=r"fraction must be a number in \(0, 1\]; got "):
        lro.ParameterBudget(share)


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="allocation must be one of None, 'uniform', 'variance', 'loss'; got 'greedy'"):
        lro.ParameterBudget(0.5, "greedy")
    with pytest.raises(
        TypeError, match=r"rank must be an int or one of ExplainedVariance, ParameterBudget, .*; got '64'"
    ):
        lro.CompressionConfig(rank="64")
    with pytest.raises(ValueError, match="rank must be a positive integer; got 0"):
        lro.CompressionConfig(rank=0)
    with pytest.raises(AttributeError):
        lro.CompressionConfig().projection = "weight"


def test_a_config_is_made_from_a_policy_or_an_int():
    budget = lro.ParameterBudget(0.3)
    config = lro.CompressionConfig(budget, "weight")
    assert lro.CompressionConfig.of(config) is config
    assert lro.CompressionConfig.of(budget) == lro.CompressionConfig(budget)
    assert lro.CompressionConfig.of(16) == lro.CompressionConfig(16)
    assert lro.CompressionConfig.of(None) == lro.CompressionConfig(lro.ParameterBudget(0.5))
    for value in (True, 0.5, "loss", {"rank": 3}):
        with pytest.raises(TypeError, match=r"config must be a CompressionConfig, a rank policy .*; got "):
            lro.CompressionConfig.of(value)


@pytest.mark.parametrize(
    ("some", "every", "projection", "allocation"),
    [(False, False, "output", "uniform"), (True, False, "loss", "uniform"), (True, True, "loss", "loss")],
)
def test_open_choices_follow_the_output_gradients(some, every, projection, allocation):
    for policy in (lro.ParameterBudget, lro.FlopBudget):
        config = lro.CompressionConfig(policy(0.5)).resolved(some_gradients=some, all_gradients=every)
        assert config == lro.CompressionConfig(policy(0.5, allocation), projection)
    chosen = lro.CompressionConfig(lro.ParameterBudget(0.5, "variance"), "input")
    assert chosen.resolved(some_gradients=some, all_gradients=every) == chosen
