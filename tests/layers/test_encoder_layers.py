"""nn.TransformerEncoder with low-rank layers, and the nested tensors that its fast path uses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers.replace import swap_


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_compressed_encoder_calls_its_factors(monkeypatch):
    """The fast path reads the weights of its Linears and calls none of them."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, padding = torch.randn(4, 6, 32), torch.zeros(4, 6, dtype=torch.bool)
    padding[0, 3:] = True
    with pytest.warns(UserWarning, match="MultiheadAttention"):
        covariances = lro.calibrate(model, [torch.randn(50, 6, 32), x])
    dense, fqns = copy.deepcopy(model), [fqn for fqn in covariances if "linear" in fqn]
    lro.compress_(model, covariances, lro.Ranks(dict.fromkeys(fqns, 32)))
    calls = []
    for module in model.modules():
        if isinstance(module, lro.LowRankLinear):
            monkeypatch.setattr(module, "forward", lambda y, own=module.forward: (calls.append(1), own(y))[1])
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)
        assert len(calls) == len(fqns) == 4
        found, expected = model(x, src_key_padding_mask=padding), dense(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "activation", [F.relu, nn.ReLU(), F.gelu, nn.GELU(), torch.tanh], ids=["relu", "ReLU", "gelu", "GELU", "tanh"]
)
def test_dense_layers_allow_the_fast_path_again(activation):
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation)
    code, dense, lowrank = layer.activation_relu_or_gelu, layer.linear1, lro.LowRankLinear(8, 16, 4)
    swap_(layer, {dense: lowrank})
    assert layer.activation_relu_or_gelu == 0
    swap_(layer, {lowrank: dense})
    assert layer.activation_relu_or_gelu == code


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_equal_their_parts():
    layer = lro.LowRankLinear(8, 6, 4)
    parts = [torch.randn(3, 8), torch.randn(5, 8)]
    nested = layer(torch.nested.nested_tensor(parts))
    for found, part in zip(nested.unbind(), parts, strict=True):
        torch.testing.assert_close(found, layer(part))
