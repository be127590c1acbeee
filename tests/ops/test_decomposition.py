"""Exported graphs for consumers that do not know lowrank_linear: two matrix products."""

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_ops as lro


class Model(nn.Module):
    """Two layers, and the op with an activation."""

    def __init__(self, backend="auto"):
        super().__init__()
        torch.manual_seed(0)
        self.backend = backend
        self.first, self.second = lro.LowRankLinear(24, 16, 5), lro.LowRankLinear(16, 12, 3, bias=False)

    def forward(self, x):
        x = self.second(self.first(x))
        return lro.ops.lowrank_linear(
            x, self.first.down[:, :12], self.first.up, activation="gelu", backend=self.backend
        )


def products(graph):
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert not any("lowrank" in name for name in names)
    return sum(name in ("aten.mm.default", "aten.addmm.default", "aten.linear.default") for name in names)


@pytest.mark.parametrize("shape, strict", [((2, 3, 24), False), ((4, 24), True)])
def test_exports_have_two_products_per_layer(shape, strict):
    model, x = Model().eval(), torch.randn(shape)
    exported = torch.export.export(model, (x,), strict=strict)
    for program in (exported, exported.run_decompositions()):
        assert products(program.graph) == 6
        torch.testing.assert_close(program.module()(x), model(x))


def test_a_named_backend_keeps_the_op_until_it_is_decomposed():
    model, x = Model("reference").eval(), torch.randn(4, 24)
    exported = torch.export.export(model, (x,))
    assert sum("lowrank_linear" in str(node.target) for node in exported.graph.nodes) == 1
    decomposed = exported.run_decompositions(lro.ops.decompositions())
    assert products(decomposed.graph) == 6
    torch.testing.assert_close(decomposed.module()(x), model(x))


def test_compiled_models_keep_one_op():
    graphs = []
    layer, x = Model().first, torch.randn(4, 24)
    torch.compile(layer, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1])(x)
    assert [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"] == [
        "lowrank_ops.lowrank_linear"
    ]


def test_onnx_runtime_computes_the_same(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = Model().eval(), torch.randn(2, 3, 24)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},))
    nodes = onnx.load(path).graph.node
    assert sum(node.op_type in ("MatMul", "Gemm") for node in nodes) == 6 and all(not node.domain for node in nodes)
    session = onnxruntime.InferenceSession(path)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 24)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5, rtol=1e-5)
