import pytest

from benchmarks import suite
from tests.benchmarks.running import LIMITS


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(suite, "ceilings", lambda device, clock: LIMITS)
