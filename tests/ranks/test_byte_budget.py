"""ByteBudget: ranks and formats of factors by predicted loss, in bytes."""

import copy

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.factors import factorize
from lowrank_ops.factors.eight_bit import DTYPES, quantized
from lowrank_ops.factors.pivoted import all_coefficients, pivots_of
from lowrank_ops.layers import EightBitLinear, PivotedLinear
from lowrank_ops.ops.linear.reference import dequantized
from lowrank_ops.ranks.choose import choose_sizes
from lowrank_ops.ranks.costs import UNBOUNDED
from lowrank_ops.ranks.eight_bit import byte_options, eight_bit_bytes, lowrank_bytes, rounding_of
from lowrank_ops.subspaces import layer_subspaces


def build(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 48)).to(dtype)


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(1)
    x = torch.randn(400, 96) @ torch.diag(torch.linspace(1.5, 0.1, 96))
    return {
        sensitivity: lro.calibrate(build(), [x.bfloat16()], sensitivity=sensitivity) for sensitivity in (None, "output")
    }


def stored_bytes(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("fraction", [0.8, 0.4, 0.2])
@pytest.mark.parametrize("sensitivity", [None, "output"])
@pytest.mark.parametrize("pivoted", [False, True])
def test_budget_is_met_in_bytes(calibrated, form, fraction, sensitivity, pivoted):
    model = build()
    config = lro.CompressionConfig(lro.ByteBudget(fraction, form), pivoted=pivoted)
    report = lro.compress_(model, calibrated[sensitivity], config)
    assert any(isinstance(layer, PivotedLinear) for layer in model) == (pivoted and fraction < 0.8)
    assert (
        report.layer_bytes
        == stored_bytes(model)
        <= fraction * stored_bytes(build())
        == fraction * report.layer_bytes_before
    )
    assert {form for row in report.layers for form in row.formats if form} == {form}
    formats = {fqn: layer.formats for fqn, layer in model.named_modules() if isinstance(layer, lro.LowRankLinear)}
    assert formats == {row.fqn: row.formats for row in report.layers if row.is_replaced}
    eight_bit = {fqn for fqn, layer in model.named_modules() if isinstance(layer, EightBitLinear)}
    assert eight_bit == {row.fqn for row in report.layers if row.formats == (form,)} and (eight_bit or fraction < 0.8)
    assert "layer bytes" in report.table()
    cells = {row.fqn: row.format for row in report.layers}
    expected = {(form,): form, (form, form): form, (form, None): f"down {form}, up as dense"}
    expected |= {(None, form): f"down as dense, up {form}", (None, None): "as dense"}
    assert cells == {row.fqn: expected[row.formats] for row in report.layers} and "format" in report.table()
    assert report.to_dict()["layer_bytes"] == report.layer_bytes


def test_eight_bit_factors_are_better_at_equal_bytes(calibrated):
    covariances = calibrated["output"]
    for fraction in (0.8, 0.5, 0.3):
        losses = [
            lro.compress_(build(), covariances, policy(fraction)).predicted_loss
            for policy in (lro.ByteBudget, lro.ParameterBudget)
        ]
        assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("form", DTYPES)
def test_predicted_rounding_is_that_of_the_factors(calibrated, form):
    layers = {"0": build()[0], "2": build()[2]}
    for space in layer_subspaces(layers, calibrated["output"]).values():
        gradients, moment = space.gradient_moment, space.loss_moment(centered=True)
        weight = space.weight
        lost = dequantized(*quantized(weight, form), torch.float64) - weight
        for by_loss in (True, False):
            predicted = rounding_of(space, form, by_loss=by_loss)
            assert predicted.error(None, (form,)) == pytest.approx(float((lost @ moment * lost).sum()), rel=0.2)
            increase = 0.5 * float((gradients @ lost * (lost @ moment)).sum())
            assert predicted.loss(None, (form,)) == pytest.approx(increase, rel=0.2)
            for rank in (24, 48):
                factors = factorize(space, rank, "loss" if by_loss else "output")
                exact = factors.up @ factors.down
                for formats in ((form, None), (None, form), (form, form)):
                    pairs = zip((factors.down, factors.up), formats, strict=True)
                    down, up = (
                        part if kind is None else dequantized(*quantized(part, kind), torch.float64)
                        for part, kind in pairs
                    )
                    change = up @ down - exact
                    weighted = change @ moment
                    error = float((weighted * change).sum())
                    assert predicted.error(rank, formats) == pytest.approx(error, rel=0.2)
                    loss = 0.5 * float(((gradients @ change) * weighted).sum())
                    assert predicted.loss(rank, formats) == pytest.approx(loss, rel=0.2)


@pytest.mark.parametrize("form", DTYPES)
def test_predicted_rounding_is_that_of_pivoted_factors(calibrated, form):
    space = layer_subspaces({"0": build()[0]}, calibrated["output"])["0"]
    gradients, moment = space.gradient_moment, space.loss_moment(centered=True)
    predicted = rounding_of(space, form, by_loss=True, pivoted=True)
    plain = rounding_of(space, form, by_loss=True)
    assert torch.equal(predicted.up_loss[:12], plain.up_loss[:12])  # 12^2 > 128 outputs
    for rank in (16, 48, 80):
        factors = factorize(space, rank, "loss")
        pivots = pivots_of(factors.down, factors.up)
        for formats in ((form, None), (None, form)):
            pairs = zip(pivots[:2], formats, strict=True)
            down, up = (
                part if kind is None else dequantized(*quantized(part, kind), torch.float64) for part, kind in pairs
            )
            change = all_coefficients(up, pivots.order) @ down - factors.up @ factors.down
            weighted = change @ moment
            assert predicted.error(rank, formats) == pytest.approx(float((weighted * change).sum()), rel=0.3)
            loss = 0.5 * float(((gradients @ change) * weighted).sum())
            assert predicted.loss(rank, formats) == pytest.approx(loss, rel=0.3)


@pytest.mark.parametrize("allocation", ["loss", "variance"])
def test_widths_are_chosen_by_what_is_lost(calibrated, allocation):
    """No other ranks and formats of two layers within the budget have a smaller predicted loss or error, by 2%."""
    layers = {"0": build()[0], "2": build()[2]}
    spaces = layer_subspaces(layers, calibrated["output"])
    policy = lro.ByteBudget(0.35, "fp8", allocation)
    ranks, rounded = choose_sizes(policy, spaces)
    roundings = {fqn: rounding_of(space, "fp8", by_loss=allocation == "loss") for fqn, space in spaces.items()}

    def loss(fqn, rank, formats):
        space, rounding = spaces[fqn], roundings[fqn]
        if allocation == "variance":
            dropped = 0.0 if rank is None else float(space.output.spectrum[rank:].sum())
            return (dropped + rounding.error(rank, formats)) / space.output_variance
        dropped = 0.0 if rank is None else 0.5 * float(space.loss.spectrum[rank:].sum())
        return dropped + rounding.loss(rank, formats)

    def options(fqn):
        kinds = [(a, b) for a in (None, "fp8") for b in (None, "fp8")]
        sizes = ((rank, kind) for rank in range(8, min(spaces[fqn].dimensions[1:]) + 1, 8) for kind in kinds)
        dense = eight_bit_bytes(spaces[fqn]), loss(fqn, None, ("fp8",))
        return [(lowrank_bytes(spaces[fqn], *size), loss(fqn, *size)) for size in sizes] + [dense]

    budget = 0.35 * sum(2 * (layer.weight.numel() + layer.bias.numel()) for layer in layers.values())
    best = min(a[1] + b[1] for a in options("0") for b in options("2") if a[0] + b[0] <= budget)
    formats = {fqn: rounded[fqn].formats if fqn in rounded else (None, None) for fqn in spaces}
    chosen = sum(loss(fqn, rank, formats[fqn]) for fqn, rank in ranks.items())
    assert chosen <= best * (1.02 if allocation == "loss" else 1.1), "two layers leave gaps in the budget"


@pytest.mark.parametrize("bias", [True, False])
def test_sizes_are_the_bytes_of_layers(calibrated, bias):
    model = nn.Sequential(nn.Linear(48, 32, bias=bias))
    covariances = lro.calibrate(model, [torch.randn(64, 48)])
    space = layer_subspaces({"0": model[0]}, covariances)["0"]
    assert eight_bit_bytes(space) == stored_bytes(EightBitLinear.from_linear(model[0]))
    lro.compress_(model, covariances, lro.Ranks({"0": 8}))
    model[0].quantize_("int8", down=False)
    assert lowrank_bytes(space, 8, (None, "int8")) == stored_bytes(model)


def test_smallest_rank_overrides_and_other_kinds(calibrated):
    covariances = calibrated["output"]
    spaces = layer_subspaces({"0": build()[0]}, covariances)
    smallest = lowrank_bytes(spaces["0"], 8, ("int8", "int8"))
    assert smallest == 8 * (96 + 128) + 4 * (8 + 128) + 2 * 128
    dense = 2 * (96 * 128 + 128)
    ranks, rounded = choose_sizes(lro.ByteBudget(smallest / dense, allocation="loss"), spaces)
    assert ranks == {"0": 8} and rounded["0"].formats == ("int8", "int8")
    with pytest.raises(ValueError, match=f"take {smallest} bytes, but only {smallest - 1} are available"):
        choose_sizes(lro.ByteBudget((smallest - 0.5) / dense, allocation="loss"), spaces)
    model = build()
    lro.compress_(model, covariances, lro.CompressionConfig(lro.ByteBudget(0.5), overrides={"0": 16, "4": None}))
    assert model[0].formats == (None, None) and model[0].rank == 16 and type(model[4]) is nn.Linear
    conv = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 32))
    covariances = lro.calibrate(conv, [torch.randn(200, 8, 6, 6)])
    report = lro.compress_(conv, covariances, lro.ByteBudget(0.2))
    assert [row.formats for row in report.layers] == [(None, None), ("int8", "int8")]
    assert report.layer_bytes == stored_bytes(conv)


@pytest.mark.parametrize("allocation", ["uniform", "loss", "variance"])
def test_the_sizes_of_one_layer(calibrated, allocation):
    """One factor alone may have 8 bits where ranks go by what is lost; the dense layer loses nothing."""
    space = layer_subspaces({"0": build()[0]}, calibrated["output"])["0"]
    options = byte_options(space, "int8", UNBOUNDED, rounding_of(space, "int8", by_loss=True), allocation)
    assert any(option.formats in (("int8", None), (None, "int8")) for option, _ in options) == (allocation != "uniform")
    whole = {"uniform": 96, "loss": float(space.loss.spectrum.sum()), "variance": 1}[allocation]
    assert options[-1][0].rank is None and options[-1][1] == pytest.approx(whole)


@pytest.mark.parametrize(("bounds", "rank"), [((16, 16), 16), ((8, 15), 8)])
def test_both_bounds_are_allowed_ranks(calibrated, bounds, rank):
    config = lro.CompressionConfig(lro.ByteBudget(0.9), bounds={"re:.*": bounds})
    assert [row.rank for row in lro.compress_(build(), calibrated[None], config).layers] == 3 * [rank]


def test_rounding_of_many_elements_is_near_its_mean():
    layer = nn.Linear(200, 220).double()
    space = layer_subspaces({"0": layer}, lro.calibrate(nn.Sequential(layer), [torch.randn(400, 200).double()]))["0"]
    predicted, factors, moment = rounding_of(space, "int8", by_loss=False), factorize(space, 96, "output"), space.moment
    down, up = (dequantized(*quantized(part, "int8"), torch.float64) for part in (factors.down, factors.up))
    for formats, change in (
        (("int8", None), factors.up @ (down - factors.down)),
        ((None, "int8"), (up - factors.up) @ factors.down),
        (("int8",), dequantized(*quantized(space.weight, "int8"), torch.float64) - space.weight),
    ):
        rank = 96 if len(formats) == 2 else None
        assert predicted.error(rank, formats) == pytest.approx(float((change @ moment * change).sum()), rel=0.05)


def test_streamed_outputs_keep_their_dtype():
    model = build()
    covariances = lro.calibrate(model, [torch.randn(300, 96).bfloat16()], side="output")
    report = lro.compress_(model, covariances, lro.ByteBudget(0.5))
    assert all(row.formats == (None, None) for row in report.layers) and report.layer_bytes == stored_bytes(model)


def test_configuration():
    config = lro.CompressionConfig(lro.ByteBudget(0.5, "fp8", "loss"))
    assert lro.CompressionConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="form must be one of 'int8', 'fp8'; got 'int4'"):
        lro.ByteBudget(0.5, "int4")


@pytest.mark.parametrize("pivoted", [False, True])
def test_reconstruction_and_checkpoint(calibrated, tmp_path, pivoted):
    torch.manual_seed(2)
    batches = [torch.randn(300, 96).bfloat16()]
    model, config = build(), lro.CompressionConfig(lro.ByteBudget(0.5), pivoted=pivoted)
    report = lro.compress_(model, calibrated[None], config, reconstruction=lro.SequentialReconstruction(batches))
    lro.save_pretrained(model, tmp_path, report)
    loaded = lro.load_pretrained(build(torch.float32), tmp_path)
    assert torch.equal(loaded(batches[0]), model(batches[0]))
    assert loaded[0].dtype is torch.bfloat16 and loaded[0].formats == model[0].formats
    copied = copy.deepcopy(loaded).float()
    assert copied[0].down.dtype is torch.int8 and copied[0].weight.dtype is torch.float32


@pytest.mark.parametrize("pivoted", [False, True])
def test_mean_outputs_are_exact(pivoted):
    torch.manual_seed(3)
    x = torch.randn(300, 96) + 5 * torch.randn(96)
    model = build(torch.float32)
    dense = [layer for layer in model if isinstance(layer, nn.Linear)]
    covariances = lro.calibrate(model, [x])
    config = lro.CompressionConfig(lro.ByteBudget(0.2, "fp8"), pivoted=pivoted)
    lro.compress_(model, covariances, config, lambda module, fqn: fqn == "0")
    assert model[0].formats == ("fp8", "fp8") and isinstance(model[0], PivotedLinear) == pivoted
    difference = model[0](x) - dense[0](x)
    assert difference.mean(0).abs().max() < 1e-4 < difference.std()
