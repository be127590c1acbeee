"""transformers' Trainer trains compressed models like any other."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lowrank_ops as lro

transformers = pytest.importorskip("transformers")

RANK = 5  # stored as 8


def dense_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def texts(count: int = 64) -> list[dict[str, Tensor]]:
    """The label is the half of the vocabulary that holds the first token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 32, (count, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": (row[0] >= 16).long()} for row in ids]


def test_trainer_trains_the_factors(tmp_path: Path) -> None:
    examples = texts()
    batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
    model = dense_model()
    covariances = lro.calibrate(model, [{key: batch[key] for key in ("input_ids", "attention_mask")}])
    config = lro.CompressionConfig(lro.Ranks({"re:.*layer.*": RANK}), projection="utilized")
    report = lro.compress_(model, covariances, config)
    layers = {fqn: module for fqn, module in model.named_modules() if isinstance(module, lro.LowRankLinear)}
    before = copy.deepcopy(model.state_dict())
    assert len(layers) == 6

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=60,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.7 * sum(losses[:5])

    for fqn, layer in layers.items():
        assert layer.rank == RANK and layer.down.shape[0] == 8
        assert not layer.down[RANK:].any() and not layer.up[:, RANK:].any(), "the padding was trained"
        assert torch.linalg.matrix_rank(layer.up @ layer.down) == RANK
        assert not torch.equal(layer.down, before[f"{fqn}.down"]), "the factors were not trained"

    lro.save_pretrained(model, tmp_path / "smaller", report)
    loaded = lro.load_pretrained(dense_model(), tmp_path / "smaller").eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
