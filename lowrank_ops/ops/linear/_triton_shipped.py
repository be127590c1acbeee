"""The compiled forms of the Triton kernels that `auto` may take, as the compile gate and the kernel table read them."""

from __future__ import annotations

from typing import Any

from .._specialization import Specialization
from ._triton_config import DecodeConfig, PrefillConfig, shipped_decode, shipped_prefill
from ._triton_decode import down_kernel, sum_kernel, up_kernel
from ._triton_prefill import prefill_kernel


def specializations(arch: int) -> list[Specialization]:
    """The forms for ``arch`` (80, 90 or 100); factors as they are stored, and transposed as in the backward."""
    pdl, name = arch >= 90, f"sm{arch}"
    listed = []
    for config in shipped_decode(name):
        widest = config.block_m == 64
        listed += [_down(config, pdl, along_k) for along_k in (True, False) if along_k or widest]
        listed += [_up(config, pdl, along_r) for along_r in (True, False) if along_r or widest]
        if config.slices > 1 and not config.fold:
            listed.append(_sum(config, pdl))
    for tiles in shipped_prefill(name):
        backward = (tiles.piece_0, tiles.piece_1) == (128, 16)
        listed += [_prefill(tiles, along) for along in (True, False) if along or backward]
    return list({entry.name: entry for entry in listed}.values())


def _down(config: DecodeConfig, pdl: bool, along_k: bool) -> Specialization:
    return _specialization(
        f"decode down {config.block_m}x{config.block_r}x{config.block_k}{_suffix(along_k)}",
        down_kernel,
        {"partial_ptr": "*fp32"},
        {
            "VECTOR": 8,
            "DOWN_ALONG_K": along_k,
            "BLOCK_M": config.block_m,
            "BLOCK_R": config.block_r,
            "BLOCK_K": config.block_k,
            "PDL": pdl,
        },
        (config.down_warps, config.down_stages),
        True if config.block_r >= 64 else "HMMA",
    )


def _sum(config: DecodeConfig, pdl: bool) -> Specialization:
    return _specialization(
        f"decode sum of {config.slices}",
        sum_kernel,
        {"partial_ptr": "*fp32"},
        {"VECTOR": 8, "SLICES": config.slices, "BLOCK": 1024, "PDL": pdl},
        (4, 3),
        False,
        pdl,
    )


def _up(config: DecodeConfig, pdl: bool, along_r: bool) -> Specialization:
    slices = config.slices if config.fold else 1
    return _specialization(
        f"decode up {config.block_m}x{config.block_n} slab {config.slab} slices {slices}{_suffix(along_r)}",
        up_kernel,
        {"t_ptr": "*fp32" if config.fold else "*bf16"},
        {
            "VECTOR": 8,
            "UP_ALONG_R": along_r,
            "SLICES": slices,
            "HAS_BIAS": True,
            "ACTIVATION": "gelu",
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "SLAB": config.slab,
            "BLOCK_R": config.rest,
            "PDL": pdl,
        },
        (config.up_warps, config.up_stages),
        True if config.block_n >= 64 else "HMMA",
        pdl,
    )


def _prefill(config: PrefillConfig, along: bool) -> Specialization:
    pieces = f"{config.piece_0}+{config.piece_1}" if config.piece_1 else f"{config.piece_0}"
    return _specialization(
        f"prefill {config.block_m}x{config.block_n}x{config.block_k} rank {pieces}{_suffix(along)}",
        prefill_kernel,
        {},
        {
            "VECTOR": 8,
            "DOWN_ALONG_K": along,
            "UP_ALONG_R": along,
            "HAS_BIAS": True,
            "ACTIVATION": "gelu",
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "PIECE_0": config.piece_0,
            "PIECE_1": config.piece_1,
            "STAGES_K": config.stages_k,
            "STAGES_N": config.stages_n,
        },
        (config.warps, config.stages_k),
        True,
    )


def _suffix(along: bool) -> str:
    return "" if along else " transposed"


def _specialization(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    constexprs: dict[str, Any],
    launch: tuple[int, int],
    mma: bool | str,
    pdl: bool = False,
) -> Specialization:
    """Pointers are to bfloat16 and on 16 bytes unless ``pointers`` says otherwise; a bias is never known to be."""
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    for index, argument in enumerate(kernel.arg_names):
        if argument.endswith("_ptr"):
            signature[argument] = pointers.get(argument, "*bf16")
            if argument != "bias_ptr":
                attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "constexpr" if argument in constexprs else "i32"
    options = {"launch_pdl": True} if pdl else {}
    return Specialization(name, kernel, signature, constexprs, *launch, mma=mma, attrs=attrs, options=options)
