"""Small models of random weights of the families in docs/compatibility.md: transformers' own code, two layers each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 64
_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {**_TEXT, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = {"image_size": 32, "patch_size": 8, "num_labels": 5}


@dataclass(frozen=True)
class Family:
    """How a family's model and one batch of its arguments are made.

    Args:
        model: the name of the class in transformers.
        config: the name of the class of its configuration.
        sizes: arguments of the configuration.
        batch: ``batch(count)`` gives the keyword arguments of a call with ``count`` examples.
        generates: whether ``generate`` applies.
    """

    model: str
    config: str
    sizes: dict[str, Any]
    batch: Callable[[int], dict[str, Tensor]]
    generates: bool = False

    def build(self) -> nn.Module:
        """The model, in evaluation mode."""
        torch.manual_seed(0)
        return getattr(transformers, self.model)(getattr(transformers, self.config)(**self.sizes)).eval()

    def load(self, folder: str) -> nn.Module:
        """``from_pretrained`` of the model's class."""
        return getattr(transformers, self.model).from_pretrained(folder)


def _ids(count: int, length: int = 16) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(count))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


def _text(count: int) -> dict[str, Tensor]:
    return {"input_ids": _ids(count), "attention_mask": torch.ones(count, 16, dtype=torch.long)}


def _image(count: int) -> dict[str, Tensor]:
    return {"pixel_values": _noise(count, 3, 32, 32)}


def _decoder(name: str, generates: bool = True, **sizes: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", {**_DECODER, **_TOKENS, **sizes}, _text, generates)


FAMILIES = {
    "BERT, MiniLM": Family("BertModel", "BertConfig", {**_TEXT, "intermediate_size": 64}, _text),
    "ViT": Family(
        "ViTForImageClassification", "ViTConfig", {**_TEXT, **_IMAGE, "intermediate_size": 64}, _image
    ),
    "Swin": Family(
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        _image,
    ),
    "ConvNeXt": Family(
        "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, _image,
    ),
    "CLIP": Family(
        "CLIPModel", "CLIPConfig",
        {
            "text_config": {**_TEXT, **_TOKENS, "intermediate_size": 64, "max_position_embeddings": 32},
            "vision_config": {**_TEXT, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
            "projection_dim": 24,
        },
        lambda count: _text(count) | _image(count),
    ),
    "T5": Family(
        "T5ForConditionalGeneration", "T5Config",
        {
            **_TOKENS, "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        lambda count: _text(count) | {"decoder_input_ids": _ids(count, 8)},
        generates=True,
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {
            **_TOKENS, "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32, "decoder_start_token_id": 1,
            "suppress_tokens": None, "begin_suppress_tokens": None,
        },
        lambda count: {"input_features": _noise(count, 8, 40), "decoder_input_ids": _ids(count, 8)},
        generates=True,
    ),
    "wav2vec 2.0": Family(
        "Wav2Vec2ForCTC", "Wav2Vec2Config",
        {
            **_TEXT, "intermediate_size": 64, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8],
            "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
        },
        lambda count: {"input_values": _noise(count, 800)},
    ),
    "GPT-2": Family(
        "GPT2LMHeadModel", "GPT2Config",
        {**_TOKENS, "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, _text, True,
    ),
    "Llama": _decoder("Llama"),
    "Qwen 3": _decoder("Qwen3", head_dim=8, tie_word_embeddings=True),
    "Gemma 2": _decoder("Gemma2", head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "Mixtral": _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "DeepSeek V3": _decoder(
        "DeepseekV3", num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=32, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8, first_k_dense_replace=1,
    ),
    "Mamba": Family(
        "MambaForCausalLM", "MambaConfig",
        {**_TOKENS, "vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
        lambda count: {"input_ids": _ids(count)}, True,
    ),
}  # fmt: skip
