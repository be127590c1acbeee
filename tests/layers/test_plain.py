"""Copies of a compressed model that need no lowrank_ops."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers import to_dense_layers, to_plain_layers

WITHOUT_PACKAGE = """
import sys
sys.modules["lowrank_ops"] = None  # an import of it fails
import torch
dense, plain = torch.load("models.pt", weights_only=False)
x, y = torch.load("data.pt")
torch.testing.assert_close(dense(x), y)
torch.testing.assert_close(plain(x), y)
"""


def make_model():
    torch.manual_seed(0)
    shared = lro.LowRankLinear(24, 24, 3)
    model = nn.Sequential(
        lro.LowRankConv2d(4, 8, (3, 2), rank=3, stride=(2, 1), groups=2, padding=1, padding_mode="circular"),
        lro.LowRankConv2d(8, 6, 3, rank=5, dilation=2, padding="same", bias=False),
        nn.Flatten(2),
        lro.LowRankLinear(21, 24, 5, bias=False),
        shared,
        nn.Sequential(nn.GELU(), shared),
    )
    model[4].up.requires_grad_(False)
    return model.eval(), torch.randn(2, 4, 6, 6)


@pytest.mark.parametrize("convert", [to_dense_layers, to_plain_layers])
def test_converted_models_compute_the_same(convert):
    model, x = make_model()
    before = copy.deepcopy(model.state_dict())
    converted = convert(model)
    torch.testing.assert_close(converted(x), model(x))
    assert not any(type(module).__module__.startswith("lowrank_ops") for module in converted.modules())
    assert any(type(module).__module__.startswith("lowrank_ops") for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in converted.modules()) and converted[4] is converted[5][1]
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in converted.parameters()}


def test_plain_layers_hold_the_same_parameters():
    model, _ = make_model()
    plain = to_plain_layers(model)
    names = {"down": "0.weight", "up": "1.weight", "bias": "1.bias"}
    expected = {
        f"{fqn}.{names[name]}": parameter
        for fqn, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    found = dict(plain.named_parameters())
    assert list(found) == list(expected)
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter) and found[name].requires_grad == parameter.requires_grad


def test_converted_models_load_without_the_package(tmp_path):
    model, x = make_model()
    torch.save((to_dense_layers(model), to_plain_layers(model)), tmp_path / "models.pt")
    torch.save((x, model(x)), tmp_path / "data.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE], check=True, cwd=tmp_path)


def test_plain_layers_can_be_scripted_and_quantized():
    model, x = make_model()
    plain = to_plain_layers(model)
    torch.testing.assert_close(torch.jit.script(plain)(x), model(x))
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear}, torch.qint8)
    assert "Dynamic" in str(quantized[3][0])
    torch.testing.assert_close(quantized(x), model(x), atol=0.1, rtol=0.1)


def test_a_model_that_is_a_layer_is_converted():
    layer, x = lro.LowRankLinear(8, 6, 2), torch.randn(3, 8)
    assert type(to_dense_layers(layer)) is nn.Linear
    torch.testing.assert_close(to_plain_layers(layer)(x), layer(x))


def test_plain_encoder_layers_run_without_the_fast_path():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 16)
    factors = {f"layers.{i}.linear1": lro.LowRankLinear.from_linear(encoder.layers[i].linear1, 4) for i in range(2)}
    for fqn, layer in factors.items():
        encoder.set_submodule(fqn, layer)
    with torch.no_grad():
        expected = encoder(x)
        for convert in (to_plain_layers, to_dense_layers):
            torch.testing.assert_close(convert(encoder)(x), expected)


class ReadsStride(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = lro.LowRankConv2d(4, 8, 3, rank=3, stride=2)
        self.head = nn.ModuleDict({"out": lro.LowRankLinear(8, 6, 2)})

    def forward(self, x):
        y = self.conv(x).mean((2, 3)) * self.conv.stride[0] / self.conv.out_channels
        return self.head["out"](y) + self.head.out.in_features


class ReadsWeight(ReadsStride):
    def forward(self, x):
        return super().forward(x).to(self.head.out.weight.dtype)


def test_plain_layers_have_the_sizes_of_the_dense_layer():  # Whisper reads a stride
    model, x = ReadsStride(), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(to_plain_layers(model)(x), model(x))


def test_layers_whose_weight_is_read_are_refused():  # T5, ViT
    with pytest.raises(ValueError, match=r"layer 'head\.out': ReadsWeight reads its weight.*Use to_dense_layers"):
        to_plain_layers(ReadsWeight())
    assert to_dense_layers(ReadsWeight())(torch.randn(2, 4, 8, 8)).shape == (2, 6)


def with_hook(layer):
    layer.register_forward_hook(lambda *args: None)


def with_parametrization(layer):
    nn.utils.parametrizations.weight_norm(layer, "up")


@pytest.mark.parametrize("convert", [to_dense_layers, to_plain_layers])
def test_layers_with_an_adapter_are_refused(convert):
    adapter = type("BaseTunerLayer", (nn.Sequential,), {"__module__": "peft.tuners.tuners_utils"})
    with pytest.raises(ValueError, match=r"layer '0' has a PEFT adapter"):
        convert(nn.Sequential(adapter(lro.LowRankLinear(8, 8, 2))))


@pytest.mark.parametrize("convert", [to_dense_layers, to_plain_layers])
@pytest.mark.parametrize(
    ("change", "reason"), [(with_hook, "has hooks"), (with_parametrization, "has parametrized factors; call")]
)
def test_layers_that_would_lose_something_are_refused(convert, change, reason):
    model = nn.ModuleDict({"a": lro.LowRankLinear(8, 8, 2), "b": lro.LowRankLinear(8, 8, 2)})
    change(model["b"])
    with pytest.raises(ValueError, match=f"layer 'b' {reason}"):
        convert(model)
