"""The Triton kernels of ``lowrank_linear`` with 8-bit factors, in Triton's CPU interpreter, against float64."""

import dataclasses
import itertools
import os

import pytest
import torch

from tests.ops.inputs import assert_linear, eight_bit, linear_inputs

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from lowrank_ops.ops import linear, lowrank_linear
from lowrank_ops.ops.linear import _triton, _triton_config, _triton_decode_kernels, _triton_prefill_kernels, describe

pytestmark = pytest.mark.interpreter

INT8, FP8, BF16 = torch.int8, torch.float8_e4m3fn, torch.bfloat16
FORMS = {"int8": (INT8, INT8), "fp8": (FP8, FP8), "down": (INT8, None), "up": (None, FP8), "mixed": (FP8, INT8)}
TWO_KERNELS = _triton_config.DecodeConfig(16, 16, 32, 4, 2, 32, 16, 16, 4, 2)
FOLDED = dataclasses.replace(TWO_KERNELS, slices=4, fold=True)
SUMMED = dataclasses.replace(TWO_KERNELS, slices=4)
SWAPPED = dataclasses.replace(TWO_KERNELS, block_r=64, block_n=64)
PREFILL = _triton_config.PrefillConfig(16, 32, 32, 16, 16, 4, 2, 2)
ALL = {"two kernels": TWO_KERNELS, "folded": FOLDED, "summed": SUMMED, "swapped": SWAPPED, "prefill": PREFILL}


def inputs(shape, forms, dtype=BF16, scale_dtype=torch.float32, bias=True):
    tokens, in_features, rank, out_features = shape
    x, down, up, bias = linear_inputs(
        tokens, in_features=in_features, rank=rank, out_features=out_features, dtype=dtype, bias=bias
    )
    (down, down_scale), (up, up_scale) = (
        (factor, None) if form is None else eight_bit(factor, form, scale_dtype)
        for factor, form in zip((down, up), forms, strict=True)
    )
    return x, down, up, bias, down_scale, up_scale


def run(config, x, down, up, bias, down_scale, up_scale, activation="gelu"):
    problem = describe(x, down, up, bias, activation, down_scale, up_scale)
    decode = isinstance(config, _triton_config.DecodeConfig)
    assert (_triton.supports_decode if decode else _triton.supports_prefill)(problem, config) is None
    launch = _triton.run_decode if decode else _triton.run_prefill
    return launch(problem, x, down, up, bias, activation, config, down_scale=down_scale, up_scale=up_scale)


def assert_runs(config, args, activation="gelu"):
    assert_linear(run(config, *args, activation), *args[:4], activation, *args[4:])


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("forms", ["int8", "mixed"])
def test_formats(config, forms):
    assert_runs(config, inputs((5, 33, 7, 11), FORMS[forms]))


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize(("dtype", "scale_dtype"), [(torch.float16, torch.float32), (BF16, BF16)], ids=str)
def test_dtypes_and_tails(config, dtype, scale_dtype):
    assert_runs(config, inputs((17, 40, 24, 72), FORMS["mixed"], dtype, scale_dtype, bias=False), "none")


@pytest.mark.parametrize("config", [SWAPPED, PREFILL], ids=["decode", "prefill"])
def test_strided_factors_and_scales(config):
    x, down, up, bias, down_scale, up_scale = inputs((7, 40, 16, 24), FORMS["int8"])
    transposed = down.T.contiguous().T, up.T.contiguous().T
    scales = (torch.stack([scale, scale], 1)[:, 0] for scale in (down_scale, up_scale))
    assert_runs(config, (x, *transposed, bias, *scales))
    unaligned = down.new_zeros(down.numel() + 1)[1:].view(down.shape).copy_(down)
    assert not describe(x, unaligned, up, bias, "none", down_scale, up_scale).aligned
    assert_runs(config, (x, unaligned, up, bias, down_scale, up_scale))


def test_all_values_are_exact():
    """A product with one returns every value of both formats."""
    codes = torch.arange(256).to(torch.uint8)
    for form, dtype in itertools.product((INT8, FP8), (BF16, torch.float16)):
        values = codes.view(form)
        values = values[values.float().isfinite()]
        one = torch.ones(1, 1, dtype=dtype)
        y = lowrank_linear(one, one, values[:, None], up_scale=torch.ones(len(values)), backend="triton")
        assert torch.equal(y[0], values.to(dtype))


@pytest.mark.parametrize("tokens, kernel", [(3, "decode"), (260, "prefill")])
def test_op_runs_the_kernel(tokens, kernel):
    x, down, up, bias, *scales = inputs((tokens, 24, 8, 16), FORMS["mixed"])
    options = dict(zip(("down_scale", "up_scale"), scales, strict=True))
    expected = f"triton.{kernel}: runs, by triton.{kernel}.float8_e4m3fn.int8"
    assert expected in linear.explain(x, down, up, bias, backend="triton", **options)
    for needs_grad in (False, True):  # without and with the dispatcher
        y = lowrank_linear(x.requires_grad_(needs_grad), down, up, bias, backend="triton", **options)
        assert_linear(y.detach(), x.detach(), down, up, bias, "none", *scales)


def test_cached_decisions_follow_the_formats():
    shape = (3, 24, 8, 16)
    for forms, scale_dtype in itertools.product(FORMS.values(), (torch.float32, BF16)):
        x, down, up, bias, *scales = inputs(shape, forms, scale_dtype=scale_dtype)
        y = lowrank_linear(x, down, up, bias, down_scale=scales[0], up_scale=scales[1], backend="triton")
        assert_linear(y, x, down, up, bias, "none", *scales)


# --- planted faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels, config", [(_triton_decode_kernels, SWAPPED), (_triton_prefill_kernels, PREFILL)])
@pytest.mark.parametrize("wrong", ["shifted", "rounded"])
def test_wrong_scales_are_caught(monkeypatch, kernels, config, wrong):
    args = inputs((9, 40, 24, 72), FORMS["int8"])
    assert_runs(config, args)
    original = kernels.load_scale

    def fault(ptr, first, count, size):
        if wrong == "shifted":
            return original(ptr, first + 1, count, size)
        return original(ptr, first, count, size) * 1.02

    monkeypatch.setattr(kernels, "load_scale", fault)
    with pytest.raises(AssertionError, match="off by"):
        assert_runs(config, args)


def test_unsigned_cast_is_caught(monkeypatch):
    args = inputs((9, 40, 24, 40), FORMS["int8"])
    tl = _triton_decode_kernels.tl

    def unsigned(tile, dtype):
        return tile.to(tl.uint8, bitcast=True).to(tl.float32) if tile.dtype == tl.int8 else tile

    monkeypatch.setattr(_triton_decode_kernels, "widened", unsigned)
    with pytest.raises(AssertionError, match="off by"):
        assert_runs(TWO_KERNELS, args)
