"""The public names: few, documented, and the same as in README."""

import inspect

import pytest

import lowrank_ops as lro

NAMES = {
    "BlockReconstruction", "ByteBudget", "correct_predictions", "measured_ranks",
    "calibrate", "Calibrator", "CheckpointError", "compress_", "CompressionConfig", "Covariances", "ExplainedVariance",
    "finetune_", "FlopBudget", "LatencyBudget", "load_pretrained", "LowRankConv2d", "LowRankLinear", "measure_errors",
    "measure_latency", "NonFiniteActivationError", "ops", "ParameterBudget", "plan_calibration", "Ranks", "recalibrate",
    "save_pretrained", "search_ranks", "SequentialReconstruction", "utilization",
}  # fmt: skip
OPS = {
    "Backend", "BackendUnavailableError", "conv_covariance_update_", "covariance_finalize_", "covariance_update_",
    "decompositions", "explain", "lowrank_experts", "lowrank_linear", "lowrank_linear_grouped",
}  # fmt: skip
DOCUMENTED = sorted(NAMES - {"ops"})
FUNCTIONS = [name for name in DOCUMENTED if not inspect.isclass(getattr(lro, name))]


def test_names_are_as_promised() -> None:
    assert set(lro.__all__) == NAMES and len(lro.__all__) == len(NAMES)
    assert set(lro.ops.__all__) == OPS
    assert all(hasattr(lro, name) for name in NAMES) and all(hasattr(lro.ops, name) for name in OPS)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(lro, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        methods = [value for key, value in vars(thing).items() if inspect.isfunction(value) and not key.startswith("_")]
        assert all(method.__doc__ or method.__name__ in {"forward", "extra_repr"} for method in methods)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_annotated_and_have_an_example(name: str) -> None:
    function = getattr(lro, name)
    parameters = inspect.signature(function).parameters.values()
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters)
    assert "Example:" in inspect.getdoc(function) and ">>> " in inspect.getdoc(function)


def test_version_has_three_parts() -> None:
    assert lro.__version__.count(".") == 2
