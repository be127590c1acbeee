"""Rows: who is right, who is compared with whom, and the floors."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from benchmarks import rows, shapes, suite
from benchmarks.bench_lowrank_linear import case
from benchmarks.measure import Ceilings, Timing

CPU = torch.device("cpu")
LIMITS = Ceilings(1e10, {"float32": 5e10})
TINY = shapes.Layer(24, 40, 8)


def with_arms(*arms):
    return dataclasses.replace(case(TINY, 6, "fp32"), arms=tuple(rows.Arm(name, run) for name, run in arms))


def right(x, down, up, bias, weight):
    return F.linear(F.linear(x, down), up, bias)


def slightly_off(x, down, up, bias, weight):
    return right(x, down, up, bias, weight) + 1e-4


def nan(x, down, up, bias, weight):
    return right(x, down, up, bias, weight) * float("nan")


def short(x, down, up, bias, weight):
    return right(x, down, up, bias, weight)[:-1]


def broken(x, down, up, bias, weight):
    raise RuntimeError("no memory")


@pytest.mark.parametrize("wrong", [slightly_off, nan, short, broken])
def test_wrong_rows_come_first_and_are_in_no_speedup(wrong):
    measured, not_run = rows.measure_case(
        with_arms(("right", right), ("wrong", wrong), ("too", right)), CPU, LIMITS, 0.02
    )
    assert [row.arm for row in measured] == ["wrong", "right", "too"]
    assert [row.correct for row in measured] == [False, True, True]
    assert measured[0].speedup == {}
    assert set(measured[1].speedup) == {"too"} and set(measured[2].speedup) == {"right"}
    assert " x" not in (line := suite.line(measured[0])) and "faster" not in line
    assert "FAILED" in line if wrong is broken else "WRONG" in line
    assert not_run == {}


def test_a_speedup_is_the_ratio_of_medians():
    pair = [rows.Row("op", {}, name, median_us=time, correct=True) for name, time in (("slow", 30.0), ("fast", 10.0))]
    slow, fast = rows.compare(pair, ["slow", "fast"])
    assert fast.speedup == {"slow": pytest.approx(3)} and slow.speedup == {"fast": pytest.approx(1 / 3)}
    assert rows.compare([fast, slow], ["slow"])[0].speedup.keys() == {"slow"}


def test_floors_and_what_is_achieved():
    small = case(TINY, 6, "fp32")
    parameters = 8 * (24 + 40)
    assert small.flops == 2 * 6 * parameters
    assert small.bytes == 4 * (6 * (24 + 40) + parameters + 40)
    moving, unit = rows.floor_us(small, LIMITS)
    assert unit == "GB/s" and moving == pytest.approx(small.bytes / 1e10 * 1e6)
    computing, unit = rows.floor_us(small, Ceilings(1e20, {"float32": 5e10}))
    assert unit == "TFLOP/s" and computing == pytest.approx(small.flops / 5e10 * 1e6)
    # float32 on a machine with tensor cores: three bfloat16 products, where that is faster.
    parted, _ = rows.floor_us(small, Ceilings(1e20, {"float32": 5e10, "bfloat16": 3e11}))
    assert parted == pytest.approx(3 * small.flops / 3e11 * 1e6)

    row = rows.Row("op", {}, "arm", unit="GB/s", floor_us=2.0)
    rows.fill(row, small, Timing(8.0, 9.0, 10.0, 5))
    assert row.fraction_of_floor == 0.25 and row.achieved == pytest.approx(small.bytes / 8e-6 / 1e9)


def test_an_arm_that_cannot_run_says_why():
    measured, not_run = rows.measure_case(case(TINY, 6, "bf16"), CPU, LIMITS, 0.02)
    assert {row.arm for row in measured} == {"dense", "two_linears", "lowrank_ops auto", "lowrank_ops reference"}
    assert set(not_run) == {"two_linears compiled", "lowrank_ops triton", "lowrank_ops cuda"}
    assert "CUDA" in not_run["two_linears compiled"] and "triton" in not_run["lowrank_ops triton"]
    ours = next(row for row in measured if row.arm == "lowrank_ops auto")
    assert ours.implementation == "two_products" and set(ours.speedup) == {"dense", "two_linears"}
    assert all(row.correct and row.error <= row.allowed for row in measured)


def test_tensors_that_only_some_arms_read_do_not_count_as_rotated(monkeypatch):
    asked = []
    monkeypatch.setattr(rows, "copies_to_rotate", lambda tensors: asked.append(tensors) or 1)
    rows.measure_case(with_arms(("right", right)), CPU, LIMITS, 0.02)
    assert [tuple(tensor.shape) for tensor in asked[0]] == [(6, 24), (8, 24), (40, 8), (40,)]
