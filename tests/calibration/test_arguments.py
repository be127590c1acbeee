"""calibrate: the kinds of batches that it accepts, and arguments that are errors."""

import collections

import pytest
import torch
from torch import nn

import lowrank_ops as lro


@pytest.fixture
def x():
    return torch.randn(64, 32)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def test_packed_sequences_are_one_argument():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, packed):
            return self.head(self.lstm(packed)[0].data)

    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 4), torch.randn(3, 4)])
    assert lro.calibrate(Recurrent(), [packed])["head"].activations.count == 8


def test_named_tuples_are_one_argument():
    pair = collections.namedtuple("pair", "left right")

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, both):
            return self.head(both.left + both.right)

    batch = pair(torch.randn(3, 4), torch.randn(3, 4))
    assert lro.calibrate(Sum(), [batch])["head"].activations.count == 3


@pytest.mark.parametrize("shape", [(8, 1), (4, 3, 5, 5)])
def test_fisher_needs_classes_in_the_last_dimension(shape, x):
    def forward(model, batch):
        return model(batch).sum() + torch.zeros(shape, requires_grad=True)

    with pytest.raises(ValueError, match=r"logits of shape \(\.\.\., classes\)"):
        lro.calibrate(nn.Sequential(nn.Linear(32, 10)), [x], sensitivity="fisher", forward=forward)


def test_single_batch_is_a_type_error(model, x):
    for batch, kind in ((x, "Tensor"), ({"input": x}, "dict")):
        with pytest.raises(TypeError, match=rf"got one {kind}\. Pass \[batch\]"):
            lro.calibrate(model, batch)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_are_an_error(in_place, model, x):
    compiled = model if in_place else torch.compile(model)
    if in_place:
        model.compile()
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        lro.calibrate(compiled, [x])
