"""What the tuner knows of each op: shapes, candidates, which of them are legal, and how each is run."""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from lowrank_ops.ops import covariance as _covariance
from lowrank_ops.ops import linear as _linear
from lowrank_ops.ops._backend import Device, choose
from lowrank_ops.ops._native import Choice
from lowrank_ops.ops.covariance import _cuda as _covariance_cuda
from lowrank_ops.ops.covariance import _triton as _covariance_triton
from lowrank_ops.ops.covariance import _triton_conv as _conv_triton
from lowrank_ops.ops.linear import _cuda as _linear_cuda
from lowrank_ops.ops.linear import _triton as _linear_triton
from lowrank_ops.ops.linear import _triton_config as _linear_config

from . import bench_covariance, bench_lowrank_linear, shapes
from .rows import Case
from .suite import META

Shape = dict[str, Any]
Options = Mapping[str, Mapping[str, Sequence[Any]]]


class Candidate(NamedTuple):
    """An implementation with a configuration; None for one that has none."""

    impl: str
    config: Any

    def to_dict(self) -> dict[str, Any]:
        return {"impl": self.impl, "config": {} if self.config is None else dataclasses.asdict(self.config)}


class Tuner(ABC):
    """What the search has to know of an op. ``options`` are the values that a configuration's fields may take."""

    op: str  # as in the table's name
    options: ClassVar[Options]  # implementation -> field -> values

    @abstractmethod
    def shapes(self) -> list[Shape]:
        """The table's rows."""

    @abstractmethod
    def case(self, shape: Shape) -> Case:
        """The benchmark's case of a shape."""

    @abstractmethod
    def arch(self, device: Device) -> str:
        """The arch in the table's name."""

    @abstractmethod
    def starts(self, problem: Any) -> list[Candidate]:
        """What would run now, first, and what else is worth beginning from."""

    @abstractmethod
    def refuse(self, candidate: Candidate, problem: Any) -> str | None:
        """None, or why the kernels would not run ``problem`` so."""

    @abstractmethod
    def arm(self, candidate: Candidate, problem: Any) -> Callable[..., Any]:
        """A function of a case's tensors."""

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
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
    options: ClassVar[Options] = {
        "triton": {
            "block_d": (64, 128),
            "block_t": (32, 64, 128),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5),
            "group": (4, 8, 16),
            "split": (0, 1, 2, 3, 4, 6, 8, 12, 16, 32),
        },
        "cuda": {
            "kernel": ("covariance_sm80", "covariance_sm90", "covariance_sm90_wide"),
            "splits": (0, 1, 2, 3, 4, 6, 8, 12, 16, 32),
        },
    }

    def shapes(self) -> list[Shape]:
        return [
            {"tokens": tokens, "features": features, "dtype": dtype}
            for dtype in ("bf16", "fp16", "fp32")
            for features in shapes.COVARIANCE_FEATURES
            for tokens in shapes.COVARIANCE_TOKENS
        ]

    def case(self, shape: Shape) -> Case:
        return bench_covariance.case(shape["tokens"], shape["features"], shape["dtype"])

    def arch(self, device: Device) -> str:
        return f"sm{_covariance_triton.arch_of(device)}"

    def starts(self, problem: Any) -> list[Candidate]:
        arch = _covariance_triton.arch_of(problem.device)
        shipped = [config for (of, _), config in _covariance_triton.HEURISTIC.items() if of == arch]
        configs = [_covariance_triton.config_for(problem), *shipped]
        kernels = self.options["cuda"]["kernel"]
        choices = [_covariance_cuda.choice_for(problem), Choice(), *(Choice(kernel) for kernel in kernels)]
        listed = [Candidate("triton", config) for config in configs] + [Candidate("cuda", choice) for choice in choices]
        return _current_first(listed, _covariance.TABLE, problem)

    def refuse(self, candidate: Candidate, problem: Any) -> str | None:
        if candidate.impl == "cuda":
            return _covariance_cuda.refuse(problem, candidate.config) or None
        reason: str | None = _covariance_triton.unsupported_config(candidate.config, problem.dtype, problem.device)
        return reason

    def arm(self, candidate: Candidate, problem: Any) -> Callable[..., Any]:
        if candidate.impl == "cuda":
            return lambda state, total, x: _covariance_cuda.run(problem, state, total, x, candidate.config)
        plan = _covariance_triton.plan_with(problem, candidate.config)
        return lambda state, total, x: _covariance_triton.launch(plan, state, total, x, problem)


class ConvCovarianceTuner(Tuner):
    """``conv_covariance_update_``."""

    op = "conv_covariance_update"
    options: ClassVar[Options] = {
        "triton": {
            "block_d": (32, 64, 128),
            "block_t": (16, 32, 64, 128),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5),
            "group": (4, 8, 16),
            "split": (0, 1, 2, 3, 4, 6, 8, 12, 16, 32),
        },
        "cuda": {"splits": (0, 1, 2, 3, 4, 6, 8, 12, 16, 32)},
    }
    convs: ClassVar[Sequence[shapes.Conv]] = shapes.CONVS

    def shapes(self) -> list[Shape]:
        return [shape for shape, _ in self._listed()]

    def case(self, shape: Shape) -> Case:
        return next(case for listed, case in self._listed() if listed == shape)

    def _listed(self) -> Iterator[tuple[Shape, Case]]:
        """Every case, under what the table calls it."""
        for dtype in ("bf16", "fp16", "fp32"):
            for case in bench_covariance.conv_cases(dtype, self.convs):
                assert case.pose is not None
                _, problem = case.pose(case.make(META, 0))
                yield _conv_triton.table_shape(problem), case

    def arch(self, device: Device) -> str:
        return f"sm{_covariance_triton.arch_of(device)}"

    def starts(self, problem: Any) -> list[Candidate]:
        arch = _covariance_triton.arch_of(problem.device)
        shipped = [config for (of, _), config in _conv_triton.HEURISTIC.items() if of == arch]
        configs = [_conv_triton.config_for(problem), *shipped]
        choices = [_covariance_cuda.conv_choice_for(problem), Choice()]
        listed = [Candidate("triton", config) for config in configs] + [Candidate("cuda", choice) for choice in choices]
        return _current_first(listed, _covariance.CONV_TABLE, problem)

    def refuse(self, candidate: Candidate, problem: Any) -> str | None:
        if candidate.impl == "cuda":
            return _covariance_cuda.refuse_conv(problem, candidate.config) or None
        reason: str | None = _covariance_triton.unsupported_config(candidate.config, problem.dtype, problem.device)
        return reason

    def arm(self, candidate: Candidate, problem: Any) -> Callable[..., Any]:
        if candidate.impl == "cuda":
            geometry = (problem.kernel_size, problem.stride, problem.padding, problem.dilation)
            return lambda state, total, x: _covariance_cuda.run_conv(
                problem, state, total, x, *map(list, geometry), choice=candidate.config
            )
        plan = _conv_triton.plan_with(problem, candidate.config)
        return lambda state, total, x: _conv_triton.launch(plan, state, total, x)


class LowRankLinearTuner(Tuner):
    """``lowrank_linear``."""

    op = "lowrank_linear"
    options: ClassVar[Options] = {
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

    def shapes(self) -> list[Shape]:
        return [
            {**layer._asdict(), "tokens": tokens, "dtype": dtype}
            for dtype in ("bfloat16", "float16")
            for layer in shapes.STORED_LAYERS
            for tokens in shapes.TOKENS
        ]

    def case(self, shape: Shape) -> Case:
        layer = shapes.Layer(shape["in_features"], shape["out_features"], shape["rank"])
        dtype = {"bfloat16": "bf16", "float16": "fp16"}[shape["dtype"]]
        return bench_lowrank_linear.case(layer, shape["tokens"], dtype)

    def arch(self, device: Device) -> str:
        name: str = _linear_config.arch(device.capability)
        return name

    def starts(self, problem: Any) -> list[Candidate]:
        name = self.arch(problem.device)
        own = {"triton.decode": _linear_config.decode_config, "triton.prefill": _linear_config.prefill_config}
        listed = [Candidate(impl, config_of(problem)) for impl, config_of in own.items()]
        listed += [Candidate("triton.decode", config) for config in _linear_config.shipped_decode(name)]
        listed += [Candidate("triton.prefill", config) for config in _linear_config.shipped_prefill(name)]
        listed = [candidate for candidate in listed if candidate.config]
        for impl in ("cuda.decode", "cuda.prefill"):  # all of them, as none is to be compiled
            fields, values = zip(*self.options[impl].items(), strict=True)
            choices = [Choice(**dict(zip(fields, chosen, strict=True))) for chosen in itertools.product(*values)]
            listed += [Candidate(impl, choice) for choice in (_linear_cuda.choice_for(problem), Choice(), *choices)]
        listed.append(Candidate("two_products", None))
        return _current_first(listed, _linear.TABLE, problem)

    def refuse(self, candidate: Candidate, problem: Any) -> str | None:
        config = candidate.config
        if candidate.impl == "triton.decode":
            if config.fold and config.slices == 1:
                return "one slice leaves nothing to add"
            reason: str | None = _linear_triton.supports_decode(problem, config)
            return reason
        if candidate.impl == "triton.prefill":
            return _linear_triton.supports_prefill(problem, config)
        if config is None:
            return None
        return _linear_cuda.refuse(problem, config, candidate.impl.removeprefix("cuda.")) or None

    def arm(self, candidate: Candidate, problem: Any) -> Callable[..., Any]:
        if candidate.impl == "two_products":
            return bench_lowrank_linear.two_linears
        if candidate.impl.startswith("cuda"):
            return lambda x, down, up, bias, weight: _linear_cuda.run(
                problem, x, down, up, bias, "none", candidate.config
            )
        run = _linear_triton.run_decode if candidate.impl == "triton.decode" else _linear_triton.run_prefill
        return lambda x, down, up, bias, weight: run(problem, x, down, up, bias, "none", candidate.config)


def _current_first(candidates: Iterable[Candidate], table: Sequence[Any], problem: Any) -> list[Candidate]:
    """Each once, with what would run now in front."""
    current = choose(table, problem, "auto").name
    return sorted(dict.fromkeys(candidates), key=lambda candidate: candidate.impl != current)


TUNERS: dict[str, Tuner] = {
    tuner.op: tuner for tuner in (CovarianceTuner(), ConvCovarianceTuner(), LowRankLinearTuner())
}
