"""The CUDA ops on the simulated device (``csrc/tests/simulator``), which takes CPU tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIBRARY_NAME = "liblowrank_ops_simulated.so"


class Machine(NamedTuple):
    """A device of few SMs, on which small problems need splits and clusters."""

    capability: int
    sm_count: int
    shared_memory: int  # bytes per CTA
    clusters: tuple[int, ...] = ()  # the planner's estimate

    def sms(self, count: int) -> Machine:
        """The same with another number of SMs."""
        return self._replace(sm_count=count)


SM80 = Machine(80, 4, 166912)
SM86 = Machine(86, 4, 101376)
SM90 = Machine(90, 8, 232448)

# When asynchronous work happens, and the scheduler's seed.
ORDERS = [("early", 1), ("late", 2), ("copies_first", 3), ("random", 4), ("random", 5)]


class Simulated:
    """The ops, each with the plan that it took."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self.ops = torch.ops.lowrank_ops_simulated
        self.configure(SM90)

    def configure(self, machine: Machine, timing: str = "random", seed: int = 0) -> None:
        """Timing of asynchronous work: ``"early"``, ``"late"``, ``"copies_first"`` (and MMAs late) or ``"random"``.

        The seed decides which thread is next.
        """
        self.machine = machine
        self.ops.configure(*machine[:3], seed, timing)

    def covariance_update_(
        self,
        second_moment: Tensor,
        total: Tensor,
        x: Tensor,
        allow_tf32: bool = False,
        choice: tuple[str, int, int] = ("", 0, 0),
    ) -> str:
        """Returns the plan, such as ``"covariance_sm90: tile 128x128, ..."``."""
        rows = x.stride(0) * x.element_size() % 16 if len(x) > 1 else 0
        source = "matrix" if rows or x.data_ptr() % 16 else "aligned_matrix"
        reason, plan = self.ops._plan_covariance(
            *x.shape, 1, str(x.dtype)[6:], source, allow_tf32, *self.machine, *choice
        )
        assert not reason, reason
        self.ops._cuda_covariance_update_(second_moment, total, x, allow_tf32, *choice)
        return str(plan)

    def conv_covariance_update_(
        self,
        second_moment: Tensor,
        total: Tensor,
        x: Tensor,
        *geometry: Any,
        allow_tf32: bool = False,
        choice: tuple[str, int, int] = ("", 0, 0),
    ) -> None:
        self.ops._cuda_conv_covariance_update_(second_moment, total, x, *geometry, allow_tf32, *choice)

    def lowrank_linear(
        self,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
        choice: tuple[str, int, int] = ("", 0, 0),
    ) -> tuple[Tensor, str]:
        """Returns y and the plan."""
        on_16_bytes = all(m.data_ptr() % 16 == 0 and m.stride(0) * 2 % 16 == 0 for m in (x, down, up))
        reason, plan = self.ops._plan_lowrank_linear(
            *x.shape, *([size] for size in up.T.shape), False, str(x.dtype)[6:], on_16_bytes, *self.machine, *choice
        )
        assert not reason, reason
        return self.ops._cuda_lowrank_linear(x, down, up, bias, activation, *choice), str(plan)

    def lowrank_linear_grouped(
        self, x: Tensor, downs: list[Tensor], ups: list[Tensor], biases: list[Tensor | None], choice: Any = ("", 0, 0)
    ) -> tuple[list[Tensor], str]:
        """Returns the members' outputs and the plan."""
        on_16_bytes = all(m.data_ptr() % 16 == 0 and m.stride(0) * 2 % 16 == 0 for m in (x, *downs, *ups))
        ranks, outs = ([up.shape[axis] for up in ups] for axis in (1, 0))
        reason, plan = self.ops._plan_lowrank_linear(
            *x.shape, ranks, outs, len(downs) < len(ups), str(x.dtype)[6:], on_16_bytes, *self.machine, *choice
        )
        assert not reason, reason
        return self.ops._cuda_lowrank_linear_grouped(x, downs, ups, biases, *choice), str(plan)
