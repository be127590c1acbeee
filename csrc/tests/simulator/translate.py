"""Translates the kernels' sources to C++ for the simulated device: ``translate.py CSRC OUT``.

Only what C++ does not have is replaced: shared variables and launches by patterns, PTX instructions (``arch/``) and
torch's devices by the files of the same names in ``replaced/``. A pattern or a file that replaces nothing is an error.
"""

import re
import shutil
import sys
from pathlib import Path

LAUNCH = "const Launch launch{"
REPLACEMENTS = {
    # One set of static variables per CTA, and dynamic shared memory behind a function.
    r"extern __shared__ (?:__align__\(\d+\) )?unsigned char (\w+)\[\];": (
        r"unsigned char* const \1 = static_cast<unsigned char*>(::lowrank_ops::simulator::dynamic_shared());"
    ),
    r"(?<!extern )__shared__ ([\w:]+) (\w+)((?:\[[^;]*\])?);": (
        r"using \2_type = \1\3; \2_type& \2 = "
        r"*static_cast<\2_type*>(::lowrank_ops::simulator::static_shared(__LINE__, sizeof(\2_type)));"
    ),
    # Launches complete before the op frees its scratch.
    re.escape(LAUNCH): "const simulator::Synchronized synchronized; " + LAUNCH,
    # Tensors are the host's.
    r"STABLE_TORCH_LIBRARY_IMPL\(lowrank_ops, CUDA, m\)": "STABLE_TORCH_LIBRARY_IMPL(lowrank_ops, CPU, m)",
    r"(STABLE_TORCH_LIBRARY\w*)\(lowrank_ops,": r"\1(lowrank_ops_simulated,",
}
SUFFIXES = (".cu", ".cuh", ".h", ".cpp")


def translate(csrc: Path, out: Path) -> None:
    """Writes all sources below ``csrc`` but its tests to ``out``; ``.cu`` files become ``.cpp``."""
    counts = dict.fromkeys(REPLACEMENTS, 0)
    replaced = Path(__file__).parent / "replaced"
    for source in sorted(csrc.rglob("*.*")):
        name = source.relative_to(csrc)
        if name.suffix not in SUFFIXES or "tests" in name.parts or (replaced / name).is_file():
            continue
        text = source.read_text()
        for pattern, replacement in REPLACEMENTS.items():
            text, count = re.subn(pattern, replacement, text)
            counts[pattern] += count
        target = out / (name.with_suffix(".cpp") if name.suffix == ".cu" else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_text() != text:  # keeps the time stamp of unchanged files
            target.write_text(text)
    for pattern, count in counts.items():
        if count == 0:
            raise SystemExit(f"translate.py: no source has {pattern!r} any more")
    for source in (path for path in replaced.rglob("*") if path.is_file()):
        name = source.relative_to(replaced)
        if not (csrc / name).is_file():
            raise SystemExit(f"translate.py: {name} replaces nothing")
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_text() != source.read_text():
            shutil.copyfile(source, target)


if __name__ == "__main__":
    translate(Path(sys.argv[1]), Path(sys.argv[2]))
