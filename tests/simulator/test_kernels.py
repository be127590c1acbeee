"""Every CUDA kernel, from its own source, on the simulated device against float64.

Thread order and the timing of asynchronous copies come from a seed: missing synchronization gives NaN or stale values
in one of the orders, and a deadlock is an error.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from simulated import ORDERS, SM80, SM86, SM90, Machine, Simulated
from torch import Tensor

from lowrank_ops.ops import _verify, linear, lowrank_linear
from lowrank_ops.ops._backend import Backend, Impl
from lowrank_ops.ops._dispatcher import BoundedCache
from tests.ops.inputs import ACTIVATIONS, linear_inputs
from tests.tolerance import assert_close_to_float64

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TF32 = "float32 in TensorFloat-32"
# Relative to the sum of |x_i x_j|: MMAs are exact or, for float32, three of bfloat16 or one of TensorFloat-32.
BOUNDS = {BF16: 2.0**-17, FP16: 2.0**-17, FP32: 2.0**-15, TF32: 2.0**-10}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """Memory that an op allocates and does not write is NaN."""
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports torch's compiler
    yield
    torch.set_deterministic_debug_mode("default")


def normal(*shape: int, dtype: torch.dtype | str, mean: float = 0.0, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean
    return x if isinstance(dtype, str) else x.to(dtype)


def among_nan(x: Tensor, offset: int, padding: int) -> Tensor:
    """``x`` with NaN before, between and after its rows."""
    rows, cols = x.shape
    memory = torch.full((offset + rows * (cols + padding) + 64,), torch.nan, dtype=x.dtype)
    return memory[offset:].as_strided((rows, cols), (cols + padding, 1)).copy_(x)


def assert_updated(
    second_moment: Tensor, total: Tensor, x: Tensor, before: float = 0.0, dtype: torch.dtype | str = BF16
) -> None:
    rows = x.double()
    scale = rows.abs().T @ rows.abs()
    error = (second_moment.double() - before - rows.T @ rows).abs().tril()
    assert (error <= (BOUNDS[dtype] + 2.0**-23) * scale + 2.0**-22 * abs(before)).all()  # False for NaN
    if dtype == TF32 and len(x) >= 1000:  # rounding to nearest is unbiased, truncation is not
        assert (error.diag() <= 2.0**-13 * scale.diag() + 2.0**-22 * abs(before)).all()
    assert (
        (total.double() - before - rows.sum(0)).abs() <= 2.0**-18 * rows.abs().sum(0) + 2.0**-22 * abs(before)
    ).all()
    assert (second_moment.triu(1) == before * torch.ones_like(second_moment).triu(1)).all()


COVARIANCES = {  # machine, dtype, tokens, features, offset, padding, the plan
    "covariance_sm90": (SM90, BF16, 300, 200, 0, 0, "covariance_sm90"),
    "covariance_sm90-stages-used-twice": (SM90.sms(1), BF16, 330, 64, 0, 0, "covariance_sm90: .* 1 splits"),
    "covariance_sm90-float16": (SM90, FP16, 150, 136, 0, 24, "covariance_sm90"),
    "covariance_sm90-chunks": (SM90.sms(2), BF16, 2200, 152, 0, 8, "covariance_sm90: .* 1 splits"),
    "covariance_sm90-splits": (SM90, BF16, 1500, 72, 0, 0, "covariance_sm90: .* [2-9] splits"),
    "covariance_sm90-one-token": (SM90, BF16, 1, 128, 0, 0, "covariance_sm90"),
    "covariance_sm80-4-stages": (SM80, BF16, 300, 200, 0, 0, "covariance_sm80: .* 4 stages"),
    "covariance_sm80-5-stages": (SM86, FP16, 300, 136, 0, 0, "covariance_sm80: .* 5 stages"),
    "covariance_sm80-chunks": (SM80.sms(2), BF16, 2200, 152, 0, 8, "covariance_sm80: .* 4 stages.* 1 splits"),
    "covariance_sm80-splits": (SM80, BF16, 1500, 72, 0, 0, "covariance_sm80: .* [2-9] splits"),
    "covariance_sm80-any-alignment": (SM90, BF16, 100, 131, 1, 2, "covariance_sm80: .* 2 stages"),
    "covariance_sm80-float32": (SM90, FP32, 100, 70, 0, 0, "covariance_sm80: .* 2 stages"),
    "covariance_sm80-float32-any-alignment": (SM80, FP32, 200, 131, 3, 1, "covariance_sm80: .* 2 stages"),
    "covariance_sm80-tf32-copies": (SM90, TF32, 300, 200, 0, 0, "covariance_sm80: TensorFloat-32, .* 2 stages"),
    "covariance_sm80-tf32-chunks": (SM80.sms(2), TF32, 2200, 130, 0, 2, "covariance_sm80: .* 1 splits"),
    "covariance_sm80-tf32-splits": (SM86, TF32, 1500, 72, 0, 0, "covariance_sm80: TensorFloat-32, .* [2-9] splits"),
    "covariance_sm80-tf32-any-alignment": (SM80, TF32, 200, 131, 3, 1, "covariance_sm80: TensorFloat-32, .* 2 stages"),
    "covariance_sm80-tf32-one-token": (SM80, TF32, 1, 129, 0, 3, "covariance_sm80: TensorFloat-32"),
    "covariance_sm80-one-element": (SM86, FP16, 1, 1, 1, 0, "covariance_sm80"),
    "covariance_sm80-one-feature": (SM90, BF16, 513, 1, 0, 0, "covariance_sm80"),
}  # fmt: skip


@pytest.mark.orders(3)
@pytest.mark.parametrize("case", COVARIANCES.values(), ids=COVARIANCES)
def test_covariance(simulated: Simulated, order, case):
    machine, dtype, tokens, features, offset, padding, expected = case
    x = among_nan(normal(tokens, features, dtype=dtype, mean=0.5), offset, padding)
    simulated.configure(machine, *order)
    second_moment, total = torch.full((features, features), 3.0), torch.full((features,), 3.0)
    plan = simulated.covariance_update_(second_moment, total, x, dtype == TF32)
    assert re.match(expected, plan), plan
    assert_updated(second_moment, total, x, before=3.0, dtype=dtype)


WIDE = {  # machine, dtype, tokens, features, padding, splits, the plan
    "one-tile": (SM90, BF16, 300, 256, 0, 0, "1 tiles whole"),
    "padded-rows": (SM90, FP16, 150, 392, 24, 0, "3 tiles whole"),
    "splits": (SM90, BF16, 700, 264, 0, 3, "3 tiles x 3 splits of 256 tokens"),
    "whole-and-split-tiles": (SM90, BF16, 330, 520, 8, 2, "4 tiles whole, 2 tiles x 2 splits of 192 tokens"),
    "one-token": (SM90, BF16, 1, 8, 0, 0, "1 tiles whole"),
}


@pytest.mark.orders(3)
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_wide_covariance(simulated: Simulated, order, case):
    machine, dtype, tokens, features, padding, splits, expected = case
    x = among_nan(normal(tokens, features, dtype=dtype, mean=0.5), 0, padding)
    simulated.configure(machine, *order)
    second_moment, total = torch.full((features, features), 3.0), torch.full((features,), 3.0)
    plan = simulated.covariance_update_(second_moment, total, x, choice=("covariance_sm90_wide", splits, 0))
    assert f" {expected}, " in plan, plan
    assert_updated(second_moment, total, x, before=3.0)


@pytest.mark.orders(2)
@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("stride", [1, 2])
def test_wide_covariance_into_a_strided_state(simulated: Simulated, order, stride, dtype):
    """Contiguous pairs, elements apart, and rows that start between pairs."""
    for first in (20, 21):
        memory = torch.full((300, 1100), torch.nan, dtype=dtype)
        second_moment = memory[5:297, first : first + 292 * stride : stride].zero_()
        total = torch.full((600,), torch.nan, dtype=dtype)[::2][:292].zero_()
        x = among_nan(normal(130, 292, dtype=BF16), 0, 4)
        simulated.configure(SM90, *order)
        simulated.covariance_update_(second_moment, total, x, choice=("covariance_sm90_wide", 0, 0))
        assert_updated(second_moment, total, x)
        memory[5:297, first : first + 292 * stride : stride] = torch.nan
        assert memory.isnan().all()


@pytest.mark.orders(1)
@pytest.mark.parametrize("splits", [0, 1])
@pytest.mark.parametrize("columns", [slice(7, 207), slice(8, 208), slice(7, 407, 2)], ids=["rows", "pairs", "strided"])
@pytest.mark.parametrize("machine", [SM80, SM90], ids=["sm_80", "sm_90"])
def test_covariance_into_a_part_of_a_float64_state(simulated: Simulated, order, machine, columns, splits):
    memory = torch.full((300, 700), torch.nan, dtype=torch.float64)
    second_moment = memory[20:220, columns].fill_(3.0)
    total = torch.full((400,), torch.nan, dtype=torch.float64)[::2].fill_(3.0)
    x = normal(260, 200, dtype=BF16)
    simulated.configure(machine, *order)
    plan = simulated.covariance_update_(second_moment, total, x, choice=("", splits, 0))
    assert splits == 0 or f" {splits} splits" in plan
    assert_updated(second_moment, total, x, before=3.0)
    memory[20:220, columns] = torch.nan
    assert memory.isnan().all()


CHUNKS = {  # kernel, tokens, dtype, splits, the smallest factor
    "covariance_sm80": ("covariance_sm80", 3000, BF16, 1, 109),
    "covariance_sm80-tf32": ("covariance_sm80", 3000, TF32, 1, 109),
    "covariance_sm80-splits": ("covariance_sm80", 4300, BF16, 2, 109),
    "covariance_sm90": ("covariance_sm90", 3000, BF16, 1, 109),
    "covariance_sm90-splits": ("covariance_sm90", 4300, BF16, 2, 109),
    "covariance_sm90_wide": ("covariance_sm90_wide", 6000, BF16, 0, 71),
    "covariance_sm90_wide-splits": ("covariance_sm90_wide", 8400, BF16, 2, 71),
}


@pytest.mark.orders(1)
@pytest.mark.parametrize("case", CHUNKS.values(), ids=CHUNKS)
def test_accumulators_are_flushed_every_chunk(simulated: Simulated, order, case):
    """Sums of odd products: multiples of 2 per MMA, exact in float32 within a chunk, and rounded beyond 2^25."""
    kernel, tokens, dtype, splits, smallest = case
    x = smallest + 2.0 * torch.randint(0, 10, (tokens, 72), generator=torch.Generator().manual_seed(0))
    x = x if dtype == TF32 else x.to(dtype)
    second_moment, total = torch.zeros(72, 72, dtype=torch.float64), torch.zeros(72, dtype=torch.float64)
    simulated.configure(SM90, *order)
    plan = simulated.covariance_update_(second_moment, total, x, dtype == TF32, choice=(kernel, splits, 0))
    assert plan.startswith(f"{kernel}:")
    if splits < 2:
        assert torch.equal(second_moment, (x.double().T @ x.double()).tril())
        assert torch.equal(total, x.double().sum(0))
    else:  # float32 partial tiles
        assert_updated(second_moment, total, x)


CONVOLUTIONS = {  # shape, kernel, stride, padding, dilation, groups, dtype, channels last
    "same": ((2, 4, 9, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1, BF16, False),
    "groups-and-dilation": ((2, 4, 9, 8), (3, 2), (2, 1), (0, 2), (2, 1), 2, FP16, True),
    "float32": ((1, 16, 7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1, FP32, False),
    "wide-kernel": ((3, 3, 5, 20), (1, 9), (1, 4), (0, 4), (1, 1), 1, BF16, True),
    "tf32-groups-and-dilation": ((2, 4, 9, 8), (3, 2), (2, 1), (0, 2), (2, 1), 2, TF32, True),
    "tf32": ((1, 16, 7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1, TF32, False),
}


@pytest.mark.orders(2)
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_conv_covariance(simulated: Simulated, order, case):
    shape, kernel, stride, padding, dilation, groups, dtype, last = case
    x = normal(*shape, dtype=dtype, mean=0.5)
    if last:
        x = x.to(memory_format=torch.channels_last)
    features = shape[1] // groups * kernel[0] * kernel[1]
    second_moment, total = torch.zeros(groups, features, features), torch.zeros(groups, features)
    simulated.configure(SM90, *order)
    simulated.conv_covariance_update_(
        second_moment, total, x, kernel, stride, padding, dilation, allow_tf32=dtype == TF32
    )
    columns = F.unfold(x.double(), kernel, dilation, padding, stride)
    patches = columns.view(len(x), groups, features, -1).permute(1, 0, 3, 2).reshape(groups, -1, features)
    for group in range(groups):
        assert_updated(second_moment[group], total[group], patches[group], dtype=dtype)


def assert_linear(
    simulated: Simulated, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str, choice=("", 0, 0)
) -> str:
    """That y is as near to float64 as torch's two GEMMs are; returns the plan."""
    y, plan = simulated.lowrank_linear(x, down, up, bias, activation, choice)
    act = ACTIVATIONS[activation]
    exact = act(F.linear(F.linear(x.double(), down.double()), up.double(), None if bias is None else bias.double()))
    assert_close_to_float64(y, act(F.linear(F.linear(x, down), up, bias)), exact)
    return plan


LINEARS = {  # machine, dtype, (tokens, in_features, rank, out_features), offset, the plan
    "decode_sm80-8-tokens": (SM80, BF16, (1, 256, 64, 128), 0, "decode_sm80: 8 tokens"),
    "decode_sm80-16-tokens": (SM80, FP16, (13, 200, 40, 100), 0, "decode_sm80: 16 tokens"),
    "decode_sm80-64-tokens": (SM80, BF16, (64, 320, 40, 72), 0, "decode_sm80: 64 tokens"),
    "decode_sm80-splits": (SM80.sms(64), BF16, (9, 2048, 24, 40), 0, r"decode_sm80: .* x [2-8] splits"),
    "decode_sm80-any-alignment": (SM80, FP16, (33, 100, 17, 33), 1, "decode_sm80: 64 tokens"),
    "decode_sm80-dependent-launch": (SM90, BF16, (5, 97, 3, 5), 3, "decode_sm80: .* dependent launch"),
    "decode_sm80-one-feature": (SM80, BF16, (3, 1, 1, 1), 0, "decode_sm80"),
    "decode_sm90-8-tokens": (SM90, BF16, (1, 256, 64, 128), 0, "decode_sm90: 8 tokens"),
    "decode_sm90-64-tokens": (SM90, FP16, (64, 264, 24, 136), 0, "decode_sm90: 64 tokens"),
    "decode_sm90-shared-32": (SM90.sms(2), BF16, (20, 264, 72, 40), 0, "decode_sm90: 32 tokens, 32 rows"),
    "decode_sm90-shared-64": (SM90.sms(2), FP16, (40, 264, 136, 40), 0, "decode_sm90: 64 tokens, (32|64) rows"),
    "decode_sm90-clusters": (SM90.sms(16), BF16, (4, 4096, 24, 200), 0, "decode_sm90: .* clusters of [248]"),
    "decode_sm90-rounds": (SM90.sms(3), BF16, (20, 512, 136, 300), 0, "decode_sm90: 32 tokens"),
    "decode_sm90-streamed-rows": (Machine(90, 2, 40000), BF16, (30, 64, 104, 330), 0, "decode_sm90"),
    "prefill_sm90-few-features": (SM90, BF16, (65, 8, 8, 3), 0, "prefill_sm90"),
    "prefill_sm90-two-tiles": (SM90, BF16, (130, 200, 64, 136), 0, "prefill_sm90"),
    "prefill_sm90-one-SM": (SM90.sms(1), FP16, (200, 136, 56, 200), 0, "prefill_sm90: .* clusters of 1"),
    "prefill_sm90-two-SMs": (SM90.sms(2), BF16, (130, 64, 192, 100), 0, "prefill_sm90"),
    "prefill_sm90-clusters": (SM90, BF16, (100, 512, 128, 392), 0, "prefill_sm90: .* clusters of [248]"),
    "prefill_sm90-rank-248": (SM90, FP16, (70, 328, 248, 520), 0, "prefill_sm90"),
    "prefill_sm90-rank-256": (SM90.sms(4), BF16, (300, 64, 256, 64), 0, "prefill_sm90"),
    "prefill_sm90-stages-used-often": (SM90.sms(1), BF16, (70, 1032, 64, 1100), 0, "prefill_sm90"),
    "prefill_sm90-long": (SM90.sms(2), FP16, (70, 712, 256, 1304), 0, "prefill_sm90"),
    "prefill_sm90-a-whole-tile": (SM90, BF16, (128, 64, 64, 72), 0, "prefill_sm90"),
}  # fmt: skip


@pytest.mark.orders(3)
@pytest.mark.parametrize("case", LINEARS.values(), ids=LINEARS)
def test_lowrank_linear(simulated: Simulated, order, case):
    machine, dtype, (tokens, in_features, rank, out_features), offset, expected = case
    x = among_nan(normal(tokens, in_features, dtype=dtype), offset, 0)
    down = among_nan(normal(rank, in_features, dtype=dtype, seed=1) / in_features**0.5, offset, 0)
    up = among_nan(normal(out_features, rank, dtype=dtype, seed=2) / rank**0.5, offset, 0)
    bias = normal(out_features, dtype=dtype, seed=3) if tokens % 2 else None
    simulated.configure(machine, *order)
    plan = assert_linear(simulated, x, down, up, bias, list(ACTIVATIONS)[tokens % 5])
    assert re.match(expected, plan), plan


GROUPS = {  # machine, dtype, (tokens, in_features), ranks, out_features, one down for all, offset, choice, the plan
    "decode_sm80-group": (SM80, BF16, (5, 256), (64, 24, 40), (72, 40, 8), False, 0, "decode_sm80", "decode_sm80: 8"),
    "decode_sm80-group-splits": (
        SM80.sms(64), FP16, (20, 2048), (40, 16), (40, 136), False, 0, "", r"decode_sm80: 32 .* x [2-8] splits"
    ),
    "decode_sm80-group-any-alignment": (SM80, BF16, (33, 99), (17, 3, 16), (33, 5, 1), False, 1, "", "decode_sm80: 64"),
    "decode_sm80-group-shared": (SM90, FP16, (9, 1024), (24,) * 3, (72, 24, 24), True, 0, "decode_sm80", "decode_sm80"),
    "decode_sm90-group": (SM90, BF16, (4, 264), (40, 16, 24), (136, 24, 40), False, 0, "", "decode_sm90: 8 tokens"),
    "decode_sm90-group-clusters": (
        SM90.sms(16), FP16, (20, 2048), (24, 8), (200, 72), False, 0, "", "decode_sm90: 32 .* clusters of [248]"
    ),
    "decode_sm90-group-rounds": (SM90.sms(2), BF16, (40, 512), (72, 136, 8), (40, 8, 24), False, 0, "", "decode_sm90"),
    "decode_sm90-group-one-CTA": (SM90.sms(1), BF16, (3, 72), (16, 40, 8), (20, 9, 33), False, 0, "", "decode_sm90"),
    "decode_sm90-group-streamed-rows": (
        Machine(90, 2, 40000), BF16, (30, 64), (104, 24, 64), (130, 200, 90), False, 0, "", "decode_sm90"
    ),
    "decode_sm90-group-shared": (SM90, FP16, (64, 136), (48,) * 3, (100, 40, 40), True, 0, "", "decode_sm90: 64"),
    "prefill_sm90-group": (SM90, BF16, (130, 200), (64, 40, 24), (136, 72, 5), False, 0, "", "prefill_sm90"),
    "prefill_sm90-group-clusters": (
        SM90, FP16, (100, 512), (128, 56), (392, 64), False, 0, "", "prefill_sm90: .* clusters of [248]"
    ),
    "prefill_sm90-group-peers": (
        SM90.sms(2), BF16, (600, 72), (64, 16), (64, 40), False, 0, ("prefill_sm90", 1, 256), ".* pairs of CTAs"
    ),
    "prefill_sm90-group-shared": (SM90, BF16, (150, 64), (40,) * 3, (72, 40, 40), True, 0, "", "prefill_sm90"),
}  # fmt: skip


@pytest.mark.orders(2)
@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS)
def test_lowrank_linear_grouped(simulated: Simulated, order, case):
    """Members of other ranks and sizes, one of them without a bias, each next to NaN."""
    machine, dtype, (tokens, in_features), ranks, outs, shared, offset, kernel, expected = case
    x = among_nan(normal(tokens, in_features, dtype=dtype), offset, 0)
    downs, ups, biases = [], [], []
    for seed, (rank, out) in enumerate(zip(ranks, outs, strict=True)):
        downs.append(among_nan(normal(rank, in_features, dtype=dtype, seed=1 + seed) / in_features**0.5, offset, 0))
        ups.append(among_nan(normal(out, rank, dtype=dtype, seed=4 + seed) / rank**0.5, offset, 0))
        biases.append(None if seed == 1 else normal(out, dtype=dtype, seed=7 + seed))
    downs = downs[:1] if shared else downs
    simulated.configure(machine, *order)
    choice = (kernel, 0, 0) if isinstance(kernel, str) else kernel
    ys, plan = simulated.lowrank_linear_grouped(x, downs, ups, biases, choice)
    assert re.match(expected, plan), plan
    for y, down, up, bias in zip(ys, downs * (len(ups) // len(downs)), ups, biases, strict=True):
        exact = F.linear(F.linear(x.double(), down.double()), up.double(), None if bias is None else bias.double())
        assert_close_to_float64(y, F.linear(F.linear(x, down), up, bias), exact)


def test_results_have_the_same_bits_in_every_order(simulated: Simulated):
    x, down, up = (normal(*shape, dtype=BF16) for shape in ((70, 512), (136, 512), (200, 136)))
    results = []
    for timing, seed in [*ORDERS, ("random", 6)]:
        second_moment, total = torch.zeros(512, 512), torch.zeros(512)
        simulated.configure(SM90, timing, seed)
        assert "decode_sm90" in simulated.lowrank_linear(x[:60], down, up)[1]
        simulated.covariance_update_(second_moment, total, x)
        decoded, prefilled = (simulated.lowrank_linear(rows, down, up)[0] for rows in (x[:60], x))
        results.append((decoded, prefilled, second_moment, total))
    for result in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(result, results[0], strict=True))


PREFILL_VARIANTS = [  # every kernel: rank tile, cluster, token tile
    (128, 4, 128), (256, 8, 128), (64, 1, 256), (176, 2, 192), (64, 1, 192),
    (64, 2, 128), (128, 1, 192), (128, 1, 256), (128, 2, 128), (128, 2, 192),
    (144, 1, 256), (144, 2, 192), (160, 1, 256), (160, 2, 192), (176, 1, 256),
    (192, 1, 256), (192, 2, 128), (192, 2, 192), (208, 2, 192), (224, 2, 192), (240, 2, 192),
    (256, 2, 128), (256, 2, 192), (256, 4, 128), (256, 4, 192),
]  # fmt: skip


def test_every_prefill_variant_gives_the_same_bits(simulated: Simulated):
    """An element of y is the same sums in the same order, whatever the tile and the cluster."""
    seen = set()
    simulated.configure(SM90)
    for rank in sorted({rank for rank, _, _ in PREFILL_VARIANTS}):
        x = normal(150, 72, dtype=BF16)
        down, up = normal(rank, 72, dtype=BF16) / 8, normal(200, rank, dtype=BF16) / 8
        expected = simulated.lowrank_linear(x, down, up)[0]
        for rank_tile, cluster, token_tile in PREFILL_VARIANTS:
            if rank_tile != rank:
                continue
            y, plan = simulated.lowrank_linear(x, down, up, choice=("prefill_sm90", cluster, token_tile))
            assert torch.equal(y, expected), plan
            seen.add((int(re.search(r"ranks up to (\d+)", plan)[1]), cluster, token_tile))
    assert seen == set(PREFILL_VARIANTS)


@pytest.mark.orders(2)
@pytest.mark.parametrize("variant", PREFILL_VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}-{v[2]}")
def test_every_prefill_variant(simulated: Simulated, order, variant):
    """More than a token tile, a rank below the rank tile, fewer tiles of up than CTAs."""
    rank, cluster, token_tile = variant
    x, down = normal(token_tile + 70, 200, dtype=BF16), normal(rank - 8, 200, dtype=BF16) / 14
    up, bias = normal(136, rank - 8, dtype=BF16) / rank**0.5, normal(136, dtype=BF16)
    simulated.configure(SM90, *order)
    plan = assert_linear(simulated, x, down, up, bias, "silu", ("prefill_sm90", cluster, token_tile))
    assert plan.startswith(f"prefill_sm90: {token_tile} tokens, "), plan
    assert ("pairs of CTAs" in plan) == (token_tile == 256)
    assert f"clusters of {cluster}," in plan and f"ranks up to {rank}," in plan, plan


LINEAR_CHOICES = [
    *((4, "decode_sm80", splits) for splits in (1, 2, 3, 8, 16)),
    *((4, "decode_sm90", cluster) for cluster in (1, 2, 4, 8)),
    *((70, "prefill_sm90", cluster) for cluster in (1, 2, 4)),
    *((tokens, kernel, 2) for tokens in (65, 140) for kernel in ("decode_sm80", "decode_sm90")),
]


@pytest.mark.orders(1)
@pytest.mark.parametrize("tokens, kernel, splits", LINEAR_CHOICES)
def test_lowrank_linear_follows_a_choice(simulated: Simulated, order, tokens, kernel, splits):
    x, down, up = normal(tokens, 512, dtype=BF16), normal(128, 512, dtype=BF16) / 16, normal(72, 128, dtype=BF16) / 8
    simulated.configure(SM90, *order)
    plan = assert_linear(simulated, x, down, up, None, "none", (kernel, splits, 0))
    assert plan.startswith(f"{kernel}: "), plan
    assert f"clusters of {splits}," in plan if kernel == "prefill_sm90" else f"{splits} splits" in plan


@pytest.mark.orders(2)
def test_ctas_of_a_cluster_without_features(simulated: Simulated, order):
    x, down, up = normal(4, 40, dtype=BF16), normal(16, 40, dtype=BF16) / 6, normal(72, 16, dtype=BF16) / 4
    simulated.configure(SM90, *order)
    assert "8 splits of 32 features" in assert_linear(simulated, x, down, up, None, "none", ("decode_sm90", 8, 0))


@pytest.mark.orders(1)
@pytest.mark.parametrize("kernel", ["covariance_sm80", "covariance_sm90"])
@pytest.mark.parametrize("splits", [1, 2, 5, 10])
def test_covariance_follows_a_choice(simulated: Simulated, order, kernel, splits):
    x = normal(640, 136, dtype=BF16, mean=0.5)
    simulated.configure(SM90, *order)
    second_moment, total = torch.zeros(136, 136), torch.zeros(136)
    plan = simulated.covariance_update_(second_moment, total, x, choice=(kernel, splits, 0))
    assert re.match(f"{kernel}: .* {splits} splits", plan), plan
    assert_updated(second_moment, total, x)


@pytest.mark.orders(1)
def test_conv_covariance_follows_a_choice(simulated: Simulated, order):
    x = normal(4, 4, 9, 8, dtype=FP16)
    simulated.configure(SM90, *order)
    geometry = (3, 3), (1, 1), (1, 1), (1, 1)
    second_moment, total = torch.zeros(1, 36, 36), torch.zeros(1, 36)
    simulated.conv_covariance_update_(second_moment, total, x, *geometry, choice=("covariance_sm80", 3, 0))
    patches = F.unfold(x.double(), 3, padding=1).transpose(1, 2).flatten(0, 1)
    assert_updated(second_moment[0], total[0], patches, dtype=FP16)


def test_ops_refuse_a_choice_without_a_kernel(simulated: Simulated):
    """A tuned table may be of another device, or of the nearest shape."""
    simulated.configure(SM90)
    x, down, up = normal(4, 64, dtype=BF16), normal(8, 64, dtype=BF16), normal(40, 8, dtype=BF16)
    for kernel, splits, reason in (
        ("decode_sm90", 3, "cannot split its work over 3 CTAs"),
        ("prefill_sm90", 0, "prefill_sm90 does not run this problem"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            simulated.ops._cuda_lowrank_linear(x, down, up, None, "none", kernel, splits)
    with pytest.raises(RuntimeError, match="cannot split its work over 2 CTAs"):
        simulated.ops._cuda_covariance_update_(torch.zeros(64, 64), torch.zeros(64), x, False, "", 2)


@pytest.mark.parametrize(
    "kernel, tokens, in_features", [("decode_sm80", 9, 1040), ("decode_sm90", 9, 1040), ("prefill_sm90", 80, 72)]
)
def test_first_calls_of_auto_are_right(simulated: Simulated, kernel, tokens, in_features, monkeypatch):
    """A kernel that is found wrong in its first call gives a warning, by which one of the planted faults is found."""

    def run(problem, x, down, up, bias, activation):
        return simulated.lowrank_linear(x, down, up, bias, activation, (kernel, 0, 0))[0]

    simulated.configure(SM90)
    impl = Impl(kernel, Backend.CUDA, lambda problem: None, run)
    monkeypatch.setattr(linear, "TABLE", (impl, linear.TABLE[-1]))
    monkeypatch.setattr(linear, "_decisions", BoundedCache(8))
    monkeypatch.setattr(_verify, "_passed", passed := set())
    args = linear_inputs(tokens, in_features=in_features, rank=24, out_features=40, dtype=BF16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        y = lowrank_linear(*args)
    assert len(passed) == 1
    assert torch.equal(y, run(None, *args, "none"))


def test_attributes_and_maps_of_weights_are_set_once(simulated: Simulated):
    """A map is of an address and a shape: other weights in the same memory have their own."""
    simulated.configure(SM90)
    memory = normal(136 * 72, dtype=BF16) / 8
    x = normal(70, 72, dtype=BF16)

    def calls(rank: int, stride: int = 72) -> list[int]:
        before = simulated.ops.host_calls()
        down, up = memory.as_strided((rank, 72), (stride, 1)), memory.as_strided((136, rank), (rank, 1))
        assert assert_linear(simulated, x, down, up, None, "none").startswith("prefill_sm90")
        return [now - then for now, then in zip(simulated.ops.host_calls(), before, strict=True)]

    calls(64)
    assert calls(64) == [1, 0]  # x
    assert calls(56) == [3, 0]
    assert calls(56, stride=80) == [2, 0]
    assert calls(64) == [1, 0]


def test_a_failed_launch_names_op_shapes_and_arch(simulated: Simulated):
    """Rows with stride 0, which the public ops refuse, cannot be encoded as a tensor map."""
    simulated.configure(SM90)
    x = normal(1, 64, dtype=BF16).expand(100, 64)
    with pytest.raises(RuntimeError, match=r"covariance_update_ of x \[100, 64\] on sm_90"):
        simulated.covariance_update_(torch.zeros(64, 64), torch.zeros(64), x)
    down, up = normal(8, 64, dtype=BF16), normal(40, 8, dtype=BF16)
    with pytest.raises(RuntimeError, match=r"lowrank_linear of x \[100, 64\], down \[8, 64\], up \[40, 8\] on sm_90"):
        simulated.lowrank_linear(x, down, up)
