"""The Triton kernels of ``lowrank_linear_grouped`` in Triton's CPU interpreter, against float64."""

import dataclasses
import os

import pytest
import torch

from tests.ops.inputs import assert_grouped, grouped_inputs

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from lowrank_ops.ops import grouped, lowrank_linear_grouped
from lowrank_ops.ops.grouped import _triton, _triton_kernels, describe
from lowrank_ops.ops.linear._triton_config import DecodeConfig, PrefillConfig

pytestmark = pytest.mark.interpreter

# Small tiles, so that every member has several.
TWO_KERNELS = DecodeConfig(16, 16, 32, 4, 2, 16, 16, 16, 4, 2)
FOLDED = dataclasses.replace(TWO_KERNELS, slices=4, fold=True)
SUMMED = dataclasses.replace(TWO_KERNELS, slices=4)
PREFILL = PrefillConfig(16, 16, 32, 16, 16, 4, 2, 2, parts=2)
ALL = {"two kernels": TWO_KERNELS, "folded": FOLDED, "summed": SUMMED, "prefill": PREFILL}
SHAPES = {
    "three members": {"in_features": 40, "ranks": (24, 8, 16), "out_features": (24, 8, 16)},
    "two members": {"in_features": 33, "ranks": (7, 19), "out_features": (11, 17)},
    "one member": {"in_features": 32, "ranks": (8,), "out_features": (16,)},
}


def run(config, x, down, ups, biases):
    downs = [down] if isinstance(down, torch.Tensor) else down
    problem = describe(x, downs, ups, biases)
    decode = isinstance(config, DecodeConfig)
    assert (_triton.supports_decode if decode else _triton.supports_prefill)(problem, config) is None
    return (_triton.run_decode if decode else _triton.run_prefill)(problem, x, downs, ups, biases, config=config)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(config, shape):
    args = grouped_inputs(17, dtype=torch.bfloat16, **shape)
    assert_grouped(run(config, *args), *args)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_shared_down(config):
    args = grouped_inputs(5, **SHAPES["three members"], dtype=torch.float16, shared=True)
    assert_grouped(run(config, *args), *args)


@pytest.mark.parametrize("config", [FOLDED, PREFILL], ids=["decode", "prefill"])
def test_some_biases_and_strided_x(config):
    x, *factors = grouped_inputs(6, **SHAPES["three members"], dtype=torch.bfloat16, biases=(True, False, True))
    x = torch.cat([x, x], 1)[:, :40]
    assert_grouped(run(config, x, *factors), x, *factors)


@pytest.mark.parametrize("config", [SUMMED, PREFILL], ids=["decode", "prefill"])
def test_no_load_out_of_bounds(config, monkeypatch):
    """Scratch and what lies beside every operand are NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))

    def framed(tensor):
        frame = torch.full((tensor.numel() + 64,), float("nan"), dtype=tensor.dtype)
        inside = frame[32:-32].view(tensor.shape)
        inside.copy_(tensor)
        return inside

    x, *lists = grouped_inputs(5, **SHAPES["three members"], dtype=torch.float16)
    args = framed(x), *([framed(tensor) for tensor in part] for part in lists)
    assert_grouped(run(config, *args), *args)


@pytest.mark.parametrize("tokens, name", [(3, "triton.decode"), (260, "triton.prefill"), (0, "triton.decode")])
def test_op_runs_the_kernel(tokens, name):
    x, downs, ups, biases = args = grouped_inputs(tokens, ranks=(8, 5), out_features=(16, 9), dtype=torch.bfloat16)
    assert f"{name}: runs" in grouped.explain(*args, backend="triton")
    assert "members: runs" in grouped.explain(*args)  # auto does not use the interpreter
    assert_grouped(lowrank_linear_grouped(*args, backend="triton"), *args)
    leaves = [tensor.requires_grad_() for tensor in (x, *downs, *ups, *biases)]
    ys = lowrank_linear_grouped(*args, backend="triton")
    gradients = torch.autograd.grad(sum(y.float().sum() for y in ys), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_refusals():
    def why(**changes):
        problem = describe(*grouped_inputs(3, dtype=torch.bfloat16))._replace(**changes)
        assert _triton.supports_prefill(problem) == _triton.supports_decode(problem)
        return _triton.supports_decode(problem)

    assert why() is None
    assert why(ranks=(8,) * 4, out_features=(8,) * 4) == "takes up to 3 members; these are 4"
    assert why(ranks=(8, 0, 8)) == "takes no empty factors"
    assert why(contiguous=False) == "takes contiguous factors and biases"
    assert "bfloat16 or float16" in why(dtype=torch.float32)
    x, downs, ups, biases = grouped_inputs(3, dtype=torch.bfloat16)
    assert not describe(x, [downs[0].T.contiguous().T, *downs[1:]], ups, biases).contiguous


# --- planted faults: the checks above must fail for kernels that are wrong ----------------------------------------


def second_for_third(original):
    return lambda member, of_0, of_1, of_2: original(member, of_0, of_1, of_1)


def first_tile_skipped(original):
    def fault(tile, size_0, size_1, BLOCK):
        member, first = original(tile, size_0, size_1, BLOCK)
        return member, first - (member > 0)

    return fault


def first_columns_only(original):
    """All tiles of t are stored in the first columns of their member."""

    def fault(ptr, value, row, column, rows, columns, stride, *rest):
        return original(ptr, value, row, column * 0, rows, columns, stride, *rest)

    return fault


@pytest.mark.parametrize(
    ("config", "function", "fault"),
    [
        (FOLDED, "_of", second_for_third),
        (PREFILL, "_of", second_for_third),
        (TWO_KERNELS, "_member_of", first_tile_skipped),
        (SUMMED, "store_tile", first_columns_only),
    ],
)
def test_wrong_members_are_caught(config, function, fault, monkeypatch):
    args = grouped_inputs(2, in_features=16, ranks=(24,) * 3, out_features=(24,) * 3, dtype=torch.float16)
    assert_grouped(run(config, *args), *args)
    monkeypatch.setattr(_triton_kernels, function, fault(getattr(_triton_kernels, function)))
    with pytest.raises(AssertionError, match="off by"):
        ys = run(config, *args)
        assert all(y.isfinite().all() for y in ys), "off by infinity"
        assert_grouped(ys, *args)
