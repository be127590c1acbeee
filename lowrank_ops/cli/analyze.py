"""``lowrank-ops analyze``: the utilization of each layer."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from ..report import utilization
from .command import Failure, Result, add_command, add_output, check_folder, document, path, share
from .inputs import add_calibration, calibrated

_ANALYZE = """\
Run batches through the model and print for each layer how many directions of its input (k_S) and output (k_T) hold the
explained variance, its utilized rank min(k_S, k_T), and its utilization: this rank relative to the largest possible
one. Also print the mean over the layers. The model is not changed."""

_ANALYZE_EXAMPLE = """\
example:
  lowrank-ops analyze --model my_project:build_model --checkpoint weights.safetensors \\
      --calibration my_project:batches --save-covariances covariances.safetensors --plot utilization.png"""


def add(commands: Any) -> None:
    """Add the command."""
    analyze = add_command(commands, "analyze", "measure the utilization of each layer", _ANALYZE, _ANALYZE_EXAMPLE, run)
    add_calibration(analyze)
    analyze.add_argument(
        "--explained-variance", type=share, default=0.99, metavar="SHARE",
        help="share of the variance, in (0, 1], that the counted directions hold (default: %(default)s)",
    )  # fmt: skip
    analyze.add_argument("--plot", type=path, metavar="FILE", help="also write a bar chart: .png, .svg or .pdf")
    analyze.add_argument("--html", type=path, metavar="FILE", help="also write an HTML page with charts and tables")
    add_output(analyze)


def run(options: argparse.Namespace) -> Result:
    if options.plot is not None:
        check_folder(options.plot, "--plot")
        if importlib.util.find_spec("matplotlib") is None:
            raise Failure(2, "--plot needs matplotlib: pip install 'lowrank_ops[plots]'")
    if options.html is not None:
        check_folder(options.html, "--html")
    model, covariances = calibrated(options)
    report = utilization(model, covariances, options.explained_variance)
    if options.plot is not None:
        report.plot(options.plot)
    if options.html is not None:
        report.to_html(options.html)
    return Result(document(options, utilization=report.to_dict()), report.table())
