"""A process that the GPU refuses ends, so that one kernel's fault does not fail all the tests behind it."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _device_is_usable():
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # after an access where there is nothing, a GPU refuses a process all that follows
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # pytest-xdist starts another one
        pytest.exit(f"the device takes no more work from this process: {error}", returncode=1)
