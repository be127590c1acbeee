"""The shapes that are measured: layers of Vision Transformers and of a Llama-like decoder, and their batches."""

from __future__ import annotations

from typing import NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Layer(NamedTuple):
    """A linear layer and the rank of its factors."""

    in_features: int
    out_features: int
    rank: int


class Group(NamedTuple):
    """Linear layers of one input, and the ranks of their factors."""

    name: str
    in_features: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]


class Conv(NamedTuple):
    """A convolution as calibration meets it: batch, channels, square input, square kernel."""

    batch: int
    channels: int
    size: int
    kernel: int
    stride: int
    padding: int


# Ranks as they are stored: multiples of 8.
LAYERS = (
    Layer(768, 768, 136),  # ViT-B/16 attention
    Layer(768, 3072, 216),  # ViT-B/16 MLP
    Layer(1024, 4096, 168),  # ViT-L/16 MLP
    Layer(4096, 4096, 512),  # Llama-like attention
    Layer(4096, 11008, 752),  # Llama-like MLP
    Layer(4096, 4096, 1024),
    Layer(4096, 11008, 1496),
)
GROUPS = (
    Group("ViT-B qkv", 768, (768, 768, 768), (136, 136, 136)),
    Group("ViT-L qkv", 1024, (1024, 1024, 1024), (168, 168, 168)),
    Group("Llama qkv", 4096, (4096, 1024, 1024), (512, 256, 256)),  # grouped-query attention
    Group("Llama gate and up", 4096, (11008, 11008), (752, 752)),
)
QUICK_LAYERS = (LAYERS[1], LAYERS[3])
TOKENS = (1, 4, 16, 64, 256, 2048, 12608, 65536)  # 12608 = 64 images of 197 tokens
QUICK_TOKENS = (1, 64, 12608)

COVARIANCE_FEATURES = (768, 1024, 2048, 3072, 4096, 11008)
COVARIANCE_TOKENS = (8192, 12608, 65536)
QUICK_COVARIANCE_FEATURES = (1024, 4096)
QUICK_COVARIANCE_TOKENS = (12608,)

CONVS = (
    Conv(64, 64, 56, 3, 1, 1),  # ResNet-50, stage 1
    Conv(64, 256, 14, 3, 1, 1),  # stage 3
    Conv(64, 512, 7, 3, 1, 1),  # stage 4
    Conv(64, 3, 224, 16, 16, 0),  # ViT-B/16 patches
)

# What two CPU cores measure in a few minutes.
CPU_COVARIANCE_FEATURES = (512, 1024, 2048, 3072)
CPU_COVARIANCE_TOKENS = 1024
CPU_LAYERS = LAYERS[:4]
CPU_GROUPS = GROUPS[:3]
CPU_TOKENS = (1, 16, 256)
