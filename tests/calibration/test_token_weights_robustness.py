"""Token weights of unusual models: empty batches, autocast, gradient checkpointing, nested and inference tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_ops as lro
from lowrank_ops.calibration import Moments
from lowrank_ops.factors import factorize
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces
from tests.calibration.comparing import assert_same_statistics, cubed


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("groups", [1, 2])
def test_empty_batches_add_nothing(groups: int, side: str) -> None:
    model, images = nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups)).double(), torch.randn(2, 4, 6, 6).double()
    found = lro.calibrate(model, [images[:0], images], sensitivity=cubed, side=side)
    assert_same_statistics(found, lro.calibrate(model, [images], sensitivity=cubed, side=side))


def test_patches_of_large_images_are_unfolded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    unfold = F.unfold

    def counted(*args: Any) -> Tensor:
        patches = unfold(*args)
        sizes.append(patches.numel())
        return patches

    monkeypatch.setattr("lowrank_ops.calibration.token_weights.MAX_ELEMENTS", 4000)
    monkeypatch.setattr("lowrank_ops.calibration.token_weights.F.unfold", counted)
    model = nn.Conv2d(4, 6, 3, padding=1)
    with lro.Calibrator(model, output_gradients=True) as calibrator:
        loss = model(torch.randn(1, 4, 40, 30)).pow(3).sum()
        sizes.clear()  # of the op for the unweighted rows
        calibrator.observe(loss, samples=1)
    assert sum(sizes) == 40 * 30 * 36 and max(sizes) <= 4000


def test_weights_do_not_overflow_float16() -> None:
    """One row with all the weight of 4096 is scaled by 64."""
    model, x = nn.Sequential(nn.Linear(8, 8)).half(), torch.zeros(1, 4096, 8).half()
    x[0, 0] = 2000
    covariances = lro.calibrate(model, [x], sensitivity=lambda output, batch: output[0, 0].float().sum())
    weighted = covariances["0"].token_weighted
    torch.testing.assert_close(weighted.second_moment, torch.full((8, 8), 4096 * 2000.0**2).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_loss_does_not_round_the_sums(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), 30 * torch.randn(4, 50, 8)

    def observed(loss_under_autocast: bool) -> lro.Covariances:
        with lro.Calibrator(model, output_gradients=True) as calibrator:
            with torch.autocast("cpu", dtype):
                loss = model(x).float().square().sum()
            with torch.autocast("cpu", dtype, enabled=loss_under_autocast):
                calibrator.observe(loss, samples=4)
        return calibrator.covariances

    assert_same_statistics(observed(True), observed(False))


class Checkpointed(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.first, self.second, self.recompute = nn.Linear(4, 4), nn.Linear(4, 4), recompute

    def _block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)).exp()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(checkpoint(self._block, x, use_reentrant=False) if self.recompute else self._block(x))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
def test_rows_recomputed_by_checkpointing_count_once(side: str, frozen: bool) -> None:
    model = Checkpointed(True).double().requires_grad_(not frozen)
    plain = Checkpointed(False).double().requires_grad_(not frozen)
    plain.load_state_dict(model.state_dict())
    batches = [
        {"x": torch.randn(3, 5, 4).double().requires_grad_(), "mask": torch.arange(5) < torch.tensor([[5], [2], [3]])}
        for _ in range(2)
    ]
    found, expected = (lro.calibrate(m, batches, mask="mask", side=side, sensitivity=cubed) for m in (model, plain))
    assert found["first"].activations.count == 20
    assert_same_statistics(found, expected)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.strided)
        return torch.nested.to_padded_tensor(self.layer(rows), 0.0)


@pytest.mark.parametrize("frozen", [False, True])
def test_nested_tensors_equal_single_samples(frozen: bool) -> None:
    model, x = Nested().double().requires_grad_(not frozen), torch.randn(2, 3, 4).double()
    found = lro.calibrate(model, [x], sensitivity=cubed)["layer"].token_weighted
    singles = lro.calibrate(model.layer, [x[:1], x[1:, :2]], sensitivity=cubed)
    expected = singles[""].token_weighted
    assert found.count == expected.count == 5
    torch.testing.assert_close(found.second_moment, expected.second_moment)
    torch.testing.assert_close(found.total, expected.total)


def test_frozen_and_trainable_encoders_agree() -> None:
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
    assert trainable["layers.0.linear1"].activations.count == 10
    model.requires_grad_(False)
    assert_same_statistics(calibrated(), trainable)
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
    """They have no version counter, so they are cloned."""
    with torch.inference_mode():
        x = torch.randn(3, 5, 4).double()
    model = Overwriting(Tensor.zero_).double().requires_grad_(False)
    plain = Overwriting(Tensor.size).double().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    expected = lro.calibrate(plain, [x], sensitivity=cubed)
    assert_same_statistics(lro.calibrate(model, [x], sensitivity=cubed), expected)


def test_nothing_is_saved_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[object] = []
    monkeypatch.setattr("lowrank_ops.calibration.recorder.SavedActivation", lambda *given: saved.append(given))
    model = nn.Sequential(nn.Linear(4, 4))
    with (
        pytest.warns(UserWarning, match="received no loss"),
        lro.Calibrator(model, side="output", output_gradients=True),
        torch.no_grad(),
    ):
        model(torch.randn(3, 4))
    assert not saved


def test_saved_inputs_are_freed() -> None:
    """After the loss; those of forwards without one, after the block."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    seen: list[weakref.ref[Tensor]] = []
    model[2].register_forward_pre_hook(lambda layer, args: seen.append(weakref.ref(args[0])))
    with lro.Calibrator(model, output_gradients=True) as calibrator:
        loss = model(torch.randn(3, 4)).square().sum()
        calibrator.observe(loss, samples=3, retain_graph=True)
        calibrator.observe(loss, samples=3)
        del loss
        gc.collect()
        assert seen[0]() is None
        model(torch.randn(3, 4))
    gc.collect()
    assert seen[1]() is None


def test_layer_without_weighted_rows_is_unweighted() -> None:
    layer, x = nn.Linear(8, 6).double(), torch.randn(30, 8).double()
    statistics = lro.calibrate(layer, [x], sensitivity=cubed)[""]
    of_no_row = Moments(torch.zeros(8, 8).double(), torch.zeros(8).double())
    spaces = LayerSubspaces.of_layer(layer, replace(statistics, token_weighted=of_no_row), centered=True)
    torch.testing.assert_close(spaces.loss_moment(centered=True), spaces.moment)


def test_factors_at_other_ranks_reuse_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(8, 6).double(), torch.randn(5, 6, 8).double()
    spaces = layer_subspaces({"": layer}, lro.calibrate(layer, [x], sensitivity=cubed))[""]
    first = factorize(spaces, 3, "loss")
    spaces.release(directions=False)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    again = factorize(spaces, 3, "loss")
    assert again.predicted_loss == pytest.approx(first.predicted_loss)
