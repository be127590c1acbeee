"""Builds the native part with CMake; CMakeLists.txt lists what to build. All the rest is in pyproject.toml.

LOWRANK_OPS_CUDA=AUTO|ON|OFF: AUTO (default) builds where nvcc, CMake and torch are found and else says so in a line.
LOWRANK_OPS_CUDA_ARCHS: CUDA archs, "80;90a;100f;120f" unless set; CUDACXX names an nvcc that is not on PATH.
LOWRANK_OPS_NVRTC names the folder of NVRTC's packages (site-packages/nvidia), used instead of nvcc.
LOWRANK_OPS_WERROR=ON makes every warning of nvcc or NVRTC and every spilled register an error.

A wheel with the library has the local version +cu12 or +cu13, from the compiler, which determines the drivers it needs.
"""

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BYTES_PER_JOB = 3 << 30  # what one nvcc may take


def find_torch():
    """The folder of the installed torch, also from inside an isolated build; torch is not imported."""
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = importlib.machinery.PathFinder.find_spec("torch", folders)
    return Path(spec.submodule_search_locations[0]) if spec else None


def find_nvcc():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def find_nvrtc():
    """The folder that LOWRANK_OPS_NVRTC names."""
    folder = os.environ.get("LOWRANK_OPS_NVRTC")
    if folder and not list(Path(folder).glob("*/lib/libnvrtc.so.1?")):
        raise SystemExit(f"LOWRANK_OPS_NVRTC must be a folder that has */lib/libnvrtc.so.1?; got {folder!r}.")
    return folder and str(Path(folder).resolve())


def cuda_major():
    """12 or 13: that of NVRTC or nvcc."""
    if folder := find_nvrtc():
        return next(Path(folder).glob("*/lib/libnvrtc.so.1?")).suffix[1:]
    text = subprocess.run([find_nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+)\.", text)[1]


def native():
    """The extension, or none where the choice or the machine is against it."""
    choice = os.environ.get("LOWRANK_OPS_CUDA", "AUTO").upper()
    if choice not in {"AUTO", "ON", "OFF"}:
        raise SystemExit(f"LOWRANK_OPS_CUDA must be AUTO, ON or OFF; got {choice!r}.")
    needs = {"nvcc": find_nvrtc() or find_nvcc(), "cmake": shutil.which("cmake"), "torch": find_torch()}
    missing = ", ".join(name for name, found in needs.items() if not found)
    if choice == "OFF" or (missing and choice == "AUTO"):
        if choice == "AUTO":
            print(f"lowrank_ops: no {missing}, so without the CUDA library (Triton works)", file=sys.stderr)
        return []
    if missing:
        raise SystemExit(f"LOWRANK_OPS_CUDA=ON, but this machine has no {missing}.")
    return [Extension("lowrank_ops.native", sources=[])]


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package: liblowrank_ops.so and, for this Python, _planner."""

    def run(self):
        # Kept: an editable install would rebuild in a temporary one.
        build = ROOT / "build" / f"native-cu{cuda_major()}"
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "lowrank_ops"
        options = {
            "LOWRANK_OPS_CUDA": "ON",
            "LOWRANK_OPS_CUDA_ARCHS": os.environ.get("LOWRANK_OPS_CUDA_ARCHS"),
            "LOWRANK_OPS_WERROR": os.environ.get("LOWRANK_OPS_WERROR"),
            "LOWRANK_OPS_TESTS": "OFF",
            "CMAKE_INSTALL_PREFIX": package.parent,
            "CMAKE_CUDA_COMPILER": None if find_nvrtc() else find_nvcc(),
            "LOWRANK_OPS_NVRTC": find_nvrtc(),
            "Python_EXECUTABLE": sys.executable,
            "TORCH_DIR": find_torch(),
            # A build isolated by pip has its own ninja, gone the next time: the cached one must be replaced.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
        }
        generator = ["-G", "Ninja"] if options["CMAKE_MAKE_PROGRAM"] else []
        cache = build / "CMakeCache.txt"
        # When the compiler changes, CMake itself would drop all other options.
        compiler = find_nvrtc() or find_nvcc()
        fresh = ["--fresh"] if cache.exists() and f"={compiler}\n" not in cache.read_text() else []
        defines = [f"-D{name}={value}" for name, value in options.items() if value]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = max(1, min(os.cpu_count() or 1, memory // BYTES_PER_JOB))
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *fresh, *generator, *defines], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", str(jobs)], check=True)
        subprocess.run(["cmake", "--install", build, "--component", "python", "--strip"], check=True)


class AnyPythonWheel(bdist_wheel):
    """The library does not depend on Python, so one wheel serves every Python 3 of the platform."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


extensions = native()
of_wheel = extensions and not {"sdist", "egg_info"} & set(sys.argv)  # a source distribution is for every toolkit
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
    options={"egg_info": {"tag_build": f"+cu{cuda_major()}"}} if of_wheel else {},
)
