"""Imports torchvision for its tests, also where its wheel does not match the build of torch."""

from __future__ import annotations

import contextlib
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import torch


def import_torchvision() -> list[torch.library.Library]:
    """Import torchvision if it is installed; the libraries that this returns must be kept.

    A wheel for CUDA has a library that a CPU build of torch cannot load, and importing it fails because its ops
    do not exist. They get names here: models need none of them, and calling one is an error.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return []
    with contextlib.suppress(RuntimeError):
        importlib.import_module("torchvision")
        return []
    library = torch.library.Library("torchvision", "FRAGMENT")
    sources = "\n".join(path.read_text(encoding="utf-8") for path in Path(spec.origin).parent.rglob("*.py"))
    for name in set(re.findall(r"(?:torchvision::|ops\.torchvision\.)(\w+)", sources)):
        with contextlib.suppress(RuntimeError):  # already there
            library.define(f"{name}(Tensor x) -> Tensor")
    importlib.import_module("torchvision")
    return [library]


_kept = import_torchvision()
