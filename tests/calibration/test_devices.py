"""Devices without float64: float32 sums about a shift, and decompositions on the CPU."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowrank_ops as lro
from lowrank_ops.models.running import float64_device, has_float64


class NoFloat64(TorchDispatchMode):
    """Refuses float64 tensors, as MPS does; numbers, of no dimension, are on the CPU there as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 and leaf.dim() for leaf in tree_leaves(found)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return found


@pytest.fixture
def asked_again() -> Iterator[None]:
    has_float64.cache_clear()
    yield
    has_float64.cache_clear()


@pytest.mark.usefixtures("asked_again")
@pytest.mark.parametrize("sensitivity", [None, "fisher"])
def test_sums_are_float32_where_float64_is_missing(sensitivity: str | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(2), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    batches = [torch.randn(16, 3, 5, 5) + 40 for _ in range(2)]
    with NoFloat64():
        assert not has_float64(torch.device("cpu"))
        found = lro.calibrate(model, batches, sensitivity=sensitivity)
    has_float64.cache_clear()
    exact = lro.calibrate(model, batches, sensitivity=sensitivity)
    for fqn, layer in exact.items():
        for name, moments in layer.moments().items():
            mine = found[fqn].moments()[name]
            assert mine.total.dtype == torch.float32 and mine.total.device.type == "cpu"
            if name == "activations":
                expected = moments.moment(centered=True)
                atol = 1e-5 * float(expected.diagonal(dim1=-2, dim2=-1).max())
                torch.testing.assert_close(mine.moment(centered=True), expected, rtol=1e-4, atol=atol)
    lro.compress_(model, found, lro.Ranks({"2": 4, "4": 4}))


@pytest.mark.usefixtures("asked_again")
def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    zeros = torch.zeros

    def refuse(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        asked.append(device)
        if device.type == "meta":
            raise RuntimeError("Required aspect fp64 is not supported on the device")
        return zeros(*shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "zeros", refuse)
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert [float64_device(device) for device in (cpu, other, cpu, other)] == [cpu] * 4
    assert asked == [cpu, other]


def test_reconstruction_and_errors_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    with torch.no_grad():
        dense[0].bias += 30.0  # of a mean that is large beside the spread
    batches = [torch.randn(128, 16) for _ in range(4)]
    covariances = lro.calibrate(dense, batches, sensitivity="output")
    found = []
    for exact in (True, False):
        if not exact:
            for room in ("reconstruction.regression", "calibration.sums", "calibration.statistics"):
                monkeypatch.setattr(f"lowrank_ops.{room}.has_float64", lambda device: False)
        model = copy.deepcopy(dense)
        settings = lro.SequentialReconstruction(batches, sensitivity="output")
        report = lro.compress_(model, covariances, lro.Ranks({"0": 6, "2": 4}), reconstruction=settings)
        found.append(([layer.predicted_error for layer in report.layers], lro.measure_errors(dense, model, batches)))
    assert found[0][0] != found[1][0]  # in float32
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)
