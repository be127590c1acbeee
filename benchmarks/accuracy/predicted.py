"""The output error that a report predicts for each layer, and the error measured on held-out data.

    python -m benchmarks.accuracy.predicted

Predicted is E|y - y'|^2 over the calibration rows, from statistics alone. Measured is the same over held-out rows: the
inputs that the layer receives in the dense model, passed to the layer and to its replacement. The correlation is that
of the logarithms; ratios are measured to predicted.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops as lro
from lowrank_ops.demo.data import load_images
from lowrank_ops.demo.vit import load_vit
from lowrank_ops.report import format_table
from lowrank_ops.subspaces import layer_subspaces

from .corpora import SOURCES, corpus
from .encoder import load_encoder, model_folder, tokenize

PROJECTIONS = ("output", "loss", "utilized")
ROUNDING = 1e-10  # share of a layer's variance
HEADER = ["model", "projection", "budget", "layers", "correlation", "median ratio", "lowest", "highest", "at layer"]


class Study(NamedTuple):
    """A dense model, calibration data and held-out data."""

    dense: nn.Module
    calibration: Sequence[Any]
    held_out: Sequence[Any]
    sensitivity: str
    mask: str | None = None  # key of a batch: (batch, positions), the rows that count


def images(calibration: int, held_out: int) -> Study:
    """The demo's Vision Transformer: its calibration images, and test images."""
    torch.manual_seed(0)
    seen, unseen = load_images("calibration")[0][:calibration], load_images("test")[0][:held_out]
    return Study(load_vit(), seen.split(100), unseen.split(100), "fisher")


def texts(calibration: int, held_out: int) -> Study:
    """The sentence encoder on the standard library's docstrings."""
    folder, found = model_folder(), corpus(next(kind for kind in SOURCES if kind != "debian"), held_out)
    seen, unseen = (tokenize(folder, part) for part in (found.calibration[:calibration], found.test))
    return Study(load_encoder(folder), seen, unseen, "output", "attention_mask")


STUDIES: dict[str, Callable[[int, int], Study]] = {"images": images, "texts": texts}


@torch.no_grad()
def measured_errors(
    dense: nn.Module, student: nn.Module, batches: Iterable[Any], fqns: Sequence[str], mask: str | None = None
) -> dict[str, float]:
    """E|y - y'|^2 of each layer over its input rows in the dense model, summed over the outputs.

    Args:
        dense: the model that is run.
        student: holds a replacement under every name.
        batches: tensors, or mappings of keyword arguments.
        fqns: the layers.
        mask: the keyword argument that marks the real positions of (batch, positions, features).
    """
    total, count = dict.fromkeys(fqns, 0.0), dict.fromkeys(fqns, 0)
    real: Tensor | None = None

    def hook(fqn: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        replacement = student.get_submodule(fqn)

        def see(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            error = (replacement(inputs[0]) - y).double().square()
            error = error.sum(1 if isinstance(layer, nn.Conv2d) else -1)  # (..., positions)
            if real is not None and error.shape == real.shape:
                error = error[real]
            total[fqn] += float(error.sum())
            count[fqn] += error.numel()

        return see

    handles = [dense.get_submodule(fqn).register_forward_hook(hook(fqn)) for fqn in fqns]
    try:
        for batch in batches:
            if isinstance(batch, Mapping):
                real = None if mask is None else batch[mask].bool()
                dense(**batch)
            else:
                dense(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {fqn: total[fqn] / max(1, count[fqn]) for fqn in fqns}


class Bench:
    """One model with its statistics."""

    def __init__(self, name: str, study: Study) -> None:
        self.name, self.study = name, study
        torch.manual_seed(0)
        self.covariances = lro.calibrate(
            study.dense,
            study.calibration,
            sensitivity=study.sensitivity,
            mask=study.mask,
            progress=True,
        )
        layers = {fqn: module for fqn, module in study.dense.named_modules() if fqn in self.covariances}
        self.subspaces = layer_subspaces(layers, self.covariances)

    def layers(self, projection: str, budget: float) -> list[dict[str, Any]]:
        """Predicted and measured error of every layer at uniform ranks, beside the variance of its output."""
        student = copy.deepcopy(self.study.dense)
        config = lro.CompressionConfig(lro.ParameterBudget(budget), projection)
        report = lro.compress_(student, self.covariances, config, subspaces=self.subspaces)
        changed = [layer for layer in report.layers if layer.rank is not None]
        fqns = [layer.fqn for layer in changed]
        measured = measured_errors(self.study.dense, student, self.study.held_out, fqns, self.study.mask)
        return [
            {
                "model": self.name,
                "projection": projection,
                "budget": budget,
                "layer": layer.fqn,
                "predicted": layer.predicted_error,
                "measured": measured[layer.fqn],
                "variance": layer.output_variance,
            }
            for layer in changed
        ]


def summary(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Correlation of the logarithms, and ratios; without layers whose error is float32 rounding."""
    kept = [row for row in layers if row["predicted"] > ROUNDING * row["variance"]]
    pairs = [(row["predicted"], row["measured"], row["layer"]) for row in kept]
    logs = [[math.log(predicted), math.log(measured)] for predicted, measured, _ in pairs]
    ratios = sorted((measured / predicted, layer) for predicted, measured, layer in pairs)
    return {
        "layers": len(pairs),
        "correlation": statistics.correlation(*zip(*logs, strict=True)),
        "median": statistics.median(ratio for ratio, _ in ratios),
        "lowest": ratios[0][0],
        "highest": ratios[-1][0],
        "worst_layer": ratios[-1][1],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each model, projection and budget."""
    cells = []
    for key in dict.fromkeys((row["model"], row["projection"], row["budget"]) for row in rows):
        found = summary([row for row in rows if (row["model"], row["projection"], row["budget"]) == key])
        ratios = [f"{found[name]:.2f}" for name in ("median", "lowest", "highest")]
        correlation = f"{found['correlation']:.4f}"
        line = [key[0], key[1], f"{key[2]:.0%}", f"{found['layers']}", correlation, *ratios, found["worst_layer"]]
        cells.append(line)
    return format_table(HEADER, cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table; --out writes the layers to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--projections", nargs="+", choices=PROJECTIONS, default=list(PROJECTIONS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--calibration", nargs="+", type=int, default=[2000], help="images or texts")
    parser.add_argument("--held-out", type=int, default=1000, help="images or texts")
    parser.add_argument("--out", type=Path, help="JSON file for the layers")
    options = parser.parse_args(arguments)
    rows = []
    for model in options.models:
        for calibration in options.calibration:
            bench = Bench(f"{calibration} {model}", STUDIES[model](calibration, options.held_out))
            cases = [(projection, budget) for projection in options.projections for budget in options.budgets]
            for case in tqdm(cases, desc=model, unit="model"):
                rows += bench.layers(*case)
                if options.out is not None:
                    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
