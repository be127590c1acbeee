"""The examples in docstrings run and print what they show."""

import doctest
import importlib.util
import pkgutil
from pathlib import Path

import pytest
import torch

import lowrank_ops

# Modules that run something, and the native library, which is no Python module.
NOT_IMPORTED = {"lowrank_ops.cli.__main__", "lowrank_ops.liblowrank_ops"}
GPU_MODULES = "_triton"  # these import triton, which a CPU build of torch lacks
for library in ("peft", "transformers"):
    if importlib.util.find_spec(library) is None:
        NOT_IMPORTED |= {f"lowrank_ops.integrations.{library}"}


def _examples() -> list[doctest.DocTest]:
    found: list[doctest.DocTest] = []
    finder = doctest.DocTestFinder(exclude_empty=True)
    for module in pkgutil.walk_packages(lowrank_ops.__path__, "lowrank_ops."):
        if module.name not in NOT_IMPORTED and GPU_MODULES not in module.name:
            found += finder.find(importlib.import_module(module.name))
    return [test for test in found if test.examples]


EXAMPLES = _examples()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_prints_what_it_shows(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)


def test_public_examples_are_found() -> None:
    names = {example.name for example in EXAMPLES}
    assert {"lowrank_ops.compress.compress_", "lowrank_ops.calibration.calibrator.calibrate"} <= names
