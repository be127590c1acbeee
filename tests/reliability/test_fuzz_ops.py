"""The raw ops on random tensors: right within a bound computed in float64, or refused by the documented error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import lowrank_ops as lro
from lowrank_ops.factors.eight_bit import DTYPES as EIGHT_BIT
from lowrank_ops.ops import (
    conv_covariance_update_,
    covariance_finalize_,
    covariance_update_,
    lowrank_experts,
    lowrank_linear,
    lowrank_linear_grouped,
)
from lowrank_ops.ops import covariance as covariance_op
from lowrank_ops.ops import linear as linear_op
from lowrank_ops.ops._backend import Backend, Device, choose
from lowrank_ops.ops.linear.reference import dequantized
from tests.ops.inputs import ACTIVATIONS
from tests.reliability.campaign import examples, figures

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = st.sampled_from([0, 1, 1, 2, 3, 5, 8, 16, 17, 33])
LEADING = st.lists(st.sampled_from([0, 1, 1, 2, 3, 7]), max_size=3).map(tuple)
SEEDS = st.integers(0, 2**31)


def values(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Tensor:
    """Numbers of one kind; ``special`` ones hold a few inf, NaN, huge, tiny and denormal numbers."""
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "zeros":
        x.zero_()
    elif kind == "denormal":
        x *= torch.finfo(dtype).tiny / 4
    elif kind == "constant":
        x.fill_(3.0)
    elif kind == "wide":
        x *= 10.0 ** torch.randint(-3, 4, shape)
    x = x.to(dtype)
    if kind == "special" and x.numel():
        info = torch.finfo(dtype)
        odd = torch.tensor([torch.inf, -torch.inf, torch.nan, info.max, info.min, info.tiny, info.tiny / 8, -0.0])
        at = torch.randint(x.numel(), (min(3, x.numel()),))
        x.view(-1)[at] = odd.to(dtype)[torch.randint(len(odd), at.shape)]
    return x


def _misaligned(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def _sliding(x: Tensor) -> Tensor:
    """Rows that overlap in memory."""
    if x.dim() < 2 or not x.numel():
        return x
    memory = x.new_empty(x.numel() + 8).copy_(F.pad(x.flatten(), (0, 8)))
    return memory.as_strided(x.shape, (1,) * x.dim())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "sliced": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "columns of a wider one": lambda x: F.pad(x, (1, 2))[..., 1:-2] if x.dim() else x,
    "misaligned": _misaligned,
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() and len(x) else x,
    "sliding": _sliding,
    "flipped": lambda x: x.flip(list(range(x.dim()))),
    "negated lazily": lambda x: torch._neg_view(x),
    "permuted": lambda x: x.movedim(0, -2).contiguous().movedim(-2, 0) if x.dim() > 2 else x,
}
KINDS = st.sampled_from(["normal", "normal", "zeros", "denormal", "constant", "wide", "special"])


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](values(shape, dtype, draw(KINDS)))


@st.composite
def eight_bit(draw: st.DrawFn, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A factor of any 8-bit values, and its scales."""
    form = EIGHT_BIT[draw(st.sampled_from(sorted(EIGHT_BIT)))]
    layout = draw(st.sampled_from(["contiguous", "transposed", "misaligned", "expanded"]))  # torch cannot add fp8
    scale = draw(tensors(shape[:1], draw(st.sampled_from([torch.float32, torch.bfloat16]))))
    return LAYOUTS[layout]((40 * torch.randn(shape)).clamp(-127, 127).to(form)), scale


def assert_within(y: Tensor, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> None:
    """``y`` is as close to float64 as two products in its dtype can be; what overflows or is NaN shows."""
    wide = [None if part is None else part.double() for part in (x, down, up, bias)]
    x64, down64, up64 = wide[0], wide[1], wide[2]
    assert x64 is not None and down64 is not None and up64 is not None
    inner = x64 @ down64.T
    expected = inner @ up64.T + (0 if wide[3] is None else wide[3])
    size = x64.abs() @ down64.abs().T
    sums = size @ up64.abs().T + (0 if wide[3] is None else wide[3].abs())
    info = torch.finfo(y.dtype)
    accumulated = 8 if y.dtype in (torch.bfloat16, torch.float16) else 8 + x.shape[-1] + down.shape[0]
    dense = up64.abs() @ down64.abs()  # the product that may be formed first
    # Denormals may be flushed to zero: of the operands, of t, which is multiplied by up, and of y.
    outer = up64.abs().sum(-1)
    flushed = 4 + (1 + x.shape[-1]) * (outer + size.sum(-1, keepdim=True))
    flushed += dense.sum(-1) + (x64.abs().sum(-1, keepdim=True) * outer).nan_to_num(nan=0.0)  # rank 0 and infinite x
    bound = 1.2 * accumulated * info.eps * sums + info.tiny * flushed
    limit = info.max / 2 if activation == "gelu" else info.max  # torch's own, of oneDNN, doubles its argument
    fits = (sums * 1.01 < limit) & (size.amax(-1, keepdim=True) * 1.01 < info.max if down.shape[0] else True)
    fits = fits & bool((dense * 1.01 < info.max).all())
    found, expected = y.double(), ACTIVATIONS[activation](expected)
    wrong = fits & ~((found - expected).abs() <= bound + info.eps * expected.abs())
    assert not bool(wrong.any()), (found[wrong], expected[wrong])
    if activation == "none":  # the others turn -inf into 0
        hidden = (~fits | expected.isnan()) & found.isfinite() & ~((found - expected).abs() <= bound)
        hidden &= ~((sums < torch.inf) & ~fits)  # finite operands may cancel before they overflow
        assert not bool(hidden.any()), (found[hidden], expected[hidden])


def test_lowrank_linear_is_right_on_any_tensor() -> None:
    seen: Counter[str] = Counter()

    @examples(25, 2000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(SEEDS))
        dtype, activation = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(sorted(ACTIVATIONS)))
        n, rank, m = data.draw(SIZES), data.draw(SIZES), data.draw(SIZES)
        x = data.draw(tensors((*data.draw(LEADING), n), dtype))
        down, up = data.draw(tensors((rank, n), dtype)), data.draw(tensors((m, rank), dtype))
        bias = data.draw(st.none() | tensors((m,), dtype))
        through = data.draw(st.sampled_from(["bypass", "dispatcher", "recorded"]))
        if through == "recorded":
            down.requires_grad_()
        op = torch.ops.lowrank_ops.lowrank_linear if through == "dispatcher" else lowrank_linear
        y = op(x, down, up, bias, activation=activation)
        assert y.shape == (*x.shape[:-1], m) and y.dtype == dtype
        assert_within(y.detach(), x, down.detach(), up, bias, activation)
        seen["cases"] += 1

    with figures("lowrank_linear") as counts:
        check()
        counts.update(seen)


def test_eight_bit_factors_are_right_on_any_tensor() -> None:
    """Either factor, or both: the result is that of their values times their scales in the dtype of x."""
    seen: Counter[str] = Counter()

    @examples(15, 2000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(SEEDS))
        dtype, activation = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(sorted(ACTIVATIONS)))
        n, rank, m = data.draw(SIZES), data.draw(SIZES), data.draw(SIZES)
        x, bias = data.draw(tensors((*data.draw(LEADING), n), dtype)), data.draw(st.none() | tensors((m,), dtype))
        which = data.draw(st.sampled_from(["down", "up", "both"]))
        parts = [
            data.draw(eight_bit(shape)) if which in (name, "both") else (data.draw(tensors(shape, dtype)), None)
            for name, shape in (("down", (rank, n)), ("up", (m, rank)))
        ]
        x.requires_grad_(recorded := data.draw(st.booleans()))
        (down, down_scale), (up, up_scale) = parts
        scales = {"down_scale": down_scale, "up_scale": up_scale}
        y = lowrank_linear(x, down, up, bias, activation=activation, **scales)
        assert y.shape == (*x.shape[:-1], m) and y.dtype == dtype and y.requires_grad == recorded
        assert_within(y.detach(), x.detach(), *(dequantized(*part, dtype) for part in parts), bias, activation)
        seen["cases"] += 1

    with figures("lowrank_linear, 8-bit factors") as counts:
        check()
        counts.update(seen)


def test_grouped_layers_are_right_on_any_tensor() -> None:
    seen: Counter[str] = Counter()

    @examples(15, 2000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(SEEDS))
        dtype, n, members = data.draw(st.sampled_from(DTYPES)), data.draw(SIZES), data.draw(st.integers(1, 4))
        x, shared = data.draw(tensors((*data.draw(LEADING), n), dtype)), data.draw(st.booleans())
        ranks = [data.draw(SIZES)] * members if shared else [data.draw(SIZES) for _ in range(members)]
        downs = [data.draw(tensors((rank, n), dtype)) for rank in (ranks[:1] if shared else ranks)]
        ups = [data.draw(tensors((data.draw(SIZES), rank), dtype)) for rank in ranks]
        biases = [data.draw(st.none() | tensors((len(up),), dtype)) for up in ups]
        ups[0].requires_grad_(data.draw(st.booleans()))
        ys = lowrank_linear_grouped(x, downs[0] if shared else downs, ups, biases)
        assert len(ys) == members
        for y, down, up, bias in zip(ys, downs * members if shared else downs, ups, biases, strict=True):
            assert y.shape == (*x.shape[:-1], len(up)) and y.dtype == dtype
            assert_within(y.detach(), x, down, up.detach(), bias, "none")
        seen["cases"] += 1

    with figures("lowrank_linear_grouped") as counts:
        check()
        counts.update(seen)


def test_experts_are_right_on_any_tensor() -> None:
    """Experts without rows, with whole weights, and rows of no expert among them."""
    seen: Counter[str] = Counter()

    @examples(15, 2000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(SEEDS))
        dtype, n, m = data.draw(st.sampled_from(DTYPES)), data.draw(SIZES), data.draw(SIZES)
        x, experts = data.draw(tensors((data.draw(SIZES), n), dtype)), data.draw(st.integers(1, 4))
        ends = sorted(data.draw(st.integers(0, len(x))) for _ in range(experts))
        downs, ups, biases = [], [], []
        for _ in range(experts):
            rank, whole = data.draw(SIZES), data.draw(st.booleans())
            downs.append(data.draw(tensors((m if whole else rank, n), dtype)))
            ups.append(None if whole else data.draw(tensors((m, rank), dtype)))
            biases.append(data.draw(st.none() | tensors((m,), dtype)))
        downs[0].requires_grad_(data.draw(st.booleans()))
        kind = data.draw(st.sampled_from([torch.int32, torch.int64]))
        y = lowrank_experts(x, torch.tensor(ends, dtype=kind), downs, ups, biases).detach()
        assert y.shape == (len(x), m) and y.dtype == dtype and not y[ends[-1] :].any()
        for start, end, down, up, bias in zip([0, *ends], ends, downs, ups, biases, strict=False):
            first = down.detach() if up is not None else torch.eye(n, dtype=dtype)
            assert_within(y[start:end], x[start:end], first, down.detach() if up is None else up, bias, "none")
        seen["cases"] += 1

    with figures("lowrank_experts") as counts:
        check()
        counts.update(seen)


def test_gradients_are_those_of_two_products() -> None:
    seen: Counter[str] = Counter()

    @examples(10, 1000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(SEEDS))
        activation = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
        n, rank, m = data.draw(SIZES), data.draw(SIZES), data.draw(SIZES)
        shapes = [(*data.draw(LEADING), n), (rank, n), (m, rank), (m,)]
        layouts = [LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))] for _ in shapes]
        parts = [layout(torch.randn(shape).double()) for shape, layout in zip(shapes, layouts, strict=True)]
        needed = data.draw(st.lists(st.booleans(), min_size=4, max_size=4))
        parts = [part.requires_grad_(need) for part, need in zip(parts, needed, strict=True)]
        x, down, up, bias = parts
        wanted = [part for part in parts if part.requires_grad]
        if not wanted:
            return
        y, expected = lowrank_linear(*parts, activation=activation), F.linear(F.linear(x, down), up, bias)
        expected = ACTIVATIONS[activation](expected)
        grad = torch.randn_like(expected) if data.draw(st.booleans()) else torch.ones(()).double().expand_as(expected)
        ours, theirs = (torch.autograd.grad(out, wanted, grad, allow_unused=True) for out in (y, expected))
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        seen["cases"] += 1

    with figures("lowrank_linear, gradients") as counts:
        check()
        counts.update(seen)


STATES: dict[str, Callable[[int, torch.dtype], tuple[Tensor, Tensor]]] = {
    "plain": lambda n, dtype: (torch.randn(n, n).to(dtype), torch.randn(n).to(dtype)),
    "transposed": lambda n, dtype: (torch.randn(n, n).to(dtype).T, torch.randn(n).to(dtype)),
    "part of a wider one": lambda n, dtype: (
        torch.randn(n, n + 3).to(dtype)[:, 1:-2],
        torch.randn(2 * n).to(dtype)[::2],
    ),
    "one storage": lambda n, dtype: _packed(torch.randn(n * n + n).to(dtype), n),
}


def _packed(memory: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return memory[: n * n].view(n, n), memory[n * n :]


def test_covariance_updates_are_right_on_any_tensor() -> None:
    seen: Counter[str] = Counter()

    @examples(25, 2000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(SEEDS))
        dtype = data.draw(st.sampled_from(DTYPES))
        sums = torch.float64 if dtype == torch.float64 else data.draw(st.sampled_from([torch.float32, torch.float64]))
        n = data.draw(SIZES | st.just(covariance_op.reference.BLOCK + 5))
        second_moment, total = STATES[data.draw(st.sampled_from(sorted(STATES)))](n, sums)
        before = second_moment.clone(), total.clone()
        x = data.draw(tensors((*data.draw(LEADING), n), dtype))
        covariance_update_(second_moment, total, x)
        rows = x.double().reshape(-1, n) if n else x.new_zeros(0, 0).double()
        for found, old, added, size in (
            (second_moment.tril(), before[0].tril(), (rows.T @ rows).tril(), (rows.T.abs() @ rows.abs()).tril()),
            (total, before[1], rows.sum(0), rows.abs().sum(0)),
        ):
            expected, scale = old.double() + added, old.double().abs() + size
            fits = scale * 1.01 < torch.finfo(sums).max
            bound = (4 + len(rows)) * torch.finfo(sums).eps * scale + len(rows) * torch.finfo(sums).tiny
            assert bool((((found.double() - expected).abs() <= bound) | ~fits).all())
            assert not bool((expected.isnan() & found.isfinite()).any())
            assert not bool((expected.isinf() & found.isfinite()).any())
        seen["cases"] += 1

    with figures("covariance_update_") as counts:
        check()
        counts.update(seen)


def test_convolutions_are_covariances_of_their_patches() -> None:
    seen: Counter[str] = Counter()
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))

    @examples(10, 1000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(SEEDS))
        groups, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        size, padding = data.draw(pairs), data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
        stride, dilation = data.draw(pairs), data.draw(pairs)
        shape = (
            data.draw(st.integers(0, 3)),
            groups * width,
            data.draw(st.integers(0, 7)),
            data.draw(st.integers(0, 7)),
        )
        x = data.draw(tensors(shape, torch.float64))
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        d = width * size[0] * size[1]
        second_moment, total = torch.zeros(groups, d, d).double(), torch.zeros(groups, d).double()
        try:
            conv_covariance_update_(second_moment, total, x, kernel_size=size, **geometry)
        except ValueError as error:
            assert "is larger than the padded input" in str(error)
            seen["refused"] += 1
            return
        if x.isfinite().all() and x.numel():
            patches = F.unfold(x.contiguous(), size, dilation, padding, stride).view(len(x), groups, d, -1)
            rows = patches.permute(1, 0, 3, 2).reshape(groups, -1, d)
            torch.testing.assert_close(covariance_finalize_(second_moment), rows.mT @ rows)
            torch.testing.assert_close(total, rows.sum(1))
        seen["cases"] += 1

    with figures("conv_covariance_update_") as counts:
        check()
        counts.update(seen)


NAMES = ("x ", "down", "up", "bias", "second_moment", "total", "ends")  # of arguments: an error begins with one


def test_unfit_arguments_are_documented_errors() -> None:
    """Shapes, dtypes and types at random: most calls are refused, none in another way."""
    seen: Counter[str] = Counter()
    kinds = st.sampled_from([*DTYPES, torch.int64, torch.complex64, torch.bool])
    shapes = st.lists(st.sampled_from([0, 1, 2, 4]), max_size=3).map(tuple)
    anything = st.one_of(
        st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), shapes, kinds),
        st.sampled_from([None, 3.0, [1.0], "x", torch.ones(2, 4).to_sparse(), torch.ones(4, device="meta")]),
    )

    @examples(25, 2000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        parts = data.draw(st.lists(anything, min_size=4, max_size=4))
        before = [part.clone() if isinstance(part, Tensor) else part for part in parts]
        x, down, up, bias = parts
        calls = [
            lambda: lowrank_linear(*parts),
            lambda: covariance_update_(*parts[:3]),
            lambda: lowrank_linear(x, torch.ones(2, 4), torch.ones(4, 2), down_scale=down, up_scale=up),
            lambda: lowrank_linear(x, torch.ones(2, 4).to(torch.int8), up, down_scale=down),
            lambda: lowrank_linear_grouped(x, [down, torch.ones(2, 4)], [up, up], [bias, None]),
            lambda: lowrank_linear_grouped(x, down, [up, up], bias),
            lambda: lowrank_experts(x, down, [up], [None], [bias]),
            lambda: lowrank_experts(x, torch.tensor([1, 2]), [down, down], [up, up], [bias, None]),
        ]
        try:
            data.draw(st.sampled_from(calls))()
        except (ValueError, TypeError) as error:
            assert str(error).startswith(NAMES), error
            for part, old in zip(parts, before, strict=True):
                assert not isinstance(part, Tensor) or part.is_meta or part.is_sparse or torch.equal(part, old)
            seen["refused"] += 1
        seen["cases"] += 1

    with figures("unfit arguments of ops") as counts:
        check()
        counts.update(seen)


def _sharing(parts: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return parts(torch.zeros(4, 4), torch.zeros(4))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: (torch.zeros(1, 4).expand(4, 4), torch.zeros(4), torch.ones(2, 4)), "second_moment has elements that"),
        (lambda: (torch.zeros(20).as_strided((4, 4), (1, 1)), torch.zeros(4), torch.ones(2, 4)), "second_moment has"),
        (lambda: (torch.zeros(4, 4), torch.zeros(1).expand(4), torch.ones(2, 4)), "total has elements that share"),
        (lambda: _sharing(lambda m, t: (m, m[0], torch.ones(2, 4))), "second_moment and total share memory"),
        (lambda: _sharing(lambda m, t: (m, t, m)), "second_moment and x share memory; pass a clone of x"),
        (lambda: _sharing(lambda m, t: (m, t, m.T[1:])), "second_moment and x share memory"),
        (lambda: _sharing(lambda m, t: (m, t, t[None])), "total and x share memory"),
        (lambda: (torch._neg_view(torch.zeros(4, 4)), torch.zeros(4), torch.ones(2, 4)), "second_moment is updated"),
        (lambda: (torch.zeros(4, 4), torch.zeros(4).requires_grad_(), torch.ones(2, 4)), "total is updated in place"),
    ],
)
def test_memory_written_twice_is_refused(state: Callable[[], tuple[Tensor, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        covariance_update_(*state())
    with pytest.raises(ValueError, match="elements share memory"):
        covariance_finalize_(torch.zeros(1, 4).expand(4, 4))


def test_every_problem_has_an_implementation() -> None:
    """The choice itself, on simulated GPUs: any sizes, strides and dtypes."""
    seen: Counter[str] = Counter()
    sizes = st.sampled_from([0, 1, 7, 8, 16, 64, 100, 256, 257, 1000, 4096, 65536, 2**31, 2**40])
    devices = [Device("cuda", 0, cc, 100, 232448) for cc in ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))]

    @examples(15, 2000)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        device, dtype = (
            data.draw(st.sampled_from([*devices, Device("cpu", 0, (0, 0), 0, 0)])),
            data.draw(st.sampled_from(DTYPES)),
        )
        tokens, n, rank, m = (data.draw(sizes) for _ in range(4))
        strides = [(data.draw(sizes), data.draw(st.sampled_from([0, 1, 2]))) for _ in range(2)]
        aligned, flag = data.draw(st.booleans()), data.draw(st.booleans())
        linear = linear_op.Problem(
            tokens, n, rank, m, dtype, data.draw(sizes), *strides, aligned, flag,
            data.draw(st.sampled_from(sorted(ACTIVATIONS))), device,
        )  # fmt: skip
        update = covariance_op.Problem(
            tokens, n, dtype, data.draw(st.sampled_from([torch.float32, torch.float64])), data.draw(sizes), aligned,
            data.draw(sizes), flag, data.draw(st.booleans()), device,
        )  # fmt: skip
        for table, problem in ((linear_op.TABLE, linear), (covariance_op.TABLE, update)):
            impl = choose(table, problem, "auto")
            assert impl.supports(problem) is None
            assert impl.backend is Backend.REFERENCE or device.type == "cuda"
        seen["cases"] += 1

    with figures("choice of an implementation") as counts:
        check()
        counts.update(seen)


@pytest.mark.parametrize("kind", ["two factors", "int8", "fp8", "pivoted", "8-bit weight"])
def test_low_rank_layers_take_what_linear_layers_take(kind: str) -> None:
    layer, linear = lro.LowRankLinear(8, 6, rank=3), torch.nn.Linear(8, 6)
    if kind == "pivoted":
        layer = lro.layers.PivotedLinear(8, 6, rank=3)
    elif kind == "8-bit weight":
        layer = lro.layers.EightBitLinear(8, 6)
    elif kind != "two factors":
        layer.quantize_(kind)
    for name, view in LAYOUTS.items():
        x = view(torch.randn(2, 3, 8))
        assert layer(x).shape == linear(x).shape, name
        torch.testing.assert_close(layer(x), F.linear(x, layer.product(), layer.bias), msg=name)
