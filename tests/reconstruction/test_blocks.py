"""Block-wise reconstruction lowers the error of the whole model, counts real rows only, and worsens no block."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.factors import Factors
from lowrank_ops.layers.replace import replace_
from lowrank_ops.reconstruction import BlockReconstruction, blocks, reconstruct_blocks
from tests.reconstruction.models import MODELS, Residual, call, deep, made, one_shot, state_of


def trained(model: nn.Module, factors: dict[str, Factors], batches: Any, **settings: Any) -> dict[str, Factors]:
    return reconstruct_blocks(model, factors, BlockReconstruction(batches, **settings))


@torch.no_grad()
def error(model: nn.Module, factors: dict[str, Factors], batches: Any) -> float:
    """Of the whole model's output."""
    compressed = replace_(copy.deepcopy(model), factors)
    return float(sum((call(model, batch) - call(compressed, batch)).square().mean() for batch in batches))


@pytest.mark.parametrize("sensitivity", [None, "output"])
def test_lowers_the_error_on_other_batches(sensitivity: str | None) -> None:
    model, draw = deep(4)
    batches, others = draw(8), draw(4)
    factors = one_shot(model, batches, None, rank=6)
    found = trained(model, factors, batches, sensitivity=sensitivity, lr=1e-2)
    before, after = (error(model, part, others) for part in (factors, found))
    assert after < 0.95 * before, (before, after)
    assert list(found) == list(factors)
    for fqn, part in found.items():
        assert part.down.shape == factors[fqn].down.shape and part.up.shape == factors[fqn].up.shape
        assert not part.reconstructed or (part.predicted_error is None and part.predicted_loss is None)


@pytest.mark.parametrize(
    "name", sorted(name for name, (_, _, chains) in MODELS.items() if chains and name != "two towers")
)
def test_every_architecture_is_left_as_it_was(name: str) -> None:
    model, batches, mask = made(name)
    factors = one_shot(model, batches, mask)
    before, values = state_of(model), copy.deepcopy(model.state_dict())
    found = trained(model, factors, batches, mask=mask, lr=1e-2, sensitivity="output")
    assert any(part.reconstructed for part in found.values())
    assert state_of(model) == before
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    replace_(model, found)
    call(model, batches[0])


def divergence(model: nn.Module, factors: dict[str, Factors], batches: Any) -> float:
    """Of the whole model's distributions from the dense model's, by torch's own classes."""
    compressed = replace_(copy.deepcopy(model), factors)
    with torch.no_grad():
        p, q = (torch.cat([call(part, batch) for batch in batches]).softmax(-1) for part in (model, compressed))
    return float(torch.distributions.kl_divergence(*(torch.distributions.Categorical(x) for x in (p, q))).mean())


@pytest.mark.parametrize("together", [1, 3])
def test_logits_as_the_target_lower_the_divergence(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draw = deep(4)
    batches, others = draw(8), draw(4)
    factors = one_shot(model, batches, None, rank=6)
    run, windows, seen = blocks._train, [], []

    def watched(runs: Any, window: Any, *args: Any) -> Any:
        windows.append([index for _, index in window])
        seen.extend(float((runs.dense_output(b) - call(model, batch)).abs().max()) for b, batch in enumerate(batches))
        return run(runs, window, *args)

    monkeypatch.setattr(blocks, "_train", watched)
    found = trained(model, factors, batches, target="logits", together=together, lr=1e-2)
    assert windows == ([[0], [1], [2], [3]] if together == 1 else [[0, 1, 2], [3]])
    assert max(seen) < 1e-12
    assert divergence(model, found, others) < 0.92 * divergence(model, factors, others)


class ReadsItsInput(nn.Module):
    """What follows the blocks reads a value that the first block has stored."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Residual() for _ in range(2)), nn.Linear(8, 3)
        self.blocks[0].register_forward_hook(lambda module, args, output: setattr(self, "kept", output))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.kept)


def test_the_dense_logits_are_those_of_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = ReadsItsInput().double(), [(torch.randn(20, 8).double(),) for _ in range(3)]
    expected = [call(model, batch) for batch in batches]
    factors = {f: part for f, part in one_shot(model, batches, None).items() if f != "head"}

    def watched(runs: Any, window: Any, given: Any, *args: Any) -> dict[str, Factors]:
        for index in (2, 0, 1):
            torch.testing.assert_close(runs.dense_output(index), expected[index])
        return {fqn: part for fqn, (_, part) in given.items()}

    monkeypatch.setattr(blocks, "_train", watched)
    trained(model, factors, batches, target="logits")


def test_logits_as_the_target_need_logits() -> None:
    model, batches, mask = made("bert")
    with pytest.raises(ValueError, match=r"target=.logits. needs logits .* or target=.block."):
        trained(model, one_shot(model, batches, mask), batches, mask=mask, target="logits")


def test_windows_stay_in_their_chain() -> None:
    order = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 2)]
    assert blocks._windows(order, 2) == [(order[0], order[1]), (order[2],), (order[3], order[4])]


def test_blocks_that_write_to_their_input_are_refused() -> None:
    model, batches, _ = made("two towers")
    with pytest.raises(ValueError, match=r"block 'decoder\.0' cannot be trained: .*inplace operation"):
        trained(model, one_shot(model, batches, None), batches)


def test_a_model_without_blocks_is_refused() -> None:
    model, batches, _ = made("skips")
    with pytest.raises(ValueError, match="the model has no blocks to reconstruct"):
        trained(model, one_shot(model, batches, None), batches)


def test_a_block_that_gets_no_better_keeps_its_factors() -> None:
    model, draw = deep(2)
    batches = draw(4)
    factors = one_shot(model, batches, None, rank=6)
    found = trained(model, factors, batches, lr=100.0)
    assert all(found[fqn] is part for fqn, part in factors.items())


def test_padding_does_not_count() -> None:
    model, batches, mask = made("bert")
    factors = one_shot(model, batches, mask)
    others = [{**batch, "input_ids": batch["input_ids"] + 7 * (1 - batch[mask])} for batch in batches]
    found = [trained(model, factors, part, mask=mask, lr=1e-2) for part in (batches, others)]
    for fqn, part in found[0].items():
        torch.testing.assert_close(found[1][fqn].down, part.down)
        torch.testing.assert_close(found[1][fqn].up, part.up)


def test_the_metric_is_the_damped_moment_of_the_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), Residual(), nn.Linear(8, 3)).double()
    batches = [torch.randn(20, 8).double() for _ in range(3)]

    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.pow(3).sum(-1)

    found = blocks._output_metrics(model, [("", 0)], batches, BlockReconstruction(batches, sensitivity=loss), False)
    moment = torch.zeros(8, 8).double()
    for batch in batches:
        y = model[0](batch).detach().requires_grad_()
        gradient = torch.autograd.grad(loss(model[2](model[1](y)), None).sum(), y)[0]
        moment += gradient.mT @ gradient
    metric = found["", 0].double()
    expected = moment / moment.diagonal().mean() + blocks.DAMPING * torch.eye(8)
    torch.testing.assert_close(metric @ metric.mT, expected, rtol=1e-5, atol=1e-6)


def test_frozen_models_have_a_metric_as_well() -> None:
    model, batches, mask = made("llama")
    settings = BlockReconstruction(batches, sensitivity="fisher", mask=mask)
    places = [("model.layers", 0), ("model.layers", 1)]
    expected = blocks._output_metrics(model, places, batches, settings, False)
    frozen = blocks._output_metrics(model.requires_grad_(False), places, batches, settings, False)
    for place in places:
        torch.testing.assert_close(frozen[place], expected[place])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_trained_in_float32(dtype: torch.dtype) -> None:
    model, draw = deep(2)
    model, batches = model.to(dtype), [(batch[0].to(dtype),) for batch in draw(8)]
    factors = {fqn: part.to(dtype) for fqn, part in one_shot(model, batches, None, rank=6).items()}
    found = trained(model, factors, batches, lr=1e-3, epochs=8)
    assert any(part.reconstructed for part in found.values())
    assert all(part.down.dtype == dtype for part in found.values())


def test_a_rate_that_is_too_high_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    model, draw = deep(2)
    batches, others = draw(8), draw(4)
    factors = one_shot(model, batches, None, rank=6)
    run, rates = blocks._epochs, []

    def epochs(*args: Any) -> Any:
        rates.append(args[-1])
        return run(*args)

    monkeypatch.setattr(blocks, "_epochs", epochs)
    found = trained(model, factors, batches, lr=0.3)
    assert set(rates) == {0.3, 0.3 / 4} and error(model, found, others) < error(model, factors, others)
    assert any(part.reconstructed for part in found.values())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_mixed_precision_is_that_of_the_settings(autocast: torch.dtype | None) -> None:
    model, draw = deep(2)
    model, batches = model.float(), [(batch[0].float(),) for batch in draw(8)]
    factors = one_shot(model, batches, None, rank=6)
    found = trained(model, factors, batches, lr=1e-3, autocast=autocast)
    assert all(part.reconstructed and part.down.dtype == torch.float32 for part in found.values())
    with torch.autocast("cpu", torch.bfloat16):  # whose copies of weights would be those before training
        inside = trained(model, factors, batches, lr=1e-3, autocast=autocast)
    assert all(torch.equal(part.down, inside[fqn].down) for fqn, part in found.items())


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("target", ["block", "logits"])
def test_a_resumed_run_ends_with_the_same_bits(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draw = deep(6 if target == "logits" else 3)
    batches = draw(4)
    factors = one_shot(model, batches, None, rank=6)
    settings: Any = {"target": target, "together": 2 if target == "logits" else 1}
    unbroken = trained(model, factors, batches, **settings)
    run, done = blocks._train, []

    def interrupted(runs: Any, window: Any, *args: Any) -> Any:
        done.append(window[0][1])
        if len(done) == 2:
            raise Interrupt
        return run(runs, window, *args)

    monkeypatch.setattr(blocks, "_train", interrupted)
    path = tmp_path / "factors.safetensors"
    with pytest.raises(Interrupt):
        trained(model, factors, batches, checkpoint=path, **settings)
    found = trained(model, factors, batches, checkpoint=path, **settings)
    assert done == [index * settings["together"] for index in (0, 1, 1, 2)]
    for fqn, part in unbroken.items():
        assert torch.equal(found[fqn].down, part.down) and torch.equal(found[fqn].up, part.up)
        assert found[fqn].reconstructed == part.reconstructed
    with pytest.raises(ValueError, match="is of another run: its epochs differ"):
        trained(model, factors, batches, epochs=2, checkpoint=path, **settings)
    with pytest.raises(ValueError, match="is of another run: its start differ"):
        trained(
            model, {fqn: part.to(torch.float32) for fqn, part in factors.items()}, batches, checkpoint=path, **settings
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be positive; got 0"),
        ({"together": 0}, "together must be positive; got 0"),
        ({"target": "output"}, "target must be one of 'block', 'logits'; got 'output'"),
        ({"target": "logits", "sensitivity": "fisher"}, "sensitivity weights the error of target='block'; leave it"),
        ({"lr": -1.0}, "lr must be positive; got -1"),
        ({"held_out": 1.0}, "held_out must be a number in"),
        ({"autocast": torch.float16}, "autocast must be None or torch.bfloat16"),
        ({"sensitivity": "labels"}, "sensitivity must be a function"),
        ({"blocks": "nowhere"}, "blocks must name ModuleLists or Sequentials"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    model, draw = deep(2)
    batches = draw(2)
    with pytest.raises(ValueError, match=message):
        trained(model, one_shot(model, batches, None), batches, **settings)


def test_one_batch_is_refused() -> None:
    model, draw = deep(2)
    batches = draw(1)
    with pytest.raises(ValueError, match="needs at least 2 batches"):
        trained(model, one_shot(model, batches, None), batches)


def test_nan_names_the_block() -> None:
    model, draw = deep(2)
    batches = draw(3)
    factors = one_shot(model, batches, None)
    bad = [*batches, (torch.full((4, 32), float("nan")).double(),)]
    before = state_of(model)
    for sensitivity in (None, "output"):
        with pytest.raises(lro.NonFiniteActivationError, match=r"block '(0|1)'"):
            trained(model, factors, bad, sensitivity=sensitivity)
    assert state_of(model) == before


def test_compress_reports_what_was_reconstructed() -> None:
    model, draw = deep(3)
    batches = draw(8)
    covariances = lro.calibrate(model, batches)
    ranks = lro.Ranks({"0.0": 6, "1.0": 6, "2.0": 6})
    report = lro.compress_(model, covariances, ranks, reconstruction=BlockReconstruction(batches, lr=1e-2))
    assert report.config.reconstruction == "blocks"
    assert any(layer.reconstructed for layer in report.layers)
    assert lro.CompressionConfig.from_json(report.config.to_json()) == report.config
    with pytest.raises(ValueError, match=r"pass compress_\(\.\.\., reconstruction=BlockReconstruction\(batches\)\)"):
        lro.compress_(deep(3)[0], covariances, lro.CompressionConfig(ranks, reconstruction="blocks"))
    with pytest.raises(ValueError, match=r"='sequential' and reconstruction=BlockReconstruction\(\.\.\.\)"):
        config = lro.CompressionConfig(ranks, reconstruction="sequential")
        lro.compress_(deep(3)[0], covariances, config, reconstruction=BlockReconstruction(batches))
