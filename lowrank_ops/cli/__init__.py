"""``lowrank-ops``: the pipeline from a terminal.

The result goes to stdout, with ``--json`` as one JSON document. Progress and the output of the user's code go to
stderr. Exit codes: 0 success; 1 a check failed or the user's code raised an error; 2 bad arguments or files.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Sequence

from ..version import __version__
from . import analyze, compress, demo, doctor
from .command import Failure, Parser, Result, one_line

_PRINTING = ("demo",)  # commands that print by themselves and return an exit code

_DESCRIPTION = """\
Compress a trained PyTorch model: measure how many directions each layer uses, and replace layers by low-rank ones with
nearly the same output."""

_EPILOG = """\
To begin:
  lowrank-ops demo          compress a trained model on real images (in a checkout of the repository)
  lowrank-ops doctor        show what can run on this machine

Compress a model saved by transformers, with a file of texts:
  lowrank-ops compress --model hf:my-model --calibration text:texts.txt --budget 0.7 --out smaller

To compress your own model, write a module with two functions, for example my_project.py:
  def build_model():        returns the trained torch.nn.Module
  def batches():            returns an iterable of batches. Each batch is passed to the model: a tensor,
                            a tuple or list of positional arguments, or a dict of keyword arguments
Then run
  lowrank-ops analyze --model my_project:build_model --calibration my_project:batches"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    show_traceback = "--traceback" in arguments
    try:
        parser = _parser(arguments)
        _complete(parser)
        options = parser.parse_args(arguments)
        if options.command in _PRINTING:
            return int(options.run(options))
        with contextlib.redirect_stdout(sys.stderr):
            result: Result = options.run(options)
    except (Failure, ValueError, OSError, ImportError) as error:
        if show_traceback:
            raise
        print(f"lowrank-ops: error: {one_line(error)}", file=sys.stderr)
        return error.code if isinstance(error, Failure) else 2
    except KeyboardInterrupt:
        print("lowrank-ops: interrupted", file=sys.stderr)
        return 130
    try:
        print(json.dumps(result.document, indent=2) if options.json else result.text, flush=True)
    except BrokenPipeError:  # as with `| head`; Python must not flush the rest again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return result.code


def _complete(parser: argparse.ArgumentParser) -> None:
    """Complete the shell's input, if argcomplete is installed."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ImportError):
            importlib.import_module("argcomplete").autocomplete(parser)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="lowrank-ops", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"lowrank_ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo.add(commands, chosen=arguments[:1] == ["demo"])
    analyze.add(commands)
    compress.add(commands)
    doctor.add(commands)
    return parser
