"""Rows weighed with their gradients: the sums against plain loops, and what they are for."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.calibration import Moments
from lowrank_ops.calibration.token_weights import balanced


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def cubed(output: Tensor, batch: object) -> Tensor:
    """A loss whose gradients differ from row to row."""
    return output.double().pow(3).sum()


class Seen:
    """Inputs, outputs and gradients of one layer, by hooks of our own."""

    def __init__(self, model: nn.Module, layer: nn.Module, batches: list[Tensor]) -> None:
        self.x: list[Tensor] = []
        self.y: list[Tensor] = []
        handle = layer.register_forward_hook(self._see)
        self.g = [torch.autograd.grad(cubed(model(batch), batch), self.y[i])[0] for i, batch in enumerate(batches)]
        handle.remove()

    def _see(self, layer: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        self.x.append(args[0])
        self.y.append(y)


def loop(rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of w x x^T and w x for rows (samples, rows, d) and gradients (samples, rows, out), one row at a time."""
    moment, total = torch.zeros(rows.shape[-1], rows.shape[-1]).double(), torch.zeros(rows.shape[-1]).double()
    for sample, felt in zip(rows.double(), gradients.double(), strict=True):
        squares = [float(g @ g) for g in felt]
        for x, square in zip(sample, squares, strict=True):
            weight = square * len(squares) / sum(squares)
            moment += weight * torch.outer(x, x)
            total += weight * x
    return moment, total


def check(found: Moments, rows: Tensor, gradients: Tensor) -> None:
    moment, total = loop(rows.detach(), gradients)
    torch.testing.assert_close(found.second_moment, moment)
    torch.testing.assert_close(found.total, total)
    assert found.count == rows.shape[0] * rows.shape[1]


def encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("side", ["input", "output"])
def test_sums_are_those_of_a_loop(side: str) -> None:
    model, batches = encoder(), [torch.randn(4, 5, 6).double() for _ in range(2)]
    covariances = lro.calibrate(model, batches, sensitivity=cubed, side=side)
    for fqn in ("0", "2"):
        seen = Seen(model, model[int(fqn)], batches)
        found = covariances[fqn].token_weighted
        assert found.side == f"weighted {side}" and found.layers == [fqn]
        rows = torch.cat(seen.x) if side == "input" else torch.cat(seen.y) - model[int(fqn)].bias
        check(found, rows, torch.cat(seen.g))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("most", [1, 500, 3000])  # elements at a time: a line, a few lines, a few images
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 2, "padding": 1},
        {"padding": (2, 1), "stride": (2, 1)},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "dilation": 2},
    ],
)
def test_convolutions_too(options: dict[str, object], side: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_ops.calibration.token_weights.MOST_ELEMENTS", most)
    conv = nn.Conv2d(4, 6, 3, **options).double()
    model, images = nn.Sequential(conv, nn.Tanh()), torch.randn(5, 4, 7, 6).double()
    found = lro.calibrate(model, [images], sensitivity=cubed, side=side).sensitivities["0"].weighted
    seen = Seen(model, conv, [images])
    rows = lro.models.layers.input_rows(conv, images).view(5, -1, 36)
    if side == "output":
        rows = (seen.y[0] - conv.bias.view(-1, 1, 1)).movedim(1, -1).flatten(1, 2)
    gradients = seen.g[0].movedim(1, -1).flatten(1, 2)
    groups = conv.groups
    parts = zip(rows.chunk(groups, -1), gradients.chunk(groups, -1), strict=True)
    for index, (part, felt) in enumerate(parts):
        own = Moments(
            found.second_moment.view(groups, *found.second_moment.shape[-2:])[index],
            found.total.view(groups, -1)[index],
            found.count,
        )
        check(own, part, felt)


class Padded(nn.Module):
    """Tokens beside their padding."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.tanh(self.flat(x.flatten(0, 1))).view_as(x)  # (batch * positions, features) at this layer
        return self.head(y) * mask.unsqueeze(-1)


def test_padding_counts_neither_as_a_row_nor_in_a_mean() -> None:
    model, x, lengths = Padded().double(), torch.randn(3, 5, 6).double(), (5, 2, 0)
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    x[~mask] = 1e3
    found = lro.calibrate(model, [{"x": x, "mask": mask}], mask="mask", sensitivity=cubed)
    alone = lro.calibrate(
        model,
        [{"x": x[i : i + 1, :n], "mask": mask[i : i + 1, :n]} for i, n in enumerate(lengths) if n],
        mask="mask",
        sensitivity=cubed,
    )
    for fqn in ("flat", "head"):
        ours, theirs = (each[fqn].token_weighted for each in (found, alone))
        assert ours.count == theirs.count == 7
        torch.testing.assert_close(ours.second_moment, theirs.second_moment)
        torch.testing.assert_close(ours.total, theirs.total)


def test_one_row_to_a_sample_is_a_row_like_any_other() -> None:
    model, x = encoder(), torch.randn(20, 6).double()
    covariances = lro.calibrate(model, [x], sensitivity=cubed)
    for fqn, plain in covariances.items():
        weighted = covariances[fqn].token_weighted
        torch.testing.assert_close(weighted.second_moment, plain.second_moment)
        torch.testing.assert_close(weighted.total, plain.total)


def test_weights() -> None:
    gradient = torch.randn(3, 2, 4, 5).double()
    gradient[1] = 0
    weights = balanced(gradient)
    torch.testing.assert_close(weights.flatten(1).mean(1), torch.ones(3).double())
    assert (weights[1] == 1).all()  # a sample that the loss does not feel has rows all the same
    torch.testing.assert_close(balanced(gradient[0:1].float() * 1e-30), weights[0:1].float())  # squares underflow
    torch.testing.assert_close(balanced((gradient[0:1] * 1e4).half()), weights[0:1].float(), rtol=1e-2, atol=1e-3)
    assert balanced(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    model, x = encoder().float(), torch.randn(8, 6, 6)
    exact = lro.calibrate(model, [x], sensitivity=cubed).sensitivities
    narrow = lro.calibrate(copy.deepcopy(model).to(dtype), [x.to(dtype)], sensitivity=cubed).sensitivities
    for fqn, gradient in narrow.items():
        expected = exact[fqn].weighted.second_moment
        assert (gradient.weighted.second_moment - expected).norm() < 0.03 * expected.norm()


class InPlace(nn.Module):
    """Changes a layer's input after the layer has used it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y.detach())
        y.detach().mul_(0)
        return z


def test_an_input_that_was_changed_is_refused() -> None:
    model, x = InPlace().double().requires_grad_(False), torch.randn(3, 4).double()
    with pytest.raises(ValueError, match=r"'second' was changed in place .* pass token_weights=False"):
        lro.calibrate(model, [x], sensitivity=cubed)
    covariances = lro.calibrate(model, [x], sensitivity=cubed, token_weights=False)
    assert covariances["second"].token_weighted is None


def test_every_probe_counts() -> None:
    model, batches = encoder(), [torch.randn(4, 5, 6).double()]
    found = lro.calibrate(model, batches, sensitivity="output", num_probes=3).sensitivities["0"]
    assert found.weighted.count == 3 * 20 and found.count == 3 * 4


def test_losses_of_ones_own() -> None:
    model, x = encoder(), torch.randn(4, 5, 6).double()
    with lro.Calibrator(model, sensitivity=True) as ours:
        ours.observe(cubed(model(x), x), samples=4)
    theirs = lro.calibrate(model, [x], sensitivity=cubed)
    for fqn in theirs:
        weighted = (each[fqn].token_weighted.second_moment for each in (ours, theirs))
        torch.testing.assert_close(*weighted)
    with lro.Calibrator(model, sensitivity=True, token_weights=False) as plain:
        plain.observe(cubed(model(x), x), samples=4)
    assert all(gradient.weighted is None for gradient in plain.sensitivities.values())


def test_they_are_saved_merged_and_counted(tmp_path: Path) -> None:
    model, batches = encoder(), [torch.randn(4, 5, 6).double() for _ in range(2)]
    parts = [lro.calibrate(model, [batch], sensitivity=cubed) for batch in batches]
    whole = lro.calibrate(model, batches, sensitivity=cubed)
    parts[1].save(tmp_path / "part")
    merged = parts[0].merge(lro.Covariances.load(tmp_path / "part"))
    for fqn, gradient in whole.sensitivities.items():
        assert merged[fqn].token_weighted.count == gradient.weighted.count
        assert merged[fqn].token_weighted.side == "weighted input"
        torch.testing.assert_close(merged[fqn].token_weighted.second_moment, gradient.weighted.second_moment)
        torch.testing.assert_close(merged[fqn].token_weighted.total, gradient.weighted.total)
    alike = lro.calibrate(model, batches, sensitivity=cubed, token_weights=False)
    assert whole.memory() == alike.memory() + sum(8 * (n * n + n) for n in (6, 8))
    with pytest.raises(ValueError, match=r"differs at weighted input of 0"):
        whole.merge(alike)


class OneToken(nn.Module):
    """Reads the first of its tokens only, as a classifier does whose class token is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mlp(x))[:, 0])


def tokens(count: int) -> Tensor:
    """First tokens in four directions, others, larger, in all."""
    x = 3 * torch.randn(count, 6, 12).double()
    x[:, 0] = torch.randn(count, 4).double() @ torch.eye(4, 12).double()
    return x


def lost(model: nn.Module, token_weights: bool, projection: str = "loss") -> tuple[float, float]:
    """Measured and predicted divergence of one sample at rank 4."""
    covariances = lro.calibrate(
        model,
        [tokens(500)],
        sensitivity="fisher",
        token_weights=token_weights,
        filter_fn=lambda module, fqn: fqn == "mlp",
    )
    student = copy.deepcopy(model)
    config = lro.CompressionConfig(lro.Ranks({"mlp": 4}), projection=projection)
    (layer,) = lro.compress_(student, covariances, config).layers
    x = tokens(2000)
    p, q = (m(x).log_softmax(-1).detach() for m in (model, student))
    return float(F.kl_div(q, p, reduction="batchmean", log_target=True)), layer.predicted_loss


def test_rows_that_the_loss_does_not_feel_take_no_rank() -> None:
    model = OneToken().double()
    weighed, predicted = lost(model, token_weights=True)
    alike, _ = lost(model, token_weights=False)
    assert weighed < 0.1 * alike and predicted < 0.1 * alike


@pytest.mark.parametrize("projection", ["output", "utilized", "weight"])
def test_predicted_loss_knows_them(projection: str) -> None:
    model = OneToken().double()
    with torch.no_grad():
        model.mlp.weight *= 0.1  # so that the second order is enough
    measured, predicted = lost(model, True, projection)
    _, of_all_alike = lost(model, False, projection)
    assert abs(predicted - measured) < abs(of_all_alike - measured)
    assert predicted == pytest.approx(measured, rel=0.35)
