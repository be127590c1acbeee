"""What is compiled ahead of a GPU session, and that what fails or dies there is told."""

import os
from typing import NamedTuple

import pytest
import torch

from benchmarks import targets, tune, tuners, warm
from benchmarks.suite import H200, META


class File(NamedTuple):
    """Stands for something to compile: a file that is written in another process."""

    path: str
    end: str = "well"

    def compile(self, device):
        if self.end == "fails":
            raise ValueError(f"not for {device}")
        if self.end == "dies":
            os._exit(1)
        with open(self.path, "w") as file:
            file.write(f"{os.getpid()} {os.environ['TORCHINDUCTOR_COMPILE_THREADS']}")


def test_everything_is_compiled_in_other_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    items = [File(str(tmp_path / "a")), File(str(tmp_path / "b"), "fails"), File(str(tmp_path / "c"))]
    assert warm.run(items, "cpu", 2) == [(items[1], "ValueError: not for cpu")]
    for name in "ac":
        process, threads = (tmp_path / name).read_text().split()
        assert int(process) != os.getpid() and threads == "1"


def test_a_process_that_dies_is_told(tmp_path):
    items = [File(str(tmp_path / "a"), "dies")]
    ((item, reason),) = warm.run(items, "cpu", 1)
    assert item is items[0] and reason.startswith("BrokenProcessPool")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_needs_a_gpu(capsys):
    assert warm.main([]) == 2 and "needs a CUDA device" in capsys.readouterr().err


def test_every_kernel_from_which_the_tuner_begins_is_there():
    found = {(item.op, item.candidate): item.shapes for item in warm.kernels(H200)}
    assert {op for op, _ in found} == {"covariance_update", "lowrank_linear"}
    for op in ("covariance_update", "lowrank_linear"):
        tuner = tuners.TUNERS[op]
        shapes = tune.shapes_of(tuner, only_graded=True)
        assert shapes and all(shape["dtype"] in ("bf16", "bfloat16") for shape in shapes)
        for shape in shapes:
            case = tuner.case(shape)
            problem = case.pose(case.make(META, 0))[1]._replace(device=H200)
            for start in tuner.starts(problem):
                legal = start.impl.startswith("triton") and tuner.refuse(start, problem) is None
                assert legal == (shape in found.get((op, start), ()))


def test_what_the_targets_speak_of_is_there_and_finds_its_case(monkeypatch):
    """Longest first; each is compiled by the arm that the suite would call, here one that tells of it."""
    work = warm.work(H200)
    kinds = [type(item) for item in work]
    assert kinds == sorted(kinds, key=[warm.Model, warm.Kernel, warm.Layer].index)
    assert kinds.count(warm.Model) == 4 * 3 and kinds.count(warm.Layer) == 56
    called = []
    monkeypatch.setattr(
        warm.bench_model, "_ready", lambda *facts: lambda x: called.append((facts[2], facts[3], len(x)))
    )
    monkeypatch.setattr(warm.bench_lowrank_linear, "two_linears_compiled", lambda *tensors: called.append(len(tensors)))
    work[0].compile(META)
    work[-1].compile(META)
    assert called == [("dense", "compiled", 1), 5]
    for item in work:
        if not isinstance(item, warm.Kernel):
            assert targets.graded("model" if isinstance(item, warm.Model) else "lowrank_linear", item.shape)
