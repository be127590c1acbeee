"""The public names: what README and users rely on."""

import inspect

import pytest

import lowrank_ops as lro

NAMES = {
    "AccuracyGuided", "calibrate", "calibration", "CheckpointError", "choose_ranks", "compress_", "CompressionConfig",
    "CompressionReport", "Covariance", "Covariances", "ExplainedVariance", "factorize", "Factors", "finetune_",
    "FinetuneReport", "FlopBudget", "LatencyBudget", "LayerLatencies", "measure_errors", "measure_latency",
    "layer_subspaces", "LayerSubspaces", "load_pretrained", "LowRankConv2d",
    "LowRankLinear", "NonFiniteActivationError", "ops", "ParameterBudget", "Ranks", "recalibrate", "refit_factors",
    "replace_", "save_pretrained", "Subspace", "utilization", "UtilizationReport",
}  # fmt: skip
OPS = {
    "Backend", "BackendUnavailableError", "conv_covariance_update_", "covariance_finalize_", "covariance_update_",
    "explain", "lowrank_linear",
}  # fmt: skip


def test_names_are_as_promised() -> None:
    assert set(lro.__all__) == NAMES
    assert set(lro.ops.__all__) == OPS
    assert all(hasattr(lro, name) for name in NAMES) and all(hasattr(lro.ops, name) for name in OPS)


@pytest.mark.parametrize("name", sorted(NAMES - {"ops"}))
def test_public_things_are_documented(name: str) -> None:
    thing = getattr(lro, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        methods = [value for key, value in vars(thing).items() if inspect.isfunction(value) and not key.startswith("_")]
        assert all(method.__doc__ or method.__name__ in {"forward", "extra_repr"} for method in methods)
    else:
        assert all(
            parameter.annotation is not inspect.Parameter.empty
            for parameter in inspect.signature(thing).parameters.values()
        )


def test_version() -> None:
    assert lro.__version__.count(".") == 2
