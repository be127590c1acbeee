"""The suites: every arm of every case dry-run, those that run on a CPU run and right, and the files of results."""

import dataclasses
import importlib
import itertools
import json
import math
import sys

import pytest
import torch

from benchmarks import (
    bench_covariance,
    bench_cpu,
    bench_lowrank_linear,
    bench_model,
    models,
    rows,
    shapes,
    suite,
    tune,
    tuners,
)
from benchmarks.rows import distance, measure_case, truth
from tests.benchmarks.running import LIMITS, arguments

CPU = torch.device("cpu")
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


def test_of_all_cases_the_graded_ones_can_be_chosen(monkeypatch, quick):
    layers = [bench_lowrank_linear.case(shapes.Layer(24, 40, 8), rows, "fp32") for rows in (1, 6)]
    jobs = [suite.Job("calibration", {"model": name}, ["ours"], list) for name in ("one", "two")]
    asked = []
    monkeypatch.setattr(
        suite, "graded", lambda op, shape: asked.append(op) or 6 in shape.values() or "two" in shape.values()
    )
    made = suite.run("some", layers, arguments(graded=True), jobs=jobs)
    assert not made["complete"] and {row["shape"]["tokens"] for row in made["rows"]} == {6}
    assert asked == ["lowrank_linear", "lowrank_linear", "calibration", "calibration"]


def test_rows_of_other_tables_do_not_stand_beside_each_other(tmp_path, quick, monkeypatch, capsys):
    """The tuner has been there in between."""
    path, tables = tmp_path / "results.json", tmp_path / "tuned"
    monkeypatch.setattr(suite, "TABLES", tables)
    layer = [bench_lowrank_linear.case(shapes.Layer(24, 40, 8), 6, "fp32")]
    for choice, said in ((None, False), (None, False), ("a", True), ("a", False), ("b", True)):
        if choice:
            write_choice(tables, "op", choice)
        made = suite.run("some", layer, arguments(out=path, resume=True))
        assert ("tables changed" in capsys.readouterr().out) == said
        assert (made["environment"]["tables"] or {}).keys() == ({"op.sm90"} if choice else set())


@pytest.mark.parametrize(
    "name, own",
    [
        ("covariance", ["covariance_update", "conv_covariance_update"]),
        ("lowrank_linear", ["lowrank_linear"]),
        ("model", list(tuners.TUNERS)),
    ],
)
def test_tables_of_ops_that_a_suite_does_not_run_change_nothing_for_it(tmp_path, quick, monkeypatch, capsys, name, own):
    path, tables = tmp_path / "results.json", tmp_path / "tuned"
    monkeypatch.setattr(suite, "TABLES", tables)
    layer = [bench_lowrank_linear.case(shapes.Layer(24, 40, 8), 6, "fp32")]
    suite.run(name, layer, arguments(out=path, resume=True))
    for op in tuners.TUNERS:
        write_choice(tables, op, "a")
        suite.run(name, layer, arguments(out=path, resume=True))
        assert ("tables changed" in capsys.readouterr().out) == (op in own)


writings = itertools.count()


def write_choice(tables, op, choice):
    """As the tuner does, which says when; the time is another at every writing."""
    facts = {"device": "a GPU", "triton": "3", "commit": "abc", "date": f"day {next(writings)}"}
    entries = [{"shape": {"tokens": 1}, "impl": "cuda", "config": {"kernel": choice}, "us": 1.0}]
    tune.write_table(op, "sm90", facts, entries, tables)


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


def test_addmm_is_an_arm_where_torch_takes_it(monkeypatch):
    """Tried on the device: versions differ in whether a float32 state goes with 16-bit inputs."""
    arms = {arm.name: arm for arm in bench_covariance.case(96, 40, "bf16").arms}
    assert "torch_addmm" not in {arm.name for arm in bench_covariance.case(96, 40, "fp32").arms}
    assert "CUDA" in arms["torch_addmm"].unavailable(CPU)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **options: ones(*size, **options))
    answers = {"refused: RuntimeError: self and mat2 must have the same dtype": RuntimeError, "": None}
    for words, error in answers.items():

        def addmm(state, left, right, *, out_dtype, out, error=error):
            if error:
                raise error("self and mat2 must have the same dtype\nand more")
            return out.add_(left.to(out_dtype) @ right.to(out_dtype))

        monkeypatch.setattr(torch, "addmm", addmm)
        bench_covariance._has_addmm.cache_clear()
        reason = arms["torch_addmm"].unavailable(torch.device("cuda"))
        assert reason is None if error is None else reason.endswith(words)
    bench_covariance._has_addmm.cache_clear()
    state, x = torch.ones(40, 40), bench_covariance._random((96, 40), torch.bfloat16, CPU, 0)
    arms["torch_addmm"].run(state, None, x)
    torch.testing.assert_close(state, 1 + x.float().T @ x.float())
