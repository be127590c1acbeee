"""compress_ with channels: MLPs with fewer channels, from statistics to checkpoints."""

import copy
import json
import re

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.description import describe_layers, empty_layers
from lowrank_ops.factors.channels import narrowed, widened
from lowrank_ops.folders import compress_folder
from lowrank_ops.layers import NarrowLinear, replace_
from lowrank_ops.subspaces import channels as of_channels
from lowrank_ops.subspaces import layer_subspaces


class Mlp(nn.Module):
    def __init__(self, channels=48):
        super().__init__()
        self.gate, self.up = (nn.Linear(16, channels, bias=False) for _ in range(2))
        self.down = nn.Linear(channels, 16, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    """Two gated MLPs and one with biases, as blocks of one container, and layers around them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(20, 16)
        plain = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))
        self.blocks = nn.Sequential(Mlp(), plain, Mlp())
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


MLPS = {
    "blocks.0.down": ("blocks.0.gate", "blocks.0.up"),
    "blocks.1.2": ("blocks.1.0",),
    "blocks.2.down": ("blocks.2.gate", "blocks.2.up"),
}


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    model = Net().eval()
    batches = [torch.randn(32, 20) @ torch.randn(20, 20).tril() for _ in range(6)]
    return model, batches, lro.calibrate(model, batches, sensitivity="output")


def compressed(calibrated, policy=None, channels=True, config=None, **options):
    model = copy.deepcopy(calibrated[0])
    config = {"rank": policy or lro.ParameterBudget(0.6), "channels": channels, **(config or {})}
    return model, lro.compress_(model, calibrated[2], lro.CompressionConfig(**config), **options)


def rows_of(report):
    return {row.fqn: row for row in report.layers}


def narrowed_down(calibrated, channels):
    """Factors of the first MLP."""
    model, _, covariances = calibrated
    spaces = layer_subspaces({fqn: model.get_submodule(fqn) for fqn in covariances}, covariances)
    member = of_channels.with_channels(model, spaces, ["blocks.0.down"])["blocks.0.down"]
    return narrowed("blocks.0.down", member, channels, "loss")


@pytest.mark.parametrize(
    ("policy", "projection"),
    [
        (lro.ParameterBudget(0.6), None),
        (lro.ParameterBudget(0.4), "output"),
        (lro.ParameterBudget(0.6, "variance"), "output"),
        (lro.FlopBudget(0.6, "uniform"), None),
    ],
)
def test_budgets_are_met_by_layers_with_fewer_features(calibrated, policy, projection):
    model, report = compressed(calibrated, policy, config={"projection": projection})
    rows = rows_of(report)
    assert any(rows[consumer].channels for consumer in MLPS)
    for consumer, producers in MLPS.items():
        channels = rows[consumer].channels
        size = calibrated[0].get_submodule(consumer).in_features if channels is None else channels
        assert model.get_submodule(consumer).in_features == size
        for name in producers:
            assert rows[name].channels == channels and model.get_submodule(name).out_features == size
        assert channels is None or channels % 8 == 0
    assert all(rows[fqn].rank is None for consumer in MLPS for fqn in (consumer, *MLPS[consumer]))
    assert report.model_parameters == sum(p.numel() for p in model.parameters())
    kept, before = report.layer_parameters, report.layer_parameters_before
    if isinstance(policy, lro.FlopBudget):
        kept, before = (sum(getattr(row, name) for row in report.layers) for name in ("macs", "dense_macs"))
    assert policy.fraction - 0.15 < kept / before <= policy.fraction
    assert model(calibrated[1][0]).isfinite().all()
    assert "channels" in report.table()


@pytest.mark.parametrize("projection", ["loss", "output"])
def test_the_consumer_is_the_best_fit_to_the_channels_kept(calibrated, projection):
    dense, batches, _ = calibrated
    ranks = lro.Ranks({}, channels={"blocks.0.down": 24})
    model, report = compressed(calibrated, ranks, config={"projection": projection})
    x = torch.cat(batches)
    with torch.no_grad():
        mlp, narrow, x = dense.blocks[0], model.blocks[0], dense.stem(x).double()
        mlp, narrow = copy.deepcopy(mlp).double(), copy.deepcopy(narrow).double()
        kept = nn.functional.silu(narrow.gate(x)) * narrow.up(x)
        target = mlp(x) - x
        rows = torch.cat([kept, torch.ones(len(x), 1)], 1)
        best = (rows @ torch.linalg.lstsq(rows, target).solution - target).square().sum(1).mean()
        error = narrow(x) - mlp(x)
    torch.testing.assert_close(error.mean(0), torch.zeros(16).double(), rtol=0, atol=1e-5)
    assert best <= error.square().sum(1).mean() <= 1.001 * best
    row = rows_of(report)["blocks.0.down"]
    assert row.predicted_error == pytest.approx(float(error.square().sum(1).mean()), rel=1e-3)
    gate = dense.blocks[0].gate.weight
    assert all(any(torch.equal(part, other) for other in gate) for part in model.blocks[0].gate.weight)


def test_errors_of_mlps_are_measured_at_their_consumers(calibrated):
    dense, batches, _ = calibrated
    model, report = compressed(calibrated, lro.Ranks({"head": 4}, channels={"blocks.0.down": 24, "blocks.1.2": 16}))
    errors = lro.measure_errors(dense, model, batches)
    assert errors.keys() == {"head", "blocks.0.down", "blocks.1.2"}
    for fqn, error in errors.items():
        assert error == pytest.approx(rows_of(report)[fqn].relative_error, rel=1e-3)
    assert report.with_measured(errors).prediction().layers == 3
    with torch.no_grad():
        model.blocks[0].up.weight[3] += 1
    assert lro.measure_errors(dense, model, batches).keys() == {"head", "blocks.1.2"}
    with torch.no_grad():
        model.blocks[1][0].bias[0] += 1
    model.head = dense.head
    with pytest.raises(ValueError, match="compressed has only MLPs with fewer channels whose weights were trained"):
        lro.measure_errors(dense, model, batches)


@pytest.mark.parametrize("channels", [8, 24, 40])
def test_the_predicted_loss_is_that_of_the_order(calibrated, channels):
    model, _, covariances = calibrated
    spaces = layer_subspaces({fqn: model.get_submodule(fqn) for fqn in covariances}, covariances)
    member = of_channels.with_channels(model, spaces, ["blocks.0.down"])["blocks.0.down"]
    parts = narrowed("blocks.0.down", member, channels, "loss")
    expected = 0.5 * float(member.loss.subspace.spectrum[channels:].sum())
    assert parts["blocks.0.down"].predicted_loss == pytest.approx(expected, rel=0.02)  # which is damped
    assert all(parts[f"blocks.0.{name}"].predicted_loss == 0 for name in ("gate", "up"))  # the consumer has the whole
    assert all(parts[f"blocks.0.{name}"].predicted_error == 0 for name in ("gate", "up"))
    assert {part.projection for part in parts.values()} == {"loss"}
    plain = narrowed("blocks.0.down", member, channels, "output")
    assert {part.projection for part in plain.values()} == {"output"}
    assert plain["blocks.0.down"].predicted_error <= parts["blocks.0.down"].predicted_error


def test_all_channels_give_the_same_function(calibrated):
    sizes = {consumer: calibrated[0].get_submodule(consumer).in_features for consumer in MLPS}
    model, _ = compressed(calibrated, lro.Ranks({}, channels=sizes))
    x = calibrated[1][0]
    torch.testing.assert_close(model(x), calibrated[0](x), rtol=1e-4, atol=1e-4)


def test_names_choose_mlps_and_the_others_get_factors(calibrated):
    budget, names = lro.ParameterBudget(0.75, "uniform"), ["re:blocks\\.[01]\\..*"]
    _, report = compressed(calibrated, budget, names, config={"pivoted": True, "overrides": {"blocks.2.down": 8}})
    rows = rows_of(report)
    assert rows["blocks.0.down"].channels and rows["blocks.1.0"].channels
    assert all(row.channels % 8 == 0 for row in report.layers if row.channels)  # ranks of pivoted layers are not
    assert rows["blocks.2.down"].channels is None and rows["blocks.2.down"].rank
    json_ = report.config.to_json()
    assert lro.CompressionConfig.from_json(json_) == report.config
    assert len(json.loads(report.to_json())["layers"]) == len(rows)


def test_overrides_and_bounds_hold_numbers_of_channels(calibrated):
    config = {"overrides": {"blocks.0.down": 13, "blocks.2.down": None}, "bounds": {"blocks.1.2": (8, 16)}}
    rows = rows_of(compressed(calibrated, lro.ParameterBudget(0.7), config=config)[1])
    assert rows["blocks.0.gate"].channels == 13 and rows["blocks.2.up"].channels is None
    assert rows["blocks.1.2"].channels in (8, 16)


def test_a_second_budget_reuses_the_orders(calibrated, monkeypatch):
    model, _, covariances = calibrated
    spaces = layer_subspaces({fqn: model.get_submodule(fqn) for fqn in covariances}, covariances)
    first, _ = compressed(calibrated, subspaces=spaces)
    monkeypatch.setattr(of_channels, "kept_order", None)
    second, _ = compressed(calibrated, subspaces=spaces)
    compressed(calibrated, lro.ParameterBudget(0.4), subspaces=spaces)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(row.channels for row in compressed(calibrated, lro.ParameterBudget(0.9), False)[1].layers)


def test_measured_ranks_and_corrected_predictions(calibrated):
    model, batches, covariances = calibrated
    subspaces = lro.correct_predictions(model, covariances, batches, sensitivity="output", channels=True)
    channels = subspaces["blocks.0.down"].channels
    assert channels.loss.corrected.shape == (48,)
    config = lro.CompressionConfig(channels=True)
    ranks = lro.measured_ranks(
        model, covariances, batches, 0.6, sensitivity="output", config=config, subspaces=subspaces
    )
    assert set(ranks.channels) <= set(MLPS) and ranks.channels and not set(ranks.ranks) & set(MLPS)
    _, report = compressed(calibrated, ranks, channels=False, subspaces=subspaces)
    assert {row.fqn: row.channels for row in report.layers if row.fqn in MLPS and row.channels} == ranks.channels
    assert 0.45 < report.layer_parameters / report.layer_parameters_before <= 0.6
    expected = 0.5 * channels.loss.corrected[ranks.channels["blocks.0.down"] :].sum()
    assert rows_of(report)["blocks.0.down"].predicted_loss == pytest.approx(float(expected))


def test_derivatives_of_gates_are_those_of_the_narrow_model(calibrated):
    """The copies that measured_ranks differentiates keep all channels and compute what the narrow model does."""
    dense, batches, _ = calibrated
    wide, narrow = copy.deepcopy(dense), copy.deepcopy(dense)
    parts = narrowed_down(calibrated, 17)
    replace_(narrow, parts)
    replace_(wide, {"blocks.0.down": widened(parts["blocks.0.down"], 48)})
    torch.testing.assert_close(wide(batches[0]), narrow(batches[0]), rtol=1e-4, atol=1e-5)


def test_search_ranks_searches_channels(calibrated):
    model, batches, covariances = calibrated
    x, wanted = batches[0], model(batches[0]).detach()
    config = lro.CompressionConfig(channels=True)
    ranks = lro.search_ranks(
        model, covariances, lambda trial: -float((trial(x) - wanted).square().mean()), 0.5, config=config,
        num_evaluations=4,
    )  # fmt: skip
    assert ranks.channels
    assert rows_of(compressed(calibrated, ranks)[1])["blocks.0.down"].channels == ranks.channels["blocks.0.down"]


def test_blocks_are_trained_and_resumed(calibrated, tmp_path):
    batches = calibrated[1]

    def run():
        settings = lro.BlockReconstruction(
            batches, target="logits", epochs=1, lr=1e-2, together=3, blocks="blocks", checkpoint=tmp_path / "state"
        )
        return compressed(calibrated, reconstruction=settings)

    (model, report), (again, _) = run(), run()
    one_shot, _ = compressed(calibrated)
    assert any(row.reconstructed for row in report.layers if row.channels)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    moved = [fqn for fqn, part in model.named_parameters() if not torch.equal(part, one_shot.get_parameter(fqn))]
    assert any(fqn.endswith("gate.weight") for fqn in moved) and any(fqn.endswith("down.weight") for fqn in moved)


def test_checkpoints_hold_the_layers_to_the_bit(calibrated, tmp_path):
    model, report = compressed(calibrated)
    lro.save_pretrained(model, tmp_path, report)
    loaded, x = lro.load_pretrained(Net().eval(), tmp_path), calibrated[1][0]
    assert torch.equal(loaded(x), model(x)) and isinstance(loaded.blocks[0].down, NarrowLinear)
    assert [str(part) for part in loaded.modules()] == [str(part) for part in model.modules()]
    description = json.loads((tmp_path / "lowrank_config.json").read_text())
    channels = rows_of(report)["blocks.0.down"].channels
    assert description["version"] == 5
    assert description["layers"]["blocks.0.down"] == {
        "kind": "linear", "in_features": 48, "out_features": 16, "narrow": [channels, 16], "bias": True,
        "calibration_rows": 192,
    }  # fmt: skip
    lro.save_pretrained(loaded, tmp_path / "again", report)
    with pytest.raises(lro.CheckpointError, match=r"already compressed: blocks\.0\.gate is a NarrowLinear"):
        lro.load_pretrained(loaded, tmp_path)
    other = Net()
    other.blocks[0] = Mlp(56)
    with pytest.raises(lro.CheckpointError, match=r"'blocks.0.gate' has out_features 48 in the checkpoint and 56"):
        lro.load_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match=r"report does not describe model: it has layer 'blocks\.0\.gate' with"):
        lro.save_pretrained(calibrated[0], tmp_path / "other", report)


@pytest.mark.parametrize("narrow", [[0, 16], [49, 16], [8], "8", [8.0, 16], [True, 16]])
def test_damaged_sizes_are_refused(calibrated, narrow):
    entries = describe_layers(compressed(calibrated)[0])["layers"]
    entries["blocks.0.down"]["narrow"] = narrow
    with pytest.raises(lro.CheckpointError, match=r"layer 'blocks.0.down' of lowrank_config.json"):
        empty_layers(Net(), entries)


def test_plain_and_dense_copies_have_the_same_outputs(calibrated):
    model, _ = compressed(calibrated)
    x = calibrated[1][0]
    plain, dense = lro.layers.to_plain_layers(model), lro.layers.to_dense_layers(model)
    assert type(plain.blocks[0].gate) is nn.Linear and type(dense.blocks[0].gate) is nn.Linear
    assert plain.blocks[0].gate.weight.shape == model.blocks[0].gate.weight.shape
    assert dense.blocks[0].gate.weight.shape == (48, 16)
    for other in (plain, dense):
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_new_layers_train_and_export_as_linears(calibrated):
    model, _ = compressed(calibrated)
    x = calibrated[1][0]
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert {parameter.requires_grad for parameter in model.blocks.parameters()} == {True}
    before = model.blocks[0].gate.weight.clone()
    lro.finetune_(model, [x], teacher=calibrated[0], steps=2, lr=1e-3)
    assert not torch.equal(model.blocks[0].gate.weight, before)


def test_narrow_layers_stay_as_they_are(calibrated):
    model, _ = compressed(calibrated)
    covariances = lro.calibrate(model, calibrated[1], sensitivity="output")
    narrow = {fqn: part for fqn, part in model.named_modules() if isinstance(part, NarrowLinear)}
    report = lro.compress_(model, covariances, lro.ParameterBudget(0.9))
    assert report.skipped["blocks.0.down"] == "it has fewer channels already"
    assert all(model.get_submodule(fqn) is part for fqn, part in narrow.items())
    with pytest.raises(ValueError, match="channels=True: the model has no MLP"):
        lro.compress_(model, covariances, lro.CompressionConfig(channels=True), lambda module, fqn: fqn != "blocks.1.2")
    with pytest.raises(ValueError, match=r"'blocks.0.down' cannot be replaced: it has fewer channels already"):
        replace_(model, {"blocks.0.down": narrowed_down(calibrated, 8)["blocks.0.down"]})


def test_low_precision(calibrated):
    model = copy.deepcopy(calibrated[0]).bfloat16()
    covariances = lro.calibrate(model, [x.bfloat16() for x in calibrated[1]], sensitivity="output")
    lro.compress_(model, covariances, lro.CompressionConfig(channels=True))
    assert {part.dtype for part in model.parameters()} == {torch.bfloat16}
    assert model(calibrated[1][0].bfloat16()).isfinite().all()


def test_what_overflows_the_dtype_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with torch.no_grad():  # channels of mean 30,000 that cancel, until some of them are dropped
        model[0].bias.fill_(3e4)
        model[2].weight[:, ::2], model[2].weight[:, 1::2] = 4, -4
    x = torch.randn(400, 16)
    covariances, narrow = lro.calibrate(model, [x]), copy.deepcopy(model).half()
    assert narrow(x.half()).isfinite().all()
    with pytest.raises(ValueError, match=r"^layer '2': its weight or bias with 9 channels overflows torch\.float16"):
        lro.compress_(narrow, covariances, lro.Ranks({}, channels={"2": 9}))
    assert type(narrow[2]) is nn.Linear
    lro.compress_(model, covariances, lro.Ranks({}, channels={"2": 9}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_are_computed_from_the_rounded_weight(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 24)).to(dtype)
    with torch.no_grad():
        model[0].bias.add_(30)
    x = torch.randn(600, 16).to(dtype)
    smaller = copy.deepcopy(model)
    lro.compress_(smaller, lro.calibrate(model, [x]), lro.Ranks({}, channels={"2": 24}))
    means = []
    for one in (model, smaller):
        hidden = one[1](one[0](x)).double().mean(0)
        means.append(one[2].weight.double() @ hidden + one[2].bias.double())
    rounding = torch.finfo(dtype).eps / 2 * smaller[2].bias.double().abs()
    assert ((means[0] - means[1]).abs() <= rounding + 1e-6).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 8}, "channels cannot be combined with UniformRank; use a ParameterBudget"),
        ({"rank": lro.ByteBudget(0.5)}, "channels cannot be combined with ByteBudget"),
        ({"rank": lro.ExplainedVariance(0.9)}, "channels cannot be combined with ExplainedVariance"),
        ({"projection": "weight"}, "channels needs projection='loss' or 'output'; got 'weight'"),
        ({"reconstruction": "sequential"}, "channels cannot be combined with reconstruction='sequential'"),
    ],
)
def test_what_does_not_go_together_is_refused(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lro.CompressionConfig(**{"channels": True, **config})


@pytest.mark.parametrize("channels", [1, "re:.*", None, [3]])
def test_other_types_are_refused(channels):
    with pytest.raises(TypeError, match="channels must be a bool, or names"):
        lro.CompressionConfig(channels=channels)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"channels": ["head"]}, "channels: 'head' names no layer that reads the channels of an MLP"),
        ({"channels": ["re:("]}, "channels: 're:(' is not a regular expression"),
        ({"overrides": {"blocks.0.gate": 8}}, "'blocks.0.gate' names a layer of an MLP whose channels are dropped"),
        (
            {"overrides": {"blocks.0.down": 0}},
            "overrides['blocks.0.down'] must be None or an integer in [1, 48]; got 0",
        ),
        ({"rank": lro.Ranks({"blocks.0.gate": 8}, {"blocks.0.down": 8})}, "ranks: 'blocks.0.gate' matches none"),
        ({"rank": lro.Ranks({"blocks.0.down": 8}, {"blocks.0.down": 8})}, "ranks: 'blocks.0.down' matches none"),
        ({"rank": lro.Ranks({}, {"blocks.0.down": 49})}, "channels['blocks.0.down'] must be None or an integer in"),
        ({"rank": lro.ParameterBudget(0.01)}, "fraction=0.01 cannot be met"),
    ],
)
def test_wrong_names_and_numbers_leave_the_model_unchanged(calibrated, config, message):
    model = copy.deepcopy(calibrated[0])
    with pytest.raises(ValueError, match=re.escape(message)):
        lro.compress_(model, calibrated[2], lro.CompressionConfig(**{"channels": True, **config}))
    assert str(model) == str(calibrated[0])


def test_recalibrate_and_folders_refuse_channels(calibrated, tmp_path):
    model, batches, covariances = calibrated
    config = lro.CompressionConfig(channels=True)
    with pytest.raises(ValueError, match="recalibrate has no midpoint of an MLP"):
        lro.recalibrate(model, covariances, batches, config, sensitivity="output")
    lro.save_pretrained(model, tmp_path / "dense")
    with pytest.raises(ValueError, match="channels runs the MLPs of the model"):
        compress_folder(tmp_path / "dense", tmp_path / "smaller", covariances, config)
