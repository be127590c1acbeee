"""Sequential refit: what a plain loop over whole models gives, for any model, resumable, and never half-done."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.demo.vit import ViT
from lowrank_ops.models.layers import find_layers, input_rows
from lowrank_ops.reconstruction import sequential as refit
from lowrank_ops.reconstruction.paired_runs import Streams, find_chains
from lowrank_ops.reconstruction.regression import PairedSums, refit_layers


class Skips(nn.Module):
    """A ModuleList whose later members also see the outputs of earlier ones, so that it is no chain of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)])

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x).tanh()
        return self.layers[3](self.layers[2](self.layers[1](first).tanh()).tanh() + first)


class Recurrent(nn.Module):
    """One block that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 12)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Tanh())])
        self.outside = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(x)
        for _ in range(3):
            h = h + self.blocks[0](h)
        return self.outside(h)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.memory = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x += self.own(x).tanh() * self.memory(memory)  # in place, which must not change what is kept
        return x


class TwoTowers(nn.Module):
    """An encoder whose output all blocks of a decoder read."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Residual() for _ in range(3))
        self.decoder = nn.ModuleList(Reader() for _ in range(3))

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        start = start.clone()
        for encode in self.encoder:
            x = encode(x)
        for decode in self.decoder:
            start = decode(start, memory=x)
        return start


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 12),
    )


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    )


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5Model(config)


def random(*shapes: tuple[int, ...], count: int = 3) -> list[Any]:
    return [tuple(torch.randn(shape) for shape in shapes) for _ in range(count)]


def padded(count: int = 3, decoder: bool = False) -> list[Any]:
    found = []
    for _ in range(count):
        mask = (torch.arange(9) < torch.randint(3, 10, (6, 1))).long()
        ids = torch.randint(1, 50, (6, 9)) * mask
        found.append({"input_ids": ids, "attention_mask": mask, **({"decoder_input_ids": ids} if decoder else {})})
    return found


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], list[str]]] = {
    "sequential": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 9)),
        lambda: random((40, 6)),
        [""],
    ),
    "convolutions": (convolutions, lambda: random((6, 3, 4, 4)), [""]),
    "vit": (lambda: ViT(dim=16, depth=2, heads=2), lambda: random((3, 1, 28, 28)), ["blocks"]),
    "skips": (Skips, lambda: random((40, 6)), []),
    "recurrent": (Recurrent, lambda: random((40, 6)), []),
    "two towers": (TwoTowers, lambda: random((20, 8), (20, 8)), ["encoder", "decoder"]),
    "torch encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2),
        lambda: random((4, 7, 16)),
        ["layers"],
    ),
    "bert": (bert, padded, ["encoder.layer"]),
    "gpt2": (gpt2, padded, ["transformer.h"]),
    "llama": (llama, padded, ["model.layers"]),
    "t5": (t5, lambda: padded(decoder=True), ["encoder.block", "decoder.block"]),
}


def made(name: str) -> tuple[nn.Module, list[Any], str | None]:
    torch.manual_seed(0)
    build, batches, _ = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build().double().eval()
    found = [tuple(part.double() for part in batch) if isinstance(batch, tuple) else batch for batch in batches()]
    return model, found, "attention_mask" if isinstance(found[0], dict) else None


def one_shot(model: nn.Module, batches: list[Any], mask: str | None, rank: int = 3) -> dict[str, lro.Factors]:
    layers, _ = find_layers(model, lambda module, fqn: "lm_head" not in fqn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        covariances = lro.calibrate(model, batches, mask=mask, filter_fn=lambda module, fqn: fqn in layers)
    return {fqn: lro.factorize(space, rank) for fqn, space in lro.layer_subspaces(layers, covariances).items()}


def call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(*batch)


@torch.no_grad()
def by_whole_models(
    model: nn.Module, factors: dict[str, lro.Factors], batches: list[Any], mask: str | None, ridge: float
) -> dict[str, lro.Factors]:
    """The plain loop: for each layer in order, both models whole, and rows as they come."""
    order: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, fqn=fqn: order.append(fqn))
        for fqn, layer in find_layers(model)[0].items()
    ]
    call(model, batches[0])
    for handle in handles:
        handle.remove()
    repeated = {fqn for fqn in factors if order.count(fqn) > 1}
    new: dict[str, lro.Factors] = {fqn: factors[fqn] for fqn in repeated}
    for fqn in dict.fromkeys(name for name in order if name in factors):
        compressed = lro.replace_(copy.deepcopy(model), {name: part for name, part in new.items() if name != ""})
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
        new.update(refit_layers(pairs, {fqn: factors[fqn]}, {}, centered=True, ridge=ridge))
    return new


def assert_same(found: dict[str, lro.Factors], expected: dict[str, lro.Factors]) -> None:
    assert set(found) == set(expected)
    for fqn, part in expected.items():
        product = part.up @ part.down
        torch.testing.assert_close(
            found[fqn].up @ found[fqn].down, product, rtol=1e-5, atol=1e-6 * float(product.abs().max()), msg=fqn
        )
        torch.testing.assert_close(found[fqn].bias, part.bias, rtol=1e-5, atol=1e-6, msg=fqn)
        assert found[fqn].refitted and found[fqn].rank == part.rank


@pytest.mark.parametrize("name", sorted(MODELS))
def test_it_gives_what_whole_models_give(name: str) -> None:
    model, batches, mask = made(name)
    factors = one_shot(model, batches, mask)
    assert len(factors) > 2
    found = lro.refit_factors(model, factors, batches, mask=mask, ridge=1e-3)
    assert_same(found, by_whole_models(model, factors, batches, mask, ridge=1e-3))
    assert list(found) == list(factors)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_blocks_are_found_and_earlier_ones_are_not_run_again(name: str) -> None:
    model, batches, mask = made(name)
    layers, _ = find_layers(model)
    with Streams(model, layers, batches, call, mask, find_chains(model, layers)) as streams:
        chains = {chain for group in streams.groups for chain in group.position}
        assert chains == set(MODELS[name][2])
        calls: list[str] = []
        for fqn, layer in layers.items():
            layer.register_forward_hook(lambda module, args, y, fqn=fqn: calls.append(fqn))
        for group in streams.groups:
            streams.advance(group.position)
            calls.clear()
            list(streams.pairs(group))
            assert calls.count(group.layers[0]) == (0 if group.calls == 1 else 2 * group.calls * len(batches))
            for chain, count in group.position.items():
                passed = tuple(f"{chain}.{index}." for index in range(count))  # hooks of a passed layer itself are run
                assert not any(f"{fqn}".startswith(passed) for fqn in calls)


def test_named_blocks_must_be_blocks() -> None:
    model, batches, _ = made("two towers")
    factors = one_shot(model, batches, None)
    plain = lro.refit_factors(model, factors, batches)
    assert_same(lro.refit_factors(model, factors, batches, blocks="encoder"), plain)
    assert_same(lro.refit_factors(model, factors, batches, blocks=["decoder", "encoder"]), plain)
    with pytest.raises(
        ValueError, match=r"'blocks' is not there\. There are: 'encoder', 'encoder\.0\.layers', .*'decoder'"
    ):
        lro.refit_factors(model, factors, batches, blocks="blocks")
    with pytest.raises(ValueError, match=r"'encoder\.0' is a Residual"):
        lro.refit_factors(model, factors, batches, blocks=["encoder.0"])
    for name, blocks in (("skips", "layers"), ("recurrent", "blocks")):
        model, batches, _ = made(name)
        with pytest.raises(ValueError, match=f"blocks='{blocks}' cannot be run block by block"):
            lro.refit_factors(model, one_shot(model, batches, None), batches, blocks=blocks)


def test_layers_of_one_input_are_one_group() -> None:
    for name, expected in {
        "bert": ("encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.key"),
        "llama": ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        "two towers": ("decoder.0.memory", "decoder.1.memory", "decoder.2.memory"),
    }.items():
        model, batches, mask = made(name)
        layers, _ = find_layers(model)
        with Streams(model, layers, batches, call, mask, find_chains(model, layers)) as streams:
            assert any(set(expected) <= set(group.layers) for group in streams.groups)


def output_error(model: nn.Module, factors: dict[str, lro.Factors], batches: list[Any]) -> float:
    compressed = lro.replace_(copy.deepcopy(model), factors)
    with torch.no_grad():
        return sum(float((compressed(*batch) - model(*batch)).square().mean()) for batch in batches)


def deep(depth: int = 6) -> tuple[nn.Module, Callable[[int], list[Any]]]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(depth)]).double()
    blur = torch.randn(32, 32).double() * torch.logspace(0, -1.5, 32)
    return model, lambda count: [(2 * torch.randn(64, 32).double() @ blur,) for _ in range(count)]


@pytest.mark.parametrize("batches", [1, 2, 20])
def test_the_model_errs_less_on_fresh_rows(batches: int) -> None:
    model, draw = deep()
    calibration = draw(batches)
    factors = one_shot(model, calibration, None, rank=12)
    found = lro.refit_factors(model, factors, calibration)
    fresh = draw(30)
    gained = output_error(model, found, fresh) / output_error(model, factors, fresh)
    assert gained < (0.92 if batches == 20 else 1.0)


@torch.no_grad()
def test_no_layer_errs_more_than_by_one_shot_on_its_input() -> None:
    """With zero ridge, on the calibration rows, in the metric of the loss."""
    model, draw = deep()
    batches = draw(5)
    covariances = lro.calibrate(model, batches, sensitivity="output", weigh_rows=False)
    spaces = lro.layer_subspaces(find_layers(model)[0], covariances)
    factors = {fqn: lro.factorize(space, 12, "loss") for fqn, space in spaces.items()}
    found = lro.refit_factors(model, factors, batches, sensitivities=covariances.sensitivities, ridge=0)
    compressed = lro.replace_(copy.deepcopy(model), found)
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


def state_of(model: nn.Module) -> list[object]:
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    flags = [module.training for module in model.modules()]
    return [[*model.modules()], [sorted(vars(module)) for module in model.modules()], hooks, flags]


class Interrupt(Exception):
    """As by a full disk, or a person."""


def test_an_error_leaves_the_model_untouched() -> None:
    model, draw = deep()
    model[2].train()
    batches = draw(3)
    covariances = lro.calibrate(model, batches)
    before, values = state_of(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    config = lro.CompressionConfig(lro.Ranks({"re:.*": 4}), refit="sequential")

    def failing(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 70:
            raise Interrupt
        return model(*batch)

    calls = 0
    with pytest.raises(Interrupt):
        lro.compress_(model, covariances, config, batches=batches, forward=failing)
    assert state_of(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())

    bad = [*batches, (torch.full((4, 32), float("nan")).double(),)]
    with pytest.raises(lro.NonFiniteActivationError, match=r"layer '0\.0': its input holds NaN or inf"):
        lro.compress_(model, covariances, config, batches=bad)
    assert state_of(model) == before


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draw = deep()
    batches = draw(4)
    factors = one_shot(model, batches, None, rank=12)
    unbroken = lro.refit_factors(model, factors, batches)
    fitted: list[str] = []

    def counting(pairs: PairedSums, *args: Any, **kwargs: Any) -> dict[str, lro.Factors]:
        fitted.extend(pairs.layers)
        if len(fitted) == 4:
            raise Interrupt
        return refit_layers(pairs, *args, **kwargs)

    monkeypatch.setattr(refit, "refit_layers", counting)
    path = tmp_path / "refit.safetensors"
    with pytest.raises(Interrupt):
        lro.refit_factors(model, factors, batches, checkpoint=path)
    assert fitted == ["0.0", "1.0", "2.0", "3.0"]
    for expected in (["3.0", "4.0", "5.0"], []):  # the rest, and then nothing
        fitted[:] = ["-"] * 10
        found = lro.refit_factors(model, factors, batches, checkpoint=path)
        assert fitted[10:] == expected
        for fqn, part in unbroken.items():
            assert torch.equal(found[fqn].down, part.down) and torch.equal(found[fqn].up, part.up)
            assert torch.equal(found[fqn].bias, part.bias) and found[fqn].predicted_error == part.predicted_error
    assert [file.name for file in tmp_path.iterdir()] == ["refit.safetensors"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    model, draw = deep(2)
    batches = draw(2)
    factors = one_shot(model, batches, None)
    path = tmp_path / "refit.safetensors"
    lro.refit_factors(model, factors, batches, checkpoint=path)
    with pytest.raises(ValueError, match=r"is of another run: its ranks differ\. Use the same arguments"):
        lro.refit_factors(model, one_shot(model, batches, None, rank=4), batches, checkpoint=path)
    with pytest.raises(ValueError, match="its batches, ridge differ"):
        lro.refit_factors(model, factors, batches[:1], ridge=0, checkpoint=path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1][0].weight[0] += 1
    with pytest.raises(ValueError, match="its weights differ"):
        lro.refit_factors(other, factors, batches, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read: .*\. Delete it"):
        lro.refit_factors(model, factors, batches, checkpoint=path)
    with pytest.raises(ValueError, match="in a folder that does not exist"):
        lro.refit_factors(model, factors, batches, checkpoint=tmp_path / "no" / "file")
    lro.calibrate(model, batches).save(path)
    with pytest.raises(ValueError, match="was not written by a refit"):
        lro.refit_factors(model, factors, batches, checkpoint=path)


@pytest.mark.parametrize("policy", ["budget", "guided"])
def test_compress_refits_reports_and_saves(policy: str, tmp_path: Path) -> None:
    model, draw = deep()
    dense, batches = copy.deepcopy(model), draw(8)
    covariances = lro.calibrate(model, batches, sensitivity="output")
    fresh = torch.cat([batch[0] for batch in draw(5)])

    def closeness(model: nn.Module) -> float:
        with torch.no_grad():
            return -float((model(fresh) - dense(fresh)).square().mean())

    rank = lro.ParameterBudget(0.6, "loss") if policy == "budget" else lro.AccuracyGuided(closeness, 0.01)
    config = lro.CompressionConfig(rank, projection="loss", refit="sequential", overrides={"5.0": None})
    report = lro.compress_(model, covariances, config, batches=batches)
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
    assert again == report.config and again.refit == "sequential"


def test_what_cannot_be_refitted_keeps_its_factors() -> None:
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
        found = lro.refit_factors(model, factors, batches)
    message = str(caught[0].message)
    assert "stem: it is a convolution with groups" in message
    assert "experts.0: its inputs in the dense and in the compressed model do not correspond" in message
    assert "seldom: the first batch did not reach it" in message
    kept = {fqn for fqn, part in found.items() if not part.refitted}
    assert kept == {"stem", "experts.0", "experts.1", "seldom"}
    assert all(found[fqn] is factors[fqn] for fqn in kept) and "router" not in kept

    with pytest.warns(UserWarning, match="more than max_state_bytes"):
        found = lro.refit_factors(model, {"router": factors["router"]}, batches, max_state_bytes=1000)
    assert found["router"] is factors["router"]

    config = lro.CompressionConfig(lro.Ranks({"stem": 2, "router": 2}), refit="sequential")
    with pytest.warns(UserWarning, match="stem"):
        report = lro.compress_(model, lro.calibrate(model, batches), config, batches=batches)
    assert "stem: not reconstructed" in report.table() and "router: not reconstructed" not in report.table()


def test_bad_arguments_are_refused() -> None:
    model, draw = deep(2)
    batches = draw(2)
    factors, covariances = one_shot(model, batches, None), lro.calibrate(model, batches)
    config = lro.CompressionConfig(refit="sequential")
    with pytest.raises(ValueError, match=r"refit='sequential' runs the model: pass compress_\(\.\.\., batches="):
        lro.compress_(model, covariances, config)
    with pytest.raises(ValueError, match=r"batches are for config\.refit='sequential', which is None"):
        lro.compress_(model, covariances, batches=batches)
    with pytest.raises(ValueError, match="refit must be one of None, 'sequential'; got 'blockwise'"):
        lro.CompressionConfig(refit="blockwise")
    with pytest.raises(ValueError, match="projection='weight' ignores it"):
        lro.CompressionConfig(projection="weight", refit="sequential")
    with pytest.raises(TypeError, match="batches must be a collection of batches; got one Tensor"):
        lro.refit_factors(model, factors, batches[0][0])
    with pytest.raises(ValueError, match="batches was empty"):
        lro.refit_factors(model, factors, iter([]))
    for ridge in (-1, float("nan"), "much", True):
        with pytest.raises(ValueError, match="ridge must be None or a number that is not negative"):
            lro.refit_factors(model, factors, batches, ridge=ridge)
    weighed = {fqn: dataclasses.replace(part, projection="loss") for fqn, part in factors.items()}
    with pytest.raises(ValueError, match=r"lack 0\.0, 1\.0; pass sensitivities=covariances\.sensitivities"):
        lro.refit_factors(model, weighed, batches)
    with pytest.raises(ValueError, match="model is itself the layer to refit"):
        lro.refit_factors(model[0][0], {"": factors["0.0"]}, batches)
    with pytest.raises(ValueError, match="model is compiled"):
        lro.refit_factors(torch.compile(model), factors, batches)
    with pytest.raises(ValueError, match=r"factors names layers that cannot be replaced: 'no'"):
        lro.refit_factors(model, {"no": factors["0.0"]}, batches)
    assert lro.refit_factors(model, {}, batches) == {}
    torch.testing.assert_close(
        lro.refit_factors(model, factors, iter(batches))["1.0"].down,
        lro.refit_factors(model, factors, batches)["1.0"].down,
    )


def test_it_runs_in_the_models_dtype_and_on_its_mask() -> None:
    model, batches, mask = made("bert")
    factors = one_shot(model, batches, mask)
    padding = [{**batch, "input_ids": batch["input_ids"] + (1 - batch["attention_mask"]) * 7} for batch in batches]
    expected = lro.refit_factors(model, factors, batches, mask=mask)
    assert_same(lro.refit_factors(model, factors, padding, mask=mask), expected)  # what padding holds does not count
    low = copy.deepcopy(model).bfloat16()
    found = lro.refit_factors(low, factors, batches, mask=mask)
    assert all(part.refitted and part.down.dtype == torch.bfloat16 for part in found.values())
