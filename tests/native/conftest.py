"""The built library, where there is one."""

from pathlib import Path

import pytest

from lowrank_ops.ops import _native


@pytest.fixture(scope="session")
def library() -> Path:
    if not _native.LIBRARY.is_file():
        pytest.skip("the native library was not built")
    return _native.LIBRARY
