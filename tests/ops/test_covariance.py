"""``covariance_update_`` and its convolution form: their reference, and both as ops of PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from lowrank_ops.ops import (
    BackendUnavailableError,
    conv_covariance_update_,
    covariance_finalize_,
    covariance_update_,
)
from lowrank_ops.ops.covariance import explain, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STATES = [torch.float32, torch.float64]
PAIRS = [(x, state) for x in DTYPES for state in STATES if (x, state) != (torch.float64, torch.float32)]


def state(*shape, dtype=torch.float64):
    """A zero state: second moment and total."""
    second_moment = torch.zeros(*shape, shape[-1], dtype=dtype)
    return second_moment, torch.zeros(shape, dtype=dtype)


def updated(x, dtype=torch.float64, **options):
    second_moment, total = state(x.shape[-1], dtype=dtype)
    covariance_update_(second_moment, total, x, **options)
    return covariance_finalize_(second_moment), total


def assert_sums(second_moment, total, rows, rtol):
    rows = rows.double()
    moment = rows.T @ rows
    torch.testing.assert_close(second_moment.double(), moment, rtol=0, atol=rtol * (float(moment.abs().max()) + 1e-30))
    torch.testing.assert_close(total.double(), rows.sum(0), rtol=0, atol=rtol * (float(rows.abs().sum()) + 1e-30))
    assert torch.equal(second_moment, second_moment.mT)


# --- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "state_dtype"), PAIRS)
@pytest.mark.parametrize("shape", [(7,), (50, 7), (2, 5, 7), (0, 7), (3, 0, 7), (4, 300), (3, 2 * reference.BLOCK + 1)])
def test_dtypes_and_leading_shapes(dtype, state_dtype, shape):
    x = (torch.randn(shape) + 0.5).to(dtype)
    second_moment, total = updated(x, state_dtype)
    assert second_moment.dtype == total.dtype == state_dtype
    assert_sums(second_moment, total, x.reshape(-1, shape[-1]), 1e-12 if state_dtype == torch.float64 else 1e-6)


def test_products_are_not_rounded_to_the_dtype_of_x():
    x = torch.full((1000, 2), 1.0078125, dtype=torch.bfloat16)  # its square needs more than bfloat16's 8 bits
    second_moment, total = updated(x, torch.float32)
    assert second_moment[0, 0].item() == pytest.approx(1000 * 1.0078125**2, rel=1e-7)
    assert total[0].item() == pytest.approx(1007.8125, rel=1e-7)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[::3],
        lambda x: x.T,
        lambda x: x.view(20, 2, 3, 5).transpose(1, 2),
        lambda x: x[:1].expand(9, -1),
        lambda x: x.flip(0),
    ],
)
def test_strided_input(view):
    x = view(torch.randn(20, 30))
    assert_sums(*updated(x), x.reshape(-1, x.shape[-1]), 1e-12)


def test_updates_accumulate_below_the_diagonal():
    features = reference.BLOCK + 40
    x = torch.randn(30, features)
    second_moment, total = state(features)
    upper = second_moment[: reference.BLOCK, reference.BLOCK :]
    upper.fill_(7)
    for part in x.split(7):
        covariance_update_(second_moment, total, part)
    assert (upper == 7).all()
    assert_sums(covariance_finalize_(second_moment), total, x, 1e-12)


@pytest.mark.parametrize("shape", [(3,), (1,), (4, 3), (5000,)])
def test_finalize_mirrors_the_lower_triangle(shape):
    second_moment = torch.rand(*shape, shape[-1])
    expected = second_moment.tril() + second_moment.tril(-1).mT
    assert covariance_finalize_(second_moment) is second_moment
    assert torch.equal(second_moment, expected)


def test_long_inputs_are_converted_in_chunks(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 100 * 8 * 6)
    sizes = []
    block_triangle = reference._update_block_triangle

    def record(second_moment, total, rows):
        sizes.append(len(rows))
        block_triangle(second_moment, total, rows)

    monkeypatch.setattr(reference, "_update_block_triangle", record)
    x = torch.randn(250, 6)
    assert_sums(*updated(x), x, 1e-12)
    assert sizes == [100, 100, 50]


# --- convolutions -----------------------------------------------------------------------------------------------

GEOMETRIES = {
    "plain": {"kernel_size": (3, 3)},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1)},
    "padded": {"kernel_size": (3, 3), "padding": (1, 2)},
    "dilated": {"kernel_size": (2, 3), "dilation": (2, 1), "padding": (1, 0)},
    "all": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)},
    "pointwise": {"kernel_size": (1, 1)},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("lines", [18, 2, 0])  # two images, two lines of one, or one
def test_conv_update_matches_im2col(geometry, groups, channels_last, lines, monkeypatch):
    x = torch.randn(5, 4, 9, 8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    features = 4 // groups * geometry["kernel_size"][0] * geometry["kernel_size"][1]
    width = reference.output_size(
        x.shape[2:], **({"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} | geometry)
    )[1]
    monkeypatch.setattr(reference, "CHUNK_BYTES", lines * groups * features * width * 8)
    second_moment, total = state(groups, features)
    conv_covariance_update_(second_moment, total, x, **geometry)
    covariance_finalize_(second_moment)
    patches = F.unfold(x, **geometry).transpose(1, 2).flatten(0, 1)
    for group in range(groups):
        rows = patches[:, group * features : (group + 1) * features]
        assert_sums(second_moment[group], total[group], rows, 1e-12)


@pytest.mark.parametrize(("dtype", "state_dtype"), PAIRS)
def test_conv_dtypes(dtype, state_dtype):
    x = torch.randn(2, 2, 5, 5).to(dtype)
    second_moment, total = state(1, 18, dtype=state_dtype)
    conv_covariance_update_(second_moment, total, x, kernel_size=(3, 3))
    rows = F.unfold(x.double(), 3).transpose(1, 2).flatten(0, 1)
    assert_sums(covariance_finalize_(second_moment)[0], total[0], rows, 1e-12 if state_dtype == torch.float64 else 1e-6)


def test_conv_of_an_empty_batch_adds_nothing():
    second_moment, total = state(1, 18)
    conv_covariance_update_(second_moment, total, torch.randn(0, 2, 5, 5), kernel_size=(3, 3))
    assert not second_moment.any() and not total.any()


# --- as ops of PyTorch ------------------------------------------------------------------------------------------

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (0, 6)])
def test_opcheck(dtype, state_dtype, shape):
    arguments = (*state(6, dtype=state_dtype), torch.randn(shape).to(dtype))
    torch.library.opcheck(torch.ops.lowrank_ops.covariance_update_.default, arguments, test_utils=OPCHECKS)


def test_opcheck_conv():
    arguments = (*state(2, 9), torch.randn(2, 2, 5, 5), [3, 3], [1, 1], [0, 0], [1, 1])
    torch.library.opcheck(torch.ops.lowrank_ops.conv_covariance_update_.default, arguments, test_utils=OPCHECKS)


class Updates(torch.nn.Module):
    """One linear and one convolutional update of buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("moment", torch.zeros(6, 6))
        self.register_buffer("total", torch.zeros(6))
        self.register_buffer("conv_moment", torch.zeros(1, 4, 4))
        self.register_buffer("conv_total", torch.zeros(1, 4))

    def forward(self, x, image):
        covariance_update_(self.moment, self.total, x.relu())
        conv_covariance_update_(self.conv_moment, self.conv_total, image, kernel_size=(2, 2))
        return x + 1


def own_ops(graph):
    targets = (str(node.target) for node in graph.nodes)
    return [name.removesuffix(".default") for name in targets if "lowrank_ops" in name]


EXPECTED = ["lowrank_ops.covariance_update_", "lowrank_ops.conv_covariance_update_"]


def test_compile_keeps_one_node_each():
    x, image = torch.randn(5, 6), torch.randn(2, 1, 4, 4)
    eager, compiled, graphs = Updates(), Updates(), []

    def backend(graph_module, inputs):
        graphs.append(graph_module.graph)
        return graph_module

    eager(x, image)
    torch.compile(compiled, backend=backend, fullgraph=True)(x, image)
    assert [own_ops(graph) for graph in graphs] == [EXPECTED]
    for name, buffer in eager.named_buffers():
        assert buffer.any() and torch.equal(buffer, getattr(compiled, name))


def test_compile_functionalizes_the_mutation():
    x, image = torch.randn(5, 6), torch.randn(2, 1, 4, 4)
    eager, compiled = Updates(), Updates()
    function = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        eager(x, image)
        function(x, image)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(getattr(compiled, name), buffer)


def test_export_keeps_one_node_each():
    x, image = torch.randn(5, 6), torch.randn(2, 1, 4, 4)
    eager = Updates()
    exported = torch.export.export(Updates(), (x, image), dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, None))
    assert own_ops(exported.graph) == EXPECTED
    module = exported.module()
    for rows in (5, 9):
        module(torch.ones(rows, 6), image)
        eager(torch.ones(rows, 6), image)
    for name, buffer in eager.named_buffers():
        assert torch.equal(dict(module.named_buffers())[name], buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_keeps_the_state_dtype(dtype):
    x = torch.randn(50, 6) + 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second_moment, total = updated(x, dtype)
        conv_moment, conv_total = state(1, 9, dtype=dtype)
        conv_covariance_update_(conv_moment, conv_total, x.view(2, 1, 15, 10), kernel_size=(3, 3))
    assert second_moment.dtype == dtype
    assert_sums(second_moment, total, x, 1e-6)
    rows = F.unfold(x.view(2, 1, 15, 10), 3).transpose(1, 2).flatten(0, 1)
    assert_sums(covariance_finalize_(conv_moment)[0], conv_total[0], rows, 1e-6)


def test_inference_mode():
    second_moment, total = state(6)
    with torch.inference_mode():
        covariance_update_(second_moment, total, torch.ones(2, 6))
    assert second_moment[0, 0] == 2 and total[0] == 2


# --- backends and errors ----------------------------------------------------------------------------------------


def test_backends_by_name():
    x = torch.randn(5, 6)
    assert torch.equal(updated(x, backend="reference")[0], updated(x)[0])
    with pytest.raises(
        ValueError, match="backend must be one of 'auto', 'unverified', 'reference', 'triton', 'cuda'; got 'numpy'"
    ):
        updated(x, backend="numpy")
    with pytest.raises(BackendUnavailableError, match=r"backend='cuda' cannot run this call \(.*backend='auto'"):
        updated(x, backend="cuda")
    assert "reference: runs" in explain(*state(6), x)


@pytest.mark.parametrize(
    ("second_moment", "total", "x", "message"),
    [
        (torch.zeros(6, 6), torch.zeros(6), torch.tensor(1.0), r"x must have shape \(\.\.\., features\); got a scalar"),
        (torch.zeros(5, 5), torch.zeros(6), torch.ones(2, 6), r"second_moment must .* \(6, 6\) .*; got \(5, 5\)"),
        (torch.zeros(6, 6), torch.zeros(5), torch.ones(2, 6), r"total must have shape \(6,\); got \(5,\)"),
        (torch.zeros(6, 6), torch.zeros(6).double(), torch.ones(2, 6), "must share one dtype.*; got torch.float32 and"),
        (torch.zeros(6, 6).half(), torch.zeros(6).half(), torch.ones(2, 6), "float32 or float64; got torch.float16"),
        (torch.zeros(6, 6), torch.zeros(6), torch.ones(2, 6).int(), "bfloat16 or float16; got torch.int32"),
        (torch.zeros(6, 6), torch.zeros(6), torch.ones(2, 6).double(), "x is float64 but .* use a float64 state"),
        (torch.zeros(6, 6), torch.zeros(6), torch.ones(2, 6, device="meta"), "on one device; got cpu, cpu and meta"),
    ],
)  # fmt: skip
def test_errors(second_moment, total, x, message):
    with pytest.raises(ValueError, match=message):
        covariance_update_(second_moment, total, x)
    assert not second_moment.any() and not total.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": (3,)}, r"kernel_size must be two integers \(height, width\) of at least 1; got \[3\]"),
        ({"stride": (1, 0)}, r"stride must be two integers .* of at least 1; got \[1, 0\]"),
        ({"padding": (-1, 0)}, r"padding must be two integers .* of at least 0; got \[-1, 0\]"),
        ({"dilation": (0, 1)}, r"dilation must be two integers .* of at least 1; got \[0, 1\]"),
        ({"x": torch.ones(2, 5, 5)}, r"x must have shape \(batch, channels, height, width\); got \(2, 5, 5\)"),
        ({"total": torch.zeros(18)}, r"must be \(groups, d, d\) and .*; got \(1, 18, 18\) and \(18,\)"),
        ({"x": torch.ones(1, 3, 5, 5)}, "1 groups of 18 features does not fit x with 3 channels .* 3 x 3"),
        ({"dilation": (3, 1)}, r"kernel_size \[3, 3\] .* is larger than the padded input \(5, 5\)"),
        ({"x": torch.ones(1, 2, 5, 5).double()}, "x is float64 but the state is float32"),
    ],
)  # fmt: skip
def test_conv_errors(change, message):
    arguments = {
        "second_moment": torch.zeros(1, 18, 18),
        "total": torch.zeros(1, 18),
        "x": torch.ones(1, 2, 5, 5),
        "kernel_size": (3, 3),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        conv_covariance_update_(arguments.pop("second_moment"), arguments.pop("total"), arguments.pop("x"), **arguments)
