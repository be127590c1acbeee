"""``lowrank-ops demo``: the whole pipeline on a trained model and real images from the repository."""

from __future__ import annotations

import argparse
from typing import Any

from .command import add_command

_DEMO = """\
Compress a trained Vision Transformer on real images and compare it with the dense one. The model and the images are in
the folder demo of the repository, which is found when the command runs in a checkout; wheels do not contain them."""

_DEMO_EXAMPLE = """\
examples:
  lowrank-ops demo
  an installed wheel, outside of the repository
    lowrank-ops demo --data path/to/repository/demo"""


def add(commands: Any, chosen: bool) -> None:
    """Add the command, and its arguments if it was ``chosen``: the other commands do not import the demo."""
    demo = add_command(commands, "demo", "compress a trained model on real images", _DEMO, _DEMO_EXAMPLE, run)
    if chosen:
        from ..demo import run as demo_run

        demo_run.add_arguments(demo)


def run(options: argparse.Namespace) -> int:
    """Run the demo, which prints its own output, and return the exit code."""
    from ..demo import run as demo_run

    return int(demo_run.run(options))
