"""The study of images: correct rows, none computed twice, and a cached teacher."""

import argparse
from pathlib import Path

import pytest
import torch

import lowrank_ops as lro
from benchmarks.accuracy import vision
from benchmarks.accuracy.results import Results
from lowrank_ops.demo.data import load_images
from lowrank_ops.demo.vit import ViT

FEW = {"calibration": 60, "test": 50}


def small_vit() -> ViT:
    torch.manual_seed(0)
    return ViT(dim=32, depth=1, heads=2).eval()


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "load_vit", small_vit)
    whole = {split: load_images(split) for split in FEW}
    monkeypatch.setattr(vision, "load_images", lambda split: tuple(part[: FEW[split]] for part in whole[split]))
    train = tuple(part[:64] for part in whole["calibration"])
    monkeypatch.setattr(vision, "training_images", lambda folder: train)
    monkeypatch.setattr(vision, "TRAIN_BATCH", 16)


def test_rows_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--out", str(out), "--budgets", "60", "--allocations", "loss", "--keep-dense", "head"]
    vision.main([*arguments, "--projections", "loss"])
    (row,) = Results(out).rows
    assert 50 < row["layer_share"] <= 60 and 0 < row["predicted_loss"] < 0.1
    assert row["agreement"] > 80 and row["finetuned"] == "none"

    compressed: list[str] = []
    compress = vision.Bench.compress
    monkeypatch.setattr(
        vision.Bench, "compress", lambda self, *key, **how: compressed.append(key[1]) or compress(self, *key, **how)
    )
    vision.main([*arguments, "--projections", "loss", "input"])
    rows = Results(out).rows
    assert compressed == ["input"] and rows[0] == row and rows[1]["projection"] == "input"
    assert f"| 60% | loss | {row['accuracy']:.2f} ({row['agreement']:.2f}) |" in capsys.readouterr().out

    vision.main([*arguments, "--projections", "loss", "weight", "--tables"])
    assert compressed == ["input"] and "| 60% | weight | not measured |" in capsys.readouterr().out


def test_only_loss_aware_rows_use_token_weights(tmp_path: Path) -> None:
    found = []
    for flag in ("--token-weights", "--no-token-weights"):
        out = tmp_path / f"{flag}.json"
        arguments = ["--out", str(out), flag, "--budgets", "60", "--allocations", "uniform"]
        vision.main([*arguments, "--projections", "output", "loss"])
        found.append({row["projection"]: row for row in Results(out).rows})
    weighted, unweighted = found
    assert weighted["output"]["predicted_loss"] == pytest.approx(unweighted["output"]["predicted_loss"])
    assert weighted["loss"]["token_weights"] and weighted["output"] == unweighted["output"]
    assert weighted["loss"]["predicted_loss"] != pytest.approx(unweighted["loss"]["predicted_loss"])


def test_reconstructed_rows_are_stored_apart(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--out", str(out), "--budgets", "60", "--projections", "output", "--allocations", "uniform"]
    vision.main([*arguments, "--reconstruct"])
    vision.main(arguments)
    rows = Results(out).rows
    assert [row["finetuned"] for row in rows] == ["reconstruction", "none"]
    assert rows[0]["predicted_loss"] is None and rows[1]["predicted_loss"] is not None


def test_midpoint_gradients_are_for_loss_aware_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--out", str(out), "--budgets", "60", "--allocations", "loss", "uniform", "--projections", "output"]
    vision.main(arguments)
    vision.main([*arguments, "--recalibrate"])
    rows = Results(out).rows
    found = [(row["allocation"], row["recalibrated"]) for row in rows]
    assert found == [("uniform", False), ("loss", False), ("loss", True)]
    assert rows[1]["predicted_loss"] != rows[2]["predicted_loss"]


def test_finetuning_trains_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[bool, bool]] = []
    finetune = lro.finetune_

    def recording(student, train, *, teacher, loss, **arguments):  # type: ignore[no-untyped-def]
        calls.append((teacher is not None, loss is not None))
        report = finetune(student, train, teacher=teacher, loss=loss, **arguments)
        assert report.steps == 3 and torch.tensor(report.losses).isfinite().all()
        return report

    monkeypatch.setattr(lro, "finetune_", recording)
    out = tmp_path / "rows.json"
    arguments = ["--budgets", "60", "--projections", "loss", "--allocations", "loss", "--held-out", "16"]
    vision.main(["--finetune", "plain", "distilled", "--out", str(out), *arguments])
    rows = Results(out).rows
    assert [row["finetuned"] for row in rows] == ["plain", "distilled"] and calls == [(False, True), (True, False)]
    assert rows[0]["accuracy"] in {100 * hits / 16 for hits in range(17)}, "not evaluated on the 16 held out"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 60%")]
    assert line == f"| 60% | loss | loss | 0.0001 | {vision.shown(rows[0])} | {vision.shown(rows[1])} |"


def test_the_cached_teacher_equals_the_dense_model(tmp_path: Path) -> None:
    images, labels = vision.training_images(vision.ORIGINAL)
    train, dense = vision.Training(images, labels, count=40, held_out=16), small_vit()
    assert len(train) == 2 and len(train.held_out_images[0]) == 16
    teacher = train.teacher(dense, tmp_path)
    assert train.teacher(dense, tmp_path) is teacher and teacher.logits.shape == (40, 10)
    for batch, of_batch, index in train:
        assert torch.equal(batch, images[index]) and torch.equal(of_batch, labels[index]) and index.max() < 40
        with torch.no_grad():
            torch.testing.assert_close(teacher(index), dense(batch), rtol=1e-4, atol=1e-4)

    later = vision.Training(images, labels, count=40, held_out=16).teacher(None, tmp_path)  # reads what was written
    assert torch.equal(later.logits, teacher.logits)


def test_a_budget_of_100_trains_the_dense_model(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "rows.json"), "--budgets", "100"]
    arguments += ["--projections", "loss", "--allocations", "loss"]
    vision.main(arguments)
    vision.main([*arguments, "--finetune", "plain"])
    dense, trained = Results(tmp_path / "rows.json").rows
    assert (dense["agreement"], dense["layer_share"], dense["predicted_loss"]) == (100, 100, 0)
    assert trained["layer_share"] == 100 and trained["first_loss"] > 0


def test_rows_name_their_device_and_all_tensors_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, object]] = []  # without a GPU only the requests can be checked
    of_module, of_tensor = torch.nn.Module.to, torch.Tensor.to

    def module_to(self, device):  # type: ignore[no-untyped-def]
        moved.append((type(self).__name__, device))
        return of_module(self, "cpu")

    def tensor_to(self, *arguments, **keywords):  # type: ignore[no-untyped-def]
        if arguments == ("elsewhere",):
            moved.append((str(tuple(self.shape)), arguments[0]))
            return self
        return of_tensor(self, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.Module, "to", module_to)
    monkeypatch.setattr(torch.Tensor, "to", tensor_to)
    monkeypatch.setattr(vision, "name_of", lambda device: f"the {device}")
    arguments = ["--budgets", "60", "--projections", "loss", "--allocations", "loss", "--finetune", "distilled"]
    vision.main([*arguments, "--out", str(tmp_path / "rows.json"), "--device", "elsewhere"])
    assert [row["device"] for row in Results(tmp_path / "rows.json").rows] == ["the elsewhere"]
    asked = ["(64, 1, 28, 28)", "(64,)", "ViT", "(50, 1, 28, 28)", "(50,)"]  # training, model, test
    assert moved == [(name, "elsewhere") for name in asked]


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--budgets", "60", "--projections", "loss", "--allocations", "loss", "--scratch", str(tmp_path)]
    vision.main([*arguments, "--finetune", "plain", "distilled", "--out", str(out), "--device", "cuda"])
    rows = Results(out).rows
    assert [row["device"] for row in rows] == [torch.cuda.get_device_name()] * 2
    assert all(row["agreement"] > 80 for row in rows)
    vision.main([*arguments, "--reconstruct", "--out", str(out), "--device", "cuda"])
    assert len(Results(out).rows) == 3


def test_an_interrupted_finetuning_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--finetune", "distilled", "--budgets", "60", "--projections", "loss", "--allocations", "loss"]
    vision.main([*arguments, "--out", str(tmp_path / "whole.json"), "--scratch", str(tmp_path)])
    (whole,) = Results(tmp_path / "whole.json").rows
    (checkpoint,) = tmp_path.glob("60*.pt")
    assert "distilled" in checkpoint.name

    def no_step(self: torch.optim.AdamW) -> None:
        raise AssertionError("a finished training was repeated")

    monkeypatch.setattr(torch.optim.AdamW, "step", no_step)
    vision.main([*arguments, "--out", str(tmp_path / "again.json"), "--scratch", str(tmp_path)])
    assert Results(tmp_path / "again.json").rows == [whole]


def test_rank_correlation() -> None:
    assert vision.rank_correlation([1, 2, 3, 9], [10, 20, 30, 31]) == pytest.approx(1)
    assert vision.rank_correlation([1, 2, 3], [5, 4, -1]) == pytest.approx(-1)
    assert vision.rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # as scipy's spearmanr


def test_cases_differ_by_everything_that_changes_a_row() -> None:
    def cases(*arguments: str) -> list[dict[str, object]]:
        options = vision.parser().parse_args(arguments)
        assert isinstance(options, argparse.Namespace)
        return vision.asked(options)

    assert len(cases()) == 75
    base = ["--finetune", "plain", "--budgets", "25", "--projections", "loss", "--allocations", "loss"]
    (plain,) = cases(*base)
    for change in (
        ["--lr", "1e-3"],
        ["--steps", "9"],
        ["--train-images", "99"],
        ["--held-out", "5"],
        ["--probes", "2"],
    ):
        (other,) = cases(*base, *change)
        assert other != plain
