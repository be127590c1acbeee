"""finetune_: runs that would ruin the weights or lose their checkpoint are errors before anything changes."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4))


@pytest.fixture
def batches(model):
    return [torch.randn(3, 4)]


def squared(output: Tensor, batch: object) -> Tensor:
    return output.square().mean()


def test_gradient_that_is_not_finite(model, batches):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the gradient is not finite at step 0"):
        lro.finetune_(model, batches, loss=lambda output, batch: (output * 0).abs().sqrt().sum())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_float16_parameters(model, batches):
    with pytest.raises(ValueError, match=r"float16 parameters.*student\.float\(\)"):
        lro.finetune_(model.half(), batches, loss=squared)


def test_checkpoint_in_a_missing_folder(model, batches, tmp_path):
    with pytest.raises(ValueError, match=r"in a folder that does not exist"):
        lro.finetune_(model, batches, loss=squared, checkpoint=tmp_path / "none" / "x.pt")


def test_checkpoint_of_another_run(model, batches, tmp_path):
    lro.finetune_(model, batches, loss=squared, checkpoint=tmp_path / "x.pt")
    with pytest.raises(ValueError, match="is of another run: its clip differ"):
        lro.finetune_(model, batches, loss=squared, clip=2.0, checkpoint=tmp_path / "x.pt")
