"""A fixed seed for every test of this folder, and the calibrated network."""

import pytest
import torch

from tests.calibrated_net import calibrated as calibrated


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
