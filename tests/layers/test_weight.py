"""A low-rank layer's weight: metadata without a product, values with a gradient, writes refused."""

import copy
import timeit

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import prune

import lowrank_ops as lro


def layers():
    torch.manual_seed(0)
    return [lro.LowRankLinear(20, 12, 5), lro.LowRankConv2d(4, 8, 3, rank=3, groups=2)]


@pytest.fixture(params=[0, 1], ids=["linear", "conv"])
def layer(request):
    return layers()[request.param]


READS = {
    "dtype": lambda w: w.dtype,
    "shape": lambda w: w.shape,
    "device": lambda w: w.device,
    "requires_grad": lambda w: w.requires_grad,
    "size": lambda w: w.size(0),
    "ndim": lambda w: w.ndim,
    "numel": lambda w: w.numel(),
    "torch.numel": torch.numel,
    "len": len,
    "is_cuda": lambda w: w.is_cuda,
    "is_floating_point": lambda w: w.is_floating_point(),
    "data.dtype": lambda w: w.data.dtype,
    "detach.shape": lambda w: w.detach().shape,
    "isinstance": lambda w: isinstance(w, torch.Tensor),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_metadata_is_a_dense_weights_without_a_product(layer, read, monkeypatch):
    dense = layer.to_dense().weight
    monkeypatch.setattr(layer, "product", lambda: pytest.fail("the factors were multiplied"))
    assert read(layer.weight) == read(dense)


def test_reading_the_dtype_takes_microseconds():
    layer = lro.LowRankLinear(2048, 2048, 256)
    read = min(timeit.repeat(lambda: layer.weight.dtype, number=200, repeat=5)) / 200
    product = min(timeit.repeat(layer.product, number=1, repeat=3))
    assert read < product / 50


USES = {
    "add": lambda w: w + 1,
    "reversed": lambda w: 2 - w,
    "transpose": lambda w: w.mT,
    "flatten": lambda w: w.flatten(1) @ w.flatten(1).T,
    "index": lambda w: w[0, 1],
    "norm": lambda w: w.norm(),
    "cat": lambda w: torch.cat([w, w]),
    "svd": lambda w: torch.linalg.svdvals(w.flatten(1)),
    "clone": lambda w: w.clone(),
    "detach": lambda w: w.detach(),
    "double": lambda w: w.double(),
    "copy from": lambda w: torch.zeros(w.shape).copy_(w),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_operations_use_the_product(layer, use, mode):
    with mode():
        assert torch.equal(use(layer.weight), use(layer.product()))


def test_gradients_of_the_weight_reach_the_factors():
    layer, x = layers()[0], torch.randn(7, 20)
    F.linear(x, layer.weight, layer.bias).square().sum().backward()
    found = layer.down.grad, layer.up.grad
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, (layer.down.grad, layer.up.grad))


def test_the_weight_follows_the_factors():
    layer = layers()[0]
    weight, view = layer.weight, layer.weight.data
    with torch.no_grad():
        layer.up.mul_(2)
    assert torch.equal(weight, layer.product()) and torch.equal(view, layer.product())
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert list(layer.state_dict()) == ["down", "up", "bias"]


WRITES = {
    "data.copy_": lambda w: w.data.copy_(torch.zeros(w.shape)),
    "add_": lambda w: w.add_(1),
    "data +=": lambda w: w.data.__iadd__(1),
    "elements": lambda w: w.__setitem__(0, 0.0),
    "a view": lambda w: w.view(-1)[3:].zero_(),
    "detached": lambda w: w.detach().zero_(),
    "unbound": lambda w: w.unbind()[0].zero_(),
    "a cast that copies nothing": lambda w: w.float().zero_(),
    "relu": lambda w: F.relu(w, True),
    "foreach": lambda w: torch._foreach_add_([w], 1),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "requires_grad": lambda w: setattr(w, "requires_grad", False),
    "data": lambda w: setattr(w, "data", torch.zeros(w.shape)),
    "grad": lambda w: setattr(w, "grad", torch.zeros(w.shape)),
    "a parameter of it": nn.Parameter,
    "normal_": nn.init.normal_,
    "zeros_": nn.init.zeros_,
    "orthogonal_": nn.init.orthogonal_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "dirac_": lambda w: nn.init.dirac_(w) if w.ndim == 4 else nn.init.eye_(w),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_writes_are_refused(layer, write, mode):
    before = copy.deepcopy(layer.state_dict())
    with mode(), pytest.raises(RuntimeError, match=r"would be lost: .* Write to layer.up and layer.down, copy"):
        write(layer.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_writing_to_an_output_argument_is_refused(layer):
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"add would be lost: .* Write to layer.up"):
        torch.add(torch.ones(layer.weight.shape), 1, out=layer.weight)


@pytest.mark.parametrize("value", [nn.Parameter(torch.ones(12, 20)), torch.ones(12, 20), None])
def test_assigning_the_weight_is_refused(layer, value):
    with pytest.raises(RuntimeError, match=r"would be lost: .* Write to layer.up and layer.down"):
        layer.weight = value
    assert list(layer.state_dict()) == ["down", "up", "bias"]


def test_pruning_and_tying_the_weight_are_refused(layer):
    with pytest.raises(RuntimeError, match="registering the parameter 'weight_orig' would be lost"):
        prune.l1_unstructured(layer, "weight", 0.5)
    other = nn.Linear(20, 12)
    with pytest.raises(TypeError, match="cannot assign"):
        other.weight = layer.weight
    assert isinstance(other.weight, nn.Parameter) and list(layer.state_dict()) == ["down", "up", "bias"]


def test_an_optimizer_of_the_weight_is_refused(layer):
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        torch.optim.SGD([layer.weight], lr=0.1)
    assert layer.requires_grad_(False).weight.is_leaf


class ReadsDtype(nn.Module):
    """Casts its input as transformers' T5 does."""

    def __init__(self):
        super().__init__()
        self.wo = lro.LowRankLinear(16, 16, 4)

    def forward(self, x):
        if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


def test_export_and_compile_of_a_dtype_read_have_no_product():
    model, x = ReadsDtype(), torch.randn(2, 16).double()
    graph = torch.export.export(model, (x,)).graph
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert calls.count("aten.linear.default") == 2 and not any("mm" in c or "matmul" in c for c in calls)
    graphs = []
    backend = aot_autograd(fw_compiler=lambda graph, _: (graphs.append(graph), make_boxed_func(graph.forward))[1])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert "lowrank_ops.lowrank_linear.default" in calls and not any("mm" in c or "matmul" in c for c in calls)


def test_the_weight_of_parametrized_factors_is_their_product():
    layer = lro.LowRankLinear(8, 6, 4)
    nn.utils.parametrize.register_parametrization(layer, "up", nn.Softsign())
    torch.testing.assert_close(layer.weight, layer.up @ layer.down)


def test_the_weight_works_under_torch_func():
    class UsesWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.wo = layers()[0]

        def forward(self, x):
            return F.linear(x, self.wo.weight)

    model, x = UsesWeight(), torch.randn(2, 20)
    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    model(x).sum().backward()
    torch.testing.assert_close(gradients["wo.up"], model.wo.up.grad)
