"""How many calibration rows are enough: ``python -m benchmarks.accuracy.calibration_size``, a table of docs/results.md.

Calibrates the demo's Vision Transformer by more and more training images, drawn at random and each set containing the
previous one, and reports Mean Layer Utilization and the accuracy of the model compressed to a quarter of its layer
parameters. An image is 17 tokens, 16 patches and the class token, which is 17 rows for all layers but three: the
patch embedding sees 16, the classifier 1. Rows are appended to a JSON file; another run
computes those that are missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

import lowrank_ops as lro

from . import vision
from .results import Results, study_parser, uses_token_weights

RESULTS = vision.RESULTS.with_name("calibration_size.json")
SIZES = (6, 20, 60, 200, 600, 2000, 3000)  # images
TOKENS = 17  # of an image
VARIANTS = (("output", "variance"), ("loss", "loss"))  # projection, allocation
THRESHOLDS = (0.9, 0.99, 0.999)
BUDGET = 25.0  # % of the layer parameters


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    results = Results(options.out)
    if not options.tables:
        measure(results, options)
    print(table(results, options.sizes, options.seeds, options.token_weights))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = study_parser("calibration_size", __doc__, RESULTS)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="images, from few to many")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of the draws of images; the table's are means"
    )
    parser.add_argument("--data", type=Path, default=vision.ORIGINAL, help="folder of the original files")
    parser.add_argument(
        "--token-weights",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="for loss-aware ranks and factors (default: %(default)s)",
    )
    parser.add_argument("--tables", action="store_true", help="show stored rows, compute nothing")
    return parser


def measure(results: Results, options: argparse.Namespace) -> None:
    """Compute the rows that are missing."""
    bench: vision.Bench | None = None
    images, _ = vision.training_images(options.data)
    for seed in options.seeds:
        sizes = [
            size
            for size in sorted(options.sizes)
            if any(results.find(case) is None for case in cases(size, seed, options.token_weights))
        ]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        covariances, taken = None, 0
        for size in tqdm(sizes, desc="sizes", unit="size"):
            bench = bench or vision.Bench(*vision.load_images("test"))
            torch.manual_seed(seed)
            more = bench.calibrate(images[order[taken:size]], token_weights=options.token_weights)
            covariances, taken = more if covariances is None else covariances.merge(more), size
            bench.use(covariances)
            shares = utilizations(bench)
            for case in cases(size, seed, options.token_weights):
                if results.find(case) is not None:
                    continue
                student, _ = bench.compress(BUDGET, case["projection"], case["allocation"])
                results.add(case, {**bench.judge(student), **shares})


def cases(size: int, seed: int, token_weights: bool) -> list[dict[str, Any]]:
    """The cases of one calibration."""
    setup = {"images": size, "seed": seed, "budget": BUDGET}
    return [
        {**setup, "projection": p, "allocation": a, "token_weights": uses_token_weights(p, a, token_weights)}
        for p, a in VARIANTS
    ]


def utilizations(bench: vision.Bench) -> dict[str, float]:
    """Mean Layer Utilization about the mean, by explained variance."""
    return {
        f"mlu_{threshold:g}": lro.utilization(
            bench.dense, bench.covariances, threshold, subspaces=bench.subspaces
        ).mean_layer_utilization
        for threshold in THRESHOLDS
    }


def table(results: Results, sizes: Sequence[int], seeds: Sequence[int], token_weights: bool) -> str:
    """One line per size, means over the seeds that were measured."""
    variants = [f"{projection}, {allocation}" for projection, allocation in VARIANTS]
    columns = ["images", "tokens", "draws", *(f"MLU at {threshold:g}" for threshold in THRESHOLDS), *variants]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for size in sizes:
        found = [[results.find(case) for case in cases(size, seed, token_weights)] for seed in seeds]
        draws = [[row for row in draw if row is not None] for draw in found if None not in draw]
        if draws:
            shares = [fmean(draw[0][f"mlu_{threshold:g}"] for draw in draws) for threshold in THRESHOLDS]
            accuracies = [
                [fmean(draw[index][name] for draw in draws) for name in ("accuracy", "agreement")]
                for index in range(len(VARIANTS))
            ]
            cells = [*(f"{share:.3f}" for share in shares), *(f"{a:.2f} ({b:.2f})" for a, b in accuracies)]
        else:
            cells = ["not measured"] * (len(THRESHOLDS) + len(VARIANTS))
        lines.append(f"| {size:,} | {TOKENS * size:,} | {len(draws)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
