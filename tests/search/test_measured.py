"""measured_ranks corrects predicted losses by derivatives of the compressed model's loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.models.masks import Masks
from lowrank_ops.models.running import ProgressBar, call_model
from lowrank_ops.ranks.allocation import allocate
from lowrank_ops.ranks.costs import in_parameters
from lowrank_ops.search import measured
from lowrank_ops.subspaces import layer_subspaces
from tests.calibrated_net import Calibrated


class Heads(nn.Module):
    """Two layers that do not interact."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


@pytest.fixture(scope="module")
def heads() -> Calibrated:
    torch.manual_seed(0)
    model = Heads().double()
    covariances = lro.calibrate(model, heads_batches(), sensitivity="output")
    layers = {fqn: model.get_submodule(fqn) for fqn in covariances}
    return Calibrated(model, covariances, layer_subspaces(layers, covariances))


def heads_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(400, 64, generator=generator).double() * torch.logspace(0.5, -1, 64) for _ in range(2)]


def ranks_of(found: lro.Ranks, model: nn.Module) -> dict[str, int | None]:
    return {fqn: found.ranks.get(fqn) for fqn in ("a", "b")}


def test_finds_what_is_best_by_the_measured_loss(heads: Calibrated) -> None:
    model = heads.model

    def loss(output: Tensor, batch: Tensor) -> Tensor:  # errors of b are eight times as bad as in calibration
        error = (output - model(batch).detach()).square()
        return 0.5 * (error[:, :64].sum(1) + 8 * error[:, 64:].sum(1))

    found = lro.measured_ranks(model, heads.covariances, heads_batches(), 0.5, sensitivity=loss)
    plain, best = (allocate(0.5, "loss", in_parameters(), heads.spaces, {}, {}, weights=w) for w in (None, {"b": 8.0}))
    assert plain != best
    assert ranks_of(found, model) == best
    same = lro.measured_ranks(model, heads.covariances, heads_batches(), 0.5, sensitivity="output")
    assert ranks_of(same, model) == plain


def test_the_derivative_is_the_squared_error_of_a_layer(heads: Calibrated) -> None:
    trial = Heads().double()
    trial.load_state_dict(heads.model.state_dict())
    ranks: dict[str, int | None] = {"a": 8, "b": 16}
    lro.compress_(trial, heads.covariances, lro.Ranks(ranks))  # type: ignore[arg-type]
    batches = heads_batches()
    loss, derivatives = measured._differentiated(
        heads.model, trial, ["a", "b"], batches, "output", Masks(trial, None), call_model, ProgressBar(disable=True)
    )
    differences = torch.cat([trial(x) - heads.model(x) for x in batches]).detach()
    errors = [float(differences[:, half].square().sum()) for half in (slice(0, 64), slice(64, 128))]
    assert [derivatives["a"], derivatives["b"]] == pytest.approx(errors)
    assert loss == pytest.approx(sum(errors) / 2)
    assert not any(module._forward_hooks for module in trial.modules())
    predicted = [len(batches[0]) * 2 * measured._dropped(heads.spaces[fqn], ranks[fqn]) for fqn in ("a", "b")]
    assert [derivatives["a"], derivatives["b"]] == pytest.approx(predicted, rel=0.1)  # signs are drawn


def test_ranks_with_the_lowest_loss_are_returned(heads: Calibrated, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []

    def rising(*args: object) -> tuple[float, dict[str, float]]:
        losses.append(float(len(losses)))
        return losses[-1], {"a": 1.0, "b": 50.0}

    monkeypatch.setattr(measured, "_differentiated", rising)
    found = lro.measured_ranks(heads.model, heads.covariances, heads_batches(), 0.5, rounds=3)
    assert ranks_of(found, heads.model) == allocate(0.5, "loss", in_parameters(), heads.spaces, {}, {})
    assert losses == [0.0, 1.0, 2.0, 3.0]
    assert not any(isinstance(module, lro.LowRankLinear) for module in heads.model.modules())


@pytest.mark.parametrize("sensitivity", ["fisher", "output"])
def test_other_layers_and_modes_stay_as_they_are(calibrated: Calibrated, model: nn.Module, sensitivity: str) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = lro.CompressionConfig(overrides={"conv": 4}, pivoted=True)
    x = torch.randn(8, 8, 4, 4).double()
    with torch.inference_mode():
        found = lro.measured_ranks(model, calibrated.covariances, [x], 0.5, sensitivity=sensitivity, config=config)
    assert found.ranks["conv"] == 4 and len(found.ranks) > 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(part.requires_grad and part.grad is None for part in model.parameters())


def test_groups_are_low_rank_as_a_whole(heads: Calibrated) -> None:
    model, batches = heads.model, heads_batches()

    def loss(output: Tensor, batch: Tensor) -> Tensor:  # only errors of b count
        return (output - model(batch).detach())[:, 64:].square().sum(1)

    config = lro.CompressionConfig(group=True)
    alone, together = (
        lro.measured_ranks(model, heads.covariances, batches, 0.65, sensitivity=loss, config=each)
        for each in (None, config)
    )
    assert alone.ranks.keys() == {"a"}
    assert together.ranks.keys() == {"a", "b"}


def test_corrections_are_bounded_and_relative() -> None:
    found = measured._corrections({"a": 2.0, "b": -1.0, "c": 999.0, "d": 1.0}, {"a": 2.0, "b": 1, "c": 1, "d": 997})
    assert found == {"a": 1.0, "b": 0.1, "c": 10.0, "d": 0.1}
    assert measured._corrections({"a": -1.0}, {"a": 1.0}) == {} == measured._corrections({}, {})


def test_a_loss_that_errors_lower_corrects_nothing(heads: Calibrated) -> None:
    def norm(output: Tensor, batch: Tensor) -> Tensor:  # what low ranks drop is missing from it
        return output.square().sum(1)

    with pytest.warns(UserWarning, match="predicted losses are not corrected"):
        found = lro.measured_ranks(heads.model, heads.covariances, heads_batches(), 0.5, sensitivity=norm)
    assert ranks_of(found, heads.model) == allocate(0.5, "loss", in_parameters(), heads.spaces, {}, {})


def detached(output: Tensor, batch: Tensor) -> Tensor:
    return output.detach().sum(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be positive; got 0"),
        ({"sensitivity": "hessian"}, "sensitivity must be a function"),
        ({"sensitivity": detached}, "the loss does not depend on the compressed layers"),
        ({"sensitivity": lambda output, batch: output.sum(1) * torch.nan}, "loss of the compressed model is nan in"),
        ({"sensitivity": lambda output, batch: (0 * output).sum().sqrt()}, "layer 'a': the gradient of the loss"),
        ({"batches": []}, "batches was empty"),
        ({"fraction": 0.0001}, "cannot be met"),
    ],
    ids=["rounds", "sensitivity", "detached", "nan", "nan gradient", "empty", "budget"],
)
def test_bad_arguments_are_refused(heads: Calibrated, options: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"batches": heads_batches(), "fraction": 0.5, **options}
    call: Callable[..., lro.Ranks] = lro.measured_ranks
    with pytest.raises(ValueError, match=message):
        call(heads.model, heads.covariances, **given)


def test_the_model_itself_and_plain_statistics_are_refused(heads: Calibrated) -> None:
    def itself(trial: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return heads.model(batch)

    for forward in (itself, lambda trial, batch: heads.model(batch)):
        with pytest.raises(ValueError, match="forward has to run the copy"):
            lro.measured_ranks(heads.model, heads.covariances, heads_batches(), 0.5, forward=forward)
    plain = lro.calibrate(heads.model, heads_batches())
    with pytest.raises(ValueError, match="output gradients"):
        lro.measured_ranks(heads.model, plain, heads_batches(), 0.5)
