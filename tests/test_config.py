"""Configurations: to JSON and back, and what is refused."""

import json

import pytest

import lowrank_ops as lro

CONFIGS = [
    lro.CompressionConfig(),
    lro.CompressionConfig(lro.ExplainedVariance(0.9), "utilized", centered=False),
    lro.CompressionConfig(lro.ExplainedVariance(1)),
    lro.CompressionConfig(lro.ParameterBudget(0.5, "variance"), "weight", overrides={"a.b": 8, "re:c.*": None}),
    lro.CompressionConfig(lro.Ranks({"re:.*": 16}), "input"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config):
    text = config.to_json()
    assert lro.CompressionConfig.from_json(text) == config
    assert json.loads(text)["version"] == 1
    assert lro.CompressionConfig.from_dict(config.to_dict()) == config


def test_the_json_of_a_budget():
    assert lro.CompressionConfig(lro.ParameterBudget(0.5), overrides={"a": None}).to_dict() == {
        "version": 1,
        "rank": {"policy": "parameter_budget", "fraction": 0.5, "allocation": "uniform"},
        "projection": "output",
        "centered": True,
        "overrides": {"a": None},
    }


def changed(**changes):
    values = {**lro.CompressionConfig().to_dict(), **changes}
    return {key: value for key, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(version=2), r"version must be 1; got 2\. Update lowrank_ops"),
        (changed(version=None), "version must be 1; got None"),
        (changed(rank={"policy": "magic"}), "policy must be one of 'explained_variance', .*; got 'magic'"),
        (changed(rank={"threshold": 0.9}), "the field 'policy' is missing"),
        (changed(rank=None), "the field 'rank' is missing"),
        (changed(rank={"policy": "parameter_budget"}), "not a compression configuration of version 1: .*'fraction'"),
        (changed(rank={"policy": "ranks", "ranks": {}, "extra": 1}), "unexpected keyword argument 'extra'"),
        (changed(rank=7), "not a compression configuration of version 1"),
        (changed(colour="red"), "unexpected keyword argument 'colour'"),
        (changed(projection="svd"), "projection must be one of 'output', .*'input', 'weight'; got 'svd'"),
        (changed(centered="no"), "centered must be a bool; got 'no'"),
        ([1], "a compression configuration must be a JSON object; got list"),
    ],
)  # fmt: skip
def test_bad_json_is_a_value_error(values, message):
    with pytest.raises(ValueError, match=message):
        lro.CompressionConfig.from_json(json.dumps(values))


def test_text_that_is_no_json():
    with pytest.raises(ValueError, match="Expecting value"):
        lro.CompressionConfig.from_json("rank: 3")


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan"), "0.5", None, True])
def test_shares_lie_between_0_and_1(share):
    with pytest.raises(ValueError, match=r"threshold must be a number in \(0, 1\]; got "):
        lro.ExplainedVariance(share)
    with pytest.raises(ValueError, match=r"fraction must be a number in \(0, 1\]; got "):
        lro.ParameterBudget(share)


def test_bad_choices():
    with pytest.raises(ValueError, match="allocation must be one of 'uniform', 'energy', 'loss'; got 'greedy'"):
        lro.ParameterBudget(0.5, "greedy")
    with pytest.raises(
        TypeError, match="rank must be one of ExplainedVariance, ParameterBudget, FlopBudget, LatencyBudget, Ranks, "
    ):
        lro.CompressionConfig(rank=64)
    with pytest.raises(AttributeError):
        lro.CompressionConfig().projection = "weight"
