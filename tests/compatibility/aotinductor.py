"""A package of AOTInductor runs without lowrank_ops: ``make compatibility`` runs this file, which compiles C++."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import lowrank_ops as lro

RUN = """
import sys
sys.modules["lowrank_ops"] = None  # an import of it fails
import torch
x, y = torch.load(sys.argv[2])
torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(x), y)
"""


@pytest.mark.filterwarnings("ignore")
def test_package_runs_without_lowrank_ops(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(lro.LowRankLinear(64, 32, 8), nn.GELU(), lro.LowRankLinear(32, 16, 8, bias=False)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(5, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    for rows in (5, 9):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model(x))
    torch.save((x, model(x)), tmp_path / "data.pt")
    command = [sys.executable, "-c", RUN, path, str(tmp_path / "data.pt")]
    subprocess.run(command, cwd=tmp_path, check=True)
