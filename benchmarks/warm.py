"""Compile on all cores at once what a GPU session will ask for one by one: ``python -m benchmarks.warm``.

Triton and torch.compile keep what they compile on disk; here many processes fill these caches with the kernels from
which the tuner begins and with the compiled arms of the graded shapes. What fails here is told and left: it fails again
where it counts. It makes a session shorter and changes no figure: what torch.compile chose by timing is forgotten.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowrank_ops.ops._backend import Device, device_facts

from . import bench_lowrank_linear, bench_model, models, targets
from .rows import told
from .suite import META, usable
from .tune import shapes_of
from .tuners import TUNERS, Candidate, Shape


class Kernel(NamedTuple):
    """A configuration of a Triton kernel, and the shapes with which it is legal."""

    op: str
    candidate: Candidate
    shapes: list[Shape]

    def compile(self, device: torch.device) -> None:
        tuner = TUNERS[self.op]
        for shape in self.shapes:
            case = tuner.case(shape)
            tensors = case.make(device, 0)
            assert case.pose is not None
            with torch.inference_mode():
                tuner.arm(self.candidate, case.pose(tensors)[1])(*tensors)


class Layer(NamedTuple):
    """A shape of two linear layers, compiled."""

    shape: Shape

    def compile(self, device: torch.device) -> None:
        case = next(case for case in bench_lowrank_linear.cases(targets.DTYPE) if case.shape == self.shape)
        with torch.inference_mode():
            bench_lowrank_linear.two_linears_compiled(*case.make(device, 0))


class Model(NamedTuple):
    """A variant of a whole model, compiled."""

    shape: Shape
    variant: str

    def compile(self, device: torch.device) -> None:
        cases = bench_model.cases(models.SIZES, bench_model.BATCHES, targets.DTYPE)
        case = next(case for case in cases if case.shape == self.shape)
        arm = next(arm for arm in case.arms if arm.name == self.variant)
        with torch.no_grad():
            arm.run(*case.make(device, 0))


Work = Kernel | Layer | Model


def work(device: Device) -> list[Work]:
    """What there is to compile: first what the tuner waits for, then the longest."""
    listed = [
        case
        for case in bench_model.cases(models.SIZES, bench_model.BATCHES, targets.DTYPE)
        if case.shape["mode"] == "compiled" and targets.graded(case.op, case.shape)
    ]
    wholes = [Model(dict(case.shape), arm.name) for case in listed for arm in case.arms]
    layers = [
        Layer(dict(case.shape))
        for case in bench_lowrank_linear.cases(targets.DTYPE)
        if targets.graded(case.op, case.shape)
    ]
    return [*kernels(device), *wholes, *layers]


def kernels(device: Device) -> list[Kernel]:
    """Every Triton configuration from which the tuner begins at a graded shape."""
    found: dict[tuple[str, Candidate], list[Shape]] = {}
    for tuner in TUNERS.values():
        for shape in shapes_of(tuner, only_graded=True):
            case = tuner.case(shape)
            assert case.pose is not None
            problem = case.pose(case.make(META, 0))[1]._replace(device=device)  # type: ignore[attr-defined]
            for candidate in tuner.starts(problem):
                if candidate.impl.startswith("triton") and tuner.refuse(candidate, problem) is None:
                    found.setdefault((tuner.op, candidate), []).append(shape)
    return [Kernel(op, candidate, shapes) for (op, candidate), shapes in found.items()]


def run(items: Sequence[Work], device: str, workers: int, seconds: float = math.inf) -> list[tuple[Work, str]]:
    """Compile everything in ``workers`` processes; what failed, and why, or was not done after ``seconds``.

    A process that died, or to which the device gives nothing more, is replaced: it costs what it was compiling, and
    not the rest.
    """
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # of each process; there are as many of them as cores
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    end = time.perf_counter() + seconds
    waiting, failed = list(items), []
    idle: list[_Worker] = []
    busy: dict[Any, tuple[_Worker, Work]] = {}
    while waiting or busy:
        while waiting and len(busy) < workers:
            worker, item = idle.pop() if idle else _Worker(context, device), waiting.pop(0)
            busy[worker.link] = (worker, item)
            with contextlib.suppress(OSError):  # of one that has died, which is seen below
                worker.link.send(item)
        left = end - time.perf_counter()
        ready = wait(list(busy), None if math.isinf(left) else max(left, 0.0))
        for link in ready:
            worker, item = busy.pop(link)
            try:
                reason, sound = worker.link.recv()
            except (EOFError, OSError):
                reason, sound = "its process died", False
            if reason is not None:
                failed.append((item, reason))
            if sound:
                idle.append(worker)
            else:
                worker.end()
        if left <= 0:
            failed += [(item, "not done in time") for item in [*(item for _, item in busy.values()), *waiting]]
            break
    for worker in [*idle, *(worker for worker, _ in busy.values())]:
        worker.end()
    return failed


class _Worker:
    """A process that compiles what it is sent."""

    def __init__(self, context: SpawnContext, device: str) -> None:
        self.link, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, device), daemon=True)
        self.process.start()
        other.close()  # so that the link ends where the process does

    def end(self) -> None:
        self.process.kill()  # whatever it is at: a kernel that hangs listens to nothing else
        self.link.close()


def _serve(link: Connection, device: str) -> None:
    while True:
        link.send(_compile(link.recv(), torch.device(device)))


def _compile(item: Work, device: torch.device) -> tuple[str | None, bool]:
    """None, or why it failed, and whether the process can go on; memory goes back, as the tests run beside it."""
    try:
        item.compile(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what it launched may fail as well
    except Exception as failure:
        return told(failure), usable(device)
    return None, usable(device)


def forget_choices() -> None:
    """Have torch.compile choose anew between a kernel's variants, which it timed here among many processes."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for choice in Path(cache_dir()).rglob("*.best_config"):
        choice.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 2 where there is no GPU, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes (default: cores)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which what is not done is left")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("warm: needs a CUDA device, as kernels are compiled for the one they run on.", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    items = work(device_facts(torch.device("cuda")))
    failed = run(items, "cuda", arguments.workers, arguments.seconds - (time.perf_counter() - begin))
    forget_choices()
    for item, reason in failed:
        print(f"{item}: {reason}", file=sys.stderr)
    print(f"compiled {len(items) - len(failed)} of {len(items)} in {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
