"""``lowrank_linear_grouped`` and groups of layers on a CUDA device."""

import pytest
import torch

import lowrank_ops as lro
from lowrank_ops.layers import group_
from lowrank_ops.layers.group import LowRankGroup
from lowrank_ops.ops import lowrank_linear_grouped
from tests.gpu.device import needs_library
from tests.ops.inputs import assert_grouped, grouped_inputs

pytestmark = pytest.mark.gpu


def on_device(x, down, ups, biases):
    lists = ([None if tensor is None else tensor.cuda() for tensor in part] for part in (ups, biases))
    return x.cuda(), down.cuda() if isinstance(down, torch.Tensor) else [part.cuda() for part in down], *lists


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_library)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 200, 257, 3000])
@pytest.mark.parametrize(
    ("in_features", "ranks", "out_features"),
    [(768, (136, 136, 136), (768, 768, 768)), (4096, (256, 128, 128), (4096, 1024, 1024)), (33, (7, 19), (11, 35))],
)
def test_shapes(backend, dtype, tokens, in_features, ranks, out_features):
    if backend == "cuda" and tokens > 64 and (in_features == 33 or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("the CUDA kernels for many tokens need compute capability 9.0 and rows on 16 bytes")
    sizes = {"in_features": in_features, "ranks": ranks, "out_features": out_features}
    for options in ({}, {"shared": True}, {"biases": (True, *[False] * (len(ranks) - 1))}):
        args = on_device(*grouped_inputs(tokens, **sizes, dtype=dtype, **options))
        assert_grouped(lowrank_linear_grouped(*args, backend=backend), *args)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [3, 300])
def test_members_take_their_outputs_from_one_call(tokens, monkeypatch):
    monkeypatch.setenv("LOWRANK_OPS_VERIFY", "off")
    options = {"device": "cuda", "dtype": torch.bfloat16}
    layers = torch.nn.ModuleDict({name: lro.LowRankLinear(256, 256, 32, **options) for name in "qkv"})
    group_(layers, ["qkv"])
    calls, compute = [], LowRankGroup._compute
    monkeypatch.setattr(LowRankGroup, "_compute", lambda *args: calls.append(compute(*args)) or calls[-1])
    factors = ([getattr(layer, name) for layer in layers.values()] for name in ("down", "up", "bias"))
    factors = [*factors]
    x = torch.randn(tokens, 256, **options)
    lowrank_linear_grouped(x, *factors, backend="triton")  # skips this test under a Triton that is refused here
    for _ in range(3):
        x = torch.randn(tokens, 256, **options)
        assert_grouped([layer(x) for layer in layers.values()], x, *factors)
        x.add_(1)
        assert_grouped([layer(x) for layer in layers.values()], x, *factors)
    assert len(calls) == 6 and all(y is not None for y in calls)
    stream = torch.cuda.Stream()
    layers["q"](x)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        layers["k"](x)
    assert len(calls) == 8  # computed again on the other stream
    for layer in layers.values():
        lro.ops.lowrank_linear(x, layer.down, layer.up, layer.bias)  # compiles what the capture launches
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = [layer(x) for layer in layers.values()]
    assert len(calls) == 8
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_grouped(ys, x, *factors)
