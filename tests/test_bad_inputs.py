"""Bad inputs get the errors that docs/bad-inputs.md shows, and leave everything as it was."""

import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch

import lowrank_ops as lro
from tests import bad_inputs
from tests.bad_inputs import BAD, FOREIGN, PAGE

LINES = [(section, line, kind) for section, lines in BAD.items() for line, kind in lines]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names that the lines use, with their files in the working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("bad_inputs"))
        patch.syspath_prepend(str(Path()))
        yield bad_inputs.world()
        sys.modules.pop("my_project", None)
        importlib.invalidate_caches()


@pytest.fixture(scope="module")
def rows():
    """The rows of the page, by line."""
    found = {}
    for text in PAGE.read_text(encoding="utf-8").splitlines():
        if text.startswith("| `"):
            found[text.split("`")[1]] = text
    return found


@pytest.mark.parametrize(("section", "line", "kind"), LINES, ids=[line for _, line, _ in LINES])
def test_error_is_that_of_the_page(names, rows, section, line, kind):
    before = bad_inputs.state(names)
    raised, message = bad_inputs.outcome(names, line)
    assert raised == kind and message
    if section == FOREIGN:
        assert rows[line].startswith(f"| `{line}` | {kind} | `")
    else:
        assert rows[line] == bad_inputs.row(line, kind, message)
    after = bad_inputs.state(names)
    assert [name for name in {**before, **after} if before.get(name) != after.get(name)] == []


def test_page_has_the_lines_of_the_list(rows):
    assert len(rows) == len(LINES) >= 60
    assert PAGE.read_text(encoding="utf-8") == bad_inputs.page(rows)


def test_changes_would_be_noticed(names):
    """The check that nothing changed sees a weight, a flag, statistics, a file and random numbers."""
    changes = {
        "model": "model[0].weight.data[0, 0].add_(1)",
        "compressed": "compressed.eval()",
        "layer": "layer.register_forward_hook(print)",
        "covariances": "covariances['0'].activations.total.add_(1)",
        "text.txt": "Path('text.txt').write_text('other')",
        "random numbers": "torch.rand(())",
    }
    fresh = bad_inputs.world()
    for name, change in changes.items():
        before = bad_inputs.state(fresh)
        eval(change, fresh)
        after = bad_inputs.state(fresh)
        assert [other for other in after if before.get(other) != after[other]] == [name]
    Path("text.txt").write_text("text")


# Valid arguments of every public function that takes more than tensors; the test puts another object in place of each.
CALLS = {
    "lro.calibrate": "model=model, batches=batches, sensitivity='fisher'",
    "lro.plan_calibration": "model=model",
    "lro.Calibrator": "model=model",
    "lro.Calibrator(model).observe": "loss=loss, samples=40",
    "lro.recalibrate": "model=model, covariances=covariances, batches=batches",
    "lro.correct_predictions": "model=model, covariances=covariances, batches=batches",
    "lro.Covariances": "",
    "covariances.merge": "other=covariances",
    "covariances.save": "path='new'",
    "lro.Covariances.load": "path='covariances.safetensors'",
    "lro.utilization": "model=model, covariances=covariances",
    "lro.utilization(model, covariances).to_html": "path='new'",
    "lro.utilization(model, covariances).plot": "path='new'",
    "lro.ExplainedVariance": "",
    "lro.ParameterBudget": "fraction=0.5",
    "lro.FlopBudget": "fraction=0.5",
    "lro.ByteBudget": "fraction=0.5, form='int8'",
    "lro.LatencyBudget": "fraction=0.5, latencies=latencies",
    "lro.measure_latency": "model=model, batch=batches[0]",
    "latencies.save": "path='new'",
    "type(latencies).load": "path='list.json'",
    "lro.Ranks": "ranks={}",
    "lro.search_ranks": "model=model, covariances=covariances, evaluate=print, max_drop=0.1",
    "lro.measured_ranks": "model=model, covariances=covariances, batches=batches, fraction=0.8",
    "lro.CompressionConfig": "",
    "lro.CompressionConfig.from_json": "text='{}'",
    "lro.compress_": "model=model, covariances=covariances",
    "report.with_measured": "errors={}",
    "report.to_html": "path='new'",
    "report.plot": "path='new'",
    "lro.SequentialReconstruction": "batches=batches",
    "lro.BlockReconstruction": "batches=batches",
    "lro.measure_errors": "dense=model, compressed=compressed, batches=batches",
    "lro.LowRankLinear": "in_features=8, out_features=8, rank=4",
    "lro.LowRankLinear.from_linear": "linear=model[0], rank=4",
    "lro.LowRankConv2d": "in_channels=4, out_channels=8, kernel_size=3, rank=4",
    "lro.LowRankConv2d.from_conv2d": "conv=convolution, rank=4",
    "lro.layers.LowRankConv1d": "in_channels=4, out_channels=8, kernel_size=3, rank=4",
    "lro.layers.LowRankConv1d.from_conv1d": "conv=nn.Conv1d(4, 8, 3), rank=4",
    "layer": "x=batches[0]",
    "lro.finetune_": "student=compressed, batches=batches, teacher=model",
    "lro.save_pretrained": "model=compressed, path='new'",
    "lro.load_pretrained": "dense_model=model, path='folder'",
    "lro.ops.lowrank_experts": "x=layer.down, ends=torch.tensor([1]), downs=[layer.down], "
    "ups=[layer.up], biases=[None]",
    "lro.ops.lowrank_linear": "x=batches[0], down=layer.down, up=layer.up",
    "lro.ops.lowrank_linear_grouped": "x=batches[0], down=layer.down, ups=[layer.up]",
    "lro.ops.covariance_update_": "second_moment=layer.up, total=layer.up, x=layer.up",
    "lro.ops.conv_covariance_update_": "second_moment=layer.up, total=layer.up, x=layer.up, kernel_size=(3, 3)",
    "lro.ops.covariance_finalize_": "second_moment=layer.up",
    "lro.ops.explain": "op='lowrank_linear'",
    "lro.layers.to_dense_layers": "model=compressed",
    "lro.layers.to_plain_layers": "model=compressed",
}
WITHOUT = {"lro.CheckpointError", "lro.NonFiniteActivationError"}
WITHOUT |= {"lro.ops.decompositions", "lro.ops.Backend", "lro.ops.BackendUnavailableError"}  # no arguments, or no call


@pytest.mark.parametrize("function", CALLS)
def test_no_argument_may_be_any_object(names, function):
    """An object that nothing accepts, for each argument in turn, also for those that are added to a function later."""
    call = eval(function, names)
    valid = eval(f"dict({CALLS[function]})", names)
    before = bad_inputs.state(names)
    parameters = inspect.signature(call.forward if isinstance(call, torch.nn.Module) else call).parameters.values()
    checked = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.annotation != "Any"]
    assert checked or function in ("lro.measure_latency",)
    for name in checked:
        with pytest.raises(TypeError, match=rf"\b{name} must .*; got .*object"):
            call(**{**valid, name: object()})
    assert bad_inputs.state(names) == before


def test_every_public_function_is_called_so():
    public = {f"lro.{name}" for name in lro.__all__ if name != "ops"} | {f"lro.ops.{name}" for name in lro.ops.__all__}
    assert public - WITHOUT - set(CALLS) == set()
