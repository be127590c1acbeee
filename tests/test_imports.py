"""The order of the rooms, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_ops

ROOT = Path(lowrank_ops.__file__).parent

# The rooms, bottom first: each may import only those before it.
ORDER = [
    "version", "files", "arguments", "ops", "latencies", "policies", "config", "models", "calibration", "subspaces",
    "ranks", "factors", "layers", "considered", "reconstruction", "report", "compress", "search", "correction",
    "midpoint", "training", "description", "checkpoint", "integrations", "folders", "demo", "cli",
]  # fmt: skip
OP_LEAVES = {"_backend", "_dispatcher", "_native", "_triton_device", "_tuning"}
BUILT_ON = {"grouped": "linear"}  # the op of an op's shared device functions


def imported_by(path: Path) -> set[str]:
    """Dotted names inside the package that a file imports anywhere, also inside functions."""
    package = ["lowrank_ops", *path.relative_to(ROOT).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("lowrank_ops.") for name in names if name.startswith("lowrank_ops.")}


@pytest.mark.parametrize("room", ORDER)
def test_rooms_import_only_rooms_below_them(room: str) -> None:
    path = ROOT / f"{room}.py"
    files = [path] if path.exists() else sorted((ROOT / room).rglob("*.py"))
    assert files
    below = {*ORDER[: ORDER.index(room)], room}
    for file in files:
        rooms = {name.split(".")[0] for name in imported_by(file)}
        assert rooms <= below, f"{file.relative_to(ROOT)} imports {rooms - below}"


def test_every_room_is_listed() -> None:
    found = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found - {"__init__"} == set(ORDER)


def test_kernels_import_only_leaves_of_ops() -> None:
    for path in (ROOT / "ops").rglob("*.py"):
        inside = {name.removeprefix("ops.") for name in imported_by(path)}
        if path.parent == ROOT / "ops" and path.stem in OP_LEAVES:
            others = {name for name in inside if not (path.stem == "_native" and name.startswith("_backend."))}
            assert not others, f"{path.name} is a leaf but imports {others}"
        elif path.stem not in ("__init__", "_verify"):
            op = path.parent.name
            others = {name for name in inside if name.split(".")[0] not in {op, BUILT_ON.get(op), *OP_LEAVES}}
            assert not others, f"{op}/{path.name} imports {others}"


def test_imports_are_read_from_the_source() -> None:
    source = ROOT / "subspaces" / "layer.py"
    assert "models.layers.weight_matrix" in imported_by(source)
    assert not any(name.startswith("layers") for name in imported_by(source))


def test_import_is_cheap_and_does_not_initialize_cuda() -> None:
    """Beside torch and its own modules it imports the standard library, safetensors and tqdm at most."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import lowrank_ops\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert set(result.stdout.split()) <= {"lowrank_ops", "numpy", "safetensors", "tqdm"}
