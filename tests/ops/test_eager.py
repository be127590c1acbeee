"""When a call may pass the dispatcher by: never where PyTorch would have done something with it."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_ops.ops import lowrank_linear
from lowrank_ops.ops._eager import undisturbed


class Seen(TorchDispatchMode):
    """The names of the ops that the dispatcher saw."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def tensors():
    return torch.randn(3, 16), torch.randn(8, 16), torch.randn(12, 8), torch.randn(12)


def test_plain_tensors_pass_by(tensors):
    assert undisturbed(*tensors)
    assert undisturbed(*tensors[:3], None)
    parameters = [Parameter(tensor) for tensor in tensors[1:]]
    assert not undisturbed(tensors[0], *parameters)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert undisturbed(tensors[0], *parameters)


def test_both_ways_agree_to_the_bit(tensors):
    through = torch.ops.lowrank_ops.lowrank_linear(*tensors)
    assert torch.equal(lowrank_linear(*tensors), through)
    with torch.inference_mode():
        assert lowrank_linear(*tensors).is_inference()


@pytest.mark.parametrize("which", range(4), ids=["x", "down", "up", "bias"])
def test_a_wanted_gradient_goes_through(tensors, which):
    tensors[which].requires_grad_()
    assert not undisturbed(*tensors)
    lowrank_linear(*tensors).sum().backward()
    assert tensors[which].grad is not None


def test_modes_see_the_op(tensors):
    with Seen() as seen:
        lowrank_linear(*tensors)
    assert seen.names == ["lowrank_ops::lowrank_linear"]


def test_function_modes_autocast_transforms_and_traces_go_through(tensors):
    with torch.device("cpu"):  # a function mode
        assert not undisturbed(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert not undisturbed(*tensors)
        assert lowrank_linear(*tensors).dtype is torch.bfloat16
    with forward_ad.dual_level():
        assert not undisturbed(*tensors)
    inside = []
    torch.vmap(lambda x: (inside.append(undisturbed(x, *tensors[1:])), x)[1])(tensors[0])
    torch.jit.trace(lambda x: (inside.append(undisturbed(x, *tensors[1:])), x + 1)[1], tensors[0], check_trace=False)
    assert inside == [False, False]
    assert undisturbed(*tensors)


def test_profiles_name_the_op(tensors):
    with torch.profiler.profile() as profile:
        lowrank_linear(*tensors)
    assert "lowrank_ops::lowrank_linear" in {event.key for event in profile.key_averages()}


def test_unusual_tensors_go_through(tensors):
    class Own(torch.Tensor):
        pass

    x, *rest = tensors
    assert not undisturbed(x.as_subclass(Own), *rest)
    assert not undisturbed(x, rest[0].as_subclass(Own), *rest[1:])
    assert not undisturbed(x.to("meta"), *(tensor.to("meta") for tensor in rest))
    assert not undisturbed(x.to_sparse(), *rest)
    assert not undisturbed(torch.nested.nested_tensor([x]), *rest)
    negative = torch.randn(3, 16, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    assert not undisturbed(negative, *rest)
    expected = negative.clone() @ rest[0].T @ rest[1].T + rest[2]
    assert torch.allclose(lowrank_linear(negative, *rest), expected, atol=1e-5)


def test_export_and_compile_see_the_op(tensors):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return lowrank_linear(x, *tensors[1:])

    program = torch.export.export(Layer(), (tensors[0],))
    assert "lowrank_ops.lowrank_linear" in program.graph_module.code
    graphs = []

    def record(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    with torch.inference_mode():
        torch.compile(Layer(), backend=record, fullgraph=True)(tensors[0])
    assert len(graphs) == 1 and "lowrank_ops.lowrank_linear" in graphs[0]
