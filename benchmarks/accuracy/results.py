"""Rows of a study in a JSON file, added to as they are done, so that a broken run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROWS = ("weighted", "alike")  # how the rows of a sample count: by their gradients, or all alike


def rows_of(projection: str, allocation: str, rows: str) -> str:
    """How rows count in one row of a study: nothing but factors and ranks by loss asks for weights."""
    return rows if "loss" in (projection, allocation) else "alike"


class Results:
    """The rows of one file: what was asked (the case) and what came out, in one flat mapping each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def find(self, case: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of a case, or None where it has not been measured."""
        return next((row for row in self.rows if case.items() <= row.items()), None)

    def add(self, case: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Keep a row; a crash leaves the old file or the new one."""
        self.rows.append({**case, **measured})
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
        os.replace(partial, self.path)
