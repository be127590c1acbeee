"""What the benchmarks do on a GPU, on a simulated one: graphs that rotate tensors, warm-ups, peaks, compiled models."""

import dataclasses

import pytest
import torch

from benchmarks import bench_lowrank_linear, bench_model, measure, models, rows, shapes, suite
from tests.benchmarks.running import LIMITS, arguments
from tests.benchmarks.simulated_gpu import CALL, SimulatedGpu, on_gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    made = SimulatedGpu()
    made.install(monkeypatch)
    return made


def arm(gpu, cost, seen=None):
    """Takes ``cost`` microseconds, and notes which copy it is given, and in which circumstances."""

    def run(x):
        where = "capture" if gpu.capturing is not None else gpu.stream
        gpu.launch(lambda: None, cost)
        if seen is not None:
            seen.append((where, int(x[0])))

    return run


def copies(number):
    return [(on_gpu(torch.full((1,), float(copy))),) for copy in range(number)]


def test_a_graph_takes_every_copy_once_and_its_launch_does_not_count(gpu):
    """Nor does the head start that hides it, though the device is idle when a sample begins."""
    seen = []
    results = measure.time_arms(
        {"slow": arm(gpu, 30.0, seen), "fast": arm(gpu, 10.0)}, copies(3), 0.05, clock=gpu.clock
    )
    assert results["slow"].median == pytest.approx(30) and results["slow"].p90 == pytest.approx(30)
    assert results["fast"].median == pytest.approx(10)
    assert results["fast"].eager == pytest.approx(10 + CALL)
    warmed, captured = seen[:4], seen[4:7]
    assert warmed == [("default", 0), *[("side", 0)] * 3]
    assert captured == [("capture", 0), ("capture", 1), ("capture", 2)]
    later = seen[7:]  # eager calls; in turn with the other arm's, so not on the copy that it has just used
    assert {where for where, _ in later} == {"default"} and {copy for _, copy in later} == {0, 1, 2}


def test_an_arm_that_cannot_be_captured_leaves_the_others(gpu):
    def waits(x):
        gpu.launch(lambda: None, 1.0)
        torch.cuda.synchronize()

    results = measure.time_arms({"waits": waits, "fast": arm(gpu, 10.0)}, copies(2), 0.02, clock=gpu.clock)
    assert results["waits"].startswith("AssertionError: synchronized") and results["fast"].median == pytest.approx(10)


def on_simulated(gpu, made, cost):
    """A case whose tensors seem to be on a GPU, by arms that take ``cost`` microseconds there."""

    def launched(run):
        def call(*tensors):
            result = []
            gpu.launch(lambda: result.append(run(*tensors)), cost)
            return result[0] if result else None  # nothing is done under capture

        return call

    opponents = [one._replace(run=launched(one.run)) for one in made.arms if one.name in ("dense", "two_linears")]
    return dataclasses.replace(
        made,
        make=lambda device, seed: tuple(map(on_gpu, made.make(CPU, seed))),
        arms=tuple(opponents),
        pose=None,
    )


def test_a_case_on_a_gpu(gpu, monkeypatch):
    made = on_simulated(gpu, bench_lowrank_linear.case(shapes.Layer(24, 40, 8), 6, "fp32"), 25.0)
    monkeypatch.setattr(measure, "MOST_COPIES", 7)
    used = []
    times = measure.time_arms
    monkeypatch.setattr(
        rows, "time_arms", lambda arms, rotation, *rest: used.append(rotation) or times(arms, rotation, *rest)
    )
    for graph, number, median in ((True, 7, 25.0), (False, 1, 25.0 + CALL)):
        measured, not_run = rows.measure_case(dataclasses.replace(made, graph=graph), CUDA, LIMITS, 0.02, gpu.clock)
        assert not_run == {} and [row.arm for row in measured] == ["dense", "two_linears"]
        for row in measured:
            assert row.correct and row.median_us == pytest.approx(median) and row.eager_us == pytest.approx(25 + CALL)
            assert row.peak_mb == 5.0
        assert len(used.pop()) == number
    assert gpu.log == ["peak reset"] * 4


def test_a_suite_on_a_gpu(gpu, quick, tmp_path, monkeypatch, capsys):
    facts = {"device": "a GPU in name only"}
    monkeypatch.setattr(suite, "environment", lambda device, commit: {**facts, "asked": device.type})
    made = on_simulated(gpu, bench_lowrank_linear.case(shapes.Layer(24, 40, 8), 6, "fp32"), 25.0)
    path = tmp_path / "results.json"
    ran = suite.run("some", [made], arguments(out=path, device="cuda"), gpu.clock)
    assert suite.finish(ran, "some", path) == 0 and ran["environment"]["asked"] == "cuda"
    assert [row["median_us"] for row in suite.load(path)["suites"]["some"]["rows"]] == pytest.approx([25.0, 25.0])


@pytest.fixture
def compiler(monkeypatch):
    """Counts what ``torch.compile`` is given in place of Inductor, and undoes what the benchmarks set."""
    counted, real = [], torch.compile

    def backend(graph, inputs):
        counted.append(graph)
        return graph.forward

    def compile_(model, *, options, dynamic):
        assert options["triton.cudagraphs"] is True
        return real(model, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_)
    bench_model._model.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False), torch.no_grad():
        yield counted
    bench_model._model.cache_clear()
    bench_model._ready.cache_clear()
    torch.compiler.reset()


def test_every_variant_is_compiled_for_every_batch(compiler):
    """12 compilations of one model's code, where Dynamo runs it eagerly after 8 unless told otherwise."""
    size = models.SMOKE_SIZES["tiny ViT"]
    for batch in (1, 2, 3, 4):
        made = bench_model.case("tiny ViT", size, 0.5, batch, "compiled", "fp32")
        tensors = made.make(CPU, 0)
        for one in made.arms:
            before = len(compiler)
            made.solve(one.run, tensors)
            made.solve(one.run, tensors)
            assert len(compiler) == before + 1, (batch, one.name)


def test_a_new_model_takes_the_place_of_the_one_before(compiler):
    """With all that was compiled of it: CUDA graphs keep their memory as long as they can be called."""
    size = models.SMOKE_SIZES["tiny ViT"]
    first = bench_model._ready(size, 0.5, "dense", "compiled", CPU, torch.float32)
    first(models.sample(size, 1, CPU, torch.float32))
    assert bench_model._ready.cache_info().currsize == 1
    assert torch._dynamo.eval_frame._debug_get_cache_entry_list(models.ViT.forward)
    bench_model._ready(size, 0.25, "dense", "eager", CPU, torch.float32)
    assert bench_model._ready.cache_info().currsize == 1
    assert not torch._dynamo.eval_frame._debug_get_cache_entry_list(models.ViT.forward)
