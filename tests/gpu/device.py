"""What the GPU tests share: inputs, comparisons with float64, graphs and streams."""

import pytest
import torch

from lowrank_ops.ops import _native
from lowrank_ops.ops.linear import reference
from tests.tolerance import assert_close_to_float64

needs_library = pytest.mark.skipif(not _native.LIBRARY.is_file(), reason="the native library was not built")


def random(*shape, dtype=torch.float32, mean=0.5):
    generator = torch.Generator("cuda").manual_seed(0)
    return (torch.randn(*shape, generator=generator, device="cuda") + mean).to(dtype)


def zeros(features, dtype=torch.float32, groups=None):
    """A covariance's state."""
    lead = () if groups is None else (groups,)
    return (
        torch.zeros(*lead, features, features, dtype=dtype, device="cuda"),
        torch.zeros(*lead, features, dtype=dtype, device="cuda"),
    )


def arguments(tokens, in_features, rank, out_features, dtype=torch.bfloat16, bias=True, seed=0):
    """x, down, up and bias."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

    return (
        normal(tokens, in_features),
        normal(rank, in_features, scale=in_features**-0.5),
        normal(out_features, rank, scale=rank**-0.5),
        normal(out_features) if bias else None,
    )


def assert_right(y, x, down, up, bias, activation):
    wide = [None if tensor is None else tensor.double() for tensor in (x, down, up, bias)]
    assert_close_to_float64(
        y, reference.two_products(x, down, up, bias, activation), reference.two_products(*wide, activation)
    )


def framed(matrix, pad):
    """The same matrix inside a frame of NaN, ``pad`` elements at the side."""
    frame = torch.full((matrix.shape[0] + 2, matrix.shape[1] + 2 * pad), float("nan")).to(matrix)
    frame[1:-1, pad:-pad].copy_(matrix)
    return frame[1:-1, pad:-pad]


def captured(run):
    """A CUDA graph of ``run``, which must have run before, and what it returned."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def on_streams_at_once(calls, times):
    """Calls each ``times`` times on a stream of its own, in turn, and returns what each returned."""
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results = [[] for _ in calls]
    for _ in range(times):
        for stream, call, into in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                into.append(call())
    torch.cuda.synchronize()
    return results
