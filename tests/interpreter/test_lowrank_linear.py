"""The Triton kernels of ``lowrank_linear`` in Triton's CPU interpreter, against float64."""

import dataclasses
import os

import pytest
import torch

from tests.ops.inputs import assert_linear, linear_inputs
from tests.tolerance import assert_close_to_float64

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

import triton
import triton.language as tl

from lowrank_ops.ops import linear, lowrank_linear
from lowrank_ops.ops.linear import (
    _triton,
    _triton_config,
    _triton_decode_kernels,
    _triton_tiles,
    describe,
    reference,
)

pytestmark = pytest.mark.interpreter

# Tiles are small because the interpreter is slow. What is tested does not depend on their size.
TWO_KERNELS = _triton_config.DecodeConfig(16, 16, 32, 4, 2, 32, 16, 16, 4, 2)
FOLDED = dataclasses.replace(TWO_KERNELS, slices=4, fold=True)
SUMMED = dataclasses.replace(TWO_KERNELS, slices=4)
PREFILL = _triton_config.PrefillConfig(16, 32, 32, 16, 16, 4, 2, 2)
ALL = {"two kernels": TWO_KERNELS, "folded": FOLDED, "summed": SUMMED, "prefill": PREFILL}


def inputs(tokens, in_features, rank, out_features, dtype=torch.bfloat16, bias=True):
    sizes = {"in_features": in_features, "rank": rank, "out_features": out_features}
    return linear_inputs(tokens, **sizes, dtype=dtype, bias=bias)


def run(config, x, down, up, bias=None, activation="none"):
    problem = describe(x, down, up, bias, activation)
    if isinstance(config, _triton_config.DecodeConfig):
        assert _triton.supports_decode(problem, config) is None
        return _triton.run_decode(problem, x, down, up, bias, activation, config)
    assert _triton.supports_prefill(problem, config) is None
    return _triton.run_prefill(problem, x, down, up, bias, activation, config)


def assert_runs(config, x, down, up, bias, activation="none"):
    y = run(config, x, down, up, bias, activation)
    assert_linear(y, x, down, up, bias, activation)
    return y


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", [(5, 33, 7, 11), (19, 104, 24, 40)], ids=["odd", "tails"])
def test_shapes(config, dtype, shape):
    assert_runs(config, *inputs(*shape, dtype), "gelu")


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("shape", [(1, 64, 8, 32), (1, 1, 1, 1), (0, 32, 8, 16)], ids=["one token", "ones", "empty"])
def test_minimal_shapes(config, shape):
    assert_runs(config, *inputs(*shape), "gelu")


@pytest.mark.parametrize("config", [TWO_KERNELS, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(config, activation):
    assert_runs(config, *inputs(9, 40, 8, 24), activation)


@pytest.mark.parametrize("config", [TWO_KERNELS, PREFILL], ids=["decode", "prefill"])
def test_without_bias(config):
    assert_runs(config, *inputs(9, 40, 8, 24, bias=False))


@pytest.mark.parametrize("config", [FOLDED, SUMMED, PREFILL], ids=["folded", "summed", "prefill"])
@pytest.mark.parametrize("factors", ["padded", "transposed", "offset"])
def test_strided_inputs(config, factors):
    wide, down, up, bias = inputs(7, 64, 16, 24)
    x = wide[:, 8:48]  # row stride 64
    down = {"padded": down[:, :40], "transposed": down[:, :40].T.contiguous().T, "offset": down[:, 3:43]}[factors]
    up = up.T.contiguous().T if factors == "transposed" else up
    assert_runs(config, x, down, up, bias)


def test_factors_without_unit_stride_are_refused():
    x, down, up, bias = inputs(7, 40, 16, 24)
    strided = (down.T.contiguous().T[::2], up[:, ::2])
    assert "one stride of 1" in _triton.supports_decode(describe(x, *strided, bias, "none"))


@pytest.mark.parametrize("config", [TWO_KERNELS, PREFILL], ids=["decode", "prefill"])
def test_strided_bias(config):
    x, down, up, wide = inputs(7, 40, 16, 48)
    assert_runs(config, x, down, up[:24], wide[::2])


def test_cached_decisions_follow_layout():
    """The same shapes with other strides and alignment get the right kernel, and autograd works with each."""
    x, down, up, bias = inputs(5, 40, 16, 24)
    padded = torch.cat([x, x], 1)[:, :40]
    unaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(5, 40)
    transposed = down.T.contiguous().T
    for case in ((x, down), (padded, down), (unaligned, down), (x, transposed), (x, down)):
        assert_linear(lowrank_linear(*case, up, bias, backend="triton"), *case, up, bias, "none")
    leaves = [tensor.clone().requires_grad_() for tensor in (x, down, up, bias)]
    lowrank_linear(*leaves, backend="triton").float().sum().backward()
    assert all(tensor.grad is not None for tensor in leaves)


def test_unaligned_pointer():
    x, down, up, bias = inputs(3, 41, 8, 24)
    x = x.flatten()[1 : 1 + 2 * 40].view(2, 40)
    down = down[:, :40].contiguous()
    assert not describe(x, down, up, bias, "none").aligned
    assert_runs(TWO_KERNELS, x, down, up, bias)


@pytest.mark.parametrize("config", [TWO_KERNELS, PREFILL], ids=["decode", "prefill"])
def test_no_load_out_of_bounds(config):
    """Every operand has a frame of NaN."""

    def framed(matrix):
        frame = torch.full((matrix.shape[0] + 2, matrix.shape[1] + 16), float("nan"), dtype=matrix.dtype)
        inside = frame[1:-1, 8:-8]
        inside.copy_(matrix)
        return inside

    x, down, up, bias = inputs(5, 40, 8, 24, torch.float16)
    assert_linear(run(config, framed(x), framed(down), framed(up), bias), x, down, up, bias, "none")


@pytest.mark.parametrize("config", [FOLDED, PREFILL], ids=["decode", "prefill"])
def test_nan_and_infinity_stay_in_their_rows(config):
    x, down, up, bias = inputs(4, 32, 8, 16)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = run(config, x, down, up, bias, "relu")
    assert y[1].isnan().all()
    assert not y[2].isfinite().all()
    assert y[[0, 3]].isfinite().all()


def distinct(configs_of):
    """The configurations of all archs, without repeats."""
    return list(dict.fromkeys(config for name in ("sm80", "sm90", "sm100") for config in configs_of(name)))


@pytest.mark.parametrize("config", distinct(_triton_config.shipped_decode), ids=lambda config: str(config)[13:-1])
def test_shipped_decode_configuration(config):
    # A rank past the slab runs the second loop of up_kernel. SUMMED configurations share up_kernel with one slice.
    rank = config.slab + 8 if config.slices == 1 or config.fold else 24
    assert_runs(config, *inputs(3, config.block_k + 8, rank, 40), "silu")


@pytest.mark.parametrize("config", distinct(_triton_config.shipped_prefill), ids=lambda config: str(config)[14:-1])
def test_shipped_prefill_configuration(config):
    config = dataclasses.replace(config, parts=2)
    assert_runs(config, *inputs(config.block_m + 1, config.block_k + 8, config.rank - 8, config.block_n + 8))


def test_more_parts_than_column_tiles():
    assert_runs(dataclasses.replace(PREFILL, parts=8), *inputs(20, 32, 24, 40))


@pytest.mark.parametrize("config", [FOLDED, SUMMED], ids=["folded", "summed"])
def test_empty_slices_add_nothing(config):
    assert_runs(dataclasses.replace(config, slices=8), *inputs(2, 40, 8, 16, torch.float16))


@pytest.mark.parametrize("config", [TWO_KERNELS, FOLDED, SUMMED], ids=["two kernels", "folded", "summed"])
def test_scratch_needs_no_zeroing(config, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))
    assert_runs(config, *inputs(5, 72, 24, 40))


@pytest.mark.parametrize("tokens, name", [(3, "triton.decode"), (260, "triton.prefill")])
def test_op_runs_the_kernel(tokens, name):
    x, down, up, bias = inputs(tokens, 24, 8, 16)
    assert f"{name}: runs" in linear.explain(x, down, up, bias, backend="triton")
    assert_linear(lowrank_linear(x, down, up, bias, activation="gelu", backend="triton"), x, down, up, bias, "gelu")
    assert f"{name}: can run" in linear.explain(x, down, up, bias)  # auto does not use the interpreter
    torch.library.opcheck(
        torch.ops.lowrank_ops.lowrank_linear.default,
        (x, down, up, bias),
        {"activation": "silu", "backend": "triton"},
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("leading", [(), (3, 4), (2, 0), (1, 1)], ids=str)
def test_leading_dimensions(leading):
    args = linear_inputs(*leading, dtype=torch.bfloat16)
    y = lowrank_linear(*args, backend="triton")
    assert y.shape == (*leading, 16)
    assert_linear(y, *args, "none")


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("upstream", ["dense", "broadcast"])
@pytest.mark.parametrize("of", ["all", "x"])
def test_backward_matches_reference(activation, upstream, of):
    """If only x needs a gradient, the kernel gets transposed factors."""

    def gradients(dtype, backend):
        args = [tensor.to(dtype) for tensor in inputs(6, 40, 8, 24)]
        leaves = [tensor.requires_grad_() for tensor in (args if of == "all" else args[:1])]
        y = lowrank_linear(*args, activation=activation, backend=backend)
        grad = torch.linspace(-1, 1, y.numel()).view_as(y)
        if upstream == "broadcast":
            grad = grad[:1, :1].expand_as(y)
        return torch.autograd.grad(y, leaves, grad.bfloat16().to(dtype))

    for ours, same_dtype, exact in zip(
        gradients(torch.bfloat16, "triton"),
        gradients(torch.bfloat16, "reference"),
        gradients(torch.float64, "reference"),
        strict=True,
    ):
        assert_close_to_float64(ours, same_dtype, exact)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float32}, "takes bfloat16 or float16; this x is torch.float32"),
        ({"tokens": 257}, "at most 256 rows"),
        ({"rank": 0}, "no empty factors"),
        ({"in_features": 0}, "no empty factors"),
        ({"x_stride": 0}, "unit column stride"),
        ({"down_strides": (80, 2)}, "one stride of 1"),
        ({"x_stride": 2**22}, "below 4194304 elements"),
    ],
)
def test_refusals(change, words):
    problem = describe(*inputs(3, 40, 8, 24), "none")._replace(**change)
    assert words in _triton.supports_decode(problem)
    if "tokens" not in change:
        assert words in _triton.supports_prefill(problem)


def test_prefill_refuses_large_ranks():
    problem = describe(*inputs(3, 8, 264, 8), "none")
    assert "ranks up to 256" in _triton.supports_prefill(problem)
    assert "covers ranks up to 32" in _triton.supports_prefill(problem._replace(rank=40), PREFILL)


def test_rounding_is_to_nearest_even():
    """The interpreter's own cast truncates: ties, and values above the midpoint, would be wrong."""

    @triton.jit
    def cast(in_ptr, out_ptr, count: tl.constexpr, ROUND: tl.constexpr):
        value = tl.load(in_ptr + tl.arange(0, count))
        if ROUND:
            tl.store(out_ptr + tl.arange(0, count), _triton_tiles.round_to(value, tl.bfloat16))
        else:
            tl.store(out_ptr + tl.arange(0, count), value.to(tl.bfloat16))

    values = torch.randn(256, generator=torch.Generator().manual_seed(0))
    values[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan")])
    rounded, truncated = torch.empty(2, 256, dtype=torch.bfloat16)
    cast[(1,)](values, rounded, 256, True)
    cast[(1,)](values, truncated, 256, False)
    torch.testing.assert_close(rounded, values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(truncated[4:], values.to(torch.bfloat16)[4:])


# --- planted faults: the checks above must fail for kernels that are wrong ----------------------------------------


def assert_fault_is_caught(monkeypatch, function, fault, args):
    """``args`` pass with the real kernels and fail with ``function`` replaced by ``fault(original)``."""
    assert_runs(TWO_KERNELS, *args)
    monkeypatch.setattr(_triton_decode_kernels, function, fault(getattr(_triton_decode_kernels, function)))
    with pytest.raises(AssertionError, match="off by"):
        y = run(TWO_KERNELS, *args)
        # Memory that no program stored to may hold anything, also NaN.
        assert y.isfinite().all(), "off by infinity"
        assert_linear(y, *args, "none")


def test_truncating_cast_is_caught(monkeypatch):
    # All positive, so that the truncation errors add up, as behind a ReLU.
    args = [tensor.abs() for tensor in inputs(16, 128, 32, 64)]
    assert_fault_is_caught(monkeypatch, "round_to", lambda original: lambda value, dtype: value.to(dtype), args)


def test_missing_mask_is_caught(monkeypatch):
    """Loads past the last column add what lies there."""

    def fault(original):
        return lambda ptr, row, column, rows, columns, *rest: original(ptr, row, column, rows, columns + 8, *rest)

    x, down, up, bias = inputs(5, 48, 8, 24, torch.float16)
    assert_fault_is_caught(monkeypatch, "load_tile", fault, (x[:, :40], down[:, :40], up, bias))


def test_misplaced_tile_is_caught(monkeypatch):
    def fault(original):
        return lambda ptr, value, row, column, *rest: original(ptr, value, row, column // 2, *rest)

    assert_fault_is_caught(monkeypatch, "store_tile", fault, inputs(5, 40, 24, 40, torch.float16))
