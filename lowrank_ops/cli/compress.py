"""``lowrank-ops compress``: compress a model and write it to a folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from ..calibration.covariances import Covariances
from ..checkpoint import save_pretrained
from ..compress import compress_
from ..config import PROJECTIONS, CompressionConfig
from ..correction import correct_predictions
from ..files import parse_json
from ..folders import compress_folder
from ..latencies import LayerLatencies
from ..layers.latency import measure_latency
from ..midpoint import recalibrate
from ..policies import (
    ALLOCATIONS,
    EIGHT_BIT,
    ByteBudget,
    ExplainedVariance,
    FlopBudget,
    LatencyBudget,
    ParameterBudget,
    RankPolicy,
    Ranks,
)
from ..reconstruction import RECONSTRUCTIONS
from ..report.compression import CompressionReport
from ..search import measured_ranks
from .command import Failure, Result, add_command, add_output, check_folder, document, failing_as, path, share
from .inputs import add_calibration, calibrated, calibration_arguments, given_calibration, load_batches
from .resume import Progress
from .sources import save_processors

_COMPRESS = """\
Replace layers of the model by low-rank ones and write the model to a folder. With --model hf:, transformers'
from_pretrained loads the folder, after import lowrank_ops. For other models, load it with
lowrank_ops.load_pretrained(build_model(), folder)."""

_COMPRESS_EXAMPLE = """\
examples:
  a transformers language model, with a file of texts separated by empty lines
    lowrank-ops compress --model hf:my-model --calibration text:texts.txt --sensitivity fisher --budget 0.7 \\
        --out smaller
  a timm vision model, with a folder of images; after an interruption, run the same command again to resume
    lowrank-ops compress --model timm:vit_small_patch16_224 --calibration images:photos --out smaller --resume
  keep half of the layers' parameters, loss-aware
    lowrank-ops compress --model my_project:build_model --calibration my_project:batches --sensitivity fisher \\
        --budget 0.5 --out smaller
  use the covariances of an earlier analysis, keep 99% of each layer's variance, leave the classifier dense
    lowrank-ops compress --model my_project:build_model --covariances covariances.safetensors \\
        --explained-variance 0.99 --keep-dense head --out smaller
  halve the layers' time on this machine, as measured now with the first batch
    lowrank-ops compress --model my_project:build_model --calibration my_project:batches --latency 0.5 --out faster
  a folder of safetensors that is larger than the memory, with covariances from another machine
    lowrank-ops compress --from-checkpoint my-model --covariances covariances.safetensors --out smaller
  choose ranks by hand, {"layer name or re:pattern": rank, ...}; unnamed layers stay dense
    lowrank-ops compress --model my_project:build_model --calibration my_project:batches --ranks ranks.json \\
        --out smaller"""


def add(commands: Any) -> None:
    """Add the command."""
    compress = add_command(
        commands, "compress", "replace layers by low-rank ones and write the model", _COMPRESS, _COMPRESS_EXAMPLE, run
    )
    add_calibration(compress)
    _add_compression(compress)
    compress.add_argument(
        "--resume", action="store_true",
        help="store covariances and the progress of the reconstruction in FOLDER.resume, and resume from there",
    )  # fmt: skip
    compress.add_argument(
        "--from-checkpoint", type=path, metavar="DIR",
        help="instead of --model, with --covariances: compress a folder of safetensors layer by layer without loading "
        "the model; a transformers checkpoint, or any state dict of nn.Linear layers",
    )  # fmt: skip
    compress.add_argument("--html", type=path, metavar="FILE", help="also write an HTML page with charts and tables")
    add_output(compress)


def _add_compression(parser: argparse.ArgumentParser) -> None:
    ranks = parser.add_argument_group("ranks")
    policy = ranks.add_mutually_exclusive_group()
    policy.add_argument(
        "--explained-variance", type=share, default=None, metavar="SHARE",
        help="each layer keeps the directions that hold this share of its variance, such as 0.99",
    )  # fmt: skip
    policy.add_argument(
        "--budget",
        type=share,
        metavar="SHARE",
        help="all layers keep at most this share of their parameters (default: 0.5)",
    )
    policy.add_argument("--flops", type=share, metavar="SHARE", help="all layers keep at most this share of their MACs")
    policy.add_argument(
        "--bytes", type=share, metavar="SHARE",
        help="all layers keep at most this share of their bytes, with 8-bit factors or weights where that is better",
    )  # fmt: skip
    policy.add_argument(
        "--latency", type=share, metavar="SHARE",
        help="all layers keep at most this share of their time, given by --latencies or measured with the first batch",
    )  # fmt: skip
    policy.add_argument("--ranks", type=path, metavar="FILE", help='JSON file: {"layer name or re:pattern": rank, ...}')
    ranks.add_argument(
        "--allocation", choices=ALLOCATIONS,
        help="how a budget is shared: equally, by the output variance that it preserves, or by the predicted loss "
        "(default: loss if the covariances hold output gradients, else uniform)",
    )  # fmt: skip
    ranks.add_argument("--eight-bit", choices=list(EIGHT_BIT), help="the 8-bit format of --bytes (default: int8)")
    times = ranks.add_mutually_exclusive_group()
    times.add_argument("--latencies", type=path, metavar="FILE", help="file from --save-latencies, for --latency")
    times.add_argument("--save-latencies", type=path, metavar="FILE", help="store the measured times for later runs")
    ranks.add_argument(
        "--keep-dense", action="append", default=[], metavar="LAYER",
        help="layer name or re:pattern to leave dense; can be repeated",
    )  # fmt: skip
    ranks.add_argument(
        "--damping", type=share, metavar="SHARE",
        help="compute ranks and factors as if inputs had noise of this share of their variance, and gradients of half "
        "of it",
    )  # fmt: skip
    ranks.add_argument(
        "--correct", action="store_true",
        help="run --calibration again and measure how the errors of a sample's tokens add up, for ranks by loss",
    )  # fmt: skip
    ranks.add_argument(
        "--measure", action="store_true",
        help="with --budget: divide it by predicted losses that are corrected on --calibration, by gradients of "
        "compressed copies of the model",
    )  # fmt: skip
    factors = parser.add_argument_group("factors")
    factors.add_argument(
        "--projection", choices=PROJECTIONS,
        help="how factors are computed: from output principal components, loss-aware, from the utilized input and "
        "output subspaces, from input principal components, or by SVD of the weight alone "
        "(default: loss if the covariances hold output gradients, else output)",
    )  # fmt: skip
    factors.add_argument(
        "--group", action="store_true",
        help="make layers that share an input, such as q, k and v, low-rank all or none; on a GPU they run together",
    )  # fmt: skip
    factors.add_argument(
        "--pivoted", action="store_true",
        help="store each linear layer as pivot rows of its weight and coefficients of the other rows, which "
        "saves rank^2 parameters",
    )  # fmt: skip
    factors.add_argument(
        "--channels", action="store_true",
        help="drop channels of MLPs, the features between their layers, instead of factorizing them; with --budget or "
        "--flops",
    )  # fmt: skip
    factors.add_argument(
        "--reconstruct", choices=list(RECONSTRUCTIONS),
        help="then fit the factors to the dense model's outputs at the compressed model's inputs: layer by layer by "
        "regression (sequential), or one block at a time by training (blocks)",
    )  # fmt: skip
    factors.add_argument(
        "--recalibrate", action="store_true",
        help="run --calibration again at the midpoint of the dense and the compressed model, and use both gradients",
    )  # fmt: skip
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="where to write the compressed model")


def run(options: argparse.Namespace) -> Result:
    if options.out.exists() and not options.out.is_dir():
        raise Failure(2, f"--out must be a folder; {str(options.out)!r} is a file")
    if options.html is not None:
        check_folder(options.html, "--html")
    if options.from_checkpoint is not None:
        return _run_on_folder(options)
    _check_modes(options)
    policy = _policy(options)
    config = _config(options, policy)
    progress: Progress | None = None

    def measured(model: nn.Module, measure: Callable[[], Covariances]) -> Covariances:
        nonlocal progress
        progress = Progress(options, model)
        return progress.covariances("covariances", measure)

    model, covariances = calibrated(options, measured)
    progress = progress or Progress(options, model)
    if policy is None:
        config = replace(config, rank=_timed(options, model, progress))
    if options.recalibrate:
        with failing_as("recalibration", but=ValueError):  # of a budget that cannot be met, as below
            covariances = progress.covariances(
                "recalibrated covariances",
                lambda: recalibrate(
                    model, covariances, load_batches(options, model), config, **calibration_arguments(options)
                ),
            )
    covariances = _damped(options, covariances)
    reconstruction = None
    if options.reconstruct:
        make = RECONSTRUCTIONS[options.reconstruct]
        batches = load_batches(options, model)  # which may set the mask
        reconstruction = make(
            batches,
            sensitivity=options.sensitivity,
            mask=options.mask,
            checkpoint=progress.path("reconstruction.safetensors"),
        )
    subspaces = None
    if options.correct:
        batches = load_batches(options, model)  # which may set the mask
        with failing_as("correction", but=ValueError):
            subspaces = correct_predictions(
                model, covariances, batches, sensitivity=options.sensitivity, mask=options.mask,
                channels=options.channels, progress=True,
            )  # fmt: skip
    if options.measure:
        batches = load_batches(options, model)  # which may set the mask
        with failing_as("measuring", but=ValueError):
            ranks = measured_ranks(
                model, covariances, batches, options.budget, sensitivity=options.sensitivity, config=config,
                subspaces=subspaces, mask=options.mask, progress=True,
            )  # fmt: skip
        config = replace(config, rank=ranks)
    report = compress_(
        model, covariances, config, subspaces=subspaces, reconstruction=reconstruction,
        max_memory=None if options.batches else options.max_memory, progress=True,
    )  # fmt: skip
    if not any(layer.is_replaced for layer in report.layers):
        raise Failure(1, "every layer stays dense at these ranks, so nothing was written; allow smaller ranks")
    loading = _save(model, options, report)
    progress.finish()
    return _result(options, report, loading)


def _check_modes(options: argparse.Namespace) -> None:
    """Refuse options that run the model without the batches, gradients or budget that they need."""
    modes = {"--recalibrate": options.recalibrate, "--correct": options.correct, "--measure": options.measure}
    for flag, given in (("--reconstruct", options.reconstruct), *modes.items()):
        if given and options.batches is None:
            raise Failure(2, f"{flag} runs the model on --calibration; it cannot be combined with --covariances")
        if given and flag in modes and options.sensitivity is None:
            raise Failure(2, f"{flag} records output gradients again; it needs --sensitivity")
    if options.measure and (options.budget is None or options.allocation not in (None, "loss")):
        raise Failure(2, "--measure divides --budget by loss; it needs --budget, and no other --allocation")
    shares_by_loss = _budget(options) is not None and options.allocation in (None, "loss")
    if options.recalibrate and options.projection not in (None, "loss") and not shares_by_loss:
        raise Failure(2, "--recalibrate needs --projection loss, or a budget with --allocation loss")


def _run_on_folder(options: argparse.Namespace) -> Result:
    """Compress a folder of weights without loading the model."""
    if options.covariances is None:
        raise Failure(2, "--from-checkpoint does not run the model; it needs --covariances")
    others = {
        "--model": options.model or options.positional_model,
        "--checkpoint": options.checkpoint,
        "--reconstruct": options.reconstruct,
        "--recalibrate": options.recalibrate,
        "--correct": options.correct,
        "--measure": options.measure,
        "--channels": options.channels,
        "--resume": options.resume,
        "--save-covariances": options.save_covariances,
        "--save-latencies": options.save_latencies,
    }
    given = [flag for flag, value in others.items() if value] + given_calibration(options)
    if given:
        raise Failure(2, f"--from-checkpoint does not load or run the model; leave out {', '.join(given)}")
    source = str(options.from_checkpoint)
    options.model = source
    report = compress_folder(
        source,
        options.out,
        _damped(options, Covariances.load(options.covariances, packed=True)),
        _config(options, _policy(options)),
        device=options.device,
        max_memory=options.max_memory,
        progress=True,
    )
    loader = "lowrank_ops.load_pretrained(dense_model, {!r})"
    if (options.out / "config.json").exists():
        loader = "import lowrank_ops, transformers; from_pretrained({!r}) of the model's class"
    return _result(options, report, loader.format(str(options.out)))


def _damped(options: argparse.Namespace, covariances: Covariances) -> Covariances:
    if options.damping is None:
        return covariances
    with failing_as("--damping"):
        return covariances.damped(options.damping)


def _result(options: argparse.Namespace, report: CompressionReport, loading: str) -> Result:
    if options.html is not None:
        report.to_html(options.html)
    return Result(
        document(options, out=str(options.out), compression=report.to_dict()),
        f"{report.table()}\nwritten to {options.out}; load it with {loading}",
    )


def _save(model: nn.Module, options: argparse.Namespace, report: CompressionReport) -> str:
    """Write the model; the Python that loads it."""
    folder = str(options.out)
    if not options.model.startswith("hf:"):
        save_pretrained(model, options.out, report)
        return f"lowrank_ops.load_pretrained(dense_model, {folder!r})"
    model.save_pretrained(options.out)  # type: ignore[operator]
    save_processors(options, options.out)
    return f"import lowrank_ops, transformers; transformers.{type(model).__name__}.from_pretrained({folder!r})"


def _config(options: argparse.Namespace, policy: RankPolicy | None) -> CompressionConfig:
    return CompressionConfig(
        rank=policy or ParameterBudget(1.0),  # replaced later by measured times
        projection=options.projection,
        overrides=dict.fromkeys(options.keep_dense),
        pivoted=options.pivoted,
        group=options.group,
        channels=options.channels,
    )


def _budget(options: argparse.Namespace) -> float | None:
    """The share of the budget, if there is one."""
    return options.budget or options.flops or options.bytes or options.latency


def _policy(options: argparse.Namespace) -> RankPolicy | None:
    """The requested policy; None if it needs times that are not measured yet."""
    allocation = options.allocation
    if options.allocation is not None and _budget(options) is None:
        raise Failure(2, "--allocation needs a budget: --budget, --flops, --bytes or --latency")
    if options.eight_bit is not None and options.bytes is None:
        raise Failure(2, "--eight-bit needs --bytes")
    for name, file in (("--latencies", options.latencies), ("--save-latencies", options.save_latencies)):
        if file is not None and options.latency is None:
            raise Failure(2, f"{name} needs --latency")
    if options.group and options.bytes is not None:
        raise Failure(2, "--group cannot be combined with --bytes: no kernels run groups of 8-bit factors")
    if options.pivoted and options.group:
        raise Failure(2, "--pivoted cannot be combined with --group, whose kernels take two factors per layer")
    if options.pivoted and options.latency is not None:
        raise Failure(2, "--pivoted cannot be combined with --latency, which times layers of two factors")
    if options.channels:
        others = {
            "--latency": options.latency is not None,
            "--bytes": options.bytes is not None,
            "--ranks": options.ranks is not None,
            "--explained-variance": options.explained_variance is not None,
            "--recalibrate": options.recalibrate,
            "--reconstruct sequential": options.reconstruct == "sequential",
            f"--projection {options.projection}": options.projection not in (None, "loss", "output"),
        }
        if given := [flag for flag, value in others.items() if value]:
            raise Failure(2, f"--channels cannot be combined with {given[0]}; it takes --budget or --flops")
    if options.latency is not None and options.latencies is None:
        if options.batches is None:
            raise Failure(2, "--latency measures times with --calibration; with --covariances it needs --latencies")
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
    if options.bytes is not None:
        return ByteBudget(options.bytes, options.eight_bit or "int8", allocation)
    if options.budget is not None:
        return ParameterBudget(options.budget, allocation)
    if options.explained_variance is not None:
        return ExplainedVariance(options.explained_variance)
    if options.ranks is None:
        return ParameterBudget(0.5, allocation)
    try:
        ranks = parse_json(options.ranks.read_bytes())
    except ValueError as error:
        raise Failure(2, f"--ranks: {str(options.ranks)!r} cannot be read: {error}") from None
    if not isinstance(ranks, dict):
        raise Failure(2, f"--ranks: {str(options.ranks)!r} must hold a JSON object of ranks by layer name")
    return Ranks(ranks)


def _timed(options: argparse.Namespace, model: nn.Module, progress: Progress) -> LatencyBudget:
    """The latency budget, measured with the first batch; calibration has checked that there is one."""
    stored = progress.path("latencies.json")
    if stored is not None and stored.exists():
        return LatencyBudget(options.latency, LayerLatencies.load(stored), options.allocation)
    batch = next(iter(load_batches(options, model)))
    with failing_as("timing"):
        latencies = measure_latency(model, batch, progress=True)
    if stored is not None:
        latencies.save(stored)
    if options.save_latencies is not None:
        latencies.save(options.save_latencies)
    return LatencyBudget(options.latency, latencies, options.allocation)
