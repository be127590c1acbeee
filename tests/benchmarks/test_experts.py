"""The study of experts: factors of equal size, and the order of their errors."""

from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import experts
from benchmarks.accuracy.results import Results

pytest.importorskip("transformers")


def layer(out_features: int = 24, in_features: int = 16) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and moments of 6 experts, of which some see more rows than others."""
    torch.manual_seed(0)
    weights = {f"e{index}": torch.randn(out_features, in_features, dtype=torch.float64) for index in range(6)}
    rows = {fqn: torch.randn(50 * (1 + index**2), in_features).double() for index, fqn in enumerate(weights)}
    scale = torch.logspace(0, -2, in_features, dtype=torch.float64)
    return weights, {fqn: (part * scale).T @ (part * scale) for fqn, part in rows.items()}


@pytest.mark.parametrize("method", experts.METHODS)
def test_factors_are_within_the_budget(method: str) -> None:
    weights, moments = layer()
    found = experts.METHODS[method](weights, moments, 0.5)
    ranks = [int(torch.linalg.matrix_rank(weight)) for weight in found.values()]
    held = sum(ranks) * (24 + 16)
    if "input" in method:
        held = 16 * max(ranks) + sum(24 * rank for rank in ranks)
        assert torch.linalg.matrix_rank(torch.cat(list(found.values()))) == max(ranks)
    elif "output" in method:
        held = 24 * max(ranks) + sum(16 * rank for rank in ranks)
        assert torch.linalg.matrix_rank(torch.cat(list(found.values()), 1)) == max(ranks)
    assert 0.4 * 6 * 24 * 16 < held <= 0.5 * 6 * 24 * 16


def test_ranks_of_their_own_lose_no_more_than_one_rank() -> None:
    weights, moments = layer()
    lost = {}
    for method in ("own basis, one rank", "own basis, own ranks"):
        found = experts.METHODS[method](weights, moments, 0.5)
        lost[method] = sum(experts._square(weights[fqn] - found[fqn], moments[fqn]) for fqn in weights)
    assert lost["own basis, own ranks"] < lost["own basis, one rank"]


def test_every_case_is_measured_and_the_model_is_dense_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "BUDGETS", (0.5,))
    model = experts.build(4, 16, 2).eval()
    data = experts.batches(["some text about experts " * 40], 1, seed=0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    results = Results(tmp_path / "experts.json")
    experts.compare(model, "4 of 16", data, data, results)
    cases = {(row.get("projection"), row.get("budget"), row["method"]) for row in results.rows}
    assert len(cases) == 1 + len(experts.METHODS) * 2
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
