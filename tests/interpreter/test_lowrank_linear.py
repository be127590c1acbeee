"""The Triton kernels of the low-rank product in Triton's CPU interpreter, against float64."""

import dataclasses
import os

import pytest
import torch

from tests.tolerance import assert_close_to_float64

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from lowrank_ops.ops import linear, lowrank_linear
from lowrank_ops.ops.linear import _triton, _triton_config, _triton_decode, _triton_tile, describe, reference

pytestmark = pytest.mark.interpreter

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
# Tiles as small as the interpreter is slow; what is under test does not depend on their size.
PAIR = _triton_config.DecodeConfig(16, 16, 32, 4, 2, 32, 16, 16, 4, 2)
FOLDED = dataclasses.replace(PAIR, slices=4, fold=True)
SUMMED = dataclasses.replace(PAIR, slices=4)
PREFILL = _triton_config.PrefillConfig(16, 32, 32, 16, 16, 4, 2, 2)


def arguments(tokens, in_features, rank, out_features, dtype, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    down = (torch.randn(rank, in_features, generator=generator) / in_features**0.5).to(dtype)
    up = (torch.randn(out_features, rank, generator=generator) / rank**0.5).to(dtype)
    return x, down, up, torch.randn(out_features, generator=generator).to(dtype) if bias else None


def assert_right(y, x, down, up, bias, activation):
    wide = [None if tensor is None else tensor.double() for tensor in (x, down, up, bias)]
    assert_close_to_float64(
        y,
        reference.two_products(x, down, up, bias, activation),
        reference.two_products(*wide, activation),
    )


def run(config, x, down, up, bias=None, activation="none"):
    problem = describe(x, down, up, bias, activation)
    if isinstance(config, _triton_config.DecodeConfig):
        assert _triton.supports_decode(problem, config) is None
        return _triton.run_decode(problem, x, down, up, bias, activation, config)
    assert _triton.supports_prefill(problem, config) is None
    return _triton.run_prefill(problem, x, down, up, bias, activation, config)


@pytest.mark.parametrize("config", [PAIR, FOLDED, SUMMED, PREFILL], ids=["pair", "folded", "summed", "prefill"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 8, 32), (16, 128, 16, 64), (5, 33, 7, 11), (19, 100, 24, 40), (1, 1, 1, 1), (0, 32, 8, 16)],
    ids=["one-row", "aligned", "odd", "tails", "ones", "empty"],
)
def test_shapes(config, dtype, shape):
    args = arguments(*shape, dtype)
    assert_right(run(config, *args, "gelu"), *args, "gelu")


@pytest.mark.parametrize("config", [PAIR, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(config, bias, activation):
    args = arguments(9, 40, 8, 24, torch.bfloat16, bias)
    assert_right(run(config, *args, activation), *args, activation)


@pytest.mark.parametrize("config", [FOLDED, SUMMED, PREFILL], ids=["folded", "summed", "prefill"])
def test_strides(config):
    wide, down, up, bias = arguments(7, 64, 16, 24, torch.bfloat16)
    x = wide[:, 8:48]  # rows further apart than they are long
    transposed = (torch.randn(40, 16).to(x.dtype).T, torch.randn(16, 24).to(x.dtype).T)
    for factors in ((down[:, :40], up), transposed, (down[:, 3:43], up[:, :]), (transposed[0][::2], up[:, ::2])):
        problem = describe(x, *factors, bias, "none")
        refused = _triton.supports_decode(problem)
        if 1 not in factors[1].stride() or 1 not in factors[0].stride():
            assert refused is not None and "one stride of 1" in refused
        else:
            assert_right(run(config, x, *factors, bias), x, *factors, bias, "none")


@pytest.mark.parametrize("config", [FOLDED, SUMMED, PREFILL], ids=["folded", "summed", "prefill"])
def test_a_bias_with_gaps(config):
    x, down, up, wide = arguments(7, 40, 16, 48, torch.bfloat16)
    bias = wide[::2]
    assert_right(run(config, x, down, up[:24], bias), x, down, up[:24], bias, "none")


def test_calls_reach_the_kernels_and_go_on_reaching_the_right_one():
    """Through the op and what it remembers: rows, then the same shapes with other strides and off 16 bytes."""
    x, down, up, bias = arguments(5, 40, 16, 24, torch.bfloat16)
    padded = torch.cat([x, x], 1)[:, :40]
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(5, 40)
    transposed = down.T.contiguous().T
    for case in ((x, down), (padded, down), (shifted, down), (x, transposed), (x, down)):
        assert_right(lowrank_linear(*case, up, bias, backend="triton"), *case, up, bias, "none")
    recorded = [tensor.clone().requires_grad_() for tensor in (x, down, up, bias)]
    lowrank_linear(*recorded, backend="triton").float().sum().backward()
    assert all(tensor.grad is not None for tensor in recorded)


def test_a_pointer_off_16_bytes_is_read_right():
    x, down, up, bias = arguments(3, 41, 8, 24, torch.bfloat16)
    x = x.flatten()[1 : 1 + 2 * 40].view(2, 40)
    down = down[:, :40].contiguous()
    assert not describe(x, down, up, bias, "none").aligned
    assert_right(run(PAIR, x, down, up, bias), x, down, up, bias, "none")


@pytest.mark.parametrize("config", [PAIR, PREFILL], ids=["decode", "prefill"])
def test_what_lies_outside_is_not_read(config):
    """NaN around every operand: a mask that is off by one shows."""

    def framed(matrix):
        frame = torch.full((matrix.shape[0] + 2, matrix.shape[1] + 16), float("nan"), dtype=matrix.dtype)
        inside = frame[1:-1, 8:-8]
        inside.copy_(matrix)
        return inside

    x, down, up, bias = arguments(5, 40, 8, 24, torch.float16)
    y = run(config, framed(x), framed(down), framed(up), bias)
    assert_right(y, x, down, up, bias, "none")


def test_nan_and_infinity_stay_in_their_rows():
    x, down, up, bias = arguments(4, 32, 8, 16, torch.bfloat16)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    for config in (FOLDED, PREFILL):
        y = run(config, x, down, up, bias, "relu")
        assert y[1].isnan().all()
        assert not y[2].isfinite().all()
        assert y[[0, 3]].isfinite().all()


def shipped(configs_of):
    """All that ship for any arch, once."""
    return list(dict.fromkeys(config for name in ("sm80", "sm90", "sm100") for config in configs_of(name)))


def test_every_decode_configuration_that_ships():
    configs = shipped(_triton_config.shipped_decode)
    assert {config.slices for config in configs} == {1, 4, 8}
    for config in configs:
        # Past the slab where up_kernel's form is a new one; a sum of slices before it leaves it as with one slice.
        rank = config.slab + 8 if config.slices == 1 or config.fold else 24
        args = arguments(3, config.block_k + 8, rank, 40, torch.bfloat16)
        assert_right(run(config, *args, "silu"), *args, "silu")


def test_every_prefill_configuration_that_ships():
    for config in shipped(_triton_config.shipped_prefill):
        config = dataclasses.replace(config, parts=2)
        args = arguments(config.block_m + 1, config.block_k + 8, config.rank - 8, config.block_n + 8, torch.bfloat16)
        assert_right(run(config, *args), *args, "none")


def test_more_parts_than_columns_of_blocks():
    args = arguments(20, 32, 24, 40, torch.bfloat16)
    assert_right(run(dataclasses.replace(PREFILL, parts=8), *args), *args, "none")


def test_slices_past_the_end_add_nothing():
    args = arguments(2, 40, 8, 16, torch.float16)
    for config in (dataclasses.replace(FOLDED, slices=8), dataclasses.replace(SUMMED, slices=8)):
        assert_right(run(config, *args), *args, "none")


def test_scratch_needs_no_zeroing(monkeypatch):
    """Every element that is read was written in the same call."""
    honest = torch.empty

    def poisoned(*args, **options):
        return honest(*args, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    for config in (PAIR, FOLDED, SUMMED):
        args = arguments(5, 72, 24, 40, torch.bfloat16)
        assert_right(run(config, *args), *args, "none")


def test_the_op_runs_both_kernels_by_name():
    for tokens, name in ((3, "triton.decode"), (260, "triton.prefill")):
        x, down, up, bias = arguments(tokens, 24, 8, 16, torch.bfloat16)
        assert f"{name}: runs" in linear.explain(x, down, up, bias, backend="triton")
        assert_right(lowrank_linear(x, down, up, bias, activation="gelu", backend="triton"), x, down, up, bias, "gelu")
        assert f"{name}: can run" in linear.explain(x, down, up, bias)  # auto leaves the interpreter alone


def test_leading_dimensions():
    x, down, up, bias = arguments(12, 24, 8, 16, torch.bfloat16)
    for shape in ((24,), (3, 4, 24), (2, 0, 24), (1, 1, 24)):
        leading = x[:1].reshape(shape) if len(shape) == 1 else x[: shape[0] * shape[1]].reshape(shape)
        y = lowrank_linear(leading, down, up, bias, backend="triton")
        assert y.shape == (*shape[:-1], 16)
        assert_right(y, leading, down, up, bias, "none")


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("upstream", ["dense", "broadcast"])
@pytest.mark.parametrize("of", ["all", "x"])
def test_backward_against_the_reference(activation, upstream, of):
    """Where only x needs a gradient, it hands over factors that are not row-major."""

    def gradients(dtype, backend):
        args = [tensor.to(dtype) for tensor in arguments(6, 40, 8, 24, torch.bfloat16)]
        leaves = [tensor.requires_grad_() for tensor in (args if of == "all" else args[:1])]
        y = lowrank_linear(*args, activation=activation, backend=backend)
        grad = torch.linspace(-1, 1, y.numel()).view_as(y)
        if upstream == "broadcast":
            grad = grad[:1, :1].expand_as(y)
        return torch.autograd.grad(y, leaves, grad.bfloat16().to(dtype))

    truth = gradients(torch.float64, "reference")
    for ours, theirs, exact in zip(
        gradients(torch.bfloat16, "triton"), gradients(torch.bfloat16, "reference"), truth, strict=True
    ):
        assert_close_to_float64(ours, theirs, exact)


def test_opcheck():
    for tokens in (3, 260):
        torch.library.opcheck(
            torch.ops.lowrank_ops.lowrank_linear.default,
            arguments(tokens, 24, 8, 16, torch.bfloat16),
            {"activation": "silu", "backend": "triton"},
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float32}, "takes bfloat16 or float16; this x is torch.float32"),
        ({"tokens": 257}, "at most 256 rows"),
        ({"rank": 0}, "no empty factors"),
        ({"in_features": 0}, "no empty factors"),
        ({"x_stride": 0}, "features are neighbours"),
        ({"down_strides": (80, 2)}, "one stride of 1"),
        ({"x_stride": 2**22}, "elements apart"),
    ],
)
def test_refusals(change, words):
    problem = describe(*arguments(3, 40, 8, 24, torch.bfloat16), "none")._replace(**change)
    assert words in _triton.supports_decode(problem)
    if "tokens" not in change:
        assert words in _triton.supports_prefill(problem)


def test_rank_beyond_the_chip_is_refused_by_prefill():
    problem = describe(*arguments(3, 8, 264, 8, torch.bfloat16), "none")
    assert "ranks up to 256" in _triton.supports_prefill(problem)
    assert "covers ranks up to 32" in _triton.supports_prefill(problem._replace(rank=40), PREFILL)


def test_rounding_is_to_nearest_even():
    """What the interpreter's own cast would get wrong: ties, and anything above the middle."""
    import triton
    import triton.language as tl

    @triton.jit
    def cast(in_ptr, out_ptr, count: tl.constexpr, HONEST: tl.constexpr):
        value = tl.load(in_ptr + tl.arange(0, count))
        if HONEST:
            tl.store(out_ptr + tl.arange(0, count), _triton_tile.rounded(value, tl.bfloat16))
        else:
            tl.store(out_ptr + tl.arange(0, count), value.to(tl.bfloat16))

    values = torch.randn(256)
    values[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan")])
    honest, truncated = torch.empty(2, 256, dtype=torch.bfloat16)
    cast[(1,)](values, honest, 256, True)
    cast[(1,)](values, truncated, 256, False)
    torch.testing.assert_close(honest, values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(truncated[4:], values.to(torch.bfloat16)[4:])


def test_a_planted_truncating_cast_is_caught(monkeypatch):
    # Of one sign, so that what is cut off adds up as it does in a layer behind a ReLU.
    args = [tensor.abs() for tensor in arguments(16, 128, 32, 64, torch.bfloat16)]
    assert_right(run(PAIR, *args), *args, "none")
    monkeypatch.setattr(_triton_decode, "rounded", lambda value, dtype: value.to(dtype))
    with pytest.raises(AssertionError, match="off by"):
        assert_right(run(PAIR, *args), *args, "none")


def test_a_planted_missing_mask_is_caught(monkeypatch):
    """Loads that run past the last column: what lies there leaks into the sums."""
    _, down, up, bias = arguments(5, 40, 8, 24, torch.float16)
    x = torch.randn(5, 48).half()[:, :40]
    down = torch.randn(8, 48).half()[:, :40]
    honest = _triton_decode.load_tile

    def careless(ptr, row, column, rows, columns, *rest):
        return honest(ptr, row, column, rows, columns + 8, *rest)

    assert_right(run(PAIR, x, down, up, bias), x, down, up, bias, "none")
    monkeypatch.setattr(_triton_decode, "load_tile", careless)
    with pytest.raises(AssertionError, match="off by"):
        assert_right(run(PAIR, x, down, up, bias), x, down, up, bias, "none")


def test_a_planted_wrong_tile_is_caught(monkeypatch):
    args = arguments(5, 40, 24, 40, torch.float16)
    honest = _triton_decode.store_tile

    def misplaced(ptr, value, row, column, rows, columns, *rest):
        return honest(ptr, value, row, column // 2, rows, columns, *rest)

    monkeypatch.setattr(_triton_decode, "store_tile", misplaced)
    with pytest.raises(AssertionError, match="off by"):
        # Scratch and output may hold anything where nothing is stored, also NaN: that is an error as well.
        y = run(PAIR, *args)
        assert y.isfinite().all(), "off by infinity"
        assert_right(y, *args, "none")
