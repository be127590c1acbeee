"""Configurations of the Triton kernels of the low-rank product: which exist, which are legal, which to take.

Needs no Triton. Every configuration here is compiled by the gate for its arch and found free of spills; the estimates
behind the choice count bytes, blocks and multiprocessors, and a tuned table replaces them where one ships.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .. import _tuning

if TYPE_CHECKING:
    from . import Problem

MAX_DECODE_TOKENS = 256
MAX_PREFILL_RANK = 256

_FOLD_BYTES = 32768  # partial sums that each block of up_kernel may read; past that adding them first is faster
_BUSY = 0.75  # of the multiprocessors: enough blocks to draw the memory's full bandwidth


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles of the decode kernels."""

    block_m: int  # tokens
    block_r: int  # rows of down in a block of down_kernel
    block_k: int
    down_warps: int
    down_stages: int
    block_n: int  # rows of up in a block of up_kernel
    slab: int  # ranks that up_kernel fetches before t is there
    rest: int  # ranks at a time after the slab
    up_warps: int
    up_stages: int
    slices: int = 1  # of in_features
    fold: bool = False  # up_kernel adds the slices, not sum_kernel

    def shared_memory(self) -> int:
        """Bytes that the greediest of the kernels asks for, from above."""
        down = self.down_stages * (self.block_m + self.block_r) * self.block_k * 2
        t_bytes = 4 * self.slices if self.fold else 2
        up = self.up_stages * self.rest * (self.block_n * 2 + self.block_m * t_bytes)
        slab = self.slab * (self.block_n * 2 + self.block_m * (4 if self.fold else 2))
        return max(down, up + slab)


@dataclass(frozen=True)
class PrefillConfig:
    """Tiles of the prefill kernel."""

    block_m: int
    block_n: int
    block_k: int
    piece_0: int  # ranks
    piece_1: int
    warps: int
    stages_k: int
    stages_n: int
    parts: int = 1  # of out_features

    @property
    def rank(self) -> int:
        """The largest rank it covers."""
        return self.piece_0 + self.piece_1

    def shared_memory(self) -> int:
        """Bytes that the kernel asks for, from above."""
        first = self.stages_k * (self.block_m + self.rank) * self.block_k
        second = self.stages_n * self.block_n * self.rank
        return 2 * (max(first, second) + self.block_m * max(self.rank, self.block_n))


Config = TypeVar("Config", DecodeConfig, PrefillConfig)

# Up to 16 tokens a tensor-core product of 16 rows wastes nothing; past that 64 rows of weights fill a warpgroup's.
_FEW = DecodeConfig(16, 16, 256, 4, 4, 32, 256, 128, 8, 2)
_FEW_WIDE = DecodeConfig(16, 16, 256, 4, 4, 32, 512, 128, 8, 2)
_MORE = DecodeConfig(64, 64, 128, 4, 3, 64, 128, 64, 4, 3)
_MOST = DecodeConfig(128, 64, 64, 4, 4, 64, 128, 64, 4, 3)
_SLICES = (1, 4, 8)
_FOLDED_SLICES = 4

_PREFILL: dict[str, tuple[PrefillConfig, ...]] = {
    "sm80": (
        PrefillConfig(64, 64, 64, 64, 0, 8, 3, 2),
        PrefillConfig(64, 64, 32, 128, 0, 8, 3, 2),
        PrefillConfig(64, 64, 32, 128, 16, 8, 3, 2),
        PrefillConfig(64, 64, 32, 256, 0, 8, 3, 2),
    ),
    "sm90": (
        PrefillConfig(128, 128, 64, 64, 0, 8, 3, 2),
        PrefillConfig(128, 128, 64, 128, 0, 8, 3, 2),
        PrefillConfig(128, 64, 64, 128, 16, 8, 3, 2),
        PrefillConfig(128, 64, 64, 128, 64, 8, 3, 2),
        PrefillConfig(128, 64, 64, 256, 0, 8, 3, 2),
        PrefillConfig(64, 64, 64, 64, 0, 4, 3, 2),
        PrefillConfig(64, 64, 64, 128, 16, 8, 3, 2),
        PrefillConfig(64, 64, 64, 256, 0, 8, 3, 2),
    ),
    "sm100": (
        PrefillConfig(128, 128, 64, 64, 0, 8, 3, 2),
        PrefillConfig(128, 128, 64, 128, 0, 8, 3, 2),
        PrefillConfig(128, 64, 64, 128, 16, 8, 3, 2),
        PrefillConfig(128, 64, 64, 128, 64, 8, 3, 2),
        PrefillConfig(64, 64, 64, 64, 0, 8, 3, 2),
        PrefillConfig(64, 64, 64, 128, 16, 8, 3, 2),
        PrefillConfig(64, 64, 64, 256, 0, 8, 3, 2),
    ),
}
_SMALL_TILE = 0.7  # of the arithmetic rate of a tile of 128 rows that one of 64 reaches


def arch(capability: tuple[int, int]) -> str:
    """The configurations' arch: that of the newest tensor-core instruction which Triton uses on the device."""
    if torch.version.hip is None and capability[0] in (9, 10):
        return f"sm{capability[0]}0"
    return "sm80"


def vector(problem: Problem) -> int:
    """Elements in the unit of sizes and strides: 8 where 16-byte loads are possible, else 1."""
    whole = problem.in_features % 8 == problem.rank % 8 == problem.out_features % 8 == 0
    return 8 if problem.aligned and whole else 1


@functools.lru_cache(maxsize=4096)
def decode_config(problem: Problem) -> DecodeConfig:
    """The configuration that runs ``problem`` with few tokens."""
    return _tuning.configured(tuned_entry(problem), "triton.decode", DecodeConfig) or _heuristic_decode(problem)


@functools.lru_cache(maxsize=4096)
def prefill_config(problem: Problem) -> PrefillConfig | None:
    """The configuration that runs ``problem`` with many tokens; None where none covers its rank."""
    tuned = _tuning.configured(tuned_entry(problem), "triton.prefill", PrefillConfig)
    if tuned is not None and tuned.rank >= problem.rank:
        return tuned
    candidates = [
        _cheapest_parts(config, problem)
        for config in _PREFILL[arch(problem.device.capability)]
        if config.rank >= problem.rank and _fits(config, problem)
    ]
    return min(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


def shipped_decode(name: str) -> list[DecodeConfig]:
    """The decode configurations that may run on the arch ``name``."""
    heuristic = [
        replace(base, slices=slices, fold=fold)
        for base in (_FEW, _FEW_WIDE, _MORE, _MOST)
        for slices, fold in ((_FOLDED_SLICES, True), *((slices, False) for slices in _SLICES))
        if base.block_m == _FEW.block_m or not fold
    ]
    return heuristic + _tuned_configs("triton.decode", DecodeConfig, name)


def shipped_prefill(name: str) -> list[PrefillConfig]:
    """The prefill configurations that may run on the arch ``name``."""
    return [*_PREFILL[name], *_tuned_configs("triton.prefill", PrefillConfig, name)]


def tuned_implementation(problem: Problem) -> str | None:
    """The name of the implementation that was fastest for the nearest problem in the tuned table, if one ships."""
    entry = tuned_entry(problem)
    return None if entry is None else entry["impl"]


def _heuristic_decode(problem: Problem) -> DecodeConfig:
    if problem.tokens <= 16:
        base = _FEW if problem.rank <= _FEW.slab else _FEW_WIDE
    else:
        base = _MORE if problem.tokens <= _MORE.block_m else _MOST
    fold = base.block_m == 16 and problem.tokens * problem.rank * _FOLDED_SLICES * 4 <= _FOLD_BYTES
    blocks = -(-problem.in_features // base.block_k)
    programs = -(-problem.rank // base.block_r) * -(-problem.tokens // base.block_m)
    for slices in _SLICES:
        enough = programs * slices >= _BUSY * problem.device.multiprocessors
        if enough or blocks <= 2 * slices or (fold and slices == _FOLDED_SLICES):
            break
    config = replace(base, slices=slices, fold=fold and slices > 1)
    return config if _fits(config, problem) else replace(config, fold=False)


def _cheapest_parts(config: PrefillConfig, problem: Problem) -> tuple[float, PrefillConfig]:
    """The cost of ``config``, in multiply-adds of one multiprocessor, with the number of parts that makes it least."""
    tiles = -(-problem.tokens // config.block_m)
    columns = -(-problem.out_features // config.block_n)
    rate = 1.0 if config.block_m == 128 else _SMALL_TILE
    best, least = config, float("inf")
    parts = 1
    while parts <= columns:
        rounds = -(-tiles * parts // max(problem.device.multiprocessors, 1))
        width = problem.in_features + -(-columns // parts) * config.block_n
        cost = rounds * config.block_m * config.rank * width / rate
        if cost < least:
            best, least = replace(config, parts=parts), cost
        parts *= 2
    return least, best


def _fits(config: DecodeConfig | PrefillConfig, problem: Problem) -> bool:
    return problem.device.type != "cuda" or config.shared_memory() <= problem.device.shared_memory


def refusal(config: DecodeConfig | PrefillConfig | None, problem: Problem) -> str | None:
    """Why ``config`` cannot run ``problem`` on its device, or None."""
    if config is None:
        return f"no configuration for rank {problem.rank} fits {problem.device.shared_memory} bytes of shared memory"
    if not _fits(config, problem):
        return f"needs {config.shared_memory()} bytes of shared memory; the device has {problem.device.shared_memory}"
    return None


def tuned_entry(problem: Problem) -> dict[str, Any] | None:
    """What was fastest for the nearest problem in the tuned table, by any backend, if one ships."""
    shape = {
        "tokens": problem.tokens,
        "in_features": problem.in_features,
        "rank": problem.rank,
        "out_features": problem.out_features,
        "dtype": str(problem.dtype).removeprefix("torch."),
    }
    return _tuning.nearest("lowrank_linear", arch(problem.device.capability), shape)


def _tuned_configs(impl: str, kind: type[Config], name: str) -> list[Config]:
    found = (_tuning.configured(entry, impl, kind) for entry in _tuning.load("lowrank_linear", name))
    return [config for config in found if config is not None]
