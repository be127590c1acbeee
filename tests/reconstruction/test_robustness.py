"""Reconstruction inside compress_, on errors, from a checkpoint, and with invalid arguments."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.factors import Factors
from lowrank_ops.reconstruction import SequentialReconstruction, sequential
from lowrank_ops.reconstruction.regression import PairedSums, reconstruct_layers
from tests.reconstruction.models import deep, made, one_shot, reconstruct, state_of
from tests.rewriting import rewrite


@pytest.mark.parametrize("policy", ["budget", "search"])
def test_compress_reconstructs_reports_and_saves(policy: str, tmp_path: Path) -> None:
    model, draw = deep()
    dense, batches = copy.deepcopy(model), draw(8)
    covariances = lro.calibrate(model, batches, sensitivity="output")
    fresh = torch.cat([batch[0] for batch in draw(5)])

    def closeness(model: nn.Module) -> float:
        with torch.no_grad():
            return -float((model(fresh) - dense(fresh)).square().mean())

    config = lro.CompressionConfig(lro.ParameterBudget(0.6), overrides={"5.0": None})
    if policy == "search":
        ranks = lro.search_ranks(model, covariances, closeness, 0.01, config=config)
        config = dataclasses.replace(config, rank=ranks)
    report = lro.compress_(model, covariances, config, reconstruction=SequentialReconstruction(batches))
    changed = [layer for layer in report.layers if layer.rank is not None]
    assert changed and all(layer.reconstructed and layer.projection == "loss" for layer in changed)
    assert all(layer.predicted_loss is None and layer.predicted_error > 0 for layer in changed)
    assert "not reconstructed" not in report.table()
    assert isinstance(model[5][0], nn.Linear)

    plain = copy.deepcopy(dense)
    ranks = lro.Ranks({layer.fqn: layer.rank for layer in changed})
    lro.compress_(plain, covariances, lro.CompressionConfig(ranks, projection="loss"))
    assert closeness(model) > closeness(plain)

    lro.save_pretrained(model, tmp_path, report)
    loaded = lro.load_pretrained(copy.deepcopy(dense), tmp_path)
    torch.testing.assert_close(loaded(fresh), model(fresh), rtol=0, atol=0)
    again = lro.CompressionConfig.from_dict(report.config.to_dict())
    assert again == report.config and again.reconstruction == "sequential"


class Interrupt(Exception):
    """A full disk, or Ctrl-C."""


def test_an_error_leaves_the_model_untouched() -> None:
    model, draw = deep()
    model[2].train()
    batches = draw(3)
    covariances = lro.calibrate(model, batches)
    before, values = state_of(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    ranks = lro.Ranks({"re:.*": 4})

    def failing(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 70:
            raise Interrupt
        return model(*batch)

    calls = 0
    with pytest.raises(Interrupt):
        lro.compress_(model, covariances, ranks, reconstruction=SequentialReconstruction(batches, forward=failing))
    assert state_of(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())

    bad = [*batches, (torch.full((4, 32), float("nan")).double(),)]
    with pytest.raises(lro.NonFiniteActivationError, match=r"layer '0\.0': its input holds NaN or inf"):
        lro.compress_(model, covariances, ranks, reconstruction=SequentialReconstruction(bad))
    assert state_of(model) == before


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draw = deep()
    batches = draw(4)
    factors = one_shot(model, batches, None, rank=12)
    unbroken = reconstruct(model, factors, batches)
    fitted: list[str] = []

    def counting(pairs: PairedSums, *args: Any, **kwargs: Any) -> dict[str, Factors]:
        fitted.extend(pairs.layers)
        if len(fitted) == 4:
            raise Interrupt
        return reconstruct_layers(pairs, *args, **kwargs)

    monkeypatch.setattr(sequential, "reconstruct_layers", counting)
    path = tmp_path / "factors.safetensors"
    with pytest.raises(Interrupt):
        reconstruct(model, factors, batches, checkpoint=path)
    assert fitted == ["0.0", "1.0", "2.0", "3.0"]
    for expected in (["3.0", "4.0", "5.0"], []):  # the rest, and then nothing
        fitted[:] = ["-"] * 10
        found = reconstruct(model, factors, batches, checkpoint=path)
        assert fitted[10:] == expected
        for fqn, part in unbroken.items():
            assert torch.equal(found[fqn].down, part.down) and torch.equal(found[fqn].up, part.up)
            assert torch.equal(found[fqn].bias, part.bias) and found[fqn].predicted_error == part.predicted_error
    assert [file.name for file in tmp_path.iterdir()] == ["factors.safetensors"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    model, draw = deep(2)
    batches = draw(2)
    factors = one_shot(model, batches, None)
    path = tmp_path / "factors.safetensors"
    reconstruct(model, factors, batches, checkpoint=path)
    with pytest.raises(ValueError, match=r"is of another run: its ranks differ\. Use the same arguments"):
        reconstruct(model, one_shot(model, batches, None, rank=4), batches, checkpoint=path)
    with pytest.raises(ValueError, match="its batches, ridge differ"):
        reconstruct(model, factors, batches[:1], ridge=0, checkpoint=path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1][0].weight[0] += 1
    with pytest.raises(ValueError, match="its weights differ"):
        reconstruct(other, factors, batches, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read: .*\. Delete it"):
        reconstruct(model, factors, batches, checkpoint=path)
    with pytest.raises(ValueError, match="in a folder that does not exist"):
        reconstruct(model, factors, batches, checkpoint=tmp_path / "no" / "file")
    lro.calibrate(model, batches).save(path)
    with pytest.raises(ValueError, match="its format is"):
        reconstruct(model, factors, batches, checkpoint=path)


def test_another_mask_or_forward_is_another_run(tmp_path: Path) -> None:
    model, batches, mask = made("bert")
    factors = one_shot(model, batches, mask)
    path = tmp_path / "factors.safetensors"
    reconstruct(model, factors, batches, mask=mask, checkpoint=path)
    with pytest.raises(ValueError, match="its mask differ"):
        reconstruct(model, factors, batches, checkpoint=path)
    with pytest.raises(ValueError, match="its forward differ"):
        reconstruct(model, factors, batches, mask=mask, forward=lambda model, batch: model(**batch), checkpoint=path)


def test_other_statistics_are_another_run(tmp_path: Path) -> None:
    """Their output gradients are the metric of factors by loss."""
    model, draw = deep()
    ranks, checkpoint = lro.CompressionConfig(lro.ParameterBudget(0.6, "uniform")), tmp_path / "factors.safetensors"
    first, second = (lro.calibrate(model, batches, sensitivity="output") for batches in (draw(4), draw(4)))
    batches = draw(4)
    for covariances, differs in ((first, False), (first, False), (second, True)):
        reconstruction = SequentialReconstruction(batches, checkpoint=checkpoint)
        with pytest.raises(ValueError, match="its statistics differ") if differs else contextlib.nullcontext():
            lro.compress_(copy.deepcopy(model), covariances, ranks, reconstruction=reconstruction)


def test_another_loss_is_another_run(tmp_path: Path) -> None:
    """Functions are compared by their code and by what they read."""
    model, batches, mask = made("vit")
    factors = one_shot(model, batches, mask)
    path = tmp_path / "factors.safetensors"

    def loss(output: Any) -> torch.Tensor:
        return output.square().sum()

    def scaled(by: float) -> Callable[[Any, Any], torch.Tensor]:
        return lambda output, batch: by * loss(output)

    reconstruct(model, factors, batches, sensitivity=scaled(1.0), checkpoint=path)
    reconstruct(model, factors, batches, sensitivity=scaled(1.0), checkpoint=path)
    for other in (scaled(2.0), lambda output, batch: output.sum(), "output"):
        with pytest.raises(ValueError, match="its sensitivity differ"):
            reconstruct(model, factors, batches, sensitivity=other, checkpoint=path)


def test_every_value_of_weights_and_batches_counts(tmp_path: Path) -> None:
    model, draw = deep(2)
    batches = draw(2)
    factors = one_shot(model, batches, None)
    path = tmp_path / "factors.safetensors"
    reconstruct(model, factors, batches, checkpoint=path)
    others = copy.deepcopy(batches)
    others[1][0][-1, -1] += 1e-6
    with pytest.raises(ValueError, match="its batches differ"):
        reconstruct(model, factors, others, checkpoint=path)
    for name in ("weight", "bias"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            getattr(other[1][0], name).view(-1)[-1] += 1e-6
        with pytest.raises(ValueError, match="its weights differ"):
            reconstruct(other, factors, batches, checkpoint=path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.update(settings=[]),
        lambda header, tensors: header.pop("layers"),
        lambda header, tensors: header.update(layers=3),
        lambda header, tensors: tensors.update({"0.0.bias": torch.zeros(3)}),
        lambda header, tensors: tensors.update({"0.0.bias": torch.zeros(())}),
        lambda header, tensors: header["layers"]["0.0"].update(more=1),
        lambda header, tensors: header["layers"]["0.0"].update(rank=99),
        lambda header, tensors: header["layers"]["0.0"].update(output_variance="1"),
        lambda header, tensors: header["layers"].update(other=header["layers"]["0.0"]),
        lambda header, tensors: tensors.pop("0.0.down"),
        lambda header, tensors: tensors.update({"0.0.down": torch.zeros(3, 3)}),
        lambda header, tensors: tensors.update({"0.0.up": tensors["0.0.up"] * float("nan")}),
        lambda header, tensors: tensors.update({"0.0.up": tensors["0.0.up"].long()}),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path: Path, change: Any) -> None:
    model, draw = deep(2)
    batches = draw(2)
    factors = one_shot(model, batches, None)
    path = tmp_path / "factors.safetensors"
    reconstruct(model, factors, batches, checkpoint=path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=r"factors\.safetensors' .*[Dd]elete it to start again"):
        reconstruct(model, factors, batches, checkpoint=path)


def test_bad_arguments_are_refused() -> None:
    model, draw = deep(2)
    batches = draw(2)
    factors, covariances = one_shot(model, batches, None), lro.calibrate(model, batches)
    config = lro.CompressionConfig(reconstruction="sequential")
    with pytest.raises(ValueError, match=r"reconstruction='sequential' runs the model: pass compress_\(\.\.\., recon"):
        lro.compress_(model, covariances, config)
    with pytest.raises(TypeError, match=r"reconstruction must be a SequentialReconstruction\(batches\), .* or None"):
        lro.compress_(model, covariances, reconstruction=batches)
    with pytest.raises(ValueError, match="reconstruction must be one of None, 'sequential', 'blocks'; got 'blockwise'"):
        lro.CompressionConfig(reconstruction="blockwise")
    with pytest.raises(ValueError, match="projection='weight' ignores it"):
        lro.CompressionConfig(projection="weight", reconstruction="sequential")
    with pytest.raises(TypeError, match=r"batches must be a collection of batches, .*; got one Tensor"):
        reconstruct(model, factors, batches[0][0])
    with pytest.raises(ValueError, match="batches was empty"):
        reconstruct(model, factors, iter([]))
    for ridge in ("much", True):
        with pytest.raises(TypeError, match="ridge must be a number or None; got "):
            lro.SequentialReconstruction(batches, ridge=ridge)
    for ridge in (-1, float("nan")):
        with pytest.raises(ValueError, match="ridge must be None or a non-negative number"):
            reconstruct(model, factors, batches, ridge=ridge)
    by_loss = {fqn: dataclasses.replace(part, projection="loss") for fqn, part in factors.items()}
    with pytest.raises(ValueError, match=r"which 0\.0, 1\.0 lack; pass the covariances of a cal"):
        reconstruct(model, by_loss, batches)
    with pytest.raises(ValueError, match="model is itself the layer to reconstruct"):
        reconstruct(model[0][0], {"": factors["0.0"]}, batches)
    with pytest.raises(ValueError, match="model cannot be reconstructed: it is compiled"):
        reconstruct(torch.compile(model), factors, batches)
    with pytest.raises(ValueError, match=r"factors names layers that cannot be replaced: 'no'"):
        reconstruct(model, {"no": factors["0.0"]}, batches)
    assert reconstruct(model, {}, batches) == {}
    torch.testing.assert_close(
        reconstruct(model, factors, iter(batches))["1.0"].down,
        reconstruct(model, factors, batches)["1.0"].down,
    )
