"""Token weights: the weighted moments against plain loops, and the effect on loss-aware factors."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.calibration import Moments
from lowrank_ops.calibration.token_weights import relative_squares
from tests.calibration.comparing import assert_same_statistics, cubed, of_group


class Seen:
    """Inputs, outputs and gradients of one layer, by a hook."""

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
    for sample, of_sample in zip(rows.double(), gradients.double(), strict=True):
        squares = [float(g @ g) for g in of_sample]
        for x, square in zip(sample, squares, strict=True):
            weight = square * len(squares) / sum(squares)
            moment += weight * torch.outer(x, x)
            total += weight * x
    return moment, total


def check(found: Moments, rows: Tensor, gradients: Tensor) -> None:
    moment, total = loop(rows.detach(), gradients)
    found = found.about(None)
    torch.testing.assert_close(found.second_moment, moment)
    torch.testing.assert_close(found.total, total)
    assert found.count == rows.shape[0] * rows.shape[1]


def encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("side", ["input", "output"])
def test_sums_equal_a_loop_over_rows(side: str) -> None:
    model, batches = encoder(), [torch.randn(4, 5, 6).double() for _ in range(2)]
    covariances = lro.calibrate(model, batches, sensitivity=cubed, side=side)
    for fqn in ("0", "2"):
        seen = Seen(model, model[int(fqn)], batches)
        assert covariances[fqn].side == side
        rows = torch.cat(seen.x) if side == "input" else torch.cat(seen.y) - model[int(fqn)].bias
        check(covariances[fqn].token_weighted, rows, torch.cat(seen.g))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("max_elements", [1, 500, 3000])  # elements at a time: a line, a few lines, a few images
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
def test_sums_of_convolutions_equal_a_loop_over_rows(
    options: dict[str, object], side: str, max_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_ops.calibration.token_weights.MAX_ELEMENTS", max_elements)
    conv = nn.Conv2d(4, 6, 3, **options).double()
    model, images = nn.Sequential(conv, nn.Tanh()), torch.randn(5, 4, 7, 6).double()
    found = lro.calibrate(model, [images], sensitivity=cubed, side=side)["0"].token_weighted
    seen = Seen(model, conv, [images])
    rows = lro.models.layers.input_rows(conv, images).view(5, -1, 36)
    if side == "output":
        rows = (seen.y[0] - conv.bias.view(-1, 1, 1)).movedim(1, -1).flatten(1, 2)
    gradients = seen.g[0].movedim(1, -1).flatten(1, 2)
    parts = zip(rows.chunk(conv.groups, -1), gradients.chunk(conv.groups, -1), strict=True)
    for group, (x, g) in enumerate(parts):
        check(of_group(found, group), x, g)


class Padded(nn.Module):
    """Tokens with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.tanh(self.flat(x.flatten(0, 1))).view_as(x)  # (batch * positions, features) at this layer
        return self.head(y) * mask.unsqueeze(-1)


def test_padding_is_in_neither_rows_nor_means() -> None:
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
        ours, theirs = (each[fqn].token_weighted.about(None) for each in (found, alone))
        assert ours.count == theirs.count == 7
        torch.testing.assert_close(ours.second_moment, theirs.second_moment)
        torch.testing.assert_close(ours.total, theirs.total)


def test_samples_of_one_row_are_unweighted() -> None:
    model, x = encoder(), torch.randn(20, 6).double()
    covariances = lro.calibrate(model, [x], sensitivity=cubed)
    for layer in covariances.values():
        torch.testing.assert_close(layer.token_weighted.second_moment, layer.activations.second_moment)
        torch.testing.assert_close(layer.token_weighted.total, layer.activations.total)


def test_weights_have_mean_one_in_each_sample() -> None:
    gradient = torch.randn(3, 2, 4, 5).double()
    gradient[1] = 0
    weights, first = relative_squares(gradient), gradient[:1]
    torch.testing.assert_close(weights.flatten(1).mean(1), torch.ones(3).double())
    assert (weights[1] == 1).all()  # a sample without gradient is unweighted
    tiny, half = relative_squares(first.float() * 1e-30), relative_squares((first * 1e4).half())
    torch.testing.assert_close(tiny, weights[:1].float())  # although the squares underflow
    torch.testing.assert_close(half, weights[:1].float(), rtol=1e-2, atol=1e-3)
    assert relative_squares(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_give_nearly_the_same_moments(dtype: torch.dtype) -> None:
    model, x = encoder().float(), torch.randn(8, 6, 6)
    exact = lro.calibrate(model, [x], sensitivity=cubed)
    narrow = lro.calibrate(copy.deepcopy(model).to(dtype), [x.to(dtype)], sensitivity=cubed)
    for fqn in ("0", "2"):
        found, expected = (each[fqn].token_weighted.second_moment for each in (narrow, exact))
        assert (found - expected).norm() < 0.03 * expected.norm()


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


def test_input_changed_in_place_is_an_error() -> None:
    model, x = InPlace().double().requires_grad_(False), torch.randn(3, 4).double()
    with pytest.raises(ValueError, match=r"'second' was changed in place .* pass token_weights=False"):
        lro.calibrate(model, [x], sensitivity=cubed)
    covariances = lro.calibrate(model, [x], sensitivity=cubed, token_weights=False)
    assert covariances["second"].token_weighted is None


def test_every_probe_is_counted() -> None:
    model, batches = encoder(), [torch.randn(4, 5, 6).double()]
    found = lro.calibrate(model, batches, sensitivity="output", num_probes=3)["0"]
    assert found.token_weighted.count == 3 * 20 and found.output_gradients.count == 3 * 4


@pytest.mark.parametrize("token_weights", [True, False])
def test_observed_losses_equal_those_of_calibrate(token_weights: bool) -> None:
    model, x = encoder(), torch.randn(4, 5, 6).double()
    with lro.Calibrator(model, output_gradients=True, token_weights=token_weights) as calibrator:
        calibrator.observe(cubed(model(x), x), samples=4)
    expected = lro.calibrate(model, [x], sensitivity=cubed, token_weights=token_weights)
    assert_same_statistics(calibrator.covariances, expected)
    assert expected.has_token_weights == token_weights


def test_token_weighted_moments_are_saved_and_merged(tmp_path: Path) -> None:
    model, batches = encoder(), [torch.randn(4, 5, 6).double() for _ in range(2)]
    parts = [lro.calibrate(model, [batch], sensitivity=cubed) for batch in batches]
    whole = lro.calibrate(model, batches, sensitivity=cubed)
    parts[1].save(tmp_path / "part")
    assert whole.has_token_weights
    assert_same_statistics(parts[0].merge(lro.Covariances.load(tmp_path / "part")), whole)
    unweighted = lro.calibrate(model, batches, sensitivity=cubed, token_weights=False)
    assert whole.memory() == unweighted.memory() + sum(8 * (n * n + n) for n in (6, 8))
    with pytest.raises(ValueError, match=r"must all hold token weights, or none"):
        whole.merge(unweighted)


class OneToken(nn.Module):
    """Reads only its first token, like a classifier with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mlp(x))[:, 0])


def tokens(count: int) -> Tensor:
    """First tokens in four directions; the others larger, in all directions."""
    x = 3 * torch.randn(count, 6, 12).double()
    x[:, 0] = torch.randn(count, 4).double() @ torch.eye(4, 12).double()
    return x


def divergence(model: nn.Module, token_weights: bool, projection: str = "loss") -> tuple[float, float]:
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


def test_tokens_without_gradient_take_no_rank() -> None:
    model = OneToken().double()
    weighted, predicted = divergence(model, token_weights=True)
    unweighted, _ = divergence(model, token_weights=False)
    assert weighted < 0.1 * unweighted and predicted < 0.1 * unweighted


@pytest.mark.parametrize("projection", ["output", "utilized", "weight"])
def test_predicted_loss_uses_token_weights(projection: str) -> None:
    model = OneToken().double()
    with torch.no_grad():
        model.mlp.weight *= 0.1  # so that the second order is enough
    measured, predicted = divergence(model, True, projection)
    _, unweighted = divergence(model, False, projection)
    assert abs(predicted - measured) < abs(unweighted - measured)
    assert predicted == pytest.approx(measured, rel=0.35)
