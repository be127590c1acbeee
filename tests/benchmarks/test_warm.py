"""What is compiled ahead of a GPU session, and that what fails or dies there is told."""

import multiprocessing
import os
import time
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
        if self.end == "hangs":
            time.sleep(600)
        if self.end == "breaks":
            warm.usable = lambda device: False  # from now on, in this process
            raise RuntimeError("illegal access")
        with open(self.path, "w") as file:
            file.write(f"{os.getpid()} {os.environ['TORCHINDUCTOR_COMPILE_THREADS']}")


def test_everything_is_compiled_in_other_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    items = [File(str(tmp_path / "a")), File(str(tmp_path / "b"), "fails"), File(str(tmp_path / "c"))]
    assert warm.run(items, "cpu", 2) == [(items[1], "ValueError: not for cpu")]
    for name in "ac":
        process, threads = (tmp_path / name).read_text().split()
        assert int(process) != os.getpid() and threads == "1"


def test_a_process_that_dies_costs_what_it_was_compiling(tmp_path):
    items = [File(str(tmp_path / "a"), "dies"), File(str(tmp_path / "b"), "dies"), File(str(tmp_path / "c"))]
    assert warm.run(items, "cpu", 1) == [(item, "its process died") for item in items[:2]]
    assert (tmp_path / "c").exists()


def test_a_process_to_which_the_device_gives_nothing_more_is_replaced(tmp_path):
    """After an access where there is nothing a GPU refuses a process all that follows."""
    items = [File(str(tmp_path / "a"), "breaks"), File(str(tmp_path / "b")), File(str(tmp_path / "c"))]
    assert warm.run(items, "cpu", 1) == [(items[0], "RuntimeError: illegal access")]
    processes = {(tmp_path / name).read_text().split()[0] for name in "bc"}
    assert len(processes) == 1


def test_what_hangs_is_left_when_the_time_is_over(tmp_path):
    items = [File(str(tmp_path / "a"), "hangs"), File(str(tmp_path / "b"), "hangs"), File(str(tmp_path / "c"))]
    begin = time.monotonic()
    assert warm.run(items, "cpu", 2, 2.0) == [(item, "not done in time") for item in items]
    assert time.monotonic() - begin < 30
    assert not any(process.is_alive() for process in multiprocessing.active_children() if not process.join(10))


def test_what_was_chosen_by_timing_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    for name in ("kernel.best_config", "kernel.py"):
        (tmp_path / "ab" / name).touch()
    warm.forget_choices()
    assert [path.name for path in tmp_path.rglob("kernel*")] == ["kernel.py"]


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
    """Kernels first, then the longest; each is compiled by the arm that the suite would call, here one that tells."""
    work = warm.work(H200)
    kinds = [type(item) for item in work]
    assert kinds == sorted(kinds, key=[warm.Kernel, warm.Model, warm.Layer].index)
    assert kinds.count(warm.Model) == 4 * 3 and kinds.count(warm.Layer) == 56
    called = []
    monkeypatch.setattr(
        warm.bench_model, "_ready", lambda *facts: lambda x: called.append((facts[2], facts[3], len(x)))
    )
    monkeypatch.setattr(warm.bench_lowrank_linear, "two_linears_compiled", lambda *tensors: called.append(len(tensors)))
    work[kinds.index(warm.Model)].compile(META)
    work[-1].compile(META)
    assert called == [("dense", "compiled", 1), 5]
    for item in work:
        if not isinstance(item, warm.Kernel):
            assert targets.graded("model" if isinstance(item, warm.Model) else "lowrank_linear", item.shape)
