from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PROJECT = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    print("building the model")
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()

def batches():
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(5, 16, generator=generator)
    for _ in range(3):
        yield torch.randn(32, 5, generator=generator) @ basis

ready = build()
number = 3
tensor = lambda: torch.zeros(4, 16)
nan = lambda: [torch.full((4, 16), float("nan"))]
wordy = lambda: ["a text"]
empty = lambda: []

def broken():
    raise RuntimeError("the disk\\nis gone")

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, attention_mask):
        return self.layer(x)

def masked_batches():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    return [{"x": torch.randn(2, 3, 8), "attention_mask": mask}]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the user's modules."""
    (tmp_path / "cli_project.py").write_text(PROJECT)
    (tmp_path / "cli_broken.py").write_text("raise OSError('no weights')")
    (tmp_path / "cli_needs.py").write_text("import a_package_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield tmp_path
    torch.set_num_threads(threads)
    for name in ("cli_project", "cli_broken", "cli_needs"):
        sys.modules.pop(name, None)
