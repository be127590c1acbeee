"""Reconstruction with token weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.calibration import Moments
from lowrank_ops.calibration.statistics import LayerStatistics
from lowrank_ops.factors import Factors, factorize
from lowrank_ops.layers.replace import replace_
from lowrank_ops.models.layers import find_layers, input_rows
from lowrank_ops.reconstruction import SequentialReconstruction, sequential
from lowrank_ops.reconstruction.regression import PairedSums, reconstruct_layers
from lowrank_ops.subspaces import layer_subspaces
from tests.reconstruction.models import call, made, reconstruct, state_of


def cubed(output: Any, batch: Any) -> Tensor:
    """A loss without random numbers."""
    output = getattr(output, "last_hidden_state", getattr(output, "logits", output))
    return output.pow(3).sum()


def with_gradients(covariances: lro.Covariances) -> set[str]:
    """The layers that have output gradients."""
    return {fqn for fqn, layer in covariances.items() if layer.output_gradients is not None}


def by_loss(model: nn.Module, batches: list[Any], mask: str | None, loss: Any = cubed) -> tuple[Any, ...]:
    """Factors of rank 3 with ``projection="loss"``, and the covariances."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        covariances = lro.calibrate(model, batches, mask=mask, sensitivity=loss)
    layers = {fqn: layer for fqn, layer in find_layers(model)[0].items() if fqn in with_gradients(covariances)}
    spaces = layer_subspaces(layers, covariances)
    return {fqn: factorize(space, 3, "loss") for fqn, space in spaces.items()}, covariances


def rows_and_weights(
    dense: nn.Module, compressed: nn.Module, fqn: str, batch: Any, mask: str | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For every call of a layer: its input rows in both models, and |g|^2 over the mean in the sample."""
    layer = dense.get_submodule(fqn)
    xs, outputs = called(dense, fqn, batch)
    zs, _ = called(compressed, fqn, batch)
    found = []
    for x, z, y in zip(xs, zs, outputs, strict=True):
        assert y.grad is not None
        g = y.grad.movedim(1, -1) if isinstance(layer, nn.Conv2d) else y.grad
        real = torch.ones(g.shape[:-1], dtype=torch.bool)
        if mask is not None and g.dim() == 3:
            real = batch[mask].bool()
        squares = (g.square().sum(-1) * real).view(len(g), -1)
        means = squares.sum(1, keepdim=True) / real.view(len(g), -1).sum(1, keepdim=True)
        weights = (squares / means).view(real.shape)[real]
        rows = [part if isinstance(layer, nn.Conv2d) else part[real] for part in (x, z)]
        found.append((input_rows(layer, rows[0]).detach(), input_rows(layer, rows[1]).detach(), weights))
    return found


def called(model: nn.Module, fqn: str, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs and the outputs of one layer, which hold their gradients."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        inputs.append(args[0].clone())
        y.retain_grad()
        outputs.append(y)

    handle = model.get_submodule(fqn).register_forward_hook(see)
    cubed(call(model, batch), batch).backward()
    handle.remove()
    return inputs, outputs


@pytest.mark.parametrize("name", ["bert", "convolutions", "llama", "recurrent", "torch encoder", "vit"])
def test_same_as_running_whole_models(name: str) -> None:
    model, batches, mask = made(name)
    if name == "recurrent":  # rows of samples, so that weights vary within one
        batches = [(batch[0].view(8, 5, 6),) for batch in batches]
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # the loop below reads tensors after the run
    factors, statistics = by_loss(model, batches, mask)
    arguments: dict[str, Any] = {"mask": mask, "ridge": 1e-3, "statistics": statistics}
    found = reconstruct(model, factors, batches, sensitivity=cubed, **arguments)
    assert all(part.reconstructed for part in found.values())

    new = {fqn: part for fqn, part in factors.items() if len(called(model, fqn, batches[0])[0]) > 1}
    for fqn in factors:  # in the order of their calls
        compressed = replace_(copy.deepcopy(model), new)
        layer = {fqn: model.get_submodule(fqn)}
        pairs = PairedSums(layer, 1)
        for batch in batches:
            for x, z, weights in rows_and_weights(model, compressed, fqn, batch, mask):
                pairs.update(0, x, z, weights)
        pairs.finish()
        gradients = {fqn: statistics[fqn].output_gradients}
        new |= reconstruct_layers(pairs, {fqn: factors[fqn]}, gradients, centered=True, ridge=1e-3)
        product = new[fqn].up @ new[fqn].down
        torch.testing.assert_close(
            found[fqn].up @ found[fqn].down, product, rtol=1e-5, atol=1e-6 * float(product.abs().max()), msg=fqn
        )
        torch.testing.assert_close(found[fqn].bias, new[fqn].bias, rtol=1e-5, atol=1e-6, msg=fqn)
    unweighted = reconstruct(model, factors, batches, **arguments)
    assert any(
        not torch.allclose(found[fqn].up @ found[fqn].down, part.up @ part.down) for fqn, part in unweighted.items()
    )


def paired(*shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape).double() + 2
    return x, x + 0.3 * torch.randn(*shape).double()


@pytest.mark.parametrize("shapes", [[(8, 3)], [(8, 12)], [(8, 5), (8, 20)]])
def test_a_weight_of_two_counts_a_row_twice(shapes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    layers = {str(index): nn.Linear(*shape).double() for index, shape in enumerate(shapes)}
    x, z = paired(60, 8)
    times = torch.randint(0, 3, (60,))
    weighted, repeated = PairedSums(layers, 1), PairedSums(layers, 1)
    weighted.update(0, x, z, times / times.double().mean())
    repeated.update(0, x.repeat_interleave(times, 0), z.repeat_interleave(times, 0))
    for pairs in (weighted, repeated):
        pairs.finish()
    for fqn in layers:
        (one,), (other,) = weighted.of(fqn), repeated.of(fqn)
        assert one.rows == 60 and other.rows == times.sum()
        for ours, theirs in zip(one[:-1], other[:-1], strict=True):
            torch.testing.assert_close(ours / one.rows, theirs / other.rows)


class FirstPosition(nn.Module):
    """Only the first position reaches the output; the others have another distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, 0]


def first_rows(count: int) -> list[Any]:
    blurs = torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(1)).double() * torch.logspace(0, -1.5, 24)
    batches = []
    for _ in range(count):
        x = torch.randn(16, 9, 24).double()
        batches.append((torch.cat([x[:, :1] @ blurs[0], x[:, 1:] @ blurs[1]], dim=1),))
    return batches


@torch.no_grad()
def test_rows_without_effect_on_the_loss_are_not_fitted() -> None:
    torch.manual_seed(0)
    model, batches = FirstPosition().double(), first_rows(20)
    factors, statistics = by_loss(model, batches, None, "output")
    errors = {}
    for sensitivity in (None, "output"):
        found = reconstruct(model, factors, batches, statistics=statistics, sensitivity=sensitivity)
        compressed = replace_(copy.deepcopy(model), found)
        errors[sensitivity] = sum(
            float((compressed(*batch) - model(*batch)).square().sum()) for batch in first_rows(20)
        )
    assert errors["output"] < 0.9 * errors[None]


def test_output_factors_ignore_token_weights() -> None:
    model, batches, _ = made("vit")
    factors, statistics = by_loss(model, batches, None)
    mixed = {
        fqn: part if index % 2 else Factors(part.down, part.up, part.bias, part.rank, "output", None, 0.0)
        for index, (fqn, part) in enumerate(factors.items())
    }
    first = next(iter(mixed))
    found = [reconstruct(model, mixed, batches, statistics=statistics, sensitivity=loss) for loss in (cubed, None)]
    assert torch.equal(found[0][first].down, found[1][first].down)
    assert sum(not torch.allclose(found[0][fqn].up, found[1][fqn].up) for fqn in mixed) > 0


class DeadBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.aside = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.second(self.first(x).tanh())


def test_rows_without_a_gradient_are_unweighted() -> None:
    torch.manual_seed(0)
    model, batches = DeadBranch().double(), [(torch.randn(40, 6).double(),) for _ in range(3)]
    factors, statistics = by_loss(model, batches, None)
    zero = Moments(torch.zeros(6, 6).double(), torch.zeros(6).double(), 1)
    factors["aside"] = Factors(torch.zeros(3, 6), torch.zeros(6, 3), model.aside.bias, 3, "loss", None, 0.0)
    arguments: dict[str, Any] = {
        "statistics": {**statistics, "aside": LayerStatistics("input", statistics["aside"].activations, zero)},
        "ridge": 0,
    }
    with pytest.warns(UserWarning, match="output gradients do not correspond row by row .*: aside$"):
        found = reconstruct(model, factors, batches, sensitivity=cubed, **arguments)
    plain = reconstruct(model, factors, batches, **arguments)["aside"]
    torch.testing.assert_close(found["aside"].up @ found["aside"].down, plain.up @ plain.down)
    torch.testing.assert_close(found["aside"].bias, plain.bias)


@pytest.mark.parametrize("ridge", [None, 0.1])
def test_halves_of_a_single_batch_have_weights_of_mean_1(ridge: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The halves split samples, whose weights have a mean of 1 only as a whole."""
    torch.manual_seed(0)
    model, batches = FirstPosition().double(), [first_rows(1)[0][0][:1].clone()]
    factors, statistics = by_loss(model, batches, None, lambda output, batch: output.pow(3).sum())
    seen_weights: list[Tensor] = []
    update = PairedSums.update

    def seen(pairs: PairedSums, fold: int, x: Tensor, z: Tensor, weights: Tensor | None = None) -> None:
        seen_weights.append(weights)
        update(pairs, fold, x, z, weights)

    monkeypatch.setattr(PairedSums, "update", seen)
    found = reconstruct(
        model, factors, batches, statistics=statistics, sensitivity=lambda y, batch: y.pow(3).sum(), ridge=ridge
    )
    assert len(seen_weights) == (8 if ridge is None else 4)
    assert all(float(part.mean()) == pytest.approx(1) for part in seen_weights)
    assert all(part.up.isfinite().all() and part.bias.isfinite().all() for part in found.values())


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, mask = made("vit")
    factors, statistics = by_loss(model, batches, mask, "fisher")
    arguments: dict[str, Any] = {"statistics": statistics, "sensitivity": "fisher"}
    unbroken = reconstruct(model, factors, batches, **arguments)
    fitted = 0

    def counting(pairs: PairedSums, *args: Any, **kwargs: Any) -> dict[str, Factors]:
        nonlocal fitted
        fitted += 1
        if fitted == 5:
            raise InterruptedError
        return reconstruct_layers(pairs, *args, **kwargs)

    path = tmp_path / "factors.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "reconstruct_layers", counting)
        with pytest.raises(InterruptedError):
            reconstruct(model, factors, batches, checkpoint=path, **arguments)
    torch.manual_seed(12345)
    found = reconstruct(model, factors, batches, checkpoint=path, **arguments)
    for fqn, part in unbroken.items():
        assert torch.equal(found[fqn].down, part.down) and torch.equal(found[fqn].up, part.up)
    with pytest.raises(ValueError, match="is of another run: its sensitivity differ"):
        reconstruct(model, factors, batches, checkpoint=path, statistics=statistics)


def test_bad_losses_leave_the_model_unchanged() -> None:
    model, batches, _ = made("vit")
    factors, statistics = by_loss(model, batches, None)
    model.train()
    before, random = state_of(model), torch.get_rng_state()

    def run(sensitivity: Any) -> Callable[[], object]:
        return reconstruct(model, factors, batches, statistics=statistics, sensitivity=sensitivity)

    with pytest.raises(ValueError, match=r"sensitivity must be a function loss\(output, batch\), or one of"):
        run("loss")
    with pytest.raises(
        lro.NonFiniteActivationError, match=r"layer '.*': its output gradient holds NaN or inf in batch 0 "
    ):
        run(lambda output, batch: output.sum() * torch.inf)
    with pytest.raises(ValueError, match="depends on no layer"):
        run(lambda output, batch: torch.zeros(()))
    run("fisher")
    assert state_of(model) == before and torch.equal(random, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_compress_passes_the_sensitivity_on(frozen: bool) -> None:
    """Also in inference mode, and to models whose parameters are frozen."""
    model, batches, mask = made("bert")
    model.requires_grad_(not frozen)
    covariances = lro.calibrate(model, batches, mask=mask, sensitivity="pooled")
    config = lro.CompressionConfig(lro.Ranks({"re:.*": 4}), projection="loss")
    products = []
    for sensitivity in (None, "pooled"):
        student = copy.deepcopy(model)
        with torch.inference_mode():
            report = lro.compress_(
                student,
                covariances,
                config,
                filter_fn=lambda module, fqn: fqn in with_gradients(covariances),
                reconstruction=SequentialReconstruction(batches, mask=mask, sensitivity=sensitivity),
            )
        assert all(layer.reconstructed for layer in report.layers if layer.rank is not None)
        products.append(torch.cat([p.flatten() for name, p in student.named_parameters() if "up" in name]))
    assert not torch.allclose(*products)


def test_nested_tensors_of_an_encoder_are_avoided() -> None:
    """nn.TransformerEncoder's fast path uses nested tensors where nothing needs a gradient."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).eval()
    encoder.requires_grad_(False)
    batches = []
    for _ in range(3):
        padding = torch.arange(7) >= torch.randint(2, 8, (5, 1))
        batches.append({"src": torch.randn(5, 7, 16), "src_key_padding_mask": padding})
    mask: Callable[..., Tensor] = lambda args, kwargs: ~kwargs["src_key_padding_mask"]  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        covariances = lro.calibrate(encoder, batches, mask=mask, sensitivity="output")
        layers = {fqn: layer for fqn, layer in find_layers(encoder)[0].items() if fqn in covariances}
        spaces = layer_subspaces(layers, covariances)
        factors = {fqn: factorize(space, 4, "loss").to(torch.float32) for fqn, space in spaces.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="output gradients do not correspond")
        warnings.filterwarnings("error", message="these layers are not reconstructed")
        found = reconstruct(encoder, factors, batches, covariances, mask=mask, sensitivity="output")
    assert all(part.reconstructed and part.up.isfinite().all() for part in found.values())
