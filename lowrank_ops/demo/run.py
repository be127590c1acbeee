"""Compress a trained Vision Transformer on real images and compare it with the dense one.

Calibrates on 2,000 Fashion-MNIST images, measures the utilization of each layer, compresses without fine-tuning and
evaluates on the 10,000 test images. Writes report.json and report.png. The exit code is 0 if the compression by
explained variance keeps at most 35% of the layer parameters and loses at most 0.5 points of accuracy, else 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowrank_ops as lro

from ..models.running import ProgressBar
from ..subspaces.layer import LayerSubspaces, layer_subspaces
from .comparison import LATENCY_BATCH, METHODS, Row, compare, table
from .data import load_images, load_training_record
from .picture import draw
from .vit import load_vit

# Limits of the checks.
MAX_ACCURACY_LOSS = 0.5  # points
MAX_SHARE = 35.0  # % of the layer parameters
RECORD_TOLERANCE = 0.1  # points of accuracy; other processors and libraries round differently

TEST_IMAGES = 10_000
CALIBRATION_IMAGES = 2_000
CALIBRATION_BATCH = 100
ALLOCATIONS = ("uniform", "variance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options."""
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the images and weights (default: demo in the checkout)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("."), metavar="DIR", help="where to write the report (default: here)"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    output.add_argument("--markdown", action="store_true", help="print the table of results and nothing else")
    parser.add_argument(
        "--explained-variance",
        type=_number(float, 1),
        default=0.99,
        metavar="SHARE",
        help="share of each layer's variance that its utilized rank holds (default: %(default)s)",
    )
    parser.add_argument(
        "--budgets",
        type=_number(float, 100),
        nargs="*",
        default=[50.0, 25.0, 10.0],
        metavar="PERCENT",
        help="layer parameters to keep when comparing methods (default: 50 25 10)",
    )
    parser.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        default="variance",
        help="how a budget is shared among the layers (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-dense",
        nargs="*",
        default=["head"],
        metavar="LAYER",
        help="layers to leave dense (default: head, the classifier, where rank 8 would save only 304 parameters)",
    )
    parser.add_argument(
        "--images",
        type=_number(int, TEST_IMAGES),
        default=TEST_IMAGES,
        metavar="N",
        help="evaluate on the first N test images (default: all %(default)s)",
    )
    parser.add_argument(
        "--calibration-images",
        type=_number(int, CALIBRATION_IMAGES),
        default=CALIBRATION_IMAGES,
        metavar="N",
        help="calibrate on the first N images (default: all %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=_number(int, 1000), default=15, metavar="N",
        help="timed calls per model (default: %(default)s)",
    )  # fmt: skip


def _number(kind: type[int] | type[float], largest: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value <= largest:
            raise argparse.ArgumentTypeError(f"must be {_KINDS[kind]} above 0 and at most {largest}; got {text!r}")
        return value

    return parse


_KINDS = {int: "an integer", float: "a number"}


@dataclass(frozen=True)
class Check:
    """An upper limit that decides about the exit code."""

    text: str
    measured: float
    limit: float

    @property
    def held(self) -> bool:
        """Whether the limit was met, up to the rounding of a difference of percentages."""
        return self.measured <= self.limit + 1e-9


def run(options: argparse.Namespace) -> int:
    """Run the demo from the stored weights and images to the report.

    Args:
        options: as defined by :func:`add_arguments`.

    Returns:
        The exit code: 0 if all checks hold, else 1.

    Raises:
        OSError: the data is missing, or the report cannot be written.
        ValueError: a budget cannot be met.
    """
    quiet = options.json or options.markdown

    def show(text: str) -> None:
        if not quiet:
            print(text, flush=True)  # in order with the progress bars on stderr, even in the same file

    started = time.perf_counter()
    model, training = load_vit(options.data), load_training_record(options.data)
    images, labels = (tensor[: options.images] for tensor in load_images("test", options.data))
    calibration_images = load_images("calibration", options.data)[0][: options.calibration_images]
    options.out.mkdir(parents=True, exist_ok=True)
    environment = _environment()
    show(f"A Vision Transformer of {_size(model):,} parameters and {len(images):,} test images of Fashion-MNIST,")
    show(f"torch {environment['torch']} on {environment['cpu']}, threads: {environment['threads']}.\n")

    covariances = lro.calibrate(model, calibration_images.split(CALIBRATION_BATCH), progress=True)
    # Utilized ranks refer to variance about zero, as in the paper; at budgets the mean is folded into the bias.
    about_zero = _decompose(model, covariances, centered=False, weights=False)
    about_mean = _decompose(model, covariances, centered=True, weights=True) if options.budgets else {}
    utilization = lro.utilization(model, covariances, options.explained_variance, centered=False, subspaces=about_zero)
    show(f"\n{utilization.table()}\n")

    compressed = []
    for config in _configs(options):
        smaller = copy.deepcopy(model)
        subspaces = about_mean if config.centered else about_zero
        compressed.append((smaller, lro.compress_(smaller, covariances, config, subspaces=subspaces)))
    rows = compare(model, compressed, images, labels, options.rounds)
    results = f"{table(rows)}\n\n{_legend(options, len(utilization.layers), environment)}"
    show(f"\n{results}\n")

    checks = _checks(rows, training["test_accuracy_float16_weights"] if options.images == TEST_IMAGES else None)
    held = all(check.held for check in checks)
    for check in checks:
        show(f"{'ok' if check.held else 'FAILED':6}  {check.text}: {check.measured:.2f}, at most {check.limit:g}")

    picture, left_out = options.out / "report.png", None
    try:
        draw(picture, rows, utilization)
    except ImportError as error:
        left_out = str(error)
        print(f"no picture: {left_out}", file=sys.stderr)
    report = {
        "version": lro.__version__,
        "held": held,
        "checks": [{**asdict(check), "held": check.held} for check in checks],
        "rows": [asdict(row) for row in rows],
        "utilization": utilization.to_dict(),
        "explained_variance": options.explained_variance,
        "budgets": options.budgets,
        "allocation": options.allocation,
        "keep_dense": options.keep_dense,
        "test_images": len(images),
        "calibration_images": len(calibration_images),
        "latency": {"batch": len(images[:LATENCY_BATCH]), "rounds": options.rounds},
        "training": training,
        "environment": environment,
        "picture": None if left_out else picture.name,
        "picture_left_out": left_out,
        "seconds": round(time.perf_counter() - started, 1),
    }
    text = json.dumps(report, indent=2)
    (options.out / "report.json").write_text(text + "\n")
    if options.json:
        print(text)
    elif options.markdown:
        print(results)
    show(f"\nWrote report.json{'' if left_out else ' and report.png'} to {options.out.resolve()}.")
    return 0 if held else 1


def _decompose(
    model: nn.Module, covariances: lro.Covariances, centered: bool, weights: bool
) -> dict[str, LayerSubspaces]:
    """Compute all subspaces that the demo needs in advance, so that a progress bar can show it."""
    layers = {fqn: model.get_submodule(fqn) for fqn in covariances}
    subspaces = layer_subspaces(layers, covariances, centered=centered)
    for spaces in ProgressBar(subspaces.values(), desc="decomposing", unit="layer"):
        _ = spaces.input, spaces.output, spaces.weight_output if weights else None
    return subspaces


def _configs(options: argparse.Namespace) -> Iterator[lro.CompressionConfig]:
    dense = dict.fromkeys(options.keep_dense)
    utilized = lro.ExplainedVariance(options.explained_variance)
    yield lro.CompressionConfig(utilized, "utilized", centered=False, overrides=dense)
    for percent in options.budgets:
        budget = lro.ParameterBudget(percent / 100, options.allocation)
        for projection in METHODS:
            yield lro.CompressionConfig(budget, projection, overrides=dense)


def _checks(rows: Sequence[Row], recorded: float | None) -> list[Check]:
    dense, utilized = rows[:2]
    checks = [
        Check(f"points of accuracy lost at {utilized.ranks}", dense.accuracy - utilized.accuracy, MAX_ACCURACY_LOSS),
        Check(f"% of the layer parameters at {utilized.ranks}", utilized.layer_share, MAX_SHARE),
    ]
    if recorded is not None:
        difference = abs(dense.accuracy - recorded)
        checks.append(
            Check(f"points between the dense accuracy and the recorded {recorded}%", difference, RECORD_TOLERANCE)
        )
    return checks


def _legend(options: argparse.Namespace, layers: int, environment: dict[str, Any]) -> str:
    kept = f", {', '.join(options.keep_dense)} left dense" if options.keep_dense else ""
    return (
        f"Layer parameters: of the {layers} Linear and Conv2d layers{kept}. Explained variance: about zero, biases "
        f"unchanged, as in the paper. Budgets: about the mean, {options.allocation} allocation. "
        f"Accuracy: on {options.images:,} test images, without fine-tuning. Agreement: images with the dense model's "
        f"prediction. Latency: {min(LATENCY_BATCH, options.images)} images, median of {options.rounds} interleaved "
        f"runs, float32, {environment['cpu']}, threads: {environment['threads']}."
    )


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "platform": platform.platform(),
    }


def _cpu() -> str:
    """The processor's name; on Linux, ``platform`` returns only the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
