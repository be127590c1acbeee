"""``lowrank_linear`` as an op: reference, autograd, tracing, autocast, messages, and the choice of implementation."""

import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_ops.ops import Backend, BackendUnavailableError, _triton_device, lowrank_linear
from lowrank_ops.ops import linear as op
from lowrank_ops.ops._backend import Device, choose
from tests.ops.inputs import ACTIVATIONS, linear_inputs
from tests.tolerance import assert_close_to_float64

HOPPER = Device("cuda", 0, (9, 0), 132, 232448)


def plain(x, down, up, bias, activation="none"):
    y = x @ down.T @ up.T
    y = y if bias is None else y + bias
    return ACTIVATIONS[activation](y)


def problem(tokens=1, in_features=4096, rank=512, out_features=4096, dtype=torch.bfloat16, device=HOPPER, **changes):
    """A problem on a simulated GPU."""
    posed = op.Problem(
        tokens, in_features, rank, out_features, dtype, in_features,
        (in_features, 1), (rank, 1), True, True, "none", device,
    )  # fmt: skip
    return posed._replace(**changes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value(activation, bias, dtype):
    args = linear_inputs(5, dtype=dtype, bias=bias)
    wide = [None if tensor is None else tensor.double() for tensor in args]
    y = lowrank_linear(*args, activation=activation)
    assert_close_to_float64(y, plain(*args, activation), plain(*wide, activation))


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 1, 3), (0,), (3, 0, 2)], ids=str)
def test_any_leading_shape(leading):
    args = linear_inputs(*leading)
    y = lowrank_linear(*args)
    assert y.shape == (*leading, 16)
    torch.testing.assert_close(y, plain(*args))


def test_strided_inputs():
    wide, down, up, bias = linear_inputs(6, in_features=40)
    narrow = down[:, :20]
    for x in (wide[:, ::2], wide[::2, :20], wide[:, 5:25], wide[:, :20].T.contiguous().T, wide[:1, :20].expand(4, 20)):
        for factors in ((narrow, up), (narrow.T.contiguous().T, up.T.contiguous().T), (down[:, ::2], up)):
            torch.testing.assert_close(lowrank_linear(x, *factors, bias), plain(x, *factors, bias))


def test_strided_vector_is_not_a_row():
    x, down, up, bias = linear_inputs(48)
    assert op.describe(x[:24, 0], down, up, bias, "none").x_stride == 0
    assert op.describe(x[0], down, up, bias, "none").x_stride == 24
    torch.testing.assert_close(lowrank_linear(x[:24, 0], down, up, bias), plain(x[:24, 0], down, up, bias))


def test_empty_factors():
    x = torch.randn(3, 4)
    bias = torch.randn(5)
    y = lowrank_linear(x, torch.empty(0, 4), torch.empty(5, 0), bias)
    torch.testing.assert_close(y, bias.expand(3, 5))
    assert lowrank_linear(torch.empty(3, 0), torch.empty(2, 0), torch.randn(5, 2), bias).shape == (3, 5)
    assert lowrank_linear(x, torch.randn(2, 4), torch.empty(0, 2)).shape == (3, 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(activation, bias):
    args = linear_inputs(3, in_features=5, rank=2, out_features=4, dtype=torch.float64, bias=bias)
    args = [tensor if tensor is None else tensor.requires_grad_() for tensor in args]
    assert torch.autograd.gradcheck(lambda *tensors: lowrank_linear(*tensors, activation=activation), args)


def test_gradcheck_of_single_tensors():
    x, down, up, bias = linear_inputs(2, 3, in_features=4, rank=2, out_features=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: lowrank_linear(x, down, up, bias), x.requires_grad_())
    x = x.detach()
    assert torch.autograd.gradcheck(lambda up: lowrank_linear(x, down, up, bias), up.requires_grad_())
    x.requires_grad_()
    lowrank_linear(x, down, up.detach(), bias).sum().backward()
    assert down.grad is None and bias.grad is None
    torch.testing.assert_close(x.grad, (up.detach().sum(0) @ down).expand_as(x))


class PeakCount(TorchDispatchMode):
    """The maximum number of live tensors of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.made, self.count = shape, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.made.append(weakref.ref(result))
        self.count = max(self.count, sum(reference() is not None for reference in self.made))
        return result


def test_backward_frees_t_before_its_gradient():
    """The recomputed t and its gradient are never alive together."""
    args = [tensor.requires_grad_() for tensor in linear_inputs(40, bias=False)[:3]]
    y = lowrank_linear(*args)
    with PeakCount((40, 8)) as between:
        torch.autograd.grad(y.sum(), args)
    assert between.count == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation):
    args = [tensor.requires_grad_() for tensor in linear_inputs(2, 3)]
    torch.library.opcheck(torch.ops.lowrank_ops.lowrank_linear.default, args, {"activation": activation})


def test_opcheck_without_bias_or_rows():
    torch.library.opcheck(torch.ops.lowrank_ops.lowrank_linear.default, linear_inputs(3, bias=False))
    torch.library.opcheck(torch.ops.lowrank_ops.lowrank_linear.default, linear_inputs(0))


@pytest.mark.parametrize("backend", [backend.value for backend in Backend])
def test_compile_and_export_of_a_named_backend_keep_one_node(backend):
    """The implementation is chosen when the op runs. Without a named backend, exports hold torch's own ops."""
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def layer(x, down, up, bias):
        return lowrank_linear(x, down, up, bias, activation="gelu", backend=backend) * 2

    class Layer(torch.nn.Module):
        def forward(self, *args):
            return layer(*args)

    args = linear_inputs(2, 3)
    exported = torch.export.export(Layer(), args)
    nodes = [node for node in exported.graph.nodes if "lowrank_linear" in str(node.target)]
    op = torch.ops.lowrank_ops.lowrank_linear.default
    assert [node.target for node in nodes] == ([] if backend in ("auto", "unverified") else [op])
    compiled = torch.compile(layer, fullgraph=True, backend=keep)
    if backend in ("auto", "unverified", "reference"):
        torch.testing.assert_close(compiled(*args), layer(*args))
        torch.testing.assert_close(exported.module()(*args), layer(*args))
    else:  # neither runs on a CPU; the error is raised when the op runs
        with pytest.raises(BackendUnavailableError, match=f"backend='{backend}' cannot run"):
            compiled(*args)
    calls = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("lowrank_linear" in str(node.target) for node in calls) == 1
    assert not any("linear" in str(node.target) and "lowrank" not in str(node.target) for node in calls)


def test_compiled_backward_matches():
    args = [tensor.requires_grad_() for tensor in linear_inputs(4)]

    def loss(*tensors):
        return lowrank_linear(*tensors, activation="silu").square().sum()

    expected = torch.autograd.grad(loss(*args), args)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(compiled(*args), args), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_casts_as_linear_does():
    args = [tensor.requires_grad_() for tensor in linear_inputs(4)]
    with torch.autocast("cpu", torch.bfloat16):
        y = lowrank_linear(*args)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, lowrank_linear(*[tensor.bfloat16() for tensor in args]))
    y.float().sum().backward()
    assert all(tensor.grad.dtype is torch.float32 for tensor in args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x must have shape (..., in_features); got a scalar."),
        (
            {"x": torch.randn(3, 23)},
            "down must have shape (rank, 23) to take x with 23 features; got (8, 24).",
        ),
        ({"down": torch.randn(24)}, "down must have shape (rank, 24) to take x with 24 features; got (24,)."),
        ({"up": torch.randn(16, 7)}, "up must have shape (out_features, 8), the rank of down; got (16, 7)."),
        ({"up": torch.randn(16, 8, 1)}, "up must have shape (out_features, 8), the rank of down; got (16, 8, 1)."),
        ({"bias": torch.randn(15)}, "bias must have shape (16,), the rows of up; got (15,)."),
        ({"bias": torch.randn(16, 1)}, "bias must have shape (16,), the rows of up; got (16, 1)."),
        (
            {"up": torch.randn(16, 8).double()},
            "up must have the dtype and device of x, torch.float32 on cpu; got torch.float64 on cpu.",
        ),
        (
            {"bias": torch.randn(16, device="meta")},
            "bias must have the dtype and device of x, torch.float32 on cpu; got torch.float32 on meta.",
        ),
        (
            {"activation": "tanh"},
            "activation must be one of none, relu, gelu, gelu_tanh, silu; got 'tanh'.",
        ),
        (
            {"backend": "cudnn"},
            "backend must be one of 'auto', 'unverified', 'reference', 'triton', 'cuda'; got 'cudnn'.",
        ),
    ],
)
def test_messages(change, message):
    call = dict(zip(("x", "down", "up", "bias"), linear_inputs(3), strict=True)) | change
    with pytest.raises(ValueError) as raised:
        lowrank_linear(**call)
    assert str(raised.value) == message


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor; got torch\.int64"):
        lowrank_linear(*[tensor.long() for tensor in linear_inputs(3)])


def test_unavailable_backend_says_why():
    with pytest.raises(BackendUnavailableError) as raised:
        lowrank_linear(*linear_inputs(3, dtype=torch.bfloat16), backend="triton")
    message = str(raised.value)
    assert "backend='triton' cannot run this call" in message
    assert "triton.decode: " in message and "triton.prefill: " in message and "backend='auto'" in message
    assert "triton is not installed" in message or "this tensor is on cpu" in message


def test_explain_names_every_implementation():
    text = op.explain(*linear_inputs(3))
    assert [line.split(":")[0] for line in text.splitlines()] == [row.name for row in op.TABLE]
    assert "two_products: runs" in text
    assert "dense: runs" in op.explain(*linear_inputs(4096, in_features=8, rank=8, out_features=8))
    assert "two_products: runs" not in op.explain(*linear_inputs(3), backend="triton")


@pytest.fixture
def with_triton(monkeypatch):
    """Choices are those of Triton 3.7 and newer, whichever is installed."""
    pytest.importorskip("triton", reason="auto chooses Triton only where it is installed")
    monkeypatch.setattr(_triton_device, "lacks_proxy_fence", lambda *device: None)


@pytest.mark.parametrize(
    ("version", "capability", "lacks"),
    [("3.6.0", (9, 0), True), ("3.6.1", (10, 0), True), ("3.6.0", (8, 9), False), ("3.7.0", (9, 0), False),
     ("3.10.1", (9, 0), False), ("4.0.0", (10, 0), False)],
)  # fmt: skip
def test_a_triton_without_the_fence_is_refused(monkeypatch, version, capability, lacks):
    triton = pytest.importorskip("triton", reason="its version is asked")
    monkeypatch.setattr(triton, "__version__", version)
    reason = _triton_device.lacks_proxy_fence.__wrapped__("cuda", capability)
    assert (
        reason == f"needs Triton 3.7 or newer on this device, for a missing memory fence; this is {version}"
    ) is lacks
    assert (reason is None) is not lacks


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "triton.decode"),
        ({"tokens": 256}, "triton.decode"),
        ({"tokens": 257}, "two_products"),  # prefill keeps ranks up to 256 on chip
        ({"tokens": 4096, "rank": 256}, "triton.prefill"),
        ({"tokens": 4096, "rank": 264}, "two_products"),
        ({"rank": 2048}, "two_products"),  # the break-even rank
        ({"tokens": 65536, "rank": 3072}, "dense"),
        ({"dtype": torch.float32}, "two_products"),
        ({"aligned": False}, "two_products"),
        ({"x_stride": 0}, "two_products"),
        ({"in_features": 4097}, "two_products"),
        ({"device": HOPPER._replace(capability=(7, 5))}, "two_products"),
        ({"device": HOPPER._replace(shared_memory=16384)}, "two_products"),
        ({"tokens": 0}, "triton.decode"),
    ],
    ids=str,
)
def test_auto_on_a_gpu(changes, chosen):
    posed = problem()._replace(**changes)
    assert choose(op.TABLE, posed, "auto").name == chosen


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_configurations_fit_shared_memory(capability):
    shared = {(8, 0): 166912, (8, 6): 101376, (12, 0): 101376}.get(capability, 232448)
    device = Device("cuda", 0, capability, 100, shared)
    for tokens in (1, 16, 17, 64, 65, 256):
        for rank in (8, 136, 512, 1496):
            config = op._triton.decode_config(problem(tokens, rank=rank, device=device))
            assert tokens <= 16 * config.block_m and config.block_m <= max(16, 4 * tokens)
            assert not config.fold or config.slices > 1
            reason = op._triton.supports_decode(problem(tokens, rank=rank, device=device), config)
            assert reason is None or ("shared memory" in reason and shared < 166912)
    for tokens in (300, 2048, 12608):
        for rank in (8, 64, 72, 136, 168, 216, 256):
            posed = problem(tokens, rank=rank, device=device)
            config = op._triton.prefill_config(posed)
            assert config.rank >= rank
            assert op._triton.supports_prefill(posed, config) is None


@pytest.mark.usefixtures("with_triton")
def test_few_token_tiles_split_out_features():
    few, many = (op._triton.prefill_config(problem(tokens, rank=136)) for tokens in (512, 65536))
    assert few.parts * (512 // few.block_m) >= 64
    assert many.parts == 1 and many.block_m == 128


@pytest.mark.usefixtures("with_triton")
def test_tuned_table_overrules_heuristics(monkeypatch):
    config = op._triton_config
    entry = {"shape": {"tokens": 4096, "rank": 128}, "impl": "two_products", "config": {}}
    monkeypatch.setattr(config._tuning, "load", lambda name, arch: (entry,))
    posed = problem(4093, rank=128)
    assert not op._triton.prefers_prefill(posed) and not op._triton.prefers_decode(posed)
    tiles = {"block_m": 64, "block_n": 64, "block_k": 32, "piece_0": 128, "piece_1": 0}
    tiles |= {"warps": 4, "stages_k": 2, "stages_n": 2}
    entry.update(impl="triton.prefill", config=tiles)
    config.prefill_config.cache_clear()
    assert op._triton.prefers_prefill(posed) and not op._triton.prefers_decode(posed)
    assert config.prefill_config(posed) == config.PrefillConfig(**tiles)
    assert config.PrefillConfig(**tiles) in config.shipped_prefill("sm90")
    config.prefill_config.cache_clear()


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch; from lowrank_ops.ops import lowrank_linear\n"
        "args = torch.ones(2, 4), torch.ones(1, 4), torch.ones(3, 1)\n"
        "assert lowrank_linear(*args).eq(4).all()\n"
        "try: lowrank_linear(*args, backend='triton')\n"
        "except RuntimeError as error: assert 'triton is not installed: pip install triton' in str(error), error\n"
        "else: raise AssertionError('ran without triton')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.usefixtures("with_triton")
def test_later_launches_call_the_compiled_kernel():
    """With the arguments of Triton's own launch, which runs once. Unaligned problems go through it each time."""
    launches, direct = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: direct.append((grid, args))

    class Kernel:
        def __getitem__(self, grid):
            def launch(*args, **options):
                launches.append((grid, args, options))
                return Compiled()

            return launch

    sizes, constants = (3, 5), (8, True)
    launch = op._triton._Launch(Kernel(), (2, 1, 1), sizes, constants, True, num_warps=4)
    for _ in range(3):
        launch("x", "y")
    assert launches == [((2, 1, 1), ("x", "y", 3, 5, 8, True), {"num_warps": 4})]
    assert direct == [((2, 1, 1), ("x", "y", 3, 5, 8, True))] * 2
    unaligned = op._triton._Launch(Kernel(), (2, 1, 1), sizes, constants, False, num_warps=4)
    unaligned("x", "y")
    unaligned("x", "y")
    assert len(launches) == 3
