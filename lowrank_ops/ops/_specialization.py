"""One compiled form of a Triton kernel, as the ops list them and as the compile gate and the kernel table read them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_NONE: Mapping[str, Any] = MappingProxyType({})


class Specialization(NamedTuple):
    """A kernel with everything that Triton needs to compile it without a device."""

    name: str  # unique within an op and arch
    kernel: Any  # the triton.jit function
    signature: Mapping[str, str]  # argument name -> "*bf16", "i32", "tensordesc<bf16[64,128]>" or "constexpr"
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tma: bool = False  # must load by TMA (UTMALDG)
    mma: bool | str = True  # must use the arch's newest tensor-core instruction, or the one named ("HMMA")
    attrs: Mapping[tuple[int, ...], Any] | None = None  # (argument index,) -> [["tt.divisibility", 16]]
    options: Mapping[str, Any] = _NONE  # further compile options, such as launch_pdl or maxnreg
