"""``lowrank-ops``: the pipeline from a terminal.

The result goes to stdout, with ``--json`` as one JSON document; progress, notes and whatever the user's code prints go
to stderr. Exit codes: 0 done, 1 it ran but did not hold or the user's code failed, 2 bad arguments or files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence

from ..version import __version__
from . import analyze, compress, demo, doctor
from .command import Failure, Parser, Result, one_line

_PRINTING = ("demo",)  # commands that write their own output and give their exit code

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
    except BrokenPipeError:  # as of `| head`; what is left must not be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return result.code


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
