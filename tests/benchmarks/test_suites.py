"""The suites: every case can be planned without a GPU, and every variant that runs on a CPU is right there."""

import dataclasses
import json

import pytest
import torch

from benchmarks import (
    bench_covariance,
    bench_cpu,
    bench_grouped,
    bench_lowrank_linear,
    bench_model,
    bench_transformers,
    models,
    shapes,
    suite,
)
from benchmarks.harness import Peak, distance, measure_case, truth

CPU = torch.device("cpu")
PEAK = Peak(1e10, {"float32": 5e10})
TINY_VIT = models.TINY_SIZES["tiny ViT"]
SUITES = {
    "covariance": (bench_covariance, shapes.DTYPES),
    "lowrank_linear": (bench_lowrank_linear, ["bf16"]),
    "grouped": (bench_grouped, ["bf16"]),
    "model": (bench_model, ["bf16"]),
    "cpu": (bench_cpu, ["fp32"]),
    "transformers": (bench_transformers, ["fp32"]),
}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", SUITES)
def test_dry_run_shows_every_variant_of_every_case(name, quick):
    module, dtypes = SUITES[name]
    cases = [case for dtype in dtypes for case in module.cases(dtype, quick)]
    head, *blocks = "\n".join(suite.dry_run(cases)).split("\n\n")
    assert "stated peaks" in head and len(blocks) == len(cases) > 0
    for case, block in zip(cases, blocks, strict=True):
        title, *lines = block.splitlines()
        assert title.startswith(str(case)) and ("roofline" in title) == (case.flops > 0)
        assert [line.strip().partition(":")[0] for line in lines] == [variant.name for variant in case.variants]


def right_variants(case):
    rows, not_run = measure_case(case, CPU, PEAK, 0.02)
    assert all(row.correct for row in rows), rows
    return {row.variant for row in rows}, not_run


@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_covariances(dtype):
    names, not_run = right_variants(bench_covariance.case(96, 300, dtype))
    assert {"lowrank_ops auto", "lowrank_ops reference", "torch_mm" if dtype == "fp32" else "float32_product"} <= names
    assert {"symmetric_triton", "torch_mm compiled", "lowrank_ops triton"} <= not_run.keys()


def test_groups():
    names, not_run = right_variants(bench_grouped.case(shapes.Group("qkv", 40, (24, 16, 8), (8, 8, 8)), 3, "bf16"))
    assert names == {"dense", "two_linears", "lowrank_linear", "lowrank_ops auto", "lowrank_ops reference"}
    assert {"lowrank_ops triton", "lowrank_ops cuda"} <= not_run.keys()


def test_convolutions():
    names, _ = right_variants(bench_covariance.conv_case(shapes.Conv(2, 3, 9, 3, 2, 1), "bf16"))
    assert names == {"unfold_and_product", "lowrank_ops auto", "lowrank_ops reference"}


def test_a_covariance_that_forgets_a_row_is_wrong():
    case = bench_covariance.case(64, 40, "bf16")
    tensors = case.make(CPU, 0)
    exact, tolerance = truth(case, tensors)
    forgets = case.solve(lambda state, total, x: bench_covariance.float32_product(state, total, x[:-1]), tensors)
    assert distance(forgets, exact) > tolerance


def test_models_and_their_calibration():
    names, _ = right_variants(bench_model.case("tiny ViT", TINY_VIT, 0.5, 2, "eager", "fp32"))
    assert names == set(bench_model.VARIANTS)
    names, not_run = right_variants(bench_model.case("tiny ViT", TINY_VIT, 0.5, 2, "compiled", "fp32"))
    assert names == set() and set(not_run.values()) == {"needs a CUDA device"}
    for name, size in models.TINY_SIZES.items():
        rows, _ = measure_case(bench_model.calibration_case(name, size, 2, "fp32"), CPU, PEAK, 0.02)
        assert all(row.correct for row in rows)
        assert next(row for row in rows if row.variant == "lowrank_ops").speedup.keys() == {"forward", "hooks_float32"}


def test_modules_of_transformers():
    pytest.importorskip("transformers")
    names, _ = right_variants(bench_transformers.t5_case(bench_transformers.T5_TINY, 3, "fp32"))
    assert names == {"dense", "lowrank_ops"}
    names, _ = right_variants(bench_transformers.experts_case(bench_transformers.Experts(4, 32, 16, 2), 9, "fp32"))
    assert names == {"dense eager", "dense grouped_mm", "one by one", "one op", "padded grouped_mm"}


@pytest.mark.parametrize("name", models.TINY_SIZES)
def test_variants_of_a_model_compute_one_function(name):
    size = models.TINY_SIZES[name]
    thin = models.lowrank_model(size, 0.5, CPU, torch.float64)
    x = models.sample(size, 3, CPU, torch.float64)
    outputs = [models.variant(thin, which)(x) for which in bench_model.VARIANTS]
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=1e-9, atol=1e-9)
    dense = models.variant(thin, "dense")
    counts = [sum(p.numel() for n, p in model.blocks.named_parameters() if p.dim() == 2) for model in (thin, dense)]
    assert 0.3 < counts[0] / counts[1] <= 0.5


def test_model_sizes_are_as_published():
    for name, parameters in {"ViT-B/16": 86_567_656, "ViT-L/16": 304_326_632}.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in models.ViT(models.SIZES[name]).parameters()) == parameters


def test_models_are_compiled_for_every_batch(monkeypatch):
    """9 compilations of one model's code; Dynamo falls back to eager after 8 by default."""
    compiled, real = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def compile_(model, *, options, dynamic):
        assert options["triton.cudagraphs"] is True
        return real(model, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_)
    bench_model._model.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False), torch.no_grad():
        for batch in (1, 2, 3):
            case = bench_model.case("tiny ViT", TINY_VIT, 0.5, batch, "compiled", "fp32")
            tensors = case.make(CPU, 0)
            for variant in case.variants:
                before = len(compiled)
                case.solve(variant.run, tensors)
                case.solve(variant.run, tensors)
                assert len(compiled) == before + 1, (batch, variant.name)
    bench_model._model.cache_clear()
    bench_model._ready.cache_clear()
    torch.compiler.reset()


def test_the_cpu_suite(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "measure_peak", lambda device, clock: PEAK)
    monkeypatch.setattr(shapes, "CPU_COVARIANCE_FEATURES", (8, 16, 24))
    monkeypatch.setattr(shapes, "CPU_LAYERS", tuple(shapes.Layer(width, 40, 8) for width in (16, 24, 32)))
    overhead = bench_cpu.overhead
    monkeypatch.setattr(bench_cpu, "overhead", lambda mode: dataclasses.replace(overhead(mode), calls=2))
    path = tmp_path / "cpu.json"
    threads = torch.get_num_threads()
    assert bench_cpu.main(["--quick", "--seconds", "0.01", "--out", str(path)]) == 0
    torch.set_num_threads(threads)
    made = json.loads(path.read_text())["suites"]["cpu"]
    assert {row["shape"].get("features", row["shape"].get("in_features")) for row in made["rows"]} == {8, 16, 24, None}
    assert {row["shape"].get("mode") for row in made["rows"]} == {*bench_cpu.MODES, None}
    assert made["environment"]["threads"] == 1 and made["environment"]["clock"] == "thread_time"
