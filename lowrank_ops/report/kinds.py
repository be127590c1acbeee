"""The role of a layer in the model, by the names that model families use."""

from __future__ import annotations

from torch import nn

from ..models.layers import is_conv

KINDS = ("qkv", "proj", "mlp", "conv", "other")

_QKV = {
    "q", "k", "v", "qkv", "kv", "query", "key", "value", "query_key_value", "q_proj", "k_proj", "v_proj", "qkv_proj",
    "in_proj", "wq", "wk", "wv", "wqkv", "to_q", "to_k", "to_v", "to_qkv", "q_lin", "k_lin", "v_lin", "c_attn",
}  # fmt: skip
_PROJ = {"proj", "o_proj", "out_proj", "wo", "to_out", "out_lin"}
_MLP = {
    "fc", "fc1", "fc2", "c_fc", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "lin1", "lin2",
    "linear1", "linear2", "wi", "wi_0", "wi_1", "dense_h_to_4h", "dense_4h_to_h", "intermediate",
}  # fmt: skip


def kind_of(fqn: str, layer: nn.Module) -> str:
    """One of ``KINDS``.

    - ``"conv"``: a convolution.
    - ``"qkv"``: computes queries, keys or values.
    - ``"proj"``: any other layer in a module with attn or attention in its name, or named as an output projection.
    - ``"mlp"``: a layer of a feed-forward block, by its own name, in a module named mlp, ffn or feed_forward, or
      BERT's ``output.dense`` outside attention.
    - ``"other"``: heads, poolers, and everything else.
    """
    if is_conv(layer):
        return "conv"
    parts = [part for part in fqn.lower().split(".") if not part.isdigit()]
    name, around = (parts[-1], parts[:-1]) if parts else ("", [])
    if name in _QKV:
        return "qkv"
    if any("attn" in part or "attention" in part for part in around):
        return "proj"
    inside = {part.replace("_", "") for part in around}
    if name in _MLP or inside & {"mlp", "ffn", "feedforward", "intermediate"} or parts[-2:] == ["output", "dense"]:
        return "mlp"
    return "proj" if name in _PROJ else "other"
