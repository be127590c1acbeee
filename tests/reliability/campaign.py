"""The size of a campaign, and the figures of the long ones.

``make test`` runs every campaign in a few seconds. ``make reliability`` sets LOWRANK_OPS_CAMPAIGN=long, runs them all
at full size, and writes what they counted to figures.json; ``figures.py`` makes the tables of ``docs/reliability.md``.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import torch

LONG = os.environ.get("LOWRANK_OPS_CAMPAIGN") == "long"
FIGURES = Path(__file__).with_name("figures.json")


def sized(short: int, long: int) -> int:
    return long if LONG else short


def examples(short: int, long: int) -> hypothesis.settings:
    """Random examples, ``long`` or ``short`` of them; the short run always draws the same ones."""
    return hypothesis.settings(
        max_examples=sized(short, long),
        deadline=None,
        derandomize=not LONG,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@contextmanager
def figures(name: str) -> Iterator[dict[str, Any]]:
    """Counts of one campaign; kept only if the campaign was long and passed."""
    counts: dict[str, Any] = {}
    started = time.perf_counter()
    yield counts
    if LONG:
        known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        counts |= {"seconds": round(time.perf_counter() - started), "torch": torch.__version__}
        known[name] = counts | {"python": platform.python_version()}
        FIGURES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
