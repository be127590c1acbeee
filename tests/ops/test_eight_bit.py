"""``lowrank_linear`` with 8-bit factors: value, gradients, tracing, autocast, messages, and the choice of kernel."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowrank_ops.ops import _triton_device, decompositions, lowrank_linear
from lowrank_ops.ops import linear as op
from lowrank_ops.ops._backend import Device, choose
from lowrank_ops.ops.linear import reference
from tests.ops.inputs import assert_linear, eight_bit, linear_inputs

INT8, FP8, BF16 = torch.int8, torch.float8_e4m3fn, torch.bfloat16
FORMS = {"int8": (INT8, INT8), "fp8": (FP8, FP8), "down": (INT8, None), "up": (None, FP8)}
HOPPER = Device("cuda", 0, (9, 0), 132, 232448)


def inputs(*leading, forms=(INT8, INT8), dtype=torch.float32, scale_dtype=torch.float32, **sizes):
    x, down, up, bias = linear_inputs(*leading, dtype=dtype, **sizes)
    (down, down_scale), (up, up_scale) = (
        (factor, None) if form is None else eight_bit(factor, form, scale_dtype)
        for factor, form in zip((down, up), forms, strict=True)
    )
    return (x, down, up, bias), {"down_scale": down_scale, "up_scale": up_scale}


def dequantized(args, scales, dtype=None):
    x, down, up, bias = args
    dtype = dtype or x.dtype
    pairs = (down, scales["down_scale"]), (up, scales["up_scale"])
    return x, *(reference.dequantized(*pair, dtype) for pair in pairs), bias


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16, torch.float16], ids=str)
def test_value(forms, dtype):
    args, scales = inputs(2, 3, forms=forms, dtype=dtype, scale_dtype=BF16 if dtype is BF16 else torch.float32)
    y = lowrank_linear(*args, activation="gelu", **scales)
    assert_linear(y, *args, "gelu", *scales.values())
    assert lowrank_linear(args[0][:0], *args[1:], **scales).shape == (0, 3, 16)


def test_strided_and_empty_inputs():
    (x, down, up, bias), scales = inputs(6)
    wide = torch.cat([x, x], 1)[:, ::2]
    y = lowrank_linear(wide, down.T.contiguous().T, up, bias, **scales)
    assert_linear(y, wide, down, up, bias, "none", *scales.values())
    empty = torch.empty(0, 24, dtype=INT8), torch.empty(16, 0, dtype=INT8)
    y = lowrank_linear(x, *empty, bias, down_scale=torch.empty(0), up_scale=torch.ones(16))
    torch.testing.assert_close(y, bias.expand(6, 16))


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_gradients_of_x_and_bias(forms):
    args, scales = inputs(4, forms=forms)
    x, bias = args[0].requires_grad_(), args[3].requires_grad_()
    found = torch.autograd.grad(lowrank_linear(*args, activation="silu", **scales).sum(), (x, bias))
    expected = torch.autograd.grad(lowrank_linear(*dequantized(args, scales), activation="silu").sum(), (x, bias))
    torch.testing.assert_close(found, expected)


def test_compiled_backward_matches():
    args, scales = inputs(4)
    leaves = args[0].requires_grad_(), args[3].requires_grad_()

    def loss(*tensors):
        return lowrank_linear(*tensors, activation="silu", **scales).sum()

    expected = torch.autograd.grad(loss(*args), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*args), leaves), expected)


def test_gradients_of_factors_and_scales_are_refused():
    args, scales = inputs(4, forms=(FP8, None))
    args[1].requires_grad_()
    with pytest.raises(ValueError, match=r"down is torch\.float8_e4m3fn and has no gradient, nor has down_scale"):
        lowrank_linear(*args, **scales)
    args[1].requires_grad_(False)
    scales["down_scale"].requires_grad_()
    with pytest.raises(ValueError, match="down_scale; call requires_grad_"):
        lowrank_linear(*args, **scales)
    with torch.no_grad():
        lowrank_linear(*args, **scales)


@pytest.mark.parametrize("forms", [(INT8, INT8), (None, FP8)], ids=["int8", "up"])
def test_opcheck(forms):
    (x, down, up, bias), scales = inputs(2, 3, forms=forms)
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    tests += [] if FP8 in forms else ["test_schema"]  # torch compares no float8 tensors
    args = x.requires_grad_(), down, up, bias.requires_grad_(), *scales.values()
    torch.library.opcheck(torch.ops.lowrank_ops.lowrank_linear.default, args, {"activation": "relu"}, test_utils=tests)


def test_export_keeps_one_node_and_decomposes():
    args, scales = inputs(4)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return lowrank_linear(x, *args[1:], backend="reference", **scales)

    exported = torch.export.export(Layer(), args[:1])
    assert sum("lowrank_linear" in str(node.target) for node in exported.graph.nodes) == 1
    plain = exported.run_decompositions(decompositions())
    assert not any("lowrank" in str(node.target) for node in plain.graph.nodes)
    for program in (exported, plain):
        torch.testing.assert_close(program.module()(args[0]), lowrank_linear(*args, **scales))


def test_schema_adds_only_optional_arguments():
    """A program that was exported before the scales were there still loads and runs."""
    arguments = torch.ops.lowrank_ops.lowrank_linear.default._schema.arguments
    assert [a.name for a in arguments if not a.kwarg_only] == ["x", "down", "up", "bias", "down_scale", "up_scale"]
    assert all(a.has_default_value() for a in arguments[3:])
    assert [a.name for a in arguments if a.kwarg_only] == ["activation", "backend"]


def test_autocast_leaves_factors_and_scales():
    args, scales = inputs(4, forms=(INT8, None))
    with torch.autocast("cpu", BF16):
        y = lowrank_linear(*args, **scales)
    x, down, up, bias = args
    torch.testing.assert_close(y, lowrank_linear(x.to(BF16), down, up.to(BF16), bias.to(BF16), **scales))
    assert y.dtype is BF16


def test_transforms_and_flops():
    args, scales = inputs(4)
    rows = torch.vmap(lambda x: lowrank_linear(x, *args[1:], **scales))(args[0])
    torch.testing.assert_close(rows, lowrank_linear(*args, **scales))
    _, tangent = torch.func.jvp(lambda x: lowrank_linear(x, *args[1:], **scales), args[:1], args[:1])
    torch.testing.assert_close(tangent, lowrank_linear(*args[:3], **scales))
    with FlopCounterMode(display=False) as counter:
        lowrank_linear(*args, **scales)
    assert counter.get_total_flops() == 2 * 4 * 8 * (24 + 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_scale": None}, "down is torch.int8 and needs down_scale, float32 of shape (8,)."),
        ({"down_scale": None, "up_scale": None}, "down is torch.int8 and needs down_scale, float32 of shape (8,)."),
        (
            {"up": torch.randn(16, 8)},
            "up_scale is for up in int8 or float8_e4m3fn; got up in torch.float32.",
        ),
        (
            {"down": torch.ones(8, 24, dtype=torch.uint8)},
            "down_scale is for down in int8 or float8_e4m3fn; got down in torch.uint8.",
        ),
        (
            {"down_scale": torch.ones(24)},
            "down_scale must be float32 or bfloat16 of shape (8,) on cpu, one for each row of down; got torch.float32 "
            "of shape (24,) on cpu.",
        ),
        (
            {"up_scale": torch.ones(16).double()},
            "up_scale must be float32 or bfloat16 of shape (16,) on cpu, one for each row of up; got torch.float64 of "
            "shape (16,) on cpu.",
        ),
        (
            {"up_scale": torch.ones(16, device="meta")},
            "up_scale must be float32 or bfloat16 of shape (16,) on cpu, one for each row of up; got torch.float32 of "
            "shape (16,) on meta.",
        ),
        ({"x": torch.ones(3, 24).to(FP8)}, "x must be float64, float32, bfloat16 or float16; got torch.float8_e4m3fn."),
    ],
)  # fmt: skip
def test_messages(change, message):
    (x, down, up, bias), scales = inputs(3)
    call = {"x": x, "down": down, "up": up, "bias": bias, **scales} | change
    for options in ({}, {"activation": "gelu"}):
        with pytest.raises(ValueError) as raised:
            lowrank_linear(**call, **options)
        assert str(raised.value) == message


def test_scales_of_another_type():
    args, scales = inputs(3)
    with pytest.raises(TypeError, match="up_scale must be a tensor; got float"):
        lowrank_linear(*args, down_scale=scales["down_scale"], up_scale=1.0)


@pytest.mark.parametrize(
    ("form", "capability", "chosen"),
    [(INT8, (8, 0), "triton.decode"), (FP8, (8, 0), "two_products"), (FP8, (8, 9), "triton.decode"),
     (FP8, (9, 0), "triton.decode")],
    ids=str,
)  # fmt: skip
def test_auto_on_a_gpu(monkeypatch, form, capability, chosen):
    pytest.importorskip("triton", reason="auto chooses Triton only where it is installed")
    monkeypatch.setattr(_triton_device, "lacks_proxy_fence", lambda *device: None)
    args, scales = inputs(4, dtype=BF16, forms=(form, form), in_features=512, rank=64, out_features=512)
    problem = op.describe(*args, "none", *scales.values())._replace(device=HOPPER._replace(capability=capability))
    assert problem.aligned
    assert choose(op.TABLE, problem, "auto").name == chosen
    reasons = {impl.name: impl.supports(problem) for impl in op.TABLE}
    assert reasons["cuda.decode"] is not None
    if chosen == "two_products":
        assert "compute capability 8.9 or newer" in reasons["triton.prefill"]
