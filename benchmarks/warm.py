"""Compile on all cores at once what a GPU session will ask for one by one: ``python -m benchmarks.warm``.

Triton and torch.compile keep what they compile on disk; here many processes fill these caches with the kernels from
which the tuner begins and with the compiled arms of the graded shapes. Nothing is timed, and what fails here is told
and left: it fails again where it counts. It makes a session shorter and changes no figure of a kernel.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lowrank_ops.ops._backend import Device, device_facts

from . import bench_lowrank_linear, bench_model, models, targets
from .rows import told
from .suite import META
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
    """What there is to compile, longest first."""
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
    return [*wholes, *kernels(device), *layers]


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


def _compile(item: Work, device: str) -> str | None:
    """None, or why it failed."""
    try:
        item.compile(torch.device(device))
    except Exception as failure:
        return told(failure)
    return None


def run(items: Sequence[Work], device: str, workers: int) -> list[tuple[Work, str]]:
    """Compile everything in ``workers`` processes; what failed, and why."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # of each process; there are as many of them as cores
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    failed = []
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for item, future in [(item, pool.submit(_compile, item, device)) for item in items]:
            try:
                reason = future.result()
            except concurrent.futures.BrokenExecutor as failure:  # one of the processes died, and the pool with it
                reason = told(failure)
            if reason is not None:
                failed.append((item, reason))
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 2 where there is no GPU, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes (default: cores)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("warm: needs a CUDA device, as kernels are compiled for the one they run on.", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    items = work(device_facts(torch.device("cuda")))
    failed = run(items, "cuda", arguments.workers)
    for item, reason in failed:
        print(f"{item}: {reason}", file=sys.stderr)
    print(f"compiled {len(items) - len(failed)} of {len(items)} in {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
