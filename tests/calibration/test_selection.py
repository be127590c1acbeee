"""Which layers are calibrated, and which side of each is streamed."""

import pytest
import torch
from torch import nn

from lowrank_ops.calibration.selection import side_of


@pytest.mark.parametrize(
    ("shape", "bound", "expected"),
    [
        ((64, 64), 2 << 30, "input"),
        ((4096, 64), 2 << 30, "output"),  # 64 times as wide, 128 MiB
        ((2048, 64), 2 << 30, "input"),  # 32 times as wide, but only 32 MiB
        ((64, 32), 1000, "output"),
        ((32, 64), 1000, "input"),  # the output's moment would be larger still
    ],
)
def test_auto_bounds_the_state(shape, bound, expected):
    assert side_of(nn.Linear(*shape, device="meta"), "auto", torch.float64, bound) == expected
