"""Calibrator: losses from a loop of the user's own, given to observe."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro
from tests.calibration.comparing import assert_same_statistics


def calibrated(model, batches, observe=True):
    """Covariances from a loop over (x, labels)."""
    with lro.Calibrator(model, output_gradients=True) as calibrator:
        for x, labels in batches:
            loss = F.cross_entropy(model(x), labels, reduction="sum")
            if observe:
                calibrator.observe(loss, samples=len(labels))
    return calibrator.covariances


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(6, 4))


@pytest.fixture
def x():
    return torch.randn(5, 6)


def test_observed_losses_equal_those_of_calibrate():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [(torch.randn(16, 6), torch.randint(4, (16,))) for _ in range(3)]
    found = calibrated(model, batches)
    expected = lro.calibrate(
        model,
        batches,
        forward=lambda model, batch: model(batch[0]),
        sensitivity=lambda output, batch: F.cross_entropy(output, batch[1], reduction="none"),
    )
    assert all(layer.output_gradients.count == 48 for layer in found.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same_statistics(found, expected, 1e-7)
    config = lro.CompressionConfig(lro.Ranks({"0": 3}), projection="loss")
    assert lro.compress_(model, found, config).layers[0].projection == "loss"


def test_several_losses_of_one_forward(model, x):
    with lro.Calibrator(model, output_gradients=True) as calibrator:
        y = model(x)
        calibrator.observe(y[:, 0].sum(), 5, retain_graph=True)
        calibrator.observe(3 * y[:, 1].sum(), 5)
    gradients = calibrator.covariances["0"].output_gradients
    assert gradients.second_moment.diagonal().tolist() == [5, 45, 0, 0] and gradients.count == 10


def test_block_without_a_loss_warns(model, x):
    with pytest.warns(UserWarning, match="received no loss; call observe inside its block") as warned:
        covariances = calibrated(model, [(x, torch.randint(4, (5,)))], observe=False)
    assert warned[0].filename == __file__
    assert not covariances.has_output_gradients and covariances["0"].activations.count == 5


def test_observe_outside_its_block(model):
    calibrator = lro.Calibrator(model, output_gradients=True)
    with pytest.raises(RuntimeError, match="inside a with block"):
        calibrator.observe(torch.zeros(()), 1)
    with pytest.warns(UserWarning, match="received no loss"), calibrator:
        model(torch.randn(2, 6))
    with pytest.raises(RuntimeError, match="inside a with block"):
        calibrator.observe(torch.zeros(()), 1)


def test_second_block_is_an_error(model, x):
    with lro.Calibrator(model) as calibrator:
        model(x)
    with pytest.raises(RuntimeError, match="one with block"):
        calibrator.__enter__()
    assert not model._forward_hooks and calibrator.covariances["0"].activations.count == 5


def test_observe_needs_output_gradients(model, x):
    with lro.Calibrator(model) as calibrator, pytest.raises(RuntimeError, match="output_gradients=True"):
        calibrator.observe(model(x).sum(), 5)


def test_named_losses_are_for_calibrate(model):
    with pytest.raises(TypeError, match="output_gradients must be True or False; got 'fisher'"):
        lro.Calibrator(model, output_gradients="fisher")


@pytest.mark.parametrize(
    ("loss", "samples", "message"),
    [
        (lambda y: y, 5, r"loss must be a scalar tensor, summed over samples; got torch.float32 of shape \(5, 4\)"),
        (lambda y: y.sum(), 0, "samples must be positive; got 0"),
        (lambda y: torch.zeros(()), 5, "depends on no layer"),
    ],
    ids=["not a scalar", "no samples", "constant"],
)
def test_bad_losses(model, x, loss, samples, message):
    with (
        pytest.warns(UserWarning, match="received no loss"),
        lro.Calibrator(model, output_gradients=True) as calibrator,
        pytest.raises(ValueError, match=message),
    ):
        calibrator.observe(loss(model(x)), samples)


def test_a_loss_is_observed_once(model, x):
    with lro.Calibrator(model, output_gradients=True) as calibrator:
        loss = model(x).sum()
        calibrator.observe(loss, 5)
        with pytest.raises(ValueError, match="or its loss was used already"):
            calibrator.observe(loss, 5)


class TiedHead(nn.Module):
    def __init__(self, vocabulary: int = 40) -> None:
        super().__init__()
        self.embedding, self.mlp = nn.Embedding(vocabulary, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mlp(self.embedding(tokens)).relu())


def test_tied_heads_have_no_output_gradients_streamed():
    batches = [torch.randint(40, (4, 5))]
    covariances = lro.calibrate(TiedHead(), batches, sensitivity="fisher")
    assert list(covariances) == ["mlp"] and covariances.skipped == {"head": "its weight is tied to 'embedding'"}
    assert list(lro.calibrate(TiedHead(), batches)) == ["mlp", "head"]
    chosen = lro.calibrate(TiedHead(), batches, sensitivity="fisher", filter_fn=lambda module, fqn: True)
    assert chosen["head"].output_gradients is not None


def test_heads_beyond_max_state_bytes_stay_dense_and_named():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 700))
    covariances = lro.calibrate(model, [torch.randn(9, 64)], sensitivity="fisher", max_state_bytes=1 << 20)
    assert list(covariances) == ["0"]
    assert "its output gradients would take 3.7 MiB, more than max_state_bytes (1.0 MiB)" in covariances.skipped["2"]
    report = lro.compress_(model, covariances, lro.ParameterBudget(0.9))
    assert report.skipped["2"] == covariances.skipped["2"]
