"""``lowrank_linear`` on a CUDA device, with every CUDA and Triton kernel that the device can run."""

import dataclasses

import pytest
import torch

from lowrank_ops.ops import _native, lowrank_linear
from lowrank_ops.ops.linear import _cuda, _triton, _triton_config, describe, explain, reference
from tests.ops.inputs import assert_linear
from tests.tolerance import assert_close_to_float64

from .device import arguments, captured, framed, needs_library, on_streams_at_once

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
BACKENDS = pytest.mark.parametrize("backend", [pytest.param("cuda", marks=needs_library), "triton"])


def linear(args, backend, activation="none"):
    """Skip what the CUDA kernels refuse: prefill on archs other than sm_90a and for ranks above 256."""
    if backend == "cuda":
        problem = describe(*args, activation)
        if _cuda.supports_decode(problem) and (reason := _cuda.supports_prefill(problem)):
            assert problem.tokens > 64, reason
            pytest.skip(reason)
    return lowrank_linear(*args, activation=activation, backend=backend)


@BACKENDS
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(1, 768, 136, 768), (1, 4096, 512, 4096), (3, 1024, 168, 4096), (8, 4096, 744, 11008), (9, 768, 216, 3072),
     (16, 768, 216, 3072), (17, 4096, 512, 11008), (33, 4096, 1024, 4096), (64, 4096, 1496, 11008),
     (64, 1000, 8, 1000), (5, 33, 7, 11), (64, 33, 7, 11), (1, 1, 1, 1), (2, 65, 1, 3), (0, 64, 8, 64)],
    ids=str,
)  # fmt: skip
def test_decode_shapes(backend, dtype, shape):
    args = arguments(*shape, dtype)
    # The bound is torch's own error. With few outputs that may be zero by chance, so use no activation there.
    activation = "gelu" if shape[0] * shape[3] > 50 else "none"
    assert_linear(linear(args, backend, activation), *args, activation)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(
    "shape",
    [(65, 64, 8, 64), (65, 4096, 1024, 4096), (100, 40, 8, 8), (100, 72, 16, 139), (129, 768, 216, 3072),
     (200, 4096, 744, 11008), (256, 768, 136, 768), (257, 768, 136, 768), (300, 33, 7, 11), (300, 1000, 104, 1000),
     (777, 1032, 248, 200), (1000, 96, 8, 40), (2048, 1024, 168, 4096), (2048, 4096, 256, 4096),
     (4097, 1000, 256, 1000), (12608, 768, 64, 768), (12608, 768, 128, 3072), (12608, 768, 216, 3072),
     (20000, 1024, 192, 1024)],
    ids=str,
)  # fmt: skip
def test_prefill_shapes(backend, dtype, activation, shape):
    args = arguments(*shape, dtype)
    assert_linear(linear(args, backend, activation), *args, activation)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("tokens", [1, 4, 16, 40, 64, 130, 600])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_epilogues(backend, dtype, tokens, bias, activation):
    args = arguments(tokens, 512, 136, 768, dtype, bias)
    assert_linear(linear(args, backend, activation), *args, activation)


@needs_library
@pytest.mark.parametrize("tokens", [65, 128, 1000, 4000, 16000, 33000])
@pytest.mark.parametrize("rank", [64, 128, 192, 256])
def test_cuda_prefill_cluster_sizes(rank, tokens):
    """From one tile, shared by the largest cluster, to many tiles without clusters."""
    args = arguments(tokens, 512, rank, 640)
    assert_linear(linear(args, "cuda", "silu"), *args, "silu")


@needs_library
def test_cuda_plans_sm90_kernels_on_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not compute capability 9.0")
    for tokens, kernel in ((16, "decode_sm90"), (2048, "prefill_sm90")):
        problem = describe(*arguments(tokens, 4096, 136, 4096), "none")
        machine = _native.machine(problem.device)
        assert machine.capability == 90
        twos, fours, eights = machine.clusters  # as the runtime counts them
        assert machine.sm_count // 2 >= twos >= 2 * fours > 0 and fours >= 2 * eights
        assert _cuda.plan(problem).startswith(kernel)


@needs_library
@pytest.mark.parametrize("tokens, rank", [(20, 512), (64, 512), (64, 1024), (33, 1000)])
def test_cuda_decode_rows_share_x(tokens, rank):
    """32 or 64 rows of down at a time on compute capability 9.0."""
    args = arguments(tokens, 4096, rank, 1032)
    assert_linear(linear(args, "cuda", "gelu"), *args, "gelu")


@needs_library
@pytest.mark.parametrize(
    "tokens, rank, choice",
    [
        *((16, 128, ("decode_sm80", splits)) for splits in (1, 2, 4, 8, 16)),
        *((16, 128, ("decode_sm90", cluster)) for cluster in (1, 2, 4, 8)),
        *((tokens, 216, ("decode_sm80", splits)) for tokens in (65, 256) for splits in (1, 8)),
        *((tokens, 216, ("decode_sm90", cluster)) for tokens in (65, 256) for cluster in (1, 4)),
        *((1000, rank, ("prefill_sm90", 2, 128)) for rank in (64, 128)),
        *((1000, rank, ("prefill_sm90", 1, 192)) for rank in (64, 128)),
        *((tokens, rank, ("prefill_sm90", 1, 256)) for tokens in (257, 40000) for rank in (64, 128, 192)),
        *((1000, 256, ("prefill_sm90", cluster, 128)) for cluster in (2, 4, 8)),
        *((1000, 256, ("prefill_sm90", cluster, 192)) for cluster in (2, 4)),
    ],
    ids=str,
)
def test_cuda_choices(tokens, rank, choice):
    """Choices that a tuned table may make instead of the planner."""
    args = arguments(tokens, 1024, rank, 768)
    problem, choice = describe(*args, "silu"), _native.Choice(*choice)
    if reason := _cuda.refuse(problem, choice):
        assert choice.kernel.endswith("sm90") and problem.device.capability != (9, 0), reason
        pytest.skip(reason)
    assert_linear(_cuda.run(problem, *args, "silu", choice), *args, "silu")


def test_every_triton_configuration():
    name = _triton_config.arch(torch.cuda.get_device_capability())
    for config in _triton_config.shipped_decode(name):
        args = arguments(config.block_m - 1, 2 * config.block_k + 8, config.slab + 72, 200)
        problem = describe(*args, "silu")
        if _triton.supports_decode(problem, config) is None:
            assert_linear(_triton.run_decode(problem, *args, "silu", config), *args, "silu")
    for config in _triton_config.shipped_prefill(name):
        args = arguments(5 * config.block_m + 1, 3 * config.block_k + 8, config.rank - 8, 3 * config.block_n + 8)
        problem = describe(*args, "silu")
        for parts in (1, 3):
            cut = dataclasses.replace(config, parts=parts)
            if _triton.supports_prefill(problem, cut) is None:
                assert_linear(_triton.run_prefill(problem, *args, "silu", cut), *args, "silu")


@BACKENDS
@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("first", [8, 3], ids=["aligned", "odd"])
def test_strides_and_alignment(backend, tokens, transposed, first):
    wide, down, up, bias = arguments(tokens, 264, 136, 200)
    down = down[:, :128]
    if transposed:
        down, up = (factor.T.contiguous().T for factor in (down, up))
    args = (wide[:, first : first + 128], down, up, bias)
    assert_linear(linear(args, backend), *args, "none")


@BACKENDS
@pytest.mark.parametrize("tokens", [5, 70])
def test_aligned_rows_of_odd_length(backend, tokens):
    x, down, up, bias = arguments(tokens, 1008, 136, 256)
    args = (x[:, :1001], down[:, :1001], up, bias)
    assert_linear(linear(args, backend), *args, "none")


@BACKENDS
@pytest.mark.parametrize("pad", [8, 3])
@pytest.mark.parametrize("tokens", [1, 13, 64, 65, 256, 1000])
def test_loads_in_bounds_and_all_outputs_stored(backend, tokens, pad, monkeypatch):
    """NaN around the operands, in the scratch and in the output."""
    x, down, up, bias = arguments(tokens, 1032, 136, 776)
    args = (framed(x, pad), framed(down, pad), framed(up, pad), bias)
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: empty(*a, **o).fill_(float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: new_empty(*a, **o).fill_(float("nan")))
    torch.full((16 << 20,), float("nan"), device="cuda")  # for the library's own allocations from the caching allocator
    y = linear(args, backend)
    monkeypatch.undo()
    assert_linear(y, x, down, up, bias, "none")


@BACKENDS
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 2048])
def test_runs_are_bitwise_equal(backend, tokens):
    args = arguments(tokens, 4096, 216, 4096)
    first = linear(args, backend)
    for _ in range(100):
        assert torch.equal(linear(args, backend), first)


@BACKENDS
@pytest.mark.parametrize("tokens, width, rank", [(1, 1024, 168), (16, 4096, 512), (64, 1024, 168), (2048, 4096, 216)])
def test_graph_capture_and_replay(backend, tokens, width, rank):
    """1000 replays of two calls, each with a new x: no state is left over between replays."""
    x, down, up, bias = arguments(tokens, width, rank, width)

    def twice():
        y = linear((x, down, up, bias), backend)
        return y, linear((y, down, up, bias), backend)

    twice()
    graph, results = captured(twice)
    fresh, eager = [torch.randn_like(x) for _ in range(10)], []
    for value in fresh:
        x.copy_(value)
        eager.append(twice())
    for replay in range(1000):
        x.copy_(fresh[replay % 10])
        for y in results:
            y.fill_(float("nan"))
        graph.replay()
        if replay % 100 < 10 or replay >= 990:
            for y, right in zip(results, eager[replay % 10], strict=True):
                assert torch.equal(y, right), f"replay {replay}"


@BACKENDS
@pytest.mark.parametrize("tokens", [(1, 1), (1, 40), (64, 64), (256, 256), (2048, 2048)], ids=str)
def test_two_streams(backend, tokens):
    """Includes kernels with a grid barrier."""
    calls = [arguments(count, 4096, 216, 4096, seed=seed) for seed, count in enumerate(tokens)]
    expected = [linear(args, backend) for args in calls]
    results = on_streams_at_once([lambda args=args: linear(args, backend) for args in calls], 100)
    for outcomes, right in zip(results, expected, strict=True):
        assert all(torch.equal(outcome, right) for outcome in outcomes)


@BACKENDS
def test_weights_written_just_before_are_seen(backend):
    """up is loaded before t is ready, but not before earlier work on the stream has finished."""
    x, down, up, bias = arguments(1, 4096, 512, 4096)
    others = [torch.randn_like(up) for _ in range(20)]
    expected = [linear((x, down, other, bias), backend) for other in others]
    busy = torch.randn(4096, 4096, device="cuda")
    for other, right in zip(others, expected, strict=True):
        busy @ busy
        up.copy_(other)
        assert torch.equal(linear((x, down, up, bias), backend), right)


@BACKENDS
@pytest.mark.parametrize("tokens", [5, 16, 300])
@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("upstream", ["dense", "broadcast"])
@pytest.mark.parametrize("of", ["all", "x"])
def test_backward_matches_reference(backend, tokens, activation, upstream, of):
    """If only x needs a gradient, the kernel gets transposed factors."""

    def gradients(dtype, backend):
        args = [tensor.to(dtype) for tensor in arguments(tokens, 264, 136, 200)]
        leaves = [tensor.requires_grad_() for tensor in (args if of == "all" else args[:1])]
        y = linear(args, backend, activation)
        grad = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)
        if upstream == "broadcast":
            grad = grad[:1, :1].expand_as(y)
        return torch.autograd.grad(y, leaves, grad.bfloat16().to(dtype))

    truth = gradients(torch.float64, "reference")
    for ours, theirs, exact in zip(
        gradients(torch.bfloat16, backend), gradients(torch.bfloat16, "reference"), truth, strict=True
    ):
        assert_close_to_float64(ours, theirs, exact)


@BACKENDS
@pytest.mark.parametrize("tokens", [3, 300])
def test_opcheck(backend, tokens):
    args = [tensor.requires_grad_() for tensor in arguments(tokens, 64, 16, 48)]
    linear(args, backend, "silu")
    torch.library.opcheck(
        torch.ops.lowrank_ops.lowrank_linear.default, args, {"activation": "silu", "backend": backend}
    )


@pytest.mark.parametrize("backend", ["auto", pytest.param("cuda", marks=needs_library), "triton", "reference"])
def test_torch_compile(backend):
    args = arguments(5, 768, 136, 768)
    compiled = torch.compile(lambda *tensors: lowrank_linear(*tensors, backend=backend), fullgraph=True)
    assert torch.equal(compiled(*args), lowrank_linear(*args, backend=backend))


def test_auto_runs_the_triton_kernels():
    assert "triton.decode: runs" in explain(*arguments(1, 4096, 512, 4096))
    many_tokens = explain(*arguments(4096, 768, 136, 768))
    assert "triton.prefill: runs" in many_tokens or "triton.prefill: cannot run: needs Triton 3.7" in many_tokens
    assert "two_products: runs" in explain(*arguments(4096, 4096, 512, 4096))


@BACKENDS
def test_offsets_past_32_bits(backend):
    """x and y have more than 2^31 elements; only the last rows are compared."""
    tokens, features = 2**31 // 4096 + 300, 4096
    if torch.cuda.mem_get_info()[0] < 5 * tokens * features:
        pytest.skip("needs 10 GB of free device memory")
    _, down, up, bias = arguments(1, features, 64, features)
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    x[-300:] = torch.randn(300, features, device="cuda")
    y = linear((x, down, up, bias), backend)
    assert_linear(y[-300:], x[-300:], down, up, bias, "none")


# A small set for compute-sanitizer, run by from_wheel.sh.


@needs_library
@pytest.mark.parametrize("tokens", [1, 9, 64, 200])
def test_cuda_sanitized(tokens):
    args = arguments(tokens, 200, 136, 328)
    assert_linear(linear(args, "cuda", "relu"), *args, "relu")
