"""Shared fixtures; tests that need a GPU are skipped, with a note, on a machine without one."""

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


@pytest.fixture
def group_calls(monkeypatch):
    """Groups run on the CPU as on a GPU, by products; the inputs of the group's calls."""
    from lowrank_ops.ops import grouped
    from lowrank_ops.ops._backend import Backend, Impl
    from lowrank_ops.ops._dispatcher import BoundedCache

    seen = []

    def products(x, *factors):
        seen.append(x)
        return grouped.reference.products(x, *factors)

    kernel = Impl("fake", Backend.TRITON, lambda problem: None, products, bind=lambda problem: products)
    monkeypatch.setattr(grouped, "TABLE", (kernel, *grouped.TABLE))
    monkeypatch.setattr(grouped, "_decisions", BoundedCache(64))
    monkeypatch.setattr(grouped, "may_fuse", lambda x: True)
    monkeypatch.setenv("LOWRANK_OPS_VERIFY", "off")
    return seen
