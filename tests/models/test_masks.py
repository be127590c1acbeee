"""Masks: which rows count, and which masks are errors."""

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from tests.sums import assert_sums


class Padded(nn.Module):
    """Layers that see (batch, positions, dim), (batch * positions, dim) and (batch, dim)."""

    def __init__(self, dim=6):
        super().__init__()
        self.tokens, self.flat, self.pooled = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x, attention_mask=None):
        tokens = self.tokens(x)
        return self.flat(x.flatten(0, 1)).sum() + tokens.sum() + self.pooled(x[:, 0]).sum()


@pytest.mark.parametrize("how", ["name", "callable", "transposed"])
def test_padding_is_masked_out(how):
    model = Padded()
    x = torch.randn(3, 4, 6)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    x[mask == 0] = float("nan")  # padding may hold anything
    if how == "name":
        covariances = lro.calibrate(model, [{"x": x, "attention_mask": mask}], mask="attention_mask")
    else:
        given = mask.T.contiguous().T if how == "transposed" else mask.bool()
        covariances = lro.calibrate(model, [x], mask=lambda args, kwargs: given)
    real = x[mask.bool()]
    assert_sums(covariances["tokens"].activations, real)
    assert_sums(covariances["flat"].activations, real)
    assert_sums(covariances["pooled"].activations, x[:, 0])


def test_mask_applies_to_streamed_outputs():
    model = nn.Linear(6, 2, bias=False)
    x = torch.randn(2, 3, 6)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    covariances = lro.calibrate(model, [x], mask=lambda args, kwargs: mask, side="output")
    assert_sums(covariances[""].activations, (x[mask] @ model.weight.T).detach(), rtol=1e-6)


def test_mask_may_be_none_and_skips_convolutions():
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    x = torch.randn(2, 2, 3, 3)
    assert lro.calibrate(model, [x], mask=lambda args, kwargs: torch.zeros(2, 5))["0"].activations.count == 18
    unmasked = lro.calibrate(Padded(), [torch.randn(2, 3, 6)], mask=lambda args, kwargs: None)
    assert unmasked["tokens"].activations.count == 6


def test_masks_of_another_shape_are_errors():
    x = torch.randn(2, 3, 6)
    with pytest.raises(
        ValueError, match=r"mask fits no layer: layer 'tokens' has an activation \(2, 3, 6\), which .* \(2, 4\)"
    ):
        lro.calibrate(Padded(), [x], mask=lambda args, kwargs: torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"mask must have shape \(batch, positions\); got \(2, 1, 1, 3\)"):
        lro.calibrate(Padded(), [x], mask=lambda args, kwargs: torch.ones(2, 1, 1, 3))
    with pytest.raises(
        ValueError, match=r"mask='attention_mask' is not among the keyword arguments.*\(none\).*mappings"
    ):
        lro.calibrate(Padded(), [x], mask="attention_mask")


def test_mask_needs_the_forward_of_the_model():
    with pytest.raises(ValueError, match=r"layer 'tokens' was called outside the model's own forward"):
        lro.calibrate(
            Padded(), [torch.randn(2, 3, 6)], mask="attention_mask", forward=lambda model, batch: model.tokens(batch)
        )
