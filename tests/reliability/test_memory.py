"""Nothing grows over thousands of calls, and sizes beyond 2^31 elements are right."""

from __future__ import annotations

import gc
from collections.abc import Callable

import psutil
import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.ops import (
    covariance_finalize_,
    covariance_update_,
    lowrank_experts,
    lowrank_linear,
    lowrank_linear_grouped,
)
from tests.reliability.campaign import LONG, figures, sized

GROWTH = 4 << 20  # bytes; the allocator's own noise


def growth(work: Callable[[int], object], calls: int) -> int:
    """Bytes that the process gains in the later two thirds of the calls; caches fill in the first third."""
    process = psutil.Process()
    gc.collect()
    before = 0
    for call in range(calls):
        if call == calls // 3:
            gc.collect()
            before = process.memory_info().rss
        work(call)
    gc.collect()
    return process.memory_info().rss - before


def updates(call: int) -> None:
    covariance_update_(STATE[0], STATE[1], torch.randn(1 + call % 97, 64))


def forwards(call: int) -> None:
    """Always new shapes, so that the cache of decisions must drop old ones."""
    x = torch.randn(1 + call, 16)[-64:] if call % 2 else torch.randn(1, 1 + call % 5000, 16)
    lowrank_linear(x, FACTORS[0], FACTORS[1])


def layer_forwards(call: int) -> None:
    """8-bit, pivoted and grouped layers and experts, also of new shapes."""
    x = torch.randn(1 + call % 5000, 16)[-64:]
    LAYERS[call % len(LAYERS)](x)
    lowrank_linear_grouped(x, [FACTORS[0]] * 2, [FACTORS[1]] * 2)
    lowrank_experts(x, torch.tensor([len(x) // 2, len(x)]), [FACTORS[0]] * 2, [FACTORS[1]] * 2, [None] * 2)


def backwards(call: int) -> None:
    lowrank_linear(torch.randn(8, 16), FACTORS[0].clone().requires_grad_(), FACTORS[1]).sum().backward()


def calibrations(call: int) -> None:
    model = MODEL
    covariances = lro.calibrate(model, [torch.randn(32, 32)] * 2, sensitivity="output")
    compressed = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
    lro.compress_(compressed, covariances, 8)


STATE = torch.zeros(64, 64), torch.zeros(64)
FACTORS = torch.randn(8, 16), torch.randn(24, 8)
LAYERS = [
    lro.LowRankLinear(16, 24, 8).quantize_("int8"),
    lro.LowRankLinear(16, 24, 8).quantize_("fp8"),
    lro.layers.EightBitLinear(16, 24),
    lro.layers.PivotedLinear(16, 24, 8),
]
MODEL = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
WORKS = {"updates": (updates, 600, 10000), "forwards": (forwards, 600, 10000), "backwards": (backwards, 200, 10000)}
WORKS["forwards of other layers"] = (layer_forwards, 100, 10000)
WORKS["calibrations and compressions"] = (calibrations, 5, 100)


@pytest.mark.parametrize("name", WORKS)
def test_memory_does_not_grow(name: str) -> None:
    work, short, long = WORKS[name]
    with figures(f"memory over {name}") as counts:
        grown = growth(work, sized(short, long))
        counts.update(cases=sized(short, long), KiB=grown >> 10)
        assert grown < GROWTH, f"{grown >> 10} KiB"


if LONG and psutil.virtual_memory().available > 14 << 30:  # a test that always skips would hide itself

    def test_more_than_two_billion_elements_of_x() -> None:
        """(2^31 + 2^20) elements: rows before and after the limit, in the output and in the sums."""
        features, rows = 64, (1 << 25) + (1 << 14)
        x = torch.zeros(rows, features, dtype=torch.bfloat16)
        at = torch.tensor([0, 1, (1 << 25) - 1, 1 << 25, rows - 1])
        torch.manual_seed(0)
        x[at] = torch.randn(len(at), features).bfloat16()
        down, up = torch.randn(8, features).bfloat16(), torch.randn(8, 8).bfloat16()
        with figures("more than 2^31 elements: x") as counts:
            y = lowrank_linear(x, down, up)
            # Few rows may take another product, which rounds in another order.
            torch.testing.assert_close(y[at], lowrank_linear(x[at].clone(), down, up), rtol=3e-2, atol=0.1)
            assert not bool(y[2:1000].any())
            assert int((y != 0).any(-1).sum()) == len(at)
            second_moment, total = torch.zeros(features, features), torch.zeros(features)
            covariance_update_(second_moment, total, x)
            part = x[at].float()
            torch.testing.assert_close(covariance_finalize_(second_moment), part.T @ part, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(total, part.sum(0), rtol=1e-5, atol=1e-5)
            counts.update(cases=2, elements=x.numel())

    def test_more_than_two_billion_elements_of_the_output() -> None:
        rows = (1 << 25) + 16
        x, up = torch.zeros(rows, 8, dtype=torch.bfloat16), torch.randn(64, 8).bfloat16()
        at = torch.tensor([0, (1 << 25) - 1, 1 << 25, rows - 1])
        x[at] = torch.randn(len(at), 8).bfloat16()
        with figures("more than 2^31 elements: output") as counts:
            y = lowrank_linear(x, torch.eye(8).bfloat16(), up)
            assert torch.equal(y[at], lowrank_linear(x[at].clone(), torch.eye(8).bfloat16(), up))
            assert not bool(y[1:1000].any())
            counts.update(cases=1, elements=y.numel())

    def test_more_than_two_billion_elements_of_the_state() -> None:
        features = 46400
        second_moment, total = torch.zeros(features, features), torch.zeros(features)
        x = torch.zeros(2, features)
        at = torch.tensor([0, 1, 23000, features - 1])
        x[:, at] = torch.randn(2, len(at))
        with figures("more than 2^31 elements: second moment") as counts:
            covariance_update_(second_moment, total, x)
            covariance_finalize_(second_moment)
            torch.testing.assert_close(second_moment[at][:, at], x[:, at].T @ x[:, at])
            assert not bool(second_moment[1000].any()) and torch.equal(second_moment[:, 0], second_moment[0])
            counts.update(cases=1, elements=second_moment.numel())
