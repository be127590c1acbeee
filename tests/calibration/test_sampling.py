"""``tokens=``: a random share of the rows, unbiased, seeded, and how far the reports say it can be off."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.calibration.sampling import Sampler
from lowrank_ops.report.text import rows_note
from tests.calibration.comparing import assert_same_statistics
from tests.calibration.test_plan import Net, batches


def calibrated(model: nn.Module, given: Any, seed: int = 5, **options: Any) -> lro.Covariances:
    torch.manual_seed(seed)
    return lro.calibrate(model, given, **{"sensitivity": lambda output, batch: output.square().sum((1, 2)), **options})


def test_chosen_rows_are_unbiased() -> None:
    """The mean over many choices is what all rows give, for every kind of sums, in batches of different sizes."""
    model, given = Net().double(), [(torch.randn(n, 4, 3, 4).double() + 1, n == 3) for n in (1, 3, 6)]
    whole = calibrated(model, given)
    found = [calibrated(model, given, seed, tokens=0.4) for seed in range(30)]
    for fqn, layer in whole.items():
        for name, moments in layer.moments().items():
            parts = [each[fqn].moments()[name].about(None) for each in found if fqn in each]
            expected = moments.about(None)
            share = 1.0 if name == "output_gradients" else 0.4
            mean = torch.stack([part.second_moment for part in parts]).sum(0) / len(found) / share
            spread = torch.stack([part.second_moment / share for part in parts]).std(0) / len(found) ** 0.5
            off = (mean - expected.second_moment).abs() / (spread + 1e-9 + 0.02 * expected.second_moment.abs().max())
            assert off.max() < 6, (fqn, name)
            if name != "output_gradients":
                counts = torch.tensor([float(part.count) for part in parts]).sum() / len(found)
                assert counts == pytest.approx(0.4 * moments.count, rel=0.15)
    assert {layer.output_gradients.count for each in found for layer in each.values()} == {10}


def test_choices_depend_on_the_seed_only() -> None:
    model, given = Net(), batches()
    first = calibrated(model, given, tokens=0.5)
    assert_same_statistics(calibrated(model, given, tokens=0.5), first, 0)
    assert_same_statistics(calibrated(model, given, tokens=0.5, max_memory="60kB"), first, 0)
    other = calibrated(model, given, seed=6, tokens=0.5)
    assert not torch.equal(other["into"].activations.about(None).total, first["into"].activations.about(None).total)
    assert_same_statistics(calibrated(model, given, tokens=1.0), calibrated(model, given), 0)


def test_sizes_of_choices_are_right_on_average() -> None:
    sizes = [len(Sampler(0.3, str(seed)).choose(4)) for seed in range(2000)]
    assert set(sizes) == {1, 2} and sum(sizes) / len(sizes) == pytest.approx(1.2, abs=0.04)
    assert len(Sampler(0.3, "").choose(0)) == 0


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_other_shares_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"tokens must be a number in \(0, 1\]; got"):
        lro.calibrate(nn.Linear(4, 4), [torch.randn(8, 4)], tokens=fraction)


def test_reports_say_how_far_they_can_be_off() -> None:
    """Of many choices of rows, about 95% have variances and predicted errors within what the reports say."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 24) * torch.logspace(0, -1, 24)
    model = nn.Sequential(nn.Linear(24, 24))
    dense = nn.Sequential(nn.Linear(24, 24))
    dense.load_state_dict(model.state_dict())
    within = []
    for part in x[:8_000].split(400):
        covariances = lro.calibrate(dense, [part])
        model = nn.Sequential(nn.Linear(24, 24))
        model.load_state_dict(dense.state_dict())
        report = lro.compress_(model, covariances, lro.Ranks({"0": 8}))
        true = lro.measure_errors(dense, model, [x[16_000:]])["0"]
        predicted = report.layers[0].relative_error
        within.append(abs(true / predicted - 1) < 2 * (2 / 400) ** 0.5 + 2 * 8 / 400)
    assert sum(within) >= 0.9 * len(within)
    assert (
        "from at least 400 rows per layer: variances are within 14.1%, predicted errors within 18.1%" in report.table()
    )
    assert "variances are within 14.1% (two" in lro.utilization(dense, covariances).table()
    assert rows_note([], errors=True) == []


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize(
    ("model", "shape", "options"),
    [
        (nn.Sequential(nn.Linear(4, 3)), (50, 4), {}),
        (nn.Sequential(nn.Linear(4, 3)), (5, 10, 4), {"side": "output"}),
        (nn.Sequential(nn.Linear(4, 3, dtype=torch.float16)), (50, 4), {"sensitivity": "output"}),
        (nn.Sequential(nn.Conv2d(2, 3, 2)), (2, 2, 20, 5), {}),
    ],
    ids=["input", "output", "float16", "convolution"],
)
def test_rows_that_are_not_drawn_must_be_finite(model, shape, options, value):
    """One number at a time, all of them; about one row in fifty is drawn."""
    dtype = next(model.parameters()).dtype
    for place in range(0, math.prod(shape), 23):
        batches = [torch.randn(shape).to(dtype) for _ in range(2)]
        batches[1].view(-1)[place] = value
        with pytest.raises(lro.NonFiniteActivationError, match=r"layer '0': .* holds NaN or inf .* in batch 1"):
            lro.calibrate(model, batches, tokens=0.02, **options)
