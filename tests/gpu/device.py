"""Inputs, CUDA graphs and streams for the GPU tests."""

import pytest
import torch

from lowrank_ops.ops import _native
from tests.ops.inputs import linear_inputs

needs_library = pytest.mark.skipif(not _native.LIBRARY.is_file(), reason="the native library was not built")


def random(*shape, dtype=torch.float32, mean=0.5):
    generator = torch.Generator("cuda").manual_seed(0)
    return (torch.randn(*shape, generator=generator, device="cuda") + mean).to(dtype)


def zeros(features, dtype=torch.float32, groups=None):
    """A zero state: second moment and total."""
    lead = () if groups is None else (groups,)
    return (
        torch.zeros(*lead, features, features, dtype=dtype, device="cuda"),
        torch.zeros(*lead, features, dtype=dtype, device="cuda"),
    )


def arguments(tokens, in_features, rank, out_features, dtype=torch.bfloat16, bias=True, seed=0):
    """x, down, up and bias."""
    sizes = {"in_features": in_features, "rank": rank, "out_features": out_features}
    return linear_inputs(tokens, **sizes, dtype=dtype, bias=bias, seed=seed, device="cuda")


def framed(matrix, pad):
    """A copy of the matrix with a border of NaN, ``pad`` elements wide."""
    frame = torch.full((matrix.shape[0] + 2, matrix.shape[1] + 2 * pad), float("nan")).to(matrix)
    frame[1:-1, pad:-pad].copy_(matrix)
    return frame[1:-1, pad:-pad]


def captured(run):
    """A CUDA graph of ``run``, which must have run before, and its result."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def on_streams_at_once(calls, times):
    """Run each call ``times`` times, each on its own stream, interleaved, and return their results."""
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results = [[] for _ in calls]
    for _ in range(times):
        for stream, call, into in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                into.append(call())
    torch.cuda.synchronize()
    return results
