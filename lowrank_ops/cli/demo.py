"""``lowrank-ops demo``: the whole way on a model and images that come with the package."""

from __future__ import annotations

import argparse
from typing import Any

from .command import add_command

_DEMO = """\
Compress a trained Vision Transformer on real images that come with the package and compare it with the dense one."""

_DEMO_EXAMPLE = """\
example:
  lowrank-ops demo"""


def add(commands: Any, chosen: bool) -> None:
    """Declare the command; its arguments only where it was ``chosen``.

    The demo's module reads images and draws, and no other command needs it.
    """
    demo = add_command(
        commands, "demo", "see it work, on a model and images that come with the package", _DEMO, _DEMO_EXAMPLE, run
    )
    if chosen:
        from ..demo import run as demo_run

        demo_run.add_arguments(demo)


def run(options: argparse.Namespace) -> int:
    """Run the demo, which prints by itself.

    Returns:
        The exit code.
    """
    from ..demo import run as demo_run

    return int(demo_run.run(options))
