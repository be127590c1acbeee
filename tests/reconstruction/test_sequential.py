"""Sequential reconstruction gives what a plain loop over whole models gives, for any model."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.factors import Factors, factorize
from lowrank_ops.layers.replace import replace_
from lowrank_ops.models.layers import find_layers, input_rows
from lowrank_ops.models.masks import Masks
from lowrank_ops.reconstruction import SequentialReconstruction
from lowrank_ops.reconstruction.paired_runs import PairedRuns, find_chains
from lowrank_ops.reconstruction.regression import PairedSums, reconstruct_layers
from lowrank_ops.subspaces import layer_subspaces
from tests.reconstruction.models import MODELS, assert_same, call, deep, made, one_shot, reconstruct


@torch.no_grad()
def by_whole_models(
    model: nn.Module, factors: dict[str, Factors], batches: list[Any], mask: str | None, ridge: float
) -> dict[str, Factors]:
    """The plain loop: both models run whole for each layer in order."""
    order: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, fqn=fqn: order.append(fqn))
        for fqn, layer in find_layers(model)[0].items()
    ]
    call(model, batches[0])
    for handle in handles:
        handle.remove()
    repeated = {fqn for fqn in factors if order.count(fqn) > 1}
    new: dict[str, Factors] = {fqn: factors[fqn] for fqn in repeated}
    for fqn in dict.fromkeys(name for name in order if name in factors):
        compressed = replace_(copy.deepcopy(model), {name: part for name, part in new.items() if name != ""})
        seen: dict[str, list[Tensor]] = {"dense": [], "compressed": []}
        for kind, run in (("dense", model), ("compressed", compressed)):
            layer = run.get_submodule(fqn)
            for batch in batches:
                rows: list[Tensor] = []
                handle = layer.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[0].clone()))
                call(run, batch)
                handle.remove()
                for x in rows:
                    real = mask is not None and x.dim() == 3 and x.shape[:2] == batch[mask].shape
                    seen[kind].append(input_rows(model.get_submodule(fqn), x[batch[mask].bool()] if real else x))
        pairs = PairedSums({fqn: model.get_submodule(fqn)}, 1)
        pairs.update(0, torch.cat(seen["dense"]), torch.cat(seen["compressed"]))
        pairs.finish()
        new.update(reconstruct_layers(pairs, {fqn: factors[fqn]}, {}, centered=True, ridge=ridge))
    return new


@pytest.mark.parametrize("name", sorted(MODELS))
def test_same_as_running_whole_models(name: str) -> None:
    model, batches, mask = made(name)
    factors = one_shot(model, batches, mask)
    assert len(factors) > 2
    found = reconstruct(model, factors, batches, mask=mask, ridge=1e-3)
    assert_same(found, by_whole_models(model, factors, batches, mask, ridge=1e-3))
    assert list(found) == list(factors)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_passed_blocks_are_not_run_again(name: str) -> None:
    model, batches, mask = made(name)
    layers, _ = find_layers(model)
    with PairedRuns(model, layers, batches, call, Masks(model, mask), find_chains(model, layers)) as runs:
        chains = {chain for group in runs.groups for chain in group.position}
        assert chains == set(MODELS[name][2])
        calls: list[str] = []
        for fqn, layer in layers.items():
            layer.register_forward_hook(lambda module, args, y, fqn=fqn: calls.append(fqn))
        for group in runs.groups:
            runs.advance(group.position)
            calls.clear()
            list(runs.pairs(group))
            assert calls.count(group.layers[0]) == (0 if group.calls == 1 else 2 * group.calls * len(batches))
            for chain, count in group.position.items():
                passed = tuple(f"{chain}.{index}." for index in range(count))  # hooks of a passed layer itself are run
                assert not any(f"{fqn}".startswith(passed) for fqn in calls)


def test_named_blocks_must_be_blocks() -> None:
    model, batches, _ = made("two towers")
    factors = one_shot(model, batches, None)
    plain = reconstruct(model, factors, batches)
    assert_same(reconstruct(model, factors, batches, blocks="encoder"), plain)
    assert_same(reconstruct(model, factors, batches, blocks=["decoder", "encoder"]), plain)
    with pytest.raises(
        ValueError, match=r"'blocks' is not there\. There are: 'encoder', 'encoder\.0\.layers', .*'decoder'"
    ):
        reconstruct(model, factors, batches, blocks="blocks")
    with pytest.raises(ValueError, match=r"'encoder\.0' is a Residual"):
        reconstruct(model, factors, batches, blocks=["encoder.0"])
    for name, blocks in (("skips", "layers"), ("recurrent", "blocks")):
        model, batches, _ = made(name)
        with pytest.raises(ValueError, match=f"blocks='{blocks}' cannot be run block by block"):
            reconstruct(model, one_shot(model, batches, None), batches, blocks=blocks)


def test_layers_of_one_input_are_one_group() -> None:
    for name, expected in {
        "bert": ("encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.key"),
        "llama": ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        "two towers": ("decoder.0.memory", "decoder.1.memory", "decoder.2.memory"),
    }.items():
        model, batches, mask = made(name)
        layers, _ = find_layers(model)
        with PairedRuns(model, layers, batches, call, Masks(model, mask), find_chains(model, layers)) as runs:
            assert any(set(expected) <= set(group.layers) for group in runs.groups)


def output_error(model: nn.Module, factors: dict[str, Factors], batches: list[Any]) -> float:
    compressed = replace_(copy.deepcopy(model), factors)
    with torch.no_grad():
        return sum(float((compressed(*batch) - model(*batch)).square().mean()) for batch in batches)


@pytest.mark.parametrize("batches", [1, 2, 20])
def test_the_error_on_held_out_rows_is_lower(batches: int) -> None:
    model, draw = deep()
    calibration = draw(batches)
    factors = one_shot(model, calibration, None, rank=12)
    found = reconstruct(model, factors, calibration)
    fresh = draw(30)
    ratio = output_error(model, found, fresh) / output_error(model, factors, fresh)
    assert ratio < (0.92 if batches == 20 else 1.0)


@torch.no_grad()
def test_no_layer_is_worse_than_one_shot_on_its_input() -> None:
    """With zero ridge, on the calibration rows, in the metric of the loss."""
    model, draw = deep()
    batches = draw(5)
    covariances = lro.calibrate(model, batches, sensitivity="output", token_weights=False)
    spaces = layer_subspaces(find_layers(model)[0], covariances)
    factors = {fqn: factorize(space, 12, "loss") for fqn, space in spaces.items()}
    found = reconstruct(model, factors, batches, covariances, ridge=0)
    compressed = replace_(copy.deepcopy(model), found)
    x = z = torch.cat([batch[0] for batch in batches])
    gains = []
    for index, block in enumerate(model):
        fqn = f"{index}.0"
        y = block[0](x)
        new, old = (
            y - F.linear(z, part.up @ part.down, part.bias) for part in (found[fqn], factors[fqn])
        )  # fmt: skip
        root = spaces[fqn].loss.root
        gains.append(float((new @ root).square().sum() / (old @ root).square().sum()))
        assert float(new.square().sum() / len(x)) == pytest.approx(found[fqn].predicted_error, rel=1e-5)
        x, z = block(x), compressed[index](z)
    assert gains[0] == pytest.approx(1) and max(gains) < 1 + 1e-9 and min(gains) < 0.95


def test_unsupported_layers_keep_their_factors() -> None:
    class Routed(nn.Module):
        """Rows go to one of two experts, by a layer that compression changes."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(4, 8, 3, groups=2)
            self.router = nn.Linear(8, 8)
            self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
            self.last = nn.Linear(8, 6)
            self.seldom = nn.Linear(8, 6)

        def forward(self, x: Tensor, seldom: bool) -> Tensor:
            h = self.stem(x).mean((2, 3))
            first = self.router(h)[:, 0] > 0
            out = torch.empty_like(h)
            out[first], out[~first] = self.experts[0](h[first]), self.experts[1](h[~first])
            return self.seldom(out) if seldom else self.last(out)

    torch.manual_seed(0)
    model = Routed().double()
    batches = [(torch.randn(64, 4, 6, 6).double(), index == 3) for index in range(4)]
    factors = one_shot(model, batches, None, rank=2)
    with pytest.warns(UserWarning) as caught:
        found = reconstruct(model, factors, batches)
    message = str(caught[0].message)
    assert "stem: it is a convolution with groups" in message
    assert "experts.0: its inputs in the dense and in the compressed model do not correspond" in message
    assert "seldom: the first batch did not reach it" in message
    kept = {fqn for fqn, part in found.items() if not part.reconstructed}
    assert kept == {"stem", "experts.0", "experts.1", "seldom"}
    assert all(found[fqn] is factors[fqn] for fqn in kept) and "router" not in kept

    with pytest.warns(UserWarning, match="more than max_state_bytes"):
        found = reconstruct(model, {"router": factors["router"]}, batches, max_state_bytes=1000)
    assert found["router"] is factors["router"]

    ranks = lro.Ranks({"stem": 2, "router": 2})
    with pytest.warns(UserWarning, match="stem"):
        report = lro.compress_(
            model, lro.calibrate(model, batches), ranks, reconstruction=SequentialReconstruction(batches)
        )
    assert "stem: not reconstructed" in report.table() and "router: not reconstructed" not in report.table()


def test_padding_does_not_count_and_the_dtype_is_kept() -> None:
    model, batches, mask = made("bert")
    factors = one_shot(model, batches, mask)
    padding = [{**batch, "input_ids": batch["input_ids"] + (1 - batch["attention_mask"]) * 7} for batch in batches]
    expected = reconstruct(model, factors, batches, mask=mask)
    assert_same(reconstruct(model, factors, padding, mask=mask), expected)
    low = copy.deepcopy(model).bfloat16()
    found = reconstruct(low, factors, batches, mask=mask)
    assert all(part.reconstructed and part.down.dtype == torch.bfloat16 for part in found.values())
