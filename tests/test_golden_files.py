"""Files of earlier format versions, written once and never again: later versions must read the same values from them.

tests/golden/README.md holds the scripts that wrote them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.latencies import LatencyCurve, LayerLatencies

GOLDEN = Path(__file__).parent / "golden"


class Doubled(nn.Linear):
    """A Linear that overrides forward, which calibration skips."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Net(nn.Module):
    """A grouped Conv2d, two Linears that share an input, a tied head, a skipped and an unreached layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Linear(8, 5)
        self.right = nn.Linear(8, 5, bias=False)
        self.doubled = Doubled(5, 5)
        self.unused = nn.Linear(3, 3)
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4, 6, 6) -> (batch, 9, 7)
        tokens = self.norm(self.conv(x)).flatten(2).mT.relu()
        return self.head(self.doubled(self.left(tokens) * self.right(tokens).sigmoid()))


def layer_values(covariances: lro.Covariances, fqn: str) -> dict[str, Any]:
    """The sums of one layer as expected_v1.json names them: the only place that knows the fields of Covariances."""
    layer = covariances[fqn]
    parts = ("activations", "output_gradients", "token_weighted")
    moments = {name: getattr(layer, name) for name in parts}
    values: dict[str, Any] = {name: None if part is None else sums(part) for name, part in moments.items()}
    return values | {"side": layer.side}


def share_activations(covariances: lro.Covariances, first: str, second: str) -> bool:
    return covariances[first].activations is covariances[second].activations


def sums(moments: Any) -> dict[str, Any]:
    shift = {} if moments.shift is None else {"shift": moments.shift.tolist()}
    return shift | {
        "dtype": str(moments.second_moment.dtype),
        "count": moments.count,
        "total": moments.total.tolist(),
        "second_moment": moments.second_moment.tolist(),
    }


# The configurations in tests/golden/configs_v1, by file name.
LATENCIES = LayerLatencies(
    "cpu x86_64",
    2,
    {
        "Linear 8 -> 5, 4 x 9 x 8, float32": LatencyCurve(3e-05, (8,), (2.5e-05,)),
        "Linear 64 -> 64, 4 x 64, float32": LatencyCurve(4e-05, (8, 16), (2e-05, 3e-05)),
    },
    {"left": {"Linear 8 -> 5, 4 x 9 x 8, float32": 1}, "right": {"Linear 64 -> 64, 4 x 64, float32": 2}},
)
OUTPUT = {"projection": "output"}  # the default of version 1
CONFIGS = {
    "default": lro.CompressionConfig(lro.ExplainedVariance(0.99), **OUTPUT),
    "explained_variance": lro.CompressionConfig(lro.ExplainedVariance(0.95), projection="utilized", centered=False),
    "parameter_budget_uniform": lro.CompressionConfig(lro.ParameterBudget(0.5, "uniform"), **OUTPUT),
    "parameter_budget_energy": lro.CompressionConfig(lro.ParameterBudget(0.25, "variance"), projection="input"),
    "parameter_budget_loss": lro.CompressionConfig(
        lro.ParameterBudget(0.75, "loss"), projection="loss", reconstruction="sequential"
    ),
    "flop_budget_energy": lro.CompressionConfig(
        lro.FlopBudget(0.5, "variance"),
        overrides={"head": None, "re:block.*": 4},
        bounds={"left": (1, 3), "re:r.*": (2, None)},
        **OUTPUT,
    ),
    "latency_budget_default": lro.CompressionConfig(lro.LatencyBudget(0.5, LATENCIES, "loss"), **OUTPUT),
    "latency_budget_uniform": lro.CompressionConfig(lro.LatencyBudget(0.9, LATENCIES, "uniform"), **OUTPUT),
    "latency_budget_energy": lro.CompressionConfig(
        lro.LatencyBudget(0.6, LATENCIES, "variance"), reconstruction="sequential", bounds={"left": (2, 5)}, **OUTPUT
    ),
    "ranks": lro.CompressionConfig(lro.Ranks({"left": 3, "re:blocks": 0}), projection="weight"),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((GOLDEN / "expected_v1.json").read_text())


@pytest.mark.parametrize("kind", ["input", "output", "unweighted", "activations"])
def test_covariances_of_version_1_load(expected: dict[str, Any], kind: str) -> None:
    name = f"covariances_v1_{kind}"
    covariances = lro.Covariances.load(GOLDEN / f"{name}.safetensors")
    assert list(covariances) == list(expected[name]["layers"]) == ["conv", "left", "right", "head"]
    assert list(covariances.unreached) == expected[name]["unreached"] == ["unused"]
    assert covariances.skipped == expected[name]["skipped"]
    for fqn in covariances:
        assert layer_values(covariances, fqn) == expected[name]["layers"][fqn], fqn


@pytest.mark.parametrize("version", [2, 3])
def test_covariances_of_later_versions_load(version: int) -> None:
    values = json.loads((GOLDEN / f"expected_covariances_v{version}.json").read_text())
    covariances = lro.Covariances.load(GOLDEN / f"covariances_v{version}.safetensors")
    assert {fqn: layer_values(covariances, fqn) for fqn in covariances} == values
    shifted = [fqn for fqn, layer in covariances.items() if layer.activations.shift is not None]
    assert ("conv" in shifted) == (version == 3)
    assert share_activations(covariances, "left", "right")


def test_golden_covariances_hold_what_their_names_say(expected: dict[str, Any]) -> None:
    def parts(kind: str) -> tuple[str, bool, bool]:
        values = expected[f"covariances_v1_{kind}"]["layers"]["left"]
        return values["side"], values["output_gradients"] is not None, values["token_weighted"] is not None

    assert parts("input") == ("input", True, True)
    assert parts("output") == ("output", True, True)
    assert parts("unweighted") == ("input", True, False)
    assert parts("activations") == ("input", False, False)


def test_layers_that_share_an_input_still_do() -> None:
    assert share_activations(lro.Covariances.load(GOLDEN / "covariances_v1_input.safetensors"), "left", "right")
    assert not share_activations(lro.Covariances.load(GOLDEN / "covariances_v1_output.safetensors"), "left", "right")


def test_covariances_of_version_1_compress() -> None:
    covariances = lro.Covariances.load(GOLDEN / "covariances_v1_input.safetensors")
    model = Net().eval()
    lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"left": 3}), projection="loss"))
    assert isinstance(model.left, lro.LowRankLinear) and model.left.rank == 3


def test_checkpoint_of_version_1_loads(expected: dict[str, Any]) -> None:
    values = expected["checkpoint_v1"]
    model = lro.load_pretrained(Net().eval(), GOLDEN / "checkpoint_v1")
    assert isinstance(model.conv, lro.LowRankConv2d) and model.conv.rank == 2
    assert isinstance(model.left, lro.LowRankLinear) and model.left.rank == 3
    assert isinstance(model.right, nn.Linear)
    assert model.head.weight is model.embedding.weight
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == values["state_dict"]
    torch.testing.assert_close(model(torch.tensor(values["input"])), torch.tensor(values["output"]))


def test_every_golden_configuration_is_compared() -> None:
    assert {path.stem for path in (GOLDEN / "configs_v1").iterdir()} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_of_version_1_loads(name: str) -> None:
    assert lro.CompressionConfig.from_json((GOLDEN / "configs_v1" / f"{name}.json").read_text()) == CONFIGS[name]


def test_latencies_of_version_1_load() -> None:
    assert LayerLatencies.load(GOLDEN / "latencies_v1.json") == LATENCIES
