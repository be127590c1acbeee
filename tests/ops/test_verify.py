"""The records of verified kernels, and which calls are checked; tests/interpreter/test_first_calls.py runs kernels."""

import json
import warnings

import pytest
import torch

from lowrank_ops.ops import _backend, _verify, covariance, linear
from lowrank_ops.ops._backend import Backend, Device, Impl, choose, distrust, explain
from tests.ops.inputs import linear_inputs

KEYS = [("lowrank_linear", f"triton.{name}", "triton 3.9.0") for name in ("decode", "prefill")]
X = torch.ones(1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_verify, "files", lambda package: tmp_path)
    monkeypatch.setattr(_verify, "_passed", set())
    _verify._record.cache_clear()
    yield tmp_path / "tuned"
    _verify._record.cache_clear()


def first_call(tokens=5, backend="auto", name="triton.decode", forget=lambda: None):
    problem = linear.describe(*linear_inputs(tokens, dtype=torch.bfloat16), "none")
    impl = next(impl for impl in linear.TABLE if impl.name == name)
    return _verify.first_call("lowrank_linear", impl, problem, backend, forget)


def test_only_unverified_kernels_of_auto_are_checked():
    pytest.importorskip("triton", reason="its version is part of a record")
    assert first_call() is not None
    assert first_call(name="two_products") is None
    for backend in ("unverified", "triton", Backend.TRITON):
        assert first_call(backend=backend) is None
    compiler = _verify.compiler("lowrank_linear", Backend.TRITON)
    _verify.write_record("cpu", "a CPU", {("lowrank_linear", "triton.decode", compiler): True})
    assert first_call() is None and first_call(name="triton.prefill") is not None


def test_a_bucket_is_checked_once():
    pytest.importorskip("triton", reason="its version is part of a record")
    assert first_call(5).check(X, lambda: (0.1, 0.2))
    assert first_call(7) is None  # the same number of bits, and neither is a multiple of 8
    assert first_call(8) is not None and first_call(9) is not None


def test_calls_that_show_nothing_are_checked_again():
    pytest.importorskip("triton", reason="its version is part of a record")
    assert first_call().check(X, lambda: None)
    assert first_call() is not None


def test_decisions_are_forgotten_before_a_warning_that_is_an_error(monkeypatch):
    pytest.importorskip("triton", reason="its version is part of a record")
    monkeypatch.setattr(_backend, "_distrusted", set())
    forgotten = []
    first = first_call(forget=lambda: forgotten.append(True))
    with warnings.catch_warnings(), pytest.raises(RuntimeWarning, match="is wrong: its error is 3"):
        warnings.simplefilter("error")
        first.check(X, lambda: (3.0, 2.0))
    assert forgotten and not first.passed


@pytest.mark.parametrize("value", ["on", ""])
def test_environment_variable_is_checked(monkeypatch, value):
    monkeypatch.setenv("LOWRANK_OPS_VERIFY", value)
    with pytest.raises(ValueError, match=f"LOWRANK_OPS_VERIFY must be 'first' or 'off'; got {value!r}"):
        _verify.enabled()


def test_records_are_merged_by_compiler(folder):
    newer = (*KEYS[0][:2], "triton 3.10.0")
    _verify.write_record("sm_90", "an H200", {KEYS[0]: True, KEYS[1]: True})
    _verify.write_record("sm_90", "an H200", {KEYS[1]: False, newer: True})
    assert _verify.is_verified(*KEYS[0], "sm_90") and _verify.is_verified(*newer, "sm_90")
    assert not _verify.is_verified(*KEYS[1], "sm_90")
    assert not _verify.is_verified(*KEYS[0], "sm_80")
    assert len(json.loads((folder / "verified.sm_90.json").read_text())["kernels"]) == 2


def test_damaged_record_is_named(folder):
    folder.mkdir()
    (folder / "verified.sm_90.json").write_text("{}")
    with pytest.raises(ValueError, match=r"verified\.sm_90\.json is not a record of verified kernels .* remove it"):
        _verify.is_verified(*KEYS[0], "sm_90")


def test_arch_is_that_of_the_device():
    assert _verify.arch(Device("cuda", 0, (12, 0), 170, 101376)) == "sm_120"


def test_nothing_is_checked_while_compiling(monkeypatch):
    assert _verify.can_check(torch.zeros(1))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not _verify.can_check(torch.zeros(1))


def test_the_default_device_does_not_matter():
    """A failure of the comparison would count as one of the kernel."""
    args = linear_inputs(5)
    y, state = linear.reference.two_products(*args, "none"), (torch.ones(1, 8, 8), torch.ones(1, 8))
    with torch.device("meta"):
        error, allowed = linear.reference.errors(y, *args, "none")
        assert error <= allowed
        rows = [(0, torch.ones(1, 8, dtype=torch.float64, device="cpu"))]
        assert covariance.reference.errors(*state, rows, 0.1)[0] <= 0


def test_one_kernel_of_an_implementation_is_distrusted(monkeypatch):
    monkeypatch.setattr(_backend, "_distrusted", set())
    cuda = Impl(
        "cuda", Backend.CUDA, lambda problem: None, print, plan=lambda problem: f"kernel_{problem.rank}: a tile"
    )
    table = (cuda, linear.TABLE[-1])
    one, other = (linear.describe(*linear_inputs(5, rank=rank), "none") for rank in (8, 16))
    assert choose(table, one, "auto") is choose(table, other, "auto") is cuda
    distrust(cuda, one)
    for backend in ("auto", "unverified"):
        assert choose(table, one, backend) is table[1] and choose(table, other, backend) is cuda
    assert choose(table, one, "cuda") is cuda
    lines = explain(table, one).splitlines()
    assert lines[0].startswith("cuda: can run, by kernel_8: a tile; it was wrong or failed") and lines[1].endswith(
        "runs"
    )
