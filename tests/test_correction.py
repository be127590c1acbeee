"""Corrected predictions: the second moment of each sample's derivative along every direction of a layer."""

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.correction import PRIOR_SAMPLES

pytestmark = pytest.mark.filterwarnings("ignore:fewer calibration rows")


class Tokens(nn.Module):
    """Layers over tokens, one of them called twice, and an average over tokens."""

    def __init__(self):
        super().__init__()
        self.wide, self.twice, self.head = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 4)

    def forward(self, x, mask=None):
        y = self.twice(self.twice(self.wide(x).tanh()).tanh())
        if mask is None:
            return self.head(y.mean(1))
        return self.head((y * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.grouped, self.line = (
            nn.Conv2d(2, 6, 3, padding=1),
            nn.Conv2d(6, 8, 3, groups=2),
            nn.Conv1d(8, 5, 2),
        )

    def forward(self, x):
        return self.line(self.grouped(self.conv(x).tanh()).tanh().flatten(2)).square().mean(2)


def loss(output, batch):
    return output.tanh().sum(1) ** 2


def derivatives(model, layer, space, batch):
    """By sample and direction, from the gradient of the weight."""
    _, down, up = space.loss.projection(min(space.dimensions[1:]))
    groups, mean = space.dimensions.groups, space.mean.reshape(space.dimensions.groups, 1, -1)
    found = []
    for index in range(len(next(iter(batch.values())))):
        sample = {name: value[index : index + 1] for name, value in batch.items()}
        value = loss(model(**sample), sample).sum()
        weight, bias = torch.autograd.grad(value, [layer.weight, layer.bias])
        weight = weight.reshape(groups, -1, mean.shape[-1]) - bias.reshape(groups, -1, 1) * mean
        up_g, down_g = (part.reshape(groups, *part.shape[-2:]) for part in (up, down))
        found.append((up_g.mT @ weight @ down_g.mT).diagonal(dim1=1, dim2=2))
    return torch.stack(found).reshape(len(found), *space.loss.subspace.spectrum.shape)


@pytest.mark.parametrize("limit", [4 << 30, 1])
@pytest.mark.parametrize("kind", ["tokens", "masked", "images"])
def test_spectra_are_the_derivatives_of_samples(kind, limit):
    torch.manual_seed(0)
    model = (Images() if kind == "images" else Tokens()).double().eval()
    batches = [{"x": torch.randn(5, 2, 6, 6) if kind == "images" else torch.randn(5, 7, 6)} for _ in range(3)]
    batches = [{name: value.double() for name, value in batch.items()} for batch in batches]
    options = {}
    if kind == "masked":
        for batch in batches:
            batch["mask"] = torch.arange(7) < torch.randint(3, 8, (5, 1))
        options = {"mask": "mask"}
    covariances = lro.calibrate(model, batches, sensitivity=loss, **options)
    found = lro.correct_predictions(model, covariances, batches, sensitivity=loss, max_state_bytes=limit, **options)
    assert list(found) == list(covariances)
    for fqn, space in found.items():
        squares = torch.cat([derivatives(model, model.get_submodule(fqn), space, batch) for batch in batches]).square()
        trust = len(squares) / (len(squares) + PRIOR_SAMPLES)
        expected = trust * squares.mean(0) + (1 - trust) * space.loss.subspace.spectrum
        torch.testing.assert_close(space.loss.corrected, expected, rtol=1e-6, atol=1e-12)
        assert space.loss.loss_increase(1) == pytest.approx(0.5 * float(expected[..., 1:].sum()))


class Mixed(nn.Module):
    """A branch that the loss sees token by token, and one that is averaged over tokens first."""

    def __init__(self):
        super().__init__()
        self.own, self.averaged = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x):
        common = x[:, :1].expand_as(x) + 0.1 * x  # what tokens have in common
        return torch.cat([self.own(x), 8 * self.averaged(common).mean(1, keepdim=True)], 1)


def test_layers_whose_rows_add_up_get_larger_ranks():
    torch.manual_seed(0)
    model, batches = Mixed().eval(), [torch.randn(32, 16, 32) * torch.logspace(0, -1, 32) for _ in range(4)]
    covariances = lro.calibrate(model, batches, sensitivity="output")
    subspaces = lro.correct_predictions(model, covariances, batches, sensitivity="output")

    def compressed(**options):
        small = Mixed().eval()
        small.load_state_dict(model.state_dict())
        config = lro.CompressionConfig(lro.ParameterBudget(0.7), pivoted=True)
        report = lro.compress_(small, covariances, config, **options)
        error = sum((small(batch) - model(batch)).square().sum().item() for batch in batches)
        return {row.fqn: row.parameters for row in report.layers}, error, report

    plain, plain_error, _ = compressed()
    corrected, error, report = compressed(subspaces=subspaces)
    assert corrected["averaged"] > plain["averaged"] and corrected["own"] < plain["own"]
    assert error < plain_error
    measured = error / sum(len(batch) for batch in batches) / 2
    assert sum(row.predicted_loss for row in report.layers) == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize(
    "other", [lambda output, batch: 7 * loss(output, batch), lambda output, batch: loss(output, batch).mean()]
)
def test_units_are_those_of_the_statistics(other):
    torch.manual_seed(0)
    model, batches = Tokens(), [{"x": torch.randn(12, 5, 6)}, {"x": torch.randn(12, 5, 6)}]
    covariances = lro.calibrate(model, batches, sensitivity=loss)
    of_loss, of_other = (
        lro.correct_predictions(model, covariances, batches, sensitivity=sensitivity) for sensitivity in (loss, other)
    )
    for fqn, space in of_loss.items():
        torch.testing.assert_close(of_other[fqn].loss.corrected, space.loss.corrected, rtol=1e-4, atol=0)


def test_probes_are_draws_for_one_forward():
    torch.manual_seed(0)
    model, batch = Tokens(), {"x": torch.randn(12, 5, 6)}
    covariances = lro.calibrate(model, [batch], sensitivity="output")
    probed = lro.correct_predictions(model, covariances, [batch], sensitivity="output", num_probes=2)
    twice = lro.correct_predictions(model, covariances, [batch, batch], sensitivity="output")
    once = lro.correct_predictions(model, covariances, [batch], sensitivity="output")
    for fqn, space in probed.items():
        torch.testing.assert_close(space.loss.corrected, twice[fqn].loss.corrected)
        assert not torch.equal(space.loss.corrected, once[fqn].loss.corrected)


def test_bad_arguments_are_refused():
    model, batches = nn.Sequential(nn.Linear(8, 8)), [torch.randn(32, 8)]
    with pytest.raises(ValueError, match="hold no output gradients"):
        lro.correct_predictions(model, lro.calibrate(model, batches), batches)
    covariances = lro.calibrate(model, batches, sensitivity="output")
    with pytest.raises(ValueError, match="batches was empty"):
        lro.correct_predictions(model, covariances, [], sensitivity="output")
    with pytest.raises(ValueError, match="num_probes must be positive"):
        lro.correct_predictions(model, covariances, batches, sensitivity="output", num_probes=0)
    with pytest.raises(ValueError, match="sensitivity must be"):
        lro.correct_predictions(model, covariances, batches, sensitivity="else")
    with pytest.raises(lro.NonFiniteActivationError, match="layer '0'"):
        lro.correct_predictions(model, covariances, [batches[0] * torch.nan], sensitivity="output")
    subspaces = lro.correct_predictions(model, covariances, batches, sensitivity="output")
    with pytest.raises(ValueError, match="corrected predictions for other settings than centered=False"):
        lro.compress_(model, covariances, lro.CompressionConfig(4, centered=False), subspaces=subspaces)


@pytest.mark.parametrize("sensitivity", ["fisher", "output"])
def test_batches_without_samples_are_refused(sensitivity):
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 3, 8)
    covariances = lro.calibrate(model, [x], sensitivity=sensitivity)
    for batch, options in ((x[:0], {}), (x, {"mask": lambda args, kwargs: torch.zeros(4, 3, dtype=torch.bool)})):
        with pytest.raises(ValueError, match="no row reached a layer"):
            lro.correct_predictions(model, covariances, [batch], sensitivity=sensitivity, **options)


def test_inference_mode_changes_nothing():
    model, batches = nn.Sequential(nn.Linear(8, 8)), [torch.randn(4, 3, 8)]
    covariances = lro.calibrate(model, batches, sensitivity="output")
    expected = lro.correct_predictions(model, covariances, batches, sensitivity="output")
    with torch.inference_mode():
        found = lro.correct_predictions(model, covariances, batches, sensitivity="output")
    assert torch.equal(found["0"].loss.corrected, expected["0"].loss.corrected)
