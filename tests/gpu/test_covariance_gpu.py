"""The covariance ops on a CUDA device, as every backend that can run there runs them."""

import pytest
import torch

from lowrank_ops.ops import conv_covariance_update_, covariance_update_
from lowrank_ops.ops.covariance import _triton, describe, reference

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative to the sum of |x_i x_j|. Exact products still pass through the tensor core's accumulation, which may
# truncate: 2048 tokens of it are allowed 2^-16.
BOUNDS = {"bf16": 2.0**-16, "fp16": 2.0**-16, "fp32": 2.0**-14}
TF32_BOUND = 2.0**-9


def random(*shape, dtype=torch.float32, mean=0.5):
    generator = torch.Generator("cuda").manual_seed(0)
    return (torch.randn(*shape, generator=generator, device="cuda") + mean).to(dtype)


def zeros(features, dtype=torch.float32, groups=None):
    lead = () if groups is None else (groups,)
    second_moment = torch.zeros(*lead, features, features, dtype=dtype, device="cuda")
    return second_moment, torch.zeros(*lead, features, dtype=dtype, device="cuda")


def assert_updated(second_moment, total, x, bound):
    """From zeros: the lower triangle and the sums, against float64."""
    rows = x.reshape(-1, x.shape[-1]).double()
    error = (second_moment.double() - rows.T @ rows).abs().tril()
    allowed = (bound + 4 * torch.finfo(second_moment.dtype).eps) * (rows.abs().T @ rows.abs())
    assert error.isfinite().all()
    assert (error <= allowed.tril() + 1e-30).all(), (error / allowed).max()
    assert ((total.double() - rows.sum(0)).abs() <= 2.0**-18 * rows.abs().sum(0)).all()
    assert not second_moment.triu(1).any()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64], ids=["state32", "state64"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, features",
    [(4096, 256), (12608, 768), (5000, 1024), (777, 333), (1, 512), (513, 1), (1, 1), (3000, 72), (40, 3072)],
    ids=str,
)
def test_shapes(tokens, features, dtype, state_dtype):
    x = random(tokens, features, dtype=DTYPES[dtype])
    for deterministic in (True, False):
        second_moment, total = zeros(features, state_dtype)
        covariance_update_(second_moment, total, x, deterministic=deterministic, backend="triton")
        assert_updated(second_moment, total, x, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("padding", [0, 1, 8, 24])
def test_alignments_in_poisoned_memory(dtype, offset, padding):
    tokens, features = 300, 200
    stride = features + padding
    memory = torch.full((offset + tokens * stride + 4096,), float("nan"), dtype=DTYPES[dtype], device="cuda")
    x = memory[offset:].as_strided((tokens, features), (stride, 1)).copy_(random(tokens, features))
    second_moment, total = zeros(features)
    covariance_update_(second_moment, total, x, backend="triton")
    assert_updated(second_moment, total, x, BOUNDS[dtype])


def test_strided_state_in_poisoned_memory():
    memory = torch.full((300, 700), float("nan"), device="cuda")
    second_moment = memory[20:220, 7:407:2].zero_()
    total = torch.full((400,), float("nan"), device="cuda")[::2].zero_()
    x = random(900, 200, dtype=torch.bfloat16)
    covariance_update_(second_moment, total, x, backend="triton")
    assert_updated(second_moment, total, x, BOUNDS["bf16"])
    memory[20:220, 7:407:2] = float("nan")
    assert memory.isnan().all()


def test_nothing_to_do():
    second_moment, total = zeros(64)
    covariance_update_(second_moment, total, random(0, 64), backend="triton")
    covariance_update_(*zeros(0), random(7, 0), backend="triton")
    assert not second_moment.any() and not total.any()


def test_tf32():
    x = random(5000, 320)
    second_moment, total = zeros(320, torch.float64)
    covariance_update_(second_moment, total, x, allow_tf32=True, backend="triton")
    assert_updated(second_moment, total, x, TF32_BOUND)


def test_scratch_may_hold_anything():
    """NaN left by the caching allocator in what becomes scratch must not reach the state."""
    x = random(12608, 192, dtype=torch.bfloat16)
    second_moment, total = zeros(192)
    assert _triton.plan(describe(second_moment, x)).split > 1
    torch.full((64 << 20,), float("nan"), device="cuda")
    covariance_update_(second_moment, total, x, backend="triton")
    assert_updated(second_moment, total, x, BOUNDS["bf16"])


def test_same_bits_on_every_run():
    x = random(12608, 768, dtype=torch.bfloat16)
    first = None
    for _ in range(20):
        second_moment, total = zeros(768)
        covariance_update_(second_moment, total, x, backend="triton")
        first = first or (second_moment, total)
        assert torch.equal(second_moment, first[0]) and torch.equal(total, first[1])


@pytest.mark.parametrize("deterministic", [True, False])
def test_cuda_graph_replays(deterministic):
    replays = 1000
    x = random(2048, 256, dtype=torch.bfloat16)
    second_moment, total = zeros(256, torch.float64)
    covariance_update_(*zeros(256, torch.float64), x, deterministic=deterministic, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        covariance_update_(second_moment, total, x, deterministic=deterministic, backend="triton")
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    assert_updated(second_moment / replays, total / replays, x, BOUNDS["bf16"])


def test_two_streams():
    x = [random(8192, 384, dtype=torch.bfloat16, mean=mean) for mean in (0.0, 2.0)]
    states = [zeros(384) for _ in x]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in x]
    for _ in range(50):
        for stream, (second_moment, total), part in zip(streams, states, x, strict=True):
            with torch.cuda.stream(stream):
                covariance_update_(second_moment, total, part, backend="triton")
    torch.cuda.synchronize()
    for (second_moment, total), part in zip(states, x, strict=True):
        assert_updated(second_moment / 50, total / 50, part, BOUNDS["bf16"])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64], ids=["state32", "state64"])
def test_a_million_tokens_far_from_zero(state_dtype):
    """One float32 chain of so many would lose the digits that the mean does not use; chunks keep them."""
    second_moment, total = zeros(128, state_dtype)
    truth = torch.zeros(128, 128, dtype=torch.float64, device="cuda")
    for part in range(8):
        x = random(1 << 17, 128, dtype=torch.bfloat16, mean=8.0 + part)
        covariance_update_(second_moment, total, x, backend="triton")
        truth += x.double().T @ x.double()
    error = (second_moment.double() - truth).tril().abs() / truth
    assert error.max() <= 1e-5


def test_more_than_two_to_the_31_elements():
    features, tokens = 4096, (1 << 19) + 4096
    if torch.cuda.mem_get_info()[0] < 3 * features * tokens:
        pytest.skip("needs 6.5 GB of free GPU memory for the input alone")
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    x[-300:] = random(300, features)
    for view in (x, x[:, 1:]):  # through TMA where there is one, and through pointers
        second_moment, total = zeros(view.shape[1])
        covariance_update_(second_moment, total, view, backend="triton")
        assert_updated(second_moment, total, view[-300:], BOUNDS["bf16"])


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
    for deterministic in (True, False):
        second_moment, total = zeros(features, torch.float64, groups)
        conv_covariance_update_(second_moment, total, x, deterministic=deterministic, backend="triton", **geometry)
        for group in range(groups):
            assert_updated(second_moment[group], total[group], patches[:, group], BOUNDS[dtype])


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_opcheck(backend):
    x = random(300, 72, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.lowrank_ops.covariance_update_.default, (*zeros(72), x), {"backend": backend})
    image = random(2, 8, 9, 10, dtype=torch.bfloat16)
    arguments = (*zeros(36, groups=2), image, [3, 3], [2, 1], [1, 0], [1, 1])
    torch.library.opcheck(torch.ops.lowrank_ops.conv_covariance_update_.default, arguments, {"backend": backend})


def test_compiled_as_one_node():
    x = random(1000, 128, dtype=torch.bfloat16)
    second_moment, total = zeros(128)
    torch.compile(covariance_update_, fullgraph=True)(second_moment, total, x, backend="triton")
    assert_updated(second_moment, total, x, BOUNDS["bf16"])


def test_agrees_with_the_reference():
    x = random(4000, 200, dtype=torch.bfloat16)
    (mine, my_total), (theirs, their_total) = zeros(200), zeros(200)
    covariance_update_(mine, my_total, x, backend="triton")
    reference.update(theirs, their_total, x)
    torch.testing.assert_close(mine.tril(), theirs.tril(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(my_total, their_total, rtol=1e-4, atol=1e-2)
