"""Ends a process whose CUDA context is broken, so that one kernel's fault does not fail all later tests."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _device_is_usable():
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # after an illegal access every later CUDA call of the process fails
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # pytest-xdist replaces the worker
        pytest.exit(f"the CUDA context of this process is broken: {error}", returncode=1)
