"""Compiles the kernels of a .cu file with NVRTC, for toolkits whose Python packages contain no nvcc.

    nvrtc.py TOOLKIT SOURCE OBJECT OUT ARCHS [--werror]

TOOLKIT is the folder "nvidia" with the packages nvidia-cuda-nvrtc, -nvcc, -runtime, -cccl and nvidia-nvfatbin. OBJECT
contains the launchers of SOURCE, compiled by the host compiler; its undefined kernels are compiled for ARCHS, such as
80,90a. OUT is an assembler file with the images, a symbol with the mangled name of each kernel, and the table that
nvrtc.cpp reads.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

# Headers that kernels include and NVRTC lacks: standard ones, and the tensor map of the driver's.
HEADERS = {
    "cstdint": """#pragma once
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
typedef unsigned long long uint64_t; typedef unsigned long long uintptr_t;
""",
    "cmath": "",
    "type_traits": """#pragma once
namespace std {
template <class A, class B> inline constexpr bool is_same_v = false;
template <class A> inline constexpr bool is_same_v<A, A> = true;
}
""",
    "cuda.h": """#pragma once
typedef struct CUtensorMap_st { alignas(64) unsigned long long opaque[16]; } CUtensorMap;
""",
}


class Library:
    """A library of the toolkit. A function that fails raises SystemExit with the library's message."""

    def __init__(self, toolkit: Path, name: str) -> None:
        paths = list(toolkit.glob(f"*/lib/lib{name}.so.*"))
        if not paths:
            raise SystemExit(f"{toolkit} has no */lib/lib{name}.so.*")
        self.library = ctypes.CDLL(str(paths[0]))
        self.error = self.library[{"nvrtc": "nvrtcGetErrorString", "nvfatbin": "nvFatbinGetErrorString"}[name]]
        self.error.restype = ctypes.c_char_p

    def __call__(self, function: str, *arguments: object) -> None:
        if code := self.library[function](*arguments):
            raise SystemExit(f"{function}: {self.error(code).decode()}")


def strings(texts: list[str]) -> ctypes.Array:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def missing_kernels(launchers: str) -> dict[str, str]:
    """``{C++ name: symbol}`` of the kernels whose address the launchers take."""

    def undefined(*options: str) -> list[str]:
        command = ["nm", "--undefined-only", "--no-sort", *options, launchers]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return [line.strip().removeprefix("U ") for line in lines]

    found = {}
    for symbol, name in zip(undefined(), undefined("--demangle"), strict=True):
        if name.startswith("void lowrank_ops::") and name.endswith(")"):  # a function template
            found[name[len("void ") : name.rindex(">(") + 1]] = symbol
    return found


def compile_kernels(
    nvrtc: Library, toolkit: Path, source: Path, arch: str, kernels: dict[str, str], werror: bool
) -> bytes:
    """The cubin of ``kernels`` for one arch."""
    program = ctypes.c_void_p()
    nvrtc("nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), str(source).encode(), len(HEADERS),
          strings(list(HEADERS.values())), strings(list(HEADERS)))  # fmt: skip
    for name in kernels:
        nvrtc("nvrtcAddNameExpression", program, name.encode())
    options = ["-std=c++17", "-default-device", f"-arch=sm_{arch}", "--ptxas-options=-warn-spills"]
    options += [f"-I{folder}" for folder in (source.parent, *toolkit.glob("*/include"))]
    failed = nvrtc.library.nvrtcCompileProgram(program, len(options), strings(options))
    size = ctypes.c_size_t()
    nvrtc("nvrtcGetProgramLogSize", program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc("nvrtcGetProgramLog", program, log)
    text = log.value.decode().strip()
    print(text, file=sys.stderr, end="\n" if text else "")
    if failed or (text and werror):
        raise SystemExit(f"{source} for sm_{arch}: NVRTC {'failed' if failed else 'warned'}")
    for name, symbol in kernels.items():
        lowered = ctypes.c_char_p()
        nvrtc("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(lowered))
        if lowered.value != symbol.encode():
            raise SystemExit(f"{name}: {lowered.value!r} for the device, {symbol} for the host")
    nvrtc("nvrtcGetCUBINSize", program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc("nvrtcGetCUBIN", program, cubin)
    nvrtc("nvrtcDestroyProgram", ctypes.byref(program))
    return cubin.raw


def bundle(nvfatbin: Library, cubins: dict[str, bytes]) -> bytes:
    """A fatbin with the cubins of all archs."""
    handle, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvfatbin("nvFatbinCreate", ctypes.byref(handle), strings(["-64"]), 1)
    for arch, cubin in cubins.items():
        nvfatbin("nvFatbinAddCubin", handle, cubin, ctypes.c_size_t(len(cubin)), arch.encode(), b"")
    nvfatbin("nvFatbinSize", handle, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    nvfatbin("nvFatbinGet", handle, image)
    nvfatbin("nvFatbinDestroy", ctypes.byref(handle))
    return image.raw


def assembly(image: Path, symbols: list[str]) -> str:
    """The image in the section that cuobjdump reads, one unused byte per symbol, and the table."""
    lines = ['.section .nv_fatbin,"a",@progbits', ".balign 8", "image:", f'.incbin "{image}"']
    for i, symbol in enumerate(symbols):
        lines += [".section .rodata", f".globl {symbol}", f".hidden {symbol}", f"{symbol}: .byte 0"]
        lines += [f'name{i}: .asciz "{symbol}"']
        lines += ['.section lowrank_kernels,"aw",@progbits', ".balign 8", f".8byte {symbol}, name{i}, image"]
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def main(toolkit: str, source: str, launchers: str, out: str, archs: str, *flags: str) -> None:
    kernels = missing_kernels(launchers)
    if not kernels:
        raise SystemExit(f"{launchers} launches no kernel")
    nvrtc, werror = Library(Path(toolkit), "nvrtc"), "--werror" in flags
    cubins = {
        arch: compile_kernels(nvrtc, Path(toolkit), Path(source), arch, kernels, werror) for arch in archs.split(",")
    }
    image = Path(out).with_suffix(".fatbin")
    image.write_bytes(bundle(Library(Path(toolkit), "nvfatbin"), cubins))
    Path(out).write_text(assembly(image, list(kernels.values())))


if __name__ == "__main__":
    main(*sys.argv[1:])
