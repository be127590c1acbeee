"""Gradients at the layers' outputs: against autograd by sample, and a model that is left as it was."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.calibration.objectives import MEAN_SCALE, objective


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp(**kwargs: object) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def summed_loss(output: Tensor, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1], reduction="sum")


def first(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return model(batch[0])


def labelled(batches: int = 3, rows: int = 7) -> list[list[Tensor]]:
    return [[torch.randn(rows, 6).double(), torch.randint(3, (rows,))] for _ in range(batches)]


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


def test_second_moment_is_that_of_single_samples() -> None:
    model, batches = mlp(), labelled()
    covariances = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for fqn in ("0", "2", "4"):
        g = gradients_by_sample(
            model, model[int(fqn)], x, lambda out, index: F.cross_entropy(out, y[index : index + 1])
        )
        found = covariances[fqn].output_gradients
        assert found.count == 21 and found.side == "gradient"
        torch.testing.assert_close(found.moment(centered=False), g.T @ g / 21)


def test_a_loss_by_sample_is_summed() -> None:
    model, batches = mlp(), labelled()
    scalar = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss)
    by_sample = lro.calibrate(
        model,
        batches,
        forward=first,
        sensitivity=lambda output, batch: F.cross_entropy(output, batch[1], reduction="none"),
    )
    for fqn, expected in scalar.sensitivities.items():
        assert by_sample[fqn].output_gradients.count == expected.count
        torch.testing.assert_close(by_sample[fqn].output_gradients.second_moment, expected.second_moment)


def test_input_statistics_do_not_depend_on_the_loss() -> None:
    model, batches = mlp(), labelled()
    plain = lro.calibrate(model, batches, forward=first)
    both = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss, token_weights=False)
    assert not plain.sensitivities
    for fqn in plain:
        assert torch.equal(plain[fqn].second_moment, both[fqn].second_moment)
    assert both.memory() == plain.memory() + sum(8 * (n * n + n) for n in (8, 5, 3))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(frozen: bool) -> None:
    model, batches = mlp().train().requires_grad_(not frozen), labelled()
    if not frozen:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    covariances = lro.calibrate(model, batches, forward=first, sensitivity="fisher")
    assert torch.equal(state, torch.get_rng_state())
    assert list(covariances.sensitivities) == ["0", "2", "4"]
    assert model.training and all(p.requires_grad is not frozen for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)


def test_frozen_and_trainable_models_agree() -> None:
    model, batches = mlp(), labelled()
    trainable = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss)
    frozen = lro.calibrate(model.requires_grad_(False), batches, forward=first, sensitivity=summed_loss)
    for fqn in trainable.sensitivities:
        torch.testing.assert_close(
            frozen[fqn].output_gradients.second_moment, trainable[fqn].output_gradients.second_moment
        )


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
def test_layers_called_twice_count_twice(frozen: bool) -> None:
    model, x = Twice().double().requires_grad_(not frozen), torch.randn(9, 4).double()
    found = lro.calibrate(
        model, [x], sensitivity=lambda output, batch: output.logits.square().sum(), share_inputs=False
    ).sensitivities
    assert list(found) == ["layer"]

    first_call = model.layer(x).detach().requires_grad_()
    second_call = model.layer((first_call + x).relu())
    gradients = torch.autograd.grad(second_call.square().sum(), [first_call, second_call])
    expected = sum(g.T @ g for g in gradients)
    torch.testing.assert_close(found["layer"].second_moment, expected)
    assert found["layer"].count == 9


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_give_a_row_for_each_position(groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    model = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 25, 3)).double()
    x, y = torch.randn(5, 4, 5, 5).double(), torch.randint(3, (5,))
    found = lro.calibrate(
        model, [x], sensitivity=lambda output, batch: F.cross_entropy(output, y, reduction="sum")
    ).sensitivities
    g = gradients_by_sample(model, conv, x, lambda out, index: F.cross_entropy(out, y[index : index + 1]))
    rows = g.movedim(1, -1).reshape(-1, groups, 6 // groups)
    expected = torch.einsum("ngi,ngj->gij", rows, rows) / 5
    moment = found["0"].moment(centered=False)
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
def test_padding_adds_nothing(kind: str) -> None:
    """Longer padding draws other random numbers, so what does not depend on them is compared: zeros and counts."""
    model = Tokens().double()
    ids, mask = torch.randint(11, (3, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    forward = None if kind == "output" else lambda model, batch: model(**batch)["last_hidden_state"]
    seen: list[Tensor] = []
    handle = model.out.register_forward_hook(lambda m, a, y: y.register_hook(seen.append) and None)
    found = lro.calibrate(
        model, [{"ids": ids, "attention_mask": mask}], mask="attention_mask", sensitivity=kind, forward=forward
    ).sensitivities["out"]
    handle.remove()
    rows = seen[0]
    assert not rows[mask == 0].any() and rows[mask == 1].all(-1).all()
    torch.testing.assert_close(found.second_moment, torch.einsum("nti,ntj->ij", rows, rows))
    assert found.count == (3 if kind == "output" else 10)  # sequences, or labels drawn


def test_masked_gradients_are_left_out() -> None:
    """A loss that does reach padded positions."""
    model = Tokens().double()
    batch = {"ids": torch.randint(11, (2, 3)), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    found = lro.calibrate(
        model, [batch], mask="attention_mask", sensitivity=lambda output, batch: output["last_hidden_state"].sum()
    ).sensitivities["out"]
    torch.testing.assert_close(found.second_moment, torch.full((4, 4), 5.0).double())


def test_save_load_and_merge(tmp_path: Path) -> None:
    model, batches = mlp(), labelled(4)
    whole, left, right = (
        lro.calibrate(model, part, forward=first, sensitivity=summed_loss)
        for part in (batches, batches[:1], batches[1:])
    )
    merged = left.merge(right)
    merged.save(tmp_path / "statistics.safetensors")
    loaded = lro.Covariances.load(tmp_path / "statistics.safetensors")
    assert list(loaded) == list(whole) and list(loaded.sensitivities) == list(whole.sensitivities)
    for fqn, expected in whole.sensitivities.items():
        assert loaded[fqn].output_gradients.count == expected.count == 28
        torch.testing.assert_close(loaded[fqn].output_gradients.second_moment, expected.second_moment)
        torch.testing.assert_close(loaded[fqn].second_moment, whole[fqn].second_moment)


def test_merge_names_a_missing_sensitivity() -> None:
    model, batches = mlp(), labelled()
    with pytest.raises(ValueError, match="gradient of 0"):
        lro.calibrate(model, batches, forward=first, sensitivity="fisher").merge(
            lro.calibrate(model, batches, forward=first)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sensitivity": "hessian"}, "'fisher', 'output', 'pooled'"),
        ({"sensitivity": "fisher", "probes": 0}, "probes must be a positive integer"),
        ({"sensitivity": lambda output, batch: 1.0}, "returned float"),
        ({"sensitivity": lambda output, batch: output.detach().sum()}, "depends on no layer"),
        ({"sensitivity": "fisher", "forward": lambda model, batch: (model(batch[0]), 3)[1]}, "found no tensor"),
    ],
)
def test_bad_arguments_are_explained(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lro.calibrate(mlp(), labelled(), **{"forward": first, **arguments})


def test_a_gradient_that_is_not_finite_is_named() -> None:
    def loss(output: Tensor, batch: list[Tensor]) -> Tensor:
        return (output - output.detach()).sqrt().sum()  # an infinite slope at zero

    with pytest.raises(lro.NonFiniteActivationError, match=r"layer '[024]': its gradient holds NaN or inf.*batch 0"):
        lro.calibrate(mlp(), labelled(), forward=first, sensitivity=loss)


def test_sensitivity_works_inside_no_grad_and_inference_mode() -> None:
    model, batches = mlp(), labelled()
    expected = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss).sensitivities
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = lro.calibrate(model, batches, forward=first, sensitivity=summed_loss).sensitivities
        assert all(torch.equal(found[fqn].second_moment, expected[fqn].second_moment) for fqn in expected)


# --- losses of one's own, inside calibration() ------------------------------------------------------------------


def own_losses(model, batches, observe=True):
    with lro.Calibrator(model, sensitivity=True) as covariances:
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels, reduction="sum")
            if observe:
                covariances.observe(loss, samples=len(labels))
    return covariances


def test_calibration_takes_losses_as_calibrate_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [(torch.randn(16, 6), torch.randint(4, (16,))) for _ in range(3)]
    found = own_losses(model, batches)
    expected = lro.calibrate(
        model,
        batches,
        forward=lambda model, batch: model(batch[0]),
        sensitivity=lambda output, batch: F.cross_entropy(output, batch[1], reduction="none"),
    )
    assert set(found.sensitivities) == {"0", "2"} and all(p.grad is None for p in model.parameters())
    for fqn, covariance in expected.sensitivities.items():
        assert found[fqn].output_gradients.count == covariance.count == 48
        torch.testing.assert_close(found[fqn].output_gradients.second_moment, covariance.second_moment)
    config = lro.CompressionConfig(lro.Ranks({"0": 3}), projection="loss")
    assert lro.compress_(model, found, config).layers[0].projection == "loss"


def test_several_losses_of_one_forward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    with lro.Calibrator(model, sensitivity=True) as covariances:
        y = model(torch.randn(5, 6))
        covariances.observe(y[:, 0].sum(), 5, keep=True)
        covariances.observe(3 * y[:, 1].sum(), 5)
    moment = covariances["0"].output_gradients.second_moment
    assert moment.diagonal().tolist() == [5, 45, 0, 0] and covariances["0"].output_gradients.count == 10


def test_losses_out_of_place():
    model = nn.Sequential(nn.Linear(6, 4))
    batches = [(torch.randn(5, 6), torch.randint(4, (5,)))]
    with pytest.warns(UserWarning, match="was given no loss; call observe inside its block") as warned:
        covariances = own_losses(model, batches, observe=False)
    assert warned[0].filename == __file__
    with pytest.raises(TypeError, match="sensitivity must be True or False here; got 'fisher'"):
        lro.Calibrator(model, sensitivity="fisher").__enter__()
    assert not covariances.sensitivities and covariances["0"].count == 5
    with pytest.raises(RuntimeError, match="inside a with block"):
        covariances.observe(torch.zeros(()), 1)
    with lro.Calibrator(model) as plain, pytest.raises(RuntimeError, match="sensitivity=True"):
        plain.observe(model(batches[0][0]).sum(), 5)
    with pytest.warns(UserWarning, match="was given no loss"), lro.Calibrator(model, sensitivity=True) as live:
        y = model(batches[0][0])
        with pytest.raises(ValueError, match=r"loss must be a scalar tensor, summed over samples; got \(5, 4\)"):
            live.observe(y, 5)
        with pytest.raises(ValueError, match="samples must be a positive integer; got 0"):
            live.observe(y.sum(), 0)
        with pytest.raises(ValueError, match="depends on no layer"):
            live.observe(torch.zeros(()), 5)
    with lro.Calibrator(model, sensitivity=True) as live:
        loss = model(batches[0][0]).sum()
        live.observe(loss, 5)
        with pytest.raises(ValueError, match="or its loss was taken already"):
            live.observe(loss, 5)


def of_pooled(values: Tensor, mask: Tensor | None, seed: int = 0) -> Tensor:
    values = values.detach().requires_grad_()
    torch.manual_seed(seed)
    found = objective("pooled", SimpleNamespace(last_hidden_state=values), None, mask)
    assert found.samples == len(values)
    return torch.autograd.grad(found.loss, values)[0]


def test_pooled_signs_meet_every_row_and_the_direction_of_the_mean() -> None:
    values = torch.randn(3, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    gradient = of_pooled(values, mask)
    assert not gradient[~mask].any()

    torch.manual_seed(0)
    of_rows = torch.randint_like(values, 2) * 2 - 1
    of_mean = gradient - of_rows * mask.unsqueeze(-1)  # the same at all rows of a sample
    for sample, real in enumerate(mask):
        shared = of_mean[sample][real]
        torch.testing.assert_close(shared, shared[:1].expand_as(shared))
        mean = values[sample][real].mean(0)
        assert abs(float(shared[0] @ mean)) < 1e-5  # the length of the mean does not matter
    signs = torch.stack([of_pooled(values, mask, seed)[0] for seed in range(300)])
    torch.testing.assert_close(signs.square().mean(), torch.tensor(1 + MEAN_SCALE**2 * (1 - 1 / 16)), atol=0.02, rtol=0)


def test_pooled_without_a_mask_takes_all_rows() -> None:
    values = torch.randn(2, 4, 6)
    assert torch.equal(of_pooled(values, None), of_pooled(values, torch.ones(2, 4).bool()))


@pytest.mark.parametrize(
    ("shape", "mask"), [((2, 6), None), ((2, 4, 6), (2, 3)), ((2, 3, 4, 6), None)], ids=["pooled", "mask", "four"]
)
def test_pooled_refuses_what_has_no_positions(shape: tuple[int, ...], mask: tuple[int, ...] | None) -> None:
    with pytest.raises(ValueError, match=r"needs an output \(batch, positions, features\)"):
        objective("pooled", torch.randn(shape), None, None if mask is None else torch.ones(mask).bool())


def test_pooled_gradients_leave_out_padding() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    rows, mask = torch.randn(3, 4, 6), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    other = torch.where(mask.bool().unsqueeze(-1), rows, torch.randn(3, 4, 6))
    found = []
    for x in (rows, other):
        torch.manual_seed(0)
        found.append(lro.calibrate(model, [x], sensitivity="pooled", mask=lambda args, kwargs: mask))
    for fqn, expected in found[0].sensitivities.items():
        assert expected.count == 3
        torch.testing.assert_close(found[1].sensitivities[fqn].second_moment, expected.second_moment)
