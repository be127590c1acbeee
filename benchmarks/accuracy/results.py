"""Rows of a study in a JSON file, added as they are measured, so that an interrupted run resumes."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Rows measured before words changed: {key: {old value: new value}}, and keys under another name.
_VALUES: Mapping[str, Mapping[Any, Any]] = {
    "allocation": {"energy": "variance"},
    "budget": {"multiplications": "MACs"},
    "finetuned": {"refit": "reconstruction"},
    "variant": {"output-refit": "output-reconstructed", "loss-refit": "loss-reconstructed"},
    "token_weights": {"weighted": True, "alike": False},
}
_KEYS = {"arm": "variant", "rows": "token_weights"}


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
    """The rows of one file: what was measured (the case) and the result, in one flat mapping each.

    Attributes:
        rows: in today's words; rows in older words stay as they are in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        self.rows = [_translated(row) for row in self._stored]

    def find(self, case: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of a case, or None if it has not been measured."""
        return next((row for row in self.rows if case.items() <= row.items()), None)

    def add(self, case: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Store a row; a crash leaves the old file or the new one."""
        row = {**case, **measured}
        self.rows.append(row)
        self._stored.append(row)
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text("[\n" + ",\n".join(map(json.dumps, self._stored)) + "\n]\n")
        os.replace(partial, self.path)


def _translated(row: Mapping[str, Any]) -> dict[str, Any]:
    named = {_KEYS.get(key, key): value for key, value in row.items()}
    return {key: _VALUES[key].get(value, value) if key in _VALUES else value for key, value in named.items()}
