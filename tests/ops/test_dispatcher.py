"""Eager calls bypass the dispatcher where it would do nothing else; cached decisions fit every call they serve."""

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_ops as lro
from lowrank_ops.ops import Backend, lowrank_linear
from lowrank_ops.ops import linear as op
from lowrank_ops.ops._backend import Impl
from lowrank_ops.ops._dispatcher import BoundedCache, can_bypass, needs_grad
from tests.ops.inputs import linear_inputs


class OpNames(TorchDispatchMode):
    """Records the names of the ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def tensors():
    return linear_inputs(3, in_features=16, rank=8, out_features=12)


def test_plain_tensors_bypass_the_dispatcher(tensors):
    assert can_bypass(*tensors)
    assert can_bypass(*tensors[:3], None)
    parameters = [Parameter(tensor) for tensor in tensors[1:]]
    assert needs_grad(tensors[0], *parameters)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert can_bypass(tensors[0], *parameters) and not needs_grad(tensors[0], *parameters)


def test_bypass_and_dispatcher_agree_bitwise(tensors):
    dispatched = torch.ops.lowrank_ops.lowrank_linear(*tensors)
    assert torch.equal(lowrank_linear(*tensors), dispatched)
    with torch.inference_mode():
        assert lowrank_linear(*tensors).is_inference()


@pytest.mark.parametrize("which", range(4), ids=["x", "down", "up", "bias"])
def test_gradients_are_recorded(tensors, which):
    assert not needs_grad(*tensors)
    tensors[which].requires_grad_()
    assert needs_grad(*tensors)
    lowrank_linear(*tensors).sum().backward()
    assert tensors[which].grad is not None


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=str)
def test_bypass_and_dispatcher_record_the_same(activation, leading):
    """The same gradients, and the same saved tensors: checkpointing counts them, and profiling disables the bypass."""
    tensors = [torch.randn(size, requires_grad=True) for size in ((*leading, 16), (8, 16), (12, 8), (12,))]
    saved, gradients = [], []
    for function in (lowrank_linear, torch.ops.lowrank_ops.lowrank_linear):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.shape), x)[1], lambda x: x):
            y = function(*tensors, activation=activation)
        gradients.append(torch.autograd.grad(y.square().sum(), tensors))
    assert saved == 2 * [tensor.shape for tensor in tensors]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_dispatch_modes_see_the_op(tensors):
    with OpNames() as seen:
        lowrank_linear(*tensors)
    assert seen.names == ["lowrank_ops::lowrank_linear"]


def test_modes_transforms_and_traces_are_dispatched(tensors):
    with torch.device("cpu"):  # a function mode
        assert not can_bypass(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_bypass(*tensors)
        assert lowrank_linear(*tensors).dtype is torch.bfloat16
    with forward_ad.dual_level():
        assert not can_bypass(*tensors)
    inside = []
    torch.vmap(lambda x: (inside.append(can_bypass(x, *tensors[1:])), x)[1])(tensors[0])
    torch.jit.trace(lambda x: (inside.append(can_bypass(x, *tensors[1:])), x + 1)[1], tensors[0], check_trace=False)
    assert inside == [False, False]
    assert can_bypass(*tensors)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_transforms_and_forward_mode_match_two_linears(tensors, activation):
    x, down, up, bias = tensors
    tangent = torch.randn_like(x)

    def ours(x):
        return lowrank_linear(x, down, up, bias, activation=activation)

    def by_hand(x):
        y = torch.nn.functional.linear(torch.nn.functional.linear(x, down), up, bias)
        return torch.nn.functional.gelu(y) if activation == "gelu" else y

    torch.testing.assert_close(torch.vmap(ours)(x[None]), torch.vmap(by_hand)(x[None]))
    for mine, theirs in zip(
        torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(by_hand, (x,), (tangent,)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(
        torch.func.grad(lambda x: ours(x).sum())(x), torch.func.grad(lambda x: by_hand(x).sum())(x)
    )
    with forward_ad.dual_level():  # a dropped tangent would be a silently wrong derivative
        mine, theirs = (forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))) for f in (ours, by_hand))
        torch.testing.assert_close(mine.tangent, theirs.tangent)


@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("through", [False, True], ids=["eager", "dispatcher"])
def test_output_can_be_modified_in_place(leading, through):
    """An in-place ReLU does this; autograd forbids it on a view that a Function returns."""
    function = torch.ops.lowrank_ops.lowrank_linear if through else lowrank_linear
    x, down, up = (torch.randn(size, requires_grad=True) for size in ((*leading, 16), (8, 16), (12, 8)))
    torch.relu_(function(x, down, up)).sum().backward()
    expected = torch.autograd.grad(torch.relu(function(x, down, up)).sum(), (x, down, up))
    assert all(torch.equal(tensor.grad, other) for tensor, other in zip((x, down, up), expected, strict=True))


def test_fx_traces_a_layer(tensors):
    layer = lro.LowRankLinear(16, 12, 8)
    traced = torch.fx.symbolic_trace(layer)
    assert torch.equal(traced(tensors[0]), layer(tensors[0]))


def test_sparse_input_matches_dense(tensors):
    x = torch.zeros(3, 16).index_fill_(1, torch.tensor([2, 5]), 1.0)
    torch.testing.assert_close(lowrank_linear(x.to_sparse(), *tensors[1:]), lowrank_linear(x, *tensors[1:]))


def test_gradients_of_empty_inputs():
    for rows, features in ((2, 0), (0, 16)):
        x, down = torch.randn(3, rows, features, requires_grad=True), torch.randn(8, features, requires_grad=True)
        up = torch.randn(12, 8, requires_grad=True)
        lowrank_linear(x, down, up).sum().backward()
        assert x.grad.shape == x.shape and down.grad.shape == down.shape and not up.grad.any()


def test_profiler_names_the_op(tensors):
    with torch.profiler.profile() as profile:
        lowrank_linear(*tensors)
    assert "lowrank_ops::lowrank_linear" in {event.key for event in profile.key_averages()}


def test_unusual_tensors_are_dispatched(tensors):
    class Subclass(torch.Tensor):
        pass

    x, *rest = tensors
    assert not can_bypass(x.as_subclass(Subclass), *rest)
    assert not can_bypass(x, rest[0].as_subclass(Subclass), *rest[1:])
    assert not can_bypass(x.to("meta"), *(tensor.to("meta") for tensor in rest))
    assert not can_bypass(x.to_sparse(), *rest)
    assert not can_bypass(torch.nested.nested_tensor([x]), *rest)
    negative = torch.randn(3, 16, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    assert not can_bypass(negative, *rest)
    expected = negative.clone() @ rest[0].T @ rest[1].T + rest[2]
    assert torch.allclose(lowrank_linear(negative, *rest), expected, atol=1e-5)


def test_compile_sees_the_op_and_export_two_products(tensors):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return lowrank_linear(x, *tensors[1:])

    program = torch.export.export(Layer(), (tensors[0],))
    assert "lowrank_ops" not in program.graph_module.code
    graphs = []

    def record(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    with torch.inference_mode():
        torch.compile(Layer(), backend=record, fullgraph=True)(tensors[0])
    assert len(graphs) == 1 and "lowrank_ops.lowrank_linear" in graphs[0]


@pytest.mark.parametrize("which", range(4), ids=["x", "down", "up", "bias"])
def test_wrapper_of_an_ended_transform_is_unwrapped(tensors, which):
    kept = []
    torch.func.grad(lambda tensor: (kept.append(tensor), tensor.sum())[1])(tensors[which])
    given = [tensor.requires_grad_() for tensor in tensors]
    expected = lowrank_linear(*given)
    given[which] = kept[0]
    assert torch._C._functorch.is_functorch_wrapped_tensor(kept[0])
    y = lowrank_linear(*given)
    assert torch.equal(y, expected) and not torch._C._functorch.is_functorch_wrapped_tensor(y)
    others = [tensor for at, tensor in enumerate(given) if at != which]
    ours, theirs = (torch.autograd.grad(result.sum(), others) for result in (y, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- cached decisions -------------------------------------------------------------------------------------------


def plain(x, down, up, bias=None):
    y = x @ down.T @ up.T
    return y if bias is None else y + bias


def test_every_difference_between_calls_is_honored(tensors):
    """Calls that differ in shape, strides, dtype, bias, activation or gradient, in both orders."""
    x, down, up, bias = tensors
    calls = {
        "original": (x, down, up, bias),
        "fewer rows": (x[:2], down, up, bias),
        "more dimensions": (x[None], down, up, bias),
        "vector": (x[0], down, up, bias),
        "other strides of x": (x.T.contiguous().T, down, up, bias),
        "other strides of factors": (x, down.T.contiguous().T, up.T.contiguous().T, bias),
        "float64": tuple(tensor.double() for tensor in tensors),
        "no bias": (x, down, up, None),
        "lower rank": (x, down[:4], up[:, :4], bias),
        "fewer outputs": (x, down, up[:5], bias[:5]),
        "a parameter": (x, Parameter(down), up, bias),
    }
    for name in [*calls, *reversed(calls)]:
        y = lowrank_linear(*calls[name])
        assert torch.allclose(y, plain(*calls[name]), atol=1e-5) and y.dtype is calls[name][0].dtype, name
        assert y.requires_grad == (name == "a parameter"), name
        activated = lowrank_linear(*calls[name], activation="relu")
        assert torch.allclose(activated, plain(*calls[name]).relu(), atol=1e-5), name


def test_invalid_call_after_a_valid_one_is_refused(tensors):
    x, down, up, bias = tensors
    lowrank_linear(*tensors)
    lowrank_linear(*(tensor.double() for tensor in tensors))
    for name, bad in {
        "down": (x, down.double(), up, bias),
        "up": (x, down, up.to("meta"), bias),
        "bias": (x, down, up, bias.half()),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must have the dtype and device of x"):
            lowrank_linear(*bad)
    for bad in ((x, down.to("meta"), up.to("meta"), bias.to("meta")), (x, down, up, bias.to("meta"))):
        with pytest.raises(ValueError, match="must have the dtype and device of x"):
            lowrank_linear(*bad)
    for _ in range(2):  # a refusal is not cached
        with pytest.raises(ValueError, match="activation must be one of"):
            lowrank_linear(*tensors, activation="tanh")
        with pytest.raises(ValueError, match="backend must be one of"):
            lowrank_linear(*tensors, backend="cudnn")
        with pytest.raises(ValueError, match="x must be a floating-point tensor"):
            lowrank_linear(*(tensor.long() for tensor in tensors))


def test_requires_grad_may_change_between_calls(tensors):
    x, down, *_ = tensors
    assert not lowrank_linear(*tensors).requires_grad
    down.requires_grad_()
    assert lowrank_linear(*tensors).requires_grad
    with torch.no_grad():
        assert not lowrank_linear(*tensors).requires_grad
    x.requires_grad_()
    lowrank_linear(*tensors).sum().backward()
    assert x.grad is not None and down.grad is not None
    down.requires_grad_(False), x.requires_grad_(False)
    assert not lowrank_linear(*tensors).requires_grad


def test_cache_is_bounded(tensors, monkeypatch):
    decisions = BoundedCache(3)
    for key in range(10):
        decisions[key] = str
    assert list(decisions) == [7, 8, 9]
    monkeypatch.setattr(op, "_decisions", BoundedCache(5))
    for rows in range(1, 20):
        lowrank_linear(torch.randn(rows, 16), *tensors[1:])
        assert len(op._decisions) == min(rows, 5)


class Recorder:
    """A CPU implementation with the requirements of a kernel, which counts its calls and keeps the bound problems."""

    def __init__(self) -> None:
        self.bound, self.calls = [], 0

    def supports(self, problem):
        if problem.device.type != "cpu" or not problem.aligned or problem.x_stride != problem.in_features:
            return "takes aligned contiguous rows"
        return None

    def bind(self, problem):
        self.bound.append(problem)

        def run(x, down, up, bias):
            assert not any(tensor.is_neg() for tensor in (x, down, up, bias) if tensor is not None)
            self.calls += 1
            return plain(x, down, up, bias)

        return run

    def run(self, problem, x, down, up, bias, activation):
        return self.bind(problem)(x, down, up, bias)


@pytest.fixture
def kernel(monkeypatch):
    recorder = Recorder()
    table = (
        Impl("kernel", Backend.TRITON, recorder.supports, recorder.run, bind=recorder.bind),
        Impl("unbound kernel", Backend.CUDA, recorder.supports, recorder.run),
        *(impl for impl in op.TABLE if impl.backend is Backend.REFERENCE),
    )
    monkeypatch.setattr(op, "TABLE", table)
    monkeypatch.setattr(op, "_decisions", BoundedCache(64))
    return recorder


def test_kernels_are_bound_once_per_layout(tensors, kernel):
    x, down, up, bias = tensors
    for _ in range(3):
        assert torch.allclose(lowrank_linear(*tensors), plain(*tensors), atol=1e-5)
    assert len(kernel.bound) == 1 and kernel.calls == 3
    # The same shapes: unaligned, then with padded rows, then unaligned again.
    unaligned = torch.cat([torch.zeros(1), x.flatten()])[1:].view(3, 16)
    padded = torch.cat([x, x], 1)[:, :16]
    for other in (unaligned, padded, unaligned):
        assert torch.allclose(lowrank_linear(other, down, up, bias), plain(*tensors), atol=1e-5)
    assert len(kernel.bound) == 1 and kernel.calls == 3  # it supports neither
    assert torch.allclose(lowrank_linear(*tensors), plain(*tensors), atol=1e-5) and kernel.calls == 4
    transposed = down.T.contiguous().T
    assert torch.allclose(lowrank_linear(x, transposed, up, bias), plain(*tensors), atol=1e-5)
    assert [problem.down_strides for problem in kernel.bound] == [(16, 1), (1, 8)]
    lowrank_linear(*tensors, backend="reference")
    assert kernel.calls == 5


def test_kernel_without_bind_runs(tensors, kernel):
    for _ in range(2):
        assert torch.allclose(lowrank_linear(*tensors, backend="cuda"), plain(*tensors), atol=1e-5)
    assert kernel.calls == 2
    padded = torch.cat([tensors[0]] * 2, 1)[:, :16]
    for _ in range(2):
        with pytest.raises(lro.ops.BackendUnavailableError, match="takes aligned contiguous rows"):
            lowrank_linear(padded, *tensors[1:], backend="cuda")


def test_kernels_run_in_autograd_and_dispatcher(tensors, kernel):
    leaves = [tensor.requires_grad_() for tensor in tensors]
    gradients = torch.autograd.grad(lowrank_linear(*leaves).square().sum(), leaves)
    expected = torch.autograd.grad(plain(*leaves).square().sum(), leaves)
    assert kernel.calls == 1  # forward; the backward of all runs as library GEMMs
    assert all(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(gradients, expected, strict=True))
    x, *factors = leaves
    (alone,) = torch.autograd.grad(lowrank_linear(x, *(part.detach() for part in factors)).square().sum(), x)
    assert kernel.calls == 3  # forward, and the gradient of x with transposed factors
    assert torch.allclose(alone, expected[0], atol=1e-3)
    with torch.no_grad():
        torch.ops.lowrank_ops.lowrank_linear(*tensors)
    assert kernel.calls == 4 and len(kernel.bound) == 2


@pytest.mark.parametrize("which", range(4), ids=["x", "down", "up", "bias"])
def test_kernels_get_resolved_negative_tensors(tensors, kernel, which):
    lowrank_linear(*tensors)
    signed = list(tensors)
    signed[which] = torch._neg_view(tensors[which])
    assert signed[which].is_neg()
    expected = plain(*(tensor.clone() for tensor in signed))
    assert torch.allclose(lowrank_linear(*signed), expected, atol=1e-5)
    assert kernel.calls == 2


# --- layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_layer_uses_its_current_parameters(bias):
    layer = lro.LowRankLinear(16, 12, 8, bias=bias)
    x = torch.randn(3, 16)

    def check(x=x):
        y = layer(x)
        assert torch.allclose(y, plain(x, layer.down, layer.up, layer.bias), atol=1e-5) and y.dtype is x.dtype

    check()
    layer.down = Parameter(torch.randn(8, 16))
    check()
    layer.up.data = torch.randn(8, 12).T
    check()
    with torch.no_grad():
        layer.down.mul_(2)
    check()
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
    check()
    layer.double()
    check(x.double())
    with pytest.raises(ValueError, match="down must have the dtype and device of x"):
        layer(x)
    layer.float()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    swapped = {name: torch.randn_like(value) for name, value in layer.named_parameters()}
    y = torch.func.functional_call(layer, swapped, (x,))
    assert torch.allclose(y, plain(x, swapped["down"], swapped["up"], swapped.get("bias")), atol=1e-5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    torch.nn.utils.parametrize.register_parametrization(layer, "down", torch.nn.Tanh())
    check()
    assert torch.allclose(layer.down, layer.parametrizations.down.original.tanh())


def test_layer_without_bias_matches_linear():
    layer, linear = lro.LowRankLinear(16, 12, 8, bias=False), torch.nn.Linear(16, 12, bias=False)
    assert layer.bias is None and set(layer.state_dict()) == {"down", "up"}
    assert ("bias" in layer._parameters) == ("bias" in linear._parameters)
    del layer._parameters["bias"]  # as in older pickles
    layer.__dict__["bias"] = None
    x = torch.randn(3, 16)
    assert torch.allclose(layer(x), plain(x, layer.down, layer.up), atol=1e-5)
