"""First calls of unverified kernels on a CUDA device: kernels that are right pass their check."""

import re
import warnings

import pytest
import torch

from lowrank_ops.cli import verify
from lowrank_ops.ops import _verify, covariance_update_, explain, lowrank_linear

from .device import arguments, captured, random, zeros

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_record(monkeypatch, tmp_path):
    monkeypatch.setattr(_verify, "files", lambda package: tmp_path)
    monkeypatch.setattr(_verify, "_passed", set())
    _verify._record.cache_clear()
    yield
    _verify._record.cache_clear()


@pytest.mark.parametrize("tokens", [7, 3000])
def test_linear_passes_and_is_captured(tokens):
    args = arguments(tokens, 1032, 120, 776)  # a shape that no other test has decided
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = lowrank_linear(*args)
    # Older versions of Triton are refused for many tokens on some GPUs.
    by_triton = re.search(r"^triton\S+: runs$", explain("lowrank_linear", *args), re.M)
    assert len(_verify._passed) == bool(by_triton)
    graph, again = captured(lambda: lowrank_linear(*args))
    graph.replay()
    assert torch.equal(y, again)


def test_covariance_passes():
    state = zeros(2200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        covariance_update_(*state, random(3000, 2200, dtype=torch.bfloat16))
    assert len(_verify._passed) == 1


def test_doctor_finds_all_kernels_right(monkeypatch):
    monkeypatch.setattr(verify, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(verify, "TOKENS", (7, 3000))
    monkeypatch.setattr(verify, "LAYERS", ((768, 136, 3072),))
    result = verify.run()
    assert result.code == 0, result.text
