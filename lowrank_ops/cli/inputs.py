"""The user's model, batches and covariances, loaded from the command's arguments."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_model as load_safetensors
from torch import Tensor, nn

from ..calibration.calibrator import calibrate
from ..calibration.statistics import Covariances
from .command import Failure, check_folder, failing_as, one_line


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="package.module:callable that returns the model; called without arguments"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="safetensors file with weights to load into the model"
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, ... (default: the device that MODEL returns the model on)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--batches", metavar="BATCHES", help="package.module:callable that returns an iterable of calibration batches"
    )
    source.add_argument(
        "--covariances", type=Path, metavar="FILE", help="file from --save-covariances, instead of --batches"
    )
    parser.add_argument("--save-covariances", type=Path, metavar="FILE", help="store the covariances for later runs")
    parser.add_argument(
        "--mask",
        metavar="NAME",
        help="keyword argument of the model that is nonzero at real tokens, such as attention_mask",
    )
    parser.add_argument(
        "--side", choices=["auto", "input", "output"], default="auto",
        help="record the layers' inputs, their outputs, or (auto) the inputs of all but wide layers (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--sensitivity", choices=["fisher", "output", "pooled"],
        help="also record output gradients, which make loss-aware compression the default: fisher, with labels drawn "
        "from the logits; output, for models without logits; pooled, for outputs that are averaged over the positions",
    )  # fmt: skip


def calibrated(options: argparse.Namespace) -> tuple[nn.Module, Covariances]:
    """The model and its covariances, measured now or read from a file."""
    if options.covariances is not None and (options.mask is not None or options.side != "auto" or options.sensitivity):
        raise Failure(2, "--mask, --side and --sensitivity need --batches; they cannot be combined with --covariances")
    if options.save_covariances is not None:
        check_folder(options.save_covariances, "--save-covariances")
    model = load_model_of(options)
    if options.covariances is not None:
        covariances = Covariances.load(options.covariances)
    else:
        batches = load_batches(options.batches)
        with failing_as("calibration"):
            covariances = calibrate(
                model, batches, mask=options.mask, side=options.side, sensitivity=options.sensitivity, progress=True
            )
    if options.save_covariances is not None:
        covariances.save(options.save_covariances)
    return model, covariances


def load_model_of(options: argparse.Namespace) -> nn.Module:
    source = import_callable(options.model, "MODEL")
    with failing_as(f"MODEL {options.model}"):
        model = source if isinstance(source, nn.Module) else source()
    if not isinstance(model, nn.Module):
        raise Failure(2, f"MODEL {options.model} must return a torch.nn.Module; it returned a {type(model).__name__}")
    if options.checkpoint is not None:
        try:
            load_safetensors(model, options.checkpoint)
        except FileNotFoundError:
            raise Failure(2, f"--checkpoint: no such file: {str(options.checkpoint)!r}") from None
        except (safetensors.SafetensorError, RuntimeError, OSError) as error:
            raise Failure(
                2, f"--checkpoint: {str(options.checkpoint)!r} does not fit {options.model}: {one_line(error)}"
            ) from error
    if options.device is not None:
        try:
            model.to(options.device)
        except (RuntimeError, AssertionError) as error:
            raise Failure(2, f"--device {options.device}: {one_line(error)}") from error
    return model


def load_batches(spec: str) -> Iterable[Any]:
    source = import_callable(spec, "--batches")
    with failing_as(f"--batches {spec}"):
        batches = source()
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise Failure(
            2, f"--batches {spec} must return an iterable of batches, such as a list or a DataLoader; it returned a "
            f"{type(batches).__name__}",
        )  # fmt: skip
    return batches


def import_callable(spec: str, argument: str) -> Callable[[], Any]:
    """The callable named by ``package.module:callable``; the working directory is searched too."""
    name, _, path = spec.partition(":")
    if not name or not path:
        raise Failure(2, f"{argument} must be package.module:callable; got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    package = name.partition(".")[0]  # finding a submodule would run its package
    with contextlib.suppress(ImportError, ValueError):
        if (found := importlib.util.find_spec(package)) is not None:
            print(f"lowrank-ops: {argument} runs {name}:{path}, code of {found.origin}", file=sys.stderr)
    try:
        with failing_as(f"{argument}: importing {name}", but=ModuleNotFoundError):
            thing: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Failure(2, f"{argument} {spec}: no module {error.name!r} in this folder or in the environment") from error
    for part in path.split("."):
        if not hasattr(thing, part):
            raise Failure(2, f"{argument} {spec}: {name!r} has no {path!r}")
        thing = getattr(thing, part)
    if not callable(thing):
        raise Failure(2, f"{argument} {spec} must be callable; it is a {type(thing).__name__}")
    return thing
