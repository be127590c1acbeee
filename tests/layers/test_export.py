"""Compressed models in tools that know only torch's own layers and ops: each tool itself, with the same outputs."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers import LowRankConv1d, to_plain_layers

WITHOUT_PACKAGE = """
import sys
sys.modules["lowrank_ops"] = None  # an import of it fails
import torch
x, y = torch.load(sys.argv[2])
torch.testing.assert_close(torch.jit.load(sys.argv[1])(x), y)
"""

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Every kind of low-rank layer, and the op with an activation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = lro.LowRankConv2d(3, 8, 3, rank=5, padding=1)
        self.line = LowRankConv1d(8, 8, 3, rank=5, padding=2, dilation=2)
        self.first, self.second = lro.LowRankLinear(16, 24, 5), lro.LowRankLinear(24, 32, 3, bias=False)

    def forward(self, x):
        x = self.line(self.conv(x).flatten(2))
        return self.second(torch.relu(self.first(x)))


class WithOp(Net):
    def forward(self, x):
        return super().forward(x) + lro.ops.lowrank_linear(
            x[:, 0, :, :1].transpose(1, 2), self.first.down[:, :4], self.second.up, activation="gelu"
        )


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_trace_loads_and_runs_without_the_package(x, tmp_path):
    model = WithOp().eval()
    traced = torch.jit.trace(model, x)
    assert "lowrank_ops::" not in str(traced.inlined_graph)
    traced.save(tmp_path / "model.pt")
    torch.save((x, model(x)), tmp_path / "data.pt")
    command = [sys.executable, "-c", WITHOUT_PACKAGE, tmp_path / "model.pt", tmp_path / "data.pt"]
    subprocess.run(command, check=True, cwd=tmp_path)


def test_onnx_by_torchscript_computes_the_same(x, tmp_path):  # dynamo=True: tests/ops/test_decomposition.py
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = WithOp().eval(), tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=False, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x))


def test_plain_layers_are_scripted(x):
    model = Net().eval()
    torch.testing.assert_close(torch.jit.script(to_plain_layers(model))(x), model(x))


def test_plain_layers_are_quantized_by_torch(x):
    model = Net().eval()
    quantized = torch.ao.quantization.quantize_dynamic(to_plain_layers(model), {nn.Linear}, torch.qint8)
    assert sum(type(module).__module__.startswith("torch.ao") for module in quantized.modules()) >= 4
    error = (quantized(x) - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.05


def test_plain_layers_are_quantized_by_torchao(x):
    quantization = pytest.importorskip("torchao.quantization")
    model = Net().eval()
    plain = to_plain_layers(model)
    quantization.quantize_(plain, quantization.Int8WeightOnlyConfig())
    kinds = {type(layer.weight).__module__.partition(".")[0] for part in (plain.first, plain.second) for layer in part}
    assert kinds == {"torchao"}
    error = (plain(x) - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.05
    with pytest.raises(ValueError, match="has no supported"):
        lro.calibrate(nn.Sequential(copy.deepcopy(plain.first)), [torch.randn(4, 16)])
