"""Second moments of output gradients, against autograd sample by sample, and the losses that give them."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.calibration import objectives
from lowrank_ops.calibration.objectives import MEAN_SCALE, _generator, _signs, distance, objective
from tests.calibration.comparing import assert_same_statistics


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def summed_loss(output: Tensor, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1], reduction="sum")


def first(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return model(batch[0])


def labelled(batches: int = 3, rows: int = 7) -> list[list[Tensor]]:
    return [[torch.randn(rows, 6).double(), torch.randint(3, (rows,))] for _ in range(batches)]


def with_gradients(covariances: lro.Covariances) -> list[str]:
    return [fqn for fqn, layer in covariances.items() if layer.output_gradients is not None]


def gradients_by_sample(model: nn.Module, layer: nn.Module, x: Tensor, loss: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The gradient at a layer's output, one sample and one backward pass at a time: (samples, ...)."""
    rows = []
    for index in range(len(x)):
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y) or y.clone())
        value = loss(model(x[index : index + 1]), index)
        rows.append(torch.autograd.grad(value, seen[0])[0])
        handle.remove()
    return torch.cat(rows)


def test_second_moment_equals_autograd_by_sample() -> None:
    model, batches = mlp(), labelled()
    covariances = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for fqn in ("0", "2", "4"):
        g = gradients_by_sample(
            model, model[int(fqn)], x, lambda out, index: F.cross_entropy(out, y[index : index + 1])
        )
        found = covariances[fqn].output_gradients
        assert found.count == 21
        torch.testing.assert_close(found.moment(centered=False), g.T @ g / 21)


def test_losses_by_sample_are_summed() -> None:
    model, batches = mlp(), labelled()
    scalar = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss)
    by_sample = lro.calibrate(
        model,
        batches,
        forward=first,
        sensitivity=lambda output, batch: F.cross_entropy(output, batch[1], reduction="none"),
    )
    assert_same_statistics(by_sample, scalar)


def test_activation_moments_do_not_depend_on_the_loss() -> None:
    model, batches = mlp(), labelled()
    plain = lro.calibrate(model, batches, forward=first)
    both = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss, token_weights=False)
    assert both.has_output_gradients and not plain.has_output_gradients
    for fqn in plain:
        assert torch.equal(plain[fqn].activations.second_moment, both[fqn].activations.second_moment)
    assert both.memory() == plain.memory() + sum(8 * (n * n + n) for n in (8, 5, 3))


@pytest.mark.parametrize("frozen", [False, True])
def test_model_is_restored(frozen: bool) -> None:
    model, batches = mlp().train().requires_grad_(not frozen), labelled()
    if not frozen:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    covariances = lro.calibrate(model, batches, forward=first, sensitivity="fisher")
    assert torch.equal(state, torch.get_rng_state())
    assert with_gradients(covariances) == ["0", "2", "4"]
    assert model.training and all(p.requires_grad is not frozen for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)


def test_frozen_and_trainable_models_agree() -> None:
    model, batches = mlp(), labelled()
    trainable = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss)
    frozen = lro.calibrate(model.requires_grad_(False), batches, forward=first, sensitivity=summed_loss)
    assert with_gradients(trainable) == ["0", "2", "4"]
    assert_same_statistics(frozen, trainable)


def test_fisher_approaches_the_exact_expectation() -> None:
    """At the logits the Fisher information of a sample is diag(p) - p p^T."""
    model, x = nn.Linear(4, 3).double(), torch.randn(50, 4).double()
    covariances = lro.calibrate(nn.Sequential(model), [x], sensitivity="fisher", num_probes=400)
    p = model(x).softmax(-1)
    exact = torch.diag(p.mean(0)) - p.T @ p / len(p)
    found = covariances["0"].output_gradients
    assert found.count == 50 * 400
    torch.testing.assert_close(found.moment(centered=False), exact.detach(), atol=0.01, rtol=0)


def test_output_probes_approach_the_jacobian() -> None:
    """E of J^T v v^T J over random signs is J^T J."""
    head = nn.Linear(5, 4, bias=False).double()
    model = nn.Sequential(nn.Linear(3, 5).double(), head)
    covariances = lro.calibrate(model, [torch.randn(20, 3).double()], sensitivity="output", num_probes=400)
    moment = covariances["0"].output_gradients.moment(centered=False)
    exact = (head.weight.T @ head.weight).detach()
    assert (moment - exact).norm() < 0.05 * exact.norm()
    torch.testing.assert_close(
        covariances["1"].output_gradients.moment(centered=False), torch.eye(4).double(), atol=0.05, rtol=0
    )


class Twice(nn.Module):
    """Calls one layer two times, changes its output in place, and reads attributes of an output object."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.dead_end = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> SimpleNamespace:
        self.dead_end(x)
        y = self.layer(x)
        y += x
        return SimpleNamespace(logits=self.layer(y.relu_()))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(9, 4), (9, 2, 4)], ids=["rows", "view"])  # as Linear returns for 3-D
def test_gradients_of_both_calls_of_a_layer_are_summed(frozen: bool, shape: tuple[int, ...]) -> None:
    model, x = Twice().double().requires_grad_(not frozen), torch.randn(shape).double()
    covariances = lro.calibrate(
        model, [x], sensitivity=lambda output, batch: output.logits.square().sum(), share_inputs=False
    )
    assert with_gradients(covariances) == ["layer"]

    first_call = model.layer(x).detach().requires_grad_()
    second_call = model.layer((first_call + x).relu())
    gradients = torch.autograd.grad(second_call.square().sum(), [first_call, second_call])
    expected = sum(g.flatten(0, -2).T @ g.flatten(0, -2) for g in gradients)
    found = covariances["layer"].output_gradients
    torch.testing.assert_close(found.second_moment, expected)
    assert found.count == 9


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_have_a_gradient_per_position(groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    model = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 25, 3)).double()
    x, y = torch.randn(5, 4, 5, 5).double(), torch.randint(3, (5,))
    found = lro.calibrate(model, [x], sensitivity=lambda output, batch: F.cross_entropy(output, y, reduction="sum"))
    g = gradients_by_sample(model, conv, x, lambda out, index: F.cross_entropy(out, y[index : index + 1]))
    rows = g.movedim(1, -1).reshape(-1, groups, 6 // groups)
    expected = torch.einsum("ngi,ngj->gij", rows, rows) / 5
    moment = found["0"].output_gradients.moment(centered=False)
    torch.testing.assert_close(moment, expected if groups > 1 else expected[0])


class Tokens(nn.Module):
    """(batch, tokens) -> last_hidden_state, mixing positions by their masked mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        h = self.layer(self.embedding(ids)).tanh() * attention_mask.unsqueeze(-1)
        return {"last_hidden_state": self.out(h + h.sum(1, keepdim=True))}


@pytest.mark.parametrize("kind", ["output", "fisher"])
def test_padding_has_no_gradient(kind: str) -> None:
    """Longer padding draws other random numbers, so only zeros and counts are compared."""
    model = Tokens().double()
    ids, mask = torch.randint(11, (3, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    forward = None if kind == "output" else lambda model, batch: model(**batch)["last_hidden_state"]
    seen: list[Tensor] = []
    handle = model.out.register_forward_hook(lambda m, a, y: y.register_hook(seen.append) and None)
    found = lro.calibrate(
        model, [{"ids": ids, "attention_mask": mask}], mask="attention_mask", sensitivity=kind, forward=forward
    )["out"].output_gradients
    handle.remove()
    rows = seen[0]
    assert not rows[mask == 0].any() and rows[mask == 1].all(-1).all()
    torch.testing.assert_close(found.second_moment, torch.einsum("nti,ntj->ij", rows, rows))
    assert found.count == (3 if kind == "output" else 10)  # sequences, or labels drawn


def test_masked_gradients_are_excluded() -> None:
    """The loss depends on padded positions."""
    model = Tokens().double()
    batch = {"ids": torch.randint(11, (2, 3)), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    found = lro.calibrate(
        model, [batch], mask="attention_mask", sensitivity=lambda output, batch: output["last_hidden_state"].sum()
    )["out"].output_gradients
    torch.testing.assert_close(found.second_moment, torch.full((4, 4), 5.0).double())


def test_save_load_and_merge(tmp_path: Path) -> None:
    model, batches = mlp(), labelled(4)
    whole, left, right = (
        lro.calibrate(model, part, forward=first, sensitivity=summed_loss)
        for part in (batches, batches[:1], batches[1:])
    )
    merged = left.merge(right)
    merged.save(tmp_path / "statistics.safetensors")
    assert whole["0"].output_gradients.count == 28
    assert_same_statistics(lro.Covariances.load(tmp_path / "statistics.safetensors"), whole)


def test_merge_without_output_gradients_names_the_layers() -> None:
    model, batches = mlp(), labelled()
    with pytest.raises(ValueError, match="must all hold output gradients, or none"):
        lro.calibrate(model, batches, forward=first, sensitivity="fisher").merge(
            lro.calibrate(model, batches, forward=first)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sensitivity": "hessian"}, "'fisher', 'output', 'pooled'"),
        ({"sensitivity": "fisher", "num_probes": 0}, "num_probes must be positive"),
        ({"sensitivity": lambda output, batch: 1.0}, "returned float"),
        ({"sensitivity": lambda output, batch: output.detach().sum()}, "depends on no layer"),
        ({"sensitivity": "fisher", "forward": lambda model, batch: (model(batch[0]), 3)[1]}, "type int"),
        ({"sensitivity": "fisher", "forward": lambda model, batch: model(batch[0]).argmax(-1)}, "no floating-point"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lro.calibrate(mlp(), labelled(), **{"forward": first, **arguments})


def test_nan_in_a_gradient_names_the_layer_and_the_batch() -> None:
    def loss(output: Tensor, batch: list[Tensor]) -> Tensor:
        return (output - output.detach()).sqrt().sum()  # an infinite slope at zero

    with pytest.raises(
        lro.NonFiniteActivationError, match=r"layer '[024]': its output gradient holds NaN or inf.*batch 0"
    ):
        lro.calibrate(mlp(), labelled(), forward=first, sensitivity=loss)


def test_sensitivity_inside_no_grad_and_inference_mode() -> None:
    model, batches = mlp(), labelled()
    expected = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss)
        assert with_gradients(found) == ["0", "2", "4"]
        for fqn in expected:
            ours, theirs = found[fqn].output_gradients, expected[fqn].output_gradients
            assert torch.equal(ours.second_moment, theirs.second_moment)


def pooled_gradient(values: Tensor, mask: Tensor | None, seed: int = 0) -> Tensor:
    values = values.detach().requires_grad_()
    torch.manual_seed(seed)
    found = objective("pooled", SimpleNamespace(last_hidden_state=values), None, mask)
    assert found.samples == len(values)
    return torch.autograd.grad(found.loss, values)[0]


def test_pooled_signs_rows_and_the_direction_of_the_mean() -> None:
    values = torch.randn(3, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    gradient = pooled_gradient(values, mask)
    assert not gradient[~mask].any()

    torch.manual_seed(0)
    of_rows = _signs(values, _generator(None, values.device))
    of_mean = gradient - of_rows * mask.unsqueeze(-1)  # the same at all rows of a sample
    for sample, real in enumerate(mask):
        shared = of_mean[sample][real]
        torch.testing.assert_close(shared, shared[:1].expand_as(shared))
        mean = values[sample][real].mean(0)
        assert abs(float(shared[0] @ mean)) < 1e-5  # the length of the mean does not matter
    signs = torch.stack([pooled_gradient(values, mask, seed)[0] for seed in range(300)])
    torch.testing.assert_close(signs.square().mean(), torch.tensor(1 + MEAN_SCALE**2 * (1 - 1 / 16)), atol=0.02, rtol=0)


def test_pooled_without_a_mask_uses_all_rows() -> None:
    values = torch.randn(2, 4, 6)
    assert torch.equal(pooled_gradient(values, None), pooled_gradient(values, torch.ones(2, 4).bool()))


@pytest.mark.parametrize(
    ("shape", "mask"), [((2, 6), None), ((2, 4, 6), (2, 3)), ((2, 3, 4, 6), None)], ids=["pooled", "mask", "four"]
)
def test_pooled_needs_positions(shape: tuple[int, ...], mask: tuple[int, ...] | None) -> None:
    with pytest.raises(ValueError, match=r"needs an output \(batch, positions, features\)"):
        objective("pooled", torch.randn(shape), None, None if mask is None else torch.ones(mask).bool())


def test_pooled_gradients_exclude_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "_generator", lambda batch, device: torch.Generator(device).manual_seed(0))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    rows, mask = torch.randn(3, 4, 6), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    other = torch.where(mask.bool().unsqueeze(-1), rows, torch.randn(3, 4, 6))
    found = []
    for x in (rows, other):
        found.append(lro.calibrate(model, [x], sensitivity="pooled", mask=lambda args, kwargs: mask))
    for fqn in ("0", "2"):
        ours, theirs = (each[fqn].output_gradients for each in found)
        assert theirs.count == 3
        torch.testing.assert_close(theirs.second_moment, ours.second_moment)


def gradient_error(found: lro.Covariances, expected: lro.Covariances) -> float:
    """The relative error of G, layer "0"."""
    moment, target = (part["0"].output_gradients.moment(centered=False) for part in (found, expected))
    return float((moment - target).norm() / target.norm())


@pytest.mark.parametrize("sensitivity", ["fisher", "output"])
@pytest.mark.parametrize("as_mapping", [False, True])
def test_merged_parts_seeded_alike_draw_independently(sensitivity: str, as_mapping: bool) -> None:
    model = mlp()
    x = torch.randn(150, 6).double()
    batches: list[object] = [{"input": part} if as_mapping else part for part in x.split(1)]
    torch.manual_seed(9)
    expected = lro.calibrate(model, [x], sensitivity=sensitivity, num_probes=100)
    parts = []
    for batch in batches:
        torch.manual_seed(0)
        parts.append(lro.calibrate(model, [batch], sensitivity=sensitivity))
    assert gradient_error(functools.reduce(lro.Covariances.merge, parts), expected) < 0.25
    torch.manual_seed(0)
    again = lro.calibrate(model, batches[-1:], sensitivity=sensitivity)
    assert_same_statistics(again, parts[-1], 0)


def test_processes_seeded_alike_draw_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(64, 40, requires_grad=True)
    seen = []
    for rank in (0, 1, 2, 0):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
        torch.manual_seed(0)
        seen.append(torch.autograd.grad(objective("fisher", values, values, None).loss, values)[0])
    assert torch.equal(seen[0], seen[3])
    assert not any(torch.equal(seen[a], seen[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("kind", ["fisher", "output", "pooled"])
def test_distance_has_the_curvature_that_gradients_are_drawn_for(kind: str) -> None:
    values, mask = torch.randn(1, 3, 4, dtype=torch.float64), torch.tensor([[True, True, False]])
    assert float(distance(kind, values, values, None, mask)) == pytest.approx(0, abs=1e-12)

    def of(changed: Tensor) -> Tensor:
        return distance(kind, changed.view(values.shape), values, None, mask)

    expected = torch.eye(12, dtype=torch.float64)
    if kind == "fisher":
        p = values.flatten(0, 1).softmax(-1)
        expected = torch.block_diag(*(row.diag() - row.outer(row) for row in p))
    if kind == "pooled":
        mean = nn.functional.normalize(values[0, :2].sum(0), dim=0)
        expected += MEAN_SCALE**2 * (torch.eye(4) - mean.outer(mean)).tile(3, 3)
    expected[8:] = expected[:, 8:] = 0  # padding
    torch.testing.assert_close(torch.autograd.functional.hessian(of, values.flatten()), expected)


def test_distance_of_other_shapes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"returns \(2, 3\) where the dense returns \(2, 4\)"):
        distance("output", torch.zeros(2, 3), torch.zeros(2, 4), None, None)
