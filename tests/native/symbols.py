"""The torch version that a library needs, by the symbols that it imports: ``python -m tests.native.symbols [LIBRARY]``.

``--toolkit 13.3`` requires that this release of CUDA built the installed library.

torch's C headers state which version added each function of the stable interface.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
from pathlib import Path

#: A torch without CUDA lacks the first, which is asked for only where there is a CUDA tensor.
WEAK = {
    "aoti_torch_get_current_cuda_stream", "__gmon_start__", "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable", "__cxa_finalize",
}  # fmt: skip
HEADERS = ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h")
BEFORE = (2, 9)  # of functions without a version in the headers


def undefined(library: Path) -> tuple[set[str], set[str]]:
    """Symbols required from torch, and weak ones; without those of glibc and libstdc++, which have versions."""
    result = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    symbols = [line.split()[-2:] for line in result.stdout.splitlines()]
    needed = {name for kind, name in symbols if kind != "w" and "@" not in name}
    return needed, {name.split("@")[0] for kind, name in symbols if kind == "w"}


def since() -> dict[str, tuple[int, int]]:
    """The version of torch that added each function of the stable interface, from the installed headers."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    found: dict[str, tuple[int, int]] = {}
    for header in HEADERS:
        text = (Path(spec.submodule_search_locations[0]) / "include" / "torch" / "csrc" / header).read_text()
        guards: list[tuple[int, int] | None] = []
        for line in text.splitlines():
            if line.startswith("#if"):
                version = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_", line)
                guards.append((int(version[1]), int(version[2])) if version else None)
            elif line.startswith("#endif"):
                guards.pop()
            for name in re.findall(r"\b((?:aoti_)?torch_\w+)\(", line):
                found.setdefault(name, max([BEFORE, *filter(None, guards)]))
    return found


def minimum(symbols: set[str]) -> tuple[tuple[int, int], set[str]]:
    """The torch that has all of ``symbols``, and those that are not in its stable interface."""
    known = since()
    return max((known[name] for name in symbols if name in known), default=BEFORE), symbols - known.keys()


def main() -> None:
    from lowrank_ops.ops import _native

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", nargs="?", type=Path, default=_native.LIBRARY)
    parser.add_argument("--toolkit")
    options = parser.parse_args()
    library = options.library
    if options.toolkit not in (None, found := _native.toolkit()):
        raise SystemExit(f"built by CUDA {found}, not {options.toolkit}")
    needed, weak = undefined(library)
    version, foreign = minimum(needed)
    if foreign or weak - WEAK:
        raise SystemExit(f"not stable: {', '.join(sorted(foreign | weak - WEAK))}")
    print(f"CUDA {found}, stable, minimum torch {version[0]}.{version[1]}: {len(needed)} functions")


if __name__ == "__main__":
    main()
