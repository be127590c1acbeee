"""The Triton covariance kernels in Triton's CPU interpreter, against float64, and planted faults that are caught."""

import dataclasses
import os

import pytest
import torch

from tests.tolerance import assert_close_to_float64

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

import triton
import triton.language as tl

from lowrank_ops.ops import conv_covariance_update_, covariance_update_
from lowrank_ops.ops.covariance import (
    _triton,
    _triton_conv,
    _triton_kernels,
    describe,
    describe_conv,
    explain,
    reference,
)
from lowrank_ops.ops.covariance._triton import Config

pytestmark = pytest.mark.interpreter

TINY = Config(block_d=16, block_t=16, num_warps=4, num_stages=2, group=2, split=1)
SPLIT = dataclasses.replace(TINY, split=3)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Error bounds relative to the sum of |x_i x_j|, as documented.
BOUNDS = {"exact": 2.0**-21, "bf16x3": 2.0**-15, "tf32": 2.0**-10}
FEATURES = 2 * 16 + 3  # two groups of tile rows, the second one partial, and a tail


@pytest.fixture(autouse=True)
def poisoned_scratch():
    """``torch.empty`` returns NaN, so that reading unwritten scratch shows in the result."""
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports torch's compiler
    yield
    torch.set_deterministic_debug_mode("default")


def random(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return x.to(dtype)


def inside_poison(x, offset, row_stride):
    """``x`` (rows, features) as a view into memory filled with NaN."""
    rows, features = x.shape
    memory = torch.full((offset + rows * row_stride + 64,), float("nan"), dtype=x.dtype)
    view = memory[offset:].as_strided((rows, features), (row_stride, 1))
    return view.copy_(x)


def state(features, dtype):
    return random(features, features, dtype=dtype, seed=1), random(features, dtype=dtype, seed=2)


def assert_updated(second_moment, total, before, before_total, patches, precision, state_dtype):
    """Compare the lower triangle and the sums with float64. The upper triangle must be unchanged."""
    rows = patches.double().reshape(-1, patches.shape[-1])
    size = (rows.abs().T @ rows.abs()).tril()
    truth = (before.double() + rows.T @ rows).tril()
    error = (second_moment.double().tril() - truth).abs()
    assert error.isfinite().all()
    rounding = torch.finfo(state_dtype).eps * (before.double().abs().tril() + size)
    assert (error <= BOUNDS[precision] * size + 2 * rounding).all(), (error / (size + 1e-30)).max()
    assert torch.equal(second_moment.triu(1), before.triu(1))
    sums = before_total.double() + rows.sum(0)
    assert ((total.double() - sums).abs() <= 2.0**-20 * (rows.abs().sum(0) + before_total.abs())).all()


def update(x, config, state_dtype=torch.float32, deterministic=True, allow_tf32=False):
    """Run the kernel with ``config`` and check the result."""
    second_moment, total = state(x.shape[-1], state_dtype)
    before, before_total = second_moment.clone(), total.clone()
    problem = describe(second_moment, x, deterministic, allow_tf32)
    assert _triton.supports(problem) is None
    plan = _triton.plan_with(problem, config)
    _triton.launch(plan, second_moment, total, x, problem)
    precision = plan.constants["INPUT_PRECISION"]
    assert_updated(second_moment, total, before, before_total, x, precision, state_dtype)
    return plan, second_moment, total


CONFIGS = pytest.mark.parametrize("config", [TINY, SPLIT], ids=["one split", "three splits"])
STATES = pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64], ids=["state32", "state64"])


@CONFIGS
@pytest.mark.parametrize("dtype, state_dtype", list(zip(DTYPES, [torch.float32, torch.float64] * 2, strict=False)))
def test_shapes_with_tails(dtype, state_dtype, config):
    update(random(37, FEATURES, dtype=DTYPES[dtype]), config, state_dtype)


@CONFIGS
@pytest.mark.parametrize("tokens, features", [(32, 32), (1, 24), (37, 1), (1, 1)], ids=str)
def test_minimal_shapes(tokens, features, config):
    update(random(tokens, features, dtype=torch.bfloat16), config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset, row_stride, tma", [(0, 40, True), (0, 37, False), (1, 40, False)], ids=str)
def test_loads_stay_in_bounds(dtype, offset, row_stride, tma):
    x = inside_poison(random(21, 19, dtype=DTYPES[dtype]), offset, row_stride)
    plan, *_ = update(x, TINY)
    assert (plan.block is not None) is tma


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_error_is_within_the_tolerance(dtype):
    x = random(96, FEATURES, dtype=DTYPES[dtype])
    _, second_moment, total = update(x, SPLIT)
    same, same_total = state(FEATURES, torch.float32)
    true, true_total = (tensor.double() for tensor in state(FEATURES, torch.float32))
    reference.update(same, same_total, x)
    reference.update(true, true_total, x)
    assert_close_to_float64(second_moment.tril(), same.tril(), true.tril())
    assert_close_to_float64(total, same_total, true_total)


def distinct(heuristic):
    """The configurations of all archs, without repeats."""
    return list(dict.fromkeys((config, kind) for (_, kind), config in heuristic.items()))


@pytest.mark.parametrize("config, kind", distinct(_triton.HEURISTIC), ids=str)
def test_shipped_configuration(config, kind):
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    x = random(config.block_t + 5, config.block_d + 8, dtype=dtype)
    update(x, config)
    update(inside_poison(x, 1, x.shape[1] + 1), dataclasses.replace(config, split=2))


def test_many_swizzle_groups():
    update(random(9, 11 * 16, dtype=torch.bfloat16), dataclasses.replace(TINY, group=4))


@pytest.mark.parametrize("split, chunks", [(1, 3), (2, 2)])
def test_chunks_are_added_to_the_state(split, chunks):
    x = random(2 * _triton.CHUNK + 100, 16, dtype=torch.bfloat16)
    plan, *_ = update(x, dataclasses.replace(TINY, block_t=256, split=split), torch.float64)
    assert plan.chunks == chunks


@pytest.mark.parametrize("split", [1, 2, 7, 64])
def test_chunks_cover_all_tokens(split):
    for tokens in (1, 15, 16, 2047, 2048, 2049, 10_007):
        ways, chunks, length = _triton.cut_tokens(tokens, 1, 132, dataclasses.replace(TINY, split=split))
        assert ways == split and length % TINY.block_t == 0 and length <= _triton.CHUNK, tokens
        assert split * chunks * length >= tokens, tokens


@STATES
def test_atomics(state_dtype):
    plan, *_ = update(random(50, 40, dtype=torch.float16), SPLIT, state_dtype, deterministic=False)
    assert plan.constants["DEST"] == "atomic"


def test_tf32():
    plan, second_moment, _ = update(random(64, 32), TINY, allow_tf32=True)
    assert plan.constants["INPUT_PRECISION"] == "tf32"
    _, exact, _ = update(random(64, 32), TINY)
    assert not torch.equal(second_moment, exact)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("nan")])
def test_nonfinite_values_propagate(value):
    for x in (random(8, 16), random(8, 16).bfloat16()):
        x[3, 5] = value
        for allow_tf32 in (False, True):
            second_moment, total = torch.zeros(16, 16), torch.zeros(16)
            covariance_update_(second_moment, total, x, allow_tf32=allow_tf32, backend="triton")
            assert not second_moment[5, :6].isfinite().any() and not total[5].isfinite()
            assert second_moment[:5, :5].isfinite().all()


def test_nan_survives_rounding_to_tf32():
    x = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).expand(4, 16).contiguous()
    second_moment = torch.zeros(16, 16)
    covariance_update_(second_moment, torch.zeros(16), x, allow_tf32=True, backend="triton")
    assert second_moment.tril().isnan().sum() == 16 * 17 // 2


@STATES
def test_op_updates_strided_states(state_dtype):
    """Through schema, predicate, plan and kernel, with leading dimensions; empty inputs change nothing."""
    x = random(2, 9, 24, dtype=torch.bfloat16)
    memory, sums = random(30, 60, dtype=state_dtype), random(48, dtype=state_dtype)
    second_moment, total = memory[3:27, 4:52:2], sums[::2]
    before, before_total = second_moment.clone(), total.clone()
    covariance_update_(second_moment, total, x, backend="triton")
    assert_updated(second_moment, total, before, before_total, x, "exact", state_dtype)
    covariance_update_(second_moment, total, x[:0], backend="triton")
    assert_updated(second_moment, total, before, before_total, x, "exact", state_dtype)
    covariance_update_(torch.zeros(0, 0), torch.zeros(0), torch.zeros(5, 0), backend="triton")


VIEWS = {
    "strided vector": lambda x: x[0, ::2],
    "transposed": lambda x: x.T,
    "transposed sequences": lambda x: x.view(2, 20, 24).transpose(1, 2),
    "expanded": lambda x: x[:1].expand(9, -1),
    "unaligned": lambda x: x[:, 1:].T,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_noncontiguous_inputs_are_copied(view):
    x = view(random(40, 24, dtype=torch.bfloat16))
    features = x.shape[-1]
    second_moment, total = torch.zeros(features, features), torch.zeros(features)
    covariance_update_(second_moment, total, x, backend="triton")
    zero = torch.zeros_like(second_moment)
    assert_updated(second_moment, total, zero, torch.zeros_like(total), x, "exact", torch.float32)


def test_auto_does_not_use_the_interpreter():
    second_moment, total = torch.zeros(8, 8), torch.zeros(8)
    assert "triton: can run\nreference: runs" in explain(second_moment, total, random(4, 8))
    assert "x is torch.float64" in explain(second_moment.double(), total.double(), random(4, 8, dtype=torch.float64))
    assert "triton: can run" in explain(second_moment, total, random(8, 4).T)  # on a copy


# --- convolutions -----------------------------------------------------------------------------------------------

GEOMETRIES = {
    "plain": {"kernel_size": (3, 3)},
    "padded": {"kernel_size": (3, 3), "padding": (1, 1)},
    "rectangular": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    "patchify": {"kernel_size": (2, 4), "stride": (2, 4)},
    "pointwise": {"kernel_size": (1, 1), "stride": (2, 2)},
}


def update_conv(x, config, groups, geometry, state_dtype=torch.float32, deterministic=True):
    """Run the kernel with ``config`` and compare each group with unfolded patches."""
    full = {"kernel_size": None, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), **geometry}
    patches = torch.nn.functional.unfold(x.double(), **full).mT  # (batch, positions, channels * kernel area)
    features = patches.shape[-1] // groups
    second_moment = random(groups, features, features, dtype=state_dtype, seed=1)
    total = random(groups, features, dtype=state_dtype, seed=2)
    before, before_total = second_moment.clone(), total.clone()
    problem = describe_conv(second_moment, total, x, **full, deterministic=deterministic)
    assert _triton_conv.supports(problem) is None
    conv = _triton_conv.plan_with(problem, config)
    _triton_conv.launch(conv, second_moment, total, x)
    for group in range(groups):
        own = patches[..., group * features : (group + 1) * features]
        precision = conv.plan.constants["INPUT_PRECISION"]
        states = (second_moment[group], total[group], before[group], before_total[group])
        assert_updated(*states, own, precision, state_dtype)
    return conv


LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"]
)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@LAYOUTS
def test_conv_update_matches_im2col(geometry, layout):
    x = random(2, 8, 6, 4, dtype=torch.bfloat16).contiguous(memory_format=layout)
    conv = update_conv(x, TINY, 1, geometry)
    assert conv.channels_last is (layout == torch.channels_last)
    assert (conv.plan.vector == 8) is conv.channels_last


@pytest.mark.parametrize("dtype, groups", [("bf16", 1), ("fp16", 3), ("fp32", 2)])
@pytest.mark.parametrize(
    "config, state_dtype, deterministic",
    [(TINY, torch.float64, True), (SPLIT, torch.float32, True), (SPLIT, torch.float64, False)],
    ids=["state", "partial", "atomic"],
)
@LAYOUTS
def test_conv_groups_and_destinations(layout, config, state_dtype, deterministic, dtype, groups):
    x = random(2, 6, 4, 3, dtype=DTYPES[dtype]).contiguous(memory_format=layout)
    conv = update_conv(x, config, groups, {"kernel_size": (2, 2), "padding": (1, 0)}, state_dtype, deterministic)
    assert conv.plan.constants["DEST"] == ("state" if config is TINY else "partial" if deterministic else "atomic")


def test_conv_vector_loads_into_partial_tiles():
    x = random(2, 8, 5, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    conv = update_conv(x, SPLIT, 1, {"kernel_size": (3, 2), "padding": (1, 1)})
    assert conv.plan.vector == 8 and conv.plan.constants["DEST"] == "partial"


@pytest.mark.parametrize("config, kind", distinct(_triton_conv.HEURISTIC), ids=str)
def test_shipped_conv_configuration(config, kind):
    x = random(1, 8, 5, 9, dtype=torch.bfloat16)
    if kind == "vector":
        x = x.contiguous(memory_format=torch.channels_last)
    update_conv(x, config, 1, {"kernel_size": (3, 3), "padding": (1, 1)})


def test_conv_of_a_strided_view():
    memory = torch.full((2, 5, 9, 20), float("nan"))
    view = memory[:, 1:4, 2:8, 1::2].copy_(random(2, 3, 6, 10))
    update_conv(view, TINY, 1, {"kernel_size": (3, 3), "padding": (2, 2), "dilation": (2, 2)})


def test_conv_op_matches_reference():
    x = random(1, 4, 5, 5, dtype=torch.bfloat16)
    results = []
    for backend in ("triton", "reference"):
        second_moment = torch.zeros(2, 8, 8, dtype=torch.float64)
        total = torch.zeros(2, 8, dtype=torch.float64)
        conv_covariance_update_(second_moment, total, x, kernel_size=(2, 2), padding=(1, 1), backend=backend)
        results.append((second_moment.tril(), total))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


# --- planted faults: the checks above must fail for kernels that are wrong ----------------------------------------


@triton.jit
def full_groups_only(tile, tile_rows, GROUP: tl.constexpr):
    """Walks the last group of tile rows as if it were full, which misplaces its tiles."""
    row, _ = _triton_kernels.triangle(tile)
    top = row // GROUP * GROUP
    inside = tile - top * (top + 1) // 2
    return top + inside % GROUP, inside // GROUP


@triton.jit
def unmasked_rows(x, token, feature, tokens, features, row_stride, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TMA):
    rows = token + tl.arange(0, BLOCK_T)
    columns = feature + tl.arange(0, BLOCK_D)
    return tl.load(x + rows[:, None] * row_stride + columns[None, :])


@triton.jit
def unmasked_columns(x, token, feature, tokens, features, row_stride, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = token + tl.arange(0, BLOCK_T)
    columns = feature + tl.arange(0, BLOCK_D)
    return tl.load(x + rows[None, :] * row_stride + columns[:, None])


@triton.jit
def unmasked_add(target, value, mask, DEST: tl.constexpr):
    tl.store(target, tl.load(target) + value)


def assert_fault_is_caught(x):
    with pytest.raises(AssertionError):
        update(x, TINY)


def test_wrong_tile_index_is_caught(monkeypatch):
    monkeypatch.setattr(_triton_kernels, "lower_tile", full_groups_only)
    assert_fault_is_caught(random(20, FEATURES))


def test_missing_tail_mask_is_caught(monkeypatch):
    memory = torch.full((100, 40), float("nan"))
    x = memory[:20, :32].copy_(random(20, 32))
    x = x[:, 1:]  # unaligned: pointer loads
    update(x, TINY)
    monkeypatch.setattr(_triton_kernels, "load_rows", unmasked_rows)
    monkeypatch.setattr(_triton_kernels, "load_columns", unmasked_columns)
    assert_fault_is_caught(x)


def test_missing_diagonal_mask_is_caught(monkeypatch):
    monkeypatch.setattr(_triton_kernels, "add_to", unmasked_add)
    assert_fault_is_caught(random(16, 32))
