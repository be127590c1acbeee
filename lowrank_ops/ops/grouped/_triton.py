"""Runs ``lowrank_linear_grouped`` with Triton kernels: what they support, when ``auto`` prefers them, their launches.

Tiles are those of the tuned table, or what ``lowrank_linear`` would take for a layer of the group's largest rank, also
from its own table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _tuning
from ..linear import Problem as Layer
from ..linear import _triton as single
from ..linear._triton import _SUM_BLOCK, _has_pdl, _Launch, _on_device
from ..linear._triton_config import DecodeConfig, PrefillConfig, arch, cheapest_prefill, decode_config, prefill_config

if TYPE_CHECKING:
    from . import Problem

MAX_MEMBERS = 3

_Bound = Callable[..., list[Tensor]]


def supports_decode(problem: Problem, config: DecodeConfig | None = None) -> str | None:
    """None if the decode kernels run ``problem`` (with ``config`` or their own choice), else the reason."""
    if (reason := _unsupported(problem)) is not None:
        return reason
    return single.supports_decode(_as_layer(problem), config or decode_tiles(problem))


def supports_prefill(problem: Problem, config: PrefillConfig | None = None) -> str | None:
    """None if the prefill kernel runs ``problem`` (with ``config`` or its own choice), else the reason."""
    return _unsupported(problem) or single.supports_prefill(_by_member(problem), config)


def prefill_tiles(problem: Problem) -> PrefillConfig | None:
    """None if no configuration covers the largest rank."""
    tuned = _tuning.configured(tuned_entry(problem), "triton.prefill", PrefillConfig)
    return tuned if tuned and tuned.rank >= max(problem.ranks) else prefill_config(_by_member(problem))


def decode_tiles(problem: Problem) -> DecodeConfig:
    """By default of at most 64 tokens: with 128, grouped_down_kernel spills on sm_100."""
    if tuned := _tuning.configured(tuned_entry(problem), "triton.decode", DecodeConfig):
        return tuned
    layer = _as_layer(problem)
    return decode_config(layer._replace(tokens=min(layer.tokens, 64)))


def prefers_decode(problem: Problem) -> bool:
    """Below the break-even rank, as for ``lowrank_linear``: three launches or fewer for the whole group."""
    return _preferred("triton.decode", problem)


def prefers_prefill(problem: Problem) -> bool:
    """Likewise, unless t of a shared down would be recomputed per member, or members would cost less one by one.

    All members are computed in tiles of the largest rank.
    """
    if problem.shared or not _preferred("triton.prefill", problem):
        return False
    return tuned_entry(problem) is not None or _prefill_saves(problem)


def table_shape(problem: Problem) -> dict[str, Any]:
    """The problem under the keys of the tuned table."""
    return {
        "tokens": problem.tokens,
        "in_features": problem.in_features,
        "rank": max(problem.ranks),
        "out_features": sum(problem.out_features),
        "members": len(problem.ranks),
        "shared": problem.shared,
        "dtype": str(problem.dtype).removeprefix("torch."),
    }


def tuned_entry(problem: Problem) -> dict[str, Any] | None:
    """The tuned table's entry for the nearest group, of any backend, if there is a table."""
    return _tuning.nearest("lowrank_linear_grouped", arch(problem.device.capability), table_shape(problem))


def run_decode(problem: Problem, *tensors: Any, config: DecodeConfig | None = None) -> list[Tensor]:
    """Run ``problem`` on x, downs, ups and biases with the decode kernels."""
    return _bind(problem, _decode_launcher, config)(*tensors)


def run_prefill(problem: Problem, *tensors: Any, config: PrefillConfig | None = None) -> list[Tensor]:
    """Run ``problem`` on x, downs, ups and biases with the prefill kernel."""
    return _bind(problem, _prefill_launcher, config)(*tensors)


def bind_decode(problem: Problem) -> _Bound:
    """:func:`run_decode` for ``problem`` as a function of x, downs, ups and biases."""
    return _bind(problem, _decode_launcher)


def bind_prefill(problem: Problem) -> _Bound:
    """:func:`run_prefill` for ``problem`` as a function of x, downs, ups and biases."""
    return _bind(problem, _prefill_launcher)


def _as_layer(problem: Problem) -> Layer:
    """A single layer with the tiles of the group: its largest rank, and all of its outputs."""
    rank = max(problem.ranks)
    return Layer(
        problem.tokens,
        problem.in_features,
        rank,
        sum(problem.out_features),
        problem.dtype,
        problem.x_stride,
        (problem.in_features, 1),
        (rank, 1),
        problem.aligned and _unit(problem) == 8,
        any(problem.biases),
        "none",
        problem.device,
    )


def _by_member(problem: Problem) -> Layer:
    """A single layer with as many work items: the tokens of each member, one after another."""
    layer = _as_layer(problem)
    members = len(problem.ranks)
    return layer._replace(tokens=problem.tokens * members, out_features=max(problem.out_features))


def _prefill_saves(problem: Problem) -> bool:
    """Whether the group, whose outputs count as their average, costs at most 5% more than its members one by one."""
    layer, sizes = _as_layer(problem), [*zip(problem.ranks, problem.out_features, strict=True)]
    average = layer._replace(tokens=problem.tokens * len(sizes), out_features=layer.out_features // len(sizes))
    members = (layer._replace(rank=rank, out_features=out) for rank, out in sizes)
    return cheapest_prefill(average)[0] <= 1.05 * sum(cheapest_prefill(member)[0] for member in members)


def _unit(problem: Problem) -> int:
    """The unit in which sizes are passed to the kernels: 8 elements if 16-byte loads are legal, else 1."""
    sizes = (problem.in_features, problem.x_stride, *problem.ranks, *problem.out_features)
    return 8 if problem.aligned and all(size % 8 == 0 for size in sizes) else 1


def _unsupported(problem: Problem) -> str | None:
    if len(problem.ranks) > MAX_MEMBERS:
        return f"takes up to {MAX_MEMBERS} members; these are {len(problem.ranks)}"
    if not problem.contiguous:
        return "takes contiguous factors and biases"
    if not min(*problem.ranks, *problem.out_features):
        return "takes no empty factors"
    return None


def _preferred(name: str, problem: Problem) -> bool:
    if problem.device.type != "cuda" or _unit(problem) != 8 or len(problem.ranks) < 2:
        return False
    if (entry := tuned_entry(problem)) is not None:
        return bool(entry["impl"] == name)
    pairs = zip(problem.ranks, problem.out_features, strict=True)
    factors = sum(rank * (problem.in_features + out) for rank, out in pairs)
    return factors < problem.in_features * sum(problem.out_features)


def _bind(problem: Problem, make_launcher: Callable[..., Callable[..., None]], *config: Any) -> _Bound:
    out_features, device = problem.out_features, problem.device
    launcher = make_launcher(problem, *config) if problem.tokens else None

    def run(x: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
        ys = [x.new_empty((*x.shape[:-1], out)) for out in out_features]
        if launcher is not None:
            _on_device(device, functools.partial(launcher, x, downs, ups, biases, ys))
        return ys

    return run


def _padded(values: Sequence[Any], filler: Any) -> tuple[Any, ...]:
    """As many values as the kernels have places for members."""
    return (*values, *[filler] * (MAX_MEMBERS - len(values)))


def _sizes(sizes: Sequence[int], unit: int) -> tuple[int, ...]:
    return _padded([size // unit for size in sizes], 0)


def _bits(problem: Problem) -> int:
    return sum(has_bias << i for i, has_bias in enumerate(problem.biases))


def _pointers(
    x: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor | None], ys: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], ...]:
    """Each padded; x is a pointer that no kernel loads a bias from."""
    present = [x if bias is None else bias for bias in biases]
    return _padded(downs, downs[0]), _padded(ups, ups[0]), _padded(present, x), _padded(ys, ys[0])


@functools.lru_cache(maxsize=4096)
def _decode_launcher(problem: Problem, config: DecodeConfig | None = None) -> Callable[..., None]:
    """A function of (x, downs, ups, biases, ys) that launches the decode kernels for ``problem``."""
    from ..linear._triton_decode_kernels import sum_kernel
    from . import _triton_kernels as kernels

    config = config or decode_tiles(problem)
    unit, pdl = _unit(problem), _has_pdl(problem.device)
    reuse = problem.aligned
    options = {"launch_pdl": True} if pdl else {}
    tokens, slices, dtype = problem.tokens, config.slices, problem.dtype
    down_ranks = problem.ranks[:1] if problem.shared else problem.ranks
    columns = sum(down_ranks)
    token_blocks = -(-tokens // config.block_m)
    launch_down = _Launch(
        kernels.grouped_down_kernel,
        (sum(-(-rank // config.block_r) for rank in down_ranks), slices, token_blocks),
        (
            tokens,
            problem.in_features // unit,
            *_sizes(down_ranks, unit),
            problem.x_stride // unit,
            -(-problem.in_features // (config.block_k * slices)),
        ),
        (unit, config.block_m, config.block_r, config.block_k, pdl),
        reuse,
        num_warps=config.down_warps,
        num_stages=config.down_stages,
    )
    launch_up = _Launch(
        kernels.grouped_up_kernel,
        (sum(-(-out // config.block_n) for out in problem.out_features), token_blocks, 1),
        (tokens, *_sizes(problem.ranks, unit), *_sizes(problem.out_features, unit), _bits(problem)),
        (
            *(unit, problem.shared, slices if config.fold else 1),
            *(config.block_m, config.block_n, config.slab, config.rest, pdl),
        ),
        reuse,
        num_warps=config.up_warps,
        num_stages=config.up_stages,
        **options,
    )
    summed = slices > 1 and not config.fold
    launch_sum = _Launch(
        sum_kernel,
        (-(-tokens * columns // _SUM_BLOCK), 1, 1),
        (tokens * columns // unit,),
        (unit, slices, _SUM_BLOCK, pdl),
        reuse,
        num_warps=4,
        **options,
    )

    def launch(x: Tensor, downs: Any, ups: Any, biases: Any, ys: Any) -> None:
        downs, ups, biases, ys = _pointers(x, downs, ups, biases, ys)
        partial_dtype = dtype if slices == 1 else torch.float32
        t = torch.empty((slices, tokens, columns), dtype=partial_dtype, device=x.device)
        launch_down(x, *downs, t)
        if summed:
            partial, t = t, torch.empty((tokens, columns), dtype=dtype, device=x.device)
            launch_sum(partial, t)
        launch_up(t, *ups, *biases, *ys)

    return launch


@functools.lru_cache(maxsize=4096)
def _prefill_launcher(problem: Problem, config: PrefillConfig | None = None) -> Callable[..., None]:
    """A function of (x, downs, ups, biases, ys) that launches the prefill kernel for ``problem``."""
    from ._triton_kernels import grouped_prefill_kernel

    config = config or prefill_tiles(problem)
    assert config is not None, "supports_prefill refuses a problem without a configuration"
    unit, members = _unit(problem), len(problem.ranks)
    work = -(-problem.tokens // config.block_m) * members * config.parts
    pieces, stages = (config.piece_0, config.piece_1), (config.stages_k, config.stages_n)
    run = _Launch(
        grouped_prefill_kernel,
        (min(work, problem.device.sm_count or 1), 1, 1),
        (
            problem.tokens,
            problem.in_features // unit,
            *_sizes(problem.ranks, unit),
            *_sizes(problem.out_features, unit),
            problem.x_stride // unit,
            config.parts,
            _bits(problem),
        ),
        (unit, members, config.block_m, config.block_n, config.block_k, *pieces, *stages),
        problem.aligned,
        num_warps=config.warps,
        num_stages=config.stages_k,
    )

    def launch(x: Tensor, downs: Any, ups: Any, biases: Any, ys: Any) -> None:
        downs, ups, biases, ys = _pointers(x, downs, ups, biases, ys)
        run(x, *downs, *ups, *biases, *ys)

    return launch
