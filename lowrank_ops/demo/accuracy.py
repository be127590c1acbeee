"""Accuracy at equal size: ``python -m lowrank_ops.demo.accuracy``, the tables of docs/results.md.

Compresses the demo's Vision Transformer with every projection and allocation at several parameter budgets, without
fine-tuning; with ``--finetune`` it goes on to fine-tune each of them, on labels and by distillation from the dense
model, for one pass through the original training images (on Debian: ``apt install dataset-fashion-mnist``). Rows go
to a JSON file as they are done; run again, it computes those that are missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import lowrank_ops as lro

from .data import load_images, read_original, standardise
from .evaluation import percent_equal, predict
from .vit import load_vit

PROJECTIONS = ("weight", "utilized", "output", "loss")
ALLOCATIONS = ("uniform", "energy", "loss")
BATCH = 100
TRAIN_BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_ops.demo.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("accuracy.json"), help="file of rows, read and added to")
    parser.add_argument("--budgets", type=float, nargs="+", default=[75, 50, 35, 25, 15], help="%% of layer parameters")
    parser.add_argument("--projections", nargs="+", choices=PROJECTIONS, default=list(PROJECTIONS))
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    parser.add_argument("--keep-dense", nargs="*", default=[], metavar="LAYER", help="such as head, the classifier")
    parser.add_argument("--finetune", action="store_true", help="fine-tune, instead of the tables without")
    parser.add_argument("--lr", type=float, default=3e-4, help="of the fine-tuning")
    parser.add_argument("--train-images", type=int, default=60_000, help="fine-tune on this many, the first of the set")
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the original files"
    )
    parser.add_argument("--probes", type=int, default=1, help="labels drawn per image for the sensitivity")
    options = parser.parse_args()

    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    bench = Bench(options.probes)
    setup: dict[str, Any] = {"kept_dense": " ".join(options.keep_dense), "probes": options.probes}
    configs: list[dict[str, Any]] = [
        {"budget": budget, "projection": projection, "allocation": allocation, **setup}
        for budget in options.budgets
        for projection in options.projections
        for allocation in options.allocations
    ]
    ways: tuple[str, ...] = ("none",)
    if options.finetune:
        ways = ("plain", "distilled")
        train = training_batches(options.data, options.train_images)
        training = {"train_images": options.train_images, "lr": options.lr}
        configs = [{**config, "finetuned": way, **training} for config in configs for way in ways]
    else:
        configs = [{**config, "finetuned": "none"} for config in configs]
    missing = [config for config in configs if not any(config.items() <= row.items() for row in rows)]
    for config in tqdm(missing, desc="compressing and evaluating", unit="model"):
        student, report = bench.compress(
            config["budget"], config["projection"], config["allocation"], options.keep_dense
        )
        if options.finetune:
            recover(student, bench.dense, train, config["finetuned"] == "distilled", options.lr)
        rows.append({**config, **bench.judge(student), "layer_share": share(report), "predicted_loss": lost(report)})
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    shown = [row for config in configs for row in rows if config.items() <= row.items()]
    for way in ways:
        print(f"\nfine-tuning: {way}; accuracy (agreement with the dense model) in %")
        print(table([row for row in shown if row["finetuned"] == way], options.allocations))


class Bench:
    """The dense model, its calibration by the 2,000 images that ship, and the 10,000 test images."""

    def __init__(self, probes: int) -> None:
        torch.manual_seed(0)
        self.dense = load_vit()
        images, _ = load_images("calibration")
        started = time.perf_counter()
        self.covariances = lro.calibrate(
            self.dense, images.split(BATCH), sensitivity="fisher", probes=probes, progress=True
        )
        print(f"calibration with sensitivity: {time.perf_counter() - started:.1f} s")
        layers = {fqn: module for fqn, module in self.dense.named_modules() if fqn in self.covariances}
        self.subspaces = lro.layer_subspaces(layers, self.covariances)
        self.images, self.labels = load_images("test")
        self.predictions = predict(self.dense, self.images)
        print(f"dense: {percent_equal(self.predictions, self.labels):.2f}%")

    def compress(
        self, budget: float, projection: str, allocation: str, kept_dense: Sequence[str]
    ) -> tuple[nn.Module, lro.CompressionReport]:
        """A compressed copy, and what was done to it; ``budget`` in % of the parameters of all layers."""
        config = lro.CompressionConfig(
            lro.ParameterBudget(budget / 100, allocation),
            projection=projection,
            overrides=dict.fromkeys(kept_dense),
        )
        student = copy.deepcopy(self.dense)
        return student, lro.compress_(student, self.covariances, config, subspaces=self.subspaces)

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and agreement with the dense model on the test images, in percent."""
        predictions = predict(model, self.images)
        return {
            "accuracy": percent_equal(predictions, self.labels),
            "agreement": percent_equal(predictions, self.predictions),
        }


def training_batches(folder: Path, count: int) -> DataLoader[Any]:
    """Shuffled batches of (images, labels) from the first ``count`` training images."""
    images, labels = read_original(folder, "train")
    dataset = TensorDataset(standardise(images[:count]), torch.tensor(labels[:count], dtype=torch.int64))
    return DataLoader(dataset, TRAIN_BATCH, shuffle=True, drop_last=True)


def recover(student: nn.Module, teacher: nn.Module, train: DataLoader[Any], distil: bool, lr: float) -> None:
    """One pass through the training images."""
    torch.manual_seed(0)
    lro.finetune_(
        student,
        train,
        teacher=teacher if distil else None,
        loss=None if distil else lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        forward=lambda model, batch: model(batch[0]),
        lr=lr,
        progress=True,
    )


def share(report: lro.CompressionReport) -> float:
    """Layer parameters kept, in percent."""
    return 100 * report.layer_parameters / report.layer_parameters_before


def lost(report: lro.CompressionReport) -> float | None:
    """Predicted increase of the loss of one sample, all layers together."""
    known = [layer.predicted_loss for layer in report.layers if layer.predicted_loss is not None]
    return sum(known) if len(known) == len(report.layers) else None


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """One line per budget and projection, one column per allocation: accuracy (agreement)."""
    lines = [f"| budget | projection | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for budget, projection in dict.fromkeys((row["budget"], row["projection"]) for row in rows):
        cells = []
        for allocation in columns:
            key = {"budget": budget, "projection": projection, "allocation": allocation}
            row = next((row for row in rows if key.items() <= row.items()), None)
            cells.append("" if row is None else f"{row['accuracy']:.2f} ({row['agreement']:.2f})")
        lines.append(f"| {budget:g}% | {projection} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
