"""Reconstruction with token weights: unusual losses, batches and models."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.calibration import Moments
from lowrank_ops.calibration.call_weights import call_weights
from lowrank_ops.calibration.token_weights import add_weighted
from lowrank_ops.models.running import call_model
from tests.reconstruction.models import assert_same, reconstruct
from tests.reconstruction.test_token_weights import by_loss, cubed


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_refused(factor: float) -> None:
    """NaN makes every gradient NaN, inf makes the last layer's inf."""
    model, batches = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), [torch.randn(4, 5, 6)] * 2
    factors, statistics = by_loss(model, batches, None)
    with pytest.raises(
        lro.NonFiniteActivationError, match=r"layer '0': its output gradient holds NaN or inf in batch 0 "
    ):
        reconstruct(
            model, factors, batches, statistics=statistics, sensitivity=lambda y, batch: cubed(y, batch) * factor
        )


class Routed(nn.Module):
    """Batches of even and odd length use different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.odd, self.even = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(x) if x.shape[1] % 2 else self.even(x)


def test_a_batch_that_reaches_only_other_layers() -> None:
    model, batches = Routed().double(), [torch.randn(3, length, 6).double() for length in (5, 4, 7)]
    factors, statistics = by_loss(model, batches, None)
    factors = {"odd": factors["odd"]}
    arguments: dict[str, Any] = {"statistics": statistics, "sensitivity": cubed, "ridge": 0.1}
    found = reconstruct(model, factors, batches, **arguments)
    assert_same(found, reconstruct(model, factors, batches[::2], **arguments), 1e-7, 1e-7)


class TwoTexts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layers(x)[mask]


@pytest.mark.parametrize("second", [7, 5])
@pytest.mark.parametrize("sensitivity", [None, cubed])
def test_every_call_of_the_model_has_its_own_mask(sensitivity: Any, second: int) -> None:
    """Queries and passages: two calls in one forward=, same as batches with one call each."""
    texts = [
        {"x": torch.randn(3, length, 6).double(), "mask": torch.arange(length) < torch.randint(2, length + 1, (3, 1))}
        for _ in range(3)
        for length in (7, second)
    ]
    model = TwoTexts().double()
    factors, statistics = by_loss(model, texts, "mask")
    arguments: dict[str, Any] = {
        "statistics": statistics, "sensitivity": sensitivity, "mask": "mask", "ridge": 1e-3,
    }  # fmt: skip
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    found = reconstruct(
        model, factors, pairs, forward=lambda model, pair: torch.cat([model(**text) for text in pair]), **arguments
    )
    assert_same(found, reconstruct(model, factors, texts, **arguments), 1e-7, 1e-7)


class Watched(nn.Module):
    """Counts the graphs of earlier forwards that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.graphs: list[weakref.ref[nn.Module]] = []
        self.alive: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.alive.append(sum(graph() is not None for graph in self.graphs))
        y = self.layers(x)
        mark = nn.Module()
        assert y.grad_fn is not None
        y.grad_fn.metadata["mark"] = mark  # lives as long as the node
        self.graphs.append(weakref.ref(mark))
        return y


def test_no_graph_is_kept_for_the_next_batch() -> None:
    model = Watched()
    layers: dict[str, nn.Module] = {"layers.1": model.layers[1]}
    call_weights(
        model, layers, [torch.randn(3, 4, 6) for _ in range(3)], cubed, mask=None, forward=call_model, progress=False
    )
    assert len(model.graphs) == 3 and model.alive == [0, 0, 0]


def test_random_states_of_other_gpus_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model, batches = nn.Sequential(nn.Linear(6, 6)), [torch.randn(3, 4, 6)]
    call_weights(model, {"0": model[0]}, batches, "output", mask=None, forward=call_model, progress=False)
    assert not seeded


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("at_a_time", [1 << 24, 5000])
def test_means_are_summed_in_the_dtype_of_the_sums(
    at_a_time: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean a hundred times the deviation: its square, off by 1e-5, would be a tenth of the variance."""
    monkeypatch.setattr("lowrank_ops.calibration.token_weights.MAX_ELEMENTS", at_a_time)
    rows, weights = 100 + torch.randn(50_000, 6), 2 * torch.rand(50_000, groups)
    shape = (6,) if groups == 1 else (groups, 6 // groups)
    sums = Moments(torch.zeros(*shape, shape[-1]).double(), torch.zeros(shape).double())
    add_weighted(sums, rows, weights)
    expected = (rows.double().view(-1, groups, 6 // groups) * weights.double().unsqueeze(-1)).sum(0).view(shape)
    torch.testing.assert_close(sums.total, expected, rtol=1e-8, atol=0)
