"""``lowrank_experts``: every way to compute it, autograd, tracing, autocast, FLOPs and messages."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_ops as lro
from lowrank_ops.ops import experts as op
from lowrank_ops.ops import explain, lowrank_experts
from lowrank_ops.ops._backend import Device, choose
from lowrank_ops.ops.experts import reference

ENDS = (3, 3, 7, 9)  # the second expert has no rows, and the last two of 11 rows have no expert
HOPPER = Device("cuda", 0, (9, 0), 132, 232448)


def inputs(dtype=torch.float32, whole=True, ends=ENDS):
    """x, ends, downs, ups, biases of four experts with different ranks; the third has its weight whole."""
    downs = [torch.randn(rank, 16, dtype=dtype) for rank in (8, 3, 5, 13)]
    ups = [torch.randn(24, len(down), dtype=dtype) for down in downs]
    biases = [torch.randn(24, dtype=dtype), None, None, torch.randn(24, dtype=dtype)]
    if whole:
        downs[2], ups[2] = torch.randn(24, 16, dtype=dtype), None
    return torch.randn(11, 16, dtype=dtype), torch.tensor(ends), downs, ups, biases


def plain(x, ends, downs, ups, biases):
    y, start = torch.zeros(len(x), 24, dtype=x.dtype), 0
    for end, down, up, bias in zip(ends.tolist(), downs, ups, biases, strict=True):
        y[start:end] = x[start:end] @ (down if up is None else up @ down).T + (0 if bias is None else bias)
        start = end
    return y


def filled(x, ends, downs, ups, biases):
    """As the op takes them: empty tensors where something is missing."""
    none = x.new_empty(0)
    return x, ends, downs, *([none if part is None else part for part in parts] for parts in (ups, biases))


@pytest.mark.parametrize("ends", [ENDS, (0, 0, 0, 0), (11, 11, 11, 11), (1, 2, 10, 11)], ids=str)
def test_value(ends):
    args = inputs(torch.float64, ends=ends)
    expected = plain(*args)
    torch.testing.assert_close(lowrank_experts(*args), expected)
    torch.testing.assert_close(reference.masked(*filled(*args)), expected)
    empty = args[0][:0], torch.zeros_like(args[1]), *args[2:]
    assert lowrank_experts(*empty).shape == reference.masked(*filled(*empty)).shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ends", [ENDS, (1, 2, 10, 11)], ids=str)
def test_grouped_products_compute_the_same(dtype, ends):  # on a CPU, where grouped_mm has a fallback
    args = filled(*inputs(dtype, whole=False, ends=ends))
    y, expected = reference.grouped(*args), plain(*inputs_in_double(args))
    # The bias is rounded separately.
    bound = 3 * (reference.by_expert(args[0], list(ends), *args[2:]).double() - expected).abs().max() + 1e-6
    assert (y.double() - expected).abs().max() <= bound
    assert not y[ends[-1] :].any()


def inputs_in_double(args):
    x, ends, *parts = args
    return x.double(), ends, *([part.double() if part.numel() else None for part in lists] for lists in parts)


def test_gradients_and_opcheck():
    x, ends, *parts = filled(*inputs(torch.float64))
    tensors = [x, *parts[0], *parts[1], *parts[2]]
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor.numel()]

    def run(*leaves):
        found = iter(leaves)
        x, *parts = [next(found) if tensor.numel() else tensor for tensor in tensors]
        return lowrank_experts(x, ends, parts[:4], parts[4:8], parts[8:])

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    parts[0][0].requires_grad_(False)
    parts[1][3].requires_grad_(False)
    torch.library.opcheck(torch.ops.lowrank_ops.lowrank_experts.default, (x, ends, *parts))
    expected = torch.autograd.grad(plain(*inputs_in_double((x, ends, *parts))).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(lowrank_experts(x, ends, *parts).sum(), x), expected)


class Module(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args

    def forward(self, x, ends):
        return lowrank_experts(x, ends, *self.args)


def test_compiled_calls_are_one_op_and_exported_ones_are_torch_ops():
    x, ends, *parts = inputs()
    module, expected = Module(parts), plain(x, ends, *parts)
    graphs = []
    compiled = torch.compile(module, fullgraph=True, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1])
    torch.testing.assert_close(compiled(x, ends), expected)
    assert sum("lowrank_experts" in str(node.target) for node in graphs[0].graph.nodes) == 1
    exported = torch.export.export(module, (x, ends), dynamic_shapes=({0: torch.export.Dim("rows", min=2)}, None))
    assert not any("lowrank" in str(node.target) for node in exported.graph.nodes)
    for run in (exported.module(), torch.jit.trace(module, (x, ends))):
        torch.testing.assert_close(run(x, ends), expected)
    others = torch.tensor([1, 2, 10, 11])
    torch.testing.assert_close(exported.module()(x, others), plain(x, others, *parts))


def test_autocast_casts_the_lists():
    args = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lowrank_experts(*args).dtype == torch.bfloat16


def test_transforms_run_torch_ops():
    x, ends, *parts = inputs()
    grad = torch.func.grad(lambda x: lowrank_experts(x, ends, *parts).sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(grad, *torch.autograd.grad(plain(x, ends, *parts).sum(), x))


def test_flops_are_those_of_the_rows_of_each_expert():
    args = inputs()
    sizes = [down.numel() + (0 if up is None else up.numel()) for down, up in zip(args[2], args[3], strict=True)]
    forward = 2 * sum(rows * size for rows, size in zip((3, 0, 4, 2), sizes, strict=True))
    with FlopCounterMode(display=False) as counter:
        lowrank_experts(*args)
    assert counter.get_total_flops() == forward
    args[0].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        lowrank_experts(*args).sum().backward()
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a: a.__setitem__(0, torch.randn(2, 11, 16)), r"x must be .* \(rows, in_features\)"),
        (lambda a: a.__setitem__(1, torch.tensor([1.0, 2, 3, 4])), "ends must be int32 or int64"),
        (lambda a: a.__setitem__(1, torch.tensor([4, 2, 7, 9])), "ends must be in ascending order and at most 11"),
        (lambda a: a.__setitem__(1, torch.tensor([4, 5, 7, 12])), "ends must be in ascending order and at most 11"),
        (
            lambda a: (a[2].__setitem__(0, torch.ones(())), a[3].__setitem__(0, None)),
            r"downs\[0\] must have shape \(rank",
        ),
        (lambda a: a[2].pop(), "one entry per expert; got 4, 3, 4 and 4"),
        (lambda a: a[3].__setitem__(1, torch.randn(24, 4)), r"downs\[1\] .* ups\[1\] \(24, rank\); got \(3, 16\)"),
        (lambda a: a[2].__setitem__(2, torch.randn(23, 16)), r"downs\[2\], a whole weight, must have shape \(24, 16\)"),
        (lambda a: a[4].__setitem__(0, torch.randn(3)), r"biases\[0\] must have shape \(24,\) or be None"),
        (lambda a: a[2].__setitem__(0, a[2][0].double()), r"downs\[0\] must have the dtype and device of x"),
    ],
)
def test_misfits_are_named(change, words):
    args = list(inputs())
    change(args)
    with pytest.raises(ValueError, match=words):
        lowrank_experts(*args)


def test_grouped_products_are_chosen_on_a_gpu_for_small_factors():
    problem = op.Problem(torch.bfloat16, True, True, 2**20, HOPPER)
    assert choose(op.TABLE, problem, "auto").name == "grouped"
    for change in (
        {"dtype": torch.float32}, {"aligned": False}, {"all_factored": False}, {"stacked_bytes": 2**25},
        {"device": HOPPER._replace(capability=(7, 5))}, {"device": Device("cpu", 0, (0, 0), 0, 0)},
    ):  # fmt: skip
        assert choose(op.TABLE, problem._replace(**change), "auto").name == "by_expert"
    assert explain("lowrank_experts", *inputs()).splitlines()[1] == "by_expert: runs"
    assert "lowrank_experts" in lro.ops.__all__
