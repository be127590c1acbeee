"""Factors computed on another device than the model's, one layer at a time."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import lowrank_ops as lro
from lowrank_ops.models.running import has_float64
from tests.allocator import peak_bytes

DEVICE = torch.device("xpu", 0)  # stands for any that this machine does not have


class Sent(Tensor):
    """A tensor on the device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE


class SecondDevice(TorchFunctionMode):
    """A device in the CPU's memory: tensors go there by ``device`` and ``to`` only, and meet no tensors of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sent = any(isinstance(tensor, Sent) for tensor in tensors)
        targets = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, (torch.device, str))]
        if name in ("to", "cpu"):
            if len(tensors) > 1:
                sent = isinstance(tensors[1], Sent)
            elif targets or name == "cpu":
                sent = name == "to" and torch.device(targets[0]).type == DEVICE.type
        elif kwargs.get("device") is not None:
            sent = torch.device(kwargs["device"]).type == DEVICE.type
        elif name != "copy_" and any(isinstance(tensor, Sent) != sent for tensor in tensors if tensor.dim()):
            raise RuntimeError(f"{name}: tensors of two devices")
        self.products += sent and name in ("matmul", "__matmul__", "eigh", "linalg_eigh", "qr", "linalg_qr")

        def plain(leaf: Any) -> Any:
            if isinstance(leaf, Sent):
                return leaf.as_subclass(Tensor)
            is_device = isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.startswith(DEVICE.type))
            return torch.device("cpu") if is_device else leaf

        found = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        if not sent or isinstance(found, torch.Size):
            return found
        return tree_map(lambda leaf: leaf.as_subclass(Sent) if type(leaf) is Tensor else leaf, found)


@pytest.fixture
def device() -> Iterator[SecondDevice]:
    has_float64.cache_clear()
    with SecondDevice() as mode:
        yield mode
    has_float64.cache_clear()


def calibrated() -> tuple[nn.Module, dict[str, lro.Covariances]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16, bias=False), nn.Unflatten(-1, (4, 2, 2)), nn.Conv2d(4, 6, 2)
    ).bfloat16()
    batches = [torch.randn(64, 24).bfloat16() for _ in range(2)]
    loss = {"sensitivity": "output"}
    return model, {
        kind: lro.calibrate(model, batches, **(loss if kind == "loss" else {})) for kind in ("plain", "loss")
    }


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("plain", lro.CompressionConfig(lro.Ranks({"re:.*": 3}), projection="output")),
        ("plain", lro.CompressionConfig(lro.Ranks({"re:.*": 3}), projection="utilized")),
        ("plain", lro.CompressionConfig(lro.Ranks({"re:.*": 3}), projection="weight")),
        ("plain", lro.CompressionConfig(lro.ParameterBudget(0.8, "variance"), centered=False)),
        ("loss", lro.CompressionConfig(lro.ParameterBudget(0.8))),
    ],
)
def test_factors_come_from_the_device(device: SecondDevice, kind: str, config: lro.CompressionConfig) -> None:
    model, covariances = calibrated()
    here = copy.deepcopy(model)
    expected = lro.compress_(here, covariances[kind], config)
    assert not device.products
    report = lro.compress_(model, covariances[kind], config, device=str(DEVICE))
    assert device.products
    assert report == expected
    for name, value in model.state_dict().items():
        assert type(value) is Tensor and value.dtype == torch.bfloat16
        assert torch.equal(value, here.state_dict()[name])


@pytest.mark.parametrize("device", ["xpu", "meta"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    model, covariances = calibrated()
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used here"):
        lro.compress_(model, covariances["plain"], device=device)
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("projection", ["output", "loss"])
def test_one_layer_is_worked_on_at_a_time(monkeypatch: pytest.MonkeyPatch, projection: str) -> None:
    monkeypatch.setattr("lowrank_ops.compress.MAX_HELD_BYTES", 0)
    peaks, width, rank = {}, 96, 8
    for layers in (2, 8):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        covariances = lro.calibrate(model, [torch.randn(200, width)], sensitivity="output")
        config = lro.CompressionConfig(lro.ParameterBudget(0.2, "loss"), projection=projection)
        peaks[layers] = peak_bytes(
            lambda model=model, given=covariances, config=config: lro.compress_(model, given, config)
        )
    square = 8 * width**2
    assert 4 * square < peaks[2] < 16 * square
    factors = 6 * 3 * 4 * 2 * width * rank  # of six layers, before they are padded, after, and their spectra
    assert peaks[8] - peaks[2] < factors + 6 * 16 * width < 2 * square
