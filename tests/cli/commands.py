"""Two commands on the project of the fixture of that name, and a check of refusals."""

from __future__ import annotations

import pytest
import torch

from lowrank_ops import cli
from lowrank_ops.cli import inputs


def build() -> torch.nn.Module:
    """The project's model, as the command builds it."""
    return inputs.import_callable("cli_project:build", "MODEL")()


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    """The line that a command prints when it fails with ``code``."""
    assert cli.main(list(argv)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("lowrank-ops: error: ")
    assert "Traceback" not in captured.err
    return line


ANALYZE = ("analyze", "cli_project:build", "--calibration", "cli_project:batches")
COMPRESS = ("compress", "cli_project:build", "--calibration", "cli_project:batches", "--out", "out")
