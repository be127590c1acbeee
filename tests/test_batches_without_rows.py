"""Batches without rows that count are refused if no batch has any, or if each batch is a training step."""

import copy

import pytest
import torch
from torch import nn

import lowrank_ops as lro


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2))
        self.head = nn.Linear(32, 48)

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def batch(samples=2, positions=6, real=1):
    x = torch.randn(samples, positions, 32)
    return {"x": x, "mask": torch.full(x.shape[:2], real)}


WITHOUT_ROWS = {
    "no samples": lambda: batch(samples=0),
    "no positions": lambda: batch(positions=0),
    "only padding": lambda: batch(real=0),
}
HALF = lro.ParameterBudget(0.5)


def summed(output, batch):
    return output.square().sum()


class World:
    def __init__(self):
        self.model = Tokens()
        self.batches = [batch() for _ in range(3)]
        self.covariances = lro.calibrate(self.model, self.batches, mask="mask", sensitivity="fisher")
        self.compressed = copy.deepcopy(self.model)
        lro.compress_(self.compressed, self.covariances, HALF)

    def reconstructed(self, settings):
        model = copy.deepcopy(self.model)
        lro.compress_(model, self.covariances, HALF, reconstruction=settings)
        return model.state_dict()

    def trained(self, batches, **options):
        student = copy.deepcopy(self.compressed)
        return lro.finetune_(student, batches, teacher=self.model, mask="mask", **options)


@pytest.fixture(scope="module")
def world():
    return World()


# By function: whether a batch without rows beside others is skipped, else refused.
CALLS = {
    "calibrate": (True, lambda w, b: lro.calibrate(w.model, b, mask="mask")),
    "calibrate, fisher": (True, lambda w, b: lro.calibrate(w.model, b, mask="mask", sensitivity="fisher")),
    "recalibrate": (
        True,
        lambda w, b: lro.recalibrate(w.model, w.covariances, b, HALF, mask="mask", sensitivity="fisher"),
    ),
    "correct_predictions": (True, lambda w, b: lro.correct_predictions(w.model, w.covariances, b, mask="mask")),
    "correct_predictions, loss": (
        True,
        lambda w, b: lro.correct_predictions(w.model, w.covariances, b, mask="mask", sensitivity=summed),
    ),
    "measured_ranks": (True, lambda w, b: lro.measured_ranks(w.model, w.covariances, b, 0.5, mask="mask")),
    "measured_ranks, pooled": (
        True,
        lambda w, b: lro.measured_ranks(w.model, w.covariances, b, 0.5, mask="mask", sensitivity="pooled"),
    ),
    "measured_ranks, loss": (
        True,
        lambda w, b: lro.measured_ranks(w.model, w.covariances, b, 0.5, mask="mask", sensitivity=summed),
    ),
    "measure_errors": (True, lambda w, b: lro.measure_errors(w.model, w.compressed, b, mask="mask")),
    "sequential": (True, lambda w, b: w.reconstructed(lro.SequentialReconstruction(b, mask="mask"))),
    "sequential, fisher": (
        True,
        lambda w, b: w.reconstructed(lro.SequentialReconstruction(b, sensitivity="fisher", mask="mask")),
    ),
    "blocks": (False, lambda w, b: w.reconstructed(lro.BlockReconstruction(b, mask="mask", epochs=1))),
    "blocks, logits": (
        False,
        lambda w, b: w.reconstructed(lro.BlockReconstruction(b, mask="mask", epochs=1, target="logits")),
    ),
    "finetune_": (False, lambda w, b: w.trained(b)),
    "finetune_, match": (False, lambda w, b: w.trained(b, match=["blocks.1"], soft_weight=0.0)),
}


@pytest.mark.parametrize("kind", WITHOUT_ROWS)
@pytest.mark.parametrize("name", CALLS)
def test_batches_without_rows_are_refused(world, name, kind):
    with pytest.raises(ValueError, match=r"no row|enough rows"):
        CALLS[name][1](world, [WITHOUT_ROWS[kind]() for _ in range(3)])


@pytest.mark.filterwarnings("ignore:predicted losses are not corrected")  # by this loss
@pytest.mark.parametrize("kind", WITHOUT_ROWS)
@pytest.mark.parametrize("name", CALLS)
def test_one_batch_without_rows_is_skipped_or_refused(world, name, kind):
    skipped, call = CALLS[name]
    batches = [world.batches[0], WITHOUT_ROWS[kind](), *world.batches[1:]]
    if not skipped:
        with pytest.raises(ValueError, match="no rows to use"):
            call(world, batches)
        return
    found = call(world, batches)
    if name in ("calibrate", "measure_errors"):  # nothing is drawn, and batches are not divided
        other = call(world, world.batches)
        same = {fqn: part.activations.total for fqn, part in other.items()} if name == "calibrate" else other
        for fqn, value in same.items():
            torch.testing.assert_close(found[fqn].activations.total if name == "calibrate" else found[fqn], value)


@pytest.mark.parametrize("name", CALLS)
def test_an_iterator_that_is_used_up_is_refused(world, name):
    with pytest.raises(ValueError, match=r"batches was empty|has no length"):
        CALLS[name][1](world, iter(()))
