"""``row_stride`` accepts exactly the tensors that are views of a matrix with disjoint rows."""

import pytest
import torch

from lowrank_ops.ops._backend import row_stride

X = torch.zeros(4, 9, 64)


@pytest.mark.parametrize(
    "x, stride",
    [
        (X, 64),
        (X[0], 64),
        (X[:, -1], 576),
        (X[:, -1:], 576),  # the last position of each sequence, as decoders slice it
        (X[:1, 3:5], 64),
        (X[1:2, :, :32], 64),
        (X[:, :, :32], 64),
        (X[:, :5], 0),  # two strides between rows
        (X[:, ::2], 0),
        (X[:, :, ::2], 0),
        (X[:, 0].expand(4, 64).T, 0),
        (X[:1, :1].expand(4, 9, 64), 0),  # one row, expanded
        (X[0, 0, ::2], 0),
        (X.view(-1).unfold(0, 64, 8), 0),  # a sliding window: rows overlap
        (X.view(-1).unfold(0, 64, 64), 64),
    ],
    ids=lambda value: f"{tuple(value.shape)} {value.stride()}" if isinstance(value, torch.Tensor) else str(value),
)
def test_row_stride(x, stride):
    assert row_stride(x) == stride
    if stride:
        rows = x.reshape(-1, x.shape[-1])
        assert rows.data_ptr() == x.data_ptr() and rows.stride(0) == stride  # a view
