"""The covariance ops on a CUDA device, with the CUDA and the Triton kernels."""

import pytest
import torch

from lowrank_ops.ops import _native, conv_covariance_update_, covariance_update_
from lowrank_ops.ops.covariance import _cuda, _triton, describe, reference

from .device import captured, needs_library, on_streams_at_once, random, zeros

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# Error bounds relative to the sum of |x_i x_j|. Tensor cores truncate in their float32 accumulation. With the published
# model of the H100 (16 products per step, 2 extra bits), sums of 2048 float16 squares are off by 0.75 * 2^-16; with the
# A100's 1 extra bit, by 1.5 * 2^-16. covariance_sm90_wide sums 4096: with 1 extra bit, off by 1.5 * 2^-15.
BOUNDS = {"bf16": 2.0**-15, "fp16": 2.0**-14, "fp32": 2.0**-14, "tf32": 2.0**-9}
TOTAL_BOUNDS = {"cuda": 2.0**-17, "triton": 2.0**-18}

CUDA = pytest.param("cuda", marks=needs_library)
BACKENDS = pytest.mark.parametrize("backend", [CUDA, "triton"])
# Every Triton case compiles, so TensorFloat-32 has a single test.
KINDS = pytest.mark.parametrize(
    "backend, dtype",
    [pytest.param("cuda", dtype, marks=needs_library) for dtype in DTYPES]
    + [("triton", dtype) for dtype in ("bf16", "fp16", "fp32")],
)


def update(state, x, backend, dtype="bf16", **options):
    covariance_update_(*state, x, allow_tf32=dtype == "tf32", backend=backend, **options)


def assert_updated(state, x, backend, dtype="bf16", times=1):
    """Compare the lower triangle and the sums of ``times`` updates from zero with float64."""
    second_moment, total = (tensor / times for tensor in state)
    rows = x.reshape(-1, x.shape[-1]).double()
    error = (second_moment.double() - rows.T @ rows).abs().tril()
    allowed = (BOUNDS[dtype] + 4 * torch.finfo(second_moment.dtype).eps) * (rows.abs().T @ rows.abs())
    assert error.isfinite().all()
    assert (error <= allowed.tril() + 1e-30).all(), (error / allowed).max()
    assert ((total.double() - rows.sum(0)).abs() <= TOTAL_BOUNDS[backend] * rows.abs().sum(0)).all()
    assert not second_moment.triu(1).any()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64], ids=["state32", "state64"])
@KINDS
@pytest.mark.parametrize(
    "tokens, features",
    [(4096, 256), (12608, 768), (5000, 1024), (777, 333), (1, 512), (513, 1), (1, 1), (3000, 72), (40, 3072),
     (63, 128), (64, 129), (65, 130)],
    ids=str,
)  # fmt: skip
def test_shapes(tokens, features, backend, dtype, state_dtype):
    x = random(tokens, features, dtype=DTYPES[dtype])
    for deterministic in (True, False):
        state = zeros(features, state_dtype)
        update(state, x, backend, dtype, deterministic=deterministic)
        assert_updated(state, x, backend, dtype)
        update(state, x, backend, dtype, deterministic=deterministic)  # accumulates
        assert_updated(state, x, backend, dtype, times=2)


@KINDS
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("padding", [0, 1, 4, 8, 24])
def test_loads_stay_in_bounds(backend, dtype, offset, padding):
    tokens, features = 300, 196 if backend == "cuda" else 200
    stride = features + padding
    memory = torch.full((offset + tokens * stride + 4096,), float("nan"), dtype=DTYPES[dtype], device="cuda")
    x = memory[offset:].as_strided((tokens, features), (stride, 1)).copy_(random(tokens, features))
    state = zeros(features)
    update(state, x, backend, dtype)
    assert_updated(state, x, backend, dtype)


@KINDS
def test_noncontiguous_inputs_are_copied(backend, dtype):
    kind = DTYPES[dtype]
    transposed = random(3, 200, 300, dtype=kind).transpose(1, 2)
    for x in (random(200, 900, dtype=kind).T, transposed, random(900, 400, dtype=kind)[:, ::2]):
        state = zeros(200)
        update(state, x, backend, dtype)
        assert_updated(state, x, backend, dtype)


@BACKENDS
def test_stores_stay_in_bounds(backend):
    memory = torch.full((300, 700), float("nan"), device="cuda")
    state = memory[20:220, 7:407:2].zero_(), torch.full((400,), float("nan"), device="cuda")[::2].zero_()
    x = random(900, 200, dtype=torch.bfloat16)
    update(state, x, backend)
    assert_updated(state, x, backend)
    memory[20:220, 7:407:2] = float("nan")
    assert memory.isnan().all()


@BACKENDS
def test_empty_inputs(backend):
    state = zeros(64)
    update(state, random(0, 64), backend)
    update(zeros(0), random(7, 0), backend)
    assert not state[0].any() and not state[1].any()


@BACKENDS
def test_tf32(backend):
    x = random(5000, 320)
    state = zeros(320, torch.float64)
    update(state, x, backend, "tf32")
    assert_updated(state, x, backend, "tf32")


@BACKENDS
def test_scratch_needs_no_zeroing(backend):
    """NaN in the memory of the scratch must not reach the state."""
    x = random(12608, 192, dtype=torch.bfloat16)
    state = zeros(192)
    problem = describe(state[0], x)
    if backend == "triton":
        assert _triton.plan(problem).split > 1
    else:
        assert " 0 floats of scratch" not in _cuda.plan(problem)
    torch.full((64 << 20,), float("nan"), device="cuda")
    update(state, x, backend)
    assert_updated(state, x, backend)


@pytest.mark.parametrize(
    "backend, dtype, features",
    [pytest.param("cuda", dtype, wide, marks=needs_library) for dtype in DTYPES for wide in (768, 4096)]
    + [("triton", "bf16", 768)],
)
def test_runs_are_bitwise_equal(backend, dtype, features):
    x = random(8192 if features > 768 else 12608, features, dtype=DTYPES[dtype])
    first = None
    for _ in range(20):
        state = zeros(features)
        update(state, x, backend, dtype)
        first = first or state
        assert torch.equal(state[0], first[0]) and torch.equal(state[1], first[1])


@BACKENDS
@pytest.mark.parametrize("deterministic", [True, False])
def test_graph_replay(backend, deterministic):
    replays = 1000
    x = random(2048, 256, dtype=torch.bfloat16)
    state = zeros(256, torch.float64)
    update(zeros(256, torch.float64), x, backend, deterministic=deterministic)  # compiles
    graph, _ = captured(lambda: update(state, x, backend, deterministic=deterministic))
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    assert_updated(state, x, backend, times=replays)


@BACKENDS
def test_two_streams(backend):
    parts = [random(8192, 384, dtype=torch.bfloat16, mean=mean) for mean in (0.0, 2.0)]
    states = [zeros(384) for _ in parts]
    on_streams_at_once(
        [lambda state=state, x=x: update(state, x, backend) for state, x in zip(states, parts, strict=True)], 50
    )
    for state, x in zip(states, parts, strict=True):
        assert_updated(state, x, backend, times=50)


@BACKENDS
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64], ids=["state32", "state64"])
def test_a_million_tokens_with_a_large_mean(backend, state_dtype):
    """A single float32 accumulation would lose the low bits; chunks keep them."""
    state = zeros(128, state_dtype)
    truth = torch.zeros(128, 128, dtype=torch.float64, device="cuda")
    for part in range(8):
        x = random(1 << 17, 128, dtype=torch.bfloat16, mean=8.0 + part)
        update(state, x, backend)
        truth += x.double().T @ x.double()
    error = (state[0].double() - truth).tril().abs() / truth
    assert error.max() <= 1e-5


@BACKENDS
def test_more_than_2_to_the_31_elements(backend):
    features, tokens = 4096, (1 << 19) + 4096
    if torch.cuda.mem_get_info()[0] < 3 * features * tokens:
        pytest.skip("needs 6.5 GB of free GPU memory for the input alone")
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    x[-300:] = random(300, features)
    for view in (x, x[:, 1:]):  # TMA or cp.async, then pointer loads
        state = zeros(view.shape[1])
        update(state, view, backend)
        assert_updated(state, view[-300:], backend)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@KINDS
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
def test_conv_update_matches_im2col(geometry, groups, backend, dtype, layout):
    x = random(6, 64, 20, 24, dtype=DTYPES[dtype]).contiguous(memory_format=layout)
    features = 64 // groups * geometry["kernel_size"][0] * geometry["kernel_size"][1]
    full = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], **geometry}
    patches = torch.nn.functional.unfold(x.double(), **full).mT.reshape(-1, groups, features)
    for deterministic in (True, False):
        second_moment, total = zeros(features, torch.float64, groups)
        options = {"deterministic": deterministic, "allow_tf32": dtype == "tf32", "backend": backend}
        conv_covariance_update_(second_moment, total, x, **options, **geometry)
        for group in range(groups):
            assert_updated((second_moment[group], total[group]), patches[:, group], backend, dtype)


@pytest.mark.parametrize("backend", ["auto", CUDA, "triton", "reference"])
def test_opcheck(backend):
    x = random(300, 72, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.lowrank_ops.covariance_update_.default, (*zeros(72), x), {"backend": backend})
    image = random(2, 8, 9, 10, dtype=torch.bfloat16)
    arguments = (*zeros(36, groups=2), image, [3, 3], [2, 1], [1, 0], [1, 1])
    torch.library.opcheck(torch.ops.lowrank_ops.conv_covariance_update_.default, arguments, {"backend": backend})


@BACKENDS
def test_torch_compile(backend):
    x = random(1000, 128, dtype=torch.bfloat16)
    state = zeros(128)
    torch.compile(covariance_update_, fullgraph=True)(*state, x, backend=backend)
    assert_updated(state, x, backend)


@BACKENDS
def test_matches_the_reference(backend):
    x = random(4000, 200, dtype=torch.bfloat16)
    (mine, my_total), (theirs, their_total) = zeros(200), zeros(200)
    update((mine, my_total), x, backend)
    reference.update(theirs, their_total, x)
    torch.testing.assert_close(mine.tril(), theirs.tril(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(my_total, their_total, rtol=1e-4, atol=1e-2)


@needs_library
@pytest.mark.parametrize("kernel", ["covariance_sm80", "covariance_sm90", "covariance_sm90_wide"])
@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("features", [200, 3120])  # of covariance_sm90_wide: one tile; and whole waves plus split tiles
@pytest.mark.parametrize("dtype, state_dtype", [("bf16", torch.float32), ("fp16", torch.float64)], ids=str)
def test_cuda_choices(kernel, splits, features, dtype, state_dtype):
    """Choices that a tuned table may make instead of the planner."""
    x, state = random(8192, features, dtype=DTYPES[dtype]), zeros(features, state_dtype)
    problem, choice = describe(state[0], x), _native.Choice(kernel, splits)
    if reason := _cuda.refuse(problem, choice):
        assert "_sm90" in kernel and problem.device.capability != (9, 0), reason
        pytest.skip(reason)
    _cuda.run(problem, *state, x, choice)
    assert_updated(state, x, "cuda", dtype)
    first = [tensor.clone() for tensor in state]
    for _ in range(5):  # bitwise equal
        for tensor in state:
            tensor.zero_()
        _cuda.run(problem, *state, x, choice)
        assert all(map(torch.equal, state, first))


@needs_library
def test_cuda_wide_tiles_with_large_mean_and_strided_state():
    """covariance_sm90_wide accumulates twice as many tokens; rows of this state are not aligned to pairs."""
    x = random(1 << 17, 512, dtype=torch.bfloat16, mean=8.0)
    state = torch.zeros(600, 1100, device="cuda")[5:517, 3:515], torch.zeros(1024, device="cuda")[::2]
    problem, choice = describe(state[0], x), _native.Choice("covariance_sm90_wide", 1)
    if reason := _cuda.refuse(problem, choice):
        pytest.skip(reason)
    _cuda.run(problem, *state, x, choice)
    exact = x.double().T @ x.double()
    assert ((state[0].double() - exact).tril().abs() / exact).max() <= 2e-5
    assert not state[0].triu(1).any()


@needs_library
def test_cuda_refusal_keeps_the_state():
    assert _cuda.supports(describe(zeros(64)[0], random(5, 64).T.contiguous().T)) is not None
    second_moment, total = zeros(64)
    with pytest.raises(RuntimeError, match="does not fit"):
        torch.ops.lowrank_ops._cuda_covariance_update_(second_moment, total, random(5, 65), False)
    assert not second_moment.any()


# A small set for compute-sanitizer, run by from_wheel.sh.


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, features", [(130, 72), (130, 71), (4096, 72)], ids=["aligned", "odd", "split"])
def test_cuda_sanitized(tokens, features, dtype):
    x = random(tokens, features, dtype=DTYPES[dtype])
    state = zeros(features)
    update(state, x, "cuda", dtype)
    assert_updated(state, x, "cuda", dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_sanitized_conv(dtype):
    image = random(2, 8, 9, 10, dtype=DTYPES[dtype])
    second_moment, total = zeros(72, groups=1)
    options = {"allow_tf32": dtype == "tf32", "backend": "cuda"}
    conv_covariance_update_(second_moment, total, image, kernel_size=(3, 3), **options)
    patches = torch.nn.functional.unfold(image.double(), 3).mT.reshape(-1, 72)
    assert_updated((second_moment[0], total[0]), patches, "cuda", dtype)
