"""What the search of ``tune`` needs to know of each op: its shapes, its configurations, and how to run one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from lowrank_ops.ops import covariance as _covariance
from lowrank_ops.ops import grouped as _grouped
from lowrank_ops.ops import linear as _linear
from lowrank_ops.ops._backend import Device, choose
from lowrank_ops.ops._native import Choice
from lowrank_ops.ops.covariance import _cuda as _covariance_cuda
from lowrank_ops.ops.covariance import _triton as _covariance_triton
from lowrank_ops.ops.covariance import _triton_conv as _conv_triton
from lowrank_ops.ops.grouped import _cuda as _grouped_cuda
from lowrank_ops.ops.grouped import _triton as _grouped_triton
from lowrank_ops.ops.linear import _cuda as _linear_cuda
from lowrank_ops.ops.linear import _triton as _linear_triton
from lowrank_ops.ops.linear import _triton_config as _linear_config
from lowrank_ops.ops.linear import reference as _linear_reference

from . import bench_covariance, bench_grouped, bench_lowrank_linear
from .harness import META, Case, Tensors
from .shapes import DTYPES

Shape = dict[str, Any]
Fields = Mapping[str, Mapping[str, Sequence[Any]]]  # implementation -> field of its configuration -> values
SPLITS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32)


class Candidate(NamedTuple):
    """An implementation with a configuration; None for one that has none."""

    impl: str
    config: Any

    def kernel(self) -> str:
        """What is left out if it ends the process: a CUDA kernel as named, or one configuration of a Triton kernel."""
        return f"{self.impl} {getattr(self.config, 'kernel', self.config)}"

    def to_dict(self) -> dict[str, Any]:
        return {"impl": self.impl, "config": {} if self.config is None else dataclasses.asdict(self.config)}


class Tuner(ABC):
    """One op. ``options`` are the values that the fields of a configuration may take."""

    op: ClassVar[str]  # as in the table's name
    table: ClassVar[Sequence[Any]]  # the op's implementations
    options: ClassVar[Fields]

    @abstractmethod
    def cases(self, dtype: str, quick: bool) -> Iterable[Case]:
        """The benchmark's cases of a dtype."""

    @abstractmethod
    def problem(self, tensors: Tensors, case: Case) -> Any:
        """What ``choose`` decides by."""

    @abstractmethod
    def shape(self, problem: Any, case: Case) -> Shape:
        """A case under the keys of the table."""

    @abstractmethod
    def arch(self, device: Device) -> str:
        """The arch in the table's name."""

    @abstractmethod
    def candidates(self, problem: Any) -> list[Candidate]:
        """Candidates to begin from."""

    @abstractmethod
    def refuse(self, candidate: Candidate, problem: Any) -> str | None:
        """Why the kernels cannot run ``problem`` with this candidate, or None."""

    @abstractmethod
    def runner(self, candidate: Candidate, problem: Any) -> Callable[..., Any]:
        """A function of a case's tensors."""

    def shapes(self, quick: bool = False) -> list[tuple[Shape, Case]]:
        """The rows of the table, and the benchmark's case of each."""
        listed = []
        for dtype in ("bf16",) if quick else DTYPES:
            for case in self.cases(dtype, quick):
                problem = self.problem(case.make(META, 0), case)
                listed.append((self.shape(problem, case), case))
        return listed

    def starts(self, problem: Any) -> list[Candidate]:
        """The candidates to begin from, those of what would run now first."""
        current = choose(self.table, problem, "auto").name
        listed = dict.fromkeys(self.candidates(problem))
        return sorted(listed, key=lambda candidate: candidate.impl != current)

    def neighbors(self, candidate: Candidate) -> list[Candidate]:
        """All candidates that differ in one field."""
        return [
            Candidate(candidate.impl, dataclasses.replace(candidate.config, **{field: value}))
            for field, values in self.options.get(candidate.impl, {}).items()
            for value in values
            if value != getattr(candidate.config, field)
        ]


class CovarianceTuner(Tuner):
    """``covariance_update_``."""

    op = "covariance_update"
    table = _covariance.TABLE
    options: ClassVar[Fields] = {
        "triton": {
            "block_d": (64, 128),
            "block_t": (32, 64, 128),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5),
            "group": (4, 8, 16),
            "split": SPLITS,
        },
        "cuda": {"kernel": ("covariance_sm80", "covariance_sm90", "covariance_sm90_wide"), "splits": SPLITS},
    }

    def cases(self, dtype: str, quick: bool) -> Iterable[Case]:
        return (case for case in bench_covariance.cases(dtype, quick) if case.op == "covariance_update_")

    def problem(self, tensors: Tensors, case: Case) -> Any:
        return _covariance.describe(tensors[0], tensors[2])

    def shape(self, problem: Any, case: Case) -> Shape:
        return dict(case.shape)

    def arch(self, device: Device) -> str:
        return f"sm{_covariance_triton.arch_of(device)}"

    def candidates(self, problem: Any) -> list[Candidate]:
        arch = _covariance_triton.arch_of(problem.device)
        shipped = [config for (of, _), config in _covariance_triton.HEURISTIC.items() if of == arch]
        choices = [_covariance_cuda.choice_for(problem), Choice(), *map(Choice, self.options["cuda"]["kernel"])]
        return [
            *(Candidate("triton", config) for config in (_covariance_triton.config_for(problem), *shipped)),
            *(Candidate("cuda", choice) for choice in choices),
        ]

    def refuse(self, candidate: Candidate, problem: Any) -> str | None:
        if candidate.impl == "cuda":
            return _covariance_cuda.refuse(problem, candidate.config) or None
        return _covariance_triton.unsupported_config(candidate.config, problem.dtype, problem.device)

    def runner(self, candidate: Candidate, problem: Any) -> Callable[..., Any]:
        if candidate.impl == "cuda":
            return lambda state, total, x: _covariance_cuda.run(problem, state, total, x, candidate.config)
        plan = _covariance_triton.plan_with(problem, candidate.config)
        return lambda state, total, x: _covariance_triton.launch(plan, state, total, x, problem)


class ConvCovarianceTuner(CovarianceTuner):
    """``conv_covariance_update_``."""

    op = "conv_covariance_update"
    table = _covariance.CONV_TABLE
    options: ClassVar[Fields] = {
        "triton": {**CovarianceTuner.options["triton"], "block_d": (32, 64, 128), "block_t": (16, 32, 64, 128)},
        "cuda": {"splits": SPLITS},
    }

    def cases(self, dtype: str, quick: bool) -> Iterable[Case]:
        return (case for case in bench_covariance.cases(dtype, quick) if case.op == "conv_covariance_update_")

    def problem(self, tensors: Tensors, case: Case) -> Any:
        square = ((case.shape[key],) * 2 for key in ("kernel", "stride", "padding"))
        return _covariance.describe_conv(*tensors, *square, (1, 1))

    def shape(self, problem: Any, case: Case) -> Shape:
        return dict(_conv_triton.table_shape(problem))

    def candidates(self, problem: Any) -> list[Candidate]:
        arch = _covariance_triton.arch_of(problem.device)
        shipped = [config for (of, _), config in _conv_triton.HEURISTIC.items() if of == arch]
        return [
            *(Candidate("triton", config) for config in (_conv_triton.config_for(problem), *shipped)),
            *(Candidate("cuda", choice) for choice in (_covariance_cuda.conv_choice_for(problem), Choice())),
        ]

    def refuse(self, candidate: Candidate, problem: Any) -> str | None:
        if candidate.impl == "cuda":
            return _covariance_cuda.refuse_conv(problem, candidate.config) or None
        return super().refuse(candidate, problem)

    def runner(self, candidate: Candidate, problem: Any) -> Callable[..., Any]:
        if candidate.impl == "cuda":
            geometry = (problem.kernel_size, problem.stride, problem.padding, problem.dilation)
            return lambda state, total, x: _covariance_cuda.run_conv(
                problem, state, total, x, *map(list, geometry), choice=candidate.config
            )
        plan = _conv_triton.plan_with(problem, candidate.config)
        return lambda state, total, x: _conv_triton.launch(plan, state, total, x)


class LowRankLinearTuner(Tuner):
    """``lowrank_linear``, also with 8-bit factors."""

    op = "lowrank_linear"
    table = _linear.TABLE
    options: ClassVar[Fields] = {
        "triton.decode": {
            "block_m": (16, 32, 64, 128),
            "block_r": (16, 32, 64),
            "block_k": (64, 128, 256),
            "down_warps": (4, 8),
            "down_stages": (2, 3, 4, 5),
            "block_n": (16, 32, 64, 128),
            "slab": (64, 128, 256, 512),
            "rest": (32, 64, 128),
            "up_warps": (4, 8),
            "up_stages": (2, 3, 4),
            "slices": (1, 2, 4, 8),
            "fold": (False, True),
        },
        "triton.prefill": {
            "block_m": (64, 128),
            "block_n": (64, 128),
            "block_k": (32, 64, 128),
            "warps": (4, 8),
            "stages_k": (2, 3, 4),
            "stages_n": (2, 3),
            "parts": (1, 2, 4, 8),
        },
        "cuda.decode": {"kernel": ("decode_sm80", "decode_sm90"), "splits": (0, 1, 2, 4, 8, 16)},
        "cuda.prefill": {"splits": (0, 1, 2, 4, 8), "token_tile": (0, 128, 192, 256)},
    }

    def cases(self, dtype: str, quick: bool) -> Iterable[Case]:
        return () if dtype == "fp32" else bench_lowrank_linear.cases(dtype, quick)

    def problem(self, tensors: Tensors, case: Case) -> Any:
        return _linear.describe(*tensors[:4], "none", *(tensors[4:6] if "factors" in case.shape else ()))

    def shape(self, problem: Any, case: Case) -> Shape:
        return _linear_config.table_shape(problem)

    def arch(self, device: Device) -> str:
        return _linear_config.arch(device.capability)

    def candidates(self, problem: Any) -> list[Candidate]:
        name = self.arch(problem.device)
        own = {"triton.decode": _linear_config.decode_config, "triton.prefill": _linear_config.prefill_config}
        shipped = {
            "triton.decode": _linear_config.shipped_decode(name),
            "triton.prefill": _linear_config.shipped_prefill(name),
        }
        listed = [Candidate(impl, config_of(problem)) for impl, config_of in own.items()]
        listed += [Candidate(impl, config) for impl, configs in shipped.items() for config in configs]
        listed = [candidate for candidate in listed if candidate.config]
        for impl in ("cuda.decode", "cuda.prefill"):  # all of them, as none has to be compiled
            fields, values = zip(*self.options[impl].items(), strict=True)
            choices = [Choice(**dict(zip(fields, chosen, strict=True))) for chosen in itertools.product(*values)]
            listed += [Candidate(impl, choice) for choice in (_linear_cuda.choice_for(problem), Choice(), *choices)]
        return [*listed, Candidate("two_products", None)]

    def refuse(self, candidate: Candidate, problem: Any) -> str | None:
        config = candidate.config
        if candidate.impl == "triton.decode":
            if config.fold and config.slices == 1:
                return "one slice leaves nothing to add"
            return _linear_triton.supports_decode(problem, config)
        if candidate.impl == "triton.prefill":
            return _linear_triton.supports_prefill(problem, config)
        if config is None:
            return None
        return _linear_cuda.refuse(problem, config, candidate.impl.removeprefix("cuda.")) or None

    def runner(self, candidate: Candidate, problem: Any) -> Callable[..., Any]:
        if candidate.impl.startswith("cuda"):
            return lambda *tensors: _linear_cuda.run(problem, *tensors[:4], "none", candidate.config)

        def scales(tensors: Tensors) -> dict[str, torch.Tensor]:
            return {"down_scale": tensors[4], "up_scale": tensors[5]} if problem.scaled else {}

        if candidate.impl == "two_products":
            return lambda *tensors: _linear_reference.two_products(*tensors[:4], "none", **scales(tensors))
        run = _linear_triton.run_decode if candidate.impl == "triton.decode" else _linear_triton.run_prefill
        return lambda *tensors: run(problem, *tensors[:4], "none", candidate.config, **scales(tensors))


class GroupedTuner(LowRankLinearTuner):
    """``lowrank_linear_grouped``."""

    op = "lowrank_linear_grouped"
    table = _grouped.TABLE
    options: ClassVar[Fields] = {
        "triton.decode": LowRankLinearTuner.options["triton.decode"] | {"block_m": (16, 32, 64)},
        "triton.prefill": LowRankLinearTuner.options["triton.prefill"],
        "cuda": {
            "kernel": ("decode_sm80", "decode_sm90"),
            "splits": (0, 1, 2, 4, 8, 16),
            "token_tile": (0, 128, 192, 256),
        },
    }

    def cases(self, dtype: str, quick: bool) -> Iterable[Case]:
        return () if dtype == "fp32" else bench_grouped.cases(dtype, quick)

    def problem(self, tensors: Tensors, case: Case) -> Any:
        return _grouped.describe(*bench_grouped.arguments(tensors))

    def shape(self, problem: Any, case: Case) -> Shape:
        return _grouped_triton.table_shape(problem)

    def candidates(self, problem: Any) -> list[Candidate]:
        name = self.arch(problem.device)
        decode = [_grouped_triton.decode_tiles(problem), *_linear_config.shipped_decode(name)]
        prefill = [_grouped_triton.prefill_tiles(problem), *_linear_config.shipped_prefill(name)]
        choices = [_grouped_cuda.choice_for(problem), Choice(), *map(Choice, self.options["cuda"]["kernel"])]
        listed = [Candidate("triton.decode", config) for config in decode if config.block_m <= 64]
        listed += [Candidate("triton.prefill", config) for config in prefill if config]
        return [*listed, *(Candidate("cuda", choice) for choice in choices), Candidate("members", None)]

    def refuse(self, candidate: Candidate, problem: Any) -> str | None:
        config = candidate.config
        if candidate.impl == "cuda":
            return _grouped_cuda.refuse(problem, config) or None
        if candidate.impl == "triton.decode":
            if config.fold and config.slices == 1:
                return "one slice leaves nothing to add"
            return _grouped_triton.supports_decode(problem, config)
        return _grouped_triton.supports_prefill(problem, config) if candidate.impl == "triton.prefill" else None

    def runner(self, candidate: Candidate, problem: Any) -> Callable[..., Any]:
        if candidate.impl == "members":
            return lambda *tensors: bench_grouped.one_by_one(tensors[0], bench_grouped.members_of(tensors))
        runs = {
            "cuda": functools.partial(_grouped_cuda.run, choice=candidate.config),
            "triton.decode": functools.partial(_grouped_triton.run_decode, config=candidate.config),
            "triton.prefill": functools.partial(_grouped_triton.run_prefill, config=candidate.config),
        }
        return lambda *tensors: runs[candidate.impl](problem, *bench_grouped.arguments(tensors))


H200 = Device("cuda", 0, (9, 0), 132, 232448)  # for the dry run
TUNERS: dict[str, Tuner] = {
    tuner.op: tuner for tuner in (CovarianceTuner(), ConvCovarianceTuner(), LowRankLinearTuner(), GroupedTuner())
}


def on_device(tuner: Tuner, case: Case, device: Device) -> Any:
    """The problem of a case on a device that need not be here."""
    return tuner.problem(case.make(torch.device("meta"), 0), case)._replace(device=device)
