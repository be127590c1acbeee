"""Safetensors files of this package with other content and right checksums, as a forger would write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_ops.files import digests, open_tensors, read_header, replacing, write_tensors


def content_of(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file."""
    with open_tensors(path) as file:
        return read_header(file), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Write the file again after ``change(header, tensors)``."""
    header, tensors = content_of(path)
    change(header, tensors)
    with replacing(path) as (file,):
        write_tensors(file, tensors, {**header, "checksums": digests(tensors)})
