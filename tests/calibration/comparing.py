"""A loss for calibration tests, and comparisons of statistics."""

import torch
from torch import Tensor

from lowrank_ops.calibration import Covariances, Moments


def cubed(output: Tensor, batch: object) -> Tensor:
    """A loss whose gradients differ from row to row."""
    return output.double().pow(3).sum()


def of_group(moments: Moments, group: int) -> Moments:
    """The moments of one group of a convolution."""
    if moments.total.dim() == 1:
        return moments
    shift = None if moments.shift is None else moments.shift[group]
    return Moments(moments.second_moment[group], moments.total[group], moments.count, shift)


def shared_inputs(covariances: Covariances) -> list[list[str]]:
    """The layers, grouped by the activation moments that they share."""
    groups: dict[int, list[str]] = {}
    for fqn, layer in covariances.items():
        groups.setdefault(id(layer.activations), []).append(fqn)
    return list(groups.values())


def assert_same_statistics(found: Covariances, expected: Covariances, tolerance: float = 1e-12) -> None:
    """Both hold the same layers, with the same sides and sharing, equal counts and equal sums."""
    assert list(found) == list(expected)
    assert (found.unreached, found.skipped) == (expected.unreached, expected.skipped)
    assert shared_inputs(found) == shared_inputs(expected)
    for fqn, layer in expected.items():
        ours, theirs = found[fqn].moments(), layer.moments()
        assert found[fqn].side == layer.side and list(ours) == list(theirs)
        for name, moments in theirs.items():
            assert ours[name].count == moments.count
            mine, others = ours[name].about(None), moments.about(None)
            for sums in ("second_moment", "total"):
                torch.testing.assert_close(getattr(mine, sums), getattr(others, sums), rtol=tolerance, atol=tolerance)
