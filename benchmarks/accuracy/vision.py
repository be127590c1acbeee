"""Accuracy at equal size: ``python -m benchmarks.accuracy.vision``, the image tables of docs/results.md.

Compresses the demo's Vision Transformer by every projection and allocation at several parameter budgets, without
fine-tuning. ``--finetune plain distilled`` then fine-tunes each of them, on labels or by distillation from the dense
model, for one epoch of the original training images (on Debian: ``apt install dataset-fashion-mnist``), without
augmentation, as the model was trained. ``--reconstruct`` uses sequential reconstruction on the calibration images
instead. Rows are appended to a JSON file; another run computes those that are missing, and with ``--tables`` none.
``--device cuda`` runs everything on a GPU, where other labels are sampled for the sensitivity; rows name the device.
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
from lowrank_ops.report import CompressionReport
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces

from .results import Results, study_parser, uses_token_weights
from .train_demo import read_original

PROJECTIONS = ("weight", "input", "utilized", "output", "loss")
# Pivoted factors, corrected predictions, and MLPs with fewer channels.
LOSS_VARIANTS = (
    "loss-pivoted",
    "loss-corrected",
    "loss-pivoted-corrected",
    "loss-channels-pivoted",
    "loss-channels-pivoted-corrected",
)
ALLOCATIONS = ("uniform", "variance", "loss")
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
        covariances = bench.calibrate(images, options.probes, options.token_weights).damped(options.damping)
        missing.sort(key=lambda case: case["token_weights"])
        in_use: bool | None = None
        for case in tqdm(missing, desc="compressing and evaluating", unit="model"):
            if case["token_weights"] != in_use:  # token weights also change what a row predicts
                in_use = case["token_weights"]
                bench.use(covariances if in_use else without_token_weights(covariances))
            student, report = bench.compress(
                case["budget"],
                case["projection"],
                case["allocation"],
                options.keep_dense,
                reconstruct=options.reconstruct,
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
    parser = study_parser("vision", __doc__, RESULTS)
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[75, 50, 35, 25, 15],
        help="%% of layer parameters; 100 leaves every layer dense",
    )  # fmt: skip
    parser.add_argument("--projections", nargs="+", choices=PROJECTIONS + LOSS_VARIANTS, default=list(PROJECTIONS))
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    parser.add_argument("--keep-dense", nargs="*", default=[], metavar="LAYER", help="such as head, the classifier")
    parser.add_argument("--probes", type=int, default=1, help="labels drawn per image for the sensitivity")
    parser.add_argument("--damping", type=float, default=0.0, help="of the statistics, by Covariances.damped")
    parser.add_argument(
        "--token-weights",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="for loss-aware ranks and factors (default: %(default)s)",
    )
    parser.add_argument("--reconstruct", action="store_true", help="sequentially, on the calibration images")
    parser.add_argument(
        "--recalibrate", action="store_true", help="midpoint gradients for loss-aware ranks and factors"
    )
    parser.add_argument("--device", default="cpu", help="of models and images (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="show stored rows, compute nothing")
    training = parser.add_argument_group("fine-tuning")
    training.add_argument("--finetune", nargs="+", choices=WAYS, default=[], help="fine-tune, in these ways")
    training.add_argument("--lr", type=float, nargs="+", default=[1e-4], help="learning rates, one row for each")
    training.add_argument("--steps", type=int, help="optimizer steps; left out, one pass through the images")
    training.add_argument("--train-images", type=int, default=60_000, help="the first so many of the set")
    training.add_argument(
        "--held-out",
        type=int,
        default=0,
        help="evaluate on so many of the last training images instead of the test set",
    )
    training.add_argument("--scratch", type=Path, help="folder of checkpoints to resume from; none by default")
    training.add_argument("--data", type=Path, default=ORIGINAL, help="folder of the original files")
    return parser


def asked(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases of this command, by which rows are found."""
    setup: dict[str, Any] = {"kept_dense": " ".join(options.keep_dense), "probes": options.probes}
    if options.damping:
        setup["damping"] = options.damping
    cases: list[dict[str, Any]] = [
        {
            "budget": budget,
            "projection": projection,
            "allocation": allocation,
            **setup,
            "token_weights": uses_token_weights(projection, allocation, options.token_weights),
            "recalibrated": options.recalibrate and "loss" in (projection, allocation),
        }
        for budget in options.budgets
        for allocation in options.allocations
        for projection in options.projections
    ]
    if not options.finetune:
        return [{**case, "finetuned": "reconstruction" if options.reconstruct else "none"} for case in cases]
    length = {"steps": options.steps, "train_images": options.train_images, "held_out": options.held_out}
    return [
        {**case, "finetuned": way, "lr": lr, **length}
        for case in cases
        for lr in options.lr
        for way in options.finetune
    ]


class Bench:
    """The dense model, its calibration, and the images that it is evaluated on."""

    covariances: lro.Covariances
    subspaces: dict[str, LayerSubspaces]

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

    def calibrate(self, images: Tensor, probes: int = 1, token_weights: bool = True) -> lro.Covariances:
        """Statistics of images (n, 1, 28, 28), with output gradients."""
        self._batches = images.split(CALIBRATION_BATCH)
        return lro.calibrate(
            self.dense,
            self._batches,
            sensitivity="fisher",
            num_probes=probes,
            token_weights=token_weights,
            progress=True,
        )

    def use(self, covariances: lro.Covariances) -> None:
        """Set the covariances that compress() uses."""
        self.covariances = covariances
        self.subspaces = self._spaces(covariances)

    def _spaces(self, covariances: lro.Covariances) -> dict[str, LayerSubspaces]:
        layers = {fqn: module for fqn, module in self.dense.named_modules() if fqn in covariances}
        return layer_subspaces(layers, covariances)

    def compress(
        self,
        budget: float,
        projection: str,
        allocation: str,
        kept_dense: Sequence[str] = (),
        *,
        reconstruct: bool = False,
        recalibrate: bool = False,
    ) -> tuple[nn.Module, CompressionReport]:
        """A compressed copy, and what was done to it; ``budget`` in % of the parameters of all layers."""
        projection, *choices = projection.split("-")
        config = lro.CompressionConfig(
            lro.ParameterBudget(budget / 100, allocation),
            projection=projection,
            pivoted="pivoted" in choices,
            channels="channels" in choices,
            overrides=dict.fromkeys(kept_dense),
        )
        student = copy.deepcopy(self.dense)
        covariances, subspaces = self.covariances, self.subspaces
        if "corrected" in choices:
            torch.manual_seed(0)
            subspaces = lro.correct_predictions(self.dense, covariances, self._batches, channels="channels" in choices)
        if recalibrate:
            torch.manual_seed(0)
            covariances = lro.recalibrate(student, covariances, self._batches, config, sensitivity="fisher")
            subspaces = self._spaces(covariances)
        sensitivity = "fisher" if covariances.has_token_weights else None
        report = lro.compress_(
            student,
            covariances,
            config,
            subspaces=subspaces,
            reconstruction=lro.SequentialReconstruction(self._batches, sensitivity) if reconstruct else None,
            progress=reconstruct,
        )
        return student, report

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and agreement with the dense model, in percent."""
        predictions = predict(model, self.images)
        return {
            "accuracy": percent_equal(predictions, self.labels),
            "agreement": percent_equal(predictions, self.predictions),
        }


def without_token_weights(covariances: lro.Covariances) -> lro.Covariances:
    """The same statistics, unweighted."""
    layers = {fqn: replace(layer, token_weighted=None) for fqn, layer in covariances.items()}
    return lro.Covariances(layers, covariances.unreached, covariances.skipped)


def training_images(folder: Path) -> tuple[Tensor, Tensor]:
    """The 60,000 images (n, 1, 28, 28) that the dense model was trained on, and their labels (n,)."""
    images, labels = read_original(folder, "train")
    return standardize(images), torch.tensor(labels, dtype=torch.int64)


class CachedTeacher(nn.Module):
    """A teacher whose logits were computed once, so that distilling costs no more than plain training."""

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
        self._teacher: CachedTeacher | None = None

    def __len__(self) -> int:
        return len(self.images) // TRAIN_BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(len(self.images))  # drawn on the CPU: the same order for every device
        for index in order[: len(self) * TRAIN_BATCH].to(self.images.device).split(TRAIN_BATCH):
            yield self.images[index], self.labels[index], index

    def teacher(self, dense: nn.Module, scratch: Path | None) -> CachedTeacher:
        """The dense model's logits of the training images."""
        file = None if scratch is None else scratch / f"logits-{len(self.images)}.pt"
        if self._teacher is None and file is not None and file.exists():
            self._teacher = CachedTeacher(torch.load(file, map_location=self.images.device, weights_only=True))
        if self._teacher is None:
            dense.eval()
            with torch.no_grad():
                parts = tqdm(self.images.split(CALIBRATION_BATCH), desc="teacher logits", unit="batch")
                self._teacher = CachedTeacher(torch.cat([dense(part) for part in parts]))
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
    """The GPU's name, or the device as given."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def share(report: CompressionReport) -> float:
    """Layer parameters kept, in percent."""
    return 100 * report.layer_parameters / report.layer_parameters_before


def lost(report: CompressionReport) -> float | None:
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
    found = [
        row
        for case in cases
        if (row := results.find(case)) is not None and row["token_weights"] == options.token_weights
    ]
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
    compressed = ("budget", "allocation", "projection", "kept_dense", "probes", "token_weights", "recalibrated")
    ways = [
        *([] if options.held_out else ["none"]),
        *options.finetune,
    ]  # without fine-tuning, rows were evaluated on other images
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
