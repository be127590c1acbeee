"""A calibration that was killed resumes from its checkpoint, with a bit-identical result."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from tests.calibration.comparing import assert_same_statistics
from tests.calibration.test_plan import Net, batches


@pytest.fixture(autouse=True)
def _write_at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_ops.calibration.resume.SECONDS", 0)
    monkeypatch.setattr("lowrank_ops.files.os.fsync", lambda descriptor: None)


class Killed:
    """Batches that end in an interrupt before one of them, counted over all passes."""

    def __init__(self, given: list[Any], left: int) -> None:
        self._given, self._left = given, left

    def __iter__(self) -> Iterator[Any]:
        for batch in self._given:
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            yield batch


def calibrated(model: nn.Module, given: Any, seed: int = 3, **options: Any) -> lro.Covariances:
    torch.manual_seed(seed)
    return lro.calibrate(model, given, **{"sensitivity": "fisher", "num_probes": 2, **options})


def costless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_ops.calibration.resume.time.monotonic", lambda: 0.0)


@pytest.mark.parametrize(("bound", "kills"), [(None, (1, 2)), ("60kB", (1, 2, 4, 5))])
@pytest.mark.parametrize("seed", [3, 4])  # of the processes that go on
def test_goes_on_equal_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str | None, kills: tuple[int, ...], seed: int
) -> None:
    """In the second case the passes are of three batches, and the third and fourth kills are in the next pass."""
    costless(monkeypatch)
    model, given = Net(), batches()
    options = {"max_memory": bound, "checkpoint": tmp_path / "stats", "tokens": 0.7 if bound else 1.0}
    expected = calibrated(model, given, max_memory=bound, tokens=options["tokens"])
    for run, left in enumerate(kills):
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, Killed(given, left), seed if run else 3, **options)
    assert_same_statistics(calibrated(model, given, seed, **options), expected, 0)
    assert_same_statistics(calibrated(model, [], seed, **options), expected, 0)  # finished: no batch is needed


def test_a_finished_calibration_of_other_batches_is_refused(tmp_path: Path) -> None:
    model, given = Net(), batches()
    expected, state = calibrated(model, given, checkpoint=tmp_path), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(given[::-1], batch_size=None)  # which draws a seed
    for others in (given[::-1], iter(given[1:]), loader):
        with pytest.raises(ValueError, match="of another calibration: its batches differ"):
            lro.calibrate(model, others, sensitivity="fisher", num_probes=2, checkpoint=tmp_path)
    assert_same_statistics(calibrated(model, iter(given), checkpoint=tmp_path), expected, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_that_are_shuffled_alike_are_the_same(tmp_path: Path) -> None:
    """A pass begins with the random state of the first run's, so a DataLoader shuffles as it did then."""
    model, loader = Net(), torch.utils.data.DataLoader(batches(), batch_size=None, shuffle=True)
    expected = calibrated(model, loader, checkpoint=tmp_path)
    assert_same_statistics(calibrated(model, loader, seed=5, checkpoint=tmp_path), expected, 0)


def test_other_batches_after_a_finished_pass_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_ops.calibration.resume.SECONDS", 60)  # nothing of the second pass is written
    model, options = Net(), {"max_memory": "60kB", "checkpoint": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, Killed(batches(), 4), **options)
    with pytest.raises(ValueError, match="of another calibration: its batches differ"):
        calibrated(model, batches()[::-1], **options)


def test_other_calibrations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costless(monkeypatch)
    model, given = Net(), batches()
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, Killed(given, 2), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="of another calibration: its batches differ"):
        calibrated(model, given[::-1], checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"has added 2 batches, more than the 1"):
        calibrated(model, given[:1], checkpoint=tmp_path)
    for options, differ in {
        "sensitivity": "sensitivity",
        "num_probes": "num_probes",
        "side": "arguments",
        "dtype": "arguments",
    }.items():
        value = {"sensitivity": "output", "num_probes": 1, "side": "output", "dtype": torch.float32}[options]
        with pytest.raises(ValueError, match=f"of another calibration: its {differ} differ"):
            calibrated(model, given, checkpoint=tmp_path, **{options: value})
    with torch.no_grad():
        model.head.weight[4, 4] += 1
    with pytest.raises(ValueError, match="its weights differ"):
        calibrated(model, given, checkpoint=tmp_path)


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costless(monkeypatch)
    model, given = Net(), batches()
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, Killed(given, 2), checkpoint=tmp_path)
    path = tmp_path / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.safetensors' cannot be read: .*Delete it"):
        calibrated(model, given, checkpoint=tmp_path)


def test_a_missing_pass_is_an_error(tmp_path: Path) -> None:
    model, given = Net(), batches()
    calibrated(model, given, checkpoint=tmp_path)
    (tmp_path / "pass-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks the file 'pass-1\.safetensors' of a finished pass"):
        calibrated(model, given, checkpoint=tmp_path)


def test_processes_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_ops.calibration.resume.rank_and_world", lambda: (1, 2))
    calibrated(Net(), batches(), checkpoint=tmp_path / "stats")
    assert [path.name for path in (tmp_path / "stats").iterdir()] == ["rank-1"]


def test_states_are_written_about_every_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_ops.calibration.resume.SECONDS", 60)
    with pytest.raises(KeyboardInterrupt):
        calibrated(Net(), Killed(batches(), 2), checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())
