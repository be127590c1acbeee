"""What spaces hold: decomposed once, released after use, and refused if the weight has changed meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
import lowrank_ops.compress
from lowrank_ops.factors import factorize
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces


class Net(nn.Module):
    """A square and a tall layer with a common input, and a wide one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 96, bias=False), nn.Linear(160, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], -1).relu())


@pytest.fixture
def model() -> Net:
    return Net().double()


@pytest.fixture
def covariances(model: Net) -> lro.Covariances:
    return lro.calibrate(model, [torch.randn(600, 64).double()], sensitivity="output")


@pytest.fixture
def spaces(model: Net, covariances: lro.Covariances) -> dict[str, LayerSubspaces]:
    return layer_subspaces(dict(model.named_children()), covariances)


def matrices(space: LayerSubspaces) -> list[str]:
    """Names of the float64 matrices that a layer's spaces hold besides the weight and the statistics."""
    found = []
    objects: list[tuple[str, object]] = [("", space)]
    while objects:
        path, holder = objects.pop()
        for name, value in vars(holder).items():
            if isinstance(value, Tensor) and value.dim() > 1 and name != "_weight":
                found.append(f"{path}.{name}")
            elif name in ("input", "output", "loss", "weight_output", "subspace", "_input_space") and value:
                objects.append((f"{path}.{name}", value))
    return found


@pytest.mark.parametrize("projection", ["output", "loss", "utilized", "input", "weight"])
def test_compression_leaves_no_matrices_over_its_bound(
    model: Net,
    covariances: lro.Covariances,
    spaces: dict[str, LayerSubspaces],
    projection: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lowrank_ops.compress, "MAX_HELD_BYTES", 0)
    config = lro.CompressionConfig(lro.Ranks({"a": 8, "b": 8}), projection=projection)
    lro.compress_(model, covariances, config, subspaces=spaces)
    for fqn in ("a", "b"):
        assert matrices(spaces[fqn]) == [] and spaces[fqn].held_bytes() == 0
    _ = spaces["a"].output.basis
    assert ".output._basis" in matrices(spaces["a"]) and spaces["a"].held_bytes() == 64 * 64 * 8


@pytest.mark.parametrize("projection", ["output", "loss"])
def test_other_ranks_decompose_nothing_again(
    spaces: dict[str, LayerSubspaces], projection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {fqn: factorize(space, 4, projection) for fqn, space in spaces.items()}
    for space in spaces.values():
        space.release(directions=False)

    def refuse(*arguments: object) -> None:
        raise AssertionError("decomposed again")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    for fqn, space in spaces.items():
        torch.testing.assert_close(factorize(space, 8, projection).up[:, :4], first[fqn].up, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("projection", "inputs", "outputs"), [("output", 0, 2), ("loss", 0, 2), ("utilized", 1, 2), ("input", 1, 0)]
)
@pytest.mark.parametrize("policy", [3, lro.ParameterBudget(0.5, "uniform")])
def test_each_matrix_is_decomposed_once(
    model: Net,
    covariances: lro.Covariances,
    monkeypatch: pytest.MonkeyPatch,
    policy: int | lro.ParameterBudget,
    projection: str,
    inputs: int,
    outputs: int,
) -> None:
    """Two layers, which share their input; the third one stays dense."""
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix, **how: calls.append(matrix.shape) or eigh(matrix, **how))
    report = lro.compress_(model, covariances, lro.CompressionConfig(policy, projection=projection))
    assert [layer.fqn for layer in report.layers if layer.rank is not None] == ["a", "b"]
    assert len(calls) == inputs + outputs


def test_full_rank_inputs_need_no_decomposition_for_tall_layers(spaces: dict[str, LayerSubspaces]) -> None:
    factorize(spaces["b"], 4, "loss")
    assert not spaces["a"].input.is_decomposed and spaces["b"].input is spaces["a"].input


def test_a_changed_weight_is_refused(
    model: Net, covariances: lro.Covariances, spaces: dict[str, LayerSubspaces]
) -> None:
    with torch.no_grad():
        model.a.weight += 1
    with pytest.raises(ValueError, match="layer 'a': its weight was changed after its subspaces were computed"):
        lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"a": 8})), subspaces=spaces)


def test_progress_shows_the_decomposition(
    model: Net, covariances: lro.Covariances, capsys: pytest.CaptureFixture[str]
) -> None:
    lro.utilization(model, covariances, progress=True)
    assert "decomposing: 100%" in capsys.readouterr().err
    lro.compress_(model, covariances, lro.ParameterBudget(0.4, "variance"), progress=True)
    shown = capsys.readouterr().err
    assert "decomposing: 100%" in shown and "factorizing: 100%" in shown
