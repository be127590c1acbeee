"""Weighted rows where models are unusual: empty batches, narrow dtypes, autocast, checkpointing, inference tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_ops as lro
from lowrank_ops.calibration import Moments
from lowrank_ops.factors import factorize
from lowrank_ops.subspaces import layer_subspaces


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def cubed(output: Tensor, batch: object) -> Tensor:
    return output.double().pow(3).sum()


def check_same(found: lro.Covariances, expected: lro.Covariances, tolerance: float = 1e-12) -> None:
    assert list(found) == list(expected) and list(found.sensitivities) == list(expected.sensitivities)
    for fqn, gradient in expected.sensitivities.items():
        ours = found[fqn].output_gradients
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


def test_patches_of_a_large_image_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    unfold = F.unfold

    def counted(*args: Any) -> Tensor:
        patches = unfold(*args)
        sizes.append(patches.numel())
        return patches

    monkeypatch.setattr("lowrank_ops.calibration.token_weights.MOST_ELEMENTS", 4000)
    monkeypatch.setattr("lowrank_ops.calibration.token_weights.F.unfold", counted)
    model = nn.Conv2d(4, 6, 3, padding=1)
    with lro.Calibrator(model, sensitivity=True) as covariances:
        loss = model(torch.randn(1, 4, 40, 30)).pow(3).sum()
        sizes.clear()  # of the op for the plain rows
        covariances.observe(loss, samples=1)
    assert sum(sizes) == 40 * 30 * 36 and max(sizes) <= 4000


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
        with lro.Calibrator(model, sensitivity=True) as covariances:
            with torch.autocast("cpu", dtype):
                loss = model(x).float().square().sum()
            with torch.autocast("cpu", dtype, enabled=loss_under_autocast):
                covariances.observe(loss, samples=4)
        return covariances

    check_same(observed(True), observed(False))


class Checkpointed(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.first, self.second, self.again = nn.Linear(4, 4), nn.Linear(4, 4), again

    def _block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)).exp()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(checkpoint(self._block, x, use_reentrant=False) if self.again else self._block(x))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
def test_rows_that_checkpointing_makes_again_count_once(side: str, frozen: bool) -> None:
    model = Checkpointed(True).double().requires_grad_(not frozen)
    plain = Checkpointed(False).double().requires_grad_(not frozen)
    plain.load_state_dict(model.state_dict())
    batches = [
        {"x": torch.randn(3, 5, 4).double().requires_grad_(), "mask": torch.arange(5) < torch.tensor([[5], [2], [3]])}
        for _ in range(2)
    ]
    found, expected = (lro.calibrate(m, batches, mask="mask", side=side, sensitivity=cubed) for m in (model, plain))
    assert found["first"].count == 20
    check_same(found, expected)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.strided)
        return torch.nested.to_padded_tensor(self.layer(rows), 0.0)


@pytest.mark.parametrize("frozen", [False, True])
def test_nested_tensors(frozen: bool) -> None:
    model, x = Nested().double().requires_grad_(not frozen), torch.randn(2, 3, 4).double()
    found = lro.calibrate(model, [x], sensitivity=cubed).sensitivities["layer"].weighted
    singles = lro.calibrate(model.layer, [x[:1], x[1:, :2]], sensitivity=cubed)
    expected = singles[""].token_weighted
    assert found.count == expected.count == 5
    torch.testing.assert_close(found.second_moment, expected.second_moment)
    torch.testing.assert_close(found.total, expected.total)


def test_a_frozen_encoder_is_seen_as_a_trainable_one_is() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double()
    batch = {
        "src": torch.randn(3, 5, 8).double(),
        "src_key_padding_mask": torch.arange(5) >= torch.tensor([[5], [2], [3]]),
    }

    def calibrated() -> lro.Covariances:
        with pytest.warns(UserWarning, match="MultiheadAttention"):
            return lro.calibrate(
                model,
                [batch],
                mask=lambda args, kwargs: ~kwargs["src_key_padding_mask"],
                sensitivity=lambda output, batch: output[~batch["src_key_padding_mask"]].pow(3).sum(),
            )

    trainable = calibrated()
    assert trainable["layers.0.linear1"].count == 10
    model.requires_grad_(False)
    check_same(calibrated(), trainable)
    assert torch.backends.mha.get_fastpath_enabled()


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


def test_nothing_is_kept_where_no_gradient_will_come(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr("lowrank_ops.calibration.recorder.KeptRows", lambda *given: kept.append(given))
    model = nn.Sequential(nn.Linear(4, 4))
    with (
        pytest.warns(UserWarning, match="was given no loss"),
        lro.Calibrator(model, side="output", sensitivity=True),
        torch.no_grad(),
    ):
        model(torch.randn(3, 4))
    assert not kept


def test_rows_are_let_go() -> None:
    """After the loss, and of forwards without one after the block."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    seen: list[weakref.ref[Tensor]] = []
    model[2].register_forward_pre_hook(lambda layer, args: seen.append(weakref.ref(args[0])))
    with lro.Calibrator(model, sensitivity=True) as covariances:
        loss = model(torch.randn(3, 4)).square().sum()
        covariances.observe(loss, samples=3, keep=True)
        covariances.observe(loss, samples=3)
        del loss
        gc.collect()
        assert seen[0]() is None
        model(torch.randn(3, 4))
    gc.collect()
    assert seen[1]() is None


def test_rows_of_another_side_than_the_covariance_are_refused() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(3, 4, 8)
    inputs = lro.calibrate(layer, [x])
    outputs = lro.calibrate(layer, [x], side="output", sensitivity=cubed)
    with pytest.raises(ValueError, match=r"holds the weighted output .* the input .* token_weights=False"):
        lro.LowRankLinear.from_linear(
            layer, rank=3, covariance=inputs[""], sensitivity=outputs[""].output_gradients, projection="loss"
        )
    alike = lro.calibrate(layer, [x], side="output", sensitivity=cubed, token_weights=False)
    lro.LowRankLinear.from_linear(
        layer, rank=3, covariance=inputs[""], sensitivity=alike[""].output_gradients, projection="loss"
    )


def test_a_layer_without_weighted_rows_takes_all_alike() -> None:
    layer, x = nn.Linear(8, 6).double(), torch.randn(30, 8).double()
    covariances = lro.calibrate(layer, [x], sensitivity=cubed)
    of_none = Moments(torch.zeros(8, 8).double(), torch.zeros(8).double(), side="weighted input")
    covariances[""].token_weighted = of_none
    spaces = layer_subspaces({"": layer}, covariances)[""]
    torch.testing.assert_close(spaces.felt_moment(centered=True), spaces.moment)


def test_trials_at_other_ranks_decompose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(8, 6).double(), torch.randn(5, 6, 8).double()
    spaces = layer_subspaces({"": layer}, lro.calibrate(layer, [x], sensitivity=cubed))[""]
    first = factorize(spaces, 3, "loss")
    spaces.release(directions=False)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    again = factorize(spaces, 3, "loss")
    assert again.predicted_loss == pytest.approx(first.predicted_loss)
