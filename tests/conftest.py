"""What runs where: tests that need a GPU are left out, and said to be, on a machine without one."""

import pytest
import torch


def pytest_report_header() -> str:
    if torch.cuda.is_available():
        return f"CUDA device: {torch.cuda.get_device_name()}"
    return "no CUDA device: tests marked gpu are not run"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    without = [item for item in items if item.get_closest_marker("gpu")]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
