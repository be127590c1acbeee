"""Kinds of layers by the names that model families use."""

import pytest
from torch import nn

from lowrank_ops.report import kind_of


@pytest.mark.parametrize(
    ("fqn", "kind"),
    [
        ("blocks.0.attn.qkv", "qkv"),
        ("blocks.0.attn.proj", "proj"),
        ("blocks.0.fc1", "mlp"),
        ("encoder.layer.3.attention.self.query", "qkv"),
        ("encoder.layer.3.attention.output.dense", "proj"),
        ("encoder.layer.3.intermediate.dense", "mlp"),
        ("encoder.layer.3.output.dense", "mlp"),
        ("pooler.dense", "other"),
        ("classifier", "other"),
        ("model.layers.0.self_attn.o_proj", "proj"),
        ("model.layers.0.self_attn.k_proj", "qkv"),
        ("model.layers.0.mlp.down_proj", "mlp"),
        ("transformer.h.0.attn.c_attn", "qkv"),
        ("transformer.h.0.attn.c_proj", "proj"),
        ("transformer.h.0.mlp.c_proj", "mlp"),
        ("transformer.h.0.mlp.c_fc", "mlp"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "mlp"),
        ("down.attn1.to_out.0", "proj"),
        ("feed_forward.net.2", "mlp"),
        ("lm_head", "other"),
        ("", "other"),
        ("0", "other"),
    ],
)
def test_kind_follows_the_names_of_model_families(fqn: str, kind: str) -> None:
    assert kind_of(fqn, nn.Linear(2, 2)) == kind


def test_convolutions_are_known_by_type() -> None:
    assert kind_of("attn.qkv", nn.Conv2d(1, 1, 1)) == "conv"
