"""8-bit factors with transformers and PEFT: the same bits after from_pretrained, and adapters that train."""

import copy

import pytest
import torch

import lowrank_ops as lro

transformers = pytest.importorskip("transformers", reason="models of transformers")


def small(dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="module", params=["int8", "fp8"])
def compressed(request):
    model, ids = small(), torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
    covariances = lro.calibrate(
        model, [{"input_ids": ids}], sensitivity="fisher", filter_fn=lambda module, fqn: fqn != "lm_head"
    )
    lro.compress_(model, covariances, lro.ByteBudget(0.5, request.param))
    assert any(isinstance(m, lro.LowRankLinear) and m.formats == (request.param,) * 2 for m in model.modules())
    return model, ids


def same_bits(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype is other[name].dtype, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)), name


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "auto"}, {"dtype": torch.bfloat16}, {"max_shard_size": "20KB"}], ids=str
)
def test_from_pretrained_gives_the_same_bits(compressed, options, tmp_path):
    model, ids = compressed
    model.save_pretrained(tmp_path, **{k: v for k, v in options.items() if k == "max_shard_size"})
    dtype = options.get("dtype", torch.bfloat16)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    same_bits(model, loaded)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_from_pretrained_in_another_dtype(compressed, tmp_path):
    model, ids = compressed
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    same_bits(copy.deepcopy(model).float(), loaded)
    assert {layer.dtype for layer in loaded.modules() if isinstance(layer, lro.LowRankLinear)} == {torch.float32}
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits.float(), atol=0.05, rtol=0.05)


def test_adapters_train_on_eight_bit_factors(compressed):
    peft = pytest.importorskip("peft", reason="adapters")
    model, ids = copy.deepcopy(compressed[0]).float(), compressed[1]
    before = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        losses.append(adapted(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with pytest.raises(RuntimeError, match=r"cannot be merged into 8-bit factors.*dequantize_"):
        adapted.merge_adapter()
    same_bits(before, adapted.unload())
