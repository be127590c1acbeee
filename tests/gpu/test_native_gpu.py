"""The CUDA C++ kernels on a device, from an installed library: every kernel, dtype, tail and alignment."""

import pytest
import torch

from lowrank_ops.ops import _native, conv_covariance_update_, covariance_update_, lowrank_linear
from lowrank_ops.ops.covariance import _cuda, describe
from lowrank_ops.ops.lowrank_linear import _cuda as linear_cuda
from lowrank_ops.ops.lowrank_linear import describe as describe_linear
from lowrank_ops.ops.lowrank_linear import reference
from tests.tolerance import assert_close_to_float64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _native.LIBRARY.is_file(), reason="the native library was not built"),
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
# Relative to the sum of |x_i x_j|: products are exact or, for float32, three of bfloat16 or one of TensorFloat-32; 2048
# of them are summed in the tensor cores' float32, which may truncate.
BOUNDS = {"bf16": 2.0**-16, "fp16": 2.0**-16, "fp32": 2.0**-14, "tf32": 2.0**-9}


def random(*shape, dtype=torch.float32, mean=0.5):
    generator = torch.Generator("cuda").manual_seed(0)
    return (torch.randn(*shape, generator=generator, device="cuda") + mean).to(dtype)


def zeros(features, dtype=torch.float32, groups=None):
    lead = () if groups is None else (groups,)
    return (
        torch.zeros(*lead, features, features, dtype=dtype, device="cuda"),
        torch.zeros(*lead, features, dtype=dtype, device="cuda"),
    )


def assert_updated(second_moment, total, x, dtype="bf16"):
    """From zeros: the lower triangle and the sums, against float64."""
    rows = x.reshape(-1, x.shape[-1]).double()
    error = (second_moment.double() - rows.T @ rows).abs().tril()
    allowed = (BOUNDS[dtype] + 4 * torch.finfo(second_moment.dtype).eps) * (rows.abs().T @ rows.abs())
    assert error.isfinite().all()
    assert (error <= allowed.tril() + 1e-30).all(), (error / allowed).max()
    assert ((total.double() - rows.sum(0)).abs() <= 2.0**-17 * rows.abs().sum(0)).all()
    assert not second_moment.triu(1).any()


def update(second_moment, total, x, dtype="bf16"):
    covariance_update_(second_moment, total, x, allow_tf32=dtype == "tf32", backend="cuda")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64], ids=["state32", "state64"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, features",
    [(4096, 256), (12608, 768), (5000, 1024), (777, 333), (1, 512), (513, 1), (1, 1), (3000, 72), (40, 3072),
     (63, 128), (64, 129), (65, 130)],
    ids=str,
)  # fmt: skip
def test_covariance_shapes(tokens, features, dtype, state_dtype):
    x = random(tokens, features, dtype=DTYPES[dtype])
    second_moment, total = zeros(features, state_dtype)
    update(second_moment, total, x, dtype)
    assert_updated(second_moment, total, x, dtype)
    update(second_moment, total, x, dtype)  # added to what is there
    assert_updated(second_moment / 2, total / 2, x, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("padding", [0, 1, 8, 24])
def test_covariance_alignments_in_poisoned_memory(dtype, offset, padding):
    tokens, features = 300, 196
    stride = features + padding
    memory = torch.full((offset + tokens * stride + 4096,), float("nan"), dtype=DTYPES[dtype], device="cuda")
    x = memory[offset:].as_strided((tokens, features), (stride, 1)).copy_(random(tokens, features))
    second_moment, total = zeros(features)
    update(second_moment, total, x, dtype)
    assert_updated(second_moment, total, x, dtype)


def test_covariance_into_a_strided_state_in_poisoned_memory():
    memory = torch.full((300, 700), float("nan"), device="cuda")
    second_moment = memory[20:220, 7:407:2].zero_()
    total = torch.full((400,), float("nan"), device="cuda")[::2].zero_()
    x = random(900, 200, dtype=torch.bfloat16)
    update(second_moment, total, x)
    assert_updated(second_moment, total, x)
    memory[20:220, 7:407:2] = float("nan")
    assert memory.isnan().all()


def test_nothing_to_add():
    second_moment, total = zeros(64)
    update(second_moment, total, random(0, 64))
    update(*zeros(0), random(7, 0))
    assert not second_moment.any() and not total.any()


def test_scratch_may_hold_anything():
    x = random(12608, 192, dtype=torch.bfloat16)
    second_moment, total = zeros(192)
    device = describe(second_moment, x).device
    _, plan = torch.ops.lowrank_ops._plan_covariance(
        12608, 192, 1, "bfloat16", "aligned_matrix", False, *_native.machine(device)
    )
    assert " 0 floats of scratch" not in plan
    torch.full((64 << 20,), float("nan"), device="cuda")  # left to the caching allocator
    update(second_moment, total, x)
    assert_updated(second_moment, total, x)


@pytest.mark.parametrize("features", [768, 4096], ids=["split", "whole"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_covariance_same_bits_on_every_run(dtype, features):
    x = random(8192, features, dtype=DTYPES[dtype])
    first = None
    for _ in range(10):
        state = zeros(features)
        update(*state, x, dtype)
        first = first or state
        assert torch.equal(state[0], first[0]) and torch.equal(state[1], first[1])


def test_covariance_graph_replays():
    replays = 1000
    x = random(2048, 256, dtype=torch.bfloat16)
    second_moment, total = zeros(256, torch.float64)
    update(*zeros(256, torch.float64), x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(second_moment, total, x)
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    assert_updated(second_moment / replays, total / replays, x)


def test_covariance_on_two_streams():
    parts = [random(8192, 384, dtype=torch.bfloat16, mean=mean) for mean in (0.0, 2.0)]
    states = [zeros(384) for _ in parts]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in parts]
    for _ in range(50):
        for stream, state, part in zip(streams, states, parts, strict=True):
            with torch.cuda.stream(stream):
                update(*state, part)
    torch.cuda.synchronize()
    for (second_moment, total), part in zip(states, parts, strict=True):
        assert_updated(second_moment / 50, total / 50, part)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64], ids=["state32", "state64"])
def test_covariance_of_a_million_tokens_far_from_zero(state_dtype):
    second_moment, total = zeros(128, state_dtype)
    truth = torch.zeros(128, 128, dtype=torch.float64, device="cuda")
    for part in range(8):
        x = random(1 << 17, 128, dtype=torch.bfloat16, mean=8.0 + part)
        update(second_moment, total, x)
        truth += x.double().T @ x.double()
    error = (second_moment.double() - truth).tril().abs() / truth
    assert error.max() <= 1e-5


def test_covariance_of_more_than_two_to_the_31_elements():
    features, tokens = 4096, (1 << 19) + 4096
    if torch.cuda.mem_get_info()[0] < 3 * features * tokens:
        pytest.skip("needs 6.5 GB of free GPU memory for the input alone")
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    x[-300:] = random(300, features)
    for view in (x, x[:, 1:]):  # by asynchronous copies and through registers
        second_moment, total = zeros(view.shape[1])
        update(second_moment, total, view)
        assert_updated(second_moment, total, view[-300:])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 4, 64])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": [3, 3], "padding": [1, 1]},
        {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]},
        {"kernel_size": [4, 4], "stride": [4, 4]},
    ],
    ids=["padded", "rectangular", "patchify"],
)
def test_convolution(geometry, groups, dtype, layout):
    x = random(6, 64, 20, 24, dtype=DTYPES[dtype]).contiguous(memory_format=layout)
    features = 64 // groups * geometry["kernel_size"][0] * geometry["kernel_size"][1]
    full = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], **geometry}
    patches = torch.nn.functional.unfold(x.double(), **full).mT.reshape(-1, groups, features)
    second_moment, total = zeros(features, torch.float64, groups)
    conv_covariance_update_(second_moment, total, x, allow_tf32=dtype == "tf32", backend="cuda", **geometry)
    for group in range(groups):
        assert_updated(second_moment[group], total[group], patches[:, group], dtype)


# ---- lowrank_linear ----


def arguments(tokens, in_features, rank, out_features, dtype=torch.bfloat16, bias=True):
    generator = torch.Generator("cuda").manual_seed(0)

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


@HALVES
@pytest.mark.parametrize(
    "shape",
    [(1, 768, 136, 768), (1, 4096, 512, 4096), (3, 1024, 168, 4096), (8, 4096, 744, 11008), (9, 768, 216, 3072),
     (16, 768, 136, 768), (17, 4096, 512, 4096), (33, 4096, 1024, 4096), (64, 4096, 1496, 11008), (64, 1000, 8, 1000),
     (5, 33, 7, 11), (64, 33, 7, 11), (1, 1, 1, 1), (2, 65, 1, 3), (0, 64, 8, 64)],
    ids=str,
)  # fmt: skip
def test_decode_shapes(dtype, shape):
    args = arguments(*shape, dtype)
    assert_right(lowrank_linear(*args, activation="gelu", backend="cuda"), *args, "gelu")


@HALVES
@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_decode_epilogues(dtype, tokens, bias, activation):
    args = arguments(tokens, 512, 136, 768, dtype, bias)
    assert_right(lowrank_linear(*args, activation=activation, backend="cuda"), *args, activation)


@HALVES
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(
    "shape",
    [(65, 64, 8, 64), (128, 768, 136, 768), (129, 768, 216, 3072), (2048, 4096, 256, 4096), (2048, 1024, 168, 4096),
     (12608, 768, 64, 768), (12608, 768, 128, 3072), (20000, 1024, 192, 1024), (300, 1000, 104, 1000),
     (777, 1032, 248, 200), (100, 40, 8, 8), (100, 72, 16, 139)],
    ids=str,
)  # fmt: skip
def test_prefill_shapes(dtype, activation, shape):
    args = arguments(*shape, dtype)
    if reason := linear_cuda.supports_prefill(describe_linear(*args, activation)):
        pytest.skip(reason)
    assert_right(lowrank_linear(*args, activation=activation, backend="cuda"), *args, activation)


@pytest.mark.parametrize("cluster_rank", [64, 128, 192, 256])
def test_prefill_by_few_and_by_many_tiles(cluster_rank):
    """From one tile, which the largest cluster shares, to many, which it does not."""
    for tokens in (65, 1000, 4000, 16000, 33000):
        args = arguments(tokens, 512, cluster_rank, 640)
        if reason := linear_cuda.supports_prefill(describe_linear(*args, "silu")):
            pytest.skip(reason)
        assert_right(lowrank_linear(*args, activation="silu", backend="cuda"), *args, "silu")


def test_hopper_runs_its_own_kernels():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not compute capability 9.0")
    device = _native.machine(describe(zeros(8)[0], random(8, 8)).device)
    shape = {"in_features": 4096, "rank": 136, "out_features": 4096}
    for tokens, kernel in ((16, "decode_sm90"), (2048, "prefill_sm90")):
        assert _native.plan("lowrank_linear", torch.bfloat16, device, tokens=tokens, **shape).startswith(kernel)


@pytest.mark.parametrize("tokens", [1, 13, 64, 65, 300])
def test_nothing_outside_the_operands_is_read(tokens):
    def framed(matrix, pad):
        frame = torch.full((matrix.shape[0] + 2, matrix.shape[1] + 2 * pad), float("nan")).to(matrix)
        frame[1:-1, pad:-pad].copy_(matrix)
        return frame[1:-1, pad:-pad]

    x, down, up, bias = arguments(tokens, 1032, 136, 776)
    for pad in (8, 3) if tokens <= 64 else (8,):  # rows on 16 bytes and off them
        if reason := linear_cuda.supports_prefill(describe_linear(x, down, up, bias, "none")) if tokens > 64 else None:
            pytest.skip(reason)
        torch.full((16 << 20,), float("nan"), device="cuda")  # scratch and output may hold anything
        y = lowrank_linear(framed(x, pad), framed(down, pad), framed(up, pad), bias, backend="cuda")
        assert_right(y, x, down, up, bias, "none")


@pytest.mark.parametrize("tokens", [5, 70])
def test_rows_that_start_on_16_bytes_and_end_off_them(tokens):
    x, down, up, bias = arguments(tokens, 1008, 136, 256)
    args = (x[:, :1001], down[:, :1001], up, bias)
    if reason := linear_cuda.supports_prefill(describe_linear(*args, "none")) if tokens > 64 else None:
        pytest.skip(reason)
    assert_right(lowrank_linear(*args, backend="cuda"), *args, "none")


@pytest.mark.parametrize("shape", [(1, 768, 136, 768), (16, 4096, 512, 4096), (2048, 4096, 216, 4096)], ids=str)
def test_same_bits_on_every_run_and_in_a_graph(shape):
    tokens, width, rank, _ = shape
    args = arguments(tokens, width, rank, width)
    if reason := linear_cuda.supports_prefill(describe_linear(*args, "none")) if tokens > 64 else None:
        pytest.skip(reason)
    first = lowrank_linear(*args, backend="cuda")
    for _ in range(100):
        assert torch.equal(lowrank_linear(*args, backend="cuda"), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = lowrank_linear(*args, backend="cuda")
        twice = lowrank_linear(inside, *args[1:], backend="cuda")
    for _ in range(1000):
        inside.fill_(float("nan"))
        twice.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(inside, first)
    assert torch.equal(twice, lowrank_linear(first, *args[1:], backend="cuda"))


def test_decode_on_two_streams():
    cases = [arguments(tokens, 1024, 168, 1024) for tokens in (1, 40)]  # kernels whose blocks wait for each other
    expected = [lowrank_linear(*args, backend="cuda") for args in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results = [[] for _ in cases]
    for _ in range(100):
        for stream, args, result in zip(streams, cases, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(lowrank_linear(*args, backend="cuda"))
    torch.cuda.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert all(torch.equal(y, right) for y in result)


@pytest.mark.parametrize("tokens", [16, 200])
def test_gradients(tokens):
    """The backward hands over factors that are not row-major."""
    args = [tensor.requires_grad_() for tensor in arguments(tokens, 256, 64, 128)]
    if reason := linear_cuda.supports_prefill(describe_linear(*args, "silu")) if tokens > 64 else None:
        pytest.skip(reason)
    lowrank_linear(*args, activation="silu", backend="cuda").sum().backward()
    mine = [tensor.grad for tensor in args]
    for tensor in args:
        tensor.grad = None
    reference.two_products(*args, "silu").sum().backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in args]
    reference.two_products(*wide, "silu").sum().backward()
    for grad, same_dtype, truth in zip(mine, args, wide, strict=True):
        assert_close_to_float64(grad, same_dtype.grad, truth.grad)


# A small set of everything, for compute-sanitizer: see from_wheel.sh.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, features", [(130, 72), (130, 71), (4096, 72)], ids=["aligned", "odd", "split"])
def test_sanitized_covariance(tokens, features, dtype):
    x = random(tokens, features, dtype=DTYPES[dtype])
    state = zeros(features)
    update(*state, x, dtype)
    assert_updated(*state, x, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sanitized_convolution(dtype):
    image = random(2, 8, 9, 10, dtype=DTYPES[dtype])
    second_moment, total = zeros(72, groups=1)
    conv_covariance_update_(second_moment, total, image, kernel_size=(3, 3), allow_tf32=dtype == "tf32", backend="cuda")
    patches = torch.nn.functional.unfold(image.double(), 3).mT.reshape(-1, 72)
    assert_updated(second_moment[0], total[0], patches, dtype)


@pytest.mark.parametrize("tokens", [1, 9, 64, 200])
def test_sanitized_linear(tokens):
    args = arguments(tokens, 200, 136, 328)
    if reason := linear_cuda.supports_prefill(describe_linear(*args, "relu")) if tokens > 64 else None:
        pytest.skip(reason)
    assert_right(lowrank_linear(*args, activation="relu", backend="cuda"), *args, "relu")


def test_opcheck():
    x = random(300, 72, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.lowrank_ops.covariance_update_.default, (*zeros(72), x), {"backend": "cuda"})
    torch.library.opcheck(
        torch.ops.lowrank_ops.lowrank_linear.default, arguments(16, 256, 64, 128), {"backend": "cuda"}
    )


def test_refusals_name_the_shape_and_leave_the_state_alone():
    assert _cuda.supports(describe(zeros(64)[0], random(5, 64).T.contiguous().T)) is not None
    second_moment, total = zeros(64)
    with pytest.raises(RuntimeError, match="does not fit"):
        torch.ops.lowrank_ops._cuda_covariance_update_(second_moment, total, random(5, 65), False)
    assert not second_moment.any()
