"""Failures of the allocator: the layer, the bytes and a remedy, in an exception of the same type."""

import numpy
import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.models.running import in_layer

BATCHES = [torch.randn(20, 8)]
RANKS, SEQUENTIAL = lro.Ranks({"0": 4}), lro.SequentialReconstruction(BATCHES, ridge=0.0)
BLOCKS = lro.BlockReconstruction(2 * BATCHES, blocks="")


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def allocate(*args, **kwargs):
    return torch.empty(1 << 48)


def gpu_is_full(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def numpy_is_full(*args, **kwargs):
    return numpy.empty(1 << 50)


@pytest.mark.parametrize(
    ("fail", "kind", "message"),
    [
        (allocate, RuntimeError, "you tried to allocate 1125899906842624 bytes"),
        (gpu_is_full, torch.OutOfMemoryError, "Tried to allocate 2.00 GiB"),
        (numpy_is_full, MemoryError, "Unable to allocate 8.00 PiB"),
    ],
)
@pytest.mark.parametrize(
    ("place", "step", "layer"),
    [
        ("lowrank_ops.calibration.sums.Moments.zeros", lambda m, c: lro.calibrate(m, BATCHES), "0"),
        ("lowrank_ops.calibration.sums.covariance_update_", lambda m, c: lro.calibrate(m, BATCHES), "0"),
        (
            "lowrank_ops.calibration.token_weights.SavedActivation.add_to",
            lambda m, c: lro.calibrate(m, BATCHES, sensitivity="output"),
            "0",
        ),
        ("lowrank_ops.subspaces.principal.descending_eigh", lambda m, c: lro.utilization(m, c), "0"),
        ("lowrank_ops.subspaces.principal.descending_eigh", lambda m, c: lro.compress_(m, c, lro.Ranks({"2": 4})), "2"),
        (
            "lowrank_ops.subspaces.principal.descending_eigh",
            lambda m, c: lro.compress_(m, c, lro.ExplainedVariance(0.9)),
            "0",
        ),
        (
            "lowrank_ops.reconstruction.sequential.reconstruct_layers",
            lambda m, c: lro.compress_(m, c, RANKS, reconstruction=SEQUENTIAL),
            "0",
        ),
        ("lowrank_ops.compress.replacement", lambda m, c: lro.compress_(m, c, lro.Ranks({"2": 4})), "2"),
        (
            "lowrank_ops.subspaces.channels.kept_order",
            lambda m, c: lro.compress_(m, c, lro.Ranks({}, channels={"2": 4})),
            "2",
        ),
        (
            "lowrank_ops.correction._Directions",
            lambda m, c: lro.correct_predictions(m, lro.calibrate(m, BATCHES, sensitivity="output"), BATCHES),
            "0",
        ),
        (
            "lowrank_ops.reconstruction.blocks._train",
            lambda m, c: lro.compress_(m, c, lro.Ranks({"2": 4}), reconstruction=BLOCKS),
            "2",
        ),
    ],
)
def test_the_layer_and_a_remedy_are_named(place, step, layer, fail, kind, message, monkeypatch):
    dense = model()
    covariances = lro.calibrate(dense, BATCHES)
    layers = list(dense)
    monkeypatch.setattr(place, fail)
    with pytest.raises(kind, match=rf"layer '{layer}': not enough memory\. \w+ .*{message}"):
        step(dense, covariances)
    assert list(dense) == layers and not dense[0]._forward_pre_hooks and not dense[2]._forward_hooks


def test_other_errors_are_as_they_were():
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"), in_layer("0"):
        torch.ones(2, 3) @ torch.ones(2, 3)
