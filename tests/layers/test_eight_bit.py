"""8-bit factors, and weights of dense layers: values, casts, state dicts, conversions, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.factors.eight_bit import quantized
from lowrank_ops.layers import EightBitLinear, LowRankConv2d, PivotedLinear, quantize_

EVERY = {"filter_fn": lambda module, fqn: True}
FORMS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def layer(form=None, **options):
    torch.manual_seed(0)
    built = lro.LowRankLinear(40, 24, rank=12, **options)
    return built if form is None else built.quantize_(form)


def pivoted(form, **options):
    torch.manual_seed(0)
    return PivotedLinear(40, 24, rank=12, **options).quantize_(form)


def dense(form, **options):
    torch.manual_seed(0)
    return EightBitLinear(40, 24, form, **options)


def inputs(dtype=torch.float32):
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)


def bits(tensor):
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


@pytest.mark.parametrize("form", FORMS)
def test_rounding_is_to_the_nearest_value(form):
    factor = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    factor[3] = 0
    factor[4] *= 1e-30
    values, scale = quantized(factor, form)
    assert values.dtype is FORMS[form] and scale.dtype is torch.float32
    error = (values.float() * scale[:, None] - factor).abs()
    largest = factor.abs().amax(1, keepdim=True)
    assert (error <= (largest / 254 if form == "int8" else factor.abs() / 16 + largest * 2**-18) * 1.001).all()
    assert values[3].float().eq(0).all()
    torch.testing.assert_close(
        values.float().abs().amax(1)[[0, 4]], torch.full((2,), {"int8": 127.0, "fp8": 448.0}[form])
    )


@pytest.mark.parametrize("build", [layer, pivoted, dense])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_weight_and_dense_agree(build, form, dtype):
    quantized_layer = build(form, dtype=dtype)
    x = inputs(dtype)
    y, weight = quantized_layer(x), quantized_layer.weight
    assert (weight.dtype, weight.shape, y.dtype) == (dtype, (24, 40), dtype)
    tolerance = {"atol": 4e-2, "rtol": 4e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(quantized_layer.to_dense()(x), y, **tolerance)
    torch.testing.assert_close(x @ weight.mT + quantized_layer.bias, y, **tolerance)
    for copied in (lro.layers.to_dense_layers(nn.Sequential(quantized_layer)),
                   lro.layers.to_plain_layers(nn.Sequential(quantized_layer))):  # fmt: skip
        torch.testing.assert_close(copied(x), y, **tolerance)
        assert all(parameter.dtype is dtype for parameter in copied.parameters())
    assert quantized_layer.formats == (form,) * len(quantized_layer.matrices)


def test_one_factor():
    dense = layer()
    down = copy.deepcopy(dense).quantize_("fp8", up=False)
    assert down.formats == ("fp8", None) and down.up.requires_grad and not down.down.requires_grad
    assert repr(down).endswith("bias=True, down=fp8)")
    torch.testing.assert_close(down(inputs()), dense(inputs()), atol=0.1, rtol=0.1)
    assert down.half().up.dtype is torch.float16 and down.dtype is torch.float16


@pytest.mark.parametrize("build", [layer, pivoted, dense])
@pytest.mark.parametrize("form", FORMS)
def test_casts_and_copies_keep_the_bits(build, form):
    before = build(form)
    kept = [f"{name}{end}" for name in before.matrices for end in ("", "_scale")]
    casts = (
        lambda module: module.half(),
        lambda module: module.bfloat16().float(),
        lambda module: module.double(),
        lambda module: module.to("cpu", torch.bfloat16),
        lambda module: module.type(torch.float64),
        lambda module: nn.Sequential(module).to(torch.float16)[0],
    )
    for cast in casts:
        after = cast(copy.deepcopy(before))
        assert all(torch.equal(bits(getattr(after, name)), bits(getattr(before, name))) for name in kept)
        assert all(getattr(after, name).dtype is getattr(before, name).dtype for name in kept)
        assert after.dtype is after.bias.dtype is after.weight.dtype
        assert after(inputs(after.dtype)).dtype is after.dtype
    meta = copy.deepcopy(before).to("meta")
    assert all(getattr(meta, name).is_meta for name in kept)
    assert getattr(meta.to_empty(device="cpu"), kept[0]).dtype is FORMS[form]


@pytest.mark.parametrize("build", [layer, pivoted, dense])
def test_gradients_reach_the_input_and_the_bias(build):
    quantized_layer, x = build("int8"), inputs().requires_grad_()
    quantized_layer(x).sum().backward()
    torch.testing.assert_close(x.grad, quantized_layer.product().sum(0).expand_as(x))
    assert quantized_layer.bias.grad is not None
    assert [name for name, p in quantized_layer.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts(form):
    source, target = layer(form), layer().quantize_(form)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(inputs()), source(inputs()))
    plain = layer()
    before = plain.down.clone()
    with pytest.raises(RuntimeError, match=r"down is torch\.\w+ in the state dict and torch.float32 in the model"):
        plain.load_state_dict(source.state_dict())
    assert torch.equal(plain.down, before)
    with pytest.raises(RuntimeError, match="call quantize_ with the same form, or dequantize_"):
        source.load_state_dict(plain.state_dict())


def test_dequantized_factors_can_be_trained():
    quantized_layer = layer("int8")
    y = quantized_layer(inputs())
    assert quantized_layer.dequantize_() is quantized_layer
    torch.testing.assert_close(quantized_layer(inputs()), y)
    quantized_layer(inputs()).sum().backward()
    assert quantized_layer.down.grad is not None and list(quantized_layer.state_dict()) == ["down", "up", "bias"]


@pytest.mark.parametrize("build", [layer, pivoted, dense])
def test_export_and_compile(build):
    quantized_layer = build("fp8")
    exported = torch.export.export(quantized_layer, (inputs(),))
    torch.testing.assert_close(exported.module()(inputs()), quantized_layer(inputs()))
    compiled = torch.compile(quantized_layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs()), quantized_layer(inputs()))


def test_whole_models():
    model = nn.Sequential(layer(), nn.ReLU(), PivotedLinear(24, 24, rank=8), LowRankConv2d(3, 4, 3, rank=2), layer())
    assert quantize_(model) is model
    assert [child.formats for child in (model[0], model[2], model[4])] == [("int8", "int8")] * 3
    assert model[3].down.dtype is torch.float32
    chosen = nn.Sequential(layer(), layer())
    quantize_(chosen, "fp8", lambda module, fqn: fqn == "1")
    assert chosen[0].formats == (None, None) and chosen[1].formats == ("fp8", "fp8")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "model has no low-rank layer"),
        (lambda: nn.Sequential(layer()), {"form": "int4"}, "form must be one of 'int8', 'fp8'; got 'int4'"),
        (lambda: nn.Sequential(layer(), layer("int8")), EVERY, "layer '1': quantize_ needs"),
        (lambda: nn.Sequential(layer(), LowRankConv2d(3, 4, 3, rank=2)), EVERY, "layer '1': a LowRankConv2d"),
    ],
)  # fmt: skip
def test_refusals_leave_the_model(model, options, message):
    built = model()
    with pytest.raises(ValueError, match=message):
        quantize_(built, **options)
    assert getattr(built[0], "formats", None) in (None, (None, None))


def test_layer_refusals():
    quantized_layer = layer("int8")
    for call in (quantized_layer.quantize_, quantized_layer.reset_parameters):
        with pytest.raises(ValueError, match="call dequantize_ first"):
            call()
    broken = layer()
    broken.up.data[3, 2] = torch.nan
    with pytest.raises(ValueError, match="a factor holds NaN or inf"):
        broken.quantize_()
    assert broken.formats == (None, None) and broken.down.requires_grad
    with pytest.raises(ValueError, match=r"8-bit factors, which have no gradients, in layer '0': call dequantize_"):
        lro.finetune_(nn.Sequential(quantized_layer), [inputs()], loss=lambda y, batch: y.sum(), steps=1)


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_dense_layers(form):
    linear, x = nn.Linear(40, 24).bfloat16().eval(), inputs(torch.bfloat16)
    linear.weight.data[2], linear.bias.requires_grad = 0, False
    linear.weight.data[3, 5] = 1000  # an outlier costs its own row only
    rounded = EightBitLinear.from_linear(linear, form)
    assert not rounded.training and not rounded.bias.requires_grad and not rounded.values.requires_grad
    assert type(rounded.to_dense()) is nn.Linear and torch.equal(rounded.to_dense()(x), rounded(x))
    error = (rounded.weight - linear.weight).float().abs()
    limit = linear.weight.float().abs().amax(1) / {"int8": 120, "fp8": 12}[form]  # and bfloat16
    assert (error.amax(1) <= limit).all() and error[2].eq(0).all()
    target = dense(form, dtype=torch.bfloat16)
    target.load_state_dict(rounded.state_dict())
    assert torch.equal(target(x), rounded(x)) and list(target.state_dict()) == ["values", "bias", "values_scale"]
    for refused in (rounded.quantize_, rounded.dequantize_, rounded.reset_parameters):
        with pytest.raises(ValueError, match="an EightBitLinear stays 8-bit; replace it by"):
            refused()
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear; got Conv2d"):
        EightBitLinear.from_linear(nn.Conv2d(3, 4, 1))
    linear.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="holds NaN or inf"):
        EightBitLinear.from_linear(linear)
    wide = nn.Linear(4, 4, dtype=torch.float64)
    wide.weight.data[0, 0] = 1e300
    with pytest.raises(ValueError, match="exceeds float32"):
        EightBitLinear.from_linear(wide)


def test_pivoted_copy_of_an_eight_bit_layer():
    quantized_layer = layer("int8")
    pivoted = PivotedLinear.from_lowrank(quantized_layer)
    torch.testing.assert_close(pivoted(inputs()), quantized_layer(inputs()), atol=1e-4, rtol=1e-4)
