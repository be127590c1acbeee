"""First calls of unverified kernels are checked, in Triton's CPU interpreter: planted wrong kernels are replaced."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from tests.ops.inputs import assert_grouped, assert_linear, eight_bit, grouped_inputs, linear_inputs

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from lowrank_ops.cli import verify
from lowrank_ops.ops import (
    _backend,
    _verify,
    conv_covariance_update_,
    covariance,
    covariance_update_,
    explain,
    grouped,
    linear,
    lowrank_linear,
    lowrank_linear_grouped,
)
from lowrank_ops.ops._backend import Backend
from lowrank_ops.ops._dispatcher import BoundedCache
from lowrank_ops.ops.covariance import _triton_kernels
from lowrank_ops.ops.grouped import _triton as grouped_triton
from lowrank_ops.ops.grouped import _triton_kernels as grouped_kernels
from lowrank_ops.ops.linear import _triton, _triton_decode_kernels, _triton_prefill_kernels

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch, tmp_path):
    """``auto`` prefers the Triton kernels, and no call was made or recorded before."""
    for module, name in ((linear, "TABLE"), (grouped, "TABLE"), (covariance, "TABLE"), (covariance, "CONV_TABLE")):
        table = tuple(
            impl._replace(prefers=lambda problem: True) if impl.backend is Backend.TRITON else impl
            for impl in getattr(module, name)
        )
        monkeypatch.setattr(module, name, table)
    for module in (linear, grouped, covariance):
        monkeypatch.setattr(module, "_decisions", BoundedCache(64))
    monkeypatch.setattr(_verify, "_passed", set())
    monkeypatch.setattr(_backend, "_distrusted", set())
    monkeypatch.setattr(_verify, "files", lambda package: tmp_path)
    launchers = ((module._decode_launcher, module._prefill_launcher) for module in (_triton, grouped_triton))
    caches = _verify._record, *sum(launchers, ())
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def misplaced(original):
    """Stores each tile one column to the right."""
    return lambda ptr, value, row, column, *rest: original(ptr, value, row, column + 1, *rest)


def nothing_added(original):
    return lambda target, value, mask, DEST: None


def half_added(original):
    return lambda target, value, mask, DEST: original(target, value * 0.5, mask, DEST)


def doubled(original):
    return lambda *args: original(*args) * 2


def broken(original):
    def fail(*args, **options):
        raise RuntimeError("out of resources")

    return fail


class Linear:
    """Calls of ``lowrank_linear`` with ``tokens`` rows."""

    op = "lowrank_linear"

    def __init__(self, tokens, module):
        self.args = linear_inputs(tokens, in_features=40, rank=8, out_features=24, dtype=torch.bfloat16)
        self.module = module

    def run(self, **options):
        return lowrank_linear(*self.args, **options)

    def is_right(self, y):
        assert_linear(y, *self.args, "none")

    def explain(self):
        return explain(self.op, *self.args)


class EightBit(Linear):
    """Calls with int8 factors."""

    def __init__(self, tokens, module):
        super().__init__(tokens, module)
        x, down, up, bias = self.args
        (down, down_scale), (up, up_scale) = (eight_bit(factor, torch.int8) for factor in (down, up))
        self.args, self.scales = (x, down, up, bias), {"down_scale": down_scale, "up_scale": up_scale}

    def run(self, **options):
        return lowrank_linear(*self.args, **self.scales, **options)

    def is_right(self, y):
        assert_linear(y, *self.args, "none", **self.scales)

    def explain(self):
        return explain(self.op, *self.args, **self.scales)


class Grouped:
    """Calls of ``lowrank_linear_grouped`` with ``tokens`` rows."""

    op = "lowrank_linear_grouped"

    def __init__(self, tokens, module):
        self.args = grouped_inputs(tokens, ranks=(8, 5), out_features=(16, 9), dtype=torch.bfloat16)
        self.module = module

    def run(self, **options):
        return lowrank_linear_grouped(*self.args, **options)

    def is_right(self, ys):
        assert_grouped(ys, *self.args)

    def explain(self):
        return explain(self.op, *self.args)


class Covariance:
    """Updates of a state that is not zero."""

    op = "covariance_update_"
    module = _triton_kernels

    def __init__(self):
        self.x = torch.randn(40, 35, dtype=torch.bfloat16)

    def run(self, **options):
        state = torch.ones(35, 35), torch.ones(35)
        covariance_update_(*state, self.x, **options)
        return state

    def is_right(self, state):
        rows = self.x.double()
        torch.testing.assert_close(state[0].tril().double(), (1 + rows.T @ rows).tril(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(state[1].double(), 1 + rows.sum(0), rtol=1e-5, atol=1e-4)

    def explain(self):
        return explain(self.op, torch.ones(35, 35), torch.ones(35), self.x)


class Convolution(Covariance):
    op = "conv_covariance_update_"

    def __init__(self):
        self.geometry = {"kernel_size": (3, 3), "padding": (1, 1)}
        self.x = torch.randn(2, 4, 5, 6, dtype=torch.bfloat16)

    def state(self):
        return torch.ones(1, 36, 36), torch.ones(1, 36)

    def run(self, **options):
        state = self.state()
        conv_covariance_update_(*state, self.x, **self.geometry, **options)
        return state

    def is_right(self, state):
        rows = torch.nn.functional.unfold(self.x.double(), (3, 3), padding=1).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(state[0][0].tril().double(), (1 + rows.T @ rows).tril(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(state[1][0].double(), 1 + rows.sum(0), rtol=1e-5, atol=1e-4)

    def explain(self):
        return explain(self.op, *self.state(), self.x, **self.geometry)


CALLS = {
    "decode": lambda: Linear(5, _triton_decode_kernels),
    "prefill": lambda: Linear(260, _triton_prefill_kernels),
    "8-bit decode": lambda: EightBit(5, _triton_decode_kernels),
    "8-bit prefill": lambda: EightBit(260, _triton_prefill_kernels),
    "grouped decode": lambda: Grouped(5, grouped_kernels),
    "grouped prefill": lambda: Grouped(260, grouped_kernels),
    "covariance": Covariance,
    "convolution": Convolution,
}
each_call = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)


def silently(run):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The kernel ")
        return run()


@each_call
def test_right_kernels_are_checked_once(make, monkeypatch):
    call, compared = make(), []
    reference = {Linear: linear, EightBit: linear, Grouped: grouped}.get(type(call), covariance).reference
    errors = reference.errors
    monkeypatch.setattr(reference, "errors", lambda *args: compared.append(errors(*args)) or compared[-1])
    for _ in range(2):
        call.is_right(silently(call.run))
    assert len(compared) == 1 and 0 < compared[0][0] <= compared[0][1]


PLANTED = {
    "8-bit decode": (CALLS["8-bit decode"], "load_scale", doubled),
    "8-bit prefill": (CALLS["8-bit prefill"], "load_scale", doubled),
    "decode": (CALLS["decode"], "store_tile", misplaced),
    "prefill": (CALLS["prefill"], "store_tile", misplaced),
    "grouped decode": (CALLS["grouped decode"], "store_tile", misplaced),
    "covariance": (Covariance, "add_to", half_added),
    "covariance, nothing": (Covariance, "add_to", nothing_added),
    "convolution": (Convolution, "add_to", half_added),
    "failed launch of decode": (CALLS["decode"], "up_kernel", broken),
    "failed launch of grouped prefill": (CALLS["grouped prefill"], "grouped_prefill_kernel", broken),
    "failed launch of covariance": (Covariance, "covariance_kernel", broken),
}


@pytest.mark.parametrize("make, function, fault", PLANTED.values(), ids=PLANTED)
def test_planted_kernels_are_replaced(make, function, fault, monkeypatch):
    call = make()
    monkeypatch.setattr(call.module, function, fault(getattr(call.module, function)))
    with pytest.warns(RuntimeWarning, match=f"of {call.op} .* report this message: .* triton 3.*, cpu, ") as caught:
        call.is_right(call.run())
    assert sum(str(warning.message).startswith("The kernel ") for warning in caught) == 1  # numpy may warn as well
    call.is_right(silently(call.run))
    assert "was wrong or failed in its first call" in call.explain()
    assert "triton" not in [line.split(":")[0] for line in call.explain().splitlines() if line.endswith("runs")]


@each_call
@pytest.mark.parametrize("how", ["backend", "environment", "named", "recorded"])
def test_without_the_check(make, how, monkeypatch):
    call = make()
    monkeypatch.setattr(_verify.FirstCall, "check", lambda *args: pytest.fail("it was checked"))
    if how == "environment":
        monkeypatch.setenv("LOWRANK_OPS_VERIFY", "off")
    if how == "recorded":
        regimes = "triton.decode", "triton.prefill"
        for kernel in ("triton", *regimes, *(f"{regime}.int8.int8" for regime in regimes)):
            key = call.op, kernel, _verify.compiler(call.op, Backend.TRITON)
            _verify.write_record("cpu", "the interpreter", {key: True})
    backend = {"backend": "unverified", "named": "triton"}.get(how, "auto")
    call.is_right(silently(lambda: call.run(backend=backend)))


@pytest.mark.parametrize("name", [name for name in PLANTED if not name.startswith("failed")])
def test_calls_that_cannot_be_checked_run_no_kernel(name, monkeypatch):
    make, function, fault = PLANTED[name]
    call = make()
    with monkeypatch.context() as capture:
        capture.setattr(_verify, "can_check", lambda x: False)
        capture.setattr(call.module, function, fault(getattr(call.module, function)))
        call.is_right(silently(call.run))
        assert not _verify._passed
    call.is_right(silently(call.run))
    assert len(_verify._passed) == 1


def test_zeros_and_overflow_show_nothing():
    x, down, up, bias = linear_inputs(5, in_features=40, rank=16, out_features=24, dtype=torch.float16)
    for x_without in (x * 0, x * float("inf")):
        silently(lambda x=x_without: lowrank_linear(x, down, up, bias))
        assert not _verify._passed
    x[2] = float("nan")
    silently(lambda: lowrank_linear(x, down, up, bias))
    assert len(_verify._passed) == 1
    state = torch.zeros(16, 16), torch.zeros(16)
    covariance_update_(*state, torch.zeros(8, 16))
    assert len(_verify._passed) == 1


@pytest.mark.parametrize("make", [Covariance, Convolution], ids=["matrix", "patches"])
def test_wide_problems_are_checked_in_part(make, monkeypatch):
    call, updated = make(), []
    errors = covariance.reference.errors
    monkeypatch.setattr(covariance.reference, "errors", lambda *args: updated.append(args[1].shape) or errors(*args))
    whole = "trial_conv" if make is Convolution else "trial"
    part = getattr(covariance, whole)
    monkeypatch.setattr(covariance, whole, lambda *args: part(*args, limit=16))
    call.is_right(silently(call.run))
    assert updated == [(1, 9 if make is Convolution else 19)]  # one channel of four, or from a multiple of 8 on
    assert len(_verify._passed) == 1


def test_doctor_records_what_is_right(monkeypatch):
    monkeypatch.setattr(verify, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(verify, "TOKENS", (3, 260))
    monkeypatch.setattr(verify, "LAYERS", ((24, 8, 16),))
    monkeypatch.setattr(verify, "EIGHT_BIT", [("int8", "int8"), (None, "fp8")])
    monkeypatch.setattr(verify, "MATRICES", ((20, 17),))
    monkeypatch.setattr(verify, "IMAGES", ((1, 4, 4, 5), (1, 2, 5, 3)))
    store = _triton_prefill_kernels.store_tile
    monkeypatch.setattr(_triton_prefill_kernels, "store_tile", misplaced(store))
    result = verify.verify(torch.device("cpu"), "the interpreter")
    assert result.code == 1 and "WRONG in" in result.text
    right = {(row["op"], row["kernel"]): not row["wrong"] for row in result.document["kernels"]}
    for formats in ("", ".int8.int8", ".bfloat16.float8_e4m3fn"):
        assert not right.pop(("lowrank_linear", f"triton.prefill{formats}"))
        assert ("lowrank_linear", f"triton.decode{formats}") in right
    assert not right.pop(("lowrank_linear_grouped", "triton.prefill"))
    assert len(right) == 6 and all(right.values())
    recorded = json.loads(Path(result.document["record"]).read_text())
    assert {(entry["op"], entry["kernel"]) for entry in recorded["kernels"]} == right.keys()
