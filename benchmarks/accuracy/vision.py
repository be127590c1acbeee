"""Accuracy at equal size: ``python -m benchmarks.accuracy.vision``, the image tables of docs/results.md.

Compresses the demo's Vision Transformer by every projection and allocation at several parameter budgets, without
fine-tuning; ``--finetune plain distilled`` goes on to fine-tune each of them, on labels or by distillation from the
dense model, for one pass through the original training images (on Debian: ``apt install dataset-fashion-mnist``), as
they are, which is how the model was trained. ``--refit`` refits each sequentially instead, by the calibration images.
Rows go to a JSON file as they are done; run again, it computes those that are missing, and with ``--tables`` none.
``--device cuda`` does all of it on a GPU, where it draws other labels for the sensitivity; a row tells its device.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops as lro
from lowrank_ops.demo.data import load_images, standardize
from lowrank_ops.demo.evaluation import percent_equal, predict
from lowrank_ops.demo.vit import load_vit

from .results import ROWS, Results, rows_of
from .train_demo import read_original

PROJECTIONS = ("weight", "input", "utilized", "output", "loss")
ALLOCATIONS = ("uniform", "energy", "loss")
WAYS = ("plain", "distilled")
CALIBRATION_BATCH = 100
TRAIN_BATCH = 128
RESULTS = Path(__file__).parents[1] / "results" / "vision.json"
ORIGINAL = Path("/usr/share/datasets/fashion-mnist")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    results = Results(options.out)
    cases = asked(options)
    missing = [] if options.tables else [case for case in cases if results.find(case) is None]
    if missing:
        train = None
        if options.scratch is not None:
            options.scratch.mkdir(parents=True, exist_ok=True)  # now, not after minutes of work
        if options.finetune:
            train = Training(*training_images(options.data), options.train_images, options.held_out, options.device)
        torch.manual_seed(0)
        held_out = train.held_out_images if train is not None and options.held_out else load_images("test")
        bench = Bench(*held_out, options.device)
        images = load_images("calibration")[0]  # the 2,000 that ship
        covariances = bench.calibrate(images, options.probes, options.rows == "weighted")
        missing.sort(key=lambda case: case["rows"])
        rows: str | None = None
        for case in tqdm(missing, desc="compressing and evaluating", unit="model"):
            if case["rows"] != rows:  # what is predicted of a row goes by its own rows as well
                rows = case["rows"]
                bench.use(covariances if rows == "weighted" else taken_alike(covariances))
            student, report = bench.compress(
                case["budget"],
                case["projection"],
                case["allocation"],
                options.keep_dense,
                refit=options.refit,
                recalibrate=case["recalibrated"],
            )
            losses = {} if train is None else train.recover(student, bench.dense, case, options.scratch)
            results.add(
                case,
                {
                    **bench.judge(student),
                    "layer_share": share(report),
                    "predicted_loss": lost(report),
                    **losses,
                    "device": name_of(options.device),
                },
            )
    print((recovered if options.finetune else table)(results, cases, options))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.vision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of rows, read and added to")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[75, 50, 35, 25, 15],
        help="%% of layer parameters; 100 leaves every layer dense",
    )  # fmt: skip
    parser.add_argument("--projections", nargs="+", choices=PROJECTIONS, default=list(PROJECTIONS))
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    parser.add_argument("--keep-dense", nargs="*", default=[], metavar="LAYER", help="such as head, the classifier")
    parser.add_argument("--probes", type=int, default=1, help="labels drawn per image for the sensitivity")
    parser.add_argument(
        "--rows", choices=ROWS, default="weighted", help="weigh them by their gradients, or take all alike"
    )
    parser.add_argument("--refit", action="store_true", help="refit sequentially, by the calibration images")
    parser.add_argument(
        "--recalibrate", action="store_true", help="gradients for ranks and factors by loss also halfway to each model"
    )
    parser.add_argument("--device", default="cpu", help="that models and images are on (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="show what there is, compute nothing")
    training = parser.add_argument_group("fine-tuning")
    training.add_argument("--finetune", nargs="+", choices=WAYS, default=[], help="fine-tune, in these ways")
    training.add_argument("--lr", type=float, nargs="+", default=[1e-4], help="learning rates, one row for each")
    training.add_argument("--steps", type=int, help="optimizer steps; left out, one pass through the images")
    training.add_argument("--train-images", type=int, default=60_000, help="the first so many of the set")
    training.add_argument(
        "--held-out", type=int, default=0, help="judge by so many of the last training images instead of the test set"
    )
    training.add_argument("--scratch", type=Path, help="folder of what a broken run goes on from; none by default")
    training.add_argument("--data", type=Path, default=ORIGINAL, help="folder of the original files")
    return parser


def asked(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What every row of this command is called by."""
    setup: dict[str, Any] = {"kept_dense": " ".join(options.keep_dense), "probes": options.probes}
    cases: list[dict[str, Any]] = [
        {
            "budget": budget,
            "projection": projection,
            "allocation": allocation,
            **setup,
            "rows": rows_of(projection, allocation, options.rows),
            "recalibrated": options.recalibrate and "loss" in (projection, allocation),
        }
        for budget in options.budgets
        for allocation in options.allocations
        for projection in options.projections
    ]
    if not options.finetune:
        return [{**case, "finetuned": "refit" if options.refit else "none"} for case in cases]
    length = {"steps": options.steps, "train_images": options.train_images, "held_out": options.held_out}
    return [
        {**case, "finetuned": way, "lr": lr, **length}
        for case in cases
        for lr in options.lr
        for way in options.finetune
    ]


class Bench:
    """The dense model, its spaces by the images it was calibrated with, and the images that it is judged by."""

    covariances: lro.Covariances
    subspaces: dict[str, lro.LayerSubspaces]

    def __init__(
        self,
        images: Tensor,  # (n, 1, 28, 28)
        labels: Tensor,  # (n,)
        device: str = "cpu",
    ) -> None:
        self.dense = load_vit().to(device)
        self.images, self.labels = images.to(device), labels.to(device)
        self.predictions = predict(self.dense, self.images)
        print(f"dense: {percent_equal(self.predictions, self.labels):.2f}% of {len(images)} images")

    def calibrate(self, images: Tensor, probes: int = 1, weigh_rows: bool = True) -> lro.Covariances:
        """Covariances and sensitivities of images (n, 1, 28, 28)."""
        self._batches = images.split(CALIBRATION_BATCH)
        return lro.calibrate(
            self.dense, self._batches, sensitivity="fisher", probes=probes, weigh_rows=weigh_rows, progress=True
        )

    def use(self, covariances: lro.Covariances) -> None:
        """Compress by these covariances from now on."""
        self.covariances = covariances
        self.subspaces = self._spaces(covariances)

    def _spaces(self, covariances: lro.Covariances) -> dict[str, lro.LayerSubspaces]:
        layers = {fqn: module for fqn, module in self.dense.named_modules() if fqn in covariances}
        return lro.layer_subspaces(layers, covariances)

    def compress(
        self,
        budget: float,
        projection: str,
        allocation: str,
        kept_dense: Sequence[str] = (),
        *,
        refit: bool = False,
        recalibrate: bool = False,
    ) -> tuple[nn.Module, lro.CompressionReport]:
        """A compressed copy, and what was done to it; ``budget`` in % of the parameters of all layers."""
        config = lro.CompressionConfig(
            lro.ParameterBudget(budget / 100, allocation),
            projection=projection,
            overrides=dict.fromkeys(kept_dense),
            refit="sequential" if refit else None,
        )
        student = copy.deepcopy(self.dense)
        covariances, subspaces = self.covariances, self.subspaces
        if recalibrate:
            torch.manual_seed(0)
            covariances = lro.recalibrate(student, covariances, self._batches, config, sensitivity="fisher")
            subspaces = self._spaces(covariances)
        weighted = any(felt.weighted is not None for felt in covariances.sensitivities.values())
        report = lro.compress_(
            student,
            covariances,
            config,
            subspaces=subspaces,
            batches=self._batches if refit else None,
            sensitivity="fisher" if weighted else None,
            progress=refit,
        )
        return student, report

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and agreement with the dense model, in percent."""
        predictions = predict(model, self.images)
        return {
            "accuracy": percent_equal(predictions, self.labels),
            "agreement": percent_equal(predictions, self.predictions),
        }


def taken_alike(covariances: lro.Covariances) -> lro.Covariances:
    """The same without weighted rows."""
    found = copy.copy(covariances)
    found.sensitivities = {fqn: replace(felt, weighted=None) for fqn, felt in covariances.sensitivities.items()}
    return found


def training_images(folder: Path) -> tuple[Tensor, Tensor]:
    """The 60,000 images (n, 1, 28, 28) that the dense model was trained on, and their labels (n,)."""
    images, labels = read_original(folder, "train")
    return standardize(images), torch.tensor(labels, dtype=torch.int64)


class Remembered(nn.Module):
    """A teacher that was asked once and answers from memory, so that distilling costs no more than plain training."""

    def __init__(self, logits: Tensor) -> None:  # (images, classes)
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, index: Tensor) -> Tensor:  # (batch,) -> (batch, classes)
        return self.logits[index]


class Training:
    """Shuffled batches of (images, labels, index), the last incomplete one dropped, and what is held out of them."""

    def __init__(self, images: Tensor, labels: Tensor, count: int, held_out: int, device: str = "cpu") -> None:
        kept = len(images) - held_out
        self.images, self.labels = (part[: min(count, kept)].to(device) for part in (images, labels))
        self.held_out_images = images[kept:], labels[kept:]
        self._teacher: Remembered | None = None

    def __len__(self) -> int:
        return len(self.images) // TRAIN_BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(len(self.images))  # drawn on the CPU: the same order for every device
        for index in order[: len(self) * TRAIN_BATCH].to(self.images.device).split(TRAIN_BATCH):
            yield self.images[index], self.labels[index], index

    def teacher(self, dense: nn.Module, scratch: Path | None) -> Remembered:
        """The dense model's logits of the training images."""
        file = None if scratch is None else scratch / f"logits-{len(self.images)}.pt"
        if self._teacher is None and file is not None and file.exists():
            self._teacher = Remembered(torch.load(file, map_location=self.images.device, weights_only=True))
        if self._teacher is None:
            dense.eval()
            with torch.no_grad():
                parts = tqdm(self.images.split(CALIBRATION_BATCH), desc="asking the teacher", unit="batch")
                self._teacher = Remembered(torch.cat([dense(part) for part in parts]))
            if file is not None:
                torch.save(self._teacher.logits, file)
        return self._teacher

    def recover(
        self, student: nn.Module, dense: nn.Module, case: dict[str, Any], scratch: Path | None
    ) -> dict[str, float]:
        """Fine-tune the student as its case says; gives the mean loss of the first and the last tenth of the steps."""
        distil = case["finetuned"] == "distilled"
        teacher = self.teacher(dense, scratch) if distil else None
        torch.manual_seed(0)
        report = lro.finetune_(
            student,
            self,
            teacher=teacher,
            loss=None if distil else lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
            forward=lambda model, batch: model(batch[2] if model is teacher else batch[0]),
            lr=case["lr"],
            steps=case["steps"],
            checkpoint=None if scratch is None else scratch / f"{'-'.join(map(str, case.values()))}.pt",
            checkpoint_every=50,
            progress=True,
        )
        tenth = max(1, report.steps // 10)
        first, last = (sum(part) / tenth for part in (report.losses[:tenth], report.losses[-tenth:]))
        return {"first_loss": first, "last_loss": last}


def name_of(device: str) -> str:
    """The GPU's name, or the device as it was called."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def share(report: lro.CompressionReport) -> float:
    """Layer parameters kept, in percent."""
    return 100 * report.layer_parameters / report.layer_parameters_before


def lost(report: lro.CompressionReport) -> float | None:
    """Predicted increase of the loss of one sample, all layers together."""
    known = [layer.predicted_loss for layer in report.layers if layer.predicted_loss is not None]
    return sum(known) if len(known) == len(report.layers) else None


def shown(row: dict[str, Any] | None) -> str:
    """A cell: accuracy (agreement)."""
    return "not measured" if row is None else f"{row['accuracy']:.2f} ({row['agreement']:.2f})"


def table(results: Results, cases: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """One line per budget and projection, one column per allocation."""
    columns = ["budget", "projection", *options.allocations]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for budget in options.budgets:
        for projection in options.projections:
            same = [case for case in cases if (case["budget"], case["projection"]) == (budget, projection)]
            cells = " | ".join(shown(results.find(case)) for case in same)
            lines.append(f"| {budget:g}% | {projection} | {cells} |")
    found = [row for case in cases if (row := results.find(case)) is not None and row["rows"] == options.rows]
    rows = [row for row in found if row["predicted_loss"] is not None]
    if len(rows) > 2:
        order = rank_correlation([row["predicted_loss"] for row in rows], [100 - row["agreement"] for row in rows])
        lines.append(f"\nPredicted loss and disagreement: rank correlation {order:.3f} over {len(rows)} rows.")
    return "\n".join(lines)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of the places in the order of size; equal values share the mean of theirs."""

    def places(values: Sequence[float]) -> Tensor:
        x = torch.tensor(values, dtype=torch.float64)
        return (x[:, None] > x).sum(1).double() + 0.5 * (x[:, None] == x).sum(1)

    return float(torch.corrcoef(torch.stack([places(first), places(second)]))[0, 1])


def recovered(results: Results, cases: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """One line per compressed model and learning rate, one column per way of fine-tuning."""
    compressed = ("budget", "allocation", "projection", "kept_dense", "probes", "rows", "recalibrated")
    ways = [*([] if options.held_out else ["none"]), *options.finetune]  # without, they were judged by other images
    columns = ["budget", "allocation", "projection", "learning rate", *ways]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for first in cases[:: len(options.finetune)]:
        cells = [f"{first[name]}" for name in ("allocation", "projection", "lr")]
        for way in ways:
            case = {name: first[name] for name in compressed} if way == "none" else first
            cells.append(shown(results.find({**case, "finetuned": way})))
        lines.append(f"| {first['budget']:g}% | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
