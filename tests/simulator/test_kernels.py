"""Every CUDA kernel, from its own source, on a simulated device against float64.

What a GPU decides by chance, who goes on first and when an asynchronous copy arrives, is decided here by a seed. A
thread that reads what it did not wait for, finds NaN or old values in one of the orders; one that waits for what never
comes, is an error.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from simulated import SM80, SM86, SM90, Machine, Simulated
from torch import Tensor

from tests.tolerance import assert_close_to_float64

ORDERS = [("early", 1), ("late", 2), ("copies_first", 3), ("random", 4), ("random", 5)]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TF32 = "float32 in TensorFloat-32"
# Relative to the sum of |x_i x_j|: products are exact or, for float32, three of bfloat16 or one of TensorFloat-32.
BOUNDS = {BF16: 2.0**-17, FP16: 2.0**-17, FP32: 2.0**-15, TF32: 2.0**-10}


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]}{order[1]}")
def order(request: pytest.FixtureRequest) -> tuple[str, int]:
    timing, seed = request.param
    return timing, seed


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """What an op allocates and does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype | str, mean: float = 0.0, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean
    return x if isinstance(dtype, str) else x.to(dtype)


def among_nan(x: Tensor, offset: int, padding: int) -> Tensor:
    """The same matrix, with NaN before, between and behind its rows."""
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
    assert (
        (total.double() - before - rows.sum(0)).abs() <= 2.0**-18 * rows.abs().sum(0) + 2.0**-22 * abs(before)
    ).all()
    assert (second_moment.triu(1) == before * torch.ones_like(second_moment).triu(1)).all()


COVARIANCES = [  # machine, dtype, tokens, features, offset, padding, kernel and what it is about
    (SM90, BF16, 300, 200, 0, 0, "covariance_sm90"),
    (SM90, FP16, 150, 136, 0, 24, "covariance_sm90"),
    (SM90._replace(multiprocessors=2), BF16, 2200, 130, 0, 6, "covariance_sm90: .* 1 splits"),  # more than one chunk
    (SM90, BF16, 1500, 72, 0, 0, "covariance_sm90: .* [2-9] splits"),
    (SM90, BF16, 1, 128, 0, 0, "covariance_sm90"),
    (SM80, BF16, 300, 200, 0, 0, "covariance_sm80: .* 4 stages"),
    (SM86, FP16, 300, 136, 0, 0, "covariance_sm80: .* 5 stages"),
    (SM80._replace(multiprocessors=2), BF16, 2200, 130, 0, 6, "covariance_sm80: .* 4 stages, .* 1 splits"),
    (SM80, BF16, 1500, 72, 0, 0, "covariance_sm80: .* [2-9] splits"),
    (SM90, BF16, 100, 131, 1, 2, "covariance_sm80: .* 2 stages"),  # any alignment
    (SM90, FP32, 100, 70, 0, 0, "covariance_sm80: .* 2 stages"),
    (SM80, FP32, 200, 131, 3, 1, "covariance_sm80: .* 2 stages"),
    (SM90, TF32, 300, 200, 0, 0, "covariance_sm80: TensorFloat-32, .* 2 stages"),
    (SM80._replace(multiprocessors=2), TF32, 2200, 130, 0, 2, "covariance_sm80: TensorFloat-32, .* 1 splits"),
    (SM86, TF32, 1500, 72, 0, 0, "covariance_sm80: TensorFloat-32, .* [2-9] splits"),
    (SM80, TF32, 200, 131, 3, 1, "covariance_sm80: TensorFloat-32, .* 2 stages"),  # any alignment
    (SM80, TF32, 1, 129, 0, 3, "covariance_sm80: TensorFloat-32"),
    (SM86, FP16, 1, 1, 1, 0, "covariance_sm80"),
    (SM90, BF16, 513, 1, 0, 0, "covariance_sm80"),
    (SM90._replace(multiprocessors=1), BF16, 330, 64, 0, 0, "covariance_sm90: .* 1 splits"),  # stages are used twice
]  # fmt: skip


@pytest.mark.parametrize("machine, dtype, tokens, features, offset, padding, kernel", COVARIANCES)
def test_covariance(simulated: Simulated, order, machine: Machine, dtype, tokens, features, offset, padding, kernel):
    x = among_nan(normal(tokens, features, dtype=dtype, mean=0.5), offset, padding)
    simulated.configure(machine, *order)
    second_moment, total = torch.full((features, features), 3.0), torch.full((features,), 3.0)
    plan = simulated.covariance_update_(second_moment, total, x, dtype == TF32)
    assert re.match(kernel, plan), plan
    assert_updated(second_moment, total, x, before=3.0, dtype=dtype)


WIDE = [  # machine, dtype, tokens, features, padding, splits asked for, and what it is about
    (SM90, BF16, 300, 256, 0, 0, "1 tiles whole"),
    (SM90, FP16, 150, 392, 24, 0, "3 tiles whole"),
    (SM90, BF16, 700, 264, 0, 3, "3 tiles x 3 splits of 256 tokens"),
    (SM90, BF16, 330, 520, 8, 2, "4 tiles whole, 2 tiles x 2 splits of 192 tokens"),
    (SM90, BF16, 1, 8, 0, 0, "1 tiles whole"),
    (SM90._replace(multiprocessors=2), BF16, 4200, 72, 0, 0, "1 tiles whole"),  # more than one chunk
    (SM90, BF16, 8400, 136, 0, 2, "1 tiles x 2 splits of 4224 tokens"),  # of which a partial tile is added up as well
]


@pytest.mark.parametrize("machine, dtype, tokens, features, padding, splits, about", WIDE)
def test_wide_covariance(simulated: Simulated, order, machine, dtype, tokens, features, padding, splits, about):
    x = among_nan(normal(tokens, features, dtype=dtype, mean=0.5), 0, padding)
    simulated.configure(machine, *order)
    second_moment, total = torch.full((features, features), 3.0), torch.full((features,), 3.0)
    plan = simulated.covariance_update_(second_moment, total, x, choice=("covariance_sm90_wide", splits, 0))
    assert f" {about}, " in plan, plan
    assert_updated(second_moment, total, x, before=3.0)


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("stride", [1, 2])
def test_wide_covariance_into_a_strided_state(simulated: Simulated, order, stride, dtype):
    """Pairs that lie together, neighbours apart, rows that start between pairs."""
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


@pytest.mark.parametrize("splits", [0, 1])
@pytest.mark.parametrize("columns", [slice(7, 207), slice(7, 407, 2)], ids=["rows", "strided"])
@pytest.mark.parametrize("machine", [SM80, SM90], ids=["sm_80", "sm_90"])
def test_covariance_into_a_float64_state_among_others(simulated: Simulated, order, machine, columns, splits):
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


@pytest.mark.parametrize("machine", [SM80, SM90], ids=["sm_80", "sm_90"])
def test_covariance_of_more_than_one_chunk_per_split(simulated: Simulated, order, machine):
    x = normal(4300, 72, dtype=BF16)
    second_moment, total = torch.zeros(72, 72), torch.zeros(72)
    simulated.configure(machine, *order)
    simulated.covariance_update_(second_moment, total, x, choice=("", 2, 0))
    assert_updated(second_moment, total, x)


CONVOLUTIONS = [  # shape, kernel, stride, padding, dilation, groups, dtype, channels last
    ((2, 4, 9, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1, BF16, False),
    ((2, 4, 9, 8), (3, 2), (2, 1), (0, 2), (2, 1), 2, FP16, True),
    ((1, 16, 7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1, FP32, False),
    ((3, 3, 5, 20), (1, 9), (1, 4), (0, 4), (1, 1), 1, BF16, True),
    ((2, 4, 9, 8), (3, 2), (2, 1), (0, 2), (2, 1), 2, TF32, True),
    ((1, 16, 7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1, TF32, False),
]


@pytest.mark.parametrize("machine", [SM80, SM90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("shape, kernel, stride, padding, dilation, groups, dtype, last", CONVOLUTIONS)
def test_conv_covariance(
    simulated: Simulated, order, machine, shape, kernel, stride, padding, dilation, groups, dtype, last
):
    x = normal(*shape, dtype=dtype, mean=0.5)
    if last:
        x = x.to(memory_format=torch.channels_last)
    features = shape[1] // groups * kernel[0] * kernel[1]
    second_moment, total = torch.zeros(groups, features, features), torch.zeros(groups, features)
    simulated.configure(machine, *order)
    simulated.conv_covariance_update_(
        second_moment, total, x, kernel, stride, padding, dilation, allow_tf32=dtype == TF32
    )
    columns = F.unfold(x.double(), kernel, dilation, padding, stride)
    patches = columns.view(len(x), groups, features, -1).permute(1, 0, 3, 2).reshape(groups, -1, features)
    for group in range(groups):
        assert_updated(second_moment[group], total[group], patches[group], dtype=dtype)


ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
LINEARS = [  # machine, dtype, (tokens, in_features, rank, out_features), offset, kernel and what it is about
    (SM80, BF16, (1, 256, 64, 128), 0, "decode_sm80: 8 tokens"),
    (SM80, FP16, (13, 200, 40, 100), 0, "decode_sm80: 16 tokens"),
    (SM80, BF16, (64, 320, 24, 72), 0, "decode_sm80: 64 tokens"),
    (SM80._replace(multiprocessors=64), BF16, (9, 2048, 16, 40), 0, r"decode_sm80: .* x [2-8] splits"),
    (SM80, FP16, (33, 100, 17, 33), 1, "decode_sm80"),  # nothing on 16 bytes
    (SM90, BF16, (5, 97, 3, 5), 3, "decode_sm80"),  # and one kernel that may overlap the other
    (SM80, BF16, (3, 1, 1, 1), 0, "decode_sm80"),
    (SM90, BF16, (1, 256, 64, 128), 0, "decode_sm90: 8 tokens"),
    (SM90, FP16, (64, 264, 24, 136), 0, "decode_sm90: 64 tokens"),
    (SM90._replace(multiprocessors=16), BF16, (4, 4096, 24, 200), 0, "decode_sm90: .* clusters of [248]"),
    (SM90._replace(multiprocessors=3), BF16, (20, 512, 72, 300), 0, "decode_sm90: 32 tokens"),
    (SM90._replace(multiprocessors=2, shared_memory=40000), BF16, (30, 64, 104, 330), 0, "decode_sm90: 32 tokens"),
    (SM90, BF16, (65, 8, 8, 3), 0, "prefill_sm90"),
    (SM90, BF16, (130, 200, 64, 136), 0, "prefill_sm90"),
    (SM90._replace(multiprocessors=1), FP16, (200, 136, 56, 200), 0, "prefill_sm90"),
    (SM90._replace(multiprocessors=1), BF16, (130, 64, 192, 100), 0, "prefill_sm90"),
    (SM90, BF16, (100, 512, 128, 392), 0, "prefill_sm90"),
    (SM90, FP16, (70, 328, 248, 520), 0, "prefill_sm90"),
    (SM90._replace(multiprocessors=4), BF16, (300, 64, 256, 64), 0, "prefill_sm90"),
    (SM90._replace(multiprocessors=1), BF16, (70, 1032, 64, 1100), 0, "prefill_sm90"),  # stages are used many times
    (SM90._replace(multiprocessors=2), FP16, (70, 712, 256, 1304), 0, "prefill_sm90"),
    (SM90, BF16, (128, 64, 64, 72), 0, "prefill_sm90"),  # a whole tile
]


@pytest.mark.parametrize("machine, dtype, shape, offset, kernel", LINEARS)
def test_lowrank_linear(simulated: Simulated, order, machine: Machine, dtype, shape, offset, kernel):
    tokens, in_features, rank, out_features = shape
    x = among_nan(normal(tokens, in_features, dtype=dtype), offset, 0)
    down = among_nan(normal(rank, in_features, dtype=dtype, seed=1) / in_features**0.5, offset, 0)
    up = among_nan(normal(out_features, rank, dtype=dtype, seed=2) / rank**0.5, offset, 0)
    bias = normal(out_features, dtype=dtype, seed=3) if tokens % 2 else None
    activation = list(ACTIVATIONS)[tokens % 5]
    simulated.configure(machine, *order)
    y, plan = simulated.lowrank_linear(x, down, up, bias, activation)
    assert re.match(kernel, plan), plan
    act = ACTIVATIONS[activation]
    exact = act(F.linear(F.linear(x.double(), down.double()), up.double(), None if bias is None else bias.double()))
    assert_close_to_float64(y, act(F.linear(F.linear(x, down), up, bias)), exact)


def test_same_bits_in_every_order(simulated: Simulated):
    """A sum that depended on who comes first would differ."""
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


PREFILL_CHOICES = [  # every kernel: rank, cluster, tokens per block
    *((64, cluster, 128) for cluster in (1, 2)),
    *((128, cluster, 128) for cluster in (1, 2, 4)),
    *((192, cluster, 128) for cluster in (1, 2)),
    *((256, cluster, 128) for cluster in (2, 4, 8)),
    (64, 1, 192),
    *((128, cluster, 192) for cluster in (1, 2)),
    (192, 2, 192),
    *((256, cluster, 192) for cluster in (2, 4)),
    *((rank, 1, 256) for rank in (64, 128, 192)),  # two blocks of 128 tokens
    *((rank, 1, token_tile) for rank in (144, 160, 176) for token_tile in (128, 256)),
    *((rank, 2, token_tile) for rank in (144, 160, 176, 208, 224, 240) for token_tile in (128, 192)),
]


def test_every_prefill_kernel_gives_the_same(simulated: Simulated):
    """Whatever the block and the cluster, a value of y is the same sums in the same order."""
    seen = set()
    simulated.configure(SM90)
    for rank in sorted({rank for rank, _, _ in PREFILL_CHOICES}):
        x = normal(300, 72, dtype=BF16)
        down, up = normal(rank, 72, dtype=BF16) / 8, normal(520, rank, dtype=BF16) / 8
        expected = simulated.lowrank_linear(x, down, up)[0]
        for cluster, token_tile in sorted({(cluster, token_tile) for _, cluster, token_tile in PREFILL_CHOICES}):
            choice = ("prefill_sm90", cluster, token_tile)
            if simulated.ops._plan_lowrank_linear(300, 72, rank, 520, "bfloat16", True, *SM90, *choice)[0]:
                continue
            y, plan = simulated.lowrank_linear(x, down, up, choice=choice)
            assert torch.equal(y, expected), plan  # zeros that are multiplied change no bit
            seen.add((int(re.search(r"ranks up to (\d+)", plan)[1]), cluster, token_tile))
    assert seen == set(PREFILL_CHOICES)


LINEAR_CHOICES = [
    *((4, "decode_sm80", splits) for splits in (1, 2, 3, 8, 16)),
    *((4, "decode_sm90", cluster) for cluster in (1, 2, 4, 8)),
    *((70, "prefill_sm90", cluster) for cluster in (1, 2, 4)),
    *((tokens, kernel, 2) for tokens in (65, 140) for kernel in ("decode_sm80", "decode_sm90")),
]


@pytest.mark.parametrize("rank, cluster, token_tile", PREFILL_CHOICES)
def test_every_prefill_kernel(simulated: Simulated, order, rank, cluster, token_tile):
    """Tokens of one block, or two, and a little, a rank that is not whole, rows of up for some blocks only."""
    x, down = normal(token_tile + 70, 200, dtype=BF16), normal(rank - 8, 200, dtype=BF16) / 14
    up, bias = normal(136, rank - 8, dtype=BF16) / rank**0.5, normal(136, dtype=BF16)
    simulated.configure(SM90, *order)
    y, plan = simulated.lowrank_linear(x, down, up, bias, "silu", choice=("prefill_sm90", cluster, token_tile))
    assert plan.startswith(f"prefill_sm90: {token_tile} tokens, "), plan
    assert ("pairs of blocks" in plan) == (token_tile == 256)
    assert f"clusters of {cluster}," in plan and f"ranks up to {rank}," in plan, plan
    plain = F.silu(F.linear(F.linear(x, down), up, bias))
    exact = F.silu(F.linear(F.linear(x.double(), down.double()), up.double(), bias.double()))
    assert_close_to_float64(y, plain, exact)


@pytest.mark.parametrize("tokens, kernel, splits", LINEAR_CHOICES)
def test_lowrank_linear_by_choice(simulated: Simulated, order, tokens, kernel, splits):
    """What a tuned table may ask for instead of the planner's own choice."""
    x, down, up = normal(tokens, 512, dtype=BF16), normal(128, 512, dtype=BF16) / 16, normal(72, 128, dtype=BF16) / 8
    simulated.configure(SM90, *order)
    y, plan = simulated.lowrank_linear(x, down, up, choice=(kernel, splits, 0))
    assert plan.startswith(f"{kernel}: "), plan
    assert f"clusters of {splits}," in plan if kernel == "prefill_sm90" else f"{splits} splits" in plan
    assert_close_to_float64(y, F.linear(F.linear(x, down), up), (x.double() @ down.double().T) @ up.double().T)


def test_blocks_of_a_cluster_may_be_left_without_features(simulated: Simulated, order):
    x, down, up = normal(4, 40, dtype=BF16), normal(16, 40, dtype=BF16) / 6, normal(72, 16, dtype=BF16) / 4
    simulated.configure(SM90, *order)
    y, plan = simulated.lowrank_linear(x, down, up, choice=("decode_sm90", 8))
    assert "8 splits of 32 features" in plan
    assert_close_to_float64(y, F.linear(F.linear(x, down), up), (x.double() @ down.double().T) @ up.double().T)


@pytest.mark.parametrize("kernel", ["covariance_sm80", "covariance_sm90"])
@pytest.mark.parametrize("splits", [1, 2, 5, 10])
def test_covariance_by_choice(simulated: Simulated, order, kernel, splits):
    x = normal(640, 136, dtype=BF16, mean=0.5)
    simulated.configure(SM90, *order)
    second_moment, total = torch.zeros(136, 136), torch.zeros(136)
    plan = simulated.covariance_update_(second_moment, total, x, choice=(kernel, splits, 0))
    assert re.match(f"{kernel}: .* {splits} splits", plan), plan
    assert_updated(second_moment, total, x)


def test_conv_covariance_by_choice(simulated: Simulated, order):
    x = normal(4, 4, 9, 8, dtype=FP16)
    simulated.configure(SM90, *order)
    geometry = (3, 3), (1, 1), (1, 1), (1, 1)
    second_moment, total = torch.zeros(1, 36, 36), torch.zeros(1, 36)
    simulated.conv_covariance_update_(second_moment, total, x, *geometry, choice=("covariance_sm80", 3, 0))
    patches = F.unfold(x.double(), 3, padding=1).transpose(1, 2).flatten(0, 1)
    assert_updated(second_moment[0], total[0], patches, dtype=FP16)


def test_a_choice_that_cannot_be_had_is_refused(simulated: Simulated):
    """By the op as well: a table is of another device, or of the nearest shape."""
    simulated.configure(SM90)
    x, down, up = normal(4, 64, dtype=BF16), normal(8, 64, dtype=BF16), normal(40, 8, dtype=BF16)
    for kernel, splits, reason in (
        ("decode_sm90", 3, "cannot share its work among 3 blocks"),
        ("prefill_sm90", 0, "prefill_sm90 does not run this problem"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            simulated.ops._cuda_lowrank_linear(x, down, up, None, "none", kernel, splits)
    with pytest.raises(RuntimeError, match="cannot share its work among 2 blocks"):
        simulated.ops._cuda_covariance_update_(torch.zeros(64, 64), torch.zeros(64), x, False, "", 2)


def test_a_launch_that_fails_names_op_shapes_and_arch(simulated: Simulated):
    """Rows that all lie in one place, which the ops refuse, the tensor copy engine refuses as well."""
    simulated.configure(SM90)
    x = normal(1, 64, dtype=BF16).expand(100, 64)
    with pytest.raises(RuntimeError, match=r"covariance_update_ of x \[100, 64\] on sm_90"):
        simulated.covariance_update_(torch.zeros(64, 64), torch.zeros(64), x)
    down, up = normal(8, 64, dtype=BF16), normal(40, 8, dtype=BF16)
    with pytest.raises(RuntimeError, match=r"lowrank_linear of x \[100, 64\], down \[8, 64\], up \[40, 8\] on sm_90"):
        simulated.lowrank_linear(x, down, up)
