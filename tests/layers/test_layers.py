"""LowRankLinear and LowRankConv2d compute the same as the dense layer of their product."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.calibration import LayerStatistics, Moments

LINEARS = {
    "plain": (20, 12, 5, True),
    "no bias": (20, 12, 8, False),
    "narrow": (3, 40, 2, True),
    "rank 0": (20, 12, 0, True),
}
CONVS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "bias": False},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect", "groups": 2},
    "replicate": {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
}


def lowrank_linear(name="plain"):
    in_features, out_features, rank, bias = LINEARS[name]
    return lro.LowRankLinear(in_features, out_features, rank, bias=bias).double()


def lowrank_conv(name="plain", rank=3):
    return lro.LowRankConv2d(4, 8, rank=rank, **CONVS[name]).double()


def linear_and_conv():
    return [lowrank_linear(), lowrank_conv("grouped")]


# --- outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_linear_computes_its_dense_product(name, leading):
    layer = lowrank_linear(name)
    dense = layer.to_dense()
    x = torch.randn(*leading, layer.in_features, dtype=torch.float64)
    assert type(dense) is nn.Linear and dense.weight.shape == layer.weight.shape
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer.product(), dense.weight)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("shape", [(2, 4, 7, 8), (4, 7, 8)], ids=["batched", "unbatched"])
def test_conv_computes_its_dense_product(name, rank, shape):
    layer = lowrank_conv(name, rank)
    dense = layer.to_dense()
    x = torch.randn(shape, dtype=torch.float64)
    assert type(dense) is nn.Conv2d and dense.padding_mode == layer.padding_mode
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer.product(), dense.weight)


def test_channels_last_is_preserved():
    layer = lowrank_conv("grouped").float()
    x = torch.randn(2, 4, 7, 8)
    y = layer(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, layer(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


# --- from dense layers ------------------------------------------------------------------------------------------


def test_from_linear_without_data_is_the_truncated_svd():
    linear = nn.Linear(20, 12).double()
    layer = lro.LowRankLinear.from_linear(linear, 4)
    u, s, v = torch.linalg.svd(linear.weight.detach())
    torch.testing.assert_close(layer.product(), u[:, :4] @ s[:4].diag() @ v[:4])
    assert torch.equal(layer.bias, linear.bias) and layer.bias is not linear.bias
    whole = lro.LowRankLinear.from_linear(linear, 12).to_dense()
    torch.testing.assert_close(whole.weight, linear.weight)


def test_from_linear_with_statistics_is_exact_at_full_rank():
    linear = nn.Linear(20, 12, bias=False).double()
    x = torch.randn(300, 3).double() @ torch.randn(3, 20).double() + 1
    statistics = lro.calibrate(linear, [x])[""]
    layer = lro.LowRankLinear.from_linear(linear, 3, statistics)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.bias is not None  # holds the mean's part
    assert lro.LowRankLinear.from_linear(linear, 3, statistics, centered=False).bias is None
    assert lro.LowRankLinear.from_linear(linear, 3, statistics, projection="utilized").rank == 3


def test_from_conv2d_is_exact_at_full_rank():
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=2).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(lro.LowRankConv2d.from_conv2d(conv, 4)(x), conv(x))
    statistics = lro.calibrate(conv, [x])[""]
    torch.testing.assert_close(lro.LowRankConv2d.from_conv2d(conv, 4, statistics)(x), conv(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conversion_keeps_dtype_and_flags(dtype):
    linear = nn.Linear(20, 12).to(dtype).eval()
    linear.weight.requires_grad_(False)
    layer = lro.LowRankLinear.from_linear(linear, 12)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert not layer.training and not layer.down.requires_grad and not layer.up.requires_grad
    assert layer.bias.requires_grad
    dense = layer.to_dense()
    assert not dense.training and not dense.weight.requires_grad and dense.bias.requires_grad
    torch.testing.assert_close(dense.weight.float(), linear.weight.float(), atol=4 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lro.LowRankLinear(8, 4, 5), ValueError, r"rank must be .* in \[0, 4\] for 8 -> 4 features; got 5"),
        (lambda: lro.LowRankLinear(8, 4, -1), ValueError, "got -1"),
        (lambda: lro.LowRankLinear(8, 4, 2.0), TypeError, r"rank must be an integer; got 2\.0"),
        (lambda: lro.LowRankConv2d(2, 4, 3, 3, groups=2), ValueError, r"\[0, 2\] for 9 -> 2 features; got 3"),
        (lambda: lro.LowRankConv2d(2, 4, 3, 3, padding_mode="mirror"), ValueError, "padding_mode must be one of"),
        (lambda: lro.LowRankLinear.from_linear(nn.Linear(8, 4), 5), ValueError, r"\[0, 4\]"),
        (lambda: lro.LowRankLinear.from_linear(nn.Conv2d(1, 1, 1), 1), TypeError, "Linear; got Conv2d"),
        (lambda: lro.LowRankConv2d.from_conv2d(nn.Linear(1, 1), 1), TypeError, "Conv2d; got Linear"),
        (
            lambda: lro.LowRankLinear.from_linear(
                nn.Linear(8, 4), 2, LayerStatistics("input", Moments(torch.eye(6), torch.ones(6), 1))
            ),
            ValueError,
            "the statistics belong to another layer or model",
        ),
        (
            lambda: lro.LowRankLinear.from_linear(nn.Linear(8, 4), 2, Moments(torch.eye(8), torch.ones(8), 1)),
            TypeError,
            r"statistics must be the LayerStatistics of this layer, .* or None; got Moments",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- module behavior -------------------------------------------------------------------------------------------------


def test_state_dict_keys_and_shapes():
    linear, conv = linear_and_conv()
    assert {name: tuple(value.shape) for name, value in linear.state_dict().items()} == {
        "down": (8, 20), "up": (12, 8), "bias": (12,),
    }  # fmt: skip
    assert {name: tuple(value.shape) for name, value in conv.state_dict().items()} == {
        "down": (16, 2, 3, 3), "up": (8, 8, 1, 1), "bias": (8,),
    }  # fmt: skip
    assert list(lowrank_linear("no bias").state_dict()) == ["down", "up"]


def test_repr_shows_the_rank():
    assert repr(lowrank_linear()) == "LowRankLinear(in_features=20, out_features=12, rank=5, bias=True)"
    assert repr(lowrank_conv("strided")) == (
        "LowRankConv2d(4, 8, kernel_size=(3, 2), rank=3, "
        "stride=(2, 1), padding=(1, 0), dilation=(1, 1), groups=1, bias=False)"
    )


def test_new_layers_have_the_scale_of_dense_ones():
    lowrank, dense = lro.LowRankLinear(512, 512, 64), nn.Linear(512, 512)
    assert 0.8 < lowrank.weight.std() / dense.weight.std() < 1.25
    lowrank, dense = lro.LowRankConv2d(64, 64, 3, 32, groups=2), nn.Conv2d(64, 64, 3, groups=2)
    assert 0.8 < lowrank.weight.std() / dense.weight.std() < 1.25
    assert lowrank.bias.abs().max() <= dense.weight[0].numel() ** -0.5


@pytest.mark.parametrize("which", [0, 1], ids=["linear", "conv"])
def test_layers_can_be_copied_pickled_and_loaded(which):
    layer = linear_and_conv()[which]
    x = torch.randn(2, 20).double() if isinstance(layer, lro.LowRankLinear) else torch.randn(2, 4, 5, 5).double()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.down is not layer.down
    fresh = copy.deepcopy(layer)
    fresh.reset_parameters()
    assert not torch.equal(fresh.down, layer.down)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == half.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("which", [0, 1], ids=["linear", "conv"])
@pytest.mark.parametrize("rows", [4, 400])  # few rows use the two factors, many rows their product
def test_padding_stays_zero_in_training(which, rows):
    layer = linear_and_conv()[which]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    before = layer.weight.detach().clone()
    groups = getattr(layer, "groups", 1)
    for _ in range(3):
        x = torch.randn(rows, 4, 5, 5) if which else torch.randn(rows, 20)
        optimizer.zero_grad()
        layer(x.double()).square().sum().backward()
        optimizer.step()
        for down, up in ((layer.down.grad, layer.up.grad), (layer.down, layer.up)):
            for part in (down.view(groups, 8, -1)[:, layer.rank :], up.flatten(1)[:, layer.rank :]):
                assert part.numel() and torch.count_nonzero(part) == 0
    assert not torch.equal(layer.weight, before)


def test_transformer_encoder_layer_calls_its_low_rank_layers():
    """In eval mode nn.TransformerEncoderLayer passes plain linear1.weight and linear2.weight to a fused function."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x, calls = torch.randn(3, 5, 16), []
    with torch.no_grad():
        expected = layer(x)
        for name in ("linear1", "linear2"):
            setattr(layer, name, lro.LowRankLinear.from_linear(getattr(layer, name), 16))
        layer.linear1.forward = lambda x, forward=layer.linear1.forward: (calls.append(1), forward(x))[1]
        torch.testing.assert_close(layer(x), expected)
    assert calls == [1]


def test_layers_can_be_created_on_meta():
    with torch.device("meta"):
        layer = lro.LowRankLinear(20, 12, 5)
    assert layer.down.is_meta and layer(torch.empty(3, 20, device="meta")).shape == (3, 12)


# --- initialization -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 16])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_new_layers_have_the_variance_of_dense_ones(kind, rank):
    """Entries of the product have variance 1 / (3 fan_in), and biases are uniform up to fan_in^-1/2, as torch's are."""
    if kind == "linear":
        layers, dense = [lro.LowRankLinear(64, 128, rank=rank) for _ in range(40)], nn.Linear(64, 128)
    else:
        layers, dense = [lro.LowRankConv2d(16, 128, 2, rank=rank) for _ in range(40)], nn.Conv2d(16, 128, 2)
    products = torch.stack([layer.product().flatten() for layer in layers])
    assert float(products.square().mean()) == pytest.approx(1 / (3 * 64), rel=0.1)
    assert float(products.square().mean()) == pytest.approx(float(dense.weight.square().mean()), rel=0.15)
    biases = torch.stack([layer.bias for layer in layers])
    assert 0.97 / 8 < float(biases.max()) <= 1 / 8 and -1 / 8 <= float(biases.min()) < -0.97 / 8
    assert all(not layer.down[rank:].any() and not layer.up[:, rank:].any() for layer in layers)


@pytest.mark.parametrize("make", [lambda: lro.LowRankLinear(8, 8, rank=2), lambda: lro.LowRankConv2d(8, 8, 1, rank=2)])
def test_layers_have_a_bias_by_default_as_torch_has(make):
    assert make().bias is not None and make().to_dense().bias is not None
