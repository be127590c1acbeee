"""Rows of a study in a JSON file, added as they are measured, so that an interrupted run resumes."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def study_parser(study: str, description: str | None, out: Path) -> argparse.ArgumentParser:
    """The command line of a study, which reads the file ``--out`` and adds its rows to it."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.accuracy.{study}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=out, help="file of rows, read and added to")
    return parser


def uses_token_weights(projection: str, allocation: str, requested: bool) -> bool:
    """Whether token weights change the result: only loss-aware factors and ranks use them."""
    return requested and "loss" in (projection, allocation)


class Results:
    """The rows of one file: what was measured (the case) and the result, in one flat mapping each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def find(self, case: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of a case, or None if it has not been measured."""
        return next((row for row in self.rows if case.items() <= row.items()), None)

    def add(self, case: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Store a row; a crash leaves the old file or the new one."""
        self.rows.append({**case, **measured})
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
        os.replace(partial, self.path)
