"""Factors in the layer's dtype: x down^T stays in range, the product is unchanged, the mean output exact."""

import copy

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.factors import factorize
from lowrank_ops.layers import EightBitLinear, PivotedLinear
from lowrank_ops.models.layers import weight_matrix
from lowrank_ops.subspaces import layer_subspaces
from lowrank_ops.subspaces.balance import MAX_HIDDEN


def one_wide_direction(out_features: int = 2048) -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(256, out_features))
    with torch.no_grad():
        model[0].weight[:, 0] = 1500 * (1 + 0.1 * torch.randn(out_features))
    x = torch.randn(600, 256)
    x[:, 0] = 1 + 0.3 * x[:, 0]
    return model, x


def all_rows_along_one_direction() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(1024, 512, bias=False))
    direction = nn.functional.normalize(torch.randn(1024), dim=0)
    with torch.no_grad():
        model[0].weight.copy_(torch.outer(torch.randn(512).sign(), direction) * 1500)
        model[0].weight.add_(0.02 * torch.randn(512, 1024))
    return model, torch.randn(600, 1) * direction + 0.05 * torch.randn(600, 1024)


def large_inputs() -> tuple[nn.Module, torch.Tensor]:
    """Inputs near 4,000 everywhere: their norm is far beyond float16, and no output is."""
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(1024, 1024) / 1024 + 1e-3 * torch.randn(1024, 1024))
    return model, 4000 * (1 + 0.1 * torch.randn(600, 1024))


def small_weights() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    return model, torch.randn(600, 64)


MODELS = [one_wide_direction, all_rows_along_one_direction, large_inputs, small_weights]


@pytest.mark.parametrize("projection", ["output", "utilized", "weight", "input"])
@pytest.mark.parametrize("make", MODELS)
def test_float16_layers_stay_finite_and_as_predicted(make, projection):
    model, x = make()
    model, x = model.half(), x.half()
    dense = copy.deepcopy(model)
    config = lro.CompressionConfig(lro.Ranks({"0": 40}), projection=projection)
    report = lro.compress_(model, lro.calibrate(model, [x]), config)
    with torch.no_grad():
        y, z = dense(x).double(), model(x).double()
    assert y.isfinite().all() and z.isfinite().all()
    error = ((y - z).square().sum() / (y - y.mean(0)).square().sum()).item()
    assert error < 1.2 * report.layers[0].relative_error + 1e-3


@pytest.mark.parametrize("side", ["input", "output"])
def test_float16_autocast_of_a_float32_model_stays_finite(side):
    model, x = one_wide_direction(1024)
    assert model(x).norm(dim=1).max() > 65504
    lro.compress_(model, lro.calibrate(model, [x], side=side), lro.Ranks({"0": 40}))
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert model(x).isfinite().all()


def means_that_cancel() -> tuple[nn.Module, torch.Tensor]:
    """Two inputs of mean 30,000 cancel in the dense layer; factors that keep one of them need a bias of 120,000."""
    model = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight[:, 0], model[0].weight[:, 1] = 4, -4
    x = torch.randn(400, 16)
    x[:, 0], x[:, 1] = 3e4 + 100 * x[:, 0], 3e4
    return model, x


@pytest.mark.parametrize(("make", "dtype"), [(means_that_cancel, torch.float16), (means_that_cancel, torch.bfloat16)])
def test_factors_beyond_the_dtype_are_refused_by_name(make, dtype):
    model, x = make()
    covariances = lro.calibrate(model, [x])
    narrow, dense = model.to(dtype), list(model)
    assert narrow(x.to(dtype)).isfinite().all()
    for projection in ("input", "utilized"):
        config = lro.CompressionConfig(lro.Ranks({"0": 4}), projection=projection)
        if dtype == torch.float16:
            with pytest.raises(ValueError, match=r"layer '0': its bias of rank 4 reaches 1.2e\+05, .* torch.float16"):
                lro.compress_(narrow, covariances, config)
            with pytest.raises(ValueError, match="layer '0': its bias of rank 4"):
                reconstruction = lro.SequentialReconstruction([x.to(dtype)], ridge=0.0)
                lro.compress_(narrow, covariances, config, reconstruction=reconstruction)
            assert list(narrow) == dense
        else:
            lro.compress_(copy.deepcopy(narrow), covariances, config)
    lro.compress_(narrow, covariances, 4)
    assert narrow(x.to(dtype)).isfinite().all()


def test_weights_near_the_largest_number_do_not_overflow():
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).half()
    model[0].weight.data = (6e4 * torch.randn(32, 32).tanh()).half()
    x = (1e-3 * torch.randn(300, 32)).half()
    for projection in ("output", "input", "utilized", "weight"):
        compressed = copy.deepcopy(model)
        config = lro.CompressionConfig(lro.Ranks({"0": 16}), projection=projection)
        lro.compress_(compressed, lro.calibrate(model, [x]), config)
        assert compressed(x).isfinite().all()


@pytest.mark.parametrize("make", MODELS)
def test_scales_are_powers_of_two(make):
    model, x = make()
    spaces = layer_subspaces({"0": model[0]}, lro.calibrate(model, [x]))["0"]
    factors = factorize(spaces, 8)
    norms = factors.up.norm(dim=0).log2()  # 1 before the scales
    torch.testing.assert_close(norms, norms.round(), atol=1e-9, rtol=0)


def test_directions_without_weight_keep_their_factors_finite():
    model = nn.Sequential(nn.Linear(16, 16))
    nn.init.zeros_(model[0].weight)
    spaces = layer_subspaces({"0": model[0]}, lro.calibrate(model, [torch.randn(40, 16)]))["0"]
    for projection in ("output", "weight", "input"):
        factors = factorize(spaces, 4, projection)
        assert factors.up.isfinite().all() and not factors.down.isnan().any()


@pytest.mark.parametrize("projection", ["output", "utilized", "input"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_makes_the_mean_exact_for_rounded_factors(dtype, projection):
    model = nn.Sequential(nn.Linear(128, 96)).to(dtype)
    x = (torch.randn(2000, 128) * torch.logspace(0, -1.5, 128) + 30 * torch.randn(128)).to(dtype)
    layer = lro.LowRankLinear.from_linear(model[0], 32, lro.calibrate(model, [x])["0"], projection=projection)
    mean = x.double().mean(0)
    wanted = model[0].weight.double() @ mean + model[0].bias.double()
    found = layer.up.double() @ (layer.down.double() @ mean) + layer.bias.double()
    rounding = torch.finfo(dtype).eps / 2 * layer.bias.double().abs()  # of the bias alone, element by element
    assert ((found - wanted).abs() <= rounding + 1e-9).all()


def gpt2() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(48, 64)


def rows() -> torch.Tensor:
    return torch.randn(400, 64) * torch.logspace(0, -1, 64) + 30 * torch.randn(64)


def images() -> torch.Tensor:
    return torch.randn(40, 8, 6, 6) + 30 * torch.randn(8, 1, 1)


@pytest.mark.parametrize(
    ("make", "draw", "config"),
    [
        (lambda: nn.Linear(64, 48), rows, {"rank": 24, "pivoted": True}),
        (gpt2, rows, {"rank": 24, "pivoted": True}),
        (lambda: nn.Linear(64, 48), rows, {"rank": lro.ByteBudget(0.3), "pivoted": True}),
        (lambda: nn.Linear(64, 48), rows, {"rank": lro.ByteBudget(0.3)}),
        (lambda: nn.Linear(64, 48), rows, {"rank": lro.ByteBudget(0.6)}),
        (lambda: nn.Conv2d(8, 32, 3), images, {"rank": 12}),
        (lambda: nn.Conv1d(8, 32, 3), lambda: images().flatten(2), {"rank": 8}),
    ],
)
def test_every_kind_of_layer_makes_the_mean_exact(make, draw, config):
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).bfloat16(), draw().bfloat16()
    dense, covariances = copy.deepcopy(model[0]), lro.calibrate(model, [x])
    lro.compress_(model, covariances, lro.CompressionConfig(**config))
    layer = model[0].to_dense() if isinstance(model[0], EightBitLinear) else model[0].double()
    assert type(model[0]) is not type(dense) and layer.bias is not None
    mean = covariances["0"].activations.mean
    weight = layer.weight.detach().double().flatten(1) + 0  # the product of float64 factors
    wanted = weight_matrix(dense).double() @ mean + dense.bias.double()
    rounding = torch.finfo(torch.bfloat16).eps * layer.bias.double().abs()  # of two roundings of the bias
    assert ((weight @ mean + layer.bias.double() - wanted).abs() <= rounding + 1e-6).all()


def test_pivoted_layers_of_single_layers_make_the_mean_exact():
    model, x = nn.Sequential(nn.Linear(64, 48)).bfloat16(), rows().bfloat16()
    layer = PivotedLinear.from_linear(model[0], 24, lro.calibrate(model, [x])["0"])
    error = (layer.double()(x.double()) - model.double()(x.double())).mean(0)
    assert (error.abs() <= torch.finfo(torch.bfloat16).eps * layer.bias.abs() + 1e-6).all()


def test_eight_bits_leave_the_bias_of_the_dense_layer():
    """In float64 too, where no cast makes a copy of it."""
    model = nn.Sequential(nn.Linear(64, 48)).double()
    layer, bias = model[0], model[0].bias.detach().clone()
    lro.compress_(model, lro.calibrate(model, [rows().double()]), lro.ByteBudget(0.3))
    assert isinstance(model[0], EightBitLinear) and torch.equal(layer.bias, bias)
    assert not torch.equal(model[0].bias, bias)


@pytest.mark.parametrize("projection", ["output", "loss", "input", "utilized"])
def test_the_largest_elements_of_both_factors_are_alike(projection: str) -> None:
    """Direction by direction, to a power of two, however large the weight is."""
    torch.manual_seed(0)
    for scale in (1e-3, 1.0, 1e3):
        model = nn.Sequential(nn.Linear(24, 16)).double()
        model[0].weight.data *= scale
        statistics = lro.calibrate(model, [1e-2 * torch.randn(200, 24).double()], sensitivity="output")
        factors = factorize(layer_subspaces({"0": model[0]}, statistics)["0"], 6, projection)
        ratios = factors.down.abs().amax(-1) / factors.up.abs().amax(-2)
        assert bool((ratios > 0.24).all()) and bool((ratios < 4.1).all()), (scale, ratios)


@pytest.mark.parametrize(
    ("projection", "side"),
    [("output", "input"), ("loss", "input"), ("input", "input"), ("utilized", "input"), ("output", "output"),
     ("loss", "output")],
)  # fmt: skip
def test_hidden_values_keep_within_the_limit(projection: str, side: str) -> None:
    """Tiny weights with huge inputs, whose balanced factors would put up to 1e5 into x down^T."""
    torch.manual_seed(0)
    for scale, output in ((1e-9, 0.3), (1e-7, 100.0), (1e-3, 1e5)):
        model = nn.Sequential(nn.Linear(24, 16, bias=False)).double()
        model[0].weight.data *= scale
        x = output / scale * (torch.randn(200, 24).double() + 1)
        statistics = lro.calibrate(model, [x], sensitivity="output", side=side)
        factors = factorize(layer_subspaces({"0": model[0]}, statistics)["0"], 6, projection)
        sizes = (x @ factors.down.mT).square().mean(0).sqrt()
        assert bool((sizes <= MAX_HIDDEN * (1 + 1e-9)).all()) and bool((sizes > MAX_HIDDEN / 4).all()), (scale, sizes)
