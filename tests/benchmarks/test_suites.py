"""The suites: every arm of every case dry-run, those that run on a CPU run and right, and the files of results."""

import argparse
import dataclasses
import importlib
import json
import math
import sys
import types

import pytest
import torch

from benchmarks import bench_covariance, bench_cpu, bench_lowrank_linear, bench_model, models, rows, shapes, suite, tune
from benchmarks.measure import Ceilings, Timing
from benchmarks.rows import distance, measure_case, truth

CPU = torch.device("cpu")
LIMITS = Ceilings(1e10, {"float32": 5e10})
CASES = {
    "covariance": lambda: [case for dtype in shapes.DTYPES for case in bench_covariance.all_cases(dtype)],
    "lowrank_linear": lambda: list(bench_lowrank_linear.cases("bf16")),
    "model": lambda: list(bench_model.cases(models.SMOKE_SIZES, (1, 2), "bf16")),
    "cpu": lambda: list(bench_cpu.cases()),
}


@pytest.mark.parametrize("name", CASES)
def test_dry_run_shows_every_arm_of_every_case(name):
    cases = CASES[name]()
    blocks = "\n".join(suite.dry_run(cases)).split("\n\n")
    assert "floors from stated ceilings" in blocks[0] and len(blocks) == len(cases) + 1
    for case, block in zip(cases, blocks[1:], strict=True):
        head, *lines = block.splitlines()
        assert head.startswith(suite.label(case)) and "floor" in head
        shown = [line.strip().partition(":")[0] for line in lines if line.startswith("  ") and line[2] != " "]
        assert shown == [arm.name for arm in case.arms]


def test_dry_run_plans_for_the_gpu_that_is_not_here():
    layer = shapes.Layer(4096, 4096, 512)
    decode, large = ("\n".join(suite.dry_run([bench_lowrank_linear.case(layer, rows, "bf16")])) for rows in (16, 65536))
    assert "triton.decode: runs" in decode and "triton.decode: cannot run" in large
    assert "dense: would run" in decode and "cuda.decode: cannot run" in large
    covariance = "\n".join(suite.dry_run([bench_covariance.case(65536, 1024, "bf16")]))
    # 65536 * 1024 * 1025 operations at 790 TFLOP/s
    assert "floor 87.1 us, bound by TFLOP/s" in covariance and "triton: runs" in covariance


@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_covariance_arms_on_a_cpu(dtype):
    measured, not_run = measure_case(bench_covariance.case(96, 300, dtype), CPU, LIMITS, 0.02)
    names = {row.arm for row in measured}
    assert {"lowrank_ops auto", "lowrank_ops reference"} < names
    assert ("torch_mm" in names) == (dtype == "fp32") and ("float32_product" in names) == (dtype != "fp32")
    assert all(row.correct for row in measured), measured
    assert {"symmetric_triton", "quack_gemm_symmetric", "lowrank_ops triton"} <= set(not_run)


def test_convolution_arms_on_a_cpu():
    conv = shapes.Conv(2, 3, 9, 3, 2, 1)
    measured, _ = measure_case(bench_covariance.conv_case(conv, "bf16"), CPU, LIMITS, 0.02)
    assert [row.arm for row in measured] == ["unfold_and_product", "lowrank_ops auto", "lowrank_ops reference"]
    assert all(row.correct for row in measured), measured


def test_a_wrong_covariance_is_seen():
    case = bench_covariance.case(64, 40, "bf16")
    tensors = case.make(CPU, 0)

    def forgets_a_row(state, total, x):
        bench_covariance.float32_product(state, total, x[:-1])

    exact, allowed = truth(case, tensors)
    assert distance(case.solve(bench_covariance.float32_product, tensors), exact) <= allowed
    assert distance(case.solve(forgets_a_row, tensors), exact) > allowed


@pytest.mark.parametrize("name", models.SMOKE_SIZES)
def test_model_variants_compute_one_function_with_the_parameters_promised(name):
    size = models.SMOKE_SIZES[name]
    thin = models.lowrank_model(size, 0.5, CPU, torch.float64)
    x = models.sample(size, 3, CPU, torch.float64)
    outputs = [models.variant(thin, which)(x) for which in bench_model.VARIANTS]
    for output in outputs:
        assert output.shape == ((3, 1000) if size.kind == "vit" else x.shape)
        torch.testing.assert_close(output, outputs[0], rtol=1e-9, atol=1e-9)
    dense = models.variant(thin, "dense")
    counts = [sum(p.numel() for n, p in model.blocks.named_parameters() if p.dim() == 2) for model in (thin, dense)]
    assert 0.3 < counts[0] / counts[1] <= 0.5


def test_true_model_sizes():
    """Parameters as published for ViT-B/16 and ViT-L/16 at 224 pixels, counted without allocating them."""
    published = {"ViT-B/16": 86_567_656, "ViT-L/16": 304_326_632}
    for name, parameters in published.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in models.ViT(models.SIZES[name]).parameters()) == parameters


def test_models_on_a_cpu_and_their_calibration():
    eager, compiled = (
        bench_model.case("tiny ViT", models.SMOKE_SIZES["tiny ViT"], 0.5, 2, mode, "fp32")
        for mode in ("eager", "compiled")
    )
    with torch.no_grad():
        measured, _ = measure_case(eager, CPU, LIMITS, 0.02)
        assert [row.arm for row in measured] == list(bench_model.VARIANTS) and all(row.correct for row in measured)
        assert measure_case(compiled, CPU, LIMITS, 0.02) == (
            [],
            dict.fromkeys(bench_model.VARIANTS, "needs a CUDA device"),
        )
    for name, size in models.SMOKE_SIZES.items():
        with torch.no_grad():
            rows = bench_model.calibration_rows(name, size, 2, CPU, "fp32", 0.02)
        assert [row.arm for row in rows] == list(bench_model.CALIBRATIONS)
        assert all(row.correct for row in rows) and set(rows[2].speedup) == {"forward", "hooks_float32"}


def test_overheads_of_an_op():
    measured, parts = bench_cpu.overheads(0.01)
    assert {row.shape["mode"] for row in measured} == set(bench_cpu.MODES) and len(measured) == 5 * len(bench_cpu.MODES)
    assert all(row.correct and row.median_us > 0 for row in measured)
    assert set(parts) == {"modes", "decision"} and min(parts.values()) > 0


def arguments(**changes):
    options = {"dry_run": False, "device": "cpu", "seconds": 0.02, "only": "", "out": None}
    options |= {"resume": False, "budget": float("inf"), "commit": None}
    return argparse.Namespace(**options | changes)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(suite, "ceilings", lambda device, clock: LIMITS)


def test_results_of_suites_lie_side_by_side(tmp_path, quick, capsys):
    path = tmp_path / "results.json"
    layer = [bench_lowrank_linear.case(shapes.Layer(24, 40, 8), 6, "fp32")]
    for name in ("first", "second", "first"):
        made = suite.run(name, layer, arguments(out=path))
        assert suite.finish(made, name, path) == 0
    document = json.loads(path.read_text())
    assert set(document["suites"]) == {"first", "second"}
    for made in document["suites"].values():
        assert made["complete"] and len(made["rows"]) == 4 and made["environment"]["commit"]
        assert made["ceilings"] == {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": {"float32": 0.05}}
        assert "lowrank_ops triton" in made["not_run"]
    assert not list(tmp_path.glob("*.partial"))
    assert "x two_linears" in capsys.readouterr().out


def test_a_choice_of_cases_is_no_complete_suite(quick, capsys):
    layers = [bench_lowrank_linear.case(shapes.Layer(24, 40, 8), rows, "fp32") for rows in (1, 6)]
    made = suite.run("some", layers, arguments(only="tokens=6"))
    assert not made["complete"] and {row["shape"]["tokens"] for row in made["rows"]} == {6}


def test_a_suite_goes_on_where_its_budget_ended(tmp_path, quick, monkeypatch, capsys):
    path = tmp_path / "results.json"
    layers = [bench_lowrank_linear.case(shapes.Layer(24, 40, 8), rows, "fp32") for rows in (1, 2, 3)]
    seen = []
    measure = suite.measure_case
    monkeypatch.setattr(
        suite, "measure_case", lambda case, *rest: seen.append(case.shape["tokens"]) or measure(case, *rest)
    )

    def go(budget=float("inf"), **changes):
        made = suite.run("some", layers, arguments(out=path, resume=True, budget=budget, **changes))
        return made, suite.finish(made, "some", path)

    made, code = go(budget=0)
    assert seen == [] and code == suite.UNFINISHED and len(made["left"]) == 3 and not made["complete"]
    assert suite.run("some", layers, arguments(out=path, only="tokens=2"))["rows"]  # as if killed in the middle
    assert seen == [2]
    made, code = go()
    assert seen == [2, 1, 3] and code == 0 and made["complete"] and made["left"] == []
    assert {row["shape"]["tokens"] for row in made["rows"]} == {1, 2, 3} and len(made["environment"]["resumed"]) == 1
    assert json.loads(path.read_text())["suites"]["some"] == made
    go()
    assert seen == [2, 1, 3]
    capsys.readouterr()
    go(commit="another")
    assert seen == [2, 1, 3, 1, 2, 3] and "commit changed" in capsys.readouterr().out
    suite.run("some", layers, arguments(out=path))
    assert len(seen) == 9  # without --resume from the beginning


def rows_by_arm(made, tokens):
    return {row["arm"]: row for row in made["rows"] if row["shape"]["tokens"] == tokens}


def test_resuming_asks_again_what_failed_and_keeps_what_is_complete(tmp_path, quick, monkeypatch, capsys):
    path, seen, memory = tmp_path / "results.json", [], []
    whole, starved, wrong = (bench_lowrank_linear.case(shapes.Layer(24, 40, 8), tokens, "fp32") for tokens in (1, 2, 3))
    opponent, honest = starved.arms[1].run, wrong.arms[3].run

    def hungry(*tensors):
        if not memory:
            raise torch.OutOfMemoryError("too much")
        return opponent(*tensors)

    starved = dataclasses.replace(starved, arms=(starved.arms[1]._replace(run=hungry), *starved.arms[2:]))
    lying = wrong.arms[3]._replace(run=lambda *tensors: honest(*tensors) + 1)
    failing = wrong.arms[1]._replace(run=lambda *tensors: 1 / 0)
    wrong = dataclasses.replace(wrong, arms=(failing, lying))
    measure = suite.measure_case
    monkeypatch.setattr(
        suite, "measure_case", lambda case, *rest: seen.append(case.shape["tokens"]) or measure(case, *rest)
    )

    def go():
        made = suite.run("some", [whole, starved, wrong], arguments(out=path, resume=True))
        assert suite.finish(made, "some", path) == 1 and made["complete"]  # one result of ours is wrong
        assert json.loads(path.read_text())["suites"]["some"]["rows"] == made["rows"]
        return made

    first = go()
    assert rows_by_arm(first, 2)["two_linears"]["failure"] == "OutOfMemoryError: too much"
    assert "two_linears" not in rows_by_arm(first, 2)["lowrank_ops auto"]["speedup"] and seen == [1, 2, 3]
    capsys.readouterr()
    for run in range(1, 4):
        memory += [True] * (run == 2)
        made = go()
        shown = capsys.readouterr().out
        assert seen == [1, 2, 3, 2, 2][: 3 + run] and ("tokens=2" in shown) == ("once more" in shown) == (run < 3)
        assert len(made["rows"]) == len(first["rows"])
        for tokens in (1, 3):  # a wrong result stays, whatever failed beside it
            assert rows_by_arm(made, tokens) == rows_by_arm(first, tokens)
        for row in rows_by_arm(made, 2).values():
            assert row["correct"] == (run > 1 or row["arm"] != "two_linears")
        assert ("two_linears" in rows_by_arm(made, 2)["lowrank_ops auto"]["speedup"]) == (run > 1)


@pytest.fixture
def layers(quick, monkeypatch):
    """Three cases of one arm; each takes a minute of a clock of its own, and fails as ``ends`` says of its tokens."""
    minutes, ends = [0], {}
    monkeypatch.setattr(suite, "time", types.SimpleNamespace(perf_counter=lambda: 60 * minutes[0]))

    def measure(case, *rest):
        minutes[0] += 1
        end = ends.get(case.shape["tokens"])
        if isinstance(end, BaseException):
            raise end
        row = rows.Row(case.op, dict(case.shape), "lowrank_ops auto", failure=end, correct=end is None)
        if end is None:
            row.median_us, row.p90_us, row.eager_us, row.samples = Timing(1.0, 1.0, 1.0, 5)
        return [row], {}

    monkeypatch.setattr(suite, "measure_case", measure)
    cases = [bench_lowrank_linear.case(shapes.Layer(24, 40, 8), tokens, "fp32") for tokens in (1, 2, 3)]
    return cases, minutes, ends


def test_what_always_fails_lets_calls_with_a_budget_end(tmp_path, layers, capsys):
    cases, minutes, ends = layers
    ends.update(dict.fromkeys((1, 2, 3), "OutOfMemoryError: too much"))
    path = tmp_path / "results.json"
    codes, asked = [], []
    for _ in range(10):
        made = suite.run("some", cases, arguments(out=path, resume=True, budget=50))  # of one case
        codes.append(suite.finish(made, "some", path))
        asked.append(capsys.readouterr().out.partition("tokens=")[2][0])
        assert made["complete"] == (len(codes) > 2)
    assert "".join(asked) == "123" + "1" + "123" + "123"
    assert codes == [3, 3, 3, 1] + [3, 3, 1] * 2
    made = suite.run("some", cases, arguments(out=path, resume=True))
    assert suite.finish(made, "some", path) == 1 and minutes == [13]  # each once in a call without a budget


def test_what_ends_the_process_does_not_stand_in_the_way(tmp_path, layers, capsys):
    """A kill, for which KeyboardInterrupt stands, leaves the case failed in the file: it comes last from then on."""
    cases, _, ends = layers
    path = tmp_path / "results.json"
    command = arguments(out=path, resume=True)
    ends.update({1: KeyboardInterrupt(), 2: "too much"})
    all_asked = {1: suite.LOST, 2: "too much", 3: None}
    for found, left in (({1: suite.LOST}, [2, 3]), (all_asked, []), (all_asked, [2])):
        with pytest.raises(KeyboardInterrupt):
            suite.run("some", cases, command)
        made = json.loads(path.read_text())["suites"]["some"]
        assert {row["shape"]["tokens"]: row["failure"] for row in made["rows"]} == found
        assert made["left"] == [suite.label(cases[tokens - 1]) for tokens in left] and not made["complete"]
    for failed in (1, 0):  # what was left over; all that failed
        made = suite.run("some", cases, command)
        assert suite.finish(made, "some", path) == failed and made["complete"] and len(made["rows"]) == 3
        assert made["rows"][0]["failure"] == (suite.LOST if failed else None)
        ends.clear()


def test_a_case_that_fails_as_a_whole_is_told_of_and_the_others_go_on(tmp_path, quick, capsys):
    path, memory, seen = tmp_path / "results.json", [], []

    def starved(case, part):
        whole = getattr(case, part)

        def hungry(*tensors):
            seen.append(case.shape["tokens"])
            if not memory:
                raise torch.OutOfMemoryError("too much")
            return whole(*tensors)

        return dataclasses.replace(case, **{part: hungry})

    inputs, truth, whole = (bench_lowrank_linear.case(shapes.Layer(24, 40, 8), tokens, "fp32") for tokens in (1, 2, 3))
    cases = [starved(inputs, "make"), starved(truth, "exact"), starved(whole, "solve")]

    def work():
        timed = [9.0] * (3 if memory else 3 / 0)
        return [rows.Row("job", {"tokens": 4}, "lowrank_ops", None, *timed, correct=True)]

    jobs = [suite.Job("job", {"tokens": 4}, ["lowrank_ops"], work)]

    def go():
        made = suite.run("some", cases, arguments(out=path, resume=True), jobs=jobs)
        return made, suite.finish(made, "some", path)

    for again in (False, True):
        made, code = go()
        assert code == 1 and made["complete"] and json.loads(path.read_text())["suites"]["some"] == made
        for tokens in (1, 2, 3, 4):
            (row,) = rows_by_arm(made, tokens).values()
            failure = "OutOfMemoryError: too much" if tokens < 4 else "ZeroDivisionError: division by zero"
            assert row["arm"] == suite.EVERY_ARM and row["failure"] == failure
            assert not row["correct"] and row["speedup"] == {} and row["median_us"] is None
        shown = capsys.readouterr()
        assert shown.out.count(f"{suite.EVERY_ARM:44} FAILED: ") == 4 == shown.err.count(f"{suite.EVERY_ARM}: FAILED: ")
        assert shown.out.count("once more") == 4 * again
    memory.append(True)
    made, code = go()
    assert code == 0 and suite.EVERY_ARM not in {row["arm"] for row in made["rows"]} and set(seen) == {1, 2, 3}


def test_what_breaks_the_device_ends_the_process_but_not_the_suite(tmp_path, layers, monkeypatch, capsys):
    """Nothing that follows in the process can be measured: further calls go on behind the case, and come to an end."""
    cases, minutes, ends = layers
    ends.update({1: "CUDA error", 2: "CUDA error"})
    broken = []
    measure = suite.measure_case

    def breaks(case, *rest):
        assert not broken
        if case.shape["tokens"] in ends:
            broken.append(True)
        return measure(case, *rest)

    monkeypatch.setattr(suite, "measure_case", breaks)
    monkeypatch.setattr(suite, "usable", lambda device: not broken)
    path = tmp_path / "results.json"
    codes = []
    while not codes or codes[-1] == suite.UNFINISHED:
        broken.clear()
        codes.append(suite.finish(suite.run("some", cases, arguments(out=path, resume=True)), "some", path))
    # 1; 2; 3 and, once more, 1
    assert codes == [3, 3, 1] and minutes == [4]
    made = json.loads(path.read_text())["suites"]["some"]
    assert {row["shape"]["tokens"]: row["correct"] for row in made["rows"]} == {1: False, 2: False, 3: True}


def test_a_device_that_refuses_all_work_is_seen(monkeypatch, capsys):
    def refuses(*device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    assert suite.usable(CPU) and suite.usable(torch.device("cuda"))
    for name in ("synchronize", "empty_cache"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, name, refuses)
            assert suite.usable(CPU) and not suite.usable(torch.device("cuda"))
        assert "ends here: RuntimeError: CUDA error" in capsys.readouterr().err


def test_nothing_is_right_where_torch_itself_is_not_finite():
    """Its error, by which others' is measured, is infinite then, and so would be what they are allowed."""
    case = bench_lowrank_linear.case(shapes.Layer(24, 40, 8), 6, "fp32")
    overflowing = dataclasses.replace(
        case, make=lambda device, seed: tuple(tensor * 1e30 for tensor in case.make(device, seed))
    )
    measured, _ = measure_case(overflowing, CPU, LIMITS, 0.02)
    assert len(measured) == 4 and not any(row.correct or row.speedup for row in measured)
    assert "WRONG: error inf, allowed inf" in suite.line(measured[0])
    assert tune._wrong(overflowing, bench_lowrank_linear.two_linears, case.make(CPU, 0), torch.zeros(6, 40), math.inf)


def test_what_the_check_found_outlasts_a_failure_after_it():
    """After an arm that breaks the device not even inputs can be made: that arm is told apart from the others."""
    case = bench_lowrank_linear.case(shapes.Layer(24, 40, 8), 6, "fp32")

    def make(device, seed):
        if seed:
            raise RuntimeError("refused")
        return case.make(device, seed)

    breaking = case.arms[1]._replace(run=lambda *tensors: 1 / 0)
    lying = case.arms[3]._replace(run=lambda *tensors: case.arms[3].run(*tensors) + 1)
    broken = dataclasses.replace(case, make=make, arms=(case.arms[0], breaking, lying))
    measured, _ = measure_case(broken, CPU, LIMITS, 0.02)
    failures = {row.arm: row.failure for row in measured}
    refused = "RuntimeError: refused"
    assert failures == {
        "dense": refused, "two_linears": "ZeroDivisionError: division by zero", "lowrank_ops auto": refused
    }  # fmt: skip
    assert not any(row.correct or row.speedup for row in measured)
    assert suite._wrong(next(row for row in measured if row.arm == "lowrank_ops auto").to_dict())


def test_asking_again_does_not_cost_what_was_measured(tmp_path, quick, monkeypatch, capsys):
    """Less than before is not taken, such as where memory became scarcer; a wrong result is."""
    case = bench_lowrank_linear.case(shapes.Layer(24, 40, 8), 1, "fp32")
    answers = iter(
        [{"a": None, "b": "too much"}, {"a": "too much", "b": "too much"}, "too much", {"a": 9.0, "b": "too much"}]
    )

    def measure(case, *rest):
        found, answer = [], next(answers)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        for arm, end in answer.items():
            row = rows.Row(case.op, dict(case.shape), arm, allowed=1.0, correct=end is None)
            row.error, row.failure = (end, None) if isinstance(end, float) else (None, end)
            row.median_us = row.p90_us = row.eager_us = 1.0
            found.append(row)
        return found, {}

    monkeypatch.setattr(suite, "measure_case", measure)
    path = tmp_path / "results.json"
    for a in (None, None, None, 9.0, 9.0):
        made = suite.run("some", [case], arguments(out=path, resume=True))
        suite.finish(made, "some", path)
        assert {row["arm"]: row["failure"] for row in made["rows"]} == {"a": None, "b": "too much"}
        assert next(row["error"] for row in made["rows"] if row["arm"] == "a") == a
    assert next(answers, "asked no more") == "asked no more"


def test_a_wrong_result_of_ours_is_an_exit_code(quick, monkeypatch, capsys):
    case = bench_lowrank_linear.case(shapes.Layer(24, 40, 8), 6, "fp32")
    honest = case.arms[3].run
    lying = case.arms[3]._replace(run=lambda *tensors: honest(*tensors) + 1)
    made = suite.run("wrong", [dataclasses.replace(case, arms=(*case.arms[:3], lying))], arguments())
    assert made["rows"][0]["arm"] == "lowrank_ops auto" and made["rows"][0]["speedup"] == {}
    assert suite.finish(made, "wrong", None) == 1
    assert "lowrank_ops auto: WRONG: error 1" in capsys.readouterr().err


def test_every_kind_of_trouble_is_told(capsys):
    """Also a result that is wrong by no distance, such as forward passes that are not finite."""
    told = {
        "FAILED: too much": rows.Row("op", {}, "lowrank_ops", failure="too much", error=2.0, allowed=1.0),
        "WRONG: error 2, allowed 1": rows.Row("op", {}, "lowrank_ops", error=2.0, allowed=1.0),
        "WRONG": rows.Row("op", {}, "lowrank_ops"),
    }
    for text, row in told.items():
        assert suite.line(row).endswith(f" {text}")
        made = {"environment": {}, "rows": [row.to_dict()], "not_run": {}}
        assert suite.finish(made, "some", None) == 1
        assert capsys.readouterr().err == f"op {{}} lowrank_ops: {text}\n"


@pytest.mark.parametrize("module", ["bench_covariance", "bench_lowrank_linear", "bench_model", "bench_cpu"])
def test_command_lines_dry_run(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--dry-run", "--only", "nothing of this name"])
    entry = importlib.import_module(f"benchmarks.{module}")
    if module in ("bench_covariance", "bench_lowrank_linear"):
        made = entry.all_cases if module == "bench_covariance" else entry.cases
        assert suite.main("name", made, entry.__doc__, "bf16") == 0
    else:
        assert entry.main() == 0
    assert "floors from stated ceilings" in capsys.readouterr().out


def test_a_dry_run_of_the_models_shows_calibrations(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_model", "--smoke", "--dry-run", "--only", "calibration"])
    assert bench_model.main() == 0
    shown = capsys.readouterr().out
    for name in models.SMOKE_SIZES:
        assert f"calibration model={name} batch=1" in shown
    assert shown.count("would run") == len(models.SMOKE_SIZES) * len(bench_model.CALIBRATIONS)


def test_the_smoke_models_resume(tmp_path, quick, monkeypatch, capsys):
    path = tmp_path / "model.json"
    command = ["bench_model", "--smoke", "--device", "cpu", "--dtype", "fp32", "--seconds", "0.01", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", [*command, "--budget", "0"])
    with torch.no_grad():
        assert bench_model.main() == suite.UNFINISHED
        monkeypatch.setattr(sys, "argv", [*command, "--resume"])
        assert bench_model.main() == 0
        calibration_rows = bench_model.calibration_rows
        monkeypatch.setattr(bench_model, "calibration_rows", None)  # would raise
        monkeypatch.setattr(sys, "argv", [*command, "--resume"])
        assert bench_model.main() == 0
        made = json.loads(path.read_text())["suites"]["model"]
        assert made["complete"] and {row["op"] for row in made["rows"]} == {"model", "calibration"}
        row = next(row for row in made["rows"] if row["op"] == "calibration")
        row.update(failure="OutOfMemoryError: too much", correct=False, median_us=None, speedup={})
        suite.save(path, "model", made)
        seen = []
        monkeypatch.setattr(
            bench_model, "calibration_rows", lambda name, *rest: seen.append(name) or calibration_rows(name, *rest)
        )
        assert bench_model.main() == 0
    made = json.loads(path.read_text())["suites"]["model"]
    assert seen == [row["shape"]["model"]] and all(row["correct"] for row in made["rows"])


def test_the_quick_cpu_suite_takes_the_smaller_cases_and_tells_its_time(tmp_path, quick, monkeypatch, capsys):
    bench_cpu = importlib.import_module("benchmarks.bench_cpu")
    for name, value in (("CPU_COVARIANCE_FEATURES", (8, 16, 24)), ("CPU_COVARIANCE_TOKENS", 32), ("CPU_TOKENS", (1,))):
        monkeypatch.setattr(shapes, name, value)
    monkeypatch.setattr(shapes, "CPU_LAYERS", tuple(shapes.Layer(width, 40, 8) for width in (16, 24, 32)))
    monkeypatch.setattr(bench_cpu, "CALLS", 2)
    path = tmp_path / "cpu.json"
    monkeypatch.setattr(sys, "argv", ["bench_cpu", "--quick", "--seconds", "0.01", "--out", str(path)])
    assert bench_cpu.main() == 0
    made = json.loads(path.read_text())["suites"]["cpu"]
    sizes = {row["shape"].get("features", row["shape"].get("in_features")) for row in made["rows"]}
    assert sizes == {8, 16, 24, None} and not made["complete"] and made["seconds"] > 0
    assert "s of them on the processor" in capsys.readouterr().out


def test_opponents_of_the_gpu_can_be_imported():
    pytest.importorskip("triton")
    assert callable(importlib.import_module("benchmarks.symmetric_kernel").symmetric_product)
    assert callable(bench_lowrank_linear._compiled())
