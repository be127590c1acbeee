"""Calibration in bounded memory: plans, passes over the batches, sums kept as lower triangles."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.calibration.packing import from_lower_triangle, lower_triangle
from tests.calibration.comparing import assert_same_statistics

WIDTH = 24


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o((self.q(x) * self.k(x)).tanh() + self.v(x))


class Net(nn.Module):
    """Two blocks, a grouped convolution, and a layer that only some batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 2, groups=2)
        self.into = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.rare, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor, rare: bool = False) -> Tensor:
        x = self.into(self.conv(images).flatten(2).mT)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.rare(x) if rare else x)


def batches() -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(3, 4, 4, 4) + index, index == 1) for index in range(3)]


def calibrated(model: nn.Module, **options: Any) -> lro.Covariances:
    torch.manual_seed(7)
    return lro.calibrate(model, options.pop("batches", None) or batches(), sensitivity="fisher", **options)


@pytest.mark.parametrize(
    ("bound", "offload"),
    [("60kB", None), ("60kB", "disk"), ("110kB", None), ("110kB", "cpu"), (None, None), (None, "cpu"), (None, "disk")],
)
def test_passes_give_what_one_pass_gives(bound: str | None, offload: str | None, capfd) -> None:
    model = Net()
    whole = calibrated(model)
    found = calibrated(model, max_memory=bound, offload=offload)
    assert_same_statistics(found, whole, 0)
    passes = lro.plan_calibration(model, sensitivity="fisher", max_memory=bound, offload=offload).passes
    assert (passes > 1) == (bound is not None)
    assert f"{passes} passes over the batches" in capfd.readouterr().err or passes == 1
    distinct = [part for layer in found.values() for part in layer.moments().values()]
    assert all(part.is_packed == (bound is not None or offload is not None) for part in distinct)
    reports = [lro.compress_(copy.deepcopy(model), each, lro.ParameterBudget(0.7)) for each in (found, whole)]
    assert [layer.rank for layer in reports[0].layers] == [layer.rank for layer in reports[1].layers]


def test_sums_stay_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lives at any time, counted at every new sum, is at most what the plan says."""
    from lowrank_ops.calibration import recorder

    model, living, peak = Net(), [], 0

    class Counted(recorder.Sums):
        def __init__(self, *args: Any, **options: Any) -> None:
            nonlocal peak
            super().__init__(*args, **options)
            living.append(self)
            current = {id(sums.moments): sums.moments for sums in living if not sums.moments.is_packed}
            peak = max(peak, sum(part.nbytes for m in current.values() for part in m.tensors().values()))

    monkeypatch.setattr(recorder, "Sums", Counted)
    plan = lro.plan_calibration(model, sensitivity="fisher", max_memory="75kB", offload="disk")
    calibrated(model, max_memory="75kB", offload="disk")
    assert 0 < peak <= max(plan.peak.values()) <= 75_000 and plan.passes > 1


def peak_of(run: Callable[[], object], file: Path) -> int:
    """The most bytes that were allocated at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    profile.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events = [event["args"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(event["Total Allocated"] for event in events) - events[0]["Total Allocated"] + events[0]["Bytes"]


@pytest.mark.parametrize("mean", [0, 100])  # about which sums are shifted
def test_copies_of_rows_stay_within_the_bound(mean: float, tmp_path: Path) -> None:
    """Calibration takes what the forward, the backward and their gradients take, and what the plan says."""
    model, batch = nn.Sequential(*(nn.Linear(512, 512) for _ in range(2))), torch.randn(2, 1200, 512) + mean

    def loss(y: Tensor, batch: Tensor) -> Tensor:
        return y.square().sum()

    def plain() -> object:
        hidden = model[0](batch)
        y = model[1](hidden)
        return torch.autograd.grad(loss(y, batch), [hidden, y])

    expected = peak_of(plain, tmp_path / "plain.json")
    plan = lro.plan_calibration(model, sensitivity=loss)
    assert plan.gradients == 2 * 512 * 4
    taken = peak_of(lambda: lro.calibrate(model, [batch], sensitivity=loss), tmp_path / "calibrated.json")
    assert 0.9 * plan.kept < taken - expected <= sum(plan.peak.values())


def test_files_vanish_with_the_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    allocate, seen = os.posix_fallocate, []
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: (seen.extend(tmp_path.iterdir()), allocate(*args)))
    found = calibrated(Net(), offload="disk")
    assert not seen or not os.path.exists("/proc/self/fd")  # a process that is killed leaves no file
    assert not list(tmp_path.iterdir()) and found["head"].activations.second_moment.isfinite().all()


def test_a_full_disk_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: no temporary file of [\d,]+ bytes \(TMPDIR=.*TMPDIR"):
        calibrated(Net(), offload="disk")


def test_packed_statistics_merge_and_save(tmp_path: Path) -> None:
    model = Net()
    whole, packed = calibrated(model), calibrated(model, offload="disk")
    assert packed.memory() < 0.6 * whole.memory()
    assert_same_statistics(packed.merge(whole), whole.merge(packed), 1e-12)
    assert all(part.activations.is_packed for part in packed.merge(whole).values())
    packed.save(tmp_path / "c.safetensors")
    assert_same_statistics(lro.Covariances.load(tmp_path / "c.safetensors"), whole, 0)
    assert_same_statistics(copy.deepcopy(packed), whole, 0)


@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (3, 4)])
def test_lower_triangles(shape: tuple[int, ...]) -> None:
    rows = torch.randn(*shape[:-1], 7, shape[-1])
    moment = rows.mT @ rows
    packed = lower_triangle(moment)
    assert packed.shape == (*shape[:-1], shape[-1] * (shape[-1] + 1) // 2)
    torch.testing.assert_close(from_lower_triangle(packed, shape[-1]), moment)


def test_batches_that_come_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batches can be iterated only once, but the sums need \d+ passes"):
        calibrated(Net(), batches=iter(batches()), max_memory="75kB")
    calibrated(Net(), batches=iter(batches()))

    class Exhausted:
        def __init__(self) -> None:
            self.left = batches()

        def __iter__(self) -> Iterator[Any]:
            while self.left:
                yield self.left.pop()

    with pytest.raises(ValueError, match="batches was empty"):
        calibrated(Net(), batches=Exhausted(), max_memory="75kB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": "8 apples"}, "max_memory must be .*'8 apples'"),
        ({"max_memory": 0}, "max_memory must be .*0"),
        ({"offload": "gpu"}, "offload must be None, 'cpu' or 'disk'; got 'gpu'"),
        ({"max_memory": "1kB"}, "the sums of layer 'conv' need .* on cpu, .*larger max_memory"),
        ({"max_memory": "75kB", "offload": "cpu"}, "with what is kept there"),
    ],
)
def test_invalid_bounds_are_errors(options: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=message):
        calibrated(model, **options)
    with pytest.raises(ValueError, match=message):
        lro.plan_calibration(model, sensitivity="fisher", **options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_plan_of_a_model_without_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(4)])
    plan = lro.plan_calibration(model, max_memory="300MB", offload="disk")
    assert plan.passes == 4 and "128.1 MiB" in plan.table() and str(plan) in plan.table()
    assert lro.plan_calibration(model).passes == 1
    fits_three = lro.plan_calibration(model, max_memory="600MB", offload="disk")
    assert [layer.number for layer in fits_three.layers] == [0, 0, 1, 1]  # not three and one


def test_half_of_the_free_memory_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_ops.calibration.plan.free_memory", lambda device: 150_000)
    plan = lro.plan_calibration(Net(), sensitivity="fisher")
    assert plan.passes > 1 and plan.offload == "disk" and max(plan.peak.values()) <= 75_000
