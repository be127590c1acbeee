"""``lowrank-ops doctor``: implementations, plans of kernels, and broken installations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_ops import cli, ops
from lowrank_ops.cli import doctor, verify
from tests.cli.commands import refused

pytestmark = pytest.mark.usefixtures("project")


def test_json_covers_every_op_and_every_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["environment"]["torch"] == torch.__version__ and document["held"] is True
    assert document["devices"][0]["device"] == "cpu"
    calls = {call["op"]: call for call in document["calls"] if call["device"] == "cpu"}
    assert set(calls) == set(ops._EXPLAIN)
    table = {impl.name for impl in ops._linear.TABLE}
    assert {row["implementation"] for row in calls["lowrank_linear"]["implementations"]} == table
    for call in document["calls"]:
        assert sum(row["chosen"] for row in call["implementations"]) == 1
        assert all((row["reason"] is None) is row["can_run"] for row in call["implementations"])


def test_text_has_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch        {torch.__version__}" in out and "Every op can run" in out
    blocks = [block for block in out.split("\n\n") if " on cpu\n" in block]
    assert len(blocks) == 7 and all("runs" in block for block in blocks)
    assert "triton" in out and "cannot run: " in out


def test_kernel_is_shown_with_its_tiles(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "reference: runs\ncuda: can run, by covariance_sm90: tile 128x128, 3 stages\ntriton: cannot run: no"
    monkeypatch.setattr(ops, "explain", lambda op, *tensors, **options: lines)
    assert cli.main(["doctor"]) == 0
    assert "  cuda       can run, by covariance_sm90: tile 128x128, 3 stages\n" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["calls"][0]["implementations"]
    assert [row["plan"] for row in rows] == [None, "covariance_sm90: tile 128x128, 3 stages", None]
    assert rows[1]["can_run"] and not rows[1]["chosen"]


@pytest.mark.parametrize("json_flag", [[], ["--json"]], ids=["text", "json"])
def test_op_without_implementation_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, json_flag: list[str]
) -> None:
    monkeypatch.setattr(ops, "explain", lambda op, *tensors, **options: "reference: cannot run: out of luck")
    assert cli.main(["doctor", *json_flag]) == 1
    out = capsys.readouterr().out
    assert "out of luck" in out
    assert ("No implementation can run" in out) is (not json_flag)


def test_plans_are_printed_for_an_arch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor._native, "plan", lambda op, arch, dtype, **shape: f"{op} {arch} {shape['tokens']} planned"
    )
    assert cli.main(["doctor", "--plan", "sm_90"]) == 0
    assert "lowrank_linear sm_90 64 planned" in capsys.readouterr().out
    assert cli.main(["doctor", "--plan", "sm_90", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    ops = {"covariance_update_", "conv_covariance_update_", "lowrank_linear", "lowrank_linear_grouped"}
    assert {plan["op"] for plan in plans} == ops


def test_plans_are_refused_with_a_reason(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'sm_90'" in refused(capsys, 2, "doctor", "--plan", "h100")

    def missing(*arguments: object, **options: object) -> str:
        raise RuntimeError("No plan without the native library")

    monkeypatch.setattr(doctor._native, "plan", missing)
    assert "No plan without" in refused(capsys, 1, "doctor", "--plan", "sm_90")


def test_verify_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds none here" in refused(capsys, 1, "doctor", "--verify")
    refused(capsys, 2, "doctor", "--verify", "--plan", "sm_90")
    for sizes in ("TOKENS", "LAYERS", "MATRICES"):
        monkeypatch.setattr(verify, sizes, getattr(verify, sizes)[-1:])
    with pytest.raises(verify.Failure, match="No kernel can run on a CPU"):
        verify.verify(torch.device("cpu"), "a CPU")


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    assert doctor._gpu(1) == {
        "device": "cuda:1", "name": "A GPU", "capability": "9.0", "sm_count": 132, "memory_gib": 80.0,
    }  # fmt: skip


def test_broken_package_is_reported(project: Path) -> None:
    sys.path.insert(0, str(project))
    assert doctor._version_of("cli_broken") == "cannot be imported: no weights"
    assert doctor._version_of("a_package_that_is_not_there") == "not installed"
