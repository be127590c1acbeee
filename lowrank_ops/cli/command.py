"""What the commands share: declaration, results, and errors."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..version import __version__


class Failure(Exception):
    """Ends the command with an exit code and one line on stderr."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Result(NamedTuple):
    """The output of a command: as JSON and as text."""

    document: dict[str, Any]
    text: str
    code: int = 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise Failure(2, f"{message} (see {self.prog} --help)")


def add_command(
    commands: Any,
    name: str,
    summary: str,
    description: str,
    example: str,
    run: Callable[[argparse.Namespace], Any],
) -> argparse.ArgumentParser:
    """Add a command to the parser.

    Args:
        run: takes the parsed options and gives a :class:`Result`, or the exit code of a command that prints by itself.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1]; got {text!r}")
    return value


def path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must be a path; got an empty string, such as from an unset shell variable")
    return Path(text)


def whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1; got {text!r}")
    return int(text)


@contextlib.contextmanager
def failing_as(what: str, but: type[Exception] | tuple[()] = (), code: int = 1) -> Iterator[None]:
    """Report an error raised by the user's code or by its data in one line."""
    try:
        yield
    except Failure:
        raise
    except but:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise Failure(code, f"{what} failed: {kind}{one_line(error)} (--traceback shows where)") from error


def check_folder(path: Path, argument: str) -> None:
    """Fail early if the file cannot be written."""
    if not path.absolute().parent.is_dir():
        raise Failure(2, f"{argument}: no such folder: {str(path.absolute().parent)!r}")
    if path.is_dir():
        raise Failure(2, f"{argument}: {str(path)!r} is a folder; pass a file")


def document(options: argparse.Namespace, **results: Any) -> dict[str, Any]:
    return {"command": options.command, "version": __version__, "model": options.model, **results}


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
