"""Small mixtures of experts: those of transformers, with random weights, and one of plain modules."""

from typing import Any

import torch
from torch import nn

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
QWEN = {"moe_intermediate_size": 64, "num_experts": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 4},
    "Qwen2Moe": {**QWEN, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {**QWEN, "head_dim": 8},
    "DeepseekV2": {**DEEPSEEK, "moe_intermediate_size": 64, "first_k_dense_replace": 1},
    "DeepseekV3": {**DEEPSEEK, "moe_intermediate_size": 64, "first_k_dense_replace": 1},
    "GptOss": {"intermediate_size": 64, "num_local_experts": 4, "head_dim": 8, "num_key_value_heads": 2},
}


def mixture(family: str = "Mixtral", layers: int = 2, experts: str = "eager", **changes: Any) -> nn.Module:
    """A causal language model with 4 experts, of which each token visits 2, whose biases are not zero."""
    import transformers

    sizes = {**SIZES, **FAMILIES[family], "num_experts_per_tok": 2, "num_hidden_layers": layers, **changes}
    config = getattr(transformers, f"{family}Config")(**sizes, experts_implementation=experts)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "experts" in name:
                parameter.mul_(10)
    return model


def experts_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The names and modules of the experts."""
    return [(name, module) for name, module in model.named_modules() if name.endswith("mlp.experts")]


def tokens(batch: int = 4, positions: int = 64) -> torch.Tensor:
    return torch.randint(64, (batch, positions))


class ListOfExperts(nn.Module):
    """A mixture of plain modules: token i goes to expert ``routes[i]``; expert 2 is called with no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, x: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for index in (0, 1, 2):
            y[routes == index] = self.experts[index](x[routes == index])
        return y
