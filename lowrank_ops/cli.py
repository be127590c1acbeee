"""``lowrank-ops``: the pipeline from a terminal.

The result goes to stdout, with ``--json`` as one JSON document; progress, notes and whatever the user's code prints go
to stderr. Exit codes: 0 done, 1 it ran but did not hold or the user's code failed, 2 bad arguments or files.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from . import ops
from .calibration import calibrate
from .checkpoint import save_pretrained
from .compress import compress_
from .config import ALLOCATIONS, PROJECTIONS, CompressionConfig, ExplainedVariance, ParameterBudget, RankPolicy, Ranks
from .covariances import Covariances
from .report import utilization
from .version import __version__

_DESCRIPTION = """\
Make a trained PyTorch model smaller: measure how much of its space each layer uses, and replace layers by low-rank
ones that compute nearly the same."""

_EPILOG = """\
To begin:
  lowrank-ops demo          see it work on a model and images that come with the package
  lowrank-ops doctor        see what can run on this machine

For a model of your own, write a module with two functions, say my_project.py:
  def build_model():        returns the trained torch.nn.Module
  def batches():            returns an iterable of batches, each what the model takes:
                            a tensor, a tuple or list (positional) or a dict (keyword arguments)
and run
  lowrank-ops analyze my_project:build_model --batches my_project:batches"""

_ANALYZE = """\
Run batches through the model and print, for each layer, how many directions of its input (k_S) and output (k_T) hold
the explained variance, the utilized rank min(k_S, k_T) and its share of the layer, and the mean over the layers.
The model is not changed."""

_ANALYZE_EXAMPLE = """\
example:
  lowrank-ops analyze my_project:build_model --checkpoint weights.safetensors \\
      --batches my_project:batches --save-covariances covariances.safetensors --plot utilization.png"""

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
  ranks by hand, {"layer name or re:pattern": rank, ...}; layers that are not named stay dense
    lowrank-ops compress my_project:build_model --batches my_project:batches --ranks ranks.json --out smaller"""

_DOCTOR = """\
Print the versions and devices found, and for each operation which implementations can run here and why the others
cannot. Exits with 1 if an operation has none."""

_DOCTOR_EXAMPLE = """\
example:
  lowrank-ops doctor"""

_DEMO = """\
Compress a trained Vision Transformer on real images that come with the package and compare it with the dense one."""

_DEMO_EXAMPLE = """\
example:
  lowrank-ops demo"""


class _Failure(Exception):
    """Ends the command with an exit code and one line on stderr."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Result(NamedTuple):
    """What a command gives: for machines and for people."""

    document: dict[str, Any]
    text: str
    code: int = 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise _Failure(2, f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    show_traceback = "--traceback" in arguments
    try:
        options = _parser(arguments).parse_args(arguments)
        if options.command == "demo":
            return int(options.run(options))
        with contextlib.redirect_stdout(sys.stderr):
            result = options.run(options)
    except (_Failure, ValueError, OSError, ImportError) as error:
        if show_traceback:
            raise
        print(f"lowrank-ops: error: {_one_line(error)}", file=sys.stderr)
        return error.code if isinstance(error, _Failure) else 2
    except KeyboardInterrupt:
        print("lowrank-ops: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(result.document, indent=2) if options.json else result.text)
    return result.code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="lowrank-ops", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"lowrank_ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, summary: str, description: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=description, epilog=example, formatter_class=layout)

    demo = add("demo", "see it work, on a model and images that come with the package", _DEMO, _DEMO_EXAMPLE)
    if arguments[:1] == ["demo"]:  # its module reads images and draws; no other command needs it
        from .demo import run as demo_run

        demo_run.add_arguments(demo)
        demo.set_defaults(run=demo_run.run)

    analyze = add("analyze", "measure how much of its space each layer of a model uses", _ANALYZE, _ANALYZE_EXAMPLE)
    _add_calibration(analyze)
    analyze.add_argument(
        "--explained-variance", type=_share, default=0.99, metavar="SHARE",
        help="share of the variance, in (0, 1], that the counted directions hold (default: %(default)s)",
    )  # fmt: skip
    analyze.add_argument("--plot", type=Path, metavar="FILE", help="also draw the table, as .png, .svg or .pdf")
    _add_output(analyze)
    analyze.set_defaults(run=_analyze)

    compress = add("compress", "write a smaller model", _COMPRESS, _COMPRESS_EXAMPLE)
    _add_calibration(compress)
    _add_compression(compress)
    _add_output(compress)
    compress.set_defaults(run=_compress)

    doctor = add("doctor", "see what can run on this machine, and why the rest cannot", _DOCTOR, _DOCTOR_EXAMPLE)
    _add_output(doctor)
    doctor.set_defaults(run=_doctor)
    return parser


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="package.module:callable that returns the model; called without arguments"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="safetensors file of the model's state dict, to load first"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: where MODEL puts itself)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--batches", metavar="BATCHES", help="package.module:callable that returns an iterable of calibration batches"
    )
    source.add_argument(
        "--covariances", type=Path, metavar="FILE", help="what --save-covariances wrote, instead of running batches"
    )
    parser.add_argument("--save-covariances", type=Path, metavar="FILE", help="keep what was measured for later runs")
    parser.add_argument(
        "--mask", metavar="NAME", help="keyword argument of the model that marks real tokens, such as attention_mask"
    )
    parser.add_argument(
        "--side", choices=["auto", "input", "output"], default="auto",
        help="stream the inputs of layers, their outputs, or the inputs unless too wide (default: %(default)s)",
    )  # fmt: skip


def _add_compression(parser: argparse.ArgumentParser) -> None:
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument(
        "--explained-variance", type=_share, default=None, metavar="SHARE",
        help="each layer keeps the directions that hold this share of its variance (the default, with 0.99)",
    )  # fmt: skip
    policy.add_argument(
        "--budget", type=_share, metavar="SHARE", help="all layers together keep at most this share of their parameters"
    )
    policy.add_argument("--ranks", type=Path, metavar="FILE", help='JSON file: {"layer name or re:pattern": rank, ...}')
    parser.add_argument(
        "--allocation", choices=ALLOCATIONS,
        help="how a budget is shared out: the same share to each layer, or where it saves the most variance "
        "(default: uniform)",
    )  # fmt: skip
    parser.add_argument(
        "--projection", choices=PROJECTIONS, default="output",
        help="onto output principal components, onto utilized input and output spaces, or the SVD of the weight "
        "alone (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-dense", action="append", default=[], metavar="LAYER",
        help="layer name or re:pattern that stays as it is; may be given several times",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write the compressed model")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1]; got {text!r}")
    return value


def _analyze(options: argparse.Namespace) -> _Result:
    if options.plot is not None:
        _check_folder(options.plot, "--plot")
        if importlib.util.find_spec("matplotlib") is None:
            raise _Failure(2, "--plot needs matplotlib: pip install 'lowrank_ops[plots]'")
    model, covariances = _calibrated(options)
    report = utilization(model, covariances, options.explained_variance)
    if options.plot is not None:
        report.plot(options.plot)
    return _Result(_document(options, utilization=report.to_dict()), report.table())


def _compress(options: argparse.Namespace) -> _Result:
    if options.out.exists() and not options.out.is_dir():
        raise _Failure(2, f"--out must be a folder; {str(options.out)!r} is a file")
    config = CompressionConfig(
        rank=_policy(options), projection=options.projection, overrides=dict.fromkeys(options.keep_dense)
    )
    model, covariances = _calibrated(options)
    report = compress_(model, covariances, config, progress=True)
    if all(layer.rank is None for layer in report.layers):
        raise _Failure(1, "every layer stays dense at these ranks, so nothing was written; allow smaller ranks")
    save_pretrained(model, options.out, report)
    return _Result(
        _document(options, out=str(options.out), compression=report.to_dict()),
        f"{report.table()}\nwritten to {options.out}; lowrank_ops.load_pretrained(dense_model, {str(options.out)!r}) "
        "reads it",
    )


def _policy(options: argparse.Namespace) -> RankPolicy:
    if options.allocation is not None and options.budget is None:
        raise _Failure(2, "--allocation shares out a budget; give --budget with it")
    if options.budget is not None:
        return ParameterBudget(options.budget, options.allocation or "uniform")
    if options.ranks is None:
        return ExplainedVariance(0.99 if options.explained_variance is None else options.explained_variance)
    try:
        ranks = json.loads(options.ranks.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _Failure(2, f"--ranks: {str(options.ranks)!r} is no JSON text: {error}") from None
    if not isinstance(ranks, dict):
        raise _Failure(2, f"--ranks: {str(options.ranks)!r} must hold a JSON object of ranks by layer name")
    return Ranks(ranks)


def _calibrated(options: argparse.Namespace) -> tuple[nn.Module, Covariances]:
    """The model, and its covariances as measured now or read from a file."""
    if options.covariances is not None and (options.mask is not None or options.side != "auto"):
        raise _Failure(2, "--mask and --side say how to run --batches; they cannot go with --covariances")
    if options.save_covariances is not None:
        _check_folder(options.save_covariances, "--save-covariances")
    model = _load_model(options)
    if options.covariances is not None:
        covariances = Covariances.load(options.covariances)
    else:
        batches = _load_batches(options.batches)
        with _failing_as("calibration"):
            covariances = calibrate(model, batches, mask=options.mask, side=options.side, progress=True)
    if options.save_covariances is not None:
        covariances.save(options.save_covariances)
    return model, covariances


def _load_model(options: argparse.Namespace) -> nn.Module:
    source = _import(options.model, "MODEL")
    with _failing_as(f"MODEL {options.model}"):
        model = source if isinstance(source, nn.Module) else source()
    if not isinstance(model, nn.Module):
        raise _Failure(2, f"MODEL {options.model} must return a torch.nn.Module; it returned a {type(model).__name__}")
    if options.checkpoint is not None:
        try:
            load_model(model, options.checkpoint)
        except FileNotFoundError:
            raise _Failure(2, f"--checkpoint: there is no file {str(options.checkpoint)!r}") from None
        except (safetensors.SafetensorError, RuntimeError, OSError) as error:
            raise _Failure(
                2, f"--checkpoint: {str(options.checkpoint)!r} does not fit {options.model}: {_one_line(error)}"
            ) from error
    if options.device is not None:
        try:
            model.to(options.device)
        except (RuntimeError, AssertionError) as error:
            raise _Failure(2, f"--device {options.device}: {_one_line(error)}") from error
    return model


def _load_batches(spec: str) -> Iterable[Any]:
    source = _import(spec, "--batches")
    with _failing_as(f"--batches {spec}"):
        batches = source()
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise _Failure(
            2, f"--batches {spec} must return an iterable of batches, such as a list or a DataLoader; it returned a "
            f"{type(batches).__name__}",
        )  # fmt: skip
    return batches


def _import(spec: str, argument: str) -> Callable[[], Any]:
    """The callable that ``package.module:callable`` names, looked for in the working directory too."""
    name, _, path = spec.partition(":")
    if not name or not path:
        raise _Failure(2, f"{argument} must be package.module:callable; got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with _failing_as(f"{argument}: importing {name}", but=ModuleNotFoundError):
            thing: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _Failure(
            2, f"{argument} {spec}: there is no module {error.name!r} in this folder or in the environment"
        ) from error
    for part in path.split("."):
        if not hasattr(thing, part):
            raise _Failure(2, f"{argument} {spec}: {name!r} has no {path!r}")
        thing = getattr(thing, part)
    if not callable(thing):
        raise _Failure(2, f"{argument} {spec} must be callable; it is a {type(thing).__name__}")
    return thing


@contextlib.contextmanager
def _failing_as(what: str, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Tell an error of the user's own code, or of what it was given, in one line."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise _Failure(1, f"{what} failed: {kind}{_one_line(error)} (--traceback shows where)") from error


def _check_folder(path: Path, argument: str) -> None:
    """Before the long work: can the file be written at all?"""
    if not path.absolute().parent.is_dir():
        raise _Failure(2, f"{argument}: there is no folder {str(path.absolute().parent)!r}")


def _document(options: argparse.Namespace, **results: Any) -> dict[str, Any]:
    return {"command": options.command, "version": __version__, "model": options.model, **results}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _doctor(options: argparse.Namespace) -> _Result:
    environment = {
        "lowrank_ops": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "not built into this torch",
        "triton": _version_of("triton"),
        "safetensors": safetensors.__version__,
        "matplotlib": _version_of("matplotlib"),
    }
    devices = [{"device": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}]
    devices += [_gpu(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    calls = [call for device in devices for call in _calls(str(device["device"]))]
    held = all(any(row["chosen"] for row in call["implementations"]) for call in calls)

    width = max(map(len, environment))
    lines = [f"{name.ljust(width)}  {value}" for name, value in environment.items()]
    for device in devices:
        facts = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        lines.append(f"{'device'.ljust(width)}  {device['device']}: {device['name']}, {facts}")
    for call in calls:
        lines += ["", f"{call['op']} of {call['call']} on {call['device']}"]
        names = max(len(row["implementation"]) for row in call["implementations"])
        for row in call["implementations"]:
            state = "runs" if row["chosen"] else "can run" if row["can_run"] else f"cannot run: {row['reason']}"
            lines.append(f"  {row['implementation'].ljust(names)}  {state}")
    lines += ["", "Every operation can run on every device." if held else "An operation has nothing that can run it."]
    document = {"command": "doctor", "environment": environment, "devices": devices, "calls": calls, "held": held}
    return _Result(document, "\n".join(lines), 0 if held else 1)


def _version_of(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        return str(importlib.import_module(module).__version__)
    except Exception as error:  # a broken installation is what a doctor is asked about
        return f"cannot be imported: {_one_line(error)}"


def _gpu(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30, 1),
    }


def _calls(device: str) -> Iterator[dict[str, Any]]:
    """Typical calls of each op on a device, and what each implementation says to them."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    sums, width, rank, patch = torch.float64, 1024, 256, 64 * 9
    typical: list[tuple[str, str, tuple[Tensor, ...], dict[str, Any]]] = [
        (
            "covariance_update_",
            f"4096 x {width}",
            (zeros(width, width, dtype=sums), zeros(width, dtype=sums), zeros(4096, width)),
            {},
        ),
        (
            "conv_covariance_update_",
            "8 x 64 x 28 x 28, kernel 3 x 3",
            (zeros(1, patch, patch, dtype=sums), zeros(1, patch, dtype=sums), zeros(8, 64, 28, 28)),
            {"kernel_size": (3, 3), "padding": (1, 1)},
        ),
    ]
    typical += [
        (
            "lowrank_linear",
            f"{tokens} x {width}, rank {rank}",
            (zeros(tokens, width), zeros(rank, width), zeros(width, rank)),
            {},
        )
        for tokens in (1, 4096)
    ]
    for op, shape, tensors, keywords in typical:
        answers = [line.partition(": ") for line in ops.explain(op, *tensors, **keywords).splitlines()]
        yield {
            "op": op,
            "call": f"{shape}, {str(dtype).removeprefix('torch.')}",
            "device": device,
            "implementations": [
                {
                    "implementation": name,
                    "can_run": not state.startswith("cannot run"),
                    "chosen": state == "runs",
                    "reason": state.removeprefix("cannot run: ") if state.startswith("cannot run") else None,
                }
                for name, _, state in answers
            ],
        }


if __name__ == "__main__":
    sys.exit(main())
