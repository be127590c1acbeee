"""Rows whose mean is large beside their spread: sums about a shift keep the spread."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.calibration import Moments
from lowrank_ops.calibration.sums import SHIFT_RATIO
from tests.calibration.comparing import assert_same_statistics

FEATURES = 24


def far_rows(mean: float, deviation: float, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows about ``mean`` in every other feature; half of the features hold half of the directions."""
    basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES, dtype=torch.float64)).Q
    spread = torch.randn(rows, FEATURES, dtype=torch.float64) * torch.logspace(0, -1, FEATURES, dtype=torch.float64)
    where = torch.arange(FEATURES) % 2
    return (mean * where + deviation * (spread @ basis)).to(dtype)


def of_rows(rows: Tensor, dtype: torch.dtype = torch.float64, batch: int = 512) -> Moments:
    layer = nn.Linear(FEATURES, 4).to(rows.dtype)
    return lro.calibrate(layer, list(rows.split(batch)), dtype=dtype)[""].activations


@pytest.mark.parametrize(
    ("mean", "deviation", "dtype", "tolerance"),
    [
        (293.0, 0.5, torch.float32, 1e-4),
        (-1013.0, 3.0, torch.float32, 1e-4),
        (1e6, 1.0, torch.float64, 1e-9),
        (3.0, 1.0, torch.float32, 1e-4),
    ],
)
def test_spectrum_of_rows_far_from_zero(mean: float, deviation: float, dtype: torch.dtype, tolerance: float) -> None:
    rows = far_rows(mean, deviation, 4096, dtype)
    found = of_rows(rows, dtype).moment(centered=True)
    exact = torch.cov(rows.double().T, correction=0)
    torch.testing.assert_close(found, exact, rtol=0, atol=tolerance * float(exact.diagonal().max()))
    whole = rows.double().T @ rows.double() / len(rows)
    about_zero = of_rows(rows, dtype).moment(centered=False)
    torch.testing.assert_close(about_zero, whole, rtol=1e-6, atol=tolerance * deviation**2)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(
    ("mean", "deviation", "rows", "dtype"),
    [(293.0, 0.5, 4000, torch.float32), (1e5, 1.0, 100_000, torch.float64)],
)
def test_no_direction_is_taken_for_noise(
    mean: float, deviation: float, rows: int, dtype: torch.dtype, centered: bool
) -> None:
    x = far_rows(mean, deviation, rows, dtype)
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES)).to(dtype)
    covariances = lro.calibrate(model, list(x.split(50_000)), dtype=dtype)
    assert (
        lro.utilization(model, covariances, centered=centered, explained_variance=1.0).layers[0].input_rank == FEATURES
    )
    dense, inputs = copy.deepcopy(model).double(), x[:2000].double()
    report = lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"0": 8}), centered=centered))
    with torch.no_grad():
        output, change = dense(inputs), model.double()(inputs) - dense(inputs)
    measured = change.square().sum() / (output - output.mean(0)).square().sum()
    if centered:
        assert report.layers[0].relative_error == pytest.approx(float(measured), rel=0.2)


def test_only_features_far_from_zero_are_shifted() -> None:
    rows = torch.randn(2000, FEATURES)
    assert of_rows(rows).shift is None
    rows[:, 3] += 2 * SHIFT_RATIO
    shift = of_rows(rows).shift
    assert shift is not None and shift.dtype == torch.float64 and torch.nonzero(shift).flatten().tolist() == [3]


def test_narrow_rows_of_other_dtypes_than_the_first() -> None:
    rows = far_rows(300, 20, 3000).bfloat16()
    layer = nn.Linear(FEATURES, 4)
    with lro.Calibrator(layer) as calibrator:
        for part in (rows[:1000], rows[1000:2000].float(), rows[2000:].double()):
            layer.to(part.dtype)(part)
    exact = torch.cov(rows.double().T, correction=0)
    found = calibrator.covariances[""].activations.moment(centered=True)
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-3 * float(exact.diagonal().max()))


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 1, "padding_mode": "reflect"}, {"groups": 2}, {"stride": 2}]
)
def test_patches_far_from_zero(options: dict[str, object]) -> None:
    images = torch.randn(6, 4, 9, 8) + torch.tensor([200.0, 0, -90, 0.1]).view(4, 1, 1)
    layer = nn.Conv2d(4, 6, 3, **options)
    exact = lro.calibrate(layer.double(), [images.double()], side="input")[""].activations
    layer.float()
    found = lro.calibrate(layer, list(images.split(2)), dtype=torch.float32)[""].activations
    assert found.shift is not None and found.count == exact.count
    for centered in (True, False):
        moment = exact.about(None).moment(centered=centered)
        torch.testing.assert_close(found.moment(centered=centered), moment, rtol=1e-4, atol=1e-2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 4)
        self.conv = nn.Conv2d(2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 6)
        images = self.conv(x.view(-1, 2, 3, 1).expand(-1, 2, 3, 3))
        return (self.first(x).sum(-1) + self.second(x).sum(-1) + images.sum((1, 2, 3))).unsqueeze(-1) ** 2


@pytest.mark.parametrize("side", ["input", "output"])
def test_parts_with_other_shifts_merge_as_one_run(side: str) -> None:
    model = Net().double()
    parts = [torch.randn(50, 6, dtype=torch.float64) * 0.3 + mean for mean in (100.0, 130.0, 0.0)]
    options = {"side": side, "sensitivity": "output", "num_probes": 1}
    with torch.no_grad():
        model.first.bias += 1000
    found = [lro.calibrate(model, [part], **options) for part in parts]
    merged = found[0].merge(found[1]).merge(found[2])
    whole = lro.calibrate(model, parts, **options)
    for fqn in whole:
        mine, others = merged[fqn].activations, whole[fqn].activations
        assert mine.count == others.count
        for centered in (True, False):
            torch.testing.assert_close(
                mine.moment(centered=centered), others.moment(centered=centered), rtol=1e-9, atol=1e-9
            )
    weighted = merged["first"].token_weighted
    assert weighted is not None and torch.linalg.eigvalsh(weighted.moment(centered=True)).min() > -1e-6


def test_token_weights_of_rows_far_from_zero() -> None:
    rows = far_rows(300, 0.5, 400, torch.float32)
    near = rows - torch.where(torch.arange(FEATURES) % 2 == 1, 300.0, 0.0)
    model = nn.Sequential(nn.Linear(FEATURES, 3))

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return (output * torch.linspace(-1, 2, 400).view(4, 100, 1)).sum((1, 2))

    def centered_moment(x: Tensor) -> Tensor:
        layer = lro.calibrate(model, [x.view(4, 100, -1)], sensitivity=loss, dtype=torch.float32)["0"]
        assert layer.token_weighted is not None
        return layer.token_weighted.moment(centered=True)

    torch.testing.assert_close(centered_moment(rows), centered_moment(near), rtol=1e-3, atol=1e-4)


def test_shift_survives_a_file(tmp_path) -> None:
    model = Net()
    covariances = lro.calibrate(model, [torch.randn(30, 6) + 50], sensitivity="output")
    covariances.save(tmp_path / "c.safetensors")
    loaded = lro.Covariances.load(tmp_path / "c.safetensors")
    for fqn, layer in covariances.items():
        shift, other = layer.activations.shift, loaded[fqn].activations.shift
        assert shift is not None and other is not None and torch.equal(shift, other)
    assert_same_statistics(loaded, covariances, 0)


def test_noise_of_many_rows_stays_small() -> None:
    moments = Moments.zeros((4,), torch.float64, torch.device("cpu"))
    moments.count = 10_000_000
    assert moments.rounding < 1e-12
    moments.count = 3
    assert moments.rounding == 3 * torch.finfo(torch.float64).eps
