"""Models of many architectures with batches for them, and short calls of what is tested."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.calibration.statistics import LayerStatistics
from lowrank_ops.demo.vit import ViT
from lowrank_ops.factors import Factors, factorize
from lowrank_ops.models.layers import find_layers
from lowrank_ops.reconstruction import SequentialReconstruction, reconstruct_factors
from lowrank_ops.subspaces import layer_subspaces


class Skips(nn.Module):
    """A ModuleList that is no chain of blocks: a later child also reads an earlier child's output."""

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
        x += self.own(x).tanh() * self.memory(memory)  # in place, which must not change stored outputs
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
        found.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                **({"decoder_input_ids": ids, "decoder_attention_mask": mask} if decoder else {}),
            }
        )
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


def one_shot(model: nn.Module, batches: list[Any], mask: str | None, rank: int = 3) -> dict[str, Factors]:
    layers, _ = find_layers(model, lambda module, fqn: "lm_head" not in fqn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        covariances = lro.calibrate(model, batches, mask=mask, filter_fn=lambda module, fqn: fqn in layers)
    return {fqn: factorize(space, rank) for fqn, space in layer_subspaces(layers, covariances).items()}


def call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def reconstruct(
    model: nn.Module,
    factors: Mapping[str, Factors],
    batches: Any,
    statistics: Mapping[str, LayerStatistics] | None = None,
    **settings: Any,
) -> dict[str, Factors]:
    """Factors reconstructed on ``batches``."""
    return reconstruct_factors(model, factors, SequentialReconstruction(batches, **settings), statistics=statistics)


def deep(depth: int = 6) -> tuple[nn.Module, Callable[[int], list[Any]]]:
    """A stack of tanh blocks, and a function that draws a number of batches for it."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(depth)]).double()
    blur = torch.randn(32, 32).double() * torch.logspace(0, -1.5, 32)
    return model, lambda count: [(2 * torch.randn(64, 32).double() @ blur,) for _ in range(count)]


def assert_same(
    found: Mapping[str, Factors], expected: Mapping[str, Factors], rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """The same maps and biases, whatever their factorization."""
    assert set(found) == set(expected)
    for fqn, part in expected.items():
        product = part.up @ part.down
        torch.testing.assert_close(
            found[fqn].up @ found[fqn].down, product, rtol=rtol, atol=atol * float(product.abs().max()), msg=fqn
        )
        torch.testing.assert_close(found[fqn].bias, part.bias, rtol=rtol, atol=atol, msg=fqn)
        assert found[fqn].reconstructed and found[fqn].rank == part.rank


def state_of(model: nn.Module) -> list[object]:
    """Everything that a run must leave unchanged, except parameter values."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    flags = [module.training for module in model.modules()]
    return [[*model.modules()], [sorted(vars(module)) for module in model.modules()], hooks, flags]
