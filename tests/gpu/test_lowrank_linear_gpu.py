"""The low-rank product on a CUDA device, by every Triton kernel that the device can run."""

import dataclasses

import pytest
import torch

from lowrank_ops.ops import lowrank_linear
from lowrank_ops.ops.lowrank_linear import _triton, _triton_config, describe, explain, reference
from tests.tolerance import assert_close_to_float64

pytestmark = pytest.mark.gpu

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def arguments(tokens, in_features, rank, out_features, dtype=torch.bfloat16, bias=True, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

    return (
        normal(tokens, in_features),
        normal(rank, in_features, scale=in_features**-0.5),
        normal(out_features, rank, scale=rank**-0.5),
        normal(out_features) if bias else None,
    )


def assert_right(y, x, down, up, bias, activation):
    wide = [None if tensor is None else tensor.double() for tensor in (x, down, up, bias)]
    assert_close_to_float64(
        y, reference.two_products(x, down, up, bias, activation), reference.two_products(*wide, activation)
    )


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        (1, 768, 136, 768),
        (1, 4096, 512, 4096),
        (3, 1024, 168, 4096),
        (16, 768, 216, 3072),
        (17, 4096, 512, 11008),
        (64, 1000, 8, 1000),
        (65, 4096, 1024, 4096),
        (200, 4096, 744, 11008),
        (256, 768, 136, 768),
        (257, 768, 136, 768),
        (2048, 1024, 168, 4096),
        (12608, 768, 216, 3072),
        (4097, 1000, 256, 1000),
        (1000, 96, 8, 40),
        (5, 33, 7, 11),
        (300, 33, 7, 11),
        (1, 1, 1, 1),
        (0, 64, 8, 64),
    ],
    ids=str,
)
def test_shapes(dtype, shape):
    args = arguments(*shape, dtype)
    assert_right(lowrank_linear(*args, activation="gelu", backend="triton"), *args, "gelu")


@DTYPES
@pytest.mark.parametrize("tokens", [4, 40, 130, 600])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(dtype, tokens, bias, activation):
    args = arguments(tokens, 512, 136, 768, dtype, bias)
    assert_right(lowrank_linear(*args, activation=activation, backend="triton"), *args, activation)


def test_every_configuration_that_ships():
    name = _triton_config.arch(torch.cuda.get_device_capability())
    for config in _triton_config.shipped_decode(name):
        args = arguments(config.block_m - 1, 2 * config.block_k + 8, config.slab + 72, 200)
        problem = describe(*args, "silu")
        if _triton.supports_decode(problem, config) is None:
            assert_right(_triton.run_decode(problem, *args, "silu", config), *args, "silu")
    for config in _triton_config.shipped_prefill(name):
        args = arguments(5 * config.block_m + 1, 3 * config.block_k + 8, config.rank - 8, 3 * config.block_n + 8)
        problem = describe(*args, "silu")
        for parts in (1, 3):
            cut = dataclasses.replace(config, parts=parts)
            if _triton.supports_prefill(problem, cut) is None:
                assert_right(_triton.run_prefill(problem, *args, "silu", cut), *args, "silu")


@pytest.mark.parametrize("tokens", [3, 300])
def test_strides_and_alignment(tokens):
    wide, down, up, bias = arguments(tokens, 264, 136, 200)
    for x in (wide[:, 8:136], wide[:, 3:131]):
        first = down[:, :128]
        for factors in ((first, up), (first.T.contiguous().T, up.T.contiguous().T), (first, up[:, :].clone())):
            args = (x, *factors, bias)
            assert_right(lowrank_linear(*args, backend="triton"), *args, "none")


@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 1000])
def test_no_byte_outside_is_read_and_every_byte_inside_is_written(tokens, monkeypatch):
    """NaN around the operands, in scratch and in the output."""

    def framed(matrix):
        frame = torch.full((matrix.shape[0] + 2, matrix.shape[1] + 16), float("nan")).to(matrix)
        frame[1:-1, 8:-8].copy_(matrix)
        return frame[1:-1, 8:-8]

    x, down, up, bias = arguments(tokens, 1032, 136, 776)
    args = (framed(x), framed(down), framed(up), bias)
    honest, honest_new = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: honest(*a, **o).fill_(float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: honest_new(*a, **o).fill_(float("nan")))
    y = lowrank_linear(*args, backend="triton")
    monkeypatch.undo()
    assert_right(y, x, down, up, bias, "none")


@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 2048])
def test_bitwise_repeatable(tokens):
    args = arguments(tokens, 4096, 216, 4096)
    first = lowrank_linear(*args, backend="triton")
    for _ in range(50):
        assert torch.equal(lowrank_linear(*args, backend="triton"), first)


@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_graph_capture_and_replay(tokens):
    """1000 replays, each with a new x: nothing is left over from one replay to the next."""
    x, down, up, bias = arguments(tokens, 1024, 168, 1024)
    lowrank_linear(x, down, up, bias, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lowrank_linear(x, down, up, bias, backend="triton")
    fresh = [torch.randn_like(x) for _ in range(10)]
    eager = [lowrank_linear(value, down, up, bias, backend="triton") for value in fresh]
    for turn in range(1000):
        x.copy_(fresh[turn % 10])
        y.fill_(float("nan"))
        graph.replay()
        if turn % 100 < 10 or turn >= 990:
            assert torch.equal(y, eager[turn % 10]), f"replay {turn}"


@pytest.mark.parametrize("tokens", [1, 64, 256, 2048])
def test_two_streams_at_once(tokens):
    calls = [arguments(tokens, 4096, 216, 4096, seed=seed) for seed in (1, 2)]
    expected = [lowrank_linear(*args, backend="triton") for args in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(100):
        for stream, args, into in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                into.append(lowrank_linear(*args, backend="triton"))
    torch.cuda.synchronize()
    for outcomes, right in zip(results, expected, strict=True):
        assert all(torch.equal(outcome, right) for outcome in outcomes)


def test_weights_written_just_before_are_seen():
    """up is fetched before t is there, but not before the work in front of the call is done."""
    x, down, up, bias = arguments(1, 4096, 512, 4096)
    others = [torch.randn_like(up) for _ in range(20)]
    expected = [lowrank_linear(x, down, other, bias, backend="triton") for other in others]
    heat = torch.randn(4096, 4096, device="cuda")
    for other, right in zip(others, expected, strict=True):
        heat @ heat
        up.copy_(other)
        assert torch.equal(lowrank_linear(x, down, up, bias, backend="triton"), right)


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("upstream", ["dense", "broadcast"])
def test_backward_against_the_reference(tokens, activation, upstream):
    def gradients(dtype, backend):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in arguments(tokens, 264, 136, 200)]
        y = lowrank_linear(*leaves, activation=activation, backend=backend)
        grad = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)
        if upstream == "broadcast":
            grad = grad[:1, :1].expand_as(y)
        return torch.autograd.grad(y, leaves, grad.bfloat16().to(dtype))

    truth = gradients(torch.float64, "reference")
    for ours, theirs, exact in zip(
        gradients(torch.bfloat16, "triton"), gradients(torch.bfloat16, "reference"), truth, strict=True
    ):
        assert_close_to_float64(ours, theirs, exact)


@pytest.mark.parametrize("tokens", [3, 300])
def test_opcheck(tokens):
    args = [tensor.requires_grad_() for tensor in arguments(tokens, 64, 16, 48)]
    torch.library.opcheck(
        torch.ops.lowrank_ops.lowrank_linear.default, args, {"activation": "silu", "backend": "triton"}
    )


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_compiled(backend):
    args = arguments(5, 768, 136, 768)
    compiled = torch.compile(lambda *tensors: lowrank_linear(*tensors, backend=backend), fullgraph=True)
    assert torch.equal(compiled(*args), lowrank_linear(*args, backend=backend))


def test_auto_takes_the_kernels():
    assert "triton.decode: runs" in explain(*arguments(1, 4096, 512, 4096))
    assert "triton.prefill: runs" in explain(*arguments(4096, 768, 136, 768))
    assert "two_products: runs" in explain(*arguments(4096, 4096, 512, 4096))


def test_offsets_past_32_bits():
    """x and y of more than 2^31 elements; only the last rows are compared."""
    tokens, features = 2**31 // 4096 + 300, 4096
    if torch.cuda.mem_get_info()[0] < 5 * tokens * features:
        pytest.skip("needs 10 GB of free device memory")
    _, down, up, bias = arguments(1, features, 64, features)
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    x[-300:] = torch.randn(300, features, device="cuda")
    y = lowrank_linear(x, down, up, bias, backend="triton")
    assert_right(y[-300:], x[-300:], down, up, bias, "none")
