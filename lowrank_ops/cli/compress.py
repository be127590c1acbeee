"""``lowrank-ops compress``: write a smaller model."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import save_pretrained
from ..compress import compress_
from ..config import (
    ALLOCATIONS,
    PROJECTIONS,
    CompressionConfig,
    ExplainedVariance,
    FlopBudget,
    LatencyBudget,
    LayerLatencies,
    ParameterBudget,
    RankPolicy,
    Ranks,
)
from ..layers.latency import measure_latency
from ..midpoint import recalibrate
from ..reconstruction import SequentialReconstruction
from .command import Failure, Result, add_command, add_output, check_folder, document, failing_as, share
from .inputs import add_calibration, calibrated, load_batches

_COMPRESS = """\
Replace layers of the model by low-rank ones and write the result to a folder: model.safetensors and
lowrank_config.json. In Python, lowrank_ops.load_pretrained(build_model(), folder) gives the compressed model back."""

_COMPRESS_EXAMPLE = """\
examples:
  half of the layers' parameters
    lowrank-ops compress my_project:build_model --batches my_project:batches --budget 0.5 --out smaller
  what a former analysis measured, 99% of each layer's variance, the classifier left dense
    lowrank-ops compress my_project:build_model --covariances covariances.safetensors \\
        --explained-variance 0.99 --keep-dense head --out smaller
  half of the layers' time on this machine, as timed now with the first batch
    lowrank-ops compress my_project:build_model --batches my_project:batches --latency 0.5 --out faster
  ranks by hand, {"layer name or re:pattern": rank, ...}; layers that are not named stay dense
    lowrank-ops compress my_project:build_model --batches my_project:batches --ranks ranks.json --out smaller"""


def add(commands: Any) -> None:
    """Declare the command."""
    compress = add_command(commands, "compress", "write a smaller model", _COMPRESS, _COMPRESS_EXAMPLE, run)
    add_calibration(compress)
    _add_compression(compress)
    compress.add_argument("--html", type=Path, metavar="FILE", help="also write one page with pictures and tables")
    add_output(compress)


def _add_compression(parser: argparse.ArgumentParser) -> None:
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument(
        "--explained-variance", type=share, default=None, metavar="SHARE",
        help="each layer keeps the directions that hold this share of its variance (the default, with 0.99)",
    )  # fmt: skip
    policy.add_argument(
        "--budget", type=share, metavar="SHARE", help="all layers together keep at most this share of their parameters"
    )
    policy.add_argument("--flops", type=share, metavar="SHARE", help="the same of their multiplications")
    policy.add_argument(
        "--latency", type=share, metavar="SHARE",
        help="the same of their time: as --latencies has it, or as timed now with the first of --batches",
    )  # fmt: skip
    policy.add_argument("--ranks", type=Path, metavar="FILE", help='JSON file: {"layer name or re:pattern": rank, ...}')
    parser.add_argument(
        "--allocation", choices=ALLOCATIONS,
        help="how a budget is shared out: the same share to each layer, or where it saves the most variance or loss "
        "(default: uniform)",
    )  # fmt: skip
    times = parser.add_mutually_exclusive_group()
    times.add_argument("--latencies", type=Path, metavar="FILE", help="times for --latency, from --save-latencies")
    times.add_argument("--save-latencies", type=Path, metavar="FILE", help="keep what was timed for later runs")
    parser.add_argument(
        "--projection", choices=PROJECTIONS, default="output",
        help="onto output principal components, the same weighed by the loss, onto utilized input and output spaces, "
        "onto input principal components, or the SVD of the weight alone (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--refit", choices=["sequential"],
        help="fit the factors anew, layer by layer, to the dense model's outputs from the compressed model's inputs",
    )  # fmt: skip
    parser.add_argument(
        "--recalibrate", action="store_true",
        help="run --batches once more, halfway to the compressed model, and use the gradients of both",
    )  # fmt: skip
    parser.add_argument(
        "--keep-dense", action="append", default=[], metavar="LAYER",
        help="layer name or re:pattern that stays as it is; may be given several times",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write the compressed model")


def run(options: argparse.Namespace) -> Result:
    if options.out.exists() and not options.out.is_dir():
        raise Failure(2, f"--out must be a folder; {str(options.out)!r} is a file")
    if options.html is not None:
        check_folder(options.html, "--html")
    if options.refit is not None and options.batches is None:
        raise Failure(2, "--refit runs the model on --batches; it cannot go with --covariances")
    if options.recalibrate and options.batches is None:
        raise Failure(2, "--recalibrate runs the model on --batches; it cannot go with --covariances")
    if options.recalibrate and options.sensitivity is None:
        raise Failure(2, "--recalibrate takes gradients from --batches once more; give --sensitivity with it")
    if options.recalibrate and "loss" not in (options.projection, options.allocation):
        raise Failure(2, "--recalibrate is for ranks or factors by loss; give --allocation loss or --projection loss")
    policy = _policy(options)
    config = CompressionConfig(
        rank=policy or ExplainedVariance(),
        projection=options.projection,
        overrides=dict.fromkeys(options.keep_dense),
        reconstruction=options.refit,
    )
    model, covariances = calibrated(options)
    if policy is None:
        config = replace(config, rank=_timed(options, model))
    if options.recalibrate:
        with failing_as("recalibration", but=ValueError):  # of a budget that cannot be met, as below
            covariances = recalibrate(
                model,
                covariances,
                load_batches(options.batches),
                config,
                mask=options.mask,
                side=options.side,
                sensitivity=options.sensitivity,
                progress=True,
            )
    reconstruction = None
    if options.refit is not None:
        batches = load_batches(options.batches)
        reconstruction = SequentialReconstruction(batches, sensitivity=options.sensitivity, mask=options.mask)
    report = compress_(model, covariances, config, reconstruction=reconstruction, progress=True)
    if all(layer.rank is None for layer in report.layers):
        raise Failure(1, "every layer stays dense at these ranks, so nothing was written; allow smaller ranks")
    save_pretrained(model, options.out, report)
    if options.html is not None:
        report.to_html(options.html)
    return Result(
        document(options, out=str(options.out), compression=report.to_dict()),
        f"{report.table()}\nwritten to {options.out}; lowrank_ops.load_pretrained(dense_model, {str(options.out)!r}) "
        "reads it",
    )


def _policy(options: argparse.Namespace) -> RankPolicy | None:
    """The policy asked for; None where it is a share of times that are still to be taken."""
    allocation = options.allocation or "uniform"
    if options.allocation is not None and not (options.budget or options.flops or options.latency):
        raise Failure(2, "--allocation shares out a budget; give --budget, --flops or --latency with it")
    for name, file in (("--latencies", options.latencies), ("--save-latencies", options.save_latencies)):
        if file is not None and options.latency is None:
            raise Failure(2, f"{name} is for a budget in time; give --latency with it")
    if options.latency is not None and options.latencies is None:
        if options.batches is None:
            raise Failure(2, "--latency times layers with --batches; with --covariances it needs --latencies as well")
        if options.save_latencies is not None:
            check_folder(options.save_latencies, "--save-latencies")
        return None
    if options.latency is not None:
        try:
            return LatencyBudget(options.latency, LayerLatencies.load(options.latencies), allocation)
        except ValueError as error:
            raise Failure(2, f"--latencies: {error}") from None
    if options.flops is not None:
        return FlopBudget(options.flops, allocation)
    if options.budget is not None:
        return ParameterBudget(options.budget, allocation)
    if options.ranks is None:
        return ExplainedVariance(0.99 if options.explained_variance is None else options.explained_variance)
    try:
        ranks = json.loads(options.ranks.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failure(2, f"--ranks: {str(options.ranks)!r} is no JSON text: {error}") from None
    if not isinstance(ranks, dict):
        raise Failure(2, f"--ranks: {str(options.ranks)!r} must hold a JSON object of ranks by layer name")
    return Ranks(ranks)


def _timed(options: argparse.Namespace, model: nn.Module) -> LatencyBudget:
    """The budget in time, by the first batch; ``calibrated`` has seen that there is one."""
    batch = next(iter(load_batches(options.batches)))
    with failing_as("timing"):
        latencies = measure_latency(model, batch, progress=True)
    if options.save_latencies is not None:
        latencies.save(options.save_latencies)
    return LatencyBudget(options.latency, latencies, options.allocation or "uniform")
