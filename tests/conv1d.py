"""transformers' Conv1D, without transformers."""

import torch
from torch import Tensor, nn


class Conv1D(nn.Module):
    """``y = x @ weight + bias``, recognized by its name and module as transformers' own is."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias
