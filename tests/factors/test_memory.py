"""What compress_ keeps in memory under max_memory, and layers that alone need more."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
import lowrank_ops.compress
from lowrank_ops.factors.memory import bytes_to_spare, working_bytes
from lowrank_ops.folders import compress_folder
from lowrank_ops.subspaces import layer_subspaces
from tests.allocator import peak_bytes

LOSS = lro.CompressionConfig(lro.ParameterBudget(0.8, "loss"), projection="loss")
CONFIGS = {
    "output": lro.CompressionConfig(lro.Ranks({"0": 128}), projection="output"),
    "loss": LOSS,
    "output, ranks by loss": lro.CompressionConfig(lro.ParameterBudget(0.9, "loss"), projection="output"),
    "utilized": lro.CompressionConfig(lro.Ranks({"0": 128}), projection="utilized"),
    "weight": lro.CompressionConfig(lro.Ranks({"0": 128}), projection="weight"),
    "bytes": lro.CompressionConfig(lro.ByteBudget(0.9, allocation="variance"), projection="output"),
    "explained variance": lro.CompressionConfig(lro.ExplainedVariance(0.9), projection="output"),
}


def calibrated(
    *widths: int, rows: int = 500, sensitivity: str | None = "output"
) -> tuple[nn.Sequential, lro.Covariances]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(widths)))
    return model, lro.calibrate(model, [torch.randn(rows, widths[0])], sensitivity=sensitivity, offload="disk")


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "rows"),
    [
        ("output", 256, 128, 700),
        ("loss", 128, 256, 90),
        ("loss", 256, 128, 700),
        ("output, ranks by loss", 256, 128, 700),
        ("utilized", 256, 128, 90),
        ("weight", 192, 192, 700),
        ("bytes", 192, 192, 90),
        ("explained variance", 128, 256, 90),
    ],
)
def test_the_bytes_of_a_layer_cover_what_it_takes(
    name: str, inputs: int, outputs: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank_ops.compress, "MAX_HELD_BYTES", 0)
    sensitivity = None if name in ("output", "utilized", "explained variance") and inputs > outputs else "output"
    model, covariances = calibrated(inputs, outputs, rows=rows, sensitivity=sensitivity)
    space = layer_subspaces({"0": model[0]}, covariances)["0"]
    needed = working_bytes(space, CONFIGS[name])
    assert 0.4 * needed < peak_bytes(lambda: lro.compress_(model, covariances, CONFIGS[name])) < needed


@pytest.mark.parametrize("spare", [0, 100_000, 3_000_000])
def test_a_bound_is_kept_and_changes_no_factors(spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, covariances = calibrated(*[96] * 9)
    other, _ = calibrated(*[96] * 9)
    report = lro.compress_(other, covariances, LOSS)
    dense = [weakref.ref(layer.weight) for layer in model]
    in_files = []
    inner = lowrank_ops.compress._compress

    def compress(*arguments: object) -> object:
        found = inner(*arguments)
        in_files.extend(found[1])
        assert not in_files or all(weight() is None for weight in dense)  # before the new ones take their place
        return found

    monkeypatch.setattr(lowrank_ops.compress, "_compress", compress)
    spaces = layer_subspaces(dict(model.named_children()), covariances)
    bound = spare + 10**9 - bytes_to_spare(spaces, LOSS, 10**9)
    del spaces
    gc.collect()  # their weights
    found: list[object] = []
    peak = peak_bytes(lambda: found.append(lro.compress_(model, covariances, LOSS, max_memory=bound)))
    assert peak < bound and found == [report]
    assert len(in_files) == (0 if spare == 3_000_000 else sum(layer.is_replaced for layer in report.layers))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
        assert value.untyped_storage().filename is None
    model(torch.randn(3, 96)).sum().backward()


@pytest.mark.parametrize("fault", ["full disk", "no folder", "file size"])
def test_files_that_cannot_be_written_leave_the_model(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, covariances = calibrated(*[48] * 6)
    spaces = layer_subspaces(dict(model.named_children()), covariances)
    bound = 10**9 - bytes_to_spare(spaces, LOSS, 10**9)
    before = {name: (id(part), part.clone()) for name, part in model.named_parameters()}
    written, code = [], {"full disk": errno.ENOSPC, "no folder": errno.ENOENT, "file size": errno.EFBIG}[fault]

    def allocate(*args: object) -> None:
        written.append(args)
        if len(written) == 5 and fault != "no folder":  # some layers are in files by then
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    if fault == "no folder":
        monkeypatch.setattr("tempfile.tempdir", "/missing")
    with pytest.raises(OSError, match=r"no temporary file of .* bytes .*set TMPDIR to another folder") as raised:
        lro.compress_(model, covariances, LOSS, max_memory=bound)
    assert raised.value.errno == code
    for name, part in model.named_parameters():
        assert id(part) == before[name][0] and torch.equal(part, before[name][1])


@pytest.mark.parametrize("where", ["model", "folder"])
def test_a_layer_that_needs_more_is_named(where: str, tmp_path: Path) -> None:
    model, covariances = calibrated(32, 96, 32)
    config = lro.CompressionConfig(8, projection="output")
    message = (
        r"layer '1' \(96 -> 32\) needs 4\d\d\.\d KiB besides the model, and spectra and shared inputs take 9\.0 KiB; "
        r"max_memory is 195\.3 KiB\. Pass a larger max_memory, calibrate with side='smaller', or leave the layer out"
    )
    lro.save_pretrained(model, tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        if where == "model":
            lro.compress_(model, covariances, config, max_memory="200kB")
        else:
            compress_folder(tmp_path / "dense", tmp_path / "smaller", covariances, config, max_memory="200kB")
    assert isinstance(model[1], nn.Linear) and not (tmp_path / "smaller").exists()


def test_a_reconstruction_is_not_bounded() -> None:
    model, covariances = calibrated(32, 32)
    with pytest.raises(ValueError, match="max_memory does not bound a reconstruction"):
        lro.compress_(
            model, covariances, reconstruction=lro.SequentialReconstruction([torch.randn(8, 32)]), max_memory="1GB"
        )


class Shared(nn.Module):
    """Two layers with one input, and another one between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Linear(48, 48), nn.Linear(48, 32), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self.a(x)).sum() + self.b(x).sum()


def test_an_input_that_a_later_layer_shares_counts() -> None:
    model = Shared()
    covariances = lro.calibrate(model, [torch.randn(100, 48)])
    layers = dict(model.named_children())
    config = lro.CompressionConfig(8, projection="output")
    adjacent = {fqn: layers[fqn] for fqn in ("a", "b", "between")}
    spare = [bytes_to_spare(layer_subspaces(some, covariances), config, 10**6) for some in (adjacent, layers)]
    assert spare[0] - spare[1] == 2 * 8 * 48**2
