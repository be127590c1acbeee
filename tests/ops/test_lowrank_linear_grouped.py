"""``lowrank_linear_grouped`` as an op: reference, autograd, tracing, autocast, messages, choice of implementation."""

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import lowrank_ops as lro
from lowrank_ops.ops import BackendUnavailableError, _triton_device, lowrank_linear, lowrank_linear_grouped
from lowrank_ops.ops import grouped as op
from lowrank_ops.ops._backend import Device, choose
from tests.ops.inputs import assert_grouped, grouped_inputs

OP = torch.ops.lowrank_ops.lowrank_linear_grouped.default
FORMS = {"separate": {}, "shared": {"shared": True}, "one member": {"ranks": (4,), "out_features": (7,)}}


def flat(x, down, ups, biases):
    return [
        x,
        *([down] if isinstance(down, torch.Tensor) else down),
        *ups,
        *(bias for bias in biases if bias is not None),
    ]


def leaves_of(*args):
    for tensor in flat(*args):
        tensor.requires_grad_()
    return args


def one_by_one(x, down, ups, biases):
    downs = [down] * len(ups) if isinstance(down, torch.Tensor) else down
    return [lowrank_linear(x, *member) for member in zip(downs, ups, biases, strict=True)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value(form, dtype):
    args = grouped_inputs(5, dtype=dtype, **form)
    assert_grouped(lowrank_linear_grouped(*args), *args)


@pytest.mark.parametrize("biases", [(True, False, True), (False, False, False)], ids=["some", "none"])
@pytest.mark.parametrize("leading", [(), (2, 3), (0,), (3, 0, 2)], ids=str)
def test_shapes_and_biases(biases, leading):
    args = grouped_inputs(*leading, biases=biases)
    ys = lowrank_linear_grouped(*args)
    assert [tuple(y.shape) for y in ys] == [(*leading, out) for out in (16, 7, 9)]
    torch.testing.assert_close(ys, one_by_one(*args))


def test_stacked_factors_are_split():
    x, downs, ups, biases = grouped_inputs(5)
    ys = lowrank_linear_grouped(x, torch.cat(downs).split([8, 4, 5]), ups, biases)
    torch.testing.assert_close(ys, one_by_one(x, downs, ups, biases))


def test_no_biases_and_empty_factors():
    x, _, ups, _ = grouped_inputs(3, ranks=(0, 0, 0))
    y, *_ = lowrank_linear_grouped(x, torch.empty(0, 24), ups)
    assert not y.any()


@pytest.mark.parametrize("form", [FORMS["separate"], FORMS["shared"]], ids=["separate", "shared"])
def test_gradcheck(form):
    x, down, ups, biases = leaves_of(
        *grouped_inputs(3, in_features=4, ranks=(2, 1), out_features=(3, 2), dtype=torch.float64, **form)
    )
    assert torch.autograd.gradcheck(
        lambda *tensors: lowrank_linear_grouped(x, down, ups, biases), flat(x, down, ups, biases)
    )


@pytest.mark.parametrize("form", [FORMS["separate"], FORMS["shared"]], ids=["separate", "shared"])
@pytest.mark.parametrize("path", ["bypass", "dispatcher"])
def test_gradients_of_some_outputs_and_tensors(form, path):
    """The same as of single layers, where an output is not used and a factor is frozen."""
    args = leaves_of(*grouped_inputs(2, 3, **form))
    args[2][0].requires_grad_(False)
    wanted = [tensor for tensor in flat(*args) if tensor.requires_grad]

    def gradients(function):
        first, _, third = function(*args)
        return torch.autograd.grad(first.sum() + third.square().sum(), wanted, allow_unused=True)

    if path == "dispatcher":
        with BaseTorchFunctionMode():
            ours = gradients(lowrank_linear_grouped)
    else:
        ours = gradients(lowrank_linear_grouped)
    for grad, expected in zip(ours, gradients(one_by_one), strict=True):
        # The dispatcher's gradient of a list gives zeros to the tensors of an output that is not used.
        assert grad is not None or expected is None
        torch.testing.assert_close(grad, torch.zeros_like(grad) if grad is not None and expected is None else expected)


@pytest.mark.parametrize("form", [FORMS["separate"], FORMS["shared"]], ids=["separate", "shared"])
def test_opcheck(form):
    x, down, ups, biases = leaves_of(*grouped_inputs(2, 3, **form))
    torch.library.opcheck(OP, (x, [down] if isinstance(down, torch.Tensor) else down, ups, biases))


def test_compile_and_export_keep_one_node():
    args = grouped_inputs(2, 3, biases=(True, False, True))
    graphs = []

    def members(*args, backend="auto"):
        return [y * 2 for y in lowrank_linear_grouped(*args, backend=backend)]

    class Layer(torch.nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.backend = backend

        def forward(self, *args):
            return members(*args, backend=self.backend)

    assert "lowrank" not in torch.export.export(Layer("auto"), args).graph_module.code
    exported = torch.export.export(Layer("reference"), args)
    compiled = torch.compile(members, fullgraph=True, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1])
    torch.testing.assert_close(exported.module()(*args), members(*args))
    torch.testing.assert_close(compiled(*args), members(*args))
    for graph in (exported.graph, graphs[0].graph):
        assert sum("lowrank_linear_grouped" in str(node.target) for node in graph.nodes) == 1
    decomposed = exported.run_decompositions(lro.ops.decompositions())
    assert "lowrank" not in decomposed.graph_module.code
    torch.testing.assert_close(decomposed.module()(*args), members(*args))


def test_compiled_backward_matches():
    args = leaves_of(*grouped_inputs(4))

    def loss(*args):
        return sum(y.square().sum() for y in lowrank_linear_grouped(*args))

    expected = torch.autograd.grad(loss(*args), flat(*args))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*args), flat(*args)), expected)


def test_autocast_casts_as_linear_does():
    args = leaves_of(*grouped_inputs(4))
    with torch.autocast("cpu", torch.bfloat16):
        ys, expected = lowrank_linear_grouped(*args), one_by_one(*args)
    assert all(y.dtype is torch.bfloat16 for y in ys)
    torch.testing.assert_close(ys, expected, rtol=0, atol=0)
    sum(y.float().sum() for y in ys).backward()
    assert all(tensor.grad.dtype is torch.float32 for tensor in flat(*args))


def test_transforms_and_flops():
    x, downs, ups, biases = grouped_inputs(4)
    mapped = torch.func.vmap(lambda row: lowrank_linear_grouped(row, downs, ups, biases))(x)
    torch.testing.assert_close(mapped, lowrank_linear_grouped(x, downs, ups, biases))
    with FlopCounterMode(display=False) as counter:
        lowrank_linear_grouped(x, downs, ups, biases)
    assert counter.get_total_flops() == 2 * 4 * sum(factor.numel() for factor in (*downs, *ups))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 1}, TypeError, "x must be a tensor; got int."),
        ({"x": torch.randn(3, 23)}, ValueError,
         "down[0] must have shape (rank, 23) to take x with 23 features; got (8, 24)."),
        ({"down": []}, ValueError,
         "down must have as many members as ups, 3, or be one tensor that all share; got a list of 0."),
        ({"down": torch.randn(17, 24)}, ValueError,
         "ups[0] must have shape (out_features, 17), the rank of its down; got (16, 8)."),
        ({"ups": []}, ValueError, "ups must have at least one member; got an empty list."),
        ({"ups": torch.randn(3, 16, 8)}, TypeError, "ups must be a list with one tensor per member; got Tensor."),
        ({"biases": [None]}, ValueError,
         "biases must have as many members as ups, 3, with None for those without; got 1."),
        ({"biases": [None, torch.randn(8), None]}, ValueError,
         "biases[1] must have shape (7,), the rows of ups[1]; got (8,)."),
        ({"biases": [None, torch.randn(7).double(), None]}, ValueError,
         "biases[1] must have the dtype and device of x, torch.float32 on cpu; got torch.float64 on cpu."),
        ({"x": torch.randn(3, 24).to_sparse(), "ups": [torch.ones(())] * 3, "biases": None}, ValueError,
         "ups[0] must have shape (out_features, 8), the rank of its down; got ()."),
        ({"x": torch.randn(3, 24, requires_grad=True), "ups": [torch.ones(())] * 3, "biases": None}, ValueError,
         "ups[0] must have shape (out_features, 8), the rank of its down; got ()."),
        ({"backend": "cudnn"}, ValueError,
         "backend must be one of 'auto', 'unverified', 'reference', 'triton', 'cuda'; got 'cudnn'."),
    ],
)  # fmt: skip
def test_messages(change, error, message):
    call = dict(zip(("x", "down", "ups", "biases"), grouped_inputs(3), strict=True)) | change
    with pytest.raises(error) as raised:
        lowrank_linear_grouped(**call)
    assert str(raised.value) == message


def test_unavailable_backends_and_explain():
    args = grouped_inputs(3, dtype=torch.bfloat16)
    for backend in ("triton", "cuda"):
        with pytest.raises(BackendUnavailableError, match=f"backend='{backend}' cannot run this call"):
            lowrank_linear_grouped(*args, backend=backend)
    lines = lro.ops.explain("lowrank_linear_grouped", *args).splitlines()
    assert [line.split(":")[0] for line in lines] == [row.name for row in op.TABLE]
    assert lines[-1] == "members: runs"


HOPPER = Device("cuda", 0, (9, 0), 132, 232448)


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "triton.decode"),
        ({"tokens": 256}, "triton.decode"),
        ({"tokens": 1000}, "triton.prefill"),
        ({"tokens": 65536}, "members"),  # in tiles of 256 ranks, those of 64 would cost more than by themselves
        ({"tokens": 65536, "ranks": (248, 256, 256), "out_features": (4096,) * 3}, "triton.prefill"),
        ({"tokens": 4096, "ranks": (264, 64, 64)}, "members"),  # prefill keeps ranks up to 256 on chip
        ({"tokens": 4096, "ranks": (64, 64, 64), "shared": True}, "members"),
        ({"ranks": (1024, 512, 512), "out_features": (1024, 512, 512)}, "members"),  # above the break-even rank
        ({"contiguous": False}, "members"),
        ({"aligned": False}, "members"),
        ({"ranks": (256, 64, 63)}, "members"),
        ({"dtype": torch.float32}, "members"),
        ({"ranks": (8,) * 4, "out_features": (64,) * 4, "biases": (True,) * 4}, "members"),
    ],
    ids=str,
)
def test_auto_on_a_gpu(changes, chosen, monkeypatch):
    pytest.importorskip("triton", reason="auto chooses Triton only where it is installed")
    monkeypatch.setattr(_triton_device, "lacks_proxy_fence", lambda *device: None)
    problem = op.Problem(
        1, 4096, (256, 64, 64), (4096, 1024, 1024), False, torch.bfloat16, 4096, True, True, (True, False, True), HOPPER
    )
    assert choose(op.TABLE, problem._replace(**changes), "auto").name == chosen
