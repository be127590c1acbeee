"""Chooses the tiles of the Triton kernels of ``lowrank_linear``: from the tuned table, or by a cost model.

Does not import Triton. The compile gate compiles every configuration listed here for its arch and requires that it does
not spill. The cost model counts bytes, CTAs and SMs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from .. import _tuning
from .._triton_device import arch_of

if TYPE_CHECKING:
    from . import Problem

MAX_DECODE_TOKENS = 256
MAX_PREFILL_RANK = 256

_BARRIER_BYTES = 1024  # mbarriers that the compiler adds to the tiles, from above
_MAX_FOLDED_BYTES = 32768  # partial sums that each CTA of up_kernel may load; above, a separate sum_kernel is cheaper
_MIN_OCCUPANCY = 0.75  # fraction of the SMs with a CTA: enough loads in flight for the full memory bandwidth


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles of the decode kernels."""

    block_m: int  # tokens
    block_r: int  # ranks per CTA of down_kernel
    block_k: int  # contraction tile of down_kernel
    down_warps: int
    down_stages: int
    block_n: int  # out_features per CTA of up_kernel
    slab: int  # ranks of up that up_kernel loads before it waits for t
    rest: int  # contraction tile of up_kernel after the slab
    up_warps: int
    up_stages: int
    slices: int = 1  # split-K of down_kernel
    fold: bool = False  # up_kernel sums the slices; otherwise sum_kernel does

    def shared_memory(self) -> int:
        """An upper bound of the bytes of shared memory per CTA, over the three kernels."""
        down = self.down_stages * (self.block_m + self.block_r) * self.block_k * 2
        t_bytes = 4 * self.slices if self.fold else 2
        up = self.up_stages * self.rest * (self.block_n * 2 + self.block_m * t_bytes)
        slab = self.slab * (self.block_n * 2 + self.block_m * (4 if self.fold else 2))
        return max(down, up + slab) + _BARRIER_BYTES


@dataclass(frozen=True)
class PrefillConfig:
    """Tiles of the prefill kernel."""

    block_m: int
    block_n: int
    block_k: int
    piece_0: int  # the rank is covered by two tiles of piece_0 and piece_1 ranks
    piece_1: int
    warps: int
    stages_k: int
    stages_n: int
    parts: int = 1  # splits of out_features

    @property
    def rank(self) -> int:
        """The largest rank it covers."""
        return self.piece_0 + self.piece_1

    def shared_memory(self) -> int:
        """An upper bound of the bytes of shared memory per CTA."""
        first = self.stages_k * (self.block_m + self.rank) * self.block_k
        # tcgen05 kernels rearrange y through a part of its size while tiles of up are in flight.
        second = self.stages_n * self.block_n * self.rank + self.block_m * self.block_n // 4
        return 2 * (max(first, second) + self.block_m * max(self.rank, self.block_n)) + _BARRIER_BYTES


Config = TypeVar("Config", DecodeConfig, PrefillConfig)

# Weights are the M operand of the MMA and tokens the N operand. Up to 16 tokens, N = 16 wastes nothing; above, M = 64
# weight rows fill one wgmma.
_DECODE_16 = DecodeConfig(16, 16, 256, 4, 4, 32, 256, 128, 8, 2)
_DECODE_16_WIDE = replace(_DECODE_16, slab=512)
_DECODE_64 = DecodeConfig(64, 64, 128, 4, 3, 64, 128, 64, 4, 3)
_DECODE_128 = DecodeConfig(128, 64, 64, 4, 4, 64, 128, 64, 4, 3)
_SLICES = (1, 4, 8)
_FOLDED_SLICES = 4

# With two stages in the second loop, nothing would load while a tile is multiplied and stored.
_PREFILL_LARGE_TILES = (
    PrefillConfig(128, 128, 64, 64, 0, 8, 3, 3),
    PrefillConfig(128, 128, 64, 128, 0, 8, 3, 3),
    PrefillConfig(128, 64, 64, 128, 16, 8, 3, 3),
    PrefillConfig(128, 64, 64, 128, 64, 8, 3, 3),
)
_PREFILL_SMALL_TILES = (
    PrefillConfig(64, 64, 64, 64, 0, 4, 3, 3),
    PrefillConfig(64, 64, 64, 128, 16, 8, 3, 3),
    PrefillConfig(64, 64, 64, 256, 0, 8, 3, 3),
)
_PREFILL_256 = PrefillConfig(128, 64, 64, 256, 0, 8, 3, 3)  # spills with 8-bit factors, which registers cast
_PREFILL: dict[str, tuple[PrefillConfig, ...]] = {
    "sm80": (
        PrefillConfig(64, 64, 64, 64, 0, 8, 3, 2),
        PrefillConfig(64, 64, 32, 128, 0, 8, 3, 2),
        PrefillConfig(64, 64, 32, 128, 16, 8, 3, 2),
        PrefillConfig(64, 64, 32, 256, 0, 8, 3, 2),
    ),
    "sm90": (
        *_PREFILL_LARGE_TILES,
        _PREFILL_256,
        *_PREFILL_SMALL_TILES,
    ),
    "sm100": (*_PREFILL_LARGE_TILES, *_PREFILL_SMALL_TILES),
}
_SMALL_TILE_RATE = 0.7  # MMA throughput of a 64-row tile relative to a 128-row tile


def arch(capability: tuple[int, int]) -> str:
    """The arch whose configurations and tuned table a device uses, such as ``"sm90"``."""
    return f"sm{arch_of(capability)}"


def vector(problem: Problem) -> int:
    """The unit in which sizes and strides are passed to the kernels: 8 elements if 16-byte loads are legal, else 1."""
    whole = problem.in_features % 8 == problem.rank % 8 == problem.out_features % 8 == 0
    return 8 if problem.aligned and whole else 1


@functools.lru_cache(maxsize=4096)
def decode_config(problem: Problem) -> DecodeConfig:
    """The configuration of the decode kernels for ``problem``."""
    return _tuning.configured(tuned_entry(problem), "triton.decode", DecodeConfig) or _heuristic_decode(problem)


@functools.lru_cache(maxsize=4096)
def prefill_config(problem: Problem) -> PrefillConfig | None:
    """The configuration of the prefill kernel for ``problem``; None if none covers its rank."""
    tuned = _tuning.configured(tuned_entry(problem), "triton.prefill", PrefillConfig)
    return tuned if tuned is not None and tuned.rank >= problem.rank else cheapest_prefill(problem)[1]


def cheapest_prefill(problem: Problem) -> tuple[float, PrefillConfig | None]:
    """The lowest cost of a configuration that covers the rank, in MACs of one SM, and that configuration."""
    candidates = [
        _cheapest_parts(config, problem)
        for config in _PREFILL[arch(problem.device.capability)]
        if config.rank >= problem.rank and _fits(config, problem) and not (problem.scaled and config == _PREFILL_256)
    ]
    return min(candidates, key=lambda candidate: candidate[0], default=(math.inf, None))


def shipped_decode(name: str) -> list[DecodeConfig]:
    """All that :func:`decode_config` may return on the arch ``name``; the tuner starts from these."""
    few = [
        replace(base, slices=slices, fold=fold)
        for base in (_DECODE_16, _DECODE_16_WIDE)
        for slices, fold in ((_FOLDED_SLICES, True), *((slices, False) for slices in _SLICES))
    ]
    many = [replace(base, slices=slices) for base in (_DECODE_64, _DECODE_128) for slices in _SLICES]
    return few + many + _tuned_configs("triton.decode", DecodeConfig, name)


def shipped_prefill(name: str) -> list[PrefillConfig]:
    """All that :func:`prefill_config` may return on the arch ``name``, up to ``parts``; the tuner starts from these."""
    return [*_PREFILL[name], *_tuned_configs("triton.prefill", PrefillConfig, name)]


def tuned_implementation(problem: Problem) -> str | None:
    """The name of the fastest implementation for the nearest problem of the tuned table, if there is a table."""
    entry = tuned_entry(problem)
    return None if entry is None else entry["impl"]


def _heuristic_decode(problem: Problem) -> DecodeConfig:
    if problem.tokens <= 16:
        base = _DECODE_16 if problem.rank <= _DECODE_16.slab else _DECODE_16_WIDE
    else:
        base = _DECODE_64 if problem.tokens <= _DECODE_64.block_m else _DECODE_128
    fold = base.block_m == 16 and problem.tokens * problem.rank * _FOLDED_SLICES * 4 <= _MAX_FOLDED_BYTES
    k_blocks = -(-problem.in_features // base.block_k)
    programs = -(-problem.rank // base.block_r) * -(-problem.tokens // base.block_m)
    for slices in _SLICES:
        enough = programs * slices >= _MIN_OCCUPANCY * problem.device.sm_count
        if enough or k_blocks <= 2 * slices or (fold and slices == _FOLDED_SLICES):
            break
    config = replace(base, slices=slices, fold=fold and slices > 1)
    return config if _fits(config, problem) else replace(config, fold=False)


def _cheapest_parts(config: PrefillConfig, problem: Problem) -> tuple[float, PrefillConfig]:
    """The cost of ``config`` in MACs of one SM, with the number of parts that minimizes it."""
    tiles = -(-problem.tokens // config.block_m)
    columns = -(-problem.out_features // config.block_n)
    rate = 1.0 if config.block_m == 128 else _SMALL_TILE_RATE
    best, lowest = config, float("inf")
    parts = 1
    while parts <= columns:
        waves = -(-tiles * parts // max(problem.device.sm_count, 1))
        width = problem.in_features + -(-columns // parts) * config.block_n
        cost = waves * config.block_m * config.rank * width / rate
        if cost < lowest:
            best, lowest = replace(config, parts=parts), cost
        parts *= 2
    return lowest, best


def _fits(config: DecodeConfig | PrefillConfig, problem: Problem) -> bool:
    return problem.device.type != "cuda" or config.shared_memory() <= problem.device.shared_memory


def refusal(config: DecodeConfig | PrefillConfig | None, problem: Problem) -> str | None:
    """Why ``config`` cannot run ``problem`` on its device, or None."""
    if config is None:
        return f"no configuration for rank {problem.rank} fits {problem.device.shared_memory} bytes of shared memory"
    if not _fits(config, problem):
        return f"needs {config.shared_memory()} bytes of shared memory; the device has {problem.device.shared_memory}"
    return None


def table_shape(problem: Problem) -> dict[str, Any]:
    """The problem under the keys of the tuned table. ``dtype`` has the formats of 8-bit factors behind that of x."""
    return {
        "tokens": problem.tokens,
        "in_features": problem.in_features,
        "rank": problem.rank,
        "out_features": problem.out_features,
        "dtype": " ".join(
            str(form[0] if isinstance(form, tuple) else form).removeprefix("torch.")
            for form in (problem.dtype, problem.down_format, problem.up_format)
            if form is not None
        ),
    }


def tuned_entry(problem: Problem) -> dict[str, Any] | None:
    """The tuned table's entry for the nearest problem, of any backend, if there is a table."""
    return _tuning.nearest("lowrank_linear", arch(problem.device.capability), table_shape(problem))


def _tuned_configs(impl: str, kind: type[Config], name: str) -> list[Config]:
    found = (_tuning.configured(entry, impl, kind) for entry in _tuning.load("lowrank_linear", name))
    return [config for config in found if config is not None]
