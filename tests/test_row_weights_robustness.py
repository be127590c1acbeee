"""Weighted rows where models are unusual: empty batches, narrow dtypes, autocast, checkpointing, inference tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def cubed(output: Tensor, batch: object) -> Tensor:
    return output.double().pow(3).sum()


def check_same(found: lro.Covariances, expected: lro.Covariances, tolerance: float = 1e-12) -> None:
    assert list(found) == list(expected) and list(found.sensitivities) == list(expected.sensitivities)
    for fqn, gradient in expected.sensitivities.items():
        ours = found.sensitivities[fqn]
        for mine, theirs in ((found[fqn], expected[fqn]), (ours, gradient), (ours.weighted, gradient.weighted)):
            assert mine.count == theirs.count
            torch.testing.assert_close(mine.second_moment, theirs.second_moment, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(mine.total, theirs.total, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("groups", [1, 2])
def test_batches_without_an_image(groups: int, side: str) -> None:
    model, images = nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups)).double(), torch.randn(2, 4, 6, 6).double()
    found = lro.calibrate(model, [images[:0], images], sensitivity=cubed, side=side)
    check_same(found, lro.calibrate(model, [images], sensitivity=cubed, side=side))


def test_weights_do_not_overflow_float16() -> None:
    """A row of all weight among 4096 is 64 times as long."""
    model, x = nn.Sequential(nn.Linear(8, 8)).half(), torch.zeros(1, 4096, 8).half()
    x[0, 0] = 2000
    weighted = (
        lro.calibrate(model, [x], sensitivity=lambda output, batch: output[0, 0].float().sum())
        .sensitivities["0"]
        .weighted
    )
    torch.testing.assert_close(weighted.second_moment, torch.full((8, 8), 4096 * 2000.0**2).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_rounded_by_autocast_around_the_loss(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), 30 * torch.randn(4, 50, 8)

    def observed(loss_under_autocast: bool) -> lro.Covariances:
        with lro.calibration(model, sensitivity=True) as covariances:
            with torch.autocast("cpu", dtype):
                loss = model(x).float().square().sum()
            with torch.autocast("cpu", dtype, enabled=loss_under_autocast):
                covariances.observe(loss, samples=4)
        return covariances

    check_same(observed(True), observed(False))


class Overwriting(nn.Module):
    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer, self.change = nn.Linear(4, 4), change

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        with torch.inference_mode():
            self.change(x)
        return y


def test_inference_tensors_may_be_changed_afterwards() -> None:
    """They count no versions, so nothing could tell."""
    with torch.inference_mode():
        x = torch.randn(3, 5, 4).double()
    model = Overwriting(Tensor.zero_).double().requires_grad_(False)
    plain = Overwriting(Tensor.size).double().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    expected = lro.calibrate(plain, [x], sensitivity=cubed)
    check_same(lro.calibrate(model, [x], sensitivity=cubed), expected)
