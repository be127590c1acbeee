"""The study of self-supervision: the encoder sees only visible patches, learns, and resumes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import pretraining, vision
from benchmarks.accuracy.results import Results
from lowrank_ops.demo.data import load_images
from lowrank_ops.demo.vit import ViT


def small_vit() -> ViT:
    torch.manual_seed(0)
    return ViT(dim=32, depth=1, heads=2).eval()


def autoencoder() -> pretraining.MaskedAutoencoder:
    return pretraining.MaskedAutoencoder(small_vit(), dim=16, depth=1, heads=2)


def few(count: int = 64) -> tuple[Tensor, Tensor]:
    images, labels = load_images("calibration")
    return images[:count], labels[:count]


def test_the_encoder_sees_only_visible_patches() -> None:
    model, (images, _) = autoencoder(), few(2)
    seen = torch.tensor([[0, 5, 9, 15], [3, 2, 1, 0]])
    patches = F.unfold(images, 7, stride=7)
    hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, seen, False)
    patches[hidden.unsqueeze(1).expand_as(patches)] = 7.0
    others = F.fold(patches, 28, 7, stride=7)
    code = model.encode(images, seen)
    assert code.shape == (2, 5, 32)
    torch.testing.assert_close(code, model.encode(others, seen))
    assert not torch.allclose(code, model.encode(others, (seen + 1) % 16))


def test_all_patches_in_order_give_the_encoders_tokens() -> None:
    model, (images, _) = autoencoder(), few(2)
    kept: list[Tensor] = []
    model.encoder.norm.register_forward_hook(lambda module, args, x: kept.append(x))
    model.encoder(images)
    torch.testing.assert_close(model.encode(images, torch.arange(16).expand(2, -1)), kept[0])


def test_the_decoder_puts_patches_in_their_places() -> None:
    model = autoencoder()
    model.embed, model.blocks, model.norm = nn.Identity(), nn.ModuleList(), nn.Identity()
    model.pixels = nn.Identity()
    nn.init.zeros_(model.pos_embed)
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    x = torch.randn(3, 5, 16)  # the class token and the patches seen
    decoded = model.decode(x, order)
    for image in range(3):
        torch.testing.assert_close(decoded[image, order[image, :4]], x[image, 1:])
        assert not decoded[image, order[image, 4:]].any(), "a hidden patch got a code"


class Interrupt(Exception):
    """Stops a training."""


def test_training_learns_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "ViT", small_vit)
    monkeypatch.setattr(pretraining, "BATCH", 16)
    monkeypatch.setattr(pretraining, "SAVE_EVERY", 3)
    images, _ = few()
    encoder, report = pretraining.pretrained(images, 10, tmp_path / "whole.pt")
    first = torch.load(tmp_path / "whole.pt")["losses"]
    assert len(first) == 40 and report["loss"] < 0.9 * sum(first[:4]) / 4

    forward, calls = pretraining.MaskedAutoencoder.forward, 0

    def breaking(self: pretraining.MaskedAutoencoder, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise Interrupt
        return forward(self, x)

    monkeypatch.setattr(pretraining.MaskedAutoencoder, "forward", breaking)
    with pytest.raises(Interrupt):
        pretraining.pretrained(images, 10, tmp_path / "interrupted.pt")
    again, _ = pretraining.pretrained(images, 10, tmp_path / "interrupted.pt")
    assert calls == 20 + 40 - 18  # 18 steps were saved
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with pytest.raises(ValueError, match="is of 40 steps, this run of 8; name another"):
        pretraining.pretrained(images, 2, tmp_path / "interrupted.pt")


def test_rows_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pretraining, "ViT", small_vit)
    monkeypatch.setattr(pretraining, "load_vit", small_vit)
    monkeypatch.setattr(pretraining, "BATCH", 16)
    monkeypatch.setattr(vision, "load_images", lambda split: few(40))
    monkeypatch.setattr(vision, "training_images", lambda folder: few())
    out = tmp_path / "rows.json"
    arguments = ["--out", str(out), "--epochs", "1", "--checkpoint", str(tmp_path / "masked.pt")]
    pretraining.main(arguments)
    rows = Results(out).rows
    assert [row["model"] for row in rows] == ["untrained", "supervised", "masked"] and rows[2]["loss"] > 0
    assert all(row["probe_accuracy"] > 80 for row in rows), "low on the images that the probe was fitted to"
    assert {row["device"] for row in rows} == {"cpu"}
    assert 0 < rows[0]["mlu_0.9_about_mean"] < rows[0]["mlu_0.999_about_mean"] <= 1
    assert rows[0]["mlu_0.99_about_zero"] != rows[0]["mlu_0.99_about_mean"]
    text = capsys.readouterr().out
    assert (
        f"| masked, epochs: 1 | {rows[2]['probe_accuracy']:.2f}% | zero | {rows[2]['mlu_0.9_about_zero']:.3f} |" in text
    )
    pretraining.main([*arguments[:2], "--epochs", "5", "--tables"])
    assert "| masked, epochs: 5 | not measured |" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "training_images", lambda folder: few(512))
    arguments = ["--out", str(tmp_path / "rows.json"), "--epochs", "1", "--checkpoint", str(tmp_path / "masked.pt")]
    pretraining.main([*arguments, "--device", "cuda"])
    rows = Results(tmp_path / "rows.json").rows
    assert {row["device"] for row in rows} == {torch.cuda.get_device_name()} and rows[2]["loss"] > 0
