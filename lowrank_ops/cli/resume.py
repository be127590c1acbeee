"""Stores the results of a command's long steps in a folder, from which a second run of the command resumes."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..calibration.covariances import Covariances
from ..files import digest, parse_json, write_whole
from .command import Failure

_NOT_THE_RUN = ("command", "run", "json", "html", "plot", "traceback", "resume", "out", "positional_model")


class Progress:
    """The finished steps of a command. Without ``--resume`` nothing is stored.

    Args:
        options: of the command.
        model: before it is compressed.

    Raises:
        Failure: the folder is of a run with other arguments or another model.
    """

    def __init__(self, options: argparse.Namespace, model: nn.Module) -> None:
        self.folder: Path | None = None
        if not options.resume:
            return
        self.folder = options.out.absolute().parent / f"{options.out.name}.resume"
        self.folder.mkdir(parents=True, exist_ok=True)
        run = {name: str(value) for name, value in vars(options).items() if name not in _NOT_THE_RUN}
        run["weights"] = digest(dict(model.state_dict()))
        file = self.folder / "run.json"
        if file.exists():
            before = parse_json(file.read_bytes())
            differ = [name for name in {**run, **before} if run.get(name) != before.get(name)]
            if differ:
                raise Failure(
                    2, f"--resume: {str(self.folder)!r} is of another run, which differs in {', '.join(differ)}; "
                    "delete it, or choose another --out",
                )  # fmt: skip
            return
        write_whole(file, json.dumps(run, indent=2).encode())

    def covariances(self, name: str, measure: Callable[[], Covariances]) -> Covariances:
        """The stored covariances of this name, or measured ones, which are then stored."""
        path = self.path(f"{name}.safetensors")
        if path is not None and path.exists():
            print(f"lowrank-ops: --resume takes the {name} from {path}", file=sys.stderr)
            return Covariances.load(path)
        found = measure()
        if path is not None:
            found.save(path)
        return found

    def path(self, name: str) -> Path | None:
        """A file of the folder."""
        return None if self.folder is None else self.folder / name

    def finish(self) -> None:
        """Delete the folder: the result is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder)
