"""compress_: the result is right, open choices are made by the statistics, and errors leave the model unchanged."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.subspaces import layer_subspaces


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Model(nn.Module):
    """Layers of every kind; 'q' and 'k' share their input, 'idle' is never reached."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 32, 3, groups=2)
        self.q, self.k = nn.Linear(128, 64), nn.Linear(128, 64, bias=False)
        self.o = nn.Linear(64, 64)
        self.idle = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        x = torch.nn.functional.avg_pool2d(self.conv(x), 2).flatten(1)
        return self.head(self.o(self.q(x) * self.k(x)).relu())


def low_rank_images(count=64):
    return (torch.randn(count, 5) @ torch.randn(5, 4 * 36)).view(count, 4, 6, 6)


def snapshot(model):
    return {name: (id(module), module.training) for name, module in model.named_modules()}, {
        name: (id(value), value.requires_grad, value.detach().clone()) for name, value in model.named_parameters()
    }


def assert_unchanged(model, before):
    modules, parameters = snapshot(model)
    assert modules == before[0] and list(parameters) == list(before[1])
    for name, (identity, needs_grad, value) in parameters.items():
        assert (identity, needs_grad) == before[1][name][:2] and torch.equal(value, before[1][name][2])


def names(model, *kinds):
    return [fqn for fqn, module in model.named_modules() if isinstance(module, kinds)]


# --- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["output", "utilized"])
@pytest.mark.parametrize("centered", [True, False])
def test_all_varying_directions_reproduce_the_model(projection, centered):
    """At explained variance 1 the compressed model agrees with the dense one on the calibration data."""
    model, x = Model().double(), low_rank_images().double()
    expected = model(x).detach()
    config = lro.CompressionConfig(lro.ExplainedVariance(1), projection, centered)
    report = lro.compress_(model, lro.calibrate(model, x.split(10)), config)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-7 * float(expected.abs().max()))
    assert names(model, lro.LowRankLinear, lro.LowRankConv2d)
    by_name = {layer.fqn: layer for layer in report.layers}
    assert by_name["head"].rank is None and by_name["q"].rank is not None
    assert report.skipped == {"idle": "no calibration batch reached it"}


@pytest.mark.parametrize("projection", ["output", "utilized", "weight"])
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_the_report_counts_the_models_parameters(projection, fraction):
    model, x = Model(), torch.randn(50, 4, 6, 6)
    before = sum(parameter.numel() for parameter in model.parameters())
    config = lro.CompressionConfig(lro.ParameterBudget(fraction), projection)
    report = lro.compress_(model, lro.calibrate(model, [x]), config)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert (report.model_parameters_before, report.model_parameters) == (before, after)
    assert report.layer_parameters_before - report.layer_parameters == before - after
    assert report.layer_parameters <= fraction * report.layer_parameters_before


def test_the_default_is_half_the_parameters_by_output_pca():
    model, x = Model(), low_rank_images()
    report = lro.compress_(model, lro.calibrate(model, [x]))
    assert report.config == lro.CompressionConfig(lro.ParameterBudget(0.5, "uniform"), "output", True)
    assert report.layer_parameters <= 0.5 * report.layer_parameters_before


def test_with_output_gradients_the_default_is_by_loss():
    model, x = Model(), low_rank_images()
    report = lro.compress_(model, lro.calibrate(model, [x], sensitivity="output"))
    assert report.config == lro.CompressionConfig(lro.ParameterBudget(0.5, "loss"), "loss", True)
    assert {layer.projection for layer in report.layers if layer.rank is not None} == {"loss"}


def test_output_gradients_of_some_layers_give_uniform_ranks():
    class Branch(nn.Module):
        """The loss does not depend on 'aside'."""

        def __init__(self):
            super().__init__()
            self.main, self.aside = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            self.aside(x)
            return self.main(x)

    model = Branch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        covariances = lro.calibrate(model, [torch.randn(80, 64)], sensitivity="output")
    report = lro.compress_(model, covariances, lro.ParameterBudget(0.5))
    assert report.config == lro.CompressionConfig(lro.ParameterBudget(0.5, "uniform"), "loss")
    assert {layer.fqn: layer.projection for layer in report.layers} == {"main": "loss", "aside": "output"}


@pytest.mark.parametrize("config", [lro.ParameterBudget(0.4), lro.Ranks({"q": 8}), 8])
def test_a_policy_or_an_int_stands_for_a_config(config):
    dense, x = Model(), low_rank_images()
    covariances = lro.calibrate(dense, [x])
    first, second = copy.deepcopy(dense), copy.deepcopy(dense)
    report = lro.compress_(first, covariances, config)
    assert report.config == lro.compress_(second, covariances, lro.CompressionConfig(config)).config
    assert names(first, lro.LowRankLinear) == names(second, lro.LowRankLinear) != []


def test_an_int_is_the_rank_of_all_layers_it_makes_smaller():
    model, x = Model(), low_rank_images()
    report = lro.compress_(model, lro.calibrate(model, [x]), 8)
    ranks = {layer.fqn: layer.rank for layer in report.layers}
    assert ranks == {"conv": 8, "q": 8, "k": 8, "o": 8, "head": None}


@pytest.mark.parametrize("constant", [0.0, 0.7])
@pytest.mark.parametrize("projection", ["output", "utilized"])
def test_a_layer_without_variance_outputs_its_mean(constant, projection):
    model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.Flatten(), nn.Linear(128, 64, bias=False))
    x = torch.full((20, 4, 4, 4), constant)
    expected = model(x)
    config = lro.CompressionConfig(lro.ExplainedVariance(), projection)
    report = lro.compress_(model, lro.calibrate(model, [x]), config)
    assert [layer.rank for layer in report.layers] == [0, 0]
    assert "0.000%" in report.table()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(torch.randn(20, 4, 4, 4)), expected, rtol=1e-5, atol=1e-6)  # for any input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_any_dtype(dtype):
    model, x = Model().to(dtype), low_rank_images().to(dtype)
    expected = model(x).double()
    lro.compress_(model, lro.calibrate(model, [x]), lro.CompressionConfig(lro.ExplainedVariance(0.9999)))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    found = names(model, lro.LowRankLinear)
    error = (model(x).double() - expected).square().mean() / expected.square().mean()
    assert found and error < (0.02 if dtype == torch.bfloat16 else 1e-3)


def test_training_and_gradient_flags_are_kept():
    model, x = Model(), low_rank_images()
    model.q.eval()
    model.q.weight.requires_grad_(False)
    lro.compress_(model, lro.calibrate(model, [x]))
    assert isinstance(model.q, lro.LowRankLinear) and isinstance(model.k, lro.LowRankLinear)
    assert model.k.training and not model.q.training and model.training
    assert model.k.down.requires_grad and not model.q.down.requires_grad and model.q.bias.requires_grad


def test_a_compressed_model_trains():
    model, x = Model(), low_rank_images()
    lro.compress_(model, lro.calibrate(model, [x]))
    model(x).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "idle" not in name)


def test_output_pca_needs_only_streamed_outputs():
    dense, x = Model().double(), low_rank_images().double()
    outputs = []
    for side in ("input", "output"):
        model = copy.deepcopy(dense)
        lro.compress_(
            model, lro.calibrate(model, [x], side=side), lro.CompressionConfig(lro.Ranks({"q": 3, "conv": 2}))
        )
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)


def test_overrides_and_filter_fn():
    model, x = Model(), torch.randn(40, 4, 6, 6)
    config = lro.CompressionConfig(lro.Ranks({}), overrides={"re:[qk]": 9, "q": None})
    report = lro.compress_(
        model, lro.calibrate(model, [x]), config, lambda module, fqn: fqn in ("q", "k"), progress=True
    )
    assert names(model, lro.LowRankLinear, lro.LowRankConv2d) == ["k"]
    assert [layer.fqn for layer in report.layers] == ["q", "k"] and not report.skipped
    assert (model.k.rank, model.k.stored_rank) == (9, 16)


def test_layers_that_calibration_left_out_are_listed_as_such():
    model = Model()
    covariances = lro.calibrate(model, [torch.randn(40, 4, 6, 6)], filter_fn=lambda module, fqn: fqn in ("o", "idle"))
    report = lro.compress_(model, covariances, lro.ParameterBudget(0.5))
    reasons = dict.fromkeys(("conv", "q", "k", "head"), "it was not calibrated")
    assert report.skipped == {**reasons, "idle": "no calibration batch reached it"}


def test_given_subspaces_are_recomputed_if_not_centered_alike():
    dense, x = Model(), torch.randn(40, 4, 6, 6)
    covariances = lro.calibrate(dense, [x])
    layers = {fqn: dense.get_submodule(fqn) for fqn in covariances}
    config = lro.CompressionConfig(lro.Ranks({"q": 3}))
    results = []
    for centered in (None, True, False):
        model = copy.deepcopy(dense)
        spaces = None if centered is None else layer_subspaces(layers, covariances, centered=centered)
        lro.compress_(model, covariances, config, subspaces=spaces)
        results.append(model.q.weight)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_layer_called_several_times_is_one_layer():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            return self.fc(self.fc(x).relu())

    model, x = Recurrent(), torch.randn(40, 3) @ torch.randn(3, 32)
    covariances = lro.calibrate(model, [x])
    assert covariances["fc"].activations.count == 80
    lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"fc": 8})))
    assert isinstance(model.fc, lro.LowRankLinear)


# --- tied weights -----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc, self.lm_head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        return self.lm_head(self.fc(self.embedding(ids)))


def test_tied_weights_stay_tied_and_are_reported():
    model, ids = Tied(), torch.arange(40).view(4, 10)
    covariances = lro.calibrate(model, [ids])
    report = lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"fc": 4})))
    assert names(model, lro.LowRankLinear) == ["fc"]
    assert model.lm_head.weight is model.embedding.weight
    assert report.skipped["lm_head"] == "its weight is tied to 'embedding'"
    assert list(report.skipped) == ["lm_head", "embedding"]
    assert report.model_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_requested_tied_weights_are_refused():
    model = Tied()
    covariances = lro.calibrate(model, [torch.arange(40)])
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer 'lm_head' cannot be replaced: its weight is tied to 'embedding'"):
        lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"re:.*": 4})), lambda module, fqn: True)
    assert_unchanged(model, before)


# --- errors leave the model unchanged -------------------------------------------------------------------------------


def hooked(model):
    model.k.register_forward_hook(lambda *args: None)


def renamed(model):
    model.other, model.q = model.q, nn.Identity()
    del model.q


def widened(model):
    model.k = nn.Linear(96, 64)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (hooked, {"rank": lro.Ranks({"re:[qk]": 4})}, "layer 'k' has hooks, which its replacement would drop"),
        (renamed, {}, "covariances name layers that model does not have: q"),
        (widened, {}, r"covariances\['k'\]: activations has features \(128,\) on the input side, the layer \(96,\)"),
        (None, {"rank": lro.ParameterBudget(0.01)}, r"fraction=0\.01 cannot be met"),
        (
            None,
            {"overrides": {"idle": 3}},
            "overrides: 'idle' matches none of the layers considered: conv, q, k, o, head",
        ),
        (None, {"rank": lro.Ranks({"q": 65})}, r"ranks\['q'\] must be None or an integer in \[0, 64\]; got 65"),
    ],
)
def test_an_error_leaves_the_model_unchanged(change, config, message):
    model = Model()
    covariances = lro.calibrate(model, [torch.randn(40, 4, 6, 6)])
    if change:
        change(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lro.compress_(model, covariances, lro.CompressionConfig(**config))
    assert_unchanged(model, before)


def test_utilized_without_the_input_space_names_the_layer():
    model = Model()
    covariances = lro.calibrate(model, [torch.randn(40, 4, 6, 6)], side="output")
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer 'q': projection='utilized' needs the input space"):
        lro.compress_(model, covariances, lro.CompressionConfig(lro.ParameterBudget(0.5), "utilized"))
    assert_unchanged(model, before)


def test_a_failing_replacement_leaves_every_layer(monkeypatch):
    model = Model()
    covariances = lro.calibrate(model, [torch.randn(40, 4, 6, 6)])
    before = snapshot(model)
    from_factors = lro.LowRankLinear.from_factors
    made = []

    def fail_at_the_second(layer, factors):
        if made:
            raise MemoryError
        made.append(layer)
        return from_factors(layer, factors)

    monkeypatch.setattr(lro.LowRankLinear, "from_factors", fail_at_the_second)
    with pytest.raises(MemoryError):
        lro.compress_(model, covariances, lro.CompressionConfig(lro.ParameterBudget(0.4)))
    assert made
    assert_unchanged(model, before)


def test_nothing_to_compress_is_an_error():
    model = Model()
    covariances = lro.calibrate(model, [torch.randn(40, 4, 6, 6)], filter_fn=lambda module, fqn: fqn == "q")
    with pytest.raises(ValueError, match="hold none of the layers that can be replaced and that filter_fn keeps"):
        lro.compress_(model, covariances, filter_fn=lambda module, fqn: fqn == "k")
    lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"q": 4})))
    with pytest.raises(ValueError, match="covariances hold none of the layers"):
        lro.compress_(model, covariances)  # already compressed


def test_a_model_that_is_the_layer_is_refused():
    model = nn.Linear(32, 32)
    covariances = lro.calibrate(model, [torch.randn(40, 32)])
    with pytest.raises(ValueError, match=r"model is itself a layer; use LowRankLinear\.from_linear"):
        lro.compress_(model, covariances)


def test_subspaces_of_another_calibration_are_refused():
    model, batches = Model(), [low_rank_images()]
    covariances, others = (lro.calibrate(model, batches) for _ in range(2))
    spaces = layer_subspaces({fqn: model.get_submodule(fqn) for fqn in others}, others)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"subspaces\['conv'\] was computed from other covariances"):
        lro.compress_(model, covariances, subspaces=spaces)
    assert snapshot(model)[0] == before[0]
