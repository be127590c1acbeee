"""Libraries with a fault in one source, and the tests of the kernels against a given library."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from simulated import LIBRARY_NAME


def run(*command: str | Path, cwd: Path) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def plant(file: str, right: str, wrong: str, library: Path, folder: Path) -> Path:
    """A library like ``library``, but ``file``, such as "covariance/covariance_sm80", has ``wrong`` for ``right``."""
    build = next(parent for parent in library.parents if (parent / "compile_commands.json").is_file())
    commands = json.loads((build / "compile_commands.json").read_text())
    entry = next(c for c in commands if c["file"].endswith(f"{file}.cpp"))
    source, build = Path(entry["file"]), Path(entry["directory"])  # what the commands' paths start from
    text = source.read_text()
    assert text.count(right) == 1, f"{source} has {right!r} {text.count(right)} times"
    planted = folder / source.name
    planted.write_text(f'#line 1 "{source}"\n' + text.replace(right, wrong))
    arguments = shlex.split(entry["command"])
    others = [shlex.split(c["command"]) for c in commands if "lowrank_ops_simulated" in c["command"] and c is not entry]
    objects = [other[other.index("-o") + 1] for other in others]
    arguments[arguments.index("-o") + 1] = str(folder / "planted.o")
    arguments[arguments.index(str(source))] = str(planted)
    sanitizer = [a for a in arguments if a.startswith("-fsanitize")]
    level = "-O1" if sanitizer else "-O0"  # at -O0 it does not see structures that are copied, such as bfloat16
    run(*arguments, level, "-g0", "-iquote", source.parent, cwd=build)
    torch = next(a for a in arguments if a.endswith("torch/include")).removesuffix("include") + "lib"
    out = folder / LIBRARY_NAME
    link = [*sanitizer, "-L" + torch, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    run("c++", "-shared", "-o", out, folder / "planted.o", *objects, *link, cwd=build)
    return out


def run_tests(library: Path, which: str, *before: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``test_kernels.py`` in a process of its own, up to the first failure; ``before`` goes in front of the command."""
    tests = Path(__file__).with_name("test_kernels.py")
    options = ["-x", "-q", "-p", "no:cacheprovider", "-k", which, "--simulated-library", library]
    command = [*before, sys.executable, "-m", "pytest", tests, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, **environment})
