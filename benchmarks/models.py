"""Models of real shapes with random weights: Vision Transformers and a stack of Llama-like decoder blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class Size:
    """What distinguishes the models; ``tokens`` of one sample, image patches with the class token or text."""

    kind: str  # "vit" or "llama"
    width: int
    depth: int
    heads: int
    hidden: int
    tokens: int
    image: int = 0
    patch: int = 0


SIZES = {
    "ViT-B/16": Size("vit", 768, 12, 12, 3072, 197, 224, 16),
    "ViT-L/16": Size("vit", 1024, 24, 16, 4096, 197, 224, 16),
    "Llama-like, 4 blocks": Size("llama", 4096, 4, 32, 11008, 128),
}
TINY_SIZES = {
    "tiny ViT": Size("vit", 64, 2, 4, 128, 17, 16, 4),
    "tiny Llama": Size("llama", 64, 2, 4, 176, 8),
}


class ViTBlock(nn.Module):
    """Attention and MLP with layer norms before them."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(size.width, eps=1e-6), nn.LayerNorm(size.width, eps=1e-6)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.proj = nn.Linear(size.width, size.width)
        self.fc1, self.fc2 = nn.Linear(size.width, size.hidden), nn.Linear(size.hidden, size.width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A Vision Transformer (Dosovitskiy et al. 2021) with a class token and 1000 classes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size.width, size.patch, size.patch)
        self.token = nn.Parameter(torch.randn(1, 1, size.width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, size.tokens, size.width) * 0.02)
        self.blocks = nn.Sequential(*(ViTBlock(size) for _ in range(size.depth)))
        self.norm, self.head = nn.LayerNorm(size.width, eps=1e-6), nn.Linear(size.width, 1000)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 3, height, width) -> (batch, 1000)
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class LlamaBlock(nn.Module):
    """Causal attention with rotary positions and a gated MLP, without biases."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.RMSNorm(size.width, eps=1e-5), nn.RMSNorm(size.width, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(size.width, size.width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(size.width, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x: (batch, tokens, width)
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Decoder blocks alone: hidden states in, hidden states out."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LlamaBlock(size) for _ in range(size.depth))
        half = size.width // size.heads // 2
        angles = torch.arange(size.tokens)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width), also the result
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class TwoLinears(nn.Sequential):
    """A factorized layer in plain torch, with the factors of one of ours."""

    def __init__(self, layer: lro.LowRankLinear) -> None:
        first, second = (
            nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, device="meta")
            for weight in (layer.down, layer.up)
        )
        first.weight, second.weight, second.bias = layer.down, layer.up, layer.bias
        super().__init__(first, second)


def lowrank_model(size: Size, fraction: float, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model whose blocks' layers are ``LowRankLinear`` with random factors and ``fraction`` of the parameters."""
    torch.manual_seed(0)
    with torch.device(device):
        model = (ViT if size.kind == "vit" else Llama)(size)
    for owner, name, layer in _layers(model.blocks, nn.Linear):
        share = fraction * layer.in_features * layer.out_features
        rank = max(8, int(share / (layer.in_features + layer.out_features)) // 8 * 8)
        thin = lro.LowRankLinear(layer.in_features, layer.out_features, rank, layer.bias is not None, device)
        setattr(owner, name, thin)
    return model.to(dtype).eval().requires_grad_(False)


def variant(model: nn.Module, name: str) -> nn.Module:
    """The same function with layers "dense" or "two_linears", or unchanged: "lowrank_ops"."""
    if name == "lowrank_ops":
        return model
    changed = copy.deepcopy(model)
    for owner, attribute, layer in _layers(changed.blocks, lro.LowRankLinear):
        setattr(owner, attribute, layer.to_dense() if name == "dense" else TwoLinears(layer))
    return changed.requires_grad_(False)


def sample(size: Size, batch: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A random batch: images, or hidden states."""
    shape = (batch, 3, size.image, size.image) if size.kind == "vit" else (batch, size.tokens, size.width)
    if device.type == "meta":
        return torch.empty(shape, device=device, dtype=dtype)
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed)).to(dtype)


def flops(model: nn.Module, size: Size, batch: int) -> float:
    """Of the blocks' factors and attention, which is all but a few percent."""
    thin = sum(layer.down.numel() + layer.up.numel() for _, _, layer in _layers(model.blocks, lro.LowRankLinear))
    return 2.0 * batch * size.tokens * (thin + 2 * size.depth * size.tokens * size.width)


def _layers(module: object, kind: type[Layer]) -> list[tuple[nn.Module, str, Layer]]:
    assert isinstance(module, nn.Module)
    return [
        (owner, name, child)
        for owner in module.modules()
        for name, child in owner.named_children()
        if isinstance(child, kind)
    ]
