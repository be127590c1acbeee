"""The study of a language model: peers' factors, perplexity, and rows that are measured once."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import language
from benchmarks.accuracy.corpora import Corpus, html_text
from lowrank_ops.layers.replace import replace_

transformers = pytest.importorskip("transformers")


class Tokenizer:
    """One token per character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 60 for letter in text]}

    def apply_chat_template(self, chat: Any, **options: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([self(chat[0]["content"])["input_ids"]])}


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=400, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_names_of_variants_list_their_options() -> None:
    for name, variant in language.VARIANTS.items():
        for option in ("damped", "channels", "pivoted", "corrected"):
            assert getattr(variant, option) == (option in name.split(", ")), name


def test_variants_are_measured_once(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = [" ".join(str(i * k) for i in range(300)) for k in range(1, 30)]
    monkeypatch.setattr(language, "corpus", lambda kind, held_out: Corpus(texts[:5], texts[5:10], texts[10:]))
    monkeypatch.setattr(language, "load", lambda folder: (model, Tokenizer()))
    monkeypatch.setattr(language, "PROMPTS", language.PROMPTS[:1])
    arguments = ["--out", str(tmp_path / "rows.json"), "--tokens", "4096", "--test-tokens", "1024", "--budgets", "60"]
    monkeypatch.setattr(language, "STEPS", 8)
    steps = [f"{language.RECIPE}, {step}" for step in ("blocks", "distilled", "distilled with labels")]
    repeated = ["loss, midpoint gradients", "loss, sequential reconstruction"]
    variants = ["ASVD", "output, uniform (SVD-LLM)", *repeated, *steps, "dense, distilled with labels"]
    arguments += ["--calibrate", "both", "--cache", str(tmp_path / "cache"), "--variants", *variants]
    language.main(arguments)
    rows = language.Results(tmp_path / "rows.json").rows
    assert [row["variant"] for row in rows] == variants
    *compressed, dense = rows
    assert dense["layer_share"] == 1 and dense["python_divergence"] > 0  # it was trained
    for row in compressed:
        assert row["layer_share"] <= 0.6 and row["python_divergence"] > 0 and row["handbook_perplexity"] > 1
        assert row["bytes"] < sum(part.nbytes for part in model.parameters()) and row["generated_per_second"] > 0
    language.main(arguments)
    assert language.Results(tmp_path / "rows.json").rows == rows


def test_perplexity_is_that_of_the_labels(model: torch.nn.Module) -> None:
    ids = torch.randint(60, (3, 40))
    logits = [language.logits_of(model, ids)]
    found = language.compare(logits, logits, [ids])
    loss = model(input_ids=ids, labels=ids).loss
    assert found["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert found["agreement"] == 100 and abs(found["divergence"]) < 1e-6


def test_asvd_is_exact_at_full_rank(model: torch.nn.Module) -> None:
    batches = [{"input_ids": torch.randint(60, (4, 40))}]
    covariances = language.lro.calibrate(model, batches, filter_fn=language.is_block_layer)
    spaces = language.layer_subspaces({fqn: model.get_submodule(fqn) for fqn in covariances}, covariances)
    factors = {fqn: language.asvd(space, min(space.dimensions[1:])) for fqn, space in spaces.items()}
    small = replace_(copy.deepcopy(model), factors)
    torch.testing.assert_close(small(**batches[0]).logits, model(**batches[0]).logits, rtol=1e-3, atol=1e-4)


def test_text_of_a_page_has_no_markup() -> None:
    head, body = "<head><title>no</title></head>", "<script>no</script><p>One  <b>bold</b>\nline.</p><li>Item</li>"
    assert html_text(f"<html>{head}<body>{body}</body></html>") == "One bold line.\nItem"
