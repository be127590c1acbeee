"""The user's model, batches and covariances, loaded from the command's arguments."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import safetensors
from safetensors.torch import load_model as load_safetensors
from torch import Tensor, nn

from ..calibration.calibrator import calibrate
from ..calibration.covariances import Covariances
from . import sources
from .command import Failure, check_folder, failing_as, one_line, path, share, whole


def add_calibration(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("model and data")
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    data.add_argument(
        "--model", metavar="MODEL",
        help="hf:DIR, a folder written by save_pretrained of transformers, or hf:OWNER/NAME on the Hugging Face Hub; "
        "timm:NAME, a timm model with its pretrained weights or those of --checkpoint; or module:function, called "
        "without arguments, which returns the model",
    )  # fmt: skip
    data.add_argument(
        "--checkpoint", type=path, metavar="FILE", help="safetensors file with weights to load into the model"
    )
    data.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, ... (default: the device that MODEL returns the model on)",
    )
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--calibration", "--batches", dest="batches", metavar="DATA",
        help="text:FILE, texts separated by empty lines, for hf: models; images:DIR, for hf: and timm: models; or "
        "module:function, called without arguments, which returns an iterable of batches",
    )  # fmt: skip
    source.add_argument(
        "--covariances", type=path, metavar="FILE", help="file from --save-covariances, instead of --calibration"
    )
    for flag, default, what in (
        ("--batch-size", sources.BATCH_SIZE, "texts or images per batch"),
        ("--samples", sources.SAMPLES, "use the first N texts or images"),
        ("--max-length", sources.MAX_LENGTH, "cut texts to N tokens"),
    ):
        data.add_argument(flag, type=whole, metavar="N", help=f"{what} (default: {default})")
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--save-covariances", type=path, metavar="FILE", help="store the covariances for later runs"
    )
    calibration.add_argument(
        "--mask",
        metavar="NAME",
        help="argument of the model that is nonzero at real tokens (for text:FILE: attention_mask)",
    )
    calibration.add_argument(
        "--side", choices=["auto", "input", "output", "smaller"], default="auto",
        help="what to record: input, output, the smaller of the two (enough for --projection output or loss), or auto: "
        "the input, except for very wide layers (default: auto)",
    )  # fmt: skip
    calibration.add_argument(
        "--sensitivity", choices=["fisher", "output", "pooled"],
        help="also record output gradients, which make loss-aware compression the default: fisher, with labels drawn "
        "from the logits; output, for models without logits; pooled, for outputs that are averaged over the positions",
    )  # fmt: skip
    calibration.add_argument(
        "--max-memory", metavar="BYTES",
        help="bound on the sums on each device, such as 8GB; if they need more, the batches run several times "
        "(default: half of the free memory). With compress --covariances: bound on the memory for computing factors",
    )  # fmt: skip
    calibration.add_argument(
        "--tokens", type=share, metavar="SHARE",
        help="use a random share of the rows (tokens, positions) of each call of a layer (default: 1)",
    )  # fmt: skip
    calibration.add_argument(
        "--offload", choices=["cpu", "disk"], help="where finished sums are stored (default: where they fit)"
    )


def calibrated(
    options: argparse.Namespace, measured: Callable[[nn.Module, Callable[[], Covariances]], Covariances] | None = None
) -> tuple[nn.Module, Covariances]:
    """The model and its covariances, measured now or read from a file.

    Args:
        options: of the command.
        measured: called with the model and a function that measures its covariances; by default the latter is called.
    """
    given = given_calibration(options)
    if options.covariances is not None and given:
        raise Failure(2, f"{', '.join(given)} cannot be combined with --covariances: only a calibration uses it")
    if options.save_covariances is not None:
        check_folder(options.save_covariances, "--save-covariances")
    model = load_model_of(options)
    if options.covariances is not None:
        covariances = Covariances.load(options.covariances, packed=options.max_memory is not None)
    else:

        def measure() -> Covariances:
            batches = load_batches(options, model)
            with failing_as("calibration"):
                return calibrate(model, batches, **calibration_arguments(options))

        covariances = measure() if measured is None else measured(model, measure)
    if options.save_covariances is not None:
        covariances.save(options.save_covariances)
    return model, covariances


def given_calibration(options: argparse.Namespace) -> list[str]:
    """The given flags that only a calibration uses."""
    defaults = {"side": "auto"}
    names = ("mask", "side", "sensitivity", "tokens", "max_memory", "offload", "batch_size", "samples", "max_length")
    others = {"max_memory"} if options.command == "compress" else set()
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if name not in others and getattr(options, name) != defaults.get(name)
    ]


def calibration_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``calibrate`` and ``recalibrate``, once :func:`load_batches` may have set the mask."""
    names = ("mask", "side", "sensitivity", "max_memory", "offload")
    given = {name: getattr(options, name) for name in names}
    return given | {"tokens": options.tokens or 1.0, "progress": True}


def load_model_of(options: argparse.Namespace) -> nn.Module:
    if (options.model is None) == (options.positional_model is None):
        raise Failure(2, "one model is needed: --model hf:DIR, timm:NAME or module:function")
    options.model = options.positional_model if options.model is None else options.model
    model = sources.named_model(options)
    if model is None:
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


def load_batches(options: argparse.Namespace, model: nn.Module) -> Iterable[Any]:
    """The calibration batches; those of texts set the mask."""
    spec = options.batches
    if (named := sources.named_batches(options, model)) is not None:
        if spec.startswith("text:") and options.mask is None:
            options.mask = "attention_mask"
        return named
    source = import_callable(spec, "--calibration")
    with failing_as(f"--calibration {spec}"):
        batches = source()
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise Failure(
            2, f"--calibration {spec} must return an iterable of batches, such as a list or a DataLoader; it returned "
            f"a {type(batches).__name__}",
        )  # fmt: skip
    return batches


def import_callable(spec: str, argument: str) -> Callable[[], Any]:
    """The callable named by ``package.module:callable``; the working directory is searched too."""
    name, _, path = spec.partition(":")
    if not name or not path:
        accepted = "hf:DIR, timm:NAME" if argument == "MODEL" else "text:FILE, images:DIR"
        raise Failure(2, f"{argument} must be {accepted} or module:function; got {spec!r}")
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
        raise Failure(2, f"{argument} {spec} must be callable; got {type(thing).__name__}")
    return thing
