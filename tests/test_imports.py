"""Who may import whom, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_ops

ROOT = Path(lowrank_ops.__file__).parent

# Each module, and the modules of ours that it may import. No arrow points up the pipeline.
ALLOWED = {
    "version": set(),
    "journal": set(),
    "latencies": set(),
    "config": {"latencies"},
    "covariances": set(),
    "dense_layers": set(),
    "ops": set(),
    "batches": set(),
    "row_weights": {"covariances", "dense_layers", "masks", "ops"},
    "sensitivity": {"batches", "row_weights"},
    "finetune": {"batches"},
    "masks": set(),
    "recording": {"covariances", "dense_layers", "masks", "ops", "row_weights", "sensitivity"},
    "calibration": {"batches", "covariances", "dense_layers", "masks", "recording", "sensitivity"},
    "decomposition": set(),
    "subspaces": {"covariances", "decomposition", "dense_layers"},
    "costs": {"latencies", "subspaces"},
    "allocation": {"costs", "subspaces"},
    "ranks": {"allocation", "config", "costs", "subspaces"},
    "factors": {"config", "subspaces"},
    "layers": {"config", "costs", "covariances", "dense_layers", "factors", "ops", "subspaces"},
    "timing": {"batches", "costs", "dense_layers", "latencies", "layers"},
    "replacement": {"dense_layers", "factors", "layers"},
    "streams": {"batches", "dense_layers", "masks"},
    "regression": {"covariances", "decomposition", "dense_layers", "factors", "ops", "row_weights", "subspaces"},
    "felt_rows": {"batches", "covariances", "dense_layers", "masks", "row_weights", "sensitivity"},
    "refit": {
        "batches", "covariances", "dense_layers", "factors", "felt_rows", "layers", "masks", "regression",
        "replacement", "sensitivity", "streams",
    },
    "errors": {"batches", "dense_layers", "layers", "masks"},
    "report": {"config", "costs", "covariances", "dense_layers", "factors", "latencies", "subspaces"},
    "compress": {
        "config", "covariances", "dense_layers", "factors", "journal", "masks", "ranks", "refit", "replacement",
        "report", "sensitivity", "subspaces",
    },
    "recalibration": {
        "batches", "calibration", "compress", "config", "covariances", "dense_layers", "layers", "replacement",
    },
    "checkpoint": {"config", "dense_layers", "layers", "replacement", "report"},
}  # fmt: skip
IMPORTED_BY_NOBODY = {"cli", "demo", "hf"}
OP_LEAVES = {"_backend", "_dispatcher", "_native", "_triton_device", "_tuning"}


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


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_pipeline_modules_import_only_what_they_may(module: str) -> None:
    path = ROOT / f"{module}.py"
    files = [path] if path.exists() else sorted((ROOT / module).rglob("*.py"))
    assert files
    for file in files:
        rooms = {name.split(".")[0] for name in imported_by(file)} - {module}
        assert rooms <= ALLOWED[module], f"{file.name} imports {rooms - ALLOWED[module]}"


def test_every_module_is_listed() -> None:
    found = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found - {"__init__"} - IMPORTED_BY_NOBODY == set(ALLOWED)


def test_ops_leaves_and_kernels_keep_to_themselves() -> None:
    for path in (ROOT / "ops").rglob("*.py"):
        inside = {name.removeprefix("ops.") for name in imported_by(path)}
        if path.parent == ROOT / "ops" and path.stem in OP_LEAVES:
            assert not inside, f"{path.name} is a leaf but imports {inside}"
        elif path.stem != "__init__":
            op = path.parent.name
            strangers = {name for name in inside if name.split(".")[0] not in {op, *OP_LEAVES}}
            assert not strangers, f"{op}/{path.name} imports {strangers}"


def test_the_import_test_sees_a_wrong_arrow(tmp_path: Path) -> None:
    source = ROOT / "subspaces.py"
    assert "covariances.Covariance" in imported_by(source)
    assert not any(name.startswith("layers") for name in imported_by(source))


def seconds(statement: str) -> float:
    """The least of three imports in fresh processes, on the processor: other programs do not count."""
    code = f"import time; t = time.process_time(); {statement}; print(time.process_time() - t)"
    return min(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    )


def test_import_is_cheap_and_touches_no_cuda() -> None:
    code = (
        "import sys, lowrank_ops, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules and 'matplotlib' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert seconds("import torch, lowrank_ops") < 1.5 * seconds("import torch")
