"""Libraries with a fault planted in one source, and the tests of the kernels against a given library."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from simulated import LIBRARY_NAME

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def plant(file: str, right: str, wrong: str, library: Path, folder: Path, header: str = "") -> Path:
    """A library like ``library``, but ``file``, such as "covariance/covariance_sm80", has ``wrong`` for ``right``.

    With ``header``, such as "arch/pipeline.cuh", the fault is in that file instead, as ``file`` includes it.
    """
    build = next(parent for parent in library.parents if (parent / "compile_commands.json").is_file())
    commands = json.loads((build / "compile_commands.json").read_text())
    entry = next(c for c in commands if c["file"].endswith(f"{file}.cpp"))
    source, build = Path(entry["file"]), Path(entry["directory"])  # the commands' paths are relative to it
    csrc = source.parents[1]
    changed = csrc / header if header else source
    text = changed.read_text()
    assert text.count(right) == 1, f"{changed} has {right!r} {text.count(right)} times"
    # A tree of its own: relative includes find what is planted there first, and all else in the sources.
    tree = folder / "csrc"
    shutil.copytree(csrc, tree, ignore=shutil.ignore_patterns("*.cpp"))
    planted = tree / source.relative_to(csrc)
    shutil.copyfile(source, planted)
    (tree / changed.relative_to(csrc)).write_text(f'#line 1 "{changed}"\n' + text.replace(right, wrong))
    arguments = shlex.split(entry["command"])
    others = [shlex.split(c["command"]) for c in commands if "lowrank_ops_simulated" in c["command"] and c is not entry]
    objects = [other[other.index("-o") + 1] for other in others]
    sanitizer = [a for a in arguments if a.startswith("-fsanitize")]
    level = "-O1" if sanitizer else "-O0"  # at -O0 it does not see structures that are copied, such as bfloat16
    # The command is: compiler, flags, -o, object, -c, source. CUDA's headers are half of the work.
    flags = [f"-I{tree}" if a == f"-I{csrc}" else a for a in arguments[1 : arguments.index("-o")]]
    at = flags.index("-include")
    header = flags[at + 1]
    del flags[at : at + 2]
    flags += [level, "-g0"]
    first = precompile(header, arguments[0], flags, library, build)
    run(arguments[0], f"-I{first}", *flags, "-include", header, "-c", planted, "-o", folder / "planted.o", cwd=build)
    torch = next(a for a in arguments if a.endswith("torch/include")).removesuffix("include") + "lib"
    out = folder / LIBRARY_NAME
    # libtorch_cpu, which is slow to read, comes with libtorch.
    link = [*sanitizer, "-L" + torch, "-Wl,--no-as-needed", "-ltorch"]
    run("c++", "-shared", "-o", out, folder / "planted.o", *objects, *link, cwd=build)
    return out


def precompile(header: str, compiler: str, flags: list[str], library: Path, build: Path) -> Path:
    """The folder of the compiled ``header``, for these ``flags``; made once beside ``library``."""
    folders = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    source = next(folder / header for folder in folders if (folder / header).is_file())
    out = library.with_name("precompiled") / f"{header}.gch"
    out.parent.mkdir(exist_ok=True)
    with open(out.with_name("lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest -n: one worker compiles
        if not out.is_file() or out.stat().st_mtime < library.stat().st_mtime:
            run(compiler, *flags, "-x", "c++-header", source, "-o", out, cwd=build)
    return out.parent


class Runner:
    """``test_kernels.py`` against given libraries, each in a process of its own that has torch imported already."""

    def __init__(self, *before: str | Path, **environment: str) -> None:
        """``before`` goes in front of the command."""
        command = [*before, sys.executable, "-m", "tests.simulator.forking"]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1", **environment}
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    def run(self, library: Path, which: str, *options: str) -> tuple[int, str]:
        """Up to the first failure: pytest's exit status and output."""
        with tempfile.NamedTemporaryFile("r") as out:
            tests = str(Path(__file__).with_name("test_kernels.py"))
            without = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]
            fixed = ["-x", "-q", *without, "-k", which, "--simulated-library", str(library)]
            assert self._server.stdin and self._server.stdout
            self._server.stdin.write(json.dumps([[tests, *fixed, *options], out.name]) + "\n")
            self._server.stdin.flush()
            return int(self._server.stdout.readline()), out.read()

    def close(self) -> None:
        self._server.communicate()
