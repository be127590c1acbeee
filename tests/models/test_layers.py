"""Which layers can be compressed, and what their matrices are."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lowrank_ops.models.layers import (
    Dimensions,
    bias_vector,
    dimensions,
    find_layers,
    pad_input,
    unsupported_weights,
    weight_matrix,
)
from tests.conv1d import Conv1D


class OtherConv1D(Conv1D):
    """A subclass is one, too."""


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class QuantizedTensor(torch.Tensor):
    pass


def patched():
    linear = nn.Linear(4, 4)
    forward = linear.forward
    linear.forward = lambda x: forward(x)
    return linear


def pruned():
    linear = nn.Linear(4, 4)
    prune.l1_unstructured(linear, "weight", 0.5)
    return linear


def with_weight(weight):
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def test_layers_are_found_in_the_order_of_the_model():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), OtherConv1D(2, 3), nn.Conv1d(1, 1, 1)
    )
    layers, skipped = find_layers(model)
    assert list(layers) == ["0", "1.0", "2", "3"] and not skipped
    assert list(find_layers(model, lambda module, fqn: fqn.startswith("1"))[0]) == ["1.0"]


def test_a_module_at_two_places_is_found_once():
    linear = nn.Linear(4, 4)
    assert list(find_layers(nn.Sequential(linear, nn.Sequential(linear)))[0]) == ["0"]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (OwnForward(4, 4), "OwnForward overrides forward"),
        (patched(), "Linear overrides forward"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "its weight is parametrized; call torch.nn.utils"),
        (pruned(), "its weight is recomputed in each forward pass"),
        (nn.LazyLinear(4), "its weight is not initialized yet; run the model once"),
        (with_weight(torch.zeros(4, 4, dtype=torch.int8)), "its weight is a Parameter of torch.int8"),
        (with_weight(torch.zeros(4, 4, dtype=torch.float8_e4m3fn)), "its weight is a Parameter of torch.float8_e4m3fn"),
        (with_weight(torch.zeros(4, 4).as_subclass(QuantizedTensor)), "its weight is a QuantizedTensor of"),
        (with_weight(torch.zeros(4, 0)), "its weight is empty"),
        (nn.MultiheadAttention(4, 2), "nn.MultiheadAttention applies its projections without calling a Linear"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_unsupported_layers_are_skipped_with_a_reason(layer, reason):
    layers, skipped = find_layers(nn.ModuleDict({"layer": layer}))
    assert not layers
    assert skipped["layer"].startswith(reason) and list(skipped) == ["layer"]


def test_only_layers_inside_multihead_attention_are_skipped():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "attention_out": nn.Linear(4, 4)})
    layers, skipped = find_layers(model)
    assert list(layers) == ["attention_out"] and list(skipped) == ["attention"]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(5, 3), (1, 5, 3)),
        (Conv1D(3, 5), (1, 5, 3)),
        (nn.Conv2d(4, 6, (3, 2)), (1, 24, 6)),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 18, 3)),
    ],
)
def test_dimensions_and_shapes_of_weight_matrices(layer, expected):
    assert dimensions(layer) == Dimensions(*expected)
    groups, in_features, out_features = expected
    matrix = weight_matrix(layer)
    assert matrix.shape == ((out_features, in_features) if groups == 1 else (*expected[:1], out_features, in_features))
    assert not matrix.requires_grad and torch.equal(bias_vector(layer), layer.bias)


def test_weight_matrices_multiply_as_the_layer_does():
    conv1d, x = Conv1D(3, 5), torch.randn(2, 5)
    torch.testing.assert_close(x @ weight_matrix(conv1d).T + conv1d.bias, conv1d(x))
    conv = nn.Conv2d(4, 6, 3, groups=2)
    patches = torch.randn(2, 4, 3, 3)
    y = torch.einsum("goi,bgi->bgo", weight_matrix(conv), patches.view(2, 2, -1)).flatten(1) + conv.bias
    torch.testing.assert_close(y, conv(patches).flatten(1))
    assert bias_vector(nn.Linear(2, 2, bias=False)) is None


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, (1, 2), "valid", "same"])
@pytest.mark.parametrize("kernel", [3, (4, 2)])
def test_pad_input_equals_the_padding_of_conv2d(mode, padding, kernel):
    conv = nn.Conv2d(2, 3, kernel, padding=padding, padding_mode=mode, dilation=1)
    x = torch.randn(2, 2, 6, 7)
    padded, rest = pad_input(conv, x)
    torch.testing.assert_close(nn.functional.conv2d(padded, conv.weight, conv.bias, padding=rest), conv(x))
    if mode == "zeros" and padding != "same":
        assert padded is x  # F.conv2d pads; nothing is copied


class FusedExperts(nn.Module):
    """Experts as one parameter of three dimensions."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.bias = nn.Parameter(torch.zeros(2, 4, 6)), nn.Parameter(torch.zeros(2, 6))


OTHERS = [
    nn.Embedding(5, 4), nn.LSTM(4, 3), nn.GRU(4, 3), nn.Bilinear(3, 4, 5), nn.ConvTranspose2d(2, 3, 2),
    nn.Conv3d(1, 2, 2), nn.ConvTranspose1d(3, 4, 2), FusedExperts(),
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=lambda module: type(module).__name__)
def test_other_modules_with_matrices_are_named_with_their_share(other):
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "other": other})
    own = sum(parameter.numel() for parameter in other.parameters())
    share = own / (own + 28)
    assert unsupported_weights(model, ()) == {
        "other": f"{type(other).__name__} is not supported; it holds {share:.1%} of the model's parameters"
    }
    assert unsupported_weights(nn.ModuleDict({"outer": model}), {"outer.other"}) == {}


def test_parameters_beside_layers_are_named_themselves():  # a table of positions, of torchvision's Swin and ViTs
    parent = nn.ModuleDict({"qkv": nn.Linear(4, 4, bias=False)})
    parent.table = nn.Parameter(torch.zeros(2, 4))
    model = nn.ModuleDict({"attention": parent})
    found = "table of ModuleDict is not supported; it holds 33.3% of the model's parameters"
    assert unsupported_weights(model, ()) == {"attention": found}
    parent.token = nn.Parameter(torch.zeros(1, 8))
    found = "table, token of ModuleDict are not supported; they hold 50.0% of the model's parameters"
    assert unsupported_weights(model, ()) == {"attention": found}


def test_what_lies_in_a_reported_module_is_not_named_again():
    model = nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "ab": nn.Embedding(5, 4)})
    layers, skipped = find_layers(model)
    assert list(unsupported_weights(model, {*layers, *skipped})) == ["ab"]
