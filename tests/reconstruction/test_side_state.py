"""Blocks that pass values on beside their outputs: reconstructed by whole runs, which give the right result."""

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.reconstruction import blocks
from tests.reconstruction.models import assert_same, one_shot, reconstruct


class ValueResidual(nn.Module):
    """Later blocks read the first block's values from a dict, before their last layer."""

    def __init__(self, store: dict[str, Tensor], first: bool) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(12, 12), nn.Linear(12, 12)
        self.store, self.first = store, first

    def forward(self, x: Tensor) -> Tensor:
        v = torch.tanh(self.v(x))
        if self.first:
            self.store["v"] = v
        return x + self.o(0.5 * v + 0.5 * self.store["v"])


class AddsAfterItsLastLayer(ValueResidual):
    """No layer of the block reads the shared value; only the block's output does."""

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            self.store["v"] = torch.tanh(self.v(x))
        return self.o(torch.tanh(self.v(x))) + self.store["v"]


class OfTheBatch(ValueResidual):
    """The shared value depends on the batch and on no layer."""

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            self.store["v"] = x.square()
        return x + self.o(torch.tanh(self.v(x)) * self.store["v"])


class Chain(nn.Module):
    def __init__(self, block: type[ValueResidual]) -> None:
        super().__init__()
        store: dict[str, Tensor] = {}
        self.blocks = nn.ModuleList(block(store, index == 0) for index in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Conditioned(nn.Module):
    """The model stores a value of the batch before its blocks, which read it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.store = nn.Linear(12, 12), {}
        self.blocks = nn.ModuleList(ValueResidual(self.store, False) for index in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.store["v"] = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class TwoChains(nn.Module):
    """The second chain's blocks read what the first chain has left."""

    def __init__(self) -> None:
        super().__init__()
        store: dict[str, Tensor] = {}
        self.first = nn.ModuleList(ValueResidual(store, index == 0) for index in range(2))
        self.second = nn.ModuleList(ValueResidual(store, False) for index in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.first, *self.second]:
            x = block(x)
        return x


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain(ValueResidual),
        lambda: Chain(AddsAfterItsLastLayer),
        lambda: Chain(OfTheBatch),
        Conditioned,
        TwoChains,
    ],
)
def test_blocks_with_side_state_are_run_whole(make, batches):
    model = make().double()
    data = [torch.randn(40, 12, dtype=torch.float64) for _ in range(batches)]
    factors = one_shot(model, [(x,) for x in data], None, rank=4)
    assert_same(reconstruct(model, factors, data), reconstruct(model, factors, data, blocks=[]))


@pytest.mark.parametrize("make", [TwoChains, Conditioned])
def test_block_wise_errors_do_not_depend_on_what_ran_before(make, monkeypatch):
    model, batches = make(), [torch.randn(40, 12) for _ in range(3)]
    layers, covariances = list(model.modules()), lro.calibrate(model, batches)
    build, seen = blocks._block_error, []

    def checked(runs, *args):
        error = build(runs, *args)
        expected = [float(error(batch)) for batch in range(3)]
        assert [float(error(batch)) for batch in (2, 1, 0)] == expected[::-1]
        seen.extend(expected)
        return error

    monkeypatch.setattr(blocks, "_block_error", checked)
    with pytest.warns(UserWarning, match="are in no block"):
        lro.compress_(
            model,
            covariances,
            lro.Ranks(dict.fromkeys(covariances, 4)),
            reconstruction=lro.BlockReconstruction(batches, epochs=1),
        )
    assert min(seen) > 0 and list(model.modules()) != layers


def test_naming_blocks_with_side_state_is_an_error():
    model, data = Chain(ValueResidual), [torch.randn(40, 12) for _ in range(2)]
    factors = one_shot(model, [(x,) for x in data], None, rank=4)
    with pytest.raises(ValueError, match="blocks='blocks' cannot be run block by block"):
        reconstruct(model, factors, data, blocks="blocks")
